"""pytest as the door: options, collection, exit statuses, screen, workers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FAST = ("--conformance-effort=quick", "--clause=KEY", "--clause=NORM-5")


@pytest.fixture
def run(pytester, monkeypatch):
    """pytest in an empty folder, in a process of its own, with tests/candidates.py importable."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def printed(result) -> str:
    return "\n".join([*result.outlines, *result.errlines])


# --- nothing without a candidate ---


def test_importing_the_plugin_loads_neither_torch_nor_hypothesis():
    code = (
        "import sys, detr_conformance.plugin, detr_conformance; print(sorted({'torch', 'hypothesis'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_without_a_candidate_nothing_happens(pytester, run):
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'torch' not in sys.modules")
    result = run("-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1)
    assert "detr-conformance" not in "\n".join(result.outlines[5:])


# --- exit statuses ---


def test_a_right_criterion_ends_with_0(run):
    result = run("--candidate=detr_reference.criterion", *FAST)
    assert result.ret == 0
    assert "detr, must: CONFORMANT" in printed(result)


def test_a_wrong_criterion_ends_with_1_and_the_clause(run):
    result = run("--candidate=candidates:returns_vectors", "--conformance-profile=detr", *FAST)
    assert result.ret == 1
    out = printed(result)
    assert "NOT CONFORMANT" in out
    assert "KEY-2  Every trained loss is a real scalar tensor" in out
    assert "rerun       pytest --candidate=candidates:returns_vectors --clause=KEY-2" in out


def test_a_miswired_criterion_ends_with_1_and_nothing_is_judged(run):
    result = run("--candidate=candidates:returns_odd_names", "--conformance-profile=detr", *FAST)
    assert result.ret == 1
    assert "map them with Candidate" in printed(result)
    assert "NOTHING WAS JUDGED" in printed(result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--candidate=no_such_module"], "there is no module 'no_such_module'"),
        (["--candidate=detr_reference.criterion", "--clause=BOX2"], "did you mean 'BOX-2'"),
        (["--candidate=detr_reference.criterion", "--conformance-effort=fast"], "unknown effort 'fast'"),
        (
            ["--candidate=detr_reference.criterion", "--conformance-seed=one"],
            "--conformance-seed=one: it must be a number",
        ),
        (["--candidate=detr_reference.criterion", "--conformance-limit=-1"], "it must be a positive number"),
        (["--candidate=candidates:not_callable"], "is a int, not a callable"),
    ],
)
def test_a_wrong_use_ends_with_4_and_one_sentence(run, arguments, words):
    result = run(*arguments)
    assert result.ret == 4
    assert words in printed(result)
    assert "Traceback" not in printed(result)


def test_a_wrong_use_ends_before_any_worker_starts(run):
    result = run("--candidate=no_such_module", "-n", "2")
    assert result.ret == 4
    assert "there is no module 'no_such_module'" in printed(result)
    assert "Traceback" not in printed(result)


def test_nothing_judged_ends_with_5(run):
    result = run("--candidate=transformers-detr", "--clause=KEY-4", "--conformance-effort=quick")
    assert result.ret == 5
    assert "NOTHING WAS JUDGED" in printed(result)


def test_a_bug_of_ours_ends_with_3_and_says_so(pytester, run):
    pytester.makeconftest(
        """
        from dataclasses import replace
        from detr_conformance import registry

        registry.checks()
        name = "the_trained_losses_have_their_names"
        def broken(seen):
            raise ZeroDivisionError("in our own check")
            yield
        registry._checks[name] = replace(registry._checks[name], judge=broken)
        """
    )
    result = run("--candidate=detr_reference.criterion", "--clause=KEY-1", "--conformance-effort=quick")
    assert result.ret == 3
    assert "this is a bug in the suite" in printed(result)


# --- collection ---


def test_without_paths_only_the_contract_is_collected(pytester, run):
    pytester.makepyfile("def test_of_their_own():\n    pass")
    alone = run("--candidate=detr_reference.criterion", *FAST, "--collect-only", "-q")
    both = run("--candidate=detr_reference.criterion", *FAST, "--collect-only", "-q", ".")
    assert "test_of_their_own" not in printed(alone)
    assert "test_of_their_own" in printed(both)
    assert "KEY-1-the_trained_losses_have_their_names" in printed(alone)
    assert "CONFORMANT" not in printed(alone)


def test_several_candidates_are_judged_in_one_run(run):
    result = run("--candidate=detr_reference.criterion", "--candidate=transformers-detr", *FAST)
    assert result.ret == 0
    assert printed(result).count("detr, must: CONFORMANT") == 2


def test_ini_options_have_the_same_names(pytester, run):
    pytester.makeini("[pytest]\nconformance_effort = quick\nconformance_profile = dino\n")
    result = run("--candidate=detr_reference.criterion", "--clause=KEY-1")
    assert result.ret == 0
    assert "dino, must: CONFORMANT" in printed(result)


# --- workers ---


def verdicts(result) -> list[str]:
    """The screen from the candidate to the verdict: what follows are pytest's lines, in the order of arrival."""
    lines = printed(result).splitlines()
    first = next(i for i, x in enumerate(lines) if x.startswith("candidate  "))
    return lines[first : next(i for i, x in enumerate(lines) if "CONFORMANT  " in x) + 1]


@pytest.mark.parametrize("candidate", ["detr_reference.criterion", "candidates:detached"])
def test_the_verdict_is_that_of_any_number_of_workers(run, candidate):
    arguments = [f"--candidate={candidate}", "--conformance-profile=detr", "--conformance-effort=quick"]
    arguments += [f"--clause={chapter}" for chapter in ("MATCH", "BOX", "GRAD", "KEY")]
    one, two = run(*arguments), run(*arguments, "-n", "2")
    assert one.ret == two.ret
    assert verdicts(one) == verdicts(two)


# --- inside someone's own tests ---


def test_conformance_tests_are_one_test_a_check(pytester, run):
    pytester.makepyfile(
        """
        import detr_conformance

        test_right = detr_conformance.conformance_tests("detr_reference.criterion", effort="quick", clauses=["KEY"])
        test_wrong = detr_conformance.conformance_tests(
            "candidates:returns_vectors", profile="detr", effort="quick", clauses=["KEY-1", "KEY-2"]
        )
        """
    )
    result = run()
    result.assert_outcomes(passed=8, failed=1)
    assert "KEY-2  Every trained loss is a real scalar tensor" in printed(result)


# --- the screen ---


def test_piped_output_is_plain_text(run):
    assert "\x1b[" not in printed(run("--candidate=detr_reference.criterion", *FAST))


def test_colours_where_they_are_wanted(pytester, run, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[1;32mCONFORMANT" in printed(run("--candidate=detr_reference.criterion", *FAST, "--color=yes"))


def test_the_screen_of_a_right_criterion(run):
    out = printed(run("--candidate=detr_reference.criterion", "--conformance-effort=quick"))
    screen = out[out.index("candidate  ") :].rsplit("\n", 1)[0]
    want = """\
        candidate  detr_reference.criterion
        profile    detr (the default of its own argument 'profile') · level must ·
                   effort quick

          matching          right         10 of 10 checks
          matching costs    right         6 of 6 checks
          class loss        right         7 of 7 checks
          L1                right         5 of 5 checks
          GIoU              right         11 of 11 checks
          auxiliary layers  right         5 of 5 checks
          weights and keys  right         6 of 6 checks
          masks             right         7 of 7 checks
          gradients         right         6 of 6 checks
          side effects      right         4 of 4 checks
          devices           not judged    0 of 2 checks    declined DEVICE-1, DEVICE-2
          ranks             right         3 of 3 checks

        detr, must: CONFORMANT  57 of 57 clauses met · 2 declined
        not judged  DEVICE-1, DEVICE-2: no accelerator was asked for:
                    --conformance-device=auto takes what is there"""
    assert screen.rstrip() == textwrap.dedent(want)


def test_the_report_is_written_whole(pytester, run):
    import json

    run("--candidate=detr_reference.criterion", *FAST, "--conformance-report=out")
    (report,) = json.loads((pytester.path / "out" / "report.json").read_text("utf-8"))["reports"]
    assert report["conformant"]
    assert report["profile"] == "detr"
    assert {f["clause"] for f in report["findings"]} == {"NORM-5", *(f"KEY-{i}" for i in range(1, 7))}


def test_messages_fit_into_a_terminal_of_80_columns(run):
    out = printed(run("--candidate=candidates:detached", "--conformance-profile=detr", "--conformance-effort=quick"))
    message = out[out.index("GRAD-1  ") : out.index("rerun", out.index("GRAD-1  "))]
    assert max(map(len, message.splitlines())) <= 80


def test_a_working_directory_that_cannot_be_written_to_is_no_matter(pytester, run):
    os.chmod(pytester.path, 0o555)
    try:
        assert run("--candidate=detr_reference.criterion", *FAST).ret == 0
    finally:
        os.chmod(pytester.path, 0o755)
