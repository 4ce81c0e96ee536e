"""The candidate in processes of its own: it may hang, crash or end the process, and that is a finding.

A process is forked where the platform can, so that a live object needs no pickling and torch is imported once;
elsewhere it is spawned, which a string can bear.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from detr_conformance.cleaning import cleaned, exception
from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Call, Finding

if TYPE_CHECKING:
    from pathlib import Path

    from detr_conformance.golden_judge import Outcome
    from detr_conformance.registry import Check, Comparison
    from detr_conformance.runner import Identity, Settings

RESTARTS: Final = 2
TEN_MINUTES: Final = 600.0
WORDS: Final = 1_000_000  # bytes of stderr that a candidate may leave; only the last line is ever read
_LABEL: Final = 200


class Ended(NamedTuple):
    """A process that is no more: how it ended, and doing what."""

    how: str
    doing: str


class Worker:
    """Asks a ``Judge`` in another process, or two side by side. ``identity`` and ``finding`` always answer."""

    def __init__(self, spec: Any, settings: Settings, limit: float = 20.0) -> None:
        if not limit > 0:
            raise ConformanceError(f"limit={limit!r}; it must be a positive number of seconds")
        self._spec, self._settings, self._limit = spec, settings, limit
        self._found: dict[str, Finding] = {}
        self._ended: dict[str, Ended] = {}  # by experiment
        self._owner: dict[str, int] = {}  # by experiment, which process runs it
        self._left = RESTARTS
        self._processes: list[_Process | None] = [_Process(spec, settings, limit)]
        self._asked: list[deque[Check]] = [deque()]
        self.identity: Identity = cleaned(self._identity())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other processes."""
        for process in self._processes:
            if process is not None:
                process.stop()
        self._processes = [None for _ in self._processes]

    def ask_ahead(self, checks: Sequence[Check]) -> None:
        """Say which findings will be wanted, in their order: they are worked out side by side where there are two
        processors."""
        if self.identity.smoke.verdict != "pass":
            return
        experiments = {c.on.name: c.on.weight for c in checks}
        if len(experiments) > 1 and (os.cpu_count() or 1) > 1:
            self._processes.append(_Process(self._spec, self._settings, self._limit))
            self._asked.append(deque())
        load = [0.0 for _ in self._processes]
        for name in sorted(experiments, key=lambda n: -experiments[n]):
            self._owner[name] = load.index(min(load))
            load[self._owner[name]] += experiments[name]
        for check in checks:
            self._ask(check)

    def finding(self, check: Check) -> Finding:
        """The finding of one check."""
        found: Finding = cleaned(self._finding(check))
        return found

    def _finding(self, check: Check) -> Finding:
        from detr_conformance import runner

        if self.identity.smoke.verdict != "pass":
            return runner.blocked(check, "blocked by smoke: the wiring is not right yet")
        owner = self._owner.get(check.on.name, 0)
        while check.name not in self._found and check.on.name not in self._ended:
            if check not in self._asked[owner] and not self._ask(check):
                return runner.blocked(check, "the candidate ended its process too often to go on")
            self._receive(owner)
        if check.name in self._found:
            return self._found[check.name]
        how, doing = self._ended[check.on.name]
        if check.takes_raising:
            return runner.ended(check, self.identity.name, how, doing)
        by = runner.answering(check, self.identity.profile)
        return runner.blocked(check, f"the candidate {how}, in {doing}", by)

    def replayed(self, check: Check, call: Call, label: str) -> Comparison | None:
        """What a check finds wrong with a stored call, or None. Not while findings are asked ahead. Raises what
        ``Judge.replayed`` raises."""
        from detr_conformance.registry import Comparison

        answer = self._at_once("replayed", check.name, call, label)
        if isinstance(answer, Ended):
            return Comparison(False, "the call", "a dict of losses", answer.how)
        found: Comparison | None = answer
        return found

    def golden(self, name: str, folder: Path) -> Outcome | str:
        """What the candidate does on a stored golden case, or how it ended its process. Not while findings are asked
        ahead. Raises FixtureError."""
        answer = self._at_once("golden", name, folder)
        found: Outcome | str = answer.how if isinstance(answer, Ended) else answer
        return found

    def _at_once(self, method: str, *args: Any) -> Any:
        """The answer of the first process, started anew where it has ended, or Ended. Raises what it raises."""
        process = self._processes[0]
        if process is None:
            process = self._processes[0] = _Process(self._spec, self._settings, self._limit)
        process.send(method, *args)
        answer = process.receive()
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Ended):
            self._processes[0] = None
        return answer

    def _ask(self, check: Check) -> bool:
        """Send the question; False where the candidate has ended its process too often."""
        owner = self._owner.get(check.on.name, 0)
        process = self._processes[owner]
        if process is None:
            if not self._left:
                return False
            self._left -= 1
            process = self._processes[owner] = _Process(self._spec, self._settings, self._limit)
        self._asked[owner].append(check)
        process.send("finding", check.name)
        return True

    def _receive(self, owner: int) -> None:
        """Take the next answer of a process; where it has ended, ask a new one what was still open."""
        from detr_conformance import runner

        process = self._processes[owner]
        assert process is not None
        check = self._asked[owner].popleft()
        answer = process.receive(self._processes)
        if isinstance(answer, Finding):
            self._found[check.name] = answer
        elif isinstance(answer, BaseException):
            self._found[check.name] = runner.broken_suite(check, answer)
        else:
            self._ended[check.on.name] = answer
            self._processes[owner] = None
            rest = [c for c in self._asked[owner] if c.on.name not in self._ended]
            self._asked[owner].clear()
            for other in rest:
                self._ask(other)

    def _identity(self) -> Identity:
        from detr_conformance.runner import SMOKE, Identity

        process = self._processes[0]
        assert process is not None
        process.send("identity")
        answer = process.receive()
        if isinstance(answer, Identity):
            return answer
        if isinstance(answer, BaseException):
            self.close()
            raise answer
        self._processes[0] = None
        spec, profile = self._spec, self._settings.profile
        message = f"smoke  the candidate {answer.how}, nothing was judged\n      in {answer.doing}"
        return Identity(
            name=spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__),
            profile=profile or "detr",
            profile_from="given" if profile else "unknown, since the candidate never answered",
            options={},
            notes=(),
            spec=spec if isinstance(spec, str) else "",
            smoke=Finding(
                SMOKE, "The candidate can be called and returns losses.", SMOKE, "must", "weights and keys", "fail",
                message,
            ),
        )  # fmt: skip


