"""Which golden cases there are: their inputs, made again from recipes, stored pairs and duels, seeds, or COCO files.

What the contract gives for them is computed in ``golden_records``, and stored and read by ``detr_fixtures.golden``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

import numpy as np
import torch

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import Case, Recipe, as_float32, build
from detr_conformance.denoised import DINO, MADE_DENOISING, denoised_case
from detr_conformance.experiments import made
from detr_conformance.golden_options import OPTIONS, Setting
from detr_conformance.masked import MADE_MASKS, MASKED, NO_MASKS, masked_case
from detr_conformance.stored import Duel, Inputs, Pair, compact, corpus
from detr_fixtures import arrays, golden
from detr_reference.coco import Conversion, coco
from detr_reference.options import Options
from detr_reference.textbook import textbook

ANNOTATIONS: Final = "coco/annotations.json"
FOUND: Final = "found"  # the set of cases that a search found and somebody kept: their inputs are stored, not made
EVERYTHING: Final = frozenset(Options.__dataclass_fields__)
SETS: Final[Mapping[str, str]] = {
    "hand": "boxes on the k/16 grid and logits of 0, to be checked by hand: losses also as exact fractions",
    "ordinary": "random batches as in training",
    "edges": "no targets, more targets than queries, one query, ties, tiny and overhanging boxes, extreme logits, …",
    "options": "one option at another value than the profile's",
    "corpus": "the adversarial corpus: cases on which known faults show",
    "masks": "masks of unequal sizes",
    "denoising": "contrastive denoising queries",
    "coco": "targets converted from a COCO annotation file",
    "sized": "sizes as in training; inputs from a seed, expected values only",
    FOUND: "found by searching, and kept",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A golden case before its expected values. ``made``: the seed's rule, where inputs are not stored · ``claimed``:
    known faults that the case is meant to kill."""

    name: str
    set: str
    case: Case
    provenance: Mapping[str, Any]
    made: Mapping[str, Any] | None = None
    claimed: tuple[str, ...] = field(default=())

    @property
    def profile(self) -> str:
        """The profile whose options it is made with."""
        return self.name.split("/")[0]


def entries(profile: str) -> Iterator[Entry]:
    """All declared golden cases of a profile, names unlike each other."""
    taken: set[str] = set()
    for entry in _all(profile):
        slug, count = re.sub(r"[^a-z0-9]+", "-", entry.name.lower()).strip("-"), 1
        name = f"{profile}/{entry.set}-{slug}"
        while name in taken:
            count += 1
            name = f"{profile}/{entry.set}-{slug}-{count}"
        taken.add(name)
        yield replace(entry, name=name)


def _all(profile: str) -> Iterator[Entry]:
    bound = right(profile)
    yield from _by_hand(bound)
    yield from (_of_recipe("ordinary", name, recipe, bound) for name, recipe in _ORDINARY.items())
    yield from (_of_recipe("edges", name, recipe, bound) for name, recipe in _EDGES.items())
    if bound.options.class_loss == "token":
        yield from (_of_recipe("edges", name, recipe, bound) for name, recipe in _PROMPTS.items())
    yield from (_of_setting(bound, setting) for setting in OPTIONS if setting.changes(profile))
    yield from _of_corpus(bound)
    if profile in MASKED:
        for recipe, sizes, given in (*MADE_MASKS[:: 1 if profile == "detr" else 3], *NO_MASKS[:2]):
            case = masked_case(bound, recipe, sizes, given)
            origin = {"recipe": compact(recipe)["recipe"], "masks": [list(s) for s in sizes], "given": list(given)}
            yield Entry(f"seed {recipe.seed}", "masks", case, origin)
    if profile in DINO:
        for recipe, groups, *spare in MADE_DENOISING:
            origin = {"recipe": compact(recipe)["recipe"], "groups": groups, "spare": sum(spare)}
            yield Entry(f"seed {recipe.seed}", "denoising", denoised_case(bound, recipe, groups, *spare), origin)
    yield from _of_coco(bound)
    yield from _sized(bound)


@cache
def right(profile: str) -> Bound:
    """The textbook as a candidate, which lets every option vary."""
    return bind(candidate_of(textbook, profile))


