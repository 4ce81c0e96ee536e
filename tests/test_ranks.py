"""Several ranks: right criterions pass, wrong ones are named, and whatever a rank does, no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist

from detr_conformance import devices, diagnosis, judge, ranks
from detr_conformance.candidate import Candidate, bind
from detr_conformance.cases import Recipe, build
from detr_conformance.observation import observe
from detr_conformance.runner import Judge, Settings
from detr_reference import criterion as reference
from detr_reference.options import PROFILES

torch.set_num_threads(1)
REFERENCE = "detr_reference.criterion"
DIST = {"effort": "quick", "clauses": ["DIST"]}


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch):
    """What is named must not depend on how busy the machine is."""
    monkeypatch.setattr(diagnosis, "SECONDS", 20.0)


@pytest.fixture(autouse=True)
def forked_pids(monkeypatch):
    """All ranks that a test starts in its own process; none may be left."""
    pids, fork = [], os.fork

    def noted() -> int:
        pid = fork()
        pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", noted)
    yield pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def case_of(bound, counts=(3, 1)):
    return build(Recipe(1, counts, 4, classes=3, aux=1, encoder_queries=4), bound.options, bound.varies)


def on_ranks(act, profile="deformable-detr"):
    """The reference which does ``act(number of targets)`` first, where there are several ranks."""

    def factory(num_classes: int = 91, num_decoder_layers: int = 6):
        inner = reference.build_criterion(num_classes, num_decoder_layers, profile)

        def criterion(outputs, targets):
            if dist.is_initialized():
                act(sum(len(t["labels"]) for t in targets))
            return inner(outputs, targets)

        criterion.weight_dict = inner.weight_dict
        return criterion

    return Candidate(factory, profile, name="changed on ranks")


# --- verdicts ---


@pytest.mark.parametrize("profile", PROFILES)
def test_a_right_criterion_passes(profile):
    report = judge(REFERENCE, profile=profile, **DIST)
    assert [f.message for f in report.findings if f.verdict != "pass"] == []


def counted(monkeypatch, over_ranks):
    monkeypatch.setattr(reference, "_num_boxes", lambda n, device: over_ranks(n))
    return judge(REFERENCE, profile="dino", **DIST)


def summed(n):
    total = torch.tensor(float(n))
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def test_the_own_number_of_targets_is_named(monkeypatch):
    found = counted(monkeypatch, lambda n: max(n, 1.0)).finding("DIST-1")
    assert found.verdict == "fail"
    assert "nb = max((" in found.message
    assert [id for id, _ in found.diagnosis.faults] == ["nb-of-the-own-rank"]


def test_the_number_of_targets_of_all_ranks_is_named(monkeypatch):
    report = counted(monkeypatch, lambda n: max(summed(n), 1.0))
    assert report.finding("DIST-1").verdict == "fail"
    assert report.finding("DIST-2").verdict == "blocked"
    assert report.finding("DIST-3").verdict == "pass"


def test_a_rank_that_others_wait_for_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "LIMIT", 5.0)
    report = counted(monkeypatch, lambda n: max(summed(n) / 2, 1.0) if n else 1.0)
    assert "did not return though rank" in report.finding("DIST-3").message


def test_what_a_criterion_gets_wrong_in_one_process_is_no_news_on_ranks(monkeypatch):
    report = counted(monkeypatch, lambda n: 3.0 * max(n, 1))
    assert {f.verdict for f in report.findings if f.clause in ("DIST-1", "DIST-2")} <= {"declined", "blocked"}


def test_a_candidate_with_a_process_group_of_its_own_is_declined():
    folder = tempfile.mkdtemp()

    def factory(num_classes: int = 91, num_decoder_layers: int = 6):
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        return reference.build_criterion(num_classes, num_decoder_layers, "dino")

    report = judge(Candidate(factory, "dino"), **DIST)
    assert {(f.verdict, f.message) for f in report.findings} == {
        ("declined", "the candidate has initialised a process group of its own")
    }


# --- reducing with accelerate, whose reduce() takes the mean ---


def by_accelerate(divide_again):
    def over_ranks(n):
        total = torch.tensor(float(n))
        if not dist.is_initialized():
            return max(float(total), 1.0)
        state = accelerate.PartialState()
        mean = accelerate.utils.reduce(total, "mean")
        return max(float(mean) / (state.num_processes if divide_again else 1), 1.0)

    return over_ranks


def test_the_mean_by_accelerate_is_right(monkeypatch):
    assert counted(monkeypatch, by_accelerate(divide_again=False)).conformant


def test_dividing_it_again_is_named(monkeypatch):
    finding = counted(monkeypatch, by_accelerate(divide_again=True)).finding("DIST-1")
    assert [id for id, _ in finding.diagnosis.faults] == ["mean-over-ranks-divided-by-the-world-again"]


def test_transformers_divides_it_again():
    finding = judge("transformers-detr", **DIST).finding("DIST-1")
    assert [id for id, _ in finding.diagnosis.faults] == ["mean-over-ranks-divided-by-the-world-again"]


# --- ranks that end otherwise ---


def end(n):
    if n == 1:
        os._exit(7)


def kill(n):
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(n):
    if n == 1:
        raise RuntimeError("not on this rank")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (end, "rank 1 ended the process with exit status 7"),
        (kill, "rank 1 was killed by signal 9"),
        (fail, "rank 1: RuntimeError: not on this rank"),
    ],
)
def test_a_rank_that_fails_is_named_and_not_those_that_wait_for_it(act, words):
    bound = bind(on_ranks(act))
    (got,) = ranks.forked(bound, case_of(bound)).calls.values()
    assert got.raised == words


def test_a_rank_that_fails_is_a_finding():
    assert "not on this rank" in judge(on_ranks(fail), **DIST).finding("DIST-1").message


@pytest.mark.parametrize("who", [0, 1, 3])
def test_hung_ranks_are_ended_within_the_limit(monkeypatch, who):
    monkeypatch.setattr(ranks, "LIMIT", 2.0)
    bound = bind(on_ranks(lambda n: time.sleep(1000) if n >= who else None))
    start = time.monotonic()
    found = ranks.forked(bound, case_of(bound))
    assert time.monotonic() - start < 10
    assert "did not return" in found.stuck
    assert "(not within 2 s)" in found.stuck
    start = time.monotonic()
    assert "(not within 1 s)" in ranks.forked(bound, case_of(bound)).stuck  # known by now
    assert time.monotonic() - start < 5


def test_a_slow_rank_is_not_stuck():
    bound = bind(on_ranks(lambda n: time.sleep(3 * ranks.GRACE) if n == 1 else None))
    found = ranks.forked(bound, case_of(bound))
    assert found.stuck == ""
    assert list(found.calls) == [0, 1]


def test_ranks_end_soon_after_whoever_started_them():
    code = """
        import os, time, threading
        from detr_conformance import ranks
        from test_ranks import bind, case_of, on_ranks
        ranks.LIMIT, fork = 2.0, os.fork
        def noted():
            pid = fork()
            print(pid, flush=True) if pid else None
            return pid
        os.fork = noted
        bound = bind(on_ranks(lambda n: time.sleep(1000)))
        ranks._interface()
        print("now", flush=True)
        ranks.forked(bound, case_of(bound))
        """
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "now":
        assert process.poll() is None
    pids = [int(process.stdout.readline()) for _ in "ab"]
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if not any(map(running, pids)):
            return
        time.sleep(0.1)
    raise AssertionError("ranks are left")


def running(pid: int) -> bool:
    """Not so for a zombie, which whoever adopted it has yet to take away."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return False


