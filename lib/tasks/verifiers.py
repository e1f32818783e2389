"""Task `verifiers`: any environment of the `verifiers` package, classic or v1, as a task of this workbench.

Owns the mapping: rows, turns, tool calls and scores. The environment runs in a child process of its own interpreter
(_verifiers_process.py), because its pins clash with ours; the child plays its rollouts and is asked for each answer and
score (_verifiers_child.py and the files it names). Must not know models or trainers.

    python -c "from lib.task import load_task; \
               print(load_task('verifiers', environment='configs/examples/gsm8k/vf_gsm8k').rows('eval')[0])"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lib.places import locate
from lib.task import Message, Rollout, Row, Score, Split, Task, TaskError
from lib.tasks._functions_parse import parse, without_thinking
from lib.tasks._verifiers_process import EnvironmentFailedError, Source, default_interpreter
from lib.tasks._verifiers_server import Server, server

PAGE = 500
"""Rows that are fetched at once."""
MARKS = ("<tool_call>", "<|python_tag|>", "<|channel|>")
"""What a model writes before calls in its text; other text is a call only if it names a known tool."""


class VerifiersTask(Task, frozen=True):
    """Rows, turns, tools and rewards of one environment, as the environment itself gives them.

    A rollout's parts are its reward functions and metrics by name; the reward is their weighted sum. What cannot be
    judged (a reward function that raises, a judge that does not answer, a child that dies, a limit of time) is unscored
    with its cause.
    """

    environment: str = ""
    """The id of an environment that is installed in its interpreter (vf-gsm8k), or a .py file, or a folder."""
    args: dict[str, Any] = Field(default={})
    """Arguments of its load_environment; for v1 the fields of its taskset's config."""
    python: str = ""
    """The interpreter with verifiers and the environment in it; "" = this one if verifiers is installed here, else
    build/verifiers/bin/python."""
    keys: tuple[str, ...] = ()
    """NAMES of environment variables that look like secrets and that the environment is to see (a judge's key, say)."""
    max_turns: int = Field(default=32, ge=1)
    """Turns at most; the environment's own limit may end a rollout before."""
    max_rows: int = Field(default=0, ge=0)
    """Rows of a split to use at most; 0 = all. A v1 taskset without an end needs it."""
    eval_share: float = Field(default=0.1, gt=0, lt=1)
    """The share of the rows that is held out where the environment has no held-out data of its own."""
    gold: str = ""
    """How a right answer is written, with {answer} where the row's answer goes; "" = rows have no gold answer."""
    reward_errors: Literal["unscored", "zero"] = "unscored"
    """zero = a reward function that raises is 0, as verifiers itself has it."""
    seconds: float = Field(default=120.0, gt=0)
    """What one answer or one score of the environment may take."""
    load_seconds: float = Field(default=900.0, gt=0)
    """What loading it may take, its data sets included."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.gold and "{answer}" not in self.gold:
            raise ValueError("gold must say where the answer goes: write {answer} into it.")
        try:
            json.dumps(self.args, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("args must be plain values: they travel as JSON.") from None
        return self

    # -- the environment ----------------------------------------------------------------------------------------------

    @cached_property
    def _server(self) -> Server:
        if not self.environment:
            raise TaskError(
                "task.environment is not set: name an environment of verifiers that is installed (vf-gsm8k), or the "
                "path of a .py file or folder with load_environment in it."
            )
        place = self._place
        try:
            interpreter = self._interpreter or default_interpreter()
        except EnvironmentFailedError as error:
            raise TaskError(str(error)) from None
        return server(
            Source(
                interpreter=interpreter,
                environment=str(place or self.environment),
                args=json.dumps(self.args, sort_keys=True),
                rows=self.max_rows,
                keys=self.keys,
                load_seconds=self.load_seconds,
            )
        )

    @property
    def _interpreter(self) -> str:
        """A path from the project root, or a command of the PATH."""
        return str(locate(self.python)) if "/" in self.python else self.python

    @property
    def _place(self) -> Path | None:
        """The file or folder of an environment that is not installed."""
        path = locate(self.environment)
        return path if self.environment.endswith(".py") or path.is_dir() else None

    @property
    def _facts(self) -> dict[str, Any]:
        try:
            return self._server.facts or self._server.load()
        except EnvironmentFailedError as error:
            raise TaskError(str(error)) from None

    def input_files(self) -> list[Path]:
        """The environment's own files where it is given by path; those of an installed one are not followed."""
        place = self._place
        if place is None or not place.is_dir():
            return [place] if place else []
        found = (path for path in place.rglob("*") if path.is_file())
        return sorted(path for path in found if not _left_behind(path.relative_to(place)))

    def env_keys(self) -> list[str]:
        return list(self.keys)

    def check(self) -> list[str]:
        """Loads the environment. Warns where its weights do not fit reward_range, or nothing is held out by itself."""
        facts, found = self._facts, []
        highest = sum(weight for weight in facts["weights"].values() if weight > 0)
        lowest = sum(weight for weight in facts["weights"].values() if weight < 0)
        if facts["weights"] and (highest > self.reward_range[1] or lowest < self.reward_range[0]):
            found.append(
                f"the weights of {self.environment} add up to {highest:g}, and a reward outside task.reward_range "
                f"{list(self.reward_range)} is unscored: set reward_range: [{lowest:g}, {highest:g}]"
            )
        if not facts["held_out"]:
            found.append(
                f"{self.environment} has no held-out data of its own: {self.eval_share:.0%} of its rows are held out "
                f"(task.eval_share)"
            )
        return found

    # -- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, split: Split) -> Sequence[Row]:
        """The environment's rows: `prompt`, `tools`, `example` (what it needs to play the row), `category`, `gold`."""
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[Split, list[Row]]:
        facts = self._facts
        if facts["held_out"]:
            return {split: self._fetched(split) for split in ("train", "eval")}
        rows = self._fetched("train")
        if len(rows) < 2:
            raise TaskError(f"{self.environment} has {len(rows)} rows: too few to hold one out.")
        ranked = sorted(range(len(rows)), key=lambda number: _rank(rows[number]["id"]))
        held = set(ranked[: max(1, min(round(self.eval_share * len(rows)), len(rows) - 1))])
        return {
            "train": [row for number, row in enumerate(rows) if number not in held],
            "eval": [row for number, row in enumerate(rows) if number in held],
        }

    def _fetched(self, split: Split) -> list[Row]:
        size = self._facts["sizes"][split]
        size = min(size, self.max_rows) if self.max_rows else size
        rows: list[Row] = []
        for start in range(0, size, PAGE):
            try:
                page = self._server.ask(
                    "rows", self.load_seconds, split=split, start=start, stop=min(start + PAGE, size)
                )
            except (EnvironmentFailedError, TimeoutError) as error:
                raise TaskError(f"the rows of {self.environment} cannot be read: {error}") from None
            rows += [self._row(one, f"{split}-{start + number}") for number, one in enumerate(page)]
        return rows

    def _row(self, one: Mapping[str, Any], identity: str) -> Row:
        row: Row = {"id": identity, "prompt": one["prompt"], "example": one["example"]}
        if one["tools"]:
            row["tools"] = one["tools"]
        if one["category"]:
            row["category"] = one["category"]
        if self.gold and one["answer"] not in (None, ""):
            row["gold"] = [{"role": "assistant", "content": self.gold.replace("{answer}", str(one["answer"]))}]
        return row

    # -- turns and rewards --------------------------------------------------------------------------------------------

    async def reply(self, rollout: Rollout) -> list[Message]:
        """What the environment says to the last turn; [] where it ends the rollout."""
        if self._server.facts.get("single"):
            return []
        messages: list[Message] = await self._asked("reply", rollout)
        return messages

    async def score(self, rollout: Rollout) -> Score:
        """The environment's own verdict on the transcript. A rollout that was cut off is judged as far as it got."""
        cut = rollout.stop == "length" or bool(rollout.turns and rollout.turns[-1].stop == "length")
        found = await self._asked("score", rollout, cut=cut)
        return self._scored(found, found.pop("raised", {}))

    def _scored(self, found: dict[str, Any], raised: Mapping[str, str]) -> Score:
        """verifiers counts a reward function that raises as 0; here it is an answer that could not be judged."""
        parts, notes = dict(found.get("parts", {})), dict(found["notes"])
        if not raised or self.reward_errors == "zero":
            return Score(reward=found["reward"], parts=parts, notes=notes | ({"raised": raised} if raised else {}))
        weights = self._server.facts["weights"]
        heavy = [f"reward function {name} raised {why}" for name, why in raised.items() if weights.get(name, 1.0)]
        if heavy:
            return Score(reward=None, notes=notes | {"error": "; ".join(heavy)})
        return Score(reward=found["reward"], parts=parts | dict.fromkeys(raised), notes=notes | {"raised": raised})

    async def _asked(self, op: str, rollout: Rollout, **fields: Any) -> Any:
        row = {"prompt": rollout.row["prompt"], "example": rollout.row["example"]}
        messages = with_calls(rollout.messages, rollout.row.get("tools") or ())
        return await self._server.ask_soon(op, self.seconds, row=row, messages=messages, **fields)

    def cheats(self, row: Row) -> dict[str, str]:
        """The right form without an answer, and the right answer where it does not count."""
        if not row.get("gold"):
            return {}
        gold = str(row["gold"][-1]["content"])
        return {
            "the form without an answer": self.gold.replace("{answer}", ""),
            "the right answer thought, not given": f"<think>{gold}</think>",
            "the right answer, never finished": f"<think>{gold}",
        }


def _left_behind(path: Path) -> bool:
    """Hidden, or what Python and installers leave."""
    return any(part.startswith(".") or part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)


def with_calls(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as a server with a tool parser would have answered: calls that stand in the text become `tool_calls`."""
    if not tools:
        return list(messages)
    return [_called(message, number, tools) for number, message in enumerate(messages)]


def _called(message: Message, number: int, tools: Sequence[Mapping[str, Any]]) -> Message:
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(message.get("content"), str):
        return message
    visible = without_thinking(message["content"])
    marks = [visible.find(mark) for mark in MARKS if mark in visible]
    calls = parse(message, tools).calls
    known = {tool["function"]["name"] for tool in tools}
    if not calls or not (marks or all(call.name in known for call in calls)):
        return message
    thoughts = message["content"].removesuffix(visible)
    written = [
        {
            "id": f"call_{number}_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for place, call in enumerate(calls)
    ]
    before = thoughts + (visible[: min(marks)] if marks else "")
    return {"role": "assistant", "content": before.strip(), "tool_calls": written}


def _rank(identity: str) -> bytes:
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()
