"""Chat completions over HTTP: slots, retries, and pauses that all calls to a service keep.

Owns who may ask when, what a failure means for the other calls, and what can be sent at all; one request is
lib/wire.py's. A judge and a policy behind an endpoint are both asked through here. Must not know what is asked, or what
an answer means.

    python -c "from lib.calls import sendable; print(sendable({'content': 'half \\ud800'}))"
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, overload
from weakref import WeakKeyDictionary

from lib import PROJECT_ROOT, WorkbenchError
from lib.log import name_secrets
from lib.wire import Completion, Fault, Service, post

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

FIRST_WAIT, MOST_WAIT = 0.5, 30.0
"""Seconds before the second request of a call, doubled for each one more, up to the most."""
LONGEST_PAUSE = 600.0
"""Seconds: an endpoint that asks for a longer pause (a quota of the day) fails its calls instead of holding them."""
REMEMBERED = 60.0
"""Seconds for which a refusal is repeated without asking again: a key or a server may have been mended since."""

DEEPEST = 100
"""Objects and lists inside each other that a message keeps: JSON writers give up at some hundreds."""
MODEL_IDS = PROJECT_ROOT / "configs" / "judges.yaml"


class CallError(WorkbenchError, RuntimeError):
    """This call was not answered. The message is a cause that can be counted: the same for the same cause."""


class CallRefused(CallError):
    """Nothing will work as configured: the key, the model's id or the address has to change first."""


class Spent:
    """What one call has used so far."""

    def __init__(self) -> None:
        self.seconds, self.attempts = 0.0, 0


class _Lane:
    """A client and its slots, which belong to one event loop."""

    def __init__(self, client: openai.AsyncOpenAI, slots: int) -> None:
        self.client, self.slots = client, asyncio.Semaphore(slots)
        self.ended = asyncio.Event()
        """Set, and replaced, when a request has ended."""


