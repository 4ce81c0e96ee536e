"""Known mistakes of the focal loss, beside those in the chapter CLS: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.classification import (
    alpha_weighs_positives,
    every_query_and_channel_is_trained,
    the_class_loss_is_a_sum,
    the_class_loss_without_targets_keeps_its_formula,
    the_focusing_factor_has_the_configured_gamma,
)
from detr_conformance.contract.gradients import logits_get_the_textbook_gradient
from detr_conformance.contract.known_softmax import with_logits
from detr_conformance.contract.numbers import the_class_loss_is_precise
from detr_conformance.contract.tokens import every_token_of_the_class_is_a_positive
from detr_conformance.registry import FOCAL, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook, minus_log_sigmoid

Target = Mapping[str, Tensor]
SIGMOID = FOCAL | TEXT

# --- focal: sums ---


def _rows(weight: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The focal terms of an image [Q,C] weighted by a function of their targets [Q,C]."""

    def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        cells: Tensor = book.focal_term(torch.where(inside, x, 0), y)
        return (weight(y) * cells)[inside].sum()

    return {"focal_image": focal_image}


def _hard(cells: Tensor, matched: Tensor) -> Tensor:
    """The terms of matched queries, and of thrice as many unmatched ones, those of the largest loss."""
    rows = torch.where(matched, -1.0, cells.detach().sum(-1))
    hard = rows.argsort(descending=True)[: 3 * int(matched.sum())]
    kept = matched.clone()
    kept[hard] = True
    return cells[kept]


def _unmatched(weight: float) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.where(y.amax(-1, keepdim=True) > 0, 1.0, weight).expand_as(y).to(y.dtype)


