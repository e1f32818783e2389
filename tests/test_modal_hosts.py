"""What the orchestrator's side of Modal and a role's container hold to, without a cloud: who is ended, what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from simulated_roles import make_config

from lib import modal_hosts, modal_roles
from lib.actor import RemoteActor
from lib.modal_call import REPLACED
from lib.modal_hosts import ModalHosts
from lib.modal_roles import Role
from lib.processes import Processes
from lib.runfolder import Run


def make_run(folder: Path, **overrides: Any) -> Run:
    run = Run(folder / "run", make_config(**overrides))
    run.folder.mkdir()
    return run


async def test_a_role_that_an_earlier_orchestrator_was_starting_is_given_up_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = 0

    async def start(child: Any) -> Any:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(60)
        finally:
            running -= 1

    monkeypatch.setattr(modal_roles, "start", start)
    role = Role("actor")
    first = (await role.hello())["value"]["token"]
    beginning = asyncio.ensure_future(role.begin(first, ["true"], {}, 60.0))
    await asyncio.sleep(0.05)
    assert running == 1
    second = (await role.hello())["value"]["token"]
    assert second != first and running == 0
    assert (await beginning)["error"]["kind"] == REPLACED
    begun = asyncio.ensure_future(role.begin(second, ["true"], {}, 60.0))
    await asyncio.sleep(0.05)
    assert running == 1
    begun.cancel()
    with pytest.raises(asyncio.CancelledError):
        await begun
    assert running == 0


def test_an_optimizers_state_that_is_in_the_folder_already_is_not_lost_when_the_rest_is_brought(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(tmp_path)

    def fetch(experiment: Any, name: str, folder: Path, skip: tuple[str, ...]) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").write_text("new")

    monkeypatch.setattr(modal_hosts, "fetch", fetch)
    hosts = ModalHosts(run.config, run)
    hosts._experiment = None  # type: ignore[assignment]
    target = run.path("checkpoints", "step-4", "optimizer.pt")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("momentum")
    (target.parent / "adapter.safetensors").write_text("old")
    folder = Path(hosts.bring("checkpoints/step-4", ("optimizer.pt",)))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "adapter.safetensors": "new",
        "optimizer.pt": "momentum",
    }


async def test_the_logs_are_published_before_the_checkpoint_that_needs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    order: list[str] = []

    def bring(hosts: ModalHosts, name: str, skip: tuple[str, ...]) -> str:
        order.append(name)
        return name

    class Asked:
        async def call(self, method: str, *arguments: Any) -> str:
            order.append(method)
            return "/outputs/run/checkpoints/step-4"

    monkeypatch.setattr(modal_hosts, "commit", order.append)
    monkeypatch.setattr(ModalHosts, "bring", bring)
    actor = modal_hosts._ModalActor(Asked(), run.config, ModalHosts(run.config, run))  # type: ignore[arg-type]
    await actor.save_checkpoint({})
    assert order == ["/outputs", "save_checkpoint", "checkpoints/step-4"]


@pytest.mark.parametrize("where", ["processes", "modal"])
async def test_an_actor_with_a_tracker_gets_the_time_to_hand_over_its_figures(tmp_path: Path, where: str) -> None:
    run = make_run(tmp_path, tracker__name="wandb")
    graces: list[float] = []

    class Asked:
        async def close(self, grace: float = 10.0) -> None:
            graces.append(grace)

    asked: Any = Asked()
    if where == "modal":
        there = ModalHosts(run.config, run)
        there._containers, there._role = [asked], modal_hosts._ModalActor(asked, run.config, there)
        await there.close()
    else:
        here = Processes(run.config, run)
        here._clients, here._actor = {"actor": asked}, RemoteActor(asked, run.config)
        await here.close()
    assert graces[0] > 60
