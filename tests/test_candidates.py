"""From a string or object to a verdict: whatever the candidate is or does, never a crash of ours."""

from __future__ import annotations

import textwrap
import time

import pytest
import torch

import candidates
from detr_conformance import Candidate, CandidateError, ConformanceError, judge
from detr_conformance.candidate import bind, resolve

torch.set_num_threads(1)

FEW = {"effort": "quick", "clauses": ["KEY", "NORM-5"]}


def quick(candidate, **more):
    return judge(candidate, **{"profile": "detr", **FEW, **more})


# --- binding ---


@pytest.mark.parametrize(
    "spec",
    [
        "candidates",
        "candidates:nothing",
        "no_such_module",
        "no_such_module:attribute",
        "missing.py:attribute",
        3,
        "math",
    ],
)
def test_what_is_no_candidate_is_refused_in_one_sentence(spec):
    with pytest.raises(CandidateError) as error:
        resolve(spec)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_an_unknown_attribute_gets_the_nearest_known_one():
    with pytest.raises(CandidateError, match="did you mean 'returns_floats'"):
        resolve("candidates:return_floats")


def test_an_unknown_entry_point_gets_the_nearest_known_one():
    with pytest.raises(CandidateError, match="did you mean 'transformers-detr'"):
        resolve("transformer-detr")


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import torch\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CandidateError, match=r"cannot be imported: ZeroDivisionError"):
        resolve("broken_module")


def test_a_missing_dependency_of_the_candidate_is_not_taken_for_a_missing_candidate(tmp_path, monkeypatch):
    (tmp_path / "needs_dependency.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CandidateError, match=r"cannot be imported: ModuleNotFoundError: .*not_installed_anywhere"):
        resolve("needs_dependency")


def test_entry_point_module_attribute_and_file_are_found(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from detr_reference.criterion import build_criterion as mine\n")
    for spec in ("detr_reference.criterion", "detr_reference.criterion:build_criterion", f"{file}:mine"):
        assert bind(spec).profile == "detr"
    assert bind("transformers-grounding-dino").profile == "grounding-dino"


def test_a_factory_that_needs_what_we_do_not_know_is_refused():
    with pytest.raises(CandidateError, match="needs 'backbone'"):
        bind(candidates.needs_more)


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (candidates.unknown_profile, "did you mean 'detr'"),
        (candidates.unknown_option, "unknown option 'giou_epsilon'"),
        (Candidate(3), "int is not callable"),  # type: ignore[arg-type]
    ],
)
def test_a_candidate_declared_wrongly_is_refused(candidate, words):
    with pytest.raises(CandidateError, match=words):
        bind(candidate)


@pytest.mark.parametrize(
    ("factory", "profile"),
    [
        (lambda num_classes=91, eos_coef=0.1: None, "detr"),
        ("transformers-deformable-detr", "deformable-detr"),
    ],
)
def test_the_profile_is_declared_or_guessed_and_said(factory, profile):
    bound = bind(factory)
    assert bound.profile == profile
    assert bound.profile_from


def test_detr_shaped_modules_are_bound_by_argument_names(tmp_path):
    file = tmp_path / "detr_shaped.py"
    file.write_text(
        textwrap.dedent(
            """
            from detr_reference.criterion import build_criterion as inner

            class HungarianMatcher:
                def __init__(self, cost_giou=2, cost_bbox=5, cost_class=1):
                    self.costs = dict(set_cost_class=cost_class, set_cost_bbox=cost_bbox, set_cost_giou=cost_giou)

            class SetCriterion:
                def __init__(self, losses, eos_coef, weight_dict, matcher, num_classes):
                    self.inner = inner(num_classes, 6, "detr", eos_coef=eos_coef, **matcher.costs)
                    self.matcher, self.weight_dict = self.inner.matcher, weight_dict

                def __call__(self, outputs, targets):
                    return self.inner(outputs, targets)
            """
        )
    )
    report = judge(str(file), effort="quick")
    assert report.conformant, [f.message for f in report.failed]
    assert report.finding("KEY-4").verdict == "declined"


