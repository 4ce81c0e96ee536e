"""pytest options, collection and terminal summary.

Loads neither torch nor Hypothesis: candidates live in processes of their own. Without ``--candidate`` nothing happens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

if TYPE_CHECKING:
    from detr_conformance.findings import Finding, Report
    from detr_conformance.isolation import Worker
    from detr_conformance.registry import Check
    from detr_conformance.runner import Settings

OPTIONS = {
    "profile": (None, "NAME", "detr, deformable-detr, dino or grounding-dino; else the candidate's own, or a guess"),
    "level": ("must", "LEVEL", "must or should"),
    "effort": ("standard", "EFFORT", "quick, standard (100 searched cases an experiment) or deep"),
    "device": ("cpu", "DEVICE", "where tensors live: cpu"),
    "seed": ("0", "N", "seed of the searched cases"),
    "limit": ("20", "SECONDS", "how long one call of the candidate may take"),
}
_SESSION = pytest.StashKey["Session"]()
_PROPERTY = "detr_conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("detr-conformance", "judge DETR-style training criterions")
    group.addoption(
        "--candidate",
        action="append",
        default=[],
        metavar="CRITERION",
        help="entry point, module, module:attribute or path/to/file.py:attribute; may be given more than once",
    )
    group.addoption(
        "--clause", action="append", default=[], metavar="ID", help="judge only this clause (BOX-2) or chapter (BOX)"
    )
    for name, (default, metavar, text) in OPTIONS.items():
        group.addoption(f"--conformance-{name}", default=None, metavar=metavar, help=f"{text} [{default}]")
        parser.addini(f"conformance_{name}", f"as --conformance-{name}", default=default)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.candidate:
        config.stash[_SESSION] = Session(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    # before workers of pytest-xdist start, so that a wrong use ends the run as a usage error
    if _SESSION in session.config.stash and not hasattr(session.config, "workerinput"):
        session.config.stash[_SESSION].bind()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    # without paths on the command line only the contract is collected
    config = session.config
    if _SESSION in config.stash and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if _SESSION in config.stash:
        items.extend(config.stash[_SESSION].items(session))


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _SESSION not in config.stash:
        return []
    return [f"judging {', '.join(config.option.candidate)} against the DETR criterion contract"]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _Findings.collect(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _SESSION not in session.config.stash:
        return
    session.config.stash[_SESSION].close()
    if hasattr(session.config, "workerinput") or exitstatus not in (0, 1, 5):
        return
    verdicts = {f["verdict"] for found in _Findings.by_candidate.values() for f in found["findings"]}
    if "error" in verdicts:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
    elif exitstatus == 0 and verdicts and "pass" not in verdicts:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    elif exitstatus == 0 and "blocked" in verdicts:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from detr_conformance.report import terminal

    markup = {
        "good": {"green": True, "bold": True},
        "bad": {"red": True, "bold": True},
        "quiet": {"light": True},
        "bold": {"bold": True},
    }
    for report in _Findings.reports():
        terminalreporter.section("detr-conformance")
        lines = [*terminal.header(report), [], *terminal.components(report.findings), [], *terminal.last(report)]
        for line in lines:
            for text, style in line:
                terminalreporter.write(text, **markup.get(style, {}))
            terminalreporter.write_line("")


class Session:
    """The candidates of a run: each bound once, in a process of its own."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.workers: dict[str, Worker] = {}

    def option(self, name: str) -> str | None:
        given = self.config.getoption(f"conformance_{name}")
        found: str | None = self.config.getini(f"conformance_{name}") if given is None else given
        return found or None

    def settings(self) -> Settings:
        from detr_conformance.runner import Settings

        seed = self._number("seed", int)
        return Settings(
            profile=self.option("profile"),
            level=self.option("level") or "",
            effort=self.option("effort") or "",
            device=self.option("device") or "",
            seed=int(seed),
            clauses=tuple(self.config.option.clause),
        )

    def _number(self, name: str, kind: type[int] | type[float]) -> float:
        text = self.option(name) or ""
        try:
            return kind(text)
        except ValueError:
            raise pytest.UsageError(f"--conformance-{name}={text}: it must be a number") from None

    def bind(self) -> None:
        """Bind every candidate; raises UsageError, with the one sentence that says what is wrong."""
        from detr_conformance.errors import CandidateError, ConformanceError
        from detr_conformance.isolation import Worker

        limit = self._number("limit", float)
        for name in self.config.option.candidate:
            if name not in self.workers:
                try:
                    self.workers[name] = Worker(name, self.settings(), limit)
                except (CandidateError, ConformanceError) as error:
                    self.close()
                    raise pytest.UsageError(str(error)) from None

    def items(self, session: pytest.Session) -> Iterable[pytest.Item]:
        from detr_conformance.registry import checks

        self.bind()
        settings = self.settings()
        for name, worker in self.workers.items():
            selected = checks(worker.identity.profile, settings.level, settings.clauses)
            node = CandidateNode.from_parent(
                session, name=name, nodeid=f"conformance[{name}]", worker=worker, checks=selected
            )
            report = node.ihook.pytest_make_collect_report(collector=node)
            node.ihook.pytest_collectreport(report=report)
            yield from report.result

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


