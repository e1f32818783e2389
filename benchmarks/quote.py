"""How far a quote is from the bill: runs replayed, quoted from their first steps.

Traces: the real step times in tests/data/step_times.json (and run folders of yours), and synthetic runs of seven kinds.
Of each, the first 3, 5, 10 and 20 steps are written down as a probe would have left them, the whole run
is quoted from that, and the quote compared with what the whole run takes. Then budgets: runs of random steps and
checkpoints, ended by `Budget.exhausted`, and by how many of its own last steps each went over its limit.

    python benchmarks/quote.py                        # half a minute
    python benchmarks/quote.py --runs outputs/mine    # a run of yours as well
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lib import PROJECT_ROOT
from lib.cost import Budget, Resources, begin_attempt, load_prices
from lib.quote import Quote, make_quote, read_trace

PROBES = (3, 5, 10, 20)
REAL = PROJECT_ROOT / "tests" / "data" / "step_times.json"
H100 = Resources(gpu="H100", cpu=4, memory_gb=32, where="modal")


class Replay(NamedTuple):
    """A run that is over."""

    name: str
    records: list[dict[str, float]]
    save_steps: int
    seconds: float
    """All that was billed, cold start and tail included."""
    cold: float = 0.0
    tail: float = 0.0
    interruptions_per_day: float = 0.0


def real_replays(path: Path = REAL) -> Iterator[Replay]:
    """The committed traces. Only the training is replayed: what came before and after was not metered."""
    for trace in json.loads(path.read_text())["traces"]:
        yield _plain(trace["name"], trace["time"], trace["step_time"], trace["save_steps"])


def run_replay(folder: Path) -> Replay:
    """A run folder of your own."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    save_steps = json.loads((folder / "config.json").read_text())["training"]["save_steps"]
    return _plain(folder.name, [r["time"] for r in records], [r["step_time"] for r in records], save_steps)


def _plain(name: str, time: Sequence[float], step_time: Sequence[float], save_steps: int) -> Replay:
    records = [{"step": i, "time": t, "step_time": s} for i, (t, s) in enumerate(zip(time, step_time, strict=True), 1)]
    return Replay(name, records, save_steps, time[-1])


def _noise(kind: str, i: int, n: int, total: float, chance: random.Random) -> float:
    if kind == "trend":
        return math.exp(total * min(i, n) / n)
    if kind == "curve":  # most of the change comes early, as when answers grow until they reach their limit
        return math.exp(total * (1 - math.exp(-4 * i / n)))
    if kind == "heavy tails" and chance.random() < 0.05:
        return chance.uniform(3, 8)
    return 1.0


KINDS = ("steady", "autocorrelated", "trend", "curve", "heavy tails", "slow saves", "interrupted")


def synthetic_replay(kind: str, n: int, seed: int) -> Replay:
    """A run of n steps of about 20 s. Its noise is a log-normal AR(1); trends change the step by up to 1.65 times."""
    chance = random.Random(f"{kind} {n} {seed}")
    lag, spread = (0.8, 0.25) if kind == "autocorrelated" else (0.3, chance.uniform(0.03, 0.2))
    total = chance.uniform(-0.5, 0.5)
    save = chance.uniform(20, 60) if kind == "slow saves" else chance.uniform(0.5, 4)
    warm, cold, tail = chance.uniform(5, 60), chance.uniform(30, 200), chance.uniform(2, 20)
    per_day = 40.0 if kind == "interrupted" else 0.0
    records: list[dict[str, float]] = []
    time, level, billed, step = 0.0, 0.0, cold + tail, 0
    while step < n:
        step += 1
        level = lag * level + math.sqrt(1 - lag * lag) * chance.gauss(0, spread)
        own = 20 * math.exp(level) * _noise(kind, step, n, total, chance) + (warm if step == 1 else 0.0)
        wall = own + 0.05 + (save if step > 1 and (step - 1) % 20 == 0 else 0.0)
        time += wall
        billed += wall
        records.append({"step": step, "time": round(time, 3), "step_time": round(own, 3)})
        if chance.random() < per_day * wall / 86400:  # the container is taken away: back to the last checkpoint
            billed += cold + warm
            step -= step % 20
    return Replay(f"{kind}", records, 20, billed, cold, tail, per_day)


