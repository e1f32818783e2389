"""What tests share: where the real data is, and one run of the whole chain that several files look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib import PROJECT_ROOT

SMOKE = "configs/smoke/decisions.yaml"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data beside the checkout; tests that need it skip with this reason where it is absent."""
    folder = PROJECT_ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("shared/ is absent: the real data lies beside the checkout, not in it")
    return folder


def run_cli(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m lib.run ...` as a user's shell would run it."""
    command = [sys.executable, "-m", "lib.run", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for this session's runs and its starter policy."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def places(workspace: Path) -> list[str]:
    """Command-line parameters that keep runs out of the checkout's own outputs/."""
    return ["-p", f"paths.outputs={workspace / 'outputs'}", "-p", f"paths.cache={workspace / 'cache'}"]


@pytest.fixture(scope="session")
def chain(workspace: Path, places: list[str]) -> tuple[Path, str]:
    """The whole chain on the smoke config, run once from the command line: (run folder, what the terminal showed)."""
    done = run_cli("all", SMOKE, "-p", "run_name=chain", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "outputs" / "chain", done.stdout
