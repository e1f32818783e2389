"""Serving: what is served and told, and the real vLLM server, started once, evaluated over HTTP and killed at last."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_server import running_chat
from conftest import WITNESS, run_cli

from lib import PROJECT_ROOT, WorkbenchError, calls, models
from lib.client import AskError, ask_folder, ask_url
from lib.config import Config, load_config
from lib.config.training import VllmSection
from lib.engine import ADVICE, Address, Served, memory_arguments, program, tool_parser, vllm_arguments
from lib.evaluate import evaluate_run
from lib.export import ExportError, export_run
from lib.front import TOKEN, front_environment
from lib.generate import Chat, end_ids, local_sample
from lib.keeper import family
from lib.prepare import prepare
from lib.program import explain
from lib.rollout import UnscoredLimitError
from lib.runfolder import Run, open_run, read_lines
from lib.serving import ServingError, base_of, own_token, result_of
from lib.starter import build_starter
from lib.task import load_task

RUN = "tools"
SECRET = "a-token-of-the-tests-51c2"
ROOMS = ("hall", "bath", "attic", "garage", "office", "kitchen")
WORDINGS = ("{room} light {on}", "light {on} in the {room}", "turn the {room} {on}", "make the {room} go {on}")


class Asked(NamedTuple):
    """A running `python -m lib.run serve`."""

    process: subprocess.Popen[str]
    told: dict[str, str]
    """What it said once it was ready, by the first word of each line."""

    @property
    def base_url(self) -> str:
        return self.told["base_url"]


def records() -> list[dict[str, Any]]:
    """Requests for one tool, each shown with a right or a wrong call."""
    light = {
        "name": "light",
        "parameters": {
            "type": "dict",
            "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    }
    made = []
    for number, (room, on, wording) in enumerate(itertools.product(ROOMS, (True, False), WORDINGS)):
        shown = {"room": room if number % 3 else ROOMS[number % 6], "on": on if number % 5 else not on}
        made.append(
            {
                "id": f"light-{number}",
                "question": wording.format(room=room, on="on" if on else "off"),
                "function": [light],
                "ground_truth": [{"light": {"room": [room], "on": [on]}}],
                "demonstration": [{"name": "light", "arguments": shown}],
            }
        )
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task's data, its config, the runs, and a starter policy of fewer steps than usual."""
    import torch

    folder = tmp_path_factory.mktemp("serving")
    (folder / "lights.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    config = {
        "task": {"name": "functions", "path": str(folder / "lights.jsonl"), "split_ratio": 0.5, "reward": "graded"},
        "model": {"name": str(folder / "starter")},
        "sampling": {"prompt_limit": 192, "completion_limit": 16, "vllm": {"max_length": 512}},
        "evaluation": {"rows": 0, "checkpoints": False},
        "paths": {"outputs": str(folder / "outputs"), "cache": str(folder / "cache")},
    }
    (folder / "lights.yaml").write_text(json.dumps(config))
    (folder / "sitecustomize.py").write_text(WITNESS)
    rows = load_task(**config["task"]).rows("train")  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small steps: two threads only wait for each other where others use the machine too
    build_starter(rows, folder / "starter", steps=30, batch_size=8)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Who serves and who asks share their environment here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, SECRET)
        yield


