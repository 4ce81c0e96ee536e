"""Known mistakes of text, beside those in the chapter TOKEN: each a formula, and the check that sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from detr_conformance.contract.classification import the_class_loss_is_a_sum
from detr_conformance.contract.tokens import (
    appended_masked_tokens_change_nothing,
    every_image_uses_its_own_prompt,
    every_token_of_the_class_is_a_positive,
    the_text_mask_holds_for_every_layer,
    tokens_outside_the_mask_have_no_part,
)
from detr_conformance.registry import TEXT, known
from detr_reference.textbook import Layer, Pairs, Textbook

Target = Mapping[str, Tensor]

# --- which tokens are positives ---


def _rows(
    change: Callable[[Tensor], Tensor] | None = None,
    pick: Callable[[Target, Pairs, int], Tensor] | None = None,
    at: Callable[[Pairs], Tensor] | None = None,
    unmatched: Callable[[Tensor], None] | None = None,
) -> dict[str, Any]:
    """Token targets with other rows [M,T], rows of other targets, other queries, or other rows of unmatched ones."""

    def token_class_target(book: Textbook, x: Tensor, target: Target, pairs: Pairs) -> Tensor:
        y = torch.zeros_like(x)
        if unmatched:
            unmatched(y)
        rows = pick(target, pairs, x.shape[1]) if pick else target["token_labels"][pairs.target]
        rows = (rows > 0).to(y.dtype)
        y[at(pairs) if at else pairs.query] = change(rows) if change else rows
        return y

    return {"token_class_target": token_class_target}


def _ends(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last token of every row [M,1], and the tokens' places [1,T]."""
    size = rows.shape[1]
    return rows.argmax(1, keepdim=True), size - 1 - rows.flip(1).argmax(1, keepdim=True), torch.arange(size)[None]


def _last_only(rows: Tensor) -> Tensor:
    _, last, at = _ends(rows)
    return (at == last).to(rows.dtype) * rows


