"""Tasks whose rows come from tables: where the table is, how it is split, how a record becomes a row.

Owns reading, the train/eval split and the check of a whole table at once; a user's `score(text, row)` beside a table.
Must not know models, trainers, or what a row is for.

    python -c "from lib.data import ScoreFunctionTask as T; print(T(path='data.jsonl').rows('eval')[0])"
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Self, overload

from pydantic import Field, PrivateAttr, model_validator

from lib.places import locate
from lib.tables import (
    CsvTable,
    JsonlTable,
    ListTable,
    Record,
    RecordError,
    Table,
    TableErrors,
    Where,
    finite,
    open_tables,
    table_files,
    write_csv,
)
from lib.task import Message, Rollout, Row, Score, Split, Task, TaskError, nearest

__all__ = [
    "ChosenRows",
    "CsvTable",
    "JsonlTable",
    "ListTable",
    "Record",
    "RowsTask",
    "ScoreFunctionTask",
    "Table",
    "TableErrors",
    "Where",
    "finite",
    "hub_table",
    "is_json",
    "messages_of",
    "pinned",
    "write_csv",
]

log = logging.getLogger(__name__)


class RowsTask(Task, frozen=True):
    """A task whose rows come from a table. A subclass says how a record becomes a row (`row`) and how it is scored."""

    stratified: ClassVar[bool] = False
    """Whether both sides of the split hold the same mixture of the tables."""
    read_columns: ClassVar[tuple[str, ...]] = ()
    """The columns that the task reads, by our names; () = it takes whatever there is."""

    path: str = ""
    """A file (.csv, .jsonl, .json, .parquet) or a folder of them, relative to the project root."""
    dataset: str = ""
    """A dataset on the Hugging Face Hub; takes the place of `path`."""
    dataset_config: str = ""
    dataset_split: str = "train"
    """The Hub's own split to read; this task splits it again into train and eval."""
    dataset_revision: str = ""
    """The commit of the Hub's dataset to read, so that it stays the same; "" = the newest."""
    columns: dict[str, str] = Field(default={})
    """Our name -> the name in the table, for the columns that are called otherwise there."""
    split_ratio: float = Field(default=0.8, ge=0, le=1)
    """The share of rows for training; the rest is for evaluation."""
    split_seed: int = 0
    max_samples: int = Field(default=0, ge=0)
    """Rows used in all, before the split; 0 = all. A row never changes sides when this changes."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path and self.dataset:
            raise ValueError(f"path ({self.path}) and dataset ({self.dataset}) are both set: keep one of them.")
        return self

    @model_validator(mode="after")
    def _maps_what_is_read(self) -> Self:
        for name in self.columns:
            if self.read_columns and name not in self.read_columns:
                raise ValueError(
                    f"columns.{name}: no column of that name is read; it is our name before the colon, and the table's "
                    f"after it.{nearest(name, self.read_columns)}"
                )
        return self

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def row(self, record: Record, where: Where) -> Row | None:
        """The row of a record, which has an `id` by now.

        None after `where.report` (a mistake in the table) or `where.drop` (left out on purpose).
        """
        raise NotImplementedError(f"{type(self).__name__}.row is missing")

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        """Report what is wrong with a table's columns (ours after renaming); once a table, not once a row."""

    def tables(self) -> list[Table]:
        """The tables named by the fields, opened."""
        if self.dataset:
            return [hub_table(self.dataset, self.dataset_config, self.dataset_split, self.dataset_revision)]
        if not self.path:
            raise TaskError("the task has no data: set task.path (a file or a folder) or task.dataset (a Hub dataset).")
        return open_tables(self.input_files())

    # -- what a subclass gets -----------------------------------------------------------------------------------------

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split in the order of the table, read one at a time; the whole table is checked before."""
        return self._data.split(split)

    def input_files(self) -> list[Path]:
        """The files that the fields name: they are hashed for the run and shipped with it."""
        return table_files(locate(self.path)) if self.path else []

    def renamed(self, record: Record) -> Record:
        """A record under our names; a column of the table that has one of our names but is not meant gives way."""
        if not self.columns:
            return record
        kept = {name: value for name, value in record.items() if name not in {*self.columns, *self.columns.values()}}
        return {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record} | kept

    def records(self) -> Iterator[tuple[Table, Record, Row]]:
        """Every record that became a row, with its table, in the order of the tables."""
        return self._data.records()

    @cached_property
    def _data(self) -> _Data:
        return _Data(self)


class _Data:
    """A task's tables, checked, and which of their records are rows of which split."""

    def __init__(self, task: RowsTask) -> None:
        self._task, self.tables = task, task.tables()
        self._first = [0, *accumulate(len(table) for table in self.tables)]
        errors = TableErrors()
        used, keys = array("q"), array("Q")
        for number, table in enumerate(self.tables):
            self._check_table(number, table, errors, used, keys)
        self._report_duplicates(errors, used, keys)
        errors.raise_if_any()
        for why, count in errors.dropped.items():
            log.warning("%d of %d rows left out: %s", count, self._first[-1], why)
        if not used:
            raise TaskError(f"no rows left in {', '.join(table.name for table in self.tables)}: all were left out.")
        self._used = used
        edges = self._first[1:-1] if task.stratified else []
        self._splits = _split(used, keys, edges, task)

    def _check_table(self, number: int, table: Table, errors: TableErrors, used: array[int], keys: array[int]) -> None:
        before, header = errors.total, errors.at(table.name, "")
        have = ", ".join(table.columns)
        for ours, theirs in self._task.columns.items():
            if theirs not in table.columns:
                header.report(theirs, f"no such column, but task.columns names it for {ours!r}. The table has: {have}")
        self._task.check_columns(list(self._task.renamed(dict.fromkeys(table.columns))), header)
        if errors.total > before:
            return
        for position in range(len(table)):
            where = errors.at(table.name, table.place(position))
            try:
                row = self._task.row(self._record(table, position), where)
            except RecordError as error:
                where.report(error.column, str(error))
                continue
            if row is not None:
                used.append(self._first[number] + position)
                keys.append(_key(self._task.split_seed, row["id"]))

    def _record(self, table: Table, position: int) -> Record:
        """A record under our names, with an id: its own, or the file's stem and the line."""
        record = self._task.renamed(table.read(position))
        identity = "" if record.get("id") is None else str(record["id"]).strip()
        return {**record, "id": identity or f"{table.stem}:{table.place(position).split()[-1]}"}

    def _report_duplicates(self, errors: TableErrors, used: array[int], keys: array[int]) -> None:
        """Equal keys are equal ids, or a rare accident; the records themselves say which."""
        import numpy

        found = numpy.frombuffer(keys, dtype=numpy.uint64)
        order = numpy.argsort(found, kind="stable")
        same = found[order[1:]] == found[order[:-1]]
        for second, first in sorted(zip(order[1:][same].tolist(), order[:-1][same].tolist(), strict=True)):
            here, there = used[second], used[first]
            identity = self.at(here)["id"]
            if self.at(there)["id"] == identity:
                table, position = self._find(here)
                other, place = self._find(there)
                where = errors.at(table.name, table.place(position))
                where.report("id", f"{identity!r} is also the id of {other.name}, {other.place(place)}")

    def _find(self, number: int) -> tuple[Table, int]:
        table = bisect_right(self._first, number) - 1
        return self.tables[table], number - self._first[table]

    def at(self, number: int) -> Row:
        return self._at(number)[2]

    def _at(self, number: int) -> tuple[Table, Record, Row]:
        table, position = self._find(number)
        record = self._record(table, position)
        row = self._task.row(record, Where(table.name, table.place(position)))
        if row is None:
            raise TaskError(f"{table.name}, {table.place(position)}: no row any more. Did the file change?")
        return table, record, row

    def records(self) -> Iterator[tuple[Table, Record, Row]]:
        return map(self._at, self._used)

    def split(self, split: Split) -> Sequence[Row]:
        return ChosenRows(self.at, self._splits[split])


