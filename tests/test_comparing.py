"""detr-conformance diff and matrix."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import sample_reports as sample
from detr_conformance import comparing
from detr_conformance.cli import app
from detr_conformance.report import files, page
from test_reports import Page

run = CliRunner().invoke
MATCHING, L1, BLOCKED, GRAD, DEVICE = sample.FINDINGS
FIXED = replace(L1, verdict="pass", evidence=None, diagnosis=None, message="")


@pytest.fixture
def written(tmp_path):
    """Writes reports to a file and returns its name."""

    def write(name, *reports):
        path = tmp_path / name
        path.write_text(json.dumps(files.document(reports)), "utf-8")
        return str(path)

    return write


def changes(old, new):
    return [(c.kind, c.check) for c in comparing.difference(old, new).changes]


# --- diff ---


def test_the_same_report_differs_in_nothing(written):
    old, new = written("old.json", sample.report()), written("new.json", sample.report(seconds=9.0))
    result = run(app, ["diff", old, new])
    assert result.exit_code == 0
    assert "mypkg.criterion, detr: not conformant · no difference" in result.output


def test_what_broke_ends_with_1(written):
    old, new = written("old.json", sample.report(findings=(MATCHING, FIXED))), written("new.json", sample.report())
    result = run(app, ["diff", old, new])
    assert result.exit_code == 1
    assert "broke    NORM-1" in result.output
    assert "pass → fail, looks like l1-on-corners" in result.output


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (FIXED, L1, ["broke"]),
        (FIXED, replace(L1, verdict="blocked"), ["broke"]),
        (L1, FIXED, ["mended"]),
        (L1, replace(L1, diagnosis=None), ["changed"]),
        (L1, replace(L1, verdict="deviation"), ["mended"]),
        (FIXED, replace(FIXED, verdict="declined"), ["changed"]),
        (replace(L1, level="information"), replace(FIXED, level="information"), []),
    ],
)
def test_kinds_of_changes(before, after, kind):
    found = changes(sample.report(findings=(before,)), sample.report(findings=(after,)))
    assert [k for k, _ in found] == kind


def test_a_new_check_that_fails_breaks_what_was_whole():
    one, two = sample.report(findings=(MATCHING,)), sample.report(findings=(MATCHING, L1))
    assert changes(one, two) == [("broke", L1.check)]
    assert changes(replace(one, clauses=("MATCH",)), two) == [("changed", L1.check)]


def test_what_was_not_judged_alike_is_said(written):
    old = written("old.json", sample.report())
    new = written("new.json", sample.report(effort="deep", missing=("a_check",), clauses=("NORM",)))
    result = run(app, ["diff", old, new])
    for said in ("effort was quick, is deep", "new report is not complete: 1 checks", "about NORM only"):
        assert said in result.output


def test_a_difference_for_machines(written):
    old, new = written("old.json", sample.report(findings=(FIXED,))), written("new.json", sample.report(findings=(L1,)))
    (found,) = json.loads(run(app, ["diff", old, new, "--json"]).stdout)
    assert found["broke"]
    assert found["changes"][0] == {
        "kind": "broke",
        "clause": "NORM-1",
        "check": "loss_bbox_is_the_sum",
        "before": "pass",
        "after": "fail, looks like l1-on-corners",
    }


def test_candidates_of_runs_of_several_are_paired_by_name(written):
    other = replace(sample.right, candidate="other")
    old = written("old.json", sample.right, other)
    new = written("new.json", sample.right, replace(other, candidate="another"))
    result = run(app, ["diff", old, new])
    assert result.exit_code == 0
    assert "other (detr) is in the old report only" in result.output
    none = run(app, ["diff", written("a.json", sample.right, other), written("b.json", sample.report())])
    assert none.exit_code == 4
    assert "no candidate is in both reports" in none.output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b"{", "not JSON"),
        (b"[1]", "not a report of detr-conformance"),
        (b'{"format": "urn:detr-conformance:report:1"}', "not a whole report"),
        (b'{"format":"urn:detr-conformance:report:1","written":"","complete":true,"reports":[]}', "holds no report"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("command", ["diff", "matrix"])
def test_what_is_no_report_is_refused_in_one_line(tmp_path, written, command, content, words):
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    result = run(app, [command, written("good.json", sample.right), str(bad)])
    assert result.exit_code == 4
    assert words in result.output
    assert result.output.startswith(f"error: {bad}: ")
    assert len(result.output.splitlines()) == 1


# --- matrix ---


def test_a_matrix_has_verdicts_and_what_failures_look_like(written):
    paths = [written("a.json", sample.report()), written("b.json", sample.right)]
    shown = run(app, ["matrix", *paths], env={"COLUMNS": "120"}).output
    assert "detr: not conformant" in shown
    assert "fail: l1-on-corners" in shown
    assert "blocked: loss bbox is the sum" in shown


def test_a_matrix_for_machines(written):
    found = json.loads(run(app, ["matrix", written("a.json", sample.report(), sample.right), "--json"]).stdout)
    assert [c["name"] for c in found["columns"]] == ["mypkg.criterion", "mypkg.right"]
    cells = {row["clause"]: [c["verdict"] for c in row["cells"]] for row in found["rows"]}
    assert cells == {
        "MATCH-2": ["pass", "pass"],
        "NORM-1": ["fail", "absent"],
        "NORM-3": ["blocked", "absent"],
        "GRAD-1": ["fail", "absent"],
        "DEVICE-1": ["declined", "absent"],
    }


def test_a_matrix_as_markdown(written):
    lines = run(app, ["matrix", written("a.json", sample.report()), "--markdown"]).output.splitlines()
    assert lines[0] == "| clause | `mypkg.criterion`<br>detr: not conformant |"
    assert "| NORM-1 | fail: l1-on-corners |" in lines


def test_a_matrix_as_a_page(written, tmp_path):
    out = tmp_path / "matrix.html"
    result = run(app, ["matrix", written("a.json", sample.report(), sample.right), "--html", str(out)])
    assert result.exit_code == 0
    found = Page(out.read_text("utf-8"))
    assert not {"script", "img"} & set(found.tags)
    assert all(link == "data:," or link[1:] in found.ids for link in found.links)
    assert "l1-on-corners" in found.words


def test_the_same_name_twice_is_told_apart_and_differences_are_said():
    twins = [("a.json", sample.report()), ("b.json", sample.report(effort="deep", missing=("x",)))]
    found = comparing.matrix(twins)
    assert [c["name"] for c in found.columns] == ["mypkg.criterion (a.json)", "mypkg.criterion (b.json)"]
    assert found.remarks == ["judged with different efforts: quick, deep", "mypkg.criterion (b.json) is not complete"]


def test_a_page_of_foreign_text_stays_text():
    bad = comparing.matrix([("a", sample.report(candidate=sample.HOSTILE))])
    assert not {"script", "img"} & set(Page(page.matrix(bad)).tags)


@pytest.mark.parametrize("command", ["diff", "matrix"])
def test_the_help_shows_an_example(command):
    assert f"Example: detr-conformance {command}" in " ".join(run(app, [command, "--help"]).output.split())
