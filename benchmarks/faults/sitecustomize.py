"""Seeded faults of rollout workers, for show_distributed.py: Python imports this where PYTHONPATH names this folder.

A fault is a file `METHOD-STEP` in the folder $FAULTS: the first worker that is to load weights of that step or a later
one by that method takes the file, says that it has loaded them, and has not. Only its proof can tell.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def is_due(method: str, step: int) -> bool:
    """Whether this process takes a fault, which nobody else has then."""
    for path in Path(os.environ["FAULTS"]).glob(f"{method}-*"):
        if step >= int(path.name.rpartition("-")[2]):
            with suppress(FileNotFoundError):
                path.rename(path.with_name(f"taken-by-{os.getpid()}-{path.name}"))
                return True
    return False


def install() -> None:
    from lib.rollout_worker.worker import RolloutWorker

    load = RolloutWorker._load

    def faulty(worker: Any, release: Any) -> None:
        if is_due(release.method, release.step):
            worker._working().forget()
        else:
            load(worker, release)

    RolloutWorker._load = faulty  # type: ignore[method-assign]


if "FAULTS" in os.environ and "lib.rollout_worker" in sys.orig_argv:
    install()
