"""A detector is trained: right criterions learn as the reference does, wrong ones do not. And what a call costs."""

from __future__ import annotations

import pytest
import torch

from detr_conformance import judge, registry
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.report.terminal import text
from detr_conformance.shapes import SIDE, average_precision, pictures
from detr_reference.criterion import build_criterion
from detr_reference.textbook import textbook


def boxes_and_scores(data, shift=0.0):
    """What a detector finds that sees every shape, ``shift`` pixels too far right, and nothing else."""
    most = max(len(t["labels"]) for t in data.targets)
    boxes, scores = torch.full((len(data.targets), most, 4), 0.5), torch.zeros(len(data.targets), most, 3)
    for b, target in enumerate(data.targets):
        found = torch.arange(len(target["labels"]))
        boxes[b, found] = target["boxes"] + torch.tensor([shift / SIDE, 0, 0, 0])
        scores[b, found, target["labels"]] = 1.0
    return boxes, scores


def test_average_precision_is_one_for_exact_boxes_and_less_beside_them():
    data = pictures(5, 20)

    exact = average_precision(*boxes_and_scores(data), data.targets)
    beside = average_precision(*boxes_and_scores(data, shift=1.5), data.targets)

    assert exact == pytest.approx((1.0, 1.0))
    assert beside[0] < 0.8 < beside[1]


def test_pictures_are_the_same_for_the_same_seed_and_show_what_their_targets_say():
    data = pictures(5, 20)
    pictures.cache_clear()
    again = pictures(5, 20)

    assert torch.equal(data.images, again.images)
    assert {int(label) for t in data.targets for label in t["labels"]} == {0, 1, 2}
    for image, target in zip(data.images, data.targets, strict=True):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            x, y = (box[:2] * SIDE).int().tolist()
            assert image[:, y, x].argmax() == label  # red squares, green discs, blue triangles


def test_they_are_judged_at_effort_deep_only():
    report = judge(candidate_of(textbook, "detr"), level="should", effort="quick", clauses=["LEARN", "COST-TIME"])

    assert {(f.verdict, f.message) for f in report.findings} == {("declined", "judged at effort deep only")}
    assert not report.judged


def test_time_and_memory_are_told_for_information():
    report = judge(candidate_of(textbook, "detr"), level="should", effort="deep", clauses=["COST-TIME"])

    (found,) = report.findings
    assert found.verdict == "pass"
    assert "× the reference" in found.message
    assert "per doubling of the batch" in found.message
    assert f"for information COST-TIME: {found.message}" in " ".join(text(report).split())


def only_small(num_classes=91, num_decoder_layers=6, eos_coef=0.1):
    """A criterion that gives up on batches of training size, and on more than a few images."""
    inner = build_criterion(num_classes, num_decoder_layers, "detr", eos_coef=eos_coef)

    def criterion(outputs, targets):
        if outputs["pred_logits"].shape[:2].numel() > 500:
            raise MemoryError("too large")
        return inner(outputs, targets)

    return criterion


def test_what_cannot_be_measured_is_told_and_breaks_nothing():
    report = judge(only_small, profile="detr", level="should", effort="deep", clauses=["COST-TIME"])

    (found,) = report.findings
    assert "MemoryError: too large" in found.message
    assert report.failed == ()


def test_a_candidate_that_raises_in_training_is_wrong():
    report = judge(only_small, profile="detr", level="should", effort="deep", clauses=["LEARN-1"])

    assert [f.verdict for f in report.findings] == ["fail", "blocked"]
    assert "step 0 of training: MemoryError: too large" in report.findings[0].message


@pytest.mark.slow
def test_the_textbook_learns_as_the_reference_does():
    report = judge(candidate_of(textbook, "grounding-dino"), level="should", effort="deep", clauses=["LEARN-1"])

    assert report.conformant, [f.message for f in report.findings]
    assert [f.message for f in report.findings if "the reference's" not in f.message] == []


@pytest.mark.slow
@pytest.mark.parametrize("id", ["boxes-are-never-trained", "every-query-becomes-a-positive"])
def test_what_breaks_training_is_found(id):
    fault = next(f for f in registry.faults("detr") if f.id == id)

    report = judge(
        candidate_of(fault.apply(textbook), "detr"), level="should", effort="deep", clauses=[fault.check.name]
    )

    (found,) = report.findings
    assert found.verdict == "fail"
    assert "AP 0." in found.message
