"""Known mistakes of the class loss, beside those in the chapter CLS: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.classification import (
    alpha_weighs_positives,
    every_query_and_channel_is_trained,
    loss_ce_is_not_divided_by_the_number_of_boxes,
    loss_ce_is_the_weighted_mean_of_all_queries,
    the_class_loss_is_a_sum,
    the_class_loss_without_targets_keeps_its_formula,
    the_focusing_factor_has_the_configured_gamma,
)
from detr_conformance.contract.gradients import logits_get_the_textbook_gradient
from detr_conformance.contract.numbers import the_class_loss_is_precise
from detr_conformance.registry import DETR, FOCAL, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook, minus_log_sigmoid

Target = Mapping[str, Tensor]
SIGMOID = FOCAL | TEXT

# --- softmax: the mean ---


def _softmax(value: Callable[..., Tensor]) -> dict[str, Any]:
    """A loss from nll, weights and classes [B·Q] of all queries, and the images they belong to."""

    def softmax_loss(book: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Tensor:
        images = zip(layer.logits, targets, matches, strict=True)
        y = torch.cat([book.softmax_class_target(x, t, m) for x, t, m in images])
        nll = -layer.logits.flatten(0, 1).log_softmax(-1).gather(-1, y[:, None])[:, 0]
        matched = torch.zeros(layer.logits.shape[:2], dtype=torch.bool)
        for b, m in enumerate(matches):
            matched[b, m.query] = True
        return value(book, nll, book.class_weight(y), y, matched, book.num_boxes(targets))

    return {"softmax_loss": softmax_loss}


def _mean(nll: Tensor, w: Tensor) -> Tensor:
    return (w * nll).sum() / w.sum().clamp(min=1e-30)


def _apart(book: Textbook, nll: Tensor, w: Tensor, y: Tensor, matched: Tensor, nb: Tensor) -> Tensor:
    own = matched.flatten()
    return sum((nll[rows] * w[rows]).mean() for rows in (own, ~own) if bool(rows.any()))  # type: ignore[return-value]


for name, sentence, value in (
    ("cross-entropy-sum-over-boxes", "The weighted sum is divided by the number of boxes.",
     lambda book, nll, w, y, m, nb: (w * nll).sum() / nb),
    ("cross-entropy-never-divided", "The weighted sum is divided by nothing.",
     lambda book, nll, w, y, m, nb: (w * nll).sum()),
    ("cross-entropy-averaged-image-by-image", "A weighted mean an image, then the mean of the images.",
     lambda book, nll, w, y, m, nb: torch.stack(
         [_mean(n, v) for n, v in zip(nll.split(m.shape[1]), w.split(m.shape[1]), strict=True)]).mean()),
    ("cross-entropy-of-matched-queries-only", "Unmatched queries have no part in the class loss.",
     lambda book, nll, w, y, m, nb: _mean(nll, w * m.flatten())),
    ("cross-entropy-averaged-apart", "Matched and unmatched queries are averaged apart, and the means added.", _apart),
    ("cross-entropy-over-the-matches", "The weighted sum is divided by the number of matched pairs.",
     lambda book, nll, w, y, m, nb: (w * nll).sum() / m.sum().clamp(min=1)),
    ("cross-entropy-ignores-class-zero", "ignore_index is 0: targets of class 0 have no loss.",
     lambda book, nll, w, y, m, nb: _mean(nll, w * (y != 0))),
    ("cross-entropy-squared", "The square of the negative log-likelihood.",
     lambda book, nll, w, y, m, nb: _mean(nll**2, w)),
    ("cross-entropy-with-a-focal-factor", "A focal factor (1 − p)² on the cross-entropy.",
     lambda book, nll, w, y, m, nb: _mean((1 - (-nll).exp()) ** 2 * nll, w)),
    ("cross-entropy-weighted-twice", "The weight of no object is applied to logarithm and mean: twice.",
     lambda book, nll, w, y, m, nb: (w * w * nll).sum() / w.sum()),
):  # fmt: skip
    known(
        loss_ce_is_not_divided_by_the_number_of_boxes if name.endswith(("boxes", "divided", "matches"))
        else loss_ce_is_the_weighted_mean_of_all_queries,
        name, sentence, fix="Σ w·nll / Σ w over all queries of the batch", **_softmax(value),
    )  # fmt: skip


# --- softmax: weights and classes ---


def _weights(value: Callable[[int, float], Mapping[int, float]]) -> Callable[..., Tensor]:
    """Class weights: 1, except those named by number from K classes and eos_coef."""

    def class_weight(book: Textbook, y: Tensor) -> Tensor:
        k, w = book.o.num_classes, torch.ones(book.o.num_classes + 1, dtype=torch.float64)
        for at, weight in value(k, book.o.eos_coef).items():
            w[at] = weight
        return w[y]

    return class_weight


for name, sentence, value in (
    ("no-object-weighs-a-tenth", "No object weighs 0.1, whatever eos_coef is.", lambda k, e: {k: 0.1}),
    ("no-object-weight-squared", "eos_coef is applied twice.", lambda k, e: {k: e * e}),
    ("no-object-weighs-the-complement", "No object weighs 1 − eos_coef.", lambda k, e: {k: 1 - e}),
    ("no-object-weighs-nothing", "No object weighs 0.", lambda k, e: {k: 0.0}),
    ("eos-coef-weighs-class-zero", "eos_coef weighs class 0 instead of no object.", lambda k, e: {0: e}),
    ("eos-coef-weighs-the-last-class", "eos_coef weighs class K − 1 instead of no object.", lambda k, e: {k - 1: e}),
    ("eos-coef-weighs-the-last-class-too", "eos_coef weighs class K − 1 as well.", lambda k, e: {k - 1: e, k: e}),
    ("eos-coef-weighs-class-zero-too", "eos_coef weighs class 0 as well.", lambda k, e: {0: e, k: e}),
    ("eos-coef-weighs-the-classes", "eos_coef weighs all classes, and no object weighs 1.",
     lambda k, e: dict.fromkeys(range(k), e)),
):  # fmt: skip
    known(
        loss_ce_is_the_weighted_mean_of_all_queries, name, sentence, fix="weights of 1, and eos_coef for class K",
        class_weight=_weights(value),
    )  # fmt: skip


def _classes(
    label: Callable[[Tensor, int], Tensor] | None = None,
    background: Callable[[int], int] | None = None,
    pick: Callable[[Tensor, Pairs], Tensor] | None = None,
    rows: Callable[[Pairs], Tensor] | None = None,
) -> dict[str, Any]:
    """Class targets with other labels, background, choice of the target, or rows; for softmax and one-hot alike."""

    def chosen(target: Target, pairs: Pairs, classes: int) -> tuple[Tensor, Tensor]:
        labels = pick(target["labels"], pairs) if pick else target["labels"][pairs.target]
        return (rows(pairs) if rows else pairs.query), (label(labels, classes) if label else labels)

    def softmax_class_target(book: Textbook, x: Tensor, target: Target, pairs: Pairs) -> Tensor:
        k = book.o.num_classes
        y = torch.full((len(x),), background(k) if background else k)
        at, labels = chosen(target, pairs, k)
        y[at] = labels
        return y

    def focal_class_target(book: Textbook, x: Tensor, target: Target, pairs: Pairs) -> Tensor:
        y = torch.zeros_like(x)
        at, labels = chosen(target, pairs, x.shape[1])
        if background:
            y[:, background(x.shape[1])] = 1
            y[at] = 0
        inside = (labels >= 0) & (labels < x.shape[1])
        y[at[inside], labels[inside]] = 1
        return y

    return {"softmax_class_target": softmax_class_target, "focal_class_target": focal_class_target}


def _first_rows(pairs: Pairs) -> Tensor:
    return torch.arange(len(pairs))


def _dropped(k: int) -> Callable[[Tensor, int], Tensor]:
    return lambda y, classes: torch.where(y == k % classes, classes, y)


def _union(book: Textbook, x: Tensor, target: Target, pairs: Pairs) -> Tensor:
    y = torch.zeros_like(x)
    y[pairs.query[:, None], target["labels"][None]] = 1
    return y


def _next_labels(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Any:
    turned = [*targets[1:], *targets[:1]]
    wrong = []
    for own, other in zip(targets, turned, strict=True):
        n = min(len(own["labels"]), len(other["labels"]))
        wrong.append({**own, "labels": torch.cat([other["labels"][:n], own["labels"][n:]])})
    return before(layer, wrong, *rest)


_NEXT = {"around": {"loss_ce": _next_labels}}

for check, suffix, profiles in (
    (loss_ce_is_the_weighted_mean_of_all_queries, "", DETR),
    (every_query_and_channel_is_trained, "-of-the-focal-loss", FOCAL),
):
    for name, sentence, formulas in (
        ("labels-one-down", "Labels are taken as counted from 1: every class trains the channel below.",
         _classes(lambda y, k: (y - 1).clamp(min=0))),
        ("labels-one-down-around", "Labels are shifted down by one, and class 0 trains the last channel.",
         _classes(lambda y, k: (y - 1) % k)),
        ("labels-one-up", "Labels are shifted up by one: every class trains the channel above.",
         _classes(lambda y, k: (y + 1).clamp(max=k - 1))),
        ("labels-one-up-around", "Labels are shifted up by one, and the last class trains channel 0.",
         _classes(lambda y, k: (y + 1) % k)),
        ("labels-one-up-to-background", "Labels are shifted up by one, and the last class becomes background.",
         _classes(lambda y, k: y + 1)),
        ("labels-in-their-own-order", "Labels are taken in the order of the targets, not of the matching.",
         _classes(pick=lambda labels, pairs: labels[: len(pairs)])),
        ("first-label-for-all", "Every matched query of an image gets the image's first label.",
         _classes(pick=lambda labels, pairs: labels[:1].expand(len(pairs)))),
        ("labels-for-the-first-queries", "Labels go to the first queries instead of the matched ones.",
         _classes(rows=_first_rows)),
        ("background-is-the-last-class", "Unmatched queries are trained as class K − 1.",
         _classes(background=lambda k: k - 1)),
        ("last-class-is-background", "Targets of class K − 1 are trained as background.",
         _classes(_dropped(-1))),
        ("first-class-is-background", "Targets of class 0 are trained as background.", _classes(_dropped(0))),
        ("classes-of-all-targets-of-the-image", "Matched queries aim at the classes of all targets of their image.",
         {"focal_class_target": _union}),
        ("labels-of-the-next-image", "Class targets come from the next image.", _NEXT),
        ("every-class-is-one", "All targets are trained as one class, class 0.",
         _classes(lambda y, k: torch.zeros_like(y))),
    ):  # fmt: skip
        if profiles is FOCAL or name != "classes-of-all-targets-of-the-image":
            known(
                check, name + suffix, sentence, fix="the label of each query's own target, background elsewhere",
                profiles=profiles, **formulas,
            )  # fmt: skip


# --- softmax: the logarithm ---


def _logits(change: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    return {
        "loss_ce": lambda before, book, layer, *rest: before(
            replace(layer, logits=change(layer.logits, book.o.num_classes)), *rest
        )
    }


def _nll(value: Callable[[Tensor, Tensor, int], Tensor]) -> dict[str, Any]:
    """A negative log-likelihood of another kind, from logits [B·Q,K+1] and classes [B·Q]."""

    def softmax_loss(book: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Tensor:
        images = zip(layer.logits, targets, matches, strict=True)
        y = torch.cat([book.softmax_class_target(x, t, m) for x, t, m in images])
        w = book.class_weight(y)
        total: Tensor = (w * value(layer.logits.flatten(0, 1), y, book.o.num_classes)).sum()
        return total / book.softmax_divisor(w, targets)

    return {"softmax_loss": softmax_loss}


def _smoothed(share: float) -> dict[str, Any]:
    return _nll(
        lambda x, y, k: (1 - share) * -x.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        - share * x.log_softmax(-1).mean(-1)
    )  # fmt: skip


def _real_channels(x: Tensor, y: Tensor, k: int) -> Tensor:
    own = -x[:, :k].log_softmax(-1).gather(-1, y.clamp(max=k - 1)[:, None])[:, 0]
    return torch.where(y < k, own, -x.log_softmax(-1)[:, k])


def _within(eps: float) -> dict[str, Any]:
    return _nll(lambda x, y, k: -(x.softmax(-1).gather(-1, y[:, None])[:, 0] + eps).log())


for name, sentence, formulas in (
    ("cross-entropy-of-probabilities", "The softmax is applied twice: cross-entropy of probabilities.",
     _nll(lambda x, y, k: -x.softmax(-1).log_softmax(-1).gather(-1, y[:, None])[:, 0])),
    ("binary-cross-entropy-of-the-channels", "Binary cross-entropy over the channels instead of a softmax.",
     _nll(lambda x, y, k: F.binary_cross_entropy_with_logits(
         x, F.one_hot(y, k + 1).to(x.dtype), reduction="none").sum(-1))),
    ("binary-cross-entropy-of-the-mean", "Binary cross-entropy averaged over the channels instead of a softmax.",
     _nll(lambda x, y, k: F.binary_cross_entropy_with_logits(
         x, F.one_hot(y, k + 1).to(x.dtype), reduction="none").mean(-1))),
    ("no-object-left-out-of-the-softmax", "Matched queries leave no object out of their softmax.",
     _nll(_real_channels)),
    ("label-smoothing-of-a-tenth", "Label smoothing of 0.1.", _smoothed(0.1)),
    ("label-smoothing-of-a-hundredth", "Label smoothing of 0.01.", _smoothed(0.01)),
    ("cross-entropy-with-1e-2-in-its-logarithm", "1e-2 is added inside the logarithm.", _within(1e-2)),
    ("cross-entropy-with-1e-3-in-its-logarithm", "1e-3 is added inside the logarithm.", _within(1e-3)),
    ("probability-instead-of-its-logarithm", "−p instead of −log p.",
     _nll(lambda x, y, k: -x.softmax(-1).gather(-1, y[:, None])[:, 0])),
):  # fmt: skip
    known(
        loss_ce_is_the_weighted_mean_of_all_queries, name, sentence, fix="−log_softmax(x)[y] of the logits", **formulas
    )

for name, sentence, eps in (
    ("cross-entropy-with-1e-8-in-its-logarithm", "1e-8 is added inside the logarithm, which flattens wide logits.",
     1e-8),
    ("cross-entropy-with-1e-6-in-its-logarithm", "1e-6 is added inside the logarithm, which flattens wide logits.",
     1e-6),
    ("cross-entropy-with-1e-12-in-its-logarithm", "1e-12 is added inside the logarithm, which flattens wide logits.",
     1e-12),
):  # fmt: skip
    known(
        the_class_loss_is_precise, name, sentence, fix="use log_softmax", profiles=DETR, **_within(eps)
    )  # fmt: skip

known(
    loss_ce_is_not_divided_by_the_number_of_boxes, "cross-entropy-over-the-targets-of-an-image",
    "The weighted mean is divided by the mean number of targets of an image.", fix="leave the weighted mean as it is",
    softmax_divisor=lambda book, w, targets: w.sum() * max(sum(len(t["boxes"]) for t in targets) / len(targets), 1),
)  # fmt: skip

# --- focal: sums ---


def _rows(weight: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The focal terms of an image [Q,C] weighted by a function of their targets [Q,C]."""

    def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        cells: Tensor = book.focal_term(torch.where(inside, x, 0), y)
        return (weight(y) * cells)[inside].sum()

    return {"focal_image": focal_image}


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


