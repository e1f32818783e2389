"""The Modal host: the relay in a mount tree of its own, and the real client against the loopback server.

What a relay removes it removes as root: it is never started here but inside namespaces with folders of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.sandbox import Execution, ProgramRun, SandboxError, SandboxSettings, checks
from lib.sandbox.inside.relay import OWN_MACHINE, PROGRAMS
from lib.sandbox.modal_host import Lines, ModalWorker, first_line, relay_command
from lib.sandbox.worker import Job

SETTINGS = SandboxSettings(backend="modal", workers=1, limits=checks.LIMITS)
MACHINE = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--ro-bind", "/", "/"]
MACHINE += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp", "--tmpfs", "/var/tmp"]
MACHINE += ["--tmpfs", "/run", "--chdir", "/"]
DOUBLE = Job("def f(x): return 2 * x", (("assert f(2) == 4", "assert f(2) == 5"), ("f",), "", False))


class LocalSide:
    """A relay in a mount tree of its own on this machine, spoken to through pipes."""

    def __init__(self, side: str, heard: Any) -> None:
        command = [*MACHINE, *relay_command("/usr/bin/python3", side, SETTINGS.limits)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={OWN_MACHINE: "1", "PATH": "/usr/bin:/bin"}
        )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        self.send(first_line())

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listen(self, heard: Any) -> None:
        assert self.process.stdout
        lines = Lines(heard)
        for line in self.process.stdout:
            lines.feed(line.decode())
        heard(None)


@pytest.fixture(scope="module")
def worker() -> Iterator[ModalWorker]:
    version = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"],
                             capture_output=True, text=True, check=False).stdout  # fmt: skip
    if os.getuid() != 0 or not shutil.which("bwrap") or "True" not in version:
        pytest.skip("a relay is root in a machine of its own: needs root, bubblewrap and a system Python 3.11")
    worker = ModalWorker(SETTINGS, LocalSide)
    yield worker
    worker.close()


def test_programs_are_judged_through_the_relays(worker: ModalWorker) -> None:
    done = worker.run(DOUBLE)
    assert isinstance(done, Execution)
    assert (done.verdicts, done.backend) == (("pass", "fail"), "modal")
    script = worker.run(Job("print(int(input()) * 2)", stdin="21\n"))
    assert isinstance(script, ProgramRun)
    assert (script.stdout, script.stop) == ("42\n", "done")


def test_the_self_test_passes_through_the_relays(worker: ModalWorker) -> None:
    assert [check for check in checks.check(worker.run, "modal") if not check.passed] == []


def test_a_relay_removes_only_what_the_programs_user_owns(worker: ModalWorker, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for file in (mine, theirs):
        file.touch()
    os.chown(theirs, PROGRAMS, PROGRAMS)
    write = "import os\nopen('/tmp/x', 'w').close()\ndef f(x): return 2 * x"
    look = "import os\ndef f(x): return 2 * x if os.path.exists('/tmp/x') else 0"
    group = (("assert f(2) == 4",), ("f",), "", False)
    assert [worker.run(Job(source, group))[0] for source in (write, look)] == [("pass",), ("fail",)]
    assert mine.exists() and theirs.exists()  # this machine's own folders are out of its reach altogether


def test_a_relay_refuses_a_machine_that_is_not_its_own() -> None:
    code = "from lib.sandbox.inside.relay import main; main('solution', '', '{}', '1')"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "in a machine of its own" in done.stderr and "never on a shared one" in done.stderr


def test_a_relay_that_ends_is_an_error_and_never_a_verdict() -> None:
    if os.getuid() != 0 or not shutil.which("bwrap"):
        pytest.skip("a relay is root in a machine of its own: needs root and bubblewrap")
    sides: list[LocalSide] = []

    def opener(side: str, heard: Any) -> LocalSide:
        sides.append(LocalSide(side, heard))
        return sides[-1]

    worker = ModalWorker(SETTINGS, opener)
    sides[0].process.kill()
    sides[0].process.wait()
    with pytest.raises((SandboxError, BrokenPipeError)):
        worker.run(DOUBLE)
    worker.close()


LOOPBACK = """
import asyncio, json
from lib.sandbox import *
from lib.sandbox import self_test
settings = SandboxSettings(backend="modal", workers=1, limits=Limits(test_cpu=0.5), creations_per_second=5)
found = self_test(settings)
async def step():
    tests = ["assert f(2) == 4", "assert f(3) == 7"]
    runs = [run_tests("def f(x): return 2 * x", tests, ["f"], settings=settings) for _ in range(6)]
    return [done.verdicts for done in await asyncio.gather(*runs)]
print("RESULT", json.dumps([found.backend, [c.name for c in found.checks if not c.passed], asyncio.run(step())]))
"""


@pytest.mark.slow
def test_the_real_client_reuses_two_sandboxes_without_network(shared: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("modal_loopback", shared / "tools/modal_loopback/modal_loopback.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["modal_loopback"] = module
    spec.loader.exec_module(module)
    if os.getuid() != 0 or not shutil.which("bwrap"):
        pytest.skip("the loopback server's containers need root and bubblewrap")
    with module.Loopback(tmp_path / "modal", python="/usr/bin/python3") as server:
        done = subprocess.run(
            [sys.executable, "-c", LOOPBACK], cwd=PROJECT_ROOT, env=os.environ | server.env(),
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        events = [event for event in server.core.events if event["event"] == "sandbox_start"]
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == ["modal", [], [["pass", "fail"]] * 6]
    assert len(events) == 4  # two for the self-test, two for all six programs
    assert all(event["blocked"] for event in events)
