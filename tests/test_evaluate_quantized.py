"""Evaluation with and without quantization: which policies answer, and what is said before any of them does."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.config import ConfigError, load_config, parse_config
from lib.evaluate import evaluate_run, policies_of
from lib.models import ModelError
from lib.runfolder import Run
from lib.task import load_task

TASK = {"task": {"name": "decisions"}}


@pytest.fixture
def run(chain: tuple[Path, str], tmp_path: Path) -> Run:
    """A trained run, its evaluation still to come: base and result on 8 rows, in 4 bits too."""
    folder = Path(shutil.copytree(chain[0], tmp_path / "chain"))
    shutil.rmtree(folder / "evaluation")
    (folder / "stages" / "evaluation.json").unlink(missing_ok=True)
    overrides: dict[str, Any] = {"evaluation.quantized": "4bit", "evaluation.rows": 8, "evaluation.checkpoints": False}
    return Run(folder, load_config(folder / "config.json", overrides))


def test_base_and_result_are_also_asked_with_quantized_weights_and_the_result_stays_the_last(run: Run) -> None:
    policies = policies_of(run.config, run)
    assert [policy.name for policy in policies] == ["base", "base-4bit", "adapter-4bit", "adapter"]
    assert [policy.quantized for policy in policies] == ["", "4bit", "4bit", ""]
    assert policies[2].path == policies[3].path and policies[2].is_adapter


def test_what_the_machine_cannot_hold_is_said_before_anybody_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    task = load_task(run.config.task.name, **run.config.task.params)
    with pytest.raises(ModelError, match=r"bitsandbytes is not installed; the CUDA lock"):
        evaluate_run(run.config, task, run)
    assert not list((run.folder / "evaluation").glob("*.jsonl"))


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is in the CUDA lock only")
def test_the_same_rows_are_answered_with_and_without_quantization(run: Run) -> None:
    found = evaluate_run(run.config, load_task(run.config.task.name, **run.config.task.params), run)
    rows = {label: [record["row"] for record in records] for label, records in found.records.items()}
    assert len(rows) == 8 and len({tuple(asked) for asked in rows.values()}) == 1
    assert {"base-4bit sampled", "base-4bit greedy", "adapter-4bit greedy"} <= set(found.gains)
    assert found.final == "adapter" and len(found.summaries) == 8


@pytest.mark.parametrize("other", [{"runs": ["a"]}, {"endpoint": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}])
def test_quantization_is_for_weights_that_are_loaded_here(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.quantized and evaluation\.\w+ exclude each other"):
        parse_config({**TASK, "evaluation": {"quantized": "mxfp4", **other}})
