"""Known mistakes of names, forms, weights and gradients, beside those in the chapters KEY and GRAD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from detr_conformance.contract.classification import an_image_without_targets_is_background
from detr_conformance.contract.gradients import (
    boxes_get_the_textbook_gradient,
    logged_quantities_carry_no_gradient,
    logits_get_the_textbook_gradient,
)
from detr_conformance.contract.keys import (
    denoising_losses_have_their_weights,
    every_trained_loss_has_its_weight,
    every_trained_loss_is_a_scalar_tensor,
    logged_quantities_have_no_weight_and_losses_are_unweighted,
    mask_losses_have_their_weights,
    the_keys_do_not_depend_on_the_targets,
    the_trained_losses_have_their_names,
)
from detr_conformance.contract.normalisation import class_losses_of_a_batch_add_up, loss_bbox_is_the_sum_of_l1_over_nb
from detr_conformance.contract.tokens import every_image_uses_its_own_prompt
from detr_conformance.denoised import DINO
from detr_conformance.registry import DETR, EVERY, FOCAL, TEXT, known
from detr_reference.options import options_of
from detr_reference.textbook import Textbook

ENCODER = FOCAL | TEXT
Losses = dict[str, Tensor]


def _losses(change: Callable[[Losses, Any], Losses]) -> dict[str, Any]:
    """The returned losses changed, from themselves and the targets."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        result = before(outputs, targets, given)
        return replace(result, losses=change(dict(result.losses), targets))

    return {"losses": losses}


def _trained(key: str) -> bool:
    return key.startswith(("loss_ce", "loss_bbox", "loss_giou"))


def _renamed(names: dict[str, str]) -> dict[str, Any]:
    def change(found: Losses, targets: Any) -> Losses:
        return {next((n + k[len(o) :] for o, n in names.items() if k.startswith(o)), k): v for k, v in found.items()}

    return _losses(change)


for name, sentence, names in (
    ("l1-loss-under-another-name", "The L1 loss has another name, such as loss_l1.", {"loss_bbox": "loss_l1"}),
    ("giou-loss-under-another-name", "The GIoU loss has another name, such as loss_iou.", {"loss_giou": "loss_iou"}),
    ("box-losses-exchanged", "loss_bbox and loss_giou change places.",
     {"loss_bbox": "loss_giou", "loss_giou": "loss_bbox"}),
    ("all-losses-under-other-names", "All losses have other names.",
     {"loss_ce": "loss_cls", "loss_bbox": "loss_l1", "loss_giou": "loss_iou"}),
):  # fmt: skip
    exchanged = name == "box-losses-exchanged"
    known(
        loss_bbox_is_the_sum_of_l1_over_nb if exchanged else the_trained_losses_have_their_names,
        name, sentence, fix="loss_ce, loss_bbox, loss_giou, or rename={…}", around=_renamed(names),
    )  # fmt: skip

for name, sentence, of in (
    ("class-loss-of-one-dimension", "The class losses are vectors of one number.", "loss_ce"),
    ("l1-loss-of-one-dimension", "The L1 losses are vectors of one number.", "loss_bbox"),
    ("giou-loss-of-one-dimension", "The GIoU losses are vectors of one number.", "loss_giou"),
    ("box-losses-of-one-dimension", "The box losses are vectors of one number.", ("loss_bbox", "loss_giou")),
    ("all-losses-of-one-dimension", "All losses are vectors of one number.", ("loss_ce", "loss_bbox", "loss_giou")),
):
    known(
        every_trained_loss_is_a_scalar_tensor, name, sentence, fix="sum over all dimensions",
        around=_losses(lambda x, t, of=of: {k: v[None] if k.startswith(of) else v for k, v in x.items()}),
    )  # fmt: skip


def _of_empty(change: Callable[[Losses], Losses]) -> dict[str, Any]:
    return _losses(lambda found, targets: found if any(len(t["boxes"]) for t in targets) else change(found))


