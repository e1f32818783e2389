"""Does the default run learn, whatever the seed? The whole chain for several seeds, on 2,048 fresh held-out prompts.

Compares base and adapter (reloaded from disk) on the same rows, paired. Bars: every interval above +0.08, mean gain
above +0.15, sampled reward afterwards above the base's greedy reward.

    .venv/bin/python benchmarks/seeds.py --seeds 0 1 2 --figure docs/figures/decisions.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT, show
from lib.runfolder import Run, read_run

LOW, MEAN = 0.08, 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/decisions.yaml")
    parser.add_argument("--figure", type=Path, help="write the curves and gains of all seeds to this PNG")
    options = parser.parse_args()
    runs = [run_seed(options.config, seed) for seed in options.seeds]
    rows = [table_row(run, seed, seconds) for (run, seconds), seed in zip(runs, options.seeds, strict=True)]
    sys.stdout.write(markdown(rows))
    if options.figure:
        draw([run for run, _ in runs], options.seeds, options.figure)
    return verdict(rows)


def run_seed(config: str, seed: int) -> tuple[Run, float]:
    """One whole chain under the name seeds-<seed>; finished stages are skipped, so a second call only prints."""
    name = f"seeds-{seed}"
    command = [sys.executable, "-m", "lib.run", "all", config, "-p", f"run_name={name}", "-p", f"training.seed={seed}",
               "-p", "evaluation.rows=2048"]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, cwd=PROJECT_ROOT, check=True)
    return read_run(f"outputs/{name}"), time.monotonic() - started


def table_row(run: Run, seed: int, seconds: float) -> dict[str, Any]:
    summary = json.loads((run.folder / "evaluation" / "summary.json").read_text())
    reward = {policy["policy"]: policy["reward"] for policy in summary["policies"]}
    parts = {policy["policy"]: policy["parts"] for policy in summary["policies"]}
    return {
        "seed": seed,
        "gain": summary["gains"]["adapter sampled"],
        "greedy_gain": summary["gains"]["adapter greedy"],
        "over_greedy": summary["over_greedy_base"],
        "reward": reward,
        "regret": {label: values["regret"] for label, values in parts.items()},
        "best": {label: values["best"] for label, values in parts.items()},
        "seconds": seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | base sampled | base greedy | adapter sampled | gain, sampled (95 %) "
        "| over the base's greedy (95 %) | regret | best action |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reward, regret, best = row["reward"], row["regret"], row["best"]
        lines.append(
            f"| {row['seed']} | {reward['base sampled']:.3f} | {reward['base greedy']:.3f} "
            f"| {reward['adapter sampled']:.3f} "
            f"| {interval(row['gain'])} | {interval(row['over_greedy'])} "
            f"| {regret['base sampled']:.2f} → {regret['adapter sampled']:.2f} "
            f"| {best['base sampled']:.0%} → {best['adapter sampled']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def interval(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def verdict(rows: list[dict[str, Any]]) -> int:
    gains = [row["gain"] for row in rows]
    mean = sum(gain["mean"] for gain in gains) / len(gains)
    checks = {
        f"every interval above {LOW:+}": all(gain["low"] > LOW for gain in gains),
        f"mean gain {mean:+.3f} above {MEAN:+}": mean > MEAN,
        "sampled beats the base's greedy": all(
            row["reward"]["adapter sampled"] > row["reward"]["base greedy"] for row in rows
        ),
    }
    for name, passed in checks.items():
        sys.stdout.write(f"{'ok ' if passed else 'NOT'} {name}\n")
    return 0 if all(checks.values()) else 1


def draw(runs: list[Run], seeds: list[int], path: Path) -> None:
    """Left: mean reward of the sampled answers over training. Right: the paired gains on held-out rows."""
    from matplotlib.figure import Figure

    show.use_style()
    figure = Figure(figsize=(9.5, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for run, seed, color in zip(runs, seeds, (show.BLUE, show.ORANGE, show.GREEN, show.GREY, show.RED), strict=False):
        metrics = run.metrics()
        rewards = [m["reward"] for m in metrics]
        left.plot([m["step"] for m in metrics], rewards, color=color, alpha=0.25, linewidth=1)
        left.plot([m["step"] for m in metrics], show.smooth(rewards), color=color, linewidth=2, label=f"seed {seed}")
    left.set(title="Reward of the sampled answers", xlabel="GRPO step", ylabel="mean reward")
    left.legend()
    for y, (run, seed) in enumerate(zip(runs, seeds, strict=True)):
        row = table_row(run, seed, 0)
        for offset, key, color, label in (
            (0.12, "gain", show.GREEN, "over sampled base"),
            (-0.12, "over_greedy", show.BLUE, "over greedy base"),
        ):
            gain = row[key]
            right.plot([gain["low"], gain["high"]], [y + offset] * 2, color=color, linewidth=2.5)
            right.plot(gain["mean"], y + offset, "o", color=color, label=label if y == 0 else None)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(seeds)), [f"seed {seed}" for seed in seeds])
    right.set(
        title="Gain on 2,048 held-out prompts", xlabel="reward, sampled answers (paired, 95 %)", ylim=(-0.6, len(seeds))
    )
    right.legend(loc="upper left", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
