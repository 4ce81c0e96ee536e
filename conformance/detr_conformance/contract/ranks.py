"""DIST: several ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detr_conformance.contract.compare import agree, agree_rows, holds
from detr_conformance.contract.gradients import (
    allowed_at_boxes,
    every_output_gets_a_gradient_tensor,
)
from detr_conformance.elsewhere import RANKS, STUCK
from detr_conformance.registry import EVERY, Comparison, check, clause, fault, known
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Textbook


def _terms(seen: Seen) -> tuple[str, ...]:
    """The terms that nb divides: the box losses, and the class loss where its divisor is nb."""
    return ("bbox", "giou", "ce") if seen.case.options.class_divisor == "boxes" else ("bbox", "giou")


def _world() -> int:
    """Number of ranks, as a candidate finds it."""
    return int(dist.get_world_size()) if dist.is_initialized() else 1


def _reduced(n: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over ranks, or another reduction."""
    total = n.clone()
    if dist.is_initialized():
        dist.all_reduce(total, op=op)
    return total


# --- clauses ---

DIST_1 = clause(
    "DIST-1",
    "must",
    EVERY,
    "Under torch.distributed nb = max(mean of N over the ranks, 1).",
    ["facebookresearch/detr models/detr.py:231-236"],
)


@check(DIST_1, on=RANKS, component="ranks", takes_raising=True)
def nb_is_the_mean_over_ranks(seen: Seen) -> Iterator[Comparison]:
    counts = seen.case.counts
    how = f"nb = max(({' + '.join(map(str, counts))}) / {len(counts)}, 1)"
    for rank, own in seen.twins.items():
        for layer in own.case.layers:
            for term in _terms(seen):
                key = f"loss_{term}{own.case.suffix(layer)}"
                if key in own.got.losses and seen.agrees(term, layer):  # what is wrong in one process is no news here
                    want, allowed = own.want.losses[key], own.allowed(term, layer)
                    yield agree(f"{key} of {rank}", want, own.got.losses[key], allowed, how)


@fault(
    nb_is_the_mean_over_ranks,
    seen_in="transformers RTDetrLoss, and ImageLoss without accelerate; huggingface/transformers #26844",
    fix="all_reduce the number of targets and divide it by the world size",
)
def nb_of_the_own_rank(book: Textbook) -> Textbook:
    """Every rank divides by its own number of targets."""
    return replace(book, over_ranks=lambda book, n: n)


@fault(
    nb_is_the_mean_over_ranks,
    seen_in="transformers ImageLoss under accelerate, whose reduce() is a mean already",
    fix="divide by the world size once",
)
def mean_over_ranks_divided_by_the_world_again(book: Textbook) -> Textbook:
    """The mean over the ranks is divided by the world size once more."""
    return replace(book, over_ranks=lambda book, n: _reduced(n) / _world() ** 2)


@fault(nb_is_the_mean_over_ranks, fix="clamp the mean, not what goes into it")
def clamped_before_the_mean(book: Textbook) -> Textbook:
    """The number of targets is clamped at 1 on every rank, before the mean is taken."""
    return replace(book, over_ranks=lambda book, n: _reduced(n.clamp(min=1)) / _world())


DIST_2 = clause(
    "DIST-2",
    "must",
    EVERY,
    "The mean of the ranks' gradients equals the gradient of one process with the whole batch, where there are as "
    "many targets as ranks (box losses; focal class losses).",
)


@check(DIST_2, on=RANKS, component="ranks", after=[nb_is_the_mean_over_ranks])
def gradients_of_the_ranks_are_those_of_the_whole_batch(seen: Seen) -> Iterator[Comparison]:
    if seen.case.total < len(seen.case.counts) or not seen.twins:
        return  # nb is clamped on the ranks and not in one process
    for layer in seen.case.layers:
        for term in _terms(seen):
            at = 0 if term == "ce" else 1
            want = seen.got.grads.get((term, layer), (None, None))[at]
            parts = [own.got.grads.get((term, layer), (None, None))[at] for own in seen.twins.values()]
            found = [p for p in parts if p is not None]
            if want is None or len(found) < len(parts) or not (seen.agrees(term, layer) and seen.decided(layer)):
                continue
            allowed = seen.allowed_class_gradient(layer, want) if term == "ce" else allowed_at_boxes(seen, layer, want)
            what = f"mean over ranks of the gradient of loss_{term}{seen.case.suffix(layer)}"
            how = "the gradient of one process with the whole batch"
            # each side is known to that
            yield agree_rows(what, want, torch.cat(found) / len(parts), 2 * allowed, how)


@fault(
    gradients_of_the_ranks_are_those_of_the_whole_batch,
    seen_in="nickgkan/butd_detr #48",
    fix="divide the sum by the world size: data-parallel training takes the mean of the gradients",
)
def sum_over_ranks(book: Textbook) -> Textbook:
    """Every rank divides by the number of targets of all ranks."""
    return replace(book, over_ranks=lambda book, n: _reduced(n))


