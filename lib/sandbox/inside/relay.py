"""One side in a machine of its own (a Modal Sandbox): passes on between its standard streams and the local server.

Owns the lines on standard input and output, restarting the solution's server after every program, and removing what a
program left in the folders that it can write to. Must not know what it passes on.

    python -c "from lib.sandbox.inside.relay import main; help(main)"
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

from lib.sandbox.inside import wire

PROGRAMS = 61_003
"""The user that programs run as: an id that owns nothing else, so that what it leaves can be told apart."""

OWN_MACHINE = "WORKBENCH_SANDBOX_MACHINE"
"""Environment variable that says that this machine is the relay's own: it removes files, and must be root."""
SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
"""Folders that everybody can write to."""
_CHUNK = 1 << 16
_POLL = 10.0


def main(side: str, code: str, limits: str, patience: str) -> None:
    """Relay for the `solution` or the `judge` until standard input ends, or is silent for `patience` seconds."""
    if os.getuid() != 0 or os.environ.get(OWN_MACHINE) != "1":
        sys.exit(f"a relay runs as root in a machine of its own, which {OWN_MACHINE}=1 says: never on a shared one")
    relay = Relay(side, code, json.loads(limits))
    relay.start()
    relay.say({"up": True})
    relay.serve(float(patience))


class Relay:
    """The local server, and at most one execution."""

    def __init__(self, side: str, code: str, limits: dict[str, Any]) -> None:
        self._side, self._code, self._limits = side, code, limits
        self._marks = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lines = bytearray()
        self._rpc: socket.socket | None = None
        self._pipes: dict[int, int] = {}
        self._left = 0

    def start(self) -> None:
        """A fresh server, as another user: a program can reach its own server's files and processes, not ours."""
        self._control, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(self._marks), *(["cold"] if self._side == "solution" else [])]
        code = f"import sys; from lib.sandbox.inside.{self._side} import main; main(*sys.argv[1:])"
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", "-P", "-c", code, *arguments],
                pass_fds=[theirs.fileno(), self._marks],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/tmp",
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": self._code, "PYTHONHASHSEED": "0"},
                start_new_session=True,
                user=PROGRAMS,
                group=PROGRAMS,
                extra_groups=[],
            )
        wire.write_frame(self._control, self._limits)
        wire.read_frame(self._control)

    def serve(self, patience: float) -> None:
        heard = time.monotonic()
        while time.monotonic() - heard < patience:
            for fd in self._ready():
                if fd == 0:
                    heard = time.monotonic()
                    if not self._hear():
                        return
                elif fd == self._control.fileno():
                    self._from_server()
                elif self._rpc is not None and fd == self._rpc.fileno():
                    self._from_rpc(self._rpc)
                elif fd in self._pipes:
                    self._from_pipe(fd)

    def say(self, message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(1, data) :]

    def _ready(self) -> list[int]:
        fds = [0, self._control.fileno(), *self._pipes, *([self._rpc.fileno()] if self._rpc else [])]
        return select.select(fds, [], [], _POLL)[0]

    def _hear(self) -> bool:
        data = os.read(0, 1 << 20)
        self._lines += data
        *lines, self._lines = self._lines.split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(data)

    def _obey(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a side that is gone says so by itself
            if "begin" in message:
                self._begin(message["begin"])
            if "control" in message:
                wire.write_frame(self._control, message["control"])
            if message.get("marks"):
                os.eventfd_write(self._marks, message["marks"])
            if "data" in message and self._rpc:
                self._rpc.sendall(base64.b64decode(message["data"]))
        if message.get("eof"):
            self._hang_up()

    def _begin(self, frame: dict[str, Any]) -> None:
        """A frame for the server that starts an execution: it gets the descriptors that go with it."""
        self._hang_up()
        self._rpc, theirs = socket.socketpair()
        fds = [theirs.fileno()]
        if self._side == "solution":
            self._left = self._limits["output_mb"] << 20
            for stream in (0, 1):
                source, target = os.pipe()
                self._pipes[source] = stream
                fds.append(target)
        try:
            wire.write_frame(self._control, frame, fds)
        finally:
            theirs.close()
            for fd in fds[1:]:
                os.close(fd)

    def _from_rpc(self, rpc: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = rpc.recv(_CHUNK)
        if not data:
            self._hang_up()
            self.say({"eof": True})
            return
        marks = 0
        if self._side == "judge":
            with contextlib.suppress(BlockingIOError):
                marks = os.eventfd_read(self._marks)
        self.say({"data": base64.b64encode(data).decode(), "marks": marks})

    def _from_pipe(self, fd: int) -> None:
        data = os.read(fd, _CHUNK)
        stream = self._pipes[fd]
        if not data:
            os.close(fd)
            del self._pipes[fd]
        elif self._left >= 0:
            self._left -= len(data)
            self.say({"out": base64.b64encode(data).decode(), "stream": stream})

    def _from_server(self) -> None:
        """A frame of the server, or its end; the solution's server is replaced after every program."""
        frame: Any = None
        with contextlib.suppress(wire.ProtocolError, OSError):
            frame = wire.read_frame(self._control)
        if self._side == "judge":
            if frame is None:
                sys.exit("the judge's server is gone")
            self.say({"control": frame})
            return
        if frame is None:
            code = self._server.wait()
            if code >= 0:
                sys.exit("the solution's server is gone")
            frame = {"why": "died", "status": code, "cpu": 0.0, "memory_mb": None}
        for fd in list(self._pipes):
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                self._from_pipe(fd)
        for fd in self._pipes:
            os.close(fd)
        self._pipes.clear()
        self._server.kill()
        self._server.wait()
        self._control.close()
        self._hang_up()
        self._sweep()
        self.say({"control": frame})
        self.start()

    def _hang_up(self) -> None:
        if self._rpc:
            self._rpc.close()
            self._rpc = None

    @staticmethod
    def _sweep() -> None:
        """Remove what belongs to the programs' own user, and nothing else: these folders are shared."""
        for folder in filter(os.path.isdir, SHARED):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid != PROGRAMS:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
