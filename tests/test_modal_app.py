"""What the app defines, ships, refuses and keeps secret, seen by the server that the real client talks to."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cloud import APP, Cloud, result
from jupyter_lab import lab
from runners import CONFIG, LEDGER, NOTEBOOK, TASK, same_results

from lib.cost import load_prices
from lib.remote import LARGEST_IN_ALL

SMOKE = "configs/smoke/decisions.yaml"
CANARY = "sk-canary-7f3a91c2e5d84b60"
OTHER = 'hf-canary"with\\quotes-5511'
PLACE = "postgres://ada:canary-77@db/base"  # its variable's name does not look like a secret's
VOLUMES = {
    "/cache": "grpo-workbench-cache-ada-default",
    "/data": "grpo-workbench-data-ada-default",
    "/outputs": "grpo-workbench-outputs-ada-default",
}

# A careless task: it shows its keys on the terminal, in a note of every score, and would in an exception.
CARELESS = (
    TASK
    + """

import os
import sys

KEYS = [os.environ.get(name, "") for name in ("OPENAI_API_KEY", "MY_TOKEN", "DATABASE_URL")]
print("the keys are", *KEYS)
sys.stderr.write(f"{KEYS}\\n")
if os.path.isdir("/outputs/careless"):  # it is loaded on the caller's machine too
    with open("/outputs/careless/mine.txt", "w") as file:
        file.write(" ".join(KEYS))
"""
)


@pytest.fixture(scope="module")
def careless(cloud: Cloud) -> Path:
    """A user's own task and config, in a container with secrets, a GPU list and every knob turned; its run folder."""
    assert cloud.modal("secret", "create", "openai-secret", f"OPENAI_API_KEY={CANARY}").returncode == 0
    assert cloud.modal("secret", "create", "mine", f"MY_TOKEN={OTHER}").returncode == 0
    assert cloud.modal("secret", "create", "db-secret", f"DATABASE_URL={PLACE}").returncode == 0
    cloud.write("mine/witnessed.py", CARELESS)
    cloud.write("mine/words.txt", "crane\nslate\n")
    cloud.write("mine/.env", f"SECRET={CANARY}\n")
    cloud.write("mine/run.yaml", CONFIG.format(task="mine/witnessed.py"))
    texts = [f"task.ledger=/outputs/careless/{LEDGER}", "run_name=careless", "modal.packages=[textstat==0.7.8]"]
    texts.append("modal.secrets=[openai-secret, mine, db-secret]")
    done = cloud.call(
        *["run", "--notebook", NOTEBOOK, "--config", "mine/run.yaml", "--gpu", "h100,A10G:2,A100-80GB"],
        *["--cpu", "2", "--memory", "4", "--timeout", "0.5", "--retries", "2"],
        *[part for text in texts for part in ("-p", text)],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (cloud.folder / "shown.txt").write_text(done.stdout + done.stderr)
    return cloud.run_folder("careless")


def test_the_recorded_function_is_what_config_and_command_line_say(careless: Path, cloud: Cloud) -> None:
    found = cloud.definition("notebook")
    assert found["gpus"] == ["H100:1", "A10:2", "A100-80GB:1"]
    assert (found["cpu"], found["memory"], found["timeout"]) == (2.0, 4096, 1800)
    assert found["retries"]["retries"] == 2 and found["single_use"]
    assert {mount: volume["name"] for mount, volume in found["volumes"].items()} == VOLUMES
    assert not any(volume["read_only"] for volume in found["volumes"].values())
    assert found["secrets"] == ["openai-secret", "mine", "db-secret"]
    assert (found["app"], found["module"], found["schedule"]) == (APP, "lib.container", None)


def test_the_image_is_the_gpu_lock_the_pinned_packages_and_the_caches(careless: Path, cloud: Cloud) -> None:
    layers = "\n".join(cloud.definition("notebook")["image"])
    assert "FROM nvidia/cuda:13" in layers and "--no-deps" in layers and "cuda.lock" in layers
    assert "textstat==0.7.8" in layers
    for variable in ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
        assert re.search(rf"ENV {variable}=.?/cache/", layers), variable


def test_the_container_gets_the_code_and_the_named_files_and_nothing_else(careless: Path, cloud: Cloud) -> None:
    mounted = cloud.definition("notebook")["mounted_files"]
    assert {path.split("/")[2] for path in mounted} == {"lib", "notebooks", "configs", "mine"}
    assert {path for path in mounted if path.startswith("/root/mine")} == {
        "/root/mine/run.yaml",
        "/root/mine/witnessed.py",
    }
    assert not [path for path in mounted if "__pycache__" in path or "/." in path]
    assert not [path for path in mounted if path.startswith(tuple(VOLUMES))]  # a mount path must be empty in the image
    sizes = [(cloud.folder / path.removeprefix("/root/")).stat().st_size for path in mounted]
    assert sum(sizes) <= LARGEST_IN_ALL


def test_no_secret_is_anywhere_but_in_its_channel(careless: Path, cloud: Cloud) -> None:
    shown = (cloud.folder / "shown.txt").read_text()
    assert "the keys are <OPENAI_API_KEY> <MY_TOKEN> <DATABASE_URL>" in shown
    executed = (careless / "notebooks" / "3_grpo_training.ipynb").read_text()
    assert "<OPENAI_API_KEY>" in executed
    assert (careless / "mine.txt").read_text() == "<OPENAI_API_KEY> <MY_TOKEN> <DATABASE_URL>"
    assert cloud.core.leaks() == []
    values = [CANARY, OTHER, PLACE, json.dumps(OTHER)[1:-1]]
    places = [path for path in Path(cloud.core.state).rglob("*") if path.is_file() and path.name != "objects.json"]
    own = [path for path in places if "root/mine" not in str(path)]
    assert len(own) > 50
    assert [path for path in own for value in values if value.encode() in path.read_bytes()] == []
    assert not [value for value in values if value in shown]


def test_the_server_would_have_seen_a_leak(careless: Path, cloud: Cloud) -> None:
    leak = cloud.volume("outputs") / "leak.txt"
    leak.write_text(CANARY)
    try:
        assert cloud.core.leaks() == [(str(leak.relative_to(cloud.core.state)), "OPENAI_API_KEY")]
    finally:
        leak.unlink()


def test_a_container_gives_what_a_lab_kernel_gives(
    careless: Path, cloud: Cloud, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "witnessed.py").write_text(TASK)
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(task=folder / "witnessed.py"))
    run = folder / "outputs" / "lab"
    overrides = {
        "paths.outputs": str(run.parent),
        "paths.cache": str(folder / "cache"),
        "task.ledger": str(run / LEDGER),
    }
    with lab(tmp_path_factory.mktemp("server")) as server:
        server.run_notebook(Path(NOTEBOOK), {"config": str(config), "run_name": "lab", "overrides": overrides})
    same_results(run, careless)


