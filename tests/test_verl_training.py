"""verl's own trainer, end to end: Ray, FSDP, vLLM and verl's merger on the processor, as a user starts them.

The smoke config, with a task of two turns whose scorer breaks for every fourth row.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lib import PROJECT_ROOT
from lib.keeper import family
from lib.runfolder import read_run

SMOKE = PROJECT_ROOT / "configs" / "smoke" / "verl.yaml"
_SECONDS = 900.0
"""For one start of verl, two steps and its end: 100 seconds on two idle cores."""


class Work:
    """A run of the smoke config in a folder of its own."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.run = folder, folder / "through-verl"
        self._config = folder / "verl.yaml"
        smoke = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
        own = {"task": {"name": str(PROJECT_ROOT / "tests" / "two_turns.py")}, "rewards": {"max_unscored": 0.9}}
        own["starter"] = {"steps": 5}  # it has learnt next to nothing: answers of a group differ
        self._config.write_text(yaml.safe_dump(smoke | own))
        self._places = [f"paths.outputs={folder}", f"paths.cache={folder / 'cache'}", f"verl.python={python}"]

    def start(self, notebook: str, *parameters: str) -> subprocess.Popen[bytes]:
        given = [f"run_name={self.run.name}", *self._places, *parameters]
        command = [
            sys.executable,
            "-m",
            "lib.run",
            notebook,
            str(self._config),
            *(text for one in given for text in ("-p", one)),
        ]
        with self.log.open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def do(self, notebook: str, *parameters: str) -> None:
        assert self.start(notebook, *parameters).wait(_SECONDS) == 0, self.said()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def said(self) -> str:
        own = self.run / "verl" / "log.txt"
        return self.log.read_text(errors="replace") + (own.read_text(errors="replace")[-8000:] if own.is_file() else "")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, verl_python: str) -> Work:
    """Stopped in its first step, and gone on with to its end."""
    made = Work(tmp_path_factory.mktemp("verl"), verl_python)
    made.do("1_data_prep")
    process = made.start("3_grpo_training")
    wait_for(process, made, "Training Progress")
    below = family(process.pid)
    (child,) = children_of(made.run)
    os.kill(child, signal.SIGTERM)
    assert process.wait(_SECONDS) == 75, made.said()
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


def wait_for(process: subprocess.Popen[bytes], work: Work, text: str) -> None:
    until = time.monotonic() + _SECONDS
    while text not in work.said():
        assert process.poll() is None and time.monotonic() < until, work.said()
        time.sleep(0.5)


def children_of(folder: Path) -> list[int]:
    """The training processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train-child" in words and str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
