"""Tells whoever wrote a DETR-style training criterion whether it is right, and if not, what exactly is wrong.

    report = detr_conformance.judge("mypkg.criterion")
    test_contract = detr_conformance.conformance_tests("mypkg.criterion")

Importing this package loads neither torch nor Hypothesis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_conformance.candidate import Candidate
    from detr_conformance.errors import CandidateError, ConformanceError
    from detr_conformance.findings import Finding, Report
    from detr_conformance.runner import judge
    from detr_conformance.testing import conformance_tests

_HOME = {
    "Candidate": "candidate",
    "CandidateError": "errors",
    "ConformanceError": "errors",
    "Finding": "findings",
    "Report": "findings",
    "conformance_tests": "testing",
    "judge": "runner",
}

__all__ = [
    "Candidate",
    "CandidateError",
    "ConformanceError",
    "Finding",
    "Report",
    "conformance_tests",
    "judge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
