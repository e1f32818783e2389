"""The training itself: sample, score, train, sync, save, stop.

Owns the order of things, and what must hold before anything is trained on. Must not know processes, torch or the
names of tasks.

    python -c "from lib.orchestrator.training import train; help(train)"
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from lib import WorkbenchError
from lib.config import Config
from lib.generate import Chat
from lib.orchestrator.actor import ACTOR, ActorDesk
from lib.orchestrator.crew import Crew, first_error
from lib.orchestrator.draft import Draft
from lib.orchestrator.events import Events, last_version
from lib.orchestrator.fleet import Fleet
from lib.orchestrator.generation import SCORING, Generation, Policy
from lib.orchestrator.hosts import Hosts
from lib.orchestrator.order import DataOrder
from lib.orchestrator.plan import Plan
from lib.orchestrator.resume import cut_back
from lib.patience import Patience
from lib.roles import ActorError, ActorState, Method, Sampling, StepReport
from lib.rollout import UnscoredLimitError, check_unscored
from lib.runfolder import Run, plain
from lib.task import Row, Task
from lib.training import MaskedWatch, StopSignal, say_step

logger = logging.getLogger(__name__)

ORCHESTRATOR = "orchestrator"
_PIECE = 64
"""Lines that are written at a time: a thousandth of a second."""


Reading = Callable[[ActorState], Awaitable[tuple[Chat, Sequence[int]]]]
"""The base policy's chat template, and the numbers of the rows to train on."""


class OrchestratorError(WorkbenchError, RuntimeError):
    """The training cannot go on; the message says why and what to change."""


async def train(
    config: Config,
    task: Task,
    rows: Sequence[Row],
    run: Run,
    stop: StopSignal,
    hosts: Hosts,
    read: Reading,
) -> str | None:
    """Train to the end, or until `stop` asks: the folder of the trained adapter or model, or None.

    `read` is called once the actor knows the base policy. Raises OrchestratorError, FleetError,
    UnscoredLimitError, RowsError; whatever ends it, the next call goes on from the last complete checkpoint.
    """
    try:
        async with asyncio.TaskGroup() as group:
            crew = Crew(group)
            training = Training(config, task, rows, run, stop, hosts, crew)
            try:
                return await training.run(read)
            finally:
                crew.dismiss()
                training.events.flush()
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        if isinstance(error, ActorError):
            error = OrchestratorError(f"the actor cannot go on: {error}")
        raise error from None
    finally:
        await hosts.close()


