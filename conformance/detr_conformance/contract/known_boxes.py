"""Known mistakes of boxes, beside those in the chapters BOX, NORM and GRAD: a formula, and the check that sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.boxes import (
    boxes_outside_the_image_are_not_clipped,
    corners_are_half_a_side_from_the_centre,
    identical_boxes_have_loss_giou_zero,
    loss_giou_is_one_minus_giou_of_the_pair,
)
from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient
from detr_conformance.contract.known_corners import giou_of, hull_sides, iou_of, of_corners
from detr_conformance.contract.normalisation import (
    loss_bbox_is_the_sum_of_l1_over_nb,
    loss_giou_is_the_sum_over_nb,
    nb_counts_targets_not_matches,
    nb_of_loss_giou_counts_targets_not_matches,
)
from detr_conformance.contract.numbers import loss_giou_is_precise
from detr_conformance.registry import DETR, EVERY, known
from detr_reference.textbook import Textbook

EXACT = EVERY - {"dino"}  # where no ε is meant to be in the denominators

# --- GIoU ---


def of_areas(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GIoU from intersection, union, enclosing box and both areas."""

    def combine(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
        common = book.intersection(a, b)
        sizes = common, book.union(a, b, common), book.enclosing(a, b)
        return value(*sizes, book.area(a), book.area(b), book.share)

    return of_corners(combine)


def _sides(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])


