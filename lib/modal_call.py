"""One container of a role, asked from an event loop: what lib.rpc's Client is to a child process.

Owns the calls to it, when it counts as lost, and its end. Must not know which role it is, files, or who pays.

    python -c "from lib.modal_call import Container; help(Container)"
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from lib.rpc import RpcError

logger = logging.getLogger(__name__)

REPLACED = "replaced"
"""What a container answers that is not the one that was asked: it stands in the place of one that was preempted."""

ENDING = "ending"
"""What a container answers that was asked to end a moment ago."""

_SILENCE = 60.0
"""Seconds beyond which an answer that was due makes a container count as hung."""

_SAY_SECONDS = 10.0
"""How often it is said what is waited for while a container starts."""

_GRACE = 10.0


class Container:
    """Raises RpcError, as a child process does; where the container is lost, all pending calls fail at once.

    A call that is given up is cancelled in the container. `close` ends the container.
    """

    def __init__(
        self, name: str, instance: Any, idle_seconds: float, beat: Callable[[str, bool], None] = lambda *_: None
    ) -> None:
        """`instance`: of a Modal class, with its parameters; `beat`: called with the container's token whenever it was
        heard of, and with whether its role is ready."""
        self.name = name
        self.lost: RpcError | None = None
        """Why this container cannot be asked any more."""
        self.vanished = False
        """Whether it was the container that was lost, and not what ran in it."""
        self.ended = False
        """Whether it has said that it ends."""
        self._instance, self._beat = instance, beat
        self._poll = min(30.0, idle_seconds / 2)
        self._gone = asyncio.Event()
        self._token = ""
        self._ready = self._closing = False
        self._watching: list[asyncio.Task[None]] = []
        self._calls: set[Any] = set()
        """What Modal is asked now."""
        self._loose: set[asyncio.Task[None]] = set()

    async def open(self, order: Mapping[str, Any]) -> None:
        """Wait for the container and the start of its role. Raises RpcError; cancelled, it leaves nothing running."""
        try:
            hello = await self._said(self._hello(), "a container")
            self._token = hello["token"]
            logger.info("%s: its container runs (%s)", self.name, "; ".join(hello["gpus"]) or "no GPU")
            self._heard()
            self._watching = [asyncio.create_task(self._watch(delay)) for delay in (0.0, self._poll / 2)]
            await self._said(self._asked("begin", self._token, dict(order)), "its role")
            self._ready = True
        except BaseException:
            await self.close()
            raise

    async def call(self, method: str, *arguments: Any, deadline: float | None = None) -> Any:
        """What the role's method returns."""
        try:
            async with asyncio.timeout(deadline):
                return await self._asked("ask", self._token, method, list(arguments))
        except TimeoutError:
            raise RpcError("deadline", f"{self.name}: {method} was not answered within {deadline:g} s") from None

    async def close(self, grace: float = _GRACE) -> None:
        """End the role and its container; again does nothing."""
        if self._closing:
            return
        self._closing = True
        there = bool(self._token) and (not self.vanished or (self.lost is not None and self.lost.kind == REPLACED))
        self._lose("closed", f"{self.name} is closed")
        await _cancelled(*self._watching)
        if there:
            with suppress(RpcError, TimeoutError):
                async with asyncio.timeout(grace + _GRACE):
                    await self._invoke("end", grace)
                    self.ended = True
        await asyncio.gather(*self._loose, *(self._cancel(call) for call in self._calls), return_exceptions=True)

    async def _hello(self) -> dict[str, Any]:
        while True:
            try:
                return dict(self._value(await self._invoke("hello")))
            except RpcError as error:
                if error.kind != ENDING:
                    raise
                await asyncio.sleep(1.0)

    # one call ---------------------------------------------------------------------------------------------------------
    async def _asked(self, function: str, *arguments: Any) -> Any:
        """The value of an answer, or what the loss of the container says."""
        if self.lost:
            raise RpcError(self.lost.kind, str(self.lost))
        answering = asyncio.ensure_future(self._invoke(function, *arguments))
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                assert self.lost
                raise RpcError(self.lost.kind, str(self.lost))
            return self._value(answering.result())
        finally:
            await _cancelled(answering, gone)

    def _value(self, answer: Mapping[str, Any]) -> Any:
        error = answer.get("error")
        if error:
            self.vanished = self.vanished or error["kind"] == REPLACED
            raise RpcError(error["kind"], error["message"])
        return answer["value"]

    async def _invoke(self, function: str, *arguments: Any) -> dict[str, Any]:
        """One input of the container and its answer. Raises RpcError where Modal has none."""
        spawning = asyncio.ensure_future(getattr(self._instance, function).spawn.aio(*arguments))
        try:
            call = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._later(
                self._drop(spawning, function)
            )  # Modal may have got it already: a container would start for nobody
            raise
        except Exception as error:  # whatever Modal's client raises, this container was not reached
            raise RpcError("died", f"{self.name}: Modal did not take the call: {error}") from error
        self._calls.add(call)
        try:
            return dict(await call.get.aio())
        except asyncio.CancelledError:
            self._later(self._cancel(call, self._ends_with(function)))
            raise
        except Exception as error:  # a remote error is raised here as whatever it was there
            self.vanished = not self._closing
            raise RpcError("died", f"{self.name}: its container ended: {error}") from error
        finally:
            self._calls.discard(call)

    def _ends_with(self, function: str) -> bool:
        """Whether the container is not worth keeping where this function was not answered in time."""
        return function in ("hello", "end") or (function == "watch" and not self._closing)

    async def _drop(self, spawning: asyncio.Future[Any], function: str) -> None:
        with suppress(Exception):  # it never became a call
            await self._cancel(await spawning, self._ends_with(function))

    async def _cancel(self, call: Any, all_of_it: bool = True) -> None:
        """`all_of_it`: the container ends with the call."""
        with suppress(Exception):  # it has an end already, or Modal is gone: then it ends when it is idle
            await call.cancel.aio(terminate_containers=all_of_it)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._loose.add(task)
        task.add_done_callback(self._loose.discard)

    # its life ---------------------------------------------------------------------------------------------------------
    async def _watch(self, delay: float) -> None:
        """Have a question open: it keeps the container, and is answered at once where its role is lost.

        Two of these take turns, so that no moment is without one: Modal may end a container that has nothing to do.
        """
        await asyncio.sleep(delay)
        while not self.lost:
            try:
                async with asyncio.timeout(self._poll + _SILENCE):
                    self._value(await self._invoke("watch", self._token, self._poll))
            except TimeoutError:
                self._lose("hung", f"{self.name}: its container has said nothing for {self._poll + _SILENCE:g} s")
                return
            except RpcError as error:
                self._lose(error.kind, str(error))
                return
            self._heard()

    def _heard(self) -> None:
        self._beat(self._token, self._ready)

    def _lose(self, kind: str, message: str) -> None:
        if not self.lost:
            self.lost = RpcError(kind, message)
            self._gone.set()

    async def _said(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        """Say every few seconds that it is waited for."""
        task, began = asyncio.ensure_future(work), asyncio.get_running_loop().time()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_SAY_SECONDS)
                if not task.done():
                    waited = asyncio.get_running_loop().time() - began
                    logger.info("%s: waiting for %s, %.0f s", self.name, what, waited)
            return task.result()
        finally:
            await _cancelled(task)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Nobody waits for these any more: they end here, where they have not."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
