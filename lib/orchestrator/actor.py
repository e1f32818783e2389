"""The actor as it is asked from here: one thing at a time, with deadlines, every version of the weights numbered once.

Owns that order. Must not know what the actor does, or where it runs.

    python -c "from lib.orchestrator.actor import ActorDesk; help(ActorDesk)"
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from lib.config.distributed import DistributedSection
from lib.orchestrator.events import Events
from lib.orchestrator.life import Target
from lib.roles import ActorError, ActorRole, ActorState, Canary, Method, Release, StepReport

T = TypeVar("T")

ACTOR = "actor"
"""The role's name in events and metrics."""


class ActorDesk:
    """Where the actor is asked. Every method raises ActorError, also where the actor does not answer in time."""

    def __init__(self, role: ActorRole, settings: DistributedSection, events: Events, version: int) -> None:
        """`version`: the last one that was used in this run."""
        self._role, self._settings, self._events = role, settings, events
        self._version = version
        self._free = asyncio.Lock()

    async def initialize(self) -> ActorState:
        """Load the model and the newest complete checkpoint."""
        return await self._ask(self._role.initialize, "start_deadline")

    async def train(
        self, batch: Callable[[], dict[str, Any] | None], meanwhile: Callable[[], Awaitable[None]]
    ) -> StepReport | None:
        """Train on what `batch` gives once the actor is free; None where it gives nothing then.

        What may be trained on is decided in the same instant in which the training begins. `meanwhile` is done once
        it has begun: it need not keep the actor waiting.
        """
        async with self._free:
            ready = batch()
            if ready is None:
                return None
            training = asyncio.ensure_future(self._ask(lambda: self._role.train_step(ready), "step_deadline"))
            try:
                await asyncio.sleep(0)
                await meanwhile()
                return await training
            finally:
                training.cancel()

    async def publish(
        self,
        methods: Iterable[Method],
        known: Callable[[Method], Target | None],
        written: Callable[[dict[Method, Target]], None],
    ) -> None:
        """Have the weights written by these methods, each under a new version number, and proven by one canary.

        What `known` has once the actor is free is taken as it is. `written` gets all of them as soon as they can be
        loaded: the actor says what its canary is meanwhile, and trains no more before it has.
        """
        async with self._free:
            targets = {method: known(method) for method in methods}
            canary: asyncio.Future[Canary] = asyncio.get_running_loop().create_future()
            for method in [method for method, target in targets.items() if target is None]:
                targets[method] = Target(await self._write(method), canary)
            found = {method: target for method, target in targets.items() if target}
            written(found)
            try:
                new = [target.release.version for target in found.values() if target.said is canary]
                if new:
                    canary.set_result(await self._canary(new[-1]))
            finally:
                canary.cancel()  # where there is none, whoever waits for it need not go on

    async def _write(self, method: Method) -> Release:
        self._version += 1
        version, began = self._version, self._events.now()
        self._events.add(ACTOR, "publish", version=version, method=method)
        self._events.flush()  # no later attempt may give other weights this number
        release = await self._ask(lambda: self._role.publish(version, method), "sync_deadline")
        if release.version != version:
            raise ActorError(f"asked for weights version {version}, it wrote {release.version}")
        seconds = round(self._events.now() - began, 4)
        self._events.add(ACTOR, "published", version=version, step=release.step, method=method, seconds=seconds)
        return release

    async def _canary(self, version: int) -> Canary:
        began = self._events.now()
        canary = await self._ask(lambda: self._role.canary(version), "sync_deadline")
        if canary.version != version:
            raise ActorError(f"asked for the canary of weights version {version}, it gave one of {canary.version}")
        self._events.add(ACTOR, "canary", version=version, seconds=round(self._events.now() - began, 4))
        return canary

    async def save_checkpoint(self, logs: dict[str, int]) -> str:
        """A complete checkpoint; `logs`: the run's log sizes as of this step."""
        async with self._free:
            return await self._ask(lambda: self._role.save_checkpoint(logs), "sync_deadline")

    async def save_trained(self) -> str:
        """The trained adapter or model in the run folder."""
        async with self._free:
            return await self._ask(self._role.save_trained, "sync_deadline")

    async def _ask(self, question: Callable[[], Awaitable[T]], knob: str) -> T:
        seconds: float = getattr(self._settings, knob)
        limit = asyncio.timeout(seconds)
        with self._events.at_work(ACTOR):
            try:
                async with limit:
                    return await question()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise ActorError(f"no answer within distributed.{knob} {seconds:g} s") from None
