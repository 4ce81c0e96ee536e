"""What is drawn, and what is observed of it: one candidate call serves every check of its experiment.

An experiment yields cases, the same ones for the same seed, and turns each into a ``Seen``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detr_conformance.candidate import Bound
from detr_conformance.cases import Case, Recipe, build
from detr_conformance.designed import DUELS as KINDS
from detr_conformance.designed import contested_case, duel_case, pair_case
from detr_conformance.observation import gradients_by_layer, observe
from detr_conformance.seen import Seen
from detr_conformance.stored import Duel, Inputs, Pair, corpus
from detr_reference.options import Options

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Drawn = Callable[[Bound], "SearchStrategy[Case]"]


@dataclass(frozen=True, eq=False)
class Experiment:
    """How cases are drawn and what is observed of each.

    ``fixed``: the cases of every effort · ``drawn``: the strategy of the searched cases · ``share``: which
    part of the effort's searched cases this experiment takes · ``observe``: the calls · ``weight``: roughly how long it
    takes, in seconds at effort standard, to share experiments out · ``since``: the least effort that it runs at ·
    ``declined``: why it cannot be made with a candidate on this machine, or "" · ``numbers``: by what name known faults
    are told apart, where that is not what the criterion returns · ``once``: a case takes so long that it is observed
    once, and never again to explain what failed.
    """

    name: str
    title: str
    fixed: Callable[[Bound], Iterator[Case]]
    drawn: Drawn | None
    observe: Callable[[Bound, Case], Seen]
    share: float = 1.0
    weight: float = 0.5
    since: str = "quick"
    declined: Callable[[Bound], str] = lambda bound: ""
    numbers: Callable[[Bound, Case], Mapping[tuple[str, ...], Any]] | None = None
    once: bool = False


def called(bound: Bound, case: Case, criterion: Any = None) -> Seen:
    """The candidate, or a criterion of its that was built before, called on a case beside the textbook."""
    return Seen(bound, case, observe(bound, case, criterion=criterion, inputs=criterion is not None))


def valued(bound: Bound, case: Case, criterion: Any = None) -> Seen:
    """The same without gradients."""
    return Seen(bound, case, observe(bound, case, grads=False, criterion=criterion))


def from_recipes(recipes: Sequence[Recipe]) -> Callable[[Bound], Iterator[Case]]:
    """The cases of these recipes, for any candidate."""

    def fixed(bound: Bound) -> Iterator[Case]:
        for recipe in recipes:
            yield build(fitted_to(recipe, bound), bound.options, bound.varies)

    return fixed


def made(inputs: Inputs, bound: Bound) -> Case:
    """The case of stored or drawn inputs for a candidate."""
    if isinstance(inputs, Recipe):
        return build(fitted_to(inputs, bound), bound.options, bound.varies)
    if isinstance(inputs, Duel):
        return duel_case(inputs.seed, inputs.kind, bound.options, bound.varies)
    return pair_case(inputs.pred, inputs.wanted, one_class(bound), f"pair of boxes, {inputs.kind}")


def _stored(name: str) -> Callable[[Bound], Iterator[Case]]:
    """The cases of the corpus that kill something in the candidate's profile."""

    def fixed(bound: Bound) -> Iterator[Case]:
        for one in corpus().of(name, bound.profile):
            yield made(one.inputs, bound)

    return fixed


def fitted_to(recipe: Recipe, bound: Bound) -> Recipe:
    """The recipe with as many layers as a candidate takes that cannot be told their number."""
    if "num_decoder_layers" not in bound.varies:
        return replace(recipe, aux=min(recipe.aux, bound.options.num_decoder_layers - 1))
    return recipe


@dataclass(frozen=True)
class Drawing:
    """The cases of drawn inputs. ``inputs``: their strategy."""

    inputs: Callable[[], SearchStrategy[Inputs]]

    def __call__(self, bound: Bound) -> SearchStrategy[Case]:
        return self.inputs().map(lambda inputs: made(inputs, bound))


