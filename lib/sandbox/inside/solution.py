"""The solution side: a server that runs each untrusted program in a fresh clone of itself, inside one sandbox.

Owns the life of an execution: its own processes, files and limits, then its end. It never sees a test. Must not know
the judge: what the program's functions return goes to a socket that came from outside.

    python -c "from lib.sandbox.inside.solution import main; help(main)"
"""

from __future__ import annotations

import gc
import io
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import types
from typing import Any, NoReturn

from lib.sandbox.inside import kernel, wire
from lib.sandbox.inside.peer import Solution

PRELOADED = (
    "math re itertools functools collections heapq bisect string operator typing copy statistics dataclasses abc enum "
    "contextlib io tempfile threading traceback ast textwrap hashlib inspect json queue cmath array numbers calendar"
)
"""What programs import all the time: a clone of the server pays nothing for it."""

TMP_BYTES, TMP_FILES = 64 * kernel.MB, 4096
_RPC, _CONFINED = 3, 4
"""Descriptors of a clone: the judge's socket, and an eventfd on which it says that it is confined."""
_LOOKS = 4
"""How often the CPU clock is read in the time that one test may take."""


def main(control_fd: str, marks_fd: str, mode: str) -> None:
    """Serve one execution after the other until the other end of the control socket is gone; mode: warm or cold."""
    control = socket.socket(fileno=int(control_fd))
    limits = wire.read_frame(control)
    if mode == "warm":
        for name in PRELOADED.split():
            __import__(name)
    server = Server(control, int(marks_fd), limits, warm=mode == "warm")
    _line_buffering(True)  # what a program prints is seen even where it is killed
    sys.path[:] = [path for path in sys.path if path != os.environ["PYTHONPATH"]]
    gc.collect()
    gc.freeze()
    wire.write_frame(control, {"up": True})
    while True:
        try:
            message, fds = wire.read_frame_with_fds(control)
        except wire.ProtocolError:
            return
        if "run" in message:  # else a stop that came too late
            wire.write_frame(control, server.execute(message["run"], fds))


