"""How a check states what it found: every comparison of the suite is made here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from detr_conformance.registry import Comparison
from detr_conformance.seen import Seen


def number(value: float) -> str:
    """A number as people read it: seven significant digits."""
    return f"{value:.7g}"


def agree(what: str, want: float, got: float | None, allowed: float, how: str = "") -> Comparison:
    """``got`` must be within ``allowed`` of ``want``; a missing or non-finite number never is."""
    if got is None:
        return Comparison(False, what, number(want), "no such loss", how=how)
    ok = math.isfinite(got) and abs(got - want) <= allowed
    if ok:
        return Comparison(True, what, "", "")  # nobody will read it
    share = f"off {100 * (got - want) / abs(want):+.3g} %, " if want and math.isfinite(got) else ""
    beyond = abs(got - want) / allowed if allowed and math.isfinite(got) else math.inf
    said = f"{share}allowed ±{allowed:.1e}"
    numbers = (want, got, allowed)
    return Comparison(False, what, number(want), number(got), said, how, beyond=beyond, numbers=numbers)


def holds(ok: bool, what: str, want: str, got: str, how: str = "") -> Comparison:
    """Something that is not one number must hold."""
    return Comparison(bool(ok), what, want, got, how=how)


def unless_tied(seen: Seen, layers: Iterable[str], comparison: Comparison) -> Iterator[Comparison]:
    """The comparison, but not a failing one where several assignments of those layers are as good."""
    if comparison.ok or all(map(seen.decided, layers)):
        yield comparison


def agree_rows(what: str, want: Tensor, got: Tensor, allowed: Tensor, how: str = "") -> Comparison:
    """Every entry of ``got`` must be within ``allowed`` of ``want``; the worst one is reported by its place."""
    if bool(((got - want).abs() <= allowed).all()):
        return Comparison(True, what, "", "")
    beyond = ((got - want).abs() / allowed.clamp(min=1e-300)).nan_to_num(nan=math.inf, posinf=math.inf)
    at = tuple(int(i) for i in torch.unravel_index(beyond.argmax(), beyond.shape))
    place = "".join(f"[{i}]" for i in at)
    return agree(f"{what}{place}", float(want[at]), float(got[at]), float(allowed[at]), how)
