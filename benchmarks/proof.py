"""How much longer does a step take because workers prove that they hold the new weights?

Distributed trainings with real vLLM workers on this machine, with the proof and without it by turns: the two smoke
configs (policies of 1 million parameters, the smallest steps there are), `decisions` as it is shipped, and `decisions`
on a policy of 50 million. Overhead = median seconds of a step with it over those without, less 1: the median of the
pairs. Bar: 5 %. (Without: nobody is asked for a canary, everybody is believed. There is no such setting.)

Beside it, from events.jsonl, what the proof keeps its roles busy with at every sync: the actor's canary, and that of
the slowest worker after its load. Much of that is done while others work, so the sum is what it costs at most, but for
the canary that workers are asked while the actor writes.

Exit status 0 = the bar is met everywhere. `others` = cores that other processes used meanwhile.

    PYTHONPATH=. .venv/bin/python benchmarks/proof.py                          # about 15 minutes on 2 quiet cores
    PYTHONPATH=. .venv/bin/python benchmarks/proof.py --only "smoke decisions" --pairs 1
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from machine import Others, shown

from lib import models
from lib.backends import distributed
from lib.config import Config, load_config
from lib.orchestrator.actor import ActorDesk
from lib.orchestrator.slot import Slot
from lib.prepare import prepare
from lib.roles import Canary, Proof
from lib.runfolder import Run, open_run
from lib.task import load_task

BAR = 0.05
WARM = 2
"""Steps and syncs at the beginning that are not counted."""
SHARED = {"backend": "distributed", "sampling.vllm.max_length": 128, "distributed.workers": 2}
SCENARIOS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "smoke decisions": ("configs/smoke/decisions.yaml", 24, {}),
    "smoke mrl": ("configs/smoke/mrl.yaml", 16, {}),
    "decisions": ("configs/decisions.yaml", 10, {}),
    "decisions, 50M": ("configs/decisions.yaml", 6, {"training.batch": 64}),
}
"""Config, steps, and what else is changed."""


class Never:
    def requested(self, step_seconds: float) -> bool:
        return False


class Measured(NamedTuple):
    """Medians of one training, in seconds."""

    step: float
    actor: float
    worker: float


class Bench:
    def __init__(self, name: str, folder: Path) -> None:
        self.path, steps, own = SCENARIOS[name]
        places = {"paths.outputs": str(folder), "paths.cache": str(folder / "cache")}
        self.settings = SHARED | places | {"training.steps": steps, "training.save_steps": steps} | own
        self.name, self.folder, self.count = name, folder, 0
        if "50M" in name:
            self.settings["model.name"] = str(self._enlarge(folder / "50M"))

    def train(self) -> Measured:
        self.count += 1
        config = load_config(self.path, self.settings)
        run = self._open(config, f"{self.name.replace(' ', '-').replace(',', '')}-{self.count}")
        task = load_task(config.task.name, **config.task.params)
        distributed.train(config, task, run.read_rows("train"), run, Never())
        return measured(run)

    def _open(self, config: Config, name: str) -> Run:
        run = open_run(name, config)
        prepare(load_task(config.task.name, **config.task.params), run)
        return run

    def _enlarge(self, folder: Path) -> Path:
        """The starter policy's tokenizer and kind, with random weights, and many more of them."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = load_config(self.path, self.settings)
        starter = models.resolve_model(config, self._open(config, "rows").read_rows("train"))
        shape = AutoConfig.from_pretrained(
            starter, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
            num_key_value_heads=4, layer_types=["full_attention"] * 12, max_window_layers=12,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape)
        print(f"  {self.name}: {model.num_parameters() / 1e6:.1f} million parameters")
        model.save_pretrained(folder)
        models.load_tokenizer(starter, config.model).save_pretrained(folder)
        return folder


def measured(run: Run) -> Measured:
    times = [record["time"] for record in run.metrics()]
    steps = [after - before for before, after in itertools.pairwise(times)][WARM:]
    slowest: dict[int, float] = {}
    for event in run.events():
        if event["kind"] == "proof":
            slowest[event["version"]] = max(slowest.get(event["version"], 0.0), event["seconds"])
    said = [event["seconds"] for event in run.events() if event["kind"] == "canary"]
    return Measured(statistics.median(steps), median(said), median(list(slowest.values())))


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[WARM:]) if len(seconds) > WARM else 0.0


@contextmanager
def believing() -> Iterator[None]:
    """Nobody is asked for a canary."""

    async def say_nothing(desk: ActorDesk, version: int) -> Canary:
        return Canary(version, [], [])

    async def believe(slot: Slot, canary: Canary, before: Canary | None = None) -> Proof:
        return Proof(canary.version, True, 0.0)

    with mock.patch.object(ActorDesk, "_canary", say_nothing), mock.patch.object(Slot, "_ask", believe):
        yield


def measure(name: str, folder: Path, pairs: int) -> bool:
    """Print a scenario's figures; whether its bar is met."""
    bench, overheads, load = Bench(name, folder), [], Others()
    for number in range(pairs):
        found: dict[bool, Measured] = {}
        for proven in (True, False) if number % 2 else (False, True):
            if proven:
                found[proven] = bench.train()
            else:
                with believing():
                    found[proven] = bench.train()
        ours, without = found[True], found[False]
        overheads.append(ours.step / without.step - 1)
        parts = (ours.actor + ours.worker) / ours.step
        print(f"  {name}: step {ours.step:.3f} s, without proof {without.step:.3f} s: {overheads[-1]:+.1%}; actor's "
              f"canary {1e3 * ours.actor:.1f} ms, slowest worker's {1e3 * ours.worker:.1f} ms, together {parts:.1%} of "
              f"a step; others {shown(load.cores())}", flush=True)  # fmt: skip
    overhead, passed = statistics.median(overheads), statistics.median(overheads) <= BAR
    print(f"{name}: overhead {overhead:+.1%}, spread {min(overheads):+.1%} to {max(overheads):+.1%}, {pairs} pairs; "
          f"bar {BAR:.0%}: {'PASS' if passed else 'FAIL'}", flush=True)  # fmt: skip
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(SCENARIOS))
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        passed = [measure(name, Path(folder), options.pairs) for name in SCENARIOS if options.only in (None, name)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
