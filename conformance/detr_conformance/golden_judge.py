"""A candidate judged on the golden cases: one call a case, every number beside the stored one.

Where several matchings are as good, or differ by less than float32 tells, a candidate may take another one than the
stored; then its numbers are held against the textbook at its own matching.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from detr_conformance import tolerance
from detr_conformance.candidate import Bound
from detr_conformance.cases import Case
from detr_conformance.contract import denoising, gradients, masks
from detr_conformance.contract.compare import number
from detr_conformance.errors import ConformanceError
from detr_conformance.golden import case_of, right
from detr_conformance.isolation import Worker
from detr_conformance.observation import Observation, observe
from detr_conformance.runner import Settings
from detr_conformance.seen import Seen
from detr_conformance.tolerance import EPS, OPS
from detr_fixtures import golden
from detr_fixtures.expected import KNOWN, TERMS
from detr_fixtures.golden import Golden
from detr_reference.options import Options

PASS, FAIL, UNSUITED = "pass", "fail", "unsuited"
_ALIKE: Final = ("aux_suffix", "encoder_suffix", "encoder_key", "weighted")  # the same numbers under other names
_VALUES: Final = ("set_cost_class", "set_cost_bbox", "set_cost_giou", "giou_eps", "class_divisor")
_PLACE: Final = {"pred_logits": 0, "pred_boxes": 1, "pred_masks": 2}


@dataclass(frozen=True)
class Outcome:
    """What a candidate does on one case: pass, fail, or unsuited, where it cannot be given the case's options.

    ``problems``: what is wrong, or why it is unsuited · ``raised``: it came to no numbers.
    """

    name: str
    verdict: str
    problems: tuple[str, ...] = ()
    raised: bool = False


def judged(bound: Bound, one: Golden, eps: float = EPS, case: Case | None = None) -> Outcome:
    """One case. ``eps``: that of the precision that it is computed in; ``case``: the inputs in another precision."""
    case = case_of(one) if case is None else case
    case, reasons = fitted(case, bound)
    if reasons:
        return Outcome(one.name, UNSUITED, (f"the candidate cannot be given {', '.join(reasons)}",))
    got = observe(bound, case)
    if got.raised:
        return Outcome(one.name, FAIL, (f"it raises {got.raised}",), raised=True)
    problems = tuple(_problems(_Judged(bound, one, case, got, eps)))
    return Outcome(one.name, FAIL if problems else PASS, problems)


def fitted(case: Case, bound: Bound) -> tuple[Case, list[str]]:
    """The case under the options that the candidate really gets, and the options whose values it cannot take."""
    given, own = case.options, bound.candidate.options
    takes = {name for name in bound.passes if hasattr(given, name) and name not in own}
    o = bound.options.with_(**{name: getattr(given, name) for name in takes})
    wanted, found = _meaning(given, case), _meaning(o, case)
    reasons = [f"{name}={wanted[name]}" for name in wanted if wanted[name] != found[name]]
    layers = len(case.outputs.get("aux_outputs", ())) + 1
    if layers > o.num_decoder_layers:
        reasons.append(f"num_decoder_layers={layers}")
    outputs = dict(case.outputs)
    if case.has_encoder and not o.has_encoder:
        reasons.append("encoder outputs")
    elif case.has_encoder:
        outputs[o.encoder_key] = outputs.pop(given.encoder_key)
    return replace(case, options=o, outputs=outputs), reasons


def _meaning(o: Options, case: Case) -> dict[str, Any]:
    """Those option values that the numbers of a case depend on."""
    found: dict[str, Any] = {name: getattr(o, name) for name in _VALUES}
    if o.class_loss == "softmax":
        found["eos_coef"] = o.eos_coef
    else:
        found |= {
            "focal_alpha": o.focal_alpha,
            "focal_gamma": o.focal_gamma,
            "focal_alpha_matcher": o.cost_alpha,
            "focal_gamma_matcher": o.cost_gamma,
        }
    if o.class_loss != "token":
        found["num_classes"] = o.num_classes
    if case.has_encoder:
        found["encoder_targets"] = o.encoder_targets
    if case.denoising:
        found["denoising"] = o.denoising
    found["losses"] = ", ".join(sorted({*o.losses} - {"cardinality"}))
    return found


# --- numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Judged:
    bound: Bound
    one: Golden
    case: Case
    got: Observation
    eps: float

    @property
    def seen(self) -> Seen:
        """The same beside the textbook: takes a textbook call, so only where the stored numbers do not decide."""
        if "seen" not in self.case.memo:
            self.case.memo["seen"] = Seen(self.bound, self.case, self.got, eps=self.eps)
        found: Seen = self.case.memo["seen"]
        return found

    def decided(self, layer: str) -> bool:
        """True where no other matching is as good, whatever the rounding."""
        return layer.startswith(KNOWN) or bool(self.one.expected["decided"][layer])


def _problems(at: _Judged) -> Iterator[str]:
    expected = at.one.expected
    for layer in expected["layers"]:
        wrong = False
        for term in TERMS:
            stored = f"loss_{term}{layer['suffix']}"
            if stored in expected["losses"]:
                found = _loss(at, term, layer["name"], stored)
                wrong = wrong or bool(found)
                yield from found
        if not wrong:
            yield from _gradients(at, layer["name"])
    yield from _pairs(at)
    yield from _weights(at)


def _loss(at: _Judged, term: str, layer: str, stored: str) -> list[str]:
    key = f"loss_{term}{at.case.suffix(layer)}"
    got = at.got.losses.get(key)
    if got is None:
        return [f"there is no {key}"]
    if key in at.got.odd:
        return [f"{key} is {at.got.odd[key]}, not a scalar tensor on the outputs' device"]
    unweighted = at.one.expected["weights"].get(stored, 1.0) if at.one.options.weighted else 1.0
    want = at.one.expected["losses"][stored] / unweighted
    allowed = at.one.expected["allowed"][stored] / unweighted * at.eps / EPS
    if math.isfinite(got) and abs(got - want) <= allowed:
        return []
    if not at.decided(layer) and term in ("ce", "bbox", "giou"):
        for b in (b for b, count in enumerate(at.case.counts) if count):
            more, slack = at.seen.excess(layer, b)
            if more > slack:
                return [f"{key}: the matching of image {b} costs {number(more)} more than the least"]
        want, allowed = at.seen.want.losses[key], at.seen.allowed(term, layer)
        if math.isfinite(got) and abs(got - want) <= allowed:
            return []
    return [f"{key}: want {number(want)}, got {number(got)}, allowed ±{allowed:.1e}"]


def _gradients(at: _Judged, layer: str) -> Iterator[str]:
    for term, key in TERMS.items():
        want = at.one.stored.get(f"expected/gradient/{term}/{layer}")
        if want is None or not at.decided(layer):
            continue
        sums = f"{term}_dn" if layer.startswith(KNOWN) else term
        got = at.got.grads.get((sums, layer), (None, None, None))[_PLACE[key]]
        name = f"gradient of loss_{term}{at.case.suffix(layer)} at {key}"
        if got is None:
            yield f"{name}: there is none"
        elif tuple(got.shape) != want.shape:
            yield f"{name}: its shape is {list(got.shape)}"
        else:
            yield from _gradient(at, layer, term, name, torch.from_numpy(want), got)


def _gradient(at: _Judged, layer: str, term: str, name: str, want: Tensor, got: Tensor) -> Iterator[str]:
    off = ~((got - want).abs() <= _allowed(at, layer, term, want))
    if term == "ce" and bool(off.any()):
        of = denoising.allowed_class_gradient if layer.startswith(KNOWN) else Seen.allowed_class_gradient
        off &= ~((got - want).abs() <= of(at.seen, layer, want))
    if term in ("bbox", "giou") and bool(off.any()):
        off &= smooth(at.seen, layer)[..., None]
    if bool(off.any()):
        place = tuple(int(i) for i in off.nonzero()[0])
        index = "".join(f"[{i}]" for i in place)
        yield f"{name}{index}: want {number(float(want[place]))}, got {number(float(got[place]))}"


def gradient_differences(one: Golden, layer: str, term: str, got: Tensor, eps: float) -> Iterator[str]:
    """Where another gradient of a loss differs from the stored one by more than rounding."""
    bound, case = right(one.profile), case_of(one)
    at = _Judged(bound, one, case, Observation(case), eps)
    want = torch.from_numpy(one.stored[f"expected/gradient/{term}/{layer}"])
    yield from _gradient(at, layer, term, f"gradient of loss_{term} of {layer}", want, got)


def smooth(seen: Seen, layer: str) -> Tensor:
    """The rows [B,Q] away from kinks: where coordinates are equal or edges in line, the gradient is a convention."""
    if layer.startswith(KNOWN):
        return denoising.smooth(seen, layer)
    matched = torch.zeros(seen.layers[layer].boxes.shape[:2], dtype=torch.bool)
    for b, pairs in enumerate(seen.pairs[layer]):
        matched[b, pairs.query] = True
    return gradients.smooth(seen, layer) | ~matched


def _allowed(at: _Judged, layer: str, term: str, want: Tensor) -> Tensor:
    """What rounding explains of a gradient, as GRAD, DN and MASK have it; of a class gradient, at least."""
    if term == "ce":
        return tolerance.of_class_gradient(want, torch.zeros(()), at.eps)
    if term in ("mask", "dice"):
        return _allowed_at_masks(at, want)
    sides = at.case.predictions(layer)["pred_boxes"][..., 2:].double().amin(-1, keepdim=True).clamp(min=1e-3)
    return (OPS * at.eps * (1 + 8 / sides) * want.abs().amax(-1, keepdim=True) + 1e-12).expand_as(want)


def _allowed_at_masks(at: _Judged, want: Tensor) -> Tensor:
    given, _, m = masks.matched_masks(at.seen)
    if not len(m):
        return torch.zeros_like(want)
    matched = tolerance.of_mask_gradient(at.seen.book, given, m, at.seen.nb, at.eps)
    allowed, start = torch.zeros_like(want), 0
    for b, pairs in enumerate(at.seen.pairs["final"]):
        allowed[b, pairs.query] = matched[start : start + len(pairs)]
        start += len(pairs)
    return allowed


def _pairs(at: _Judged) -> Iterator[str]:
    """What the matcher returns, where it can be called and one matching is best."""
    if at.got.bad_pairs:
        yield f"the matcher: {at.got.bad_pairs}"
    for layer, images in at.got.pairs.items():
        for b, (pairs, best) in enumerate(zip(images, at.one.expected["matching"][layer], strict=True)):
            found = [[q, t] for q, t in zip(pairs.query.tolist(), pairs.target.tolist(), strict=True)]
            if at.decided(layer) and sorted(found) not in best["pairs"]:
                yield f"the matcher on {layer}, image {b}: {sorted(found)} instead of {best['pairs'][0]}"


def _weights(at: _Judged) -> Iterator[str]:
    """weight_dict, where it is the candidate's own and all that it depends on is as stored."""
    own, o, given = at.got.weights, at.case.options, at.one.options
    names = ("ce_loss_coef", "bbox_loss_coef", "giou_loss_coef", "mask_loss_coef", "dice_loss_coef")
    same = all(getattr(o, n) == getattr(given, n) for n in (*names, "num_decoder_layers", "two_stage", *_ALIKE))
    if own is None or not at.bound.candidate.own_weights or not same:
        return
    for key, want in at.one.expected["weights"].items():
        if key in at.got.losses and own.get(key) != want:
            yield f"weight_dict[{key!r}]: want {number(want)}, got {own.get(key)}"


