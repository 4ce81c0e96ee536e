"""A DETR criterion of one's own, as small as it can be and right: matching, class loss, box losses, every layer."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def build_criterion(
    num_classes=91,
    num_decoder_layers=6,
    eos_coef=0.1,
    set_cost_class=1.0,
    set_cost_bbox=5.0,
    set_cost_giou=2.0,
    ce_loss_coef=1.0,
    bbox_loss_coef=5.0,
    giou_loss_coef=2.0,
):
    return Criterion(
        num_classes,
        eos_coef,
        Matcher(set_cost_class, set_cost_bbox, set_cost_giou),
        weights(num_decoder_layers, ce_loss_coef, bbox_loss_coef, giou_loss_coef),
    )


def weights(num_decoder_layers, ce, bbox, giou):
    suffixes = ["", *(f"_{i}" for i in range(num_decoder_layers - 1))]
    return {f"loss_{k}{s}": w for s in suffixes for k, w in (("ce", ce), ("bbox", bbox), ("giou", giou))}


class Matcher:
    def __init__(self, cost_class, cost_bbox, cost_giou):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    @torch.no_grad()
    def __call__(self, outputs, targets):
        found = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
            wanted = target["boxes"]
            cost = -self.cost_class * logits.softmax(-1)[:, target["labels"]]
            cost = cost + self.cost_bbox * torch.cdist(boxes, wanted, p=1)
            cost = cost - self.cost_giou * giou(boxes[:, None], wanted[None])
            query, index = linear_sum_assignment(cost.cpu())
            found.append((torch.as_tensor(query), torch.as_tensor(index)))
        return found


class Criterion:
    def __init__(self, num_classes, eos_coef, matcher, weight_dict):
        self.num_classes, self.eos_coef, self.matcher, self.weight_dict = num_classes, eos_coef, matcher, weight_dict

    def __call__(self, outputs, targets):
        boxes = number_of_boxes(targets, outputs["pred_logits"].device)
        losses = self.of_layer(outputs, targets, boxes)
        for i, layer in enumerate(outputs.get("aux_outputs", ())):
            losses |= {f"{key}_{i}": value for key, value in self.of_layer(layer, targets, boxes).items()}
        return losses

    def of_layer(self, outputs, targets, boxes):
        pairs = self.matcher(outputs, targets)
        logits = outputs["pred_logits"]
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for image, (query, index) in enumerate(pairs):
            classes[image, query] = targets[image]["labels"][index].to(classes)
        weight = torch.ones(self.num_classes + 1, device=logits.device, dtype=logits.dtype)
        weight[-1] = self.eos_coef
        predicted = torch.cat([b[query] for b, (query, _) in zip(outputs["pred_boxes"], pairs, strict=True)])
        wanted = torch.cat([t["boxes"][index] for t, (_, index) in zip(targets, pairs, strict=True)])
        return {
            "loss_ce": F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight),
            "loss_bbox": self.l1(predicted, wanted, boxes),
            "loss_giou": (1 - giou(predicted, wanted)).sum() / boxes,
        }

    def l1(self, predicted, wanted, boxes):
        return F.l1_loss(predicted, wanted, reduction="sum") / boxes


def number_of_boxes(targets, device):
    """The mean over all ranks, and one at least."""
    count = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def giou(a, b):
    """Of boxes (cx, cy, w, h), each with each as they are broadcast."""
    a, b = corners(a), corners(b)
    inside = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inside
    return inside / union - (hull - union) / hull


def corners(boxes):
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def area(low, high):
    return (high - low).clamp(min=0).prod(-1)
