"""The child process of the task `verifiers`: one environment, loaded once, served over JSON lines.

Owns the protocol: a request a line on standard input, {"id", "op", ...}; a reply a line on standard output, {"id",
"ok"} or {"id", "error": {"kind", "text"}}, in any order. Runs in the environment's own interpreter, where nothing of
the workbench is installed: this file and the child's others (_verifiers_play, _live, _load, _classic, _v1) import the
standard library, and `verifiers` inside functions. Must not know tasks.

    echo '{"id": 1, "op": "ping"}' | python -m lib.tasks._verifiers_child
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lib.tasks._verifiers_live import Endpoint, RefusedError
from lib.tasks._verifiers_play import Adapter, Rollouts

TEXT = 2000
"""Characters of an error's text that are sent."""
LEAVE = 5.0
"""Seconds from the end of input to the end of this process."""


class Wire:
    """The protocol's own streams: whatever the environment prints goes to standard error instead."""

    def __init__(self) -> None:
        self._input = os.fdopen(os.dup(0), "rb")
        self._output = os.fdopen(os.dup(1), "wb")
        self._lock = threading.Lock()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def send(self, reply: dict[str, Any]) -> None:
        """One reply; `ok` that is no JSON becomes an error."""
        try:
            line = json.dumps(reply, allow_nan=False)
        except (TypeError, ValueError) as error:
            line = json.dumps({"id": reply["id"], "error": _told(error)})
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._output.write(line.encode() + b"\n")
            self._output.flush()

    def read(self, handle: Callable[[dict[str, Any]], None], ended: Callable[[], None]) -> None:
        """Hand over every request until the input ends; runs in a thread of its own."""
        for line in self._input:
            handle(json.loads(line))
        ended()
        time.sleep(LEAVE)  # what the environment still tears down
        os._exit(0)


class Server:
    """Carries out requests side by side; a request may be cancelled by its id."""

    def __init__(self, wire: Wire, endpoint: Endpoint) -> None:
        self._wire, self._endpoint = wire, endpoint
        self._running: dict[int, asyncio.Task[None]] = {}
        self._adapter: Adapter | None = None
        self._rollouts: Rollouts | None = None

    def begin(self, request: dict[str, Any]) -> None:
        """Start on a request; called in the loop."""
        if request["op"] == "cancel":
            if request["of"] in self._running:
                self._running[request["of"]].cancel()
            return
        task = asyncio.get_running_loop().create_task(self._carry_out(request))
        self._running[request["id"]] = task
        task.add_done_callback(lambda _: self._running.pop(request["id"], None))

    async def _carry_out(self, request: dict[str, Any]) -> None:
        try:
            reply = {"id": request["id"], "ok": await self._result(request)}
        # The boundary of this process: an environment may raise anything, SystemExit included, and only its own
        # rollout fails for it.
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise  # nobody waits, or the whole process ends: its parent asks another one
            reply = {"id": request["id"], "error": _told(error)}
        self._wire.send(reply)

    async def _result(self, request: dict[str, Any]) -> Any:
        op = request["op"]
        if op == "ping":
            return "pong"
        if op == "load":
            return await self._load(request)
        if self._adapter is None or self._rollouts is None:
            raise RefusedError("no environment is loaded")
        if op == "rows":
            return await self._rollouts.rows(request["split"], request["start"], request["stop"])
        if op == "reply":
            return await self._rollouts.reply(request["row"], request["messages"])
        if op == "score":
            return await self._rollouts.score(request["row"], request["messages"], request["cut"])
        raise RefusedError(f"unknown op {op!r}")

    async def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        from lib.tasks._verifiers_load import load

        self._adapter = await load(request, self._endpoint)
        self._rollouts = Rollouts(self._adapter, self._endpoint)
        return await self._rollouts.describe()

    async def close(self) -> None:
        """End what is running, and let the environment tear down."""
        for task in list(self._running.values()):
            task.cancel()
        if self._rollouts is not None:
            await self._rollouts.close()
        if self._adapter is not None:
            await self._adapter.close()


async def _serve(wire: Wire) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    async with Endpoint() as endpoint:
        server = Server(wire, endpoint)
        take = (
            lambda request: loop.call_soon_threadsafe(server.begin, request),
            lambda: loop.call_soon_threadsafe(ended.set),
        )
        threading.Thread(target=wire.read, args=take, name="requests", daemon=True).start()
        await ended.wait()
        await server.close()


def _is_cancelled() -> bool:
    """Whether this very task is, rather than something that the environment waited for."""
    task = asyncio.current_task()
    return task is None or bool(getattr(task, "cancelling", lambda: 1)())  # Python 3.10 cannot tell


def _told(error: BaseException) -> dict[str, str]:
    """An error as the parent shows it, with the causes that libraries wrap."""
    told: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        told.append(f"{type(link).__name__}: {link}" if told or not isinstance(link, RefusedError) else str(link))
        link = link.__cause__
    text = " <- ".join(told)[:TEXT].encode(errors="replace").decode()
    return {"kind": type(error).__name__, "text": text}


def _allow_connections() -> None:
    """A v1 rollout that waits holds four descriptors; the usual limit is 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Serve until the input ends."""
    _allow_connections()
    asyncio.run(_serve(Wire()))


if __name__ == "__main__":
    main()
