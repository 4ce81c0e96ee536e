"""A known mistake is named from the numbers, two of them together as well; an unknown one is not.

How many of several hundred are named: ``python benchmarks/diagnosis.py``.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from detr_conformance import diagnosis, judge
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.findings import finding_from
from detr_conformance.registry import checks, faults
from detr_conformance.runner import Judge, Settings
from detr_reference.textbook import textbook
from zoo import WRONG
from zoo.port import both

torch.set_num_threads(1)
BY_ID = {w.id: w for w in WRONG}
FAULTS = {f.id: f for f in faults()}


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch):
    """What is named must not depend on how busy the machine is."""
    monkeypatch.setattr(diagnosis, "SECONDS", 20.0)


def diagnosed(spec, profile, clause):
    """The diagnoses of a clause's failing checks."""
    judge = Judge(spec, Settings(profile=profile, effort="quick"))
    found = [judge.finding(c.name) for c in checks(profile, only=[clause])]
    assert any(f.verdict == "fail" for f in found)
    return [f.diagnosis for f in found if f.diagnosis]


def ids(found):
    return {id for diagnosis in found for id, _ in diagnosis.faults}


@pytest.mark.parametrize(
    ("id", "clause", "fault"),
    [
        ("deformable-detr/box-losses-pair-mean", "NORM-1", "box-losses-averaged-and-divided"),
        ("deformable-detr/l1-on-corners", "NORM-1", "l1-on-corners"),
        ("deformable-detr/giou-is-iou", "BOX-2", "iou-without-the-enclosing-box"),
        ("deformable-detr/corners-top-left", "BOX-1", "corners-from-the-top-left"),
        ("deformable-detr/match-first-queries", "MATCH-2", "first-queries-instead-of-a-matching"),
        ("deformable-detr/focal-matched-only", "CLS-3", "focal-loss-on-matched-queries-only"),
        ("deformable-detr/alpha-swapped", "CLS-4", "alpha-on-negatives"),
        ("deformable-detr/modulation-detached", "CLS-5", "focusing-factor-detached"),
        ("deformable-detr/cost-giou-sign", "COST-1", "giou-raises-the-cost"),
        ("deformable-detr/enc-none", "LAYER-4", "no-encoder-losses"),
        ("deformable-detr/weighted-already", "KEY-5", "losses-returned-weighted"),
        ("detr/nb-images", "NORM-1", "nb-counts-images"),
        ("detr/match-drops-expensive", "MATCH-1", "dear-pairs-are-dropped"),
        ("grounding-dino/mask-of-first-image", "TOKEN-4", "text-mask-of-the-first-image"),
        ("grounding-dino/consumes-random", "PURE-3", "random-numbers-are-drawn"),
    ],
)
def test_a_known_mistake_is_named(id, clause, fault):
    wrong = BY_ID[id]
    assert ids(diagnosed(wrong.factory, wrong.profile, clause)) == {fault}


@pytest.mark.parametrize(
    ("profile", "clause", "one", "two"),
    [
        ("deformable-detr", "BOX-1", "corners-from-the-top-left", "hull-term-over-the-union"),
        ("deformable-detr", "BOX-5", "hull-term-added", "giou-loss-halved"),
        ("deformable-detr", "CLS-4", "alpha-on-negatives", "gamma-is-one-less"),
        ("deformable-detr", "CLS-3", "focal-loss-on-matched-queries-only", "class-loss-averaged-over-queries"),
        ("detr", "NORM-1", "l1-mean-of-the-four", "nb-counts-images"),
        ("dino", "NORM-1", "euclidean-distance", "nb-is-one-more"),
        ("detr", "CLS-1", "no-object-weighs-as-much-as-a-class", "cross-entropy-divided-by-boxes"),
        ("grounding-dino", "TOKEN-1", "only-the-first-token-is-positive", "alpha-missing"),
        ("deformable-detr", "LAYER-3", "auxiliary-layers-reversed", "l1-on-corners"),
    ],
)
def test_two_mistakes_in_one_number_are_named_together(profile, clause, one, two):
    book = FAULTS[two].apply(FAULTS[one].apply(textbook))
    found = diagnosed(candidate_of(book, profile), profile, clause)
    assert any(d.together and ids([d]) == {one, two} for d in found), found


@pytest.mark.parametrize(
    ("one", "two", "clause", "names"),
    [
        ("l1-mean-of-four", "focal-matched-only", "NORM-1", {"l1-mean-of-the-four"}),
        ("l1-mean-of-four", "focal-matched-only", "CLS-3", {"focal-loss-on-matched-queries-only"}),
        ("l1-default-mean", "alpha-off", "NORM-1", {"l1-with-its-default-mean", "giou-summed-and-never-divided"}),
        ("giou-is-iou", "nb-plus-one", "BOX-5", {"iou-without-the-enclosing-box", "nb-is-one-more"}),
        ("alpha-off", "focal-mean-queries", "CLS-4", {"alpha-missing", "class-loss-averaged-over-queries"}),
    ],
)
def test_two_mistakes_of_independent_code_are_named(one, two, clause, names):
    wrong = both(BY_ID[f"deformable-detr/{one}"], BY_ID[f"deformable-detr/{two}"])
    assert ids(diagnosed(wrong.factory, wrong.profile, clause)) == names


