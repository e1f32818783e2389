"""Training in a process of its own: start it, follow it, name what ended it.

Owns dispatch to the backend that the config names. Must not know how a backend trains.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT, WorkbenchError
from lib.config import Config
from lib.cost import ATTEMPT, Budget, Resources, beat, begin_attempt, load_prices
from lib.log import echo, scrub, start_logging
from lib.places import RUN, locate
from lib.provenance import machine
from lib.runfolder import Run, base_hash, exclusive, hash_file, read_run, task_file_hash
from lib.task import Row, Task, load_task

logger = logging.getLogger(__name__)

STAGE = "training"
SECTIONS = ("task", "backend", "model", "starter", "lora", "sampling", "training", "distributed", "verl", "rewards")
"""The config sections that decide what training produces."""

PRODUCTS = ("checkpoints", "verl/checkpoints", "adapter", "model", "rollouts.jsonl", "metrics.jsonl")

RESUMABLE = ("checkpoints/step-*", "verl/checkpoints/global_step_*")

STOPPED = 75
"""Exit status of a child that was asked to stop and wrote a checkpoint (EX_TEMPFAIL: try again later)."""

_BEAT_SECONDS, _SAY_SECONDS = 5.0, 60.0
"""How often the bill is brought up to date on disk, and said."""

_GRACE = 5.0
"""Seconds that a finished child's own helpers get to finish as well."""

Watch = Callable[[list[dict[str, Any]], bool], None]
"""Gets all metrics so far, and whether they are the last."""


class TrainingStopped(WorkbenchError, RuntimeError):
    """Training stopped before its end and can be resumed; the message says where it stands."""


class TrainingFailed(WorkbenchError, RuntimeError):
    """Training cannot go on as configured; the message says why and what to change."""


class Meter:
    """Keeps the bill of this training process, and says when the budget does not pay another step."""

    def __init__(self, run: Run) -> None:
        self.run, self.limit = run, run.config.cost.budget_usd
        prices = load_prices(locate(run.config.cost.prices))
        self._own = ATTEMPT not in os.environ  # in a container, what runs this process keeps the meter
        name = re.sub(r"[^A-Za-z0-9]+", "-", machine())[:40].strip("-") or "machine"
        self.attempt = os.environ.get(ATTEMPT) or f"{name}-{os.getpid()}-{time.time():.0f}"
        if self._own:
            begin_attempt(run.folder, self.attempt, Resources(where="here"), prices)
        self._budget = Budget(run.folder, self.attempt, self.limit) if self.limit else None
        self._beat, self._said = -math.inf, time.monotonic()

    def is_used_up(self) -> bool:
        """Whether there is no money left to begin with."""
        return self._budget is not None and self._budget.spent() >= self._budget.limit_usd

    def step(self, seconds: float) -> bool:
        """Note a step that took so long; whether it has to be the last one."""
        now = time.monotonic()
        if self._own and now - self._beat > _BEAT_SECONDS:
            self._beat = now
            beat(self.run.folder, self.attempt, ready=True)
        if now - self._said > _SAY_SECONDS:
            self._said = now
            self._say()
        return self._budget is not None and self._budget.exhausted(seconds)

    def end(self) -> None:
        if self._own:
            beat(self.run.folder, self.attempt)

    def _say(self) -> None:
        bill = self.run.bill()
        if bill.usd or self.limit:
            limit = f" of ${self.limit:g}" if self.limit else ""
            logger.info("cost so far: $%.4f%s, %.2f h", bill.usd, limit, bill.hours)


class Stop:
    """Whether training should finish its step, write a checkpoint and end: asked by signal, or the parent is gone, or
    the budget is used up."""

    def __init__(self, meter: Meter) -> None:
        self._asked = False
        self._meter = meter
        self.out_of_money = False
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def requested(self, step_seconds: float) -> bool:
        """To be asked once after every step, with what it took."""
        if self._meter.step(step_seconds) and not self.out_of_money:
            self.out_of_money = True
            logger.info("the budget does not pay another step: a checkpoint, then stop")
        return self._asked or self.out_of_money or os.getppid() != self._parent

    def _ask(self, *_: object) -> None:
        self._asked = True
        logger.info("stop asked for: finishing this step, then a checkpoint")


def train(config: Config, task: Task, rows: Sequence[Row], run: Run, watch: Watch | None = None) -> Path:
    """Train, or go on where a killed training was; returns the folder of the adapter (or of the whole model).

    The work runs in a child process of its own session, so a kernel interrupt does not reach it in the middle of a
    step: interrupting this call asks it to stop after its step and a checkpoint. `watch` gets all metrics at most
    once a second.
    """
    done = run.begin(STAGE, SECTIONS, _inputs(config, run), PRODUCTS, RESUMABLE)
    if done is None:
        if config.where == "modal":
            from lib.follow import train_there

            done = run.end(STAGE, train_there(run, watch))
        else:
            try:
                _run_child(run, watch)
            finally:
                run.finish({"cost": run.bill().as_json()})
            done = run.outputs(STAGE)
        assert done is not None
    run.finish({"cost": run.bill().as_json()})
    if watch:
        watch(run.metrics(), True)
    return run.path(done["path"])


