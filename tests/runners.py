"""One task file and one config for every runner of notebooks, and what must be the same whoever ran them.

The task keeps a ledger, so that the verdicts of all scored answers can be compared too. Each runner gives its own
absolute path to the override `task.ledger`: LEDGER in the run folder, where `same_results` looks for it.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

NOTEBOOK = "notebooks/3_grpo_training.ipynb"

LEDGER = "ledger.sqlite"
"""The ledger's name in the run folder."""

TASK = '''
"""Decisions, with every verdict kept in a ledger."""

from lib.ledger import Entry, Verdict, hash_text, open_ledger, verdict_key
from lib.task import Rollout, Score
from lib.tasks.decisions import Decisions


class Witnessed(Decisions, frozen=True):
    ledger: str

    async def score(self, rollout: Rollout) -> Score:
        score = await super().score(rollout)
        best = None if score.reward is None else float(score.parts["best"] or 0)
        verdict = Verdict("unknown" if best is None else "pass" if best else "fail", best, str(score.reward))
        row, answer = str(rollout.row["id"]), hash_text(rollout.text)
        key = verdict_key("witnessed-1", row, "nobody", "1", answer)
        open_ledger(self.ledger).put([Entry(key, verdict, "witnessed-1", row, "best", "nobody", "1", answer)])
        return score
'''

CONFIG = """
task:
  name: {task} # where TASK was written
  tau: 1.0
  generate_rows: 800

starter:
  steps: 40

training:
  steps: 4
  batch: 16
  group_size: 4
  learning_rate: 1.0e-3
  save_steps: 2

sampling:
  prompt_limit: 64
  completion_limit: 12
"""


def write_inputs(folder: Path) -> Path:
    """The task file and the config in a folder; returns the config's path."""
    (folder / "witnessed.py").write_text(TASK)
    config = folder / "witnessed.yaml"
    config.write_text(CONFIG.format(task=folder / "witnessed.py"))
    return config


def same_results(one: Path, other: Path) -> None:
    """Assert that two run folders hold the same training: adapter tensors, rollouts, metrics, verdicts."""
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    for log in ("rollouts.jsonl", "metrics.jsonl"):
        assert records(one / log) and records(one / log) == records(other / log)
    assert verdicts(one / LEDGER) and verdicts(one / LEDGER) == verdicts(other / LEDGER)


def records(log: Path) -> list[dict[str, Any]]:
    """A log's records without their time fields."""
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in log.read_text().splitlines()]


def verdicts(ledger: Path) -> list[tuple[Any, ...]]:
    """All that a ledger holds but times, in the order of its keys."""
    connection = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
    try:
        return sorted(connection.execute("SELECT key, verdict, score, reasons, row, answer FROM verdicts"))
    finally:
        connection.close()
