"""A training that runs in a Modal container, followed from a notebook here (`where: modal`).

Owns start, attach, live metrics, stop and the way back of the result. The same command starts it that a person would
type, detached: when this kernel dies the container goes on, and the next call of the same cell finds it again.

    python -m lib.run 3_grpo_training configs/decisions.yaml -p where=modal
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT
from lib.backends import STAGE, TrainingFailed, TrainingStopped, Watch, last_step
from lib.experiment import Experiment, read_experiment
from lib.log import echo
from lib.remote import clear_modal_errors, entries, fetch, read, writer
from lib.runfolder import Run, hash_file

logger = logging.getLogger(__name__)

NOTEBOOK = "3_grpo_training"
POLL_SECONDS = 2.0
OURS = ("config.json", "provenance.json", "log.txt", "rows", "stages", "notebooks", "result.json", "evaluation")
"""What this machine's run folder keeps of its own."""


class Follower:
    """One run whose training happens elsewhere."""

    def __init__(self, run: Run, watch: Watch | None) -> None:
        self.run, self.watch = run, watch
        with clear_modal_errors():
            self.experiment: Experiment = read_experiment()
        self.call: str | None = None
        self.tail: list[str] = []
        self.asked = False

    def train(self) -> dict[str, Any]:
        """Start the training, or join it where it runs; returns the finished stage's outputs."""
        with clear_modal_errors():
            status = 0
            if self._finished():
                logger.info("training: this run is finished on Modal: bringing its result here")
            else:
                self.call = writer(self.experiment, self.run.name)
                status = self._join() if self.call else self._start()
            self._bring()
            record = self._finished()
        if record:
            return self._checked(record)
        where = f"Run the same cell or command again: it goes on from step {last_step(self.run)}."
        if self.asked or status == 75:
            raise TrainingStopped(f"stopped on Modal{' as asked' if self.asked else ''}. {where}")
        raise TrainingFailed("\n".join([*self.tail[-12:], where]))

    def _start(self) -> int:
        config = self.run.path("config.json")
        command = [sys.executable, "-m", "modal", "run", "--detach", "-m", "lib.modal_app::run"]
        command += ["--notebook", NOTEBOOK, "--config", str(config)]
        command += ["-p", f"run_name={self.run.name}", "-p", "where=here"]
        # A kernel says that its output takes colours: here it is a log.
        environment = {name: value for name, value in os.environ.items() if "COLOR" not in name}
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env={**environment, "NO_COLOR": "1", "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # an interrupt here is a question to the container, not an end of this client
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._follow(lambda: process.poll() is not None)
        reader.join(5)
        return process.returncode

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            echo(line.rstrip("\n"))
            self.tail.append(line.rstrip("\n"))
            del self.tail[:-50]
            match = re.search(r"^run \S+: call (\S+)$", line.strip())
            self.call = match[1] if match else self.call

    def _join(self) -> int:
        import modal

        logger.info("training: this run is in a container already (call %s): following it", self.call)
        call = modal.FunctionCall.from_id(str(self.call))

        def is_over() -> bool:
            try:
                call.get(timeout=0)
            except TimeoutError:
                return False
            except Exception as error:  # how the call ended is for the run folder to say
                self.tail.append(str(error))
            return True

        self._follow(is_over)
        return 0

    def _follow(self, is_over: Callable[[], bool]) -> None:
        """Bring metrics and bill here every few seconds until the call is over and its container has let go."""
        while not (is_over() and writer(self.experiment, self.run.name) is None):
            try:
                self._bring_live()
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                if self.asked:
                    raise
                self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        import modal

        self.asked = True
        if self.call is None:
            raise TrainingStopped("stopped before the container had started")
        logger.info("stop asked for: the container finishes its step, then a checkpoint")
        modal.FunctionCall.from_id(self.call).cancel()

    # the way back -----------------------------------------------------------------------------------------------------
    def _bring_live(self) -> None:
        metrics = read(self.experiment, "/outputs", f"{self.run.name}/metrics.jsonl")
        if metrics is None:
            return
        self.run.path("metrics.jsonl").write_bytes(metrics)
        if entries(self.experiment, "/outputs", f"{self.run.name}/cost"):
            fetch(self.experiment, f"{self.run.name}/cost", self.run.path("cost", "x").parent)
        if self.watch:
            self.watch(self.run.metrics(), False)

    def _bring(self) -> None:
        if not entries(self.experiment, "/outputs", self.run.name, recursive=False):
            return
        fetch(self.experiment, self.run.name, self.run.folder, skip=OURS)
        if entries(self.experiment, "/outputs", f"{self.run.name}/notebooks"):
            there = self.run.path("notebooks", "modal", "x").parent
            fetch(self.experiment, f"{self.run.name}/notebooks", there)

    def _finished(self) -> dict[str, Any] | None:
        content = read(self.experiment, "/outputs", f"{self.run.name}/stages/{STAGE}.json")
        record = json.loads(content) if content else None
        return record if record and record["finished"] else None

    def _checked(self, record: dict[str, Any]) -> dict[str, Any]:
        rows = Path("rows") / "train.jsonl"
        here = hash_file(self.run.folder / rows)
        if record["key"]["inputs"].get(rows.as_posix()) != here:
            raise TrainingFailed(
                f"the run {self.run.name!r} on Modal was trained on other rows than those here: choose another run_name"
            )
        return dict(record["outputs"])


def train_there(run: Run, watch: Watch | None) -> dict[str, Any]:
    """Train a run in a Modal container and bring the result here; returns the stage's outputs."""
    return Follower(run, watch).train()
