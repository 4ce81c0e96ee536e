"""The weight of each trained loss of each supervised layer."""

from __future__ import annotations

from .options import Options


def loss_weights(options: Options) -> dict[str, float]:
    """``weight_dict``: the total is Σ loss · weight over the keys of both (facebookresearch/detr engine.py:35).

    The final layer has bare keys, decoder layer i the suffix ``_{i}``, the encoder its own; a suffix keeps its
    base's weight. Six decoder layers and an encoder: 7 · 3 = 21 keys.
    """
    base = {}
    if "labels" in options.losses:
        base["loss_ce"] = options.ce_loss_coef
    if "boxes" in options.losses:
        base |= {"loss_bbox": options.bbox_loss_coef, "loss_giou": options.giou_loss_coef}
    suffixes = ["", *(f"{options.aux_suffix}{i}" for i in range(options.num_decoder_layers - 1))]
    if options.has_encoder:
        suffixes.append(options.encoder_suffix)
    return {key + suffix: weight for suffix in suffixes for key, weight in base.items()}
