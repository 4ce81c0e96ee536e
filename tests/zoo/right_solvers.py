"""Own solvers and own orders: Jonker-Volgenant in python, a greedy warm start, sorted targets, padded matching."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .port import Deformable, Detr, Grounding, Port, deformable_factory, detr_factory, grounding_factory


def shortest_paths(cost: np.ndarray, greedy: bool) -> tuple[list[int], list[int]]:
    """Rows to columns by successive shortest paths with potentials; needs no more rows than columns."""
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    free = list(range(rows))
    if greedy:  # warm start: dual feasible minima, then every row whose cheapest column is still free
        u = cost.min(1)
        free = []
        for r in range(rows):
            c = int(cost[r].argmin())
            if row_of[c] < 0:
                row_of[c] = r
            else:
                free.append(r)
    for start in free:
        distance, previous = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, dtype=bool)
        row, column, base = start, -1, 0.0
        while True:
            reduced = base + cost[row] - u[row] - v
            shorter = ~done & (reduced < distance)
            distance[shorter], previous[shorter] = reduced[shorter], column
            column = int(np.where(done, np.inf, distance).argmin())
            base, done[column] = distance[column], True
            if row_of[column] < 0:
                break
            row = row_of[column]
        u[start] += base
        for c in np.flatnonzero(done):
            if c != column:
                u[row_of[c]] += base - distance[c]
            v[c] -= base - distance[c]
        while column >= 0:
            before = previous[column]
            row_of[column] = start if before < 0 else row_of[before]
            column = before
    chosen = np.flatnonzero(row_of >= 0)
    return row_of[chosen].tolist(), chosen.tolist()


def _solve_in_python(cost: torch.Tensor, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = cost.double().numpy()
    if matrix.shape[0] > matrix.shape[1]:
        targets, queries = shortest_paths(matrix.T, greedy)
    else:
        queries, targets = shortest_paths(matrix, greedy)
    return torch.tensor(queries, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


class Volgenant(Deformable):
    def solve(self, cost):
        return _solve_in_python(cost, greedy=False)


class WarmStart(Grounding):
    def solve(self, cost):
        return _solve_in_python(cost, greedy=True)


class SortedByLabel(Detr):
    """Sorts each image's targets by label on entry; the matcher, which is public, maps its indices back."""

    def _order(self, t):
        return torch.argsort(t["labels"], stable=True)

    def forward(self, outputs, targets):
        orders = [self._order(t) for t in targets]
        return super().forward(
            outputs, [{**t, **{k: t[k][o] for k in ("labels", "boxes")}} for t, o in zip(targets, orders, strict=True)]
        )

    def matcher(self, outputs, targets):
        orders = [self._order(t) for t in targets]
        ordered = [{**t, **{k: t[k][o] for k in ("labels", "boxes")}} for t, o in zip(targets, orders, strict=True)]
        return [(q, o[j]) for (q, j), o in zip(super().matcher(outputs, ordered), orders, strict=True)]


class SortedByArea(Grounding):
    """Largest target first inside the matching only; the pairs come out in that order, queries unsorted."""

    def match_image(self, logits, boxes, target, mask):
        order = torch.argsort(target["boxes"][:, 2:].prod(-1), descending=True)
        ordered = {**target, **{k: target[k][order] for k in ("labels", "boxes", "token_labels")}}
        q, j = super().match_image(logits, boxes, ordered, mask)
        back = torch.argsort(j)
        return q[back], order[j[back]]


class ArrayMatcher(Deformable):
    """The matcher hands out what scipy returns."""

    def matcher(self, outputs, targets):
        return [(q.numpy(), t.numpy()) for q, t in super().matcher(outputs, targets)]


class ListMatcher(Detr):
    def matcher(self, outputs, targets):
        return [(q.tolist(), t.tolist()) for q, t in super().matcher(outputs, targets)]


class Padded(Deformable):
    """All images in one padded [B, Q, n] cost; 1e-12 inside the logarithms; classes gathered before the formula."""

    def match(self, layer, targets):
        with torch.no_grad():
            logits, boxes = layer["pred_logits"], layer["pred_boxes"]
            most = max([len(t["labels"]) for t in targets], default=0)
            labels = torch.zeros(len(targets), most, dtype=torch.int64)
            wanted = boxes.new_full((len(targets), most, 4), 0.5)
            for b, t in enumerate(targets):
                labels[b, : len(t["labels"])] = t["labels"]
                wanted[b, : len(t["labels"])] = t["boxes"]
            p = logits.sigmoid().gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
            a, g = self.o.focal_alpha, self.o.focal_gamma
            classes = a * (1 - p) ** g * -(p + 1e-12).log() - (1 - a) * p**g * -(1 - p + 1e-12).log()
            distance = torch.cdist(boxes, wanted, p=1)
            overlap = self.giou(self.corners(boxes)[:, :, None], self.corners(wanted)[:, None])
            cost = self.o.set_cost_class * classes + self.o.set_cost_bbox * distance - self.o.set_cost_giou * overlap
            pairs = [linear_sum_assignment(cost[b, :, : len(t["labels"])]) for b, t in enumerate(targets)]
            return [(torch.as_tensor(q), torch.as_tensor(t)) for q, t in pairs]


