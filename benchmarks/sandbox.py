"""How fast untrusted programs are judged: the sandbox against a bare interpreter, and against a bare fork.

One program of one line against one trivial assert, `--workers` at a time, in rounds that take turns; the ratios are
medians over the rounds, because other work on the machine slows all of them alike.

    bare   `python -I -S -c PROGRAM+TEST`: a new interpreter each, no isolation, its exit status is the verdict
    fork   a warm interpreter that forks program and judge, joined by the sandbox's own protocol: no isolation
    warm   lib.sandbox.run_tests, groups of 8 completions with the same tests

Exit status 0 = warm is at least 1.15 times bare and 0.75 times fork, and its 95th percentile is below 15 ms.

    python benchmarks/sandbox.py                        # half a minute
    python benchmarks/sandbox.py --step 4096            # the completions of one step as well
    python benchmarks/sandbox.py --memory 20000         # resident memory over many executions as well
    python benchmarks/sandbox.py --kill                 # what is left after SIGKILL in the middle of a step as well
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import Others, shown

from lib.sandbox import Execution, SandboxSettings, run_tests, self_test
from lib.sandbox.bubblewrap import python

SOURCE = "def f(x):\n    return 2 * x\n"
TEST = "assert f(2) == 4"
GROUP = 8
_AT_ONCE = 200
BARS = {"bare": 1.15, "fork": 0.75}
P95_MS = 15.0


def bare(count: int, workers: int) -> float:
    """Programs per second."""
    interpreter = python("solution")[0]
    command = [interpreter, "-I", "-S", "-c", f"{SOURCE}\n{TEST}"]
    started = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda _: subprocess.run(command, check=False).returncode, range(count)))
    assert not any(codes)
    return count / (time.monotonic() - started)


def fork(count: int, workers: int) -> float:
    """Programs per second: `workers` servers that fork twice a program."""
    interpreter = python("solution")[0]
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{_FORKS}"
    servers = [
        subprocess.Popen(
            [interpreter, "-s", "-S", "-c", code, str(count // workers)],
            env=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(workers)
    ]  # fmt: skip
    for server in servers:
        assert server.stdout and server.stdout.readline() == b"up\n"
    started = time.monotonic()
    for server in servers:
        server.communicate(b"go\n")
    assert not any(server.returncode for server in servers)
    return count // workers * workers / (time.monotonic() - started)


_FORKS = f"""
import os, socket, sys, types
sys.modules["lib"] = types.ModuleType("lib"); sys.modules["lib"].__path__ = [os.environ["PYTHONPATH"] + "/lib"]
sys.modules["lib.sandbox"] = types.ModuleType("lib.sandbox")
sys.modules["lib.sandbox"].__path__ = [os.environ["PYTHONPATH"] + "/lib/sandbox"]
from lib.sandbox.inside import peer, solution, judge, wire
for name in solution.PRELOADED.split(): __import__(name)
import gc; gc.collect(); gc.freeze()
print("up", flush=True); sys.stdin.readline()
for _ in range(int(sys.argv[1])):
    ours, theirs = socket.socketpair()
    if not (one := os.fork()):
        names = {{}}
        exec(compile({SOURCE!r}, "<solution>", "exec"), names)
        try: peer.Solution(theirs, names).serve_forever()
        finally: os._exit(0)
    if not (two := os.fork()):
        theirs.close()
        exec(compile({TEST!r}, "<test>", "exec"), {{"f": peer.Judge(ours).get("f")}})
        os._exit(0)
    ours.close(); theirs.close()
    assert os.waitpid(two, 0)[1] == 0
    os.kill(one, 9); os.waitpid(one, 0)
