"""Criterions of every shape, right ones and hostile ones, for the tests to name as ``tests.candidates:…``."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from detr_conformance import Candidate
from detr_reference.criterion import build_criterion as reference


def right(num_classes: int = 91, num_decoder_layers: int = 6, eos_coef: float = 0.1) -> Any:
    return reference(num_classes, num_decoder_layers, "detr", eos_coef=eos_coef)


class Changed:
    """The reference whose losses go through ``change`` before they are returned."""

    def __init__(self, change: Any, **options: Any) -> None:
        self.inner, self.change = reference(profile="detr", **options), change
        self.weight_dict = self.inner.weight_dict

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return self.change(self.inner(outputs, targets))


def _changing(change: Any) -> Any:
    def build(num_classes: int = 91, num_decoder_layers: int = 6, eos_coef: float = 0.1) -> Any:
        options = {"num_classes": num_classes, "num_decoder_layers": num_decoder_layers, "eos_coef": eos_coef}
        return Changed(change, **options)

    return build


def _raise(losses: Any) -> Any:
    raise RuntimeError("no kernel for this\nsecond line")


def _hang(losses: Any) -> Any:
    time.sleep(1000)


def _end(losses: Any) -> Any:
    print("going down", file=sys.stderr, flush=True)
    os._exit(7)


def _hang_without_targets(losses: Any) -> Any:
    return _hang(losses) if losses["loss_bbox"].item() == 0 else losses


def _end_without_targets(losses: Any) -> Any:
    return _end(losses) if losses["loss_bbox"].item() == 0 else losses


def _shout(losses: Any) -> Any:
    print("loss!" * 10_000)
    return losses


raises = _changing(_raise)
hangs = _changing(_hang)
ends = _changing(_end)
hangs_without_targets = _changing(_hang_without_targets)
ends_without_targets = _changing(_end_without_targets)
exits = _changing(lambda losses: sys.exit(3))
returns_a_list = _changing(lambda losses: list(losses.values()))
returns_nothing = _changing(lambda losses: None)
returns_floats = _changing(lambda losses: {k: v.item() for k, v in losses.items()})
returns_vectors = _changing(lambda losses: {k: v.expand(3) for k, v in losses.items()})
returns_nan = _changing(lambda losses: {k: v * float("nan") for k, v in losses.items()})
returns_odd_names = _changing(
    lambda losses: {k.replace("bbox", "box").replace("ce", "cls"): v for k, v in losses.items()}
)
shouts = _changing(_shout)
detached = _changing(lambda losses: {k: v.detach() for k, v in losses.items()})

renamed = Candidate(
    returns_odd_names,
    "detr",
    rename={"loss_box": "loss_bbox", "loss_cls": "loss_ce"},
    name="renamed",
    own_weights=False,
)
unknown_profile = Candidate(right, "detrr")
unknown_option = Candidate(right, "detr", options={"giou_epsilon": 1e-6})
not_callable = 3
a_criterion = reference(91, 6, "detr")


def needs_more(num_classes: int, backbone: str) -> Any:
    return right(num_classes)


def plain_function(outputs: Any, targets: Any) -> Any:
    return a_criterion(outputs, targets)


plain_function.weight_dict = a_criterion.weight_dict  # type: ignore[attr-defined]


def seed_form(
    num_classes: int, num_decoder_layers: int = 6, focal_alpha: float = 0.25, focal_gamma: float = 2.0
) -> Any:
    """The signature that the project started from: token_labels in, 21 weighted keys out."""
    options = {"focal_alpha": focal_alpha, "focal_gamma": focal_gamma}
    return reference(num_classes, num_decoder_layers, "grounding-dino", **options)


class OnCall:
    """What moves the global random state."""

    def __init__(self) -> None:
        self.inner = reference(91, 6, "detr")
        self.weight_dict = self.inner.weight_dict

    def __call__(self, outputs: Any, targets: Any) -> Any:
        torch.rand(1)
        return self.inner(outputs, targets)
