"""Inputs that one run finds are tried by the next, on this machine or another; reports of shards become one."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from detr_conformance import judge
from detr_conformance.candidate import Candidate, bind
from detr_conformance.cases import Recipe, build
from detr_conformance.cli import app
from detr_conformance.errors import ConformanceError
from detr_conformance.experiments import BATCH
from detr_conformance.merging import merged
from detr_conformance.registry import checks
from detr_conformance.report import files
from detr_conformance.runner import Judge, Settings
from detr_conformance.sharing import Shared
from detr_reference.criterion import build_criterion
from detr_reference.options import options_of

torch.set_num_threads(1)
RARE = build(Recipe(4711, (2, 1), 4, classes=3), options_of("detr").with_(num_classes=3), frozenset())


def rarely_wrong(num_classes=91, num_decoder_layers=6, eos_coef=0.1):
    """A criterion that is wrong on one input alone, which no search would find."""
    inner = build_criterion(num_classes, num_decoder_layers, "detr", eos_coef=eos_coef)

    def criterion(outputs, targets):
        found = inner(outputs, targets)
        rare = any(torch.equal(t["boxes"], w["boxes"]) for t, w in zip(targets, RARE.targets, strict=False))
        return {**found, "loss_bbox": found["loss_bbox"] * 2} if rare else found

    criterion.weight_dict = inner.weight_dict
    criterion.matcher = inner.matcher
    return criterion


@pytest.fixture
def server(tmp_path):
    """The address of a redis-server of our own."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on this machine; Debian's package redis-server has it")
    socket = tmp_path / "redis.sock"
    running = subprocess.Popen([program, "--port", "0", "--unixsocket", str(socket), "--save", ""], cwd=tmp_path)
    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        yield f"unix://{socket}"
    finally:
        running.kill()
        running.wait()


def l1_fails(database):
    settings = Settings(profile="detr", effort="quick", database=database)
    found = Judge(Candidate(rarely_wrong, "detr"), settings)
    return any(found.failing(c) for c in checks("detr", only=["NORM-1"]))


def kept_by_another_run(where):
    Shared(where).keep(bind(Candidate(rarely_wrong, "detr")), BATCH, RARE)


def test_what_one_run_found_the_next_one_tries(tmp_path):
    assert not l1_fails("")
    kept_by_another_run(str(tmp_path / "found"))
    assert l1_fails(str(tmp_path / "found"))


def test_machines_share_through_redis(server):
    kept_by_another_run(server)
    assert l1_fails(server)


def test_a_failing_input_is_kept(tmp_path):
    where = str(tmp_path / "found")
    settings = Settings(profile="detr", effort="quick", database=where)
    always = Candidate(lambda **o: _doubled(build_criterion(profile="detr", **o)), "detr")
    name = next(c.name for c in checks("detr", only=["NORM-1"]))
    assert Judge(always, settings).finding(name).verdict == "fail"
    assert list(Shared(where).cases(bind(Candidate(rarely_wrong, "detr")), BATCH))


def _doubled(inner):
    def criterion(outputs, targets):
        found = inner(outputs, targets)
        return {**found, "loss_bbox": found["loss_bbox"] * 2}

    criterion.weight_dict = inner.weight_dict
    criterion.matcher = inner.matcher
    return criterion


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("redis://127.0.0.1:1/0", "cannot be used: "),
        ("http://example.org", "it must be a folder or redis://host:port/number"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(where, words):
    with pytest.raises(ConformanceError, match="database=") as error:
        Judge("detr_reference.criterion", Settings(database=where))
    assert words in str(error.value)


# --- shards ---


@pytest.fixture(scope="module")
def shards():
    how = {"profile": "detr", "effort": "quick"}
    return [judge("detr_reference.criterion", clauses=[c], seed=i, **how) for i, c in enumerate(["BOX-2", "NORM-1"])]


def test_shards_merge_into_one_report(shards):
    (whole,) = merged(shards)
    assert whole.conformant
    assert {f.clause for f in whole.findings} == {"BOX-2", "NORM-1"}
    assert whole.notes == ("merged from 2 reports with the seeds 0, 1",)


def test_a_failure_of_one_shard_is_one_of_all(shards):
    broken = replace(shards[1], findings=tuple(replace(f, verdict="fail") for f in shards[1].findings))
    (whole,) = merged([shards[0], shards[1], broken])
    assert not whole.conformant
    assert whole.finding("NORM-1").decided == 2 * shards[1].finding("NORM-1").decided


def test_reports_of_other_profiles_do_not_merge(shards):
    with pytest.raises(ConformanceError, match="the profile of one is 'detr', of another 'dino'"):
        merged([shards[0], replace(shards[1], profile="dino")])


def test_the_command_writes_the_merged_report(shards, tmp_path):
    for i, report in enumerate(shards):
        files.write([report], str(tmp_path / str(i)))
    given = [str(tmp_path / str(i) / "report.json") for i in range(2)]
    result = CliRunner().invoke(app, ["merge", *given, "--to", str(tmp_path / "all")])
    assert result.exit_code == 0, result.output
    assert "CONFORMANT  2 of 2 clauses met" in result.output
    assert (tmp_path / "all" / "report.html").is_file()
