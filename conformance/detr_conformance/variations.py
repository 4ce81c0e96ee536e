"""Experiments that make the same call in another way: another precision, mode or thread, a copy, a step downhill."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from detr_conformance import cleaning
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case, Recipe, build
from detr_conformance.designed import duel_case, pair_case
from detr_conformance.experiments import Experiment, called, from_recipes, one_class
from detr_conformance.observation import Observation, foreign, observe, said
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS

HALVES: Final[Mapping[str, torch.dtype]] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

PLAIN: Final = (
    Recipe(201, (2,), 4, classes=3),
    Recipe(202, (1, 2), 4, classes=4, aux=1, encoder_queries=4, tokens=11),
    Recipe(203, (2, 0, 3), 5, classes=3, aux=1, encoder_queries=6, tokens=11),
)


# --- precision ---


def cast(case: Case, dtype: torch.dtype, name: str) -> Case:
    """The case with predictions of another dtype; targets stay as they are."""
    return replace(case.with_predictions(lambda _l, _k, v: v.to(dtype)), label=f"{case.label}, {name} outputs")


def _halves(bound: Bound) -> Iterator[Case]:
    recipes = (*PLAIN, Recipe(204, (2, 1), 5, classes=4, logits="confident"), Recipe(205, (0, 0), 3, classes=3))
    for i, recipe in enumerate(recipes):
        case = build(_fitted(recipe, bound), bound.options, bound.varies)
        for name, dtype in HALVES.items() if i else list(HALVES.items())[:1]:
            yield cast(case, dtype, name)
    for seed in range(12):
        case = duel_case(300 + seed, ("all", "class", "bbox")[seed % 3], bound.options, bound.varies)
        yield cast(case, *list(HALVES.items())[seed % 2][::-1])
    for seed in (211, 212, 213):
        yield build(_fitted(Recipe(seed, (2, 1), 5, classes=3, logits="extreme"), bound), bound.options, bound.varies)


def _fitted(recipe: Recipe, bound: Bound) -> Recipe:
    if "num_decoder_layers" in bound.varies:
        return recipe
    return replace(recipe, aux=min(recipe.aux, bound.options.num_decoder_layers - 1))


def _half(bound: Bound, case: Case) -> Seen:
    """A call with half-precision outputs; or, of float32 ones, an ordinary call. Its own precision is allowed for."""
    dtype = case.outputs["pred_logits"].dtype
    return replace(called(bound, case), eps=float(torch.finfo(dtype).eps))


HALF = Experiment("half", "half precision, and extreme logits", _halves, None, _half, weight=0.4)

AUTOCAST: Final = "under autocast to bfloat16"


def _autocast(bound: Bound, case: Case) -> Seen:
    around = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    return Seen(bound, case, observe(bound, case, around=around), eps=float(torch.finfo(torch.bfloat16).eps))


AUTOCASTED = Experiment(
    "autocast",
    "autocast to bfloat16",
    from_recipes((*PLAIN, Recipe(206, (2, 1), 5, classes=4, logits="confident"))),
    None,
    _autocast,
    weight=0.1,
)

STEP_WIDTH: Final = 1e-6
FORWARD, BACKWARD = "a step ahead", "a step back"


def direction(case: Case, seed: int) -> Callable[[str, str, Tensor], Tensor]:
    """A fixed direction [same shape] for every prediction of a case, entries of about 1; boxes keep their sides."""
    rng = np.random.default_rng(seed)
    drawn = {
        (layer, key): torch.from_numpy(rng.normal(0, 1, value.shape))
        for layer in case.layers
        for key, value in case.predictions(layer).items()
    }
    return lambda layer, key, _value: drawn[layer, key]


def _wide(bound: Bound, case: Case) -> Seen:
    """A call in float64, of a criterion in float64 where it is a module; and two more, a tiny step away each way."""

    def one(moved: Case, grads: bool = True) -> Observation:
        try:
            criterion = bound.build(case.options)
            criterion = criterion.double() if isinstance(criterion, torch.nn.Module) else criterion
        except Exception:
            criterion = None  # the call itself will say so
        return observe(bound, moved, criterion=criterion, grads=grads)

    along = direction(case, 1)
    trials = {
        name: one(case.with_predictions(lambda la, k, v, s=side: v + s * STEP_WIDTH * along(la, k, v)), False)  # type: ignore[misc]
        for name, side in ((FORWARD, 1.0), (BACKWARD, -1.0))
    }
    return Seen(bound, case, one(case), trials=trials)


def _in_float64(bound: Bound) -> Iterator[Case]:
    for recipe in PLAIN:
        case = build(_fitted(recipe, bound), bound.options, bound.varies)
        wide = cast(case, torch.float64, "float64")
        yield replace(wide, targets=tuple({**t, "boxes": t["boxes"].double()} for t in wide.targets))


WIDE = Experiment("float64", "float64", _in_float64, None, _wide, weight=0.1)


# --- boxes without an area ---

_EMPTY: Final = (
    ("target without area", (0.5, 0.5, 0.25, 0.25), (0.5, 0.5, 0.0, 0.0)),
    ("prediction without area", (0.25, 0.5, 0.0, 0.0), (0.5, 0.5, 0.25, 0.5)),
    ("prediction without width", (0.25, 0.5, 0.0, 0.25), (0.5, 0.5, 0.25, 0.5)),
    ("both without area, coincident", (0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)),
    ("both without area, apart", (0.25, 0.5, 0.0, 0.0), (0.5, 0.75, 0.0, 0.0)),
    ("both without height, apart", (0.25, 0.5, 0.125, 0.0), (0.75, 0.5, 0.25, 0.0)),
)


def _empty_boxes(bound: Bound) -> Iterator[Case]:
    for kind, pred, wanted in _EMPTY:
        yield pair_case(pred, wanted, one_class(bound), f"pair of boxes, {kind}")


EMPTY_BOXES = Experiment("empty boxes", "boxes without area", _empty_boxes, None, called, weight=0.05)


# --- a step against the gradient ---

STEPS: Final = tuple(4.0**-i for i in range(6))


def _stepped(bound: Bound, case: Case) -> Seen:
    """A call, and more after steps of falling length against the gradient of the weighted total."""
    seen = called(bound, case)
    o = case.options
    weights = {"ce": o.ce_loss_coef, "bbox": o.bbox_loss_coef, "giou": o.giou_loss_coef}

    def slope(layer: str, at: int) -> Tensor:
        parts = [
            w * g for t, w in weights.items() if (g := seen.got.grads.get((t, layer), (None, None))[at]) is not None
        ]
        return torch.stack(parts).sum(0) if parts else torch.zeros(())

    slopes = {
        (layer, key): slope(layer, i) for layer in case.layers for i, key in enumerate(("pred_logits", "pred_boxes"))
    }
    steepest = max((float(s.abs().max()) for s in slopes.values()), default=0.0)
    trials = {}
    for length in STEPS if 0 < steepest < float("inf") else ():
        size = 0.01 * length / steepest
        ahead = case.with_predictions(lambda la, k, v, s=size: (v.double() - s * slopes[la, k]).to(v.dtype))  # type: ignore[misc]
        trials[f"after a step of {0.01 * length:.2g}"] = observe(bound, ahead, grads=False)
    return replace(seen, trials=trials)


STEPPED = Experiment("step", "a step against the gradient", from_recipes(PLAIN), None, _stepped, weight=0.1)


def total(case: Case, got: Observation) -> float:
    """Σ loss·weight over all trained losses, by the configured weights; NaN where one is missing."""
    base = {t: float(getattr(case.options, f"{t}_loss_coef")) for t in TERMS}
    return sum(
        w * got.losses.get(f"loss_{t}{case.suffix(x)}", float("nan")) for t, w in base.items() for x in case.layers
    )


# --- what the caller does around a call ---

TRAIN, EVAL = "after train()", "after eval()"
NO_GRAD, INFERENCE, THREADS, COMPILED = "under no_grad", "under inference_mode", "from several threads", "compiled"
KEPT: Final = "tensors kept for a backward pass"


def _in_modes(bound: Bound, case: Case) -> Seen:
    """The same criterion in training and in evaluation, where it tells them apart."""
    seen, trials = called(bound, case), {}
    for name, mode in ((TRAIN, "train"), (EVAL, "eval")):
        with _any():
            criterion = bound.build(case.options)
            if callable(getattr(criterion, mode, None)):
                getattr(criterion, mode)()
                trials[name] = observe(bound, case, criterion=criterion, grads=False)
    return replace(seen, trials=trials)


class _any(AbstractContextManager[None]):
    """Whatever building a criterion raises has been observed by the plain call already."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, Exception)


