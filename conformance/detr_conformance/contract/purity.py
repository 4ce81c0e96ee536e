"""PURE: side effects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from detr_conformance.contract.compare import holds
from detr_conformance.denoised import BESIDE_DENOISING, DINO
from detr_conformance.experiments import AFRESH, AGAIN, EMPTIED, MOVED, NEW, OTHER_SEED, OTHERS, REPEATED
from detr_conformance.registry import DETR, EVERY, TEXT, Comparison, check, clause, fault, known
from detr_conformance.seen import Seen
from detr_reference.textbook import Textbook


def _wrapped(book: Textbook, act: Any) -> Textbook:
    """The book whose ``losses`` are preceded by ``act(outputs, targets)`` and followed by what that returns."""

    def losses(inner: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        after = act(outputs, targets)
        result = book.under(inner.o).losses(outputs, targets, given)
        return after(result) if after else result

    return replace(book, losses=losses)


def _alike(call: Seen, other: Seen, name: str, like: str) -> Iterator[Comparison]:
    """Every loss of the other call is bitwise that of ``call``."""
    for key, want in call.got.losses.items():
        got = other.got.losses.get(key)
        ok = got == want or (got is not None and got != got and want != want)
        yield holds(ok, f"{key}, called {name}", f"{want!r} as {like}", other.raised or f"{got!r}")


PURE_1 = clause("PURE-1", "must", EVERY, "Outputs and targets are not changed: no key, no value, no nested list.")


@check(PURE_1, on=REPEATED, component="side effects")
def inputs_are_not_changed(seen: Seen) -> Iterator[Comparison]:
    for name, call in (("the call", seen), (f"the call {EMPTIED}", seen.twins[EMPTIED])):
        yield _as_before(call, name)


@check(PURE_1, on=BESIDE_DENOISING, component="side effects", profiles=DINO)
def inputs_with_denoising_queries_are_not_changed(seen: Seen) -> Iterator[Comparison]:
    yield _as_before(seen, "the call")


def _as_before(call: Seen, name: str) -> Comparison:
    return holds(not call.got.changed, f"inputs after {name}", "as before", call.got.changed or "as before")


@fault(
    inputs_are_not_changed,
    seen_in="longzw1997/Open-GroundingDino writes outputs['one_hot']",
    fix="work on a copy of the dict",
)
def outputs_gain_a_key(book: Textbook) -> Textbook:
    """The criterion stores an intermediate result in the caller's outputs."""
    return _wrapped(book, lambda outputs, targets: outputs.update(one_hot=torch.zeros(1)))


PURE_2 = clause(
    "PURE-2", "must", EVERY, "The same call twice gives bitwise the same result; earlier calls do not matter."
)


@check(PURE_2, on=REPEATED, component="side effects", takes_raising=True)
def earlier_calls_do_not_matter(seen: Seen) -> Iterator[Comparison]:
    for name in (AGAIN, NEW):
        yield from _alike(seen, seen.twins[name], name, "the first time")
    for name in OTHERS:
        if name in seen.twins:
            afresh = seen.twins[AFRESH[name]]
            yield from _alike(afresh, seen.twins[name], f"{name}, after other calls", "with a new criterion")
    if seen.bound.candidate.own_weights:  # which a criterion may fill at its first call
        kept, new = (seen.twins[name].got.weights or {} for name in (AGAIN, NEW))
        differ = ", ".join(
            f"{k}: {new.get(k)} → {kept.get(k)}" for k in sorted({*kept, *new}) if kept.get(k) != new.get(k)
        )
        yield holds(not differ, "weight_dict after other calls", "that of a new criterion", differ or "the same")


def _first(kept: dict[int, Any], book: Textbook, value: Any) -> Any:
    """The value of a criterion's first call, in all its calls. A criterion has options of its own, which are kept too:
    they live as long as what tells them apart."""
    return kept.setdefault(id(book.o), (book.o, value))[1]


def _carried(
    mixed: Callable[[Any, Any], Any], kept: dict[int, Any], before: Callable[..., Any], book: Textbook, *args: Any
) -> Any:
    """Losses mixed with those of the criterion's last call."""
    result, last = before(*args), _first(kept, book, {})
    losses = {k: mixed(v, last[k]) if k in last else v for k, v in result.losses.items()}
    last.update({k: v.detach() for k, v in losses.items()})
    return replace(result, losses=losses)


def _first_number(kept: dict[int, Any], before: Callable[..., Any], book: Textbook, targets: Any) -> Any:
    return _first(kept, book, before(targets))


def _trimmed(kept: dict[int, Any], before: Callable[..., Any], book: Textbook, *args: Any) -> Any:
    result = before(*args)
    own = _first(kept, book, {})
    own["keys"] = set(result.losses) & own.get("keys", set(result.losses))
    return result


