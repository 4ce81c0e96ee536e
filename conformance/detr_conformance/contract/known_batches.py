"""Known mistakes of which image and which target: what is mixed up in a batch, and what is dropped from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.classification import (
    an_image_without_targets_is_background,
    every_query_and_channel_is_trained,
    loss_ce_is_the_weighted_mean_of_all_queries,
)
from detr_conformance.contract.matching import (
    every_image_has_an_assignment_of_its_own,
    no_query_and_no_target_is_matched_twice,
    order_does_not_matter,
)
from detr_conformance.contract.normalisation import class_losses_of_a_batch_add_up, loss_bbox_is_the_sum_of_l1_over_nb
from detr_conformance.contract.numbers import loss_giou_is_precise
from detr_conformance.contract.tokens import every_image_uses_its_own_prompt
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, Check, known
from detr_reference.textbook import Layer, Pairs, Textbook

Target = Mapping[str, Tensor]
Source = Callable[[Sequence[Target], int], Sequence[Target]]  # the images that an image's entries come from, in order

LABELS, BOXES = ("labels", "token_labels"), ("boxes",)
BY_LOSS: tuple[tuple[Check, str, frozenset[str]], ...] = (
    (loss_ce_is_the_weighted_mean_of_all_queries, "", DETR),
    (every_query_and_channel_is_trained, "-of-the-focal-loss", FOCAL),
    (every_image_uses_its_own_prompt, "-of-the-prompt", TEXT),
)


def _from(source: Source, targets: Sequence[Target], keys: Sequence[str]) -> list[Target]:
    """Targets whose entries are the first of other images', and their own where those end."""
    found: list[Target] = []
    for b, own in enumerate(targets):
        every = [*source(targets, b), own]
        rows = {k: torch.cat([t[k] for t in every])[: len(own[k])] for k in keys if k in own}
        found.append({**own, **rows})
    return found


