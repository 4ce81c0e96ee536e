"""How the stored cases are found.

Cases are drawn as the experiments draw them, every fault of an experiment is judged on each, and few small ones are
kept, on which faults differ much from the textbook and from each other. Every search is deterministic for its seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import numpy as np

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import bind
from detr_conformance.cases import Case
from detr_conformance.corpus import (
    SOUND,
    Outcome,
    alarms,
    chapter,
    covered,
    differ,
    experiments_named,
    faults_on,
    numbers_in,
    outcome,
    spread,
    wrong,
)
from detr_conformance.experiments import Drawing, Experiment, made
from detr_conformance.footprints import atoms
from detr_conformance.observation import observe
from detr_conformance.registry import Fault, faults
from detr_conformance.stored import Corpus, Inputs, Stored, in_line
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

ENOUGH: Final = 3  # cases that kill a fault: as many as the diagnosis needs to name it
RANDOM: Final = 30  # drawn cases that every fault of an experiment is judged on
MORE: Final = 120  # drawn cases at most, for the faults that fewer than ENOUGH of those kill


@dataclass(frozen=True)
class Job:
    """What to search: cases for these faults of an experiment in a profile, ``known`` ones or drawn."""

    experiment: str
    profile: str
    faults: tuple[str, ...]
    known: tuple[Inputs, ...]
    seed: int
    count: int


@dataclass(frozen=True)
class Searched:
    """What was found. ``missed``: by fault how many of how many drawn cases do not kill it · ``alarms``: cases that a
    right criterion fails, with the checks; they are no candidates."""

    outcomes: tuple[Outcome, ...]
    missed: Mapping[str, tuple[int, int]]
    alarms: Mapping[str, Sequence[str]]


def search(
    old: Corpus, names: Sequence[str] = (), seed: int = 0, count: int = RANDOM, tell: Callable[[str], None] = print
) -> Corpus:
    """Choose the cases of these experiments, or of all, anew; the stored ones are candidates too."""
    jobs = [
        Job(e.name, profile, tuple(f.id for f in own), _inputs(old, e), seed, count)
        for e in experiments_named(names)
        for profile in PROFILES
        if (own := faults_on(e.name, profile))
    ]
    found = _spread(searched, jobs, tell)
    return _with_alike(assembled(old, found, seed))


def add(old: Corpus, names: Sequence[str] = (), count: int = RANDOM, tell: Callable[[str], None] = print) -> Corpus:
    """Keep the stored cases, find out which of the faults that none claims they kill, and search cases for the rest."""
    jobs = []
    for e in experiments_named(names):
        for profile in PROFILES:
            claimed = {id for one in old.of(e.name, profile) for id in one.kills[profile]}
            new = tuple(f.id for f in faults_on(e.name, profile) if f.id not in claimed and profile not in f.survives)
            if new:
                jobs.append((old, Job(e.name, profile, new, _inputs(old, e), old.seed, count)))
    found = _spread(_added, jobs, tell)
    return _with_alike(extended(old, found))


def _inputs(old: Corpus, experiment: Experiment) -> tuple[Inputs, ...]:
    return tuple(one.inputs for one in old.cases.get(experiment.name, ()))


At = tuple[str, str]  # an experiment and a profile


def _spread(work: Callable[[Any], Searched], jobs: Sequence[Any], tell: Callable[[str], None]) -> dict[At, Searched]:
    """The results by experiment and profile, in their order; the longest jobs are done first."""

    def job_of(task: Any) -> Job:
        found: Job = task if isinstance(task, Job) else task[1]
        return found

    jobs = sorted(jobs, key=lambda task: -len(job_of(task).faults))
    found: dict[At, Searched] = {}
    for job, one in zip(map(job_of, jobs), spread(work, jobs), strict=True):
        found[job.experiment, job.profile] = one
        tell(f"{job.experiment}, {job.profile}: {len(job.faults)} faults judged on {len(one.outcomes)} cases")
        for line, wrongly in one.alarms.items():
            tell(f"  a right criterion fails {', '.join(wrongly)} on {line}")
    return {at: found[at] for at in sorted(found)}


# --- one experiment in one profile ----------------------------------------------------------------------------------


def searched(job: Job) -> Searched:
    """Judge the faults of a job on its known cases and on ``count`` drawn ones; those that are hard to kill on up to
    MORE."""
    experiment, profile = experiments_named([job.experiment])[0], job.profile
    own, right = _faults(job.faults), bind(candidate_of(textbook, profile))
    bad: dict[str, Sequence[str]] = {}
    outcomes: dict[str, Outcome] = {}
    missed = {f.id: (0, 0) for f in own}

    def judge(inputs: Inputs) -> Outcome | None:
        line = in_line(inputs)
        if line not in outcomes:
            case = made(inputs, right)
            wrongly = alarms(experiment, profile, case)
            if wrongly:
                bad[line] = wrongly
                return None
            outcomes[line] = outcome(experiment, profile, inputs, own, case)
        return outcomes[line]

    for inputs in job.known:
        judge(inputs)
    for i, inputs in enumerate(_drawn(experiment, max(job.count, MORE), job.seed)):
        hard = [f for f in own if sum(f.id in one.kills for one in outcomes.values()) < ENOUGH]
        asked = own if i < job.count else hard
        if not asked:
            break
        found = judge(inputs) if asked is own else outcome(experiment, profile, inputs, asked, made(inputs, right))
        if found is None:
            continue
        if found.kills:
            judge(inputs)
        for f in asked:
            misses, of = missed[f.id]
            missed[f.id] = misses + (f.id not in found.kills), of + 1
    return Searched(tuple(outcomes.values()), missed, bad)


def _added(task: tuple[Corpus, Job]) -> Searched:
    """What the stored cases of a profile kill of a job's faults; and, where these are too few, what others kill."""
    old, job = task
    stored = {in_line(one.inputs) for one in old.of(job.experiment, job.profile)}
    found = searched(job)
    experiment, right = experiments_named([job.experiment])[0], bind(candidate_of(textbook, job.profile))
    every = faults_on(job.experiment, job.profile)
    outcomes = [one for one in found.outcomes if in_line(one.inputs) in stored]
    for one in chosen(found, stored, map(in_line, job.known)):
        if in_line(one.inputs) not in stored:
            outcomes.append(outcome(experiment, job.profile, one.inputs, every, made(one.inputs, right)))
    return replace(found, outcomes=tuple(outcomes))


