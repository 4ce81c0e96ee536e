"""The candidate in a process of its own: it may hang, crash or end the process, and that is a finding.

The process is forked where the platform can, so that a live object needs no pickling and the caller's own process
never imports torch; elsewhere it is spawned, which a string can bear.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from detr_conformance.errors import ConformanceError
from detr_conformance.findings import Finding

if TYPE_CHECKING:
    from detr_conformance.registry import Check
    from detr_conformance.runner import Identity, Settings

RESTARTS: Final = 2
START: Final = 120.0  # seconds for importing torch and the candidate
_LABEL: Final = 200


class Worker:
    """Asks a ``Judge`` in another process. ``identity`` and ``finding`` always answer."""

    def __init__(self, spec: Any, settings: Settings, limit: float = 20.0) -> None:
        if not limit > 0:
            raise ConformanceError(f"limit={limit!r}; it must be a positive number of seconds")
        self._spec, self._settings, self._limit = spec, settings, limit
        self._ended: dict[str, tuple[str, str]] = {}  # by experiment: how the process ended, doing what
        self._left = RESTARTS
        self._process: Any = None
        self.identity = self._first()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other process."""
        self._stop()

    def finding(self, check: Check) -> Finding:
        """The finding of one check."""
        from detr_conformance import runner

        if self.identity.smoke.verdict != "pass":
            return runner.blocked(check, "blocked by smoke: the wiring is not right yet")
        if check.on.name not in self._ended:
            if self._process is None and not self._restart():
                return runner.blocked(check, "the candidate ended its process too often to go on")
            answer = self._ask("finding", check.name)
            if isinstance(answer, Finding):
                return answer
            if isinstance(answer, BaseException):
                return runner.broken_suite(check, answer)
            self._ended[check.on.name] = answer
        how, doing = self._ended[check.on.name]
        if check.takes_raising:
            return runner.ended(check, self.identity.name, how, doing)
        return runner.blocked(check, f"the candidate {how}, in {doing}")

    # --- the process ---

    def _first(self) -> Identity:
        from detr_conformance.runner import SMOKE, Identity

        self._start()
        answer = self._ask("identity")
        if isinstance(answer, Identity):
            return answer
        if isinstance(answer, BaseException):
            self._stop()
            raise answer
        how, doing = answer
        message = f"smoke  the candidate {how}, nothing was judged\n      in {doing}"
        return Identity(
            self._spec if isinstance(self._spec, str) else getattr(self._spec, "__name__", type(self._spec).__name__),
            self._settings.profile or "detr",
            "given" if self._settings.profile else "unknown, since the candidate never answered",
            {},
            (),
            Finding(SMOKE, "The candidate can be called and returns losses.", SMOKE, "must", "weights and keys",
                    "fail", message),
        )  # fmt: skip

    def _start(self) -> None:
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
        self._connection, theirs = context.Pipe()
        self._since = context.Value("d", 0.0)
        self._doing = context.Array("c", _LABEL)
        self._errors = tempfile.NamedTemporaryFile(prefix="detr-conformance-", delete=False)  # noqa: SIM115
        arguments = (theirs, self._spec, self._settings, self._since, self._doing, self._errors.name, list(sys.path))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the test runner's own threads
            self._process.start()
        theirs.close()

    def _restart(self) -> bool:
        if not self._left:
            return False
        self._left -= 1
        self._start()
        return True

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._errors.close()
        with suppress(OSError):
            os.unlink(self._errors.name)
        self._process = None

    def _ask(self, method: str, *args: Any) -> Any:
        """The answer; an exception of ours; or (how the process ended, doing what)."""
        started = time.monotonic()
        try:
            self._connection.send((method, *args))
            while not self._connection.poll(0.02):
                since = float(self._since.value)
                if since and time.time() - since > self._limit:
                    return self._dead(f"did not return within {self._limit:g} s")
                if not self._process.is_alive() and not self._connection.poll(0):
                    return self._dead(self._how())
                if not since and time.monotonic() - started > START + 600:
                    return self._dead("made the suite wait for over ten minutes")
            return self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._dead(self._how())

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

    def _dead(self, how: str) -> tuple[str, str]:
        doing = self._doing.value.decode("utf-8", "replace") or "the import of the candidate"
        self._stop()
        return how, doing


def _serve(
    connection: Connection, spec: Any, settings: Settings, since: Any, doing: Any, errors: str, path: list[str]
) -> None:
    """The other process: bind, then answer until the connection closes."""
    sys.path[:] = path
    _silence(errors)

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
            answer = _portable(error)
        connection.send(answer)


def _portable(error: BaseException) -> BaseException:
    """The error itself where it can be pickled, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _silence(errors: str) -> None:
    """What the candidate prints belongs to nobody; its last words on stderr are kept for the verdict."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    null, log = os.open(os.devnull, os.O_RDWR), os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(log, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
