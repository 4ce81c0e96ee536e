"""Cases: the inputs of one call, made from a small recipe, and the Hypothesis strategies that draw recipes.

A recipe is a handful of words and integers; everything else follows from its seed. So a case is drawn in
microseconds, printed in a line, and made again anywhere. Some palettes lie on a k/16 grid, so that the smallest
failing input can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from detr_reference.options import Options
from detr_reference.textbook import TERMS

FINAL: Final = "final"
ENC: Final = "enc"
DN: Final = "dn"
MASK_TERMS: Final = ("mask", "dice")


@dataclass(frozen=True)
class Recipe:
    """What a case is made of.

    ``targets``: number of targets of each image · ``queries``, ``encoder_queries`` (0: no encoder outputs) ·
    ``aux``: auxiliary layers · ``logits``, ``boxes``: palettes · ``edits``: adversarial changes, in order ·
    ``options``: option values to try, where the candidate lets them vary.
    """

    seed: int
    targets: tuple[int, ...]
    queries: int
    classes: int = 4
    aux: int = 0
    encoder_queries: int = 0
    tokens: int = 9
    logits: str = "normal"
    boxes: str = "plain"
    edits: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """The inputs of one call: plain dicts and tensors in float32, as DESIGN's candidate takes them, without gradient.

    ``outputs``: pred_logits [B,Q,C], pred_boxes [B,Q,4], aux_outputs, enc_outputs | interm_outputs, text_mask [B,T].
    ``targets``: labels [n], boxes [n,4], token_labels [n,T] and positive_map [K,T] where the profile has text.
    Where masks are trained: pred_masks [B,Q,h,w] logits, and masks [n,H_b,W_b] of a size of each image's own; where
    there are denoising queries: dn_meta (see ``detr_reference.denoising``). ``memo``: what the textbook makes of the
    case, found out once however many candidates are judged on it.
    """

    label: str
    options: Options
    outputs: Mapping[str, Any]
    targets: tuple[Mapping[str, Tensor], ...]
    memo: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)

    @property
    def words(self) -> str:
        """The inputs in words, where they are no outputs and targets; else ""."""
        return ""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of targets of each image."""
        return tuple(len(t["labels"]) for t in self.targets)

    @property
    def total(self) -> int:
        """N: the number of targets of all images."""
        return sum(self.counts)

    @property
    def queries(self) -> int:
        """Q of the final layer."""
        return int(self.outputs["pred_logits"].shape[1])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the supervised layers: final, aux0, aux1, …, enc."""
        aux = tuple(f"aux{i}" for i in range(len(self.outputs.get("aux_outputs", ()))))
        return (FINAL, *aux, *((ENC,) if self.has_encoder else ()))

    @property
    def maskless(self) -> bool:
        """True where nothing but float32 logits and boxes are trained: no masks, no other precision."""
        return self.outputs["pred_logits"].dtype == torch.float32 and not self.has_masks

    @property
    def plain(self) -> bool:
        """True where that holds of plain queries alone: no denoising besides."""
        return self.maskless and not self.denoising

    @property
    def has_encoder(self) -> bool:
        """True where the case has encoder outputs."""
        return bool(self.options.encoder_key) and self.options.encoder_key in self.outputs

    @property
    def has_masks(self) -> bool:
        """True where masks are trained."""
        return "pred_masks" in self.outputs and "masks" in self.options.losses

    @property
    def denoising(self) -> tuple[str, ...]:
        """Names of the layers of denoising queries: dn, dn_aux0, dn_aux1, …; none without them."""
        found = (self.outputs.get("dn_meta") or {}).get("output_known_lbs_bboxes")
        return () if found is None else (DN, *(f"{DN}_aux{i}" for i in range(len(found.get("aux_outputs", ())))))

    @property
    def sums(self) -> dict[str, tuple[str, ...]]:
        """The losses that are differentiated together, by term: those of all layers, ``…_dn`` of all denoising ones."""
        found = {term: tuple(f"loss_{term}{self.suffix(layer)}" for layer in self.layers) for term in TERMS}
        if self.denoising:
            found |= {f"{term}_dn": tuple(f"loss_{term}{self.suffix(x)}" for x in self.denoising) for term in TERMS}
        return found | {term: (f"loss_{term}",) for term in MASK_TERMS if self.has_masks}

    def predictions(self, layer: str) -> Mapping[str, Tensor]:
        """pred_logits and pred_boxes of a layer, and pred_masks of the final one, if it has them."""
        found: Mapping[str, Any] = self.outputs
        if layer.startswith(DN):
            found = self.outputs["dn_meta"]["output_known_lbs_bboxes"]
        if layer == ENC:
            found = self.outputs[self.options.encoder_key]
        elif layer not in (FINAL, DN):
            found = found["aux_outputs"][int(layer.removeprefix(f"{DN}_")[3:])]
        return {k: found[k] for k in ("pred_logits", "pred_boxes", "pred_masks") if k in found}

    def suffix(self, layer: str) -> str:
        """The suffix of a layer's losses."""
        if layer == FINAL:
            return ""
        if layer.startswith(DN):
            return layer.replace(DN, "_dn").replace("_aux", "_")
        return self.options.encoder_suffix if layer == ENC else f"{self.options.aux_suffix}{layer[3:]}"

    def keys(self, layer: str) -> tuple[str, ...]:
        """The trained losses of a layer."""
        return tuple(f"loss_{term}{self.suffix(layer)}" for term in TERMS)

    def with_predictions(self, change: Callable[[str, str, Tensor], Tensor]) -> Case:
        """The case with every prediction replaced by ``change(layer, key, value)``."""
        new: dict[str, Any] = dict(self.outputs)
        for layer in (*self.layers, *self.denoising):
            fresh = {k: change(layer, k, v) for k, v in self.predictions(layer).items()}
            if layer == FINAL:
                new |= fresh
            elif layer == ENC:
                new[self.options.encoder_key] = fresh
            elif layer.startswith(DN):
                last = {**new["dn_meta"]["output_known_lbs_bboxes"]}
                if layer == DN:
                    last |= fresh
                else:
                    last["aux_outputs"] = [*last["aux_outputs"]]
                    last["aux_outputs"][int(layer[len(f"{DN}_aux") :])] = fresh
                new["dn_meta"] = {**new["dn_meta"], "output_known_lbs_bboxes": last}
            else:
                new["aux_outputs"] = [*new["aux_outputs"]]
                new["aux_outputs"][int(layer[3:])] = fresh
        return replace(self, outputs=new)

    def images(self, order: list[int]) -> Case:
        """The case with only these images, in this order."""
        part = self.with_predictions(lambda _layer, _key, value: value[order])
        outputs = dict(part.outputs)
        if "text_mask" in outputs:
            outputs["text_mask"] = outputs["text_mask"][order]
        return replace(part, outputs=outputs, targets=tuple(self.targets[i] for i in order))

    def fresh(
        self, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Any], list[dict[str, Tensor]], dict[str, tuple[Tensor, ...]]]:
        """Inputs for one call: cloned outputs with gradient, cloned targets, and the (logits, boxes) of each layer,
        with masks (logits, boxes, masks) of the final one."""
        leaves: dict[str, tuple[Tensor, ...]] = {}

        def leaf(layer: str, key: str, value: Tensor) -> Tensor:
            new = value.clone().to(device).requires_grad_()
            leaves[layer] = (*leaves.get(layer, ()), new)
            return new

        outputs = dict(self.with_predictions(leaf).outputs)
        if "text_mask" in outputs:
            outputs["text_mask"] = outputs["text_mask"].clone().to(device)
        return outputs, [{k: v.clone().to(device) for k, v in t.items()} for t in self.targets], leaves