def _first(count: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows * (rows.cumsum(1) <= count)


def _of_class(target: Target, labels: Tensor) -> Tensor:
    """The tokens of other classes of the image's own prompt."""
    names = target["positive_map"]
    return names[labels.clamp(0, len(names) - 1)]


def _filled(rows: Tensor) -> Tensor:
    first, last, at = _ends(rows)
    return ((at >= first) & (at <= last)).to(rows.dtype)


def _longer(rows: Tensor) -> Tensor:
    return torch.maximum(rows, _shifted(1)(rows))


def _earlier(rows: Tensor) -> Tensor:
    return torch.maximum(rows, _shifted(-1)(rows))


def _shorter(rows: Tensor) -> Tensor:
    several = rows.sum(1, keepdim=True) > 1
    return torch.where(several, rows * _shifted(-1)(rows), rows)


def _shifted(by: int) -> Callable[[Tensor], Tensor]:
    def rows(r: Tensor) -> Tensor:
        moved = torch.zeros_like(r)
        if by > 0:
            moved[:, by:] = r[:, :-by]
        else:
            moved[:, :by] = r[:, -by:]
        return moved

    return rows


def _without_last(r: Tensor) -> Tensor:
    kept = r.clone()
    kept[:, -1] = 0
    return kept


def _any_of_image(target: Target, pairs: Pairs, size: int) -> Tensor:
    return target["token_labels"].amax(0, keepdim=True).expand(len(pairs), -1)


def _of_label(target: Target, pairs: Pairs, size: int) -> Tensor:
    hot = torch.zeros(len(pairs), size)
    hot[torch.arange(len(pairs)), target["labels"][pairs.target].clamp(max=size - 1)] = 1
    return hot


def _first_token(y: Tensor) -> None:
    y[:, 0] = 1


def _last_token(y: Tensor) -> None:
    y[:, -1] = 1


for name, sentence, formulas in (
    ("only-the-last-token-is-positive", "Only the last token of a class is a positive.", _rows(_last_only)),
    ("only-the-first-two-tokens-are-positive", "Only the first two tokens of a class are positives.", _rows(_first(2))),
    ("only-the-first-three-tokens-are-positive", "Only the first three tokens of a class are positives.",
     _rows(_first(3))),
    ("first-of-several-tokens-left-out", "The first of several tokens of a class is no positive.",
     _rows(lambda r: torch.where(r.sum(1, keepdim=True) > 1, r - r * (r.cumsum(1) == 1), r))),
    ("only-the-ends-are-positive", "Only the first and the last token of a class are positives.",
     _rows(lambda r: torch.maximum(_first(1)(r), _last_only(r)))),
    ("every-token-is-positive", "Matched queries aim at every token of the text.", _rows(torch.ones_like)),
    ("tokens-of-the-last-target", "Every matched query of an image gets the tokens of its last target.",
     _rows(pick=lambda target, pairs, size: target["token_labels"][-1:].expand(len(pairs), -1))),
    ("tokens-of-the-next-target", "Every matched query gets the tokens of the target after its own.",
     _rows(pick=lambda target, pairs, size: target["token_labels"].roll(-1, 0)[pairs.target])),
    ("tokens-of-the-class-above", "Labels are shifted up by one in the prompt.",
     _rows(pick=lambda target, pairs, size: _of_class(target, target["labels"][pairs.target] + 1))),
    ("tokens-of-the-class-below", "Labels are taken as counted from 1 in the prompt.",
     _rows(pick=lambda target, pairs, size: _of_class(target, target["labels"][pairs.target] - 1))),
    ("tokens-of-the-prompts-first-class", "Every matched query gets the tokens of the prompt's first class.",
     _rows(pick=lambda target, pairs, size: _of_class(target, target["labels"][pairs.target] * 0))),
    ("span-filled", "The gap between two tokens of a class is filled: all from the first to the last.", _rows(_filled)),
    ("span-one-token-too-long", "The span of a class reaches one token too far.", _rows(_longer)),
    ("span-one-token-too-early", "The span of a class begins one token too early.", _rows(_earlier)),
    ("span-one-token-too-short", "The span of a class of several tokens ends one token early.", _rows(_shorter)),
    ("tokens-one-place-later", "All tokens are one place too late.", _rows(_shifted(1))),
    ("tokens-one-place-earlier", "All tokens are one place too early: [CLS] is forgotten.", _rows(_shifted(-1))),
    ("tokens-rolled-one-place-later", "All tokens are one place too late, the last one first.",
     _rows(lambda r: r.roll(1, -1))),
    ("tokens-rolled-one-place-earlier", "All tokens are one place too early, the first one last.",
     _rows(lambda r: r.roll(-1, -1))),
    ("last-token-place-never-positive", "The last place of the text is never a positive.", _rows(_without_last)),
    ("label-is-the-token", "The label is used as the number of a token.", _rows(pick=_of_label)),
    ("tokens-of-all-classes-of-the-image", "Matched queries aim at the tokens of all targets of their image.",
     _rows(pick=_any_of_image)),
    ("tokens-in-target-order", "Token rows are taken in the order of the targets, not of the matching.",
     _rows(pick=lambda target, pairs, size: target["token_labels"][: len(pairs)])),
    ("tokens-for-the-first-queries", "Token rows go to the first queries instead of the matched ones.",
     _rows(at=lambda pairs: torch.arange(len(pairs)))),
    ("unmatched-queries-aim-at-the-first-token", "Unmatched queries are positives of token 0.",
     _rows(unmatched=_first_token)),
    ("unmatched-queries-aim-at-the-last-token", "Unmatched queries are positives of the last token.",
     _rows(unmatched=_last_token)),
    ("tokens-of-the-first-target", "Every matched query of an image gets the tokens of its first target.",
     _rows(pick=lambda target, pairs, size: target["token_labels"][:1].expand(len(pairs), -1))),
):  # fmt: skip
    fix = "1 on every token of the target's class"
    known(every_token_of_the_class_is_a_positive, name, sentence, fix=fix, **formulas)


def _soft(positive: Callable[[Tensor], Tensor], negative: float) -> dict[str, Any]:
    """A focal loss whose targets are not 0 and 1, from the number of positives of each row."""

    def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        x = torch.where(inside, x, 0)
        t = torch.where(y > 0, positive(y.sum(-1, keepdim=True)), torch.tensor(negative).double())
        p = x.sigmoid()
        bce = -t * torch.nn.functional.logsigmoid(x) - (1 - t) * torch.nn.functional.logsigmoid(-x)
        a, miss = book.o.focal_alpha, p * (1 - t) + (1 - p) * t
        total: Tensor = ((a * t + (1 - a) * (1 - t)) * miss**book.o.focal_gamma * bce)[inside].sum()
        return total

    return {"focal_image": focal_image}


def _share(count: Tensor) -> Tensor:
    return 1 / count.clamp(min=1)


for name, sentence, formulas in (
    ("tokens-share-a-target-of-one", "The tokens of a class share a target of 1: rows are normalised.",
     _soft(_share, 0.0)),
    ("negative-tokens-aim-at-a-hundredth", "Negative tokens aim at 0.01.", _soft(torch.ones_like, 0.01)),
    ("positive-tokens-aim-at-nine-tenths", "Positive tokens aim at 0.9.",
     _soft(lambda n: 0.9 * torch.ones_like(n), 0.0)),
):  # fmt: skip
    known(every_token_of_the_class_is_a_positive, name, sentence, fix="targets are 0 and 1", **formulas)


def _contrastive(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    log = torch.where(inside, x, -torch.inf).log_softmax(-1)
    total: Tensor = -(log[(y > 0) & inside]).sum()
    return total


def _positives_only(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    own = (y.amax(0, keepdim=True) > 0) & inside
    total: Tensor = book.focal_term(x[own], y[own]).sum()
    return total


def _pooled(pool: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """A focal loss over classes, whose logits [Q,K] are pooled from those of their tokens; K an image's own."""

    def focal_loss(
        book: Textbook, layer: Layer, targets: Any, matches: Sequence[Pairs], nb: Tensor, mask: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, t, m in zip(layer.logits, targets, matches, strict=True):
            names = t["positive_map"] > 0
            pooled = pool(x[:, None].masked_fill(~names, 0), names) if len(names) else x[:, :0]
            y = torch.zeros_like(pooled)
            y[m.query, t["labels"][m.target]] = 1
            total = total + book.focal_term(pooled, y)[:, names.any(1)].sum()
        return total / book.class_divisor(nb, matches)

    return {"focal_loss": focal_loss}


for name, sentence, formulas in (
    ("class-loss-of-the-largest-token", "Token logits are max-pooled to one logit a class of the prompt.",
     _pooled(lambda x, own: x.masked_fill(~own, -torch.inf).amax(-1))),
    ("class-loss-of-the-mean-token", "Token logits are averaged to one logit a class of the prompt.",
     _pooled(lambda x, own: x.sum(-1) / own.sum(-1).clamp(min=1))),
    ("class-loss-of-the-summed-tokens", "Token logits are summed to one logit a class of the prompt.",
     _pooled(lambda x, own: x.sum(-1))),
    ("class-loss-of-the-first-token", "A class of the prompt has the logit of its first token.",
     _pooled(lambda x, own: (x * (own & (own.cumsum(-1) == 1))).sum(-1))),
):  # fmt: skip
    known(
        every_token_of_the_class_is_a_positive, name, sentence, fix="keep the logits of tokens apart", **formulas
    )  # fmt: skip


def _mean_logit(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    mean = torch.where(inside, x, 0).sum(-1) / inside.sum(-1).clamp(min=1)
    total: Tensor = book.focal_term(mean, y.amax(-1)).sum()
    return total


known(
    every_token_of_the_class_is_a_positive, "tokens-pooled-to-their-mean",
    "A query's token logits are averaged to one logit before the loss.", fix="keep the logits of tokens apart",
    focal_image=_mean_logit,
)  # fmt: skip


for name, sentence, formula in (
    ("softmax-over-tokens", "A softmax over the tokens, whose positives alone have a loss.", _contrastive),
    ("tokens-of-targets-only", "Only tokens of some target of the image take part in the loss.", _positives_only),
):
    known(
        every_token_of_the_class_is_a_positive, name, sentence, fix="the focal loss of every token inside text_mask",
        focal_image=formula,
    )  # fmt: skip

known(
    the_class_loss_is_a_sum, "class-loss-averaged-over-valid-tokens",
    "The class loss is averaged over the tokens inside text_mask.", fix="sum over tokens", profiles=TEXT,
    around={"focal_image": lambda before, book, x, y, inside: before(x, y, inside) / inside.any(0).sum().clamp(min=1)},
)  # fmt: skip

# --- divided by a number of tokens ---


def _over_tokens(matched: bool, divide: bool) -> dict[str, Any]:
    """The class loss divided by the positive tokens of the matched or of all targets, besides nb or instead of it."""

    def focal_loss(before: Any, book: Textbook, layer: Layer, targets: Any, matches: Any, nb: Any, mask: Any) -> Tensor:
        rows = [t["token_labels"][m.target if matched else slice(None)] > 0
                for t, m in zip(targets, matches, strict=True)]  # fmt: skip
        total: Tensor = before(layer, targets, matches, nb, mask)
        count = max(sum(int(r.sum()) for r in rows), 1)
        return total / count if divide else total * book.class_divisor(nb, matches) / count

    return {"focal_loss": focal_loss}


for name, sentence, around in (
    ("class-loss-divided-by-the-positive-tokens",
     "The class loss is divided by the number of positive tokens of matched pairs instead of nb.",
     _over_tokens(matched=True, divide=False)),
    ("class-loss-divided-by-the-tokens-of-all-targets",
     "The class loss is divided by the number of tokens of all targets instead of nb.",
     _over_tokens(matched=False, divide=False)),
    ("class-loss-divided-by-nb-and-positive-tokens",
     "The class loss is divided by nb, and by the number of positive tokens besides.",
     _over_tokens(matched=True, divide=True)),
):  # fmt: skip
    known(
        the_class_loss_is_a_sum, name, sentence, fix="Σ over all queries and tokens, divided by nb", profiles=TEXT,
        around=around,
    )  # fmt: skip


# --- which tokens take part ---


def _masks(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """text_mask [B,T] of every layer, changed."""

    def layer_mask(before: Callable[..., Any], book: Textbook, layer: Layer, outputs: Any) -> Any:
        mask = before(layer, outputs)
        return None if mask is None else change(mask.bool())

    return {"layer_mask": layer_mask}


def _without_end(which: int) -> Callable[[Tensor], Tensor]:
    """Masks without their last (−1) or first (0) valid token."""

    def change(mask: Tensor) -> Tensor:
        kept = mask.clone()
        for row in kept:
            places = row.nonzero()[:, 0]
            if len(places):
                row[places[which]] = False
        return kept

    return change


def _as_length(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)


def _up_to_the_last(mask: Tensor) -> Tensor:
    return mask.flip(1).cummax(1).values.flip(1)


def _up_to_the_first_hole(mask: Tensor) -> Tensor:
    begun = mask.cummax(1).values
    return mask & ~(begun & ~mask).cummax(1).values


for check, name, sentence, change in (
    (tokens_outside_the_mask_have_no_part, "text-mask-taken-for-its-length",
     "As many leading tokens take part as text_mask has true ones, wherever these are.", _as_length),
    (tokens_outside_the_mask_have_no_part, "text-mask-without-its-holes",
     "All tokens up to the last one of text_mask take part, also those that it leaves out.", _up_to_the_last),
    (every_token_of_the_class_is_a_positive, "text-cut-at-the-first-hole-of-the-mask",
     "The text is taken to end where text_mask first leaves a token out.", _up_to_the_first_hole),
    (tokens_outside_the_mask_have_no_part, "text-mask-inverted", "text_mask is read as a padding mask: inverted.",
     lambda m: ~m),
    (tokens_outside_the_mask_have_no_part, "text-mask-of-any-image",
     "A token that any image of the batch uses takes part in all.", lambda m: m.any(0).expand_as(m)),
    (every_token_of_the_class_is_a_positive, "last-valid-token-masked", "The last valid token is masked too.",
     _without_end(-1)),
    (every_token_of_the_class_is_a_positive, "first-valid-token-masked", "The first valid token is masked too.",
     _without_end(0)),
    (every_token_of_the_class_is_a_positive, "both-ends-of-the-valid-tokens-masked",
     "The first and the last valid token, taken for [CLS] and [SEP], are masked too.",
     lambda m: _without_end(-1)(_without_end(0)(m))),
    (every_image_uses_its_own_prompt, "text-mask-of-the-first-image", "The mask of image 0 serves all images.",
     lambda m: m[:1].expand_as(m)),
    (every_image_uses_its_own_prompt, "text-mask-of-all-images", "Only tokens that all images use take part.",
     lambda m: m.all(0).expand_as(m)),
    (every_image_uses_its_own_prompt, "text-cut-to-the-first-length",
     "All prompts are cut to the length of image 0's.",
     lambda m: m & (torch.arange(m.shape[1]) < int(m[0].sum()))),
):  # fmt: skip
    known(check, name, sentence, fix="each image's own text_mask, True where a token is", around=_masks(change))


def _packed(before: Callable[..., Any], book: Textbook, outputs: Any) -> list[Layer]:
    """Logits with the tokens of text_mask first, which moves them where the mask has holes."""
    order = (~outputs["text_mask"].bool()).int().argsort(dim=1, stable=True)[:, None]
    return [replace(x, logits=x.logits.gather(2, order.expand_as(x.logits))) for x in before(outputs)]


known(
    every_token_of_the_class_is_a_positive, "tokens-counted-inside-the-mask",
    "Logits are selected by text_mask, and the tokens of a class then looked up by their place in the whole text.",
    fix="select targets by text_mask as well",
    around={"layers": _packed} | _masks(_as_length),
)  # fmt: skip


def _filling(value: float) -> Callable[..., Tensor]:
    """Tokens outside the mask take part with this logit."""

    def focal_image(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
        total: Tensor = book.focal_term(torch.where(inside, x, value), y).sum()
        return total

    return focal_image


def _without_infinities(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    total: Tensor = book.focal_term(torch.where(x.isinf(), torch.zeros_like(x), x), y).sum()
    return total


def _where_finite(book: Textbook, x: Tensor, y: Tensor, inside: Tensor) -> Tensor:
    total: Tensor = book.focal_term(x[x.isfinite()], y[x.isfinite()]).sum()
    return total


for name, sentence, formula in (
    ("masked-logits-are-zero", "Logits outside text_mask are set to 0, and add a constant.", _filling(0.0)),
    ("masked-infinities-are-zero", "text_mask is ignored, and logits of −inf are set to 0.", _without_infinities),
    ("text-mask-only-where-infinite", "text_mask is ignored wherever the logit is finite.", _where_finite),
):
    known(
        appended_masked_tokens_change_nothing if name == "masked-logits-are-zero"
        else tokens_outside_the_mask_have_no_part,
        name, sentence, fix="select by text_mask before summing", focal_image=formula,
    )  # fmt: skip

for name, sentence, without in (
    ("text-mask-not-for-auxiliary-layers", "Auxiliary outputs are trained without text_mask.", "aux"),
    ("text-mask-not-for-the-encoder", "Encoder outputs are trained without text_mask.", "enc"),
):
    known(
        the_text_mask_holds_for_every_layer, name, sentence, fix="hand text_mask to every layer",
        around={"layer_mask": lambda before, book, layer, outputs, without=without: (
            None if layer.name.startswith(without) else before(layer, outputs))},
    )  # fmt: skip
known(
    tokens_outside_the_mask_have_no_part, "text-mask-not-for-the-final-layer",
    "The final layer alone is trained without text_mask.", fix="hand text_mask to every layer",
    around={"layer_mask": lambda before, book, layer, outputs: (
        None if layer.name == "final" else before(layer, outputs))},
)  # fmt: skip

# --- which prompt ---


def _looked_up(rows: Callable[[Sequence[Target], int], Tensor]) -> dict[str, Any]:
    """Token targets looked up in another map than the image's own."""

    def losses(before: Callable[..., Any], book: Textbook, outputs: Any, targets: Any, given: Any) -> Any:
        wrong = [{**t, "looked_up": rows(targets, b)} for b, t in enumerate(targets)]
        return before(outputs, wrong, given)

    def token_class_target(before: Callable[..., Tensor], book: Textbook, x: Tensor, t: Target, pairs: Pairs) -> Tensor:
        return before(x, {**t, "token_labels": t.get("looked_up", t["token_labels"])}, pairs)

    return {"losses": losses, "token_class_target": token_class_target}


def _row(maps: Tensor, labels: Tensor) -> Tensor:
    return maps[labels.clamp(max=len(maps) - 1)]


def _first_map(targets: Sequence[Target], b: int) -> Tensor:
    return _row(targets[0]["positive_map"], targets[b]["labels"])


def _last_map(targets: Sequence[Target], b: int) -> Tensor:
    return _row(targets[-1]["positive_map"], targets[b]["labels"])


def _one_map(later_wins: bool) -> Callable[[Sequence[Target], int], Tensor]:
    """One map of the batch by label, in which later images, or earlier ones, win."""

    def rows(targets: Sequence[Target], b: int) -> Tensor:
        found: dict[int, Tensor] = {}
        for t in targets if later_wins else reversed(targets):
            found |= dict(zip(t["labels"].tolist(), t["token_labels"], strict=True))
        own = targets[b]
        chosen = [found[label] for label in own["labels"].tolist()]
        return torch.stack(chosen) if chosen else own["token_labels"]

    return rows


def _next_rows(targets: Sequence[Target], b: int) -> Tensor:
    own, other = targets[b]["token_labels"], targets[(b + 1) % len(targets)]["token_labels"]
    n = min(len(own), len(other))
    return torch.cat([other[:n], own[n:]])


for name, sentence, rows in (
    ("prompt-of-the-first-image", "Labels are looked up in the prompt of image 0.", _first_map),
    ("prompt-of-the-last-image", "Labels are looked up in the prompt of the last image.", _last_map),
    ("one-prompt-map-and-later-images-win", "One map from label to tokens serves the batch, and later images win.",
     _one_map(later_wins=True)),
    ("one-prompt-map-and-earlier-images-win", "One map from label to tokens serves the batch, and earlier images win.",
     _one_map(later_wins=False)),
    ("tokens-of-the-next-image", "Token targets come from the next image.", _next_rows),
):  # fmt: skip
    known(
        every_image_uses_its_own_prompt, name, sentence, fix="look a label up in its own image's map",
        around=_looked_up(rows),
    )  # fmt: skip
