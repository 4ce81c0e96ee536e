"""CLS: quantities for the log, for information only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.contract.compare import agree
from detr_conformance.experiments import BATCH
from detr_conformance.registry import DETR, EVERY, FOCAL, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Layer, Textbook

PERCENT_EPS = 1e-3  # of 100: a float32 percentage, however it was rounded

CLS_9 = clause(
    "CLS-9",
    "information",
    DETR | FOCAL,
    "class_error = 100 − top-1 accuracy in percent of the matched queries of the final layer.",
    ["facebookresearch/detr models/detr.py:124-126"],
)


@check(CLS_9, on=BATCH, component="class loss")
def class_error_is_what_accuracy_leaves(seen: Seen) -> Iterator[Comparison]:
    got = seen.got.losses.get("class_error")
    if got is not None and seen.case.total and not _tied(seen):
        layer, targets = seen.layers["final"], seen.targets("final")
        want = float(seen.book.class_error(layer, targets, seen.pairs["final"]))
        yield agree("class_error", want, got, PERCENT_EPS, "percent of the matched queries")


def _tied(seen: Seen) -> bool:
    """True where the highest logit of a matched query is not alone."""
    for x, pairs in zip(seen.layers["final"].logits, seen.pairs["final"], strict=True):
        top = x[pairs.query].topk(min(2, x.shape[-1]), -1).values
        if bool((top[:, 0] == top[:, -1]).any()) and x.shape[-1] > 1:
            return True
    return False


@fault(class_error_is_what_accuracy_leaves, fix="subtract the accuracy from 100")
def accuracy_instead_of_error(book: Textbook) -> Textbook:
    """class_error is the accuracy."""

    def class_error(inner: Textbook, *given: object) -> Tensor:
        found: Tensor = book.under(inner.o).class_error(*given)
        return 100 - found

    return replace(book, class_error=class_error)


CLS_10 = clause(
    "CLS-10",
    "information",
    EVERY,
    "cardinality_error = mean over images of |queries taken for objects − targets|: those whose highest logit is not "
    "the last channel's, or, of a sigmoid loss, those with a score above one half.",
    ["facebookresearch/detr models/detr.py:129-141", "huggingface/transformers #42199"],
)


@check(CLS_10, on=BATCH, component="class loss")
def cardinality_error_counts_objects(seen: Seen) -> Iterator[Comparison]:
    got = seen.got.losses.get("cardinality_error")
    if got is None:
        return
    layer, counts = seen.layers["final"], torch.tensor(seen.case.counts)
    last = layer.logits.shape[-1] - 1
    by_argmax = (layer.logits.argmax(-1) != last).sum(-1)
    ways = (
        [by_argmax] if seen.case.options.class_loss == "softmax" else [(layer.logits.amax(-1) > 0).sum(-1), by_argmax]
    )
    wants = [float((way - counts).abs().double().mean()) for way in ways]
    nearest = min(wants, key=lambda want: abs(want - got))
    yield agree("cardinality_error", nearest, got, PERCENT_EPS, f"queries − targets = {(ways[0] - counts).tolist()}")


@fault(cardinality_error_counts_objects, fix="take the absolute difference")
def cardinality_error_squared(book: Textbook) -> Textbook:
    """The difference between queries taken for objects and targets is squared."""

    def cardinality_error(inner: Textbook, layer: Layer, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        one = [
            book.under(inner.o).cardinality_error(replace(layer, logits=x[None]), [t])
            for x, t in zip(layer.logits, targets, strict=True)
        ]
        return torch.stack(one).square().mean()

    return replace(book, cardinality_error=cardinality_error)
