"""What the textbook refuses, each with a sentence that names the argument (BAD, COST-10), and what it takes as it comes
(NUM-5). Formulas of the bundle in ``textbook``: each takes the book first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook

Targets = Sequence[Mapping[str, Tensor]]


def refuse(book: Textbook, outputs: Mapping[str, Any], targets: Targets) -> None:
    """BAD-1…4. Raises ValueError where a key is missing, lengths do not agree, or a label or box cannot be."""
    book.refuse_missing(outputs, targets)
    book.refuse_lengths(outputs, targets)
    book.refuse_labels(outputs, targets)
    book.refuse_boxes(targets)


def refuse_weights(book: Textbook) -> None:
    """COST-10. Raises ValueError where all three matching weights are zero. facebookresearch/detr matcher.py:32."""
    if not (book.o.set_cost_class or book.o.set_cost_bbox or book.o.set_cost_giou):
        raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou are all zero: there is no cost to match by")


def refuse_missing(book: Textbook, outputs: Mapping[str, Any], targets: Targets) -> None:
    """BAD-4. Every layer has pred_logits and pred_boxes; every target labels, boxes and what its class loss reads."""
    for name, layer in layers_of(book, outputs):
        for key in ("pred_logits", "pred_boxes"):
            if key not in layer:
                raise ValueError(f"{name}[{key!r}] is missing")
    keys = ("labels", "boxes", "token_labels") if book.o.class_loss == "token" else ("labels", "boxes")
    for b, target in enumerate(targets):
        for key in keys:
            if key not in target:
                raise ValueError(f"targets[{b}][{key!r}] is missing")


def refuse_lengths(book: Textbook, outputs: Mapping[str, Any], targets: Targets) -> None:
    """BAD-2. As many images everywhere; as many boxes as logits, as labels; as many tokens in text_mask."""
    for name, layer in layers_of(book, outputs):
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        if logits.shape[:2] != boxes.shape[:2] or boxes.shape[-1] != 4:
            raise ValueError(
                f"{name}: pred_logits {list(logits.shape)} and pred_boxes {list(boxes.shape)} do not agree"
            )
        if len(logits) != len(targets):
            raise ValueError(f"targets has {len(targets)} images, {name}['pred_logits'] {len(logits)}")
        mask = outputs.get("text_mask")
        if book.o.class_loss == "token" and mask is not None and mask.shape != (len(logits), logits.shape[-1]):
            raise ValueError(
                f"text_mask {list(mask.shape)} and {name}['pred_logits'] {list(logits.shape)} do not agree"
            )
    for b, target in enumerate(targets):
        if len(target["labels"]) != len(target["boxes"]):
            n = len(target["labels"])
            raise ValueError(f"targets[{b}] has {n} labels and {len(target['boxes'])} boxes; they must be as many")


def refuse_labels(book: Textbook, outputs: Mapping[str, Any], targets: Targets) -> None:
    """BAD-1. Labels are in 0..K − 1; of a prompt's classes, whose number is its own, only the sign is known."""
    most = torch.inf if book.o.class_loss == "token" else book.o.num_classes - 1
    for b, target in enumerate(targets):
        for label in target["labels"].tolist():
            if not 0 <= label <= most:
                raise ValueError(f"targets[{b}]['labels'] has {label}; labels are in 0..{most:g}")


def refuse_boxes(book: Textbook, targets: Targets) -> None:
    """BAD-3. Target boxes are finite, their width and height not negative."""
    for b, target in enumerate(targets):
        boxes = target["boxes"].reshape(-1, 4)
        if not bool(boxes.isfinite().all()):
            raise ValueError(f"targets[{b}]['boxes'] are not finite")
        if bool((boxes[:, 2:] < 0).any()):
            raise ValueError(f"targets[{b}]['boxes'] have a negative width or height")


def taken(book: Textbook, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NUM-5. Labels and boxes of any width, in int64 and float64; ``torch.tensor([])`` is no target."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
    wide["labels"] = target["labels"].long()
    wide["boxes"] = wide["boxes"].reshape(-1, 4)
    return wide


def layers_of(book: Textbook, outputs: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The supervised layers as they come, under the names that a user knows them by."""
    yield "outputs", outputs
    for i, layer in enumerate(outputs.get("aux_outputs", ())):
        yield f"outputs['aux_outputs'][{i}]", layer
    if book.o.has_encoder and book.o.encoder_key in outputs:
        yield f"outputs[{book.o.encoder_key!r}]", outputs[book.o.encoder_key]