def _diou(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    gap = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    value: Tensor = iou_of(book, a, b) - book.share(gap, hull_sides(a, b).square().sum(-1))
    return value


def _ciou(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    iou = iou_of(book, a, b)
    angles = [torch.atan((c[..., 2] - c[..., 0]) / (c[..., 3] - c[..., 1])) for c in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return _diou(book, a, b) - (v / (1 - iou + v + 1e-7)).detach() * v


def _from_the_smaller(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    return sides.prod(-1)


def _hull_of_centres(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    apart = ((a[..., :2] + a[..., 2:]) - (b[..., :2] + b[..., 2:])).abs() / 2
    return (apart + torch.maximum(a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])).prod(-1)


_BY_HULL = "the second term is (H − U)/H, subtracted"
_BY_UNION = "U = |A| + |B| − I, and the first term is I/U"
_OVERLAP = "clamp each side of the intersection at 0, then multiply"

for name, sentence, fix, formulas in (
    (
        "hull-term-over-the-union", "(H − U)/U instead of (H − U)/H.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) - s(h - u, u))},
    ),
    (
        "hull-term-undivided", "H − U is not divided by H.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) - (h - u))},
    ),
    (
        "hull-term-of-the-intersection", "(H − I)/H instead of (H − U)/H.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) - s(h - i, h))},
    ),
    (
        "hull-term-added", "(H − U)/H is added instead of subtracted.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) + s(h - u, h))},
    ),
    (
        "hull-term-halved", "Only half of (H − U)/H is subtracted.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) - s(h - u, h) / 2)},
    ),
    (
        "hull-term-is-the-share-of-the-union", "U/H is subtracted instead of 1 − U/H.", _BY_HULL,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(i, u) - s(u, h))},
    ),
    (
        "hull-of-one-side", "The enclosing box is squared by its width.", _BY_HULL,
        {"enclosing": lambda book, a, b: hull_sides(a, b)[..., 0] ** 2},
    ),
    (
        "hull-is-the-sum-of-the-areas", "The sum of both areas is taken for the enclosing box.", _BY_HULL,
        {"enclosing": lambda book, a, b: book.area(a) + book.area(b)},
    ),
    ("distance-iou", "Distance IoU: the distance of the centres instead of the enclosing term.", _BY_HULL,
     {"giou": of_corners(_diou)}),
    ("complete-iou", "Complete IoU: distance and aspect ratio instead of the enclosing term.", _BY_HULL,
     {"giou": of_corners(_ciou)}),
    (
        "intersection-clamped-after-the-product", "The product, not each side of the intersection, is clamped at 0.",
        _OVERLAP, {"intersection": lambda book, a, b: _sides(a, b).prod(-1).clamp(min=0)},
    ),
    (
        "intersection-without-sign", "The intersection is the absolute value of the product of its sides.",
        _OVERLAP, {"intersection": lambda book, a, b: _sides(a, b).prod(-1).abs()},
    ),
    (
        "intersection-from-the-smaller-corner", "The intersection begins at the smaller low corner.",
        _OVERLAP, {"intersection": _from_the_smaller},
    ),
    (
        "union-adds-the-intersection", "The intersection is added to the areas instead of subtracted.", _BY_UNION,
        {"union": lambda book, a, b, common: book.area(a) + book.area(b) + common},
    ),
    (
        "union-is-the-larger-box", "The larger of the two areas is taken for the union.", _BY_UNION,
        {"union": lambda book, a, b, common: torch.maximum(book.area(a), book.area(b))},
    ),
    (
        "union-is-the-enclosing-box", "The enclosing box is taken for the union.", _BY_UNION,
        {"union": lambda book, a, b, common: book.enclosing(a, b)},
    ),
    (
        "intersection-over-the-target", "The intersection is divided by the target's area instead of the union.",
        _BY_UNION, {"giou": of_areas(lambda i, u, h, a, b, s: s(i, b) - s(h - u, h))},
    ),
    (
        "union-of-the-target-twice", "The union adds the target's area twice and leaves the prediction's out.",
        _BY_UNION, {"union": lambda book, a, b, common: 2 * book.area(b) - common},
    ),
    (
        "dice-instead-of-iou", "2·I/(|A| + |B|) instead of I/U.", _BY_UNION,
        {"giou": of_areas(lambda i, u, h, a, b, s: s(2 * i, a + b) - s(h - u, h))},
    ),
):  # fmt: skip
    known(loss_giou_is_one_minus_giou_of_the_pair, name, sentence, fix=fix, **formulas)


known(
    corners_are_half_a_side_from_the_centre, "hull-from-centres-and-sides",
    "The enclosing box is the distance of the centres with the larger sides added.", fix=_BY_HULL,
    enclosing=_hull_of_centres,
)  # fmt: skip


def _epsilon(eps: float, hull: float) -> Callable[..., Tensor]:
    return of_areas(lambda i, u, h, a, b, s: i / (u + eps) - (h - u) / (h + hull))


for digits, profiles in ((2, EVERY), (4, EVERY), (5, EVERY), (6, EXACT), (7, EXACT)):
    known(
        identical_boxes_have_loss_giou_zero, f"giou-with-1e-{digits}-in-its-denominators",
        f"1e-{digits} is added to both denominators of the GIoU.",
        fix="leave the denominators as they are, or declare giou_eps", profiles=profiles,
        giou=_epsilon(10.0**-digits, 10.0**-digits),
    )  # fmt: skip
    known(
        identical_boxes_have_loss_giou_zero, f"iou-with-1e-{digits}-in-its-denominator",
        f"1e-{digits} is added to the union alone, not to the enclosing box.",
        fix="leave the denominators as they are, or declare giou_eps", profiles=profiles,
        giou=of_areas(lambda i, u, h, a, b, s, e=10.0**-digits: i / (u + e) - s(h - u, h)),
    )  # fmt: skip

for name, sentence, formula in (
    ("prediction-clipped-to-the-image", "Predicted corners alone are clipped to the image.", {"pred": True}),
    ("target-clipped-to-the-image", "Target corners alone are clipped to the image.", {"target": True}),
):
    known(
        boxes_outside_the_image_are_not_clipped, name, sentence, fix="leave boxes as they are",
        giou=of_corners(giou_of, **{k: lambda book, x: book.corners(x).clamp(0, 1) for k in formula}),
    )  # fmt: skip


def _no_sides(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:].detach()], -1)


def _no_centres(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2].detach(), boxes[..., 2:]], -1)


