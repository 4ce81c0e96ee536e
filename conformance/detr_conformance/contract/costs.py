"""COST: the matching cost, seen through duels of two queries that cost nearly the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.contract.compare import agree, holds, unless_tied
from detr_conformance.contract.matching import in_words, optimal, supported, the_assignment_is_optimal
from detr_conformance.experiments import ALONE, DUELS
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Layer, Pairs, Textbook

AFTER = [the_assignment_is_optimal]


def _duel(seen: Seen, *kinds: str) -> Iterator[Comparison]:
    """The cheaper query of every image must be the matched one."""
    if seen.case.label.removeprefix("duel of ").split(",")[0] in kinds:
        yield from optimal(seen, "final")


COST_2 = clause(
    "COST-2",
    "must",
    DETR,
    "The class cost is −softmax(x)[label], the softmax over all K+1 channels (not its logarithm, not the logit).",
    ["facebookresearch/detr models/matcher.py:58-68"],
)


@check(COST_2, on=DUELS, component="matching costs", after=AFTER)
def the_class_cost_is_minus_the_softmax(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "class", "only class")


@fault(the_class_cost_is_minus_the_softmax, fix="take the probability, not its logarithm")
def class_cost_is_the_log_likelihood(book: Textbook) -> Textbook:
    """The class cost is −log softmax, as in the loss."""
    return replace(book, softmax_cost=lambda book, x, target: -x.log_softmax(-1)[:, target["labels"]])


@fault(the_class_cost_is_minus_the_softmax, fix="leave the no-object channel in the softmax")
def softmax_without_the_no_object_channel(book: Textbook) -> Textbook:
    """The softmax of the class cost leaves the no-object channel out."""
    return replace(book, softmax_cost=lambda book, x, target: -x[:, :-1].softmax(-1)[:, target["labels"]])


COST_3 = clause(
    "COST-3",
    "must",
    FOCAL,
    "The class cost is α(1−p)^γ(−log p) − (1−α)p^γ(−log(1−p)) at the label; 1e-8, 1e-12 or nothing inside the logs.",
    ["fundamentalvision/Deformable-DETR models/matcher.py:77-81"],
)


@check(COST_3, on=DUELS, component="matching costs", after=AFTER)
def the_class_cost_is_the_focal_difference(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "class", "only class")


@fault(the_class_cost_is_the_focal_difference, fix="subtract the cost of the negative")
def class_cost_without_the_negative_part(book: Textbook) -> Textbook:
    """The class cost is the positive part alone."""

    def difference(book: Textbook, x: Tensor) -> Tensor:
        alpha, gamma = book.o.cost_alpha, book.o.cost_gamma
        return alpha * (-x).sigmoid() ** gamma * torch.nn.functional.softplus(-x)

    return replace(book, focal_difference=difference)


@fault(
    the_class_cost_is_the_focal_difference,
    seen_in="transformers loss_deformable_detr.py:125-129, segmentation",
    fix="use the focal cost with a focal loss",
)
def softmax_cost_with_a_focal_loss(book: Textbook) -> Textbook:
    """The class cost is DETR's −softmax although the loss is focal."""
    return replace(book, focal_cost=lambda book, x, target: -x.softmax(-1)[:, target["labels"]])


COST_4 = clause(
    "COST-4",
    "must",
    TEXT,
    "The class cost is the focal difference averaged over the tokens of the target's class.",
    ["longzw1997/Open-GroundingDino models/GroundingDINO/matcher.py:48-121", "transformers loss_grounding_dino.py:70"],
)


@check(COST_4, on=DUELS, component="matching costs", after=AFTER)
def the_class_cost_is_the_mean_over_the_tokens_of_the_class(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "class", "only class")


@fault(the_class_cost_is_the_mean_over_the_tokens_of_the_class, fix="average over all tokens of the class")
def class_cost_of_the_first_token(book: Textbook) -> Textbook:
    """The class cost is that of the first token of the class alone."""

    def token_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        cost: Tensor = book.focal_difference(x[:, (target["token_labels"] > 0).int().argmax(-1)])
        return cost

    return replace(book, token_cost=token_cost)


