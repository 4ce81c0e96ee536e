"""BOX: geometry, seen through loss_giou of a single pair of boxes, where nb is 1 and the matching is certain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.contract.compare import agree, holds, number
from detr_conformance.experiments import FARTHER, PAIRS, SWAPPED
from detr_conformance.pixels import PIXELS, SIZE, coco_iou, corners_in_pixels
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Textbook, textbook

# --- what the pair is ---


def _pair(seen: Seen) -> tuple[Tensor, Tensor]:
    """Prediction and target, both [4] float64."""
    return seen.layers["final"].boxes[0, 0], seen.case.targets[0]["boxes"][0].double()


def _loss(seen: Seen) -> float | None:
    return seen.got.losses.get("loss_giou")


def _alike(seen: Seen) -> bool:
    """True where corners misread from (cx, cy, w, h) as top-left boxes would go unnoticed: same size or centre."""
    pred, wanted = _pair(seen)
    return bool((pred[2:] == wanted[2:]).all() or (pred[:2] == wanted[:2]).all())


def _ordinary(seen: Seen) -> bool:
    return not any(word in seen.case.label for word in ("outside", "identical", "tiny"))


def _value(seen: Seen, how: str) -> Iterator[Comparison]:
    if seen.got.keys & {"loss_giou"}:
        want, allowed = seen.want.losses["loss_giou"], seen.allowed("giou", "final")
        yield agree("loss_giou", want, _loss(seen), allowed, how)


def _iou(seen: Seen) -> tuple[float, bool]:
    """IoU of the pair, and whether the enclosing box is the union."""
    a, b = (seen.book.corners(box) for box in _pair(seen))
    common = seen.book.intersection(a, b)
    union, hull = seen.book.union(a, b, common), seen.book.enclosing(a, b)
    return float(common / union), bool((hull - union).abs() < 1e-9)


# --- clauses ---

BOX_1 = clause(
    "BOX-1",
    "must",
    EVERY,
    "Boxes are (cx, cy, w, h) in units of the image's size; corners are cx ∓ w/2, cy ∓ h/2.",
    ["facebookresearch/detr util/box_ops.py:9"],
)


@check(BOX_1, on=PAIRS, component="GIoU")
def corners_are_half_a_side_from_the_centre(seen: Seen) -> Iterator[Comparison]:
    if _ordinary(seen) and not _alike(seen):
        yield from _value(seen, "1 − GIoU of boxes with corners cx ∓ w/2, cy ∓ h/2")


@fault(corners_are_half_a_side_from_the_centre, seen_in="facebookresearch/detr #28", fix="subtract half the sides")
def corners_from_the_top_left(book: Textbook) -> Textbook:
    """Boxes are read as (left, top, width, height)."""

    def corners(book: Textbook, boxes: Tensor) -> Tensor:
        return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)

    return replace(book, corners=corners)


@fault(corners_are_half_a_side_from_the_centre, fix="add and subtract half of each side")
def corners_a_whole_side_from_the_centre(book: Textbook) -> Textbook:
    """Corners are cx ∓ w, cy ∓ h: boxes are twice as large."""

    def corners(book: Textbook, boxes: Tensor) -> Tensor:
        centre, sides = boxes[..., :2], boxes[..., 2:]
        return torch.cat([centre - sides, centre + sides], -1)

    return replace(book, corners=corners)


BOX_2 = clause(
    "BOX-2",
    "must",
    EVERY,
    "GIoU = I/U − (H − U)/H with I intersection, U union, H the enclosing box.",
    ["Rezatofighi 2019, algorithm 1", "facebookresearch/detr util/box_ops.py:41"],
)


@check(BOX_2, on=PAIRS, component="GIoU", takes_raising=True)
def loss_giou_is_one_minus_giou_of_the_pair(seen: Seen) -> Iterator[Comparison]:
    if _ordinary(seen) and _alike(seen):
        yield from _value(seen, "1 − (I/U − (H − U)/H)")


@fault(loss_giou_is_one_minus_giou_of_the_pair, fix="subtract the share of the enclosing box that the union leaves")
def iou_without_the_enclosing_box(book: Textbook) -> Textbook:
    """IoU instead of GIoU: all disjoint boxes look equally bad."""

    def iou(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
        a, b = book.corners(pred), book.corners(target)
        common = book.intersection(a, b)
        value: Tensor = common / book.union(a, b, common)
        return value

    return replace(book, giou=iou)


@fault(loss_giou_is_one_minus_giou_of_the_pair, fix="subtract the intersection from the sum of the areas")
def union_counts_the_overlap_twice(book: Textbook) -> Textbook:
    """The union is the sum of both areas, the overlap counted twice."""
    return replace(book, union=lambda book, a, b, common: book.area(a) + book.area(b))


BOX_3 = clause(
    "BOX-3",
    "must",
    EVERY,
    "−1 ≤ GIoU ≤ 1, and GIoU ≤ IoU, with equality where the enclosing box is the union.",
    ["Rezatofighi 2019, section 3"],
)


@check(BOX_3, on=PAIRS, component="GIoU")
def giou_is_at_least_minus_one_and_at_most_iou(seen: Seen) -> Iterator[Comparison]:
    loss = _loss(seen)
    if loss is None or "tiny" in seen.case.label or "identical" in seen.case.label:
        return
    allowed = seen.allowed("giou", "final") + abs(seen.want.losses["loss_giou"] - _exact_loss(seen))
    giou, (iou, equal) = 1 - loss, _iou(seen)
    yield holds(-1 - allowed <= giou <= 1 + allowed, "GIoU = 1 − loss_giou", "between −1 and 1", number(giou))
    yield holds(giou <= iou + allowed, "GIoU = 1 − loss_giou", f"at most the IoU {number(iou)}", number(giou))
    if equal:
        yield agree("GIoU where the enclosing box is the union", iou, giou, allowed, "the IoU")


def _exact_loss(seen: Seen) -> float:
    pred, wanted = _pair(seen)
    return 1 - float(textbook.giou(pred, wanted))


@fault(giou_is_at_least_minus_one_and_at_most_iou, fix="clamp the sides of the intersection at 0")
def intersection_not_clamped(book: Textbook) -> Textbook:
    """The sides of the intersection may be negative, and two negative sides make an area."""

    def intersection(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
        sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
        return sides[..., 0] * sides[..., 1]

    return replace(book, intersection=intersection)


BOX_4 = clause("BOX-4", "must", EVERY, "Identical boxes have loss_giou 0, down to a side of 1e-3 of the image.")


@check(BOX_4, on=PAIRS, component="GIoU")
def identical_boxes_have_loss_giou_zero(seen: Seen) -> Iterator[Comparison]:
    if "identical" in seen.case.label:
        yield from _value(seen, "GIoU of a box with itself is 1")


@fault(
    identical_boxes_have_loss_giou_zero,
    seen_in="longzw1997/Open-GroundingDino util/box_ops.py:37",
    fix="leave the denominators as they are, or declare giou_eps",
)
def giou_with_a_thousandth_in_its_denominators(book: Textbook) -> Textbook:
    """1e-3 is added to both denominators of the GIoU: small boxes never reach loss 0."""

    def giou(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
        a, b = book.corners(pred), book.corners(target)
        common = book.intersection(a, b)
        both, hull = book.union(a, b, common), book.enclosing(a, b)
        value: Tensor = common / (both + 1e-3) - (hull - both) / (hull + 1e-3)
        return value

    return replace(book, giou=giou)


BOX_5 = clause(
    "BOX-5",
    "must",
    EVERY,
    "Disjoint boxes have GIoU < 0, smaller the farther apart, and a gradient that pulls them together.",
    ["Rezatofighi 2019, section 3"],
)


@check(BOX_5, on=PAIRS, component="GIoU")
def disjoint_boxes_are_pulled_together(seen: Seen) -> Iterator[Comparison]:
    loss = _loss(seen)
    if "apart" not in seen.case.label or loss is None:
        return
    yield holds(loss > 1, "GIoU of disjoint boxes", "less than 0", number(1 - loss))
    far = _loss(seen.twins[FARTHER])
    if far is not None:
        yield holds(
            far > loss, "GIoU of the same boxes farther apart", f"less than {number(1 - loss)}", number(1 - far)
        )
    grad = seen.got.grads.get(("giou", "final"), (None, None))[1]
    if grad is not None:
        pred, wanted = _pair(seen)
        pull = float((grad[0, 0, :2] * (wanted - pred)[:2]).sum())
        yield holds(pull < 0, "change of loss_giou when the prediction moves towards its target", "< 0", number(pull))


@fault(disjoint_boxes_are_pulled_together, fix="do not clamp the GIoU")
def giou_clamped_at_zero(book: Textbook) -> Textbook:
    """A negative GIoU is set to 0: disjoint boxes get no gradient."""

    def giou(inner: Textbook, pred: Tensor, target: Tensor) -> Tensor:
        value: Tensor = book.under(inner.o).giou(pred, target)
        return value.clamp(min=0)

    return replace(book, giou=giou)


BOX_6 = clause(
    "BOX-6",
    "must",
    EVERY,
    "GIoU is symmetric, and unchanged when both boxes are moved, mirrored or scaled together (each axis on its own).",
)


@check(BOX_6, on=PAIRS, component="GIoU", after=[corners_are_half_a_side_from_the_centre])
def giou_is_symmetric_and_follows_both_boxes(seen: Seen) -> Iterator[Comparison]:
    loss = _loss(seen)
    if loss is None or not _ordinary(seen):
        return
    for name, twin in seen.twins.items():
        if name != FARTHER and _loss(twin) is not None:
            pred, wanted = _pair(twin)
            # an ε in the denominators is no longer negligible once boxes shrink: its own share is the textbook's
            shift = float(seen.book.giou(*_pair(seen)) - seen.book.giou(pred, wanted)) if name != SWAPPED else 0.0
            allowed = tolerance.of_giou(pred[None], wanted[None], 1.0) + seen.allowed("giou", "final")
            yield agree(f"loss_giou with {name}", loss + shift, _loss(twin), allowed, "the loss of the pair itself")


@fault(giou_is_symmetric_and_follows_both_boxes, fix="add the areas of both boxes")
def union_of_the_prediction_twice(book: Textbook) -> Textbook:
    """The union adds the prediction's area twice and leaves the target's out."""
    return replace(book, union=lambda book, a, b, common: 2 * book.area(a) - common)


BOX_7 = clause("BOX-7", "must", EVERY, "Boxes that reach outside the image are not clipped.")


@check(BOX_7, on=PAIRS, component="GIoU", after=[loss_giou_is_one_minus_giou_of_the_pair])
def boxes_outside_the_image_are_not_clipped(seen: Seen) -> Iterator[Comparison]:
    if "outside" in seen.case.label:
        yield from _value(seen, "1 − GIoU of the whole boxes")


@fault(
    boxes_outside_the_image_are_not_clipped,
    seen_in="transformers loss_d_fine.py clamps boxes to [0, 1]",
    fix="leave boxes as they are predicted",
)
def boxes_clipped_to_the_image(book: Textbook) -> Textbook:
    """Corners are clipped to the image before the GIoU."""

    def corners(inner: Textbook, boxes: Tensor) -> Tensor:
        value: Tensor = book.under(inner.o).corners(boxes)
        return value.clamp(0, 1)

    return replace(book, corners=corners)


BOX_9 = clause(
    "BOX-9",
    "must",
    EVERY,
    "On boxes with whole pixels as corners the IoU part of the GIoU equals pycocotools' box IoU.",
    ["cocodataset/cocoapi PythonAPI/pycocotools/mask.py, iou"],
)


@check(BOX_9, on=PIXELS, component="GIoU", takes_raising=True, after=[loss_giou_is_one_minus_giou_of_the_pair])
def the_iou_is_that_of_pycocotools(seen: Seen) -> Iterator[Comparison]:
    a, b = map(corners_in_pixels, _pair(seen))
    if a is None or b is None or _loss(seen) is None:
        return
    iou, eps = coco_iou(a, b), seen.case.options.giou_eps
    sides = torch.stack([a[2:] - a[:2], b[2:] - b[:2], torch.maximum(a, b)[2:] - torch.minimum(a, b)[:2]])
    area_a, area_b, hull = (sides.prod(-1) / SIZE[:2].prod()).tolist()
    union = (area_a + area_b) / (1 + iou)  # I = IoU·U and U = |a| + |b| − I
    want = 1 - (iou * union / (union + eps) - (hull - union) / (hull + eps))
    # twice what rounding allows: these numbers are of the whole pixels, not of the float32 boxes nearest to them
    how = f"1 − IoU + (H − U)/H with pycocotools' IoU {number(iou)}"
    yield agree("loss_giou", want, _loss(seen), 2 * seen.allowed("giou", "final"), how)


@fault(
    the_iou_is_that_of_pycocotools,
    seen_in="facebookresearch/maskrcnn-benchmark boxlist_iou, TO_REMOVE = 1",
    fix="sides are x2 − x1 and y2 − y1",
)
def sides_with_inclusive_corners(book: Textbook) -> Textbook:
    """Both corners count as pixels: every side is x2 − x1 + 1, in whatever unit."""
    return replace(book, area=lambda book, c: (c[..., 2] - c[..., 0] + 1) * (c[..., 3] - c[..., 1] + 1))


@fault(the_iou_is_that_of_pycocotools, fix="sides are x2 − x1 and y2 − y1")
def areas_a_pixel_too_large(book: Textbook) -> Textbook:
    """Both corners count as pixels in the areas of the boxes: every side is a pixel of a 64×48 image longer."""
    return replace(book, area=lambda book, c: (c[..., 2] - c[..., 0] + 1 / 64) * (c[..., 3] - c[..., 1] + 1 / 48))


@fault(
    the_iou_is_that_of_pycocotools,
    seen_in="pycocotools' own IoU of a crowd region",
    fix="divide by the union (iscrowd is 0)",
)
def intersection_over_the_prediction(book: Textbook) -> Textbook:
    """The intersection is divided by the prediction's area, as COCO does for crowds, instead of the union."""

    def giou(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
        a, b = book.corners(pred), book.corners(target)
        common = book.intersection(a, b)
        both, hull = book.union(a, b, common), book.enclosing(a, b)
        value: Tensor = common / book.area(a) - (hull - both) / hull
        return value

    return replace(book, giou=giou)


@fault(the_iou_is_that_of_pycocotools, fix="divide by the union")
def intersection_over_the_smaller_box(book: Textbook) -> Textbook:
    """The union is taken to be the smaller of the two areas."""
    return replace(book, union=lambda book, a, b, common: torch.minimum(book.area(a), book.area(b)))
