"""The textbook, right or with a fault, as a candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from detr_conformance.candidate import Candidate
from detr_reference.options import Options, options_of
from detr_reference.textbook import Layer, Textbook


class BookCriterion:
    """A criterion that computes what a textbook says, in float64 inside."""

    def __init__(self, book: Textbook) -> None:
        self.book, self.weight_dict = book, book.weights()

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All losses, in the dtype of the outputs."""
        dtype = outputs["pred_logits"].dtype
        return {key: value.to(dtype) for key, value in self.book(outputs, targets).losses.items()}

    def matcher(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Any:
        """The matching of one layer."""
        layer = Layer("final", "", outputs["pred_logits"].double(), outputs["pred_boxes"].double())
        wide = [{k: v.double() if v.is_floating_point() else v for k, v in t.items()} for t in targets]
        return self.book.indices(self.book.match(layer, wide))


def candidate_of(book: Textbook, profile: str, name: str = "textbook") -> Candidate:
    """A candidate whose factory takes every option. ``book``: any textbook; its own options do not matter."""
    base = options_of(profile)

    def build(**options: Any) -> BookCriterion:
        known = {k: v for k, v in options.items() if k in Options.__dataclass_fields__}
        return BookCriterion(book.under(base.with_(**known)))

    factory: Callable[..., Any] = build
    return Candidate(factory, profile, name=name)
