"""Checks the zoo without the suite: every right criterion equals the formulas, every wrong one shows somewhere.

    python tests/zoo/check_zoo.py [word in an id …]

The expected values come from `expect` below: scalar loops in float64, and exhaustive search for small assignments.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from zoo import RIGHT, WRONG
else:
    from . import RIGHT, WRONG

DEFAULTS = {
    "detr": {"eos_coef": 0.1},
    "deformable-detr": {"focal_alpha": 0.25, "focal_gamma": 2.0},
    "grounding-dino": {"focal_alpha": 0.25, "focal_gamma": 2.0},
    "dino": {"focal_alpha": 0.25, "focal_gamma": 2.0},
}
COSTS = {"detr": (1, 5, 2), "deformable-detr": (2, 5, 2), "grounding-dino": (1, 5, 2), "dino": (2, 5, 2)}
WEIGHTS = {"detr": (1, 5, 2), "deformable-detr": (2, 5, 2), "grounding-dino": (2, 5, 2), "dino": (1, 5, 2)}
ENCODER = {
    "deformable-detr": ("enc_outputs", "_enc"),
    "grounding-dino": ("enc_outputs", "_enc"),
    "dino": ("interm_outputs", "_interm"),
}
for name, options in DEFAULTS.items():
    options |= dict(zip(("set_cost_class", "set_cost_bbox", "set_cost_giou"), COSTS[name], strict=True))
    options |= dict(zip(("ce_loss_coef", "bbox_loss_coef", "giou_loss_coef"), WEIGHTS[name], strict=True))


@dataclass
class Case:
    name: str
    profile: str
    options: dict
    outputs: dict
    targets: list
    kinks: bool = False  # copied boxes: the subgradient is anybody's choice
    values: bool = True  # False: only structure is compared
    expected: dict = field(default_factory=dict)


# -- cases ---------------------------------------------------------------------------------------------------
def boxes_of(g, n, kind="plain"):
    xy = torch.rand(n, 2, generator=g)
    wh = 0.05 + 0.5 * torch.rand(n, 2, generator=g)
    if kind == "small":
        wh = 10 ** (-3 + 2 * torch.rand(n, 2, generator=g))
    if kind == "inside":
        xy = wh / 2 + xy * (1 - wh)
    return torch.cat([xy, wh], -1)


def draw(
    profile, seed, *, images=None, counts=None, queries=None, aux=None, encoder=None, scale=None, kind="plain", **o
):
    g = torch.Generator().manual_seed(seed)
    r = random.Random(seed)
    images = r.randint(1, 4) if images is None else images
    queries = r.randint(2, 9) if queries is None else queries
    classes = r.randint(3, 6)
    counts = [r.choice((0, 1, 2, 3, 4, 6)) for _ in range(images)] if counts is None else counts
    aux = r.choice((0, 1, 2, 3, 5)) if aux is None else aux
    scale = r.choice((1.0, 2.0, 4.0)) if scale is None else scale
    tokens = r.randint(6, 10)
    channels = {"detr": classes + 1, "grounding-dino": tokens}.get(profile, classes)
    lengths = [r.randint(5, tokens) for _ in range(images)]
    mask = torch.arange(tokens)[None] < torch.tensor(lengths).reshape(-1, 1)
    targets = []
    for n, length in zip(counts, lengths, strict=True):
        t = {
            "labels": torch.randint(0, classes, (n,), generator=g),
            "boxes": boxes_of(g, n, kind),
        }
        if profile == "grounding-dino":
            rows = {}
            for c in range(classes):
                size = r.randint(1, 3)
                rows[c] = torch.zeros(tokens).index_fill(0, torch.tensor(r.sample(range(length), size)), 1.0)
            t["token_labels"] = torch.stack([rows[int(c)] for c in t["labels"]]) if n else torch.zeros(0, tokens)
        targets.append(t)

    infinite = r.random() < 0.6

    def layer(q):
        x = scale * torch.randn(images, q, channels, generator=g)
        if profile == "grounding-dino" and infinite:
            x = x.masked_fill(~mask[:, None], -torch.inf)
        p = torch.stack([boxes_of(g, q, kind) for _ in range(images)]) if images else torch.zeros(0, q, 4)
        return {"pred_logits": x, "pred_boxes": p}

    outputs = layer(queries)
    if aux or r.random() < 0.5:
        outputs["aux_outputs"] = [layer(queries) for _ in range(aux)]
    encoder = r.random() < 0.7 if encoder is None else encoder
    if encoder and profile in ENCODER:
        outputs[ENCODER[profile][0]] = layer(queries + r.choice((-1, 2, 3, 5)))
    if profile == "grounding-dino":
        outputs["text_mask"] = mask
    options = DEFAULTS[profile] | {"num_classes": classes, "num_decoder_layers": aux + 1} | o
    return Case(f"{kind}-{seed}", profile, options, outputs, targets)


def varied(profile, seed):
    """Options off their defaults."""
    r = random.Random(1000 + seed)
    o = {"ce_loss_coef": 2.5, "bbox_loss_coef": 3.5, "giou_loss_coef": 1.5}
    costs = r.choice(
        ((3.0, 1.5, 0.5), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 2.0, 0.0), (4.0, 1.0, 3.0))
    )
    o |= dict(zip(("set_cost_class", "set_cost_bbox", "set_cost_giou"), costs, strict=True))
    if profile == "detr":
        o["eos_coef"] = r.choice((0.3, 0.5))
    else:
        o |= {"focal_alpha": r.choice((0.4, 0.6, 0.9)), "focal_gamma": r.choice((1.5, 3.0, 1.0))}
    return o


def cases_of(profile):
    cases = [draw(profile, seed) for seed in range(30)]
    cases += [draw(profile, 100 + seed, **varied(profile, seed)) for seed in range(22)]
    cases += [draw(profile, 200 + seed, kind="small") for seed in range(5)]
    cases += [draw(profile, 250 + seed, kind="inside", images=3, queries=8, counts=[3, 2, 4]) for seed in range(5)]
    for seed in range(270, 276):  # predictions near their targets, large and small
        case = draw(profile, seed, kind="small" if seed % 2 else "inside", images=2, queries=5, counts=[3, 2], aux=1)
        g = torch.Generator().manual_seed(seed)
        for x in layers_of(case):
            for b, t in enumerate(case.targets):
                near, n = t["boxes"], min(len(t["boxes"]), x["pred_boxes"].shape[1])
                near = near + 0.3 * near[:, 2:].repeat(1, 2) * (torch.rand(near.shape, generator=g) - 0.5)
                x["pred_boxes"][b, :n] = near[:n]
        case.name = f"near-{seed}"
        cases.append(case)
    cases.append(draw(profile, 300, images=2, counts=[0, 0], aux=2, encoder=True))
    cases.append(draw(profile, 301, images=1, counts=[0], aux=0, encoder=False))
    cases.append(draw(profile, 302, images=3, counts=[0, 2, 0], aux=1, encoder=True))
    cases.append(draw(profile, 303, images=2, queries=3, counts=[6, 5], aux=2, encoder=True))
    cases.append(draw(profile, 304, images=3, queries=6, counts=[1, 0, 3], aux=5, encoder=True))
    cases.append(draw(profile, 305, images=1, queries=1, counts=[1], aux=0))
    cases.append(draw(profile, 306, images=2, queries=40, counts=[9, 12], aux=1))
    cases.append(draw(profile, 307, images=0, counts=[], aux=1, encoder=False))
    for seed in (310, 311, 312):  # wide logits
        case = draw(profile, seed, images=2, queries=6, counts=[2, 3], aux=1, encoder=True, scale=1.0)
        for x in layers_of(case):
            r = torch.Generator().manual_seed(seed)
            wide = torch.tensor([-110.0, -20.0, 0.0, 20.0, 110.0])[
                torch.randint(0, 5, x["pred_logits"].shape, generator=r)
            ]
            x["pred_logits"] = torch.where(x["pred_logits"].isinf(), x["pred_logits"], wide)
        case.name = f"wide-{seed}"
        cases.append(case)
    for seed in (313, 314):  # wide logits that do not decide the matching
        g = torch.Generator().manual_seed(seed)
        case = draw(profile, seed, images=3, queries=6, counts=[2, 3, 0], aux=1, encoder=True, set_cost_class=0)
        for x in layers_of(case):
            wide = torch.tensor([-110.0, -20.0, 0.0, 20.0, 110.0])
            wide = wide[torch.randint(0, 5, x["pred_logits"].shape, generator=g)]
            x["pred_logits"] = torch.where(x["pred_logits"].isinf(), x["pred_logits"], wide)
        case.name = f"wide-{seed}"
        cases.append(case)
    case = draw(profile, 315, images=2, queries=6, counts=[2, 1], aux=1, encoder=True)  # round numbers, zero logits
    for x in layers_of(case):
        x["pred_logits"] = (x["pred_logits"] * 2).round() / 2
    case.name = "round-315"
    cases.append(case)
    case = draw(profile, 320, images=2, queries=6, counts=[2, 3], aux=1)  # identical boxes
    for x in layers_of(case):
        for b, t in enumerate(case.targets):
            n = min(len(t["boxes"]), x["pred_boxes"].shape[1])
            x["pred_boxes"][b, :n] = t["boxes"][:n]
    case.name, case.kinks = "copied-320", True
    cases.append(case)
    case = draw(profile, 321, images=2, queries=5, counts=[4, 2], aux=1)  # twin targets, twin queries
    for t in case.targets:
        for value in t.values():
            value[1] = value[0]
    for x in layers_of(case):
        for value in (x["pred_logits"], x["pred_boxes"]):
            value[:, 2] = value[:, 0]
    case.name = "twins-321"
    cases.append(case)
    case = draw(profile, 322, images=2, queries=5, counts=[2, 2], aux=1)  # no area at all
    for x in layers_of(case):
        for b, t in enumerate(case.targets):
            t["boxes"][:, 2:] = 0
            x["pred_boxes"][b, :2] = t["boxes"][:2]
    case.name, case.values = "areas-322", False
    cases.append(case)
    return cases


def layers_of(case):
    o = case.outputs
    extra = [o[k] for k in ("enc_outputs", "interm_outputs") if k in o]
    return [o, *o.get("aux_outputs", []), *extra]


# -- the formulas, in float64, one number at a time ----------------------------------------------------------
def box_edges(b):
    return b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2


def giou(p, t, eps=0.0):
    a, b = box_edges(p), box_edges(t)
    big, small = (torch.maximum, torch.minimum) if isinstance(p, torch.Tensor) else (max, min)
    zero = p[0] * 0
    inter = big(small(a[2], b[2]) - big(a[0], b[0]), zero) * big(small(a[3], b[3]) - big(a[1], b[1]), zero)
    hull = (big(a[2], b[2]) - small(a[0], b[0])) * (big(a[3], b[3]) - small(a[1], b[1]))
    union = p[2] * p[3] + t[2] * t[3] - inter
    if bool(hull + eps == 0):
        return zero - 1
    return (inter / (union + eps) if bool(union + eps > 0) else zero) - (hull - union) / (hull + eps)


def log1pexp(z):
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def focal_cost(x, alpha, gamma, inside):
    """pos − neg; `inside` is what is added within the logarithms."""
    x = max(x, -1e4)
    p, q = math.exp(-log1pexp(-x)), math.exp(-log1pexp(x))
    log_p = -log1pexp(-x) if inside == 0 else math.log(p + inside)
    log_q = -log1pexp(x) if inside == 0 else math.log(q + inside)
    return alpha * q**gamma * -log_p - (1 - alpha) * p**gamma * -log_q


def cost_matrix(profile, o, x, boxes, t, inside):
    matrix = np.zeros((len(boxes), len(t["boxes"])))
    x = x.double()
    for q in range(len(boxes)):
        row = x[q].tolist()
        if profile == "detr":
            top = max(row)
            table = [-math.exp(v - top) / sum(math.exp(u - top) for u in row) for v in row]
        else:
            table = [focal_cost(v, o["focal_alpha"], o["focal_gamma"], inside) for v in row]
        p = boxes[q].tolist()
        for j, box in enumerate(t["boxes"].tolist()):
            if profile == "grounding-dino":
                mine = t["token_labels"][j].nonzero().flatten().tolist()
                cls = sum(table[i] for i in mine) / len(mine)
            else:
                cls = table[int(t["labels"][j])]
            l1 = sum(abs(a - b) for a, b in zip(p, box, strict=True))
            overlap = giou(p, box, 1e-6 if profile == "dino" else 0.0)
            matrix[q, j] = o["set_cost_class"] * cls + o["set_cost_bbox"] * l1 - o["set_cost_giou"] * overlap
    return matrix


def cheapest(matrix):
    """The best pairs, and how much dearer the next best assignment is."""
    q, t = linear_sum_assignment(matrix)
    best = matrix[q, t].sum()
    if max(matrix.shape) <= 6:
        wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        every = [
            sum(wide[i, j] for j, i in enumerate(p)) for p in itertools.permutations(range(len(wide)), wide.shape[1])
        ]
        assert abs(min(every) - best) < 1e-9, (min(every), best)
    second = np.inf
    for i, j in zip(q, t, strict=True):
        other = matrix.copy()
        other[i, j] = 1e9
        a, b = linear_sum_assignment(other)
        second = min(second, other[a, b].sum() - best)
    return list(zip(q.tolist(), t.tolist(), strict=True)), second


def focal_cell(x, y, alpha, gamma):
    z = x if y else -x
    log_hit = -torch.nn.functional.softplus(-z)
    log_miss = -torch.nn.functional.softplus(z)
    return (alpha if y else 1 - alpha) * torch.exp(gamma * log_miss) * -log_hit


def expect_layer(case, x, boxes, targets, nb, mask):
    o, profile = case.options, case.profile
    zero = x[..., :0].sum() + boxes[..., :0].sum()
    l1, overlap, top, bottom, clear = zero, zero, zero, 0.0, True
    for b, t in enumerate(targets):
        pairs = {}
        if len(t["boxes"]):
            found = []
            for inside in (0.0,) if profile == "detr" else (0.0, 1e-8, 1e-12):
                m = cost_matrix(profile, o, x[b].detach(), boxes[b].detach(), t, inside)
                answer, gap = cheapest(m)
                found.append(answer)
                clear &= gap > 2e-4
            clear &= all(sorted(f) == sorted(found[0]) for f in found)
            pairs = dict(found[0])
        for q, j in pairs.items():
            box = t["boxes"][j].double()
            l1 = l1 + (boxes[b, q] - box).abs().sum()
            overlap = overlap + 1 - giou(boxes[b, q], box, 1e-6 if profile == "dino" else 0.0)
        for q in range(len(x[b])):
            if profile == "detr":
                y = int(t["labels"][pairs[q]]) if q in pairs else x.shape[-1] - 1
                w = 1.0 if q in pairs else o["eos_coef"]
                top, bottom = top + w * (torch.logsumexp(x[b, q], 0) - x[b, q, y]), bottom + w
                continue
            for c in range(x.shape[-1]):
                if profile == "grounding-dino":
                    if not mask[b, c]:
                        continue
                    y = q in pairs and bool(t["token_labels"][pairs[q], c])
                else:
                    y = q in pairs and int(t["labels"][pairs[q]]) == c
                top = top + focal_cell(x[b, q, c], y, o["focal_alpha"], o["focal_gamma"])
    divisor = (bottom or 1.0) if profile == "detr" else nb
    return {"loss_ce": top / divisor, "loss_bbox": l1 / nb, "loss_giou": overlap / nb}, clear


def expect(case):
    """Values, gradients of each loss's own layer, and whether the matching is beyond doubt."""
    if case.expected:
        return case.expected
    nb = max(sum(len(t["boxes"]) for t in case.targets), 1)
    mask = case.outputs.get("text_mask")
    named = [("", case.outputs)] + [(f"_{i}", a) for i, a in enumerate(case.outputs.get("aux_outputs", []))]
    key, tail = ENCODER.get(case.profile, ("", ""))
    if key in case.outputs:
        named.append((tail, case.outputs[key]))
    values, grads, clear, pairs = {}, {}, True, 0
    for suffix, layer in named:
        targets = case.targets
        if suffix == "_enc" and case.profile == "deformable-detr":
            targets = [{**t, "labels": t["labels"] * 0} for t in targets]
        x = layer["pred_logits"].double().clone().requires_grad_()
        b = layer["pred_boxes"].double().clone().requires_grad_()
        losses, sure = expect_layer(case, x, b, targets, nb, mask)
        clear &= sure
        pairs += sum(min(len(t["boxes"]), b.shape[1]) for t in targets)
        for k, v in losses.items():
            values[k + suffix] = float(v)
            grads[k + suffix] = [
                torch.zeros_like(i) if d is None else d
                for i, d in zip(
                    (x, b), torch.autograd.grad(v, (x, b), retain_graph=True, allow_unused=True), strict=True
                )
            ]
    least = min(
        [float(i["pred_boxes"][..., 2:].min()) for i in layers_of(case) if i["pred_boxes"].numel()], default=1.0
    )
    case.expected = {"values": values, "grads": grads, "clear": clear and case.values, "pairs": pairs, "side": least}
    return case.expected


