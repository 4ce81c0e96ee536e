"""All wrong criterions: one realistic mistake each."""

from __future__ import annotations

from . import wrong_boxes, wrong_classes, wrong_layers, wrong_matching
from .port import Wrong

WRONG: list[Wrong] = [
    *wrong_boxes.MISTAKES,
    *wrong_matching.MISTAKES,
    *wrong_classes.MISTAKES,
    *wrong_layers.MISTAKES,
]
