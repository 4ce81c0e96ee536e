"""MATCH: the assignment, read off which queries get a box gradient, and off the matcher where it can be called."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_conformance.contract.compare import agree, holds, unless_tied
from detr_conformance.experiments import AGAIN, BATCH, CERTAIN, EDGES, LAYERS, NEW, PERMUTED, REPEATED
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Layer, Pairs, Textbook

# --- what was matched ---


def supported(seen: Seen, layer: str) -> list[list[int]] | None:
    """Per image, the queries whose box gets a gradient; None where no box of the layer gets any."""
    grads = [g for t in ("bbox", "giou") if (g := seen.got.grads.get((t, layer), (None, None))[1]) is not None]
    if not grads or not any(bool((g != 0).any()) for g in grads):
        return None
    rows = torch.stack([(g != 0).any(-1) for g in grads]).any(0)
    return [row.nonzero()[:, 0].tolist() for row in rows]


def in_words(pairs: Pairs) -> str:
    """``query 2 → target 0, …``"""
    both = zip(pairs.query.tolist(), pairs.target.tolist(), strict=True)
    return ", ".join(f"query {q} → target {t}" for q, t in both) or "no pair"


def optimal(seen: Seen, layer: str) -> Iterator[Comparison]:
    """For every image with targets: the candidate's own matching costs no more than the least, within rounding."""
    for b, n in enumerate(seen.case.counts):
        if not n:
            continue
        pairs, best = seen.pairs[layer][b], seen.best[layer][b]
        if len(pairs) != len(best):
            yield holds(False, f"pairs of image {b}, {layer}", f"{len(best)}", f"{len(pairs)}")
            continue
        more, slack = seen.excess(layer, b)
        what = f"matching of image {b}, {layer}"
        how = f"costs {more:.4g} more than the least (rounding explains {slack:.1e})" if more > slack else ""
        yield holds(more <= slack, what, in_words(best), in_words(pairs), how)


def telling(seen: Seen, layer: str, image: int) -> bool:
    """True where every matched box of an image must get a gradient: none is its target's already."""
    boxes, wanted = seen.layers[layer].boxes[image], seen.targets(layer)[image]["boxes"]
    return bool(((boxes[:, None] - wanted[None]).abs().amax(-1) > 1e-6).all())


# --- clauses ---

_COSTS = ["the_cost_is_the_weighted_sum_of_the_three"]

MATCH_2 = clause(
    "MATCH-2",
    "must",
    EVERY,
    "The assignment is optimal: its total cost is the least of all one-to-one assignments. Any of several optimal ones "
    "is accepted.",
    ["Carion 2020, eq. 1", "facebookresearch/detr models/matcher.py:80-82"],
)


@check(MATCH_2, on=CERTAIN, component="matching", takes_raising=True)
def the_assignment_is_optimal(seen: Seen) -> Iterator[Comparison]:
    yield from optimal(seen, "final")


@fault(
    the_assignment_is_optimal,
    seen_in="an early Grounding DINO trainer",
    fix="solve the assignment problem on the matching cost",
)
def first_queries_instead_of_a_matching(book: Textbook) -> Textbook:
    """Query i is paired with target i, without any matching."""

    def assign(book: Textbook, costs: Tensor) -> Pairs:
        first = torch.arange(min(costs.shape))
        return Pairs(first, first)

    return replace(book, assign=assign)


@fault(the_assignment_is_optimal, fix="use scipy.optimize.linear_sum_assignment")
def targets_served_in_order(book: Textbook) -> Textbook:
    """Target after target takes the cheapest query that is left."""

    def assign(book: Textbook, costs: Tensor) -> Pairs:
        taken: list[int] = []
        for t in range(min(costs.shape)):
            order = [int(q) for q in costs[:, t].argsort() if int(q) not in taken]
            taken.append(order[0])
        return Pairs(torch.tensor(taken), torch.arange(len(taken)))

    return replace(book, assign=assign)


MATCH_1 = clause(
    "MATCH-1",
    "must",
    EVERY,
    "One-to-one: within an image no query and no target is matched twice; there are exactly min(Q, n) pairs.",
    ["facebookresearch/detr models/matcher.py:80-82"],
)