def _over(count: Callable[[Layer, Sequence[Pairs]], float], divide: bool) -> dict[str, Any]:
    """The focal loss divided by a count, besides nb or instead of it."""

    def focal_loss(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Tensor:
        divisor = book.class_divisor(nb, matches) if divide else 1
        total: Tensor = before(layer, targets, matches, nb, mask) * book.class_divisor(nb, matches) / divisor
        return total / max(count(layer, matches), 1.0)

    return {"focal_loss": focal_loss}


for name, sentence, around in (
    ("class-loss-averaged-over-channels", "The focal loss is averaged over channels: a factor 1/C.",
     _over(lambda layer, m: layer.logits.shape[2], True)),
    ("class-loss-averaged-over-everything", "The focal loss is the mean of all B·Q·C entries, divided by nb besides.",
     _over(lambda layer, m: layer.logits.numel(), True)),
    ("class-loss-is-the-plain-mean", "The focal loss is the mean of all B·Q·C entries, whatever nb is.",
     _over(lambda layer, m: layer.logits.numel(), False)),
    ("class-loss-averaged-over-the-batch", "The focal loss is averaged over images and divided by nb besides.",
     _over(lambda layer, m: len(layer.logits), True)),
    ("class-loss-divided-by-the-images", "The focal loss is divided by the number of images instead of nb.",
     _over(lambda layer, m: len(layer.logits), False)),
    ("class-loss-divided-by-the-queries", "The focal loss is divided by the number of queries B·Q instead of nb.",
     _over(lambda layer, m: layer.logits.shape[0] * layer.logits.shape[1], False)),
    ("class-loss-divided-by-queries-and-boxes", "The focal loss is divided by B·Q, and by nb besides.",
     _over(lambda layer, m: layer.logits.shape[0] * layer.logits.shape[1], True)),
    ("class-loss-never-divided", "The focal loss is a sum, divided by nothing.", _over(lambda layer, m: 1, False)),
):  # fmt: skip
    known(the_class_loss_is_a_sum, name, sentence, fix="a sum over all B·Q·C, divided by nb once", around=around)

for name, sentence, change in (
    ("class-loss-divided-twice", "The focal loss is divided by nb twice.", lambda before, book, nb, m: nb * nb),
    ("class-loss-divided-by-the-root", "The focal loss is divided by the square root of nb.",
     lambda before, book, nb, m: nb**0.5),
):  # fmt: skip
    known(the_class_loss_is_a_sum, name, sentence, fix="divided by nb once", around={"class_divisor": change})

known(
    the_class_loss_is_a_sum, "class-loss-times-channels",
    "The mean over queries is multiplied by the number of channels instead of the queries'.", fix="multiply by Q",
    around={"focal_image": lambda before, book, x, *a: before(x, *a) * x.shape[1] / max(len(x), 1)},
)  # fmt: skip

for name, sentence, formulas in (
    ("background-weighs-a-tenth", "Unmatched queries weigh 0.1, as with a softmax.", _rows(_unmatched(0.1))),
    ("negatives-weigh-a-half", "Negative entries weigh half.", _rows(lambda y: torch.where(y > 0, 1.0, 0.5).double())),
    ("positives-only", "Negative entries have no loss.", _rows(lambda y: (y > 0).double())),
    ("negatives-only", "Positive entries have no loss.", _rows(lambda y: (y <= 0).double())),
):  # fmt: skip
    check = alpha_weighs_positives if name == "negatives-weigh-a-half" else every_query_and_channel_is_trained
    known(check, name, sentence, fix="every query and channel takes part, and weighs alike", **formulas)


def _cells(pick: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """The focal terms of an image [Q,C], of which only some are summed: a function of the terms and targets."""

    def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        return pick(torch.where(inside, book.focal_term(torch.where(inside, x, 0), y), 0), y).sum()

    return {"focal_image": focal_image}


for name, sentence, formulas in (
    ("class-loss-of-the-largest-cells", "Every query has the loss of its largest entry alone.",
     _cells(lambda cells, y: cells.amax(-1))),
    ("class-loss-of-the-largest-queries", "Every channel has the loss of the query that is largest in it alone.",
     _cells(lambda cells, y: cells.amax(0) if len(cells) else cells)),
    ("unmatched-queries-only", "Matched queries have no class loss.",
     _cells(lambda cells, y: cells * (y <= 0).all(-1, keepdim=True))),
    ("hardest-negatives-only", "Unmatched queries have the loss of three for each matched one: the hardest.",
     _cells(lambda cells, y: _hard(cells, (y > 0).any(-1)))),
    ("other-channels-of-matched-queries-left-out", "Matched queries are trained in their own channel alone.",
     _cells(lambda cells, y: cells * ((y > 0) | (y <= 0).all(-1, keepdim=True)))),
    ("channels-of-the-images-classes-only", "Only channels of classes that are in the image are trained.",
     _cells(lambda cells, y: cells * (y > 0).any(0))),
):  # fmt: skip
    known(
        every_query_and_channel_is_trained, name, sentence, fix="every query and channel takes part, and weighs alike",
        **formulas,
    )  # fmt: skip
    if name != "channels-of-the-images-classes-only":  # which is among the tokens
        known(
            every_token_of_the_class_is_a_positive, f"{name}-by-tokens", sentence,
            fix="every query and token takes part, and weighs alike", **formulas,
        )  # fmt: skip


known(
    the_class_loss_without_targets_keeps_its_formula, "images-without-targets-have-no-class-loss",
    "Images without targets have no class loss.", fix="every image takes part: its queries are background",
    profiles=SIGMOID, **_rows(lambda y: (y.amax() > 0).double().expand_as(y)),
)  # fmt: skip

# --- focal: α and γ ---


def _alpha(positive: Callable[[float], float], negative: Callable[[float], float]) -> dict[str, Any]:
    def alpha_weight(book: Textbook, y: Tensor) -> Tensor:
        a = book.o.focal_alpha
        return torch.where(y > 0, torch.tensor(positive(a)).double(), torch.tensor(negative(a)).double())

    return {"alpha_weight": alpha_weight}


for name, sentence, formulas in (
    ("alpha-missing", "There is no α: positives and negatives weigh 1.", _alpha(lambda a: 1.0, lambda a: 1.0)),
    ("alpha-on-both", "α weighs positives and negatives alike.", _alpha(lambda a: a, lambda a: a)),
    ("alpha-on-positives-only", "α weighs positives, and negatives weigh 1.", _alpha(lambda a: a, lambda a: 1.0)),
    ("alpha-complement-on-negatives-only", "1 − α weighs negatives, and positives weigh 1.",
     _alpha(lambda a: 1.0, lambda a: 1 - a)),
    ("alpha-is-a-quarter", "α is 0.25, whatever is configured.", _alpha(lambda a: 0.25, lambda a: 0.75)),
    ("alpha-squared", "α and 1 − α are applied twice.", _alpha(lambda a: a * a, lambda a: (1 - a) ** 2)),
):  # fmt: skip
    known(alpha_weighs_positives, name, sentence, fix="α for positives, 1 − α for negatives", **formulas)

known(
    the_class_loss_is_a_sum, "alpha-doubled", "2α weighs positives, 2(1 − α) negatives.",
    fix="α for positives, 1 − α for negatives", **_alpha(lambda a: 2 * a, lambda a: 2 * (1 - a)),
)  # fmt: skip


def _focal(value: Callable[..., Tensor]) -> dict[str, Any]:
    """A term from p, 1 − p, y, γ, the weights of α, and the logit."""

    def focal_term(book: Textbook, x: Tensor, y: Tensor) -> Tensor:
        return value(x.sigmoid(), (-x).sigmoid(), (y > 0).double(), book.o.focal_gamma, book.alpha_weight(y), x)

    return {"focal_term": focal_term}


def bce(x: Tensor, y: Tensor) -> Tensor:
    return y * minus_log_sigmoid(x) + (1 - y) * minus_log_sigmoid(-x)


for name, sentence, formulas in (
    ("gamma-missing", "There is no (1 − p_t)^γ: γ is 0.", {"focusing": lambda book, z: torch.ones_like(z)}),
    ("gamma-is-two", "γ is 2, whatever is configured.", {"focusing": lambda book, z: (-z).sigmoid() ** 2}),
    ("gamma-is-one-more", "γ is one more than configured.",
     {"focusing": lambda book, z: (-z).sigmoid() ** (book.o.focal_gamma + 1)}),
    ("gamma-times-the-miss", "γ·(1 − p_t) instead of (1 − p_t)^γ.",
     {"focusing": lambda book, z: (-z).sigmoid() * book.o.focal_gamma}),
    ("focused-on-the-easy", "p_t^γ instead of (1 − p_t)^γ: the easy entries weigh most.",
     {"focusing": lambda book, z: z.sigmoid() ** book.o.focal_gamma}),
    ("negatives-not-focused", "Only positives have the factor (1 − p_t)^γ.",
     _focal(lambda p, q, y, g, a, x: a * (y * q**g + (1 - y)) * bce(x, y))),
    ("positives-not-focused", "Only negatives have the factor (1 − p_t)^γ.",
     _focal(lambda p, q, y, g, a, x: a * (y + (1 - y) * p**g) * bce(x, y))),
    ("miss-of-a-positive-for-all", "(1 − p)^γ for positives and negatives alike.",
     _focal(lambda p, q, y, g, a, x: a * q**g * bce(x, y))),
    ("miss-of-a-negative-for-all", "p^γ for positives and negatives alike.",
     _focal(lambda p, q, y, g, a, x: a * p**g * bce(x, y))),
    ("alpha-inside-the-focusing-factor", "p_t is exp(−α_t·BCE): α is inside the focusing factor.",
     _focal(lambda p, q, y, g, a, x: a * (1 - (-a * bce(x, y)).exp()) ** g * bce(x, y))),
    ("quality-focal-loss", "Quality focal loss: |y − p|^γ without α.",
     _focal(lambda p, q, y, g, a, x: (y - p).abs() ** g * bce(x, y))),
    ("varifocal-loss", "Varifocal loss with hard targets: positives weigh 1, negatives 0.75·p^γ.",
     _focal(lambda p, q, y, g, a, x: (y + (1 - y) * 0.75 * p.detach() ** g) * bce(x, y))),
    ("varifocal-loss-by-alpha", "Varifocal loss with hard targets: positives weigh 1, negatives α·p^γ.",
     {"focal_term": lambda book, x, y: (
         (y > 0).double() + (y <= 0).double() * book.o.focal_alpha * x.sigmoid().detach() ** book.o.focal_gamma
     ) * bce(x, (y > 0).double())}),
    ("alpha-and-gamma-exchanged", "α and γ arrive in each other's place.",
     {"focal_term": lambda book, x, y: torch.where(y > 0, book.o.focal_gamma, 1 - book.o.focal_gamma).double()
      * (-torch.where(y > 0, x, -x)).sigmoid() ** book.o.focal_alpha * bce(x, (y > 0).double())}),
):  # fmt: skip
    check = the_class_loss_is_a_sum if name == "quality-focal-loss" else the_focusing_factor_has_the_configured_gamma
    known(check, name, sentence, fix="(1 − p_t)^γ on every entry", **formulas)

known(
    alpha_weighs_positives, "plain-binary-cross-entropy", "Plain binary cross-entropy: neither α nor γ.",
    fix="α_t·(1 − p_t)^γ·(−log p_t)", **_focal(lambda p, q, y, g, a, x: bce(x, y)),
)  # fmt: skip

for name, sentence, formulas in (
    ("class-loss-is-a-squared-error", "Squared error of the probability in place of the logarithm.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * (p - y) ** 2)),
    ("sigmoid-applied-twice", "The sigmoid is applied twice: the focal loss takes probabilities for logits.",
     {"focal_term": lambda book, x, y: book.alpha_weight(y) * book.focusing(torch.where(y > 0, x, -x))
      * bce(x.sigmoid(), (y > 0).double())}),
    ("focal-loss-of-probabilities", "The whole focal loss is taken of sigmoid(x), as if that were a logit.",
     {"focal_image": lambda book, x, y, inside: book.focal_term(x[inside].sigmoid(), y[inside]).sum()}),
    ("focal-loss-in-binary-digits", "Logarithms to base 2.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * bce(x, y) / 0.6931471805599453)),
    ("hinge-in-place-of-the-logarithm", "A hinge max(0, 1 ∓ x) in place of the logarithm.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * (1 - x * (2 * y - 1)).clamp(min=0))),
    ("focal-loss-smoothed-by-a-hundredth", "Label smoothing of 0.01.",
     _focal(lambda p, q, y, g, a, x: soft_term(x, y * 0.99 + 0.005, a, g))),
    ("focal-loss-smoothed-by-a-tenth", "Label smoothing of 0.1.",
     _focal(lambda p, q, y, g, a, x: soft_term(x, y * 0.9 + 0.05, a, g))),
):  # fmt: skip
    whole = name == "focal-loss-in-binary-digits"  # a factor on every entry
    known(
        the_class_loss_is_a_sum if whole else the_focusing_factor_has_the_configured_gamma, name, sentence,
        fix="−log of the sigmoid of the logits", **formulas,
    )  # fmt: skip


def _first_channel_cut(before: Any, book: Textbook, x: Tensor, target: Target, pairs: Pairs) -> Tensor:
    """One-hot rows of K + 1 channels, the first of which is cut off instead of the last."""
    found = torch.full((len(x),), x.shape[-1])
    found[pairs.query] = target["labels"][pairs.target]
    return torch.nn.functional.one_hot(found, x.shape[-1] + 1)[:, 1:].to(x.dtype)


known(
    every_query_and_channel_is_trained, "one-hot-without-its-first-channel",
    "Of K + 1 one-hot channels the first is cut off: labels move down by one, and background trains channel K − 1.",
    fix="cut off the last channel, which is background", profiles=FOCAL,
    around={"focal_class_target": _first_channel_cut},
)  # fmt: skip


def soft_term(x: Tensor, aim: Tensor, weight: Tensor, gamma: float) -> Tensor:
    """The focal term of targets between 0 and 1, with a weight in the place of α's."""
    p, q = x.sigmoid(), (-x).sigmoid()
    return weight * (1 - (p * aim + q * (1 - aim))) ** gamma * bce(x, aim)


def _softmax_focal(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    p = torch.where(inside, x, -torch.inf).softmax(-1)
    miss = torch.where(y > 0, 1 - p, p)
    log = -(1 - miss).clamp(min=1e-30).log()
    total: Tensor = (book.alpha_weight(y) * miss**book.o.focal_gamma * log)[inside].sum()
    return total


known(
    the_focusing_factor_has_the_configured_gamma, "softmax-in-the-focal-loss",
    "The focal loss is taken of softmax probabilities.", fix="take the sigmoid of every channel",
    focal_image=_softmax_focal,
)  # fmt: skip


def _probability(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return _focal(
        lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g
        * -(y * change(p).log() + (1 - y) * change(1 - p).log())
    )  # fmt: skip


for name, sentence, formulas in (
    ("focal-loss-with-1e-8-in-its-logarithms", "1e-8 is added inside the logarithms, which flattens wide logits.",
     _probability(lambda p: p + 1e-8)),
    ("focal-loss-with-1e-6-in-its-logarithms", "1e-6 is added inside the logarithms, which flattens wide logits.",
     _probability(lambda p: p + 1e-6)),
    ("focal-loss-with-1e-12-in-its-logarithms", "1e-12 is added inside the logarithms, which flattens wide logits.",
     _probability(lambda p: p + 1e-12)),
    ("focal-loss-with-1e-3-in-its-logarithms", "1e-3 is added inside the logarithms.",
     _probability(lambda p: p + 1e-3)),
    ("probabilities-clamped-at-1e-4", "p is clamped to 1e-4 … 1 − 1e-4.",
     _probability(lambda p: p.clamp(1e-4, 1 - 1e-4))),
    ("probabilities-clamped-at-1e-6", "p is clamped to 1e-6 … 1 − 1e-6.",
     _probability(lambda p: p.clamp(1e-6, 1 - 1e-6))),
    ("probabilities-clamped-at-1e-8", "p is at least 1e-8.", _probability(lambda p: p.clamp(min=1e-8))),
):  # fmt: skip
    known(
        the_class_loss_is_precise, name, sentence, fix="use log-sigmoid", profiles=SIGMOID, **formulas
    )  # fmt: skip

for name, sentence, change in (
    ("class-loss-in-bfloat16", "The class loss is computed from logits rounded to bfloat16.",
     lambda x, k: x + (x.bfloat16().double() - x).detach()),
    ("class-loss-in-float16", "The class loss is computed from logits rounded to float16.",
     lambda x, k: x + (x.half().double() - x).detach()),
):  # fmt: skip
    known(
        the_class_loss_is_precise, name, sentence, fix="compute in the dtype of the outputs", around=with_logits(change)
    )

for name, sentence, change in (
    ("class-gradient-halved", "The value of the class loss is right, and its gradient half of it.",
     lambda x, k: (x + x.detach()) / 2),
    ("class-loss-without-gradient", "The class loss is computed from detached logits.", lambda x, k: x.detach()),
):  # fmt: skip
    known(
        logits_get_the_textbook_gradient, name, sentence, fix="compute the class loss on the logits themselves",
        around=with_logits(change),
    )  # fmt: skip
