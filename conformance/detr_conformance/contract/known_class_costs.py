"""Known mistakes of the class cost, beside those in the chapter COST: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.costs import (
    the_class_cost_is_minus_the_softmax,
    the_class_cost_is_the_focal_difference,
    the_class_cost_is_the_mean_over_the_tokens_of_the_class,
    the_cost_is_the_weighted_sum_of_the_three,
)
from detr_conformance.contract.matching import order_does_not_matter
from detr_conformance.registry import DETR, FOCAL, TEXT, known
from detr_reference.textbook import Textbook, minus_log_sigmoid

Target = Mapping[str, Tensor]


# --- the class term ---


def _of_label(table: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda book, x, target: table(x)[:, target["labels"]]


for name, sentence, formula in (
    ("class-cost-is-minus-the-logit", "The class cost is −logit, without a softmax.", _of_label(lambda x: -x)),
    ("class-cost-by-sigmoid", "The class cost is −sigmoid instead of −softmax.", _of_label(lambda x: -x.sigmoid())),
    ("softmax-over-queries", "The softmax of the class cost runs over the queries.",
     _of_label(lambda x: -x.softmax(0))),
    ("class-cost-squared", "The class cost is −p².", _of_label(lambda x: -(x.softmax(-1) ** 2))),
    ("class-cost-by-the-best-channel", "0 where the highest logit is the label's, 1 elsewhere.",
     lambda book, x, target: (x.argmax(-1)[:, None] != target["labels"]).to(x.dtype)),
    ("class-cost-is-the-no-object-probability", "The class cost is the probability of no object, whatever the label.",
     lambda book, x, target: x.softmax(-1)[:, -1:].expand(-1, len(target["labels"]))),
    ("class-cost-of-the-best-class", "The class cost is that of the best class, whatever the label.",
     lambda book, x, target: -x.softmax(-1)[:, :-1].amax(-1, keepdim=True).expand(-1, len(target["labels"]))),
):  # fmt: skip
    known(
        the_class_cost_is_minus_the_softmax, name, sentence, fix="−softmax(x)[label] over all K + 1 channels",
        softmax_cost=formula,
    )  # fmt: skip


def _parts(book: Textbook, x: Tensor) -> tuple[Any, ...]:
    """α, γ, p, 1 − p, −log p and −log(1 − p)."""
    o = book.o
    return o.cost_alpha, o.cost_gamma, x.sigmoid(), (-x).sigmoid(), minus_log_sigmoid(x), minus_log_sigmoid(-x)


def _of_parts(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda book, x: value(*_parts(book, x))


def _with_eps(eps: float) -> Callable[..., Tensor]:
    return _of_parts(
        lambda a, g, p, q, lp, lq: a * q**g * -(p + eps).log() - (1 - a) * p**g * -(q + eps).log()
    )  # fmt: skip


_FOCAL = "α(1−p)^γ(−log p) − (1−α)p^γ(−log(1−p))"

for name, sentence, value in (
    ("class-cost-is-minus-the-probability", "The class cost is −σ(x), DETR's with a sigmoid.",
     lambda a, g, p, q, lp, lq: -p),
    ("class-cost-is-minus-the-focal-logit", "The class cost is −logit, without a focal formula.",
     lambda a, g, p, q, lp, lq: lp - lq),
    ("class-cost-adds-the-negative-part", "The negative part is added instead of subtracted.",
     lambda a, g, p, q, lp, lq: a * q**g * lp + (1 - a) * p**g * lq),
    ("class-cost-is-the-negative-part", "The positive part of the class cost is left out.",
     lambda a, g, p, q, lp, lq: -(1 - a) * p**g * lq),
    ("class-cost-the-wrong-way-round", "The class cost is the negative part less the positive one.",
     lambda a, g, p, q, lp, lq: (1 - a) * p**g * lq - a * q**g * lp),
    ("alpha-on-negatives-in-the-cost", "α and 1 − α change places in the class cost.",
     lambda a, g, p, q, lp, lq: (1 - a) * q**g * lp - a * p**g * lq),
    ("class-cost-without-alpha", "The class cost has no α.", lambda a, g, p, q, lp, lq: q**g * lp - p**g * lq),
    ("class-cost-with-alpha-on-both", "α weighs both parts of the class cost.",
     lambda a, g, p, q, lp, lq: a * (q**g * lp - p**g * lq)),
    ("class-cost-without-focusing", "The class cost has no (1 − p_t)^γ.",
     lambda a, g, p, q, lp, lq: a * lp - (1 - a) * lq),
    ("class-cost-is-cross-entropy", "The class cost is plain −log p.", lambda a, g, p, q, lp, lq: lp),
    ("class-cost-negatives-not-focused", "p^γ is missing in the negative part of the class cost.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - (1 - a) * lq),
    ("class-cost-positives-not-focused", "(1 − p)^γ is missing in the positive part of the class cost.",
     lambda a, g, p, q, lp, lq: a * lp - (1 - a) * p**g * lq),
    ("class-cost-focusing-exchanged", "p^γ and (1 − p)^γ change places in the class cost.",
     lambda a, g, p, q, lp, lq: a * p**g * lp - (1 - a) * q**g * lq),
    ("class-cost-with-one-logarithm", "The negative part of the class cost has −log p as well.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - (1 - a) * p**g * lp),
    ("class-cost-positives-focused-on-the-easy", "p^γ in the positive part of the class cost.",
     lambda a, g, p, q, lp, lq: a * p**g * lp - (1 - a) * p**g * lq),
    ("class-cost-negatives-focused-on-the-easy", "(1 − p)^γ in the negative part of the class cost.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - (1 - a) * q**g * lq),
    ("class-cost-with-the-logarithm-of-negatives", "The positive part of the class cost has −log(1 − p) as well.",
     lambda a, g, p, q, lp, lq: a * q**g * lq - (1 - a) * p**g * lq),
    ("class-cost-logarithms-exchanged", "−log p and −log(1 − p) change places in the class cost.",
     lambda a, g, p, q, lp, lq: a * q**g * lq - (1 - a) * p**g * lp),
    ("class-cost-with-the-complement-on-both", "1 − α weighs both parts of the class cost.",
     lambda a, g, p, q, lp, lq: (1 - a) * (q**g * lp - p**g * lq)),
    ("class-cost-with-alpha-on-positives-only", "α weighs the positive part of the class cost, the negative weighs 1.",
     lambda a, g, p, q, lp, lq: a * q**g * lp - p**g * lq),
    ("class-cost-with-alpha-on-negatives-only", "1 − α weighs the negative part of the class cost, the positive 1.",
     lambda a, g, p, q, lp, lq: q**g * lp - (1 - a) * p**g * lq),
    ("class-cost-of-probabilities-alone", "The class cost is −α(1−p)^γ·p: no logarithm.",
     lambda a, g, p, q, lp, lq: -a * q**g * p),
    ("class-cost-gamma-is-one-less", "γ of the class cost is one less than configured.",
     lambda a, g, p, q, lp, lq: a * q ** max(g - 1, 0) * lp - (1 - a) * p ** max(g - 1, 0) * lq),
    ("class-cost-gamma-is-one-more", "γ of the class cost is one more than configured.",
     lambda a, g, p, q, lp, lq: a * q ** (g + 1) * lp - (1 - a) * p ** (g + 1) * lq),
):  # fmt: skip
    known(
        the_cost_is_the_weighted_sum_of_the_three, name, sentence, fix=_FOCAL, profiles=FOCAL | TEXT,
        focal_difference=_of_parts(value),
    )  # fmt: skip

for digits in (2, 3):
    known(
        the_cost_is_the_weighted_sum_of_the_three, f"class-cost-with-1e-{digits}-in-its-logarithms",
        f"1e-{digits} is added inside the logarithms of the class cost.", fix="add 1e-8 or nothing",
        profiles=FOCAL | TEXT, focal_difference=_with_eps(10.0**-digits),
    )  # fmt: skip

known(
    the_class_cost_is_the_focal_difference, "class-cost-of-any-class",
    "The class cost is that of the query's best class, whatever the label.", fix="pick the column of the label",
    around={"focal_cost": lambda before, book, x, target: before(x.amax(-1, keepdim=True), _zero(target))},
)  # fmt: skip
known(
    the_class_cost_is_the_focal_difference, "softmax-probabilities-in-the-focal-cost",
    "The focal cost is taken of softmax probabilities.", fix="take the sigmoid",
    focal_cost=lambda book, x, target: book.focal_difference(x.softmax(-1).logit())[:, target["labels"]],
)  # fmt: skip


def _zero(target: Target) -> Target:
    return {**target, "labels": torch.zeros_like(target["labels"])}


def _labels(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def cost(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
        return before(x, {**target, "labels": change(target["labels"]).clamp(0, x.shape[-1] - 1)})

    return {"softmax_cost": cost, "focal_cost": cost}


for check, suffix, profiles in (
    (the_class_cost_is_minus_the_softmax, "", DETR),
    (the_class_cost_is_the_focal_difference, "-of-the-focal-cost", FOCAL),
):
    for name, sentence, change in (
        ("cost-labels-from-one", "Labels are taken as counted from 1 in the class cost.", lambda y: y - 1),
        ("cost-labels-one-up", "Labels are shifted up by one in the class cost.", lambda y: y + 1),
        ("cost-labels-from-one-around",
         "Labels are taken as counted from 1 in the class cost, and class 0 has the last channel.",
         lambda y: torch.where(y == 0, 1_000_000, y - 1)),
        ("cost-labels-of-class-zero", "The class cost is that of channel 0, whatever the label.", torch.zeros_like),
        ("cost-labels-of-class-one", "The class cost is that of channel 1, whatever the label.", torch.ones_like),
        ("cost-of-the-last-label", "The class cost is that of the image's last label for every target.",
         lambda y: y[-1:].expand_as(y)),
        ("cost-labels-one-target-on", "Every target has the label of the next one in the class cost.",
         lambda y: y.roll(-1)),
        ("cost-labels-one-target-back", "Every target has the label of the one before in the class cost.",
         lambda y: y.roll(1)),
        ("cost-labels-in-order", "The columns of the class cost come in sorted order of the labels.",
         lambda y: y.sort().values),
        ("cost-labels-reversed", "The columns of the class cost come in reverse order.", lambda y: y.flip(0)),
        ("cost-of-the-first-label", "The class cost is that of the image's first label for every target.",
         lambda y: y[:1].expand_as(y)),
    ):  # fmt: skip
        known(
            order_does_not_matter if name == "cost-labels-in-order" else check, name + suffix, sentence,
            fix="pick the column of each target's own label", profiles=profiles, around=_labels(change),
        )  # fmt: skip


# --- tokens ---


def _by_rows(rows: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost that weighs the focal difference of every token by a row a target."""

    def token_cost(book: Textbook, x: Tensor, target: Target) -> Tensor:
        weights = rows((target["token_labels"] > 0).double())
        return torch.stack([(book.focal_difference(x[:, r > 0]) * r[r > 0]).sum(-1) for r in weights], -1)

    return token_cost