def build(recipe: Recipe, options: Options, varies: frozenset[str]) -> Case:
    """The case of a recipe under ``options``; option values that the candidate cannot take are left out."""
    wanted = {k: v for k, v in recipe.options if k in varies}
    o = options.with_(num_classes=recipe.classes, num_decoder_layers=recipe.aux + 1, **wanted)
    if "num_classes" not in varies:
        o = o.with_(num_classes=options.num_classes)
    rng = np.random.default_rng(recipe.seed)
    prompts = [draw_prompt(rng, o.num_classes, recipe.tokens, b) for b in range(len(recipe.targets))]
    targets = [draw_target(rng, recipe, o, n, prompt) for n, prompt in zip(recipe.targets, prompts, strict=True)]
    text = o.class_loss == "token"
    channels = recipe.tokens if text else o.channels

    def layer(queries: int) -> dict[str, Tensor]:
        shape = (len(targets), queries)
        logits = LOGITS[recipe.logits](rng, (*shape, channels))
        boxes = np.stack([_predicted(rng, recipe, t, queries) for t in targets])
        return {"pred_logits": as_float32(logits), "pred_boxes": as_float32(boxes)}

    outputs: dict[str, Any] = layer(recipe.queries)
    if recipe.aux:
        outputs["aux_outputs"] = [layer(recipe.queries) for _ in range(recipe.aux)]
    if recipe.encoder_queries and o.has_encoder:
        outputs[o.encoder_key] = layer(recipe.encoder_queries)
    if text:
        outputs["text_mask"] = torch.stack([mask for _, mask in prompts])
    case = Case(_label(recipe), o, outputs, tuple(targets))
    for edit in recipe.edits:
        case = EDITS[edit](case, rng)
    return case


