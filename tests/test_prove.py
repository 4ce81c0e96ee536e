"""The proof that every check can fail: what it shows, and what makes it fail. CI runs it whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from detr_conformance import prove
from detr_conformance.cli import app
from detr_conformance.prove import REFERENCE, TEXTBOOK, Outcome, Task, proof, work
from detr_conformance.registry import clauses, faults

L1_MEAN = next(f for f in faults("detr") if f.id == "l1-with-its-default-mean")
CHECK = L1_MEAN.check.name


def outcome(who, failed=(), raised=()):
    return Outcome(Task(who, "detr", "batch"), (CHECK,), tuple(failed), tuple(raised))


def problems(*outcomes):
    return proof(outcomes).problems


def test_every_clause_has_a_check_and_every_check_a_fault_in_every_profile():
    assert problems() == []


@pytest.mark.parametrize("who", [TEXTBOOK, REFERENCE])
def test_a_check_that_fails_what_is_right_is_a_problem(who):
    assert problems(outcome(who)) == []
    assert problems(outcome(who, [CHECK])) == [f"{who} fails {CHECK} in detr: the check is wrong"]


def test_a_fault_must_be_caught_by_the_check_it_names_and_by_judgement():
    assert problems(outcome(L1_MEAN.id, [CHECK, "another"])) == []
    assert "not at all" in problems(outcome(L1_MEAN.id, ["another"]))[0]
    assert "by an exception only" in problems(outcome(L1_MEAN.id, raised=[CHECK]))[0]


def test_a_survivor_fails_when_it_stops_surviving(monkeypatch):
    known = replace(L1_MEAN, survives={"detr": "the same numbers where there is one pair"})
    monkeypatch.setattr(prove, "faults", lambda: (known,))
    monkeypatch.setattr(prove, "_orphans", lambda: ())
    assert problems(outcome(L1_MEAN.id)) == []
    assert "it survives no more" in problems(outcome(L1_MEAN.id, [CHECK]))[0]


def test_survivors_have_a_reason():
    assert all(p in f.profiles and reason.endswith(".") for f in faults() for p, reason in f.survives.items())


def test_a_task_shows_the_kill():
    assert CHECK in work(Task(L1_MEAN.id, "detr", "batch")).failed
    right = work(Task(TEXTBOOK, "detr", "batch"))
    assert right.failed == right.raised == ()
    assert CHECK in right.decided


def test_tasks_cover_every_fault_in_every_profile_but_for_what_only_deep_proves():
    todo, left = prove.tasks()
    proved = {(t.who, t.profile) for t in todo}
    missing = {f.id for f in faults() for p in f.profiles if (f.id, p) not in proved}
    assert {f.check.clause.id for f in faults() if f.id in missing} == {"LEARN-1"}
    assert left
    assert prove.tasks(deep=True)[1] == []


def test_the_command_prints_the_matrix_in_short_and_writes_it_whole(monkeypatch, tmp_path):
    few = [Task(L1_MEAN.id, "detr", "batch"), Task(TEXTBOOK, "detr", "certain")]
    monkeypatch.setattr(prove, "tasks", lambda deep: (few, []))
    result = CliRunner().invoke(app, ["prove", "--json", str(tmp_path / "kills.json")])
    assert result.exit_code == 0, result.output
    assert f"{len(clauses())} clauses" in result.output
    assert "1 of 1 faults × profiles caught" in result.output
    assert '"l1-with-its-default-mean"' in (tmp_path / "kills.json").read_text()