class Training:
    """One attempt, from the last complete checkpoint on."""

    def __init__(
        self, config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal, hosts: Hosts, crew: Crew
    ) -> None:
        self._config, self._task, self._rows, self._run, self._stop = config, task, rows, run, stop
        self._hosts, self._crew = hosts, crew
        self._plan, self.events = Plan.of(config), Events(run)
        self._step = self._consumed = self._max_steps = 0
        self._drafts: dict[int, Draft] = {}
        self._masked = MaskedWatch()
        self._began = self._last_step = self.events.now()
        self._actor: ActorDesk
        self._fleet: Fleet
        self._generation: Generation
        self._order: DataOrder

    async def run(self, read: Reading) -> str | None:
        """To the end: the product's folder; None where it was asked to stop."""
        state = await self._start_actor()
        if not self._is_over:
            await self._start_workers(state, read)
        while not self._is_over:
            await self._train_next()
            if self._is_asked_to_stop() and not self._is_over:
                await self._save()
                self.events.add(ORCHESTRATOR, "stopped", step=self._step)
                return None
            if self._needs_sync():
                await self._sync()
            if self._is_over or self._step % self._plan.save_every == 0:
                await self._save()
        folder = await self._actor.save_trained()
        self.events.add(ORCHESTRATOR, "finished", step=self._step)
        return folder

    # beginning --------------------------------------------------------------------------------------------------------
    async def _start_actor(self) -> ActorState:
        self.events.add(ACTOR, "start")
        deadline = self._config.distributed.start_deadline
        limit = asyncio.timeout(deadline)
        try:
            async with limit:
                role = await self._hosts.start_actor()
        except TimeoutError:
            if not limit.expired():
                raise
            raise ActorError(f"it did not start within distributed.start_deadline {deadline:g} s") from None
        self._actor = ActorDesk(role, self._config.distributed, self.events, last_version(self._run))
        state = await self._actor.initialize()
        self._step, self._consumed, self._max_steps = state.step, state.consumed, state.max_steps
        cut_back(self._run, self._step)
        self.events.add(ACTOR, "ready", step=self._step, consumed=self._consumed, max_steps=self._max_steps)
        return state

    async def _start_workers(self, state: ActorState, read: Reading) -> None:
        """Start them, and begin to count the time once there is one to ask."""
        config = self._config
        start_worker = partial(self._hosts.start_worker, model=state.model)
        self._fleet = Fleet(
            config.distributed, self._hosts.dtype, self.events, start_worker, publish=self._publish_for_one
        )
        for role in (ACTOR, SCORING, *(slot.name for slot in self._fleet.slots)):
            self.events.busy(role)
        for slot in self._fleet.slots:
            self._crew.start(slot.keep())
        await self._sync()
        chat, kept = await read(state)
        self._order = DataOrder(kept, self._plan.prompts, config.training.seed)
        patience = Patience(config.rewards.world_seconds, config.rewards.score_seconds)
        policy = Policy(chat, sampling_of(config, chat), config.training.seed, patience)
        self._generation = Generation(
            self._fleet, self._task, self._rows, policy, self._oldest_weights, self._crew.start
        )
        self._end_id = min(chat.end_ids)
        await self._fleet.serves.wait()
        self.events.idle_shares()  # what was idle while everything started says nothing
        self._began = self._last_step = self.events.now()

    # one batch --------------------------------------------------------------------------------------------------------
    async def _train_next(self) -> None:
        """Train on the next batch in the data's order, while those after it are being sampled."""
        self._open_batches()
        draft, began = self._drafts[self._consumed], self.events.now()
        report = None
        while report is None:
            await self._fill(draft)
            waited = self.events.now() - began
            hand_over, write_down = partial(self._hand_over, draft), partial(self._write_down, draft, waited)
            report = await self._actor.train(hand_over, write_down)
        if report.step <= self._step:
            raise OrchestratorError(f"the actor did no optimizer step on batch {draft.index} (step {self._step})")
        del self._drafts[self._consumed]
        self._consumed, self._step = self._consumed + 1, report.step
        self._write_metrics(report)

    def _open_batches(self) -> None:
        last = self._consumed + self._plan.batches_left(self._max_steps - self._step) - 1
        for index in range(self._consumed, min(self._consumed + self._plan.overlap, last) + 1):
            if index not in self._drafts:
                self._drafts[index] = Draft(index, self._order.batch(index), self._plan.group)
                self._generation.open(self._drafts[index])

    async def _fill(self, draft: Draft) -> None:
        """Wait until the batch is full of rollouts that may be trained on; those that may not are played anew."""
        while True:
            if self._needs_sync():
                await self._sync()  # the actor did more steps than planned: nothing fresh enough would ever come
            await draft.full.wait()
            unfit = self._unfit(draft)
            if not unfit:
                return
            self._generation.replay(draft, unfit)

    def _unfit(self, draft: Draft) -> list[int]:
        """Places of rollouts that may not be trained on now."""
        unproven, stale = draft.unproven(self._fleet.trusts), draft.stale(self._step, self._plan.staleness)
        return sorted({*unproven, *stale})

    def _hand_over(self, draft: Draft) -> dict[str, Any] | None:
        """What the actor gets; None where something in it was distrusted at the last moment.

        The invariant of this room stands here: nothing reaches the actor but turns of weights that were proven, none
        of them older than the bound.
        """
        if self._unfit(draft):
            return None
        self._generation.close(draft)
        try:
            scores = (one.score for one in draft.scored)
            check_unscored(scores, self._config.rewards.max_unscored, f"step {self._step + 1}")
        except UnscoredLimitError:
            self._run.append("rollouts.jsonl", draft.records(self._step, self._plan.passes))  # to be looked at
            raise
        return draft.batch(self._step, self._end_id)._asdict()

    async def _write_down(self, draft: Draft, waited: float) -> None:
        """The rollouts of a batch, in pieces between which others go on.

        They are cut off again where their step never gets into a checkpoint.
        """
        records = draft.records(self._step, self._plan.passes)
        for start in range(0, len(records), _PIECE):
            self._run.append("rollouts.jsonl", records[start : start + _PIECE])
            await asyncio.sleep(0)
        behind = draft.staleness(self._step) or [0]
        self.events.add(
            ORCHESTRATOR,
            "batch",
            batch=draft.index,
            step=self._step,
            waited=round(waited, 3),
            staleness={"mean": sum(behind) / len(behind), "max": max(behind)},
        )
        masked = sum(one.score.masked for one in draft.scored) / len(records)
        self._masked.note(masked, self._step + 1)

    def _write_metrics(self, report: StepReport) -> None:
        elapsed = round(self.events.now() - self._began, 3)
        records = [dict(one) for one in report.records] or [{"step": report.step, **report.metrics}]
        rows = [{"step": one.pop("step"), "time": elapsed, **one} for one in records]
        rows[-1] |= self._figures()
        self._run.append("metrics.jsonl", [plain(row) for row in rows])
        for row in rows:
            say_step(row, row["step"], self._max_steps)

    def _figures(self) -> dict[str, float]:
        """Idle shares and throughput by role since the last batch, and how long the sync took."""
        now = self.events.now()
        seconds = max(now - self._last_step, 1e-9)
        shares = self.events.idle_shares()
        slots = self._fleet.slots
        figures = {f"idle/{role}": round(share, 4) for role, share in shares.items()}
        figures["idle/workers"] = round(sum(shares[slot.name] for slot in slots) / len(slots), 4)
        figures |= {f"tokens_per_second/{slot.name}": round(slot.take_tokens() / seconds, 1) for slot in slots}
        figures["sync/seconds"] = max(self._fleet.sync_seconds.values(), default=0.0)
        self._fleet.sync_seconds.clear()
        return figures

    # weights ----------------------------------------------------------------------------------------------------------
    def _oldest_weights(self, batch: int) -> int:
        """Optimizer steps that weights must have seen for a turn to be fresh enough when its batch is trained on."""
        return self._step + (batch - self._consumed) * self._plan.steps - self._plan.staleness

    def _needs_sync(self) -> bool:
        if self._is_over or self._fleet.step is None:
            return False
        return self._step - self._fleet.step >= self._plan.sync_every or self._fleet.step < self._oldest_weights(
            self._consumed
        )

    async def _sync(self) -> None:
        """Have the weights written; the workers load and prove them while training goes on."""
        self._fleet.announce()
        known = partial(self._fleet.known, step=self._step)
        await self._actor.publish(sorted(self._fleet.methods), known, self._fleet.set_targets)

    async def _publish_for_one(self, method: Method) -> None:
        """The weights in one more way, for a worker that could not prove them in the way it had them."""
        await self._actor.publish([method], self._fleet.known, self._fleet.add_targets)

    # ends -------------------------------------------------------------------------------------------------------------
    @property
    def _is_over(self) -> bool:
        return self._step >= self._max_steps

    def _is_asked_to_stop(self) -> bool:
        now = self.events.now()
        seconds, self._last_step = now - self._last_step, now
        return self._stop.requested(seconds)

    async def _save(self) -> None:
        folder = await self._actor.save_checkpoint(self._run.log_sizes())
        self.events.add(ACTOR, "checkpoint", step=self._step, consumed=self._consumed, folder=folder)


def sampling_of(config: Config, chat: Chat) -> Sampling:
    """How a config wants turns sampled."""
    ours = config.sampling
    ends = tuple(sorted(chat.end_ids))
    return Sampling(ours.completion_limit, ours.temperature, ours.top_p, ours.top_k, ends)
