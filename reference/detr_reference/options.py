"""What legitimately differs between published criterions: one frozen record of options, and each family's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final


@dataclass(frozen=True)
class Options:
    """The options of one criterion. The defaults are those of facebookresearch/detr (main.py:67-79).

    ``class_loss``
        ``softmax``: cross-entropy over K + 1 channels · ``focal``: sigmoid focal loss over K channels ·
        ``token``: sigmoid focal loss over T text tokens.
    ``class_divisor``
        what the class loss is divided by: ``weights`` Σ of class weights · ``boxes`` nb · ``matches`` the layer's
        own matched pairs (Open-GroundingDino).
    ``encoder_key``, ``encoder_suffix``, ``encoder_targets``
        where encoder outputs stand in ``outputs``, what their losses are called, and whether their class is the
        target's own (``real``) or class 0 (``class-zero``, Deformable-DETR). ``encoder_key=""``: there are none.
    ``focal_alpha_matcher``, ``focal_gamma_matcher``
        α and γ of the matching cost where they do not follow the loss (None: they follow).
    ``denoising``
        ``outputs["dn_meta"]`` holds denoising queries in DINO's form (see ``denoising``): they get losses and weights
        of their own, ``_dn`` and ``_dn_{i}``. Without this option ``dn_meta`` is not read.
    ``losses``
        what is computed: ``labels`` · ``boxes`` · ``masks`` (loss_mask and loss_dice of the final layer, see
        ``masks``) · ``cardinality`` (for the log).
    """

    num_classes: int = 91
    num_decoder_layers: int = 6
    class_loss: str = "softmax"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    focal_alpha_matcher: float | None = None
    focal_gamma_matcher: float | None = None
    eos_coef: float = 0.1
    set_cost_class: float = 1.0
    set_cost_bbox: float = 5.0
    set_cost_giou: float = 2.0
    ce_loss_coef: float = 1.0
    bbox_loss_coef: float = 5.0
    giou_loss_coef: float = 2.0
    mask_loss_coef: float = 1.0
    dice_loss_coef: float = 1.0
    giou_eps: float = 0.0
    class_divisor: str = "weights"
    encoder_key: str = ""
    encoder_suffix: str = "_enc"
    encoder_targets: str = "real"
    aux_suffix: str = "_"
    weighted: bool = False
    two_stage: bool = True
    denoising: bool = False
    losses: tuple[str, ...] = ("labels", "boxes", "cardinality")

    @property
    def cost_alpha(self) -> float:
        """α of the matching cost."""
        return self.focal_alpha if self.focal_alpha_matcher is None else self.focal_alpha_matcher

    @property
    def cost_gamma(self) -> float:
        """γ of the matching cost."""
        return self.focal_gamma if self.focal_gamma_matcher is None else self.focal_gamma_matcher

    @property
    def channels(self) -> int:
        """Number of class channels of a softmax or focal criterion: K + 1 or K."""
        return self.num_classes + (self.class_loss == "softmax")

    @property
    def has_encoder(self) -> bool:
        """True where encoder outputs are supervised."""
        return bool(self.encoder_key) and self.two_stage

    def with_(self, **changes: Any) -> Options:
        """A copy with some options changed. Raises ValueError that names an unknown option or value."""
        for name in changes:
            if name not in self.__dataclass_fields__:
                raise ValueError(f"unknown option {name!r}; the options are {', '.join(self.__dataclass_fields__)}")
        if "losses" in changes:
            changes["losses"] = tuple(changes["losses"])
        new = replace(self, **changes)
        for name, allowed in CHOICES.items():
            if getattr(new, name) not in allowed:
                raise ValueError(f"{name}={getattr(new, name)!r}; it must be one of {', '.join(map(repr, allowed))}")
        if (new.class_loss, new.encoder_targets) == ("token", "class-zero"):
            raise ValueError("encoder_targets='class-zero' needs classes; with class_loss='token' it must be 'real'")
        return new


CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "class_loss": ("softmax", "focal", "token"),
    "class_divisor": ("weights", "boxes", "matches"),
    "encoder_key": ("", "enc_outputs", "interm_outputs"),
    "encoder_targets": ("real", "class-zero"),
}

_DETR = Options()
_DEFORMABLE = _DETR.with_(
    class_loss="focal",
    class_divisor="boxes",
    set_cost_class=2.0,
    ce_loss_coef=2.0,
    encoder_key="enc_outputs",
    encoder_targets="class-zero",
)

PROFILES: Final[Mapping[str, Options]] = {
    # facebookresearch/detr main.py:63-79
    "detr": _DETR,
    # fundamentalvision/Deformable-DETR main.py:92-106
    "deformable-detr": _DEFORMABLE,
    # IDEA-Research/DINO config/DINO/DINO_4scale.py:76-87
    "dino": _DEFORMABLE.with_(
        ce_loss_coef=1.0,
        giou_eps=1e-6,
        encoder_key="interm_outputs",
        encoder_suffix="_interm",
        encoder_targets="real",
    ),
    # Grounding DINO, Table 8; encoder outputs and divisor as in transformers loss_grounding_dino.py
    "grounding-dino": _DEFORMABLE.with_(
        class_loss="token",
        set_cost_class=1.0,
        encoder_targets="real",
    ),
}


def options_of(profile: str) -> Options:
    """The default options of a profile. Raises ValueError that lists the profiles."""
    try:
        return PROFILES[profile]
    except KeyError:
        raise ValueError(f"unknown profile {profile!r}; the profiles are {', '.join(PROFILES)}") from None
