"""The ledger: what it accepts, what it refuses, and when it is no longer true."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from detr_conformance import judge, ledger
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.cli import app
from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Diagnosis, Evidence, Finding, Numbers, Report
from detr_conformance.registry import faults
from detr_conformance.report import files
from detr_conformance.runner import Judge, Settings
from detr_conformance.signatures import alike
from detr_reference.textbook import textbook

DAY = datetime.date(2026, 6, 1)
ENTRY = """
[[deviation]]
clause = "BOX-2"
signature = "iou-without-the-enclosing-box"
state = "not-yet"
reason = "GIoU comes with the next training run"
issue = "https://example.org/881"
expires = 2027-03-01
"""
BY_VALUES = ENTRY.replace('signature = "iou-without-the-enclosing-box"', 'values = "loss_giou 0.9091, 1, 0.8571"')


def failing(clause: str = "BOX-2", fault: str = "iou-without-the-enclosing-box", **others) -> Finding:
    diagnosis = Diagnosis(((fault, "Wrong."),), 3, 3) if fault else None
    shown = Evidence("case", "1 image", "loss_giou", "1.6", "0.9", numbers=Numbers(1.6, 0.9, 1e-6))
    about = {"sentence": "A clause.", "check": f"check_of_{clause}", "level": "must", "component": "GIoU"}
    return Finding(
        clause, **{**about, **others}, verdict="fail", message="failed", evidence=shown, diagnosis=diagnosis,
        values="loss_giou 0.9091, 1, 0.8571",
    )  # fmt: skip


def passing(clause: str = "BOX-2", check: str = "") -> Finding:
    return Finding(clause, "A clause.", check or f"check_of_{clause}", "must", "GIoU", "pass", decided=3)


def report(*findings: Finding, **others) -> Report:
    about = {"effort": "standard", "candidate": "mypkg", "spec": "mypkg"} | others
    versions = dict.fromkeys(("detr-conformance", "torch", "numpy", "scipy", "python"), "1")
    return Report(profile="detr", profile_from="given", level="must", seed=0, options={}, versions=versions,
                  findings=findings, **about)  # fmt: skip


def applied(text: str, *findings: Finding, day: datetime.date = DAY, **others) -> Report:
    return ledger.parse(text, "dev.toml").applied(report(*findings, **others), day)


# --- what is accepted ---


def test_an_accepted_failure_is_a_deviation_and_the_run_is_conformant():
    found = applied(ENTRY, failing(), passing("BOX-1"))
    assert [f.verdict for f in found.findings] == ["deviation", "pass"]
    assert found.conformant
    assert found.deviations[0].deviation == (
        "BOX-2 iou-without-the-enclosing-box · not-yet until 2027-03-01: GIoU comes with the next training run · "
        "https://example.org/881 (dev.toml:2)"
    )


def test_another_mistake_in_the_same_clause_still_fails_and_says_what_is_accepted():
    found = applied(ENTRY, replace(failing(fault="union-is-the-enclosing-box"), values="loss_giou 0.5, 0.5, 0.5"))
    assert not found.conformant
    assert "dev.toml:2 accepts iou-without-the-enclosing-box only" in found.findings[0].message


def test_the_same_mistake_in_another_clause_still_fails():
    assert not applied(ENTRY, failing("BOX-5"), failing()).conformant


def test_what_no_known_fault_explains_is_accepted_by_its_values():
    assert applied(BY_VALUES, failing(fault="")).conformant
    assert not applied(BY_VALUES, replace(failing(fault=""), values="loss_giou 0.9091, 1, 0.7")).conformant


def test_an_entry_of_one_candidate_accepts_nothing_of_another():
    text = ENTRY + 'candidate = "mypkg"\n'
    assert applied(text, failing()).conformant
    assert not applied(text, failing(), candidate="other", spec="other").conformant


def test_what_a_deviation_alone_blocks_fails_nothing():
    blocked = replace(passing("BOX-7"), verdict="blocked", blocked_by="check_of_BOX-2")
    behind = replace(passing("NORM-1"), verdict="blocked", blocked_by="check_of_BOX-7")
    other = replace(passing("NUM-1"), verdict="blocked", blocked_by="check_of_BOX-1")
    assert applied(ENTRY, failing(), blocked, behind).conformant
    assert not applied(ENTRY, failing(), other, passing("BOX-1")).conformant


# --- when it is no longer true ---


def test_an_expired_entry_accepts_nothing_and_is_named():
    last, after = datetime.date(2027, 3, 1), datetime.date(2027, 3, 2)
    assert applied(ENTRY, failing(), day=last).conformant
    found = applied(ENTRY, failing(), day=after)
    assert not found.conformant
    assert found.ledger == ("dev.toml:2: expired: BOX-2 iou-without-the-enclosing-box was accepted until 2027-03-01",)
    assert "accepted until 2027-03-01, which is over (dev.toml:2)" in found.findings[0].message


def test_a_stale_entry_fails_the_run():
    found = applied(ENTRY, passing())
    assert not found.conformant
    assert found.ledger[0].startswith("dev.toml:2: stale: BOX-2 iou-without-the-enclosing-box no longer happens")


@pytest.mark.parametrize("verdict", ["blocked", "declined"])
def test_what_was_not_judged_makes_no_entry_stale(verdict):
    assert applied(ENTRY, replace(passing(), verdict=verdict)).ledger == ()


def test_a_clause_that_was_not_asked_for_makes_no_entry_stale():
    assert applied(ENTRY, passing("KEY-1")).ledger == ()


def test_a_shorter_run_makes_no_entry_stale():
    assert applied(ENTRY, passing(), effort="quick").ledger == ()
    assert applied(ENTRY + 'effort = "quick"\n', passing(), effort="quick").ledger
    assert applied(ENTRY + 'effort = "deep"\n', passing()).ledger == ()


def test_the_day_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(ledger.TODAY, "2027-03-02")
    assert ledger.day() == datetime.date(2027, 3, 2)
    monkeypatch.setenv(ledger.TODAY, "tomorrow")
    with pytest.raises(ConformanceError, match="DETR_CONFORMANCE_TODAY=tomorrow: it must be a date"):
        ledger.day()


# --- what is refused, with its line ---


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"BOX-2"', '"BOX2"', "dev.toml:3: unknown clause 'BOX2'; did you mean 'BOX-2'?"),
        ("iou-without-the", "iou-witout-the", "dev.toml:4: unknown fault 'iou-witout-the-enclosing-box'; did you mean"),
        ('"not-yet"', '"later"', "dev.toml:5: state 'later'; it must be one of by-design, not-yet, bug"),
        ('"GIoU comes with the next training run"', '""', "dev.toml:6: no reason: say why"),
        ("reason", "raison", "dev.toml:6: unknown key 'raison'; did you mean 'reason'?"),
        ("2027-03-01", '"soon"', "dev.toml:8: expires = 'soon'; it must be a date"),
        ("expires = 2027-03-01\n", "", "dev.toml:2: no expires: what is not-yet must end"),
        ('signature = "iou-without-the-enclosing-box"', "", "dev.toml:2: neither signature nor values"),
        ("[[deviation]]", "[[deviations]]", "dev.toml: unknown key 'deviations'; did you mean 'deviation'?"),
        ('clause = "BOX-2"', "clause = ", "dev.toml: Invalid value (at line 3"),
    ],
)
def test_a_wrong_entry_is_refused_with_file_and_line(old, new, words):
    with pytest.raises(ConformanceError) as error:
        ledger.parse(ENTRY.replace(old, new), "dev.toml")
    assert words in str(error.value)


def test_what_is_by_design_need_not_expire():
    text = ENTRY.replace("not-yet", "by-design").replace("expires = 2027-03-01\n", "")
    assert ledger.parse(text, "dev.toml").entries[0].expires is None


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ConformanceError, match=r"the ledger no/such\.toml cannot be read"):
        ledger.read("no/such.toml")


# --- a failure is known again ---


def test_values_are_compared_within_a_thousandth():
    assert alike("loss_bbox 0.8750, 1.25", "loss_bbox 0.8751, 1.25")
    assert not alike("loss_bbox 0.875, 1.25", "loss_bbox 0.877, 1.25")
    assert not alike("loss_bbox 0.875, 1.25", "loss_bbox 0.875")
    assert not alike("loss_bbox 0.875", "loss_giou 0.875")
    assert alike("loss_ce nan, inf", "loss_ce nan, inf")


@pytest.mark.parametrize("id", ["iou-without-the-enclosing-box", "targets-served-in-order"])
def test_a_failure_is_the_same_at_every_effort_and_without_shrinking(monkeypatch, id):
    fault = next(f for f in faults() if f.id == id)
    candidate = candidate_of(fault.apply(textbook), "detr", id)
    monkeypatch.setattr("detr_conformance.runner.Diagnoser.diagnose", lambda *_: None)
    monkeypatch.setattr("detr_conformance.runner.explaining", lambda *_: {})
    once = Judge(candidate, Settings(effort="quick")).finding(fault.check.name)
    monkeypatch.setattr("detr_conformance.shrink.ATTEMPTS", 0)
    again = Judge(candidate, Settings(effort="standard", seed=7)).finding(fault.check.name)
    assert once.values
    assert once.values == again.values


def test_judge_takes_a_ledger(tmp_path):
    fault = next(f for f in faults() if f.id == "l1-on-corners")
    file = tmp_path / "dev.toml"
    file.write_text(ENTRY.replace("BOX-2", "NORM-1").replace("iou-without-the-enclosing-box", "l1-on-corners"))
    found = judge(
        candidate_of(fault.apply(textbook), "detr"), effort="quick", ledger=file,
        clauses=["NORM-1"],
    )  # fmt: skip
    assert {f.verdict for f in found.findings} == {"pass", "deviation"}
    assert found.conformant


# --- the commands ---

run = CliRunner().invoke


@pytest.fixture
def written(tmp_path):
    """A report.json of one known and one unknown failure."""
    found = report(failing(), replace(failing("NORM-1", fault=""), values="loss_bbox 0.25"), passing("KEY-1"))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(files.document([found])))
    return path


def test_update_proposes_entries_that_are_refused_until_they_have_a_reason(tmp_path, written):
    file = tmp_path / "dev.toml"
    result = run(app, ["ledger", "update", str(file), "--report", str(written)])
    assert result.exit_code == 0, result.output
    assert "2 entries proposed" in result.output
    refused = run(app, ["ledger", "check", str(file)])
    assert refused.exit_code == 1
    assert refused.output.count("no reason: say why this failure is accepted") == 2
    file.write_text(file.read_text().replace('reason = ""', 'reason = "known"'))
    assert run(app, ["ledger", "check", str(file), "--report", str(written)]).exit_code == 0
    [found] = files.read(json.loads(written.read_text()))
    assert ledger.read(file).applied(found).conformant


def test_update_leaves_what_is_there(tmp_path, written):
    file = tmp_path / "dev.toml"
    file.write_text("# ours\n" + ENTRY)
    result = run(app, ["ledger", "update", str(file), "--report", str(written), "--json"])
    assert result.exit_code == 0
    assert len(json.loads(result.output)["proposed"]) == 1
    assert file.read_text().startswith("# ours\n" + ENTRY)


def test_prune_removes_what_is_stale_and_keeps_every_other_line(tmp_path):
    file, path = tmp_path / "dev.toml", tmp_path / "report.json"
    kept = ENTRY.replace("BOX-2", "BOX-5")
    file.write_text(f"# ours\nformat = 1\n\n# of the stale one\n{ENTRY.lstrip()}\n# of the one that stays{kept}")
    path.write_text(json.dumps(files.document([report(passing(), failing("BOX-5"))])))
    checked = run(app, ["ledger", "check", str(file), "--report", str(path)])
    assert checked.exit_code == 1
    assert "dev.toml:5: stale: BOX-2" in checked.output
    result = run(app, ["ledger", "prune", str(file), "--report", str(path)])
    assert result.exit_code == 0
    assert file.read_text() == f"# ours\nformat = 1\n\n# of the one that stays{kept}"


def test_check_names_expired_entries(tmp_path, monkeypatch):
    file = tmp_path / "dev.toml"
    file.write_text(ENTRY)
    monkeypatch.setenv(ledger.TODAY, "2028-01-01")
    result = run(app, ["ledger", "check", str(file), "--json"])
    assert result.exit_code == 1
    assert "expired" in json.loads(result.output)["wrong"][0]


@pytest.mark.parametrize("arguments", [[], ["--report", "no.json"], ["--report", "x.json", "--candidate", "y"]])
def test_a_wrong_use_ends_with_4_and_one_error(tmp_path, arguments):
    result = run(app, ["ledger", "update", str(tmp_path / "dev.toml"), *arguments])
    assert result.exit_code == 4
    assert result.output.count("error: ") == 1
