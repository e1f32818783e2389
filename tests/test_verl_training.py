"""verl's own trainer, end to end: Ray, FSDP, vLLM and verl's merger on the processor, as a user starts them.

The smoke config, with a task of two turns whose scorer breaks for every fourth row.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from through_verl import SECONDS, Work, is_there

from lib.keeper import family
from lib.runfolder import read_run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, verl_python: str) -> Work:
    """Stopped in its first step, and gone on with to its end."""
    another = {"RAY_ADDRESS": "127.0.0.1:9"}  # of a cluster that was here once: this run has a Ray of its own
    made = Work(tmp_path_factory.mktemp("verl"), verl_python, another)
    made.do("1_data_prep")
    process = made.stop_in_its_first_step()
    below = family(process.pid)
    assert process.wait(SECONDS) == 75, made.said()
    assert "stopped as asked" in made.said() and "goes on from step 1" in made.said()
    assert not [pid for pid in below if is_there(pid)], "verl's processes are still there"
    assert [path.name for path in read_run(made.run).checkpoints()] == ["step-1"]
    made.do("3_grpo_training")
    return made


def test_verl_trains_real_steps_and_what_it_did_is_in_the_run_folder(work: Work) -> None:
    run = read_run(work.run)
    metrics, rollouts = run.metrics(), run.rollouts()
    group, batch = run.config.training.group_size, run.config.training.batch
    assert [record["step"] for record in metrics] == [1, 2]
    assert [record["step"] for record in rollouts] == [1] * batch + [2] * batch
    for record in metrics:
        assert record["completions/mean_length"] > 0 and record["parts/turns"] <= 2
        assert (record["grad_norm"] > 0) == (record["groups/useful"] > 0)
        own = [one for one in rollouts if one["step"] == record["step"]]
        judged = [one["reward"] for one in own if one["reward"] is not None]
        assert record["reward"] == pytest.approx(sum(judged) / len(judged), abs=1e-6)
        assert record["rollouts/unscored"] == 1 - len(judged) / batch
    assert metrics[0]["groups/useful"] > 0
    for start in range(0, len(rollouts), group):
        assert len({record["row"] for record in rollouts[start : start + group]}) == 1
    assert re.search(r"step 1/2 loss", work.said()) and "resuming from global_step_1" in work.said()


def test_an_answer_whose_scorer_broke_is_unscored_and_says_why(work: Work) -> None:
    run = read_run(work.run)
    breaking = {row["id"] for row in run.read_rows("train") if row["breaks"]}
    rollouts = run.rollouts()
    assert any(record["row"] in breaking for record in rollouts), "no such row was drawn in two steps of four"
    for record in rollouts:
        assert (record["reward"] is None) == (record["row"] in breaking)
        assert record["notes"] == ({"error": "RuntimeError: the scorer broke"} if record["row"] in breaking else {})


def test_its_checkpoints_are_adapters_of_the_starter_that_have_moved(work: Work) -> None:
    run = read_run(work.run)
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2"]
    first, second = (load_file(path / "adapter_model.safetensors") for path in run.checkpoints())
    assert first.keys() == second.keys() and any("lora_B" in name for name in first)
    assert any(value.abs().max() > 0 for name, value in first.items() if "lora_B" in name)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    base = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).name.startswith("starter-")
    final = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], second[name]) for name in second)


def test_notebook_4_evaluates_them_and_notebook_5_exports_them(work: Work) -> None:
    work.do("4_adapter_evaluation")
    assert (work.run / "evaluation").is_dir()
    work.do("5_export_and_serve", "export.artifacts=[merged]")
    assert (work.run / "export" / "merged" / "model.safetensors").is_file()
