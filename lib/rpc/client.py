"""The parent's end: start a child, ask it, and tell every pending call at once when it is lost.

Owns the wire's end here, and when a child counts as lost; its process is lib/program.py's. Must not know what it does.

    python -c "from lib.rpc.client import Client; help(Client)"
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import WorkbenchError
from lib.log import scrub
from lib.program import POLL, NotUpError, Process, Program
from lib.rpc.wire import BEAT_SECONDS, LONGEST_LINE, WIRE

logger = logging.getLogger(__name__)

KINDS = ("died", "hung", "rubbish", "closed", "deadline")
"""What can go wrong beside the service's own exceptions. All but the last lose the child."""

_DRAIN_SECONDS = 2.0
"""How long an end of the wire and the end of its process may lie apart."""


class RpcError(WorkbenchError, RuntimeError):
    """A call was not answered. `kind`: one of KINDS, or the class name of what the service raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Child(Program):
    """A child to start; it serves by `lib.rpc.serve`."""

    command: Sequence[str]
    grace: float = 1.0
    """`Client.close` asks for the end over the wire: SIGTERM is for one that could not be asked."""
    silence: float = 60.0
    """Seconds without a beat after which it counts as hung."""


async def start(child: Child) -> Client:
    """Start a child and wait until its service is made. Raises ProgramError; cancelled, it leaves nothing running.

    After a failure that may be transient it is tried again.
    """
    for attempt in itertools.count(1):
        client = Client(child)
        try:
            while not await client.is_ready(POLL):
                client.process.wait_on("its service")
        except NotUpError as error:
            await client.end()
            await asyncio.sleep(client.process.retry(error, attempt))
        except BaseException:
            await client.end()
            raise
        else:
            break
    logger.info("%s: ready after %.1f s (process %d)", child.name, client.process.seconds(), client.pid)
    return client


class Client:
    """One child, asked from the event loop on which it was started. `start` makes it."""

    def __init__(self, child: Child) -> None:
        self.name, self.log, self._silence = child.name, child.log, child.silence
        self.pid = 0
        """The child's process, once it has said so."""
        self.lost: RpcError | None = None
        """Why this child cannot be asked any more."""
        self.on_progress: Callable[[str], None] = lambda line: logger.info("%s: %s", child.name, line)
        self._wire, theirs = socket.socketpair()
        with theirs:
            self.process = Process(child, child.command, {WIRE: str(theirs.fileno())}, theirs.fileno())
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._given_up: set[int] = set()
        """Calls whose caller waits no more; their one answer is still to come."""
        self._ready: asyncio.Future[None] = self._future()
        self._ended: asyncio.Future[None] = self._future()
        self._gone = asyncio.Event()
        self._heard = 0
        self._how = ""
        """How it ended by itself."""
        self._closing = False
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: list[bytes] = []
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._watch())]
        threading.Thread(target=self._wait, name=f"wait for {child.name}", daemon=True).start()

    async def is_ready(self, within: float) -> bool:
        """Whether the service is made after so many seconds at most. Raises NotUpError where it will never be."""
        await asyncio.wait({self._ready}, timeout=within)
        if not self._ready.done():
            return False
        try:
            await self._ready
        except RpcError as error:
            if self._how:
                raise NotUpError(f"did not start: it {self._how} after {self.process.seconds():.0f} s") from None
            raise NotUpError("did not start", said=f"{error.kind}: {error}") from None
        return True

    async def call(self, method: str, *arguments: Any, deadline: float | None = None, **named: Any) -> Any:
        """What the service's method returns. Raises RpcError; a missed `deadline` (seconds) loses this call only."""
        if self.lost:
            raise RpcError(self.lost.kind, str(self.lost).split("\n", 1)[0])  # those that waited were told the whole
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
        """Let the service close, then end the child and whatever it started, also where the caller waits no longer.

        Again does nothing.
        """
        self._closing = True
        try:
            if not self.lost:
                self._send(json.dumps({"end": True}))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace):
                        await asyncio.shield(self._ended)
        finally:
            await self.end()

    async def end(self) -> None:
        """End the child and whatever it started, at once; again does nothing."""
        self._closing = True
        self._lose("closed", f"{self.name} is closed")
        await asyncio.shield(self._ended)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End the child and whatever it started, without a word to it."""
        self.process.kill()

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
        elif "beat" in message:
            self.pid = int(message["beat"])
        else:
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
        self.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            self._loop.call_soon_threadsafe(self._note_end)

    def _note_end(self) -> None:
        self._ended.set_result(None)
        # Whatever holds the wire open, no more will come than what is in it now.
        self._loop.call_later(_DRAIN_SECONDS, self._bury)

    async def _watch(self) -> None:
        """Tell a silent child by beats missed in a row, not by the clock: this process may have slept itself."""
        missed, pause = 0, max(self._silence / 6, BEAT_SECONDS)
        await asyncio.wait([self._ready])
        while not self.lost:
            heard = self._heard
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._gone.wait()
            missed = missed + 1 if self._heard == heard else 0
            if missed * pause >= self._silence:
                what = f"(process {self.pid}) has said nothing for {self._silence:g} s"
                self._lose("hung", self.process.report(what))

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
        if self.lost:
            return
        if self._closing:
            self._lose("closed", f"{self.name} is closed")
            return
        self._how = self.process.ending() if self._ended.done() else "closed the wire"
        self._lose("died", self.process.report(f"(process {self.pid}) has ended: it {self._how}"))

    def _send(self, message: str) -> None:
        line = message.encode() + b"\n"
        if self._writer is None:
            self._outbox.append(line)
        elif not self._writer.is_closing():
            self._writer.write(line)

    def _future(self) -> asyncio.Future[Any]:
        return self._loop.create_future()


def _short(line: bytes) -> str:
    return scrub(repr(line[:200].decode(errors="replace")))
