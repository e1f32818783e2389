"""Server processes on this machine: start one, wait until it answers, and end all of it.

Owns ports, readiness, retries, and what is said of a failure. lib/keeper.py stands between a server and this process:
whatever ends this process ends the server's whole tree. Must not know what is served.

    python -c "from lib.hosts import free_port; print(free_port())"
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lib import WorkbenchError
from lib.keeper import end, family, last_lines, launch
from lib.log import scrub

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PROGRESS_SECONDS = 10.0
SHOWN_LINES = 50
FIRST_WAIT = 1.0
"""Seconds before the second attempt, doubled for each one more."""

PORT_LOST = "address already in use"
TRANSIENT = re.compile(
    rf"{PORT_LOST}|EADDRINUSE|connection (reset|aborted)|remote end closed|read timed out|too many requests|"
    r"temporary failure in name resolution|\b50[234] (server error|bad gateway|service|gateway)",
    re.IGNORECASE,
)
"""What may be gone at the next attempt: a port that another process took first, a download that was cut off."""

_ERROR = re.compile(r"^[^'\"`]{0,120}?\b((?:\w*(?:Error|Exception): |Value error, )(?!.*root cause).+)")
_LOOKED_AT = 2_000
"""Lines from the end of a log in which the cause of a failure is looked for."""
_POLL = 0.2


class HostError(WorkbenchError, RuntimeError):
    """A server did not start, or has ended; the message says why and what to change, and shows its last lines."""


@dataclass(frozen=True)
class Program:
    """A server to start."""

    name: str
    """How messages begin: `vLLM`."""
    command: Callable[[int], Sequence[str]]
    """Its command line for a port. It runs in the project's root."""
    log: Path
    """What it says goes here, without secrets; what was said at an earlier start is forgotten."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's own."""
    port: int = 0
    """0 = a free one."""
    port_setting: str = "port"
    """Where the port is set, for messages."""
    ready: str | Callable[[], bool] = "/health"
    """A path that is answered with 200 once it is ready, or a question that is asked again and again."""
    deadline: float = 600.0
    """Seconds until it has to be ready."""
    deadline_setting: str = "deadline"
    grace: float = 10.0
    """Seconds that it gets to end by itself."""
    attempts: int = 3
    advice: Sequence[tuple[str, str]] = ()
    """(pattern, what to change), the most telling first; \\1 in the text is the pattern's first group."""
    log_bytes: int = 8 * 2**20


class Listener(NamedTuple):
    pid: int
    command: str


class _NotUp(Exception):
    """One attempt failed."""

    def __init__(self, what: str, hung: bool = False) -> None:
        super().__init__(what)
        self.hung = hung


class Host:
    """A running server. `with` ends it; so does the end of this process, whatever its cause."""

    def __init__(self, program: Program, port: int) -> None:
        self.program, self.port = program, port
        self._began = time.monotonic()
        command = program.command(port)
        self._keeper = launch(command, program.environment, program.log, program.log_bytes, program.grace)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def is_alive(self) -> bool:
        return self._keeper.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers now; of a server that hangs this is known after 2 s."""
        ready = self.program.ready
        return answers(self.address + ready) if isinstance(ready, str) else ready()

    def pids(self) -> set[int]:
        """The server's processes (Linux; elsewhere empty)."""
        return family(self._keeper.pid) - {self._keeper.pid}

    def tail(self, lines: int = SHOWN_LINES) -> list[str]:
        """The last lines that it said."""
        return last_lines(self.program.log, lines)

    def check(self) -> None:
        """Raises HostError where the server has ended."""
        if not self.is_alive():
            raise HostError(self._report(f"has ended: it {self._ending()}"))

    def close(self) -> None:
        """End the server and all that it started; returns when they are gone. Again = nothing."""
        end(self._keeper, self.program.grace)

    def _wait_until_ready(self) -> None:
        program, told = self.program, self._began
        what = self.address + program.ready if isinstance(program.ready, str) else "it to be ready"
        while not self._is_up():
            waited = time.monotonic() - self._began
            if not self.is_alive():
                raise _NotUp(f"did not start: it {self._ending()} after {waited:.0f} s")
            if waited > program.deadline:
                raise _NotUp(
                    f"is not ready after {waited:.0f} s: still waiting for {what}. It hangs, or needs longer (for a "
                    f"first download, say): look at its last lines, or raise {program.deadline_setting}",
                    hung=True,
                )
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told += PROGRESS_SECONDS
                said = (self.tail(1) or ["nothing yet"])[0][:200]
                progress = f"{waited:.0f} of {program.deadline:g} s"
                logger.info("%s: waiting for %s, %s; it said last: %s", program.name, what, progress, said)
            time.sleep(_POLL)

    def _is_up(self) -> bool:
        """Whether it is this server that answers, and no other one that took the port."""
        if not self.is_ready() or not self.is_alive():
            return False
        found = listeners(self.port)
        if found and not {one.pid for one in found} & self.pids():
            raise _NotUp(f"did not get port {self.port}: {PORT_LOST} by {_named(found)}")
        return True

    def _ending(self) -> str:
        status = self._keeper.returncode
        number = -status if status < 0 else status - 128
        if number not in set(signal.Signals):
            return f"exited with status {status}"
        why = " (by hand, or by the kernel because memory ran out: see `dmesg`)" if number == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(number).name}{why}"

    def _report(self, what: str) -> str:
        lines = self.tail(_LOOKED_AT)
        shown = "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (nothing)"
        cause = explain(lines, self.program.advice)
        return scrub(f"{self.program.name} {what}.{cause}\nThe last lines of {self.program.log}:\n{shown}")