def train_child(folder: str) -> int:
    """The child's whole life: lock the run, train with the configured backend, write down how it ended."""
    run = read_run(folder)
    os.environ[RUN] = str(run.folder)
    start_logging(run.path("log.txt"))
    error_file = _error_file(run)
    error_file.unlink(missing_ok=True)
    try:
        with exclusive(run.path("stages", f"{STAGE}.lock")):
            meter = Meter(run)
            if meter.is_used_up():
                raise TrainingFailed(_out_of_money(run))
            stop = Stop(meter)
            task = load_task(run.config.task.name, **run.config.task.params)
            backend = importlib.import_module(f"lib.backends.{run.config.backend}")
            output: Path | None = backend.train(run.config, task, run.read_rows("train"), run, stop)
            meter.end()
            if output is None:
                if stop.out_of_money:
                    error_file.write_text(_out_of_money(run), encoding="utf-8")
                return STOPPED
            run.end(STAGE, {"path": output.name, "steps": run.last_logged()})
            return 0
    except WorkbenchError as error:
        error_file.write_text(scrub(str(error)), encoding="utf-8")
        return 1


def last_step(run: Run) -> int:
    """The newest complete checkpoint's step; 0 where there is none."""
    found = [int(path.name.removeprefix("step-")) for path in run.checkpoints()]
    if run.config.backend == "verl":  # its own become ours only where it ends
        from lib.verl.checkpoints import steps

        found += [step * run.config.steps_per_batch for step in steps(run)]
    return max(found, default=0)


def _inputs(config: Config, run: Run) -> dict[str, str]:
    rows = {"rows/train.jsonl": hash_file(run.path("rows", "train.jsonl"))}
    return rows | task_file_hash(config) | base_hash(config)


def _run_child(run: Run, watch: Watch | None) -> None:
    command = [sys.executable, "-m", "lib.run", "train-child", str(run.folder)]
    child = subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    threading.Thread(target=_end_group, args=(child,), daemon=True).start()
    tail: list[str] = []
    asked = False
    while True:
        try:
            _follow(child, run, watch, tail)
            break
        except KeyboardInterrupt:
            if child.poll() is not None:
                continue
            if asked:  # a step that never ends cannot be waited for
                os.killpg(child.pid, signal.SIGKILL)
            child.terminate()  # the child finishes its step and checkpoints
            asked = True
    _explain(child.returncode, run, tail)


def _end_group(child: subprocess.Popen[str]) -> None:
    """End what a dead child leaves behind (a tracker's or an engine's helper): it would keep our pipe open for ever."""
    child.wait()
    time.sleep(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _follow(child: subprocess.Popen[str], run: Run, watch: Watch | None, tail: list[str]) -> None:
    assert child.stdout is not None
    shown = 0.0
    for line in child.stdout:
        echo(line.rstrip("\n"))
        tail.append(line.rstrip("\n"))
        del tail[:-50]
        if watch and time.monotonic() - shown > 1:
            shown = time.monotonic()
            watch(run.metrics(), False)
    child.wait()


def _explain(status: int, run: Run, tail: Sequence[str]) -> None:
    """Raise what a non-zero exit status means; the run goes on from its last checkpoint in every case."""
    if status == 0:
        return
    where = f"Run the same cell or command again: it goes on from step {last_step(run)}."
    if status == STOPPED:
        reason = _error_file(run).read_text(encoding="utf-8") if _error_file(run).is_file() else "stopped as asked."
        raise TrainingStopped(f"{reason} {where}")
    if status < 0:
        name = signal.Signals(-status).name
        cause = " (by hand, or by the kernel because memory ran out: see `dmesg`)" if status == -signal.SIGKILL else ""
        raise TrainingStopped(f"training was ended by {name}{cause}. {where}")
    error_file = _error_file(run)
    reason = error_file.read_text(encoding="utf-8") if error_file.is_file() else "\n".join(tail[-20:])
    logger.error("training failed: %s", reason)
    raise TrainingFailed(f"{reason}\n{where}")


def _out_of_money(run: Run) -> str:
    spent = run.bill().usd
    return f"the budget is used up: ${spent:.4f} of cost.budget_usd {run.config.cost.budget_usd:g}. Raise it to go on."


def _error_file(run: Run) -> Path:
    return run.path("stages", f"{STAGE}.error.txt")
