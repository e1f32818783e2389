"""Data preparation: a task's rows into the run folder, checked and measured.

Owns rows/{train,eval}.jsonl, the converted tables and token lengths. Must not know training.

    python -m lib.run notebooks/1_data_prep.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import models
from lib.config import Config
from lib.generate import Chat, unloaded_chat
from lib.places import input_name
from lib.runfolder import Run, hash_file, task_file_hash
from lib.task import Row, Split, Task, TaskError
from lib.tools import ToolsError, check_tools

logger = logging.getLogger(__name__)

STAGE = "data"
SECTIONS = ("task", "data")
SPLITS: tuple[Split, ...] = ("train", "eval")


def prepare(task: Task, run: Run) -> dict[str, int]:
    """Write the rows of both splits into the run folder, once; returns how many of each."""
    inputs = _hashes(task.input_files()) | task_file_hash(run.config)
    done = run.begin(STAGE, SECTIONS, inputs, products=("rows",))
    if done is None:
        counts: dict[str, int] = {split: run.write_rows(split, map(_checked, task.rows(split))) for split in SPLITS}
        if not counts["train"]:
            raise TaskError("the task has no training rows: check path, split_ratio and max_samples")
        done = run.end(STAGE, counts)
    logger.info("data: %s", ", ".join(f"{done[split]} {split} rows" for split in SPLITS))
    return {split: int(done[split]) for split in SPLITS}


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """The hash of every file by its name; files of one name (of several folders outside) are told apart by number."""
    hashes: dict[str, str] = {}
    for path in files:
        name, number = input_name(path), 1
        while name in hashes:
            number += 1
            name = f"{input_name(path)} ({number})"
        hashes[name] = hash_file(path)
    return hashes


def open_chat(config: Config, run: Run) -> Chat:
    """The policy's tokenizer and chat template, for a look at rendered prompts and their lengths.

    Warns where it does not show the rows' tools: inspection, training and evaluation of such a policy are refused, but
    the one that is asked may be another, behind a URL.
    """
    rows = run.read_rows("train")
    chat = unloaded_chat(config, models.resolve_model(config, rows))
    try:
        check_tools(chat, rows)
    except ToolsError as error:
        logger.warning("%s", error)
    return chat


def token_lengths(chat: Chat, run: Run) -> dict[str, list[int]]:
    """Prompt tokens of every row, by split."""
    return {
        split: [len(chat.prompt_ids(row["prompt"], row.get("tools"))) for row in run.read_rows(split)]
        for split in SPLITS
    }


def convert(config: Config, task: Task, chat: Chat, run: Run) -> list[dict[str, Any]]:
    """Write the task's converted tables (prompts as the model sees them) into the run folder; one record per file."""
    folder = run.path("rows", "tables", "")
    folder.mkdir(parents=True, exist_ok=True)
    written = task.write_tables(folder, chat.text)
    if config.data.write_back:
        written += task.write_tables(folder, chat.text, write_back=True)
    return [{"file": str(path), "bytes": path.stat().st_size} for path in written]


def categories(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Share of rows in each category."""
    names = [str(row.get("category", "none")) for row in rows]
    return {"rows": {name: names.count(name) / len(names) for name in set(names)}}


def _checked(row: Row) -> Row:
    """A row that survives JSON and has what every row needs."""
    if not row.get("id") or not row.get("prompt"):
        raise TaskError(f"a row without id or prompt: {json.dumps(row)[:200]}")
    return row
