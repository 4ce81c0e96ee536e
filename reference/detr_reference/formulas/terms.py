"""NORM: the losses of one layer, and what they are divided by.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from detr_reference.formulas.records import Layer, Pairs, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def num_boxes(book: Textbook, targets: Targets) -> Tensor:
    """NORM-3, 5, DIST-1. nb = max(mean of N over the ranks, 1). facebookresearch/detr models/detr.py:227-231."""
    return book.over_ranks(torch.tensor(sum(len(t["boxes"]) for t in targets), dtype=torch.float64)).clamp(min=1)


def over_ranks(book: Textbook, n: Tensor) -> Tensor:
    """DIST-1. The mean of a number over the ranks of torch.distributed; the number itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return n
    total = n.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def matched_boxes(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
    """The matched predictions and their targets, both [M,4]."""
    pred = torch.cat([b[m.query] for b, m in zip(layer.boxes, matches, strict=True)])
    wanted = torch.cat([t["boxes"][m.target] for t, m in zip(targets, matches, strict=True)])
    return pred, wanted


def loss_ce(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> Tensor:
    """The class loss of the profile."""
    return (
        book.softmax_loss(layer, targets, matches)
        if book.o.class_loss == "softmax"
        else book.focal_loss(layer, targets, matches, nb, mask)
    )


def loss_bbox(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """NORM-1. Σ_pairs |Δ|₁ / nb, from [M,4] each. facebookresearch/detr models/detr.py:143-162."""
    return book.l1(pred, wanted).sum() / nb


def loss_giou(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """NORM-1. Σ_pairs (1 − GIoU) / nb, from [M,4] each."""
    return (1 - book.giou(pred, wanted)).sum() / nb


def layer_losses(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """KEY-1, 7. The trained losses of one layer under their keys."""
    found: dict[str, Tensor] = {}
    if book.selected("labels"):
        found[f"loss_ce{layer.suffix}"] = book.loss_ce(layer, targets, matches, nb, mask)
    if book.selected("boxes"):
        pred, wanted = book.matched_boxes(layer, targets, matches)
        found[f"loss_bbox{layer.suffix}"] = book.loss_bbox(pred, wanted, nb)
        found[f"loss_giou{layer.suffix}"] = book.loss_giou(pred, wanted, nb)
    return found | book.mask_losses(layer, targets, matches, nb)


def selected(book: Textbook, name: str) -> bool:
    """KEY-7. True where ``losses`` names this group: labels, boxes, masks, cardinality."""
    return name in book.o.losses