def _bce(x: Tensor, y: Tensor) -> Tensor:
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
     _focal(lambda p, q, y, g, a, x: a * (y * q**g + (1 - y)) * _bce(x, y))),
    ("positives-not-focused", "Only negatives have the factor (1 − p_t)^γ.",
     _focal(lambda p, q, y, g, a, x: a * (y + (1 - y) * p**g) * _bce(x, y))),
    ("miss-of-a-positive-for-all", "(1 − p)^γ for positives and negatives alike.",
     _focal(lambda p, q, y, g, a, x: a * q**g * _bce(x, y))),
    ("miss-of-a-negative-for-all", "p^γ for positives and negatives alike.",
     _focal(lambda p, q, y, g, a, x: a * p**g * _bce(x, y))),
    ("alpha-inside-the-focusing-factor", "p_t is exp(−α_t·BCE): α is inside the focusing factor.",
     _focal(lambda p, q, y, g, a, x: a * (1 - (-a * _bce(x, y)).exp()) ** g * _bce(x, y))),
    ("quality-focal-loss", "Quality focal loss: |y − p|^γ without α.",
     _focal(lambda p, q, y, g, a, x: (y - p).abs() ** g * _bce(x, y))),
    ("varifocal-loss", "Varifocal loss with hard targets: positives weigh 1, negatives 0.75·p^γ.",
     _focal(lambda p, q, y, g, a, x: (y + (1 - y) * 0.75 * p.detach() ** g) * _bce(x, y))),
    ("varifocal-loss-by-alpha", "Varifocal loss with hard targets: positives weigh 1, negatives α·p^γ.",
     {"focal_term": lambda book, x, y: (
         (y > 0).double() + (y <= 0).double() * book.o.focal_alpha * x.sigmoid().detach() ** book.o.focal_gamma
     ) * _bce(x, (y > 0).double())}),
    ("alpha-and-gamma-exchanged", "α and γ arrive in each other's place.",
     {"focal_term": lambda book, x, y: torch.where(y > 0, book.o.focal_gamma, 1 - book.o.focal_gamma).double()
      * (-torch.where(y > 0, x, -x)).sigmoid() ** book.o.focal_alpha * _bce(x, (y > 0).double())}),
):  # fmt: skip
    check = the_class_loss_is_a_sum if name == "quality-focal-loss" else the_focusing_factor_has_the_configured_gamma
    known(check, name, sentence, fix="(1 − p_t)^γ on every entry", **formulas)

