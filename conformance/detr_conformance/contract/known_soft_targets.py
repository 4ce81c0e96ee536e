"""Known mistakes that other detectors' class losses lend: targets that are IoUs, and queries that are ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.classification import every_query_and_channel_is_trained
from detr_conformance.contract.known_corners import iou_of, of_corners
from detr_conformance.contract.known_focal import bce, soft_term
from detr_conformance.contract.tokens import (
    every_token_of_the_class_is_a_positive,
    tokens_outside_the_mask_have_no_part,
)
from detr_conformance.registry import FOCAL, TEXT, known, varied
from detr_reference.textbook import Layer, Textbook

Cell = Callable[..., Tensor]

_iou = of_corners(iou_of)


def _with_quality(cell: Cell) -> dict[str, Any]:
    """The focal loss with a quality q for each matched query: the IoU of its pair. ``cell``: from the logits, their
    targets in 0 … 1, the qualities of their queries, and the book."""

    def focal_loss(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Tensor:
        total = layer.logits.sum() * 0
        for b, (x, target, m) in enumerate(zip(layer.logits, targets, matches, strict=True)):
            y = book.token_class_target(x, target, m) if "token_labels" in target else book.focal_class_target(
                x, target, m)  # fmt: skip
            quality = torch.zeros(len(x), 1, dtype=torch.float64)
            if len(m):
                iou = _iou(book, layer.boxes[b][m.query], target["boxes"][m.target])
                quality[m.query] = iou.detach()[:, None]
            inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask[b].expand_as(x)
            safe = torch.where(inside, x, 0)
            total = total + cell(safe, (y > 0).double(), quality, book)[inside].sum()
        return total / book.class_divisor(nb, matches)

    return {"focal_loss": focal_loss}


def _alpha(y: Tensor, book: Textbook) -> Tensor:
    return book.o.focal_alpha * y + (1 - book.o.focal_alpha) * (1 - y)


def _positives_soft(x: Tensor, y: Tensor, q: Tensor, book: Textbook) -> Tensor:
    """Only the logarithm sees the quality; the focusing factor is that of a hard target."""
    p = x.sigmoid()
    return _alpha(y, book) * (y * (1 - p) + (1 - y) * p) ** book.o.focal_gamma * bce(x, y * q)


def _quality_focal(x: Tensor, y: Tensor, q: Tensor, book: Textbook) -> Tensor:
    return (y * q - x.sigmoid()).abs() ** book.o.focal_gamma * bce(x, y * q)


def _varifocal(x: Tensor, y: Tensor, q: Tensor, book: Textbook) -> Tensor:
    weight = y * q + (1 - y) * book.o.focal_alpha * x.sigmoid().detach() ** book.o.focal_gamma
    return weight * bce(x, y * q)


def _weighed(x: Tensor, y: Tensor, q: Tensor, book: Textbook) -> Tensor:
    return torch.where(y > 0, q, 1.0) * soft_term(x, y, _alpha(y, book), book.o.focal_gamma)


SOFT: tuple[tuple[str, str, Cell], ...] = (
    ("positives-aim-at-their-iou", "Matched queries aim at the IoU of their pair instead of 1.",
     lambda x, y, q, book: soft_term(x, y * q, _alpha(y, book), book.o.focal_gamma)),
    ("positives-aim-at-their-iou-and-are-weighed-by-it", "Targets, and α's weights, are the IoU of the pair.",
     lambda x, y, q, book: soft_term(x, y * q, _alpha(y * q, book), book.o.focal_gamma)),
    ("positives-aim-at-their-iou-in-the-logarithm", "The logarithm, not the factor before it, aims at the pair's IoU.",
     _positives_soft),
    ("quality-focal-loss-of-the-iou", "Quality focal loss: |IoU − p|^γ without α.", _quality_focal),
    ("varifocal-loss-of-the-iou", "Varifocal loss: positives aim at the pair's IoU and are weighed by it.", _varifocal),
    ("positives-weighed-by-their-iou", "The term of a positive is multiplied by the IoU of its pair.", _weighed),
)  # fmt: skip

PLACES = (
    (every_query_and_channel_is_trained, "", FOCAL),
    (every_token_of_the_class_is_a_positive, "-by-tokens", TEXT),
)

for check, suffix, profiles in PLACES:
    for id, sentence, cell in SOFT:
        known(
            check, id + suffix, sentence, fix="aim at 1 in the matched query's class, whatever the boxes",
            profiles=profiles, around=_with_quality(cell),
        )  # fmt: skip


def _ignoring(threshold: float) -> dict[str, Any]:
    """Unmatched queries that overlap a target have no loss."""

    def focal_loss(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Tensor:
        kept = torch.ones(layer.logits.shape[:2], dtype=torch.bool)
        for b, (target, m) in enumerate(zip(targets, matches, strict=True)):
            if len(target["boxes"]):
                overlap = _iou(book, layer.boxes[b][:, None], target["boxes"][None]).amax(1)
                kept[b] = overlap <= threshold
            kept[b, m.query] = True
        rows = iter(kept)

        def focal_image(inner: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
            found: Tensor = book.focal_image(x, y, inside & next(rows)[:, None])
            return found

        found: Tensor = before.func(replace(book, focal_image=focal_image), layer, targets, matches, nb, mask)
        return found

    return {"focal_loss": focal_loss}


for check, suffix, profiles in PLACES:
    varied(
        check, f"overlapping-queries-are-ignored{suffix}",
        "Unmatched queries whose IoU with a target is above {0:g} have no class loss.", usual=0.3, span=(0.01, 0.95),
        around=_ignoring, profiles=profiles, fix="every unmatched query is background",
    )  # fmt: skip

known(
    tokens_outside_the_mask_have_no_part, "masked-after-the-logarithm",
    "The loss of masked tokens is multiplied by 0 afterwards, which leaves NaN where their logits are −∞.",
    fix="pick the tokens inside text_mask before anything is computed", profiles=TEXT,
    around={"focal_image": lambda before, book, x, y, inside: before(x, y, inside) + (x[~inside] * 0).sum()},
)  # fmt: skip
