"""Wrong uses of the suite: each one sentence that names the argument and what would be right."""

from __future__ import annotations


class ConformanceError(ValueError):
    """An argument of the suite cannot be used as given."""


class CandidateError(ConformanceError):
    """The candidate cannot be used as given."""