for name, sentence, around in (
    ("union-without-gradient", "The union is a constant for the gradient.",
     {"union": lambda before, book, *a: before(*a).detach()}),
    ("enclosing-box-without-gradient", "The enclosing box is a constant for the gradient.",
     {"enclosing": lambda before, book, *a: before(*a).detach()}),
    ("intersection-without-gradient", "The intersection is a constant for the gradient.",
     {"intersection": lambda before, book, *a: before(*a).detach()}),
    ("giou-without-gradient-of-centres", "The GIoU's gradient does not reach the centres.",
     {"loss_giou": lambda before, book, pred, *a: before(_no_centres(pred), *a)}),
    ("l1-without-gradient-of-sides", "The L1 loss's gradient does not reach width and height.",
     {"loss_bbox": lambda before, book, pred, *a: before(_no_sides(pred), *a)}),
    ("l1-without-gradient-of-centres", "The L1 loss's gradient does not reach the centres.",
     {"loss_bbox": lambda before, book, pred, *a: before(_no_centres(pred), *a)}),
    ("giou-loss-without-gradient", "The GIoU loss is computed from detached boxes: its value is right, its gradient 0.",
     {"loss_giou": lambda before, book, pred, *a: before(pred.detach(), *a)}),
    ("l1-loss-without-gradient", "The L1 loss is computed from detached boxes: its value is right, its gradient 0.",
     {"loss_bbox": lambda before, book, pred, *a: before(pred.detach(), *a)}),
):  # fmt: skip
    known(boxes_get_the_textbook_gradient, name, sentence, fix="do not detach what is trained", around=around)

# --- the two losses ---


def _distance(of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    return {"loss_bbox": lambda book, pred, wanted, nb: of(pred, wanted).sum() / nb}


def _sized(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:].clamp(min=0).sqrt()], -1)


def _count(pred: Tensor) -> int:
    return max(len(pred), 1)


_L1 = "Σ |Δ| over the four coordinates and all pairs, divided by nb once"

