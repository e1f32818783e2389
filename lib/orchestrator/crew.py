"""What goes on beside the training's own steps: workers being kept, rollouts being played.

Owns that an error of one of them ends all. Must not know what they do.

    python -c "from lib.orchestrator.crew import first_error; print(first_error(ExceptionGroup('', [OSError('x')])))"
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Crew:
    """All that goes on beside the training's own steps; an exception of one of them ends everything."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def dismiss(self) -> None:
        for task in self._tasks:
            task.cancel()


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that is more than an echo of another's end."""
    leaves: list[BaseException] = []
    for error in errors.exceptions:
        leaves.append(first_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if not isinstance(leaf, asyncio.CancelledError)), leaves[0])
