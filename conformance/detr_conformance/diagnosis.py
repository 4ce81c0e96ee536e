"""Which known fault a wrong criterion looks like, computed from its own numbers.

A fault is a textbook with one formula replaced, so it can be called like any candidate. Where it differs from the
right textbook is its footprint: some losses, gradients or weights. It fits when the candidate's numbers equal the
fault's everywhere in that footprint, on every input tried, and at least SEPARATE inputs tell the fault from the right
textbook. So a criterion with two mistakes in different terms gets both named, and one that no fault explains, none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.budget import budget
from detr_conformance.candidate import Bound, bind
from detr_conformance.cases import MASK_TERMS, Case
from detr_conformance.findings import Diagnosis
from detr_conformance.observation import Observation, observe
from detr_conformance.registry import Check, Fault, faults
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS
from detr_reference.textbook import TERMS, Textbook, textbook

SEPARATE: Final = 3
SECONDS: Final = 1.0
CLOSE: Final = 256 * EPS  # relative: two right float32 criterions, sums of some dozens of terms

MATCHING: Final = frozenset({"matching", "matching costs"})

Atoms = Mapping[tuple[str, ...], Any]


def diagnose(bound: Bound, check: Check, cases: Sequence[Case]) -> Diagnosis | None:
    """The faults that fit what the candidate returns for ``cases``, on all of which ``check`` fails; None where none
    does, where more than two do, or where too few cases tell."""
    if len(cases) < SEPARATE:
        return None
    if check.on.numbers:
        cases = cases[:SEPARATE]  # each of these takes more than one call
    spent = budget(SECONDS)
    terms = _terms(bound, check, cases)
    seen = [_numbers(check, bound, case, terms) for case in cases]
    right = _right(check, bound, cases, terms)
    fitting = []
    for fault in _related(check, bound.profile):
        if spent():
            return None  # not all were tried, so none can be told apart
        if _fits(fault, check, bound, cases, terms, seen, right) and _breaks(fault, check, bound, cases[0]):
            fitting.append(fault)
    if not 1 <= len(fitting) <= 2:
        return None
    seen_in, fix = fitting[0].seen_in, fitting[0].fix
    advice = " · ".join([f"seen in {seen_in}"] * (seen_in != "plausible") + [f"usual fix: {fix}"])
    return Diagnosis(tuple((f.id, f.sentence) for f in fitting), len(cases), len(cases), advice)


def _terms(bound: Bound, check: Check, cases: Sequence[Case]) -> frozenset[str]:
    """The terms whose numbers count. For the matching, those that are right at the candidate's own matching: a term
    that is wrong itself would hide which matching it was."""
    if check.component not in MATCHING:
        return frozenset((*TERMS, *MASK_TERMS))
    wrong = {t for case in cases for t in TERMS if not Seen(bound, case, observe(bound, case)).agrees(t, "final")}
    return frozenset(TERMS) - wrong or frozenset(TERMS)


def _right(check: Check, bound: Bound, cases: Sequence[Case], terms: frozenset[str]) -> list[Atoms]:
    book = _bound(textbook, bound)
    return [_numbers(check, book, case, terms) for case in cases]


def _bound(book: Textbook, bound: Bound) -> Bound:
    """A book as a candidate, called as the candidate is called."""
    return replace(bind(candidate_of(book, bound.profile)), device=bound.device)


def _fits(
    fault: Fault,
    check: Check,
    bound: Bound,
    cases: Sequence[Case],
    terms: frozenset[str],
    seen: list[Atoms],
    right: list[Atoms],
) -> bool:
    """True where the candidate equals the fault in all of its footprint, and enough cases show a footprint."""
    book = _bound(fault.apply(textbook), bound)
    wrong: list[Atoms] = []
    footprint: set[tuple[str, ...]] = set()
    separate = 0
    for case, theirs, ours in zip(cases, seen, right, strict=True):
        wrong.append(_numbers(check, book, case, terms))
        known = {a for a in {*wrong[-1], *ours} if a in theirs or not _is_log(a)}  # logging is up to the candidate
        own = {a for a in known if not _equal(wrong[-1].get(a), ours.get(a))}
        if not all(_equal(theirs.get(a), wrong[-1].get(a)) for a in own):
            return False
        footprint |= own
        separate += bool(own)
    everywhere = all(_equal(s.get(a), w.get(a)) for s, w in zip(seen, wrong, strict=True) for a in footprint)
    return separate >= SEPARATE and everywhere


def _breaks(fault: Fault, check: Check, bound: Bound, case: Case) -> bool:
    """True where the fault fails the check on a case that the candidate fails it on."""
    book = _bound(fault.apply(textbook), bound)
    return any(not comparison.ok for comparison in check.judge(check.on.observe(book, case)))


def _related(check: Check, profile: str) -> list[Fault]:
    """The faults of the profile that could show in this check, those of its own clause first."""
    chapter = check.clause.id.split("-")[0]
    own = [
        f
        for f in faults(profile)
        if f.check.on.numbers is check.on.numbers
        and (
            f.check.component == check.component
            or f.check.clause.id.split("-")[0] == chapter
            or {f.check.component, check.component} <= MATCHING
        )
    ]
    return sorted(own, key=lambda f: (f.check is not check, f.check.clause is not check.clause))


def _numbers(check: Check, bound: Bound, case: Case, terms: frozenset[str]) -> Atoms:
    """What tells faults apart: what the check's experiment says that does, else every number of one call."""
    return check.on.numbers(bound, case) if check.on.numbers else _atoms(observe(bound, case), terms)


def _atoms(observation: Observation, terms: frozenset[str]) -> Atoms:
    """Every number of an observation by its name: losses, gradients, weights."""
    found: dict[tuple[str, ...], Any] = {
        ("loss", k): v for k, v in observation.losses.items() if not k.startswith("loss") or k.split("_")[1] in terms
    }
    for (term, layer), grads in observation.grads.items():
        if term.split("_")[0] in terms:
            names = ("logits", "boxes", "masks")[: len(grads)]
            found |= {("grad", term, layer, name): g for name, g in zip(names, grads, strict=True)}
    weights = observation.weights or {}
    return found | {("weight", k): v for k, v in weights.items() if k in observation.losses}


def _is_log(atom: tuple[str, ...]) -> bool:
    return atom[0] == "loss" and not atom[1].startswith("loss")


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is None and other is None
    if isinstance(one, Tensor):
        if one.shape != other.shape:
            return False
        one, other = one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0)
        scale = float(torch.maximum(one.abs().max(), other.abs().max())) if one.numel() else 0.0
        return bool(((one - other).abs() <= 64 * CLOSE * scale + 1e-12).all())
    a, b = float(one), float(other)
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= CLOSE * max(abs(a), abs(b)) + 1e-9
