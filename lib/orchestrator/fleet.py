"""All rollout workers: which weights they should serve, which turns can be trusted, who has a place free.

Owns the newest weights and the register of proofs. Must not know rollouts, scoring or the actor.

    python -c "from lib.orchestrator.fleet import Fleet; help(Fleet.free)"
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from lib import WorkbenchError
from lib.orchestrator.life import Life, Stamp, Target
from lib.orchestrator.slot import Slot
from lib.roles import Method

if TYPE_CHECKING:
    from lib.config.distributed import DistributedSection
    from lib.orchestrator.events import Events
    from lib.roles import Worker

logger = logging.getLogger(__name__)


SAME_FILES: Mapping[Method, Method] = {"volume": "reload"}
"""A method -> another one that writes what it loads."""


class FleetError(WorkbenchError, RuntimeError):
    """No worker is left; the message says what became of each."""


class Fleet:
    """The workers' places, and what they have in common."""

    def __init__(
        self,
        settings: DistributedSection,
        dtype: str,
        events: Events,
        start_worker: Callable[[str], Awaitable[Worker]],
        publish: Callable[[Method], Awaitable[None]],
    ) -> None:
        """`dtype`: of the weights as the workers serve them; `publish`: has the actor write its weights by a method,
        between two steps, and hand them to `add_targets`."""
        self.settings, self.dtype, self.events = settings, dtype, events
        self.start_worker, self._publish = start_worker, publish
        self.step: int | None = None
        """Optimizer steps that the newest weights have seen; None before the first sync."""
        self.base: Target | None = None
        """The base policy: a process that was just started holds it."""
        self.sync_seconds: dict[str, float] = {}
        """By worker, how long its last load took."""
        self.serves = asyncio.Event()
        """Set once the first worker has proven its weights."""
        self.on_place: Callable[[], None] = lambda: None
        """Called where a worker may have become free."""
        self.on_revoked: Callable[[], None] = lambda: None
        """Called where turns have ceased to count."""
        self._targets: dict[Method, Target] = {}
        self._trusted: set[Stamp] = set()
        self.slots = [Slot(f"worker-{number}", self) for number in range(settings.workers)]

    # weights ----------------------------------------------------------------------------------------------------------
    @property
    def methods(self) -> set[Method]:
        """The ways in which weights have to be written for the workers that are left."""
        wanted = {slot.method for slot in self.slots if not slot.given_up}
        return {method for method in wanted if SAME_FILES.get(method) not in wanted}

    def announce(self) -> None:
        """Newer weights are being written."""
        for slot in self.slots:
            slot.weights_ahead()

    def set_targets(self, targets: Mapping[Method, Target]) -> None:
        """From now on, new turns are sampled from these weights only, by workers that have proven them."""
        self._targets = dict(targets)
        if self.step is None:
            self.base = next((target for target in targets.values() if target.release.step == 0), None)
        self.step = min(target.release.step for target in targets.values())
        for slot in self.slots:
            slot.new_weights()

    def known(self, method: Method, step: int | None = None) -> Target | None:
        """Weights of this step or later (None = of the last sync), where they were written by this method."""
        oldest = self.step if step is None else step
        for written in (method, SAME_FILES.get(method, method)):
            target = self._targets.get(written)
            if target and oldest is not None and target.release.step >= oldest:
                return target._replace(release=target.release._replace(method=method))
        return None

    async def target(self, method: Method) -> Target:
        """The newest weights by this method; written for it where nobody needed them this way before."""
        while (known := self.known(method)) is None:  # newer weights may have become due meanwhile
            await self._publish(method)
        return known

    def add_targets(self, targets: Mapping[Method, Target]) -> None:
        """The same weights, or newer ones, written in one more way."""
        self._targets |= targets

    def is_newest(self, target: Target) -> bool:
        return self.step is not None and target.release.step >= self.step

    # trust ------------------------------------------------------------------------------------------------------------
    def now_serves(self, life: Life, target: Target) -> None:
        """A worker has proven these weights: its turns count, and it has places."""
        self._trusted.add(stamp_of(life, target))
        self.serves.set()
        self.on_place()

    def revoke(self, worker: str, version: int, why: str) -> None:
        """A worker no longer held what it had proven: none of its turns of that version counts."""
        self._trusted = {stamp for stamp in self._trusted if (stamp.worker, stamp.version) != (worker, version)}
        self.events.add(worker, "revoked", version=version, why=why)
        logger.warning("%s: weights version %d are no longer what was proven: %s", worker, version, why)
        self.on_revoked()

    def trusts(self, stamps: Iterable[Stamp]) -> bool:
        """Whether every one of these turns comes from weights that were proven, and stand proven."""
        return all(stamp in self._trusted for stamp in stamps)

    # places -----------------------------------------------------------------------------------------------------------
    def free(self, rollouts: int, oldest: int) -> Life | None:
        """The least busy worker with places for so many rollouts, on weights of at least `oldest` steps."""
        found: Life | None = None
        for slot in self.slots:
            life = slot.life
            if life and self.fits(life, rollouts, oldest) and (found is None or life.playing < found.playing):
                found = life
        return found

    def fits(self, life: Life, rollouts: int, oldest: int) -> bool:
        """Whether a worker serves such weights and has so many places; one without anything to do takes any number."""
        if life.serving is None or life.serving.release.step < oldest:
            return False
        return not life.playing or life.playing + rollouts <= self.settings.in_flight

    def check_any_left(self) -> None:
        """Raise FleetError where all places were given up."""
        if all(slot.given_up for slot in self.slots):
            told = "; ".join(f"{slot.name}: {slot.given_up}" for slot in self.slots)
            raise FleetError(f"no rollout worker is left. {told}. Their logs are in the run folder")


def stamp_of(life: Life, target: Target) -> Stamp:
    """The stamp that this worker's turns bear on these weights."""
    return Stamp(life.name, life.number, target.release.version, target.release.step)
