"""NORM: what the losses are divided by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.cases import Case
from detr_conformance.contract.boxes import (
    corners_are_half_a_side_from_the_centre,
    loss_giou_is_one_minus_giou_of_the_pair,
)
from detr_conformance.contract.compare import agree, holds
from detr_conformance.contract.keys import logged_quantities_have_no_weight_and_losses_are_unweighted
from detr_conformance.experiments import ALONE, BATCH, EDGES
from detr_conformance.registry import DETR, EVERY, FOCAL, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Pairs, Textbook


def value(seen: Seen, term: str, layer: str, how: str = "") -> Iterator[Comparison]:
    """The loss of one term and layer against the textbook's, where the candidate returns it."""
    key = f"loss_{term}{seen.case.suffix(layer)}"
    if key in seen.got.losses:
        yield agree(key, seen.want.losses[key], seen.got.losses[key], seen.allowed(term, layer), how)


def _l1_by_hand(seen: Seen) -> str:
    """``0.875 = |−0.125| + …`` where few numbers make up the loss."""
    pred, wanted = seen.matched("final")
    if len(pred) != 1:
        return f"Σ |Δ| of {len(pred)} pairs / {seen.nb:g}"
    return "= " + " + ".join(f"|{d:.6g}|" for d in (pred - wanted)[0].tolist())


NORM_1 = clause(
    "NORM-1",
    "must",
    EVERY,
    "loss_bbox = Σ_pairs |Δ|₁ / nb and loss_giou = Σ_pairs (1 − GIoU) / nb.",
    ["facebookresearch/detr models/detr.py:153-161"],
)
_UNWEIGHTED = [logged_quantities_have_no_weight_and_losses_are_unweighted]


