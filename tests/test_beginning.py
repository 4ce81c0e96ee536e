"""The project's own beginning: two Grounding DINO criterions that were wrong, and what exactly is found in each."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from detr_conformance import judge

COSTS = {"class": 1.0, "bbox": 5.0, "giou": 2.0}


def giou(a, b):
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (a, b))
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union - (hull - union) / hull


def focal(x, y, alpha, gamma):
    p = x.sigmoid()
    p_t = p * y + (1 - p) * (1 - y)
    weight = (alpha * y + (1 - alpha) * (1 - y)) * (1 - p_t) ** gamma
    return (weight * F.binary_cross_entropy_with_logits(x, y, reduction="none")).sum()


class Simplified:
    """No matching: the first M queries. Token logits max-pooled to one a class. Neither auxiliary nor encoder loss."""

    def __init__(self, num_decoder_layers: int, alpha: float, gamma: float) -> None:
        self.alpha, self.gamma = alpha, gamma
        self.weight_dict = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        suffixes = [*(f"_{i}" for i in range(num_decoder_layers - 1)), "_enc"]
        self.weight_dict |= {k + s: v for s in suffixes for k, v in list(self.weight_dict.items()) if k.count("_") == 1}

    def match(self, logits, boxes, target):
        first = torch.arange(min(len(boxes), len(target["boxes"])))
        return first, first

    def class_loss(self, logits, mask, query, target, tokens):
        pooled = logits.masked_fill(~mask, -torch.inf).amax(-1)
        return focal(pooled, torch.zeros_like(pooled).index_fill(0, query, 1.0), self.alpha, self.gamma)

    def box_losses(self, pred, wanted, nb):
        return (pred - wanted).abs().sum() / nb, (1 - giou(pred, wanted)).sum() / nb

    def layer(self, layer, text_mask, targets, nb):
        pred, wanted, ce = [], [], torch.zeros(())
        for b, target in enumerate(targets):
            logits, boxes = layer["pred_logits"][b], layer["pred_boxes"][b]
            query, t = self.match(logits, boxes, target)
            ce = ce + self.class_loss(logits, text_mask[b], query, t, target["token_labels"])
            pred.append(boxes[query])
            wanted.append(target["boxes"][t])
        bbox, box_giou = self.box_losses(torch.cat(pred), torch.cat(wanted), nb)
        return {"loss_ce": ce / nb, "loss_bbox": bbox, "loss_giou": box_giou}

    def __call__(self, outputs: dict[str, Any], targets: list[Any]) -> dict[str, torch.Tensor]:
        nb = max(sum(len(t["labels"]) for t in targets), 1)
        return self.layer(outputs, outputs["text_mask"], targets, nb)


class Proper(Simplified):
    """Matches, and has all layers; but the focal loss is taken on matched pairs, and L1 with its default mean."""

    @torch.no_grad()
    def match(self, logits, boxes, target):
        x, tokens = logits, target["token_labels"]
        positive = self.alpha * (-x).sigmoid() ** self.gamma * F.softplus(-x)
        negative = (1 - self.alpha) * x.sigmoid() ** self.gamma * F.softplus(x)
        mean = (tokens / tokens.sum(-1, keepdim=True)).T
        cost_class = (positive - negative).nan_to_num(posinf=0.0, neginf=0.0) @ mean
        cost_giou = -giou(boxes[:, None], target["boxes"][None])
        cost = cost_class + 5 * torch.cdist(boxes, target["boxes"], p=1) + 2 * cost_giou
        return tuple(map(torch.as_tensor, linear_sum_assignment(cost)))

    def class_loss(self, logits, mask, query, target, tokens):
        matched = logits[query][:, mask]
        return focal(matched, tokens[target][:, mask], self.alpha, self.gamma)

    def box_losses(self, pred, wanted, nb):
        return F.l1_loss(pred, wanted), (1 - giou(pred, wanted)).sum() / nb

    def __call__(self, outputs: dict[str, Any], targets: list[Any]) -> dict[str, torch.Tensor]:
        losses = super().__call__(outputs, targets)
        nb = max(sum(len(t["labels"]) for t in targets), 1)
        layers = {f"_{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))}
        if "enc_outputs" in outputs:
            layers["_enc"] = outputs["enc_outputs"]
        for suffix, layer in layers.items():
            losses |= {k + suffix: v for k, v in self.layer(layer, outputs["text_mask"], targets, nb).items()}
        return losses


def factory(kind):
    def build_criterion(num_classes=80, num_decoder_layers=6, focal_alpha=0.25, focal_gamma=2.0):
        return kind(num_decoder_layers, focal_alpha, focal_gamma)

    return build_criterion


def findings(kind):
    report = judge(factory(kind), profile="grounding-dino", effort="quick")
    return {f.clause for f in report.findings if f.verdict == "fail"}


def test_the_simplified_one_neither_matches_nor_trains_tokens_and_layers():
    assert findings(Simplified) == {
        "MATCH-2",  # the first queries are taken
        "TOKEN-1",  # tokens are pooled
        "LAYER-1",  # no auxiliary losses
        "LAYER-4",  # no encoder losses
        "DIST-1",  # the divisor is of the own rank
    }


def test_the_proper_one_forgets_the_background_and_averages_l1():
    assert findings(Proper) == {
        "TOKEN-1",  # unmatched queries are never trained as negatives
        "NORM-1",  # L1 with its default mean
        "NORM-5",  # which is not a number without targets
        "DIST-1",  # the divisor is of the own rank
    }
