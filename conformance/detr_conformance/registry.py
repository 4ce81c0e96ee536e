"""Clause, check, fault: the three declarations, and what is true of all of them.

A chapter of ``detr_conformance.contract`` states each clause as a sentence and puts beside it the check that judges
it and the faults that break it. Importing the chapters fills the registry; nothing else knows their names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from detr_conformance.findings import COMPONENTS

if TYPE_CHECKING:
    from detr_conformance.experiments import Experiment
    from detr_conformance.seen import Seen
    from detr_reference.textbook import Textbook

T = TypeVar("T")
Level = Literal["must", "should", "information"]

DETR: Final = frozenset({"detr"})
FOCAL: Final = frozenset({"deformable-detr", "dino"})
TEXT: Final = frozenset({"grounding-dino"})
EVERY: Final = DETR | FOCAL | TEXT


@dataclass(frozen=True)
class Clause:
    """One normative sentence. ``id`` is never reused; ``profiles`` are those that it binds."""

    id: str
    level: Level
    profiles: frozenset[str]
    sentence: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One number that the candidate returned beside the one that the contract asks for.

    ``ok`` is the verdict; ``what`` names the quantity; ``how`` says in words where ``want`` comes from;
    ``note`` is worth reading also where all is well; ``beyond``: how many times the allowed error a number is off,
    ∞ for what is no number; ``numbers``: want, got and allowed, where the quantity is one number.
    """

    ok: bool
    what: str
    want: str
    got: str
    allowed: str = ""
    how: str = ""
    note: str = ""
    beyond: float = math.inf
    numbers: tuple[float, float, float] | None = None


Judge = Callable[["Seen"], Iterator[Comparison]]


@dataclass(frozen=True)
class Check:
    """A function that judges one clause on what a candidate returned.

    It yields a Comparison for everything that it can decide in one observation, and nothing where the observation
    does not concern it. ``after``: names of checks without which this one says nothing new. ``takes_raising``: the
    check of its experiment that answers for a candidate that raises, hangs or ends the process. ``measures``: it tells
    a number for information, and judges nothing.
    """

    name: str
    clause: Clause
    on: Experiment
    component: str
    judge: Judge
    after: tuple[str, ...]
    takes_raising: bool
    profiles: frozenset[str]
    measures: bool = False


@dataclass(frozen=True, eq=False)
class Fault:
    """The textbook with one formula replaced: a known way of going wrong.

    ``id`` is never reused; ``sentence`` says what is computed instead; ``check`` must catch it; ``seen_in`` names a
    project and file or issue, or is "plausible"; ``fix`` is one line; ``survives``: why the check cannot catch it, by
    profile. ``at``: of a fault that differs from others by a number alone, the fault with that number, which is between
    the two of ``span``.
    """

    id: str
    sentence: str
    check: Check
    profiles: frozenset[str]
    apply: Callable[[Textbook], Textbook]
    seen_in: str
    fix: str
    survives: Mapping[str, str] = field(default_factory=dict)
    at: Callable[[float], Fault] | None = None
    span: tuple[float, float] = (0.0, 0.0)


_clauses: dict[str, Clause] = {}
_checks: dict[str, Check] = {}
_faults: dict[str, Fault] = {}


def clause(id: str, level: Level, profiles: frozenset[str], sentence: str, sources: Sequence[str] = ()) -> Clause:
    """Declare a clause. Raises ValueError where the id is taken."""
    return _add(_clauses, id, Clause(id, level, profiles, sentence, tuple(sources)))


def check(
    clause: Clause,
    *,
    on: Experiment,
    component: str,
    after: Iterable[Check | str] = (),
    takes_raising: bool = False,
    profiles: frozenset[str] | None = None,
    measures: bool = False,
) -> Callable[[Judge], Check]:
    """Declare the decorated function as a check of ``clause`` that judges each observation of ``on``."""
    if measures and clause.level != "information":
        raise ValueError(f"{clause.id} is no information, so its checks must judge")
    if component not in COMPONENTS:
        raise ValueError(f"unknown component {component!r}")

    def declare(judge: Judge) -> Check:
        name = str(judge.__name__)
        bound = clause.profiles if profiles is None else profiles & clause.profiles
        earlier = tuple(c if isinstance(c, str) else c.name for c in after)
        return _add(_checks, name, Check(name, clause, on, component, judge, earlier, takes_raising, bound, measures))

    return declare


