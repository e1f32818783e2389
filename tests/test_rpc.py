"""Calls to a child process: side by side, every way of failing told at once, and nothing left running."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import lib.program
from lib import PROJECT_ROOT
from lib.keeper import family
from lib.program import ProgramError
from lib.rpc import Child, Client, RpcError, start

SERVICE = """
import asyncio, os, signal, subprocess, sys, time
from lib.rpc import progress, serve
import lib.rpc.child as child

class Service:
    def __init__(self):
        self.door = asyncio.Event()
        progress("made")
    async def wait(self):
        await self.door.wait()
        return "let in"
    async def let_in(self):
        self.door.set()
    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds
    async def cancelled(self, path):
        try:
            await asyncio.sleep(60)
        finally:
            open(path, "w").close()
    async def block(self):
        time.sleep(60)
    def echo(self, value, times=1):
        return value * times
    def fail(self, text):
        raise FileNotFoundError(text)
    def unsayable(self):
        return {1, 2}
    def die(self, status):
        os._exit(status)
    def chatter(self):
        print('{"id": 1, "value": "not from me"}', flush=True)
        os.write(1, b"\\xff\\xfe rubbish\\n")
        return "well"
    def wire(self, text, number=1):
        for _ in range(number):
            child._server._loop.call_soon_threadsafe(child._server._writer.write, text.encode() + b"\\n")
    def hang_up(self):
        child._server._loop.call_soon_threadsafe(child._server._writer.write_eof)
        time.sleep(60)
    def grandchild(self):
        return subprocess.Popen(["sleep", "60"]).pid
    def _hidden(self):
        return "seen"
    def close(self):
        print("closing time", flush=True)