# --- a whole run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """``outcomes`` of all cases of the profile · ``ended``: how the candidate's process ended before, or ""."""

    candidate: str
    profile: str
    outcomes: tuple[Outcome, ...]
    ended: str
    seconds: float

    def count(self, verdict: str) -> int:
        """How many cases came to a verdict."""
        return sum(one.verdict == verdict for one in self.outcomes)

    @property
    def conformant(self) -> bool:
        """True where something was judged, and nothing failed."""
        return not self.ended and self.count(PASS) > 0 and not self.count(FAIL)


def judge(
    spec: Any, profile: str | None = None, folder: Path = golden.GOLDEN, only: Sequence[str] = (), limit: float = 20.0
) -> Run:
    """Judge a candidate on the golden cases, in a process of its own. ``only``: sets or names; ``limit``: seconds a
    call may take. Raises CandidateError, ConformanceError and FixtureError where nothing can be judged."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    ended = ""
    with Worker(spec, Settings(profile), limit) as worker:
        name, of = worker.identity.name, worker.identity.profile
        for case in selected(folder, of, only):
            found = worker.golden(case, folder)
            outcomes.append(Outcome(case, FAIL, (f"it {found}",), raised=True) if isinstance(found, str) else found)
            if isinstance(found, str):
                ended = found
                break
    return Run(name, of, tuple(outcomes), ended, time.monotonic() - start)


def selected(folder: Path, profile: str, only: Sequence[str] = ()) -> list[str]:
    """The names of a profile's cases, all or those of the named sets and names. Raises ConformanceError where there is
    none, and FixtureError."""
    found = [name for name in golden.names(folder, profile) if not only or name in only or set_of(name) in only]
    if not found:
        raise ConformanceError(f"no golden case of {profile} is {' or '.join(only) or 'there'}")
    return found


def set_of(name: str) -> str:
    """The set that the name of a case begins with."""
    return name.partition("/")[2].partition("-")[0]


def by_set(outcomes: Sequence[Outcome]) -> Mapping[str, list[Outcome]]:
    """The outcomes by set."""
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(set_of(one.name), []).append(one)
    return found