# -- what a criterion does with a case -----------------------------------------------------------------------
class Differs(Exception):
    """Where the criterion is not what the formulas say."""


def built(factory, case):
    names = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    defaults = DEFAULTS[case.profile] | {"num_classes": case.options["num_classes"]}
    for name, value in case.options.items():
        if not takes_all and name not in names and name in defaults and value != defaults[name]:
            return None
    return factory(**{k: v for k, v in case.options.items() if takes_all or k in names})


def fresh(case):
    outputs, targets = copy.deepcopy(case.outputs), copy.deepcopy(case.targets)
    leaves = {}
    probe = Case("", "", {}, outputs, targets)
    key, tail = ENCODER.get(case.profile, ("", ""))
    suffixes = ["", *(f"_{i}" for i in range(len(outputs.get("aux_outputs", [])))), *([tail] if key in outputs else [])]
    for suffix, layer in zip(suffixes, layers_of(probe), strict=True):
        leaves[suffix] = [layer[k].requires_grad_() for k in ("pred_logits", "pred_boxes")]
    return outputs, targets, leaves


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def off(got, want, tolerance):
    return not math.isfinite(got) or abs(got - want) > tolerance


def weights_expected(case):
    base = dict(
        zip(
            ("loss_ce", "loss_bbox", "loss_giou"),
            (case.options[k] for k in ("ce_loss_coef", "bbox_loss_coef", "giou_loss_coef")),
            strict=True,
        )
    )
    keys = expect(case)["values"]
    return {k: base["_".join(k.split("_")[:2])] for k in keys}


