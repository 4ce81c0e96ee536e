"""GRAD: gradients, wherever the value is right already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.contract.compare import agree_rows, holds
from detr_conformance.contract.keys import trained
from detr_conformance.experiments import BATCH, EDGES
from detr_conformance.registry import EVERY, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS, OPS
from detr_reference.textbook import Textbook

GRAD_1 = clause(
    "GRAD-1", "must", EVERY, "The box gradient is exactly zero on unmatched queries and the textbook's on matched ones."
)


@check(GRAD_1, on=BATCH, component="gradients")
def boxes_get_the_textbook_gradient(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        for term in ("bbox", "giou"):
            got = seen.got.grads.get((term, layer), (None, None))[1]
            if not seen.agrees(term, layer):
                continue
            want = seen.want.grads[term, layer][1]
            name = f"gradient of loss_{term}{seen.case.suffix(layer)} at pred_boxes"
            if got is None:
                yield holds(False, name, "a tensor", "none")
                continue
            stray = got[_unmatched(seen, layer)]
            worst = float(stray.abs().max()) if len(stray) else 0.0
            yield holds(worst == 0, f"{name} of unmatched queries", "exactly 0", f"up to {worst:.3g}")
            allowed = allowed_at_boxes(seen, layer, want)
            everywhere = agree_rows(f"{name}, matched queries", want, got, allowed)
            if not everywhere.ok:
                rows = smooth(seen, layer)
                everywhere = agree_rows(f"{name}, matched queries", want[rows], got[rows], allowed[rows])
            yield everywhere
        yield _none(seen, "ce", layer, "pred_boxes")


def _none(seen: Seen, term: str, layer: str, at: str) -> Comparison:
    """A loss has no gradient at what it does not read."""
    stray = seen.got.grads.get((term, layer), (None, None))[("pred_logits", "pred_boxes").index(at)]
    worst = 0.0 if stray is None or not stray.numel() else float(stray.abs().max())
    name = f"gradient of loss_{term}{seen.case.suffix(layer)} at {at}"
    return holds(worst == 0, name, "none, or exactly 0", f"up to {worst:.3g}")


def allowed_at_boxes(seen: Seen, layer: str, want: Tensor) -> Tensor:
    """The allowed error of a layer's box gradient [B,Q,4]: the smaller the box, the larger."""
    sides = seen.layers[layer].boxes[..., 2:].amin(-1, keepdim=True).clamp(min=1e-3)
    return (OPS * EPS * (1 + 8 / sides) * want.abs().amax(-1, keepdim=True) + 1e-12).expand_as(want)


def _unmatched(seen: Seen, layer: str) -> Tensor:
    """The rows [B,Q] without a target."""
    rows = torch.ones(seen.layers[layer].boxes.shape[:2], dtype=torch.bool)
    for b, pairs in enumerate(seen.pairs[layer]):
        rows[b, pairs.query] = False
    return rows


def smooth(seen: Seen, layer: str) -> Tensor:
    """The rows [B,Q] that are matched and away from every kink (equal coordinates, aligned edges), where the gradient
    is a convention, and one that torch itself has changed."""
    boxes = seen.layers[layer].boxes
    smooth = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for b, pairs in enumerate(seen.pairs[layer]):
        pred, wanted = boxes[b, pairs.query], seen.targets(layer)[b]["boxes"][pairs.target]
        p, w = seen.book.corners(pred), seen.book.corners(wanted)
        edges = (p[:, :, None] - w[:, None, :]).abs().flatten(1).amin(-1)
        smooth[b, pairs.query] = ((pred - wanted).abs().amin(-1) > 1e-4) & (edges > 1e-4)
    return smooth


