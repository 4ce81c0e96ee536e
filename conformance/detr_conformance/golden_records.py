"""From a golden case's inputs to the two files that are stored: the textbook's numbers, and what they may be off by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from detr_conformance.cases import FINAL, Case
from detr_conformance.contract import denoising, masks
from detr_conformance.golden import Entry, right
from detr_conformance.observation import Observation
from detr_conformance.seen import Seen
from detr_fixtures import arrays, golden
from detr_fixtures.exact import exact
from detr_fixtures.expected import expected, places
from detr_fixtures.golden import Golden
from detr_reference.textbook import TERMS

DIGITS: Final = 3  # of an allowed error: it is an estimate, and the same on every platform


def make(entry: Entry, kills: tuple[str, ...] = ()) -> Golden:
    """A case as it is to be stored. ``kills``: the known faults that it is shown to kill."""
    case, whole = entry.case, entry.made is None
    found = expected(case.options, case.outputs, case.targets, whole)
    inputs = arrays.flat(case.outputs, case.targets)
    drawn = {one["name"] for one in entry.made["arrays"]} if entry.made else set()
    stored = {name: a for name, a in inputs.items() if name not in drawn} | found.arrays
    own = found.record
    losses = own.pop("losses")
    allowed, decided = _allowed(entry, losses)
    more = {"exact": exact(case.options, case.outputs, case.targets, own)} if entry.set == "hand" else {}
    record = {
        "format": golden.FORMAT,
        "name": entry.name,
        "profile": entry.profile,
        "set": entry.set,
        "title": case.label,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(case.options).items()},
        "clauses": clauses(entry, kills),
        "kills": sorted(kills),
        "provenance": entry.provenance,
        **({} if entry.made is None else {"made": entry.made}),
        "arrays": {name: golden.form(a) for name, a in stored.items()},
        "expected": {"losses": losses, "allowed": allowed, **own, "decided": decided, **more},
    }
    return Golden(entry.name, json.loads(json.dumps(record, allow_nan=False)), stored)


def files_of(one: Golden) -> dict[str, bytes]:
    """The bytes of its two files by their names."""
    packed = arrays.to_bytes(one.stored, packed=False)
    return {f"{one.name}.json": written(one.record).encode("utf-8"), f"{one.name}.npz": packed}


def written(record: Mapping[str, Any]) -> str:
    """A record as JSON: one line for each entry, and for each one expected, so that a changed one is a changed line."""
    lines = []
    for key, value in record.items():
        if key in ("expected", "files") and value:
            inner = [f"  {json.dumps(k)}: {_line(v)}" for k, v in value.items()]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# --- what a float32 criterion may be off by -------------------------------------------------------------------------


def _allowed(entry: Entry, losses: Mapping[str, float]) -> tuple[dict[str, float], dict[str, bool]]:
    """By key, the error that float32 explains; by layer, whether one matching is best beyond all rounding."""
    case, seen = entry.case, reading(entry)
    scale = seen.book.weights() if case.options.weighted else {}
    found = {}
    for place in places(case.options, case.outputs):
        for term in (*TERMS, "mask", "dice"):
            key = f"loss_{term}{place.suffix}"
            if key in losses:
                found[key] = _rounded(_of(seen, term, place.name) * scale.get(key, 1.0))
    return found, {layer: seen.decided(layer) for layer in case.layers}


def reading(entry: Entry) -> Seen:
    """The case as the textbook sees it, with all losses, and no candidate."""
    case = entry.case
    losses = tuple(dict.fromkeys((*case.options.losses, "labels", "boxes")))
    case = replace(case, options=case.options.with_(losses=losses))
    return Seen(right(entry.profile), case, Observation(case))


def _of(seen: Seen, term: str, layer: str) -> float:
    if layer.startswith("dn"):
        return denoising.allowed_of(seen, term, layer)
    return masks.allowed_of(seen, term) if term in ("mask", "dice") else seen.allowed(term, layer)


def _rounded(value: float) -> float:
    """Up, to a few digits."""
    if value == 0:
        return 0.0
    scale = 10.0 ** (DIGITS - 1 - math.floor(math.log10(value)))
    return float(f"{math.ceil(value * scale * (1 - 1e-9)) / scale:.{DIGITS}g}")


# --- which clauses it shows -----------------------------------------------------------------------------------------


def clauses(entry: Entry, kills: tuple[str, ...] = ()) -> list[str]:
    """The clauses that the case is an example of, by what is in it, and those of the faults that it kills."""
    from detr_conformance import registry

    case = entry.case
    by_fault = {fault.id: fault.check.clause.id for fault in registry.faults(entry.profile)}
    wanted = {*_clauses(case), *(by_fault[id] for id in kills if id in by_fault)}
    known = {c.id for c in registry.clauses() if entry.profile in c.profiles}
    return sorted(wanted & known, key=lambda id: (id.split("-")[0], int(id.split("-")[1])))


def _clauses(case: Case) -> set[str]:
    o, counts, layers = case.options, case.counts, case.layers
    logits = np.concatenate([case.predictions(x)["pred_logits"].numpy().ravel() for x in layers])
    boxes = np.concatenate([case.predictions(x)["pred_boxes"].numpy().reshape(-1, 4) for x in layers])
    queries = min(case.predictions(x)["pred_boxes"].shape[1] for x in layers)
    finite = logits[np.isfinite(logits)]
    over = (boxes[:, :2] - boxes[:, 2:] / 2 < -1e-6) | (boxes[:, :2] + boxes[:, 2:] / 2 > 1 + 1e-6)
    of_class = {
        "softmax": {"COST-2", "CLS-1", "CLS-2"},
        "focal": {"COST-3", "CLS-3", "CLS-4", "CLS-5", "CLS-6"},
        "token": {"COST-4", "TOKEN-1", "CLS-4", "CLS-5", "CLS-6"},
    }[o.class_loss]
    given: list[tuple[bool, set[str]]] = [
        (True, {"KEY-1", "KEY-3", "NUM-1"} | ({"GRAD-2"} | of_class if "labels" in o.losses else set())),
        (case.total > 0 and "boxes" in o.losses, {"BOX-1", "BOX-2", "COST-6", "NORM-1", "GRAD-1"}),
        (case.total > 0, {"COST-1", "MATCH-1", "MATCH-2"}),
        (len(counts) > 1, {"MATCH-3", "COST-8", "NORM-3"}),
        (len(layers) > 1, {"MATCH-7", "NORM-4"}),
        (any(x.startswith("aux") for x in layers), {"LAYER-1"}),
        ("enc" in layers, {"LAYER-4"}),
        (0 in counts or max(counts, default=0) > queries, {"MATCH-5"}),
        (case.total == 0, {"NORM-5", "CLS-8", "GRAD-5"}),
        (o.class_loss == "token", {"TOKEN-2", "LAYER-6"} | ({"TOKEN-4"} if len(counts) > 1 else set())),
        (bool(over.any()), {"BOX-7"}),
        (len(finite) > 0 and float(abs(finite).max()) >= 20, {"NUM-2"}),
        (case.has_masks, {"MASK-1", "LAYER-5"} | ({"MASK-2"} if case.total == 0 else set())),
        (bool(case.denoising), {"DN-1", "DN-2"}),
        (set(o.losses) < {"labels", "boxes", "cardinality"}, {"KEY-7"}),
        (o.weighted, {"KEY-5"}),
    ]
    return {id for holds, ids in given if holds for id in ids}


def in_double(case: Case) -> Case:
    """The same numbers in float64."""
    targets = tuple({k: v.double() if v.is_floating_point() else v for k, v in t.items()} for t in case.targets)
    return replace(case.with_predictions(lambda _layer, _key, value: value.double()), targets=targets)


def boxes_of(case: Case, layer: str = FINAL) -> Any:
    """The predicted boxes [B,Q,4] of a layer."""
    return case.predictions(layer)["pred_boxes"].numpy()