def config_of(place: Path, **overrides: Any) -> Config:
    return load_config(place / "lights.yaml", {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """A run whose training is done: its adapter was not trained, it only answers differently from the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = config_of(place)
    made = open_run(RUN, config)
    prepare(load_task(config.task.name, **config.task.params), made)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    lora = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.8)
    adapted.save_pretrained(made.path("adapter"))
    made.begin("training", ("lora",), {})
    made.end("training", {"path": "adapter", "steps": 1})
    return made


def started(arguments: Sequence[str], **environment: str) -> Asked:
    """`python -m lib.run serve ...` once it said how to stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.run", "serve", *arguments], cwd=PROJECT_ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("stop "):
            return Asked(process, dict(line.split(maxsplit=1) for line in lines if re.match(r"[a-z_]+ +\S", line)))
    raise AssertionError("\n".join(lines))


@pytest.fixture(scope="module")
def server(place: Path, run: Run) -> Iterator[Asked]:
    """The run's base and adapter behind the real vLLM: the only engine that this file starts."""
    witness = {"PYTHONPATH": str(place), "WITNESS_FILE": str(place / "hosts.txt")}
    asked = started(["--run", RUN, "-p", f"paths.outputs={place / 'outputs'}"], **witness)
    yield asked
    asked.process.send_signal(signal.SIGINT)
    asked.process.communicate()


def evaluated(place: Path, name: str, greedy: bool = True, **overrides: Any) -> dict[str, list[dict[str, Any]]]:
    """The records of an evaluation of all held-out rows, by policy and decoding."""
    config = config_of(place, **overrides)
    task, made = load_task(config.task.name, **config.task.params), open_run(name, config)
    prepare(task, made)
    return evaluate_run(config, task, made).records


def endpoint(server: Asked, model: str, **values: Any) -> dict[str, Any]:
    wanted = {
        "base_url": server.base_url,
        "model": model,
        "beside_base": False,
        "timeout": 30.0,
        "key": TOKEN,
        **values,
    }
    return {f"evaluation__endpoint__{name}": value for name, value in wanted.items()}


def said(chat: Chat, record: dict[str, Any]) -> list[int]:
    """The tokens of an answer as the chat template writes it, its calls parsed or not."""
    message = record["messages"][-1] if "messages" in record else {"role": "assistant", "content": record["answer"]}
    return chat.tokenizer.encode(chat.text([message], answer=False))


# -- the real server --------------------------------------------------------------------------------------------------


def test_it_tells_the_address_the_ids_and_how_to_evaluate_it(server: Asked, place: Path, run: Run) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", server.base_url)
    assert server.told["model"] == f"{RUN} (the run's adapter), starter (its base)"
    assert server.told["serves"] == str(place / "starter")
    assert (
        server.told["token"] == f"the one in {TOKEN}" and f"evaluation.endpoint.key={TOKEN}" in server.told["evaluate"]
    )
    assert server.told["evaluate"].startswith("python -m lib.run 4_adapter_evaluation ")
    assert server.told["again"].startswith(f"--port {server.base_url.split(':')[2].split('/')[0]} ")


@pytest.fixture(scope="module")
def compared(server: Asked, place: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The command that the server told, run as it is: (run folder, records by policy and decoding)."""
    program_name, dash_m, module, *arguments = shlex.split(server.told["evaluate"])
    assert (program_name, dash_m, module) == ("python", "-m", "lib.run")
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place / "outputs" / f"{RUN}-served"
    files = (folder / "evaluation").glob("*.jsonl")
    return folder, {file.stem: list(read_lines(file)) for file in files}


def test_the_served_base_answers_token_for_token_as_the_local_one(
    server: Asked, place: Path, compared: tuple[Path, dict[str, list[dict[str, Any]]]], run: Run
) -> None:
    """No float noise here: float32 on both sides, and no two best tokens of the toy are that close."""
    local = compared[1]["base-greedy"]
    served = evaluated(place, "base-there", **endpoint(server, "starter"))["starter greedy"]
    chat = Chat(models.load_tokenizer(server.told["serves"], run.config.model))
    assert [said(chat, record) for record in served] == [said(chat, record) for record in local]
    assert [(record["row"], record["reward"]) for record in served] == [(r["row"], r["reward"]) for r in local]
    assert len({record["reward"] for record in local}) > 1


@pytest.mark.parametrize("name", ["starter", RUN])
def test_the_tokens_are_those_of_the_local_model_with_and_without_the_adapter(
    server: Asked, run: Run, name: str
) -> None:
    """Without tools, and by ids: of a text, vLLM leaves out a last character whose bytes are not all there."""
    source = server.told["serves"]
    model, tokenizer = models.load_model(source, run.config.model), models.load_tokenizer(source, run.config.model)
    if name == RUN:
        model = models.load_adapter(model, str(run.folder / "adapter"))
    chat = Chat(tokenizer, end_ids(model, tokenizer))
    prompts = [row["prompt"] for row in run.read_rows("eval")]
    sample = local_sample(model, chat, run.config.evaluation, 16, True)
    here, _ = sample([chat.prompt_ids(prompt) for prompt in prompts])
    with ThreadPoolExecutor(8) as pool:
        there = list(pool.map(lambda prompt: greedy_ids(server, name, prompt), prompts))
    differing = [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]]
    assert len(differing) <= 1, differing  # where two tokens are as good as equal, another CPU may take the other one
    if name == RUN:  # the base says hardly anything without tools; answers that do not differ would agree by chance
        assert len({tuple(ids) for ids in there}) > 8


def greedy_ids(server: Asked, name: str, prompt: list[dict[str, Any]]) -> list[int]:
    body = {"model": name, "messages": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {SECRET}"}
    request = urllib.request.Request(f"{server.base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.load(answer)["choices"][0]["token_ids"])


def test_calls_come_parsed_and_notebook_4_shows_both_policies(
    server: Asked, place: Path, compared: tuple[Path, dict[str, list[dict[str, Any]]]]
) -> None:
    folder, records = compared
    assert set(records) == {f"{name}-{how}" for name in ("base", RUN) for how in ("sampled", "greedy")}
    answers = evaluated(place, "base-there", **endpoint(server, "starter"))["starter sampled"]
    called = [call for record in answers for call in record.get("messages", [{}])[-1].get("tool_calls", [])]
    assert len(called) > 5 and {call["function"]["name"] for call in called} == {"light"}
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in called)
    cells = json.loads((folder / "notebooks" / "4_adapter_evaluation.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    page = "\n".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert f"{RUN} against base" in page and "assistant, turn 1" in page


def asked_raw(server: Asked, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """A request to a path of the whole server: (status, JSON or text)."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(server.base_url.removesuffix("/v1") + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def prompts_of(run: Run) -> list[list[dict[str, Any]]]:
    return [row["prompt"] for row in run.read_rows("eval")[:8]]


def test_without_the_token_no_path_answers_but_the_one_that_says_it_is_up(server: Asked) -> None:
    """vLLM's own check leaves all but /v1 open: its /invocations would answer anybody."""
    chat = {"messages": [{"role": "user", "content": "light on"}], "max_tokens": 1}
    wrong = ({}, {"authorization": "Bearer wrong"}, {"authorization": SECRET}, {"authorization": f"Basic {SECRET}"})
    for headers in wrong:
        status, told = asked_raw(server, "/v1/chat/completions", chat, **headers)
        assert status == 401 and told["error"]["code"] == "invalid_api_key"
    for path in (
        "/invocations",
        "/tokenize",
        "/v1/models",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/version",
        "/nothing",
    ):
        assert asked_raw(server, path, chat if path == "/invocations" else None)[0] == 401
    assert asked_raw(server, "/invocations", chat, authorization=f"Bearer {SECRET}")[0] == 200
    assert asked_raw(server, "/health")[0] == 200


def test_the_openai_client_asks_and_the_runs_adapter_answers_where_no_model_is_named(
    server: Asked, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = ask_url(server.base_url, prompts_of(run), 16)
    named = {name: ask_url(server.base_url, prompts_of(run), 16, model=name) for name in (RUN, "starter")}
    answers = {name: [record["answer"] for record in found] for name, found in named.items()}
    assert [record["answer"] for record in unnamed] == answers[RUN] != answers["starter"]
    streamed = ask_url(server.base_url, prompts_of(run), 16, stream=True)
    assert [drop_time(record) for record in streamed] == [drop_time(record) for record in unnamed]
    monkeypatch.setenv(TOKEN, "another-token-than-that")
    for stream in (False, True):
        with pytest.raises(AskError, match="HTTP 401: the token is missing or wrong"):
            ask_url(server.base_url, prompts_of(run)[:1], 4, stream=stream)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: ",
            "gave no answer",
        ),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "environment variable: MY_KEY"),
    ],
)
def test_an_answer_that_breaks_off_is_told_and_a_refused_key_by_its_own_name(answer: bytes, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def once() -> None:
            with listening.accept()[0] as caller:
                asked = b""
                while b'"messages"' not in asked:  # what is left unread would reset the connection
                    asked += caller.recv(65536)
                caller.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(AskError, match=told):
            ask_url(url, [[{"role": "user", "content": "?"}]], 4, key="MY_KEY", stream=True)
        thread.join(10)


def drop_time(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


def test_an_export_asked_here_says_what_the_served_adapter_says(server: Asked, run: Run) -> None:
    here = ask_folder(run.config, server.told["serves"], prompts_of(run), 16, adapter=run.folder / "adapter")
    there = ask_url(server.base_url, prompts_of(run), 16)
    same = [drop_time(one) == drop_time(other) for one, other in zip(here, there, strict=True)]
    assert sum(same) >= len(same) - 1  # where two tokens are as good as equal, another CPU may take the other one
    assert set(here[0]) == set(there[0])


def test_the_token_stands_on_no_command_line_and_in_no_log(server: Asked, place: Path) -> None:
    for pid in family(server.process.pid):
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    logs = list((place / "cache" / "serve").glob("*"))
    assert Path(server.told["log"]) in logs
    assert not [path for path in logs if SECRET in path.read_text()]


@pytest.fixture(scope="module")
def plain(place: Path, run: Run) -> Iterator[Asked]:
    """The same run behind Transformers, as where there is no vLLM."""
    asked = started(["--run", RUN, "--engine", "transformers", "-p", f"paths.outputs={place / 'outputs'}"])
    yield asked
    asked.process.send_signal(signal.SIGINT)
    asked.process.communicate()


def test_transformers_serves_the_same_ids_answers_and_refusals_as_vllm(
    server: Asked, plain: Asked, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [json.loads(asked_raw(one, "/v1/models", authorization=f"Bearer {SECRET}")[1]) for one in (server, plain)]
    assert [{one["id"] for one in found["data"]} for found in listed] == [{"starter", RUN}] * 2
    for model in ("", RUN, "starter"):
        for stream in (False, True):
            both = [ask_url(one.base_url, prompts_of(run), 16, model=model, stream=stream) for one in (server, plain)]
            pairs = [(drop_time(one), drop_time(other)) for one, other in zip(*both, strict=True)]
            assert len([pair for pair in pairs if pair[0] != pair[1]]) <= 1, pairs
    assert asked_raw(plain, "/v1/models")[0] == 401 and asked_raw(plain, "/health")[0] == 200
    evaluation = shlex.split(plain.told["evaluate"])
    assert f"evaluation.endpoint.key={TOKEN}" in evaluation


def test_an_evaluation_asks_transformers_as_it_asks_vllm(server: Asked, plain: Asked, place: Path) -> None:
    """Calls come parsed from both. Of an answer that was cut off after a call only vLLM says that it called a tool."""
    there, here = (
        evaluated(place, name, **endpoint(asked, RUN), evaluation__rows=12)[f"{RUN} greedy"]
        for name, asked in (("by-vllm", server), ("by-transformers", plain))
    )
    pairs = [(one, other) for one, other in zip(there, here, strict=True) if other["stop"] == "done"]
    assert len(pairs) > 2 and any(other["messages"][-1].get("tool_calls") for _, other in pairs if "messages" in other)
    differing = [(one, other) for one, other in pairs if judged(one) != judged(other)]
    assert len(differing) <= 1, differing


def judged(record: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Without the texts: vLLM leaves out a last character whose bytes are not all there."""
    calls = record["messages"][-1].get("tool_calls", []) if "messages" in record else []
    return record["reward"], [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_no_process_of_it_looked_beyond_loopback(server: Asked, place: Path) -> None:
    assert not (place / "hosts.txt").exists(), (place / "hosts.txt").read_text()


def test_a_server_killed_in_the_middle_leaves_rows_unscored_with_the_cause_and_a_rerun_goes_on(
    server: Asked, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own process is killed, a grandchild. Then another server takes the address, and answers the rest."""
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.05)
    slow = {**endpoint(server, "starter", concurrency=2, attempts=2), "evaluation__samples": 40}
    partial = place / "outputs" / "killed" / "evaluation" / "starter-sampled.partial.jsonl"
    pids = family(server.process.pid)
    engine = [pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(engine) == 1 and len(pids) >= 5, "the command, the keeper, the API server, the engine and its worker"

    def kill() -> None:
        while len(list(read_lines(partial))) < 20:
            time.sleep(0.01)
        os.kill(engine[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(UnscoredLimitError, match=r"endpoint: (HTTP 5\d\d|no connection) after 2 attempts"):
        evaluated(place, "killed", **slow)
    killer.join()
    kept = list(read_lines(partial))
    total = 40 * len(records()) // 2
    assert 20 <= len(kept) < total and all(line["record"]["reward"] is not None for line in kept)
    rest, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 1
    assert "error: vLLM has ended: it exited with status" in rest and "The last lines of " in rest
    assert "What to change: nothing, where somebody ended the engine's process" in rest
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    call = {"id": "c", "type": "function", "function": {"name": "light", "arguments": '{"room": "hall"}'}}
    port = int(server.base_url.split(":")[2].split("/")[0])
    with running_chat(port, replies=[{"content": None, "tool_calls": [call]}]) as another:
        found = evaluated(place, "killed", **slow, evaluation__greedy=True)
        assert another.stats()["requests"] == total - len(kept) + total // 40
    assert [record["row"] for record in found["starter sampled"]][::40] == [r["row"] for r in found["starter greedy"]]
    assert all(record["reward"] is not None for some in found.values() for record in some)
    assert not partial.exists()


# -- the command, with a server in vLLM's place -----------------------------------------------------------------------

STAND_IN = """
import http.server, os, sys, time
print("argv", *sys.argv[1:])
print("threads", os.environ["VLLM_CPU_OMP_THREADS_BIND"], "address", os.environ["VLLM_HOST_IP"])
if os.environ.get("FAULT"):
    print(os.environ["FAULT"])
    sys.exit(1)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a module of the name that the real server has."""
    root = tmp_path_factory.mktemp("stand_in")
    folder = root / "vllm" / "entrypoints" / "launchers" / "api_server"
    folder.mkdir(parents=True)
    for package in (folder, *list(folder.parents)[:3]):
        (package / "__init__.py").touch()
    (folder / "entry.py").write_text(STAND_IN)
    return str(root)


def test_it_ends_with_all_its_processes_whatever_ends_it(place: Path, stand_in: str) -> None:
    command = [str(place / "lights.yaml")]
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    with ThreadPoolExecutor() as pool:
        servers = list(pool.map(lambda _: started(command, PYTHONPATH=stand_in), ends))
    for asked, end in zip(servers, ends, strict=True):
        pids = family(asked.process.pid) - {asked.process.pid}
        assert len(pids) == 2 and asked.told["model"] == "starter"
        os.kill(asked.process.pid, end)
        rest, _ = asked.process.communicate(timeout=30)
        if end != signal.SIGKILL:
            assert asked.process.returncode == 0 and rest.endswith("stopped\n")
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert servers[0].told["token"] == f"the one in {TOKEN}"
    log = Path(servers[0].told["log"]).read_text()
    assert "--generation-config vllm" in log and "threads nobind address 127.0.0.1" in log


def test_a_failed_start_is_exit_1_with_the_knob_and_the_engines_lines(place: Path, stand_in: str) -> None:
    fault = "KeyError: 'invalid tool call parser: nosuch (chose from { hermes,xlam })'"
    done = run_cli("serve", str(place / "lights.yaml"), PYTHONPATH=stand_in, FAULT=fault)
    assert done.returncode == 1
    assert done.stderr.startswith("error: vLLM did not start: it exited with status 1 after ")
    assert "What to change: sampling.vllm.tool_parser: one of hermes,xlam\n" in done.stderr
    assert f"\n  {fault}\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give either a config, whose model is served, or --run"),
        (["configs/smoke/decisions.yaml", "--run", "x"], "give either a config"),
        (["--run", "x"], "there is no run 'x' in "),
        (["configs/smoke/decisions.yaml", "-p", "sampling.vllm.max_lenth=5"], "sampling.vllm.max_lenth"),
        (["configs/nothing.yaml"], "config not found"),
        (["configs/smoke/decisions.yaml", "--host", "localhost"], "give an IPv4 address of this machine"),
        (["configs/smoke/decisions.yaml", "--artifact", "merged"], "give --run with it"),
    ],
)
def test_what_cannot_be_served_is_exit_2_before_anything_starts(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.run import main

    assert main(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err


# -- what is served ---------------------------------------------------------------------------------------------------


def test_a_base_is_named_by_its_id_its_folder_or_as_the_starter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    assert base_of(config_of(place, model__name="Qwen/Qwen2.5-0.5B-Instruct")).name == "Qwen/Qwen2.5-0.5B-Instruct"
    assert base_of(config_of(place, model__name=str(tmp_path / "mine"))) == Served(
        str(tmp_path / "mine"), "mine", is_base=True
    )
    made: list[int] = []
    monkeypatch.setattr("lib.starter.starter_path", lambda rows, cache, **_: made.append(len(rows)) or tmp_path / "s-1")
    assert base_of(config_of(place, model__name="starter")) == Served(str(tmp_path / "s-1"), "starter", is_base=True)
    assert made == [24]


def test_a_runs_result_is_its_adapter_on_its_base_or_its_whole_model(run: Run, tmp_path: Path) -> None:
    served = result_of(run)
    assert (served.name, served.adapter, served.adapter_name, served.asked) == (
        "starter", run.folder / "adapter", RUN, RUN,
    )  # fmt: skip
    copied = Run(tmp_path / "whole", run.config)
    copied.begin("training", ("lora",), {})
    copied.end("training", {"path": "model"})
    with pytest.raises(ServingError, match="run 'whole' has no result yet"):
        result_of(copied)
    (copied.folder / "model").mkdir()
    assert result_of(copied) == Served(str(copied.folder / "model"), "whole")


def test_an_export_is_served_once_it_is_whole_and_says_what_the_adapter_says(place: Path, run: Run) -> None:
    config = config_of(place, export__artifacts=["merged"], export__dtype="base")
    assert result_of(run, "adapter") == result_of(run)
    with pytest.raises(ServingError, match=r"no export 'merged' \(it has none\)\. Notebook 5"):
        result_of(run, "merged")
    (made,) = export_run(run, config)
    assert result_of(run, "merged") == Served(str(made.folder), f"{RUN}-merged")
    adapted = ask_folder(config, result_of(run).source, prompts_of(run), 16, adapter=run.folder / "adapter")
    merged = ask_folder(config, str(made.folder), prompts_of(run), 16)
    assert sum(drop_time(one) != drop_time(other) for one, other in zip(adapted, merged, strict=True)) <= 1
    with (made.folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ExportError, match="bytes were exported"):
        result_of(run, "merged")
    with pytest.raises(ServingError, match=r"cannot be served by vLLM or Transformers\. Ollama and llama\.cpp"):
        result_of(run, "gguf")
    with pytest.raises(ServingError, match="Did you mean 'merged'"):
        result_of(run, "mergd")


def test_a_token_is_made_once_for_its_owner_alone_and_a_weak_or_open_one_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(place, paths__cache=str(tmp_path))
    assert own_token(config) == SECRET and not (tmp_path / "serve" / "token").exists()
    monkeypatch.setenv(TOKEN, "")
    file = tmp_path / "serve" / "token"
    with ThreadPoolExecutor() as pool:
        made = set(pool.map(lambda _: own_token(config), range(8)))
    assert len(made) == 1 and len(made.pop()) >= 40 and file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]
    file.chmod(0o644)
    with pytest.raises(ServingError, match="others can read or replace the token"):
        own_token(config)
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(WorkbenchError, match="at least 16 ASCII characters"):
        own_token(config)


def test_a_run_called_as_its_base_gets_another_id(run: Run, tmp_path: Path) -> None:
    same = Run(tmp_path / "starter", run.config)
    same.begin("training", ("lora",), {})
    same.end("training", {"path": "adapter"})
    (same.folder / "adapter").mkdir()
    (same.folder / "adapter" / "adapter_config.json").write_text(
        (run.folder / "adapter" / "adapter_config.json").read_text()
    )
    assert result_of(same).asked == "starter-adapter"


def test_vllm_is_started_as_the_config_says(place: Path, run: Run) -> None:
    base = base_of(config_of(place))
    words = " ".join(vllm_arguments(config_of(place), base))
    assert f"--host 127.0.0.1 --model {base.source} --served-model-name starter --generation-config vllm" in words
    assert "--enforce-eager --max-model-len 512" in words and "lora" not in words and "--block-size" not in words
    values = {"enforce_eager": False, "block_size": 16, "max_length": None}
    other = config_of(place, **{f"sampling__vllm__{name}": value for name, value in values.items()})
    words = " ".join(vllm_arguments(other, result_of(run)))
    assert "--enforce-eager" not in words and "--max-model-len" not in words and "--block-size 16" in words
    assert f"--max-lora-rank 8 --lora-modules {RUN}={run.folder / 'adapter'}" in words


def test_the_cache_on_a_cpu_holds_twice_the_longest_conversation_and_no_more_than_its_share(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = result_of(run).source
    assert memory_arguments(config_of(place), source) == ["--kv-cache-memory-bytes", str(256 * 2**20)]
    long = config_of(place, sampling__vllm__max_length=400_000)  # 4 layers x 2 heads x 32, keys and values, float32
    assert memory_arguments(long, source)[1] == str(2 * 400_000 * 2 * 4 * 2 * 32 * 4)
    little = config_of(place, sampling__vllm__max_length=400_000, sampling__vllm__memory_share=0.001)
    assert int(memory_arguments(little, source)[1]) < 2**30
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert memory_arguments(long, source) == []


# -- tool calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("qwen2_5", "hermes"), ("qwen3", "hermes"), ("qwen3_instruct_2507", "hermes"), ("qwen3_6", "qwen3_xml"),
        ("gptoss", "openai"), ("llama3_1", "llama3_json"), ("llama3_2", "llama3_json"), ("glm4moe", "glm45"),
        ("llama3", ""), ("phi3", ""), ("gemma3", ""),
    ],
)  # fmt: skip
def test_the_parser_is_told_from_a_models_own_chat_template(template: str, parser: str) -> None:
    import importlib.util

    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "chat_templates" / f"{template}.jinja").read_text()
    assert tool_parser(VllmSection(), f"someone/{template}", text) == parser


def test_what_the_config_says_of_tool_calls_is_stronger() -> None:
    from lib.starter import CHAT_TEMPLATE

    assert tool_parser(VllmSection(), "/cache/starter-1", CHAT_TEMPLATE) == "hermes"
    assert tool_parser(VllmSection(tool_parser="xlam"), "/cache/starter-1", CHAT_TEMPLATE) == "xlam"
    assert tool_parser(VllmSection(tool_calls=False, tool_parser="xlam"), "x", CHAT_TEMPLATE) == ""
    assert tool_parser(VllmSection(), "Salesforce/xLAM-2-3b-fc-r", CHAT_TEMPLATE) == "xlam"


def test_where_no_parser_is_known_vllm_starts_without_one_and_that_is_said(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(base_of(config_of(place)).source, plain)
    (plain / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    config = config_of(place, model__name=str(plain))
    logging.getLogger("lib").propagate = True  # a run's log takes the lines for itself
    words = program(config, base_of(config), tmp_path, front_environment(SECRET, {}), Address()).command(7)
    assert "no parser of tool calls is known for plain" in caplog.text
    assert "--enable-auto-tool-choice" not in words and words[-2:] == ["--port", "7"]


# -- what vLLM's failures mean ----------------------------------------------------------------------------------------

SAID = {
    "KeyError: 'invalid tool call parser: nosuch (chose from { hermes,xlam })'": "tool_parser: one of hermes,xlam$",
    "(EngineCore pid=1) ERROR 11-21 19:32:19 [core.py:1433] ValueError: No available memory for the cache blocks. Try "
    "increasing `gpu_memory_utilization` when initializing the engine": "raise sampling.vllm.memory_share",
    "ValueError: To serve at least one request with the model's max seq len (1024), (0.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum "
    "model length is 256.": "sampling.vllm.max_length: at most 256; or raise sampling.vllm.memory_share",
    "  Value error, User-specified max_model_len (5000) is greater than the derived max_model_len "
    "(max_position_embeddings=1024.0 or model_max_length=None in model's config.json).": "max_length: at most 1024, ",
    "ValueError: Available memory on node 0 (15.72/17.09 GiB) on startup is less than desired CPU memory utilization "
    "(0.999, 17.07 GiB).": "lower sampling.vllm.memory_share, or end what else",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "lower sampling.vllm.memory_share and",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}":
        "lower sampling.vllm.memory_share and",
    "(Worker pid=30) ERROR 11-22 00:04:57 RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 "
    "kv_cache_idx=0": "--engine transformers: vLLM has no attention for heads of 16",
    "ValueError: No common block size for 7 (CPU_ATTN: [MultipleOf(32)]).": "sampling.vllm.block_size: leave it out",
    "  Value error, The checkpoint you are trying to load has model type `nosuch` but Transformers does not recognize "
    "this architecture.": "another model.name",
    "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
    "specified revision on the local disk": "model.name: neither a model's folder here nor an id",
    "OSError: You are trying to access a gated repo.": "accept its terms",
    "RuntimeError: Failed to infer device type": "ACCELERATOR=cpu make setup",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.": "nothing, where somebody ended",
}  # fmt: skip
"""Lines of vLLM 0.31, most of them provoked here, and what they are answered with."""


@pytest.mark.parametrize(("line", "change"), SAID.items())
def test_what_vllm_says_when_it_fails_comes_with_what_to_change(line: str, change: str) -> None:
    normal = [
        "INFO 11-21 [api_utils.py:286] non-default args: {'enable_auto_tool_choice': True, 'block_size': 16, "
        "'gpu_memory_utilization': 0.5, 'max_model_len': 512}",
        "WARNING [system_utils.py] This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.",
        "INFO [kv_cache_utils.py] CPU KV cache size: 524,288 tokens, Maximum concurrency for 1,024 tokens: 512.00x",
    ]
    assert explain(normal, ADVICE) == ""
    found = explain([*normal, line, "RuntimeError: Engine core initialization failed. See root cause above."], ADVICE)
    assert re.search(f"What to change: .*{change}", found), found
