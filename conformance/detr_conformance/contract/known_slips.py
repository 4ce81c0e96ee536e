"""Known slips in the formulas of boxes: one of the four edges is computed as another line of the same code is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.boxes import (
    corners_are_half_a_side_from_the_centre,
    loss_giou_is_one_minus_giou_of_the_pair,
)
from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient
from detr_conformance.contract.known_corners import giou_of, iou_of
from detr_conformance.registry import known
from detr_reference.textbook import Textbook

EDGES = ("left", "top", "right", "bottom")  # the columns of a corner box: x1, y1, x2, y2
CENTRE, SIDE = ("cx", "cy"), ("the width", "the height")


def _put(box: Tensor, edge: int, value: Tensor) -> Tensor:
    """The corner boxes [...,4] with another edge."""
    return torch.stack([value.expand_as(x) if i == edge else x for i, x in enumerate(box.unbind(-1))], -1)


def _sides(box: Tensor) -> Tensor:
    return box[..., 2:] - box[..., :2]


# --- corners ---


def _edge(edge: int, centre: int, side: int, times: float) -> Callable[..., Tensor]:
    """That edge at ``centre + times · side`` of (cx, cy, w, h)."""
    return lambda before, book, x: _put(before(x), edge, x[..., centre] + times * x[..., 2 + side])


for edge, name in enumerate(EDGES):
    axis, half = edge % 2, 0.5 if edge > 1 else -0.5
    for id, sentence, slip in (
        ("from-the-other-centre", f"is reckoned from {CENTRE[1 - axis]}", (1 - axis, axis, half)),
        ("with-the-other-side", f"is half of {SIDE[1 - axis]} from the centre", (axis, 1 - axis, half)),
        ("on-the-wrong-side", "lies on the other side of the centre", (axis, axis, -half)),
        ("a-whole-side-away", "is a whole side from the centre", (axis, axis, 2 * half)),
        ("at-the-centre", "is the centre itself", (axis, axis, 0.0)),
    ):
        known(
            corners_are_half_a_side_from_the_centre, f"{name}-edge-{id}", f"The {name} edge of boxes {sentence}.",
            fix="corners are cx ∓ w/2, cy ∓ h/2", around={"corners": _edge(edge, *slip)},
        )  # fmt: skip

# --- edges of the intersection and of the enclosing box ---

Pick = Callable[[Tensor, Tensor], Tensor]


def _common(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1)


def _hull(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)


def _area_of(made: Pick, size: Callable[[Tensor], Tensor], edge: int, pick: Pick) -> Callable[..., Tensor]:
    """The area of the box that ``made`` gives, one of its edges picked otherwise."""
    return lambda book, a, b: size(_sides(_put(made(a, b), edge, pick(a, b)))).prod(-1)


def _as_is(sides: Tensor) -> Tensor:
    return sides


def _clamped(sides: Tensor) -> Tensor:
    return sides.clamp(min=0)


for formula, whose, made, other, size in (
    ("intersection", "intersection", _common, _hull, _clamped),
    ("enclosing", "enclosing box", _hull, _common, _as_is),
):
    for edge, name in enumerate(EDGES):
        outer = "enclosing box" if formula == "intersection" else "intersection"
        for id, sentence, pick in (
            (f"of-the-{outer.split()[0]}", f"is that of the {outer}: min and max change places",
             lambda a, b, e=edge, other=other: other(a, b)[..., e]),
            ("of-the-prediction", "is the prediction's, whatever the target's", lambda a, b, e=edge: a[..., e]),
            ("of-the-target", "is the target's, whatever the prediction's", lambda a, b, e=edge: b[..., e]),
            ("on-the-other-axis", "is taken on the other axis", lambda a, b, e=edge, made=made: made(a, b)[..., e ^ 1]),
        ):  # fmt: skip
            formulas: dict[str, Any] = {formula: _area_of(made, size, edge, pick)}
            known(
                loss_giou_is_one_minus_giou_of_the_pair, f"{name}-edge-of-the-{formula}-{id}",
                f"The {name} edge of the {whose} {sentence}.", fix="the smaller of two upper edges, the larger of two "
                "lower ones, for the intersection; the other way round for the enclosing box",
                **formulas,
            )  # fmt: skip


def _of_sides(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda book, a, b: change(_sides(_common(a, b)))


for id, sentence, formulas in (
    ("intersection-of-its-width", "The intersection is the square of its width.",
     {"intersection": _of_sides(lambda s: s[..., 0].clamp(min=0) ** 2)}),
    ("intersection-of-its-height", "The intersection is the square of its height.",
     {"intersection": _of_sides(lambda s: s[..., 1].clamp(min=0) ** 2)}),
    ("intersection-with-its-width-unclamped", "Only the height of the intersection is clamped at 0.",
     {"intersection": _of_sides(lambda s: s[..., 0] * s[..., 1].clamp(min=0))}),
    ("intersection-with-its-height-unclamped", "Only the width of the intersection is clamped at 0.",
     {"intersection": _of_sides(lambda s: s[..., 0].clamp(min=0) * s[..., 1])}),
    ("enclosing-box-of-its-height", "The enclosing box is squared by its height.",
     {"enclosing": lambda book, a, b: _sides(_hull(a, b))[..., 1] ** 2}),
    ("areas-of-the-width", "The areas of both boxes are the squares of their widths.",
     {"area": lambda book, c: _sides(c)[..., 0] ** 2}),
    ("areas-of-the-height", "The areas of both boxes are the squares of their heights.",
     {"area": lambda book, c: _sides(c)[..., 1] ** 2}),
    ("areas-of-sides-added", "Width and height are added, not multiplied, in the areas of both boxes.",
     {"area": lambda book, c: _sides(c).sum(-1)}),
    ("areas-halved", "The areas of both boxes are halved.", {"area": lambda book, c: _sides(c).prod(-1) / 2}),
    ("areas-by-the-right-and-bottom-edges", "The areas of both boxes are x2 · y2.",
     {"area": lambda book, c: c[..., 2] * c[..., 3]}),
):  # fmt: skip
    known(
        loss_giou_is_one_minus_giou_of_the_pair, id, sentence, fix="width times height, each the difference of edges",
        **formulas,
    )  # fmt: skip


def _areas(*columns: int) -> dict[str, Any]:
    """The union of areas of which some are the square of a side: the columns of two sides of each box."""
    i, j, k, n = columns

    def union(book: Textbook, a: Tensor, b: Tensor, common: Tensor) -> Tensor:
        first, second = _sides(a), _sides(b)
        return first[..., i] * first[..., j] + second[..., k] * second[..., n] - common

    return {"union": union}


for id, sentence, sides in (
    ("area-of-the-predictions-width", "The area of the prediction is the square of its width.", (0, 0, 0, 1)),
    ("area-of-the-predictions-height", "The area of the prediction is the square of its height.", (1, 1, 0, 1)),
    ("area-of-the-targets-width", "The area of the target is the square of its width.", (0, 1, 0, 0)),
    ("area-of-the-targets-height", "The area of the target is the square of its height.", (0, 1, 1, 1)),
):
    known(
        loss_giou_is_one_minus_giou_of_the_pair, id, sentence, fix="width times height, each the difference of edges",
        **_areas(*sides),
    )  # fmt: skip


def _constant_iou(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    iou = iou_of(book, a, b)
    return giou_of(book, a, b) - iou + iou.detach()


for id, sentence, around in (
    ("areas-without-gradient", "The areas of both boxes are constants for the gradient.",
     {"area": lambda before, book, c: before(c).detach()}),
    ("iou-without-gradient", "I/U is a constant for the gradient: only the enclosing term trains.",
     {"giou": lambda before, book, a, b: _constant_iou(book, book.corners(a), book.corners(b))}),
):  # fmt: skip
    known(
        boxes_get_the_textbook_gradient, id, sentence, fix="compute areas from the boxes that are trained",
        around=around,
    )  # fmt: skip
