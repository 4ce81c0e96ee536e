"""What the checks of an experiment find over its cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import Experiment
from detr_conformance.registry import Check, Comparison, checks
from detr_conformance.seen import UNDECIDED, Seen

RAISES: Final = "the call"
TELLING: Final = 6  # failing cases on which known faults are compared with the candidate
KEPT: Final = 64  # observations of an experiment on which they are compared besides


@dataclass
class Tally:
    """What one check found: how often it decided, its smallest failing case (one that returns, if there is any), some
    observations that fail, its notes."""

    check: Check
    decided: int = 0
    failing: tuple[Case, Comparison] | None = None
    seen: list[Seen] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def cases(self) -> list[Case]:
        """Some failing cases."""
        return [s.case for s in self.seen]


@dataclass(frozen=True)
class Tallies:
    """Those of all checks of one experiment by name. ``raised``: what the candidate raised, if it did on every case;
    ``seen``: its first observations."""

    by_check: Mapping[str, Tally]
    raised: str = ""
    seen: tuple[Seen, ...] = ()

    @property
    def failing(self) -> frozenset[str]:
        """Names of the failing checks."""
        return frozenset(name for name, tally in self.by_check.items() if tally.failing is not None)


def tallied(bound: Bound, experiment: Experiment, cases: Iterable[Case]) -> Tallies:
    """Observe every case once, and let every check of the profile judge it."""
    tallies = {c.name: Tally(c) for c in checks(bound.profile) if c.on is experiment}
    raised, returned = "", False
    kept: list[Seen] = []
    for case in cases:
        seen = experiment.observe(bound, case)
        kept += [seen] if len(kept) < KEPT else []
        raised, returned = seen.raised or raised, returned or not seen.raised
        for tally in tallies.values():
            tally.notes += [seen.remarks[UNDECIDED]] if UNDECIDED in seen.remarks else []
            for comparison in judged(tally.check, seen):
                tally.decided += 1
                if comparison.note:
                    tally.notes.append(comparison.note)
                if comparison.ok:
                    continue
                if len(tally.seen) < TELLING and seen not in tally.seen:
                    tally.seen.append(seen)
                if tally.failing is None or _order(case, comparison) < _order(*tally.failing):
                    tally.failing = (case, comparison)
    return Tallies(tallies, "" if returned else raised, tuple(kept))


def judged(check: Check, seen: Seen) -> Iterator[Comparison]:
    """What a check says of one observation; a candidate that raised is judged by the check that answers for that."""
    if not seen.raised:
        yield from check.judge(seen)
    elif check.takes_raising:
        yield Comparison(False, RAISES, "a dict of losses", seen.raised)


def _order(case: Case, comparison: Comparison) -> tuple[bool, int]:
    """What is returned wrongly tells more than what is raised, and a small case more than a large one."""
    return comparison.what == RAISES, sum(
        v.numel() for n in case.layers for v in case.predictions(n).values()
    ) + 4 * case.total
