"""The parent's end: start a child, ask it, and tell every pending call at once when it is lost.

Owns the child's life: its process group, its log, its end. Must not know what is called.

    python -c "from pathlib import Path; from lib.rpc.client import last_lines; print(last_lines(Path('LICENSE'), 3))"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT, WorkbenchError
from lib.log import scrub
from lib.rpc.wire import BEAT_SECONDS, LONGEST_LINE, WIRE

logger = logging.getLogger(__name__)

KINDS = ("died", "hung", "rubbish", "closed", "deadline")
"""What can go wrong beside the service's own exceptions. All but the last lose the child."""

_DRAIN_SECONDS = 2.0
"""How long an end of the wire and the end of its process may lie apart."""

# Holds the child's process group, and ends it when the parent is gone: a child that hangs could not do it itself.
_GUARD = """
import os, signal, sys
if not os.read(0, 1):
    try:
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class RpcError(WorkbenchError, RuntimeError):
    """A call was not answered. `kind`: one of KINDS, or the class name of what the service raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def start(command: Sequence[str], name: str, log: Path, environment: Mapping[str, str] | None = None) -> Client:
    """Start a child that serves; call it on a running event loop. `environment` is added to this process's own."""
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), WIRE: str(theirs.fileno())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a group of its own: all of it can be ended, and an interrupt here is not for it
        )
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
    )
    return Client(process, guard, ours, name, log)


