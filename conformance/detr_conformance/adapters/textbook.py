"""The textbook, right or with a fault, as a candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_conformance.candidate import Candidate
from detr_reference.options import Options, options_of
from detr_reference.textbook import Layer, Textbook

_SHARED: dict[int, Textbook] = {}


def _of_shared(key: int) -> BookCriterion:
    return BookCriterion(_SHARED[key].copied())


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The books' float64 in the dtype of the outputs."""
    return value.to(dtype) if value.dtype == torch.float64 else value


class BookCriterion:
    """A criterion that computes what a textbook says, in float64 inside.

    Raises ValueError where the book refuses its options.
    """

    def __init__(self, book: Textbook) -> None:
        book.refuse_weights()
        self.book, self.training = book, True

    @property
    def weight_dict(self) -> dict[str, float]:
        """The weights of the book, which a fault may change from call to call."""
        return self.book.weights()

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """All losses, in the dtype of the outputs and on their device."""
        if torch.compiler.is_compiling():  # tracing a book takes seconds, and shows nothing
            apart: Any = torch.compiler.disable(self._losses)  # type: ignore[no-untyped-call]
            found: dict[str, Tensor] = apart(self.book.compiled(), outputs, targets)
            return found
        return self._losses(self.book, outputs, targets)

    def _losses(
        self, book: Textbook, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        like, book = outputs["pred_logits"], book.in_mode(self.training)
        if like.device.type == "cpu":
            return {key: _narrowed(value, like.dtype) for key, value in book(outputs, targets).losses.items()}
        losses = book(*_brought(book, (outputs, targets))).losses
        return {key: book.placed(_narrowed(value, like.dtype), like) for key, value in losses.items()}

    def train(self, mode: bool = True) -> BookCriterion:
        """As of a torch module."""
        self.training = mode
        return self

    def eval(self) -> BookCriterion:
        """As of a torch module."""
        return self.train(False)

    def state_dict(self) -> dict[str, Tensor]:
        """As of a torch module."""
        return self.book.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError where the names or shapes are not those of this criterion's own state."""
        own = {k: v.shape for k, v in self.book.state().items()}
        if own != {k: v.shape for k, v in state.items()}:
            raise RuntimeError(f"state_dict has {sorted(state)}, this criterion has {sorted(own)}")

    def __reduce__(self) -> Any:
        """Copies and pickles share the book: its formulas may be closures, which do not pickle."""
        key = id(self.book)
        _SHARED[key] = self.book
        self.book.copied()
        return _of_shared, (key,)

    def matcher(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Any:
        """The matching of one layer."""
        outputs, targets = _brought(self.book, (outputs, targets))
        layer = Layer("final", "", outputs["pred_logits"].double(), outputs["pred_boxes"].double())
        wide = [{k: v.double() if v.is_floating_point() else v for k, v in t.items()} for t in targets]
        return self.book.indices(self.book.match(layer, wide))


def _brought(book: Textbook, value: Any) -> Any:
    """Nested inputs where the book computes."""
    if isinstance(value, Tensor):
        return book.brought(value)
    if isinstance(value, Mapping):
        return {key: _brought(book, inner) for key, inner in value.items()}
    return [_brought(book, inner) for inner in value] if isinstance(value, (list, tuple)) else value


def candidate_of(book: Textbook, profile: str, name: str = "textbook") -> Candidate:
    """A candidate whose factory takes every option. ``book``: any textbook; its own options do not matter."""
    base = options_of(profile)

    def build(*, denoising: bool = False, **options: Any) -> BookCriterion:
        options["denoising"] = denoising
        known = {k: v for k, v in options.items() if k in Options.__dataclass_fields__}
        return BookCriterion(book.under(base.with_(**known)))

    def positive_map(caption: str, names: list[str], tokenizer: Any, max_length: int | None = None) -> Tensor:
        found: Tensor = book.positive_map(caption, names, tokenizer.encode(caption).offsets, max_length)
        return found

    factory: Callable[..., Any] = build
    builder = positive_map if base.class_loss == "token" else None
    return Candidate(factory, profile, name=name, positive_map=builder)
