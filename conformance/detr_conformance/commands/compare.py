"""The commands ``diff``, ``matrix`` and ``merge``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detr_conformance.commands.shared import print_json, refuse, refusing, reports_in, written

if TYPE_CHECKING:
    from detr_conformance.comparing import Difference, Matrix

STYLES = {"broke": "bold red", "mended": "bold green", "changed": "dim", "fail": "red", "error": "red", "pass": "green"}


def diff(
    old: Annotated[Path, typer.Argument(help="the report.json before")],
    new: Annotated[Path, typer.Argument(help="the report.json after")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Print what broke, what was mended and what changed between two reports; exit status 1 where something broke.

    Example: detr-conformance diff main/report.json branch/report.json
    """
    from detr_conformance import comparing

    with refusing():
        found = comparing.differences(reports_in(old), reports_in(new))
    if as_json:
        print_json([{**asdict(d), "broke": d.broke} for d in found])
    else:
        for one in found:
            _show(_changes(one))
    if any(d.broke for d in found):
        raise typer.Exit(1)


def matrix(
    reports: Annotated[list[Path], typer.Argument(help="report.json of each implementation")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print it as a Markdown table")] = False,
    html: Annotated[Path | None, typer.Option(help="write it as a page to this file")] = None,
) -> None:
    """Print clauses × implementations: each cell the verdict, and which known fault a failure looks like.

    Example: detr-conformance matrix detr/report.json dino/report.json --html matrix.html
    """
    from detr_conformance import comparing

    with refusing():
        found = comparing.matrix([(str(path), r) for path in reports for r in reports_in(path)])
    if html is not None:
        from detr_conformance.report import page

        written(html, page.matrix(found))
        typer.echo(f"wrote {html}", err=as_json or markdown)
    if as_json:
        print_json(found.to_dict())
    elif markdown:
        typer.echo("\n".join(_table(found)))
    elif html is None:
        _show(_grid(found))


def merge(
    reports: Annotated[list[Path], typer.Argument(help="report.json of each shard")],
    to: Annotated[Path, typer.Option(help="the folder that gets the merged reports")] = Path("merged"),
) -> None:
    """Write the reports of one run's shards as one; exit status 1 where a candidate is not conformant.

    Example: detr-conformance merge shard-*/report.json --to merged
    """
    from detr_conformance import merging
    from detr_conformance.report import files, terminal

    with refusing():
        found = merging.merged([r for path in reports for r in reports_in(path)])
    try:
        lines = files.write(found, str(to))
    except OSError as error:
        refuse(f"{to}: {error.strerror}")
    for report in found:
        typer.echo(terminal.text(report))
    for line in lines:
        typer.echo(line)
    if not all(r.conformant for r in found):
        raise typer.Exit(1)


def _show(what: Any) -> None:
    from detr_conformance.report import terminal

    width, terminal_there = shutil.get_terminal_size((100, 24)).columns, sys.stdout.isatty()
    typer.echo(terminal.rendered(what, width, terminal_there), nl=False)


def _changes(found: Difference) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for kind in ("broke", "mended", "changed"):
        for c in (c for c in found.changes if c.kind == kind):
            what = Text(f"{c.check.replace('_', ' ')}\n")
            what.append(f"{c.before} → {c.after}", "dim")
            table.add_row(Text(kind, STYLES[kind]), Text(c.clause), what)
    verdict = found.after if found.before == found.after else f"{found.before} → {found.after}"
    numbers = {kind: sum(c.kind == kind for c in found.changes) for kind in ("broke", "mended", "changed")}
    counts = [f"{n} {kind}" for kind, n in numbers.items() if n]
    head = Text(found.candidate, "bold")
    head.append(f", {found.profile}: {verdict} · {', '.join(counts) or 'no difference'}", "not bold")
    remarks = [Text(f"note  {remark}", "dim") for remark in found.remarks]
    return Group(head, *remarks, table) if found.changes else Group(head, *remarks)


def _grid(found: Matrix) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("clause", no_wrap=True)
    for column in found.columns:
        table.add_column(Text(f"{column['name']}\n{column['profile']}: {column['verdict']}"), overflow="fold")
    for id, row in found.rows.items():
        cells = [Text(_in_words(c), STYLES.get(c.verdict, "dim")) for c in row]
        table.add_row(id, *cells)
    return Group(table, *[Text(f"note  {remark}", "dim") for remark in found.remarks])


def _in_words(cell: Any) -> str:
    verdict = "–" if cell.verdict == "absent" else cell.verdict
    return f"{verdict}: {cell.looks}" if cell.looks else str(verdict)


def _table(found: Matrix) -> list[str]:
    from detr_conformance.report.markdown import code, plain

    heads = [f"{code(c['name'])}<br>{c['profile']}: {c['verdict']}" for c in found.columns]
    lines = [f"| clause | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {plain(id)} | {' | '.join(plain(_in_words(c)) for c in row)} |" for id, row in found.rows.items()]
    return lines + [line for remark in found.remarks for line in ("", plain(remark))]
