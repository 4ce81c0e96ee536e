"""Finding and Report: what was found out about one candidate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

VERDICTS: Final = ("pass", "fail", "error", "blocked", "declined", "ambiguous", "deviation")


@dataclass(frozen=True)
class Evidence:
    """The smallest input found on which a check fails, and the numbers on it.

    ``inputs`` is the call in words and numbers; ``want`` and ``got`` are printed as they are, ``allowed`` may be "".
    """

    case: str
    inputs: str
    what: str
    want: str
    got: str
    allowed: str = ""
    how: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The known faults that fit the numbers: id and sentence of each, and on how many inputs they agree."""

    faults: tuple[tuple[str, str], ...]
    agree: int
    tried: int


@dataclass(frozen=True)
class Finding:
    """A check's verdict with its evidence.

    pass · fail · error (a bug in the suite) · blocked (by a failed precondition) · declined (the candidate has no
    such part) · ambiguous (not decidable on these outputs) · deviation (accepted in the ledger).
    """

    clause: str
    sentence: str
    check: str
    level: str
    component: str
    verdict: str
    message: str = ""
    evidence: Evidence | None = None
    diagnosis: Diagnosis | None = None
    decided: int = 0


@dataclass(frozen=True)
class Report:
    """All findings of one candidate, and what was judged under which conditions."""

    candidate: str
    profile: str
    profile_from: str
    level: str
    effort: str
    seed: int
    options: dict[str, Any]
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def conformant(self) -> bool:
        """True where at least one clause was judged and none at the level was broken, left blocked or in error."""
        verdicts = {f.verdict for f in self.findings}
        return "pass" in verdicts and not verdicts & {"fail", "error", "blocked"}

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that break a clause."""
        return tuple(f for f in self.findings if f.verdict == "fail")

    def finding(self, clause_or_check: str) -> Finding:
        """The first finding of a clause or check, failing ones first. Raises KeyError where it was not judged."""
        found = [f for f in self.findings if clause_or_check in (f.clause, f.check)]
        if not found:
            raise KeyError(clause_or_check)
        return min(found, key=lambda f: f.verdict != "fail")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "conformant": self.conformant}