def _boxes(source: Source) -> dict[str, Any]:
    def matched_boxes(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Any:
        return before(layer, _from(source, targets, BOXES), *rest)

    return {"matched_boxes": matched_boxes}


def _labels(source: Source) -> dict[str, Any]:
    def loss_ce(before: Callable[..., Tensor], book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Tensor:
        return before(layer, _from(source, targets, LABELS), *rest)

    return {"loss_ce": loss_ce}


# --- targets of other images ---

SOURCES: tuple[tuple[str, str, Source], ...] = (
    ("of-the-batchs-first-targets", "are looked up in the whole batch without the image's offset", lambda t, b: t),
    ("of-the-next-image", "come from the next image", lambda t, b: [t[(b + 1) % len(t)]]),
    ("of-the-previous-image", "come from the image before", lambda t, b: [t[b - 1]]),
    ("of-the-first-image", "come from the first image", lambda t, b: t[:1]),
    ("of-the-last-image", "come from the last image", lambda t, b: t[-1:]),
)

for id, sentence, source in SOURCES:
    known(
        loss_bbox_is_the_sum_of_l1_over_nb, f"boxes-{id}", f"The boxes of targets {sentence}, in the losses alone.",
        fix="index every image's own targets", around=_boxes(source),
    )  # fmt: skip
    if id != "of-the-batchs-first-targets":
        known(
            loss_bbox_is_the_sum_of_l1_over_nb, f"boxes-and-classes-{id}",
            f"Boxes and classes of targets {sentence}, in the losses alone.", fix="index every image's own targets",
            around=_boxes(source) | _labels(source),
        )  # fmt: skip
    for check, suffix, profiles in BY_LOSS:
        if id != "of-the-next-image":  # which is among the labels and the tokens
            known(
                check, f"classes-{id}{suffix}", f"The classes of targets {sentence}, in the loss alone.",
                fix="index every image's own targets", profiles=profiles, around=_labels(source),
            )  # fmt: skip

# --- predictions, or whole rows of class targets, of other images ---


def _rows(turn: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
    """Class targets, matching and all, of other images."""

    def loss_ce(
        before: Callable[..., Tensor], book: Textbook, layer: Layer, targets: Any, matches: Any, *rest: Any
    ) -> Tensor:
        return before(layer, turn(list(targets)), turn(list(matches)), *rest)

    return {"loss_ce": loss_ce}


def _logits(turn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"loss_ce": lambda before, book, layer, *a: before(replace(layer, logits=turn(layer.logits)), *a)}


for id, sentence, around in (
    ("class-targets-of-the-next-image", "The class targets of all queries are those of the next image.",
     _rows(lambda x: x[1:] + x[:1])),
    ("class-targets-of-the-previous-image", "The class targets of all queries are those of the image before.",
     _rows(lambda x: x[-1:] + x[:-1])),
    ("class-targets-of-the-first-image", "The class targets of the first image serve all.",
     _rows(lambda x: x[:1] * len(x))),
    ("class-targets-of-the-last-image", "The class targets of the last image serve all.",
     _rows(lambda x: x[-1:] * len(x))),
    ("class-targets-in-reverse", "The class targets of the images come in reverse order.", _rows(lambda x: x[::-1])),
    ("class-loss-on-the-first-images-logits", "The logits of the first image serve all in the class loss.",
     _logits(lambda x: x[:1].expand_as(x))),
    ("class-loss-on-the-last-images-logits", "The logits of the last image serve all in the class loss.",
     _logits(lambda x: x[-1:].expand_as(x))),
):  # fmt: skip
    for check, suffix, profiles in BY_LOSS:
        known(
            check, id + suffix, sentence, fix="keep each image's class targets beside its logits", profiles=profiles,
            around=around,
        )  # fmt: skip


def _predicted(turn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"matched_boxes": lambda before, book, layer, *a: before(replace(layer, boxes=turn(layer.boxes)), *a)}


for id, sentence, around in (
    ("predicted-boxes-of-the-first-image", "Predicted boxes are picked from the first image, for all.",
     _predicted(lambda x: x[:1].expand_as(x))),
    ("predicted-boxes-of-the-last-image", "Predicted boxes are picked from the last image, for all.",
     _predicted(lambda x: x[-1:].expand_as(x))),
    ("predicted-boxes-of-the-next-image", "Predicted boxes are picked from the next image.",
     _predicted(lambda x: x.roll(-1, 0))),
    ("predicted-boxes-of-the-previous-image", "Predicted boxes are picked from the image before.",
     _predicted(lambda x: x.roll(1, 0))),
):  # fmt: skip
    known(
        loss_bbox_is_the_sum_of_l1_over_nb, id, sentence, fix="index predictions by image and query", around=around
    )  # fmt: skip


def _compact(matches: Sequence[Pairs]) -> list[int]:
    """For each image the one that its predictions are taken from: a number too low by the empty images before it."""
    full = [len(m) > 0 for m in matches]
    return [sum(full[:b]) for b in range(len(full))]


def _compact_boxes(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any, matches: Any) -> Any:
    return before(replace(layer, boxes=layer.boxes[_compact(matches)]), targets, matches)


def _compact_classes(
    before: Callable[..., Tensor], book: Textbook, layer: Layer, targets: Any, matches: Any, *rest: Any
) -> Tensor:
    moved = {i: b for b, i in enumerate(_compact(matches)) if len(matches[b])}
    rows = [{**t, **{k: targets[moved[i]][k] for k in LABELS if k in t}} if i in moved else t
            for i, t in enumerate(targets)]  # fmt: skip
    none = torch.zeros(0, dtype=torch.int64)
    return before(
        layer, rows, [matches[moved[i]] if i in moved else Pairs(none, none) for i in range(len(rows))], *rest
    )


for id, sentence, around in (
    ("images-without-targets-shift-the-batch", "Predictions are indexed by a count of the images that have targets: "
     "after an empty image they are those of an earlier one.",
     {"matched_boxes": _compact_boxes, "loss_ce": _compact_classes}),
    ("images-without-targets-shift-the-boxes", "Predicted boxes are indexed by a count of the images that have "
     "targets: after an empty image they are those of an earlier one.", {"matched_boxes": _compact_boxes}),
):  # fmt: skip
    known(order_does_not_matter, id, sentence, fix="index predictions by image and query", around=around)

for check, suffix, profiles in (
    (an_image_without_targets_is_background, "", DETR),
    (class_losses_of_a_batch_add_up, "-of-the-focal-loss", FOCAL),
    (every_image_uses_its_own_prompt, "-of-the-prompt", TEXT),
):
    known(
        check, f"images-without-targets-shift-the-classes{suffix}",
        "Class targets are placed by a count of the images that have targets: after an empty image they are those of "
        "a later one.", fix="index predictions by image and query", profiles=profiles,
        around={"loss_ce": _compact_classes},
    )  # fmt: skip

# --- targets that are dropped ---


def _dropped(keep: Callable[[Target], Tensor], counted: bool) -> dict[str, Any]:
    """Targets that are never matched, and counted in nb or not."""

    def match(before: Callable[..., list[Pairs]], book: Textbook, layer: Layer, targets: Any) -> list[Pairs]:
        kept = [keep(t).nonzero()[:, 0] for t in targets]
        fewer = [
            {k: v[i] if k in (*LABELS, *BOXES) else v for k, v in t.items()}
            for t, i in zip(targets, kept, strict=True)
        ]  # fmt: skip
        return [Pairs(m.query, i[m.target]) for m, i in zip(before(layer, fewer), kept, strict=True)]

    def num_boxes(before: Callable[..., Tensor], book: Textbook, targets: Any) -> Tensor:
        return before([{**t, "boxes": t["boxes"][keep(t)]} for t in targets])

    return {"match": match} if counted else {"match": match, "num_boxes": num_boxes}


def _first_of_each(rows: Tensor) -> Tensor:
    """[n]: True where no earlier row is the same."""
    same = (rows[:, None] == rows[None]).flatten(2).all(-1) if rows.ndim > 1 else rows[:, None] == rows[None]
    return ~same.tril(-1).any(1)


def _inside(target: Target) -> Tensor:
    low, high = (target["boxes"][:, :2] + s * target["boxes"][:, 2:] / 2 for s in (-1, 1))
    return (low >= 0).all(-1) & (high <= 1).all(-1)


for id, sentence, keep in (
    ("large-targets", "Targets of more than a quarter of the image",
     lambda t: t["boxes"][:, 2:].prod(-1) <= 0.25),
    ("overhanging-targets", "Targets that reach outside the image", _inside),
    ("further-targets-of-a-class", "All but the first target of each class",
     lambda t: _first_of_each(t["labels"])),
    ("earlier-targets-of-a-class", "All but the last target of each class",
     lambda t: _first_of_each(t["labels"].flip(0)).flip(0)),
    ("targets-of-class-zero", "Targets of class 0, taken for background,", lambda t: t["labels"] > 0),
    ("all-targets-but-the-first", "All targets of an image but the first",
     lambda t: torch.arange(len(t["labels"])) < 1),
    ("every-second-target", "Every second target of an image", lambda t: torch.arange(len(t["labels"])) % 2 == 0),
):  # fmt: skip
    for suffix, what, counted in (
        ("are-dropped", "are dropped, and not counted in nb", False),
        ("are-never-matched", "are never matched, and counted in nb", True),
    ):
        known(
            every_image_has_an_assignment_of_its_own, f"{id}-{suffix}", f"{sentence} {what}.",
            fix="match all targets that are given", profiles=EVERY, around=_dropped(keep, counted),
        )  # fmt: skip

for id, sentence, keep in (
    ("small-targets", "Targets with a side below 0.02 of the image", lambda t: t["boxes"][:, 2:].amin(-1) >= 0.02),
    ("targets-of-small-area", "Targets of less than a thousandth of the image",
     lambda t: t["boxes"][:, 2:].prod(-1) >= 1e-3),
):  # fmt: skip
    known(
        loss_giou_is_precise, f"{id}-are-dropped", f"{sentence} are dropped, and not counted in nb.",
        fix="match all targets that are given", profiles=EVERY, around=_dropped(keep, counted=False),
    )  # fmt: skip
    known(
        no_query_and_no_target_is_matched_twice, f"{id}-are-not-matched",
        f"{sentence} are not matched, but count in nb.",
        fix="match all targets that are given", profiles=EVERY, around=_dropped(keep, counted=True),
    )  # fmt: skip
