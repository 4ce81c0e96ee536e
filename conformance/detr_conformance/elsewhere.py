"""Experiments that make the same call in another place: on several ranks, on an accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from detr_conformance import devices, ranks
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case, Recipe
from detr_conformance.experiments import Experiment, called, from_recipes
from detr_conformance.observation import Observation, observe
from detr_conformance.seen import Seen

Atoms = Mapping[tuple[str, ...], Any]


def _atoms(name: str, got: Observation) -> Atoms:
    """Every number of a call, by which known faults are told apart."""
    found: dict[tuple[str, ...], Any] = {(name, "loss", key): value for key, value in got.losses.items()}
    for at, grads in got.grads.items():
        found |= {(name, "grad", *at, str(i)): g for i, g in enumerate(grads)}
    return found | {(name, "odd", key): 1.0 for key in got.odd}


# --- several ranks ---

STUCK: Final = "ranks that do not return"


def _on_ranks(bound: Bound, case: Case) -> Seen:
    """The batch in one process, and each image on a rank of its own."""
    whole = called(bound, case)
    if whole.raised:
        return whole
    returned = ranks.call(bound, case)
    mean = case.total / len(case.counts)
    twins = {f"rank {r}": Seen(bound, got.case, got, mean=mean) for r, got in returned.calls.items()}
    return replace(whole, twins=twins, remarks={STUCK: returned.stuck})


def _ranks_atoms(bound: Bound, case: Case) -> Atoms:
    returned = ranks.call(bound, case)
    found: dict[tuple[str, ...], Any] = {(STUCK,): float(bool(returned.stuck))}
    for rank, got in returned.calls.items():
        found |= _atoms(f"rank {rank}", got)
    return found


RANKS: Final = Experiment(
    "ranks",
    "a batch split over ranks, each with one of its images",
    from_recipes(
        [
            Recipe(301, (3, 1), 4, classes=3, encoder_queries=5),
            Recipe(302, (1, 4), 5, classes=4, aux=1, encoder_queries=5, tokens=11),
            Recipe(303, (4, 0), 5, classes=3, aux=1, encoder_queries=4, tokens=11),
            Recipe(304, (0, 2), 3, classes=3, encoder_queries=3),
            Recipe(305, (2, 0, 3), 4, classes=4, aux=1, encoder_queries=4, tokens=11),
            Recipe(306, (1, 0), 3, classes=3),
            Recipe(307, (2, 1, 2), 4, classes=4, aux=1, encoder_queries=4, tokens=11),
        ]
    ),
    None,
    _on_ranks,
    weight=0.8,
    declined=ranks.declined,
    numbers=_ranks_atoms,
)


# --- an accelerator ---

THERE: Final = "on the accelerator"


def _observed_there(bound: Bound, case: Case) -> Observation:
    got = observe(bound, case, device=bound.device)
    return replace(got, raised=f"on {bound.device}: {got.raised}") if got.raised else got


def _on_accelerator(bound: Bound, case: Case) -> Seen:
    """The call on the CPU, and the same on the accelerator."""
    return replace(called(bound, case), twins={THERE: Seen(bound, case, _observed_there(bound, case))})


DEVICES: Final = Experiment(
    "devices",
    "an accelerator beside the CPU",
    from_recipes(
        [
            Recipe(311, (2,), 4, classes=3),
            Recipe(312, (2, 1, 3), 5, classes=4, aux=1, encoder_queries=5, tokens=11),
            Recipe(313, (0, 2), 4, classes=3, aux=1, encoder_queries=4, tokens=11),
            Recipe(314, (0,), 3, classes=2, encoder_queries=3),
            Recipe(315, (3, 5), 4, classes=4, aux=1, encoder_queries=6, tokens=11),
            Recipe(316, (6, 3), 20, classes=8, encoder_queries=12, tokens=20),
            Recipe(317, (2, 3), 6, classes=4, aux=1, logits="confident", tokens=11, edits=("masked -inf",)),
        ]
    ),
    None,
    _on_accelerator,
    declined=lambda bound: devices.declined(bound.device),
    numbers=lambda bound, case: _atoms(THERE, _observed_there(bound, case)),
)
