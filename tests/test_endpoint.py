"""Evaluation of a model behind a URL: the real client against a server that misbehaves on command."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, running_chat
from conftest import SMOKE, run_cli

from lib import calls
from lib.answering import keep_records, record_of
from lib.config import Config, ConfigError, check_key, load_config
from lib.endpoint import EndpointError, EndpointPolicy, EndpointRefused, sampling_sent, wire_messages
from lib.evaluate import Comparison, evaluate_run, policies_of
from lib.paired import pass_at_k
from lib.prepare import prepare
from lib.rollout import OutOfRoomError, Scored, UnscoredLimitError, play_each
from lib.runfolder import RunError, exclusive, open_run, read_lines
from lib.task import Message, Rollout, Row, Score, Task, TaskError, Turn, load_task

KEY = "a-key-that-nobody-must-see"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]

TASK = '''
"""Echo: the world asks `turns` times; an answer is right where it holds the row's number."""

from lib.data import ListTable, RowsTask
from lib.task import Score


class Echo(RowsTask, frozen=True):
    max_turns: int = 3
    turns: int = 1
    generate_rows: int = 12

    def tables(self):
        return [ListTable("echo", [{"id": f"row-{i}", "number": i} for i in range(self.generate_rows)])]

    def row(self, record, where):
        number = f"{record['number']}."
        prompt, gold = ([{"role": role, "content": f"say {number}"}] for role in ("user", "assistant"))
        return {"id": record["id"], "prompt": prompt, "gold": gold, "answer": number}

    async def reply(self, rollout):
        asked = {"role": "user", "content": f"again {rollout.row['answer']}"}
        return [asked] if len(rollout.turns) < self.turns else []

    async def score(self, rollout):
        right = float(rollout.text.endswith(f" {rollout.row['answer']}"))
        return Score(reward=right, parts={"solved": right})
