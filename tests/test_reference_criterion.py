"""The fast reference criterion against published vectors, and its promises one by one."""

from __future__ import annotations

import copy
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detr_fixtures import vectors
from detr_reference import matching
from detr_reference.boxes import corners, giou
from detr_reference.criterion import HungarianMatcher, SetCriterion, build_criterion
from detr_reference.options import PROFILES, Options
from detr_reference.textbook import textbook

torch.set_num_threads(1)

PROFILE_NAMES = tuple(PROFILES)
CLASSES, TOKENS = 5, 12
MATCHED = [name for family in ("detr", "deformable", "dino", "ogd") for name in vectors.names(family)]


# --- inputs ---------------------------------------------------------------------------------------------------------


def criterion_of(profile: str, **options: Any) -> SetCriterion:
    return build_criterion(num_classes=CLASSES, num_decoder_layers=3, profile=profile, **options)


def layer(profile: str, seed: int, images: int, queries: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    channels = {"detr": CLASSES + 1, "grounding-dino": TOKENS}.get(profile, CLASSES)
    return {
        "pred_logits": torch.randn(images, queries, channels, generator=random),
        "pred_boxes": torch.rand(images, queries, 4, generator=random) * 0.4 + 0.1,
    }


def call_of(profile: str, sizes: tuple[int, ...] = (2, 0, 3), queries: int = 6) -> tuple[dict[str, Any], list[Any]]:
    """Outputs of three decoder layers and, where the profile has one, an encoder with two more queries; targets."""
    outputs: dict[str, Any] = layer(profile, 0, len(sizes), queries)
    outputs["aux_outputs"] = [layer(profile, 1 + i, len(sizes), queries) for i in range(2)]
    if key := PROFILES[profile].encoder_key:
        outputs[key] = layer(profile, 9, len(sizes), queries + 2)
    random = torch.Generator().manual_seed(7)
    targets = []
    for n in sizes:
        labels = torch.randint(CLASSES, (n,), generator=random)
        target = {"labels": labels, "boxes": torch.rand(n, 4, generator=random) * 0.4 + 0.1}
        if profile == "grounding-dino":
            target["token_labels"] = token_map()[labels]
        targets.append(target)
    if profile == "grounding-dino":
        outputs["text_mask"] = torch.arange(TOKENS).expand(len(sizes), -1) < 2 * CLASSES
    return outputs, targets


def token_map() -> Tensor:
    """Class k has the tokens 2k and 2k + 1, but class 0 has token 0 alone."""
    tokens = torch.eye(CLASSES).repeat_interleave(2, 1)
    tokens[0, 1] = 0
    return torch.cat([tokens, torch.zeros(CLASSES, TOKENS - 2 * CLASSES)], 1)


def tensors(outputs: dict[str, Any]) -> list[Tensor]:
    """Every prediction in outputs."""
    found = []
    for value in outputs.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found += tensors(part)
            elif isinstance(part, Tensor) and part.is_floating_point():
                found.append(part)
    return found


def total(losses: dict[str, Tensor], criterion: SetCriterion) -> Tensor:
    return torch.stack([losses[key] * weight for key, weight in criterion.weight_dict.items()]).sum()


def gradients(criterion: SetCriterion, outputs: dict[str, Any], targets: list[Any]) -> list[Tensor]:
    predictions = tensors(outputs)
    for prediction in predictions:
        prediction.requires_grad_()
    return list(torch.autograd.grad(total(criterion(outputs, targets), criterion), predictions))


def changed(values: Any, change: Any) -> Any:
    """A copy of nested inputs with ``change`` made to each tensor."""
    if isinstance(values, dict):
        return {key: changed(value, change) for key, value in values.items()}
    if isinstance(values, list):
        return [changed(value, change) for value in values]
    return change(values)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor], relative: float) -> bool:
    return a.keys() == b.keys() and all(a[key].item() == pytest.approx(b[key].item(), rel=relative) for key in a)


every_profile = pytest.mark.parametrize("profile", PROFILE_NAMES)


def clamp_passes_at_its_bound() -> bool:
    """Whether clamp(min=0) has the slope 1 at 0, as in the torch that made the vectors, or 0, as from 2.15 on."""
    zero = torch.zeros((), requires_grad=True)
    return bool(torch.autograd.grad(zero.clamp(min=0), zero)[0])


CLAMP_PASSES_AT_ITS_BOUND = clamp_passes_at_its_bound()


def touching(a: Tensor, b: Tensor) -> Tensor:
    """Which pairs of boxes touch without overlapping: there GIoU has a kink, and its gradient is torch's choice."""
    (a_low, a_high), (b_low, b_high) = corners(a), corners(b)
    return (torch.minimum(a_high, b_high) == torch.maximum(a_low, b_low)).any(0)


