"""What known answers earn, and what the base policy answers before anything is trained.

Owns sampling for the inspection. Must not know training, or what is good enough (gate.py).

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib import models
from lib.answering import answer_rows
from lib.attacks import gold_text, other_golds
from lib.config import Config
from lib.generate import batched, chat_of, local_sample, within_limit
from lib.patience import Patience
from lib.rollout import finish
from lib.runfolder import Run
from lib.task import ROW_PART, Rollout, Row, Score, Task, TaskError
from lib.tools import check_tools

logger = logging.getLogger(__name__)


def score_answers(task: Task, row: Row, answers: dict[str, str]) -> list[dict[str, Any]]:
    """What named answers to one row earn, as table records."""
    scores = {name: score_one(task, Rollout.of(row, answer)) for name, answer in answers.items()}
    return [
        {
            "answer to": row["id"],
            "kind": name,
            "text": answers[name],
            "reward": "masked" if score.masked else "unscored" if score.reward is None else round(score.reward, 4),
            **{part: v for part, v in score.parts.items() if v is not None and not part.startswith(ROW_PART)},
            **({"why": score.notes["error"]} if score.reward is None and "error" in score.notes else {}),
        }
        for name, score in scores.items()
    ]


def known_answers(task: Task, rows: Sequence[Row], count: int = 3) -> list[dict[str, Any]]:
    """Gold, wrong, empty and cheating answers to a few rows, with what they earn."""
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return [
        record for index in chosen for record in score_answers(task, rows[index], _answers(task, rows[index], rows))
    ]


def score_one(task: Task, rollout: Rollout) -> Score:
    """One rollout's score, from notebook or test code that runs no event loop of its own."""
    return finish(task.score(rollout))


def sample_base(config: Config, task: Task, run: Run, prompts: int = 32) -> list[dict[str, Any]]:
    """Groups of answers of the base policy to training prompts, as evaluation records; group after group."""
    import torch

    rows = run.read_rows("train")
    source = models.resolve_model(config, rows)
    tokenizer = models.load_tokenizer(source, config.model)
    model = models.load_model(source, config.model)
    chat = chat_of(config, model, tokenizer)
    check_tools(chat, rows)
    order = random.Random(config.training.seed).sample(range(len(rows)), min(4 * prompts, len(rows)))
    short = within_limit([rows[i] for i in order], chat, config.sampling.prompt_limit)
    chosen = [order[i] for i in short][:prompts]
    if not chosen:
        raise TaskError(
            f"no prompt of {len(order)} looked at fits sampling.prompt_limit {config.sampling.prompt_limit}"
        )
    as_trained = config.evaluation.model_copy(
        update=config.sampling.model_dump(include={"temperature", "top_p", "top_k"})
    )
    torch.manual_seed(config.training.seed)
    sample = local_sample(model, chat, as_trained, config.sampling.completion_limit, greedy=False)
    group = config.training.group_size
    asked = [rows[i] for i in chosen]
    patience = Patience(config.rewards.world_seconds, config.rewards.score_seconds)
    limit = config.rewards.max_unscored
    records = answer_rows(task, asked, batched(chat, sample), group, limit, "base policy", patience)
    logger.info("inspection: %d answers of the base policy to %d prompts", len(records), len(chosen))
    return records


def grouped_rewards(records: Sequence[Mapping[str, Any]], group_size: int) -> list[list[float | None]]:
    """Rewards group by group; None = masked or unscored."""
    rewards = [None if record["masked"] else record["reward"] for record in records]
    return [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]


def find_rows(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows of these ids; looks no further than it must."""
    missing, found = set(wanted), []
    for row in rows:
        if not missing:
            break
        if str(row["id"]) in missing:
            missing.discard(str(row["id"]))
            found.append(row)
    return found


def share(flags: Iterable[bool]) -> float:
    """The share that is true; 0 of nothing."""
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def _answers(task: Task, row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """Gold where the row has one; the worst of other rows' golds; nothing; the prompt back; several golds at once."""
    gold, golds = gold_text(row), other_golds(row, rows)
    answers = {"gold": gold} if gold else {}
    if golds:
        answers["wrong"] = min(golds, key=lambda text: _order(score_one(task, Rollout.of(row, text))))
    answers["empty"] = ""
    answers["cheat: the prompt back"] = str(row["prompt"][-1].get("content") or "")
    if golds:
        answers["cheat: many answers at once"] = " ".join([gold, *golds])
    return answers


def _order(score: Score) -> float:
    return float("inf") if score.reward is None else score.reward
