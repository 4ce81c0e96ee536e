"""How many wrong criterions, written without a look at the textbook, the diagnosis names.

    python benchmarks/diagnosis.py [--every N] [--from N] [--pairs N] [WORDS OF AN ID …]

Every N-th kind of mistake of tests/zoo is judged at effort quick, in one of its profiles; with --pairs, N pairs of
them in one criterion. One line each: what it does, and what the diagnosis says; whether that is right, eyes decide.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from detr_conformance.findings import Finding
from detr_conformance.registry import checks, clauses
from detr_conformance.runner import Judge, Settings
from zoo import WRONG, Wrong  # type: ignore[import-not-found]
from zoo.port import FACTORIES, both  # type: ignore[import-not-found]

MUST = {c.id for c in clauses() if c.level == "must"}


def kinds() -> list[Wrong]:
    """One criterion of every kind of mistake, its profile chosen in turn."""
    by_name: dict[str, list[Wrong]] = {}
    for wrong in WRONG:
        if MUST & set(wrong.clause):
            by_name.setdefault(wrong.id.split("/", 1)[1], []).append(wrong)
    return [found[i % len(found)] for i, found in enumerate(by_name.values())]


def pairs(count: int, seed: int) -> Iterator[Wrong]:
    """Criterions with two mistakes each, in different methods, drawn evenly from the kinds of one profile."""
    draw, profiles = random.Random(seed), sorted(FACTORIES)
    made = 0
    while made < count:
        profile = draw.choice(profiles)
        found = both(*draw.sample([w for w in WRONG if w.profile == profile and MUST & set(w.clause)], 2))
        if found is not None:
            made += 1
            yield found


def findings(wrong: Wrong) -> tuple[list[Finding], float]:
    """The findings that fail, and the longest time that one finding took, in seconds of computing."""
    judge, failed, longest = Judge(wrong.factory, Settings(profile=wrong.profile, effort="quick")), [], 0.0
    for check in checks(wrong.profile, "must"):
        judge.failing(check)  # its experiment is not counted
        start = time.process_time()
        found = judge.finding(check.name)
        longest = max(longest, time.process_time() - start)
        failed += [found] if found.verdict == "fail" else []
    return failed, longest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--from", dest="start", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(pairs(given.pairs, given.seed)) if given.pairs else kinds()[given.start :: given.every]
    caught = named = 0
    for wrong in chosen:
        if not all(word in wrong.id for word in given.words):
            continue
        failed, longest = findings(wrong)
        caught += bool(failed)
        said = {f.diagnosis: f.clause for f in reversed(failed) if f.diagnosis}
        named += bool(said)
        state = "NAMED  " if said else "unnamed" if failed else "missed "
        print(f"{state} {wrong.id}: {wrong.sentence}   [{longest:.1f} s; {', '.join(f.clause for f in failed)}]")
        for diagnosis, clause in said.items():
            print(f"          {clause}: " + " or ".join(f"{i} ({s})" for i, s in diagnosis.faults), flush=True)
    print(f"{named} of {caught} caught are named, of {len(chosen)}")


if __name__ == "__main__":
    main()
