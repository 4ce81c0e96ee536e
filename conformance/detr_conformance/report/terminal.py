"""The screen: who is judged, the verdict by component, what was not judged, and the verdict. Knows findings alone."""

from __future__ import annotations

import io
from typing import Final, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from detr_conformance.findings import Report
from detr_conformance.report import summary

GOOD, BAD, QUIET = "bold green", "bold red", "dim"
STYLES: Final = {"right": GOOD, "wrong": BAD, "not judged": QUIET, "broken": "red", "declined": QUIET}


def text(report: Report, width: int = 100, colour: bool = False) -> str:
    """The whole screen, in lines of at most ``width`` columns."""
    return rendered(screen(report), width, colour)


def rendered(what: RenderableType, width: int, colour: bool) -> str:
    """Anything of rich as text, without blanks at the ends of lines."""
    to = io.StringIO()
    system: Literal["standard"] | None = "standard" if colour else None
    console = Console(
        file=to, width=width, color_system=system, force_terminal=colour, highlight=False, no_color=not colour,
        legacy_windows=False,
    )  # fmt: skip
    for line in console.render_lines(what, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        line[-1:] = [Segment(part.text.rstrip(), part.style) for part in line[-1:]]
        console.print(Segments([*line, Segment.line()]), end="")
    return to.getvalue()


def screen(report: Report) -> RenderableType:
    """All of a report but its failures, which pytest prints."""
    return Group(header(report), "", components(report), "", last(report))


def header(report: Report) -> RenderableType:
    """Who is judged, and how."""
    v = report.versions
    where = "cpu" if report.device in ("cpu", "none") else f"cpu and {report.device}"
    suite = f"detr-conformance {v['detr-conformance']} · torch {v['torch']} {where} float32 · seed {report.seed}"
    options = "".join(f" · {k}={value!r}" for k, value in report.options.items())
    profile = Text(report.profile, "bold")
    profile.append(f" ({report.profile_from}) · level {report.level} · effort {report.effort}{options}", "not bold")
    lines = [("candidate", Text(report.candidate, "bold")), ("profile", profile)]
    return Group(Text(suite, QUIET), _fields([*lines, *(("note", Text(n, QUIET)) for n in report.notes)]))


def components(report: Report) -> RenderableType:
    """A row a component: its verdict, and the clauses that are broken, blocked or declined."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (16, 12, None, None):
        table.add_column(min_width=width, no_wrap=width is not None)
    for row in summary.components(report):
        checks = Text(f"{row.passed} of {row.checks} checks", QUIET)
        parts = [Text(f"{name} {', '.join(own)}", STYLES.get(name, "")) for name, own in row.parts]
        table.add_row(row.component, Text(row.word, STYLES.get(row.word, "")), checks, Text(" · ").join(parts))
    return Padding(table, (0, 0, 0, 2))


def last(report: Report) -> RenderableType:
    """The verdict, its counts, and what it does not cover."""
    verdict = Text(f"{report.profile}, {report.level}: ")
    verdict.append(summary.headline(report).upper(), GOOD if report.conformant else BAD)
    verdict.append(f"  {summary.counts(report)}")
    said = [("deviation", Text(f.deviation)) for f in report.deviations]
    said += [("ledger", Text(problem, BAD)) for problem in report.ledger]
    said += [("for information", Text(f"{clause}: {words}", QUIET)) for clause, words in summary.informed(report)]
    said += [("not judged", Text(f"{what}: {why}", QUIET)) for what, why in summary.untested(report)]
    return Group(verdict, *([_fields(said)] if said else []))


def _fields(lines: list[tuple[str, Text]]) -> RenderableType:
    """``name  text``, each text wrapped beside its name."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=QUIET, no_wrap=True)
    table.add_column()
    for name, said in lines:
        table.add_row(name, said)
    return table
