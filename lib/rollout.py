"""The only rollout loop: a task, a row and a Generate make a Rollout and its Score.

Owns turns, concurrency, lockstep batching, and rollouts as token rows with masks. Must not know task names or trainers.

    python -c "import asyncio; from lib.rollout import run_rollout; help(run_rollout)"
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple, TypeVar

from lib import WorkbenchError
from lib.log import scrub
from lib.patience import Patience
from lib.task import Generate, Message, Rollout, Row, Score, Task, Turn

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ENDING = 30.0
"""Seconds that interrupted work gets to end."""


class UnscoredLimitError(WorkbenchError, RuntimeError):
    """Too many rollouts could not be judged: their rewards say nothing about the policy."""


class OutOfRoomError(WorkbenchError, RuntimeError):
    """A Generate raises it where the conversation has no room for another turn: the rollout ends there, as cut off."""

    def __init__(self) -> None:
        super().__init__("the conversation is as long as it may be, and the policy has said nothing yet")


class Scored(NamedTuple):
    rollout: Rollout
    score: Score


class Request(NamedTuple):
    """One turn that a policy has to supply."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None
    previous: Turn | None
    """The policy's turn before this one: its ids are kept, only the messages after it are rendered."""
    said_at: int
    """Where that turn's message stands in `messages`; 0 where there is none."""


class TokenRow(NamedTuple):
    """A rollout as one token sequence. `mask` is 1 on sampled tokens, 0 on the world's."""

    prompt_ids: list[int]
    output_ids: list[int]
    mask: list[int]
    logprobs: list[float] | None


BatchGenerate = Callable[[list[Request]], Sequence[Turn | None]]
"""One turn for each request; None where the conversation has no room for another one."""


async def run_rollout(task: Task, row: Row, generate: Generate) -> Rollout:
    """Play one row to its end: the policy's turns from `generate`, the world's from `task.reply`."""
    rollout = Rollout(row=row, messages=tuple(row["prompt"]), turns=())
    async for played in _play(task, rollout, generate, Patience()):
        rollout = played
    return rollout


async def attempt(
    task: Task,
    row: Row,
    generate: Generate,
    played_out: Callable[[], None] | None = None,
    patience: Patience | None = None,
) -> Scored:
    """Play and score one row. What breaks on the way, or takes too long, makes it unscored (reward None), never zero.

    `played_out` is called when the policy has no more turns to supply, before the scoring. `patience` is that of the
    batch; None = this row is one by itself.
    """
    rollout, patience = Rollout(row=row, messages=tuple(row["prompt"]), turns=()), patience or Patience()
    try:
        async for played in _play(task, rollout, generate, patience):
            rollout = played
        if played_out:
            played_out()
        score = await patience.score.limit(task.score(rollout))
        _check_score(task, score)
    # The one boundary: a broken world or scorer is not the policy's fault, not even one that calls exit().
    except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        this = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and this is not None and this.cancelling():
            raise  # we are the ones who are cancelled, not something that the scorer waited for
        logger.debug("row %s unscored", row.get("id"), exc_info=True)
        score = Score(reward=None, notes={"error": scrub(f"{type(error).__name__}: {error}")})
    return Scored(rollout, score)


def collect(task: Task, rows: Sequence[Row], generate: BatchGenerate, patience: Patience | None = None) -> list[Scored]:
    """Play and score rows in lockstep: `generate` runs in the calling thread whenever every live rollout waits for it.

    One batch in row order, so timing never changes a result. Scoring overlaps with later turns. Results in row order.
    """
    lockstep = _Lockstep(patience or Patience())
    done = submit(lockstep.play_all(task, rows))
    try:
        while (batch := lockstep.batches.get()) is not None:
            lockstep.deliver(generate(batch))
    except BaseException:
        done.cancel()
        raise
    return done.result()