COST_1 = clause(
    "COST-1",
    "must",
    EVERY,
    "The cost is λ_cls·cls + λ_bbox·L1 − λ_giou·GIoU; each weight scales its own term only, and zero switches it off.",
    ["facebookresearch/detr models/matcher.py:77"],
)


@check(COST_1, on=DUELS, component="matching costs", after=AFTER, takes_raising=True)
def the_cost_is_the_weighted_sum_of_the_three(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "all", "all of two", "other weights")


@check(COST_1, on=DUELS, component="matching costs", after=AFTER)
def giou_lowers_the_cost(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "giou")


def _cost(class_: float, bbox: float, giou: float) -> Callable[..., Tensor]:
    """A cost whose three terms are multiplied by these numbers once more."""

    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
        total: Tensor = (
            class_ * o.set_cost_class * book.class_cost(x, target)
            + bbox * o.set_cost_bbox * book.l1(pred, wanted)
            - giou * o.set_cost_giou * book.giou(pred, wanted)
        )
        return total

    return cost


@fault(the_cost_is_the_weighted_sum_of_the_three, fix="add all three terms")
def cost_without_l1(book: Textbook) -> Textbook:
    """The matching cost leaves the L1 distance out."""
    return replace(book, cost=_cost(1, 0, 1))


@fault(giou_lowers_the_cost, fix="subtract the GIoU")
def giou_raises_the_cost(book: Textbook) -> Textbook:
    """The GIoU enters the cost with the wrong sign: the best overlap is avoided."""
    return replace(book, cost=_cost(1, 1, -1))


COST_5 = clause(
    "COST-5",
    "should",
    FOCAL | TEXT,
    "The cost follows the configured α and γ, as the loss does.",
    ["IDEA-Research/DINO models/dino/matcher.py:32"],
)


@check(COST_5, on=DUELS, component="matching costs", after=AFTER)
def the_cost_follows_alpha_and_gamma(seen: Seen) -> Iterator[Comparison]:
    if {"focal_alpha", "focal_gamma"} & seen.bound.varies:
        yield from _duel(seen, "other focal")


@fault(
    the_cost_follows_alpha_and_gamma,
    seen_in="transformers loss_deformable_detr.py:39 and loss_grounding_dino.py:103",
    fix="hand focal_alpha and focal_gamma to the matcher",
)
def matcher_keeps_alpha_and_gamma(book: Textbook) -> Textbook:
    """The matching cost keeps α = 0.25 and γ = 2 whatever is configured."""

    def difference(book: Textbook, x: Tensor) -> Tensor:
        log = torch.nn.functional.softplus
        return 0.25 * (-x).sigmoid() ** 2 * log(-x) - 0.75 * x.sigmoid() ** 2 * log(x)

    return replace(book, focal_difference=difference)


COST_6 = clause(
    "COST-6",
    "must",
    EVERY,
    "L1 is the sum of four absolute differences in cxcywh (not of corners, not their mean, not Euclidean).",
    ["facebookresearch/detr models/matcher.py:71"],
)


@check(COST_6, on=DUELS, component="matching costs", after=AFTER)
def the_l1_cost_is_the_sum_of_four_differences(seen: Seen) -> Iterator[Comparison]:
    yield from _duel(seen, "bbox")