for name, sentence, formulas in (
    ("l1-mean-of-the-four", "The mean of the four differences: a quarter of the loss.",
     _distance(lambda a, b: (a - b).abs().mean(-1))),
    ("euclidean-distance", "The Euclidean norm of the difference.",
     _distance(lambda a, b: ((a - b).square().sum(-1) + 1e-24).sqrt())),
    ("squared-differences", "Squared differences: L2 instead of L1.", _distance(lambda a, b: (a - b).square())),
    ("mean-squared-error", "F.mse_loss with its default mean, divided by nothing.",
     {"loss_bbox": lambda book, a, b, nb: (a - b).square().sum() / (4 * _count(a))}),
    ("smooth-l1", "Smooth L1 with β = 1, F.smooth_l1_loss's default.",
     _distance(lambda a, b: F.smooth_l1_loss(a, b, reduction="none"))),
    ("smooth-l1-of-a-ninth", "Smooth L1 with β = 1/9, as two-stage detectors have it.",
     _distance(lambda a, b: F.smooth_l1_loss(a, b, reduction="none", beta=1 / 9))),
    ("smooth-l1-of-a-tenth", "Smooth L1 with β = 0.1.",
     _distance(lambda a, b: F.smooth_l1_loss(a, b, reduction="none", beta=0.1))),
    ("smooth-l1-of-a-hundredth", "Smooth L1 with β = 0.01.",
     _distance(lambda a, b: F.smooth_l1_loss(a, b, reduction="none", beta=0.01))),
    ("l1-of-centres-only", "Only the centres are compared.", _distance(lambda a, b: (a - b)[:, :2].abs())),
    ("l1-of-sides-only", "Only width and height are compared.", _distance(lambda a, b: (a - b)[:, 2:].abs())),
    ("l1-without-cx", "cx is not compared: the last three coordinates alone.",
     _distance(lambda a, b: (a - b)[:, 1:].abs())),
    ("l1-without-cy", "cy is not compared.", _distance(lambda a, b: (a - b)[:, [0, 2, 3]].abs())),
    ("l1-without-the-width", "The width is not compared.", _distance(lambda a, b: (a - b)[:, [0, 1, 3]].abs())),
    ("l1-without-the-height", "The height is not compared: the first three coordinates alone.",
     _distance(lambda a, b: (a - b)[:, :3].abs())),
    ("l1-of-cx-and-width", "Only cx and the width are compared.", _distance(lambda a, b: (a - b)[:, ::2].abs())),
    ("l1-of-cy-and-height", "Only cy and the height are compared.", _distance(lambda a, b: (a - b)[:, 1::2].abs())),
    ("l1-of-cx-alone", "Only the first coordinate is compared.", _distance(lambda a, b: (a - b)[:, :1].abs())),
    ("l1-of-the-height-alone", "Only the last coordinate is compared.",
     _distance(lambda a, b: (a - b)[:, 3:].abs())),
    ("l1-with-sides-exchanged", "The target's width and height change places in the L1 loss.",
     _distance(lambda a, b: (a - b[:, [0, 1, 3, 2]]).abs())),
    ("l1-with-centre-exchanged", "The target's cx and cy change places in the L1 loss.",
     _distance(lambda a, b: (a - b[:, [1, 0, 2, 3]]).abs())),
    ("l1-of-corners-to-the-target-as-it-is", "The corners of the prediction are compared with the target as it is.",
     {"loss_bbox": lambda book, a, b, nb: (book.corners(a) - b).abs().sum() / nb}),
    ("l1-of-the-prediction-as-it-is-to-corners", "The prediction as it is is compared with the target's corners.",
     {"loss_bbox": lambda book, a, b, nb: (a - book.corners(b)).abs().sum() / nb}),
    ("l1-of-the-smallest-difference", "The smallest of the four differences instead of their sum.",
     _distance(lambda a, b: (a - b).abs().amin(-1))),
    ("l1-of-the-sums", "The difference of the sums of the coordinates.",
     _distance(lambda a, b: (a - b).sum(-1).abs())),
    ("l1-of-the-largest-difference", "The largest of the four differences instead of their sum.",
     _distance(lambda a, b: (a - b).abs().amax(-1))),
    ("l1-weighted-by-size", "Differences are weighted by 2 − w·h of the target, as in YOLO.",
     _distance(lambda a, b: (a - b).abs() * (2 - b[:, 2:].prod(-1, keepdim=True)))),
    ("l1-relative-to-the-target", "Differences are divided by the target's sides.",
     _distance(lambda a, b: (a - b).abs() / b[:, 2:].repeat(1, 2))),
    ("l1-of-roots-of-sides", "Square roots of the sides are compared, as in YOLO.",
     _distance(lambda a, b: (_sized(a) - _sized(b)).abs())),
    ("l1-averaged-and-divided", "The mean over the pairs is divided by nb besides.",
     {"loss_bbox": lambda book, a, b, nb: (a - b).abs().sum() / _count(a) / nb}),
    ("l1-default-mean-and-divided", "F.l1_loss with its default mean, divided by nb besides.",
     {"loss_bbox": lambda book, a, b, nb: (a - b).abs().sum() / (4 * _count(a)) / nb}),
    ("l1-summed-and-never-divided", "The L1 loss is a sum, divided by nothing.",
     {"loss_bbox": lambda book, a, b, nb: book.l1(a, b).sum()}),
    ("l1-counted-twice", "Every pair's L1 distance is counted twice.",
     {"loss_bbox": lambda book, a, b, nb: 2 * book.l1(a, b).sum() / nb}),
    ("l1-signed", "Differences are summed with their sign.", _distance(lambda a, b: a - b)),
):  # fmt: skip
    known(loss_bbox_is_the_sum_of_l1_over_nb, name, sentence, fix=_L1, **formulas)


def _of_giou(of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"loss_giou": lambda book, pred, wanted, nb: of(book.giou(pred, wanted)).sum() / nb}


