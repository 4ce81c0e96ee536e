"""Known mistakes of denoising queries and masks, beside those in the chapters DN and MASK."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.denoising import (
    denoising_queries_do_not_change_the_plain_losses,
    every_denoising_layer_gets_every_loss,
    negatives_and_padding_are_background,
    positives_reconstruct_the_boxes_of_their_targets,
)
from detr_conformance.contract.masks import (
    loss_dice_is_the_smoothed_dice_loss_of_each_pair,
    loss_mask_is_the_focal_loss_averaged_over_pixels,
)
from detr_conformance.registry import known
from detr_reference.textbook import Layer, Pairs, Textbook, textbook

# --- which denoising layers, under which names ---


def _layers(change: Callable[[list[Layer]], list[Layer]]) -> dict[str, Any]:
    return {"denoising_layers": lambda before, book, outputs: change(before(outputs))}


def _aux(layers: Sequence[Layer]) -> list[Layer]:
    return [x for x in layers if x.name != "dn"]


def _renamed(name: Callable[[int], str]) -> dict[str, Any]:
    return _layers(lambda x: x[:1] + [replace(y, suffix=name(i)) for i, y in enumerate(x[1:])])


for id, sentence, around in (
    ("last-auxiliary-denoising-layer-left-out", "The denoising queries of the last auxiliary layer have no losses.",
     _layers(lambda x: x[:1] + x[1:-1])),
    ("first-auxiliary-denoising-layer-left-out", "The denoising queries of the first auxiliary layer have no losses.",
     _layers(lambda x: x[:1] + x[2:])),
    ("a-single-auxiliary-denoising-layer-is-left-out",
     "The denoising queries of a single auxiliary layer have no losses; of several they have.",
     _layers(lambda x: x if len(x) > 2 else x[:1])),
    ("final-denoising-layer-left-out", "The denoising queries of the final layer have no losses.",
     _layers(_aux)),
    ("auxiliary-denoising-layers-count-from-one", "Suffixes of auxiliary denoising layers count from 1.",
     _renamed(lambda i: f"_dn_{i + 1}")),
    ("auxiliary-denoising-losses-overwrite-the-plain-ones", "Auxiliary denoising losses end in _{i}, as plain ones do.",
     _renamed(lambda i: f"_{i}")),
    ("all-denoising-losses-under-one-suffix", "Auxiliary denoising losses end in _dn, and overwrite the final ones.",
     _renamed(lambda i: "_dn")),
    ("auxiliary-denoising-suffixes-turned-round", "Auxiliary denoising losses end in _{i}_dn.",
     _renamed(lambda i: f"_{i}_dn")),
):  # fmt: skip
    known(every_denoising_layer_gets_every_loss, id, sentence, fix="every layer under _dn and _dn_{i}", around=around)


def _no(*names: str) -> dict[str, Any]:
    def layer_losses(before: Callable[..., Any], book: Textbook, layer: Layer, *rest: Any) -> Any:
        found = before(layer, *rest)
        return {k: v for k, v in found.items() if not (layer.groups and k.startswith(names))}

    return {"layer_losses": layer_losses}


for id, sentence, names in (
    ("denoising-without-a-class-loss", "Denoising queries have no class loss.", ("loss_ce",)),
    ("denoising-without-l1", "Denoising queries have no loss_bbox.", ("loss_bbox",)),
    ("denoising-without-giou", "Denoising queries have no loss_giou.", ("loss_giou",)),
    ("denoising-without-box-losses", "Denoising queries have no box losses.", ("loss_bbox", "loss_giou")),
):
    known(every_denoising_layer_gets_every_loss, id, sentence, fix="every loss of every layer", around=_no(*names))

# --- which predictions ---


def _of(source: Callable[[list[Layer]], list[Layer]], *keys: str) -> dict[str, Any]:
    """Auxiliary denoising layers with predictions of other ones."""
    return _layers(
        lambda x: (
            x[:1]
            + [
                replace(a, **{k: getattr(b, k) for k in keys})
                for a, b in zip(x[1:], source(x) if x[1:] else [], strict=True)
            ]
        )
    )


for id, sentence, source in (
    ("of-the-final-layer", "are those of the final layer", lambda x: [x[0]] * len(_aux(x))),
    ("of-the-first-layer", "are those of the first layer", lambda x: [x[1]] * len(_aux(x))),
    ("of-the-last-auxiliary-layer", "are those of the last auxiliary layer", lambda x: [x[-1]] * len(_aux(x))),
    ("one-late", "stand one layer too far, the final ones first", lambda x: x[:-1]),
    ("reversed", "come in reverse order", lambda x: x[:0:-1]),
):
    for name, keys, check in (
        ("predictions", ("logits", "boxes"), positives_reconstruct_the_boxes_of_their_targets),
        ("boxes", ("boxes",), positives_reconstruct_the_boxes_of_their_targets),
        ("logits", ("logits",), negatives_and_padding_are_background),
    ):
        known(
            check, f"auxiliary-denoising-{name}-{id}", f"The {name} of auxiliary denoising layers {sentence}.",
            fix="hand every layer its own predictions", around=_of(source, *keys),
        )  # fmt: skip

# --- which slots ---


def _slots(change: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    """Other positive slots [G,n], from the right ones and half a group."""
    return {
        "positive_slots": lambda before, book, layer, n: change(before(layer, n), book.group_slots(layer) // 2)
    }  # fmt: skip


def _pairs(target: Callable[[int, int], Tensor]) -> dict[str, Any]:
    """Other targets for the positives, from the number of targets and of groups."""

    def denoising_pairs(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
        images = zip(before(layer, targets), targets, strict=True)
        return [Pairs(m.query, target(len(t["boxes"]), layer.groups)) for m, t in images]

    return {"denoising_pairs": denoising_pairs}


def _unpadded(before: Callable[..., Tensor], book: Textbook, layer: Layer, n: int) -> Tensor:
    return torch.arange(layer.groups)[:, None] * 2 * n + torch.arange(n)


def _negatives_boxes(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any, matches: Any) -> Any:
    """The pairs of the box losses, of denoising layers with the second half of every group."""
    half = book.group_slots(layer) // 2 if layer.groups else 0
    twice = [Pairs(torch.cat([m.query, m.query + half]), torch.cat([m.target] * 2)) for m in matches]
    return before(layer, targets, twice if half else matches)


for id, sentence, around in (
    ("negatives-reconstruct-boxes", "Negatives reconstruct the box of their target, and are background.",
     {"matched_boxes": _negatives_boxes}),
    ("positives-and-negatives-exchanged", "The second half of a group reconstructs, and the first is background.",
     _slots(lambda s, half: s + half)),
    ("last-group-left-out", "The last group's positives have no target; there may be no other group.",
     _slots(lambda s, half: s[:-1])),
    ("first-group-left-out", "The first group's positives have no target; there may be no other group.",
     _slots(lambda s, half: s[1:])),
    ("denoising-slots-one-place-on", "Positives are looked for one slot too far.",
     _slots(lambda s, half: (s + 1).clamp(max=max(int(s.max()), 1) if s.numel() else 0))),
    ("groups-as-long-as-the-images-own-targets",
     "Groups begin where those of an image's own targets would, without padding.", {"positive_slots": _unpadded}),
    ("denoising-targets-repeated-one-by-one", "Targets are repeated element by element instead of group by group.",
     _pairs(lambda n, groups: torch.arange(n).repeat_interleave(groups))),
    ("denoising-targets-in-reverse", "The targets of every group come in reverse order.",
     _pairs(lambda n, groups: torch.arange(n).flip(0).repeat(groups))),
    ("first-target-for-all-positives", "All positives of an image reconstruct its first target.",
     _pairs(lambda n, groups: torch.zeros(n * groups, dtype=torch.int64))),
    ("denoising-targets-one-on-from-group-to-group", "Every group begins with the next target.",
     _pairs(lambda n, groups: (torch.arange(n) + torch.arange(groups)[:, None]).flatten() % max(n, 1))),
):  # fmt: skip
    known(
        positives_reconstruct_the_boxes_of_their_targets, id, sentence,
        fix="slot i of a group's first half reconstructs target i", around=around,
    )  # fmt: skip


def _classes(keep: Callable[[Tensor, int, int], Tensor]) -> dict[str, Any]:
    """The class loss of some slots alone: from each slot's place in its group, half a group, and the targets."""

    def loss_ce(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Tensor, mask: Any) -> Tensor:
        if not layer.groups:
            found: Tensor = before(layer, targets, matches, nb, mask)
            return found
        size, total = book.group_slots(layer), layer.logits.sum() * 0
        place = torch.arange(layer.logits.shape[1]) % max(size, 1)
        for x, t, m in zip(layer.logits, targets, matches, strict=True):
            inside = torch.ones_like(x, dtype=torch.bool) & keep(place, size // 2, len(t["boxes"]))[:, None]
            total = total + book.focal_image(x, book.focal_class_target(x, t, m), inside)
        return total / book.class_divisor(nb, matches)

    return {"loss_ce": loss_ce}


for id, sentence, keep in (
    ("padding-slots-without-a-class-loss", "Padding slots have no part in the class loss.",
     lambda at, half, n: at % max(half, 1) < n),
    ("negatives-without-a-class-loss", "Negatives have no part in the class loss, padding slots do.",
     lambda at, half, n: (at < half) | (at - half >= n)),
    ("second-halves-without-a-class-loss", "The second half of every group has no part in the class loss.",
     lambda at, half, n: at < half),
    ("positives-without-a-class-loss", "Positives have no part in the class loss.",
     lambda at, half, n: at >= n),
):  # fmt: skip
    known(
        negatives_and_padding_are_background, id, sentence,
        fix="train all slots; those without a target are negatives in every channel", around=_classes(keep),
    )  # fmt: skip


def _rows(change: Callable[[Any, Layer, Any, Any], Tensor]) -> dict[str, Any]:
    """Other class targets of denoising queries."""

    def loss_ce(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, *rest: Any) -> Tensor:
        if layer.groups:
            targets, matches = change(book, layer, targets, matches)
        found: Tensor = before(layer, targets, matches, *rest)
        return found

    return {"loss_ce": loss_ce}


def _negatives_too(book: Any, layer: Layer, targets: Any, matches: Any) -> Any:
    half = book.group_slots(layer) // 2
    return targets, [Pairs(torch.cat([m.query, m.query + half]), m.target.repeat(2)) for m in matches]


for id, sentence, change in (
    ("negatives-have-their-class", "Negatives aim at the class of their target, and reconstruct no box.",
     _negatives_too),
    ("denoising-aims-at-class-zero", "Positives aim at class 0, whatever their target's.",
     lambda book, layer, t, m: ([{**x, "labels": x["labels"] * 0} for x in t], m)),
    ("denoising-classes-repeated-one-by-one", "Classes are repeated element by element, boxes group by group.",
     lambda book, layer, t, m: (t, [Pairs(x.query, x.target.sort().values) for x in m])),
    ("denoising-without-positives", "All denoising queries are background in the class loss.",
     lambda book, layer, t, m: (t, [Pairs(x.query[:0], x.target[:0]) for x in m])),
):  # fmt: skip
    known(
        negatives_and_padding_are_background, id, sentence, fix="positives aim at their target's class",
        around=_rows(change),
    )  # fmt: skip

# --- what they are divided by ---


def _scaled(names: tuple[str, ...], factor: Callable[[Any, Layer], float], denoising: bool) -> dict[str, Any]:
    """Losses of denoising queries, or beside them of layers by name, multiplied."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result, known_layers = before(outputs, targets, given), book.denoising_layers(outputs)
        if not known_layers:
            return result
        every = known_layers if denoising else book.layers(outputs)
        by = {f"{n}{x.suffix}": factor(book.layers(outputs)[0] if denoising else known_layers[0], x)
              for x in every for n in names}  # fmt: skip
        return replace(result, losses={k: v * by.get(k, 1) for k, v in result.losses.items()})

    return {"losses": losses}


_ALL = ("loss_ce", "loss_bbox", "loss_giou")


def _shared(*layers: str) -> Callable[[Any, Layer], float]:
    return lambda dn, x: 1 / dn.groups if x.name.startswith(layers) else 1


for id, sentence, around in (
    ("encoder-losses-divided-by-the-groups", "nb is multiplied by the number of groups for the encoder's losses, too.",
     _scaled(_ALL, _shared("enc"), False)),
    ("auxiliary-losses-divided-by-the-groups", "nb is multiplied by the number of groups for auxiliary losses, too.",
     _scaled(_ALL, _shared("aux"), False)),
    ("further-losses-divided-by-the-groups",
     "nb is multiplied by the number of groups for auxiliary and encoder losses, too.",
     _scaled(_ALL, _shared("aux", "enc"), False)),
    ("final-losses-divided-by-the-groups", "nb is multiplied by the number of groups for the final losses, too.",
     _scaled(_ALL, _shared("final"), False)),
    ("class-losses-divided-by-the-groups", "nb is multiplied by the number of groups for all class losses.",
     _scaled(("loss_ce",), _shared(""), False)),
    ("box-losses-divided-by-the-groups", "nb is multiplied by the number of groups for all box losses.",
     _scaled(("loss_bbox", "loss_giou"), _shared(""), False)),
):  # fmt: skip
    known(
        denoising_queries_do_not_change_the_plain_losses, id, sentence,
        fix="give the denoising losses a divisor of their own", around=around,
    )  # fmt: skip


def _divisor(of: Callable[[Layer, Tensor], Any]) -> dict[str, Any]:
    return {"denoising_divisor": lambda before, book, layer, nb: of(layer, nb)}


_POSITIVES, _CLASSES = positives_reconstruct_the_boxes_of_their_targets, negatives_and_padding_are_background

for check, id, sentence, around in (
    (_POSITIVES, "denoising-divided-by-one-group-more", "Denoising losses are divided by nb · (groups + 1).",
     _divisor(lambda x, nb: nb * (x.groups + 1))),
    (_POSITIVES, "denoising-divided-by-one-group-less",
     "Denoising losses are divided by nb · (groups − 1), by nb of a single one.",
     _divisor(lambda x, nb: nb * max(x.groups - 1, 1))),
    (_POSITIVES, "denoising-divided-by-positives-and-negatives", "Denoising losses are divided by 2 · nb · groups.",
     _divisor(lambda x, nb: nb * 2 * x.groups)),
    (_POSITIVES, "denoising-divided-by-the-slots", "Denoising losses are divided by the number of slots of the batch.",
     _divisor(lambda x, nb: nb * 0 + x.boxes.shape[0] * x.boxes.shape[1])),
    (_POSITIVES, "denoising-divided-by-the-length-of-a-group",
     "Denoising losses are divided by nb · (slots of a group).",
     _divisor(lambda x, nb: nb * max(x.boxes.shape[1] // max(x.groups, 1), 1))),
    (_POSITIVES, "denoising-divided-by-half-a-group",
     "Denoising losses are divided by nb · (targets of the fullest image).",
     _divisor(lambda x, nb: nb * max(x.boxes.shape[1] // max(2 * x.groups, 1), 1))),
    (_POSITIVES, "denoising-divided-by-nb-and-slots", "Denoising losses are divided by nb · (slots of an image).",
     _divisor(lambda x, nb: nb * x.boxes.shape[1])),
    (_POSITIVES, "denoising-divided-by-all-positive-slots",
     "Denoising losses are divided by the positive slots of the batch, those of padding too.",
     _divisor(lambda x, nb: nb * 0 + max(x.boxes.shape[0] * x.boxes.shape[1] / 2, 1))),
    (_POSITIVES, "denoising-divided-by-groups-squared", "Denoising losses are divided by nb · groups².",
     _divisor(lambda x, nb: nb * x.groups**2)),
    (_POSITIVES, "denoising-divided-by-the-groups-alone", "Denoising losses are divided by the number of groups.",
     _divisor(lambda x, nb: nb * 0 + x.groups)),
    (_POSITIVES, "denoising-never-divided", "Denoising losses are divided by nothing.",
     _divisor(lambda x, nb: nb * 0 + 1)),
    (_CLASSES, "denoising-class-loss-averaged-over-slots", "The class loss of denoising queries is a mean over slots.",
     _scaled(("loss_ce",), lambda final, x: 1 / x.logits.shape[1], True)),
    (_CLASSES, "denoising-class-loss-times-the-plain-queries",
     "The class loss of denoising queries is a mean over slots, multiplied by the number of plain queries.",
     _scaled(("loss_ce",), lambda final, x: final.logits.shape[1] / x.logits.shape[1], True)),
    (_CLASSES, "denoising-class-loss-divided-by-nb-alone",
     "The class loss of denoising queries is divided by nb, their box losses by nb · groups.",
     _scaled(("loss_ce",), lambda final, x: x.groups, True)),
    (_POSITIVES, "denoising-box-losses-divided-by-nb-alone",
     "The box losses of denoising queries are divided by nb, their class loss by nb · groups.",
     _scaled(("loss_bbox", "loss_giou"), lambda final, x: x.groups, True)),
):  # fmt: skip
    known(check, id, sentence, fix="divide by nb · groups", around=around)

# --- masks ---


def _own_size(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs], nb: Tensor) -> Any:
    """Mask losses at each image's own size, nothing padded."""
    found = before(layer, targets, matches, nb)
    if layer.masks is None or not any(map(len, matches)):
        return found
    totals: dict[str, list[Tensor]] = {k: [] for k in found}
    for x, t, m in zip(layer.masks, targets, matches, strict=True):
        if len(m):
            pred, wanted = book.resized(x[m.query], t["masks"].shape[1:]), t["masks"][m.target].double()
            totals[f"loss_mask{layer.suffix}"].append(book.loss_mask(pred, wanted, nb))
            totals[f"loss_dice{layer.suffix}"].append(book.loss_dice(pred, wanted, nb))
    return {k: torch.stack(v).sum() for k, v in totals.items()}


def _at_predicted_size(before: Any, book: Textbook, layer: Layer, *rest: Any) -> Any:
    """Target masks brought to the size of the predicted ones, by the nearest pixel."""
    h, w = layer.masks.shape[2:]  # type: ignore[union-attr]
    _, wanted = before(layer, *rest)
    plain = replace(book, resized=lambda _book, masks, size: masks, matched_masks=textbook.matched_masks)
    pred, _ = plain.matched_masks(layer, *rest)
    rows, columns = (torch.arange(n) * old // n for n, old in zip((h, w), wanted.shape[1:], strict=True))
    return pred, wanted[:, rows][:, :, columns]


def _placed(at: Callable[[int, int], int], value: float = 0.0) -> Callable[..., Tensor]:
    """Target masks padded with another value, or elsewhere: from the padding of a side, where the mask begins."""

    def padded(book: Textbook, masks: Tensor, size: tuple[int, int]) -> Tensor:
        whole = torch.full((len(masks), *size), value, dtype=torch.float64)
        top, left = (at(new, old) for new, old in zip(size, masks.shape[1:], strict=True))
        whole[:, top : top + masks.shape[1], left : left + masks.shape[2]] = masks
        return whole

    return padded


def _square(before: Callable[..., tuple[int, int]], book: Textbook, targets: Any) -> tuple[int, int]:
    side = max(before(targets))
    return side, side


def _turned(turn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def matched_masks(before: Any, book: Textbook, layer: Layer, *rest: Any) -> Any:
        assert layer.masks is not None
        return before(replace(layer, masks=turn(layer.masks)), *rest)

    return {"matched_masks": matched_masks}


def _dice_of_images(
    before: Callable[..., dict[str, Tensor]], book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Tensor
) -> dict[str, Tensor]:
    """The masks of each image make a single dice loss."""
    found = before(layer, targets, matches, nb)
    if layer.masks is None:
        return found
    sizes = [len(m) for m in matches]
    pred, wanted = book.matched_masks(layer, targets, matches)
    images = zip(pred.split(sizes), wanted.split(sizes), strict=True)
    dice = [book.dice(x.flatten()[None, None], m.flatten()[None, None]).sum() for x, m in images if len(x)]
    return {**found, f"loss_dice{layer.suffix}": torch.stack([pred.sum() * 0, *dice]).sum() / nb}


for id, sentence, formulas in (
    ("dice-of-all-masks-of-an-image", "The pixels of all pairs of an image make a single dice loss.",
     {"around": {"mask_losses": _dice_of_images}}),
    ("masks-resized-to-their-own-images-size", "Predicted masks are resized to their own image's size, nothing padded.",
     {"around": {"mask_losses": _own_size}}),
    ("target-masks-resized-to-the-predicted-ones", "Target masks are resized to the size of the predicted ones.",
     {"around": {"matched_masks": _at_predicted_size}}),
    ("target-masks-padded-around", "Target masks are padded on all sides: they stand in the middle.",
     {"padded": _placed(lambda new, old: (new - old) // 2)}),
    ("target-masks-padded-before", "Target masks are padded above and to the left.",
     {"padded": _placed(lambda new, old: new - old)}),
    ("target-masks-padded-with-ones", "Target masks are padded with ones: padding counts as object.",
     {"padded": _placed(lambda new, old: 0, 1.0)}),
    ("masks-padded-to-a-square", "Masks are padded to a square of the largest side.",
     {"around": {"mask_size": _square}}),
    ("masks-of-the-first-image", "Predicted masks are picked from the first image, for all.",
     {"around": _turned(lambda x: x[:1].expand_as(x))}),
    ("masks-of-the-next-image", "Predicted masks are picked from the next image.",
     {"around": _turned(lambda x: x.roll(-1, 0))}),
    ("masks-of-the-previous-image", "Predicted masks are picked from the image before.",
     {"around": _turned(lambda x: x.roll(1, 0))}),
    ("masks-upside-down", "Predicted masks are upside down.", {"around": _turned(lambda x: x.flip(2))}),
    ("target-masks-inverted", "Target masks are inverted: the background is the object.",
     {"around": {"matched_masks": lambda before, book, *a: (lambda x, m: (x, 1 - m))(*before(*a))}}),
    ("mask-logits-of-probabilities", "The sigmoid is applied twice: probabilities are taken for mask logits.",
     {"around": {"matched_masks": lambda before, book, *a: (lambda x, m: (x.sigmoid(), m))(*before(*a))}}),
    ("mask-losses-never-divided", "The mask losses are sums over the pairs, divided by nothing.",
     {"around": {"mask_losses": lambda before, book, layer, t, m, nb: before(layer, t, m, torch.ones_like(nb))}}),
):  # fmt: skip
    known(
        loss_dice_is_the_smoothed_dice_loss_of_each_pair if id.startswith("dice")
        else loss_mask_is_the_focal_loss_averaged_over_pixels, id, sentence,
        fix="resize the matched queries' logits to the size that target masks are padded to", **formulas,
    )  # fmt: skip