@check(MATCH_1, on=EDGES, component="matching")
def no_query_and_no_target_is_matched_twice(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        queries = seen.case.predictions(layer)["pred_logits"].shape[1]
        for b, pairs in enumerate(seen.got.pairs.get(layer, ())):
            for name, index in (("queries", pairs.query.tolist()), ("targets", pairs.target.tolist())):
                yield holds(
                    len(set(index)) == len(index), f"{name} matched in image {b}, {layer}", "no repetition", f"{index}"
                )
        found = supported(seen, layer)
        if found is None:
            continue
        for b, (rows, n) in enumerate(zip(found, seen.case.counts, strict=True)):
            if 0 < n <= queries and telling(seen, layer, b):
                what = f"queries of image {b}, {layer}, whose box gets a gradient"
                yield holds(len(rows) >= n, what, f"{n}, one a target", f"{rows}")


@fault(
    no_query_and_no_target_is_matched_twice,
    seen_in="IDEA-Research/DINO models/dino/matcher.py SimpleMinsumMatcher",
    fix="solve the assignment problem instead of taking the minimum of every column",
)
def every_target_takes_its_cheapest_query(book: Textbook) -> Textbook:
    """Every target takes its cheapest query, also one that another target has taken."""

    def assign(book: Textbook, costs: Tensor) -> Pairs:
        return Pairs(costs.argmin(0), torch.arange(costs.shape[1]))

    return replace(book, assign=assign)


MATCH_3 = clause("MATCH-3", "must", EVERY, "The assignment is made per image, not across the batch.")


@check(MATCH_3, on=BATCH, component="matching")
def every_image_has_an_assignment_of_its_own(seen: Seen) -> Iterator[Comparison]:
    if len(seen.case.counts) < 2:
        return
    for layer in seen.case.layers:
        queries = seen.case.predictions(layer)["pred_logits"].shape[1]
        found = supported(seen, layer) or [p.query.tolist() for p in seen.got.pairs.get(layer, ())]
        for b, (rows, n) in enumerate(zip(found, seen.case.counts, strict=False)):
            if telling(seen, layer, b):
                what = f"matched queries of image {b}, {layer}"
                yield holds(len(set(rows)) == min(queries, n), what, f"{min(queries, n)}", f"{rows}")


@fault(every_image_has_an_assignment_of_its_own, fix="solve one assignment problem an image")
def one_assignment_across_the_batch(book: Textbook) -> Textbook:
    """One assignment over all images: a target may take a query of another image."""

    def match(book: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        labels = {k: torch.cat([t[k] for t in targets]) for k in ("labels", "boxes", "token_labels") if k in targets[0]}
        if not len(labels["labels"]):
            return [_no_pairs() for _ in targets]
        with torch.no_grad():
            costs = book.cost(layer.logits.flatten(0, 1), layer.boxes.flatten(0, 1), labels)
        query, target = (torch.from_numpy(i) for i in linear_sum_assignment(costs.numpy()))
        size, starts = layer.logits.shape[1], [0, *itertools.accumulate(len(t["labels"]) for t in targets)]
        found = []
        for b, t in enumerate(targets):
            own = (query // size == b) if len(t["labels"]) else torch.zeros_like(query, dtype=torch.bool)
            # a target of another image is clamped to one of this image's, as a wrong offset would do
            inside = (target[own] - starts[b]).clamp(0, max(len(t["labels"]) - 1, 0))
            found.append(Pairs(query[own] % size, inside))
        return found

    return replace(book, match=match)


def _no_pairs() -> Pairs:
    return Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


MATCH_4 = clause(
    "MATCH-4",
    "must",
    EVERY,
    "Permuting queries, targets or images permutes the matching and leaves every loss unchanged.",
)


@check(
    MATCH_4,
    on=PERMUTED,
    component="matching",
    takes_raising=True,
    after=[the_assignment_is_optimal, "every_image_uses_its_own_prompt"],
)
def order_does_not_matter(seen: Seen) -> Iterator[Comparison]:
    for name, twin in seen.twins.items():
        for layer in seen.case.layers:
            for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
                if key in seen.got.losses and key in twin.got.losses:
                    one, two, allowed = seen.got.losses[key], twin.got.losses[key], 2 * seen.allowed(term, layer)
                    same = agree(f"{key} with {name}", one, two, allowed, "the loss in the first order")
                    yield from unless_tied(seen, [layer], same)


@fault(order_does_not_matter, fix="index targets with the matching's second half")
def targets_taken_in_their_own_order(book: Textbook) -> Textbook:
    """Matched queries are compared with the targets in their own order, not in that of the matching."""

    def matched_boxes(
        book: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]], matches: Sequence[Pairs]
    ) -> tuple[Tensor, Tensor]:
        pred = torch.cat([b[m.query] for b, m in zip(layer.boxes, matches, strict=True)])
        return pred, torch.cat([t["boxes"][: len(m)] for t, m in zip(targets, matches, strict=True)])

    return replace(book, matched_boxes=matched_boxes)


MATCH_5 = clause(
    "MATCH-5",
    "must",
    EVERY,
    "An image without targets gets no pair; more targets than queries give Q pairs.",
    ["facebookresearch/detr models/matcher.py:80-82"],
)


@check(MATCH_5, on=EDGES, component="matching", takes_raising=True)
def no_targets_and_too_many_are_matched(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        queries = seen.case.predictions(layer)["pred_logits"].shape[1]
        found = supported(seen, layer)
        for b, n in enumerate(seen.case.counts):
            want = min(queries, n)
            if n and n <= queries:
                continue
            if layer in seen.got.pairs:
                got = len(seen.got.pairs[layer][b])
                yield holds(got == want, f"pairs that the matcher returns for image {b}, {layer}", f"{want}", f"{got}")
            if found is not None and telling(seen, layer, b):
                what = f"queries of image {b}, {layer}, whose box gets a gradient ({n} targets)"
                yield holds(len(found[b]) == want, what, f"{want}", f"{len(found[b])}")


@check(MATCH_5, on=EDGES, component="matching", after=[the_assignment_is_optimal, *_COSTS])
def of_too_many_targets_the_best_are_matched(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        if max(seen.case.counts) > seen.layers[layer].boxes.shape[1]:
            yield from optimal(seen, layer)


@fault(of_too_many_targets_the_best_are_matched, fix="give the solver all targets")
def first_targets_only(book: Textbook) -> Textbook:
    """Of more targets than queries only the first are considered."""

    def assign(inner: Textbook, costs: Tensor) -> Pairs:
        found: Pairs = book.under(inner.o).assign(costs[:, : len(costs)])
        return found

    return replace(book, assign=assign)


@fault(no_targets_and_too_many_are_matched, seen_in="longzw1997/Open-GroundingDino #41", fix="match min(Q, n) pairs")
def too_many_targets_are_left_unmatched(book: Textbook) -> Textbook:
    """An image with more targets than queries is not matched at all."""

    def assign(inner: Textbook, costs: Tensor) -> Pairs:
        if costs.shape[1] > costs.shape[0]:
            return _no_pairs()
        found: Pairs = book.under(inner.o).assign(costs)
        return found

    return replace(book, assign=assign)


MATCH_6 = clause(
    "MATCH-6",
    "must",
    EVERY,
    "Where the matcher can be called, it returns a list of B pairs (query, target) of equally long 1-D integer indices "
    "in range.",
)


@check(MATCH_6, on=EDGES, component="matching")
def the_matcher_returns_index_pairs(seen: Seen) -> Iterator[Comparison]:
    if seen.got.bad_pairs:
        yield holds(False, "the matcher's answer", "a list of (query, target) indices", seen.got.bad_pairs)
    for layer, pairs in seen.got.pairs.items():
        size = seen.case.predictions(layer)["pred_logits"].shape[1]
        for b, n in enumerate(seen.case.counts):
            what = f"number of pairs of image {b}, {layer}"
            yield holds(len(pairs[b]) == min(size, n), what, f"{min(size, n)}", f"{len(pairs[b])}")


@fault(the_matcher_returns_index_pairs, fix="return target indices that start from 0 in every image")
def target_indices_count_through_the_batch(book: Textbook) -> Textbook:
    """The matcher's target indices count on from image to image."""

    def indices(book: Textbook, matches: Sequence[Pairs]) -> list[tuple[Tensor, Tensor]]:
        starts = [0, *itertools.accumulate(len(m) for m in matches)]
        return [(m.query, m.target + starts[b]) for b, m in enumerate(matches)]

    return replace(book, indices=indices)


MATCH_7 = clause(
    "MATCH-7",
    "must",
    EVERY,
    "Every supervised layer is matched on its own predictions.",
    ["facebookresearch/detr models/detr.py:241"],
)


@check(MATCH_7, on=LAYERS, component="matching", after=[the_assignment_is_optimal, *_COSTS])
def every_layer_is_matched_on_its_own_predictions(seen: Seen) -> Iterator[Comparison]:
    if all(c.ok for c in optimal(seen, "final")):  # else the costs are to blame
        for layer in seen.case.layers[1:]:
            yield from optimal(seen, layer)


@fault(
    every_layer_is_matched_on_its_own_predictions,
    seen_in="RT-DETRv2 share_matched_indices, as an option",
    fix="call the matcher once a layer",
)
def final_matching_for_every_layer(book: Textbook) -> Textbook:
    """Auxiliary layers are trained with the final layer's matching."""

    def layer_match(book: Textbook, layer: Layer, every: Sequence[Layer], targets: Any) -> list[Pairs]:
        found: list[Pairs] = book.match(every[0] if layer.name.startswith("aux") else layer, targets)
        return found

    return replace(book, layer_match=layer_match)


MATCH_9 = clause("MATCH-9", "must", EVERY, "The matching is deterministic: the same inputs give the same pairs.")


@check(MATCH_9, on=REPEATED, component="matching")
def the_same_inputs_give_the_same_pairs(seen: Seen) -> Iterator[Comparison]:
    for name in (AGAIN, NEW):
        twin = seen.twins[name]
        for layer in seen.case.layers:
            one, two = supported(seen, layer), supported(twin, layer)
            if one is not None and two is not None:
                yield holds(one == two, f"matched queries of {layer}, called {name}", f"{one}", f"{two}")
            if layer in seen.got.pairs and layer in twin.got.pairs:
                a, b = (" | ".join(map(in_words, s.got.pairs[layer])) for s in (seen, twin))
                yield holds(a == b, f"the matcher's answer for {layer}, called {name}", a, b)


@fault(the_same_inputs_give_the_same_pairs, fix="let the solver decide between equal costs")
def ties_broken_differently_each_time(book: Textbook) -> Textbook:
    """Equal costs are decided by noise that changes from call to call."""
    noise = random.Random(0)

    def assign(inner: Textbook, costs: Tensor) -> Pairs:
        sign = noise.choice((-1, 1))
        tilted = costs + sign * 1e-9 * torch.arange(len(costs))[:, None]
        found: Pairs = book.under(inner.o).assign(tilted)
        return found

    return replace(book, assign=assign)