# --- published vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vectors.names())
def test_it_returns_what_published_code_returned(name: str) -> None:
    vector = vectors.load(name)
    # Open-GroundingDino's targets are float32
    relative = 1e-7 if vector.family == "ogd" else 1e-12
    options = vector.options.with_(losses=(*vector.options.losses, "cardinality"))
    if vector.profile == "detr":  # the vectors were made with the configured value, in double
        options = options.with_(eos_coef=round(options.eos_coef, 6))
    criterion = SetCriterion(options)
    leaves = {key: vector.layer(key.split(".")[0])[key.split(".")[1]].requires_grad_() for key in vector.grads}

    losses = criterion(vector.outputs, vector.targets)

    for key, want in vector.losses.items():
        if key.startswith("cardinality") and vector.profile != "detr":
            continue  # published: argmax ≠ last class, which for sigmoid classes is a real one
        assert losses[key].item() == pytest.approx(want, rel=relative, abs=1e-14), key
    torch.stack(
        [loss * vector.weights[key.split("_")[1]] for key, loss in losses.items() if key[:5] == "loss_"]
    ).sum().backward()
    for key, want_gradient in vector.grads.items():
        found, name = key.split(".")
        gradient = leaves[key].grad
        if name == "pred_boxes" and not CLAMP_PASSES_AT_ITS_BOUND:
            for b, pairs in enumerate(vector.matches.get(found, ())):
                kinks = touching(leaves[key][b, pairs[0]], vector.targets[b]["boxes"][pairs[1]])
                gradient[b, pairs[0, kinks]] = want_gradient[b, pairs[0, kinks]]
        torch.testing.assert_close(gradient, want_gradient, rtol=relative, atol=relative)


@pytest.mark.parametrize("name", MATCHED)
def test_its_matches_are_those_of_published_code(name: str) -> None:
    vector = vectors.load(name)
    for found, images in vector.matches.items():
        targets = vector.targets
        if found == "enc" and vector.options.encoder_targets == "class-zero":
            targets = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        for (query, target), want in zip(
            HungarianMatcher(vector.options)(vector.layer(found), targets), images, strict=True
        ):
            assert set(zip(query.tolist(), target.tolist(), strict=True)) == set(zip(*want.tolist(), strict=True))


# --- what it returns ------------------------------------------------------------------------------------------------


def test_grounding_dino_has_21_weights_and_a_loss_for_each() -> None:
    criterion = build_criterion(num_classes=80, num_decoder_layers=6, profile="grounding-dino")
    assert len(criterion.weight_dict) == 21
    assert criterion.weight_dict["loss_ce_enc"] == 2.0
    assert criterion.weight_dict["loss_giou_4"] == 2.0


@every_profile
def test_every_trained_loss_has_a_weight_and_every_weight_a_loss(profile: str) -> None:
    criterion = criterion_of(profile, losses=("labels", "boxes", "cardinality"))
    losses = criterion(*call_of(profile))
    assert {key for key in losses if key.startswith("loss_")} == set(criterion.weight_dict)
    logged = {key: loss for key, loss in losses.items() if key not in criterion.weight_dict}
    assert all("_error" in key and not loss.requires_grad for key, loss in logged.items())
    assert ("class_error" in logged) == (profile != "grounding-dino")
    assert all(loss.ndim == 0 for loss in losses.values())


@every_profile
def test_losses_selects_what_is_computed(profile: str) -> None:
    assert set(criterion_of(profile, losses=("boxes",), two_stage=False)(*call_of(profile))) == {
        f"loss_{kind}{suffix}" for kind in ("bbox", "giou") for suffix in ("", "_0", "_1")
    }


