"""A failing input of a report as a golden case of the set "found"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detr_conformance import evidence
from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Call, Evidence, Finding, Report
from detr_conformance.golden import FOUND, Entry
from detr_conformance.registry import near
from detr_conformance.report import files
from detr_fixtures import golden


def entry(report: Path, clause: str, name: str = "") -> Entry:
    """The input on which a clause, or a check, fails in a report.json. Raises ConformanceError where there is none.

    ``name``: of the case, without its set; made of the clause and the input's hash where it is empty.
    """
    known: dict[str, None] = {}
    for own in files.load(report):
        for finding in own.findings:
            if finding.evidence and finding.evidence.call:
                known[finding.clause] = None
                if clause.lower() in (finding.clause.lower(), finding.check.lower()):
                    return _entry(own, finding, finding.evidence, finding.evidence.call, name)
    if not known:
        raise ConformanceError(f"{report} tells of no failing input that can be called again")
    raise ConformanceError(f"{report} has no input that fails {clause}{near(clause, known)}; it has {', '.join(known)}")


def _entry(report: Report, finding: Finding, shown: Evidence, call: Call, name: str) -> Entry:
    try:
        case = evidence.case_of(call, f"{shown.case}: {shown.inputs.splitlines()[0]}")
    except (KeyError, TypeError, ValueError) as error:
        raise ConformanceError(f"the input of {finding.clause} is damaged: {error}") from None
    odd = sorted({str(t.dtype) for t in _floats(case.outputs) if str(t.dtype) != "torch.float32"})
    if odd:
        raise ConformanceError(f"the input of {finding.clause} is in {', '.join(odd)}; golden cases are in float32")
    slug = name or f"{finding.clause}-{golden.sha256(call.npz.encode('ascii'))[:8]}"
    slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    claimed = tuple(id for id, _ in finding.diagnosis.faults) if finding.diagnosis else ()
    origin = {"found": {"clause": finding.clause, "candidate": report.candidate, "seed": report.seed}}
    return Entry(f"{report.profile}/{FOUND}-{slug}", FOUND, case, origin, claimed=claimed)


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
