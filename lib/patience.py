"""How long a task's world and scorer are waited for.

Owns these limits of time, and what counts as being stuck. Must not know tasks, rollouts or configs.

    python -c "from lib.patience import Patience; print(Patience(world=60.0).world.seconds)"
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

WORLD_SECONDS, SCORE_SECONDS = 600.0, 1800.0
"""The defaults of rewards.world_seconds and rewards.score_seconds. A score leaves a judge the longest pause that it may
ask for (600 s), and then every repeat of a request that it never answers."""


class Patience:
    """Two limits of time that the rollouts of one batch share, in seconds.

    Counted from when the last one of the batch was done: what waits in a queue (for a judge, for a sandbox) is not
    given up while that queue moves. What blocks the loop itself (time.sleep, a long computation) cannot be given up.
    """

    def __init__(self, world: float = WORLD_SECONDS, score: float = SCORE_SECONDS) -> None:
        self.world = Clock("reply", "rewards.world_seconds", world)
        self.score = Clock("score", "rewards.score_seconds", score)


class Clock:
    """One limit of time: of all that is awaited through it, something has to be done every `seconds`."""

    def __init__(self, method: str, setting: str, seconds: float) -> None:
        self.method, self.setting, self.seconds = method, setting, seconds
        self._moved = -math.inf
        """When the last one was done, by the loop's clock."""

    async def limit(self, work: Awaitable[T]) -> T:
        """What `work` gives. Raises TimeoutError, and cancels it, where nothing has been done for too long."""
        loop = asyncio.get_running_loop()
        began, limit = loop.time(), asyncio.timeout(None)
        alarm: asyncio.TimerHandle

        def look() -> None:
            nonlocal alarm
            due = max(began, self._moved) + self.seconds
            if due > loop.time():
                alarm = loop.call_at(due, look)
            else:
                limit.reschedule(loop.time())

        alarm = loop.call_later(self.seconds, look)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise  # the work's own
            told = f"the task's {self.method} took longer than {self.setting} = {self.seconds:g} s"
            raise TimeoutError(told) from None
        finally:
            alarm.cancel()
            self._moved = loop.time()
