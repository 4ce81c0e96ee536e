"""The contract: one module a chapter. In each, side by side: a clause as a sentence, the check that judges it, and
the faults that break it. A new clause is one short addition in one place."""

from __future__ import annotations

import importlib
from typing import Final

CHAPTERS: Final = (
    "boxes",
    "matching",
    "costs",
    "keys",
    "normalisation",
    "classification",
    "logged",
    "tokens",
    "captions",
    "layers",
    "masks",
    "denoising",
    "gradients",
    "numbers",
    "precision",
    "callers",
    "refusals",
    "purity",
    "devices",
    "ranks",
    "learning",
    "known_corners",
    "known_slips",
    "known_boxes",
    "known_costs",
    "known_class_costs",
    "known_matchings",
    "known_softmax",
    "known_focal",
    "known_tokens",
    "known_divisors",
    "known_layers",
    "known_layer_losses",
    "known_keys",
    "known_effects",
    "known_batches",
    "known_parts",
    "known_numbers",
    "known_soft_targets",
    "known_rounding",
)


def load() -> None:
    """Import every chapter, which fills the registry."""
    for name in CHAPTERS:
        importlib.import_module(f"{__name__}.{name}")