def _called(bound: Bound, case: Case) -> Seen:
    """The call under what a caller may have switched on, and from several threads at a time."""
    trials = {
        NO_GRAD: observe(bound, case, grads=False, around=torch.no_grad),
        INFERENCE: observe(bound, case, grads=False, around=torch.inference_mode),
    }
    with _any():
        trials[THREADS] = _from_threads(bound, case)
    return replace(called(bound, case), trials=trials)


def _from_threads(bound: Bound, case: Case, threads: int = 4, calls: int = 6) -> Observation:
    """One criterion, called from several threads, every second of which has no target; the first answer of the others
    that is another one, or else the last."""
    criterion = bound.build(case.options)
    other = replace(
        case, targets=tuple({k: v if k == "positive_map" else v[:0] for k, v in t.items()} for t in case.targets)
    )
    own: list[Observation] = []

    def work(of: Case) -> None:
        torch.set_num_threads(1)
        for _ in range(calls):
            found = observe(bound, of, criterion=criterion, grads=False)
            if of is case:
                own.append(found)

    every = [threading.Thread(target=work, args=(other if i % 2 else case,), daemon=True) for i in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of a call, not only after it
    try:
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    strange = [o for o in own if o.raised or o.losses != own[0].losses]
    usual = observe(bound, case, criterion=criterion, grads=False)
    return next((o for o in [*strange, *own] if o.raised or o.losses != usual.losses), usual)


def _compiled(bound: Bound, case: Case) -> Seen:
    """The call inside a function that the caller compiles (graphs are captured, none is turned into machine code)."""
    trials = {}
    with _any():
        criterion = bound.build(case.options)

        def step(outputs: Any, targets: Any) -> Any:
            return criterion(outputs, targets)

        torch._dynamo.reset()
        trials[COMPILED] = observe(bound, case, criterion=torch.compile(step, backend="eager"), grads=False)
    return replace(called(bound, case), trials=trials)


def _with_graph(bound: Bound, case: Case) -> Seen:
    """A call, and one of its matcher on outputs that require gradient: how many tensors does autograd keep of it?"""
    seen = called(bound, case)
    matcher = getattr(seen.got.criterion, "matcher", None)
    if not callable(matcher) or not seen.got.pairs:
        return seen
    outputs, targets, _ = case.fresh()
    part = {k: outputs[k] for k in ("pred_logits", "pred_boxes", "text_mask") if k in outputs}
    kept = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return value

    with (
        foreign(f"matcher on {case.label}"),
        _any(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        matcher(part, [dict(t) for t in targets])
        return replace(seen, remarks={KEPT: str(kept)})
    return seen


MODES = Experiment("modes", "training and evaluation", from_recipes(PLAIN), None, _in_modes, weight=0.1)
CALLERS = Experiment("callers", "no_grad, inference_mode, threads", from_recipes(PLAIN[1:]), None, _called, weight=0.2)
COMPILERS = Experiment(
    "compiled", "torch.compile of the caller", from_recipes(PLAIN[:1]), None, _compiled, weight=3.0, since="standard"
)
GRAPH = Experiment("graph", "the matcher and autograd", from_recipes(PLAIN), None, _with_graph, weight=0.1)


# --- copies ---

DEEP, PICKLED, LOADED = "of a deep copy", "of a pickled copy", "after loading its own state_dict"
STATE: Final = "state_dict after two calls"


def _copied(bound: Bound, case: Case) -> Seen:
    """The call on copies of the criterion, and what its state_dict gained by calls."""
    seen = called(bound, case)
    criterion = seen.got.criterion
    copies: dict[str, Callable[[], Any]] = {
        DEEP: lambda: copy.deepcopy(criterion),
        PICKLED: lambda: pickle.loads(pickle.dumps(criterion)),
    }
    remarks = {}
    if callable(getattr(criterion, "state_dict", None)):
        copies[LOADED] = lambda: _loaded(bound, case, criterion)
        with _any():
            new, used = bound.build(case.options).state_dict(), criterion.state_dict()
            gained = sorted(k for k in {*new, *used} if _shape(new, k) != _shape(used, k))
            learnt = sorted(k for k, v in used.items() if isinstance(v, Tensor) and v.requires_grad)
            remarks[STATE] = "; ".join(
                [f"{k}: {_shape(new, k)}, then {_shape(used, k)}" for k in gained]
                + [f"{k} requires gradient" for k in learnt]
            )
    trials = {}
    for name, make in copies.items():
        try:
            with foreign(f"copy {name}"):
                twin = make()
        except Exception as error:
            trials[name] = Observation(case, raised=said(error), message=cleaning.exception(error))
        else:
            trials[name] = observe(bound, case, criterion=twin, grads=False)
    return replace(seen, trials=trials, remarks=remarks)


def _loaded(bound: Bound, case: Case, criterion: Any) -> Any:
    twin = bound.build(case.options)
    twin.load_state_dict(criterion.state_dict())
    return twin


def _shape(state: Mapping[str, Any], key: str) -> str:
    if key not in state:
        return "not there"
    return str(list(state[key].shape)) if isinstance(state[key], Tensor) else type(state[key]).__name__


COPIES = Experiment("copies", "copies, pickles, state_dict", from_recipes(PLAIN[:2]), None, _copied, weight=0.1)