for name, sentence, around in (
    ("no-losses-without-targets", "A batch without targets gets no losses at all.", _of_empty(lambda x: {})),
    ("no-class-loss-without-targets", "A batch without targets gets no class loss.",
     _of_empty(lambda x: {k: v for k, v in x.items() if not k.startswith("loss_ce")})),
    ("no-l1-without-targets", "A batch without targets gets no L1 loss.",
     _of_empty(lambda x: {k: v for k, v in x.items() if not k.startswith("loss_bbox")})),
    ("no-giou-without-targets", "A batch without targets gets no GIoU loss.",
     _of_empty(lambda x: {k: v for k, v in x.items() if not k.startswith("loss_giou")})),
    ("final-losses-alone-without-targets", "A batch without targets gets the final losses alone.",
     _of_empty(lambda x: {k: v for k, v in x.items() if not _trained(k) or k.count("_") == 1})),
    ("no-auxiliary-losses-without-targets", "A batch without targets gets no losses of auxiliary layers.",
     _of_empty(lambda x: {k: v for k, v in x.items() if not (_trained(k) and k[-1].isdigit())})),
    ("losses-of-zero-are-left-out", "A loss that is 0 is left out.",
     _losses(lambda x, t: {k: v for k, v in x.items() if float(v.detach()) or not _trained(k)})),
):  # fmt: skip
    known(
        the_keys_do_not_depend_on_the_targets, name, sentence, fix="the same keys with and without targets",
        around=around,
    )  # fmt: skip
known(
    the_keys_do_not_depend_on_the_targets, "no-encoder-losses-without-targets",
    "A batch without targets gets no losses of the encoder.", fix="the same keys with and without targets",
    profiles=ENCODER, around=_of_empty(lambda x: {k: v for k, v in x.items() if not k.endswith(("_enc", "_interm"))}),
)  # fmt: skip

# --- weights ---

Weights = dict[str, float]


def _weights(change: Callable[[Weights, Any], Weights]) -> dict[str, Any]:
    return {"weights": lambda before, book: change(dict(before()), book.o)}


def _suffix(key: str, o: Any) -> str:
    """ "" for the final layer, "enc", or the number of an auxiliary one."""
    end = "_".join(key.split("_")[2:])
    return "enc" if o.encoder_suffix and f"_{end}" == o.encoder_suffix else end


def _on(select: Callable[[str, str, Any], bool], value: Callable[[float], float | None]) -> dict[str, Any]:
    """Weights of the keys (term, suffix) that are selected replaced, or with None taken out."""

    def change(found: Weights, o: Any) -> Weights:
        new = {
            k: value(w) if _trained(k) and select(k.split("_")[1], _suffix(k, o), o) else w for k, w in found.items()
        }
        return {k: w for k, w in new.items() if w is not None}

    return _weights(change)


def _one_on(key: str, o: Any) -> str:
    end = _suffix(key, o)
    return f"{key[: -len(end)]}{int(end) + 1}" if end.isdigit() else key


def _is_aux(term: str, end: str, o: Any) -> bool:
    return end.isdigit()


def _is_enc(term: str, end: str, o: Any) -> bool:
    return end == "enc"


def _exchanged(found: Weights, o: Any) -> Weights:
    pair = {"loss_bbox": o.giou_loss_coef, "loss_giou": o.bbox_loss_coef}
    return {k: next((w for base, w in pair.items() if k.startswith(base)), v) for k, v in found.items()}


def _of_base(by_base: Callable[[Any], dict[str, float]]) -> dict[str, Any]:
    """Weights by term, whatever the suffix."""

    def change(found: Weights, o: Any) -> Weights:
        return {k: by_base(o).get("_".join(k.split("_")[:2]), w) for k, w in found.items()}

    return _weights(change)


def _family(o: Any) -> dict[str, float]:
    own = options_of({"softmax": "detr", "focal": "deformable-detr", "token": "grounding-dino"}[o.class_loss])
    return {"loss_ce": own.ce_loss_coef, "loss_bbox": own.bbox_loss_coef, "loss_giou": own.giou_loss_coef}


