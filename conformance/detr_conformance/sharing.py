"""Inputs that were found to fail a check, kept in a Hypothesis example database for the next run: a folder, or Redis
for several machines.

They are stored by profile and experiment, whoever failed on them: an input that shows one mistake shows others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from detr_conformance.cases import Case
from detr_conformance.errors import ConformanceError
from detr_fixtures import arrays

if TYPE_CHECKING:
    from hypothesis.database import ExampleDatabase

    from detr_conformance.candidate import Bound
    from detr_conformance.experiments import Experiment

FORMAT: Final = 1
MOST: Final = 200  # of one experiment that a run tries


class Shared:
    """The inputs found by other runs. ``where``: a folder, or ``redis://host:port/number``.

    Raises ConformanceError where nothing can be kept there.
    """

    def __init__(self, where: str) -> None:
        self._where, self._database = where, _opened(where)
        with self._telling():
            next(iter(self._database.fetch(b"detr-conformance")), None)

    def cases(self, bound: Bound, experiment: Experiment) -> Iterator[Case]:
        """Those that the candidate can be called with, always in the same order."""
        with self._telling():
            stored = sorted(self._database.fetch(_key(bound, experiment)))[:MOST]
        for data in stored:
            case = _case(data, bound)
            if case is not None:
                yield case

    def keep(self, bound: Bound, experiment: Experiment, case: Case) -> None:
        """Keep a case, if it is a call that can be stored."""
        if experiment.drawn is None or type(case) is not Case:
            return
        with suppress(TypeError, ConformanceError), self._telling():  # losing it loses no verdict
            self._database.save(_key(bound, experiment), _data(case, bound))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """A failure of the database as one clear error."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) or type(error).__module__.startswith("redis"):
                raise ConformanceError(f"database={self._where!r} cannot be used: {error}") from None
            raise


def _opened(where: str) -> ExampleDatabase:
    from hypothesis.database import DirectoryBasedExampleDatabase

    if "://" not in where:
        return DirectoryBasedExampleDatabase(where)
    if not where.startswith(("redis://", "rediss://", "unix://")):
        raise ConformanceError(f"database={where!r}; it must be a folder or redis://host:port/number")
    try:
        from hypothesis.extra.redis import RedisExampleDatabase
        from redis import Redis
    except ImportError:
        raise ConformanceError(f"database={where!r} needs the package redis: pip install redis") from None
    try:
        return RedisExampleDatabase(Redis.from_url(where, socket_connect_timeout=5))
    except ValueError as error:
        raise ConformanceError(f"database={where!r}: {error}") from None


def _key(bound: Bound, experiment: Experiment) -> bytes:
    return f"detr-conformance {FORMAT}: {bound.profile}: {experiment.name}".encode()


def _data(case: Case, bound: Bound) -> bytes:
    given, own = asdict(case.options), asdict(bound.options)
    changed = {name: value for name, value in given.items() if value != own[name]}
    packed = arrays.to_text(case.outputs, case.targets)
    return json.dumps({"label": case.label, "options": changed, "npz": packed}, sort_keys=True).encode("utf-8")


def _case(data: bytes, bound: Bound) -> Case | None:
    """The stored case; None where it is damaged, or under options that the candidate does not let vary."""
    try:
        raw = json.loads(data)
        if not set(raw["options"]) <= bound.varies:
            return None
        outputs, targets = arrays.nested(arrays.from_text(raw["npz"]))
        return Case(f"shared: {raw['label']}", bound.options.with_(**raw["options"]), outputs, tuple(targets))
    except (KeyError, TypeError, ValueError):
        return None
