"""Known mistakes of the matching cost, beside those in the chapter COST: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.costs import (
    giou_lowers_the_cost,
    the_class_cost_is_minus_the_softmax,
    the_class_cost_is_the_focal_difference,
    the_class_cost_is_the_mean_over_the_tokens_of_the_class,
    the_cost_is_the_weighted_sum_of_the_three,
    the_l1_cost_is_the_sum_of_four_differences,
)
from detr_conformance.contract.known_boxes import GUARDS, as_they_are, of_corners
from detr_conformance.contract.matching import order_does_not_matter
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, known
from detr_reference.options import options_of
from detr_reference.textbook import Textbook, minus_log_sigmoid

Target = Mapping[str, Tensor]


def _weighted(weights: Callable[[Any], tuple[float, float, float]]) -> Callable[..., Tensor]:
    """A cost whose class, L1 and GIoU terms have these weights, from the options."""

    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Target) -> Tensor:
        a, b, c = weights(book.o)
        pred, wanted = boxes[:, None], target["boxes"][None]
        total: Tensor = a * book.class_cost(x, target) + b * book.l1(pred, wanted) - c * book.giou(pred, wanted)
        return total

    return cost


def _defaults(name: str) -> Callable[[Any], float]:
    """A weight as the profile has it, whatever is configured."""
    by_loss = {"softmax": "detr", "focal": "deformable-detr", "token": "grounding-dino"}
    return lambda o: float(getattr(options_of(by_loss[o.class_loss]), name))


CLASS, BBOX, GIOU = (_defaults(f"set_cost_{name}") for name in ("class", "bbox", "giou"))
_OWN = "each of the three weights scales its own term"

for name, sentence, weights in (
    ("cost-weights-of-l1-and-giou-exchanged", "The weights of L1 and GIoU change places.",
     lambda o: (o.set_cost_class, o.set_cost_giou, o.set_cost_bbox)),
    ("cost-weights-of-class-and-l1-exchanged", "The weights of the class and of L1 change places.",
     lambda o: (o.set_cost_bbox, o.set_cost_class, o.set_cost_giou)),
    ("cost-weights-of-class-and-giou-exchanged", "The weights of the class and of GIoU change places.",
     lambda o: (o.set_cost_giou, o.set_cost_bbox, o.set_cost_class)),
    ("cost-weights-are-all-one", "All three terms weigh 1, whatever is configured.", lambda o: (1, 1, 1)),
    ("cost-weights-are-fixed", "The three weights are the family's, whatever is configured.",
     lambda o: (CLASS(o), BBOX(o), GIOU(o))),
    ("class-cost-weighs-one", "The class term weighs 1, whatever is configured.",
     lambda o: (1, o.set_cost_bbox, o.set_cost_giou)),
    ("class-cost-weighs-two", "The class term weighs 2, whatever is configured.",
     lambda o: (2, o.set_cost_bbox, o.set_cost_giou)),
    ("l1-cost-weighs-five", "The L1 term weighs 5, whatever is configured.",
     lambda o: (o.set_cost_class, 5, o.set_cost_giou)),
    ("l1-cost-weighs-one", "The L1 term weighs 1, whatever is configured.",
     lambda o: (o.set_cost_class, 1, o.set_cost_giou)),
    ("giou-cost-weighs-two", "The GIoU term weighs 2, whatever is configured.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, 2)),
    ("giou-cost-weighs-one", "The GIoU term weighs 1, whatever is configured.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, 1)),
    ("cost-weights-applied-twice", "Every weight is applied twice.",
     lambda o: (o.set_cost_class**2, o.set_cost_bbox**2, o.set_cost_giou**2)),
    ("cost-weight-zero-means-one", "A weight of 0 falls back to 1: `weight or 1`.",
     lambda o: (o.set_cost_class or 1, o.set_cost_bbox or 1, o.set_cost_giou or 1)),
    ("cost-weight-zero-means-the-default", "A weight of 0 falls back to the family's: `weight or default`.",
     lambda o: (o.set_cost_class or CLASS(o), o.set_cost_bbox or BBOX(o), o.set_cost_giou or GIOU(o))),
    ("class-cost-weight-zero-means-one", "A class weight of 0 falls back to 1: `weight or 1`.",
     lambda o: (o.set_cost_class or 1, o.set_cost_bbox, o.set_cost_giou)),
    ("l1-cost-weight-zero-means-one", "An L1 weight of 0 falls back to 1: `weight or 1`.",
     lambda o: (o.set_cost_class, o.set_cost_bbox or 1, o.set_cost_giou)),
    ("giou-cost-weight-zero-means-one", "A GIoU weight of 0 falls back to 1: `weight or 1`.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, o.set_cost_giou or 1)),
    ("cost-of-the-class-alone", "The boxes have no part in the matching cost.", lambda o: (o.set_cost_class, 0, 0)),
    ("cost-of-l1-alone", "The L1 distance alone is the matching cost.", lambda o: (0, o.set_cost_bbox, 0)),
    ("cost-of-giou-alone", "The GIoU alone is the matching cost.", lambda o: (0, 0, o.set_cost_giou)),
    ("l1-takes-the-cost-weight-of-giou", "The L1 term takes the GIoU's weight.",
     lambda o: (o.set_cost_class, o.set_cost_giou, o.set_cost_giou)),
    ("giou-takes-the-cost-weight-of-l1", "The GIoU term takes the L1 distance's weight.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, o.set_cost_bbox)),
    ("class-takes-the-cost-weight-of-l1", "The class term takes the L1 distance's weight.",
     lambda o: (o.set_cost_bbox, o.set_cost_bbox, o.set_cost_giou)),
    ("class-takes-the-cost-weight-of-giou", "The class term takes the GIoU's weight.",
     lambda o: (o.set_cost_giou, o.set_cost_bbox, o.set_cost_giou)),
    ("l1-takes-the-cost-weight-of-the-class", "The L1 term takes the class's weight.",
     lambda o: (o.set_cost_class, o.set_cost_class, o.set_cost_giou)),
    ("giou-takes-the-cost-weight-of-the-class", "The GIoU term takes the class's weight.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, o.set_cost_class)),
    ("class-weighed-by-its-loss-weight", "The class term is weighted with the loss weight.",
     lambda o: (o.ce_loss_coef, o.set_cost_bbox, o.set_cost_giou)),
    ("l1-weighed-by-its-loss-weight", "The L1 term is weighted with the loss weight.",
     lambda o: (o.set_cost_class, o.bbox_loss_coef, o.set_cost_giou)),
    ("giou-weighed-by-its-loss-weight", "The GIoU term is weighted with the loss weight.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, o.giou_loss_coef)),
    ("cost-without-the-class", "The matching cost leaves the class out.",
     lambda o: (0, o.set_cost_bbox, o.set_cost_giou)),
    ("cost-without-giou", "The matching cost leaves the GIoU out.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, 0)),
    ("l1-lowers-the-cost", "The L1 distance enters the cost with the wrong sign: distance is rewarded.",
     lambda o: (o.set_cost_class, -o.set_cost_bbox, o.set_cost_giou)),
    ("class-raises-the-cost", "The class enters the cost with the wrong sign: the right class is avoided.",
     lambda o: (-o.set_cost_class, o.set_cost_bbox, o.set_cost_giou)),
    ("l1-cost-counts-half", "The L1 term counts half.",
     lambda o: (o.set_cost_class, o.set_cost_bbox / 2, o.set_cost_giou)),
    ("l1-cost-counts-twice", "The L1 term counts twice.",
     lambda o: (o.set_cost_class, 2 * o.set_cost_bbox, o.set_cost_giou)),
    ("giou-cost-counts-half", "The GIoU term counts half.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, o.set_cost_giou / 2)),
    ("class-cost-counts-half", "The class term counts half.",
     lambda o: (o.set_cost_class / 2, o.set_cost_bbox, o.set_cost_giou)),
    ("class-cost-counts-twice", "The class term counts twice.",
     lambda o: (2 * o.set_cost_class, o.set_cost_bbox, o.set_cost_giou)),
):  # fmt: skip
    check = the_cost_is_the_weighted_sum_of_the_three
    if "weight-zero" in name:  # shows where that weight is 0
        check = the_l1_cost_is_the_sum_of_four_differences if name.startswith("giou") else giou_lowers_the_cost
    known(check, name, sentence, fix=_OWN, cost=_weighted(weights))


def _with(l1: Callable[..., Tensor] | None = None, giou: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A cost with another distance, or another overlap, of the boxes [Q,1,4] and [1,n,4]."""

    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Target) -> Tensor:
        o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
        distance = l1(book, pred, wanted) if l1 else book.l1(pred, wanted)
        overlap = giou(book, pred, wanted) if giou else book.giou(pred, wanted)
        total: Tensor = (
            o.set_cost_class * book.class_cost(x, target) + o.set_cost_bbox * distance - o.set_cost_giou * overlap
        )
        return total

    return cost


