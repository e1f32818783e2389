"""One HTTP request to a judge, and what its failure means: try again, give up this call, or give up for good.

python -c "from lib.judge.http import retry_after; print(retry_after({'retry-after': '2'}))"
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from lib.judge.settings import JudgeSettings
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


class Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


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


async def post(client: openai.AsyncOpenAI, request: dict[str, Any], settings: JudgeSettings) -> Completion:
    """Send one request of chat.completions. Raises Fault."""
    import openai

    try:
        async with asyncio.timeout(settings.timeout):  # the client's own limit is for the time between two bytes
            # As `extra_body`, for the client walks through all else, field by field: a third of what a call costs here.
            raw = await client.chat.completions.with_raw_response.create(
                model=settings.model_id, messages=[], extra_body=request
            )
        return Completion.model_validate_json(raw.content)
    except (TimeoutError, openai.APITimeoutError):
        raise Fault("no answer in time", retried=True) from None
    except openai.APIConnectionError as error:
        raise Fault("no connection", retried=True, details=str(error.__cause__ or error)) from None
    except openai.APIStatusError as error:
        raise _status_fault(error, settings) from None
    except ValidationError:
        raise Fault("an answer that is no chat completion", retried=True) from None


def _status_fault(error: openai.APIStatusError, settings: JudgeSettings) -> Fault:
    status, text, words = error.status_code, error.response.text, _words(error)
    what = f"HTTP {status}"
    if status in HOPELESS or (status < 500 and _HOPELESS_WORDS.search(text)):
        lost = f"{what} from {settings.endpoint}: {words}. {_advice(status, settings)}"
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


def _advice(status: int, settings: JudgeSettings) -> str:
    if status in (404, 410):
        return f"Is the model id {settings.model_id!r} right (task.judge.model), and the address (task.judge.base_url)?"
    if status == 400 and not settings.key_name:
        return "It does not take what task.judge has it sent"
    key = f"the key in {settings.key_name}" if settings.key_name else "task.judge.key, which names no key"
    return f"Look at {key}, at the account that it belongs to, and at task.judge"


def sendable(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs are joined, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
