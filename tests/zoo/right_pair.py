"""A module pair without build_criterion, its constructor arguments in an order of its own."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from .ranks import mean_over_ranks


def _hull_and_overlap(p, t):
    """On centre and size: an overlap is bounded by both half sizes and by either whole size."""
    distance = (p[..., :2] - t[..., :2]).abs()
    half = (p[..., 2:] + t[..., 2:]) / 2
    smaller = torch.minimum(p[..., 2:], t[..., 2:])
    larger = torch.maximum(p[..., 2:], t[..., 2:])
    overlap = torch.minimum(half - distance, smaller).clamp(min=0)
    hull = torch.maximum(half + distance, larger)
    return hull.prod(-1), overlap.prod(-1)


def giou(p, t):
    hull, overlap = _hull_and_overlap(p, t)
    union = p[..., 2:].prod(-1) + t[..., 2:].prod(-1) - overlap
    return overlap / union - 1 + union / hull


class HungarianMatcher(nn.Module):
    def __init__(self, cost_giou: float = 2, cost_bbox: float = 5, cost_class: float = 1):
        super().__init__()
        self.scale = {"class": cost_class, "bbox": cost_bbox, "giou": cost_giou}
        if not any(self.scale.values()):
            raise ValueError("cost_class, cost_bbox and cost_giou are all zero")

    @torch.no_grad()
    def forward(self, outputs, targets):
        found = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            # target-major: one row a target
            cost = -self.scale["class"] * logits.softmax(-1).T[target["labels"]]
            cost = cost + self.scale["bbox"] * (target["boxes"][:, None] - boxes[None]).abs().sum(-1)
            cost = cost - self.scale["giou"] * giou(boxes[None], target["boxes"][:, None])
            rows, columns = linear_sum_assignment(cost.double().numpy())
            order = np.argsort(columns)[::-1].copy()  # queries descending
            found.append((torch.from_numpy(columns[order]), torch.from_numpy(rows[order])))
        return found


class SetCriterion(nn.Module):
    def __init__(self, losses, eos_coef, weight_dict, num_classes, matcher):
        super().__init__()
        self.losses, self.eos_coef, self.weight_dict = losses, eos_coef, weight_dict
        self.num_classes, self.matcher = num_classes, matcher

    def _layer(self, layer, targets, divisor):
        pairs = self.matcher({k: layer[k].detach() for k in ("pred_logits", "pred_boxes")}, targets)
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        weighted, weights = logits.sum() * 0, logits.new_zeros(())
        l1 = overlap_loss = boxes.sum() * 0
        for b, (query, target) in enumerate(pairs):
            classes = torch.full((logits.shape[1],), self.num_classes)
            classes[query] = targets[b]["labels"][target]
            weight = torch.where(classes == self.num_classes, self.eos_coef, 1.0).to(logits.dtype)
            weighted = weighted + (weight * F.cross_entropy(logits[b], classes, reduction="none")).sum()
            weights = weights + weight.sum()
            p, t = boxes[b, query], targets[b]["boxes"][target]
            l1 = l1 + F.l1_loss(p, t, reduction="sum")
            overlap_loss = overlap_loss + (1 - giou(p, t)).sum()
        losses = {}
        if "labels" in self.losses:
            losses["loss_ce"] = weighted / weights if pairs else weighted
        if "boxes" in self.losses:
            losses["loss_bbox"], losses["loss_giou"] = l1 / divisor, overlap_loss / divisor
        return losses

    def forward(self, outputs, targets):
        divisor = max(mean_over_ranks(sum(t["labels"].numel() for t in targets)), 1)
        losses = self._layer(outputs, targets, divisor)
        for number, layer in enumerate(outputs.get("aux_outputs") or ()):
            losses |= {f"{name}_{number}": loss for name, loss in self._layer(layer, targets, divisor).items()}
        return losses


def _assemble(num_classes=91, num_decoder_layers=6, eos_coef=0.1, **weights):
    """For the zoo's own check; the suite binds the pair itself."""
    matcher = HungarianMatcher(
        cost_class=weights.get("set_cost_class", 1),
        cost_bbox=weights.get("set_cost_bbox", 5),
        cost_giou=weights.get("set_cost_giou", 2),
    )
    base = {
        "loss_ce": weights.get("ce_loss_coef", 1),
        "loss_bbox": weights.get("bbox_loss_coef", 5),
        "loss_giou": weights.get("giou_loss_coef", 2),
    }
    weight_dict = dict(base)
    for i in range(num_decoder_layers - 1):
        weight_dict |= {f"{k}_{i}": v for k, v in base.items()}
    return SetCriterion(
        losses=weights.get("losses", ("labels", "boxes")),
        eos_coef=eos_coef,
        weight_dict=weight_dict,
        num_classes=num_classes,
        matcher=matcher,
    )