def probe_quote(replay: Replay, k: int, folder: Path) -> Quote:
    """The quote of a whole run from what a probe of its first k steps leaves in `folder`."""
    first = replay.records[:k]
    (folder / "cost").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in first))
    (folder / "config.json").write_text(json.dumps({"training": {"save_steps": replay.save_steps}}))
    end = replay.cold + first[-1]["time"] + replay.tail
    attempt = {**H100.model_dump(), "attempt": "probe", "rates": {}, "started": 0, "ready": replay.cold, "seen": end}
    (folder / "cost" / "probe.json").write_text(json.dumps(attempt))
    steps = int(max(record["step"] for record in replay.records))
    return make_quote(read_trace(folder), steps, [H100], load_prices(), replay.interruptions_per_day)


def compare(replay: Replay, k: int) -> tuple[float, bool, float]:
    """The quote's absolute relative error, whether its interval holds the bill, and its width relative to the bill."""
    with tempfile.TemporaryDirectory() as folder:
        quote = probe_quote(replay, k, Path(folder) / "run")
    hours = replay.seconds / 3600
    held = quote.hours_low <= hours <= quote.hours_high
    return abs(quote.hours / hours - 1), held, (quote.hours_high - quote.hours_low) / hours


def overshoot(kind: str, seed: int, folder: Path) -> float:
    """By how many of its last steps a simulated run goes over its budget; negative where it stays under."""
    chance = random.Random(f"budget {kind} {seed}")
    prices = load_prices()
    attempt = begin_attempt(folder, f"{kind}-{seed}".replace(" ", "-"), H100, prices)
    rate = sum(attempt.rates.values()) / 3600
    limit = rate * chance.uniform(100, 6000)
    budget = Budget(folder, attempt.attempt, limit)
    save = {"slow saves": 30.0, "heavy tails": 2.0}.get(kind, 0.5)
    total = chance.uniform(-2, 2)
    now, step = attempt.started + chance.uniform(0, 60), 0
    while True:
        step += 1
        seconds = 20 * math.exp(chance.gauss(0, 0.3)) * _noise(kind, step, 200, total, chance)
        now += seconds
        if budget.exhausted(seconds, now):
            break
        now += save if step % 20 == 0 else 0.05
    now += save
    return (budget.spent(now) - limit) / (rate * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="run folders to replay as well")
    parser.add_argument("--seeds", type=int, default=30, help="synthetic runs of each kind and length")
    arguments = parser.parse_args()
    real = [*real_replays(), *map(run_replay, arguments.runs)]
    groups = {replay.name: [replay] for replay in real}
    for kind in KINDS:
        groups[kind] = [synthetic_replay(kind, n, seed) for n in (60, 200) for seed in range(arguments.seeds)]
    print(f"{'':34}" + "".join(f"| first {k:<2} steps               " for k in PROBES))
    print(f"{'trace':30}{'runs':>4}" + "|  median  worst  held  width " * len(PROBES))
    everything: dict[int, list[tuple[float, bool, float]]] = {k: [] for k in PROBES}
    for name, replays in groups.items():
        cells = []
        for k in PROBES:
            results = [compare(replay, k) for replay in replays]
            everything[k] += results if name in KINDS else []
            cells.append(_cell(results))
        print(f"{name:30}{len(replays):4}{''.join(cells)}", flush=True)
    print(f"{'all synthetic':30}{len(everything[3]):4}{''.join(_cell(everything[k]) for k in PROBES)}")
    with tempfile.TemporaryDirectory() as folder:
        print("\nbudget: overshoot in last steps (worst), and money left over in last steps (median)")
        for kind in ("steady", "trend", "heavy tails", "slow saves"):
            over = [overshoot(kind, seed, Path(folder) / kind / str(seed)) for seed in range(200)]
            print(f"{kind:26}{max(0.0, max(over)):8.2f}{-statistics.median(over):8.2f}")


def _cell(results: Sequence[tuple[float, bool, float]]) -> str:
    errors, held, widths = zip(*results, strict=True)
    share = f"{sum(held) / len(held):6.0%}" if len(held) > 1 else f"{'yes' if held[0] else 'no':>6}"
    return f"| {statistics.median(errors):7.1%}{max(errors):7.1%}{share}{statistics.median(widths):7.0%} "


if __name__ == "__main__":
    main()
