"""Known mistakes of reading boxes, beside those in the chapter BOX: a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.boxes import (
    corners_are_half_a_side_from_the_centre,
)
from detr_conformance.registry import known
from detr_reference.textbook import Textbook

# --- corners ---


def _top_left(book: Textbook, boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def _turned(book: Textbook, boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:].flip(-1) / 2
    return torch.cat([centre - half, centre + half], -1)


def _uneven(low: float, high: float) -> Callable[..., Tensor]:
    def corners(book: Textbook, boxes: Tensor) -> Tensor:
        centre, sides = boxes[..., :2], boxes[..., 2:]
        return torch.cat([centre - low * sides, centre + high * sides], -1)

    return corners


def _one_axis(axis: int) -> Callable[..., Tensor]:
    def corners(book: Textbook, boxes: Tensor) -> Tensor:
        centre, half = boxes[..., [axis, axis]], boxes[..., 2:] / 2
        return torch.cat([centre - half, centre + half], -1)

    return corners


def of_corners(combine: Callable[..., Tensor], pred: Any = None, target: Any = None) -> Callable[..., Tensor]:
    """A GIoU from the corners of both boxes, each by a formula of its own where one is given."""

    def giou(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
        a = pred(book, a) if pred else book.corners(a)
        b = target(book, b) if target else book.corners(b)
        return combine(book, a, b)

    return giou


def giou_of(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    common = book.intersection(a, b)
    union, hull = book.union(a, b, common), book.enclosing(a, b)
    value: Tensor = book.share(common, union) - book.share(hull - union, hull)
    return value


def iou_of(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    common = book.intersection(a, b)
    value: Tensor = book.share(common, book.union(a, b, common))
    return value


def hull_sides(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])


def _ordered(book: Textbook, boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(low, high), torch.maximum(low, high)], -1)


for name, sentence, formulas in (
    ("width-and-height-exchanged", "Width and height change places in the corners.", {"corners": _turned}),
    ("low-corner-half-high-corner-whole", "Only the low corner uses half the side.", {"corners": _uneven(0.5, 1.0)}),
    ("high-corner-half-low-corner-whole", "Only the high corner uses half the side.", {"corners": _uneven(1.0, 0.5)}),
    ("corners-from-the-bottom-right", "Boxes are read as (right, bottom, width, height).", {"corners": _uneven(1, 0)}),
    ("both-axes-use-cx", "The vertical corners use cx.", {"corners": _one_axis(0)}),
    ("both-axes-use-cy", "The horizontal corners use cy.", {"corners": _one_axis(1)}),
    ("boxes-never-converted", "The GIoU is that of (cx, cy, w, h) taken for corners.", {"corners": lambda book, x: x}),
    (
        "target-read-from-the-top-left",
        "Target boxes alone are read from the top left: their centre is taken for a corner.",
        {"giou": of_corners(giou_of, target=_top_left)},
    ),
    (
        "prediction-read-from-the-top-left",
        "Predicted boxes alone are read from the top left: their centre is taken for a corner.",
        {"giou": of_corners(giou_of, pred=_top_left)},
    ),
    (
        "target-never-converted",
        "Target boxes are taken for corners already.",
        {"giou": of_corners(giou_of, target=lambda book, x: x)},
    ),
    (
        "target-never-converted-but-ordered",
        "Target boxes are taken for corners already, and put in order.",
        {"giou": of_corners(giou_of, target=_ordered)},
    ),
    (
        "prediction-never-converted",
        "Predicted boxes are taken for corners already.",
        {"giou": of_corners(giou_of, pred=lambda book, x: x)},
    ),
):
    known(
        corners_are_half_a_side_from_the_centre, name, sentence, fix="corners are cx ∓ w/2, cy ∓ h/2, of both boxes",
        **formulas,
    )  # fmt: skip


# --- boxes never converted, as quotients are guarded elsewhere ---


def as_they_are(book: Textbook, boxes: Tensor) -> Tensor:
    return boxes


def _exchanged(*order: int) -> Callable[..., Tensor]:
    """The corners of boxes whose coordinates are read in another order."""
    return lambda book, boxes: book.corners(boxes[..., list(order)])


def _positive(book: Textbook, part: Tensor, whole: Tensor) -> Tensor:
    whole = whole + book.o.giou_eps
    return torch.where(whole > 0, part, 0) / torch.where(whole > 0, whole, 1)


def _plain(book: Textbook, part: Tensor, whole: Tensor) -> Tensor:
    return part / (whole + book.o.giou_eps)


def _guarded(hull_clamped: bool, share: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A GIoU with quotients of its own, and the enclosing sides clamped at 0 or not."""

    def combine(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
        common = book.intersection(a, b)
        union, hull = book.union(a, b, common), book.enclosing(a, b)
        if hull_clamped:
            hull = hull_sides(a, b).clamp(min=0).prod(-1)
        return share(book, common, union) - share(book, hull - union, hull)

    return combine


def _loss_of(giou: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda book, pred, wanted, nb: (1 - giou(book, pred, wanted)).sum() / nb


GUARDS = {
    "guarded": ("the quotient by what is not positive being 0", _guarded(False, _positive)),
    "guarded-and-hull-clamped": (
        "the enclosing sides clamped at 0, and the quotient by what is not positive being 0", _guarded(True, _positive),
    ),
}  # fmt: skip
_CORNERS = "corners are cx ∓ w/2, cy ∓ h/2, of both boxes"

for guard, (how, combine) in GUARDS.items():  # where one box is converted, wholes are positive
    known(
        corners_are_half_a_side_from_the_centre, f"boxes-never-converted-{guard}",
        f"Boxes are taken for corners already in the GIoU, {how}.", fix=_CORNERS,
        giou=of_corners(combine, as_they_are, as_they_are),
    )  # fmt: skip
known(
    corners_are_half_a_side_from_the_centre, "boxes-never-converted-hull-clamped",
    "Boxes are taken for corners already in the GIoU loss, the enclosing sides clamped at 0, where it may become "
    "infinite.", fix=_CORNERS, loss_giou=_loss_of(of_corners(_guarded(True, _plain), as_they_are, as_they_are)),
)  # fmt: skip

for of, whose in (("target", "Target boxes"), ("pred", "Predicted boxes")):
    name = of.replace("pred", "prediction")
    for id, sentence, order in (
        ("sides-exchanged", "are read as (cx, cy, h, w)", (0, 1, 3, 2)),
        ("centre-exchanged", "are read as (cy, cx, w, h)", (1, 0, 2, 3)),
    ):
        known(
            corners_are_half_a_side_from_the_centre, f"{name}-{id}", f"{whose} {sentence} in the GIoU.", fix=_CORNERS,
            giou=of_corners(giou_of, **{of: _exchanged(*order)}),
        )  # fmt: skip
known(
    corners_are_half_a_side_from_the_centre, "target-axes-exchanged",  # which the prediction's would equal
    "Target boxes are read as (cy, cx, h, w) in the GIoU.", fix=_CORNERS,
    giou=of_corners(giou_of, target=_exchanged(1, 0, 3, 2)),
)  # fmt: skip


# --- boxes converted once too often, before everything else ---


def _to_corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def _from_corners(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def _taken(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def taken(before: Callable[..., Any], book: Textbook, target: Any) -> Any:
        own = before(target)
        return {**own, "boxes": change(own["boxes"])}

    return {"taken": taken}


def _predicted(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"layers": lambda before, book, outputs: [replace(x, boxes=change(x.boxes)) for x in before(outputs)]}


for of, whose in (("target", "Target boxes"), ("prediction", "Predicted boxes")):
    for id, sentence, change in (
        ("sides-exchanged-everywhere", "are read as (cx, cy, h, w)", lambda x: x[..., [0, 1, 3, 2]]),
        ("axes-exchanged-everywhere", "are read as (cy, cx, h, w)", lambda x: x[..., [1, 0, 3, 2]]),
        ("left-as-corners-everywhere", "are converted to corners, and then read as (cx, cy, w, h)", _to_corners),
        ("converted-from-corners-everywhere", "are taken for corners and converted to (cx, cy, w, h)", _from_corners),
        ("read-from-the-top-left-everywhere", "are taken for (left, top, width, height) and converted",
         lambda x: torch.cat([x[..., :2] + x[..., 2:] / 2, x[..., 2:]], -1)),
        ("moved-to-the-top-left-everywhere", "are converted to (left, top, width, height)",
         lambda x: torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., 2:]], -1)),
    ):  # fmt: skip
        known(
            corners_are_half_a_side_from_the_centre, f"{of}-{id}", f"{whose} {sentence}, in cost and losses.",
            fix="leave boxes as (cx, cy, w, h), and convert them for the GIoU alone",
            around=_taken(change) if of == "target" else _predicted(change),
        )  # fmt: skip
