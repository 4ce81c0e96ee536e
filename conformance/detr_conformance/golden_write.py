"""Makes the golden cases anew and writes their folder, whole or not at all.

A stored case whose numbers are the new ones within rounding stays as it is, byte for byte, whatever the platform.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from detr_conformance import registry
from detr_conformance.adapters.textbook import candidate_of
from detr_conformance.candidate import bind
from detr_conformance.corpus import spread
from detr_conformance.golden import ANNOTATIONS, FOUND, Entry, entries, found_entry
from detr_conformance.golden_check import PARTS, changes
from detr_conformance.golden_judge import judged
from detr_conformance.golden_records import files_of, make, written
from detr_conformance.registry import Fault
from detr_fixtures import golden
from detr_fixtures.golden import FixtureError, Golden
from detr_reference.options import PROFILES
from detr_reference.textbook import textbook

BY_HAND: Final = ("schema.json", ANNOTATIONS)  # files that people write
SHOWN: Final = 8  # names in a line of the changelog
TRIED: Final = 16  # cases on which a fault is tried that none claims to kill

# the experiments whose faults show in what one call returns
_SEEN: Final[Mapping[str, tuple[str, ...]]] = {
    "masks": ("masks", "coco"),
    "unmasked": ("masks",),
    "coded masks": ("masks",),
    "denoising": ("denoising",),
    "beside denoising": ("denoising",),
    **dict.fromkeys(
        ("batch", "edges", "extremes", "configured", "permuted", "alone", "layers", "prompts", "repeated", "pairs",
         "duels", "certain", "pixels"),
        ("corpus", "ordinary", "edges", "options", "hand"),
    ),
}  # fmt: skip

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a regeneration would write. ``files``: the whole folder but manifest and changelog · ``added``, ``removed``:
    names · ``changed``: by name what differs, in lines."""

    files: Mapping[str, bytes]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, Sequence[str]]

    @property
    def empty(self) -> bool:
        """True where nothing would change."""
        return not (self.added or self.removed or self.changed)

    def lines(self) -> Iterator[str]:
        """The differences for people."""
        yield from (f"+ {name}" for name in self.added)
        yield from (f"- {name}" for name in self.removed)
        for name, lines in self.changed.items():
            yield f"! {name}"
            yield from (f"    {line}" for line in lines)


def plan(folder: Path, kills: bool = False, processes: int = 2, tell: Tell = lambda *_: None) -> Plan:
    """What a regeneration of a folder would write; ``kills``: find out anew which known faults each case kills, which
    is also done where a case changes. Raises FixtureError where a case that was found and kept cannot be read."""
    old, damaged = _readable(folder)
    made = _made(folder, processes, tell, {name: tuple(one.record["kills"]) for name, one in old.items()})
    if kills or any(_differs(old.get(name), new) for name, new in made.items()):
        by_name = _kills(folder, processes, tell)
        made = _made(folder, processes, tell, by_name)
    changed = {name: list(damaged.get(name, ())) for name in damaged if name in made}
    files = _by_hand(folder, changed)
    for name, new in made.items():
        lines = changes(old[name], new) if name in old else []
        if lines:
            changed[name] = lines
        if name in old and not lines:
            files |= {f"{name}{end}": (folder / f"{name}{end}").read_bytes() for end in (".json", ".npz")}
        else:
            files |= files_of(new)
    added = tuple(name for name in made if name not in old and name not in damaged)
    removed = tuple(sorted({*old, *damaged} - {*made}))
    return Plan(dict(sorted(files.items())), added, removed, changed)


