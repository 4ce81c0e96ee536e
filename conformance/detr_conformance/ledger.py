"""Accepted deviations: a TOML file in the implementer's repository, that says which failure, why, and until when.

    [[deviation]]
    clause = "BOX-2"
    signature = "iou-without-the-enclosing-box"
    state = "not-yet"
    reason = "GIoU comes with the next training run"
    issue = "https://…/881"
    expires = 2027-03-01

An entry accepts one failure of one clause: the one whose diagnosis is ``signature``, or whose first wrong numbers are
``values``. Whatever else fails there still fails; an entry that is no longer true fails the run.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from detr_conformance.errors import ConformanceError
from detr_conformance.findings import EFFORTS, Accepted, Finding, Report
from detr_conformance.registry import near
from detr_conformance.signatures import alike

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT: Final = 1
STATES: Final = ("by-design", "not-yet", "bug")
TODAY: Final = "DETR_CONFORMANCE_TODAY"  # an ISO date: what day it is, for a test of one's own gate
_HEADER: Final = re.compile(r"^\s*\[\[\s*deviation\s*\]\]")
_TABLE: Final = re.compile(r"^\s*\[")


@dataclass(frozen=True)
class Entry:
    """One accepted failure, and where it stands.

    ``signature``: ids of known faults as the diagnosis names them · ``values``: the first wrong numbers, for a failure
    that no known fault explains; one of the two is needed, either fits · ``expires``: the last day, needed unless the
    state is by-design · ``candidate``: of which one, where a ledger serves several · ``effort``: the least at which the
    failure is found, so that a shorter run does not call the entry stale.
    """

    clause: str
    state: str
    reason: str
    where: str
    signature: str = ""
    values: str = ""
    issue: str = ""
    expires: datetime.date | None = None
    candidate: str = ""
    effort: str = "standard"

    def fits(self, finding: Finding) -> bool:
        """True for the failure that the entry is about, whatever the day."""
        if finding.clause != self.clause:
            return False
        named = finding.diagnosis.signature if finding.diagnosis else ""
        by_values = bool(self.values and finding.values) and alike(self.values, finding.values)
        return bool(self.signature and self.signature == named) or by_values

    def about(self, candidate: Sequence[str]) -> bool:
        """True where the entry is about a candidate of these names."""
        return not self.candidate or self.candidate in candidate

    def expired(self, today: datetime.date) -> bool:
        """True after its last day."""
        return self.expires is not None and today > self.expires


@dataclass(frozen=True)
class Ledger:
    """The entries of one file."""

    path: str
    entries: tuple[Entry, ...]

    def accept(self, finding: Finding, candidate: Sequence[str], today: datetime.date | None = None) -> Finding:
        """The finding as a deviation where an entry accepts it; else as it was, with a word on an entry that does not.

        ``candidate``: the names that it goes by · ``today``: that of the environment's DETR_CONFORMANCE_TODAY, or of
        the clock.
        """
        if finding.verdict != "fail":
            return finding
        own = [e for e in self.entries if e.clause == finding.clause and e.about(candidate)]
        fitting = [e for e in own if e.fits(finding)]
        for entry in fitting:
            if not entry.expired(today or day()):
                return replace(finding, verdict="deviation", accepted=_accepted(entry))
        said = [f"accepted until {e.expires}, which is over ({e.where})" for e in fitting]
        said += [f"{e.where} accepts {e.signature or e.values} only" for e in own if not fitting]
        lines = "".join(f"\n      {'ledger':<12}{line}" for line in said)
        return replace(finding, message=finding.message + lines)

    def applied(self, report: Report, today: datetime.date | None = None) -> Report:
        """The report with accepted failures as deviations, and with what is wrong with the ledger."""
        names = (report.candidate, report.spec)
        accepted = replace(report, findings=tuple(self.accept(f, names, today) for f in report.findings))
        return self.checked([accepted], today)[0]

    def checked(self, reports: Sequence[Report], today: datetime.date | None = None) -> list[Report]:
        """The reports of one run, each with what is wrong with the ledger."""
        untrue = self.untrue(reports, today)
        return [
            replace(r, ledger=tuple(f"{e.where}: {why}" for e, why in untrue if e.about((r.candidate, r.spec))))
            for r in reports
        ]

    def untrue(self, reports: Sequence[Report], today: datetime.date | None = None) -> list[tuple[Entry, str]]:
        """The entries that these reports show to be no longer true, and why: expired ones, and ones whose failure no
        longer happens where it was judged. Deviations and failures count alike."""
        return [(e, why) for e in self.entries if (why := _untrue(e, reports, today or day()))]


def _untrue(entry: Entry, reports: Sequence[Report], today: datetime.date) -> str:
    what = f"{entry.clause} {entry.signature or entry.values}"
    own = [r for r in reports if entry.about((r.candidate, r.spec))]
    if any(entry.fits(f) for r in own for f in r.findings):
        return f"expired: {what} was accepted until {entry.expires}" if entry.expired(today) else ""
    long_enough = [r for r in own if EFFORTS[r.effort] >= EFFORTS[entry.effort]]
    verdicts = {f.verdict for r in long_enough for f in r.findings if f.clause == entry.clause}
    if "pass" in verdicts and not verdicts & {"fail", "error", "blocked"}:
        return f"stale: {what} no longer happens; detr-conformance ledger prune removes the entry"
    return ""


def day() -> datetime.date:
    """Today, or the date in DETR_CONFORMANCE_TODAY. Raises ConformanceError where that is none."""
    given = os.environ.get(TODAY, "")
    try:
        return datetime.date.fromisoformat(given) if given else datetime.date.today()
    except ValueError:
        raise ConformanceError(f"{TODAY}={given}: it must be a date, as 2027-03-01") from None


def _accepted(entry: Entry) -> Accepted:
    expires = entry.expires.isoformat() if entry.expires else ""
    return Accepted(entry.state, entry.reason, entry.issue, expires, entry.where)


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Ledger:
    """The ledger in a file. Raises ConformanceError, a line a mistake, each with file and line number."""
    file = str(path)
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConformanceError(f"the ledger {file} cannot be read: {error}") from None
    return parse(text, file)


def parse(text: str, file: str) -> Ledger:
    """The ledger in a text. ``file``: what it is called in messages. Raises ConformanceError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConformanceError(f"{file}: {error}") from None
    starts = [i for i, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    raw = data.get("deviation", [])
    wrong = [
        f"{file}: unknown key {key!r}{near(key, ('format', 'deviation'))}"
        for key in data
        if key not in ("format", "deviation")
    ]
    if data.get("format", FORMAT) != FORMAT:
        wrong.append(f"{file}: format {data['format']!r}; this suite reads format {FORMAT}")
    if not isinstance(raw, list) or len(raw) != len(starts) or not all(isinstance(r, dict) for r in raw):
        raise ConformanceError(f"{file}: write every entry under a line [[deviation]] of its own")
    found = []
    for start, one in zip(starts, raw, strict=True):
        wrong += (f"{file}:{_line(text, start, key)}: {why}" for key, why in _mistakes(one))
        found.append((one, f"{file}:{start}"))
    if wrong:
        raise ConformanceError("\n".join(wrong))
    return Ledger(file, tuple(_entry(one, where) for one, where in found))


def _entry(raw: Mapping[str, Any], where: str) -> Entry:
    known = {k: raw[k] for k in raw if k != "expires"}
    if "signature" in known:
        known["signature"] = _ordered(known["signature"])
    return Entry(**known, where=where, expires=_date(raw.get("expires")))


def _mistakes(raw: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The key that is wrong, and why."""
    from detr_conformance import registry

    known = [name for name in Entry.__dataclass_fields__ if name != "where"]
    for key, value in raw.items():
        if key not in known:
            yield key, f"unknown key {key!r}{near(key, known)}"
        elif key != "expires" and not isinstance(value, str):
            yield key, f"{key} must be text"
    clause, signature = raw.get("clause", ""), raw.get("signature", "")
    ids = [c.id for c in registry.clauses()]
    if clause not in ids:
        yield "clause", f"unknown clause {clause!r}{near(str(clause), ids)}"
    faults = [f.id for f in registry.faults()]
    for id in re.split(r" and | or ", str(signature)) if signature else ():
        if id not in faults:
            yield "signature", f"unknown fault {id!r}{near(id, faults)}; what no known fault explains has `values`"
    if not signature and not raw.get("values"):
        yield "signature", "neither signature nor values: which failure is accepted?"
    if raw.get("state") not in STATES:
        yield "state", f"state {raw.get('state')!r}; it must be one of {', '.join(STATES)}"
    if not str(raw.get("reason", "")).strip():
        yield "reason", "no reason: say why this failure is accepted"
    if raw.get("effort", "standard") not in EFFORTS:
        yield "effort", f"effort {raw['effort']!r}; it must be one of {', '.join(EFFORTS)}"
    try:
        expires = _date(raw.get("expires"))
    except ValueError:
        yield "expires", f"expires = {raw['expires']!r}; it must be a date, as 2027-03-01"
    else:
        if expires is None and raw.get("state") in STATES[1:]:
            yield "expires", f"no expires: what is {raw['state']} must end; what stays is by-design"


def _date(value: Any) -> datetime.date | None:
    """Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, datetime.datetime):
        return value.date()
    return value if isinstance(value, datetime.date) else datetime.date.fromisoformat(str(value))


def _ordered(signature: str) -> str:
    word = " and " if " and " in signature else " or "
    return word.join(sorted(signature.split(word)))


def _line(text: str, start: int, key: str) -> int:
    """The line of a key of the entry that begins at line ``start``; that line where the key is missing."""
    lines = text.splitlines()
    for i in range(start, len(lines)):
        if _TABLE.match(lines[i]):
            break
        if re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", lines[i]):
            return i + 1
    return start


# --- writing --------------------------------------------------------------------------------------------------------

BEGINNING: Final = """\
# Failures of the criterion contract that this repository accepts: see `detr-conformance ledger --help`.
# An entry accepts one failure of one clause. It fails the gate when it has expired, and when it is no longer needed.
format = 1
"""


def proposals(ledger: Ledger, reports: Sequence[Report], today: datetime.date | None = None) -> list[str]:
    """An entry for every failure that none is about yet, ready to be appended; the reason is left to whoever accepts
    it, and until it is given the ledger is refused."""
    found: dict[tuple[str, str, str], str] = {}
    for report in reports:
        names = (report.candidate, report.spec)
        for f in report.findings:
            known = any(e.fits(f) and e.about(names) for e in ledger.entries)
            if f.verdict == "fail" and f.check != "smoke" and f.level != "information" and not known:
                several = report.spec or report.candidate if len(reports) > 1 else ""
                what = f.clause, f.diagnosis.signature if f.diagnosis else f.values, several
                found.setdefault(what, _proposal(f, several, report.effort, today or day()))
    return list(found.values())


def _proposal(f: Finding, candidate: str, effort: str, today: datetime.date) -> str:
    got = ""
    if f.evidence:
        got = f"# {f.evidence.what}: got {_one_line(f.evidence.got)}, want {_one_line(f.evidence.want)}\n"
    lines = [f'[[deviation]]\nclause = "{f.clause}"']
    if f.diagnosis:
        lines.append(f"signature = {_text(f.diagnosis.signature)}")
    if f.values:
        lines.append(f"values = {_text(f.values)}")
    lines += [f"candidate = {_text(candidate)}"] * bool(candidate)
    lines += [f"effort = {_text(effort)}"] * (effort != "standard")
    lines += ['state = "bug"  # or "not-yet"; "by-design" needs no expires', 'reason = ""', 'issue = ""']
    lines.append(f"expires = {_in_half_a_year(today)}")
    return f"# {_one_line(f.sentence)}\n{got}" + "\n".join(lines) + "\n"


def without(text: str, gone: Sequence[Entry]) -> str:
    """The text without these entries and the comments right above them; everything else stays as it is."""
    lines = text.splitlines(keepends=True)
    starts = {int(e.where.rpartition(":")[2]) - 1 for e in gone}
    dropped: set[int] = set()
    for start in starts:
        top = start
        while top and lines[top - 1].lstrip().startswith("#"):
            top -= 1
        end = start + 1
        while end < len(lines) and not _TABLE.match(lines[end]):
            end += 1
        while end < len(lines) and end > start + 1 and lines[end - 1].lstrip().startswith("#"):
            end -= 1  # comments right above what comes next
        dropped.update(range(top, end))
    return "".join(line for i, line in enumerate(lines) if i not in dropped)


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _one_line(text: str) -> str:
    return textwrap.shorten(text, 110, placeholder=" …")


def _in_half_a_year(today: datetime.date) -> datetime.date:
    month = today.month + 6
    return datetime.date(today.year + (month > 12), (month - 1) % 12 + 1, 1)
