"""The commands ``detr-conformance fixtures …``, which are also ``python -m detr_fixtures …``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detr_conformance.commands.shared import refuse, written

if TYPE_CHECKING:
    from detr_conformance.golden_write import Tell

app = typer.Typer(no_args_is_help=True, help="Golden cases: stored inputs with the values of the contract.")

Folder = Annotated[Path | None, typer.Option("--folder", help="a folder of golden cases; without: the package's own")]
MOST = 60  # lines of a diff


@app.command("list")
def list_cases(
    profile: Annotated[str, typer.Option(help="only of this profile")] = "",
    set_: Annotated[str, typer.Option("--set", help="only of this set: hand, edges, …")] = "",
    folder: Folder = None,
) -> None:
    """List the golden cases: detr-conformance fixtures list --profile detr --set hand"""
    from detr_conformance.golden import SETS
    from detr_fixtures import golden, vectors

    with _errors():
        found = [one for one in golden.every(_folder(folder), profile) if set_ in ("", one.set)]
    for name, sentence in SETS.items():
        own = [one for one in found if one.set == name]
        if own:
            typer.echo(f"{name}: {sentence}")
        for one in own:
            typer.echo(f"  {one.name:<56} {one.title}")
    if not (profile or set_ or folder):
        sources = sorted({vectors.load(name).source for name in vectors.names()})
        typer.echo(f"published: {len(vectors.names())} vectors recorded from {', '.join(sources)}")
    typer.echo(f"{len(found)} golden cases")


@app.command()
def show(
    case: Annotated[str, typer.Argument(help="a case, as detr/hand-seed-404")],
    svg: Annotated[Path | None, typer.Option("--svg", help="draw its boxes and matching into this file")] = None,
    layer: Annotated[str, typer.Option(help="the layer that is drawn")] = "final",
    folder: Folder = None,
) -> None:
    """Print a golden case, and draw it: detr-conformance fixtures show detr/hand-seed-404 --svg case.svg"""
    from detr_conformance.registry import near
    from detr_fixtures import golden, picture
    from detr_reference.options import PROFILES

    with _errors():
        names = golden.names(_folder(folder))
        if case not in names:
            refuse(f"there is no golden case {case!r}{near(case, names)}")
        one = golden.load(case, _folder(folder))
        usual = PROFILES[one.profile]
        changed = {k: v for k, v in one.record["options"].items() if v != _listed(getattr(usual, k))}
        for line in picture.words(one, changed):
            typer.echo(line)
        if svg is not None:
            written(svg, picture.svg(one, layer))
            typer.echo(f"wrote {svg}")


@app.command()
def judge(
    candidate: Annotated[str, typer.Argument(help="as for pytest --candidate")],
    only: Annotated[list[str] | None, typer.Option("--only", help="a set or a case; may be given again")] = None,
    profile: Annotated[str, typer.Option(help="of the candidate")] = "",
    limit: Annotated[float, typer.Option(help="seconds that a call may take")] = 20.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all outcomes to this file")] = None,
    folder: Folder = None,
) -> None:
    """Judge a candidate on the golden cases, one call each: detr-conformance fixtures judge mypkg.criterion

    Exit status 0: right on all cases that it can be given; 1: not; 5: nothing was judged.
    """
    import json
    from dataclasses import asdict

    from detr_conformance import golden_judge

    with _errors():
        run = golden_judge.judge(candidate, profile or None, _folder(folder), only or (), limit)
    for one in run.outcomes:
        if one.verdict == golden_judge.FAIL:
            typer.echo(f"FAIL  {one.name}")
            for problem in one.problems[:4]:
                typer.echo(f"      {problem}")
    for name, own in golden_judge.by_set(run.outcomes).items():
        told = ", ".join(f"{n} {v}" for v in ("pass", "fail", "unsuited") if (n := sum(o.verdict == v for o in own)))
        typer.echo(f"  {name:<10} {told}")
    if run.ended:
        typer.echo(f"nothing was judged after this: {run.ended}")
    verdict = "all right" if run.conformant else "NOT RIGHT" if run.count("fail") else "nothing was judged"
    counts = ", ".join(f"{run.count(v)} {v}" for v in ("pass", "fail", "unsuited"))
    typer.echo(f"{run.candidate}, {run.profile}: {verdict} · {counts} · {run.seconds:.1f} s")
    if json_path is not None:
        written(json_path, json.dumps({**asdict(run), "conformant": run.conformant}, indent=1) + "\n")
    if not run.conformant:
        raise typer.Exit(1 if run.count("fail") else 5)


@app.command()
def regenerate(
    check: Annotated[bool, typer.Option("--check", help="only compare; exit status 1 for a change")] = False,
    why: Annotated[str, typer.Option(help="why the set changes, for its changelog")] = "",
    kills: Annotated[bool, typer.Option("--kills", help="find out anew which known faults each case kills")] = False,
    processes: Annotated[int, typer.Option(help="how many at a time")] = 2,
    folder: Folder = None,
) -> None:
    """Make the golden cases anew, or compare them by two ways: detr-conformance fixtures regenerate --check"""
    from detr_conformance import golden_write

    there = _folder(folder)
    if check:
        _checked(there, processes)
        return
    with _errors(), _progress() as tell:
        found = golden_write.plan(there, kills, processes, tell)
    if found.empty:
        typer.echo(f"{there}: nothing changes")
        return
    _shown(list(found.lines()))
    counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed"
    if not why.strip():
        typer.echo(f"{counts}; nothing is written without a reason: --why 'what changed, and why it is right'")
        raise typer.Exit(1)
    with _errors():
        typer.echo(f"{counts}; wrote {there}, revision {golden_write.write(there, found, why)}")


@app.command()
def add(
    report: Annotated[Path, typer.Argument(help="a report.json")],
    clause: Annotated[str, typer.Argument(help="the clause, or the check, whose failing input is kept")],
    name: Annotated[str, typer.Option(help="of the case; without: made of the clause and the input's hash")] = "",
    why: Annotated[str, typer.Option(help="for the changelog")] = "",
    folder: Folder = None,
) -> None:
    """Keep a failing input as a golden case: detr-conformance fixtures add out/report.json BOX-2"""
    from detr_conformance import golden_found, golden_write

    with _errors():
        entry = golden_found.entry(report, clause, name)
        reason = why or f"Found by searching: {entry.provenance['found']['candidate']} fails {clause} on it."
        revision = golden_write.add(_folder(folder), entry, reason)
    typer.echo(f"added {entry.name}: {entry.case.label}; revision {revision}")


def _checked(folder: Path, processes: int) -> None:
    from detr_conformance import golden_check, golden_write
    from detr_fixtures import golden

    wrong: list[str] = []
    with _errors(), _progress() as tell:
        total = len(golden_check.jobs(folder)) + 2
        for i, lines in enumerate(golden_check.problems(folder, processes), 1):
            wrong += lines
            tell("checking", i, total)
        if not wrong:
            revision, told = golden.manifest(folder)["revision"], golden_write.revisions(folder)
            wrong += [] if revision in told else [f"{golden.CHANGELOG} does not tell of revision {revision}"]
    _shown(wrong)
    if wrong:
        typer.echo(f"{folder}: {len(wrong)} problems")
        raise typer.Exit(1)
    typer.echo(f"{len(golden.names(folder))} golden cases are as two ways compute them")


def _shown(lines: list[str]) -> None:
    for line in lines[:MOST]:
        typer.echo(line)
    if len(lines) > MOST:
        typer.echo(f"… and {len(lines) - MOST} lines more")


def _folder(folder: Path | None) -> Path:
    from detr_fixtures import golden

    return folder or golden.GOLDEN


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _errors() -> Iterator[None]:
    """What cannot be read or used is wrong use, told in a sentence."""
    from detr_conformance.errors import ConformanceError

    try:
        yield
    except (ConformanceError, ValueError, OSError) as error:
        refuse(str(error))


@contextmanager
def _progress() -> Iterator[Tell]:
    """A progress bar on stderr, gone when done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        yield tell
