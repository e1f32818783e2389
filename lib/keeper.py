"""The process that stands between a program and its owner, so that nothing of the program outlives the owner.

Owns the end of a process tree, and a log of what it says that stays small and without secrets. Must not know what runs.
On Linux the keeper adopts what the tree's processes leave behind, and the kernel ends the program with the keeper.

    python -c "import os; from lib.keeper import family; print(family(os.getpid()))"
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT
from lib.log import scrub

KILL_NOW = signal.SIGUSR1
"""To a keeper: end the tree without any grace time."""
POLL = 0.2
"""Seconds between two looks at whether the owner is still there."""
_GONE = 10.0
"""Seconds that killed processes get to be gone: one that waits for a disk cannot be killed."""
_LINE, _BLOCK = 4_000, 65_536
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    log_bytes: int,
    grace: float,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command under a keeper: what is returned is the keeper, in a session of its own.

    SIGTERM to the keeper, or the end of this process, ends the command's whole tree: SIGTERM first, and SIGKILL after
    `grace` seconds; KILL_NOW ends it at once. The keeper's exit status is the command's, or 128 + the signal that ended
    it. The command inherits `descriptors`. The log of the start before stays, as `<log>.before`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    _older(log).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.replace(log, log.with_name(f"{log.name}.before"))
    order = {"parent": os.getpid(), "log": str(log), "bytes": log_bytes, "grace": grace, "command": list(command)}
    order["descriptors"] = list(descriptors)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lib.keeper", json.dumps(order)],
            cwd=PROJECT_ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=descriptors,
            start_new_session=True,  # a group of its own: all of it can be ended, and an interrupt here is not for it
        )


def end(keeper: subprocess.Popen[bytes], grace: float) -> None:
    """End the keeper's whole tree; returns when it is gone."""
    if keeper.poll() is None:
        keeper.terminate()
    with suppress(subprocess.TimeoutExpired):
        keeper.wait(grace + _GONE + 5)
    keeper.kill()
    wait(keeper)


def wait(keeper: subprocess.Popen[bytes]) -> None:
    """Wait until the keeper's whole tree is gone."""
    keeper.wait()
    until = time.monotonic() + _GONE
    while (rest := family(keeper.pid)) and time.monotonic() < until:  # where the keeper was killed itself, or hung
        kill(rest)
        time.sleep(0.02)


def family(root: int) -> set[int]:
    """A process, its descendants, and the processes of its session: those that run (Linux; elsewhere empty)."""
    known: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, _, session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if state not in "ZX":
                known[int(stat.parent.name)] = int(parent), int(session)
    found = {pid for pid, (_, session) in known.items() if root in (pid, session)}
    while grown := {pid for pid, (parent, _) in known.items() if parent in found} - found:
        found |= grown
    return found


def kill(pids: set[int]) -> None:
    for pid in pids - {os.getpid()}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a keeper's log."""
    lines: deque[str] = deque(maxlen=count)
    for path in (_older(log), log):
        with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
            lines.extend(line.rstrip("\n") for line in file)
    return list(lines)


def keep(order: Mapping[str, Any]) -> int:
    """A keeper's whole life. Returns its exit status."""
    asked: list[int] = []
    for number in (signal.SIGTERM, KILL_NOW):
        signal.signal(number, lambda number, _: asked.append(number))
    woken = _wake_at_signals()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    log = _Log(Path(order["log"]), order["bytes"])
    try:
        child = subprocess.Popen(
            order["command"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=order["descriptors"],
            preexec_fn=lambda: _prctl(_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        log.add(f"cannot start {order['command'][0]}: {error}\n".encode())
        return 127
    assert child.stdout is not None
    for descriptor in order["descriptors"]:
        os.close(descriptor)  # the child's alone: its end is seen on them
    said = child.stdout.fileno()
    os.set_blocking(said, False)
    killed_at = float("inf")
    while child.poll() is None:
        log.follow(said, woken)
        if KILL_NOW in asked or time.monotonic() > killed_at:
            child.kill()
        elif killed_at == float("inf") and (asked or os.getppid() != order["parent"]):
            child.terminate()
            killed_at = time.monotonic() + order["grace"]
    _end_rest(child.pid)
    while log.follow(said, woken, wait=0):
        pass
    log.close()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wake_at_signals() -> int:
    """A descriptor that can be read from after a signal, the end of a child included."""
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    return woken


def _end_rest(group: int) -> None:
    """Kill what a dead program leaves, and what that leaves, until nothing is left to adopt."""
    until = time.monotonic() + _GONE
    while time.monotonic() < until:
        kill(family(os.getpid()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)  # all that can be done outside Linux
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Log:
    """What a program says: whole lines without secrets, in two files of half the allowed size, the older one `.1`."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._half = path, most // 2
        self._file = path.open("ab")
        self._rest = b""
        self._ended = False

    def follow(self, said: int, woken: int, wait: float = POLL) -> bool:
        """Add what is said meanwhile, but for no longer than until `woken`; whether there was anything."""
        found = select.select([woken] if self._ended else [woken, said], [], [], wait)[0]
        if woken in found:
            os.read(woken, _BLOCK)
        if said not in found:
            return False
        data = os.read(said, _BLOCK)
        self._ended = not data  # closed, though the program lives on
        self.add(data)
        return bool(data)

    def add(self, data: bytes) -> None:
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # progress bars
        whole, end, self._rest = (self._rest + lines).rpartition(b"\n")
        if len(self._rest) > _BLOCK:
            whole, end, self._rest = whole + end + self._rest, b"\n", b""
        self._write(whole + end)

    def close(self) -> None:
        self._write(self._rest)
        self._file.close()

    def _write(self, data: bytes) -> None:
        lines = scrub(data.decode(errors="replace")).split("\n")
        with suppress(OSError):  # a full disk must not end the program
            if self._file.tell() > self._half:
                self._file.close()
                os.replace(self._path, _older(self._path))
                self._file = self._path.open("ab")
            self._file.write("\n".join(line[:_LINE] for line in lines).encode())
            self._file.flush()


def _older(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")


if __name__ == "__main__":
    sys.exit(keep(json.loads(sys.argv[1])))
