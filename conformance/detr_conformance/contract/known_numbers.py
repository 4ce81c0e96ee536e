"""Known mistakes that are one number: a factor, an ε, a bound. The catalogue has one of each; a diagnosis finds the
number that a candidate has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.boxes import loss_giou_is_one_minus_giou_of_the_pair
from detr_conformance.contract.classification import (
    alpha_weighs_positives,
    every_query_and_channel_is_trained,
    loss_ce_is_not_divided_by_the_number_of_boxes,
    loss_ce_is_the_weighted_mean_of_all_queries,
    the_class_loss_is_a_sum,
    the_focusing_factor_has_the_configured_gamma,
)
from detr_conformance.contract.denoising import positives_reconstruct_the_boxes_of_their_targets
from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient
from detr_conformance.contract.keys import denoising_losses_have_their_weights, every_trained_loss_has_its_weight
from detr_conformance.contract.known_corners import iou_of, of_corners
from detr_conformance.contract.known_focal import soft_term
from detr_conformance.contract.known_softmax import nll, with_logits
from detr_conformance.contract.layers import (
    an_auxiliary_layer_is_trained_like_the_final_one,
    encoder_outputs_are_trained_on_their_class_targets,
)
from detr_conformance.contract.normalisation import loss_bbox_is_the_sum_of_l1_over_nb, loss_giou_is_the_sum_over_nb
from detr_conformance.contract.numbers import loss_giou_is_precise, the_class_loss_is_precise
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, varied
from detr_reference.textbook import Layer, Textbook

ENCODER = SIGMOID = FOCAL | TEXT
FACTOR = (1e-3, 1e3)
Around = dict[str, Callable[..., Any]]


def _times(*names: str) -> Callable[[float], Around]:
    """Formulas multiplied."""
    return lambda v: dict.fromkeys(names, lambda before, book, *rest: v * before(*rest))


def _float32(value: float) -> float:
    """The nearest float32, which is the bound that a criterion of that precision has."""
    return float(torch.tensor(value, dtype=torch.float32))


# --- class losses ---


def _softmax(value: Callable[[Tensor, Tensor], Tensor]) -> Around:
    """A negative log-likelihood of another kind, from the log-likelihoods [B·Q,K+1] and the classes [B·Q]."""
    formula = nll(lambda x, y, k: value(x.log_softmax(-1), y))["softmax_loss"]
    return {"softmax_loss": lambda before, *rest: formula(*rest)}


def _own(log: Tensor, y: Tensor) -> Tensor:
    return log.gather(-1, y[:, None])[:, 0]


def _focal(value: Callable[..., Tensor]) -> Around:
    """A focal term from the logit, its target in 0 … 1, α and γ."""
    return {"focal_term": lambda before, book, x, y: value(x, (y > 0).double(), book.o.focal_alpha, book.o.focal_gamma)}


def _term(p: Tensor, q: Tensor, y: Tensor, a: float, g: float, bce: Tensor) -> Tensor:
    """The focal term as published: everything of it from a target between 0 and 1."""
    return (a * y + (1 - a) * (1 - y)) * (1 - (p * y + q * (1 - y))) ** g * bce


def _aiming(aim: Callable[[Tensor, float], Tensor]) -> Callable[[float], Around]:
    """Focal terms of targets that are not 0 or 1."""

    def around(v: float) -> Around:
        def value(x: Tensor, y: Tensor, a: float, g: float) -> Tensor:
            soft = aim(y, v)
            return soft_term(x, soft, a * soft + (1 - a) * (1 - soft), g)

        return _focal(value)

    return around


def _clamped(v: float) -> Around:
    low, high = _float32(v), _float32(1 - v)

    def value(x: Tensor, y: Tensor, a: float, g: float) -> Tensor:
        p = x.sigmoid().clamp(low, high)
        return _term(p, 1 - p, y, a, g, -(y * p.log() + (1 - y) * (1 - p).log()))

    return _focal(value)


def _plus(v: float) -> Around:
    def value(x: Tensor, y: Tensor, a: float, g: float) -> Tensor:
        p, q = x.sigmoid(), (-x).sigmoid()
        return _term(p, q, y, a, g, -(y * (p + v).log() + (1 - y) * (q + v).log()))

    return _focal(value)


for whole, entry, profiles, of in (
    (loss_ce_is_not_divided_by_the_number_of_boxes, loss_ce_is_the_weighted_mean_of_all_queries, DETR, "cross-entropy"),
    (the_class_loss_is_a_sum, the_focusing_factor_has_the_configured_gamma, SIGMOID, "focal-loss"),
):
    softmax = of == "cross-entropy"
    for check, id, sentence, usual, span, around in (
        (whole, "times-a-number", "The class loss is {0:g} times as large.", 3.0, FACTOR, _times("loss_ce")),
        (entry, "of-scaled-logits", "Logits are multiplied by {0:g} for the class loss: a temperature.", 0.5,
         (0.02, 50.0), lambda v: with_logits(lambda x, k: v * x)),
        (the_class_loss_is_precise, "of-clamped-logits", "Logits are clamped to ±{0:g} before the class loss.", 50.0,
         (1.0, 105.0), lambda v: with_logits(lambda x, k: x.clamp(-v, v))),
        (the_class_loss_is_precise, "of-clamped-probabilities",
         "Probabilities are clamped at {0:g} before the logarithm.", 1e-5, (1e-12, 0.2),
         (lambda v: _softmax(lambda log, y: -_own(log, y).exp().clamp(min=v).log())) if softmax else _clamped),
        (the_class_loss_is_precise, "with-an-epsilon-in-its-logarithm", "{0:g} is added inside the logarithm.", 1e-5,
         (1e-12, 0.2), (lambda v: _softmax(lambda log, y: -(_own(log, y).exp() + v).log())) if softmax else _plus),
    ):  # fmt: skip
        varied(
            check, f"{of}-{id}", sentence, usual=usual, span=span, around=around, profiles=profiles,
            fix="the formula as it is" if check is whole else "log_softmax or log-sigmoid of the logits as they are",
        )  # fmt: skip


def _smoothed(v: float) -> Around:
    return _softmax(lambda log, y: -(1 - v) * _own(log, y) - v * log.mean(-1))


def _smoothed_elsewhere(v: float) -> Around:
    return _softmax(
        lambda log, y: -(1 - v) * _own(log, y) - v / max(log.shape[-1] - 1, 1) * (log.sum(-1) - _own(log, y))
    )


def _no_object(weight: Callable[[float, float], float]) -> Callable[[float], Around]:
    """Another weight of no object, from eos_coef and the number."""
    return lambda v: {
        "class_weight": lambda before, book, y: torch.where(
            y == book.o.num_classes, torch.tensor(weight(book.o.eos_coef, v)).double(), before(y)
        )
    }


for id, sentence, usual, span, around in (
    ("cross-entropy-smoothed", "Label smoothing of {0:g}.", 0.2, (1e-4, 0.9), _smoothed),
    ("cross-entropy-smoothed-over-the-others", "Label smoothing of {0:g}, shared by the other channels.", 0.2,
     (1e-4, 0.9), _smoothed_elsewhere),
    ("no-object-weighs-a-number", "No object weighs {0:g}, whatever eos_coef is.", 0.5, (1e-4, 10.0),
     _no_object(lambda eos, v: v)),
    ("eos-coef-times-a-number", "No object weighs {0:g} times eos_coef.", 3.0, FACTOR,
     _no_object(lambda eos, v: eos * v)),
    ("cross-entropy-with-a-focal-factor-of-a-number", "A factor (1 − p)^{0:g} on the cross-entropy.", 1.0,
     (0.05, 5.0), lambda v: _softmax(lambda log, y: -((1 - _own(log, y).exp()) ** v) * _own(log, y))),
):  # fmt: skip
    varied(
        loss_ce_is_the_weighted_mean_of_all_queries, id, sentence, usual=usual, span=span, around=around,
        fix="−log_softmax(x)[y], weighted by 1 and, for no object, eos_coef",
    )  # fmt: skip


def _alpha(weights: Callable[[float, float], tuple[float, float]]) -> Callable[[float], Around]:
    """Other weights of positives and negatives, from α and the number."""

    def around(v: float) -> Around:
        def alpha_weight(before: Any, book: Textbook, y: Tensor) -> Tensor:
            high, low = (torch.tensor(w, dtype=torch.float64) for w in weights(book.o.focal_alpha, v))
            return torch.where(y > 0, high, low)

        return {"alpha_weight": alpha_weight}

    return around


for check, id, sentence, usual, span, around in (
    (alpha_weighs_positives, "alpha-is-a-number", "α is {0:g}, whatever is configured.", 0.6, (1e-3, 0.999),
     _alpha(lambda a, v: (v, 1 - v))),
    (alpha_weighs_positives, "alpha-times-a-number", "α is {0:g} times what is configured.", 1.1, (0.02, 50.0),
     _alpha(lambda a, v: (a * v, 1 - a * v))),
    (alpha_weighs_positives, "positives-weigh-a-number", "Positives weigh {0:g} times as much.", 3.0, FACTOR,
     _alpha(lambda a, v: (a * v, 1 - a))),
    (alpha_weighs_positives, "negatives-weigh-a-number", "Negatives weigh {0:g} times as much.", 3.0,
     FACTOR, _alpha(lambda a, v: (a, (1 - a) * v))),
    (the_focusing_factor_has_the_configured_gamma, "gamma-is-a-number", "γ is {0:g}, whatever is configured.", 1.2,
     (0.02, 6.0), lambda v: {"focusing": lambda before, book, z: (-z).sigmoid() ** v}),
    (the_focusing_factor_has_the_configured_gamma, "gamma-plus-a-number", "γ is {0:g} more than configured.", 0.4,
     (0.02, 6.0), lambda v: {"focusing": lambda before, book, z: (-z).sigmoid() ** (book.o.focal_gamma + v)}),
    (every_query_and_channel_is_trained, "positives-aim-at-a-number", "Positives aim at {0:g} instead of 1.", 0.8,
     (0.05, 0.999), _aiming(lambda y, v: y * v)),
    (every_query_and_channel_is_trained, "negatives-aim-at-a-number", "Negatives aim at {0:g} instead of 0.", 0.2,
     (1e-3, 0.9), _aiming(lambda y, v: y + (1 - y) * v)),
    (every_query_and_channel_is_trained, "focal-targets-smoothed", "Label smoothing of {0:g}.", 0.3, (1e-3, 0.9),
     _aiming(lambda y, v: y * (1 - v) + v / 2)),
):  # fmt: skip
    varied(
        check, id, sentence, usual=usual, span=span, around=around, profiles=SIGMOID,
        fix="α_t(1 − p_t)^γ(−log p_t) of targets 0 and 1, with the configured α and γ",
    )  # fmt: skip

# --- box losses ---


def _distance(of: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[float], Around]:
    return lambda v: {"loss_bbox": lambda before, book, pred, wanted, nb: of(pred, wanted, v).sum() / nb}


def _sides(v: float) -> Tensor:
    return torch.tensor([1.0, 1.0, v, v], dtype=torch.float64)


for id, sentence, usual, span, around in (
    ("l1-times-a-number", "loss_bbox is {0:g} times as large.", 3.0, FACTOR, _times("loss_bbox")),
    ("smooth-l1-of-a-number", "Smooth L1 with β = {0:g}.", 0.3, (1e-4, 2.0),
     _distance(lambda a, b, v: F.smooth_l1_loss(a, b, reduction="none", beta=v))),
    ("huber-loss-of-a-number", "Huber's loss with δ = {0:g}.", 0.3, (1e-4, 2.0),
     _distance(lambda a, b, v: F.huber_loss(a, b, reduction="none", delta=v))),
    ("l1-to-a-power", "Differences are raised to the power {0:g}.", 1.5, (0.25, 4.0),
     _distance(lambda a, b, v: (a - b).abs() ** v)),
    ("l1-with-weighted-sides", "The differences of width and height weigh {0:g}.", 3.0, FACTOR,
     _distance(lambda a, b, v: (a - b).abs() * _sides(v))),
    ("l1-rounded-at-zero", "|Δ| is √(Δ² + {0:g}), which is smooth.", 1e-3, (1e-10, 0.5),
     _distance(lambda a, b, v: ((a - b) ** 2 + v).sqrt())),
    ("l1-beyond-a-margin", "Differences below {0:g} count as none.", 0.05, (1e-4, 0.5),
     _distance(lambda a, b, v: ((a - b).abs() - v).clamp(min=0))),
    ("l1-clamped", "Differences count as {0:g} at most.", 0.1, (1e-3, 1.0),
     _distance(lambda a, b, v: (a - b).abs().clamp(max=v))),
):  # fmt: skip
    varied(
        loss_bbox_is_the_sum_of_l1_over_nb, id, sentence, usual=usual, span=span, around=around,
        fix="Σ |Δ| over the four coordinates and all pairs, divided by nb",
    )  # fmt: skip


def _denominators(union: bool, hull: bool) -> Callable[[float], Around]:
    """The GIoU with a number in its denominators."""

    def around(v: float) -> Around:
        def giou(before: Any, book: Textbook, pred: Tensor, target: Tensor) -> Tensor:
            a, b = book.corners(pred), book.corners(target)
            common = book.intersection(a, b)
            one, whole = book.union(a, b, common), book.enclosing(a, b)
            found: Tensor = common / (one + v * union) - (whole - one) / (whole + v * hull)
            return found

        return {"giou": giou}

    return around


def _widened(pred: bool, target: bool) -> Callable[[float], Around]:
    """The GIoU of boxes whose sides are no less than a number."""

    def wide(boxes: Tensor, v: float) -> Tensor:
        return torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=v)], -1)

    return lambda v: {"giou": lambda before, book, a, b: before(wide(a, v) if pred else a, wide(b, v) if target else b)}


_iou = of_corners(iou_of)
OWN = "I/U − (H − U)/H of the boxes as they are"

for check, id, sentence, usual, span, around, fix in (
    (loss_giou_is_the_sum_over_nb, "giou-loss-times-a-number", "loss_giou is {0:g} times as large.", 3.0, FACTOR,
     _times("loss_giou"), "Σ(1 − GIoU) over the pairs, divided by nb"),
    (loss_giou_is_the_sum_over_nb, "giou-loss-to-a-power", "(1 − GIoU)^{0:g} instead of 1 − GIoU.", 1.5, (0.25, 4.0),
     lambda v: {"loss_giou": lambda before, book, a, b, nb: ((1 - book.giou(a, b)) ** v).sum() / nb},
     "Σ(1 − GIoU) over the pairs, divided by nb"),
    (loss_giou_is_one_minus_giou_of_the_pair, "hull-term-times-a-number", "(H − U)/H is multiplied by {0:g}.", 0.7,
     FACTOR, lambda v: {"giou": lambda before, book, a, b: v * before(a, b) + (1 - v) * _iou(book, a, b)}, OWN),
    (loss_giou_is_one_minus_giou_of_the_pair, "giou-with-a-number-in-its-denominators",
     "{0:g} is added to both denominators of the GIoU.", 1e-3, (1e-9, 0.5), _denominators(True, True), OWN),
    (loss_giou_is_one_minus_giou_of_the_pair, "iou-with-a-number-in-its-denominator",
     "{0:g} is added to the union alone, not to the enclosing box.", 1e-3, (1e-9, 0.5), _denominators(True, False),
     OWN),
    (loss_giou_is_one_minus_giou_of_the_pair, "hull-with-a-number-in-its-denominator",
     "{0:g} is added to the enclosing box alone, not to the union.", 1e-3, (1e-9, 0.5), _denominators(False, True),
     OWN),
    (loss_giou_is_precise, "sides-of-at-least-a-number", "Sides below {0:g} are widened to it in the GIoU.", 0.02,
     (1e-3, 0.3), _widened(True, True), OWN),
    (loss_giou_is_precise, "predicted-sides-of-at-least-a-number",
     "Predicted sides below {0:g} are widened to it in the GIoU.", 0.02, (1e-3, 0.3), _widened(True, False), OWN),
):  # fmt: skip
    varied(check, id, sentence, usual=usual, span=span, around=around, profiles=EVERY, fix=fix)


# --- nb, layers, gradients, weights ---

for id, sentence, usual, span, around in (
    ("nb-times-a-number", "nb is {0:g} times as large.", 3.0, FACTOR, _times("num_boxes")),
    ("nb-plus-a-number", "nb is N + {0:g}.", 0.5, (1e-4, 100.0),
     lambda v: {"num_boxes": lambda before, book, targets: before(targets) + v}),
    ("nb-is-at-least-a-number", "nb is at least {0:g}.", 4.0, (1.5, 1e3),
     lambda v: {"num_boxes": lambda before, book, targets: before(targets).clamp(min=v)}),
    ("nb-is-a-number", "Everything is divided by {0:g}, however many targets there are.", 100.0, (0.5, 1e5),
     lambda v: {"num_boxes": lambda before, book, targets: torch.tensor(v, dtype=torch.float64)}),
):  # fmt: skip
    varied(
        loss_bbox_is_the_sum_of_l1_over_nb, id, sentence, usual=usual, span=span, around=around,
        fix="nb = max(N, 1), N the targets of the batch",
    )  # fmt: skip


def _of_layer(kind: str, change: Callable[[Tensor, float], Tensor], *terms: str) -> Callable[[float], Around]:
    """The losses of one kind of layer changed: all, or those of some terms."""

    def around(v: float) -> Around:
        def layer_losses(before: Any, book: Textbook, layer: Layer, *rest: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = before(layer, *rest)
            if not layer.name.startswith(kind):
                return found
            return {k: change(x, v) if k.startswith(terms or "loss") else x for k, x in found.items()}

        return {"layer_losses": layer_losses}

    return around


def _scaled(loss: Tensor, v: float) -> Tensor:
    return v * loss


def _sloped(loss: Tensor, v: float) -> Tensor:
    """The same value, and so many times its gradient."""
    return v * loss + (1 - v) * loss.detach()


for check, id, sentence, around, profiles in (
    (an_auxiliary_layer_is_trained_like_the_final_one, "auxiliary-losses-times-a-number",
     "Auxiliary losses are {0:g} times as large.",
     _of_layer("aux", _scaled), EVERY),
    (encoder_outputs_are_trained_on_their_class_targets, "encoder-losses-times-a-number",
     "The encoder's losses are {0:g} times as large.", _of_layer("enc", _scaled), ENCODER),
    (positives_reconstruct_the_boxes_of_their_targets, "denoising-losses-times-a-number",
     "Denoising losses are {0:g} times as large.", _of_layer("dn", _scaled), EVERY),
    (logits_get_the_textbook_gradient, "class-gradient-times-a-number",
     "The class losses have the right value, and {0:g} times their gradient.", _of_layer("", _sloped, "loss_ce"),
     EVERY),
    (boxes_get_the_textbook_gradient, "l1-gradient-times-a-number",
     "loss_bbox has the right value, and {0:g} times its gradient.", _of_layer("", _sloped, "loss_bbox"), EVERY),
    (boxes_get_the_textbook_gradient, "giou-gradient-times-a-number",
     "loss_giou has the right value, and {0:g} times its gradient.", _of_layer("", _sloped, "loss_giou"), EVERY),
    (logits_get_the_textbook_gradient, "auxiliary-gradients-times-a-number",
     "Auxiliary losses have the right value, and {0:g} times their gradient.", _of_layer("aux", _sloped), EVERY),
    (logits_get_the_textbook_gradient, "auxiliary-class-gradients-times-a-number",
     "Auxiliary class losses have the right value, and {0:g} times their gradient.",
     _of_layer("aux", _sloped, "loss_ce"), EVERY),
    (logits_get_the_textbook_gradient, "encoder-gradients-times-a-number",
     "The encoder's losses have the right value, and {0:g} times their gradient.", _of_layer("enc", _sloped), ENCODER),
):  # fmt: skip
    varied(
        check, id, sentence, usual=3.0, span=FACTOR, around=around, profiles=profiles,
        fix="the same formulas in every layer, none of them scaled",
    )  # fmt: skip


def _weights(kind: str, value: Callable[[float, float], float]) -> Callable[[float], Around]:
    """Other weights of one kind: a base as loss_giou, or of suffixes, as aux, enc or dn."""

    def of(key: str, o: Any) -> bool:
        end = "_".join(["", *key.split("_")[2:]])
        if kind == "aux":
            return end[1:].isdigit()
        return end == o.encoder_suffix if kind == "enc" else end.startswith("_dn") if kind == "dn" else kind in key

    def around(v: float) -> Around:
        def weights(before: Any, book: Textbook) -> dict[str, float]:
            found: dict[str, float] = before()
            return {k: value(w, v) if of(k, book.o) else w for k, w in found.items()}

        return {"weights": weights}

    return around


for kind, name, whose, profiles in (
    ("aux", "auxiliary", "auxiliary losses", EVERY),
    ("enc", "encoder", "the encoder's losses", ENCODER),
    ("dn", "denoising", "denoising losses", EVERY),
    ("ce", "class", "the class losses", EVERY),
    ("bbox", "l1", "the L1 losses", EVERY),
    ("giou", "giou", "the GIoU losses", EVERY),
):
    for id, sentence, value in (
        ("weights-times-a-number", "are {0:g} times the configured ones.", lambda w, v: w * v),
        ("weights-are-a-number", "are {0:g}, whatever is configured.", lambda w, v: v),
    ):
        varied(
            denoising_losses_have_their_weights if kind == "dn" else every_trained_loss_has_its_weight,
            f"{name}-{id}", f"The weights of {whose} {sentence}", usual=7.0,
            span=FACTOR, around=_weights(kind, value), profiles=profiles,
            fix="the configured weight of its base for every suffix",
        )  # fmt: skip
