"""Candidates that do their worst: the verdict is right or honest, and every file whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from typing import Any

import jsonschema
import pytest
import torch

import sample_reports as sample
from detr_conformance import Candidate, judge
from detr_conformance.report import files, schema
from detr_conformance.soundness import BROKEN
from detr_reference.criterion import build_criterion
from test_reports import Page, document, html

torch.set_num_threads(1)


class Doing:
    """The reference, with something done before each of its calls, and something to what it returns."""

    def __init__(self, inner: Any, before: Any, after: Any) -> None:
        self.inner, self.before, self.after = inner, before, after
        self.weight_dict = inner.weight_dict

    def __call__(self, outputs: Any, targets: Any) -> Any:
        self.before()
        return self.after(self.inner(outputs, targets))


def doing(before: Any = lambda: None, after: Any = lambda losses: losses, name: str = "hostile") -> Candidate:
    def build(num_classes: int = 91, num_decoder_layers: int = 6) -> Any:
        return Doing(build_criterion(num_classes, num_decoder_layers, "detr"), before, after)

    return Candidate(build, "detr", name=name)


def judged(candidate: Any, *clauses: str, limit: float = 20.0):
    """The report, once every form of it has been seen to be whole."""
    report = judge(candidate, effort="quick", clauses=clauses or ("KEY-1", "KEY-2"), limit=limit)
    assert report.complete
    assert not [f for f in report.findings if f.verdict == "error"]
    written = document(report)
    jsonschema.validate(written, schema.schema())
    assert files.read(written)[0].findings == report.findings
    assert len(json.dumps(written)) < 1_000_000
    found = html(report)
    assert isinstance(found, Page)
    assert not {"script", "img"} & set(found.tags)
    return report


def raising(error: BaseException) -> Candidate:
    def before() -> None:
        raise error

    return doing(before)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Keys(dict):
    def items(self) -> Any:
        raise RuntimeError("no items")


@pytest.mark.parametrize(
    "candidate",
    [
        raising(RuntimeError(sample.HOSTILE)),
        raising(RuntimeError("x" * 10_000_000)),
        raising(RuntimeError("\n" * 10_000_000 + "end")),
        raising(Unprintable()),
        raising(KeyboardInterrupt()),
        raising(SystemExit("\udcff")),
        doing(lambda: os._exit(0)),
        doing(lambda: os.abort()),
        doing(after=Keys),
        doing(after=lambda losses: {f"{sample.HOSTILE}{i}": v for i in range(3000) for v in losses.values()}),
    ],
    ids=["html", "long", "lines", "unprintable", "interrupt", "exit", "_exit", "abort", "items", "keys"],
)
def test_what_cannot_be_called_is_not_conformant(candidate):
    report = judged(candidate)
    assert not report.conformant
    assert report.verdict == "nothing was judged"
    assert len(report.findings[0].message) < 25_000


def test_a_name_is_shown_and_not_run():
    report = judged(doing(name=sample.HOSTILE))
    assert report.conformant
    assert "<script>" in report.candidate
    assert "\x1b" not in report.candidate


def test_a_failure_in_the_middle_has_foreign_words():
    def after(losses: Any) -> Any:
        if losses["loss_bbox"].item() == 0:
            raise RuntimeError(f"<b>{object()}</b>\udc80")
        return losses

    message = judged(doing(after=after), "MATCH-5").finding("MATCH-5").message
    assert "0x…" in message
    assert "\ufffd" in message or "\udc80" not in message


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends_at_the_limit(stream):
    def before() -> None:
        while True:
            print("no end of it " * 1000, file=getattr(sys, stream))

    start = time.monotonic()
    report = judged(doing(before), limit=2)
    assert "did not return within 2 s" in report.findings[0].message
    assert time.monotonic() - start < 60


def test_closed_streams_harm_nobody():
    def before() -> None:
        sys.stdout.close()
        for stream in (0, 1, 2):
            with contextlib.suppress(OSError):
                os.close(stream)

    assert judged(doing(before)).conformant


def test_closing_every_file_is_an_end_of_the_process():
    report = judged(doing(lambda: os.closerange(0, 256)))
    assert not report.conformant


def test_memory_that_runs_out_is_the_candidate_s_fault():
    resource = pytest.importorskip("resource")
    kept: list[bytes] = []

    def before() -> None:
        with open("/proc/self/statm") as file:  # a limit in its own process alone, so that nobody else is harmed
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 50_000_000, now + 50_000_000))
        while True:
            kept.append(bytes(1_000_000))

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this platform does not tell how much memory a process has")
    report = judged(doing(before))
    assert not report.conformant


def test_results_that_change_are_no_pure_function():
    count = itertools.count()
    report = judged(doing(after=lambda losses: {k: v + next(count) for k, v in losses.items()}), "PURE-2")
    assert "PURE-2" in {f.clause for f in report.failed}


# --- torch under other hands, in the candidate's process only ---


def halved(losses: Any) -> Any:
    return {k: v / 2 if "bbox" in k else v for k, v in losses.items()}


def test_a_function_of_torch_that_is_replaced_decides_nothing():
    right = torch.Tensor.abs

    def before() -> None:
        torch.Tensor.abs = lambda self: right(self) / 2  # type: ignore[method-assign]

    report = judged(doing(before), "NORM-1", "COST-6")
    assert not report.conformant
    assert BROKEN in {f.message for f in report.findings if f.verdict == "blocked"}
    assert torch.Tensor.abs is right


def test_gradients_switched_off_for_good_are_no_bug_of_ours():
    report = judged(doing(lambda: torch.autograd.set_grad_enabled(False)), "GRAD-1", "KEY-1")
    assert not report.conformant


@pytest.mark.parametrize(
    "before",
    [
        lambda: setattr(torch, "manual_seed", lambda seed: None),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: setattr(torch, "equal", lambda *_: True),
    ],
    ids=["manual_seed", "default dtype", "equal"],
)
def test_a_wrong_loss_is_found_whatever_else_was_changed(before):
    report = judged(doing(before, halved), "NORM-1")
    assert not report.conformant
    finding = report.finding("loss_bbox_is_the_sum_of_l1_over_nb")
    assert finding.verdict == "fail" or finding.message == BROKEN
