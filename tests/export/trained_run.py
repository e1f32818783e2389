"""A run folder as a training leaves it, of a tiny base and an adapter: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import MAKERS, tiny_adapter

from lib.config import parse_config
from lib.runfolder import Run, base_hash, open_run
from lib.task import Task, load_task

SCORER = "def score(text, row):\n    return min(1.0, len(text) / 20)\n"


def trained_run(root: Path, kind: str, size: float = 0.05, whole: bool = False, **overrides: Any) -> Run:
    """A run on a tiny base, with an adapter of this size (on its experts too, if any) as its training's result.

    `whole`: all weights trained in its place.
    """
    root.mkdir(parents=True, exist_ok=True)
    base = MAKERS[kind](root / f"base-{kind}")
    (root / "longer.py").write_text(SCORER)
    rows = [{"id": str(at), "prompt": [{"role": "user", "content": f"What is {at} + 2?"}]} for at in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "task": {"name": str(root / "longer.py"), "path": str(root / "rows.jsonl"), "split_ratio": 0.5},
        "model": {"name": str(base)},
        "sampling": {"completion_limit": 4, "prompt_limit": 400},
        "paths": {"outputs": str(root / "outputs"), "cache": str(root / "cache")},
    }
    config = parse_config(values | {"lora": {"enabled": not whole}} | overrides)
    run = open_run(f"of-{kind}", config)
    run.write_rows("eval", task_of(run).rows("eval"))
    run.begin("training", ("task", "model", "lora"), base_hash(config), ("adapter",))
    if whole:
        MAKERS[kind](run.folder / "model", seed=1)
    else:
        tiny_adapter(base, run.folder / "adapter", experts="gpt" in kind, size=size)
    run.end("training", {"path": "model" if whole else "adapter", "steps": 1})
    return run


def task_of(run: Run) -> Task:
    return load_task(run.config.task.name, **run.config.task.params)
