"""Repro scripts: each exits with 1 against the fault that it was written for, and with 0 against the reference."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from detr_conformance import repro, runner, standalone
from detr_conformance.findings import Finding
from detr_conformance.registry import faults
from detr_conformance.runner import Judge, Settings

# a fault of each kind: what is looked at, and in which profile
KINDS = [
    ("l1-on-corners", "detr", "loss"),
    ("class-loss-averaged-over-channels", "dino", "loss"),
    ("losses-returned-weighted", "detr", "loss"),
    ("targets-served-in-order", "detr", "matching"),
    ("no-encoder-losses", "deformable-detr", "key"),
    ("mask-losses-of-auxiliary-layers", "detr", "no key"),
    ("suffixed-losses-without-a-weight", "dino", "weight"),
    ("box-loss-counted-twice", "detr", "total"),
    ("losses-have-one-dimension", "detr", "scalar"),
    ("giou-without-gradient-of-sides", "detr", "gradient"),
    ("class-gradient-on-matched-queries-only", "grounding-dino", "gradient"),
]
# what one call cannot show
NONE = [("losses-depend-on-random-numbers", "detr"), ("no-losses-without-targets", "detr")]

CANDIDATES = """
import functools

from detr_conformance import Candidate
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.registry import faults
from detr_reference.criterion import build_criterion
from detr_reference.textbook import textbook

for fault in faults():
    for profile in fault.profiles:
        name = f"{fault.id}_{profile}".replace("-", "_")
        globals()[name] = candidate_of(fault.apply(textbook), profile, name)
for profile in ("detr", "deformable-detr", "dino", "grounding-dino"):
    build = functools.partial(build_criterion, profile=profile)
    globals()["right_" + profile.replace("-", "_")] = Candidate(build, profile)


def raises(num_classes=91, num_decoder_layers=6, eos_coef=0.1):
    def criterion(outputs, targets):
        raise RuntimeError("no kernel for this")

    return criterion
"""
RUN_ALL = """
import contextlib, io, json, runpy, sys

