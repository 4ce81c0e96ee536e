"""Plain functions: no class, no matcher to call, few options in the signature, weights as an attribute."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import logsigmoid, softplus

from .ranks import mean_over_ranks


def _xyxy(boxes):
    return torch.cat([boxes[..., :2] - 0.5 * boxes[..., 2:], boxes[..., :2] + 0.5 * boxes[..., 2:]], -1)


def _overlap(p, t):
    """GIoU as I/U + U/H − 1."""
    p, t = _xyxy(p), _xyxy(t)
    edges = torch.stack(torch.broadcast_tensors(p, t))
    low, high = edges.amin(0), edges.amax(0)
    inter = (low[..., 2:] - high[..., :2]).clamp(0).prod(-1)
    hull = (high[..., 2:] - low[..., :2]).prod(-1)
    union = (p[..., 2:] - p[..., :2]).prod(-1) + (t[..., 2:] - t[..., :2]).prod(-1) - inter
    return inter / union + union / hull - 1


def _weights(layers, ce, encoder):
    names = {"loss_ce": ce, "loss_bbox": 5.0, "loss_giou": 2.0}
    tails = ["", *map("_{}".format, range(layers - 1)), *encoder]
    return {name + tail: weight for tail in tails for name, weight in names.items()}


def _box_sums(boxes, targets, pairs):
    l1 = giou = boxes[:0].sum()
    for b, (q, t) in enumerate(pairs):
        p, wanted = boxes[b][q], targets[b]["boxes"][t]
        l1 = l1 + (p - wanted).abs().sum()
        giou = giou + (1 - _overlap(p, wanted)).sum()
    return l1, giou


def build_detr(num_classes=91, num_decoder_layers=6, eos_coef=0.1):
    """DETR; −log softmax by hand, the weighted mean through index_add."""

    @torch.no_grad()
    def assign(layer, targets):
        pairs = []
        for x, p, t in zip(layer["pred_logits"], layer["pred_boxes"], targets, strict=True):
            probability = torch.exp(x - x.amax(-1, keepdim=True))
            probability = probability / probability.sum(-1, keepdim=True)
            cost = (
                -probability.T[t["labels"]]
                + 5 * (t["boxes"].unsqueeze(1) - p).abs().sum(-1)
                - 2 * _overlap(p, t["boxes"].unsqueeze(1))
            )
            target, query = linear_sum_assignment(cost.cpu())  # one row a target
            pairs.append((torch.as_tensor(query), torch.as_tensor(target)))
        return pairs

    def one(layer, targets, boxes_in_all):
        pairs = assign(layer, targets)
        x = layer["pred_logits"]
        wanted = x.new_zeros(x.shape)
        wanted[..., num_classes] = eos_coef
        for b, (q, t) in enumerate(pairs):
            wanted[b, q, num_classes] = 0
            wanted[b, q, targets[b]["labels"][t]] = 1
        nll = torch.logsumexp(x, -1, keepdim=True) - x
        l1, giou = _box_sums(layer["pred_boxes"], targets, pairs)
        ce = (wanted * nll).sum() / wanted.sum().clamp(min=torch.finfo(x.dtype).tiny)
        return ce, l1 / boxes_in_all, giou / boxes_in_all

    def criterion(outputs, targets):
        boxes_in_all = max(1, mean_over_ranks(sum(t["boxes"].shape[0] for t in targets)))
        every = {"": outputs} | {f"_{i}": a for i, a in enumerate(outputs.get("aux_outputs", []))}
        return {
            f"loss_{name}{tail}": value
            for tail, layer in every.items()
            for name, value in zip(("ce", "bbox", "giou"), one(layer, targets, boxes_in_all), strict=True)
        }

    criterion.weight_dict = _weights(num_decoder_layers, 1.0, [])
    return criterion


def _focal(x, y, alpha, gamma=2.0):
    """From two softplus terms: −log p = softplus(−x), −log(1 − p) = softplus(x)."""
    p = torch.sigmoid(x)
    positive = alpha * torch.pow(1 - p, gamma) * softplus(-x)
    negative = (1 - alpha) * torch.pow(p, gamma) * softplus(x)
    return y * positive + (1 - y) * negative


def build_deformable(num_classes=91, num_decoder_layers=6, focal_alpha=0.25):
    """Deformable DETR; the class loss as all-negative plus a correction at the matched cells; log-sigmoid costs."""

    @torch.no_grad()
    def assign(x, p, t):
        x = x[:, t["labels"]]
        probability = x.sigmoid()
        cost = 2 * (
            -focal_alpha * (1 - probability).square() * logsigmoid(x)
            + (1 - focal_alpha) * probability.square() * logsigmoid(-x)
        )
        cost += 5 * torch.cdist(p, t["boxes"], 1)
        cost -= 2 * _overlap(p.unsqueeze(1), t["boxes"])
        return [torch.as_tensor(i) for i in linear_sum_assignment(cost)]

    def one(layer, targets, divisor):
        x = layer["pred_logits"]
        pairs = [assign(a, b, c) for a, b, c in zip(x.detach(), layer["pred_boxes"].detach(), targets, strict=True)]
        ce = _focal(x, torch.zeros_like(x), focal_alpha).sum()
        for b, (q, t) in enumerate(pairs):
            hit = x[b, q, targets[b]["labels"][t]]
            ones = torch.ones_like(hit)
            ce = ce + (_focal(hit, ones, focal_alpha) - _focal(hit, ones - 1, focal_alpha)).sum()
        l1, giou = _box_sums(layer["pred_boxes"], targets, pairs)
        return ce / divisor, l1 / divisor, giou / divisor

    def criterion(outputs, targets):
        divisor = max(1, mean_over_ranks(sum(map(len, (t["labels"] for t in targets)))))
        found = {}

        def note(layer, tail, wanted):
            for name, value in zip(("ce", "bbox", "giou"), one(layer, wanted, divisor), strict=True):
                found[f"loss_{name}{tail}"] = value

        note(outputs, "", targets)
        for i, layer in enumerate(outputs.get("aux_outputs", [])):
            note(layer, f"_{i}", targets)
        if "enc_outputs" in outputs:
            zeroed = [dict(t, labels=t["labels"].new_zeros(len(t["labels"]))) for t in targets]
            note(outputs["enc_outputs"], "_enc", zeroed)
        return found

    criterion.weight_dict = _weights(num_decoder_layers, 2.0, ["_enc"])
    return criterion


def build_grounding(num_classes=91, num_decoder_layers=6, focal_alpha=0.25):
    """Grounding DINO; each image cut to its own tokens first; weights for either encoder suffix."""

    @torch.no_grad()
    def assign(x, p, t, rows):
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        probability = x.sigmoid()
        pos = -focal_alpha * (1 - probability).square() * (probability + 1e-8).log()
        neg = -(1 - focal_alpha) * probability.square() * (1 - probability + 1e-8).log()
        cost = torch.stack([(pos - neg)[:, row > 0].mean(1) for row in rows], 1)
        cost = cost + 5 * (p[:, None] - t["boxes"]).abs().sum(2) - 2 * _overlap(p[:, None], t["boxes"])
        return [torch.as_tensor(i) for i in linear_sum_assignment(cost)]

    def one(layer, targets, divisor, mask):
        ce, pairs = layer["pred_logits"][:0].sum(), []
        for b, t in enumerate(targets):
            x, rows = layer["pred_logits"][b], t["token_labels"].to(layer["pred_logits"].dtype)
            if mask is not None:
                x, rows = x[:, mask[b]], rows[:, mask[b]]
            q, j = assign(x.detach(), layer["pred_boxes"][b].detach(), t, rows)
            y = torch.zeros_like(x).index_put((q,), rows[j])
            ce = ce + _focal(x, y, focal_alpha).sum()
            pairs.append((q, j))
        l1, giou = _box_sums(layer["pred_boxes"], targets, pairs)
        return {"loss_ce": ce / divisor, "loss_bbox": l1 / divisor, "loss_giou": giou / divisor}

    def criterion(outputs, targets):
        divisor = max(1.0, mean_over_ranks(sum(len(t["boxes"]) for t in targets)))
        mask = outputs.get("text_mask")
        every = [("", outputs)]
        every += [(f"_{i}", layer) for i, layer in enumerate(outputs.get("aux_outputs") or [])]
        every += [
            (tail, outputs[k]) for k, tail in (("enc_outputs", "_enc"), ("interm_outputs", "_interm")) if k in outputs
        ]
        return {k + tail: v for tail, layer in every for k, v in one(layer, targets, divisor, mask).items()}

    criterion.weight_dict = _weights(num_decoder_layers, 2.0, ["_enc", "_interm"])
    return criterion
