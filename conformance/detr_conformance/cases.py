"""Cases: the inputs of one call, made from a small recipe, and the Hypothesis strategies that draw recipes.

A recipe is a handful of words and integers; everything else follows from its seed. So a case is drawn in
microseconds, printed in a line, and made again anywhere. Some palettes lie on a k/16 grid, so that the smallest
failing input can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.random import Generator
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_reference.options import Options
from detr_reference.textbook import TERMS, textbook

FINAL: Final = "final"
ENC: Final = "enc"


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
    """

    label: str
    options: Options
    outputs: Mapping[str, Any]
    targets: tuple[Mapping[str, Tensor], ...]

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
    def has_encoder(self) -> bool:
        """True where the case has encoder outputs."""
        return bool(self.options.encoder_key) and self.options.encoder_key in self.outputs

    def predictions(self, layer: str) -> Mapping[str, Tensor]:
        """pred_logits and pred_boxes of a layer."""
        found: Mapping[str, Tensor] = self.outputs
        if layer == ENC:
            found = self.outputs[self.options.encoder_key]
        elif layer != FINAL:
            found = self.outputs["aux_outputs"][int(layer[3:])]
        return {k: found[k] for k in ("pred_logits", "pred_boxes")}

    def suffix(self, layer: str) -> str:
        """The suffix of a layer's losses."""
        if layer == FINAL:
            return ""
        return self.options.encoder_suffix if layer == ENC else f"{self.options.aux_suffix}{layer[3:]}"

    def keys(self, layer: str) -> tuple[str, ...]:
        """The trained losses of a layer."""
        return tuple(f"loss_{term}{self.suffix(layer)}" for term in TERMS)

    def with_predictions(self, change: Callable[[str, str, Tensor], Tensor]) -> Case:
        """The case with every prediction replaced by ``change(layer, key, value)``."""
        new: dict[str, Any] = dict(self.outputs)
        for layer in self.layers:
            fresh = {k: change(layer, k, v) for k, v in self.predictions(layer).items()}
            if layer == FINAL:
                new |= fresh
            elif layer == ENC:
                new[self.options.encoder_key] = fresh
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

    def fresh(self) -> tuple[dict[str, Any], list[dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
        """Inputs for one call: cloned outputs with gradient, cloned targets, and the (logits, boxes) of each layer."""
        leaves: dict[str, tuple[Tensor, Tensor]] = {}

        def leaf(layer: str, key: str, value: Tensor) -> Tensor:
            new = value.clone().requires_grad_()
            leaves[layer] = (*leaves.get(layer, ()), new)
            return new

        outputs = dict(self.with_predictions(leaf).outputs)
        if "text_mask" in outputs:
            outputs["text_mask"] = outputs["text_mask"].clone()
        return outputs, [{k: v.clone() for k, v in t.items()} for t in self.targets], leaves


def build(recipe: Recipe, options: Options, varies: frozenset[str]) -> Case:
    """The case of a recipe under ``options``; option values that the candidate cannot take are left out."""
    wanted = {k: v for k, v in recipe.options if k in varies}
    o = options.with_(num_classes=recipe.classes, num_decoder_layers=recipe.aux + 1, **wanted)
    if "num_classes" not in varies:
        o = o.with_(num_classes=options.num_classes)
    rng = np.random.default_rng(recipe.seed)
    prompts = [_prompt(rng, o.num_classes, recipe.tokens, b) for b in range(len(recipe.targets))]
    targets = [_target(rng, recipe, o, n, prompt) for n, prompt in zip(recipe.targets, prompts, strict=True)]
    text = o.class_loss == "token"
    channels = recipe.tokens if text else o.channels

    def layer(queries: int) -> dict[str, Tensor]:
        shape = (len(targets), queries)
        logits = LOGITS[recipe.logits](rng, (*shape, channels))
        boxes = np.stack([_predicted(rng, recipe, t, queries) for t in targets])
        return {"pred_logits": _float32(logits), "pred_boxes": _float32(boxes)}

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


def _plain(rng: Generator, n: int) -> Any:
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
    "plain": _plain,
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


def _prompt(rng: Generator, classes: int, tokens: int, image: int) -> tuple[Tensor, Tensor]:
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
    return _float32(spread[:known]), torch.arange(tokens) < at


def _target(rng: Generator, recipe: Recipe, o: Options, n: int, prompt: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    text = o.class_loss == "token"
    classes = len(prompt[0]) if text else o.num_classes
    labels = torch.from_numpy(rng.integers(0, classes, n))
    target = {"labels": labels, "boxes": _float32(BOXES[recipe.boxes](rng, n))}
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
        return _float32(boxes[:1].numpy() * np.exp(rng.normal(0, 0.08, boxes.shape)))

    return _on_target_boxes(case, close)


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
    "masked -inf": _masked_infinite,
}


# --- pairs of boxes and duels of queries ----------------------------------------------------------------------------


def pair_case(pred: Any, wanted: Any, options: Options, label: str, queries: int = 1) -> Case:
    """One image, one target box [4] and one query with box ``pred`` [4]: nb is 1, the matching is certain.

    With ``queries`` = 2 a far-off second query stands beside, so that unmatched ones exist.
    """
    classes, tokens = options.num_classes, 3
    text = options.class_loss == "token"
    channels = tokens if text else options.channels
    boxes = [pred] + [[0.5, 0.5, 0.9, 0.9]] * (queries - 1)
    logits = torch.zeros(1, queries, channels)
    logits[:, 1:] = -3.0
    target: dict[str, Tensor] = {"labels": torch.zeros(1, dtype=torch.int64), "boxes": _float32([wanted])}
    outputs: dict[str, Any] = {"pred_logits": logits, "pred_boxes": _float32([boxes])}
    if text:
        spread = torch.zeros(min(classes, 2), tokens)
        spread[0, 1] = 1
        spread[-1, -1] = 1
        target |= {"token_labels": spread[:1], "positive_map": spread}
        outputs["text_mask"] = torch.ones(1, tokens, dtype=torch.bool)
    return Case(label, options.with_(num_decoder_layers=1), outputs, (target,))


_OTHER_COEFS: Final = (
    {"ce_loss_coef": 7.0, "bbox_loss_coef": 1.0, "giou_loss_coef": 5.0},
    {"ce_loss_coef": 0.5, "bbox_loss_coef": 9.0, "giou_loss_coef": 1.0},
)


def duel_case(seed: int, kind: str, options: Options, varies: frozenset[str]) -> Case:
    """Three images, each with two queries and one or two targets, and two assignments that cost nearly the same.

    ``kind``: ``class``, ``bbox`` or ``giou`` switches the other two costs off (or, where the candidate does not let
    the weights vary, gives both queries what makes the others equal), with two targets, since a single one cannot tell
    a cost from its logarithm; ``all`` weighs the three as configured; ``other weights`` draws the three weights;
    ``other loss weights`` and ``other focal`` leave the matching weights and change the loss weights, or α and γ. The
    gap lies between 2e-3 and 2e-2, a thousand times the rounding of float32 and less than what a wrong cost moves.
    """
    rng = np.random.default_rng(seed)
    weights = {"class": (1.0, 0.0, 0.0), "bbox": (0.0, 1.0, 0.0), "giou": (0.0, 0.0, 1.0)}.get(kind)
    if kind == "other weights":
        first, second, third = (float(w) for w in rng.choice([0.5, 1.0, 3.0, 6.0], 3))
        weights = (first, second, third)
    o = options.with_(num_decoder_layers=1)
    names = ("set_cost_class", "set_cost_bbox", "set_cost_giou")
    free = weights is not None and set(names) <= varies
    if weights is not None and free:
        o = o.with_(**dict(zip(names, weights, strict=True)))
    if kind == "other loss weights":
        o = o.with_(**{k: v for k, v in _OTHER_COEFS[seed % len(_OTHER_COEFS)].items() if k in varies})
    if kind == "other focal":
        focal = {"focal_alpha": (0.6, 0.1, 0.9)[seed % 3], "focal_gamma": (2.0, 1.0, 3.0)[(seed + seed // 3) % 3]}
        o = o.with_(**{k: v for k, v in focal.items() if k in varies})
    if "num_classes" in varies:
        o = o.with_(num_classes=3)
    tokens = 7
    text = o.class_loss == "token"
    book = textbook.under(o)
    logits, boxes, targets, masks = [], [], [], []
    for image in range(3):
        prompt = _prompt(rng, o.num_classes, tokens, image)
        count = 2 if kind in ("class", "bbox", "giou") else 1
        target = _target(rng, Recipe(seed, (count,), 2), o, count, prompt)
        if count == 2 and kind == "class":
            target = _distinct_labels(target, o)
        many = 600
        x = rng.normal(0, 1.5, (many, tokens if text else o.channels)).clip(-4, 4)
        wanted = target["boxes"].double().numpy()
        close = (wanted[rng.integers(0, count, many)] * np.exp(rng.normal(0, 0.3, (many, 4)))).clip(0.02, 0.98)
        y = np.where(rng.random((many, 1)) < 0.7, close, _plain(rng, many))
        if kind == "class":
            y[:] = y[0]
        elif kind in ("bbox", "giou") and not free:
            x[:] = x[0]
        x32, y32 = _float32(x), _float32(y)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in target.items()}
        costs = book.cost(x32.double(), y32.double(), wide)
        # queries i and j prefer the targets as they stand iff what i gains on j's by that is less
        gain = costs[:, 0] - (costs[:, 1] if count == 2 else 0)
        order = gain.argsort()
        gaps = gain[order].diff()
        fit = ((gaps > 2e-3) & (gaps < 2e-2)).nonzero()[:, 0]
        at = int(fit[int(rng.integers(0, len(fit)))]) if len(fit) else int(gaps.argmax())
        pair = order[[at, at + 1]][torch.from_numpy(rng.permutation(2))]
        logits.append(x32[pair])
        boxes.append(y32[pair])
        targets.append(target)
        masks.append(prompt[1])
    outputs: dict[str, Any] = {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}
    if text:
        outputs["text_mask"] = torch.stack(masks)
    return Case(f"duel of {kind}, seed {seed}", o, outputs, tuple(targets))


def _distinct_labels(target: dict[str, Tensor], o: Options) -> dict[str, Tensor]:
    """The same two targets with the first class and the last."""
    last = len(target["positive_map"]) - 1 if "positive_map" in target else o.num_classes - 1
    new = {**target, "labels": torch.tensor([0, last])}
    if "positive_map" in target:
        new["token_labels"] = target["positive_map"][new["labels"]]
    return new


def contested_case(
    seed: int, n: int, queries: int, options: Options, varies: frozenset[str], greedy_fails: bool
) -> Case:
    """One image whose best assignment is the same for every sensible distance of boxes, by a clear margin.

    All scores are equal, and where the candidate lets the weights vary the L1 cost decides. With ``greedy_fails``
    neither taking the cheapest pair first nor serving the targets in their order (every second seed: in reverse)
    finds it.
    """
    o = options.with_(num_decoder_layers=1)
    if {"set_cost_bbox", "set_cost_giou"} <= varies:
        o = o.with_(set_cost_bbox=5.0, set_cost_giou=1e-3)
    book = textbook.under(o)
    while True:
        rng = np.random.default_rng(seed)
        centre = rng.uniform(0.35, 0.65, (1, 2))
        wanted = np.concatenate([centre + rng.normal(0, 0.12, (n, 2)), rng.uniform(0.15, 0.3, (n, 2))], -1).round(3)
        pred = np.concatenate([centre + rng.normal(0, 0.12, (queries, 2)), rng.uniform(0.15, 0.3, (queries, 2))], -1)
        pred = pred.round(3)
        greedy_order = 1 if seed % 2 else -1
        seed += 2  # so that the order that must fail stays
        difference = pred[:, None] - wanted[None]
        l1 = np.abs(difference).sum(-1)
        best = _assigned(l1)
        if greedy_fails and (_greedy(l1) == best or _in_order(l1, greedy_order) == best):
            continue
        a, b = torch.from_numpy(pred)[:, None], torch.from_numpy(wanted)[None]
        giou = -book.giou(a, b).numpy()
        corners = book.l1(book.corners(a), book.corners(b)).numpy()
        costs = [l1, corners, np.sqrt((difference**2).sum(-1)), giou, 5 * l1 + 2 * giou]
        if all(_assigned(c) == best and _margin(c, best) > 0.05 * abs(c).max() for c in costs):
            break
    channels = 5 if o.class_loss == "token" else o.channels
    outputs: dict[str, Any] = {
        "pred_logits": torch.zeros(1, queries, channels),
        "pred_boxes": _float32(pred[None]),
    }
    target: dict[str, Tensor] = {"labels": torch.zeros(n, dtype=torch.int64), "boxes": _float32(wanted)}
    if o.class_loss == "token":
        spread = torch.eye(2, channels).roll(1, -1)
        target |= {"token_labels": spread[target["labels"]], "positive_map": spread}
        outputs["text_mask"] = torch.ones(1, channels, dtype=torch.bool)
    return Case(f"{n} targets contest {queries} queries, seed {seed}", o, outputs, (target,))


def _assigned(costs: Any) -> set[tuple[int, int]]:
    return set(zip(*(i.tolist() for i in linear_sum_assignment(costs)), strict=True))


def _margin(costs: Any, best: set[tuple[int, int]]) -> float:
    """By how much the second-best assignment costs more than the best."""

    def without(pair: tuple[int, int]) -> float:
        barred = costs.copy()
        barred[pair] = 1e3
        return float(sum(costs[p] for p in _assigned(barred)))

    return min(map(without, best)) - float(sum(costs[p] for p in best))


def _greedy(costs: Any) -> set[tuple[int, int]]:
    """The cheapest pair first."""
    found: set[tuple[int, int]] = set()
    for flat in costs.argsort(axis=None):
        q, t = (int(i) for i in np.unravel_index(flat, costs.shape))
        if all(q != a and t != b for a, b in found):
            found.add((q, t))
    return found


def _in_order(costs: Any, step: int) -> set[tuple[int, int]]:
    """Target by target, each taking the cheapest query left."""
    found: dict[int, int] = {}
    for t in range(costs.shape[1])[::step]:
        left = [q for q in range(len(costs)) if q not in found]
        if left:
            found[min(left, key=lambda q: costs[q, t])] = t
    return set(found.items())


def _label(recipe: Recipe) -> str:
    words = [f"targets {list(recipe.targets)}", f"queries {recipe.queries}"]
    words += [f"aux {recipe.aux}"] if recipe.aux else []
    words += [f"encoder {recipe.encoder_queries}"] if recipe.encoder_queries else []
    words += [f"{recipe.logits} logits", f"{recipe.boxes} boxes", *recipe.edits, f"seed {recipe.seed}"]
    return ", ".join(words)


def _float32(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)
