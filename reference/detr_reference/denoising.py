"""Contrastive denoising (DINO, section 3.3): queries made from noised targets, whose targets are known, not matched.

As a user of IDEA-Research/DINO has them, they stand in ``outputs["dn_meta"]``, a dict of

``num_dn_group``
    G, the number of groups: each holds every target once as a positive and once as a negative.
``pad_size``
    P, the number of denoising queries, G times the number of slots of a group. The first half of a group's slots are
    positives, image b's targets in the first n_b of them; the second half are negatives. The rest is padding.
``output_known_lbs_bboxes``
    their predictions: pred_logits [B, P, C], pred_boxes [B, P, 4], and aux_outputs, a list of the same.

Where ``dn_meta`` is absent, None, or without predictions, as outside training, there are no such queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matching import Layer, Pairs, Targets, read_layer
from .options import Options

_PREDICTIONS = "outputs['dn_meta']['output_known_lbs_bboxes']"


@dataclass(frozen=True)
class Denoising:
    """The denoising queries of a call: their layers, the positives of each image, the same in all layers, and G."""

    layers: list[Layer]
    positives: list[Pairs]
    groups: int


def read_denoising(outputs: Mapping[str, Any], targets: Targets, like: Layer, options: Options) -> Denoising | None:
    """The denoising queries that stand in ``outputs``, or None; they have the channels of the layer ``like``. Raises
    ValueError that names what does not fit."""
    meta = outputs.get("dn_meta") or {}
    found = meta.get("output_known_lbs_bboxes")
    if not options.denoising or found is None:
        return None
    layers = [read_layer(found, _PREDICTIONS, "_dn", options)]
    for i, auxiliary in enumerate(found.get("aux_outputs", ())):
        layers.append(read_layer(auxiliary, f"{_PREDICTIONS}['aux_outputs'][{i}]", f"_dn_{i}", options))
    groups, slots = _groups_and_slots(meta, targets)
    for layer in layers:
        _check(layer, like, (len(targets.sizes), groups * slots))
    return Denoising(layers, [positives(n, groups, slots) for n in targets.sizes], groups)


def positives(n: int, groups: int, slots: int) -> Pairs:
    """The queries that reconstruct an image's n targets, and the target of each: its slots 0..n−1 in every group
    (IDEA-Research/DINO dino.py:502-541)."""
    first = np.arange(groups)[:, None] * slots
    return (first + np.arange(n)).ravel(), np.tile(np.arange(n), groups)


def _groups_and_slots(meta: Mapping[str, Any], targets: Targets) -> tuple[int, int]:
    """The number of groups, and of slots in each. Raises ValueError where the targets do not fit into half of them."""
    for key in ("num_dn_group", "pad_size"):
        if key not in meta:
            raise ValueError(f"outputs['dn_meta'][{key!r}] is missing")
    groups, queries = int(meta["num_dn_group"]), int(meta["pad_size"])
    if groups < 1:
        raise ValueError(f"outputs['dn_meta']['num_dn_group'] is {groups}; it must be at least 1")
    most = max(targets.sizes)
    if queries % (2 * groups) or queries < 2 * groups * most:
        raise ValueError(
            f"outputs['dn_meta']['pad_size'] is {queries}; {groups} groups of positives and negatives, and up to "
            f"{most} targets an image, need a multiple of {2 * groups} from {2 * groups * most} on"
        )
    return groups, queries // groups


def _check(layer: Layer, like: Layer, shape: tuple[int, int]) -> None:
    """Raises ValueError unless the layer has as many images, queries and channels as it should."""
    batch, queries = shape
    if layer.boxes.shape[:2] != shape:
        raise ValueError(
            f"{layer.name}['pred_boxes'] has the shape {list(layer.boxes.shape)}; "
            f"with {batch} images and pad_size={queries} it must be {[batch, queries, 4]}"
        )
    if layer.logits.shape[-1] != like.logits.shape[-1]:
        raise ValueError(
            f"{layer.name}['pred_logits'] has {layer.logits.shape[-1]} channels; "
            f"{like.name}['pred_logits'] has {like.logits.shape[-1]}"
        )