@every_profile
def test_a_layers_losses_are_those_it_would_have_as_the_final_one(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    losses = criterion(outputs, targets)
    mask = {key: outputs[key] for key in outputs if key == "text_mask"}
    alone = criterion({**outputs["aux_outputs"][1], **mask}, targets)
    for key in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{key}_1"], alone[key])


def test_an_encoder_may_have_queries_of_its_own_and_deformable_detr_gives_it_class_0() -> None:
    criterion = criterion_of("deformable-detr")
    outputs, targets = call_of("deformable-detr")
    zeroed = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    alone = criterion(outputs["enc_outputs"], zeroed)
    losses = criterion(outputs, targets)
    for key in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{key}_enc"], alone[key])


def test_weighted_losses_are_already_multiplied() -> None:
    call = call_of("detr")
    plain, weighted = criterion_of("detr")(*call), criterion_of("detr", weighted=True)(*call)
    assert weighted["loss_bbox"] == 5 * plain["loss_bbox"]
    assert weighted["class_error"] == plain["class_error"]


def test_open_grounding_dino_divides_the_class_loss_by_the_matches_of_the_layer() -> None:
    call = call_of("grounding-dino", sizes=(5, 4), queries=3)
    by_boxes, by_matches = (criterion_of("grounding-dino", class_divisor=d)(*call) for d in ("boxes", "matches"))
    assert (by_matches["loss_ce"] / by_boxes["loss_ce"]).item() == pytest.approx(9 / 6)
    assert (by_matches["loss_ce_enc"] / by_boxes["loss_ce_enc"]).item() == pytest.approx(9 / 9)
    assert by_matches["loss_bbox"] == by_boxes["loss_bbox"]


def test_class_error_is_0_where_nothing_is_matched() -> None:
    assert criterion_of("detr")(*call_of("detr", sizes=(0, 0)))["class_error"] == 0


def test_masked_tokens_have_no_part_whatever_their_logits() -> None:
    criterion = criterion_of("grounding-dino")
    outputs, targets = call_of("grounding-dino")
    want = criterion(outputs, targets)
    for value in (-torch.inf, torch.nan, 1e4):
        garbage = changed(outputs, lambda x: x)
        for one in (garbage, *garbage["aux_outputs"], garbage["enc_outputs"]):
            one["pred_logits"] = one["pred_logits"].clone().requires_grad_()
            with torch.no_grad():
                one["pred_logits"][..., 2 * CLASSES :] = value
        losses = criterion(garbage, targets)
        if value == value:  # NaN is not finite wherever it stands, and so bears on the match
            assert same(losses, want)
        (gradient,) = torch.autograd.grad(losses["loss_ce"], garbage["pred_logits"])
        assert not gradient[..., 2 * CLASSES :].any()
        assert gradient.isfinite().all()


def test_every_image_has_its_own_prompt() -> None:
    criterion = criterion_of("grounding-dino", two_stage=False)
    outputs, targets = call_of("grounding-dino", sizes=(2, 1, 3))
    outputs["text_mask"] = torch.arange(TOKENS) < torch.tensor([[4], [9], [12]])
    for target, length in zip(targets, (4, 9, 12), strict=True):
        target["token_labels"] = target["token_labels"] * (torch.arange(TOKENS) < length)
        target["token_labels"][:, 0] = 1
    together = criterion(outputs, targets)
    one_by_one = [
        criterion(changed(outputs, lambda x, b=b: x[b : b + 1]), [target])["loss_ce"] * len(target["labels"])
        for b, target in enumerate(targets)
    ]
    torch.testing.assert_close(together["loss_ce"] * 6, torch.stack(one_by_one).sum())


# --- masks ----------------------------------------------------------------------------------------------------------

WITH_MASKS = ("labels", "boxes", "masks")
SIZES = ((13, 17), (8, 20), (16, 9))  # H, W of the images


def masks_call(profile: str = "detr", sizes: tuple[int, ...] = (2, 0, 3)) -> tuple[dict[str, Any], list[Any]]:
    """call_of, with pred_masks of 6 by 24, fewer rows and more columns than any image has."""
    outputs, targets = call_of(profile, sizes)
    random = torch.Generator().manual_seed(8)
    outputs["pred_masks"] = torch.randn(len(sizes), 6, 6, 24, generator=random)
    for target, size in zip(targets, SIZES, strict=False):
        target["masks"] = torch.rand(len(target["labels"]), *size, generator=random) > 0.5
    return outputs, targets


@pytest.mark.parametrize("profile", ["detr", "deformable-detr", "dino"])
def test_mask_losses_are_the_textbooks(profile: str) -> None:
    criterion = criterion_of(profile, losses=WITH_MASKS, focal_alpha=0.7, focal_gamma=0.0)
    outputs, targets = masks_call(profile)
    losses = criterion(outputs, targets)
    found = textbook.under(criterion.options)(outputs, targets).losses
    want = {key: value for key, value in found.items() if key.startswith("loss_")}
    assert {key for key in losses if key.startswith("loss_")} == set(want) == set(criterion.weight_dict)
    assert all(losses[key].item() == pytest.approx(want[key].item(), rel=1e-5) for key in want)


def test_mask_losses_are_for_the_final_layer_only_and_have_weights_of_their_own() -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS, mask_loss_coef=3.0, dice_loss_coef=4.0)
    outputs, targets = masks_call()
    found = {key for key in criterion(outputs, targets) if "mask" in key or "dice" in key}
    assert found == {"loss_mask", "loss_dice"}
    assert (criterion.weight_dict["loss_mask"], criterion.weight_dict["loss_dice"]) == (3.0, 4.0)
    assert set(criterion.weight_dict) == {*criterion_of("detr").weight_dict, *found}
    assert not {"loss_mask", "loss_dice"} & set(criterion_of("detr")(outputs, targets))
    assert set(criterion_of("detr", losses=("masks",))(outputs, targets)) == found


def test_masks_may_be_bool_numbers_or_decoded_run_lengths() -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call()
    want = criterion(outputs, targets)

    def decoded(masks: Tensor) -> Tensor:
        runs = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        return torch.from_numpy(coco_mask.decode(runs)).permute(2, 0, 1) if runs else masks

    for cast in (decoded, Tensor.byte, Tensor.long, Tensor.half, Tensor.double):
        others = [{**target, "masks": cast(target["masks"])} for target in targets]
        assert same(criterion(outputs, others), want)


def test_a_mask_between_0_and_1_weighs_both() -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call()
    soft = [{**target, "masks": target["masks"] * 0.6 + 0.1} for target in targets]
    want = textbook.under(criterion.options)(outputs, soft).losses
    losses = criterion(outputs, soft)
    assert all(losses[key].item() == pytest.approx(want[key].item(), rel=1e-5) for key in ("loss_mask", "loss_dice"))


def test_padding_is_background_even_that_of_an_image_without_targets() -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call()
    height, width = (max(side) for side in zip(*SIZES, strict=True))
    padded = [
        {**target, "masks": torch.nn.functional.pad(target["masks"], (0, width - w, 0, height - h))}
        for target, (h, w) in zip(targets, SIZES, strict=True)
    ]
    assert same(criterion(outputs, padded), criterion(outputs, targets))
    wider = [{**targets[0]}, {**targets[1], "masks": torch.zeros(0, 8, 40)}, {**targets[2]}]
    assert criterion(outputs, wider)["loss_mask"] != criterion(outputs, targets)["loss_mask"]


