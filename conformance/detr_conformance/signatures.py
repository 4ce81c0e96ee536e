"""By what a failure is known again, where no known fault explains it: the first wrong numbers that the search meets.

They come from the cases as drawn, the stored ones first, so that neither shrinking nor a longer search changes them;
they are compared within a thousandth, so that another platform's rounding does not either.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Final

from detr_conformance.registry import Comparison
from detr_conformance.tallies import Tally, judged

FIRST: Final = 3  # failing inputs
DIGITS: Final = 4  # significant ones
CLOSE: Final = 1e-3  # as much as the digits tell
CLEARLY: Final = 2.0  # times the allowed error: what is hardly wrong may be right on another platform


def values(tally: Tally) -> str:
    """``loss_bbox 0.875, 1.25, 0.5``: what was got on the first inputs that fail clearly; a hash stands for words."""
    found = [next((c for c in judged(tally.check, s) if not c.ok), None) for s in tally.seen]
    failing = [c for c in found if c is not None]
    clearly = [c for c in failing if c.beyond >= CLEARLY] or failing
    if not clearly and tally.failing is not None:
        clearly = [tally.failing[1]]
    first = clearly[:FIRST]
    return f"{_kind(first[0].what)} {', '.join(map(_short, first))}" if first else ""


def alike(one: str, other: str) -> bool:
    """True where two such texts tell the same failure."""
    numbers = [re.split(r"[ ,]+", text) for text in (one, other)]
    return len(numbers[0]) == len(numbers[1]) and all(_same(a, b) for a, b in zip(*numbers, strict=True))


def _same(one: str, other: str) -> bool:
    try:
        a, b = float(one), float(other)
    except ValueError:
        return one == other
    return one == other or math.isclose(a, b, rel_tol=CLOSE)


def _short(comparison: Comparison) -> str:
    if comparison.numbers is not None:
        return f"{comparison.numbers[1]:.{DIGITS}g}"
    # addresses and long numbers differ from run to run
    words = re.sub(r"0x[0-9a-f]+|\d+\.\d+(e[+-]?\d+)?", "…", f"{comparison.what}: {comparison.got}")
    return "#" + hashlib.sha256(words.encode()).hexdigest()[:8]


def _kind(what: str) -> str:
    """The quantity in one word."""
    return re.sub(r"[^\w.\[\]']+", "-", what).strip("-")[:40]
