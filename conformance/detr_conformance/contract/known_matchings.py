"""Known mistakes of the assignment, beside those in the chapter MATCH: each a formula, and the check that sees it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.costs import an_image_is_matched_as_if_alone
from detr_conformance.contract.layers import encoder_outputs_have_their_own_matching
from detr_conformance.contract.matching import (
    every_layer_is_matched_on_its_own_predictions,
    no_query_and_no_target_is_matched_twice,
    of_too_many_targets_the_best_are_matched,
    order_does_not_matter,
    the_assignment_is_optimal,
    the_matcher_returns_index_pairs,
)
from detr_conformance.registry import DETR, EVERY, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook, textbook

# --- which pairs ---


def _by_entry(book: Textbook, costs: Tensor) -> Pairs:
    """The cheapest entry first, again and again."""
    left, pairs = costs.clone(), []
    for _ in range(min(costs.shape)):
        at = int(left.argmin())
        q, t = divmod(at, costs.shape[1])
        pairs.append((q, t))
        left[q], left[:, t] = torch.inf, torch.inf
    return _pairs(sorted(pairs))


def _by_query(book: Textbook, costs: Tensor) -> Pairs:
    """Query after query takes its cheapest target that is left."""
    free, pairs = set(range(costs.shape[1])), []
    for q in range(min(costs.shape)):
        t = min(free, key=lambda t: float(costs[q, t]))
        free.remove(t)
        pairs.append((q, t))
    return _pairs(pairs)


def _by_confidence(book: Textbook, costs: Tensor) -> Pairs:
    """The query with the cheapest entry of all chooses first."""
    free, pairs = set(range(costs.shape[1])), []
    for q in costs.amin(1).argsort().tolist()[: min(costs.shape)]:
        t = min(free, key=lambda t: float(costs[q, t]))
        free.remove(t)
        pairs.append((q, t))
    return _pairs(sorted(pairs))


def _pairs(found: Sequence[tuple[int, int]]) -> Pairs:
    return Pairs(*(torch.tensor([pair[i] for pair in found], dtype=torch.int64) for i in (0, 1)))


def _in_reverse(book: Textbook, costs: Tensor) -> Pairs:
    taken: dict[int, int] = {}
    for t in reversed(range(costs.shape[1])):
        order = [int(q) for q in costs[:, t].argsort() if int(q) not in taken]
        if order:
            taken[order[0]] = t
    return _pairs(sorted(taken.items()))


def _exchanged(found: Pairs, costs: Tensor) -> Pairs:
    inside = len(found) > 0 and int(found.query.max()) < costs.shape[1] and int(found.target.max()) < len(costs)
    return Pairs(found.target, found.query) if inside else found


def _last(book: Textbook, costs: Tensor) -> Pairs:
    n = min(costs.shape)
    return Pairs(torch.arange(len(costs) - n, len(costs)), torch.arange(n))


for name, sentence, formulas in (
    ("cheapest-pair-first", "The cheapest pair first, again and again: a greedy assignment.", {"assign": _by_entry}),
    ("queries-served-in-order", "Query after query takes its cheapest target that is left.", {"assign": _by_query}),
    ("surest-queries-first", "The query with the cheapest pair chooses first.", {"assign": _by_confidence}),
    ("targets-served-in-reverse", "Targets take their cheapest free query, the last target first.",
     {"assign": _in_reverse}),
    ("last-queries-instead-of-a-matching", "The last queries are paired with the targets, without any matching.",
     {"assign": _last}),
):  # fmt: skip
    known(the_assignment_is_optimal, name, sentence, fix="use scipy.optimize.linear_sum_assignment", **formulas)

for name, sentence, change in (
    ("query-and-target-indices-exchanged", "Query and target indices change places, where both stay in range.",
     lambda before, book, costs: _exchanged(before(costs), costs)),
    ("dearest-assignment", "The assignment of largest cost: maximised instead of minimised.",
     lambda before, book, costs: before(-costs)),
    ("target-indices-in-order", "Target indices are sorted away from their queries.",
     lambda before, book, costs: (lambda m: Pairs(m.query, m.target.sort().values))(before(costs))),
    ("only-half-of-the-queries", "Only the first half of the queries takes part, where there are enough.",
     lambda before, book, costs: before(costs[: max(len(costs) // 2, costs.shape[1])])),
):  # fmt: skip
    known(the_assignment_is_optimal, name, sentence, fix="keep the solver's pairs", around={"assign": change})


def _numbered(queries: bool) -> Callable[..., Pairs]:
    """The solver's rows taken for 0, 1, …: queries, or targets where the matrix has been transposed."""

    def change(before: Callable[..., Pairs], book: Textbook, costs: Tensor) -> Pairs:
        found = before(costs)
        order = (found.query if queries else found.target).argsort()
        query, target, rows = found.query[order], found.target[order], torch.arange(len(found))
        return Pairs(rows, target) if queries else Pairs(query, rows)

    return change


