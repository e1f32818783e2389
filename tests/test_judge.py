"""The judge: what it is sent, what it survives, what it costs, and when it gives up. A real server, a real client."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judge_server import HTTP_FAULTS, JudgeServer, running_judge
from pydantic import ValidationError

from lib import calls
from lib.calls import takes_temperature
from lib.cost import load_prices, read_bill, record_usage
from lib.judge import (
    Judge,
    JudgeError,
    JudgeRefused,
    JudgeSettings,
    Reply,
    UselessReply,
    check_judge,
    load_catalogue,
    open_judge,
)
from lib.task import TaskError, load_task
from lib.wire import retry_after

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
TODAY = datetime.date(2026, 11, 21)
KEY = "a-key-that-nobody-must-see"


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    with running_judge() as server:
        yield server


@pytest.fixture
def server(running: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> JudgeServer:
    """The judge, well-behaved and with nothing counted; no run, and short waits between attempts."""
    running.control(reset=True)
    monkeypatch.delenv("WORKBENCH_RUN", raising=False)
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.02)
    return running


@pytest.fixture
def run(tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run that this process works for."""
    monkeypatch.setenv("WORKBENCH_RUN", str(tmp_path))
    return tmp_path


def judge_at(server: JudgeServer, **settings: Any) -> Judge:
    """A judge that nobody shares. Its model has a price."""
    values = {"provider": "compatible", "model": "gpt-4o-mini", "base_url": server.base_url, "timeout": 5.0}
    return Judge(JudgeSettings(**{**values, **settings}))


async def ask(judge: Judge, text: str = "hello") -> Reply:
    return await judge.ask([{"role": "user", "content": text}], SCHEMA, "reply")


async def ask_all(judge: Judge, count: int) -> list[Reply]:
    return await asyncio.gather(*(ask(judge, f"text {number}") for number in range(count)))


async def refusal(judge: Judge) -> str:
    with pytest.raises(JudgeRefused) as caught:
        await ask(judge)
    return str(caught.value)


def usage_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "cost" / "usage.jsonl").read_text().splitlines()]


# -- what is sent and what comes back ---------------------------------------------------------------------------------


async def test_a_call_is_one_strict_json_completion_and_comes_back_with_what_it_took(server: JudgeServer) -> None:
    server.control(latency=0.05)
    reply = await ask(judge_at(server, max_tokens=77))
    (body,) = server.stats()["bodies"]
    assert body == {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "hello"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}},
        "max_tokens": 77,
        "temperature": 0.0,
    }
    assert json.loads(reply.text) == {"text": "hello"} and reply.attempts == 1 and 0.05 <= reply.seconds < 5
    assert (reply.input_tokens, reply.output_tokens) == (1, 4)
    assert reply.usd == pytest.approx((1 * 0.15 + 4 * 0.60) / 1e6)


