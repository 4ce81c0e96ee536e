"""What the formulas hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Targets = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The matching of one image: ``query[i]`` and ``target[i]`` are a pair. Both are 1-D int64, equally long."""

    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True, eq=False)
class Layer:
    """One supervised layer: its name (``final``, ``aux0``, …, ``enc``), loss suffix, and predictions.

    logits [B,Q,C], boxes [B,Q,4] cxcywh in units of the image, masks [B,Q,h,w] logits where masks are trained.
    Of denoising queries (``dn``, ``dn_aux0``, …) there are ``groups``, each of Q / groups slots.
    """

    name: str
    suffix: str
    logits: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    groups: int = 0


@dataclass(frozen=True, eq=False)
class Result:
    """What the book returns for one call: losses by key, and the matching of each layer by its name."""

    losses: dict[str, Tensor]
    matches: dict[str, list[Pairs]]


def exact(value: float) -> Tensor:
    """A number as it is: torch.where alone would round it to float32."""
    return torch.tensor(value, dtype=torch.float64)


def none() -> Tensor:
    """No index."""
    return torch.zeros(0, dtype=torch.int64)
