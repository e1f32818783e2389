"""The contract: rows, turns, rollouts, scores, and the Task that ties them together.

Owns the words that every notebook, backend and task speaks. Must not know models, backends or the network.

    python -c "from lib.task import load_task; print(load_task('decisions').rows('eval')[0])"
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib import PROJECT_ROOT, WorkbenchError
from lib.places import locate

Message = dict[str, Any]
"""An OpenAI chat message; `tool_calls` included."""

Row = dict[str, Any]
"""JSON only. Required: id, prompt (list[Message]). Optional: tools, gold, category, and anything the scorer reads."""

ROW_PART = "criterion/"
"""How the names of parts begin that mean something for their own row only."""

Split = Literal["train", "eval"]


class TaskError(WorkbenchError, ValueError):
    """The task or its data cannot be used as given; the message says what to change."""


class Turn(BaseModel, frozen=True, extra="forbid"):
    """One reply of the policy, with the tokens exactly as sampled (never re-encoded from text)."""

    message: Message
    prompt_ids: tuple[int, ...] | None = None
    output_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each output token under the policy that sampled it (nats)."""
    stop: Literal["stop", "length"] = "stop"
    policy: int | None = None
    """The weight version that sampled this turn."""


Generate = Callable[[Sequence[Message], Sequence[dict[str, Any]] | None], Awaitable[Turn]]
"""What a model supplies: (messages, tools) -> Turn."""


class Rollout(BaseModel, frozen=True, extra="forbid"):
    """A finished conversation between the policy and the task's world."""

    row: Row
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    stop: Literal["done", "length", "max_turns"] = "done"

    @property
    def text(self) -> str:
        """The last answer ("" when it has no text)."""
        return str(self.turns[-1].message.get("content") or "") if self.turns else ""

    @classmethod
    def of(cls, row: Row, *replies: str | Message) -> Rollout:
        """A finished rollout from texts or messages: for tests, notebooks and checks by hand.

        Replies that are texts or assistant messages become turns; other messages are the world's.
        """
        messages = [{"role": "assistant", "content": reply} if isinstance(reply, str) else reply for reply in replies]
        turns = tuple(Turn(message=message) for message in messages if message["role"] == "assistant")
        return cls(row=row, messages=(*row["prompt"], *messages), turns=turns)


class Score(BaseModel, frozen=True, extra="forbid"):
    """What a rollout earned. `reward` None = could not be judged; `masked` = the task's own rule leaves it out."""

    reward: float | None
    parts: dict[str, float | None] = {}
    """Named numbers. Those that begin with ROW_PART belong to one row: kept with it, not averaged over a step."""
    notes: dict[str, Any] = {}
    masked: bool = False


class Task(BaseModel, frozen=True, extra="forbid"):
    """Data, prompt, world and reward of one problem. Fields are its parameters: plain values only."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_turns: int = Field(1, ge=1)
    reward_range: tuple[float, float] = (0.0, 1.0)

    @field_validator("reward_range")
    @classmethod
    def _ordered(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if limits[0] >= limits[1]:
            raise ValueError("the lowest reward must be below the highest")
        return limits

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split, in the same order every time; may read lazily."""
        raise NotImplementedError(f"{type(self).__name__}.rows is missing")

    def input_files(self) -> list[Path]:
        """The files that the rows are read from: their hashes decide whether prepared rows are still right."""
        return []

    def write_tables(
        self, folder: Path, render: Callable[[Sequence[Message]], str], write_back: bool = False
    ) -> list[Path]:
        """Write the task's own converted tables for people and other tools, if it has any; returns the paths."""
        return []

    def env_keys(self) -> list[str]:
        """Environment variables that scoring needs (a judge's key, say): they become secrets in a container."""
        return []

    def check(self) -> list[str]:
        """Warnings before anything starts; raises where scoring can never work as configured. Looks at no network."""
        return []

    def cheats(self, row: Row) -> dict[str, str]:
        """Answers to a row that try to fool this task's own scorer, by name; notebook 2 tries them with its own."""
        return {}

    async def reply(self, rollout: Rollout) -> list[Message]:
        """What the world answers (a tool result, game feedback); [] ends the rollout."""
        return []

    async def score(self, rollout: Rollout) -> Score:
        """The one scorer: used by inspection, training and evaluation."""
        raise NotImplementedError(f"{type(self).__name__}.score is missing")


def load_task(name: str, **params: Any) -> Task:
    """The task class in lib/tasks/<name>.py, or the one in a user's own file, with its fields set.

    A user's file may hold a Task subclass, or only `score(text, row) -> float | None | Score` beside data named by
    the fields of lib.data.RowsTask (`path: data.jsonl`, ...). Raises TaskError with the nearest known name.
    """
    module = _import_task_module(name)
    task_class = _task_class(module)
    try:
        if task_class is not None:
            return task_class(**params)
        scorer = getattr(module, "score", None)
        if scorer is None:
            raise TaskError(f"{name} holds neither a Task subclass nor a function score(text, row): add one of them.")
        from lib.data import ScoreFunctionTask

        task_class = ScoreFunctionTask
        return ScoreFunctionTask(**params).bind(scorer)
    except ValidationError as error:
        assert task_class is not None
        raise TaskError(describe_invalid(error, task_class, prefix="task.")) from None


def describe_invalid(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """A pydantic error as lines a person can act on: where, what was given, what is allowed, the nearest name."""
    lines = []
    for problem in error.errors():
        where = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown key.{nearest(str(problem['loc'][-1]), _fields_at(model, problem['loc'][:-1]))}"
            )
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], (dict, BaseModel)) else f" (given: {problem['input']!r})"
            lines.append(f"{where}: {message}{given}" if problem["loc"] else message)
    return "\n".join(lines)


def nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean X? Known: ...' for an unknown name; the text is meant to follow a full stop."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(sorted(known))}."


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (inspect.isclass(inner) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _import_task_module(name: str) -> ModuleType:
    path = locate(name)
    if name.endswith(".py"):
        if not path.is_file():
            raise TaskError(
                f"task file not found: {path}. Give a path relative to the project root, or an absolute one."
            )
        module_name = f"user_task_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (SyntaxError, ImportError) as error:
            raise TaskError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
        return module
    known = task_names()
    if name not in known:
        raise TaskError(f"unknown task {name!r}.{nearest(name, known)} Or give the path of a .py file of your own.")
    return importlib.import_module(f"lib.tasks.{name}")


def task_names() -> list[str]:
    """The names of the tasks that ship with the workbench: the modules in lib/tasks that define a Task."""
    folder = PROJECT_ROOT / "lib" / "tasks"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def _task_class(module: ModuleType) -> type[Task] | None:
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    leaves = [cls for cls in own if not any(other is not cls and issubclass(other, cls) for other in own)]
    if len(leaves) > 1:
        names = ", ".join(cls.__name__ for cls in leaves)
        raise TaskError(f"{module.__name__} defines several tasks ({names}): keep one per file.")
    return leaves[0] if leaves else None
