"""One worker: a solution side and a judge side on this machine, and one program at a time between them.

Owns the processes, the wiring of one execution, and what its end means. Must not know asyncio, or who is rewarded.
A worker belongs to the thread that made it: the kernel ends its processes when that thread ends.

    python -c "from lib.sandbox.worker import Worker; help(Worker.run)"
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from lib.sandbox import bubblewrap
from lib.sandbox.inside.judge import LOST, NOT_RUN
from lib.sandbox.inside.wire import ProtocolError, read_frame, write_frame
from lib.sandbox.settings import Execution, Kind, Limits, ProgramRun, SandboxError

_START = 20.0
"""Seconds that a side may take to start."""
GRACE = 5.0
"""Seconds beyond the wall limit after which a side that does not answer is taken to be broken."""
_LOG = 2000
"""Characters of output that are kept for people."""
_READ = 1 << 16
"""Bytes read at once; a pipe holds as many."""
_SEND = 10.0
"""Seconds in which a side must take what it is sent."""


Group = tuple[tuple[str, ...], tuple[str, ...], str, bool]
"""Tests, entry points, setup, stop at the first failure."""


@dataclass(frozen=True)
class Job:
    """One program, and its tests or its standard input."""

    source: str
    group: Group | None = None
    """Executions that share it share a judge."""
    stdin: str = ""


class Worker:
    """Raises SandboxError when it cannot start, or breaks; close it then."""

    def __init__(self, kind: Kind, limits: Limits, user: int | None) -> None:
        self._kind, self._limits, self._user = kind, limits, user
        self._marks = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._group: object = None
        self._solution: _Side | None = None
        self._judge: _Side | None = None
        try:
            self._judge = self._start("judge")
            self._solution = self._start("solution")
        except BaseException:
            self.close()
            raise

    def run(self, job: Job) -> Execution | ProgramRun:
        """Run one program to its end. Bad programs have bad verdicts; SandboxError means that the sandbox broke."""
        self._solution = self._solution or self._start("solution")
        self._judge = self._judge or self._start("judge")
        started = time.monotonic()
        try:
            exchange = Exchange(self._limits.output_mb << 20, apart=job.group is None)
            try:
                self._begin(job, exchange)
                self._wait(job, exchange, started + self._limits.wall + GRACE)
            finally:
                exchange.close()
        except (OSError, ProtocolError) as error:
            raise SandboxError(f"the sandbox broke: {error}. {self._last_words()}") from None
        finally:
            if self._kind != "warm":
                self._solution.close()
                self._solution = None
        took = time.monotonic() - started
        tests = len(job.group[0]) if job.group else 0
        return executed(exchange, took, tests, self._kind) if job.group else ran(exchange, took, self._kind)

    def close(self) -> None:
        for side in (self._solution, self._judge):
            if side is not None:
                side.close()
        os.close(self._marks)

    def _start(self, script: str) -> _Side:
        arguments = [str(self._marks), *([_MODES[self._kind]] if script == "solution" else [])]
        code = bubblewrap.code_file()
        try:
            if self._kind == "none":
                prefix, environment = [], bubblewrap.environment(f"/proc/self/fd/{code}")
            else:
                prefix = bubblewrap.command(code, solution=script == "solution", warm=self._kind == "warm")
                environment = {}
            command = [*prefix, *bubblewrap.python(script)]
            return _Side(command, arguments, [self._marks, code], self._limits, environment, self._user)
        finally:
            os.close(code)

    def _begin(self, job: Job, exchange: Exchange) -> None:
        assert self._solution and self._judge
        ours, theirs = socket.socketpair()
        with ours, theirs:
            kind = "tests" if job.group else "program"
            write_frame(
                self._solution.control, {"run": kind}, [theirs.fileno(), exchange.out.target, exchange.errors.target]
            )
            exchange.close_targets()
            theirs.close()
            ours.settimeout(_SEND)
            with suppress(OSError):  # a clone that could not be set up is gone: its server says so
                write_frame(ours, {"source": job.source, "stdin": job.stdin})
            ours.settimeout(None)
            if job.group:
                self._ask_judge(job.group, ours)

    def _ask_judge(self, group: Group, sock: socket.socket) -> None:
        assert self._judge
        if self._group == group:
            write_frame(self._judge.control, {"again": True}, [sock.fileno()])
            return
        if self._group is not None:
            write_frame(self._judge.control, {"end": True})
        write_frame(self._judge.control, group_frame(group), [sock.fileno()])
        self._group = group

    def _wait(self, job: Job, exchange: Exchange, deadline: float) -> None:
        """Until both sides have said how it ended; what the program prints is read meanwhile, and cut."""
        assert self._solution and self._judge
        solution, judge = self._solution.control, self._judge.control
        poll = select.poll()
        for fd in (solution.fileno(), judge.fileno(), exchange.out.source, exchange.errors.source):
            poll.register(fd, select.POLLIN)
        stopped = False
        while exchange.end is None or (job.group and exchange.verdicts is None):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready and exchange.end is None:
                raise ProtocolError("no answer in time")
            if not ready:  # the judge is busy with what the program returned, in a loop that takes no notice of signals
                self._judge.close()
                self._judge, self._group = None, None
                exchange.verdicts = {"died": -signal.SIGXCPU}
                break
            for fd, _ in ready:
                if fd == solution.fileno():
                    exchange.end = self._ended(solution)
                    poll.unregister(fd)
                elif fd == judge.fileno():
                    exchange.verdicts = self._judged(judge)
                elif not exchange.read(fd):
                    poll.unregister(fd)
            if not stopped and exchange.end is None and (exchange.verdicts is not None or exchange.flooded):
                write_frame(solution, {"stop": True})
                stopped = True
        exchange.drain()

    def _ended(self, control: socket.socket) -> dict[str, Any]:
        try:
            end: dict[str, Any] = read_frame(control)
        except (ProtocolError, OSError):
            assert self._solution
            if self._kind != "warm" and self._solution.was_killed():  # nothing stands between program and server here
                return {"why": "died", "status": -signal.SIGKILL, "cpu": 0.0, "memory_mb": None}
            raise
        if end["why"] == "setup":
            raise ProtocolError("a program could not be confined")
        return end

    def _judged(self, control: socket.socket) -> dict[str, Any]:
        verdicts: dict[str, Any] = read_frame(control)
        if not verdicts.get("clean"):
            self._group = None
        died = verdicts.get("died")
        if died in (-signal.SIGKILL, -signal.SIGTERM):
            raise ProtocolError("the judge was killed from outside (out of memory?)")
        return verdicts

    def _last_words(self) -> str:
        return " ".join(side.last_words() for side in (self._solution, self._judge) if side is not None).strip()


_MODES: dict[Kind, str] = {"warm": "warm", "cold": "cold", "none": "cold"}


def group_frame(group: Group) -> dict[str, Any]:
    """What a judge is told about executions with the same tests."""
    return {"group": dict(zip(("tests", "entry_points", "setup", "stop_at_first_failure"), group, strict=True))}


def executed(exchange: Exchange, took: float, tests: int, kind: Kind) -> Execution:
    """The verdicts that an exchange ended with."""
    end, judged = exchange.end, exchange.verdicts
    assert end is not None and judged is not None
    if "died" in judged:  # by what the program returned: a number so large that a loop in C never ends, say
        first = "timeout" if judged["died"] in _OUT_OF_TIME else "died"
        verdicts = [first, *[NOT_RUN] * (tests - 1)]
    else:
        lost = "timeout" if _timed_out(end) else "died"
        verdicts = [lost if verdict == LOST else verdict for verdict in judged["verdicts"]]
    return Execution(
        tuple(verdicts),
        end["cpu"],
        took,
        end["memory_mb"],
        exchange.out.text(),
        judged.get("opaque_eq", 0),
        kind,
    )


def ran(exchange: Exchange, took: float, kind: Kind) -> ProgramRun:
    """How a script ended."""
    end = exchange.end
    assert end is not None
    if exchange.flooded:
        stop = "flood"
    elif _timed_out(end):
        stop = "timeout"
    else:
        stop = "done" if end["status"] == 0 else "died" if end["status"] < 0 else "error"
    stdout = bytes(exchange.out.kept).decode("utf-8", "replace")
    return ProgramRun(stdout, stop, end["cpu"], took, end["memory_mb"], exchange.errors.text(), kind)


_OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGVTALRM)


def _timed_out(end: dict[str, Any]) -> bool:
    return end["why"] in ("cpu", "wall") or end["status"] in _OUT_OF_TIME


# the sides ------------------------------------------------------------------------------------------------------------


class _Side:
    """A process in its sandbox, and the socket on which it is told what to do."""

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        fds: Sequence[int],
        limits: Limits,
        environment: dict[str, str],
        user: int | None,
    ) -> None:
        self.control, theirs = socket.socketpair()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno(), *fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                cwd="/",
                start_new_session=True,  # a Ctrl-C in the terminal is for the trainer
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        self.control.settimeout(_START)
        try:
            write_frame(self.control, limits.model_dump())
            read_frame(self.control)
        except (OSError, ProtocolError):
            self._process.kill()
            self._process.wait()
            words = self.last_words()
            self.close()
            raise SandboxError(bubblewrap.explain(words)) from None
        self.control.settimeout(_SEND)

    def was_killed(self) -> bool:
        """Whether a signal ended it (bubblewrap says 128 + its number), and not a mistake of ours."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.returncode
        return code is not None and (code < 0 or code > 128)

    def last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read(_LOG).decode("utf-8", "replace").strip()

    def close(self) -> None:
        self.control.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()