def _recipes(name: str) -> Drawn:
    """The cases of a strategy of recipes, by its name in ``strategies``."""

    def drawn() -> SearchStrategy[Inputs]:
        from detr_conformance import strategies

        found: SearchStrategy[Inputs] = getattr(strategies, name)()
        return found

    return Drawing(drawn)


def _inputs(make: Callable[[int], Inputs]) -> Drawn:
    """The cases of inputs that are made from a seed alone."""

    def drawn() -> SearchStrategy[Inputs]:
        from hypothesis import strategies as st

        return st.integers(0, 2**31 - 1).map(make)

    return Drawing(drawn)


def from_seeds(make: Callable[[Bound, int], Case]) -> Drawn:
    """The cases made from a seed alone."""

    def drawn(bound: Bound) -> SearchStrategy[Case]:
        from hypothesis import strategies as st

        return st.integers(0, 2**31 - 1).map(lambda seed: make(bound, seed))

    return drawn


BATCH = Experiment(
    "batch",
    "ordinary batches",
    _stored("batch"),
    _recipes("ordinary"),
    called,
    weight=2.0,
)

EDGES = Experiment(
    "edges",
    "no targets, more targets than queries, copies",
    _stored("edges"),
    _recipes("odd"),
    called,
    share=0.5,
)

EXTREMES = Experiment(
    "extremes",
    "logits up to ±110, sides down to 1e-3",
    _stored("extremes"),
    _recipes("extreme"),
    called,
    share=0.5,
)


def _configured(bound: Bound) -> Iterator[Case]:
    """The stored cases whose options the candidate lets vary; the first one in any case."""
    trained = {"eos_coef"} if bound.options.class_loss == "softmax" else {"focal_alpha", "focal_gamma"}
    for i, case in enumerate(_stored("configured")(bound)):
        if i == 0 or trained & bound.varies:
            yield case


CONFIGURED = Experiment(
    "configured", "class loss under its options", _configured, _recipes("configured"), called, share=0.3
)


# --- pairs of boxes ---


def _drawn_pair(seed: int) -> Pair:
    """A pair of boxes with sides between .05 and .4, to three digits."""
    rng = np.random.default_rng(seed)
    pred = np.concatenate([rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.4, 2)])
    wanted = np.concatenate([rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.4, 2)])
    kind = str(rng.choice(["free", "near", "same size"]))
    if kind == "near":
        wanted = pred * np.exp(rng.normal(0, 0.2, 4))
    if kind == "same size":
        wanted[2:] = pred[2:]
    return Pair(kind, tuple(pred.round(3).tolist()), tuple(wanted.round(3).tolist()))


def one_class(bound: Bound) -> Options:
    """The options with two classes, where the candidate lets their number vary."""
    return bound.options.with_(num_classes=2) if "num_classes" in bound.varies else bound.options


MOVES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "both moved by (1/16, −1/8)": lambda b: b + torch.tensor([0.0625, -0.125, 0, 0]),
    "both mirrored, and half as wide": lambda b: b * torch.tensor([-0.5, 1, 0.5, 1]) + torch.tensor([1.0, 0, 0, 0]),
    "both a quarter as high": lambda b: b * torch.tensor([1, 0.25, 1, 0.25]),
}
SWAPPED = "prediction and target swapped"
FARTHER = "farther apart"


def _moved(bound: Bound, case: Case) -> Seen:
    """The pair itself, swapped, moved, mirrored and scaled; apart boxes also farther apart."""
    pred, wanted = case.outputs["pred_boxes"][0, 0], case.targets[0]["boxes"][0]
    pairs = {SWAPPED: (wanted, pred)} | {name: (move(pred), move(wanted)) for name, move in MOVES.items()}
    if "apart" in case.label:
        away = (pred - wanted) * torch.tensor([0.5, 0.5, 0, 0])
        pairs[FARTHER] = (pred + away, wanted)
    twins = {
        name: valued(bound, pair_case(a, b, case.options, f"{case.label}, {name}")) for name, (a, b) in pairs.items()
    }
    return replace(called(bound, case), twins=twins)


