"""Chat completions over HTTP: slots, retries, and pauses that all calls to a service keep.

Owns one request and what its failure means (try again, give up this call, give up for good), and who may ask when. A
judge and a policy behind an endpoint are both asked through here. Must not know what is asked, or what an answer means.

    python -c "from lib.calls import retry_after; print(retry_after({'retry-after': '2'}))"
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from pydantic import BaseModel, Field, ValidationError

from lib import WorkbenchError
from lib.log import name_secrets, scrub

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

FIRST_WAIT, MOST_WAIT = 0.5, 30.0
"""Seconds before the second request of a call, doubled for each one more, up to the most."""
LONGEST_PAUSE = 600.0
"""Seconds: an endpoint that asks for a longer pause (a quota of the day) fails its calls instead of holding them."""
REMEMBERED = 60.0
"""Seconds for which a refusal is repeated without asking again: a key or a server may have been mended since."""

RETRIED = (408, 409, 429)
"""And every status from 500 on."""
HOPELESS = (401, 402, 403, 404, 410)
_HOPELESS_WORDS = re.compile(
    "insufficient_quota|billing_hard_limit|model_not_found|unsupported_parameter|unsupported_value|unknown_parameter|"
    "API_KEY_INVALID|API key not valid"  # Gemini's way of a 401: a 400
)


class Service(NamedTuple):
    """Whom to ask, and how."""

    name: str
    """How messages begin: `judge`."""
    setting: str
    """Where it is set in the config: `task.judge`."""
    base_url: str
    model: str
    key: str
    """The NAME of the environment variable with the key; "" = none."""
    timeout: float
    """Seconds for one request."""
    attempts: int
    """HTTP requests for one call at most."""
    concurrency: int
    """Requests in flight at most."""


class CallError(WorkbenchError, RuntimeError):
    """This call was not answered. The message is a cause that can be counted: the same for the same cause."""


class CallRefused(CallError):
    """Nothing will work as configured: the key, the model's id or the address has to change first."""


class Message(BaseModel):
    role: Any = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    reasoning: Any = None
    reasoning_content: Any = None


class Choice(BaseModel):
    message: Message
    finish_reason: str | None = None


class Tokens(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class Completion(BaseModel):
    """What is read of a chat completion; the rest is passed over."""

    choices: list[Choice]
    usage: Tokens | None = None


class Fault(Exception):
    """One HTTP request that gave no completion."""

    def __init__(
        self,
        what: str,
        retried: bool = False,
        lost: str = "",
        pause: float | None = None,
        details: str = "",
        text: bool = False,
    ) -> None:
        super().__init__(what)
        self.what, self.retried, self.details = what, retried, details
        self.text = text
        """Whether it may be the text that was sent: a gateway's moderation answers 403, some name it in a 400."""
        self.lost = lost
        """Why no request will ever succeed; "" = one may."""
        self.pause = pause
        """Seconds for which nobody is to ask; 0 = as long as the backoff, None = nobody else is concerned."""


async def post(client: openai.AsyncOpenAI, request: dict[str, Any], to: Service) -> Completion:
    """Send one request of chat.completions. Raises Fault."""
    import openai

    try:
        async with asyncio.timeout(to.timeout):  # the client's own limit is for the time between two bytes
            # As `extra_body`, for the client walks through all else, field by field: a third of what a call costs here.
            raw = await client.chat.completions.with_raw_response.create(
                model=to.model, messages=[], extra_body=request
            )
        return Completion.model_validate_json(raw.content)
    except (TimeoutError, openai.APITimeoutError):
        raise Fault("no answer in time", retried=True) from None
    except openai.APIConnectionError as error:
        raise Fault("no connection", retried=True, details=str(error.__cause__ or error)) from None
    except openai.APIStatusError as error:
        raise _status_fault(error, to) from None
    except ValidationError:
        raise Fault("an answer that is no chat completion", retried=True) from None


def _status_fault(error: openai.APIStatusError, to: Service) -> Fault:
    status, text, words = error.status_code, error.response.text, _words(error)
    what = f"HTTP {status}"
    if status in HOPELESS or (status < 500 and _HOPELESS_WORDS.search(text)):
        lost = f"{what} from {to.base_url}: {words}. {_advice(status, to)}"
        return Fault(what, lost=lost, details=words, text=status in (400, 403))
    pause = retry_after(error.response.headers, text)
    if status in RETRIED or status >= 500:
        return Fault(what, retried=True, pause=pause or 0.0 if status == 429 else pause, details=words)
    named = error.code and error.code != str(status)
    return Fault(f"{what} ({error.code})" if named else what, details=words)


def _words(error: openai.APIStatusError) -> str:
    """What the server says, short and without secrets."""
    body = error.body[0] if isinstance(error.body, list) and error.body else error.body  # Gemini sends a list of one
    inner = body.get("error", body) if isinstance(body, dict) else body
    told = inner.get("message") if isinstance(inner, dict) else inner
    return scrub(" ".join(str(told or error.response.reason_phrase).split()))[:200].rstrip(".")


def _advice(status: int, to: Service) -> str:
    if status in (404, 410):
        return f"Is the model id {to.model!r} right ({to.setting}.model), and the address ({to.setting}.base_url)?"
    if status == 400 and not to.key:
        return f"It does not take what {to.setting} has it sent"
    key = f"the key in {to.key}" if to.key else f"{to.setting}.key, which names no key"
    return f"Look at {key}, at the account that it belongs to, and at {to.setting}"


def retry_after(headers: Mapping[str, str], text: str = "") -> float | None:
    """Seconds that an answer asks to wait: retry-after-ms, Retry-After (seconds or a date), or Gemini's retryDelay."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        pass  # no date either
    delay = re.search(r'"retryDelay":\s*"(\d+(?:\.\d+)?)s"', text)
    return float(delay[1]) if delay else None


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

    def __init__(self, service: Service) -> None:
        self.service = service
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._in_flight = 0
        self._closed_until = self._refused_at = -math.inf
        self._refusal = ""
        self._answered = False
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
                completion = await post(lane.client, request, to)
                self._answered = True
                return completion
            except Fault as error:
                fault = error
            finally:
                spent.seconds += time.perf_counter() - began
                self._leave(lane)
            wait = min(MOST_WAIT, FIRST_WAIT * 2 ** (number - 1)) * random.uniform(0.5, 1)
            self._note(fault, wait)
            if not fault.retried:
                raise self.failed(f"{to.name}: {fault.what}")
            if number < to.attempts:
                await asyncio.sleep(wait)
        if not self._answered and not fault.what.startswith(("HTTP", "no answer")):  # there is no such service at all
            raise self._refuse(
                f"{fault.what} from {to.base_url} after {to.attempts} attempts ({fault.details}): does the "
                f"server run, and is {to.setting}.base_url right? It ends in /v1 as a rule"
            )
        raise self.failed(f"{to.name}: {fault.what} after {to.attempts} attempts")

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

    def _note(self, fault: Fault, wait: float) -> None:
        """What a failed request means for the other calls. Raises `refused`."""
        if fault.lost and not (fault.text and self._answered):  # one text must not stop all others
            raise self._refuse(fault.lost)
        if fault.details:
            self.tell(f"{self.service.name}: {fault.what}: {fault.details}", once=fault.what)
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


def sendable(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs are joined, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sendable_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with texts that can be written as UTF-8."""
    return {key: sendable(value) if isinstance(value, str) else value for key, value in message.items()}