# --- recipes --------------------------------------------------------------------------------------------------------

_HAND: Final = (
    Recipe(401, (1,), 1, classes=2, boxes="grid"),
    Recipe(402, (1,), 2, classes=2, boxes="grid"),
    Recipe(403, (2,), 2, classes=2, boxes="grid"),
    Recipe(404, (2,), 3, classes=3, boxes="grid"),
    Recipe(405, (3,), 2, classes=3, boxes="grid"),
    Recipe(406, (0,), 2, classes=2, boxes="grid"),
    Recipe(407, (2, 0), 3, classes=3, boxes="grid"),
    Recipe(408, (2, 1), 3, classes=2, aux=1, boxes="grid"),
    Recipe(409, (1, 2), 3, classes=3, aux=1, encoder_queries=4, boxes="grid"),
    Recipe(410, (3,), 4, classes=4, boxes="grid"),
)
_ORDINARY: Final[Mapping[str, Recipe]] = {
    "one image": Recipe(501, (2,), 5),
    "two images": Recipe(502, (3, 1), 5, classes=3),
    "three images": Recipe(503, (2, 1, 3), 5, classes=5, tokens=11),
    "auxiliary and encoder": Recipe(504, (2, 3), 5, aux=2, encoder_queries=6),
    "grid logits": Recipe(505, (2, 2), 4, classes=3, logits="grid", boxes="grid"),
    "confident": Recipe(506, (2, 1), 5, logits="confident"),
    "one class": Recipe(507, (2, 1), 4, classes=1, tokens=6),
    "as many targets as queries": Recipe(508, (4, 4), 4, classes=3),
}
_EDGES: Final[Mapping[str, Recipe]] = {
    "no targets": Recipe(601, (0, 0), 3, aux=1, encoder_queries=4),
    "no targets in one image": Recipe(602, (0, 2), 4, aux=1, encoder_queries=4),
    "more targets than queries": Recipe(603, (4, 3), 2, aux=1, encoder_queries=5),
    "one query": Recipe(604, (2, 1), 1),
    "copied query": Recipe(605, (2, 2), 4, edits=("copied query",)),
    "copied target": Recipe(606, (2, 3), 5, edits=("copied target",)),
    "exact boxes": Recipe(607, (2, 1), 4, edits=("exact boxes",)),
    "contested": Recipe(608, (3, 2), 4, edits=("contested",)),
    "first and last class": Recipe(609, (3, 2), 4, edits=("end classes",)),
    "tiny boxes": Recipe(610, (2, 2), 4, boxes="tiny"),
    "overhanging boxes": Recipe(611, (2, 2), 4, boxes="overhang"),
    "extreme logits": Recipe(612, (2, 1), 4, logits="extreme"),
    "no auxiliary layer": Recipe(613, (2, 1), 4, encoder_queries=4),
    "one auxiliary layer": Recipe(614, (2, 1), 4, aux=1),
    "five auxiliary layers": Recipe(615, (1, 2), 3, classes=3, aux=5, encoder_queries=3),
    "encoder with more queries": Recipe(616, (2, 1), 3, encoder_queries=7),
    "encoder with fewer queries": Recipe(617, (2, 1), 6, encoder_queries=2),
}
_PROMPTS: Final[Mapping[str, Recipe]] = {
    "masked text": Recipe(621, (2, 1), 4, aux=1, tokens=12, edits=("masked -inf",)),
    "unequal prompts": Recipe(622, (2, 1, 3), 4, classes=5, tokens=13),
    "unequal prompts and layers": Recipe(623, (1, 3, 2), 4, classes=5, aux=1, encoder_queries=5, tokens=14),
}


def _of_recipe(set: str, name: str, recipe: Recipe, bound: Bound) -> Entry:
    return Entry(name, set, build(recipe, bound.options, EVERYTHING), compact(recipe))


def _by_hand(bound: Bound) -> Iterator[Entry]:
    for recipe in _HAND:
        case = build(recipe, bound.options, EVERYTHING)
        flat = case.with_predictions(lambda _, key, x: torch.zeros_like(x) if key == "pred_logits" else x)
        label = case.label.replace(f"{recipe.logits} logits", "logits 0")
        yield Entry(f"seed {recipe.seed}", "hand", replace(flat, label=label), {**compact(recipe), "logits": 0})


