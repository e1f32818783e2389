"""The two sides in Modal Sandboxes: one for the solution, one for the judge, reused for many programs.

Owns starting them (no network, a limited rate) and the wiring between them, which runs through this process. Must not
know tests or verdicts beyond that. A sandbox ends by itself when nothing has been asked of it for PATIENCE seconds.

    python -c "from lib.sandbox.modal_host import ModalWorker; help(ModalWorker)"
"""

from __future__ import annotations

import base64
import json
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

from lib.sandbox.bubblewrap import archive
from lib.sandbox.inside.relay import OWN_MACHINE
from lib.sandbox.inside.wire import frame
from lib.sandbox.settings import Execution, Limits, ProgramRun, SandboxError, SandboxSettings
from lib.sandbox.worker import GRACE, Exchange, Job, executed, group_frame, ran

APP = "grpo-workbench-sandboxes"
LIFETIME = 24 * 3600
"""Seconds after which Modal ends a sandbox: the most that it allows."""
PATIENCE = 600
_START = 300.0
"""Seconds that a new sandbox may take: the first one builds an image."""
_SLACK_MB = 256

_BOOT = (
    "import base64, sys\n"
    "open('/tmp/workbench.zip', 'wb').write(base64.b64decode(sys.stdin.buffer.raw.readline()))\n"
    "sys.path.insert(0, '/tmp/workbench.zip')\n"
    "from lib.sandbox.inside.relay import main\n"
    "main(sys.argv[1], '/tmp/workbench.zip', sys.argv[2], sys.argv[3])"
)


class Side(Protocol):
    """A relay somewhere: lines to it, lines from it."""

    def send(self, line: str) -> None: ...

    def close(self) -> None: ...


class Opener(Protocol):
    """Starts a relay that reports every line it says, and at its end None."""

    def __call__(self, side: str, heard: Any) -> Side: ...


class ModalWorker:
    """One program at a time between two relays. Raises SandboxError when one cannot start, or breaks."""

    def __init__(self, settings: SandboxSettings, open_side: Opener | None = None) -> None:
        self._limits = settings.limits
        self._events: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
        self._group: object = None
        self._sides: dict[str, Side] = {}
        opener = open_side or _Modal(settings)
        try:
            for side in ("solution", "judge"):
                self._sides[side] = opener(side, lambda message, side=side: self._events.put((side, message)))
            for _ in self._sides:
                self._next(time.monotonic() + _START)
        except BaseException:
            self.close()
            raise

    def run(self, job: Job) -> Execution | ProgramRun:
        """Run one program to its end."""
        started = time.monotonic()
        exchange = Exchange(self._limits.output_mb << 20, apart=job.group is None)
        try:
            self._begin(job)
            self._pass_on(job, exchange, started + self._limits.wall + GRACE + _START)
        finally:
            exchange.close()
        took = time.monotonic() - started
        return executed(exchange, took, len(job.group[0]), "modal") if job.group else ran(exchange, took, "modal")

    def close(self) -> None:
        for side in self._sides.values():
            side.close()

    def _begin(self, job: Job) -> None:
        self._send("solution", {"begin": {"run": "tests" if job.group else "program"}})
        self._send("solution", {"data": _text(frame({"source": job.source, "stdin": job.stdin}))})
        if job.group:
            if self._group is not None and self._group != job.group:
                self._send("judge", {"control": {"end": True}})
            self._send("judge", {"begin": {"again": True} if self._group == job.group else group_frame(job.group)})
            self._group = job.group

    def _pass_on(self, job: Job, exchange: Exchange, deadline: float) -> None:
        """Until both sides have said how it ended."""
        stopped = False
        while exchange.end is None or (job.group and exchange.verdicts is None):
            side, message = self._next(deadline)
            other = "judge" if side == "solution" else "solution"
            if "out" in message:
                exchange.take(message["stream"], base64.b64decode(message["out"]))
            elif "control" in message and side == "solution":
                exchange.end = _confined(message["control"])
                if job.group:
                    self._send("judge", {"eof": True})
            elif "control" in message:
                exchange.verdicts = message["control"]
                if not message["control"].get("clean"):
                    self._group = None
            elif job.group and exchange.verdicts is None and not (side == "judge" and exchange.end is not None):
                self._send(other, message)
            if not stopped and exchange.end is None and (exchange.verdicts is not None or exchange.flooded):
                self._send("solution", {"control": {"stop": True}})
                stopped = True

    def _send(self, side: str, message: dict[str, Any]) -> None:
        self._sides[side].send(json.dumps(message) + "\n")

    def _next(self, deadline: float) -> tuple[str, dict[str, Any]]:
        try:
            side, message = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise SandboxError("a sandbox on Modal did not answer in time") from None
        if message is None:
            raise SandboxError(f"the {side} sandbox on Modal ended")
        return side, message


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _confined(end: dict[str, Any]) -> dict[str, Any]:
    if end["why"] == "setup":
        raise SandboxError("a program could not be confined in its Modal Sandbox")
    return end


