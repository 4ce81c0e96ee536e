"""The proof that every check can fail: the textbook and the reference pass, and every fault is caught by the check it
names, by judgement and not by an exception, in every profile it applies to.

Each task is one experiment on one book, so that two processes share them evenly. A fault's task ends with the first
case on which its check fails.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Final

from detr_conformance.registry import Check, checks, clauses, faults
from detr_conformance.stored import corpus
from detr_reference.options import PROFILES

REFERENCE: Final = "detr_reference.criterion"
TEXTBOOK: Final = "the textbook"


@dataclass(frozen=True)
class Task:
    """One experiment of one profile on the textbook, the reference, or the textbook with a fault (by its id)."""

    who: str
    profile: str
    experiment: str


@dataclass(frozen=True)
class Outcome:
    """What the checks of an experiment said: those that decided, those that failed by judgement, and those that failed
    by an exception."""

    task: Task
    decided: tuple[str, ...]
    failed: tuple[str, ...]
    raised: tuple[str, ...]


@dataclass(frozen=True)
class Kill:
    """A fault in a profile: whether the check it names caught it, and every check of that experiment that did."""

    fault: str
    profile: str
    check: str
    caught: bool
    by: tuple[str, ...]
    survivor: str = ""


@dataclass
class Proof:
    """Everything that was shown. ``problems``: one sentence each, none where all holds."""

    kills: list[Kill] = field(default_factory=list)
    passed: int = 0
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the kill matrix whole."""
        return {
            "clauses": len(clauses()),
            "checks": len(checks()),
            "faults": len(faults()),
            "passed": self.passed,
            "kills": [asdict(k) for k in self.kills],
            "problems": self.problems,
            "left_out": self.left_out,
        }


def tasks(deep: bool = False) -> tuple[list[Task], list[str]]:
    """What there is to do, the dear ones first; and what only --deep proves."""
    found: list[tuple[float, Task]] = []
    left = []
    for profile in PROFILES:
        every = checks(profile)
        for experiment in {c.on for c in every if not all(k.measures for k in every if k.on is c.on)}:
            if experiment.since == "deep" and not deep:
                left.append(f"{experiment.title} in {profile}")
                continue
            found += [(2 * experiment.weight, Task(who, profile, experiment.name)) for who in (TEXTBOOK, REFERENCE)]
        for fault in faults(profile):
            if fault.check.on.since != "deep" or deep:
                found.append((fault.check.on.weight, Task(fault.id, profile, fault.check.on.name)))
    return [task for _, task in sorted(found, key=lambda pair: -pair[0])], sorted(left)


def prove(deep: bool = False, processes: int | None = None) -> Iterator[Outcome | Proof]:
    """Every outcome as it comes, and last the proof."""
    todo, left = tasks(deep)
    outcomes = []
    for outcome in _worked(todo, processes or os.cpu_count() or 1):
        outcomes.append(outcome)
        yield outcome
    yield proof(outcomes, left)


def proof(outcomes: Sequence[Outcome], left: Sequence[str] = ()) -> Proof:
    """What the outcomes show."""
    found = Proof(left_out=list(left))
    by_id = {fault.id: fault for fault in faults()}
    for outcome in outcomes:
        who, profile = outcome.task.who, outcome.task.profile
        if who in (TEXTBOOK, REFERENCE):
            found.passed += len(outcome.decided)
            for check in (*outcome.failed, *outcome.raised):
                found.problems.append(f"{who} fails {check} in {profile}: the check is wrong")
            continue
        check = by_id[who].check.name
        reason = by_id[who].survives.get(profile, "")
        kill = Kill(who, profile, check, check in outcome.failed, outcome.failed, reason)
        found.kills.append(kill)
        if kill.caught and reason:
            found.problems.append(f"{who} in {profile} is caught by {check} now: it survives no more")
        elif not kill.caught and not reason:
            how = "by an exception only" if check in outcome.raised else "not at all"
            found.problems.append(f"{who} in {profile} is caught {how} by {check}")
    found.kills.sort(key=lambda k: (k.fault, k.profile))
    found.problems += [*_orphans()]
    return found


