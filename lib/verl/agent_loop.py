"""verl's agent loop over the workbench's own rollout loop: turns, tools, worlds and scores as everywhere else.

Owns the way from verl's engine to a Generate, and from a scored rollout to what verl trains on. It runs in verl's
environment, in its rollout processes. Must not know task names.

    python -m lib.verl.program --help
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from lib.generate import Chat, unloaded_chat
from lib.rollout import OutOfRoomError, Request, Scored, TokenRow, to_tokens
from lib.runfolder import read_run
from lib.task import Message, Row, Turn
from lib.verl.record import SCORED, scored_as_json
from lib.verl.reward import open_desk


class WorkbenchLoop(AgentLoopBase):  # type: ignore[misc]
    """Plays one row to its end and scores it."""

    def __init__(self, *args: Any, order: str, **kwargs: Any) -> None:
        """`order`: the path of the reward's order."""
        super().__init__(*args, **kwargs)
        self._desk = open_desk(order)
        room = self.rollout_config.prompt_length + self.rollout_config.response_length
        run, model = self._desk.order.run, self.config.actor_rollout_ref.model.path
        self.chat, self.turn_limit = _chat(run, model, room)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """One rollout of the row in `reward_model.ground_truth`, with its reward; unscored ones are masked out.

        An engine that does not answer makes it unscored as well: verl would leave out the whole group for one raised.
        """
        row: Row = json.loads(kwargs["reward_model"]["ground_truth"])
        policy = _Policy(self, sampling_params, priority, int(kwargs.get("global_steps", 1)))
        scored = await self._desk.attempt(row, policy)
        split = str((kwargs.get("extra_info") or {}).get("split", ""))
        return self._output(scored, self._desk.told(scored.score, split, str(row["id"])), policy)

    def _output(self, scored: Scored, told: Mapping[str, Any], policy: _Policy) -> AgentLoopOutput:
        tokens = to_tokens(scored.rollout) if scored.rollout.turns else policy.unanswered()
        length = self.rollout_config.response_length
        mask = tokens.mask if told["scored"] else [0] * len(tokens.mask)
        left = {"reward_extra_info": dict(told), SCORED: scored_as_json(scored)}
        return AgentLoopOutput(
            prompt_ids=tokens.prompt_ids,
            response_ids=tokens.output_ids[:length],
            response_mask=mask[:length],
            response_logprobs=tokens.logprobs[:length] if tokens.logprobs else None,
            reward_score=told["score"],
            num_turns=len(scored.rollout.messages),
            metrics=AgentLoopMetrics(num_preempted=-1),
            extra_fields={**policy.extra, **left, "turn_scores": [], "tool_rewards": []},
        )


@lru_cache(maxsize=2)
def _chat(folder: str, model: str, room: int) -> tuple[Chat, int]:
    """The run's chat, as every backend renders and parses it, and the tokens that one turn may have."""
    config = read_run(folder).config
    chat = unloaded_chat(config, model)
    chat.token_limit = min(room, chat.token_limit or room)
    return chat, config.sampling.completion_limit


class _Policy:
    """A Generate: asks verl's engine for one turn after the other, on the loop that verl runs on."""

    def __init__(self, loop: WorkbenchLoop, sampling: Mapping[str, Any], priority: int, step: int) -> None:
        """`step`: verl's, from 1."""
        self._loop, self._sampling, self._priority = loop, dict(sampling), int(priority)
        self._id = uuid4().hex  # one engine keeps the whole conversation's cache
        self._previous: Turn | None = None
        self._first: list[int] = []
        self._said_at = 0
        self.extra: dict[str, Any] = {"min_global_steps": step - 1, "max_global_steps": step - 1}
        """What verl's engine says of the weights that it sampled with; those of the step before, where it was never
        asked: verl counts with these numbers."""

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        loop = self._loop
        prompt = loop.chat.continued_ids(Request(messages, tools, self._previous, self._said_at))
        self._first = self._first or prompt
        answered = len(prompt) - len(self._first)
        room = min(loop.turn_limit, loop.chat.room(prompt), loop.rollout_config.response_length - answered)
        if room < 1 or len(self._first) > loop.rollout_config.prompt_length:
            raise OutOfRoomError
        sampled = await self._ask(prompt, room)
        self.extra |= sampled.extra_fields
        logprobs = list(sampled.log_probs) if sampled.log_probs else None
        self._previous, self._said_at = loop.chat.turn(prompt, list(sampled.token_ids), logprobs), len(messages)
        return self._previous

    async def _ask(self, prompt: list[int], most: int) -> Any:
        """verl's engine is asked on verl's loop: this runs on the workbench's."""
        asked = self._loop.server_manager.generate(
            request_id=self._id,
            prompt_ids=prompt,
            sampling_params=self._sampling | {"max_tokens": most},
            priority=self._priority,
        )
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self._loop.loop))

    def unanswered(self) -> TokenRow:
        """What stands for a rollout without a single turn: verl takes no empty row. One end token, left out."""
        end = min(self._loop.chat.end_ids)
        length = self._loop.rollout_config.prompt_length
        return TokenRow(prompt_ids=(self._first or [end])[-length:], output_ids=[end], mask=[0], logprobs=[0.0])