def judge(factory, case):
    """Raises Differs, or whatever the criterion raises."""
    e = expect(case)
    criterion = built(factory, case)
    if criterion is None:
        return
    for key, weight in weights_expected(case).items():
        if criterion.weight_dict.get(key) != weight:
            raise Differs(f"weight of {key}")
    logged = ("class_error", "cardinality_error", "loss_xy", "loss_hw")
    if any(k.startswith(logged) for k in criterion.weight_dict):
        raise Differs("a logged quantity has a weight")
    outputs, targets, leaves = fresh(case)
    torch.manual_seed(case.options["num_classes"])
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    losses = criterion(outputs, targets)
    if not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate():
        raise Differs("global random state")
    for before, after in ((case.outputs, outputs), (case.targets, targets)):
        if not same(before, after):
            raise Differs("inputs changed")
    extra = {k for k in losses if not k.startswith(logged)} - set(e["values"])
    if extra or set(e["values"]) - set(losses):
        raise Differs(f"keys: {sorted(extra)} too many, {sorted(set(e['values']) - set(losses))} missing")
    for k, v in losses.items():
        if not isinstance(v, torch.Tensor) or v.shape != () or v.dtype != torch.float32:
            raise Differs(f"{k} is no float32 scalar tensor")
        if k not in e["values"] and v.requires_grad:
            raise Differs(f"{k} is logged, with gradient")
        if k in e["values"] and not (v.requires_grad or case.outputs["pred_logits"].numel() == 0):
            raise Differs(f"{k} has no graph")
        if not torch.isfinite(v):
            raise Differs(f"{k} is not finite")
    slack = 3e-7 / max(e["side"], 1e-3)
    for k, want in e["values"].items() if e["clear"] else ():
        loose = 3e-6 * (1 + abs(want)) + (slack * (1 + e["pairs"]) if "giou" in k else 0)
        if off(float(losses[k].detach()), want, loose):
            raise Differs(f"{k}: want {want:.7g}, got {float(losses[k].detach()):.7g}")
    every = [x for pair in leaves.values() for x in pair]
    for k in e["values"]:
        found = torch.autograd.grad(losses[k], every, retain_graph=True, allow_unused=True)
        wants = {suffix: e["grads"][k] for suffix in leaves if k == "_".join(k.split("_")[:2]) + suffix}
        for i, (suffix, role) in enumerate((s, j) for s in leaves for j in (0, 1)):
            got = torch.zeros_like(every[i]) if found[i] is None else found[i]
            if not torch.isfinite(got).all():
                raise Differs(f"gradient of {k} is not finite")
            if not e["clear"] or (case.kinks and role == 1):
                continue
            want = wants[suffix][role] if suffix in wants else torch.zeros_like(every[i])
            scale = 1 + float(want.abs().max()) if want.numel() else 1.0
            limit = 2e-5 * scale + (20 * slack * scale if "giou" in k else 0)
            if want.numel() and float((got - want).abs().max()) > limit:
                raise Differs(f"gradient of {k} to {'boxes' if role else 'logits'}{suffix}")
    if sum(x.numel() for x in every):
        total = sum(losses[k] * criterion.weight_dict[k] for k in e["values"])
        for got in torch.autograd.grad(total, every, retain_graph=True, allow_unused=True):
            if got is None:
                raise Differs("an output gets no gradient tensor")
    judge_matcher(criterion, case)
    judge_repeats(criterion, factory, case, losses)


