"""The actor as the orchestrator asks it: a child process, and errors that say what to do.

Owns the client's side of the wire. Must not know the trainer, or when which call is due; deadlines are the caller's.

    python -c "from lib.actor import command; print(command('outputs/decisions'))"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from lib.config import Config
from lib.models import OUT_OF_MEMORY_KNOBS
from lib.roles import ActorError, ActorState, Canary, Method, Release, StepReport
from lib.rpc import RpcError

_GRACE, _TRACKED_GRACE = 10.0, 70.0
"""Seconds until a child that does not close is ended; a tracker may still have figures to send."""


def command(folder: str | Path) -> list[str]:
    """How the actor of a run is started, as a child of lib.rpc."""
    return [sys.executable, "-m", "lib.actor", str(folder)]


class Asked(Protocol):
    """What asks: lib.rpc's Client, or a container's."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Raises RpcError."""

    async def close(self, grace: float) -> None: ...


class RemoteActor:
    """A lib.roles.ActorRole. Where the child is lost (it died or hung) this call and every later one raises ActorError.

    A call that is given up leaves the child at work; `close` ends it in any case.
    """

    def __init__(self, client: Asked, config: Config) -> None:
        self._client, self._config = client, config

    async def initialize(self) -> ActorState:
        return ActorState(**await self._call("initialize"))

    async def train_step(self, batch: dict[str, Any]) -> StepReport:
        return StepReport(**await self._call("train_step", batch))

    async def publish(self, version: int, method: Method) -> Release:
        return Release(**await self._call("publish", version, method))

    async def canary(self, version: int) -> Canary:
        return Canary(**await self._call("canary", version))

    async def save_checkpoint(self, logs: dict[str, int] | None = None) -> str:
        return str(await self._call("save_checkpoint", logs))

    async def save_trained(self) -> str:
        return str(await self._call("save_trained"))

    async def close(self) -> None:
        await self._client.close(_GRACE if self._config.tracker.name == "none" else _TRACKED_GRACE)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await self._client.call(method, *arguments)
        except RpcError as error:
            raise ActorError(str(error) + self._advice(error)) from error

    def _advice(self, error: RpcError) -> str:
        """The kernel ends a process that takes too much memory without a word of its own."""
        if error.kind != "died" or "memory ran out" not in str(error):
            return ""
        done = ["lora.enabled"] if self._config.lora.enabled else []
        knobs = [text for where, text in OUT_OF_MEMORY_KNOBS if where != "sampling" and text.split(":")[0] not in done]
        return "\nIf it was memory, turn in this order: " + "; ".join(knobs) + "."
