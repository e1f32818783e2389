"""The judge side: runs the asserts, in a sandbox of its own that never runs model code.

Owns verdicts. A child is forked for each group of executions with the same tests, and ended as soon as anything but
plain values crossed, so that no state passes from one completion to the next. Must not know sandboxes or rewards.

    python -c "from lib.sandbox.inside.judge import main; help(main)"
"""

from __future__ import annotations

import ast
import builtins
import gc
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Self

from lib.sandbox.inside import kernel, wire
from lib.sandbox.inside.peer import Judge

PRELOADED = "math re itertools functools collections heapq string operator copy datetime decimal fractions statistics"

LOST = "lost"
"""The verdict of a test in which the solution side went away; the worker knows why it did."""
NOT_RUN = "not run"


_GROWTH_MB = 64
"""A judge that has grown by this much is replaced: the next completion must find the same memory as the first."""


class TestTimeout(BaseException):
    """A test used more CPU time on this side than it may."""


def main(control_fd: str, marks_fd: str) -> None:
    """Serve one group of executions after the other until the other end of the control socket is gone."""
    control, marks = socket.socket(fileno=int(control_fd)), int(marks_fd)
    limits = wire.read_frame(control)
    for name in PRELOADED.split():
        __import__(name)
    machine = kernel.Machine()
    gc.collect()
    gc.freeze()
    wire.write_frame(control, {"up": True})
    while True:
        try:
            message, fds = wire.read_frame_with_fds(control)
        except wire.ProtocolError:
            return
        if "group" not in message:  # the end of a group whose child is gone already
            continue
        pid = os.fork()
        if pid == 0:
            _serve_group(machine, control, marks, message["group"], fds, limits)
            os._exit(0)
        for fd in fds:
            os.close(fd)
        _, status = os.waitpid(pid, 0)
        if status:
            wire.write_frame(control, {"died": os.waitstatus_to_exitcode(status)})


def _serve_group(
    machine: kernel.Machine,
    control: socket.socket,
    marks: int,
    sent: dict[str, Any],
    fds: list[int],
    limits: dict[str, Any],
) -> None:
    """Judge executions with the same tests until told to end, or until one was not clean."""
    kernel.set_limits(limits["memory_mb"], limits["file_mb"])
    machine.filter_calls()
    group = Group(sent, limits, marks)
    while fds:
        with socket.socket(fileno=fds[0]) as sock:
            verdicts = group.judge(sock)
        wire.write_frame(control, verdicts)
        if not verdicts["clean"]:
            return
        try:
            _, fds = wire.read_frame_with_fds(control)
        except wire.ProtocolError:  # the worker is gone
            return


