"""DINO: real classes at the encoder, 1e-6 in both GIoU denominators, contrastive denoising where it is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from .ranks import mean_over_ranks


def _corners(b):
    return torch.cat((b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2), -1)


def _giou(p, t):
    p, t = _corners(p), _corners(t)
    inter = (torch.min(p[..., 2:], t[..., 2:]) - torch.max(p[..., :2], t[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(p[..., 2:], t[..., 2:]) - torch.min(p[..., :2], t[..., :2])).clamp(min=0).prod(-1)
    union = (p[..., 2:] - p[..., :2]).prod(-1) + (t[..., 2:] - t[..., :2]).prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


class DinoMatcher(nn.Module):
    def __init__(self, cost_class, cost_bbox, cost_giou, alpha, gamma):
        super().__init__()
        self.factors, self.alpha, self.gamma = (cost_class, cost_bbox, cost_giou), alpha, gamma

    @torch.no_grad()
    def forward(self, outputs, targets):
        pairs = []
        for x, b, t in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            p = x.sigmoid()
            neg = (1 - self.alpha) * p**self.gamma * (-(1 - p + 1e-8).log())
            pos = self.alpha * (1 - p) ** self.gamma * (-(p + 1e-8).log())
            parts = (
                (pos - neg)[:, t["labels"]],
                torch.cdist(b, t["boxes"], p=1),
                -_giou(b[:, None], t["boxes"][None]),
            )
            cost = sum(f * part for f, part in zip(self.factors, parts, strict=True))
            pairs.append(tuple(torch.as_tensor(i, dtype=torch.int64) for i in linear_sum_assignment(cost)))
        return pairs


class DinoCriterion(nn.Module):
    def __init__(self, matcher, weight_dict, alpha, gamma):
        super().__init__()
        self.matcher, self.weight_dict, self.alpha, self.gamma = matcher, weight_dict, alpha, gamma

    def _losses(self, layer, targets, pairs, divisor, suffix):
        x, boxes = layer["pred_logits"], layer["pred_boxes"]
        hot = torch.zeros_like(x)
        p, t = [boxes.reshape(-1, 4)[:0]], [boxes.detach().reshape(-1, 4)[:0]]
        for b, (q, j) in enumerate(pairs):
            hot[b, q, targets[b]["labels"][j]] = 1
            p.append(boxes[b, q])
            t.append(targets[b]["boxes"][j])
        p, t = torch.cat(p), torch.cat(t)
        bce = F.binary_cross_entropy_with_logits(x, hot, reduction="none")
        missed = torch.where(hot.bool(), 1 - x.sigmoid(), x.sigmoid())
        ce = bce * missed**self.gamma * torch.where(hot.bool(), self.alpha, 1 - self.alpha)
        off = (p - t).abs()
        parts = {
            "loss_ce": ce.sum() / divisor,
            "loss_bbox": off.sum() / divisor,
            "loss_giou": (1 - _giou(p, t)).sum() / divisor,
            "loss_xy": off[:, :2].sum().detach() / divisor,
            "loss_hw": off[:, 2:].sum().detach() / divisor,
        }
        return {k + suffix: v for k, v in parts.items()}

    def forward(self, outputs, targets):
        nb = max(mean_over_ranks(sum(len(t["labels"]) for t in targets)), 1.0)
        layers = [("", outputs)]
        layers += [(f"_{i}", layer) for i, layer in enumerate(outputs.get("aux_outputs", []))]
        if "interm_outputs" in outputs:
            layers.append(("_interm", outputs["interm_outputs"]))
        losses = {}
        for suffix, layer in layers:
            losses |= self._losses(layer, targets, self.matcher(layer, targets), nb, suffix)
        meta = outputs.get("dn_meta")
        if self.training and meta and "output_known_lbs_bboxes" in meta:
            losses |= self._denoising(meta, targets, nb)
        return losses

    def _denoising(self, meta, targets, nb):
        groups = meta["num_dn_group"]
        single = meta["pad_size"] // groups
        pairs = []
        for t in targets:
            j = torch.arange(len(t["labels"]))
            pairs.append((torch.cat([g * single + j for g in range(groups)]), j.repeat(groups)))
        known = meta["output_known_lbs_bboxes"]
        losses = self._losses(known, targets, pairs, nb * groups, "_dn")
        for i, layer in enumerate(known.get("aux_outputs", [])):
            losses |= self._losses(layer, targets, pairs, nb * groups, f"_dn_{i}")
        return losses


def build_criterion(
    num_classes=91,
    num_decoder_layers=6,
    focal_alpha=0.25,
    focal_gamma=2.0,
    set_cost_class=2.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    ce_loss_coef=1.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
):
    if not (set_cost_class or set_cost_bbox or set_cost_giou):
        raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou are all 0")
    matcher = DinoMatcher(set_cost_class, set_cost_bbox, set_cost_giou, focal_alpha, focal_gamma)
    base = {"loss_ce": ce_loss_coef, "loss_bbox": bbox_loss_coef, "loss_giou": giou_loss_coef}
    layers = range(num_decoder_layers - 1)
    suffixes = ["", *(f"_{i}" for i in layers), "_interm", "_dn", *(f"_dn_{i}" for i in layers)]
    weights = {name + suffix: weight for suffix in suffixes for name, weight in base.items()}
    return DinoCriterion(matcher, weights, focal_alpha, focal_gamma)
