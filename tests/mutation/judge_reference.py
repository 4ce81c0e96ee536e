"""Mutants of the fast reference, judged by the suite: what it does not notice is a hole in it, or no fault.

    pip install -e '.[mutation]'
    python tests/mutation/judge_reference.py mutation.sqlite

Cosmic Ray makes the mutants and keeps the session, so an interrupted run goes on where it stopped, and cr-report and
cr-html read it. Judging is done here: torch and the suite are imported once, and each mutant gets a forked process
with a copy of the package, in which one file differs. Nothing in the checkout changes.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from cosmic_ray.commands import init
from cosmic_ray.config import load_config
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.tools.filters.operators_filter import OperatorsFilter
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

import detr_reference
from detr_conformance.candidate import Candidate
from detr_conformance.registry import Check, checks
from detr_conformance.runner import Judge, Settings
from detr_conformance.stored import corpus

CONFIG = Path(__file__).with_name("cosmic-ray.toml")
ROOT = CONFIG.parents[2]
PROFILES = ("dino", "detr", "grounding-dino", "deformable-detr")
OTHER_OPTIONS: dict[str, dict[str, Any]] = {  # that no profile has by itself; seen on ordinary batches
    "detr": {"weighted": True},
    "grounding-dino": {"class_divisor": "matches", "aux_suffix": "_aux_"},
}
EARLY = ("batch", "edges", "refused", "odd", "graph", "choice of losses", "denoising", "masks", "extremes")
LATE = ("layers", "repeated", "alone", "half", "callers", "pairs", "duels", "ranks")
OTHER_PROCESSES = ("ranks",)  # slow, and about one function that all profiles share: made in one of them


# --- the reference, and one mutant of it ---


@dataclass
class Right:
    """What is true of the reference as it is. ``verdicts``: of each check in each profile, by both names; ``reached``:
    by file and line, the experiments that run it, by profile and name."""

    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)
    reached: dict[tuple[str, int], set[tuple[str, str]]] = field(default_factory=dict)


def right(effort: str) -> Right:
    """Judges the reference that is imported here, and notes which of its lines each experiment runs."""
    found = Right()
    judges, folder = _judges(effort), detr_reference.__path__[0]
    for check, profile in _in_order():
        here = (profile, check.on.name)

        def line(frame: FrameType, event: str, _: Any, here: tuple[str, str] = here) -> Any:
            found.reached.setdefault((Path(frame.f_code.co_filename).name, frame.f_lineno), set()).add(here)
            return line

        sys.settrace(lambda frame, event, _: line if os.path.dirname(frame.f_code.co_filename) == folder else None)
        try:
            found.verdicts[profile, check.name] = judges[profile].finding(check.name).verdict
        finally:
            sys.settrace(None)
    return found


def verdict(effort: str, reached: set[tuple[str, str]] | None, verdicts: Mapping[tuple[str, str], str]) -> str:
    """The first thing that the suite says of the reference imported here and not of the right one, or "" where there
    is none. ``reached``: the experiments to make, by profile and name; None: all."""
    judges = _judges(effort)
    for profile, judge in judges.items():
        smoke = judge.identity().smoke
        if smoke.verdict != "pass":
            return f"smoke, {profile}: {smoke.message}"
    for check, profile in _in_order():
        if reached is not None and (profile, check.on.name) not in reached:
            continue
        judge, was = judges[profile], verdicts[profile, check.name]
        if check.on.declined(judge.bound) == "" and was == "pass" and (wrong := judge.failing(check)) is not None:
            return f"{check.clause.id} ({check.clause.level}) {check.name}, {profile}: {wrong.what}, got {wrong.got}"
        now = judge.finding(check.name)
        if now.verdict != was:
            return f"{now.verdict}: {check.clause.id} {check.name}, {profile}: {now.message}"
    return ""


def _judges(effort: str) -> dict[str, Judge]:
    """By profile, or profile and options."""
    device = "cpu" if effort == "quick" else "simulated"
    reference = "detr_reference.criterion"
    judges = {p: Judge(reference, Settings(p, "should", effort, device)) for p in PROFILES}
    factory = importlib.import_module(reference).build_criterion
    for profile, options in OTHER_OPTIONS.items():
        judges[f"{profile} {options}"] = Judge(
            Candidate(factory, profile, options), Settings(profile, "should", effort)
        )
    return judges


def _in_order() -> Iterator[tuple[Check, str]]:
    """All checks of all profiles, those of quick and telling experiments first."""
    places = {name: i - len(EARLY) for i, name in enumerate(EARLY)} | {name: i + 1 for i, name in enumerate(LATE)}
    every = [(check, profile) for profile in PROFILES for check in checks(profile)]
    every += [(c, f"{p} {options}") for p, options in OTHER_OPTIONS.items() for c in checks(p) if c.on.name == "batch"]
    for check, profile in sorted(every, key=lambda one: places.get(one[0].on.name, 0)):
        if check.on.name not in OTHER_PROCESSES or profile == PROFILES[0]:
            yield check, profile


@contextmanager
def _reference_with(module: str, code: str) -> Iterator[None]:
    """Whatever of the reference is imported from now on has ``code`` as its ``module``, in new processes too."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "detr_reference")
        shutil.copytree(ROOT / "reference" / "detr_reference", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / module).write_text(code, "utf-8")
        detr_reference.__path__.insert(0, str(package))
        os.environ["PYTHONPATH"] = folder
        yield


