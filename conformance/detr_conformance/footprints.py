"""The numbers that tell one criterion from another on one input, and what a book of formulas makes of them.

A textbook with some formulas replaced is evaluated beside the candidate, at the candidate's own matching or at its
own, or by its matching alone. Where its numbers differ from the right textbook's is its footprint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance.adapters.textbook import BookCriterion
from detr_conformance.cases import MASK_TERMS, Case
from detr_conformance.observation import Observation
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS, OPS
from detr_reference.options import Options
from detr_reference.textbook import TERMS, Layer, Pairs, Textbook, textbook

CLOSE: Final = 256 * EPS  # relative: two right float32 criterions, sums of some dozens of terms

_GIOU: Final = ("corners", "area", "intersection", "union", "enclosing", "share", "giou", "loss_giou")
_CLASS: Final = (
    *("class_weight", "softmax_class_target", "softmax_loss", "softmax_divisor", "focal_term", "alpha_weight"),
    *("focusing", "focal_class_target", "token_class_target", "in_loss", "focal_image", "focal_loss"),
    *("class_divisor", "loss_ce"),
)
TERM_OF: Final[Mapping[str, frozenset[str]]] = {  # the terms that a formula has a part in, where it is not all
    **dict.fromkeys(_GIOU, frozenset({"giou"})),
    **dict.fromkeys(("l1", "loss_bbox"), frozenset({"bbox"})),
    "matched_boxes": frozenset({"bbox", "giou"}),
    **dict.fromkeys(_CLASS, frozenset({"ce"})),
}
CLASS_COSTS: Final = frozenset({"softmax_cost", "focal_difference", "focal_cost", "token_cost", "class_cost"})
INPUTS: Final = frozenset({"layers", "layer_targets", "encoder_targets", "taken", "layer_masks"})

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
    found: dict[Atom, Any] = {("loss", k): v for k, v in losses.items() if _counts(k, terms)}
    found |= {("in the graph", k): k in attached for k in losses if k in trained and _counts(k, terms)}
    found |= {("form", k): what for k, what in odd.items() if _counts(k, terms)}
    return found | {("weight", k): v for k, v in (weights or {}).items()}


def _term_of(key: str) -> str:
    """The term that a key is a loss of, or ""."""
    term = key.split("_")[1] if key.startswith("loss_") else ""
    return term if term in ANY_TERM else ""


def _counts(key: str, terms: frozenset[str]) -> bool:
    """True for a loss of one of the terms, and for whatever is no loss of any."""
    return _term_of(key) in terms | {""}


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
                terms = self._own_terms(book, view)
                if not terms:
                    found = self._differentiated(self._losses(book, view), self.seen.case.sums)
                else:
                    sums = {t: keys for t, keys in self.seen.case.sums.items() if t.split("_")[0] in terms}
                    rest = {a: v for a, v in self.gradients((), textbook, view).items() if a[1] not in sums}
                    found = {**rest, **self._differentiated(self._of_terms(book, terms), sums)}
            except Exception:
                found = {("raised",): True}
            self._results[name, view, "gradients"] = found
        gradients: Atoms = self._results[name, view, "gradients"]
        return gradients

    def named(self, name: Any, book: Textbook, view: str) -> Atoms:
        """The same, and which losses go by another name."""
        if (name, view, "named") not in self._results:
            self._results[name, view, "named"] = self._with_names(self.of(name, book, view), view)
        found: Atoms = self._results[name, view, "named"]
        return found

    def loss(self, name: Any, book: Textbook, view: str, atom: Atom) -> Any:
        """One loss of a book, of its layer alone where the book's formulas allow it: much quicker than all of them."""
        terms, layer = self._own_terms(book, view) & {_term_of(atom[1])}, self.layer(atom)
        if not (terms and layer):
            return self.of(name, book, view).get(atom)
        if (name, atom) not in self._results:
            try:
                self._results[name, atom] = float(self._of_terms(book, terms, layer)[atom[1]].detach())
            except Exception:  # a formula that is not made for this input
                self._results[name, atom] = None
        return self._results[name, atom]

    def layer(self, atom: Atom) -> str:
        """The layer that a loss or a matching is of, or ""."""
        of = atom[1] if len(atom) > 1 else ""
        return of if atom[0] == "pairs" else self._layer_of.get(of, "")

    @cached_property
    def _layer_of(self) -> dict[str, str]:
        case = self.seen.case
        return {key: layer for layer in (*case.layers, *case.denoising) for key in case.keys(layer)}

    def theirs(self, view: str) -> Atoms:
        """The candidate's numbers."""
        if view not in self._results:
            own = self._theirs_matched() if view == MATCHED else atoms(self.seen.got)
            self._results[view] = self._with_names(own, view)
        found: Atoms = self._results[view]
        return found

    def _with_names(self, found: Atoms, view: str) -> Atoms:
        """With the losses that are missing, and returned under a name that the contract does not know."""
        right = self.of((), textbook, view)
        missing = [a for a in right if a[0] == "loss" and a not in found and not is_log(a) and right[a]]
        strange = [a for a in found if a[0] == "loss" and a not in right and found[a]] if missing else []
        other = {a: next((s for s in strange if self.equal(a, found[s], right[a])), ()) for a in missing}
        named: dict[Atom, Any] = {("another name", a[1]): s[1][-1:].isdigit() for a, s in other.items() if s}
        if len(named) == len(missing):  # which it has is of no account, then
            found = {a: v for a, v in found.items() if a[1:] not in {s[1:] for s in strange}}
        return {**found, **named}

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
        terms = self._own_terms(book, view)
        if not terms:
            weights = under(book, self.seen.case.options).weights()
            return self._atoms(self._losses(book, view), weights)
        rest = {a: v for a, v in self.of((), textbook, view).items() if _term_of(a[1]) not in terms or a[0] == "weight"}
        return {**rest, **self._atoms(self._of_terms(book, terms), {})}

    def _atoms(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[Atom, Any]:
        scalars = {k: float(v.detach()) for k, v in losses.items() if v.numel() == 1}
        attached = frozenset(k for k, v in losses.items() if v.requires_grad)
        odd = {k: f"a tensor of shape {list(v.shape)}" for k, v in losses.items() if v.ndim}
        return _of_losses(self.seen.case, scalars, attached, odd, weights, ANY_TERM)

    def _own_terms(self, book: Textbook, view: str) -> frozenset[str]:
        """The terms that a book's own formulas have a part in, if that can be told; else none."""
        return terms_of(book) if view == HERE and self.seen.case.maskless else frozenset()

    def _of_terms(self, book: Textbook, terms: frozenset[str], only: str = "") -> dict[str, Tensor]:
        """The losses of these terms, or those of one layer, the rest of the call being as the right textbook has it."""
        book = under(book, self._right.o)
        found: dict[str, Tensor] = {}
        for layer, targets, pairs, nb, mask in (*self._layers, *self._denoising):
            if only and layer.name != only:
                continue
            if "ce" in terms:
                found[f"loss_ce{layer.suffix}"] = book.loss_ce(layer, targets, pairs, nb, mask)
            if terms & {"bbox", "giou"}:
                boxes = book.matched_boxes(layer, targets, pairs)
                for term, loss in (("bbox", book.loss_bbox), ("giou", book.loss_giou)):
                    if term in terms:
                        found[f"loss_{term}{layer.suffix}"] = loss(*boxes, nb)
        return found

    @cached_property
    def _right(self) -> Textbook:
        return textbook.under(self.seen.case.options.with_(weighted=False))  # an observation is without them

    @cached_property
    def _layers(self) -> list[tuple[Layer, Any, list[Pairs], Tensor, Tensor | None]]:
        """Every layer with its targets, the candidate's matching, divisor and mask, as the right textbook has them."""
        book, outputs = self._right, self._leaves[0]
        taken = [book.taken(t) for t in self.seen.case.targets]
        nb, found = book.num_boxes(taken), []
        for layer in book.layers(outputs):
            pairs = list(self.seen.pairs[layer.name])
            divisor, mask = book.layer_num_boxes(layer, nb, pairs), book.layer_mask(layer, outputs)
            found.append((layer, book.layer_targets(layer, taken), pairs, divisor, mask))
        return found

    @cached_property
    def _denoising(self) -> list[tuple[Layer, Any, list[Pairs], Tensor, Tensor | None]]:
        """Every layer of denoising queries, with the same."""
        book, outputs = self._right, self._leaves[0]
        taken = [book.taken(t) for t in self.seen.case.targets]
        nb = book.num_boxes(taken)
        return [
            (x, taken, book.denoising_pairs(x, taken), book.denoising_divisor(x, nb), book.layer_mask(x, outputs))
            for x in book.denoising_layers(outputs)
        ]

    def _losses(self, book: Textbook, view: str) -> Mapping[str, Tensor]:
        at_theirs = view == HERE and "layers" not in changed(book)  # else a layer may have another one's predictions
        given = self.seen.pairs if at_theirs else {}
        case = self.seen.case
        losses: Mapping[str, Tensor] = under(book, self._right.o).losses(self._leaves[0], case.targets, given).losses
        return losses

    def _differentiated(self, losses: Mapping[str, Tensor], sums: Mapping[str, Sequence[str]]) -> dict[Atom, Any]:
        leaves = self._leaves[1]
        flat = [t for own in leaves.values() for t in own.values()]
        found: dict[Atom, Any] = {}
        for term, keys in sums.items():
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
        case, own = self.seen.case, changed(book)
        book = under(book, self._right.o)
        found = {}
        with torch.no_grad():
            if own & INPUTS:
                taken = [book.taken(t) for t in case.targets]
                every = [(layer, book.layer_targets(layer, taken)) for layer in book.layers(case.outputs)]
            else:
                every = [(layer, targets) for layer, targets, *_ in self._layers]
            for layer, targets in every:
                if own & {"assign", "match", "layer_match"}:
                    solved = book if "assign" in own else self._preferring(book, layer)
                    found[layer.name] = solved.layer_match(layer, [x for x, _ in every], targets)
                else:
                    found[layer.name] = self._by_cost(book, layer, targets)
        criterion = BookCriterion(book) if "indices" in own else None
        said = self._answer(Observation(case, criterion=criterion), found)
        return _pairs_by_image(found) | {("matcher",): said}

    def _by_cost(self, book: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        """The assignments of least cost, the candidate's own among equals."""
        found = []
        image = 0
        if not changed(book) & (CLASS_COSTS | INPUTS):  # the dearest part, and the same for most
            book = under(book, book.o, class_cost=lambda _book, _x, target: self._class_cost(layer, image, target))
        for b, (target, theirs) in enumerate(zip(targets, self.seen.pairs[layer.name], strict=True)):
            pairs, image = theirs, b
            if len(target["boxes"]):
                costs = book.cost(layer.logits[b], layer.boxes[b], target)
                pairs = _cheapest(costs, book.assign(costs), theirs)
            found.append(pairs)
        return found

    def _preferring(self, book: Textbook, layer: Layer) -> Textbook:
        """The book, with a solver that finds the candidate's assignments among equals, image after image."""
        solve = self._right.assign
        theirs = iter([p for p, t in zip(self.seen.pairs[layer.name], self.seen.case.targets, strict=True)
                       if len(t["boxes"])])  # fmt: skip

        def assign(_book: Textbook, costs: Tensor) -> Pairs:
            best = solve(costs)
            return _cheapest(costs, best, next(theirs, best))

        return under(book, book.o, assign=assign)

    def _class_cost(self, layer: Layer, image: int, target: Mapping[str, Tensor]) -> Tensor:
        at = ("class cost", layer.name, image)
        if at not in self._results:
            self._results[at] = self._right.class_cost(layer.logits[image], target)
        cost: Tensor = self._results[at]
        return cost

    def _theirs_matched(self) -> Atoms:
        return _pairs_by_image(self.seen.pairs) | {("matcher",): self._answer(self.seen.got, self.seen.pairs)}

    def _answer(self, got: Observation, own: Mapping[str, Sequence[Pairs]]) -> str:
        """What is wrong with what the matcher returns, or that it is not what the losses are computed with."""
        same = all(_pairs(p) == _pairs(q) for k, every in got.pairs.items() for p, q in zip(every, own[k], strict=True))
        return got.bad_pairs or ("" if same else "others")


def _cheapest(costs: Tensor, best: Pairs, theirs: Pairs) -> Pairs:
    """The candidate's assignment where it costs no more than the best by more than rounding."""
    queries, targets = costs.shape
    fits = len(best) == len(theirs) and bool((theirs.query < queries).all() and (theirs.target < targets).all())
    if not fits:
        return best
    least, own = (float(costs[p.query, p.target].sum()) for p in (best, theirs))
    return theirs if abs(own - least) <= CLOSE * max(float(costs.abs().max()), 1.0) else best


def _pairs(pairs: Pairs) -> frozenset[tuple[int, int]]:
    return frozenset(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))


def _pairs_by_image(found: Mapping[str, Sequence[Pairs]]) -> dict[Atom, Any]:
    return {("pairs", layer, str(b)): _pairs(p) for layer, own in found.items() for b, p in enumerate(own)}


def composed(faults: Sequence[Any]) -> Textbook:
    """The textbook with several faults, the last one applied last."""
    book = textbook
    for fault in faults:
        book = fault.apply(book)
    return book


def under(book: Textbook, options: Options, **formulas: Any) -> Textbook:
    """``book.under(options)`` with formulas replaced, made without checks: it is done a thousand times a diagnosis."""
    new = object.__new__(Textbook)
    vars(new)["o"] = options
    for name in _FORMULAS:
        vars(new)[name] = MethodType(formulas.get(name) or getattr(book, name).__func__, new)
    return new


def changed(book: Textbook) -> frozenset[str]:
    """The formulas that a book replaces."""
    return frozenset(name for name, formula in _FORMULAS.items() if getattr(book, name).__func__ is not formula)


def terms_of(book: Textbook) -> frozenset[str]:
    """The terms that the formulas which a book replaces have a part in, if they are of some terms alone; else none."""
    own = changed(book)
    return frozenset().union(*(TERM_OF[name] for name in own)) if own <= TERM_OF.keys() else frozenset()


def wraps(book: Textbook) -> bool:
    """True where a formula that a book replaces calls the one that it replaces, so that it matters which comes last."""
    cells = (cell for name in changed(book) for cell in getattr(book, name).__func__.__closure__ or ())
    return any(isinstance(c.cell_contents, Textbook) or c.cell_contents in _FORMULAS.values() for c in cells)


_FORMULAS: Final = {n: getattr(textbook, n).__func__ for n in Textbook.__dataclass_fields__ if n != "o"}


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
