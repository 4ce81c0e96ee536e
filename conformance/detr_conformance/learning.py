"""A small detector trained with the candidate, and the same one with the reference.

Same first weights, same batches, same number of steps: what differs is the criterion. The detector's average precision
on images that it was not trained on, and how its loss falls, are what people train for in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from detr_conformance.budget import budget
from detr_conformance.candidate import Bound, Candidate, bind
from detr_conformance.cases import Case
from detr_conformance.detector import Detector
from detr_conformance.experiments import Experiment
from detr_conformance.observation import Observation, foreign, said, weighted_sum
from detr_conformance.seen import UNDECIDED, Seen
from detr_conformance.shapes import CLASSES, Pictures, average_precision, pictures
from detr_reference.options import Options

STEPS, BATCH, WARM_UP, LAST = 240, 16, 30, 48  # steps in all, at a growing rate, at a tenth of it
RATE, DECAY, CLIP = 2e-3, 1e-4, 0.1  # AdamW, and DETR's clipping (facebookresearch/detr main.py:32)
TRAINED, HELD_OUT = 2048, 128  # images
SECONDS: Final = 120.0  # of computing: some ten times what the textbook takes
LAYERS: Final = 2
LEARNT: Final = 0.5  # AP50 from which the detector plainly learns

# A prompt of nine tokens for three classes: the first of two word pieces, separators between, one token of padding.
PROMPT: Final = ((0, 1, 1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 1, 0, 0))
PADDING: Final = 1


@dataclass(frozen=True)
class Trained:
    """What became of a training: AP (IoU .50:.95) and AP50 on the held-out images, and the loss of every step.

    ``raised``: the exception that ended it · ``slow``: it was stopped for taking too long.
    """

    ap: float = 0.0
    ap50: float = 0.0
    losses: tuple[float, ...] = ()
    raised: str = ""
    slow: bool = False

    @property
    def quarters(self) -> tuple[float, ...]:
        """The mean loss of each quarter of the run; nan where it did not get so far."""
        full = [*self.losses, *[math.nan] * (STEPS - len(self.losses))]
        size = STEPS // 4
        return tuple(sum(full[i : i + size]) / size for i in range(0, 4 * size, size))


@dataclass(frozen=True)
class Lesson:
    """Two trainings that differ in their criterion alone."""

    own: Trained
    reference: Trained


@dataclass(frozen=True, eq=False)
class Training(Case):
    """The first batch of a training, with what the detector makes of it before it has learnt anything."""

    @property
    def words(self) -> str:
        """What is trained, on what, how long."""
        return f"{self.label}: {CLASSES} classes of shapes, {STEPS} steps of {BATCH} images, {HELD_OUT} images held out"


def train(bound: Bound, options: Options) -> Trained:
    """Train the detector with a criterion built for ``options``, which may raise or be slow."""
    detector, data = _detector(options), _pictures(0, TRAINED, options)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate)
    losses: list[float] = []
    late = budget(SECONDS)
    criterion: Any = None
    for step in range(STEPS):
        case = _case(options, detector, _batch(data, step))
        try:
            with foreign(f"step {step} of training a detector"):
                if criterion is None:
                    criterion = bound.build(options)
                targets = [{k: v.clone() for k, v in t.items()} for t in case.targets]
                total = weighted_sum(bound, case, criterion, criterion(case.outputs, targets))
                optimiser.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
        except (Exception, SystemExit, RecursionError) as error:
            return Trained(losses=tuple(losses), raised=f"step {step} of training: {said(error)}")
        losses.append(float(total.detach()))
        if not math.isfinite(losses[-1]):
            return Trained(losses=tuple(losses))  # nothing good comes after that
        nn.utils.clip_grad_norm_(detector.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        if late():
            return Trained(losses=tuple(losses), slow=True)
    return Trained(*_precision(detector, options), losses=tuple(losses))


def _rate(step: int) -> float:
    """The share of RATE at a step: it grows at first, and falls to a tenth for the last ones."""
    return 0.1 if step >= STEPS - LAST else min(1.0, (step + 1) / WARM_UP)


def _detector(options: Options) -> Detector:
    """The detector with its first weights: always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels = len(PROMPT[0]) if options.class_loss == "token" else options.channels
        return Detector(channels, min(LAYERS, options.num_decoder_layers))


