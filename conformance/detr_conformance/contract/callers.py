"""PURE and MATCH: whatever the caller does around the call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.compare import holds
from detr_conformance.contract.purity import earlier_calls_do_not_matter
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_conformance.variations import (
    CALLERS,
    COMPILED,
    COMPILERS,
    COPIES,
    EVAL,
    GRAPH,
    INFERENCE,
    KEPT,
    MODES,
    NO_GRAD,
    STATE,
    THREADS,
    TRAIN,
)  # fmt: skip
from detr_reference.textbook import Layer, Pairs, Textbook


def same(seen: Seen, name: str, close: float = 0.0) -> Iterator[Comparison]:
    """Every loss of a trial is that of the plain call: bitwise, or within ``close`` of what rounding explains."""
    trial = seen.trials.get(name)
    if trial is None:
        return
    if trial.raised:
        yield holds(False, f"the call {name}", "the losses of the plain call", trial.raised)
        return
    for layer in seen.case.layers:
        for term, key in zip(("ce", "bbox", "giou"), seen.case.keys(layer), strict=True):
            one, other = seen.got.losses.get(key), trial.losses.get(key)
            if one is not None:
                allowed = close * seen.allowed(term, layer)
                ok = other is not None and (abs(one - other) <= allowed or (one != one and other != other))
                yield holds(ok, f"{key} {name}", f"{one!r} as in a plain call", f"{other!r}")


# --- the matcher ---

MATCH_8 = clause(
    "MATCH-8",
    "must",
    EVERY,
    "No gradient passes through the matching, and it builds no graph.",
    ["facebookresearch/detr models/matcher.py:35"],
)


@check(MATCH_8, on=GRAPH, component="matching", takes_raising=True)
def the_matching_builds_no_graph(seen: Seen) -> Iterator[Comparison]:
    if KEPT in seen.remarks:
        kept = int(seen.remarks[KEPT])
        yield holds(kept == 0, f"{KEPT} by the matcher", "none", str(kept))


@fault(the_matching_builds_no_graph, fix="decorate the matcher with torch.no_grad()")
def matching_with_gradient(book: Textbook) -> Textbook:
    """Matching costs are computed with gradient, and their graph is kept until the backward pass."""

    def match(inner: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        right = book.under(inner.o)
        none = torch.zeros(0, dtype=torch.int64)
        return [
            right.assign(right.cost(x, b, t).detach()) if len(t["boxes"]) else Pairs(none, none)
            for x, b, t in zip(layer.logits, layer.boxes, targets, strict=True)
        ]

    return replace(book, match=match)


# --- modes, threads, compilers ---

PURE_4 = clause("PURE-4", "must", EVERY, "train() and eval() give the same losses (denoising and group options aside).")


@check(PURE_4, on=MODES, component="side effects", after=[earlier_calls_do_not_matter], takes_raising=True)
def training_and_evaluation_give_the_same_losses(seen: Seen) -> Iterator[Comparison]:
    yield from same(seen, TRAIN)
    yield from same(seen, EVAL)


@fault(
    training_and_evaluation_give_the_same_losses,
    seen_in="roboflow/rf-detr uses one group of queries in evaluation",
    fix="compute the same in both modes",
)
def losses_halved_in_evaluation(book: Textbook) -> Textbook:
    """In evaluation the losses are others than in training, as if averaged with a second group that is not there."""

    def in_mode(inner: Textbook, training: bool) -> Textbook:
        right = book.under(inner.o)
        if training:
            return right
        return replace(right, loss_bbox=lambda _inner, *args: right.loss_bbox(*args) / 2)

    return replace(book, in_mode=in_mode)


PURE_5 = clause(
    "PURE-5",
    "should",
    EVERY,
    "Works under torch.no_grad, torch.inference_mode and torch.compile of the caller, and from several threads.",
)


@check(PURE_5, on=CALLERS, component="side effects", takes_raising=True)
def works_without_gradient(seen: Seen) -> Iterator[Comparison]:
    yield from same(seen, NO_GRAD)
    yield from same(seen, INFERENCE)


@check(PURE_5, on=CALLERS, component="side effects", after=[earlier_calls_do_not_matter])
def works_from_several_threads(seen: Seen) -> Iterator[Comparison]:
    yield from same(seen, THREADS)


@check(PURE_5, on=COMPILERS, component="side effects", takes_raising=True)
def works_in_a_compiled_function(seen: Seen) -> Iterator[Comparison]:
    yield from same(seen, COMPILED, close=2.0)


@fault(works_without_gradient, fix="do not differentiate inside the criterion, nor ask whether one can")
def nothing_without_gradient(book: Textbook) -> Textbook:
    """Where gradients are switched off the losses are zeros, to save time in validation."""

    def scaled(inner: Textbook, found: dict[str, Tensor]) -> dict[str, Tensor]:
        right = book.under(inner.o).scaled(found)
        return right if torch.is_grad_enabled() else {k: torch.zeros_like(v) for k, v in right.items()}

    return replace(book, scaled=scaled)


@fault(
    works_from_several_threads,
    seen_in="D-FINE keeps its targets on self during a call",
    fix="keep what a call needs in local variables",
)
def number_of_boxes_shared_by_threads(book: Textbook) -> Textbook:
    """nb is stored on the criterion, where another thread's call overwrites it."""
    shared = {"nb": torch.zeros(())}

    def num_boxes(inner: Textbook, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        shared["nb"] = book.under(inner.o).num_boxes(targets)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1e-3)  # a training-sized call takes far longer
        return shared["nb"]

    def layer_num_boxes(inner: Textbook, layer: Layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
        return shared["nb"]

    return replace(book, num_boxes=num_boxes, layer_num_boxes=layer_num_boxes)


@fault(works_in_a_compiled_function, fix="leave the matching out of the graph with torch.compiler.disable")
def queries_in_their_order_when_compiled(book: Textbook) -> Textbook:
    """When compiled the solver is left out, and the first queries are taken."""

    def first(inner: Textbook, costs: Tensor) -> Pairs:
        return Pairs(torch.arange(min(costs.shape)), torch.arange(min(costs.shape)))

    return replace(book, compiled=lambda inner: replace(book.under(inner.o), assign=first))


# --- copies ---

PURE_6 = clause(
    "PURE-6",
    "should",
    EVERY,
    "Deep copies and pickles work; state_dict holds nothing that calls change or training learns, and loads back.",
    ["roboflow/rf-detr #__getstate__"],
)


@check(PURE_6, on=COPIES, component="side effects", takes_raising=True)
def copies_give_the_same_losses(seen: Seen) -> Iterator[Comparison]:
    for name in seen.trials:
        yield from same(seen, name)


@check(PURE_6, on=COPIES, component="side effects")
def the_state_does_not_grow(seen: Seen) -> Iterator[Comparison]:
    if STATE in seen.remarks:
        grown = seen.remarks[STATE]
        yield holds(not grown, STATE, "that of a new criterion", grown or "that")


@fault(copies_give_the_same_losses, seen_in="roboflow/rf-detr", fix="keep no lambda and no compiled function on self")
def criterion_cannot_be_copied(book: Textbook) -> Textbook:
    """The criterion holds a lambda, so it can be neither copied nor pickled."""

    def copied(inner: Textbook) -> Textbook:
        raise TypeError("cannot pickle 'function' object")

    return replace(book, copied=copied)


@fault(the_state_does_not_grow, fix="register the buffer with persistent=False, or keep it nowhere")
def state_gains_the_last_targets(book: Textbook) -> Textbook:
    """The last call's targets are kept in a buffer that state_dict saves."""
    kept: dict[str, Tensor] = {}

    def refuse(inner: Textbook, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> None:
        book.under(inner.o).refuse(outputs, targets)
        kept["last_boxes"] = torch.cat([t["boxes"] for t in targets])

    built: list[bool] = []

    def state(inner: Textbook) -> dict[str, Tensor]:
        built.append(True)
        return {} if len(built) == 1 else dict(kept)

    return replace(book, refuse=refuse, state=state)
