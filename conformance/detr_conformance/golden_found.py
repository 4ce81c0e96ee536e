"""A failing input of a report as a golden case of the set "found"."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detr_conformance.cases import Case
from detr_conformance.errors import ConformanceError
from detr_conformance.golden import FOUND, Entry
from detr_conformance.registry import near
from detr_fixtures import arrays, golden
from detr_reference.options import PROFILES, Options


def entry(report: Path, clause: str, name: str = "") -> Entry:
    """The input on which a clause, or a check, fails in a report.json. Raises ConformanceError where there is none.

    ``name``: of the case, without its set; made of the clause and the input's hash where it is empty.
    """
    reports = _reports(report)
    failing = [(r, f) for r in reports for f in r["findings"] if (f.get("evidence") or {}).get("call")]
    wanted = clause.lower()
    for own, finding in failing:
        if wanted in (finding["clause"].lower(), finding["check"].lower()):
            return _entry(own, finding, name)
    known = dict.fromkeys(finding["clause"] for _, finding in failing)
    if not known:
        raise ConformanceError(f"{report} tells of no failing input that can be called again")
    raise ConformanceError(f"{report} has no input that fails {clause}{near(clause, known)}; it has {', '.join(known)}")


def _reports(path: Path) -> list[Mapping[str, Any]]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConformanceError(f"{path} cannot be read: {error}") from None
    found = raw.get("reports", [raw]) if isinstance(raw, dict) else raw
    if not isinstance(found, list) or not all(isinstance(r, dict) and "findings" in r for r in found):
        raise ConformanceError(f"{path} is no report.json")
    return found


def _entry(report: Mapping[str, Any], finding: Mapping[str, Any], name: str) -> Entry:
    call, profile = finding["evidence"]["call"], str(report["profile"])
    if profile not in PROFILES:
        raise ConformanceError(f"the report's profile {profile!r} is none of {', '.join(PROFILES)}")
    try:
        packed = base64.b64decode(call["npz"], validate=True)
        outputs, targets = arrays.nested(arrays.from_bytes(packed))
        options = Options().with_(**call["options"])
    except (binascii.Error, KeyError, TypeError, ValueError) as error:
        raise ConformanceError(f"the input of {finding['clause']} is damaged: {error}") from None
    odd = sorted({str(t.dtype) for t in _floats(outputs) if str(t.dtype) != "torch.float32"})
    if odd:
        raise ConformanceError(f"the input of {finding['clause']} is in {', '.join(odd)}; golden cases are in float32")
    slug = name or f"{finding['clause']}-{golden.sha256(packed)[:8]}"
    slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    label = str(finding["evidence"]["inputs"]).splitlines()[0]
    faults = [str(id) for id, _ in (finding.get("diagnosis") or {}).get("faults", ())]
    origin = {"found": {"clause": finding["clause"], "candidate": report["candidate"], "seed": report["seed"]}}
    case = Case(f"{finding['evidence']['case']}: {label}", options, outputs, tuple(targets))
    return Entry(f"{profile}/{FOUND}-{slug}", FOUND, case, origin, claimed=tuple(faults))


def _floats(value: Any) -> Iterator[Any]:
    """The tensors of real numbers in nested outputs."""
    if hasattr(value, "is_floating_point"):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _floats(inner)
