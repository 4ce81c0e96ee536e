"""Hypothesis strategies: recipes, and the cases made from them.

    from hypothesis import given
    from detr_conformance import strategies

    @given(strategies.cases("deformable-detr"))
    def test_my_criterion(case): ...

A recipe is drawn as shapes, palettes, one seed and a few adversarial edits rather than number by number: cheap to draw,
quick to shrink, and value ranges are reached that a seed alone would not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from detr_conformance.cases import BOXES, LOGITS, Case, Recipe, build
from detr_reference.options import PROFILES, Options, options_of

T = TypeVar("T")
ALL: Final = frozenset(Options.__dataclass_fields__)
_COEFS: Final = (("ce_loss_coef", 3.0), ("bbox_loss_coef", 4.0), ("giou_loss_coef", 1.5))
_SEEDS: Final = st.integers(0, 2**31 - 1)


def _edits(*names: str) -> SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), max_size=2, unique=True).map(tuple)


def _counts(low: int, high: int, images: Sequence[int]) -> SearchStrategy[tuple[int, ...]]:
    one = st.sampled_from(range(low, high + 1))
    return st.sampled_from(images).flatmap(lambda n: st.tuples(*[one] * n))


@st.composite
def ordinary(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """One to three images, each with at least one target and no more targets than queries; now and then more auxiliary
    layers than a decoder of six has."""
    pick: Any = draw
    counts = pick(_counts(1, 3, (1, 2, 3)))
    return Recipe(
        seed=pick(_SEEDS),
        targets=counts,
        queries=max(counts) + pick(st.sampled_from(range(5))),
        classes=pick(st.sampled_from(range(1, 6))),
        aux=pick(st.sampled_from((0, 1, 2, 3, 7))),
        encoder_queries=pick(st.sampled_from((0, max(counts), max(counts) + 3))),
        tokens=pick(st.sampled_from(range(6, 12))),
        logits=pick(st.sampled_from(("normal", "normal", "grid"))),
        boxes=pick(st.sampled_from(("plain", "plain", "grid", "overhang"))),
        edits=pick(_edits("contested", "end classes", "mask with holes", "masked -inf")),
        options=pick(st.sampled_from(((), _COEFS))),
    )


@st.composite
def odd(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """Images without targets, more targets than queries, a single query, copies, exact boxes and tiny ones."""
    pick: Any = draw
    return Recipe(
        seed=pick(_SEEDS),
        targets=pick(_counts(0, 4, (1, 2, 3))),
        queries=pick(st.sampled_from((1, 2, 3))),
        classes=pick(st.sampled_from((1, 2, 3, 4))),
        aux=pick(st.sampled_from((0, 1))),
        encoder_queries=pick(st.sampled_from((0, 1, 5))),
        boxes=pick(st.sampled_from(("plain", "grid", "overhang", "tiny"))),
        edits=pick(_edits("copied target", "copied query", "exact boxes", "end classes", "masked -inf")),
    )


@st.composite
def extreme(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """Logits up to ±110 and sides down to 1e-3."""
    pick: Any = draw
    counts = pick(_counts(0, 3, (1, 2)))
    return Recipe(
        seed=pick(_SEEDS),
        targets=counts,
        queries=max(*counts, 1) + pick(st.sampled_from(range(4))),
        classes=pick(st.sampled_from((1, 2, 3, 4))),
        aux=pick(st.sampled_from((0, 1))),
        encoder_queries=pick(st.sampled_from((0, 4))),
        logits=pick(st.sampled_from(("confident", "extreme"))),
        boxes=pick(st.sampled_from(("plain", "tiny"))),
        edits=pick(_edits("masked -inf")),
    )


@st.composite
def unequal(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """Three images with unequal numbers of targets and prompts, auxiliary layers and encoder outputs."""
    pick: Any = draw
    return Recipe(
        seed=pick(_SEEDS),
        targets=pick(st.permutations((pick(st.sampled_from((0, 1))), 1, 3)).map(tuple)),
        queries=pick(st.sampled_from(range(3, 7))),
        classes=pick(st.sampled_from(range(2, 6))),
        aux=pick(st.sampled_from((1, 2))),
        encoder_queries=pick(st.sampled_from(range(3, 7))),
        tokens=11,
        edits=pick(_edits("mask with holes", "masked -inf")),
    )


@st.composite
def wild(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """The same with logits and boxes of every kind, so that whoever tidies his inputs has something to tidy."""
    pick: Any = draw
    logits, boxes = (pick(st.sampled_from(kinds)) for kinds in (sorted(LOGITS), sorted(BOXES)))
    base: Recipe = pick(unequal())
    return replace(base, logits=logits, boxes=boxes)


@st.composite
def configured(draw: Callable[[SearchStrategy[T]], T]) -> Recipe:
    """Other α, γ and eos_coef."""
    pick: Any = draw
    return Recipe(
        seed=pick(_SEEDS),
        targets=pick(_counts(1, 3, (2,))),
        queries=5,
        classes=pick(st.sampled_from(range(2, 6))),
        options=(
            ("eos_coef", pick(st.sampled_from((0.05, 0.1, 0.3, 0.7, 1.0)))),
            ("focal_alpha", pick(st.sampled_from((0.1, 0.25, 0.4, 0.6, 0.9)))),
            ("focal_gamma", pick(st.sampled_from((0.0, 1.0, 1.5, 2.0, 2.5, 3.0)))),
        ),
    )


def cases(
    profile: str, recipes: SearchStrategy[Recipe] | None = None, options: Options | None = None
) -> SearchStrategy[Case]:
    """Cases of a profile: ordinary, odd and extreme ones, or those of the given recipes.

    Raises ValueError that names an unknown profile.
    """
    if profile not in PROFILES:
        options_of(profile)
    base = options if options is not None else options_of(profile)
    drawn = st.one_of(ordinary(), odd(), extreme(), unequal()) if recipes is None else recipes
    return drawn.map(lambda recipe: build(recipe, base, ALL))


def sample(strategy: SearchStrategy[T], count: int, seed: int) -> list[T]:
    """``count`` examples of a strategy, at most: always the same ones for the same seed."""
    found: list[T] = []
    if not count:
        return found

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def draw(example: T) -> None:
        found.append(example)

    draw()
    return found
