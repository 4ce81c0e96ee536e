"""Which option explains a candidate that differs from its profile's defaults: a legitimate difference left undeclared.

An option explains a failing check when, judged under it, the candidate passes the check on every fixed case of its
experiment, and fails nothing in ordinary and odd batches that it did not fail before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from detr_conformance.budget import budget
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import BATCH, EDGES, Experiment
from detr_conformance.registry import Check
from detr_conformance.tallies import Tallies, judged, tallied
from detr_reference.options import Options

SECONDS: Final = 3.0

_NAMES: Final = ("_enc", "_interm")
_PLACES: Final = ("enc_outputs", "interm_outputs")


def alternatives(bound: Bound) -> Iterator[dict[str, Any]]:
    """Option values other than the profile's that published criterions have, as far as they make a difference: of what
    the candidate neither declares nor lets vary."""
    o = bound.options
    for changes in _published(o):
        if not set(changes) & (set(bound.candidate.options) | bound.varies) and o.with_(**changes) != o:
            yield changes


def _published(o: Options) -> Iterator[dict[str, Any]]:
    yield {"weighted": True}  # RT-DETR
    yield {"aux_suffix": "_aux_"}  # RT-DETR
    yield from ({"giou_eps": eps} for eps in (0.0, 1e-6, 1e-7))  # DETR; DINO and Open-GroundingDino; ultralytics
    if o.class_loss != "softmax":
        yield from ({"class_divisor": divisor} for divisor in ("boxes", "matches"))  # Open-GroundingDino
    if o.has_encoder:
        yield from ({"encoder_suffix": suffix} for suffix in _NAMES)
        kinds = ("real", "class-zero") if o.class_loss == "focal" else ()
        yield from ({"encoder_targets": kind} for kind in kinds)
        yield from ({"encoder_key": key, "encoder_suffix": suffix} for key in _PLACES for suffix in _NAMES)
    yield from ({"set_cost_class": weight} for weight in (1.0, 2.0))  # Grounding DINO, Table 8 and §4.1
    yield from ({"ce_loss_coef": weight} for weight in (1.0, 2.0))


def explaining(
    bound: Bound, check: Check, cases: list[Case], before: Callable[[Experiment], Tallies]
) -> dict[str, Any]:
    """The option values that explain why ``check`` fails on ``cases``, those that leave the fewest other failures; {}
    where none do. ``before``: what an experiment found under the options as they are."""
    spent = budget(SECONDS)
    best: tuple[int, dict[str, Any]] | None = None
    for changes in alternatives(bound):
        if spent():
            break
        other = replace(bound, options=bound.options.with_(**changes))
        if _passes(other, check, [_under(case, changes) for case in cases]):
            left = _failures_left(other, check, before)
            if left is not None and (best is None or left < best[0]):
                best = left, changes
    return best[1] if best else {}


def _under(case: Case, changes: Mapping[str, Any]) -> Case:
    """The same case under other options; encoder outputs go where those have them."""
    options, outputs = case.options.with_(**changes), dict(case.outputs)
    if case.has_encoder:
        outputs[options.encoder_key] = outputs.pop(case.options.encoder_key)
    return replace(case, options=options, outputs=outputs)


def _passes(bound: Bound, check: Check, cases: list[Case]) -> bool:
    found = [c for case in cases for c in judged(check, check.on.observe(bound, case))]
    return bool(found) and all(c.ok for c in found)


def _failures_left(bound: Bound, check: Check, before: Callable[[Experiment], Tallies]) -> int | None:
    """How many checks still fail under other options; None where the check itself does, or one that did not."""
    left = 0
    for experiment in {check.on, BATCH, EDGES}:
        found = tallied(bound, experiment, experiment.fixed(bound))
        if check.name in found.failing or not found.failing <= before(experiment).failing:
            return None
        left += len(found.failing)
    return left