def judge_matcher(criterion, case):
    if not hasattr(criterion, "matcher"):
        return
    outputs, targets, _ = fresh(case)
    pairs = criterion.matcher(outputs, targets)
    if len(pairs) != len(targets):
        raise Differs("matcher: number of pairs")
    for b, pair in enumerate(pairs):
        if isinstance(pair, torch.Tensor) or len(pair) != 2:
            raise Differs("matcher: no pair")
        q, t = (torch.as_tensor(i) for i in pair)
        q, t = (i.long() if len(i) == 0 else i for i in (q, t))
        if q.dtype.is_floating_point or t.dtype.is_floating_point or q.dim() != 1 or q.shape != t.shape:
            raise Differs("matcher: kind of indices")
        queries, n = case.outputs["pred_logits"].shape[1], len(targets[b]["boxes"])
        if len(q) != min(queries, n) or len(set(q.tolist())) != len(q) or len(set(t.tolist())) != len(t):
            raise Differs("matcher: not one to one")
        if len(q) and not (int(q.min()) >= 0 and int(q.max()) < queries and int(t.min()) >= 0 and int(t.max()) < n):
            raise Differs("matcher: out of range")
        if len(q) and case.values:
            totals = []
            for inside in (0.0, 1e-8, 1e-12):
                m = cost_matrix(
                    case.profile,
                    case.options,
                    outputs["pred_logits"][b].detach(),
                    outputs["pred_boxes"][b].detach(),
                    targets[b],
                    inside,
                )
                i, j = linear_sum_assignment(m)
                totals.append(m[q, t].sum() - m[i, j].sum())
            if min(totals) > 2e-4:
                raise Differs("matcher: not optimal")


