"""How many failures a minute are found as workers are added.

    python benchmarks/workers.py [--workers 1 2 4] [--candidates 8] [--effort standard]

Some wrong criterions of tests/zoo are judged in one run of pytest, with so many workers of pytest-xdist each time.
Every failing check with its smallest input and diagnosis counts as one. A process of pytest has already two processes
that judge side by side where there are two processors, so that more workers pay only on more processors than that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ZOO = Path(__file__).parent.parent / "tests"
MODULE = """
from detr_conformance import Candidate
from zoo import WRONG

step = len(WRONG) // {count}
for i, wrong in enumerate(WRONG[step // 2 :: step][:{count}]):
    globals()[f"c{{i}}"] = Candidate(wrong.factory, wrong.profile, name=wrong.id)
"""


def failures(folder: Path, workers: int, candidates: int, effort: str) -> tuple[int, float]:
    """The failing checks of a run, and its seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--conformance-effort={effort}"]
    command += [f"--candidate={folder}/mistakes.py:c{i}" for i in range(candidates)]
    command += ["-n", str(workers), "--conformance-report=out"]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ZOO)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    spent = time.monotonic() - start
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    reports = json.loads((folder / "out" / "report.json").read_text("utf-8"))["reports"]
    return sum(f["verdict"] == "fail" for r in reports for f in r["findings"]), spent


def main() -> None:
    parser = argparse.ArgumentParser(description="Failures found a minute, by number of workers.")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--effort", default="standard")
    given = parser.parse_args()
    print(f"{os.cpu_count()} processors, {given.candidates} wrong criterions, effort {given.effort}")
    first = 0.0
    for workers in given.workers:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "mistakes.py").write_text(MODULE.format(count=given.candidates), "utf-8")
            found, seconds = failures(Path(folder), workers, given.candidates, given.effort)
        rate = 60 * found / seconds
        first = first or rate
        print(
            f"{workers} workers: {found} failures in {seconds:.0f} s, {rate:.1f} a minute ({rate / first:.2f}×)",
            flush=True,
        )


if __name__ == "__main__":
    main()
