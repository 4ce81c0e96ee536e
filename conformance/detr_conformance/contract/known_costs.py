"""Known mistakes of the matching cost, beside those in the chapter COST: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.costs import (
    giou_lowers_the_cost,
    the_cost_is_the_weighted_sum_of_the_three,
    the_l1_cost_is_the_sum_of_four_differences,
)
from detr_conformance.contract.known_corners import GUARDS, as_they_are, giou_of, iou_of, of_corners
from detr_conformance.registry import EVERY, TEXT, known
from detr_reference.options import options_of
from detr_reference.textbook import Layer, Textbook

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
    ("cost-weights-applied-twice", "Every weight is applied twice.",
     lambda o: (o.set_cost_class**2, o.set_cost_bbox**2, o.set_cost_giou**2)),
    ("cost-weight-zero-means-one", "A weight of 0 falls back to 1: `weight or 1`.",
     lambda o: (o.set_cost_class or 1, o.set_cost_bbox or 1, o.set_cost_giou or 1)),
    ("cost-weight-zero-means-the-default", "A weight of 0 falls back to the family's: `weight or default`.",
     lambda o: (o.set_cost_class or CLASS(o), o.set_cost_bbox or BBOX(o), o.set_cost_giou or GIOU(o))),
    ("cost-of-the-class-alone", "The boxes have no part in the matching cost.", lambda o: (o.set_cost_class, 0, 0)),
    ("cost-of-l1-alone", "The L1 distance alone is the matching cost.", lambda o: (0, o.set_cost_bbox, 0)),
    ("cost-of-giou-alone", "The GIoU alone is the matching cost.", lambda o: (0, 0, o.set_cost_giou)),
    ("cost-without-the-class", "The matching cost leaves the class out.",
     lambda o: (0, o.set_cost_bbox, o.set_cost_giou)),
    ("cost-without-giou", "The matching cost leaves the GIoU out.",
     lambda o: (o.set_cost_class, o.set_cost_bbox, 0)),
    ("l1-lowers-the-cost", "The L1 distance enters the cost with the wrong sign: distance is rewarded.",
     lambda o: (o.set_cost_class, -o.set_cost_bbox, o.set_cost_giou)),
    ("class-raises-the-cost", "The class enters the cost with the wrong sign: the right class is avoided.",
     lambda o: (-o.set_cost_class, o.set_cost_bbox, o.set_cost_giou)),
):  # fmt: skip
    check = giou_lowers_the_cost if "weight-zero" in name else the_cost_is_the_weighted_sum_of_the_three
    known(check, name, sentence, fix=_OWN, cost=_weighted(weights))

TERMS = {
    "class": ("the class term", "set_cost_class", "ce_loss_coef"),
    "l1": ("the L1 term", "set_cost_bbox", "bbox_loss_coef"),
    "giou": ("the GIoU term", "set_cost_giou", "giou_loss_coef"),
}


def _one(place: int, weight: Callable[[Any], float]) -> Callable[[Any], tuple[float, ...]]:
    """The configured weights, but for one term."""

    def weights(o: Any) -> tuple[float, ...]:
        own = [getattr(o, name) for _, name, _ in TERMS.values()]
        return *own[:place], weight(o), *own[place + 1 :]

    return weights


for place, (term, (whose, own, loss)) in enumerate(TERMS.items()):
    for name, sentence, weight in (
        (f"{term}-cost-weighs-one", "weighs 1, whatever is configured.", lambda o: 1),
        (f"{term}-cost-weighs-two", "weighs 2, whatever is configured.", lambda o: 2),
        (f"{term}-cost-weighs-five", "weighs 5, whatever is configured.", lambda o: 5),
        (f"{term}-cost-counts-half", "counts half.", lambda o, own=own: getattr(o, own) / 2),
        (f"{term}-cost-counts-twice", "counts twice.", lambda o, own=own: getattr(o, own) * 2),
        (f"{term}-weighed-by-its-loss-weight", "is weighted with the loss weight.", attrgetter(loss)),
        (f"{term}-cost-weight-zero-means-one", "weighs 1 where its weight is 0: `weight or 1`.",
         lambda o, own=own: getattr(o, own) or 1),
        *((f"{term}-takes-the-cost-weight-of-{'the-class' if other == 'class' else other}", f"takes {theirs}'s weight.",
           attrgetter(name)) for other, (theirs, name, _) in TERMS.items() if other != term),
    ):  # fmt: skip
        check = the_cost_is_the_weighted_sum_of_the_three
        if "weight-zero" in name:  # shows where that weight is 0, which one experiment has
            check = the_l1_cost_is_the_sum_of_four_differences if term == "giou" else giou_lowers_the_cost
        known(check, name, f"{whose[0].upper()}{whose[1:]} {sentence}", fix=_OWN, cost=_weighted(_one(place, weight)))


def _shared(term: str, count: Callable[[int, int, int], int]) -> dict[str, Any]:
    """A term of the cost divided by a count of an image's targets, those of the batch, or the queries."""

    def match(before: Any, book: Textbook, layer: Layer, targets: Sequence[Target]) -> Any:
        total = sum(len(t["boxes"]) for t in targets)

        def cost(inner: Textbook, x: Tensor, boxes: Tensor, target: Target) -> Tensor:
            by = max(count(len(target["boxes"]), total, len(boxes)), 1)
            o = book.o.with_(**{TERMS[term][1]: getattr(book.o, TERMS[term][1]) / by})
            found: Tensor = book.under(o).cost(x, boxes, target)
            return found

        return before.func(replace(book, cost=cost), layer, targets)

    return {"match": match}


for term, (whose, _, _) in TERMS.items():
    for name, what, count in (
        ("the-targets-of-the-image", "the number of targets of the image", lambda n, total, q: n),
        ("the-targets-of-the-batch", "the number of targets of the batch", lambda n, total, q: total),
        ("the-queries", "the number of queries", lambda n, total, q: q),
    ):
        known(
            the_cost_is_the_weighted_sum_of_the_three, f"{term}-cost-divided-by-{name}",
            f"{whose[0].upper()}{whose[1:]} of the cost is divided by {what}.",
            fix="the cost of a pair is of that pair alone",
            profiles=EVERY - TEXT if (term, name) == ("class", "the-targets-of-the-image") else EVERY,
            around=_shared(term, count),
        )  # fmt: skip


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


for name, sentence, giou in (
    ("iou-in-the-cost", "IoU instead of GIoU in the cost alone.", of_corners(iou_of)),
    ("giou-floored-in-the-cost", "A negative GIoU is set to 0 in the cost alone.",
     lambda book, a, b: book.giou(a, b).clamp(min=0)),
    ("giou-in-the-cost-never-converted", "The GIoU of the cost is that of (cx, cy, w, h) taken for corners.",
     giou_of),
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
        cost=_with(giou=of_corners(giou_of, **dict.fromkeys(sides, as_they_are))),
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
            cost=_with(giou=of_corners(giou_of, **dict.fromkeys(sides, corners))),
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
