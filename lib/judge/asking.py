"""Asking a judge: slots, retries, pauses that all calls keep, the books, and the spend limit.

python -c "from lib.judge import JudgeSettings, open_judge; print(open_judge(JudgeSettings()).usage)"
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from lib.cost import Usage, load_prices, record_usage, token_price
from lib.judge.errors import JudgeError, JudgeRefused, Reply, UselessReply
from lib.judge.http import Choice, Completion, Fault, Message, Tokens, post, sendable
from lib.judge.settings import JudgeSettings, check_budget, check_key, price_id, retirement_warnings
from lib.log import name_secrets
from lib.places import RUN

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

FIRST_WAIT, MOST_WAIT = 0.5, 30.0
"""Seconds before the second request of a call, doubled for each one more, up to the most."""
LONGEST_PAUSE = 600.0
"""Seconds: an endpoint that asks for a longer pause (a quota of the day) fails its calls instead of holding them."""
REMEMBERED = 60.0
"""Seconds for which a refusal is repeated without asking again: a key or a server may have been mended since."""


class Totals(NamedTuple):
    """What a judge was asked in this process."""

    calls: int = 0
    failed: int = 0
    """Calls that gave no text; each one is in `calls`."""
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = 0.0
    """None = no price is known."""
    seconds: float = 0.0
    """The sum over the calls of what their requests took."""

    @property
    def retries(self) -> int:
        return self.requests - self.calls

    @property
    def latency(self) -> float:
        """Mean seconds of a call; 0 before the first."""
        return self.seconds / self.calls if self.calls else 0.0


class _Spent:
    """What one call has used so far."""

    def __init__(self) -> None:
        self.seconds, self.attempts = 0.0, 0


class _Lane:
    """A client and its slots, which belong to one event loop."""

    def __init__(self, client: openai.AsyncOpenAI, slots: int) -> None:
        self.client, self.slots = client, asyncio.Semaphore(slots)
        self.ended = asyncio.Event()
        """Set, and replaced, when a request has ended."""


class Judge:
    """One judge of this process: all who ask it share its slots, its pauses and its spend limit."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self._prices = load_prices()
        self._price = price_id(settings, self._prices)
        self.usage = Totals(usd=None if self._price is None else 0.0)
        """So far, in this process."""
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._bills: dict[str, Usage] = {}
        self._in_flight = 0
        self._closed_until = self._refused_at = -math.inf
        self._refusal = ""
        self._answered = self._uncounted = False
        self._told: set[str] = set()
        if settings.key_name:
            name_secrets([settings.key_name])

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        schema: dict[str, Any],
        name: str,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Reply:
        """One chat completion as JSON of `schema`, which is called `name` (letters, digits and _).

        The text is as the judge wrote it: checking it is the caller's. Raises UselessReply for a truncated, refused or
        empty reply, JudgeRefused where nothing will work as configured, JudgeError for everything else. A request that
        was cut off is taken to have cost nothing. Once `wanted` says no, the call begins no request any more and is
        cancelled; one that was sent is waited for, since it is paid.
        """
        spent = _Spent()
        try:
            completion = await self._completion(self._lane(), self._request(messages, schema, name), spent, wanted)
            reply = self._reply(completion, spent)
        except JudgeError as error:
            if not isinstance(error, UselessReply):
                error.spent = Reply("", 0, 0, 0.0, spent.seconds, spent.attempts)
            if spent.attempts:
                self._record(error.spent, str(error))
            raise
        self._record(reply)
        return reply

    # the request

    def _lane(self) -> _Lane:
        """The client of the running loop: one that is used on another loop fails. Raises JudgeRefused."""
        settings = self.settings
        for warning in retirement_warnings(settings):
            self._tell(warning)
        check_key(settings)
        check_budget(settings, self._prices)
        if self._price is None:
            self._tell(
                f"judge: no token price for {settings.model_id!r}, so nobody knows what it costs: add it under "
                f"`tokens` in {self._prices.file} (0 where it costs nothing)"
            )
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            import openai

            key = os.environ[settings.key_name].strip() if settings.key_name else "none"  # the client wants one
            client = openai.AsyncOpenAI(
                api_key=key, base_url=settings.endpoint, max_retries=0, timeout=settings.timeout
            )
            lane = self._lanes[loop] = _Lane(client, settings.concurrency)
        return lane

    def _request(self, messages: Sequence[Mapping[str, Any]], schema: dict[str, Any], name: str) -> dict[str, Any]:
        settings = self.settings
        request: dict[str, Any] = {
            "model": settings.model_id,
            "messages": [_sendable(message) for message in messages],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": name, "schema": schema, "strict": True},
            },
            # OpenAI's newer models refuse the old name; not all others know the new one.
            "max_completion_tokens" if settings.provider == "openai" else "max_tokens": settings.max_tokens,
        }
        if settings.sent_temperature is not None:
            request["temperature"] = settings.sent_temperature
        if settings.reasoning_effort:
            request["reasoning_effort"] = settings.reasoning_effort
        return request

    async def _completion(
        self, lane: _Lane, request: dict[str, Any], spent: _Spent, wanted: Callable[[], bool]
    ) -> Completion:
        """Send the request until it is answered. Raises JudgeError."""
        attempts = self.settings.attempts
        for number in range(1, attempts + 1):
            await self._enter(lane, wanted)
            began = time.perf_counter()
            spent.attempts += 1
            try:
                completion = await post(lane.client, request, self.settings)
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
                raise JudgeError(f"judge: {fault.what}")
            if number < attempts:
                await asyncio.sleep(wait)
        if not self._answered and not fault.what.startswith(("HTTP", "no answer")):  # there is no judge at all
            raise self._refuse(
                f"{fault.what} from {self.settings.endpoint} after {attempts} attempts ({fault.details}): does the "
                f"server run, and is task.judge.base_url right? It ends in /v1 as a rule"
            )
        raise JudgeError(f"judge: {fault.what} after {attempts} attempts")

    def _note(self, fault: Fault, wait: float) -> None:
        """What a failed request means for the other calls. Raises JudgeRefused."""
        if fault.lost and not (fault.text and self._answered):  # one answer must not stop the judging of all others
            raise self._refuse(fault.lost)
        if fault.details:
            self._tell(f"judge: {fault.what}: {fault.details}", once=fault.what)
        if fault.pause is not None:
            self._closed_until = max(self._closed_until, time.monotonic() + (fault.pause or wait))

    # who may ask

    async def _enter(self, lane: _Lane, wanted: Callable[[], bool]) -> None:
        """Wait until no pause is on, the money reaches and a slot is free. During a pause no slot is held."""
        while True:
            if not wanted():
                raise asyncio.CancelledError
            if (pause := self._pause()) > 0:  # a little later than told, and not all at once
                await asyncio.sleep(pause + random.uniform(0, min(1.0, 0.1 * pause)))
                continue
            if not self._affordable():
                with suppress(TimeoutError):  # the request that is waited for may be another loop's
                    await asyncio.wait_for(lane.ended.wait(), 1.0)
                continue
            await lane.slots.acquire()
            free = False
            try:
                free = wanted() and self._pause() <= 0 and self._affordable()
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
        """Seconds that are left of a pause, below 0 when none is on. Raises JudgeError."""
        if time.monotonic() - self._refused_at < REMEMBERED:
            raise JudgeRefused(self._refusal)
        pause = self._closed_until - time.monotonic()
        if pause > LONGEST_PAUSE:
            raise JudgeError(f"judge: told to wait for longer than {LONGEST_PAUSE:g} s")
        return pause

    def _refuse(self, cause: str) -> JudgeRefused:
        self._refusal, self._refused_at = f"judge: {cause}", time.monotonic()
        return JudgeRefused(self._refusal)

    def _affordable(self) -> bool:
        """Whether one more call fits the budget beside those in flight, each taken to cost the mean of the others.

        The first call goes alone, since no mean is known. False = perhaps when those in flight have ended. Raises
        JudgeRefused where it does not fit, whatever they cost.
        """
        limit = self.settings.budget_usd
        if limit is None:
            return True
        if self._uncounted:
            raise JudgeRefused(
                "judge: its replies do not say how many tokens they took: leave task.judge.budget_usd out"
            )
        answered, spent = self.usage.calls - self.usage.failed, self._spent_usd()
        mean = (self.usage.usd or 0.0) / answered if answered else 0.0
        if spent >= limit or spent + mean > limit:
            raise JudgeRefused(
                f"judge: task.judge.budget_usd, {limit:g} USD for the judges of a run, is used up: raise it to go on"
            )
        if not self._in_flight:
            return True
        return answered > 0 and spent + mean * (self._in_flight + 1) <= limit

    def _spent_usd(self) -> float:
        """What the run's judges have cost so far, other processes and earlier attempts included."""
        run = os.environ.get(RUN)
        if not run:
            return self.usage.usd or 0.0
        bill = self._bills.setdefault(run, Usage(run))
        bill.read()
        return bill.usd["judge"]

    # the reply

    def _reply(self, completion: Completion, spent: _Spent) -> Reply:
        """Raises UselessReply."""
        used = completion.usage or Tokens()
        usd = None
        if completion.usage is None:
            self._uncounted = True
        elif self._price is not None:
            usd = token_price(self._prices, self._price, used.prompt_tokens, used.completion_tokens)
        took = Reply("", used.prompt_tokens, used.completion_tokens, usd, spent.seconds, spent.attempts)
        choice = completion.choices[0] if completion.choices else Choice(message=Message())
        text = choice.message.content or ""
        if choice.finish_reason == "length":
            cause = f"judge: cut off at {self.settings.max_tokens} tokens (task.judge.max_tokens)"
            raise UselessReply("truncated", cause, took)
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise UselessReply("refusal", "judge: it refused to answer", took)
        if not text.strip():
            raise UselessReply("empty", "judge: an empty reply", took)
        return took._replace(text=text)

    def _record(self, took: Reply, error: str = "") -> None:
        """Into the totals, and into the run's bill: with 0 USD and `priced: false` where no price is known."""
        old = self.usage
        self.usage = Totals(
            calls=old.calls + 1,
            failed=old.failed + bool(error),
            requests=old.requests + took.attempts,
            input_tokens=old.input_tokens + took.input_tokens,
            output_tokens=old.output_tokens + took.output_tokens,
            usd=None if old.usd is None else old.usd + (took.usd or 0.0),
            seconds=old.seconds + took.seconds,
        )
        run = os.environ.get(RUN)
        if run:
            what: dict[str, Any] = {"model": self.settings.model_id, "priced": took.usd is not None}
            what |= {"input_tokens": took.input_tokens, "output_tokens": took.output_tokens}
            what |= {"seconds": round(took.seconds, 3), "retries": took.attempts - 1}
            record_usage(run, "judge", took.usd or 0.0, **what, **({"error": error} if error else {}))

    def _tell(self, warning: str, once: str = "") -> None:
        if (once or warning) not in self._told:
            self._told.add(once or warning)
            logger.warning("%s", warning)


_judges: dict[tuple[int, JudgeSettings, str], Judge] = {}


def open_judge(settings: JudgeSettings) -> Judge:
    """The judge of this process for these settings, and for the key as it is now. Raises CostError for bad prices."""
    key = os.getpid(), settings, os.environ.get(settings.key_name, "")
    return _judges.get(key) or _judges.setdefault(key, Judge(settings))


def _sendable(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with text that can be written as UTF-8."""
    return {key: sendable(value) if isinstance(value, str) else value for key, value in message.items()}