def fault(
    check: Check,
    *,
    seen_in: str = "plausible",
    fix: str = "",
    profiles: frozenset[str] | None = None,
    survives: Mapping[str, str] | None = None,
) -> Callable[[Callable[[Textbook], Textbook]], Fault]:
    """Declare the decorated function as a fault that ``check`` must catch. Its name is the id, its docstring the
    sentence."""

    def declare(apply: Callable[[Textbook], Textbook]) -> Fault:
        id = str(apply.__name__).replace("_", "-")
        sentence = " ".join((apply.__doc__ or "").split())
        if not sentence:
            raise ValueError(f"fault {id!r} has no sentence")
        bound = check.profiles if profiles is None else profiles & check.profiles
        return _add(_faults, id, Fault(id, sentence, check, bound, apply, seen_in, fix, dict(survives or {})))

    return declare


def known(
    check: Check,
    id: str,
    sentence: str,
    *,
    fix: str,
    seen_in: str = "plausible",
    profiles: frozenset[str] | None = None,
    around: Mapping[str, Callable[..., Any]] | None = None,
    **formulas: Any,
) -> Fault:
    """Declare a fault that replaces formulas by others, in one line.

    ``formulas``: by name, called as ``formula(book, …)`` · ``around``: by name, called as ``formula(before, book, …)``
    with the formula as it was, so that two such faults can be in one book.
    """
    bound = check.profiles if profiles is None else profiles & check.profiles
    return _add(_faults, id, Fault(id, sentence, check, bound, _replacing(around or {}, formulas), seen_in, fix))


def varied(
    check: Check,
    id: str,
    sentence: str,
    *,
    usual: float,
    span: tuple[float, float],
    around: Callable[[float], Mapping[str, Callable[..., Any]]],
    fix: str,
    seen_in: str = "plausible",
    profiles: frozenset[str] | None = None,
) -> Fault:
    """Declare faults that differ by a number alone, as one whose number a diagnosis finds.

    ``sentence``: with ``{0:g}`` where the number is · ``usual``: the number in the catalogue · ``span``: the least and
    the greatest · ``around``: from the number, as of ``known``.
    """
    bound = check.profiles if profiles is None else profiles & check.profiles

    def at(value: float) -> Fault:
        apply = _replacing(around(value), {})
        return Fault(id, sentence.format(value), check, bound, apply, seen_in, fix, at=at, span=span)

    return _add(_faults, id, at(usual))


def _replacing(around: Mapping[str, Callable[..., Any]], formulas: Mapping[str, Any]) -> Callable[[Textbook], Textbook]:
    def apply(book: Textbook) -> Textbook:
        wrapped = {name: _around(getattr(book, name).__func__, change) for name, change in around.items()}
        every: dict[str, Any] = {**formulas, **wrapped}
        return replace(book, **every)

    return apply


def _around(formula: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda book, *args: change(partial(formula, book), book, *args)


def clauses() -> tuple[Clause, ...]:
    """All clauses, in the contract's order."""
    _load()
    return tuple(_clauses.values())


def checks(profile: str | None = None, level: str = "should", only: Sequence[str] = ()) -> tuple[Check, ...]:
    """All checks that bind ``profile`` at ``level``; ``only`` selects by clause (BOX-2), chapter (BOX) or name.

    Raises ValueError that names an unknown selection and the nearest known one.
    """
    _load()
    for wanted in only:
        if not any(_selects(wanted, c) for c in _checks.values()):
            known = [*_clauses, *{i.split("-")[0] for i in _clauses}, *_checks]
            raise ValueError(f"unknown clause {wanted!r}{near(wanted, known)}")
    return tuple(
        c
        for c in _checks.values()
        if (profile is None or profile in c.profiles)
        and (level == "should" or c.clause.level == "must")
        and (not only or any(_selects(wanted, c) for wanted in only))
    )


def faults(profile: str | None = None) -> tuple[Fault, ...]:
    """All faults, or those of one profile."""
    _load()
    return tuple(f for f in _faults.values() if profile is None or profile in f.profiles)


def near(wanted: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` where something known is spelled alike, else an empty string."""
    by_fold = {k.lower(): k for k in known}
    found = difflib.get_close_matches(wanted.lower(), list(by_fold), n=1, cutoff=0.5)
    return f"; did you mean {by_fold[found[0]]!r}?" if found else ""


def _selects(wanted: str, c: Check) -> bool:
    wanted = wanted.lower()
    return wanted in (c.clause.id.lower(), c.clause.id.split("-")[0].lower(), c.name)


def _add(where: dict[str, T], key: str, value: T) -> T:
    if key in where:
        raise ValueError(f"{key!r} is declared twice")
    where[key] = value
    return value


def _load() -> None:
    from detr_conformance import contract

    contract.load()
