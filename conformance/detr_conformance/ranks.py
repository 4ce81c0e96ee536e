"""A batch on several ranks: real processes in one gloo group of torch.distributed, each with images of its own.

Each rank is forked from this process, so that a live candidate needs no pickling and torch is imported once. Beside an
accelerator a process that has differentiated may not fork any more (autograd has threads then); there a starter, a
fresh process that binds the candidate again by its name, forks the ranks.

Ranks that wait for each other end like this: one that has returned stays for ``GRACE`` seconds, then it is ended; one
that needs nothing of it goes on undisturbed, one that waits for it is told by gloo at once.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import torch
import torch.distributed as dist

from detr_conformance import devices, observation
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case
from detr_conformance.observation import Observation, observe, said

LIMIT: Final = 10.0  # seconds that all ranks of a case may take together
GRACE: Final = 0.2  # seconds that a rank which has returned waits for the others
LATE: Final = 1.0  # the same, for a candidate that has run into the limit before
START: Final = 60.0  # seconds that a starter may take until it has bound the candidate
_INTERFACES: Final = ("", "lo", "lo0")  # gloo's own choice, then loopback by name


class RanksError(RuntimeError):
    """The ranks could not be started, or not asked: no fault of the candidate's."""


@dataclass(frozen=True)
class Returned:
    """What the ranks of one case returned: observations by rank; and who did not return, in words, or ""."""

    calls: Mapping[int, Observation] = field(default_factory=dict)
    stuck: str = ""


def split(case: Case) -> list[Case]:
    """The share of each rank: one image."""
    return [case.images([b]) for b in range(len(case.counts))]


def declined(bound: Bound) -> str:
    """Why a candidate cannot be called on several ranks here, or ""."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this torch has no gloo"
    if not hasattr(os, "fork"):
        return "ranks are forked, which this platform cannot do"
    if dist.is_initialized():
        return "the candidate has initialised a process group of its own"
    if devices.present() and not bound.spec:
        return "beside an accelerator ranks are started by the candidate's name; this one is a live object"
    return "" if _interface() is not None else "two gloo ranks cannot reach each other on this machine"


def call(bound: Bound, case: Case) -> Returned:
    """Call the candidate on every rank's share at once. Raises RanksError."""
    if not devices.present():
        return forked(bound, case)
    return _starter(bound.spec, bound.profile).call(case)


_late: list[Bound] = []  # whose ranks have run into the limit: that is known, and is not waited for as long again


def forked(bound: Bound, case: Case) -> Returned:
    """The same, each rank forked from this process."""
    limit = LATE if any(bound is late for late in _late) else LIMIT
    shares = split(case)

    def observed(rank: int) -> Observation:
        got = observe(bound, shares[rank])
        return replace(got, case=None, criterion=None)  # type: ignore[arg-type]

    with _group(len(shares), observed, limit, _interface() or "") as group:
        found = group.returned()
    if group.ran_out:
        _late.append(bound)
    return replace(found, calls={rank: replace(got, case=shares[rank]) for rank, got in found.calls.items()})


@functools.cache
def _interface() -> str | None:
    """The network interface on which two ranks reach each other ("": gloo's own choice); None where none does."""

    def summed(rank: int) -> Observation:
        one = torch.ones(1)
        dist.all_reduce(one)
        return Observation(None, losses={"sum": float(one)})  # type: ignore[arg-type]

    for name in _INTERFACES:
        with suppress(RanksError), _group(2, summed, LIMIT, name) as group:
            if [got.losses.get("sum") for got in group.returned().calls.values()] == [2.0, 2.0]:
                return name
    return None


# --- a group of processes -------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    pid: int
    answer: Connection
    released: bool = False


