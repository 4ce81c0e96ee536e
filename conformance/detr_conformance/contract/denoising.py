"""DN: contrastive denoising queries, whose targets are known and not matched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.contract.compare import agree, agree_rows, holds, unless_tied
from detr_conformance.denoised import BESIDE_DENOISING, DENOISING, DINO
from detr_conformance.registry import Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS, OPS
from detr_reference.textbook import TERMS, Layer, Pairs, Textbook

# --- what the losses must be ---


def _known(seen: Seen, name: str) -> tuple[Layer, list[Pairs], float]:
    """A denoising layer, its positives with their targets, and its divisor nb·G."""
    layer = next(x for x in seen.book.denoising_layers(seen.case.outputs) if x.name == name)
    pairs = seen.book.denoising_pairs(layer, seen.targets("final"))
    return layer, pairs, seen.nb * layer.groups


def allowed_of(seen: Seen, term: str, name: str) -> float:
    layer, pairs, divisor = _known(seen, name)
    targets, book = seen.targets("final"), seen.book
    if term == "ce":
        return tolerance.of_focal(book, layer.logits, _positives(seen, name), divisor)
    of = tolerance.of_bbox if term == "bbox" else tolerance.of_giou
    return of(*book.matched_boxes(layer, targets, pairs), divisor)


def allowed_class_gradient(seen: Seen, name: str, want: Tensor) -> Tensor:
    """The allowed error of the gradient of loss_ce_dn at the logits [B,P,C] of denoising queries."""
    layer, _, divisor = _known(seen, name)
    parts = tolerance.parts_of_focal(seen.book, layer.logits, _positives(seen, name), divisor)
    return tolerance.of_class_gradient(want, parts, seen.eps)


def _positives(seen: Seen, name: str) -> Tensor:
    layer, pairs, _ = _known(seen, name)
    images = zip(layer.logits, seen.targets("final"), pairs, strict=True)
    return torch.stack([seen.book.focal_class_target(*image) for image in images])


def _value(seen: Seen, term: str, name: str) -> Comparison:
    key = f"loss_{term}{seen.case.suffix(name)}"
    _, pairs, divisor = _known(seen, name)
    how = f"positives in all groups: {sum(map(len, pairs))}; divided by nb · groups = {divisor:g}"
    return agree(key, seen.want.losses[key], seen.got.losses.get(key), allowed_of(seen, term, name), how)


def _returned(seen: Seen, *terms: str) -> Iterator[Comparison]:
    """The values of those terms, of every denoising layer that has them."""
    for name in seen.case.denoising:
        for term in terms:
            if f"loss_{term}{seen.case.suffix(name)}" in seen.got.losses:
                yield _value(seen, term, name)


DN_1 = clause(
    "DN-1",
    "must",
    DINO,
    "Contrastive denoising: positives reconstruct their target, negatives and padding slots are background; the "
    "divisor is nb · groups; the keys end in _dn and _dn_{i}.",
    ["Zhang 2022 (DINO), section 3.3", "IDEA-Research/DINO models/dino/dino.py:502-541"],
)


@check(DN_1, on=DENOISING, component="denoising", takes_raising=True)
def every_denoising_layer_gets_every_loss(seen: Seen) -> Iterator[Comparison]:
    for name in seen.case.denoising:
        for key in seen.case.keys(name):
            got = "returned" if key in seen.got.keys else "the keys are " + ", ".join(sorted(seen.got.keys))
            yield holds(key in seen.got.keys, f"the loss {key!r} of {name}", "returned", got)


@check(DN_1, on=DENOISING, component="denoising")
def positives_reconstruct_the_boxes_of_their_targets(seen: Seen) -> Iterator[Comparison]:
    yield from _returned(seen, "bbox", "giou")


@check(DN_1, on=DENOISING, component="denoising")
def negatives_and_padding_are_background(seen: Seen) -> Iterator[Comparison]:
    yield from _returned(seen, "ce")


@check(DN_1, on=DENOISING, component="denoising")
def denoising_queries_get_the_textbook_gradient(seen: Seen) -> Iterator[Comparison]:
    for name in seen.case.denoising:
        layer, _, divisor = _known(seen, name)
        sides = layer.boxes[..., 2:].amin(-1, keepdim=True).clamp(min=1e-3)
        for term, at in (("ce", 0), ("bbox", 1), ("giou", 1)):
            if not _value(seen, term, name).ok:
                continue
            got, want = seen.got.grads[f"{term}_dn", name][at], seen.want.grads[f"{term}_dn", name][at]
            what = f"gradient of loss_{term}{seen.case.suffix(name)} at pred_{('logits', 'boxes')[at]}"
            if got is None:
                yield holds(False, what, "a tensor", "none")
            elif at == 0:
                yield agree_rows(what, want, got, allowed_class_gradient(seen, name, want))
            else:
                allowed = OPS * EPS * (1 + 8 / sides) * want.abs().amax(-1, keepdim=True) + 1e-12 / divisor
                rows = smooth(seen, name)
                yield agree_rows(what, want[rows], got[rows], allowed.expand_as(want)[rows])


def smooth(seen: Seen, name: str) -> Tensor:
    """The rows [B,P] but positives at a kink (equal coordinates, aligned edges), where the gradient is a convention."""
    layer, known, _ = _known(seen, name)
    smooth = torch.ones(layer.boxes.shape[:2], dtype=torch.bool)
    for b, pairs in enumerate(known):
        pred, wanted = layer.boxes[b, pairs.query], seen.targets("final")[b]["boxes"][pairs.target]
        p, w = seen.book.corners(pred), seen.book.corners(wanted)
        edges = (p[:, :, None] - w[:, None, :]).abs().flatten(1)
        if len(pairs):
            smooth[b, pairs.query] = ((pred - wanted).abs().amin(-1) > 1e-4) & (edges.amin(-1) > 1e-4)
    return smooth


def _divided(book: Textbook, by: Any) -> Textbook:
    return replace(book, denoising_divisor=lambda inner, layer, nb: nb * by(layer.groups))


@fault(every_denoising_layer_gets_every_loss, fix="go through the auxiliary outputs of the denoising queries")
def no_denoising_of_auxiliary_layers(book: Textbook) -> Textbook:
    """Only the final layer's denoising queries are trained: there is _dn, and no _dn_{i}."""
    return replace(book, denoising_layers=lambda inner, outputs: book.under(inner.o).denoising_layers(outputs)[:1])


