"""Experiments with calls that may well raise: bad input, odd input, non-finite predictions, a choice of losses.

Beside an ordinary call stand *trials*, each an observation of its own, so that raising is an answer and no accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance.candidate import Bound
from detr_conformance.cases import Case, Recipe
from detr_conformance.experiments import Experiment, called, from_recipes
from detr_conformance.observation import Observation, observe
from detr_conformance.seen import Seen

Target = dict[str, Tensor]

ORDINARY: Final = (Recipe(301, (2, 1), 4, classes=3, tokens=11),)


def on_target(case: Case, change: Callable[[Target], Target], image: int = 0) -> Case:
    """The case with one image's target changed."""
    targets = list(case.targets)
    targets[image] = change(dict(targets[image]))
    return replace(case, targets=tuple(targets))


def on_outputs(case: Case, **changes: Any) -> Case:
    """The case with some final outputs replaced, or with None taken away."""
    outputs = {k: v for k, v in {**case.outputs, **changes}.items() if v is not None}
    return replace(case, outputs=outputs)


def _with_box(case: Case, column: int, value: float) -> Case:
    def change(target: Target) -> Target:
        boxes = target["boxes"].clone()
        boxes[0, column] = value
        return target | {"boxes": boxes}

    return on_target(case, change)


def _with_label(case: Case, value: int) -> Case:
    def change(target: Target) -> Target:
        labels = target["labels"].clone()
        labels[0] = value
        return target | {"labels": labels}

    return on_target(case, change)


# --- bad input ---


@dataclass(frozen=True)
class Bad:
    """A call that must be refused: what is wrong with it, how it is made, and the words, one of which the error must
    name; ``text``: only where the profile has text."""

    clause: str
    what: str
    make: Callable[[Case], Case]
    words: tuple[str, ...]
    text: bool = False


def _without(key: str) -> Callable[[Case], Case]:
    return lambda case: on_target(case, lambda t: {k: v for k, v in t.items() if k != key})


_LENGTHS: Final = ("label", "box", "logit", "target", "text_mask")
BADS: Final = (
    Bad("BAD-1", "a label of −1", lambda c: _with_label(c, -1), ("label",)),
    Bad("BAD-1", "a label of K", lambda c: _with_label(c, c.options.num_classes), ("label",)),
    Bad("BAD-2", "targets of one image less", lambda c: replace(c, targets=c.targets[:-1]), _LENGTHS),
    Bad(
        "BAD-2",
        "one label less than boxes",
        lambda c: on_target(c, lambda t: t | {"labels": t["labels"][:-1]}),
        _LENGTHS,
    ),
    Bad(
        "BAD-2", "one box less than labels", lambda c: on_target(c, lambda t: t | {"boxes": t["boxes"][:-1]}), _LENGTHS
    ),
    Bad(
        "BAD-2",
        "one predicted box less than logits",
        lambda c: on_outputs(c, pred_boxes=c.outputs["pred_boxes"][:, :-1]),
        _LENGTHS,
    ),
    Bad(
        "BAD-2",
        "a text_mask one token short",
        lambda c: on_outputs(c, text_mask=c.outputs["text_mask"][:, :-1]),
        _LENGTHS,
        text=True,
    ),
    Bad("BAD-3", "a negative width", lambda c: _with_box(c, 2, -0.25), ("box",)),
    Bad("BAD-3", "a negative height", lambda c: _with_box(c, 3, -0.25), ("box",)),
    Bad("BAD-3", "a target box that is not a number", lambda c: _with_box(c, 0, float("nan")), ("box",)),
    Bad("BAD-3", "an infinite target box", lambda c: _with_box(c, 2, float("inf")), ("box",)),
    Bad("BAD-4", "outputs without pred_logits", lambda c: on_outputs(c, pred_logits=None), ("pred_logits",)),
    Bad("BAD-4", "outputs without pred_boxes", lambda c: on_outputs(c, pred_boxes=None), ("pred_boxes",)),
    Bad("BAD-4", "a target without labels", _without("labels"), ("labels",)),
    Bad("BAD-4", "a target without boxes", _without("boxes"), ("boxes",)),
    Bad("BAD-4", "a target without token_labels", _without("token_labels"), ("token_labels",), text=True),
)
NO_COST: Final = "all three matching weights zero"
AFTERWARDS: Final = "the ordinary call afterwards"