def _orphans() -> Iterator[str]:
    """Clauses without a check, and checks without a fault, in any profile."""
    judged = {(check.clause.id, profile) for check in checks() for profile in check.profiles}
    for clause in clauses():
        for profile in sorted(clause.profiles):
            if (clause.id, profile) not in judged:
                yield f"{clause.id} has no check in {profile}"
    named = {(fault.check.name, profile) for fault in faults() for profile in fault.profiles}
    for check in checks():
        for profile in sorted(check.profiles):
            if (check.name, profile) not in named and not check.measures:
                yield f"{check.name} has no fault in {profile}"


def summary(found: Proof) -> Iterator[str]:
    """The kill matrix in short, a line a chapter; then the counts, what was left out, and every problem."""
    by_id = {fault.id: fault for fault in faults()}
    for chapter in dict.fromkeys(c.id.split("-")[0] for c in clauses()):
        own = [k for k in found.kills if by_id[k.fault].check.clause.id.split("-")[0] == chapter]
        if own:
            ids, caught = {k.fault for k in own}, sum(k.caught for k in own)
            judging = sum(c.clause.id.split("-")[0] == chapter for c in checks())
            yield f"{chapter:<9}{judging:>4} checks{len(ids):>5} faults{caught:>5} of {len(own)} caught"
    caught, survived = sum(k.caught for k in found.kills), sum(bool(k.survivor) for k in found.kills)
    yield ""
    yield f"{len(clauses())} clauses, {len(checks())} checks, {len(faults())} faults"
    yield f"textbook and reference pass all checks: {found.passed} verdicts in {len(PROFILES)} profiles"
    yield f"{caught} of {len(found.kills)} faults × profiles caught by the check they name, {survived} known survivors"
    if found.left_out:
        yield f"only with --deep: {', '.join(found.left_out)}"
    for problem in found.problems:
        yield f"PROBLEM  {problem}"


# --- the work ---


def _worked(todo: Sequence[Task], processes: int) -> Iterable[Outcome]:
    if processes == 1:
        yield from map(work, todo)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(processes) as pool:
        yield from pool.imap_unordered(work, todo)


def work(task: Task) -> Outcome:
    """Run one experiment, on as many cases as are needed."""
    import torch

    from detr_conformance.tallies import RAISES, judged

    torch.set_num_threads(1)
    bound = _bound(task.who, task.profile)
    own = [c for c in checks(task.profile) if c.on.name == task.experiment and not c.measures]
    named = next((f.check for f in faults() if f.id == task.who), None)
    decided: dict[str, None] = {}
    failed: dict[str, None] = {}
    raised: dict[str, None] = {}
    for case in _in_order(task):
        seen = own[0].on.observe(bound, case)
        for check in own:
            wrong = [c for c in judged(check, seen) if _noted(decided, check) and not c.ok]
            if any(c.what != RAISES for c in wrong):
                failed[check.name] = None
            elif wrong:
                raised[check.name] = None
        if named is not None and named.name in failed:
            break
    only_raised = tuple(name for name in raised if name not in failed)
    return Outcome(task, tuple(decided), tuple(failed), only_raised)


def _in_order(task: Task) -> list[Any]:
    """The cases of the task's experiment, those first that are known to kill its fault."""
    cases, stored = _cases(task.experiment, task.profile), corpus().of(task.experiment, task.profile)
    if len(cases) != len(stored):
        return cases
    kills = [task.who in one.kills[task.profile] for one in stored]
    return [cases[i] for i in sorted(range(len(cases)), key=lambda i: not kills[i])]


def _noted(decided: dict[str, None], check: Check) -> bool:
    decided[check.name] = None
    return True


@cache
def _cases(experiment: str, profile: str) -> list[Any]:
    """The cases of an experiment, which are those of every book: each takes all options."""
    found = next(c.on for c in checks(profile) if c.on.name == experiment)
    return list(found.fixed(_bound(TEXTBOOK, profile)))


@cache
def _bound(who: str, profile: str) -> Any:
    from dataclasses import replace

    from detr_conformance import devices
    from detr_conformance.adapters.textbook import candidate_of
    from detr_conformance.candidate import bind
    from detr_reference.textbook import textbook

    device = devices.chosen(devices.SIMULATED)
    if who == REFERENCE:
        return replace(bind(REFERENCE, profile), device=device)
    fault = next((f for f in faults() if f.id == who), None)
    book = textbook if fault is None else fault.apply(textbook)
    return replace(bind(candidate_of(book, profile, who)), device=device)
