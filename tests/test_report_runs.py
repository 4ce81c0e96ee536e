"""The reports of a run of pytest: complete or visibly not, and the same every time."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from _pytest._io import TerminalWriter

from detr_conformance import judge
from detr_conformance.plugin import Shown
from detr_conformance.report import files, schema

TESTS = Path(__file__).parent
QUICK = ("--conformance-profile=detr", "--conformance-effort=quick", "--clause=KEY-1", "--clause=KEY-2")
WRONG = ("--candidate=candidates:returns_vectors", *QUICK)
RIGHT = ("--candidate=candidates:right", *QUICK)
PLAIN = "KEY-2  Sentence.\n      want        a scalar\n                  more\n"
RAISES = ("--candidate=candidates:raises", *QUICK)  # which is over soon


@pytest.fixture
def run(pytester, monkeypatch):
    """pytest in an empty folder, in a process of its own, with tests/candidates.py importable."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return lambda *arguments: pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def written(pytester, folder: str = "out") -> dict:
    return json.loads((pytester.path / folder / "report.json").read_text("utf-8"))


def test_one_run_writes_everything(pytester, run, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    result = run(*WRONG, "--conformance-report=out", "--junitxml=junit.xml")
    assert result.ret == 1
    document = written(pytester)
    jsonschema.validate(document, schema.schema())
    (report,) = files.read(document)
    assert document["complete"]
    assert report.verdict == "not conformant"
    assert {f.clause for f in report.failed} == {"KEY-2"}
    assert report.source["module"] == "candidates"
    assert report.seconds > 0
    summary = (pytester.path / "summary.md").read_text("utf-8")
    assert summary.rstrip("\n") == (pytester.path / "out" / "report.md").read_text("utf-8").rstrip("\n")
    badge = json.loads((pytester.path / "out" / "badge.json").read_text("utf-8"))
    assert badge["message"] == "detr must · not conformant · only KEY-1, KEY-2 · 1 clause broken"
    cases = ET.parse(pytester.path / "junit.xml").getroot().findall(".//testcase")
    properties = [{p.get("name"): p.get("value") for p in case.iter("property")} for case in cases]
    assert {"clause": "KEY-2", "level": "must", "verdict": "fail"} in properties
    assert all(set(p) == {"clause", "level", "verdict"} for p in properties)
    # a link to a script that shows the failure leads there
    for finding in report.failed:
        assert not finding.repro or (pytester.path / finding.repro).is_file()


def test_the_same_twice_differs_in_nothing_but_times():
    one, two = (judge("candidates:returns_vectors", profile="detr", effort="quick", clauses=["KEY-2"]) for _ in "ab")
    documents = [files.document([r], "then") for r in (replace(one, seconds=0.0), replace(two, seconds=0.0))]
    assert one.failed
    assert documents[0] == documents[1]


def test_a_run_that_leaves_checks_out_is_not_complete(pytester, run):
    result = run(*RIGHT, "--conformance-report=out", "-k", "KEY-1")
    document = written(pytester)
    jsonschema.validate(document, schema.schema())
    assert result.ret == 1
    assert not document["complete"]
    assert document["reports"][0]["missing"] == ["every_trained_loss_is_a_scalar_tensor"]
    assert "detr, must: INCOMPLETE" in str(result.stdout)
    assert "1 check: left out, or the run was cut short" in str(result.stdout)


def test_an_interrupted_run_writes_what_it_has(pytester, run):
    pytester.makeconftest(
        """
        def pytest_runtest_setup(item):
            if item.name.startswith("KEY-2"):
                raise KeyboardInterrupt
        """
    )
    result = run(*RIGHT, "--conformance-report=out")
    assert result.ret == 2
    document = written(pytester)
    assert not document["complete"]
    assert document["reports"][0]["verdict"] == "incomplete"
    assert [f["clause"] for f in document["reports"][0]["findings"]] == ["KEY-1"]


def test_a_folder_that_cannot_be_written_to_is_said(pytester, run):
    (pytester.path / "out").write_text("a file")
    result = run(*RAISES, "--conformance-report=out")
    assert result.ret == 1
    assert "no report in out: File exists" in str(result.stdout)


def test_a_failure_is_printed_in_colour():
    out = io.StringIO()
    writer = TerminalWriter(out)
    for writer.hasmarkup in (True, False):
        Shown("KEY-2  Sentence.\n      want        a scalar\n                  more").toterminal(writer)
    coloured, plain = out.getvalue()[: -len(PLAIN)], out.getvalue()[-len(PLAIN) :]
    assert plain == PLAIN
    assert "\x1b[31m\x1b[1mKEY-2\x1b[0m" in coloured
    assert "\x1b[2m      want\x1b[0m        a scalar" in coloured
