"""What does sampling the next batch while the actor trains gain? Real vLLM workers and a real actor on this machine.

Trainings of `decisions` on the starter policy, one with `distributed.overlap: 0` and one with 1 by turns, all else
equal: orchestrator here, actor and workers in processes of their own, weights synced and proven after every step.
Throughput = rollouts trained on per second, from the end of one step near the beginning to the end of the last.

    quick    the reward is arithmetic: only what one of the processes leaves idle can be gained
    scored   a score is a while in coming (lognormal, median --latency, sigma 0.5), as from a judge or a remote sandbox

Every process has its share of the cores, as users have it: one worker and the actor one each on two cores, whatever the
overlap; without it one of them always waits. Bar: 1.10, the median of the pairs, for both. `wide` is overlap 0 with all
cores for whichever process has something to do: for comparison, as no setting asks for it.

Exit status 0 = every bar is met. On a machine that others use, read the load.

    PYTHONPATH=. .venv/bin/python benchmarks/overlap.py --out overlap.json             # about 15 minutes
    PYTHONPATH=. .venv/bin/python benchmarks/overlap.py --only quick --pairs 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lib.backends import distributed
from lib.config import load_config
from lib.prepare import prepare
from lib.processes import Processes
from lib.runfolder import Run, open_run
from lib.task import Rollout, Score, load_task
from lib.tasks.decisions import Decisions

BAR = 1.10
SIGMA = 0.5


class Scored(Decisions, frozen=True):
    """`decisions` with a score that is a while in coming; the same while whenever it is asked for."""

    seconds: float = 0.0

    async def score(self, rollout: Rollout) -> Score:
        latency = random.Random(f"{rollout.row['id']} {rollout.text}").lognormvariate(0.0, SIGMA)
        await asyncio.sleep(self.seconds * latency)
        return await super().score(rollout)


class AllCores(Processes):
    """Every process may use the whole machine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._threads = os.cpu_count()


class Never:
    def requested(self, step_seconds: float) -> bool:
        return False


class Measured(NamedTuple):
    rate: float
    """Rollouts a second."""
    step: float
    """Seconds."""
    actor: float
    worker: float
    """Shares of the time in which they had something to do."""
    load: float
    """Processes that wanted to run, the machine's average of the last minute."""


class Bench:
    """The trainings of one scenario."""

    def __init__(self, options: argparse.Namespace, folder: Path, name: str, seconds: float) -> None:
        self._options, self._folder, self._name, self._seconds = options, folder, name, seconds
        self._count = 0

    def train(self, overlap: int, hosts: type[Processes] = Processes) -> Measured:
        """One whole training; its figures after the first steps."""
        self._count += 1
        steps = self._options.warm + self._options.steps
        config = load_config(
            self._options.config,
            {
                "backend": "distributed",
                "paths.outputs": str(self._folder),
                "paths.cache": str(self._folder / "cache"),
                "training.steps": steps,
                "training.save_steps": steps,
                "training.batch": self._options.batch,
                "sampling.vllm.max_length": 128,
                "distributed.workers": 1,
                "distributed.in_flight": self._options.batch,
                "distributed.overlap": overlap,
            },
        )
        run = open_run(f"{self._name}-{self._count}", config)
        prepare(load_task(config.task.name, **config.task.params), run)
        task = Scored(**config.task.params, seconds=self._seconds)
        distributed.train(config, task, run.read_rows("train"), run, Never(), hosts(config, run))
        return figures(run, self._options.warm)


def figures(run: Run, warm: int) -> Measured:
    metrics = run.metrics()
    counted = metrics[warm:]
    step = (counted[-1]["time"] - metrics[warm - 1]["time"]) / len(counted)
    actor, worker = (1 - statistics.mean(m[f"idle/{role}"] for m in counted) for role in ("actor", "workers"))
    return Measured(run.config.training.batch / step, step, actor, worker, os.getloadavg()[0])


def scenario(bench: Bench, name: str, pairs: int, wide: bool) -> dict[str, Any]:
    """Print and return the figures of one scenario."""
    found: list[tuple[Measured, Measured]] = []
    for number in range(pairs):
        both = {overlap: bench.train(overlap) for overlap in ((0, 1) if number % 2 else (1, 0))}
        found.append((both[0], both[1]))
        print(f"  {name}: {told(both[0])} | {told(both[1])} | {both[1].rate / both[0].rate:.2f}", flush=True)
    ratios = [one.rate / zero.rate for zero, one in found]
    ratio = statistics.median(ratios)
    print(f"{name}: overlap 1 / overlap 0 = {ratio:.2f}, spread {min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs; "
          f"bar {BAR:.2f}: {'PASS' if ratio >= BAR else 'FAIL'}", flush=True)  # fmt: skip
    result: dict[str, Any] = {"ratio": ratio, "pairs": [[one._asdict() for one in pair] for pair in found]}
    if wide:
        alone = bench.train(0, AllCores)
        result["wide"] = alone._asdict()
        usual = statistics.median(pair[0].rate for pair in found)
        print(f"  {name}, wide: {told(alone)} | {alone.rate / usual:.2f} of overlap 0's median", flush=True)
    return result


def told(one: Measured) -> str:
    return (f"{one.rate:6.1f} rollouts/s, {one.step:.2f} s a step, busy: actor {one.actor:.0%}, worker "
            f"{one.worker:.0%} (load {one.load:.1f})")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/decisions.yaml")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=3, help="steps at the beginning that are not counted")
    parser.add_argument("--latency", type=float, default=0.3, help="median seconds of a score, where it takes its time")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--wide", action="store_true", help="also overlap 0 with all cores for every process, once")
    parser.add_argument("--only", choices=("quick", "scored"))
    parser.add_argument("--out", help="also write the figures to this JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results = {}
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        for name, seconds in (("quick", 0.0), ("scored", options.latency)):
            if options.only in (None, name):
                bench = Bench(options, Path(folder), name, seconds)
                results[name] = scenario(bench, name, options.pairs, options.wide)
    if options.out:
        Path(options.out).write_text(json.dumps(vars(options) | results, indent=1))
    return 0 if all(result["ratio"] >= BAR for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
