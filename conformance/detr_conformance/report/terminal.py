"""The screen: the verdict by component, what was not judged, and the last line. Knows findings alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from detr_conformance.findings import COMPONENTS, Finding, Report

Style = Literal["", "good", "bad", "quiet", "bold"]
Part = tuple[str, Style]


def screen(report: Report) -> Iterator[list[Part]]:
    """All lines of a report."""
    yield from header(report)
    yield []
    yield from components(report.findings)
    yield []
    yield from last(report)


def header(report: Report) -> Iterator[list[Part]]:
    """Who is judged, and how."""
    v = report.versions
    where = "cpu" if report.device in ("cpu", "none") else f"cpu and {report.device}"
    suite = f"detr-conformance {v['detr-conformance']} · torch {v['torch']} {where} float32 · seed {report.seed}"
    yield [(suite, "quiet")]
    options = "".join(f" · {k}={value!r}" for k, value in report.options.items())
    yield [("candidate  ", "quiet"), (report.candidate, "bold")]
    yield [
        ("profile    ", "quiet"),
        (report.profile, "bold"),
        (f" ({report.profile_from}) · level {report.level} · effort {report.effort}{options}", ""),
    ]
    for note in report.notes:
        yield [("note       ", "quiet"), (note, "")]


def components(findings: Sequence[Finding]) -> Iterator[list[Part]]:
    """A line a component: its verdict, and the clauses that are broken, blocked or declined."""
    for component in COMPONENTS:
        own = [f for f in _binding(findings) if f.component == component and f.check != "smoke"]
        if not own:
            continue
        broken = _clauses(own, "fail", "error")
        blocked = [c for c in _clauses(own, "blocked") if c not in broken]
        declined = [c for c in _clauses(own, "declined") if c not in broken + blocked]
        word, style = _verdict(broken, blocked, own)
        passed = sum(f.verdict == "pass" for f in own)
        line: list[Part] = [
            (f"  {component:<18}", ""),
            (f"{word:<14}", style),
            (f"{passed} of {len(own)} checks", "quiet"),
        ]
        for name, ids, ids_style in (
            ("broken", broken, "bad"),
            ("blocked", blocked, ""),
            ("declined", declined, "quiet"),
        ):
            if ids:
                line.append((f" · {name} {', '.join(ids)}", ids_style))  # type: ignore[arg-type]
        yield line


def last(report: Report) -> Iterator[list[Part]]:
    """The verdict and its counts."""
    binding = _binding(report.findings)
    judged = {f.clause for f in binding if f.check != "smoke" and f.verdict != "declined"}
    broken = {f.clause for f in binding if f.verdict in ("fail", "error") and f.check != "smoke"}
    blocked = {f.clause for f in binding if f.verdict == "blocked"} - broken
    declined = {f.clause for f in binding if f.verdict == "declined"} - judged
    word: Part = ("CONFORMANT", "good") if report.conformant else ("NOT CONFORMANT", "bad")
    if not judged - blocked and not broken:
        word = ("NOTHING WAS JUDGED", "bad")
    counts = f"  {len(judged - broken - blocked)} of {len(judged)} clauses met"
    for name, found in (("broken", broken), ("blocked", blocked), ("declined", declined)):
        if found:
            counts += f" · {len(found)} {name}"
    yield [(f"{report.profile}, {report.level}: ", ""), word, (counts, "")]
    for f in report.findings:
        said = f.message if f.verdict == "pass" else ""
        if f.level == "information" and f.verdict == "fail" and f.evidence:
            said = f"{f.evidence.what} is {f.evidence.got}, by the formula {f.evidence.want}"
        if said:
            yield [("for information  ", "quiet"), (f"{f.clause}: {said}", "quiet")]
    reasons: dict[str, list[str]] = {}
    for f in report.findings if judged else ():
        if f.verdict == "declined" and f.message and f.clause not in reasons.get(f.message, []):
            reasons.setdefault(f.message, []).append(f.clause)
    for reason, clauses in reasons.items():
        yield [("not judged  ", "quiet"), (f"{', '.join(clauses)}: {reason}", "quiet")]


def _binding(findings: Sequence[Finding]) -> list[Finding]:
    """Those that decide a verdict."""
    return [f for f in findings if f.level != "information"]


def _clauses(findings: Sequence[Finding], *verdicts: str) -> list[str]:
    return list(dict.fromkeys(f.clause for f in findings if f.verdict in verdicts))


def _verdict(broken: list[str], blocked: list[str], own: Sequence[Finding]) -> tuple[str, Style]:
    if broken:
        return "wrong", "bad"
    if blocked:
        return "not reached", ""
    return ("right", "good") if any(f.verdict == "pass" for f in own) else ("not judged", "quiet")