class _Process:
    """One other process with a ``Judge`` in it, which answers in the order of the questions."""

    def __init__(self, spec: Any, settings: Settings, limit: float) -> None:
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self._limit = limit
        self._connection, theirs = context.Pipe()
        self._since = context.Value("d", 0.0)  # when the call began that is still going on
        self._doing = context.Array("c", _LABEL)
        self._errors = tempfile.NamedTemporaryFile(prefix="detr-conformance-", delete=False)  # noqa: SIM115
        arguments = (theirs, spec, settings, self._since, self._doing, self._errors.name, list(sys.path))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the test runner's own threads
            self._process.start()
        theirs.close()

    def send(self, method: str, *args: Any) -> None:
        """Ask; the answer comes with ``receive``."""
        with suppress(OSError):  # it has ended: receive will say so
            self._connection.send((method, *args))

    def receive(self, beside: Sequence[_Process | None] = ()) -> Any:
        """The next answer; an exception of ours; or Ended, after which the process is gone. Meanwhile what all
        processes ``beside`` it leave on stderr is kept short."""
        started = time.monotonic()
        try:
            while not self._connection.poll(0.02):
                for process in {self, *beside} - {None}:
                    process._trim()  # type: ignore[union-attr]
                since = float(self._since.value)
                if since and time.time() - since > self._limit:
                    return self._gone(f"did not return within {self._limit:g} s")
                if not self._process.is_alive() and not self._connection.poll(0):
                    return self._gone(self._how())
                if time.monotonic() - started > TEN_MINUTES + self._limit:
                    return self._gone("made the suite wait for over ten minutes")
            return self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._gone(self._how())

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._errors.close()
        with suppress(OSError):
            os.unlink(self._errors.name)

    def _trim(self) -> None:
        with suppress(OSError):
            if os.path.getsize(self._errors.name) > WORDS:
                os.truncate(self._errors.name, 0)

    def _how(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        said = self._last_words()
        if code is not None and code < 0:
            return f"was killed by signal {-code}{said}"
        return f"ended the process with exit status {code}{said}"

    def _last_words(self) -> str:
        try:
            with open(self._errors.name, "rb") as file:
                file.seek(max(0, os.path.getsize(self._errors.name) - 2000))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return f" ({lines[-1][:200]})" if lines else ""

    def _gone(self, how: str) -> Ended:
        doing = self._doing.value.decode("utf-8", "replace") or "the import of the candidate"
        self.stop()
        return Ended(how, doing)


def _serve(
    connection: Connection, spec: Any, settings: Settings, since: Any, doing: Any, errors: str, path: list[str]
) -> None:
    """The other process: bind, then answer until the connection closes."""
    sys.path[:] = path
    _silence(errors)
    _first_to_go()

    def tell(what: str) -> None:
        if what:
            doing.value = what.encode("utf-8", "replace")[: _LABEL - 1]
        since.value = time.time() if what else 0.0

    judge: Any = None
    while True:
        try:
            method, *args = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            from detr_conformance import observation

            with observation.watched(tell):
                if judge is None:
                    from detr_conformance.runner import Judge

                    with observation.foreign("the import of the candidate"):
                        judge = Judge(spec, settings)
                answer = getattr(judge, method)(*args)
        except BaseException as error:
            if _starved(error):  # it is the candidate that leaves no room
                print("out of memory", file=sys.stderr, flush=True)
                os._exit(1)
            answer = _portable(error)
        connection.send(answer)


def _portable(error: BaseException) -> BaseException:
    """The error itself where it can be pickled, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        fit = isinstance(error, Exception)  # what ends a program must not end ours
    except Exception:
        fit = False
    if not fit:
        return RuntimeError(f"{type(error).__name__}: {exception(error)}")
    return error


def _starved(error: BaseException) -> bool:
    """Whether memory gave out, in Python's words or in those of torch's allocator."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in exception(error)[:1000]
    )


def _first_to_go() -> None:
    """Where memory runs out on Linux, the candidate's process is the one to end, and nobody else's."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _silence(errors: str) -> None:
    """What the candidate prints belongs to nobody; its last words on stderr are kept for the verdict."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    faulthandler.disable()  # pytest's writes to the terminal
    null, log = os.open(os.devnull, os.O_RDWR), os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
