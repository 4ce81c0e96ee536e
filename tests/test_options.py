"""Legitimate differences: declared ones are judged against their own values, undeclared ones are named."""

from __future__ import annotations

import pytest
import torch

from detr_conformance.candidate import Candidate
from detr_conformance.registry import checks
from detr_conformance.runner import Judge, Settings
from detr_reference.criterion import build_criterion

torch.set_num_threads(1)
QUICK = Settings(effort="quick")

DIFFERENCES = [
    ("deformable-detr", {"giou_eps": 1e-6}, "BOX-4"),
    ("dino", {"giou_eps": 0.0}, "BOX-4"),
    ("grounding-dino", {"class_divisor": "matches"}, "NORM-3"),
    ("grounding-dino", {"encoder_key": "interm_outputs", "encoder_suffix": "_interm"}, "LAYER-4"),
    ("dino", {"encoder_suffix": "_enc"}, "LAYER-4"),
    ("deformable-detr", {"encoder_targets": "real"}, "LAYER-4"),
    ("detr", {"weighted": True}, "KEY-5"),
    ("dino", {"aux_suffix": "_aux_"}, "LAYER-1"),
    ("grounding-dino", {"set_cost_class": 2.0}, "COST-1"),
]
NAMES = [f"{profile}-{','.join(options)}" for profile, options, _ in DIFFERENCES]


def candidate(profile, options, declared):
    """The reference with some options of its own, which its factory does not name."""

    def build(num_classes=91, num_decoder_layers=6, focal_alpha=0.25, focal_gamma=2.0):
        return build_criterion(
            profile=profile,
            num_classes=num_classes,
            num_decoder_layers=num_decoder_layers,
            focal_alpha=focal_alpha,
            focal_gamma=focal_gamma,
            **options,
        )

    return Candidate(build, profile, options=options if declared else {}, name="one's own")


def findings(profile, options, declared, clause=None):
    judge = Judge(candidate(profile, options, declared), QUICK)
    fast = {"batch", "edges", "pairs", "duels"}
    return [
        judge.finding(c.name)
        for c in checks(profile, "must", [clause] if clause else [])
        if c.on.name in fast
    ]  # fmt: skip


@pytest.mark.parametrize(("profile", "options", "clause"), DIFFERENCES, ids=NAMES)
def test_a_declared_option_is_judged_against_its_own_value(profile, options, clause):
    assert [f.message for f in findings(profile, options, True) if f.verdict not in ("pass", "declined")] == []


@pytest.mark.parametrize(("profile", "options", "clause"), DIFFERENCES, ids=NAMES)
def test_an_undeclared_option_is_named_with_its_declaration(profile, options, clause):
    failed = [f for f in findings(profile, options, False, clause) if f.verdict == "fail"]
    assert failed
    said = " ".join(failed[0].message.split())
    assert f"Candidate(…, options={options!r})" in said


def test_a_mistake_is_not_taken_for_an_option():
    def halved(num_classes=91):
        criterion = build_criterion(profile="detr", num_classes=num_classes)
        criterion.register_forward_hook(lambda _m, _a, found: {k: v / 2 for k, v in found.items()})
        return criterion

    judge = Judge(Candidate(halved, "detr"), QUICK)
    failed = judge.finding("loss_bbox_is_the_sum_of_l1_over_nb")
    assert failed.verdict == "fail"
    assert "explained" not in failed.message


def test_one_that_declares_weighted_and_is_not_fails():
    def build(num_classes=91, num_decoder_layers=6):
        return build_criterion(profile="detr", num_classes=num_classes, num_decoder_layers=num_decoder_layers)

    judge = Judge(Candidate(build, "detr", options={"weighted": True}), QUICK)
    assert judge.finding("loss_bbox_is_the_sum_of_l1_over_nb").verdict == "fail"
