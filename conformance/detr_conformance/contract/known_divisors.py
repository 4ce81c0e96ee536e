"""Known mistakes of normalisation, beside those in the chapter NORM: each a divisor, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.classification import the_class_loss_without_targets_keeps_its_formula
from detr_conformance.contract.normalisation import (
    box_losses_without_targets_are_zero_in_the_graph,
    loss_bbox_is_the_sum_of_l1_over_nb,
    nb_counts_targets_not_matches,
    one_nb_serves_all_layers,
)
from detr_conformance.registry import DETR, EVERY, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook

Counts = Sequence[int]


def _number(of: Callable[[Counts], float]) -> Callable[..., Tensor]:
    """nb from the number of targets of each image."""
    return lambda book, targets: torch.tensor(float(of([len(t["boxes"]) for t in targets])), dtype=torch.float64)


def _of_labels(of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """nb from the labels of all targets."""
    return lambda book, targets: of(torch.cat([t["labels"] for t in targets])).double().clamp(min=1)


for name, sentence, formula in (
    ("nb-counts-images", "nb counts the images of the batch.", _number(lambda n: len(n))),
    ("nb-counts-images-with-targets", "nb counts the images with targets.",
     _number(lambda n: max(sum(c > 0 for c in n), 1))),
    ("nb-is-the-mean-of-the-images", "nb is the mean number of targets of an image.",
     _number(lambda n: max(sum(n) / len(n), 1))),
    ("nb-is-one-more", "nb is N + 1, against a division by zero.", _number(lambda n: sum(n) + 1)),
    ("nb-is-at-least-two", "nb is at least 2.", _number(lambda n: max(sum(n), 2))),
    ("nb-is-the-root", "nb is the square root of N.", _number(lambda n: max(sum(n), 1) ** 0.5)),
    ("nb-times-the-images", "nb is multiplied by the number of images.", _number(lambda n: max(sum(n), 1) * len(n))),
    ("nb-squared", "All losses are divided by N twice.", _number(lambda n: max(sum(n), 1) ** 2)),
    ("nb-is-one", "Nothing is divided: nb is 1.", _number(lambda n: 1)),
    ("nb-counts-padded-targets", "nb is the number of images times the targets of the fullest: padding counts.",
     _number(lambda n: max(len(n) * max(n), 1))),
    ("nb-counts-targets-and-images", "nb is N and the number of images, as if every image had one target more.",
     _number(lambda n: sum(n) + len(n))),
    ("nb-is-the-mean-of-the-images-with-targets", "nb is the mean number of targets of the images that have some.",
     _number(lambda n: max(sum(n) / max(sum(c > 0 for c in n), 1), 1))),
    ("nb-counts-coordinates", "nb counts the four coordinates of every target.", _number(lambda n: max(4 * sum(n), 1))),
    ("nb-counts-labels-above-zero", "nb counts labels above 0: class 0 is taken for background.",
     _of_labels(lambda y: (y > 0).sum())),
    ("nb-is-the-sum-of-the-labels", "nb is the sum of the labels, not their number.", _of_labels(torch.sum)),
    ("nb-counts-classes", "nb counts the distinct labels.",
     lambda book, targets: torch.tensor(
         float(max(len(set(torch.cat([t["labels"] for t in targets]).tolist())), 1)), dtype=torch.float64)),
):  # fmt: skip
    known(loss_bbox_is_the_sum_of_l1_over_nb, name, sentence, fix="nb = max(N, 1), N the targets of the batch",
          num_boxes=formula)  # fmt: skip


def _tokens(book: Textbook, targets: Any) -> Tensor:
    return torch.stack([(t["token_labels"] > 0).sum() for t in targets]).sum().double().clamp(min=1)


known(loss_bbox_is_the_sum_of_l1_over_nb, "nb-counts-tokens", "nb counts the positive tokens of all targets.",
      fix="nb = max(N, 1), N the targets of the batch", profiles=TEXT, num_boxes=_tokens)  # fmt: skip

for name, sentence, of, profiles in (
    ("nb-is-that-of-the-first-image", "nb is the number of targets of the first image.", lambda n: max(n[0], 1),
     EVERY - TEXT),
    ("nb-is-that-of-the-last-image", "nb is the number of targets of the last image.", lambda n: max(n[-1], 1), EVERY),
    ("nb-is-that-of-the-fullest-image", "nb is the number of targets of the fullest image.",
     lambda n: max(max(n), 1), TEXT),
    ("nb-is-that-of-the-emptiest-image", "nb is the number of targets of the emptiest image.",
     lambda n: max(min(n), 1), EVERY),
):  # fmt: skip
    known(loss_bbox_is_the_sum_of_l1_over_nb, name, sentence, fix="nb = max(N, 1), N the targets of the batch",
          profiles=profiles, num_boxes=_number(of))  # fmt: skip


def _queries(before: Callable[..., Tensor], book: Textbook, layer: Layer, nb: Tensor, m: Any) -> Tensor:
    return torch.tensor(float(layer.boxes.shape[0] * layer.boxes.shape[1]), dtype=torch.float64)


def _queries_of_an_image(before: Callable[..., Tensor], book: Textbook, layer: Layer, nb: Tensor, m: Any) -> Tensor:
    return torch.tensor(float(layer.boxes.shape[1]), dtype=torch.float64)


for name, sentence, change in (
    ("nb-counts-queries", "nb counts the queries of the batch.", _queries),
    ("nb-counts-the-queries-of-an-image", "nb is the number of queries of an image.", _queries_of_an_image),
):
    known(loss_bbox_is_the_sum_of_l1_over_nb, name, sentence, fix="nb = max(N, 1), N the targets of the batch",
          around={"layer_num_boxes": change})  # fmt: skip


def _grown(before: Callable[..., Tensor], book: Textbook, layer: Layer, nb: Tensor, m: Any) -> Tensor:
    return nb * (int(layer.name[3:]) + 2) if layer.name.startswith("aux") else nb


def _divided(*names: str) -> Callable[..., Tensor]:
    """nb divided by the images for some layers alone."""

    def change(before: Callable[..., Tensor], book: Textbook, layer: Layer, nb: Tensor, m: Any) -> Tensor:
        return (nb / len(m)).clamp(min=1) if layer.name.startswith(names) else nb

    return change


for name, sentence, change, profiles in (
    ("nb-grows-from-layer-to-layer", "nb is added up from layer to layer: the second is divided by 2·nb.", _grown,
     EVERY - DETR),
    ("nb-of-auxiliary-layers-is-a-mean", "Auxiliary losses are divided by the mean number of targets of an image.",
     _divided("aux"), EVERY),
    ("nb-of-the-encoder-is-a-mean", "Encoder losses are divided by the mean number of targets of an image.",
     _divided("enc"), EVERY - DETR),
):  # fmt: skip
    known(one_nb_serves_all_layers, name, sentence, fix="one nb for all losses and layers", profiles=profiles,
          around={"layer_num_boxes": change})  # fmt: skip


def _box_divisor(of: Callable[..., Tensor]) -> dict[str, Any]:
    """The box losses alone divided by something else than nb."""

    def layer_losses(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Any:
        found = before(layer, targets, matches, nb, mask)
        factor = nb / of(layer, targets, matches, nb)
        return {k: v * factor if k.startswith(("loss_bbox", "loss_giou")) else v for k, v in found.items()}

    return {"layer_losses": layer_losses}


def _matches(layer: Layer, targets: Any, matches: Sequence[Pairs], nb: Tensor) -> Tensor:
    return torch.tensor(float(max(sum(map(len, matches)), 1)), dtype=torch.float64)


def _per_image(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Any:
    """Box losses as means of each image, then of the images."""
    found = before(layer, targets, matches, nb, mask)
    for key, term in (("loss_bbox", book.loss_bbox), ("loss_giou", book.loss_giou)):
        if f"{key}{layer.suffix}" in found:
            parts = []
            for box, t, m in zip(layer.boxes, targets, matches, strict=True):
                own = torch.tensor(float(max(len(m), 1)), dtype=torch.float64)
                parts.append(term(box[m.query], t["boxes"][m.target], own))
            found[f"{key}{layer.suffix}"] = torch.stack(parts).mean()
    return found


known(
    nb_counts_targets_not_matches, "box-losses-divided-by-the-matches",
    "The box losses alone are divided by the layer's matched pairs.", fix="one nb for all losses and layers",
    profiles=EVERY - DETR,
    around=_box_divisor(_matches),
)  # fmt: skip
known(
    loss_bbox_is_the_sum_of_l1_over_nb, "box-losses-divided-by-nb-times-images",
    "The box losses alone are divided by nb times the number of images.", fix="one nb for all losses and layers",
    profiles=EVERY - DETR,
    around=_box_divisor(lambda layer, targets, matches, nb: nb * len(targets)),
)  # fmt: skip
known(
    loss_bbox_is_the_sum_of_l1_over_nb, "box-losses-divided-by-the-images",
    "The box losses alone are divided by the number of images.", fix="one nb for all losses and layers",
    profiles=EVERY - DETR,
    around=_box_divisor(lambda layer, targets, matches, nb: torch.tensor(float(len(targets))).double()),
)  # fmt: skip
known(
    loss_bbox_is_the_sum_of_l1_over_nb, "box-losses-averaged-image-by-image",
    "Box losses are means of each image, then of the images.", fix="one sum over the batch, divided by nb",
    around={"layer_losses": _per_image},
)  # fmt: skip

# --- nothing to divide ---

for name, sentence, formula in (
    ("nb-is-at-least-a-millionth", "nb is at least 1e-6 instead of 1.", _number(lambda n: max(sum(n), 1e-6))),
    ("nb-is-at-least-a-hundred-millionth", "nb is at least 1e-8 instead of 1.", _number(lambda n: max(sum(n), 1e-8))),
    ("nb-is-at-least-the-images", "nb is at least the number of images.", _number(lambda n: max(sum(n), len(n)))),
    ("every-image-counts-at-least-one", "Every image counts at least one target.",
     _number(lambda n: sum(max(c, 1) for c in n))),
):  # fmt: skip
    if name in ("nb-is-at-least-the-images", "every-image-counts-at-least-one"):
        known(nb_counts_targets_not_matches, name, sentence, fix="clamp nb at 1, not each image", num_boxes=formula)
    else:
        known(the_class_loss_without_targets_keeps_its_formula, name, sentence, fix="clamp nb at 1",
              profiles=EVERY - DETR, num_boxes=formula)  # fmt: skip


def _empty(value: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Box losses without any pair are something else."""

    def loss(before: Callable[..., Tensor], book: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        found = before(pred, wanted, nb)
        return found if len(pred) else value(found)

    return {"loss_bbox": loss, "loss_giou": loss}


for name, sentence, value in (
    ("mean-of-no-boxes", "Without targets the box losses are means of nothing, and not a number.",
     lambda v: v * torch.nan),
    ("empty-box-losses", "Without targets the box losses are empty tensors.", lambda v: v.expand(0)),
):  # fmt: skip
    known(
        box_losses_without_targets_are_zero_in_the_graph, name, sentence, fix="a sum over no pairs, divided by nb",
        around=_empty(value),
    )  # fmt: skip


def _class_loss_without_targets(factor: float) -> dict[str, Any]:
    def loss_ce(before: Callable[..., Tensor], book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Tensor:
        found = before(layer, targets, *rest)
        return found if any(len(t["boxes"]) for t in targets) else factor * found

    return {"loss_ce": loss_ce}


known(
    the_class_loss_without_targets_keeps_its_formula, "class-loss-of-an-empty-batch-weighed-otherwise",
    "A batch without targets has twice its class loss.", fix="the same formula with and without targets",
    around=_class_loss_without_targets(2.0),
)  # fmt: skip