def _faults(ids: Iterable[str]) -> list[Fault]:
    known = {f.id: f for f in faults()}
    return [known[id] for id in ids]


def _drawn(experiment: Experiment, count: int, seed: int) -> list[Inputs]:
    """Different inputs as the experiment draws them, the same ones for the same seed."""
    from detr_conformance.strategies import sample

    assert isinstance(experiment.drawn, Drawing)
    found = sample(experiment.drawn.inputs(), count, int(np.random.default_rng([seed, *b"corpus"]).integers(2**62)))
    return list({in_line(inputs): inputs for inputs in found}.values())


# --- the choice -----------------------------------------------------------------------------------------------------

Need = tuple[str, ...]  # (fault,) to be killed, or (fault, other) to be told apart


def chosen(found: Searched, keep: Iterable[str], liked: Iterable[str]) -> list[Outcome]:
    """Few small cases that kill every fault ENOUGH times, and tell every two of a chapter apart once, where any do.

    ``keep``: cases that stay if they kill anything · ``liked``: those to prefer among equals, as they are stored
    already. Both are named by their line.
    """
    useful = {in_line(one.inputs): one for one in found.outcomes if one.kills}
    helps = {line: _helps(one) for line, one in useful.items()}
    able = Counter(chain.from_iterable(helps.values()))
    needs = {need: min(n, ENOUGH if len(need) == 1 else 1) for need, n in able.items()}
    kept, stored = {line for line in keep if line in useful}, set(liked)
    taken = sorted(kept)

    def left(lines: Iterable[str]) -> dict[Need, int]:
        met = Counter(chain.from_iterable(helps[line] for line in lines))
        return {need: n - met[need] for need, n in needs.items() if n > met[need]}

    while useful.keys() - set(taken):
        missing = left(taken)

        def worth(line: str) -> tuple[float, str]:
            gain = sum(weight for need, weight in helps[line].items() if need in missing)  # noqa: B023
            return gain / (1 + useful[line].size / 64) * (1.5 if line in stored else 1), line

        gain, line = max(worth(line) for line in useful.keys() - set(taken))
        if not gain:
            break
        taken.append(line)
    for line in [x for x in taken if x not in kept]:  # what later ones made superfluous
        if not left(x for x in taken if x != line):
            taken.remove(line)
    return [useful[line] for line in taken]


def _helps(one: Outcome) -> dict[Need, float]:
    """What a case does for whom: kills that are far beyond the allowed error count more."""
    kills: dict[Need, float] = {(id,): 1.0 if beyond >= 10 * SOUND else 0.5 for id, beyond in one.kills.items()}
    return kills | dict.fromkeys(one.apart, 0.25)


