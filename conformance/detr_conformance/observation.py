"""What a candidate returned for a case, in a form that checks can read, and how it is called.

The candidate is foreign code: whatever it does short of ending the process becomes part of the observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from detr_conformance import cleaning, devices
from detr_conformance.candidate import Bound
from detr_conformance.cases import ENC, Case
from detr_reference.textbook import Pairs, textbook

Grads = tuple[Tensor | None, ...]  # of logits and boxes, and of masks where they are trained


@dataclass(frozen=True, eq=False)
class Observation:
    """What one call returned.

    ``raised``: the exception in one line, or "" · ``message``: all that it says · ``losses``: every real scalar by
    its contract name · ``odd``: what every other returned value is instead · ``grads``: by (term, layer) the gradients
    of logits and boxes of the sum of that term's losses, None where the output got none · ``attached``: keys whose
    value requires gradient · ``dtypes``: the dtype of each returned tensor · ``weights``: weight_dict · ``changed``:
    which input the call changed.
    """

    case: Case
    raised: str = ""
    message: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    odd: Mapping[str, str] = field(default_factory=dict)
    grads: Mapping[tuple[str, str], Grads] = field(default_factory=dict)
    attached: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    changed: str = ""
    criterion: Any = field(default=None, repr=False)
    device: str = "cpu"

    @property
    def keys(self) -> frozenset[str]:
        """All keys that were returned."""
        return frozenset(self.losses) | frozenset(self.odd)

    @property
    def pairs(self) -> Mapping[str, list[Pairs]]:
        """What the matcher returns for each layer, as far as it can be called; it is called when first asked for."""
        return self._answer[0]

    @property
    def bad_pairs(self) -> str:
        """What is wrong with the matcher's answer, or ""."""
        return self._answer[1]

    @cached_property
    def _answer(self) -> tuple[dict[str, list[Pairs]], str]:
        with devices.of(self.device).entered():
            return _matches(self.criterion, self.case, devices.of(self.device).device)


_on_call: list[Callable[[str], None]] = []


@contextmanager
def watched(on_call: Callable[[str], None]) -> Iterator[None]:
    """Tell ``on_call`` before ("what is being called") and after ("") every call of foreign code."""
    _on_call.append(on_call)
    try:
        yield
    finally:
        _on_call.pop()


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Around every call of foreign code."""
    for tell in _on_call:
        tell(what)
    try:
        yield
    finally:
        for tell in _on_call:
            tell("")


def observe(
    bound: Bound,
    case: Case,
    *,
    criterion: Any = None,
    grads: bool = True,
    inputs: bool = False,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: str = "cpu",
) -> Observation:
    """Call the candidate on a case, with a criterion built for it unless one is given.

    ``grads``: differentiate what it returns · ``inputs``: look whether it changes its inputs · ``around``: what the
    caller calls it under, autocast for one · ``device``: where the inputs are; what is found lies on the CPU.
    """
    with devices.of(device).entered():
        found = _observe(bound, case, criterion, grads, inputs, around, devices.of(device).device)
    return replace(found, device=device)


def _observe(
    bound: Bound,
    case: Case,
    criterion: Any,
    grads: bool,
    inputs: bool,
    around: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> Observation:
    outputs, targets, leaves = case.fresh(device)
    raised = message = ""
    returned: Any = None
    with foreign(case.label):
        try:
            if criterion is None:
                criterion = bound.build(case.options)
            if device.type != "cpu" and callable(getattr(criterion, "to", None)):
                criterion.to(device)
            before = _snapshot((outputs, targets)) if inputs else {}
            with around():
                returned = criterion(outputs, targets)
            changed = _difference(before, _snapshot((outputs, targets))) if inputs else ""
        except BaseException as error:  # also SystemExit and KeyboardInterrupt are its own doing
            raised, message = said(error), f"{type(error).__name__}: {cleaning.exception(error)}"[:5000]
    if not raised and not isinstance(returned, Mapping):
        raised = f"returned {_what(returned)}, not a dict of losses"
    if raised:
        return Observation(case, raised=raised, message=message or raised)
    try:
        named = _named(returned, bound, case)
    except Exception as error:  # a mapping, or a key, of their own
        return Observation(case, raised=f"what it returned cannot be read: {said(error)}")
    losses, odd = {}, {}
    for key, value in named.items():
        strange = _strange(value, device)
        if strange:
            odd[key] = strange
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            losses[key] = float(value)  # odd, yet its number can be judged
        elif isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            losses[key] = float(value.detach())
    found: dict[tuple[str, str], Grads] = {}
    if grads:
        with foreign(f"backward of {case.label}"):
            try:
                found = _gradients(case, named, leaves)
            except Exception as error:
                return Observation(case, raised=f"backward raised {said(error)}", losses=losses, odd=odd)
    return Observation(
        case=case,
        losses=losses,
        odd=odd,
        grads=found,
        attached=frozenset(k for k, v in named.items() if isinstance(v, Tensor) and v.requires_grad),
        weights=_weights(criterion, bound),
        dtypes={k: v.dtype for k, v in named.items() if isinstance(v, Tensor)},
        changed=changed,
        criterion=criterion,
    )


def gradients_by_layer(bound: Bound, case: Case) -> dict[str, dict[str, Grads]]:
    """For every layer: the gradients of the sum of its trained losses with respect to every layer's predictions.

    Empty where the candidate raises; whoever calls has observed that already.
    """
    outputs, targets, leaves = case.fresh()
    with foreign(case.label):
        try:
            returned = bound.build(case.options)(outputs, targets)
            named = _named(returned, bound, case)
            return {layer: _grad(_sum(named, case.keys(layer)), leaves) for layer in case.layers}
        except Exception:
            return {}


def weighted_sum(bound: Bound, case: Case, criterion: Any, returned: Any) -> Tensor:
    """KEY-6. Σ loss · weight over the keys of both, what a training loop goes down: with the candidate's own weights,
    or the options' where it has none. Raises ValueError where there is nothing to sum."""
    if not isinstance(returned, Mapping):
        raise ValueError(f"returned {_what(returned)}, not a dict of losses")
    own = None if case.options.weighted or not bound.candidate.own_weights else _weights(criterion, bound)
    weights = textbook.under(case.options).weights() if own is None else own
    named = _named(returned, bound, case)
    parts = [value * weights[key] for key, value in named.items() if key in weights]
    if not parts:
        raise ValueError("no returned loss has a weight")
    total: Tensor = sum(parts[1:], parts[0])
    return total


