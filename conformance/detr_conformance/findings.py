"""Finding and Report: what was found out about one candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

COMPONENTS: Final = (
    "matching",
    "matching costs",
    "class loss",
    "tokens",
    "L1",
    "GIoU",
    "auxiliary layers",
    "encoder",
    "weights and keys",
    "masks",
    "denoising",
    "gradients",
    "precision",
    "side effects",
    "refusals",
    "devices",
    "ranks",
    "learning",
)
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
    """The known faults that fit the numbers: id and sentence of each, and on how many inputs they agree.

    ``advice``: where the first of them was seen, and the usual fix · ``together``: True where it takes all of them in
    one criterion; else each by itself fits, and nothing tells them apart.
    """

    faults: tuple[tuple[str, str], ...]
    agree: int
    tried: int
    advice: str = ""
    together: bool = False


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


def finding_from(data: Mapping[str, Any]) -> Finding:
    """The finding that ``dataclasses.asdict`` made this of."""
    evidence, diagnosis = data["evidence"], data["diagnosis"]
    return Finding(
        **{
            **data,
            "evidence": evidence and Evidence(**evidence),
            "diagnosis": diagnosis
            and Diagnosis(**{**diagnosis, "faults": tuple((i, s) for i, s in diagnosis["faults"])}),
        }
    )


@dataclass(frozen=True)
class Report:
    """All findings of one candidate, and what was judged under which conditions.

    ``device``: the accelerator that was compared with the CPU; ``cpu`` or ``none`` where there was none.
    """

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
    device: str = "cpu"

    @property
    def conformant(self) -> bool:
        """True where at least one clause was judged and none at the level was broken, left blocked or in error. What
        is for information decides nothing."""
        verdicts = {f.verdict for f in self.findings if f.level != "information"}
        return "pass" in verdicts and not verdicts & {"fail", "error", "blocked"}

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that break a clause of the level."""
        return tuple(f for f in self.findings if f.verdict == "fail" and f.level != "information")

    def finding(self, clause_or_check: str) -> Finding:
        """The first finding of a clause or check, failing ones first. Raises KeyError where it was not judged."""
        found = [f for f in self.findings if clause_or_check in (f.clause, f.check)]
        if not found:
            raise KeyError(clause_or_check)
        return min(found, key=lambda f: f.verdict != "fail")

    @property
    def judged(self) -> bool:
        """True where at least one check came to a verdict."""
        return any(f.verdict in ("pass", "fail", "error") for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "conformant": self.conformant}
