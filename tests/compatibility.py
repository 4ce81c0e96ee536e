"""What was really run where: judges the same criterions in this environment and records it in docs/compatibility.md.

tox exec -e py310-torch2.4-lowest -- python tests/compatibility.py py310-torch2.4-lowest
python tests/compatibility.py --tox .tox                       records what `tox run` left there: tests, time, disk
python tests/compatibility.py --check                          the page is that of the records
python tests/compatibility.py py310-torch2.4-lowest --check    and who is judged here is judged as recorded
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
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


def record(environment):
    """Judge all, and put it beside what other environments found."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "—"
    found["verdicts"] = {name: verdict(*how) for name, *how in candidates()}
    every = records()
    every["judged"][environment] = found
    written(every)


def record_runs(workdir):
    """Put down what tox left in its working directory: how each environment's commands ended, the time they and the
    building took, and the disk that the environment takes."""
    every = records()
    for environment in sorted(e for e in workdir.iterdir() if list(e.glob("log/*-commands*"))):
        every["runs"][environment.name] = {**every["runs"].get(environment.name, {}), **run(environment)}
    written(every)


def run(environment):
    """What tox left of one environment; it keeps the logs of its last run alone, so how long the building took is known
    only where that run built it."""
    logs = {log.name.split("-", 1)[1]: log for log in (environment / "log").iterdir()}
    commands = sorted((log for name, log in logs.items() if name.startswith("commands")), key=_time)
    closing = re.sub(r" in [\d.]+s.*", "", commands[-1].read_text("utf-8").strip().splitlines()[-1]).strip("= ")
    failed = any("exit_code: 0" not in log.read_text("utf-8") for log in commands)
    installed = _time(logs["install_package.log"])
    found = {
        "ended": closing if " passed" in closing else "failed" if failed else "passed",
        "run": round(_time(commands[-1]) - installed),
        "disk": round(sum(f.lstat().st_blocks * 512 for f in environment.rglob("*")) / 1e9, 1),
        "cores": os.cpu_count(),
    }
    if "install_deps.log" in logs:
        found["build"] = round(installed - _time(environment / "pyvenv.cfg"))
    return found


def _time(file):
    return file.stat().st_mtime


def written(every):
    every = {kind: dict(sorted(found.items())) for kind, found in every.items()}
    RECORDS.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(every), "utf-8")


def problems(environment):
    """What is not as recorded: the page, and the verdicts here, where an environment is named."""
    every = records()
    found = [] if PAGE.read_text("utf-8") == page(every) else [f"{PAGE} is not that of {RECORDS}"]
    recorded = every["judged"].get(environment, {}).get("verdicts", {})
    for name, *how in candidates() if environment else ():
        before, now = recorded.get(name, "not recorded"), verdict(*how)
        print(f"{name}: {now}", flush=True)
        found += [] if now == before else [f"{name}: {now}; recorded in {environment}: {before}"]
    return found


def records():
    return json.loads(RECORDS.read_text("utf-8")) if RECORDS.is_file() else {"judged": {}, "runs": {}}


def page(every):
    """docs/compatibility.md."""
    judged, runs = every["judged"], every["runs"]
    lines = ["# Where it was run", "", "Written by `python tests/compatibility.py`; do not edit.", ""]
    lines += table(
        ["environment", "Python", *PACKAGES], [[n, e["python"], *map(e.get, PACKAGES)] for n, e in judged.items()]
    )
    names = list(dict.fromkeys(n for e in judged.values() for n in e["verdicts"]))
    rows = [[n, *(e["verdicts"].get(n, "—") for e in judged.values())] for n in names]
    lines += ["", "At effort quick, the references at level should, all others at must:", ""]
    lines += table(["criterion", *judged], rows)
    differing = [row[0] for row in rows if len(set(row[1:])) > 1]
    lines += ["", f"Judged otherwise somewhere: {', '.join(differing)}." if differing else "Judged alike everywhere."]
    lines += ["", "What `tox run` does in each:", ""]
    rows = [
        [n, e["ended"], f"{e.get('build', '?')} s", f"{e['run']} s", f"{e['disk']} GB", e["cores"]]
        for n, e in runs.items()
    ]
    lines += table(["environment", "its commands", "to build", "to run", "disk", "cores"], rows)
    minutes = sum(e.get("build", 0) + e["run"] for e in runs.values()) / 60
    lines += ["", f"All together: {minutes:.0f} minutes and {sum(e['disk'] for e in runs.values()):.0f} GB."]
    return "\n".join(lines) + "\n"


def table(head, rows):
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="?", help="its name in tox.ini")
    parser.add_argument("--tox", type=Path, metavar="WORKDIR", help="record what tox has run there")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is not as recorded")
    given = parser.parse_args()
    if given.check:
        sys.exit("\n".join(problems(given.environment)) or 0)
    if not (given.environment or given.tox):
        parser.error("ENVIRONMENT is missing: a name of tox.ini")
    if given.tox:
        record_runs(given.tox)
    if given.environment:
        record(given.environment)
    print(PAGE.read_text("utf-8"))
