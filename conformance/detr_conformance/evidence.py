"""What a failed check shows: the input in words, and in a form that anyone can call the candidate with again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from detr_conformance import messages, repeats
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import called
from detr_conformance.findings import Call, Evidence, Gradient, Numbers
from detr_conformance.footprints import HERE, Probe
from detr_conformance.registry import Check, Comparison, faults
from detr_conformance.seen import Seen
from detr_fixtures import arrays
from detr_reference.options import Options
from detr_reference.textbook import TERMS, Pairs, textbook

MOST: Final = 8  # known faults on a number line


def of(check: Check, bound: Bound, label: str, case: Case, found: Comparison) -> Evidence:
    """The evidence of a comparison on the smallest input. ``label``: the case that it was found on."""
    call, numbers, repeat = None, None, None
    if not case.words and not check.on.once:
        seen = called(bound, case)
        call = _again(seen)
        numbers = _numbers(check, seen, found) if found.numbers else None
        repeat = repeats.of(check, seen, found) if call else None
    elif found.numbers:
        numbers = Numbers(*found.numbers)
    shown = (messages.inputs(case), found.what, found.want, found.got, found.allowed, found.how)
    gradient = _gradient(seen, found.what) if call else None
    return Evidence(label, *shown, call, numbers, repeat, gradient)


def case_of(call: Call, label: str = "the stored call") -> Case:
    """The case of a stored call. Raises ValueError where it is damaged."""
    outputs, targets = arrays.nested(arrays.from_text(call.npz))
    return Case(label, Options().with_(**call.options), outputs, tuple(targets))


def _again(seen: Seen) -> Call | None:
    case = seen.case
    try:
        packed = arrays.to_text(case.outputs, case.targets)
    except TypeError:  # an input that is meant to be none
        return None
    matched: dict[str, list[list[tuple[int, int]]]] = {}
    best: dict[str, list[list[tuple[int, int]]]] = {}
    try:
        best = _pairs(seen.best)
        matched = {} if seen.raised else _pairs(seen.pairs)
    except Exception:  # what was returned tells of no matching
        pass
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(case.options).items()}
    return Call(options, packed, matched, best)


def _gradient(seen: Seen, what: str) -> Gradient | None:
    """Both gradients of a loss, where ``what`` is about one and it has few numbers."""
    for layer in seen.case.layers:
        for term in TERMS:
            for at, output in enumerate(("pred_logits", "pred_boxes")):
                loss = f"loss_{term}{seen.case.suffix(layer)}"
                if not re.match(rf"gradient of {loss} at {output}\b", what) or (term, layer) not in seen.want.grads:
                    continue
                want, got = seen.want.grads[term, layer][at], seen.got.grads.get((term, layer), (None, None))[at]
                if got is not None and got.shape != want.shape:
                    return None
                off = want.abs() if got is None else (got - want).abs().nan_to_num(nan=math.inf)
                image = int(off.flatten(1).amax(-1).argmax()) if off.numel() else 0
                if not want.numel() or want[image].numel() > messages.FEW:
                    return None
                return Gradient(loss, output, image, want[image].tolist(), None if got is None else got[image].tolist())
    return None


def _pairs(by_layer: Mapping[str, Sequence[Pairs]]) -> dict[str, list[list[tuple[int, int]]]]:
    return {
        layer: [list(zip(p.query.tolist(), p.target.tolist(), strict=True)) for p in images]
        for layer, images in by_layer.items()
    }


def _numbers(check: Check, seen: Seen, found: Comparison) -> Numbers:
    """Beside a loss, what the known faults of the check make of it at the candidate's own matching."""
    assert found.numbers is not None
    known: dict[str, float] = {}
    atom = ("loss", found.what)
    if not seen.raised and found.what in seen.got.losses:
        probe = Probe(seen)
        for fault in faults(seen.bound.profile):
            if fault.check.clause is check.clause and len(known) < MOST:
                value: Any = probe.of((fault.id,), fault.apply(textbook), HERE).get(atom)
                if isinstance(value, float) and math.isfinite(value) and not probe.equal(atom, value, found.numbers[0]):
                    known[fault.id] = value
    return Numbers(*found.numbers, known)
