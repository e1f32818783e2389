"""The same prompts to whatever holds a policy: a served model by its URL, or a folder that is loaded here.

Owns one record for each answer, the same from both, for a table. Must not know tasks, scores or servers.

    python -c "from lib.client import ask_url; print(ask_url('http://127.0.0.1:8000/v1', [[]], 16, limit=8))"
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lib import WorkbenchError, models
from lib.config import Config
from lib.front import TOKEN
from lib.generate import chat_of, local_sample
from lib.log import scrub
from lib.task import Message

Record = dict[str, Any]
"""`prompt` (the last message), `answer`, `thinking` ("" = none), `calls` (names of tools called), `stop`, `tokens` of
the answer, `seconds`."""


class AskError(WorkbenchError, RuntimeError):
    """The server gave no answer; the message says why."""


def ask_url(
    base_url: str,
    prompts: Sequence[Sequence[Message]],
    limit: int,
    *,
    key: str = TOKEN,
    model: str = "",
    temperature: float = 0.0,
    stream: bool = False,
    at_once: int = 4,
) -> list[Record]:
    """Ask a served model with the openai client: a record for each prompt, in order. Raises AskError.

    `key` is the NAME of the environment variable that holds the token; `model` "" = the server's own.
    `limit`: tokens of an answer at most. `stream`: the answer as it comes; `seconds` is then until its first text.
    """
    import openai

    with openai.OpenAI(base_url=base_url, api_key=os.environ.get(key) or "none", timeout=600) as client:

        def one(prompt: Sequence[Message]) -> Record:
            asked = {"messages": list(prompt), "max_tokens": limit, "temperature": temperature}
            try:
                answer = _streamed if stream else _whole
                return {"prompt": prompt[-1].get("content"), **answer(client, model, asked)}
            except openai.APIError as error:
                raise AskError(scrub(f"{base_url} gave no answer: {_why(error, key)}")) from None

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, prompts))


def ask_folder(
    config: Config,
    source: str,
    prompts: Sequence[Sequence[Message]],
    limit: int,
    *,
    adapter: Path | None = None,
    temperature: float = 0.0,
) -> list[Record]:
    """Answer the prompts with a model that is loaded here, and an adapter on it: records as of `ask_url`.

    `seconds` are those of the batch, shared out. Raises ModelError.
    """
    tokenizer = models.load_tokenizer(source, config.model)
    model = models.load_model(source, config.model, purpose="adapter" if adapter else "answer")
    chat = chat_of(config, model, tokenizer)
    if adapter:
        model = models.load_adapter(model, str(adapter))
    settings = config.evaluation.model_copy(update={"temperature": temperature or 1.0})
    sample = local_sample(model, chat, settings, limit, greedy=temperature == 0)
    ids = [chat.prompt_ids(prompt) for prompt in prompts]
    began = time.monotonic()
    outputs, _ = sample(ids)
    seconds = (time.monotonic() - began) / max(1, len(prompts))
    turns = [chat.turn(one, output, None) for one, output in zip(ids, outputs, strict=True)]
    return [
        {"prompt": prompt[-1].get("content"), **_record(turn.message, turn.stop, len(turn.output_ids or ()), seconds)}
        for prompt, turn in zip(prompts, turns, strict=True)
    ]


def _record(message: Message, stop: str, tokens: int, seconds: float) -> Record:
    return {
        "answer": message.get("content") or "",
        "thinking": message.get("thinking") or "",
        "calls": [call.get("function", call)["name"] for call in message.get("tool_calls") or []],
        "stop": stop,
        "tokens": tokens,
        "seconds": round(seconds, 3),
    }


def _whole(client: Any, model: str, asked: dict[str, Any]) -> Record:
    began = time.monotonic()
    done = client.chat.completions.create(model=model, **asked)
    choice = done.choices[0]
    said = choice.message.model_dump()
    message = {**said, "thinking": said.get("reasoning") or said.get("reasoning_content")}
    tokens = done.usage.completion_tokens if done.usage else 0
    return _record(message, choice.finish_reason, tokens, time.monotonic() - began)


def _streamed(client: Any, model: str, asked: dict[str, Any]) -> Record:
    began = time.monotonic()
    first, stop, tokens = None, "", 0
    parts: dict[str, list[str]] = {"content": [], "thinking": []}
    calls: dict[int, str] = {}
    with client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **asked
    ) as chunks:
        for chunk in chunks:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices:
                stop = choice.finish_reason or stop
                delta = choice.delta.model_dump()
                parts["content"].append(delta.get("content") or "")
                parts["thinking"].append(delta.get("reasoning") or delta.get("reasoning_content") or "")
                for call in delta.get("tool_calls") or []:
                    calls[call["index"]] = (call.get("function") or {}).get("name") or calls.get(call["index"], "")
                if first is None and (any(parts["content"]) or any(parts["thinking"]) or calls):
                    first = time.monotonic() - began
    if not stop:
        raise AskError("the answer broke off")
    message: Message = {name: "".join(texts) for name, texts in parts.items()}
    message["tool_calls"] = [{"name": name} for name in calls.values()]
    return _record(message, stop, tokens, time.monotonic() - began if first is None else first)


def _why(error: Any, key: str) -> str:
    """What the server says, and what to do where that is known."""
    status = getattr(error, "status_code", None)
    if status == 401:
        return f"HTTP 401: the token is missing or wrong. It is read from an environment variable: {key}"
    return f"HTTP {status}: {error.message}" if status else f"{error.message} (is it running?)"
