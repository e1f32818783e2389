"""What a chain of notebooks gains on held-out rows, and how long it takes: shared by the benchmarks that learn.

from gain import run_chain, print_gains
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from machine import Others, shown

from lib import PROJECT_ROOT
from lib.paired import Gain, compare
from lib.runfolder import Run, read_lines, read_run

SECONDS, CORES = 900, 2


class Chain(NamedTuple):
    """A finished chain."""

    run: Run
    quick: bool
    """At most 15 minutes of two cores: of wall time, or of CPU time where other programs kept the machine busy."""


def options(about: str | None, config: str, name: str) -> argparse.ArgumentParser:
    """What all of these benchmarks may be told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=config)
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--name", default=name)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_chain(chosen: argparse.Namespace, parameters: Sequence[str] = ()) -> Chain:
    """Run notebooks 1 to 4 on the config; finished stages are skipped. Raises CalledProcessError where one fails."""
    settings = [f"run_name={chosen.name}", f"paths.outputs={chosen.outputs}", f"training.seed={chosen.seed}"]
    command = [sys.executable, "-m", "lib.run", "all", chosen.config]
    command += [word for setting in (*settings, *parameters) for word in ("-p", setting)]
    load, started = Others(), time.monotonic()
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)})
    wall, children = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = children.ru_utime + children.ru_stime
    print(f"chain: {wall:.0f} s of wall time, {spent:.0f} s of CPU time; others {shown(load.cores())}")
    return Chain(read_run(f"{chosen.outputs}/{chosen.name}"), wall <= SECONDS or spent <= SECONDS * CORES)


def print_gains(run: Run, measure: str, rows: str, category: str | None = None) -> Gain:
    """Print the share of `solved` answers before and after, and the paired gain; returns that of sampled answers.

    Base and adapter (reloaded from disk) answered the same rows; `category` = only the rows of one.
    """
    found: dict[str, Gain] = {}
    for decoding in ("sampled", "greedy"):
        files = [run.folder / "evaluation" / f"{policy}-{decoding}.jsonl" for policy in ("base", "adapter")]
        base, adapter = ([one for one in read_lines(file) if category in (None, one["category"])] for file in files)
        before, after = (sum(one["parts"]["solved"] for one in some) / len(some) for some in (base, adapter))
        gain = found[decoding] = compare(base, adapter, part="solved")
        interval = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        print(f"{measure}, {decoding}: {before:.3f} -> {after:.3f}, gain {interval} on {gain.n} {rows}")
    return found["sampled"]


def verdict(chain: Chain, gain: Gain) -> int:
    """Print it, and return the exit status: 0 = the gain's 95 % interval lies above 0, and the chain was quick."""
    passed = gain.low > 0 and chain.quick
    print(f"verdict: {'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1
