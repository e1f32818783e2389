"""The endpoint on Modal: what configs/serve.yaml may say, what a deploy refuses, and one that the openai client asks.

Modal is the stand-in on loopback: the endpoint's container really starts there, with the engine of one without a GPU.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloud import Cloud, wait_until
from tiny_models import tiny_adapter, tiny_qwen2

from lib import PROJECT_ROOT
from lib.client import AskError, ask_url
from lib.config import load_config
from lib.config.serve import ServeSection
from lib.export import export_run
from lib.front import TOKEN
from lib.hosts import answers
from lib.modal_serve import FILE, ServeError, read_serving
from lib.relay import Relay
from lib.runfolder import open_run

SECRET = "a-token-of-the-tests-77e0"
EXPERIMENT = "served"
"""An app and volumes of its own: other tests deploy too."""
RUN = "toy"
PROMPTS = [[{"role": "user", "content": text}] for text in ("What is 2 + 2?", "Prices are 10, 20 and 40.")]


def refusal(folder: Path, text: str) -> str:
    (folder / "serve.yaml").write_text(text)
    with pytest.raises(ServeError) as caught:
        read_serving(folder / "serve.yaml")
    return str(caught.value)


def test_the_committed_file_serves_nothing_and_asks_for_a_token() -> None:
    assert read_serving(FILE) == ServeSection() and not ServeSection().public


def test_every_key_of_the_committed_file_is_at_its_default() -> None:
    written = yaml.safe_load(FILE.read_text())["serve"]
    assert written == {name: value for name, value in ServeSection().model_dump().items() if name in written}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("serve: {run: a}", "artifact is empty"), ("serve: {artifact: merged}", "run is empty"),
        ("serve: {gpu: H101}", "unknown GPU 'H101'"), ("serve: {gpu: 'H100:2'}", "runs on one GPU"),
        ("serve: {idle_seconds: 0}", "idle_seconds"), ("serve: {publik: true}", "publik: unknown key"),
        ("serve: {secret: 'sk 123'}", "the NAME of a Modal secret"), ("server: {}", "server: unknown key"),
        ("serve: {run: a, run: b}", "twice"), ("a: b: c", "cannot be read"), ("[]", "cannot be used"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


def test_a_relay_whose_server_is_gone_says_so_and_has_it_replaced() -> None:
    lost: list[int] = []
    sent: list[Any] = []

    async def on_lost() -> None:
        lost.append(1)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        relay = Relay(1, on_lost)
        await relay({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}, receive, send)
        assert relay._session is not None
        await relay._session.close()

    asyncio.run(ask())
    assert lost == [1] and sent[0]["status"] == 503 and "has ended" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_relay_asks_no_other_host_whatever_the_path() -> None:
    sent: list[Any] = []

    async def nothing() -> None:
        raise AssertionError("nothing was asked")

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing was read")

    async def send(message: Any) -> None:
        sent.append(message)

    relay = Relay(8000, nothing)
    scope = {"type": "http", "method": "GET", "path": "@127.0.0.1:1/v1/models", "query_string": b"", "headers": []}
    asyncio.run(relay(scope, receive, send))
    assert sent[0]["status"] == 400 and relay._session is None


# -- on the stand-in ---------------------------------------------------------------------------------------------------


def deploy(cloud: Cloud) -> subprocess.CompletedProcess[str]:
    return cloud.modal("deploy", "-m", "lib.modal_app", EXPERIMENT_NAME=EXPERIMENT)


@pytest.fixture(scope="module")
def named(cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """The project's copy with a file that names a run; the run is on the volume, its export a tiny random model."""
    folder = tmp_path_factory.mktemp("served")
    base = tiny_qwen2(folder / "base")
    places = {"paths.outputs": str(folder), "paths.cache": str(folder / "cache"), "export.artifacts": ["merged"]}
    small = {"modal.cpu": 1, "modal.memory": 2, "sampling.vllm.max_length": 256, "model.name": str(base)}
    run = open_run(RUN, load_config("configs/smoke/decisions.yaml", places | small))
    run.begin("training", ("lora",), {})
    run.end("training", {"path": "adapter", "steps": 1})
    tiny_adapter(base, run.folder / "adapter")
    export_run(run)
    (run.folder / "export" / "mxfp4").mkdir()
    assert cloud.modal("run", "-m", "lib.modal_app::checkpoints", EXPERIMENT_NAME=EXPERIMENT).returncode == 0
    shutil.copytree(run.folder, cloud.volume("outputs", f"ada-{EXPERIMENT}") / RUN)
    cloud.write("configs/serve.yaml", f"serve: {{run: {RUN}, artifact: merged, gpu: none, idle_seconds: 60}}\n")
    yield cloud
    cloud.write("configs/serve.yaml", (PROJECT_ROOT / "configs" / "serve.yaml").read_text())


