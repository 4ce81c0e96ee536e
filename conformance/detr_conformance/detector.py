"""A detector in DETR's shape, small enough to be trained within seconds on one thread."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

WIDTH, HEADS = 48, 4
GRID: Final = 8  # cells of the feature map, each way; each starts a query


class Detector(nn.Module):
    """Three convolutions, then decoder layers whose queries start as the features of the cells of a grid.

    So it learns within a few hundred steps: a query begins where an object may be. ``channels``: class scores of a
    query; ``layers``: decoder layers; the features themselves are read too, as encoder outputs.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_convolved(3, 24, 2), *_convolved(24, WIDTH, 2), *_convolved(WIDTH, WIDTH, 1))
        cells = (torch.arange(GRID) + 0.5) / GRID
        centres = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1).reshape(-1, 2)
        self.centres: Tensor
        self.register_buffer("centres", centres)
        self.anchors = nn.Parameter(centres.logit())
        self.queries = nn.Parameter(0.5 * torch.randn(GRID**2, WIDTH))
        self.decoder = nn.ModuleList(Decoder() for _ in range(layers))
        self.heads = nn.ModuleList(Head(channels) for _ in range(layers + 1))

    def forward(self, images: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """pred_logits [B,Q,channels] and pred_boxes [B,Q,4] of each decoder layer, and of the encoder."""
        memory = self.features(images).flatten(2).transpose(1, 2)
        at, places = _waves(self.anchors.sigmoid()), _waves(self.centres)
        queries, found = memory + self.queries, []
        for layer, head in zip(self.decoder, self.heads, strict=False):
            queries = layer(queries, at, memory, places)
            found.append(head(queries, self.anchors))
        return found, self.heads[-1](memory, self.anchors)


class Decoder(nn.Module):
    """Attention among the queries, attention to the features, and a layer for each query alone."""

    def __init__(self) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.across = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.alone = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, queries: Tensor, at: Tensor, memory: Tensor, places: Tensor) -> Tensor:
        """The queries [B,Q,WIDTH] of the next layer; ``at`` and ``places`` say where queries and features lie."""
        placed = queries + at
        queries = self.norms[0](queries + self.among(placed, placed, queries, need_weights=False)[0])
        read = self.across(queries + at, memory + places, memory, need_weights=False)[0]
        queries = self.norms[1](queries + read)
        found: Tensor = self.norms[2](queries + self.alone(queries))
        return found


class Head(nn.Module):
    """Class logits, and a box that begins at the query's anchor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.classes = nn.Linear(WIDTH, channels)
        self.box = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        with torch.no_grad():
            self.classes.bias.fill_(-2.0)  # most queries are background
            last: Any = self.box[-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, 0.0, -0.6, -0.6]))  # the size of an ordinary shape

    def forward(self, queries: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        """pred_logits [B,Q,channels] and pred_boxes [B,Q,4]."""
        moved = self.box(queries)
        boxes = torch.cat([moved[..., :2] + anchors, moved[..., 2:]], -1).sigmoid()
        return {"pred_logits": self.classes(queries), "pred_boxes": boxes}


def _convolved(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU()]


def _waves(points: Tensor) -> Tensor:
    """Sines and cosines [Q,WIDTH] of places [Q,2] in units of the image."""
    angles = points[..., None] * math.pi * torch.linspace(0.5, GRID, WIDTH // 4)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