for name, sentence, around, profiles in (
    ("last-auxiliary-layer-without-a-weight", "The last auxiliary layer has no weight.",
     _on(lambda term, end, o: end == str(o.num_decoder_layers - 2), lambda w: None), EVERY),
    ("auxiliary-losses-without-a-weight", "Auxiliary losses have no weight, the others do.",
     _on(_is_aux, lambda w: None), ENCODER),
    ("encoder-losses-without-a-weight", "The encoder's losses have no weight.", _on(_is_enc, lambda w: None), ENCODER),
    ("auxiliary-losses-weigh-one", "Auxiliary losses weigh 1.", _on(_is_aux, lambda w: 1.0), EVERY),
    ("auxiliary-weights-halved", "Auxiliary losses have half the weight.", _on(_is_aux, lambda w: w / 2), EVERY),
    ("auxiliary-weights-shared", "Auxiliary weights are divided by the number of decoder layers.",
     _weights(lambda x, o: {k: w / o.num_decoder_layers if _suffix(k, o).isdigit() else w for k, w in x.items()}),
     EVERY),
    ("encoder-weights-halved", "The encoder's losses have half the weight.", _on(_is_enc, lambda w: w / 2), ENCODER),
    ("encoder-losses-weigh-one", "The encoder's losses weigh 1.", _on(_is_enc, lambda w: 1.0), ENCODER),
    ("encoder-box-losses-weigh-nothing", "The encoder's box losses weigh 0.",
     _on(lambda term, end, o: end == "enc" and term != "ce", lambda w: 0.0), ENCODER),
    ("auxiliary-class-losses-without-a-weight", "Auxiliary class losses have no weight.",
     _on(lambda term, end, o: end.isdigit() and term == "ce", lambda w: None), EVERY),
    ("giou-without-a-weight", "loss_giou has no weight in any layer.",
     _on(lambda term, end, o: term == "giou", lambda w: None), EVERY),
    ("l1-without-a-weight", "loss_bbox has no weight in any layer.",
     _on(lambda term, end, o: term == "bbox", lambda w: None), EVERY),
    ("class-loss-without-a-weight", "loss_ce has no weight in any layer.",
     _on(lambda term, end, o: term == "ce", lambda w: None), EVERY),
    ("box-weights-exchanged", "The weights of loss_bbox and loss_giou change places.", _weights(_exchanged), EVERY),
    ("giou-takes-the-weight-of-l1", "loss_giou takes loss_bbox's weight.",
     _of_base(lambda o: {"loss_giou": o.bbox_loss_coef}), EVERY),
    ("l1-takes-the-weight-of-giou", "loss_bbox takes loss_giou's weight.",
     _of_base(lambda o: {"loss_bbox": o.giou_loss_coef}), EVERY),
    ("class-loss-weighs-one", "loss_ce weighs 1, whatever is configured.", _of_base(lambda o: {"loss_ce": 1.0}), EVERY),
    ("class-loss-weighs-two", "loss_ce weighs 2, whatever is configured.", _of_base(lambda o: {"loss_ce": 2.0}), EVERY),
    ("loss-weights-are-fixed", "The weights are the family's, whatever is configured.", _of_base(_family), EVERY),
    ("loss-weights-are-the-costs", "The weights are those of the matching cost.",
     _of_base(lambda o: {"loss_ce": o.set_cost_class, "loss_bbox": o.set_cost_bbox, "loss_giou": o.set_cost_giou}),
     EVERY),
    ("loss-weights-are-whole-numbers", "Weights are cut to whole numbers.",
     _weights(lambda x, o: {k: float(int(w)) for k, w in x.items()}), EVERY),
    ("loss-weights-are-all-one", "All weights are 1.", _weights(lambda x, o: dict.fromkeys(x, 1.0)), EVERY),
):  # fmt: skip
    known(
        every_trained_loss_has_its_weight, name, sentence, fix="the configured weight of its base for every suffix",
        profiles=profiles, around=around,
    )  # fmt: skip


# the slips of a weight, one by one: of a kind of layers, a term, and what becomes of it

