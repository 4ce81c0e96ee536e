"""Boxes with integer pixel corners, as annotations have them, and pycocotools' IoU of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.designed import pair_case
from detr_conformance.experiments import Experiment, called, from_seeds, one_class

WIDTH, HEIGHT = 64, 48
SIZE: Final = torch.tensor([WIDTH, HEIGHT] * 2, dtype=torch.float64)

_PAIRS: Final[tuple[tuple[Sequence[int], Sequence[int]], ...]] = (  # x1, y1, x2, y2 each
    ((8, 8, 24, 20), (16, 10, 40, 22)),
    ((0, 0, 64, 48), (3, 5, 20, 31)),
    ((10, 10, 11, 11), (10, 10, 12, 12)),
    ((5, 7, 30, 40), (6, 8, 31, 41)),
    ((20, 4, 33, 17), (33, 4, 40, 17)),
    ((2, 2, 9, 9), (41, 30, 60, 44)),
    ((12, 0, 13, 48), (0, 20, 64, 22)),
    ((1, 1, 4, 3), (2, 1, 5, 4)),
    ((17, 11, 46, 37), (17, 11, 46, 37)),
)


def _cases(bound: Bound) -> Iterator[Case]:
    return (_pair(bound, *pair) for pair in _PAIRS)


def _drawn(bound: Bound, seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def box() -> list[int]:
        x, y = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (WIDTH, HEIGHT))
        return [int(x[0]), int(y[0]), int(x[1]), int(y[1])]

    return _pair(bound, box(), box())


def _pair(bound: Bound, pred: Sequence[int], wanted: Sequence[int]) -> Case:
    label = f"pixels {tuple(pred)} and {tuple(wanted)} of a {WIDTH}×{HEIGHT} image"
    return pair_case(_normalised(pred), _normalised(wanted), one_class(bound), label)


def _normalised(corners: Sequence[int]) -> Any:
    """Corners in pixels to (cx, cy, w, h) in units of the image."""
    x1, y1, x2, y2 = corners
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / SIZE.numpy()


def corners_in_pixels(box: Tensor) -> Tensor | None:
    """Corners [4] in pixels of a float64 (cx, cy, w, h) in units of the image; None where they are no whole numbers."""
    corners = torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]) * SIZE
    whole = corners.round()
    return whole if bool(((corners - whole).abs() < 1e-3).all()) else None


def coco_iou(pred: Tensor, wanted: Tensor) -> float:
    """pycocotools' IoU of two boxes, corners [4] in pixels."""
    from pycocotools import mask

    rows = [torch.cat([corners[:2], corners[2:] - corners[:2]])[None].numpy() for corners in (pred, wanted)]
    return float(mask.iou(*rows, [0])[0, 0])


PIXELS = Experiment(
    "pixels", "boxes with whole pixels as corners", _cases, from_seeds(_drawn), called, share=0.2, weight=0.2
)
