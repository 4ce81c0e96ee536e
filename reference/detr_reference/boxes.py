"""Boxes (cx, cy, w, h) in units of the image, their corners, and the generalised IoU of two of them."""

from __future__ import annotations

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """The low and the high corner of boxes [..., 4], (x, y) each: [2, 2, ...].

    Coordinates come first because such planes broadcast and vectorise where the columns of [..., 4] do not.
    """
    planes = boxes.movedim(-1, 0)
    centre, size = planes[:2], planes[2:]
    return torch.stack((centre - size / 2, centre + size / 2))


def giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """GIoU = I/U − (H − U)/H of corners a and b [2, 2, ...], which may broadcast: pairs [2, 2, M] with [2, 2, M], or
    all with all, [2, 2, 1, Q] with [2, 2, n, 1]. The result has their shape without the leading 2, 2.

    I is the intersection, U the union, H the enclosing box (Rezatofighi 2019, eq. 1; facebookresearch/detr
    util/box_ops.py:41). ``eps`` is added to both denominators (IDEA-Research/DINO util/box_ops.py:37,63).
    """
    (a_low, a_high), (b_low, b_high) = a, b
    intersection = _area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    # Areas come from corners, as the intersection does, so that a box and itself have I = U to the last bit.
    union = _area(a_high - a_low) + _area(b_high - b_low) - intersection
    hull = _area(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    overlap: Tensor = intersection / _divisor(union, eps) - (hull - union) / _divisor(hull, eps)
    return overlap


def _area(sides: Tensor) -> Tensor:
    """Width times height, of [2, ...]."""
    return sides[0] * sides[1]


def _divisor(area: Tensor, eps: float) -> Tensor:
    """``area``, safe to divide by: the 0/0 of zero-area boxes becomes 0/1, with a finite gradient."""
    return area + eps if eps else area + (1 - area.sign())  # several times faster than where(area == 0, …)