async def test_openai_is_sent_the_newer_name_of_the_token_limit(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    await ask(judge_at(server, provider="openai", model="", reasoning_effort="low"))
    stats = server.stats()
    (body,) = stats["bodies"]
    assert body["model"] == "gpt-4o-mini" and body["reasoning_effort"] == "low" and stats["keys"] == [KEY]
    assert body["max_completion_tokens"] == 4096 and "max_tokens" not in body


@pytest.mark.parametrize(
    ("model", "temperature", "sent"),
    [
        ("gpt-4o-mini", "auto", 0.0),
        ("gpt-4o-mini", 0.7, 0.7),
        ("gpt-4o-mini", "none", None),
        ("gpt-6-luna", "auto", None),
        ("openai/gpt-5.6-luna", "auto", None),
        ("o3-mini", "auto", None),
        ("gemini-3.8-flash", "auto", None),
        ("gpt-6-luna", 0, 0.0),
        ("gpt-oss:20b", "auto", 0.0),
        ("olmo-2", "auto", 0.0),
        ("gemini-2.5-flash-lite", "auto", 0.0),
    ],
)
async def test_a_temperature_goes_only_to_models_that_take_one(
    server: JudgeServer, model: str, temperature: Any, sent: float | None
) -> None:
    await ask(judge_at(server, model=model, temperature=temperature))
    assert server.stats()["bodies"][0].get("temperature") == sent


async def test_text_that_cannot_be_written_as_utf8_is_sent_all_the_same(server: JudgeServer) -> None:
    text = "half \ud83d, whole \ud83d\ude00, zero \0, " + "long " * 20_000
    reply = await ask(judge_at(server), text)
    assert json.loads(reply.text)["text"] == text.replace("\ud83d\ude00", "😀").replace("\ud83d", "\ufffd")


def test_the_ledger_name_holds_what_decides_a_verdict_and_nothing_else() -> None:
    plain = JudgeSettings()
    assert plain.name == "gpt-4o-mini, https://api.openai.com/v1, temperature 0"
    same = [{"concurrency": 3}, {"budget_usd": 1.0}, {"timeout": 9.0}, {"model": "gpt-4o-mini"}, {"temperature": 0.0}]
    assert {JudgeSettings(**values).name for values in same} == {plain.name}
    other = [{"model": "gpt-6-luna"}, {"temperature": 0.5}, {"base_url": "http://a/v1"}, {"reasoning_effort": "low"}]
    assert len({JudgeSettings(**values).name for values in other} | {plain.name}) == len(other) + 1
    assert plain.model_copy(update={"model": "gpt-6-luna"}).name == JudgeSettings(model="gpt-6-luna").name


async def test_one_judge_serves_loop_after_loop(server: JudgeServer) -> None:
    judge = judge_at(server)

    def elsewhere() -> list[Reply]:
        return asyncio.run(ask_all(judge, 3))

    for _ in range(2):
        assert len(await asyncio.to_thread(elsewhere)) == 3
    await ask(judge)
    assert judge.usage.calls == 7 and judge.usage.failed == 0


def test_the_same_settings_share_one_judge_and_a_new_key_gets_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = open_judge(JudgeSettings())
    assert open_judge(JudgeSettings()) is judge and open_judge(JudgeSettings(concurrency=2)) is not judge
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "2")
    assert open_judge(JudgeSettings()) is not judge


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", HTTP_FAULTS)
async def test_a_request_that_fails_is_sent_again(server: JudgeServer, fault: str) -> None:
    server.control(script=[fault, fault])
    judge = judge_at(server, timeout=0.3)
    reply = await ask(judge)
    assert reply.attempts == 3 and server.stats()["faults"] == {fault: 2}
    assert judge.usage.calls == 1 and judge.usage.retries == 2 and judge.usage.failed == 0


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 529])
async def test_after_its_attempts_a_call_fails_with_a_cause_that_can_be_counted(
    server: JudgeServer, status: int
) -> None:
    server.control(status=status)
    judge = judge_at(server, attempts=3)
    with pytest.raises(JudgeError) as caught:
        await ask(judge)
    assert str(caught.value) == f"judge: HTTP {status} after 3 attempts" and type(caught.value) is JudgeError
    assert caught.value.spent.attempts == 3 and server.stats()["requests"] == 3
    server.control(status=0)
    assert (await ask(judge)).attempts == 1  # it is not held against the next call


async def test_a_bad_request_is_not_repeated_and_told_once(
    server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.control(status=400, code="context_length_exceeded")
    judge = judge_at(server)
    for _ in range(2):
        with pytest.raises(JudgeError, match=r"^judge: HTTP 400 \(context_length_exceeded\)$"):
            await ask(judge)
    assert server.stats()["requests"] == 2
    assert [message for message in caplog.messages if "forced to 400" in message] == [
        "judge: HTTP 400 (context_length_exceeded): forced to 400"
    ]


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"status": 401}, "HTTP 401 .*Look at the key in MY_JUDGE"),
        ({"status": 403}, "HTTP 403 .*Look at the key in MY_JUDGE"),
        ({"status": 402}, "HTTP 402 .*the account"),
        ({"models": ["another"]}, r"HTTP 404 .*`gpt-4o-mini` does not exist.*task\.judge\.model"),
        ({"status": 429, "code": "insufficient_quota"}, "HTTP 429 .*the account"),
        ({"status": 400, "code": "API_KEY_INVALID"}, "HTTP 400 .*Look at the key in MY_JUDGE"),
        ({"status": 400, "code": "unsupported_value"}, r"HTTP 400 .*task\.judge"),
    ],
)
async def test_what_can_never_work_is_refused_at_once_and_remembered(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, control: dict[str, Any], told: str
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    server.control(**control)
    judge = judge_at(server, key="MY_JUDGE", concurrency=4)
    causes = await asyncio.gather(*(ask(judge) for _ in range(40)), return_exceptions=True)
    assert {type(cause) for cause in causes} == {JudgeRefused} and len({str(cause) for cause in causes}) == 1
    with pytest.raises(JudgeRefused, match=told):
        await ask(judge)
    assert server.stats()["requests"] <= 4  # those that were in flight
    server.control(reset=True)
    monkeypatch.setattr(calls, "REMEMBERED", 0.0)
    assert await ask(judge)  # mended, after a minute


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 400, "code": "unsupported_value"}])
async def test_a_text_that_is_turned_away_does_not_stop_the_judging_of_others(
    server: JudgeServer, fault: dict[str, Any]
) -> None:
    judge = judge_at(server)
    await ask(judge)
    server.control(**fault)
    with pytest.raises(JudgeError) as turned_away:
        await ask(judge, "what a gateway's moderation does not let through")
    assert not isinstance(turned_away.value, JudgeRefused)
    server.control(status=0)
    assert (await ask(judge)).text


