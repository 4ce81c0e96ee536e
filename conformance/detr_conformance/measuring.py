"""What one call costs at training size: seconds and peak memory, forward and backward, beside the reference.

Both are called in turn on the same inputs, in one process, on one thread, so that a busy machine slows both.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from detr_conformance.candidate import Bound, Candidate, bind
from detr_conformance.cases import Case, Recipe, build
from detr_conformance.experiments import Experiment
from detr_conformance.observation import Observation, foreign, said, weighted_sum
from detr_conformance.seen import Seen

BATCHES: Final = (2, 4, 8)  # images
QUERIES, TARGETS, CLASSES, TOKENS, LAYERS = 300, 20, 91, 256, 6
REPEATS: Final = 5
SECONDS: Final = 4.0  # from which on a call is repeated less often
_MIB: Final = 1024  # KiB


@dataclass(frozen=True)
class Measured:
    """Seconds (a median) and MiB of one call with the smallest batch, and by what factor each grows when the batch is
    doubled; None where memory cannot be measured."""

    seconds: float
    slower: float
    mebibytes: float | None
    larger: float | None


@dataclass(frozen=True, eq=False)
class Large(Case):
    """Inputs of training size."""

    @property
    def words(self) -> str:
        """How large they are."""
        return f"{QUERIES} queries, {TARGETS} targets an image, {len(self.layers)} layers"


def _large(bound: Bound) -> Iterator[Case]:
    layers = LAYERS if "num_decoder_layers" in bound.varies else min(LAYERS, bound.options.num_decoder_layers)
    counts = (TARGETS,) * BATCHES[0]
    recipe = Recipe(
        201, counts, QUERIES, classes=CLASSES, aux=layers - 1, encoder_queries=QUERIES, tokens=TOKENS
    )  # fmt: skip
    case = build(recipe, bound.options, bound.varies)
    yield Large(case.label, case.options, case.outputs, case.targets)


def _measure(bound: Bound, case: Case) -> Seen:
    """Call the candidate and the reference in turn, with one batch after the other."""
    from detr_reference.criterion import build_criterion

    sides = (bound, bind(Candidate(build_criterion, bound.profile)))
    try:
        calls = [_calls(side, case) for side in sides]
        rows = []
        for images in BATCHES:
            batch = case.images([i % len(case.counts) for i in range(images)])
            rows.append((_seconds(calls, batch), [_peak(call, batch) for call in calls]))
    except (Exception, SystemExit, RecursionError) as error:
        return Seen(bound, case, Observation(case, raised=said(error)))
    return Seen(bound, case, Observation(case), facts=tuple(_summed(rows, side) for side in range(len(sides))))


def _calls(bound: Bound, case: Case) -> Callable[[Case], None]:
    """Forward and backward of one criterion on a batch."""
    with foreign("the factory, for six layers"):
        criterion = bound.build(case.options)

    def call(batch: Case) -> None:
        outputs, targets, leaves = batch.fresh()
        with foreign(f"{len(batch.counts)} images of training size"):
            total = weighted_sum(bound, batch, criterion, criterion(outputs, targets))
            flat = [leaf for own in leaves.values() for leaf in own]
            torch.autograd.grad(total, flat, allow_unused=True)

    return call


def _seconds(calls: list[Callable[[Case], None]], batch: Case) -> list[float]:
    """The median time of each call, after one that is not counted."""
    first = [_timed(call, batch) for call in calls]
    repeats = max(1, min(REPEATS, int(SECONDS / sum(first))))
    spent = [[_timed(call, batch) for call in calls] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*spent, strict=True)]


def _timed(call: Callable[[Case], None], batch: Case) -> float:
    start = time.perf_counter()
    call(batch)
    return time.perf_counter() - start


def _summed(rows: list[tuple[list[float], list[float | None]]], side: int) -> Measured:
    seconds, peaks = [times[side] for times, _ in rows], [peak[side] for _, peak in rows]
    known = [peak for peak in peaks if peak]
    larger = _per_doubling(known) if len(known) == len(rows) else None
    return Measured(seconds[0], _per_doubling(seconds), peaks[0], larger)


def _per_doubling(values: list[float]) -> float:
    return float((values[-1] / values[0]) ** (1 / math.log2(BATCHES[-1] / BATCHES[0])))


def _peak(call: Callable[[Case], None], batch: Case) -> float | None:
    """MiB that one call adds to this process at most; None where the system does not tell, as only Linux does."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return None
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # else memory that earlier calls have freed is used again, and not seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
        before = _resident("VmRSS")
        call(batch)
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, IndexError):
        return None


def _resident(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / _MIB


MEASURED = Experiment(
    "measured",
    "one call at training size",
    _large,
    None,
    _measure,
    weight=0.0,  # at effort standard
    since="deep",
    once=True,
)
