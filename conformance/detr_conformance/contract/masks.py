"""MASK: the mask losses of the final layer, at the candidate's own matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.contract.compare import agree, agree_rows, holds
from detr_conformance.masked import CODED_MASKS, MASKED, MASKS, UNMASKED
from detr_conformance.registry import Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Layer, Pairs, Textbook, minus_log_sigmoid

# --- what the losses must be ---


def matched_masks(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted masks as given [M,h,w] and as resized [M,H,W], and their targets [M,H,W], in float64."""
    layer, pairs = seen.layers["final"], seen.pairs["final"]
    assert layer.masks is not None
    given = torch.cat([x[m.query] for x, m in zip(layer.masks, pairs, strict=True)])
    resized, wanted = seen.book.matched_masks(layer, seen.targets("final"), pairs)
    return given, resized, wanted


def allowed_of(seen: Seen, term: str) -> float:
    given, x, m = matched_masks(seen)
    moved = tolerance.of_mask_logits(given)
    if term == "mask":
        return tolerance.of_mask(seen.book, x, m, moved, seen.nb)
    return tolerance.of_dice(x, m, moved, seen.nb)


def _value(seen: Seen, term: str, how: str) -> Comparison:
    key = f"loss_{term}"
    return agree(key, seen.want.losses[key], seen.got.losses.get(key), allowed_of(seen, term), how)


def _sizes(seen: Seen) -> str:
    _, x, _ = matched_masks(seen)
    pairs = f"{len(x)} pair{'s' * (len(x) != 1)}"
    return f"{pairs} of {x.shape[1]}×{x.shape[2]} pixels, nb {seen.nb:g}"


MASK_1 = clause(
    "MASK-1",
    "must",
    MASKED,
    "loss_mask = Σ_pairs mean-over-pixels focal(α .25, γ 2) / nb; loss_dice = Σ_pairs 1 − (2Σpm + 1)/(Σp + Σm + 1) / "
    "nb; predicted masks are resized bilinearly (align_corners False) to the size that target masks are padded to.",
    [
        "facebookresearch/detr models/detr.py:164-191",
        "facebookresearch/detr models/segmentation.py, sigmoid_focal_loss and dice_loss",
    ],
)


@check(MASK_1, on=MASKS, component="masks", takes_raising=True)
def loss_mask_is_the_focal_loss_averaged_over_pixels(seen: Seen) -> Iterator[Comparison]:
    yield _value(seen, "mask", f"Σ of the mean focal loss of {_sizes(seen)}")


@check(MASK_1, on=MASKS, component="masks")
def loss_dice_is_the_smoothed_dice_loss_of_each_pair(seen: Seen) -> Iterator[Comparison]:
    yield _value(seen, "dice", f"Σ of 1 − (2Σpm + 1)/(Σp + Σm + 1) of {_sizes(seen)}")


@check(MASK_1, on=MASKS, component="masks")
def masks_get_the_textbook_gradient(seen: Seen) -> Iterator[Comparison]:
    if not (_value(seen, "mask", "").ok and _value(seen, "dice", "").ok):
        return
    grads = [seen.got.grads[term, "final"][2] for term in ("mask", "dice")]
    found = [g for g in grads if g is not None]
    what = "gradient of loss_mask + loss_dice at pred_masks"
    if len(found) < len(grads):
        yield holds(False, what, "a tensor", "none")
        return
    want = seen.want.grads["mask", "final"][2] + seen.want.grads["dice", "final"][2]
    given, _, m = matched_masks(seen)
    matched = tolerance.of_mask_gradient(seen.book, given, m, seen.nb)
    allowed, at = torch.zeros_like(want), 0
    for b, pairs in enumerate(seen.pairs["final"]):
        allowed[b, pairs.query] = matched[at : at + len(pairs)]
        at += len(pairs)
    yield agree_rows(what, want, found[0] + found[1], allowed, "0 for unmatched queries")


# --- the focal loss of the pixels ---