async def test_an_endpoint_that_is_not_there_is_refused_after_the_retries(server: JudgeServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        judge = judge_at(server, base_url=url, attempts=2)
        told = await refusal(judge)
        assert told.startswith(f"judge: no connection from {url} after 2 attempts (")
        assert "task.judge.base_url" in told
        began = time.perf_counter()
        assert await refusal(judge) == told and time.perf_counter() - began < 0.05


async def test_an_endpoint_that_has_answered_before_is_not_given_up(server: JudgeServer) -> None:
    judge = judge_at(server, attempts=2)
    await ask(judge)
    server.control(script=["reset", "reset"])
    with pytest.raises(JudgeError) as caught:
        await ask(judge)
    assert type(caught.value) is JudgeError and str(caught.value) == "judge: no connection after 2 attempts"
    assert (await ask(judge)).attempts == 1


async def test_an_answer_that_never_ends_is_cut_off_in_time(server: JudgeServer) -> None:
    server.control(trickle=True)
    began = time.perf_counter()
    with pytest.raises(JudgeError, match=r"^judge: no answer in time after 2 attempts$"):
        await asyncio.wait_for(ask(judge_at(server, attempts=2, timeout=0.2)), 10)
    assert time.perf_counter() - began < 5


async def test_a_web_page_is_no_judge(server: JudgeServer) -> None:
    server.control(page=True)
    assert "an answer that is no chat completion" in await refusal(judge_at(server, attempts=2))


@pytest.mark.parametrize(
    ("fault", "why", "cause"),
    [
        ("truncated", "truncated", "judge: cut off at 4096 tokens (task.judge.max_tokens)"),
        ("refusal", "refusal", "judge: it refused to answer"),
        ("empty", "empty", "judge: an empty reply"),
    ],
)
async def test_a_useless_reply_says_why_and_what_it_cost(
    run: Path, server: JudgeServer, fault: str, why: str, cause: str
) -> None:
    server.control(script=[fault])
    judge = judge_at(server)
    with pytest.raises(UselessReply) as caught:
        await ask(judge)
    spent = caught.value.spent
    assert (caught.value.why, str(caught.value)) == (why, cause)
    assert spent.text == "" and spent.attempts == 1 and spent.usd and spent.usd > 0
    (line,) = usage_lines(run)
    assert line["error"] == cause and line["usd"] == spent.usd and judge.usage.failed == 1


async def test_half_of_the_requests_failing_loses_no_call(server: JudgeServer) -> None:
    server.control(faults={"rate_limit": 0.2, "server_error": 0.2, "reset": 0.1}, retry_after=0.02, seed=3)
    judge = judge_at(server, attempts=20)
    replies = await ask_all(judge, 60)
    stats = server.stats()
    assert [json.loads(reply.text)["text"] for reply in replies] == [f"text {number}" for number in range(60)]
    assert stats["requests"] == judge.usage.requests == 60 + sum(stats["faults"].values())
    assert stats["max_in_flight"] <= 64 and set(stats["faults"]) == {"rate_limit", "server_error", "reset"}


async def test_the_same_seed_means_the_same_faults(server: JudgeServer) -> None:
    seen = []
    for seed, concurrency in ((1, 1), (1, 16), (2, 1)):
        server.control(reset=True, seed=seed, faults={"server_error": 0.5})
        replies = await ask_all(judge_at(server, concurrency=concurrency, attempts=20), 20)
        seen.append([reply.attempts for reply in replies])
    assert seen[0] == seen[1] != seen[2]


# -- slots and pauses -------------------------------------------------------------------------------------------------


async def test_no_more_requests_are_in_flight_than_allowed(server: JudgeServer) -> None:
    server.control(latency=0.03)
    await ask_all(judge_at(server, concurrency=5), 40)
    assert server.stats()["max_in_flight"] == 5


async def test_a_call_that_waits_for_its_next_attempt_holds_no_slot(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.6)
    server.control(script=["server_error"])
    judge, ended = judge_at(server, concurrency=1), []

    async def one(name: str) -> None:
        await ask(judge, name)
        ended.append(name)

    await asyncio.gather(one("failed first"), one("second"))
    assert ended == ["second", "failed first"]


@pytest.mark.parametrize("form", ["ms", "seconds", "date"])
async def test_a_retry_after_holds_every_call_of_the_judge(server: JudgeServer, form: str) -> None:
    server.control(script=["rate_limit"], retry_after=0.4, retry_form=form)
    judge = judge_at(server, concurrency=8)
    first = asyncio.create_task(ask(judge, "first"))
    while not server.stats()["faults"]:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # the 429 is on its way
    began = time.perf_counter()
    await asyncio.gather(first, ask_all(judge, 20))
    assert time.perf_counter() - began > 0.25 and server.stats()["early"] == 0


async def test_an_endpoint_that_asks_for_hours_fails_the_call_instead_of_holding_it(server: JudgeServer) -> None:
    server.control(script=["rate_limit"], retry_after=7200, retry_form="seconds")
    judge = judge_at(server)
    for _ in range(2):
        with pytest.raises(JudgeError, match=r"^judge: told to wait for longer than 600 s$"):
            await ask(judge)
    assert server.stats()["requests"] == 1


async def test_a_cancelled_call_gives_its_slot_back(server: JudgeServer) -> None:
    server.control(latency=5)
    judge = judge_at(server, concurrency=1, timeout=30)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(judge), 0.2)
    server.control(latency=0)
    assert (await asyncio.wait_for(ask(judge), 5)).attempts == 1