@pytest.mark.parametrize("empty", [torch.zeros(0, 7, 9), torch.zeros(0, 0, 0), torch.tensor([])])
def test_without_targets_mask_losses_are_zero_and_in_the_graph(empty: Tensor) -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call(sizes=(0, 0))
    targets = [{**target, "masks": empty} for target in targets]
    losses = criterion(outputs, targets)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    found = gradients(criterion, outputs, targets)
    assert [gradient.shape for gradient in found] == [x.shape for x in tensors(outputs)]
    outputs, targets = masks_call()
    targets[1]["masks"] = empty
    assert criterion(outputs, targets)["loss_mask"] > 0


def test_mask_gradients_are_those_of_finite_differences_and_matched_queries_alone() -> None:
    criterion = criterion_of("detr", losses=("masks",))
    outputs, targets = masks_call(sizes=(1, 2))

    def loss(masks: Tensor) -> Tensor:
        return total(criterion({**outputs, "pred_masks": masks}, targets), criterion)

    masks = outputs["pred_masks"].double().requires_grad_()
    assert torch.autograd.gradcheck(loss, masks[..., :3, :2].detach().requires_grad_())
    (gradient,) = torch.autograd.grad(loss(masks), masks)
    matched = criterion.matcher(outputs, targets)
    for b, (queries, _) in enumerate(matched):
        assert gradient[b].flatten(1).any(1).nonzero()[:, 0].tolist() == sorted(queries.tolist())


