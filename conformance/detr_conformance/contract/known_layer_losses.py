"""Known mistakes of the class loss in auxiliary or encoder outputs alone, and the checks that see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.layers import (
    an_auxiliary_layer_is_trained_like_the_final_one,
    encoder_outputs_are_trained_on_their_class_targets,
)
from detr_conformance.registry import DETR, FOCAL, TEXT, known
from detr_reference.textbook import Layer, Textbook, textbook


def _only_here(of: str, change: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A loss of some layers computed by a book with other formulas, from the book itself."""

    def loss_ce(before: Callable[..., Tensor], book: Textbook, layer: Layer, *rest: Any) -> Tensor:
        found = replace(book, loss_ce=textbook.loss_ce, **change(book)) if layer.name.startswith(of) else None
        return found.loss_ce(layer, *rest) if found else before(layer, *rest)

    return {"loss_ce": loss_ce}


def _of_matched(book: Textbook) -> dict[str, Any]:
    """The focal loss of matched queries alone: those whose row has a positive."""

    def focal_image(_book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        return book.focal_image(x, y, inside & (y > 0).any(-1, keepdim=True))

    return {"focal_image": focal_image}


def _of_unmatched(book: Textbook) -> dict[str, Any]:
    def focal_image(_book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        return book.focal_image(x, y, inside & ~(y > 0).any(-1, keepdim=True))

    return {"focal_image": focal_image}


def _of_positives(book: Textbook) -> dict[str, Any]:
    return {"focal_image": lambda _book, x, y, inside: book.focal_image(x, y, inside & (y > 0))}


def _averaged(book: Textbook) -> dict[str, Any]:
    return {"focal_image": lambda _book, x, *rest: book.focal_image(x, *rest) / max(len(x), 1)}


def _never_divided(book: Textbook) -> dict[str, Any]:
    return {"class_divisor": lambda _book, *rest: torch.ones((), dtype=torch.float64)}


def _twice_divided(book: Textbook) -> dict[str, Any]:
    return {"class_divisor": lambda _book, nb, m: nb * book.class_divisor(nb, m)}


def _without_alpha(book: Textbook) -> dict[str, Any]:
    return {"alpha_weight": lambda _book, y: torch.ones_like(y)}


def _without_gamma(book: Textbook) -> dict[str, Any]:
    return {"focusing": lambda _book, z: torch.ones_like(z)}


SLIPS = (
    ("of-matched-queries-only", "is taken on matched queries only", _of_matched),
    ("of-unmatched-queries-only", "is taken on unmatched queries only", _of_unmatched),
    ("of-positives-only", "is taken on positive entries only", _of_positives),
    ("averaged-over-queries", "is averaged over queries: a factor 1/Q", _averaged),
    ("never-divided", "is divided by nothing", _never_divided),
    ("divided-twice", "is divided by nb twice", _twice_divided),
    ("without-alpha", "has no α", _without_alpha),
    ("without-gamma", "has no (1 − p_t)^γ", _without_gamma),
)

for of, whose, check in (
    ("aux", "auxiliary", an_auxiliary_layer_is_trained_like_the_final_one),
    ("enc", "encoder", encoder_outputs_are_trained_on_their_class_targets),
):
    for id, sentence, slip in SLIPS:
        known(
            check, f"{whose}-class-loss-{id}", f"The class loss of {whose} outputs {sentence}.",
            fix="treat all layers alike", profiles=FOCAL | TEXT, around=_only_here(of, slip),
        )  # fmt: skip
    if of == "aux":
        known(
            check, "auxiliary-cross-entropy-of-matched-queries-only",
            "The cross-entropy of auxiliary outputs is taken on matched queries only.", fix="treat all layers alike",
            profiles=DETR, around=_only_here(of, lambda book: {
                "class_weight": lambda _book, y: (y != book.o.num_classes).double(),
                "softmax_divisor": lambda _book, w, targets: w.sum().clamp(min=1)}),
        )  # fmt: skip
        known(
            check, "auxiliary-cross-entropy-without-weights",
            "No object weighs 1 in auxiliary outputs alone.", fix="treat all layers alike",
            profiles=DETR, around=_only_here(of, lambda book: {
                "class_weight": lambda _book, y: torch.ones_like(y, dtype=torch.float64)}),
        )  # fmt: skip


def _times_the_decoders_queries(
    before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any
) -> Any:
    result, key = before(outputs, targets, given), f"loss_ce{book.o.encoder_suffix}"
    layers = {x.name: x for x in book.layers(outputs)}
    if "enc" not in layers or key not in result.losses:
        return result
    share = layers["final"].logits.shape[1] / layers["enc"].logits.shape[1]
    return replace(result, losses=result.losses | {key: result.losses[key] * share})


known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-class-loss-times-the-decoders-queries",
    "The encoder's class loss is a mean over its queries, multiplied by the decoder's number of queries.",
    fix="multiply the mean by the layer's own number of queries", profiles=FOCAL | TEXT,
    around={"losses": _times_the_decoders_queries},
)  # fmt: skip
