"""Whether the golden cases are as they should be: whole, all there, and the same numbers by two ways.

The first way makes every case again from its inputs with the textbook. The second shares nothing with it but the
inputs: box numbers in fractions, class costs in plain floats, every assignment of an image tried one by one, and all
losses and gradients from the fast reference in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from detr_conformance import golden_coco, golden_judge, registry, tolerance
from detr_conformance.candidate import Bound, bind
from detr_conformance.corpus import spread
from detr_conformance.golden import FOUND, case_of, entries, found_entry
from detr_conformance.golden_records import in_double, make
from detr_conformance.tolerance import EPS, OPS
from detr_fixtures import exact, golden
from detr_fixtures.golden import FixtureError, Golden
from detr_fixtures.optimal import rounding, total
from detr_reference.options import PROFILES

DOUBLE: Final = float(torch.finfo(torch.float64).eps)
PARTS: Final = 2  # of a profile's cases, to be checked side by side
REFERENCE: Final = "detr_reference.criterion"


@dataclass(frozen=True)
class Job:
    """Some of a profile's cases: those with this number modulo PARTS."""

    folder: Path
    profile: str
    part: int


def jobs(folder: Path, profiles: Sequence[str] = tuple(PROFILES)) -> list[Job]:
    """The work of a check, in parts of about the same size."""
    return [Job(folder, profile, part) for part in range(PARTS) for profile in profiles]


def problems(folder: Path, processes: int = 2) -> Iterator[list[str]]:
    """What is not as it should be: first of the files, then job by job, then of the conversion from COCO."""
    broken = golden.problems(folder)
    yield broken
    if broken:
        return
    yield from spread(checked, jobs(folder), processes)
    cases, file = golden_coco.of_folder(folder)
    yield list(golden_coco.problems(cases, file))


def checked(job: Job) -> list[str]:
    """What is wrong with the cases of a job, in lines that begin with the name of the case."""
    stored = {one.name: one for one in golden.every(job.folder, job.profile)}
    declared = {entry.name: entry for entry in entries(job.profile)}
    declared |= {one.name: found_entry(one) for one in stored.values() if one.set == FOUND}
    known = {fault.id for fault in registry.faults(job.profile)}
    lines = []
    for name in sorted({*stored, *declared})[job.part :: PARTS]:
        if name not in stored:
            lines.append(f"{name}: it is not there; run detr-conformance fixtures regenerate")
        elif name not in declared:
            lines.append(f"{name}: nothing declares it; run detr-conformance fixtures regenerate")
        else:
            one = stored[name]
            lines += [f"{name}: {line}" for line in changes(one, make(declared[name], tuple(one.record["kills"])))]
            lines += [f"{name}: {line}" for line in second(one)]
            lines += [f"{name}: it claims to kill the unknown {id}" for id in one.record["kills"] if id not in known]
    return lines


# --- the first way --------------------------------------------------------------------------------------------------


def changes(old: Golden, new: Golden) -> list[str]:
    """What would be another value if a case was made anew, beyond what rounding explains, in lines."""
    found = []
    for key in sorted({*old.record, *new.record}):
        if key != "expected" and old.record.get(key) != new.record.get(key):
            found.append(f"{key}: {_short(old.record.get(key))} → {_short(new.record.get(key))}")
    for key in sorted({*old.expected, *new.expected}):
        found += _changed(old, key, old.expected.get(key), new.expected.get(key))
    for name in sorted({*old.stored, *new.stored}):
        found += _changed_array(old, name, old.stored.get(name), new.stored.get(name))
    return found


def _changed(old: Golden, key: str, before: Any, after: Any) -> Iterator[str]:
    """An entry under "expected"."""
    if isinstance(before, Mapping) and isinstance(after, Mapping) and key in ("losses", "allowed", "gradient_sums"):
        for name in sorted({*before, *after}):
            a, b = before.get(name), after.get(name)
            if a is None or b is None or abs(a - b) > _rounded(old, key, name, b):
                yield f"{key} {name}: {_short(a)} → {_short(b)}"
    elif before != after and key == "matching" and _pairs(before) == _pairs(after):
        for layer, images in after.items():
            for b, (a, c) in enumerate(zip(before[layer], images, strict=True)):
                for name in ("cost", "margin"):
                    x, y = a.get(name), c.get(name)
                    if x != y and (None in (x, y) or abs(x - y) > _of_cost(old, layer) * 2 * len(a["pairs"][0])):
                        yield f"matching {layer}, image {b}: {name} {_short(x)} → {_short(y)}"
    elif before != after:
        yield f"{key}: {_short(before)} → {_short(after)}"