def _pictures(seed: int, number: int, options: Options) -> Pictures:
    """Generated images, whose targets have token labels where the profile has text."""
    found = pictures(seed, number)
    if options.class_loss != "token":
        return found
    tokens = torch.tensor(PROMPT, dtype=torch.float32)
    own = [{**t, "token_labels": tokens[t["labels"]], "positive_map": tokens} for t in found.targets]
    return Pictures(found.images, tuple(own))


def _batch(data: Pictures, step: int) -> Pictures:
    order = [(step * BATCH + i) % TRAINED for i in range(BATCH)]
    return Pictures(data.images[order], tuple(data.targets[i] for i in order))


def _case(options: Options, detector: Detector, batch: Pictures) -> Training:
    """What the criterion is called with."""
    layers, encoder = detector(batch.images)
    outputs: dict[str, Any] = dict(layers[-1])
    if len(layers) > 1:
        outputs["aux_outputs"] = layers[:-1]
    if options.has_encoder:
        outputs[options.encoder_key] = encoder
    if options.class_loss == "token":
        inside = torch.arange(len(PROMPT[0])) < len(PROMPT[0]) - PADDING
        outputs["text_mask"] = inside.repeat(len(batch.images), 1)
    return Training("a small detector in training", options, outputs, batch.targets)


def _precision(detector: Detector, options: Options) -> tuple[float, float]:
    """AP and AP50 on the held-out images."""
    data = _pictures(1, HELD_OUT, options)
    with torch.no_grad():
        final = detector(data.images)[0][-1]
    boxes, scores = final["pred_boxes"], _scores(final["pred_logits"], options)
    if not bool(boxes.isfinite().all() and scores.isfinite().all()):
        return 0.0, 0.0
    return average_precision(boxes, scores, data.targets)


def _scores(logits: Tensor, options: Options) -> Tensor:
    """How likely [B,Q,CLASSES] each query is of each class, as the profile's models have it."""
    if options.class_loss == "softmax":
        return logits.softmax(-1)[..., :CLASSES]
    if options.class_loss == "focal":
        return logits.sigmoid()[..., :CLASSES]
    tokens = torch.tensor(PROMPT, dtype=logits.dtype)
    return logits.sigmoid() @ (tokens / tokens.sum(-1, keepdim=True)).T


# --- the experiment -------------------------------------------------------------------------------------------------


def _options(bound: Bound) -> Options:
    """Few classes and layers, where the candidate can be told."""
    small = {"num_classes": CLASSES, "num_decoder_layers": LAYERS}
    told = bound.options.with_(**{k: v for k, v in small.items() if k in bound.varies})
    return told.with_(losses=[name for name in told.losses if name != "masks"])


def _first(bound: Bound) -> Iterator[Case]:
    options = _options(bound)
    data = _pictures(0, TRAINED, options)
    with torch.no_grad():
        case = _case(options, _detector(options), _batch(data, 0))
    yield case


@cache
def _of_reference(profile: str, options: Options) -> Trained:
    from detr_reference.criterion import build_criterion

    return train(bind(Candidate(build_criterion, profile)), options)


def _learn(bound: Bound, case: Case) -> Seen:
    """Train with the candidate, then with the reference where there is something to compare."""
    own = train(bound, case.options)
    if own.raised:
        return Seen(bound, case, Observation(case, raised=own.raised))
    reference = _of_reference(bound.profile, case.options)
    remarks = {}
    if own.slow:
        remarks[UNDECIDED] = f"too slow to be trained with: step {len(own.losses)} of {STEPS} after {SECONDS:.0f} s"
    elif reference.ap50 < LEARNT:
        remarks[UNDECIDED] = f"under these options the reference itself learns too little: AP50 {reference.ap50:.2f}"
    return Seen(bound, case, Observation(case), remarks=remarks, facts=Lesson(own, reference))


LEARNING = Experiment(
    "learning",
    "a detector trained on generated shapes",
    _first,
    None,
    _learn,
    weight=0.0,  # at effort standard
    since="deep",
    once=True,
)
