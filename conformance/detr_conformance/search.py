"""The search for the known faults that explain why a check fails, in one view of the candidate's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from scipy.optimize import brentq
from torch import Tensor

from detr_conformance.bench import RIGHT, Bench, Suspects
from detr_conformance.experiments import BATCH, CONFIGURED, DUELS
from detr_conformance.footprints import (
    ANY_TERM,
    HERE,
    MATCHED,
    OWN,
    Atom,
    Atoms,
    Probe,
    changed,
    is_log,
    terms_of,
    wraps,
)
from detr_conformance.places import can_be_placed, kind, placed
from detr_conformance.registry import Check, Fault
from detr_conformance.tallies import KEPT
from detr_reference.textbook import TERMS

SEPARATE: Final = 3  # inputs that must tell a fault from the right textbook

FEW: Final = 12  # inputs, where the kind of mistake is told by any
MANY: Final = 99  # more inputs than an experiment keeps
STEPS: Final = 4  # between which a number is sought
MATCHING: Final = frozenset({"matching", "matching costs"})
SLOPES: Final = frozenset({"gradients", "learning"})
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
Shown = tuple[int, Atom]  # an input, by its place, and a number that faults make wrong there
NOTHING: Final[frozenset[Shown]] = frozenset()


@dataclass(frozen=True, eq=False)
class Difference:
    """On one input: where suspects differ from the right textbook, and whether the candidate's numbers are theirs."""

    own: frozenset[Atom]
    agrees: bool


