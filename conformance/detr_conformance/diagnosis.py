"""Which known faults a wrong criterion looks like, computed from its own numbers.

A fault is a textbook with one formula replaced, so it can be evaluated on any input. Where it differs from the right
textbook is its footprint: some losses, gradients or weights, or what it matches. It fits when the candidate's numbers
equal the fault's everywhere in that footprint, on every input tried, and at least SEPARATE inputs tell the fault from
the right textbook. So a criterion with two mistakes in different terms gets both named, each where it shows; where
two mistakes meet in one number, pairs of faults are tried together; and one that nothing explains gets no name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.budget import budget
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case
from detr_conformance.experiments import BATCH, CONFIGURED, DUELS, EDGES, Experiment
from detr_conformance.findings import Diagnosis
from detr_conformance.footprints import (
    ANY_TERM,
    HERE,
    MATCHED,
    OWN,
    Atom,
    Atoms,
    Probe,
    changed,
    composed,
    equal,
    is_log,
    named_otherwise,
)
from detr_conformance.registry import Check, Fault, checks, faults
from detr_conformance.seen import Seen
from detr_conformance.tallies import Tallies, Tally, judged
from detr_reference.textbook import TERMS, Textbook

SEPARATE: Final = 3
SECONDS: Final = 1.0

MATCHING: Final = frozenset({"matching", "matching costs"})
BEHAVIOUR: Final = frozenset(
    {"side effects", "refusals", "precision", "devices", "ranks"}
)  # no matter of numbers alone
PARTS: Final = frozenset({"masks", "denoising"})  # that few cases have
COSTS_ALONE: Final = frozenset(
    {"softmax_cost", "focal_difference", "focal_cost", "token_cost", "class_cost", "cost", "assign", "match"}
    | {"layer_match", "indices"}
)
LOSSES_ALONE: Final = frozenset(
    {"class_weight", "softmax_class_target", "softmax_loss", "softmax_divisor", "focal_term", "alpha_weight"}
    | {"focusing", "focal_class_target", "token_class_target", "in_loss", "focal_image", "focal_loss", "class_divisor"}
    | {"num_boxes", "over_ranks", "matched_boxes", "loss_ce", "loss_bbox", "loss_giou", "layer_losses", "layer_mask"}
    | {"layer_num_boxes", "class_error", "cardinality_error", "logged", "scaled", "weights", "losses", "mask_losses"}
)
RIGHT: Final[tuple[Fault, ...]] = ()

Suspects = tuple[Fault, ...]  # one fault, or some together


@dataclass(frozen=True, eq=False)
class Difference:
    """On one input: where suspects differ from the right textbook, and whether the candidate's numbers are theirs."""

    own: frozenset[Atom]
    agrees: bool


