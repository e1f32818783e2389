"""One worker in service, from the proof of its weights to its loss: the turns that it is asked for.

Owns what is in flight on one worker, and what a valid answer is. Must not know how weights are synced or proven.

    python -c "from lib.orchestrator.life import Stamp; print(Stamp('worker-0', 1, 3, 12))"
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lib.orchestrator.events import Busy, Events
from lib.roles import Canary, Release, Sampled, Sampling, Worker, WorkerError


class Stamp(NamedTuple):
    """Where a turn comes from: whose trust it rests on, and how old its weights are."""

    worker: str
    life: int
    """Number of the life of that worker; a worker that was lost and proven again is in another one."""
    version: int
    step: int
    """Optimizer steps that the weights had seen."""


class Target(NamedTuple):
    """Weights that workers should serve, and what proves them."""

    release: Release
    said: asyncio.Future[Canary]
    """What the actor says about the canaries, while workers load; cancelled where it never will."""

    async def canary(self) -> Canary:
        """The same, waited for. Weights that were written in several ways at once share it."""
        return (await asyncio.shield(self.said))._replace(version=self.release.version)


class LostError(RuntimeError):
    """The worker is out of service: what it was generating is played anew elsewhere."""


class Life:
    """A worker whose weights were proven. Once it is lost it stays so: the worker begins another life, if any."""

    def __init__(
        self, name: str, worker: Worker, number: int, events: Events, deadline: float, max_length: int
    ) -> None:
        self.name, self.worker, self.number = name, worker, number
        self.max_length = max_length
        """Tokens of a prompt and its answer together that its engine takes: what a config asks for may be more."""
        self.playing = 0
        """Rollouts that hold one of its places."""
        self.turns = 0
        """That went well."""
        self.tokens = 0
        """Sampled since the last look."""
        self.serving: Target | None = None
        """None while it waits for new weights."""
        self.lost: str | None = None
        """Why it is out of service."""
        self.dropped = 0
        """Rollouts that it was lost with."""
        self.on_loss: Callable[[], None] = lambda: None
        self._busy: Busy = events.busy(name)
        self._now, self._deadline = events.now, deadline
        self._calls: set[asyncio.Task[list[Sampled]]] = set()
        self._woken = asyncio.Event()

    def serve(self, target: Target) -> None:
        """Its weights are proven to be these: turns go on."""
        self.serving = target
        self._woken.set()

    def pause(self) -> None:
        """Begin no more turns; those that have begun end."""
        self.serving = None
        if not self.lost:
            self._woken.clear()

    async def quiet(self) -> None:
        """Wait until no turn is going on."""
        while self._calls:
            await asyncio.wait(self._calls)

    def end(self, reason: str) -> None:
        """Out of service, for good: pending turns raise LostError."""
        if self.lost:
            return
        self.lost, self.dropped, self.serving = reason, self.playing, None
        for call in self._calls:
            call.cancel()
        self._woken.set()
        self.on_loss()

    async def turn(self, prompt: Sequence[int], sampling: Sampling) -> tuple[Sampled, Stamp]:
        """One turn, on weights that were proven when it began; waits out a sync. Raises LostError.

        The first call that fails ends the life: whether the worker is worth another one is not decided here.
        """
        while (target := self.serving) is None:
            if self.lost:
                raise LostError(self.lost)
            await self._woken.wait()
        release = target.release
        try:
            sampled = await self._ask(prompt, sampling)
            _check(sampled, sampling, release.version)
        except WorkerError as error:
            self.end(str(error))
            raise LostError(str(error)) from error
        self.turns += 1
        self.tokens += len(sampled[0].output_ids)
        return sampled[0], Stamp(self.name, self.number, release.version, release.step)

    async def _ask(self, prompt: Sequence[int], sampling: Sampling) -> list[Sampled]:
        call = asyncio.ensure_future(self.worker.generate([prompt], sampling))
        self._calls.add(call)
        self._busy.begin(self._now())
        try:
            async with asyncio.timeout(self._deadline):
                return await call
        except TimeoutError:
            raise WorkerError(f"a turn took longer than distributed.turn_deadline {self._deadline:g} s") from None
        except asyncio.CancelledError:
            if self.lost and not _cancelled_itself():
                raise LostError(self.lost) from None
            raise
        finally:
            call.cancel()
            self._calls.discard(call)
            self._busy.end(self._now())


def _cancelled_itself() -> bool:
    """Whether it is the running task that is to end, and not only something that it waited for."""
    this = asyncio.current_task()
    return this is not None and this.cancelling() > 0


def _check(answer: Sequence[Sampled], sampling: Sampling, version: int) -> None:
    """Raise WorkerError for an answer that is not one whole turn of the weights that were asked."""
    if len(answer) != 1:
        raise WorkerError(f"{len(answer)} answers to one prompt")
    ids, logprobs, _, answered = answer[0]
    if answered != version:
        raise WorkerError(f"a turn of weights version {answered} where {version} was proven")
    if not 0 < len(ids) <= sampling.max_tokens:
        raise WorkerError(f"a turn of {len(ids)} tokens where 1 to {sampling.max_tokens} were asked for")
    if len(logprobs) != len(ids):
        raise WorkerError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
    if not all(value <= 1e-3 for value in logprobs) or not all(map(math.isfinite, logprobs)):
        raise WorkerError("log-probabilities that are not numbers up to 0")