class Search:
    """The search for what explains a failing check, in one view of the numbers.

    ``about``: the quantity that the check found wrong; where it is a loss, that is what has to be explained.
    """

    def __init__(
        self,
        bench: Bench,
        check: Check,
        view: str,
        failing: Sequence[Probe],
        spent: Callable[[], bool],
        about: str = "",
    ) -> None:
        self.bench, self.check, self.view, self.failing, self.spent = bench, check, view, failing, spent
        self.about = about
        self.of_logs = "_error" in about  # which else are as the criterion likes them
        self._seen: dict[tuple[Suspects, int, bool], Difference] = {}

    @cached_property
    def probes(self) -> list[Probe]:
        """The failing inputs, the smallest first, and neighbours on which a fault must fit as well."""
        bench = self.bench
        costs = self.check.component == "matching costs"  # which many duels tell apart
        more = bench.of(DUELS, KEPT if costs else FEW) if self.view == MATCHED else []
        more += [*bench.of(self.check.on, 8), *bench.of(BATCH, 6), *bench.of(CONFIGURED, 3)]
        return list(dict.fromkeys([*self.failing, *more]))

    @cached_property
    def further(self) -> list[Probe]:
        """Inputs that are observed only where these tell too little."""
        return self.bench.duels if self.view == MATCHED else self.bench.further

    @cached_property
    def _more(self) -> list[Probe]:
        """All others, for a fault that shows on too few."""
        bench = self.bench
        every = [*bench.of(self.check.on, MANY), *self.further, *bench.edges, *bench.wide]
        return [p for p in dict.fromkeys(every) if p not in self.probes]

    @property
    def differs(self) -> bool:
        """True where the candidate's own numbers differ from the textbook's on the first input."""
        return bool(self.failing) and bool(self.wrong)

    @property
    def forms_alone(self) -> bool:
        """True where every loss, weight and gradient that both have is right: names and forms alone are wrong."""
        if not self.failing:
            return False
        theirs, right = self._theirs(self.failing[0]), self._of(self.failing[0], RIGHT)
        both = {a for a in self.wrong if a[0] in ("loss", "weight") and a in theirs and a in right and not is_log(a)}
        return not both and all(a[0] != "grad" for a in self.wrong)

    @cached_property
    def wrong(self) -> frozenset[Atom]:
        """Where they differ, gradients aside; or where the gradients do."""
        probe = self.failing[0]
        found = self._wrong_at(probe)
        if found or self.view == MATCHED:
            return found & {("loss", self.about)} or found
        theirs, slopes = self._theirs(probe), self._gradients(probe, RIGHT)
        return frozenset(a for a in slopes if self._counts(a) and not probe.equal(a, theirs.get(a), slopes[a]))

    def _wrong_at(self, probe: Probe) -> frozenset[Atom]:
        theirs = {a: v for a, v in self._theirs(probe).items() if a[0] != "grad"}
        return self._unequal(probe, theirs, self._of(probe, RIGHT), theirs)

    @cached_property
    def known(self) -> list[Fault]:
        """The faults that can show in this view, those of the check's own clause and component first."""
        check = self.check
        plain = self.failing[0].seen.case.plain
        alone = {HERE: COSTS_ALONE, MATCHED: LOSSES_ALONE, OWN: frozenset[str]()}[self.view]
        found = [f for f in self.bench.suspects(plain) if not changed(self.bench.book((f,))) <= alone]
        if self.view == OWN:
            found = [f for f in found if f.check.component in MATCHING or f.check is check]
            here = Search(self.bench, check, HERE, self.failing, self.spent)
            if check.component not in MATCHING and here.differs:  # whatever is matched, which costs do not explain
                found = [f for f in found if not changed(self.bench.book((f,))) <= COSTS_ALONE]
        elif self.view == HERE and self.failing[0].seen.case.maskless:  # one term explains nothing of another
            terms = {_term(a) for a in self.wrong}
            own = {f: terms_of(self.bench.book((f,))) for f in found}
            found = [f for f in found if own[f] & terms or not own[f]]
        if self.view != OWN and all(
            a[0] == "grad" for a in self.wrong
        ):  # values are right, so few faults come into question
            found = [f for f in found if f.check.component in SLOPES or f.check.clause is check.clause]
        order: list[Callable[[Fault], bool]] = [lambda f: f.check is check, lambda f: f.check.clause is check.clause]
        order += [lambda f: f.check.component == check.component]
        if self.view == HERE:
            order += [lambda f: bool(terms_of(self.bench.book((f,))))]  # which are quickly tried
        else:
            order += [lambda f: f.check.component in MATCHING]
        return sorted(found, key=lambda f: tuple(not o(f) for o in order))

    # --- single faults ---

    def singles(self) -> list[Suspects]:
        """The one or two faults that fit, each by itself."""
        shown: dict[Fault, frozenset[Shown]] = {}
        if not self.differs:
            return []
        for fault in self.known:
            if self.spent():
                if fault.check.clause is self.check.clause:
                    return []  # not all of those were tried that could be mistaken for each other
                break
            if not self._contradicts((fault,)) and (footprint := self.fits((fault,))):
                shown[fault] = footprint
        fitting = [f for f, own in shown.items() if not any(own < more for more in shown.values())]
        fitting = [f for f in fitting if self.bench.breaks((f,), self.check, self.failing[0].seen.case)]
        own: list[Callable[[Fault], bool]] = [lambda f: f.check is self.check, lambda f: f.check.on is self.check.on]
        if len(fitting) > 1 and not self.spent():
            fitting = [f for f in fitting if all(self._difference(p, (f,), slopes=False).agrees for p in self.further)]
        if len(fitting) > 1:  # edges are where variants of one mistake differ, so the most of them decides
            edges = {f: self._agreeing_edges(f) for f in fitting}
            fitting = [f for f in fitting if edges[f] == max(edges.values())]
        for prefers in (self._agrees_in_all, self._explains_more, *own):
            chosen = [f for f in fitting if prefers(f)] if len(fitting) > 1 else []
            fitting = chosen or fitting
        return [(f,) for f in fitting] if len(fitting) <= 2 else []

    def fits(self, suspects: Suspects) -> frozenset[Shown]:
        """Where these faults show, if the candidate's numbers are theirs everywhere there and enough inputs, the first
        of all, show them; else nothing."""
        footprint: set[Atom] = set()
        shown: set[Shown] = set()
        separate = 0
        by_values = any(a[0] != "grad" for a in self.wrong)
        for i, probe in enumerate(self.probes):
            found = self._difference(probe, suspects, slopes=False)
            if not found.agrees or (i == 0 and by_values and not found.own & self.wrong):
                return NOTHING
            if self.view != MATCHED and i < SEPARATE:
                slopes = self._difference(probe, suspects, slopes=True)
                found = Difference(found.own | slopes.own, slopes.agrees)
                if not found.agrees or (i == 0 and not found.own & self.wrong):
                    return NOTHING
            footprint |= found.own
            shown |= {(i, a) for a in found.own}
            separate += bool(found.own)
        for probe in self._more if separate < SEPARATE and footprint else ():
            found = self._difference(probe, suspects, slopes=False)
            if not found.agrees:
                return NOTHING
            separate += bool(found.own)
            if separate == SEPARATE:
                break
        if separate < SEPARATE:
            return NOTHING
        agrees = all(self._agrees_on(probe, suspects, footprint, i) for i, probe in enumerate(self.probes))
        return frozenset(shown) if agrees else NOTHING

    def _contradicts(self, suspects: Suspects) -> bool:
        """True where one loss of the first input, which is quick to tell, is neither the suspects' nor right."""
        probe, atom = self.failing[0], self._number_wrong
        if self.view != HERE or not atom or atom[0] != "loss":
            return False
        theirs, ours = self._theirs(probe).get(atom), self._loss(suspects)
        if ours is None or _unguarded(theirs, ours) or probe.equal(atom, theirs, ours):
            return False
        return not probe.equal(atom, ours, self._loss(RIGHT))

    def _loss(self, suspects: Suspects) -> Any:
        return self.failing[0].loss(suspects, self.bench.book(suspects), self.view, self._number_wrong)

    def _agreeing_edges(self, fault: Fault) -> int:
        return sum(self._difference(p, (fault,), slopes=False).agrees for p in self.bench.edges)

    def _agrees_in_all(self, fault: Fault) -> bool:
        """True where nothing contradicts a fault in the other view of the numbers either."""
        return all(found.agrees for found in self._elsewhere(fault))

    def _explains_more(self, fault: Fault) -> bool:
        """True where it fits in the other view as well."""
        found = self._elsewhere(fault)
        return any(f.own for f in found) and all(f.agrees for f in found)

    def _elsewhere(self, fault: Fault) -> list[Difference]:
        other = HERE if self.view == MATCHED else MATCHED
        search = Search(self.bench, self.check, other, self.failing, self.spent, self.about)
        return [search._difference(p, (fault,), slopes=False) for p in search.probes]

    # --- a fault that has a number of its own ---

    def numbers(self) -> list[Suspects]:
        """The one or two faults that fit with a number which the first input tells."""
        fitting: list[Suspects] = []
        atom = self._number_wrong
        for fault in self.known if atom else ():
            if self.spent():
                return []
            value = self._solved(fault, atom) if fault.at else None
            if value is None:
                continue
            for number in _written(value):
                suspect = (fault.at(number),)  # type: ignore[misc]
                found = self._difference(self.failing[0], suspect, slopes=atom[0] == "grad")
                if found.agrees and atom in found.own:
                    fits = self.fits(suspect) and self.bench.breaks(suspect, self.check, self.failing[0].seen.case)
                    fitting += [suspect] if fits else []
                    break
        return fitting if len(fitting) <= 2 else []

    @cached_property
    def _number_wrong(self) -> Atom:
        """The wrong number of the first input from which to tell another, or ()."""
        if self.view == MATCHED or not self.differs:
            return ()
        theirs = self._theirs(self.failing[0])
        told = [a for a in self.wrong if a[0] in ("loss", "weight", "grad") and not is_log(a)]
        told = sorted(a for a in told if _size_of(theirs.get(a)))
        return told[0] if told else ()

    def _solved(self, fault: Fault, atom: Atom) -> float | None:
        """The number with which a fault gives the candidate's, to be sought between those that give more and less."""
        probe = self.failing[0]
        goal = _size_of(self._theirs(probe).get(atom)) or 0.0
        at = fault.at
        assert at

        def excess(log: float) -> float:
            suspects = (at(math.exp(log)),)
            if atom[0] == "loss":
                found = _size_of(self._loss(suspects))
            else:
                found = _size_of((self._gradients if atom[0] == "grad" else self._of)(probe, suspects).get(atom))
            return math.nan if found is None else found - goal

        ends = [math.log(end) for end in fault.span]
        values = [excess(x) for x in ends]
        if values[0] == values[1]:
            return None  # the number does not show here
        between = [ends[0] + (ends[1] - ends[0]) * i / STEPS for i in range(1, STEPS)]
        grid, values = [ends[0], *between, ends[1]], [values[0], *map(excess, between), values[1]]
        for i in range(STEPS):
            if values[i] * values[i + 1] < 0:  # not so where one is no number
                return math.exp(float(brentq(excess, grid[i], grid[i + 1], xtol=1e-8, maxiter=60, disp=False)))
        return next((math.exp(x) for x, value in zip(grid, values, strict=True) if value == 0), None)

    # --- a fault in some kinds of layers alone ---

    def placed(self) -> list[Suspects]:
        """The one or two faults that fit in some kinds of layers, the others being right."""
        fitting: list[Suspects] = []
        for fault in self.known if self.differs else ():
            if self.spent():
                return []
            if not self._contradicts((fault,)) and self._agrees_where_wrong(fault) and can_be_placed(fault):
                kinds, others = self._kinds(fault)
                suspect = (placed(fault, kinds),) if kinds and others else ()
                if suspect and self.fits(suspect):
                    fitting += [suspect] * self.bench.breaks(suspect, self.check, self.failing[0].seen.case)
        return fitting if len(fitting) <= 2 else []

    def _agrees_where_wrong(self, fault: Fault) -> bool:
        """True where the first input's wrong numbers are a fault's, as far as it shows in them."""
        probe = self.failing[0]
        wrong, theirs = self._of(probe, (fault,)), self._theirs(probe)
        shown = self._unequal(probe, wrong, self._of(probe, RIGHT), theirs) & self.wrong
        return bool(shown) and all(probe.equal(a, theirs.get(a), wrong.get(a)) for a in shown)

    def _kinds(self, fault: Fault) -> tuple[set[str], set[str]]:
        """The kinds of layers where a fault shows and the candidate's numbers are its, and where they are right; none
        where they are neither."""
        shown: set[str] = set()
        others: set[str] = set()
        for probe in self.probes:
            wrong, right, theirs = self._of(probe, (fault,)), self._of(probe, RIGHT), self._theirs(probe)
            for a in self._unequal(probe, wrong, right, theirs):
                layer, own = probe.layer(a), theirs.get(a)
                fits = probe.equal(a, own, wrong.get(a))
                if layer and not fits and not probe.equal(a, own, right.get(a)):
                    return set(), set()
                if layer:
                    (shown if fits else others).add(kind(layer))
        return shown - others, others

    # --- two faults together ---

    def pairs(self) -> list[Suspects]:
        """Two faults that fit together where none does alone."""
        if not self.differs or self.spent():
            return []
        for one, two in self._likely():
            if self.spent():
                return []
            for suspects in self._orders(one, two):
                if not self._lost(suspects) and self.fits(suspects):
                    case = self.failing[0].seen.case
                    if self.bench.breaks(suspects, self.check, case):
                        return [suspects]
        return []

    def _orders(self, one: Fault, two: Fault) -> list[Suspects]:
        """The orders in which both can be in one book: what calls the formula that it replaces comes last."""
        books = [self.bench.book((f,)) for f in (one, two)]
        first, second = map(wraps, books)
        if first and second:
            return [(one, two), (two, one)]
        if not first and not second and changed(books[0]) & changed(books[1]):
            return []  # the second alone would be left
        return [(two, one) if first else (one, two)]

    def _likely(self) -> Iterator[Suspects]:
        """Pairs whose numbers do not contradict the candidate's where only one of the two shows; those first whose
        effects, multiplied or added, are the candidate's, then those with a fault that explains another check, then
        those of faults that the catalogue has early, which are the usual ones. Of a matching, which tells little of
        what made it, only pairs with a fault that the losses show."""
        probe = self.telling
        shown, wrong = {}, self._wrong_at(probe)
        elsewhere = Search(self.bench, self.check, MATCHED, self.failing, self.spent)
        matched_otherwise = self.view == HERE and bool(elsewhere._wrong_at(probe))
        for fault in self.known:
            if matched_otherwise and "layers" in changed(self.bench.book((fault,))):
                continue  # which can be evaluated at its own matching alone
            if self.spent():
                return
            own = self._difference(probe, (fault,), slopes=False).own
            if own & wrong:
                shown[fault] = own
        right, theirs = self._of(probe, RIGHT), self._theirs(probe)
        good = {
            f: {a for a in own if probe.equal(a, theirs.get(a), self._of(probe, (f,)).get(a))}
            for f, own in shown.items()
        }
        here = Search(self.bench, self.check, HERE, self.failing, self.spent, self.about)
        shown = {f: shown[f] for f in sorted(shown, key=lambda f: f not in self.bench.named)}
        first = [f for f in shown if self.view != MATCHED or (not self.spent() and here.fits((f,)))]
        later: list[Suspects] = []
        for i, one in enumerate(first):
            if self.spent():
                return
            for two in first[i + 1 :] if self.view != MATCHED else shown:
                a, b = shown[one], shown[two]
                if not (a - b <= good[one] and b - a <= good[two] and wrong <= a | b) or one is two:
                    continue
                ones, twos = self._of(probe, (one,)), self._of(probe, (two,))
                if all(_together(x, ones, twos, right, theirs) for x in a & b):
                    yield one, two
                else:
                    later.append((one, two))
        place = {f: i for i, f in enumerate(self.bench.suspects(plain=False))}
        known = self.bench.named
        yield from sorted(later, key=lambda pair: (known.count(pair[0]) == 0, sum(place[f] for f in pair)))

    @cached_property
    def telling(self) -> Probe:
        """The smallest failing input that no single fault explains that explains the first; so two show there."""
        first = self.failing[0]
        alone = [f for f in self.known if not self.spent() and self._explains(first, f)]
        return next((p for p in self.failing if not any(self._explains(p, f) for f in alone)), first)

    def _explains(self, probe: Probe, fault: Fault) -> bool:
        found = self._difference(probe, (fault,), slopes=False)
        return found.agrees and self._wrong_at(probe) <= found.own

    def _lost(self, suspects: Suspects) -> bool:
        """True where one fault does nothing beside the other, or undoes it, so that the other is alone."""
        probe = self.telling
        both = self._of(probe, suspects)
        return any(
            all(probe.equal(a, both.get(a), alone.get(a)) for a in {*both, *alone})
            for alone in (self._of(probe, (f,)) for f in suspects)
        )

    # --- one input ---

    def _difference(self, probe: Probe, suspects: Suspects, slopes: bool) -> Difference:
        at = (suspects, id(probe), slopes)
        if at not in self._seen:
            of = self._gradients if slopes else self._of
            wrong, right, theirs = of(probe, suspects), of(probe, RIGHT), self._theirs(probe)
            own = self._unequal(probe, wrong, right, theirs)
            self._seen[at] = Difference(own, all(probe.equal(a, theirs.get(a), wrong.get(a)) for a in own))
        return self._seen[at]

    def _agrees_on(self, probe: Probe, suspects: Suspects, footprint: set[Atom], place: int) -> bool:
        """True where the candidate's numbers are the suspects' in a footprint; gradients are those of the first."""
        theirs, wrong = self._theirs(probe), self._of(probe, suspects)
        slopes = self._gradients(probe, suspects) if self.view != MATCHED and place < SEPARATE else None
        for a in footprint:
            of = slopes if a[0] == "grad" else wrong
            if of is None or _unguarded(theirs.get(a), of.get(a)):
                continue
            if not probe.equal(a, theirs.get(a), of.get(a)):
                return False
        return True

    def _unequal(self, probe: Probe, one: Atoms, right: Atoms, theirs: Atoms) -> frozenset[Atom]:
        return frozenset(
            a
            for a in {*one, *right}
            if self._counts(a)
            and (not is_log(a) or (self.of_logs and a in theirs))
            and not _unguarded(theirs.get(a), one.get(a))
            and not probe.equal(a, one.get(a), right.get(a))
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
        return probe.named(suspects, self.bench.book(suspects), self.view)

    def _gradients(self, probe: Probe, suspects: Suspects) -> Atoms:
        return probe.gradients(suspects, self.bench.book(suspects), self.view)

    def _theirs(self, probe: Probe) -> Atoms:
        return probe.theirs(self.view)


def _unguarded(theirs: Any, ours: Any) -> bool:
    """True where the candidate has 0/0 and a fault a number: the same mistake may be written with a guard."""
    return _is_nan(theirs) and not _is_nan(ours)


def _is_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isnan().any())
    return isinstance(value, float) and math.isnan(value)


