"""The numbers that tell one criterion from another on one input, and what a book of formulas makes of them.

A textbook with some formulas replaced is evaluated beside the candidate, at the candidate's own matching or at its
own, or by its matching alone. Where its numbers differ from the right textbook's is its footprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance.cases import MASK_TERMS, Case
from detr_conformance.observation import Observation
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS, OPS
from detr_reference.textbook import TERMS, Pairs, Textbook, textbook

CLOSE: Final = 256 * EPS  # relative: two right float32 criterions, sums of some dozens of terms

Atom = tuple[str, ...]
Atoms = Mapping[Atom, Any]

ANY_TERM: Final = frozenset((*TERMS, *MASK_TERMS))
HERE: Final = "at the candidate's matching"
OWN: Final = "at its own matching"
MATCHED: Final = "what it matches"


def atoms(got: Observation, terms: frozenset[str] = ANY_TERM) -> dict[Atom, Any]:
    """Every number of an observation by its name: losses and whether they are in the graph, gradients, weights."""
    found = _of_losses(got.case, got.losses, got.attached, got.odd, got.weights, terms)
    for (term, layer), grads in got.grads.items():
        if term.split("_")[0] in terms:
            names = ("logits", "boxes", "masks")[: len(grads)]
            found |= {("grad", term, layer, name): g for name, g in zip(names, grads, strict=True)}
    return found


def _of_losses(
    case: Case,
    losses: Mapping[str, float],
    attached: frozenset[str],
    odd: Mapping[str, str],
    weights: Mapping[str, float] | None,
    terms: frozenset[str],
) -> dict[Atom, Any]:
    trained = {key for keys in case.sums.values() for key in keys}
    found: dict[Atom, Any] = {("loss", k): v for k, v in losses.items() if _of_terms(k, terms)}
    found |= {("in the graph", k): k in attached for k in losses if k in trained and _of_terms(k, terms)}
    found |= {("form", k): what for k, what in odd.items() if _of_terms(k, terms)}
    return found | {("weight", k): v for k, v in (weights or {}).items() if k in losses}


def _of_terms(key: str, terms: frozenset[str]) -> bool:
    """True for a loss of one of the terms, and for whatever is no loss of any."""
    term = key.split("_")[1] if key.startswith("loss_") else ""
    return term in terms or term not in ANY_TERM


def is_log(atom: Atom) -> bool:
    """True for what a criterion may log or not, as it likes."""
    return atom[0] == "loss" and not atom[1].startswith("loss")


@dataclass(eq=False)
class Probe:
    """One input: what the candidate makes of it, and what books of formulas do, each evaluated once."""

    seen: Seen
    _results: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _leaves(self) -> tuple[Mapping[str, Any], dict[str, dict[str, Tensor]]]:
        """The outputs in float64, and their leaves by layer and key."""
        leaves: dict[str, dict[str, Tensor]] = {}

        def leaf(layer: str, key: str, value: Tensor) -> Tensor:
            return leaves.setdefault(layer, {}).setdefault(key, value.double().clone().requires_grad_())

        return self.seen.case.with_predictions(leaf).outputs, leaves

    def of(self, name: Any, book: Textbook, view: str) -> Atoms:
        """The numbers of a book without gradients. ``name``: what it is kept under."""
        if (name, view) not in self._results:
            try:
                found = self._matched(book) if view == MATCHED else self._valued(book, view)
            except Exception:  # a formula that is not made for this input
                found = {("raised",): True}
            self._results[name, view] = found
        values: Atoms = self._results[name, view]
        return values

    def gradients(self, name: Any, book: Textbook, view: str) -> Atoms:
        """Its gradients."""
        if (name, view, "gradients") not in self._results:
            try:
                found = self._differentiated(self._losses(book, view))
            except Exception:
                found = {("raised",): True}
            self._results[name, view, "gradients"] = found
        gradients: Atoms = self._results[name, view, "gradients"]
        return gradients

    def theirs(self, view: str) -> Atoms:
        """The candidate's numbers."""
        if view not in self._results:
            self._results[view] = _pairs_by_image(self.seen.pairs) if view == MATCHED else atoms(self.seen.got)
        found: Atoms = self._results[view]
        return found

    def equal(self, atom: Atom, one: Any, other: Any) -> bool:
        """True where two numbers of this input differ by no more than rounding explains."""
        if equal(one, other):
            return True
        if one is None or other is None or isinstance(one, str) or isinstance(other, str):
            return False
        if atom[0] == "grad" and atom[3] == "boxes" and isinstance(one, Tensor):
            return equal(one, other, 1 + OPS * EPS * self._narrow / CLOSE)
        if atom[0] == "loss" and self.seen.got.losses.get(atom[1]) is not None:
            return abs(float(one) - float(other)) <= self._allowed(atom[1])
        return False

    @cached_property
    def _narrow(self) -> float:
        """How much a box edge's rounding is enlarged by the smallest side."""
        case = self.seen.case
        least = min(float(case.predictions(x)["pred_boxes"][..., 2:].min()) for x in case.layers)
        return 1 / max(least, 1e-3)

    def _allowed(self, key: str) -> float:
        for layer in self.seen.case.layers:
            for term, own in zip(TERMS, self.seen.case.keys(layer), strict=False):
                if own == key:
                    return float(self.seen.allowed(term, layer))
        return 0.0

    def _valued(self, book: Textbook, view: str) -> Atoms:
        losses = self._losses(book, view)
        scalars = {k: float(v.detach()) for k, v in losses.items() if v.numel() == 1}
        attached = frozenset(k for k, v in losses.items() if v.requires_grad)
        odd = {k: f"a tensor of shape {list(v.shape)}" for k, v in losses.items() if v.ndim}
        weights = book.under(self.seen.case.options).weights()
        return _of_losses(self.seen.case, scalars, attached, odd, weights, ANY_TERM)

    def _losses(self, book: Textbook, view: str) -> Mapping[str, Tensor]:
        case = self.seen.case
        book = book.under(case.options.with_(weighted=False))  # an observation is without them
        given = self.seen.pairs if view == HERE else {}
        losses: Mapping[str, Tensor] = book.losses(self._leaves[0], case.targets, given).losses
        return losses

    def _differentiated(self, losses: Mapping[str, Tensor]) -> Atoms:
        leaves = self._leaves[1]
        flat = [t for own in leaves.values() for t in own.values()]
        found: dict[Atom, Any] = {}
        for term, keys in self.seen.case.sums.items():
            parts = [losses[k].sum() for k in keys if k in losses and losses[k].requires_grad]
            grads: Sequence[Tensor | None] = [None] * len(flat)
            if parts:
                grads = torch.autograd.grad(torch.stack(parts).sum(), flat, allow_unused=True, retain_graph=True)
            each = iter(grads)
            for layer, own in leaves.items():
                found |= {("grad", term, layer, key.removeprefix("pred_")): next(each) for key in own}
        return found

    def _matched(self, book: Textbook) -> Atoms:
        """What a book matches; where that costs it no less than the candidate's matching does, the candidate's."""
        case = self.seen.case
        book = book.under(case.options.with_(weighted=False))
        targets = [book.taken(t) for t in case.targets]
        with torch.no_grad():
            every = book.layers(case.outputs)
            found = {}
            for layer in every:
                own = book.layer_targets(layer, targets)
                pairs = book.layer_match(layer, every, own)
                theirs = self.seen.pairs.get(layer.name)
                if theirs is not None:
                    pairs = [
                        t if _tie(book, layer.logits[b], layer.boxes[b], own[b], p, t) else p
                        for b, (p, t) in enumerate(zip(pairs, theirs, strict=True))
                    ]
                found[layer.name] = pairs
        return _pairs_by_image(found)