class ChosenRows(Sequence[Row]):
    """The rows that `at` gives for some numbers, made when they are asked for."""

    def __init__(self, at: Callable[[int], Row], numbers: Sequence[int]) -> None:
        self._at, self._numbers = at, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return ChosenRows(self._at, self._numbers[index])
        return self._at(self._numbers[index])


def _key(seed: int, identity: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{identity}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _split(used: array[int], keys: array[int], edges: list[int], task: RowsTask) -> dict[Split, array[int]]:
    """Rows ranked by the hash of their ids: the lowest are for training, the highest for evaluation.

    `edges` are the row numbers at which a new stratum begins; a row's rank is that within its stratum, as a share.
    With `max_samples`, the ranks in the middle are left out, so that no row is ever on one side of a small run and on
    the other side of a big one. A ratio strictly between 0 and 1 leaves at least one row on each side.
    """
    import numpy

    total = min(task.max_samples or len(used), len(used))
    train = round(task.split_ratio * total)
    if 0 < task.split_ratio < 1 and total > 1:
        train = min(max(train, 1), total - 1)
    numbers = numpy.frombuffer(used, dtype=numpy.int64)
    order = numpy.argsort(numpy.frombuffer(keys, dtype=numpy.uint64), kind="stable")
    if edges:
        strata = numpy.searchsorted(edges, numbers[order], side="right")
        shares = numpy.empty(len(order))
        for stratum in numpy.unique(strata):
            members = strata == stratum
            shares[members] = (numpy.arange(members.sum()) + 0.5) / members.sum()
        order = order[numpy.argsort(shares, kind="stable")]
    chosen = {"train": order[:train], "eval": order[len(order) - (total - train) :]}
    return {split: array("q", numpy.sort(numbers[ranks]).tobytes()) for split, ranks in chosen.items()}  # type: ignore[misc]


def pinned(name: str, revision: str) -> str:
    """The name of a dataset at a commit, as messages have it."""
    return f"{name}@{revision}" if revision else name


def hub_table(dataset: str, config: str, split: str, revision: str = "") -> Table:
    """A Hub dataset as a table: `datasets` keeps it on disk and maps it into memory. Raises TaskError."""
    import datasets

    name = pinned("/".join(part for part in (dataset, config, split) if part), revision)
    try:
        found = datasets.load_dataset(dataset, config or None, split=split, revision=revision or None)
    except (OSError, ValueError) as error:
        remedy = "Check dataset, dataset_config, dataset_split and the connection."
        raise TaskError(f"task.dataset {name} cannot be loaded: {error}\n{remedy}") from None
    return ListTable(name, found)


def messages_of(value: Any, role: str) -> list[Message] | None:
    """A cell as chat messages: a text is one message of this role; a list, or the JSON of one, is taken as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else None
    if not isinstance(value, list) or not value:
        return None
    good = all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    return value if good else None


class ScoreFunctionTask(RowsTask, frozen=True):
    """A table and a user's own `score(text, row) -> float | None | Score` (sync or async).

    Columns: `prompt` (a text, or messages) or `messages` (a last assistant message is the gold answer); optional `id`,
    `gold`, `category`. Everything else rides along in the row.
    """

    _function: Callable[[str, Row], Any] | None = PrivateAttr(default=None)

    def bind(self, function: Callable[[str, Row], Any]) -> Self:
        """A copy of this task that scores with `function`."""
        bound = self.model_copy()
        bound._function = function  # type: ignore[misc]  # a private attribute: pydantic does not freeze it
        return bound

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        if "prompt" not in columns and "messages" not in columns:
            have = ", ".join(columns)
            where.report(
                "prompt", f"no such column, nor 'messages'. The table has: {have}. Map it: columns: {{prompt: …}}"
            )

    def row(self, record: Record, where: Where) -> Row | None:
        column = "prompt" if "prompt" in record else "messages"
        prompt = messages_of(record.get(column), "user")
        if not prompt:
            where.report(column, "empty, or neither a text nor a list of chat messages with roles")
            return None
        row = {**record, "prompt": prompt}
        row.pop("messages", None)
        if column == "messages" and prompt[-1]["role"] == "assistant":
            row["prompt"], row["gold"] = prompt[:-1], prompt[-1:]
        elif record.get("gold") not in (None, ""):
            gold = record["gold"]
            row["gold"] = messages_of(gold, "assistant") or [{"role": "assistant", "content": json.dumps(gold)}]
        else:
            row.pop("gold", None)
        if not row["prompt"]:
            where.report(column, "no message before the assistant's answer")
            return None
        if row.get("category") is not None:
            row["category"] = str(row["category"])
        return row if is_json(row, where) else None

    async def score(self, rollout: Rollout) -> Score:
        """The user's verdict, checked. Raises TaskError naming the row when it is no verdict."""
        if self._function is None:
            raise TaskError("no scorer: give load_task the path of a .py file with a function score(text, row).")
        result = self._function(rollout.text, dict(rollout.row))
        if inspect.isawaitable(result):
            result = await result
        score = self._as_score(result, rollout.row["id"])
        low, high = self.reward_range
        if score.reward is not None and not low <= score.reward <= high:  # NaN is not in any range
            raise TaskError(
                f"score() gave {score.reward} for row {rollout.row['id']!r}; allowed are numbers from {low} to {high} "
                "(task.reward_range), or None when it cannot be judged."
            )
        return score

    def _as_score(self, result: Any, row_id: str) -> Score:
        if isinstance(result, Score):
            return result
        if result is None:
            return Score(reward=None, notes={"unscored": "score() returned None"})
        if isinstance(result, Real):
            return Score(reward=float(result))
        raise TaskError(
            f"score() gave a {type(result).__name__} ({result!r:.80}) for row {row_id!r}; "
            "allowed are a number, None or a Score."
        )


def is_json(row: Row, where: Where) -> bool:
    """Whether a row can be written as JSON; the column that cannot is reported."""
    if where.errors is None:  # checked before
        return True
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            where.report(str(name), f"cannot be written as JSON ({error}). Convert the column, to text for example.")
            return False
    return True
