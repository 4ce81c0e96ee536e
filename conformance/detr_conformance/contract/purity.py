"""PURE: side effects."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from detr_conformance.contract.compare import holds
from detr_conformance.experiments import AGAIN, EMPTIED, NEW, OTHER_SEED, REPEATED
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Textbook


def _wrapped(book: Textbook, act: Any) -> Textbook:
    """The book whose ``losses`` are preceded by ``act(outputs, targets)`` and followed by what that returns."""

    def losses(inner: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        after = act(outputs, targets)
        result = book.under(inner.o).losses(outputs, targets, given)
        return after(result) if after else result

    return replace(book, losses=losses)


def _alike(seen: Seen, name: str) -> Iterator[Comparison]:
    """Every loss of the twin is bitwise that of the first call."""
    twin = seen.twins[name]
    for key, got in seen.got.losses.items():
        other = twin.got.losses.get(key)
        ok = other == got or (other is not None and other != other and got != got)
        yield holds(ok, f"{key}, called {name}", f"{got!r} as the first time", f"{other!r}")


PURE_1 = clause("PURE-1", "must", EVERY, "Outputs and targets are not changed: no key, no value, no nested list.")


@check(PURE_1, on=REPEATED, component="side effects")
def inputs_are_not_changed(seen: Seen) -> Iterator[Comparison]:
    for name, call in (("the call", seen), (f"the call {EMPTIED}", seen.twins[EMPTIED])):
        yield holds(not call.got.changed, f"inputs after {name}", "as before", call.got.changed or "as before")


@fault(
    inputs_are_not_changed,
    seen_in="longzw1997/Open-GroundingDino writes outputs['one_hot']",
    fix="work on a copy of the dict",
)
def outputs_gain_a_key(book: Textbook) -> Textbook:
    """The criterion stores an intermediate result in the caller's outputs."""
    return _wrapped(book, lambda outputs, targets: outputs.update(one_hot=torch.zeros(1)))


@fault(
    inputs_are_not_changed,
    seen_in="IDEA-Research/detrex TwoStageCriterion zeroes the caller's labels",
    fix="clone the labels before changing them",
)
def labels_are_zeroed_in_place(book: Textbook) -> Textbook:
    """The caller's labels are changed by the call."""

    def act(outputs: Any, targets: Any) -> Any:
        def zero(result: Any) -> Any:
            for target in targets:
                target["labels"].zero_()
            return result

        return zero

    return _wrapped(book, act)


PURE_2 = clause(
    "PURE-2", "must", EVERY, "The same call twice gives bitwise the same result; earlier calls do not matter."
)


@check(PURE_2, on=REPEATED, component="side effects", takes_raising=True)
def earlier_calls_do_not_matter(seen: Seen) -> Iterator[Comparison]:
    yield from _alike(seen, AGAIN)
    yield from _alike(seen, NEW)


@fault(earlier_calls_do_not_matter, seen_in="D-FINE caches its targets between calls", fix="keep nothing on self")
def losses_smoothed_over_calls(book: Textbook) -> Textbook:
    """Something is kept from call to call, and moves the losses of the next."""
    last: dict[str, float] = {}

    def act(outputs: Any, targets: Any) -> Any:
        def smooth(result: Any) -> Any:
            found = {k: 0.9 * v + 0.1 * last.get(k, float(v.detach())) for k, v in result.losses.items()}
            last.update({k: float(v.detach()) for k, v in result.losses.items()})
            return replace(result, losses=found)

        return smooth

    return _wrapped(book, act)


PURE_3 = clause("PURE-3", "must", EVERY, "The global random state is neither read nor moved.")


@check(PURE_3, on=REPEATED, component="side effects")
def the_random_state_is_left_alone(seen: Seen) -> Iterator[Comparison]:
    moved = seen.remarks.get("random state moved", "")
    yield holds(not moved, "the global random state after the call", "as before", f"that of {moved} moved")
    if not moved:
        yield from _alike(seen, OTHER_SEED)


@fault(the_random_state_is_left_alone, fix="use no random numbers, or a generator of your own")
def random_numbers_are_drawn(book: Textbook) -> Textbook:
    """The criterion draws random numbers from the global generators."""

    def act(outputs: Any, targets: Any) -> None:
        torch.rand(1)
        random.random()

    return _wrapped(book, act)
