"""Generated images of coloured squares, discs and triangles, and COCO's average precision of what is found in them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

SIDE: Final = 32  # pixels of an image, each way
CLASSES: Final = 3  # square, disc, triangle
COLOURS: Final = np.array([[0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.25, 0.3, 0.95]])
SMALLEST, LARGEST, MOST = 8, 16, 4  # sides in pixels, and shapes in an image


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images [B,3,SIDE,SIDE], and of each the labels [n] and boxes [n,4] (cxcywh in units of the image)."""

    images: Tensor
    targets: tuple[dict[str, Tensor], ...]


@cache
def pictures(seed: int, number: int) -> Pictures:
    """``number`` images of one to MOST shapes that do not overlap: the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    drawn = [_picture(rng) for _ in range(number)]
    pixels = torch.from_numpy(np.stack([image for image, _, _ in drawn]).transpose(0, 3, 1, 2)).float()
    return Pictures(pixels, tuple(_target(boxes, labels) for _, boxes, labels in drawn))


def _picture(rng: Generator) -> tuple[Any, list[tuple[int, ...]], list[int]]:
    """An image [SIDE,SIDE,3] with noise behind its shapes, their boxes (x, y, w, h in pixels) and classes."""
    image = rng.uniform(0, 0.35, (SIDE, SIDE, 3))
    boxes: list[tuple[int, ...]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(1, MOST + 1))):
        box = _free(rng, boxes)
        if box is None:
            continue
        label = int(rng.integers(CLASSES))
        image[_inside(label, box)] = COLOURS[label] * rng.uniform(0.6, 1) + rng.uniform(-0.1, 0.1, 3)
        boxes.append(box)
        labels.append(label)
    return image, boxes, labels


def _free(rng: Generator, taken: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """A box apart from those taken, or None where a few tries find none."""
    for _ in range(20):
        w, h = (int(side) for side in rng.integers(SMALLEST, LARGEST + 1, 2))
        x, y = int(rng.integers(SIDE - w + 1)), int(rng.integers(SIDE - h + 1))
        if all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in taken):
            return x, y, w, h
    return None


def _inside(label: int, box: tuple[int, ...]) -> Any:
    """Which pixels [SIDE,SIDE] belong to the shape that fills a box."""
    x, y, w, h = box
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    u, v = (xs - x) / w, (ys - y) / h
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    if label == 1:
        return inside & ((u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25)
    return inside & (abs(u - 0.5) < v / 2) if label == 2 else inside


def _target(boxes: Sequence[tuple[int, ...]], labels: Sequence[int]) -> dict[str, Tensor]:
    found = torch.tensor(boxes, dtype=torch.float32) / SIDE
    return {
        "labels": torch.tensor(labels),
        "boxes": torch.cat([found[:, :2] + found[:, 2:] / 2, found[:, 2:]], -1),
    }


def average_precision(boxes: Tensor, scores: Tensor, targets: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """COCO's AP (mean over IoU .50:.95) and AP50 of boxes [B,Q,4] (cxcywh) with scores [B,Q,CLASSES], by pycocotools.

    Every query is a detection of every class; COCO itself keeps the best hundred of an image and class.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    true = [
        {"image_id": i, "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, target in enumerate(targets)
        for label, box in zip(target["labels"], _pixels(target["boxes"]).tolist(), strict=True)
    ]
    found = [
        {"image_id": i, "category_id": label, "bbox": box, "score": score}
        for i, (own, likely) in enumerate(zip(_pixels(boxes).tolist(), scores.tolist(), strict=True))
        for box, row in zip(own, likely, strict=True)
        for label, score in enumerate(row)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "width": SIDE, "height": SIDE} for i in range(len(targets))],
            "categories": [{"id": label} for label in range(CLASSES)],
            "annotations": [{**one, "id": i} for i, one in enumerate(true, 1)],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


def _pixels(boxes: Tensor) -> Tensor:
    """COCO's form of boxes [...,4]: x, y of the corner, w, h, in pixels."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], -1).double() * SIDE