def write(folder: Path, found: Plan, why: str) -> int:
    """Write the folder of a plan, with a new revision and the reason for it in the changelog; the folder as it was
    stays until the new one is whole. Returns the revision."""
    revision = _revision(folder) + 1
    hashes = {name: golden.sha256(data) for name, data in found.files.items()}
    files = {
        **found.files,
        golden.MANIFEST: written({"format": golden.FORMAT, "revision": revision, "files": hashes}).encode("utf-8"),
        golden.CHANGELOG: _changelog(folder, found, why, revision).encode("utf-8"),
    }
    replace_folder(folder, files)
    return revision


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """A folder with just these files in place of the one that may be there."""
    new, old = (folder.parent / f".{folder.name}.{word}-{os.getpid()}" for word in ("new", "old"))
    try:
        for name, data in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def add(folder: Path, entry: Entry, why: str) -> int:
    """One more case, found by a search, into a folder that is whole. Returns the new revision; raises FixtureError."""
    files = golden.manifest(folder)["files"]
    if broken := golden.problems(folder):
        raise FixtureError(broken[0])
    if f"{entry.name}.json" in files:
        raise FixtureError(f"there is a case {entry.name} already")
    shown = tuple(sorted(_killed(entry.profile, entry.claimed, [entry]).get(entry.name, ())))
    whole = {name: (folder / name).read_bytes() for name in files}
    whole |= files_of(make(replace(entry, claimed=shown), shown))
    return write(folder, Plan(dict(sorted(whole.items())), (entry.name,), (), {}), why)


# --- what there is --------------------------------------------------------------------------------------------------


def _readable(folder: Path) -> tuple[dict[str, Golden], dict[str, list[str]]]:
    """The stored cases, and those that cannot be read with the reason; none where there is no manifest."""
    if not (folder / golden.MANIFEST).is_file():
        return {}, {}
    found, damaged = {}, {}
    for name in golden.names(folder):
        try:
            found[name] = golden.load(name, folder)
        except FixtureError as error:
            if f"/{FOUND}-" in name:
                raise FixtureError(f"{error}; it cannot be made again: restore it first") from None
            damaged[name] = [str(error)]
    return found, damaged


def _by_hand(folder: Path, changed: dict[str, list[str]]) -> dict[str, bytes]:
    """The files that people write, the package's own where a folder has none; changed ones are told."""
    listed = golden.manifest(folder)["files"] if (folder / golden.MANIFEST).is_file() else {}
    found = {}
    for name in BY_HAND:
        path = folder / name if (folder / name).is_file() else golden.GOLDEN / name
        found[name] = path.read_bytes()
        if listed and golden.sha256(found[name]) != listed.get(name):
            changed[name] = ["it was written anew"]
    return found


def _declared(folder: Path, profile: str) -> list[Entry]:
    """The declared cases of a profile, and those that were found and kept."""
    kept = []
    if (folder / golden.MANIFEST).is_file():
        names = [name for name in golden.names(folder, profile) if f"/{FOUND}-" in name]
        kept = [found_entry(golden.load(name, folder)) for name in names]
    return [*entries(profile), *kept]


@dataclass(frozen=True)
class _Job:
    folder: Path
    profile: str
    part: int
    kills: Mapping[str, tuple[str, ...]]


def _jobs(folder: Path, kills: Mapping[str, tuple[str, ...]]) -> list[_Job]:
    return [_Job(folder, profile, part, kills) for part in range(PARTS) for profile in PROFILES]


def _made(folder: Path, processes: int, tell: Tell, kills: Mapping[str, tuple[str, ...]]) -> dict[str, Golden]:
    found: dict[str, Golden] = {}
    jobs = _jobs(folder, kills)
    for i, part in enumerate(spread(_make, jobs, processes), 1):
        found |= part
        tell("making", i, len(jobs))
    return dict(sorted(found.items()))


def _make(job: _Job) -> dict[str, Golden]:
    own = _declared(job.folder, job.profile)[job.part :: PARTS]
    return {entry.name: make(entry, job.kills.get(entry.name, ())) for entry in own}


def _differs(old: Golden | None, new: Golden) -> bool:
    return old is None or bool(changes(old, new))


