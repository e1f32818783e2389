"""A policy's answers to rows as plain records: all at once from a model here, one by one from an endpoint.

Owns what a record holds, and answers on disk that a kill leaves. Must not know which policies are compared.

    python -c "from pathlib import Path; from lib.answering import AnswerLog; print(AnswerLog(Path('x.jsonl')).read())"
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.endpoint import EndpointPolicy, EndpointRefused
from lib.log import scrub
from lib.paired import summarize
from lib.rollout import BatchGenerate, Scored, check_unscored, collect, play_each
from lib.runfolder import atomic_file, clear_errors, read_lines, to_line
from lib.task import Row, Score, Task

logger = logging.getLogger(__name__)


def answer_rows(
    task: Task, rows: Sequence[Row], generate: BatchGenerate, samples: int, max_unscored: float, where: str
) -> list[dict[str, Any]]:
    """Answer every row `samples` times and score the answers: one plain record each, in row order.

    Raises UnscoredLimitError where more than a share `max_unscored` could not be judged.
    """
    repeated = [row for row in rows for _ in range(samples)]
    scored = collect(task, repeated, generate)
    check_unscored((s.score for s in scored), max_unscored, where)
    return [record_of(one) for one in scored]


def record_of(scored: Scored) -> dict[str, Any]:
    """A scored rollout as a plain record, with its messages where its last text does not say it all."""
    rollout, score = scored
    record = {
        "row": rollout.row["id"],
        "category": rollout.row.get("category"),
        "prompt": rollout.row["prompt"][-1].get("content"),
        "answer": rollout.text,
        "reward": score.reward,
        "masked": score.masked,
        "parts": score.parts,
        "notes": score.notes,
        "stop": rollout.stop,
    }
    if len(rollout.turns) > 1 or any(turn.message.get("tool_calls") for turn in rollout.turns):
        record["messages"] = list(rollout.messages)
    return record


def answer_there(
    config: Config, task: Task, rows: Sequence[Row], greedy: bool, path: Path, label: str
) -> list[dict[str, Any]]:
    """Answers of the model behind evaluation.endpoint: each one on disk as soon as it is scored, all in `path` at last.

    Raises EndpointRefused at once where nothing will work as configured, and UnscoredLimitError as soon as it is clear.
    """
    repeated = [row for row in rows for _ in range(1 if greedy else config.evaluation.samples)]
    log = AnswerLog(path.with_suffix(".partial.jsonl"))
    records = log.read()
    missing = [at for at in range(len(repeated)) if at not in records]
    if records:
        logger.info("evaluation: %s: %d of %d answers are on disk", label, len(records), len(repeated))
    asked = EndpointPolicy(config.evaluation, config.sampling.completion_limit, greedy)
    asked.check()
    failed: list[Score] = []
    at_once = 2 * asked.service.concurrency  # one rollout is judged, or its world at work, while another one is asked
    with closing(play_each(task, [repeated[at] for at in missing], asked, at_once)) as played:
        for index, one in played:
            if asked.refusal:
                raise EndpointRefused(asked.refusal)
            records[missing[index]] = log.add(missing[index], one)
            failed += [one.score] if _is_unscored(one.score) else []
            if len(failed) > config.rewards.max_unscored * len(repeated):
                others = [Score(reward=0.0)] * (len(repeated) - len(failed))  # at best: the rest need not be asked
                check_unscored([*failed, *others], config.rewards.max_unscored, label)
            _tell_progress(label, len(records), len(repeated))
    in_order = [records[at] for at in range(len(repeated))]
    keep_records(path, in_order)
    log.path.unlink(missing_ok=True)
    logger.info(
        "evaluation: %s on %d rows: reward %.4f; %s",
        label,
        len(rows),
        summarize(label, in_order).reward,
        _used(asked),
    )
    return in_order


def _is_unscored(score: Score) -> bool:
    return score.reward is None and not score.masked


def _tell_progress(label: str, done: int, all_of_them: int) -> None:
    """A line every tenth of the way."""
    if done < all_of_them and done * 10 // all_of_them > (done - 1) * 10 // all_of_them:
        logger.info("evaluation: %s: %d of %d answers", label, done, all_of_them)


def _used(asked: EndpointPolicy) -> str:
    used = asked.used
    return f"{used.requests} requests, {used.input_tokens} + {used.output_tokens} tokens"


class AnswerLog:
    """Records of one policy in the order in which they came: what a kill leaves is not asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, Any]]:
        """By number of the answer; a line that a kill cut off is cut away, so that the next one begins a line."""
        if not self.path.is_file():
            return {}
        whole = self.path.read_bytes().rpartition(b"\n")
        os.truncate(self.path, len(whole[0]) + len(whole[1]))
        return {line["number"]: line["record"] for line in read_lines(self.path)}

    def add(self, number: int, scored: Scored) -> dict[str, Any]:
        """Keep a record where it was scored: what was not is to be asked again. Returns the record as it is kept."""
        record = record_of(scored)
        if not _is_unscored(scored.score):
            with clear_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(scrub(to_line({"number": number, "record": record})))
        return record


def keep_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        for record in records:
            file.write(scrub(to_line(record)))
