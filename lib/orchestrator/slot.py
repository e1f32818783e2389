"""The place of one worker: starts it, keeps its weights in step with the actor's, has them proven, starts it again.

Owns a worker's whole way: start, sync, proof, fence, fallback, loss, restart, giving up. Must not know rollouts.

    python -c "from lib.orchestrator.slot import Slot; help(Slot.keep)"
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from lib.orchestrator.life import Life, Target
from lib.roles import FALLBACK, Canary, Facts, Method, Proof, RefusedError, Worker, WorkerError
from lib.sync import compare

if TYPE_CHECKING:
    from lib.orchestrator.fleet import Fleet

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSING = 10.0
"""Seconds that a worker gets to end by itself."""


class _GivenUpError(Exception):
    """This place stays empty; the message says why."""


class Slot:
    """One worker's place in the fleet. Its worker may be another process after every loss."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name, self._fleet = name, fleet
        self._settings, self._events = fleet.settings, fleet.events
        self.method: Method = fleet.settings.sync_method
        """How it gets its weights: the configured way, or the one that had to be fallen back to."""
        self.life: Life | None = None
        self.given_up: str | None = None
        self.wake = asyncio.Event()
        """Set where there is something to do for `keep`: new weights, or a loss."""
        self.generated = 0
        """Tokens sampled by earlier lives since the last look."""
        self._worker: Worker | None = None
        self._facts: Facts
        """Of this worker's engine."""
        self._held: Target | None = None
        """What this process has loaded and was proven to hold."""
        self._before: Target | None = None
        """What this process was last seen to follow, or began with: what it would serve had it taken nothing since."""
        self._ahead = False
        self._looked: Target | None = None
        """What it was asked for last as the weights that it had proven before."""
        self._lives = self._losses = 0
        self._suspect = ""
        """Why its last life ended, until it has proven itself again."""

    async def keep(self) -> None:
        """Keep a worker in service until there is no more sense in it; ends then, and never by itself before."""
        try:
            while True:
                try:
                    await self._keep_one()
                except WorkerError as error:
                    await self._drop(str(error))
        except _GivenUpError as error:
            self.given_up = str(error)
            self._events.add(self.name, "given_up", why=self.given_up)
            logger.error("%s is given up: %s", self.name, self.given_up)
            self._fleet.check_any_left()  # before anything is waited for: without a worker there is nothing to sync
            await self._close()

    def new_weights(self) -> None:
        """There are newer weights: begin no more turns on the old ones."""
        if self.life:
            self.life.pause()
        self.wake.set()

    def weights_ahead(self) -> None:
        """Newer weights are being written: what has to be asked before they are loaded can be asked meanwhile."""
        self._ahead = True
        self.wake.set()

    def take_tokens(self) -> int:
        """Tokens sampled here since the last call."""
        tokens, self.generated = self.generated, 0
        if self.life:
            tokens, self.life.tokens = tokens + self.life.tokens, 0
        return tokens

    async def _keep_one(self) -> None:
        """One process's time: start, then follow the actor's weights. Ends by WorkerError."""
        if self._worker is None:
            await self._start()
        while True:
            await self.wake.wait()
            self.wake.clear()
            if self.life and self.life.lost:
                self._note_loss(self.life.lost)
            if self._ahead and self.life and self.life.serving:
                await self._ask_before(self.life.serving)
            self._ahead = False
            if self._fleet.step is not None and (self.life is None or self.life.serving is None):
                await self._sync()

    async def _start(self) -> None:
        if self._losses:
            await asyncio.sleep(2.0 ** (self._losses - 1))
        began = self._events.now()
        self._events.add(self.name, "start")
        starting = self._fleet.start_worker(self.name)
        self._worker = await _within(self._settings.start_deadline, starting, "its start", "start_deadline")
        self._facts = await _within(
            self._settings.canary_deadline, self._worker.facts(), "its facts", "canary_deadline"
        )
        self._before = self._fleet.base
        self._events.add(
            self.name, "ready", seconds=round(self._events.now() - began, 3), max_length=self._facts.max_length
        )
        self.wake.set()

    # weights ----------------------------------------------------------------------------------------------------------
    async def _sync(self) -> None:
        """Bring the worker to the newest weights, by the next method where one does not lead to a proof."""
        method, refused = self.method, False
        while True:
            self.method = method
            target = await self._fleet.target(method)
            proof = await self._bring(target, ask_before=not refused)
            newest = self._fleet.is_newest(target)
            if proof.holds and newest:
                return self._serve(target)
            if not proof.holds and self.life:
                self.life.end(f"could not prove its weights: {proof.why}")
                self._end_life()
            if not newest:
                continue  # there are newer weights by now, and those before them may be gone
            following = FALLBACK[method]
            self._note_fence(target, proof, following)
            if following is None:
                raise _GivenUpError(f"it could not prove its weights by any method; by {method}: {proof.why}")
            method, refused = following, True  # what it holds now is nobody's guess, and may not answer at all

    async def _bring(self, target: Target, ask_before: bool) -> Proof:
        """Load these weights, unless they were proven here before, and compare canaries."""
        assert self._worker is not None
        release = target.release
        with self._events.at_work(self.name):
            loaded = self._held is not None and self._held.release.version == release.version
            if not loaded:
                if ask_before and (self._held is None or self._looked is not self._held):
                    await self._ask_before(self._held or target)
                if self.life:
                    await self.life.quiet()
                self._held = None
                limit, began = self._settings.sync_deadline, self._events.now()
                try:
                    await _within(limit, self._worker.update_weights(release), "loading weights", "sync_deadline")
                except RefusedError as error:
                    return Proof(release.version, False, math.inf, f"it did not take them: {error}")
                seconds = round(self._events.now() - began, 4)
                self._events.add(
                    self.name,
                    "sync",
                    version=release.version,
                    step=release.step,
                    method=release.method,
                    seconds=seconds,
                )
                self._fleet.sync_seconds[self.name] = seconds
            canary, before = await target.canary(), self._before
            began = self._events.now()
            proof = await self._ask(canary, await before.canary() if before else None)
        self._note_proof(target, proof, self._events.now() - began)
        if proof.holds:
            self._held = target
            if proof.followed or self._before is None:
                self._before = target  # not after a step too small to tell: such steps add up until they can be told
            return proof
        if loaded:
            self._fleet.revoke(self.name, release.version, proof.why)
        self._held = None  # whatever it has now is to be loaded anew
        return proof

    async def _ask_before(self, target: Target) -> None:
        """One canary before the sync. Where it no longer holds what it had proven, those turns do not count."""
        held = self._looked = self._held
        canary = await target.canary()
        proof = await self._ask(canary._replace(prompts=canary.prompts[:1], logprobs=canary.logprobs[:1]))
        if held and not proof.holds:
            self._fleet.revoke(self.name, held.release.version, proof.why)

    async def _ask(self, canary: Canary, before: Canary | None = None) -> Proof:
        assert self._worker is not None
        limit = self._settings.canary_deadline
        answered = await _within(limit, self._worker.canary(canary.prompts), "its canaries", "canary_deadline")
        return compare(canary, answered, self._settings.tolerance, before, self._fleet.dtype)

    def _note_proof(self, target: Target, proof: Proof, seconds: float) -> None:
        worst = proof.worst if math.isfinite(proof.worst) else None
        facts = {"version": proof.version, "method": target.release.method, "holds": proof.holds, "worst": worst}
        self._events.add(self.name, "proof", **facts, seconds=round(seconds, 4), why=proof.why)

    def _serve(self, target: Target) -> None:
        if self.life and self.life.lost:
            self._note_loss(self.life.lost)  # its last turn before the sync failed
        if self._suspect:
            self._strike(self._suspect)
            self._suspect = ""
        elif self.life and self.life.turns:
            self._losses = 0  # served from one sync to the next
        if self.life is None:
            self._lives += 1
            assert self._worker is not None
            deadline, most = self._settings.turn_deadline, self._facts.max_length
            self.life = Life(self.name, self._worker, self._lives, self._events, deadline, most)
            self.life.on_loss = self.wake.set
        self.life.serve(target)
        self._fleet.now_serves(self.life, target)

    def _note_fence(self, target: Target, proof: Proof, following: Method | None) -> None:
        method = target.release.method
        then = f"trying {following}" if following else "nothing is left to try"
        self._events.add(self.name, "fenced", version=proof.version, method=method, next=following, why=proof.why)
        logger.warning("%s cannot prove its weights (%s, version %d): %s; %s", self.name, method, proof.version,
                       proof.why, then)  # fmt: skip

    # losses -----------------------------------------------------------------------------------------------------------
    def _note_loss(self, reason: str) -> None:
        """A turn failed: the same process may go on where it proves its weights again."""
        assert self.life is not None
        self._suspect = reason
        self._events.add(self.name, "lost", why=reason, rollouts=self.life.dropped)
        logger.warning("%s is out of service: %s", self.name, reason)
        self._end_life()

    def _end_life(self) -> None:
        assert self.life is not None
        self.generated += self.life.tokens
        self.life = None

    async def _drop(self, reason: str) -> None:
        """The process does not answer: end it. Raises _GivenUpError where it was started often enough."""
        if self._suspect:
            reason = f"{self._suspect}; then: {reason}"
        rollouts = 0
        if self.life:
            self.life.end(reason)
            rollouts = self.life.dropped
            self._end_life()
        self._events.add(self.name, "died", why=reason, rollouts=rollouts)
        logger.warning("%s does not answer: %s", self.name, reason)
        await self._close()
        self._suspect = ""
        self._strike(reason)

    def _strike(self, reason: str) -> None:
        self._losses += 1
        if self._losses > self._settings.restarts:
            raise _GivenUpError(f"lost {self._losses} times (distributed.restarts {self._settings.restarts}): {reason}")

    async def _close(self) -> None:
        worker, self._worker, self._held = self._worker, None, None
        if self.life:
            self.life.end("closed")
            self._end_life()
        if worker:
            with suppress(WorkerError, TimeoutError):
                async with asyncio.timeout(_CLOSING):
                    await worker.close()


async def _within(seconds: float, work: Awaitable[T], what: str, knob: str) -> T:
    """What `work` gives; WorkerError where it takes too long."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise WorkerError(f"{what} took longer than distributed.{knob} {seconds:g} s") from None
