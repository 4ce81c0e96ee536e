"""The contract inside someone's own test file."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any


def conformance_tests(
    candidate: Any,
    *,
    profile: str | None = None,
    level: str = "must",
    effort: str = "standard",
    device: str = "cpu",
    clauses: Sequence[str] = (),
    seed: int = 0,
    limit: float = 20.0,
    ledger: str | os.PathLike[str] | None = None,
) -> Callable[..., None]:
    """A parametrised test, one case a check::

        test_contract = detr_conformance.conformance_tests("mypkg.criterion")

    The arguments are those of ``judge``; the same errors are raised, when the test file is collected. What the ledger
    accepts is an expected failure; that an entry is stale only a whole run tells.
    """
    import pytest

    from detr_conformance import ledger as ledgers
    from detr_conformance.isolation import Worker
    from detr_conformance.registry import Check, checks
    from detr_conformance.runner import Settings

    accepted = ledgers.Ledger("", ()) if ledger is None else ledgers.read(ledger)
    selected = (clauses,) if isinstance(clauses, str) else tuple(clauses)
    worker = Worker(candidate, Settings(profile, level, effort, device, seed, selected), limit)
    atexit.register(worker.close)
    found = checks(worker.identity.profile, level, selected)

    @pytest.mark.parametrize("check", [pytest.param(c, id=f"{c.clause.id}-{c.name}") for c in found])
    def test_contract(check: Check) -> None:
        finding = accepted.accept(worker.finding(check), (worker.identity.name, worker.identity.spec))
        if finding.verdict == "declined" or (finding.verdict == "blocked" and worker.identity.smoke.verdict == "pass"):
            pytest.skip(f"{finding.clause} {finding.verdict}: {finding.message}")
        if finding.verdict == "blocked":
            pytest.fail(worker.identity.smoke.message, pytrace=False)
        if finding.accepted:
            pytest.xfail(finding.deviation)
        if finding.verdict != "pass" and finding.level != "information":
            pytest.fail(finding.message, pytrace=False)

    return test_contract
