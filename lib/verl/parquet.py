"""A run's rows as the parquet files that verl reads, with the order for its reward; and whether such files are sound.

Owns the columns, and what is wrong with a file. Must not know verl itself, trainers or what a row is for.

    python -m lib.run export-verl configs/smoke/decisions.yaml
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import WorkbenchError
from lib.calls import sendable
from lib.grading import JudgedTask
from lib.runfolder import Run, atomic_file, clear_errors
from lib.task import Row, Split, Task
from lib.verl.reward import COUNTS, ORDER, Order

FILES: dict[Split, str] = {"train": "train.parquet", "eval": "test.parquet"}

SOURCE = "grpo-workbench/"
"""How data_source begins; the task's name follows."""

SHOWN = 5
_PAGE = 1000
"""Rows written at a time."""


class ParquetError(WorkbenchError, ValueError):
    """The files are not what verl can train on; the message says where and what to do."""


class Written(NamedTuple):
    folder: Path
    rows: dict[Split, int]
    loop_rows: int
    """Rows that a text alone does not show to the policy (tools, tool calls): for lib.verl.agent_loop only."""


def write_parquet(task: Task, run: Run, folder: Path | None = None, kept: Sequence[int] | None = None) -> Written:
    """Write FILES and the reward's order into a folder (None = verl/ of the run), from the run's prepared rows.

    `kept`: numbers of the rows to train on; None = all.
    Raises ParquetError where a split is empty.
    """
    folder = (folder or run.folder / "verl").resolve()
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = Path(run.config.task.name).stem
    style = "model" if isinstance(task, JudgedTask) else "rule"
    counts: dict[Split, int] = {}
    loop_rows = 0
    for split, file in FILES.items():
        rows = run.read_rows(split)
        if not len(rows):
            raise ParquetError(f"the {split} split has no rows, and verl needs a file of both: set task.split_ratio")
        numbers = range(len(rows)) if split != "train" or kept is None else kept
        records = [_record(rows[at], split, at, SOURCE + name, style) for at in numbers]
        counts[split] = len(records)
        loop_rows += sum(record["extra_info"]["agent_loop"] for record in records)
        _write(folder / file, records)
    write_order(run, folder)
    return Written(folder, counts, loop_rows)


def write_order(run: Run, folder: Path) -> Path:
    """The order by which a reward process rebuilds the run's task; returns its path."""
    config = run.config
    params = config.as_json()["task"]
    order = Order(
        run=str(run.folder.resolve()),
        task=params.pop("name"),
        params=params,
        world_seconds=config.rewards.world_seconds,
        score_seconds=config.rewards.score_seconds,
        unscored_limit=config.rewards.max_unscored,
        counts=str(folder / COUNTS),
    )
    path = folder / ORDER
    with atomic_file(path) as file:
        file.write(order.model_dump_json(indent=2))
    return path


def _record(row: Row, split: Split, index: int, source: str, style: str) -> dict[str, Any]:
    prompt = [sendable({"role": str(one["role"]), "content": _content(one)}) for one in row["prompt"]]
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": str(row.get("category") or "none"),
        "reward_model": {"style": style, "ground_truth": json.dumps(row)},
        "extra_info": {"split": split, "index": index, "id": sendable(str(row["id"])), "agent_loop": _needs_loop(row)},
    }


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _needs_loop(row: Row) -> bool:
    """Whether a policy that is shown roles and texts alone would not see all of the prompt."""
    plain = all(set(one) <= {"role", "content"} and isinstance(one.get("content"), str) for one in row["prompt"])
    return bool(row.get("tools")) or not plain


def _schema() -> Any:
    import pyarrow  # type: ignore[import-untyped]

    text = pyarrow.string()
    message = pyarrow.struct([("role", text), ("content", text)])
    extra = [("split", text), ("index", pyarrow.int64()), ("id", text), ("agent_loop", pyarrow.bool_())]
    return pyarrow.schema(
        [
            ("data_source", text),
            ("prompt", pyarrow.list_(message)),
            ("ability", text),
            ("reward_model", pyarrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pyarrow.struct(extra)),
        ]
    )


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    schema, partial = _schema(), path.with_name(f".{path.name}.{os.getpid()}.partial")
    with clear_errors(path):
        try:
            with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
                for start in range(0, len(records), _PAGE):
                    writer.write_table(pyarrow.Table.from_pylist(records[start : start + _PAGE], schema))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


