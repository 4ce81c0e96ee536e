"""The stored cases: the inputs that an experiment is always made with, and which known faults each of them kills.

They lie in ``detr_fixtures/corpus.json``, found by ``detr-conformance corpus --search`` and checked by ``--check``. An
entry of it, under the name of its experiment, is a case in one of three forms, with what it kills in which profiles:

    {"recipe": {"seed": 33, "targets": [0, 2], "queries": 4}, "keep": "no targets in image 0", "kills": {…}}
    {"duel": {"kind": "class", "seed": 5}, "kills": {"detr": ["cost-without-l1"], "deformable-detr dino": […]}}
    {"pair": {"kind": "apart", "pred": [.25, .25, .25, .25], "wanted": [.75, .75, .125, .375]}, "kills": {…}}

An experiment is made with a case in those profiles only in which the case kills something.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeVar

from detr_conformance.cases import BOXES, EDITS, LOGITS, Recipe
from detr_conformance.designed import DUELS
from detr_conformance.errors import ConformanceError
from detr_conformance.registry import near
from detr_reference.options import PROFILES, Options

T = TypeVar("T")
FILE: Final = "corpus.json"


@dataclass(frozen=True)
class Duel:
    """A case of ``designed.duel_case``."""

    kind: str
    seed: int


@dataclass(frozen=True)
class Pair:
    """A predicted box and its target, each cxcywh; ``kind`` says in a word how they lie."""

    kind: str
    pred: tuple[float, ...]
    wanted: tuple[float, ...]


Inputs = Recipe | Duel | Pair


@dataclass(frozen=True)
class Stored:
    """A stored case. ``kills``: ids of faults by profile · ``keep``: the rare shape that it is kept for, whatever else
    kills the same faults."""

    inputs: Inputs
    kills: Mapping[str, tuple[str, ...]]
    keep: str = ""


@dataclass(frozen=True)
class Corpus:
    """``cases`` by experiment · ``missed``: by fault and profile, how many of how many random cases do not kill it ·
    ``alike``: (profile, fault, other fault) of a chapter that no stored case tells apart · ``seed``: the search's."""

    cases: Mapping[str, tuple[Stored, ...]]
    missed: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    alike: tuple[tuple[str, str, str], ...] = ()
    seed: int = 0

    def of(self, experiment: str, profile: str) -> list[Stored]:
        """The cases of an experiment that kill something in a profile."""
        return [one for one in self.cases.get(experiment, ()) if one.kills.get(profile)]


@cache
def corpus() -> Corpus:
    """The corpus that comes with the package. Raises ConformanceError where its file is missing or damaged."""
    return read(own_file().read_text("utf-8"))


def own_file() -> Path:
    """The file that comes with the package. Raises ConformanceError where it is missing."""
    path = Path(str(files("detr_fixtures") / FILE))
    if not path.is_file():
        raise ConformanceError(f"detr_fixtures has no {FILE}: the installation is not complete")
    return path


# --- reading --------------------------------------------------------------------------------------------------------


