"""CLS: the class loss, seen through its value and, entry by entry, through its gradient.

Where the gradient of every logit is the textbook's times some factor, the pattern of factors tells which part of the
formula is off: one factor everywhere is the reduction, another for positives α, another for unmatched queries the
background, another for a column the class, and factors that vary within a group the focusing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detr_conformance.contract.compare import agree, holds, number
from detr_conformance.contract.keys import logged_quantities_have_no_weight_and_losses_are_unweighted
from detr_conformance.contract.normalisation import value
from detr_conformance.experiments import BATCH, CONFIGURED, EDGES
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Pairs, Textbook

CLOSE = 2e-3  # of a factor: far above rounding, and values are compared to rounding besides


@dataclass(frozen=True, eq=False)
class Factors:
    """Of every logit [B,Q,C]: the factor got/want of its gradient, and which of them can be told.

    ``positive``: entries whose target is 1 (for softmax, matched rows) · ``matched``: rows of matched queries ·
    ``right``: factors that are positive numbers, so that target and sign are as they should be.
    """

    factor: Tensor
    told: Tensor
    positive: Tensor
    matched: Tensor
    right: Tensor

    def median(self, where: Tensor) -> float | None:
        """The median factor over those entries, or None where there are none."""
        chosen = self.factor[self.told & self.right & where]
        return float(chosen.median()) if len(chosen) else None


def factors(seen: Seen, layer: str = "final") -> Factors | None:
    """The factors of the class loss's gradient; None where the candidate gives none."""
    got = seen.got.grads.get(("ce", layer), (None, None))[0]
    if got is None or not bool(got.isfinite().all()):
        return None
    want = seen.want.grads["ce", layer][0]
    book, own = seen.book, seen.layers[layer]
    matched = torch.zeros(want.shape[:2], dtype=torch.bool)
    positive = torch.zeros_like(want, dtype=torch.bool)
    kind = book.token_class_target if book.o.class_loss == "token" else book.focal_class_target
    for b, (x, t, m) in enumerate(zip(own.logits, seen.targets(layer), seen.pairs[layer], strict=True)):
        matched[b, m.query] = True
        if book.o.class_loss == "softmax":
            positive[b, m.query] = True
        else:
            positive[b] = kind(x, t, m) > 0
    rows = matched[..., None].expand_as(want)
    size = want.abs()
    told = (size > 1e-2 * size.max()) & (seen.allowed_class_gradient(layer, want) < CLOSE * size)
    factor = torch.where(told, got / want, torch.ones_like(want))
    return Factors(factor, told, positive, rows, factor > 1e-6)


def _same(what: str, one: float | None, other: float | None, how: str) -> Iterator[Comparison]:
    if one is not None and other is not None:
        yield agree(what, other, one, CLOSE * abs(other), how)


def _at(mask: Tensor) -> str:
    return "".join(f"[{int(i)}]" for i in mask.nonzero()[0])


def targets_and_background(seen: Seen) -> Iterator[Comparison]:
    """Positives and negatives where they belong, the background as heavy as the rest; then the value itself."""
    found = factors(seen)
    if found is None:
        yield from value(seen, "ce", "final")
        return
    wrong = found.told & (found.factor < -1e-6)
    if bool(wrong.any()):
        want, got = (g["ce", "final"][0][wrong][0] for g in (seen.want.grads, seen.got.grads))  # type: ignore[index]
        what = f"gradient of loss_ce at pred_logits{_at(wrong)}, which is a " + (
            "positive" if bool(found.positive[wrong][0]) else "negative"
        )
        yield holds(False, what, number(float(want)), number(float(got)), "the sign tells what it is trained to be")
        return
    silent = found.told & (found.factor.abs() <= 1e-6)
    columns = silent.flatten(0, 1).all(0) & found.told.flatten(0, 1).any(0)
    silent = silent & ~columns  # a whole class that never trains is CLS-7
    if bool(silent.any()):
        want = float(seen.want.grads["ce", "final"][0][silent][0])
        where = "matched" if bool(found.matched[silent][0]) else "unmatched"
        what = f"gradient of loss_ce at pred_logits{_at(silent)}, of a query that is {where}"
        yield holds(False, what, number(want), "0", "every query and channel takes part")
        return
    unmatched, matched = found.median(~found.matched & ~found.positive), found.median(found.matched & ~found.positive)
    yield from _same(
        "weight of unmatched queries against matched ones, negatives", unmatched, matched, "both are plain negatives"
    )
    overall = found.factor[found.told]
    if len(overall) and bool(((overall - 1).abs() < CLOSE).all()):
        yield from value(seen, "ce", "final")


