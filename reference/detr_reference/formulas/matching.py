"""COST, MATCH: what a match costs, and the cheapest assignment.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_reference.formulas.boxes import minus_log_sigmoid
from detr_reference.formulas.records import Layer, Pairs, Targets, none

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def softmax_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """COST-2. −softmax(x)[label] over all K + 1 channels: [Q,C] to [Q,n]."""
    return -x.softmax(-1)[:, target["labels"]]


def focal_difference(book: Textbook, x: Tensor) -> Tensor:
    """COST-3. α(1−p)^γ(−log p) − (1−α)p^γ(−log(1−p)) elementwise."""
    alpha, gamma = book.o.cost_alpha, book.o.cost_gamma
    p, q = x.sigmoid(), (-x).sigmoid()
    return alpha * q**gamma * minus_log_sigmoid(x) - (1 - alpha) * p**gamma * minus_log_sigmoid(-x)


def focal_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """COST-3. The focal difference at the label: [Q,K] to [Q,n]."""
    return book.focal_difference(x[:, target["labels"]])


def token_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """COST-4. The focal difference averaged over the tokens of the target's class: [Q,T] to [Q,n]."""
    tokens = target["token_labels"] > 0
    return torch.stack([book.focal_difference(x[:, own]).mean(-1) for own in tokens], -1)


def class_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """The class cost of the profile: logits [Q,C] to [Q,n]."""
    kinds = {"softmax": book.softmax_cost, "focal": book.focal_cost, "token": book.token_cost}
    return kinds[book.o.class_loss](x, target)


def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """COST-1. λ_cls·cls + λ_bbox·L1 − λ_giou·GIoU of one image: [Q,n]. facebookresearch/detr models/matcher.py:77."""
    o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
    return (
        o.set_cost_class * book.class_cost(x, target)
        + o.set_cost_bbox * book.l1(pred, wanted)
        - o.set_cost_giou * book.giou(pred, wanted)
    )


def assign(book: Textbook, costs: Tensor) -> Pairs:
    """MATCH-1, 2. The one-to-one assignment of least total cost: [Q,n] to min(Q,n) pairs (Kuhn 1955)."""
    query, target = linear_sum_assignment(costs.cpu().numpy())
    return Pairs(torch.from_numpy(query), torch.from_numpy(target))


def match(book: Textbook, layer: Layer, targets: Targets) -> list[Pairs]:
    """MATCH-3. One assignment an image, on that image's predictions and targets alone."""
    with torch.no_grad():
        return [
            book.assign(book.cost(x, b, t)) if len(t["boxes"]) else Pairs(none(), none())
            for x, b, t in zip(layer.logits, layer.boxes, targets, strict=True)
        ]


def indices(book: Textbook, matches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
    """MATCH-6. The matching as a criterion's matcher returns it: one (query, target) an image."""
    return [(m.query, m.target) for m in matches]
