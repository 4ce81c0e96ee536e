"""TOKEN: captions, where the candidate shows what builds its positive maps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from detr_conformance.captions import CAPTIONS, CUT, INSIDE, PLAIN, TWICE, CaptionCase, CaptionSeen
from detr_conformance.contract.compare import holds
from detr_conformance.registry import TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import Textbook

Span = tuple[int, int]


def _read(seen: Seen) -> tuple[CaptionCase, CaptionSeen]:
    assert isinstance(seen, CaptionSeen)
    assert isinstance(seen.case, CaptionCase)
    return seen.case, seen


def _own_tokens(seen: Seen, kind: str) -> Iterator[Comparison]:
    """Every class of a caption of this kind has its own tokens, and no other class's."""
    case, own = _read(seen)
    if case.kind != kind:
        return
    answer = own.answer
    if answer.positive is None:
        wanted, found = f"a map [{len(case.names)}, {len(case.pieces)}]", answer.raised or answer.odd
        yield holds(False, f'positive map of "{case.caption}"', wanted, found)
        return
    for k in range(len(case.names)):
        want, got = case.tokens(k), tuple(i for i in own.of(k) if i < len(case.pieces) and i not in case.nobody)
        yield holds(got == want, f"tokens of {case.quoted(k)}", case.shown(want), case.shown(got))


TOKEN_6 = clause(
    "TOKEN-6",
    "must",
    TEXT,
    "Where a builder of positive maps is shown: a class's tokens are those of its own characters in the caption, names "
    "of several words or word pieces whole; none is [CLS], [SEP], a separating dot or padding.",
    ["ashkamath/mdetr datasets/coco.py create_positive_map", "Grounding DINO, section 3.4"],
)


@check(TOKEN_6, on=CAPTIONS, component="tokens", takes_raising=True)
def a_class_has_the_tokens_of_its_own_characters(seen: Seen) -> Iterator[Comparison]:
    yield from _own_tokens(seen, PLAIN)


@check(TOKEN_6, on=CAPTIONS, component="tokens")
def separators_and_special_tokens_belong_to_no_class(seen: Seen) -> Iterator[Comparison]:
    case, own = _read(seen)
    if own.answer.positive is None:
        return
    for k in range(len(case.names)):
        spare = tuple(i for i in own.of(k) if i >= len(case.pieces) or i in case.nobody)
        what = f"dots, special tokens and padding among those of {case.quoted(k)}"
        yield holds(not spare, what, "no token", case.shown(spare))
    rest = own.answer.positive[len(case.names) :]
    if rest.numel():
        yield holds(not bool(rest.any()), f"rows beyond the {len(case.names)} classes", "zero", "some are not")


@fault(a_class_has_the_tokens_of_its_own_characters, fix="take every token that holds a character of the name")
def only_the_first_word_piece(book: Textbook) -> Textbook:
    """A class has only the first word piece of its name."""
    return _tokens_changed(book, lambda own, offsets: own[:1])


@fault(a_class_has_the_tokens_of_its_own_characters, fix="look up the last character, end − 1, and include its token")
def the_last_word_piece_is_left_out(book: Textbook) -> Textbook:
    """The token of the name's last character is taken for an exclusive end."""
    return _tokens_changed(book, lambda own, offsets: own[:-1])


@fault(a_class_has_the_tokens_of_its_own_characters, fix="count [CLS], which opens the text")
def tokens_counted_without_cls(book: Textbook) -> Textbook:
    """All tokens are one place too early: they are counted without [CLS]."""
    return _tokens_changed(book, lambda own, offsets: [i - 1 for i in own])


@fault(a_class_has_the_tokens_of_its_own_characters, fix="take the name to its last word")
def only_the_first_word_of_a_name(book: Textbook) -> Textbook:
    """A name of several words has only the tokens of its first."""

    def class_spans(inner: Textbook, caption: str, names: Sequence[str]) -> list[Span]:
        spans = book.under(inner.o).class_spans(caption, names)
        return [(start, start + len(name.split()[0])) for (start, _), name in zip(spans, names, strict=True)]

    return replace(book, class_spans=class_spans)


@fault(separators_and_special_tokens_belong_to_no_class, fix="end the name before the dot")
def the_dot_belongs_to_the_class_before_it(book: Textbook) -> Textbook:
    """A class has the separating dot after its name, too."""
    return _tokens_changed(book, lambda own, offsets: [*own, own[-1] + 1])


@fault(separators_and_special_tokens_belong_to_no_class, fix="leave out tokens without characters")
def special_tokens_belong_to_every_class(book: Textbook) -> Textbook:
    """Every class has [CLS] and [SEP], whose offsets (0, 0) are taken for characters."""
    return _tokens_changed(book, lambda own, offsets: [0, *own, len(offsets) - 1])


