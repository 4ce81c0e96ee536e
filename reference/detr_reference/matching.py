"""What is matched (layers, targets), what a match costs, and the cheapest one-to-one assignment of each image."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice, pairwise
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .boxes import corners, giou
from .classification import focal_cost, widened
from .options import Options

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[Any]
Bools: TypeAlias = npt.NDArray[np.bool_]
Pairs: TypeAlias = tuple[Ints, Ints]
"""One image's match: its queries, and the target of each."""


P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps a function out of a caller's torch.compile: half of matching happens on the host, in numpy and scipy."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            uncompiled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return uncompiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Layer:
    """The predictions of one supervised layer: logits [B, Q, C] and boxes [B, Q, 4]; ``name`` is for messages.

    Class costs and losses read ``scores``: the log-probabilities of a softmax, taken once for both, or the logits.
    """

    name: str
    suffix: str
    logits: Tensor
    scores: Tensor
    boxes: Tensor
    class_zero: bool = False


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, image after image, N = Σ n_b of them; boxes [N, 4] are on the predictions' device.

    Positive p says that target ``owner[p]`` wants channel ``channel[p]``: its label, or each token of its class.
    Owners ascend. ``prompts`` [B, T] are the images' text masks. All but the boxes stay on the host, where matches are
    made.
    """

    sizes: list[int]
    boxes: Tensor
    owner: Ints
    channel: Ints
    prompts: Bools | None = None

    @property
    def start(self) -> list[int]:
        """The number of each image's first target, and N [B + 1]."""
        return list(accumulate(self.sizes, initial=0))

    def as_class_zero(self) -> Targets:
        """The same targets, all of class 0."""
        owner = np.arange(len(self.boxes))
        return replace(self, owner=owner, channel=np.zeros_like(owner))

    def columns(self) -> Iterator[Ints]:
        """For each image two arrays: its targets' channels, each once however many targets share it, and of each of its
        positives, one after the other, which of those it is."""
        bounds = np.searchsorted(self.owner, self.start)
        for first, last in pairwise(bounds):
            yield from np.unique(self.channel[first:last], return_inverse=True)

    def positives_each(self) -> list[list[int]]:
        """For each image, how many positives each of its targets has."""
        counts = np.bincount(self.owner, minlength=len(self.boxes)).tolist()
        return [counts[first:last] for first, last in pairwise(self.start)]


