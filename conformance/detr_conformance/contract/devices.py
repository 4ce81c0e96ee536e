"""DEVICE: accelerators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from detr_conformance.contract.compare import agree, holds
from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient
from detr_conformance.contract.matching import optimal
from detr_conformance.elsewhere import DEVICES, THERE
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Textbook

DEVICE_1 = clause(
    "DEVICE-1",
    "must",
    EVERY,
    "On every accelerator present losses, gradients and the matching's cost agree with the CPU.",
)


@check(DEVICE_1, on=DEVICES, component="devices", takes_raising=True)
def the_accelerator_agrees_with_the_cpu(seen: Seen) -> Iterator[Comparison]:
    if THERE in seen.twins:
        there = seen.twins[THERE]
        for found in (_matchings(seen, there), _losses(seen, there), _gradients(seen, there)):
            yield from (replace(c, what=f"{c.what}, on {seen.bound.device}") for c in found)


def _matchings(seen: Seen, there: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        if _all_hold(optimal(seen, layer)):
            yield from optimal(there, layer)


def _losses(seen: Seen, there: Seen) -> Iterator[Comparison]:
    """Where the loss is right on the CPU: the accelerator's against the textbook's, at the accelerator's matching."""
    for layer in seen.case.layers:
        for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
            if seen.agrees(term, layer):
                got = there.got.losses.get(key)
                yield agree(key, there.want.losses[key], got, there.allowed(term, layer), "as on the CPU")


def _gradients(seen: Seen, there: Seen) -> Iterator[Comparison]:
    for known in (boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient):
        if _all_hold(known.judge(seen)):
            yield from known.judge(there)


def _all_hold(comparisons: Iterable[Comparison]) -> bool:
    return all(c.ok for c in comparisons)


@fault(
    the_accelerator_agrees_with_the_cpu,
    fix="compute the losses in float32 whatever the device: no autocast and no .half() inside the criterion",
)
def half_precision_on_the_accelerator(book: Textbook) -> Textbook:
    """On an accelerator everything is computed from values rounded to bfloat16."""

    def brought(inner: Textbook, x: Tensor) -> Tensor:
        plain: Tensor = book.under(inner.o).brought(x)
        return plain.bfloat16().to(x.dtype) if x.is_floating_point() else plain

    return replace(book, brought=brought)


@fault(the_accelerator_agrees_with_the_cpu, fix="move tensors with .to(), not through numpy or .data")
def gradient_lost_on_the_way_to_the_cpu(book: Textbook) -> Textbook:
    """On an accelerator the boxes are copied to the CPU without their graph, and get no gradient."""

    def brought(inner: Textbook, x: Tensor) -> Tensor:
        plain: Tensor = book.under(inner.o).brought(x)
        return plain.detach().requires_grad_(x.requires_grad) if x.shape[-1:] == (4,) else plain

    return replace(book, brought=brought)


DEVICE_2 = clause(
    "DEVICE-2",
    "must",
    EVERY,
    "Losses come back on the outputs' device; no device is named in the code.",
    ["IDEA-Research/DINO models/dino/dino.py names 'cuda'"],
)


@check(DEVICE_2, on=DEVICES, component="devices")
def losses_are_on_the_device_of_the_outputs(seen: Seen) -> Iterator[Comparison]:
    if THERE not in seen.twins:
        return
    there = seen.twins[THERE].got
    for layer in seen.case.layers:
        for key in seen.case.keys(layer):
            if key in there.keys:
                strange = there.odd.get(key, "")
                found = strange if strange.startswith("a tensor on ") else ""
                yield holds(not found, key, f"a tensor on {seen.bound.device}", found)


@fault(losses_are_on_the_device_of_the_outputs, fix="create tensors with device=outputs['pred_logits'].device")
def losses_left_on_the_cpu(book: Textbook) -> Textbook:
    """Losses are returned on the CPU, wherever the outputs are."""
    return replace(book, placed=lambda book, loss, like: loss)