class Client:
    """One child, asked from the event loop on which it was started."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        guard: subprocess.Popen[bytes],
        wire: socket.socket,
        name: str,
        log: Path,
    ) -> None:
        self.name, self.log, self.pid = name, log, process.pid
        self.lost: RpcError | None = None
        """Why this child cannot be asked any more."""
        self.silence = 60.0
        """Seconds without a beat after which the child counts as hung."""
        self.on_progress: Callable[[str], None] = lambda line: logger.info("%s: %s", name, line)
        self._process, self._guard, self._wire = process, guard, wire
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._given_up: set[int] = set()
        """Calls whose caller waits no more; their one answer is still to come."""
        self._ready: asyncio.Future[None] = self._future()
        self._ended: asyncio.Future[int] = self._future()
        self._gone = asyncio.Event()
        self._heard = 0
        self._closing = False
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: list[bytes] = []
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._watch())]
        threading.Thread(target=self._wait, name=f"wait for {name}", daemon=True).start()

    async def ready(self, within: float | None = None) -> None:
        """Wait until the service is made. Raises RpcError: what making it raised, `deadline`, what lost the child."""
        try:
            async with asyncio.timeout(within):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise RpcError("deadline", f"{self.name} was not ready within {within:g} s") from None

    async def call(self, method: str, *arguments: Any, deadline: float | None = None, **named: Any) -> Any:
        """What the service's method returns. Raises RpcError; a missed `deadline` (seconds) loses this call only."""
        if self.lost:
            raise RpcError(self.lost.kind, str(self.lost))
        number, answer = next(self._ids), self._future()
        message = json.dumps({"id": number, "call": method, "args": arguments, "named": named})
        self._pending[number] = answer
        try:
            self._send(message)
            async with asyncio.timeout(deadline):
                return await answer
        except TimeoutError:
            raise RpcError("deadline", f"{self.name}: {method} was not answered within {deadline:g} s") from None
        finally:
            if self._pending.pop(number, None) is not None and not self.lost:
                self._given_up.add(number)
                self._send(json.dumps({"cancel": number}))

    async def until_lost(self) -> RpcError:
        """Wait until the child cannot be asked any more, and say why."""
        await self._gone.wait()
        assert self.lost is not None
        return self.lost

    async def close(self, grace: float = 10.0) -> None:
        """Let the service close, then end the child and whatever it started; again does nothing."""
        self._closing = True
        if not self.lost:
            self._send(json.dumps({"end": True}))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await asyncio.shield(self._ended)
        self._lose("closed", f"{self.name} is closed")
        await asyncio.shield(self._ended)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End the child and its process group at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    # what comes in ----------------------------------------------------------------------------------------------------
    async def _read(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._wire, limit=LONGEST_LINE)
        self._writer.writelines(self._outbox)
        try:
            while line := await reader.readline():
                self._heard += 1
                self._take(line)
        except ConnectionError:
            pass  # a child that was killed: as an end of the wire
        except (ValueError, TypeError, KeyError, RecursionError):
            self._lose("rubbish", f"{self.name} wrote on the wire what is no answer: {_short(line)}")
        if not self.lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await asyncio.shield(self._ended)
            self._bury()

    def _take(self, line: bytes) -> None:
        message = json.loads(line)
        if "id" in message:
            self._take_answer(message, line)
        elif "progress" in message:
            self._loop.call_soon(self.on_progress, scrub(str(message["progress"])))
        elif "ready" in message:
            if not self._ready.done():
                self._settle(self._ready, message)
        elif "beat" not in message:
            raise ValueError("unknown message")

    def _take_answer(self, message: Mapping[str, Any], line: bytes) -> None:
        number = message["id"]
        if number in self._given_up:
            self._given_up.discard(number)
        elif number in self._pending:
            self._settle(self._pending[number], message)
            del self._pending[number]
        else:
            self._lose("rubbish", f"{self.name} answered twice, or what it was not asked: {_short(line)}")

    def _settle(self, future: asyncio.Future[Any], message: Mapping[str, Any]) -> None:
        if future.done():
            return  # cancelled in this very moment
        error = message.get("error")
        if error:
            future.set_exception(RpcError(str(error["kind"]), scrub(str(error["message"]))))
            future.exception()  # seen: nobody may wait for it
        else:
            future.set_result(message["value"])

    # the child's life -------------------------------------------------------------------------------------------------
    def _wait(self) -> None:
        status = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it left behind would hold its memory, ports and our pipes
        with contextlib.suppress(OSError):
            self._guard.communicate(b"x")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(self._note_end, status)

    def _note_end(self, status: int) -> None:
        self._ended.set_result(status)
        # Whatever holds the wire open, no more will come than what is in it now.
        self._loop.call_later(_DRAIN_SECONDS, self._bury)

    async def _watch(self) -> None:
        """Tell a silent child by beats missed in a row, not by the clock: this process may have slept itself."""
        missed = 0
        await asyncio.wait([self._ready])
        while not self.lost:
            heard = self._heard
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self.silence / 6, BEAT_SECONDS)):
                    await self._gone.wait()
            missed = missed + 1 if self._heard == heard else 0
            if missed * max(self.silence / 6, BEAT_SECONDS) >= self.silence:
                self._lose("hung", f"{self.name} (process {self.pid}) has said nothing for {self.silence:g} s")

    def _lose(self, kind: str, message: str) -> None:
        """Fail every pending call, and end the child."""
        if self.lost:
            return
        self.lost = RpcError(kind, message)
        for future in (*self._pending.values(), self._ready):
            if not future.done():
                future.set_exception(RpcError(kind, message))
                future.exception()
        self._pending.clear()
        self._gone.set()
        if not self._ended.done():
            self.kill()
        if self._writer:
            self._writer.close()

    def _bury(self) -> None:
        if not self.lost:
            self._lose(*(("closed", f"{self.name} is closed") if self._closing else ("died", self._obituary())))

    def _obituary(self) -> str:
        status = self._ended.result() if self._ended.done() else None
        how = "closed the wire" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            names = {one.value: one.name for one in signal.Signals}
            cause = ": by hand, or by the kernel because memory ran out" if status == -signal.SIGKILL else ""
            how = f"was ended by signal {-status} ({names.get(-status, 'unknown')}{cause})"
        return "\n".join([f"{self.name} (process {self.pid}) {how}. The end of {self.log}:", *last_lines(self.log)])

    def _send(self, message: str) -> None:
        line = message.encode() + b"\n"
        if self._writer is None:
            self._outbox.append(line)
        elif not self._writer.is_closing():
            self._writer.write(line)

    def _future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The end of a log, without secrets; [] where there is none."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 500 * count))
        return [scrub(line) for line in file.read().decode(errors="replace").splitlines()[-count:]]


def _short(line: bytes) -> str:
    return scrub(repr(line[:200].decode(errors="replace")))