def _only(first: bool) -> Callable[[Tensor], Tensor]:
    def rows(r: Tensor) -> Tensor:
        at = r.argmax(1, keepdim=True) if first else r.shape[1] - 1 - r.flip(1).argmax(1, keepdim=True)
        return torch.zeros_like(r).scatter(1, at, 1.0)

    return rows


def _each(value: Callable[[Textbook, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost by a function of the logits [Q,m] of a class's tokens."""

    def token_cost(book: Textbook, x: Tensor, target: Target) -> Tensor:
        return torch.stack([value(book, x[:, own]) for own in target["token_labels"] > 0], -1)

    return token_cost


def _with_the_rest(book: Textbook, x: Tensor, target: Target) -> Tensor:
    a, g, p, q, lp, lq = _parts(book, x.clamp(min=-1e4))
    rows = (target["token_labels"] > 0).double()
    total: Tensor = (a * q**g * lp) @ rows.T + ((1 - a) * p**g * lq) @ (1 - rows).T
    return total


for name, sentence, formula in (
    ("class-cost-summed-over-tokens", "The class cost is the sum over the tokens of the class.", _by_rows(lambda r: r)),
    ("class-cost-of-the-last-token", "The class cost is that of the last token of the class alone.",
     _by_rows(_only(first=False))),
    ("class-cost-averaged-over-the-text", "The sum over the class's tokens is divided by the length of the text.",
     _by_rows(lambda r: r / r.shape[1])),
    ("class-cost-of-rows-of-unit-length", "Rows of tokens are scaled to unit length, not to unit sum.",
     _by_rows(lambda r: r / r.norm(dim=-1, keepdim=True))),
    ("class-cost-of-the-cheapest-token", "The class cost is that of the cheapest token of the class.",
     _each(lambda book, x: book.focal_difference(x).amin(-1))),
    ("class-cost-of-the-dearest-token", "The class cost is that of the dearest token of the class.",
     _each(lambda book, x: book.focal_difference(x).amax(-1))),
    ("class-cost-of-the-mean-logit", "The class cost is that of the mean logit of the class's tokens.",
     _each(lambda book, x: book.focal_difference(x.mean(-1)))),
    ("class-cost-of-the-mean-probability", "The class cost is that of the mean probability of the class's tokens.",
     _each(lambda book, x: book.focal_difference(x.sigmoid().mean(-1).logit()))),
    ("class-cost-with-the-other-tokens", "Positive parts of the class's tokens plus negative parts of all others.",
     _with_the_rest),
    ("class-cost-of-the-token-of-the-label", "The label is used as the number of a token.",
     lambda book, x, target: book.focal_difference(x[:, target["labels"].clamp(max=x.shape[1] - 1)])),
):  # fmt: skip
    known(
        the_class_cost_is_the_mean_over_the_tokens_of_the_class, name, sentence, fix="the mean over the class's tokens",
        token_cost=formula,
    )  # fmt: skip


def _map_rows(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A token cost of the tokens that other labels have in the image's own prompt."""

    def token_cost(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
        names = target["positive_map"]
        rows = names[change(target["labels"]).clamp(0, len(names) - 1)]
        return before(x, {**target, "token_labels": rows})

    return token_cost


for name, sentence, change in (
    ("cost-labels-from-one-of-the-prompt", "Labels are taken as counted from 1 in the class cost.", lambda y: y - 1),
    ("cost-labels-one-up-of-the-prompt", "Labels are shifted up by one in the class cost.", lambda y: y + 1),
    ("cost-of-the-prompts-first-class", "The class cost is that of the prompt's first class for every target.",
     torch.zeros_like),
    ("cost-of-the-first-label-of-the-prompt", "The class cost is that of the image's first label for every target.",
     lambda y: y[:1].expand_as(y)),
    ("cost-labels-reversed-of-the-prompt", "The columns of the class cost come in reverse order.",
     lambda y: y.flip(0)),
):  # fmt: skip
    known(
        the_class_cost_is_the_mean_over_the_tokens_of_the_class, name, sentence,
        fix="pick the tokens of each target's own label", around={"token_cost": _map_rows(change)},
    )  # fmt: skip


# --- a single class ---


def _if_several(before: Callable[..., Tensor], book: Textbook, x: Tensor, target: Target) -> Tensor:
    """The class cost, and 0 where there is but one class."""
    own, several = before(x, target), len(target.get("positive_map", range(book.o.num_classes))) > 1
    return own if several else 0 * own


for check, suffix, of in (
    (the_class_cost_is_minus_the_softmax, "", "softmax_cost"),
    (the_class_cost_is_the_focal_difference, "-of-the-focal-cost", "focal_cost"),
    (the_class_cost_is_the_mean_over_the_tokens_of_the_class, "-of-the-prompt", "token_cost"),
):
    known(
        check, "class-cost-left-out-with-one-class" + suffix,
        "With a single class the class cost is left out, as if it were the same for every query.",
        fix="queries differ in how sure they are of the one class too", around={of: _if_several},
    )  # fmt: skip
