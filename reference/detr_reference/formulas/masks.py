"""MASK: mask losses of the final layer.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_reference.formulas.boxes import minus_log_sigmoid
from detr_reference.formulas.records import Layer, Pairs, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def layer_masks(book: Textbook, name: str, predictions: Mapping[str, Any]) -> Tensor | None:
    """LAYER-5. The mask logits [B,Q,h,w] that a layer is trained with, where "masks" is in losses: the final one's."""
    wanted = name == "final" and "masks" in book.o.losses
    return predictions["pred_masks"].double() if wanted else None


def mask_size(book: Textbook, targets: Targets) -> tuple[int, int]:
    """MASK-1. The largest height and the largest width of the batch's masks, in pixels."""
    sizes = [t["masks"].shape[1:] for t in targets if t["masks"].ndim == 3]
    return max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1)


def padded(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """MASK-1. Masks [n,H_b,W_b] to [n,H,W]: background below and to the right."""
    whole = torch.zeros(len(masks), *size, dtype=torch.float64)
    whole[:, : masks.shape[1], : masks.shape[2]] = masks
    return whole


def interpolation(book: Textbook, wanted: int, given: int) -> Tensor:
    """MASK-1. [wanted,given]: how much of each given pixel is in each wanted one, along one side of a mask.

    Linear between the two pixel centres that (i + ½)·given/wanted − ½, the wanted one's centre, lies between
    (align_corners False); beyond the outermost centres it is the outermost pixel's.
    """
    at = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5).clamp(0, given - 1)
    return (1 - (at[:, None] - torch.arange(given)).abs()).clamp(min=0)


def resized(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """MASK-1. Mask logits [M,h,w] to [M,H,W], bilinearly."""
    rows, columns = (book.interpolation(new, old) for new, old in zip(size, masks.shape[1:], strict=True))
    return rows @ masks @ columns.T


def matched_masks(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
    """MASK-1. The matched mask logits and their targets, both [M,H,W]. facebookresearch/detr models/detr.py:164-191."""
    assert layer.masks is not None
    size = book.mask_size(targets)
    pred = torch.cat([x[m.query] for x, m in zip(layer.masks, matches, strict=True)])
    images = [(t["masks"], m) for t, m in zip(targets, matches, strict=True) if len(m)]
    wanted = [book.padded(own[m.target], size) for own, m in images]
    return book.resized(pred, size), torch.cat([torch.zeros(0, *size, dtype=torch.float64), *wanted])


def mask_focal_term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
    """MASK-1. α_t(1−p_t)²(−log p_t) of every pixel, α = .25 whatever the class loss has; m in 0..1.

    facebookresearch/detr models/segmentation.py, sigmoid_focal_loss.
    """
    other = m * (-x).sigmoid() + (1 - m) * x.sigmoid()  # 1 − p_t
    nll = m * minus_log_sigmoid(x) + (1 - m) * minus_log_sigmoid(-x)
    return (0.25 * m + 0.75 * (1 - m)) * other**2 * nll


def dice(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
    """MASK-1. 1 − (2Σpm + 1)/(Σp + Σm + 1) over the pixels of each pair: [M,H,W] to [M]. Milletari 2016, smoothed as in
    facebookresearch/detr models/segmentation.py, dice_loss."""
    p, m = x.sigmoid().flatten(1), m.flatten(1)
    return 1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)


def loss_mask(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """MASK-1, 2. Σ_pairs of the mean over pixels / nb, from [M,H,W] each."""
    return book.mask_focal_term(pred, wanted).flatten(1).mean(1).sum() / nb


def loss_dice(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """MASK-1, 2. Σ_pairs of the dice loss / nb, from [M,H,W] each."""
    return book.dice(pred, wanted).sum() / nb


def mask_losses(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor
) -> dict[str, Tensor]:
    """MASK-1. The mask losses of one layer under their keys; none of a layer without masks."""
    if layer.masks is None:
        return {}
    pred, wanted = book.matched_masks(layer, targets, matches)
    return {
        f"loss_mask{layer.suffix}": book.loss_mask(pred, wanted, nb),
        f"loss_dice{layer.suffix}": book.loss_dice(pred, wanted, nb),
    }
