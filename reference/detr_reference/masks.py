"""Mask losses of the final layer: a focal loss and a dice loss over the pixels of each matched pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .classification import widened
from .matching import Layer, Pairs, on_device, on_host

_ALPHA: Final = 0.25
"""α of the pixels' focal loss, whatever that of the classes is; γ is 2 (facebookresearch/detr segmentation.py)."""


def read_masks(
    outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], layer: Layer
) -> tuple[Tensor, list[Tensor]]:
    """pred_masks [B, Q, h, w], logits at a size of their own, and each image's target masks [n, H, W] in 0..1.

    Raises ValueError that names what is missing or does not fit.
    """
    if "pred_masks" not in outputs:
        raise ValueError("outputs['pred_masks'] is missing, and losses has 'masks'")
    predicted: Tensor = outputs["pred_masks"]
    if predicted.ndim != 4 or predicted.shape[:2] != layer.boxes.shape[:2]:
        batch, queries = layer.boxes.shape[:2]
        raise ValueError(
            f"outputs['pred_masks'] has the shape {list(predicted.shape)}; it must be [{batch}, {queries}, h, w]"
        )
    masks = [_checked(f"targets[{b}]", target) for b, target in enumerate(targets)]
    in_numbers = [b for b, mask in enumerate(masks) if len(mask) and mask.dtype != torch.bool]
    for b, (low, high) in zip(
        in_numbers, on_host(torch.stack(masks[b].aminmax()).float() for b in in_numbers), strict=True
    ):
        if not (low >= 0 and high <= 1):
            raise ValueError(f"targets[{b}]['masks'] has values outside 0..1")
    return predicted, masks


def _checked(name: str, target: Mapping[str, Tensor]) -> Tensor:
    """The masks of one image. Raises ValueError unless it has one a label."""
    if "masks" not in target:
        raise ValueError(f"{name}['masks'] is missing, and losses has 'masks'")
    masks, n = target["masks"].detach(), len(target["labels"])
    if n == 0 and masks.shape == (0,):  # torch.tensor([]) is no target, of any kind
        return masks[:, None, None]
    if masks.ndim != 3 or len(masks) != n or (n and not masks.numel()):
        raise ValueError(f"{name}['masks'] has the shape {list(masks.shape)}; with {n} labels it must be [{n}, H, W]")
    return masks


def mask_loss_sums(predicted: Tensor, masks: Sequence[Tensor], matches: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
    """Σ over the matched pairs of each image of the focal loss, averaged over pixels, and Σ of the dice loss.

    ``predicted`` [B, Q, h, w] are resized to the largest height and width of all masks, to which masks are padded with
    zeros: that padding is background (facebookresearch/detr detr.py:164-191). Without pairs both are 0, in the graph.
    """
    queries = predicted.shape[1]
    rows = np.concatenate([b * queries + query for b, (query, _) in enumerate(matches)])
    index = on_device(predicted.device, [rows, *(target for _, target in matches)])
    matched = predicted.flatten(0, 1).index_select(0, next(index))
    size = [max(mask.shape[side] for mask in masks) for side in (1, 2)]
    sums = [widened(matched[:0]).sum().expand(2)]
    pairs = torch.split(matched, [len(query) for query, _ in matches])
    for x, mask, target in zip(pairs, masks, index, strict=True):
        if len(target):
            own = mask.index_select(0, target.to(mask.device))
            sums.append(_ImageSums.apply(x, own, size))  # type: ignore[no-untyped-call]
    focal, dice = torch.stack(sums).sum(0)
    return focal, dice


class _ImageSums(torch.autograd.Function):
    """``_image_sums``, computed again for its gradient: pixels are many, and autograd keeps a dozen numbers of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.size = size
        return _image_sums(x, mask, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mask = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            sums = _image_sums(x, mask, ctx.size)
        return torch.autograd.grad(sums, x, grad)[0], None, None


def _image_sums(x: Tensor, mask: Tensor, size: Sequence[int]) -> Tensor:
    """Both sums [2] over one image's pairs: logits [M, h, w] and masks [M, H_b, W_b], of any device and dtype."""
    x = F.interpolate(widened(x)[:, None], size=tuple(size), mode="bilinear", align_corners=False).flatten(1)
    height, width = (most - own for most, own in zip(size, mask.shape[1:], strict=True))
    m = F.pad(mask.to(x), (0, width, 0, height)).flatten(1)
    p = x.sigmoid()
    common = p * m
    return torch.stack([_focal(x, m, p + m - 2 * common).mean(1).sum(), _dice(p, m, common).sum()])


def _focal(x: Tensor, m: Tensor, missed: Tensor) -> Tensor:
    """α_t(1−p_t)²(−log p_t) of each pixel, 1−p_t being what is ``missed``; between 0 and 1 a mask weighs positive and
    negative (facebookresearch/detr segmentation.py, sigmoid_focal_loss)."""
    alpha_t = (1 - _ALPHA) + (2 * _ALPHA - 1) * m
    return alpha_t * missed.square() * F.binary_cross_entropy_with_logits(x, m, reduction="none")


def _dice(p: Tensor, m: Tensor, common: Tensor) -> Tensor:
    """1 − (2Σpm + 1)/(Σp + Σm + 1) of each pair (facebookresearch/detr segmentation.py, dice_loss)."""
    return 1 - (2 * common.sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)
