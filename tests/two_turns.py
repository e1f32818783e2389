"""A task for tests of trainers: two turns, a reward for the letters of the last one, and rows that break the scorer."""

from __future__ import annotations

from collections.abc import Sequence

from lib.task import Message, Rollout, Row, Score, Split, Task


class TwoTurns(Task):
    count: int = 16
    """Rows of each split; of every fourth the scorer breaks."""
    max_turns: int = 2

    def rows(self, split: Split) -> Sequence[Row]:
        return [
            {
                "id": f"{split}-{number}",
                "prompt": [{"role": "user", "content": f"hour {number:02d} storage 5 demand 2"}],
                "demonstration": [{"role": "assistant", "content": "so [3]"}],
                "breaks": number % 4 == 1,
            }
            for number in range(self.count)
        ]

    async def reply(self, rollout: Rollout) -> list[Message]:
        return [] if len(rollout.turns) > 1 else [{"role": "user", "content": "again demand 2"}]

    async def score(self, rollout: Rollout) -> Score:
        if rollout.row["breaks"]:
            raise RuntimeError("the scorer broke")
        return Score(reward=min(1.0, len(set(rollout.text)) / 40), parts={"turns": float(len(rollout.turns))})
