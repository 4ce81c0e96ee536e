"""How far a right float32 criterion may be from the float64 textbook: from eps, magnitudes and number of terms.

Nothing here is a global constant. A sum of n terms is known to n·eps of Σ|terms|; a box edge to a few eps of its
coordinate, which a small box turns into a large relative error of its area; a cost to what the published forms of
the same formula differ among themselves. ``eps`` is that of the precision that a loss may be computed in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from detr_reference.textbook import Pairs, Textbook

EPS: Final = float(torch.finfo(torch.float32).eps)
OPS: Final = 16  # roundings behind one term: a handful of operations each way, doubled


def of_bbox(pred: Tensor, wanted: Tensor, nb: float, eps: float = EPS) -> float:
    """Allowed error of loss_bbox, from the matched boxes [M,4]."""
    differences, sizes = (pred - wanted).abs().sum(), (pred.abs() + wanted.abs()).sum()
    return float(eps * ((pred.numel() + OPS) * differences + OPS * sizes)) / nb


def of_giou_pairs(pred: Tensor, wanted: Tensor, eps: float = EPS) -> Tensor:
    """Allowed error of the GIoU of each pair [M]: edges known to OPS/4·eps, propagated through I/U − (H − U)/H."""
    a, b = _corners(pred), _corners(wanted)
    edge = OPS / 4 * eps * torch.maximum(a.abs().amax(-1), b.abs().amax(-1)).clamp(min=1)
    common = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).clamp(min=0)
    hull = torch.maximum(a, b)[..., 2:] - torch.minimum(a, b)[..., :2]
    sizes = [common, (a[..., 2:] - a[..., :2]).abs(), (b[..., 2:] - b[..., :2]).abs(), hull]
    moved_i, moved_a, moved_b, moved_h = (2 * edge * (s.sum(-1) + edge) for s in sizes)
    area_i, area_a, area_b, area_h = (s.prod(-1) for s in sizes)
    moved_u, area_u = moved_a + moved_b + moved_i, area_a + area_b - area_i
    ratio = (moved_i + moved_u * area_i / area_u) / area_u + (moved_u + moved_h * area_u / area_h) / area_h
    return (ratio + OPS * eps).nan_to_num(2.0).clamp(max=2.0)


def of_giou(pred: Tensor, wanted: Tensor, nb: float, eps: float = EPS) -> float:
    """Allowed error of loss_giou, from the matched boxes [M,4]."""
    return float(of_giou_pairs(pred, wanted, eps).sum() + eps * 2 * len(pred) ** 2) / nb


def of_focal(book: Textbook, x: Tensor, y: Tensor, divisor: float, eps: float = EPS) -> float:
    """Allowed error of a focal class loss, from the logits and targets that take part."""
    z = torch.where(y > 0, x, -x)
    alpha, gamma = book.alpha_weight(y), book.o.focal_gamma
    left = (-z).sigmoid()
    log = torch.nn.functional.softplus(-z)
    terms = alpha * left**gamma * log
    # 1 − p_t is a difference of numbers near 1, known to eps; so is p_t itself inside a plain log of a moderate logit
    power = gamma * alpha * (left + eps) ** (gamma - 1) * log if gamma else torch.zeros_like(z)
    inside_log = torch.where(z.abs() < 6, alpha * left**gamma / z.sigmoid(), torch.zeros_like(z))
    # whoever sums all as negatives, and corrects the positives, adds and subtracts what those are as negatives
    negative = (book.alpha_weight(torch.zeros_like(y)) * x.sigmoid() ** gamma * torch.nn.functional.softplus(x))[y > 0]
    rounded = power.sum() + inside_log.sum() + negative.sum()
    return float(eps * ((x.numel() + OPS) * terms.sum() + OPS * rounded)) / divisor


def of_class_gradient(want: Tensor, parts: Tensor, eps: float = EPS) -> Tensor:
    """Allowed error of a class-logit gradient [B,Q,C]. ``parts``: how large what it is the difference of is."""
    return OPS * eps * (4 * want.abs() + want.abs().max() + parts)


def parts_of_softmax(w: Tensor) -> Tensor:
    """Those of a softmax's gradient w·(p − y) / Σw, from class weights: [M,1]."""
    return (w / w.sum())[:, None]