class Child:
    """A forked process that answers with what a function returns there, or with what it raises."""

    def __init__(self, answers: Callable[[], Any], limit: float, mutant: tuple[str, str] | None = None) -> None:
        """``mutant``: a module of the reference and its code; ``limit``: seconds that an answer may take."""
        self.pipe, there = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(answers, mutant, there), daemon=True
        )
        self.start, self._limit = time.monotonic(), limit
        self._process.start()
        there.close()

    @staticmethod
    def _run(answers: Callable[[], Any], mutant: tuple[str, str] | None, pipe: Any) -> None:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with _reference_with(*mutant) if mutant else nullcontext():
            try:
                pipe.send(answers())
            except BaseException as error:  # the reference cannot even be imported or bound
                pipe.send(f"{type(error).__name__}: {error}")

    @property
    def done(self) -> bool:
        """Whether there is an answer, or none to wait for any more."""
        return bool(self.pipe.poll()) or time.monotonic() - self.start > self._limit

    def answer(self) -> Any:
        """The answer, or in words why there is none; ends the process."""
        try:
            found = self.pipe.recv() if self.pipe.poll() else f"hangs: no verdict after {self._limit:.0f} s"
        except EOFError:
            found = "ends: the process is gone"
        self._process.join(5)
        if self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        return found


# --- all of them ---


def begin(session: WorkDB) -> None:
    """All mutants of the configuration; those that change no behaviour but an error's text are skipped."""
    config = load_config(CONFIG)
    init([Path(path) for path in config["module-path"]], session, config.operators_config)
    OperatorsFilter().filter(session, Namespace(config=str(CONFIG)))
    for item in session.pending_work_items:
        (mutation,) = item.mutations
        before, after = _codes(mutation)
        if reason := _no_mutant(before, after):
            session.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED, output=reason))


def _codes(mutation: MutationSpec) -> tuple[str, str]:
    before = mutation.module_path.read_text("utf-8")
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    return before, mutate_code(before, operator, mutation.occurrence) or before


def _no_mutant(before: str, after: str) -> str:
    try:
        same = ast.dump(_Bare().visit(ast.parse(before))) == ast.dump(_Bare().visit(ast.parse(after)))
    except SyntaxError:
        return "no Python"
    return "annotation or text of an error" if same else ""