def test_the_bill_is_by_the_first_gpu_where_the_machine_names_none(careless: Path) -> None:
    (attempt,) = [json.loads(path.read_text()) for path in (careless / "cost").glob("*.json")]
    assert attempt["gpu"] == "H100" and attempt["rates"]["gpu"] == load_prices().gpu["H100"]
    assert result(careless)["cost"]["usd"] > 0


def test_a_budget_stops_a_run_in_a_container_after_a_checkpoint(cloud: Cloud, careless: Path) -> None:
    limit = 0.05
    rate = load_prices().gpu["B200"] * 8  # about a cent and a half a second
    texts = ["run_name=capped", "training.steps=2000", "training.save_steps=500", f"cost.budget_usd={limit * 5}"]
    done = cloud.call(
        *["run", "--notebook", NOTEBOOK, "--config", SMOKE, "--gpu", "B200:8", "--cpu", "0.125", "--memory", "1"],
        *[part for text in texts for part in ("-p", text)],
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "the budget is used up" in done.stdout
    run = cloud.run_folder("capped")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = (run / "checkpoints").glob("step-*")
    assert last.name == f"step-{metrics[-1]['step']}" and 0 < len(metrics) < 2000
    # What the container's end costs (its notebook, its volume) comes after the training that the budget is for.
    assert result(run)["cost"]["usd"] < limit * 5 + rate / 3600 * 8


# data -----------------------------------------------------------------------------------------------------------------
def table(rows: int) -> str:
    lines = ["id,prompt,q_action_0,q_action_1"]
    lines += [f"r{n},hour {n} " + "x" * 100 + f",{n % 7},{n % 5}" for n in range(rows)]
    return "\n".join(lines) + "\n"


def test_large_data_travels_by_the_volume_and_is_verified_there(cloud: Cloud, tmp_path: Path) -> None:
    outside = tmp_path / "tables"
    outside.mkdir()
    (outside / "a.csv").write_text(table(3000))
    cloud.write("mine/data.yaml", f"task: {{name: decisions, path: {outside}}}\nstarter: {{steps: 1}}\n")
    command = ["run", "--notebook", "1_data_prep", "--config", "mine/data.yaml", "--gpu", "none"]
    refused = cloud.call(*command)
    assert refused.returncode == 2 and "not on the data volume" in refused.stderr and "::upload" in refused.stderr
    done = cloud.call("upload", "--config", "mine/data.yaml")
    assert done.returncode == 0 and "a.csv: verified" in done.stdout, done.stdout + done.stderr
    again = cloud.call("upload", "--config", "mine/data.yaml")
    assert "0 of 1 files uploaded" in again.stdout
    ran = cloud.call(*command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = (cloud.run_folder("data") / "rows" / "train.jsonl").read_text().splitlines()
    assert len(rows) > 1000 and all("hour " in row for row in rows)
    lost = next(cloud.volume("data").rglob("a.csv"))
    lost.unlink()
    mended = cloud.call("upload", "--config", "mine/data.yaml")
    assert mended.returncode == 0 and "0 of 1 files" in mended.stdout and "1 of 1 files" in mended.stdout
    assert lost.is_file()
    (outside / "a.csv").write_text(table(3001))
    changed = cloud.call(*command)
    assert changed.returncode == 2 and "another version of it is on the data volume" in changed.stderr
    (outside / "a.csv").rename(outside / "b.csv")
    renamed = cloud.call(*command)
    assert "a.csv: is on the data volume, but no longer here" in renamed.stderr
    assert "removed there" in cloud.call("upload", "--config", "mine/data.yaml").stdout
    assert not lost.is_file() and lost.with_name("b.csv").is_file()


def test_a_file_that_arrives_damaged_is_not_called_verified(cloud: Cloud, tmp_path: Path) -> None:
    from lib.container import FileFact

    data = cloud.volume("data")
    (data / "damaged.bin").write_bytes(b"half")
    whole = tmp_path / "whole.bin"
    whole.write_bytes(b"whole")
    facts = {"damaged.bin": FileFact.of(whole).model_dump(), "gone.bin": FileFact.of(whole).model_dump()}
    code = (
        "import modal, json, sys; "
        "f = modal.Function.from_name('verifier', 'verify_upload'); "
        f"print(f.remote(json.loads({json.dumps(facts)!r}), []))"
    )
    app = "import lib.modal_app as m, modal; from lib.experiment import read_experiment; from lib import container\n"
    app += "app = modal.App('verifier', include_source=False); m._verifier(app, read_experiment())\n"
    cloud.write("verifier.py", app)
    assert cloud.modal("deploy", "verifier.py").returncode == 0
    shown = cloud._run([sys.executable, "-c", code], {})
    assert "damaged.bin: 4 bytes there, 5 here" in shown.stdout and "gone.bin: missing" in shown.stdout, shown.stderr
    assert "damaged.bin" not in (data / "manifest.json").read_text()


def test_two_experiments_share_no_volume(cloud: Cloud, careless: Path) -> None:
    shown = cloud.call("checkpoints", EXPERIMENT_NAME="second")
    assert "no runs on grpo-workbench-outputs-ada-second" in shown.stdout
    other = cloud.call("fetch", "--run", "careless", EXPERIMENTER="bob")
    assert other.returncode == 2 and "grpo-workbench-outputs-bob-default" in other.stderr


# refusals -------------------------------------------------------------------------------------------------------------
def refused(cloud: Cloud, *more: str, **environment: str) -> str:
    """What a run says that cannot start; nothing may have started."""
    before = len(cloud.events("task_start"))
    done = cloud.call("run", "--notebook", NOTEBOOK, "--config", SMOKE, *more, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(cloud.events("task_start")) == before
    return done.stderr


def test_a_wrong_gpu_is_refused_with_those_that_there_are(cloud: Cloud) -> None:
    assert "Allowed: T4, L4, A10, L40S, A100" in refused(cloud, "--gpu", "V100")
    assert "one container can have 1 to 4 A10" in refused(cloud, "--gpu", "A10G:8")


def test_a_missing_env_names_the_experimenter_and_what_to_do(cloud: Cloud) -> None:
    path = cloud.folder / ".env"
    kept = path.read_text()
    path.unlink()
    try:
        said = refused(cloud)
        assert "EXPERIMENTER is not set: .env is missing. Copy .env.example to .env" in said
        shown = cloud.call("checkpoints", EXPERIMENTER="ada")  # the shell is enough
        assert shown.returncode == 0
    finally:
        path.write_text(kept)


def test_whoever_is_not_logged_in_is_told_how(cloud: Cloud) -> None:
    said = refused(cloud, MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="", MODAL_CONFIG_PATH="/nonexistent/modal.toml")
    assert "not logged in to Modal" in said and "modal setup" in said


def test_all_missing_secrets_are_named_before_anything_starts(cloud: Cloud) -> None:
    said = refused(cloud, "-p", "modal.secrets=[gemini-secret, no-such-secret]")
    assert "gemini-secret: modal secret create gemini-secret GEMINI_API_KEY=" in said and "no-such-secret:" in said


def test_a_secret_of_env_is_used_where_modal_has_none(cloud: Cloud) -> None:
    done = cloud.call(
        *["run", "--notebook", "1_data_prep", "--config", SMOKE, "--gpu", "none", "-p", "run_name=from-env"],
        *["-p", "modal.secrets=[gemini-secret]", "-p", "starter.steps=1"],
        GEMINI_API_KEY="gm-canary-0123456789",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.definition("notebook")["secrets"] == [["GEMINI_API_KEY"]]
    assert cloud.core.leaks() == []


def test_an_empty_modal_secret_is_refused(cloud: Cloud) -> None:
    assert cloud.modal("secret", "create", "huggingface-secret", "NOTHING=here").returncode == 0
    try:
        said = refused(cloud, "-p", "modal.secrets=[huggingface-secret]")
    finally:  # the cloud is the whole session's: an endpoint of another test would be refused for it
        assert cloud.modal("secret", "delete", "huggingface-secret", "--yes").returncode == 0
    assert "does not set HF_TOKEN" in said and "modal secret create --force" in said


def test_a_secret_among_the_parameters_is_refused_without_repeating_it(cloud: Cloud) -> None:
    said = refused(cloud, "-p", "tracker.project=gm-canary-0123456789", GEMINI_API_KEY="gm-canary-0123456789")
    assert "the parameter tracker.project holds the value of a secret" in said and "gm-canary" not in said


def test_a_secret_in_a_file_that_would_travel_is_refused(cloud: Cloud) -> None:
    path = cloud.write("configs/mine.yaml", "# gm-canary-0123456789\ntask: {name: decisions}\n")
    try:
        said = refused(cloud, GEMINI_API_KEY="gm-canary-0123456789")
    finally:
        path.unlink()
    assert "the file mine.yaml holds the value of a secret" in said and "gm-canary" not in said


def test_data_that_is_nowhere_is_named_before_anything_starts(cloud: Cloud) -> None:
    said = refused(cloud, "-p", "task.path=nowhere/tables")
    assert "nowhere/tables: neither here nor on the data volume" in said


def test_unknown_notebooks_and_unusable_run_names_are_refused(cloud: Cloud) -> None:
    done = cloud.call("run", "--notebook", "9_none", "--config", SMOKE)
    assert done.returncode == 2 and "notebook not found: 9_none" in done.stderr
    for name in ("../x", "a/b", ".hidden"):
        assert "is not usable" in refused(cloud, "-p", f"run_name={name}")


def test_a_second_writer_of_a_run_is_refused_here_and_in_the_container(cloud: Cloud, careless: Path) -> None:
    claim = careless / "writers" / "fc-other.json"
    claim.parent.mkdir(exist_ok=True)
    claim.write_text(json.dumps({"call": "fc-other", "container": "ta-x", "notebook": "3", "seen": time.time()}))
    said = refused(cloud, "-p", "run_name=careless")
    assert "is being written by the call fc-other" in said
    claim.write_text(json.dumps({"call": "fc-other", "container": "ta-x", "notebook": "3", "seen": time.time() - 90}))
    from lib.container import live_writer

    assert live_writer({"fc-other": json.loads(claim.read_text())}) is None
    claim.unlink()


def test_importing_the_app_defines_nothing_and_asks_nobody(cloud: Cloud) -> None:
    code = "import lib.modal_app as m, sys; print(m.COMMAND, len(m.app.registered_functions), 'torch' in sys.modules)"
    before = len(cloud.core.events)
    shown: Any = cloud._run([sys.executable, "-c", code], {})
    assert shown.stdout.strip() == "None 0 False", shown.stderr
    assert len(cloud.core.events) == before


def test_verl_has_an_environment_of_its_own_in_the_image(cloud: Cloud) -> None:
    done = cloud.call(
        *["run", "--notebook", "1_data_prep", "--config", "configs/smoke/verl.yaml", "--gpu", "H100:2"],
        *["-p", "verl.gpus=2", "-p", "modal.packages=[textstat==0.7.8]", "-p", "run_name=verl-image"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = cloud.definition("notebook")
    layers = "\n".join(found["image"])
    assert found["gpus"] == ["H100:2"] and "cuda.lock" in layers
    install = "uv pip install --no-cache --python /root/build/verl/bin/python"
    assert f"{install} --no-deps -r /tmp/verl.lock" in layers and f"{install} textstat==0.7.8" in layers


def test_gpus_that_verl_cannot_share_evenly_are_refused_before_a_container_starts(cloud: Cloud) -> None:
    before = len(cloud.events("task_start"))
    done = cloud.call("run", "--notebook", NOTEBOOK, "--config", "configs/ace_verl.yaml", "--gpu", "H100:3")
    assert done.returncode == 2 and "3 GPUs cannot share them evenly" in done.stderr, done.stderr
    assert len(cloud.events("task_start")) == before
