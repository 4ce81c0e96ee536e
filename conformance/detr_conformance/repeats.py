"""From a failed comparison to what anyone can look at in one call of a criterion of their own.

A comparison states its quantity in words. Here the words are read, and the reading is tried: the candidate must fail
it and the right textbook must meet it, else there is none. So no script is written that would blame a right criterion.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import bind
from detr_conformance.cases import ENC, FINAL, Case
from detr_conformance.experiments import called
from detr_conformance.findings import Repeat
from detr_conformance.registry import Check, Comparison
from detr_conformance.seen import Seen
from detr_conformance.tallies import RAISES
from detr_reference.textbook import textbook

TERM_OF = {"class loss": "ce", "tokens": "ce", "L1": "bbox", "GIoU": "giou"}  # by component
MOST_COSTS = 10_000  # that a report should hold
PARTS = ("pred_logits", "pred_boxes", "pred_masks")


def of(check: Check, seen: Seen, found: Comparison) -> Repeat | None:
    """What to look at; None where one call does not show what is wrong."""
    if seen.case.outputs["pred_logits"].dtype != torch.float32:
        return None  # what another precision may differ by depends on who computes
    read = _read(seen, found)
    if read is None or _met(read, seen) is not False:
        read = _value(seen, TERM_OF.get(check.component, ""))
    if read is None or _met(read, seen) is not False:
        return None
    if seen.case.options.weighted and read.kind in ("gradient", "total"):
        return None  # read with the weights taken off
    right = called(bind(candidate_of(textbook, seen.bound.profile)), seen.case)
    if read.kind in ("loss", "total", "gradient") and not all(_only_one(seen, layer) for layer in seen.case.layers):
        return None  # another right criterion may match otherwise
    return _as_called(read, seen.case) if _met(read, right) else None


def _read(seen: Seen, found: Comparison) -> Repeat | None:
    what, numbers = found.what, found.numbers
    if what == RAISES:
        return Repeat("returns")
    if match := re.match(r"the loss '(.+?)'", what):
        return Repeat("key", match[1])
    if match := re.match(r"weight_dict\['(.+?)'\]", what):
        want = numbers[0] if numbers else float(found.want) if _is_number(found.want) else 0.0
        return Repeat("weight", match[1], want, numbers[2] if numbers else 1e-6 * abs(want))
    if match := re.match(r"(?:matching|pairs|queries matched|targets matched) (?:of|in) image (\d+), (\w+)$", what):
        return _matching(seen, match[2], int(match[1]))
    if match := re.match(r"(loss_\w+) in the graph", what):
        return Repeat("graph", match[1])
    if match := re.match(r"gradient of (loss_\w+) at (pred_\w+)", what):
        return _gradient(seen, match[1], match[2], found)
    if (match := re.match(r"(loss_\w+) of \w+$", what)) and found.got == "returned":
        return Repeat("no key", match[1])
    if what in seen.got.keys:
        if numbers:
            return Repeat("loss", what, numbers[0], numbers[2])
        if found.want.endswith(", unweighted"):
            return _value(seen, what.removeprefix("loss_"))
        kind = {"finite": "finite", "a real scalar tensor": "scalar"}.get(found.want)
        return Repeat(kind, what) if kind else None
    if what.startswith("Σ loss·weight") and numbers:
        return Repeat("total", "", numbers[0], numbers[2])
    return None


def _value(seen: Seen, term: str) -> Repeat | None:
    """The plain value of a term's final loss, where what fails is another property of it."""
    key = f"loss_{term}"
    if seen.raised or not term or key not in seen.got.losses:
        return None
    return Repeat("loss", key, seen.want.losses[key], seen.allowed(term, FINAL))


def _matching(seen: Seen, layer: str, image: int) -> Repeat | None:
    if layer not in seen.case.layers:
        return None
    costs, best = seen.costs(layer, image), seen.best[layer][image]
    if costs.numel() > MOST_COSTS:
        return None
    least = float(costs[best.query, best.target].sum())
    # each pair of either assignment may be off by the most that rounding explains
    allowed = 2 * len(best) * float(seen.allowed_cost(layer, image).max())
    rows = tuple(tuple(row) for row in costs.tolist())
    return Repeat("matching", "", least, allowed, at=_path(seen.case, layer), index=(image,), costs=rows)


