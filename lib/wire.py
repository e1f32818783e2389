"""One chat completion over HTTP: the request as it goes out, the answer as it is read, and what a failure means.

Owns which failures are worth another request and which none will ever mend. Must not know who asks, or how often.

    python -c "from lib.wire import retry_after; print(retry_after({'retry-after': '2'}))"
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from lib.log import scrub

if TYPE_CHECKING:
    import openai

RETRIED = (408, 409, 429)
"""And every status from 500 on."""
HOPELESS = (401, 402, 403, 404, 410)
_HOPELESS_WORDS = re.compile(
    "insufficient_quota|billing_hard_limit|model_not_found|unsupported_parameter|unsupported_value|unknown_parameter|"
    "API_KEY_INVALID|API key not valid"  # Gemini's way of a 401: a 400
)
_TOO_LONG_WORDS = re.compile(  # OpenAI's, vLLM's and SGLang's, llama.cpp's, TGI's
    r"context_length_exceeded|context (length|size|window)|maximum model length|`max_new_tokens` must be <=",
    re.IGNORECASE,
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


class Said(BaseModel):
    """The message of a choice, as it came."""

    role: Any = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    reasoning: Any = None
    reasoning_content: Any = None


class Choice(BaseModel):
    message: Said
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
        nowhere: bool = False,
        too_long: bool = False,
    ) -> None:
        super().__init__(what)
        self.what, self.retried, self.details = what, retried, details
        self.text = text
        """Whether it may be the text that was sent: a gateway's moderation answers 403, some name it in a 400."""
        self.nowhere = nowhere
        """Whether there was nobody to send it to."""
        self.too_long = too_long
        """Whether the messages and the answer that was asked for are more than the model can hold."""
        self.lost = lost
        """Why no request will ever succeed; "" = one may."""
        self.pause = pause
        """Seconds for which nobody is to ask; 0 = as long as the backoff, None = nobody else is concerned."""


async def post(
    client: openai.AsyncOpenAI, request: dict[str, Any], to: Service, reads: type[Completion] = Completion
) -> Completion:
    """Send one request of chat.completions and read the answer as `reads`. Raises Fault."""
    import openai

    try:
        async with asyncio.timeout(to.timeout):  # the client's own limit is for the time between two bytes
            # As `extra_body`, for the client walks through all else, field by field: a third of what a call costs here.
            raw = await client.chat.completions.with_raw_response.create(
                model=to.model, messages=[], extra_body=request
            )
        return reads.model_validate_json(raw.content)
    except (TimeoutError, openai.APITimeoutError):
        raise Fault("no answer in time", retried=True) from None
    except openai.APIConnectionError as error:
        nowhere = type(error.__cause__).__name__ == "ConnectError"  # httpx's or httpx2's, whichever the client has
        raise Fault("no connection", retried=True, details=str(error.__cause__ or error), nowhere=nowhere) from None
    except openai.APIStatusError as error:
        raise _status_fault(error, to) from None
    except ValidationError:
        raise Fault("an answer that is no chat completion", retried=True, details=_told_in(raw.content)) from None


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
    too_long = _TOO_LONG_WORDS.search(text) is not None
    return Fault(f"{what} ({error.code})" if named else what, details=words, too_long=too_long)


def _words(error: openai.APIStatusError) -> str:
    """What the server says, short and without secrets."""
    body = error.body[0] if isinstance(error.body, list) and error.body else error.body  # Gemini sends a list of one
    inner = body.get("error", body) if isinstance(body, dict) else body
    return _short(_message_of(inner) or error.response.reason_phrase)


def _told_in(content: bytes) -> str:
    """What a server says that puts its error into an answer with status 200; "" = nothing."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    return _short(_message_of(body.get("error")) or "") if isinstance(body, dict) else ""


def _message_of(error: Any) -> Any:
    return error.get("message") if isinstance(error, dict) else error


def _short(text: Any) -> str:
    return scrub(" ".join(str(text).split()))[:200].rstrip(".")


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
