"""NUM, COST, BOX and GRAD in other precisions, without area, and by small steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.compare import agree, holds, number
from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient
from detr_conformance.contract.keys import trained
from detr_conformance.contract.matching import optimal, the_assignment_is_optimal
from detr_conformance.contract.normalisation import value
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_conformance.tolerance import OPS
from detr_conformance.variations import (
    AUTOCASTED,
    BACKWARD,
    EMPTY_BOXES,
    FORWARD,
    HALF,
    STEP_WIDTH,
    STEPPED,
    WIDE,
    direction,
    total,
)
from detr_reference.textbook import TERMS, Layer, Textbook

HALF_EPS = {
    torch.bfloat16: float(torch.finfo(torch.bfloat16).eps),
    torch.float16: float(torch.finfo(torch.float16).eps),
}
EPS64 = float(torch.finfo(torch.float64).eps)


def finite(seen: Seen) -> Iterator[Comparison]:
    """Every trained loss that is returned, and every gradient, is finite."""
    for layer in seen.case.layers:
        for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
            if key in seen.got.losses:
                yield holds(math.isfinite(seen.got.losses[key]), key, "finite", number(seen.got.losses[key]))
            for name, grad in zip(("logits", "boxes"), seen.got.grads.get((term, layer), (None, None)), strict=True):
                if grad is not None:
                    bad = int((~grad.isfinite()).sum())
                    yield holds(not bad, f"gradient of {key} at pred_{name}", "finite", f"{bad} entries are not")


BOX_8 = clause(
    "BOX-8",
    "should",
    EVERY,
    "Boxes without area, coincident ones included, give finite losses and gradients.",
    ["open-mmlab/mmdetection #3394", "ultralytics/yolov5 #8539"],
)


@check(BOX_8, on=EMPTY_BOXES, component="GIoU", takes_raising=True)
def boxes_without_area_stay_finite(seen: Seen) -> Iterator[Comparison]:
    yield from finite(seen)


@fault(
    boxes_without_area_stay_finite,
    seen_in="facebookresearch/detr util/box_ops.py:41",
    fix="add a small ε to the denominators, or divide by 1 where they are 0",
)
def empty_boxes_divide_zero_by_zero(book: Textbook) -> Textbook:
    """The GIoU loss of boxes without area divides 0 by 0."""

    def loss_giou(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        right = book.under(inner.o)
        found: Tensor = replace(right, share=lambda _, part, whole: part / whole).loss_giou(pred, wanted, nb)
        return found

    return replace(book, loss_giou=loss_giou)


@fault(boxes_without_area_stay_finite, fix="divide by what cannot be 0")
def giou_relative_to_the_targets_area(book: Textbook) -> Textbook:
    """The GIoU loss of a pair is divided by the square root of its target's area."""

    def loss_giou(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        size = book.area(book.corners(wanted)).sqrt()
        return ((1 - book.giou(pred, wanted)) / size).sum() / nb

    return replace(book, loss_giou=loss_giou)


# --- half precision ---

COST_9 = clause(
    "COST-9",
    "should",
    EVERY,
    "The assignment is the float32 one for logits in ±110 and for half-precision logits and boxes, wherever float32 "
    "decides clearly.",
)


@check(COST_9, on=HALF, component="matching costs", after=[the_assignment_is_optimal])
def half_precision_is_matched_as_float32(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        yield from optimal(seen, layer)


@fault(half_precision_is_matched_as_float32, fix="compute the cost in float32 whatever the outputs are")
def cost_in_bfloat16(book: Textbook) -> Textbook:
    """Matching costs are rounded to bfloat16."""

    def cost(inner: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        exact: Tensor = book.under(inner.o).cost(x, boxes, target)
        return exact.to(torch.bfloat16).double()

    return replace(book, cost=cost)


NUM_4 = clause(
    "NUM-4",
    "should",
    EVERY,
    "bfloat16 and float16 outputs, alone and under autocast, give finite losses near the float32 ones.",
    ["roboflow/rf-detr #299"],
)
_NEAR = "as in float32, to half precision"


@check(NUM_4, on=HALF, component="precision", takes_raising=True)
def half_precision_losses_are_near(seen: Seen) -> Iterator[Comparison]:
    if seen.case.outputs["pred_logits"].dtype in HALF_EPS:
        yield from finite(seen)
        yield from _near(seen)


@check(NUM_4, on=AUTOCASTED, component="precision", takes_raising=True)
def losses_under_autocast_are_near(seen: Seen) -> Iterator[Comparison]:
    yield from finite(seen)
    yield from _near(seen)


def _near(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        for term in TERMS:
            yield from value(seen, term, layer, _NEAR)


def _rounded_probabilities(book: Textbook, dtype_of: Callable[[Tensor], torch.dtype | None]) -> Textbook:
    """The book whose class loss takes probabilities rounded to ``dtype_of(logits)``, if any; matching is left alone."""
    dtypes: list[torch.dtype | None] = []

    def layers(inner: Textbook, outputs: Mapping[str, Any]) -> Any:
        dtypes[:] = [dtype_of(outputs["pred_logits"])]
        return book.under(inner.o).layers(outputs)

    def loss_ce(inner: Textbook, layer: Layer, *rest: Any) -> Tensor:
        right = book.under(inner.o)
        if dtypes[0] is not None:
            softmax = inner.o.class_loss == "softmax"
            p = (layer.logits.softmax(-1) if softmax else layer.logits.sigmoid()).to(dtypes[0]).double()
            layer = replace(layer, logits=p.log() if softmax else p.logit())
        found: Tensor = right.loss_ce(layer, *rest)
        return found

    return replace(book, layers=layers, loss_ce=loss_ce)


@fault(half_precision_losses_are_near, fix="take log-sigmoid or log-softmax of the logits, in float32")
def probabilities_in_half_precision(book: Textbook) -> Textbook:
    """Class probabilities of half-precision logits are rounded to float16 before their logarithm."""
    return _rounded_probabilities(book, lambda x: torch.float16 if x.dtype in HALF_EPS else None)


@fault(losses_under_autocast_are_near, fix="compute the losses with autocast switched off")
def probabilities_in_half_precision_under_autocast(book: Textbook) -> Textbook:
    """Under autocast class probabilities are rounded to float16 before their logarithm."""
    return _rounded_probabilities(book, lambda x: torch.float16 if torch.is_autocast_enabled("cpu") else None)


# --- float64 ---

NUM_3 = clause("NUM-3", "should", EVERY, "float64 outputs work and stay float64.")


@check(NUM_3, on=WIDE, component="precision", takes_raising=True)
def float64_stays_float64(seen: Seen) -> Iterator[Comparison]:
    for key in trained(seen):
        if key in seen.got.dtypes:
            got = str(seen.got.dtypes[key])
            yield holds(got == "torch.float64", f"dtype of {key}", "torch.float64", got)
    for layer in seen.case.layers:
        for term in TERMS:
            yield from value(seen, term, layer, "of float64 outputs")


@fault(float64_stays_float64, fix="keep the dtype of the outputs")
def losses_in_float32(book: Textbook) -> Textbook:
    """Losses are returned in float32 whatever the outputs are."""

    def scaled(inner: Textbook, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.float() for k, v in book.under(inner.o).scaled(found).items()}

    return replace(book, scaled=scaled)


GRAD_3 = clause("GRAD-3", "should", EVERY, "In float64 autograd agrees with finite differences away from kinks.")


@check(
    GRAD_3,
    on=WIDE,
    component="gradients",
    after=[float64_stays_float64, boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient],
)
def gradients_are_the_slopes(seen: Seen) -> Iterator[Comparison]:
    ahead, back = seen.trials[FORWARD], seen.trials[BACKWARD]
    if ahead.raised or back.raised:
        return
    along = direction(seen.case, 1)
    for term in TERMS:
        keys = [f"loss_{term}{seen.case.suffix(layer)}" for layer in seen.case.layers]
        if not all(k in o.losses for k in keys for o in (ahead, back)):
            continue
        parts = [
            grad * along(layer, key, grad)
            for layer in seen.case.layers
            for key, grad in zip(("pred_logits", "pred_boxes"), seen.got.grads[term, layer], strict=True)
            if grad is not None
        ]
        slope, size = sum(float(p.sum()) for p in parts), sum(float(p.abs().sum()) for p in parts)
        rise = sum(ahead.losses[k] - back.losses[k] for k in keys) / (2 * STEP_WIDTH)
        rounding = OPS * EPS64 * sum(abs(ahead.losses[k]) for k in keys) * seen.got.case.queries / STEP_WIDTH
        # the formulas' third derivatives are moderate: what a step leaves out is of the order of its width
        yield agree(f"slope of Σ {keys[0]}…", rise, slope, rounding + STEP_WIDTH * (1 + size) * OPS, "by differences")


@fault(gradients_are_the_slopes, fix="let autograd differentiate what is returned")
def box_gradient_halved(book: Textbook) -> Textbook:
    """The value of the L1 loss is right, and its gradient half of it."""

    def loss_bbox(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).loss_bbox(pred, wanted, nb)
        return (found + found.detach()) / 2

    return replace(book, loss_bbox=loss_bbox)


# --- downhill ---

GRAD_6 = clause("GRAD-6", "must", EVERY, "A small step against the gradient lowers the total.")


@check(GRAD_6, on=STEPPED, component="gradients", takes_raising=True)
def a_small_step_lowers_the_total(seen: Seen) -> Iterator[Comparison]:
    before = total(seen.case, seen.got)
    totals = {name: total(seen.case, trial) for name, trial in seen.trials.items() if not trial.raised}
    if not totals or not math.isfinite(before):
        return
    best = min(totals, key=lambda name: totals[name])
    yield holds(totals[best] < before, f"the total {best}", f"below {number(before)}", number(totals[best]))


@fault(a_small_step_lowers_the_total, fix="remove the gradient reversal")
def gradient_reversed(book: Textbook) -> Textbook:
    """Values are right, and every gradient points uphill."""

    def scaled(inner: Textbook, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: 2 * v.detach() - v for k, v in book.under(inner.o).scaled(found).items()}

    return replace(book, scaled=scaled)
