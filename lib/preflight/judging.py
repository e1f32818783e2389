"""What a judge will have to be asked in the training, and what that costs, from the base policy's answers.

Owns this estimate. Must not know prices: the ledger says what each verdict cost.

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/judged.yaml
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lib.config import Config
from lib.grading import JudgedTask
from lib.ledger import Verdict
from lib.preflight.answers import find_rows
from lib.rollout import finish
from lib.task import Rollout, Row, Task


class JudgeBill(NamedTuple):
    """What judging the training's answers takes, from what judging the base policy's took."""

    calls: float
    """HTTP requests, retries and repairs included."""
    usd: float | None
    """None: the price file has no price for the judge."""
    completions: int
    """Answers that the training samples."""


def judge_bill(
    config: Config, task: Task, rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]
) -> JudgeBill | None:
    """None where there is no judge, or nothing was judged. What it cost is read from the verdicts in the ledger.

    Equal answers to one prompt are judged once: as many of the training's are taken to be equal as here.
    """
    scored = [(str(a["row"]), a["answer"]) for a in answers if a["reward"] is not None]
    if not isinstance(task, JudgedTask) or not scored:
        return None
    different = list(dict.fromkeys(scored))
    by_id = {str(row["id"]): row for row in find_rows(rows, [row for row, _ in different])}
    rollouts = [Rollout.of(by_id[row], answer) for row, answer in different]
    judged = finish(_verdicts(task, rollouts))
    completions = completions_of(config, len(rows))
    scale = completions / len(scored)
    calls = sum(max((one.attempts for one in verdicts.values()), default=0) for verdicts in judged)
    prices = [one.usd for verdicts in judged for one in verdicts.values() if one.attempts]
    known = [usd for usd in prices if usd is not None]
    usd = math.fsum(known) * scale if len(known) == len(prices) else None
    return JudgeBill(calls * scale, usd, completions)


async def _verdicts(task: JudgedTask, rollouts: Sequence[Rollout]) -> list[dict[str, Verdict]]:
    return list(await asyncio.gather(*(task.verdicts(rollout) for rollout in rollouts)))


def completions_of(config: Config, rows: int) -> int:
    """Answers that the whole training samples: new ones for every sampling, which feeds `iterations` passes."""
    training = config.training
    a_step = training.batch * training.accumulation
    steps = training.steps
    if steps < 0:
        steps = math.ceil(rows * training.group_size * training.epochs * training.iterations / a_step)
    return math.ceil(steps * a_step / training.iterations)
