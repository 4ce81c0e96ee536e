"""Criterions that libraries ship, judged: what is right passes, and what is wrong is named."""

from __future__ import annotations

import pytest

from detr_conformance import judge


def broken(candidate: str, level: str) -> set[str]:
    return {f.clause for f in judge(candidate, level=level).findings if f.verdict in ("fail", "error")}


@pytest.mark.parametrize("level", ["must", "should"])
def test_detr_of_transformers_conforms(level):
    report = judge("transformers-detr", level=level)
    assert report.conformant, [f.message for f in report.findings if f.verdict != "pass"]


def test_deformable_detr_of_transformers_conforms_but_its_matcher_keeps_alpha_and_gamma():
    assert broken("transformers-deformable-detr", "must") == set()
    assert broken("transformers-deformable-detr", "should") == {"COST-5"}


def test_grounding_dino_of_transformers_mixes_up_the_prompts_of_a_batch():
    assert broken("transformers-grounding-dino", "must") == {"TOKEN-4"}


def test_the_reference_conforms_in_every_profile_and_at_every_level():
    for profile in ("detr", "deformable-detr", "dino", "grounding-dino"):
        report = judge("detr_reference.criterion", profile=profile, level="should")
        assert {f.verdict for f in report.findings} == {"pass"}, profile
