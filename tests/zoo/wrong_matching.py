"""Mistakes of the matching cost and of the assignment."""

from __future__ import annotations

import itertools
import random

import torch
from scipy.optimize import linear_sum_assignment

from .port import ALL, SIGMOID, Port, Registry

MISTAKES = Registry(globals())
add = MISTAKES.add
NONE = torch.zeros(0, dtype=torch.int64)


def best(cost):
    q, t = linear_sum_assignment(cost.detach().numpy())
    return torch.as_tensor(q), torch.as_tensor(t)


def weighted(change):
    """The cost with its three weights changed."""
    return lambda s: change(s.o.set_cost_class, s.o.set_cost_bbox, s.o.set_cost_giou)


def cost_then(change):
    """The right cost, changed at the end."""
    return lambda s, x, b, t, m: change(Port.cost(s, x, b, t, m))


# -- weights -------------------------------------------------------------------------------------------------
add(
    "cost-weights-swapped",
    ALL,
    "COST-1",
    "The weights of L1 and GIoU are swapped.",
    cost_weights=weighted(lambda c, b, g: (c, g, b)),
)
add(
    "cost-class-and-giou-swapped",
    "F",
    "COST-1",
    "The weights of class and L1 are swapped.",
    cost_weights=weighted(lambda c, b, g: (b, c, g)),
)
add(
    "cost-class-weight-one",
    "DF",
    "COST-1",
    "The class term always weighs 1.",
    cost_weights=weighted(lambda c, b, g: (1.0, b, g)),
)
add("cost-no-class", "DG", "COST-1", "No class term.", cost_weights=weighted(lambda c, b, g: (0.0, b, g)))
add("cost-no-l1", "FD", "COST-1", "No L1 term.", cost_weights=weighted(lambda c, b, g: (c, 0.0, g)))
add("cost-no-giou", "GF", "COST-1", "No GIoU term.", cost_weights=weighted(lambda c, b, g: (c, b, 0.0)))
add(
    "cost-all-weights-one",
    "F",
    "COST-1",
    "All weights are 1, whatever is configured.",
    cost_weights=weighted(lambda c, b, g: (1.0, 1.0, 1.0)),
)
add("cost-l1-4-9", "D", "COST-1", "L1 weighs 4.9 for 5.", cost_weights=weighted(lambda c, b, g: (c, 0.98 * b, g)))
add("cost-l1-weight-fixed", "G", "COST-1", "L1 always weighs 5.", cost_weights=weighted(lambda c, b, g: (c, 5.0, g)))
add(
    "cost-giou-weight-fixed", "D", "COST-1", "GIoU always weighs 2.", cost_weights=weighted(lambda c, b, g: (c, b, 2.0))
)
add(
    "cost-weights-squared",
    "G",
    "COST-1",
    "Weights are applied twice.",
    cost_weights=weighted(lambda c, b, g: (c * c, b * b, g * g)),
)
add(
    "cost-zero-means-one",
    "F",
    "COST-1",
    "A weight of 0 falls back to 1 (`weight or 1`).",
    cost_weights=weighted(lambda c, b, g: (c or 1.0, b or 1.0, g or 1.0)),
)
add(
    "cost-uses-loss-weights",
    ALL,
    "COST-7",
    "The loss weights are used in the matching.",
    cost_weights=lambda s: (s.o.ce_loss_coef, s.o.bbox_loss_coef, s.o.giou_loss_coef),
)


def one_zero_refused(s):
    if not (s.o.set_cost_class and s.o.set_cost_bbox and s.o.set_cost_giou):
        raise ValueError("costs must not be 0")


add(
    "cost-one-zero-refused",
    "D",
    "COST-1",
    "Any zero weight is refused, not only all zero.",
    check_options=one_zero_refused,
)
add("cost-all-zero-accepted", "DG", "COST-10", "Three zero weights are accepted.", check_options=lambda s: None)
add(
    "cost-giou-sign", ALL, "COST-1 MATCH-2", "+GIoU: overlap costs.", cost_giou=lambda s, p, t: -Port.cost_giou(s, p, t)
)
add("cost-l1-sign", "G", "COST-1 MATCH-2", "−L1: distance is rewarded.", cost_l1=lambda s, p, t: -Port.cost_l1(s, p, t))


