"""Captions: which tokens of a prompt belong to which class (Grounding DINO, GLIP, MDETR).

A prompt names its classes as phrases between dots, ``"woman . man . fire hydrant ."``. A class's tokens are those of
its own phrase, found by its characters: neither a search for the name, which finds "man" in "woman", nor a count of
words, since a word may be cut into several pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["build_caption", "create_positive_map"]

SEPARATOR: Final = "."
Span = tuple[int, int]


def build_caption(names: Sequence[str]) -> str:
    """The prompt that names these classes in their order: ``"woman . man ."``; "" of no class.

    Raises ValueError where a name is empty, is no string, or contains the dot that separates names.
    """
    return "".join(f"{name} {SEPARATOR} " for name in _checked(names)).strip()


def create_positive_map(caption: str, names: Sequence[str], tokenizer: Any, max_length: int | None = None) -> Tensor:
    """[K, T] float32: 1 on every token of the class, 0 elsewhere, on [CLS], [SEP], dots and padding too.

    ``caption``: phrases between dots, such as ``build_caption(names)``. ``names``: K names, each a whole phrase of the
    caption; letter case does not matter. A name takes the first such phrase after the one before it, else the first
    that is free: two classes of one name each have their own. ``tokenizer``: a fast tokenizer, of ``transformers``
    (called with return_offsets_mapping) or of ``tokenizers`` (``encode(caption).offsets``). ``max_length``: T, the
    tokens that the text model takes, special ones included; else T is the caption's number of tokens.

    Raises ValueError where a name is empty or no phrase of the caption, where the tokenizer gives no offsets, and
    where the limit cuts a class off, which it names. A class on the very last token of a cut caption is cut off, too:
    a tokenizer that truncates writes [SEP] there.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}; it must be at least 1, or None for no limit")
    spans = _own_phrases(caption, _checked(names))
    offsets = _offsets(tokenizer, caption)
    tokens = [[i for i, (a, b) in enumerate(offsets) if a < b and a < end and start < b] for start, end in spans]
    _nothing_lost(names, spans, tokens, offsets, max_length)
    positive = torch.zeros(len(spans), len(offsets) if max_length is None else max_length)
    for row, own in zip(positive, tokens, strict=True):
        row[own] = 1
    return positive


def _checked(names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string; it must be a list of names")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"names[{i}] is a {type(name).__name__}, not a string")
        if not name.strip():
            raise ValueError(f"names[{i}] is empty")
        if SEPARATOR in name:
            raise ValueError(f"names[{i}]={name!r} contains {SEPARATOR!r}, which separates names; leave it out")
    return names


def _own_phrases(caption: str, names: Sequence[str]) -> list[Span]:
    """The characters of each class, [start, end)."""
    phrases = _phrases(caption)
    known = [_plain(caption[start:end]) for start, end in phrases]
    taken: list[int] = []
    for name in names:
        after = taken[-1] + 1 if taken else 0
        order = [*range(after, len(known)), *range(after)]
        own = next((i for i in order if known[i] == _plain(name) and i not in taken), None)
        if own is None:
            raise ValueError(_missing(name, names, known, caption))
        taken.append(own)
    return [phrases[i] for i in taken]


def _phrases(caption: str) -> list[Span]:
    """Where each phrase between dots begins and ends, without the blanks around it."""
    found, start = [], 0
    for part in caption.split(SEPARATOR):
        name = part.strip()
        if name:
            first = start + part.index(name)
            found.append((first, first + len(name)))
        start += len(part) + len(SEPARATOR)
    return found


def _plain(name: str) -> str:
    """A name as names are compared: in lower case, with single blanks."""
    return " ".join(name.lower().split())


def _missing(name: str, names: Sequence[str], known: Sequence[str], caption: str) -> str:
    wanted, there = sum(_plain(n) == _plain(name) for n in names), known.count(_plain(name))
    if there:
        return f"{name!r} is named {wanted} times, and is a phrase of the caption {there} times: {caption!r}"
    return f"{name!r} is no phrase between dots of the caption {caption!r}"


def _offsets(tokenizer: Any, caption: str) -> list[Span]:
    """The characters of every token, [start, end); special tokens have none."""
    try:
        if callable(tokenizer):
            found = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        else:
            found = tokenizer.encode(caption).offsets
        return [(int(start), int(end)) for start, end in found]
    except (NotImplementedError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"a {type(tokenizer).__name__} gives no character offsets ({error}); it must be a fast tokenizer of "
            "transformers, or one of tokenizers"
        ) from error


def _nothing_lost(
    names: Sequence[str],
    spans: Sequence[Span],
    tokens: Sequence[Sequence[int]],
    offsets: Sequence[Span],
    max_length: int | None,
) -> None:
    """Raises ValueError that names the classes of which a token is cut off, or which never had one."""
    last = max((i for i, (a, b) in enumerate(offsets) if a < b), default=-1)
    closing = int(last + 1 < len(offsets))  # [SEP], which truncation keeps
    room = len(offsets)
    if max_length is not None and last + 1 + closing > max_length:
        room = max_length - closing
    read = offsets[last][1] if offsets and last >= 0 else 0  # the tokenizer may have a limit of its own
    lost, bare = [], []
    for name, (_, end), own in zip(names, spans, tokens, strict=True):
        if end > read or (own and own[-1] >= room):
            lost.append(name)
        elif not own:
            bare.append(name)
    if lost:
        limit = "its tokenizer's limit" if max_length is None else f"max_length={max_length}"
        raise ValueError(
            f"{limit} cuts the caption of {last + 1 + closing} tokens: {', '.join(map(repr, lost))} "
            f"{'is' if len(lost) == 1 else 'are'} lost; spread the classes over several captions"
        )
    if bare:
        raise ValueError(f"the tokenizer makes no token of {', '.join(map(repr, bare))}")
