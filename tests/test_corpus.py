"""The stored cases: what they claim is checked, a damaged file is named, and experiments are made with them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import bind
from detr_conformance.cases import Recipe
from detr_conformance.cli import app
from detr_conformance.corpus import Outcome, covered, faults_on, problems
from detr_conformance.corpus_page import Row, page, rows
from detr_conformance.corpus_search import Searched, chosen, extended
from detr_conformance.errors import ConformanceError
from detr_conformance.stored import Corpus, Duel, Stored, corpus, in_line, own_file, read, written
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

run = CliRunner().invoke
SMALL = "permuted"  # an experiment that is soon judged


def test_the_file_is_read_as_it_is_written():
    assert read(written(corpus())) == corpus()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw["cases"]["batch"][0]["recipe"].update(logits="gird"),
            "batch, number 1, logits: unknown 'gird'",
        ),
        (lambda raw: raw["cases"]["batch"][0]["recipe"].pop("seed"), "cases of batch, number 1: it has no 'seed'"),
        (lambda raw: raw["cases"]["batch"][0].pop("recipe"), "it must have one of recipe, duel, pair"),
        (lambda raw: raw["cases"]["batch"][0]["kills"].update(dter=[]), "unknown 'dter'; did you mean 'detr'?"),
        (lambda raw: raw["cases"]["duels"][0]["duel"].update(kind="boxes"), "kind: unknown 'boxes'"),
        (lambda raw: raw["cases"]["pairs"][0]["pair"].update(pred=[0.5]), "a box has four numbers, not [0.5]"),
        (lambda raw: raw.pop("cases"), "the file: it has no 'cases'"),
    ],
)
def test_a_damaged_file_is_refused_by_its_place(change, message):
    raw = json.loads(own_file().read_text("utf-8"))
    change(raw)
    with pytest.raises(ConformanceError) as refused:
        read(json.dumps(raw))
    assert message in str(refused.value)


def test_a_file_that_is_no_json_is_refused_by_its_line():
    with pytest.raises(ConformanceError, match="line 2"):
        read('{"cases":\n')


@pytest.mark.parametrize("profile", PROFILES)
def test_experiments_are_made_with_the_stored_cases(profile):
    bound = bind(candidate_of(textbook, profile))
    for experiment in covered():
        assert len(list(experiment.fixed(bound))) == len(corpus().of(experiment.name, profile)), experiment.name


def test_a_case_claims_something():
    assert all(any(one.kills.values()) for own in corpus().cases.values() for one in own)


def test_true_claims_are_no_problem():
    assert problems(corpus(), [SMALL], processes=1) == []


def test_a_case_that_claims_too_much_is_named():
    first, *others = corpus().cases[SMALL]
    boastful = replace(first, inputs=replace(first.inputs, targets=(0,)))  # no pair, nothing to tell
    found = problems(Corpus({SMALL: (boastful, *others)}), [SMALL], processes=1)
    fault = next(iter(first.kills["detr"]))
    assert f"{SMALL}, detr: {in_line(boastful.inputs)} does not kill {fault}" in found


def test_faults_without_a_case_and_cases_without_a_fault_are_named():
    inputs = Recipe(1, (1,), 2)
    found = problems(Corpus({SMALL: (Stored(inputs, {}),)}), [SMALL], processes=1)
    assert f"{SMALL}: {in_line(inputs)} kills nothing; drop it" in found
    fault = faults_on(SMALL, "dino")[0].id
    assert f"{SMALL}, dino: no stored case kills {fault}: run detr-conformance corpus --add {SMALL}" in found


def test_few_small_cases_are_chosen():
    big, small, other = (Duel("class", seed) for seed in range(3))
    outcomes = (
        Outcome(big, 1000, {"a": 1e3, "b": 1e3}),
        Outcome(small, 10, {"a": 1e3, "b": 1e3}, frozenset({("a", "b")})),
        Outcome(other, 10, {"a": 1e3}),
    )
    twice = Searched(outcomes + tuple(replace(outcomes[1], inputs=Duel("all", seed)) for seed in range(2)), {}, {})
    assert [one.inputs for one in chosen(twice, (), ())] == [Duel("class", 1), Duel("all", 1), Duel("all", 0)]
    kept = chosen(twice, [in_line(big)], ())
    assert big in [one.inputs for one in kept]
    assert len(kept) == 3


def test_what_is_found_joins_what_is_stored():
    first = corpus().cases[SMALL][0]
    fault = faults_on(SMALL, "dino")[0].id
    small, gone = Recipe(7, (1,), 1), Recipe(8, (1,), 1)
    found = {
        (SMALL, "dino"): Searched((Outcome(small, 6, {fault: 9.0}), Outcome(first.inputs, 99, {fault: 9.0})), {}, {})
    }
    new = extended(Corpus({SMALL: (replace(first, kills={}), Stored(gone, {"dino": ("no such fault",)}))}), found)
    assert [(one.inputs, one.kills) for one in new.cases[SMALL]] == [
        (small, {"dino": (fault,)}),
        (first.inputs, {"dino": (fault,)}),
    ]


def test_the_page_has_every_fault_the_hardest_first():
    every, text = rows(corpus()), page(corpus())
    shares = [row.share for row in every]
    assert shares == sorted(shares, reverse=True)
    assert all(f"`{row.fault.id}`" in text for row in every)
    hard = Row(every[0].fault, {"dino": 4}, {"dino": (599, 600)})
    assert hard.cell("dino") == "99 % · 4"
    assert hard.cell("detr") == ""


def test_the_command_prints_a_table_and_names_what_it_does_not_know():
    result = run(app, ["corpus", SMALL])
    assert result.exit_code == 0
    assert faults_on(SMALL, "dino")[0].id in result.output
    result = run(app, ["corpus", "permute"])
    assert result.exit_code == 4
    assert "did you mean 'permuted'" in result.output