def _each(name: str, of_pairs: Callable[[Textbook, Tensor, Tensor], Tensor]) -> Callable[[Textbook], Textbook]:
    """A book whose loss ``name`` is ``of_pairs`` of the matched masks and their targets [M,H,W], over nb."""

    def loss(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        return of_pairs(inner, pred, wanted) / nb

    changed: dict[str, Any] = {name: loss}
    return lambda book: replace(book, **changed)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="mean over pixels, sum over pairs, / nb")
def mask_loss_averaged_over_masks(book: Textbook) -> Textbook:
    """The mask loss is the mean over masks and pixels instead of a sum over masks / nb."""

    def loss(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        return inner.mask_focal_term(pred, wanted).mean() if len(pred) else pred.sum()

    return replace(book, loss_mask=loss)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="divide by nb once")
def mask_loss_averaged_and_divided(book: Textbook) -> Textbook:
    """The mask loss is the mean over masks and pixels, and divided by nb besides."""

    def mean(inner: Textbook, pred: Tensor, wanted: Tensor) -> Tensor:
        return inner.mask_focal_term(pred, wanted).sum() / max(pred.numel(), 1)

    return _each("loss_mask", mean)(book)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="take the mean over the pixels of each mask")
def mask_loss_summed_over_pixels(book: Textbook) -> Textbook:
    """The mask loss is summed over pixels, and grows with the size of the image."""
    return _each("loss_mask", lambda inner, pred, wanted: inner.mask_focal_term(pred, wanted).sum())(book)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="divide by the number of targets")
def mask_losses_divided_by_the_matches(book: Textbook) -> Textbook:
    """The mask losses are divided by the number of matched pairs."""

    def mask_losses(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs], nb: Tensor) -> Any:
        matched = torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)
        return book.under(inner.o).mask_losses(layer, targets, matches, matched)

    return replace(book, mask_losses=mask_losses)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="weigh mask pixels by α = .25, background by .75")
def mask_loss_without_alpha(book: Textbook) -> Textbook:
    """Pixels of mask and background weigh the same: no α."""

    def term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
        z = torch.where(m > 0, x, -x)
        return (-z).sigmoid() ** 2 * minus_log_sigmoid(z)

    return replace(book, mask_focal_term=term)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="multiply by (1 − p_t)²")
def mask_loss_without_focusing(book: Textbook) -> Textbook:
    """Plain binary cross-entropy of the pixels, weighted by α: γ is 0."""

    def term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
        return 0.25 * m * minus_log_sigmoid(x) + 0.75 * (1 - m) * minus_log_sigmoid(-x)

    return replace(book, mask_focal_term=term)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="the focal loss of the pixels: α, 1 − α and (1 − p_t)²")
def mask_loss_is_plain_cross_entropy(book: Textbook) -> Textbook:
    """Plain binary cross-entropy of the pixels: neither α nor γ."""

    def term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
        return minus_log_sigmoid(torch.where(m > 0, x, -x))

    return replace(book, mask_focal_term=term)


# --- sizes ---


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="interpolate with align_corners=False")
def masks_resized_with_aligned_corners(book: Textbook) -> Textbook:
    """Predicted masks are resized with align_corners=True."""

    def interpolation(book: Textbook, wanted: int, given: int) -> Tensor:
        at = torch.arange(wanted, dtype=torch.float64) * (given - 1) / max(wanted - 1, 1)
        return (1 - (at[:, None] - torch.arange(given)).abs()).clamp(min=0)

    return replace(book, interpolation=interpolation)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="interpolate with mode='bilinear'")
def masks_resized_to_the_nearest_pixel(book: Textbook) -> Textbook:
    """Predicted masks are resized without interpolation: the nearest pixel."""

    def interpolation(book: Textbook, wanted: int, given: int) -> Tensor:
        near = torch.arange(wanted) * given // wanted
        return (near[:, None] == torch.arange(given)).double()

    return replace(book, interpolation=interpolation)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="resize logits, not probabilities")
def masks_resized_as_probabilities(book: Textbook) -> Textbook:
    """The sigmoid is taken before the resizing."""

    def resized(inner: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
        found: Tensor = book.under(inner.o).resized(masks.sigmoid(), size)
        return found.logit()

    return replace(book, resized=resized)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="pad target masks with background, do not stretch them")
