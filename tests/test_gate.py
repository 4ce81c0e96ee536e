"""The gate: a repository that judges its own criterion, the files that run it, and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detr_conformance.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "own-criterion"
TESTS = ROOT / "tests"
QUICK = ("--conformance-effort=quick", "--clause=NORM-1")
run = CliRunner().invoke


# --- the example repository ---


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the example, importable with its entry points as if pip had installed it."""
    there = tmp_path_factory.mktemp("own") / "own-criterion"
    shutil.copytree(EXAMPLE, there, ignore=shutil.ignore_patterns("__pycache__", "conformance-report"))
    points = tomllib.loads((there / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    installed = there / "src" / "own_criterion-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own-criterion\nVersion: 0.1\n")
    text = "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in points.items())
    (installed / "entry_points.txt").write_text(text)
    return there


def gate(repository: Path, *arguments: str, today: str = "2026-12-01", **environment: str):
    """pytest in the repository, in a process of its own."""
    own = {"PYTHONPATH": f"{repository}/src", "DETR_CONFORMANCE_TODAY": today, "NO_COLOR": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=repository, env={**os.environ, **own, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_right_criterion_is_green(repository):
    done = gate(repository, "--candidate=own", "--conformance-effort=quick")
    assert done.returncode == 0, done.stdout
    assert "detr, must: CONFORMANT  " in done.stdout


def test_the_wrong_criterion_is_red_with_its_clause_and_diagnosis(repository):
    done = gate(repository, "--candidate=own-wrong", "--conformance-ledger=", *QUICK, "--conformance-report=out")
    assert done.returncode == 1
    assert "detr, must: NOT CONFORMANT" in done.stdout
    assert 'looks like  l1-with-its-default-mean "F.l1_loss with its default mean' in done.stdout
    lines = [x for x in done.stdout.splitlines() if x.startswith("      repro ")]
    assert len(lines) == 1, done.stdout
    script = lines[0].split()[2]
    for candidate, status in (((), 1), (("own_criterion",), 0)):
        repro = [sys.executable, script, *candidate]
        path = {**os.environ, "PYTHONPATH": "src"}
        assert subprocess.run(repro, cwd=repository, env=path, capture_output=True, check=False).returncode == status


def test_after_its_last_day_it_is_red_again(repository):
    done = gate(repository, "--candidate=own-wrong", *QUICK, today="2027-03-02")
    assert done.returncode == 1
    assert "deviations.toml:4: expired: NORM-1 l1-with-its-default-mean was accepted until 2027-03-01" in (
        " ".join(done.stdout.split())
    )


def test_an_entry_that_is_no_longer_needed_makes_it_red(repository):
    stale = repository / "stale.toml"
    text = (repository / "deviations.toml").read_text("utf-8")
    stale.write_text(text.replace('candidate = "own-wrong"', 'effort = "quick"'))
    done = gate(repository, "--candidate=own", "--conformance-ledger=stale.toml", *QUICK)
    assert done.returncode == 1
    assert "stale.toml:4: stale: NORM-1 l1-with-its-default-mean no longer happens" in " ".join(done.stdout.split())


def test_a_wrong_ledger_is_a_wrong_use(repository):
    (repository / "bad.toml").write_text('[[deviation]]\nclause = "NORM1"\n')
    done = gate(repository, "--candidate=own", "--conformance-ledger=bad.toml")
    assert done.returncode == 4
    assert "bad.toml:2: unknown clause 'NORM1'; did you mean 'NORM-1'?" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_the_ledger_is_the_same_for_workers_side_by_side(repository):
    done = gate(repository, "--candidate=own-wrong", *QUICK, "-n", "2")
    assert done.returncode == 0, done.stdout
    assert "CONFORMANT WITH 1 DEVIATION" in done.stdout


@pytest.mark.slow
def test_the_example_works_as_a_wheel_in_an_environment_of_its_own(tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", environment], check=True)
    python = environment / "bin" / "python"
    # the packages of the environment that these tests run in, and no index
    paths = [p for p in sys.path if p.endswith("site-packages")]
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "outer.pth").write_text("\n".join(paths))
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, str(ROOT), str(EXAMPLE)], check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [python, "-m", "pytest", "--candidate=own", "-p", "no:cacheprovider", *QUICK], cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# --- the files that run the gate ---


def steps() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    assert action["runs"]["using"] == "composite"
    return {step["name"]: step for step in action["runs"]["steps"]} | {"inputs": action["inputs"]}


def test_the_action_runs_the_gate_and_a_ledger_entry_makes_it_green(repository, tmp_path):
    script = tmp_path / "judge.sh"
    script.write_text(steps()["Judge"]["run"].replace("python -m pytest", f"{sys.executable} -m pytest {QUICK[1]}"))
    inputs = {"CANDIDATE": "own-wrong", "PROFILE": "detr", "LEVEL": "must", "EFFORT": "quick",
              "LEDGER": "deviations.toml", "REPORT": "kept"}  # fmt: skip
    summary = tmp_path / "summary.md"
    own = {"PYTHONPATH": f"{repository}/src", "DETR_CONFORMANCE_TODAY": "2026-12-01"}
    environment = {**os.environ, **inputs, **own, "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(
        ["bash", "-e", str(script)], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    said = " ".join(done.stdout.split())
    assert "detr, must: CONFORMANT WITH 1 DEVIATION" in said
    assert "NORM-1 l1-with-its-default-mean · not-yet until 2027-03-01: models in the field" in said
    assert "1 xfailed" in said
    found = json.loads((repository / "kept" / "report.json").read_text("utf-8"))
    assert [r["candidate"] for r in found["reports"]] == ["own-wrong"]
    assert "NORM-1" in summary.read_text("utf-8")


def test_the_action_hands_every_input_over_by_the_environment():
    found = steps()
    inputs = found.pop("inputs")
    used = " ".join(str(step.get("env", "")) + str(step.get("with", "")) for step in found.values())
    for name in inputs:
        assert f"inputs.{name} " in used
    # text that a workflow hands in must never become part of a script
    assert not any("${{" in step.get("run", "") for step in found.values() if "run" in step)


def test_the_hook_and_the_workflows_are_yaml():
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert hooks[0]["entry"] == "detr-conformance smoke"
    assert hooks[0]["pass_filenames"] is False
    for path in (".github/workflows/conformance.yml", ".gitlab-ci.yml", ".pre-commit-config.yaml"):
        assert yaml.safe_load((EXAMPLE / path).read_text("utf-8"))


# --- smoke, init, replay ---


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty repository with the example's modules and the tests' candidates importable."""
    monkeypatch.chdir(tmp_path)
    for path in (TESTS, EXAMPLE / "src"):
        monkeypatch.syspath_prepend(str(path))
    return tmp_path


def test_smoke_says_that_the_wiring_holds(own):
    result = run(app, ["smoke", "own_criterion", "--profile", "detr"])
    assert result.exit_code == 0, result.output
    assert "profile   detr (given)" in result.output
    assert "call      ok  returns the losses" in result.output


def test_smoke_names_what_is_miswired(own):
    result = run(app, ["smoke", "candidates:returns_odd_names", "--profile", "detr", "--json"])
    assert result.exit_code == 1
    [found] = json.loads(result.output)
    assert not found["ok"]
    assert "map them with Candidate" in " ".join(found["said"])


@pytest.mark.parametrize("arguments", [["no_such_module"], ["own_criterion:nope"], ["own_criterion", "--profile=det"]])
def test_smoke_refuses_what_is_not_there(own, arguments):
    result = run(app, ["smoke", *arguments])
    assert result.exit_code == 4
    assert result.output.startswith("error: ")


def test_init_writes_a_ledger_and_a_workflow_that_the_gate_takes(own):
    (own / "pyproject.toml").write_text("")
    result = run(app, ["init", "own_criterion"])
    assert result.exit_code == 0, result.output
    workflow = (own / ".github" / "workflows" / "conformance.yml").read_text("utf-8")
    assert "pip install . detr-conformance" in workflow
    assert (
        "pytest --candidate=own_criterion --conformance-profile=detr --conformance-ledger=deviations.toml" in workflow
    )
    assert run(app, ["ledger", "check", "deviations.toml"]).exit_code == 0
    assert not (own / "conformance_candidate.py").exists()


def test_init_never_overwrites(own):
    (own / "deviations.toml").write_text("format = 1\n")
    result = run(app, ["init", "own_criterion", "--ci", "gitlab", "--json"])
    assert json.loads(result.output)["files"] == {"deviations.toml": "kept", ".gitlab-ci.yml": "wrote"}
    assert (own / "deviations.toml").read_text("utf-8") == "format = 1\n"


def test_init_writes_a_candidate_that_maps_the_names(own):
    (own / "mine.py").write_text(
        "from candidates import returns_odd_names\n"
        "def build_criterion(num_classes=91, num_decoder_layers=6, eos_coef=0.1):\n"
        "    return returns_odd_names(num_classes, num_decoder_layers, eos_coef)\n"
    )
    result = run(app, ["init", "mine", "--ci", "none"])
    assert result.exit_code == 0, result.output
    assert '"loss_box": "loss_bbox"' in (own / "conformance_candidate.py").read_text("utf-8").replace("'", '"')
    assert run(app, ["smoke", "conformance_candidate:candidate"]).exit_code == 0


def test_init_writes_a_stub_where_it_cannot_bind(own):
    result = run(app, ["init", "candidates:needs_more", "--ci", "none"])
    assert result.exit_code == 0, result.output
    text = (own / "conformance_candidate.py").read_text("utf-8")
    assert "the factory needs 'backbone'" in " ".join(text.split())
    compile(text, "conformance_candidate.py", "exec")


def test_init_refuses_a_module_that_is_not_there(own):
    result = run(app, ["init", "no_such_module"])
    assert result.exit_code == 4
    assert not list(own.iterdir())


def test_replay_says_what_still_differs(own, repository):
    report = repository / "out" / "report.json"
    if not report.is_file():
        gate(repository, "--candidate=own-wrong", "--conformance-ledger=", *QUICK, "--conformance-report=out")
    still = run(app, ["replay", str(report), "NORM-1", "--candidate", "own_criterion.wrong"])
    assert still.exit_code == 1, still.output
    assert "still wrong" in still.output
    assert "0 of 1 right now" in still.output
    mended = run(app, ["replay", str(report), "--candidate", "own_criterion", "--json"])
    assert mended.exit_code == 0, mended.output
    assert [o["outcome"] for o in json.loads(mended.output)] == ["right now"]
    unknown = run(app, ["replay", str(report), "NORM2"])
    assert unknown.exit_code == 4
    assert "did you mean 'NORM-1'" in unknown.output


def test_replay_refuses_what_is_no_report(own):
    (own / "report.json").write_text("{}")
    assert run(app, ["replay", "report.json"]).exit_code == 4
