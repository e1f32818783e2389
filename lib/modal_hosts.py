"""The distributed roles as Modal containers, seen from the orchestrator: on a laptop, or in a container of its own.

Owns the roles' app while it is ours, one handle for each container, what travels to the outputs volume and back, and
the bill of the roles. Must not know what the roles do, or what runs in a container (lib/modal_roles.py).

    python -m lib.run check sync --config configs/mrl.yaml -p distributed.hosts=modal
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lib import PROJECT_ROOT, WorkbenchError
from lib.actor import RemoteActor
from lib.config import Config
from lib.container import commit
from lib.cost import BESIDE, Resources, beat, begin_attempt, load_prices
from lib.experiment import Experiment, read_experiment
from lib.gpu import NONE
from lib.log import scrub
from lib.modal_call import Container
from lib.places import ROLES, locate
from lib.processes import served_dtype
from lib.remote import clear_modal_errors, entries, fetch, make_plan, volume
from lib.roles import ActorError, ActorRole, ActorState, Worker, WorkerError
from lib.rollout_worker import EngineSettings, RemoteWorker
from lib.rollout_worker.settings import DType
from lib.rpc import RpcError
from lib.runfolder import Run, hash_file, write_json

if TYPE_CHECKING:
    import modal

logger = logging.getLogger(__name__)

ACTOR = "actor"
FILES = ("config.json", "provenance.json", "rows/train.jsonl")
"""Of the run, what the actor needs."""

_HEADROOM = 0.95
"""Of distributed.start_deadline: the rest is for saying why."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class ModalHosts:
    """A lib.orchestrator.Hosts."""

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._there = os.environ.get(ROLES, "")
        """The roles' app, where whoever sent the training to Modal brought it along; otherwise it is ours to make."""
        self._app: modal.App | None = None
        self._closed = False
        self._experiment: Experiment
        self._containers: list[Container] = []
        self._models: dict[str, str] = {}
        """Folder here -> folder there, of base policies."""
        self._actor: Container | None = None
        self._role: ActorRole | None = None

    @property
    def dtype(self) -> DType:
        return served_dtype(self._config, self._config.modal.roles.worker_gpu != NONE)

    @property
    def preempted(self) -> bool:
        """Whether the actor was lost with its container: another one goes on from the last checkpoint."""
        return self._actor is not None and self._actor.vanished

    async def start_actor(self) -> ActorRole:
        try:
            files = await asyncio.to_thread(self._prepare)
        except WorkbenchError as error:
            raise ActorError(str(error)) from error
        self._actor = container = self._container("Actor", ACTOR, self._config.modal.roles.actor_gpu)
        environment = self._tracker() | self._threads(self._config.modal.roles.actor_gpu)
        order = {"files": files, "environment": environment, "deadline": self._deadline}
        try:
            await container.open(order)
        except RpcError as error:
            raise ActorError(str(error)) from error
        self._role = _ModalActor(container, self._config, self)
        return self._role

    async def start_worker(self, name: str, model: str) -> Worker:
        settings = EngineSettings.of(self._config, self._run.name, self._models.get(model, model), self.dtype)
        gpu = self._config.modal.roles.worker_gpu
        container = self._container("RolloutWorker", name, gpu, worker=name)
        order = {"settings": settings.model_dump_json(), "environment": self._threads(gpu), "deadline": self._deadline}
        try:
            await container.open(order)
        except RpcError as error:
            raise WorkerError(str(error)) from error
        return RemoteWorker(container)

    async def close(self) -> None:
        self._closed = True
        actor = [self._role.close()] if self._role else []  # before its container: a tracker gets more time
        await asyncio.gather(*actor, *(container.close() for container in self._containers))
        if self._app is not None:
            await asyncio.to_thread(self._app.stop)

    @property
    def _deadline(self) -> float:
        return _HEADROOM * self._config.distributed.start_deadline

    def _container(self, role: str, name: str, gpu: str, **parameters: str) -> Container:
        import modal

        # One that did not answer may still be there, and Modal would queue these calls behind it.
        life = sum(one.name == name and not one.ended and not one.vanished for one in self._containers)
        instance = modal.Cls.from_name(self._there, role)(run=self._run.name, life=life, **parameters)
        meter = _Meter(self._run, name, None if gpu == NONE else gpu)
        container = Container(name, instance, self._config.modal.roles.idle_seconds, meter.beat)
        self._containers.append(container)
        return container

    def _threads(self, gpu: str) -> dict[str, str]:
        """Of computing on a CPU: the machine below a container may have more cores than the container."""
        return {"OMP_NUM_THREADS": str(max(1, int(self._config.modal.roles.cpu)))} if gpu == NONE else {}

    def _tracker(self) -> dict[str, str]:
        """The tracker's run stays the same over containers, whose clocks and files' times differ."""
        if self._config.tracker.name != "wandb":
            return {}
        made = hashlib.sha256((self._run.folder / "provenance.json").read_bytes()).hexdigest()[:10]
        return {"WANDB_RUN_ID": f"{self._run.name}-{made}"}

    # to the volume and back -------------------------------------------------------------------------------------------
    def _prepare(self) -> dict[str, str]:
        """Bring the roles' app to Modal and the run to the outputs volume; name -> hash of the run's files there."""
        self._experiment = read_experiment()
        if self._there:
            commit("/cache")  # a starter that was made here is the actor's too
            commit("/outputs")
            return {name: hash_file(self._run.folder / name) for name in FILES}
        with clear_modal_errors():
            self._deploy()
            return self._send()

    def _deploy(self) -> None:
        import modal

        from lib.modal_app import define_roles

        config = str(self._run.folder / "config.json")
        plan = make_plan(self._experiment, "3_grpo_training", config, [f"run_name={self._run.name}"])
        app = define_roles(self._experiment, plan)
        logger.info("Modal: bringing the roles there; the first time, their image is built, which takes minutes")
        with modal.enable_output():
            app.deploy(strategy="recreate")  # what an earlier attempt left running writes the same run
            if self._closed:  # the wait for it was given up, which a thread does not see
                app.stop()
        self._app, self._there = app, str(app.name)

    def _send(self) -> dict[str, str]:
        """The run's files, with the paths of a container in the config."""
        with tempfile.TemporaryDirectory() as temporary:
            files = {name: self._run.folder / name for name in FILES}
            files["config.json"] = Path(temporary) / "config.json"
            there = {"paths": {"outputs": "/outputs", "cache": "/cache"}, "where": "here"}
            write_json(files["config.json"], self._config.as_json() | there)
            with volume(self._experiment, "/outputs").batch_upload(force=True) as batch:
                for name, path in files.items():
                    batch.put_file(path, f"/{self._run.name}/{name}")
            return {name: hash_file(path) for name, path in files.items()}

    def keep_logs(self) -> None:
        """Publish what this container has written of the run; on a laptop it is on the disk."""
        if self._app is not None:
            return
        try:
            commit("/outputs")
        except Exception as error:  # whatever Modal's client raises: the container's own commits, every 10 s, go on
            logger.warning("the logs were not published before the checkpoint: %s", scrub(str(error)))

    def bring(self, name: str, skip: tuple[str, ...] = ()) -> str:
        """A folder of the run (`adapter`, `checkpoints/step-4`) as the actor wrote it, here; whole or not at all.

        The actor's container published it: this machine, or this container, does not see it by itself.
        """
        target = self._run.path(*name.split("/"))
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        fetch(self._experiment, f"{self._run.name}/{name}", partial, skip)
        for file in skip:  # where the actor's folder is this one already: the next commit would publish the loss
            with suppress(FileNotFoundError):
                os.replace(target / file, partial / file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        return str(target)

    def bring_model(self, model: str) -> str:
        """The base policy of the actor as it can be read here, but for its weights; workers get the actor's own."""
        mount = next((mount for mount in ("/cache", "/data", "/outputs") if model.startswith(f"{mount}/")), None)
        here = model
        if mount:
            here = self._fetch_model(mount, model.removeprefix(f"{mount}/"))
        elif model.startswith("/root/"):  # it travelled with the code
            here = str(PROJECT_ROOT / model.removeprefix("/root/"))
        self._models[here] = model
        return here

    def _fetch_model(self, mount: str, name: str) -> str:
        folder = self._run.path("roles", "policy", "x").parent
        for entry in entries(self._experiment, mount, name):
            inner = Path(entry.path).relative_to(name)
            if entry.type.name == "FILE" and inner.suffix not in _WEIGHTS:
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                content = b"".join(volume(self._experiment, mount).read_file(entry.path))
                (folder / inner).write_bytes(content)
        return str(folder)


class _ModalActor(RemoteActor):
    """An actor whose files are on a volume: what others need of them is brought here."""

    def __init__(self, container: Container, config: Config, hosts: ModalHosts) -> None:
        super().__init__(container, config)
        self._hosts = hosts

    async def initialize(self) -> ActorState:
        state = await super().initialize()
        return state._replace(model=await asyncio.to_thread(self._hosts.bring_model, state.model))

    async def save_checkpoint(self, logs: dict[str, int] | None = None) -> str:
        """Here too, but for the optimizer's state: only an actor needs that, and it is large.

        The logs are on the volume before it: a checkpoint that they do not reach could not be gone on from.
        """
        await asyncio.to_thread(self._hosts.keep_logs)
        name = f"checkpoints/{Path(await super().save_checkpoint(logs)).name}"
        return await asyncio.to_thread(self._hosts.bring, name, ("optimizer.pt",))

    async def save_trained(self) -> str:
        return await asyncio.to_thread(self._hosts.bring, Path(await super().save_trained()).name)


class _Meter:
    """A container on the run's bill, up to the last time that it was heard of."""

    def __init__(self, run: Run, name: str, gpu: str | None) -> None:
        roles, self._folder = run.config.modal.roles, run.folder
        self._resources = Resources(gpu=gpu, cpu=roles.cpu, memory_gb=roles.memory, where="modal")
        self._prices = load_prices(locate(run.config.cost.prices))
        self._name = name
        self._attempt = ""

    def beat(self, token: str, ready: bool) -> None:
        with suppress(OSError):  # the next beat counts all the same
            if not self._attempt:
                self._attempt = f"{BESIDE}{self._name}-{token}"
                begin_attempt(self._folder, self._attempt, self._resources, self._prices)
            beat(self._folder, self._attempt, ready=ready)