def _together(atom: Atom, one: Atoms, two: Atoms, right: Atoms, theirs: Atoms) -> bool:
    """True where two effects on a number, multiplied or added, make about the candidate's."""
    a, b, r, t = (float(n) if isinstance(n := x.get(atom), (int, float)) else 0.0 for x in (one, two, right, theirs))
    near = 1e-3 * abs(t) + 1e-9
    return abs(a + b - r - t) <= near or (r != 0 and abs(a * b / r - t) <= near)


def _written(value: float) -> Iterator[float]:
    """A number as a person would write it, with as few digits as will do; with few, its neighbours too, since what is
    found of a threshold is the edge of those that do the same."""
    for digits in range(1, 8):
        nearest = float(f"{value:.{digits}g}")
        yield nearest
        step = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
        yield from (float(f"{nearest + s * step:.{digits}g}") for s in (1, -1) if digits <= 2)


def _size_of(value: object) -> float | None:
    """One number of a loss, a weight or a gradient; None where there is none."""
    size = float(value.abs().sum()) if isinstance(value, Tensor) else value
    return size if isinstance(size, float) and math.isfinite(size) else None


def _term(atom: Atom) -> str:
    return atom[1].split("_")[0] if atom[0] == "grad" else atom[1].removeprefix("loss_").split("_")[0]
