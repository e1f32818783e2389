"""Who answers for an environment: its child process, and a second one for whoever may have killed the first.

Owns deadlines and the rule for a child that died or stopped answering: what was in flight is asked again, one request
at a time, in a second child, so that only the request that kills a child fails. Must not know rows or rewards.

    python -c "from lib.tasks._verifiers_server import OneByOne; print(OneByOne('x').submit(len, 'abc').result())"
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any

from lib.tasks._verifiers_process import Child, ChildLostError, EnvironmentFailedError, Source

logger = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that a child has to answer anything at all before it counts as stuck."""


class OneByOne:
    """Does what it is given, one thing after the other, in a thread that nobody has to wait for at the end."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """What the call will return or raise."""
        future = Future[Any]()
        self._work.put((future, function, args))
        return future

    def _run(self) -> None:
        while True:
            future, function, args = self._work.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:  # it belongs to whoever waits for the future
                future.set_exception(error)


class Server:
    """The child of a source, started when it is needed and again when it was lost; and a second one for suspects."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.facts: dict[str, Any] = {}
        self._child: Child | None = None
        self._alone: Child | None = None
        self._starter, self._quarantine = OneByOne("verifiers start"), OneByOne("verifiers alone")

    def load(self) -> dict[str, Any]:
        """Facts about the environment; starts the child if there is none."""
        self._starter.submit(self._started).result()
        return self.facts

    def ask(self, op: str, seconds: float, **fields: Any) -> Any:
        """One reply, for callers that may block."""
        try:
            return _wait(self._starter.submit(self._started).result(), op, seconds, fields)
        except ChildLostError as lost:
            logger.warning("%s; asking again", lost)
        return _wait(self._starter.submit(self._started).result(), op, seconds, fields)

    async def ask_soon(self, op: str, seconds: float, **fields: Any) -> Any:
        """One reply, side by side with others. Raises EnvironmentFailedError, TimeoutError."""
        child = self._child
        if child is None or child.lost is not None:
            started: Child = await asyncio.wrap_future(self._starter.submit(self._started))
            child = started
        number, future = child.ask(op, **fields)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except ChildLostError as lost:
            logger.warning("%s; what was in flight is asked again, one by one", lost)
        except TimeoutError:
            child.cancel(number)
            if await _answers(child):
                raise TimeoutError(_late(op, seconds)) from None
            child.give_up(f"the child process of the environment stopped answering ({op}: more than {seconds:g} s)")
        except asyncio.CancelledError:
            child.cancel(number)
            raise
        return await asyncio.wrap_future(self._quarantine.submit(self._ask_alone, op, seconds, fields))

    def _started(self) -> Child:
        if self._child is None or self._child.lost is not None:
            self._child = self._start()
        return self._child

    def _start(self) -> Child:
        child, source = Child(self.source), self.source
        fields = {"environment": source.environment, "args": json.loads(source.args), "rows": source.rows}
        try:
            self.facts = _wait(child, "load", source.load_seconds, fields)
        except (EnvironmentFailedError, TimeoutError) as error:
            child.give_up("not loaded")
            raise EnvironmentFailedError(f"the environment {source.environment!r} cannot be used: {error}") from None
        return child

    def _ask_alone(self, op: str, seconds: float, fields: Mapping[str, Any]) -> Any:
        """One request at a time: if this child is lost as well, it is this request that does it."""
        if self._alone is None or self._alone.lost is not None:
            self._alone = self._start()
        try:
            return _wait(self._alone, op, seconds, fields)
        except TimeoutError:
            self._alone.give_up("too slow")
            raise

    def close(self) -> None:
        """End both children."""
        for child in (self._child, self._alone):
            if child is not None and child.lost is None:
                child.close()


@cache
def server(source: Source) -> Server:
    """The one server of a source in this process; closed at its exit."""
    made = Server(source)
    atexit.register(made.close)
    return made


def _wait(child: Child, op: str, seconds: float, fields: Mapping[str, Any]) -> Any:
    number, future = child.ask(op, **fields)
    try:
        return future.result(seconds)
    except TimeoutError:
        child.cancel(number)
        raise TimeoutError(_late(op, seconds)) from None


async def _answers(child: Child) -> bool:
    try:
        await asyncio.wait_for(asyncio.wrap_future(child.alive()), GRACE)
    except (TimeoutError, EnvironmentFailedError):
        return False
    return True


def _late(op: str, seconds: float) -> str:
    return f"the environment took longer than {seconds:g} s ({op})"
