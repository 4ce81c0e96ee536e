"""Shows one failure of a criterion: the body of every repro script, copied as it stands.

Imports the candidate, numpy and torch, and nothing else, so that a script needs nothing of the suite. What stands above
the line below is replaced for each failure (see ``repro``); ``it`` is a ``findings.Repeat``.
"""

import importlib
import importlib.util
import inspect
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

CANDIDATE = ""
PROFILE = "detr"
OPTIONS: dict[str, Any] = {}
IT: dict[str, Any] = {}
# --- the call, the candidate, and what is looked at -----------------------------------------------------------------

# what a factory with **kwargs is given; others get what their signature names
USUAL = (
    "num_classes", "num_decoder_layers", "focal_alpha", "focal_gamma", "eos_coef", "set_cost_class", "set_cost_bbox",
    "set_cost_giou", "ce_loss_coef", "bbox_loss_coef", "giou_loss_coef", "mask_loss_coef", "dice_loss_coef", "losses",
    "two_stage",
)  # fmt: skip
# the arguments of DETR's own two classes, where a module has no build_criterion
DETR = {
    "cost_class": "set_cost_class", "cost_bbox": "set_cost_bbox", "cost_giou": "set_cost_giou",
    "class_cost": "set_cost_class", "bbox_cost": "set_cost_bbox", "giou_cost": "set_cost_giou",
    "num_classes": "num_classes", "eos_coef": "eos_coef", "focal_alpha": "focal_alpha", "alpha": "focal_alpha",
    "focal_gamma": "focal_gamma", "gamma": "focal_gamma", "losses": "losses",
}  # fmt: skip


def the_call(archive: Any) -> tuple[Any, Any]:
    """outputs and targets: an array's name is its path in them."""
    tree: dict[str, Any] = {"outputs": {}, "targets": {}}
    for name in archive.files:
        *path, last = name.split("/")
        if path:
            at = tree
            for part in path:
                at = at.setdefault(part, {})
            last, _, narrow = last.partition(":")
            tensor = torch.from_numpy(np.array(archive[name]))
            tensor = tensor.bfloat16() if narrow == "bfloat16" else tensor
            if last.startswith("pred_"):
                tensor.requires_grad_()
            at[last] = tensor if tensor.ndim else tensor.item()
    return listed(tree["outputs"]), listed(tree["targets"]) or []


