"""The server on Transformers, over HTTP on loopback, with tiny random models of real architectures."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_adapter, tiny_gpt_oss, tiny_qwen3

from lib import models
from lib.chat_request import NEUTRAL
from lib.client import ask_url
from lib.config import Config, load_config
from lib.engine import Served
from lib.generate import Chat
from lib.speaker import LiveText, Speaker, rest_of, with_calls
from lib.transformers_server import Server

ASK = [{"role": "user", "content": "What is 2 + 2?"}]
PROMPTS = [ASK, [{"role": "system", "content": "Be short."}, *ASK], [{"role": "user", "content": "Prices, 10?"}]]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def config_of(folder: Path, **more: Any) -> Config:
    return load_config("configs/smoke/decisions.yaml", {"model.name": str(folder), **more})


@contextmanager
def running(config: Config, served: Served) -> Iterator[tuple[str, Speaker]]:
    import uvicorn

    speaker = Speaker(config, served)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Server(speaker).app(), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", speaker
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Speaker]]:
    """A base with room for very long answers, and an adapter on it."""
    folder = tmp_path_factory.mktemp("qwen")
    base = tiny_qwen3(folder / "base", max_position_embeddings=20_000)
    adapter = tiny_adapter(base, folder / "adapter", size=0.5)
    with running(config_of(base), Served(str(base), "base", adapter, "mine")) as started:
        yield started


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Speaker]]:
    base = tiny_gpt_oss(tmp_path_factory.mktemp("gpt_oss") / "base", max_position_embeddings=512)
    with running(config_of(base), Served(str(base), "gpt-oss")) as started:
        yield started


def post(url: str, path: str = "/chat/completions", **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def drop_time(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


def test_the_adapter_answers_first_and_the_base_by_its_name(qwen: tuple[str, Speaker]) -> None:
    url = qwen[0]
    assert [one["id"] for one in post(url, "/models")[1]["data"]] == ["mine", "base"]
    answers = {
        name: [record["answer"] for record in ask_url(url, PROMPTS, 12, model=name)] for name in ("", "mine", "base")
    }
    assert answers[""] == answers["mine"] != answers["base"]


@pytest.mark.parametrize("which", ["qwen", "harmony"])
def test_a_stream_says_what_the_whole_answer_says(which: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(which)[0]
    whole, streamed = (ask_url(url, PROMPTS, 24, stream=stream) for stream in (False, True))
    assert [drop_time(one) for one in whole] == [drop_time(one) for one in streamed]
    assert all(one["tokens"] == 24 and one["stop"] == "length" and one["answer"] for one in whole)


def test_a_seed_repeats_a_sampled_answer_and_temperature_0_needs_none(qwen: tuple[str, Speaker]) -> None:
    def said(**how: Any) -> str:
        return str(post(qwen[0], messages=ASK, max_tokens=12, **how)[1]["choices"][0]["message"]["content"])

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said(temperature=0) == said(temperature=0, seed=7)
    assert said(top_k=1) == said(temperature=0)


def test_usage_counts_and_the_limit_has_two_names(qwen: tuple[str, Speaker]) -> None:
    url, speaker = qwen
    asked = len(speaker.chat.prompt_ids(ASK))
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = post(url, messages=ASK, **{limit: 5})[1]
        assert answer["usage"] == {"prompt_tokens": asked, "completion_tokens": 5, "total_tokens": asked + 5}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"n": 2}, "n: 2 needs vLLM"), ({"stop": ["x"]}, 'stop: ["x"] needs vLLM'), ({"logprobs": True}, "needs vLLM"),
        ({"response_format": {"type": "json_object"}}, "needs vLLM"), ({"frequency_penalty": 0.5}, "needs vLLM"),
        ({"tool_choice": "required"}, "needs vLLM"), ({"nonsense": 1}, "nonsense is not known here"),
        ({"temperature": 3}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "every message has a role"), ({"messages": "text"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "texts only"),
        ({"messages": [{"role": "user", "content": "word " * 30_000}]}, "the maximum model length is 20000 tokens"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(qwen: tuple[str, Speaker], body: dict[str, Any], told: str) -> None:
    status, error = post(qwen[0], **{"messages": ASK, "max_tokens": 2, **body})
    assert status == 400 and told in error["message"] and error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_of_it_is_taken_and_errors_have_openais_form(qwen: tuple[str, Speaker]) -> None:
    neutral = {name: values[-1] if values else "x" for name, values in NEUTRAL.items()}
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}]
    plain = {"messages": ASK, "max_tokens": 4, "temperature": 0}
    answers = [post(qwen[0], **plain), post(qwen[0], **{**plain, **neutral, "messages": parts})]
    assert [answer[1]["choices"] for answer in answers] == [answers[0][1]["choices"]] * 2
    assert post(qwen[0], **plain, model="other")[0] == 404
    assert post(qwen[0], "/nothing")[1]["type"] == "not_found_error"
    assert post(qwen[0], "/chat/completions")[0] == 405


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_not_answered_to_the_end(qwen: tuple[str, Speaker], stream: bool) -> None:
    body = json.dumps({"messages": ASK, "max_tokens": 15_000, "stream": stream, "temperature": 0}).encode()
    host, port = qwen[0].removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as caller:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        caller.sendall(head.encode() + body)
        if stream:
            assert caller.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.3)
    began = time.monotonic()
    assert post(qwen[0], messages=ASK, max_tokens=1)[0] == 200
    assert time.monotonic() - began < 20  # 15,000 tokens take minutes


def test_requests_that_come_at_once_are_all_answered(qwen: tuple[str, Speaker]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: post(qwen[0], messages=ASK, max_tokens=6, temperature=0)[1], range(8)))
    assert len({json.dumps(one["choices"]) for one in found}) == 1 and len({one["id"] for one in found}) == 8


# -- what is certain while it is sampled ------------------------------------------------------------------------------


def said_live(chat: Chat, text: str, calls: bool = False, prompt: list[int] | None = None) -> list[str]:
    """What is sent after each token of an answer."""
    live = LiveText(chat, prompt or [], calls)
    return [live.add(token) for token in chat.tokenizer.encode(text, add_special_tokens=False)]


def test_of_harmony_only_the_final_channel_is_sent(harmony: tuple[str, Speaker]) -> None:
    chat = harmony[1].chat
    text = (
        "<|channel|>analysis<|message|>a thought<|end|><|start|>assistant<|channel|>final<|message|>Prices are "
        "10 < 20, über 5 🙂.<|return|>"
    )
    sent = said_live(chat, text)
    message = chat.message([], chat.tokenizer.encode(text, add_special_tokens=False))
    assert message["thinking"] == "a thought" and len([part for part in sent if part]) > 5
    assert "".join(sent) + rest_of(message, "".join(sent)) == message["content"] == "Prices are 10 < 20, über 5 🙂."
    assert not any("\ufffd" in part for part in sent)


def test_effort_is_the_requests_else_the_configs(harmony: tuple[str, Speaker]) -> None:
    speaker = harmony[1]
    assert "Reasoning: high" in speaker.chat_of("high").text(ASK) and "Reasoning: medium" in speaker.chat.text(ASK)
    assert post(harmony[0], messages=ASK, max_tokens=1, reasoning_effort="low")[0] == 200


def test_a_call_is_never_sent_as_text_and_comes_parsed(qwen: tuple[str, Speaker]) -> None:
    chat = Chat(models.load_tokenizer(qwen[1].served.source, config_of(Path(qwen[1].served.source)).model))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert "".join(said_live(chat, f"I add. {call}", calls=True)) == "I add."
    assert "".join(said_live(chat, f"I add. {call}")) == f"I add. {call}"
    message = with_calls({"role": "assistant", "content": f"I add. {call}\n{call}"})
    function = {"name": "add", "arguments": {"a": 2}}
    assert message["content"] == "I add. " and [one["function"] for one in message["tool_calls"]] == [function] * 2


@pytest.mark.parametrize(
    "text",
    ["plain", '<tool_call>{"name": "add"', "<tool_call>[1]</tool_call>", "<tool_call>{}</tool_call>", "<tool_call>"],
)  # fmt: skip
def test_what_is_no_whole_call_stays_text(text: str) -> None:
    assert with_calls({"role": "assistant", "content": text}) == {"role": "assistant", "content": text}


def test_thoughts_that_the_template_opened_are_not_sent(qwen: tuple[str, Speaker]) -> None:
    chat = Chat(models.load_tokenizer(qwen[1].served.source, config_of(Path(qwen[1].served.source)).model))
    opened = chat.tokenizer.encode("assistant\n<think>\n", add_special_tokens=False)
    assert not any(said_live(chat, "a thought</think>\n\nFour.", calls=True, prompt=opened))