@contextmanager
def _group(world: int, act: Callable[[int], Observation], limit: float, interface: str) -> Iterator[_Group]:
    """``world`` processes that do ``act(rank)`` in one process group. None is left when the context ends."""
    folder = tempfile.mkdtemp(prefix="detr-conformance-ranks-")
    ranks: list[_Rank] = []
    try:
        for rank in range(world):
            ours, theirs = Pipe(duplex=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the test runner's own threads
                pid = os.fork()
            if not pid:
                _serve_rank(act, rank, world, folder, theirs, limit, interface)
            theirs.close()
            ranks.append(_Rank(pid, ours))
        yield _Group(ranks, limit)
    finally:
        for one in ranks:
            _end(one)
            one.answer.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Group:
    """The parent's side."""

    def __init__(self, ranks: list[_Rank], limit: float) -> None:
        self._ranks, self._limit = ranks, limit
        self.ran_out = False

    def returned(self) -> Returned:
        """Wait until all ranks have returned, one has failed, or those that have not will not any more."""
        calls: dict[int, Observation] = {}
        start = time.monotonic()
        first: float | None = None
        while len(calls) < len(self._ranks):
            now = time.monotonic()
            if now - start > self._limit:
                self.ran_out = True
                return self._stuck(calls, f"not within {self._limit:g} s")
            if first is not None and now - first > GRACE:
                for rank in calls:
                    _end(self._ranks[rank])
            for rank, answer in self._answers(calls):
                if answer.raised and any(self._ranks[r].released for r in calls):
                    waited = "peer" in answer.raised
                    return self._stuck(calls, "it waited for one that had returned" if waited else answer.raised)
                if answer.raised:
                    return Returned({rank: answer})
                calls[rank] = answer
                first = time.monotonic() if first is None else first
        return Returned(dict(sorted(calls.items())))

    def _answers(self, calls: Mapping[int, Observation]) -> Iterator[tuple[int, Observation]]:
        """What comes in within a moment. A rank that fails brings down those that wait for it: it is heard first."""
        open_ranks = {one.answer: rank for rank, one in enumerate(self._ranks) if rank not in calls}
        found = self._heard(open_ranks, 0.02)
        if found and all("peer" in answer.raised for _, answer in found):  # its cause may not have come in yet
            heard = {rank for rank, _ in found}
            found += self._heard({c: r for c, r in open_ranks.items() if r not in heard}, LATE)
        yield from sorted(found, key=lambda item: "peer" in item[1].raised)

    def _heard(self, open_ranks: Mapping[Connection, int], seconds: float) -> list[tuple[int, Observation]]:
        ready = wait(list(open_ranks), timeout=seconds)
        return [(open_ranks[c], self._read(open_ranks[c])) for c in ready]  # type: ignore[index]

    def _read(self, rank: int) -> Observation:
        try:
            answer = _received(self._ranks[rank].answer)
        except (EOFError, OSError, pickle.UnpicklingError):
            _, status = os.waitpid(self._ranks[rank].pid, 0)
            self._ranks[rank].released = True
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by signal {-code}" if code < 0 else f"ended the process with exit status {code}"
            return Observation(None, raised=f"rank {rank} {how}")  # type: ignore[arg-type]
        if isinstance(answer, str):
            raise RanksError(f"rank {rank} of {len(self._ranks)} could not join its group: {answer}")
        assert isinstance(answer, Observation)
        return replace(answer, raised=f"rank {rank}: {answer.raised}") if answer.raised else answer

    def _stuck(self, calls: Mapping[int, Observation], why: str) -> Returned:
        missing = " and ".join(str(r) for r in range(len(self._ranks)) if r not in calls)
        there = " and ".join(map(str, sorted(calls)))
        after = f" though rank {there} did" if there else ""
        return Returned({}, f"rank {missing} did not return{after} ({why})")


def _end(rank: _Rank) -> None:
    """Kill a rank and wait for its end."""
    if not rank.released:
        rank.released = True
        with suppress(OSError):
            os.kill(rank.pid, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(rank.pid, 0)


def _serve_rank(
    act: Callable[[int], Observation],
    rank: int,
    world: int,
    folder: str,
    answer: Connection,
    limit: float,
    interface: str,
) -> None:
    """A rank: join the group, act, say what was found, and stay until killed, so that nobody else loses a peer.

    The group is not destroyed: that may wait for ever (torch 2.4, gloo). The alarm ends the process should whoever
    started it be killed before.
    """
    with suppress(BaseException):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(limit) + 2)
        observation._on_call.clear()  # calls are told apart by the parent; a rank has its own limit
        torch.set_num_threads(1)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        found: Observation | str
        try:
            store = f"file://{folder}/store"
            limits = timedelta(seconds=2 * limit)  # whoever started the rank ends it before
            os.environ |= _as_torchrun(rank, world)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limits)
            _tell_accelerate()
        except Exception as error:
            found = said(error)
        else:
            found = act(rank)
        answer.send_bytes(pickle.dumps(found))
        signal.pause()
    os._exit(1)


def _as_torchrun(rank: int, world: int) -> dict[str, str]:
    """The environment that torchrun gives a rank: some criterions ask it, and not torch.distributed."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(n) for name, n in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }


def _tell_accelerate() -> None:
    """A candidate that uses accelerate finds its state as a training script sets it up: of this rank."""
    if "accelerate" in sys.modules:
        from accelerate import PartialState

        PartialState._reset_state()
        PartialState(cpu=True)


# --- beside an accelerator ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _starter(spec: str, profile: str) -> _Starter:
    return _Starter(spec, profile)


class _Starter:
    """A fresh process that binds the candidate by its name and forks the ranks of one case after the other."""

    def __init__(self, spec: str, profile: str) -> None:
        self._connection, theirs = Pipe()
        code = f"from detr_conformance.ranks import _serve_starter; _serve_starter({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._send((spec, profile))

    def call(self, case: Case) -> Returned:
        """What the ranks of a case return. Raises RanksError."""
        self._send(case)
        try:
            if not self._connection.poll(START + LIMIT):
                self._process.kill()
            answer = _received(self._connection)
        except (EOFError, OSError):
            raise RanksError(f"the starter of ranks ended with exit status {self._process.wait()}") from None
        if isinstance(answer, str):
            raise RanksError(answer)
        assert isinstance(answer, Returned)
        return answer

    def _send(self, what: Any) -> None:
        with suppress(OSError):  # it has ended: reading will say so
            self._connection.send_bytes(pickle.dumps(what))  # its own send would share the tensors' memory


def _serve_starter(file: int) -> None:
    """The starter: it ends with whoever started it, whose end of the connection closes then."""
    connection = Connection(file)
    torch.set_num_threads(1)
    spec, profile = _received(connection)
    bound = bind(spec, profile)
    while True:
        try:
            case = _received(connection)
        except EOFError:
            return
        try:
            answer: Returned | str = forked(bound, case)
        except RanksError as error:
            answer = str(error)
        connection.send_bytes(pickle.dumps(answer))


def _received(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())
