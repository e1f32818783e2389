"""Distributed training, all of it real: processes, vLLM on the CPU, TRL's trainer; a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.config import load_config
from lib.processes import served_dtype, share_gpus, visible_gpus
from lib.runfolder import Run, read_run

SMOKE = "configs/smoke/decisions.yaml"
STEPS = 10
NAME = f"killed-{os.getpid()}"


def command(folder: Path, *parameters: str) -> list[str]:
    words = [sys.executable, "-m", "lib.run", "3_grpo_training", SMOKE]
    given = ("backend=distributed", f"paths.outputs={folder}", "sampling.vllm.max_length=128", *parameters)
    return words + [word for text in given for word in ("-p", text)]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], seconds: float = 300) -> None:
    path, end = folder / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: exit {process.poll()}")


def pids(role: str) -> list[int]:
    """Processes of a role of this run, by their command lines, which name it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if role in line and NAME in line:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, subprocess.CompletedProcess[str]]]:
    """Notebook 3 with two workers, one of them killed after the second step."""
    folder = tmp_path_factory.mktemp("distributed")
    slow = "training.batch=32"
    process = subprocess.Popen(
        command(folder, f"run_name={NAME}", f"training.steps={STEPS}", slow),
        cwd=PROJECT_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"GOMP_SPINCOUNT": "3000"},
    )
    try:
        wait_for_step(folder / NAME, 2, process)
        for pid in pids("lib.rollout_worker")[:1]:
            os.kill(pid, signal.SIGKILL)
        shown, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    yield read_run(folder / NAME), subprocess.CompletedProcess([], process.returncode, shown)


def kinds(run: Run) -> Counter[str]:
    return Counter(event["kind"] for event in run.events())


def test_training_goes_on_to_its_end_with_the_worker_that_is_left(trained: Any) -> None:
    run, done = trained
    assert done.returncode == 0, done.stdout[-3000:]
    assert [m["step"] for m in run.metrics()] == list(range(1, STEPS + 1))
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert kinds(run)["died"] == 1


def test_every_turn_that_was_trained_on_came_from_proven_weights(trained: Any) -> None:
    run, _ = trained
    proven = {(e["role"], e["version"]) for e in run.events() if e["kind"] == "proof" and e["holds"]}
    rollouts = run.rollouts()
    assert len(rollouts) == STEPS * 32
    assert all((record["worker"], record["version"]) in proven for record in rollouts)


def test_nothing_is_left_of_the_roles(trained: Any) -> None:
    assert pids("lib.rollout_worker") == [] == pids("lib.actor")


def test_the_executed_notebook_shows_the_roles_and_the_loss(trained: Any) -> None:
    run, _ = trained
    cells = json.loads((run.folder / "notebooks" / "3_grpo_training.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if "show.roles" in "".join(c["source"])]
    shown = json.dumps(cell["outputs"])
    assert "worker-0" in shown and "worker-1" in shown and "proofs held" in shown and "died" in shown
    assert "image/png" in shown


# -- where roles run --------------------------------------------------------------------------------------------------


def test_gpus_are_the_actors_and_the_workers_in_turn() -> None:
    assert share_gpus([], 2) == {}
    assert share_gpus(["0"], 2) == {"actor": "0", "worker-0": "0", "worker-1": "0"}
    assert share_gpus(["4", "5", "6"], 3) == {"actor": "4", "worker-0": "5", "worker-1": "6", "worker-2": "5"}


def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in (("", []), ("-1", []), ("2,3", ["2", "3"]), ("GPU-ab", ["GPU-ab"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == found


def test_workers_serve_in_the_models_type() -> None:
    auto, half = load_config(SMOKE), load_config(SMOKE, {"model.dtype": "bfloat16"})
    assert [served_dtype(auto, gpu) for gpu in (False, True)] == ["float32", "bfloat16"]
    assert served_dtype(half, False) == "bfloat16"
