"""pytest options, collection and terminal summary.

Loads neither torch nor Hypothesis: that waits until a candidate is judged. Without ``--candidate`` nothing happens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from detr_conformance.findings import Finding, Report
    from detr_conformance.isolation import Worker
    from detr_conformance.registry import Check
    from detr_conformance.runner import Settings

OPTIONS: Final = {
    "profile": ("", "NAME", "detr, deformable-detr, dino or grounding-dino [the candidate's own, or a guess]"),
    "level": ("must", "LEVEL", "must or should"),
    "effort": ("standard", "EFFORT", "quick, standard (up to 100 searched cases an experiment) or deep"),
    "device": ("cpu", "DEVICE", "what to compare with the cpu: auto, cuda, mps or xpu; cpu: nothing"),
    "seed": ("0", "N", "seed of the searched cases"),
    "limit": ("20", "SECONDS", "how long one call of the candidate may take"),
    "report": ("", "DIR", "write report.json into this folder"),
}
PROPERTY: Final = "detr_conformance"


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
        shown = f"{text} [{default}]" if default else text
        group.addoption(f"--conformance-{name}", default=None, metavar=metavar, help=shown)
        parser.addini(f"conformance_{name}", f"as --conformance-{name}", default=default)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.candidate:
        config.pluginmanager.register(Run(config), "detr-conformance-run")


class Run:
    """One pytest run over some candidates, each bound once and judged in a process of its own."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.workers: dict[str, Worker] = {}
        self.said: dict[str, dict[str, Any]] = {}

    # --- options ---

    def option(self, name: str) -> str:
        """The value given, or that of the ini file, or the default."""
        given = self.config.getoption(f"conformance_{name}")
        return str(self.config.getini(f"conformance_{name}") if given is None else given)

    def number(self, name: str, kind: type[int] | type[float]) -> float:
        """A number; raises UsageError where it is none."""
        text = self.option(name)
        try:
            return kind(text)
        except ValueError:
            raise pytest.UsageError(f"--conformance-{name}={text}: it must be a number") from None

    def settings(self) -> Settings:
        """How all candidates of this run are judged; raises ConformanceError."""
        from detr_conformance.runner import Settings

        return Settings(
            profile=self.option("profile") or None,
            level=self.option("level"),
            effort=self.option("effort"),
            device=self.option("device"),
            seed=int(self.number("seed", int)),
            clauses=tuple(self.config.option.clause),
        )

    def bind(self) -> None:
        """Bind every candidate; raises UsageError with the one sentence that says what is wrong."""
        from detr_conformance.errors import ConformanceError
        from detr_conformance.isolation import Worker

        limit = self.number("limit", float)
        for name in self.config.option.candidate:
            if name not in self.workers:
                try:
                    self.workers[name] = Worker(name, self.settings(), limit)
                except ConformanceError as error:
                    self.close()
                    raise pytest.UsageError(str(error)) from None

    def close(self) -> None:
        """End the processes of all candidates."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    # --- pytest's hooks ---

    def pytest_report_header(self) -> str:
        return f"judging {', '.join(self.config.option.candidate)} against the DETR criterion contract"

    def pytest_sessionstart(self) -> None:
        if not self.is_worker:  # before any worker starts, so that a wrong use ends the run as a usage error
            self.bind()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        # without paths on the command line only the contract is collected
        if self.config.args_source is not pytest.Config.ArgsSource.ARGS:
            self.config.args = []
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        from detr_conformance.registry import checks

        self.bind()
        settings = self.settings()
        for name, worker in self.workers.items():
            selected = checks(worker.identity.profile, settings.level, settings.clauses)
            node = CandidateNode.from_parent(
                session, name=name, nodeid=f"conformance[{name}]", run=self, worker=worker, checks=selected
            )
            report = node.ihook.pytest_make_collect_report(collector=node)
            node.ihook.pytest_collectreport(report=report)
            items.extend(report.result)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Keep the checks of one experiment in one worker, unless the user chose another distribution."""
        if config.option.dist != "load":
            return None
        from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

        return LoadGroupScheduling(config, log)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # reports of all workers pass here too, with what their items attached
        for name, text in report.user_properties if report.when == "call" else ():
            if name == PROPERTY and isinstance(text, str):
                said = json.loads(text)
                found = self.said.setdefault(said["candidate"], {"about": None, "findings": []})
                if "about" in said:
                    found["about"] = said["about"]
                found["findings"].append(said["finding"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.close()
        if self.is_worker or exitstatus not in (0, 1, 5):
            return
        reports = list(self.reports())
        if any(f.verdict == "error" for r in reports for f in r.findings):
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        elif exitstatus == 0 and not all(r.judged for r in reports):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif exitstatus == 0 and not all(r.conformant for r in reports):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from detr_conformance.report import files, terminal

        markup = {
            "good": {"green": True, "bold": True},
            "bad": {"red": True, "bold": True},
            "quiet": {"light": True},
            "bold": {"bold": True},
        }
        reports = list(self.reports())
        for report in reports:
            terminalreporter.section("detr-conformance")
            for line in terminal.screen(report):
                for text, style in line:
                    terminalreporter.write(text, **markup.get(style, {}))
                terminalreporter.write_line("")
        directory = self.option("report")
        if directory:
            try:
                terminalreporter.write_line(f"report  {files.write_json(reports, directory)}")
            except OSError as error:
                terminalreporter.write_line(
                    f"--conformance-report={directory}: {error.strerror}; no report was written"
                )

    # --- what was found ---

    def reports(self) -> Iterator[Report]:
        """A report a candidate, of what its items said, in the contract's order whichever worker was first."""
        from detr_conformance.findings import Report, finding_from
        from detr_conformance.registry import checks

        order = {check.name: i for i, check in enumerate(checks())}
        for found in self.said.values():
            if found["about"]:
                findings = [
                    finding_from(f) for f in found["findings"] if (f["check"], f["verdict"]) != ("smoke", "pass")
                ]
                findings.sort(key=lambda f: order.get(f.check, -1))
                yield Report(**{**found["about"], "notes": tuple(found["about"]["notes"])}, findings=tuple(findings))

    def about(self, worker: Worker) -> dict[str, Any]:
        """What the report says besides findings."""
        from detr_conformance.runner import report

        whole = asdict(report(worker.identity, self.settings(), ()))
        return {name: value for name, value in whole.items() if name != "findings"}


class CandidateNode(pytest.Collector):
    """The node above all checks of one candidate."""

    def __init__(self, *, run: Run, worker: Worker, checks: Sequence[Check], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run, self.worker, self.checks = run, worker, checks

    def collect(self) -> Iterator[pytest.Item]:
        if not self.run.is_worker and not self.run.config.option.collectonly:
            self.worker.ask_ahead(self.checks)
        yield FindingItem.from_parent(self, name="smoke", check=None)
        for check in self.checks:
            yield FindingItem.from_parent(self, name=f"{check.clause.id}-{check.name}", check=check)


class Broken(Exception):
    """A finding that fails its item; its text is the message."""


class FindingItem(pytest.Item):
    """One check on one candidate; without a check, the smoke call."""

    def __init__(self, *, parent: CandidateNode, check: Check | None, **kwargs: Any) -> None:
        super().__init__(parent=parent, **kwargs)
        self.node, self.check = parent, check
        if self.config.pluginmanager.hasplugin("xdist"):
            # the checks of an experiment share its calls, so they belong into one process
            experiment = check.on.name if check else "smoke"
            self.add_marker(pytest.mark.xdist_group(f"{parent.name}@{experiment}"))

    def runtest(self) -> None:
        worker = self.node.worker
        finding: Finding = worker.finding(self.check) if self.check else worker.identity.smoke
        said = {"candidate": self.node.name, "finding": asdict(finding)}
        if self.check is None:
            said["about"] = self.node.run.about(worker)
        self.user_properties.append((PROPERTY, json.dumps(said)))
        if finding.verdict in ("declined", "blocked"):
            pytest.skip(f"{finding.clause} {finding.verdict}: {finding.message}")
        if finding.verdict != "pass" and finding.level != "information":
            raise Broken(finding.message)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, Broken) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        if self.check is None:
            return "conformance", None, f"smoke  {self.node.name}"
        return "conformance", None, f"{self.check.clause.id}  {self.check.name.replace('_', ' ')}"
