"""Training in a process of its own: start it, follow it, name what ended it.

Owns dispatch to the backend that the config names. Must not know how a backend trains.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import importlib
import logging
import os
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
from lib.log import echo, scrub, start_logging
from lib.runfolder import Run, base_hash, exclusive, hash_file, read_run, task_file_hash
from lib.task import Row, Task, load_task

logger = logging.getLogger(__name__)

STAGE = "training"
SECTIONS = ("task", "backend", "model", "starter", "lora", "sampling", "training", "rewards")
"""The config sections that decide what training produces."""

PRODUCTS = ("checkpoints", "adapter", "model", "rollouts.jsonl", "metrics.jsonl")

RESUMABLE = ("checkpoints/step-*",)

STOPPED = 75
"""Exit status of a child that was asked to stop and wrote a checkpoint (EX_TEMPFAIL: try again later)."""

_GRACE = 5.0
"""Seconds that a finished child's own helpers get to finish as well."""

Watch = Callable[[list[dict[str, Any]], bool], None]
"""Gets all metrics so far, and whether they are the last."""


class TrainingStopped(WorkbenchError, RuntimeError):
    """Training stopped before its end and can be resumed; the message says where it stands."""


class TrainingFailed(WorkbenchError, RuntimeError):
    """Training cannot go on as configured; the message says why and what to change."""


class Stop:
    """Whether training should finish its step, write a checkpoint and end: asked by signal, or the parent is gone."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def requested(self) -> bool:
        return self._asked or os.getppid() != self._parent

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
        _run_child(run, watch)
        done = run.outputs(STAGE)
        assert done is not None
    if watch:
        watch(run.metrics(), True)
    return run.path(done["path"])


def train_child(folder: str) -> int:
    """The child's whole life: lock the run, train with the configured backend, write down how it ended."""
    run = read_run(folder)
    start_logging(run.path("log.txt"))
    stop = Stop()
    error_file = _error_file(run)
    error_file.unlink(missing_ok=True)
    try:
        with exclusive(run.path("stages", f"{STAGE}.lock")):
            task = load_task(run.config.task.name, **run.config.task.params)
            backend = importlib.import_module(f"lib.backends.{run.config.backend}")
            output: Path | None = backend.train(run.config, task, run.read_rows("train"), run, stop)
            if output is None:
                return STOPPED
            run.end(STAGE, {"path": output.name, "steps": len(run.metrics())})
            return 0
    except WorkbenchError as error:
        error_file.write_text(scrub(str(error)), encoding="utf-8")
        return 1


def last_step(run: Run) -> int:
    """The newest complete checkpoint's step; 0 where there is none."""
    found = run.checkpoints()
    return int(found[-1].name.removeprefix("step-")) if found else 0


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
        raise TrainingStopped(f"stopped as asked. {where}")
    if status < 0:
        name = signal.Signals(-status).name
        cause = " (by hand, or by the kernel because memory ran out: see `dmesg`)" if status == -signal.SIGKILL else ""
        raise TrainingStopped(f"training was ended by {name}{cause}. {where}")
    error_file = _error_file(run)
    reason = error_file.read_text(encoding="utf-8") if error_file.is_file() else "\n".join(tail[-20:])
    logger.error("training failed: %s", reason)
    raise TrainingFailed(f"{reason}\n{where}")


def _error_file(run: Run) -> Path:
    return run.path("stages", f"{STAGE}.error.txt")
