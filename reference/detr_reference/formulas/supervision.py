"""LAYER: which layers are supervised, on which targets.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detr_reference.formulas.records import Layer, Pairs, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def layers(book: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
    """LAYER-1, 4. Every supervised layer of ``outputs``: final, aux0, aux1, …, enc."""
    o = book.o
    named = [("final", "", outputs)]
    named += [(f"aux{i}", f"{o.aux_suffix}{i}", x) for i, x in enumerate(outputs.get("aux_outputs", ()))]
    if o.has_encoder and o.encoder_key in outputs:
        named.append(("enc", o.encoder_suffix, outputs[o.encoder_key]))
    return [
        Layer(name, suffix, x["pred_logits"].double(), x["pred_boxes"].double(), book.layer_masks(name, x))
        for name, suffix, x in named
    ]


def encoder_targets(book: Textbook, targets: Targets) -> Targets:
    """LAYER-4. The encoder's targets: their own class, or class 0 (Deformable-DETR deformable_detr.py:373-379)."""
    if book.o.encoder_targets == "real":
        return targets
    return [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]


def layer_targets(book: Textbook, layer: Layer, targets: Targets) -> Targets:
    """The targets that a layer is matched and trained with."""
    return book.encoder_targets(targets) if layer.name == "enc" else targets


def layer_match(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Targets) -> list[Pairs]:
    """MATCH-7. A layer is matched on its own predictions (``every``: all layers of the call)."""
    return book.match(layer, targets)


def layer_mask(book: Textbook, layer: Layer, outputs: Mapping[str, Any]) -> Tensor | None:
    """LAYER-6. text_mask [B,T] holds for every layer; None where the profile has no text."""
    return outputs.get("text_mask") if book.o.class_loss == "token" else None


def layer_num_boxes(book: Textbook, layer: Layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
    """NORM-4. One nb serves all layers."""
    return nb
