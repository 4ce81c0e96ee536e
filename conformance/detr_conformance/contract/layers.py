"""LAYER: auxiliary and encoder outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from detr_conformance.contract.compare import agree, holds, unless_tied
from detr_conformance.contract.costs import the_cost_is_the_weighted_sum_of_the_three
from detr_conformance.contract.matching import optimal, the_assignment_is_optimal
from detr_conformance.contract.normalisation import value
from detr_conformance.experiments import BATCH, LAYERS
from detr_conformance.masked import MASKED, MASKS
from detr_conformance.registry import EVERY, FOCAL, TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Layer, Textbook


def _returned(seen: Seen, layer: str) -> Iterator[Comparison]:
    for key in seen.case.keys(layer):
        got = "returned" if key in seen.got.keys else "the keys are " + ", ".join(sorted(seen.got.keys))
        yield holds(key in seen.got.keys, f"the loss {key!r} of {layer}", "returned", got)


LAYER_1 = clause(
    "LAYER-1",
    "must",
    EVERY,
    "aux_outputs[i] gets every trained loss under its key with suffix i, counted from 0; any number of layers, none "
    "included.",
    ["facebookresearch/detr models/detr.py:238-253"],
)


@check(LAYER_1, on=BATCH, component="auxiliary layers")
def every_auxiliary_layer_gets_every_loss(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        if layer.startswith("aux"):
            yield from _returned(seen, layer)


@fault(every_auxiliary_layer_gets_every_loss, fix="go through outputs['aux_outputs']")
def no_auxiliary_losses(book: Textbook) -> Textbook:
    """Auxiliary outputs are not supervised."""
    return replace(
        book,
        layers=lambda inner, outputs: [
            layer for layer in book.under(inner.o).layers(outputs) if not layer.name.startswith("aux")
        ],
    )


LAYER_2 = clause(
    "LAYER-2", "must", EVERY, "A layer's losses are those that the same predictions would get as the final output."
)


@check(LAYER_2, on=LAYERS, component="auxiliary layers", takes_raising=True)
def an_auxiliary_layer_is_trained_like_the_final_one(seen: Seen) -> Iterator[Comparison]:
    for layer, twin in seen.twins.items():
        for term in TERMS:
            key, final = f"loss_{term}{seen.case.suffix(layer)}", f"loss_{term}"
            if key in seen.got.losses and final in twin.got.losses:
                how = "the same predictions as final output"
                same = agree(key, twin.got.losses[final], seen.got.losses[key], 2 * seen.allowed(term, layer), how)
                yield from unless_tied(seen, [layer], same)


@fault(an_auxiliary_layer_is_trained_like_the_final_one, fix="treat all layers alike")
def auxiliary_class_loss_halved(book: Textbook) -> Textbook:
    """Auxiliary layers weigh half as much, inside the loss."""

    def layer_losses(inner: Textbook, layer, *rest):  # type: ignore[no-untyped-def]
        found = book.under(inner.o).layer_losses(layer, *rest)
        return {k: v / 2 if layer.name.startswith("aux") else v for k, v in found.items()}

    return replace(book, layer_losses=layer_losses)


LAYER_3 = clause("LAYER-3", "must", EVERY, "A layer's predictions move that layer's losses and no others.")


@check(LAYER_3, on=LAYERS, component="auxiliary layers")
def a_layer_moves_its_own_losses_only(seen: Seen) -> Iterator[Comparison]:
    for layer, reached in seen.crossed.items():
        if not any(key in seen.got.attached for key in seen.case.keys(layer)):
            continue
        for other, grads in reached.items():
            moved = any(g is not None and bool((g != 0).any()) for g in grads)
            what = f"gradient of the losses of {layer} on the predictions of {other}"
            want = "some" if other == layer else "none"
            yield holds(moved == (other == layer), what, want, "some" if moved else "none")


@fault(a_layer_moves_its_own_losses_only, fix="hand every layer its own predictions")
def auxiliary_boxes_of_the_final_layer(book: Textbook) -> Textbook:
    """Auxiliary layers are trained on the final layer's boxes."""

    def layers(inner: Textbook, outputs):  # type: ignore[no-untyped-def]
        found = book.under(inner.o).layers(outputs)
        return [replace(x, boxes=found[0].boxes) if x.name.startswith("aux") else x for x in found]

    return replace(book, layers=layers)


LAYER_4 = clause(
    "LAYER-4",
    "must",
    FOCAL | TEXT,
    "Encoder outputs get every trained loss under the encoder suffix, with the option's class targets, their own "
    "matching, and a number of queries of their own.",
    [
        "fundamentalvision/Deformable-DETR models/deformable_detr.py:373-389",
        "IDEA-Research/DINO models/dino/dino.py:589",
    ],
)


@check(LAYER_4, on=BATCH, component="encoder")
def encoder_outputs_get_every_loss(seen: Seen) -> Iterator[Comparison]:
    if "enc" in seen.case.layers:
        yield from _returned(seen, "enc")


