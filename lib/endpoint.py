"""A policy behind an OpenAI-compatible URL: messages and tools in, one assistant message out.

Owns the request and what counts as an answer; slots, retries and pauses are lib/calls.py's. What is no answer raises
EndpointError, so that the rollout is unscored with that cause. Must not know tasks, rows or scores.

    python -c "from lib.config import EndpointSection as E; from lib.endpoint import service_of; print(service_of(E()))"
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError, model_validator

from lib.calls import Caller, CallError, CallRefused, Spent, sendable, takes_temperature
from lib.config import EndpointSection, EvaluationSection
from lib.cost import load_prices, priced_as, record_usage, token_price
from lib.places import RUN
from lib.rollout import OutOfRoomError
from lib.task import Message, Turn
from lib.wire import Choice, Completion, Fault, Service, Tokens

SETTING = "evaluation.endpoint"
_OPENAI = "api.openai.com"
_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Of a message; thinking is the policy's own and is not sent back."""
_SEVERAL = 3
"""The least of different requests that fail, with none answered, before the endpoint itself is taken to be at fault."""


class EndpointError(CallError):
    """This request gave no answer."""


class EndpointRefused(EndpointError, CallRefused):
    """Nothing will work as configured: the key, the model's id or the address has to change first."""


class Used(NamedTuple):
    """What an endpoint was asked in this process."""

    answers: int = 0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Answer(Completion):
    """A completion as servers really send them: what stands beside the answer may be nonsense."""

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("error") and not raw.get("choices"):
            raise ValueError("an error in the place of an answer")
        choices = raw.get("choices")
        listed = [_readable_choice(one) for one in choices] if isinstance(choices, list) else choices
        return {"choices": listed, "usage": _readable_usage(raw.get("usage"))}