class Group:
    """What executions with the same tests share: code, compiled once."""

    def __init__(self, sent: dict[str, Any], limits: dict[str, Any], marks: int) -> None:
        self._tests: list[str] = sent["tests"]
        self._entry_points: list[str] = sent["entry_points"]
        self._stop: bool = sent["stop_at_first_failure"]
        self._limits, self._marks, self._size = limits, marks, _largest_mb()
        self._setup = _compiled(sent["setup"], "<setup>")
        self._code = [_compiled(test, f"<test {number}>") for number, test in enumerate(self._tests)]
        names = _free_names([sent["setup"], *self._tests]) - set(self._entry_points)
        # Tests may rely on the solution's "import math": they get the judge's own module, never the model's.
        self._modules = {name: module for name in names if (module := _standard_module(name))}

    def judge(self, sock: socket.socket) -> dict[str, Any]:
        """The verdicts on one solution."""
        random.seed(0)
        peer = Judge(sock)
        verdicts: list[str] = []
        names: dict[str, Any] = {}
        verdict = self._verdict(lambda: names.update(self._prepared(peer)), peer)
        if verdict != "pass":
            verdicts = [verdict] if verdict in (LOST, "timeout") else [verdict] * len(self._code)
        else:
            for code in self._code:
                os.eventfd_write(self._marks, 1)
                verdicts.append(self._verdict(lambda code=code: _run(code, names), peer))  # type: ignore[misc]
                if verdicts[-1] in (LOST, "timeout") or (self._stop and verdicts[-1] != "pass"):
                    break
        clean = peer.clean and not {LOST, "timeout"} & set(verdicts) and _largest_mb() - self._size < _GROWTH_MB
        verdicts += [NOT_RUN] * (len(self._code) - len(verdicts))
        return {"verdicts": verdicts, "opaque_eq": peer.opaque_eq, "clean": clean}

    def _prepared(self, peer: Judge) -> dict[str, Any]:
        """Fresh names for the tests: modules, what the solution defines, and what the row's own setup adds."""
        hello = wire.read_frame(peer._sock)
        if type(hello) is not dict or hello.get("ready") is not True:
            raise _LoadError(str(hello.get("error")) if type(hello) is dict else "")
        names: dict[str, Any] = {"__name__": "__test__", **self._modules}
        for name in self._entry_points:
            try:
                names[name] = peer.get(name)
            except KeyError:
                names[name] = _Missing(name)  # also where a builtin has that name
        if self._setup is not None:
            _run(self._setup, names)
        return names

    def _verdict(self, work: Callable[[], None], peer: Judge) -> str:
        """Run something under the timer, and say how it ended."""
        timer = _Timer(self._limits["test_cpu"])
        try:
            with timer:
                work()
            verdict = "pass"
        except _LoadError as error:
            verdict = f"error:{_identifier(str(error))}"
        except AssertionError:
            verdict = "fail"
        except (TestTimeout, wire.ProtocolError):
            verdict = LOST
        except BaseException as error:  # (a test may raise anything: that is its verdict)
            verdict = f"error:{_identifier(type(error).__name__)}"
        if timer.rung:  # also where the test swallowed it
            return "timeout"
        return LOST if peer.broken else verdict


class _LoadError(Exception):
    """The solution could not be loaded; the message is the name of its exception."""


class _Missing:
    """Stands for a function that the solution does not define."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NameError(f"name {self._name!r} is not defined")

    def __getattr__(self, name: str) -> Any:
        raise NameError(f"name {self._name!r} is not defined")

    def __eq__(self, other: object) -> bool:
        raise NameError(f"name {self._name!r} is not defined")

    __hash__ = None  # type: ignore[assignment]


def _run(code: CodeType | SyntaxError, names: dict[str, Any]) -> None:
    if isinstance(code, SyntaxError):
        raise code
    exec(code, names)


def _compiled(source: str, name: str) -> CodeType | SyntaxError | None:
    try:
        return compile(source, name, "exec", dont_inherit=True) if source.strip() else None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, far too deeply nested
        return error if isinstance(error, SyntaxError) else SyntaxError(str(error))
    except SyntaxError as error:
        return error


def _free_names(sources: list[str]) -> set[str]:
    """Names that the code uses, does not bind, and that are not builtins."""
    used: set[str] = set()
    bound: set[str] = set(vars(builtins))
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
    return used - bound


def _standard_module(name: str) -> Any:
    if name not in sys.stdlib_module_names:
        return None
    try:
        return __import__(name)
    except ImportError:  # tkinter and the like
        return None


def _identifier(name: str) -> str:
    return name[:60] if name.isidentifier() else "Exception"


def _largest_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Timer:
    """Raises TestTimeout inside once this process has used `seconds` of CPU time; repeats until it is left.

    A loop in C takes no notice of that: after three times as long SIGVTALRM ends the process.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self.rung, self._inside = seconds, False, False

    def __enter__(self) -> Self:
        self._inside = True
        signal.signal(signal.SIGPROF, self._ring)
        signal.setitimer(signal.ITIMER_PROF, self._seconds, self._seconds / 10)
        signal.setitimer(signal.ITIMER_VIRTUAL, 3 * self._seconds)
        return self

    def __exit__(self, *error: object) -> None:
        self._inside = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._inside:
            self.rung = True
            raise TestTimeout
