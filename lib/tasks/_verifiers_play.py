"""What is asked about rows and transcripts, answered by rollouts that the environment plays.

Owns the rule that a transcript alone decides: a rollout that still waits at its end is gone on with, any other is
played again from the first turn, and refused where the world then says something else. Part of the child process of
the task `verifiers`: standard library only. Must not know which API an environment has.

    python -c "from lib.tasks._verifiers_play import turns; print(turns([{'role': 'user'}, {'role': 'assistant'}], 1))"
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lib.tasks._verifiers_live import Endpoint, Live, Message, RefusedError, plain, same

KEPT = 900
"""Rollouts that may wait for a turn or for their score, each with a connection (clients allow 1,000); the oldest are
given up, and played again if asked for."""
IDLE = 1800.0
"""Seconds after which a waiting rollout is given up."""
OPENED = 32
"""Rollouts opened side by side where prompts are known only from there."""


class DivergedError(RefusedError):
    """Played again, a rollout did not give the transcript."""


class Example(NamedTuple):
    """One row of the environment's data."""

    prompt: list[Message] | None
    """None = known only when the rollout opens."""
    data: dict[str, Any]
    """What `play` needs beside the prompt; JSON."""
    answer: Any = None
    category: str = ""


class Adapter(Protocol):
    """One API of verifiers."""

    facts: dict[str, Any]
    """version, api, single (one turn), weights, held_out (it has held-out data of its own), sizes of the splits."""

    def examples(self, split: str, start: int, stop: int) -> list[Example]:
        """Some rows of the data of a split."""

    def play(self, row: Mapping[str, Any], model: str) -> Coroutine[Any, Any, Any]:
        """Play a rollout to its end; the endpoint knows it by `model`."""

    async def judge(self, played: Any) -> dict[str, Any]:
        """{reward, parts, notes} of what `play` returned; reward None and notes.error = could not be judged.

        `raised` = what reward functions raised that are counted as 0 in the reward.
        """

    async def close(self) -> None:
        """Tear down."""