PAIRS = Experiment("pairs", "one pair of boxes", _stored("pairs"), _inputs(_drawn_pair), _moved, share=0.15, weight=0.7)


# --- duels ---


def _drawn_duel(seed: int) -> Duel:
    """A duel of the kind that the seed falls on."""
    return Duel(KINDS[seed % len(KINDS)], seed)


DEFAULT_WEIGHTS = "under the default loss weights"


def _duel(bound: Bound, case: Case) -> Seen:
    """A duel; one under other loss weights also under the default ones."""
    seen = called(bound, case)
    if "other loss weights" not in case.label:
        return seen
    o = bound.options
    coefs = {f"{term}_loss_coef": getattr(o, f"{term}_loss_coef") for term in ("ce", "bbox", "giou")}
    return replace(seen, twins={DEFAULT_WEIGHTS: called(bound, replace(case, options=case.options.with_(**coefs)))})


# --- assignments that every sensible cost agrees on ---


def _certain(bound: Bound) -> Iterator[Case]:
    """One image, equal class scores; L1 alone and GIoU alone choose the same assignment, clearly, and taking the
    cheapest pair (or target by target) first does not."""
    for seed, (n, queries) in enumerate(((1, 3), (2, 2), (2, 3), (3, 3), (2, 2), (3, 4), (2, 4), (3, 3))):
        yield contested_case(1000 * seed + seed % 2, n, queries, one_class(bound), bound.varies, greedy_fails=seed > 0)


CERTAIN = Experiment("certain", "assignments that every cost agrees on", _certain, None, called)


DUELS = Experiment(
    "duels",
    "two queries that cost nearly the same",
    _stored("duels"),
    _inputs(_drawn_duel),
    _duel,
    share=0.25,
    weight=0.9,
)


# --- the same thing twice, in other ways ---

QUERIES, TARGETS, IMAGES = "queries permuted", "targets permuted", "images permuted"


