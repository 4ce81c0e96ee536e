"""Known mistakes of single losses in auxiliary or encoder outputs alone, and the checks that see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient, logits_get_the_textbook_gradient
from detr_conformance.contract.layers import (
    a_layer_moves_its_own_losses_only,
    an_auxiliary_layer_is_trained_like_the_final_one,
    class_error_is_for_the_final_layer,
    encoder_outputs_are_trained_on_their_class_targets,
    encoder_outputs_have_their_own_matching,
)
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, known
from detr_reference.textbook import Layer, Textbook, textbook


def _only_here(of: str, change: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A loss of some layers computed by a book with other formulas, from the book itself."""

    def loss_ce(before: Callable[..., Tensor], book: Textbook, layer: Layer, *rest: Any) -> Tensor:
        found = replace(book, loss_ce=textbook.loss_ce, **change(book)) if layer.name.startswith(of) else None
        return found.loss_ce(layer, *rest) if found else before(layer, *rest)

    return {"loss_ce": loss_ce}


def _of_matched(book: Textbook) -> dict[str, Any]:
    """The focal loss of matched queries alone: those whose row has a positive."""

    def focal_image(_book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        return book.focal_image(x, y, inside & (y > 0).any(-1, keepdim=True))

    return {"focal_image": focal_image}


def _of_unmatched(book: Textbook) -> dict[str, Any]:
    def focal_image(_book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        return book.focal_image(x, y, inside & ~(y > 0).any(-1, keepdim=True))

    return {"focal_image": focal_image}


def _of_positives(book: Textbook) -> dict[str, Any]:
    return {"focal_image": lambda _book, x, y, inside: book.focal_image(x, y, inside & (y > 0))}


def _averaged(book: Textbook) -> dict[str, Any]:
    return {"focal_image": lambda _book, x, *rest: book.focal_image(x, *rest) / max(len(x), 1)}


def _never_divided(book: Textbook) -> dict[str, Any]:
    return {"class_divisor": lambda _book, *rest: torch.ones((), dtype=torch.float64)}


def _twice_divided(book: Textbook) -> dict[str, Any]:
    return {"class_divisor": lambda _book, nb, m: nb * book.class_divisor(nb, m)}


def _without_alpha(book: Textbook) -> dict[str, Any]:
    return {"alpha_weight": lambda _book, y: torch.ones_like(y)}


def _without_gamma(book: Textbook) -> dict[str, Any]:
    return {"focusing": lambda _book, z: torch.ones_like(z)}


SLIPS = (
    ("of-matched-queries-only", "is taken on matched queries only", _of_matched),
    ("of-unmatched-queries-only", "is taken on unmatched queries only", _of_unmatched),
    ("of-positives-only", "is taken on positive entries only", _of_positives),
    ("averaged-over-queries", "is averaged over queries: a factor 1/Q", _averaged),
    ("never-divided", "is divided by nothing", _never_divided),
    ("divided-twice", "is divided by nb twice", _twice_divided),
    ("without-alpha", "has no α", _without_alpha),
    ("without-gamma", "has no (1 − p_t)^γ", _without_gamma),
)

for of, whose, check in (
    ("aux", "auxiliary", an_auxiliary_layer_is_trained_like_the_final_one),
    ("enc", "encoder", encoder_outputs_are_trained_on_their_class_targets),
):
    for id, sentence, slip in SLIPS:
        known(
            check, f"{whose}-class-loss-{id}", f"The class loss of {whose} outputs {sentence}.",
            fix="treat all layers alike", profiles=FOCAL | TEXT, around=_only_here(of, slip),
        )  # fmt: skip
    if of == "aux":
        known(
            check, "auxiliary-cross-entropy-of-matched-queries-only",
            "The cross-entropy of auxiliary outputs is taken on matched queries only.", fix="treat all layers alike",
            profiles=DETR, around=_only_here(of, lambda book: {
                "class_weight": lambda _book, y: (y != book.o.num_classes).double(),
                "softmax_divisor": lambda _book, w, targets: w.sum().clamp(min=1)}),
        )  # fmt: skip
        known(
            check, "auxiliary-cross-entropy-without-weights",
            "No object weighs 1 in auxiliary outputs alone.", fix="treat all layers alike",
            profiles=DETR, around=_only_here(of, lambda book: {
                "class_weight": lambda _book, y: torch.ones_like(y, dtype=torch.float64)}),
        )  # fmt: skip


def _times_the_decoders_queries(
    before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any
) -> Any:
    result, key = before(outputs, targets, given), f"loss_ce{book.o.encoder_suffix}"
    layers = {x.name: x for x in book.layers(outputs)}
    if "enc" not in layers or key not in result.losses:
        return result
    share = layers["final"].logits.shape[1] / layers["enc"].logits.shape[1]
    return replace(result, losses=result.losses | {key: result.losses[key] * share})


known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-class-loss-times-the-decoders-queries",
    "The encoder's class loss is a mean over its queries, multiplied by the decoder's number of queries.",
    fix="multiply the mean by the layer's own number of queries", profiles=FOCAL | TEXT,
    around={"losses": _times_the_decoders_queries},
)  # fmt: skip

# --- single losses on another layer's predictions ---


def _aux(layers: list[Layer]) -> list[Layer]:
    return [x for x in layers if x.name.startswith("aux")]


def _borrowed(source: Callable[[list[Layer]], list[Layer]], key: str, terms: tuple[str, ...]) -> dict[str, Any]:
    """Some losses of auxiliary layers, computed on the logits or boxes of other layers; all else is their own."""

    def losses(before: Any, book: Textbook, outputs: Any, *rest: Any) -> Any:
        every = book.layers(outputs)
        other = {x.name: y for x, y in zip(_aux(every), source(every) if _aux(every) else [], strict=True)}

        def layer_losses(inner: Textbook, layer: Layer, *given: Any) -> dict[str, Tensor]:
            found: dict[str, Tensor] = book.layer_losses(layer, *given)
            if layer.name not in other:
                return found
            wrong = book.layer_losses(replace(layer, **{key: getattr(other[layer.name], key)}), *given)
            return {k: wrong[k] if k.startswith(terms) else v for k, v in found.items()}

        return before.func(replace(book, layer_losses=layer_losses), outputs, *rest)

    return {"losses": losses}


for name, whose, source in (
    ("final-layer", "the final layer", lambda x: [x[0]] * len(_aux(x))),
    ("layer-before", "the layer before them", lambda x: [_aux(x)[0], *_aux(x)[:-1]]),
    ("layer-after", "the layer after them", lambda x: [*_aux(x)[1:], x[0]]),
    ("first-layer", "the first layer", lambda x: _aux(x)[:1] * len(_aux(x))),
    ("last-auxiliary-layer", "the last auxiliary layer", lambda x: _aux(x)[-1:] * len(_aux(x))),
):
    for loss, terms, key in (
        ("class-loss", ("loss_ce",), "logits"),
        ("l1", ("loss_bbox",), "boxes"),
        ("giou-loss", ("loss_giou",), "boxes"),
        ("box-losses", ("loss_bbox", "loss_giou"), "boxes"),
    ):
        known(
            a_layer_moves_its_own_losses_only, f"auxiliary-{loss}-of-the-{name}",
            f"{' and '.join(terms)} of auxiliary layers, matched on their own, are of the {key} of {whose}.",
            fix="hand every layer its own predictions", around=_borrowed(source, key, terms),
        )  # fmt: skip

# --- single losses without a gradient ---


def _constant(of: str, term: str) -> dict[str, Any]:
    def layer_losses(before: Callable[..., Any], book: Textbook, layer: Layer, *rest: Any) -> Any:
        cut = (term,) if layer.name.startswith(of) else ()
        return {k: v.detach() if k.startswith(cut) else v for k, v in before(layer, *rest).items()}

    return {"layer_losses": layer_losses}


for of, whose, profiles in (("final", "final", EVERY), ("aux", "auxiliary", EVERY), ("enc", "encoder", FOCAL | TEXT)):
    for loss, term, check in (
        ("class-loss", "loss_ce", logits_get_the_textbook_gradient),
        ("l1", "loss_bbox", boxes_get_the_textbook_gradient),
        ("giou-loss", "loss_giou", boxes_get_the_textbook_gradient),
    ):
        known(
            check, f"{whose}-{loss}-without-gradient", f"{term} of {whose} outputs has its value, and no gradient.",
            fix="do not detach what is trained", profiles=profiles, around=_constant(of, term),
        )  # fmt: skip

# --- class targets ---


def _blank(targets: Any) -> Any:
    return [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]


def _of_class_zero(of: str, matched: bool, trained: bool) -> dict[str, Any]:
    """Layers matched, or trained, as if every target were of class 0."""

    def layer_match(before: Callable[..., Any], book: Textbook, layer: Layer, every: Any, targets: Any) -> Any:
        return before(layer, every, _blank(targets) if layer.name.startswith(of) else targets)

    def layer_losses(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Any:
        return before(layer, _blank(targets) if layer.name.startswith(of) else targets, *rest)

    changed = {"layer_match": (layer_match, matched), "layer_losses": (layer_losses, trained)}
    return {name: change for name, (change, wanted) in changed.items() if wanted}


for of, whose, check, profiles in (
    ("aux", "auxiliary", an_auxiliary_layer_is_trained_like_the_final_one, DETR | FOCAL),
    ("enc", "encoder", encoder_outputs_are_trained_on_their_class_targets, frozenset({"dino"})),
):
    for id, sentence, matched, trained in (
        ("outputs-aim-at-class-zero", "are matched with and trained on class 0, whatever the targets' classes", True,
         True),
        ("outputs-are-matched-with-class-zero", "are matched with class 0, and trained on the real classes", True,
         False),
        ("outputs-are-trained-on-class-zero", "are matched with the real classes, and trained on class 0", False, True),
    ):  # fmt: skip
        known(
            encoder_outputs_have_their_own_matching if of == "enc" and not trained else check,
            f"{whose}-{id}", f"{whose.capitalize()} outputs {sentence}.", fix="use the targets' own classes",
            profiles=profiles, around=_of_class_zero(of, matched, trained),
        )  # fmt: skip

# --- what is logged ---


def _class_errors(of: str) -> dict[str, Any]:
    def logged(before: Callable[..., Any], book: Textbook, every: list[Layer], *rest: Any) -> Any:
        found = before(every, *rest)
        wrong = found.get("class_error", every[0].logits.new_tensor(100.0))
        return found | {f"class_error{x.suffix}": wrong for x in every if x.name.startswith(of)}

    return {"logged": logged}


for of, whose in (("aux", "auxiliary"), ("enc", "encoder")):
    known(
        class_error_is_for_the_final_layer, f"class-error-of-{whose}-outputs",
        f"class_error is logged for {whose} outputs too.", fix="log it for the final layer only", profiles=FOCAL | TEXT,
        around=_class_errors(of),
    )  # fmt: skip