KINDS = {  # whose losses, by suffix, and where there are some
    "": ("every layer", lambda end: True, EVERY),
    "final-": ("the final layer", lambda end: end == "", EVERY),
    "auxiliary-": ("auxiliary layers", str.isdigit, EVERY),
    "encoder-": ("the encoder", lambda end: end == "enc", ENCODER),
    "denoising-": ("final denoising queries", lambda end: end == "dn", DINO),
    "auxiliary-denoising-": ("auxiliary denoising queries", lambda end: end.startswith("dn_"), DINO),
}
NAMES = {"ce": "class-loss", "bbox": "l1", "giou": "giou"}
THERE = frozenset(  # said above, or in the chapter, in words of their own
    {"giou-takes-the-weight-of-l1", "l1-takes-the-weight-of-giou", "giou-without-a-weight", "l1-without-a-weight"}
    | {"class-loss-without-a-weight", "auxiliary-class-loss-without-a-weight"}
)


def _slip(kind: str, term: str, other: str | None, value: float | None) -> dict[str, Any]:
    """Weights of a kind's term replaced by another term's, by a number, or taken out."""
    mine = KINDS[kind][1]

    def change(found: Weights, o: Any) -> Weights:
        own = [k for k in found if k.startswith(f"loss_{term}") and mine(_suffix(k, o))]
        new = {k: getattr(o, f"{other}_loss_coef") if other else value for k in own}
        return {k: w for k, w in (found | new).items() if w is not None}

    return _weights(change)


for kind, (whose, _, profiles) in KINDS.items():
    for term, name in NAMES.items():
        slips: list[tuple[str, str, str | None, float | None]]
        slips = [(f"{kind}{name}-without-a-weight", f"loss_{term} of {whose} has no weight.", None, None)]
        slips += [(f"{kind}{name}-weighs-nothing", f"loss_{term} of {whose} weighs 0.", None, 0.0)]
        for o in (t for t in NAMES if t != term):
            id = f"{kind}{name}-takes-the-weight-of-{NAMES[o]}"
            slips += [(id, f"loss_{term} of {whose} takes loss_{o}'s weight.", o, None)]
        for id, sentence, other, number in slips:
            if id in THERE:
                continue
            alike = other == "ce" or (term, other) == ("ce", "giou")  # loss_giou has that weight in other profiles
            known(
                denoising_losses_have_their_weights if profiles is DINO else every_trained_loss_has_its_weight,
                id, sentence, fix="the configured weight of its base for every suffix",
                profiles=profiles & frozenset({"detr", "dino"}) if alike else profiles,
                around=_slip(kind, term, other, number),
            )  # fmt: skip


def _of_kind(kind: str, change: Callable[[float], float | None]) -> dict[str, Any]:
    mine = KINDS[kind][1]
    return _on(lambda term, end, o: bool(mine(end)), change)


for id, sentence, around, profiles in (
    ("final-losses-without-a-weight", "The final layer's losses have no weight, the others do.",
     _of_kind("final-", lambda w: None), EVERY),
    ("auxiliary-losses-weigh-nothing", "Auxiliary losses weigh 0.", _of_kind("auxiliary-", lambda w: 0.0), EVERY),
    ("encoder-losses-weigh-nothing", "The encoder's losses weigh 0.", _of_kind("encoder-", lambda w: 0.0), ENCODER),
    ("first-auxiliary-layer-without-a-weight", "The first auxiliary layer has no weight.",
     _on(lambda term, end, o: end == "0", lambda w: None), EVERY),
    ("auxiliary-weights-count-from-one", "Weights of auxiliary layers count from 1.",
     _weights(lambda x, o: {_one_on(k, o): w for k, w in x.items()}), EVERY),
    ("auxiliary-box-weights-exchanged", "The weights of loss_bbox and loss_giou change places in auxiliary layers.",
     _weights(lambda x, o: x | {k: w for k, w in _exchanged(x, o).items() if _suffix(k, o).isdigit()}), EVERY),
    ("encoder-box-weights-exchanged", "The weights of loss_bbox and loss_giou change places in the encoder.",
     _weights(lambda x, o: x | {k: w for k, w in _exchanged(x, o).items() if _suffix(k, o) == "enc"}), ENCODER),
    ("final-box-weights-exchanged", "The weights of loss_bbox and loss_giou change places in the final layer.",
     _weights(lambda x, o: x | {k: w for k, w in _exchanged(x, o).items() if _suffix(k, o) == ""}), EVERY),
):  # fmt: skip
    known(
        every_trained_loss_has_its_weight, id, sentence, fix="the configured weight of its base for every suffix",
        profiles=profiles, around=around,
    )  # fmt: skip

