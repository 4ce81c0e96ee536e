"""Every check passes on the textbook, and fails on each fault that names it: by judgement, in every profile."""

from __future__ import annotations

import pytest
import torch

from detr_conformance import registry
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.contract import CHAPTERS
from detr_conformance.runner import Judge, Settings
from detr_conformance.tallies import RAISES
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

torch.set_num_threads(1)
QUICK = Settings(effort="quick", level="should", device="simulated")
BY_PROFILE = [
    pytest.param(
        fault, profile, id=f"{fault.id}-{profile}", marks=[pytest.mark.slow] * (fault.check.on.since == "deep")
    )
    for fault in registry.faults()
    for profile in sorted(fault.profiles)
]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_textbook_passes_every_check(profile):
    judge = Judge(candidate_of(textbook, profile), QUICK)
    found = [judge.finding(check.name) for check in registry.checks(profile) if check.on.since == "quick"]
    assert [f.message for f in found if f.verdict != "pass"] == []


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_the_textbook_passes_the_checks_of_higher_efforts(profile):
    judge = Judge(candidate_of(textbook, profile), Settings(effort="deep", level="should", device="simulated"))
    found = [judge.finding(check.name) for check in registry.checks(profile) if check.on.since != "quick"]
    assert [f.message for f in found if f.verdict != "pass"] == []


@pytest.mark.parametrize(("fault", "profile"), BY_PROFILE)
def test_its_check_catches_the_fault(fault, profile):
    judge = Judge(candidate_of(fault.apply(textbook), profile), QUICK)
    failing = judge.failing(fault.check)
    assert failing is not None, f"{fault.check.name} does not see: {fault.sentence}"
    assert failing.what != RAISES, f"caught by an exception only: {failing.got}"


# --- what is true of all declarations ---


def test_every_check_has_a_fault_in_every_profile():
    named = {(fault.check.name, profile) for fault in registry.faults() for profile in fault.profiles}
    without = [
        f"{check.name} in {profile}"
        for check in registry.checks()
        for profile in sorted(check.profiles)
        if (check.name, profile) not in named and not check.measures
    ]
    assert without == []


def test_every_clause_has_a_check_in_every_profile():
    judged = {(check.clause.id, profile) for check in registry.checks() for profile in check.profiles}
    assert {(c.id, p) for c in registry.clauses() for p in c.profiles} == judged


@pytest.mark.parametrize("profile", PROFILES)
def test_one_check_of_each_experiment_answers_for_a_candidate_that_raises(profile):
    for experiment in {check.on for check in registry.checks(profile)}:
        own = [c for c in registry.checks(profile) if c.on is experiment]
        assert sum(c.takes_raising for c in own) == 1, experiment.name


def test_checks_come_after_known_checks():
    known = {check.name for check in registry.checks()}
    assert {name for check in registry.checks() for name in check.after} <= known


def test_sentences_end():
    for text in [c.sentence for c in registry.clauses()] + [f.sentence for f in registry.faults()]:
        assert text.endswith("."), text


def test_a_chapter_is_short_enough_to_read_at_a_sitting():
    from importlib.resources import files

    for chapter in CHAPTERS:
        lines = files("detr_conformance.contract").joinpath(f"{chapter}.py").read_text("utf-8").count("\n")
        assert lines < 500, chapter
