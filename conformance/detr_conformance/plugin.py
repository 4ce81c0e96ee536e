"""pytest options, collection and terminal summary.

Loads neither torch nor Hypothesis: that waits until a candidate is judged. Without ``--candidate`` nothing happens.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from detr_conformance.findings import Finding, Report
    from detr_conformance.isolation import Worker
    from detr_conformance.ledger import Ledger
    from detr_conformance.registry import Check
    from detr_conformance.runner import Identity, Settings

OPTIONS: Final = {
    "profile": ("", "NAME", "detr, deformable-detr, dino or grounding-dino [the candidate's own, or a guess]"),
    "level": ("must", "LEVEL", "must or should"),
    "effort": ("standard", "EFFORT", "quick, standard (up to 100 searched cases an experiment) or deep"),
    "device": ("cpu", "DEVICE", "what to compare with the cpu: auto, cuda, mps or xpu; cpu: nothing"),
    "seed": ("", "N", "seed of the searched cases [0; at effort deep a new one every time]"),
    "limit": ("20", "SECONDS", "how long one call of the candidate may take"),
    "database": ("", "WHERE", "keep inputs found to fail for the next run: a folder, or redis://host:port/number"),
    "ledger": ("", "FILE", "accepted deviations, a TOML file; see detr-conformance ledger --help"),
    "report": ("", "DIR", "write report.json, report.html, report.md and badge.json into this folder"),
}
FOUND: Final = "detr_conformance"  # the attribute of a test report that carries its finding, also between processes


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
        _fresh_seed(config)
        config.pluginmanager.register(Run(config), "detr-conformance-run")


def _fresh_seed(config: pytest.Config) -> None:
    """Effort deep searches elsewhere every time, all workers of a run with the same seed, which the report names."""
    effort = config.option.conformance_effort or config.getini("conformance_effort")
    if effort == "deep" and config.option.conformance_seed is None and not config.getini("conformance_seed"):
        config.option.conformance_seed = str(secrets.randbelow(2**31))


class Run:
    """One pytest run over some candidates, each bound once and judged in a process of its own."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.started = time.monotonic()
        self.workers: dict[str, Worker] = {}
        self.identities: dict[str, Identity] = {}
        self.found: dict[str, list[Finding]] = {}
        self.written: list[str] = []
        self.accepted: Ledger | None = None

    # --- options ---

    def option(self, name: str) -> str:
        """The value given, or that of the ini file, or the default."""
        given = self.config.getoption(f"conformance_{name}")
        return str(self.config.getini(f"conformance_{name}") if given is None else given)

    def number(self, name: str, kind: type[int] | type[float], default: str = "") -> float:
        """A number; raises UsageError where it is none."""
        text = self.option(name) or default
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
            seed=int(self.number("seed", int, "0")),
            clauses=tuple(self.config.option.clause),
            database=self.option("database"),
        )

    def bind(self) -> None:
        """Bind every candidate; raises UsageError with the one sentence that says what is wrong."""
        from detr_conformance.errors import ConformanceError
        from detr_conformance.isolation import Worker

        limit = self.number("limit", float)
        self.read_ledger()
        for name in self.config.option.candidate:
            if name not in self.workers:
                try:
                    self.workers[name] = Worker(name, self.settings(), limit)
                    self.identities[name] = self.workers[name].identity
                except ConformanceError as error:
                    self.close()
                    raise pytest.UsageError(str(error)) from None

    def read_ledger(self) -> None:
        """Read the accepted deviations; raises UsageError that names each mistake with its line."""
        from detr_conformance import ledger
        from detr_conformance.errors import ConformanceError

        given = self.option("ledger")
        if given and self.accepted is None:
            try:
                self.accepted = ledger.read(given)
                ledger.day()
            except ConformanceError as error:
                raise pytest.UsageError(str(error)) from None

    def with_repro(self, finding: Finding, worker: Worker) -> Finding:
        """The finding with a script that shows it, where a report is written."""
        from detr_conformance import repro

        directory = self.option("report")
        if not directory or finding.verdict not in ("fail", "deviation"):
            return finding
        try:
            return repro.written(finding, worker.identity.spec, worker.identity.profile, directory)
        except OSError:  # the report cannot be written either, and says so
            return finding

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

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
        report = yield
        if isinstance(item, FindingItem) and item.found and call.when == "call":
            said = {"candidate": item.node.name, "finding": asdict(item.found)}
            setattr(report, FOUND, json.dumps(said))  # which pytest-xdist carries along
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # reports of all workers pass here too
        if hasattr(report, FOUND):
            from detr_conformance.findings import finding_from

            said = json.loads(getattr(report, FOUND))
            self.found.setdefault(said["candidate"], []).append(finding_from(said["finding"]))
            if report.failed and isinstance(report.longrepr, str):
                report.longrepr = Shown(report.longrepr)  # type: ignore[assignment]  # what has toterminal will do

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.close()
        if self.is_worker or self.config.option.collectonly:
            return
        reports = self.reports()
        self.write(reports)
        if exitstatus not in (0, 1, 5):
            return
        if any(f.verdict == "error" for r in reports for f in r.findings):
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        elif exitstatus == 0 and not all(r.judged for r in reports):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif exitstatus == 0 and not all(r.conformant for r in reports):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.config.option.collectonly:
            return
        from detr_conformance.report import terminal

        writer = self.config.get_terminal_writer()
        for report in self.reports():
            terminalreporter.section("detr-conformance")
            # line by line: what the terminal's encoding lacks is escaped by pytest, and a line's end with it
            for line in terminal.text(report, writer.fullwidth, writer.hasmarkup).splitlines():
                terminalreporter.write_line(line)
        for line in self.written:
            terminalreporter.write_line(line)

    # --- what was found ---

    def write(self, reports: Sequence[Report]) -> None:
        """Write what was asked for, and remember what to say of it."""
        from detr_conformance.report import files

        directory, summary = self.option("report"), os.environ.get("GITHUB_STEP_SUMMARY")
        for place, how in ((directory, files.write), (summary, files.append_summary)):
            try:
                self.written += how(reports, place) if place and reports else ()
            except OSError as error:
                self.written.append(f"no report in {place}: {error.strerror or error}")

    def reports(self) -> list[Report]:
        """A report a candidate, of what its items said, in the contract's order whichever worker was first."""
        if not self.identities:
            return []
        from detr_conformance.registry import checks
        from detr_conformance.runner import report

        settings, seconds = self.settings(), time.monotonic() - self.started
        reports = []
        for name, identity in self.identities.items():
            found = {f.check: f for f in self.found.get(name, ())}
            wanted = [c.name for c in checks(identity.profile, settings.level, settings.clauses)]
            findings, missing = [found[c] for c in wanted if c in found], [c for c in wanted if c not in found]
            reports.append(report(identity, settings, findings, seconds, missing))
        return self.accepted.checked(reports) if self.accepted else reports


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


