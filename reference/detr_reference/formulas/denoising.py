"""DN: contrastive denoising in the form of DINO.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_reference.formulas.records import Layer, Pairs, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def denoising_layers(book: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
    """DN-1. The layers of denoising queries in ``outputs["dn_meta"]``: dn, dn_aux0, dn_aux1, …; none without them."""
    meta = outputs.get("dn_meta") or {}
    if not book.o.denoising or meta.get("output_known_lbs_bboxes") is None:
        return []
    last = meta["output_known_lbs_bboxes"]
    named = [("dn", "_dn", last)] + [(f"dn_aux{i}", f"_dn_{i}", x) for i, x in enumerate(last.get("aux_outputs", ()))]
    groups = int(meta["num_dn_group"])
    return [
        Layer(name, suffix, x["pred_logits"].double(), x["pred_boxes"].double(), groups=groups)
        for name, suffix, x in named
    ]


def group_slots(book: Textbook, layer: Layer) -> int:
    """DN-1. Slots of a group; its first half are positives, its second half negatives."""
    return layer.boxes.shape[1] // layer.groups


def positive_slots(book: Textbook, layer: Layer, n: int) -> Tensor:
    """DN-1. [G,n]: the query that reconstructs each of an image's n targets in each group: the group's first n slots.

    IDEA-Research/DINO models/dino/dino.py:502-541.
    """
    return torch.arange(layer.groups)[:, None] * book.group_slots(layer) + torch.arange(n)


def denoising_pairs(book: Textbook, layer: Layer, targets: Targets) -> list[Pairs]:
    """DN-1, 2. The positives of each image and their targets, known without a matching."""
    slots = [book.positive_slots(layer, len(t["boxes"])) for t in targets]
    return [Pairs(s.flatten(), torch.arange(s.shape[1]).repeat(len(s))) for s in slots]


def denoising_divisor(book: Textbook, layer: Layer, nb: Tensor) -> Tensor:
    """DN-1. nb · G: every target is reconstructed once a group."""
    return nb * layer.groups


def denoising_losses(book: Textbook, outputs: Mapping[str, Any], targets: Targets, nb: Tensor) -> dict[str, Tensor]:
    """DN-1. Class and box losses of the denoising queries; negatives and padding are queries without a target."""
    found: dict[str, Tensor] = {}
    for layer in book.denoising_layers(outputs):
        pairs, divisor = book.denoising_pairs(layer, targets), book.denoising_divisor(layer, nb)
        found |= book.layer_losses(layer, targets, pairs, divisor, book.layer_mask(layer, outputs))
    return found