def _tokens_changed(book: Textbook, change: Any) -> Textbook:
    """The book whose tokens of a class go through ``change(own, offsets)``."""

    def span_tokens(inner: Textbook, span: Span, offsets: Sequence[Span]) -> list[int]:
        found: list[int] = change(book.under(inner.o).span_tokens(span, offsets), offsets)
        return found

    return replace(book, span_tokens=span_tokens)


TOKEN_7 = clause(
    "TOKEN-7",
    "must",
    TEXT,
    "Where a builder of positive maps is shown: a name inside another name does not take the other's tokens, and a "
    "name that occurs twice takes its own occurrence.",
    ["longzw1997/Open-GroundingDino models/GroundingDINO/groundingdino.py:808-855 does neither"],
)


@check(TOKEN_7, on=CAPTIONS, component="tokens", after=[a_class_has_the_tokens_of_its_own_characters])
def a_name_inside_another_does_not_take_its_tokens(seen: Seen) -> Iterator[Comparison]:
    yield from _own_tokens(seen, INSIDE)


@check(TOKEN_7, on=CAPTIONS, component="tokens", after=[a_class_has_the_tokens_of_its_own_characters])
def a_name_that_occurs_twice_takes_its_own_occurrence(seen: Seen) -> Iterator[Comparison]:
    yield from _own_tokens(seen, TWICE)


def _spans_found(book: Textbook, find: Any) -> Textbook:
    """The book that finds each name where ``find(caption, name)`` says that it begins."""

    def class_spans(inner: Textbook, caption: str, names: Sequence[str]) -> list[Span]:
        starts = [find(caption, name) for name in names]
        return [(start, start + len(name)) for start, name in zip(starts, names, strict=True)]

    return replace(book, class_spans=class_spans)


@fault(
    a_name_inside_another_does_not_take_its_tokens,
    seen_in="longzw1997/Open-GroundingDino create_positive_map (caption.find)",
    fix="keep the characters of each name while the caption is put together",
)
def first_substring_hit(book: Textbook) -> Textbook:
    """A name is where its letters first occur in the caption, "man" in "woman"."""
    return _spans_found(book, lambda caption, name: caption.find(name))


@fault(
    a_name_inside_another_does_not_take_its_tokens,
    fix="keep the characters of each name while the caption is put together",
)
def first_whole_word_hit(book: Textbook) -> Textbook:
    """A name is where it first occurs as whole words, "hydrant" in "fire hydrant"."""

    def find(caption: str, name: str) -> int:
        found = re.search(rf"\b{re.escape(name)}(?!\w)", caption)
        return found.start() if found else 0

    return _spans_found(book, find)


@fault(a_name_that_occurs_twice_takes_its_own_occurrence, fix="go through the caption name by name")
def the_last_occurrence_for_all(book: Textbook) -> Textbook:
    """Classes of one name all have its last occurrence, as when a dict maps names to tokens."""
    return _phrase_chosen(book, -1)


@fault(a_name_that_occurs_twice_takes_its_own_occurrence, fix="go through the caption name by name")
def the_first_occurrence_for_all(book: Textbook) -> Textbook:
    """Classes of one name all have its first occurrence."""
    return _phrase_chosen(book, 0)


def _phrase_chosen(book: Textbook, which: int) -> Textbook:
    def class_spans(inner: Textbook, caption: str, names: Sequence[str]) -> list[Span]:
        free = inner.phrases(caption)
        return [[span for span in free if caption[slice(*span)] == name][which] for name in names]

    return replace(book, class_spans=class_spans)


TOKEN_8 = clause(
    "TOKEN-8",
    "should",
    TEXT,
    "Where a builder of positive maps is shown: a caption that the length limit cuts raises, or the classes lost are "
    "reported.",
    ["longzw1997/Open-GroundingDino #108"],
)


@check(TOKEN_8, on=CAPTIONS, component="tokens", after=[a_class_has_the_tokens_of_its_own_characters])
def classes_beyond_the_limit_are_not_lost_silently(seen: Seen) -> Iterator[Comparison]:
    case, own = _read(seen)
    if case.kind != CUT:
        return
    answer = own.answer
    if answer.positive is None:
        what = f"positive map of {len(case.pieces)} tokens"
        yield holds(bool(answer.raised), what, "a map, or an error", answer.odd or answer.raised)
        return
    for k, name in enumerate(case.names):
        want, got = case.tokens(k), own.of(k)
        kept = set(want) <= set(got) or name in answer.reported
        expected = f"{case.shown(want)}, or an error that names it"
        yield holds(kept, f"tokens of {case.quoted(k)}", expected, f"{case.shown(got)}, and no error")


@fault(
    classes_beyond_the_limit_are_not_lost_silently,
    seen_in="longzw1997/Open-GroundingDino create_positive_map (zeros(n, 256))",
    fix="raise where a name ends beyond the map",
)
def classes_beyond_the_limit_vanish(book: Textbook) -> Textbook:
    """What lies beyond the limit is left out of the map without a word."""
    return replace(book, refuse_lost_classes=lambda inner, names, tokens, limit: None)
