"""KEY, PURE, DEVICE: one call, its weights, and what surrounds it.

Formulas of the bundle in ``textbook``: each takes the book first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from detr_reference.formulas.records import Pairs, Result, Targets

if TYPE_CHECKING:
    from detr_reference.textbook import Textbook


def losses(
    book: Textbook,
    outputs: Mapping[str, Any],
    targets: Targets,
    given: Mapping[str, Sequence[Pairs]],
) -> Result:
    """All losses of one call. A layer named in ``given`` takes that matching instead of its own."""
    found: dict[str, Tensor] = {}
    matches: dict[str, list[Pairs]] = {}
    book.refuse(outputs, targets)
    targets = [book.taken(t) for t in targets]
    every = book.layers(outputs)
    nb = book.num_boxes(targets)
    for layer in every:
        own = book.layer_targets(layer, targets)
        pairs = list(given[layer.name]) if layer.name in given else book.layer_match(layer, every, own)
        matches[layer.name] = pairs
        divisor = book.layer_num_boxes(layer, nb, pairs)
        found |= book.layer_losses(layer, own, pairs, divisor, book.layer_mask(layer, outputs))
    found |= book.denoising_losses(outputs, targets, nb)
    return Result(book.scaled(found) | book.logged(every, targets, matches), matches)


def scaled(book: Textbook, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """KEY-5. The losses as they are, or by option with their weights (lyuwenyu/RT-DETR rtdetr_criterion.py)."""
    return {k: v * book.weights().get(k, 1.0) for k, v in found.items()} if book.o.weighted else found


def in_mode(book: Textbook, training: bool) -> Textbook:
    """PURE-4. The same formulas in training and in evaluation."""
    return book


def compiled(book: Textbook) -> Textbook:
    """PURE-5. The same formulas inside a function that the caller compiles."""
    return book


def state(book: Textbook) -> dict[str, Tensor]:
    """PURE-6. What the criterion keeps from call to call, as state_dict has it: nothing."""
    return {}


def copied(book: Textbook) -> Textbook:
    """PURE-6. The book of a copy of the criterion."""
    return book


def weights(book: Textbook) -> dict[str, float]:
    """KEY-4. The weight of every trained loss; a suffix keeps its base's weight. facebookresearch/detr detr.py:334."""
    o = book.o
    base = {"loss_ce": o.ce_loss_coef} if book.selected("labels") else {}
    base |= {"loss_bbox": o.bbox_loss_coef, "loss_giou": o.giou_loss_coef} if book.selected("boxes") else {}
    suffixes = ["", *(f"{o.aux_suffix}{i}" for i in range(o.num_decoder_layers - 1))]
    if o.has_encoder:
        suffixes.append(o.encoder_suffix)
    if o.denoising:
        suffixes += ["_dn", *(f"_dn_{i}" for i in range(o.num_decoder_layers - 1))]
    masks = {"loss_mask": o.mask_loss_coef, "loss_dice": o.dice_loss_coef} if "masks" in o.losses else {}
    return {key + suffix: weight for suffix in suffixes for key, weight in base.items()} | masks


def brought(book: Textbook, x: Tensor) -> Tensor:
    """DEVICE-1. An input where the book computes: on the CPU, in its own dtype."""
    return x.cpu()


def placed(book: Textbook, loss: Tensor, like: Tensor) -> Tensor:
    """DEVICE-2. A loss on the device of the outputs."""
    return loss.to(like.device)
