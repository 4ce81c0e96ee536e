"""Criterions that libraries ship, judged: what is right passes, and what is wrong is named."""

from __future__ import annotations

import pytest

from detr_conformance import judge


def broken(candidate: str, level: str) -> set[str]:
    return {f.clause for f in judge(candidate, level=level, effort="quick").findings if f.verdict in ("fail", "error")}


# under torch.distributed, without accelerate, every rank divides by its own number of targets
RANKS = {"DIST-1"}
# no refusal names its argument, zero-area boxes are 0/0, labels must be int64
SHOULD = {"BOX-8", "BAD-1", "BAD-2", "NUM-5"}


def test_detr_of_transformers_is_right_in_one_process():
    assert broken("transformers-detr", "must") == RANKS
    assert broken("transformers-detr", "should") >= RANKS | SHOULD


def test_deformable_detr_of_transformers_is_right_in_one_process_but_its_matcher_keeps_alpha_and_gamma():
    assert broken("transformers-deformable-detr", "must") == RANKS
    assert broken("transformers-deformable-detr", "should") >= RANKS | SHOULD | {"COST-5"}


def test_grounding_dino_of_transformers_mixes_up_the_prompts_of_a_batch():
    assert broken("transformers-grounding-dino", "must") == RANKS | {"TOKEN-4"}


@pytest.mark.parametrize("profile", ["detr", "deformable-detr", "dino", "grounding-dino"])
def test_the_reference_conforms_in_every_profile_and_at_every_level(profile):
    report = judge("detr_reference.criterion", profile=profile, level="should")
    assert report.conformant
    declined = {f.clause for f in report.findings if f.verdict == "declined"}
    assert declined == {"DEVICE-1", "DEVICE-2", "LEARN-1", "COST-TIME"}
