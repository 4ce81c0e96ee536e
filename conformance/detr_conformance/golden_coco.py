"""COCO annotations to targets: the golden ones by a second way, and known wrong conversions, each of which must show.

A criterion never sees the conversion, so no clause binds it; it is judged here, on the targets that it makes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from detr_conformance.golden import ANNOTATIONS, case_of, coco_case, right
from detr_fixtures import golden
from detr_fixtures.golden import Golden
from detr_reference.coco import Conversion, coco, mask, normalised
from detr_reference.textbook import textbook

Target = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Mistake:
    """A known way of converting wrongly. ``id``, ``sentence`` and ``fix`` as of a fault; ``wrong``: the conversion."""

    id: str
    sentence: str
    fix: str
    wrong: Conversion


def _label(category: int, categories: Sequence[int], contiguous: bool) -> int:
    return sorted(categories).index(category) if contiguous else category


MISTAKES: Final = (
    Mistake(
        "coco-xywh-as-cxcywh",
        "COCO's corner is taken for the centre: boxes are half their size too far up and left.",
        "x + w/2, y + h/2 is the centre",
        replace(coco, corners=lambda b, h, w: torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1)),
    ),
    Mistake(
        "coco-xywh-as-corners",
        "COCO's width and height are taken for the second corner.",
        "x + w, y + h is the second corner",
        replace(coco, corners=lambda b, h, w: b, solid=lambda b: torch.ones(len(b), dtype=torch.bool)),
    ),
    Mistake(
        "coco-not-normalised",
        "Boxes stay in pixels.",
        "divide by the image's width and height",
        replace(coco, normalised=lambda b, h, w: normalised(b, 1, 1)),
    ),
    Mistake(
        "coco-height-before-width",
        "x is divided by the height and y by the width.",
        "divide (cx, cy, w, h) by (W, H, W, H)",
        replace(coco, normalised=lambda b, h, w: normalised(b, w, h)),
    ),
    Mistake(
        "coco-normalised-corners",
        "Targets are corners, not centre and size.",
        "turn corners into centre, width and height",
        replace(coco, normalised=lambda b, h, w: b / torch.tensor([w, h] * 2, dtype=b.dtype)),
    ),
    Mistake(
        "coco-not-cut",
        "Boxes that reach outside the image are not cut to it.",
        "clamp the corners to 0..W and 0..H",
        replace(coco, corners=lambda b, h, w: torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1)),
    ),
    Mistake(
        "coco-last-pixel-included",
        "The second corner is one pixel short: x + w − 1.",
        "COCO's boxes are continuous: x + w",
        replace(coco, corners=lambda b, h, w: torch.cat([b[:, :2], b[:, :2] + (b[:, 2:] - 1).clamp(min=0)], 1)),
    ),
    Mistake(
        "coco-empty-boxes-kept",
        "Boxes without area in the image are kept as targets.",
        "drop those whose corners do not span an area",
        replace(coco, solid=lambda b: torch.ones(len(b), dtype=torch.bool)),
    ),
    Mistake(
        "coco-crowds-kept",
        "Crowds are targets like single objects.",
        "leave out annotations with iscrowd",
        replace(coco, kept=lambda annotation: True),
    ),
    Mistake(
        "coco-id-as-index",
        "The category id is the label, though classes are numbered without gaps.",
        "map sorted category ids to 0, 1, 2, …",
        replace(coco, label=lambda category, known, contiguous: category),
    ),
    Mistake(
        "coco-id-less-one",
        "The label is the category id less 1.",
        "with 91 classes the id is the label; else map sorted ids",
        replace(coco, label=lambda category, known, contiguous: max(_label(category, known, contiguous) - 1, 0)),
    ),
    Mistake(
        "coco-ids-in-file-order",
        "Labels are places in the file's list of categories, which is not sorted.",
        "sort the ids first",
        replace(
            coco, label=lambda category, known, contiguous: list(known).index(category) if contiguous else category
        ),
    ),
    Mistake(
        "coco-first-polygon-only",
        "Of an object in several parts only the first polygon is in its mask.",
        "take the union of all polygons",
        replace(coco, mask=lambda s, h, w: mask(s[:1] if isinstance(s, list) else s, h, w)),
    ),
    Mistake(
        "coco-runs-by-rows",
        "Run lengths are read row by row.",
        "COCO counts down the columns",
        replace(coco, mask=lambda s, h, w: mask(s, h, w) if isinstance(s, list) else _by_rows(s, h, w)),
    ),
    Mistake(
        "coco-mask-transposed",
        "Height and width of masks are swapped.",
        "masks are [H, W]",
        replace(coco, mask=lambda s, h, w: mask(s, h, w).T.reshape(h, w)),
    ),
)


def _by_rows(segmentation: Mapping[str, Any], height: int, width: int) -> Tensor:
    return torch.from_numpy(_runs(segmentation["counts"], height * width).reshape(height, width))


def _runs(counts: Sequence[int], size: int) -> Any:
    """Alternate runs of 0 and 1."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)[:size]


