"""One rollout that an environment plays by itself, and the endpoint where it asks for the policy's turns.

The environment drives: its own loop, turn limits, tools and stop conditions run as they always do, against an
OpenAI-compatible server on loopback. A request that it makes is where a turn of the policy belongs; there the rollout
waits. Part of the child process of the task `verifiers`: standard library only. Must not know transcripts or rows.

    python -c "from lib.tasks._verifiers_live import plain; print(plain({'role': 'user', 'content': None}))"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self

TOO_LONG = "This model's maximum context length is reached: context length exceeded, the rollout ends here."
"""How the endpoint says that there are no more turns: every version ends a rollout on this, and scores it."""
REFUSALS = 8
"""Times that an environment may ask on after that."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""

Message = dict[str, Any]


class RefusedError(Exception):
    """The environment cannot be used as it is; the text says why, and is shown without this class's name."""


class Live:
    """A rollout in play. `known` = the conversation so far, `fresh` = the world's messages since the last turn."""

    def __init__(self, name: str, play: Coroutine[Any, Any, Any]) -> None:
        self.name = name
        self.known: list[Message] = []
        self.fresh: list[Message] = []
        self.tools: list[Any] | None = None
        self.ended = False
        self.used = time.monotonic()
        self._asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answers: asyncio.Queue[tuple[int, dict[str, Any]]] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(_contained(play))

    async def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The endpoint's side: ask for a turn, and wait for it."""
        await self._asked.put(body)
        return await self._answers.get()

    async def advance(self) -> None:
        """Go on until the policy is asked or the rollout ends. Raises what the environment raised."""
        asking = asyncio.ensure_future(self._asked.get())
        try:
            await asyncio.wait({asking, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
        if asking.done() and not asking.cancelled():
            self._hear(asking.result())
            return
        self.ended, self.fresh = True, []
        self.result()

    def result(self) -> Any:
        """What the play of a rollout that has ended returned, or raised."""
        if self._task.cancelled():
            raise RefusedError("the environment cancelled its own rollout")
        return self._task.result()

    def _hear(self, body: dict[str, Any]) -> None:
        messages = [plain(message) for message in body["messages"]]
        if not same(messages[: len(self.known)], self.known):
            raise RefusedError(
                "the environment rewrites earlier messages (it shows the policy another conversation than the one that "
                "was sampled): such rollouts cannot be trained on with their tokens preserved"
            )
        self.fresh, self.known = messages[len(self.known) :], messages
        self.tools = body.get("tools") or None

    async def deliver(self, message: Message, cut: bool) -> None:
        """Give the policy's turn, and go on."""
        said = plain(message)
        self.known = [*self.known, said]
        await self._answers.put((200, completion(self.name, said, cut)))
        await self.advance()

    async def leave_off(self) -> None:
        """Say that there are no more turns, until the rollout ends. Raises what the environment raises."""
        for _ in range(REFUSALS):
            if self.ended:
                return
            await self._answers.put((400, {"error": {"message": TOO_LONG, "code": "context_length_exceeded"}}))
            with contextlib.suppress(RefusedError):  # whatever it shows the policy now, nobody sees it
                await self.advance()
        if not self.ended:
            raise RefusedError("the environment goes on asking after the end of the context")

    async def give_up(self) -> None:
        """End it without a result; what the environment raises on the way concerns nobody any more."""
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=10)
        if self._task.done() and not self._task.cancelled():
            self._task.exception()
        self._answers.put_nowait((410, {"error": {"message": "given up"}}))  # whoever still waits in `complete`


async def _contained(play: Coroutine[Any, Any, Any]) -> Any:
    """In a task of its own an exit() would end the whole process."""
    try:
        return await play
    except (SystemExit, KeyboardInterrupt) as error:
        raise RefusedError(f"the environment raised {type(error).__name__}: {error}") from None


class Endpoint:
    """The OpenAI-compatible server; the model's name says which rollout asks."""

    def __init__(self) -> None:
        self._lives: dict[str, Live] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=BACKLOG)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def expect(self, live: Live) -> None:
        """Route the requests of a rollout to it."""
        self._lives[live.name] = live

    def forget(self, live: Live) -> None:
        """The rollout asks no more."""
        self._lives.pop(live.name, None)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """HTTP/1.1 as the clients of verifiers speak it: one request after the other, bodies with their length."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                method, path = head[0].split(" ")[:2]
                status, reply = await self.answer(method, path, body)
                data = json.dumps(reply).encode()
                lines = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
                writer.write(lines.encode() + data)
                await writer.drain()
        writer.close()

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """(status, JSON) of a request, over a connection or not."""
        if method != "POST" or not path.endswith("/chat/completions"):
            return 404, {"error": {"message": f"only chat completions are served here, not {method} {path}"}}
        asked = json.loads(body)
        live = self._lives.get(str(asked.get("model")))
        if live is None:
            return 404, {"error": {"message": f"no rollout {asked.get('model')!r} is in play"}}
        if asked.get("stream") or (asked.get("n") or 1) > 1:
            return 422, {"error": {"message": "the workbench gives one whole turn: no stream, and n = 1"}}
        return await live.complete(asked)


def plain(message: Mapping[str, Any]) -> Message:
    """A message with what counts only: role, text, tool calls with ids and their arguments as text, tool_call_id.

    Raises RefusedError where it holds something else than text.
    """
    one: Message = {"role": message["role"], "content": _text(message.get("content"))}
    if message.get("tool_calls"):
        one["tool_calls"] = [_call(call, number) for number, call in enumerate(message["tool_calls"])]
    if message.get("tool_call_id"):
        one["tool_call_id"] = message["tool_call_id"]
    return one


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    identity = call.get("id") or f"call_{number}"
    return {"id": identity, "type": "function", "function": {"name": str(function.get("name")), "arguments": written}}


def _text(content: Any) -> str:
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if None in texts:
            raise RefusedError("a message holds something else than text (an image, a sound): that is not supported")
        return "".join(map(str, texts))
    return "" if content is None else str(content)


def same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two conversations are the same but for ids and outer blanks."""
    return len(one) == len(other) and all(_bare(a) == _bare(b) for a, b in zip(one, other, strict=True))


def _bare(message: Message) -> tuple[Any, ...]:
    message = plain(message)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["role"], message["content"].strip(), calls


def completion(model: str, message: Message, cut: bool) -> dict[str, Any]:
    """The policy's turn as an OpenAI chat completion; `cut` = it was cut off."""
    # Some versions take an empty answer for a failure of the server; a blank one is the policy's own.
    said = message if message["content"] or message.get("tool_calls") else {**message, "content": " "}
    reason = "length" if cut else "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": f"chatcmpl-{model}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": said, "finish_reason": reason, "logprobs": None}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
