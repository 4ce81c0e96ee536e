"""Which inputs kill which known faults: how the stored cases are found, checked and told of.

A fault is killed by a case where its check finds it wrong by judgement, not because it raises. The search draws cases
as the experiments do, judges every fault of an experiment on each, and keeps few small ones, on which faults differ
much from the textbook and from each other.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, TypeVar

import numpy as np
import torch

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case
from detr_conformance.errors import ConformanceError
from detr_conformance.experiments import Drawing, Experiment, made
from detr_conformance.footprints import atoms, equal
from detr_conformance.observation import observe
from detr_conformance.registry import Fault, checks, faults, near
from detr_conformance.seen import Seen
from detr_conformance.stored import Corpus, Inputs, Stored, in_line
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

T = TypeVar("T")
ENOUGH: Final = 3  # cases that kill a fault: as many as the diagnosis needs to name it
SOUND: Final = 2.0  # times the allowed error: what is beyond it by less may not be so on another machine
RANDOM: Final = 60  # drawn cases that every fault of an experiment is judged on
MORE: Final = 300  # drawn cases at most, for the faults that fewer than ENOUGH of those kill


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
        if f.id in kills and f is not g and _chapter(f) == _chapter(g) and _differ(numbers[f.id], numbers[g.id])
    }
    return Outcome(inputs, _size(case), kills, frozenset(apart))


def alarms(experiment: Experiment, profile: str, case: Case) -> list[str]:
    """Checks that a right criterion fails on a case: there must be none."""
    found = []
    for spec in (candidate_of(textbook, profile), "detr_reference.criterion"):
        seen = experiment.observe(bind(spec, profile), case)
        own = [c for c in checks(profile) if c.on is experiment]
        found += [c.name for c in own if seen.raised or not all(one.ok for one in c.judge(seen))]
    return found


def _differ(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return any(not equal(one.get(key), other.get(key)) for key in {*one, *other})


def _chapter(fault: Fault) -> str:
    return fault.check.clause.id.split("-")[0]


def _size(case: Case) -> int:
    return sum(v.numel() for n in case.layers for v in case.predictions(n).values()) + 4 * case.total


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """What was found for an experiment in one profile. ``missed``: by fault how many of how many drawn cases do not
    kill it · ``alarms``: cases that a right criterion fails, with the checks; they are no candidates."""

    outcomes: tuple[Outcome, ...]
    missed: Mapping[str, tuple[int, int]]
    alarms: Mapping[str, Sequence[str]]


def searched(experiment: Experiment, profile: str, known: Sequence[Inputs], seed: int, count: int) -> Searched:
    """Judge the faults of an experiment in a profile on the ``known`` cases and on drawn ones: ``count``, and up to
    MORE for faults that are hard to kill."""
    own, right = faults_on(experiment.name, profile), bind(candidate_of(textbook, profile))
    drawn = _drawn(experiment, max(count, MORE), seed)
    bad: dict[str, Sequence[str]] = {}
    outcomes: dict[str, Outcome] = {}
    missed = {f.id: (0, 0) for f in own}

    def add(inputs: Inputs) -> Outcome | None:
        if in_line(inputs) in outcomes:
            return outcomes[in_line(inputs)]
        case = made(inputs, right)
        wrongly = alarms(experiment, profile, case)
        if wrongly:
            bad[in_line(inputs)] = wrongly
            return None
        outcomes[in_line(inputs)] = outcome(experiment, profile, inputs, own, case)
        return outcomes[in_line(inputs)]

    for inputs in known if own else ():
        add(inputs)
    for i, inputs in enumerate(drawn):
        hard = own if i < count else [f for f in own if sum(f.id in o.kills for o in outcomes.values()) < ENOUGH]
        if not hard:
            break
        found = add(inputs) if hard is own else outcome(experiment, profile, inputs, hard, made(inputs, right))
        if found is None:
            continue
        if found.kills:
            add(inputs)
        for f in hard:
            misses, of = missed[f.id]
            missed[f.id] = misses + (f.id not in found.kills), of + 1
    return Searched(tuple(outcomes.values()), missed, bad)


def _drawn(experiment: Experiment, count: int, seed: int) -> list[Inputs]:
    """Different inputs as the experiment draws them, the same ones for the same seed."""
    from detr_conformance.strategies import sample

    assert isinstance(experiment.drawn, Drawing)
    found = sample(experiment.drawn.inputs(), count, int(np.random.default_rng([seed, *b"corpus"]).integers(2**62)))
    return list({in_line(inputs): inputs for inputs in found}.values())


def chosen(found: Searched, keep: Iterable[str], liked: Iterable[str]) -> list[Outcome]:
    """Few small cases that kill every fault ENOUGH times, and tell every two of a chapter apart once, where any do.

    ``keep``: cases that stay if they kill anything · ``liked``: those to prefer among equals, as they are stored
    already. Both are named by their line.
    """
    useful = {in_line(one.inputs): one for one in found.outcomes if one.kills}
    kept, stored = {line for line in keep if line in useful}, set(liked)
    taken = {line: useful[line] for line in sorted(kept)}

    def gain(line: str) -> tuple[float, str]:
        helps = sum(weight for need, weight in _helps(useful[line]).items() if left[need] > 0)
        return helps / (1 + useful[line].size / 64) * (1.5 if line in stored else 1), line

    while useful.keys() - taken.keys():
        left = _open(useful.values(), taken.values())
        worth, line = max(gain(line) for line in useful.keys() - taken.keys())
        if not worth:
            break
        taken[line] = useful[line]
    for line in [x for x in taken if x not in kept]:  # what later ones made superfluous
        rest = [one for other, one in taken.items() if other != line]
        if all(n <= 0 for n in _open(useful.values(), rest).values()):
            del taken[line]
    return list(taken.values())


Need = tuple[str, ...]  # (fault,) to be killed, or (fault, other) to be told apart


def _helps(one: Outcome) -> dict[Need, float]:
    """What a case does for whom: kills that are far beyond the allowed error count more."""
    kills: dict[Need, float] = {(id,): 1.0 if beyond >= 10 * SOUND else 0.5 for id, beyond in one.kills.items()}
    return kills | dict.fromkeys(one.apart, 0.25)


def _open(outcomes: Iterable[Outcome], taken: Iterable[Outcome]) -> dict[Need, int]:
    """How many more cases each need takes: as far as there are any, ENOUGH for a kill and one for a pair."""
    able = Counter(need for one in outcomes for need in _helps(one))
    met = Counter(need for one in taken for need in _helps(one))
    return {need: min(n, ENOUGH if len(need) == 1 else 1) - met[need] for need, n in able.items()}


def assembled(old: Corpus, found: Mapping[tuple[str, str], Searched], seed: int) -> Corpus:
    """The corpus with the cases of the searched experiments chosen anew. ``found``: by experiment and profile."""
    cases, missed = dict(old.cases), dict(old.missed)
    for name in dict.fromkeys(name for name, _ in found):
        keep = {in_line(one.inputs): one.keep for one in old.cases.get(name, ()) if one.keep}
        liked = {in_line(one.inputs) for one in old.cases.get(name, ())}
        kills: dict[str, dict[str, tuple[str, ...]]] = {}
        inputs: dict[str, tuple[int, str, Inputs]] = {}
        for profile in PROFILES:
            if (name, profile) not in found:
                continue
            for one in chosen(found[name, profile], keep, {*liked, *kills}):
                line = in_line(one.inputs)
                kills.setdefault(line, {})[profile] = tuple(sorted(one.kills))
                inputs.setdefault(line, (one.size, line, one.inputs))
        order = sorted(inputs.values(), key=lambda entry: entry[:2])  # the smallest first
        cases[name] = tuple(Stored(i, kills[line], keep.get(line, "")) for _, line, i in order)
    for (_, profile), result in found.items():
        for id, numbers in result.missed.items():
            missed[id] = {**missed.get(id, {}), profile: numbers}
    known = {f.id: f for f in faults()}
    missed = {
        id: {p: missed[id][p] for p in PROFILES if p in missed[id] and p in known[id].profiles}
        for id in sorted(missed.keys() & known.keys())
    }
    return Corpus(cases, missed, old.alike, seed)


def search(
    old: Corpus, names: Sequence[str] = (), seed: int = 0, count: int = RANDOM, tell: Callable[[str], None] = print
) -> Corpus:
    """Search cases for these experiments, or all; the stored ones are candidates too. Deterministic for a seed."""
    jobs = [
        (e.name, profile, tuple(one.inputs for one in old.cases.get(e.name, ())), seed, count)
        for e in experiments_named(names)
        for profile in PROFILES
        if faults_on(e.name, profile)
    ]
    jobs.sort(key=lambda job: -len(faults_on(job[0], job[1])))
    found = {}
    for job, one in zip(jobs, spread(_search, jobs), strict=True):
        found[job[:2]] = one
        tell(f"{job[0]}, {job[1]}: {len(one.outcomes)} cases judged")
        for line, wrongly in one.alarms.items():
            tell(f"  a right criterion fails {', '.join(wrongly)} on {line}")
    new = assembled(old, {at: found[at] for at in sorted(found)}, seed)
    alike = spread(_not_told_apart, [(new, profile) for profile in PROFILES])
    return replace(new, alike=tuple(chain.from_iterable(alike)))


def _search(job: tuple[str, str, tuple[Inputs, ...], int, int]) -> Searched:
    name, profile, known, seed, count = job
    return searched(experiments_named([name])[0], profile, known, seed, count)


def _not_told_apart(job: tuple[Corpus, str]) -> list[tuple[str, str, str]]:
    """(profile, fault, other of its chapter) where on every stored case that kills the fault the other returns the
    same."""
    corpus, profile = job
    own = [f for e in covered() for f in faults_on(e.name, profile)]
    right = bind(candidate_of(textbook, profile))
    found = []
    for fault in own:
        others = [g for g in own if g is not fault and _chapter(g) == _chapter(fault)]
        for one in corpus.of(fault.check.on.name, profile):
            if fault.id in one.kills[profile] and others:
                case = made(one.inputs, right)
                numbers = _numbers(fault, profile, case)
                others = [g for g in others if not _differ(numbers, _numbers(g, profile, case))]
        found += [(profile, fault.id, g.id) for g in others]
    return found


def _numbers(fault: Fault, profile: str, case: Case) -> Mapping[Any, Any]:
    return atoms(observe(wrong(fault, profile), case))


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
    for id in own.keys() - {id for one, _ in cases for id in one.kills[profile]}:
        silent = sum(kills(id, case) for _, case in cases)
        told = f"{silent} stored cases kill {id}, and none says so" if silent else f"no stored case kills {id}"
        found.append(f"{name}, {profile}: {told}: run detr-conformance corpus --search {name}")
    return sorted(found)


def spread(work: Callable[[Any], T], jobs: Sequence[Any], processes: int = 2) -> Iterator[T]:
    """The results of ``work`` in the order of the jobs, by so many processes."""
    if processes == 1:
        yield from map(work, jobs)
        return
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=start, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, jobs)