for id, sentence, around in (
    ("final-denoising-losses-without-a-weight", "The final layer's denoising losses alone have no weight.",
     _of_kind("denoising-", lambda w: None)),
    ("auxiliary-denoising-losses-without-a-weight", "Auxiliary denoising losses have no weight, the final ones do.",
     _of_kind("auxiliary-denoising-", lambda w: None)),
    ("denoising-losses-weigh-nothing", "Denoising losses weigh 0.",
     _on(lambda term, end, o: end.startswith("dn"), lambda w: 0.0)),
    ("denoising-box-weights-exchanged", "The weights of loss_bbox and loss_giou change places in denoising queries.",
     _weights(lambda x, o: x | {k: w for k, w in _exchanged(x, o).items() if "_dn" in k})),
    ("last-auxiliary-denoising-layer-without-a-weight", "The last auxiliary layer's denoising losses have no weight.",
     _on(lambda term, end, o: end == f"dn_{o.num_decoder_layers - 2}", lambda w: None)),
):  # fmt: skip
    known(denoising_losses_have_their_weights, id, sentence, fix="weigh denoising queries as the others", around=around)

for term, name in (("mask", "loss_mask"), ("dice", "loss_dice")):
    for id, sentence, value in (
        (f"{term}-loss-without-a-weight", f"{name} alone has no weight.", None),
        (f"{term}-loss-weighs-nothing", f"{name} weighs 0.", 0.0),
        (f"{term}-loss-weighs-one", f"{name} weighs 1, whatever is configured.", 1.0),
    ):
        known(
            mask_losses_have_their_weights, id, sentence, fix="add loss_mask and loss_dice to weight_dict",
            around=_weights(lambda x, o, name=name, value=value: {
                k: w for k, w in (x | ({name: value} if name in x else {})).items() if w is not None}),
        )  # fmt: skip

for id, sentence, around in (
    ("mask-weights-exchanged", "The weights of loss_mask and loss_dice change places.",
     _weights(lambda x, o: x | {k: w for k, w in (("loss_mask", o.dice_loss_coef), ("loss_dice", o.mask_loss_coef))
                                if k in x})),
    ("dice-takes-the-weight-of-the-mask-loss", "loss_dice takes loss_mask's weight.",
     _weights(lambda x, o: x | ({"loss_dice": o.mask_loss_coef} if "loss_dice" in x else {}))),
    ("mask-loss-takes-the-weight-of-dice", "loss_mask takes loss_dice's weight.",
     _weights(lambda x, o: x | ({"loss_mask": o.dice_loss_coef} if "loss_mask" in x else {}))),
):  # fmt: skip
    known(
        mask_losses_have_their_weights, id, sentence, fix="mask_loss_coef for loss_mask, dice_loss_coef for loss_dice",
        around=around,
    )  # fmt: skip

for name, profiles in (("class_error", DETR | FOCAL), ("cardinality_error", EVERY)):
    known(
        logged_quantities_have_no_weight_and_losses_are_unweighted, f"{name.replace('_', '-')}-with-a-weight",
        f"{name} has a weight, and counts in the total.", fix="weights for trained losses only", profiles=profiles,
        around=_weights(lambda x, o, name=name: x | {name: 1.0}),
    )  # fmt: skip


def _logged_weight(before: Callable[..., Any], book: Textbook) -> Weights:
    return before() | {"logged_value": 1.0}  # type: ignore[no-any-return]