"""

PLAIN = SERVICE + "serve(Service)"


def program(tmp_path: Path, code: str = PLAIN, **values: Any) -> Child:
    settings = {"name": "worker-0", "log": tmp_path / "worker-0.log", "deadline": 30.0, **values}
    return Child(command=[sys.executable, "-c", code], **settings)


@asynccontextmanager
async def child(tmp_path: Path, code: str = PLAIN, **values: Any) -> AsyncIterator[Client]:
    client = await start(program(tmp_path, code, **values))
    try:
        yield client
    finally:
        await client.close(grace=2)


def started(before: set[int]) -> set[int]:
    """The processes below this one that were not there before: other tests keep servers for the whole session."""
    return family(os.getpid()) - before


async def failure(of: Child) -> str:
    """Why it did not start; nothing of it runs any more."""
    before = family(os.getpid())
    with pytest.raises(ProgramError) as caught:
        await start(of)
    assert not started(before)
    return str(caught.value)


def is_there(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


async def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.02)
    return condition()


async def test_calls_run_side_by_side_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        waiting = [asyncio.ensure_future(client.call("wait")) for _ in range(3)]
        slow = asyncio.ensure_future(client.call("sleep", 0.5))
        assert await client.call("echo", "a", times=2) == "aa"
        assert not slow.done() and not any(call.done() for call in waiting)
        await client.call("let_in")
        assert await asyncio.gather(*waiting) == ["let in"] * 3
        assert await slow == 0.5


async def test_frames_of_many_megabytes_cross_the_wire_both_ways(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        ids = list(range(500_000))
        assert await client.call("echo", ids, times=2) == ids * 2


async def test_what_the_service_raises_arrives_as_its_kind_and_its_message_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-open-up")
    async with child(tmp_path) as client:
        with pytest.raises(RpcError, match="no such thing as <SOME_API_KEY>") as failure:
            await client.call("fail", "no such thing as sesame-open-up")
        assert failure.value.kind == "FileNotFoundError"
        with pytest.raises(RpcError, match="not JSON serializable"):
            await client.call("unsayable")
        with pytest.raises(TypeError, match="not JSON serializable"):
            await client.call("echo", {1, 2})
        assert await client.call("echo", 1) == 1


@pytest.mark.parametrize("name", ["_hidden", "close", "__init__", "nothing"])
async def test_only_public_methods_are_called_and_others_are_told_what_there_is(tmp_path: Path, name: str) -> None:
    async with child(tmp_path) as client:
        with pytest.raises(RpcError, match=f"no call '{name}'.*echo"):
            await client.call(name)


async def test_a_missed_deadline_loses_its_own_call_only_and_ends_the_work(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        other = asyncio.ensure_future(client.call("sleep", 0.6))
        with pytest.raises(RpcError, match=r"cancelled was not answered within 0\.2 s") as failure:
            await client.call("cancelled", str(tmp_path / "ended"), deadline=0.2)
        assert failure.value.kind == "deadline"
        with pytest.raises(RpcError, match="not answered"):
            await client.call("sleep", 0.3, deadline=0.1)
        assert await until((tmp_path / "ended").exists)
        assert await other == 0.6
        assert await client.call("echo", "still here") == "still here"
        assert client.lost is None and not client._given_up


async def test_a_caller_that_is_cancelled_leaves_the_child_usable(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        call = asyncio.ensure_future(client.call("sleep", 0.2))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.sleep(0.4)
        assert await client.call("echo", 1) == 1 and client.lost is None


@pytest.mark.parametrize(
    ("how", "arguments", "kind", "message"),
    [
        ("die", [3], "died", r"worker-0 \(process \d+\) has ended: it exited with status 3\."),
        ("wire", ["no json"], "rubbish", "no answer: 'no json"),
        ("wire", ["[1, 2]"], "rubbish", "no answer"),
        ("wire", ["7"], "rubbish", "no answer"),
        ("wire", ['{"id": 1, "error": 5}'], "rubbish", "no answer"),
        ("wire", ['{"id": 999, "value": 1}'], "rubbish", "answered twice, or what it was not asked"),
        ("wire", ['{"id": 1, "value": "twice"}', 2], "rubbish", "answered twice"),
        ("hang_up", [], "died", "has ended: it closed the wire"),
    ],
)
async def test_a_child_that_breaks_fails_all_pending_calls_at_once(
    tmp_path: Path, how: str, arguments: list[object], kind: str, message: str
) -> None:
    async with child(tmp_path) as client:
        client_calls = [asyncio.ensure_future(client.call("sleep", 60)) for _ in range(3)]
        await asyncio.sleep(0.1)
        client_calls.append(asyncio.ensure_future(client.call(how, *arguments)))
        async with asyncio.timeout(10):
            errors = await asyncio.gather(*client_calls[1:3], return_exceptions=True)
        assert all(isinstance(error, RpcError) and error.kind == kind for error in errors)
        with pytest.raises(RpcError, match=message):
            raise errors[0]  # type: ignore[misc]
        with pytest.raises(RpcError, match=message):
            await client.call("echo", 1)
        assert (await client.until_lost()).kind == kind
        assert await until(lambda: not is_there(client.pid))
        await asyncio.gather(*client_calls, return_exceptions=True)


async def test_a_child_that_is_killed_is_told_by_the_signal(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        call = asyncio.ensure_future(client.call("sleep", 60))
        await asyncio.sleep(0.1)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(
            RpcError, match=r"worker-0 \(process \d+\) has ended: it was ended by SIGKILL \(by hand, or"
        ):
            await call


async def test_what_waited_for_a_lost_child_is_told_its_last_50_lines_and_what_to_change(tmp_path: Path) -> None:
    code = SERVICE + "for number in range(60): print('line', number)\nserve(Service)"
    advice = [(r"line (3\d)", r"less than \1 lines"), ("never said", "x")]
    client = await start(program(tmp_path, code, advice=advice))
    call = asyncio.ensure_future(client.call("sleep", 60))
    await asyncio.sleep(0.1)
    client.kill()
    with pytest.raises(RpcError) as caught:
        await call
    first, change, head, *shown = str(caught.value).split("\n")
    assert "was ended by SIGKILL" in first and change == "What to change: less than 30 lines"
    assert str(client.log) in head and shown == [f"  line {number}" for number in range(10, 60)]
    with pytest.raises(RpcError) as later:
        await client.call("echo", 1)
    assert str(later.value) == first
    await client.close()


@pytest.mark.parametrize("how", ["stopped", "blocked"])
async def test_a_child_that_hangs_is_told_and_ended(tmp_path: Path, how: str) -> None:
    async with child(tmp_path, silence=2) as client:
        calls = [asyncio.ensure_future(client.call("sleep", 60)) for _ in range(2)]
        await asyncio.sleep(0.1)
        if how == "stopped":
            os.kill(client.pid, signal.SIGSTOP)
        else:
            calls.append(asyncio.ensure_future(client.call("block")))
        async with asyncio.timeout(10):
            errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {getattr(error, "kind", None) for error in errors} == {"hung"}
        assert await until(lambda: not is_there(client.pid))


async def test_a_parent_that_slept_does_not_take_its_child_for_hung(tmp_path: Path) -> None:
    async with child(tmp_path, silence=2) as client:
        time.sleep(3)
        await asyncio.sleep(2)
        assert await client.call("echo", 1) == 1


async def test_what_a_child_prints_goes_to_its_log_and_not_on_the_wire(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        assert await client.call("chatter") == "well"
        assert await until(lambda: "rubbish" in client.log.read_text())
        assert "not from me" in client.log.read_text()


async def test_progress_lines_reach_the_parents_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lib").propagate = True
    with caplog.at_level(logging.INFO, "lib.rpc"):
        async with child(tmp_path):
            assert "worker-0: made" in caplog.messages


# the start ------------------------------------------------------------------------------------------------------------
async def test_while_it_waits_it_says_so_with_what_was_said_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("lib").propagate = True
    monkeypatch.setattr(lib.program, "PROGRESS_SECONDS", 0.5)
    code = SERVICE + "def make():\n    print('loading')\n    time.sleep(1.8)\n    return Service()\nserve(make)"
    with caplog.at_level(logging.INFO, "lib"):
        async with child(tmp_path, code):
            pass
    lines = [line for line in caplog.messages if "waiting" in line]
    assert len(lines) in (2, 3, 4)
    assert lines[-1].startswith("worker-0: waiting for its service, ")
    assert lines[-1].endswith(" of 30 s; it said last: loading")


async def test_a_service_that_cannot_be_made_is_why_there_is_none(tmp_path: Path) -> None:
    code = SERVICE + "def make():\n    raise MemoryError('too large')\nserve(make)"
    why = await failure(program(tmp_path, code, advice=[("too (large)", r"make it less \1")]))
    assert why.startswith(
        "worker-0 did not start. It said: MemoryError: too large\nWhat to change: make it less large\n"
    )
    assert "  Traceback (most recent call last):" in why.split("\n")


async def test_one_that_is_not_ready_in_time_is_ended_and_not_tried_again(tmp_path: Path) -> None:
    code = SERVICE + "print('connection reset')\ndef make():\n    time.sleep(60)\nserve(make)"
    began = time.monotonic()
    why = await failure(program(tmp_path, code, deadline=2.0, deadline_setting="distributed.start_deadline"))
    assert why.startswith("worker-0 is not ready after 2 s: still waiting for its service.")
    assert "raise distributed.start_deadline" in why and why.endswith("connection reset")
    assert time.monotonic() - began < 8


async def test_a_command_that_never_serves_is_told_by_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    why = await failure(program(tmp_path, "import nothing_like_this"))
    assert why.startswith("worker-0 did not start: it exited with status 1 after ")
    assert "It said: ModuleNotFoundError: No module named 'nothing_like_this'\n" in why
    assert "worker-0 did not start: it was ended by SIGKILL (by hand, or" in await failure(
        program(tmp_path, "import os; os.kill(os.getpid(), 9)")
    )


async def test_a_transient_failure_is_tried_again_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lib.program, "FIRST_WAIT", 0.05)
    count = tmp_path / "count"
    code = (
        SERVICE
        + f"""
