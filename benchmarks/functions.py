"""How fast function calls are graded, without a model, on one core; and whether memory stays flat.

Checks: the verdict on decoded calls, as the official checker takes them. Scores: the whole way from an answer's text to
a Score (parse, verdict, grades, notes). Both over right and wrong answers of all rows in turn. Rollouts: played and
scored as in an evaluation. Bars: 5,000 checks a second; less than 1 MiB more memory after 10,000 rollouts.

    PYTHONPATH=. .venv/bin/python benchmarks/functions.py
    PYTHONPATH=. .venv/bin/python benchmarks/functions.py --path ../shared/data/bfcl
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import cycle, islice

from lib.generate import scripted
from lib.rollout import attempt
from lib.task import Rollout, Row, Task, load_task
from lib.tasks._functions_check import check
from lib.tasks._functions_parse import parse
from lib.tasks._functions_rows import needs_answers

CHECKS_BAR, MEMORY_BAR = 5_000, 2**20
ROLLOUTS, REPEATS = 10_000, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", default="configs/examples/functions.jsonl", help="a table, or the benchmark's folder")
    options = parser.parse_args()
    task = load_task("functions", path=options.path, split_ratio=1.0)
    rows = list(task.rows("train"))
    answered = [(row, text) for row in rows if needs_answers(row["category"]) for text in answers(task, row)]
    checks = rate(lambda: check_all(answered), len(answered))
    scores = rate(lambda: score_all(task, answered), len(answered))
    grown = growth(task, rows)
    print(f"{len(rows)} rows, {len(answered)} answers ({options.path}), the median of {REPEATS} rounds on one core")
    print(f"checks   {checks:>9,.0f} /s   bar {CHECKS_BAR:,}")
    print(f"scores   {scores:>9,.0f} /s   from an answer's text to its Score")
    print(f"memory   {grown / 1024:>+9,.0f} KiB after {ROLLOUTS:,} rollouts   bar {MEMORY_BAR // 1024:,}")
    passed = checks >= CHECKS_BAR and grown < MEMORY_BAR
    print(f"verdict: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


def answers(task: Task, row: Row) -> list[str]:
    """The gold answer, where the row can be won, and the task's own cheats: calls that are nearly right."""
    gold = [str(row["gold"][0]["content"])] if row.get("gold") else []
    return gold + list(task.cheats(row).values())


def check_all(answered: Sequence[tuple[Row, str]]) -> float:
    """Seconds of the verdicts alone: the answers are decoded before the clock starts."""
    cases = [(row, parse({"content": text}).calls or []) for row, text in answered]
    started = time.perf_counter()
    for row, calls in cases:
        check(row["function"], calls, row["ground_truth"], row["category"], underscores=True)
    return time.perf_counter() - started


def score_all(task: Task, answered: Sequence[tuple[Row, str]]) -> float:
    rollouts = [Rollout.of(row, text) for row, text in answered]

    async def score() -> float:
        started = time.perf_counter()
        for rollout in rollouts:
            await task.score(rollout)
        return time.perf_counter() - started

    return asyncio.run(score())


def rate(measure: Callable[[], float], count: int) -> float:
    """Answers a second: at least 2,000 in each round, so that small tables say something too."""
    rounds = max(1, 2_000 // count)
    return statistics.median(rounds * count / sum(measure() for _ in range(rounds)) for _ in range(REPEATS))


def growth(task: Task, rows: Sequence[Row]) -> int:
    """Bytes that Python holds more after the rollouts than before, a warm-up apart."""

    async def play(count: int) -> None:
        for row in islice(cycle(rows), count):
            await attempt(task, row, scripted(str(row.get("gold", [{"content": "no"}])[0]["content"])))

    asyncio.run(play(len(rows)))
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    asyncio.run(play(ROLLOUTS))
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


if __name__ == "__main__":
    sys.exit(main())
