"""Text of foreign origin, made fit to be kept: bounded, printable, and the same on every run.

A candidate names itself, its losses and its exceptions. None of that may fill a disk, steer a terminal, or tell one
run from the next by an address in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

from detr_conformance.findings import Call

LONGEST: Final = 20_000  # characters: some 250 lines, more than anyone reads of one failure
_ADDRESS: Final = re.compile(r"\b0x[0-9a-fA-F]{6,16}\b")
_TEMPORARY: Final = re.compile(r"\btmp[a-z0-9_]{8}\b")  # as Python's tempfile names them
# control characters but tab and newline, halves of surrogate pairs, and marks that turn the direction of reading
_UNFIT: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: str) -> str:
    """Without addresses and what no terminal and no XML bears, and cut where it is too long."""
    more = len(value) - LONGEST
    kept = value[:LONGEST] if more > 0 else value
    found = _UNFIT.sub("\ufffd", _ADDRESS.sub("0x…", kept))
    return f"{found} … ({more} characters more)" if more > 0 else found


def exception(error: BaseException) -> str:
    """What an exception says of itself, bounded, also where saying it raises."""
    try:
        said = str(error)
    except Exception:
        return "(its text cannot be read)"
    return text(_TEMPORARY.sub("tmp…", said[: LONGEST + 1]))


def cleaned(value: Any) -> Any:
    """The same with every text in it clean. A call is kept as it is: its arrays are ours."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Call):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: cleaned(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (tuple, list)):
        return type(value)(map(cleaned, value))
    if isinstance(value, Mapping):
        return {cleaned(k): cleaned(v) for k, v in value.items()}
    return value