def _returned(kept: dict[int, Any], before: Callable[..., Any], book: Textbook) -> dict[str, float]:
    returned = _first(kept, book, {}).get("keys")
    return {k: w for k, w in before().items() if returned is None or k in returned}


_returns: dict[int, Any] = {}


def _first_boxes(
    kept: dict[int, Any], before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any
) -> Any:
    boxes = _first(kept, book, [t["boxes"] for t in targets])
    if [b.shape for b in boxes] == [t["boxes"].shape for t in targets]:
        targets = [{**t, "boxes": b} for t, b in zip(targets, boxes, strict=True)]
    return before(outputs, targets, given)


def _first_match(kept: dict[int, Any], before: Callable[..., Any], book: Textbook, layer: Any, *rest: Any) -> Any:
    """The matching of the first call of as many queries and targets."""
    sizes = (layer.name, layer.boxes.shape, *(len(t["boxes"]) for t in rest[-1]))
    made = _first(kept, book, {})
    if sizes not in made:
        made[sizes] = before(layer, *rest)
    return made[sizes]


def _first_mask(kept: dict[int, Any], before: Callable[..., Any], book: Textbook, layer: Any, outputs: Any) -> Any:
    mask = before(layer, outputs)
    return mask if mask is None else _first(kept, book, {}).setdefault(tuple(mask.shape), mask.clone())


def _shrinking(kept: dict[int, Any], before: Callable[..., Any], book: Textbook, *args: Any) -> Any:
    """The weight of no-object multiplied by eos_coef once more in every call."""
    own = _first(kept, book, {"weight": 1.0})
    own["weight"] *= book.o.eos_coef
    plain, now = book.class_weight, own["weight"]
    weighed = replace(
        book, class_weight=lambda _book, y: torch.where(y == book.o.num_classes, now, plain(y)).to(torch.float64)
    )
    return before.func(weighed, *args)  # type: ignore[attr-defined]


for name, sentence, seen_in, profiles, around in (
    ("losses-smoothed-over-calls", "Something is kept from call to call, and moves the losses of the next.",
     "D-FINE caches its targets between calls", EVERY,
     {"losses": partial(_carried, lambda loss, last: 0.9 * loss + 0.1 * last, {})}),
    ("losses-add-up-over-calls", "The losses of a call are added to those of the calls before it.", "plausible", EVERY,
     {"losses": partial(_carried, lambda loss, last: loss + last, {})}),
    ("number-of-boxes-of-the-first-call", "The number of boxes is computed in a criterion's first call, and kept.",
     "plausible", EVERY, {"num_boxes": partial(_first_number, {})}),
    ("target-boxes-of-the-first-call",
     "The target boxes of a criterion's first call are kept for later ones of the same shape.",
     "plausible", EVERY, {"losses": partial(_first_boxes, {})}),
    ("weights-of-what-was-returned-alone", "A call takes weights of losses that it did not return from weight_dict.",
     "plausible", EVERY, {"losses": partial(_trimmed, _returns), "weights": partial(_returned, _returns)}),
    ("matching-of-the-first-call",
     "The matching of a layer is kept, and serves later calls of as many queries and targets.",
     "plausible", EVERY, {"layer_match": partial(_first_match, {})}),
    ("text-mask-of-the-first-call", "The text mask of the first call of a shape serves later ones of that shape.",
     "plausible", TEXT, {"layer_mask": partial(_first_mask, {})}),
    ("no-object-loses-weight-at-every-call", "The weight of no-object is multiplied by eos_coef in every call.",
     "plausible", DETR, {"losses": partial(_shrinking, {})}),
):  # fmt: skip
    known(
        earlier_calls_do_not_matter, name, sentence, fix="keep nothing on self", seen_in=seen_in, profiles=profiles,
        around=around,
    )  # fmt: skip


PURE_3 = clause("PURE-3", "must", EVERY, "The global random state is neither read nor moved.")


@check(PURE_3, on=REPEATED, component="side effects")
def the_random_state_is_left_alone(seen: Seen) -> Iterator[Comparison]:
    moved = seen.remarks.get(MOVED, "")
    yield holds(not moved, "the global random state after the call", "as before", f"that of {moved} moved")
    if not moved:
        yield from _alike(seen, seen.twins[OTHER_SEED], OTHER_SEED, "the first time")


def _drawing(draw: Callable[[], Any], before: Callable[..., Any], book: Textbook, *args: Any) -> Any:
    draw()
    return before(*args)


for name, whose, draw in (
    ("random-numbers-are-drawn", "torch's", lambda: torch.rand(1)),
    ("pythons-random-numbers-are-drawn", "Python's", random.random),
    ("numpys-random-numbers-are-drawn", "NumPy's", np.random.rand),
):
    known(
        the_random_state_is_left_alone, name, f"A call draws random numbers from {whose} global generator.",
        fix="use no random numbers, or a generator of your own", around={"losses": partial(_drawing, draw)},
    )  # fmt: skip
