"""The console command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from detr_conformance.cli import app
from detr_conformance.registry import checks, clauses, faults

run = CliRunner().invoke
SPEC = Path(__file__).parent.parent / "docs" / "SPEC.md"


def test_explain_prints_a_clause_with_a_worked_number():
    result = run(app, ["explain", "NORM-1"])
    assert result.exit_code == 0
    for words in ("Σ_pairs |Δ|₁ / nb", "l1-with-its-default-mean", "right     ", "wrong     "):
        assert words in result.output


def test_explain_refuses_what_it_does_not_know_with_the_nearest_clause():
    result = run(app, ["explain", "BOX2"])
    assert result.exit_code == 4
    assert "did you mean 'BOX-2'" in result.output


@pytest.mark.parametrize("words", [["cli", "explain"], ["cli", "prove", "--fast"], ["fixtures", "show"]])
def test_wrong_use_ends_with_4(words):
    module, *given = words
    run_it = "import detr_fixtures.__main__ as m" if module == "fixtures" else "import detr_conformance.cli as m"
    ran = subprocess.run([sys.executable, "-c", f"{run_it}; m.main()", *given], capture_output=True, text=True)
    assert ran.returncode == 4, ran.stderr
    assert "Usage: " in ran.stderr


def test_the_specification_page_is_up_to_date():
    assert run(app, ["spec", "--check", "--path", str(SPEC)]).exit_code == 0


def test_the_specification_page_has_every_clause_check_and_fault():
    page = SPEC.read_text("utf-8")
    for name in [
        *(f"### {c.id}\n" for c in clauses()),
        *(c.name.replace("_", " ") for c in checks()),
        *(f"`{f.id}`" for f in faults()),
    ]:
        assert name in page


def test_a_stale_page_is_shown_and_left_alone(tmp_path):
    stale = tmp_path / "SPEC.md"
    stale.write_text("old\n")
    result = run(app, ["spec", "--check", "--path", str(stale)])
    assert result.exit_code == 1
    assert "is not up to date" in result.output
    assert stale.read_text() == "old\n"