def test_a_criterion_itself_or_a_plain_function_can_be_judged():
    for candidate in (candidates.a_criterion, candidates.plain_function):
        report = judge(candidate, profile="detr", effort="quick")
        assert report.conformant, [f.message for f in report.findings if f.verdict != "pass"]


def test_the_form_that_the_project_started_from_is_bound():
    assert judge(candidates.seed_form, profile="grounding-dino", effort="quick").conformant


# --- smoke: what is mis-wired is named ---


def test_wrong_names_are_named_with_the_way_to_map_them():
    report = quick(candidates.returns_odd_names)
    message = report.findings[0].message
    assert report.findings[0].check == "smoke"
    assert "loss_box" in message
    assert "rename={" in message
    assert "'loss_box': 'loss_bbox'" in message
    assert not report.conformant
    assert {f.verdict for f in report.findings[1:]} == {"blocked"}


def test_renamed_losses_are_judged():
    assert quick(candidates.renamed).conformant


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "RuntimeError: no kernel for this"),
        ("exits", "SystemExit: 3"),
        ("returns_a_list", "returned a list, not a dict"),
        ("returns_nothing", "returned None, not a dict"),
        ("ends", "ended the process with exit status 7 (going down)"),
    ],
)
def test_a_candidate_that_cannot_be_called_gets_a_verdict(name, words):
    report = quick(getattr(candidates, name))
    assert words in report.findings[0].message
    assert not report.conformant


def test_a_hang_is_ended_and_named():
    start = time.monotonic()
    report = quick(candidates.hangs, limit=3)
    assert "did not return within 3 s" in report.findings[0].message
    assert time.monotonic() - start < 60


# --- verdicts about hostile candidates ---


def test_a_hang_on_some_inputs_only_is_one_finding():
    report = quick(candidates.hangs_without_targets, limit=3, clauses=["KEY", "MATCH-5", "MATCH-1"])
    assert "did not return within 3 s" in report.finding("MATCH-5").message
    assert report.finding("KEY-1").verdict == "pass"
    assert report.finding("MATCH-1").verdict == "blocked"


def test_the_end_of_the_process_on_some_inputs_only_is_one_finding():
    report = quick(candidates.ends_without_targets, clauses=["KEY", "MATCH-5"])
    assert "ended the process with exit status 7 (going down)" in report.finding("MATCH-5").message
    assert report.finding("KEY-1").verdict == "pass"


@pytest.mark.parametrize(
    ("name", "clause", "words"),
    [
        ("returns_floats", "KEY-2", "a float"),
        ("returns_vectors", "KEY-2", "a tensor of shape [3]"),
        ("returns_nan", "NORM-5", "nan"),
    ],
)
def test_rubbish_is_a_verdict(name, clause, words):
    report = quick(getattr(candidates, name))
    assert words in report.finding(clause).message
    assert not report.conformant


def test_losses_without_gradient_are_found():
    report = quick(candidates.detached, clauses=["GRAD"])
    assert {f.clause for f in report.failed} >= {"GRAD-1", "GRAD-2", "GRAD-5"}


def test_endless_output_harms_nobody(capfd):
    assert quick(candidates.shouts).conformant
    assert "loss!" not in capfd.readouterr().out


# --- arguments of judge ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"profile": "detrr"}, "unknown profile 'detrr'.*did you mean 'detr'"),
        ({"level": "shuld"}, "unknown level 'shuld'.*did you mean 'should'"),
        ({"effort": "fast"}, "unknown effort 'fast'; it must be one of quick, standard, deep"),
        ({"device": "cudda"}, "unknown device 'cudda'; .* auto, cpu, cuda, mps, xpu; did you mean 'cuda'"),
        ({"clauses": ["BOX2"]}, "unknown clause 'BOX2'; did you mean 'BOX-2'"),
        ({"limit": 0}, "limit=0; it must be a positive number"),
    ],
)
def test_wrong_arguments_are_named_with_the_nearest_right_one(arguments, words):
    with pytest.raises(ConformanceError, match=words):
        judge("detr_reference.criterion", **arguments)


def test_the_verdict_is_the_same_every_time():
    one, two = (judge("detr_reference.criterion", effort="standard", clauses=["MATCH-1", "BOX-2"]) for _ in "ab")
    assert one == two
    assert one.to_dict()["conformant"]
