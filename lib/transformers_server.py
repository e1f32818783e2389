"""An OpenAI-compatible server on Transformers, for machines without vLLM: one request after the other.

Owns /v1/chat/completions (whole and streamed) and /v1/models. What it cannot do is refused by name, never passed over:
`transformers serve` 5.17 has no adapters, no token, greedy answers where it is asked for samples, and errors in a form
of its own. Must not know runs or tasks.

    python -m lib.transformers_server --help
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from lib import hosts, models
from lib.chat_request import Refused, read_request
from lib.config import Config, parse_config
from lib.endpoint import wire_messages
from lib.engine import Address, EngineError, Served, server_program
from lib.front import Front, error
from lib.speaker import Speaker, Wish, rest_of
from lib.task import Turn

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

_GONE_SECONDS = 0.5


# the server -----------------------------------------------------------------------------------------------------------
class Server:
    """The endpoints, over a speaker that has one thread of its own."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._thread = ThreadPoolExecutor(1)
        self._began = int(time.time())

    def app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={Refused: _refused, HTTPException: _refused, 500: _broken})

    async def _health(self, _: Request) -> Response:
        from starlette.responses import Response

        return Response()

    async def _models(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        about = {"object": "model", "created": self._began, "owned_by": "workbench"}
        return JSONResponse({"object": "list", "data": [{"id": name, **about} for name in self._speaker.names]})

    async def _complete(self, request: Request) -> Response:
        from starlette.responses import JSONResponse, StreamingResponse

        asked = read_request(await request.body())
        name = asked.model or self._speaker.names[0]
        if name not in self._speaker.names:
            known = ", ".join(self._speaker.names)
            raise Refused(404, f"there is no model {name!r} here: {known}", "model_not_found", "model")
        chat = self._speaker.chat_of(asked.reasoning_effort)
        try:
            prompt = chat.prompt_ids(asked.messages, asked.usable_tools)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
        ) as caught:  # what Jinja and the templates themselves raise
            raise Refused(400, f"the chat template does not take these messages: {caught}", param="messages") from None
        room = chat.room(prompt)
        if not room:
            limit = f"the maximum model length is {chat.token_limit} tokens"
            raise Refused(400, f"{limit}, and the messages have {len(prompt)}", "context_length_exceeded", "messages")
        job = _Job(self._speaker, self._thread, name, prompt, asked.wish(room))
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(job.events(usage), media_type="text/event-stream")
        return JSONResponse(await job.whole(request))


class _Job:
    """One answer on its way."""

    def __init__(self, speaker: Speaker, thread: ThreadPoolExecutor, name: str, prompt: list[int], wish: Wish) -> None:
        self._prompt = prompt
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self._texts: asyncio.Queue[str] = asyncio.Queue()
        self._gone = Event()
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            if text:
                loop.call_soon_threadsafe(self._texts.put_nowait, text)

        self._turn = loop.run_in_executor(thread, speaker.answer, name, prompt, wish, say, self._gone)

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer when it is done; a caller who has gone ends it."""
        while not (await asyncio.wait([self._turn], timeout=_GONE_SECONDS))[0]:
            if await request.is_disconnected():
                self._gone.set()
        turn = self._turn.result()
        message, reason = self._message(turn)
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**self._about, "object": "chat.completion", "choices": [choice], "usage": self._usage(turn)}

    async def events(self, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, its text as it becomes certain."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            sent = ""
            while not self._turn.done() or not self._texts.empty():
                getting = asyncio.ensure_future(self._texts.get())
                both: list[asyncio.Future[Any]] = [getting, self._turn]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    continue
                sent += getting.result()
                yield self._chunk({"content": getting.result()})
            turn = self._turn.result()
            message, reason = self._message(turn)
            rest = {"content": rest_of(turn.message, sent), "reasoning": message.get("reasoning")}
            calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", []))]
            delta = {name: value for name, value in {**rest, "tool_calls": calls}.items() if value}
            if delta:
                yield self._chunk(delta)
            yield self._chunk({}, reason)
            if usage:
                yield self._event({"choices": [], "usage": self._usage(turn)})
            yield "data: [DONE]\n\n"
        finally:
            self._gone.set()

    def _message(self, turn: Turn) -> tuple[dict[str, Any], str]:
        """The message as it goes out, and why it ended."""
        calls = [{"id": f"call_{uuid.uuid4().hex[:24]}", **call} for call in turn.message.get("tool_calls") or []]
        message = dict(wire_messages([{**turn.message, "tool_calls": calls}])[0])
        if turn.message.get("thinking"):
            message["reasoning"] = turn.message["thinking"]
        if not calls:
            message.pop("tool_calls", None)
        return message, turn.stop if turn.stop == "length" or not calls else "tool_calls"

    def _usage(self, turn: Turn) -> dict[str, int]:
        said = len(turn.output_ids or ())
        return {
            "prompt_tokens": len(self._prompt),
            "completion_tokens": said,
            "total_tokens": len(self._prompt) + said,
        }

    def _chunk(self, delta: Mapping[str, Any], reason: str | None = None) -> str:
        return self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    def _event(self, what: Mapping[str, Any]) -> str:
        return f"data: {json.dumps({**self._about, 'object': 'chat.completion.chunk', **what})}\n\n"


async def _refused(_: Request, caught: Exception) -> Response:
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    if isinstance(caught, Refused):
        body = error(caught.status, str(caught), caught.code, caught.param)
        return JSONResponse(body, status_code=caught.status)
    assert isinstance(caught, HTTPException)
    return JSONResponse(error(caught.status_code, caught.detail), status_code=caught.status_code)


async def _broken(_: Request, caught: Exception) -> Response:
    from starlette.responses import JSONResponse

    full = models.is_out_of_memory(caught)
    told = "out of memory: send less, or lower max_tokens" if full else "the server's log says what went wrong"
    return JSONResponse(error(500, told), status_code=500)


# its process ----------------------------------------------------------------------------------------------------------
def program(config: Config, served: Served, logs: Path, front: Mapping[str, str], at: Address) -> hosts.Server:
    """The server as a process for lib/hosts.py to start. `front`: its guard's settings. Raises EngineError."""
    import importlib.util

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"{' and '.join(missing)} not installed here: `make setup` brings them")
    models.load_tokenizer(served.source, config.model)  # refuses here what would fail later
    order = {"config": config.as_json(), "served": {**served._asdict(), "adapter": str(served.adapter or "")}}
    command = [sys.executable, "-m", "lib.transformers_server", json.dumps(order), "--host", at.host]
    started = server_program("Transformers", served, lambda port: [*command, "--port", str(port)], logs, at)
    return replace(started, environment=front)


def main(arguments: list[str] | None = None) -> int:
    """The server's whole life."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m lib.transformers_server", description="See lib/serving.py.")
    parser.add_argument("order", help="what to serve, as JSON")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    order = json.loads(options.order)
    adapter = order["served"]["adapter"]
    served = Served(**order["served"] | {"adapter": Path(adapter) if adapter else None})
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
    speaker = Speaker(parse_config(order["config"]), served)
    uvicorn.run(Front(Server(speaker).app()), host=options.host, port=options.port, log_level="info", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