def test_a_wait_is_read_in_every_form_that_servers_write() -> None:
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "1.5"}) == 1.5 and retry_after({"retry-after": "0"}) == 0
    assert retry_after({"retry-after": formatdate(time.time() + 20, usegmt=True)}) == pytest.approx(20, abs=2)
    assert retry_after({"retry-after": formatdate(time.time() - 20, usegmt=True)}) == 0
    assert retry_after({}, '[{"error": {"details": [{"retryDelay": "39s"}]}}]') == 39
    for nonsense in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "-3"}):
        assert retry_after(nonsense) is None


# -- dollars ----------------------------------------------------------------------------------------------------------


async def test_every_call_is_in_the_runs_bill(run: Path, server: JudgeServer) -> None:
    server.control(script=["server_error"])
    judge = judge_at(server)
    replies = await ask_all(judge, 3)
    lines = usage_lines(run)
    assert sorted(line["retries"] for line in lines) == [0, 0, 1]
    assert all(line["role"] == "judge" and line["model"] == "gpt-4o-mini" and line["priced"] for line in lines)
    total = sum(reply.usd or 0 for reply in replies)
    assert read_bill(run).lines["judge"].usd == pytest.approx(total) == judge.usage.usd
    assert judge.usage.output_tokens == sum(line["output_tokens"] for line in lines) > 0
    assert judge.usage.latency == pytest.approx(sum(reply.seconds for reply in replies) / 3)


async def test_a_call_that_failed_is_in_the_bill_with_its_cause(run: Path, server: JudgeServer) -> None:
    server.control(status=503)
    with pytest.raises(JudgeError):
        await ask(judge_at(server, attempts=2))
    (line,) = usage_lines(run)
    assert (line["error"], line["usd"], line["retries"]) == ("judge: HTTP 503 after 2 attempts", 0.0, 1)


