"""The reward that verl calls: the task's own scorer, as notebook 2, local training and evaluation use it.

Owns the order that a reward process works by (`reward.json`), and what verl is told of a score. It is loaded by verl
in processes of verl's own (`reward.custom_reward_function.path=pkg://lib.verl.reward`), which have the workbench's
code, pydantic and PyYAML, and what the task needs. Must not know verl, models or how a task scores.

verl knows no answer without a reward. One that could not be judged, or that the task's own rule leaves out, gets the
score -0.0: a zero wherever verl computes with it, and its sign tells lib/verl/advantage.py, to which verl hands no
more than the rewards, to leave it out. No other answer's score is -0.0.

    python -c "from lib.verl.reward import compute_score; help(compute_score)"
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lib import WorkbenchError
from lib.patience import Patience
from lib.places import RUN
from lib.rollout import Scored, attempt, is_unscored, submit
from lib.task import Generate, Message, Row, Score, Task, Turn, load_task

ORDER = "reward.json"
"""The order's name in the folder of the parquet files."""

COUNTS = "unscored.jsonl"
"""The name, beside it, of what could not be judged: one line an answer."""

UNSCORED = -0.0
"""The score of what is left out; see above."""


class OrderError(WorkbenchError, ValueError):
    """The reward's order, or a row that is to be scored, is not as the export wrote it; the message says what to do."""


class Order(BaseModel, frozen=True, extra="forbid"):
    """What a reward process needs to rebuild task, judge, ledger and patience."""

    schema_version: int = 1
    run: str
    """The run folder: the ledger and the bill are there."""
    task: str
    params: dict[str, Any]
    """The task's fields as the config gives them, judge and ledger among them; never a key."""
    world_seconds: float
    score_seconds: float
    unscored_limit: float
    """rewards.max_unscored."""
    counts: str
    """The path of COUNTS."""


class Unscored(BaseModel, frozen=True, extra="forbid"):
    """One line of COUNTS."""

    time: float
    """Seconds since 1970."""
    split: str
    row: str
    reason: str


def read_order(path: str | Path) -> Order:
    """The order that an export wrote. Raises OrderError."""
    path, remedy = Path(path), "Export again: python -m lib.run export-verl CONFIG"
    try:
        return Order.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OrderError(f"the reward's order {path} cannot be read ({error.strerror}). {remedy}") from None
    except ValidationError as error:
        raise OrderError(f"{path} is no order for the reward ({error.error_count()} problems). {remedy}") from None


class Desk:
    """The task of an order, ready to score in this process."""

    def __init__(self, order: Order) -> None:
        os.environ[RUN] = order.run
        self.order = order
        self.patience = Patience(order.world_seconds, order.score_seconds)

    @cached_property
    def task(self) -> Task:
        """Raises TaskError."""
        return load_task(self.order.task, **self.order.params)

    async def attempt(self, row: Row, generate: Generate) -> Scored:
        """Play and score a row on the process's loop for tasks, whatever loop this is awaited on. Raises TaskError."""
        return await asyncio.wrap_future(submit(attempt(self.task, row, generate, patience=self.patience)))

    def told(self, score: Score, split: str, row: str) -> dict[str, Any]:
        """What verl is told of a score, the same keys for every answer; counts what could not be judged."""
        reason = _reason(score)
        if is_unscored(score):
            self._count(Unscored(time=time.time(), split=split, row=row, reason=reason))
        judged = score.reward is not None and not score.masked
        return {
            "score": UNSCORED if not judged or score.reward is None else score.reward + 0.0,  # -0.0 + 0.0 = 0.0
            "scored": float(judged),
            "masked": float(score.masked),
            "reason": reason,
            "parts": json.dumps(score.parts),  # their names differ from row to row, verl's keys may not
        }

    def _count(self, line: Unscored) -> None:
        """One write of one line, appended: several processes write to this file."""
        handle = os.open(self.order.counts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, f"{line.model_dump_json()}\n".encode())
        finally:
            os.close(handle)


@lru_cache(maxsize=8)
def open_desk(order: str) -> Desk:
    """The desk of this process for an order's path."""
    return Desk(read_order(order))


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    order: str,
    **_: Any,
) -> dict[str, Any]:
    """verl's custom reward function: the score of a row's one answer, with what else verl is to keep of it.

    `ground_truth` is the row as JSON, `order` the path of ORDER. Keys: `score` (the reward; UNSCORED where there is
    none), `scored` and `masked` (1.0 or 0.0), `reason` (why there is none; ""), `parts` (JSON by name). Whatever breaks
    on the way is unscored, never zero: a task that cannot be loaded here, a row that is none. Raises OrderError where
    there is no order.
    """
    desk, extra = open_desk(order), extra_info or {}
    try:
        score = (await desk.attempt(_row(ground_truth), _says(solution_str))).score
    except WorkbenchError as error:
        score = Score(reward=None, notes={"error": str(error)})
    return desk.told(score, str(extra.get("split", "")), str(extra.get("id", data_source)))


def _row(text: Any) -> Row:
    try:
        row = json.loads(text)
    except (TypeError, ValueError):
        row = None
    if not isinstance(row, dict) or not {"id", "prompt"} <= row.keys():
        raise OrderError(
            f"reward_model.ground_truth is no row as JSON ({str(text)[:80]!r}). Train on files that "
            f"`python -m lib.run export-verl CONFIG` wrote"
        )
    return row


def _says(text: str) -> Generate:
    """A policy that gives this answer, and no other."""
    answers = [text]

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        if not answers:
            raise OrderError(
                "the task's world answered, but this rollout has one turn only: play it through lib.verl.agent_loop"
            )
        return Turn(message={"role": "assistant", "content": answers.pop()})

    return generate


def _reason(score: Score) -> str:
    if score.masked:
        return "left out by the task's own rule"
    return "" if score.reward is not None else str(score.notes.get("error", "no reason given"))
