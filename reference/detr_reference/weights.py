"""The weight of each trained loss of each supervised layer."""

from __future__ import annotations

from .options import Options


def loss_weights(options: Options) -> dict[str, float]:
    """``weight_dict``: the total is Σ loss · weight over the keys of both (facebookresearch/detr engine.py:35).

    The final layer has bare keys, decoder layer i the suffix ``_{i}``, the encoder its own, and their denoising
    queries ``_dn`` and ``_dn_{i}``; a suffix keeps its base's weight. Six decoder layers and an encoder: 7 · 3 = 21
    keys, and 6 · 3 more with denoising. Masks are trained on the final layer only, so their keys have no suffix
    (facebookresearch/detr detr.py:334-351 adds suffixed ones that nothing uses).
    """
    base = {}
    if "labels" in options.losses:
        base["loss_ce"] = options.ce_loss_coef
    if "boxes" in options.losses:
        base |= {"loss_bbox": options.bbox_loss_coef, "loss_giou": options.giou_loss_coef}
    suffixes = ["", *(f"{options.aux_suffix}{i}" for i in range(options.num_decoder_layers - 1))]
    if options.has_encoder:
        suffixes.append(options.encoder_suffix)
    if options.denoising:
        suffixes += ["_dn", *(f"_dn_{i}" for i in range(options.num_decoder_layers - 1))]
    weights = {key + suffix: weight for suffix in suffixes for key, weight in base.items()}
    if "masks" in options.losses:
        weights |= {"loss_mask": options.mask_loss_coef, "loss_dice": options.dice_loss_coef}
    return weights
