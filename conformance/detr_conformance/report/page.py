"""``report.html``: one file that needs neither a server, nor JavaScript, nor anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2

from detr_conformance.findings import Finding, Report
from detr_conformance.report import drawing, summary

ICONS: Final = {
    "pass": "✓",
    "right": "✓",
    "conformant": "✓",
    "fail": "✗",
    "wrong": "✗",
    "not conformant": "✗",
    "error": "⚠",
    "deviation": "≈",
    "accepted": "≈",
    "blocked": "⊘",
    "not reached": "⊘",
}
SAID: Final = {
    "pass": "met",
    "fail": "broken",
    "error": "bug in the suite",
    "deviation": "accepted",
    "blocked": "blocked",
    "declined": "not judged",
    "ambiguous": "ambiguous",
}


@dataclass(frozen=True)
class Power:
    """A check beside the known faults that it is shown to catch."""

    finding: Finding
    faults: tuple[tuple[str, str], ...]


@cache
def environment() -> jinja2.Environment:
    """Where templates come from; whatever they print is escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters |= {"icon": lambda word: ICONS.get(word, "–"), "said": lambda verdict: SAID.get(verdict, verdict)}
    found.filters |= {"number": lambda value: f"{value:.7g}", "words": lambda name: name.replace("_", " ")}
    found.globals |= {"summary": summary, "drawing": drawing}
    return found


def html(reports: Sequence[Report], written: str) -> str:
    """The page of a run. ``written``: when."""
    shown = [
        {"report": r, "id": f"r{i}", "failures": failures(r), "power": list(power(r))} for i, r in enumerate(reports)
    ]
    return environment().get_template("report.html").render(shown=shown, written=written)


def failures(report: Report) -> list[dict[str, Any]]:
    """Failures and accepted failures, with what is drawn of each; the smoke finding is one where it failed."""
    return [
        {
            "finding": f,
            "pictures": drawing.pictures(f.evidence),
            "line": drawing.line(f.evidence.numbers if f.evidence else None),
            "repro": f"repro/{Path(f.repro).name}" if f.repro else "",
            "rerun": f"pytest --candidate={report.spec or report.candidate} --clause={f.clause}",
        }
        for f in report.findings
        if f.verdict in ("fail", "error", "deviation")
    ]


def power(report: Report) -> Iterator[Power]:
    """Every check of the report with its known faults in the profile."""
    from detr_conformance.registry import faults

    by_check: dict[str, list[tuple[str, str]]] = {}
    for fault in faults(report.profile):
        if report.profile not in fault.survives:
            by_check.setdefault(fault.check.name, []).append((fault.id, fault.sentence))
    for finding in report.findings:
        if finding.check != "smoke":
            yield Power(finding, tuple(by_check.get(finding.check, ())))


def matrix(found: Any) -> str:
    """The page of a ``comparing.Matrix``."""
    return environment().get_template("matrix.html").render(it=found)
