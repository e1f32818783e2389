"""verl on several containers of Modal: one call, one Ray cluster, one run, one bill.

The real client against the loopback server, which starts a container for every machine (tests/cloud.py). Ray is not
there: a small process stands for it (tests/machine_stand_in.py), and a notebook of the same name for notebook 3.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from cloud import APP, Cloud, result, wait_until

from lib.config import load_config
from lib.cost import load_prices, rates
from lib.remote import container_resources

SMOKE = "configs/smoke/verl.yaml"
NOTEBOOK = "mine/3_grpo_training.ipynb"
TWO = ["verl.nodes=2", "verl.gpus=8", "training.group_size=8"]
GPUS = ["--gpu", "H100:8,H200:8", "--cpu", "2", "--memory", "4"]

# What of notebook 3 is about machines; a run called `slow` trains for a while.
CELL = """
import json, os, socket, time
from lib.config import load_config
from lib.runfolder import open_run

cfg = load_config(config, overrides)
run = open_run(run_name, cfg, default=config)
host, port = cfg.verl.ray_address.split(":")
socket.create_connection((host, int(port)), timeout=5).close()
token = os.environ["RAY_AUTH_TOKEN"]
print("the token is", token)
run.path("seen.json").write_text(json.dumps({"where": cfg.where, "token": token, **cfg.verl.model_dump(mode="json")}))
time.sleep(60 if run_name == "slow" else 0)
"""

SCHEDULE = f"""
entries:
  - name: weekly-verl
    notebook: {NOTEBOOK}
    config: {SMOKE}
    cron: "0 6 * * 1"
    gpu: H100:8
    parameters: {{verl.nodes: 2, verl.gpus: 8, training.group_size: 8}}
