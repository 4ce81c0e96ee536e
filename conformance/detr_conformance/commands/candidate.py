"""``detr-conformance smoke`` and ``init``: is a candidate wired, and what a repository needs to gate it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detr_conformance.commands import templates
from detr_conformance.commands.shared import one_of, print_json, refuse, written
from detr_reference.options import PROFILES

if TYPE_CHECKING:
    from detr_conformance.runner import Identity

# of errors that no stub can help with
_NOT_THERE = ("there is no module", "there is no file", "cannot be imported", " has no ")


def smoke(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="CANDIDATE...", help="entry point, module, module:attribute, file.py:attribute"),
    ],
    profile: Annotated[str, typer.Option(help="of the candidate", autocompletion=one_of(PROFILES))] = "",
    json: Annotated[bool, typer.Option("--json", help="print the outcome for a machine")] = False,
) -> None:
    """Bind a candidate and call it once, and name what is mis-wired: detr-conformance smoke mypkg.criterion

    Takes seconds and judges nothing else. Exit status 0 where the wiring holds, 1 where it does not.
    """
    found = [_bound(candidate, profile) for candidate in candidates]
    if json:
        print_json([_plain(name, i) for name, i in zip(candidates, found, strict=True)])
    for name, identity in () if json else zip(candidates, found, strict=True):
        holds = identity.smoke.verdict == "pass"
        typer.echo(f"smoke  {name}")
        typer.echo(f"      profile   {identity.profile} ({identity.profile_from})")
        for note in identity.notes:
            typer.echo(f"      note      {note}")
        said = "returns the losses" if holds else "\n                ".join(_said(identity))
        typer.echo(f"      call      {'ok' if holds else 'FAIL'}  {said}")
    if any(i.smoke.verdict != "pass" for i in found):
        raise typer.Exit(1)


def init(
    module: Annotated[str, typer.Argument(help="what will be judged: mypkg.criterion")],
    profile: Annotated[str, typer.Option(help="of the criterion", autocompletion=one_of(PROFILES))] = "",
    ci: Annotated[str, typer.Option(help="github, gitlab or none", autocompletion=one_of(templates.CI))] = "github",
    directory: Annotated[Path, typer.Option(help="the repository")] = Path("."),
    json: Annotated[bool, typer.Option("--json", help="print what was written for a machine")] = False,
) -> None:
    """Write what a repository needs to gate its criterion: detr-conformance init mypkg.criterion

    A ledger, a CI file, and where the criterion does not fit by itself a stub of a Candidate to fill in. Looks at the
    module first; never overwrites a file.
    """
    if ci not in (*templates.CI, "none"):
        refuse(f"--ci={ci}; it must be one of {', '.join(templates.CI)}, none")
    spec, files, said = module, {}, ""
    try:
        identity = _identity(module, profile)
    except ValueError as error:
        if any(words in str(error) for words in _NOT_THERE):
            refuse(str(error))
        spec, said = templates.SPEC, str(error)
        files[templates.STUB] = templates.stub(module, profile or _profile_guess(said), {}, said)
    else:
        profile = profile or identity.profile
        if identity.smoke.verdict != "pass":
            said = " ".join(_said(identity))
            spec, files[templates.STUB] = templates.SPEC, templates.stub(module, profile, _hinted(said), said)
    from detr_conformance.ledger import BEGINNING

    files["deviations.toml"] = BEGINNING
    if ci != "none":
        packaged = (directory / "pyproject.toml").is_file() or (directory / "setup.py").is_file()
        path, text = templates.workflow(ci, spec, profile if spec == module else "", packaged)
        files[path] = text
    outcome = {name: _write(directory / name, text) for name, text in files.items()}
    if json:
        print_json({"candidate": spec, "profile": profile, "files": outcome, "said": said})
        return
    for name, what in outcome.items():
        typer.echo(f"{what:<8} {directory / name}")
    if said:
        typer.echo(f"the criterion does not fit by itself: {said}\nfill in {templates.STUB}, then try")
    typer.echo(f"next     detr-conformance smoke {spec} && pytest --candidate={spec}")


def _bound(candidate: str, profile: str) -> Identity:
    try:
        return _identity(candidate, profile)
    except ValueError as error:
        refuse(str(error))


def _identity(candidate: str, profile: str) -> Identity:
    """Bind and call once, in a process of its own. Raises ConformanceError."""
    from detr_conformance.isolation import Worker
    from detr_conformance.runner import Settings

    with Worker(candidate, Settings(profile=profile or None)) as worker:
        return worker.identity


def _said(identity: Identity) -> list[str]:
    return [line.strip() for line in identity.smoke.message.splitlines()[1:]]


def _plain(name: str, identity: Identity) -> dict[str, Any]:
    return {
        "candidate": name, "ok": identity.smoke.verdict == "pass", "profile": identity.profile,
        "profile_from": identity.profile_from, "options": identity.options, "notes": list(identity.notes),
        "said": _said(identity),
    }  # fmt: skip


def _hinted(said: str) -> Mapping[str, str]:
    """The names that the smoke call proposes."""
    found = re.search(r"rename=(\{.*?\})", said)
    try:
        hinted = ast.literal_eval(found[1]) if found else {}
    except (ValueError, SyntaxError):
        return {}
    return hinted if isinstance(hinted, dict) else {}


def _profile_guess(said: str) -> str:
    usual, *others = PROFILES
    return next((p for p in others if p in said and "one of" not in said), usual)


def _write(path: Path, text: str) -> str:
    """Write a file that is not there; says what was done."""
    if path.exists():
        return "kept"
    written(path, text)
    return "wrote"
