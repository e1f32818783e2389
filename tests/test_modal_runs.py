"""Notebooks in containers: what comes out, what a preemption costs, sweeps, schedules, following from a notebook."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cloud import APP, Cloud, result, wait_until
from runners import records
from safetensors.numpy import load_file

from lib import PROJECT_ROOT

SMOKE = "configs/smoke/decisions.yaml"
LONG = ["-p", "task.on_invalid=zero", "-p", "training.steps=60", "-p", "training.save_steps=10"]
TINY = ["-p", "training.steps=2", "-p", "evaluation.rows=8"]
ON_CPU = ["--gpu", "none"]


def same_training(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    for log in ("rollouts.jsonl", "metrics.jsonl"):
        assert records(one / log) and records(one / log) == records(other / log)


@pytest.fixture(scope="module")
def unbroken(cloud: Cloud) -> Path:
    """The long training, on this machine and in one go."""
    done = cloud.local("3_grpo_training", SMOKE, "-p", "run_name=unbroken", *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return cloud.folder / "outputs" / "unbroken"


@pytest.fixture(scope="module")
def preempted(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long training in containers: asked to go once, then killed without a word."""
    log = tmp_path_factory.mktemp("preempted") / "log.txt"
    process = cloud.start(
        *[sys.executable, "-m", "modal", "run", "-m", "lib.modal_app::run", "--notebook", "3_grpo_training"],
        *["--config", SMOKE, *ON_CPU, "-p", "run_name=preempted", *LONG],
        log=log,
    )
    folder = cloud.run_folder
    wait_until(lambda: "step 7/60" in cloud.logs(), what="step 7")
    assert (folder("preempted") / "notebooks" / "3_grpo_training.ipynb").is_file()  # there while it runs
    cloud.core.preempt["notebook"] = 0.0  # an interrupt, and half a minute of grace
    wait_until(lambda: "step 34/60" in cloud.logs(), what="step 34")
    wait_until(lambda: (folder("preempted") / "checkpoints" / "step-30" / "logs.json").is_file(), what="step-30")
    cloud.core.preempt["notebook"] = -1.0  # a kill
    process.wait(200)
    assert process.returncode == 0, log.read_text()
    return folder("preempted")


def test_a_preempted_run_ends_with_the_adapter_and_logs_of_an_unbroken_one(preempted: Path, unbroken: Path) -> None:
    same_training(preempted, unbroken)


def test_a_preemption_costs_nothing_and_a_kill_at_most_one_save_interval(preempted: Path, cloud: Cloud) -> None:
    logs = (preempted / "log.txt").read_text()
    resumed = [int(line.rsplit("step-", 1)[1]) for line in logs.splitlines() if "resuming from step-" in line]
    assert len(resumed) == 2
    assert resumed[0] >= 7 and resumed[0] % 10  # the step that it was in, not the last save
    assert resumed[1] >= 30
    containers = {path.stem for path in (preempted / "cost").glob("*.json")}  # named after Modal's tasks
    starts = [event for event in cloud.events("input_start") if event["task"] in containers]
    assert len({event["input"] for event in starts}) == 1 and len(containers) == 3


def test_the_executed_notebook_of_every_attempt_is_kept(preempted: Path) -> None:
    names = sorted(path.name for path in (preempted / "notebooks").glob("*.ipynb"))
    stem = "3_grpo_training"
    assert names == [f"{stem}.attempt-1.ipynb", f"{stem}.attempt-2.ipynb", f"{stem}.ipynb"]
    assert "This stage took 3 attempts" in (preempted / "notebooks" / f"{stem}.ipynb").read_text()
    assert "TrainingStopped" in (preempted / "notebooks" / f"{stem}.attempt-1.ipynb").read_text()


def test_the_bill_counts_every_attempt_and_is_in_the_result(preempted: Path) -> None:
    bill = result(preempted)["cost"]
    assert bill["attempts"] == 3 and bill["damaged"] == []
    hourly = 8 * 0.04716 + 32 * 0.007992  # configs/prices.yaml: a container without a GPU
    assert bill["usd"] == pytest.approx(hourly * bill["hours"], rel=1e-6)
    assert 0 < bill["lines"]["cold start"]["hours"] < bill["hours"]


def test_provenance_names_the_checkout_that_sent_the_job(preempted: Path, unbroken: Path) -> None:
    there, here = (json.loads((folder / "provenance.json").read_text()) for folder in (preempted, unbroken))
    assert there["lock"] == here["lock"] and there["code"] == here["code"]


def test_no_claim_is_left_behind(preempted: Path) -> None:
    assert list((preempted / "writers").glob("*")) == []