@fault(
    every_denoising_layer_gets_every_loss,
    seen_in="lyuwenyu/RT-DETR: every layer is _dn_{i}, the last one too",
    fix="give the final layer the suffix _dn",
)
def final_denoising_layer_numbered_like_the_others(book: Textbook) -> Textbook:
    """The final layer's denoising losses are called _dn_{i} as well, with the number after the last."""

    def numbered(inner: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
        found = book.under(inner.o).denoising_layers(outputs)
        return [replace(x, suffix=f"_dn_{len(found) - 1}") if x.name == "dn" else x for x in found]

    return replace(book, denoising_layers=numbered)


@fault(positives_reconstruct_the_boxes_of_their_targets, fix="divide by nb · groups")
def denoising_divided_by_nb_alone(book: Textbook) -> Textbook:
    """Denoising losses are divided by nb, and grow with the number of groups."""
    return _divided(book, lambda groups: 1)


@fault(positives_reconstruct_the_boxes_of_their_targets, fix="multiply nb by the groups once")
def denoising_divided_by_the_groups_twice(book: Textbook) -> Textbook:
    """nb is multiplied by the number of groups, and by it once more."""
    return _divided(book, lambda groups: groups**2)


@fault(
    positives_reconstruct_the_boxes_of_their_targets,
    fix="a group is its positives and its negatives: pad_size // groups slots",
)
def groups_a_half_apart(book: Textbook) -> Textbook:
    """Groups are taken to begin where their predecessor's positives end, so that every second is made of negatives."""
    return replace(book, group_slots=lambda inner, layer: book.under(inner.o).group_slots(layer) // 2)


@fault(positives_reconstruct_the_boxes_of_their_targets, fix="take the positives of every group")
def positives_of_the_first_group_only(book: Textbook) -> Textbook:
    """Only the first group's positives reconstruct their targets."""
    return replace(book, positive_slots=lambda inner, layer, n: book.under(inner.o).positive_slots(layer, n)[:1])


@fault(
    positives_reconstruct_the_boxes_of_their_targets,
    seen_in="mmdetection #8362",
    fix="keep an entry for every image, empty where it has no targets",
)
def images_without_targets_shift_the_others(book: Textbook) -> Textbook:
    """Images without targets are skipped, and the positives of the next image are looked for in their place."""

    def pairs(inner: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        found = book.under(inner.o).denoising_pairs(layer, targets)
        return [m for m in found if len(m)] + [m for m in found if not len(m)]

    def matched_boxes(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Any:
        return book.under(inner.o).matched_boxes(layer, _shifted(targets) if layer.groups else targets, matches)

    def loss_ce(inner: Textbook, layer: Layer, targets: Any, *rest: Any) -> Tensor:
        found: Tensor = book.under(inner.o).loss_ce(layer, _shifted(targets) if layer.groups else targets, *rest)
        return found

    return replace(book, denoising_pairs=pairs, matched_boxes=matched_boxes, loss_ce=loss_ce)


def _shifted(targets: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    return [t for t in targets if len(t["boxes"])] + [t for t in targets if not len(t["boxes"])]


@fault(positives_reconstruct_the_boxes_of_their_targets, fix="take the targets that the queries were made from")
def denoising_queries_are_matched(book: Textbook) -> Textbook:
    """Denoising queries are matched like others, one for each target, instead of reconstructing their own."""
    return replace(book, denoising_pairs=lambda inner, layer, targets: inner.match(layer, targets))


@fault(negatives_and_padding_are_background, fix="train the second half of a group as background")
def negatives_trained_as_positives(book: Textbook) -> Textbook:
    """Negatives reconstruct their target like positives."""

    def slots(inner: Textbook, layer: Layer, n: int) -> Tensor:
        first: Tensor = book.under(inner.o).positive_slots(layer, n)
        return torch.cat([first, first + inner.group_slots(layer) // 2])

    return replace(book, positive_slots=slots)


@fault(negatives_and_padding_are_background, fix="leave slots beyond an image's own targets background")
def padding_slots_trained_as_positives(book: Textbook) -> Textbook:
    """Empty slots are filled with an image's targets again, and trained as positives."""

    def pairs(inner: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        found = []
        for target in targets:
            n = len(target["boxes"])
            slots = inner.positive_slots(layer, inner.group_slots(layer) // 2 if n else 0)
            found.append(Pairs(slots.flatten(), (torch.arange(slots.shape[1]) % max(n, 1)).repeat(len(slots))))
        return found

    return replace(book, denoising_pairs=pairs)


@fault(
    negatives_and_padding_are_background,
    seen_in="IDEA-Research/DN-DETR trains the noised slots alone, having no negatives",
    fix="train all slots; those without a target are negatives in every channel",
)
def denoising_of_positives_only(book: Textbook) -> Textbook:
    """Negatives and padding slots have no part in the class loss."""

    def focal_loss(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs], *rest: Any) -> Tensor:
        plain = book.under(inner.o)
        if layer.groups:
            plain = replace(plain, focal_image=lambda b, x, y, inside: b.focal_term(*_positive_rows(x, y)).sum())
        found: Tensor = plain.focal_loss(layer, targets, matches, *rest)
        return found

    return replace(book, focal_loss=focal_loss)


def _positive_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows = (y > 0).any(-1)
    return x[rows], y[rows]


@fault(denoising_queries_get_the_textbook_gradient, fix="keep the denoising predictions in the graph")
def denoising_of_boxes_without_gradient_of_sides(book: Textbook) -> Textbook:
    """The box losses of denoising queries do not reach width and height."""

    def matched_boxes(inner: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs]) -> Any:
        pred, wanted = book.under(inner.o).matched_boxes(layer, targets, matches)
        held = torch.cat([pred[:, :2], pred[:, 2:].detach()], -1)
        return (held if layer.groups else pred), wanted

    return replace(book, matched_boxes=matched_boxes)


DN_2 = clause(
    "DN-2",
    "must",
    DINO,
    "Denoising queries have no part in the matching nor in the plain losses, and never change them.",
    ["IDEA-Research/DINO models/dino/dino.py:474-586"],
)


@check(DN_2, on=BESIDE_DENOISING, component="denoising", takes_raising=True)
def denoising_queries_do_not_change_the_plain_losses(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        for term, key in zip(TERMS, seen.case.keys(layer), strict=True):
            for name, twin in seen.twins.items():
                if key in seen.got.losses:
                    want, got = twin.got.losses.get(key), seen.got.losses[key]
                    allowed, how = 2 * seen.allowed(term, layer), f"the loss {name}"
                    same = agree(key, got, want, allowed) if want is None else agree(key, want, got, allowed, how)
                    yield from unless_tied(seen, [layer], same)


@check(DN_2, on=BESIDE_DENOISING, component="denoising")
def plain_and_denoising_losses_move_their_own_queries_only(seen: Seen) -> Iterator[Comparison]:
    for term, layers, of in [
        *((term, seen.case.denoising, "plain") for term in TERMS),
        *((f"{term}_dn", seen.case.layers, "denoising") for term in TERMS),
    ]:
        for layer in layers:
            stray = [g for g in seen.got.grads[term, layer] if g is not None and bool((g != 0).any())]
            what = f"gradient of the {of} loss_{term.removesuffix('_dn')} on the predictions of {layer}"
            yield holds(not stray, what, "none", "some")


@fault(
    denoising_queries_do_not_change_the_plain_losses,
    seen_in="huggingface/transformers #48528",
    fix="split the denoising queries off before the losses",
)
def denoising_queries_join_the_plain_ones(book: Textbook) -> Textbook:
    """Denoising queries stand among the plain ones, are matched with targets, and count as background."""

    def layers(inner: Textbook, outputs: Mapping[str, Any]) -> list[Layer]:
        plain = book.under(inner.o)
        known = {x.name.removeprefix("dn_"): x for x in plain.denoising_layers(outputs)}
        known = {"final" if name == "dn" else name: x for name, x in known.items()}

        def joined(x: Layer) -> Layer:
            dn = known.get(x.name)
            if dn is None:
                return x
            return replace(x, logits=torch.cat([dn.logits, x.logits], 1), boxes=torch.cat([dn.boxes, x.boxes], 1))

        return [joined(x) for x in plain.layers(outputs)]

    return replace(book, layers=layers)


@fault(
    denoising_queries_do_not_change_the_plain_losses,
    seen_in="lyuwenyu/RT-DETR rebinds num_boxes in place, there after its last use",
    fix="give the denoising losses a divisor of their own",
)
def plain_losses_divided_by_the_groups(book: Textbook) -> Textbook:
    """nb is multiplied by the number of groups for all losses."""

    def losses(inner: Textbook, outputs: Mapping[str, Any], targets: Any, given: Any) -> Any:
        plain = book.under(inner.o)
        known = plain.denoising_layers(outputs)
        if known:
            plain = replace(
                plain,
                num_boxes=lambda b, targets: book.under(b.o).num_boxes(targets) * known[0].groups,
                denoising_divisor=lambda b, layer, nb: nb,
            )
        return plain.losses(outputs, targets, given)

    return replace(book, losses=losses)


@fault(
    plain_and_denoising_losses_move_their_own_queries_only,
    fix="keep plain and denoising predictions apart",
)
def class_loss_shared_with_denoising_queries(book: Textbook) -> Textbook:
    """The plain class loss has the denoising queries' gradient besides: the two are added up before they are named."""

    def losses(inner: Textbook, outputs: Mapping[str, Any], targets: Any, given: Any) -> Any:
        result = book.under(inner.o).losses(outputs, targets, given)
        dn = result.losses.get("loss_ce_dn")
        if dn is None:
            return result
        shared = result.losses["loss_ce"] + dn - dn.detach()
        return replace(result, losses=result.losses | {"loss_ce": shared})

    return replace(book, losses=losses)