class Server:
    """Runs one program at a time, and watches it."""

    def __init__(self, control: socket.socket, marks: int, limits: dict[str, Any], warm: bool) -> None:
        self._control, self._marks, self._limits, self._warm = control, marks, limits, warm
        self._machine = kernel.Machine()
        self._confined = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._namespaces = kernel.NEW_PIDS | kernel.NEW_MOUNTS | kernel.NEW_IPC if warm else 0

    def execute(self, kind: str, fds: list[int]) -> dict[str, Any]:
        """Run a program, with its socket, standard output and standard error; how it ended, and what it used."""
        _drain(self._marks)
        _drain(self._confined)
        started = time.monotonic()
        pid = self._machine.fork(self._namespaces)
        if pid == 0:
            self._clone(kind, fds)
        for fd in fds:
            os.close(fd)
        why = self._watch(pid, started)
        os.kill(pid, signal.SIGKILL)
        if why == "exit" and not _drain(self._confined):
            why = "setup"
        _, status, used = os.wait4(pid, 0)
        return {
            "why": why,
            "status": os.waitstatus_to_exitcode(status),
            "cpu": used.ru_utime + used.ru_stime,
            "memory_mb": used.ru_maxrss / 1024,
        }

    def _watch(self, pid: int, started: float) -> str:
        """Wait for the end of an execution, and say what it was: exit, stop (asked for), cpu or wall.

        The judge counts tests in `marks`, an eventfd that programs do not have: it is read, not waited for, so that
        short tests cost nothing. A test's CPU time counts from the first look after it began.
        """
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        limits, before = self._limits, 0.0
        try:
            while True:
                left = started + limits["wall"] - time.monotonic()
                ready = poll.poll(max(0.0, min(limits["test_cpu"] / _LOOKS, left)) * 1000)
                if ready:
                    return "exit" if any(fd == ended for fd, _ in ready) else "stop"
                if left <= 0:
                    return "wall"
                used = kernel.cpu_seconds(pid)
                if _drain(self._marks):
                    before = used
                if used - before > limits["test_cpu"] or used > limits["cpu"]:
                    return "cpu"
        finally:
            os.close(ended)

    def _clone(self, kind: str, fds: list[int]) -> NoReturn:
        """In the clone: confine this process, then run the program. It must never return into the server's code."""
        try:
            sock, sent = self._confine(kind, fds)
        except BaseException as error:  # whatever it is, this process ends here; the server finds that it was not ready
            os.write(2, f"the sandbox could not be set up: {error!r}\n".encode("utf-8", "replace"))
            os._exit(1)
        try:
            _program(sent["source"]) if kind == "program" else _module(sock, sent["source"])
        finally:
            os._exit(1)

    def _confine(self, kind: str, fds: list[int]) -> tuple[socket.socket, dict[str, str]]:
        """Take this process's privileges away, one after the other; its socket, and what to run."""
        limits = self._limits
        os.setsid()  # kill(0) reaches the process group, and that of a clone would be the server's: namespaces or not
        _redirect(fds, self._confined)
        if self._warm:
            self._machine.mount_tmpfs("/tmp", TMP_BYTES, TMP_FILES)
            os.chdir("/tmp")
        sock = socket.socket(fileno=_RPC)
        sent = wire.read_frame(sock)
        if kind == "program":
            _stdin(sent["stdin"])
        kernel.set_limits(limits["memory_mb"], limits["file_mb"])
        kernel.set_cpu_limit(limits["cpu"])
        self._machine.drop_capabilities()
        self._machine.filter_calls()
        random.seed(0)  # the same program gives the same answer twice
        os.eventfd_write(_CONFINED, 1)
        os.close(_CONFINED)
        return sock, sent


def _drain(counter: int) -> int:
    try:
        return os.eventfd_read(counter)
    except BlockingIOError:
        return 0


# in the clone ---------------------------------------------------------------------------------------------------------


def _redirect(fds: list[int], confined: int) -> None:
    """0 = nothing, 1 and 2 = the pipes, 3 = the socket, 4 = `confined`; every other descriptor is closed."""
    null = os.open("/dev/null", os.O_RDONLY)
    high = [null, fds[1], fds[2], fds[0], confined]
    while min(high) <= _CONFINED:  # first out of the way
        high = [os.dup(fd) for fd in high]
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(_CONFINED + 1, 4096)


def _stdin(text: str) -> None:
    """A file in memory as standard input: no second process is needed to write it."""
    fd = os.memfd_create("stdin")
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def _module(sock: socket.socket, source: str) -> NoReturn:
    """Load the program as module `solution`, then answer the judge."""
    # Not "__main__": a main block with input() must not run, and dataclasses look their module up in sys.modules.
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = vars(module)
    try:
        exec(compile(source, "<solution>", "exec", dont_inherit=True), names)
    except BaseException as error:  # (model code may raise anything)
        wire.write_frame(sock, {"ready": False, "error": _named(error)})
        os._exit(1)
    wire.write_frame(sock, {"ready": True})
    try:
        Solution(sock, names).serve_forever()
    finally:
        os._exit(0)  # the judge has heard enough


def _program(source: str) -> NoReturn:
    """Run the program as a script; its exit status says how it ended."""
    os.close(_RPC)
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    _line_buffering(False)
    status = 0
    try:
        exec(compile(source, "<solution>", "exec", dont_inherit=True), vars(main_module))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # (model code may raise anything)
        sys.stderr.write(f"{_named(error)}: {error}\n")
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _line_buffering(wanted: bool) -> None:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=wanted)


def _named(error: BaseException) -> str:
    name = type(error).__name__
    return name if isinstance(name, str) and name.isidentifier() else "Exception"