known(
    alpha_weighs_positives, "plain-binary-cross-entropy", "Plain binary cross-entropy: neither α nor γ.",
    fix="α_t·(1 − p_t)^γ·(−log p_t)", **_focal(lambda p, q, y, g, a, x: _bce(x, y)),
)  # fmt: skip

for name, sentence, formulas in (
    ("class-loss-is-a-squared-error", "Squared error of the probability in place of the logarithm.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * (p - y) ** 2)),
    ("sigmoid-applied-twice", "The sigmoid is applied twice: the focal loss takes probabilities for logits.",
     {"focal_term": lambda book, x, y: book.alpha_weight(y) * book.focusing(torch.where(y > 0, x, -x))
      * _bce(x.sigmoid(), (y > 0).double())}),
    ("focal-loss-of-probabilities", "The whole focal loss is taken of sigmoid(x), as if that were a logit.",
     {"focal_image": lambda book, x, y, inside: book.focal_term(x[inside].sigmoid(), y[inside]).sum()}),
    ("focal-loss-in-binary-digits", "Logarithms to base 2.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * _bce(x, y) / 0.6931471805599453)),
    ("hinge-in-place-of-the-logarithm", "A hinge max(0, 1 ∓ x) in place of the logarithm.",
     _focal(lambda p, q, y, g, a, x: a * torch.where(y > 0, q, p) ** g * (1 - x * (2 * y - 1)).clamp(min=0))),
    ("focal-loss-smoothed-by-a-hundredth", "Label smoothing of 0.01.",
     _focal(lambda p, q, y, g, a, x: _soft(y * 0.99 + 0.005, p, q, g, a, x))),
    ("focal-loss-smoothed-by-a-tenth", "Label smoothing of 0.1.",
     _focal(lambda p, q, y, g, a, x: _soft(y * 0.9 + 0.05, p, q, g, a, x))),
):  # fmt: skip
    whole = name == "focal-loss-in-binary-digits"  # a factor on every entry
    known(
        the_class_loss_is_a_sum if whole else the_focusing_factor_has_the_configured_gamma, name, sentence,
        fix="−log of the sigmoid of the logits", **formulas,
    )  # fmt: skip


def _soft(y: Tensor, p: Tensor, q: Tensor, g: float, a: Tensor, x: Tensor) -> Tensor:
    return a * (1 - (p * y + q * (1 - y))) ** g * _bce(x, y)


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
    known(the_class_loss_is_precise, name, sentence, fix="compute in the dtype of the outputs", around=_logits(change))

for name, sentence, change in (
    ("class-gradient-halved", "The value of the class loss is right, and its gradient half of it.",
     lambda x, k: (x + x.detach()) / 2),
    ("class-loss-without-gradient", "The class loss is computed from detached logits.", lambda x, k: x.detach()),
):  # fmt: skip
    known(
        logits_get_the_textbook_gradient, name, sentence, fix="compute the class loss on the logits themselves",
        around=_logits(change),
    )  # fmt: skip

known(
    logits_get_the_textbook_gradient, "no-object-channel-without-gradient",
    "The no-object channel of matched queries gets no gradient.", fix="compute the class loss on the logits themselves",
    profiles=DETR, **_nll(lambda x, y, k: -torch.where(
        (y < k)[:, None] & (torch.arange(k + 1) == k), x.detach(), x).log_softmax(-1).gather(-1, y[:, None])[:, 0]),
)  # fmt: skip
