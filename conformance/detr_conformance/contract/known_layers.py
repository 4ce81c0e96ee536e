"""Known mistakes of auxiliary and encoder outputs, beside those in the chapter LAYER, and the checks that see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.gradients import boxes_get_the_textbook_gradient, every_output_gets_a_gradient_tensor
from detr_conformance.contract.layers import (
    a_layer_moves_its_own_losses_only,
    an_auxiliary_layer_is_trained_like_the_final_one,
    encoder_outputs_are_trained_on_their_class_targets,
    encoder_outputs_get_every_loss,
    every_auxiliary_layer_gets_every_loss,
)
from detr_conformance.registry import FOCAL, TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook

Change = Callable[[list[Layer], list[Layer], Any], list[Layer]]


def _layers(change: Callable[[list[Layer], Any], list[Layer]]) -> dict[str, Any]:
    """Other layers than there are: a function of all of them and of the options."""
    return {"layers": lambda before, book, outputs: change(before(outputs), book.o)}


def _aux(layers: Sequence[Layer]) -> list[Layer]:
    return [x for x in layers if x.name.startswith("aux")]


def _rest(layers: Sequence[Layer]) -> list[Layer]:
    return [x for x in layers if not x.name.startswith("aux")]


def _each(change: Callable[[Layer], Layer], of: str) -> dict[str, Any]:
    return _layers(lambda layers, o: [change(x) if x.name.startswith(of) else x for x in layers])


def _named(layers: Sequence[Layer], suffixes: Sequence[str]) -> list[Layer]:
    """Layers under other suffixes."""
    return [replace(x, suffix=s) for x, s in zip(layers, suffixes, strict=True)]


# --- which layers there are ---

for name, sentence, change in (
    ("last-auxiliary-layer-left-out", "The last auxiliary layer is left out.",
     lambda x, o: [y for y in x if y not in _aux(x)[-1:]]),
    ("first-auxiliary-layer-left-out", "The first auxiliary layer is left out, and the others keep their numbers.",
     lambda x, o: [y for y in x if y not in _aux(x)[:1]]),
    ("first-auxiliary-layer-lost-and-the-rest-move-up",
     "The first auxiliary layer is left out, and the others move up by a number.",
     lambda x, o: _rest(x) + _named(_aux(x)[1:], [y.suffix for y in _aux(x)[:-1]])),
    ("a-single-auxiliary-layer-is-left-out", "A single auxiliary layer is left out; several are trained.",
     lambda x, o: x if len(_aux(x)) > 1 else _rest(x)),
    ("first-auxiliary-layer-alone", "Only the first auxiliary layer is trained.",
     lambda x, o: _rest(x) + _aux(x)[:1]),
    ("last-auxiliary-layer-alone", "Only the last auxiliary layer is trained, as number 0.",
     lambda x, o: _rest(x) + _named(_aux(x)[-1:], [y.suffix for y in _aux(x)[:1]])),
    ("at-most-five-auxiliary-layers", "Auxiliary layers are trained up to the fifth, as of a decoder of six layers.",
     lambda x, o: _rest(x) + _aux(x)[:5]),
    ("auxiliary-layers-count-from-one", "Suffixes of auxiliary layers count from 1.",
     lambda x, o: _rest(x) + _named(_aux(x), [f"{o.aux_suffix}{i + 1}" for i in range(len(_aux(x)))])),
    ("auxiliary-losses-under-another-suffix", "Auxiliary losses are returned under names of another form.",
     lambda x, o: _rest(x) + _named(_aux(x), [f"_other_{i}" for i in range(len(_aux(x)))])),
):  # fmt: skip
    known(
        every_auxiliary_layer_gets_every_loss, name, sentence, fix="every aux_outputs[i] under the suffix _{i}",
        around=_layers(change),
    )  # fmt: skip


def _overwritten(before: Callable[..., Any], book: Textbook, layer: Layer, *rest: Any) -> Any:
    return before(replace(layer, suffix="") if layer.name.startswith("aux") else layer, *rest)


def _no(names: tuple[str, ...], of: str) -> dict[str, Any]:
    """Some losses of some layers are missing."""

    def layer_losses(before: Callable[..., Any], book: Textbook, layer: Layer, *rest: Any) -> Any:
        found = before(layer, *rest)
        return {k: v for k, v in found.items() if not (layer.name.startswith(of) and k.startswith(names))}

    return {"layer_losses": layer_losses}


known(
    every_auxiliary_layer_gets_every_loss, "auxiliary-losses-overwrite-the-final-ones",
    "Auxiliary losses have no suffix, and overwrite the final ones.", fix="every aux_outputs[i] under the suffix _{i}",
    around={"layer_losses": _overwritten},
)  # fmt: skip

for name, sentence, names in (
    ("auxiliary-layers-without-a-class-loss", "Auxiliary layers have no class loss.", ("loss_ce",)),
    ("auxiliary-layers-without-l1", "Auxiliary layers have no loss_bbox.", ("loss_bbox",)),
    ("auxiliary-layers-without-giou", "Auxiliary layers have no loss_giou.", ("loss_giou",)),
    ("auxiliary-layers-without-box-losses", "Auxiliary layers have no box losses.", ("loss_bbox", "loss_giou")),
):
    known(
        every_auxiliary_layer_gets_every_loss, name, sentence, fix="every loss of every layer", around=_no(names, "aux")
    )

# --- which predictions a layer is trained on ---


def _of(source: Callable[[list[Layer]], list[Layer]], *keys: str) -> Callable[[list[Layer], Any], list[Layer]]:
    """Auxiliary layers with predictions of other layers."""

    def change(layers: list[Layer], o: Any) -> list[Layer]:
        sources = iter(source(layers))
        return [
            replace(x, **{k: getattr(y, k) for k in keys})
            if x.name.startswith("aux") and (y := next(sources)) is not None
            else x
            for x in layers
        ]

    return change


_BOTH = ("logits", "boxes")

for name, sentence, change in (
    ("auxiliary-layers-reversed", "Suffixes of auxiliary layers count from the last one.",
     _of(lambda x: _aux(x)[::-1], *_BOTH)),
    ("auxiliary-layers-one-late", "Suffix 0 holds the final layer, and every auxiliary layer stands one too far.",
     _of(lambda x: [x[0], *_aux(x)[:-1]], *_BOTH)),
    ("auxiliary-layers-are-all-the-last", "Every auxiliary loss is that of the last auxiliary layer: a late binding.",
     _of(lambda x: _aux(x)[-1:] * len(_aux(x)), *_BOTH)),
    ("auxiliary-layers-are-all-the-first", "Every auxiliary loss is that of the first auxiliary layer.",
     _of(lambda x: _aux(x)[:1] * len(_aux(x)), *_BOTH)),
    ("auxiliary-layers-are-the-final-one", "Auxiliary losses are those of the final layer.",
     _of(lambda x: [x[0]] * len(_aux(x)), *_BOTH)),
    ("auxiliary-logits-of-the-final-layer", "Auxiliary layers are trained on the final layer's logits.",
     _of(lambda x: [x[0]] * len(_aux(x)), "logits")),
    ("auxiliary-boxes-averaged-with-the-final", "Auxiliary boxes are averaged with the final ones.",
     lambda x, o: [replace(y, boxes=(y.boxes + x[0].boxes) / 2) if y.name.startswith("aux") else y for y in x]),
):  # fmt: skip
    known(
        a_layer_moves_its_own_losses_only, name, sentence, fix="hand every layer its own predictions",
        around=_layers(change),
    )  # fmt: skip


for name, sentence, source, keys in (
    ("auxiliary-logits-of-the-layer-before", "Auxiliary layers are trained on the logits of the layer before them.",
     lambda x: [_aux(x)[0], *_aux(x)[:-1]], ("logits",)),
    ("auxiliary-boxes-of-the-layer-before", "Auxiliary layers are trained on the boxes of the layer before them.",
     lambda x: [_aux(x)[0], *_aux(x)[:-1]], ("boxes",)),
    ("auxiliary-logits-of-the-layer-after", "Auxiliary layers are trained on the logits of the layer after them.",
     lambda x: [*_aux(x)[1:], x[0]], ("logits",)),
    ("auxiliary-boxes-of-the-layer-after", "Auxiliary layers are trained on the boxes of the layer after them.",
     lambda x: [*_aux(x)[1:], x[0]], ("boxes",)),
):  # fmt: skip
    known(
        a_layer_moves_its_own_losses_only, name, sentence, fix="hand every layer its own predictions",
        around=_layers(lambda x, o, source=source, keys=keys: _of(source, *keys)(x, o) if _aux(x) else x),
    )  # fmt: skip


def _detached(layer: Layer) -> Layer:
    return replace(layer, logits=layer.logits.detach(), boxes=layer.boxes.detach())


known(
    every_output_gets_a_gradient_tensor, "auxiliary-layers-detached", "Auxiliary predictions are detached.",
    fix="do not detach what is trained", around=_each(_detached, "aux"),
)  # fmt: skip
known(
    every_output_gets_a_gradient_tensor, "encoder-outputs-detached", "Encoder outputs are detached.",
    fix="do not detach what is trained", profiles=FOCAL | TEXT, around=_each(_detached, "enc"),
)  # fmt: skip
known(
    boxes_get_the_textbook_gradient, "encoder-boxes-detached", "Encoder boxes are detached.",
    fix="do not detach what is trained", profiles=FOCAL | TEXT,
    around=_each(lambda x: replace(x, boxes=x.boxes.detach()), "enc"),
)  # fmt: skip
known(
    boxes_get_the_textbook_gradient, "auxiliary-boxes-detached", "Auxiliary boxes are detached.",
    fix="do not detach what is trained", around=_each(lambda x: replace(x, boxes=x.boxes.detach()), "aux"),
)  # fmt: skip

# --- how much a layer weighs ---


def _scaled(factor: Callable[[Layer, int], float]) -> dict[str, Any]:
    """Losses of layers multiplied, by the layer and the number of auxiliary ones."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result, layers = before(outputs, targets, given), book.layers(outputs)
        found = dict(result.losses)
        for layer in layers:
            for key in ("loss_ce", "loss_bbox", "loss_giou"):
                if f"{key}{layer.suffix}" in found:
                    found[f"{key}{layer.suffix}"] = found[f"{key}{layer.suffix}"] * factor(layer, len(_aux(layers)))
        return replace(result, losses=found)

    return {"losses": losses}


