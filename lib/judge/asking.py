"""Asking a judge: the request, the reply, the books, and the spend limit.

python -c "from lib.judge import JudgeSettings, open_judge; print(open_judge(JudgeSettings()).usage)"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lib.calls import Caller, Spent, sendable
from lib.cost import Usage, load_prices, priced_as, record_usage, token_price
from lib.judge.errors import JudgeError, JudgeRefused, Reply, UselessReply
from lib.judge.settings import JudgeSettings, check_budget, check_key, retirement_warnings
from lib.places import RUN
from lib.wire import Choice, Completion, Said, Service, Tokens


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


class Judge(Caller):
    """One judge of this process: all who ask it share its slots, its pauses and its spend limit."""

    failed = JudgeError
    refused = JudgeRefused

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(
            Service(
                name="judge",
                setting="task.judge",
                base_url=settings.endpoint,
                model=settings.model_id,
                key=settings.key_name,
                timeout=settings.timeout,
                attempts=settings.attempts,
                concurrency=settings.concurrency,
            )
        )
        self.settings = settings
        self._prices = load_prices()
        self._price = priced_as(self._prices, settings.model_id)
        self.usage = Totals(usd=None if self._price is None else 0.0)
        """So far, in this process."""
        self._bills: dict[str, Usage] = {}
        self._uncounted = False

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
        spent = Spent()
        try:
            self._check()
            completion = await self.complete(self._request(messages, schema, name), spent, wanted)
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

    def _check(self) -> None:
        """Raises JudgeRefused where asking makes no sense, and says what is worth a warning."""
        settings = self.settings
        for warning in retirement_warnings(settings):
            self.tell(warning)
        check_key(settings)
        check_budget(settings, self._prices)
        if self._price is None:
            self.tell(
                f"judge: no token price for {settings.model_id!r}, so nobody knows what it costs: add it under "
                f"`tokens` in {self._prices.file} (0 where it costs nothing)"
            )

    def _request(self, messages: Sequence[Mapping[str, Any]], schema: dict[str, Any], name: str) -> dict[str, Any]:
        settings = self.settings
        request: dict[str, Any] = {
            "model": settings.model_id,
            "messages": [sendable(message) for message in messages],
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

    # the money

    def affordable(self) -> bool:
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

    def _reply(self, completion: Completion, spent: Spent) -> Reply:
        """Raises UselessReply."""
        used = completion.usage or Tokens()
        usd = None
        if completion.usage is None:
            self._uncounted = True
        elif self._price is not None:
            usd = token_price(self._prices, self._price, used.prompt_tokens, used.completion_tokens)
        took = Reply("", used.prompt_tokens, used.completion_tokens, usd, spent.seconds, spent.attempts)
        choice = completion.choices[0] if completion.choices else Choice(message=Said())
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


_judges: dict[tuple[int, JudgeSettings, str], Judge] = {}


def open_judge(settings: JudgeSettings) -> Judge:
    """The judge of this process for these settings, and for the key as it is now. Raises CostError for bad prices."""
    key = os.getpid(), settings, os.environ.get(settings.key_name, "")
    return _judges.get(key) or _judges.setdefault(key, Judge(settings))
