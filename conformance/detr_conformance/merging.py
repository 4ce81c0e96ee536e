"""Reports of shards, one run cut into parts on several machines or seeds, as one report a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Finding, Report

# which of two findings of one check stands: a failure is one wherever it was found; to pass is more than not to judge
ORDER: Final = ("fail", "error", "deviation", "pass", "ambiguous", "blocked", "declined")


def merged(reports: Sequence[Report]) -> list[Report]:
    """One report a candidate. Raises ConformanceError that names what differs."""
    by_name: dict[str, list[Report]] = {}
    for report in reports:
        by_name.setdefault(report.candidate, []).append(report)
    return [_one(own) for own in by_name.values()]


def _one(own: Sequence[Report]) -> Report:
    first = own[0]
    for other in own[1:]:
        for name in ("profile", "options", "level", "effort", "source"):
            if getattr(other, name) != getattr(first, name):
                one, two = getattr(first, name), getattr(other, name)
                raise ConformanceError(f"{first.candidate}: the {name} of one is {one!r}, of another {two!r}")
        if other.versions["detr-conformance"] != first.versions["detr-conformance"]:
            raise ConformanceError(f"{first.candidate}: judged by different versions of detr-conformance")
    found: dict[str, list[Finding]] = {}
    for finding in (f for report in own for f in report.findings):
        found.setdefault(finding.check, []).append(finding)
    findings = tuple(_stands(several) for several in found.values())
    reached = {f.check for f in findings}
    return replace(
        first,
        findings=findings,
        notes=tuple(dict.fromkeys([*(n for r in own for n in r.notes), *_unlike(own)])),
        ledger=tuple(dict.fromkeys(problem for r in own for problem in r.ledger)),
        clauses=tuple(dict.fromkeys(c for r in own for c in r.clauses)) if all(r.clauses for r in own) else (),
        missing=tuple(dict.fromkeys(m for r in own for m in r.missing if m not in reached)),
        seconds=sum(r.seconds for r in own),
    )


def _stands(several: Sequence[Finding]) -> Finding:
    best = min(several, key=lambda f: ORDER.index(f.verdict))
    return replace(best, decided=sum(f.decided for f in several))


def _unlike(own: Sequence[Report]) -> Iterator[str]:
    """What the shards do not have in common, which the merged report says aloud."""
    seeds = sorted({r.seed for r in own})
    if len(seeds) > 1:
        yield f"merged from {len(own)} reports with the seeds {', '.join(map(str, seeds))}"
    for package in own[0].versions:
        versions = dict.fromkeys(r.versions.get(package, "none") for r in own)
        if len(versions) > 1:
            yield f"merged from reports with {package} {' and '.join(versions)}"
    devices = dict.fromkeys(r.device for r in own)
    if len(devices) > 1:
        yield f"merged from reports with the devices {' and '.join(devices)}"
