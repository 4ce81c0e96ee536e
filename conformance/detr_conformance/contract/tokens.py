"""TOKEN: text as classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.contract.classification import factors, matched_only, targets_and_background
from detr_conformance.contract.compare import agree, holds, unless_tied
from detr_conformance.contract.keys import logged_quantities_have_no_weight_and_losses_are_unweighted
from detr_conformance.contract.normalisation import added_up
from detr_conformance.experiments import ALONE, BATCH, OTHER_LOGITS, PADDED, PROMPTS
from detr_conformance.registry import TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Pairs, Textbook

TOKEN_1 = clause(
    "TOKEN-1",
    "must",
    TEXT,
    "The target of a matched query is 1 on every token of its class and 0 elsewhere (not normalised, not one token); "
    "an unmatched query's is all zero.",
    ["longzw1997/Open-GroundingDino models/GroundingDINO/groundingdino.py:467-498"],
)


@check(
    TOKEN_1,
    on=BATCH,
    component="tokens",
    after=[logged_quantities_have_no_weight_and_losses_are_unweighted, "every_image_uses_its_own_prompt"],
)
def every_token_of_the_class_is_a_positive(seen: Seen) -> Iterator[Comparison]:
    yield from targets_and_background(seen)
    found = factors(seen)
    if found is None:
        return
    # a target that is split among tokens shows as positives whose weight depends on how many there are
    size = found.positive.sum(-1, keepdim=True).expand_as(found.positive)
    one, more = found.median(found.positive & (size == 1)), found.median(found.positive & (size > 1))
    if one is not None and more is not None:
        what = "weight of a token among several of its class against that of a single one"
        yield agree(what, one, more, 2e-3 * abs(one), "every token of the class has target 1")


@fault(every_token_of_the_class_is_a_positive, fix="set all tokens of the class")
def only_the_first_token_is_positive(book: Textbook) -> Textbook:
    """Only the first token of a class is a positive."""

    def target(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
        y = torch.zeros_like(x)
        y[pairs.query, (target["token_labels"][pairs.target] > 0).int().argmax(-1)] = 1
        return y

    return replace(book, token_class_target=target)


@fault(every_token_of_the_class_is_a_positive, fix="keep the logits of tokens apart")
def tokens_pooled_to_their_maximum(book: Textbook) -> Textbook:
    """Token logits are max-pooled to one logit a class before the loss."""

    def focal_image(inner: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        pooled = torch.where(inside, x, -torch.inf).amax(-1)
        positive = y.amax(-1)
        total: Tensor = inner.focal_term(pooled, positive).sum()
        return total

    return replace(book, focal_image=focal_image)


@fault(every_token_of_the_class_is_a_positive, seen_in="an early Grounding DINO trainer", fix="train all queries")
def background_is_never_trained(book: Textbook) -> Textbook:
    """The focal loss is taken on matched pairs only: unmatched queries are no negatives."""
    return replace(book, **matched_only(book))


TOKEN_2 = clause(
    "TOKEN-2",
    "must",
    TEXT,
    "Tokens outside text_mask have no part in the loss: neither value nor gradient, even where their logits are −inf.",
    ["transformers loss_grounding_dino.py:198-204"],
)


def _unmoved(seen: Seen, layers: Sequence[str], name: str) -> Iterator[Comparison]:
    twin = seen.twins[name]
    for layer in layers:
        for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
            if key in seen.got.losses and key in twin.got.losses:
                one, two, allowed = seen.got.losses[key], twin.got.losses[key], seen.allowed(term, layer)
                yield from unless_tied(seen, [layer], agree(f"{key} with {name}", one, two, allowed, "as before"))


def _outside(seen: Seen, layers: Sequence[str]) -> Iterator[Comparison]:
    yield from _unmoved(seen, layers, OTHER_LOGITS)
    outside = ~seen.case.outputs["text_mask"]
    for layer in layers:
        key, grad = seen.case.keys(layer)[0], seen.got.grads.get(("ce", layer), (None, None))[0]
        if key in seen.got.losses:
            yield holds(abs(seen.got.losses[key]) < float("inf"), key, "finite", f"{seen.got.losses[key]}")
        if grad is not None:
            silent = bool((grad.transpose(1, 2)[outside] == 0).all())
            what = f"gradient of {key} outside text_mask"
            yield holds(silent, what, "0 everywhere", "0 everywhere" if silent else "not 0")


@check(TOKEN_2, on=PROMPTS, component="tokens", takes_raising=True)
def tokens_outside_the_mask_have_no_part(seen: Seen) -> Iterator[Comparison]:
    yield from _outside(seen, ["final"])


@fault(tokens_outside_the_mask_have_no_part, seen_in="huggingface/transformers #31828", fix="select by text_mask")
def text_mask_is_ignored(book: Textbook) -> Textbook:
    """Padding tokens are trained as negatives."""
    return replace(book, in_loss=lambda book, x, mask: torch.ones_like(x, dtype=torch.bool))


TOKEN_3 = clause("TOKEN-3", "must", TEXT, "Appending masked tokens changes nothing.")


@check(TOKEN_3, on=PROMPTS, component="tokens", after=[tokens_outside_the_mask_have_no_part])
def appended_masked_tokens_change_nothing(seen: Seen) -> Iterator[Comparison]:
    yield from _unmoved(seen, seen.case.layers, PADDED)


@fault(appended_masked_tokens_change_nothing, fix="sum over tokens")
def class_loss_averaged_over_tokens(book: Textbook) -> Textbook:
    """The class loss is divided by the length of the text, padding included."""

    def focal_image(inner: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).focal_image(x, y, inside)
        return found / x.shape[-1]

    return replace(book, focal_image=focal_image)


TOKEN_4 = clause(
    "TOKEN-4",
    "must",
    TEXT,
    "Every image uses its own prompt: in a batch of prompts with unequal numbers of classes, each image's loss is that "
    "of the image alone.",
    ["longzw1997/Open-GroundingDino models/GroundingDINO/groundingdino.py:538-565"],
)


@check(TOKEN_4, on=ALONE, component="tokens", takes_raising=True)
def every_image_uses_its_own_prompt(seen: Seen) -> Iterator[Comparison]:
    for b, (name, twin) in enumerate(seen.twins.items()):
        own, alone = (s.got.grads.get(("ce", "final"), (None, None))[0] for s in (seen, twin))
        if own is None or alone is None or not twin.agrees("ce", "final"):
            continue
        allowed = twin.allowed_class_gradient("final", twin.want.grads["ce", "final"][0])[0]
        clear = torch.maximum(own[b].abs(), alone[0].abs()) > allowed
        for q in range(seen.case.queries):
            pulled, right = (
                (grad[q] < 0).logical_and(clear[q]).nonzero()[:, 0].tolist() for grad in (own[b], alone[0])
            )
            what = f"tokens that query {q} of image {b} is trained to find"
            same = holds(pulled == right, what, f"{right}, as {name}", f"{pulled} in the batch")
            yield from unless_tied(twin, ["final"], same)
    yield from added_up(seen, "ce")


@fault(
    every_image_uses_its_own_prompt,
    seen_in="transformers loss_grounding_dino.py:177-183 offsets by its own number of classes",
    fix="look a label up in its own image's map",
)
def prompt_of_the_previous_image(book: Textbook) -> Textbook:
    """From the second image on, labels are looked up with a wrong offset: in another image's prompt."""

    def losses(inner: Textbook, outputs, targets, given):  # type: ignore[no-untyped-def]
        fixed = book.under(inner.o)
        maps = torch.cat([t["positive_map"] for t in targets])
        wrong = []
        for b, t in enumerate(targets):
            rows = (t["labels"] + (len(t["positive_map"]) if b else 0)).clamp(max=len(maps) - 1)
            wrong.append({**t, "looked_up": maps[rows]})
        return replace(fixed, token_class_target=_looked_up).losses(outputs, wrong, given)

    return replace(book, losses=losses)


def _looked_up(book: Textbook, x: Tensor, target: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    y = torch.zeros_like(x)
    y[pairs.query] = (target["looked_up"][pairs.target] > 0).to(y.dtype)
    return y


LAYER_6 = clause("LAYER-6", "must", TEXT, "text_mask holds for every layer.")


@check(LAYER_6, on=PROMPTS, component="tokens", after=[tokens_outside_the_mask_have_no_part])
def the_text_mask_holds_for_every_layer(seen: Seen) -> Iterator[Comparison]:
    yield from _outside(seen, seen.case.layers[1:])


@fault(the_text_mask_holds_for_every_layer, fix="hand text_mask to auxiliary and encoder outputs")
def text_mask_for_the_final_layer_only(book: Textbook) -> Textbook:
    """Auxiliary and encoder outputs are trained without text_mask."""

    def layer_mask(inner: Textbook, layer, outputs):  # type: ignore[no-untyped-def]
        return book.under(inner.o).layer_mask(layer, outputs) if layer.name == "final" else None

    return replace(book, layer_mask=layer_mask)
