"""What was really run where: judges the same criterions in this environment and records it in docs/compatibility.md.

    tox exec -e py310-torch2.4-lowest -- python tests/compatibility.py py310-torch2.4-lowest --tests
    python tests/compatibility.py --check                          the page is that of the records
    python tests/compatibility.py py310-torch2.4-lowest --check    and who is judged here is judged as recorded

``--tests`` runs the project's own tests as well and records pytest's closing line.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detr_conformance import judge
from detr_reference.options import PROFILES
from zoo import WRONG

RECORDS = Path(__file__).parent.parent / "docs" / "compatibility.json"
PAGE = RECORDS.with_suffix(".md")
PACKAGES = ("torch", "numpy", "scipy", "hypothesis", "pytest", "transformers")
PUBLISHED = ("transformers-detr", "transformers-deformable-detr", "transformers-grounding-dino")
MISTAKES = ("detr/giou-on-cxcywh", "deformable-detr/focal-matched-only", "grounding-dino/mask-of-first-image")


def candidates():
    """Who is judged: name, candidate, profile and level."""
    for profile in PROFILES:
        yield f"reference, {profile}", "detr_reference.criterion", profile, "should"
    for name in PUBLISHED:
        yield name, name, None, "must"
    for wrong in WRONG:
        if wrong.id in MISTAKES:
            yield f"mistake {wrong.id}", wrong.factory, wrong.profile, "must"


def verdict(candidate, profile, level):
    """``conformant``, or the broken clauses."""
    report = judge(candidate, profile=profile, level=level, effort="quick")
    return "conformant" if report.conformant else " ".join(sorted({f.clause for f in report.failed})) or "not judged"


def tests():
    """The closing line of the project's tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-q"], capture_output=True, text=True, check=False
    )
    return re.sub(r" in [\d.]+s.*", "", done.stdout.strip().splitlines()[-1]).strip("= ")


def record(environment, with_tests):
    """Judge all, and put it beside what other environments found."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "—"
    found["verdicts"] = {name: verdict(*how) for name, *how in candidates()}
    every = records()
    if with_tests:
        found["tests"] = tests()
    elif "tests" in every.get(environment, {}):
        found["tests"] = every[environment]["tests"]
    every[environment] = found
    RECORDS.write_text(json.dumps(dict(sorted(every.items())), indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(every), "utf-8")


def problems(environment):
    """What is not as recorded: the page, and the verdicts here, where an environment is named."""
    every = records()
    found = [] if PAGE.read_text("utf-8") == page(every) else [f"{PAGE} is not that of {RECORDS}"]
    recorded = every.get(environment, {}).get("verdicts", {})
    for name, *how in candidates() if environment else ():
        before, now = recorded.get(name, "not recorded"), verdict(*how)
        print(f"{name}: {now}", flush=True)
        found += [] if now == before else [f"{name}: {now}; recorded in {environment}: {before}"]
    return found


def records():
    return json.loads(RECORDS.read_text("utf-8")) if RECORDS.is_file() else {}


def page(every):
    """docs/compatibility.md."""
    lines = ["# Where it was run", "", "Written by `python tests/compatibility.py ENVIRONMENT`; do not edit.", ""]
    head = ["environment", "Python", *PACKAGES, "tests"]
    rows = [[name, e["python"], *(e[p] for p in PACKAGES), e.get("tests", "not run")] for name, e in every.items()]
    lines += table(head, rows)
    names = list(dict.fromkeys(n for e in every.values() for n in e["verdicts"]))
    rows = [[n, *(e["verdicts"].get(n, "—") for e in every.values())] for n in names]
    lines += ["", "At effort quick, the references at level should, all others at must:", ""]
    lines += table(["criterion", *every], rows)
    differing = [row[0] for row in rows if len(set(row[1:])) > 1]
    lines += ["", f"Judged otherwise somewhere: {', '.join(differing)}." if differing else "Judged alike everywhere."]
    return "\n".join(lines) + "\n"


def table(head, rows):
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="?", help="its name in tox.ini")
    parser.add_argument("--tests", action="store_true", help="run the project's tests as well")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is not as recorded")
    given = parser.parse_args()
    if given.check:
        sys.exit("\n".join(problems(given.environment)) or 0)
    if not given.environment:
        parser.error("ENVIRONMENT is missing: a name of tox.ini")
    record(given.environment, given.tests)
    print(PAGE.read_text("utf-8"))
