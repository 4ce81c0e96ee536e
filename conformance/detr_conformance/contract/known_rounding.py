"""Known roundings: what is computed in half precision, or by a formula that overflows in single precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.known_softmax import nll
from detr_conformance.contract.normalisation import loss_bbox_is_the_sum_of_l1_over_nb
from detr_conformance.contract.numbers import extremes_stay_finite, loss_giou_is_precise
from detr_conformance.registry import DETR, FOCAL, TEXT, known
from detr_reference.textbook import Textbook

_EXACT = "compute in the dtype of the outputs, float32 at least"


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).double()


def _of_targets(cast: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def taken(before: Callable[..., Any], book: Textbook, target: Any) -> Any:
        own = before(target)
        return {**own, "boxes": cast(own["boxes"])}

    return {"taken": taken}


def _matched(pred: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def matched_boxes(before: Callable[..., Any], book: Textbook, *args: Any) -> tuple[Tensor, Tensor]:
        found = before(*args)
        return pred(found[0]), target(found[1])

    return {"matched_boxes": matched_boxes}


def _as_it_is(x: Tensor) -> Tensor:
    return x


for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
    cast = _cast(dtype)
    for id, sentence, around in (
        ("target-boxes-everywhere-in", "Target boxes are rounded to {}, in cost and losses.", _of_targets(cast)),
        ("predicted-boxes-everywhere-in", "Predicted boxes are rounded to {}, in cost and losses.",
         {"layers": lambda before, book, o, cast=cast: [replace(x, boxes=cast(x.boxes)) for x in before(o)]}),
        ("target-boxes-of-the-losses-in", "Target boxes are rounded to {} in the box losses.",
         _matched(_as_it_is, cast)),
        ("predicted-boxes-of-the-losses-in", "Predicted boxes are rounded to {} in the box losses.",
         _matched(cast, _as_it_is)),
        ("boxes-of-the-losses-in", "The boxes of matched pairs are rounded to {} in the box losses.",
         _matched(cast, cast)),
    ):  # fmt: skip
        known(loss_bbox_is_the_sum_of_l1_over_nb, f"{id}-{name}", sentence.format(name), fix=_EXACT, around=around)
    known(
        loss_giou_is_precise, f"giou-of-boxes-in-{name}", f"The GIoU is computed from boxes rounded to {name}.",
        fix=_EXACT, around={"giou": lambda before, book, a, b, cast=cast: before(cast(a), cast(b))},
    )  # fmt: skip

# --- exponentials written out, in float32 ---


def _ratio(z: Tensor) -> Tensor:
    """σ(z) as e^z / (1 + e^z)."""
    e = z.float().exp()
    return (e / (1 + e)).double()


def _focal_term(before: Callable[..., Tensor], book: Textbook, x: Tensor, y: Tensor) -> Tensor:
    """−log σ(z) as log(1 + e^−z)."""
    z = torch.where(y > 0, x, -x)
    return book.alpha_weight(y) * book.focusing(z) * (1 + (-z).float().exp()).log().double()


_STABLE = "use log_softmax, sigmoid and softplus, which do not overflow"

known(
    extremes_stay_finite, "softmax-without-its-maximum",
    "log softmax is x − log Σ exp(x), the maximum not subtracted: infinite from logits of 89.", fix=_STABLE,
    profiles=DETR, **nll(lambda x, y, k: (x.float().exp().sum(-1).log() - x.gather(-1, y[:, None])[:, 0]).double()),
)  # fmt: skip
known(
    extremes_stay_finite, "logarithm-of-one-plus-an-exponential",
    "−log σ(x) is log(1 + exp(−x)): infinite from logits of 89.", fix=_STABLE, profiles=FOCAL | TEXT,
    around={"focal_term": _focal_term},
)  # fmt: skip
known(
    extremes_stay_finite, "probability-as-a-ratio-of-exponentials",
    "σ(x) is exp(x)/(1 + exp(x)): not a number from logits of 89.", fix=_STABLE, profiles=FOCAL | TEXT,
    around={"focusing": lambda before, book, z: _ratio(-z) ** book.o.focal_gamma},
)  # fmt: skip