def read(text: str) -> Corpus:
    """The corpus of a file. Raises ConformanceError that names the damaged place."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged("line " + str(error.lineno), error.msg) from None
    top = _mapping("the file", raw, {"seed", "cases", "missed", "alike"}, {"cases"})
    cases = {
        str(name): tuple(_stored(f"cases of {name}, number {i}", one) for i, one in enumerate(_list(name, entries), 1))
        for name, entries in _mapping("cases", top["cases"]).items()
    }
    missed = {
        fault: {_profile(f"missed, {fault}", p): _shares(f"missed, {fault}", n) for p, n in _mapping(fault, by).items()}
        for fault, by in _mapping("missed", top.get("missed", {})).items()
    }
    alike = tuple(_words("alike", three, 3) for three in _list("alike", top.get("alike", [])))
    return Corpus(cases, missed, alike, _whole("seed", top.get("seed", 0)))  # type: ignore[arg-type]


def _stored(where: str, raw: Any) -> Stored:
    entry = _mapping(where, raw, {*_FORMS, "kills", "keep"}, {"kills"})
    forms = [form for form in _FORMS if form in entry]
    if len(forms) != 1:
        raise _damaged(where, f"it must have one of {', '.join(_FORMS)}")
    kills: dict[str, tuple[str, ...]] = {}
    for profiles, ids in _mapping(f"{where}, kills", entry["kills"]).items():
        found = _words(f"{where}, kills of {profiles}", ids)
        for profile in profiles.split():
            kills[profile] = (*kills.get(_profile(f"{where}, kills", profile), ()), *found)
    kills = {profile: tuple(sorted(kills[profile])) for profile in PROFILES if profile in kills}
    return Stored(_FORMS[forms[0]](where, entry[forms[0]]), kills, str(entry.get("keep", "")))


def _recipe(where: str, raw: Any) -> Recipe:
    required = {f.name for f in fields(Recipe) if f.default is MISSING}
    found = dict(_mapping(where, raw, {f.name for f in fields(Recipe)}, required))
    found["targets"] = tuple(_whole(where, n) for n in _list(f"{where}, targets", found["targets"]))
    for name in ("seed", "queries", "classes", "aux", "encoder_queries", "tokens"):
        found[name] = _whole(f"{where}, {name}", found.get(name, getattr(Recipe, name, 0)))
    for name, known in (("logits", LOGITS), ("boxes", BOXES)):
        if name in found:
            found[name] = _known(f"{where}, {name}", found[name], known)
    edits = _words(f"{where}, edits", found.get("edits", []))
    found["edits"] = tuple(_known(f"{where}, edits", edit, EDITS) for edit in edits)
    options = _mapping(f"{where}, options", found.get("options", {}), set(Options.__dataclass_fields__))
    found["options"] = tuple(options.items())
    return Recipe(**found)


def _duel(where: str, raw: Any) -> Duel:
    names = {"kind", "seed"}
    found = _mapping(where, raw, names, names)
    return Duel(_known(f"{where}, kind", found["kind"], DUELS), _whole(f"{where}, seed", found["seed"]))


def _pair(where: str, raw: Any) -> Pair:
    names = {"kind", "pred", "wanted"}
    found = _mapping(where, raw, names, names)
    return Pair(str(found["kind"]), _box(f"{where}, pred", found["pred"]), _box(f"{where}, wanted", found["wanted"]))


_FORMS: Final[Mapping[str, Callable[[str, Any], Inputs]]] = {"recipe": _recipe, "duel": _duel, "pair": _pair}


def _mapping(where: str, raw: Any, known: Iterable[str] | None = None, required: Iterable[str] = ()) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _damaged(where, f"it must be an object, not {json.dumps(raw)[:40]}")
    for name in raw if known is not None else ():
        _known(where, name, known or ())
    for name in sorted(set(required) - set(raw)):
        raise _damaged(where, f"it has no {name!r}")
    return raw


def _list(where: str, raw: Any) -> list[Any]:
    if not isinstance(raw, list):
        raise _damaged(where, f"it must be a list, not {json.dumps(raw)[:40]}")
    return raw


def _words(where: str, raw: Any, count: int | None = None) -> tuple[str, ...]:
    found = _list(where, raw)
    if not all(isinstance(word, str) for word in found) or count not in (None, len(found)):
        raise _damaged(
            where, f"it must be a list of {count or ''} words, not {json.dumps(raw)[:40]}".replace("  ", " ")
        )
    return tuple(found)


def _known(where: str, raw: Any, known: Iterable[str]) -> str:
    names = list(known)
    if raw not in names:
        raise _damaged(where, f"unknown {raw!r}{near(str(raw), names)}")
    return str(raw)


def _profile(where: str, raw: Any) -> str:
    return _known(where, raw, PROFILES)


def _whole(where: str, raw: Any) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 0:
        raise _damaged(where, f"{json.dumps(raw)[:40]} is not a whole number")
    return raw


def _box(where: str, raw: Any) -> tuple[float, ...]:
    found = _list(where, raw)
    if len(found) != 4 or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in found):
        raise _damaged(where, f"a box has four numbers, not {json.dumps(raw)[:40]}")
    return tuple(float(x) for x in found)


def _shares(where: str, raw: Any) -> tuple[int, int]:
    found = [_whole(where, n) for n in _list(where, raw)]
    if len(found) != 2 or found[0] > found[1]:
        raise _damaged(where, f"{found} must be two numbers: missed, of all")
    return found[0], found[1]


def _damaged(where: str, what: str) -> ConformanceError:
    return ConformanceError(f"{FILE} is damaged: {where}: {what}")


# --- writing --------------------------------------------------------------------------------------------------------


def written(corpus: Corpus) -> str:
    """The file of a corpus, one case a line, so that a changed case is one changed line."""
    cases = [
        f"    {json.dumps(name)}: [\n" + _lines([_entry(one) for one in entries], 6) + "\n    ]"
        for name, entries in corpus.cases.items()
        if entries
    ]
    missed = [f"    {json.dumps(fault)}: {_line(dict(by))}" for fault, by in corpus.missed.items()]
    return (
        f'{{\n  "seed": {corpus.seed},\n  "cases": {{\n'
        + ",\n".join(cases)
        + '\n  },\n  "missed": {\n'
        + ",\n".join(missed)
        + '\n  },\n  "alike": [\n'
        + _lines([list(three) for three in corpus.alike], 4)
        + "\n  ]\n}\n"
    )


def compact(inputs: Inputs) -> dict[str, Any]:
    """A case as it is stored: what is as usual is left out."""
    if not isinstance(inputs, Recipe):
        return {type(inputs).__name__.lower(): asdict(inputs)}
    found = {f.name: getattr(inputs, f.name) for f in fields(Recipe) if getattr(inputs, f.name) != f.default}
    return {"recipe": found | ({"options": dict(inputs.options)} if inputs.options else {})}


def in_line(inputs: Inputs) -> str:
    """The same in one line: it names a case, and orders cases of equal worth."""
    return _line(compact(inputs))


def _entry(one: Stored) -> dict[str, Any]:
    return compact(one.inputs) | ({"keep": one.keep} if one.keep else {}) | {"kills": _kills(one)}


def _kills(one: Stored) -> dict[str, list[str]]:
    """By profiles, those with the same faults together."""
    found: dict[str, list[str]] = {}
    for id in sorted({id for ids in one.kills.values() for id in ids}):
        profiles = " ".join(profile for profile in PROFILES if id in one.kills.get(profile, ()))
        found.setdefault(profiles, []).append(id)
    return found


def _lines(values: Sequence[Any], indent: int) -> str:
    return ",\n".join(" " * indent + _line(value) for value in values)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
