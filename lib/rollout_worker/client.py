"""A rollout worker as the orchestrator sees it: lib.roles.Worker over whatever asks the process or container.

Owns the way between plain values and the roles' types, and what a short or wrong answer is. Must not know processes.

    python -c "from lib.rollout_worker.client import RemoteWorker; help(RemoteWorker)"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from lib.roles import Facts, RefusedError, Release, Sampled, Sampling, WorkerError
from lib.rpc import RpcError


class Asked(Protocol):
    """What asks: lib.rpc's Client, or a container's."""

    name: str

    async def call(self, method: str, *arguments: Any, deadline: float | None = None) -> Any:
        """Raises RpcError."""

    async def close(self) -> None: ...


class RemoteWorker:
    """A Worker. Every call raises WorkerError where it was not answered, or not as asked."""

    def __init__(self, asked: Asked) -> None:
        self.name = asked.name
        self._asked = asked

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Sampled]:
        plain = [list(prompt) for prompt in prompts]
        turns = [Sampled(*fields) for fields in await self._call("generate", plain, sampling._asdict())]
        if len(turns) != len(plain):
            raise WorkerError(f"{self.name} returned {len(turns)} turns to {len(plain)} prompts")
        for turn in turns:
            self._check(turn, sampling)
        return turns

    async def update_weights(self, release: Release) -> float:
        """Raises RefusedError where the worker does not take these weights, and could still be asked."""
        return float(await self._call("update_weights", release._asdict()))

    async def canary(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        answer: list[list[float]] = await self._call("canary", [list(prompt) for prompt in prompts])
        return answer

    async def facts(self) -> Facts:
        return Facts(**await self._call("facts"))

    async def close(self) -> None:
        await self._asked.close()

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await self._asked.call(method, *arguments)
        except RpcError as error:
            kind = RefusedError if method == "update_weights" and error.kind in REFUSALS else WorkerError
            raise kind(f"{self.name}: {error}" if self.name not in str(error) else str(error)) from error

    def _check(self, turn: Sampled, sampling: Sampling) -> None:
        ids, logprobs, stop, _ = turn
        if not 0 < len(ids) <= sampling.max_tokens or len(ids) != len(logprobs):
            raise WorkerError(
                f"{self.name} returned {len(ids)} tokens with {len(logprobs)} log-probabilities; 1 to "
                f"{sampling.max_tokens} were asked for"
            )
        if stop == "stop" and ids[-1] not in sampling.end_ids:
            raise WorkerError(f"{self.name} ended a turn with token {ids[-1]}, which ends none")
        if not all(math.isfinite(value) and value <= 1e-6 for value in logprobs):
            raise WorkerError(f"{self.name} returned a log-probability that is none: {max(logprobs, key=abs)}")


REFUSALS = ("SyncError", "EngineError")
"""What a worker raises where new weights were not taken: it may take them another way."""
