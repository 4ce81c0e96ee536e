"""A failure as a script of its own: the candidate, numpy and torch, what is wanted and what is got.

``BOX-2_7f3a91c2.py`` reads its inputs from the ``.npz`` of the same name, and exits with 1 while the criterion is wrong
and with 0 once it is right; another candidate can be named on the command line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from detr_conformance.findings import Evidence, Finding

_BODY = "# --- the call"
_RERUN = "\n      rerun "


def written(finding: Finding, spec: str, profile: str, directory: str | Path) -> Finding:
    """The finding with its script in ``directory``/repro, and with the line that runs it.

    As it was, where one call does not show the failure. ``spec``: the string that finds the candidate. Raises OSError
    where the directory cannot be written to.
    """
    shown = finding.evidence
    if shown is None or shown.call is None or shown.repeat is None or not spec:
        return finding
    packed = _packed(shown)
    name = f"{finding.clause}_{hashlib.sha256(packed + shown.what.encode()).hexdigest()[:8]}"
    folder = Path(directory) / "repro"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(script(finding, spec, profile, name), "utf-8", "backslashreplace")
    path.with_suffix(".npz").write_bytes(packed)
    head, rerun, tail = finding.message.partition(_RERUN)
    line = f"\n      {'repro':<12}python {path.as_posix()}"
    return replace(finding, repro=path.as_posix(), message=f"{head}{line}{rerun}{tail}")


def script(finding: Finding, spec: str, profile: str, name: str) -> str:
    """The text of the script; ``finding`` has a repeat."""
    shown = finding.evidence
    assert shown is not None
    assert shown.call is not None
    assert shown.repeat is not None
    source = Path(__file__).with_name("standalone.py").read_text("utf-8")
    head, mark, body = source.partition(_BODY)
    imports = head[head.index("import importlib\n") : head.index("CANDIDATE")]
    about = textwrap.wrap(f"{finding.clause} ({finding.level}): {finding.sentence}", 118)
    about += textwrap.wrap(f"{shown.what}: want {' '.join(shown.want.split())}, got {' '.join(shown.got.split())}", 118)
    about += [f"python {name}.py [CANDIDATE]: exit status 1 while the criterion is wrong, 0 once it is right."]
    about += [f"Needs the criterion, numpy, torch, and {name}.npz. Written by detr-conformance {_version()}."]
    it = {k: v for k, v in asdict(shown.repeat).items() if k != "costs"}
    constants = {"CANDIDATE": _imported(spec), "PROFILE": profile, "OPTIONS": shown.call.options, "IT": it}
    lines = [f"{key} = {_filled(value)}" for key, value in constants.items()]
    comment = "\n".join(f"# {line}" for line in about)
    return f"{comment}\n\n{imports}" + "\n".join(lines) + f"\n\n{mark}{body}"


def _filled(value: Any) -> str:
    """A value as Python reads it; a dict in lines that are not too long."""
    if not isinstance(value, dict):
        return repr(value)
    lines = [""]
    for key, item in value.items():
        text = f"{key!r}: {item!r},"
        if lines[-1] and len(lines[-1]) + len(text) > 112:
            lines.append("")
        lines[-1] = f"{lines[-1]} {text}".lstrip()
    body = "\n".join(f"    {line}" for line in lines)
    return f"{{\n{body}\n}}"


def _packed(shown: Evidence) -> bytes:
    import numpy as np

    from detr_fixtures import arrays

    assert shown.call is not None
    assert shown.repeat is not None
    costs = {"costs": np.asarray(shown.repeat.costs)} if shown.repeat.costs else {}
    return arrays.to_bytes({**arrays.from_text(shown.call.npz), **costs})


def _imported(spec: str) -> str:
    """What to import: an entry point stands for the attribute that it names."""
    for point in importlib.metadata.entry_points(group="detr_conformance.candidates"):
        if point.name == spec:
            return point.value
    return spec


def _version() -> str:
    try:
        return importlib.metadata.version("detr-conformance")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
