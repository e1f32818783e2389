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

import pytest

from lib import PROJECT_ROOT
from lib.rpc import Client, RpcError, start

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
        os.write(1, b"\\xff\\xfe rubbish")
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


@asynccontextmanager
async def child(tmp_path: Path, code: str = PLAIN) -> AsyncIterator[Client]:
    client = start([sys.executable, "-c", code], "worker-0", tmp_path / "worker-0.log")
    try:
        await client.ready(within=30)
        yield client
    finally:
        await client.close(grace=2)


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
        ("die", [3], "died", r"worker-0 \(process \d+\) ended with status 3\. The end of .*\n(.*\n)*last words"),
        ("wire", ["no json"], "rubbish", "no answer: 'no json"),
        ("wire", ["[1, 2]"], "rubbish", "no answer"),
        ("wire", ["7"], "rubbish", "no answer"),
        ("wire", ['{"id": 1, "error": 5}'], "rubbish", "no answer"),
        ("wire", ['{"id": 999, "value": 1}'], "rubbish", "answered twice, or what it was not asked"),
        ("wire", ['{"id": 1, "value": "twice"}', 2], "rubbish", "answered twice"),
        ("hang_up", [], "died", "closed the wire"),
    ],
)
async def test_a_child_that_breaks_fails_all_pending_calls_at_once(
    tmp_path: Path, how: str, arguments: list[object], kind: str, message: str
) -> None:
    async with child(tmp_path, SERVICE + "print('last words', flush=True)\nserve(Service)") as client:
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
        with pytest.raises(RpcError, match=r"was ended by signal 9 \(SIGKILL: by hand, or"):
            await call


@pytest.mark.parametrize("how", ["stopped", "blocked"])
async def test_a_child_that_hangs_is_told_and_ended(tmp_path: Path, how: str) -> None:
    async with child(tmp_path) as client:
        client.silence = 2
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
    async with child(tmp_path) as client:
        client.silence = 2
        time.sleep(3)
        await asyncio.sleep(2)
        assert await client.call("echo", 1) == 1


async def test_what_a_child_prints_goes_to_its_log_and_not_on_the_wire(tmp_path: Path) -> None:
    async with child(tmp_path) as client:
        assert await client.call("chatter") == "well"
        assert b"not from me" in client.log.read_bytes() and b"\xff\xfe rubbish" in client.log.read_bytes()


async def test_progress_lines_reach_the_parents_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lib").propagate = True
    with caplog.at_level(logging.INFO, "lib.rpc"):
        async with child(tmp_path):
            assert "worker-0: made" in caplog.messages


async def test_a_service_that_cannot_be_made_is_the_error_of_ready(tmp_path: Path) -> None:
    code = SERVICE + "def make():\n    raise MemoryError('too large')\nserve(make)"
    client = start([sys.executable, "-c", code], "worker-0", tmp_path / "log")
    with pytest.raises(RpcError, match="too large") as failure:
        await client.ready(within=30)
    assert failure.value.kind == "MemoryError"
    assert (await client.until_lost()).kind == "died"
    await client.close()


async def test_a_child_that_is_not_ready_in_time_says_so_and_can_still_be_waited_for(tmp_path: Path) -> None:
    code = SERVICE + "def make():\n    time.sleep(1)\n    return Service()\nserve(make)"
    client = start([sys.executable, "-c", code], "worker-0", tmp_path / "log")
    early = asyncio.ensure_future(client.call("echo", "asked before it was ready"))
    with pytest.raises(RpcError, match=r"not ready within 0\.3 s"):
        await client.ready(within=0.3)
    await client.ready(within=30)
    assert await early == "asked before it was ready"
    await client.close()


async def test_a_command_that_never_serves_shows_the_end_of_its_log(tmp_path: Path) -> None:
    client = start([sys.executable, "-c", "import nothing_like_this"], "worker-0", tmp_path / "log")
    with pytest.raises(RpcError, match=r"ended with status 1(.|\n)*No module named 'nothing_like_this'"):
        await client.ready(within=30)
    await client.close()


async def test_close_lets_the_service_close_and_leaves_no_process(tmp_path: Path) -> None:
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
    assert not await until(lambda: is_there(client._guard.pid), 0.1)


async def test_a_child_that_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    code = SERVICE + "Service.close = lambda self: time.sleep(60)\nserve(Service)"
    async with child(tmp_path, code) as client:
        pass
    assert not is_there(client.pid)


PARENT = """
import asyncio, sys
from pathlib import Path
from lib.rpc import start

async def main():
    client = start([sys.executable, "-c", sys.argv[1]], "worker-0", Path(sys.argv[2]))
    await client.ready()
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
