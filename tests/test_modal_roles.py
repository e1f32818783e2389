"""The distributed roles as Modal classes: the real client, real engines in the "containers", one of them lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cloud import MODAL, Cloud, result, wait_until
from runners import records

from lib.runfolder import read_lines

SMOKE = "configs/smoke/mrl.yaml"
STEPS = 10
ON_CPU = {"modal.roles.actor_gpu": "none", "modal.roles.worker_gpu": "none", "modal.roles.cpu": 1}
SMALL = {"starter.steps": 5, "task.generate_rows": 40, "distributed.canary_deadline": 300}


def texts(**more: Any) -> list[str]:
    return [word for name, value in (ON_CPU | SMALL | more).items() for word in ("-p", f"{name}={value}")]


def roles_apps(cloud: Cloud) -> list[str]:
    return [app for app in cloud.core.deployed if ".roles-" in app]


def running(cloud: Cloud) -> set[str]:
    """Containers of roles that have started and not ended."""
    started = {event["task"] for event in cloud.events("task_start") if event["function"].endswith(".*")}
    return started - {event["task"] for event in cloud.events("task_end")}


# what is defined ------------------------------------------------------------------------------------------------------
DEPLOY = """
from lib import modal_app, remote
from lib.experiment import read_experiment
experiment = read_experiment()
plan = remote.make_plan(experiment, "3_grpo_training", "configs/mrl.yaml", ["run_name=defined", "model.name=starter"])
app = modal_app.define_roles(experiment, plan)
app.deploy()
app.stop()
"""


@pytest.fixture(scope="module")
def defined(cloud: Cloud) -> None:
    done = cloud._run([sys.executable, "-c", DEPLOY], {})
    assert done.returncode == 0, done.stderr


def test_every_role_is_a_class_with_its_gpu_and_one_container_each(defined: None, cloud: Cloud) -> None:
    actor, worker = cloud.definition("Actor.*"), cloud.definition("RolloutWorker.*")
    assert (actor["gpus"], worker["gpus"]) == (["A100-40GB:1"], ["A10:1"])
    for found in (actor, worker):
        assert found["is_class"] and found["max_containers"] == 1 and found["scaledown"] == 300
        assert (found["cpu"], found["memory"], found["retries"]) == (4.0, 32 * 1024, None)
        assert not found["single_use"] and found["module"] == "lib.modal_roles"
        assert set(found["volumes"]) == {"/cache", "/data", "/outputs"}
        assert {path.split("/")[2] for path in found["mounted_files"]} == {"lib", "notebooks", "configs"}
    assert worker["concurrent"] >= 32 + 4  # the turns of distributed.in_flight, and what is asked beside
    assert actor["timeout"] > 7200 and worker["timeout"] > 900  # the longest deadline of each


# a weight sync --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def synced(cloud: Cloud) -> subprocess.CompletedProcess[str]:
    """`check sync` orchestrated on this machine, its roles on Modal; what it made and compiled stays on the volume."""
    return cloud.local("check", "sync", "--config", SMOKE, *texts(**{"distributed.hosts": "modal", "run_name": "here"}))


def test_a_laptop_syncs_roles_on_modal_by_every_method_and_proves_each(
    synced: subprocess.CompletedProcess[str], cloud: Cloud
) -> None:
    assert synced.returncode == 0, synced.stdout + synced.stderr
    told = {line.split()[0]: line for line in synced.stdout.splitlines() if " s  proven" in line}
    assert told.keys() == {"reload", "volume", "checkpoint"}
    assert (cloud.run_folder("here.check") / "weights").is_dir()


def test_nothing_is_left_of_the_check(synced: subprocess.CompletedProcess[str], cloud: Cloud) -> None:
    wait_until(lambda: not running(cloud), 20, "the end of all containers")
    assert roles_apps(cloud) == []


# a training -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(cloud: Cloud, synced: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MRL's smoke form, orchestrated in a container; a worker's container is killed without a word."""
    log = tmp_path_factory.mktemp("mrl") / "log.txt"
    more = {"run_name": "mrl", "training.steps": STEPS, "training.save_steps": 5}
    process = cloud.start(
        *[*MODAL, "run", "-m", "lib.modal_app::run", "--notebook", "3_grpo_training", "--config", SMOKE],
        *texts(**more),
        log=log,
    )
    try:
        begun = f"step 1/{STEPS}"
        wait_until(lambda: begun in cloud.logs() or process.poll() is not None, 400, begun)
        cloud.core.preempt["RolloutWorker*"] = -1.0
        process.wait(300)
    finally:
        process.kill()
        cloud.core.preempt.clear()
    assert process.returncode == 0, log.read_text()
    return cloud.run_folder("mrl")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["kind"] == kind]