# -- box terms -----------------------------------------------------------------------------------------------
def cost_iou(s, p, t):
    a, b = s.corners(p)[:, None], s.corners(t)[None]
    i = s.overlap(a, b)
    return -s.ratio(i, s.area(a) + s.area(b) - i)


def positive_giou(s, p, t):
    return Port.cost_giou(s, p, t).clamp(max=0)


def giou_on_cxcywh(s, p, t):
    return -s.giou(p[:, None], t[None])


def absolute(change):
    return lambda s, p, t: change((p[:, None] - t[None]).abs())


def l1_corners(s, p, t):
    return torch.cdist(s.corners(p), s.corners(t), p=1)


add("cost-iou", "DF", "COST-1 BOX-5", "IoU instead of GIoU in the cost alone.", cost_giou=cost_iou)
add("cost-giou-floored", "G", "COST-1 BOX-5", "All disjoint boxes cost the same GIoU.", cost_giou=positive_giou)
add("cost-giou-cxcywh", "DG", "COST-1 BOX-1", "GIoU of (cx, cy, w, h) in the cost.", cost_giou=giou_on_cxcywh)
add(
    "cost-l1-mean",
    ALL,
    "COST-6",
    "The mean of the four differences in the cost.",
    cost_l1=absolute(lambda d: d.mean(-1)),
)
add("cost-l2", "DF", "COST-6", "cdist with p = 2.", cost_l1=lambda s, p, t: torch.cdist(p, t, p=2))
add("cost-l1-squared", "G", "COST-6", "Squared differences.", cost_l1=absolute(lambda d: d.square().sum(-1)))
add("cost-l1-corners", ALL, "COST-6", "L1 of the corners in the cost.", cost_l1=l1_corners)
add("cost-l1-centres", "F", "COST-6", "L1 of the centres alone.", cost_l1=absolute(lambda d: d[..., :2].sum(-1)))
add("cost-l1-largest", "D", "COST-6", "The largest difference.", cost_l1=absolute(lambda d: d.amax(-1)))
add(
    "cost-l1-over-image-max",
    "G",
    "COST-6 COST-1",
    "L1 divided by the largest distance in the image.",
    cost_l1=lambda s, p, t: Port.cost_l1(s, p, t) / Port.cost_l1(s, p, t).max().clamp(min=1e-6),
)


# -- class terms ---------------------------------------------------------------------------------------------
def detr_cost(table):
    return lambda s, x, t, m: table(x)[:, t["labels"]]


def focal_table(change):
    """The focal cost from p, α, γ."""

    def focal_cost(s, x):
        return change(x.sigmoid(), s.o.focal_alpha, s.o.focal_gamma)

    return focal_cost


def minus_log(p):
    return -(p + 1e-8).log()


def pos(p, a, g):
    return a * (1 - p) ** g * minus_log(p)


def neg(p, a, g):
    return (1 - a) * p**g * minus_log(1 - p)


