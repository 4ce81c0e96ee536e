"""The smallest input on which a check still fails: fewer layers, images, targets, queries, classes, plainer numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from detr_conformance.budget import budget
from detr_conformance.cases import DN, ENC, FINAL, Case

ATTEMPTS = 60
FEW = 20
SECONDS = 2.0


def smallest(case: Case, fails: Callable[[Case], bool], classes_vary: bool, attempts: int = ATTEMPTS) -> Case:
    """The simplest case found that ``fails`` still; ``fails`` must hold for ``case``.

    One kind of simplification after the other, the boldest first, each as often as it succeeds. Stops after
    ``attempts`` calls, so that the result is the same on every machine; SECONDS bound a slow candidate.
    """
    spent, left = budget(SECONDS), attempts
    progress = True
    while progress:
        progress = False
        for simpler in _fewer_layers, _fewer_images, _fewer_targets, _fewer_queries, _fewer_channels, _plainer_numbers:
            tries = simpler(case, classes_vary)
            while (attempt := next(tries, None)) is not None:
                if not left or spent():
                    return case
                left -= 1
                if fails(attempt):
                    case, progress = attempt, True
                    tries = simpler(case, classes_vary)
    return case


def _fewer_layers(case: Case, classes_vary: bool) -> Iterator[Case]:
    aux = len(case.outputs.get("aux_outputs", ()))
    if case.has_encoder:
        yield replace(case, outputs={k: v for k, v in case.outputs.items() if k != case.options.encoder_key})
    if aux:
        yield _with_aux(case, 0, classes_vary)
    if aux > 1:
        yield _with_aux(case, 1, classes_vary)


def _fewer_images(case: Case, classes_vary: bool) -> Iterator[Case]:
    images = range(len(case.counts))
    if len(images) > 1:
        yield from (case.images([b]) for b in images)
    if len(images) > 2:
        yield from (case.images([i for i in images if i != b]) for b in images)


def _fewer_targets(case: Case, classes_vary: bool) -> Iterator[Case]:
    for b, n in enumerate(case.counts):
        yield from (_without_target(case, b, t) for t in range(n))


def _fewer_queries(case: Case, classes_vary: bool) -> Iterator[Case]:
    for layer in (FINAL, ENC) if case.has_encoder else (FINAL,):
        size = case.predictions(layer)["pred_logits"].shape[1]
        if size > 3:
            yield _with_queries(case, layer, list(range(size // 2)))
        if size > 1:
            yield from (_with_queries(case, layer, [i for i in range(size) if i != q]) for q in range(size))


def _fewer_channels(case: Case, classes_vary: bool) -> Iterator[Case]:
    if "text_mask" in case.outputs:
        yield from _fewer_tokens(case)
    elif classes_vary:
        yield from _fewer_classes(case)


def _plainer_numbers(case: Case, classes_vary: bool) -> Iterator[Case]:
    for change in (_flat_logits, _whole_logits, _grid_boxes):
        simpler = change(case)
        if simpler is not None:
            yield simpler


def _with_aux(case: Case, number: int, told: bool) -> Case:
    outputs = {k: v for k, v in case.outputs.items() if k != "aux_outputs"}
    if number:
        outputs["aux_outputs"] = case.outputs["aux_outputs"][:number]
    options = case.options.with_(num_decoder_layers=number + 1) if told else case.options
    return replace(case, outputs=outputs, options=options)


def _without_target(case: Case, image: int, target: int) -> Case:
    def fewer(t: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = [i for i in range(len(t["labels"])) if i != target]
        return {k: v if k == "positive_map" else v[keep] for k, v in t.items()}

    return replace(case, targets=tuple(fewer(dict(t)) if b == image else t for b, t in enumerate(case.targets)))


def _with_queries(case: Case, layer: str, keep: list[int]) -> Case:
    """The encoder has queries of its own; all other layers share theirs, and denoising queries stay."""

    def kept(name: str, _key: str, v: Tensor) -> Tensor:
        return v[:, keep] if (name == ENC) == (layer == ENC) and not name.startswith(DN) else v

    return case.with_predictions(kept)


def _fewer_classes(case: Case) -> Iterator[Case]:
    classes = case.options.num_classes
    used = [int(label) for t in case.targets for label in t["labels"]]
    if classes < 2 or max(used, default=0) >= classes - 1:
        return
    keep = [c for c in range(case.options.channels) if c != classes - 1]
    fewer = case.with_predictions(lambda _l, key, v: v[..., keep] if key == "pred_logits" else v)
    yield replace(fewer, options=case.options.with_(num_classes=classes - 1))


def _fewer_tokens(case: Case) -> Iterator[Case]:
    """Without the tokens that are masked in every image and belong to no class."""
    mask = case.outputs["text_mask"]
    used = mask.any(0)
    for target in case.targets:
        used = used | (target["positive_map"] > 0).any(0)
    if bool(used.all()):
        return
    keep = used.nonzero()[:, 0].tolist()
    fewer = case.with_predictions(lambda _l, key, v: v[..., keep] if key == "pred_logits" else v)
    yield replace(
        fewer,
        outputs={**fewer.outputs, "text_mask": mask[:, keep]},
        targets=tuple(
            {k: v[:, keep] if k in ("token_labels", "positive_map") else v for k, v in t.items()} for t in case.targets
        ),
    )


def _changed(case: Case, wanted: str, change: Callable[[Tensor], Tensor]) -> Case | None:
    new = case.with_predictions(lambda _l, key, v: change(v) if key == wanted else v)
    same = all(torch.equal(new.predictions(n)[wanted], case.predictions(n)[wanted]) for n in case.layers)
    return None if same else new


def _flat_logits(case: Case) -> Case | None:
    return _changed(case, "pred_logits", lambda v: torch.where(v.isinf(), v, torch.zeros_like(v)))


def _whole_logits(case: Case) -> Case | None:
    return _changed(case, "pred_logits", torch.round)


def _on_grid(boxes: Tensor) -> Tensor:
    grid = (boxes * 16).round() / 16
    return torch.cat([grid[..., :2], grid[..., 2:].clamp(min=1 / 16)], -1)


def _grid_boxes(case: Case) -> Case | None:
    new = _changed(case, "pred_boxes", _on_grid)
    return (
        None if new is None else replace(new, targets=tuple({**t, "boxes": _on_grid(t["boxes"])} for t in case.targets))
    )
