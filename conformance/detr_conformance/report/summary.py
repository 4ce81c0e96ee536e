"""A report in short: what every form of it says alike. Knows findings alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from detr_conformance.findings import COMPONENTS, Finding, Report


@dataclass(frozen=True)
class Row:
    """A component: its verdict in a word, how many of its checks pass, and its clauses that are not simply met."""

    component: str
    word: str
    passed: int
    checks: int
    broken: tuple[str, ...]
    accepted: tuple[str, ...]
    blocked: tuple[str, ...]
    declined: tuple[str, ...]

    @property
    def parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """The kinds of clauses that there are, with their name."""
        named = ("broken", "accepted", "blocked", "declined")
        return [(name, own) for name in named if (own := getattr(self, name))]


@dataclass(frozen=True)
class Clause:
    """One clause of a report: the verdict of all its checks together, and their findings."""

    id: str
    sentence: str
    level: str
    verdict: str
    findings: tuple[Finding, ...]


def components(report: Report) -> Iterator[Row]:
    """A row a component, in their order."""
    binding = _binding(report)
    for component in COMPONENTS:
        own = [f for f in binding if f.component == component and f.check != "smoke"]
        if own:
            broken = _clauses(own, "fail", "error")
            accepted = [c for c in _clauses(own, "deviation") if c not in broken]
            blocked = [c for c in _clauses(own, "blocked") if c not in broken + accepted]
            declined = [c for c in _clauses(own, "declined") if c not in broken + accepted + blocked]
            word = _word(broken, accepted, blocked, own)
            kinds = [tuple(kind) for kind in (broken, accepted, blocked, declined)]
            yield Row(component, word, sum(f.verdict == "pass" for f in own), len(own), *kinds)


def clauses(report: Report) -> list[Clause]:
    """Every clause that the report is about, with what is worst among its checks."""
    own: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.check != "smoke":
            own.setdefault(finding.clause, []).append(finding)
    worst = ("error", "fail", "deviation", "blocked", "pass", "ambiguous", "declined")
    return [
        Clause(
            id,
            found[0].sentence,
            found[0].level,
            min((f.verdict for f in found), key=worst.index),
            tuple(found),
        )
        for id, found in own.items()
    ]


def headline(report: Report) -> str:
    """The verdict in words."""
    accepted = len({f.clause for f in report.deviations})
    more = f" with {many(accepted, 'deviation')}" if accepted and report.conformant else ""
    return report.verdict + more


def counts(report: Report) -> str:
    """How many clauses are met, and how many are not, in words."""
    binding = [c for c in clauses(report) if c.level != "information"]
    by_verdict = {v: [c for c in binding if c.verdict in v.split()] for v in ("fail error", "deviation", "blocked")}
    declined = [c for c in binding if c.verdict in ("declined", "ambiguous")]
    judged = len(binding) - len(declined)
    said = f"{sum(c.verdict == 'pass' for c in binding)} of {judged} clauses met"
    for name, found in zip(
        ("broken", "accepted", "blocked", "declined"), (*by_verdict.values(), declined), strict=True
    ):
        said += f" · {len(found)} {name}" if found else ""
    return said


def informed(report: Report) -> Iterator[tuple[str, str]]:
    """What is told for information: a clause and its remark."""
    for f in report.findings:
        said = f.message if f.verdict == "pass" else ""
        if f.level == "information" and f.verdict == "fail" and f.evidence:
            said = f"{f.evidence.what} is {f.evidence.got}, by the formula {f.evidence.want}"
        if said:
            yield f.clause, said


def untested(report: Report) -> list[tuple[str, str]]:
    """What was not judged, and why: clauses, and the reason in words."""
    reasons: dict[str, list[str]] = {}
    for f in report.findings if report.judged else ():
        if f.verdict == "declined" and f.message and f.clause not in reasons.get(f.message, []):
            reasons.setdefault(f.message, []).append(f.clause)
    found = [(", ".join(own), reason) for reason, own in reasons.items()]
    behind = dict.fromkeys(f.clause for f in _binding(report) if report.excused(f))
    if behind:
        found.append((", ".join(behind), "accepted deviations stand before them"))
    if report.clauses:
        found.append(("all others", f"only {', '.join(report.clauses)} were asked for"))
    if report.missing:
        some = ", ".join(name.replace("_", " ") for name in report.missing[:3])
        more = f" and {len(report.missing) - 3} more" if len(report.missing) > 3 else ""
        found.append((many(len(report.missing), "check"), f"left out, or the run was cut short: {some}{more}"))
    return found


def many(n: int, what: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _binding(report: Report) -> list[Finding]:
    """The findings that decide a verdict."""
    return [f for f in report.findings if f.level != "information"]


def _clauses(findings: Iterable[Finding], *verdicts: str) -> list[str]:
    return list(dict.fromkeys(f.clause for f in findings if f.verdict in verdicts))


def _word(broken: Sequence[str], accepted: Sequence[str], blocked: Sequence[str], own: Sequence[Finding]) -> str:
    if broken:
        return "wrong"
    if accepted:
        return "accepted"
    if blocked:
        return "not reached"
    return "right" if any(f.verdict == "pass" for f in own) else "not judged"
