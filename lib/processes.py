"""The distributed roles as processes of this machine: the actor and each rollout worker a child of this one.

Owns where each runs: its log, its share of the cores, its GPU. Must not know what the roles do, or when.

    python -c "from lib.processes import share_gpus; print(share_gpus(['0', '1', '2'], workers=4))"
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lib.actor import RemoteActor
from lib.actor import command as actor_command
from lib.config import Config
from lib.engine import ADVICE
from lib.program import Advice, ProgramError
from lib.roles import ActorError, ActorRole, Worker, WorkerError
from lib.rollout_worker import EngineSettings, RemoteWorker, environment
from lib.rollout_worker import command as worker_command
from lib.rollout_worker.settings import DType
from lib.rpc import Child, Client, RpcError, start
from lib.runfolder import Run

logger = logging.getLogger(__name__)

ACTOR = "actor"
_HEADROOM = 0.95
"""Of distributed.start_deadline: the rest is for saying why, before the orchestrator gives it up without a word."""


class Processes:
    """A lib.orchestrator.Hosts. Logs lie in `<run>/roles/<name>.log`; everything ends with this process."""

    def __init__(self, config: Config, run: Run) -> None:
        self._config, self._run = config, run
        self._clients: dict[str, Client] = {}
        self._actor: ActorRole | None = None
        gpus = visible_gpus()
        self._places = share_gpus(gpus, config.distributed.workers)
        self._threads = None if gpus else max(1, _cores() // (config.distributed.workers + 1))
        self._dtype = served_dtype(config, bool(gpus))

    @property
    def dtype(self) -> DType:
        return self._dtype

    @property
    def preempted(self) -> bool:
        return False  # what ends a process here may end the next one too

    async def start_actor(self) -> ActorRole:
        try:
            client = await self._start(ACTOR, actor_command(self._run.folder))
        except ProgramError as error:
            raise ActorError(str(error)) from error
        self._actor = RemoteActor(client, self._config)
        return self._actor

    async def start_worker(self, name: str, model: str) -> Worker:
        settings = EngineSettings.of(self._config, self._run.name, model, self._dtype)
        try:
            client = await self._start(name, worker_command(settings), environment(), ADVICE)
        except ProgramError as error:
            raise WorkerError(str(error)) from error
        return RemoteWorker(client)

    async def close(self) -> None:
        if self._actor:
            await self._actor.close()  # a tracker gets more time than other roles' ends
        for client in self._clients.values():
            with suppress(RpcError):
                await client.close()

    async def _start(
        self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None, advice: Advice = ()
    ) -> Client:
        if self._places:
            logger.info("%s: starting on GPU %s", name, self._places[name])
        child = Child(
            name=name,
            command=command,
            log=self._run.path("roles", f"{name}.log"),
            environment={**(more or {}), **self._environment(name)},
            deadline=_HEADROOM * self._config.distributed.start_deadline,
            deadline_setting="distributed.start_deadline",
            advice=advice,
        )
        self._clients[name] = await start(child)
        return self._clients[name]

    def _environment(self, name: str) -> dict[str, str]:
        """Beside this process's own: its GPU, or its share of the cores."""
        if self._places:
            return {"CUDA_VISIBLE_DEVICES": self._places[name]}
        return {"OMP_NUM_THREADS": str(self._threads)}


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; asked without torch, which takes seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip() and one.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.stdout.splitlines() if "GPU" in line)]


def share_gpus(gpus: Sequence[str], workers: int) -> dict[str, str]:
    """Role -> GPU: the first is the actor's alone where there are more, the workers take turns on the others."""
    if not gpus:
        return {}
    others = gpus[1:] or gpus
    return {ACTOR: gpus[0]} | {f"worker-{i}": others[i % len(others)] for i in range(workers)}


def served_dtype(config: Config, has_gpu: bool) -> DType:
    """The type that `model.dtype` comes to where a worker runs."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if has_gpu else "float32"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
