"""Masks: cases with predicted and target masks, and the experiments on them.

Target masks have a size of each image's own, so that a batch must pad them, and predicted masks one of the batch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from detr_conformance.candidate import Bound
from detr_conformance.cases import LOGITS, Case, Recipe, as_float32, build
from detr_conformance.experiments import Experiment, called, fitted_to, from_seeds, valued
from detr_conformance.observation import observe, weighed
from detr_conformance.registry import DETR
from detr_conformance.seen import Seen

MASKED: Final = DETR | {"deformable-detr"}  # the profiles that have masks
UINT8: Final = "as uint8"
DECODED: Final = "decoded from COCO run-length encoding"

Sizes = tuple[tuple[int, int], ...]


def masked_case(bound: Bound, recipe: Recipe, sizes: Sizes, given: tuple[int, int]) -> Case:
    """The case of a recipe with masks: pred_masks [B,Q,h,w] of the size ``given``, and for image b boolean target masks
    of the size ``sizes[b]``, a filled box each with every fifth pixel flipped."""
    losses = tuple(dict.fromkeys((*bound.options.losses, "masks")))
    plain = build(fitted_to(recipe, bound), bound.options.with_(losses=losses), bound.varies)
    rng = np.random.default_rng([recipe.seed, 1])
    logits = LOGITS[recipe.logits](rng, (len(sizes), plain.queries, *given))
    targets = [
        {**target, "masks": torch.stack([*_drawn_masks(rng, n, size)]) if n else torch.zeros(0, *size).bool()}
        for target, n, size in zip(plain.targets, plain.counts, sizes, strict=True)
    ]
    label = f"{plain.label}, masks {given[0]}×{given[1]} to " + ", ".join(f"{h}×{w}" for h, w in sizes)
    return replace(
        plain, label=label, outputs={**plain.outputs, "pred_masks": as_float32(logits)}, targets=tuple(targets)
    )


def _drawn_masks(rng: Generator, n: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for _ in range(n):
        low, high = np.sort(rng.integers(0, np.array(size) + 1, (2, 2)), 0)
        mask = rng.random(size) < 0.2
        mask[low[0] : high[0], low[1] : high[1]] ^= True
        yield torch.from_numpy(mask)


def without_masks(bound: Bound) -> str:
    """Why masks are not judged: on the simplest case the candidate raises, or returns no mask losses; else ""."""
    case = masked_case(bound, _SIMPLEST[0], *_SIMPLEST[1:])
    got = observe(bound, case, grads=False)
    if {"loss_mask", "loss_dice"} & (weighed(bound, case) if got.raised else got.keys):
        return ""  # one that weighs them has them, however the call ends
    if "losses" not in bound.passes:
        return "the factory does not take `losses`, so that masks cannot be asked for"
    if got.raised:
        return f"with 'masks' in losses the candidate raises on the simplest case: {got.raised}"
    return "with 'masks' in losses the candidate returns neither loss_mask nor loss_dice"


_WEIGHTS: Final = (("mask_loss_coef", 2.0), ("dice_loss_coef", 5.0))
_SIMPLEST: Final[tuple[Recipe, Sizes, tuple[int, int]]] = (Recipe(201, (1,), 2, classes=3), ((4, 4),), (2, 2))

MADE_MASKS: Final[list[tuple[Recipe, Sizes, tuple[int, int]]]] = [
    _SIMPLEST,
    (Recipe(202, (1,), 3, classes=3), ((5, 7),), (3, 4)),
    (Recipe(203, (2,), 4, classes=3), ((4, 5),), (3, 4)),
    (Recipe(204, (3,), 5, classes=4, aux=1), ((6, 5),), (2, 3)),
    (Recipe(205, (2, 1), 4, classes=3), ((4, 6), (7, 3)), (3, 3)),
    (Recipe(206, (2, 0, 1), 4, classes=3, aux=2, encoder_queries=3), ((3, 4), (8, 8), (5, 3)), (4, 4)),
    (Recipe(207, (1, 3), 4, classes=3), ((9, 8), (5, 6)), (4, 5)),
    (Recipe(208, (2, 2), 3, classes=4, aux=1, options=_WEIGHTS), ((3, 3), (4, 2)), (6, 7)),
    (Recipe(209, (3,), 2, classes=3, options=_WEIGHTS), ((4, 5),), (2, 3)),
    (Recipe(210, (4, 1), 2, classes=3), ((3, 4), (5, 5)), (3, 2)),
    (Recipe(211, (1,), 1, classes=2), ((3, 4),), (1, 1)),
    (Recipe(212, (2,), 3, classes=2, options=_WEIGHTS), ((1, 1),), (1, 1)),
    (Recipe(213, (2, 1), 3, classes=2, options=_WEIGHTS), ((1, 5), (4, 1)), (2, 3)),
    (Recipe(214, (2, 1), 4, classes=3, logits="confident"), ((4, 5), (6, 4)), (3, 3)),
    (Recipe(215, (2, 1), 4, classes=3, logits="grid"), ((4, 4), (4, 4)), (4, 4)),
]
NO_MASKS: Final[list[tuple[Recipe, Sizes, tuple[int, int]]]] = [
    (Recipe(221, (0,), 2, classes=3), ((4, 5),), (2, 3)),
    (Recipe(222, (0, 0), 3, classes=3, aux=1), ((4, 5), (6, 3)), (3, 3)),
    (Recipe(223, (0,), 1, classes=2), ((1, 1),), (1, 1)),
]
_FORMS: Final = [MADE_MASKS[i] for i in (1, 2, 4, 5, 6)]


def _cases(made: list[tuple[Recipe, Sizes, tuple[int, int]]]) -> Callable[[Bound], Iterator[Case]]:
    return lambda bound: (masked_case(bound, *one) for one in made)


def _drawn(bound: Bound, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    counts = tuple(int(n) for n in rng.integers(0, 4, rng.integers(1, 4)))
    counts = counts if any(counts) else (1,)
    sizes = tuple((int(h), int(w)) for h, w in rng.integers(1, 9, (len(counts), 2)))
    given = (int(rng.integers(1, 7)), int(rng.integers(1, 7)))
    palette = str(rng.choice(["normal", "normal", "grid", "confident"]))
    queries, aux = int(rng.integers(1, 6)), int(rng.integers(0, 2))
    return masked_case(bound, Recipe(seed, counts, queries, classes=3, aux=aux, logits=palette), sizes, given)


def _in_other_forms(bound: Bound, case: Case) -> Seen:
    """Boolean masks, and the same as uint8 and as pycocotools decodes them."""
    forms = {UINT8: Tensor.byte, DECODED: _decoded}
    twins = {
        name: replace(
            case,
            label=f"{case.label}, masks {name}",
            targets=tuple({**t, "masks": form(t["masks"])} for t in case.targets),
        )
        for name, form in forms.items()
    }
    return replace(called(bound, case), twins={name: valued(bound, twin) for name, twin in twins.items()})


def _decoded(masks: Tensor) -> Tensor:
    """Boolean masks [n,H,W] once round through COCO's run-length encoding: uint8, column after column in memory."""
    from pycocotools import mask as coco

    if not len(masks):
        return masks.byte()
    encoded: Any = coco.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 dislikes how pycocotools asks for its array
        return torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1)


MASKS = Experiment(
    "masks", "target masks of unequal sizes", _cases(MADE_MASKS), from_seeds(_drawn), called, share=0.15,
    weight=1.5, declined=without_masks,
)  # fmt: skip
UNMASKED = Experiment(
    "unmasked", "masks, and no targets", _cases(NO_MASKS), None, called, weight=0.1, declined=without_masks
)
CODED_MASKS = Experiment(
    "coded masks", "the same masks in other forms", _cases(_FORMS), None, _in_other_forms, weight=0.1,
    declined=without_masks,
)  # fmt: skip