# what is wrong with a file --------------------------------------------------------------------------------------------
def check_parquet(paths: Iterable[Path]) -> None:
    """See that verl would read what is meant from files, ours or a user's own. Raises ParquetError with every problem.

    verl itself refuses little of this: a prompt that is a text it renders wrongly, without a word.
    """
    import pyarrow
    import pyarrow.parquet

    problems: list[str] = []
    structs: dict[str, Any] = {}
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            problems.append(f"{path.name}: not a parquet file ({error})")
            continue
        found = list(_shape_problems(table.schema))
        if not table.num_rows:
            found.append("no rows: check task.split_ratio and max_samples")
        problems += [f"{path.name}: {problem}" for problem in found or _row_problems(table)]
        if "extra_info" in table.schema.names:
            structs[path.name] = table.schema.field("extra_info").type
    kinds = {str(kind): name for name, kind in structs.items()}
    if len(kinds) > 1:
        told = "; ".join(f"{name} has {kind}" for kind, name in kinds.items())
        problems.append(f"extra_info differs: {told}. Give every file the same fields: verl reads them as one table")
    if problems:
        raise ParquetError("verl cannot train on these files:\n" + "\n".join(problems))


def _shape_problems(schema: Any) -> Iterator[str]:
    import pyarrow

    types = {name: schema.field(name).type for name in schema.names}
    for name in ("data_source", "prompt", "reward_model", "extra_info"):
        if name not in types:
            yield f"no column {name!r}; there are: {', '.join(types)}"
    prompt = types.get("prompt")
    if prompt is not None and not _is_messages(prompt):
        why = (
            "a text, which verl renders as it stands, JSON and all: write the list itself, not json.dumps of it"
            if pyarrow.types.is_string(prompt) or pyarrow.types.is_large_string(prompt)
            else f"{prompt}"
        )
        yield f"prompt has to be list<struct<role: string, content: string>>, and is {why}"
    reward = types.get("reward_model")
    if reward is not None and not _has_texts(reward, {"ground_truth"}):
        yield f"reward_model has to be struct<style: string, ground_truth: string>, and is {reward}"
    extra = types.get("extra_info")
    if extra is not None and not pyarrow.types.is_struct(extra):
        yield f"extra_info has to be a struct, the same in every row, and is {extra}"


def _is_messages(kind: Any) -> bool:
    import pyarrow

    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return is_list and _has_texts(kind.value_type, {"role", "content"})


def _has_texts(kind: Any, names: set[str]) -> bool:
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    texts = (pyarrow.string(), pyarrow.large_string())
    return names <= {field.name for field in kind if field.type in texts}


def _row_problems(table: Any) -> Iterator[str]:
    """What is wrong in single rows: the first SHOWN, and how many more there are."""
    found: list[str] = []
    filled: dict[str, int] = {}
    for number, record in enumerate(table.select(["prompt", "reward_model", "extra_info"]).to_pylist()):
        found += [f"row {number}: {problem}" for problem in _problems_of(record)]
        for name, value in (record["extra_info"] or {}).items():
            filled[name] = filled.get(name, 0) + (value is not None)
    yield from found[:SHOWN]
    if len(found) > SHOWN:
        yield f"and {len(found) - SHOWN} more such rows"
    for name, count in filled.items():
        if 0 < count < table.num_rows:
            yield (
                f"extra_info.{name} is there in {count} of {table.num_rows} rows only: Arrow fills the others with "
                f"null; give every row the same fields"
            )


def _problems_of(record: Mapping[str, Any]) -> Iterator[str]:
    prompt = record["prompt"]
    if not prompt or any(not one or not one["role"] or one["content"] is None for one in prompt):
        yield "prompt has no messages, or one without role or content"
    truth = str((record["reward_model"] or {}).get("ground_truth"))
    try:
        json.loads(truth)
    except ValueError:
        yield f"reward_model.ground_truth is no JSON ({truth[:60]!r}): write json.dumps of what the reward reads"
