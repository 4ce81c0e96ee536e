"""``detr-conformance ledger``: accepted deviations, proposed, checked, and removed when no longer needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detr_conformance.commands.shared import judged, one_of, print_json, refuse, refusing, reports_in, written
from detr_conformance.findings import EFFORTS, LEVELS
from detr_reference.options import PROFILES

if TYPE_CHECKING:
    from detr_conformance.findings import Report
    from detr_conformance.ledger import Ledger

app = typer.Typer(
    no_args_is_help=True,
    help="Accepted deviations: a TOML file in your repository. An entry accepts one failure of one clause, with a "
    "reason, an issue and an expiry; whatever else fails there still fails. Judge with it: pytest "
    "--candidate=mypkg.criterion --conformance-ledger=deviations.toml",
)

File = Annotated[Path, typer.Argument(metavar="LEDGER", help="the file, as deviations.toml")]
FromReport = Annotated[Path | None, typer.Option("--report", help="a report.json of the run that counts")]
Candidates = Annotated[list[str] | None, typer.Option("--candidate", help="or a candidate to judge now")]
Profile = Annotated[str, typer.Option(help="of the candidate", autocompletion=one_of(PROFILES))]
Level = Annotated[str, typer.Option(help="must or should", autocompletion=one_of(LEVELS))]
Effort = Annotated[str, typer.Option(help="quick, standard or deep", autocompletion=one_of(EFFORTS))]
AsJson = Annotated[bool, typer.Option("--json", help="print what was found for a machine")]


@app.command()
def update(
    file: File,
    report: FromReport = None,
    candidate: Candidates = None,
    profile: Profile = "",
    level: Level = "must",
    effort: Effort = "standard",
    json: AsJson = False,
) -> None:
    """Propose an entry for every failure that has none: detr-conformance ledger update deviations.toml --report
    out/report.json

    The reasons are left empty, and an empty reason is refused until somebody writes one.
    """
    from detr_conformance import ledger

    there = _read(file) if file.is_file() else ledger.Ledger(str(file), ())
    found = _reports(report, candidate, profile, level, effort)
    with refusing():
        new = ledger.proposals(there, found)
    if new:
        text = file.read_text("utf-8") if file.is_file() else ledger.BEGINNING
        written(file, "\n".join([text.rstrip("\n") + "\n", *new]))
    if json:
        print_json({"file": str(file), "proposed": new})
        return
    proposed = f"{len(new)} entr{'y' if len(new) == 1 else 'ies'} proposed"
    typer.echo(f"{file}: {proposed}; write the reasons: until then the file is refused" if new else f"{file}: complete")


@app.command()
def check(
    file: File,
    report: FromReport = None,
    candidate: Candidates = None,
    profile: Profile = "",
    level: Level = "must",
    effort: Effort = "standard",
    json: AsJson = False,
) -> None:
    """Read the ledger, and say what is wrong with it, file and line: detr-conformance ledger check deviations.toml

    With --report or --candidate also which entries are stale. Exit status 1 where something is wrong.
    """
    from detr_conformance import ledger
    from detr_conformance.errors import ConformanceError

    found = _reports(report, candidate, profile, level, effort) if report or candidate else []
    try:
        there = ledger.read(file)
        today = ledger.day()
        wrong = [f"{e.where}: {why}" for e, why in there.untrue(found)]
        wrong += [
            f"{e.where}: expired: {e.clause} was accepted until {e.expires}"
            for e in there.entries
            if e.expired(today) and not any(w.startswith(f"{e.where}:") for w in wrong)
        ]
        entries = len(there.entries)
    except ConformanceError as error:
        wrong, entries = str(error).splitlines(), 0
    if json:
        print_json({"file": str(file), "entries": entries, "wrong": wrong})
    else:
        for line in wrong:
            typer.echo(line)
        if not wrong:
            typer.echo(f"{file}: {entries} deviation{'s' * (entries != 1)}, all in order")
    if wrong:
        raise typer.Exit(1)


@app.command()
def prune(
    file: File,
    report: FromReport = None,
    candidate: Candidates = None,
    profile: Profile = "",
    level: Level = "must",
    effort: Effort = "standard",
    json: AsJson = False,
) -> None:
    """Remove the entries whose failure no longer happens: detr-conformance ledger prune deviations.toml --candidate
    mypkg.criterion

    Everything else in the file stays as it is; comments right above a removed entry go with it.
    """
    from detr_conformance import ledger

    there = _read(file)
    found = _reports(report, candidate, profile, level, effort)
    with refusing():
        gone = [e for e, why in there.untrue(found) if why.startswith("stale")]
    if gone:
        written(file, ledger.without(file.read_text("utf-8"), gone))
    if json:
        print_json({"file": str(file), "removed": [e.where for e in gone]})
        return
    for e in gone:
        typer.echo(f"removed {e.where}: {e.clause} {e.signature or e.values}")
    if not gone:
        typer.echo(f"{file}: nothing is stale")


def _read(file: Path) -> Ledger:
    from detr_conformance import ledger

    with refusing():
        return ledger.read(file)


def _reports(report: Path | None, candidate: list[str] | None, profile: str, level: str, effort: str) -> list[Report]:
    if bool(report) == bool(candidate):
        refuse("name either --report=out/report.json or --candidate=mypkg.criterion")
    return reports_in(report) if report else judged(candidate or [], profile, level, effort)
