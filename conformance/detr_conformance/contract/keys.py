"""KEY: names, weights and total."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from detr_conformance.cases import MASK_TERMS
from detr_conformance.contract.compare import agree, holds, number
from detr_conformance.denoised import DENOISING, DINO
from detr_conformance.experiments import BATCH, EMPTIED, REPEATED
from detr_conformance.masked import MASKED, MASKS
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Layer, Textbook


def trained(seen: Seen) -> tuple[str, ...]:
    """The keys of all trained losses of a case."""
    return tuple(key for layer in seen.case.layers for key in seen.case.keys(layer))


KEY_1 = clause(
    "KEY-1",
    "must",
    EVERY,
    "The trained losses are named loss_ce, loss_bbox and loss_giou, with the suffixes of the layers.",
    ["facebookresearch/detr models/detr.py:205-213"],
)


@check(KEY_1, on=BATCH, component="weights and keys", takes_raising=True)
def the_trained_losses_have_their_names(seen: Seen) -> Iterator[Comparison]:
    got = ", ".join(sorted(seen.got.keys)) or "nothing"
    for key in seen.case.keys("final"):
        yield holds(key in seen.got.keys, f"the loss {key!r}", "returned", f"the keys are {got}")


@fault(the_trained_losses_have_their_names, seen_in="IDEA-Research/detrex: loss_class", fix="map it with rename={…}")
def class_loss_under_another_name(book: Textbook) -> Textbook:
    """The class loss is called loss_class."""

    def layer_losses(inner: Textbook, layer: Layer, *rest: Any) -> dict[str, torch.Tensor]:
        found = book.under(inner.o).layer_losses(layer, *rest)
        return {key.replace("loss_ce", "loss_class"): value for key, value in found.items()}

    return replace(book, layer_losses=layer_losses)


KEY_2 = clause("KEY-2", "must", EVERY, "Every trained loss is a real scalar tensor on the device of the outputs.")


@check(KEY_2, on=BATCH, component="weights and keys")
def every_trained_loss_is_a_scalar_tensor(seen: Seen) -> Iterator[Comparison]:
    for key in trained(seen):
        if key in seen.got.keys:
            yield holds(key not in seen.got.odd, key, "a real scalar tensor", seen.got.odd.get(key, "that"))


@fault(every_trained_loss_is_a_scalar_tensor, fix="return the sum, a tensor without dimensions")
def losses_have_one_dimension(book: Textbook) -> Textbook:
    """Losses are vectors of one number."""
    return replace(book, loss_bbox=lambda inner, *args: book.under(inner.o).loss_bbox(*args)[None])


KEY_3 = clause(
    "KEY-3",
    "must",
    EVERY,
    "The set of keys depends on the structure of the outputs alone: not on values, not on emptiness.",
)


@check(KEY_3, on=REPEATED, component="weights and keys")
def the_keys_do_not_depend_on_the_targets(seen: Seen) -> Iterator[Comparison]:
    ordinary, without = seen.got.keys, seen.twins[EMPTIED].got.keys
    missing, extra = ", ".join(sorted(ordinary - without)), ", ".join(sorted(without - ordinary))
    got = "; ".join([f"{missing} missing"] * bool(missing) + [f"{extra} extra"] * bool(extra))
    yield holds(not got, "the keys of a batch without targets", "those of the same batch with targets", got or "those")


@fault(the_keys_do_not_depend_on_the_targets, fix="return box losses of 0 where nothing is matched")
def no_box_losses_without_targets(book: Textbook) -> Textbook:
    """A batch without targets gets no box losses."""

    def layer_losses(inner: Textbook, layer: Layer, targets: Any, *rest: Any) -> dict[str, torch.Tensor]:
        found = book.under(inner.o).layer_losses(layer, targets, *rest)
        keep = any(len(t["boxes"]) for t in targets)
        return {k: v for k, v in found.items() if keep or k.startswith("loss_ce")}

    return replace(book, layer_losses=layer_losses)


KEY_4 = clause(
    "KEY-4",
    "must",
    EVERY,
    "weight_dict holds a weight for every trained loss, the configured or the profile's; a suffix keeps its base's "
    "weight.",
    ["facebookresearch/detr models/detr.py:334-351"],
)


@check(KEY_4, on=BATCH, component="weights and keys")
def every_trained_loss_has_its_weight(seen: Seen) -> Iterator[Comparison]:
    if seen.got.weights is None and seen.bound.candidate.own_weights:
        yield holds(False, "criterion.weight_dict", "a dict of weights", "there is none")
    else:
        yield from _weighed(seen, set(trained(seen)), "the weight of its base")


@check(KEY_4, on=MASKS, component="masks", after=[every_trained_loss_has_its_weight], profiles=MASKED)
def mask_losses_have_their_weights(seen: Seen) -> Iterator[Comparison]:
    yield from _weighed(seen, {f"loss_{term}" for term in MASK_TERMS}, "the configured weight")


@check(KEY_4, on=DENOISING, component="denoising", after=[every_trained_loss_has_its_weight], profiles=DINO)
def denoising_losses_have_their_weights(seen: Seen) -> Iterator[Comparison]:
    suffixes = [seen.case.suffix(name) for name in seen.case.denoising]
    yield from _weighed(seen, {f"loss_{t}{s}" for t in TERMS for s in suffixes}, "the weight of its base")


def _weighed(seen: Seen, keys: set[str], how: str) -> Iterator[Comparison]:
    weights = seen.got.weights
    if weights is None or not seen.bound.candidate.own_weights:
        return
    for key, want in seen.book.weights().items():
        if key in keys and key in weights:
            yield agree(f"weight_dict[{key!r}]", want, weights[key], 1e-6 * abs(want), how)
        elif key in keys:
            known = ", ".join(sorted(weights)) or "nothing"
            yield holds(False, f"weight_dict[{key!r}]", number(want), f"no such key; the keys are {known}")


@fault(every_trained_loss_has_its_weight, seen_in="IDEA-Research/DAB-DETR #75", fix="add every suffix to weight_dict")
def suffixed_losses_without_a_weight(book: Textbook) -> Textbook:
    """weight_dict has the final layer's weights alone, so auxiliary and encoder losses are never trained."""
    return replace(
        book, weights=lambda inner: {k: v for k, v in book.under(inner.o).weights().items() if k.count("_") == 1}
    )