"""


async def _group(number: int, size: int, settings: SandboxSettings) -> list[Execution]:
    tests = [f"{TEST}  # {number}"]
    return list(await asyncio.gather(*(run_tests(SOURCE, tests, ["f"], settings=settings) for _ in range(size))))


async def _step(count: int, settings: SandboxSettings) -> list[Execution]:
    groups = await asyncio.gather(*(_group(number, GROUP, settings) for number in range(count // GROUP)))
    done = [execution for group in groups for execution in group]
    assert all(execution.verdicts == ("pass",) for execution in done)
    return done


def warm(count: int, settings: SandboxSettings) -> tuple[float, list[float]]:
    """Programs per second, and how long each took, in ms."""
    started = time.monotonic()
    done = asyncio.run(_step(count, settings))
    return len(done) / (time.monotonic() - started), [1000 * execution.wall_seconds for execution in done]


def compare(rounds: int, count: int, settings: SandboxSettings) -> bool:
    workers = settings.workers
    warm(4 * GROUP, settings)
    rates: dict[str, list[float]] = {"bare": [], "fork": [], "warm": []}
    latencies: list[float] = []
    others = Others()
    for _ in range(rounds):
        rates["bare"].append(bare(count, workers))
        rates["fork"].append(fork(count, workers))
        rate, took = warm(count, settings)
        rates["warm"].append(rate)
        latencies += took
    for name, values in rates.items():
        say(f"{name:5} {statistics.median(values):6.0f} per second on {workers} workers")
    good = True
    for name, bar in BARS.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["warm"], rates[name], strict=True))
        good &= ratio >= bar
        say(f"warm / {name}: {ratio:.2f} (bar {bar})")
    p50, p95 = (statistics.quantiles(latencies, n=100)[at - 1] for at in (50, 95))
    say(f"warm: p50 {p50:.1f} ms, p95 {p95:.1f} ms (bar {P95_MS}); others used {shown(others.cores())} cores")
    return good and p95 < P95_MS


def step(count: int, settings: SandboxSettings) -> bool:
    started = time.monotonic()
    warm(count, settings)
    took = time.monotonic() - started
    say(f"a step of {count} completions on {settings.workers} workers: {took:.1f} s (bar 20 s for 4096 on 2 cores)")
    return took < 20 * count / 4096


def memory(count: int, settings: SandboxSettings) -> bool:
    """Resident memory of this process, and of all sandboxes, after a tenth and after all of `count` executions."""
    for done in range(0, count, _AT_ONCE):  # in steps: the results of all at once would be this script's own growth
        warm(_AT_ONCE, settings)
        if done <= count // 10:
            before = _resident()
    after = _resident()
    say(f"resident after {count // 10}: here {before[0]:.1f} MB, sandboxes {before[1]:.1f} MB")
    say(f"resident after {count}: here {after[0]:.1f} MB, sandboxes {after[1]:.1f} MB")
    return after[0] - before[0] < 20 and after[1] - before[1] < 20


def _resident() -> tuple[float, float]:
    page = resource.getpagesize() / 1e6
    own = int(Path("/proc/self/statm").read_text().split()[1]) * page
    others = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in descendants(os.getpid())]
    return own, sum(others)


def descendants(pid: int) -> list[int]:
    """All processes below one, at this moment."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in descendants(child)]


def kill() -> bool:
    """SIGKILL a caller in the middle of a step: how many of its processes are left half a second later?"""
    code = "import sys; sys.path.insert(0, 'benchmarks')\nfrom sandbox import *\n"
    code += "settings = SandboxSettings(workers=2)\nwarm(8, settings)\nprint('up', flush=True)\nwarm(100_000, settings)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE)
    assert caller.stdout and caller.stdout.readline() == b"up\n"
    time.sleep(0.5 + random.random())
    below = descendants(caller.pid)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 5
    while (left := [pid for pid in below if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    took = time.monotonic() - deadline + 5
    say(f"SIGKILL in the middle of a step: {len(below)} processes before, {len(left)} after {took:.2f} s")
    return bool(below) and not left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=400, help="programs in one round")
    parser.add_argument("--step", type=int, default=0, help="completions of one step")
    parser.add_argument("--memory", type=int, default=0, help="executions over which memory must stay flat")
    parser.add_argument("--kill", action="store_true", help="kill a caller in the middle of a step")
    options = parser.parse_args()
    settings = SandboxSettings(workers=options.workers)
    found = self_test(settings)
    say(f"{found.backend}: {len(found.checks)} lines of the self-test passed in {found.seconds:.1f} s ({found.reason})")
    good = compare(options.rounds, options.count, settings) if options.rounds else True
    if options.step:
        good &= step(options.step, settings)
    if options.memory:
        good &= memory(options.memory, settings)
    if options.kill:
        good &= kill()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