for name, sentence, around in (
    ("auxiliary-losses-averaged-over-layers", "Auxiliary losses are divided by the number of auxiliary layers.",
     _scaled(lambda x, n: 1 / n if x.name.startswith("aux") else 1)),
    ("auxiliary-losses-divided-by-all-layers", "Auxiliary losses are divided by the number of decoder layers.",
     _scaled(lambda x, n: 1 / (n + 1) if x.name.startswith("aux") else 1)),
    ("auxiliary-losses-doubled", "Auxiliary losses are doubled.",
     _scaled(lambda x, n: 2 if x.name.startswith("aux") else 1)),
    ("auxiliary-losses-weighed-by-depth", "Auxiliary loss i is multiplied by (i + 1)/L.",
     _scaled(lambda x, n: (int(x.name[3:]) + 1) / (n + 1) if x.name.startswith("aux") else 1)),
):  # fmt: skip
    known(an_auxiliary_layer_is_trained_like_the_final_one, name, sentence, fix="treat all layers alike", around=around)


def _mixed(mix: Callable[[dict[str, Tensor], list[Layer], str], None]) -> dict[str, Any]:
    """Losses of one layer in those of another."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result, layers = before(outputs, targets, given), book.layers(outputs)
        found = dict(result.losses)
        for key in ("loss_ce", "loss_bbox", "loss_giou"):
            if key in found and _aux(layers):
                mix(found, _aux(layers), key)
        return replace(result, losses=found)

    return {"losses": losses}


def _accumulate(found: dict[str, Tensor], aux: list[Layer], key: str) -> None:
    total = torch.zeros((), dtype=torch.float64)
    for layer in aux:
        total = total + found[f"{key}{layer.suffix}"]
        found[f"{key}{layer.suffix}"] = total


def _mean_with_last(found: dict[str, Tensor], aux: list[Layer], key: str) -> None:
    found[key] = (found[key] + found[f"{key}{aux[-1].suffix}"]) / 2


def _sum_into_final(found: dict[str, Tensor], aux: list[Layer], key: str) -> None:
    found[key] = torch.stack([found[key], *(found[f"{key}{x.suffix}"] for x in aux)]).sum()


def _mean_of_all(found: dict[str, Tensor], aux: list[Layer], key: str) -> None:
    found[key] = torch.stack([found[key], *(found[f"{key}{x.suffix}"] for x in aux)]).mean()


def _moved_into_final(found: dict[str, Tensor], aux: list[Layer], key: str) -> None:
    found[key] = torch.stack([found[key], *(found.pop(f"{key}{x.suffix}") for x in aux)]).sum()


for name, sentence, mix in (
    ("auxiliary-losses-add-up", "Every auxiliary loss adds those before it.", _accumulate),
    ("final-loss-averaged-with-an-auxiliary-one", "The final loss is averaged with the last auxiliary one.",
     _mean_with_last),
    ("auxiliary-losses-added-to-the-final-ones", "Auxiliary losses are added to the final keys as well.",
     _sum_into_final),
    ("final-loss-is-the-mean-of-all-layers", "The final loss is the mean over all layers.", _mean_of_all),
    ("auxiliary-losses-only-in-the-final-ones", "Auxiliary losses are added to the final keys, and have none.",
     _moved_into_final),
):  # fmt: skip
    known(
        every_auxiliary_layer_gets_every_loss if name.endswith("only-in-the-final-ones")
        else a_layer_moves_its_own_losses_only,
        name, sentence, fix="keep the losses of each layer apart", around=_mixed(mix),
    )  # fmt: skip


def _once_more(before: Callable[..., Any], book: Textbook, outputs: Any) -> list[Layer]:
    found: list[Layer] = before(outputs)
    n = len(_aux(found))
    return [*found, replace(found[0], name=f"aux{n}", suffix=f"{book.o.aux_suffix}{n}", masks=None)]


def _numbered(x: list[Layer], o: Any) -> list[Layer]:
    return [replace(y, suffix=f"{o.aux_suffix}{len(_aux(x))}") if y.name == "enc" else y for y in x]


# --- the encoder ---

for name, sentence, change in (
    ("encoder-losses-numbered-like-the-others", "The encoder's losses carry the next auxiliary number.", _numbered),
    ("encoder-losses-under-another-suffix", "The encoder's losses are returned under names of another form.",
     lambda x, o: [replace(y, suffix="_other") if y.name == "enc" else y for y in x]),
    ("encoder-only-beside-auxiliary-layers", "Encoder outputs are trained only beside auxiliary layers.",
     lambda x, o: [y for y in x if y.name != "enc" or _aux(x)]),
):  # fmt: skip
    known(
        encoder_outputs_get_every_loss, name, sentence, fix="every loss of the encoder under its own suffix",
        around=_layers(change),
    )  # fmt: skip

for name, sentence, names in (
    ("encoder-without-a-class-loss", "The encoder has no class loss.", ("loss_ce",)),
    ("encoder-without-l1", "The encoder has no loss_bbox.", ("loss_bbox",)),
    ("encoder-without-giou", "The encoder has no loss_giou.", ("loss_giou",)),
    ("encoder-without-box-losses", "The encoder has no box losses.", ("loss_bbox", "loss_giou")),
):
    known(encoder_outputs_get_every_loss, name, sentence, fix="every loss of the encoder", around=_no(names, "enc"))


def _cut(before: Callable[..., Any], book: Textbook, outputs: Any) -> list[Layer]:
    found: list[Layer] = before(outputs)
    q = found[0].boxes.shape[1]
    return [replace(x, logits=x.logits[:, :q], boxes=x.boxes[:, :q]) if x.name == "enc" else x for x in found]


def _first_channel(before: Callable[..., Any], book: Textbook, layer: Layer, *rest: Any) -> Any:
    return before(replace(layer, logits=layer.logits[..., :1]) if layer.name == "enc" else layer, *rest)


def _queries(before: Any, book: Textbook, layer: Layer, nb: Tensor, matches: Sequence[Pairs]) -> Tensor:
    own: Tensor = before(layer, nb, matches)
    count = float(layer.boxes.shape[0] * layer.boxes.shape[1])
    return torch.tensor(count, dtype=torch.float64) if layer.name == "enc" else own


for name, sentence, around in (
    ("encoder-cut-to-the-decoder-queries",
     "Encoder outputs are cut to the decoder's number of queries.", {"layers": _cut}),
    ("encoder-losses-divided-by-its-queries", "Encoder losses are divided by the encoder's queries.",
     {"layer_num_boxes": _queries}),
    ("encoder-losses-halved", "Encoder losses weigh half as much, inside the loss.",
     _scaled(lambda x, n: 0.5 if x.name == "enc" else 1)),
):  # fmt: skip
    known(
        encoder_outputs_are_trained_on_their_class_targets, name, sentence, fix="treat all layers alike", around=around
    )


def _only_token_zero(before: Callable[..., Any], book: Textbook, layer: Layer, targets: Any) -> Any:
    own = before(layer, targets)
    if layer.name != "enc":
        return own
    return [{**t, "token_labels": _first_column(t["token_labels"])} for t in own]


def _first_column(rows: Tensor) -> Tensor:
    hot = torch.zeros_like(rows)
    hot[:, 0] = 1
    return hot


def _trained(labels: Callable[[Any, int], Any]) -> dict[str, Any]:
    """Other class targets for the encoder's loss than for its matching."""

    def layer_losses(before: Any, book: Textbook, layer: Layer, targets: Any, *rest: Any) -> Any:
        if layer.name == "enc":
            targets = [labels(t, layer.logits.shape[-1]) for t in targets]
        return before(layer, targets, *rest)

    return {"layer_losses": layer_losses}