async def test_a_model_without_a_price_costs_an_unknown_amount_and_that_is_said_once(
    run: Path, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    judge = judge_at(server, model="my-own")
    replies = await ask_all(judge, 3)
    assert {reply.usd for reply in replies} == {None} and judge.usage.usd is None
    assert {(line["usd"], line["priced"]) for line in usage_lines(run)} == {(0.0, False)}
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "no token price for 'my-own'" in told and "configs/prices.yaml" in told


async def test_a_snapshot_has_the_price_of_its_model(server: JudgeServer) -> None:
    assert (await ask(judge_at(server, model="gpt-4o-mini-2024-07-18"))).usd == (await ask(judge_at(server))).usd


async def test_a_budget_ends_the_calls_before_it_is_passed(run: Path, server: JudgeServer) -> None:
    server.control(latency=0.01)
    cost = (await ask(judge_at(server), "text 0")).usd or 0
    judge = judge_at(server, budget_usd=21.5 * cost, concurrency=4)
    ended = await asyncio.gather(*(ask(judge, f"text {number}") for number in range(60)), return_exceptions=True)
    refused = {str(error) for error in ended if isinstance(error, BaseException)}
    assert refused == {
        f"judge: task.judge.budget_usd, {21.5 * cost:g} USD for the judges of a run, is used up: raise it to go on"
    }
    # 1 before and 20 now: every text costs the same here
    assert server.stats()["requests"] == 21 and read_bill(run).usd == pytest.approx(21 * cost)


async def test_under_a_budget_the_first_call_goes_alone_to_learn_what_one_costs(run: Path, server: JudgeServer) -> None:
    server.control(latency=0.1)
    judge = judge_at(server, budget_usd=1e-9)
    ended = await asyncio.gather(*(ask(judge) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(reply, Reply) for reply in ended) == server.stats()["requests"] == 1


async def test_a_budget_counts_what_other_processes_have_spent(run: Path, server: JudgeServer) -> None:
    judge = judge_at(server, budget_usd=1.0)
    await ask(judge)
    record_usage(run, "judge", 2.0, model="another")
    assert "is used up" in await refusal(judge) and server.stats()["requests"] == 1
    record_usage(run, "sandboxes", 2.0)
    assert await ask(judge_at(server, budget_usd=9.0))


@pytest.mark.parametrize("where", ["ahead", "call"])
async def test_a_budget_without_a_price_is_refused_before_the_first_call(server: JudgeServer, where: str) -> None:
    judge = judge_at(server, model="my-own", budget_usd=1.0)
    with pytest.raises(JudgeRefused, match=r"budget_usd 1 cannot be kept .*add `my-own: .*configs/prices\.yaml"):
        check_judge(judge.settings) if where == "ahead" else await ask(judge)
    assert server.stats()["requests"] == 0


async def test_a_budget_is_not_kept_by_guessing(server: JudgeServer) -> None:
    server.control(usage=False)
    judge = judge_at(server, budget_usd=1.0)
    assert (await ask(judge)).usd is None
    assert "do not say how many tokens" in await refusal(judge)


# -- before anything starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "variable", "title"),
    [
        ({}, "OPENAI_API_KEY", "OpenAI"),
        ({"provider": "gemini"}, "GEMINI_API_KEY", "Gemini"),
        ({"key": "MY_JUDGE"}, "MY_JUDGE", "OpenAI"),
    ],
)
def test_a_missing_key_is_named_with_its_provider(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], variable: str, title: str
) -> None:
    for value in (None, "  "):
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
        with pytest.raises(JudgeRefused, match=rf"no key for {title}: the environment variable {variable} is not set"):
            check_judge(JudgeSettings(**settings), TODAY)
    monkeypatch.setenv(variable, KEY)
    check_judge(JudgeSettings(**settings), TODAY)


def test_a_judge_without_a_key_needs_none() -> None:
    assert check_judge(JudgeSettings(provider="compatible", model="m", base_url="http://127.0.0.1:1/v1")) == []
    assert check_judge(JudgeSettings(provider="reward_model", model="folder")) == []