@fault(boxes_get_the_textbook_gradient, fix="do not detach the boxes of the GIoU")
def giou_without_gradient_of_sides(book: Textbook) -> Textbook:
    """The GIoU's gradient does not reach width and height."""

    def loss_giou(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
        held = torch.cat([pred[:, :2], pred[:, 2:].detach()], -1)
        found: Tensor = book.under(inner.o).loss_giou(held, wanted, nb)
        return found

    return replace(book, loss_giou=loss_giou)


GRAD_2 = clause("GRAD-2", "must", EVERY, "The class-logit gradient is the textbook's on every query.")


@check(GRAD_2, on=BATCH, component="gradients")
def logits_get_the_textbook_gradient(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        if not seen.agrees("ce", layer):
            continue
        got, want = seen.got.grads.get(("ce", layer), (None, None))[0], seen.want.grads["ce", layer][0]
        name = f"gradient of loss_ce{seen.case.suffix(layer)} at pred_logits"
        if got is None:
            yield holds(False, name, "a tensor", "none")
            continue
        yield agree_rows(name, want, got, seen.allowed_class_gradient(layer, want))
        yield from (_none(seen, term, layer, "pred_logits") for term in ("bbox", "giou"))


@fault(logits_get_the_textbook_gradient, fix="compute the class loss on the logits themselves")
def class_gradient_on_matched_queries_only(book: Textbook) -> Textbook:
    """Unmatched queries count in the class loss, but get no gradient from it."""

    def loss_ce(inner: Textbook, layer, targets, matches, *rest):  # type: ignore[no-untyped-def]
        keep = torch.zeros(layer.logits.shape[:2], dtype=torch.bool)
        for b, m in enumerate(matches):
            keep[b, m.query] = True
        held = torch.where(keep[..., None], layer.logits, layer.logits.detach())
        return book.under(inner.o).loss_ce(replace(layer, logits=held), targets, matches, *rest)

    return replace(book, loss_ce=loss_ce)


GRAD_4 = clause("GRAD-4", "must", EVERY, "Logged quantities carry no gradient.")


@check(GRAD_4, on=BATCH, component="gradients")
def logged_quantities_carry_no_gradient(seen: Seen) -> Iterator[Comparison]:
    weights = seen.got.weights or {}
    for key in sorted(seen.got.keys - set(trained(seen))):
        if key not in weights:
            attached = key in seen.got.attached
            yield holds(
                not attached, f"the logged {key}", "without gradient", "with" if attached else "without gradient"
            )
    yield holds(True, "trained losses", "apart", "apart")


@fault(logged_quantities_carry_no_gradient, fix="compute it under torch.no_grad()")
def logged_box_error_with_gradient(book: Textbook) -> Textbook:
    """A logged box error keeps its graph."""

    def logged(book: Textbook, every, targets, matches):  # type: ignore[no-untyped-def]
        return {"box_error": every[0].boxes.abs().mean()}

    return replace(book, logged=logged)


GRAD_5 = clause(
    "GRAD-5",
    "must",
    EVERY,
    "Every output that enters a trained loss gets a gradient tensor, zero where nothing is matched.",
    ["lyuwenyu/RT-DETR #672: data-parallel training hangs otherwise"],
)


@check(GRAD_5, on=EDGES, component="gradients")
def every_output_gets_a_gradient_tensor(seen: Seen) -> Iterator[Comparison]:
    for layer in seen.case.layers:
        if not set(seen.case.keys(layer)) <= seen.got.keys:
            continue
        for at, name in enumerate(("pred_logits", "pred_boxes")):
            found = [seen.got.grads.get((term, layer), (None, None))[at] for term in ("ce", "bbox", "giou")]
            some = any(g is not None for g in found)
            what = f"gradient of the total at {name} of {layer}"
            yield holds(some, what, "a tensor, zeros where nothing is matched", "a tensor" if some else "none")


@fault(every_output_gets_a_gradient_tensor, seen_in="lyuwenyu/RT-DETR #672", fix="keep the empty sum in the graph")
def no_box_gradient_without_matches(book: Textbook) -> Textbook:
    """Where nothing is matched the box losses are cut from the graph."""

    def cut(name: str):  # type: ignore[no-untyped-def]
        def loss(inner: Textbook, pred: Tensor, wanted: Tensor, nb: Tensor) -> Tensor:
            found: Tensor = getattr(book.under(inner.o), name)(pred, wanted, nb)
            return found if len(pred) else torch.zeros((), dtype=torch.float64)

        return loss

    return replace(book, loss_bbox=cut("loss_bbox"), loss_giou=cut("loss_giou"))
