"""`python -m lib.run export-verl`: a task's rows as verl's parquet, checked, counted and read back by verl itself.

Owns the command, and the same for notebook 1. Must not know how verl trains.

    python -m lib.run export-verl configs/ace.yaml --domains DIY,Food --split_ratio 0.75
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import WorkbenchError
from lib.config import Config, load_config
from lib.generate import Chat
from lib.places import locate
from lib.prepare import open_chat, prepare, token_lengths
from lib.runfolder import Run, default_name, open_run
from lib.task import Task, load_task
from lib.verl.environment import VerlMissingError, call, interpreter
from lib.verl.parquet import FILES, ParquetError, check_parquet, write_parquet

logger = logging.getLogger(__name__)

_SECONDS = 300.0
"""What verl may take to read the files back."""


class Table(NamedTuple):
    """One file that was written."""

    file: str
    rows: int
    overlong: int | None
    """Prompts over sampling.prompt_limit, which verl leaves out; None = not counted."""
    bytes: int


def parser() -> argparse.ArgumentParser:
    """The options of `python -m lib.run export-verl`."""
    made = argparse.ArgumentParser(
        prog="python -m lib.run export-verl",
        description="Write a task's rows as train.parquet and test.parquet for verl, with the order for its reward.",
        allow_abbrev=False,
    )
    made.add_argument("config", help="a YAML file, e.g. configs/ace.yaml")
    made.add_argument("--out", default="", help="the folder to write to; default: verl/ in the run folder")
    made.add_argument("--path", default="", help="tables of your own (a file or a folder) in place of the config's")
    made.add_argument("--domains", default="", help="ACE: domains to use, e.g. DIY,Food; default: the config's, or all")
    made.add_argument("--split_ratio", type=float, default=None, help="the share of rows for training; default: 0.75")
    anything = "run_name, or any config key, dotted (task.max_samples=20); repeatable"
    made.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)
    return made


def export_verl(options: argparse.Namespace, overrides: Mapping[str, Any], run_name: str = "") -> int:
    """Write, check and tell; 0. Raises WorkbenchError."""
    config = load_config(options.config, {**overrides, **_short(options)})
    task = load_task(config.task.name, **config.task.params)
    run = open_run(run_name or default_name(options.config, config.task.name), config)
    prepare(task, run)
    folder = locate(options.out) if options.out else None
    tables = write(task, run, _chat(config, run), folder)
    for table in tables:
        over = "not counted" if table.overlong is None else f"{table.overlong} over {config.sampling.prompt_limit}"
        sys.stdout.write(f"{table.file}: {table.rows} rows ({over} tokens), {table.bytes} bytes\n")
    sys.stdout.write(f"{_read_back(run, tables)}\n")
    return 0


def tables_for_verl(config: Config, task: Task, chat: Chat, run: Run) -> list[dict[str, Any]]:
    """Notebook 1: the files, where the config asks for them (backend verl, or data.parquet); one record each."""
    if config.backend != "verl" and not config.data.parquet:
        return []
    return [table._asdict() for table in write(task, run, chat)]


def write(task: Task, run: Run, chat: Chat | None, folder: Path | None = None) -> list[Table]:
    """Write the files of a run's prepared rows, and check them. Raises ParquetError."""
    written = write_parquet(task, run, folder)
    paths = {split: written.folder / name for split, name in FILES.items()}
    check_parquet(paths.values())
    limit = run.config.sampling.prompt_limit
    over: dict[str, int] = {}
    if chat:
        over = {split: sum(one > limit for one in lengths) for split, lengths in token_lengths(chat, run).items()}
    if any(over.values()):
        logger.warning("verl: %d prompts over sampling.prompt_limit %d are left out", sum(over.values()), limit)
    if over.get("train") == written.rows["train"]:
        raise ParquetError(f"all {over['train']} training prompts are longer than sampling.prompt_limit {limit}")
    if written.loop_rows:
        logger.info("verl: %d rows have tools or more than roles and texts: agent loop only", written.loop_rows)
    return [Table(str(path), written.rows[one], over.get(one), path.stat().st_size) for one, path in paths.items()]


def _short(options: argparse.Namespace) -> dict[str, Any]:
    """The short flags as config keys."""
    keys: dict[str, Any] = {}
    if options.path:
        keys |= {"task.path": options.path, "task.dataset": ""}
    if options.domains:
        keys["task.domains"] = [name.strip() for name in options.domains.split(",") if name.strip()]
    if options.split_ratio is not None:
        keys["task.split_ratio"] = options.split_ratio
    return keys


def _chat(config: Config, run: Run) -> Chat | None:
    """The policy's chat; None where it cannot be had here, which is said: files can be made without it."""
    try:
        return open_chat(config, run)
    except WorkbenchError as error:
        logger.warning("verl: prompts are not counted, because the policy's tokenizer cannot be had: %s", error)
        return None


def _read_back(run: Run, tables: Sequence[Table]) -> str:
    """What verl's own RLHFDataset reads, in one sentence; or why it was not asked. Raises ParquetError."""
    from lib.models import resolve_model

    if tables[0].overlong is None:
        return "not read back through verl: the policy's tokenizer cannot be had here"
    try:
        python = interpreter(run.config.verl.python)
    except VerlMissingError as error:
        return f"not read back through verl: {error}"
    model = resolve_model(run.config, run.read_rows("train"))
    files = [table.file for table in tables]
    found = read_through_verl(python, files, model, run.config.sampling.prompt_limit)
    read = [found[file] for file in files]
    if [one["rows"] for one in read] != [table.rows for table in tables]:
        raise ParquetError(f"verl's RLHFDataset reads {[one['rows'] for one in read]} rows of {files}")
    return f"verl's RLHFDataset reads them; within the limit: {', '.join(str(one['within']) for one in read)}"


def read_through_verl(python: str, files: Sequence[str], model: str, limit: int) -> dict[str, dict[str, Any]]:
    """What lib.verl.dataset says of each file, in verl's environment. Raises ParquetError."""
    arguments = [*files, "--model", model, "--limit", str(limit)]
    try:
        done = call(python, "lib.verl.dataset", *arguments, seconds=_SECONDS, CUDA_VISIBLE_DEVICES="")
    except subprocess.TimeoutExpired:
        raise ParquetError(f"verl did not read the files back within {_SECONDS:g} s") from None
    if done.returncode:
        raise ParquetError(f"verl's RLHFDataset refuses the files: {done.stderr.strip()[-1000:]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
