"""``detr-conformance replay``: the failures of a report, judged again on the inputs that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detr_conformance.commands.shared import clause_ids, print_json, refuse, refusing, reports_in

if TYPE_CHECKING:
    from detr_conformance.findings import Finding, Report
    from detr_conformance.isolation import Worker


def replay(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="as --conformance-report writes it")],
    clause: Annotated[str, typer.Argument(help="only this clause", autocompletion=clause_ids)] = "",
    candidate: Annotated[str, typer.Option(help="judge this one instead of the report's own")] = "",
    json: Annotated[bool, typer.Option("--json", help="print the outcome for a machine")] = False,
) -> None:
    """Judge the failing cases of a report again, and say what still differs: detr-conformance replay out/report.json
    BOX-2

    Exit status 0 where all of them are right now, 1 where one is not. The whole verdict needs a whole run.
    """
    from detr_conformance.registry import near

    reports = reports_in(report)
    failing = [(r, f) for r in reports for f in r.findings if f.verdict in ("fail", "deviation")]
    if clause:
        known = sorted({f.clause for _, f in failing})
        failing = [(r, f) for r, f in failing if f.clause.lower() == clause.lower()]
        if not failing:
            refuse(f"{report} has no failure of {clause}{near(clause, known)}")
    found: list[dict[str, Any]] = []
    for one in reports:
        own = [f for r, f in failing if r is one]
        if own:
            found += _again(one, own, candidate)
    if json:
        print_json(found)
    for outcome in () if json else found:
        typer.echo(f"{outcome['clause']:<8} {outcome['outcome']:<12} {outcome['check'].replace('_', ' ')}")
        if outcome["outcome"] == "still wrong":
            typer.echo(f"{'':<8} {outcome['what']}: want {outcome['want']}, got {outcome['got']}")
    wrong = sum(o["outcome"] != "right now" for o in found)
    if not json:
        typer.echo(f"{len(found) - wrong} of {len(found)} right now" if found else f"{report} has no failure")
    if wrong:
        raise typer.Exit(1)


def _again(report: Report, findings: list[Finding], candidate: str) -> list[dict[str, Any]]:
    from detr_conformance.isolation import Worker
    from detr_conformance.runner import SMOKE, Settings

    spec = candidate or report.spec
    if not spec:
        refuse(f"the report is of a live object, {report.candidate}; name a candidate with --candidate=")
    with refusing():
        settings = Settings(report.profile, report.level, report.effort, report.device, report.seed)
        worker = Worker(spec, settings)
    with worker:
        if worker.identity.smoke.verdict != "pass":
            said = worker.identity.smoke.message.splitlines()[-1].strip()
            return [_outcome(f, "still wrong", "the call", "a dict of losses", said) for f in findings]
        return [_one(worker, f) for f in findings if f.check != SMOKE] or [
            _outcome(f, "right now", "", "", "") for f in findings
        ]


def _one(worker: Worker, finding: Finding) -> dict[str, Any]:
    """On the stored inputs; where there are none, by judging the check as a whole."""
    from detr_conformance.registry import checks

    check = next((c for c in checks(worker.identity.profile) if c.name == finding.check), None)
    if check is None:
        return _outcome(finding, "unknown", "this suite has no such check", "", "")
    call = finding.evidence.call if finding.evidence else None
    if finding.evidence and call is not None:
        try:
            found = worker.replayed(check, call, finding.evidence.case)
        except Exception:  # inputs that more than the call belongs to: judge the check as a whole
            pass
        else:
            if found is None:
                return _outcome(finding, "right now", "", "", "")
            return _outcome(finding, "still wrong", found.what, found.want, found.got)
    new = worker.finding(check)
    if new.verdict == "pass" or new.evidence is None:
        return _outcome(finding, "right now" if new.verdict == "pass" else new.verdict, new.message, "", "")
    return _outcome(finding, "still wrong", new.evidence.what, new.evidence.want, new.evidence.got)


def _outcome(finding: Finding, outcome: str, what: str, want: str, got: str) -> dict[str, Any]:
    return {
        "clause": finding.clause, "check": finding.check, "outcome": outcome, "what": what, "want": want, "got": got,
    }  # fmt: skip
