"""Two reports beside each other, and many: ``detr-conformance diff`` and ``detr-conformance matrix``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from detr_conformance.errors import ConformanceError

if TYPE_CHECKING:
    from detr_conformance.findings import Finding, Report

ABSENT: Final = "absent"
WRONG: Final = ("fail", "error")
MET: Final = ("pass", "deviation")


# --- two ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A check that says something else than before. ``kind``: broke, mended or changed."""

    kind: str
    clause: str
    check: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """What is different about one candidate. ``remarks``: where the two were not judged alike."""

    candidate: str
    profile: str
    before: str
    after: str
    changes: list[Change] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def broke(self) -> bool:
        """True where a clause was met and is no longer."""
        return any(c.kind == "broke" for c in self.changes)


def differences(old: Sequence[Report], new: Sequence[Report]) -> list[Difference]:
    """Candidate by candidate; where there is one each, whatever their names.

    Raises ConformanceError where none is in both.
    """
    if len(old) == len(new) == 1:
        return [difference(old[0], new[0])]
    before = {(r.candidate, r.profile): r for r in old}
    after = {(r.candidate, r.profile): r for r in new}
    both = [key for key in before if key in after]
    if not both:
        raise ConformanceError("no candidate is in both reports under the same profile")
    found = [difference(before[key], after[key]) for key in both]
    for key in (*before, *after):
        if key not in both:
            which = "old" if key in before else "new"
            found[0].remarks.append(f"{key[0]} ({key[1]}) is in the {which} report only")
    return found


def difference(old: Report, new: Report) -> Difference:
    """What became of each check, in the order of the new report."""
    name = new.candidate if new.candidate == old.candidate else f"{old.candidate} → {new.candidate}"
    found = Difference(name, new.profile, old.verdict, new.verdict, remarks=list(_remarks(old, new)))
    before, after = ({f.check: f for f in r.findings if f.level != "information"} for r in (old, new))
    for check in dict.fromkeys([*after, *before]):
        one, other = before.get(check), after.get(check)
        some = other or one
        assert some is not None
        kind = _kind(one, other, old.complete and not old.clauses)
        if kind:
            found.changes.append(Change(kind, some.clause, check, _state(one), _state(other)))
    return found


def _remarks(old: Report, new: Report) -> Iterator[str]:
    for name in ("profile", "level", "effort", "seed", "device"):
        one, other = getattr(old, name), getattr(new, name)
        if one != other:
            yield f"{name} was {one}, is {other}"
    for name in ("detr-conformance", "torch"):
        one, other = old.versions.get(name), new.versions.get(name)
        if one != other:
            yield f"{name} was {one}, is {other}"
    for word, report in (("old", old), ("new", new)):
        if not report.complete:
            yield f"the {word} report is not complete: {len(report.missing)} checks are missing"
        if report.clauses:
            yield f"the {word} report is about {', '.join(report.clauses)} only"


def _kind(one: Finding | None, other: Finding | None, whole: bool) -> str:
    """broke, mended, changed, or "" where nothing is different. A check that was not there before breaks nothing, save
    where the old report was whole and it is wrong now."""
    before, after = one.verdict if one else ABSENT, other.verdict if other else ABSENT
    bad = (*WRONG, "blocked")
    if after in bad and before not in bad:
        return "broke" if before != ABSENT or (whole and after in WRONG) else "changed"
    if before in bad and after in MET:
        return "mended"
    return "changed" if _state(one) != _state(other) else ""


def _state(finding: Finding | None) -> str:
    """The verdict, and of a failure which known fault it looks like."""
    if finding is None:
        return ABSENT
    looks = f", looks like {finding.diagnosis.signature}" if finding.diagnosis else ""
    return f"{finding.verdict}{looks}"


# --- many -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What a report says of a clause. ``verdict`` is absent where it says nothing · ``looks``: faults, or reason."""

    verdict: str
    looks: str = ""


@dataclass(frozen=True)
class Matrix:
    """Clauses × implementations. ``sentences`` and ``rows`` are by clause, each row a cell a column."""

    columns: list[dict[str, Any]]
    rows: dict[str, list[Cell]]
    sentences: dict[str, str]
    remarks: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = [
            {"clause": id, "sentence": self.sentences[id], "cells": [asdict(c) for c in row]}
            for id, row in self.rows.items()
        ]
        return {"columns": self.columns, "rows": rows, "remarks": self.remarks}


def matrix(reports: Sequence[tuple[str, Report]]) -> Matrix:
    """All reports side by side, each with the name of its file."""
    from detr_conformance.report import summary

    names = [r.candidate for _, r in reports]
    columns = [
        {
            "name": r.candidate if names.count(r.candidate) == 1 else f"{r.candidate} ({file})",
            "profile": r.profile, "level": r.level, "effort": r.effort, "verdict": r.verdict, "complete": r.complete,
        }
        for file, r in reports
    ]  # fmt: skip
    found = [{c.id: c for c in summary.clauses(r)} for _, r in reports]
    sentences = {id: c.sentence for own in found for id, c in own.items()}
    order = sorted(sentences, key=_place(found))
    rows = {id: [_cell(own.get(id)) for own in found] for id in order}
    remarks = []
    for what, values in (
        ("suite versions", [r.versions.get("detr-conformance", "?") for _, r in reports]),
        ("efforts", [r.effort for _, r in reports]),
        ("levels", [r.level for _, r in reports]),
    ):
        if len(set(values)) > 1:
            remarks.append(f"judged with different {what}: {', '.join(dict.fromkeys(values))}")
    remarks += [f"{c['name']} is not complete" for c in columns if not c["complete"]]
    return Matrix(columns, rows, {id: sentences[id] for id in order}, remarks)


def _place(found: Sequence[dict[str, Any]]) -> Any:
    """The order of chapters as they come, and of clauses by number within."""
    chapters = list(dict.fromkeys(id.partition("-")[0] for own in found for id in own))

    def key(id: str) -> tuple[int, int, str]:
        chapter, _, number = id.partition("-")
        return chapters.index(chapter), int(number) if number.isdecimal() else 10**6, number

    return key


def _cell(clause: Any) -> Cell:
    if clause is None:
        return Cell(ABSENT)
    worst = [f for f in clause.findings if f.verdict == clause.verdict]
    looks = list(dict.fromkeys(f.diagnosis.signature for f in worst if f.diagnosis))
    blocking = [f.blocked_by.replace("_", " ") for f in worst if f.verdict == "blocked" and f.blocked_by]
    return Cell(clause.verdict, "; ".join(looks or dict.fromkeys(blocking)))