def _iou(book: Textbook, pred: Tensor, wanted: Tensor) -> Tensor:
    a, b = book.corners(pred), book.corners(wanted)
    common = book.intersection(a, b)
    value: Tensor = book.share(common, book.union(a, b, common))
    return value


def _as_corners(book: Textbook, pred: Tensor, wanted: Tensor) -> Tensor:
    common = book.intersection(pred, wanted)
    union, hull = book.union(pred, wanted, common), book.enclosing(pred, wanted)
    value: Tensor = book.share(common, union) - book.share(hull - union, hull)
    return value


for name, sentence, giou in (
    ("iou-in-the-cost", "IoU instead of GIoU in the cost alone.", _iou),
    ("giou-floored-in-the-cost", "A negative GIoU is set to 0 in the cost alone.",
     lambda book, a, b: book.giou(a, b).clamp(min=0)),
    ("giou-in-the-cost-never-converted", "The GIoU of the cost is that of (cx, cy, w, h) taken for corners.",
     _as_corners),
    ("giou-in-the-cost-without-sign", "The cost takes the absolute value of the GIoU.",
     lambda book, a, b: book.giou(a, b).abs()),
    ("giou-squared-in-the-cost", "The cost takes GIoU².", lambda book, a, b: book.giou(a, b).square()),
):  # fmt: skip
    known(giou_lowers_the_cost, name, sentence, fix="subtract the GIoU of the corners", cost=_with(giou=giou))

