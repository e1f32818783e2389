"""Task `decisions`: choose one of k numbered actions, rewarded by a softmax of their Q-values.

Owns the table's columns, the reward, what counts as an answer, and the converted table. Must not know models or
trainers.

    python -c "from lib.task import load_task; print(load_task('decisions', tau=1.0).rows('train')[0])"
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lib.data import ListTable, Record, RowsTask, Table, Where, finite, messages_of, write_csv
from lib.places import locate
from lib.task import Message, Rollout, Row, Score, TaskError

log = logging.getLogger(__name__)

Q, REWARD = "q_action_", "reward_action_"
SUFFIX = "_harmony"
Render = Callable[[Sequence[Message]], str]

_ACTION = re.compile(r"\[([0-9]+)\]")  # ASCII digits only: \d and str.isdigit take "²" and other scripts' digits too
_MARKUP = re.compile(r"<\|(?:start|channel|message|end|return|call|constrain)\|>")
_FINAL = re.compile(
    r"<\|channel\|>final\b(?:[^<]|<\|constrain\|>)*<\|message\|>(.*?)(?=<\|(?:start|channel|end|return|call)\|>|\Z)",
    re.S,
)
_HARMONY_MESSAGE = re.compile(r"<\|start\|>(\w+)<\|message\|>(.*?)<\|end\|>", re.DOTALL)


class Decisions(RowsTask, frozen=True):
    """Decision tables: `prompt`, `q_action_0` … `q_action_{k-1}`, optional `reward_action_*`, `phase`, `id`.

    Two more optional columns: `reason` (words before the action in the gold answer) and `logged_action` (what a
    historical log did: becomes the row's demonstration). Without `path` and `dataset`, the table is generated from the
    hourly CO2 series in `series`, or from a synthetic one.
    """

    split_ratio: float = Field(default=0.75, ge=0, le=1)
    tau: float = Field(default=0.05, gt=0)
    """Temperature of the reward softmax(Q / tau), in the units of Q."""
    overwrite_rewards: bool = False
    """Compute the rewards even where the table has reward columns."""
    on_invalid: Literal["mask", "zero"] = "mask"
    """An answer that names no single action: left out of training, or a reward of 0."""
    series: str = ""
    """An hourly CO2 series (CSV: time, value) to generate decisions from; used when there is no path."""
    generate_rows: int = Field(default=8192, ge=2)
    """Rows to generate, training and evaluation together: a year of hours gives each its own window."""
    generate_seed: int = 0

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if self.series and (self.path or self.dataset):
            raise ValueError(f"series ({self.series}) is used only without path and dataset: remove one of them.")
        if self.on_invalid == "zero" and self.reward_range[0] < 0:
            raise ValueError("on_invalid: zero would beat valid answers of this reward_range: set on_invalid: mask.")
        return self

    def tables(self) -> list[Table]:
        if self.path or self.dataset:
            return super().tables()
        from lib.tasks import _thermal_store

        series = str(locate(self.series)) if self.series else ""
        records = _thermal_store.generate(series, self.generate_rows, self.generate_seed)
        return [ListTable(Path(series).stem or f"synthetic-{self.generate_seed}", records)]

    def input_files(self) -> list[Path]:
        """The source tables, or the series."""
        if self.series:
            return [locate(self.series)]
        files = super().input_files()
        # A table that `write_tables` put beside its source would double the rows of the folder.
        return [file for file in files if not (file.stem.endswith(SUFFIX) and _source(file) in files)]

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        if "prompt" not in columns:
            have = ", ".join(columns)
            where.report("prompt", f"no such column. The table has: {have}. Map it: columns: {{prompt: …}}")
        k, mistakes = _action_columns(tuple(columns), Q)
        rewards, more = _action_columns(tuple(columns), REWARD)
        for column, message in (*mistakes, *(() if self.overwrite_rewards else more)):
            where.report(column, message)
        if k < 2 and not mistakes:
            where.report(Q + str(k), "no such column; at least q_action_0 and q_action_1 are needed")
        if rewards not in (0, k) and not more and not self.overwrite_rewards:
            where.report(REWARD + "*", f"{rewards} columns for {k} actions. Mend them, or set overwrite_rewards: true")

    def row(self, record: Record, where: Where) -> Row | None:
        prompt = _prompt(record.get("prompt"))
        if prompt is None:
            where.report("prompt", f"{record.get('prompt')!r:.60} is no text, chat messages with roles, or Harmony")
        q = _numbers(record, Q, where)
        if q is None or prompt is None or not self._same_k(record, len(q), where):
            return None
        rewards = self._rewards(record, q, where)
        words = str(record.get("reason") or "").strip()
        logged = _logged_action(record, len(q), where)
        if rewards is None or logged == -1:
            return None
        if min(q) == max(q):
            where.drop("all Q-values of the row are equal, so there is nothing to choose")
            return None
        best = max(range(len(q)), key=lambda action: (rewards[action], q[action]))
        row: Row = {"id": record["id"], "prompt": prompt, "gold": [_answer(words, best)]}
        if _phase(record):
            row["category"] = _phase(record)
        row |= {"q": q, "rewards": rewards}
        return row if logged is None else {**row, "demonstration": [_answer(words, logged)]}

    def _same_k(self, record: Record, k: int, where: Where) -> bool:
        phase = _phase(record)
        other = where.agree(("actions", phase), k)
        if other is not None:
            scope = f"in phase {phase!r}" if phase else "without a phase"
            remedy = "One phase has one number of actions." if phase else "Add a `phase` column to tell them apart."
            where.report(Q + "*", f"{k} actions, but another number {scope} at {other}. {remedy}")
        return other is None

    def _rewards(self, record: Record, q: list[float], where: Where) -> list[float] | None:
        if self.overwrite_rewards or f"{REWARD}0" not in record:
            return softmax(q, self.tau)
        rewards = _numbers(record, REWARD, where)
        if rewards is None:
            return None
        low, high = self.reward_range
        if len(rewards) != len(q):
            where.report(REWARD + "*", f"{len(rewards)} rewards for {len(q)} actions")
            return None
        if not all(low <= reward <= high for reward in rewards):
            remedy = "Set task.reward_range, or overwrite_rewards: true"
            where.report(REWARD + "*", f"{rewards} not within {low} to {high}. {remedy}")
            return None
        return rewards

    def write_tables(self, folder: Path, render: Render, write_back: bool = False) -> list[Path]:
        """Write each source table as `<stem>_harmony.csv`: prompts as `render` gives them, reward columns added.

        Streamed, whole or not at all, into `folder`; beside the source with `write_back`. Returns the paths.
        """
        written: list[Path] = []
        for table, records in groupby(self.records(), key=lambda found: found[0]):
            if write_back and table.path is None:
                raise TaskError(f"write_back: {table.name} is not read from a file of its own. Leave write_back false.")
            path = (table.path.parent if write_back and table.path else folder) / f"{table.stem}{SUFFIX}.csv"
            if path in written:
                raise TaskError(f"two tables are called {table.stem!r}: rename one, both would become {path.name}.")
            columns = _output_columns(self, table)
            write_csv(path, columns, _output_rows(columns, records, render))
            written.append(path)
        return written

    async def score(self, rollout: Rollout) -> Score:
        """The reward of the chosen action. parts: valid, chosen, regret (in units of Q), p_best, best."""
        q, rewards = rollout.row["q"], rollout.row["rewards"]
        chosen, problem = chosen_action(rollout.text, len(q))
        if rollout.stop == "length" or (rollout.turns and rollout.turns[-1].stop == "length"):
            chosen, problem = None, "truncated"
        if chosen is None:
            parts = {"valid": 0.0, "chosen": None, "regret": None, "p_best": None, "best": None}
            if self.on_invalid == "mask":
                return Score(reward=None, parts=parts, notes={"invalid": problem}, masked=True)
            return Score(reward=0.0, parts={**parts, "best": 0.0}, notes={"invalid": problem})
        best = max(q)
        parts = {
            "valid": 1.0,
            "chosen": float(chosen),
            "regret": min(best - q[chosen], 1.7e308),  # the difference of two finite numbers may be infinite: not JSON
            "p_best": rewards[q.index(best)],
            "best": float(q[chosen] == best),
        }
        return Score(reward=rewards[chosen], parts=parts)


def softmax(q: Sequence[float], tau: float) -> list[float]:
    """Boltzmann probabilities exp(Q / tau) / sum, for any finite Q and any tau > 0: no overflow, the sum is 1."""
    best = max(q)
    weights = [math.exp(_scaled_gap(value, best, tau)) for value in q]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _scaled_gap(value: float, best: float, tau: float) -> float:
    """(value - best) / tau <= 0; a difference too big for a float is halved before, and doubled after the division."""
    gap = value - best
    return gap / tau if math.isfinite(gap) else 2 * ((value / 2 - best / 2) / tau)


def chosen_action(text: str, k: int) -> tuple[int | None, str]:
    """The one action that an answer names in brackets, or None and why it is invalid.

    With Harmony markup only the final channel counts. Naming the same action twice is fine. `[07]` is not action 7.
    """
    if _MARKUP.search(text):
        finals = _FINAL.findall(text)
        if not finals:
            return None, "no final channel"
        text = "\n".join(finals)
    named = set(_ACTION.findall(text))
    if not named:
        return None, "no action"
    if len(named) > 1:
        return None, "several actions"
    known = {str(action): action for action in range(k)}
    action = known.get(named.pop())
    return (action, "") if action is not None else (None, "unknown action")


def _answer(words: str, action: int) -> Message:
    return {"role": "assistant", "content": f"{words} [{action}]".strip()}


def _prompt(cell: Any) -> list[Message] | None:
    """A prompt cell as chat messages: plain text, the JSON of messages, or a text rendered in Harmony before.

    Of the latter, the system message is left out: the model's own template writes it again. None where it is no prompt;
    a text rendered by another chat template is none, because it would be rendered twice.
    """
    if not (isinstance(cell, str) and "<|start|>" in cell):
        return None if isinstance(cell, str) and "<|im_start|>" in cell else messages_of(cell, "user")
    if len(_HARMONY_MESSAGE.findall(cell)) != cell.count("<|message|>"):
        return None
    parts = [(role, text.removeprefix("# Instructions\n\n").strip()) for role, text in _HARMONY_MESSAGE.findall(cell)]
    roles = {"developer": "system"}
    return [{"role": roles.get(role, role), "content": text} for role, text in parts if role != "system"] or None


@lru_cache(maxsize=64)
def _action_columns(columns: tuple[str, ...], prefix: str) -> tuple[int, list[tuple[str, str]]]:
    """How many actions the columns of this prefix number from 0, and what is wrong with them."""
    endings = [name.removeprefix(prefix) for name in columns if name.startswith(prefix)]
    good = {ending for ending in endings if re.fullmatch(r"0|[1-9][0-9]*", ending)}
    expected = {str(action) for action in range(len(good))}
    missing = ", ".join(prefix + ending for ending in sorted(expected - good))
    mistakes = {ending: "not a numbered action; expected 0, 1, 2, …" for ending in endings if ending not in good}
    mistakes |= dict.fromkeys(good - expected, f"numbers must run from 0 without a hole; missing: {missing}")
    return len(good), [(prefix + ending, message) for ending, message in sorted(mistakes.items())]


def _phase(record: Record) -> str:
    phase = record.get("phase")
    return "" if phase is None else str(phase).strip()


def _numbers(record: Record, prefix: str, where: Where) -> list[float] | None:
    """The numbers of the prefix's columns, in order. Empty last cells mean fewer actions where the row has a phase."""
    k, mistakes = _action_columns(tuple(record), prefix)
    for column, message in mistakes:
        where.report(column, message)
    cells = [record.get(f"{prefix}{action}") for action in range(k)]
    while cells and cells[-1] in (None, "") and _phase(record):
        cells.pop()
    numbers = [finite(cell) for cell in cells]
    for action, (cell, number) in enumerate(zip(cells, numbers, strict=True)):
        if number is None:
            where.report(f"{prefix}{action}", f"{cell!r} is not a finite number")
    found = [number for number in numbers if number is not None]
    if len(found) == len(cells) and len(cells) < 2:
        where.report(prefix + "*", f"{len(cells)} actions; at least 2 are needed")
        return None
    return found if len(found) == len(cells) and not mistakes else None


def _logged_action(record: Record, k: int, where: Where) -> int | None:
    """What the log did; None = not known, -1 = reported."""
    cell = record.get("logged_action")
    if cell is None or cell == "":
        return None
    if str(cell) in {str(action) for action in range(k)}:
        return int(cell)
    where.report("logged_action", f"{cell!r} is not one of the actions 0 to {k - 1}")
    return -1


def _source(converted: Path) -> Path:
    return converted.with_stem(converted.stem.removesuffix(SUFFIX))


def _output_columns(task: Decisions, table: Table) -> list[str]:
    names = [name for name in task.renamed(dict.fromkeys(table.columns)) if not name.startswith(REWARD)]
    k = sum(name.startswith(Q) for name in names)
    return [*([] if "id" in names else ["id"]), *names, *(f"{REWARD}{action}" for action in range(k))]


def _output_rows(
    columns: Sequence[str], records: Iterator[tuple[Table, Record, Row]], render: Render
) -> Iterator[list[Any]]:
    for _, record, row in records:
        rewards = {f"{REWARD}{action}": reward for action, reward in enumerate(row["rewards"])}
        cells = {**record, **rewards, "prompt": render(row["prompt"])}
        yield [_cell(cells.get(name)) for name in columns]


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
