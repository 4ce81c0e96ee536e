"""Which known faults a wrong criterion looks like, computed from its own numbers.

A fault is a textbook with one formula replaced, so it can be evaluated on any input. Where it differs from the right
textbook is its footprint: some losses, gradients or weights, or what it matches. It fits when the candidate's numbers
equal the fault's everywhere in that footprint, on every input tried, and at least SEPARATE inputs tell the fault from
the right textbook. So a criterion with two mistakes in different terms gets both named, each where it shows; where
two mistakes meet in one number, pairs of faults are tried together; and one that nothing explains gets no name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from detr_conformance.bench import BEHAVIOUR, RIGHT, Bench, Suspects
from detr_conformance.budget import budget, uncollected
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import BATCH, CONFIGURED, DUELS, EDGES, MOVED, Experiment
from detr_conformance.findings import Diagnosis
from detr_conformance.footprints import HERE, MATCHED, OWN, Atom, Atoms, Probe, composed, equal, is_log
from detr_conformance.observation import observe
from detr_conformance.registry import Check, Fault, checks, faults
from detr_conformance.search import MATCHING, SEPARATE, Search
from detr_conformance.seen import Seen
from detr_conformance.tallies import Tallies, Tally, judged
from detr_reference.textbook import TERMS

SECONDS: Final = 1.0
LOGGED: Final = re.compile(r"(class|cardinality)_error\w*(, )?")
NUMBER: Final = re.compile(r"\d\.\d|\de[-+]?\d")


class Diagnoser:
    """Diagnoses one candidate; what is evaluated for one of its checks serves the others.

    ``tallies``: what an experiment has found.
    """

    def __init__(self, bound: Bound, tallies: Callable[[Experiment], Tallies]) -> None:
        self.bound, self.bench = bound, Bench(bound, tallies)

    def diagnose(self, check: Check, tally: Tally) -> Diagnosis | None:
        """The faults that fit what the candidate returns where ``check`` fails; None where none does, where more than
        two do that nothing tells apart, or where too few inputs tell."""
        for experiment in () if check.on.numbers else (BATCH, CONFIGURED, EDGES, DUELS):
            self.bench.tallies(experiment)  # which is judging, not diagnosing
        with uncollected():
            found, tried = self._search(check, tally)
        if not found:
            return None
        if len(found) == 1:
            self.bench.named.extend(f for f in found[0] if f not in self.bench.named)
        return _diagnosis(found, tried)

    def _search(self, check: Check, tally: Tally) -> tuple[list[Suspects], int]:
        """The suspects that fit, and on how many inputs they were tried."""
        spent = budget(SECONDS)
        if check.on.numbers:
            few = len(tally.cases) < SEPARATE  # each of these takes more than one call
            return ([] if few else self._by_numbers(check, tally.cases[:SEPARATE], spent)), SEPARATE
        failing = sorted((self.bench.probe(s) for s in tally.seen if not s.raised), key=_order)
        if check.component in BEHAVIOUR:
            behaves = self._by_behaviour(check, [p.seen for p in failing], spent)
            if behaves:
                return [(f,) for f in behaves], SEPARATE
        about = tally.failing[1].what if tally.failing else ""
        at = {view: Search(self.bench, check, view, failing, spent, about) for view in (HERE, MATCHED, OWN)}
        if check.component in MATCHING:
            searches = [at[MATCHED].singles, at[HERE].singles, at[OWN].singles, at[HERE].numbers]
            searches += [at[MATCHED].placed, at[MATCHED].pairs, at[HERE].pairs]
        elif at[HERE].differs:  # some loss is wrong whatever is matched
            searches = [at[HERE].singles, at[OWN].singles, at[HERE].placed, at[HERE].numbers, at[HERE].pairs]
        else:
            searches = [at[MATCHED].singles, at[OWN].singles]
        found = next((found for search in searches if (found := search())), [])
        if not found and check.component not in MATCHING and at[HERE].forms_alone:
            found = [(f,) for f in self._by_behaviour(check, [p.seen for p in failing], spent)]
        return found, len(at[HERE].probes)

    # --- what is no matter of numbers that one call returns ---

    def _by_numbers(self, check: Check, cases: Sequence[Case], spent: Callable[[], bool]) -> list[Suspects]:
        """By what the check's experiment says that tells faults apart; beside the faults that explain other checks,
        where these show in it."""
        numbers = check.on.numbers
        assert numbers is not None

        def of(suspects: Suspects, case: Case) -> Atoms:
            return numbers(self.bench.bound_to(self.bench.book(suspects)), case)

        theirs, right = [numbers(self.bound, case) for case in cases], [of(RIGHT, case) for case in cases]
        chapter = check.clause.id.split("-")[0]
        known = [
            f
            for f in faults(self.bound.profile)
            if f.check.on.numbers is numbers
            and (f.check.component == check.component or f.check.clause.id.split("-")[0] == chapter)
        ]
        named = [f for f in self.bench.named if f not in known]
        others = tuple(f for f in named if not spent() and _own(of((f,), cases[0]), right[0]))
        without = [of(others, case) for case in cases] if others else right
        fitting: list[Suspects] = []
        for suspects in ((*others, f) for f in known):
            if spent():
                return []  # not all were tried, so none can be told apart
            wrong: list[Atoms] = []
            for case, t, r in zip(cases, theirs, right, strict=True):
                wrong.append(of(suspects, case))
                if not _agrees(t, wrong[-1], r):
                    break  # each of these takes more than one call
            fits = len(wrong) == len(cases) and _fits(theirs, wrong, without)  # so that it matters beside the others
            if fits and self.bench.breaks(suspects, check, cases[0]):
                fitting.append(suspects)
        return fitting if len(fitting) <= (1 if others else 2) else []

    def _by_behaviour(self, check: Check, failing: Sequence[Seen], spent: Callable[[], bool]) -> list[Fault]:
        """By what the checks of the experiment say: which of them fail, and in what."""
        profile, seen = self.bound.profile, list(failing[:SEPARATE])
        if len(seen) < SEPARATE:
            seen += [check.on.observe(self.bound, p.seen.case) for p in self.bench.further[: SEPARATE - len(seen)]]
        if len(seen) < SEPARATE or not all(any(not c.ok for c in judged(check, s)) for s in seen):
            return []
        theirs = [_behaviour(s, profile, check) for s in seen]
        changed = _kind(seen[0].got.changed) if seen[0].got.changed else ()
        fitting: list[Fault] = []
        drawing: list[Fault] = []
        known = (f for f in faults(profile) if f.check.on is check.on)
        for fault in sorted(known, key=lambda f: (f.check is not check, f.check.component != check.component)):
            if spent():
                if fault.check is check:
                    return []  # not all of those were tried that could be mistaken for each other
                break
            wrong = self.bench.bound_to(fault.apply(composed(RIGHT)))
            if changed and _kind(observe(wrong, seen[0].case, grads=False, inputs=True).changed) != changed:
                continue  # which one call tells
            fits = draws = True
            for s, own in zip(seen, theirs, strict=True):
                found = _behaviour(check.on.observe(wrong, s.case), profile, check)
                fits, draws = fits and found == own, draws and _draws_alone(found, own)
                if not (fits or draws):
                    break  # each of these takes many calls
            fitting += [fault] * fits
            drawing += [fault] * draws
        return fitting if 1 <= len(fitting) <= 2 else drawing  # what random numbers are for may not be told


def _draws_alone(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> bool:
    """True where a fault moves the random state that the candidate moves, and nothing else is random about it."""
    moved = ours.get(MOVED)
    return bool(moved) and moved == theirs.get(MOVED) and sum(v is False for v in ours.values()) == 1


def _diagnosis(found: Sequence[Suspects], tried: int) -> Diagnosis:
    """Alternatives of one fault each, or one of several together."""
    named = [fault for suspects in found for fault in suspects]
    seen_in = next((f.seen_in for f in named if f.seen_in != "plausible"), "")
    fixes = "; ".join(dict.fromkeys(f.fix for f in named))
    advice = " · ".join([f"seen in {seen_in}"] * bool(seen_in) + [f"usual fix: {fixes}"])
    together = len(found) == 1 and len(found[0]) > 1
    return Diagnosis(tuple((f.id, f.sentence) for f in named), tried, tried, advice, together)


def _fits(theirs: Sequence[Atoms], wrong: Sequence[Atoms], right: Sequence[Atoms]) -> bool:
    """True where the candidate's numbers are a fault's in all of its footprint, and enough cases show one."""
    footprint: set[Atom] = set()
    separate = 0
    for t, w, r in zip(theirs, wrong, right, strict=True):
        if not _agrees(t, w, r):
            return False
        own = _own(w, r)
        footprint |= own
        separate += bool(own)
    everywhere = all(equal(t.get(a), w.get(a)) for t, w in zip(theirs, wrong, strict=True) for a in footprint)
    return separate >= SEPARATE and everywhere


def _own(wrong: Atoms, right: Atoms) -> set[Atom]:
    """Where a fault shows on one input."""
    return {a for a in {*wrong, *right} if not equal(wrong.get(a), right.get(a))}


def _agrees(theirs: Atoms, wrong: Atoms, right: Atoms) -> bool:
    """True where the candidate's numbers are a fault's wherever that shows on one input."""
    return all(equal(theirs.get(a), wrong.get(a)) for a in _own(wrong, right))


def _behaviour(seen: Seen, profile: str, check: Check) -> dict[Any, Any]:
    """What the checks of the experiment say of an observation, whether its first call was right, what it changed."""
    found: dict[Any, Any] = {"right": seen.raised or all(seen.agrees(t, "final") for t in TERMS)}
    for own in checks(profile):
        for one in judged(own, seen) if own.on is check.on else ():
            what = re.sub(r"^the logged \w+", "what is logged", one.what.split(", ", 1)[-1])  # which is free
            if not one.ok and own.clause.level != "information":  # what all is well with differs with what is logged
                got = "" if check.component in BEHAVIOUR or NUMBER.search(one.got) else LOGGED.sub("", one.got)
                found[own.name, what, got] = False
    return found | {"changed": _kind(seen.got.changed), MOVED: seen.remarks.get(MOVED)}


def _kind(change: str) -> tuple[str, ...]:
    """What kind of change a call makes to its inputs: to which of the two, to what part of it, and how."""
    path, _, how = change.partition(" ")
    parts = re.findall(r"\['(\w+)'\]", path)
    if how.startswith("keys"):
        old, _, new = how.partition(", are (")
        how = "more keys" if new.count(",") > old.count(",") else "fewer keys"
    return path.split("[")[0], *parts[-1:], how.split(" ")[0] if how.startswith("length") else how


def _order(probe: Probe) -> tuple[bool, int]:
    """Where a loss is clearly wrong comes first, and a small input before a large one."""
    case = probe.seen.case
    theirs, right = probe.theirs(HERE), probe.of(RIGHT, composed(RIGHT), HERE)
    wrong = any(a[0] == "loss" and not is_log(a) and not probe.equal(a, theirs.get(a), v) for a, v in right.items())
    return not wrong, sum(v.numel() for n in case.layers for v in case.predictions(n).values()) + 4 * case.total
