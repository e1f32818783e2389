"""A policy on loopback that misbehaves on command: a real HTTP server, OpenAI-compatible /v1/chat/completions.

    python tests/chat_server.py --port 8789 --control '{"reply": "hello", "faults": {"rate_limit": 0.1}}'

Prints its port on the first line. `POST /control` changes how it behaves (the fields of Control; `{"reset": true}`
forgets what was counted as well), `GET /stats` says what happened. Which request gets which fault is decided by (seed,
request body, how often this body came before), so a run meets the same faults again whatever its timing.

What it says: `replies` in order of the conversation's turns (the last one for all later turns), each a text or a whole
message with tool_calls; without them, the last user message's text.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

FAULTS = (
    "rate_limit",  # 429 with Retry-After
    "conflict",  # 409
    "request_timeout",  # 408
    "server_error",  # 503
    "timeout",  # never answers
    "reset",  # the connection is cut
    "bad_request",  # 400: the roles do not alternate
    "moderated",  # 403: the text is not let through
    "too_long",  # 400: more than the model can hold
    "error_inside",  # an error with status 200
    "page",  # a web page
    "stream",  # server-sent events, though none were asked for
    "trickle",  # a space every 20 ms, for ever
    "binary",  # bytes that are no text
    "no_choice",  # choices: []
    "wrong_role",  # an answer of the user
    "wrong_content",  # a number for a text
    "surrogate",  # half of a character
    "tool_rubbish",  # tool_calls without functions
    "filtered",  # finish_reason content_filter
    "broken_off",  # finish_reason error
    "odd_reason",  # finish_reason 7
    "cut_off",  # finish_reason length
)
KEPT = 500
"""Bodies of the last so many requests are kept for /stats."""


@dataclasses.dataclass
class Control:
    """How the server behaves. Every field can be set by POST /control."""

    latency: float = 0.0
    """Seconds from a request's arrival to its answer."""
    seed: int = 0
    faults: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of requests by name of the fault; they add up to at most 1."""
    script: list[str] = dataclasses.field(default_factory=list)
    """Faults of the next requests, in order of arrival ("" = none); goes before `faults`."""
    only: str = ""
    """`faults` meet only requests in whose messages this text stands."""
    status: int = 0
    """This status for every request: 401, 404, ..."""
    retry_after: float = 0.05
    """Seconds that a 429 asks for; below 0 = no such header."""
    key: str = ""
    """The key that it wants; "" = any. Others get a 401."""
    replies: list[Any] = dataclasses.field(default_factory=list)
    thinking: str = ""
    """Sent as reasoning_content beside every answer."""
    usage: Any = ""
    """Sent in the place of the true usage; "" = the true one."""


class Server:
    """The behaviour and the counters; one asyncio loop, no locks."""

    def __init__(self, control: dict[str, Any]) -> None:
        self.control = Control()
        self.forget()
        self.change(control)

    def forget(self) -> None:
        self.requests = self.answered = self.in_flight = self.most = self.early = 0
        self.fault_counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.bodies: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.keys: deque[str] = deque(maxlen=KEPT)
        self.closed_until = 0.0

    def change(self, values: dict[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(Control)}
        unknown = [*(values.keys() - known - {"reset"}), *(values.get("faults", {}).keys() - set(FAULTS))]
        unknown += set(values.get("script", [])) - {*FAULTS, ""}
        if unknown:
            raise ValueError(f"unknown: {sorted(unknown)}; known: {sorted(known)}, faults {FAULTS}")
        if values.get("reset"):
            self.control = Control()
            self.forget()
        self.control = dataclasses.replace(self.control, **{k: v for k, v in values.items() if k in known})

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "answered": self.answered,  # with status 200
            "in_flight": self.in_flight,
            "max_in_flight": self.most,
            "early": self.early,  # came before a Retry-After was over
            "faults": dict(self.fault_counts),
            "bodies": list(self.bodies),
            "keys": list(self.keys),
        }

    def fault_of(self, raw: bytes) -> str:
        control = self.control
        digest = hashlib.sha256(raw).hexdigest()
        nth = self.seen[digest]
        self.seen[digest] += 1
        if control.script:
            return control.script.pop(0)
        if control.only and control.only not in raw.decode():
            return ""
        seeded = hashlib.sha256(repr((control.seed, digest, nth)).encode()).digest()
        drawn = int.from_bytes(seeded[:7], "big") / 2**56
        for name in FAULTS:
            drawn -= control.faults.get(name, 0.0)
            if drawn < 0:
                return name
        return ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.requests += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self.early += time.monotonic() < self.closed_until
        try:
            body = json.loads(raw)
            self.bodies.append(body)
            self.keys.append(request.headers.get("Authorization", "").removeprefix("Bearer "))
            fault = self.fault_of(raw)
            if fault:
                self.fault_counts[fault] += 1
            await asyncio.sleep(self.control.latency)
            return await self.answer(request, body, fault)
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "trickle":
            return await _trickle(request)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return self.refused(fault) or self.rubbish(fault) or self.said(body, fault)

    def refused(self, fault: str) -> web.Response | None:
        control = self.control
        if control.status:
            return _error(control.status, f"forced to {control.status}")
        if control.key and self.keys[-1] != control.key:
            return _error(401, f"Incorrect API key provided: {self.keys[-1]}.")
        if fault == "rate_limit":
            response = _error(429, "slow down")
            if control.retry_after >= 0:
                self.closed_until = max(self.closed_until, time.monotonic() + control.retry_after)
                response.headers["retry-after-ms"] = f"{1000 * control.retry_after:.0f}"
            return response
        statuses = {"conflict": 409, "request_timeout": 408, "server_error": 503}
        if fault == "moderated":
            return _error(403, "this text is not let through")
        if fault == "too_long":
            return _error(400, "This model's maximum context length is 10 tokens. However, you requested 11 tokens.")
        if fault == "bad_request":
            return _error(400, "Conversation roles must alternate user/assistant/user/assistant/...")
        return _error(statuses[fault], fault) if fault in statuses else None

    def rubbish(self, fault: str) -> web.Response | None:
        if fault == "page":
            return web.Response(text="<html>Welcome!</html>", content_type="text/html")
        if fault == "error_inside":
            return web.json_response({"error": {"message": "the model behind it is gone", "code": 502}})
        if fault == "stream":
            return web.Response(text='data: {"choices": [{"delta": {"content": "he"}}]}\n\ndata: [DONE]\n\n')
        if fault == "binary":
            return web.Response(body=b'{"choices": "\xff\xfe\x00"}', content_type="application/json")
        if fault == "surrogate":
            text = '{"choices": [{"message": {"role": "assistant", "content": "half \\ud800"}}]}'
            return web.Response(text=text, content_type="application/json")
        return None

    def said(self, body: dict[str, Any], fault: str) -> web.Response:
        self.answered += 1
        message = self.message(body)
        if fault == "wrong_role":
            message["role"] = "user"
        elif fault == "wrong_content":
            message["content"] = 7
        elif fault == "tool_rubbish":
            message["tool_calls"] = [{"id": "1", "type": "function"}, 5]
        reasons = {"filtered": "content_filter", "cut_off": "length", "broken_off": "error", "odd_reason": 7}
        reason = reasons.get(fault, "stop")
        used = {"prompt_tokens": len(json.dumps(body["messages"])) // 4, "completion_tokens": 1}
        usage = {**used, "total_tokens": sum(used.values())} if self.control.usage == "" else self.control.usage
        return web.json_response(
            {
                "id": f"chat-{self.requests}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": body["model"],
                "choices": [] if fault == "no_choice" else [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": usage,
            }
        )

    def message(self, body: dict[str, Any]) -> dict[str, Any]:
        said = sum(message["role"] == "assistant" for message in body["messages"])
        replies = self.control.replies
        asked = [message["content"] for message in body["messages"] if message["role"] == "user"]
        reply = replies[min(said, len(replies) - 1)] if replies else str(asked[-1])
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else {"role": "assistant", **reply}
        return message | ({"reasoning_content": self.control.thinking} if self.control.thinking else {})


async def _trickle(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "error", "code": None}}, status=status)


def application(server: Server) -> web.Application:
    """The routes."""

    async def control(request: web.Request) -> web.Response:
        try:
            server.change(await request.json())
        except (ValueError, TypeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(dataclasses.asdict(server.control))

    async def stats(request: web.Request) -> web.Response:
        return web.json_response(server.stats())

    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_post("/control", control)
    app.router.add_get("/stats", stats)
    return app


async def serve(port: int, control: dict[str, Any]) -> None:
    """Serve on loopback until killed."""
    # A handler whose client went away is cancelled: what times out is no longer in flight.
    runner = web.AppRunner(application(Server(control)), handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


class ChatServer:
    """The handle that a test holds on a running server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.url}/v1"

    def control(self, **values: Any) -> dict[str, Any]:
        """Change its behaviour: the fields of Control, and `reset=True` to begin anew."""
        return self._call("/control", json.dumps(values).encode())

    def stats(self) -> dict[str, Any]:
        return self._call("/stats", None)

    def _call(self, path: str, data: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())


@contextmanager
def running_chat(port: int = 0, **control: Any) -> Iterator[ChatServer]:
    """A server in a process of its own; `control` as in ChatServer.control. Tests make one per module and reset it."""
    command = [sys.executable, str(Path(__file__)), "--port", str(port), "--control", json.dumps(control)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), f"the chat server did not start: {line!r}"
        yield ChatServer(int(line))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description="A policy on loopback that misbehaves on command.")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one; it is printed")
    parser.add_argument("--control", type=json.loads, default={}, help="JSON with the fields of Control")
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.port, arguments.control))


if __name__ == "__main__":
    main()