def target_masks_stretched(book: Textbook) -> Textbook:
    """Target masks of smaller images are stretched to the batch's size instead of padded."""

    def padded(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = (torch.arange(new) * old // new for new, old in zip(size, masks.shape[1:], strict=True))
        return masks[:, rows][:, :, columns].double()

    return replace(book, padded=padded)


@fault(
    loss_mask_is_the_focal_loss_averaged_over_pixels, fix="count padding as background, as the published criterion does"
)
def padding_left_out_of_the_mask_loss(book: Textbook) -> Textbook:
    """The mask loss is averaged over each image's own pixels, without the padding."""

    def padded(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
        whole = torch.full((len(masks), *size), -1.0, dtype=torch.float64)
        whole[:, : masks.shape[1], : masks.shape[2]] = masks
        return whole

    def loss(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        own = (wanted >= 0).double()
        terms = inner.mask_focal_term(pred, wanted.clamp(min=0)) * own
        return (terms.flatten(1).sum(1) / own.flatten(1).sum(1)).sum() / nb

    def dice(inner: Textbook, x: Tensor, m: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).dice(x, m.clamp(min=0))
        return found

    return replace(book, padded=padded, loss_mask=loss, dice=dice)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="index pred_masks with the matched queries")
def masks_of_the_first_queries(book: Textbook) -> Textbook:
    """Predicted masks are picked by the index of the target instead of the query's."""

    def matched_masks(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Any:
        first = [replace(m, query=m.target % layer.boxes.shape[1]) for m in matches]
        return book.under(inner.o).matched_masks(layer, targets, first)

    return replace(book, matched_masks=matched_masks)


@fault(loss_mask_is_the_focal_loss_averaged_over_pixels, fix="index target masks with the matched targets")
def target_masks_in_their_order(book: Textbook) -> Textbook:
    """Target masks are taken in their own order instead of the matching's."""

    def matched_masks(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Any:
        pred, _ = book.under(inner.o).matched_masks(layer, targets, matches)
        ordered = [replace(m, target=m.target.sort().values) for m in matches]
        _, wanted = book.under(inner.o).matched_masks(layer, targets, ordered)
        return pred, wanted

    return replace(book, matched_masks=matched_masks)


@fault(
    loss_mask_is_the_focal_loss_averaged_over_pixels,
    seen_in="PaddleSeg #3072",
    fix="name the axis that squeeze() may drop, or do without",
)
def a_single_mask_loses_its_axis(book: Textbook) -> Textbook:
    """squeeze() drops the axis of the pairs where there is one, and each row of pixels counts as a mask."""

    def rows(inner: Textbook, pred: Tensor, wanted: Tensor) -> Tensor:
        terms = inner.mask_focal_term(pred, wanted)
        return (terms[0] if len(pred) == 1 else terms.flatten(1)).mean(1).sum()

    return _each("loss_mask", rows)(book)


# --- dice ---


def _dice(ratio: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Textbook], Textbook]:
    """A book with the dice loss 1 − ``ratio`` of the logits and targets [M,H·W]."""

    def dice(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
        return 1 - ratio(x.flatten(1), m.flatten(1))

    return lambda book: replace(book, dice=dice)


@fault(loss_dice_is_the_smoothed_dice_loss_of_each_pair, fix="add 1 to numerator and denominator")
def dice_without_smoothing(book: Textbook) -> Textbook:
    """Nothing is added to the numerator and the denominator of the dice loss."""
    return _dice(lambda x, m: 2 * (x.sigmoid() * m).sum(1) / (x.sigmoid() + m).sum(1))(book)


@fault(
    loss_dice_is_the_smoothed_dice_loss_of_each_pair,
    seen_in="hepattn #44, in a matching cost",
    fix="take the sigmoid first",
)
def dice_on_logits(book: Textbook) -> Textbook:
    """The dice loss is computed on logits, without the sigmoid."""
    return _dice(lambda x, m: (2 * (x * m).sum(1) + 1) / ((x + m).sum(1) + 1))(book)


@fault(loss_dice_is_the_smoothed_dice_loss_of_each_pair, fix="double the intersection")
def dice_with_a_single_intersection(book: Textbook) -> Textbook:
    """The intersection is not doubled, so that a perfect mask keeps a loss of about a half."""
    return _dice(lambda x, m: ((x.sigmoid() * m).sum(1) + 1) / ((x.sigmoid() + m).sum(1) + 1))(book)


@fault(loss_dice_is_the_smoothed_dice_loss_of_each_pair, fix="sum probabilities, not their squares")
def dice_over_squares(book: Textbook) -> Textbook:
    """The denominator sums squared probabilities, as V-Net's dice loss does."""
    return _dice(lambda x, m: (2 * (x.sigmoid() * m).sum(1) + 1) / ((x.sigmoid() ** 2 + m).sum(1) + 1))(book)


@fault(loss_dice_is_the_smoothed_dice_loss_of_each_pair, fix="one ratio a pair, then the sum / nb")
def dice_averaged_over_masks(book: Textbook) -> Textbook:
    """The dice loss is the mean over pairs, and divided by nb besides."""
    return _each("loss_dice", lambda inner, pred, wanted: inner.dice(pred, wanted).sum() / max(len(pred), 1))(book)


@fault(loss_dice_is_the_smoothed_dice_loss_of_each_pair, fix="one ratio a pair")
def dice_of_all_masks_together(book: Textbook) -> Textbook:
    """The pixels of all pairs make a single dice loss."""
    return _each(
        "loss_dice",
        lambda inner, pred, wanted: inner.dice(pred.flatten()[None], wanted.flatten()[None]).sum(),
    )(book)


# --- gradient ---


@fault(masks_get_the_textbook_gradient, fix="do not detach the probability")
def mask_focusing_factor_detached(book: Textbook) -> Textbook:
    """No gradient passes through (1 − p_t)² of the pixels."""

    def term(book: Textbook, x: Tensor, m: Tensor) -> Tensor:
        z = torch.where(m > 0, x, -x)
        return (0.25 * m + 0.75 * (1 - m)) * (-z).sigmoid().detach() ** 2 * minus_log_sigmoid(z)

    return replace(book, mask_focal_term=term)


@fault(masks_get_the_textbook_gradient, fix="keep the denominator in the graph")
def dice_denominator_detached(book: Textbook) -> Textbook:
    """No gradient passes through the denominator of the dice loss."""
    return _dice(lambda x, m: (2 * (x.sigmoid() * m).sum(1) + 1) / ((x.sigmoid() + m).sum(1) + 1).detach())(book)


MASK_2 = clause(
    "MASK-2",
    "must",
    MASKED,
    "Without targets the mask losses are scalar zeros in the graph; bool and uint8 masks, and masks decoded from COCO "
    "run-length encoding, give the same loss.",
    ["facebookresearch/detr datasets/coco.py, convert_coco_poly_to_mask"],
)


@check(MASK_2, on=UNMASKED, component="masks", takes_raising=True)
def mask_losses_without_targets_are_zero_in_the_graph(seen: Seen) -> Iterator[Comparison]:
    for term in ("mask", "dice"):
        key = f"loss_{term}"
        strange = seen.got.odd.get(key, "no such loss" if key not in seen.got.keys else "")
        yield holds(not strange, f"{key} without targets", "a real scalar tensor", strange or "that")
        if strange:
            continue
        yield agree(key, 0.0, seen.got.losses.get(key), 0.0, "no target")
        attached = key in seen.got.attached
        yield holds(attached, f"{key} in the graph", "part of it", "part of it" if attached else "a constant")
        grad = seen.got.grads[term, "final"][2]
        if attached:
            yield holds(grad is not None, f"gradient of {key} at pred_masks", "a tensor of zeros", "none")
        if grad is not None:
            yield agree(f"largest gradient of {key} at pred_masks", 0.0, float(grad.abs().max().nan_to_num(1.0)), 0.0)


def _without_targets(change: Callable[[Textbook, Tensor, Tensor], Tensor]) -> Callable[[Textbook], Textbook]:
    """A book whose mask losses without pairs are ``change`` of the predicted masks and their targets."""

    def loss(book: Textbook, name: str) -> Callable[..., Tensor]:
        def of(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
            found: Tensor = getattr(book.under(inner.o), name)(pred, wanted, nb)
            return found if len(pred) else change(inner, pred, wanted)

        return of

    return lambda book: replace(book, loss_mask=loss(book, "loss_mask"), loss_dice=loss(book, "loss_dice"))


@fault(
    mask_losses_without_targets_are_zero_in_the_graph,
    seen_in="transformers 5.23.0 RfDetrImageLoss.loss_masks",
    fix="return the sum of the empty selection",
)
def mask_losses_of_shape_zero(book: Textbook) -> Textbook:
    """Without targets the mask losses are the empty selection itself, of the shape [0,H,W]."""
    return _without_targets(lambda inner, pred, wanted: pred)(book)


@fault(mask_losses_without_targets_are_zero_in_the_graph, fix="return the sum of the empty selection")
def constant_mask_losses_without_targets(book: Textbook) -> Textbook:
    """Without targets the mask losses are constants outside the graph."""
    return _without_targets(lambda inner, pred, wanted: torch.zeros((), dtype=torch.float64))(book)


@fault(mask_losses_without_targets_are_zero_in_the_graph, fix="sum over pairs before dividing")
def mean_of_no_masks(book: Textbook) -> Textbook:
    """Without targets the mask losses are means of nothing, and not a number."""
    return _without_targets(lambda inner, pred, wanted: pred.mean())(book)


@check(MASK_2, on=CODED_MASKS, component="masks", takes_raising=True)
def masks_of_every_form_give_the_same_loss(seen: Seen) -> Iterator[Comparison]:
    for name, twin in seen.twins.items():
        for term in ("mask", "dice"):
            key = f"loss_{term}"
            if key in seen.got.losses:
                how = "the loss of the same masks as bool"
                yield agree(
                    f"{key} of masks {name}",
                    seen.got.losses[key],
                    twin.got.losses.get(key),
                    2 * allowed_of(seen, term),
                    how,
                )


def _reading(read: Callable[[Tensor], Tensor]) -> Callable[[Textbook], Textbook]:
    """A book that reads target masks [n,H_b,W_b] through ``read``."""

    def losses(book: Textbook) -> Callable[..., Any]:
        def of(inner: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]], *rest: Any) -> Any:
            read_so = [{**t, "masks": read(t["masks"])} if "masks" in t else t for t in targets]
            return book.under(inner.o).mask_losses(layer, read_so, *rest)

        return of

    return lambda book: replace(book, mask_losses=losses(book))


@fault(masks_of_every_form_give_the_same_loss, fix="take masks as 0 and 1, whatever their dtype")
def uint8_masks_read_as_pictures(book: Textbook) -> Textbook:
    """uint8 masks are taken for pictures of 0 to 255 and divided by 255."""
    return _reading(lambda masks: masks / 255 if masks.dtype == torch.uint8 else masks)(book)


@fault(
    masks_of_every_form_give_the_same_loss,
    seen_in="rf-detr #739 is a like case, of bool masks",
    fix="convert masks to the dtype of the logits first",
)
def background_of_uint8_masks_wraps(book: Textbook) -> Textbook:
    """The masks are inverted twice with ~, which for uint8 is 255 − m, and then compared with 0."""
    return _reading(lambda masks: ~masks > 0 if masks.dtype == torch.uint8 else masks)(book)


@fault(masks_of_every_form_give_the_same_loss, fix="heed strides: no view of the memory as it lies")
def decoded_masks_read_as_they_lie_in_memory(book: Textbook) -> Textbook:
    """Masks that lie in memory column after column, as pycocotools returns them, are read row after row."""

    def rows(masks: Tensor) -> Tensor:
        return masks if masks.is_contiguous() else masks.transpose(1, 2).reshape(masks.shape)

    return _reading(rows)(book)
