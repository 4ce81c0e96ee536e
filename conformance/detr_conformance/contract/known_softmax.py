"""Known mistakes of the softmax loss, beside those in the chapter CLS: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_conformance.contract.classification import (
    every_query_and_channel_is_trained,
    loss_ce_is_not_divided_by_the_number_of_boxes,
    loss_ce_is_the_weighted_mean_of_all_queries,
)
from detr_conformance.contract.gradients import logits_get_the_textbook_gradient
from detr_conformance.contract.numbers import the_class_loss_is_precise
from detr_conformance.registry import DETR, FOCAL, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook

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
    ("cross-entropy-ignores-the-last-class", "ignore_index is K − 1: targets of the last class have no loss.",
     lambda book, nll, w, y, m, nb: _mean(nll, w * (y != book.o.num_classes - 1))),
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
        ("labels-one-down-to-background", "Labels are shifted down by one, and class 0 becomes background.",
         _classes(lambda y, k: torch.where(y == 0, k, y - 1))),
        ("last-label-for-all", "Every matched query of an image gets the image's last label.",
         _classes(pick=lambda labels, pairs: labels[-1:].expand(len(pairs)))),
        ("label-of-the-next-target", "Every matched query gets the label of the target after its own.",
         _classes(pick=lambda labels, pairs: labels.roll(-1)[pairs.target])),
        ("label-of-the-target-before", "Every matched query gets the label of the target before its own.",
         _classes(pick=lambda labels, pairs: labels.roll(1)[pairs.target])),
        ("labels-in-reverse", "The labels of an image's targets come in reverse order.",
         _classes(pick=lambda labels, pairs: labels.flip(0)[pairs.target])),
        ("every-class-is-the-last", "All targets are trained as one class, class K − 1.",
         _classes(lambda y, k: torch.full_like(y, k - 1))),
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


def with_logits(change: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    return {
        "loss_ce": lambda before, book, layer, *rest: before(
            replace(layer, logits=change(layer.logits, book.o.num_classes)), *rest
        )
    }


def nll(value: Callable[[Tensor, Tensor, int], Tensor]) -> dict[str, Any]:
    """A negative log-likelihood of another kind, from logits [B·Q,K+1] and classes [B·Q]."""

    def softmax_loss(book: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Tensor:
        images = zip(layer.logits, targets, matches, strict=True)
        y = torch.cat([book.softmax_class_target(x, t, m) for x, t, m in images])
        w = book.class_weight(y)
        total: Tensor = (w * value(layer.logits.flatten(0, 1), y, book.o.num_classes)).sum()
        return total / book.softmax_divisor(w, targets)

    return {"softmax_loss": softmax_loss}


def _smoothed(share: float) -> dict[str, Any]:
    return nll(
        lambda x, y, k: (1 - share) * -x.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        - share * x.log_softmax(-1).mean(-1)
    )  # fmt: skip


def _real_channels(x: Tensor, y: Tensor, k: int) -> Tensor:
    own = -x[:, :k].log_softmax(-1).gather(-1, y.clamp(max=k - 1)[:, None])[:, 0]
    return torch.where(y < k, own, -x.log_softmax(-1)[:, k])


def _within(eps: float) -> dict[str, Any]:
    return nll(lambda x, y, k: -(x.softmax(-1).gather(-1, y[:, None])[:, 0] + eps).log())


for name, sentence, formulas in (
    ("cross-entropy-of-probabilities", "The softmax is applied twice: cross-entropy of probabilities.",
     nll(lambda x, y, k: -x.softmax(-1).log_softmax(-1).gather(-1, y[:, None])[:, 0])),
    ("binary-cross-entropy-of-the-channels", "Binary cross-entropy over the channels instead of a softmax.",
     nll(lambda x, y, k: F.binary_cross_entropy_with_logits(
         x, F.one_hot(y, k + 1).to(x.dtype), reduction="none").sum(-1))),
    ("binary-cross-entropy-of-the-mean", "Binary cross-entropy averaged over the channels instead of a softmax.",
     nll(lambda x, y, k: F.binary_cross_entropy_with_logits(
         x, F.one_hot(y, k + 1).to(x.dtype), reduction="none").mean(-1))),
    ("no-object-left-out-of-the-softmax", "Matched queries leave no object out of their softmax.",
     nll(_real_channels)),
    ("label-smoothing-of-a-tenth", "Label smoothing of 0.1.", _smoothed(0.1)),
    ("label-smoothing-of-a-hundredth", "Label smoothing of 0.01.", _smoothed(0.01)),
    ("cross-entropy-with-1e-2-in-its-logarithm", "1e-2 is added inside the logarithm.", _within(1e-2)),
    ("cross-entropy-with-1e-3-in-its-logarithm", "1e-3 is added inside the logarithm.", _within(1e-3)),
    ("probability-instead-of-its-logarithm", "−p instead of −log p.",
     nll(lambda x, y, k: -x.softmax(-1).gather(-1, y[:, None])[:, 0])),
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

known(
    logits_get_the_textbook_gradient, "no-object-channel-without-gradient",
    "The no-object channel of matched queries gets no gradient.", fix="compute the class loss on the logits themselves",
    profiles=DETR, **nll(lambda x, y, k: -torch.where(
        (y < k)[:, None] & (torch.arange(k + 1) == k), x.detach(), x).log_softmax(-1).gather(-1, y[:, None])[:, 0]),
)  # fmt: skip
