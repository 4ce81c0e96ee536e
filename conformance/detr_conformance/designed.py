"""Cases designed to tell one thing: a pair of boxes, two assignments of nearly the same cost, a contested query."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_conformance.cases import Case, Recipe, as_float32, draw_prompt, draw_target, plain_boxes
from detr_reference.options import Options
from detr_reference.textbook import textbook


def pair_case(pred: Any, wanted: Any, options: Options, label: str, queries: int = 1) -> Case:
    """One image, one target box [4] and one query with box ``pred`` [4]: nb is 1, the matching is certain.

    With ``queries`` = 2 a far-off second query stands beside, so that unmatched ones exist.
    """
    classes, tokens = options.num_classes, 3
    text = options.class_loss == "token"
    channels = tokens if text else options.channels
    boxes = [pred] + [[0.5, 0.5, 0.9, 0.9]] * (queries - 1)
    logits = torch.zeros(1, queries, channels)
    logits[:, 1:] = -3.0
    target: dict[str, Tensor] = {"labels": torch.zeros(1, dtype=torch.int64), "boxes": as_float32([wanted])}
    outputs: dict[str, Any] = {"pred_logits": logits, "pred_boxes": as_float32([boxes])}
    if text:
        spread = torch.zeros(min(classes, 2), tokens)
        spread[0, 1] = 1
        spread[-1, -1] = 1
        target |= {"token_labels": spread[:1], "positive_map": spread}
        outputs["text_mask"] = torch.ones(1, tokens, dtype=torch.bool)
    return Case(label, options.with_(num_decoder_layers=1), outputs, (target,))


_OTHER_COEFS: Final = (
    {"ce_loss_coef": 7.0, "bbox_loss_coef": 1.0, "giou_loss_coef": 5.0},
    {"ce_loss_coef": 0.5, "bbox_loss_coef": 9.0, "giou_loss_coef": 1.0},
)


DUELS: Final = (
    "class",
    "bbox",
    "giou",
    "all",
    "other weights",
    "other loss weights",
    "other focal",
    "only class",
    "all of two",
)


def duel_case(seed: int, kind: str, options: Options, varies: frozenset[str]) -> Case:
    """Three images, each with two queries and one or two targets, and two assignments that cost nearly the same.

    ``kind``: ``class``, ``bbox`` or ``giou`` switches the other two costs off (or, where the candidate does not let
    the weights vary, gives both queries what makes the others equal), with two targets, since a single one cannot tell
    a cost from its logarithm; ``only class`` is ``class`` with a single class, and one target, since two of it would
    cost the same; ``all`` weighs the three as configured, ``all of two`` for two targets; ``other weights`` draws the
    three weights; ``other loss weights`` and ``other focal`` leave the matching weights and change the loss weights,
    or α and γ. The gap lies between 2e-3 and 2e-2, a thousand times the rounding of float32 and less than what a wrong
    cost moves.
    """
    rng = np.random.default_rng(seed)
    alone = {"class": (1.0, 0.0, 0.0), "bbox": (0.0, 1.0, 0.0), "giou": (0.0, 0.0, 1.0)}
    weights = alone.get(kind.removeprefix("only "))
    if kind == "other weights":
        first, second, third = (float(w) for w in rng.choice([0.5, 1.0, 3.0, 6.0], 3))
        weights = (first, second, third)
    o = options.with_(num_decoder_layers=1)
    names = ("set_cost_class", "set_cost_bbox", "set_cost_giou")
    free = weights is not None and set(names) <= varies
    if weights is not None and free:
        o = o.with_(**dict(zip(names, weights, strict=True)))
    if kind == "other loss weights":
        o = o.with_(**{k: v for k, v in _OTHER_COEFS[seed % len(_OTHER_COEFS)].items() if k in varies})
    if kind == "other focal":
        focal = {"focal_alpha": (0.6, 0.1, 0.9)[seed % 3], "focal_gamma": (2.0, 1.0, 3.0)[(seed + seed // 3) % 3]}
        o = o.with_(**{k: v for k, v in focal.items() if k in varies})
    if "num_classes" in varies:
        o = o.with_(num_classes=1 if kind == "only class" else 3)
    tokens = 7
    text = o.class_loss == "token"
    book = textbook.under(o)
    logits, boxes, targets, masks = [], [], [], []
    for image in range(3):
        prompt = draw_prompt(rng, o.num_classes, tokens, image)
        count = 2 if kind in ("class", "bbox", "giou", "all of two") else 1
        target = draw_target(rng, Recipe(seed, (count,), 2), o, count, prompt)
        if count == 2 and kind == "class":
            target = _distinct_labels(target, o)
        many = 600
        x = rng.normal(0, 1.5, (many, tokens if text else o.channels)).clip(-4, 4)
        wanted = target["boxes"].double().numpy()
        close = (wanted[rng.integers(0, count, many)] * np.exp(rng.normal(0, 0.3, (many, 4)))).clip(0.02, 0.98)
        y = np.where(rng.random((many, 1)) < 0.7, close, plain_boxes(rng, many))
        if kind in ("class", "only class"):
            y[:] = y[0]
        elif kind in ("bbox", "giou") and not free:
            x[:] = x[0]
        x32, y32 = as_float32(x), as_float32(y)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
        costs = book.cost(x32.double(), y32.double(), wide)
        # queries i and j prefer the targets as they stand iff what i gains on j's by that is less
        gain = costs[:, 0] - (costs[:, 1] if count == 2 else 0)
        order = gain.argsort()
        gaps = gain[order].diff()
        fit = ((gaps > 2e-3) & (gaps < 2e-2)).nonzero()[:, 0]
        at = int(fit[int(rng.integers(0, len(fit)))]) if len(fit) else int(gaps.argmax())
        pair = order[[at, at + 1]][torch.from_numpy(rng.permutation(2))]
        logits.append(x32[pair])
        boxes.append(y32[pair])
        targets.append(target)
        masks.append(prompt[1])
    outputs: dict[str, Any] = {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}
    if text:
        outputs["text_mask"] = torch.stack(masks)
    return Case(f"duel of {kind}, seed {seed}", o, outputs, tuple(targets))


def _distinct_labels(target: dict[str, Tensor], o: Options) -> dict[str, Tensor]:
    """The same two targets with the first class and the last."""
    last = len(target["positive_map"]) - 1 if "positive_map" in target else o.num_classes - 1
    new = {**target, "labels": torch.tensor([0, last])}
    if "positive_map" in target:
        new["token_labels"] = target["positive_map"][new["labels"]]
    return new


def contested_case(
    seed: int, n: int, queries: int, options: Options, varies: frozenset[str], greedy_fails: bool
) -> Case:
    """One image whose best assignment is the same for every sensible distance of boxes, by a clear margin.

    All scores are equal, and where the candidate lets the weights vary the L1 cost decides. With ``greedy_fails``
    neither taking the cheapest pair first nor serving the targets in their order (every second seed: in reverse)
    finds it.
    """
    o = options.with_(num_decoder_layers=1)
    if {"set_cost_bbox", "set_cost_giou"} <= varies:
        o = o.with_(set_cost_bbox=5.0, set_cost_giou=1e-3)
    book = textbook.under(o)
    while True:
        rng = np.random.default_rng(seed)
        centre = rng.uniform(0.35, 0.65, (1, 2))
        wanted = np.concatenate([centre + rng.normal(0, 0.12, (n, 2)), rng.uniform(0.15, 0.3, (n, 2))], -1).round(3)
        pred = np.concatenate([centre + rng.normal(0, 0.12, (queries, 2)), rng.uniform(0.15, 0.3, (queries, 2))], -1)
        pred = pred.round(3)
        greedy_order = 1 if seed % 2 else -1
        seed += 2  # so that the order that must fail stays
        difference = pred[:, None] - wanted[None]
        l1 = np.abs(difference).sum(-1)
        best = _assigned(l1)
        if greedy_fails and (_greedy(l1) == best or _in_order(l1, greedy_order) == best):
            continue
        a, b = torch.from_numpy(pred)[:, None], torch.from_numpy(wanted)[None]
        giou = -book.giou(a, b).numpy()
        corners = book.l1(book.corners(a), book.corners(b)).numpy()
        costs = [l1, corners, np.sqrt((difference**2).sum(-1)), giou, 5 * l1 + 2 * giou]
        if all(_assigned(c) == best and _margin(c, best) > 0.05 * abs(c).max() for c in costs):
            break
    channels = 5 if o.class_loss == "token" else o.channels
    outputs: dict[str, Any] = {
        "pred_logits": torch.zeros(1, queries, channels),
        "pred_boxes": as_float32(pred[None]),
    }
    target: dict[str, Tensor] = {"labels": torch.zeros(n, dtype=torch.int64), "boxes": as_float32(wanted)}
    if o.class_loss == "token":
        spread = torch.eye(2, channels).roll(1, -1)
        target |= {"token_labels": spread[target["labels"]], "positive_map": spread}
        outputs["text_mask"] = torch.ones(1, channels, dtype=torch.bool)
    return Case(f"{n} targets contest {queries} queries, seed {seed}", o, outputs, (target,))


def _assigned(costs: Any) -> set[tuple[int, int]]:
    return set(zip(*(i.tolist() for i in linear_sum_assignment(costs)), strict=True))


def _margin(costs: Any, best: set[tuple[int, int]]) -> float:
    """By how much the second-best assignment costs more than the best."""

    def without(pair: tuple[int, int]) -> float:
        barred = costs.copy()
        barred[pair] = 1e3
        return float(sum(costs[p] for p in _assigned(barred)))

    return min(map(without, best)) - float(sum(costs[p] for p in best))


def _greedy(costs: Any) -> set[tuple[int, int]]:
    """The cheapest pair first."""
    found: set[tuple[int, int]] = set()
    for flat in costs.argsort(axis=None):
        q, t = (int(i) for i in np.unravel_index(flat, costs.shape))
        if all(q != a and t != b for a, b in found):
            found.add((q, t))
    return found


def _in_order(costs: Any, step: int) -> set[tuple[int, int]]:
    """Target by target, each taking the cheapest query left."""
    found: dict[int, int] = {}
    for t in range(costs.shape[1])[::step]:
        left = [q for q in range(len(costs)) if q not in found]
        if left:
            found[min(left, key=lambda q: costs[q, t])] = t
    return set(found.items())
