"""Does the toy policy learn to win at Wordle? The chain on configs/wordle3.yaml, and the win rate on held-out games.

Base and adapter (reloaded from disk) play the same games, paired by game. Exit status 0 = the 95 % interval of the gain
in the win rate, sampled as in training, lies above 0, and the chain took at most 15 minutes of two cores: of wall time,
or of CPU time where other programs kept the machine busy. Finished stages are skipped: a second call only prints.

    python benchmarks/wordle_gain.py
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

from machine import Others, shown

from lib import PROJECT_ROOT
from lib.paired import Gain, compare
from lib.runfolder import read_lines, read_run

SECONDS, CORES = 900, 2


def gains(run: str) -> dict[str, tuple[float, float, Gain]]:
    """Decoding -> win rate of the base and of the adapter, and the paired gain."""
    folder = read_run(run).folder / "evaluation"
    found = {}
    for decoding in ("sampled", "greedy"):
        base, adapter = (list(read_lines(folder / f"{name}-{decoding}.jsonl")) for name in ("base", "adapter"))
        rates = [sum(record["parts"]["solved"] for record in some) / len(some) for some in (base, adapter)]
        found[decoding] = (rates[0], rates[1], compare(base, adapter, part="solved"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/wordle3.yaml")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--name", default="wordle-gain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, "-m", "lib.run", "all", options.config, "-p", f"run_name={options.name}"]
    command += ["-p", f"paths.outputs={options.outputs}", "-p", f"training.seed={options.seed}"]
    load, started = Others(), time.monotonic()
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)})
    wall, children = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = children.ru_utime + children.ru_stime
    print(f"chain: {wall:.0f} s of wall time, {spent:.0f} s of CPU time; others {shown(load.cores())}")
    found = gains(f"{options.outputs}/{options.name}")
    for decoding, (before, after, gain) in found.items():
        interval = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        print(f"win rate, {decoding}: {before:.3f} -> {after:.3f}, gain {interval} on {gain.n} held-out games")
    quick = wall <= SECONDS or spent <= SECONDS * CORES
    passed = found["sampled"][2].low > 0 and quick
    print(f"verdict: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