def judge_repeats(criterion, factory, case, losses):
    outputs, targets, _ = fresh(case)
    for again in (criterion, copy.deepcopy(criterion), built(factory, case)):
        other = again(outputs, targets)
        if set(other) != set(losses) or any(not torch.equal(other[k], losses[k]) for k in losses):
            raise Differs("another call, another result")
    for key, weight in weights_expected(case).items():
        if criterion.weight_dict.get(key) != weight:
            raise Differs(f"weight of {key} after some calls")
    if hasattr(criterion, "eval"):
        other = criterion.eval()(outputs, targets)
        criterion.train()
        if set(other) != set(losses) or any(not torch.equal(other[k], losses[k]) for k in losses):
            raise Differs("eval differs from train")


def judge_history(factory, cases):
    """One criterion over many cases of the same options against fresh ones."""
    first = cases[0]
    seen = built(factory, first)
    for case in cases:
        if seen is None or case.options["num_classes"] != first.options["num_classes"]:
            continue
        outputs, targets, _ = fresh(case)
        used, new = seen(outputs, targets), built(factory, first)(outputs, targets)
        if set(used) != set(new) or any(not torch.equal(used[k], new[k]) for k in used):
            raise Differs("earlier calls matter")


def judge_keys(factory, cases):
    """The keys with and without targets."""
    outputs, targets, _ = fresh(cases[0])
    criterion = built(factory, cases[0])
    nothing = [{k: v[:0] for k, v in t.items()} for t in targets]
    if criterion is not None and set(criterion(outputs, targets)) != set(criterion(outputs, nothing)):
        raise Differs("keys depend on targets")