def _rest(seen: Seen) -> Factors | None:
    found = factors(seen)
    return found if found is not None and bool(found.told.any()) else None


_UNWEIGHTED = [logged_quantities_have_no_weight_and_losses_are_unweighted]
_PROMPT = ["every_image_uses_its_own_prompt"]
_TOKENS = [*_PROMPT, "every_token_of_the_class_is_a_positive"]

# --- softmax ---

CLS_1 = clause(
    "CLS-1",
    "must",
    DETR,
    "loss_ce = Σ w_y·nll / Σ w_y over all B·Q; unmatched queries have class K (no object); w = 1, except eos_coef for "
    "class K.",
    ["facebookresearch/detr models/detr.py:108-127"],
)


@check(CLS_1, on=CONFIGURED, component="class loss", takes_raising=True)
def loss_ce_is_the_weighted_mean_of_all_queries(seen: Seen) -> Iterator[Comparison]:
    found = factors(seen)
    if found is None or _scale(found) is None:
        yield from value(seen, "ce", "final", "Σ w·nll / Σ w")


def _scale(found: Factors) -> float | None:
    """The one factor of all entries, if it is one and not 1."""
    told = found.factor[found.told]
    if not len(told) or float(told.max() - told.min()) > CLOSE * float(told.abs().max()):
        return None
    return float(told.median()) if abs(float(told.median()) - 1) > CLOSE else None


