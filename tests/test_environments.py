"""The verdict is the same wherever pytest is run: each run here is a process of its own, far from the project."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest

ASK = ["--candidate=detr_reference.criterion", "--conformance-effort=quick", "--clause=BOX-2", "--clause=MATCH-1"]
RIGHT = "CONFORMANT  2 of 2 clauses met"
PLUGINS = ("pytest_randomly", "pytest_timeout", "pytest_cov", "pytest_rerunfailures", "pytest_benchmark")
MIB = 2**20


def ran(*arguments, before=(), options=(), env=None, **how):
    """A run of pytest: its status and what it printed."""
    command = [*before, sys.executable, *options, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, check=False, **how)
    return done.returncode, done.stdout.decode("utf-8", "replace") + done.stderr.decode("utf-8", "replace")


def test_a_folder_that_cannot_be_written_to_and_no_home():
    bare = {k: v for k, v in os.environ.items() if k != "HOME"}
    command = [sys.executable, "-m", "pytest", *ASK]
    done = subprocess.run(command, cwd="/proc", env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RIGHT in done.stdout


def test_a_terminal_without_unicode(tmp_path):
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, out = ran(*ASK, cwd=tmp_path, env=plain)
    assert status == 0
    assert re.search(rf"^detr, must: {RIGHT}", out, re.MULTILINE), out


def test_warnings_as_errors_and_no_asserts(tmp_path):
    status, out = ran(*ASK, cwd=tmp_path, options=["-O"], env={"PYTHONWARNINGS": "error"})
    assert (status, RIGHT in out) == (0, True), out


def test_a_path_with_spaces(tmp_path):
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "my criterion.py").write_text("from detr_reference.criterion import build_criterion\n")
    status, out = ran("--candidate=my criterion.py:build_criterion", *ASK[1:], cwd=folder)
    assert (status, RIGHT in out) == (0, True), out


def test_little_memory(tmp_path):
    torch = "import torch; torch.set_num_threads(1); torch.ones(1, requires_grad=True).sum().backward()"
    peak = "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmPeak')))"
    needs = subprocess.run([sys.executable, "-c", f"{torch}\n{peak}"], capture_output=True, check=True).stdout
    limit = int(needs) * 1024 + 512 * MIB
    status, out = ran(*ASK, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert (status, RIGHT in out) == (0, True), out


def test_without_a_network_ranks_are_declined(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a namespace without a network")
    status, out = ran(*ASK, "--clause=DIST", cwd=tmp_path, before=["unshare", "-n"])
    assert (status, RIGHT in out) == (0, True), out
    assert "two gloo ranks cannot reach each other" in " ".join(out.split())


def test_an_old_conftest_with_a_profile_and_a_rootdir_of_its_own(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(
        "from hypothesis import settings\n"
        "settings.register_profile('ci', max_examples=1, deadline=1)\n"
        "settings.load_profile('ci')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --rootdir=tests\n")
    status, out = ran(*ASK, "--conformance-effort=standard", cwd=tmp_path)
    assert (status, RIGHT in out) == (0, True), out


def test_beside_other_plugins(tmp_path):
    missing = [name for name in PLUGINS if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} are not installed; tox -e py311-plugins has them")
    beside = ["--reruns=2", "--timeout=300", "--cov=detr_reference", "-p", "randomly"]
    status, out = ran(*ASK, *beside, cwd=tmp_path)
    assert (status, RIGHT in out) == (0, True), out