class Concatenated(Grounding):
    """Targets of the whole batch in one list with the image of each; one [B·Q, N] cost of which blocks are used."""

    def match(self, layer, targets):
        with torch.no_grad():
            logits, boxes = layer["pred_logits"], layer["pred_boxes"]
            sizes = [len(t["labels"]) for t in targets]
            if sum(sizes) == 0:
                return [(torch.zeros(0, dtype=torch.int64),) * 2 for _ in targets]
            every = {k: torch.cat([t[k] for t in targets]) for k in ("labels", "boxes", "token_labels")}
            cost = self.cost(logits.flatten(0, 1), boxes.flatten(0, 1), every, None)
            blocks = cost.view(*logits.shape[:2], -1).split(sizes, -1)
            return [self.solve(block[b]) for b, block in enumerate(blocks)]


class AtOnce(Deformable):
    """All decoder layers as one long batch: L·B images, cut up again afterwards."""

    def forward(self, outputs, targets):
        self.check(outputs, targets)
        targets = self.clean(targets, outputs["pred_boxes"])
        layers = [outputs, *outputs.get("aux_outputs", [])]
        number, images = len(layers), len(targets)
        stack = self.up({k: torch.cat([layer[k] for layer in layers]) for k in ("pred_logits", "pred_boxes")})
        every = targets * number
        nb = self.number(outputs, targets)
        pairs = self.match(stack, every)
        hot = self.one_hot(stack["pred_logits"], every, pairs)
        ce = self.focal(stack["pred_logits"], hot).reshape(number, -1).sum(-1) / nb
        p = stack["pred_boxes"][self.where(pairs)]
        t = self.gather("boxes", every, pairs, p)
        layer_of = self.where(pairs)[0] // max(images, 1)
        zero = p.new_zeros(number)
        l1 = zero.index_add(0, layer_of, (p - t).abs().sum(-1)) / nb
        giou = zero.index_add(0, layer_of, 1 - self.pair_giou(p, t)) / nb
        losses = {}
        for i, tail in enumerate(["", *(f"_{i}" for i in range(number - 1))]):
            losses |= {f"loss_ce{tail}": ce[i], f"loss_bbox{tail}": l1[i], f"loss_giou{tail}": giou[i]}
        if "enc_outputs" in outputs:
            losses |= self.one_layer(self.up(outputs["enc_outputs"]), self.encoder_targets(targets), nb, "_enc")
        return losses


class Logging(Grounding):
    """Extra quantities beside the losses, without gradient and without weight."""

    def loss_boxes(self, layer, targets, indices, nb):
        losses = super().loss_boxes(layer, targets, indices, nb)
        with torch.no_grad():
            p = layer["pred_boxes"][self.where(indices)]
            off = (p - self.gather("boxes", targets, indices, p)).abs()
            losses["loss_xy"], losses["loss_hw"] = off[:, :2].sum() / nb, off[:, 2:].sum() / nb
        return losses

    def loss_labels(self, layer, targets, indices, nb):
        losses = super().loss_labels(layer, targets, indices, nb)
        with torch.no_grad():
            sure = (torch.where(self.valid(layer), layer["pred_logits"], -torch.inf) > 0).any(-1).sum(1)
            wanted = torch.tensor([len(t["labels"]) for t in targets])
            losses["cardinality_error"] = (sure - wanted).abs().float().sum() / max(len(targets), 1)
        return losses


def without(names: tuple[str, ...], factory):
    """The factory with some options taken out of its signature, at their defaults."""

    def build_criterion(**options):
        return factory(**options)

    kept = [p for p in inspect.signature(factory).parameters.values() if p.name not in names]
    build_criterion.__signature__ = inspect.Signature(kept)
    return build_criterion


def python_closure(cls: type[Port]):
    """A bare function that takes whatever it is given."""

    def build_criterion(**options):
        known = inspect.signature(grounding_factory(cls)).parameters
        inner = grounding_factory(cls)(**{k: v for k, v in options.items() if k in known and k != "losses"})

        def criterion(outputs, targets):
            return inner(outputs, targets)

        criterion.weight_dict = dict(inner.weight_dict)
        return criterion

    return build_criterion


build_volgenant = deformable_factory(Volgenant)
build_warm_start = grounding_factory(WarmStart)
build_sorted_by_label = detr_factory(SortedByLabel)
build_sorted_by_area = grounding_factory(SortedByArea)
build_array_matcher = deformable_factory(ArrayMatcher)
build_list_matcher = detr_factory(ListMatcher)
build_padded = deformable_factory(Padded)
build_concatenated = grounding_factory(Concatenated)
build_at_once = without(("losses",), deformable_factory(AtOnce))
build_logging = grounding_factory(Logging)
build_few_options = without(
    ("set_cost_class", "set_cost_bbox", "set_cost_giou", "losses", "two_stage"), deformable_factory(Deformable)
)
build_whatever = python_closure(Grounding)
