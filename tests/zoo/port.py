"""A criterion with one method a formula, so that a mistake is one short override.

`Detr`, `Deformable` and `Grounding` are right; `wrong_*.py` derive from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .ranks import mean_over_ranks

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Wrong:
    id: str
    profile: str
    clause: tuple[str, ...]
    sentence: str
    factory: Callable[..., Callable]


@dataclass(frozen=True)
class Right:
    id: str
    profile: str
    factory: Callable[..., Callable]
    note: str = ""  # where the contract could be read otherwise
    should: bool = False  # also refuses bad inputs and survives boxes without area
    module: str = ""  # the dotted module, where the module itself is meant to be the candidate


class Port(nn.Module):
    profile = ""
    encoder = ""  # the suffix of enc_outputs, empty where the family has none

    def __init__(self, **options: float | int | bool | tuple[str, ...]) -> None:
        super().__init__()
        self.o = SimpleNamespace(**options)
        self.check_options()
        self.weight_dict = self.weights()

    def check_options(self) -> None:
        if self.o.set_cost_class == 0 and self.o.set_cost_bbox == 0 and self.o.set_cost_giou == 0:
            raise ValueError("set_cost_class, set_cost_bbox and set_cost_giou are all zero")

    # -- weights -------------------------------------------------------------------------------------------------
    def base_weights(self) -> dict[str, float]:
        return {"loss_ce": self.o.ce_loss_coef, "loss_bbox": self.o.bbox_loss_coef, "loss_giou": self.o.giou_loss_coef}

    def suffixes(self) -> list[str]:
        aux = [f"_{i}" for i in range(self.o.num_decoder_layers - 1)]
        return ["", *aux, *([self.encoder] if self.encoder and self.o.two_stage else [])]

    def weights(self) -> dict[str, float]:
        return {key + suffix: value for suffix in self.suffixes() for key, value in self.base_weights().items()}

    # -- boxes ---------------------------------------------------------------------------------------------------
    def corners(self, boxes: Tensor) -> Tensor:
        cx, cy, w, h = boxes.unbind(-1)
        return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)

    def target_corners(self, boxes: Tensor) -> Tensor:
        return self.corners(boxes)

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
        return sides[..., 0] * sides[..., 1]

    def area(self, a: Tensor) -> Tensor:
        return (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])

    def hull(self, a: Tensor, b: Tensor) -> Tensor:
        sides = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
        return sides[..., 0] * sides[..., 1]

    def ratio(self, part: Tensor, whole: Tensor) -> Tensor:
        some = whole > 0
        return torch.where(some, part, 0) / torch.where(some, whole, 1)

    def combine(self, i: Tensor, u: Tensor, h: Tensor) -> Tensor:
        return self.ratio(i, u) - self.ratio(h - u, h)

    def giou(self, a: Tensor, b: Tensor) -> Tensor:
        inter = self.overlap(a, b)
        return self.combine(inter, self.area(a) + self.area(b) - inter, self.hull(a, b))

    def l1(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().sum(-1)

    # -- costs, of one image: logits [Q,C], boxes [Q,4] --------------------------------------------------------------
    def cost_l1(self, p: Tensor, t: Tensor) -> Tensor:
        return self.l1(p[:, None], t[None])

    def cost_giou(self, p: Tensor, t: Tensor) -> Tensor:
        return self.giou(self.corners(p)[:, None], self.target_corners(t)[None])

    def cost_class(self, logits: Tensor, target: dict, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def cost_weights(self) -> tuple[float, float, float]:
        return self.o.set_cost_class, self.o.set_cost_bbox, self.o.set_cost_giou

    def cost(self, logits: Tensor, boxes: Tensor, target: dict, mask: Tensor | None) -> Tensor:
        a, b, c = self.cost_weights()
        t = target["boxes"]
        return a * self.cost_class(logits, target, mask) + b * self.cost_l1(boxes, t) - c * self.cost_giou(boxes, t)

    def solve(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        q, t = linear_sum_assignment(cost.cpu().numpy())
        return torch.as_tensor(q, dtype=torch.int64), torch.as_tensor(t, dtype=torch.int64)

    def refuse_non_finite(self, logits: Tensor, boxes: Tensor) -> None:
        if not (torch.isfinite(logits).all() and torch.isfinite(boxes).all()):
            raise ValueError("pred_logits or pred_boxes are not finite")

    def match_image(self, logits: Tensor, boxes: Tensor, target: dict, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        none = torch.zeros(0, dtype=torch.int64)
        if len(target["boxes"]) == 0:
            return none, none
        self.refuse_non_finite(logits, boxes)
        return self.solve(self.cost(logits, boxes, target, mask))

    def match(self, layer: dict, targets: list[dict]) -> Pairs:
        mask = layer.get("text_mask")
        with torch.no_grad():
            return [
                self.match_image(
                    layer["pred_logits"][b].detach(),
                    layer["pred_boxes"][b].detach(),
                    t,
                    None if mask is None else mask[b],
                )
                for b, t in enumerate(targets)
            ]

    def matcher(self, outputs: dict, targets: list[dict]) -> Pairs:
        return self.match(self.up(outputs), self.clean(targets, outputs["pred_boxes"]))

    # -- losses, of one layer ----------------------------------------------------------------------------------------
    def where(self, indices: Pairs) -> tuple[Tensor, Tensor]:
        """Image and query of every matched pair."""
        if not indices:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(indices)]), torch.cat(
            [q for q, _ in indices]
        )

    def gather(self, key: str, targets: list[dict], indices: Pairs, like: Tensor) -> Tensor:
        """The target's `key` of every matched pair."""
        rows = [t[key][j] for t, (_, j) in zip(targets, indices, strict=False)]
        return torch.cat(rows) if rows else like.new_zeros(0, *like.shape[1:])

    def pair_l1(self, p: Tensor, t: Tensor) -> Tensor:
        return self.l1(p, t)

    def pair_giou(self, p: Tensor, t: Tensor) -> Tensor:
        return self.giou(self.corners(p), self.target_corners(t))

    def box_divisor(self, nb: float, indices: Pairs) -> float:
        return nb

    def sum_l1(self, pairs: Tensor) -> Tensor:
        return pairs.sum()

    def sum_giou(self, pairs: Tensor) -> Tensor:
        return (1 - pairs).sum()

    def loss_boxes(self, layer: dict, targets: list[dict], indices: Pairs, nb: float) -> dict[str, Tensor]:
        p = layer["pred_boxes"][self.where(indices)]
        t = self.gather("boxes", targets, indices, p)
        nb = self.box_divisor(nb, indices)
        return {
            "loss_bbox": self.sum_l1(self.pair_l1(p, t)) / nb,
            "loss_giou": self.sum_giou(self.pair_giou(p, t)) / nb,
        }

    def loss_labels(self, layer: dict, targets: list[dict], indices: Pairs, nb: float) -> dict[str, Tensor]:
        raise NotImplementedError

    def one_layer(self, layer: dict, targets: list[dict], nb: float, suffix: str) -> dict[str, Tensor]:
        indices = self.match(layer, targets)
        return self.losses_at(layer, targets, indices, nb, suffix)

    def losses_at(self, layer: dict, targets: list[dict], indices: Pairs, nb: float, suffix: str) -> dict[str, Tensor]:
        losses = {}
        if "labels" in self.o.losses:
            losses |= self.loss_labels(layer, targets, indices, nb)
        if "boxes" in self.o.losses:
            losses |= self.loss_boxes(layer, targets, indices, nb)
        return {key + suffix: value for key, value in losses.items()}

    # -- the call ----------------------------------------------------------------------------------------------------
    def number(self, outputs: dict, targets: list[dict]) -> float:
        return max(mean_over_ranks(sum(len(t["labels"]) for t in targets)), 1.0)

    def up(self, layer: dict) -> dict:
        """The layer with half precision widened."""
        wide = dict(layer)
        for key in ("pred_logits", "pred_boxes"):
            if wide[key].dtype in (torch.float16, torch.bfloat16):
                wide[key] = wide[key].float()
        return wide

    def clean(self, targets: list[dict], like: Tensor) -> list[dict]:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return [
            {**t, "labels": t["labels"].reshape(-1).long(), "boxes": t["boxes"].reshape(-1, 4).to(dtype)}
            for t in targets
        ]

    def channels(self, outputs: dict) -> int | None:
        return outputs["pred_logits"].shape[-1]

    def check(self, outputs: dict, targets: list[dict]) -> None:
        for key in ("pred_logits", "pred_boxes"):
            if key not in outputs:
                raise KeyError(f"outputs has no {key}")
        if not len(outputs["pred_logits"]) == len(outputs["pred_boxes"]) == len(targets):
            raise ValueError("pred_logits, pred_boxes and targets differ in their number of images")
        if outputs["pred_logits"].shape[1] != outputs["pred_boxes"].shape[1]:
            raise ValueError("pred_logits and pred_boxes differ in their number of queries")
        classes = self.channels(outputs)
        for t in targets:
            for key in ("labels", "boxes"):
                if key not in t:
                    raise KeyError(f"a target has no {key}")
            labels, boxes = t["labels"].reshape(-1), t["boxes"].reshape(-1, 4)
            if len(labels) != len(boxes):
                raise ValueError("labels and boxes differ in length")
            if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
                raise ValueError("labels out of range")
            if not torch.isfinite(boxes).all() or (boxes[:, 2:] < 0).any():
                raise ValueError("target boxes must be finite and of no negative size")

    def encoder_targets(self, targets: list[dict]) -> list[dict]:
        return targets

    def layers(self, outputs: dict, targets: list[dict]) -> Iterator[tuple[dict, str, list[dict]]]:
        yield {k: v for k, v in outputs.items() if k not in ("aux_outputs", "enc_outputs")}, "", targets
        for i, layer in enumerate(outputs.get("aux_outputs", [])):
            yield dict(layer), f"_{i}", targets
        if self.encoder and outputs.get("enc_outputs"):
            yield dict(outputs["enc_outputs"]), self.encoder, self.encoder_targets(targets)

    def with_mask(self, layer: dict, outputs: dict, suffix: str) -> dict:
        return layer

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        self.check(outputs, targets)
        targets = self.clean(targets, outputs["pred_boxes"])
        nb = self.number(outputs, targets)
        losses: dict[str, Tensor] = {}
        for layer, suffix, layer_targets in self.layers(outputs, targets):
            losses |= self.one_layer(self.with_mask(self.up(layer), outputs, suffix), layer_targets, nb, suffix)
        return losses