def _gradient(seen: Seen, key: str, part: str, found: Comparison) -> Repeat | None:
    layer = next((n for n in seen.case.layers if key in seen.case.keys(n)), "")
    term = key.removeprefix("loss_").removesuffix(seen.case.suffix(layer)) if layer else ""
    sums, at = seen.case.sums.get(term, ()), PARTS.index(part) if part in PARTS else -1
    if not sums or at < 0 or (term, layer) not in seen.want.grads:
        return None
    path = f"{_path(seen.case, layer)}/{part}".lstrip("/")
    got, want = seen.got.grads.get((term, layer), (None, None, None))[at], seen.want.grads[term, layer][at]
    if got is None:
        return Repeat("gradient", key, sums=sums, at=path)
    if found.numbers is None:  # a query that must get none
        got, numbers = got.where(want == 0, torch.zeros_like(got)), (0.0, 0.0, 0.0)
        place = _place(got.abs() == got.abs().max())
    else:
        numbers = found.numbers
        place = _place((want == numbers[0]) & (got == numbers[1]))
    if place is None:
        return None
    return Repeat("gradient", key, numbers[0], numbers[2], sums, path, place)


def _only_one(seen: Seen, layer: str) -> bool:
    """True where no other assignment of any image is as good within rounding. (``Seen.decided`` is stricter: it wants
    a worse one to exist.)"""
    for b, best in enumerate(seen.best[layer]):
        if not len(best):
            continue
        costs, allowed = seen.costs(layer, b), seen.allowed_cost(layer, b)
        pairs = set(zip(best.query.tolist(), best.target.tolist(), strict=True))
        for q, t in pairs:
            barred = costs.clone()
            barred[q, t] = 1e6
            other = seen.book.assign(barred)
            differs = set(zip(other.query.tolist(), other.target.tolist(), strict=True)) != pairs
            if differs and seen.more_than_best(layer, b, other) <= tolerance.slack(allowed, other, best):
                return False
    return True


def _place(where: Tensor) -> tuple[int, ...] | None:
    found = where.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _path(case: Case, layer: str) -> str:
    """Where the predictions of a layer stand in ``outputs``."""
    if layer == FINAL:
        return ""
    return case.options.encoder_key if layer == ENC else f"aux_outputs/{layer[3:]}"


def _met(it: Repeat, seen: Seen) -> bool | None:
    """Whether a call shows what is right; None where it tells nothing."""
    got = seen.got
    if seen.raised or it.kind == "returns":
        return not seen.raised
    if it.kind in ("key", "no key", "scalar", "finite", "graph"):
        there = it.name in got.keys
        return {
            "key": there,
            "no key": not there,
            "scalar": there and it.name not in got.odd,
            "finite": math.isfinite(got.losses.get(it.name, math.nan)),
            "graph": it.name in got.attached,
        }[it.kind]
    if it.kind == "matching":
        return _cheap(it, seen)
    weights = got.weights or {}
    if it.kind == "loss":
        return _within(it, got.losses.get(it.name))
    if it.kind == "weight":
        return _within(it, weights.get(it.name, None if it.want else 0.0))
    if it.kind == "total":
        return _within(it, sum(got.losses[k] * w for k, w in weights.items() if k in got.losses))
    term = next(t for t, keys in seen.case.sums.items() if keys == it.sums)
    *path, part = it.at.split("/")
    layer = next(n for n in seen.case.layers if _path(seen.case, n) == "/".join(path))
    grad = seen.got.grads.get((term, layer), (None, None, None))[PARTS.index(part)]
    if it.want is None or grad is None:
        return grad is not None
    return _within(it, float(grad[it.index]))


def _cheap(it: Repeat, seen: Seen) -> bool | None:
    layer = next(n for n in seen.case.layers if _path(seen.case, n) == it.at)
    found = seen.got.pairs.get(layer)
    if found is None:
        return None  # no matcher that could be called
    pairs, costs = found[it.index[0]], torch.tensor(it.costs, dtype=torch.float64)
    query, target = pairs.query.tolist(), pairs.target.tolist()
    if not len(query) == len(set(query)) == len(set(target)) == min(costs.shape):
        return False
    assert it.want is not None
    return float(costs[pairs.query, pairs.target].sum()) - it.want <= it.allowed


def _within(it: Repeat, got: float | None) -> bool:
    assert it.want is not None
    return got is not None and math.isfinite(got) and abs(got - it.want) <= it.allowed


def _as_called(it: Repeat, case: Case) -> Repeat:
    """In the numbers that the candidate returns, where its losses are declared to come weighted."""
    if not case.options.weighted or it.kind != "loss" or it.want is None:
        return it
    weight = textbook.under(case.options).weights().get(it.name) or 1.0
    return replace(it, want=it.want * weight, allowed=it.allowed * weight)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