class HungarianMatcher(nn.Module):
    """Assigns targets to queries, one to one, at the least total cost λ_cls·class + λ_bbox·L1 − λ_giou·GIoU.

    A query with a NaN or an infinite prediction is taken only when no other is left. A logit of −inf counts where it
    is the target's own; elsewhere it is what masked tokens have.
    """

    def __init__(self, options: Options | None = None) -> None:
        """Raises ValueError where all three weights are zero."""
        super().__init__()
        self.options = options or Options()
        if not (self.options.set_cost_class or self.options.set_cost_bbox or self.options.set_cost_giou):
            raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou are all zero: nothing to match by")

    @eager
    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per image, the queries and targets matched: two int64 tensors [min(Q, n_b)].

        ``outputs`` are those of one layer: only their pred_logits and pred_boxes are read.
        """
        layer = read_layer(outputs, "outputs", "", self.options)
        (images,) = self.match([layer], read_targets(targets, layer, self.options))
        return [(torch.from_numpy(queries), torch.from_numpy(owners)) for queries, owners in images]

    @torch.no_grad()
    def match(self, layers: Sequence[Layer], targets: Targets, known: Sequence[Layer] = ()) -> list[list[Pairs]]:
        """Each layer's match of each image, on the layer's own predictions. Raises ValueError where a layer, or one
        whose match is ``known``, has a box of negative size."""
        # Layers with the same number of queries and the same class targets share every operation.
        alike = defaultdict(list)
        for layer in layers:
            alike[layer.boxes.shape[1], layer.class_zero].append(layer)
        groups = [(own, targets.as_class_zero() if zero else targets) for (_, zero), own in alike.items()]
        columns = on_device(layers[0].boxes.device, [array for _, wanted in groups for array in wanted.columns()])
        negative = [_negative(layer.boxes.flatten(0, 1)) for layer in known]
        found = on_host(chain(negative, *(self.costs(own, wanted, columns) for own, wanted in groups)))
        _refuse_negative(known, [bool(next(found)) for _ in known])
        matches: dict[str, list[Pairs]] = {layer.name: [] for layer in layers}
        for own, _ in groups:
            _refuse_negative(own, next(found))
            for costs in islice(found, len(targets.sizes)):
                for layer, pairs in zip(own, assign(costs), strict=True):
                    matches[layer.name].append(pairs)
        return list(matches.values())

    def costs(self, layers: Sequence[Layer], targets: Targets, columns: Iterator[Tensor]) -> Iterator[Tensor]:
        """First which of L layers alike have a box of negative size [L]; then image by image what its own targets cost
        (never another image's): [L, n_b, Q]. ``columns``: those of the targets, on the layers' device.

        Targets come before queries because the solver is fastest on rows that are fewer than columns.
        """
        options = self.options
        boxes = torch.stack([widened(layer.boxes) for layer in layers], 1)  # [B, L, Q, 4]
        yield _negative(boxes.transpose(0, 1).flatten(1, 2))
        # A sum is below infinity unless a term is NaN or +inf. The boxes of such queries become NaN, and so does all
        # that they cost.
        sums = torch.stack([layer.scores.sum(-1, dtype=boxes.dtype) for layer in layers], 1)
        boxes = torch.where(sums[..., None] < torch.inf, boxes, torch.nan)
        images = zip(
            boxes.movedim(-1, 0)[..., None, :].contiguous().unbind(1),  # [4, L, 1, Q] an image
            corners(boxes)[..., None, :].unbind(2),  # [2, 2, L, 1, Q]
            torch.split(targets.boxes.T[:, None, :, None], targets.sizes, 2),  # [4, 1, n, 1]
            torch.split(corners(targets.boxes)[:, :, None, :, None], targets.sizes, 3),  # [2, 2, 1, n, 1]
            strict=True,
        )
        positives = targets.positives_each()
        for b, (queries, query_corners, wanted, wanted_corners) in enumerate(images):
            scores = [layer.scores[b] for layer in layers]
            class_cost = self._class_cost(scores, next(columns), next(columns), positives[b])
            l1 = (queries - wanted).abs_().sum(0)
            overlap = giou(query_corners, wanted_corners, options.giou_eps)
            cost = l1.mul_(options.set_cost_bbox)
            yield cost.add_(class_cost, alpha=options.set_cost_class).sub_(overlap, alpha=options.set_cost_giou)

    def _class_cost(self, scores: Sequence[Tensor], columns: Tensor, of: Tensor, counts: list[int]) -> Tensor:
        """The mean cost over each target's ``counts`` positives, [L, n, Q], for one image's scores [Q, C] a layer."""
        x = torch.stack([widened(score.index_select(1, columns)) for score in scores])  # [L, Q, columns]
        if self.options.class_loss == "softmax":
            cost = -x.exp()
        else:
            cost = focal_cost(x, self.options.cost_alpha, self.options.cost_gamma)
        cost = cost.mT.index_select(1, of)
        if len(of) == len(counts):  # one channel each
            return cost
        return torch.stack([tokens.mean(1) for tokens in torch.split(cost, counts, 1)], 1)


def _negative(boxes: Tensor) -> Tensor:
    """Whether any of boxes [..., N, 4] has a negative width or height [...]."""
    return (boxes[..., 2:] < 0).flatten(-2).any(-1)


def _refuse_negative(layers: Sequence[Layer], negative: Sequence[bool] | Bools) -> None:
    for layer, is_negative in zip(layers, negative, strict=True):
        if is_negative:
            raise ValueError(f"{layer.name}['pred_boxes'] has a negative width or height")


def assign(costs: Floats) -> list[Pairs]:
    """The cheapest one-to-one match of each layer of costs [L, n, Q]: queries and their targets, min(Q, n) of each.
    Pairs that cost something not finite are made only where no others are left."""
    finite = np.isfinite(costs)
    if not finite.all():
        known = costs[finite].astype(np.float64)
        low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
        # dearer than all that avoiding such a pair can cost, yet not so dear that the others drown in its rounding
        costs = np.where(finite, costs, high + min(costs.shape[1:]) * (high - low) + 1)
    return [linear_sum_assignment(cost)[::-1] for cost in costs]


def on_host(tensors: Iterable[Tensor]) -> Iterator[npt.NDArray[Any]]:
    """Tensors as arrays: one by one, as they come; those of an accelerator all at once, in one transfer of bytes."""
    tensors = iter(tensors)
    first = next(tensors, None)
    if first is None:
        return
    if first.device.type == "cpu":
        yield from (tensor.cpu().numpy() for tensor in chain([first], tensors))
        return
    every = [tensor.to(first.device) for tensor in chain([first], tensors)]
    parts = [tensor.flatten().view(torch.uint8) for tensor in every]
    stop = list(accumulate(len(part) for part in parts))
    for tensor, part in zip(every, np.split(torch.cat(parts).cpu().numpy(), stop[:-1]), strict=True):
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        yield part.copy().view(kind).reshape(tensor.shape)


def on_device(device: torch.device, arrays: Sequence[Ints]) -> Iterator[Tensor]:
    """Index arrays as tensors on a device, in one transfer; CUDA takes a copy first, so that nothing need wait."""
    joined = torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=device.type == "cuda")
    return iter(torch.split(joined, [len(array) for array in arrays]))


def read_layer(outputs: Mapping[str, Any], name: str, suffix: str, options: Options, class_zero: bool = False) -> Layer:
    """The layer that stands in ``outputs``. Raises ValueError that names what is missing or does not fit."""
    for key in ("pred_logits", "pred_boxes"):
        if key not in outputs:
            raise ValueError(f"{name}[{key!r}] is missing")
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if logits.ndim != 3 or boxes.ndim != 3 or boxes.shape[-1] != 4 or logits.shape[:2] != boxes.shape[:2]:
        raise ValueError(
            f"{name}['pred_logits'] {list(logits.shape)} and {name}['pred_boxes'] {list(boxes.shape)} "
            "must be [B, Q, C] and [B, Q, 4]"
        )
    if options.class_loss != "token" and not class_zero and logits.shape[-1] != options.channels:
        raise ValueError(
            f"{name}['pred_logits'] has {logits.shape[-1]} channels; "
            f"num_classes={options.num_classes} with a {options.class_loss} loss needs {options.channels}"
        )
    scores = widened(logits).log_softmax(-1) if options.class_loss == "softmax" else logits
    return Layer(name, suffix, logits, scores, boxes, class_zero)


def read_targets(
    targets: Sequence[Mapping[str, Tensor]], layer: Layer, options: Options, text_mask: Tensor | None = None
) -> Targets:
    """The targets of the images that ``layer`` predicts. Raises ValueError that names what is wrong, and where."""
    if len(targets) != len(layer.boxes):
        raise ValueError(f"targets has {len(targets)} images, but {layer.name}['pred_boxes'] has {len(layer.boxes)}")
    if not len(targets):
        raise ValueError(f"{layer.name}['pred_boxes'] and targets have no image")
    by_token = options.class_loss == "token"
    for b, target in enumerate(targets):
        _check_shapes(f"targets[{b}]", target, layer.logits.shape[-1] if by_token else None)
    sizes = [len(target["labels"]) for target in targets]
    start = list(accumulate(sizes, initial=0))

    def refuse(bad: Any, key: str, why: str) -> None:
        """Raises where a target [N] is bad."""
        if bad.any():
            at = int(bad.argmax())
            b = int(np.searchsorted(start, at, side="right")) - 1
            raise ValueError(f"targets[{b}][{key!r}][{at - start[b]}] {why}")

    boxes = _joined(targets, "boxes", (0, 4)).to(widened(layer.boxes[:0]).dtype)
    given = [boxes, _joined(targets, "labels", (0,))]
    given += [_joined(targets, "token_labels", (0, layer.logits.shape[-1])) > 0] if by_token else []
    box, label, *more = on_host(given if text_mask is None else [*given, text_mask])
    refuse(~np.isfinite(box).all(1), "boxes", "is not finite")
    refuse((box[:, 2:] < 0).any(1), "boxes", "has a negative width or height")
    channel = label.astype(np.int64)
    if by_token:
        refuse(channel < 0, "labels", "is negative")
        refuse(~more[0].any(1), "token_labels", "marks no token")
        owner, channel = more[0].nonzero()
    else:
        refuse((channel < 0) | (channel >= options.num_classes), "labels", f"is not in 0..{options.num_classes - 1}")
        owner = np.arange(len(channel))
    boxes = boxes.to(layer.boxes.device)
    return Targets(sizes, boxes, owner, channel, None if text_mask is None else more[-1])


def _check_shapes(name: str, target: Mapping[str, Tensor], tokens: int | None) -> None:
    """Raises ValueError unless the target has its keys, and as many boxes and token rows as labels."""
    keys = ("labels", "boxes") if tokens is None else ("labels", "boxes", "token_labels")
    for key in keys:
        if key not in target:
            raise ValueError(f"{name}[{key!r}] is missing")
    n = len(target["labels"])
    for key, row in zip(keys, ((), (4,), (tokens,)), strict=False):
        shape = tuple(target[key].shape)
        if shape != (n, *row) and not (n == 0 and shape == (0,)):  # torch.tensor([]) is no target, of any kind
            raise ValueError(f"{name}[{key!r}] has the shape {list(shape)}; with {n} labels it must be {[n, *row]}")
    if n and target["labels"].is_floating_point():
        raise ValueError(f"{name}['labels'] must be integers, not {target['labels'].dtype}")


def _joined(targets: Sequence[Mapping[str, Tensor]], key: str, empty: tuple[int, ...]) -> Tensor:
    """One tensor of all images' rows. Images without any are left out, since their dtype may be arbitrary."""
    rows = [target[key].detach() for target in targets if len(target[key])]
    return torch.cat(rows) if rows else torch.empty(empty)