def _rounded(old: Golden, key: str, name: str, value: float) -> float:
    """What another platform's float64 explains."""
    if key == "allowed":
        return 0.02 * value  # three digits are kept
    if key == "gradient_sums":
        return DOUBLE * OPS * 1e6 * (1 + abs(value))  # of a million terms, at most
    return float(old.expected["allowed"].get(name, 100.0 * OPS * EPS)) * DOUBLE / EPS


@lru_cache(maxsize=16)
def _of_cost(old: Golden, layer: str) -> float:
    """The same of one matching cost: some roundings of its three terms, of which the class cost depends on logits."""
    case, o = case_of(old), old.options
    logits = case.predictions(layer)["pred_logits"].double()
    largest = float(logits[logits.isfinite()].abs().max())
    boxes = case.predictions(layer)["pred_boxes"].double()
    wanted = torch.cat([t["boxes"].double() for t in case.targets])
    giou = [tolerance.of_giou_pairs(b[:, None], wanted[None], DOUBLE) for b in boxes] if len(wanted) else []
    box = max((float(g.max()) for g in giou), default=0.0)
    return DOUBLE * OPS * (o.set_cost_class * (1 + largest) ** 2 + o.set_cost_bbox * 8) + o.set_cost_giou * box


def _pairs(matching: Any) -> Any:
    return {layer: [one["pairs"] for one in images] for layer, images in (matching or {}).items()}


def _changed_array(old: Golden, name: str, before: Any, after: Any) -> Iterator[str]:
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        yield f"{name}: {_form(before)} → {_form(after)}"
        return
    if np.array_equal(before, after, equal_nan=True):
        return
    allowed: Any = 0.0
    _, _, of = name.partition("expected/")
    kind, _, place = of.partition("/")
    if kind == "cost":
        allowed = _of_cost(old, place)
    elif kind == "giou":
        allowed = _of_cost(old, place) / (old.options.set_cost_giou or 1.0) + DOUBLE * OPS * 2
    elif kind == "gradient":
        term, _, layer = place.partition("/")
        yield from golden_judge.gradient_differences(old, layer, term, torch.from_numpy(after), DOUBLE)
        return
    off = ~(np.abs(before - after) <= allowed)
    if off.any():
        at = tuple(int(i) for i in np.argwhere(off)[0])
        place = "".join(f"[{i}]" for i in at)
        yield f"{name}{place}: {_short(before[at].item())} → {_short(after[at].item())}"


def _form(array: Any) -> str:
    return "nothing" if array is None else golden.form(array)


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:150]} …"


# --- the second way -------------------------------------------------------------------------------------------------


@cache
def reference(profile: str) -> Bound:
    """The fast reference, which takes every option."""
    return bind(REFERENCE, profile)


def second(one: Golden) -> Iterator[str]:
    """What of a case is not so by the second way."""
    try:
        case = in_double(case_of(one))
    except FixtureError as error:
        yield str(error)
        return
    outcome = golden_judge.judged(reference(one.profile), one, DOUBLE, case)
    yield from (f"by the fast reference, {problem}" for problem in outcome.problems)
    for layer in one.expected["layers"]:
        yield from _by_fractions(one, layer)
    for key, written in one.expected.get("exact", {}).get("losses", {}).items():
        value = exact.number(written)
        if abs(value - one.expected["losses"][key]) > one.expected["allowed"][key] * DOUBLE / EPS:
            yield f"{key} is {one.expected['losses'][key]}, and in fractions {written}"


