"""verl over two machines that share no disk: `make test-verl-nodes`, about 10 minutes on two cores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from through_verl import SECONDS, Work
from two_machines import Pair, two_machines

from lib.runfolder import Run, read_run


class Trained(NamedTuple):
    pair: Pair
    work: Work
    run: Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, verl_python: str, bubblewrap: None) -> Iterator[Trained]:
    """Stopped in its first step, and gone on with to its end."""
    with two_machines(verl_python, tmp_path_factory.mktemp("nodes")) as pair:
        work = Work(pair.folder, verl_python, pair.environment)
        two = (f"verl.ray_address={pair.address}", "verl.nodes=2", "verl.gpus=1")
        work.do("1_data_prep")
        assert work.stop_in_its_first_step(*two).wait(SECONDS) == 75, work.said()
        work.do("3_grpo_training", *two)
        yield Trained(pair, work, read_run(work.run))


def test_two_machines_train_and_go_on_although_they_share_no_disk(trained: Trained) -> None:
    work, run = trained.work, trained.run
    assert [record["step"] for record in run.metrics()] == [1, 2]
    assert len(run.rollouts()) == 2 * run.config.training.batch
    assert any(record["grad_norm"] > 0 for record in run.metrics())
    assert "resuming from global_step_1" in work.said()
    assert (work.run / "verl" / "verl_metrics.jsonl").is_file(), "verl's own log went elsewhere"
    assert "1 of 1 other machines have disks of their own" in (work.run / "verl" / "log.txt").read_text()


def test_every_machines_part_of_a_checkpoint_is_in_the_run_folder(trained: Trained) -> None:
    for step in (1, 2):
        parts = trained.work.run / "verl" / "checkpoints" / f"global_step_{step}" / "actor"
        for rank in (0, 1):
            assert (parts / f"model_world_size_2_rank_{rank}.pt").stat().st_size
            assert (parts / f"optim_world_size_2_rank_{rank}.pt").stat().st_size
    first, second = (load_file(path / "adapter_model.safetensors") for path in trained.run.checkpoints())
    assert any(value.abs().max() > 0 for name, value in first.items() if "lora_B" in name)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_second_machine_never_had_the_run_folder_and_none_keeps_what_travelled(trained: Trained) -> None:
    pair = trained.pair
    assert not (pair.disk / trained.work.run.name).exists()
    assert not [*pair.disk.glob("tmp/workbench-verl-*"), *pair.folder.glob("tmp/workbench-verl-*")]


def test_notebook_4_takes_what_they_trained(trained: Trained) -> None:
    trained.work.do("4_adapter_evaluation", "verl.nodes=2", "verl.gpus=1")
    assert (trained.work.run / "evaluation").is_dir()
