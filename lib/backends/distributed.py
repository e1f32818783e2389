"""The distributed backend: an orchestrator in this process, one actor and rollout workers in others, or containers.

Owns the way from a config to the orchestrator. Must not know how the roles are started, task names or notebooks.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from lib import orchestrator
from lib.config import Config
from lib.generate import Chat, check_turns, unloaded_chat
from lib.places import ROLES
from lib.roles import ActorState
from lib.rollout import finish
from lib.runfolder import Run
from lib.task import Row, Task
from lib.tools import check_tools
from lib.training import StopSignal, kept_rows, write_csv

logger = logging.getLogger(__name__)


def train(
    config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal, hosts: orchestrator.Hosts | None = None
) -> Path | None:
    """Train to the end, or until `stop` asks; returns the output folder, or None where it stopped early."""

    def read(state: ActorState) -> tuple[Chat, list[int]]:
        chat = open_chat(config, state)
        check_tools(chat, rows)
        kept = kept_rows(rows, chat, config)
        if task.max_turns > 1:
            check_turns(chat, rows[kept[0]])
        return chat, kept

    async def read_beside(state: ActorState) -> tuple[Chat, list[int]]:
        return await asyncio.to_thread(read, state)  # seconds, in which workers start and are heard

    for attempt in itertools.count(1):
        chosen = hosts or open_hosts(config, run)
        try:
            folder = finish(orchestrator.train(config, task, rows, run, stop, chosen, read_beside))
            break
        except orchestrator.OrchestratorError as error:
            if not chosen.preempted or attempt > config.distributed.restarts:
                raise
            logger.warning("%s: going on from the last checkpoint with another actor", error)
    if config.training.completions_csv:
        write_csv(run, config.training.completions_csv)
    return Path(folder) if folder else None


def open_hosts(config: Config, run: Run) -> orchestrator.Hosts:
    """Where the roles of this config run, seen from this process: `distributed.hosts`."""
    wanted = config.distributed.hosts
    if wanted == "modal" or (wanted == "auto" and os.environ.get(ROLES)):
        from lib.modal_hosts import ModalHosts

        return ModalHosts(config, run)
    from lib.processes import Processes

    return Processes(config, run)


def open_chat(config: Config, state: ActorState) -> Chat:
    """The chat of the actor's policy, as the workers serve it."""
    chat = unloaded_chat(config.as_served, state.model)
    chat.end_ids = frozenset(state.end_ids)
    return chat