class Shown:
    """A failure's message, which pytest prints through this: the clause and the names of fields stand out. It is no
    text, else pytest prints it once more in its summary where the variable CI is set."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def toterminal(self, tw: Any) -> None:
        head, *rest = self.text.splitlines() or [""]
        clause, space, sentence = head.partition(" ")
        tw.write(clause, red=True, bold=True)
        tw.line(space + sentence, bold=True)
        for line in rest:
            named = re.match(r"( {6}\w+(?: \w+)?)( {2,}.*)", line)
            tw.write(named[1] if named else "", light=True)
            tw.line(named[2] if named else line)


class Broken(Exception):
    """A finding that fails its item; its text is the message."""


class FindingItem(pytest.Item):
    """One check on one candidate; without a check, the smoke call."""

    def __init__(self, *, parent: CandidateNode, check: Check | None, **kwargs: Any) -> None:
        super().__init__(parent=parent, **kwargs)
        self.node, self.check = parent, check
        self.found: Finding | None = None
        if self.config.pluginmanager.hasplugin("xdist"):
            # the checks of an experiment share its calls, so they belong into one process
            experiment = check.on.name if check else "smoke"
            self.add_marker(pytest.mark.xdist_group(f"{parent.name}@{experiment}"))

    def runtest(self) -> None:
        worker = self.node.worker
        finding: Finding = worker.finding(self.check) if self.check else worker.identity.smoke
        run, names = self.node.run, (worker.identity.name, worker.identity.spec)
        finding = run.accepted.accept(finding, names) if run.accepted else finding
        finding = run.with_repro(finding, worker)
        self.found = finding
        self.user_properties += [(k, getattr(finding, k)) for k in ("clause", "level", "verdict")]
        if finding.verdict in ("declined", "blocked"):
            pytest.skip(f"{finding.clause} {finding.verdict}: {finding.message}")
        if finding.accepted:
            pytest.xfail(finding.deviation)
        if finding.verdict != "pass" and finding.level != "information":
            raise Broken(finding.message)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, Broken) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        if self.check is None:
            return "conformance", None, f"smoke  {self.node.name}"
        return "conformance", None, f"{self.check.clause.id}  {self.check.name.replace('_', ' ')}"
