"""Executed notebooks on disk: written whole, without secrets, and the one of every attempt kept.

Owns what papermill does with its output file. Must not know what a notebook does.

    python -c "from lib.executed import target; print(target('outputs/decisions/notebooks/3_grpo_training.ipynb'))"
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from lib.log import scrub
from lib.runfolder import atomic_file

SCHEME = "executed://"


def target(path: str | Path) -> str:
    """What to give papermill as its output path, so that it writes there through this module."""
    _register()
    return f"{SCHEME}{path}"


def keep_attempt(path: Path) -> Path | None:
    """Move the executed notebook of an attempt that did not reach its end aside, before the next one replaces it."""
    if not path.is_file() or _reached_its_end(path):
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}.attempt-{number}.ipynb")).exists():
        number += 1
    os.replace(path, kept)
    return kept


def _reached_its_end(path: Path) -> bool:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))["metadata"]["papermill"]
        return bool(record.get("end_time")) and not record.get("exception")
    except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or not a notebook
        return False


class _Handler:
    """Papermill's interface to a kind of storage (papermill.iorw): its own local one writes in place and unscrubbed."""

    def read(self, path: str) -> str:
        return Path(path.removeprefix(SCHEME)).read_text(encoding="utf-8")

    def listdir(self, path: str) -> list[str]:
        return [str(child) for child in Path(path.removeprefix(SCHEME)).iterdir()]

    def write(self, text: str, path: str) -> None:
        with atomic_file(Path(path.removeprefix(SCHEME))) as file:
            file.write(scrub(text))

    def pretty_path(self, path: str) -> str:
        return path.removeprefix(SCHEME)


@cache
def _register() -> None:
    from papermill.iorw import papermill_io

    papermill_io.register(SCHEME, _Handler())