for guard, (how, combine) in GUARDS.items():
    known(
        giou_lowers_the_cost, f"giou-in-the-cost-never-converted-{guard}",
        f"The GIoU of the cost is that of (cx, cy, w, h) taken for corners, {how}.",
        fix="subtract the GIoU of the corners", cost=_with(giou=of_corners(combine, as_they_are, as_they_are)),
    )  # fmt: skip

for of, whose, sides in (("target", "Target boxes", ("target",)), ("prediction", "Predicted boxes", ("pred",))):
    known(
        giou_lowers_the_cost, f"giou-in-the-cost-never-converted-of-the-{of}",
        f"{whose} are taken for corners already in the GIoU of the cost.", fix="subtract the GIoU of the corners",
        cost=_with(giou=of_corners(_as_corners, **dict.fromkeys(sides, as_they_are))),
    )  # fmt: skip


def _top_left(book: Textbook, boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def _a_side_away(book: Textbook, boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:], boxes[..., :2] + boxes[..., 2:]], -1)


def _turned(book: Textbook, boxes: Tensor) -> Tensor:
    turned: Tensor = book.corners(boxes[..., [0, 1, 3, 2]])
    return turned


for whom, whose, sides in (
    ("", "Boxes", ("pred", "target")),
    ("-of-the-target", "Target boxes", ("target",)),
    ("-of-the-prediction", "Predicted boxes", ("pred",)),
):
    for name, sentence, corners in (
        ("giou-in-the-cost-from-the-top-left", "are read from the top left", _top_left),
        ("giou-in-the-cost-a-whole-side-from-the-centre", "have corners cx ∓ w, cy ∓ h", _a_side_away),
        ("giou-in-the-cost-with-sides-exchanged", "are read as (cx, cy, h, w)", _turned),
    ):
        known(
            giou_lowers_the_cost, name + whom, f"{whose} {sentence} in the GIoU of the cost alone.",
            fix="subtract the GIoU of the corners",
            cost=_with(giou=of_corners(_as_corners, **dict.fromkeys(sides, corners))),
        )  # fmt: skip

