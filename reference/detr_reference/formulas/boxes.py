"""BOX: corners, areas, GIoU, L1.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def corners(book: Textbook, boxes: Tensor) -> Tensor:
    """BOX-1. cxcywh [...,4] to (x1, y1, x2, y2): cx ∓ w/2, cy ∓ h/2."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def area(book: Textbook, c: Tensor) -> Tensor:
    """Area of corner boxes [...,4]."""
    return (c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1])


def intersection(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    """I: the common area of corner boxes a and b, 0 where they are apart."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def union(book: Textbook, a: Tensor, b: Tensor, common: Tensor) -> Tensor:
    """U = |a| + |b| − I."""
    return book.area(a) + book.area(b) - common


def enclosing(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    """H: the area of the smallest box around both."""
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    sides = high - low
    return sides[..., 0] * sides[..., 1]


def share(book: Textbook, part: Tensor, whole: Tensor) -> Tensor:
    """BOX-2, 8. part / whole, the ε option added; 0/0, of boxes without area, is 0."""
    whole = whole + book.o.giou_eps
    return part / (whole + (whole == 0))


def giou(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
    """BOX-2. I/U − (H − U)/H of cxcywh boxes, broadcast; the ε option is added to both denominators.

    Rezatofighi 2019, algorithm 1; facebookresearch/detr util/box_ops.py:41.
    """
    a, b = book.corners(pred), book.corners(target)
    common = book.intersection(a, b)
    both, hull = book.union(a, b, common), book.enclosing(a, b)
    return book.share(common, both) - book.share(hull - both, hull)


def l1(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
    """COST-6, NORM-1. |Δcx| + |Δcy| + |Δw| + |Δh| of cxcywh boxes, broadcast."""
    return (pred - target).abs().sum(-1)


def minus_log_sigmoid(z: Tensor) -> Tensor:
    """−log σ(z), exact also where σ(z) rounds to 0 or 1 (torch's own threshold of 20 loses 2e-9 in float64)."""
    return F.softplus(-z, threshold=40)
