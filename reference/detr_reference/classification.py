"""Class costs and class losses: softmax cross-entropy, and the sigmoid focal loss over classes or text tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 2**16
"""How many logits are done at once on a CPU: fresh memory costs it more than the arithmetic done in it."""

_SOFTPLUS_THRESHOLD = 40
"""softplus(x) is taken for x from here on: torch's default of 20 would leave float64 half its digits."""


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """What it costs to call each logit a positive: its focal loss as a positive less that as a negative,
    α(1−p)^γ(−log p) − (1−α)p^γ(−log(1−p)) (fundamentalvision/Deformable-DETR matcher.py:77-81, which adds 1e-8
    inside the logarithms where this takes them of σ exactly, as roboflow/rf-detr models/matcher.py:101-103 does)."""
    p = logits.sigmoid()
    minus_log_not_p = F.softplus(logits, threshold=_SOFTPLUS_THRESHOLD)
    minus_log_p = minus_log_not_p - logits
    return alpha * (1 - p) ** gamma * minus_log_p - (1 - alpha) * p**gamma * minus_log_not_p


def focal_loss_sum(
    logits: Tensor, positives: Tensor, alpha: float, gamma: float, text_mask: Tensor | None = None
) -> Tensor:
    """Σ of the focal loss (Lin 2017, eq. 5) over all B·Q·C logits [B, Q, C]; half precision is summed in float32.

    ``positives`` [P] are the flat indices of the positive logits; every other one is a negative. Where ``text_mask``
    [B, T] is False, and beyond T, a logit has no part in it, whatever its value; flat indices then count B·Q·T.
    α < 0 switches α off (both weights 1).
    """
    loss: Tensor = _FocalSum.apply(logits, positives, alpha, gamma, text_mask)  # type: ignore[no-untyped-call]
    return loss


class _FocalSum(torch.autograd.Function):
    """Loss and gradient at once, since both need σ(x)^γ and softplus(x). The gradient is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positives: Tensor, alpha: float, gamma: float, text_mask: Tensor | None
    ) -> Tensor:
        for_positive, for_negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        x = widened(logits)
        if text_mask is None:
            x = x.clone(memory_format=torch.contiguous_format)
        else:
            x = x[..., : text_mask.shape[1]].where(text_mask[:, None], -torch.inf).contiguous()
        flat = x.view(-1)
        # σ(−x) = 1 − σ(x): a positive is a negative mirrored
        loss, slope = _negative(-flat[positives], gamma)
        total, slope_of_positives = for_positive * loss.sum(), -for_positive * slope
        flat[positives] = -torch.inf  # as a negative it has neither loss nor slope
        for part in torch.split(flat, _PART if x.is_cpu else max(flat.numel(), 1)):
            loss, slope = _negative(part, gamma)
            total += for_negative * loss.sum()
            torch.mul(slope, for_negative, out=part)  # slopes take the place of logits
        flat[positives] = slope_of_positives
        ctx.save_for_backward(x)
        ctx.like = logits.shape, logits.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        shape, dtype = ctx.like
        gradient = slope.new_zeros(shape) if slope.shape != shape else torch.empty_like(slope)
        torch.mul(slope, grad, out=gradient[..., : slope.shape[-1]])
        return gradient.to(dtype), None, None, None, None


def _negative(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The unweighted focal loss p^γ · softplus(x) of a negative, p = σ(x), and its derivative
    p^γ · (γ(1−p) softplus(x) + p)."""
    p = x.sigmoid()
    softplus = F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)
    slope = (1 - p).mul_(softplus).mul_(gamma).add_(p)
    modulation = p.pow_(gamma)
    return softplus.mul_(modulation), slope.mul_(modulation)


def cross_entropy(log_probabilities: Tensor, classes: Tensor, eos_coef: float) -> Tensor:
    """Σ w_y·nll / Σ w_y over all queries, for log-probabilities [B, Q, K + 1] and classes [B·Q]; w is 1, and
    ``eos_coef`` for the last class, no object (facebookresearch/detr detr.py:108-127)."""
    weight = log_probabilities.new_ones(log_probabilities.shape[-1])
    weight[-1] = eos_coef
    return F.nll_loss(log_probabilities.flatten(0, 1), classes, weight)


@torch.no_grad()
def class_error(logits: Tensor, classes: Tensor) -> Tensor:
    """100 − top-1 accuracy in percent of matched queries: logits [M, C], classes [M]. 0 where nothing is matched, since
    nothing is wrong (facebookresearch/detr util/misc.py:433-448 gives 100 there)."""
    misses = (logits.argmax(-1) != classes).sum()
    return 100 * misses / max(len(classes), 1)


@torch.no_grad()
def cardinality_error(logits: Tensor, sizes: Tensor, softmax: bool) -> Tensor:
    """Mean over images of |number of detections − number of targets|, for logits [B, Q, C] and sizes [B].

    A detection is a query whose best class is not the last, no object (softmax; facebookresearch/detr
    detr.py:129-141), or has σ > .5 (transformers loss_deformable_detr.py: a sigmoid criterion's last class is real).
    """
    # amax, not argmax, which is ten times slower; argmax takes the first of equals, hence >=
    detected = logits[..., :-1].amax(-1) >= logits[..., -1] if softmax else logits.amax(-1) > 0
    return (detected.sum(-1) - sizes).abs().float().mean()


def widened(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
