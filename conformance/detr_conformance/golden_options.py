"""Which values of which options have golden cases of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from detr_conformance.masked import MASKED
from detr_reference.options import PROFILES

FOCAL: Final = ("focal", "token")
SOFTMAX: Final = ("softmax",)
EVERY: Final = (*SOFTMAX, *FOCAL)


@dataclass(frozen=True)
class Setting:
    """One option at one value. ``of``: the class losses that have the option · ``beside``: what the case needs."""

    name: str
    value: Any
    of: tuple[str, ...] = EVERY
    beside: str = ""

    def changes(self, profile: str) -> bool:
        """True where a profile can have the value, and does not have it already."""
        options = PROFILES[profile]
        if self.beside == "masks" and profile not in MASKED:
            return False
        if self.beside == "encoder" and not options.has_encoder:
            return False
        return options.class_loss in self.of and getattr(options, self.name) != self.value


OPTIONS: Final = (
    Setting("eos_coef", 0.5, SOFTMAX),
    Setting("eos_coef", 1.0, SOFTMAX),
    Setting("focal_alpha", 0.6, FOCAL),
    Setting("focal_gamma", 1.0, FOCAL),
    Setting("focal_gamma", 0.0, FOCAL),
    Setting("focal_alpha_matcher", 0.6, FOCAL),
    Setting("focal_gamma_matcher", 1.0, FOCAL),
    *(Setting(f"set_cost_{term}", value) for term in ("class", "bbox", "giou") for value in (0.0, 3.0)),
    Setting("ce_loss_coef", 3.0),
    Setting("bbox_loss_coef", 4.0),
    Setting("giou_loss_coef", 1.5),
    Setting("mask_loss_coef", 2.0, beside="masks"),
    Setting("dice_loss_coef", 5.0, beside="masks"),
    Setting("giou_eps", 0.0),
    Setting("giou_eps", 1e-6),
    Setting("class_divisor", "boxes", FOCAL),
    Setting("class_divisor", "matches", FOCAL),
    *(Setting("encoder_key", key, FOCAL, "encoder") for key in ("", "enc_outputs", "interm_outputs")),
    *(Setting("encoder_suffix", suffix, FOCAL, "encoder") for suffix in ("_enc", "_interm")),
    *(Setting("encoder_targets", kind, ("focal",), "encoder") for kind in ("real", "class-zero")),
    Setting("two_stage", False, FOCAL, "encoder"),
    Setting("aux_suffix", "_aux_", beside="aux"),
    Setting("weighted", True, beside="aux"),
    Setting("losses", ("labels",)),
    Setting("losses", ("boxes",)),
    Setting("losses", ("labels", "boxes")),
    Setting("losses", ("labels", "boxes", "masks"), beside="masks"),
)
