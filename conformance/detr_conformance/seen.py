"""One case beside what the candidate and the textbook make of it.

Values are compared at the candidate's own matching, so that a mistake in the matching does not show in the losses,
nor the other way round, and a tie never decides a verdict. That matching is read off the box gradients: which queries
get one, and towards which target it points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.observation import Grads, Observation
from detr_reference.textbook import Layer, Pairs, Textbook, textbook

FITS: Final = 2e-3  # of a direction: far above float32 rounding, far below what another target would give

UNDECIDED: Final = "undecided"  # the remark why an experiment decides nothing


@dataclass(frozen=True, eq=False)
class Expected:
    """What the textbook returns for a case: float64 losses by key, and gradients by (term, layer)."""

    losses: Mapping[str, float]
    grads: Mapping[tuple[str, str], tuple[Tensor, ...]]


def expect(book: Textbook, case: Case, given: Mapping[str, Sequence[Pairs]] | None = None) -> Expected:
    """The textbook's result, each term's losses summed over the layers for its gradients."""
    leaves: dict[str, dict[str, Tensor]] = {}

    def leaf(layer: str, key: str, value: Tensor) -> Tensor:
        new = value.double().clone().requires_grad_()
        leaves.setdefault(layer, {})[key] = new
        return new

    wide = case.with_predictions(leaf)
    losses = book(wide.outputs, wide.targets, given).losses
    flat = [t for own in leaves.values() for t in own.values()]
    grads: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    for term, keys in case.sums.items():
        total = torch.stack([losses[key] for key in keys]).sum()
        found = torch.autograd.grad(total, flat, retain_graph=True, allow_unused=True)
        full = iter([torch.zeros_like(t) if g is None else g for g, t in zip(found, flat, strict=True)])
        for layer, own in leaves.items():
            grads[term, layer] = tuple(next(full) for _ in own)
    return Expected({k: float(v.detach()) for k, v in losses.items()}, grads)


@dataclass(frozen=True, eq=False)
class Seen:
    """One case, what the candidate returned for it, and what the textbook says.

    ``twins``: the same of further calls of the experiment, by name · ``crossed``: gradients of each layer's losses
    with respect to every layer · ``remarks``: facts of an experiment that are no loss · ``trials``: calls that may
    well raise · ``eps``: that of the precision that a loss may be computed in · ``mean``: that of N over the ranks,
    where the call was made on one of several · ``facts``: what an experiment of another kind found.
    """

    bound: Bound
    case: Case
    got: Observation
    twins: Mapping[str, Seen] = field(default_factory=dict)
    crossed: Mapping[str, Mapping[str, Grads]] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    trials: Mapping[str, Observation] = field(default_factory=dict)
    eps: float = tolerance.EPS
    mean: float | None = None
    facts: Any = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def raised(self) -> str:
        """The exception of the first call that raised, or ""."""
        return next((s.got.raised for s in (self, *self.twins.values()) if s.got.raised), "")

    @cached_property
    def book(self) -> Textbook:
        """The textbook under the case's options."""
        book = textbook.under(self.case.options.with_(weighted=False))  # an observation is without them
        mean = self.mean
        return book if mean is None else replace(book, over_ranks=lambda book, n: torch.full_like(n, mean))

    def _of_case(self, name: Any, make: Callable[[], Any]) -> Any:
        """What follows from the case alone, whoever is judged on it: found out once."""
        if name not in self.case.memo:
            self.case.memo[name] = make()
        return self.case.memo[name]

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers in float64."""
        found: Mapping[str, Layer] = self._of_case(
            "layers", lambda: {layer.name: layer for layer in self.book.layers(self.case.outputs)}
        )
        return found

    def targets(self, layer: str) -> Sequence[Mapping[str, Tensor]]:
        """The targets that a layer is matched and trained with, in float64."""
        found: Sequence[Mapping[str, Tensor]] = self.book.layer_targets(self.layers[layer], self._targets)
        return found

    @cached_property
    def nb(self) -> float:
        """The contract's divisor: max(N, 1), N the mean over the ranks."""
        return float(max(self.case.total if self.mean is None else self.mean, 1))

    # --- the matching ---

    @property
    def best(self) -> Mapping[str, list[Pairs]]:
        """The textbook's own matching of every layer."""
        found: Mapping[str, list[Pairs]] = self._of_case("best", lambda: {n: self._best(n) for n in self.case.layers})
        return found

    def _best(self, layer: str) -> list[Pairs]:
        none = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        return [self.book.assign(self.costs(layer, b)) if n else none for b, n in enumerate(self.case.counts)]

    @cached_property
    def pairs(self) -> Mapping[str, list[Pairs]]:
        """The candidate's own matching of every layer."""
        return {layer: self._pairs_of(layer) for layer in self.case.layers}

    def costs(self, layer: str, image: int) -> Tensor:
        """The textbook's matching cost [Q,n] of one image."""
        at = ("costs", layer, image)
        if at not in self.case.memo:
            own = self.layers[layer]
            with torch.no_grad():
                found = self.book.cost(own.logits[image], own.boxes[image], self.targets(layer)[image])
            self.case.memo[at] = found.nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4)
        cost: Tensor = self.case.memo[at]
        return cost

    def excess(self, layer: str, image: int) -> tuple[float, float]:
        """By how much the candidate's matching of an image costs more than the least, and how much rounding
        explains."""
        pairs, best = self.pairs[layer][image], self.best[layer][image]
        if pairs is best:
            return 0.0, 0.0
        return self.more_than_best(layer, image, pairs), tolerance.slack(self.allowed_cost(layer, image), pairs, best)

    def decided(self, layer: str) -> bool:
        """True where no other assignment of any image is as good within rounding."""
        at = ("decided", layer)
        if at not in self.case.memo:
            self.case.memo[at] = all(self._decided(layer, b) for b in range(len(self.case.counts)))
        return bool(self.case.memo[at])

    def matched(self, layer: str) -> tuple[Tensor, Tensor]:
        """The matched boxes of a layer and their targets, both [M,4] float64."""
        found: tuple[Tensor, Tensor] = self.book.matched_boxes(
            self.layers[layer], self.targets(layer), self.pairs[layer]
        )
        return found

    # --- values ---

    @cached_property
    def want(self) -> Expected:
        """The textbook at the candidate's own matching."""
        every = (pairs for layer in self.case.layers for pairs in self.pairs[layer])
        matching = tuple((tuple(pairs.query.tolist()), tuple(pairs.target.tolist())) for pairs in every)
        found: Expected = self._of_case(("want", self.mean, matching), lambda: expect(self.book, self.case, self.pairs))
        return found

    def allowed(self, term: str, layer: str) -> float:
        """The allowed error of a loss at the candidate's own matching."""
        at = ("allowed", term, layer)
        if at not in self._memo:
            if term == "ce":
                self._memo[at] = self._allowed_class(self.layers[layer])
            else:
                of = tolerance.of_bbox if term == "bbox" else tolerance.of_giou
                self._memo[at] = of(*self.matched(layer), self.nb, self.eps)
        return float(self._memo[at])

    def agrees(self, term: str, layer: str) -> bool:
        """True where the candidate's loss of this term and layer is the textbook's."""
        key = f"loss_{term}{self.case.suffix(layer)}"
        value = self.got.losses.get(key)
        return value is not None and abs(value - self.want.losses[key]) <= self.allowed(term, layer)

    # --- how it is found out ---

    @cached_property
    def _targets(self) -> list[dict[str, Tensor]]:
        return [{k: v.double() if v.is_floating_point() else v for k, v in t.items()} for t in self.case.targets]

    def _allowed_class(self, layer: Layer) -> float:
        if self.book.o.class_loss == "softmax":
            ce = self.want.losses[self.case.keys(layer.name)[0]]
            return tolerance.of_softmax(layer.logits.flatten(0, 1), self._class_weights(layer), ce, self.eps)
        y, inside, divisor = self._positives(layer)
        return tolerance.of_focal(self.book, layer.logits[inside], y[inside], divisor, self.eps)

    def allowed_class_gradient(self, name: str, want: Tensor) -> Tensor:
        """The allowed error of the gradient of loss_ce at pred_logits [B,Q,C]."""
        layer = self.layers[name]
        if self.book.o.class_loss == "softmax":
            parts = tolerance.parts_of_softmax(self._class_weights(layer)).view(*want.shape[:2], 1)
        else:
            y, _, divisor = self._positives(layer)
            parts = tolerance.parts_of_focal(self.book, layer.logits, y, divisor)
        return tolerance.of_class_gradient(want, parts, self.eps)

    def _class_weights(self, layer: Layer) -> Tensor:
        """Those of a softmax: [B·Q]."""
        images = zip(layer.logits, self.targets(layer.name), self.pairs[layer.name], strict=True)
        return self.book.class_weight(torch.cat([self.book.softmax_class_target(*image) for image in images]))

    def _positives(self, layer: Layer) -> tuple[Tensor, Tensor, float]:
        """Of a focal loss: the targets [B,Q,C] of all logits, which logits take part, and the divisor."""
        book, targets, pairs = self.book, self.targets(layer.name), self.pairs[layer.name]
        kind = book.token_class_target if book.o.class_loss == "token" else book.focal_class_target
        mask = book.layer_mask(layer, self.case.outputs)
        inside = torch.stack([book.in_loss(x, None if mask is None else mask[b]) for b, x in enumerate(layer.logits)])
        y = torch.stack([kind(*image) for image in zip(layer.logits, targets, pairs, strict=True)])
        return y, inside, float(book.class_divisor(torch.tensor(self.nb), pairs))

    def allowed_cost(self, layer: str, image: int) -> Tensor:
        """What rounding explains of each matching cost [Q,n] of an image."""
        at = ("allowed cost", layer, image)
        if at not in self.case.memo:
            own, target = self.layers[layer], dict(self.targets(layer)[image])
            self.case.memo[at] = tolerance.of_cost(self.book, own.logits[image], own.boxes[image], target)
        allowed: Tensor = self.case.memo[at]
        return allowed

    def more_than_best(self, layer: str, image: int, pairs: Pairs) -> float:
        """How much more these pairs cost than the best ones."""
        costs, best = self.costs(layer, image), self.best[layer][image]
        return float(costs[pairs.query, pairs.target].sum() - costs[best.query, best.target].sum())

    def _decided(self, layer: str, image: int) -> bool:
        best = self.best[layer][image]
        for q, t in zip(best.query.tolist(), best.target.tolist(), strict=True):
            barred = self.costs(layer, image).clone()
            barred[q, t] = 1e6
            other = self.book.assign(barred)
            more = self.more_than_best(layer, image, other)
            if more <= tolerance.slack(self.allowed_cost(layer, image), other, best):
                return False
        return True

    def _pairs_of(self, layer: str) -> list[Pairs]:
        best = self.best[layer]
        grads = [self.got.grads.get((term, layer), (None, None))[1] for term in ("bbox", "giou")]
        if all(g is None or not bool((g != 0).any()) for g in grads):
            return self.got.pairs.get(layer, best)
        rows = [_directions(g) for g in grads]
        return [self._pairs_of_image(layer, b, [None if r is None else r[b] for r in rows]) for b in range(len(best))]

    def _pairs_of_image(self, layer: str, image: int, rows: list[Tensor | None]) -> Pairs:
        """The matching that the gradient rows of an image point to: the textbook's or the matcher's where these fit,
        else what fits best; and where a kink leaves none that fits, one that has gradient in the right rows."""
        terms = list(zip(self._unit_grads(layer, image), rows, strict=True))
        best = self.best[layer][image]
        fits = max(FITS, tolerance.OPS * self.eps)
        if all(_fits(best, want, row, fits) for want, row in terms if row is not None):
            return best
        from_matcher = self.got.pairs.get(layer)
        known = [best] if from_matcher is None else [best, from_matcher[image]]
        other, trusted = self._from_gradients(layer, image, rows)
        if trusted:
            for pairs in (*reversed(known), other):
                if all(_fits(pairs, *terms[t], fits) for t in trusted):
                    return pairs
        return next((pairs for pairs in reversed(known) if _supports(pairs, rows)), other)

    def _unit_grads(self, layer: str, image: int) -> tuple[Tensor, Tensor]:
        """Directions of the L1 and GIoU gradients [Q,n,4] that each query would get from each target."""
        starts = self._unit_grads_of_all[0]
        low, high, shape = starts[layer, image]
        l1, giou = (g[low:high].reshape(shape) for g in self._unit_grads_of_all[1:])
        return l1, giou

    @property
    def _unit_grads_of_all(self) -> tuple[dict[tuple[str, int], tuple[int, int, tuple[int, ...]]], Tensor, Tensor]:
        """The same for all layers and images in one go, as rows, and where each begins."""
        return self._of_case("unit gradients", self._make_unit_grads)  # type: ignore[no-any-return]

    def _make_unit_grads(self) -> tuple[dict[tuple[str, int], tuple[int, int, tuple[int, ...]]], Tensor, Tensor]:
        starts, preds, wanteds, at = {}, [], [], 0
        for layer, own in self.layers.items():
            for b, target in enumerate(self.targets(layer)):
                q, n = len(own.boxes[b]), len(target["boxes"])
                preds.append(own.boxes[b][:, None].expand(q, n, 4).reshape(-1, 4))
                wanteds.append(target["boxes"][None].expand(q, n, 4).reshape(-1, 4))
                starts[layer, b] = (at, at + q * n, (q, n, 4))
                at += q * n
        pred, wanted = torch.cat(preds).requires_grad_(), torch.cat(wanteds)
        giou = torch.autograd.grad((1 - self.book.giou(pred, wanted)).sum(), pred)[0]
        return starts, _directions((pred - wanted).detach().sign()), _directions(giou)  # type: ignore[return-value]

    def _from_gradients(self, layer: str, image: int, rows: list[Tensor | None]) -> tuple[Pairs, list[int]]:
        """The matching that fits the gradient rows best, rows with gradient first; and which terms (0 L1, 1 GIoU)
        point clearly to some matching at all: one that does not is wrong itself and has no say."""
        none = torch.zeros(0, dtype=torch.int64)
        if not self.case.counts[image]:
            return Pairs(none, none), []
        misfits, trusted = [], []
        for term, (want, row) in enumerate(zip(self._unit_grads(layer, image), rows, strict=True)):
            if row is not None:
                some = (row.abs().sum(-1) > 0)[:, None].double()
                misfits.append((want - row[:, None]).norm(dim=-1) - 10 * some)
                own = _assigned(misfits[-1])
                if _fits(own, want, row, max(FITS, tolerance.OPS * self.eps)):
                    trusted.append(term)
                else:
                    misfits[-1] = 1e-3 * misfits[-1]
        return _assigned(torch.stack(misfits).sum(0) + 1e-6 * self.costs(layer, image)), trusted


def _assigned(costs: Tensor) -> Pairs:
    query, target = linear_sum_assignment(costs.numpy())
    return Pairs(torch.from_numpy(query), torch.from_numpy(target))


def _fits(pairs: Pairs, want: Tensor, row: Tensor | None, close: float) -> bool:
    """True where gradient rows [Q,4] point as a matching makes them point, ``want`` [Q,n,4] being each pair's way."""
    if row is None:
        return True
    expected = torch.zeros_like(row)
    expected[pairs.query] = want[pairs.query, pairs.target]
    return float((expected - row).abs().max()) < close


def _directions(rows: Tensor | None) -> Tensor | None:
    if rows is None:
        return None
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit.nan_to_num()


def _supports(pairs: Pairs, rows: list[Tensor | None]) -> bool:
    """True where just the matched queries get a gradient."""
    some = [row.abs().sum(-1) > 0 for row in rows if row is not None]
    return sorted(pairs.query.tolist()) == torch.stack(some).any(0).nonzero()[:, 0].tolist()