# --- palettes -------------------------------------------------------------------------------------------------------

LOGITS: Final[Mapping[str, Callable[[Generator, tuple[int, ...]], Any]]] = {
    "normal": lambda rng, shape: rng.normal(0, 1.5, shape).clip(-5, 5),
    "grid": lambda rng, shape: rng.integers(-16, 17, shape) / 8,
    "confident": lambda rng, shape: rng.normal(0, 9, shape).clip(-30, 30),
    "extreme": lambda rng, shape: rng.choice([-110.0, -20.0, -1.0, 0.0, 1.0, 20.0, 110.0], shape),
}


def plain_boxes(rng: Generator, n: int) -> Any:
    """Boxes inside the image, sides .05 to .5."""
    sides = rng.uniform(0.05, 0.5, (n, 2))
    return np.concatenate([rng.uniform(sides / 2, 1 - sides / 2), sides], -1)


def _grid(rng: Generator, n: int) -> Any:
    sides = rng.integers(1, 9, (n, 2)) / 16
    return np.concatenate([rng.integers(4, 13, (n, 2)) / 16, sides], -1)


def _tiny(rng: Generator, n: int) -> Any:
    return np.concatenate([rng.uniform(0.1, 0.9, (n, 2)), 10 ** rng.uniform(-3, -1, (n, 2))], -1)


def _overhang(rng: Generator, n: int) -> Any:
    return np.concatenate([rng.uniform(0.0, 1.0, (n, 2)), rng.uniform(0.3, 1.0, (n, 2))], -1)


BOXES: Final[Mapping[str, Callable[[Generator, int], Any]]] = {
    "plain": plain_boxes,
    "grid": _grid,
    "tiny": _tiny,
    "overhang": _overhang,
}


def _predicted(rng: Generator, recipe: Recipe, target: Mapping[str, Tensor], queries: int) -> Any:
    """Predicted boxes of one image: half of the queries near a target, as a half-trained model has them."""
    boxes = BOXES[recipe.boxes](rng, queries)
    if recipe.boxes == "plain" and len(target["boxes"]):
        near = rng.random(queries) < 0.5
        some = target["boxes"].double().numpy()[rng.integers(0, len(target["boxes"]), queries)]
        moved = some * np.exp(rng.normal(0, 0.15, some.shape))
        moved[:, :2] = moved[:, :2].clip(moved[:, 2:] / 2, 1 - moved[:, 2:] / 2)
        boxes = np.where(near[:, None], moved, boxes)
    return boxes


def draw_prompt(rng: Generator, classes: int, tokens: int, image: int) -> tuple[Tensor, Tensor]:
    """An image's own prompt: the class → token map [K,T] and text_mask [T].

    As word pieces lie in a caption: token 0 opens it, every name takes one to three tokens, some with a gap, one
    token separates names, and the rest, if any, is padding. Prompts of a batch differ in their number of classes.
    """
    spread = np.zeros((classes, tokens))
    at, known = 1, 0
    for k in range(max(1, classes - image % 3)):
        length = int(rng.integers(1, 4))
        if at + length > tokens:
            break
        spread[k, at : at + length] = 1
        if length == 3 and rng.random() < 0.4:
            spread[k, at + 1] = 0
        at, known = at + length + 1, k + 1
    if rng.random() < 0.3:  # a name that ends with the text, and no padding
        spread[known - 1, -1], at = 1, tokens
    return as_float32(spread[:known]), torch.arange(tokens) < at


