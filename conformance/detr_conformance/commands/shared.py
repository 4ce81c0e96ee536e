"""What commands share: errors in one sentence, reports read or made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from detr_conformance.findings import Report

WRONG_USE = 4


def refuse(message: str) -> NoReturn:
    """End with exit status 4 and one clear error."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(WRONG_USE)


@contextmanager
def refusing() -> Iterator[None]:
    """What the suite refuses ends the command with exit status 4."""
    from detr_conformance.errors import ConformanceError

    try:
        yield
    except ConformanceError as error:
        refuse(str(error))


def one_of(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes an option by its values."""
    return lambda incomplete: [w for w in words if w.startswith(incomplete)]


def clause_ids(incomplete: str) -> list[str]:
    """Completes a clause."""
    from detr_conformance import registry

    return [c.id for c in registry.clauses() if c.id.startswith(incomplete.upper())]


def reports_in(path: Path) -> list[Report]:
    """The reports of a ``report.json``; ends the command where it is none."""
    from detr_conformance.report import files

    with refusing():
        return files.load(path)


def written(path: Path, text: str) -> None:
    """Write a file whole or not at all; ends the command where that cannot be."""
    from detr_conformance.report import files

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text)
    except OSError as error:
        refuse(f"{path}: {error.strerror}")


def judged(candidates: list[str], profile: str, level: str, effort: str) -> list[Report]:
    """The reports of these candidates; ends the command where one cannot be used."""
    from detr_conformance.runner import judge

    with refusing():
        return [judge(c, profile=profile or None, level=level, effort=effort) for c in candidates]


def print_json(data: Any) -> None:
    """Data on stdout, for a machine."""
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))