def _tie(book: Textbook, logits: Tensor, boxes: Tensor, target: Mapping[str, Tensor], one: Pairs, other: Pairs) -> bool:
    """True where two matchings of an image are the same, or cost a book the same within rounding."""
    if _pairs(one) == _pairs(other):
        return True
    if len(one) != len(other) or len({q for q, _ in _pairs(one)}) < len(one):
        return False
    costs = book.cost(logits, boxes, target)
    if len(book.assign(costs)) != len(one) or _pairs(book.assign(costs)) != _pairs(one):
        return False  # not by its costs
    a, b = (float(costs[p.query, p.target].sum()) for p in (one, other))
    return abs(a - b) <= CLOSE * max(float(costs.abs().max()), 1.0)


def _pairs(pairs: Pairs) -> frozenset[tuple[int, int]]:
    return frozenset(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))


def _pairs_by_image(found: Mapping[str, Sequence[Pairs]]) -> Atoms:
    return {("pairs", layer, str(b)): _pairs(p) for layer, own in found.items() for b, p in enumerate(own)}


def named_otherwise(theirs: Atoms, right: Atoms, same: Callable[[Atom, Any, Any], bool]) -> dict[Atom, Any]:
    """The losses that are missing, and returned under a name that the contract does not know."""
    missing = [a for a in right if a[0] == "loss" and a not in theirs and not is_log(a)]
    strange = [a for a in theirs if a[0] == "loss" and a not in right and theirs[a]]
    return {("another name", *a[1:]): any(same(a, theirs[s], right[a]) for s in strange) for a in missing if right[a]}


def composed(faults: Sequence[Any]) -> Textbook:
    """The textbook with several faults, the last one applied last."""
    book = textbook
    for fault in faults:
        book = fault.apply(book)
    return book


def changed(book: Textbook) -> frozenset[str]:
    """The formulas that a book replaces."""
    names = Textbook.__dataclass_fields__.keys() - {"o"}
    return frozenset(n for n in names if getattr(book, n).__func__ is not getattr(textbook, n).__func__)


def equal(one: Any, other: Any, factor: float = 1.0) -> bool:
    """True where two numbers are the same within the rounding of right float32 criterions, times ``factor``."""
    if one is None or other is None:
        one = other if one is None else one
        return one is None or (isinstance(one, Tensor) and not bool(one.any()))  # no gradient, or one that is zero
    if isinstance(one, (str, frozenset, bool)) or isinstance(other, (str, frozenset, bool)):
        return bool(one == other)
    if isinstance(one, Tensor):
        if one.shape != other.shape:
            return False
        one, other = one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0)
        scale = float(torch.maximum(one.abs().max(), other.abs().max())) if one.numel() else 0.0
        return bool(((one - other).abs() <= factor * 64 * CLOSE * scale + 1e-12).all())
    a, b = float(one), float(other)
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if math.isinf(a) or math.isinf(b):
        return a == b
    return abs(a - b) <= CLOSE * max(abs(a), abs(b)) + 1e-9
