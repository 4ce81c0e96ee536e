"""TOKEN-6 to 8: which tokens of a caption belong to which class.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook

Span = tuple[int, int]


def phrases(book: Textbook, caption: str) -> list[Span]:
    """TOKEN-6. The characters [start, end) of every phrase between dots, without the blanks around it."""
    return [found.span() for found in re.finditer(r"[^.\s]([^.]*[^.\s])?", caption)]


def class_spans(book: Textbook, caption: str, names: Sequence[str]) -> list[Span]:
    """TOKEN-7. The characters of each class: the first phrase that is its name, and no earlier class's."""
    free = book.phrases(caption)
    found = []
    for name in names:
        own = next(span for span in free if caption[slice(*span)] == name)
        free.remove(own)
        found.append(own)
    return found


def span_tokens(book: Textbook, span: Span, offsets: Sequence[Span]) -> list[int]:
    """TOKEN-6. The tokens that hold a character of the span; [CLS], [SEP] and padding hold none."""
    return [i for i, (start, end) in enumerate(offsets) if max(start, span[0]) < min(end, span[1])]


def refuse_lost_classes(book: Textbook, names: Sequence[str], tokens: Sequence[Sequence[int]], limit: int) -> None:
    """TOKEN-8. Raises ValueError that names the classes of which a token is at the limit or beyond."""
    lost = [name for name, own in zip(names, tokens, strict=True) if max(own, default=0) >= limit]
    if lost:
        raise ValueError(f"the limit of {limit} tokens cuts off {', '.join(lost)}")


def positive_map(
    book: Textbook, caption: str, names: Sequence[str], offsets: Sequence[Span], limit: int | None
) -> Tensor:
    """TOKEN-6 to 8. [K,T]: 1 on every token of the class, T the limit or else the number of tokens."""
    tokens = [book.span_tokens(span, offsets) for span in book.class_spans(caption, names)]
    length = len(offsets) if limit is None else limit
    book.refuse_lost_classes(names, tokens, length)
    y = torch.zeros(len(names), length, dtype=torch.float64)
    for k, own in enumerate(tokens):
        y[k, [i for i in own if i < length]] = 1
    return y
