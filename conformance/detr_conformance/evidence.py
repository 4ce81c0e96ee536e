"""What a failed check shows: the input in words, and in a form that anyone can call the candidate with again."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from detr_conformance import messages
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.experiments import _call
from detr_conformance.findings import Call, Evidence, Numbers
from detr_conformance.footprints import HERE, Probe
from detr_conformance.registry import Check, Comparison, faults
from detr_conformance.seen import Seen
from detr_fixtures import arrays
from detr_reference.textbook import Pairs, textbook

MOST: Final = 8  # known faults on a number line


def of(check: Check, bound: Bound, label: str, case: Case, found: Comparison) -> Evidence:
    """The evidence of a comparison on the smallest input. ``label``: the case that it was found on."""
    call, numbers = None, None
    if not case.words and not check.on.once:
        seen = _call(bound, case)
        call = _again(seen)
        numbers = _numbers(check, seen, found) if found.numbers else None
    elif found.numbers:
        numbers = Numbers(*found.numbers)
    shown = (messages.inputs(case), found.what, found.want, found.got, found.allowed, found.how)
    return Evidence(label, *shown, call, numbers)


def _again(seen: Seen) -> Call | None:
    case = seen.case
    try:
        packed = arrays.to_bytes(arrays.flat(case.outputs, case.targets))
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
    return Call(options, base64.b64encode(packed).decode("ascii"), matched, best)


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
