"""Time and memory of the reference criterion beside published ones, on the same inputs, in one process, on one thread.

    python benchmarks/against_published.py [--quick]

The two sides are run in turn, after one call of each that is not counted; a time is the median of seven (one for the
shapes with a +, which take seconds). Memory is the peak that one forward and backward adds to a process that holds
the inputs, the gradients of the inputs included. Ratios travel between machines; milliseconds do not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_reference.criterion import build_criterion

CPU = torch.device("cpu")
LOSSES = ("labels", "boxes", "cardinality")  # what transformers always computes
COST = {"set_cost_class": 2.0, "set_cost_bbox": 5.0, "set_cost_giou": 2.0}
WEIGHT = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """B images of Q queries, C class channels (or text tokens) and n targets; decoder layers and encoder outputs."""

    name: str
    images: int
    queries: int
    channels: int
    targets: int
    layers: int = 6
    encoder: bool = False

    @property
    def slow(self) -> bool:
        return self.name.endswith("+")


@dataclass(frozen=True)
class Comparison:
    """Two criterions of the same meaning. Each takes layers (final, auxiliary …, encoder) and targets."""

    shape: Shape
    peer: str
    theirs: Callable[[list[Losses], list[Losses]], Losses]
    ours: Callable[[list[Losses], list[Losses]], Losses]
    layers: list[Losses]
    targets: list[Losses]


# --- inputs -----------------------------------------------------------------------------------------------------------


def half_trained(
    shape: Shape, device: torch.device, token_maps: Tensor | None = None
) -> tuple[list[Losses], list[Losses]]:
    """Layers and targets as in the middle of training: a few queries lie about each target and lean to its class, the
    rest are background. ``token_maps`` [K, C] makes the channels text tokens: 0/1, a row a class."""
    random = torch.Generator().manual_seed(0)
    classes = shape.channels if token_maps is None else len(token_maps)
    targets = []
    for _ in range(shape.images):
        labels = torch.randint(classes, (shape.targets,), generator=random)
        size = 0.05 + 0.3 * torch.rand(shape.targets, 2, generator=random)
        centre = size / 2 + (1 - size) * torch.rand(shape.targets, 2, generator=random)
        targets.append({"labels": labels, "boxes": torch.cat([centre, size], 1)})
        if token_maps is not None:
            targets[-1]["token_labels"] = token_maps[labels]
    layers = []
    for _ in range(shape.layers + shape.encoder):
        logits = torch.randn(shape.images, shape.queries, shape.channels, generator=random) - 3
        boxes = torch.rand(shape.images, shape.queries, 4, generator=random) * 0.5 + 0.2
        for b, target in enumerate(targets):
            near = torch.randperm(shape.queries, generator=random)[: 3 * shape.targets]
            of = torch.arange(len(near)) % shape.targets
            noise = 0.04 * torch.randn(len(near), 4, generator=random)
            boxes[b, near] = (target["boxes"][of] + noise).clamp(0.01, 0.99)
            lean = token_maps[target["labels"]] if token_maps is not None else torch.eye(classes)[target["labels"]]
            logits[b, near] += 3 * lean[of]
        if token_maps is not None:
            logits[..., ~prompt(token_maps)] = -torch.inf  # as Grounding DINO pads
        layer = {"pred_logits": logits, "pred_boxes": boxes}
        layers.append({key: x.to(device).requires_grad_() for key, x in layer.items()})
    return layers, [{key: x.to(device) for key, x in target.items()} for target in targets]


def token_maps(tokens: int, classes: int = 80) -> Tensor:
    """The tokens of each class of a prompt "first . second . …": one or two each, parted by a full stop."""
    maps = torch.zeros(classes, tokens)
    at = 1
    for k in range(classes):
        length = 1 + k % 2
        maps[k, at : at + length] = 1
        at += length + 1
    return maps


def prompt(maps: Tensor) -> Tensor:
    """Which tokens [T] the prompt takes up: from [CLS] to [SEP]."""
    return torch.arange(maps.shape[1]) <= int(maps.any(0).nonzero().max()) + 2


# --- the reference ----------------------------------------------------------------------------------------------------


def reference(shape: Shape, profile: str, text_mask: Tensor | None = None, **options: Any) -> Callable[..., Losses]:
    criterion = build_criterion(
        num_classes=shape.channels - (profile == "detr"),
        num_decoder_layers=shape.layers,
        profile=profile,
        losses=LOSSES,
        encoder_suffix="_enc",
        **{**COST, **options},
    )

    def call(layers: list[Losses], targets: list[Losses]) -> Losses:
        outputs: dict[str, Any] = {**layers[0], "aux_outputs": layers[1 : shape.layers]}
        if shape.encoder:
            outputs[criterion.options.encoder_key] = layers[-1]
        if text_mask is not None:
            outputs["text_mask"] = text_mask
        return criterion(outputs, targets)

    return call


# --- the published --------------------------------------------------------------------------------------------------


def transformers_loss(shape: Shape, criterion: Any, extra: dict[str, Any]) -> Callable[..., Losses]:
    def call(layers: list[Losses], targets: list[Losses]) -> Losses:
        renamed = [{"logits": x["pred_logits"], "pred_boxes": x["pred_boxes"], **extra} for x in layers]
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        losses: Losses = criterion({**renamed[0], "auxiliary_outputs": renamed[1 : shape.layers]}, labels)
        if shape.encoder:
            losses |= {f"{key}_enc": loss for key, loss in criterion(renamed[-1], labels).items()}
        return losses

    return call


def against_transformers(shape: Shape, device: torch.device, family: str) -> Comparison:
    from transformers.loss import loss_deformable_detr, loss_for_object_detection, loss_grounding_dino
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher

    losses, cost = list(LOSSES), list(COST.values())
    if family == "detr":
        cost = [1.0, 5.0, 2.0]
        layers, targets = half_trained(shape, device)
        for target in targets:
            target["labels"].clamp_(max=shape.channels - 2)  # the last channel is no object
        theirs: Any = loss_for_object_detection.ImageLoss(HungarianMatcher(*cost), shape.channels - 1, 0.1, losses).to(
            device
        )
        ours = reference(shape, "detr", set_cost_class=1.0)
        return Comparison(shape, "HF DETR", transformers_loss(shape, theirs, {}), ours, layers, targets)
    if family == "deformable-detr":
        layers, targets = half_trained(shape, device)
        matcher = DeformableDetrHungarianMatcher(*cost)
        theirs = loss_deformable_detr.DeformableDetrImageLoss(matcher, shape.channels, 0.25, losses)
        ours = reference(shape, "deformable-detr")
        return Comparison(shape, "HF Deformable DETR", transformers_loss(shape, theirs, {}), ours, layers, targets)
    maps = token_maps(shape.channels)
    text_mask = prompt(maps).expand(shape.images, -1).to(device)
    layers, targets = half_trained(shape, device, maps)
    theirs = loss_grounding_dino.GroundingDinoImageLoss(GroundingDinoHungarianMatcher(*cost), 0.25, losses)
    # one prompt for all images: with several, transformers takes the label maps of the wrong image
    extra = {
        "label_maps": (maps.to(device),) * shape.images,
        "text_mask": text_mask[:, None].expand(-1, shape.queries, -1),
    }
    ours = reference(shape, "grounding-dino", text_mask)
    return Comparison(shape, "HF Grounding DINO", transformers_loss(shape, theirs, extra), ours, layers, targets)


def against_rfdetr(shape: Shape, device: torch.device) -> Comparison:
    from rfdetr.models.criterion import SetCriterion
    from rfdetr.models.matcher import HungarianMatcher

    criterion = SetCriterion(
        shape.channels, HungarianMatcher(*COST.values(), 0.25), WEIGHT, 0.25, list(LOSSES), group_detr=1
    )

    def call(layers: list[Losses], targets: list[Losses]) -> Losses:
        outputs = {**layers[0], "aux_outputs": layers[1 : shape.layers]}
        if shape.encoder:
            outputs["enc_outputs"] = layers[-1]
        losses: Losses = criterion(outputs, targets)
        return losses

    layers, targets = half_trained(shape, device)
    ours = reference(shape, "deformable-detr", encoder_targets="real")
    return Comparison(shape, "rfdetr", call, ours, layers, targets)


# --- measuring --------------------------------------------------------------------------------------------------------


def total(losses: Losses) -> Tensor:
    """The weighted sum that is trained."""
    return torch.stack([loss * WEIGHT[base(key)] for key, loss in losses.items() if base(key) in WEIGHT]).sum()


def base(key: str) -> str:
    """loss_ce of loss_ce_0 and loss_ce_enc."""
    return "_".join(key.split("_")[:2])


def forward(call: Callable[..., Losses], of: Comparison) -> None:
    call(of.layers, of.targets)


def forward_and_backward(call: Callable[..., Losses], of: Comparison) -> None:
    torch.autograd.grad(total(call(of.layers, of.targets)), [x for layer in of.layers for x in layer.values()])


def milliseconds(run: Callable[..., None], of: Comparison, repeats: int) -> tuple[float, float]:
    """Median time of theirs and of ours, run in turn."""
    spent: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for times, call in zip(spent, (of.theirs, of.ours), strict=True):
            start = time.perf_counter()
            run(call, of)
            if repeat:
                times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[0]), statistics.median(spent[1])


def peak_megabytes(call: Callable[..., Losses], of: Comparison) -> float:
    """What one forward and backward adds to the memory of this process, at most; nan where Linux does not tell."""
    forward_and_backward(call, of)
    gc.collect()
    if not sys.platform.startswith("linux"):
        return float("nan")
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # else memory that earlier calls have freed is used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = _megabytes("VmRSS")
    forward_and_backward(call, of)
    return _megabytes("VmHWM") - before


def _megabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def worst_difference(of: Comparison) -> float:
    """The largest relative difference of a trained loss."""
    theirs, ours = of.theirs(of.layers, of.targets), of.ours(of.layers, of.targets)
    keys = [key for key in theirs if base(key) in WEIGHT]
    assert set(keys) == {key for key in ours if base(key) in WEIGHT}, "the two sides do not compute the same losses"
    return max(float((ours[key] / theirs[key] - 1).abs()) for key in keys)


def comparisons(device: torch.device = CPU) -> Iterator[tuple[Shape, Callable[[Shape], Comparison]]]:
    a = Shape("a", 8, 100, 92, 20)
    b = Shape("b", 4, 900, 91, 20)
    c = Shape("c", 4, 900, 256, 20, encoder=True)
    yield a, lambda shape: against_transformers(shape, device, "detr")
    yield b, lambda shape: against_transformers(shape, device, "deformable-detr")
    yield c, lambda shape: against_transformers(shape, device, "grounding-dino")
    yield (
        replace(c, name="c+", images=16, targets=60),
        lambda shape: against_transformers(shape, device, "grounding-dino"),
    )
    if importlib.util.find_spec("rfdetr"):
        b = replace(b, encoder=True)
        b_plus = replace(b, name="b+", images=16, targets=60)
        yield from ((shape, lambda shape: against_rfdetr(shape, device)) for shape in (b, b_plus))
    else:
        print("rfdetr cannot be imported here: its rows are left out")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the reference beside published criterions.")
    parser.add_argument("--quick", action="store_true", help="two repeats, and no shape with a +")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, one thread; ms and MB: theirs → ours (ratio)")
    table = "{:38} {:20} {:>24} {:>24} {:>21} {:>13}"
    print(table.format("shape", "against", "forward", "forward+backward", "peak memory", "losses differ"))
    for shape, build in comparisons():
        if quick and shape.slow:
            continue
        of = build(shape)
        difference = worst_difference(of)
        peaks = peak_megabytes(of.theirs, of), peak_megabytes(of.ours, of)
        repeats = 1 if shape.slow else 2 if quick else 7
        columns = [ratio(milliseconds(run, of, repeats)) for run in (forward, forward_and_backward)] + [ratio(peaks)]
        what = f"{shape.name}: {shape.images} × {shape.queries} × {shape.channels}, {shape.targets} targets"
        what += f", {len(of.layers)} layers"
        print(table.format(what, of.peer, *columns, f"{difference:.0e}"), flush=True)
        del of
        gc.collect()


def ratio(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1f} → {pair[1]:.1f} ({pair[0] / pair[1]:.1f}×)"


if __name__ == "__main__":
    main()
