"""Our agent loop on an engine that breaks, in verl's environment.

    build/verl/bin/python tests/verl_loop_program.py ORDER.json ROW.json TOKENIZER

The engine answers the first session, and no other one. Prints a line of JSON: for each of two rollouts its prompt,
response and mask, and what verl is told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib.verl.agent_loop import WorkbenchLoop, _chat
from lib.verl.reward import open_desk


class Engine:
    """In the place of verl's server manager."""

    def __init__(self, answer: list[int]) -> None:
        self._answer, self._asked = answer, 0

    async def generate(self, **_: Any) -> Any:
        self._asked += 1
        if self._asked > 1:
            raise ConnectionError("the engine is gone")
        return SimpleNamespace(token_ids=self._answer, log_probs=[-0.5] * len(self._answer), extra_fields={})


async def main(order: str, row: Path, tokenizer: str) -> list[dict[str, Any]]:
    loop = WorkbenchLoop.__new__(WorkbenchLoop)
    loop._desk = open_desk(order)
    loop.rollout_config = SimpleNamespace(prompt_length=512, response_length=64)
    loop.chat, loop.turn_limit = _chat(loop._desk.order.run, tokenizer, 576)
    loop.server_manager, loop.loop = Engine([5, 6, min(loop.chat.end_ids)]), asyncio.get_running_loop()
    found = []
    for _ in range(2):
        told = {"reward_model": {"ground_truth": row.read_text(encoding="utf-8")}, "extra_info": {"split": "train"}}
        output = await loop.run({}, **told)
        extra = output.extra_fields["reward_extra_info"]
        found.append({"ids": output.response_ids, "mask": output.response_mask, "score": output.reward_score} | extra)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))))