def draw_target(rng: Generator, recipe: Recipe, o: Options, n: int, prompt: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    text = o.class_loss == "token"
    classes = len(prompt[0]) if text else o.num_classes
    labels = torch.from_numpy(rng.integers(0, classes, n))
    target = {"labels": labels, "boxes": as_float32(BOXES[recipe.boxes](rng, n))}
    if text:
        target |= {"token_labels": prompt[0][labels], "positive_map": prompt[0]}
    return target


# --- edits ----------------------------------------------------------------------------------------------------------


def _on_target_boxes(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return replace(case, targets=tuple({**t, "boxes": change(t["boxes"])} for t in case.targets))


def _copied_target(case: Case, rng: Generator) -> Case:
    """The second target of every image is the first again."""

    def twice(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        new = {k: v.clone() for k, v in target.items()}
        for key in ("labels", "boxes", "token_labels"):
            if key in new and len(new[key]) > 1:
                new[key][1] = new[key][0]
        return new

    return replace(case, targets=tuple(map(twice, case.targets)))


def _copied_query(case: Case, rng: Generator) -> Case:
    """The last query of every layer is the first again."""

    def twice(_layer: str, _key: str, value: Tensor) -> Tensor:
        new = value.clone()
        new[:, -1] = new[:, 0]
        return new

    return case.with_predictions(twice)


def _exact_boxes(case: Case, rng: Generator) -> Case:
    """One query of every image has the box of its first target exactly."""

    def exact(_layer: str, key: str, value: Tensor) -> Tensor:
        new = value.clone()
        if key == "pred_boxes":
            for b, target in enumerate(case.targets):
                if len(target["boxes"]):
                    new[b, int(rng.integers(0, value.shape[1]))] = target["boxes"][0]
        return new

    return case.with_predictions(exact)


def _end_classes(case: Case, rng: Generator) -> Case:
    """All labels are the first or the last class."""

    def ends(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        new = dict(target)
        last = len(target["positive_map"]) if "positive_map" in target else case.options.num_classes
        new["labels"] = torch.from_numpy(rng.choice([0, last - 1], len(target["labels"])))
        if "positive_map" in target:
            new["token_labels"] = target["positive_map"][new["labels"]]
        return new

    return replace(case, targets=tuple(map(ends, case.targets)))


def _contested(case: Case, rng: Generator) -> Case:
    """All targets of an image lie close together, so that several want the same query."""

    def close(boxes: Tensor) -> Tensor:
        if len(boxes) < 2:
            return boxes
        return as_float32(boxes[:1].numpy() * np.exp(rng.normal(0, 0.08, boxes.shape)))

    return _on_target_boxes(case, close)


def _mask_with_holes(case: Case, rng: Generator) -> Case:
    """text_mask leaves out what is no class's: the first token and those that separate names, or some of them."""
    if "text_mask" not in case.outputs:
        return case
    named = torch.stack([t["positive_map"].amax(0) > 0 for t in case.targets])
    left_out = ~named & torch.from_numpy(rng.random(named.shape) < 0.7)
    left_out[:, 0] = True  # a prompt of one class has nothing that separates names
    return replace(case, outputs={**case.outputs, "text_mask": case.outputs["text_mask"] & ~left_out})


def _masked_infinite(case: Case, rng: Generator) -> Case:
    """Logits outside text_mask are −inf, as Grounding DINO's text head leaves them."""
    if "text_mask" not in case.outputs:
        return case
    outside = ~case.outputs["text_mask"][:, None]

    def fill(_layer: str, key: str, value: Tensor) -> Tensor:
        return value.masked_fill(outside, -torch.inf) if key == "pred_logits" else value

    return case.with_predictions(fill)


EDITS: Final[Mapping[str, Callable[[Case, Generator], Case]]] = {
    "copied target": _copied_target,
    "copied query": _copied_query,
    "exact boxes": _exact_boxes,
    "end classes": _end_classes,
    "contested": _contested,
    "mask with holes": _mask_with_holes,
    "masked -inf": _masked_infinite,
}


def _label(recipe: Recipe) -> str:
    words = [f"targets {list(recipe.targets)}", f"queries {recipe.queries}"]
    words += [f"aux {recipe.aux}"] if recipe.aux else []
    words += [f"encoder {recipe.encoder_queries}"] if recipe.encoder_queries else []
    words += [f"{recipe.logits} logits", f"{recipe.boxes} boxes", *recipe.edits, f"seed {recipe.seed}"]
    return ", ".join(words)


def as_float32(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)