@check(
    LAYER_4,
    on=BATCH,
    component="encoder",
    after=["every_query_and_channel_is_trained", "every_token_of_the_class_is_a_positive"],
)
def encoder_outputs_are_trained_on_their_class_targets(seen: Seen) -> Iterator[Comparison]:
    for term in TERMS if "enc" in seen.case.layers else ():
        if seen.agrees(term, "final"):  # else the formula is to blame, not the encoder
            yield from value(seen, term, "enc", f"class targets: {seen.case.options.encoder_targets}")


@check(
    LAYER_4, on=BATCH, component="encoder", after=[the_assignment_is_optimal, the_cost_is_the_weighted_sum_of_the_three]
)
def encoder_outputs_have_their_own_matching(seen: Seen) -> Iterator[Comparison]:
    if "enc" in seen.case.layers and all(c.ok for c in optimal(seen, "final")):
        yield from optimal(seen, "enc")


@fault(encoder_outputs_get_every_loss, seen_in="IDEA-Research/DAB-DETR #75", fix="supervise the encoder outputs")
def no_encoder_losses(book: Textbook) -> Textbook:
    """Encoder outputs are not supervised."""
    return replace(
        book,
        layers=lambda inner, outputs: [x for x in book.under(inner.o).layers(outputs) if x.name != "enc"],
    )


@fault(encoder_outputs_are_trained_on_their_class_targets, fix="use the option's class targets")
def encoder_class_targets_exchanged(book: Textbook) -> Textbook:
    """The encoder's class targets are class 0 where they should be real, and real where they should be class 0."""

    def layer_targets(inner: Textbook, layer, targets):  # type: ignore[no-untyped-def]
        if layer.name != "enc":
            return targets
        if inner.o.encoder_targets == "class-zero":
            return targets
        last = [dict(t) for t in targets]
        for t in last:
            t["labels"] = t["labels"] * 0
            if "positive_map" in t and len(t["labels"]):
                t["token_labels"] = t["positive_map"][t["labels"]]
        return last

    return replace(book, layer_targets=layer_targets)


@fault(encoder_outputs_have_their_own_matching, fix="call the matcher on the encoder outputs")
def encoder_queries_in_their_order(book: Textbook) -> Textbook:
    """The first encoder queries are taken instead of a matching."""

    def layer_match(inner: Textbook, layer, every, targets):  # type: ignore[no-untyped-def]
        found = book.under(inner.o).layer_match(layer, every, targets)
        if layer.name != "enc":
            return found
        return [replace(m, query=m.query.argsort().argsort()) for m in found]

    return replace(book, layer_match=layer_match)


LAYER_5 = clause(
    "LAYER-5",
    "must",
    EVERY,
    "Mask losses and class_error are for the final layer only.",
    ["facebookresearch/detr models/detr.py:238-253"],
)


def _final_only(seen: Seen, *names: str) -> Iterator[Comparison]:
    """None of those quantities is returned with the suffix of another layer."""
    for layer in seen.case.layers[1:]:
        for name in names:
            key = f"{name}{seen.case.suffix(layer)}"
            stray = key in seen.got.keys
            yield holds(not stray, f"{key} of {layer}", f"none: {name} is the final layer's", "returned")


@check(LAYER_5, on=BATCH, component="auxiliary layers")
def class_error_is_for_the_final_layer(seen: Seen) -> Iterator[Comparison]:
    yield from _final_only(seen, "class_error")


@check(LAYER_5, on=MASKS, component="masks", profiles=MASKED)
def mask_losses_are_for_the_final_layer(seen: Seen) -> Iterator[Comparison]:
    yield from _final_only(seen, "loss_mask", "loss_dice", "class_error")


@fault(class_error_is_for_the_final_layer, fix="log it for the final layer only")
def class_error_of_every_layer(book: Textbook) -> Textbook:
    """class_error is logged for auxiliary and encoder outputs too."""

    def logged(inner: Textbook, every: list[Layer], targets: Any, matches: Any) -> Any:
        found = book.under(inner.o).logged(every, targets, matches)
        wrong = found.get("class_error", every[0].logits.new_tensor(100.0))
        return found | {f"class_error{layer.suffix}": wrong for layer in every}

    return replace(book, logged=logged)


@fault(mask_losses_are_for_the_final_layer, fix="skip 'masks' for auxiliary outputs")
def mask_losses_of_auxiliary_layers(book: Textbook) -> Textbook:
    """Auxiliary layers get the mask losses of the final layer's masks under suffixes of their own."""

    def layers(inner: Textbook, outputs: Any) -> list[Layer]:
        found: list[Layer] = book.under(inner.o).layers(outputs)
        return [replace(layer, masks=found[0].masks) if layer.name.startswith("aux") else layer for layer in found]

    return replace(book, layers=layers)