@fault(
    gradients_of_the_ranks_are_those_of_the_whole_batch,
    fix="do not weight ranks: one nb for all of them does it",
)
def gradients_weighted_by_the_share_of_targets(book: Textbook) -> Textbook:
    """The losses are right, but every rank's gradient is weighted by its share of the targets once more."""

    def losses(inner: Textbook, outputs, targets, given):  # type: ignore[no-untyped-def]
        plain = book.under(inner.o)
        found = plain.losses(outputs, targets, given)
        own = torch.tensor(sum(len(t["boxes"]) for t in targets), dtype=torch.float64)
        share = own / plain.over_ranks(own).clamp(min=1) if _world() > 1 else 1.0
        return replace(found, losses={k: v.detach() + (v - v.detach()) * share for k, v in found.losses.items()})

    return replace(book, losses=losses)


DIST_3 = clause(
    "DIST-3",
    "must",
    EVERY,
    "A rank without targets takes part: no rank waits for ever, and every output gets a gradient.",
    ["lyuwenyu/RT-DETR #672"],
)


@check(DIST_3, on=RANKS, component="ranks", after=[every_output_gets_a_gradient_tensor])
def a_rank_without_targets_takes_part(seen: Seen) -> Iterator[Comparison]:
    stuck = seen.remarks.get(STUCK, "")
    yield holds(not stuck, "the ranks", "all return", stuck)
    for rank, own in seen.twins.items():
        for layer in own.case.layers if not own.case.total else ():
            if set(own.case.keys(layer)) <= own.got.keys:
                for at, name in enumerate(("pred_logits", "pred_boxes")):
                    some = any(own.got.grads.get((t, layer), (None, None))[at] is not None for t in TERMS)
                    what = f"gradient of the total at {name} of {layer}, {rank}"
                    yield holds(some, what, "a tensor, zeros where nothing is matched", "a tensor" if some else "none")


@fault(a_rank_without_targets_takes_part, fix="reduce on every rank, whatever it has")
def rank_without_targets_skips_the_reduction(book: Textbook) -> Textbook:
    """A rank without targets does not take part in the reduction, and the others wait for it."""

    def over_ranks(inner: Textbook, n: Tensor) -> Tensor:
        found: Tensor = book.under(inner.o).over_ranks(n) if float(n) else n
        return found

    return replace(book, over_ranks=over_ranks)


@fault(
    a_rank_without_targets_takes_part,
    seen_in="lyuwenyu/RT-DETR #672",
    fix="keep sums over nothing in the graph",
)
def constants_on_a_rank_without_targets(book: Textbook) -> Textbook:
    """A rank without targets returns zeros that belong to no graph."""

    def layer_losses(inner: Textbook, layer, targets: Sequence[Mapping[str, Tensor]], *given):  # type: ignore[no-untyped-def]
        found = book.under(inner.o).layer_losses(layer, targets, *given)
        some = any(len(t["boxes"]) for t in targets) or _world() == 1
        return found if some else {k: torch.zeros_like(v) for k, v in found.items()}

    return replace(book, layer_losses=layer_losses)


for name, sentence, cut in (
    ("mean-over-ranks-rounded-down", "The mean over the ranks is an integer division: a fraction is cut off.",
     torch.floor),
    ("mean-over-ranks-rounded-up", "The mean over the ranks is rounded up to a whole number.", torch.ceil),
    ("mean-over-ranks-rounded", "The mean over the ranks is rounded to a whole number.", torch.round),
):  # fmt: skip
    known(
        nb_is_the_mean_over_ranks, name, sentence, fix="divide as floats",
        around={"over_ranks": lambda before, book, n, cut=cut: cut(before(n))},
    )  # fmt: skip


for name, sentence, over in (
    ("own-number-divided-by-the-world", "Every rank divides its own number of targets by the world size: the "
     "reduction is missing.", lambda n: n / _world()),
    ("nb-of-the-fullest-rank", "nb is the largest number of targets of a rank.",
     lambda n: _reduced(n, dist.ReduceOp.MAX)),
    ("nb-of-the-emptiest-rank", "nb is the smallest number of targets of a rank.",
     lambda n: _reduced(n, dist.ReduceOp.MIN)),
    ("mean-over-ranks-that-have-targets", "Ranks without targets do not count in the mean.",
     lambda n: _reduced(n) / _reduced((n > 0).to(n.dtype)).clamp(min=1)),
    ("sum-over-ranks-and-own-number", "A rank's own number of targets is added to the sum over ranks once more.",
     lambda n: (_reduced(n) + n) / _world() if _world() > 1 else n),
):  # fmt: skip
    known(
        nb_is_the_mean_over_ranks, name, sentence, fix="all_reduce the number of targets, divide by the world size",
        over_ranks=lambda book, n, over=over: over(n),
    )  # fmt: skip
