"""The room for tokens in a conversation: how many it may have, and sampling that does not go beyond them.

Owns where the limit of a whole conversation comes from. Must not know tasks, messages or templates.

    python -c "from lib.room import token_limit; help(token_limit)"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from lib.config import SamplingSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Ask = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts as ids, and how many tokens an answer may have -> answers as ids, end tokens included."""


def token_limit(sampling: SamplingSection, shape: PreTrainedConfig) -> int | None:
    """Tokens that a whole conversation may have, prompt and all turns: a rollout that gets there ends as cut off.

    sampling.vllm.max_length where vLLM samples and that is set, else the max_position_embeddings of the model (`shape`
    is its config); None = no limit, for a model that names none.
    """
    if sampling.engine == "vllm" and sampling.vllm.max_length:
        return sampling.vllm.max_length
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def within_room(
    ask: Ask, completion_limit: int, room: Callable[[Sequence[int]], int], ends: Collection[int]
) -> Callable[[list[list[int]]], tuple[list[list[int]], None]]:
    """Sampling with an engine that does not know how long a conversation may be: no token is computed beyond that.

    All answers in one go, where the longest prompt has room for a whole one; else up to where that one is full, and
    then on with those that have room left. `room`: tokens that may follow some; `ends`: the tokens that end an answer.
    """

    def sample(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
        outputs: list[list[int]] = [[] for _ in prompts]
        live, sampled = list(range(len(prompts))), 0
        while live:
            known = [prompts[i] + outputs[i] for i in live]
            most = min(completion_limit - sampled, *map(room, known))
            for i, more in zip(live, ask(known, most), strict=True):
                outputs[i] += more
            sampled += most
            going_on = [i for i in live if sampled < completion_limit and outputs[i][-1] not in ends]
            live = [i for i in going_on if room(prompts[i] + outputs[i])]
        return outputs, None

    return sample
