"""Does training through rollout workers learn what training in one process learns? Same seeds, same steps, same rows.

For every seed two chains of notebooks on the config: `backend: local`, and `backend: distributed` with two workers,
`reload` and overlap 1 (so that the weights that sample are one step old). Base and adapter answer 2,048 held-out rows;
the gains are paired over these rows. Bars: every gain's 95 % interval lies above 0, and that of what distributed
training gains more (or less) than local does not lie below 0: over the rows of one seed alone, and over the seeds
(Student's t) where there are several, as the same seed draws other answers in another engine.

Finished stages are skipped, so a second call only prints. Exit status 0 = the bars are met.

    PYTHONPATH=. .venv/bin/python benchmarks/learning_distributed.py --seeds 0 1 2        # about half an hour
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from gain import options, run_chain

from lib.paired import Gain, compare
from lib.runfolder import Run, read_lines

ROWS = 2048
DISTRIBUTED = ("backend=distributed", "distributed.workers=2", "distributed.sync_method=reload",
               "distributed.overlap=1", "sampling.vllm.max_length=128")  # fmt: skip
T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t, two-sided 95 %, by the number of seeds."""


class Pair(NamedTuple):
    """What one seed gained both ways, in reward of sampled answers."""

    seed: int
    local: Gain
    distributed: Gain
    more: Gain
    """Distributed over local, paired over rows."""


def main() -> int:
    parser = options(__doc__, "configs/decisions.yaml", "learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    pairs = [measure(chosen, seed) for seed in chosen.seeds]
    print(markdown(pairs), end="")
    return verdict(pairs)


def measure(chosen: argparse.Namespace, seed: int) -> Pair:
    """Both chains of a seed."""
    shared = [f"evaluation.rows={ROWS}"]
    runs: dict[str, Run] = {}
    for backend, parameters in (("local", shared), ("distributed", [*shared, *DISTRIBUTED])):
        own = argparse.Namespace(**vars(chosen) | {"seed": seed, "name": f"{chosen.name}-{backend}-{seed}"})
        runs[backend] = run_chain(own, parameters).run
    answers = {backend: {policy: answered(run, policy) for policy in ("base", "adapter")}
               for backend, run in runs.items()}  # fmt: skip
    check_staleness(runs["distributed"])
    local, ours = answers["local"], answers["distributed"]
    return Pair(seed, compare(local["base"], local["adapter"]), compare(ours["base"], ours["adapter"]),
                compare(local["adapter"], ours["adapter"]))  # fmt: skip


def answered(run: Run, policy: str) -> list[dict[str, Any]]:
    return list(read_lines(run.folder / "evaluation" / f"{policy}-sampled.jsonl"))


def check_staleness(run: Run) -> None:
    """Raise SystemExit where the run did not really overlap, or did not sample with both workers."""
    stalest = max(record["staleness"] for record in run.rollouts())
    workers = {record["worker"] for record in run.rollouts()}
    if stalest != 1 or len(workers) != 2:
        raise SystemExit(f"{run.folder}: staleness up to {stalest}, workers {sorted(workers)}: not what is compared")


def markdown(pairs: Sequence[Pair]) -> str:
    lines = [
        "| seed | gain, local (95 %) | gain, distributed (95 %) | distributed - local (95 %) |",
        "|---|---|---|---|",
        *(f"| {one.seed} | {told(one.local)} | {told(one.distributed)} | {told(one.more)} |" for one in pairs),
    ]
    return "\n".join(lines) + "\n"


def told(gain: Gain) -> str:
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of a figure that every seed gives once."""
    mean = statistics.mean(values)
    half = T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def verdict(pairs: Sequence[Pair]) -> int:
    learned = all(gain.low > 0 for one in pairs for gain in (one.local, one.distributed))
    print(f"{'ok ' if learned else 'NOT'} every gain's interval lies above 0")
    mean, low, high = pairs[0].more[:3] if len(pairs) == 1 else over_seeds([one.more.mean for one in pairs])
    reached = high >= 0
    told = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(pairs)} seeds"
    print(f"{'ok ' if reached else 'NOT'} distributed - local does not lie below 0: {told}")
    return 0 if learned and reached else 1


if __name__ == "__main__":
    sys.exit(main())
