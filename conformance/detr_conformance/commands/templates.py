"""The files that ``detr-conformance init`` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Final

CI: Final = ("github", "gitlab")
STUB: Final = "conformance_candidate.py"
SPEC: Final = "conformance_candidate:candidate"


def stub(module: str, profile: str, rename: Mapping[str, str], said: str) -> str:
    """A Candidate to fill in. ``said``: why the criterion does not fit by itself."""
    about = textwrap.fill(said, 116)
    if rename:
        return _renaming(module, profile, rename, about)
    return f'''"""How {module} is judged by detr-conformance. It does not fit by itself:

{about}

    detr-conformance smoke {SPEC}
    pytest --candidate={SPEC}
"""

from detr_conformance import Candidate


def build_criterion(num_classes, num_decoder_layers, set_cost_class, set_cost_bbox, set_cost_giou):
    """Called by keyword with the options that are named here; name more of them, and more is judged:
    focal_alpha, focal_gamma, eos_coef, ce_loss_coef, bbox_loss_coef, giou_loss_coef, losses, two_stage."""
    raise NotImplementedError("build and return the criterion of {module}")


candidate = Candidate(
    build_criterion,
    profile="{profile}",  # or detr, deformable-detr, dino, grounding-dino
    options={{}},  # what differs legitimately from the profile, as giou_eps=1e-6: see detr_reference.options
    rename={{}},  # your names of losses to the contract's: {{"loss_box": "loss_bbox"}}
)
'''


def _renaming(module: str, profile: str, rename: Mapping[str, str], about: str) -> str:
    head, _, attribute = module.partition(":")
    names = dict(rename)
    if head.endswith(".py"):
        load = (
            "import runpy\n\nfrom detr_conformance import Candidate\n\n"
            f"factory = runpy.run_path({head!r})[{attribute or 'build_criterion'!r}]"
        )
    else:
        load = (
            f"import importlib\n\nfrom detr_conformance import Candidate\n\n"
            f"factory = importlib.import_module({head!r}).{attribute or 'build_criterion'}"
        )
    return f'''"""How {module} is judged by detr-conformance: its losses under the contract's names.

{about}
"""

{load}
candidate = Candidate(factory, profile="{profile}", rename={names!r})
'''


def workflow(ci: str, spec: str, profile: str, packaged: bool) -> tuple[str, str]:
    """Path and text of a CI file. ``packaged``: whether ``pip install .`` works there."""
    install = "pip install . detr-conformance" if packaged else "pip install detr-conformance"
    run = f"pytest --candidate={spec}"
    run += f" --conformance-profile={profile}" if profile else ""
    run += " --conformance-ledger=deviations.toml --conformance-report=conformance-report"
    if ci == "gitlab":
        return (
            ".gitlab-ci.yml",
            f"""\
criterion:
  image: python:3.11
  script:
    - {install}
    - {run}
  artifacts: {{when: always, paths: [conformance-report]}}
""",
        )
    return (
        ".github/workflows/conformance.yml",
        f"""\
name: criterion
on: [push, pull_request]
jobs:
  conformance:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {{python-version: "3.11"}}
      - run: {install}
      - run: {run}
      - uses: actions/upload-artifact@v4
        if: always()
        with: {{name: conformance-report, path: conformance-report}}
""",
    )