def bads(case: Case, clause: str) -> Iterator[Bad]:
    """The bad calls of a clause that a profile can have."""
    text = case.options.class_loss == "token"
    for bad in BADS:
        # how many classes a prompt has, only the prompt knows
        if bad.clause == clause and (text or not bad.text) and not (text and bad.what == "a label of K"):
            yield bad


def _refusing(bound: Bound, case: Case) -> Seen:
    """An ordinary call, every bad one, and the ordinary one again, all on one criterion."""
    seen = called(bound, case)
    criterion, trials = seen.got.criterion, {}
    for clause in ("BAD-1", "BAD-2", "BAD-3", "BAD-4"):
        for bad in bads(case, clause):
            wrong = replace(bad.make(case), label=f"{case.label}, {bad.what}")
            trials[bad.what] = observe(bound, wrong, criterion=criterion, grads=False, inputs=True)
    trials[AFTERWARDS] = observe(bound, case, criterion=criterion, grads=False)
    if {"set_cost_class", "set_cost_bbox", "set_cost_giou"} <= bound.varies:
        free = case.options.with_(set_cost_class=0.0, set_cost_bbox=0.0, set_cost_giou=0.0)
        trials[NO_COST] = observe(bound, replace(case, options=free, label=NO_COST), grads=False)
    return replace(seen, trials=trials)


REFUSED = Experiment("refused", "bad input", from_recipes(ORDINARY), None, _refusing, weight=0.1)


# --- odd input ---


def _far_apart(_layer: str, _key: str, value: Tensor) -> Tensor:
    """The same numbers, not contiguous in memory."""
    return torch.stack([value, value + 1], -1)[..., 0]


def _narrow_labels(target: Target) -> Target:
    return target | {"labels": target["labels"].int()}


def _wide_boxes(target: Target) -> Target:
    return target | {"boxes": target["boxes"].double()}


def _strided(target: Target) -> Target:
    return target | {"boxes": target["boxes"].T.contiguous().T, "labels": torch.stack([target["labels"]] * 2, -1)[:, 0]}


ODD: Final[Mapping[str, tuple[Callable[[Case], Case], tuple[str, ...]]]] = {
    "int32 labels": (lambda c: _on_all(c, _narrow_labels), ("label",)),
    "float64 target boxes": (lambda c: _on_all(c, _wide_boxes), ("box",)),
    "non-contiguous predictions": (lambda c: c.with_predictions(_far_apart), ("pred_", "contiguous")),
    "non-contiguous targets": (lambda c: _on_all(c, _strided), ("box", "label", "contiguous")),
}
BARE: Final = "no targets written torch.tensor([])"
EMPTY: Final = "no targets"


def _on_all(case: Case, change: Callable[[Target], Target]) -> Case:
    return replace(case, targets=tuple(change(dict(t)) for t in case.targets))


def _odd(bound: Bound, case: Case) -> Seen:
    """A call, and the same call with inputs that hold the same numbers in another form."""
    trials = {name: observe(bound, make(case), grads=False) for name, (make, _) in ODD.items()}
    none = on_target(case, lambda t: {k: v if k == "positive_map" else v[:0] for k, v in t.items()})
    bare = on_target(case, lambda t: t | {"labels": torch.tensor([]), "boxes": torch.tensor([])})
    if "token_labels" in case.targets[0]:
        bare = on_target(bare, lambda t: t | {"token_labels": t["token_labels"][:0]})
    trials[EMPTY], trials[BARE] = (observe(bound, c, grads=False) for c in (none, bare))
    return replace(called(bound, case), trials=trials)


ODDITIES = Experiment("odd", "the same input in other forms", from_recipes(ORDINARY), None, _odd, weight=0.05)


# --- non-finite predictions ---

SPOILT: Final[Mapping[str, tuple[str, float]]] = {
    "logits that are not numbers": ("pred_logits", float("nan")),
    "a box that is not a number": ("pred_boxes", float("nan")),
    "an infinite box": ("pred_boxes", float("inf")),
}


