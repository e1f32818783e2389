"""A policy's answers to rows as plain records: all at once from a model here, one by one from an endpoint.

Owns what a record holds, when too few answers could be judged, and answers on disk that a kill leaves. Must not know
which policies are compared.

    python -c "from pathlib import Path as P; from lib.answering import AnswerLog; print(AnswerLog(P('x'), []).read())"
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lib.calls import sendable
from lib.config import Config
from lib.endpoint import EndpointPolicy, EndpointRefused, check_key
from lib.log import scrub
from lib.paired import summarize
from lib.patience import Patience
from lib.rollout import BatchGenerate, Scored, check_unscored, collect, is_unscored, play_each
from lib.runfolder import atomic_file, clear_errors, to_line
from lib.task import Row, Score, Task

logger = logging.getLogger(__name__)

FIELDS = frozenset(("row", "category", "prompt", "answer", "reward", "masked", "parts", "notes", "stop"))
"""Of every record; `messages` may stand beside them."""


def answer_rows(
    task: Task,
    rows: Sequence[Row],
    generate: BatchGenerate,
    samples: int,
    max_unscored: float,
    where: str,
    patience: Patience | None = None,
) -> list[dict[str, Any]]:
    """Answer every row `samples` times and score the answers: one plain record each, in row order.

    Raises UnscoredLimitError where more than a share `max_unscored` could not be judged.
    """
    repeated = [row for row in rows for _ in range(samples)]
    scored = collect(task, repeated, generate, patience)
    check_unscored((one.score for one in scored), max_unscored, where, remedy=_REMEDY)
    return [record_of(one) for one in scored]


def record_of(scored: Scored) -> dict[str, Any]:
    """A scored rollout as a record that can be written, with its messages where its last text does not say it all."""
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
    said = [turn.message for turn in rollout.turns]
    if len(said) > 1 or any(message.get("tool_calls") or message.get("thinking") for message in said):
        record["messages"] = list(rollout.messages)
    return sendable(record)


def answer_there(
    config: Config, task: Task, rows: Sequence[Row], greedy: bool, path: Path, label: str
) -> list[dict[str, Any]]:
    """Answers of the model behind evaluation.endpoint: each one on disk as soon as it is scored, all in `path` at last.

    Raises EndpointRefused at once where nothing will work as configured, and UnscoredLimitError as soon as it is clear.
    """
    repeated = [row for row in rows for _ in range(1 if greedy else config.evaluation.samples)]
    log = AnswerLog(path.with_suffix(".partial.jsonl"), [row["id"] for row in repeated])
    records = log.read()
    missing = [at for at in range(len(repeated)) if at not in records]
    if records:
        logger.info("evaluation: %s: %d of %d answers are on disk", label, len(records), len(repeated))
    effort = config.model.reasoning_effort
    asked = EndpointPolicy(config.evaluation, config.sampling.completion_limit, greedy, bool(records), effort)
    check_key(asked.service)
    patience = Patience(config.rewards.world_seconds, config.rewards.score_seconds)
    failed: list[Score] = []
    at_once = 2 * asked.service.concurrency  # one rollout is judged, or its world at work, while another one is asked
    with closing(play_each(task, [repeated[at] for at in missing], asked, at_once, patience)) as played:
        for index, one in played:
            if asked.refusal:
                raise EndpointRefused(asked.refusal)
            records[missing[index]] = log.add(missing[index], one)
            failed += [one.score] if is_unscored(one.score) else []
            # Even if all the rest can be judged: it need not be asked then.
            check_unscored(failed, config.rewards.max_unscored, label, len(repeated), _REMEDY_ENDPOINT)
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


_LEFT_OUT = "raising the limit leaves them out of every mean."
_REMEDY = f"Mend the judge, the sandbox or the scorer and run again; {_LEFT_OUT}"
_REMEDY_ENDPOINT = (
    f"Mend the endpoint, the judge, the sandbox or the scorer and run again: what was answered and judged is on disk "
    f"and is not asked again; {_LEFT_OUT}"
)


def _tell_progress(label: str, done: int, all_of_them: int) -> None:
    """A line every tenth of the way."""
    if done < all_of_them and done * 10 // all_of_them > (done - 1) * 10 // all_of_them:
        logger.info("evaluation: %s: %d of %d answers", label, done, all_of_them)


def _used(asked: EndpointPolicy) -> str:
    used = asked.used
    return f"{used.requests} requests, {used.input_tokens} + {used.output_tokens} tokens"


class AnswerLog:
    """Records of one policy in the order in which they came: what a kill leaves is not asked again."""

    def __init__(self, path: Path, rows: Sequence[Any]) -> None:
        """`rows`: the ids of the rows that are asked, one for each answer."""
        self.path, self.rows = path, rows

    def read(self) -> dict[int, dict[str, Any]]:
        """By number of the answer; a line that a kill cut off is cut away, so that the next one begins a line.

        Lines that hold no answer to a row that is asked are passed over, and counted in a warning.
        """
        if not self.path.is_file():
            return {}
        whole, end, _ = self.path.read_bytes().rpartition(b"\n")
        with clear_errors(self.path):
            os.truncate(self.path, len(whole) + len(end))
        lines = whole.split(b"\n") if end else []
        usable = [one for line in lines if (one := self._usable(line))]
        damaged = len(lines) - len(usable)
        if damaged:
            logger.warning("%s: damaged lines: %d; what stood there is asked again", self.path, damaged)
        return dict(usable)

    def _usable(self, line: bytes) -> tuple[int, dict[str, Any]] | None:
        """The answer in a line; None where it holds none to a row that is asked."""
        try:
            found = json.loads(line)
            number, record = found["number"], found["record"]
            asked = self.rows[number] == record["row"] and number >= 0
            return (number, record) if asked and record.keys() >= FIELDS else None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # whatever it is
            return None

    def add(self, number: int, scored: Scored) -> dict[str, Any]:
        """Keep a record where it was scored: what was not is to be asked again. Returns the record as it is kept."""
        record = record_of(scored)
        if not is_unscored(scored.score):
            with clear_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(scrub(to_line({"number": number, "record": record})))
        return record


def keep_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        for record in records:
            file.write(scrub(to_line(record)))
