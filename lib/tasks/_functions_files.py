"""BFCL's files as tables: the questions of a category, with the answer of the same id beside each.

Owns file names and categories of the benchmark, and the check of the answers' files. Must not know what makes a row
usable, prompts or rewards.

    python -c "from lib.tasks._functions_files import category_of; print(category_of('BFCL_v4_live_simple.json'))"
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.data import JsonlTable, Record, Table, TableErrors, pinned
from lib.tables import RecordError
from lib.task import TaskError, nearest
from lib.tasks._functions_rows import needs_answers

log = logging.getLogger(__name__)

_FILE = re.compile(r"BFCL_v\d+_(\w+)\.json")
_SINGLE_TURN = re.compile(
    r"(live_)?(simple(_python|_java|_javascript)?|java|javascript|(parallel_)?multiple|parallel|(ir)?relevance)"
)


def category_of(name: str) -> str:
    """The category in a file's name, where it is one of single turns; "" = another file."""
    found = _FILE.fullmatch(name)
    return found[1] if found and _SINGLE_TURN.fullmatch(found[1]) else ""


class BfclTable(Table):
    """One category: its questions, read when asked for, with the answer of the same id beside each."""

    def __init__(self, questions: Path, category: str, answers: Path | None) -> None:
        self.path, self.name, self.category = questions, str(questions), category
        self._questions = JsonlTable(questions)
        self._answers = {} if answers is None else _ground_truths(JsonlTable(answers))
        self.columns = ("id", "question", "function", "ground_truth", "category")

    def __len__(self) -> int:
        return len(self._questions)

    def place(self, number: int) -> str:
        return self._questions.place(number)

    def read(self, number: int) -> Record:
        record = self._questions.read(number)
        identity = _identity(record)
        if identity is None and record.get("id") is not None:
            raise RecordError("id", f"{record['id']!r:.80} is neither a text nor a whole number")
        return {**record, "category": self.category, "ground_truth": self._answers.get(identity or "")}


def _identity(record: Record) -> str | None:
    """A record's id as a text; None = it has none, or one that is no id."""
    found = record.get("id")
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        return None
    return str(found).strip() or None


def _ground_truths(table: Table) -> dict[str, Any]:
    """Every answer by the id of its question. Raises TaskError, with the lines of all that are none."""
    found: dict[str, Any] = {}
    errors, places = TableErrors(), dict[str, str]()
    for number in range(len(table)):
        where = errors.at(table.name, table.place(number))
        try:
            record = table.read(number)
        except RecordError as error:
            where.report(error.column, str(error))
            continue
        identity = _identity(record)
        if identity is None:
            where.report("id", "an answer needs the id of its question, a text")
        elif identity in places:
            where.report("id", f"{identity!r} is also the id of {places[identity]}. Keep one of the two answers")
        elif record.get("ground_truth") is None:
            where.report("ground_truth", "no list of expected calls [{function: {parameter: [accepted values]}}]")
        else:
            found[identity] = record["ground_truth"]
            places[identity] = where.row
    errors.raise_if_any()
    return found


def bfcl_files(path: Path, categories: Sequence[str]) -> list[tuple[str, Path, Path | None]]:
    """(category, questions, answers) of the benchmark's files in a folder, or of one of them; [] where none is there.

    Answers lie in possible_answer/ under the same name, or beside the questions as answer_<category>.json. Raises
    TaskError for a category that has no file.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("BFCL_v*.json")) if path.is_dir() else [path] if path.is_file() else []
    found = {category: file for file in files if (category := category_of(file.name))}
    for category in categories if found else ():
        if category not in found:
            raise TaskError(f"task.categories: no BFCL_v…_{category}.json in {folder}.{nearest(category, list(found))}")
    chosen: list[tuple[str, Path, Path | None]] = []
    for category, file in found.items():
        places = (folder / "possible_answer" / file.name, folder / f"answer_{category}.json")
        answers = next((place for place in places if place.is_file()), None)
        if answers is None and needs_answers(category):
            log.warning("functions: no answers to %s (looked for %s and %s)", file.name, *places)
        if not categories or category in categories:
            chosen.append((category, file, answers))
    return chosen


def hub_folder(dataset: str, revision: str) -> Path:
    """The benchmark's files of a Hub dataset, downloaded once; revision "" = the newest. Raises TaskError."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["BFCL_v*.json", "possible_answer/*.json", "answer_*.json"]
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", revision=revision or None, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        name, remedy = pinned(dataset, revision), "Check task.dataset, task.dataset_revision and the connection."
        raise TaskError(f"task.dataset {name} cannot be loaded: {text}\n{remedy}") from None