'''


@pytest.fixture(scope="module")
def running() -> Iterator[ChatServer]:
    with running_chat() as server:
        yield server


@pytest.fixture
def server(running: ChatServer, monkeypatch: pytest.MonkeyPatch) -> ChatServer:
    """The policy, well-behaved and with nothing counted; short waits between attempts."""
    running.control(reset=True)
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.02)
    return running


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log lines, also after a run of an earlier test has taken them for itself."""
    monkeypatch.setattr(logging.getLogger("lib"), "propagate", True)
    return caplog


def settings_of(server: ChatServer, **endpoint: Any) -> dict[str, Any]:
    return {"base_url": server.base_url, "model": "someone/model-1", "timeout": 2.0, "beside_base": False, **endpoint}


def policy(server: ChatServer, greedy: bool = False, limit: int = 7, **values: Any) -> EndpointPolicy:
    endpoint = settings_of(server, **values.pop("endpoint", {}))
    config = load_config(SMOKE, {"evaluation": {"endpoint": endpoint, **values}})
    return EndpointPolicy(config.evaluation, limit, greedy)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def ask(asked: EndpointPolicy, *messages: Message, tools: Any = None) -> Turn:
    return asyncio.run(asked(messages or [user("hello")], tools))


# -- one answer -------------------------------------------------------------------------------------------------------


def test_a_request_is_the_messages_the_tools_and_how_to_sample(server: ChatServer) -> None:
    turn = ask(policy(server, temperature=0.7, top_p=0.9, top_k=5), user("hello"), tools=TOOLS)
    assert turn == Turn(message={"role": "assistant", "content": "hello"})
    (body,) = server.stats()["bodies"]
    assert body == {
        "model": "someone/model-1", "messages": [user("hello")], "tools": TOOLS,
        "max_tokens": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
    }  # fmt: skip


def test_the_most_likely_answer_is_asked_for_with_temperature_0_and_nothing_else(server: ChatServer) -> None:
    ask(policy(server, greedy=True, top_p=0.9, endpoint={"max_tokens": 99}))
    (body,) = server.stats()["bodies"]
    assert body == {"model": "someone/model-1", "messages": [user("hello")], "max_tokens": 99, "temperature": 0.0}


@pytest.mark.parametrize(("model", "priced"), [("gpt-4o-mini-2024-07-18", True), ("someone/model-1", False)])
def test_what_an_answer_took_is_in_the_runs_bill(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, priced: bool
) -> None:
    monkeypatch.setenv("WORKBENCH_RUN", str(tmp_path))
    server.control(faults={"server_error": 1.0})
    with pytest.raises(EndpointError):
        ask(policy(server, endpoint={"model": model, "attempts": 2}))
    server.control(faults={})
    asked = policy(server, endpoint={"model": model})
    ask(asked)
    failed, answered = read_lines(tmp_path / "cost" / "usage.jsonl")
    assert (failed["role"], failed["answered"], failed["usd"], failed["retries"]) == ("endpoint", False, 0.0, 1)
    assert answered["input_tokens"] == asked.used.input_tokens > 0 and answered["priced"] == priced
    usd = (0.15 * asked.used.input_tokens + 0.60 * asked.used.output_tokens) / 1e6 if priced else 0.0
    assert answered["usd"] == pytest.approx(usd)


def test_tool_calls_come_in_the_message_with_their_arguments_as_written(server: ChatServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1'}}
    server.control(replies=[{"content": None, "tool_calls": [call]}])
    assert ask(policy(server)).message == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_thinking_is_kept_apart_and_not_sent_back(server: ChatServer) -> None:
    server.control(thinking="hm")
    message = ask(policy(server)).message
    assert message == {"role": "assistant", "content": "hello", "thinking": "hm"}
    ask(policy(server), user("hello"), message, user("and?"))
    assert server.stats()["bodies"][-1]["messages"][1] == {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"content": [{"type": "text", "text": "he"}, {"type": "image"}, "llo"]}, {"content": "hello"}),
        ({"content": []}, {"content": ""}),
        ({"content": "x", "reasoning": {"steps": 3}}, {"content": "x"}),
    ],
)
def test_an_answer_in_parts_is_their_texts(server: ChatServer, said: dict[str, Any], read: dict[str, Any]) -> None:
    server.control(replies=[said])
    assert ask(policy(server)).message == {"role": "assistant", **read}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"name": "add", "arguments": None}, {}),
        ({"name": "add"}, {}),
        ({"name": "add", "arguments": {"a": 1}}, {"a": 1}),
        ({"name": "add", "arguments": ["a", 1]}, '["a", 1]'),
    ],
)
def test_arguments_and_ids_of_other_types_are_the_policys_and_not_a_failure(
    server: ChatServer, given: dict[str, Any], kept: Any
) -> None:
    server.control(replies=[{"content": None, "tool_calls": [{"id": 5, "type": "function", "function": given}]}])
    (call,) = ask(policy(server)).message["tool_calls"]
    assert call == {"id": "5", "type": "function", "function": {"name": "add", "arguments": kept}}


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": None, "completion_tokens": 1}, {"prompt_tokens": -1}, "many"]
)
def test_nonsense_about_tokens_loses_no_answer_and_is_not_a_price(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture, usage: Any
) -> None:
    monkeypatch.setenv("WORKBENCH_RUN", str(tmp_path))
    server.control(usage=usage)
    assert ask(policy(server, endpoint={"model": "gpt-4o-mini"})).message["content"] == "hello"
    (line,) = read_lines(tmp_path / "cost" / "usage.jsonl")
    assert line["priced"] is False and line["usd"] == 0.0 and "the bill is too low" in told.text


def test_a_cut_off_answer_is_an_answer_that_was_cut_off(server: ChatServer) -> None:
    server.control(script=["cut_off"])
    assert ask(policy(server)).stop == "length"


def test_what_is_sent_can_be_written_wherever_in_a_message_the_trouble_is(server: ChatServer) -> None:
    call = {"id": "c\ud800", "function": {"name": "add", "arguments": {"\ud800": ["half \udc00", float("nan")]}}}
    ask(policy(server), user("hello"), {"role": "assistant", "content": None, "tool_calls": [call]}, user("and?"))
    (sent,) = server.stats()["bodies"][0]["messages"][1]["tool_calls"]
    assert sent["id"] == "c\ufffd" and sent["function"]["arguments"] == '{"\ufffd": ["half \ufffd", "nan"]}'


def test_calls_get_ids_and_results_the_ids_of_their_calls() -> None:
    sent = wire_messages(
        [
            user("add"),
            {"role": "assistant", "content": "", "tool_calls": [
                {"name": "add", "arguments": {"a": "é"}},
                {"id": "mine", "function": {"name": "sub", "arguments": "{}"}},
            ]},
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
        ]
    )  # fmt: skip
    assert sent[1]["tool_calls"] == [
        {"id": "call_1_0", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}},
        {"id": "mine", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]
    assert [message["tool_call_id"] for message in sent[2:]] == ["call_1_0", "mine"]


@pytest.mark.parametrize(
    ("base_url", "model", "sent"),
    [
        ("https://api.openai.com/v1", "gpt-4o-mini", {"max_completion_tokens": 7, "temperature": 1.0}),
        ("https://api.openai.com/v1", "o3", {"max_completion_tokens": 7}),
        ("http://127.0.0.1:8000/v1", "o3", {"max_tokens": 7, "temperature": 1.0}),
    ],
)
def test_openai_gets_its_newer_names_and_no_temperature_where_it_takes_none(
    base_url: str, model: str, sent: dict[str, Any]
) -> None:
    config = load_config(SMOKE, {"evaluation": {"endpoint": {"base_url": base_url, "model": model}}})
    assert sampling_sent(config.evaluation, 7, greedy=False) == sent


# -- what is no answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["rate_limit", "conflict", "request_timeout", "server_error", "reset", "page",
                                   "stream", "binary", "wrong_content", "surrogate", "error_inside"])  # fmt: skip
def test_what_may_be_better_next_time_is_asked_again(server: ChatServer, fault: str) -> None:
    server.control(script=[fault, fault])
    asked = policy(server)
    assert ask(asked).message["content"] == "hello"
    assert server.stats()["requests"] == 3 and server.stats()["early"] == 0
    assert asked.used.requests == 3 and asked.used.answers == 1 and asked.used.output_tokens == 1


@pytest.mark.parametrize(
    ("fault", "cause", "requests"),
    [
        ("server_error", "endpoint: HTTP 503 after 2 attempts", 2),
        ("rate_limit", "endpoint: HTTP 429 after 2 attempts", 2),
        ("timeout", "endpoint: no answer in time after 2 attempts", 2),
        ("trickle", "endpoint: no answer in time after 2 attempts", 2),
        ("bad_request", "endpoint: HTTP 400", 1),
        ("moderated", "endpoint: HTTP 403", 1),
        ("error_inside", "endpoint: an answer that is no chat completion after 2 attempts", 2),
        ("broken_off", "endpoint: the answer broke off (finish_reason error)", 1),
        ("no_choice", "endpoint: an answer without a choice", 1),
        ("wrong_role", "endpoint: an answer in the role 'user', not assistant", 1),
        ("tool_rubbish", "endpoint: tool_calls that are none", 1),
        ("filtered", "endpoint: the answer was withheld (content_filter)", 1),
    ],
)
def test_what_is_no_answer_is_an_error_with_its_cause(
    server: ChatServer, fault: str, cause: str, requests: int
) -> None:
    server.control(faults={fault: 1.0})
    with pytest.raises(EndpointError) as caught:
        ask(policy(server, endpoint={"attempts": 2, "timeout": 0.3}))
    assert str(caught.value) == cause
    assert server.stats()["requests"] == requests


@pytest.mark.parametrize(("status", "told"), [(401, "Look at"), (404, "evaluation.endpoint.model")])
def test_what_can_never_work_is_refused_with_what_to_change(server: ChatServer, status: int, told: str) -> None:
    server.control(status=status)
    asked = policy(server)
    with pytest.raises(EndpointRefused, match=f"endpoint: HTTP {status} from .*{told}"):
        ask(asked)
    assert asked.refusal and server.stats()["requests"] == 1


def test_an_error_with_status_200_is_told(server: ChatServer, told: pytest.LogCaptureFixture) -> None:
    server.control(script=["error_inside"])
    ask(policy(server))
    assert "endpoint: an answer that is no chat completion: the model behind it is gone" in told.text


def test_an_unknown_reason_to_stop_is_passed_over(server: ChatServer) -> None:
    server.control(script=["odd_reason"])
    assert ask(policy(server)).stop == "stop" and server.stats()["requests"] == 1


@pytest.mark.parametrize("fault", ["page", "reset", "moderated", "surrogate"])
def test_only_several_different_requests_without_an_answer_are_a_service_that_is_none(
    server: ChatServer, fault: str
) -> None:
    server.control(faults={fault: 1.0})
    asked = policy(server, endpoint={"attempts": 1, "concurrency": 1})
    for text in ("a", "a", "b", "a"):
        with pytest.raises(EndpointError) as caught:
            ask(asked, user(text))
        assert not isinstance(caught.value, EndpointRefused)
    with pytest.raises(EndpointRefused, match=r"base_url right|Look at evaluation\.endpoint\.key"):
        ask(asked, user("c"))


@pytest.mark.parametrize("fault", ["page", "reset", "moderated", "surrogate"])
def test_what_fails_after_an_answer_is_never_the_services_failure(server: ChatServer, fault: str) -> None:
    asked = policy(server, endpoint={"attempts": 1, "concurrency": 1})
    ask(asked)
    server.control(faults={fault: 1.0})
    for number in range(9):
        with pytest.raises(EndpointError) as caught:
            ask(asked, user(str(number)))
        assert not isinstance(caught.value, EndpointRefused)


def test_a_url_where_nobody_answers_is_refused(server: ChatServer) -> None:
    with pytest.raises(EndpointRefused, match=r"no connection .*is evaluation.endpoint.base_url right"):
        ask(policy(server, endpoint={"base_url": "http://127.0.0.1:9/v1", "attempts": 2}))


def test_the_key_is_the_variables_and_a_missing_one_is_said(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.control(key=KEY)
    with pytest.raises(EndpointRefused, match=r"MY_MODEL_KEY \(evaluation.endpoint.key\) is not set"):
        ask(policy(server, endpoint={"key": "MY_MODEL_KEY"}))
    monkeypatch.setenv("MY_MODEL_KEY", KEY)
    assert ask(policy(server, endpoint={"key": "MY_MODEL_KEY"})).message["content"] == "hello"
    with pytest.raises(EndpointRefused) as caught:
        monkeypatch.setenv("MY_MODEL_KEY", KEY + "2")
        ask(policy(server, endpoint={"key": "MY_MODEL_KEY"}))
    assert KEY not in str(caught.value)


# -- side by side -----------------------------------------------------------------------------------------------------


class Several(Task, frozen=True):
    max_turns: int = 3

    async def reply(self, rollout: Rollout) -> list[Message]:
        return [user("again")] if len(rollout.turns) < 3 else []

    async def score(self, rollout: Rollout) -> Score:
        return Score(reward=1.0)


def rows(count: int) -> list[Row]:
    return [{"id": str(i), "prompt": [user(f"row {i}.")]} for i in range(count)]


def test_no_more_requests_are_in_flight_than_allowed_and_no_fewer(server: ChatServer) -> None:
    server.control(latency=0.05)
    assert len(list(play_each(Several(), rows(20), policy(server, endpoint={"concurrency": 5}), 10))) == 20
    assert server.stats()["max_in_flight"] == 5


def test_a_hundred_rollouts_do_not_wait_for_one_that_hangs(server: ChatServer) -> None:
    server.control(faults={"timeout": 1.0}, only="row 7.")
    asked = policy(server, endpoint={"concurrency": 100, "attempts": 1, "timeout": 5.0})
    played = list(play_each(Several(), rows(100), asked, 100))
    assert [index for index, _ in played][-1] == 7 and len(played) == 100
    rewards = {index: scored.score.reward for index, scored in played}
    assert rewards.pop(7) is None and set(rewards.values()) == {1.0}
    assert played[-1][1].score.notes == {"error": "EndpointError: endpoint: no answer in time after 1 attempts"}


def test_a_conversation_that_the_model_cannot_hold_ends_there_as_cut_off(server: ChatServer) -> None:
    server.control(script=["", "", "too_long"])
    ((_, scored),) = play_each(Several(), rows(1), policy(server, endpoint={"concurrency": 1}), 1)
    assert (len(scored.rollout.turns), scored.rollout.stop, scored.score.reward) == (2, "length", 1.0)
    assert scored.rollout.messages[-1]["role"] == "assistant"
    server.control(faults={"too_long": 1.0})
    with pytest.raises(OutOfRoomError):
        ask(policy(server))


def test_closing_cancels_what_is_still_asked(server: ChatServer) -> None:
    server.control(faults={"timeout": 1.0}, only="row 1.")
    played = play_each(Several(), rows(2), policy(server, endpoint={"timeout": 60.0}), 2)
    assert next(played)[0] == 0
    played.close()
    for _ in range(50):
        if not server.stats()["in_flight"]:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert server.stats()["in_flight"] == 0


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    path = tmp_path / "echo.py"
    path.write_text(TASK)
    return path


def config_of(echo: Path, server: ChatServer, **overrides: Any) -> Config:
    where = {"paths.outputs": str(echo.parent / "outputs"), "paths.cache": str(echo.parent / "cache")}
    task = {"name": str(echo), "split_ratio": 0.5}
    path = echo.parent / "echo.yaml"
    path.write_text(json.dumps({"task": task, "evaluation": {"endpoint": settings_of(server), "rows": 0}}))
    return load_config(path, where | overrides)


def evaluated(config: Config, name: str = "echo") -> Comparison:
    task, run = load_task(config.task.name, **config.task.params), open_run(name, config)
    prepare(task, run)
    return evaluate_run(config, task, run)


def folder_of(echo: Path) -> Path:
    return echo.parent / "outputs" / "echo" / "evaluation"


def test_an_endpoint_alone_is_evaluated_with_k_samples_each_and_pass_at_k(echo: Path, server: ChatServer) -> None:
    config = config_of(echo, server, **{"evaluation.samples": 3, "task.turns": 2})
    comparison = evaluated(config)
    assert comparison.final == "someone-model-1" and comparison.gains == {}
    records = comparison.records["someone-model-1 sampled"]
    held_out = len({record["row"] for record in records})
    assert held_out == 6 and len(records) == 18 and all(record["reward"] == 1.0 for record in records)
    assert [record["row"] for record in records[:4]] == [records[0]["row"]] * 3 + [records[3]["row"]]
    assert [message["role"] for message in records[0]["messages"]] == ["user", "assistant"] * 2
    assert [(k, one.mean, one.n) for k, one in comparison.pass_at["someone-model-1 sampled"].items()] == [
        (1, 1.0, 6), (2, 1.0, 6), (3, 1.0, 6),
    ]  # fmt: skip
    assert {path.name for path in folder_of(echo).iterdir()} == {
        "someone-model-1-sampled.jsonl", "someone-model-1-greedy.jsonl", "summary.json",
    }  # fmt: skip
    requests = server.stats()["requests"]
    assert requests == (18 + 6) * 2
    evaluated(config)
    assert server.stats()["requests"] == requests


def test_failures_are_unscored_with_the_cause_and_never_0(echo: Path, server: ChatServer) -> None:
    loose = {"rewards.max_unscored": 0.5, "evaluation.greedy": False, "evaluation.endpoint.attempts": 2}
    config = config_of(echo, server, **loose)
    prompt = open_and_first_prompt(config)
    server.control(faults={"server_error": 1.0}, only=prompt)
    records = evaluated(config).records["someone-model-1 sampled"]
    lost = [record for record in records if record["reward"] is None]
    assert {record["prompt"] for record in lost} == {prompt}
    assert all(r["notes"] == {"error": "EndpointError: endpoint: HTTP 503 after 2 attempts"} for r in lost)
    assert all(record["reward"] == 1.0 for record in records if record not in lost)


def test_only_what_was_not_answered_is_asked_after_a_stop_and_concurrency_may_change(
    echo: Path, server: ChatServer
) -> None:
    once = {"evaluation.greedy": False, "evaluation.samples": 2, "evaluation.endpoint.attempts": 1}
    first = config_of(echo, server, **once)
    prompt = open_and_first_prompt(first)
    server.control(faults={"server_error": 1.0}, only=prompt)
    with pytest.raises(UnscoredLimitError, match="HTTP 503 after 1 attempts"):
        evaluated(first)
    partial = folder_of(echo) / "someone-model-1-sampled.partial.jsonl"
    done = len(list(read_lines(partial)))
    with partial.open("a") as file:
        file.write('{"number": 3, "rec')  # as a kill leaves it
    before = server.stats()["requests"]
    server.control(faults={})
    comparison = evaluated(config_of(echo, server, **once, **{"evaluation.endpoint.concurrency": 2}))
    assert server.stats()["requests"] - before == 12 - done
    assert [record["reward"] for record in comparison.records["someone-model-1 sampled"]] == [1.0] * 12
    assert not partial.exists()


@pytest.mark.parametrize("fault", ["surrogate", "page", "wrong_content", "reset", "moderated"])
def test_a_row_that_always_fails_blocks_neither_a_fresh_evaluation_nor_one_that_goes_on(
    echo: Path, server: ChatServer, fault: str
) -> None:
    hard = {"evaluation.greedy": False, "evaluation.endpoint.attempts": 1, "evaluation.endpoint.concurrency": 1}
    strict = config_of(echo, server, **hard, **{"rewards.max_unscored": 0.0})
    server.control(faults={fault: 1.0}, only=open_and_last_prompt(strict))
    for _ in range(2):  # the second time, nothing but that row is left
        with pytest.raises(UnscoredLimitError, match="1 of 6 rollouts could not be judged"):
            evaluated(strict)
    loose = config_of(echo, server, **hard, **{"rewards.max_unscored": 0.5})
    records = evaluated(loose).records["someone-model-1 sampled"]
    assert [record["reward"] for record in records] == [1.0] * 5 + [None]
    server.control(only=open_and_first_prompt(loose, "fresh"))
    assert evaluated(loose, "fresh").records["someone-model-1 sampled"][0]["reward"] is None


def test_the_limit_of_unscored_answers_may_be_raised_on_the_way_and_the_endpoint_is_named(
    echo: Path, server: ChatServer
) -> None:
    once = {"evaluation.greedy": False, "evaluation.endpoint.attempts": 1, "evaluation.endpoint.concurrency": 1}
    first = config_of(echo, server, **once)
    server.control(faults={"server_error": 1.0}, only=open_and_last_prompt(first))
    told = r"HTTP 503.*Mend the endpoint, .* is not asked again; raising the limit leaves them out of every mean"
    with pytest.raises(UnscoredLimitError, match=told):
        evaluated(first)
    before = server.stats()["requests"]
    raised = config_of(echo, server, **once, **{"rewards.max_unscored": 0.5, "rewards.score_seconds": 60.0})
    assert [r["reward"] for r in evaluated(raised).records["someone-model-1 sampled"]] == [1.0] * 5 + [None]
    assert server.stats()["requests"] == before + 1


@pytest.mark.parametrize(
    "rubbish",
    [b"\0\0\0", b"[]", b"\xff", b'{"number": 99, "record": {}}', b'{"number": 0}',
     b'{"number": 0, "record": {"row": 1}}', b'{"number": "0", "record": []}', b"", b"[" * 100_000],
)  # fmt: skip
def test_rubbish_among_the_answers_on_disk_is_passed_over_and_counted(
    echo: Path, server: ChatServer, rubbish: bytes
) -> None:
    once = {"evaluation.greedy": False, "evaluation.endpoint.attempts": 1, "evaluation.endpoint.concurrency": 1}
    config = config_of(echo, server, **once)
    server.control(faults={"server_error": 1.0}, only=open_and_last_prompt(config))
    with pytest.raises(UnscoredLimitError):
        evaluated(config)
    with (folder_of(echo) / "someone-model-1-sampled.partial.jsonl").open("ab") as file:
        file.write(rubbish + b"\n")
    server.control(reset=True)
    records = evaluated(config).records["someone-model-1 sampled"]
    assert [record["reward"] for record in records] == [1.0] * 6
    assert server.stats()["requests"] == 1
    assert "damaged lines: 1; what stood there is asked again" in (folder_of(echo).parent / "log.txt").read_text()


def test_two_processes_do_not_evaluate_one_run_at_a_time(echo: Path, server: ChatServer) -> None:
    config = config_of(echo, server)
    open_and_first_prompt(config)
    lock = echo.parent / "outputs" / "echo" / "stages" / "evaluation.lock"
    with exclusive(lock), pytest.raises(RunError, match=r"process \d+ is evaluating this run: wait for it"):
        evaluated(config)
    assert server.stats()["requests"] == 0
    assert evaluated(config).final == "someone-model-1"


def test_a_missing_key_is_found_before_the_base_has_answered(echo: Path, server: ChatServer) -> None:
    beside = {"evaluation.endpoint.beside_base": True, "evaluation.endpoint.key": "MY_MODEL_KEY"}
    config = config_of(echo, server, **beside, **{"model.name": str(echo.parent / "no-such-model")})
    with pytest.raises(EndpointRefused, match=r"MY_MODEL_KEY \(evaluation.endpoint.key\) is not set"):
        evaluated(config)


def test_the_thinking_of_an_answer_is_kept_though_it_has_one_turn(echo: Path, server: ChatServer) -> None:
    server.control(thinking="hm")
    records = evaluated(config_of(echo, server)).records["someone-model-1 sampled"]
    assert [record["messages"][-1]["thinking"] for record in records] == ["hm"] * 6


def test_an_answer_that_cannot_be_written_as_it_is_does_not_end_an_evaluation(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    said = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": "\ud800", "y": deep}}]}
    row = {"id": "a", "prompt": [user("hello")]}
    scored = Scored(Rollout.of(row, said), Score(reward=0.0, notes={"given": "\udfff", "also": [float("inf")]}))
    keep_records(tmp_path / "kept.jsonl", [record_of(scored)])
    (record,) = read_lines(tmp_path / "kept.jsonl")
    assert record["notes"] == {"given": "\ufffd", "also": ["inf"]}
    arguments = record["messages"][1]["tool_calls"][0]["arguments"]
    assert arguments["x"] == "\ufffd" and "levels deep" in json.dumps(arguments["y"])


def test_what_a_policy_spells_out_can_be_written_into_a_runs_logs(echo: Path, server: ChatServer) -> None:
    run = open_run("echo", config_of(echo, server))
    run.append("rollouts.jsonl", [{"step": 1, "notes": {"calls": ["f(\ud800)"]}}])
    assert run.rollouts() == run.rollouts(last=1) == [{"step": 1, "notes": {"calls": ["f(\ufffd)"]}}]


def open_and_last_prompt(config: Config) -> str:
    open_and_first_prompt(config)
    return str(open_run("echo", config).read_rows("eval")[-1]["prompt"][0]["content"])


def open_and_first_prompt(config: Config, name: str = "echo") -> str:
    run = open_run(name, config)
    prepare(load_task(config.task.name, **config.task.params), run)
    return str(run.read_rows("eval")[0]["prompt"][0]["content"])


def test_another_model_behind_the_url_is_another_evaluation(echo: Path, server: ChatServer) -> None:
    evaluated(config_of(echo, server))
    with pytest.raises(RunError, match=r"evaluation\.endpoint\.model was 'someone/model-1', now 'other'"):
        evaluated(config_of(echo, server, **{"evaluation.endpoint.model": "other"}))


@pytest.mark.parametrize(
    ("model", "name"), [("base", "endpoint"), ("a/b:c", "a-b-c"), ("../x", "x"), ("☃", "endpoint")]
)
def test_a_models_id_becomes_a_file_name_that_is_not_the_bases(
    echo: Path, server: ChatServer, model: str, name: str
) -> None:
    config = config_of(echo, server, **{"evaluation.endpoint.model": model, "evaluation.endpoint.beside_base": True})
    assert [policy.name for policy in policies_of(config, open_run("named", config))] == ["base", name]


def test_a_models_long_id_is_cut_and_told_apart(echo: Path, server: ChatServer) -> None:
    long, other = "m" * 300, "m" * 299 + "n"
    comparison = evaluated(config_of(echo, server, **{"evaluation.endpoint.model": long}))
    another = config_of(echo, server, **{"evaluation.endpoint.model": other})
    (policy,) = policies_of(another, open_run("other", another))
    assert len(comparison.final) == len(policy.name) == 100 and comparison.final != policy.name
    assert server.stats()["bodies"][0]["model"] == long


# -- a user's own rows ------------------------------------------------------------------------------------------------


def given(echo: Path, server: ChatServer, *lines: Any) -> Config:
    path = echo.parent / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config_of(echo, server, **{"evaluation.prompts": str(path), "evaluation.greedy": False})


def test_a_users_own_rows_are_asked(echo: Path, server: ChatServer) -> None:
    rows = [{"id": identity, "prompt": [user(f"say {i}.")], "answer": f"{i}."} for i, identity in enumerate(["a", 2])]
    comparison = evaluated(given(echo, server, *rows))
    assert [(r["row"], r["reward"]) for r in comparison.records["someone-model-1 sampled"]] == [("a", 1.0), (2, 1.0)]


def test_everything_that_is_wrong_with_a_users_own_rows_is_said_with_its_line(echo: Path, server: ChatServer) -> None:
    good = {"id": "a", "prompt": [user("x")]}
    bad = [
        {"prompt": [user("x")]}, {**good, "id": ""}, {**good, "id": ["b"]}, {**good, "id": "b", "prompt": "text"},
        {**good, "id": "c", "prompt": [{"role": "user"}]}, {**good, "id": "d", "prompt": []}, good,
        {**good, "id": "e", "tools": "f"}, {**good, "id": 7}, {**good, "id": "7"},
    ]  # fmt: skip
    with pytest.raises(TaskError) as caught:
        evaluated(given(echo, server, good, *bad))
    head, *told = str(caught.value).splitlines()
    assert head == "9 problems in the data:" and server.stats()["requests"] == 0
    where = [line.partition("prompts.jsonl, ")[2].partition(": ")[0] for line in told]
    assert where == [
        "line 2, id", "line 3, id", "line 4, id", "line 5, prompt", "line 6, prompt", "line 7, prompt", "line 8, id",
        "line 9, tools", "line 11, id",
    ]  # fmt: skip
    assert "'a' stands in line 1 too" in told[6]


def test_without_a_row_nothing_is_evaluated(echo: Path, server: ChatServer) -> None:
    with pytest.raises(RunError, match=r"no held-out row to evaluate: give evaluation\.prompts"):
        evaluated(given(echo, server))


def test_of_a_users_own_rows_only_those_that_are_asked_are_looked_at(echo: Path, server: ChatServer) -> None:
    row = {"id": "a", "prompt": [user("say 1.")], "answer": "1."}
    config = given(echo, server, row, row)
    first = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"rows": 1})})
    assert evaluated(first).summaries[0].n == 1


def test_a_refusal_ends_the_evaluation_at_once(echo: Path, server: ChatServer) -> None:
    server.control(status=401)
    with pytest.raises(EndpointRefused, match="HTTP 401"):
        evaluated(config_of(echo, server, **{"evaluation.endpoint.concurrency": 1}))
    assert server.stats()["requests"] == 1


# -- notebook 4 -------------------------------------------------------------------------------------------------------


def shown(folder: Path) -> str:
    cells = json.loads((folder / "notebooks" / "4_adapter_evaluation.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)


def test_notebook_4_evaluates_a_game_behind_a_url_and_shows_it_turn_by_turn(
    server: ChatServer, tmp_path: Path, places: list[str]
) -> None:
    server.control(replies=["<guess>[cat]</guess>", "<guess>[dog]</guess>"])
    where = ["-p", f"evaluation.endpoint.base_url={server.base_url}", "-p", "evaluation.endpoint.model=m"]
    alone = [*where, "-p", "evaluation.endpoint.beside_base=false", "-p", "run_name=game"]
    alone += ["-p", "task.style=full", "-p", "task.dictionary=any"]
    done = run_cli("4_adapter_evaluation", "configs/smoke/wordle.yaml", *alone, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    page = shown(Path(places[1].partition("=")[2]) / "game")
    assert "m was evaluated alone" in page and "pass@1" in page
    assert "C<sub>" in page and "A<sub>" in page and "assistant, turn 2" in page


def test_notebook_4_evaluates_a_model_behind_a_url_beside_the_base(server: ChatServer, places: list[str]) -> None:
    where = ["-p", f"evaluation.endpoint.base_url={server.base_url}", "-p", "evaluation.endpoint.model=m"]
    where += ["-p", "evaluation.endpoint.beside_base=true"]
    done = run_cli("4_adapter_evaluation", SMOKE, *where, "-p", "run_name=beside", "-p", "evaluation.rows=8", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "m against base, sampled answers" in shown(Path(places[1].partition("=")[2]) / "beside")


# -- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        ({"endpoint": {"base_url": "http://x/v1"}}, "evaluation.endpoint.model is needed too"),
        ({"endpoint": {"model": "m"}}, "evaluation.endpoint.base_url is needed too"),
        ({"endpoint": {"base_url": "x/v1", "model": "m"}}, "give an address like"),
        ({"endpoint": {"base_url": "http://me:pw@x/v1", "model": "m"}}, "without a name or password"),
        ({"endpoint": {"base_url": "http://x/v1", "model": "m"}, "adapter": "a"}, "endpoint and evaluation.adapter ex"),
        (
            {"endpoint": {"base_url": "http://x/v1", "model": "m"}, "runs": ["a"]},
            "endpoint and evaluation.runs exclude",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused_at_load(evaluation: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(SMOKE, {"evaluation": evaluation})


def test_a_key_in_the_config_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="give the NAME of the environment variable") as caught:
        load_config(SMOKE, {"evaluation": {"endpoint": {"base_url": "http://x/v1", "model": "m", "key": "sk-secret1"}}})
    assert "sk-secret1" not in str(caught.value)


def test_the_endpoints_keys_are_known_to_the_command_line() -> None:
    check_key("evaluation.endpoint.base_url")
    with pytest.raises(ConfigError, match=r"Did you mean 'base_url'"):
        check_key("evaluation.endpoint.bas_url")


# -- pass@k -----------------------------------------------------------------------------------------------------------


def answers(row: str, *solved: float | None) -> list[dict[str, Any]]:
    parts = [{} if one is None else {"solved": one} for one in solved]
    return [
        {"row": row, "reward": one, "masked": False, "parts": part} for one, part in zip(solved, parts, strict=True)
    ]


def test_pass_at_k_is_the_chance_that_k_drawn_answers_hold_a_right_one() -> None:
    records = [*answers("a", 1, 0, 0, 0), *answers("b", 0, 0, 0, 0), *answers("c", 1, 1, None)]
    found = {k: (one.mean, one.n) for k, one in pass_at_k(records).items()}
    assert found[1] == (pytest.approx((1 / 4 + 0 + 1) / 3), 3)
    assert found[2] == (pytest.approx((1 / 2 + 0 + 1) / 3), 3)
    assert found[4] == (pytest.approx((1 + 0 + 1) / 3), 3) and set(found) == {1, 2, 4}


def test_a_masked_answer_solves_nothing_and_without_the_part_there_is_no_pass_at_k() -> None:
    masked = {"row": "a", "reward": None, "masked": True, "parts": {}}
    assert [one.mean for one in pass_at_k([*answers("a", 1), masked]).values()] == [0.5, 1.0]
    assert pass_at_k([{"row": "a", "reward": 1.0, "masked": False, "parts": {}}]) == {} and pass_at_k([]) == {}