def _of_setting(bound: Bound, setting: Setting) -> Entry:
    layers = {"aux": 1, "encoder_queries": 5} if setting.beside == "encoder" else {"aux": setting.beside == "aux"}
    recipe = Recipe(701, (2, 1), 4, classes=3, **layers)
    values = {setting.name: list(setting.value) if isinstance(setting.value, tuple) else setting.value}
    options = bound.options.with_(**{setting.name: setting.value})
    if "masks" in setting.beside:
        wide = replace(bound, options=options)
        case = masked_case(wide, recipe, ((5, 4), (3, 6)), (3, 3))
    else:
        case = build(recipe, options, EVERYTHING)
    case = replace(case, label=f"{setting.name} {setting.value}, {case.label}")
    return Entry(f"{setting.name} {setting.value}", "options", case, {**compact(recipe), "options": values})


_ONE_CALL: Final = ("batch", "edges", "extremes", "configured", "pairs", "duels")  # judged on what one call returns


def _of_corpus(bound: Bound) -> Iterator[Entry]:
    """So many stored cases that each fault that one of them claims to kill is claimed by one that is kept."""
    every = [(name, one) for name in _ONE_CALL for one in corpus().of(name, bound.profile)]
    left = {id for _, one in every for id in one.kills[bound.profile]}
    chosen: set[int] = set()
    while left:
        best = max(range(len(every)), key=lambda i: (len(left & {*every[i][1].kills[bound.profile]}), -i))
        chosen.add(best)
        left -= {*every[best][1].kills[bound.profile]}
    for i in sorted(chosen):
        experiment, one = every[i]
        name = f"{experiment} {_slug(one.inputs)}"
        yield Entry(name, "corpus", made(one.inputs, bound), compact(one.inputs), claimed=one.kills[bound.profile])


def _slug(inputs: Inputs) -> str:
    if isinstance(inputs, Duel):
        return f"{inputs.kind} {inputs.seed}"
    return inputs.kind if isinstance(inputs, Pair) else f"seed {inputs.seed}"


# --- COCO -----------------------------------------------------------------------------------------------------------

_COCO: Final[Mapping[str, tuple[dict[str, Any], ...]]] = {
    "detr": (
        {"images": [7, 19], "contiguous": False, "masks": True},
        {"images": [402, 23], "contiguous": False, "masks": False},
        {"images": [7, 19, 23, 402], "contiguous": True, "masks": True},
    ),
    "deformable-detr": (
        {"images": [402, 7], "contiguous": False, "masks": False},
        {"images": [7, 402, 19, 23], "contiguous": True, "masks": True},
    ),
    "dino": ({"images": [19, 7, 23, 402], "contiguous": True, "masks": False},),
    "grounding-dino": (),
}


def _of_coco(bound: Bound) -> Iterator[Entry]:
    if not _COCO[bound.profile]:
        return
    file = json.loads((golden.GOLDEN / ANNOTATIONS).read_text("utf-8"))
    for wanted in _COCO[bound.profile]:
        ids = ", ".join(map(str, wanted["images"]))
        kind = ("contiguous labels" if wanted["contiguous"] else "labels as they are") + ", masks" * wanted["masks"]
        case = coco_case(bound, file, wanted)
        origin = {"coco": {"file": ANNOTATIONS, **wanted}}
        yield Entry(f"images {ids} {kind}", "coco", replace(case, label=f"COCO images {ids}, {kind}"), origin)