class Caller:
    """One service of this process: all who ask it share its slots and its pauses."""

    failed: ClassVar[type[CallError]] = CallError
    refused: ClassVar[type[CallError]] = CallRefused
    reads: ClassVar[type[Completion]] = Completion
    """How its answers are read."""

    def __init__(self, service: Service, refused_after: int = 1, worked: bool = False) -> None:
        """`refused_after`: different requests that fail, with none answered, before such a failure is everybody's.

        `worked`: it answered in an earlier process, so that what fails now is the request's own.
        """
        self.service = service
        self._refused_after, self._worked = refused_after, worked
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._in_flight = 0
        self._closed_until = self._refused_at = -math.inf
        self._refusal = ""
        self._answered = False
        self._unanswered: set[int] = set()
        """Different requests that failed before the first answer."""
        self._told: set[str] = set()
        if service.key:
            name_secrets([service.key])

    async def complete(
        self, request: dict[str, Any], spent: Spent, wanted: Callable[[], bool] = lambda: True
    ) -> Completion:
        """Send the request until it is answered. Raises `failed`, or `refused` where nothing will ever work.

        Once `wanted` says no, no request is begun any more and the call is cancelled; one that was sent is waited for.
        """
        lane, to = self._lane(), self.service
        for number in range(1, to.attempts + 1):
            await self._enter(lane, wanted)
            began = time.perf_counter()
            spent.attempts += 1
            try:
                completion = await post(lane.client, request, to, self.reads)
                self._answered = True
                return completion
            except Fault as error:
                fault = error
            finally:
                spent.seconds += time.perf_counter() - began
                self._leave(lane)
            wait = min(MOST_WAIT, FIRST_WAIT * 2 ** (number - 1)) * random.uniform(0.5, 1)
            self._note(fault, wait, request)
            if not fault.retried:
                raise self.failed(f"{to.name}: {fault.what}") from fault
            if number < to.attempts:
                await asyncio.sleep(wait)
        raise self._given_up(fault, request)

    def affordable(self) -> bool:
        """Whether one more request may go now; False = perhaps when one of those in flight has ended."""
        return True

    def tell(self, warning: str, once: str = "") -> None:
        if (once or warning) not in self._told:
            self._told.add(once or warning)
            logger.warning("%s", warning)

    def _lane(self) -> _Lane:
        """The client of the running loop: one that is used on another loop fails."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            import openai

            to = self.service
            key = os.environ[to.key].strip() if to.key else "none"  # the client wants one
            client = openai.AsyncOpenAI(api_key=key, base_url=to.base_url, max_retries=0, timeout=to.timeout)
            lane = self._lanes[loop] = _Lane(client, to.concurrency)
        return lane

    def _given_up(self, fault: Fault, request: dict[str, Any]) -> CallError:
        """What the failure of a call's last attempt is."""
        to = self.service
        if not self._answered and not fault.what.startswith(("HTTP", "no answer")):
            said = f" ({fault.details})" if fault.details else ""
            cause = (
                f"{fault.what} from {to.base_url} after {to.attempts} attempts{said}: does the server run, and is "
                f"{to.setting}.base_url right? It ends in /v1 as a rule"
            )
            if fault.nowhere or self._is_everybodys(request):  # there is no such service at all
                return self._refuse(cause)
            self.tell(f"{to.name}: {cause}", once="nobody")
        return self.failed(f"{to.name}: {fault.what} after {to.attempts} attempts")

    def _is_everybodys(self, request: dict[str, Any]) -> bool:
        """Whether a failure that may be this request's own is taken for that of all others too."""
        if self._answered or self._worked:
            return False
        self._unanswered.add(hash(json.dumps(request, sort_keys=True)))
        return len(self._unanswered) >= self._refused_after

    def _note(self, fault: Fault, wait: float, request: dict[str, Any]) -> None:
        """What a failed request means for the other calls. Raises `refused`."""
        if fault.lost and (not fault.text or self._is_everybodys(request)):  # one text must not stop all others
            raise self._refuse(fault.lost)
        if fault.details:
            told = fault.lost if fault.lost and not self._answered else f"{fault.what}: {fault.details}"
            self.tell(f"{self.service.name}: {told}", once=fault.what)
        if fault.pause is not None:
            self._closed_until = max(self._closed_until, time.monotonic() + (fault.pause or wait))

    async def _enter(self, lane: _Lane, wanted: Callable[[], bool]) -> None:
        """Wait until no pause is on, the call is affordable and a slot is free. During a pause no slot is held."""
        while True:
            if not wanted():
                raise asyncio.CancelledError
            if (pause := self._pause()) > 0:  # a little later than told, and not all at once
                await asyncio.sleep(pause + random.uniform(0, min(1.0, 0.1 * pause)))
                continue
            if not self.affordable():
                with suppress(TimeoutError):  # the request that is waited for may be another loop's
                    await asyncio.wait_for(lane.ended.wait(), 1.0)
                continue
            await lane.slots.acquire()
            free = False
            try:
                free = wanted() and self._pause() <= 0 and self.affordable()
            finally:
                if not free:
                    lane.slots.release()
            if free:
                self._in_flight += 1
                return

    def _leave(self, lane: _Lane) -> None:
        self._in_flight -= 1
        lane.slots.release()
        lane.ended.set()
        lane.ended = asyncio.Event()

    def _pause(self) -> float:
        """Seconds that are left of a pause, below 0 when none is on. Raises `failed`."""
        if time.monotonic() - self._refused_at < REMEMBERED:
            raise self.refused(self._refusal)
        pause = self._closed_until - time.monotonic()
        if pause > LONGEST_PAUSE:
            raise self.failed(f"{self.service.name}: told to wait for longer than {LONGEST_PAUSE:g} s")
        return pause

    def _refuse(self, cause: str) -> CallError:
        self._refusal, self._refused_at = f"{self.service.name}: {cause}", time.monotonic()
        return self.refused(self._refusal)


@overload
def sendable(value: str) -> str: ...


@overload
def sendable(value: Mapping[str, Any]) -> dict[str, Any]: ...


@overload
def sendable(value: Any, levels: int) -> Any: ...


def sendable(value: Any, levels: int = DEEPEST) -> Any:
    """A text, or a whole message, that can be written as JSON in UTF-8, wherever in it the trouble is.

    Halves of surrogate pairs are joined, lone ones become U+FFFD. What JSON has no word for (NaN, infinities) becomes a
    text, and so does what lies deeper than `levels` objects and lists: no right answer holds either.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if not levels:
        return f"(more than {DEEPEST} levels deep)"
    if isinstance(value, Mapping):
        return {sendable(key, 0): sendable(item, levels - 1) for key, item in value.items()}
    return [sendable(item, levels - 1) for item in value]


def takes_temperature(model: str) -> bool:
    """Whether the file of model ids lets a temperature be sent to a model; the maker's name before a / is left out.

    Raises CallRefused where the file cannot be read.
    """
    return not any(fnmatch(model.rpartition("/")[2], pattern) for pattern in _without_temperature())


@cache
def _without_temperature() -> tuple[str, ...]:
    import yaml

    try:
        return tuple(yaml.safe_load(MODEL_IDS.read_text(encoding="utf-8"))["no_temperature"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CallRefused(f"{MODEL_IDS}: no list `no_temperature` ({error}): restore the file") from None