def _cost_with_distance(distance: Callable[[Textbook, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
        total: Tensor = (
            o.set_cost_class * book.class_cost(x, target)
            + o.set_cost_bbox * distance(book, pred, wanted)
            - o.set_cost_giou * book.giou(pred, wanted)
        )
        return total

    return cost


@fault(the_l1_cost_is_the_sum_of_four_differences, fix="cdist with p=1")
def euclidean_distance_in_the_cost(book: Textbook) -> Textbook:
    """The box distance of the cost is Euclidean."""
    return replace(book, cost=_cost_with_distance(lambda book, a, b: (a - b).norm(dim=-1)))


@fault(the_l1_cost_is_the_sum_of_four_differences, fix="take the L1 distance of cxcywh")
def l1_of_corners_in_the_cost(book: Textbook) -> Textbook:
    """The L1 distance of the cost is that of corners."""
    return replace(book, cost=_cost_with_distance(lambda book, a, b: book.l1(book.corners(a), book.corners(b))))


COST_7 = clause(
    "COST-7",
    "must",
    EVERY,
    "Matching weights and loss weights are separate: changing one never changes the other's effect.",
)


@check(COST_7, on=DUELS, component="matching costs", after=AFTER)
def matching_weights_are_not_loss_weights(seen: Seen) -> Iterator[Comparison]:
    o = seen.case.options
    if {"ce_loss_coef", "bbox_loss_coef", "giou_loss_coef"} & seen.bound.varies:
        for name, twin in seen.twins.items():
            for b, (one, two) in enumerate(zip(twin.pairs["final"], seen.pairs["final"], strict=True)):
                want, got = in_words(one), in_words(two)
                yield holds(want == got, f"matching of image {b} under other loss weights", f"{want}, as {name}", got)
    if "other weights" in seen.case.label and seen.got.weights and seen.bound.candidate.own_weights:
        for key, weight in (("ce", o.ce_loss_coef), ("bbox", o.bbox_loss_coef), ("giou", o.giou_loss_coef)):
            returned = seen.got.weights.get(f"loss_{key}")
            if returned is not None:
                how = "the loss weight, whatever the matching weights are"
                yield agree(f"weight_dict['loss_{key}']", weight, returned, 1e-6 * abs(weight), how)


@fault(matching_weights_are_not_loss_weights, fix="hand set_cost_* to the matcher")
def loss_weights_in_the_matching(book: Textbook) -> Textbook:
    """The matching cost is weighted with the loss weights."""

    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
        total: Tensor = (
            o.ce_loss_coef * book.class_cost(x, target)
            + o.bbox_loss_coef * book.l1(pred, wanted)
            - o.giou_loss_coef * book.giou(pred, wanted)
        )
        return total

    return replace(book, cost=cost)


COST_8 = clause("COST-8", "must", EVERY, "The cost of an image uses the predictions and targets of that image alone.")


@check(COST_8, on=ALONE, component="matching costs", after=AFTER)
def an_image_is_matched_as_if_alone(seen: Seen) -> Iterator[Comparison]:
    for b, alone in enumerate(seen.twins.values()):
        for layer in seen.case.layers if seen.case.counts[b] else ():
            own, theirs = supported(seen, layer), supported(alone, layer)
            if own is not None and theirs is not None:
                what = f"matched queries of image {b}, {layer}"
                same = holds(own[b] == theirs[0], what, f"{theirs[0]} as alone", f"{own[b]} in the batch")
                yield from unless_tied(alone, [layer], same)
            if layer in seen.got.pairs and layer in alone.got.pairs:
                one, two = in_words(alone.got.pairs[layer][0]), in_words(seen.got.pairs[layer][b])
                same = holds(one == two, f"the matcher's answer for image {b}, {layer}", one, two)
                yield from unless_tied(alone, [layer], same)


@fault(an_image_is_matched_as_if_alone, fix="split the cost matrix by the number of targets of each image")
def targets_of_the_next_image_in_the_cost(book: Textbook) -> Textbook:
    """The cost of an image is taken against the boxes of the next image, where that has as many."""

    def match(book: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        shifted = []
        for b, t in enumerate(targets):
            other = targets[(b + 1) % len(targets)]["boxes"]
            n = min(len(other), len(t["boxes"]))
            shifted.append({**t, "boxes": torch.cat([other[:n], t["boxes"][n:]])})
        with torch.no_grad():
            return [
                book.assign(book.cost(x, b, t)) if len(t["boxes"]) else Pairs(torch.arange(0), torch.arange(0))
                for x, b, t in zip(layer.logits, layer.boxes, shifted, strict=True)
            ]

    return replace(book, match=match)