@check(CLS_1, on=EDGES, component="class loss", after=_UNWEIGHTED)
def loss_ce_of_at_most_one_target_is_the_weighted_mean(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total <= 1:
        yield from value(seen, "ce", "final", "Σ w·nll / Σ w")


@fault(loss_ce_is_the_weighted_mean_of_all_queries, fix="pass the class weights to the cross-entropy")
def no_object_weighs_as_much_as_a_class(book: Textbook) -> Textbook:
    """eos_coef is ignored: every query weighs 1."""
    return replace(book, class_weight=lambda book, y: torch.ones_like(y, dtype=torch.float64))


@fault(loss_ce_is_the_weighted_mean_of_all_queries, fix="give unmatched queries class K")
def background_is_class_zero(book: Textbook) -> Textbook:
    """Unmatched queries are trained as class 0."""

    def target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        y = torch.zeros(len(x), dtype=torch.int64)
        y[pairs.query] = target["labels"][pairs.target]
        return y

    return replace(book, softmax_class_target=target)


@fault(loss_ce_of_at_most_one_target_is_the_weighted_mean, fix="divide by the sum of the weights")
def weighted_sum_over_the_number_of_queries(book: Textbook) -> Textbook:
    """The weighted sum is divided by the number of queries instead of the sum of the weights."""
    return replace(book, softmax_divisor=lambda book, w, targets: torch.tensor(float(len(w)), dtype=torch.float64))


CLS_2 = clause("CLS-2", "must", DETR, "loss_ce is not divided by the number of boxes.")


@check(CLS_2, on=BATCH, component="class loss", after=[loss_ce_of_at_most_one_target_is_the_weighted_mean])
def loss_ce_is_not_divided_by_the_number_of_boxes(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total > 1:
        yield from value(seen, "ce", "final", f"Σ w·nll / Σ w, with {seen.case.total} targets")


@fault(loss_ce_is_not_divided_by_the_number_of_boxes, fix="leave the weighted mean as it is")
def cross_entropy_divided_by_boxes(book: Textbook) -> Textbook:
    """The weighted mean is divided by the number of boxes once more."""

    def divisor(book: Textbook, w: Tensor, targets: list[Mapping[str, Tensor]]) -> Tensor:
        return w.sum() * book.num_boxes(targets)

    return replace(book, softmax_divisor=divisor)


@check(CLS_1, on=EDGES, component="class loss", after=[loss_ce_is_not_divided_by_the_number_of_boxes])
def an_image_without_targets_is_background(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total and not all(seen.case.counts):
        yield from value(seen, "ce", "final", "Σ w·nll / Σ w, images without targets included")


# --- focal ---

CLS_3 = clause(
    "CLS-3",
    "must",
    FOCAL,
    "loss_ce = Σ over all B·Q·K of the focal loss / nb; unmatched queries are negatives in every channel.",
    ["fundamentalvision/Deformable-DETR models/deformable_detr.py:229-238"],
)


@check(CLS_3, on=BATCH, component="class loss", after=_UNWEIGHTED)
def every_query_and_channel_is_trained(seen: Seen) -> Iterator[Comparison]:
    yield from targets_and_background(seen)


@fault(every_query_and_channel_is_trained, seen_in="an early Grounding DINO trainer", fix="train all queries")
def focal_loss_on_matched_queries_only(book: Textbook) -> Textbook:
    """The focal loss is taken on matched pairs only: the background is never trained."""
    return replace(book, **matched_only(book))


def matched_only(book: Textbook):  # type: ignore[no-untyped-def]
    def wrap(name: str):  # type: ignore[no-untyped-def]
        def target(inner: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
            y: Tensor = getattr(book.under(inner.o), name)(x, target, pairs)
            out = torch.full_like(y, -1)  # −1: left out
            out[pairs.query] = y[pairs.query]
            return out

        return target

    def focal_image(inner: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).focal_image(x, y.clamp(min=0), inside & (y >= 0))
        return found

    return {n: wrap(n) for n in ("focal_class_target", "token_class_target")} | {"focal_image": focal_image}


CLS_4 = clause("CLS-4", "must", FOCAL | TEXT, "α weighs positives, 1 − α negatives.", ["Lin 2017, eq. 5"])


@check(CLS_4, on=CONFIGURED, component="class loss", after=_PROMPT)
def alpha_weighs_positives(seen: Seen) -> Iterator[Comparison]:
    found = _rest(seen)
    if found:
        a = seen.case.options.focal_alpha
        yield from _same(
            "weight of positives against negatives, relative to the formula's",
            found.median(found.positive),
            found.median(~found.positive),
            f"α = {a:g} for positives, {1 - a:g} for negatives",
        )


@fault(alpha_weighs_positives, fix="α for positives, 1 − α for negatives")
def alpha_on_negatives(book: Textbook) -> Textbook:
    """α and 1 − α change places."""

    def alpha_weight(book: Textbook, y: Tensor) -> Tensor:
        return torch.where(y > 0, 1 - book.o.focal_alpha, book.o.focal_alpha).double()

    return replace(book, alpha_weight=alpha_weight)


CLS_5 = clause(
    "CLS-5",
    "must",
    FOCAL | TEXT,
    "The factor is (1 − p_t)^γ with the configured γ, and gradient passes through it.",
    ["Lin 2017, eq. 5"],
)


@check(CLS_5, on=CONFIGURED, component="class loss", takes_raising=True, after=_PROMPT)
def the_focusing_factor_has_the_configured_gamma(seen: Seen) -> Iterator[Comparison]:
    found = _rest(seen)
    if found is None:
        return
    for name, group in (("positives", found.positive), ("negatives", ~found.positive & found.matched)):
        chosen = found.factor[found.told & found.right & group]
        if len(chosen) > 1:
            low, high = float(chosen.min()), float(chosen.max())
            what = f"weight of the hardest against the easiest of the {name}, relative to the formula's"
            how = f"(1 − p_t)^γ with γ = {seen.case.options.focal_gamma:g}"
            yield agree(what, 1.0, low / high, CLOSE, how)
    overall = found.factor[found.told]
    if bool(((overall - 1).abs() < CLOSE).all()):
        yield from value(seen, "ce", "final", "under the configured α and γ")


@fault(the_focusing_factor_has_the_configured_gamma, fix="hand focal_gamma to the loss")
def gamma_is_one_less(book: Textbook) -> Textbook:
    """γ is one less than configured."""
    return replace(book, focusing=lambda book, z: (-z).sigmoid() ** max(book.o.focal_gamma - 1, 0.0))


@fault(the_focusing_factor_has_the_configured_gamma, fix="do not detach the probability")
def focusing_factor_detached(book: Textbook) -> Textbook:
    """No gradient passes through (1 − p_t)^γ."""

    def focusing(inner: Textbook, z: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).focusing(z)
        return found.detach()

    return replace(book, focusing=focusing)


CLS_6 = clause(
    "CLS-6",
    "must",
    FOCAL | TEXT,
    "The class loss is a sum over queries and channels, not a mean over either.",
    ["fundamentalvision/Deformable-DETR models/deformable_detr.py:238"],
)


@check(CLS_6, on=BATCH, component="class loss", after=[*_UNWEIGHTED, *_TOKENS])
def the_class_loss_is_a_sum(seen: Seen) -> Iterator[Comparison]:
    found = _rest(seen)
    if found:
        scale = found.median(found.matched & ~found.positive) or found.median(~found.positive)
        yield from _same(
            "the class loss as a multiple of Σ focal loss / nb", scale, 1.0, "a sum over queries and channels"
        )


@fault(the_class_loss_is_a_sum, seen_in="a missing × Q after the helper's mean(1)", fix="multiply by Q")
def class_loss_averaged_over_queries(book: Textbook) -> Textbook:
    """The focal loss is averaged over queries: a factor 1/Q."""
    return replace(book, focal_image=lambda inner, x, y, inside: book.under(inner.o).focal_image(x, y, inside) / len(x))


CLS_7 = clause("CLS-7", "must", EVERY, "The first and the last class train like any other.")


@check(CLS_7, on=BATCH, component="class loss", profiles=DETR | FOCAL)
def the_first_and_the_last_class_are_trained(seen: Seen) -> Iterator[Comparison]:
    found = _rest(seen)
    classes = seen.case.options.num_classes
    if found is None or classes < 2:
        return
    for name, k in (("first", 0), ("last", classes - 1)):
        told = found.told[..., k]
        if bool(told.any()):
            silent = told & (found.factor[..., k].abs() <= 1e-6)
            what = f"class gradient of the {name} class, channel {k}"
            yield holds(
                not bool(silent.all()), what, "as for other classes", "0" if bool(silent.all()) else "as others"
            )
    rows = found.matched if seen.book.o.class_loss != "softmax" else torch.ones_like(found.matched)
    inner = [found.median(rows & ~found.positive & _column(found, k)) for k in range(1, classes - 1)]
    middle = next((m for m in inner if m is not None), None)
    for name, k in (("first", 0), ("last", classes - 1)):
        column = found.median(rows & ~found.positive & _column(found, k))
        yield from _same(
            f"weight of the {name} class against the others, negatives", column, middle, "all classes alike"
        )


@check(CLS_7, on=BATCH, component="class loss", profiles=TEXT, after=_TOKENS)
def the_first_and_the_last_class_of_a_prompt_are_trained(seen: Seen) -> Iterator[Comparison]:
    grads = seen.got.grads.get(("ce", "final"), (None, None))[0]
    if grads is None:
        return
    for b, (target, pairs) in enumerate(zip(seen.targets("final"), seen.pairs["final"], strict=True)):
        last = len(target["positive_map"]) - 1
        for q, t in zip(pairs.query.tolist(), pairs.target.tolist(), strict=True):
            label = int(target["labels"][t])
            if label in (0, last):
                own = (target["token_labels"][t] > 0) & seen.case.outputs["text_mask"][b]
                pull = float(grads[b, q][own].max()) if bool(own.any()) else -1.0
                what = f"gradient of loss_ce at query {q} of image {b} on the tokens of class {label}"
                yield holds(pull < 0, what, "negative: the tokens are positives", number(pull))


def _column(found: Factors, k: int) -> Tensor:
    mask = torch.zeros_like(found.told)
    mask[..., k] = True
    return mask


@fault(the_first_and_the_last_class_are_trained, seen_in="facebookresearch/detr #108", fix="keep all K channels")
def last_class_is_dropped(book: Textbook) -> Textbook:
    """The last class's channel has no part in the loss: num_classes is one too small somewhere."""

    def in_loss(book: Textbook, x: Tensor, mask: Tensor | None) -> Tensor:
        inside = torch.ones_like(x, dtype=torch.bool)
        inside[:, -1] = False
        return inside

    def softmax_class_target(inner: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        y: Tensor = book.under(inner.o).softmax_class_target(x, target, pairs)
        return torch.where(y == inner.o.num_classes - 1, inner.o.num_classes, y)

    def softmax_loss(inner: Textbook, layer, targets, matches):  # type: ignore[no-untyped-def]
        cut = layer.logits.clone()
        cut[..., inner.o.num_classes - 1] = cut[..., inner.o.num_classes - 1].detach()
        return book.under(inner.o).softmax_loss(replace(layer, logits=cut), targets, matches)

    return replace(book, in_loss=in_loss, softmax_loss=softmax_loss)


@fault(the_first_and_the_last_class_of_a_prompt_are_trained, fix="count classes from 0")
def class_zero_is_background(book: Textbook) -> Textbook:
    """Targets of class 0 are trained as background."""

    def target(inner: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        y: Tensor = book.under(inner.o).token_class_target(x, target, pairs)
        y[pairs.query[target["labels"][pairs.target] == 0]] = 0
        return y

    return replace(book, token_class_target=target)


CLS_8 = clause(
    "CLS-8",
    "must",
    EVERY,
    "Without any target the class loss keeps its formula: finite, positive, with gradient.",
)


@check(
    CLS_8,
    on=EDGES,
    component="class loss",
    after=[
        loss_ce_is_the_weighted_mean_of_all_queries,
        every_query_and_channel_is_trained,
        alpha_weighs_positives,
        the_class_loss_is_a_sum,
        "every_token_of_the_class_is_a_positive",
    ],
)
def the_class_loss_without_targets_keeps_its_formula(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total:
        return
    for layer in seen.case.layers:
        key = seen.case.keys(layer)[0]
        if key not in seen.got.losses:
            continue
        got = seen.got.losses[key]
        yield holds(0 < got < float("inf"), f"{key} without targets", "finite and positive", number(got))
        grad = seen.got.grads.get(("ce", layer), (None, None))[0]
        some = grad is not None and bool((grad != 0).any())
        yield holds(some, f"gradient of {key} without targets", "some", "some" if some else "none")
        yield from value(seen, "ce", layer, "all queries are background, nb is 1")


@fault(
    the_class_loss_without_targets_keeps_its_formula,
    seen_in="ultralytics RTDETRDetectionLoss changes its formula on an empty batch",
    fix="let an empty batch go through the same formula",
)
def class_loss_of_an_empty_batch_is_zero(book: Textbook) -> Textbook:
    """A batch without targets has class loss 0."""

    def loss_ce(inner: Textbook, layer, targets, *rest):  # type: ignore[no-untyped-def]
        found = book.under(inner.o).loss_ce(layer, targets, *rest)
        return found if any(len(t["boxes"]) for t in targets) else found * 0

    return replace(book, loss_ce=loss_ce)
