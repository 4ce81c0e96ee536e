"""What the README shows is what is printed."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from detr_conformance import judge
from detr_conformance.registry import checks, clauses, faults
from detr_conformance.report import terminal

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
CANDIDATE = "transformers-grounding-dino"


def block(kind: str) -> list[str]:
    found = re.search(rf"<!-- {kind}: {CANDIDATE} -->\n```\n(.*?)```\n<!-- end -->", README, re.S)
    assert found, kind
    return found.group(1).splitlines()


@pytest.fixture(scope="module")
def report():
    return judge(CANDIDATE)


@pytest.mark.skipif(not version("transformers").startswith("5.23."), reason="the README shows transformers 5.23")
def test_the_failure_is_the_printed_one(report):
    finding = next(f for f in report.failed if f.clause == "TOKEN-4")
    printed, shown = finding.message.splitlines(), block("printed")
    # how far an input is shrunk may depend on the machine's speed; all the rest may not
    for field in ("TOKEN-4", "      quantity", "      looks like", "      rerun"):
        strip = re.compile(r"\d+")
        pick = [next(strip.sub("#", x) for x in lines if x.startswith(field)) for lines in (printed, shown)]
        assert pick[0] == pick[1]


@pytest.mark.skipif(not version("transformers").startswith("5.23."), reason="the README shows transformers 5.23")
def test_the_screen_is_the_printed_one(report):
    shown = terminal.text(report, 100)
    assert "\n".join(block("screen")) in shown


def test_the_numbers_of_the_proof_are_those_of_the_declarations():
    shown = re.search(r"<!-- prove -->(.*?)<!-- end -->", README, re.S).group(1)
    pairs = sum(len(f.profiles) for f in faults() if f.check.on.since != "deep")
    assert f"{len(clauses())} clauses, {len(checks())} checks, {len(faults())} faults" in shown
    assert f"{pairs} of {pairs} faults × profiles caught" in shown