@check(NORM_1, on=BATCH, component="L1", after=_UNWEIGHTED)
def loss_bbox_is_the_sum_of_l1_over_nb(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total:
        yield from value(seen, "bbox", "final", _l1_by_hand(seen))


@check(
    NORM_1,
    on=BATCH,
    component="GIoU",
    after=[*_UNWEIGHTED, corners_are_half_a_side_from_the_centre, loss_giou_is_one_minus_giou_of_the_pair],
)
def loss_giou_is_the_sum_over_nb(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total:
        pairs = len(seen.matched("final")[0])
        yield from value(seen, "giou", "final", f"Σ (1 − GIoU) of {pairs} pairs / {seen.nb:g}")


@fault(loss_bbox_is_the_sum_of_l1_over_nb, seen_in="facebookresearch/detr #299", fix="reduction='none', sum, / nb")
def l1_with_its_default_mean(book: Textbook) -> Textbook:
    """F.l1_loss with its default mean over pairs and coordinates."""
    return replace(book, loss_bbox=lambda book, pred, wanted, nb: (pred - wanted).abs().mean())


@fault(loss_bbox_is_the_sum_of_l1_over_nb, fix="take the L1 distance of cxcywh")
def l1_on_corners(book: Textbook) -> Textbook:
    """L1 on xyxy corners."""

    def loss_bbox(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        distance: Tensor = book.l1(book.corners(pred), book.corners(wanted))
        return distance.sum() / nb

    return replace(book, loss_bbox=loss_bbox)


@fault(loss_giou_is_the_sum_over_nb, fix="take the diagonal of the pairwise GIoU")
def giou_of_all_pairs(book: Textbook) -> Textbook:
    """The mean over the whole M × M matrix of GIoUs instead of its diagonal."""

    def loss_giou(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        return (1 - book.giou(pred[:, None], wanted[None])).sum() / nb / max(len(pred), 1)

    return replace(book, loss_giou=loss_giou)


NORM_2 = clause(
    "NORM-2",
    "must",
    EVERY,
    "Batches add up: nb·loss of a batch is the sum of nb·loss of its images (box losses; focal class losses).",
)


def added_up(seen: Seen, term: str) -> Iterator[Comparison]:
    """nb·loss of the batch against the sum over its images, where every image alone is right."""
    for layer in seen.case.layers:
        key, alone = f"loss_{term}{seen.case.suffix(layer)}", list(seen.twins.values())
        if seen.agrees(term, layer):
            yield from value(seen, term, layer)  # the formula adds up, so what equals it does
            continue
        if key not in seen.got.losses or not all(a.agrees(term, layer) and a.decided(layer) for a in alone):
            continue
        parts = [_divisor(a, term, layer) * a.got.losses[key] for a in alone]
        whole = _divisor(seen, term, layer)
        allowed = (
            seen.allowed(term, layer) + sum(_divisor(a, term, layer) * a.allowed(term, layer) for a in alone) / whole
        )
        how = "(" + " + ".join(f"{p:.6g}" for p in parts) + f") / {whole:g}, from the images alone"
        yield agree(key, sum(parts) / whole, seen.got.losses[key], allowed, how)


def _divisor(seen: Seen, term: str, layer: str) -> float:
    if term == "ce":
        return float(seen.book.class_divisor(torch.tensor(seen.nb), seen.pairs[layer]))
    return seen.nb


@check(NORM_2, on=ALONE, component="L1", takes_raising=True, profiles=DETR | FOCAL)
def box_losses_of_a_batch_add_up(seen: Seen) -> Iterator[Comparison]:
    yield from added_up(seen, "bbox")
    yield from added_up(seen, "giou")


@check(NORM_2, on=ALONE, component="L1", profiles=EVERY - DETR - FOCAL)
def box_losses_of_a_batch_of_prompts_add_up(seen: Seen) -> Iterator[Comparison]:
    yield from added_up(seen, "bbox")
    yield from added_up(seen, "giou")


@check(NORM_2, on=ALONE, component="class loss", profiles=FOCAL)
def class_losses_of_a_batch_add_up(seen: Seen) -> Iterator[Comparison]:
    yield from added_up(seen, "ce")


@fault(box_losses_of_a_batch_add_up, fix="divide by the number of targets of the whole batch")
def divided_by_the_largest_image(book: Textbook) -> Textbook:
    """The divisor is the number of targets of the fullest image."""

    def num_boxes(book: Textbook, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.tensor(float(max(1, *(len(t["boxes"]) for t in targets), 1)), dtype=torch.float64)

    return replace(book, num_boxes=num_boxes)


@fault(box_losses_of_a_batch_of_prompts_add_up, fix="divide by the number of targets of the whole batch")
def divided_by_the_first_image(book: Textbook) -> Textbook:
    """The divisor is the number of targets of the first image."""

    def num_boxes(book: Textbook, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.tensor(float(max(1, len(targets[0]["boxes"]))), dtype=torch.float64)

    return replace(book, num_boxes=num_boxes)


@fault(class_losses_of_a_batch_add_up, fix="sum over all images before dividing by nb")
def class_loss_averaged_over_images(book: Textbook) -> Textbook:
    """The class loss is the mean over images of each image's own loss over its own number of targets."""

    def focal_loss(inner: Textbook, layer, targets, matches, nb, mask):  # type: ignore[no-untyped-def]
        found = []
        for b, (t, m) in enumerate(zip(targets, matches, strict=True)):
            one = replace(layer, logits=layer.logits[b : b + 1], boxes=layer.boxes[b : b + 1])
            own = torch.tensor(float(max(len(t["boxes"]), 1)), dtype=torch.float64)
            part = None if mask is None else mask[b : b + 1]
            found.append(book.under(inner.o).focal_loss(one, [t], [m], own, part))
        return torch.stack(found).mean()

    return replace(book, focal_loss=focal_loss)


NORM_3 = clause(
    "NORM-3",
    "must",
    EVERY,
    "nb counts targets: not matches, not images, not queries.",
    ["facebookresearch/detr models/detr.py:227-231"],
)


def _tells(case: Case) -> bool:
    """True where there are fewer matches than targets, or fewer targets than images."""
    return case.total > 0 and (any(n > case.queries for n in case.counts) or case.total < len(case.counts))


@check(NORM_3, on=EDGES, component="L1", after=[loss_bbox_is_the_sum_of_l1_over_nb])
def nb_counts_targets_not_matches(seen: Seen) -> Iterator[Comparison]:
    if _tells(seen.case):
        matched = sum(map(len, seen.pairs["final"]))
        yield from value(seen, "bbox", "final", f"{matched} pairs, divided by all {seen.case.total} targets")


@check(NORM_3, on=EDGES, component="GIoU", after=[loss_giou_is_the_sum_over_nb])
def nb_of_loss_giou_counts_targets_not_matches(seen: Seen) -> Iterator[Comparison]:
    if _tells(seen.case):
        matched = sum(map(len, seen.pairs["final"]))
        yield from value(seen, "giou", "final", f"{matched} pairs, divided by all {seen.case.total} targets")


@fault(
    nb_counts_targets_not_matches,
    seen_in="ultralytics RTDETRDetectionLoss divides by matched pairs",
    fix="count the targets, not the pairs",
)
def divided_by_the_matches(book: Textbook) -> Textbook:
    """Losses are divided by the number of matched pairs."""

    def layer_num_boxes(book: Textbook, layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)

    return replace(book, layer_num_boxes=layer_num_boxes)


@check(
    NORM_3,
    on=EDGES,
    component="class loss",
    profiles=EVERY - DETR,
    after=[
        "every_query_and_channel_is_trained",
        "the_class_loss_is_a_sum",
        "every_token_of_the_class_is_a_positive",
        "every_image_uses_its_own_prompt",
    ],
)
def the_class_loss_has_its_divisor(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total and any(n > seen.case.queries for n in seen.case.counts):
        divisor = {"boxes": "all targets", "matches": "the pairs"}[seen.case.options.class_divisor]
        yield from value(seen, "ce", "final", f"divided by {divisor}")


@fault(
    the_class_loss_has_its_divisor,
    seen_in="longzw1997/Open-GroundingDino, as the option class_divisor='matches'",
    fix="divide by the targets, or declare class_divisor='matches'",
)
def class_loss_divided_by_the_matches(book: Textbook) -> Textbook:
    """The class loss is divided by the number of matched pairs."""

    def class_divisor(book: Textbook, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
        return torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)

    return replace(book, class_divisor=class_divisor)


NORM_4 = clause("NORM-4", "must", EVERY, "One nb serves all layers.", ["facebookresearch/detr models/detr.py:227-250"])


@check(NORM_4, on=EDGES, component="auxiliary layers", after=[nb_counts_targets_not_matches])
def one_nb_serves_all_layers(seen: Seen) -> Iterator[Comparison]:
    if seen.agrees("bbox", "final") and seen.case.total:
        for layer in seen.case.layers[1:]:
            yield from value(seen, "bbox", layer, f"divided by {seen.nb:g}, as in the final layer")


@fault(one_nb_serves_all_layers, fix="compute nb once and use it for every layer")
def auxiliary_layers_divided_by_their_queries(book: Textbook) -> Textbook:
    """Auxiliary and encoder losses are divided by what their own layer could match."""

    def layer_num_boxes(book: Textbook, layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:  # type: ignore[no-untyped-def]
        own = torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)
        return nb if layer.name == "final" else own

    return replace(book, layer_num_boxes=layer_num_boxes)


NORM_5 = clause(
    "NORM-5",
    "must",
    EVERY,
    "Without any target nb is 1: box losses are exactly 0, still part of the graph, with zero gradient.",
)


@check(NORM_5, on=EDGES, component="L1", after=["every_trained_loss_is_a_scalar_tensor"])
def box_losses_without_targets_are_zero_in_the_graph(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total:
        return
    for layer in seen.case.layers:
        for term, key in zip(("bbox", "giou"), seen.case.keys(layer)[1:], strict=True):
            if key in seen.got.odd:
                yield holds(False, key, "a real scalar tensor", seen.got.odd[key], "no target")
            if key not in seen.got.losses:
                continue
            yield agree(key, 0.0, seen.got.losses[key], 0.0, "no target")
            if key not in seen.got.odd:
                got = "part of it" if key in seen.got.attached else "a constant"
                yield holds(key in seen.got.attached, f"{key} in the graph", "part of it", got)
            grad = seen.got.grads.get((term, layer), (None, None))[1]
            if grad is not None:
                worst = float(grad.abs().max()) if bool(grad.isfinite().all()) else float("nan")
                yield agree(f"largest box gradient of {key}", 0.0, worst, 0.0)


@fault(box_losses_without_targets_are_zero_in_the_graph, fix="clamp nb at 1")
def nb_not_clamped(book: Textbook) -> Textbook:
    """nb may be 0, and 0/0 is not a number."""

    def num_boxes(book: Textbook, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        return torch.tensor(float(sum(len(t["boxes"]) for t in targets)), dtype=torch.float64)

    return replace(book, num_boxes=num_boxes)


@fault(
    box_losses_without_targets_are_zero_in_the_graph,
    seen_in="lyuwenyu/RT-DETR #672",
    fix="sum over the empty pairs instead of returning a constant",
)
def constant_box_losses_without_targets(book: Textbook) -> Textbook:
    """Without targets the box losses are constants outside the graph."""

    def constant(name: str):  # type: ignore[no-untyped-def]
        def loss(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
            found: Tensor = getattr(book.under(inner.o), name)(pred, wanted, nb)
            return found if len(pred) else found.detach()

        return loss

    return replace(book, loss_bbox=constant("loss_bbox"), loss_giou=constant("loss_giou"))