@fault(mask_losses_have_their_weights, fix="add loss_mask and loss_dice to weight_dict")
def mask_losses_without_a_weight(book: Textbook) -> Textbook:
    """weight_dict has no loss_mask and no loss_dice, so masks are never trained."""
    return replace(
        book,
        weights=lambda inner: {
            k: v for k, v in book.under(inner.o).weights().items() if k.split("_")[1] not in MASK_TERMS
        },
    )


@fault(denoising_losses_have_their_weights, fix="add every suffix to weight_dict, _dn and _dn_0 … as well")
def denoising_losses_without_a_weight(book: Textbook) -> Textbook:
    """weight_dict has nothing for denoising queries, so they are never trained."""
    return replace(
        book, weights=lambda inner: {k: v for k, v in book.under(inner.o).weights().items() if "_dn" not in k}
    )


@fault(denoising_losses_have_their_weights, fix="weigh denoising queries as the others")
def denoising_losses_of_weight_one(book: Textbook) -> Textbook:
    """Every denoising loss has the weight 1, whatever its base has."""
    return replace(
        book, weights=lambda inner: {k: 1.0 if "_dn" in k else v for k, v in book.under(inner.o).weights().items()}
    )


KEY_5 = clause("KEY-5", "must", EVERY, "Logged quantities have no weight; losses are returned unweighted.")


