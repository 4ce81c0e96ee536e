"""The contract's formulas, one short function each, in float64, per image and per layer.

``textbook`` is a bundle of these functions: ``dataclasses.replace(textbook, giou=iou)`` is the same book with one
formula changed, and everything that uses the formula follows. Each function, a few lines in ``formulas``, takes the
book first, so that it reads ``book.giou(a, b)``, and the options of the criterion from ``book.o``. Nothing here is
meant to be fast.

Symbols: Q queries, K classes, T text tokens, n targets of one image, N of all, M matched pairs, nb the divisor,
x logits, p = σ(x), y the class target, m a target mask, G denoising groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import Tensor

from detr_reference.formulas import (
    boxes,
    classes,
    denoising,
    masks,
    matching,
    metrics,
    prompts,
    refusals,
    supervision,
    terms,
    whole,
)
from detr_reference.formulas.boxes import minus_log_sigmoid
from detr_reference.formulas.records import Layer, Pairs, Result, Targets
from detr_reference.options import Options

__all__ = ["TERMS", "Layer", "Pairs", "Result", "Targets", "Textbook", "minus_log_sigmoid", "textbook"]

Formula = Callable[..., Tensor]
TERMS = ("ce", "bbox", "giou")


@dataclass(frozen=True, eq=False)
class Textbook:
    """The bundle. ``o``: the options; every other field: a formula, called as ``book.formula(…)``."""

    o: Options = field(default_factory=Options)
    corners: Formula = boxes.corners
    area: Formula = boxes.area
    intersection: Formula = boxes.intersection
    union: Formula = boxes.union
    enclosing: Formula = boxes.enclosing
    share: Formula = boxes.share
    giou: Formula = boxes.giou
    l1: Formula = boxes.l1
    softmax_cost: Formula = matching.softmax_cost
    focal_difference: Formula = matching.focal_difference
    focal_cost: Formula = matching.focal_cost
    token_cost: Formula = matching.token_cost
    class_cost: Formula = matching.class_cost
    cost: Formula = matching.cost
    assign: Callable[..., Pairs] = matching.assign
    match: Callable[..., list[Pairs]] = matching.match
    class_weight: Formula = classes.class_weight
    softmax_class_target: Formula = classes.softmax_class_target
    softmax_loss: Formula = classes.softmax_loss
    softmax_divisor: Formula = classes.softmax_divisor
    focal_term: Formula = classes.focal_term
    alpha_weight: Formula = classes.alpha_weight
    focusing: Formula = classes.focusing
    focal_class_target: Formula = classes.focal_class_target
    token_class_target: Formula = classes.token_class_target
    in_loss: Formula = classes.in_loss
    focal_image: Formula = classes.focal_image
    focal_loss: Formula = classes.focal_loss
    class_divisor: Formula = classes.class_divisor
    num_boxes: Formula = terms.num_boxes
    over_ranks: Formula = terms.over_ranks
    matched_boxes: Callable[..., tuple[Tensor, Tensor]] = terms.matched_boxes
    loss_ce: Formula = terms.loss_ce
    loss_bbox: Formula = terms.loss_bbox
    loss_giou: Formula = terms.loss_giou
    layer_losses: Callable[..., dict[str, Tensor]] = terms.layer_losses
    layer_masks: Callable[..., Tensor | None] = masks.layer_masks
    mask_size: Callable[..., tuple[int, int]] = masks.mask_size
    padded: Formula = masks.padded
    interpolation: Formula = masks.interpolation
    resized: Formula = masks.resized
    matched_masks: Callable[..., tuple[Tensor, Tensor]] = masks.matched_masks
    mask_focal_term: Formula = masks.mask_focal_term
    dice: Formula = masks.dice
    loss_mask: Formula = masks.loss_mask
    loss_dice: Formula = masks.loss_dice
    mask_losses: Callable[..., dict[str, Tensor]] = masks.mask_losses
    denoising_layers: Callable[..., list[Layer]] = denoising.denoising_layers
    group_slots: Callable[..., int] = denoising.group_slots
    positive_slots: Formula = denoising.positive_slots
    denoising_pairs: Callable[..., list[Pairs]] = denoising.denoising_pairs
    denoising_divisor: Formula = denoising.denoising_divisor
    denoising_losses: Callable[..., dict[str, Tensor]] = denoising.denoising_losses
    layers: Callable[..., list[Layer]] = supervision.layers
    encoder_targets: Callable[..., Targets] = supervision.encoder_targets
    layer_targets: Callable[..., Targets] = supervision.layer_targets
    layer_match: Callable[..., list[Pairs]] = supervision.layer_match
    layer_mask: Callable[..., Tensor | None] = supervision.layer_mask
    layer_num_boxes: Formula = supervision.layer_num_boxes
    selected: Callable[..., bool] = terms.selected
    class_error: Formula = metrics.class_error
    cardinality_error: Formula = metrics.cardinality_error
    logged: Callable[..., dict[str, Tensor]] = metrics.logged
    scaled: Callable[..., dict[str, Tensor]] = whole.scaled
    in_mode: Callable[..., Textbook] = whole.in_mode
    compiled: Callable[..., Textbook] = whole.compiled
    state: Callable[..., dict[str, Tensor]] = whole.state
    copied: Callable[..., Textbook] = whole.copied
    phrases: Callable[..., list[prompts.Span]] = prompts.phrases
    class_spans: Callable[..., list[prompts.Span]] = prompts.class_spans
    span_tokens: Callable[..., list[int]] = prompts.span_tokens
    refuse_lost_classes: Callable[..., None] = prompts.refuse_lost_classes
    positive_map: Formula = prompts.positive_map
    refuse: Callable[..., None] = refusals.refuse
    refuse_weights: Callable[..., None] = refusals.refuse_weights
    refuse_missing: Callable[..., None] = refusals.refuse_missing
    refuse_lengths: Callable[..., None] = refusals.refuse_lengths
    refuse_labels: Callable[..., None] = refusals.refuse_labels
    refuse_boxes: Callable[..., None] = refusals.refuse_boxes
    taken: Callable[..., dict[str, Tensor]] = refusals.taken
    losses: Callable[..., Result] = whole.losses
    indices: Callable[..., list[tuple[Tensor, Tensor]]] = matching.indices
    brought: Formula = whole.brought
    placed: Formula = whole.placed
    weights: Callable[..., dict[str, float]] = whole.weights

    def __post_init__(self) -> None:
        # a formula becomes a method of this very bundle; replace() hands over methods of the old one, hence __func__
        own = vars(self)
        for name, formula in own.items():
            if name != "o":
                own[name] = MethodType(getattr(formula, "__func__", formula), self)

    def under(self, options: Options) -> Textbook:
        """The same formulas under other options."""
        return replace(self, o=options)

    def __call__(
        self, outputs: Mapping[str, Any], targets: Targets, given: Mapping[str, Sequence[Pairs]] | None = None
    ) -> Result:
        """All losses and matchings of one call; ``given`` fixes the matching of the layers it names."""
        return self.losses(outputs, targets, given or {})


textbook = Textbook()
