"""A generation batch that is being filled: which rollouts are there, which may be trained on.

Owns one place for every completion, filled exactly once, and the two conditions of a batch that may be trained on:
every turn from proven weights, none older than the bound. Must not know workers or the actor.

    python -c "from lib.orchestrator.draft import Draft; print(Draft(0, [7, 3], 4).positions(1))"
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from lib.orchestrator.life import Stamp
from lib.rollout import Scored
from lib.trainer import Batch, to_batch
from lib.training import rollout_record


class Played(NamedTuple):
    """A finished rollout and where each of its turns comes from."""

    scored: Scored
    stamps: tuple[Stamp, ...]
    """One for every turn; none where no worker could supply any."""


class Draft:
    """The completions of one generation batch, by position: group after group."""

    def __init__(self, index: int, rows: Sequence[int], group: int) -> None:
        """`index`: of the batch, since the beginning of the training; `rows`: one for every group."""
        self.index, self.rows, self.group = index, list(rows), group
        self.full = asyncio.Event()
        """Set while every place is filled."""
        self.tries = [0] * (len(rows) * group)
        """Workers that were lost with the rollout of a place."""
        self._played: list[Played | None] = [None] * (len(rows) * group)
        self._missing = len(self._played)

    def positions(self, group: int) -> tuple[int, ...]:
        """The places of a group."""
        return tuple(range(group * self.group, (group + 1) * self.group))

    def put(self, position: int, played: Played) -> None:
        """Fill a place. Raises ValueError where it is filled: nothing is counted twice."""
        if self._played[position] is not None:
            raise ValueError(f"batch {self.index}: place {position} was filled twice")
        self._played[position] = played
        self._missing -= 1
        if not self._missing:
            self.full.set()

    def take_back(self, positions: Iterable[int]) -> None:
        """Empty these places: their rollouts are to be played anew."""
        for position in positions:
            self._missing += self._played[position] is not None
            self._played[position] = None
            self.tries[position] = 0
            self.full.clear()

    def unproven(self, trusts: Callable[[Iterable[Stamp]], bool]) -> list[int]:
        """Filled places with a turn of weights that were not proven, or have lost their proof."""
        return [position for position, one in enumerate(self._played) if one and not trusts(one.stamps)]

    def stale(self, step: int, bound: int) -> list[int]:
        """Filled places with a turn that is more than `bound` optimizer steps old at this step."""
        return [
            position
            for position, one in enumerate(self._played)
            if one and any(step - stamp.step > bound for stamp in one.stamps)
        ]

    # what becomes of it -----------------------------------------------------------------------------------------------
    @property
    def scored(self) -> list[Scored]:
        """The rollouts of a full batch, by position."""
        return [one.scored for one in self._all()]

    def staleness(self, step: int) -> list[int]:
        """Of every answered rollout, how many optimizer steps its oldest turn is behind."""
        return [step - min(stamp.step for stamp in one.stamps) for one in self._all() if one.stamps]

    def batch(self, step: int, end_id: int) -> Batch:
        """As the actor takes it, staleness among its metrics."""
        batch = to_batch(self.scored, self.group, end_id)
        behind = self.staleness(step) or [0]
        ages = {"staleness/mean": sum(behind) / len(behind), "staleness/max": float(max(behind))}
        return batch._replace(metrics={**batch.metrics, **ages})

    def records(self, step: int, passes: int) -> list[dict[str, Any]]:
        """The lines of rollouts.jsonl; `step`: optimizer steps done before it, `passes`: of one batch."""
        return [
            rollout_record(one.scored, position, self.group, step + 1, self.index * passes)
            | {
                "version": min((stamp.version for stamp in one.stamps), default=None),
                "worker": one.stamps[-1].worker if one.stamps else None,
                "staleness": step - min(stamp.step for stamp in one.stamps) if one.stamps else None,
            }
            for position, one in enumerate(self._all())
        ]

    def _all(self) -> list[Played]:
        if self._missing:
            raise ValueError(f"batch {self.index} is not full: {self._missing} of {len(self._played)} are missing")
        return [one for one in self._played if one is not None]