known(
    logged_quantities_have_no_weight_and_losses_are_unweighted, "logged-value-with-a-weight",
    "A logged quantity has a weight, and counts in the total.", fix="weights for trained losses only",
    around={"weights": _logged_weight}
    | _losses(lambda x, t: x | {"logged_value": x["loss_bbox"].detach() + 1}),
)  # fmt: skip
known(
    logged_quantities_carry_no_gradient, "logged-class-value-with-gradient",
    "A logged quantity of the class scores keeps its graph.", fix="compute it under torch.no_grad()",
    around=_losses(lambda x, t: x | {"logged_value": 0.1 * x["loss_ce"]}),
)  # fmt: skip

# --- gradients ---

for check, name, sentence, change in (
    (boxes_get_the_textbook_gradient, "no-gradient-at-all", "Losses are computed without a graph.",
     lambda k, v: v.detach()),
    (boxes_get_the_textbook_gradient, "box-losses-without-gradient-of-any-layer",
     "The box losses of all layers are constants.", lambda k, v: v if k.startswith("loss_ce") else v.detach()),
    (boxes_get_the_textbook_gradient, "box-gradients-reversed",
     "The box losses have the right value and the opposite gradient.",
     lambda k, v: v if k.startswith("loss_ce") else 2 * v.detach() - v),
    (logits_get_the_textbook_gradient, "class-gradients-reversed",
     "The class losses have the right value and the opposite gradient.",
     lambda k, v: 2 * v.detach() - v if k.startswith("loss_ce") else v),
    (boxes_get_the_textbook_gradient, "box-gradients-halved",
     "The box losses have the right value and half the gradient.",
     lambda k, v: v if k.startswith("loss_ce") else (v + v.detach()) / 2),
):  # fmt: skip
    known(
        check, name, sentence, fix="no_grad and detach around the matching and the logging alone",
        around=_losses(lambda x, t, change=change: {k: change(k, v) if _trained(k) else v for k, v in x.items()}),
    )  # fmt: skip


def _pulling(read: str) -> Callable[..., Any]:
    """A layer's losses, with a gradient to what they do not read."""

    def losses(before: Callable[..., Any], book: Textbook, layer: Any, *rest: Any) -> Any:
        other = layer.boxes.sum() if read == "loss_ce" else layer.logits.sigmoid().sum()
        found = before(layer, *rest)
        return {k: v + 0.1 * (other - other.detach()) if k.startswith(read) else v for k, v in found.items()}

    return losses


for check, name, sentence, read in (
    (boxes_get_the_textbook_gradient, "class-loss-moves-boxes",
     "The class loss has the right value, and a gradient to the boxes.", "loss_ce"),
    (logits_get_the_textbook_gradient, "box-loss-moves-logits",
     "The L1 loss has the right value, and a gradient to the logits.", "loss_bbox"),
):  # fmt: skip
    known(check, name, sentence, fix="detach what only weighs a loss", around={"layer_losses": _pulling(read)})


def _dropped(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
    """Images without targets are no part of the batch."""
    full = [b for b, t in enumerate(targets) if len(t["boxes"])]
    if len(full) == len(targets) or not full:
        return before(outputs, targets, given)
    some = {layer: [pairs[b] for b in full] for layer, pairs in given.items()}
    return before(_images(outputs, full, len(targets)), [targets[b] for b in full], some)


def _images(value: Any, keep: list[int], size: int) -> Any:
    if isinstance(value, Tensor):
        return value[keep] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {k: _images(v, keep, size) for k, v in value.items()}
    return [_images(v, keep, size) for v in value] if isinstance(value, list) else value


for check, suffix, profiles in (
    (an_image_without_targets_is_background, "", DETR),
    (class_losses_of_a_batch_add_up, "-by-the-focal-loss", FOCAL),
    (every_image_uses_its_own_prompt, "-with-their-prompt", TEXT),
):
    known(
        check, f"images-without-targets-are-dropped{suffix}", "Images without targets are dropped from the batch.",
        fix="keep every image: its queries are background", profiles=profiles, around={"losses": _dropped},
    )  # fmt: skip
