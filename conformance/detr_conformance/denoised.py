"""Contrastive denoising: cases with denoising queries in ``outputs["dn_meta"]``, and the experiments on them.

The form is that of IDEA-Research/DINO (see ``detr_reference.denoising``): G groups, each with a slot for every target
as a positive and one as a negative; images with fewer targets than the fullest leave slots empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from detr_conformance.candidate import Bound
from detr_conformance.cases import LOGITS, Case, Recipe, as_float32, build, plain_boxes
from detr_conformance.experiments import Experiment, called, fitted_to, from_seeds, valued
from detr_conformance.observation import observe, weighed
from detr_conformance.seen import Seen

WITHOUT: Final = "without dn_meta"
BARE: Final = "with dn_meta, but no predictions in it"
MOVED: Final = "with other denoising predictions"


def denoised_case(bound: Bound, recipe: Recipe, groups: int, spare: int = 0) -> Case:
    """The case of a recipe with ``groups`` groups of denoising queries, for each layer but the encoder. Some image of
    it must have targets.

    A group has as many positives as the fullest image has targets, and ``spare`` more, and as many negatives. Positives
    lie near their target, negatives somewhat farther off, as the noise of DINO places them.
    """
    o = bound.options.with_(denoising=True)
    plain = build(fitted_to(recipe, bound), o, bound.varies)
    half = max(plain.counts) + spare
    slots = groups * 2 * half
    rng = np.random.default_rng([recipe.seed, 2])

    def layer() -> dict[str, Tensor]:
        logits = LOGITS[recipe.logits](rng, (len(plain.counts), slots, plain.outputs["pred_logits"].shape[-1]))
        boxes = np.stack([_noised(rng, t["boxes"].numpy(), groups, half) for t in plain.targets])
        return {"pred_logits": as_float32(logits), "pred_boxes": as_float32(boxes)}

    known: dict[str, Any] = layer()
    aux = len(plain.outputs.get("aux_outputs", ()))
    if aux:
        known["aux_outputs"] = [layer() for _ in range(aux)]
    meta = {"num_dn_group": groups, "pad_size": slots, "output_known_lbs_bboxes": known}
    label = f"{plain.label}, {groups} groups of {2 * half} denoising queries"
    return replace(plain, label=label, outputs={**plain.outputs, "dn_meta": meta})


def _noised(rng: np.random.Generator, targets: Any, groups: int, half: int) -> Any:
    """Boxes [G·2·half,4] of one image's denoising queries; those of empty slots are anywhere."""
    boxes = plain_boxes(rng, groups * 2 * half).reshape(groups, 2, half, 4)
    noise = rng.normal(0, np.array([0.1, 0.3])[:, None, None], (groups, 2, len(targets), 4))
    boxes[:, :, : len(targets)] = (targets * np.exp(noise)).clip(0.02, 0.98)
    return boxes.reshape(-1, 4)


DINO: Final = frozenset({"dino"})  # the profile that has denoising queries
_SIMPLEST: Final = (Recipe(301, (1,), 2, classes=3), 1)

MADE_DENOISING: Final[list[tuple[Any, ...]]] = [
    _SIMPLEST,
    (Recipe(302, (1,), 3, classes=3), 2),
    (Recipe(303, (2,), 4, classes=4), 3),
    (Recipe(304, (2, 1), 4, classes=3, aux=1), 2),
    (Recipe(305, (1, 3), 5, classes=3, aux=2, encoder_queries=4), 2),
    (Recipe(306, (0, 2), 4, classes=3, aux=1), 2),
    (Recipe(307, (2, 0, 1), 4, classes=5, aux=1, encoder_queries=3), 3),
    (Recipe(308, (3, 1), 4, classes=3, aux=5), 1),
    (Recipe(309, (3, 2), 2, classes=3), 2),
    (Recipe(310, (2, 1), 4, classes=3, aux=1), 2, 1),
    (Recipe(311, (2, 2), 4, classes=3, logits="confident"), 2),
    (Recipe(312, (2, 1), 3, classes=2, logits="grid", boxes="grid"), 3),
]


def _cases(bound: Bound) -> Iterator[Case]:
    return (denoised_case(bound, *made) for made in MADE_DENOISING)


def _drawn(bound: Bound, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    counts = tuple(int(n) for n in rng.integers(0, 4, rng.integers(1, 4)))
    counts = counts if any(counts) else (1,)
    queries, aux, groups = (int(rng.integers(low, high)) for low, high in ((1, 6), (0, 3), (1, 4)))
    return denoised_case(bound, Recipe(seed, counts, queries, classes=3, aux=aux, encoder_queries=3), groups)


def without_denoising(bound: Bound) -> str:
    """Why denoising is not judged: on the simplest case the candidate returns nothing for it; else ""."""
    return _unusable(bound) or (
        "" if _keys(bound) else "the candidate returns no loss with the suffix _dn for the queries in dn_meta"
    )


def _unusable(bound: Bound) -> str:
    case = denoised_case(bound, *_SIMPLEST)
    raised = observe(bound, case, grads=False).raised
    if not raised or any(key.endswith("_dn") for key in weighed(bound, case)):
        return ""  # one that weighs their losses takes them, however the call ends
    return f"the candidate takes no outputs with dn_meta: {raised}"


def _keys(bound: Bound) -> list[str]:
    case = denoised_case(bound, *_SIMPLEST)
    got = observe(bound, case, grads=False)
    return sorted(key for key in (weighed(bound, case) if got.raised else got.keys) if "_dn" in key)


def _beside(bound: Bound, case: Case) -> Seen:
    """The case, and whether its inputs are as before; and its plain part again without denoising queries or with other
    ones."""
    plain = {k: v for k, v in case.outputs.items() if k != "dn_meta"}
    bare = {k: v for k, v in case.outputs["dn_meta"].items() if k != "output_known_lbs_bboxes"}

    def other(layer: str, _key: str, value: Tensor) -> Tensor:
        return value.flip(1) if layer in case.denoising else value

    twins = {
        WITHOUT: replace(case, outputs=plain),
        BARE: replace(case, outputs={**plain, "dn_meta": bare}),
        MOVED: case.with_predictions(other),
    }
    seen = Seen(bound, case, observe(bound, case, inputs=True))
    return replace(seen, twins={name: valued(bound, twin) for name, twin in twins.items()})


DENOISING = Experiment(
    "denoising", "denoising queries", _cases, from_seeds(_drawn), called, share=0.15, declined=without_denoising
)
BESIDE_DENOISING = Experiment(
    "beside denoising", "the same queries without, and beside, denoising ones", _cases, from_seeds(_drawn), _beside,
    share=0.1, declined=_unusable,
)  # fmt: skip
