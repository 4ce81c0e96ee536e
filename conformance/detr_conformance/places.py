"""A known fault in some kinds of layers alone, the others being right: in the encoder, or in denoising."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any, Final

from detr_conformance.footprints import CLASS_COSTS, TERM_OF, changed, composed
from detr_conformance.registry import Fault
from detr_reference.textbook import Textbook

KINDS: Final = {
    "final": "the final layer",
    "aux": "auxiliary layers",
    "enc": "the encoder",
    "dn": "denoising layers",
}
IN_LAYERS: Final = frozenset(  # the formulas that a layer is matched and trained with
    {*TERM_OF, *CLASS_COSTS, "cost", "assign", "match", "layer_match", "layer_losses"}
)


def kind(layer: str) -> str:
    """The kind of a layer, from its name: final, aux0, enc, dn, dn_aux0."""
    return next(k for k in ("dn", "aux", "enc", "final") if layer.startswith(k))


def can_be_placed(fault: Fault) -> bool:
    """True for a fault of formulas that each layer has for itself."""
    return changed(composed((fault,))) <= IN_LAYERS


def placed(fault: Fault, kinds: Set[str]) -> Fault:
    """The fault in layers of these kinds alone."""

    def apply(book: Textbook) -> Textbook:
        wrong = fault.apply(book)

        def layer_losses(inner: Textbook, layer: Any, *rest: Any) -> Any:
            return (wrong if kind(layer.name) in kinds else book).under(inner.o).layer_losses(layer, *rest)

        def layer_match(inner: Textbook, layer: Any, *rest: Any) -> Any:
            return (wrong if kind(layer.name) in kinds else book).under(inner.o).layer_match(layer, *rest)

        return replace(book, layer_losses=layer_losses, layer_match=layer_match)

    where = " and ".join(words for name, words in KINDS.items() if name in kinds)
    return replace(fault, sentence=f"In {where} alone: {fault.sentence}", apply=apply)