class CandidateNode(pytest.Collector):
    """The node above all checks of one candidate."""

    def __init__(self, *, worker: Worker, checks: Sequence[Check], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.worker, self.checks = worker, checks

    def collect(self) -> Iterator[pytest.Item]:
        yield SmokeItem.from_parent(self, name="smoke", worker=self.worker)
        for check in self.checks:
            yield CheckItem.from_parent(self, name=f"{check.clause.id}-{check.name}", worker=self.worker, check=check)


class Broken(Exception):
    """A finding that fails its item."""


class SmokeItem(pytest.Item):
    """Does the wiring hold?"""

    def __init__(self, *, worker: Worker, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.worker = worker

    def runtest(self) -> None:
        from detr_conformance.runner import versions

        identity, session = self.worker.identity, self.config.stash[_SESSION]
        about = {
            "candidate": identity.name,
            "profile": identity.profile,
            "profile_from": identity.profile_from,
            "level": session.option("level"),
            "effort": session.option("effort"),
            "seed": int(session.option("seed") or 0),
            "options": identity.options,
            "versions": versions(),
            "notes": identity.notes,
        }
        self.user_properties.append((_PROPERTY, json.dumps({"about": about})))
        _say(self, identity.name, identity.smoke)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return _message(excinfo) or super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        return "conformance", None, f"smoke  {self.worker.identity.name}"


class CheckItem(pytest.Item):
    """One check on one candidate."""

    def __init__(self, *, worker: Worker, check: Check, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.worker, self.check = worker, check
        # the checks of an experiment share its calls, so they belong into one process
        self.add_marker(pytest.mark.xdist_group(f"{worker.identity.name}@{check.on.name}"))

    def runtest(self) -> None:
        _say(self, self.worker.identity.name, self.worker.finding(self.check))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return _message(excinfo) or super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        return "conformance", None, f"{self.check.clause.id}  {self.check.name.replace('_', ' ')}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the checks of one experiment in one worker, unless the user chose a distribution."""
    if _SESSION not in config.stash or config.option.dist != "load":
        return None
    from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

    return LoadGroupScheduling(config, log)


def _say(item: pytest.Item, candidate: str, finding: Finding) -> None:
    """Attach the finding to the item's report and end the item as its verdict says."""
    item.user_properties.append((_PROPERTY, json.dumps({"candidate": candidate, "finding": asdict(finding)})))
    if finding.verdict in ("declined", "blocked"):
        pytest.skip(f"{finding.clause} {finding.verdict}: {finding.message}")
    if finding.verdict != "pass":
        raise Broken(finding.message)


def _message(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    return str(excinfo.value) if isinstance(excinfo.value, Broken) else ""


class _Findings:
    """What the items said, gathered where pytest gathers reports: also from the workers of pytest-xdist."""

    by_candidate: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def collect(cls, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, text in report.user_properties:
            if name != _PROPERTY or not isinstance(text, str):
                continue
            said = json.loads(text)
            if "about" in said:
                about = said["about"]
                cls.by_candidate.setdefault(about["candidate"], {"findings": []})["about"] = about
            else:
                cls.by_candidate.setdefault(said["candidate"], {"findings": []})["findings"].append(said["finding"])

    @classmethod
    def reports(cls) -> Iterator[Report]:
        from detr_conformance.findings import Report, finding_from

        for found in cls.by_candidate.values():
            if "about" in found:
                findings = [
                    f for f in map(finding_from, found["findings"]) if f.check != "smoke" or f.verdict != "pass"
                ]
                yield Report(findings=tuple(findings), **{**found["about"], "notes": tuple(found["about"]["notes"])})
