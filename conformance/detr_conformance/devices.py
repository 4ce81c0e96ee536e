"""Where a candidate is called besides the CPU: one code path for every accelerator that torch knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from detr_conformance.errors import ConformanceError
from detr_conformance.simulated import DEVICE, Simulated

CPU: Final = "cpu"
AUTO: Final = "auto"
NONE: Final = "none"  # what auto comes to where there is no accelerator
SIMULATED: Final = "simulated"


@dataclass(frozen=True)
class Accelerator:
    """A kind of device: whether this machine has one, how torch calls it, and what to enter while it is in use."""

    present: Callable[[], bool]
    device: torch.device
    entered: Callable[[], AbstractContextManager[Any]] = nullcontext


def _present(name: str) -> Callable[[], bool]:
    def present() -> bool:
        module: Any = torch.backends.mps if name == "mps" else getattr(torch, name, None)
        return module is not None and bool(module.is_available())

    return present


KNOWN: Final[dict[str, Accelerator]] = {
    name: Accelerator(_present(name), torch.device(name)) for name in ("cuda", "mps", "xpu")
}
_OTHERS: Final = {
    CPU: Accelerator(lambda: True, torch.device(CPU)),
    SIMULATED: Accelerator(lambda: True, DEVICE, Simulated),
}


def names() -> tuple[str, ...]:
    """What a user may ask for."""
    return (AUTO, CPU, *KNOWN)


def present() -> tuple[str, ...]:
    """The accelerators of this machine."""
    return tuple(name for name, accelerator in KNOWN.items() if accelerator.present())


def chosen(asked: str) -> str:
    """The device that ``asked`` means on this machine: a name, ``cpu``, or ``none`` where auto finds no accelerator.

    Raises ConformanceError where it is not there, or there and of no use.
    """
    here = present() if asked not in _OTHERS else ()
    if asked == AUTO and not here:
        return NONE
    name = here[0] if asked == AUTO else asked
    if name in KNOWN and name not in here:
        others = f"; there is {' and '.join(here)}" if here else ", nor any other accelerator"
        raise ConformanceError(f"device {name!r}: torch finds none on this machine{others}")
    try:
        with of(name).entered():
            float(torch.zeros(1, device=of(name).device).sum())
    except Exception as error:
        raise ConformanceError(f"device {name!r}: torch finds it but cannot use it: {error}") from None
    return name


def of(name: str) -> Accelerator:
    """The accelerator of a name that ``chosen`` returned, or the CPU."""
    return KNOWN.get(name) or _OTHERS[name]


def switches(name: str) -> str:
    """What the candidate's process allows a device to round by, beside its dtypes; "" where that is nothing."""
    if name not in KNOWN:
        return ""
    found = {"float32 matmul precision": torch.get_float32_matmul_precision()}
    if name == "cuda":
        found |= {"TF32 in matmul": _on(torch.backends.cuda.matmul.allow_tf32)}
        found |= {"TF32 in cudnn": _on(torch.backends.cudnn.allow_tf32)}
    return f"{name}: " + ", ".join(f"{what} {how}" for what, how in found.items())


def _on(value: bool) -> str:
    return "on" if value else "off"


def declined(name: str) -> str:
    """Why nothing can be compared with the CPU, or ""."""
    if name == CPU:
        return "no accelerator was asked for: --conformance-device=auto takes what is there"
    return "there is no accelerator on this machine" if name == NONE else ""
