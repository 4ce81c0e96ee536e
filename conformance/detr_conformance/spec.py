"""The specification page: every clause with its level, profiles, sources, checks and faults, from the registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from detr_conformance.registry import Check, Clause, Fault, checks, clauses, faults
from detr_reference.options import PROFILES, Options

CHAPTER_TITLES: Final = {
    "BOX": "geometry",
    "COST": "the matching cost",
    "MATCH": "the assignment",
    "CLS": "classification",
    "TOKEN": "text",
    "NORM": "normalisation",
    "LAYER": "auxiliary and encoder outputs",
    "MASK": "masks",
    "DN": "contrastive denoising",
    "KEY": "names, weights, total",
    "GRAD": "gradients",
    "NUM": "precision and extremes",
    "PURE": "side effects",
    "DEVICE": "accelerators",
    "DIST": "several ranks",
    "BAD": "refusals",
    "LEARN": "learning",
}
SHORT: Final = {"detr": "D", "deformable-detr": "F", "dino": "O", "grounding-dino": "G"}


def page() -> str:
    """docs/SPEC.md as it should be."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    all_clauses, all_checks, all_faults = clauses(), checks(), faults()
    yield "# The contract"
    yield ""
    yield "Made by `detr-conformance spec` from the declarations in `detr_conformance/contract`; do not edit."
    yield ""
    yield f"{len(all_clauses)} clauses, {len(all_checks)} checks, {len(all_faults)} known faults."
    yield ""
    yield "Symbols: B images, Q queries, K classes, T text tokens, n targets of an image, N of all, M matched pairs,"
    yield "nb the divisor, x logits, p = σ(x), λ weights of the matching cost, w weights of the losses. Profiles:"
    yield ", ".join(f"{letter} {name}" for name, letter in SHORT.items()) + "."
    yield ""
    yield from _options()
    for chapter, title in CHAPTER_TITLES.items():
        own = [c for c in all_clauses if c.id.split("-")[0] == chapter]
        if own:
            yield f"## {chapter} — {title}"
            yield ""
            for clause in sorted(own, key=_place):
                yield from _clause(clause, [c for c in all_checks if c.clause is clause], all_faults)


def _place(clause: Clause) -> tuple[bool, int]:
    """By number; a clause that has a word instead comes last."""
    word = clause.id.split("-")[1]
    return not word.isdigit(), int(word) if word.isdigit() else 0


def _options() -> Iterator[str]:
    yield "## Options"
    yield ""
    yield "Legitimate differences: a profile has these defaults, and a candidate may declare others."
    yield ""
    yield "| option | " + " | ".join(PROFILES) + " |"
    yield "|---" * (len(PROFILES) + 1) + "|"
    for name in Options.__dataclass_fields__:
        values = [getattr(options, name) for options in PROFILES.values()]
        yield f"| `{name}` | " + " | ".join(f"`{value!r}`" for value in values) + " |"
    yield ""


def _clause(clause: Clause, own: list[Check], all_faults: tuple[Fault, ...]) -> Iterator[str]:
    profiles = " ".join(letter for name, letter in SHORT.items() if name in clause.profiles)
    yield f"### {clause.id}"
    yield ""
    yield f"{clause.sentence}"
    yield ""
    yield f"*{clause.level}* · profiles {profiles}" + (
        f" · sources: {'; '.join(clause.sources)}" if clause.sources else ""
    )
    yield ""
    for check in own:
        yield f"- {check.name.replace('_', ' ')} — on {check.on.title} ({check.component})"
        for fault in all_faults:
            if fault.check is check:
                seen = "" if fault.seen_in == "plausible" else f" Seen in: {fault.seen_in}."
                yield f"  - fault `{fault.id}`: {fault.sentence}{seen}"
    yield ""