def test_what_explains_another_check_is_taken_into_account_over_ranks():
    one, two = "class-loss-averaged-over-queries", "nb-of-the-own-rank"
    wrong = candidate_of(FAULTS[two].apply(FAULTS[one].apply(textbook)), "deformable-detr")
    judge = Judge(wrong, Settings(profile="deformable-detr", effort="quick", clauses=("CLS-6", "DIST-1")))
    found = {
        check: judge.finding(check).diagnosis for check in ("the_class_loss_is_a_sum", "nb_is_the_mean_over_ranks")
    }
    assert [ids([d]) for d in found.values()] == [{one}, {one, two}]


def test_what_is_logged_by_another_convention_contradicts_nothing():
    """A cardinality of sigmoids is logged as published code does, or otherwise."""
    fault = FAULTS["auxiliary-layers-count-from-one"]
    book = replace(fault.apply(textbook), cardinality_error=lambda book, layer, *_: layer.logits.sum().detach())
    assert ids(diagnosed(candidate_of(book, "deformable-detr"), "deformable-detr", "LAYER-1")) == {fault.id}


@pytest.mark.parametrize(
    ("clause", "formulas"),
    [
        ("NORM-1", {"l1": lambda book, a, b: ((a - b).abs() + 0.4 * (a - b) ** 2).sum(-1)}),
        ("CLS-5", {"focusing": lambda book, z: (-z).sigmoid() ** 1.7 + 0.01}),
        ("BOX-2", {"enclosing": lambda book, a, b: book.area(a) + 0.7 * book.area(b)}),
    ],
)
def test_an_unknown_mistake_gets_no_name(clause, formulas):
    assert diagnosed(candidate_of(replace(textbook, **formulas), "dino"), "dino", clause) == []


@pytest.mark.parametrize(
    ("clause", "formulas", "sentence"),
    [
        ("NORM-1", {"l1": lambda book, a, b: ((a - b).abs() ** 1.3).sum(-1)}, "raised to the power 1.3."),
        ("CLS-5", {"focusing": lambda book, z: (-z).sigmoid() ** 1.7}, "γ is 1.7, whatever is configured."),
        (
            "BOX-2",
            {"loss_giou": lambda book, a, b, nb: 0.35 * textbook.loss_giou.__func__(book, a, b, nb)},
            "loss_giou is 0.35 times as large.",
        ),
    ],
)
def test_a_mistake_of_one_number_is_named_with_it(clause, formulas, sentence):
    found = diagnosed(candidate_of(replace(textbook, **formulas), "dino"), "dino", clause)
    assert any(said.endswith(sentence) for diagnosis in found for _, said in diagnosis.faults)


def test_transformers_grounding_dino_is_recognised():
    finding = judge("transformers-grounding-dino", effort="quick", clauses=["TOKEN"]).finding("TOKEN-4")
    assert [i for i, _ in finding.diagnosis.faults] == ["prompt-of-the-previous-image"]
    assert "looks like  prompt-of-the-previous-image" in finding.message


def test_two_together_are_said_to_be_and_survive_json():
    book = FAULTS["giou-loss-halved"].apply(FAULTS["hull-term-added"].apply(textbook))
    judge = Judge(candidate_of(book, "detr"), Settings(profile="detr", effort="quick", clauses=("BOX-5",)))
    finding = judge.finding("disjoint_boxes_are_pulled_together")
    assert finding.diagnosis.together
    assert '" together (' in " ".join(finding.message.split())
    assert "usual fix: " in finding.message
    assert finding_from(asdict(finding)) == finding


@pytest.mark.parametrize("calls", [0, 5, 20])
def test_a_spent_budget_ends_the_search(monkeypatch, calls):
    asked = []

    def budget(_seconds):
        def spent():
            asked.append(1)
            return len(asked) > calls

        return spent

    monkeypatch.setattr(diagnosis, "budget", budget)
    wrong = BY_ID["deformable-detr/hull-half"]
    broken = replace(textbook, enclosing=lambda book, a, b: book.area(a) + 0.7 * book.area(b))
    for spec in (wrong.factory, candidate_of(broken, "deformable-detr")):
        asked.clear()
        assert diagnosed(spec, "deformable-detr", "BOX-2") == []
        assert calls < len(asked) < calls + 400  # it asks before everything dear, and then does no more