def test_without_its_secret_nothing_is_deployed(named: Cloud) -> None:
    done = deploy(named)
    assert (
        done.returncode == 2 and "the Modal secret 'serve-secret' does not exist; nothing was deployed" in done.stderr
    )
    assert f"modal secret create serve-secret {TOKEN}=..." in done.stderr
    assert named.modal("secret", "create", "serve-secret", "OTHER=1").returncode == 0
    lacking = deploy(named)
    assert lacking.returncode == 2 and f"does not set {TOKEN}" in lacking.stderr and "create --force" in lacking.stderr


def test_a_hub_secret_without_its_key_is_told_as_that(named: Cloud) -> None:
    assert named.modal("secret", "create", "--force", "serve-secret", f"{TOKEN}={SECRET}").returncode == 0
    assert named.modal("secret", "create", "huggingface-secret", "OTHER=1").returncode == 0
    try:
        done = deploy(named)
    finally:
        assert named.modal("secret", "delete", "huggingface-secret", "--yes").returncode == 0
    assert done.returncode == 2 and "'huggingface-secret' does not set HF_TOKEN" in done.stderr
    assert "modal secret create --force huggingface-secret HF_TOKEN=...), or take it away" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: other, artifact: merged", "there is no run 'other' on grpo-workbench-outputs-ada-served"),
        (f"run: {RUN}, artifact: mxfp4", "has no whole export 'mxfp4'"),
        (f"run: {RUN}, artifact: ollama", "artifact 'ollama' cannot be served by vLLM or Transformers"),
    ],
)
def test_what_is_not_on_the_volume_is_refused_at_deploy(named: Cloud, text: str, told: str) -> None:
    before = (named.folder / "configs" / "serve.yaml").read_text()
    named.write("configs/serve.yaml", f"serve: {{{text}}}\n")
    done = deploy(named)
    named.write("configs/serve.yaml", before)
    assert done.returncode == 2 and told in done.stderr


@pytest.fixture(scope="module")
def url(named: Cloud) -> str:
    """The deployed endpoint's address, as the client told it."""
    assert named.modal("secret", "create", "--force", "serve-secret", f"{TOKEN}={SECRET}").returncode == 0
    done = deploy(named)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"endpoint: merged of toy, with a token; a container costs about \$0\.\d\d an hour", done.stdout)
    found = re.search(r"http://127\.0\.0\.1:\d+/w/\S+", done.stdout.replace("\n", ""))
    assert found, done.stdout
    return found[0]


def test_the_definition_scales_to_zero_and_holds_no_token(url: str, named: Cloud) -> None:
    found = named.definition("serve")
    assert (found["min_containers"], found["max_containers"], found["scaledown"]) == (0, 1, 60)
    assert (found["gpus"], found["concurrent"], found["webhook"]) == ([None], 64, "WEBHOOK_TYPE_ASGI_APP")
    assert found["module"] == "lib.modal_serve" and "serve-secret" in found["secrets"]
    assert not found["single_use"] and set(found["volumes"]) == {"/cache", "/data", "/outputs"}
    assert not [leak for leak in named.core.leaks() if leak[1] == TOKEN]


def test_the_openai_client_asks_the_endpoint_and_nobody_does_without_the_token(
    url: str, named: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: answers(f"{url}/health", 70), 300, "the container")  # the stand-in waits 60 s for an answer
    monkeypatch.setenv(TOKEN, SECRET)
    whole = ask_url(f"{url}/v1", PROMPTS, 12)
    streamed = ask_url(f"{url}/v1", PROMPTS, 12, stream=True, model=f"{RUN}-merged")
    for one, other in zip(whole, streamed, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0} and one["tokens"] > 0
    for token in ("", "a-wrong-token-of-that-size"):
        monkeypatch.setenv(TOKEN, token)
        with pytest.raises(AskError, match="HTTP 401"):
            ask_url(f"{url}/v1", PROMPTS[:1], 4)
    assert not [leak for leak in named.core.leaks() if leak[1] == TOKEN]
    assert SECRET not in named.logs()