def judge_refusals(factory, profile):
    """Should-level: labels, lengths, boxes, three zero weights, non-finite queries."""
    case = draw(profile, 7, images=1, queries=5, counts=[2], aux=0, encoder=False)
    try:
        built(
            factory,
            Case("", profile, case.options | {"set_cost_class": 0, "set_cost_bbox": 0, "set_cost_giou": 0}, {}, []),
        )
        raise Differs("three zero weights accepted")
    except ValueError:
        pass

    def too_large(t):
        t["labels"][0] = case.options["num_classes"] + (profile == "grounding-dino") * 10**6

    def short(t):
        t["labels"] = t["labels"][:1]

    edits = {
        "negative label": lambda t: t["labels"].fill_(-1),
        "lengths": short,
        "negative side": lambda t: t["boxes"].mul_(-1),
        "NaN box": lambda t: t["boxes"].fill_(torch.nan),
    }
    if profile != "grounding-dino":
        edits["label too large"] = too_large
    for name, edit in edits.items():
        outputs, targets, _ = fresh(case)
        edit(targets[0])
        try:
            built(factory, case)(outputs, targets)
        except Exception:
            continue
        raise Differs(f"{name} accepted")
    for poison in (torch.nan, torch.inf):
        outputs, targets, _ = fresh(case)
        with torch.no_grad():
            outputs["pred_logits"][0, 3] = poison
        try:
            pairs = built(factory, case).matcher(outputs, targets)
        except (ValueError, AttributeError):
            continue
        if 3 in [int(i) for i in pairs[0][0]]:
            raise Differs("a non-finite query is matched")