def _readable_choice(raw: Any) -> Any:
    if not isinstance(raw, dict) or not isinstance(raw.get("message"), dict):
        return raw
    message, reason = raw["message"], raw.get("finish_reason")
    parts = message.get("content")
    if isinstance(parts, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        spoken = [text for text in texts if isinstance(text, str)]
        message = {**message, "content": "".join(spoken) if spoken or not parts else parts}
    return {"message": message, "finish_reason": reason if isinstance(reason, str) else None}


def _readable_usage(raw: Any) -> Tokens | None:
    """None = it does not say."""
    try:
        return Tokens.model_validate(raw)
    except ValidationError:
        return None


class _Function(BaseModel):
    name: str
    arguments: Any = None


class _ToolCall(BaseModel):
    id: Any = None
    function: _Function


class EndpointPolicy(Caller):
    """A policy for rollouts that go on side by side, each at its own pace: a Generate."""

    failed = EndpointError
    refused = EndpointRefused
    reads = Answer

    def __init__(
        self,
        settings: EvaluationSection,
        completion_limit: int,
        greedy: bool,
        has_answered: bool = False,
        effort: str | None = None,
    ) -> None:
        """`effort`: how long to think (model.reasoning_effort), sent where it is set.

        `has_answered`: in an earlier process, so that rows that fail now are no sign that nothing works.
        """
        service = service_of(settings.endpoint)
        super().__init__(service, max(_SEVERAL, service.concurrency), has_answered)
        self.used = Used()
        """So far."""
        self._sampling = sampling_sent(settings, completion_limit, greedy)
        if effort:
            self._sampling["reasoning_effort"] = effort
        self._prices = load_prices()
        self._price = priced_as(self._prices, self.service.model)

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        """The answer to a conversation. Raises EndpointError, and OutOfRoomError where the model can hold no more."""
        check_key(self.service)
        if self._price is None and not _is_here(self.service.base_url):
            self.tell(
                f"endpoint: no token price for {self.service.model!r}, so nobody knows what it costs: add it under "
                f"`tokens` in {self._prices.file} (0 where it costs nothing)"
            )
        request = {"model": self.service.model, "messages": wire_messages(messages), **self._sampling}
        if tools:
            request["tools"] = list(tools)
        spent, completion = Spent(), None
        try:
            completion = await self.complete(request, spent)
        except EndpointError as error:
            if isinstance(error.__cause__, Fault) and error.__cause__.too_long:
                raise OutOfRoomError from error  # the policy has talked too much, which is no failure of the endpoint
            raise
        finally:
            self._count(spent, completion)
        if self._price and completion.usage is None:
            self.tell("endpoint: it does not say how many tokens an answer took, so the bill is too low")
        return _turn(completion)

    @property
    def refusal(self) -> str:
        """Why no request will ever succeed; "" = one may."""
        return self._refusal

    def _count(self, spent: Spent, completion: Completion | None) -> None:
        """Into the totals, and into the run's bill: with 0 USD and `priced: false` where no price is known."""
        tokens = (completion.usage if completion else None) or Tokens()
        self.used = Used(
            self.used.answers + (completion is not None),
            self.used.requests + spent.attempts,
            self.used.input_tokens + tokens.prompt_tokens,
            self.used.output_tokens + tokens.completion_tokens,
        )
        run = os.environ.get(RUN)
        if run and spent.attempts:
            took = tokens.prompt_tokens, tokens.completion_tokens
            usd = token_price(self._prices, self._price, *took) if self._price else 0.0
            unknown = self._price is None or (completion is not None and completion.usage is None)
            what: dict[str, Any] = {"model": self.service.model, "priced": not unknown}
            what |= {"input_tokens": took[0], "output_tokens": took[1]}
            record_usage(run, "endpoint", usd, **what, retries=spent.attempts - 1, answered=completion is not None)


def check_key(service: Service) -> None:
    """Raises EndpointRefused where the environment variable with the key is not set."""
    name = service.key
    if name and not os.environ.get(name, "").strip():
        raise EndpointRefused(
            f"endpoint: the environment variable {name} ({SETTING}.key) is not set. Run `export {name}=...` first, "
            f"or name another variable"
        )


def _is_here(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")


def service_of(endpoint: EndpointSection) -> Service:
    """The endpoint as lib/calls.py asks it."""
    return Service(
        name="endpoint",
        setting=SETTING,
        base_url=endpoint.base_url,
        model=endpoint.model,
        key=endpoint.key,
        timeout=endpoint.timeout,
        attempts=endpoint.attempts,
        concurrency=endpoint.concurrency,
    )


def wire_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages as the API takes them: arguments as texts, every tool call with an id, every result with its call's."""
    sent: list[Message] = []
    waiting: list[str] = []  # ids of calls whose results are still to come
    for number, message in enumerate(messages):
        one = sendable({key: value for key, value in message.items() if key in _SENT})
        if one.get("tool_calls"):
            one["tool_calls"] = [_wire_call(call, f"call_{number}_{i}") for i, call in enumerate(one["tool_calls"])]
            waiting = [call["id"] for call in one["tool_calls"]]
        elif one["role"] == "tool":
            if "tool_call_id" not in one and waiting:
                one["tool_call_id"] = waiting[0]
            waiting = [name for name in waiting if name != one.get("tool_call_id")]
        sent.append(one)
    return sent


def _wire_call(call: Mapping[str, Any], identity: str) -> dict[str, Any]:
    """A call in OpenAI's form, from that form or the bare function."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    return {
        "id": call.get("id") or identity,
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False),
        },
    }


def sampling_sent(settings: EvaluationSection, completion_limit: int, greedy: bool) -> dict[str, Any]:
    """What is sent beside the messages: nothing that is at its default, for not every endpoint knows everything."""
    official = urlsplit(settings.endpoint.base_url).hostname == _OPENAI
    limit = settings.endpoint.max_tokens or completion_limit
    # OpenAI's newer models refuse the old name; not all others know the new one.
    sent: dict[str, Any] = {"max_completion_tokens" if official else "max_tokens": limit}
    if not official or takes_temperature(settings.endpoint.model):
        sent["temperature"] = 0.0 if greedy else settings.temperature
    if not greedy and settings.top_p < 1:
        sent["top_p"] = settings.top_p
    if not greedy and settings.top_k:
        sent["top_k"] = settings.top_k
    return sent


def _turn(completion: Completion) -> Turn:
    """The first choice as a Turn. Raises EndpointError for what is no assistant message."""
    if not completion.choices:
        raise EndpointError("endpoint: an answer without a choice")
    choice = completion.choices[0]
    if choice.finish_reason == "content_filter":
        raise EndpointError("endpoint: the answer was withheld (content_filter)")
    if choice.finish_reason == "error":  # OpenRouter's way to say that the model behind it broke off
        raise EndpointError("endpoint: the answer broke off (finish_reason error)")
    if choice.message.role not in (None, "assistant"):
        raise EndpointError(f"endpoint: an answer in the role {str(choice.message.role)[:40]!r}, not assistant")
    return Turn(message=_message(choice), stop="length" if choice.finish_reason == "length" else "stop")


def _message(choice: Choice) -> Message:
    said = choice.message
    message: Message = {"role": "assistant", "content": said.content or said.refusal or ""}
    thinking = said.reasoning or said.reasoning_content
    if isinstance(thinking, str):
        message["thinking"] = thinking
    if said.tool_calls:
        message["tool_calls"] = _tool_calls(said.tool_calls)
    return sendable(message)


def _tool_calls(given: Any) -> list[dict[str, Any]]:
    """OpenAI's tool_calls, arguments as the policy wrote them: reading those is the task's. None at all = {}."""
    try:
        calls = [_ToolCall.model_validate(call) for call in given]
    except (ValidationError, TypeError):
        raise EndpointError("endpoint: tool_calls that are none") from None
    return [_tool_call(call) for call in calls]


def _tool_call(call: _ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if arguments is None:
        arguments = {}
    elif not isinstance(arguments, (str, dict)):
        arguments = json.dumps(sendable(arguments), ensure_ascii=False)
    named = {"id": str(call.id)} if isinstance(call.id, (str, int)) and call.id != "" else {}
    return {**named, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
