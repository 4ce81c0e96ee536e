"""Known side effects, beside those in the chapter PURE: each what a call does besides, and the check that sees it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_conformance.contract.callers import training_and_evaluation_give_the_same_losses
from detr_conformance.contract.matching import the_same_inputs_give_the_same_pairs
from detr_conformance.contract.purity import (
    inputs_are_not_changed,
    inputs_with_denoising_queries_are_not_changed,
    the_random_state_is_left_alone,
)
from detr_conformance.registry import EVERY, FOCAL, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook

Act = Callable[[Any, Any], None]


def _afterwards(act: Act) -> dict[str, Callable[..., Any]]:
    """What is done to outputs and targets once the losses are computed."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result = before(outputs, targets, given)
        with torch.no_grad():
            act(outputs, targets)
        return result

    return {"losses": losses}


def _each_target(act: Callable[[Any], Any]) -> Act:
    def change(outputs: Any, targets: Any) -> None:
        for target in targets:
            act(target)

    return change


def _corners(target: Any) -> None:
    target["boxes"][:, :2] -= target["boxes"][:, 2:] / 2


def _without_aux(outputs: Any, targets: Any) -> None:
    if "aux_outputs" in outputs:
        del outputs["aux_outputs"]


def _longer_aux(outputs: Any, targets: Any) -> None:
    if "aux_outputs" in outputs:
        outputs["aux_outputs"].append({k: outputs[k] for k in ("pred_logits", "pred_boxes")})


def _keys_in_aux(outputs: Any, targets: Any) -> None:
    for layer in outputs.get("aux_outputs", ()):
        layer["layer"] = torch.zeros(1)


def _sorted(descending: bool) -> Act:
    def act(target: Any) -> None:
        order = target["labels"].argsort(descending=descending, stable=True)
        target.update({k: v[order] for k, v in target.items() if k != "positive_map"})

    return _each_target(act)


def _normalised(target: Any) -> None:
    if "token_labels" in target:
        target["token_labels"].div_(target["token_labels"].sum(-1, keepdim=True).clamp(min=1))


for name, sentence, act in (
    ("targets-sorted-in-place", "The caller's targets are sorted by label.", _sorted(False)),
    ("targets-sorted-downwards-in-place", "The caller's targets are sorted by label, the last class first.",
     _sorted(True)),
    ("boxes-clamped-in-place", "The caller's predicted boxes are clamped to 0.05 … 0.95.",
     lambda outputs, targets: outputs["pred_boxes"].data.clamp_(0.05, 0.95)),
    ("logits-clamped-in-place", "The caller's logits are clamped to ±50, infinite ones too.",
     lambda outputs, targets: outputs["pred_logits"].data.clamp_(-50, 50)),
    ("targets-gain-a-key", "The criterion stores something in the caller's targets.",
     _each_target(lambda t: t.update(area=torch.zeros(1)))),
    ("target-boxes-changed-in-place", "The caller's target boxes are changed by the call, as by a conversion in place.",
     _each_target(_corners)),
    ("aux-outputs-taken-away", "aux_outputs is taken out of the caller's dict.", _without_aux),
    ("aux-outputs-grow", "The caller's list of aux_outputs grows.", _longer_aux),
    ("auxiliary-outputs-gain-a-key", "The criterion stores something in the caller's auxiliary outputs.", _keys_in_aux),
    ("predicted-boxes-changed-in-place", "Predicted boxes are changed in place.",
     lambda outputs, targets: outputs["pred_boxes"].data.clamp_(0.2, 0.3)),
    ("predicted-logits-changed-in-place", "Predicted logits are changed in place.",
     lambda outputs, targets: outputs["pred_logits"].data.clamp_(-0.5, 0.5)),
):  # fmt: skip
    known(inputs_are_not_changed, name, sentence, fix="work on a copy", around=_afterwards(act))

