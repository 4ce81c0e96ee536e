"""A report as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from detr_conformance.findings import Report

FORMAT = 1


def write_json(reports: Sequence[Report], directory: str) -> Path:
    """Write ``report.json`` with all reports of a run into ``directory``, whole or not at all.

    Raises OSError where the directory cannot be written to.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    text = json.dumps({"format": FORMAT, "reports": [r.to_dict() for r in reports]}, indent=1, ensure_ascii=False)
    unfinished = path.with_suffix(".json.unfinished")
    unfinished.write_text(text + "\n", "utf-8")
    os.replace(unfinished, path)
    return path