def test_fetch_brings_the_whole_run_and_a_second_time_only_what_may_change(preempted: Path, cloud: Cloud) -> None:
    done = cloud.call("fetch", "--run", "preempted")
    assert done.returncode == 0, done.stderr
    here = cloud.folder / "outputs" / "preempted"
    names = {path.relative_to(preempted).as_posix() for path in preempted.rglob("*") if path.is_file()}
    assert {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()} == names
    assert all((here / name).read_bytes() == (preempted / name).read_bytes() for name in names)
    before = (here / "adapter" / "adapter_model.safetensors").stat().st_ctime_ns
    again = cloud.call("fetch", "--run", "preempted")
    assert again.returncode == 0 and (here / "adapter" / "adapter_model.safetensors").stat().st_ctime_ns == before


def test_fetch_does_not_overwrite_a_run_that_was_made_here(cloud: Cloud, preempted: Path, unbroken: Path) -> None:
    done = cloud.call("fetch", "--run", "preempted", "--to", "unbroken")
    assert done.returncode == 2 and "holds another run of that name" in done.stderr


def test_checkpoints_are_listed_with_their_sizes(preempted: Path, cloud: Cloud) -> None:
    shown = cloud.call("checkpoints").stdout
    assert "preempted: finished" in shown
    assert all(f"  step-{step}" in shown for step in (10, 20, 30, 40, 50, 60)) and "MiB" in shown


def test_a_quote_from_an_earlier_run_has_roles_intervals_and_its_source(preempted: Path, cloud: Cloud) -> None:
    done = cloud.call("quote", "--config", SMOKE, "--run", "preempted", "--gpu", "H100", "-p", "training.steps=600")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line and line[0].isalpha()}
    assert {"gpu", "cpu", "total"} <= lines.keys() and "600 steps in" in done.stdout
    low, high = (float(text) for text in lines["total"].split("[")[1].rstrip("]").split(","))
    assert 0 < low < float(lines["total"].split()[2]) < high
    assert "measured from preempted" in done.stdout and "H100" in done.stdout  # it was measured on another machine


def test_a_quote_without_a_measurement_says_how_to_get_one(cloud: Cloud) -> None:
    done = cloud.call("quote", "--config", "configs/decisions.yaml", "--run", "never")
    assert done.returncode == 2 and "--probe 5" in done.stderr


@pytest.fixture(scope="module")
def swept(cloud: Cloud) -> list[Path]:
    grid = "training.learning_rate=1e-3,3e-3,1e-2"
    done = cloud.call("sweep", "--config", SMOKE, "--grid", grid, *ON_CPU, *TINY, "-p", "run_name=swept")
    assert done.returncode == 0, done.stdout + done.stderr
    return [cloud.run_folder(f"swept.learning_rate-{value}") for value in ("1e-3", "3e-3", "1e-2")]


def test_a_sweep_writes_separate_runs_with_their_own_settings(swept: list[Path]) -> None:
    rates = [json.loads((run / "config.json").read_text())["training"]["learning_rate"] for run in swept]
    assert rates == [1e-3, 3e-3, 1e-2]
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in swept]
    assert len(set(weights)) == 3
    firsts = [records(run / "metrics.jsonl")[0]["reward"] for run in swept]
    assert len(set(firsts)) == 1  # the same base, rows and seed


def test_notebook_4_compares_the_members_of_a_sweep(swept: list[Path], cloud: Cloud) -> None:
    (together,) = cloud.volume("outputs").glob("swept.sweep-*")
    evaluation = result(together)["evaluation"]
    assert set(evaluation["settings"]) == {run.name for run in swept}
    assert all(set(differing) == {"training.learning_rate"} for differing in evaluation["settings"].values())
    assert "gain" in result(together) and evaluation["over_runner_up"]["n"] > 0


