"""The published shapes: one [B·Q, N] cost for the whole batch, a module pair, 1e-8 inside the logarithms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from .ranks import mean_over_ranks


def box_cxcywh_to_xyxy(x):
    x_c, y_c, w, h = x.unbind(-1)
    return torch.stack([(x_c - 0.5 * w), (y_c - 0.5 * h), (x_c + 0.5 * w), (y_c + 0.5 * h)], dim=-1)


def generalized_box_iou(boxes1, boxes2):
    area1 = (boxes1[:, 2] - boxes1[:, 0]) * (boxes1[:, 3] - boxes1[:, 1])
    area2 = (boxes2[:, 2] - boxes2[:, 0]) * (boxes2[:, 3] - boxes2[:, 1])
    lt = torch.max(boxes1[:, None, :2], boxes2[:, :2])
    rb = torch.min(boxes1[:, None, 2:], boxes2[:, 2:])
    wh = (rb - lt).clamp(min=0)
    inter = wh[:, :, 0] * wh[:, :, 1]
    union = area1[:, None] + area2 - inter
    lt = torch.min(boxes1[:, None, :2], boxes2[:, :2])
    rb = torch.max(boxes1[:, None, 2:], boxes2[:, 2:])
    wh = (rb - lt).clamp(min=0)
    area = wh[:, :, 0] * wh[:, :, 1]
    return inter / union - (area - union) / area


class HungarianMatcher(nn.Module):
    def __init__(self, cost_class=1.0, cost_bbox=1.0, cost_giou=1.0, focal_alpha=None, focal_gamma=2.0):
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.alpha, self.gamma = focal_alpha, focal_gamma  # no alpha: softmax
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("all costs cannot be 0")

    @torch.no_grad()
    def forward(self, outputs, targets):
        bs, num_queries = outputs["pred_logits"].shape[:2]
        if bs == 0:
            return []
        tgt_ids = torch.cat([v["labels"] for v in targets])
        tgt_bbox = torch.cat([v["boxes"] for v in targets])
        logits = outputs["pred_logits"].flatten(0, 1)
        if self.alpha is None:
            cost_class = -logits.softmax(-1)[:, tgt_ids]
        else:
            out_prob = logits.sigmoid()
            neg = (1 - self.alpha) * (out_prob**self.gamma) * (-(1 - out_prob + 1e-8).log())
            pos = self.alpha * ((1 - out_prob) ** self.gamma) * (-(out_prob + 1e-8).log())
            cost_class = pos[:, tgt_ids] - neg[:, tgt_ids]
        out_bbox = outputs["pred_boxes"].flatten(0, 1)
        cost_bbox = torch.cdist(out_bbox, tgt_bbox, p=1)
        cost_giou = -generalized_box_iou(box_cxcywh_to_xyxy(out_bbox), box_cxcywh_to_xyxy(tgt_bbox))
        cost = self.cost_bbox * cost_bbox + self.cost_class * cost_class + self.cost_giou * cost_giou
        cost = cost.view(bs, num_queries, -1).cpu()
        sizes = [len(v["boxes"]) for v in targets]
        indices = [linear_sum_assignment(c[i]) for i, c in enumerate(cost.split(sizes, -1))]
        return [(torch.as_tensor(i, dtype=torch.int64), torch.as_tensor(j, dtype=torch.int64)) for i, j in indices]


def sigmoid_focal_loss(inputs, targets, num_boxes, alpha=0.25, gamma=2):
    prob = inputs.sigmoid()
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = prob * targets + (1 - prob) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss.mean(1).sum() / num_boxes


class SetCriterion(nn.Module):
    def __init__(self, num_classes, matcher, weight_dict, losses, eos_coef=0.1, focal_alpha=None, focal_gamma=2.0):
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict, self.losses = num_classes, matcher, weight_dict, losses
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        if focal_alpha is None:
            empty_weight = torch.ones(num_classes + 1)
            empty_weight[-1] = eos_coef
            self.register_buffer("empty_weight", empty_weight)

    def loss_labels(self, outputs, targets, indices, num_boxes, log=True):
        src_logits = outputs["pred_logits"]
        idx = self._get_src_permutation_idx(indices)
        if indices:
            target_classes_o = torch.cat([t["labels"][J] for t, (_, J) in zip(targets, indices, strict=True)])
        else:
            target_classes_o = torch.zeros(0, dtype=torch.int64)
        background = src_logits.shape[2] - (self.focal_alpha is None)
        target_classes = torch.full(src_logits.shape[:2], background, dtype=torch.int64, device=src_logits.device)
        target_classes[idx] = target_classes_o
        if self.focal_alpha is None:
            weight = self.empty_weight.to(src_logits.dtype)
            loss_ce = (
                F.cross_entropy(src_logits.transpose(1, 2), target_classes, weight) if indices else src_logits.sum()
            )
        else:
            onehot = torch.zeros([*src_logits.shape[:2], src_logits.shape[2] + 1], dtype=src_logits.dtype)
            onehot.scatter_(2, target_classes.unsqueeze(-1), 1)
            onehot = onehot[:, :, :-1]
            loss_ce = sigmoid_focal_loss(src_logits, onehot, num_boxes, self.focal_alpha, self.focal_gamma)
            loss_ce = loss_ce * src_logits.shape[1]
        losses = {"loss_ce": loss_ce}
        if log:
            with torch.no_grad():
                hits = (src_logits[idx].argmax(-1) == target_classes_o).float()
                losses["class_error"] = 100 - 100 * hits.sum() / max(len(hits), 1)
        return losses

    @torch.no_grad()
    def loss_cardinality(self, outputs, targets, indices, num_boxes):
        pred_logits = outputs["pred_logits"]
        tgt_lengths = torch.as_tensor([len(v["labels"]) for v in targets], dtype=torch.float32)
        card_pred = (pred_logits.argmax(-1) != pred_logits.shape[-1] - 1).sum(1)
        error = (card_pred.float() - tgt_lengths).abs().sum()
        return {"cardinality_error": error / max(len(targets), 1)}

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        src_boxes = outputs["pred_boxes"][self._get_src_permutation_idx(indices)]
        if not indices:
            return {"loss_bbox": src_boxes.sum(), "loss_giou": src_boxes.sum()}
        target_boxes = torch.cat([t["boxes"][i] for t, (_, i) in zip(targets, indices, strict=True)], dim=0)
        loss_bbox = F.l1_loss(src_boxes, target_boxes, reduction="none")
        loss_giou = 1 - torch.diag(generalized_box_iou(box_cxcywh_to_xyxy(src_boxes), box_cxcywh_to_xyxy(target_boxes)))
        return {"loss_bbox": loss_bbox.sum() / num_boxes, "loss_giou": loss_giou.sum() / num_boxes}

    def _get_src_permutation_idx(self, indices):
        if not indices:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        batch_idx = torch.cat([torch.full_like(src, i) for i, (src, _) in enumerate(indices)])
        return batch_idx, torch.cat([src for (src, _) in indices])

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        parts = {"labels": self.loss_labels, "cardinality": self.loss_cardinality, "boxes": self.loss_boxes}
        return parts[loss](outputs, targets, indices, num_boxes, **kwargs)

    def forward(self, outputs, targets):
        plain = {k: v for k, v in outputs.items() if k not in ("aux_outputs", "enc_outputs")}
        indices = self.matcher(plain, targets)
        num_boxes = max(mean_over_ranks(sum(len(t["labels"]) for t in targets)), 1.0)
        losses = {}
        for loss in self.losses:
            losses.update(self.get_loss(loss, outputs, targets, indices, num_boxes))
        layers = [(f"_{i}", aux, targets) for i, aux in enumerate(outputs.get("aux_outputs", []))]
        if self.focal_alpha is not None and "enc_outputs" in outputs:
            binary = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            layers.append(("_enc", outputs["enc_outputs"], binary))
        for suffix, layer, layer_targets in layers:
            indices = self.matcher(layer, layer_targets)
            for loss in self.losses:
                kwargs = {"log": False} if loss == "labels" else {}
                part = self.get_loss(loss, layer, layer_targets, indices, num_boxes, **kwargs)
                losses.update({k + suffix: v for k, v in part.items()})
        return losses


def _weights(base, num_decoder_layers, encoder):
    weight_dict = dict(base)
    for i in range(num_decoder_layers - 1):
        weight_dict.update({k + f"_{i}": v for k, v in base.items()})
    if encoder:
        weight_dict.update({k + "_enc": v for k, v in base.items()})
    return weight_dict


def build_criterion(
    num_classes=91,
    num_decoder_layers=6,
    eos_coef=0.1,
    set_cost_class=1,
    set_cost_bbox=5,
    set_cost_giou=2,
    ce_loss_coef=1,
    bbox_loss_coef=5,
    giou_loss_coef=2,
    losses=("labels", "boxes", "cardinality"),
):
    """DETR."""
    matcher = HungarianMatcher(set_cost_class, set_cost_bbox, set_cost_giou)
    base = {"loss_ce": ce_loss_coef, "loss_bbox": bbox_loss_coef, "loss_giou": giou_loss_coef}
    return SetCriterion(num_classes, matcher, _weights(base, num_decoder_layers, False), losses, eos_coef)


def build_deformable(
    num_classes=91,
    num_decoder_layers=6,
    focal_alpha=0.25,
    focal_gamma=2.0,
    set_cost_class=2,
    set_cost_bbox=5,
    set_cost_giou=2,
    ce_loss_coef=2,
    bbox_loss_coef=5,
    giou_loss_coef=2,
    losses=("labels", "boxes", "cardinality"),
):
    """Deformable DETR; with weights for the encoder whether or not there are two stages, as published."""
    matcher = HungarianMatcher(set_cost_class, set_cost_bbox, set_cost_giou, focal_alpha, focal_gamma)
    base = {"loss_ce": ce_loss_coef, "loss_bbox": bbox_loss_coef, "loss_giou": giou_loss_coef}
    weights = _weights(base, num_decoder_layers, True)
    return SetCriterion(num_classes, matcher, weights, losses, focal_alpha=focal_alpha, focal_gamma=focal_gamma)