# --- the corpus -----------------------------------------------------------------------------------------------------


def assembled(old: Corpus, found: Mapping[At, Searched], seed: int) -> Corpus:
    """The corpus with the cases of these experiments chosen anew in these profiles."""
    others = {
        name: tuple(
            replace(one, kills={p: ids for p, ids in one.kills.items() if (name, p) not in found}) for one in own
        )
        for name, own in old.cases.items()
    }
    new: dict[At, Searched] = {}
    liked = {name: {in_line(one.inputs) for one in own} for name, own in old.cases.items()}
    for (name, profile), one in found.items():
        keep = [in_line(stored.inputs) for stored in old.cases.get(name, ()) if stored.keep]
        taken = chosen(one, keep, liked.setdefault(name, set()))
        liked[name] |= {in_line(outcome.inputs) for outcome in taken}  # one case for all profiles, where it does
        new[name, profile] = replace(one, outcomes=tuple(taken))
    return extended(Corpus(others, old.missed, old.alike, seed), new)


def extended(old: Corpus, found: Mapping[At, Searched]) -> Corpus:
    """The corpus with all these cases, and what they kill, besides its own."""
    cases = {}
    for name in dict.fromkeys((*old.cases, *(name for name, _ in found))):
        own = {in_line(one.inputs): one for one in old.cases.get(name, ())}
        for profile in PROFILES:
            for one in found[name, profile].outcomes if (name, profile) in found else ():
                before = own.setdefault(in_line(one.inputs), Stored(one.inputs, {}))
                ids = sorted({*before.kills.get(profile, ()), *one.kills})
                own[in_line(one.inputs)] = replace(before, kills={**before.kills, profile: tuple(ids)})
        cases[name] = tuple(_tidied(name, own.values()))
    missed = dict(old.missed)
    for (_, profile), result in found.items():
        for id, numbers in result.missed.items():
            missed[id] = {**missed.get(id, {}), profile: numbers}
    known = {f.id: f.profiles for f in faults()}
    missed = {
        id: {p: missed[id][p] for p in PROFILES if p in missed[id] and p in known[id]}
        for id in sorted(missed.keys() & known.keys())
    }
    return Corpus({name: own for name, own in cases.items() if own}, missed, old.alike, old.seed)


def _tidied(name: str, cases: Iterable[Stored]) -> Iterator[Stored]:
    """Those that kill a fault that there is, the smallest first; profiles in their order."""
    known = {profile: {f.id for f in faults_on(name, profile)} for profile in PROFILES}
    sized = []
    for one in cases:
        kills = {p: tuple(id for id in one.kills.get(p, ()) if id in known[p]) for p in PROFILES}
        kills = {p: ids for p, ids in kills.items() if ids}
        if kills:
            numbers = numbers_in(made(one.inputs, bind(candidate_of(textbook, next(iter(kills))))))
            sized.append((numbers, in_line(one.inputs), replace(one, kills=kills)))
    yield from (one for _, _, one in sorted(sized, key=lambda entry: entry[:2]))


def _with_alike(new: Corpus) -> Corpus:
    alike = spread(_not_told_apart, [(new, profile) for profile in PROFILES])
    return replace(new, alike=tuple(chain.from_iterable(alike)))


def _not_told_apart(job: tuple[Corpus, str]) -> list[tuple[str, str, str]]:
    """(profile, fault, other of its chapter) where on every stored case that kills the fault the other returns the
    same."""
    corpus, profile = job
    own = {f.id: f for e in covered() for f in faults_on(e.name, profile)}
    others = {id: [g for g, other in own.items() if g != id and chapter(other) == chapter(f)] for id, f in own.items()}
    right = bind(candidate_of(textbook, profile))
    shown: set[str] = set()
    for experiment in covered():
        for one in corpus.of(experiment.name, profile):
            case, kills = made(one.inputs, right), [id for id in one.kills[profile] if id in own]
            shown |= set(kills)
            kills = [id for id in kills if others[id]]
            asked = {*kills, *chain.from_iterable(others[id] for id in kills)}
            numbers = {id: _numbers(own[id], profile, case) for id in sorted(asked)}
            for id in kills:
                others[id] = [g for g in others[id] if not differ(numbers[id], numbers[g])]
    return [(profile, id, g) for id in own if id in shown for g in others[id]]


def _numbers(fault: Fault, profile: str, case: Case) -> Mapping[Any, Any]:
    return atoms(observe(wrong(fault, profile), case))
