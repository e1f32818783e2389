"""The whole path as a user runs it: the chain, a kill in the middle, a second run, plain papermill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, run_cli
from safetensors.numpy import load_file

from lib import PROJECT_ROOT

TRAINING = ["-p", "training.steps=6", "-p", "training.save_steps=2"]


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a log without their time fields: what must be identical when a run is repeated or resumed."""
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in path.read_text().splitlines()]


def test_the_chain_leaves_a_whole_run_folder(chain: tuple[Path, str]) -> None:
    folder, _ = chain
    expected = [
        "config.json", "provenance.json", "rows/train.jsonl", "rows/eval.jsonl", "rollouts.jsonl", "metrics.jsonl",
        "log.txt",
        "checkpoints/step-2/trainer_state.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
        "adapter/tokenizer.json", "evaluation/base-sampled.jsonl", "evaluation/summary.json", "result.json",
    ]  # fmt: skip
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert not [path for path in folder.rglob("*") if ".partial" in path.name or path.name.startswith(".")]


def test_the_terminal_shows_plain_progress_lines(chain: tuple[Path, str]) -> None:
    _, shown = chain
    for pattern in (
        r"model: loading \S+ .* on CPU",
        r"data: 600 train rows, 200 eval rows",
        r"training: 600 rows, 0 dropped",
        r"step 1/4 loss -?\d+\.\d+ reward \d\.\d+",
        r"checkpoint saved: step-2",
        r"training finished: \S+/adapter",
        r"time  total +\d+\.\d s",
    ):
        assert re.search(pattern, shown), pattern
    assert "\x1b[" not in shown and "\r" not in shown and "it/s]" not in shown


def test_every_completion_is_logged_with_its_prompt_action_reward_step_and_micro_step(chain: tuple[Path, str]) -> None:
    records = lines(chain[0] / "rollouts.jsonl")
    assert len(records) == 4 * 16
    assert {record["step"] for record in records} == {1, 2, 3, 4}
    assert {record["micro_step"] for record in records} == {0, 1, 2, 3}
    for record in records:
        assert record["prompt"].startswith("hour ") and isinstance(record["completion"], str)
        assert record["masked"] == (record["reward"] is None)
        assert ("chosen" in record["parts"] and record["parts"]["chosen"] is not None) == (not record["masked"])


