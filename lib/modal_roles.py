"""The distributed roles as Modal classes: an actor and rollout workers, each a child process of its container.

Owns what a container adds to a role: which one it is, the volume before and after a call, its end. Must not know what
the roles do (lib/actor, lib/rollout_worker), nor how the classes are defined and asked (lib/modal_app.py,
lib/modal_hosts.py). Imported in containers and where the app is defined; nowhere else.

    modal run -m lib.modal_app::check sync --config configs/mrl.yaml
"""

# Without `from __future__ import annotations`: Modal reads the types of parameters, and takes no texts.
import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import modal

from lib import places, provenance
from lib.actor import command as actor_command
from lib.container import DATA, OUTPUTS, ContainerError, commit, foreign_variables
from lib.engine import ADVICE
from lib.log import name_secrets, scrub
from lib.modal_call import ENDING, REPLACED
from lib.program import Advice, ProgramError
from lib.rollout_worker import EngineSettings, environment
from lib.rollout_worker import command as worker_command
from lib.rpc import Child, Client, RpcError, start
from lib.runfolder import hash_file

logger = logging.getLogger(__name__)

COMMITS = {
    "initialize": ("/cache",),  # a starter, or a download: for the workers
    "publish": ("/outputs",),
    "save_checkpoint": ("/outputs",),
    "save_trained": ("/outputs",),
}
"""The actor's calls -> volumes that are published before they are answered."""

RELOADS = {"update_weights": "/outputs"}
"""The workers' calls -> the volume that is looked at anew before they are carried out."""

_RELOAD_SECONDS = 60.0
"""How long a reload is tried again: it is refused while a file of the volume is open, which is a matter of moments."""

_LAST_WORD = 0.5
"""Seconds between the answer to `end` and the end: a container that is stopped may not get to answer."""

_FILES_SECONDS = 300.0
"""How long the actor waits for the run's files to appear on the volume."""

Answer = dict[str, Any]
"""{"value": plain JSON}, or {"error": {"kind", "message"}}: one of lib.rpc.KINDS, a class name, or REPLACED."""


