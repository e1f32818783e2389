"""What the Wordle environment costs without a model: turns a second on one core, and memory over many rollouts.

Games are played and scored through lib.rollout.attempt, as in training, by a player who guesses words of the dictionary
at random. Exit status 0 = at least 2,000 turns a second, and the memory that Python holds after the last quarter of the
rollouts is within 1 MB of what it was after the first.

    python benchmarks/wordle.py                   # 10,000 rollouts of the five-letter game
    python benchmarks/wordle.py --rollouts 2000 --length 3
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

from machine import Others, shown

from lib.rollout import attempt
from lib.task import Generate, Message, Turn, load_task
from lib.tasks.wordle import Wordle

TURNS_BAR, GROWTH_BAR = 2_000, 1_000_000
"""Turns a second; bytes."""


def player(words: Sequence[str], rng: random.Random) -> Generate:
    """Says a random word of the list at every turn."""

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        guess = f"<think>\nPerhaps.\n</think>\n<guess>[{rng.choice(words)}]</guess>"
        return Turn(message={"role": "assistant", "content": guess})

    return generate


async def play(task: Wordle, rollouts: int, seed: int) -> int:
    """Play and score games one after the other; the number of turns."""
    rows, generate = list(task.rows("train")), player(task._guessable, random.Random(seed))
    turns = 0
    for number in range(rollouts):
        rollout, score = await attempt(task, rows[number % len(rows)], generate)
        assert score.reward is not None, score.notes
        turns += len(rollout.turns)
    return turns


def speed(task: Wordle, rollouts: int) -> float:
    """Turns a second of this process's own CPU time."""
    asyncio.run(play(task, 50, seed=0))  # the word lists are read here
    load, started, wall = Others(), time.process_time(), time.perf_counter()
    turns = asyncio.run(play(task, rollouts, seed=1))
    spent, wall = time.process_time() - started, time.perf_counter() - wall
    print(f"{turns} turns in {spent:.2f} s of CPU time, {wall:.2f} s of wall time; others {shown(load.cores())}")
    return turns / spent


def growth(task: Wordle, rollouts: int) -> int:
    """Bytes by which Python's memory grew between the first and the last quarter of the rollouts."""
    tracemalloc.start()
    held = []
    for quarter in range(4):
        asyncio.run(play(task, rollouts // 4, seed=quarter))
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    print("held after each quarter, kB: " + ", ".join(f"{size / 1000:.0f}" for size in held))
    return held[-1] - held[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=5)
    options = parser.parse_args()
    task = load_task("wordle", length=options.length)
    assert isinstance(task, Wordle)
    rate = speed(task, max(200, options.rollouts // 5))
    grown = growth(task, options.rollouts)
    print(f"{rate:,.0f} turns/s (bar {TURNS_BAR:,}); memory {grown / 1000:+.0f} kB over {options.rollouts} rollouts")
    passed = rate >= TURNS_BAR and grown <= GROWTH_BAR
    print(f"verdict: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
