"""One rollout on one worker: the Generate that asks it, and what came of it.

Owns the way from messages to a worker's tokens and back. Must not know batches, queues or other workers.

    python -c "from lib.orchestrator.play import seed_of; print(seed_of(0, 3, 17, 0))"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from lib.generate import Chat
from lib.orchestrator.draft import Played
from lib.orchestrator.life import Life, LostError, Stamp
from lib.patience import Patience
from lib.roles import Sampling
from lib.rollout import OutOfRoomError, Request, attempt
from lib.task import Message, Row, Task, Turn


class Play:
    """Plays a row with the turns of one worker."""

    def __init__(self, life: Life, chat: Chat, sampling: Sampling, seed: Callable[[int], int]):
        """`seed`: of the turn with this number."""
        self._life, self._chat, self._sampling = life, chat, sampling
        self._seed = seed
        self._stamps: list[Stamp] = []
        self._previous: Turn | None = None
        self._said_at = 0
        self._broken: Exception | None = None

    async def run(self, task: Task, row: Row, played_out: Callable[[], None], patience: Patience) -> Played:
        """The scored rollout. Raises LostError where the worker was lost with it, and what broke on our side."""
        scored = await attempt(task, row, self._generate, played_out, patience)
        # To `attempt`, what its Generate raises is a broken world: unscored. A lost worker is another matter.
        if self._broken:
            raise self._broken
        return Played(scored, tuple(self._stamps))

    async def _generate(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        try:
            return await self._turn(messages, tools)
        except OutOfRoomError:
            raise  # the conversation is full: the rollout ends with the turn before
        except Exception as error:  # kept for `run`, which raises it
            self._broken = error
            raise

    async def _turn(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        prompt = self._chat.continued_ids(Request(messages, tools, self._previous, self._said_at))
        sampling = self._sampling._replace(max_tokens=self._room(prompt), seed=self._seed(len(self._stamps)))
        sampled, stamp = await self._life.turn(prompt, sampling)
        self._stamps.append(stamp)
        turn = self._chat.turn(prompt, sampled.output_ids, sampled.logprobs)
        self._previous, self._said_at = turn.model_copy(update={"policy": stamp.version}), len(messages)
        return self._previous

    def _room(self, prompt: Sequence[int]) -> int:
        room = min(self._sampling.max_tokens, self._chat.room(prompt), self._life.max_length - len(prompt))
        if room < 1:
            raise OutOfRoomError
        return room


def seed_of(seed: int, batch: int, position: int, turn: int) -> int:
    """A turn's own seed, 31 bits: the same when it is sampled again, on whichever worker.

    So a resumed run draws what it drew before, and a worker that is lost with long answers does not make them rarer.
    """
    digest = hashlib.blake2b(f"{seed} {batch} {position} {turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


__all__ = ["LostError", "Play", "seed_of"]
