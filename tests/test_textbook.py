"""The textbook is right: published numbers, exact fractions with exhaustive search, and pycocotools agree with it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detr_fixtures import vectors
from detr_reference.options import options_of
from detr_reference.textbook import textbook

torch.set_num_threads(1)


def graded(vector):
    """Every prediction of the vector's outputs, by its layer and key, as a leaf that gets a gradient."""
    return {key: vector.layer(key.split(".")[0])[key.split(".")[1]].requires_grad_() for key in vector.grads}


def slope_of_clamp_at_its_bound():
    at = torch.zeros((), requires_grad=True)
    at.clamp(min=0).backward()
    return at.grad.item()


def away_from_kinks(book, vector, layer, result):
    """The rows [B,Q] of boxes whose gradient is no convention: of edges in line torch 2.15 has changed it, which was 1
    where the vectors were recorded."""
    rows = torch.ones(vector.layer(layer)["pred_boxes"].shape[:2], dtype=torch.bool)
    if slope_of_clamp_at_its_bound() == 1 or layer not in result.matches:
        return rows
    for b, pairs in enumerate(result.matches[layer]):
        boxes = vector.layer(layer)["pred_boxes"][b].detach()[pairs.query]
        ours, theirs = book.corners(boxes), book.corners(vector.targets[b]["boxes"][pairs.target])
        rows[b, pairs.query] = ((ours[:, :, None] - theirs[:, None, :]).abs() > 1e-9).flatten(1).all(1)
    return rows


@pytest.mark.parametrize("name", vectors.names())
def test_published_losses_gradients_and_matching_costs(name):
    vector = vectors.load(name)
    book = textbook.under(vector.options)
    leaves = graded(vector)
    result = book(vector.outputs, vector.targets)

    trained = {k: v for k, v in vector.losses.items() if k.split("_")[1] in vector.weights}
    assert {k for k in result.losses if k.startswith("loss_")} == set(trained)
    # transformers of float32 targets aside, only rounding separates the two
    for key, value in trained.items():
        assert result.losses[key].item() == pytest.approx(value, rel=1e-7, abs=1e-9), key

    sum(vector.weights[k.split("_")[1]] * result.losses[k] for k in trained).backward()
    for key, expected in vector.grads.items():
        scale = expected.abs().max().item()
        rows = away_from_kinks(book, vector, key.split(".")[0], result) if key.endswith("boxes") else ...
        got, expected = leaves[key].grad[rows], expected[rows]
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7 * scale + 1e-12, msg=key)

    for layer in book.layers(vector.outputs) if vector.matches else ():
        for b, target in enumerate(book.layer_targets(layer, vector.targets)):
            if len(target["boxes"]):
                cost = book.cost(layer.logits[b], layer.boxes[b], target).detach()
                theirs, ours = vector.matches[layer.name][b], result.matches[layer.name][b]
                assert cost[ours.query, ours.target].sum() == pytest.approx(
                    cost[theirs[0], theirs[1]].sum().item(), rel=1e-6, abs=1e-6
                )


# --- by hand: fractions and exhaustive search ---


