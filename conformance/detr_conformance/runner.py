"""From a candidate to findings.

``Judge`` does the work, in a process of its own (see ``isolation``): it binds the candidate, calls it once to see that
the wiring is right, and runs experiments when a finding of theirs is asked for. ``judge`` asks for all of them.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from detr_conformance import devices, evidence, experiments, messages, provenance, shrink, signatures
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case, Recipe, build
from detr_conformance.diagnosis import Diagnoser
from detr_conformance.errors import ConformanceError
from detr_conformance.experiments import Experiment
from detr_conformance.findings import EFFORTS, LEVELS, Call, Evidence, Finding, Report
from detr_conformance.inference import explaining
from detr_conformance.observation import observe
from detr_conformance.registry import Check, Comparison, checks, near
from detr_conformance.sharing import Shared
from detr_conformance.soundness import BROKEN, Soundness
from detr_conformance.tallies import RAISES, Tallies, Tally, judged, tallied
from detr_reference.options import PROFILES

if TYPE_CHECKING:
    from pathlib import Path

    from detr_conformance.golden_judge import Outcome

SMOKE: Final = "smoke"


@dataclass(frozen=True)
class Settings:
    """How a candidate is judged. Raises ConformanceError that names a wrong argument and the nearest right one."""

    profile: str | None = None
    level: str = "must"
    effort: str = "standard"
    device: str = "cpu"
    seed: int = 0
    clauses: tuple[str, ...] = ()
    database: str = ""

    def __post_init__(self) -> None:
        known: dict[str, tuple[Any, Sequence[str]]] = {
            "level": (self.level, LEVELS),
            "effort": (self.effort, tuple(EFFORTS)),
            "device": (self.device, (*devices.names(), devices.SIMULATED)),
        }
        if self.profile is not None:
            known["profile"] = (self.profile, tuple(PROFILES))
        for name, (value, allowed) in known.items():
            if value not in allowed:
                shown = [a for a in allowed if a != devices.SIMULATED]  # that one is for the suite's own tests
                raise ConformanceError(
                    f"unknown {name} {value!r}; it must be one of {', '.join(shown)}{near(str(value), shown)}"
                )
        try:
            checks(only=self.clauses)
        except ValueError as error:
            raise ConformanceError(str(error)) from None


@dataclass(frozen=True)
class Identity:
    """What was bound: the candidate's name, its profile and why that one, its options, remarks said aloud, the device
    that it is compared on with the CPU, the string that it was found by, and where its code lies."""

    name: str
    profile: str
    profile_from: str
    options: dict[str, Any]
    notes: tuple[str, ...]
    smoke: Finding
    device: str = devices.CPU
    spec: str = ""
    source: dict[str, str] = field(default_factory=dict)


class Judge:
    """Judges one candidate. Experiments run when first asked for; the same settings give the same findings."""

    def __init__(self, spec: Any, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)
        self.settings = settings
        self._sound = Soundness()  # before the candidate's first line runs
        device = devices.chosen(settings.device)
        self.bound = replace(bind(spec, settings.profile), device=device)
        self._shared = Shared(settings.database) if settings.database else None
        self._found: dict[str, Tallies] = {}
        self._after: dict[str, bool] = {}  # whether the textbook was the same after an experiment
        self._diagnoser = Diagnoser(self.bound, self._tallies)
        self._golden: dict[Path, dict[str, str]] = {}  # by folder of golden cases, its files

    def identity(self) -> Identity:
        """Who is judged; calls the candidate once to see that the wiring is right."""
        bound = self.bound
        notes = []
        if "guessed" in bound.profile_from:
            notes.append(f"profile {bound.profile}: {bound.profile_from}; name another with --conformance-profile=")
        if not bound.candidate.own_weights:
            notes.append("weight_dict is made by the adapter, so the clauses about its values are declined")
        fixed = {"num_classes", "num_decoder_layers"} - bound.varies
        if fixed and bound.options.class_loss != "token":
            notes.append(f"the factory does not name {', '.join(sorted(fixed))}: judged at {bound.profile}'s defaults")
        notes += [said] if (said := devices.switches(bound.device)) else []
        return Identity(
            bound.name, bound.profile, bound.profile_from, dict(bound.candidate.options), tuple(notes), smoke(bound),
            bound.device, bound.spec, provenance.of(bound.candidate.factory),
        )  # fmt: skip

    def finding(self, name: str) -> Finding:
        """The finding of one check."""
        check = next(c for c in checks(self.bound.profile) if c.name == name)
        try:
            found = self._finding(check)
        except Exception:
            if self._sound.holds:
                raise
            return blocked(check, BROKEN)
        if check.on.name not in self._after:
            self._after[check.on.name] = self._sound.holds
        decided = found.verdict in ("pass", "fail")
        return blocked(check, BROKEN) if decided and not self._after[check.on.name] else found

    def _finding(self, check: Check) -> Finding:
        reason = self._not_made(check.on)
        if reason:
            return _finding(check, "declined", reason)
        tally = self._tally(check)
        if tally.failing is None:
            verdict = "pass" if tally.decided else "declined"
            reason = "; ".join(tally.notes) or ("" if tally.decided else self._why_declined(check))
            raised = self._tallies(check.on).raised
            if not tally.decided and raised:
                return blocked(check, f"the candidate raises: {raised}", answering(check, self.bound.profile))
            return _finding(check, verdict, reason, decided=tally.decided)
        case, comparison = tally.failing
        for other in self._earlier(check, case, comparison):
            if self._tally(other).failing is not None:
                return blocked(check, f"blocked by {other.clause.id}, {other.name.replace('_', ' ')}", other.name)
        shown = self._evidence(check, *tally.failing)
        if self._shared is not None:
            self._shared.keep(self.bound, check.on, case)
        option: dict[str, Any] = {}
        looks_like = None
        if comparison.what != RAISES and not check.on.once:
            if not check.on.numbers:  # where options show, they show in what one call returns
                option = explaining(self.bound, check, tally.cases, self._tallies)
            looks_like = self._diagnoser.diagnose(check, tally)
        name = self.bound.spec or self.bound.name
        if check.component == "devices":
            name += f" --conformance-device={self.bound.device}"
        message = messages.failure(
            check.clause.id, check.clause.sentence, check.clause.level, shown, name, looks_like, option
        )
        found = _finding(check, "fail", message, shown, tally.decided)
        return replace(found, diagnosis=looks_like, values=signatures.values(tally))

    def replayed(self, name: str, call: Call, label: str) -> Comparison | None:
        """What a check finds wrong with a stored call, or None. Raises LookupError where it decides nothing."""
        check = next(c for c in checks(self.bound.profile) if c.name == name)
        found = list(judged(check, check.on.observe(self.bound, evidence.case_of(call, label))))
        if not found:
            raise LookupError(f"{name} decides nothing on this call alone")
        return next((c for c in found if not c.ok), None)

    def golden(self, name: str, folder: Path) -> Outcome:
        """What the candidate does on a stored golden case. Raises FixtureError where it cannot be read."""
        from detr_conformance import golden_judge
        from detr_fixtures import golden

        if folder not in self._golden:
            self._golden[folder] = golden.manifest(folder)["files"]
        return golden_judge.judged(self.bound, golden.load(name, folder, self._golden[folder]))

    def failing(self, check: Check) -> Comparison | None:
        """What ``check`` itself finds wrong, whatever it comes after; None where it finds nothing or is not made."""
        if self._not_made(check.on):
            return None
        failing = self._tally(check).failing
        return failing[1] if failing else None

    def _earlier(self, check: Check, case: Case, comparison: Comparison) -> Iterator[Check]:
        """The checks to blame rather than this one, if they fail: those it comes after, and where the candidate
        raises, the one that answers for that kind of case."""
        every = checks(self.bound.profile)
        yield from (c for c in every if c.name in check.after)
        if comparison.what != RAISES or check.on.once or not case.plain:
            return
        home = self._home(case)
        if home is not check.on:
            yield from (c for c in every if c.on is home and c.takes_raising)

    def _home(self, case: Case) -> Experiment:
        """The experiment whose subject makes the candidate raise on ``case``."""
        for b, n in enumerate(case.counts):
            alone = case.images([b])
            if observe(self.bound, alone, grads=False).raised:
                if not 0 < n <= alone.queries:
                    return experiments.EDGES
                extreme = max(
                    float(p["pred_logits"].nan_to_num().abs().max()) for p in map(alone.predictions, alone.layers)
                )
                return experiments.EXTREMES if extreme > 10 else experiments.BATCH
        return experiments.ALONE if len(case.counts) > 1 else experiments.BATCH

    def _why_declined(self, check: Check) -> str:
        if check.clause.id == "KEY-4":
            return "the weights are not the candidate's own"
        if check.clause.id == "MATCH-6":
            return "the criterion has no matcher that can be called as matcher(outputs, targets)"
        return "the candidate returns nothing, or lets no option vary, that would show it"

    def _not_made(self, experiment: Experiment) -> str:
        """Why an experiment is not made at all, or ""."""
        order = list(EFFORTS)
        if order.index(self.settings.effort) < order.index(experiment.since):
            return f"judged at effort {' or '.join(order[order.index(experiment.since) :])} only"
        return experiment.declined(self.bound)

    def _tally(self, check: Check) -> Tally:
        return self._tallies(check.on).by_check[check.name]

    def _tallies(self, experiment: Experiment) -> Tallies:
        if experiment.name not in self._found:
            self._found[experiment.name] = tallied(self.bound, experiment, self._cases(experiment))
        return self._found[experiment.name]

    def _cases(self, experiment: Experiment) -> Iterator[Case]:
        yield from experiment.fixed(self.bound)
        if self._shared is not None and experiment.drawn is not None:
            yield from self._shared.cases(self.bound, experiment)
        count = int(EFFORTS[self.settings.effort] * experiment.share)
        if experiment.drawn is not None and count:
            from detr_conformance.strategies import sample

            yield from sample(experiment.drawn(self.bound), count, _seed(self.settings.seed, experiment.name))

    def _evidence(self, check: Check, case: Case, comparison: Comparison) -> Evidence:
        raises = comparison.what == RAISES

        def broken(candidate: Case) -> Comparison | None:
            try:
                seen = check.on.observe(self.bound, candidate)
                failing = (c for c in judged(check, seen) if not c.ok)
                return next((c for c in failing if raises or c.what != RAISES), None)
            except Exception:  # a simplification that is no valid case
                return None

        small, found = case, comparison
        if not check.on.once:
            attempts = shrink.FEW if check.on.numbers else shrink.ATTEMPTS  # those take more than one call each
            least = shrink.smallest(case, lambda c: broken(c) is not None, "num_classes" in self.bound.varies, attempts)
            if again := broken(least):  # a candidate that draws numbers may fail there no more
                small, found = least, again
        return evidence.of(check, self.bound, case.label, small, found)


def _seed(seed: int, name: str) -> int:
    """A seed for the search of an experiment: always the same for the same seed and name."""
    return int(np.random.default_rng([seed, *name.encode()]).integers(2**62))


def smoke(bound: Bound) -> Finding:
    """One ordinary call: does the wiring hold? Names what is mis-wired before anything is judged."""
    recipe = Recipe(1, (2, 1), 4, classes=3, aux=min(1, bound.options.num_decoder_layers - 1), encoder_queries=4)
    case = build(recipe, bound.options, bound.varies)
    got = observe(bound, case)
    want, wrong = case.keys("final"), ""
    if got.raised:
        wrong = f"called with {messages.inputs(case).splitlines()[0]}: {got.raised}"
    else:
        missing = [k for k in want if k not in got.keys]
        spare = sorted(got.keys - set(want))
        if missing:
            pairs = {m: near(m, spare).removeprefix("; did you mean ").rstrip("?") for m in missing}
            hints = ", ".join(f"{theirs}: {ours!r}" for ours, theirs in pairs.items() if theirs)
            wrong = (
                f"returns {', '.join(sorted(got.keys)) or 'an empty dict'}; the contract's names are {', '.join(want)}"
            )
            wrong += f"; map them with Candidate(…, rename={{{hints}}})" if hints else ""
    message = (
        "" if not wrong else f"smoke  {bound.name}: the wiring is not right yet, nothing was judged\n      {wrong}"
    )
    return Finding(
        SMOKE, "The candidate can be called and returns losses.", SMOKE, "must", "weights and keys",
        "fail" if wrong else "pass", message,
    )  # fmt: skip


def judge(
    candidate: Any,
    *,
    profile: str | None = None,
    level: str = "must",
    effort: str = "standard",
    device: str = "cpu",
    clauses: Sequence[str] = (),
    seed: int = 0,
    limit: float = 20.0,
    ledger: str | os.PathLike[str] | None = None,
) -> Report:
    """Judge a criterion against the contract.

    ``candidate``: an entry point, module, ``module:attribute``, ``file.py:attribute``, a factory, a criterion, or a
    ``Candidate``. ``limit``: seconds that one call may take. ``ledger``: the file of accepted deviations (see
    ``ledger``). Raises ConformanceError or CandidateError where an argument or the candidate cannot be used; whatever
    the candidate does when called is a finding.
    """
    from detr_conformance import ledger as ledgers
    from detr_conformance.isolation import Worker

    accepted = None if ledger is None else ledgers.read(ledger)

    selected = (clauses,) if isinstance(clauses, str) else tuple(clauses)
    settings = Settings(profile, level, effort, device, seed, selected)
    start = time.monotonic()
    with Worker(candidate, settings, limit) as worker:
        identity = worker.identity
        wanted = checks(identity.profile, level, selected)
        worker.ask_ahead(wanted)
        found = [worker.finding(c) for c in wanted]
    whole = report(identity, settings, found, time.monotonic() - start)
    return whole if accepted is None else accepted.applied(whole)


def report(
    identity: Identity,
    settings: Settings,
    findings: Sequence[Finding],
    seconds: float = 0.0,
    missing: Sequence[str] = (),
) -> Report:
    """The report of these findings; the smoke finding comes first where it failed. ``missing``: checks not reached."""
    first = [identity.smoke] if identity.smoke.verdict != "pass" else []
    return Report(
        identity.name, identity.profile, identity.profile_from, settings.level, settings.effort, settings.seed,
        identity.options, versions(), (*first, *findings), identity.notes, seconds, identity.device, identity.spec,
        clauses=settings.clauses, missing=tuple(missing), source=identity.source,
    )  # fmt: skip


def blocked(check: Check, reason: str, by: str = "") -> Finding:
    """A finding that could not be reached. ``by``: the check that blocks it."""
    return replace(_finding(check, "blocked", reason), blocked_by=by)


def answering(check: Check, profile: str) -> str:
    """The check that answers for a candidate that raises in the same experiment."""
    return next((c.name for c in checks(profile) if c.on is check.on and c.takes_raising), "")


def ended(check: Check, candidate: str, how: str, doing: str) -> Finding:
    """The finding of a check whose experiment the candidate hung in or ended the process of."""
    clause = check.clause
    shown = Evidence(doing, doing or "before the first call", "the call", "a dict of losses", how)
    return _finding(check, "fail", messages.failure(clause.id, clause.sentence, clause.level, shown, candidate), shown)


def broken_suite(check: Check, error: BaseException) -> Finding:
    """The finding of a bug of ours."""
    return _finding(check, "error", "this is a bug in the suite:\n" + "".join(traceback.format_exception(error)))


def versions() -> dict[str, str]:
    """Versions of the suite and of what it runs on."""
    found = {"python": platform.python_version()}
    for name in ("detr-conformance", "torch", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _finding(check: Check, verdict: str, message: str, shown: Evidence | None = None, decided: int = 0) -> Finding:
    clause = check.clause
    return Finding(
        clause.id, clause.sentence, check.name, clause.level, check.component, verdict, message, shown,
        decided=decided,
    )  # fmt: skip
