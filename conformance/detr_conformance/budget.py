"""How long something optional may take."""

from __future__ import annotations

import time
from collections.abc import Callable


def budget(seconds: float) -> Callable[[], bool]:
    """A function that tells whether ``seconds`` of computing are spent, or eight times as long by the clock.

    Computing time, so that a busy machine changes nothing; the clock as well, for a candidate that waits.
    """
    computing, clock = time.process_time() + seconds, time.monotonic() + 8 * seconds
    return lambda: time.process_time() > computing or time.monotonic() > clock
