"""The sandbox's public path: verdicts, programs on standard input, the pool, and what it says where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import PROJECT_ROOT, doctor, sandbox
from lib.sandbox import (
    Execution,
    Limits,
    ProgramRun,
    SandboxError,
    SandboxSettings,
    bubblewrap,
    run_program,
    run_tests,
    self_test,
)
from lib.sandbox.worker import Job, Worker

SETTINGS = SandboxSettings(workers=2, limits=Limits(test_cpu=0.5, cpu=3.0, wall=6.0))
DOUBLE = "def f(x): return 2 * x"


@pytest.fixture(scope="module")
def works() -> Iterator[None]:
    try:
        self_test(SETTINGS)
    except SandboxError as error:
        assert not os.environ.get("CI"), f"CI claims to have a sandbox: {error}"
        pytest.skip(str(error))
    yield


pytestmark = pytest.mark.usefixtures("works")


def judged(source: str, *tests: str, setup: str = "", stop: bool = False, names: tuple[str, ...] = ("f",)) -> Execution:
    return asyncio.run(
        run_tests(source, tests, names, setup=setup, settings=SETTINGS, stop_at_first_failure=stop)
    )  # fmt: skip


def program(source: str, stdin: str = "") -> ProgramRun:
    return asyncio.run(run_program(source, stdin, settings=SETTINGS))


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_each_test_has_its_own_verdict() -> None:
    source = "def f(x):\n    if x == 3: raise KeyError(x)\n    return 2 * x"
    tests = ["assert f(1) == 2", "assert f(2) == 5", "assert f(3) == 6", "assert f(4) == 8", "assert"]
    assert judged(source, *tests).verdicts == ("pass", "fail", "error:KeyError", "pass", "error:SyntaxError")


def test_an_endless_loop_times_out_by_its_cpu_time_and_ends_the_execution() -> None:
    done = judged(
        "def f(x):\n    while x == 2: pass\n    return 1", "assert f(1) == 1", "assert f(2) == 1", "assert f(1)"
    )
    assert done.verdicts == ("pass", "timeout", "not run")
    assert 0.5 <= done.cpu_seconds < 1.5


def test_several_tests_may_together_take_longer_than_one() -> None:
    source = "import time\ndef f(s):\n    end = time.process_time() + s\n    while time.process_time() < end: pass\n"
    assert judged(source, *["assert f(0.3) is None"] * 4).verdicts == ("pass",) * 4


def test_waiting_is_ended_by_the_clock() -> None:
    done = judged("import time\ndef f(x): time.sleep(60)", "assert f(1)")
    assert done.verdicts == ("timeout",)
    assert 5 < done.wall_seconds < 11
    assert done.cpu_seconds < 0.5


def test_stopping_at_the_first_failure_leaves_the_rest_unrun() -> None:
    tests = ["assert f(1) == 2", "assert f(1) == 3", "assert f(1) == 2"]
    assert judged(DOUBLE, *tests, stop=True).verdicts == ("pass", "fail", "not run")
    assert judged(DOUBLE, *tests).verdicts == ("pass", "fail", "pass")


def test_a_program_that_cannot_be_loaded_fails_every_test_with_its_error() -> None:
    assert judged("def f(:", "assert f(1)", "assert f(2)").verdicts == ("error:SyntaxError",) * 2
    assert judged("import nowhere", "assert f(1)").verdicts == ("error:ModuleNotFoundError",)


def test_names_that_are_no_entry_points_are_the_judges_own() -> None:
    source = "def helper(x): return 1\ndef f(x): return 2 * x"
    assert judged(source, "assert helper(1) == 1").verdicts == ("error:NameError",)
    assert judged("def f(): pass", "assert len([1]) == 1", names=("f", "len")).verdicts == ("error:NameError",)


def test_tests_share_names_as_the_lines_of_a_module_do() -> None:
    assert judged(DOUBLE, "a = f(1)", "assert a == 2", "del a", "assert a == 2").verdicts[1:] == (
        "pass",
        "pass",
        "error:NameError",
    )


def test_the_log_is_cut_and_holds_no_control_characters() -> None:
    done = judged("print('\\x1b[2Jhi\\r' + 'x' * 9999)\n" + DOUBLE, "assert f(1) == 2")
    assert done.log.startswith("\\x1b[2Jhi\\rxxx")
    assert len(done.log) < 2100


def test_what_a_program_used_is_measured() -> None:
    done = judged(
        "x = [1] * 5_000_000\nimport time\nwhile time.process_time() < 0.2: pass\n" + DOUBLE, "assert f(1) == 2"
    )
    assert done.verdicts == ("pass",)
    assert 0.15 < done.cpu_seconds < 1
    assert done.memory_mb is not None and 40 < done.memory_mb < 200
    assert done.wall_seconds >= 0.15


def test_comparing_two_of_the_programs_own_objects_is_counted() -> None:
    source = "class P:\n    def __eq__(self, other): return True\ndef f(x): return P()"
    assert judged(source, "assert f(1) == f(2)").opaque_eq == 1
    assert judged(DOUBLE, "assert f(1) == f(1)").opaque_eq == 0


def test_without_tests_or_entry_points_nothing_can_be_judged() -> None:
    with pytest.raises(ValueError, match=r"no tests given: .* Drop the row"):
        judged(DOUBLE)
    with pytest.raises(ValueError, match="no entry points given"):
        judged(DOUBLE, "assert f(1)", names=())


def test_a_program_of_10_mb_is_a_bad_answer_at_once() -> None:
    started = time.monotonic()
    assert judged("x = 1\n" * 1_700_000, "assert f(1) == 2").verdicts == ("error:SourceTooLong",)
    assert time.monotonic() - started < 1


def test_the_same_program_gives_the_same_answer_twice() -> None:
    source = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('x')]"
    test = "import json\nassert f() == 0, json.dumps(f())"
    logs = {judged(source + "\nprint(f())", test).log for _ in range(4)}
    assert len(logs) == 1


# -- groups share a judge ----------------------------------------------------------------------------------------------


def test_setup_values_that_one_program_changed_are_fresh_for_the_next() -> None:
    spoil = "def f(xs):\n    xs.clear()\n    return 0"
    tests, setup = ("assert f(DATA) == sum(DATA)",), "DATA = [1, 2, 3]"

    async def step() -> list[Execution]:
        sources = [spoil, "def f(xs): return 0", "def f(xs): return 6"] * 6
        runs = (run_tests(source, tests, ["f"], setup=setup, settings=SETTINGS) for source in sources)
        return list(await asyncio.gather(*runs))

    assert [done.verdicts[0] for done in asyncio.run(step())] == ["pass", "fail", "pass"] * 6


def test_many_groups_at_once_get_their_own_verdicts() -> None:
    async def step() -> list[Execution]:
        runs = (
            run_tests(DOUBLE, [f"assert f({n % 8}) == {n % 8 + n % 3}"], ["f"], settings=SETTINGS) for n in range(96)
        )
        return list(await asyncio.gather(*runs))

    expected = ["pass" if n % 8 == n % 3 else "fail" for n in range(96)]
    assert [done.verdicts[0] for done in asyncio.run(step())] == expected


# -- programs on standard input ----------------------------------------------------------------------------------------


def test_a_program_reads_standard_input_and_its_output_comes_back() -> None:
    done = program("import sys\na = int(input())\nprint(a + sum(map(int, sys.stdin)))", "1\n2\n3\n")
    assert (done.stdout, done.stop) == ("6\n", "done")
    assert program("print(open(0).read()[::-1], end='')", "äbc").stdout == "cbä"


def test_a_main_block_runs_in_a_program() -> None:
    assert program("if __name__ == '__main__':\n    print('yes')").stdout == "yes\n"


@pytest.mark.parametrize(
    ("source", "stop", "stdout"),
    [
        ("print('a'); raise ValueError('no')", "error", "a\n"),
        ("import sys; print('a'); sys.exit(3)", "error", "a\n"),
        ("import sys; print('a'); sys.exit()", "done", "a\n"),
        ("import os; os.write(1, b'a'); os._exit(0)", "done", "a"),
        ("while True: pass", "timeout", ""),
        ("import os; os.kill(os.getpid(), 9)\nimport ctypes; ctypes.string_at(0)", "died", ""),
        ("print(", "error", ""),
    ],
)
def test_how_a_program_ended_is_said(source: str, stop: str, stdout: str) -> None:
    done = program(source)
    assert (done.stop, done.stdout) == (stop, stdout)


def test_the_error_of_a_program_is_in_its_log() -> None:
    assert "ValueError: no" in program("raise ValueError('no')").log


def test_a_program_that_prints_too_much_is_ended() -> None:
    done = program("while True: print('x' * 100000)")
    assert done.stop == "flood"
    assert len(done.stdout) <= 8 << 20


def test_large_input_arrives_whole() -> None:
    assert program("import sys; print(len(sys.stdin.read()))", "x" * 3_000_000).stdout == "3000000\n"


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_one_pool_serves_several_threads_and_loops_at_once() -> None:
    found: list[str] = []

    def judge() -> None:
        for _ in range(5):
            found.extend(judged(DOUBLE, "assert f(2) == 4").verdicts)

    threads = [threading.Thread(target=judge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["pass"] * 20


def test_a_step_that_is_cancelled_leaves_a_pool_that_works() -> None:
    async def step() -> None:
        loop = "def f(x):\n    while True: pass"
        tasks = [asyncio.create_task(run_tests(loop, ["assert f(1)"], ["f"], settings=SETTINGS)) for _ in range(50)]
        await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    started = time.monotonic()
    asyncio.run(step())
    assert judged(DOUBLE, "assert f(2) == 4").verdicts == ("pass",)
    assert time.monotonic() - started < 20


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return found + [below for child in found for below in _children(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _kill_sandboxes() -> None:
    for pid in _children(os.getpid()):
        with contextlib.suppress(OSError):
            if "bwrap" in Path(f"/proc/{pid}/comm").read_text():
                os.kill(pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_replaced_and_the_program_judged() -> None:
    assert judged(DOUBLE, "assert f(2) == 4").verdicts == ("pass",)
    _kill_sandboxes()
    assert judged(DOUBLE, "assert f(2) == 4").verdicts == ("pass",)


def test_a_sandbox_that_breaks_is_an_error_and_never_a_verdict() -> None:
    worker = Worker("warm", SETTINGS.limits, bubblewrap.user())
    try:
        _kill_sandboxes()
        with pytest.raises(SandboxError, match="the sandbox broke"):
            worker.run(Job(DOUBLE, (("assert f(2) == 4",), ("f",), "", False)))
    finally:
        worker.close()


def test_nothing_is_left_after_sigkill_of_the_caller() -> None:
    code = "import asyncio\nfrom lib.sandbox import *\nasync def main():\n"
    code += "    await run_tests('def f(x): return 1', ['assert f(1)'], ['f'])\n    print('up', flush=True)\n"
    code += "    loop = 'def f(x):\\n while True: pass'\n"
    code += (
        "    await asyncio.gather(*(run_tests(loop, ['assert f(1)'], ['f']) for _ in range(99)))\nasyncio.run(main())"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.PIPE)
    assert caller.stdout and caller.stdout.readline() == b"up\n"
    time.sleep(0.3)
    below = _children(caller.pid)
    caller.kill()
    caller.wait()
    assert len(below) >= 4
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in below):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


# -- the self-test, and where there is no sandbox ----------------------------------------------------------------------


def test_the_self_test_is_run_once_and_kept() -> None:
    found = self_test(SETTINGS)
    assert found.backend == "warm"
    assert all(check.passed for check in found.checks)
    assert {"environment", "network", "an object that equals everything"} <= {check.name for check in found.checks}
    assert self_test(SETTINGS) is found


def _with_bwrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A bwrap of our own before the real one on PATH; refusals found so far are forgotten."""
    real = subprocess.run(["which", "bwrap"], capture_output=True, text=True, check=True).stdout.strip()
    file = folder / "bwrap"
    file.write_text(f"#!/bin/bash\nreal={real}\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(sandbox, "_CHOSEN", {})


def test_a_sandbox_that_shows_a_file_of_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = 'a=(); for x in "$@"; do [ "$x" = --chdir ] && a+=(--bind /tmp /tmp); a+=("$x"); done; exec $real "${a[@]}"'
    _with_bwrap(tmp_path, monkeypatch, show)
    with pytest.raises(SandboxError, match=r"the self-test failed: files of this machine \(fail, expected pass"):
        self_test(SandboxSettings(backend="cold"))
    Path("/tmp/carried").unlink(missing_ok=True)


def test_where_warm_fails_cold_is_used_and_the_reason_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = '[[ "$*" == *CAP_SYS_ADMIN* ]] && { echo "bwrap: capset failed: Operation not permitted" >&2; exit 1; }'
    _with_bwrap(tmp_path, monkeypatch, f'{refuse}\nexec $real "$@"')
    found = self_test(SandboxSettings(workers=1))
    assert found.backend == "cold"
    assert "warm" in found.reason and "capset failed" in found.reason


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("bwrap: setting up uid map: Permission denied", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "AppArmor"),
        ("bwrap: No permissions to create new namespace, likely because", "unprivileged_userns_clone=1"),
        ("bwrap: Creating new namespace failed: Operation not permitted", "--security-opt seccomp=unconfined"),
        ("bwrap: execvp /nowhere/python3: No such file or directory", "does not find the interpreter"),
        ("bwrap: Unknown option --disable-userns", "older than 0.8"),
    ],
)  # fmt: skip
def test_a_refusal_quotes_bwrap_and_says_what_to_do(
    line: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_bwrap(tmp_path, monkeypatch, f'echo "{line}" >&2; exit 1')
    with pytest.raises(SandboxError) as refused:
        self_test(SandboxSettings())
    for part in (line, remedy, "sandbox.backend: modal"):
        assert part in str(refused.value)


def test_a_missing_bubblewrap_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "_CHOSEN", {})
    with pytest.raises(SandboxError, match=r"bubblewrap \(bwrap\) is not installed.*apt-get install -y bubblewrap"):
        self_test(SandboxSettings())
    with pytest.raises(SandboxError, match="not installed"):
        judged_with = run_tests(DOUBLE, ["assert f(1)"], ["f"], settings=SandboxSettings())
        asyncio.run(judged_with)


def test_macos_is_told_to_use_modal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match=r"macOS has none of the namespaces .* sandbox\.backend: modal"):
        bubblewrap.require()


def test_doctor_says_which_sandbox_works_here() -> None:
    assert doctor._sandbox().found.startswith("warm, ")


def test_doctor_gives_the_remedy_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_bwrap(tmp_path, monkeypatch, 'echo "bwrap: setting up uid map: Permission denied" >&2; exit 1')
    finding = doctor._sandbox()
    assert not finding.missing
    assert "AppArmor" in finding.found + finding.remedy