def start(program: Program) -> Host:
    """Start a server and wait until it is ready. Raises HostError.

    After a failure that may be transient it is tried again, on another free port where none is configured.
    """
    for attempt in range(1, program.attempts + 1):
        host = Host(program, _port_for(program))
        try:
            host._wait_until_ready()
        except _NotUp as error:
            host.close()
            transient = None if error.hung else TRANSIENT.search("\n".join([str(error), *host.tail()]))
            if not transient or attempt == program.attempts:
                raise HostError(host._report(str(error))) from None
            again = f"attempt {attempt + 1} of {program.attempts}"
            logger.warning("%s %s (%s): %s follows", program.name, error, transient[0], again)
        except BaseException:
            host.close()
            raise
        else:
            logger.info("%s: ready at %s after %.1f s", program.name, host.address, time.monotonic() - host._began)
            return host
        time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    raise ValueError(f"attempts {program.attempts}: at least 1")


def explain(lines: Sequence[str], advice: Sequence[tuple[str, str]]) -> str:
    """The line that says why and what to change: what a server says last is often only what followed from it."""
    for pattern, change in advice:
        for line in lines:
            if match := re.search(pattern, line, re.IGNORECASE):
                return f" It said: {line.strip()[:500]}\nWhat to change: {match.expand(change)}"
    errors = [match[1] for line in lines if (match := _ERROR.search(line))]
    return f" It said: {errors[-1][:500]}" if errors else ""


def free_port() -> int:
    """A port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _port_for(program: Program) -> int:
    if not program.port:
        return free_port()
    where = f"port {program.port} ({program.port_setting})"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection may linger
        try:
            probe.bind((LOOPBACK, program.port))
        except (PermissionError, OverflowError):
            raise HostError(f"{where} cannot be had: choose one from 1024 to 65535, or 0 for a free one") from None
        except OSError:
            holder = _named(listeners(program.port))
            raise HostError(
                f"{where} is in use by {holder}. End that, choose another port, or 0 for a free one"
            ) from None
    return program.port


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a GET of the URL is answered with 200 in time. No proxy that the environment names is asked."""
    import http.client
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            return int(answer.status) == 200
    except (OSError, http.client.HTTPException):
        return False


def listeners(port: int) -> list[Listener]:
    """The processes that listen on a TCP port, as far as /proc shows them: Linux, and other users' only to root."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{cells[9]}]")
    found = [folder.parent for folder in Path("/proc").glob("[0-9]*/fd") if sockets and _holds(folder, sockets)]
    return [Listener(int(process.name), _command(process)) for process in found]


def _holds(folder: Path, sockets: set[str]) -> bool:
    with suppress(OSError):  # another user's, or just ended
        for descriptor in folder.iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(descriptor) in sockets:
                    return True
    return False


def _command(process: Path) -> str:
    with suppress(OSError):
        return scrub(process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")).strip()
    return "?"


def _named(found: Sequence[Listener]) -> str:
    if not found:
        return "a process that cannot be seen from here (as root `ss -ltnp` or `lsof -i` names it)"
    return ", ".join(f"process {one.pid} ({one.command[:120]})" for one in found)