def test_it_trains_to_its_end_although_a_container_was_lost(trained: Path, cloud: Cloud) -> None:
    assert [record["step"] for record in records(trained / "metrics.jsonl")] == list(range(1, STEPS + 1))
    (lost,) = cloud.events("preempt")
    told = [event["why"] for event in [*events(trained, "died"), *events(trained, "lost")]]
    # Modal ran its calls again in another container, in which there is no engine: nobody took it for the proven one.
    assert any("another one stands in its place" in why or "its container ended" in why for why in told), told
    assert lost["task"] not in running(cloud)


def test_what_was_trained_on_came_from_proven_weights(trained: Path) -> None:
    proofs = events(trained, "proof")
    assert {proof["method"] for proof in proofs} == {"reload"} and all(proof["holds"] for proof in proofs)
    proven = {(proof["role"], proof["version"]) for proof in proofs}
    rollouts = records(trained / "rollouts.jsonl")
    assert len(rollouts) == STEPS * 16
    assert all((record["worker"], record["version"]) in proven for record in rollouts)


def test_two_workers_were_two_containers_beside_actor_and_orchestrator(trained: Path, cloud: Cloud) -> None:
    notebook = cloud.definition("notebook")
    assert notebook["gpus"] == [None]
    ids = [event["fid"] for event in cloud.events("task_start") if event["function"] == "RolloutWorker.*"]
    assert len(set(ids)) >= 2
    bills = {path.stem.rsplit("-", 1)[0] for path in (trained / "cost").glob("role-*.json")}
    assert bills == {"role-actor", "role-worker-0", "role-worker-1"}
    bill = result(trained)["cost"]
    assert bill["attempts"] == 1 + len(list((trained / "cost").glob("role-*.json")))


def test_weights_and_checkpoints_are_on_the_volume_and_the_product_is_in_the_run(trained: Path) -> None:
    assert len(list((trained / "weights").glob("v-*/sync_manifest.json"))) == 2  # what is old is gone
    for step in (5, 10):
        checkpoint = trained / "checkpoints" / f"step-{step}"
        assert json.loads((checkpoint / "actor.json").read_text()) == {"consumed": step}
        assert (checkpoint / "optimizer.pt").is_file()
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()


def test_nothing_is_left_of_the_roles(trained: Path, cloud: Cloud) -> None:
    wait_until(lambda: not running(cloud), 20, "the end of all containers")
    assert roles_apps(cloud) == []


def test_a_finished_run_is_fetched_with_its_adapter(trained: Path, cloud: Cloud) -> None:
    done = cloud.call("fetch", "--run", "mrl")
    assert done.returncode == 0, done.stderr
    here = cloud.folder / "outputs" / "mrl" / "adapter" / "adapter_model.safetensors"
    assert here.read_bytes() == (trained / "adapter" / "adapter_model.safetensors").read_bytes()


def test_reward_and_checkpoints_are_checked_in_a_container(trained: Path, cloud: Cloud) -> None:
    before = len(cloud.events("task_start"))
    done = cloud.call("check", "reward", "--config", SMOKE, *texts(run_name="mrl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"kind": "gold"' in done.stdout and "run mrl.check: done" in done.stdout
    done = cloud.call("check", "checkpoints", "--config", SMOKE, *texts(run_name="mrl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-5: 5 batches" in done.stdout and "2 complete checkpoints in /outputs/mrl" in done.stdout
    starts = cloud.events("task_start")[before:]
    assert [event["function"] for event in starts] == ["notebook", "notebook"]


def test_roles_on_one_gpu_each_are_all_that_can_be_asked_for(cloud: Cloud) -> None:
    done = cloud.call("check", "sync", "--config", SMOKE, "-p", "modal.roles.worker_gpu=A10:2")
    assert done.returncode == 2 and "a role uses one GPU: write A10" in done.stderr
