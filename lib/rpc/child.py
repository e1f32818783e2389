"""The child's end: answer calls side by side until the parent says so or is gone.

Owns the loop that a service runs on, beats and progress lines. Must not know what is served.

    python -c "from lib.rpc.child import progress; progress('said to nobody')"
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from lib.log import scrub
from lib.rpc.wire import BEAT_SECONDS, LONGEST_LINE, WIRE


class Service(Protocol):
    """What is served: its public methods take and return plain JSON values."""

    def close(self) -> Coroutine[Any, Any, None] | None: ...


_GIVEN_UP = {"kind": "deadline", "message": "the caller has given up"}

_server: _Server | None = None


def serve(make_service: Callable[[], Service]) -> None:
    """Answer the parent until it says so or is gone. `make_service` runs on a thread: beats and progress lines flow
    while a model loads; what it raises is the parent's error of `ready`, and the end."""
    global _server
    number = int(os.environ.pop(WIRE))
    os.set_inheritable(number, False)
    wire = socket.socket(fileno=number)

    async def life() -> bool:
        global _server
        _server = _Server(*await asyncio.open_connection(sock=wire, limit=LONGEST_LINE))
        return await _server.run(make_service)

    made = asyncio.run(life())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if made else 1)  # threads of calls that were given up, and of engines, are not waited for


def progress(line: str) -> None:
    """Say a line in the parent's log, from any thread of a child; nothing where this process is no child."""
    if _server:
        _server.say({"progress": line})


class _Server:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(32, "call")
        self._running: dict[int, asyncio.Task[None]] = {}

    async def run(self, make_service: Callable[[], Service]) -> bool:
        beats = self._loop.create_task(self._beat())
        making = self._loop.create_task(self._answer({"ready": True}, make_service))
        reading = self._loop.create_task(self._read(making))
        await asyncio.wait({making, reading}, return_when=asyncio.FIRST_COMPLETED)
        service = making.result() if making.done() else None
        if service is not None:
            await reading
            await self._resolve(service.close)
        beats.cancel()
        await asyncio.sleep(0)  # what was said last is on its way
        self._writer.close()
        await self._writer.wait_closed()
        return service is not None

    async def _read(self, making: asyncio.Task[Any]) -> None:
        while line := await self._reader.readline():
            message = json.loads(line)
            if "end" in message:
                return
            if "cancel" in message:
                await asyncio.sleep(0)  # a task cancelled before its first step would answer nothing
                if message["cancel"] in self._running:
                    self._running[message["cancel"]].cancel()
                continue
            self._running[message["id"]] = self._loop.create_task(self._call(making, message))
        os._exit(1)  # the parent is gone: whatever this process does or has started is for nobody

    async def _call(self, making: asyncio.Task[Any], message: Mapping[str, Any]) -> None:
        number = message["id"]
        try:
            service = await asyncio.shield(making)
            call = _method(service, message["call"])
            await self._answer({"id": number}, call, *message["args"], **message["named"])
        except asyncio.CancelledError:
            self.say({"id": number, "error": _GIVEN_UP})
        finally:
            del self._running[number]

    async def _answer(self, head: dict[str, Any], function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Send exactly one message: what the function returns, or how it fails."""
        try:
            value = await self._resolve(function, *arguments, **named)
            self.say(head | {"value": None if "ready" in head else value})
            return value
        except Exception as error:  # the edge of the process: whatever it is, the parent has to be told
            traceback.print_exception(error)
            self.say(head | {"error": {"kind": type(error).__name__, "message": scrub(str(error))}})

    async def _resolve(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(*arguments, **named)
        return await self._loop.run_in_executor(self._threads, lambda: function(*arguments, **named))

    async def _beat(self) -> None:
        while True:
            self.say({"beat": os.getpid()})
            await asyncio.sleep(BEAT_SECONDS)

    def say(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(RuntimeError):  # a thread that outlives the loop
            self._loop.call_soon_threadsafe(self._writer.write, line)


def _method(service: Any, name: str) -> Callable[..., Any]:
    allowed = [known for known in dir(type(service)) if not known.startswith("_") and known != "close"]
    if name not in allowed:

        def refuse(*_: Any, **__: Any) -> None:
            raise LookupError(f"{type(service).__name__} has no call {name!r}. It has: {', '.join(allowed)}")

        return refuse
    found: Callable[..., Any] = getattr(service, name)
    return found