for check, name, sentence, change in (
    (the_assignment_is_optimal, "rows-of-the-solver-taken-for-the-first-queries",
     "The solver's columns alone are kept, and its rows taken for queries counted from 0.", _numbered(queries=True)),
    (of_too_many_targets_the_best_are_matched, "rows-of-the-solver-taken-for-the-first-targets",
     "The solver of the transposed costs gives its columns alone, and its rows are taken for targets counted from 0.",
     _numbered(queries=False)),
    (the_assignment_is_optimal, "targets-one-place-on", "Every query gets the target after its own.",
     lambda before, book, costs: (lambda m: Pairs(m.query, m.target.roll(-1)))(before(costs))),
    (the_assignment_is_optimal, "queries-one-place-on", "Every target gets the query after its own.",
     lambda before, book, costs: (lambda m: Pairs((m.query + 1) % max(len(costs), 1), m.target))(before(costs))),
    (the_assignment_is_optimal, "only-the-last-half-of-the-queries",
     "Only the last half of the queries takes part, where there are enough.",
     lambda before, book, costs: (lambda skip: (lambda m: Pairs(m.query + skip, m.target))(before(costs[skip:])))(
         max(min(len(costs) // 2, len(costs) - costs.shape[1]), 0))),
    (of_too_many_targets_the_best_are_matched, "last-targets-only",
     "Of more targets than queries only the last are considered.",
     lambda before, book, costs: (lambda skip: (lambda m: Pairs(m.query, m.target + skip))(before(costs[:, skip:])))(
         max(costs.shape[1] - len(costs), 0))),
):  # fmt: skip
    known(check, name, sentence, fix="keep the solver's pairs", around={"assign": change})


def _reshaped(of_class: bool, of_l1: bool, of_giou: bool) -> dict[str, Any]:
    """A cost whose terms are computed [n,Q], and some reshaped to [Q,n] instead of transposed."""

    def cost(book: Textbook, x: Tensor, boxes: Tensor, target: Any) -> Tensor:
        o, pred, wanted = book.o, boxes[:, None], target["boxes"][None]
        terms = (
            (o.set_cost_class * book.class_cost(x, target), of_class),
            (o.set_cost_bbox * book.l1(pred, wanted), of_l1),
            (-o.set_cost_giou * book.giou(pred, wanted), of_giou),
        )
        return torch.stack([c.T.reshape(c.shape) if turned else c for c, turned in terms]).sum(0)

    return {"cost": cost}


for name, sentence, formulas in (
    ("cost-reshaped-instead-of-transposed", "The cost is computed target by target, and reshaped, not transposed.",
     _reshaped(True, True, True)),
    ("class-cost-reshaped-instead-of-transposed",
     "The class cost is computed target by target, and reshaped, not transposed.", _reshaped(True, False, False)),
    ("box-costs-reshaped-instead-of-transposed",
     "L1 and GIoU of the cost are computed target by target, and reshaped, not transposed.",
     _reshaped(False, True, True)),
    ("l1-of-the-cost-reshaped-instead-of-transposed",
     "The L1 cost is computed target by target, and reshaped, not transposed.", _reshaped(False, True, False)),
    ("giou-of-the-cost-reshaped-instead-of-transposed",
     "The GIoU of the cost is computed target by target, and reshaped, not transposed.", _reshaped(False, False, True)),
):  # fmt: skip
    some = name.startswith(("class-cost", "giou"))  # by its own lesser weight it shows where targets change places
    known(
        order_does_not_matter if some else the_assignment_is_optimal, name, sentence, fix="transpose the costs",
        **formulas,
    )  # fmt: skip


def _twice(before: Callable[..., Pairs], book: Textbook, costs: Tensor) -> Pairs:
    first = before(costs)
    if len(costs) < 2 * costs.shape[1]:
        return first
    barred = costs.clone()
    barred[first.query] = 1e6
    second = before(barred)
    return Pairs(torch.cat([first.query, second.query]), torch.cat([first.target, second.target]))


def _tiled(before: Callable[..., Pairs], book: Textbook, costs: Tensor) -> Pairs:
    found = before(torch.cat([costs, costs], 1))
    return Pairs(found.query, found.target % costs.shape[1])


def _cheap_only(before: Callable[..., Pairs], book: Textbook, costs: Tensor) -> Pairs:
    found = before(costs)
    own = costs[found.query, found.target]
    keep = own <= own.mean() + 1e-6
    return Pairs(found.query[keep], found.target[keep])


for name, sentence, change in (
    ("two-queries-for-every-target", "Every target gets a second query where there are enough.", _twice),
    ("every-target-takes-part-twice", "The targets are repeated, and each takes part twice.", _tiled),
    ("dear-pairs-are-dropped", "Pairs that cost more than the mean of the image's pairs are dropped.", _cheap_only),
    ("last-pair-is-lost", "The last pair of an image is lost.",
     lambda before, book, costs: (lambda m: Pairs(m.query[:-1], m.target[:-1]))(before(costs))),
    ("first-pair-is-lost", "The first pair of an image is lost.",
     lambda before, book, costs: (lambda m: Pairs(m.query[1:], m.target[1:]))(before(costs))),
):  # fmt: skip
    known(
        no_query_and_no_target_is_matched_twice, name, sentence, fix="exactly min(Q, n) pairs, one a target",
        around={"assign": change},
    )  # fmt: skip

# --- which image ---


def _next_targets(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
    turned = [*targets[1:], *targets[:1]]
    found, other = before(layer, targets), before(layer, turned)
    return [
        o if len(a["boxes"]) == len(b["boxes"]) else f
        for f, o, a, b in zip(found, other, targets, turned, strict=True)
    ]  # fmt: skip


def _first_predictions(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
    logits, boxes = (x[:1].expand_as(x) for x in (layer.logits, layer.boxes))
    first = replace(layer, logits=logits, boxes=boxes)
    return before(first, targets)


def _whole_batch(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
    keys = [k for k in ("labels", "boxes", "token_labels") if k in targets[0]]
    every = {k: torch.cat([t[k] for t in targets]) for k in keys}
    none = torch.zeros(0, dtype=torch.int64)
    if not len(every["labels"]):
        return [Pairs(none, none) for _ in targets]
    with torch.no_grad():
        whole = book.assign(book.cost(layer.logits.flatten(0, 1), layer.boxes.flatten(0, 1), every))
    size, ends = layer.logits.shape[1], list(itertools.accumulate((len(t["labels"]) for t in targets), initial=0))
    found = []
    for b, start in enumerate(ends[:-1]):
        own = (whole.query // size == b) & (whole.target >= start) & (whole.target < ends[b + 1])
        found.append(Pairs(whole.query[own] % size, whole.target[own] - start))
    return found


for name, sentence, change in (
    ("matched-with-the-targets-of-the-next-image",
     "An image is matched with the targets of the next one, where that has as many.", _next_targets),
    ("matched-on-the-first-image", "Every image is matched on the predictions of the first.", _first_predictions),
    ("pairs-across-images-are-dropped", "One assignment over all images, whose pairs across images are dropped.",
     _whole_batch),
):  # fmt: skip
    known(
        an_image_is_matched_as_if_alone, name, sentence, fix="solve one assignment an image, on its own predictions",
        around={"match": change},
    )  # fmt: skip


def _predictions(which: Callable[[Tensor], Tensor], *keys: str) -> Callable[..., list[Pairs]]:
    """Every image matched on logits, boxes or both of other images."""

    def match(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
        return before(replace(layer, **{k: which(getattr(layer, k)) for k in keys}), targets)

    return match


for which, whose, of in (
    ("first", "the first image's", lambda x: x[:1].expand_as(x)),
    ("last", "the last image's", lambda x: x[-1:].expand_as(x)),
    ("next", "the next image's", lambda x: x.roll(-1, 0)),
    ("previous", "the previous image's", lambda x: x.roll(1, 0)),
):  # fmt: skip
    for name, sentence, keys in (
        (f"class-cost-on-the-{which}-image", f"The class cost of every image is taken on {whose} logits.", ("logits",)),
        (f"box-costs-on-the-{which}-image", f"L1 and GIoU of every image's cost are taken on {whose} boxes.",
         ("boxes",)),
        (f"matched-on-the-{which}-image", f"Every image is matched on {whose} predictions.", ("logits", "boxes")),
    ):  # fmt: skip
        if name != "matched-on-the-first-image":  # which is above
            known(
                order_does_not_matter if name == "class-cost-on-the-last-image" else an_image_is_matched_as_if_alone,
                name, sentence,
                fix="solve one assignment an image, on its own predictions",
                around={"match": _predictions(of, *keys)},
            )  # fmt: skip


CLASS_KEYS, BOX_KEYS = ("labels", "token_labels"), ("boxes",)


def _without_offset(*keys: str) -> Callable[..., list[Pairs]]:
    """Targets of the whole batch, from the first on, where an image's own begin later."""

    def match(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
        every = {k: torch.cat([t[k] for t in targets]) for k in keys if k in targets[0]}
        wrong = [{**t, **{k: v[: len(t["boxes"])] for k, v in every.items()}} for t in targets]
        return before(layer, wrong)

    return match


for name, sentence, keys in (
    ("cost-of-the-batchs-first-targets", "An image with n targets is matched with the first n of the batch.",
     (*CLASS_KEYS, *BOX_KEYS)),
    ("class-cost-of-the-batchs-first-targets",
     "The class cost of an image with n targets is that of the first n labels of the batch.", CLASS_KEYS),
    ("box-costs-of-the-batchs-first-targets",
     "L1 and GIoU of an image with n targets are those of the first n boxes of the batch.", BOX_KEYS),
):  # fmt: skip
    known(
        an_image_is_matched_as_if_alone, name, sentence, fix="split the costs by the number of targets of each image",
        around={"match": _without_offset(*keys)},
    )  # fmt: skip


def _padded_with(row: Callable[[Textbook, Any, int], Any]) -> Callable[..., list[Pairs]]:
    """Targets padded to as many an image, which compete with the others and are dropped afterwards."""

    def match(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
        most = max(len(t["boxes"]) for t in targets)
        found = before(layer, [row(book, t, most - len(t["boxes"])) for t in targets])
        own = [m.target < len(t["boxes"]) for m, t in zip(found, targets, strict=True)]
        return [Pairs(m.query[o], m.target[o]) for m, o in zip(found, own, strict=True)]

    return match


def _zeros(label: Callable[[Textbook], int]) -> Callable[[Textbook, Any, int], Any]:
    def padded(book: Textbook, target: Any, more: int) -> Any:
        rows = {"labels": torch.full((more,), label(book)), "boxes": torch.zeros(more, 4).double()}
        return {**target, **{k: torch.cat([target[k], v.to(target[k].dtype)]) for k, v in rows.items()}}

    return padded


def _free(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
    most = max(len(t["boxes"]) for t in targets)

    def assign(_book: Textbook, costs: Tensor) -> Pairs:
        found = book.assign(torch.cat([costs, torch.zeros(len(costs), most - costs.shape[1])], 1))
        own = found.target < costs.shape[1]
        return Pairs(found.query[own], found.target[own])

    return replace(book, assign=assign, match=textbook.match).match(layer, targets)


for name, sentence, change, profiles in (
    ("padded-targets-compete", "Targets are padded with zeros, which are matched like others and then dropped.",
     _padded_with(_zeros(lambda book: 0)), EVERY - TEXT),
    ("padded-targets-of-no-object-compete",
     "Targets are padded with no object and zeros, which are matched like others and then dropped.",
     _padded_with(_zeros(lambda book: book.o.num_classes)), DETR),
    ("padded-costs-are-zero", "Costs are padded with zeros to those of the fullest image, and all columns compete.",
     _free, EVERY),
):  # fmt: skip
    known(
        no_query_and_no_target_is_matched_twice if name == "padded-costs-are-zero" else an_image_is_matched_as_if_alone,
        name, sentence, fix="solve for an image's own targets alone",
        profiles=profiles, around={"match": change},
    )  # fmt: skip


# --- which layer ---


def _of_first_layer(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Any) -> list[Pairs]:
    first = next((x for x in every if x.name == "aux0"), layer)
    found: list[Pairs] = book.match(first if layer.name.startswith("aux") else layer, targets)
    return found


def _inside(found: list[Pairs], own: list[Pairs], size: int) -> list[Pairs]:
    """A matching where its queries exist in the layer; else the layer's own."""
    return [f if not len(f) or int(f.query.max()) < size else o for f, o in zip(found, own, strict=True)]


def _of_final(names: tuple[str, ...]) -> Callable[..., list[Pairs]]:
    def layer_match(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Any) -> list[Pairs]:
        own: list[Pairs] = book.match(layer, targets)
        if not layer.name.startswith(names):
            return own
        return _inside(book.match(every[0], targets), own, layer.boxes.shape[1])

    return layer_match


for name, sentence, formula in (
    ("first-auxiliary-matching-for-the-others", "Auxiliary layers are trained with the first one's matching.",
     _of_first_layer),
    ("final-matching-for-all-further-layers", "Auxiliary and encoder outputs are trained with the final matching.",
     _of_final(("aux", "enc"))),
):  # fmt: skip
    known(
        every_layer_is_matched_on_its_own_predictions, name, sentence, fix="call the matcher once a layer",
        layer_match=formula,
    )  # fmt: skip

known(
    encoder_outputs_have_their_own_matching, "final-matching-for-the-encoder",
    "Encoder outputs are trained with the final layer's matching.", fix="call the matcher on the encoder outputs",
    layer_match=_of_final(("enc",)),
)  # fmt: skip


def _of_final_where_equal(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Any) -> list[Pairs]:
    same = layer.name == "enc" and layer.boxes.shape[1] == every[0].boxes.shape[1]
    found: list[Pairs] = book.match(every[0] if same else layer, targets)
    return found


known(
    encoder_outputs_have_their_own_matching, "final-matching-for-an-encoder-of-as-many-queries",
    "Encoder outputs are trained with the final layer's matching where they have as many queries.",
    fix="call the matcher on the encoder outputs", layer_match=_of_final_where_equal,
)  # fmt: skip


# --- what the matcher returns ---


def _padded(matches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
    long = max(map(len, matches), default=0) + 1
    return [tuple(torch.cat([i, torch.full((long - len(i),), -1)]) for i in (m.query, m.target)) for m in matches]


for name, sentence, formula in (
    ("matcher-returns-targets-first", "The matcher returns (target, query) instead of (query, target).",
     lambda m: [(x.target, x.query) for x in m]),
    ("matcher-counts-queries-through-the-batch", "The matcher's query indices count on from image to image.",
     lambda m: [(x.query + 100 * b, x.target) for b, x in enumerate(m)]),
    ("matcher-returns-floats", "The matcher's indices are floating point numbers.",
     lambda m: [(x.query.float(), x.target.float()) for x in m]),
    ("matcher-returns-a-matrix", "The matcher returns one [M,2] tensor an image instead of two of indices.",
     lambda m: [torch.stack([x.query, x.target], 1) for x in m]),
    ("matcher-pads-with-minus-one", "The matcher's pairs are padded with −1.", _padded),
    ("matcher-counts-from-one", "The matcher's indices count from 1.",
     lambda m: [(x.query + 1, x.target + 1) for x in m]),
    ("matcher-skips-empty-images", "The matcher returns no pair for an image without targets.",
     lambda m: [(x.query, x.target) for x in m if len(x)]),
):  # fmt: skip
    known(
        the_matcher_returns_index_pairs, name, sentence, fix="a list of (query, target) index tensors, one an image",
        indices=lambda book, matches, formula=formula: formula(matches),
    )  # fmt: skip