def relay_command(python: str, side: str, limits: Limits) -> list[str]:
    """What a sandbox runs; the first line that it is sent is its code."""
    return [python, "-s", "-S", "-B", "-P", "-c", _BOOT, side, limits.model_dump_json(), str(PATIENCE)]


def first_line() -> str:
    """The code, for a Python that may be of another version: not compiled."""
    return _text(archive(compiled=False)) + "\n"


class Lines:
    """Whole lines of JSON out of pieces of text."""

    def __init__(self, heard: Any) -> None:
        self._heard, self._rest = heard, ""

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line:
                self._heard(json.loads(line))


# Modal ----------------------------------------------------------------------------------------------------------------


class _Gate:
    """Lets one through every `1 / rate` seconds: Modal refuses a burst of creations."""

    def __init__(self) -> None:
        self._lock, self._free = threading.Lock(), 0.0

    def wait(self, rate: float) -> None:
        with self._lock:
            time.sleep(max(0.0, self._free - time.monotonic()))
            self._free = time.monotonic() + 1.0 / rate


_GATE = _Gate()


class _Modal:
    """Opens a side in a new Modal Sandbox."""

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings

    def __call__(self, side: str, heard: Any) -> Side:
        import modal

        _GATE.wait(self._settings.creations_per_second)
        limits = self._settings.limits
        try:
            app = modal.App.lookup(APP, create_if_missing=True)
            image = modal.Image.debian_slim(python_version=f"{sys.version_info[0]}.{sys.version_info[1]}")
            sandbox = modal.Sandbox.create(
                *relay_command("python3", side, limits),
                app=app,
                image=image,
                block_network=True,
                env={OWN_MACHINE: "1"},
                timeout=LIFETIME,
                cpu=1.0,
                memory=limits.memory_mb + _SLACK_MB,
            )
        except modal.exception.Error as error:
            raise SandboxError(
                f"no Modal Sandbox could be made: {type(error).__name__}: {error}. Log in with `modal setup`, and see "
                "your workspace's limits on modal.com."
            ) from None
        return _ModalSide(sandbox, heard)


class _ModalSide:
    def __init__(self, sandbox: Any, heard: Any) -> None:
        self._sandbox = sandbox
        threading.Thread(target=self._listen, args=(heard,), name="modal-sandbox", daemon=True).start()
        self.send(first_line())

    def send(self, line: str) -> None:
        import modal

        try:
            self._sandbox.stdin.write(line)
            self._sandbox.stdin.drain()
        except (modal.exception.Error, OSError, ValueError) as error:
            raise SandboxError(f"a Modal Sandbox takes no input: {error}") from None

    def close(self) -> None:
        import modal

        with suppress(modal.exception.Error):
            self._sandbox.terminate()

    def _listen(self, heard: Any) -> None:
        import modal

        lines = Lines(heard)
        with suppress(modal.exception.Error, OSError, ValueError):
            for text in self._sandbox.stdout:
                lines.feed(text)
        heard(None)