def test_metrics_have_one_record_a_step_with_loss_and_reward(chain: tuple[Path, str]) -> None:
    records = lines(chain[0] / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(isinstance(record["loss"], float) and 0 <= record["reward"] <= 1 for record in records)
    by_step = {
        step: [r["reward"] for r in lines(chain[0] / "rollouts.jsonl") if r["step"] == step] for step in (1, 2, 3, 4)
    }
    for record in records:  # the logged reward is the mean of the scored rollouts, masked ones left out
        scored = [reward for reward in by_step[record["step"]] if reward is not None]
        assert record["reward"] == pytest.approx(sum(scored) / len(scored), abs=1e-6)


def test_a_default_run_reaches_no_host_beyond_loopback(chain: tuple[Path, str], workspace: Path) -> None:
    look_up = "import socket; socket.getaddrinfo('workbench.invalid', 80)"
    environment = os.environ | {"PYTHONPATH": str(workspace), "WITNESS_FILE": str(workspace / "proof.txt")}
    subprocess.run([sys.executable, "-c", look_up], env=environment, capture_output=True, check=False)
    assert "workbench.invalid" in (workspace / "proof.txt").read_text()  # the witness sees what it should
    seen = workspace / "hosts.txt"
    assert not seen.exists(), seen.read_text()


def test_a_second_run_skips_what_is_finished_and_changes_nothing(chain: tuple[Path, str], places: list[str]) -> None:
    folder, _ = chain
    before = {
        path: path.read_bytes()
        for path in [*folder.glob("rows/*.jsonl"), *folder.glob("adapter/*"), folder / "metrics.jsonl"]
    }
    started = time.monotonic()
    done = run_cli("notebooks/3_grpo_training.ipynb", SMOKE, "-p", "run_name=chain", *places)
    assert done.returncode == 0, done.stderr
    assert "stage training: already finished, skipped" in done.stdout and "step 1/4" not in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    assert time.monotonic() - started < 60


def test_another_config_under_the_same_name_is_refused_with_what_differs(
    chain: tuple[Path, str], places: list[str]
) -> None:
    done = run_cli("all", SMOKE, "-p", "run_name=chain", "-p", "training.steps=5", *places)
    assert done.returncode == 2
    assert "training.steps was 4, now 5" in done.stderr and "Choose another run_name" in done.stderr


def start_training(name: str, places: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lib.run", "3_grpo_training", SMOKE, "-p", f"run_name={name}", *TRAINING, *places]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def wait_for(log: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while text not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came:\n{log.read_text(errors='replace')[-3000:]}"
        time.sleep(0.01)


def children_of(run_folder: Path) -> list[int]:
    """Training processes of a run, by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, NotADirectoryError):
            continue
        if b"train-child" in command and str(run_folder).encode() in command:
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def unbroken(workspace: Path, places: list[str], chain: tuple[Path, str]) -> Path:
    done = run_cli("3_grpo_training", SMOKE, "-p", "run_name=unbroken", *TRAINING, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "outputs" / "unbroken"


def same_result(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert lines(one / "rollouts.jsonl") == lines(other / "rollouts.jsonl")
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")


def test_training_killed_in_the_middle_resumes_bit_identical(
    unbroken: Path, workspace: Path, places: list[str], tmp_path: Path
) -> None:
    folder = workspace / "outputs" / "killed"
    process = start_training("killed", places, tmp_path / "first.txt")
    wait_for(folder / "metrics.jsonl", '"step": 3')  # the terminal follows it too late for steps this short
    for pid in children_of(folder):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 75
    shown = (tmp_path / "first.txt").read_text()
    assert "training was ended by SIGKILL" in shown and "goes on from step 2" in shown
    done = run_cli("3_grpo_training", SMOKE, "-p", "run_name=killed", *TRAINING, *places)
    assert done.returncode == 0, done.stderr
    assert "resuming from step-2" in done.stdout
    same_result(unbroken, folder)


def test_a_killed_runner_lets_its_training_finish_the_step_and_the_next_run_goes_on(
    unbroken: Path, workspace: Path, places: list[str], tmp_path: Path
) -> None:
    folder = workspace / "outputs" / "orphan"
    process = start_training("orphan", places, tmp_path / "first.txt")
    wait_for(tmp_path / "first.txt", "step 1/6")
    process.kill()
    process.wait()
    done = run_cli("3_grpo_training", SMOKE, "-p", "run_name=orphan", *TRAINING, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not children_of(folder)
    same_result(unbroken, folder)


def test_stopping_writes_a_checkpoint_and_says_how_to_go_on(
    workspace: Path, places: list[str], tmp_path: Path, chain: Any
) -> None:
    folder = workspace / "outputs" / "stopped"
    process = start_training("stopped", places, tmp_path / "first.txt")
    wait_for(tmp_path / "first.txt", "step 1/6")
    for pid in children_of(folder):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 75
    shown = (tmp_path / "first.txt").read_text()
    assert "stopped as asked" in shown
    step = int(re.search(r"goes on from step (\d)", shown)[1])  # type: ignore[index]
    assert 1 <= step < 6 and (folder / "checkpoints" / f"step-{step}" / "logs.json").is_file()


TRAIN = """
import sys
from lib.backends import train
from lib.runfolder import open_run
from lib.config import load_config
from lib.prepare import prepare
from lib.task import load_task
config = load_config(sys.argv[1], dict(text.split("=", 1) for text in sys.argv[3:] if text != "-p"))
run, task = open_run(sys.argv[2], config), load_task(config.task.name, **config.task.params)
prepare(task, run)
train(config, task, run.read_rows("train"), run)
"""


def test_interrupting_a_cell_finishes_the_step_and_says_how_to_go_on(
    workspace: Path, places: list[str], tmp_path: Path, chain: Any
) -> None:
    log = tmp_path / "first.txt"
    command = [sys.executable, "-c", TRAIN, SMOKE, "interrupted", *TRAINING, *places]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    wait_for(log, "step 1/6")
    process.send_signal(signal.SIGINT)  # what a kernel interrupt is
    assert process.wait(60) == 1
    assert "TrainingStopped: stopped as asked" in log.read_text()
    assert list((workspace / "outputs" / "interrupted" / "checkpoints").glob("step-*"))


def test_plain_papermill_runs_a_notebook(workspace: Path, tmp_path: Path, chain: tuple[Path, str]) -> None:
    overrides = f"{{paths.outputs: {workspace / 'outputs'}, paths.cache: {workspace / 'cache'}}}"
    command = [sys.executable, "-m", "papermill", "notebooks/3_grpo_training.ipynb", str(tmp_path / "out.ipynb"), "-p",
               "config", SMOKE, "-p", "run_name", "chain", "-y", f"overrides: {overrides}"]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "already finished, skipped" in (tmp_path / "out.ipynb").read_text()
