"""How long something optional may take."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def budget(seconds: float) -> Callable[[], bool]:
    """A function that tells whether ``seconds`` of computing are spent, or eight times as long by the clock.

    Computing time, so that a busy machine changes nothing; the clock as well, for a candidate that waits.
    """
    computing, start = time.process_time() + seconds, time.monotonic()

    def spent() -> bool:
        gone = time.monotonic() - start
        if gone < seconds:  # which is quick to tell, and asked a thousand times
            return False
        return gone > 8 * seconds or time.process_time() > computing

    return spent


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it no garbage is collected, where there is a lot to make and little time: each collection goes through
    all that torch has loaded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