# --- beside an accelerator ---


def test_beside_an_accelerator_a_fresh_process_starts_the_ranks(monkeypatch):
    bound = bind(REFERENCE, "dino")
    case = case_of(bound)
    here = ranks.call(bound, case)
    monkeypatch.setattr(devices, "present", lambda: ("cuda",))
    assert ranks.declined(bound) == ""
    there = ranks.call(bound, case)
    assert {r: got.losses for r, got in there.calls.items()} == {r: got.losses for r, got in here.calls.items()}
    ranks._starter.cache_clear()


def test_a_starter_that_cannot_bind_the_candidate_says_so():
    starter = ranks._Starter("no_such_module", "dino")
    bound = bind(REFERENCE, "dino")
    with pytest.raises(ranks.RanksError, match="ended with exit status 1"):
        starter.call(case_of(bound))


def test_beside_an_accelerator_a_live_object_is_declined(monkeypatch):
    monkeypatch.setattr(devices, "present", lambda: ("cuda",))
    found = Judge(on_ranks(lambda n: None), Settings(effort="quick")).finding("nb_is_the_mean_over_ranks")
    assert found.verdict == "declined"
    assert "live object" in found.message


# --- the numbers ---


def test_a_rank_divides_by_the_mean_number_of_targets():
    bound = bind(REFERENCE, "dino")
    for counts, nb in (((3, 1), 2.0), ((2, 0, 3), 5 / 3), ((1, 0), 1.0)):
        case = case_of(bound, counts)
        for rank, got in ranks.forked(bound, case).calls.items():
            alone = observe(bound, case.images([rank]))
            for key in ("loss_bbox", "loss_giou_0", "loss_ce_interm"):
                assert got.losses[key] == pytest.approx(alone.losses[key] * max(counts[rank], 1) / nb, rel=1e-6)