def _far_case(case: Case) -> Case:
    """Sure of nothing and far from every target, so that every finite query costs more than nothing."""
    boxes = torch.tensor([0.06, 0.06, 0.05, 0.05]).expand_as(case.outputs["pred_boxes"]).clone()
    boxes[..., 0] += 0.01 * torch.arange(boxes.shape[1])
    targets = tuple(
        {**t, "boxes": torch.tensor([[0.8, 0.8, 0.3, 0.3], [0.7, 0.85, 0.35, 0.2]])[: len(t["labels"])]}
        for t in case.targets
    )
    return on_outputs(replace(case, targets=targets), pred_logits=case.outputs["pred_logits"] - 6, pred_boxes=boxes)


def _spoilt(bound: Bound, case: Case) -> Seen:
    """An ordinary call, and the same with one query of image 0 whose prediction is not finite: its first or second."""
    case, trials = _far_case(case), {}
    for query, (name, (key, value)) in product((0, 1), SPOILT.items()):
        spoilt = case.outputs[key].clone()
        spoilt[0, query] = value
        label = f"{case.label}, query {query} with {name}"
        trials[f"query {query} with {name}"] = observe(bound, replace(on_outputs(case, **{key: spoilt}), label=label))
    return replace(called(bound, case), trials=trials)


SPOILED = Experiment(
    "non-finite", "one query without finite predictions",
    from_recipes([Recipe(310, (1,), 2), Recipe(311, (2,), 4, classes=3), Recipe(312, (1, 2), 5, classes=2)]),
    None, _spoilt, weight=0.05,
)  # fmt: skip


def took(trial: Observation, image: int, query: int) -> bool | None:
    """Whether a query was matched, by the matcher or else by its box gradient; None where neither tells."""
    if "final" in trial.pairs:
        return query in trial.pairs["final"][image].query.tolist()
    grads = [trial.grads.get((term, "final"), (None, None))[1] for term in ("bbox", "giou")]
    rows = [g[image, query] for g in grads if g is not None]
    if not rows or not all(bool(r.isfinite().all()) for r in rows):
        return None
    return any(bool((r != 0).any()) for r in rows)


# --- which losses ---

CHOICES: Final = (("labels",), ("boxes",), ("boxes", "labels"))
SELECTS: Final[Mapping[str, tuple[str, ...]]] = {"labels": ("ce",), "boxes": ("bbox", "giou")}


def _choosing(bound: Bound, case: Case) -> Seen:
    """A call of a criterion for every choice of losses."""
    trials = {
        repr(list(chosen)): observe(bound, replace(case, options=case.options.with_(losses=chosen)), grads=False)
        for chosen in CHOICES
    }
    return replace(called(bound, case), trials=trials)


CHOSEN = Experiment(
    "choice of losses",
    "losses=[…]",
    from_recipes([Recipe(321, (2, 1), 4, classes=3, aux=1, encoder_queries=4, tokens=11)]),
    None,
    _choosing,
    weight=0.05,
    declined=lambda bound: "" if "losses" in bound.varies else "the factory does not name losses",
)


# --- a class without tokens ---

FIRST, SECOND = "the first class without tokens", "the second class without tokens"


def _wordless_case(bound: Bound) -> Iterator[Case]:
    """One unsure query halfway between two equal targets: only their classes' costs differ."""
    o = bound.options.with_(num_decoder_layers=1)
    tokens = torch.eye(2, 4).roll(1, -1)
    target = {
        "labels": torch.arange(2),
        "boxes": torch.tensor([[0.375, 0.5, 0.25, 0.25], [0.625, 0.5, 0.25, 0.25]]),
        "token_labels": tokens,
        "positive_map": tokens,
    }
    outputs = {
        "pred_logits": torch.full((1, 1, 4), -3.0),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.25, 0.25]]]),
        "text_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    yield Case("one query between two targets", o, outputs, (target,))


def _wordless(bound: Bound, case: Case) -> Seen:
    """The call, and the same where one of the two classes has no tokens."""
    trials = {}
    for row, name in enumerate((FIRST, SECOND)):
        keep = (torch.arange(2) != row)[:, None].float()
        without = on_target(case, lambda t, k=keep: t | {key: t[key] * k for key in ("token_labels", "positive_map")})  # type: ignore[misc]
        trials[name] = observe(bound, replace(without, label=f"{case.label}, {name}"))
    return replace(called(bound, case), trials=trials)


WORDLESS = Experiment("wordless", "a class without tokens", _wordless_case, None, _wordless, weight=0.05)