@pytest.mark.parametrize("size", [20.0, 110.0])
def test_sure_masks_give_finite_losses_and_gradients(size: float) -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call()
    outputs["pred_masks"] = outputs["pred_masks"].sign() * size
    assert all(loss.isfinite() for loss in criterion(outputs, targets).values())
    assert all(gradient.isfinite().all() for gradient in gradients(criterion, outputs, targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masks_are_computed_in_float32(dtype: torch.dtype) -> None:
    criterion = criterion_of("detr", losses=WITH_MASKS)
    outputs, targets = masks_call()
    halved = {**outputs, "pred_masks": outputs["pred_masks"].to(dtype)}
    widened = {**outputs, "pred_masks": halved["pred_masks"].float()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(criterion(halved, targets), criterion(widened, targets), 1e-6)
    assert gradients(criterion, halved, targets)[-1].dtype == dtype


# --- denoising ------------------------------------------------------------------------------------------------------


def denoising_call(
    profile: str = "dino", sizes: tuple[int, ...] = (2, 0, 3), groups: int = 2, room: int = 4
) -> tuple[dict[str, Any], list[Any]]:
    """call_of, with denoising queries of three decoder layers and room for as many targets a group."""
    outputs, targets = call_of(profile, sizes)
    queries = groups * 2 * room
    known: dict[str, Any] = layer(profile, 20, len(sizes), queries)
    known["aux_outputs"] = [layer(profile, 21 + i, len(sizes), queries) for i in range(2)]
    outputs["dn_meta"] = {"pad_size": queries, "num_dn_group": groups, "output_known_lbs_bboxes": known}
    return outputs, targets


def known_of(outputs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = outputs["dn_meta"]["output_known_lbs_bboxes"]
    return found


SIGMOID = ("deformable-detr", "dino", "grounding-dino")


@pytest.mark.parametrize("profile", SIGMOID)
@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0)])
def test_denoising_losses_are_the_textbooks_and_have_their_bases_weights(profile: str, sizes: tuple[int, ...]) -> None:
    criterion = criterion_of(profile, denoising=True)
    outputs, targets = denoising_call(profile, sizes)
    losses = criterion(outputs, targets)
    found = textbook.under(criterion.options)(outputs, targets).losses
    want = {key: value for key, value in found.items() if key.startswith("loss_")}
    assert {key for key in losses if key.startswith("loss_")} == set(want) == set(criterion.weight_dict)
    assert {key.removeprefix("loss_ce") for key in want if "ce_dn" in key} == {"_dn", "_dn_0", "_dn_1"}
    assert all(losses[key].item() == pytest.approx(want[key].item(), rel=1e-5) for key in want)
    for key, weight in criterion.weight_dict.items():
        assert weight == criterion.weight_dict["_".join(key.split("_")[:2])]
    grads = gradients(criterion, outputs, targets)
    assert [gradient.shape for gradient in grads] == [x.shape for x in tensors(outputs)]
    assert all(gradient.any() == (gradient.shape[-1] != 4 or any(sizes)) for gradient in grads)


def test_positives_reconstruct_their_targets_and_all_others_are_background() -> None:
    criterion = criterion_of("dino", denoising=True)
    outputs, targets = denoising_call()
    known = known_of(outputs)
    known["pred_logits"] = torch.full_like(known["pred_logits"], -30.0)
    for b, target in enumerate(targets):
        for first in (0, 8):  # two groups of 4 positives and 4 negatives
            slots = torch.arange(first, first + len(target["labels"]))
            known["pred_logits"][b, slots, target["labels"]] = 30.0
            known["pred_boxes"][b, slots] = target["boxes"]
    losses = criterion(outputs, targets)
    assert losses["loss_ce_dn"] < 1e-9
    assert losses["loss_bbox_dn"] == 0
    for slot in (3, 4, 7):  # padding of positives, a negative, padding of negatives
        wrong = changed(known, lambda x: x)
        wrong["pred_logits"] = known["pred_logits"].clone()
        wrong["pred_logits"][0, slot, 1] = 30.0
        outputs["dn_meta"] = {**outputs["dn_meta"], "output_known_lbs_bboxes": wrong}
        assert criterion(outputs, targets)["loss_ce_dn"].item() == pytest.approx(0.75 * 30 / (5 * 2), rel=1e-6)


def test_denoising_queries_never_change_the_other_losses() -> None:
    criterion = criterion_of("dino", denoising=True, losses=("labels", "boxes", "cardinality"))
    outputs, targets = denoising_call()
    plain = {key: value for key, value in outputs.items() if key != "dn_meta"}
    want = criterion(plain, targets)
    assert not any("_dn" in key for key in want)
    together = criterion(outputs, targets)
    assert same({key: loss for key, loss in together.items() if "_dn" not in key}, want)
    assert {key.split("_dn")[0] for key in together if "_dn" in key} == {"loss_ce", "loss_bbox", "loss_giou"}
    for absent in (None, {}, {"pad_size": 0, "num_dn_group": 1}):
        assert same(criterion({**plain, "dn_meta": absent}, targets), want)
    assert same(criterion_of("dino", losses=criterion.options.losses)(outputs, targets), want)


def test_denoising_losses_are_divided_by_boxes_times_groups() -> None:
    criterion = criterion_of("dino", denoising=True)
    outputs, targets = denoising_call(groups=1)
    once = criterion(outputs, targets)
    known = known_of(outputs)
    twice = changed(known, lambda x: torch.cat([x, x], 1))
    outputs["dn_meta"] = {"pad_size": 16, "num_dn_group": 2, "output_known_lbs_bboxes": twice}
    assert close(criterion(outputs, targets), once, 1e-6)


def test_no_slots_at_all_give_zeros_in_the_graph() -> None:
    criterion = criterion_of("dino", denoising=True)
    outputs, targets = denoising_call(sizes=(0, 0), groups=1, room=0)
    losses = criterion(outputs, targets)
    assert losses["loss_ce_dn"] == losses["loss_giou_dn_1"] == 0
    found = gradients(criterion, outputs, targets)
    assert [gradient.shape for gradient in found] == [x.shape for x in tensors(outputs)]


def test_a_criterion_with_masks_and_denoising_trains_both() -> None:
    criterion = criterion_of("dino", denoising=True, losses=WITH_MASKS)
    outputs, targets = masks_call("dino")
    outputs["dn_meta"] = denoising_call()[0]["dn_meta"]
    losses = criterion(outputs, targets)
    assert {key for key in losses if key != "class_error"} == set(criterion.weight_dict)


@pytest.mark.parametrize(
    ("profile", "options", "call"),
    [("detr", {"losses": WITH_MASKS}, masks_call), ("dino", {"denoising": True}, denoising_call)],
)
@pytest.mark.filterwarnings("ignore")
def test_masks_and_denoising_change_nothing_and_run_wherever_the_rest_does(
    profile: str, options: dict[str, Any], call: Any
) -> None:
    criterion = criterion_of(profile, **options)
    outputs, targets = call(profile)
    before, state = copy.deepcopy((outputs, targets)), torch.get_rng_state()
    want = criterion(outputs, targets)
    with torch.inference_mode():
        assert same(criterion(outputs, targets), want)
    with torch.no_grad():
        assert same(pickle.loads(pickle.dumps(criterion.eval()))(outputs, targets), want)
    compiled = torch.compile(lambda: criterion(outputs, targets), backend="eager")
    assert same(compiled(), want)
    first, again = (gradients(criterion, outputs, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: gradients(criterion, outputs, targets), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(before, (outputs, targets), strict=True):
        assert repr(changed(a, lambda x: getattr(x, "tolist", lambda x=x: x)())) == repr(
            changed(b, lambda x: getattr(x, "tolist", lambda x=x: x)())
        )


# --- edges ----------------------------------------------------------------------------------------------------------


@every_profile
def test_without_targets_box_losses_are_zero_and_every_output_gets_a_gradient(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile, sizes=(0, 0))
    losses = criterion(outputs, targets)
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou_1"] == 0
    assert losses["loss_ce"] > 0
    found = gradients(criterion, outputs, targets)
    assert [gradient.shape for gradient in found] == [x.shape for x in tensors(outputs)]
    assert all(gradient.any() == (gradient.shape[-1] != 4) for gradient in found)


@every_profile
def test_no_target_may_be_written_as_an_empty_tensor_of_any_kind(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    want = criterion(outputs, targets)
    targets[1] = {key: torch.tensor([]) for key in targets[1]}
    assert same(criterion(outputs, targets), want)
    nothing = [{key: torch.tensor([]) for key in target} for target in targets]
    assert criterion(outputs, nothing)["loss_bbox"] == 0


@every_profile
def test_more_targets_than_queries_match_every_query_and_divide_by_the_targets(profile: str) -> None:
    criterion = criterion_of(profile, two_stage=False)
    outputs, targets = call_of(profile, sizes=(7,), queries=3)
    ((queries, owners),) = criterion.matcher(outputs, targets)
    assert sorted(queries.tolist()) == [0, 1, 2]
    assert len(set(owners.tolist())) == 3
    distance = (outputs["pred_boxes"][0, queries] - targets[0]["boxes"][owners]).abs().sum()
    torch.testing.assert_close(criterion(outputs, targets)["loss_bbox"], distance / 7)


@every_profile
def test_the_matcher_takes_any_layer_and_returns_index_tensors(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    for predictions in (outputs, outputs["aux_outputs"][0]):
        pairs = criterion.matcher(predictions, targets)
        assert [len(query) for query, _ in pairs] == [2, 0, 3]
        assert all(x.dtype == torch.int64 and x.ndim == 1 for pair in pairs for x in pair)


def test_zero_area_boxes_even_coincident_have_finite_losses_and_gradients() -> None:
    criterion = criterion_of("detr")
    outputs, targets = call_of("detr")
    for b, size in enumerate(([0.0, 0.0], [0.0, 0.2], [0.2, 0.0])):
        outputs["pred_boxes"][b, :, 2:] = torch.tensor(size)
        targets[b]["boxes"] = outputs["pred_boxes"][b, : len(targets[b]["labels"])].clone()
    assert all(gradient.isfinite().all() for gradient in gradients(criterion, outputs, targets))
    assert criterion(outputs, targets)["loss_giou"].isfinite()


def test_identical_boxes_have_giou_1_down_to_a_thousandth_of_the_image() -> None:
    box = torch.tensor([[0.3, 0.7, 1e-3, 1e-3], [0.31, 0.9, 0.4, 1e-3], [0.5, 0.5, 1.0, 1.0]])
    assert giou(corners(box), corners(box)).tolist() == [1, 1, 1]


@every_profile
@pytest.mark.parametrize("size", [20.0, 110.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_logits_give_finite_losses_and_gradients(profile: str, size: float, dtype: torch.dtype) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    outputs = changed(
        outputs, lambda x: (x.sign() * size if x.shape[-1] != 4 else x).to(dtype) if x.is_floating_point() else x
    )
    losses = criterion(outputs, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(losses[key].dtype == dtype for key in criterion.weight_dict)
    assert all(gradient.isfinite().all() for gradient in gradients(criterion, outputs, targets))


@every_profile
def test_a_broken_query_is_taken_only_when_no_other_is_left(profile: str) -> None:
    matcher = HungarianMatcher(criterion_of(profile).options)
    outputs, targets = call_of(profile, sizes=(3,), queries=4)
    (best, *_), _ = matcher(outputs, targets)[0]
    for key, channel, value in (
        ("pred_logits", -1, torch.nan),
        ("pred_logits", 2, torch.inf),
        ("pred_boxes", 1, torch.nan),
    ):
        broken = changed(outputs, lambda x: x.clone() if isinstance(x, Tensor) else x)
        broken[key][0, best, channel] = value
        assert best not in matcher(broken, targets)[0][0]
        broken[key][0, :, channel] = value
        assert len(matcher(broken, targets)[0][0]) == 3
    rest = changed(outputs, lambda x: x)
    rest["pred_boxes"] = outputs["pred_boxes"].clone()
    rest["pred_boxes"][0, :2] = torch.nan
    queries = matcher(rest, targets)[0][0].tolist()
    assert {2, 3} < set(queries)


def test_dear_pairs_do_not_blur_the_others() -> None:
    cost = np.array([[0.1, 0.2, np.nan], [0.2, 0.1 - 1e-9, np.inf], [0.3, 0.4, -np.inf]], dtype=np.float64)
    ((queries, targets),) = matching.assign(cost[None])
    assert dict(zip(targets.tolist(), queries.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2}


def test_focal_gradients_are_those_of_finite_differences() -> None:
    criterion = criterion_of("grounding-dino", focal_gamma=1.5, focal_alpha=0.4)
    outputs, targets = call_of("grounding-dino")

    def loss(logits: Tensor) -> Tensor:
        return criterion({**outputs, "pred_logits": logits}, targets)["loss_ce"]

    assert torch.autograd.gradcheck(loss, outputs["pred_logits"].double().requires_grad_())


def test_large_inputs_are_summed_in_parts_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from detr_reference import classification

    call = call_of("dino")
    whole = criterion_of("dino")(*call)
    monkeypatch.setattr(classification, "_PART", 7)
    assert close(criterion_of("dino")(*call), whole, 1e-6)


# --- dtypes, side effects, state ------------------------------------------------------------------------------------


@every_profile
def test_labels_may_be_int32_and_target_boxes_float64(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    cast = [{**t, "labels": t["labels"].int(), "boxes": t["boxes"].double()} for t in targets]
    assert same(criterion(outputs, cast), criterion(outputs, targets))


@every_profile
def test_inputs_need_not_be_contiguous(profile: str) -> None:
    criterion = criterion_of(profile)
    call = call_of(profile)
    strided = changed(list(call), lambda x: x.repeat_interleave(2, -1)[..., ::2])
    assert same(criterion(*strided), criterion(*call))
    want, found = gradients(criterion, *call), gradients(criterion, *strided)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@every_profile
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(profile: str, dtype: torch.dtype) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)
    halved = changed(outputs, lambda x: x.to(dtype) if x.is_floating_point() else x)
    widened = changed(halved, lambda x: x.float() if x.is_floating_point() else x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(criterion(halved, targets), criterion(widened, targets), 1e-6)
    assert close(criterion(halved, targets), criterion(widened, targets), 1e-6)
    found = gradients(criterion, halved, targets)
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in found)


@every_profile
def test_a_call_changes_nothing_and_repeats_to_the_bit(profile: str) -> None:
    criterion = criterion_of(profile, losses=("labels", "boxes", "cardinality"))
    call = call_of(profile)
    before, state = copy.deepcopy(call), torch.get_rng_state()
    first = criterion(*call)
    criterion(*call_of(profile, sizes=(4, 1)))
    criterion.eval()
    with torch.inference_mode():
        assert same(criterion(*call), first)
    assert same(criterion(*call), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert pickle.dumps(changed(list(before), Tensor.tolist)) == pickle.dumps(changed(list(call), Tensor.tolist))


@every_profile
@pytest.mark.filterwarnings("ignore")
def test_a_caller_may_be_compiled(profile: str) -> None:
    criterion = criterion_of(profile)
    outputs, targets = call_of(profile)

    @torch.compile(backend="eager")
    def step(boxes: Tensor) -> Tensor:
        return total(criterion({**outputs, "pred_boxes": boxes * 2}, targets), criterion)

    boxes = (outputs["pred_boxes"] / 2).requires_grad_()
    compiled = step(boxes)
    compiled.backward()
    assert compiled.item() == pytest.approx(total(criterion(outputs, targets), criterion).item(), rel=1e-6)
    assert boxes.grad.any()


@every_profile
def test_it_works_in_several_threads(profile: str) -> None:
    criterion = criterion_of(profile)
    call = call_of(profile)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: criterion(*call), range(8)))
    assert all(same(losses, found[0]) for losses in found)


@every_profile
def test_it_copies_and_pickles_and_has_no_state(profile: str) -> None:
    criterion = criterion_of(profile)
    call = call_of(profile)
    want = criterion(*call)
    assert same(copy.deepcopy(criterion)(*call), want)
    assert same(pickle.loads(pickle.dumps(criterion))(*call), want)
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


# --- refusals -------------------------------------------------------------------------------------------------------


def test_three_zero_matching_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="set_cost_class, set_cost_bbox and set_cost_giou"):
        criterion_of("detr", set_cost_class=0, set_cost_bbox=0, set_cost_giou=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "yolo"}, "unknown profile 'yolo'.*grounding-dino"),
        ({"focal_alpah": 0.3}, "unknown option 'focal_alpah'"),
        ({"losses": ("labels", "mask")}, "losses"),
        ({"class_loss": "focal"}, "class_divisor"),
        ({"denoising": True}, "denoising=True needs"),
    ],
)
def test_unknown_or_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_criterion(num_classes=3, **options)


def test_every_option_is_named_in_the_signature() -> None:
    import inspect
    from dataclasses import fields

    assert {field.name for field in fields(Options)} < set(inspect.signature(build_criterion).parameters)


def spoilt(profile: str, spoil: str, call: Any = call_of) -> tuple[dict[str, Any], list[Any]]:
    outputs, targets = call(profile)
    scope = {"outputs": outputs, "targets": targets, "torch": torch}
    exec(spoil, scope)
    return outputs, targets


@every_profile
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("del outputs['pred_logits']", r"outputs\['pred_logits'\] is missing"),
        ("del outputs['aux_outputs'][1]['pred_boxes']", r"outputs\['aux_outputs'\]\[1\]\['pred_boxes'\] is missing"),
        ("del targets[2]['boxes']", r"targets\[2\]\['boxes'\] is missing"),
        ("del targets[0]['labels']", r"targets\[0\]\['labels'\] is missing"),
        ("targets.pop()", "targets has 2 images"),
        ("targets[2]['boxes'] = targets[2]['boxes'][:2]", r"targets\[2\]\['boxes'\] has the shape \[2, 4\]"),
        ("outputs['pred_boxes'] = outputs['pred_boxes'][:, :5]", r"outputs\['pred_logits'\] \[3, 6"),
        ("outputs['aux_outputs'][0] = {k: v[:2] for k, v in outputs['aux_outputs'][0].items()}", r"\[0\] has 2 images"),
        ("targets[2]['boxes'][1, 3] = -0.1", r"targets\[2\]\['boxes'\]\[1\] has a negative width or height"),
        ("targets[2]['boxes'][1, 0] = torch.nan", r"targets\[2\]\['boxes'\]\[1\] is not finite"),
        ("targets[0]['boxes'][0, 0] = torch.inf", r"targets\[0\]\['boxes'\]\[0\] is not finite"),
        (
            "outputs['aux_outputs'][1]['pred_boxes'][2, 4, 2] = -0.1",
            r"\['aux_outputs'\]\[1\]\['pred_boxes'\] has a neg",
        ),
        ("targets[0]['labels'] = targets[0]['labels'].float()", r"targets\[0\]\['labels'\] must be integers"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(profile: str, spoil: str, message: str) -> None:
    call = spoilt(profile, spoil)
    before = copy.deepcopy(call)
    with pytest.raises(ValueError, match=message):
        criterion_of(profile)(*call)
    assert pickle.dumps(changed(list(before), Tensor.tolist)) == pickle.dumps(changed(list(call), Tensor.tolist))


@every_profile
def test_a_batch_without_images_is_refused(profile: str) -> None:
    outputs, _ = call_of(profile)
    with pytest.raises(ValueError, match="targets have no image"):
        criterion_of(profile)({key: outputs[key][:0] for key in ("pred_logits", "pred_boxes")}, [])


@pytest.mark.parametrize("profile", ["detr", "deformable-detr", "dino"])
@pytest.mark.parametrize("label", [-1, CLASSES, 255])
def test_a_label_that_is_no_class_is_refused(profile: str, label: int) -> None:
    with pytest.raises(ValueError, match=r"targets\[2\]\['labels'\]\[1\] is not in 0\.\.4"):
        criterion_of(profile)(*spoilt(profile, f"targets[2]['labels'][1] = {label}"))


@pytest.mark.parametrize("profile", ["detr", "deformable-detr", "dino"])
def test_logits_of_another_number_of_classes_are_refused(profile: str) -> None:
    with pytest.raises(ValueError, match="num_classes=5"):
        criterion_of(profile)(*spoilt(profile, "outputs['pred_logits'] = outputs['pred_logits'][..., 1:]"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("del targets[0]['token_labels']", r"targets\[0\]\['token_labels'\] is missing"),
        ("outputs['text_mask'] = outputs['text_mask'][:, 1:]", r"outputs\['text_mask'\] has the shape \[3, 11\]"),
        (
            "targets[0]['token_labels'] = targets[0]['token_labels'][:, 1:]",
            r"\['token_labels'\] has the shape \[2, 11\]",
        ),
        ("targets[2]['token_labels'][1] = 0", r"targets\[2\]\['token_labels'\]\[1\] marks no token"),
    ],
)
def test_token_inputs_that_do_not_fit_are_refused_by_their_name(spoil: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion_of("grounding-dino")(*spoilt("grounding-dino", spoil))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("del outputs['pred_masks']", r"outputs\['pred_masks'\] is missing"),
        ("outputs['pred_masks'] = outputs['pred_masks'][:, 1:]", r"outputs\['pred_masks'\] .*must be \[3, 6, h, w\]"),
        ("del targets[1]['masks']", r"targets\[1\]\['masks'\] is missing"),
        ("targets[2]['masks'] = targets[2]['masks'][1:]", r"targets\[2\]\['masks'\] .*\[2, 16, 9\]; with 3 labels"),
        ("targets[2]['masks'] = targets[2]['masks'][..., :0]", r"targets\[2\]\['masks'\] has the shape \[3, 16, 0\]"),
        ("targets[0]['masks'] = targets[0]['masks'] * 255", r"targets\[0\]\['masks'\] has values outside 0\.\.1"),
        ("targets[0]['masks'] = targets[0]['masks'] / 0", r"targets\[0\]\['masks'\] has values outside 0\.\.1"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_their_name(spoil: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion_of("detr", losses=WITH_MASKS)(*spoilt("detr", spoil, masks_call))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("del meta['pad_size']", r"outputs\['dn_meta'\]\['pad_size'\] is missing"),
        ("meta['num_dn_group'] = 0", r"\['num_dn_group'\] is 0"),
        ("meta['num_dn_group'] = 3", r"\['pad_size'\] is 16; 3 groups .* multiple of 6 from 18 on"),
        ("meta['num_dn_group'] = 4", r"\['pad_size'\] is 16; .* up to 3 targets an image"),
        ("meta['pad_size'] = 12", r"\['output_known_lbs_bboxes'\]\['pred_boxes'\] .*pad_size=12"),
        ("del known['pred_logits']", r"\['output_known_lbs_bboxes'\]\['pred_logits'\] is missing"),
        ("del known['aux_outputs'][1]['pred_boxes']", r"\['aux_outputs'\]\[1\]\['pred_boxes'\] is missing"),
        ("known['pred_logits'] = known['pred_logits'][..., 1:]", r"\['pred_logits'\] has 4 channels"),
        ("known['aux_outputs'][0]['pred_boxes'][2, 15, 3] = -0.1", r"\[0\]\['pred_boxes'\] has a negative width"),
    ],
)
def test_denoising_queries_that_do_not_fit_are_refused_by_their_name(spoil: str, message: str) -> None:
    given = "meta = outputs['dn_meta']; known = meta['output_known_lbs_bboxes']; "
    with pytest.raises(ValueError, match=message):
        criterion_of("dino", denoising=True)(*spoilt("dino", given + spoil, denoising_call))


# --- two processes --------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, sizes: list[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    criterion = criterion_of("dino")
    outputs, targets = call_of("dino", sizes=sizes[rank])
    losses = {key: loss.item() for key, loss in criterion(outputs, targets).items()}
    reached = all(gradient is not None for gradient in gradients(criterion, outputs, targets))
    torch.save((losses, reached), f"{folder}/{rank}")
    torch.distributed.barrier()  # the group ends with its processes: destroying it may wait for ever (torch 2.4, gloo)


@pytest.mark.parametrize(("sizes", "num_boxes"), [([(3, 2), (0, 0)], 2.5), ([(1, 0), (0, 0)], 1.0)])
def test_two_processes_divide_by_their_mean_number_of_targets_but_by_no_less_than_1(
    sizes: list[tuple[int, ...]], num_boxes: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(_rank, (folder, sizes), nprocs=2, join=False)
        ended = any(processes.join(timeout=30) for _ in range(4))
        for process in processes.processes:
            process.kill()
        assert ended, "the two processes wait for each other"
        ranks = [torch.load(Path(folder) / str(rank)) for rank in range(2)]
    for (losses, reached), own in zip(ranks, sizes, strict=True):
        alone = criterion_of("dino")(*call_of("dino", sizes=own))
        for key, loss in losses.items():
            if "error" not in key:
                assert loss == pytest.approx(alone[key].item() * max(sum(own), 1) / num_boxes, rel=1e-6), key
        assert reached
