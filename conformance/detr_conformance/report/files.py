"""Reports as files, each whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Report, report_from

FORMAT: Final = "urn:detr-conformance:report:1"
SCHEMA: Final = Path(__file__).with_name("report.schema.json")
SUMMARY: Final = 900_000  # bytes: GitHub takes a step's summary up to a mebibyte, or not at all


def document(reports: Sequence[Report], written: str = "") -> dict[str, Any]:
    """``report.json`` as plain data. ``written``: when, an ISO time; now without."""
    when = written or datetime.now(timezone.utc).isoformat(timespec="seconds")
    complete = bool(reports) and all(r.complete for r in reports)
    return {"format": FORMAT, "written": when, "complete": complete, "reports": [r.to_dict() for r in reports]}


def read(data: Any) -> list[Report]:
    """The reports of a document. Raises ValueError that says where it departs from the schema."""
    import jsonschema

    schema = json.loads(SCHEMA.read_text("utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a report of detr-conformance: its format is not {FORMAT}")
    wrong = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(data))
    if wrong is not None:
        raise ValueError(f"not a whole report: {wrong.json_path}: {wrong.message[:200]}")
    return [report_from(r) for r in data["reports"]]


def load(path: Path) -> list[Report]:
    """The reports in a file. Raises ConformanceError in one line that names the file."""
    try:
        found = read(json.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConformanceError(f"{path}: {why}") from None
    except RecursionError:
        raise ConformanceError(f"{path}: not a report of detr-conformance: it is nested too deeply") from None
    except ValueError as error:  # JSON's own is one
        kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ConformanceError(f"{path}: {kind}{error}") from None
    if not found:
        raise ConformanceError(f"{path}: it holds no report")
    return found


def write(reports: Sequence[Report], directory: str) -> list[str]:
    """Write all files of a run into ``directory``; returns what to tell of it, a line each. Raises OSError."""
    from detr_conformance.report import badge, markdown, page

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    whole = document(reports)
    texts = {
        "report.json": json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown.text(reports),
        "report.html": page.html(reports, whole["written"]),
        "badge.json": json.dumps(badge.data(reports), ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        replace(folder / name, text)
    return [f"report  {folder / 'report.html'} · {folder / 'report.json'}"]


def append_summary(reports: Sequence[Report], path: str) -> list[str]:
    """Append the Markdown to a file, as GitHub's step summaries want it. Raises OSError."""
    from detr_conformance.report import markdown

    text = markdown.text(reports)
    if len(text.encode("utf-8")) <= SUMMARY:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
    return []


def replace(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
