"""NUM: precision and extremes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.contract.classification import (
    every_query_and_channel_is_trained,
    loss_ce_of_at_most_one_target_is_the_weighted_mean,
    the_class_loss_is_a_sum,
)
from detr_conformance.contract.compare import holds, number
from detr_conformance.contract.normalisation import (
    loss_bbox_is_the_sum_of_l1_over_nb,
    loss_giou_is_the_sum_over_nb,
    value,
)
from detr_conformance.contract.tokens import every_token_of_the_class_is_a_positive
from detr_conformance.experiments import EXTREMES
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Textbook

NUM_1 = clause(
    "NUM-1",
    "must",
    EVERY,
    "float32 values agree with the float64 textbook to a tolerance derived from eps and the number of terms.",
)
_CLASS = [
    every_query_and_channel_is_trained,
    loss_ce_of_at_most_one_target_is_the_weighted_mean,
    the_class_loss_is_a_sum,
    every_token_of_the_class_is_a_positive,
]


@check(NUM_1, on=EXTREMES, component="class loss", after=_CLASS)
def the_class_loss_is_precise(seen: Seen) -> Iterator[Comparison]:
    yield from value(seen, "ce", "final", "in float64")


@check(NUM_1, on=EXTREMES, component="GIoU", after=[loss_giou_is_the_sum_over_nb])
def loss_giou_is_precise(seen: Seen) -> Iterator[Comparison]:
    yield from value(seen, "giou", "final", "in float64")


@check(NUM_1, on=EXTREMES, component="L1", after=[loss_bbox_is_the_sum_of_l1_over_nb])
def loss_bbox_is_precise(seen: Seen) -> Iterator[Comparison]:
    yield from value(seen, "bbox", "final", "in float64")


def _clamped(inner: Textbook, book: Textbook, layer, *rest):  # type: ignore[no-untyped-def]
    return book.under(inner.o).loss_ce(replace(layer, logits=layer.logits.clamp(-10, 10)), *rest)


@fault(the_class_loss_is_precise, fix="leave the logits as they are: use a log-sigmoid or log-softmax")
def logits_clamped_at_ten(book: Textbook) -> Textbook:
    """Logits are clamped to ±10 before the class loss."""
    return replace(book, loss_ce=lambda inner, layer, *rest: _clamped(inner, book, layer, *rest))


@fault(loss_giou_is_precise, fix="compute areas from sides that are not rounded up")
def sides_of_at_least_a_hundredth(book: Textbook) -> Textbook:
    """Sides below 0.01 of the image are taken as 0.01 in the GIoU."""

    def giou(inner: Textbook, pred: Tensor, target: Tensor) -> Tensor:
        wide = [torch.cat([b[..., :2], b[..., 2:].clamp(min=0.01)], -1) for b in (pred, target)]
        found: Tensor = book.under(inner.o).giou(*wide)
        return found

    return replace(book, giou=giou)


@fault(loss_bbox_is_precise, fix="compute in the dtype of the outputs")
def boxes_rounded_to_bfloat16(book: Textbook) -> Textbook:
    """The L1 loss is computed in bfloat16."""

    def loss_bbox(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        return (pred.bfloat16() - wanted.bfloat16()).abs().double().sum() / nb

    return replace(book, loss_bbox=loss_bbox)


NUM_2 = clause(
    "NUM-2",
    "must",
    EVERY,
    "Logits of ±20 and ±110, and boxes with sides from 1e-3 to 1, give finite losses and gradients.",
)


@check(NUM_2, on=EXTREMES, component="gradients", takes_raising=True)
def extremes_stay_finite(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
            if key in seen.got.losses and (seen.case.total or term == "ce"):
                got = seen.got.losses[key]
                yield holds(math.isfinite(got), key, "finite", number(got))
            for name, grad in zip(("logits", "boxes"), seen.got.grads.get((term, layer), (None, None)), strict=True):
                if grad is not None:
                    ok = bool(grad.isfinite().all())
                    what = f"gradient of {key} at pred_{name}"
                    yield holds(ok, what, "finite", "finite" if ok else f"{int((~grad.isfinite()).sum())} are not")


@fault(extremes_stay_finite, fix="use log-sigmoid instead of the logarithm of a rounded probability")
def logarithm_of_a_rounded_probability(book: Textbook) -> Textbook:
    """−log p of a float32 probability: infinite where it rounds to 0."""

    def focal_term(book: Textbook, x: Tensor, y: Tensor) -> Tensor:
        z = torch.where(y > 0, x, -x)
        return book.alpha_weight(y) * book.focusing(z) * -(1 - (-z).float().sigmoid()).log().double()

    def softmax_loss(book: Textbook, layer, targets, matches):  # type: ignore[no-untyped-def]
        images: Iterator[tuple[Tensor, Mapping[str, Tensor], object]] = zip(layer.logits, targets, matches, strict=True)
        y = torch.cat([book.softmax_class_target(*image) for image in images])
        nll = -layer.logits.flatten(0, 1).float().softmax(-1).log().gather(-1, y[:, None])[:, 0].double()
        w = book.class_weight(y)
        return (w * nll).sum() / book.softmax_divisor(w, targets)

    return replace(book, focal_term=focal_term, softmax_loss=softmax_loss)