class Rollouts:
    """The requests about rows and transcripts."""

    def __init__(self, adapter: Adapter, endpoint: Endpoint) -> None:
        self._adapter, self._endpoint = adapter, endpoint
        self._waiting: OrderedDict[Live, str] = OrderedDict()
        self._transcripts: dict[str, list[Live]] = {}
        self._numbers = itertools.count()
        self._opens = False
        self._tools: list[Any] | None = None

    async def describe(self) -> dict[str, Any]:
        """The adapter's facts, and from the first row opened: the tools, and whether prompts are those of the data."""
        first = [*self._adapter.examples("train", 0, 1), *self._adapter.examples("eval", 0, 1)][:1]
        if not first:
            raise RefusedError("the environment has no rows")
        prompt, self._tools = await self._opened(first[0])
        self._opens = first[0].prompt is None or not same(prompt, first[0].prompt)
        return {**self._adapter.facts, "tools": self._tools, "prompts": "opened" if self._opens else "data"}

    async def rows(self, split: str, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows: {prompt, tools, example, answer, category}."""
        gate = asyncio.Semaphore(OPENED)
        examples = self._adapter.examples(split, start, stop)
        return list(await asyncio.gather(*(self._row(example, gate) for example in examples)))

    async def _row(self, example: Example, gate: asyncio.Semaphore) -> dict[str, Any]:
        prompt, tools, data = example.prompt, self._tools, example.data
        info = example.data.get("info")
        own_tools = isinstance(info, Mapping) and bool({"tools", "oai_tools", "tool_defs"} & info.keys())
        if self._opens or own_tools:
            async with gate:
                prompt, tools = await self._opened(example)
            if example.prompt is not None and not same(prompt, example.prompt):
                data = {"prompt": example.prompt, **data}  # what the environment begins with, not what it makes of it
        rest = {"example": data, "answer": example.answer, "category": example.category}
        return {"prompt": prompt, "tools": tools, **rest}

    async def _opened(self, example: Example) -> tuple[list[Message], list[Any] | None]:
        """The messages and tools that the policy sees first."""
        live = await self._open({"prompt": example.prompt or [], "example": example.data}, check=False)
        await self._drop(live)
        return live.fresh, live.tools

    async def reply(self, row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
        """What the world says to the last turn; [] where it ends the rollout."""
        live = await self._at_end(row, messages, turns(messages, len(row["prompt"])), cut=False)
        self._keep(_key(row, messages), live)
        return [] if live.ended else live.fresh

    async def score(self, row: Mapping[str, Any], messages: Sequence[Message], cut: bool) -> dict[str, Any]:
        """The environment's verdict; a rollout that it would go on with ends as at the end of the context.

        `cut` = the last turn was cut off.
        """
        said = turns(messages, len(row["prompt"]))
        live = self._take(_key(row, messages[: len(messages) - len(said[-1].after)]), None) if said else None
        live = live or await self._at_end(row, messages, said, cut)
        try:
            await live.leave_off()
            return await self._adapter.judge(live.result())
        finally:
            await self._drop(live)

    async def _at_end(self, row: Mapping[str, Any], messages: Sequence[Message], said: list[Said], cut: bool) -> Live:
        """A rollout with every turn of the transcript delivered: one that waited a turn behind, or played again."""
        if not said:
            raise RefusedError("a rollout without a turn of the policy cannot be judged")
        last = said[-1]
        behind = len(messages) - len(last.after) - 1 - len(last.before)
        live, todo = self._take(_key(row, messages[:behind]), last.before), [last]
        if live is None:
            live, todo = await self._open(row, check=True), said
        try:
            for number, turn in enumerate(todo):
                if number:
                    _expect(live, turn.before)
                await live.deliver(turn.message, cut and turn is last)
            return live
        except BaseException:
            await self._drop(live)
            raise

    async def _open(self, row: Mapping[str, Any], check: bool) -> Live:
        name = f"rollout-{next(self._numbers)}"
        live = Live(name, self._adapter.play(row, name))
        self._endpoint.expect(live)
        try:
            await live.advance()
            if live.ended:
                verdict = await self._adapter.judge(live.result())
                why = verdict["notes"].get("error", "no reason given")
                raise RefusedError(f"the environment ended the rollout before the policy's first turn: {why}")
            if check:
                _expect(live, row["prompt"])
            return live
        except BaseException:
            await self._drop(live)
            raise

    def _take(self, key: str, before: Sequence[Message] | None) -> Live | None:
        """A waiting rollout of this transcript, where given one to which the world has said this."""
        for live in self._transcripts.get(key, ()):
            if before is None or (not live.ended and same(live.fresh, before)):
                self._remove(live)
                return live
        return None

    def _keep(self, key: str, live: Live) -> None:
        live.used = time.monotonic()
        self._waiting[live] = key
        self._transcripts.setdefault(key, []).append(live)
        while len(self._waiting) > KEPT or live.used - next(iter(self._waiting)).used > IDLE:
            oldest = next(iter(self._waiting))
            self._remove(oldest)
            asyncio.get_running_loop().create_task(self._drop(oldest))

    def _remove(self, live: Live) -> None:
        key = self._waiting.pop(live)
        self._transcripts[key].remove(live)
        if not self._transcripts[key]:
            del self._transcripts[key]

    async def _drop(self, live: Live) -> None:
        self._endpoint.forget(live)
        await live.give_up()

    async def close(self) -> None:
        """Give up all that wait."""
        waiting, self._waiting, self._transcripts = list(self._waiting), OrderedDict(), {}
        await asyncio.gather(*map(self._drop, waiting))


class Said(NamedTuple):
    """One turn of the policy in a transcript."""

    before: list[Message]
    """The world's messages between the turn before and this one."""
    message: Message
    after: list[Message]
    """The world's messages that follow; of the last turn only."""


def turns(messages: Sequence[Message], prompt: int) -> list[Said]:
    """The policy's turns after the messages of the prompt."""
    found: list[Said] = []
    world: list[Message] = []
    for message in messages[prompt:]:
        if message["role"] == "assistant":
            found.append(Said(world, message, []))
            world = []
        else:
            world = [*world, message]
    return [*found[:-1], found[-1]._replace(after=world)] if found else []


def _expect(live: Live, before: Sequence[Message]) -> None:
    if live.ended:
        raise DivergedError("played again, the environment ends this rollout earlier than in the transcript")
    if not same(live.fresh, before):
        raise DivergedError(
            f"played again, the environment says something else than in the transcript: {_short(live.fresh)} instead "
            f"of {_short(before)}. Its state does not follow from the conversation alone"
        )


def _short(messages: Sequence[Message]) -> str:
    return json.dumps(list(messages))[:300]


def _key(row: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """One text for a transcript: of equal ones any waiting rollout is as good as another."""
    told = json.dumps([row["example"], [plain(message) for message in messages]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