add("cost-log-softmax", "D", "COST-2", "−log softmax.", cost_class=detr_cost(lambda x: -x.log_softmax(-1)))
add("cost-logit", "D", "COST-2", "−logit.", cost_class=detr_cost(lambda x: -x))
add(
    "cost-softmax-without-background",
    "D",
    "COST-2",
    "The softmax leaves the no-object channel out.",
    cost_class=detr_cost(lambda x: -x[:, :-1].softmax(-1)),
)
add("cost-sigmoid", "D", "COST-2", "Sigmoid instead of softmax.", cost_class=detr_cost(lambda x: -x.sigmoid()))
add(
    "cost-softmax-over-queries",
    "D",
    "COST-2",
    "The softmax runs over the queries.",
    cost_class=detr_cost(lambda x: -x.softmax(0)),
)
add("cost-class-sign", "D", "COST-2", "+softmax.", cost_class=detr_cost(lambda x: x.softmax(-1)))
add(
    "cost-softmax-squared",
    "D",
    "COST-2",
    "−p², the focal habit.",
    cost_class=detr_cost(lambda x: -(x.softmax(-1) ** 2)),
)
add(
    "cost-label-shifted",
    "DF",
    "COST-2 COST-3",
    "Labels are taken as counted from 1.",
    cost_class=lambda s, x, t, m: type(s).__base__.cost_class(s, x, {**t, "labels": (t["labels"] - 1).clamp(min=0)}, m),
)
add(
    "cost-label-sorted",
    "DF",
    "COST-2 COST-3",
    "Class columns come in sorted label order.",
    cost_class=lambda s, x, t, m: type(s).__base__.cost_class(s, x, {**t, "labels": t["labels"].sort().values}, m),
)
add(
    "cost-foreground",
    "F",
    "COST-3",
    "The best class's probability whatever the label.",
    cost_class=lambda s, x, t, m: s.focal_cost(x).amin(-1, keepdim=True).expand(-1, len(t["labels"])),
)
add(
    "cost-argmax-hit",
    "D",
    "COST-2",
    "0 where the argmax is the label, 1 elsewhere.",
    cost_class=lambda s, x, t, m: (x.argmax(-1)[:, None] != t["labels"]).to(x.dtype),
)
add(
    "cost-softmax-in-focal",
    "FG",
    "COST-3 COST-4",
    "Softmax probabilities in the focal cost.",
    cost_p=lambda s, x: x.softmax(-1),
)
add("cost-plain-probability", "F", "COST-3", "−σ(x), DETR's cost with a sigmoid.", focal_cost=lambda s, x: -x.sigmoid())
add(
    "cost-focal-positive-only",
    SIGMOID,
    "COST-3 COST-4",
    "The negative part is not subtracted.",
    focal_cost=focal_table(pos),
)
add(
    "cost-focal-plus",
    SIGMOID,
    "COST-3 COST-4",
    "pos + neg.",
    focal_cost=focal_table(lambda p, a, g: pos(p, a, g) + neg(p, a, g)),
)
add("cost-focal-negative-only", "F", "COST-3", "−neg alone.", focal_cost=focal_table(lambda p, a, g: -neg(p, a, g)))
add(
    "cost-alpha-swapped",
    SIGMOID,
    "COST-3 COST-4",
    "1 − α weighs positives.",
    focal_cost=focal_table(lambda p, a, g: pos(p, 1 - a, g) - neg(p, 1 - a, g)),
)
add("cost-no-alpha", "F", "COST-3", "No α.", focal_cost=focal_table(lambda p, a, g: pos(p, 1, g) - neg(p, 0, g)))
add("cost-alpha-fixed", SIGMOID, "COST-5", "α = 0.25 whatever is configured.", cost_alpha=lambda s: 0.25)
add("cost-gamma-fixed", SIGMOID, "COST-5", "γ = 2 whatever is configured.", cost_gamma=lambda s: 2.0)
add("cost-gamma-off", "G", "COST-4", "No modulation in the cost.", cost_gamma=lambda s: 0.0)
add(
    "cost-gamma-1-9",
    "F",
    "COST-3 COST-5",
    "γ is 0.95 of what it should be.",
    cost_gamma=lambda s: 0.95 * s.o.focal_gamma,
)
add(
    "cost-no-modulation-on-negatives",
    SIGMOID,
    "COST-3 COST-4",
    "p^γ is missing in the negative part.",
    focal_cost=focal_table(lambda p, a, g: pos(p, a, g) - neg(p, a, 0)),
)
add(
    "cost-modulation-swapped",
    "F",
    "COST-3",
    "p^γ for positives, (1 − p)^γ for negatives.",
    focal_cost=focal_table(lambda p, a, g: a * p**g * minus_log(p) - (1 - a) * (1 - p) ** g * minus_log(1 - p)),
)
add(
    "cost-eps-outside-log",
    "G",
    "COST-4",
    "1e-2 inside the logarithms.",
    focal_cost=focal_table(
        lambda p, a, g: a * (1 - p) ** g * -(p + 1e-2).log() - (1 - a) * p**g * -(1 - p + 1e-2).log()
    ),
)
add(
    "cost-one-sided-log",
    "F",
    "COST-3",
    "log p in the negative part as well.",
    focal_cost=focal_table(lambda p, a, g: pos(p, a, g) - (1 - a) * p**g * minus_log(p)),
)
add(
    "cost-eps-1e-3",
    "F",
    "COST-3",
    "1e-3 inside the logarithms.",
    focal_cost=focal_table(
        lambda p, a, g: a * (1 - p) ** g * -(p + 1e-3).log() - (1 - a) * p**g * -(1 - p + 1e-3).log()
    ),
)
add(
    "cost-logits-clamped",
    "FG",
    "COST-3 COST-4",
    "Logits are clamped at ±3 in the cost.",
    cost_p=lambda s, x: x.clamp(-3, 3).sigmoid(),
)


