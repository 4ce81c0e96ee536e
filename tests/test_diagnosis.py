"""A known mistake is named from the numbers; an unknown one is not."""

from __future__ import annotations

import pytest

from detr_conformance import judge
from zoo import WRONG

BY_ID = {w.id: w for w in WRONG}


def named(id: str) -> dict[str, set[str]]:
    """The faults named, by clause, for a criterion written without a look at the textbook."""
    wrong = BY_ID[id]
    report = judge(wrong.factory, profile=wrong.profile, effort="quick")
    found: dict[str, set[str]] = {}
    for finding in report.failed:
        found.setdefault(finding.clause, set()).update(
            i for i, _ in (finding.diagnosis.faults if finding.diagnosis else ())
        )
    return found


@pytest.mark.parametrize(
    ("id", "clause", "fault"),
    [
        ("deformable-detr/l1-default-mean", "NORM-1", "l1-with-its-default-mean"),
        ("deformable-detr/l1-on-corners", "NORM-1", "l1-on-corners"),
        ("deformable-detr/giou-is-iou", "BOX-2", "iou-without-the-enclosing-box"),
        ("deformable-detr/corners-top-left", "BOX-1", "corners-from-the-top-left"),
        ("deformable-detr/match-first-queries", "MATCH-2", "first-queries-instead-of-a-matching"),
        ("deformable-detr/focal-matched-only", "CLS-3", "focal-loss-on-matched-queries-only"),
        ("deformable-detr/alpha-swapped", "CLS-4", "alpha-on-negatives"),
        ("deformable-detr/cost-giou-sign", "COST-1", "giou-raises-the-cost"),
        ("deformable-detr/enc-none", "LAYER-4", "no-encoder-losses"),
        ("deformable-detr/weighted-already", "KEY-5", "losses-returned-weighted"),
    ],
)
def test_a_known_mistake_is_named(id, clause, fault):
    assert named(id)[clause] == {fault}


@pytest.mark.parametrize("id", ["deformable-detr/smooth-l1", "deformable-detr/modulation-of-hit"])
def test_an_unknown_mistake_gets_no_name(id):
    found = named(id)
    assert found
    assert set().union(*found.values()) == set()


def test_transformers_grounding_dino_is_recognised():
    finding = judge("transformers-grounding-dino", effort="quick", clauses=["TOKEN"]).finding("TOKEN-4")
    assert [i for i, _ in finding.diagnosis.faults] == ["prompt-of-the-previous-image"]
    assert "looks like  prompt-of-the-previous-image" in finding.message