def coco_case(bound: Bound, file: Mapping[str, Any], wanted: Mapping[str, Any], by: Conversion = coco) -> Case:
    """A case whose targets ``by`` converts from a COCO annotation file. Raises whatever a wrong conversion raises."""
    flags = {"contiguous": wanted["contiguous"], "masks": wanted["masks"]}
    targets = tuple(by(file, image, **flags) for image in wanted["images"])
    o = bound.options.with_(num_classes=len(file["categories"]) if wanted["contiguous"] else 91, num_decoder_layers=1)
    if wanted["masks"]:
        o = o.with_(losses=(*o.losses, "masks"))
    rng = np.random.default_rng([801, *wanted["images"]])
    shape = (len(targets), 4)
    sides = rng.uniform(0.1, 0.5, (*shape, 2))
    boxes = np.concatenate([rng.uniform(sides / 2, 1 - sides / 2), sides], -1)
    outputs: dict[str, Any] = {
        "pred_logits": as_float32(rng.normal(0, 1.5, (*shape, o.channels)).round(2)),
        "pred_boxes": as_float32(boxes.round(4)),
    }
    if wanted["masks"]:
        outputs["pred_masks"] = as_float32(rng.normal(0, 2, (*shape, 6, 8)).round(2))
    return Case("", o, outputs, targets)


# --- sizes as in training -------------------------------------------------------------------------------------------

_SIZES: Final[Mapping[str, tuple[int, ...]]] = {  # queries, auxiliary layers, encoder queries, targets of each image
    "detr": (100, 5, 0, 12, 7),
    "deformable-detr": (300, 5, 300, 14, 3),
    "dino": (900, 1, 900, 20, 9),
    "grounding-dino": (900, 1, 900, 11, 17),
}
_BOX: Final[dict[str, list[float]]] = {"offset": [0.2, 0.2, 0.05, 0.05], "scale": [0.6, 0.6, 0.35, 0.35]}


def _sized(bound: Bound) -> Iterator[Entry]:
    """Logits uniform in −6..2 and boxes inside the image, both from the seed; a prompt of 80 classes is stored."""
    queries, aux, encoder, *counts = _SIZES[bound.profile]
    text = bound.options.class_loss == "token"
    o = bound.options.with_(num_classes=80 if text else 91, num_decoder_layers=aux + 1)
    channels = 256 if text else o.channels
    rules: list[dict[str, Any]] = []
    layers = {"outputs": queries} | {f"outputs/aux_outputs/{i}": queries for i in range(aux)}
    if encoder:
        layers[f"outputs/{o.encoder_key}"] = encoder
    for path, q in layers.items():
        logits = {"name": f"{path}/pred_logits", "shape": [len(counts), q, channels], "dtype": "float32"}
        boxes = {"name": f"{path}/pred_boxes", "shape": [len(counts), q, 4], "dtype": "float32", **_BOX}
        rules += [{**logits, "offset": [-6.0], "scale": [8.0]}, boxes]
    for b, n in enumerate(counts):
        labels = {"name": f"targets/{b}/labels", "shape": [n], "dtype": "int64", "offset": [0.0]}
        boxes = {"name": f"targets/{b}/boxes", "shape": [n, 4], "dtype": "float32", **_BOX}
        rules += [{**labels, "scale": [float(o.num_classes)]}, boxes]
    rule: dict[str, Any] = {"seed": 901, "arrays": rules, "sha256": ""}
    rule["sha256"] = golden.hashed(golden.drawn(rule))
    found = golden.drawn(rule)
    if text:
        spread = np.kron(np.eye(80), [[1.0, 1.0, 0.0]])  # two tokens a class, and a separator
        spread = np.pad(spread, ((0, 0), (1, channels - 241))).astype(np.float32)
        found["outputs/text_mask"] = np.tile(np.arange(channels) < 242, (len(counts), 1))
        for b in range(len(counts)):
            found[f"targets/{b}/token_labels"] = spread[found[f"targets/{b}/labels"]]
            found[f"targets/{b}/positive_map"] = spread
    outputs, targets = arrays.nested(found)
    label = f"{queries} queries, {aux} auxiliary layers, targets {counts}, from seed 901"
    yield Entry(f"{queries} queries", "sized", Case(label, o, outputs, tuple(targets)), {"seed": 901}, rule)


def case_of(one: golden.Golden) -> Case:
    """A stored golden case as the suite has it."""
    outputs, targets = one.call
    return Case(one.title, one.options, outputs, tuple(targets))


def found_entry(one: golden.Golden) -> Entry:
    """A case that was found and kept, from its stored inputs."""
    return Entry(one.name, FOUND, case_of(one), one.record["provenance"], claimed=tuple(one.record["kills"]))
