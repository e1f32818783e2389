"""The queue of groups: idle workers take the next one, what a lost worker leaves unfinished is played anew.

Owns which group is played where and when; scoring begins as soon as an answer is there. Must not know weights or the
actor.

    python -c "from lib.orchestrator.generation import Generation; help(Generation.open)"
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

from lib.generate import Chat
from lib.orchestrator.draft import Draft, Played
from lib.orchestrator.events import Events
from lib.orchestrator.fleet import Fleet
from lib.orchestrator.life import Life, LostError
from lib.orchestrator.play import Play, seed_of
from lib.patience import Patience
from lib.roles import Sampling
from lib.rollout import Scored
from lib.task import Rollout, Row, Score, Task

SCORING = "scoring"
"""The name of the role that scores, in events and metrics."""


class Policy(NamedTuple):
    """How the policy is asked."""

    chat: Chat
    sampling: Sampling
    seed: int
    patience: Patience
    """How long the world and the scorer are waited for, which all rollouts share."""


class _Job(NamedTuple):
    """Rollouts of one group for one worker; the order of the queue is that of batches and groups."""

    batch: int
    group: int
    positions: tuple[int, ...]


class Generation:
    """Fills drafts from the fleet."""

    def __init__(
        self,
        fleet: Fleet,
        task: Task,
        rows: Sequence[Row],
        policy: Policy,
        oldest: Callable[[int], int],
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """`oldest`: of a batch's index, the optimizer steps that its weights must have seen at least; `start`: runs a
        coroutine beside the others, its exceptions being the training's."""
        self._fleet, self._task, self._rows, self._policy = fleet, task, rows, policy
        self._events: Events = fleet.events
        self._oldest, self._start = oldest, start
        self._drafts: dict[int, Draft] = {}
        self._queue: list[_Job] = []
        fleet.on_place, fleet.on_revoked = self.dispatch, self._weed

    def open(self, draft: Draft) -> None:
        """Begin to fill a batch, after those that are open already."""
        self._drafts[draft.index] = draft
        for group in range(len(draft.rows)):
            heapq.heappush(self._queue, _Job(draft.index, group, draft.positions(group)))
        self.dispatch()

    def replay(self, draft: Draft, positions: Sequence[int]) -> None:
        """Play these rollouts anew, before anything else."""
        self._events.add("orchestrator", "replayed", batch=draft.index, rollouts=len(positions))
        draft.take_back(positions)
        for group in sorted({position // draft.group for position in positions}):
            own = tuple(position for position in positions if position // draft.group == group)
            heapq.heappush(self._queue, _Job(draft.index, group, own))
        self.dispatch()

    def close(self, draft: Draft) -> None:
        """The batch is full, and goes to the actor: forget it."""
        del self._drafts[draft.index]

    def dispatch(self) -> None:
        """Hand out groups while there is a worker free; called whenever that may have changed."""
        while self._queue:
            job = self._queue[0]
            life = self._fleet.free(len(job.positions), self._oldest(job.batch))
            if life is None:
                return
            heapq.heappop(self._queue)
            life.playing += len(job.positions)
            draft = self._drafts[job.batch]
            row = self._rows[draft.rows[job.group]]
            for position in job.positions:
                self._start(self._play(life, draft, position, row))

    async def _play(self, life: Life, draft: Draft, position: int, row: Row) -> None:
        seed = partial(seed_of, self._policy.seed, draft.index, position)
        play = Play(life, self._policy.chat, self._policy.sampling, seed)
        scoring = self._events.busy(SCORING)
        left = False

        def played_out() -> None:
            nonlocal left
            left = True
            self._leave(life)
            scoring.begin(self._events.now())

        try:
            played = await play.run(self._task, row, played_out, self._policy.patience)
        except LostError as error:
            self._leave(life)
            self._after_loss(draft, position, row, str(error))
            return
        finally:
            if left:
                scoring.end(self._events.now())
        if not left:  # its world broke before the policy was done
            self._leave(life)
        draft.put(position, played)

    def _weed(self) -> None:
        """Play anew what rests on weights that have lost their proof."""
        for draft in list(self._drafts.values()):
            unproven = draft.unproven(self._fleet.trusts)
            if unproven:
                self.replay(draft, unproven)

    def _leave(self, life: Life) -> None:
        """The policy has no more turns to supply: its place is another rollout's."""
        life.playing -= 1
        if self._queue:  # only this one may have become free
            job = self._queue[0]
            if self._fleet.fits(life, len(job.positions), self._oldest(job.batch)):
                self.dispatch()

    def _after_loss(self, draft: Draft, position: int, row: Row, why: str) -> None:
        draft.tries[position] += 1
        if draft.tries[position] < self._fleet.settings.attempts:
            heapq.heappush(self._queue, _Job(draft.index, position // draft.group, (position,)))
            self.dispatch()
            return
        note = f"lost with {draft.tries[position]} workers (distributed.attempts); the last one: {why}"
        missing = Scored(
            Rollout(row=row, messages=tuple(row["prompt"]), turns=()), Score(reward=None, notes={"error": note})
        )
        draft.put(position, Played(missing, ()))