def tokens(change):
    return lambda s, t: change(t["token_labels"])


def token_first(rows):
    return torch.zeros_like(rows).scatter(1, rows.argmax(1, keepdim=True), 1)


def token_max(s, x, t, m):
    table = s.focal_cost(x.clamp(min=-1e4))
    return torch.stack([table[:, row > 0].amin(1) for row in t["token_labels"]], 1)


def token_of_mean_logit(s, x, t, m):
    return torch.stack([s.focal_cost(x[:, row > 0].mean(1)) for row in t["token_labels"]], 1)


def token_of_mean_probability(s, x, t, m):
    p = torch.stack([x[:, row > 0].sigmoid().mean(1) for row in t["token_labels"]], 1)
    return pos(p, s.o.focal_alpha, s.o.focal_gamma) - neg(p, s.o.focal_alpha, s.o.focal_gamma)


def token_with_rest(s, x, t, m):
    p, a, g = x.sigmoid(), s.o.focal_alpha, s.o.focal_gamma
    rows = t["token_labels"].to(x.dtype)
    rest = (1 - rows) if m is None else (1 - rows) * m
    return pos(p, a, g) @ rows.T + neg(p, a, g) @ rest.T


def token_by_label(s, x, t, m):
    return s.focal_cost(x.clamp(min=-1e4))[:, t["labels"].clamp(max=x.shape[1] - 1)]


add("token-cost-sum", "G", "COST-4", "The sum over the class's tokens.", cost_tokens=tokens(lambda r: r))
add("token-cost-first", "G", "COST-4", "The first token of the class alone.", cost_tokens=tokens(token_first))
add(
    "token-cost-last",
    "G",
    "COST-4",
    "The last token of the class alone.",
    cost_tokens=tokens(lambda r: token_first(r.flip(1)).flip(1)),
)
add(
    "token-cost-over-all",
    "G",
    "COST-4",
    "The sum divided by the number of all tokens.",
    cost_tokens=tokens(lambda r: r / r.shape[1]),
)
add(
    "token-cost-root",
    "G",
    "COST-4",
    "Rows scaled to unit length, not to unit sum.",
    cost_tokens=tokens(lambda r: r / r.norm(dim=-1, keepdim=True)),
)
add("token-cost-best", "G", "COST-4", "The cheapest token of the class.", cost_class=token_max)
add("token-cost-mean-logit", "G", "COST-4", "The cost of the mean logit.", cost_class=token_of_mean_logit)
add(
    "token-cost-mean-probability",
    "G",
    "COST-4",
    "The cost of the mean probability.",
    cost_class=token_of_mean_probability,
)
add(
    "token-cost-mmdet", "G", "COST-4", "pos over the class's tokens plus neg over the rest.", cost_class=token_with_rest
)
add("token-cost-label-column", "G", "COST-4", "The label is used as a token index.", cost_class=token_by_label)

