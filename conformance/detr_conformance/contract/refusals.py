"""BAD and its kin: what is refused, and in which words; what is taken in any form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.attempts import (
    AFTERWARDS,
    BARE,
    CHOICES,
    CHOSEN,
    EMPTY,
    FIRST,
    NO_COST,
    ODD,
    ODDITIES,
    REFUSED,
    SECOND,
    SELECTS,
    SPOILED,
    WORDLESS,
    bads,
    took,
)  # fmt: skip
from detr_conformance.contract.compare import agree, holds
from detr_conformance.observation import Observation
from detr_conformance.registry import EVERY, TEXT, Comparison, check, clause, fault
from detr_conformance.seen import Seen
from detr_reference.textbook import TERMS, Textbook

Targets = Sequence[Mapping[str, Tensor]]


def refused(trial: Observation, what: str, words: Sequence[str]) -> Comparison:
    """A call must raise, its message naming the argument by one of ``words``; and change nothing."""
    want = f"an error that names {' or '.join(dict.fromkeys(words))}"
    if not trial.raised:
        return holds(False, f"called with {what}", want, "losses, as if nothing were wrong")
    if trial.changed:
        return holds(False, f"called with {what}", "inputs as before", trial.changed)
    clear = any(word in trial.message.lower() for word in words)
    return holds(clear, f"called with {what}", want, trial.raised)


def _all_refused(seen: Seen, clause: str) -> Iterator[Comparison]:
    for bad in bads(seen.case, clause):
        yield refused(seen.trials[bad.what], bad.what, bad.words)


BAD_1 = clause("BAD-1", "should", EVERY, "A label outside 0..K−1 is refused, a negative one included.")


@check(BAD_1, on=REFUSED, component="refusals", takes_raising=True)
def labels_out_of_range_are_refused(seen: Seen) -> Iterator[Comparison]:
    yield from _all_refused(seen, "BAD-1")


@fault(
    labels_out_of_range_are_refused,
    seen_in="longzw1997/Open-GroundingDino label_map[tgt_ids] wraps −1 to the last row",
    fix="check labels before indexing with them",
)
def negative_labels_wrap(book: Textbook) -> Textbook:
    """A label of −1 is the last class."""

    def refuse_labels(inner: Textbook, outputs: Mapping[str, Any], targets: Targets) -> None:
        book.under(inner.o).refuse_labels(outputs, [{**t, "labels": t["labels"].clamp(min=0)} for t in targets])

    def taken(inner: Textbook, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = book.under(inner.o).taken(target)
        return found | {"labels": found["labels"] % inner.o.num_classes}

    return replace(book, refuse_labels=refuse_labels, taken=taken)


BAD_2 = clause(
    "BAD-2",
    "should",
    EVERY,
    "Lengths that do not agree are refused: batch of outputs and targets, labels and boxes, logits and boxes, "
    "text_mask and logits.",
)


@check(BAD_2, on=REFUSED, component="refusals")
def lengths_that_do_not_agree_are_refused(seen: Seen) -> Iterator[Comparison]:
    yield from _all_refused(seen, "BAD-2")


@fault(lengths_that_do_not_agree_are_refused, fix="compare the lengths before anything else")
def lengths_go_unchecked(book: Textbook) -> Textbook:
    """Lists of unequal length are cut to the shortest."""

    def losses(inner: Textbook, outputs: Mapping[str, Any], targets: Targets, given: Any) -> Any:
        batch, queries = outputs["pred_logits"].shape[0], outputs["pred_boxes"].shape[1]
        cut = dict(outputs) | {"pred_logits": outputs["pred_logits"][: len(targets), :queries]}
        cut["pred_boxes"] = outputs["pred_boxes"][: len(targets)]
        if "text_mask" in cut:
            missing = cut["pred_logits"].shape[-1] - cut["text_mask"].shape[-1]
            cut["text_mask"] = torch.nn.functional.pad(cut["text_mask"], (0, missing))[: len(targets)]
        shortest = [min(len(t["labels"]), len(t["boxes"])) for t in targets]
        own = [
            {k: v if k == "positive_map" or v.ndim == 0 else v[:n] for k, v in t.items()}
            for t, n in zip(targets, shortest, strict=True)
        ]
        whole = (batch, queries) == (len(targets), outputs["pred_logits"].shape[1])
        return book.under(inner.o).losses(outputs if whole else cut, own, given)

    return replace(book, losses=losses)


BAD_3 = clause("BAD-3", "should", EVERY, "Target boxes with negative width or height, or non-finite ones, are refused.")


@check(BAD_3, on=REFUSED, component="refusals")
def impossible_boxes_are_refused(seen: Seen) -> Iterator[Comparison]:
    yield from _all_refused(seen, "BAD-3")


@fault(impossible_boxes_are_refused, fix="check the target boxes, which costs microseconds")
def impossible_boxes_are_repaired(book: Textbook) -> Textbook:
    """Negative sides and non-finite numbers of target boxes are silently taken as 0."""

    def refuse_boxes(inner: Textbook, targets: Targets) -> None:
        return None

    def taken(inner: Textbook, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = book.under(inner.o).taken(target)
        boxes = found["boxes"].nan_to_num(0.0, 0.0, 0.0)
        return found | {"boxes": torch.cat([boxes[:, :2], boxes[:, 2:].clamp(min=0)], -1)}

    return replace(book, refuse_boxes=refuse_boxes, taken=taken)


BAD_4 = clause("BAD-4", "should", EVERY, "A missing key is refused by its name, and the next call is as any other.")


@check(BAD_4, on=REFUSED, component="refusals")
def missing_keys_are_refused(seen: Seen) -> Iterator[Comparison]:
    yield from _all_refused(seen, "BAD-4")
    after = seen.trials[AFTERWARDS]
    same = after.raised or ("the same losses" if after.losses == seen.got.losses else "other losses")
    yield holds(same == "the same losses", AFTERWARDS, "the same losses", same)


@fault(missing_keys_are_refused, fix="name the key that is missing")
def targets_without_boxes_are_empty(book: Textbook) -> Textbook:
    """An image whose target lacks labels or boxes is taken as one without objects."""

    def losses(inner: Textbook, outputs: Mapping[str, Any], targets: Targets, given: Any) -> Any:
        empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        if inner.o.class_loss == "token" and "pred_logits" in outputs:
            empty["token_labels"] = torch.zeros(0, outputs["pred_logits"].shape[-1])
        own = [t if set(empty) <= set(t) else empty for t in targets]
        return book.under(inner.o).losses(outputs, own, given)

    return replace(book, losses=losses)


COST_10 = clause(
    "COST-10",
    "should",
    EVERY,
    "All three matching weights zero is refused with a clear error.",
    ["facebookresearch/detr models/matcher.py:32"],
)


@check(COST_10, on=REFUSED, component="refusals")
def no_cost_at_all_is_refused(seen: Seen) -> Iterator[Comparison]:
    if NO_COST in seen.trials:
        yield refused(seen.trials[NO_COST], NO_COST, ("cost",))


@fault(no_cost_at_all_is_refused, fix="raise where all three are zero")
def matching_by_nothing(book: Textbook) -> Textbook:
    """With all three weights zero every assignment is as good as any."""
    return replace(book, refuse_weights=lambda inner: None)


# --- what is taken in any form ---

NUM_5 = clause(
    "NUM-5",
    "should",
    EVERY,
    "int32 labels, float64 target boxes, no targets written torch.tensor([]), and non-contiguous inputs are handled, "
    "or refused with a clear error.",
    ["facebookresearch/detr PR #6"],
)


@check(NUM_5, on=ODDITIES, component="precision", takes_raising=True)
def other_forms_of_the_same_input_are_taken_or_refused(seen: Seen) -> Iterator[Comparison]:
    for name, (_, words) in ODD.items():
        yield from _taken_or_refused(seen, name, seen.got, words)
    if not seen.trials[EMPTY].raised:
        yield from _taken_or_refused(seen, BARE, seen.trials[EMPTY], ("label", "box"))


def _taken_or_refused(seen: Seen, name: str, usual: Observation, words: Sequence[str]) -> Iterator[Comparison]:
    trial = seen.trials[name]
    if trial.raised:
        yield refused(trial, name, words)
        return
    for term, key in zip(TERMS, seen.case.keys("final"), strict=True):
        if key in usual.losses:
            allowed = 2 * seen.allowed(term, "final")
            yield agree(f"{key} with {name}", usual.losses[key], trial.losses.get(key), allowed, "as usual")


@fault(
    other_forms_of_the_same_input_are_taken_or_refused,
    seen_in="facebookresearch/detr PR #6",
    fix="convert labels with .long(), boxes with .to(pred_boxes)",
)
def narrow_labels_are_all_zero(book: Textbook) -> Textbook:
    """Labels that are not int64 are reinterpreted, and box dtypes are an obscure error."""

    def taken(inner: Textbook, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = book.under(inner.o).taken(target)
        if target["boxes"].dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return found

    return replace(book, taken=taken)


# --- what is not a number ---

MATCH_10 = clause(
    "MATCH-10",
    "should",
    EVERY,
    "A query with non-finite predictions raises a clear error or is taken only when no other is left; it is never "
    "preferred.",
    ["ultralytics/ultralytics models/utils/ops.py sets such costs to 0"],
)


@check(MATCH_10, on=SPOILED, component="matching", takes_raising=True)
def non_finite_queries_are_not_preferred(seen: Seen) -> Iterator[Comparison]:
    for name, trial in seen.trials.items():
        if trial.raised:
            yield holds(True, name, "", "")
            continue
        preferred = took(trial, 0, int(name.split()[1]))
        if preferred is not None:
            want = "an error, or another query matched: enough are left"
            yield holds(not preferred, f"{name}, image 0", want, "it was matched")


@fault(
    non_finite_queries_are_not_preferred,
    seen_in="ultralytics and longzw1997/Open-GroundingDino",
    fix="give such queries a cost above every other, or raise",
)
def non_finite_costs_become_zero(book: Textbook) -> Textbook:
    """A cost that is not a number is taken as 0."""

    def cost(inner: Textbook, x: Tensor, boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = book.under(inner.o).cost(x, boxes, target)
        return found.nan_to_num(0.0, 0.0, 0.0)

    return replace(book, cost=cost)


TOKEN_5 = clause("TOKEN-5", "should", TEXT, "A class without tokens raises a clear error, or is never preferred.")


@check(TOKEN_5, on=WORDLESS, component="tokens", takes_raising=True)
def a_class_without_tokens_is_not_preferred(seen: Seen) -> Iterator[Comparison]:
    for row, name in enumerate((FIRST, SECOND)):
        trial = seen.trials[name]
        if trial.raised:
            yield holds(True, name, "", "")
            continue
        pairs = Seen(seen.bound, trial.case, trial).pairs["final"][0]
        preferred = pairs.target.tolist() == [row]
        want = f"an error, or target {1 - row}, whose class has tokens"
        yield holds(not preferred, f"the match, {name}", want, f"target {row}")


@fault(a_class_without_tokens_is_not_preferred, fix="refuse token_labels without a token")
def no_tokens_cost_nothing(book: Textbook) -> Textbook:
    """The class cost of a target without tokens is 0, an empty sum over max(count, 1)."""

    def token_cost(book: Textbook, x: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        tokens = target["token_labels"] > 0
        return torch.stack([book.focal_difference(x[:, own]).sum(-1) / max(int(own.sum()), 1) for own in tokens], -1)

    return replace(book, token_cost=token_cost)


# --- which losses ---

KEY_7 = clause(
    "KEY-7", "should", EVERY, "losses=[…] selects what is computed.", ["facebookresearch/detr models/detr.py:100,244"]
)


@check(KEY_7, on=CHOSEN, component="weights and keys", takes_raising=True)
def losses_selects_what_is_computed(seen: Seen) -> Iterator[Comparison]:
    for chosen in CHOICES:
        trial = seen.trials[repr(list(chosen))]
        terms = [term for name in chosen for term in SELECTS[name]]
        want = sorted(f"loss_{t}{seen.case.suffix(layer)}" for layer in seen.case.layers for t in terms)
        every = {key for layer in seen.case.layers for key in seen.case.keys(layer)}
        got = trial.raised or ", ".join(sorted(trial.keys & every))
        yield holds(got == ", ".join(want), f"trained losses with losses={list(chosen)!r}", ", ".join(want), got)


@fault(losses_selects_what_is_computed, fix="compute only what losses names")
def every_loss_whatever_was_chosen(book: Textbook) -> Textbook:
    """Labels and boxes are always trained, whatever ``losses`` names."""
    return replace(book, selected=lambda inner, name: name in ("labels", "boxes") or name in inner.o.losses)
