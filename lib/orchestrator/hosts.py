"""What the orchestrator needs of the place where the roles run: to start them.

Owns that contract alone. Must not know processes or containers.

    python -c "from lib.orchestrator.hosts import Hosts; help(Hosts)"
"""

from __future__ import annotations

from typing import Protocol

from lib.roles import ActorRole, Worker


class Hosts(Protocol):
    """Starts the roles: local processes, or containers. What it started it also ends."""

    @property
    def dtype(self) -> str:
        """The type of the weights as the workers serve them: float32, bfloat16 or float16."""

    async def start_actor(self) -> ActorRole:
        """The actor, ready to be initialized. Raises ActorError."""

    async def start_worker(self, name: str, model: str) -> Worker:
        """A rollout worker, ready to be asked, on the base policy `model` (ActorState.model). Raises WorkerError.

        Called again under the same name once the worker before it was closed. Cancelled where it takes too long: then
        nothing of it is left.
        """

    @property
    def preempted(self) -> bool:
        """Whether the actor was lost through no fault of its own: then the training goes on with another one."""

    async def close(self) -> None:
        """End whatever is still running."""
