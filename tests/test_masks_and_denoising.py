"""Masks and denoising: who is judged on them, who is told why not, and what the experiments hand over."""

from __future__ import annotations

import pytest
import torch

from detr_conformance import Candidate, denoised, judge, masked
from detr_conformance.candidate import bind
from detr_conformance.cases import Recipe
from detr_conformance.observation import observe
from detr_conformance.seen import Seen, expect
from detr_conformance.shrink import smallest
from detr_reference.criterion import build_criterion
from detr_reference.textbook import textbook

torch.set_num_threads(1)

CLAUSES = ("MASK", "DN", "LAYER-5", "BOX-9")
RECIPE = Recipe(1, (2, 0, 1), 4, classes=3, aux=1, encoder_queries=3)
SIZES = ((4, 5), (6, 3), (3, 3))


def detr_without_losses(num_classes=91, num_decoder_layers=6):
    return build_criterion(num_classes, num_decoder_layers)


def detr_without_masks(num_classes=91, num_decoder_layers=6, losses=()):
    return build_criterion(num_classes, num_decoder_layers)


def detr_that_knows_no_masks(num_classes=91, num_decoder_layers=6, losses=()):
    return build_criterion(num_classes, num_decoder_layers, losses=["boxes" if k == "masks" else k for k in losses])


def detr_that_refuses_masks(num_classes=91, num_decoder_layers=6, losses=()):
    if "masks" in losses:
        raise ValueError("no masks here")
    return build_criterion(num_classes, num_decoder_layers, losses=losses)


def dino_without_denoising(num_classes=91, num_decoder_layers=6):
    return build_criterion(num_classes, num_decoder_layers, "dino")


def dino_that_refuses_denoising(num_classes=91, num_decoder_layers=6):
    inner = dino_without_denoising(num_classes, num_decoder_layers)

    def criterion(outputs, targets):
        if "dn_meta" in outputs:
            raise KeyError("dn_meta")
        return inner(outputs, targets)

    criterion.weight_dict = inner.weight_dict
    return criterion


@pytest.mark.parametrize("profile", ["detr", "deformable-detr", "dino", "grounding-dino"])
def test_the_reference_conforms(profile):
    report = judge(build_criterion, profile=profile, level="should", effort="quick", clauses=CLAUSES)
    assert [f.message for f in report.findings if f.verdict != "pass"] == []


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (detr_without_losses, "the factory does not take `losses`"),
        (detr_without_masks, "returns neither loss_mask nor loss_dice"),
        (detr_that_knows_no_masks, "returns neither loss_mask nor loss_dice"),
        (detr_that_refuses_masks, "raises on the simplest case: ValueError: no masks here"),
    ],
)
def test_a_candidate_without_masks_is_declined_and_told_why(factory, words):
    findings = judge(Candidate(factory, "detr"), effort="quick", clauses=["MASK"]).findings
    assert {f.verdict for f in findings} == {"declined"}
    assert all(words in f.message for f in findings)


def test_a_candidate_without_denoising_is_judged_on_its_plain_losses_alone():
    report = judge(Candidate(dino_without_denoising, "dino"), effort="quick", clauses=["DN"])
    assert {(f.clause, f.verdict) for f in report.findings} == {("DN-1", "declined"), ("DN-2", "pass")}
    assert "no loss with the suffix _dn" in report.finding("DN-1").message


def test_a_candidate_that_takes_no_denoising_queries_is_declined():
    report = judge(Candidate(dino_that_refuses_denoising, "dino"), effort="quick", clauses=["DN"])
    assert {f.verdict for f in report.findings} == {"declined"}
    assert "takes no outputs with dn_meta: KeyError" in report.finding("DN-2").message


def test_a_module_shaped_like_detr_is_asked_for_masks(tmp_path):
    file = tmp_path / "detr_with_masks.py"
    file.write_text(
        "from detr_reference.criterion import build_criterion\n"
        "def HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2): return None\n"
        "def SetCriterion(num_classes, matcher, weight_dict, eos_coef, losses):\n"
        "    return build_criterion(num_classes, eos_coef=eos_coef, losses=losses)\n"
    )
    report = judge(str(file), profile="detr", effort="quick", clauses=["MASK"])
    assert {f.verdict for f in report.findings} == {"pass"}


def test_gradients_of_masks_and_denoising_queries_are_observed():
    for profile, make, new in (
        ("detr", lambda bound: masked.masked_case(bound, RECIPE, SIZES, (3, 4)), {"mask", "dice"}),
        ("dino", lambda bound: denoised.denoised_case(bound, RECIPE, 2, 1), {"ce_dn", "bbox_dn", "giou_dn"}),
    ):
        bound = bind(build_criterion, profile)
        case = make(bound)
        got = observe(bound, case)
        seen = Seen(bound, case, got)
        want = expect(textbook.under(case.options), case, seen.pairs)
        assert {term for term, _ in got.grads} == {"ce", "bbox", "giou"} | new
        for at, expected in want.grads.items():
            for one, other in zip(got.grads[at], expected, strict=True):
                torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-3, atol=1e-5)


def test_cases_stay_whole_while_they_are_made_smaller():
    bound = bind(build_criterion, "dino")
    case = smallest(denoised.denoised_case(bound, RECIPE, 2), lambda c: not observe(bound, c).raised, True)
    assert case.queries == 1
    assert case.predictions("dn")["pred_boxes"].shape[1] == case.outputs["dn_meta"]["pad_size"]
    bound = bind(build_criterion, "detr")
    case = smallest(masked.masked_case(bound, RECIPE, SIZES, (3, 4)), lambda c: not observe(bound, c).raised, True)
    assert case.outputs["pred_masks"].shape == (1, 1, 3, 4)


def test_masks_go_round_through_run_length_encoding():
    masks = torch.rand(3, 5, 7) < 0.5
    decoded = masked._decoded(masks)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, masks.byte())
    assert not decoded.is_contiguous()