def said(error: BaseException) -> str:
    """An exception in one short line."""
    lines = cleaning.exception(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def as_pairs(raw: Any, case: Case, queries: int) -> list[Pairs]:
    """A matcher's answer as Pairs, whatever its container, order and integer dtype. Raises ValueError saying what is
    wrong with it."""
    if isinstance(raw, Mapping) and "indices" in raw:
        raw = raw["indices"]
    if not isinstance(raw, Sequence) or len(raw) != len(case.counts):
        raise ValueError(f"returned {_what(raw)}; it must be a list of {len(case.counts)} pairs, one an image")
    found = []
    for b, (pair, n) in enumerate(zip(raw, case.counts, strict=True)):
        try:
            query, target = pair
            query, target = _index(query), _index(target)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"image {b}: {error}; it must be (query indices, target indices)") from None
        if len(query) != len(target):
            raise ValueError(f"image {b}: {len(query)} query and {len(target)} target indices; they must be as many")
        for name, index, size in (("query", query, queries), ("target", target, n)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"image {b}: a {name} index of {index.tolist()} is outside 0..{size - 1}")
        order = query.argsort()
        found.append(Pairs(query[order], target[order]))
    return found


def _index(values: Any) -> Tensor:
    index = values if isinstance(values, Tensor) else torch.as_tensor(values)
    if index.ndim != 1:
        raise ValueError(f"indices have {index.ndim} dimensions, not one")
    if len(index) and (index.is_floating_point() or index.dtype is torch.bool):
        raise ValueError(f"indices are {index.dtype}, not integers")
    return index.detach().cpu().long()


def _matches(criterion: Any, case: Case, device: torch.device) -> tuple[dict[str, list[Pairs]], str]:
    matcher = getattr(criterion, "matcher", None)
    if not callable(matcher):
        return {}, ""
    found: dict[str, list[Pairs]] = {}
    outputs, targets, _ = case.fresh(device)
    for layer in case.layers:
        part = {k: v.detach().clone().to(device) for k, v in case.predictions(layer).items()}
        if "text_mask" in outputs:
            part["text_mask"] = outputs["text_mask"]
        own = [dict(t) for t in targets]
        if layer == ENC and case.options.encoder_targets == "class-zero":
            own = [{**t, "labels": torch.zeros_like(t["labels"])} for t in own]
        with foreign(f"matcher on {case.label}"):
            try:
                raw = matcher(part, own)
            except TypeError:  # it takes other arguments: no matcher that we can call
                return {}, ""
            except Exception as error:
                return found, f"{layer}: raised {said(error)}"
        try:
            found[layer] = as_pairs(raw, case, part["pred_logits"].shape[1])
        except ValueError as error:
            return found, f"{layer}: {error}"
    return found, ""


