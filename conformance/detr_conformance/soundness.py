"""Whether the textbook still computes what it did before the candidate came.

Both live in one process. A candidate that replaces a function of torch, switches gradients off or changes a global
setting could make wrong look right; then nothing that it returns can be judged.
"""

from __future__ import annotations

import math
from typing import Final

from detr_conformance.cases import Case, Recipe, build
from detr_conformance.seen import expect
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

BROKEN: Final = "the candidate has changed torch for its whole process: the textbook does not compute there as before"
CLOSE: Final = 1e-9  # relative, in float64: far above a sum in another order, far below any mistake


class Soundness:
    """The textbook's numbers on two small cases, of softmax and of token logits, as they are when this is made."""

    def __init__(self) -> None:
        names = ("detr", "grounding-dino")
        self._cases = [build(Recipe(7, (2, 1), 4, classes=3, tokens=11), PROFILES[n], frozenset()) for n in names]
        self._before = self._numbers()

    @property
    def holds(self) -> bool:
        """True while the numbers are the same."""
        try:
            now = self._numbers()
        except Exception:
            return False
        return len(now) == len(self._before) and all(
            math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE) for a, b in zip(now, self._before, strict=True)
        )

    def _numbers(self) -> list[float]:
        return [value for case in self._cases for value in _numbers(case)]


def _numbers(case: Case) -> list[float]:
    found = expect(textbook.under(case.options), case)
    grads = [v for pair in found.grads.values() for g in pair for v in g.flatten().tolist()]
    return [*found.losses.values(), *grads]
