"""A judge on loopback that misbehaves on command: a real HTTP server, OpenAI-compatible /v1/chat/completions.

    python tests/judge_server.py --port 8788 --control '{"latency": 0.05, "faults": {"rate_limit": 0.1}}'

Prints its port on the first line. `POST /control` changes how it behaves (the fields of Control; `{"reset": true}`
forgets what was counted as well), `GET /stats` says what happened. Which call gets which fault is decided by (seed,
request body, how often this body came before), so a run meets the same faults again whatever its timing.

Its verdict: the share of the criterion's distinct words of four letters or more, in lower case, that occur in the
graded answer. A check passes from a third on; a scored criterion gets the share. What is no grading prompt is answered
with {"text": the last message's text}, or with `reply` where that is set.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

from aiohttp import web

FAULTS = (
    "rate_limit",  # 429 with Retry-After
    "server_error",  # 503
    "timeout",  # never answers
    "reset",  # the connection is cut
    "truncated",  # finish_reason length, half of the JSON
    "malformed",  # no JSON
    "refusal",
    "missing",  # half of the criteria, at least one, left out
    "duplicate",  # one criterion twice, with opposite verdicts
    "unknown_id",  # one verdict under an id that nobody asked for
    "empty",  # no content
    "wrong_type",  # "yes" instead of true, "high" instead of a number
)
HTTP_FAULTS = FAULTS[:4]
KEPT = 500
"""Bodies of the last so many requests are kept for /stats."""


@dataclasses.dataclass
class Control:
    """How the server behaves. Every field can be set by POST /control."""

    latency: float = 0.0
    """Seconds from a request's arrival to its answer."""
    jitter: float = 0.0
    """Seconds more, at most."""
    seed: int = 0
    faults: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of requests by name of the fault; they add up to at most 1."""
    script: list[str] = dataclasses.field(default_factory=list)
    """Faults of the next requests, in order of arrival ("" = none); goes before `faults`."""
    status: int = 0
    """This status for every request: 401, 404, ..."""
    code: str = ""
    """The error's `code` beside `status`: `insufficient_quota`, say."""
    retry_after: float = 0.05
    """Seconds that a 429 asks for; below 0 = no such header."""
    retry_form: str = "ms"
    """How it asks: `seconds` (Retry-After: 1), `ms` (retry-after-ms: 50), `date` (Retry-After: Sat, ...)."""
    usage: bool = True
    """Whether replies say how many tokens were used (4 characters each)."""
    models: list[str] = dataclasses.field(default_factory=list)
    """The ids that it knows; [] = all. Others get a 404."""
    key: str = ""
    """The key that it wants; "" = any. Others get a 401."""
    flip: float = 0.0
    """Share of verdicts turned round: a judge that does not agree with itself when it is asked again."""
    reply: str = ""
    """The text of every sound reply, whatever was asked."""
    trickle: bool = False
    """Answer with a space every 20 ms, for ever."""
    page: bool = False
    """Answer with a web page, as what is no judge at all does."""


def content_words(text: str) -> set[str]:
    """Its distinct words of four letters or more, in lower case."""
    return set(re.findall(r"[^\W\d_]{4,}", text.lower()))


def share_of(criterion: str, answer: str) -> float:
    """The share of the criterion's words that occur in the answer; 1 for a criterion without words."""
    words = content_words(criterion)
    return len(words & content_words(answer)) / len(words) if words else 1.0


def parse_prompt(text: str) -> tuple[list[dict[str, Any]], str] | None:
    """(criteria, answer) of a grading prompt, or None. The mark of its first fence is the only one that counts."""
    first = re.search(r"<question-([0-9a-f]{16})>\n", text)
    if first is None:
        return None
    criteria, answer = _fenced(text, "criteria", first[1]), _fenced(text, "answer", first[1])
    return None if criteria is None or answer is None else (json.loads(criteria), answer)