for name, sentence, l1 in (
    ("squared-differences-in-the-cost", "Squared differences in the cost.",
     lambda book, a, b: (a - b).square().sum(-1)),
    ("centres-alone-in-the-cost", "The cost compares the centres alone.",
     lambda book, a, b: (a - b)[..., :2].abs().sum(-1)),
    ("sides-alone-in-the-cost", "The cost compares width and height alone.",
     lambda book, a, b: (a - b)[..., 2:].abs().sum(-1)),
    ("cost-without-cx", "The cost compares the last three coordinates alone.",
     lambda book, a, b: (a - b)[..., 1:].abs().sum(-1)),
    ("cost-without-cy", "The cost does not compare cy.", lambda book, a, b: (a - b)[..., [0, 2, 3]].abs().sum(-1)),
    ("cost-without-the-width", "The cost does not compare the width.",
     lambda book, a, b: (a - b)[..., [0, 1, 3]].abs().sum(-1)),
    ("cost-without-the-height", "The cost compares the first three coordinates alone.",
     lambda book, a, b: (a - b)[..., :3].abs().sum(-1)),
    ("cost-of-cx-and-width", "The cost compares cx and the width alone.",
     lambda book, a, b: (a - b)[..., ::2].abs().sum(-1)),
    ("cost-of-cy-and-height", "The cost compares cy and the height alone.",
     lambda book, a, b: (a - b)[..., 1::2].abs().sum(-1)),
    ("cost-of-cx-alone", "The cost compares the first coordinate alone.",
     lambda book, a, b: (a - b)[..., :1].abs().sum(-1)),
    ("cost-of-the-height-alone", "The cost compares the last coordinate alone.",
     lambda book, a, b: (a - b)[..., 3:].abs().sum(-1)),
    ("l1-of-the-cost-with-sides-exchanged", "The target's width and height change places in the L1 cost.",
     lambda book, a, b: (a - b[..., [0, 1, 3, 2]]).abs().sum(-1)),
    ("l1-of-the-cost-with-centre-exchanged", "The target's cx and cy change places in the L1 cost.",
     lambda book, a, b: (a - b[..., [1, 0, 2, 3]]).abs().sum(-1)),
    ("corners-against-the-target-as-it-is-in-the-cost",
     "The L1 cost compares the prediction's corners with the target as it is.",
     lambda book, a, b: (book.corners(a) - b).abs().sum(-1)),
    ("prediction-as-it-is-against-corners-in-the-cost",
     "The L1 cost compares the prediction as it is with the target's corners.",
     lambda book, a, b: (a - book.corners(b)).abs().sum(-1)),
    ("smallest-difference-in-the-cost", "The smallest of the four differences in the cost.",
     lambda book, a, b: (a - b).abs().amin(-1)),
    ("signed-differences-in-the-cost", "The differences enter the cost with their sign.",
     lambda book, a, b: (a - b).sum(-1)),
    ("difference-of-the-sums-in-the-cost", "The cost compares the sums of the coordinates.",
     lambda book, a, b: (a - b).sum(-1).abs()),
    ("largest-difference-in-the-cost", "The largest of the four differences in the cost.",
     lambda book, a, b: (a - b).abs().amax(-1)),
    ("distance-of-centres-in-the-cost", "The Euclidean distance of the centres in the cost.",
     lambda book, a, b: (a - b)[..., :2].norm(dim=-1)),
    ("smooth-l1-in-the-cost", "Smooth L1 in the cost.",
     lambda book, a, b: F.smooth_l1_loss(*torch.broadcast_tensors(a, b), reduction="none").sum(-1)),
):  # fmt: skip
    known(the_l1_cost_is_the_sum_of_four_differences, name, sentence, fix="cdist of cxcywh with p=1", cost=_with(l1=l1))


