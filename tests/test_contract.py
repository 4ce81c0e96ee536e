"""What is true of all declarations. That every check can fail is shown by ``detr-conformance prove``."""

from __future__ import annotations

import pytest

from detr_conformance import registry
from detr_conformance.contract import CHAPTERS
from detr_reference.options import PROFILES


@pytest.mark.parametrize("profile", PROFILES)
def test_one_check_of_each_experiment_answers_for_a_candidate_that_raises(profile):
    for experiment in {check.on for check in registry.checks(profile)}:
        own = [c for c in registry.checks(profile) if c.on is experiment]
        assert sum(c.takes_raising for c in own) == 1, experiment.name


def test_no_clause_of_a_chapter_is_left_out():
    for chapter in {c.id.split("-")[0] for c in registry.clauses()}:
        numbers = [c.id.split("-")[1] for c in registry.clauses() if c.id.startswith(f"{chapter}-")]
        known = sorted(int(n) for n in numbers if n.isdigit())
        assert known == list(range(1, len(known) + 1)), chapter


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