class Detr(Port):
    profile = "detr"

    def channels(self, outputs: dict) -> int | None:
        return outputs["pred_logits"].shape[-1] - 1

    def cost_probability(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def cost_class(self, logits: Tensor, target: dict, mask: Tensor | None) -> Tensor:
        return -self.cost_probability(logits)[:, target["labels"]]

    def background(self, logits: Tensor) -> int:
        return logits.shape[-1] - 1

    def target_classes(self, logits: Tensor, targets: list[dict], indices: Pairs) -> Tensor:
        classes = torch.full(logits.shape[:2], self.background(logits), dtype=torch.int64)
        classes[self.where(indices)] = self.gather("labels", targets, indices, classes.reshape(-1))
        return classes

    def class_weight(self, logits: Tensor) -> Tensor:
        weight = logits.new_ones(logits.shape[-1])
        weight[-1] = self.o.eos_coef
        return weight

    def nll(self, logits: Tensor, classes: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]

    def mean_nll(self, nll: Tensor, weight: Tensor, classes: Tensor, nb: float) -> Tensor:
        return (weight * nll).sum() / weight.sum() if weight.numel() else nll.sum()

    def loss_labels(self, layer: dict, targets: list[dict], indices: Pairs, nb: float) -> dict[str, Tensor]:
        logits = layer["pred_logits"]
        classes = self.target_classes(logits, targets, indices)
        weight = self.class_weight(logits)[classes]
        return {"loss_ce": self.mean_nll(self.nll(logits, classes), weight, classes, nb)}


class Deformable(Port):
    profile = "deformable-detr"
    encoder = "_enc"

    def encoder_targets(self, targets: list[dict]) -> list[dict]:
        return [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]

    def cost_alpha(self) -> float:
        return self.o.focal_alpha

    def cost_gamma(self) -> float:
        return self.o.focal_gamma

    def focal_cost(self, x: Tensor) -> Tensor:
        p, alpha, gamma = self.cost_p(x), self.cost_alpha(), self.cost_gamma()
        pos = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
        neg = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
        return pos - neg

    def cost_p(self, x: Tensor) -> Tensor:
        return x.sigmoid()

    def cost_class(self, logits: Tensor, target: dict, mask: Tensor | None) -> Tensor:
        return self.focal_cost(logits)[:, target["labels"]]

    def one_hot(self, logits: Tensor, targets: list[dict], indices: Pairs) -> Tensor:
        hot = torch.zeros_like(logits)
        image, query = self.where(indices)
        hot[image, query, self.gather("labels", targets, indices, image)] = 1
        return hot

    def alpha(self) -> float:
        return self.o.focal_alpha

    def gamma(self) -> float:
        return self.o.focal_gamma

    def modulation(self, miss: Tensor) -> Tensor:
        """`miss` is 1 − p_t; the clamp keeps the gradient finite for γ < 1."""
        return miss.clamp(min=1e-37) ** self.gamma()

    def bce(self, x: Tensor, hot: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, hot, reduction="none")

    def alpha_t(self, hot: Tensor) -> Tensor:
        return self.alpha() * hot + (1 - self.alpha()) * (1 - hot)

    def focal(self, x: Tensor, hot: Tensor) -> Tensor:
        return self.alpha_t(hot) * self.modulation(self.miss(x, hot)) * self.bce(x, hot)

    def miss(self, x: Tensor, hot: Tensor) -> Tensor:
        return (x * (1 - 2 * hot)).sigmoid()

    def sum_cells(self, cells: Tensor, indices: Pairs, layer: dict) -> Tensor:
        return cells.sum()

    def class_divisor(self, nb: float, indices: Pairs, layer: dict) -> float:
        return nb

    def loss_labels(self, layer: dict, targets: list[dict], indices: Pairs, nb: float) -> dict[str, Tensor]:
        logits = layer["pred_logits"]
        cells = self.focal(logits, self.one_hot(logits, targets, indices))
        return {"loss_ce": self.sum_cells(cells, indices, layer) / self.class_divisor(nb, indices, layer)}


class Grounding(Deformable):
    profile = "grounding-dino"

    def channels(self, outputs: dict) -> int | None:
        return None

    def check(self, outputs: dict, targets: list[dict]) -> None:
        super().check(outputs, targets)
        logits, mask = outputs["pred_logits"], outputs.get("text_mask")
        if mask is not None and (mask.shape[0] != logits.shape[0] or mask.shape[1] != logits.shape[2]):
            raise ValueError("text_mask and pred_logits differ in their number of images or tokens")
        for t in targets:
            if "token_labels" not in t:
                raise KeyError("a target has no token_labels")
            if len(t["token_labels"]) != len(t["labels"]):
                raise ValueError("token_labels and labels differ in length")
            if len(t["labels"]) and not (t["token_labels"] > 0).any(-1).all():
                raise ValueError("token_labels: a class has no token")

    def clean(self, targets: list[dict], like: Tensor) -> list[dict]:
        return [{**t, "token_labels": t["token_labels"].to(t["boxes"].dtype)} for t in super().clean(targets, like)]

    def encoder_targets(self, targets: list[dict]) -> list[dict]:
        return targets

    def refuse_non_finite(self, logits: Tensor, boxes: Tensor) -> None:
        if logits.isnan().any() or (logits == torch.inf).any() or not torch.isfinite(boxes).all():
            raise ValueError("pred_logits or pred_boxes are not finite")

    def cost_tokens(self, target: dict) -> Tensor:
        rows = target["token_labels"]
        return rows / rows.sum(-1, keepdim=True)

    def cost_class(self, logits: Tensor, target: dict, mask: Tensor | None) -> Tensor:
        return self.focal_cost(logits.clamp(min=-1e4)) @ self.cost_tokens(target).to(logits.dtype).T

    def one_hot(self, logits: Tensor, targets: list[dict], indices: Pairs) -> Tensor:
        hot = torch.zeros_like(logits)
        rows = self.gather("token_labels", targets, indices, logits.reshape(-1, logits.shape[-1]))
        hot[self.where(indices)] = rows.to(hot.dtype)
        return hot

    def with_mask(self, layer: dict, outputs: dict, suffix: str) -> dict:
        return {**layer, "text_mask": outputs.get("text_mask")}

    def valid(self, layer: dict) -> Tensor:
        logits, mask = layer["pred_logits"], layer.get("text_mask")
        if mask is None:
            return torch.ones_like(logits, dtype=torch.bool)
        return mask.bool()[:, None, :].expand_as(logits)

    def loss_labels(self, layer: dict, targets: list[dict], indices: Pairs, nb: float) -> dict[str, Tensor]:
        logits, valid = layer["pred_logits"], self.valid(layer)
        cells = self.focal(torch.where(valid, logits, 0), self.one_hot(logits, targets, indices))
        cells = torch.where(valid, cells, 0)
        return {"loss_ce": self.sum_cells(cells, indices, layer) / self.class_divisor(nb, indices, layer)}


def detr_factory(cls: type[Port]) -> Callable[..., Port]:
    def build_criterion(
        num_classes: int = 91,
        num_decoder_layers: int = 6,
        eos_coef: float = 0.1,
        set_cost_class: float = 1.0,
        set_cost_bbox: float = 5.0,
        set_cost_giou: float = 2.0,
        ce_loss_coef: float = 1.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        losses: tuple[str, ...] = ("labels", "boxes"),
    ) -> Port:
        return cls(**locals_without_cls(locals()), two_stage=False)

    return build_criterion


def deformable_factory(cls: type[Port]) -> Callable[..., Port]:
    def build_criterion(
        num_classes: int = 91,
        num_decoder_layers: int = 6,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        set_cost_class: float = 2.0,
        set_cost_bbox: float = 5.0,
        set_cost_giou: float = 2.0,
        ce_loss_coef: float = 2.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        losses: tuple[str, ...] = ("labels", "boxes"),
        two_stage: bool = True,
    ) -> Port:
        return cls(**locals_without_cls(locals()))

    return build_criterion


def grounding_factory(cls: type[Port]) -> Callable[..., Port]:
    def build_criterion(
        num_classes: int = 91,
        num_decoder_layers: int = 6,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        set_cost_class: float = 1.0,
        set_cost_bbox: float = 5.0,
        set_cost_giou: float = 2.0,
        ce_loss_coef: float = 2.0,
        bbox_loss_coef: float = 5.0,
        giou_loss_coef: float = 2.0,
        losses: tuple[str, ...] = ("labels", "boxes"),
        two_stage: bool = True,
    ) -> Port:
        return cls(**locals_without_cls(locals()))

    return build_criterion


def locals_without_cls(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "cls"}


FACTORIES = {"detr": detr_factory, "deformable-detr": deformable_factory, "grounding-dino": grounding_factory}
BASES = {"D": Detr, "F": Deformable, "G": Grounding}
ALL, SIGMOID = "DFG", "FG"


class Registry(list):
    """Collects the mistakes of one module; `add` derives a class a profile and names it in that module."""

    def __init__(self, module: dict) -> None:
        super().__init__()
        self.module = module

    def add(self, name: str, profiles: str, clause: str, sentence: str, **methods: Callable) -> None:
        """Profiles: letters of BASES. Clause: ids separated by blanks. Methods: what the mistake replaces."""
        for letter in profiles:
            base = BASES[letter]
            title = "".join(part.capitalize() for part in name.split("-")) + letter
            assert title not in self.module, title
            assert all(hasattr(base, m) or m.startswith("_") for m in methods), (name, methods)
            cls = type(title, (base,), {**methods, "__module__": self.module["__name__"], "__doc__": sentence})
            self.module[title] = cls  # so that its instances pickle
            factory = FACTORIES[base.profile](cls)
            self.append(Wrong(f"{base.profile}/{name}", base.profile, tuple(clause.split()), sentence, factory))


def both(one: Wrong, two: Wrong) -> Wrong | None:
    """A criterion with two mistakes; None where they replace the same method."""
    methods = [{k: v for k, v in vars(_class_of(w)).items() if not k.startswith("__")} for w in (one, two)]
    if methods[0].keys() & methods[1].keys():
        return None
    base = next(base for base in BASES.values() if base.profile == one.profile)
    cls = type("Both", (base,), {**methods[0], **methods[1]})
    names = " + ".join(w.id.split("/", 1)[1] for w in (one, two))
    sentence = f"{one.sentence} + {two.sentence}"
    return Wrong(f"{one.profile}/{names}", one.profile, one.clause + two.clause, sentence, FACTORIES[one.profile](cls))


def _class_of(wrong: Wrong) -> type[Port]:
    return next(cell.cell_contents for cell in wrong.factory.__closure__ or ())
