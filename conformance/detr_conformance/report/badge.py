"""``badge.json``: the verdict in the form of a shields.io endpoint. Never a percentage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from detr_conformance.findings import Report
from detr_conformance.report.summary import many

COLOURS: Final = {"conformant": "brightgreen", "not conformant": "red"}


def data(reports: Sequence[Report]) -> dict[str, Any]:
    """The badge of one candidate, or of several together: the first that is not conformant decides."""
    decisive = next((r for r in reports if not r.conformant), reports[0])
    profiles = ", ".join(dict.fromkeys(r.profile for r in reports))
    accepted = sum(len({f.clause for f in r.deviations}) for r in reports)
    broken = sum(len({f.clause for f in r.failed}) for r in reports)
    said = [f"{profiles} {decisive.level}", decisive.verdict]
    said += [f"only {', '.join(decisive.clauses)}"] if decisive.clauses else []
    said += [f"{many(broken, 'clause')} broken"] if broken else []
    said += [many(accepted, "deviation")] if accepted else []
    colour = COLOURS.get(decisive.verdict, "lightgrey")
    if decisive.conformant and (accepted or decisive.clauses):
        colour = "green"
    return {"schemaVersion": 1, "label": "DETR criterion", "message": " · ".join(said), "color": colour}