found = []
for script, candidate in json.loads(sys.argv[1]):
    sys.argv[1:] = [candidate] if candidate else []
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        found.append([end.code, said.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Without a diagnosis and without a guess at options, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Diagnoser, "diagnose", lambda *_: None)
        patch.setattr(runner, "explaining", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file of candidates: every known fault in every profile, and the reference."""
    there = tmp_path_factory.mktemp("repro")
    (there / "wrong_ones.py").write_text(CANDIDATES)
    return there


def spec(folder: Path, name: str, profile: str = "") -> str:
    return f"{folder}/wrong_ones.py:" + f"{name}_{profile}".strip("_").replace("-", "_")


def failing(folder: Path, fault: str, profile: str) -> Finding:
    check = next(f.check for f in faults() if f.id == fault)
    judge = Judge(spec(folder, fault, profile), Settings(effort="quick", level="should"))
    return judge.finding(check.name)


@pytest.fixture(scope="module")
def scripts(folder):
    """By fault and profile, the finding with its script."""
    return {
        (fault, profile): repro.written(failing(folder, fault, profile), spec(folder, fault, profile), profile, folder)
        for fault, profile, _ in KINDS
    }


@pytest.fixture(scope="module")
def ends(folder, scripts):
    """By fault and profile, how its script ends and what it prints: against the fault, and against the reference."""
    runs = [(f.repro, c) for (_, p), f in scripts.items() for c in ("", spec(folder, "right", p))]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(runs)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {key: found[2 * i : 2 * i + 2] for i, key in enumerate(scripts)}


@pytest.mark.parametrize(("fault", "profile", "kind"), KINDS)
def test_a_script_fails_against_the_fault_and_passes_against_the_reference(scripts, ends, fault, profile, kind):
    finding = scripts[fault, profile]
    assert finding.evidence.repeat.kind == kind
    (wrong, said), (right, other) = ends[fault, profile]
    assert wrong == 1, said
    assert "WRONG" in said
    assert right == 0, other


def test_a_script_is_run_as_the_message_says(scripts):
    finding = scripts["l1-on-corners", "detr"]
    line = next(x for x in finding.message.splitlines() if x.startswith("      repro "))
    assert line.split()[1:] == ["python", finding.repro]
    assert finding.message.index("      repro ") < finding.message.index("      rerun ")
    done = subprocess.run([sys.executable, finding.repro], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "loss_bbox"
    assert done.stdout.splitlines()[-1] == "WRONG"


def test_a_script_imports_nothing_of_the_suite():
    tree = ast.parse(Path(standalone.__file__).read_text("utf-8"))
    named = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    named |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {"numpy", "torch"}
    assert {n.split(".")[0] for n in named} - ours <= sys.stdlib_module_names


def test_a_script_says_what_it_shows(scripts):
    text = Path(scripts["l1-on-corners", "detr"].repro).read_text("utf-8")
    assert text.startswith("# NORM-1 (must): loss_bbox = Σ_pairs |Δ|₁ / nb")
    assert "# loss_bbox: want " in text
    assert "exit status 1 while the criterion is wrong, 0 once it is right" in text


@pytest.mark.parametrize(("fault", "profile"), NONE)
def test_what_one_call_cannot_show_has_no_script(folder, fault, profile):
    finding = failing(folder, fault, profile)
    assert finding.verdict == "fail"
    again = repro.written(finding, spec(folder, fault, profile), profile, folder)
    assert again == finding
    assert "      rerun " in again.message


def test_a_candidate_that_raises_has_a_script(folder):
    judge = Judge(spec(folder, "raises"), Settings(profile="detr", effort="quick"))
    finding = judge.finding("the_trained_losses_have_their_names")
    assert finding.evidence.repeat.kind == "returns"
    script = repro.written(finding, spec(folder, "raises"), "detr", folder).repro
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "raised RuntimeError: no kernel for this" in done.stdout


def test_a_live_object_has_no_script(scripts, tmp_path):
    finding = replace(scripts["l1-on-corners", "detr"], repro="")
    assert repro.written(finding, "", "detr", tmp_path) == finding


@pytest.mark.parametrize("shape", ["build_criterion", "detr_shaped", "renamed", "a_criterion"])
def test_a_script_binds_a_candidate_as_the_suite_does(scripts, tmp_path, monkeypatch, shape, capsys):
    (tmp_path / f"{shape}.py").write_text(SHAPES[shape])
    script = scripts["l1-on-corners", "detr"].repro
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [script, f"{tmp_path}/{shape}.py" + TAILS.get(shape, "")])
    found = runpy.run_path(script)
    assert found["main"]() == 0, capsys.readouterr().out


TAILS = {"renamed": ":candidate", "a_criterion": ":criterion"}
SHAPES = {
    "build_criterion": "from detr_reference.criterion import build_criterion\n",
    "detr_shaped": """
from detr_reference import criterion as ours

class HungarianMatcher:
    def __init__(self, cost_class, cost_bbox, cost_giou):
        self.costs = {"set_cost_class": cost_class, "set_cost_bbox": cost_bbox, "set_cost_giou": cost_giou}

class SetCriterion:
    def __init__(self, num_classes, matcher, weight_dict, eos_coef, losses):
        self.inner = ours.build_criterion(num_classes, 6, "detr", eos_coef=eos_coef, **matcher.costs)

    def forward(self, outputs, targets):
        return self.inner(outputs, targets)

    __call__ = forward
""",
    "renamed": """
from detr_conformance import Candidate
from detr_reference.criterion import build_criterion

def build(num_classes, num_decoder_layers):
    inner = build_criterion(num_classes, num_decoder_layers, "detr")
    return lambda outputs, targets: {k.replace("bbox", "box"): v for k, v in inner(outputs, targets).items()}

candidate = Candidate(build, "detr", rename={"loss_box": "loss_bbox"})
""",
    "a_criterion": """
from detr_reference.criterion import build_criterion

inner = build_criterion(1, 6, "detr")

def criterion(outputs, targets):
    return inner(outputs, targets)
""",
}
