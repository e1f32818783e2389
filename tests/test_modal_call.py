"""A container as it is asked: what loses it, who is told, and that nothing of it stays. Modal is a few lines here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from simulated_roles import (
    Letters,
    SimulatedHosts,
    SimulatedTask,
    StopAfter,
    Timing,
    Witness,
    make_config,
    simulated_rows,
)

from lib import modal_call
from lib.backends import distributed
from lib.generate import Chat
from lib.modal_call import ENDING, REPLACED, Container
from lib.orchestrator import OrchestratorError
from lib.rpc import RpcError
from lib.runfolder import Run


class Call:
    """An input of a container: what its function does, unless it is cancelled."""

    def __init__(self, name: str, work: Coroutine[Any, Any, Any], log: list[str]) -> None:
        self._name, self._log = name, log
        self._task = asyncio.ensure_future(work)
        self.get = self.cancel = self
        self._doing = "get"

    def __getattribute__(self, name: str) -> Any:
        if name in ("get", "cancel"):
            object.__setattr__(self, "_doing", name)
        return object.__getattribute__(self, name)

    async def aio(self, terminate_containers: bool = False) -> Any:
        if self._doing == "cancel":
            self._log.append(f"{self._name} cancelled" + (", container ended" if terminate_containers else ""))
            self._task.cancel()
            return None
        return await asyncio.shield(self._task)


class Modal:
    """An instance of a Modal class: `instance.function.spawn.aio(...)`."""

    def __init__(self, **functions: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.log: list[str] = []
        known = {"hello": hello, "begin": nothing, "watch": watch, "ask": nothing, "end": nothing} | functions
        for name, function in known.items():
            setattr(self, name, self._function(name, function))

    def _function(self, name: str, function: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
        log = self.log

        class Spawn:
            async def aio(self, *arguments: Any) -> Call:
                if name != "watch":
                    log.append(name)
                return Call(name, function(*arguments), log)

        return type("Function", (), {"spawn": Spawn()})()


async def hello() -> dict[str, Any]:
    return {"value": {"token": "t1", "gpus": []}}


async def nothing(*arguments: Any) -> dict[str, Any]:
    return {"value": None}


async def watch(token: str, seconds: float) -> dict[str, Any]:
    await asyncio.sleep(seconds)
    return {"value": None}


async def for_ever(*arguments: Any) -> dict[str, Any]:
    await asyncio.sleep(3600)
    return {"value": None}


def after(seconds: float, answer: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def function(*arguments: Any) -> Any:
        await asyncio.sleep(seconds)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return function


async def opened(modal: Modal, idle: float = 0.4) -> Container:
    container = Container("worker-0", modal, idle)
    await container.open({})
    return container


def test_calls_are_answered_and_errors_keep_their_kind() -> None:
    async def work() -> None:
        answers = iter([{"value": [1, 2]}, {"error": {"kind": "SyncError", "message": "not whole"}}])

        async def ask(token: str, method: str, arguments: list[Any]) -> Any:
            assert (token, method, arguments) == ("t1", "generate", ["x"])
            return next(answers)

        container = await opened(Modal(ask=ask))
        assert await container.call("generate", "x") == [1, 2]
        with pytest.raises(RpcError, match="not whole") as caught:
            await container.call("generate", "x")
        assert caught.value.kind == "SyncError" and container.lost is None
        await container.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("answer", "kind", "vanished"),
    [
        ({"error": {"kind": REPLACED, "message": "another one stands in its place"}}, REPLACED, True),
        ({"error": {"kind": "died", "message": "ended by SIGKILL"}}, "died", False),
        (RuntimeError("Container exited with code 137"), "died", True),
    ],
)
def test_what_loses_a_container_fails_every_pending_call_at_once(answer: Any, kind: str, vanished: bool) -> None:
    async def work() -> None:
        modal = Modal(ask=for_ever, watch=after(0.1, answer))
        container = await opened(modal)
        calls = [asyncio.ensure_future(container.call("generate", n)) for n in range(3)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 2)
        assert all(isinstance(one, RpcError) and one.kind == kind for one in results)
        assert container.vanished == vanished
        with pytest.raises(RpcError):
            await container.call("generate", 4)
        await container.close()
        # One that took its place is ended as well; one that is gone is not started again for that.
        assert modal.log.count("ask cancelled") == 3
        assert ("end" in modal.log) == (kind == REPLACED or not vanished)

    asyncio.run(work())


def test_a_container_that_says_nothing_counts_as_hung_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_call, "_SILENCE", 0.1)
    monkeypatch.setattr(modal_call, "_GRACE", 0.1)

    async def work() -> None:
        modal = Modal(ask=for_ever, watch=for_ever, end=for_ever)
        container = await opened(modal)
        with pytest.raises(RpcError, match="has said nothing for") as caught:
            await container.call("generate")
        assert caught.value.kind == "hung"
        await asyncio.wait_for(container.close(0.1), 2)
        assert "watch cancelled, container ended" in modal.log and "end cancelled, container ended" in modal.log

    asyncio.run(work())


def test_a_call_that_is_given_up_is_cancelled_there_and_the_container_goes_on() -> None:
    async def work() -> None:
        modal = Modal(ask=for_ever)
        container = await opened(modal)
        with pytest.raises(RpcError, match=r"generate was not answered within 0\.05 s"):
            await container.call("generate", deadline=0.05)
        await asyncio.sleep(0.05)
        assert "ask cancelled" in modal.log and container.lost is None
        await container.close()

    asyncio.run(work())


@pytest.mark.parametrize("stuck", ["hello", "begin"])
def test_a_start_that_is_given_up_leaves_no_container(stuck: str) -> None:
    async def work() -> None:
        modal = Modal(**{stuck: for_ever})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await opened(modal)
        if stuck == "hello":  # nobody has answered yet: the container that may be on its way ends with the call
            assert modal.log == ["hello", "hello cancelled, container ended"]
        else:
            assert modal.log[-1] == "end" or "end" in modal.log

    asyncio.run(work())


def test_a_container_that_is_about_to_end_is_not_taken_for_the_next_one() -> None:
    async def work() -> None:
        answers = iter([{"error": {"kind": ENDING, "message": "it ends"}}, await hello()])

        async def twice() -> dict[str, Any]:
            return next(answers)

        modal = Modal(hello=twice)
        container = await opened(modal)
        assert modal.log.count("hello") == 2
        await container.close()
        assert container.ended

    asyncio.run(work())


def test_a_role_that_does_not_start_says_why() -> None:
    async def work() -> None:
        modal = Modal(begin=after(0, {"error": {"kind": "died", "message": "no such model"}}))
        with pytest.raises(RpcError, match="no such model"):
            await opened(modal)
        assert "end" in modal.log

    asyncio.run(work())


def test_a_container_is_heard_of_until_it_is_closed() -> None:
    async def work() -> None:
        beats: list[tuple[str, bool]] = []
        container = Container("actor", Modal(), 0.1, lambda *beat: beats.append(beat))
        await container.open({})
        await asyncio.sleep(0.2)
        await container.close()
        assert beats[0] == ("t1", False) and beats[-1] == ("t1", True)
        count = len(beats)
        await asyncio.sleep(0.1)
        assert len(beats) == count

    asyncio.run(work())


# an actor that is preempted -------------------------------------------------------------------------------------------
def actors(
    monkeypatch: pytest.MonkeyPatch, folder: Path, deaths: list[int | None], preempted: bool, restarts: int = 3
) -> tuple[Run, list[SimulatedHosts]]:
    """A training whose actors die at these steps, one after the other."""
    config = make_config(distributed__restarts=restarts)
    run = Run(folder, config)
    run.folder.mkdir()
    opened: list[SimulatedHosts] = []

    def open_hosts(config: Any, run: Run) -> Any:
        quick = Timing(lambda prompt: 0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0)
        hosts = SimulatedHosts(run, witness, 6, quick, actor_dies_at=deaths[len(opened)])
        hosts.preempted = preempted  # type: ignore[attr-defined]
        opened.append(hosts)
        return hosts

    witness = Witness(1)
    monkeypatch.setattr(distributed, "open_hosts", open_hosts)
    monkeypatch.setattr(distributed, "open_chat", lambda config, state: Chat(Letters(), state.end_ids, None))  # type: ignore[arg-type]
    try:
        distributed.train(config, SimulatedTask(seconds=0.0), simulated_rows(22), run, StopAfter())
    finally:
        assert witness.violations == []
    return run, opened


def test_a_preempted_actor_is_followed_by_one_from_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, opened = actors(monkeypatch, tmp_path / "run", [3, 5, None], preempted=True)
    assert len(opened) == 3 and (run.folder / "adapter").is_dir()
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5, 6]
    starts = [event["step"] for event in run.events() if (event["role"], event["kind"]) == ("actor", "ready")]
    assert starts == [0, 2, 4]


def test_an_actor_that_fails_by_itself_or_too_often_ends_the_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(OrchestratorError, match="out of memory in the loss"):
        actors(monkeypatch, tmp_path / "own", [3, None], preempted=False)
    with pytest.raises(OrchestratorError, match="the actor cannot go on"):
        actors(monkeypatch, tmp_path / "often", [1, 1, 1], preempted=True, restarts=1)