# -- precision -----------------------------------------------------------------------------------------------
add(
    "cost-bfloat16",
    ALL,
    "MATCH-2",
    "The cost matrix is rounded to bfloat16.",
    cost=cost_then(lambda c: c.bfloat16().float()),
)
add(
    "cost-float16-boxes",
    "G",
    "MATCH-2 COST-6",
    "L1 and GIoU from boxes rounded to float16 steps of 1/256.",
    cost=lambda s, x, b, t, m: Port.cost(s, x, (b * 256).round() / 256, t, m),
)
add("cost-integer", "F", "MATCH-2", "An integer solver on cost·100.", cost=cost_then(lambda c: (c * 100).round()))
add("cost-exponential", "D", "MATCH-2", "exp(cost), as for a Sinkhorn kernel.", cost=cost_then(lambda c: c.exp()))
add("cost-clipped", "F", "MATCH-2", "The cost is clipped at 3.", cost=cost_then(lambda c: c.clamp(max=3)))
add(
    "cost-favours-early",
    "G",
    "MATCH-2 MATCH-4",
    "0.01·query index is added as a tie-breaker.",
    cost=cost_then(lambda c: c + 0.01 * torch.arange(len(c))[:, None]),
)
add(
    "cost-row-normalised",
    "D",
    "MATCH-2",
    "Each query's costs are softmaxed over the targets.",
    cost=cost_then(lambda c: c.softmax(1)),
)
add(
    "cost-target-centred",
    "F",
    "MATCH-2",
    "Each target's costs are divided by their largest.",
    cost=cost_then(lambda c: c / c.abs().amax(0, keepdim=True).clamp(min=1e-6)),
)


# -- across images -------------------------------------------------------------------------------------------
def rolled(s, layer, targets):
    """Image b is matched against the targets of its neighbour, where the counts agree."""
    pairs = Port.match(s, layer, targets)
    turned = targets[1:] + targets[:1]
    other = Port.match(s, layer, turned)
    return [
        o if len(a["labels"]) == len(b["labels"]) else p
        for p, o, a, b in zip(pairs, other, targets, turned, strict=True)
    ]


def first_block(s, layer, targets):
    """c[0] for c[i]: every image is matched on the predictions of the first."""
    first = {k: v[:1].expand_as(v) if isinstance(v, torch.Tensor) and k != "text_mask" else v for k, v in layer.items()}
    return Port.match(s, first, targets)