def play_each(
    task: Task, rows: Iterable[Row], generate: Generate, at_once: int, patience: Patience | None = None
) -> Generator[tuple[int, Scored], None, None]:
    """Play and score rows side by side, each at its own pace, `at_once` at a time: (index, result) as each one ends.

    Closing the iterator cancels what is still going on.
    """
    ended: queue.SimpleQueue[tuple[int, Scored] | None] = queue.SimpleQueue()
    done = submit(_play_side_by_side(task, rows, generate, at_once, patience or Patience(), ended))
    try:
        while (one := ended.get()) is not None:
            yield one
        done.result()
    finally:
        done.cancel()


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the process's one background loop."""
    return asyncio.run_coroutine_threadsafe(work, background_loop())


def finish(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives that runs on the background loop. Whoever interrupts the wait ends the work as well.

    An interrupted work gets some time to end what it has started: containers, a deployed app. A second interrupt does
    not wait for that.
    """
    ended = threading.Event()

    async def whole() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = submit(whole())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        ended.wait(_ENDING)
        raise


@cache
def background_loop() -> asyncio.AbstractEventLoop:
    """The loop that all async task code of this process shares (a client reused on a second loop fails)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rollouts", daemon=True).start()
    return loop


REMEDY = "Mend the judge, the sandbox or the scorer and run again; raising the limit trains on what is left."


def is_unscored(score: Score) -> bool:
    """Whether it could not be judged; a masked one is left out by the task's own rule."""
    return score.reward is None and not score.masked


def check_unscored(
    scores: Iterable[Score], limit: float, where: str, answers: int | None = None, remedy: str = REMEDY
) -> None:
    """Raise UnscoredLimitError, with the reasons counted, where more than `limit` (a share) is unscored.

    `answers`: how many there are in all, where `scores` are but some of them.
    """
    scores = list(scores)
    answers = len(scores) if answers is None else answers
    unscored = [score for score in scores if is_unscored(score)]
    if len(unscored) <= limit * answers:
        return
    reasons = Counter(str(score.notes.get("error", "no reason given")) for score in unscored)
    shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
    raise UnscoredLimitError(
        f"{where}: {len(unscored)} of {answers} rollouts could not be judged, more than rewards.max_unscored = "
        f"{limit:g} allows. Reasons: {shown}. {remedy}"
    )


def to_tokens(rollout: Rollout) -> TokenRow:
    """All turns as one sequence: the ids exactly as sampled, the world's tokens between them masked out.

    Raises ValueError where a later prompt does not continue the earlier one (a chat template that rewrites history).
    """
    first = rollout.turns[0]
    prompt = list(first.prompt_ids or ())
    output: list[int] = []
    mask: list[int] = []
    logprobs: list[float] | None = []
    for turn in rollout.turns:
        if turn.prompt_ids is None or turn.output_ids is None:
            raise ValueError(f"row {rollout.row['id']}: a turn without token ids cannot be trained on")
        if turn.logprobs is not None and len(turn.logprobs) != len(turn.output_ids):
            raise ValueError(
                f"row {rollout.row['id']}: {len(turn.logprobs)} log-probabilities for {len(turn.output_ids)} tokens"
            )
        known = prompt + output
        if list(turn.prompt_ids[: len(known)]) != known:
            raise ValueError(
                f"row {rollout.row['id']}: the chat template rewrites earlier turns, so the tokens trained on would "
                f"not be those sampled. Use a template whose longer conversations begin with the shorter ones."
            )
        world = list(turn.prompt_ids[len(known) :])
        output += [*world, *turn.output_ids]
        mask += [0] * len(world) + [1] * len(turn.output_ids)
        if logprobs is not None:
            logprobs = None if turn.logprobs is None else [*logprobs, *[0.0] * len(world), *turn.logprobs]
    return TokenRow(prompt, output, mask, logprobs)


async def _play_side_by_side(
    task: Task,
    rows: Iterable[Row],
    generate: Generate,
    at_once: int,
    patience: Patience,
    ended: queue.SimpleQueue[tuple[int, Scored] | None],
) -> None:
    waiting = enumerate(rows)

    async def play_next() -> None:
        for index, row in waiting:
            ended.put((index, await attempt(task, row, generate, patience=patience)))

    try:
        await asyncio.gather(*(play_next() for _ in range(at_once)))
    finally:
        ended.put(None)


async def _play(task: Task, rollout: Rollout, generate: Generate, patience: Patience) -> AsyncIterator[Rollout]:
    """The rollout after each turn; the last one carries why it stopped, and ends with the policy's word."""
    asked = rollout
    while True:
        try:
            turn = await generate(asked.messages, asked.row.get("tools"))
        except OutOfRoomError:
            if not rollout.turns:
                raise
            yield rollout.model_copy(update={"stop": "length"})  # without the world's words that had no room
            return
        rollout = asked.model_copy(update={"messages": (*asked.messages, turn.message), "turns": (*asked.turns, turn)})
        if turn.stop == "length":
            yield rollout.model_copy(update={"stop": "length"})
            return
        yield rollout  # before the world answers: where that breaks, the sampled turn is kept
        # One world that is stuck would hold up all rollouts in lockstep with it.
        replies = await patience.world.limit(task.reply(rollout))
        if not replies:
            return
        if len(rollout.turns) >= task.max_turns:
            yield rollout.model_copy(update={"stop": "max_turns"})
            return
        asked = rollout.model_copy(update={"messages": (*rollout.messages, *replies)})


def _check_score(task: Task, score: Score) -> None:
    json.dumps([score.parts, score.notes], allow_nan=False)  # a NaN part would end the run where it is written down
    if score.reward is None:
        return
    low, high = task.reward_range
    if not math.isfinite(score.reward) or not low - 1e-9 <= score.reward <= high + 1e-9:
        raise ValueError(f"reward {score.reward} outside the task's reward_range {low:g} to {high:g}")


class _Lockstep:
    """Collects the requests of all live rollouts; hands over a batch once every one of them waits."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.batches: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[Request, asyncio.Future[Turn | None]]] = {}
        self._handed: list[asyncio.Future[Turn | None]] = []
        self._live: set[int] = set()

    async def play_all(self, task: Task, rows: Sequence[Row]) -> list[Scored]:
        self._live = set(range(len(rows)))
        try:
            return list(await asyncio.gather(*(self._play_one(task, index, row) for index, row in enumerate(rows))))
        finally:
            self.batches.put(None)

    def deliver(self, turns: Sequence[Turn | None]) -> None:
        """Called from the generating thread: wakes the rollouts of the last batch."""
        futures, self._handed = self._handed, []
        if len(turns) != len(futures):
            raise ValueError(f"the policy returned {len(turns)} turns to {len(futures)} requests")
        background_loop().call_soon_threadsafe(_resolve, futures, turns)

    async def _play_one(self, task: Task, index: int, row: Row) -> Scored:
        previous: Turn | None = None
        said_at = 0

        async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
            nonlocal previous, said_at
            future: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
            self._waiting[index] = (Request(messages, tools, previous, said_at), future)
            self._hand_over()
            turn = await future
            if turn is None:
                raise OutOfRoomError
            previous, said_at = turn, len(messages)
            return turn

        try:
            return await attempt(task, row, generate, lambda: self._leave(index), self._patience)
        finally:
            self._leave(index)

    def _leave(self, index: int) -> None:
        if index in self._live:
            self._live.discard(index)
            self._hand_over()

    def _hand_over(self) -> None:
        if self._live and len(self._waiting) == len(self._live):
            order = sorted(self._waiting)
            requests = [self._waiting[index][0] for index in order]
            self._handed = [self._waiting[index][1] for index in order]
            self._waiting.clear()
            self.batches.put(requests)


def _resolve(futures: list[asyncio.Future[Turn | None]], turns: Sequence[Turn | None]) -> None:
    for future, turn in zip(futures, turns, strict=True):
        if not future.done():
            future.set_result(turn)
