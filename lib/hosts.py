"""Server processes on this machine: start one, wait until it answers, and end all of it.

Owns ports and what makes a server ready; lib/program.py owns the rest of a start. Must not know what is served.

    python -c "from lib.hosts import free_port; print(free_port())"
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.log import scrub
from lib.program import POLL, PORT_LOST, NotUpError, Process, Program, ProgramError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Server(Program):
    """A server to start."""

    command: Callable[[int], Sequence[str]]
    """Its command line for a port."""
    port: int = 0
    """0 = a free one."""
    port_setting: str = "port"
    """Where the port is set, for messages."""
    ready: str | Callable[[], bool] = "/health"
    """A path that is answered with 200 once it is ready, or a question that is asked again and again."""


class Listener(NamedTuple):
    pid: int
    command: str


class Host:
    """A running server. `with` ends it; so does the end of this process, whatever its cause."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.process = Process(server, server.command(port), {})

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def is_ready(self) -> bool:
        """Whether it answers now; of a server that hangs this is known after 2 s."""
        ready = self.server.ready
        return answers(self.address + ready) if isinstance(ready, str) else ready()

    def check(self) -> None:
        """Raises ProgramError where the server has ended."""
        if not self.process.is_alive():
            raise ProgramError(self.process.report(f"has ended: it {self.process.ending()}"))

    def close(self) -> None:
        """End the server and all that it started; returns when they are gone. Again = nothing."""
        self.process.close()

    def _wait_until_ready(self) -> None:
        ready = self.server.ready
        what = self.address + ready if isinstance(ready, str) else "it to be ready"
        while not self._is_up():
            self.process.check_start()
            self.process.wait_on(what)
            time.sleep(POLL)

    def _is_up(self) -> bool:
        """Whether it is this server that answers, and no other one that took the port."""
        if not self.is_ready() or not self.process.is_alive():
            return False
        found = listeners(self.port)
        if found and not {one.pid for one in found} & self.process.pids():
            raise NotUpError(f"did not get port {self.port}: {PORT_LOST} by {_named(found)}")
        return True


def start(server: Server) -> Host:
    """Start a server and wait until it is ready. Raises ProgramError.

    After a failure that may be transient it is tried again, on another free port where none is configured.
    """
    for attempt in itertools.count(1):
        host = Host(server, _port_for(server))
        try:
            host._wait_until_ready()
        except NotUpError as error:
            host.close()
            time.sleep(host.process.retry(error, attempt))
        except BaseException:
            host.close()
            raise
        else:
            break
    logger.info("%s: ready at %s after %.1f s", server.name, host.address, host.process.seconds())
    return host


def free_port() -> int:
    """A port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _port_for(server: Server) -> int:
    if not server.port:
        return free_port()
    where = f"port {server.port} ({server.port_setting})"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection may linger
        try:
            probe.bind((LOOPBACK, server.port))
        except (PermissionError, OverflowError):
            raise ProgramError(f"{where} cannot be had: choose one from 1024 to 65535, or 0 for a free one") from None
        except OSError:
            holder = _named(listeners(server.port))
            raise ProgramError(
                f"{where} is in use by {holder}. End that, choose another port, or 0 for a free one"
            ) from None
    return server.port


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