for name, sentence, l1 in (
    ("l1-of-the-cost-averaged", "The mean of the four differences in the cost: a quarter of the distance.",
     lambda book, a, b: (a - b).abs().mean(-1)),
    ("l1-of-the-cost-relative-to-the-largest", "The L1 distances of an image are divided by their largest.",
     lambda book, a, b: (a - b).abs().sum(-1) / (a - b).abs().sum(-1).max().clamp(min=1e-6)),
):  # fmt: skip
    known(the_cost_is_the_weighted_sum_of_the_three, name, sentence, fix="cdist of cxcywh with p=1", cost=_with(l1=l1))


# --- the class term ---


def _of_label(table: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda book, x, target: table(x)[:, target["labels"]]


for name, sentence, formula in (
    ("class-cost-is-minus-the-logit", "The class cost is −logit, without a softmax.", _of_label(lambda x: -x)),
    ("class-cost-by-sigmoid", "The class cost is −sigmoid instead of −softmax.", _of_label(lambda x: -x.sigmoid())),
    ("softmax-over-queries", "The softmax of the class cost runs over the queries.",
     _of_label(lambda x: -x.softmax(0))),
    ("class-cost-squared", "The class cost is −p².", _of_label(lambda x: -(x.softmax(-1) ** 2))),
    ("class-cost-by-the-best-channel", "0 where the highest logit is the label's, 1 elsewhere.",
     lambda book, x, target: (x.argmax(-1)[:, None] != target["labels"]).to(x.dtype)),
    ("class-cost-is-the-no-object-probability", "The class cost is the probability of no object, whatever the label.",
     lambda book, x, target: x.softmax(-1)[:, -1:].expand(-1, len(target["labels"]))),
    ("class-cost-of-the-best-class", "The class cost is that of the best class, whatever the label.",
     lambda book, x, target: -x.softmax(-1)[:, :-1].amax(-1, keepdim=True).expand(-1, len(target["labels"]))),
):  # fmt: skip
    known(
        the_class_cost_is_minus_the_softmax, name, sentence, fix="−softmax(x)[label] over all K + 1 channels",
        softmax_cost=formula,
    )  # fmt: skip


def _parts(book: Textbook, x: Tensor) -> tuple[Any, ...]:
    """α, γ, p, 1 − p, −log p and −log(1 − p)."""
    o = book.o
    return o.cost_alpha, o.cost_gamma, x.sigmoid(), (-x).sigmoid(), minus_log_sigmoid(x), minus_log_sigmoid(-x)


def _of_parts(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda book, x: value(*_parts(book, x))


def _with_eps(eps: float) -> Callable[..., Tensor]:
    return _of_parts(
        lambda a, g, p, q, lp, lq: a * q**g * -(p + eps).log() - (1 - a) * p**g * -(q + eps).log()
    )  # fmt: skip


_FOCAL = "α(1−p)^γ(−log p) − (1−α)p^γ(−log(1−p))"

for name, sentence, value in (
    ("class-cost-is-minus-the-probability", "The class cost is −σ(x), DETR's with a sigmoid.",
     lambda a, g, p, q, lp, lq: -p),
    ("class-cost-is-minus-the-focal-logit", "The class cost is −logit, without a focal formula.",
     lambda a, g, p, q, lp, lq: lp - lq),
    ("class-cost-adds-the-negative-part", "The negative part is added instead of subtracted.",
     lambda a, g, p, q, lp, lq: a * q**g * lp + (1 - a) * p**g * lq),
    ("class-cost-is-the-negative-part", "The positive part of the class cost is left out.",
     lambda a, g, p, q, lp, lq: -(1 - a) * p**g * lq),
    ("class-cost-the-wrong-way-round", "The class cost is the negative part less the positive one.",
     lambda a, g, p, q, lp, lq: (1 - a) * p**g * lq - a * q**g * lp),
    ("alpha-on-negatives-in-the-cost", "α and 1 − α change places in the class cost.",
     lambda a, g, p, q, lp, lq: (1 - a) * q**g * lp - a * p**g * lq),
    ("class-cost-without-alpha", "The class cost has no α.", lambda a, g, p, q, lp, lq: q**g * lp - p**g * lq),
    ("class-cost-with-alpha-on-both", "α weighs both parts of the class cost.",
     lambda a, g, p, q, lp, lq: a * (q**g * lp - p**g * lq)),
    ("class-cost-without-focusing", "The class cost has no (1 − p_t)^γ.",
     lambda a, g, p, q, lp, lq: a * lp - (1 - a) * lq),
    ("class-cost-is-cross-entropy", "The class cost is plain −log p.", lambda a, g, p, q, lp, lq: lp),
    ("class-cost-negatives-not-focused", "p^γ is missing in the negative part of the class cost.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - (1 - a) * lq),
    ("class-cost-positives-not-focused", "(1 − p)^γ is missing in the positive part of the class cost.",
     lambda a, g, p, q, lp, lq: a * lp - (1 - a) * p**g * lq),
    ("class-cost-focusing-exchanged", "p^γ and (1 − p)^γ change places in the class cost.",
     lambda a, g, p, q, lp, lq: a * p**g * lp - (1 - a) * q**g * lq),
    ("class-cost-with-one-logarithm", "The negative part of the class cost has −log p as well.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - (1 - a) * p**g * lp),
    ("class-cost-gamma-is-one-less", "γ of the class cost is one less than configured.",
     lambda a, g, p, q, lp, lq: a * q ** max(g - 1, 0) * lp - (1 - a) * p ** max(g - 1, 0) * lq),
    ("class-cost-gamma-is-one-more", "γ of the class cost is one more than configured.",
     lambda a, g, p, q, lp, lq: a * q ** (g + 1) * lp - (1 - a) * p ** (g + 1) * lq),
):  # fmt: skip
    known(
        the_cost_is_the_weighted_sum_of_the_three, name, sentence, fix=_FOCAL, profiles=FOCAL | TEXT,
        focal_difference=_of_parts(value),
    )  # fmt: skip

for digits in (2, 3):
    known(
        the_cost_is_the_weighted_sum_of_the_three, f"class-cost-with-1e-{digits}-in-its-logarithms",
        f"1e-{digits} is added inside the logarithms of the class cost.", fix="add 1e-8 or nothing",
        profiles=FOCAL | TEXT, focal_difference=_with_eps(10.0**-digits),
    )  # fmt: skip

known(
    the_class_cost_is_the_focal_difference, "class-cost-of-any-class",
    "The class cost is that of the query's best class, whatever the label.", fix="pick the column of the label",
    around={"focal_cost": lambda before, book, x, target: before(x.amax(-1, keepdim=True), _zero(target))},
)  # fmt: skip
known(
    the_class_cost_is_the_focal_difference, "softmax-probabilities-in-the-focal-cost",
    "The focal cost is taken of softmax probabilities.", fix="take the sigmoid",
    focal_cost=lambda book, x, target: book.focal_difference(x.softmax(-1).logit())[:, target["labels"]],
)  # fmt: skip


def _zero(target: Target) -> Target:
    return {**target, "labels": torch.zeros_like(target["labels"])}


def _labels(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def cost(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
        return before(x, {**target, "labels": change(target["labels"]).clamp(0, x.shape[-1] - 1)})

    return {"softmax_cost": cost, "focal_cost": cost}


for check, suffix, profiles in (
    (the_class_cost_is_minus_the_softmax, "", DETR),
    (the_class_cost_is_the_focal_difference, "-of-the-focal-cost", FOCAL),
):
    for name, sentence, change in (
        ("cost-labels-from-one", "Labels are taken as counted from 1 in the class cost.", lambda y: y - 1),
        ("cost-labels-one-up", "Labels are shifted up by one in the class cost.", lambda y: y + 1),
        ("cost-labels-from-one-around",
         "Labels are taken as counted from 1 in the class cost, and class 0 has the last channel.",
         lambda y: torch.where(y == 0, 1_000_000, y - 1)),
        ("cost-labels-of-class-zero", "The class cost is that of channel 0, whatever the label.", torch.zeros_like),
        ("cost-labels-of-class-one", "The class cost is that of channel 1, whatever the label.", torch.ones_like),
        ("cost-of-the-last-label", "The class cost is that of the image's last label for every target.",
         lambda y: y[-1:].expand_as(y)),
        ("cost-labels-one-target-on", "Every target has the label of the next one in the class cost.",
         lambda y: y.roll(-1)),
        ("cost-labels-one-target-back", "Every target has the label of the one before in the class cost.",
         lambda y: y.roll(1)),
        ("cost-labels-in-order", "The columns of the class cost come in sorted order of the labels.",
         lambda y: y.sort().values),
        ("cost-labels-reversed", "The columns of the class cost come in reverse order.", lambda y: y.flip(0)),
        ("cost-of-the-first-label", "The class cost is that of the image's first label for every target.",
         lambda y: y[:1].expand_as(y)),
    ):  # fmt: skip
        known(
            order_does_not_matter if name == "cost-labels-in-order" else check, name + suffix, sentence,
            fix="pick the column of each target's own label", profiles=profiles, around=_labels(change),
        )  # fmt: skip


def _if_several(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
    """The class cost, and 0 where there is but one class."""
    own, several = before(x, target), len(target.get("positive_map", range(book.o.num_classes))) > 1
    return own if several else 0 * own


for check, suffix, of in (
    (the_class_cost_is_minus_the_softmax, "", "softmax_cost"),
    (the_class_cost_is_the_focal_difference, "-of-the-focal-cost", "focal_cost"),
    (the_class_cost_is_the_mean_over_the_tokens_of_the_class, "-of-the-prompt", "token_cost"),
):
    known(
        check, "class-cost-left-out-with-one-class" + suffix,
        "With a single class the class cost is left out, as if it were the same for every query.",
        fix="queries differ in how sure they are of the one class too", around={of: _if_several},
    )  # fmt: skip


# --- tokens ---


def _by_rows(rows: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost that weighs the focal difference of every token by a row a target."""

    def token_cost(book: Textbook, x: Tensor, target: Target) -> Tensor:
        weights = rows((target["token_labels"] > 0).double())
        return torch.stack([(book.focal_difference(x[:, r > 0]) * r[r > 0]).sum(-1) for r in weights], -1)

    return token_cost


def _only(first: bool) -> Callable[[Tensor], Tensor]:
    def rows(r: Tensor) -> Tensor:
        at = r.argmax(1, keepdim=True) if first else r.shape[1] - 1 - r.flip(1).argmax(1, keepdim=True)
        return torch.zeros_like(r).scatter(1, at, 1.0)

    return rows


def _each(value: Callable[[Textbook, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost by a function of the logits [Q,m] of a class's tokens."""

    def token_cost(book: Textbook, x: Tensor, target: Target) -> Tensor:
        return torch.stack([value(book, x[:, own]) for own in target["token_labels"] > 0], -1)

    return token_cost


def _with_the_rest(book: Textbook, x: Tensor, target: Target) -> Tensor:
    a, g, p, q, lp, lq = _parts(book, x.clamp(min=-1e4))
    rows = (target["token_labels"] > 0).double()
    total: Tensor = (a * q**g * lp) @ rows.T + ((1 - a) * p**g * lq) @ (1 - rows).T
    return total


for name, sentence, formula in (
    ("class-cost-summed-over-tokens", "The class cost is the sum over the tokens of the class.", _by_rows(lambda r: r)),
    ("class-cost-of-the-last-token", "The class cost is that of the last token of the class alone.",
     _by_rows(_only(first=False))),
    ("class-cost-averaged-over-the-text", "The sum over the class's tokens is divided by the length of the text.",
     _by_rows(lambda r: r / r.shape[1])),
    ("class-cost-of-rows-of-unit-length", "Rows of tokens are scaled to unit length, not to unit sum.",
     _by_rows(lambda r: r / r.norm(dim=-1, keepdim=True))),
    ("class-cost-of-the-cheapest-token", "The class cost is that of the cheapest token of the class.",
     _each(lambda book, x: book.focal_difference(x).amin(-1))),
    ("class-cost-of-the-dearest-token", "The class cost is that of the dearest token of the class.",
     _each(lambda book, x: book.focal_difference(x).amax(-1))),
    ("class-cost-of-the-mean-logit", "The class cost is that of the mean logit of the class's tokens.",
     _each(lambda book, x: book.focal_difference(x.mean(-1)))),
    ("class-cost-of-the-mean-probability", "The class cost is that of the mean probability of the class's tokens.",
     _each(lambda book, x: book.focal_difference(x.sigmoid().mean(-1).logit()))),
    ("class-cost-with-the-other-tokens", "Positive parts of the class's tokens plus negative parts of all others.",
     _with_the_rest),
    ("class-cost-of-the-token-of-the-label", "The label is used as the number of a token.",
     lambda book, x, target: book.focal_difference(x[:, target["labels"].clamp(max=x.shape[1] - 1)])),
):  # fmt: skip
    known(
        the_class_cost_is_the_mean_over_the_tokens_of_the_class, name, sentence, fix="the mean over the class's tokens",
        token_cost=formula,
    )  # fmt: skip


def _map_rows(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost of the tokens that other labels have in the image's own prompt."""

    def token_cost(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
        names = target["positive_map"]
        rows = names[change(target["labels"]).clamp(0, len(names) - 1)]
        return before(x, {**target, "token_labels": rows})

    return token_cost


for name, sentence, change in (
    ("cost-labels-from-one-of-the-prompt", "Labels are taken as counted from 1 in the class cost.", lambda y: y - 1),
    ("cost-labels-one-up-of-the-prompt", "Labels are shifted up by one in the class cost.", lambda y: y + 1),
    ("cost-of-the-prompts-first-class", "The class cost is that of the prompt's first class for every target.",
     torch.zeros_like),
    ("cost-of-the-first-label-of-the-prompt", "The class cost is that of the image's first label for every target.",
     lambda y: y[:1].expand_as(y)),
    ("cost-labels-reversed-of-the-prompt", "The columns of the class cost come in reverse order.",
     lambda y: y.flip(0)),
):  # fmt: skip
    known(
        the_class_cost_is_the_mean_over_the_tokens_of_the_class, name, sentence,
        fix="pick the tokens of each target's own label", around={"token_cost": _map_rows(change)},
    )  # fmt: skip

# --- the whole cost ---

for name, sentence, change in (
    ("cost-exponentiated", "The assignment is solved for exp(cost).", lambda c: c.exp()),
    ("cost-softmaxed-over-targets", "The costs of each query are softmaxed over the targets.", lambda c: c.softmax(1)),
    ("cost-in-whole-hundredths", "Costs are rounded to whole hundredths, for an integer solver.",
     lambda c: (100 * c).round()),
    ("cost-in-whole-numbers", "Costs are rounded to whole numbers.", lambda c: c.round()),
    ("cost-absolute", "The absolute value of the cost is minimised.", lambda c: c.abs()),
    ("cost-clamped-at-zero", "Negative costs are set to 0.", lambda c: c.clamp(min=0)),
):  # fmt: skip
    known(
        giou_lowers_the_cost if name == "cost-exponentiated" else the_cost_is_the_weighted_sum_of_the_three,
        name, sentence, fix="solve for the cost as it is", profiles=EVERY,
        around={"cost": lambda before, book, *a, change=change: change(before(*a))},
    )  # fmt: skip
