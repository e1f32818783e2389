"""What does sampling the next batch while the actor trains gain? Real vLLM workers and a real actor on this machine.

A training of `decisions` on the starter policy: orchestrator here, actor and one rollout worker in processes of their
own, weights synced and proven after every step. `distributed.overlap` is 0 and 1 by turns, a few steps each, so that a
pair is measured in the same processes within a minute; the first step after a turn is not counted. Throughput =
rollouts trained on per second. Bar: 1.10, the median of the pairs.

    quick    the reward is arithmetic: only what one of the processes leaves idle can be gained
    scored   a score is a while in coming (lognormal, median --latency, sigma 0.5), as from a judge or a remote sandbox

Every process has its share of the cores, as users have it: actor and worker one each on two, whatever the overlap.
`--threads 2` gives both of them both, which is more than there is once they work side by side.

Exit status 0 = the bar is met in every scenario. `load` = processes that wanted to run, on average: beside ours, 0.

    PYTHONPATH=. .venv/bin/python benchmarks/overlap.py --out overlap.json             # about 8 minutes
    PYTHONPATH=. .venv/bin/python benchmarks/overlap.py --only quick --pairs 2
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lib.backends import distributed
from lib.config import load_config
from lib.orchestrator.training import Training
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


class Never:
    def requested(self, step_seconds: float) -> bool:
        return False


class Turn(NamedTuple):
    """Some steps with the same overlap."""

    rate: float
    """Rollouts a second."""
    actor: float
    worker: float
    """Shares of the time in which they had something to do."""


@contextmanager
def by_turns(steps: int) -> Iterator[None]:
    """Overlap 0 and 1, so many batches each."""
    open_batches = Training._open_batches

    def turn(training: Training) -> None:
        overlap = training._consumed // steps % 2
        training._plan = training._plan._replace(overlap=overlap)
        open_batches(training)

    with mock.patch.object(Training, "_open_batches", turn):
        yield


def train(options: argparse.Namespace, folder: Path, name: str, seconds: float) -> Run:
    """One warm-up turn of both, then the pairs."""
    steps = 2 * options.steps * (options.pairs + 1)
    settings = {
        "backend": "distributed",
        "paths.outputs": str(folder),
        "paths.cache": str(folder / "cache"),
        "training.steps": steps,
        "training.save_steps": steps,
        "training.batch": options.batch,
        "sampling.vllm.max_length": 128,
        "distributed.workers": 1,
        "distributed.in_flight": options.batch,
        "distributed.overlap": 1,
    }
    config = load_config(options.config, settings)
    run = open_run(name, config)
    prepare(load_task(config.task.name, **config.task.params), run)
    hosts = Processes(config, run)
    hosts._threads = options.threads or hosts._threads
    task = Scored(**config.task.params, seconds=seconds)
    with by_turns(options.steps):
        distributed.train(config, task, run.read_rows("train"), run, Never(), hosts)
    return run


def turns(metrics: Sequence[Mapping[str, Any]], batch: int, steps: int) -> list[Turn]:
    """By turns, overlap 0 first; without the first step of each."""
    found = []
    for start in range(0, len(metrics), steps):
        own = metrics[start : start + steps]
        seconds = own[-1]["time"] - own[0]["time"]
        busy = [1 - statistics.mean(m[f"idle/{role}"] for m in own[1:]) for role in ("actor", "workers")]
        found.append(Turn(batch * (len(own) - 1) / seconds, *busy))
    return found


def scenario(options: argparse.Namespace, folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Print and return the figures of one scenario."""
    run = train(options, folder, name, seconds)
    all_turns = turns(run.metrics(), options.batch, options.steps)[2:]
    pairs = list(zip(all_turns[::2], all_turns[1::2], strict=True))
    for zero, one in pairs:
        print(f"  {name}: {told(zero)} | {told(one)} | {one.rate / zero.rate:.2f}")
    ratios = [one.rate / zero.rate for zero, one in pairs]
    ratio, load = statistics.median(ratios), os.getloadavg()[1]
    print(f"{name}: overlap 1 / overlap 0 = {ratio:.2f}, spread {min(ratios):.2f} to {max(ratios):.2f}, {len(pairs)} "
          f"pairs; load {load:.1f}; bar {BAR:.2f}: {'PASS' if ratio >= BAR else 'FAIL'}", flush=True)  # fmt: skip
    return {"ratio": ratio, "load": load, "pairs": [[turn._asdict() for turn in pair] for pair in pairs]}


def told(turn: Turn) -> str:
    return f"{turn.rate:6.1f} rollouts/s, busy: actor {turn.actor:.0%}, worker {turn.worker:.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/decisions.yaml")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="of a turn; the first one is not counted")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.3, help="median seconds of a score, where it takes its time")
    parser.add_argument("--threads", type=int, help="of every process; default: its share of the cores")
    parser.add_argument("--only", choices=("quick", "scored"))
    parser.add_argument("--out", help="also write the figures to this JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results = {}
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        for name, seconds in (("quick", 0.0), ("scored", options.latency)):
            if options.only in (None, name):
                results[name] = scenario(options, Path(folder), name, seconds)
    if options.out:
        Path(options.out).write_text(json.dumps(vars(options) | results, indent=1))
    return 0 if all(result["ratio"] >= BAR for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
