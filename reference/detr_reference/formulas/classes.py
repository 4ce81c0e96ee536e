"""CLS, TOKEN: class targets and class losses.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detr_reference.formulas.boxes import minus_log_sigmoid
from detr_reference.formulas.records import Layer, Pairs, Targets, exact

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def class_weight(book: Textbook, y: Tensor) -> Tensor:
    """CLS-1. 1 for a class, eos_coef for class K (no object)."""
    return torch.where(y == book.o.num_classes, exact(book.o.eos_coef), exact(1.0))


def softmax_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """CLS-1. The class of every query of one image [Q]: its target's, or K."""
    y = torch.full((len(x),), book.o.num_classes)
    y[pairs.query] = target["labels"][pairs.target]
    return y


def softmax_loss(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> Tensor:
    """CLS-1. Σ w_y·nll / Σ w_y over all B·Q. facebookresearch/detr models/detr.py:108-127."""
    images = zip(layer.logits, targets, matches, strict=True)
    y = torch.cat([book.softmax_class_target(x, t, m) for x, t, m in images])
    nll = -layer.logits.flatten(0, 1).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    w = book.class_weight(y)
    return (w * nll).sum() / book.softmax_divisor(w, targets)


def softmax_divisor(book: Textbook, w: Tensor, targets: Targets) -> Tensor:
    """CLS-1, 2. Σ of the class weights, not the number of boxes."""
    return w.sum()


def focal_term(book: Textbook, x: Tensor, y: Tensor) -> Tensor:
    """CLS-4, 5. α_t(1−p_t)^γ(−log p_t) elementwise, y in {0, 1}. Lin 2017, eq. 5."""
    z = torch.where(y > 0, x, -x)  # p_t = σ(z)
    return book.alpha_weight(y) * book.focusing(z) * minus_log_sigmoid(z)


def alpha_weight(book: Textbook, y: Tensor) -> Tensor:
    """CLS-4. α for positives, 1 − α for negatives."""
    return torch.where(y > 0, exact(book.o.focal_alpha), exact(1 - book.o.focal_alpha))


def focusing(book: Textbook, z: Tensor) -> Tensor:
    """CLS-5. (1 − p_t)^γ of z = logit of p_t."""
    return (-z).sigmoid() ** book.o.focal_gamma


def focal_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """CLS-3. One-hot rows [Q,K]; an unmatched query's row is all zero."""
    y = torch.zeros_like(x)
    y[pairs.query, target["labels"][pairs.target]] = 1
    return y


def token_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """TOKEN-1. [Q,T]: 1 on every token of the class; an unmatched query's row is all zero."""
    y = torch.zeros_like(x)
    y[pairs.query] = (target["token_labels"][pairs.target] > 0).to(y.dtype)
    return y


def in_loss(book: Textbook, x: Tensor, mask: Tensor | None) -> Tensor:
    """TOKEN-2. Which entries of [Q,C] have a part in the loss: every class, or the tokens inside text_mask [T]."""
    whole = torch.ones_like(x, dtype=torch.bool)
    return whole if mask is None else whole & mask.bool()


def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    """CLS-3, 6. The sum over queries and channels of one image."""
    return book.focal_term(x[inside], y[inside]).sum()


def focal_loss(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> Tensor:
    """CLS-3. Σ over all B·Q·C of the focal term / divisor. fundamentalvision/Deformable-DETR deformable_detr.py:220."""
    kind = book.token_class_target if book.o.class_loss == "token" else book.focal_class_target
    total = torch.zeros((), dtype=torch.float64)
    for b, (x, t, m) in enumerate(zip(layer.logits, targets, matches, strict=True)):
        total = total + book.focal_image(x, kind(x, t, m), book.in_loss(x, None if mask is None else mask[b]))
    return total / book.class_divisor(nb, matches)


def class_divisor(book: Textbook, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
    """NORM-3. nb, or by option the layer's own matched pairs (Open-GroundingDino)."""
    if book.o.class_divisor == "matches":
        return torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)
    return nb