def _revision(folder: Path) -> int:
    return int(golden.manifest(folder)["revision"]) if (folder / golden.MANIFEST).is_file() else 0


# --- which known faults show ----------------------------------------------------------------------------------------


def _kills(folder: Path, processes: int, tell: Tell) -> dict[str, tuple[str, ...]]:
    """By case the known faults that are shown to fail on it: all that a case claims, and each other one on the first
    case that shows it, if there is one."""
    found: dict[str, set[str]] = {}
    jobs = _jobs(folder, {})
    for i, part in enumerate(spread(_kills_of, jobs, processes), 1):
        for name, ids in part.items():
            found.setdefault(name, set()).update(ids)
        tell("judging known faults", i, len(jobs))
    chance = {fault.id for fault in registry.faults() if fault.check.clause.id == "PURE-3"}  # who draws may draw well
    return {name: tuple(sorted(ids - chance)) for name, ids in found.items()}


def _kills_of(job: _Job) -> dict[str, set[str]]:
    own = [fault.id for fault in registry.faults(job.profile) if fault.check.on.name in _SEEN]
    return _killed(job.profile, own[job.part :: PARTS], _declared(job.folder, job.profile))


def _killed(profile: str, ids: Sequence[str], declared: Sequence[Entry]) -> dict[str, set[str]]:
    """Which of these faults each of these cases shows."""
    found: dict[str, set[str]] = {}
    cases: dict[str, Golden] = {}
    by_id = {fault.id: fault for fault in registry.faults(profile)}

    def kills(fault: Fault, entry: Entry) -> bool:
        if entry.name not in cases:
            cases[entry.name] = make(entry)
        bound = bind(candidate_of(fault.apply(textbook), profile))
        outcome = judged(bound, cases[entry.name])
        return outcome.verdict == "fail" and not outcome.raised

    for fault in (by_id[id] for id in ids if id in by_id):
        claiming = [entry for entry in declared if fault.id in entry.claimed and kills(fault, entry)]
        if not claiming:
            order = _SEEN.get(fault.check.on.name, ())
            likely = sorted((e for e in declared if e.set in order), key=lambda e: order.index(e.set))[:TRIED]
            claiming = [first] if (first := next((e for e in likely if kills(fault, e)), None)) else []
        for entry in claiming:
            found.setdefault(entry.name, set()).add(fault.id)
    return found


# --- the changelog --------------------------------------------------------------------------------------------------


def _changelog(folder: Path, found: Plan, why: str, revision: int) -> str:
    """The changelog with an entry for this revision on top."""
    path = folder / golden.CHANGELOG
    before = path.read_text("utf-8") if path.is_file() else "# Changes of the golden cases\n"
    head, mark, rest = before.partition("\n## ")
    told = [f"- {word}: {_by_set(names)}" for word, names in _words(found).items() if names]
    entry = f"\n## Revision {revision}\n\n{why.strip()}\n\n" + "\n".join(told) + "\n"
    return head.rstrip("\n") + "\n" + entry + (mark + rest)


def _words(found: Plan) -> dict[str, Sequence[str]]:
    return {"added": found.added, "removed": found.removed, "changed": tuple(found.changed)}


def _by_set(names: Sequence[str]) -> str:
    """Few names as they are; of many their number by profile and set."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    counts: dict[str, int] = {}
    for name in names:
        group = re.sub(r"-.*", "", name.split("/")[-1]) if "/" in name else name
        place = f"{name.split('/')[0]}/{group}"
        counts[place] = counts.get(place, 0) + 1
    return ", ".join(f"{place} {count}" for place, count in sorted(counts.items()))


def revisions(folder: Path) -> list[int]:
    """The revisions that the changelog tells of."""
    path = folder / golden.CHANGELOG
    return [int(n) for n in re.findall(r"^## Revision (\d+)$", path.read_text("utf-8"), re.M)] if path.is_file() else []
