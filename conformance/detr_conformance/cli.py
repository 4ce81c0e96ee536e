"""The console command ``detr-conformance``."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from detr_conformance.commands import candidate as candidate_commands
from detr_conformance.commands import compare as compare_commands
from detr_conformance.commands import fixtures as fixtures_commands
from detr_conformance.commands import ledger as ledger_commands
from detr_conformance.commands import replay as replay_command
from detr_conformance.commands.shared import WRONG_USE, refuse, written

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="Tells whether a DETR-style training criterion is right. To judge one: pytest --candidate=mypkg.criterion",
)


app.add_typer(fixtures_commands.app, name="fixtures")
app.add_typer(ledger_commands.app, name="ledger")
app.command()(candidate_commands.init)
app.command()(candidate_commands.smoke)
app.command()(replay_command.replay)
app.command()(compare_commands.diff)
app.command()(compare_commands.matrix)
app.command()(compare_commands.merge)


@app.callback()
def commands() -> None:
    """One command a word; each has --help."""


def main(name: str | None = None) -> None:
    """Run a command; wrong use ends with exit status 4, which typer would end with 2."""
    try:
        app(prog_name=name)
    except SystemExit as end:
        raise SystemExit(WRONG_USE if end.code == 2 else end.code) from None


@app.command()
def explain(
    clause: Annotated[str, typer.Argument(help="a clause, as BOX-2")],
    profile: Annotated[str, typer.Option(help="the profile of the worked number")] = "",
) -> None:
    """Print a clause with its sources, checks, known faults, and a worked number: detr-conformance explain BOX-2"""
    from rich.console import Console

    from detr_conformance import registry

    try:
        own = registry.checks(only=[clause])
        if not any(c.clause.id.lower() == clause.lower() for c in own):
            raise ValueError(f"{clause!r} is not one clause; try {own[0].clause.id}")
    except ValueError as error:
        refuse(str(error))
    found = own[0].clause
    if profile and profile not in found.profiles:
        refuse(f"--profile={profile}: {found.id} binds {', '.join(sorted(found.profiles))}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{found.id}[/]  {found.sentence}", markup=True)
    console.print(f"{found.level} · {', '.join(sorted(found.profiles))}")
    for source in found.sources:
        console.print(f"source    {source}", markup=False)
    for check in own:
        console.print(f"check     {check.name.replace('_', ' ')} (on {check.on.title})", markup=False)
        for fault in registry.faults():
            if fault.check is check:
                console.print(f"  fault   {fault.id}: {fault.sentence} Seen in: {fault.seen_in}.", markup=False)
                if fault.fix:
                    console.print(f"          usual fix: {fault.fix}", markup=False)
    worked = _worked_number(own[0], profile or sorted(own[0].profiles)[0])
    if worked:
        console.print(worked, markup=False)


def _worked_number(check, profile: str) -> str:  # type: ignore[no-untyped-def]
    """What the first known fault of a check gets on the smallest input, beside what is right."""
    from detr_conformance import registry
    from detr_conformance.adapters.textbook import candidate_of
    from detr_conformance.runner import Judge, Settings
    from detr_reference.textbook import textbook

    fault = next((f for f in registry.faults(profile) if f.check is check), None)
    if fault is None:
        return ""
    judge = Judge(
        candidate_of(fault.apply(textbook), profile, fault.id),
        Settings(effort="quick", level="should", device="simulated"),
    )
    finding = judge.finding(check.name)
    if finding.evidence is None:
        return ""
    e = finding.evidence
    lines = [f"example   {line}" if i == 0 else f"          {line}" for i, line in enumerate(e.inputs.splitlines())]
    lines += [f"          {e.what}", f"right     {e.want}   {e.how}".rstrip(), f"wrong     {e.got}, with {fault.id}"]
    return "\n".join(lines)


@app.command()
def spec(
    check: Annotated[
        bool, typer.Option("--check", help="only compare; exit status 1 where the page is not up to date")
    ] = False,
    path: Annotated[Path, typer.Option(help="the page")] = Path("docs/SPEC.md"),
) -> None:
    """Write the specification page from the clauses, and the schema of report.json: detr-conformance spec [--check]"""
    import json

    from detr_conformance import spec as specification
    from detr_conformance.report import files, schema

    pages = {path: specification.page(), files.SCHEMA: json.dumps(schema.schema(), indent=1, ensure_ascii=False) + "\n"}
    if check:
        current = [_up_to_date(where, text, "detr-conformance spec") for where, text in pages.items()]
        if not all(current):
            raise typer.Exit(1)
        return
    for where, text in pages.items():
        if not where.is_file() or where.read_text("utf-8") != text:
            written(where, text)
            typer.echo(f"wrote {where}")


def _up_to_date(path: Path, page: str, command: str) -> bool:
    """Whether a page is as it should be; says so, or what differs."""
    there = path.read_text("utf-8") if path.is_file() else ""
    if there == page:
        typer.echo(f"{path} is up to date")
        return True
    differences = difflib.unified_diff(there.splitlines(), page.splitlines(), str(path), "as it should be", n=1)
    for line in list(differences)[:40]:
        typer.echo(line)
    typer.echo(f"{path} is not up to date: run {command}")
    return False


@app.command()
def corpus(
    names: Annotated[list[str] | None, typer.Argument(help="experiments, as duels; all without")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="judge the known faults on the stored cases; exit status 1 for a wrong claim"),
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="find cases for the faults that none claims to kill")] = False,
    search: Annotated[bool, typer.Option("--search", help="choose all cases anew; many minutes")] = False,
    write: Annotated[bool, typer.Option("--write", help="write the page")] = False,
    seed: Annotated[int, typer.Option(help="of the search")] = 0,
    file: Annotated[Path | None, typer.Option(help="the stored cases; without: the package's own")] = None,
    path: Annotated[Path, typer.Option(help="the page")] = Path("docs/CORPUS.md"),
) -> None:
    """Print which stored cases kill which faults, and what random cases miss: detr-conformance corpus [--check]"""
    from detr_conformance import corpus as stored_cases
    from detr_conformance import corpus_page, corpus_search, stored
    from detr_conformance.errors import ConformanceError

    chosen, there = names or [], file or stored.own_file()
    try:
        found = stored.read(there.read_text("utf-8"))
        stored_cases.experiments_named(chosen)
    except (OSError, ConformanceError) as error:
        refuse(str(error))
    if add or search:
        if search:
            found = corpus_search.search(found, chosen, seed, tell=typer.echo)
        else:
            found = corpus_search.add(found, chosen, tell=typer.echo)
        written(there, stored.written(found))
        typer.echo(f"wrote {there}")
    if add or search or write:
        written(path, corpus_page.page(found))
        typer.echo(f"wrote {path}")
    if check:
        wrong = stored_cases.problems(found, chosen)
        for line in wrong:
            typer.echo(line)
        if not _up_to_date(path, corpus_page.page(found), "detr-conformance corpus --write") or wrong:
            raise typer.Exit(1)
        typer.echo(
            f"every stored case kills what it claims, and together they kill all {corpus_page.told(found, chosen)}"
        )
    if not (add or search or write or check):
        typer.echo(corpus_page.table(found, chosen))


@app.command()
def prove(
    deep: Annotated[bool, typer.Option("--deep", help="also what only effort deep judges: training, minutes")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the whole kill matrix to this file")] = None,
    processes: Annotated[int, typer.Option(help="how many at a time; 0: one a processor")] = 0,
) -> None:
    """Show that every check can fail, on a fault that names it: detr-conformance prove --json kills.json"""
    import json

    from rich.progress import Progress

    from detr_conformance import prove as proving

    with Progress(transient=True) as progress:
        bar = progress.add_task("proving", total=len(proving.tasks(deep)[0]))
        for outcome in proving.prove(deep, processes or None):  # noqa: B007  the last one is the proof
            progress.advance(bar)
    assert isinstance(outcome, proving.Proof)
    for line in proving.summary(outcome):
        typer.echo(line)
    if json_path is not None:
        written(json_path, json.dumps(outcome.to_dict(), indent=1) + "\n")
        typer.echo(f"wrote {json_path}")
    if outcome.problems:
        raise typer.Exit(1)
