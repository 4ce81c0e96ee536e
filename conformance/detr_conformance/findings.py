"""Finding and Report: what was found out about one candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

LEVELS: Final = ("must", "should")  # that a run is judged at; information comes with should, and never fails it
EFFORTS: Final = {"quick": 0, "standard": 100, "deep": 3000}  # by name, how many cases an experiment searches
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
WORDS: Final = ("conformant", "not conformant", "incomplete", "nothing was judged")  # of a report


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
class Repeat:
    """What to look at when the call is made again, and what is right of it, for a criterion of anyone's.

    ``kind``: ``loss``, ``weight`` and ``total`` are numbers, ``gradient`` is an entry of one, each within ``allowed``
    of ``want`` · ``finite``, ``scalar``, ``key``, ``no key`` and ``graph`` say what must hold of the loss ``name`` ·
    ``returns``: the call must not raise · ``matching``: the pairs of image ``index[0]`` must cost at most ``allowed``
    more than ``want`` by ``costs`` [Q,n].
    ``sums``: the losses that are differentiated · ``at``: the path of the predictions in ``outputs``.
    """

    kind: str
    name: str = ""
    want: float | None = None
    allowed: float = 0.0
    sums: tuple[str, ...] = ()
    at: str = ""
    index: tuple[int, ...] = ()
    costs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Gradient:
    """The gradient of a loss at the predictions of one image, the one where it differs most: rows of queries, columns
    of logits or of box coordinates. ``got`` is None where there is none."""

    loss: str
    at: str
    image: int
    want: list[list[float]]
    got: list[list[float]] | None


@dataclass(frozen=True)
class Evidence:
    """The smallest input found on which a check fails, and the numbers on it.

    ``inputs`` is the call in words and numbers; ``want`` and ``got`` are printed as they are, ``allowed`` may be "".
    ``call`` where the input is that of one call; ``numbers`` where the quantity is one number; ``repeat`` where one
    call shows what is wrong, to a criterion that is right as well; ``gradient`` where that is what differs.
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
    repeat: Repeat | None = None
    gradient: Gradient | None = None


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

    @property
    def signature(self) -> str:
        """The ids in one line, by which a ledger knows the mistake again: ``one or other``, ``one and other``."""
        return (" and " if self.together else " or ").join(sorted(id for id, _ in self.faults))


@dataclass(frozen=True)
class Accepted:
    """The entry of a ledger that accepts a failure. ``expires``: an ISO date, or "" · ``where``: file and line."""

    state: str
    reason: str
    issue: str
    expires: str
    where: str


