"""How much time does the orchestrator cost? Simulated workers and actor, no model, real time.

A group's latency is its prompt's own (lognormal, sigma 0.5), whichever worker answers it and when, so that the same
work can be laid out on paper. A worker takes one group of 8 rollouts at a time.

Overhead: 512 groups of median 2 s on 64 workers, from the first turn to the training step, over the ideal greedy
schedule of the very same latencies. Bar: 2 %.

Throughput: 1 to 64 workers over and over on batches of eight groups a worker, overlap 1, with a sync and its proof
after every batch. Counted are the seconds of latency that were served, per second and worker, within a window in the
middle; one worker is the measure. Bar: 0.95 of linear.

Overlap: 16 workers, 64 groups a batch, training longer or shorter than sampling. What overlap 1 saves per batch, over
the shorter of the two as overlap 0 has them one after the other. Bar: 90 %.

Exit status 0 = every bar is met, else 1. On a machine that others use, read `others`.

    python benchmarks/orchestrator.py
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import Others, shown

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulated_roles import (
    SimulatedHosts,
    SimulatedTask,
    StopAfter,
    Timing,
    Witness,
    lognormal,
    make_config,
    training,
)

from lib.orchestrator import DataOrder
from lib.runfolder import Run

GROUP, SIGMA = 8, 0.5
OVERHEAD_BAR, LINEAR_BAR, HIDDEN_BAR = 0.02, 0.95, 0.90


class Call(NamedTuple):
    """One turn of one rollout."""

    worker: str
    start: float
    end: float
    latency: float
    """What it should have taken."""


class Watched(SimulatedHosts):
    """Simulated roles whose calls are timed."""

    calls: list[Call]
    steps: list[tuple[float, float]]

    async def start_actor(self) -> Any:
        self.calls, self.steps = [], []
        actor = await super().start_actor()
        train_step = actor.train_step

        async def timed(batch: dict[str, Any]) -> Any:
            start = time.monotonic()
            report = await train_step(batch)
            self.steps.append((start, time.monotonic()))
            return report

        actor.train_step = timed  # type: ignore[method-assign]
        return actor

    async def start_worker(self, name: str, model: str) -> Any:
        worker = await super().start_worker(name, model)
        generate = worker.generate

        async def timed(prompts: Sequence[Sequence[int]], sampling: Any) -> Any:
            start = time.monotonic()
            try:
                return await generate(prompts, sampling)
            finally:  # one that is cut off at the end has served until then
                self.calls.append(Call(name, start, time.monotonic(), worker.timing.turn(prompts[0])))

        worker.generate = timed  # type: ignore[method-assign]
        return worker


class StopAt(StopAfter):
    def __init__(self, moment: float) -> None:
        self.moment = moment

    def requested(self, step_seconds: float) -> bool:
        return time.monotonic() > self.moment


def run(workers: int, groups: int, overlap: int, steps: int, timing: Timing, stop: StopAfter | None = None) -> Watched:
    """One training on simulated roles."""
    config = make_config(
        training__batch=groups * GROUP,
        training__group_size=GROUP,
        training__save_steps=10**6,
        distributed__workers=workers,
        distributed__in_flight=GROUP,
        distributed__overlap=overlap,
    )
    rows = max(groups, 4096)
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        witness = Witness(bound=overlap)
        hosts = Watched(Run(Path(folder), config), witness, steps, timing)
        asyncio.run(training(Path(folder), config, hosts, SimulatedTask(seconds=0.0), rows, stop))
        if witness.violations:
            raise SystemExit(f"the orchestrator trained on what it must not: {witness.violations[:3]}")
    return hosts


def usual(median: float, train: float, seed: int) -> Timing:
    return Timing(
        lognormal(seed, median, SIGMA), train=train, publish=0.01, load=0.01, canary=0.005, start=0.0, save=0.0
    )


# overhead -------------------------------------------------------------------------------------------------------------
def greedy(latencies: Sequence[float], workers: int) -> float:
    """Seconds until the last of these jobs is done where whoever is free takes the next one."""
    free = [0.0] * workers
    for latency in latencies:
        heapq.heappush(free, heapq.heappop(free) + latency)
    return max(free)


def measure_overhead(seed: int, workers: int, groups: int) -> tuple[float, float, float]:
    """Seconds measured, seconds of the ideal schedule, processor seconds."""
    timing = usual(2.0, 0.0, seed)
    cpu = time.process_time()
    hosts = run(workers, groups, overlap=0, steps=1, timing=timing)
    cpu = time.process_time() - cpu
    taken = hosts.steps[0][0] - min(call.start for call in hosts.calls)
    rows = DataOrder(range(max(groups, 4096)), groups, seed=0).batch(0)
    by_row = [timing.turn(prompt_of(row)) for row in rows]
    assert sorted(by_row) == sorted(call.latency for call in hosts.calls)[::GROUP]
    return taken, greedy(by_row, workers), cpu


def prompt_of(row: int) -> list[int]:
    """The ids that a worker is asked for this row."""
    from simulated_roles import Letters, simulated_rows

    messages = simulated_rows(row + 1)[row]["prompt"]
    return list(Letters().apply_chat_template(messages, None, add_generation_prompt=True))


# throughput -----------------------------------------------------------------------------------------------------------
def measure_throughput(seed: int, workers: int, seconds: float) -> float:
    """Seconds of latency served, per second and worker, in a window in the middle."""
    warm = 8.0
    stop = StopAt(time.monotonic() + warm + seconds)
    hosts = run(workers, 8 * workers, overlap=1, steps=10**6, timing=usual(2.0, 0.05, seed), stop=stop)
    end = max(start for start, _ in hosts.steps)  # the last step: until then there was always something to do
    begin = min(call.start for call in hosts.calls) + warm
    served = 0.0
    for call in hosts.calls:
        inside = min(call.end, end) - max(call.start, begin)
        if inside > 0:
            served += inside * min(1.0, call.latency / (call.end - call.start))
    return served / GROUP / workers / (end - begin)


# overlap --------------------------------------------------------------------------------------------------------------
def measure_hidden(seed: int, train: float, steps: int) -> tuple[float, float, float]:
    """What overlap 1 saves per batch over the shorter of sampling and training; seconds of both."""
    spent = []
    for overlap in (0, 1):
        hosts = run(16, 64, overlap, steps, usual(0.25, train, seed))
        spent.append((hosts.steps[-1][1] - hosts.steps[0][1]) / (steps - 1))
    trained = statistics.mean(end - start for start, end in hosts.steps)
    sampled = spent[0] - trained
    return (spent[0] - spent[1]) / min(sampled, trained), sampled, trained


# report ---------------------------------------------------------------------------------------------------------------
def spread(values: Sequence[float], form: str) -> str:
    low, high = (format(edge(values), form) for edge in (min, max))
    return f"median {statistics.median(values):{form}}, spread {low} to {high}"


def report_overhead(rounds: int) -> bool:
    overheads = []
    for seed in range(rounds):
        load = Others()
        taken, ideal, cpu = measure_overhead(seed, 64, 512)
        overheads.append(taken / ideal - 1)
        each = 1e6 * cpu / 512 / GROUP
        print(f"  512 groups, 64 workers: {taken:6.3f} s, ideal {ideal:6.3f} s, {taken / ideal - 1:6.2%}, "
              f"{each:.0f} us of processor a rollout, others {shown(load.cores())}", flush=True)  # fmt: skip
    passed = statistics.median(overheads) <= OVERHEAD_BAR
    print(f"overhead at 64 workers: {spread(overheads, '.2%')}; bar {OVERHEAD_BAR:.0%}: {verdict(passed)}")
    return passed


def report_throughput(rounds: int, seconds: float) -> bool:
    shares: dict[int, list[float]] = {}
    for seed in range(rounds):
        load = Others()
        served = {workers: measure_throughput(seed, workers, seconds) for workers in (1, 4, 16, 64)}
        for workers, value in served.items():
            shares.setdefault(workers, []).append(value / served[1])
        told = ", ".join(f"{workers}: {value:.4f}" for workers, value in served.items())
        print(f"  served per worker-second: {told}; others {shown(load.cores())}", flush=True)
    for workers, values in shares.items():
        print(f"throughput at {workers:2} workers over linear: {spread(values, '.4f')}")
    passed = all(statistics.median(values) >= LINEAR_BAR for values in shares.values())
    print(f"throughput: bar {LINEAR_BAR}: {verdict(passed)}")
    return passed


def report_hidden(rounds: int) -> bool:
    passed = True
    for train in (1.0, 2.5):
        shares = []
        for seed in range(rounds):
            load = Others()
            hidden, sampled, trained = measure_hidden(seed, train, steps=7)
            shares.append(hidden)
            print(f"  sampling {sampled:.3f} s, training {trained:.3f} s a batch: {hidden:.1%} hidden, "
                  f"others {shown(load.cores())}", flush=True)  # fmt: skip
        enough = statistics.median(shares) >= HIDDEN_BAR
        print(
            f"overlap 1, training {train:g} s: {spread(shares, '.1%')} hidden; bar {HIDDEN_BAR:.0%}: {verdict(enough)}"
        )
        passed = passed and enough
    return passed


def verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="window of a throughput measurement")
    parser.add_argument("--only", choices=("overhead", "throughput", "overlap"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    passed = []
    if options.only in (None, "overhead"):
        passed.append(report_overhead(options.rounds))
    if options.only in (None, "throughput"):
        passed.append(report_throughput(options.rounds, options.seconds))
    if options.only in (None, "overlap"):
        passed.append(report_hidden(options.rounds))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