def test_a_detached_sweep_needs_nobody_to_wait_for_it(cloud: Cloud) -> None:
    done = cloud.modal(
        *["run", "--detach", "-m", "lib.modal_app::sweep", "--notebook", "1_data_prep", "--config", SMOKE],
        *["--grid", "task.generate_seed=1,2", *ON_CPU, "-p", "starter.steps=1", "-p", "run_name=away"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(app.startswith("grpo-workbench.sweep-") for app in cloud.core.deployed)
    assert "compare them" in done.stdout
    runs = [cloud.run_folder(f"away.generate_seed-{seed}") for seed in (1, 2)]
    wait_until(lambda: all((run / "result.json").is_file() for run in runs), what="both runs")
    assert (runs[0] / "rows" / "train.jsonl").read_bytes() != (runs[1] / "rows" / "train.jsonl").read_bytes()


SCHEDULE = """
entries:
  - name: nightly
    notebook: 4_adapter_evaluation
    config: configs/smoke/decisions.yaml
    cron: "30 6 * * 1-5"
    timezone: Europe/Zurich
    gpu: L4
    parameters: {"evaluation.runs": ["swept.learning_rate-1e-3"], "evaluation.rows": 8}
"""


def test_a_deployed_schedule_ticks_into_a_dated_run(cloud: Cloud, swept: list[Path]) -> None:
    cloud.write("configs/schedule.yaml", SCHEDULE)
    done = cloud.modal("deploy", "-m", "lib.modal_app")
    assert done.returncode == 0, done.stdout + done.stderr
    found = cloud.definition("nightly")
    assert found["schedule"] == {"cron": {"cron_string": "30 6 * * 1-5", "timezone": "Europe/Zurich"}}
    assert found["gpus"] == ["L4:1"] and found["app"] == APP
    assert fire(cloud, "nightly") == "GENERIC_STATUS_SUCCESS"
    (run,) = cloud.volume("outputs").glob("nightly-20[0-9][0-9]-[01][0-9]-[0-3][0-9]-[0-2][0-9][0-5][0-9]")
    assert result(run)["evaluation"]["final"] == "swept.learning_rate-1e-3"


def test_nothing_is_deployed_without_entries(cloud: Cloud) -> None:
    cloud.write("configs/schedule.yaml", "entries: []\n")
    done = cloud.modal("deploy", "-m", "lib.modal_app")
    assert done.returncode == 2 and "configs/schedule.yaml has no entries" in done.stderr


def fire(cloud: Cloud, function: str) -> Any:
    body = json.dumps({"app": APP, "function": function, "timeout": 120}).encode()
    with urllib.request.urlopen(f"{cloud.server.http_url}/control/fire", data=body, timeout=150) as answer:
        return json.loads(answer.read())["status"]


def test_a_killed_notebook_finds_its_container_again_and_brings_the_result_here(
    cloud: Cloud, unbroken: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "lib.run",
        "3_grpo_training",
        SMOKE,
        "-p",
        "run_name=followed",
        "-p",
        "where=modal",
    ]
    command += ["-p", "modal.gpu=none", *LONG]
    here = cloud.folder / "outputs" / "followed"
    process = cloud.start(*command, log=tmp_path / "first.txt")
    wait_until(lambda: (here / "metrics.jsonl").is_file(), what="live metrics here")
    assert process.poll() is None
    end_family(process.pid)
    process.wait()
    done = cloud.local(*command[3:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "following it" in done.stdout or "finished on Modal" in done.stdout
    calls = [event for event in cloud.events("input_start") if event["function"] == "notebook"]
    assert len([event for event in calls if event["input"] == calls[-1]["input"]]) == 1  # it was not started again
    same_training(here, unbroken)
    assert (here / "notebooks" / "modal" / "3_grpo_training.ipynb").is_file()
    assert result(here)["cost"]["lines"]["cpu"]["usd"] > 0


def end_family(pid: int) -> None:
    """Kill a process and all below it, kernels and Modal clients included: what closing a laptop does."""
    for entry in Path(f"/proc/{pid}/task/{pid}").glob("children"):
        for child in entry.read_text().split():
            end_family(int(child))
    os.kill(pid, signal.SIGKILL)


SLOW = """
import asyncio

from lib.tasks.decisions import Decisions


class Slow(Decisions, frozen=True):
    async def score(self, rollout):
        await asyncio.sleep(0.7)  # steps take as long on a quick machine as on a busy one
        return await super().score(rollout)
"""


def test_a_run_that_outlives_its_attempt_goes_on_in_the_next(cloud: Cloud, unbroken: Path) -> None:
    before = len(cloud.events("retry"))
    cloud.write("mine/slow.py", SLOW)
    smoke = (PROJECT_ROOT / SMOKE).read_text(encoding="utf-8")
    config = cloud.write("mine/slow.yaml", smoke.replace("name: decisions", "name: mine/slow.py"))
    texts = ["-p", "run_name=hours", "-p", "task.on_invalid=zero", "-p", "training.steps=30"]
    done = cloud.call(
        *["run", "--notebook", "3_grpo_training", "--config", str(config.relative_to(cloud.folder)), *ON_CPU, *texts],
        *["-p", "training.save_steps=5", "--timeout", str(30 / 3600), "--retries", "10"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cloud.events("retry")) > before
    steps = [record["step"] for record in records(cloud.run_folder("hours") / "metrics.jsonl")]
    assert steps == list(range(1, 31))
    assert result(cloud.run_folder("hours"))["cost"]["attempts"] == len(cloud.events("retry")) - before + 1
