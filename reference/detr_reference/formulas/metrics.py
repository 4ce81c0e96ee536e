"""CLS-9, CLS-10: quantities for the log.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detr_reference.formulas.records import Layer, Pairs, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def class_error(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> Tensor:
    """CLS-9. 100 − the percentage of matched queries whose highest logit is their class; 0 where nothing is matched.
    facebookresearch/detr models/detr.py:124, util/misc.py:405."""
    hits = [
        x[m.query].argmax(-1) == t["labels"][m.target] for x, t, m in zip(layer.logits, targets, matches, strict=True)
    ]
    right = torch.cat(hits).double()
    return 100 * (1 - right.sum() / len(right)) if len(right) else torch.zeros((), dtype=torch.float64)


def cardinality_error(book: Textbook, layer: Layer, targets: Targets) -> Tensor:
    """CLS-10. Mean over images of |number of queries taken for objects − n|: by softmax those whose highest logit is
    not class K's (facebookresearch/detr models/detr.py:129-141), else those with a score above one half."""
    if book.o.class_loss == "softmax":
        objects = layer.logits.argmax(-1) != layer.logits.shape[-1] - 1
    else:
        objects = layer.logits.amax(-1) > 0
    counts = torch.tensor([float(len(t["boxes"])) for t in targets], dtype=torch.float64)
    return (objects.sum(-1) - counts).abs().mean()


def logged(
    book: Textbook, every: Sequence[Layer], targets: Targets, matches: Mapping[str, Sequence[Pairs]]
) -> dict[str, Tensor]:
    """KEY-5, LAYER-5. Quantities for logging, without gradient and without weight; class_error of the final layer."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        if book.selected("labels") and book.o.class_loss != "token":
            found["class_error"] = book.class_error(every[0], targets, matches["final"])
        if book.selected("cardinality"):
            found |= {f"cardinality_error{x.suffix}": book.cardinality_error(x, targets) for x in every}
    return found
