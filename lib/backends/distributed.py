"""The distributed backend: an orchestrator in this process, one actor and rollout workers in processes of their own.

Owns the way from a config to the orchestrator. Must not know how the roles are started, task names or notebooks.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from lib import orchestrator
from lib.config import Config
from lib.generate import Chat, check_turns, unloaded_chat
from lib.roles import ActorState
from lib.rollout import finish
from lib.runfolder import Run
from lib.task import Row, Task
from lib.tools import check_tools
from lib.training import StopSignal, kept_rows, write_csv


def train(
    config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal, hosts: orchestrator.Hosts | None = None
) -> Path | None:
    """Train to the end, or until `stop` asks; returns the output folder, or None where it stopped early."""
    if hosts is None:
        from lib.processes import Processes

        hosts = Processes(config, run)

    def read(state: ActorState) -> tuple[Chat, list[int]]:
        chat = open_chat(config, state)
        check_tools(chat, rows)
        kept = kept_rows(rows, chat, config)
        if task.max_turns > 1:
            check_turns(chat, rows[kept[0]])
        return chat, kept

    async def read_beside(state: ActorState) -> tuple[Chat, list[int]]:
        return await asyncio.to_thread(read, state)  # seconds, in which workers start and are heard

    folder = finish(orchestrator.train(config, task, rows, run, stop, hosts, read_beside))
    if config.training.completions_csv:
        write_csv(run, config.training.completions_csv)
    return Path(folder) if folder else None


def open_chat(config: Config, state: ActorState) -> Chat:
    """The chat of the actor's policy, as the workers serve it."""
    chat = unloaded_chat(config.as_served, state.model)
    chat.end_ids = frozenset(state.end_ids)
    return chat
