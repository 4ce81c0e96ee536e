"""A device beside the CPU on a machine that has none: its tensors lie on the CPU and say that they do not.

With it the machinery of DEVICE and its faults are tried everywhere. Like an accelerator it refuses operations on
tensors of both devices, and conversion to numpy; its numbers are the CPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE: Final = torch.device("privateuseone", 0)  # a name that torch keeps free for others' devices
_DEVICE_OF: Final = torch.Tensor.device.__get__
_TO_NUMPY: Final = ("numpy", "__array__")
# what takes tensors of several devices on a real accelerator too
_ACROSS: Final = ("__getitem__", "__setitem__", "__set__", "copy_", "to", "type_as", "grad", "backward")

_WAITING: Final = (
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose", "nonzero",
    "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "is_nonzero",
)  # fmt: skip
_INDEXING: Final = ("__getitem__", "__setitem__", "index_put_")


class There(Tensor):
    """A tensor on the simulated device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Simulated(TorchFunctionMode):
    """While it is entered, ``DEVICE`` can be used like any device. ``traffic`` counts what costs time on a real one:
    transfers "to the host" and "to the device", and "waits" for a result that Python reads or that shapes depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        every = list(_tensors((args, kwargs)))
        there = any(isinstance(t, There) for t in every)
        if func == _DEVICE_OF and there:
            return DEVICE
        if there and name in _TO_NUMPY:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")
        if there and name not in _ACROSS and any(t.ndim and not isinstance(t, There) for t in every):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu"
            )
        if there and (name in _WAITING or (name in _INDEXING and any(t.dtype == torch.bool for t in every[1:]))):
            self.traffic["waits"] += 1
        wanted, args, kwargs = _wanted(name, args, dict(kwargs or {}))
        if wanted is not None and wanted != there:
            self.traffic["to the device" if wanted else "to the host"] += 1
        return _placed(func(*args, **kwargs), there if wanted is None else wanted, there)


def _wanted(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[bool | None, Any, dict[str, Any]]:
    """Whether a call names the simulated device (None: it names no device), and the call with the CPU instead."""
    named = [a for a in (*args[1:], *kwargs.values()) if name in ("to", "type_as") and isinstance(a, Tensor)]
    wanted: bool | None = isinstance(named[0], There) if named else False if name == "cpu" else None
    asked = [*args[1:]] if name == "to" else []
    for device in (a for a in (*asked, kwargs.get("device")) if isinstance(a, (str, torch.device))):
        wanted = torch.device(device).type == DEVICE.type
    if wanted:
        args = tuple("cpu" if isinstance(a, (str, torch.device)) else a for a in args)
        kwargs = {k: "cpu" if k == "device" else v for k, v in kwargs.items()}
    return wanted, args, kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))


def _placed(value: Any, there: bool, from_there: bool) -> Any:
    """A result with all of its tensors on the simulated device, or on the CPU; a copy where that is a transfer."""
    if isinstance(value, Tensor):
        if isinstance(value, There) == there:
            return value
        moved = value.as_subclass(There) if there else value.as_subclass(Tensor)
        return moved if there == from_there else moved.clone().as_subclass(There if there else Tensor)
    if not isinstance(value, (list, tuple)):
        return value
    inner = [_placed(v, there, from_there) for v in value]
    return getattr(type(value), "_make", type(value))(inner)  # also named tuples, and torch's own of max and sort