def exact_giou(a, b):
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (
        (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (a, b)
    )
    side = lambda low, high: max(high - low, Fraction(0))  # noqa: E731
    common = side(max(ax1, bx1), min(ax2, bx2)) * side(max(ay1, by1), min(ay2, by2))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return common / union - (hull - union) / hull


def grid_boxes(rng, n):
    return [[Fraction(int(v), 16) for v in (*rng.integers(0, 17, 2), *rng.integers(1, 9, 2))] for _ in range(n)]


def as_tensor(boxes):
    return torch.tensor([[float(v) for v in box] for box in boxes], dtype=torch.float64).reshape(-1, 4)


@pytest.mark.parametrize("seed", range(40))
def test_box_terms_are_exact_on_the_grid(seed):
    rng = np.random.default_rng(seed)
    pred, wanted = grid_boxes(rng, 4), grid_boxes(rng, 3)
    giou = textbook.giou(as_tensor(pred)[:, None], as_tensor(wanted)[None])
    l1 = textbook.l1(as_tensor(pred)[:, None], as_tensor(wanted)[None])
    for (i, a), (j, b) in itertools.product(enumerate(pred), enumerate(wanted)):
        assert giou[i, j].item() == pytest.approx(float(exact_giou(a, b)), abs=1e-15)
        assert l1[i, j].item() == float(sum(abs(u - v) for u, v in zip(a, b, strict=True)))


@pytest.mark.parametrize("seed", range(40))
def test_matching_is_the_exhaustive_optimum_and_box_losses_are_its_fractions(seed):
    rng = np.random.default_rng(1000 + seed)
    q, n = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    pred, wanted = grid_boxes(rng, q), grid_boxes(rng, n)
    options = options_of("deformable-detr").with_(num_classes=2, set_cost_class=0.0, two_stage=False)
    outputs = {"pred_logits": torch.zeros(1, q, 2), "pred_boxes": as_tensor(pred)[None]}
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": as_tensor(wanted)}]
    result = textbook.under(options)(outputs, targets)

    def cost(i, j):
        l1 = sum(abs(u - v) for u, v in zip(pred[i], wanted[j], strict=True))
        return 5 * l1 - 2 * exact_giou(pred[i], wanted[j])

    m = min(q, n)
    best = min(
        sum(cost(i, j) for i, j in zip(qs, ts, strict=True))
        for qs in itertools.permutations(range(q), m)
        for ts in itertools.combinations(range(n), m)
    )
    pairs = list(
        zip(result.matches["final"][0].query.tolist(), result.matches["final"][0].target.tolist(), strict=True)
    )
    assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == m
    assert sum(cost(i, j) for i, j in pairs) == best
    l1 = sum(sum(abs(u - v) for u, v in zip(pred[i], wanted[j], strict=True)) for i, j in pairs)
    assert result.losses["loss_bbox"].item() == pytest.approx(float(l1 / n), rel=1e-15)
    giou = sum(1 - exact_giou(pred[i], wanted[j]) for i, j in pairs)
    assert result.losses["loss_giou"].item() == pytest.approx(float(giou / n), rel=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_iou_is_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    low, sides = rng.integers(0, 500, (2, 7, 2)), rng.integers(1, 300, (2, 7, 2))
    xywh = np.concatenate([low, sides], -1).astype(float)
    coco = coco_mask.iou(xywh[0], xywh[1], [0] * 7)
    a, b = (torch.from_numpy(np.concatenate([low, low + sides], -1)[i]).double() for i in (0, 1))
    common = textbook.intersection(a[:, None], b[None])
    iou = common / textbook.union(a[:, None], b[None], common)
    np.testing.assert_allclose(iou.numpy(), coco, rtol=1e-12)


# --- masks and denoising by hand ---


@pytest.mark.parametrize(("given", "wanted"), [(1, 5), (4, 4), (5, 13), (24, 20), (13, 3)])
def test_interpolation_is_that_of_torch_without_aligned_corners(given, wanted):
    x = torch.randn(2, given, given + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(given))
    expected = torch.nn.functional.interpolate(x[:, None], (wanted, 7), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(textbook.resized(x, (wanted, 7)), expected, rtol=1e-13, atol=1e-13)
    rows = textbook.interpolation(wanted, given)
    torch.testing.assert_close(rows.sum(1), torch.ones(wanted, dtype=torch.float64))


def test_mask_losses_of_an_undecided_mask_are_plain_fractions():
    options = options_of("detr").with_(num_classes=1, losses=("labels", "boxes", "masks"), num_decoder_layers=1)
    outputs = {"pred_logits": torch.zeros(1, 1, 2), "pred_boxes": torch.full((1, 1, 4), 0.5)}
    outputs["pred_masks"] = torch.zeros(1, 1, 2, 3)  # p = 1/2 everywhere
    masks = torch.zeros(1, 3, 4, dtype=torch.bool)
    masks[0, 0] = True  # 4 of 12 pixels
    target = {"labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5), "masks": masks}
    losses = textbook.under(options)(outputs, [target]).losses
    mean = (4 * 0.25 + 8 * 0.75) / 12 * 0.25 * np.log(2)
    assert losses["loss_mask"].item() == pytest.approx(mean, rel=1e-14)
    assert losses["loss_dice"].item() == pytest.approx(1 - (2 * 2 + 1) / (6 + 4 + 1), rel=1e-14)


def test_a_groups_first_slots_are_its_positives():
    options = options_of("dino").with_(num_classes=2, denoising=True, num_decoder_layers=1, two_stage=False)
    known = {"pred_logits": torch.zeros(2, 12, 2), "pred_boxes": torch.full((2, 12, 4), 0.5)}
    outputs = {"pred_logits": torch.zeros(2, 3, 2), "pred_boxes": torch.full((2, 3, 4), 0.5)}
    outputs["dn_meta"] = {"pad_size": 12, "num_dn_group": 2, "output_known_lbs_bboxes": known}
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.full((n, 4), 0.25)} for n in (1, 3)]
    book = textbook.under(options)
    (layer,) = book.denoising_layers(outputs)
    pairs = [(p.query.tolist(), p.target.tolist()) for p in book.denoising_pairs(layer, targets)]
    assert pairs == [([0, 6], [0, 0]), ([0, 1, 2, 6, 7, 8], [0, 1, 2, 0, 1, 2])]
    losses = book(outputs, targets).losses
    assert losses["loss_bbox_dn"].item() == 1  # |Δ| of a pair; eight pairs over nb · groups = 4 · 2
    positive, negative = (alpha * 0.25 * np.log(2) for alpha in (0.25, 0.75))
    assert losses["loss_ce_dn"].item() == pytest.approx((8 * positive + 40 * negative) / 8, rel=1e-14)


# --- the bundle ---


def test_a_replaced_formula_is_used_by_everything_that_follows():
    from dataclasses import replace

    twice = replace(textbook, l1=lambda book, pred, target: 2 * (pred - target).abs().sum(-1))
    vector = vectors.load("detr-000")
    right = textbook.under(vector.options)(vector.outputs, vector.targets)
    wrong = twice.under(vector.options)(vector.outputs, vector.targets, right.matches)
    assert wrong.losses["loss_bbox"] == pytest.approx(2 * right.losses["loss_bbox"].item())
    assert wrong.losses["loss_giou"] == pytest.approx(right.losses["loss_giou"].item())


def test_options_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="unknown option 'giou_epsilon'"):
        options_of("detr").with_(giou_epsilon=1e-6)
    with pytest.raises(ValueError, match="class_divisor='box'; it must be one of"):
        options_of("detr").with_(class_divisor="box")
    with pytest.raises(ValueError, match="unknown profile 'retr'"):
        options_of("retr")
