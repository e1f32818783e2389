"""A run of the smoke config through verl, started as a user does; for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from lib import PROJECT_ROOT

SMOKE = PROJECT_ROOT / "configs" / "smoke" / "verl.yaml"
SECONDS = 900.0
"""For one start of verl, two steps and its end: 100 seconds on two idle cores."""


class Work:
    """A run of the smoke config in a folder of its own, with tests/two_turns.py."""

    def __init__(self, folder: Path, python: str, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self.folder, self.run = folder, folder / "through-verl"
        self._config = folder / "verl.yaml"
        smoke = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
        own = {"task": {"name": str(PROJECT_ROOT / "tests" / "two_turns.py")}, "rewards": {"max_unscored": 0.9}}
        own["starter"] = {"steps": 5}  # it has learnt next to nothing: answers of a group differ
        self._config.write_text(yaml.safe_dump(smoke | own))
        self._places = [f"paths.outputs={folder}", f"paths.cache={folder / 'cache'}", f"verl.python={python}"]

    def start(self, notebook: str, *parameters: str) -> subprocess.Popen[bytes]:
        given = [f"run_name={self.run.name}", *self._places, *parameters]
        command = [
            sys.executable,
            "-m",
            "lib.run",
            notebook,
            str(self._config),
            *(text for one in given for text in ("-p", one)),
        ]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=PROJECT_ROOT, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )

    def do(self, notebook: str, *parameters: str) -> None:
        assert self.start(notebook, *parameters).wait(SECONDS) == 0, self.said()

    def stop_in_its_first_step(self, *parameters: str) -> subprocess.Popen[bytes]:
        """Start training, and ask it to stop as soon as it is under way."""
        process = self.start("3_grpo_training", *parameters)
        wait_for(process, self, "Training Progress")
        (child,) = children_of(self.run)
        os.kill(child, signal.SIGTERM)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def said(self) -> str:
        own = self.run / "verl" / "log.txt"
        return self.log.read_text(errors="replace") + (own.read_text(errors="replace")[-8000:] if own.is_file() else "")


def wait_for(process: subprocess.Popen[bytes], work: Work, text: str) -> None:
    until = time.monotonic() + SECONDS
    while text not in work.said():
        assert process.poll() is None and time.monotonic() < until, work.said()
        time.sleep(0.5)


def children_of(folder: Path) -> list[int]:
    """The training processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train-child" in words and str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
