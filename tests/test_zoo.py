"""Criterions written without a look at the suite: the right ones pass, whatever their style; the wrong ones do not.

The whole zoo has several hundred wrong ones; a tenth of them, spread evenly, is judged without --slow. All of them:

    pytest --slow -n 2 tests/test_zoo.py
"""

from __future__ import annotations

import pytest
import torch

from detr_conformance import judge
from detr_conformance.candidate import bind
from detr_conformance.cases import Recipe, build
from detr_conformance.experiments import BATCH, EXTREMES, called
from detr_conformance.registry import checks, clauses
from detr_conformance.runner import Judge, Settings
from zoo import RIGHT, WRONG

torch.set_num_threads(1)
MUST = {c.id for c in clauses() if c.level == "must"}
JUDGED = [w for w in WRONG if MUST & set(w.clause)]


@pytest.mark.parametrize("right", RIGHT, ids=lambda r: r.id)
def test_a_right_criterion_raises_no_false_alarm(right):
    report = judge(right.factory, profile=right.profile, level="should" if right.should else "must", effort="quick")
    assert report.conformant, [f.message for f in report.findings if f.verdict not in ("pass", "declined")]


@pytest.mark.parametrize("right", RIGHT, ids=lambda r: r.id)
def test_few_queries_that_are_all_sure_raise_no_false_alarm(right):
    """There the class loss and its gradient are nearly 0, small differences of larger numbers."""
    bound = bind(right.factory, right.profile)
    own = [c for c in checks(right.profile, "must") if c.on in (BATCH, EXTREMES)]
    for seed, (counts, queries) in enumerate([((1,), 1), ((2,), 2), ((1, 1), 2), ((2,), 1)] * 5):
        recipe = Recipe(seed, counts, queries, classes=1 + seed % 3, logits="confident")
        seen = called(bound, build(recipe, bound.options, bound.varies))
        assert [c for check in own for c in check.judge(seen) if not c.ok] == []


def pytest_generate_tests(metafunc):
    if "wrong" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("--slow") else 10
        metafunc.parametrize("wrong", JUDGED[::step], ids=lambda w: w.id)


def test_a_wrong_criterion_is_found(wrong):
    assert next(broken(wrong), None), wrong.sentence


def test_what_a_criterion_has_no_part_for_is_not_broken():
    assert not list(broken(next(r for r in RIGHT if r.id == "grounding-dino/port")))


def broken(wrong):
    """The clauses of level must that fail at effort quick, without evidence and diagnosis."""
    judge = Judge(wrong.factory, Settings(profile=wrong.profile, effort="quick"))
    return (c.clause.id for c in checks(wrong.profile, "must") if judge.failing(c))
