"""How a candidate's builder of positive maps is called, whatever its arguments are called, and what it answers.

Published ones take the caption and the names (``create_positive_map(tokenized, tokens_positive, cat_list, caption)``
of Open-GroundingDino, where tokens_positive are class indices), or the characters of each class
(``create_positive_map(tokenized, tokens_positive, max_num_entities)`` of MDETR, GLIP and mmdetection).
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance.observation import foreign, said

ARGUMENTS: Final = {
    "caption": ("caption", "text", "prompt", "text_prompt", "sentence"),
    "names": ("names", "classes", "class_names", "categories", "category_names", "cat_list", "phrases", "labels"),
    "tokenizer": ("tokenizer",),
    "tokenized": ("tokenized", "encoding", "encoded"),
    "spans": ("tokens_positive", "spans", "token_span", "token_spans", "char_spans"),
    "limit": (
        "max_length", "max_len", "max_text_len", "max_text_length", "max_num_entities", "max_query_len", "max_tokens",
        "num_tokens",
    ),
}  # fmt: skip
_ROLES: Final = {argument: role for role, own in ARGUMENTS.items() for argument in own}
_AMBIGUOUS: Final = ("labels", "tokens_positive")  # class indices, where another argument takes the names


@dataclass(frozen=True)
class Question:
    """A caption, its names, their characters, the limit (None: the builder's own) and what a limit usually is."""

    caption: str
    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    limit: int | None
    usual_limit: int


@dataclass(frozen=True)
class Way:
    """A tokenizer that a builder may take, and what it may mean by an ambiguous argument."""

    tokenizer: Any
    indices: bool = True


@dataclass(frozen=True, eq=False)
class Answer:
    """What a builder answered.

    ``positive``: [K', T'] bool, K' ≥ K, or None · ``raised``: the exception in one line, or "" · ``odd``: what it
    returned where that is no such map, or "" · ``reported``: what it warned of, logged, or returned beside the map.
    """

    positive: Tensor | None = None
    raised: str = ""
    odd: str = ""
    reported: str = ""


def takes(builder: Callable[..., Any], role: str) -> bool:
    """True where the builder has an argument of this role."""
    return role in _roles(builder, False).values()


def unfit(builder: Callable[..., Any]) -> str:
    """Why the builder cannot be called, or ""."""
    name = getattr(builder, "__name__", type(builder).__name__)
    unknown = [p.name for p in _parameters(builder) if p.default is p.empty and p.name not in _ROLES]
    if unknown:
        known = ", ".join(own[0] for own in ARGUMENTS.values())
        return f"{name} needs {', '.join(map(repr, unknown))}, which the suite does not know; it passes {known} by name"
    if not takes(builder, "tokenizer") and not takes(builder, "tokenized"):
        return f"{name} takes neither tokenizer nor tokenized, so that nobody knows what its columns are"
    return ""


def way(builder: Callable[..., Any], probe: Question, tokenizers: Sequence[Callable[[], Any]]) -> Way:
    """How the builder wants to be called: the first way in which it finds a token for every class of ``probe``; else
    the first in which it does not raise; else the last. ``tokenizers``: made when wanted; None is not installed."""
    last, silent = Way(None), None
    readings = (True, False) if _roles(builder, True) != _roles(builder, False) else (True,)
    for make in tokenizers:
        made = make()
        for indices in readings if made is not None else ():
            last = Way(made, indices)
            answer = ask(builder, probe, last)
            if answer.positive is not None and bool(answer.positive[: len(probe.names)].any(-1).all()):
                return last
            if silent is None and not answer.raised:
                silent = last
    return silent or last


def ask(builder: Callable[..., Any], question: Question, way: Way) -> Answer:
    """Call the builder. Never raises."""
    reports: list[str] = []
    with foreign(f"the positive map of {question.caption!r}"):
        try:
            positional, named = _arguments(builder, question, way)
            with _listening(reports):
                returned = builder(*positional, **named)
            return _read(returned, len(question.names), reports)
        except (Exception, SystemExit, RecursionError) as error:
            return Answer(raised=said(error))


def _arguments(builder: Callable[..., Any], question: Question, way: Way) -> tuple[list[Any], dict[str, Any]]:
    positional: list[Any] = []
    named: dict[str, Any] = {}
    roles = _roles(builder, way.indices)
    finds = "names" in roles.values()
    for p in _parameters(builder):
        role = roles[p.name]
        if p.default is not p.empty:
            # what it can do without is left to it where it is the very thing that is judged
            own = role in ("spans", "indices") and finds
            if not role or own or (role == "limit" and question.limit is None) or p.kind is p.POSITIONAL_ONLY:
                continue
        if p.kind is p.POSITIONAL_ONLY:
            positional.append(_value(role, question, way))
        else:
            named[p.name] = _value(role, question, way)
    return positional, named


def _roles(builder: Callable[..., Any], indices: bool) -> dict[str, str]:
    """What each argument is, "" where that is unknown; with ``indices``, an ambiguous one is class indices where
    another takes the names."""
    found = {p.name: _ROLES.get(p.name, "") for p in _parameters(builder)}
    for argument in _AMBIGUOUS if indices else ():
        if argument in found and any(role == "names" for name, role in found.items() if name != argument):
            found[argument] = "indices"
    return found


def _value(role: str, question: Question, way: Way) -> Any:
    values: dict[str, Callable[[], Any]] = {
        "caption": lambda: question.caption,
        "names": lambda: list(question.names),
        "tokenizer": lambda: way.tokenizer,
        "tokenized": lambda: _tokenized(way.tokenizer, question.caption),
        "spans": lambda: [[list(span)] for span in question.spans],
        "indices": lambda: list(range(len(question.names))),
        "limit": lambda: question.usual_limit if question.limit is None else question.limit,
    }
    return values[role]()


def _tokenized(tokenizer: Any, caption: str) -> Any:
    return tokenizer(caption, return_tensors="pt") if callable(tokenizer) else tokenizer.encode(caption)


def _read(returned: Any, classes: int, reports: list[str]) -> Answer:
    """The map [K', T'] of what was returned: itself, or the first of several."""
    found = returned
    if isinstance(returned, tuple) and returned:
        found = returned[0]
        reports.append(str(returned[1:]))
    try:
        values = torch.as_tensor(found).detach().cpu()
        if values.ndim != 2 or len(values) < classes or values.is_complex():
            shape = list(values.shape)
            return Answer(odd=f"a tensor of shape {shape}, {values.dtype}, not [{classes}, T]")
        return Answer(positive=values > 0, reported=" ".join(reports))
    except (TypeError, ValueError, RuntimeError):
        return Answer(odd=f"{'None' if found is None else f'a {type(found).__name__}'}, not a tensor [{classes}, T]")


@contextmanager
def _listening(reports: list[str]) -> Iterator[None]:
    """Collect what is warned of or logged."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(Exception):  # its arguments may not fit its text
                reports.append(record.getMessage())

    ear, root = Ear(logging.WARNING), logging.getLogger()
    root.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield
        reports.extend(str(w.message) for w in heard)
    finally:
        root.removeHandler(ear)


def _parameters(builder: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments that can be passed one by one."""
    try:
        found = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
