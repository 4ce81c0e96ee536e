"""Where a candidate comes from, so that a report says later what was judged."""

from __future__ import annotations

import functools
import hashlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def of(factory: Any) -> dict[str, str]:
    """``module``, ``sha256`` of its file, and ``distribution`` with its version, as far as they can be told."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    criterion = getattr(factory, "criterion", None)  # what stands for a factory around one that exists
    named = factory if hasattr(factory, "__qualname__") else type(factory if criterion is None else criterion)
    found: dict[str, str] = {}
    try:
        module = str(getattr(inspect.unwrap(named), "__module__", "") or "")
        file = inspect.getsourcefile(inspect.unwrap(named))
        found |= {"module": module} if module else {}
        found |= {"sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}
        top = module.partition(".")[0].replace("_", "-")
        found["distribution"] = f"{top} {version(top)}"
    except (PackageNotFoundError, TypeError, OSError, ValueError):
        pass
    return found