def listed(value: Any) -> Any:
    """Mappings whose keys are 0, 1, 2, … as lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: listed(v) for key, v in value.items()}
    return [inner[str(i)] for i in range(len(inner))] if inner and all(k.isdigit() for k in inner) else inner


def found_at(spec: str) -> Any:
    """What a module, module:attribute or file.py:attribute names."""
    sys.path.insert(0, os.getcwd())
    head, _, attribute = spec.rpartition(":")
    if not head or (len(head) == 1 and attribute[:1] in "/\\"):
        head, attribute = spec, ""
    if head.endswith(".py"):
        path = Path(head).resolve()
        sys.path.insert(0, str(path.parent))
        found: Any = importlib.import_module(path.stem)
    else:
        found = importlib.import_module(head)
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found


def names(function: Any) -> tuple[set[str], bool]:
    """The arguments that a function names, and whether it takes any other."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def built(found: Any) -> Any:
    """The criterion under OPTIONS."""
    if isinstance(found, ModuleType) and not hasattr(found, "build_criterion"):
        return detr_shaped(found)
    found = getattr(found, "build_criterion", found)
    factory = found.factory if hasattr(found, "rename") else found
    required = [
        p.name
        for p in inspect.signature(getattr(factory, "forward", factory)).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not inspect.isclass(factory) and len(required) >= 2 and not set(required) & set(USUAL):
        return factory  # a criterion itself
    known, every = names(factory)
    values = {**OPTIONS, "profile": PROFILE}
    return factory(**{k: v for k, v in values.items() if k in known or (every and k in USUAL)})


def detr_shaped(module: Any) -> Any:
    """SetCriterion with HungarianMatcher."""

    def given(function: Any) -> dict[str, Any]:
        return {name: OPTIONS[DETR[name]] for name in names(function)[0] if name in DETR}

    weights = {f"loss_{k}": OPTIONS[f"{k}_loss_coef"] for k in ("ce", "bbox", "giou")}
    ours = {"matcher": module.HungarianMatcher(**given(module.HungarianMatcher)), "weight_dict": weights}
    taken = {k: v for k, v in ours.items() if k in names(module.SetCriterion)[0]}
    return module.SetCriterion(**given(module.SetCriterion), **taken)


def renamed(key: str, rename: dict[str, str]) -> str:
    """The contract's name of a loss."""
    for theirs in sorted(rename, key=len, reverse=True):
        if key == theirs or key.startswith(f"{theirs}_"):
            return rename[theirs] + key[len(theirs) :]
    return key


def number(value: Any) -> float:
    """A loss as a number."""
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def close(got: Any, it: dict[str, Any]) -> bool:
    """True for a number within the allowed error."""
    return got is not None and math.isfinite(got) and abs(got - it["want"]) <= it["allowed"]


def looked_at(it: dict[str, Any], criterion: Any, rename: dict[str, str], archive: Any) -> tuple[Any, Any, bool]:
    """What is wanted, what was got, and whether that is right."""
    outputs, targets = the_call(archive)
    if it["kind"] == "matching":
        return the_matching(it, criterion, outputs, targets, archive["costs"])
    returned = criterion(outputs, targets)
    if not hasattr(returned, "items"):
        return "a dict of losses", f"a {type(returned).__name__}", False
    losses = {renamed(str(key), rename): value for key, value in returned.items()}
    tensors = {k: v for k, v in losses.items() if isinstance(v, torch.Tensor)}
    if it["kind"] == "returns":
        sum(v.sum() for v in tensors.values() if v.requires_grad).backward()  # type: ignore[union-attr]
        return "a dict of losses", "a dict of losses", True
    name, value = it["name"], losses.get(it["name"])
    keys = "the keys are " + ", ".join(sorted(losses))
    if it["kind"] == "gradient":
        return the_gradient(it, tensors, outputs)
    if it["kind"] in ("weight", "total"):
        own = getattr(criterion, "weight_dict", None) or {}
        weights = {renamed(str(k), rename): float(v) for k, v in own.items()}
        got: Any = weights.get(name, None if it["want"] else 0.0)
        if it["kind"] == "total":
            got = sum(number(losses[k]) * w for k, w in weights.items() if k in losses)
        return it["want"], f"no weight {name!r}" if got is None else got, close(got, it)
    if it["kind"] == "no key":
        return f"no loss {name!r}", keys, name not in losses
    if it["kind"] == "key" or value is None:
        return f"the loss {name!r}", "returned" if name in losses else keys, name in losses
    if it["kind"] == "scalar":
        real = isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point()
        return "a real scalar tensor", getattr(value, "shape", type(value)), real
    if it["kind"] == "graph":
        part = getattr(value, "requires_grad", False)
        return f"{name} in the graph", "part of it" if part else "a constant", part
    got = number(value)
    if it["kind"] == "finite":
        return "a finite number", got, math.isfinite(got)
    return it["want"], got, close(got, it)


def the_gradient(it: dict[str, Any], losses: Any, outputs: Any) -> tuple[Any, Any, bool]:
    """An entry of a gradient."""
    at = outputs
    for part in it["at"].split("/"):
        at = at[int(part)] if isinstance(at, list) else at[part]
    parts = [losses[k].sum() for k in it["sums"] if k in losses and losses[k].requires_grad]
    grad = torch.autograd.grad(sum(parts), at, allow_unused=True)[0] if parts else None
    if it["want"] is None or grad is None:
        return "a gradient" if it["want"] is None else it["want"], "none" if grad is None else "one", grad is not None
    got = float(grad[tuple(it["index"])])
    return it["want"], got, close(got, it)


def the_matching(it: dict[str, Any], criterion: Any, outputs: Any, targets: Any, costs: Any) -> tuple[Any, Any, bool]:
    """What the pairs that the matcher returns cost, by the contract's costs [Q, n]."""
    part = outputs
    for step in it["at"].split("/") if it["at"] else ():
        part = part[int(step)] if isinstance(part, list) else part[step]
    part = {k: part[k] for k in ("pred_logits", "pred_boxes", "pred_masks") if k in part}
    part |= {k: outputs[k] for k in ("text_mask",) if k in outputs}
    if it["at"].startswith(("enc", "interm")) and OPTIONS.get("encoder_targets") == "class-zero":
        targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
    pairs = criterion.matcher(part, targets)
    query, target = (pairs["indices"] if isinstance(pairs, dict) else pairs)[it["index"][0]]
    both = list(zip(map(int, query), map(int, target), strict=True))
    once = all(len(set(side)) == len(side) == min(costs.shape) for side in zip(*both, strict=True)) if both else False
    got = float(sum(costs[q, t] for q, t in both))
    said = ", ".join(f"query {q} → target {t}" for q, t in both) or "no pair"
    return f"cost {it['want']:.7g}, each once", f"cost {got:.7g}: {said}", once and got - it["want"] <= it["allowed"]


def main() -> int:
    """Exit status 1 while the criterion is wrong, 0 once it is right."""
    torch.set_num_threads(1)
    archive = np.load(Path(__file__).with_suffix(".npz"))
    found = found_at(sys.argv[1] if len(sys.argv) > 1 else CANDIDATE)
    rename = dict(getattr(found, "rename", {}))
    try:
        want, got, right = looked_at(IT, built(found), rename, archive)
    except Exception as error:
        want, got, right = "losses", f"raised {type(error).__name__}: {error}", False
    print(IT["name"] or IT["kind"])
    print(f"want  {want}" + (f"  ± {IT['allowed']:.1e}" if IT["allowed"] else ""))
    print(f"got   {got}")
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
