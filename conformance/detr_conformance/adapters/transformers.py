"""The criterions of transformers as candidates: ``--candidate=transformers-detr`` and so on.

Matcher and loss class are used as they are; only names are translated: transformers calls the inputs ``logits``,
``auxiliary_outputs`` and ``class_labels``, and keeps its weights in functions around the classes, so that
``weight_dict`` is made here and its values are not judged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_conformance.candidate import Candidate
from detr_conformance.errors import CandidateError
from detr_reference.options import options_of
from detr_reference.textbook import textbook

Targets = Sequence[Mapping[str, Tensor]]


class Translated:
    """A transformers criterion and matcher behind the names of DETR."""

    def __init__(self, criterion: Any, matcher: Any, weights: Mapping[str, float]) -> None:
        self.criterion, self._matcher, self.weight_dict = criterion, matcher, dict(weights)

    def __call__(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        labels, text = _labels(targets), _text(outputs, targets)
        call = {**_layer(outputs), **text}
        if "aux_outputs" in outputs:
            call["auxiliary_outputs"] = [{**_layer(aux), **text} for aux in outputs["aux_outputs"]]
        losses: dict[str, Tensor] = dict(self.criterion(call, labels))
        if text and "enc_outputs" in outputs:
            # a call of its own, as in loss_grounding_dino.py GroundingDinoForObjectDetectionLoss
            encoder = self.criterion({**_layer(outputs["enc_outputs"]), **text}, labels)
            losses |= {f"{key}_enc": value for key, value in encoder.items()}
        return losses

    def to(self, device: torch.device) -> Translated:
        """As of a torch module."""
        self.criterion.to(device)
        return self

    def matcher(self, outputs: Mapping[str, Any], targets: Targets) -> Any:
        """The matching of one layer."""
        return self._matcher({**_layer(outputs), **_text(outputs, targets)}, _labels(targets))


def _layer(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}


def _labels(targets: Targets) -> list[dict[str, Tensor]]:
    return [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]


def _text(outputs: Mapping[str, Any], targets: Targets) -> dict[str, Any]:
    """label_maps and text_mask as GroundingDinoForObjectDetection hands them over; nothing without text."""
    if "text_mask" not in outputs:
        return {}
    return {
        "label_maps": tuple(t["positive_map"].long() for t in targets),
        "text_mask": outputs["text_mask"][:, None],  # for every query of every layer
    }


def _needs_transformers(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def checked(**options: Any) -> Any:
        try:
            import PIL  # noqa: F401  (transformers needs it for its box functions)
            import transformers  # noqa: F401
        except ImportError as error:
            raise CandidateError(
                f"this candidate needs transformers and pillow ({error}); pip install 'detr-conformance[published]'"
            ) from None
        return build(**options)

    return checked


def _weights(profile: str, num_decoder_layers: int, two_stage: bool) -> dict[str, float]:
    options = options_of(profile).with_(num_decoder_layers=num_decoder_layers, two_stage=two_stage)
    found: dict[str, float] = textbook.under(options).weights()
    return found


LOSSES = ["labels", "boxes", "cardinality"]


@_needs_transformers
def _detr(
    num_classes: int, num_decoder_layers: int, eos_coef: float,
    set_cost_class: float, set_cost_bbox: float, set_cost_giou: float,
) -> Translated:  # fmt: skip
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    matcher = HungarianMatcher(set_cost_class, set_cost_bbox, set_cost_giou)
    criterion = ImageLoss(matcher, num_classes, eos_coef, LOSSES)
    return Translated(criterion, matcher, _weights("detr", num_decoder_layers, False))


@_needs_transformers
def _deformable_detr(
    num_classes: int, num_decoder_layers: int, focal_alpha: float,
    set_cost_class: float, set_cost_bbox: float, set_cost_giou: float,
) -> Translated:  # fmt: skip
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(set_cost_class, set_cost_bbox, set_cost_giou)
    criterion = DeformableDetrImageLoss(matcher, num_classes, focal_alpha, LOSSES)
    return Translated(criterion, matcher, _weights("deformable-detr", num_decoder_layers, False))


@_needs_transformers
def _grounding_dino(
    num_decoder_layers: int, focal_alpha: float, set_cost_class: float, set_cost_bbox: float, set_cost_giou: float
) -> Translated:
    from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss

    matcher = GroundingDinoHungarianMatcher(set_cost_class, set_cost_bbox, set_cost_giou)
    criterion = GroundingDinoImageLoss(matcher, focal_alpha, LOSSES)
    return Translated(criterion, matcher, _weights("grounding-dino", num_decoder_layers, True))


def _label_maps(tokenized: Mapping[str, Tensor], max_text_len: int = 256) -> Tensor:
    """The label map of one prompt; its logits are only asked for their width."""
    from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

    build: Any = build_label_maps
    found: Tensor = build(torch.zeros(1, 1, max_text_len), tokenized["input_ids"])[0]
    return found


detr = Candidate(_detr, "detr", name="transformers-detr", own_weights=False)
# the model returns encoder outputs, and its loss has no part for them
deformable_detr = Candidate(
    _deformable_detr,
    "deformable-detr",
    options={"two_stage": False},
    name="transformers-deformable-detr",
    own_weights=False,
)
grounding_dino = Candidate(
    _grounding_dino,
    "grounding-dino",
    name="transformers-grounding-dino",
    own_weights=False,
    positive_map=_label_maps,
)
