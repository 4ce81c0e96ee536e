"""The contract's formulas, one short function each, in float64, per image and per layer.

``textbook`` is a bundle of these functions: ``dataclasses.replace(textbook, giou=iou)`` is the same book with one
formula changed, and everything that uses the formula follows. Each function takes the book first, so that it reads
``book.giou(a, b)``, and the options of the criterion from ``book.o``. Nothing here is meant to be fast.

Symbols: Q queries, K classes, T text tokens, n targets of one image, N of all, M matched pairs, nb the divisor,
x logits, p = σ(x), y the class target, m a target mask, G denoising groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from detr_reference import prompts, refusals
from detr_reference.options import Options

Formula = Callable[..., Tensor]
Targets = Sequence[Mapping[str, Tensor]]
TERMS = ("ce", "bbox", "giou")


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


# --- boxes (BOX) ----------------------------------------------------------------------------------------------------


def corners(book: Textbook, boxes: Tensor) -> Tensor:
    """BOX-1. cxcywh [...,4] to (x1, y1, x2, y2): cx ∓ w/2, cy ∓ h/2."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def area(book: Textbook, c: Tensor) -> Tensor:
    """Area of corner boxes [...,4]."""
    return (c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1])


def intersection(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    """I: the common area of corner boxes a and b, 0 where they are apart."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def union(book: Textbook, a: Tensor, b: Tensor, common: Tensor) -> Tensor:
    """U = |a| + |b| − I."""
    return book.area(a) + book.area(b) - common


def enclosing(book: Textbook, a: Tensor, b: Tensor) -> Tensor:
    """H: the area of the smallest box around both."""
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    sides = high - low
    return sides[..., 0] * sides[..., 1]


def share(book: Textbook, part: Tensor, whole: Tensor) -> Tensor:
    """BOX-2, 8. part / whole, the ε option added; 0/0, of boxes without area, is 0."""
    whole = whole + book.o.giou_eps
    return part / (whole + (whole == 0))


def giou(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
    """BOX-2. I/U − (H − U)/H of cxcywh boxes, broadcast; the ε option is added to both denominators.

    Rezatofighi 2019, algorithm 1; facebookresearch/detr util/box_ops.py:41.
    """
    a, b = book.corners(pred), book.corners(target)
    common = book.intersection(a, b)
    both, hull = book.union(a, b, common), book.enclosing(a, b)
    return book.share(common, both) - book.share(hull - both, hull)


def l1(book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
    """COST-6, NORM-1. |Δcx| + |Δcy| + |Δw| + |Δh| of cxcywh boxes, broadcast."""
    return (pred - target).abs().sum(-1)


def minus_log_sigmoid(z: Tensor) -> Tensor:
    """−log σ(z), exact also where σ(z) rounds to 0 or 1 (torch's own threshold of 20 loses 2e-9 in float64)."""
    return F.softplus(-z, threshold=40)


# --- matching (COST, MATCH) -----------------------------------------------------------------------------------------


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
            book.assign(book.cost(x, b, t)) if len(t["boxes"]) else Pairs(_none(), _none())
            for x, b, t in zip(layer.logits, layer.boxes, targets, strict=True)
        ]


def indices(book: Textbook, matches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
    """MATCH-6. The matching as a criterion's matcher returns it: one (query, target) an image."""
    return [(m.query, m.target) for m in matches]


# --- classification (CLS, TOKEN) ------------------------------------------------------------------------------------


def class_weight(book: Textbook, y: Tensor) -> Tensor:
    """CLS-1. 1 for a class, eos_coef for class K (no object)."""
    return torch.where(y == book.o.num_classes, _float64(book.o.eos_coef), _float64(1.0))


def softmax_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """CLS-1. The class of every query of one image [Q]: its target's, or K."""
    y = torch.full((len(x),), book.o.num_classes)
    y[pairs.query] = target["labels"][pairs.target]
    return y


def softmax_loss(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> Tensor:
    """CLS-1. Σ w_y·nll / Σ w_y over all B·Q. facebookresearch/detr models/detr.py:108-127."""
    images = zip(layer.logits, targets, matches, strict=True)
    y = torch.cat([book.softmax_class_target(x, t, m) for x, t, m in images])
    nll = -layer.logits.flatten(0, 1).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    w = book.class_weight(y)
    return (w * nll).sum() / book.softmax_divisor(w, targets)


def softmax_divisor(book: Textbook, w: Tensor, targets: Targets) -> Tensor:
    """CLS-1, 2. Σ of the class weights, not the number of boxes."""
    return w.sum()


def focal_term(book: Textbook, x: Tensor, y: Tensor) -> Tensor:
    """CLS-4, 5. α_t(1−p_t)^γ(−log p_t) elementwise, y in {0, 1}. Lin 2017, eq. 5."""
    z = torch.where(y > 0, x, -x)  # p_t = σ(z)
    return book.alpha_weight(y) * book.focusing(z) * minus_log_sigmoid(z)


def alpha_weight(book: Textbook, y: Tensor) -> Tensor:
    """CLS-4. α for positives, 1 − α for negatives."""
    return torch.where(y > 0, _float64(book.o.focal_alpha), _float64(1 - book.o.focal_alpha))


def focusing(book: Textbook, z: Tensor) -> Tensor:
    """CLS-5. (1 − p_t)^γ of z = logit of p_t."""
    return (-z).sigmoid() ** book.o.focal_gamma


def focal_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """CLS-3. One-hot rows [Q,K]; an unmatched query's row is all zero."""
    y = torch.zeros_like(x)
    y[pairs.query, target["labels"][pairs.target]] = 1
    return y


def token_class_target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """TOKEN-1. [Q,T]: 1 on every token of the class; an unmatched query's row is all zero."""
    y = torch.zeros_like(x)
    y[pairs.query] = (target["token_labels"][pairs.target] > 0).to(y.dtype)
    return y


def in_loss(book: Textbook, x: Tensor, mask: Tensor | None) -> Tensor:
    """TOKEN-2. Which entries of [Q,C] have a part in the loss: every class, or the tokens inside text_mask [T]."""
    whole = torch.ones_like(x, dtype=torch.bool)
    return whole if mask is None else whole & mask.bool()


def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    """CLS-3, 6. The sum over queries and channels of one image."""
    return book.focal_term(x[inside], y[inside]).sum()


def focal_loss(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> Tensor:
    """CLS-3. Σ over all B·Q·C of the focal term / divisor. fundamentalvision/Deformable-DETR deformable_detr.py:220."""
    kind = book.token_class_target if book.o.class_loss == "token" else book.focal_class_target
    total = torch.zeros((), dtype=torch.float64)
    for b, (x, t, m) in enumerate(zip(layer.logits, targets, matches, strict=True)):
        total = total + book.focal_image(x, kind(x, t, m), book.in_loss(x, None if mask is None else mask[b]))
    return total / book.class_divisor(nb, matches)


def class_divisor(book: Textbook, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
    """NORM-3. nb, or by option the layer's own matched pairs (Open-GroundingDino)."""
    if book.o.class_divisor == "matches":
        return torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)
    return nb


# --- losses of a layer (NORM) ---------------------------------------------------------------------------------------


def num_boxes(book: Textbook, targets: Targets) -> Tensor:
    """NORM-3, 5, DIST-1. nb = max(mean of N over the ranks, 1). facebookresearch/detr models/detr.py:227-231."""
    return book.over_ranks(torch.tensor(sum(len(t["boxes"]) for t in targets), dtype=torch.float64)).clamp(min=1)


def over_ranks(book: Textbook, n: Tensor) -> Tensor:
    """DIST-1. The mean of a number over the ranks of torch.distributed; the number itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return n
    total = n.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def matched_boxes(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
    """The matched predictions and their targets, both [M,4]."""
    pred = torch.cat([b[m.query] for b, m in zip(layer.boxes, matches, strict=True)])
    wanted = torch.cat([t["boxes"][m.target] for t, m in zip(targets, matches, strict=True)])
    return pred, wanted


def loss_ce(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> Tensor:
    """The class loss of the profile."""
    return (
        book.softmax_loss(layer, targets, matches)
        if book.o.class_loss == "softmax"
        else book.focal_loss(layer, targets, matches, nb, mask)
    )


def loss_bbox(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """NORM-1. Σ_pairs |Δ|₁ / nb, from [M,4] each. facebookresearch/detr models/detr.py:143-162."""
    return book.l1(pred, wanted).sum() / nb


def loss_giou(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """NORM-1. Σ_pairs (1 − GIoU) / nb, from [M,4] each."""
    return (1 - book.giou(pred, wanted)).sum() / nb


def layer_losses(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """KEY-1, 7. The trained losses of one layer under their keys."""
    found: dict[str, Tensor] = {}
    if book.selected("labels"):
        found[f"loss_ce{layer.suffix}"] = book.loss_ce(layer, targets, matches, nb, mask)
    if book.selected("boxes"):
        pred, wanted = book.matched_boxes(layer, targets, matches)
        found[f"loss_bbox{layer.suffix}"] = book.loss_bbox(pred, wanted, nb)
        found[f"loss_giou{layer.suffix}"] = book.loss_giou(pred, wanted, nb)
    return found | book.mask_losses(layer, targets, matches, nb)


def selected(book: Textbook, name: str) -> bool:
    """KEY-7. True where ``losses`` names this group: labels, boxes, masks, cardinality."""
    return name in book.o.losses


# --- masks (MASK) ---------------------------------------------------------------------------------------------------


def layer_masks(book: Textbook, name: str, predictions: Mapping[str, Any]) -> Tensor | None:
    """LAYER-5. The mask logits [B,Q,h,w] that a layer is trained with, where "masks" is in losses: the final one's."""
    wanted = name == "final" and "masks" in book.o.losses
    return predictions["pred_masks"].double() if wanted else None


def mask_size(book: Textbook, targets: Targets) -> tuple[int, int]:
    """MASK-1. The largest height and the largest width of the batch's masks, in pixels."""
    sizes = [t["masks"].shape[1:] for t in targets if t["masks"].ndim == 3]
    return max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1)


def padded(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """MASK-1. Masks [n,H_b,W_b] to [n,H,W]: background below and to the right."""
    whole = torch.zeros(len(masks), *size, dtype=torch.float64)
    whole[:, : masks.shape[1], : masks.shape[2]] = masks
    return whole


def interpolation(book: Textbook, wanted: int, given: int) -> Tensor:
    """MASK-1. [wanted,given]: how much of each given pixel is in each wanted one, along one side of a mask.

    Linear between the two pixel centres that (i + ½)·given/wanted − ½, the wanted one's centre, lies between
    (align_corners False); beyond the outermost centres it is the outermost pixel's.
    """
    at = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * given / wanted - 0.5).clamp(0, given - 1)
    return (1 - (at[:, None] - torch.arange(given)).abs()).clamp(min=0)


def resized(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """MASK-1. Mask logits [M,h,w] to [M,H,W], bilinearly."""
    rows, columns = (book.interpolation(new, old) for new, old in zip(size, masks.shape[1:], strict=True))
    return rows @ masks @ columns.T


def matched_masks(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
    """MASK-1. The matched mask logits and their targets, both [M,H,W]. facebookresearch/detr models/detr.py:164-191."""
    assert layer.masks is not None
    size = book.mask_size(targets)
    pred = torch.cat([x[m.query] for x, m in zip(layer.masks, matches, strict=True)])
    images = [(t["masks"], m) for t, m in zip(targets, matches, strict=True) if len(m)]
    wanted = [book.padded(own[m.target], size) for own, m in images]
    return book.resized(pred, size), torch.cat([torch.zeros(0, *size, dtype=torch.float64), *wanted])


def mask_focal_term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
    """MASK-1. α_t(1−p_t)²(−log p_t) of every pixel, α = .25 whatever the class loss has; m in 0..1.

    facebookresearch/detr models/segmentation.py, sigmoid_focal_loss.
    """
    other = m * (-x).sigmoid() + (1 - m) * x.sigmoid()  # 1 − p_t
    nll = m * minus_log_sigmoid(x) + (1 - m) * minus_log_sigmoid(-x)
    return (0.25 * m + 0.75 * (1 - m)) * other**2 * nll


def dice(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
    """MASK-1. 1 − (2Σpm + 1)/(Σp + Σm + 1) over the pixels of each pair: [M,H,W] to [M]. Milletari 2016, smoothed as in
    facebookresearch/detr models/segmentation.py, dice_loss."""
    p, m = x.sigmoid().flatten(1), m.flatten(1)
    return 1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)


def loss_mask(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """MASK-1, 2. Σ_pairs of the mean over pixels / nb, from [M,H,W] each."""
    return book.mask_focal_term(pred, wanted).flatten(1).mean(1).sum() / nb


def loss_dice(book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
    """MASK-1, 2. Σ_pairs of the dice loss / nb, from [M,H,W] each."""
    return book.dice(pred, wanted).sum() / nb


def mask_losses(
    book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs], nb: Tensor
) -> dict[str, Tensor]:
    """MASK-1. The mask losses of one layer under their keys; none of a layer without masks."""
    if layer.masks is None:
        return {}
    pred, wanted = book.matched_masks(layer, targets, matches)
    return {
        f"loss_mask{layer.suffix}": book.loss_mask(pred, wanted, nb),
        f"loss_dice{layer.suffix}": book.loss_dice(pred, wanted, nb),
    }


# --- contrastive denoising (DN) -------------------------------------------------------------------------------------


def denoising_layers(book: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
    """DN-1. The layers of denoising queries in ``outputs["dn_meta"]``: dn, dn_aux0, dn_aux1, …; none without them."""
    meta = outputs.get("dn_meta") or {}
    if not book.o.denoising or meta.get("output_known_lbs_bboxes") is None:
        return []
    last = meta["output_known_lbs_bboxes"]
    named = [("dn", "_dn", last)] + [(f"dn_aux{i}", f"_dn_{i}", x) for i, x in enumerate(last.get("aux_outputs", ()))]
    groups = int(meta["num_dn_group"])
    return [
        Layer(name, suffix, x["pred_logits"].double(), x["pred_boxes"].double(), groups=groups)
        for name, suffix, x in named
    ]


def group_slots(book: Textbook, layer: Layer) -> int:
    """DN-1. Slots of a group; its first half are positives, its second half negatives."""
    return layer.boxes.shape[1] // layer.groups


def positive_slots(book: Textbook, layer: Layer, n: int) -> Tensor:
    """DN-1. [G,n]: the query that reconstructs each of an image's n targets in each group: the group's first n slots.

    IDEA-Research/DINO models/dino/dino.py:502-541.
    """
    return torch.arange(layer.groups)[:, None] * book.group_slots(layer) + torch.arange(n)


def denoising_pairs(book: Textbook, layer: Layer, targets: Targets) -> list[Pairs]:
    """DN-1, 2. The positives of each image and their targets, known without a matching."""
    slots = [book.positive_slots(layer, len(t["boxes"])) for t in targets]
    return [Pairs(s.flatten(), torch.arange(s.shape[1]).repeat(len(s))) for s in slots]


def denoising_divisor(book: Textbook, layer: Layer, nb: Tensor) -> Tensor:
    """DN-1. nb · G: every target is reconstructed once a group."""
    return nb * layer.groups


def denoising_losses(book: Textbook, outputs: Mapping[str, Any], targets: Targets, nb: Tensor) -> dict[str, Tensor]:
    """DN-1. Class and box losses of the denoising queries; negatives and padding are queries without a target."""
    found: dict[str, Tensor] = {}
    for layer in book.denoising_layers(outputs):
        pairs, divisor = book.denoising_pairs(layer, targets), book.denoising_divisor(layer, nb)
        found |= book.layer_losses(layer, targets, pairs, divisor, book.layer_mask(layer, outputs))
    return found


# --- layers, weights, the whole (LAYER, KEY) ------------------------------------------------------------------------


def layers(book: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
    """LAYER-1, 4. Every supervised layer of ``outputs``: final, aux0, aux1, …, enc."""
    o = book.o
    named = [("final", "", outputs)]
    named += [(f"aux{i}", f"{o.aux_suffix}{i}", x) for i, x in enumerate(outputs.get("aux_outputs", ()))]
    if o.has_encoder and o.encoder_key in outputs:
        named.append(("enc", o.encoder_suffix, outputs[o.encoder_key]))
    return [
        Layer(name, suffix, x["pred_logits"].double(), x["pred_boxes"].double(), book.layer_masks(name, x))
        for name, suffix, x in named
    ]


def encoder_targets(book: Textbook, targets: Targets) -> Targets:
    """LAYER-4. The encoder's targets: their own class, or class 0 (Deformable-DETR deformable_detr.py:373-379)."""
    if book.o.encoder_targets == "real":
        return targets
    return [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]


def layer_targets(book: Textbook, layer: Layer, targets: Targets) -> Targets:
    """The targets that a layer is matched and trained with."""
    return book.encoder_targets(targets) if layer.name == "enc" else targets


def layer_match(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Targets) -> list[Pairs]:
    """MATCH-7. A layer is matched on its own predictions (``every``: all layers of the call)."""
    return book.match(layer, targets)


def layer_mask(book: Textbook, layer: Layer, outputs: Mapping[str, Any]) -> Tensor | None:
    """LAYER-6. text_mask [B,T] holds for every layer; None where the profile has no text."""
    return outputs.get("text_mask") if book.o.class_loss == "token" else None


def layer_num_boxes(book: Textbook, layer: Layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
    """NORM-4. One nb serves all layers."""
    return nb


def class_error(book: Textbook, layer: Layer, targets: Targets, matches: Sequence[Pairs]) -> Tensor:
    """CLS-9. 100 − the percentage of matched queries whose highest logit is their class; 0 where nothing is matched.
    facebookresearch/detr models/detr.py:124, util/misc.py:405."""
    hits = [
        x[m.query].argmax(-1) == t["labels"][m.target] for x, t, m in zip(layer.logits, targets, matches, strict=True)
    ]
    right = torch.cat(hits).double()
    return 100 * (1 - right.sum() / len(right)) if len(right) else torch.zeros((), dtype=torch.float64)


def cardinality_error(book: Textbook, layer: Layer, targets: Targets) -> Tensor:
    """CLS-10. Mean over images of |number of queries taken for objects − n|: by softmax those whose highest logit is
    not class K's (facebookresearch/detr models/detr.py:129-141), else those with a score above one half."""
    if book.o.class_loss == "softmax":
        objects = layer.logits.argmax(-1) != layer.logits.shape[-1] - 1
    else:
        objects = layer.logits.amax(-1) > 0
    counts = torch.tensor([float(len(t["boxes"])) for t in targets], dtype=torch.float64)
    return (objects.sum(-1) - counts).abs().mean()


def logged(
    book: Textbook, every: Sequence[Layer], targets: Targets, matches: Mapping[str, Sequence[Pairs]]
) -> dict[str, Tensor]:
    """KEY-5, LAYER-5. Quantities for logging, without gradient and without weight; class_error of the final layer."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        if book.selected("labels") and book.o.class_loss != "token":
            found["class_error"] = book.class_error(every[0], targets, matches["final"])
        if book.selected("cardinality"):
            found |= {f"cardinality_error{x.suffix}": book.cardinality_error(x, targets) for x in every}
    return found


def losses(
    book: Textbook,
    outputs: Mapping[str, Any],
    targets: Targets,
    given: Mapping[str, Sequence[Pairs]],
) -> Result:
    """All losses of one call. A layer named in ``given`` takes that matching instead of its own."""
    found: dict[str, Tensor] = {}
    matches: dict[str, list[Pairs]] = {}
    book.refuse(outputs, targets)
    targets = [book.taken(t) for t in targets]
    every = book.layers(outputs)
    nb = book.num_boxes(targets)
    for layer in every:
        own = book.layer_targets(layer, targets)
        pairs = list(given[layer.name]) if layer.name in given else book.layer_match(layer, every, own)
        matches[layer.name] = pairs
        divisor = book.layer_num_boxes(layer, nb, pairs)
        found |= book.layer_losses(layer, own, pairs, divisor, book.layer_mask(layer, outputs))
    found |= book.denoising_losses(outputs, targets, nb)
    return Result(book.scaled(found) | book.logged(every, targets, matches), matches)


def scaled(book: Textbook, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """KEY-5. The losses as they are, or by option with their weights (lyuwenyu/RT-DETR rtdetr_criterion.py)."""
    return {k: v * book.weights().get(k, 1.0) for k, v in found.items()} if book.o.weighted else found


def in_mode(book: Textbook, training: bool) -> Textbook:
    """PURE-4. The same formulas in training and in evaluation."""
    return book


def compiled(book: Textbook) -> Textbook:
    """PURE-5. The same formulas inside a function that the caller compiles."""
    return book


def state(book: Textbook) -> dict[str, Tensor]:
    """PURE-6. What the criterion keeps from call to call, as state_dict has it: nothing."""
    return {}


def copied(book: Textbook) -> Textbook:
    """PURE-6. The book of a copy of the criterion."""
    return book


def weights(book: Textbook) -> dict[str, float]:
    """KEY-4. The weight of every trained loss; a suffix keeps its base's weight. facebookresearch/detr detr.py:334."""
    o = book.o
    base = {"loss_ce": o.ce_loss_coef} if book.selected("labels") else {}
    base |= {"loss_bbox": o.bbox_loss_coef, "loss_giou": o.giou_loss_coef} if book.selected("boxes") else {}
    suffixes = ["", *(f"{o.aux_suffix}{i}" for i in range(o.num_decoder_layers - 1))]
    if o.has_encoder:
        suffixes.append(o.encoder_suffix)
    if o.denoising:
        suffixes += ["_dn", *(f"_dn_{i}" for i in range(o.num_decoder_layers - 1))]
    masks = {"loss_mask": o.mask_loss_coef, "loss_dice": o.dice_loss_coef} if "masks" in o.losses else {}
    return {key + suffix: weight for suffix in suffixes for key, weight in base.items()} | masks


def brought(book: Textbook, x: Tensor) -> Tensor:
    """DEVICE-1. An input where the book computes: on the CPU, in its own dtype."""
    return x.cpu()


def placed(book: Textbook, loss: Tensor, like: Tensor) -> Tensor:
    """DEVICE-2. A loss on the device of the outputs."""
    return loss.to(like.device)


@dataclass(frozen=True, eq=False)
class Textbook:
    """The bundle. ``o``: the options; every other field: a formula, called as ``book.formula(…)``."""

    o: Options = field(default_factory=Options)
    corners: Formula = corners
    area: Formula = area
    intersection: Formula = intersection
    union: Formula = union
    enclosing: Formula = enclosing
    share: Formula = share
    giou: Formula = giou
    l1: Formula = l1
    softmax_cost: Formula = softmax_cost
    focal_difference: Formula = focal_difference
    focal_cost: Formula = focal_cost
    token_cost: Formula = token_cost
    class_cost: Formula = class_cost
    cost: Formula = cost
    assign: Callable[..., Pairs] = assign
    match: Callable[..., list[Pairs]] = match
    class_weight: Formula = class_weight
    softmax_class_target: Formula = softmax_class_target
    softmax_loss: Formula = softmax_loss
    softmax_divisor: Formula = softmax_divisor
    focal_term: Formula = focal_term
    alpha_weight: Formula = alpha_weight
    focusing: Formula = focusing
    focal_class_target: Formula = focal_class_target
    token_class_target: Formula = token_class_target
    in_loss: Formula = in_loss
    focal_image: Formula = focal_image
    focal_loss: Formula = focal_loss
    class_divisor: Formula = class_divisor
    num_boxes: Formula = num_boxes
    over_ranks: Formula = over_ranks
    matched_boxes: Callable[..., tuple[Tensor, Tensor]] = matched_boxes
    loss_ce: Formula = loss_ce
    loss_bbox: Formula = loss_bbox
    loss_giou: Formula = loss_giou
    layer_losses: Callable[..., dict[str, Tensor]] = layer_losses
    layer_masks: Callable[..., Tensor | None] = layer_masks
    mask_size: Callable[..., tuple[int, int]] = mask_size
    padded: Formula = padded
    interpolation: Formula = interpolation
    resized: Formula = resized
    matched_masks: Callable[..., tuple[Tensor, Tensor]] = matched_masks
    mask_focal_term: Formula = mask_focal_term
    dice: Formula = dice
    loss_mask: Formula = loss_mask
    loss_dice: Formula = loss_dice
    mask_losses: Callable[..., dict[str, Tensor]] = mask_losses
    denoising_layers: Callable[..., list[Layer]] = denoising_layers
    group_slots: Callable[..., int] = group_slots
    positive_slots: Formula = positive_slots
    denoising_pairs: Callable[..., list[Pairs]] = denoising_pairs
    denoising_divisor: Formula = denoising_divisor
    denoising_losses: Callable[..., dict[str, Tensor]] = denoising_losses
    layers: Callable[..., list[Layer]] = layers
    encoder_targets: Callable[..., Targets] = encoder_targets
    layer_targets: Callable[..., Targets] = layer_targets
    layer_match: Callable[..., list[Pairs]] = layer_match
    layer_mask: Callable[..., Tensor | None] = layer_mask
    layer_num_boxes: Formula = layer_num_boxes
    selected: Callable[..., bool] = selected
    class_error: Formula = class_error
    cardinality_error: Formula = cardinality_error
    logged: Callable[..., dict[str, Tensor]] = logged
    scaled: Callable[..., dict[str, Tensor]] = scaled
    in_mode: Callable[..., Textbook] = in_mode
    compiled: Callable[..., Textbook] = compiled
    state: Callable[..., dict[str, Tensor]] = state
    copied: Callable[..., Textbook] = copied
    phrases: Callable[..., list[prompts.Span]] = prompts.phrases
    class_spans: Callable[..., list[prompts.Span]] = prompts.class_spans
    span_tokens: Callable[..., list[int]] = prompts.span_tokens
    refuse_lost_classes: Callable[..., None] = prompts.refuse_lost_classes
    positive_map: Formula = prompts.positive_map
    refuse: Callable[..., None] = refusals.refuse
    refuse_weights: Callable[..., None] = refusals.refuse_weights
    refuse_missing: Callable[..., None] = refusals.refuse_missing
    refuse_lengths: Callable[..., None] = refusals.refuse_lengths
    refuse_labels: Callable[..., None] = refusals.refuse_labels
    refuse_boxes: Callable[..., None] = refusals.refuse_boxes
    taken: Callable[..., dict[str, Tensor]] = refusals.taken
    losses: Callable[..., Result] = losses
    indices: Callable[..., list[tuple[Tensor, Tensor]]] = indices
    brought: Formula = brought
    placed: Formula = placed
    weights: Callable[..., dict[str, float]] = weights

    def __post_init__(self) -> None:
        # a formula becomes a method of this very bundle; replace() hands over methods of the old one, hence __func__
        for f in fields(self):
            if f.name != "o":
                formula = getattr(self, f.name)
                object.__setattr__(self, f.name, MethodType(getattr(formula, "__func__", formula), self))

    def under(self, options: Options) -> Textbook:
        """The same formulas under other options."""
        return replace(self, o=options)

    def __call__(
        self, outputs: Mapping[str, Any], targets: Targets, given: Mapping[str, Sequence[Pairs]] | None = None
    ) -> Result:
        """All losses and matchings of one call; ``given`` fixes the matching of the layers it names."""
        return self.losses(outputs, targets, given or {})


def _float64(value: float) -> Tensor:
    """A number as it is: torch.where alone would round it to float32."""
    return torch.tensor(value, dtype=torch.float64)


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


textbook = Textbook()
