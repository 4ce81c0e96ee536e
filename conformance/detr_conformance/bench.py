"""What a diagnosis works with: the inputs on which known faults are compared with a candidate, those of the experiments
and more where these tell too little; and the faults as books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case, Recipe, build
from detr_conformance.designed import DUELS as KINDS
from detr_conformance.designed import duel_case
from detr_conformance.experiments import EDGES, Experiment
from detr_conformance.footprints import Probe, composed
from detr_conformance.observation import observe
from detr_conformance.registry import Check, Fault, faults
from detr_conformance.seen import Seen
from detr_conformance.tallies import KEPT, Tallies, judged
from detr_reference.textbook import Textbook

BEHAVIOUR: Final = frozenset({"side effects", "refusals", "precision", "devices", "ranks"})
PARTS: Final = frozenset({"masks", "denoising"})  # that few cases have
RIGHT: Final[tuple[Fault, ...]] = ()

Suspects = tuple[Fault, ...]  # one fault, or some together

FURTHER: Final = (
    Recipe(701, (2, 3), 6, classes=5, aux=2, encoder_queries=7, tokens=12),
    Recipe(702, (1, 4, 2), 7, classes=4, aux=1, encoder_queries=5, tokens=11, boxes="overhang"),
    Recipe(703, (3, 1), 5, classes=6, aux=2, encoder_queries=4, tokens=14, logits="confident"),
    Recipe(704, (2, 2, 1), 4, classes=3, boxes="tiny"),
    Recipe(705, (2, 1), 5, options=(("focal_alpha", 0.6), ("focal_gamma", 1.0), ("eos_coef", 0.4))),
    Recipe(706, (3,), 4, options=(("focal_alpha", 0.1), ("focal_gamma", 3.0), ("eos_coef", 0.02))),
    Recipe(707, (1, 2), 4, options=(("focal_alpha", 0.75), ("focal_gamma", 1.5), ("eos_coef", 1.0))),
)
CROWDED: Final = (
    Recipe(711, (4, 1), 2, classes=3, aux=1, encoder_queries=5),
    Recipe(712, (3, 0), 2, classes=3),
    Recipe(713, (0, 2, 1), 3, aux=1, encoder_queries=2),
    Recipe(714, (0,), 3),
    Recipe(715, (0, 0), 2, aux=1, encoder_queries=3),
)
WIDE: Final = tuple(Recipe(721 + i, (2, 1), 3 + i, classes=4, logits="extreme") for i in range(3))


@dataclass(eq=False)
class Bench:
    """The inputs of one candidate, each a Probe that keeps what is evaluated on it; so checks share what is evaluated.

    ``tallies``: what an experiment has found · ``named``: the faults that explain other checks, so they may have a part
    in what this one finds.
    """

    bound: Bound
    tallies: Callable[[Experiment], Tallies]
    named: list[Fault] = field(default_factory=list)
    _probes: dict[int, Probe] = field(default_factory=dict, repr=False)
    _books: dict[Suspects, Textbook] = field(default_factory=dict, repr=False)

    def of(self, experiment: Experiment, count: int) -> list[Probe]:
        """So many inputs of an experiment, evenly from all."""
        every = [s for s in self.tallies(experiment).seen if not s.raised]
        return [self.probe(s) for s in every[:: max(1, len(every) // count)][:count]]

    @cached_property
    def further(self) -> list[Probe]:
        """Ordinary inputs beyond those of the experiments, to tell faults apart that fit alike."""
        return self._made(FURTHER)

    @cached_property
    def duels(self) -> list[Probe]:
        """Duels beyond those of the experiment."""
        o, varies = self.bound.options, self.bound.varies
        return self._observed([duel_case(700 + seed, kind, o, varies) for seed, kind in enumerate(KINDS * 2)])

    @cached_property
    def edges(self) -> list[Probe]:
        """Inputs without targets or with too many, where variants of one mistake may differ."""
        return [*self.of(EDGES, KEPT), *self._made(CROWDED)]

    @cached_property
    def wide(self) -> list[Probe]:
        """Inputs of large logits, where bounds and epsilons show."""
        return self._made(WIDE)

    def _made(self, recipes: Sequence[Recipe]) -> list[Probe]:
        o, varies = self.bound.options, self.bound.varies
        most = 9 if "num_decoder_layers" in varies else o.num_decoder_layers - 1
        return self._observed([build(replace(r, aux=min(r.aux, most)), o, varies) for r in recipes])

    def _observed(self, cases: Sequence[Case]) -> list[Probe]:
        seen = [Seen(self.bound, case, observe(self.bound, case)) for case in cases]
        return [self.probe(s) for s in seen if not s.raised]

    def probe(self, seen: Seen) -> Probe:
        """The probe of an observation."""
        return self._probes.setdefault(id(seen), Probe(seen))

    # --- faults ---

    def book(self, suspects: Suspects) -> Textbook:
        """The textbook with these faults."""
        if suspects not in self._books:
            self._books[suspects] = composed(suspects)
        return self._books[suspects]

    def breaks(self, suspects: Suspects, check: Check, case: Case) -> bool:
        """True where the faults fail the check on a case that the candidate fails it on."""
        seen = check.on.observe(self.bound_to(composed(suspects)), case)
        return any(not comparison.ok for comparison in judged(check, seen))

    def suspects(self, plain: bool) -> list[Fault]:
        """The faults of the profile whose numbers can be compared; those of masks and denoising where a case is not
        plain."""
        return [
            f
            for f in faults(self.bound.profile)
            if not f.check.on.numbers
            and f.check.component not in BEHAVIOUR - {"precision"}
            and not (plain and f.check.component in PARTS)
        ]

    def bound_to(self, book: Textbook) -> Bound:
        """A book as a candidate, called as the candidate is called."""
        return replace(bind(candidate_of(book, self.bound.profile)), device=self.bound.device)