def _by_fractions(one: Golden, layer: Mapping[str, Any]) -> Iterator[str]:
    name, o = layer["name"], one.options
    matching, inputs = one.expected["matching"][name], one.inputs
    boxes, logits = inputs[f"{layer['path']}/pred_boxes"], inputs[f"{layer['path']}/pred_logits"]
    targets = [exact.image_of(inputs, b) for b in range(len(boxes))]
    zero = name == "enc" and o.encoder_targets == "class-zero"
    eps = Fraction(str(o.giou_eps))
    sums = {"bbox": Fraction(0), "giou": Fraction(0)}
    start = 0
    for b, (own, target) in enumerate(zip(matching, targets, strict=True)):
        wanted = [exact.box(values) for values in target["boxes"]]
        pairs = own["pairs"][0]
        for q, t in pairs:
            pred = exact.box(boxes[b, q])
            sums["bbox"] += exact.l1(pred, wanted[t])
            sums["giou"] += 1 - exact.giou(pred, wanted[t], eps)
        stop = start + len(wanted)
        where = f"{name}, image {b}"
        if f"expected/class_target/{name}" in one.stored:
            stored = one.stored[f"expected/class_target/{name}"][b]
            if not np.array_equal(stored, exact.class_targets(o, logits[b].shape, target, pairs, zero)):
                yield f"{where}: the class targets are not those of its pairs"
        if f"expected/cost/{name}" in one.stored:
            yield from _costs(one, layer, b, slice(start, stop), target, zero)
            yield from _assignments(one.stored[f"expected/cost/{name}"][:, start:stop], own, where)
        start = stop
    scale = one.expected["weights"] if o.weighted else {}
    for term, value in sums.items():
        key = f"loss_{term}{layer['suffix']}"
        if key in one.expected["losses"]:
            want = float(value / Fraction(layer["box_divisor"])) * scale.get(key, 1.0)
            got = one.expected["losses"][key]
            if abs(got - want) > one.expected["allowed"][key] * DOUBLE / EPS:
                yield f"{key} is {got}, and in fractions {want}"


def _costs(
    one: Golden, layer: Mapping[str, Any], image: int, columns: slice, target: Mapping[str, Any], zero: bool
) -> Iterator[str]:
    """The GIoU and cost of every query and target of an image."""
    o, name = one.options, layer["name"]
    boxes = [exact.box(v) for v in one.inputs[f"{layer['path']}/pred_boxes"][image]]
    logits = one.inputs[f"{layer['path']}/pred_logits"][image]
    giou = one.stored[f"expected/giou/{name}"][:, columns]
    cost = one.stored[f"expected/cost/{name}"][:, columns]
    allowed, eps = _of_cost(one, name), Fraction(str(o.giou_eps))
    for t, wanted in enumerate(exact.box(v) for v in target["boxes"]):
        label = 0 if zero else int(target["labels"][t])
        for q, pred in enumerate(boxes):
            overlap = exact.giou(pred, wanted, eps)
            if abs(giou[q, t] - float(overlap)) > allowed / (o.set_cost_giou or 1.0) + DOUBLE * OPS * 2:
                yield f"{name}, image {image}: GIoU[{q},{t}] is {giou[q, t]}, and in fractions {float(overlap)}"
            own = exact.class_cost(o, logits, target, label, q, t)
            want = o.set_cost_class * own + o.set_cost_bbox * float(exact.l1(pred, wanted))
            want -= o.set_cost_giou * float(overlap)
            if abs(cost[q, t] - want) > allowed:
                yield f"{name}, image {image}: cost[{q},{t}] is {cost[q, t]}, and by hand {want}"


def _assignments(cost: Any, own: Mapping[str, Any], where: str) -> Iterator[str]:
    """The optimal assignments of an image by trying all, where they are not too many."""
    if exact.count(*cost.shape) > exact.TRIES:
        return
    every = sorted((total(cost, one), one) for one in exact.assignments(*cost.shape))
    best = every[0][0] + rounding(cost)
    optimal = sorted([list(map(list, one)) for value, one in every if value <= best])
    rest = [value for value, _ in every if value > best]
    margin = rest[0] - every[0][0] if rest else None
    if optimal != own["pairs"]:
        yield f"{where}: of all assignments {optimal} cost the least, not {own['pairs']}"
    elif abs(own["cost"] - every[0][0]) > rounding(cost):
        yield f"{where}: the least total cost is {every[0][0]}, not {own['cost']}"
    elif (margin is None) != (own["margin"] is None) or not math.isclose(
        margin or 0.0, own["margin"] or 0.0, abs_tol=2 * rounding(cost)
    ):
        yield f"{where}: the next assignment costs {margin} more, not {own['margin']}"