def _fenced(text: str, name: str, mark: str) -> str | None:
    found = re.search(rf"<{name}-{mark}>\n(.*?)\n?</{name}-{mark}>", text, re.DOTALL)
    return found and found[1]


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
        self.times: deque[float] = deque(maxlen=KEPT)
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
            "times": list(self.times),  # monotonic seconds of arrival
        }

    def draw(self, *what: object) -> float:
        """A number in [0, 1) that depends on the seed and `what` alone."""
        digest = hashlib.sha256(repr((self.control.seed, *what)).encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56

    def fault_of(self, body: str, nth: int) -> str:
        if self.control.script:
            return self.control.script.pop(0)
        drawn = self.draw("fault", body, nth)
        for name in FAULTS:
            drawn -= self.control.faults.get(name, 0.0)
            if drawn < 0:
                return name
        return ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.requests += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        now = time.monotonic()
        self.early += now < self.closed_until
        try:
            body = json.loads(raw)
            self.bodies.append(body)
            self.keys.append(request.headers.get("Authorization", "").removeprefix("Bearer "))
            self.times.append(now)
            digest = hashlib.sha256(raw).hexdigest()
            nth = self.seen[digest]
            self.seen[digest] += 1
            fault = self.fault_of(digest, nth)
            if fault:
                self.fault_counts[fault] += 1
            return await self.answer(request, body, digest, nth, fault, now)
        finally:
            self.in_flight -= 1

    async def answer(
        self, request: web.Request, body: dict[str, Any], digest: str, nth: int, fault: str, arrived: float
    ) -> web.StreamResponse:
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "rate_limit":
            return self.rate_limited()
        if self.control.trickle:
            return await _trickle(request)
        response = self.respond(body, self.keys[-1], digest, nth, fault)
        due = arrived + self.control.latency + self.control.jitter * self.draw("jitter", digest, nth)
        await asyncio.sleep(due - time.monotonic())
        return response

    def respond(self, body: dict[str, Any], key: str, digest: str, nth: int, fault: str) -> web.Response:
        control = self.control
        if control.page:
            return web.Response(text="<html>Welcome!</html>", content_type="text/html")
        if control.status:
            return _error(control.status, f"forced to {control.status}", control.code)
        if control.key and key != control.key:
            return _error(401, f"Incorrect API key provided: {key}.", "invalid_api_key")
        if control.models and body["model"] not in control.models:
            return _error(404, f"The model `{body['model']}` does not exist", "model_not_found")
        if fault == "server_error":
            return _error(503, "overloaded", "")
        self.answered += 1
        return web.json_response(self.completion(body, digest, nth, fault))

    def rate_limited(self) -> web.Response:
        seconds, form = self.control.retry_after, self.control.retry_form
        response = _error(429, "slow down", "rate_limit_exceeded")
        if seconds >= 0:
            self.closed_until = max(self.closed_until, time.monotonic() + seconds)
            if form == "ms":
                response.headers["retry-after-ms"] = f"{1000 * seconds:.0f}"
            else:
                date = formatdate(math.ceil(time.time() + seconds), usegmt=True)
                response.headers["Retry-After"] = date if form == "date" else f"{seconds:g}"
        return response

    def completion(self, body: dict[str, Any], digest: str, nth: int, fault: str) -> dict[str, Any]:
        text = self.control.reply or self.reply(body, digest, nth, fault)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        reason = "stop"
        if fault == "truncated":
            message["content"], reason = text[: len(text) // 2], "length"
        elif fault == "malformed":
            message["content"] = "The answer is good on the whole {but this is no JSON"
        elif fault == "empty":
            message["content"] = ""
        elif fault == "refusal":
            message |= {"content": None, "refusal": "I cannot help with that."}
        used = {
            "prompt_tokens": sum(len(str(part.get("content"))) for part in body["messages"]) // 4,
            "completion_tokens": len(message["content"] or "") // 4,
        }
        usage = {**used, "total_tokens": sum(used.values())} if self.control.usage else None
        return {
            "id": f"judge-{self.requests}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": usage,
        }

    def reply(self, body: dict[str, Any], digest: str, nth: int, fault: str) -> str:
        last = str(body["messages"][-1].get("content") or "")
        prompt = parse_prompt(last)
        if prompt is None:
            return json.dumps({"text": last})
        criteria, answer = prompt
        verdicts = [self.verdict(criterion, answer, (digest, nth)) for criterion in criteria]
        if fault == "missing":
            del verdicts[len(verdicts) // 2 :]
        elif fault == "duplicate":
            verdicts.append(_opposite(verdicts[0]))
        elif fault == "unknown_id":
            verdicts[-1] = {**verdicts[-1], "id": "c999"}
        elif fault == "wrong_type":
            field = "pass" if "pass" in verdicts[0] else "score"
            verdicts[0] = {**verdicts[0], field: "yes" if field == "pass" else "high"}
        return json.dumps({"verdicts": verdicts}, ensure_ascii=False)

    def verdict(self, criterion: dict[str, Any], answer: str, call: tuple[str, int]) -> dict[str, Any]:
        share = share_of(criterion["criterion"], answer)
        reasoning = f"{share:.0%} of the criterion's words occur in the answer."
        verdict: dict[str, Any] = {"id": criterion["id"], "reasoning": reasoning}
        verdict |= {"score": round(share, 4)} if criterion.get("scale") == "score" else {"pass": share >= 1 / 3}
        return _opposite(verdict) if self.draw("flip", *call, criterion["id"]) < self.control.flip else verdict


def _opposite(verdict: dict[str, Any]) -> dict[str, Any]:
    return {**verdict, **({"pass": not verdict["pass"]} if "pass" in verdict else {"score": 1 - verdict["score"]})}


async def _trickle(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


def _error(status: int, message: str, code: str) -> web.Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response(
        {"error": {"message": message, "type": kind, "code": code or None, "param": None}}, status=status
    )


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


class JudgeServer:
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
def running_judge(port: int = 0, **control: Any) -> Iterator[JudgeServer]:
    """A server in a process of its own; `control` as in JudgeServer.control. Tests make one per module and reset it."""
    command = [sys.executable, str(Path(__file__)), "--port", str(port), "--control", json.dumps(control)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), f"the judge server did not start: {line!r}"
        yield JudgeServer(int(line))
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description="A judge on loopback that misbehaves on command.")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one; it is printed")
    parser.add_argument("--control", type=json.loads, default={}, help="JSON with the fields of Control")
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.port, arguments.control))


if __name__ == "__main__":
    main()