def _permuted(bound: Bound, case: Case) -> Seen:
    turn = torch.Generator().manual_seed(1)

    def queries(_layer: str, _key: str, value: Tensor) -> Tensor:
        return value[:, _rotated(value.shape[1])]

    def targets(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        order = torch.randperm(len(target["labels"]), generator=turn)
        return {k: v if k == "positive_map" else v[order] for k, v in target.items()}

    twins = {
        QUERIES: case.with_predictions(queries),
        TARGETS: replace(case, targets=tuple(map(targets, case.targets))),
        IMAGES: case.images(_rotated(len(case.counts))),
    }
    return replace(called(bound, case), twins={k: valued(bound, c) for k, c in twins.items()})


def _rotated(n: int) -> list[int]:
    return [*range(1, n), 0] if n else []


def _alone(bound: Bound, case: Case) -> Seen:
    twins = {f"image {b} alone": called(bound, case.images([b])) for b in range(len(case.counts))}
    return replace(called(bound, case), twins=twins)


def _relayered(bound: Bound, case: Case) -> Seen:
    """Every auxiliary layer's predictions as the final output of a call of their own; and gradients by layer."""
    twins = {}
    for layer in case.layers[1:]:
        if layer.startswith("aux"):
            outputs = {k: v for k, v in case.outputs.items() if k not in ("aux_outputs", case.options.encoder_key)}
            alone = replace(case, outputs={**outputs, **case.predictions(layer)}, label=f"{case.label}, {layer} alone")
            twins[layer] = valued(bound, alone)
    return replace(called(bound, case), twins=twins, crossed=gradients_by_layer(bound, case))


PADDED = "three masked tokens appended"
OTHER_LOGITS = "other logits outside text_mask"


def _padded(bound: Bound, case: Case) -> Seen:
    def longer(value: Tensor, filler: float) -> Tensor:
        return torch.cat([value, torch.full((*value.shape[:-1], 3), filler, dtype=value.dtype)], -1)

    padded = case.with_predictions(lambda _l, key, v: longer(v, 2.0) if key == "pred_logits" else v)
    padded = replace(
        padded,
        outputs={**padded.outputs, "text_mask": longer(case.outputs["text_mask"], False)},
        targets=tuple(
            {k: longer(v, 0) if k in ("token_labels", "positive_map") else v for k, v in t.items()}
            for t in case.targets
        ),
    )
    outside = ~case.outputs["text_mask"][:, None]
    other = case.with_predictions(
        lambda _l, key, v: torch.where(outside, 1 - v.nan_to_num(neginf=0.0), v) if key == "pred_logits" else v
    )
    return replace(
        called(bound, case),
        twins={PADDED: valued(bound, padded), OTHER_LOGITS: valued(bound, other)},
    )


PERMUTED = Experiment(
    "permuted",
    "queries, targets and images in another order",
    _stored("permuted"),
    _recipes("unequal"),
    _permuted,
    share=0.15,
)
ALONE = Experiment("alone", "images alone against the batch", _stored("alone"), _recipes("unequal"), _alone, share=0.15)
LAYERS = Experiment(
    "layers",
    "a layer alone against the same layer as auxiliary",
    _stored("layers"),
    _recipes("unequal"),
    _relayered,
    share=0.15,
)
PROMPTS = Experiment("prompts", "text padded and masked", _stored("prompts"), _recipes("unequal"), _padded, share=0.15)

AGAIN, EMPTIED, NEW, OTHER_SEED = "again", "without targets", "with a new criterion", "under another random state"
MOVED = "random state moved"
OTHERS = (
    *("with a target less an image", "with other target boxes", "with other predictions"),
    *("with the whole text", "without further layers"),
)
AFRESH = {name: f"{name}, with a new criterion" for name in OTHERS}


def _again(bound: Bound, case: Case) -> Seen:
    """A call, others with no or other targets, the first again: all on one criterion; then some on new ones."""
    try:
        criterion = bound.build(case.options)
    except Exception:
        return called(bound, case)

    def some(name: str, part: slice) -> Case:
        targets = tuple({k: v if k == "positive_map" else v[part] for k, v in t.items()} for t in case.targets)
        return replace(case, label=f"{case.label}, {name}", targets=targets)

    fewer, moved_boxes, elsewhere, whole_text, bare = OTHERS
    moved = tuple({**t, "boxes": t["boxes"] * 0.75} for t in case.targets)
    final = {k: v for k, v in case.outputs.items() if k not in ("aux_outputs", case.options.encoder_key)}
    turned = case.with_predictions(lambda _layer, _key, v: v.flip(1))
    others = {
        fewer: some(fewer, slice(1, None)),
        moved_boxes: replace(case, label=f"{case.label}, {moved_boxes}", targets=moved),
        elsewhere: replace(turned, label=f"{case.label}, {elsewhere}"),
        bare: replace(case, label=f"{case.label}, {bare}", outputs=final),
    }
    if "text_mask" in case.outputs:
        finite = case.with_predictions(lambda _layer, _key, v: v.nan_to_num(neginf=-5.0))  # padding may be −inf
        outputs = {**finite.outputs, "text_mask": torch.ones_like(case.outputs["text_mask"])}
        others[whole_text] = replace(finite, label=f"{case.label}, {whole_text}", outputs=outputs)
    _seed_everything(1)
    before = _random_states()
    first = called(bound, case, criterion)
    after = _random_states()
    drawn = [name for name in before if before[name] != after[name]]
    twins = {
        EMPTIED: called(bound, some(EMPTIED, slice(0)), criterion),
        **{name: valued(bound, other, criterion) for name, other in others.items()},
        AGAIN: called(bound, case, criterion),
        NEW: called(bound, case),
        **{AFRESH[name]: valued(bound, other) for name, other in others.items()},
    }
    _seed_everything(2)
    twins[OTHER_SEED] = valued(bound, case)
    return replace(first, twins=twins, remarks={MOVED: " and ".join(drawn)})


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _random_states() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()[1:]).encode() + np.random.get_state()[1].tobytes(),  # type: ignore[index]
        "random": repr(random.getstate()).encode(),
    }


REPEATED = Experiment(
    "repeated",
    "the same call again",
    _stored("repeated"),
    _recipes("wild"),
    _again,
    share=0.1,
)
