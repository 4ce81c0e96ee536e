"""Everything in float64 inside, cast back at the end; per image, plain loops over matched pairs; three profiles."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import softplus

from .ranks import mean_over_ranks


def _focal(x, y, alpha, gamma):
    """FL through exp(γ·log(1 − p_t)), which stays finite everywhere."""
    z = torch.where(y > 0, x, -x)
    weight = torch.where(y > 0, alpha, 1 - alpha)
    return weight * torch.exp(-gamma * softplus(z)) * softplus(-z)


def _giou(p, t):
    (pcx, pcy, pw, ph), (tcx, tcy, tw, th) = p.unbind(-1), t.unbind(-1)
    left, right = pcx - pw / 2, pcx + pw / 2
    top, bottom = pcy - ph / 2, pcy + ph / 2
    tleft, tright = tcx - tw / 2, tcx + tw / 2
    ttop, tbottom = tcy - th / 2, tcy + th / 2
    iw = (torch.min(right, tright) - torch.max(left, tleft)).clamp(min=0)
    ih = (torch.min(bottom, tbottom) - torch.max(top, ttop)).clamp(min=0)
    hw = torch.max(right, tright) - torch.min(left, tleft)
    hh = torch.max(bottom, tbottom) - torch.min(top, ttop)
    inter, hull = iw * ih, hw * hh
    union = pw * ph + tw * th - inter
    tiny = 1e-300
    return inter / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


class _Double:
    def __init__(self, family, layers, costs, weights, eos=0.1, alpha=0.25, gamma=2.0):
        self.family, self.costs, self.eos, self.alpha, self.gamma = family, costs, eos, alpha, gamma
        if not any(costs):
            raise ValueError("set_cost_class, set_cost_bbox, set_cost_giou: not all may be 0")
        suffixes = [""] + [f"_{i}" for i in range(layers - 1)] + (["_enc"] if family != "detr" else [])
        self.weight_dict = {}
        for suffix in suffixes:
            for name, weight in zip(("ce", "bbox", "giou"), weights, strict=True):
                self.weight_dict[f"loss_{name}{suffix}"] = weight

    def _class_cost(self, x, target):
        if self.family == "detr":
            return -torch.softmax(x, -1)[:, target["labels"]]
        if self.family == "grounding-dino":
            rows = target["token_labels"].double()
            used = rows.any(0)
            x, rows = x[:, used], rows[:, used]
        one, zero = torch.ones((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
        difference = _focal(x, one, self.alpha, self.gamma) - _focal(x, zero, self.alpha, self.gamma)
        if self.family == "grounding-dino":
            return (difference[:, None, :] * rows).sum(-1) / rows.sum(-1)
        return difference[:, target["labels"]]

    def _match(self, x, boxes, target):
        t = target["boxes"].double()
        cost = self.costs[0] * self._class_cost(x, target)
        cost = cost + self.costs[1] * torch.cdist(boxes, t, p=1)
        cost = cost - self.costs[2] * _giou(boxes[:, None], t[None])
        return linear_sum_assignment(cost.numpy())

    def matcher(self, outputs, targets):
        """Pairs in int32."""
        pairs = []
        for x, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            q, j = self._match(x.detach().double(), boxes.detach().double(), target)
            pairs.append((torch.tensor(q, dtype=torch.int32), torch.tensor(j, dtype=torch.int32)))
        return pairs

    def _layer(self, layer, targets, nb, mask):
        dtype = layer["pred_logits"].dtype
        logits, boxes = layer["pred_logits"].double(), layer["pred_boxes"].double()
        matched = self.matcher(layer, targets)
        ce_top, ce_bottom = logits.new_zeros(()), 0.0
        bbox = giou = boxes.new_zeros(())
        for b, (query, which) in enumerate(matched):
            x = logits[b]
            if self.family == "detr":
                classes = torch.full((len(x),), x.shape[-1] - 1)
                classes[query.long()] = targets[b]["labels"][which.long()]
                for q, y in enumerate(classes.tolist()):
                    w = self.eos if y == x.shape[-1] - 1 else 1.0
                    ce_top = ce_top + w * (torch.logsumexp(x[q], 0) - x[q, y])
                    ce_bottom += w
            else:
                y = torch.zeros(x.shape, dtype=torch.float64)
                if self.family == "grounding-dino":
                    y[query.long()] = targets[b]["token_labels"].double()[which.long()]
                    if mask is not None:
                        x, y = x[:, mask[b]], y[:, mask[b]]
                else:
                    y[query.long(), targets[b]["labels"][which.long()]] = 1.0
                ce_top = ce_top + _focal(x, y, self.alpha, self.gamma).sum()
                ce_bottom = nb
            for q, j in zip(query.tolist(), which.tolist(), strict=True):
                p, t = boxes[b, q], targets[b]["boxes"][j].double()
                bbox = bbox + (p - t).abs().sum()
                giou = giou + 1 - _giou(p, t)
        ce = ce_top / (ce_bottom or 1.0) + self._thread(logits)
        keep = self._thread(boxes)
        return {
            "loss_ce": ce.to(dtype),
            "loss_bbox": (bbox / nb + keep).to(dtype),
            "loss_giou": (giou / nb + keep).to(dtype),
        }

    @staticmethod
    def _thread(x):
        """A zero that is part of the graph."""
        return x[..., :0].sum()

    def __call__(self, outputs, targets):
        nb = max(mean_over_ranks(math.fsum(len(t["boxes"]) for t in targets)), 1.0)
        mask = outputs.get("text_mask")
        result = self._layer(outputs, targets, nb, mask)
        for i, aux in enumerate(outputs.get("aux_outputs", ())):
            result.update({f"{k}_{i}": v for k, v in self._layer(aux, targets, nb, mask).items()})
        if self.family != "detr" and "enc_outputs" in outputs:
            if self.family == "deformable-detr":
                targets = [{"labels": t["labels"] * 0, "boxes": t["boxes"]} for t in targets]
            result.update({f"{k}_enc": v for k, v in self._layer(outputs["enc_outputs"], targets, nb, mask).items()})
        return result


def build_detr(
    num_decoder_layers=6,
    eos_coef=0.1,
    set_cost_class=1.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    ce_loss_coef=1.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
):
    costs = (set_cost_class, set_cost_bbox, set_cost_giou)
    weights = (ce_loss_coef, bbox_loss_coef, giou_loss_coef)
    return _Double("detr", num_decoder_layers, costs, weights, eos=eos_coef)


def build_deformable(
    num_decoder_layers=6,
    focal_alpha=0.25,
    focal_gamma=2.0,
    set_cost_class=2.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    ce_loss_coef=2.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
):
    costs = (set_cost_class, set_cost_bbox, set_cost_giou)
    weights = (ce_loss_coef, bbox_loss_coef, giou_loss_coef)
    return _Double("deformable-detr", num_decoder_layers, costs, weights, alpha=focal_alpha, gamma=focal_gamma)


def build_grounding(
    num_decoder_layers=6,
    focal_alpha=0.25,
    focal_gamma=2.0,
    set_cost_class=1.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    ce_loss_coef=2.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
):
    costs = (set_cost_class, set_cost_bbox, set_cost_giou)
    weights = (ce_loss_coef, bbox_loss_coef, giou_loss_coef)
    return _Double("grounding-dino", num_decoder_layers, costs, weights, alpha=focal_alpha, gamma=focal_gamma)