class Bench:
    """Diagnoses one candidate; what is evaluated for one of its checks serves the others.

    ``tallies``: what an experiment has found.
    """

    def __init__(self, bound: Bound, tallies: Callable[[Experiment], Tallies]) -> None:
        self.bound, self._tallies = bound, tallies
        self._probes: dict[int, Probe] = {}
        self._books: dict[Suspects, Textbook] = {}

    def diagnose(self, check: Check, tally: Tally) -> Diagnosis | None:
        """The faults that fit what the candidate returns where ``check`` fails; None where none does, where more than
        two do that nothing tells apart, or where too few cases tell."""
        if len(tally.seen) < SEPARATE:
            return None
        spent = budget(SECONDS)
        if check.on.numbers:
            return self._by_numbers(check, tally.cases[:SEPARATE], spent)
        failing = sorted((self._probe(s) for s in tally.seen if not s.raised), key=_size)
        views = (MATCHED, HERE, OWN) if check.component in MATCHING else (HERE, MATCHED, OWN)
        searches = [Search(self, check, view, failing, spent) for view in views]
        for search in searches:
            if search.differs:
                found = search.singles()
                if found:
                    return _diagnosis([(s,) for s in found], len(search.probes))
        behaves = self._by_behaviour(check, failing[:SEPARATE], spent)
        if behaves:
            return _diagnosis([(f,) for f in behaves], SEPARATE)
        for search in searches[:2]:
            pairs = search.pairs() if search.differs else []
            if pairs:
                return _diagnosis(pairs[:1], len(search.probes))
        return None

    # --- what is evaluated ---

    def book(self, suspects: Suspects) -> Textbook:
        """The textbook with these faults."""
        if suspects not in self._books:
            self._books[suspects] = composed(suspects)
        return self._books[suspects]

    def breaks(self, suspects: Suspects, check: Check, case: Case) -> bool:
        """True where the faults fail the check on a case that the candidate fails it on."""
        seen = check.on.observe(self._bound_to(composed(suspects)), case)
        return any(not comparison.ok for comparison in judged(check, seen))

    def suspects(self, plain: bool) -> list[Fault]:
        """The faults of the profile whose numbers can be compared; those of masks and denoising where a case is not
        plain."""
        return [
            f
            for f in faults(self.bound.profile)
            if not f.check.on.numbers
            and f.check.component not in BEHAVIOUR
            and not (plain and f.check.component in PARTS)
        ]

    @cached_property
    def elsewhere(self) -> list[Probe]:
        """Ordinary inputs, edges and other options, on which what fits must fit as well."""
        found = []
        for experiment, count in ((BATCH, 6), (CONFIGURED, 3), (EDGES, 4)):
            every = [s for s in self._tallies(experiment).seen if not s.raised]
            found += [self._probe(s) for s in every[:: max(1, len(every) // count)][:count]]
        return found

    def duels(self) -> list[Probe]:
        """Inputs that costs decide."""
        return [self._probe(s) for s in self._tallies(DUELS).seen if not s.raised]

    def _probe(self, seen: Seen) -> Probe:
        return self._probes.setdefault(id(seen), Probe(seen))

    def _bound_to(self, book: Textbook) -> Bound:
        """A book as a candidate, called as the candidate is called."""
        return replace(bind(candidate_of(book, self.bound.profile)), device=self.bound.device)

    # --- what is no matter of numbers that one call returns ---

    def _by_numbers(self, check: Check, cases: Sequence[Case], spent: Callable[[], bool]) -> Diagnosis | None:
        """By what the check's experiment says that tells faults apart."""
        numbers = check.on.numbers
        assert numbers is not None
        theirs, right = ([numbers(b, case) for case in cases] for b in (self.bound, self._bound_to(composed(RIGHT))))
        fitting = []
        chapter = check.clause.id.split("-")[0]
        for fault in faults(self.bound.profile):
            if fault.check.on.numbers is not numbers:
                continue
            if fault.check.component != check.component and fault.check.clause.id.split("-")[0] != chapter:
                continue
            if spent():
                return None  # not all were tried, so none can be told apart
            wrong = [numbers(self._bound_to(fault.apply(composed(RIGHT))), case) for case in cases]
            if _fits(theirs, wrong, right) and self.breaks((fault,), check, cases[0]):
                fitting.append(fault)
        return _diagnosis([(f,) for f in fitting], len(cases)) if 1 <= len(fitting) <= 2 else None

    def _by_behaviour(self, check: Check, probes: Sequence[Probe], spent: Callable[[], bool]) -> list[Fault]:
        """By what the checks of the experiment say: which of them fail, and in what."""
        own = [f for f in faults(self.bound.profile) if f.check.on is check.on and f.check.component in BEHAVIOUR]
        fitting = []
        for fault in own if check.component in BEHAVIOUR else ():
            if spent():
                return []
            if all(self._behaves(check, fault, probe) for probe in probes):
                fitting.append(fault)
        return fitting if len(fitting) <= 2 else []

    def _behaves(self, check: Check, fault: Fault, probe: Probe) -> bool:
        seen = check.on.observe(self._bound_to(fault.apply(composed(RIGHT))), probe.seen.case)
        return _behaviour(seen, self.bound.profile, check) == _behaviour(probe.seen, self.bound.profile, check)


class Search:
    """The search for what explains a failing check, in one view of the numbers."""

    def __init__(
        self, bench: Bench, check: Check, view: str, failing: Sequence[Probe], spent: Callable[[], bool]
    ) -> None:
        self.bench, self.check, self.view, self.failing, self.spent = bench, check, view, failing, spent
        self._seen: dict[tuple[Suspects, int, bool], Difference] = {}

    @cached_property
    def probes(self) -> list[Probe]:
        """The failing inputs, the smallest first, and neighbours on which a fault must fit as well."""
        more = [*self.bench.duels(), *self.bench.elsewhere] if self.view == MATCHED else self.bench.elsewhere
        return [*self.failing, *(p for p in more if p not in self.failing)]

    @property
    def differs(self) -> bool:
        """True where the candidate's own numbers differ from the textbook's on the first input."""
        return bool(self.failing) and bool(self.wrong)

    @cached_property
    def wrong(self) -> frozenset[Atom]:
        """Where they differ, gradients aside; or where the gradients do."""
        probe = self.failing[0]
        theirs, right = self._theirs(probe), self._of(probe, RIGHT)
        found = self._unequal(probe, theirs, right, theirs)
        if found or self.view == MATCHED:
            return found
        slopes = self._gradients(probe, RIGHT)
        return frozenset(a for a in slopes if self._counts(a) and not probe.equal(a, theirs.get(a), slopes[a]))

    @cached_property
    def known(self) -> list[Fault]:
        """The faults that can show in this view, those of the check's own clause and component first."""
        check = self.check
        plain = self.failing[0].seen.case.plain
        alone = {HERE: COSTS_ALONE, MATCHED: LOSSES_ALONE, OWN: frozenset[str]()}[self.view]
        found = [f for f in self.bench.suspects(plain) if not changed(self.bench.book((f,))) <= alone]
        if self.view == OWN:
            found = [f for f in found if f.check.component in MATCHING or f.check is check]
        order = [lambda f: f.check is check, lambda f: f.check.clause is check.clause]
        order += [lambda f: f.check.component == check.component]
        return sorted(found, key=lambda f: tuple(not o(f) for o in order))

    # --- single faults ---

    def singles(self) -> list[Fault]:
        """The one or two faults that fit."""
        fitting = []
        for fault in self.known:
            if self.spent():
                return []  # not all were tried, so none can be told apart
            if self.fits((fault,)):
                fitting.append(fault)
        fitting = [f for f in fitting if self.bench.breaks((f,), self.check, self.failing[0].seen.case)]
        for prefers in (self._agrees_in_all, lambda f: f.check is self.check, lambda f: f.check.on is self.check.on):
            chosen = [f for f in fitting if prefers(f)] if len(fitting) > 1 else []
            fitting = chosen or fitting
        return fitting if len(fitting) <= 2 else []

    def fits(self, suspects: Suspects) -> bool:
        """True where the candidate's numbers are these faults' everywhere in their footprint, and enough inputs show
        one, the first of all."""
        footprint: set[Atom] = set()
        separate = 0
        for i, probe in enumerate(self.probes):
            found = self._difference(probe, suspects, slopes=False)
            if not found.agrees or (i == 0 and not found.own and self.view == MATCHED):
                return False
            if self.view != MATCHED:
                slopes = self._difference(probe, suspects, slopes=True)
                found = Difference(found.own | slopes.own, slopes.agrees)
                if not found.agrees or (i == 0 and not found.own):
                    return False
            footprint |= found.own
            separate += bool(found.own)
        return separate >= SEPARATE and all(self._agrees_on(probe, suspects, footprint) for probe in self.probes)

    def _agrees_in_all(self, fault: Fault) -> bool:
        """True where nothing contradicts a fault in the other view of the numbers either."""
        other = HERE if self.view == MATCHED else MATCHED
        search = Search(self.bench, self.check, other, self.failing, self.spent)
        return all(search._difference(p, (fault,), slopes=False).agrees for p in search.probes)

    # --- two faults together ---

    def pairs(self) -> list[Suspects]:
        """Two faults that fit together where none does alone."""
        for one, two in self._likely():
            if self.spent():
                return []
            for suspects in ((one, two), (two, one)):
                if not self._lost(suspects) and self.fits(suspects):
                    case = self.failing[0].seen.case
                    if self.bench.breaks(suspects, self.check, case):
                        return [suspects]
        return []

    def _likely(self) -> Iterator[Suspects]:
        """Pairs whose numbers do not contradict the candidate's where only one of the two shows; those first whose
        effects, multiplied or added, are the candidate's."""
        probe = self.failing[0]
        shown = {}
        for fault in self.known:
            own = self._difference(probe, (fault,), slopes=False).own
            if own & self.wrong and not self.spent():
                shown[fault] = own
        right, theirs = self._of(probe, RIGHT), self._theirs(probe)
        good = {
            f: {a for a in own if probe.equal(a, theirs.get(a), self._of(probe, (f,)).get(a))}
            for f, own in shown.items()
        }
        later: list[Suspects] = []
        every = list(shown)
        for i, one in enumerate(every):
            for two in every[i + 1 :]:
                a, b = shown[one], shown[two]
                if not (a - b <= good[one] and b - a <= good[two] and self.wrong <= a | b):
                    continue
                ones, twos = self._of(probe, (one,)), self._of(probe, (two,))
                if all(_together(x, ones, twos, right, theirs) for x in a & b):
                    yield one, two
                else:
                    later.append((one, two))
        yield from later

    def _lost(self, suspects: Suspects) -> bool:
        """True where the second fault undoes the first, so that it is alone."""
        probe = self.failing[0]
        both, last = self._of(probe, suspects), self._of(probe, suspects[1:])
        return all(probe.equal(a, both.get(a), last.get(a)) for a in {*both, *last})

    # --- one input ---

    def _difference(self, probe: Probe, suspects: Suspects, slopes: bool) -> Difference:
        at = (suspects, id(probe), slopes)
        if at not in self._seen:
            of = self._gradients if slopes else self._of
            wrong, right, theirs = of(probe, suspects), of(probe, RIGHT), self._theirs(probe)
            own = self._unequal(probe, wrong, right, theirs)
            self._seen[at] = Difference(own, all(probe.equal(a, theirs.get(a), wrong.get(a)) for a in own))
        return self._seen[at]

    def _agrees_on(self, probe: Probe, suspects: Suspects, footprint: set[Atom]) -> bool:
        theirs, wrong = self._theirs(probe), dict(self._of(probe, suspects))
        if self.view != MATCHED:
            wrong |= self._gradients(probe, suspects)
        return all(probe.equal(a, theirs.get(a), wrong.get(a)) for a in footprint)

    def _unequal(self, probe: Probe, one: Atoms, right: Atoms, theirs: Atoms) -> frozenset[Atom]:
        return frozenset(
            a
            for a in {*one, *right}
            if self._counts(a) and (a in theirs or not is_log(a)) and not probe.equal(a, one.get(a), right.get(a))
        )

    def _counts(self, atom: Atom) -> bool:
        if atom[0] == "weight" and not self.bench.bound.candidate.own_weights:
            return False
        return self.view != OWN or atom[0] == "raised" or _term(atom) in self._terms

    @cached_property
    def _terms(self) -> frozenset[str]:
        """The terms whose numbers tell a matching: those that are right at the candidate's own one, since what is
        wrong itself would hide which matching it was."""
        if self.check.component not in MATCHING:
            return ANY_TERM
        wrong = {t for p in self.failing for t in TERMS if not p.seen.agrees(t, "final")}
        return ANY_TERM - wrong or ANY_TERM

    def _of(self, probe: Probe, suspects: Suspects) -> Atoms:
        right = probe.of((), self.bench.book(RIGHT), self.view)
        if not suspects:
            return right
        wrong = probe.of(tuple(f.id for f in suspects), self.bench.book(suspects), self.view)
        return wrong if self.view == MATCHED else {**wrong, **named_otherwise(wrong, right, probe.equal)}

    def _gradients(self, probe: Probe, suspects: Suspects) -> Atoms:
        return probe.gradients(tuple(f.id for f in suspects), self.bench.book(suspects), self.view)

    def _theirs(self, probe: Probe) -> Atoms:
        theirs = probe.theirs(self.view)
        right = probe.of((), self.bench.book(RIGHT), self.view)
        return theirs if self.view == MATCHED else {**theirs, **named_otherwise(theirs, right, probe.equal)}


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
        own = {a for a in {*w, *r} if not equal(w.get(a), r.get(a))}
        if not all(equal(t.get(a), w.get(a)) for a in own):
            return False
        footprint |= own
        separate += bool(own)
    everywhere = all(equal(t.get(a), w.get(a)) for t, w in zip(theirs, wrong, strict=True) for a in footprint)
    return separate >= SEPARATE and everywhere


def _together(atom: Atom, one: Atoms, two: Atoms, right: Atoms, theirs: Atoms) -> bool:
    """True where two effects on a number, multiplied or added, make about the candidate's."""
    a, b, r, t = (float(n) if isinstance(n := x.get(atom), (int, float)) else 0.0 for x in (one, two, right, theirs))
    near = 1e-3 * abs(t) + 1e-9
    return abs(a + b - r - t) <= near or (r != 0 and abs(a * b / r - t) <= near)


def _behaviour(seen: Seen, profile: str, check: Check) -> dict[Any, Any]:
    """What the checks of the experiment say of an observation; and whether its first call was right."""
    own = [c for c in checks(profile) if c.on is check.on]
    found: dict[Any, Any] = {(c.name, one.what): one.ok for c in own for one in judged(c, seen)}
    found["changed"] = " ".join(w for w in seen.got.changed.split() if w in ("keys", "length", "changed"))
    found["right"] = seen.raised or all(seen.agrees(t, "final") for t in TERMS)
    return found


def _term(atom: Atom) -> str:
    return atom[1].split("_")[0] if atom[0] == "grad" else atom[1].removeprefix("loss_").split("_")[0]


def _size(probe: Probe) -> int:
    case = probe.seen.case
    return sum(v.numel() for n in case.layers for v in case.predictions(n).values()) + 4 * case.total