def make():
    with open({str(count)!r}, "a") as file: file.write("x")
    if len(open({str(count)!r}).read()) < 3: raise OSError("Connection reset by peer")
    return Service()
serve(make)
"""
    )
    async with child(tmp_path, code):
        assert count.read_text() == "xxx"
    count.write_text("")
    assert "Connection reset" in await failure(program(tmp_path, code, attempts=1))
    assert count.read_text() == "x"
    count.write_text("")
    await failure(program(tmp_path, code.replace("Connection reset", "Something else")))
    assert count.read_text() == "x"


async def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    before, code = (
        family(os.getpid()),
        SERVICE + "def make():\n    print('here', flush=True)\n    time.sleep(60)\nserve(make)",
    )
    starting = asyncio.ensure_future(start(program(tmp_path, code)))
    log = tmp_path / "worker-0.log"
    assert await until(lambda: log.exists() and "here" in log.read_text())
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not started(before)


# the end --------------------------------------------------------------------------------------------------------------
async def test_close_lets_the_service_close_and_leaves_no_process(tmp_path: Path) -> None:
    before = family(os.getpid())
    async with child(tmp_path) as client:
        grandchild = await client.call("grandchild")
        assert is_there(grandchild)
        call = asyncio.ensure_future(client.call("wait"))
        await asyncio.sleep(0.1)
    assert b"closing time" in client.log.read_bytes()
    assert not is_there(client.pid) and await until(lambda: not is_there(grandchild))
    with pytest.raises(RpcError, match=r"closed|given up") as failure:
        await call
    assert failure.value.kind in ("closed", "deadline")
    with pytest.raises(RpcError, match="worker-0 is closed"):
        await client.call("echo", 1)
    assert not started(before)


async def test_a_child_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    code = SERVICE + "Service.close = lambda self: time.sleep(60)\nserve(Service)"
    async with child(tmp_path, code) as client:
        pass
    assert not is_there(client.pid)


async def test_a_close_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    code = SERVICE + "Service.close = lambda self: time.sleep(60)\nserve(Service)"
    before = family(os.getpid())
    client = await start(program(tmp_path, code))
    assert started(before)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await client.close(grace=0.3)
    assert await until(lambda: not started(before), 5)


PARENT = """
import asyncio, sys
from pathlib import Path
from lib.rpc import Child, start

async def main():
    child = Child(name="worker-0", command=[sys.executable, "-c", sys.argv[1]], log=Path(sys.argv[2]))
    client = await start(child)
    print(client.pid, await client.call("grandchild"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("child_state", ["running", "stopped"])
async def test_a_killed_parent_takes_the_child_and_its_children_with_it(tmp_path: Path, child_state: str) -> None:
    command = [sys.executable, "-c", PARENT, PLAIN, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_there, pids))
        if child_state == "stopped":
            os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
    assert await until(lambda: not any(map(is_there, pids)))