# --- judging a conversion -------------------------------------------------------------------------------------------


def differences(by: Callable[..., Mapping[str, Tensor]], cases: Sequence[Golden], file: Mapping[str, Any]) -> list[str]:
    """Where the targets that a conversion makes differ from the golden ones, in words: at most one line an image.

    ``by`` is called as ``by(file, image, contiguous=…, masks=…)``.
    """
    found = []
    for one in cases:
        wanted = one.record["provenance"]["coco"]
        for image, target in zip(wanted["images"], case_of(one).targets, strict=True):
            try:
                got = by(file, image, contiguous=wanted["contiguous"], masks=wanted["masks"])
                line = _difference(got, target)
            except Exception as error:
                line = f"it raises {type(error).__name__}: {error}"
            if line:
                found.append(f"{one.name}, image {image}: {line}")
    return found


def _difference(got: Mapping[str, Tensor], want: Target) -> str:
    for key, value in want.items():
        if key not in got:
            return f"there is no {key}"
        own = torch.as_tensor(got[key])
        if own.shape != value.shape:
            return f"{key} have the shape {list(own.shape)}, and should have {list(value.shape)}"
        eps = 4 * torch.finfo(torch.float32).eps if value.is_floating_point() else 0.0
        off = (own.double() - value.double()).abs() > eps
        if value.dtype == torch.bool and bool(off.any()):
            return f"{key} differ in {int(off.sum())} pixels"
        if bool(off.any()):
            row = int(off.reshape(len(off), -1).any(1).nonzero()[0])
            return f"{key}[{row}] is {_short(own[row])}, and should be {_short(value[row])}"
    return ""


def _short(value: Tensor) -> str:
    return ", ".join(f"{float(v):.6g}" for v in value.flatten())


# --- the check ------------------------------------------------------------------------------------------------------


def problems(cases: Sequence[Golden], file: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the golden targets by a second way, and which known mistake they, or the losses that follow
    from them, would not show."""
    yield from differences(second, cases, file)
    for mistake in MISTAKES:
        if not differences(mistake.wrong, cases, file):
            yield f"{mistake.id} makes the golden targets too: no case shows it"
        elif not any(_moves(mistake.wrong, one, file) for one in cases):
            yield f"{mistake.id} moves no golden loss"


def _moves(wrong: Conversion, one: Golden, file: Mapping[str, Any]) -> bool:
    """True where a criterion's losses on wrongly converted targets are not the golden ones, or it refuses them."""
    case = coco_case(right(one.profile), file, one.record["provenance"]["coco"], wrong)
    try:
        losses = textbook.under(case.options)(case.outputs, case.targets).losses
    except (ValueError, IndexError):
        return True
    allowed = one.expected["allowed"]
    return any(abs(float(losses[key]) - one.expected["losses"][key]) > allowed[key] for key in allowed)


def second(file: Mapping[str, Any], image: int, *, contiguous: bool, masks: bool) -> dict[str, Tensor]:
    """The conversion once more: pycocotools finds the annotations, boxes are fractions, runs are unrolled by hand, and
    polygons, whose sides here are mostly along pixels, are filled by whether a pixel's centre is inside."""
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = dict(file)
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    (size,) = index.loadImgs([image])
    width, height = size["width"], size["height"]
    known = {id: place for place, id in enumerate(sorted(index.getCatIds()))} if contiguous else {}
    labels, boxes, filled = [], [], []
    for one in index.loadAnns(index.getAnnIds([image], iscrowd=False)):
        x, y, w, h = map(Fraction, one["bbox"])
        left, right, top, bottom = max(x, 0), min(x + w, width), max(y, 0), min(y + h, height)
        if right <= left or bottom <= top:
            continue
        cut = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
        boxes.append([float(v) for v in cut])
        labels.append(
            sorted(c["id"] for c in file["categories"]).index(one["category_id"]) if known else one["category_id"]
        )
        filled.append(_filled(one["segmentation"], height, width))
    target = {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).float(),
    }
    if masks:
        target["masks"] = torch.from_numpy(np.array(filled, dtype=bool).reshape(-1, height, width))
    return target


def _filled(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, Mapping):
        return _runs(segmentation["counts"], height * width).reshape(width, height).T
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for polygon in segmentation:
        corners = np.array(polygon, float).reshape(-1, 2)
        odd = np.zeros_like(inside)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
            if y1 != y2:
                odd ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
        inside |= odd
    return inside


def of_folder(folder: Any = golden.GOLDEN) -> tuple[list[Golden], dict[str, Any]]:
    """The COCO cases of a folder and its annotation file. Raises FixtureError."""
    cases = [one for one in golden.every(folder) if one.set == "coco"]
    return cases, golden.document(ANNOTATIONS, folder)