known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-aims-at-class-one",
    "Encoder outputs aim at class 1.", fix="use the option's class targets", profiles=FOCAL,
    around=_trained(lambda t, c: {**t, "labels": torch.full_like(t["labels"], min(1, c - 1))}),
)  # fmt: skip
known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-aims-at-token-zero",
    "Encoder outputs aim at token 0, as a class-agnostic encoder's at channel 0.", fix="use the option's class targets",
    profiles=TEXT, around={"layer_targets": _only_token_zero},
)  # fmt: skip
known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-aims-at-any-token",
    "Encoder outputs aim at all tokens of any target of their image.", fix="use the option's class targets",
    profiles=TEXT,
    around=_trained(lambda t, c: {**t, "token_labels": t["token_labels"].amax(0, keepdim=True).expand_as(
        t["token_labels"])} if len(t["token_labels"]) else t),
)  # fmt: skip
for name, sentence, rows in (
    ("encoder-aims-at-every-token", "Encoder outputs aim at every token of the text.", torch.ones_like),
    ("encoder-aims-at-the-first-token", "Encoder outputs aim at the first token of the class alone.",
     lambda r: ((r > 0).cumsum(-1) == 1) & (r > 0)),
    ("encoder-aims-at-the-first-targets-tokens", "Encoder outputs aim at the tokens of their image's first target.",
     lambda r: r[:1].expand_as(r)),
    ("encoder-aims-at-nothing", "Encoder outputs have no positives: all tokens are background.", torch.zeros_like),
):  # fmt: skip
    known(
        encoder_outputs_are_trained_on_their_class_targets, name, sentence, fix="use the option's class targets",
        profiles=TEXT, around=_trained(lambda t, c, rows=rows: {**t, "token_labels": rows(t["token_labels"]).double()}),
    )  # fmt: skip
known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-aims-at-the-last-class",
    "Encoder outputs aim at the last class.", fix="use the option's class targets", profiles=FOCAL,
    around=_trained(lambda t, c: {**t, "labels": torch.full_like(t["labels"], c - 1)}),
)  # fmt: skip
known(
    encoder_outputs_are_trained_on_their_class_targets, "encoder-trains-one-channel",
    "Only channel 0 of the encoder's logits is trained.", fix="train all channels",
    profiles=frozenset({"deformable-detr"}),
    around={"loss_ce": _first_channel},
)  # fmt: skip
