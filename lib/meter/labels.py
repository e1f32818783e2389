"""Hand labels: what a person says of an answer and a criterion, in a table that any spreadsheet opens.

Owns outputs/<run>/labels.csv: which answers are put in, how labels are read back, and what is wrong with a line. The
judge's own verdict is not in it, on purpose. Must not know how labels are compared with a judge, or how they look.

    python -c "from lib.meter.labels import read_sheet; print(read_sheet('outputs/ace/labels.csv'))"
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

from lib.grading.prompt import sendable
from lib.ledger import Verdict, hash_text
from lib.log import scrub
from lib.runfolder import Run
from lib.tables import CsvTable, TableErrors, write_csv
from lib.task import Rollout, Row, Score, Task, TaskError

FILE = "labels.csv"
COLUMNS = ("row", "criterion", "text", "label", "prompt", "answer", "answer_hash")
PER_ANSWER = 3
"""Criteria of one answer in the sheet: reading an answer costs more than a label, but labels of one go together."""

_FORMULA = ("=", "+", "-", "@")
"""A spreadsheet takes a cell that begins with one of these for a formula: such a text gets a ' in front."""


class Criterion(Protocol):
    """What the sheet and the meter need of a criterion."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


@runtime_checkable
class Judged(Protocol):
    """A task with a judge (lib.grading.JudgedTask, or a user's own): verdicts on criteria, and what they are worth."""

    def criteria(self, row: Row) -> Sequence[Criterion]: ...
    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score: ...
    async def verdicts(self, rollout: Rollout, ask: int = 0, reverse: bool = False) -> Mapping[str, Verdict]: ...


class Label(NamedTuple):
    """A line of the sheet. `label` "" = not filled in."""

    row: str
    criterion: str
    text: str
    """The criterion in words."""
    label: Literal["pass", "fail", ""]
    prompt: str
    answer: str
    answer_hash: str
    """The answer's hash as the ledger has it; spreadsheets change line ends, the hash stays."""
    line: int = 0
    more: tuple[tuple[str, str], ...] = ()
    """Columns that a person has added, and what is in them."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What is labelled; a row, an answer and a criterion have one label."""
        return self.row, self.answer_hash, self.criterion


def label_sheet(run: Run, task: Task, answers: Sequence[Mapping[str, Any]], count: int = 30) -> Path | None:
    """Write outputs/<run>/labels.csv with `count` lines to fill in, and return it; None where the task has no judge.

    Drawn at random from the answers (records of lib.preflight.sample_base): as many rows as there are, PER_ANSWER
    criteria of each answer. Lines that are labelled stay, and so do the others as long as their answer is still there.
    """
    if not isinstance(task, Judged):
        return None
    path = run.path(FILE)
    drawn = list(_drawn(task, train_rows(run, answers), answers))
    current = {label.key: label for label in drawn}
    kept = [one for one in read_sheet(path) if one.label or one.key in current] if path.is_file() else []
    known = {label.key for label in kept}
    added = [label for label in drawn if label.key not in known][: max(0, count - len(kept))]
    _write(path, [*kept, *added])
    return path


def labels(run: Run) -> list[Label]:
    """The labels that were filled in so far; [] without a sheet. Raises TaskError with the line of every mistake."""
    path = run.folder / FILE
    return [label for label in read_sheet(path) if label.label] if path.is_file() else []


def read_sheet(path: str | Path) -> list[Label]:
    """Every line of the sheet, filled in or not. Raises TaskError with the line of every mistake."""
    table, errors = CsvTable(path), TableErrors()
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        have = ", ".join(table.columns)
        raise TaskError(
            f"{path}, line 1: no column {', '.join(missing)}. The file has: {have}. Save it as comma-separated CSV "
            f"with the columns that it had, or remove it and have it made anew."
        )
    found: dict[tuple[str, str, str], Label] = {}
    for number in range(len(table)):
        record, where = table[number], errors.at(str(path), table.place(number))
        given = record["label"].strip().lower()
        if given not in ("pass", "fail", ""):
            where.report("label", f"{record['label']!r} is no label. Allowed: pass, fail, or nothing for not sure.")
            continue
        cells = {name: _plain(record[name]) for name in COLUMNS if name != "label"}
        line = int(table.place(number).split()[-1])
        more = tuple((name, cell) for name, cell in record.items() if name not in COLUMNS)
        label = Label(**cells, label=cast(Literal["pass", "fail", ""], given), line=line, more=more)
        other = found.setdefault(label.key, label)
        if other is not label:
            where.report("row", f"the same answer and criterion as line {other.line}. Keep one of them.")
    errors.raise_if_any()
    return list(found.values())


def set_labels(path: Path, given: Mapping[tuple[str, str, str], Literal["pass", "fail", ""]]) -> None:
    """Write labels into the sheet by their lines' keys, whole or not at all; what else is labelled there stays."""
    _write(path, [one._replace(label=given.get(one.key, one.label)) for one in read_sheet(path)])


def train_rows(run: Run, answers: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The training rows that the answers are to, by their id as text."""
    wanted = {str(record["row"]) for record in answers}
    return {str(row["id"]): row for row in run.read_rows("train") if str(row["id"]) in wanted}


def _drawn(task: Judged, rows: Mapping[str, Row], answers: Sequence[Mapping[str, Any]]) -> Iterator[Label]:
    """Lines for all answers with a text, in a random order that is the same every time: one answer a row, then more."""
    chance = random.Random(0)
    by_row: dict[str, dict[str, str]] = {}
    for record in answers:
        if record["answer"].strip() and str(record["row"]) in rows:
            by_row.setdefault(str(record["row"]), {})[hash_text(record["answer"])] = record["answer"]
    queues = [(name, chance.sample(list(texts.items()), len(texts))) for name, texts in by_row.items()]
    chance.shuffle(queues)
    for turn in range(max((len(queue) for _, queue in queues), default=0)):
        for name, queue in queues:
            if turn < len(queue):
                yield from _lines(task, rows[name], *queue[turn], chance)


def _lines(task: Judged, row: Row, digest: str, answer: str, chance: random.Random) -> Iterator[Label]:
    criteria = list(task.criteria(row))
    prompt = str(row["prompt"][-1].get("content") or "")
    for one in chance.sample(criteria, min(PER_ANSWER, len(criteria))):
        yield Label(str(row["id"]), one.id, one.text, "", prompt, answer, digest)


def _write(path: Path, lines: Sequence[Label]) -> None:
    more = list(dict.fromkeys(name for line in lines for name, _ in line.more))
    rows = [
        [*(_cell(getattr(line, name)) for name in COLUMNS), *(dict(line.more).get(name, "") for name in more)]
        for line in lines
    ]
    header = ["\ufeff" + COLUMNS[0], *COLUMNS[1:], *more]  # the mark tells Excel that the file is UTF-8
    write_csv(path, header, rows)


def _cell(text: str) -> str:
    """A text as a spreadsheet may show it: no secrets, no formulas, nothing that UTF-8 or a spreadsheet cannot hold."""
    whole = scrub(sendable(text))
    return f"'{whole}" if whole.startswith(_FORMULA) or _plain(whole) != whole else whole


def _plain(cell: str) -> str:
    """The text of a cell, without the mark that `_cell` put before it."""
    return cell[1:] if cell.startswith("'") and cell[1:].lstrip("'").startswith(_FORMULA) else cell