@dataclass(frozen=True)
class Finding:
    """A check's verdict with its evidence.

    pass · fail · error (a bug in the suite) · blocked (by a failed precondition) · declined (the candidate has no
    such part) · ambiguous (not decidable on these outputs) · deviation (accepted in the ledger).
    ``values``: what a failing candidate got on the first inputs, by which a ledger knows the failure again ·
    ``blocked_by``: the check that blocks · ``accepted``: the entry by which it is a deviation · ``repro``: the script
    that shows the failure.
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
    values: str = ""
    blocked_by: str = ""
    accepted: Accepted | None = None
    repro: str = ""

    @property
    def deviation(self) -> str:
        """An accepted deviation in one line: what, why, and until when; else ""."""
        a = self.accepted
        if a is None:
            return ""
        named = f" {self.diagnosis.signature}" if self.diagnosis else ""
        until = f" until {a.expires}" if a.expires else ""
        issue = f" · {a.issue}" if a.issue else ""
        return f"{self.clause}{named} · {a.state}{until}: {a.reason}{issue} ({a.where})"


def _repeat(data: Mapping[str, Any]) -> Repeat:
    tuples = {k: tuple(data[k]) for k in ("sums", "index")}
    return Repeat(**{**data, **tuples, "costs": tuple(tuple(row) for row in data["costs"])})


def _call(data: Mapping[str, Any]) -> Call:
    pairs = {
        key: {layer: [[(q, t) for q, t in image] for image in images] for layer, images in data[key].items()}
        for key in ("matched", "best")
    }
    return Call(**{**data, **pairs})


def _gradient(data: Mapping[str, Any]) -> Gradient:
    rows = {k: data[k] and [[float(v) for v in row] for row in data[k]] for k in ("want", "got")}
    return Gradient(**{**data, **rows})


def _numbers(data: Mapping[str, Any]) -> Numbers:
    known = {id: float(value) for id, value in data["known"].items()}
    return Numbers(float(data["want"]), float(data["got"]), float(data["allowed"]), known)


def finding_from(data: Mapping[str, Any]) -> Finding:
    """The finding that ``dataclasses.asdict`` made this of."""
    evidence, diagnosis, accepted = data["evidence"], data["diagnosis"], data["accepted"]
    if evidence:
        call, numbers, repeat = evidence["call"], evidence["numbers"], evidence["repeat"]
        own = {
            "call": call and _call(call),
            "numbers": numbers and _numbers(numbers),
            "repeat": repeat and _repeat(repeat),
            "gradient": evidence["gradient"] and _gradient(evidence["gradient"]),
        }
        evidence = Evidence(**{**evidence, **own})
    if diagnosis:
        diagnosis = Diagnosis(**{**diagnosis, "faults": tuple((i, s) for i, s in diagnosis["faults"])})
    return Finding(
        **{**data, "evidence": evidence, "diagnosis": diagnosis, "accepted": accepted and Accepted(**accepted)}
    )


@dataclass(frozen=True)
class Report:
    """All findings of one candidate, and what was judged under which conditions.

    ``device``: the accelerator that was compared with the CPU; ``cpu`` or ``none`` where there was none · ``spec``: the
    string that finds the candidate again, "" for a live object · ``ledger``: what is wrong with the ledger, each with
    file and line · ``clauses``: what alone was asked for, all where it is empty · ``missing``: checks asked for and not
    reached, since the run was cut short or left them out · ``source``: the candidate's module, the hash of its file,
    and its distribution, as far as they are known.
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
    spec: str = ""
    ledger: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """True where every check that was asked for has a finding."""
        return not self.missing

    @property
    def verdict(self) -> str:
        """conformant · not conformant · incomplete, where nothing failed so far · nothing was judged."""
        broken = [f for f in self.findings if f.verdict in ("fail", "error") and f.level != "information"]
        if any(f.check != "smoke" for f in broken):
            return "not conformant"
        if not self.complete and not broken:
            return "incomplete"
        if not self.judged or broken:
            return "nothing was judged"
        return "conformant" if self.conformant else "not conformant"

    @property
    def conformant(self) -> bool:
        """True where at least one clause was judged, none left out, and none at the level was broken, left blocked or
        in error, save for accepted deviations and what these alone block; and the ledger is right. What is for
        information decides nothing."""
        verdicts = {f.verdict for f in self.findings if f.level != "information" and not self.excused(f)}
        wrong = verdicts & {"fail", "error", "blocked"}
        return bool(verdicts & {"pass", "deviation"}) and not wrong and not self.ledger and self.complete

    @property
    def deviations(self) -> tuple[Finding, ...]:
        """The failures that the ledger accepts."""
        return tuple(f for f in self.findings if f.verdict == "deviation")

    def excused(self, finding: Finding) -> bool:
        """True for a check that an accepted deviation blocks: it cannot be judged, and the ledger says why."""
        by_check = {f.check: f for f in self.findings}
        seen: set[str] = set()
        blocking: Finding | None = finding
        while blocking is not None and blocking.verdict == "blocked" and blocking.check not in seen:
            seen.add(blocking.check)
            blocking = by_check.get(blocking.blocked_by)
        return finding.verdict == "blocked" and blocking is not None and blocking.verdict == "deviation"

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
        return any(f.verdict in ("pass", "fail", "error", "deviation") for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, in which a number that is not finite is one of "nan", "inf" and "-inf"."""
        about = {"verdict": self.verdict, "conformant": self.conformant, "complete": self.complete}
        found: dict[str, Any] = plain({**about, **asdict(self)})
        return found


def report_from(data: Mapping[str, Any]) -> Report:
    """The report whose ``to_dict`` this is."""
    known = {f.name for f in fields(Report)}
    tuples = ("notes", "ledger", "clauses", "missing")
    own: dict[str, Any] = {k: tuple(v) if k in tuples else v for k, v in data.items() if k in known}
    own["findings"] = tuple(map(finding_from, data["findings"]))
    return Report(**own)


def plain(value: Any) -> Any:
    """Lists, dicts, texts, and numbers that JSON has."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (str, int)) else repr(value)