@check(KEY_5, on=BATCH, component="weights and keys")
def logged_quantities_have_no_weight_and_losses_are_unweighted(seen: Seen) -> Iterator[Comparison]:
    weights = seen.got.weights or {}
    for key in sorted(seen.got.keys - set(trained(seen)) - seen.got.attached):
        yield holds(not weights.get(key), f"weight_dict[{key!r}]", "none, it is logged only", f"{weights.get(key)}")
    base = {term: getattr(seen.case.options, f"{term}_loss_coef") for term in TERMS}
    scaled = [
        term
        for term in TERMS
        if abs(seen.got.losses.get(f"loss_{term}", 0.0) - base[term] * seen.want.losses[f"loss_{term}"])
        <= base[term] * seen.allowed(term, "final")
        and abs(seen.want.losses[f"loss_{term}"]) > 1e-3
    ]
    # all three, by factors that differ: else it is some other mistake
    weighted = len(scaled) == len(TERMS) and len(set(base.values())) > 1
    for term in scaled if weighted else ():
        key, want = f"loss_{term}", seen.want.losses[f"loss_{term}"]
        got = f"{number(seen.got.losses[key])}, {base[term]:g} times as much: its weight"
        yield holds(base[term] == 1, key, f"{number(want)}, unweighted", got)
    yield holds(not weighted, "the losses", "unweighted", "weighted" if weighted else "unweighted")


@fault(
    logged_quantities_have_no_weight_and_losses_are_unweighted,
    seen_in="lyuwenyu/RT-DETR returns weighted losses, as an option",
    fix="return losses as they are, or declare weighted=True",
)
def losses_returned_weighted(book: Textbook) -> Textbook:
    """Losses come multiplied by their weights, and whoever sums them with weight_dict weighs them twice."""

    def layer_losses(inner: Textbook, layer: Layer, *rest: Any) -> dict[str, torch.Tensor]:
        o = inner.o
        found = book.under(o).layer_losses(layer, *rest)
        by_term = {"ce": o.ce_loss_coef, "bbox": o.bbox_loss_coef, "giou": o.giou_loss_coef}
        return {key: by_term[key.split("_")[1]] * value for key, value in found.items()}

    return replace(book, layer_losses=layer_losses)


KEY_6 = clause(
    "KEY-6",
    "must",
    EVERY,
    "The total is Σ loss·weight over the keys that losses and weights share, nothing counted twice.",
    ["facebookresearch/detr engine.py:32-35"],
)


@check(KEY_6, on=BATCH, component="weights and keys", after=[every_trained_loss_has_its_weight])
def the_total_counts_every_trained_loss_once(seen: Seen) -> Iterator[Comparison]:
    weights, losses = seen.got.weights, seen.got.losses
    if weights is None:
        return
    keys = [k for k in trained(seen) if k in losses]
    want = sum(losses[k] * weights.get(k, 0.0) for k in keys)
    got = sum(losses[k] * w for k, w in weights.items() if k in losses)
    size = sum(abs(losses[k] * weights.get(k, 0.0)) for k in keys)
    yield agree("Σ loss·weight", want, got, 1e-6 * size, "over " + ", ".join(keys))


@fault(the_total_counts_every_trained_loss_once, fix="keep one key a loss")
def box_loss_counted_twice(book: Textbook) -> Textbook:
    """The final box loss is returned once more as loss_box, with a weight of its own."""

    def losses(inner: Textbook, outputs: Any, targets: Any, given: Mapping[str, Sequence[Any]]) -> Any:
        result = book.under(inner.o).losses(outputs, targets, given)
        return replace(result, losses=result.losses | {"loss_box": result.losses["loss_bbox"]})

    def weights(inner: Textbook) -> dict[str, float]:
        found: dict[str, float] = book.under(inner.o).weights()
        return found | {"loss_box": found["loss_bbox"]}

    return replace(book, losses=losses, weights=weights)