def weighed(bound: Bound, case: Case) -> frozenset[str]:
    """The keys of the weights of a criterion under a case's options, under the contract's names; none where it raises
    or has no weights of its own."""
    try:
        return (
            frozenset(_weights(bound.build(case.options), bound) or ()) if bound.candidate.own_weights else frozenset()
        )
    except Exception:
        return frozenset()


def _weights(criterion: Any, bound: Bound) -> dict[str, float] | None:
    weights = getattr(criterion, "weight_dict", None)
    if not isinstance(weights, Mapping):
        return None
    found = {}
    for key, value in weights.items():
        try:
            found[_renamed(str(key), bound.candidate.rename)] = float(value)
        except (TypeError, ValueError):
            found[str(key)] = math.nan
    return found


def _gradients(
    case: Case, named: Mapping[str, Any], leaves: Mapping[str, tuple[Tensor, ...]]
) -> dict[tuple[str, str], Grads]:
    found: dict[tuple[str, str], Grads] = {}
    for term, keys in case.sums.items():
        found |= {(term, layer): pair for layer, pair in _grad(_sum(named, keys), leaves).items()}
    return found


def _sum(named: Mapping[str, Any], keys: Sequence[str]) -> Tensor | None:
    """The sum of those losses that can be differentiated, or None."""
    parts = [named[k] for k in keys if isinstance(named.get(k), Tensor) and named[k].requires_grad]
    return torch.stack([p.sum().cpu().double() for p in parts]).sum() if parts else None


def _grad(total: Tensor | None, leaves: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Grads]:
    if total is None:
        return {layer: (None,) * len(own) for layer, own in leaves.items()}
    flat = [leaf for own in leaves.values() for leaf in own]
    grads = torch.autograd.grad(total, flat, allow_unused=True, retain_graph=True)
    wide = iter([None if g is None else g.detach().cpu().double() for g in grads])
    return {layer: tuple(next(wide) for _ in own) for layer, own in leaves.items()}


def _named(returned: Mapping[Any, Any], bound: Bound, case: Case) -> dict[str, Any]:
    """What was returned under the contract's names; losses declared as weighted without their weights."""
    named = {_renamed(str(k), bound.candidate.rename): v for k, v in returned.items()}
    if not case.options.weighted:
        return named
    weights = textbook.under(case.options).weights()
    return {k: v / weights[k] if weights.get(k) and isinstance(v, Tensor) else v for k, v in named.items()}


def _renamed(key: str, rename: Mapping[str, str]) -> str:
    for theirs in sorted(rename, key=len, reverse=True):
        if key == theirs or key.startswith(f"{theirs}_"):
            return rename[theirs] + key[len(theirs) :]
    return key


def _strange(value: Any, device: torch.device) -> str:
    """What a loss is, where it is not a real scalar tensor on the outputs' device; else ""."""
    if not isinstance(value, Tensor):
        return _what(value)
    if value.ndim:
        return f"a tensor of shape {list(value.shape)}"
    if not value.is_floating_point():
        return f"a tensor of {value.dtype}"
    return "" if value.device.type == device.type else f"a tensor on {value.device}"


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _snapshot(value: Any, path: str = "") -> dict[str, Any]:
    """Every tensor (cloned), length and plain value below ``value`` by its path."""
    if isinstance(value, Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, Mapping):
        found = {f"{path} keys": tuple(map(str, value))}
        for key, inner in value.items():
            found |= _snapshot(inner, f"{path}[{key!r}]")
        return found
    if isinstance(value, (list, tuple)):
        found = {f"{path} length": len(value)}  # type: ignore[dict-item]
        for i, inner in enumerate(value):
            # the two arguments of a call read better by their names
            found |= _snapshot(inner, f"{path}[{i}]" if path else ("outputs", "targets")[i])
        return found
    return {path: value}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first place where two snapshots differ, in words; else ""."""
    for path, old in before.items():
        new = after.get(path)
        if isinstance(old, Tensor):
            same = isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype
            if not same or not torch.equal(old.nan_to_num(), new.nan_to_num()):  # type: ignore[union-attr]
                return f"{path} was changed"
        elif old != new:
            return f"{path} were {old}, are {new}" if path.endswith("keys") else f"{path} was {old}, is {new}"
    return ""