# one execution --------------------------------------------------------------------------------------------------------


@dataclass
class _Pipe:
    """What the program writes: counted, and kept up to a limit."""

    most: int
    source: int = -1
    target: int = -1
    total: int = 0
    kept: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.source, self.target = os.pipe()
        os.set_blocking(self.source, False)

    def read(self) -> bool:
        """Take what is there; False at the end."""
        try:
            data = os.read(self.source, _READ)
        except BlockingIOError:
            return True
        self.take(data)
        return bool(data)

    def take(self, data: bytes) -> None:
        self.total += len(data)
        self.kept += data[: max(0, self.most - len(self.kept))]

    def text(self) -> str:
        """The beginning, with nothing in it that a terminal or a log would take for a command."""
        text = bytes(self.kept[: 4 * _LOG]).decode("utf-8", "replace")[:_LOG]
        return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


class Exchange:
    """The pipes of one execution, and what the two sides said about its end."""

    def __init__(self, most: int, apart: bool) -> None:
        self._most = most
        self.out = _Pipe(most)
        self.errors = _Pipe(most) if apart else self.out
        self._pipes = (self.out, self.errors) if apart else (self.out,)
        self.end: dict[str, Any] | None = None
        self.verdicts: dict[str, Any] | None = None

    @property
    def flooded(self) -> bool:
        return sum(pipe.total for pipe in self._pipes) > self._most

    def read(self, fd: int) -> bool:
        return (self.out if fd == self.out.source else self.errors).read()

    def take(self, stream: int, data: bytes) -> None:
        """What came another way: 0 = standard output, 1 = standard error."""
        (self.errors if stream else self.out).take(data)

    def drain(self) -> None:
        """What is left in the pipes of a program that is gone: no more than a pipe holds."""
        for pipe in self._pipes:
            pipe.read()

    def close_targets(self) -> None:
        for pipe in self._pipes:
            if pipe.target >= 0:
                os.close(pipe.target)
                pipe.target = -1

    def close(self) -> None:
        self.close_targets()
        for pipe in self._pipes:
            os.close(pipe.source)
