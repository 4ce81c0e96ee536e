"""Which inputs kill which known faults, and whether the stored cases kill what they claim.

A fault is killed by a case where its check finds it wrong by judgement, not because it raises.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case
from detr_conformance.errors import ConformanceError
from detr_conformance.experiments import Drawing, Experiment, made
from detr_conformance.footprints import atoms, equal
from detr_conformance.registry import Fault, checks, faults, near
from detr_conformance.seen import Seen
from detr_conformance.stored import Corpus, Inputs, in_line
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

T = TypeVar("T")
SOUND: Final = 2.0  # times the allowed error: what is beyond it by less may not be so on another machine


def covered() -> list[Experiment]:
    """The experiments whose cases are stored and drawn alike."""
    found = dict.fromkeys(check.on for check in checks())
    return [e for e in found if isinstance(e.drawn, Drawing)]


def experiments_named(names: Sequence[str]) -> list[Experiment]:
    """Those experiments, or all that are covered. Raises ConformanceError that names an unknown one."""
    known = {e.name: e for e in covered()}
    for name in names:
        if name not in known:
            raise ConformanceError(f"no stored cases of {name!r}{near(name, known)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def faults_on(experiment: str, profile: str) -> list[Fault]:
    """The faults of a profile whose check judges this experiment."""
    return [f for f in faults(profile) if f.check.on.name == experiment]


# --- one case -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a case tells of the faults of its experiment in one profile.

    ``size``: numbers of the input · ``kills``: by fault how many times the allowed error it is off · ``apart``: pairs
    of a fault that is killed and another one of its chapter that returns something else.
    """

    inputs: Inputs
    size: int
    kills: Mapping[str, float]
    apart: frozenset[tuple[str, str]] = frozenset()


def wrong(fault: Fault, profile: str) -> Bound:
    """A fault as a candidate, a new one every time, since some remember their calls."""
    return bind(candidate_of(fault.apply(textbook), profile))


def killed(fault: Fault, seen: Seen) -> float:
    """How many times the allowed error a fault is off by its check; 0 where the check finds nothing, or it raised."""
    if seen.raised:
        return 0.0
    return max((c.beyond for c in fault.check.judge(seen) if not c.ok), default=0.0)


def outcome(experiment: Experiment, profile: str, inputs: Inputs, own: Sequence[Fault], case: Case) -> Outcome:
    """Judge these faults on a case."""
    seen = {f.id: experiment.observe(wrong(f, profile), case) for f in own}
    kills = {f.id: beyond for f in own if (beyond := killed(f, seen[f.id])) >= SOUND}
    numbers = {id: atoms(s.got) for id, s in seen.items()}
    apart = {
        (f.id, g.id)
        for f in own
        for g in own
        if f.id in kills and f is not g and chapter(f) == chapter(g) and differ(numbers[f.id], numbers[g.id])
    }
    return Outcome(inputs, numbers_in(case), kills, frozenset(apart))


def alarms(experiment: Experiment, profile: str, case: Case) -> list[str]:
    """Checks that a right criterion fails on a case: there must be none."""
    found = []
    for spec in (candidate_of(textbook, profile), "detr_reference.criterion"):
        seen = experiment.observe(bind(spec, profile), case)
        own = [c for c in checks(profile) if c.on is experiment]
        found += [c.name for c in own if seen.raised or not all(one.ok for one in c.judge(seen))]
    return found


def differ(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """True where two candidates' numbers are not the same within rounding."""
    return any(not equal(one.get(key), other.get(key)) for key in {*one, *other})


def chapter(fault: Fault) -> str:
    """The chapter of a fault's clause: BOX of BOX-2."""
    return fault.check.clause.id.split("-")[0]


def numbers_in(case: Case) -> int:
    """How many numbers a case's predictions and target boxes have."""
    return sum(v.numel() for n in case.layers for v in case.predictions(n).values()) + 4 * case.total


# --- the check ------------------------------------------------------------------------------------------------------


def problems(corpus: Corpus, names: Sequence[str] = (), processes: int = 2) -> list[str]:
    """What is not as the corpus claims: cases that do not kill what they should, cases that kill nothing, faults of
    these experiments, or of all, that no stored case kills."""
    known = {e.name for e in covered()}
    stray = [f"unknown experiment {name!r}{near(name, known)}" for name in corpus.cases if name not in known]
    jobs = [(corpus, e.name, profile) for e in experiments_named(names) for profile in PROFILES]
    jobs.sort(key=lambda job: -len(faults_on(job[1], job[2])))
    found = zip(jobs, spread(_problems, jobs, processes), strict=True)
    idle = [
        f"{e.name}: {in_line(one.inputs)} kills nothing; drop it"
        for e in experiments_named(names)
        for one in corpus.cases.get(e.name, ())
        if not any(one.kills.values())
    ]
    return stray + idle + [line for _, lines in sorted(found, key=lambda x: x[0][1:]) for line in lines]


def _problems(job: tuple[Corpus, str, str]) -> list[str]:
    corpus, name, profile = job
    experiment = experiments_named([name])[0]
    own = {f.id: f for f in faults_on(name, profile)}
    spared = {f.id for f in own.values() if profile in f.survives}  # with a written reason why no check can see them
    right = bind(candidate_of(textbook, profile))
    cases = [(one, made(one.inputs, right)) for one in corpus.of(name, profile)]
    found = []

    def kills(id: str, case: Case) -> bool:
        return killed(own[id], experiment.observe(wrong(own[id], profile), case)) > 0

    for one, case in cases:
        for id in one.kills[profile]:
            if id not in own or not kills(id, case):
                why = "does not kill" if id in own else "claims to kill the unknown"
                found.append(f"{name}, {profile}: {in_line(one.inputs)} {why} {id}")
    for id in own.keys() - {id for one, _ in cases for id in one.kills[profile]} - spared:
        if not any(kills(id, case) for _, case in cases):
            found.append(f"{name}, {profile}: no stored case kills {id}: run detr-conformance corpus --add {name}")
    return sorted(found)


def spread(work: Callable[[Any], T], jobs: Sequence[Any], processes: int = 2) -> Iterator[T]:
    """The results of ``work`` in the order of the jobs, by so many processes."""
    if processes == 1:
        yield from map(work, jobs)
        return
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=start, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, jobs)