def history_cases(profile):
    kept = [draw(profile, 500 + i, images=2, queries=5, counts=[2, 1 + i % 2], aux=1, encoder=True) for i in range(8)]
    base = kept[0].options
    kept += [draw(profile, 520 + i, images=2, queries=5, counts=[2, 1], aux=1, encoder=True) for i in range(8)]
    for case in kept:
        case.options = base | {"num_classes": case.options["num_classes"]}
    most = max(c.options["num_classes"] for c in kept)
    return [c for c in kept if c.options["num_classes"] == most]


def main(words):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Warning: converting a masked")
    profiles = ("detr", "deformable-detr", "grounding-dino", "dino")
    cases = {p: cases_of(p) for p in profiles}
    past = {p: history_cases(p) for p in profiles}
    for p in profiles:
        doubtful = [c.name for c in cases[p] if not expect(c)["clear"]]
        print(f"{p}: {len(cases[p])} cases, values not compared on {len(doubtful)}: {' '.join(doubtful)}")
    failed = 0
    refusing = []
    for right in RIGHT:
        if words and not any(w in right.id for w in words):
            continue
        try:
            judged = 0
            for case in cases[right.profile]:
                where = case.name
                if case.name.startswith("areas"):
                    continue
                judge(right.factory, case)
                judged += built(right.factory, case) is not None
            where = "history"
            judge_history(right.factory, past[right.profile])
            where = "keys"
            judge_keys(right.factory, past[right.profile])
            print(f"  right  {right.id}: {judged} cases")
        except Exception as problem:
            failed += 1
            print(f"  RIGHT IS NOT  {right.id} on {where}: {type(problem).__name__} {problem}")
        try:
            areas = next(c for c in cases[right.profile] if c.name.startswith("areas"))
            judge(right.factory, areas)
            judge_refusals(right.factory, right.profile)
            refusing.append(right.id)
        except Exception as problem:
            if right.should:
                failed += 1
            print(f"         {right.id} at should-level: {type(problem).__name__} {problem}")
    print(f"{len(refusing)} right ones also refuse bad inputs and survive boxes without area: {' '.join(refusing)}")
    how, late = Counter(), []
    for wrong in WRONG:
        if words and not any(w in wrong.id for w in words):
            continue
        seen = shows(wrong, cases[wrong.profile], past[wrong.profile])
        if seen is None:
            failed += 1
            print(f"  WRONG IS NOT  {wrong.id} {' '.join(wrong.clause)}: {wrong.sentence}")
        else:
            how[seen[0]] += 1
            if seen[2] <= 2:
                late.append(f"{wrong.id} ({seen[2]}: {seen[1]})")
    print(f"{sum(how.values())} wrong ones show, by what first shows: {dict(how.most_common())}")
    print(f"shown by one or two cases only: {'; '.join(late)}")
    print("FAILED" if failed else "ok", failed)
    return 1 if failed else 0


def shows(wrong, cases, past):
    """What first shows, on which case, and on how many cases at all (counted up to 3)."""
    first, hits = None, 0
    for case in cases:
        try:
            judge(wrong.factory, case)
        except Differs as problem:
            found = str(problem).split(":")[0].split("_")[0].split(" of ")[0]
        except Exception as problem:
            found = f"raises {type(problem).__name__}"
        else:
            continue
        hits += 1
        first = first or (found, case.name)
        if hits == 3:
            break
    for name, late in (
        ("history", lambda: judge_history(wrong.factory, past)),
        ("keys", lambda: judge_keys(wrong.factory, past)),
        ("refusal", lambda: judge_refusals(wrong.factory, wrong.profile)),
    ):
        if first:
            break
        try:
            late()
        except Differs as problem:
            first, hits = (f"{name}: {problem}", name), 3
        except Exception as problem:
            first, hits = (f"{name}: raises {type(problem).__name__}", name), 3
    return (*first, hits) if first else None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