async def test_a_key_is_never_shown(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    server.control(key="another")
    told = await refusal(judge_at(server, key="MY_JUDGE"))
    assert "Incorrect API key provided: <MY_JUDGE>" in told and KEY not in told + caplog.text
    for pasted in ("sk-proj-abc123", "AIzaSyAbc123"):
        with pytest.raises(ValidationError) as caught:
            JudgeSettings(key=pasted)
        assert "the NAME of the environment variable" in str(caught.value.errors()[0]["msg"])
        with pytest.raises(TaskError) as refused:
            load_task("judged", judge={"key": pasted})
        assert pasted not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "day", "told"),
    [
        ("", datetime.date(2026, 10, 15), None),
        ("", datetime.date(2026, 10, 16), "in 90 days: set task.judge.model to gpt-6-luna"),
        ("gpt-4o-mini", datetime.date(2027, 1, 13), "leaves the OpenAI API on 14 January 2027, in 1 days"),
        ("gpt-4o-mini-2024-07-18", TODAY, "set task.judge.model to gpt-6-luna (no temperature is sent to it)"),
        ("gpt-6-luna", TODAY, None),
        ("my-own-2027-01-01", TODAY, None),
    ],
)
def test_an_id_that_ends_soon_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, model: str, day: datetime.date, told: str | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    warnings = check_judge(JudgeSettings(model=model), day)
    assert len(warnings) == (told is not None) and (told or "") in "".join(warnings)


@pytest.mark.parametrize(
    ("settings", "day", "told"),
    [
        ({}, datetime.date(2027, 1, 14), "gpt-4o-mini has left the OpenAI API on 14 January 2027: .* to gpt-6-luna"),
        ({"model": "gpt-4o-2024-05-13"}, TODAY, "23 October 2026: set task.judge.model to gpt-5.6-sol"),
        ({"provider": "gemini", "model": "models/gemini-1.5-pro"}, TODAY, "has left the Gemini API .*gemini-3.8-flash"),
    ],
)
def test_a_retired_id_is_refused_with_its_replacement(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], day: datetime.date, told: str
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    with pytest.raises(JudgeRefused, match=told):
        check_judge(JudgeSettings(**settings), day)
    elsewhere = JudgeSettings(**settings, base_url="http://127.0.0.1:1/v1", key="MY_JUDGE")
    assert check_judge(elsewhere, day) == []  # others keep an id for longer


def test_no_id_is_shipped_or_recommended_that_has_been_retired() -> None:
    catalogue = load_catalogue()
    ends = {model: retirement.ends for model, retirement in catalogue.retirements.items()}
    for model in (catalogue.shipped.openai, catalogue.shipped.gemini):
        assert ends.get(model, datetime.date.max) > catalogue.date
        assert model in load_prices().tokens
    for retirement in catalogue.retirements.values():
        assert retirement.use not in ends
    assert ends["gpt-4o-mini"] == datetime.date(2027, 1, 14) and not takes_temperature("gpt-6-luna")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("shipped: [", "cannot be read"),
        ("date: 2026-11-21", "cannot be used:\nshipped: Field required"),
        (None, r"is missing: restore it with `git checkout configs/judges\.yaml`"),
    ],
)
def test_a_broken_file_of_model_ids_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "judges.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(JudgeRefused, match=told):
        load_catalogue(path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"provider": "compatible", "base_url": "http://a/v1"}, "judge.model is needed for the provider 'compatible'"),
        ({"provider": "compatible", "model": "m"}, "judge.base_url is needed"),
        ({"provider": "reward_model"}, "judge.model is needed"),
        ({"provider": "reward_model", "model": "m", "base_url": "http://a/v1"}, "runs in this process"),
        ({"base_url": "localhost:8000"}, "give an address like http://"),
        ({"base_url": "http://me:secret@a/v1"}, "without a name or password"),
        ({"temperature": 2.5}, "a number from 0 to 2"),
        ({"temperature": "hot"}, "'auto' or 'none'"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"timeout": float("inf")}, "finite"),
        ({"budget_usd": -1}, "greater than or equal to 0"),
        ({"modle": "x"}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        JudgeSettings(**settings)


def test_importing_and_checking_a_judge_loads_no_client() -> None:

    code = "import sys; from lib.judge import *; open_judge(JudgeSettings()); check_judge(JudgeSettings()); "
    code += "print('openai' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"OPENAI_API_KEY": KEY},
    )
    assert done.stdout.strip() == "False"