class Role:
    """One role in this container: a child process, and the calls to it. Nothing raises; errors are answers."""

    def __init__(self, name: str) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
        name_secrets(foreign_variables())
        os.environ.update({places.DATA: str(DATA), places.OUTPUTS: str(OUTPUTS)})
        self.name = name
        self.token = ""
        """Known to whoever greeted this container last: calls of others are not for it."""
        self._client: Client | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ending = False

    async def hello(self) -> Answer:
        """The container runs: its token, and the GPUs that it has.

        What an earlier orchestrator left running or starting here (it was killed, say) ends: one run has one actor.
        """
        if self._ending:
            return _error(ENDING, f"{self.name}: this container ends; another one will take its place")
        self.token = secrets.token_hex(8)
        if self._starting:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._client:
            client, self._client = self._client, None
            await client.close(0.0)
        return {"value": {"token": self.token, "gpus": await asyncio.to_thread(provenance.gpus)}}

    async def begin(
        self, token: str, command: Sequence[str], more: Mapping[str, str], deadline: float, advice: Advice = ()
    ) -> Answer:
        """Start the child; answered once it is ready."""

        async def work() -> None:
            log = Path("/tmp/workbench-roles") / f"{self.name}.log"
            log.parent.mkdir(exist_ok=True)
            child = Child(
                name=self.name,
                command=command,
                log=log,
                environment=more,
                deadline=deadline,
                deadline_setting="distributed.start_deadline",
                advice=advice,
            )
            self._starting = asyncio.create_task(self._start(child))
            try:
                await self._starting
            except asyncio.CancelledError:
                if token == self.token:
                    raise
                raise RpcError(REPLACED, f"{self.name}: another orchestrator asks this container by now") from None

        return await self._answer(token, work)

    async def _start(self, child: Child) -> None:
        self._client = await start(child)

    async def ask(self, token: str, method: str, arguments: Sequence[Any]) -> Answer:
        """A call to the child, between the volume's reload and its commit."""

        async def work() -> Any:
            if self._client is None:
                raise RpcError("died", f"{self.name} was not started in this container")
            if method in RELOADS:
                await reload(RELOADS[method])
            value = await self._client.call(method, *arguments)
            for mount in COMMITS.get(method, ()):
                await asyncio.to_thread(commit, mount)
            return value

        return await self._answer(token, work)

    async def watch(self, token: str, seconds: float) -> Answer:
        """Answers after so many seconds, or as soon as the child is lost. It also keeps the container from idling."""

        async def work() -> None:
            until = asyncio.create_task(self._client.until_lost() if self._client else asyncio.sleep(seconds))
            done, _ = await asyncio.wait({until}, timeout=seconds)
            until.cancel()
            if done and self._client and self._client.lost:
                raise self._client.lost

        return await self._answer(token, work)

    async def end(self, grace: float) -> Answer:
        """End the child, then the container, whichever it is: one that came in its place as well."""
        self._ending = True
        if self._client:
            await self._client.close(grace)
        asyncio.get_running_loop().call_later(_LAST_WORD, lambda: asyncio.ensure_future(_leave()))
        return {"value": None}

    async def close(self) -> None:
        """The container ends."""
        if self._client:
            await self._client.close(5.0)

    async def _answer(self, token: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Answer:
        if token != self.token:
            return _error(
                REPLACED, f"{self.name}: its container was preempted or ended; another one stands in its place"
            )
        try:
            return {"value": await work()}
        except RpcError as error:
            return _error(error.kind, str(error))
        except (ProgramError, ContainerError) as error:
            return _error("died", str(error))


def _error(kind: str, message: str) -> Answer:
    return {"error": {"kind": kind, "message": scrub(message)}}


async def _leave() -> None:
    """This container gets no more to do, and ends now and not when it has been idle for long enough."""
    await modal.experimental.stop_fetching_inputs.aio()


async def reload(mount: str) -> None:
    """See what other containers have published. Raises ContainerError."""
    volume = modal.Volume.from_name(os.environ[f"WORKBENCH_VOLUME_{mount.strip('/').upper()}"])
    loop = asyncio.get_running_loop()
    until = loop.time() + _RELOAD_SECONDS
    while True:
        try:
            await volume.reload.aio()  # type: ignore[no-untyped-call]
            return
        except RuntimeError as error:
            if "open files" not in str(error) or loop.time() > until:
                raise ContainerError(f"the volume at {mount} cannot be reloaded: {error}") from None
            await asyncio.sleep(0.5)


async def wait_for_files(folder: Path, files: Mapping[str, str]) -> None:
    """Wait until these files of a run (name -> hash) are on the volume as they were sent. Raises ContainerError."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _FILES_SECONDS
    while True:
        await reload("/outputs")
        missing = [
            name for name, sent in files.items() if not (folder / name).is_file() or hash_file(folder / name) != sent
        ]
        if not missing:
            return
        if loop.time() > until:
            raise ContainerError(f"{', '.join(missing)} of {folder.name} did not reach the outputs volume")
        await asyncio.sleep(1)


# the classes ----------------------------------------------------------------------------------------------------------
class _Container:
    """What both classes are asked. The parameters make every life of every role of every run a container of its own."""

    _role: Role

    @modal.method()
    async def hello(self) -> Answer:
        return await self._role.hello()

    @modal.method()
    async def ask(self, token: str, method: str, arguments: list[Any]) -> Answer:
        return await self._role.ask(token, method, arguments)

    @modal.method()
    async def watch(self, token: str, seconds: float) -> Answer:
        return await self._role.watch(token, seconds)

    @modal.method()
    async def end(self, grace: float) -> Answer:
        return await self._role.end(grace)

    @modal.exit()
    async def _exit(self) -> None:
        await self._role.close()


class Actor(_Container):
    run: str = modal.parameter()
    life: int = modal.parameter()

    @modal.enter()
    def _enter(self) -> None:
        self._role = Role("actor")

    @modal.method()
    async def begin(self, token: str, order: dict[str, Any]) -> Answer:
        """`order`: files (name -> hash) of the run, environment, deadline (seconds)."""
        folder = OUTPUTS / self.run
        try:
            await wait_for_files(folder, order["files"])
        except ContainerError as error:
            return _error("died", str(error))
        return await self._role.begin(token, actor_command(folder), order["environment"], order["deadline"])


class RolloutWorker(_Container):
    run: str = modal.parameter()
    worker: str = modal.parameter()
    life: int = modal.parameter()

    @modal.enter()
    def _enter(self) -> None:
        self._role = Role(self.worker)

    @modal.method()
    async def begin(self, token: str, order: dict[str, Any]) -> Answer:
        """`order`: settings (an EngineSettings as JSON), environment, deadline (seconds)."""
        settings = EngineSettings.model_validate_json(order["settings"])
        more = {**environment(), **order["environment"]}
        return await self._role.begin(token, worker_command(settings), more, order["deadline"], ADVICE)
