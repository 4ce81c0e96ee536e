"""The set criterion: every supervised layer is matched, then class, box and mask losses are summed over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .boxes import corners, giou
from .classification import cardinality_error, class_error, cross_entropy, focal_loss_sum, widened
from .denoising import read_denoising
from .masks import mask_loss_sums, read_masks
from .matching import HungarianMatcher, Ints, Layer, Pairs, Targets, eager, on_device, read_layer, read_targets
from .options import Options, options_of
from .tokens import build_caption, create_positive_map
from .weights import loss_weights

__all__ = ["HungarianMatcher", "SetCriterion", "build_caption", "build_criterion", "create_positive_map"]


class SetCriterion(nn.Module):
    """DETR's training loss and its kin's (facebookresearch/detr detr.py:83-255): losses by name, unweighted.

    The total is Σ losses[k] · weight_dict[k] over the keys of both; other losses are for the log and carry no
    gradient. The criterion has no state: its state_dict is empty.
    """

    def __init__(self, options: Options | None = None) -> None:
        """Raises ValueError where the options do not go together."""
        super().__init__()
        self.options = options or Options()
        for loss in self.options.losses:
            if loss not in ("labels", "boxes", "masks", "cardinality"):
                raise ValueError(
                    f"losses={self.options.losses!r}: there are 'labels', 'boxes', 'masks' and 'cardinality'"
                )
        if (self.options.class_divisor == "weights") != (self.options.class_loss == "softmax"):
            raise ValueError("class_divisor='weights' belongs to class_loss='softmax', and to no other")
        if self.options.denoising and self.options.class_loss == "softmax":
            raise ValueError("denoising=True needs a class_loss with negatives, 'focal' or 'token', not 'softmax'")
        self.matcher = HungarianMatcher(self.options)
        self.weight_dict = loss_weights(self.options)

    @eager
    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of all layers: 0-d tensors on the outputs' device. Neither argument is changed.

        ``outputs``: pred_logits [B, Q, C] and pred_boxes [B, Q, 4] (cx, cy, w, h in units of the image); where they
        exist, aux_outputs (a list of the same), the encoder's (enc_outputs or interm_outputs), text_mask [B, C],
        True on the tokens of the prompt, pred_masks [B, Q, h, w] where losses has "masks", and dn_meta (see
        ``denoising``). ``targets``: for each image labels [n], boxes [n, 4] and, for a token loss, token_labels
        [n, C], 1 on the tokens of the target's class; masks [n, H, W] (bool, or numbers in 0..1), of a size of the
        image's own, where losses has "masks".
        Raises ValueError that names the argument where something is missing or does not fit.
        """
        layers = self._layers(outputs)
        text_mask = _text_mask(outputs, layers) if self.options.class_loss == "token" else None
        wanted = read_targets(targets, layers[0], self.options, text_mask)
        denoising = read_denoising(outputs, wanted, layers[0], self.options)
        known = denoising.layers if denoising else []
        with_masks = "masks" in self.options.losses
        masks = read_masks(outputs, targets, layers[0]) if with_masks else None
        found = self.matcher.match(layers, wanted, known)
        matches = [_Match.of(images, layer, wanted) for images, layer in zip(found, layers, strict=True)]
        num_boxes = _num_boxes(sum(wanted.sizes), layers[0].boxes.device)
        losses = self._class_and_box_losses(layers, wanted, matches, num_boxes, text_mask)
        if denoising:
            positives = [_Match.of(denoising.positives, layer, wanted) for layer in known]
            losses |= self._class_and_box_losses(known, wanted, positives, num_boxes * denoising.groups, text_mask)
        if masks:
            losses |= self.loss_masks(*masks, found[0], num_boxes)
        if "labels" in self.options.losses and self.options.class_loss != "token":
            losses["class_error"] = self.class_error(layers[0], wanted, matches[0])
        if "cardinality" in self.options.losses:
            losses |= self.loss_cardinality(layers, wanted)
        if self.options.weighted:
            losses = {key: loss * self.weight_dict.get(key, 1.0) for key, loss in losses.items()}
        return losses

    def loss_labels(
        self,
        layers: Sequence[Layer],
        targets: Targets,
        matches: Sequence[_Match],
        num_boxes: float,
        text_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """loss_ce over all queries of each layer, those without a match being no object, or negatives throughout."""
        options = self.options
        softmax = options.class_loss == "softmax"
        device = layers[0].logits.device
        if text_mask is not None:
            text_mask, targets = _prompts_only(text_mask, targets)
        wanted = [
            match.classes(layer, targets) if softmax else match.positives(layer, targets, text_mask)
            for match, layer in zip(matches, layers, strict=True)
        ]
        losses = {}
        for layer, match, index in zip(layers, matches, on_device(device, wanted), strict=True):
            if softmax:
                loss = cross_entropy(layer.scores, index, options.eos_coef)
            else:
                loss = focal_loss_sum(layer.scores, index, options.focal_alpha, options.focal_gamma, text_mask)
                loss = loss / (num_boxes if options.class_divisor == "boxes" else max(len(match.rows), 1))
            losses[f"loss_ce{layer.suffix}"] = loss
        return losses

    def loss_boxes(
        self, layers: Sequence[Layer], targets: Targets, matches: Sequence[_Match], num_boxes: float
    ) -> dict[str, Tensor]:
        """loss_bbox = Σ |Δ|₁ / nb and loss_giou = Σ (1 − GIoU) / nb over the matched pairs of each layer."""
        # All pairs of all layers at once: their queries are numbered through.
        queries = torch.cat([widened(layer.boxes).flatten(0, 1) for layer in layers])
        first = np.cumsum([0, *(layer.boxes.shape[0] * layer.boxes.shape[1] for layer in layers)])
        rows, wanted = on_device(
            queries.device,
            [
                np.concatenate([match.rows + start for match, start in zip(matches, first, strict=False)]),
                np.concatenate([match.targets for match in matches]),
            ],
        )
        predicted, true = queries.index_select(0, rows), targets.boxes.index_select(0, wanted)
        pairs = [len(match.rows) for match in matches]
        l1 = torch.split((predicted - true).abs().sum(1), pairs)
        overlap = torch.split(1 - giou(corners(predicted), corners(true), self.options.giou_eps), pairs)
        losses = {}
        for layer, of_bbox, of_giou in zip(layers, l1, overlap, strict=True):
            losses[f"loss_bbox{layer.suffix}"] = of_bbox.sum() / num_boxes
            losses[f"loss_giou{layer.suffix}"] = of_giou.sum() / num_boxes
        return losses

    def loss_masks(
        self, predicted: Tensor, masks: Sequence[Tensor], matches: Sequence[Pairs], num_boxes: float
    ) -> dict[str, Tensor]:
        """loss_mask = Σ of the pairs' mean focal loss / nb and loss_dice = Σ of their dice losses / nb, final layer."""
        focal, dice = mask_loss_sums(predicted, masks, matches)
        return {"loss_mask": focal / num_boxes, "loss_dice": dice / num_boxes}

    def class_error(self, layer: Layer, targets: Targets, match: _Match) -> Tensor:
        """class_error of the final layer, for the log."""
        rows, labels = on_device(layer.logits.device, [match.rows, targets.channel[match.targets]])
        return class_error(layer.logits.detach().flatten(0, 1)[rows], labels)

    def loss_cardinality(self, layers: Sequence[Layer], targets: Targets) -> dict[str, Tensor]:
        """cardinality_error of each layer, for the log."""
        (sizes,) = on_device(layers[0].logits.device, [np.array(targets.sizes)])
        softmax = self.options.class_loss == "softmax"
        return {
            f"cardinality_error{layer.suffix}": cardinality_error(layer.logits.detach(), sizes, softmax)
            for layer in layers
        }

    def _class_and_box_losses(
        self,
        layers: Sequence[Layer],
        targets: Targets,
        matches: Sequence[_Match],
        num_boxes: float,
        text_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Those of "labels" and "boxes" that the options select, for layers with one divisor."""
        losses: dict[str, Tensor] = {}
        if "labels" in self.options.losses:
            losses |= self.loss_labels(layers, targets, matches, num_boxes, text_mask)
        if "boxes" in self.options.losses:
            losses |= self.loss_boxes(layers, targets, matches, num_boxes)
        return losses

    def _layers(self, outputs: Mapping[str, Any]) -> list[Layer]:
        """The supervised layers: the final one first, then the auxiliary ones, then the encoder."""
        options = self.options
        layers = [read_layer(outputs, "outputs", "", options)]
        for i, auxiliary in enumerate(outputs.get("aux_outputs", ())):
            layers.append(read_layer(auxiliary, f"outputs['aux_outputs'][{i}]", f"{options.aux_suffix}{i}", options))
        if options.has_encoder and options.encoder_key in outputs:
            name = f"outputs[{options.encoder_key!r}]"
            class_zero = options.encoder_targets == "class-zero"
            layers.append(read_layer(outputs[options.encoder_key], name, options.encoder_suffix, options, class_zero))
        for layer in layers:
            if len(layer.boxes) != len(layers[0].boxes):
                raise ValueError(f"{layer.name} has {len(layer.boxes)} images, but outputs has {len(layers[0].boxes)}")
        return layers


@dataclass(frozen=True)
class _Match:
    """The M matched pairs of one layer: their rows among its B·Q queries, and their numbers among the N targets.

    Of denoising queries, which are not matched, these are the positives: every target once a group.
    """

    rows: Ints
    targets: Ints

    @classmethod
    def of(cls, images: Sequence[Pairs], layer: Layer, targets: Targets) -> _Match:
        """From the pairs of each image."""
        queries = layer.boxes.shape[1]
        return cls(
            np.concatenate([b * queries + query for b, (query, _) in enumerate(images)]),
            np.concatenate([first + target for first, (_, target) in zip(targets.start, images, strict=False)]),
        )

    def classes(self, layer: Layer, targets: Targets) -> Ints:
        """The class of each query [B·Q] for a softmax: the last one, no object, where nothing is matched."""
        batch, queries, channels = layer.scores.shape
        classes = np.full(batch * queries, channels - 1)
        classes[self.rows] = targets.channel[self.targets]
        return classes

    def positives(self, layer: Layer, targets: Targets, text_mask: Tensor | None) -> Ints:
        """The flat indices, among B·Q·C logits (those that a text mask covers), of matched targets' channels."""
        channels = layer.scores.shape[-1] if text_mask is None else text_mask.shape[-1]
        if layer.class_zero:
            targets = targets.as_class_zero()
        first, last = np.searchsorted(targets.owner, np.stack([self.targets, self.targets + 1]))
        counts = last - first  # of channels that each pair's target wants
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        channel: Ints = targets.channel[np.repeat(first, counts) + nth]
        return np.repeat(self.rows, counts) * channels + channel


def _text_mask(outputs: Mapping[str, Any], layers: Sequence[Layer]) -> Tensor | None:
    """text_mask [B, C], which only the final outputs hold; it serves all layers."""
    mask: Tensor | None = outputs.get("text_mask")
    if mask is None:
        return None
    for layer in layers:
        batch, _, channels = layer.logits.shape
        if tuple(mask.shape) != (batch, channels):
            raise ValueError(
                f"outputs['text_mask'] has the shape {list(mask.shape)}; "
                f"{layer.name}['pred_logits'] needs {[batch, channels]}"
            )
    return mask.bool()


def _prompts_only(text_mask: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """The mask up to the longest prompt's end, and the targets without tokens outside their image's prompt."""
    mask = targets.prompts
    assert mask is not None
    image = np.repeat(np.arange(len(mask)), targets.sizes)
    kept = mask[image[targets.owner], targets.channel]
    length = max(np.flatnonzero(mask.any(0)), default=-1) + 1
    return text_mask[:, :length], replace(targets, owner=targets.owner[kept], channel=targets.channel[kept])


def _num_boxes(targets: int, device: torch.device) -> float:
    """nb: the mean number of targets of a process, at least 1 (facebookresearch/detr detr.py:231-236)."""
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = torch.tensor(targets, device=device)
        torch.distributed.all_reduce(total)
        targets, world = int(total), torch.distributed.get_world_size()
    return max(targets / world, 1.0)


def build_criterion(
    num_classes: int | None = None,
    num_decoder_layers: int | None = None,
    profile: str = "detr",
    *,
    class_loss: str | None = None,
    focal_alpha: float | None = None,
    focal_gamma: float | None = None,
    focal_alpha_matcher: float | None = None,
    focal_gamma_matcher: float | None = None,
    eos_coef: float | None = None,
    set_cost_class: float | None = None,
    set_cost_bbox: float | None = None,
    set_cost_giou: float | None = None,
    ce_loss_coef: float | None = None,
    bbox_loss_coef: float | None = None,
    giou_loss_coef: float | None = None,
    mask_loss_coef: float | None = None,
    dice_loss_coef: float | None = None,
    giou_eps: float | None = None,
    class_divisor: str | None = None,
    encoder_key: str | None = None,
    encoder_suffix: str | None = None,
    encoder_targets: str | None = None,
    aux_suffix: str | None = None,
    weighted: bool | None = None,
    two_stage: bool | None = None,
    denoising: bool | None = None,
    losses: Sequence[str] | None = None,
    **unknown: object,
) -> SetCriterion:
    """The criterion of a profile (detr, deformable-detr, dino, grounding-dino), with some of its options changed.

    What each option means, and its default, stands in ``options.Options``; None leaves it at the profile's.
    Raises ValueError for an unknown profile, option or value.
    """
    given = {name: value for name, value in locals().items() if name not in ("profile", "unknown")}
    changes = {name: value for name, value in given.items() if value is not None}
    return SetCriterion(options_of(profile).with_(**changes, **unknown))