class _Bare(ast.NodeTransformer):
    """A module without annotations and without what its errors say."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _reached(tree: ast.Module, mutation: MutationSpec, lines: Right) -> set[tuple[str, str]] | None:
    """The experiments that run the statement that a mutant changes; None, for all, where it runs on import."""
    at = mutation.start_pos[0]
    inside = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.body[0].lineno <= at <= f.end_lineno]
    if not inside:
        return None
    spans = [(n.lineno, n.end_lineno) for n in ast.walk(inside[-1]) if isinstance(n, ast.stmt)]
    spans = [span for span in spans if span[0] <= at <= span[1]]
    first, last = max(spans, key=lambda span: (span[0], -span[1]))
    found = [where for (name, n), where in lines.reached.items()
             if name == mutation.module_path.name and first <= n <= last]  # fmt: skip
    if not found:  # in no experiment of one process and one thread
        return None
    return set().union(*found) | {(PROFILES[0], name) for name in OTHER_PROCESSES}


def run(session: WorkDB, effort: str, items: list[WorkItem], jobs: int) -> None:
    """Judge these mutants, some at a time, and keep each verdict at once."""
    limit = load_config(CONFIG).timeout
    known = Child(lambda: right(effort), 10 * limit)
    while not known.done:
        time.sleep(1)
    lines = known.answer()
    if not isinstance(lines, Right):
        raise SystemExit(f"the reference cannot be judged: {lines}")
    if wrong := [name for name, found in lines.verdicts.items() if found not in ("pass", "declined")]:
        raise SystemExit(f"the reference itself is not right: {wrong}")
    waiting, running, number = list(reversed(items)), [], 0
    while waiting or running:
        while waiting and len(running) < jobs:
            item = waiting.pop()
            (mutation,) = item.mutations
            before, after = _codes(mutation)
            reached = _reached(ast.parse(before), mutation, lines)
            judging = partial(verdict, effort, reached, lines.verdicts)
            running.append((Child(judging, limit, (mutation.module_path.name, after)), item, before, after))
        for one in [one for one in running if one[0].done]:
            running.remove(one)
            child, item, before, after = one
            found = str(child.answer())
            outcome = TestOutcome.KILLED if found else TestOutcome.SURVIVED
            diff = "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))
            result = WorkResult(WorkerOutcome.NORMAL, found or f"nothing found at effort {effort}", outcome, diff)
            session.set_result(item.job_id, result)
            (mutation,), number = item.mutations, number + 1
            place = f"{mutation.module_path.name}:{mutation.start_pos[0]}"
            seconds = time.monotonic() - child.start
            print(f"{number:4}/{len(items)} {seconds:5.1f} s  {place:22} {(found or 'SURVIVED')[:90]}", flush=True)
        time.sleep(0.02)


def chosen(session: WorkDB, again: bool, sample: int | None, seed: int) -> list[WorkItem]:
    """What is pending (``again``: what survived) in an order by ``seed``, or the first so many of it."""

    def place(item: WorkItem) -> tuple[str, str, int]:
        (mutation,) = item.mutations
        return str(mutation.module_path), mutation.operator_name, mutation.occurrence

    items = sorted(_survivors(session) if again else session.pending_work_items, key=place)
    random.Random(seed).shuffle(items)
    return items[:sample]


def _survivors(session: WorkDB) -> list[WorkItem]:
    return [item for item, result in session.completed_work_items if result.test_outcome is TestOutcome.SURVIVED]


def report(session: WorkDB) -> None:
    """How many were killed, by what, and what survived."""
    results = session.completed_work_items
    run_of = [(item.mutations[0], result) for item, result in results if result.test_outcome is not None]
    skipped = Counter(result.output for _, result in results if result.test_outcome is None)
    survivors = [one for one in run_of if one[1].test_outcome is TestOutcome.SURVIVED]
    killers = Counter((result.output or "").split(" ")[0].rstrip(",:") for _, result in run_of)
    print(f"\n{len(run_of)} mutants judged, {len(run_of) - len(survivors)} killed, {len(survivors)} survive; "
          f"{len(session.pending_work_items)} not judged yet; skipped: {dict(skipped)}")  # fmt: skip
    print("killed first by:", ", ".join(f"{name} {n}" for name, n in killers.most_common() if name != "nothing"))
    for mutation, result in sorted(survivors, key=lambda one: (one[0].module_path, one[0].start_pos)):
        changed = [line for line in (result.diff or "").splitlines()[2:] if line[:1] in "+-"]
        print(f"\n{mutation.module_path}:{mutation.start_pos[0]}", *changed, sep="\n    ")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="Cosmic Ray's file of mutants and verdicts; made where missing")
    parser.add_argument("--effort", choices=("quick", "standard"), default="quick", help="of the suite")
    parser.add_argument("--again", action="store_true", help="judge the survivors again, as with --effort=standard")
    parser.add_argument("--sample", type=int, help="judge so many mutants only, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument("--jobs", type=int, default=1, help="how many mutants at a time")
    parser.add_argument("--report", action="store_true", help="judge nothing")
    given = parser.parse_args()
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    path = given.session.resolve()
    os.chdir(ROOT)
    corpus()  # read before the processes fork
    fresh = not path.exists()
    with use_db(str(path)) as session:
        if fresh:
            begin(session)
        if not given.report:
            run(session, given.effort, chosen(session, given.again, given.sample, given.seed), given.jobs)
        report(session)


if __name__ == "__main__":
    main()
