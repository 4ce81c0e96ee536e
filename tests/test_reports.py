"""What is written of a report: screen, JSON, Markdown, HTML, badge."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import jsonschema
import pytest

import sample_reports as sample
from detr_conformance import cleaning
from detr_conformance.findings import Numbers, report_from
from detr_conformance.report import badge, drawing, files, markdown, page, schema, summary, terminal

WRITTEN = "2026-01-01T00:00:00+00:00"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags that close as they open, ids, and what is linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def html(*reports) -> Page:
    return Page(page.html(reports, WRITTEN))


def hostile():
    bad = sample.HOSTILE
    shown = sample.evidence(inputs=bad, what=bad, want=bad, got=bad, how=bad, case=bad)
    failing = replace(sample.FINDINGS[1], message=bad, evidence=shown)
    blocked = replace(sample.FINDINGS[2], message=bad)
    return cleaning.cleaned(
        sample.report(
            candidate=bad,
            spec=bad,
            notes=(bad,),
            options={bad: bad},
            findings=(failing, blocked),
            source={"module": bad},
        )
    )


# --- the screen ---


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [False, True], ids=["plain", "colour"])
def test_the_screen(width, colour, snapshot):
    shown = terminal.text(sample.report(), width, colour)
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in shown.splitlines()) <= width
    assert shown == snapshot


def test_the_last_line_of_what_was_left_out():
    shown = terminal.text(sample.report(findings=sample.FINDINGS[:1], missing=("a_check", "another_check")), 120)
    assert "detr, must: INCOMPLETE  1 of 1 clauses met" in shown
    assert "not judged  2 checks: left out, or the run was cut short: a check, another check" in shown


def test_the_last_line_names_what_alone_was_asked_for():
    assert "only BOX-2 were asked for" in terminal.text(replace(sample.right, clauses=("BOX-2",)), 120)


# --- JSON ---


def document(*reports) -> dict:
    return json.loads(json.dumps(files.document(reports), allow_nan=False))


def test_the_schema_is_that_of_the_dataclasses():
    assert json.loads(files.SCHEMA.read_text("utf-8")) == json.loads(json.dumps(schema.schema()))
    jsonschema.Draft202012Validator.check_schema(schema.schema())


def test_a_report_is_valid_and_comes_back_as_it_was():
    written = document(sample.report(), sample.right)
    jsonschema.validate(written, schema.schema())
    one, other = files.read(written)
    assert other == sample.right
    assert repr(one) == repr(sample.report())  # NaN is not equal to itself


def test_numbers_that_are_not_finite_are_valid_json():
    numbers = document(sample.report())["reports"][0]["findings"][3]["evidence"]["numbers"]
    assert (numbers["want"], numbers["got"]) == ("inf", "nan")
    assert math.isnan(report_from(document(sample.report())["reports"][0]).findings[3].evidence.numbers.got)


def test_a_report_that_was_cut_short_is_visibly_so():
    written = document(sample.right, sample.report(missing=("a_check",)))
    assert not written["complete"]
    assert [r["complete"] for r in written["reports"]] == [True, False]
    assert not replace(sample.right, missing=("a_check",)).conformant


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d | {"format": "urn:detr-conformance:report:99"}, "format is not"),
        (lambda d: d | {"more": 1}, "'more' was unexpected"),
        (lambda d: {k: v for k, v in d.items() if k != "complete"}, "'complete' is a required property"),
        (lambda d: d | {"reports": [{}]}, "is a required property"),
        (lambda d: [d], "not a report of detr-conformance"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        files.read(change(document(sample.right)))


# --- files ---


def test_all_files_are_written(tmp_path):
    files.write([sample.report()], str(tmp_path / "new" / "folder"))
    names = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert names == ["badge.json", "report.html", "report.json", "report.md"]


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_summary_is_appended(tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    files.append_summary([sample.right], str(path))
    assert path.read_text("utf-8").startswith("before\n## ✅ `mypkg.right`: conformant\n")


# --- Markdown ---


def test_the_markdown(snapshot):
    assert markdown.text([sample.report(), sample.right]) == snapshot


def test_markdown_of_foreign_text_stays_text():
    shown = markdown.text([hostile()])
    outside = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", shown)
    outside = re.sub(r"(`+) .*? \1", "", outside)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "\x1b" not in shown


def test_many_failures_are_cut():
    shown = markdown.text([sample.report(findings=sample.FINDINGS[1:2] * 30)])
    assert shown.count("<details>") == markdown.MOST
    assert "20 more failures stand in report.html." in shown


# --- badge ---


@pytest.mark.parametrize(
    ("report", "message", "colour"),
    [
        (sample.right, "detr must · conformant", "brightgreen"),
        (sample.report(), "detr must · not conformant · 2 clauses broken", "red"),
        (replace(sample.right, clauses=("MATCH",)), "detr must · conformant · only MATCH", "green"),
        (replace(sample.right, missing=("a_check",)), "detr must · incomplete", "lightgrey"),
        (
            replace(sample.right, findings=(*sample.FINDINGS[:1], replace(sample.FINDINGS[1], verdict="deviation"))),
            "detr must · conformant · 1 deviation",
            "green",
        ),
    ],
)
def test_the_badge(report, message, colour):
    assert badge.data([report]) == {
        "schemaVersion": 1,
        "label": "DETR criterion",
        "message": message,
        "color": colour,
    }


# --- HTML ---


@pytest.mark.parametrize("reports", [(sample.report(), sample.right), (sample.report(findings=(), missing=("x",)),)])
def test_the_page_is_well_formed_and_stands_alone(reports):
    found = html(*reports)
    assert not {"script", "img", "iframe", "object", "base", "form"} & set(found.tags)
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        assert link == "data:," or link[1:] in found.ids, link


def test_the_page_shows_a_failure():
    words = " ".join(html(sample.report()).words.split())
    for said in (
        "not conformant", "1 of 4 clauses met", "NORM-1", "What NORM-1 says.", "Looks like l1-on-corners",
        "24 of 24 inputs", "Usual fix: compare centres and sides", "0.875", "off -14.3 %", "candidate q0→t0",
        "cheapest q1→t0", "far-away (off the line)", "pytest --candidate=mypkg.criterion --clause=NORM-1",
        "no accelerator was asked for", "DEVICE-1", "blocked by NORM-1",
    ):  # fmt: skip
        assert said in words, said


def test_the_page_of_foreign_text_stays_text():
    found = html(hostile())
    assert not {"script", "img"} & set(found.tags)
    assert not [a for a in found.attributes if a.startswith("on")]
    assert "<script>alert(1)</script>" in found.words
    assert "javascript:1" not in " ".join(found.links)


def test_the_page_names_the_known_faults_of_a_check():
    found = replace(sample.FINDINGS[0], check="the_assignment_is_optimal", verdict="pass")
    shown = html(sample.report(findings=(found,))).words
    assert "every-target-takes-its-cheapest-query" in shown or "greedy" in shown


# --- drawings ---


def test_boxes_and_both_matchings_are_drawn():
    (picture,) = drawing.pictures(sample.evidence())
    assert [(b.name, b.centre) for b in picture.boxes] == [
        ("t0", (100, 150)), ("q0", (50, 50)), ("q1", (200, 150)),
    ]  # fmt: skip
    assert [(k.kind, k.query, k.target) for k in picture.links] == [("got", "q0", "t0"), ("best", "q1", "t0")]
    left, _, width, _ = picture.view
    assert left + width >= 225  # query 1 reaches out of the image


def test_of_many_queries_the_matched_are_drawn():
    (picture,) = drawing.pictures(sample.evidence(call=sample.call(queries=20)))
    assert [b.name for b in picture.boxes] == ["t0", "q0", "q1"]
    assert picture.left_out == "18 unmatched queries are not drawn"


@pytest.mark.parametrize("npz", ["", "AAAA", "not base64!"])
def test_a_call_that_cannot_be_read_is_not_drawn(npz):
    assert drawing.pictures(sample.evidence(call=replace(sample.call(), npz=npz))) == []


@pytest.mark.parametrize(
    "numbers",
    [
        Numbers(0.875, 0.75, 2e-6, {"a": 0.5}),
        Numbers(float("inf"), float("nan"), 0.0),
        Numbers(1.0, float("nan"), 0.0, {"a": 2.0}),
        Numbers(0.0, 0.0, 0.0),
        Numbers(-1e300, 1e300, float("inf"), {"a": float("inf")}),
    ],
)
def test_every_number_is_on_the_line_or_beside_it(numbers):
    line = drawing.line(numbers)
    assert len(line.marks) == 2 + len(numbers.known)
    for mark in line.marks:
        assert mark.x is None or 0 <= mark.x <= drawing.LINE
    Page(
        page.html(
            [sample.report(findings=(replace(sample.FINDINGS[1], evidence=sample.evidence(numbers=numbers)),))], ""
        )
    )


# --- in short ---


def test_components_and_counts():
    rows = {row.component: row.word for row in summary.components(sample.report())}
    assert rows == {"matching": "right", "L1": "wrong", "gradients": "wrong", "devices": "not judged"}
    assert summary.counts(sample.report()) == "1 of 4 clauses met · 2 broken · 1 blocked · 1 declined"


# --- foreign text ---


def test_addresses_are_masked_and_long_texts_cut():
    assert cleaning.text("<object at 0x7f3a91c2d0>") == "<object at 0x…>"
    assert len(cleaning.text("x" * 10_000_000)) < cleaning.LONGEST + 100
    assert cleaning.text("a\x1b]0;title\x07b\ud800\tc\nd") == "a\ufffd]0;title\ufffdb\ufffd\tc\nd"


def test_an_exception_whose_text_raises_is_survived():
    class Bad(Exception):
        def __str__(self):
            raise ValueError

    assert cleaning.exception(Bad()) == "(its text cannot be read)"
    assert cleaning.exception(OSError("no /tmp/tmpab12_x9z/file")) == "no /tmp/tmp…/file"
