"""``report.md``: for a pull request or the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from detr_conformance.findings import Finding, Report
from detr_conformance.report import summary

MOST: Final = 10  # failures that are shown whole


def text(reports: Sequence[Report]) -> str:
    """All reports of a run."""
    return "\n".join(line for report in reports for line in _report(report))


def plain(words: str) -> str:
    """Words in which nothing is taken for Markdown or HTML, on one line."""
    found = " ".join(words.split())
    found = found.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$@])", r"\\\1", found) if found else ""


def code(words: str) -> str:
    """Words as code on one line, also where they have backticks themselves."""
    words = " ".join(words.split()).replace("|", "¦") or " "
    longest = max((len(run) for run in re.findall("`+", words)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def block(words: str) -> list[str]:
    """Lines as they are, whatever stands in them."""
    longest = max((len(run) for run in re.findall("`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *words.splitlines(), fence]


def _report(report: Report) -> Iterator[str]:
    mark = "✅" if report.conformant else "❌"
    v = report.versions
    yield f"## {mark} {code(report.candidate)}: {summary.headline(report)}"
    yield ""
    yield f"{report.profile}, level {report.level}: {summary.counts(report)}."
    yield ""
    yield "| component | verdict | checks | clauses not met |"
    yield "|---|---|---|---|"
    for row in summary.components(report):
        parts = " · ".join(f"{name} {', '.join(own)}" for name, own in row.parts)
        yield f"| {row.component} | {row.word} | {row.passed} of {row.checks} | {parts} |"
    yield ""
    for finding in report.deviations:
        yield f"- Deviation: {plain(finding.deviation)}"
    for problem in report.ledger:
        yield f"- Ledger: {plain(problem)}"
    for clause, said in summary.informed(report):
        yield f"- For information, {clause}: {plain(said)}"
    for clauses, reason in summary.untested(report):
        yield f"- Not judged, {plain(clauses)}: {plain(reason)}"
    yield ""
    shown = [f for f in report.findings if f.verdict in ("fail", "error") and f.level != "information"]
    for finding in shown[:MOST]:
        yield from _failure(finding)
    if len(shown) > MOST:
        yield f"{len(shown) - MOST} more failures stand in report.html."
        yield ""
    yield (
        f"detr-conformance {v['detr-conformance']} · torch {v['torch']} · effort {report.effort} · seed {report.seed}"
    )
    yield ""


def _failure(finding: Finding) -> Iterator[str]:
    title = f"{finding.clause}: {finding.check.replace('_', ' ')}"
    yield f"<details><summary>{plain(title)}</summary>"
    yield ""
    yield from block(finding.message)
    yield ""
    yield "</details>"
    yield ""
