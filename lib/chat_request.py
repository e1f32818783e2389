"""A chat completion that is asked for, as OpenAI's clients write it, for a server that can do a part of what they know.

Owns what is understood, what asks for nothing, and the refusal of the rest by name. Must not know models or HTTP.

    python -c "from lib.chat_request import read_request as r; print(r(b'{\"messages\": [{\"role\": \"user\"}]}'))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib import WorkbenchError
from lib.speaker import Wish
from lib.task import describe_invalid

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "stop": ([], ""), "response_format": ({"type": "text"},), "tool_choice": ("auto", "none"), "logit_bias": ({},),
    "parallel_tool_calls": (True,), "user": (), "metadata": (), "store": (False,),
}  # fmt: skip
"""What this server does not do, and the values that ask for nothing of it (None besides)."""
FREE = ("user", "metadata", "store")
"""What is about the caller, and changes no answer."""


class Refused(WorkbenchError, ValueError):
    """A request that is not answered; the message says what to change in it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class StreamOptions(BaseModel):
    include_usage: bool = False


class Asked(BaseModel):
    """A chat completion that is asked for."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("messages")
    @classmethod
    def _roles(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for message in messages:
            if not isinstance(message.get("role"), str):
                raise ValueError("every message has a role: system, developer, user, assistant or tool")
        return [_as_template_reads(message) for message in messages]

    def check(self) -> None:
        """Raises Refused for what would be passed over."""
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL:
                raise Refused(400, f"{name} is not known here", "unknown_parameter", name)
            if value is not None and name not in FREE and value not in NEUTRAL[name]:
                raise Refused(400, f"{name}: {json.dumps(value)[:80]} needs vLLM", "unsupported_parameter", name)

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        return None if (self.model_extra or {}).get("tool_choice") == "none" else self.tools

    def wish(self, room: int) -> Wish:
        most = self.max_completion_tokens or self.max_tokens or room
        return Wish(
            most=min(most, room),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            seed=self.seed,
            calls=bool(self.usable_tools),
        )


def _as_template_reads(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: content a text, a call's arguments an object."""
    made = dict(message)
    parts = made.get("content")
    if isinstance(parts, list):
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
            raise ValueError("content: texts only, no images, sounds or files")
        made["content"] = "".join(map(str, texts))
    if made.get("tool_calls"):
        made["tool_calls"] = [_with_object(call) for call in made["tool_calls"]]
    return made


def _with_object(call: Any) -> Any:
    function = dict(call.get("function") or {}) if isinstance(call, dict) else {}
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError):  # what the policy wrote is no JSON: it stays as it is
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function} if function else call


def read_request(body: bytes) -> Asked:
    """The request in a body. Raises Refused."""
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as caught:
        raise Refused(400, describe_invalid(caught, Asked)) from None
    asked.check()
    return asked
