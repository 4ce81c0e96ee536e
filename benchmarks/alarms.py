"""Searches for false alarms: draws many cases for every experiment and judges criterions that are right on them.

    python benchmarks/alarms.py [--seeds 1000] [--part 0/2] [WORDS OF A NAME …]

Who is judged: the reference in every profile, the losses of transformers that are right in one process, and the right
criterions of tests/zoo, each written in another style by somebody who had not seen this suite. Every line tells of one
criterion; a check that fails is a false alarm, printed with its case, and the exit status is 1. Two parts may run side
by side: --part 0/2 and --part 1/2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from detr_conformance import registry
from detr_conformance.candidate import bind
from detr_conformance.strategies import sample
from detr_conformance.tallies import tallied
from detr_reference.options import PROFILES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import RIGHT

SEED = 20261123
PUBLISHED = ("transformers-detr", "transformers-deformable-detr")


def alarms(spec: object, profile: str, level: str, seeds: int) -> tuple[int, list[str]]:
    """How many cases were judged, and the false alarms among them."""
    bound = bind(spec, profile)
    own = registry.checks(profile, level)
    binding = {c.name for c in own if c.clause.level != "information"}
    found, count = [], 0
    for experiment in sorted({c.on for c in own}, key=lambda e: e.name):
        if experiment.drawn is None or experiment.declined(bound):
            continue
        tallies = tallied(bound, experiment, sample(experiment.drawn(bound), seeds, SEED))
        count += seeds
        for name in sorted(tallies.failing & binding):
            case, comparison = tallies.by_check[name].failing  # type: ignore[misc]
            found.append(f"{name} on {case.label}: {comparison}")
    return count, found


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms on right criterions.")
    parser.add_argument("--seeds", type=int, default=1000, help="cases of an experiment")
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2 are two halves")
    parser.add_argument("words", nargs="*", help="only who has one of these in the name; all without")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    who = [("detr_reference.criterion", "detr_reference.criterion", p, "should") for p in PROFILES]
    who += [(name, name, name.removeprefix("transformers-"), "must") for name in PUBLISHED]
    who += [(r.id, r.factory, r.profile, "must") for r in RIGHT]
    who = [one for one in who if not given.words or any(word in one[0] for word in given.words)]
    wrong = False
    for name, spec, profile, level in who[part::parts]:
        start = time.monotonic()
        count, found = alarms(spec, profile, level, given.seeds)
        told = f"{len(found)} FALSE ALARMS" if found else "no alarm"
        print(f"{name}, {profile}, {level}: {told} in {count} cases, {time.monotonic() - start:.0f} s", flush=True)
        for line in found:
            print(f"    {line}", flush=True)
        wrong = wrong or bool(found)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