known(
    inputs_are_not_changed, "labels-are-zeroed-in-place", "The caller's labels are changed by the call.",
    seen_in="IDEA-Research/detrex TwoStageCriterion zeroes the caller's labels",
    fix="clone the labels before changing them", around=_afterwards(_each_target(lambda t: t["labels"].zero_())),
)  # fmt: skip
known(
    inputs_are_not_changed, "token-labels-normalised-in-place", "The caller's token labels are normalised in place.",
    profiles=frozenset({"grounding-dino"}), fix="work on a copy", around=_afterwards(_each_target(_normalised)),
)  # fmt: skip


def _in_dn_meta(act: Callable[[Any], Any]) -> Act:
    def change(outputs: Any, targets: Any) -> None:
        if "output_known_lbs_bboxes" in outputs.get("dn_meta", {}):
            act(outputs["dn_meta"])

    return change


for name, sentence, act in (
    ("dn-meta-taken-away", "dn_meta is taken out of the caller's dict.",
     lambda outputs, targets: outputs.pop("dn_meta", None)),
    ("denoising-predictions-taken-away", "The denoising predictions are taken out of the caller's dn_meta.",
     _in_dn_meta(lambda meta: meta.pop("output_known_lbs_bboxes"))),
    ("dn-meta-gains-a-key", "The criterion stores something in the caller's dn_meta.",
     _in_dn_meta(lambda meta: meta.update(single_pad=meta["pad_size"] // meta["num_dn_group"]))),
    ("denoising-boxes-changed-in-place", "The caller's denoising boxes are converted to corners in place.",
     _in_dn_meta(lambda meta: _corners({"boxes": meta["output_known_lbs_bboxes"]["pred_boxes"].data.flatten(0, 1)}))),
):  # fmt: skip
    known(
        inputs_with_denoising_queries_are_not_changed, name, sentence, fix="work on a copy", around=_afterwards(act)
    )  # fmt: skip


def _scaled(factor: Callable[[], float]) -> dict[str, Callable[..., Any]]:
    """All losses times a number that each call draws."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result, times = before(outputs, targets, given), factor()
        return replace(result, losses={k: v * times for k, v in result.losses.items()})

    return {"losses": losses}


known(
    the_random_state_is_left_alone, "losses-depend-on-random-numbers",
    "The losses depend on random numbers from the global generator, as by dropout or sampling.",
    fix="use no random numbers, or a generator of your own",
    around=_scaled(lambda: 1 + 0.1 * float(torch.rand(1))),
)  # fmt: skip


# --- random numbers ---


def _noisy_cost(draw: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    """A number drawn for every entry is added to the cost."""
    return {"assign": lambda before, book, costs: before(costs + draw(costs))}


def _shuffled(queries: bool) -> dict[str, Callable[..., Any]]:
    """Queries or targets are put in a random order before they are matched."""

    def assign(before: Callable[..., Pairs], book: Textbook, costs: Tensor) -> Pairs:
        order = torch.randperm(costs.shape[0 if queries else 1])
        found = before(costs[order] if queries else costs[:, order])
        return Pairs(order[found.query], found.target) if queries else Pairs(found.query, order[found.target])

    return {"assign": assign}


def _jittered(term: str) -> dict[str, Callable[..., Any]]:
    """Noise on the target boxes of a loss."""
    return {term: lambda before, book, pred, wanted, nb: before(pred, wanted + 0.01 * torch.randn_like(wanted), nb)}


def _sampled(before: Callable[..., Tensor], book: Textbook, layer: Layer, *rest: Any) -> Tensor:
    """Dropout on the logits of the class loss."""
    kept = torch.rand_like(layer.logits) > 0.1
    return before(replace(layer, logits=torch.where(kept, layer.logits, 0)), *rest)


for name, sentence, around in (
    ("cost-with-noise-from-the-global-generator", "Noise from torch's global generator is added to the cost.",
     _noisy_cost(lambda c: 0.1 * torch.randn_like(c))),
    ("ties-broken-by-the-global-generator", "Equal costs are decided by noise from torch's global generator.",
     _noisy_cost(lambda c: 1e-9 * torch.rand_like(c))),
    ("cost-with-noise-from-numpy", "Noise from NumPy's global generator is added to the cost.",
     _noisy_cost(lambda c: 0.1 * torch.from_numpy(np.random.randn(*c.shape)))),
    ("cost-with-noise-from-pythons-generator", "Noise from Python's global generator is added to the cost.",
     _noisy_cost(lambda c: 0.1 * random.random() * torch.arange(len(c))[:, None])),
    ("queries-shuffled-before-the-matching", "Queries are put in a random order before they are matched.",
     _shuffled(True)),
    ("targets-shuffled-before-the-matching", "Targets are put in a random order before they are matched.",
     _shuffled(False)),
    ("l1-of-jittered-targets", "Target boxes are jittered at random in the L1 loss.", _jittered("loss_bbox")),
    ("giou-of-jittered-targets", "Target boxes are jittered at random in the GIoU loss.", _jittered("loss_giou")),
    ("class-loss-with-dropout", "Logits are dropped at random in the class loss.", {"loss_ce": _sampled}),
):  # fmt: skip
    known(
        the_random_state_is_left_alone, name, sentence, fix="use no random numbers, or a generator of your own",
        around=around,
    )  # fmt: skip


def _own_noise(size: float) -> dict[str, Callable[..., Any]]:
    """Noise that a generator of the criterion's own draws anew in every call."""
    own = torch.Generator().manual_seed(0)
    return _noisy_cost(lambda c: size * torch.rand(c.shape, generator=own, dtype=c.dtype))


known(
    the_same_inputs_give_the_same_pairs, "cost-with-noise-of-its-own",
    "The cost has noise from a generator of the criterion's own, in every call another.",
    fix="leave the cost as it is", around=_own_noise(0.5),
)  # fmt: skip

# --- training and evaluation ---


def _without_in_evaluation(*names: str) -> Callable[..., Textbook]:
    """Some layers have losses in training alone."""

    def in_mode(before: Callable[..., Textbook], book: Textbook, training: bool) -> Textbook:
        right = before(training)
        every = right.layers
        fewer = replace(
            right, layers=lambda _book, outputs: [x for x in every(outputs) if not x.name.startswith(names)]
        )
        return right if training else fewer

    return in_mode


for name, sentence, names, profiles in (
    ("auxiliary-losses-in-training-only", "Auxiliary losses are computed in training alone.", ("aux",), EVERY),
    ("encoder-losses-in-training-only", "Encoder losses are computed in training alone.", ("enc",), FOCAL | TEXT),
    ("final-losses-alone-in-evaluation", "In evaluation there are the final losses alone.", ("aux", "enc"),
     FOCAL | TEXT),
):  # fmt: skip
    known(
        training_and_evaluation_give_the_same_losses, name, sentence, fix="the same losses in both modes",
        profiles=profiles, around={"in_mode": _without_in_evaluation(*names)},
    )  # fmt: skip


def _in_evaluation(**formulas: Any) -> dict[str, Callable[..., Any]]:
    """Other formulas in evaluation."""
    return {
        "in_mode": lambda before, book, training: (
            before(training) if training else replace(before(training), **formulas)
        )
    }


for name, sentence, around in (
    ("nothing-divided-in-evaluation", "In evaluation losses are sums, divided by nothing.",
     _in_evaluation(num_boxes=lambda book, targets: torch.ones((), dtype=torch.float64))),
    ("queries-in-their-order-in-evaluation", "In evaluation queries are not matched but taken in their order.",
     _in_evaluation(assign=lambda book, costs: Pairs(*(torch.arange(min(costs.shape)),) * 2))),
):  # fmt: skip
    known(
        training_and_evaluation_give_the_same_losses, name, sentence, fix="the same formulas in both modes",
        around=around,
    )  # fmt: skip


def _in_training(before: Callable[..., Textbook], book: Textbook, training: bool) -> Textbook:
    right = before(training)
    losses = right.layer_losses
    scaled = replace(right, layer_losses=lambda _book, *args: {k: 1.1 * v for k, v in losses(*args).items()})
    return scaled if training else right


known(
    training_and_evaluation_give_the_same_losses, "losses-scaled-in-training",
    "In training the losses are others than in evaluation, where they are right.",
    fix="the same formulas in both modes", around={"in_mode": _in_training},
)  # fmt: skip
