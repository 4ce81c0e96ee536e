"""Mistakes of box geometry and of the two box losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .port import ALL, Port, Registry

MISTAKES = Registry(globals())
add = MISTAKES.add


def stack(*columns):
    return torch.stack(columns, -1)


def sides(boxes):
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


# -- corners -------------------------------------------------------------------------------------------------
def full_sides(s, b):
    cx, cy, w, h = b.unbind(-1)
    return stack(cx - w, cy - h, cx + w, cy + h)


def top_left(s, b):
    x, y, w, h = b.unbind(-1)
    return stack(x, y, x + w, y + h)


def sides_swapped(s, b):
    cx, cy, w, h = b.unbind(-1)
    return stack(cx - h / 2, cy - w / 2, cx + h / 2, cy + w / 2)


def only_low_corner_halved(s, b):
    cx, cy, w, h = b.unbind(-1)
    return stack(cx - w / 2, cy - h / 2, cx + w, cy + h)


def cy_from_cx(s, b):
    cx, _, w, h = b.unbind(-1)
    return stack(cx - w / 2, cx - h / 2, cx + w / 2, cx + h / 2)


def low_corner_for_centre(s, b):
    return Port.corners(s, torch.cat([b[..., :2] + b[..., 2:] / 2, b[..., 2:]], -1))


def ordered(b):
    return torch.cat([torch.minimum(b[..., :2], b[..., 2:]), torch.maximum(b[..., :2], b[..., 2:])], -1)


add("corners-full-sides", ALL, "BOX-1", "Corners are centre ∓ w instead of ∓ w/2.", corners=full_sides)
add("corners-top-left", "F", "BOX-1", "Both boxes are read as (x, y, w, h) from the top left.", corners=top_left)
add("target-top-left", ALL, "BOX-1", "Target boxes alone are read as COCO's (x, y, w, h).", target_corners=top_left)
add("corners-sides-swapped", "D", "BOX-1", "Width and height are swapped.", corners=sides_swapped)
add("corners-half-low", "G", "BOX-1", "Only the low corner uses half the side.", corners=only_low_corner_halved)
add("corners-cy-from-cx", "F", "BOX-1", "The vertical corners use cx.", corners=cy_from_cx)
add("giou-on-cxcywh", "DG", "BOX-1 BOX-2", "GIoU of (cx, cy, w, h) without conversion.", corners=lambda s, b: b)
add(
    "target-as-xyxy",
    "F",
    "BOX-1",
    "Target boxes are taken for corners already.",
    target_corners=lambda s, b: ordered(b),
)
add(
    "target-centred-twice",
    "D",
    "BOX-1",
    "Half the size is added to the target's centre first.",
    target_corners=low_corner_for_centre,
)


# -- GIoU ----------------------------------------------------------------------------------------------------
def distance_iou(s, a, b):
    inter = s.overlap(a, b)
    iou = s.ratio(inter, s.area(a) + s.area(b) - inter)
    gap = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    return iou - s.ratio(gap, (high - low).square().sum(-1))


def complete_iou(s, a, b):
    inter = s.overlap(a, b)
    iou = s.ratio(inter, s.area(a) + s.area(b) - inter)
    (aw, ah), (bw, bh) = sides(a), sides(b)
    v = 4 / math.pi**2 * (torch.atan2(aw, ah) - torch.atan2(bw, bh)) ** 2
    return distance_iou(s, a, b) - v * (v / (1 - iou + v + 1e-7)).detach()


def unclamped_overlap(s, a, b):
    side = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return side[..., 0] * side[..., 1]


def product_clamped(s, a, b):
    return unclamped_overlap(s, a, b).clamp(min=0)


def absolute_overlap(s, a, b):
    return unclamped_overlap(s, a, b).abs()


def overlap_min_max(s, a, b):
    side = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    return side[..., 0] * side[..., 1]


def union_with_overlap(s, a, b):
    return s.combine(s.overlap(a, b), s.area(a) + s.area(b), s.hull(a, b))


def union_of_max(s, a, b):
    inter = s.overlap(a, b)
    return s.combine(inter, torch.maximum(s.area(a), s.area(b)), s.hull(a, b))


def over_own_area(s, a, b):
    inter = s.overlap(a, b)
    u = s.area(a) + s.area(b) - inter
    h = s.hull(a, b)
    return s.ratio(inter, s.area(a) + 0 * u) - s.ratio(h - u, h)


def over_target_area(s, a, b):
    inter = s.overlap(a, b)
    u = s.area(a) + s.area(b) - inter
    h = s.hull(a, b)
    return s.ratio(inter, s.area(b) + 0 * u) - s.ratio(h - u, h)


def hull_of_centres(s, a, b):
    side = ((a[..., 2:] + a[..., :2]) - (b[..., 2:] + b[..., :2])).abs() / 2
    side = side + torch.maximum(a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])
    return side[..., 0] * side[..., 1]


def hull_width_only(s, a, b):
    side = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return side[..., 0] * side[..., 0]


def with_eps(eps):
    return lambda s, i, u, h: i / (u + eps) - (h - u) / (h + eps)


def pixel_area(s, a):
    w, h = sides(a)
    return (w + 1e-3) * (h + 1e-3)


def clip_prediction(s, p, t):
    return s.giou(s.corners(p).clamp(0, 1), s.target_corners(t))


def clip_both(s, b):
    return Port.corners(s, b).clamp(0, 1)


def least_side(least):
    return lambda s, b: Port.corners(s, torch.cat([b[..., :2], b[..., 2:].clamp(min=least)], -1))


add("giou-is-iou", ALL, "BOX-2 BOX-5", "IoU without the enclosing box.", combine=lambda s, i, u, h: s.ratio(i, u))
add("giou-is-diou", "DF", "BOX-2", "Distance IoU.", giou=distance_iou)
add("giou-is-ciou", "G", "BOX-2", "Complete IoU.", giou=complete_iou)
add("overlap-unclamped", ALL, "BOX-2 BOX-5", "Two negative sides multiply to an overlap.", overlap=unclamped_overlap)
add("overlap-product-clamped", "F", "BOX-2 BOX-5", "The product, not the sides, is clamped.", overlap=product_clamped)
add("overlap-absolute", "D", "BOX-2 BOX-5", "The overlap is |w·h|.", overlap=absolute_overlap)
add("overlap-from-min", "G", "BOX-2", "The overlap starts at the smaller low corner.", overlap=overlap_min_max)
add("union-keeps-overlap", ALL, "BOX-2 BOX-4", "Union = A + B, the overlap counted twice.", giou=union_with_overlap)
add("union-is-larger", "D", "BOX-2", "Union = the larger of the two areas.", giou=union_of_max)
add("iou-over-prediction", "F", "BOX-2 BOX-6", "The overlap is divided by the prediction's area.", giou=over_own_area)
add("iou-over-target", "G", "BOX-2 BOX-6", "The overlap is divided by the target's area.", giou=over_target_area)
add(
    "hull-over-union",
    ALL,
    "BOX-2 BOX-3",
    "(H − U)/U instead of (H − U)/H.",
    combine=lambda s, i, u, h: s.ratio(i, u) - s.ratio(h - u, u),
)
add("hull-undivided", "F", "BOX-2 BOX-6", "H − U is not divided.", combine=lambda s, i, u, h: s.ratio(i, u) - (h - u))
add(
    "hull-minus-overlap",
    "G",
    "BOX-2 BOX-3",
    "(H − I)/H instead of (H − U)/H.",
    combine=lambda s, i, u, h: s.ratio(i, u) - s.ratio(h - i, h),
)
add("hull-sign", "D", "BOX-2 BOX-3 BOX-5", "+(H − U)/H.", combine=lambda s, i, u, h: s.ratio(i, u) + s.ratio(h - u, h))
add(
    "hull-half",
    "F",
    "BOX-2",
    "Half the enclosing term.",
    combine=lambda s, i, u, h: s.ratio(i, u) - s.ratio(h - u, h) / 2,
)
add("hull-squared-width", "D", "BOX-2", "The enclosing box is squared by its width.", hull=hull_width_only)
add(
    "hull-of-centres",
    "G",
    "BOX-2",
    "The enclosing box is spanned from the centres with the larger sides.",
    hull=hull_of_centres,
)
add(
    "giou-floored",
    ALL,
    "BOX-5 BOX-3",
    "GIoU is clamped at 0 from below.",
    combine=lambda s, i, u, h: (s.ratio(i, u) - s.ratio(h - u, h)).clamp(min=0),
)
add("giou-eps-1e-3", "DFG", "BOX-2 BOX-4", "1e-3 added to both denominators.", combine=with_eps(1e-3))
add("giou-eps-1e-5", "DF", "BOX-2 BOX-4", "1e-5 added to both denominators.", combine=with_eps(1e-5))
add(
    "giou-eps-1e-6", "F", "BOX-4", "1e-6 added to both denominators where the profile is exact.", combine=with_eps(1e-6)
)
add(
    "giou-eps-below-zero",
    "G",
    "BOX-4",
    "1e-4 added to the IoU's denominator only.",
    combine=lambda s, i, u, h: i / (u + 1e-4) - s.ratio(h - u, h),
)
add("area-pixel-plus-one", "DF", "BOX-2 BOX-4 BOX-6", "Areas use the inclusive-pixel + 1, scaled.", area=pixel_area)
add(
    "clip-prediction",
    ALL,
    "BOX-7",
    "Predicted corners are clipped to the image in loss_giou.",
    pair_giou=clip_prediction,
)
add("clip-both", "F", "BOX-7", "All corners are clipped to the image.", corners=clip_both)
add("clip-target", "DG", "BOX-7", "Target corners are clipped to the image.", target_corners=clip_both)
add("side-at-least-1e-2", "DG", "BOX-2 NUM-1", "Sides below 1e-2 are widened for GIoU.", corners=least_side(1e-2))
add("side-at-least-3e-3", "F", "BOX-2 NUM-1", "Sides below 3e-3 are widened for GIoU.", corners=least_side(3e-3))
add(
    "target-side-at-least",
    "G",
    "BOX-4",
    "Target sides below 5e-3 are widened for GIoU.",
    target_corners=least_side(5e-3),
)
add(
    "zero-area-nan",
    "DG",
    "BOX-8",
    "Coincident boxes without area divide 0 by 0.",
    combine=lambda s, i, u, h: i / u - (h - u) / h,
)
add(
    "hull-detached",
    "F",
    "BOX-5 GRAD-1",
    "The enclosing box is a constant for the gradient.",
    hull=lambda s, a, b: Port.hull(s, a, b).detach(),
)
add(
    "union-detached",
    "G",
    "GRAD-1",
    "The union is a constant for the gradient.",
    combine=lambda s, i, u, h: Port.combine(s, i, u.detach(), h),
)
add(
    "size-detached-in-giou",
    "D",
    "GRAD-1",
    "GIoU sends no gradient to width and height.",
    pair_giou=lambda s, p, t: Port.pair_giou(s, torch.cat([p[:, :2], p[:, 2:].detach()], 1), t),
)


# -- the two box losses --------------------------------------------------------------------------------------
def as_loss(distance):
    return lambda s, p, t: distance(p, t)


add(
    "l1-mean-of-four",
    ALL,
    "NORM-1",
    "The mean of the four differences.",
    pair_l1=as_loss(lambda p, t: (p - t).abs().mean(-1)),
)
add(
    "l1-default-mean",
    ALL,
    "NORM-1 NORM-5",
    "F.l1_loss with its default mean over pairs and coordinates, no divisor.",
    sum_l1=lambda s, x: x.mean() / 4 if x.numel() else x.sum(),
    box_divisor=lambda s, nb, i: 1.0,
)
add(
    "box-losses-pair-mean",
    "DF",
    "NORM-1",
    "Both box losses are means over pairs, then divided by nb.",
    sum_l1=lambda s, x: x.sum() / max(len(x), 1),
    sum_giou=lambda s, x: (1 - x).sum() / max(len(x), 1),
)
add(
    "giou-pair-mean",
    "FG",
    "NORM-1",
    "(1 − GIoU).mean() instead of the sum over nb.",
    sum_giou=lambda s, x: (1 - x).sum() / max(len(x), 1),
)
add(
    "giou-mean-not-over-nb",
    "D",
    "NORM-1",
    "loss_giou is a sum, divided by nothing.",
    loss_boxes=lambda s, layer, targets, i, nb: (lambda part: part | {"loss_giou": part["loss_giou"] * nb})(
        Port.loss_boxes(s, layer, targets, i, nb)
    ),
)
add(
    "l2-norm",
    "DG",
    "NORM-1",
    "The Euclidean norm of the difference.",
    pair_l1=as_loss(lambda p, t: ((p - t).square().sum(-1) + 1e-24).sqrt()),
)
add("l2-squared", "F", "NORM-1", "Squared differences.", pair_l1=as_loss(lambda p, t: (p - t).square().sum(-1)))
add(
    "smooth-l1",
    "DF",
    "NORM-1",
    "Smooth L1 with β = 1.",
    pair_l1=as_loss(lambda p, t: F.smooth_l1_loss(p, t, reduction="none").sum(-1)),
)
add(
    "smooth-l1-narrow",
    "G",
    "NORM-1",
    "Smooth L1 with β = 0.01.",
    pair_l1=as_loss(lambda p, t: F.smooth_l1_loss(p, t, reduction="none", beta=0.01).sum(-1)),
)
add(
    "l1-on-corners",
    ALL,
    "NORM-1",
    "L1 of the corners in loss_bbox.",
    pair_l1=lambda s, p, t: (s.corners(p) - s.corners(t)).abs().sum(-1),
)
add(
    "l1-centres-only",
    "F",
    "NORM-1",
    "loss_bbox compares the centres alone.",
    pair_l1=as_loss(lambda p, t: (p - t)[:, :2].abs().sum(-1)),
)
add(
    "l1-scaled-by-size",
    "G",
    "NORM-1",
    "Differences are weighted by 2 − w·h of the target.",
    pair_l1=as_loss(lambda p, t: (2 - t[:, 2] * t[:, 3]) * (p - t).abs().sum(-1)),
)
add(
    "l1-root-of-sides",
    "D",
    "NORM-1",
    "Roots of the sides are compared, as in YOLO.",
    pair_l1=as_loss(lambda p, t: (p - t)[:, :2].abs().sum(-1) + (p[:, 2:].sqrt() - t[:, 2:].sqrt()).abs().sum(-1)),
)
add(
    "l1-eps-under-root",
    "F",
    "NORM-1 NUM-1",
    "|d| as √(d² + 1e-4).",
    pair_l1=as_loss(lambda p, t: ((p - t).square() + 1e-4).sqrt().sum(-1)),
)
add(
    "l1-largest-coordinate",
    "G",
    "NORM-1",
    "The largest of the four differences.",
    pair_l1=as_loss(lambda p, t: (p - t).abs().amax(-1)),
)
add("giou-half", "DG", "NORM-1", "(1 − GIoU)/2.", sum_giou=lambda s, x: ((1 - x) / 2).sum())
add("giou-negative", "F", "NORM-1 BOX-4", "−GIoU, without the 1.", sum_giou=lambda s, x: (-x).sum())
add("giou-squared", "D", "NORM-1", "1 − GIoU².", sum_giou=lambda s, x: (1 - x * x).sum())
add(
    "giou-all-pairs",
    "DF",
    "NORM-1",
    "GIoU of every matched box with every target, not of the pairs.",
    pair_giou=lambda s, p, t: (
        s.giou(s.corners(p)[:, None], s.corners(t)[None]).mean(-1) if len(p) else Port.pair_giou(s, p, t)
    ),
)
add("giou-log", "G", "NORM-1", "−log((1 + GIoU)/2).", sum_giou=lambda s, x: -((1 + x) / 2 + 1e-6).log().sum())
add(
    "boxes-of-giou-detached",
    "G",
    "GRAD-1",
    "loss_giou sends no gradient to the boxes.",
    pair_giou=lambda s, p, t: Port.pair_giou(s, p.detach(), t) + 0 * p.sum(-1),
)
add(
    "l1-detached-sizes",
    "F",
    "GRAD-1",
    "loss_bbox sends no gradient to width and height.",
    pair_l1=lambda s, p, t: Port.pair_l1(s, torch.cat([p[:, :2], p[:, 2:].detach()], 1), t),
)
add("box-loss-counts-both-ways", "D", "NORM-1", "Each pair's L1 is counted twice.", sum_l1=lambda s, x: 2 * x.sum())
