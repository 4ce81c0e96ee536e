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
class Call:
    """A call of the candidate that anyone can make again.

    ``options``: all values of ``detr_reference.options.Options`` that the criterion is built under · ``npz``: its
    ``outputs`` and ``targets`` as a ``.npz`` file in base64 (see ``detr_fixtures.arrays``) · ``matched``, ``best``:
    by layer and image, the (query, target) pairs that the candidate matches and that cost least.
    """

    options: dict[str, Any]
    npz: str
    matched: dict[str, list[list[tuple[int, int]]]] = field(default_factory=dict)
    best: dict[str, list[list[tuple[int, int]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbers:
    """A quantity that is one number. ``known``: what known faults of the check make of it, by id."""

    want: float
    got: float
    allowed: float
    known: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """The smallest input found on which a check fails, and the numbers on it.

    ``inputs`` is the call in words and numbers; ``want`` and ``got`` are printed as they are, ``allowed`` may be "".
    ``call`` where the input is that of one call; ``numbers`` where the quantity is one number.
    """

    case: str
    inputs: str
    what: str
    want: str
    got: str
    allowed: str = ""
    how: str = ""
    call: Call | None = None
    numbers: Numbers | None = None


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
    if evidence:
        call, numbers = evidence["call"], evidence["numbers"]
        own = {"call": call and Call(**call), "numbers": numbers and Numbers(**numbers)}
        evidence = Evidence(**{**evidence, **own})
    if diagnosis:
        diagnosis = Diagnosis(**{**diagnosis, "faults": tuple((i, s) for i, s in diagnosis["faults"])})
    return Finding(**{**data, "evidence": evidence, "diagnosis": diagnosis})


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
