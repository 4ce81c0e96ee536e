"""From COCO annotations to a criterion's targets, as facebookresearch/detr datasets/coco.py makes them.

The steps are a bundle of functions, so that ``dataclasses.replace(coco, corners=…)`` is the same conversion with one
step changed: crowds are left out, boxes (x, y, width, height in pixels) become corners inside the image, empty ones are
dropped, the others become (cx, cy, w, h) in units of the image; a category's label is its own id, where the criterion
has 91 classes, or its place among the sorted ids; polygons and run lengths become masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Annotation = Mapping[str, Any]


def kept(annotation: Annotation) -> bool:
    """True of an annotation of one object; a crowd is no target (datasets/coco.py:65)."""
    return not annotation.get("iscrowd", 0)


def corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """COCO's (x, y, width, height) in pixels [n,4] to (x1, y1, x2, y2), cut to the image (datasets/coco.py:69-73)."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    size = torch.tensor([width, height], dtype=boxes.dtype)
    return torch.cat([low, high], 1).clamp(min=0).minimum(size.repeat(2))


def solid(boxes: Tensor) -> Tensor:
    """Which corner boxes have an area (datasets/coco.py:90)."""
    return (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])


def normalised(boxes: Tensor, height: int, width: int) -> Tensor:
    """Corners in pixels [n,4] to (cx, cy, w, h) in units of the image (datasets/transforms.py:248-259)."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1) / torch.tensor([width, height] * 2, dtype=boxes.dtype)


def label(category: int, categories: Sequence[int], contiguous: bool) -> int:
    """A category's id as it is, or its place among the sorted ids of all categories."""
    return sorted(categories).index(category) if contiguous else category


def mask(segmentation: Any, height: int, width: int) -> Tensor:
    """The boolean mask [height,width] of polygons, which may be several, or of run lengths, counted column by column,
    as numbers or compressed to a string (datasets/coco.py:38-53)."""
    from pycocotools import mask as rle

    if isinstance(segmentation, Mapping) and not isinstance(segmentation["counts"], list):
        runs = [dict(segmentation)]
    else:
        found = rle.frPyObjects(segmentation, height, width)
        runs = found if isinstance(found, list) else [found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 dislikes how pycocotools asks for its array
        parts = rle.decode(runs)
    return torch.from_numpy(np.ascontiguousarray(parts.any(-1)))


@dataclass(frozen=True)
class Conversion:
    """The steps of the conversion. Called with an annotation file, an image's id and what is wanted."""

    kept: Callable[[Annotation], bool] = kept
    corners: Callable[[Tensor, int, int], Tensor] = corners
    solid: Callable[[Tensor], Tensor] = solid
    normalised: Callable[[Tensor, int, int], Tensor] = normalised
    label: Callable[[int, Sequence[int], bool], int] = label
    mask: Callable[[Any, int, int], Tensor] = mask

    def __call__(
        self, file: Mapping[str, Any], image: int, *, contiguous: bool = False, masks: bool = False
    ) -> dict[str, Tensor]:
        """The target of one image: labels [n] int64, boxes [n,4] float32, and masks [n,H,W] bool if wanted.

        ``file``: the parsed annotation file. Raises KeyError where it has no such image.
        """
        sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in file["images"]}
        if image not in sizes:
            raise KeyError(f"the annotation file has no image {image!r}")
        height, width = sizes[image]
        own = [a for a in file["annotations"] if a["image_id"] == image and self.kept(a)]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float64).reshape(-1, 4)
        boxes = self.corners(boxes, height, width)
        some = self.solid(boxes)
        own = [a for a, whole in zip(own, some.tolist(), strict=True) if whole]
        known = [int(c["id"]) for c in file["categories"]]
        labels = [self.label(int(a["category_id"]), known, contiguous) for a in own]
        target = {
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": self.normalised(boxes[some], height, width).float(),
        }
        if masks:
            every = [self.mask(a["segmentation"], height, width) for a in own]
            target["masks"] = torch.stack([torch.zeros(height, width, dtype=torch.bool), *every])[1:]
        return target


coco = Conversion()
