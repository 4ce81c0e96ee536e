"""What is told of the corpus: a row a fault, the hardest to kill by chance first, and docs/CORPUS.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from detr_conformance.corpus import covered, experiments_named
from detr_conformance.registry import Fault, faults
from detr_conformance.spec import SHORT
from detr_conformance.stored import Corpus, in_line
from detr_reference.options import PROFILES


@dataclass(frozen=True)
class Row:
    """A fault, and by profile how many stored cases kill it and how many of how many random cases miss it."""

    fault: Fault
    kills: dict[str, int]
    missed: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        """What share of the random cases misses the fault, in all profiles together; 0 where none was drawn."""
        of = sum(n for _, n in self.missed.values())
        return sum(m for m, _ in self.missed.values()) / of if of else 0.0

    def cell(self, profile: str) -> str:
        """``93 % · 4``: missed by 93 % of the random cases, killed by 4 stored ones."""
        if profile not in self.kills:
            return ""
        misses, of = self.missed.get(profile, (0, 0))
        return f"{_percent(misses / of) if of else '?'} · {self.kills[profile]}"


def _percent(share: float) -> str:
    """A share in percent that says 100 and 0 only where it is so."""
    rounded = min(max(round(100 * share), 1 if share else 0), 99 if share < 1 else 100)
    return f"{rounded} %"


def rows(corpus: Corpus, names: Sequence[str] = ()) -> list[Row]:
    """The faults of these experiments, or of all, those first that random cases miss most."""
    wanted = {e.name for e in experiments_named(names)}
    found = []
    for fault in faults():
        if fault.check.on.name in wanted:
            of = {p: corpus.of(fault.check.on.name, p) for p in PROFILES if p in fault.profiles}
            kills = {p: sum(fault.id in one.kills[p] for one in cases) for p, cases in of.items()}
            found.append(Row(fault, kills, {p: n for p, n in corpus.missed.get(fault.id, {}).items() if p in of}))
    return sorted(found, key=lambda row: (-row.share, row.fault.id))


HEAD: Final = ("fault", "clause", "experiment", *(SHORT[p] for p in PROFILES))


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, under HEAD."""
    check = row.fault.check
    return (row.fault.id, check.clause.id, check.on.name, *(row.cell(p) for p in PROFILES))


def page(corpus: Corpus) -> str:
    """docs/CORPUS.md as it should be."""
    return "\n".join(_page(corpus)) + "\n"


def table(corpus: Corpus, names: Sequence[str] = ()) -> str:
    """The rows for a terminal, in columns, and what they say."""
    body = [HEAD, *map(cells, rows(corpus, names))]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return "\n".join(
        [*lines, "", f"{told(corpus, names)}; 90 % · 4: 90 % of random cases miss it, 4 stored ones kill it"]
    )


def told(corpus: Corpus, names: Sequence[str] = ()) -> str:
    """``38 faults by 61 cases``."""
    cases = sum(len(corpus.cases.get(e.name, ())) for e in experiments_named(names))
    return f"{len(rows(corpus, names))} faults by {cases} cases"


def _page(corpus: Corpus) -> Iterator[str]:
    table = rows(corpus)
    cases = sum(map(len, corpus.cases.values()))
    yield "# The stored cases"
    yield ""
    yield "Made by `detr-conformance corpus --write` from `detr_fixtures/corpus.json`; do not edit. The cases were"
    yield "found by `detr-conformance corpus --search`, and by `--add` for faults that are new; `--check` makes sure"
    yield "that each kills what it claims."
    yield ""
    yield f"{cases} cases kill {len(table)} known faults. Every candidate is judged on them at every effort; efforts"
    yield "standard and deep draw more."
    yield ""
    yield "## What random cases miss"
    yield ""
    yield (
        "For each fault and profile ("
        + ", ".join(f"{letter} {name}" for name, letter in SHORT.items())
        + "): what share"
    )
    yield f"of cases drawn at random, as its experiment draws them (seed {corpus.seed}), does not show the fault, and"
    yield "how many stored cases do. A share of `90 %` means that ten random cases let it pass one time in three."
    yield ""
    yield from _lines(HEAD, [(f"`{row.fault.id}`", *cells(row)[1:]) for row in table])
    yield ""
    yield f"Drawn were {_drawn(table)} cases a fault and profile; more where few of these showed it."
    yield ""
    yield "## What the stored cases do not tell apart"
    yield ""
    yield "Faults, each with others of its chapter that return the same numbers, in some profile, on every stored case"
    yield "that kills it."
    yield ""
    for id in dict.fromkeys(one for _, one, _ in corpus.alike):
        others = dict.fromkeys(other for _, one, other in corpus.alike if one == id)
        yield f"- `{id}`: " + ", ".join(f"`{other}`" for other in others)
    if not corpus.alike:
        yield "None."
    for experiment in covered():
        own = corpus.cases.get(experiment.name, ())
        if not own:
            continue
        yield ""
        yield f"## {experiment.name}: {experiment.title}"
        yield ""
        body = [
            (f"`{in_line(one.inputs)}`", one.keep, *(str(len(one.kills.get(p, ())) or "") for p in PROFILES))
            for one in own
        ]
        yield from _lines(("case", "kept for", *HEAD[3:]), body)


def _drawn(table: Sequence[Row]) -> str:
    numbers = [n for row in table for _, n in row.missed.values()]
    return str(min(numbers)) if numbers else "no"


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for cells in body:
        yield "| " + " | ".join(cells) + " |"