def parts_of_focal(book: Textbook, x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Those of a focal gradient: where a positive was summed as a negative and corrected, the negative's slope."""
    p, gamma = x.sigmoid(), book.o.focal_gamma
    slope = p**gamma * (gamma * (1 - p) * torch.nn.functional.softplus(x) + p)
    parts = book.alpha_weight(torch.zeros_like(y)) * slope / divisor
    return torch.where(y > 0, parts, torch.zeros_like(x)).nan_to_num()


def of_softmax(x: Tensor, w: Tensor, loss: float, eps: float = EPS) -> float:
    """Allowed error of a weighted cross-entropy, from logits [M,C] and class weights [M]."""
    magnitude = x.abs().amax(-1) + x.shape[-1]
    return float(eps * OPS * (w * magnitude).sum() / w.sum()) + eps * (len(x) + OPS) * abs(loss)


def of_cost(book: Textbook, x: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Allowed error of each matching cost [Q,n] of one image.

    For the class cost: what 1e-8, 1e-12 or nothing inside the logs, in double or single precision, differ by.
    """

    def published(inside: float, dtype: torch.dtype) -> Tensor:
        def difference(self: Textbook, x: Tensor) -> Tensor:
            p, alpha, gamma = x.to(dtype).sigmoid(), self.o.cost_alpha, self.o.cost_gamma
            positive = alpha * (1 - p) ** gamma * -(p + inside).log()
            negative = (1 - alpha) * p**gamma * -(1 - p + inside).log()
            return (positive - negative).double()

        cost: Tensor = replace(book, focal_difference=difference).class_cost(x, target)
        return cost

    variants = [book.class_cost(x, target)]
    if book.o.class_loss != "softmax":
        variants += [published(1e-8, torch.float64), published(1e-12, torch.float64), published(1e-8, torch.float32)]
    costs = torch.stack(variants).nan_to_num(posinf=1e3, neginf=-1e3)
    spread = costs.amax(0) - costs.amin(0) + OPS * EPS * costs.abs().amax(0)
    if book.o.class_loss == "softmax":
        spread = spread + OPS * EPS * x.abs().amax(-1, keepdim=True) * costs[0].abs()
    pred, wanted, o = boxes[:, None], target["boxes"][None], book.o
    return (
        o.set_cost_class * spread
        + o.set_cost_bbox * OPS * EPS * (pred.abs() + wanted.abs()).sum(-1)
        + o.set_cost_giou * of_giou_pairs(pred, wanted)
    )


def slack(allowed: Tensor, one: Pairs, other: Pairs) -> float:
    """By how much the total costs of two assignments may differ through rounding alone: the pairs not in both."""
    a = set(zip(one.query.tolist(), one.target.tolist(), strict=True))
    b = set(zip(other.query.tolist(), other.target.tolist(), strict=True))
    return float(sum(float(allowed[q, t]) for q, t in a ^ b))


def _corners(boxes: Tensor) -> Tensor:
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def of_mask_logits(masks: Tensor, eps: float = EPS) -> Tensor:
    """Allowed error of resized mask logits, for each pair of [M,h,w]: a place among h rows, or w columns, is known to
    some eps of their number, and the logits beside it differ by at most twice the largest."""
    return OPS * eps * (1 + max(masks.shape[1:])) * masks.abs().flatten(1).amax(1)


def of_mask(book: Textbook, x: Tensor, m: Tensor, moved: Tensor, nb: float, eps: float = EPS) -> float:
    """Allowed error of loss_mask, from resized logits and targets [M,H,W]; ``moved`` [M]: that of the logits."""
    pixels = max(x[0].numel(), 1) if len(x) else 1
    fixed = book.under(book.o.with_(focal_alpha=0.25, focal_gamma=2.0))
    steep = 2 * moved.sum() * pixels  # the focal term's slope is below 2
    return of_focal(fixed, x, m, nb * pixels, eps) + float(steep) / (nb * pixels)


def of_dice(x: Tensor, m: Tensor, moved: Tensor, nb: float, eps: float = EPS) -> float:
    """Allowed error of loss_dice = Σ 1 − A/B, from resized logits and targets [M,H,W]; ``moved`` [M]: that of the
    logits."""
    p, m = x.sigmoid().flatten(1), m.flatten(1)
    wrong = OPS * eps * p + p * (1 - p) * moved[:, None]
    a, b, pixels = 2 * (p * m).sum(1) + 1, (p + m).sum(1) + 1, m.shape[1]
    moved_a = 2 * (wrong * m).sum(1) + eps * (pixels + OPS) * a
    moved_b = wrong.sum(1) + eps * (pixels + OPS) * b
    return float((moved_a / b + a * moved_b / b**2).sum() + eps * (len(x) + OPS) * len(x)) / nb


def of_mask_gradient(book: Textbook, masks: Tensor, m: Tensor, nb: float, eps: float = EPS) -> Tensor:
    """Allowed error of the gradient of loss_mask + loss_dice at matched mask logits [M,h,w], from target masks [M,H,W].

    Slope and curvature of a pixel's focal term are below 2, those of the dice loss below 2/B, B = Σm + 1 or more; the
    pixels that a logit reaches add up.
    """
    size, given = m.shape[1:], masks.shape[1:]
    rows, columns = (book.interpolation(new, old) for new, old in zip(size, given, strict=True))
    steep = 2 / m[0].numel() + 2 / (m.flatten(1).sum(1) + 1)
    rounded = of_mask_logits(masks, eps) + eps * (OPS * (1 + max(given)) + m[0].numel())
    reach: Tensor = rows.sum(0)[:, None] * columns.sum(0)[None]
    return (steep * rounded)[:, None, None] * reach / nb