"""


def sent(cloud: Cloud, run: str, *more: str) -> subprocess.CompletedProcess[str]:
    texts = [*TWO, f"run_name={run}", *more]
    given = [part for text in texts for part in ("-p", text)]
    return cloud.call("run", "--notebook", NOTEBOOK, "--config", SMOKE, *GPUS, *given)


@pytest.fixture(scope="module")
def notebook(cloud: Cloud) -> None:
    parameters = nbformat.v4.new_code_cell('config: str = ""\nrun_name: str = ""\noverrides: dict = {}')
    parameters.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(CELL)])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cloud.write(NOTEBOOK, nbformat.writes(book))


@pytest.fixture(scope="module")
def together(cloud: Cloud, notebook: None) -> Path:
    """The folder of a run that two containers did together; what was shown lies beside it."""
    done = sent(cloud, "together")
    assert done.returncode == 0, done.stdout + done.stderr
    (cloud.folder / "together.txt").write_text(done.stdout + done.stderr)
    return cloud.run_folder("together")


@pytest.fixture
def manner(cloud: Cloud) -> Iterator[Any]:
    def behave(how: str) -> None:
        cloud.core.manner = how

    yield behave
    cloud.core.manner = ""


def test_the_function_is_a_cluster_of_whole_hosts_with_rdma(together: Path, cloud: Cloud) -> None:
    found = cloud.definition("notebook")
    assert (found["cluster_size"], found["rdma"], found["gpus"]) == (2, True, ["H100:8", "H200:8"])
    assert found["single_use"] and found["retries"] and not found["max_containers"]
    layers = "\n".join(found["image"])
    assert "libibverbs1" in layers and "ibverbs-providers" in layers and "verl.lock" in layers


def test_the_first_machine_trains_on_the_cluster_of_all(together: Path) -> None:
    seen = json.loads((together / "seen.json").read_text())
    assert (seen["where"], seen["ray_address"], seen["gpus"], seen["nodes"]) == ("here", "127.0.0.31:6379", 8, 2)


def test_the_clusters_token_is_another_one_for_every_call_and_is_not_shown(together: Path, cloud: Cloud) -> None:
    assert json.loads((together / "seen.json").read_text())["token"] == "<RAY_AUTH_TOKEN>"  # taken out of run folders
    assert "the token is <RAY_AUTH_TOKEN>" in (together / "notebooks" / "3_grpo_training.ipynb").read_text()
    given = ["--config", SMOKE, *GPUS, *[part for text in TWO for part in ("-p", text)]]
    code = "import sys, lib.modal_app as m\nwords = ['modal', 'run', '-m', 'lib.modal_app::run', *sys.argv[1:]]\n"
    code += "print(len({m.define_for(m.read_command(words)).jobs[0].token for _ in range(2)}))"
    shown = cloud._run([sys.executable, "-c", code, "--notebook", NOTEBOOK, *given], {})
    assert shown.stdout == "2\n", shown.stderr


def test_the_other_machine_joins_it_and_writes_nothing(together: Path, cloud: Cloud) -> None:
    said = (cloud.folder / "together.txt").read_text()
    assert "machine 2 of 2: lent to the Ray cluster at 127.0.0.31:6379" in said
    (attempt,) = [path.stem for path in (together / "cost").glob("*.json")]
    (idle,) = {event["task"] for event in cloud.events("task_start")[-2:]} - {attempt}
    assert not [rpc for rpc, task, _ in cloud.core.raw if task == idle and rpc.startswith("Volume")]
    assert not list((Path(cloud.core.state) / "tasks" / idle / "vol").glob("*/together"))


def test_the_bill_and_the_quote_count_every_machine(together: Path) -> None:
    (attempt,) = [json.loads(path.read_text()) for path in (together / "cost").glob("*.json")]
    prices = load_prices()
    wanted = {"modal.gpu": "H100:8", "modal.cpu": 2, "modal.memory": 4}
    one, two = (container_resources(load_config(SMOKE, wanted | {"verl.nodes": nodes})) for nodes in (1, 2))
    assert attempt["rates"] == rates(two[0], prices)
    assert attempt["rates"] == {role: 2 * rate for role, rate in rates(one[0], prices).items()}
    assert result(together)["cost"]["usd"] > 0


def test_a_head_that_does_not_start_is_the_calls_result(cloud: Cloud, notebook: None, manner: Any) -> None:
    manner("exits")
    done = sent(cloud, "headless")
    assert done.returncode == 1 and "run headless: failed" in done.stdout, done.stdout + done.stderr
    assert "Ray's head did not start" in done.stdout and "Ray found no address of this machine" in done.stdout
    assert not (cloud.run_folder("headless") / "writers").is_dir() or not list(
        (cloud.run_folder("headless") / "writers").glob("*.json")
    )


def test_a_head_that_dies_ends_the_training_that_waits_for_it(cloud: Cloud, notebook: None, manner: Any) -> None:
    manner("dies")
    done = sent(cloud, "slow")
    assert done.returncode == 1 and "run slow: failed" in done.stdout, done.stdout + done.stderr
    assert "Ray's head exited with status 1 while it was needed" in done.stdout and "lost its disk" in done.stdout


def test_a_schedule_ticks_on_several_machines_into_one_run(cloud: Cloud, notebook: None) -> None:
    file = cloud.folder / "configs" / "schedule.yaml"
    kept = file.read_text()
    file.write_text(SCHEDULE)
    try:
        done = cloud.modal("deploy", "-m", "lib.modal_app")
        assert done.returncode == 0, done.stdout + done.stderr
        found = cloud.definition("weekly-verl")
        assert found["cluster_size"] == 2 and found["schedule"] and found["gpus"] == ["H100:8"]
        body = json.dumps({"app": APP, "function": "weekly-verl", "timeout": 60}).encode()
        with urllib.request.urlopen(f"{cloud.server.http_url}/control/fire", data=body, timeout=90) as answer:
            assert json.loads(answer.read())["status"] == "GENERIC_STATUS_SUCCESS"
    finally:
        file.write_text(kept)
    (run,) = cloud.volume("outputs").glob("weekly-verl-20*")
    assert len(list((run / "cost").glob("*.json"))) == 1
    machines = [event["task"] for event in cloud.events("task_start")[-2:]]
    wait_until(lambda: not {*machines} - {event["task"] for event in cloud.events("task_end")}, what="their ends")
    done_by = [event["status"] for event in cloud.events("input_done") if event["task"] in machines]
    assert done_by == ["GENERIC_STATUS_SUCCESS"] * 2  # nobody ends the one that joined: it leaves with the head


def defined(cloud: Cloud, *commands: list[str]) -> list[Any]:
    """For every command: machines of each job, names of the app's functions. Nothing is started."""
    code = (
        "import json, sys, lib.modal_app as m\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    found = m.define_for(m.read_command(['modal', 'run', '-m', *words]))\n"
        "    print(json.dumps([[job.nodes for job in found.jobs], sorted(found.app.registered_functions)]))"
    )
    shown = cloud._run([sys.executable, "-c", code, json.dumps(commands)], {})
    assert shown.returncode == 0, shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


def test_only_what_trains_takes_several_machines(cloud: Cloud, notebook: None) -> None:
    given = ["--config", SMOKE, *GPUS, *[part for text in TWO for part in ("-p", text)]]
    others = ["1_data_prep", "2_reward_inspection", "4_adapter_evaluation", "5_export_and_serve"]
    runs = [["lib.modal_app::run", "--notebook", name, *given] for name in ("3_grpo_training", *others)]
    sweep = ["lib.modal_app::sweep", "--notebook", NOTEBOOK, *given, "--grid", "training.seed=1,2"]
    probe = ["lib.modal_app::quote", "--probe", "5", *given]
    found = defined(cloud, *runs, sweep, probe)
    assert found[:5] == [[[nodes], ["notebook"]] for nodes in (2, 1, 1, 1, 1)]
    assert found[5:] == [[[2, 2, 1], ["compare", "notebook"]], [[2], ["notebook"]]]