def whole_batch(s, layer, targets):
    """One assignment of all queries to all targets; pairs across images are dropped."""
    sizes = [len(t["labels"]) for t in targets]
    q_count = layer["pred_logits"].shape[1]
    if not sum(sizes) or not q_count:
        return [(NONE, NONE) for _ in targets]
    keys = ("labels", "boxes", "token_labels") if "token_labels" in targets[0] else ("labels", "boxes")
    every = {k: torch.cat([t[k] for t in targets]) for k in keys}
    with torch.no_grad():
        q, t = s.solve(s.cost(layer["pred_logits"].flatten(0, 1), layer["pred_boxes"].flatten(0, 1), every, None))
    ends = list(itertools.accumulate(sizes, initial=0))
    pairs = []
    for b, start in enumerate(ends[:-1]):
        mine = (q // q_count == b) & (t >= start) & (t < ends[b + 1])
        pairs.append((q[mine] % q_count, t[mine] - start))
    return pairs


def batch_scaled_l1(s, layer, targets):
    keep, s._scale = getattr(s, "_scale", 1.0), layer["pred_boxes"].detach().amax().item() if targets else 1.0
    pairs = Port.match(s, layer, targets)
    s._scale = keep
    return pairs


add("match-next-image", ALL, "COST-8 MATCH-3", "Image b is matched against the targets of image b + 1.", match=rolled)
add(
    "match-first-predictions",
    "DF",
    "COST-8 MATCH-3",
    "Every image is matched on the predictions of image 0.",
    match=first_block,
)
add("match-whole-batch", ALL, "MATCH-3 MATCH-1", "One assignment across the batch.", match=whole_batch)
add(
    "cost-batch-scaled",
    "G",
    "COST-8",
    "L1 is scaled by the largest coordinate in the batch.",
    match=batch_scaled_l1,
    cost_l1=lambda s, p, t: Port.cost_l1(s, p, t) / getattr(s, "_scale", 1.0),
)


# -- solving -------------------------------------------------------------------------------------------------
def first_queries(s, cost):
    n = min(cost.shape)
    return torch.arange(n), torch.arange(n)


def greedy_by_target(s, cost):
    cost, q = cost.clone(), []
    for t in range(min(cost.shape)):
        q.append(int(cost[:, t].argmin()))
        cost[q[-1]] = torch.inf
    return torch.tensor(q), torch.arange(len(q))


def greedy_by_entry(s, cost):
    cost, q, t = cost.clone(), [], []
    for _ in range(min(cost.shape)):
        i, j = divmod(int(cost.argmin()), cost.shape[1])
        q.append(i)
        t.append(j)
        cost[i], cost[:, j] = torch.inf, torch.inf
    return torch.tensor(q), torch.tensor(t)


def greedy_by_query(s, cost):
    cost, q, t = cost.clone(), [], []
    for i in cost.amin(1).argsort().tolist():
        if len(q) < min(cost.shape):
            q.append(i)
            t.append(int(cost[i].argmin()))
            cost[:, t[-1]] = torch.inf
    return torch.tensor(q), torch.tensor(t)


def nearest_query(s, cost):
    return cost.argmin(0), torch.arange(cost.shape[1])


def first_targets(s, cost):
    return best(cost[:, : cost.shape[0]])


def drop_expensive(s, cost):
    q, t = best(cost)
    keep = cost[q, t] <= cost[q, t].mean() + 1e-6
    return q[keep], t[keep]


def one_missing(s, cost):
    q, t = best(cost)
    return (q[:-1], t[:-1]) if len(q) > 2 else (q, t)


def two_queries_each(s, cost):
    q, t = best(cost)
    rest = cost.clone()
    rest[q] = torch.inf
    if cost.shape[0] < 2 * cost.shape[1]:
        return q, t
    q2, t2 = best(rest.clamp(max=1e6))
    return torch.cat([q, q2]), torch.cat([t, t2])


def target_order_lost(s, cost):
    q, t = best(cost)
    return q, t.sort().values


def query_order_lost(s, cost):
    q, t = best(cost.T)
    return t.sort().values, q


def shortlist(s, cost):
    keep = cost.amin(1).argsort()[: max(cost.shape[1], len(cost) // 2)].sort().values
    q, t = best(cost[keep])
    return keep[q], t


def two_swaps(s, cost):
    """Greedy, improved by exchanging two targets; stops short of the optimum."""
    q, t = greedy_by_target(s, cost)
    t = t.clone()
    for i in range(len(q)):
        for j in range(i):
            if cost[q[i], t[j]] + cost[q[j], t[i]] < cost[q[i], t[i]] + cost[q[j], t[j]]:
                t[i], t[j] = t[j].clone(), t[i].clone()
    return q, t


def auction(s, cost):
    """Auction with ε = 0.2."""
    if cost.shape[1] > cost.shape[0]:
        t, q = auction(s, cost.T)
        return q, t
    price, owner, waiting = torch.zeros(len(cost)), {}, list(range(cost.shape[1]))
    while waiting:
        t = waiting.pop()
        value = -cost[:, t] - price
        top = value.topk(min(2, len(value))).values
        q = int(value.argmax())
        price[q] += float(top[0] - top[-1]) + 0.2
        if q in owner:
            waiting.append(owner[q])
        owner[q] = t
    return torch.tensor(list(owner)), torch.tensor(list(owner.values()))


def random_ties(s, cost):
    return best(cost + 1e-4 * torch.rand_like(cost))


def python_noise(s, cost):
    return best(cost + torch.tensor([[0.02 * random.random() for _ in row] for row in cost]))


def counting_noise(s, cost):
    s._calls = getattr(s, "_calls", 0) + 1
    noise = torch.rand(cost.shape, generator=torch.Generator().manual_seed(s._calls))
    return best(cost + 0.3 * noise)


def squared_to_queries(s, cost):
    """The matrix is made square with copies of the last target, and every copy counts."""
    if cost.shape[1] >= cost.shape[0]:
        return best(cost)
    q, t = best(torch.cat([cost, cost[:, -1:].expand(-1, len(cost) - cost.shape[1])], 1))
    keep = t <= cost.shape[1] if len(cost) > cost.shape[1] + 1 else t < cost.shape[1]
    return q[keep], t[keep].clamp(max=cost.shape[1] - 1)


def none_when_crowded(s, cost):
    return best(cost) if cost.shape[1] <= cost.shape[0] else (NONE, NONE)


def refuse_when_crowded(s, cost):
    if cost.shape[1] > cost.shape[0]:
        raise ValueError("more targets than queries")
    return best(cost)


def targets_tiled(s, cost):
    """Hybrid matching: every target twice."""
    q, t = best(torch.cat([cost, cost], 1))
    return q, t % cost.shape[1]


def distinct_targets(s, x, b, t, m):
    """Identical targets are collapsed before the assignment."""
    if len(t["boxes"]) == 0:
        return NONE, NONE
    _, inverse = torch.cat([t["boxes"], t["labels"][:, None].to(b.dtype)], 1).unique(dim=0, return_inverse=True)
    first = torch.tensor([int((inverse == i).nonzero()[0]) for i in range(int(inverse.max()) + 1)])
    q, j = s.solve(s.cost(x, b, t, m)[:, first])
    return q, first[j]


add("match-first-queries", ALL, "MATCH-2", "The first M queries are taken in order.", solve=first_queries)
add("match-greedy-by-target", ALL, "MATCH-2", "Targets in turn take the cheapest free query.", solve=greedy_by_target)
add("match-greedy-by-entry", "DF", "MATCH-2", "The cheapest entry first, again and again.", solve=greedy_by_entry)
add("match-greedy-by-query", "G", "MATCH-2", "The most confident queries choose first.", solve=greedy_by_query)
add("match-nearest", ALL, "MATCH-1", "Every target takes its cheapest query, taken or not.", solve=nearest_query)
add("match-maximised", "FG", "MATCH-2", "The most expensive assignment.", solve=lambda s, c: best(-c))
add(
    "match-first-targets",
    ALL,
    "MATCH-2 MATCH-5",
    "With more targets than queries, the first Q targets are used.",
    solve=first_targets,
)
add("match-drops-expensive", "DF", "MATCH-1", "Pairs of more than mean cost are dropped.", solve=drop_expensive)
add("match-one-missing", "G", "MATCH-1", "The last pair is lost when there are three or more.", solve=one_missing)
add(
    "match-two-queries",
    "DF",
    "MATCH-1",
    "A second query for every target where there are enough.",
    solve=two_queries_each,
)
add("match-targets-tiled", "G", "MATCH-1", "Every target takes part twice.", solve=targets_tiled)
add(
    "match-target-order-lost",
    ALL,
    "MATCH-2",
    "Target indices are sorted away from their queries.",
    solve=target_order_lost,
)
add(
    "match-query-order-lost",
    "F",
    "MATCH-2",
    "Query indices are sorted away from their targets.",
    solve=query_order_lost,
)
add("match-shortlist", "DG", "MATCH-2", "Only the better half of the queries takes part.", solve=shortlist)
add("match-two-swaps", "F", "MATCH-2", "Greedy with pairwise exchanges.", solve=two_swaps)
add("match-auction", "DG", "MATCH-2", "An auction with ε = 0.2.", solve=auction)
add("match-random-ties", "DF", "PURE-3 MATCH-9", "Noise from the global generator breaks ties.", solve=random_ties)
add(
    "match-python-noise",
    "G",
    "MATCH-9 PURE-2 PURE-3",
    "Noise from python's random module is added.",
    solve=python_noise,
)
add("match-counting-noise", "F", "MATCH-9 PURE-2", "Noise seeded by a call counter is added.", solve=counting_noise)
add(
    "match-squared",
    "D",
    "MATCH-1",
    "The padding of the square matrix counts as one more pair.",
    solve=squared_to_queries,
)
add(
    "match-none-when-crowded",
    "DG",
    "MATCH-1 MATCH-5",
    "No pairs where targets outnumber queries.",
    solve=none_when_crowded,
)
add("match-refuses-crowded", "F", "MATCH-5", "Raises where targets outnumber queries.", solve=refuse_when_crowded)
add("match-distinct-targets", "DF", "MATCH-1", "Two equal targets are matched once.", match_image=distinct_targets)


# -- indices -------------------------------------------------------------------------------------------------
def wide(pairs, change):
    return [change(b, q, t) for b, (q, t) in enumerate(pairs)]


def swapped_inside(s, layer, targets):
    """(target, query) used as (query, target), as far as both index."""
    q_count = layer["pred_logits"].shape[1]
    pairs = Port.match(s, layer, targets)
    return [
        (t, q) if all(len(i) == 0 or int(i.max()) < n for i, n in ((t, q_count), (q, len(w["labels"])))) else (q, t)
        for (q, t), w in zip(pairs, targets, strict=True)
    ]


def empty_takes_query(s, x, b, t, m):
    return Port.match_image(s, x, b, t, m) if len(t["labels"]) else (torch.zeros(1, dtype=torch.int64), NONE)


def empties_skipped(s, outputs, targets):
    return [p for p, t in zip(Port.matcher(s, outputs, targets), targets, strict=True) if len(t["labels"])]


def crowd_offset(s, layer, targets):
    """Empty images are skipped, so later pairs move to earlier images; as far as they index."""
    pairs = [p for p, t in zip(Port.match(s, layer, targets), targets, strict=True) if len(t["labels"])]
    pairs += [(NONE, NONE)] * (len(targets) - len(pairs))
    return [(q[t < len(w["labels"])], t[t < len(w["labels"])]) for (q, t), w in zip(pairs, targets, strict=True)]


def public(change):
    """The loss is right; what the matcher hands out is not."""
    return lambda s, outputs, targets: wide(
        Port.matcher(s, outputs, targets), lambda b, q, t: change(b, q, t, outputs["pred_logits"].shape[1])
    )


add("indices-swapped", "FG", "MATCH-2", "Query and target indices are exchanged.", match=swapped_inside)
add(
    "empty-images-skipped",
    "DF",
    "MATCH-5 MATCH-3",
    "Empty images shift the pairs of those after them.",
    match=crowd_offset,
)
add(
    "matcher-swapped",
    "DF",
    "MATCH-6",
    "The matcher hands out (target, query).",
    matcher=public(lambda b, q, t, n: (t, q)),
)
add(
    "matcher-global-query",
    "DG",
    "MATCH-6",
    "Query indices are offset by b·Q.",
    matcher=public(lambda b, q, t, n: (q + b * n, t)),
)
add(
    "matcher-float",
    "F",
    "MATCH-6",
    "Indices are floating point.",
    matcher=public(lambda b, q, t, n: (q.float(), t.float())),
)
add(
    "matcher-columns",
    "G",
    "MATCH-6",
    "One [M, 2] tensor an image.",
    matcher=public(lambda b, q, t, n: torch.stack([q, t], 1)),
)
add(
    "matcher-padded",
    "D",
    "MATCH-6",
    "Pairs are padded with −1 to the number of queries.",
    matcher=public(lambda b, q, t, n: tuple(torch.cat([i, i.new_full((n - len(i),), -1)]) for i in (q, t))),
)
add("matcher-from-one", "F", "MATCH-6", "Indices count from 1.", matcher=public(lambda b, q, t, n: (q + 1, t + 1)))
add(
    "matcher-skips-empty",
    "DF",
    "MATCH-5 MATCH-6",
    "The matcher hands out no pair for an empty image.",
    matcher=empties_skipped,
)
add(
    "matcher-unequal",
    "G",
    "MATCH-6",
    "All queries with the targets of the matched ones.",
    matcher=public(lambda b, q, t, n: (torch.arange(n), t)),
)


# -- non-finite ----------------------------------------------------------------------------------------------
def nan_is_free(s, x, b, t, m):
    return torch.nan_to_num(Port.cost(s, x, b, t, m), nan=0.0, posinf=0.0, neginf=0.0) if len(t["boxes"]) else None


def nan_is_best(s, x, b, t, m):
    return torch.nan_to_num(Port.cost(s, x, b, t, m), nan=-1e6)


QUIET = {"refuse_non_finite": lambda s, x, b: None}
add("nan-costs-nothing", ALL, "MATCH-10", "A non-finite cost becomes 0.", cost=nan_is_free, **QUIET)
add("nan-costs-least", "F", "MATCH-10", "A non-finite cost becomes the least of all.", cost=nan_is_best, **QUIET)