for name, sentence, formulas in (
    ("giou-loss-halved", "(1 − GIoU)/2 instead of 1 − GIoU.", _of_giou(lambda g: (1 - g) / 2)),
    ("giou-loss-without-its-one", "−GIoU instead of 1 − GIoU.", _of_giou(lambda g: -g)),
    ("giou-itself-for-a-loss", "The GIoU itself is returned as the loss.", _of_giou(lambda g: g)),
    ("giou-loss-with-a-plus", "1 + GIoU instead of 1 − GIoU.", _of_giou(lambda g: 1 + g)),
    ("giou-squared", "1 − GIoU² instead of 1 − GIoU.", _of_giou(lambda g: 1 - g**2)),
    ("giou-loss-squared", "(1 − GIoU)² instead of 1 − GIoU.", _of_giou(lambda g: (1 - g) ** 2)),
    ("giou-logarithm", "−log((1 + GIoU)/2) instead of 1 − GIoU.", _of_giou(lambda g: -((1 + g) / 2).log())),
    ("giou-loss-counted-twice", "Every pair's GIoU loss is counted twice.", _of_giou(lambda g: 2 * (1 - g))),
    ("giou-averaged-and-divided", "The mean over the pairs is divided by nb besides.",
     {"loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum() / _count(a) / nb}),
    ("giou-summed-and-never-divided", "The GIoU loss is a sum, divided by nothing.",
     {"loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum()}),
    ("giou-of-every-pair-summed", "The whole M × M matrix of GIoUs is summed instead of its diagonal.",
     {"loss_giou": lambda book, a, b, nb: (1 - book.giou(a[:, None], b[None])).sum() / nb}),
):  # fmt: skip
    known(loss_giou_is_the_sum_over_nb, name, sentence, fix="Σ (1 − GIoU) over all pairs, divided by nb", **formulas)

for name, sentence, formulas in (
    ("box-losses-averaged-and-divided", "Both box losses are means over the pairs, divided by nb besides.",
     {"loss_bbox": lambda book, a, b, nb: book.l1(a, b).sum() / _count(a) / nb,
      "loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum() / _count(a) / nb}),
    ("box-losses-averaged-over-pairs", "Both box losses are means over the pairs, whatever nb is.",
     {"loss_bbox": lambda book, a, b, nb: book.l1(a, b).sum() / _count(a),
      "loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum() / _count(a)}),
    ("box-losses-never-divided", "The box losses are sums, divided by nothing.",
     {"loss_bbox": lambda book, a, b, nb: book.l1(a, b).sum(),
      "loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum()}),
    ("box-losses-divided-twice", "The box losses are divided by nb twice.",
     {"loss_bbox": lambda book, a, b, nb: book.l1(a, b).sum() / nb**2,
      "loss_giou": lambda book, a, b, nb: (1 - book.giou(a, b)).sum() / nb**2}),
):  # fmt: skip
    check, profiles = loss_bbox_is_the_sum_of_l1_over_nb, EVERY
    if name != "box-losses-averaged-and-divided":  # DETR's class loss has no nb, so there it is nb that is wrong
        profiles = EVERY - DETR
    if name == "box-losses-averaged-over-pairs":
        check = nb_counts_targets_not_matches
    known(check, name, sentence, fix="a sum over pairs, divided by nb once", profiles=profiles, **formulas)


known(
    nb_counts_targets_not_matches, "l1-averaged-over-pairs",
    "The L1 loss is the mean over the pairs, divided by nothing else: matches for nb.", fix=_L1,
    loss_bbox=lambda book, a, b, nb: (a - b).abs().sum() / _count(a),
)  # fmt: skip
known(
    nb_of_loss_giou_counts_targets_not_matches, "giou-averaged-over-pairs",
    "(1 − GIoU).mean() over the pairs instead of the sum over nb.", fix="Σ (1 − GIoU) over all pairs, divided by nb",
    loss_giou=lambda book, a, b, nb: (1 - book.giou(a, b)).sum() / _count(a),
)  # fmt: skip


def _least(side: float, both: bool) -> Callable[..., Tensor]:
    def wide(boxes: Tensor) -> Tensor:
        return torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=side)], -1)

    return lambda before, book, a, b: before(wide(a) if both else a, wide(b))


for side, word in ((5e-3, "0.005"), (3e-3, "0.003"), (2e-3, "0.002")):
    known(
        loss_giou_is_precise, f"sides-of-at-least-{word.replace('.', '-')}",
        f"Sides below {word} of the image are widened to it in the GIoU.", fix="leave small boxes as they are",
        around={"giou": _least(side, True)},
    )  # fmt: skip
