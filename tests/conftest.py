"""What tests share: where the real data is, and one run of the whole chain that several files look at."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import Cloud, cloud_of
from judge_server import JudgeServer, running_judge

from lib import PROJECT_ROOT
from lib.verl.environment import PLACE

SMOKE = "configs/smoke/decisions.yaml"


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: tests interrupt them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data beside the checkout; tests that need it skip with this reason where it is absent."""
    folder = PROJECT_ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("shared/ is absent: the real data lies beside the checkout, not in it")
    return folder


def run_cli(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m lib.run ...` as a user's shell would run it."""
    command = [sys.executable, "-m", "lib.run", *arguments]
    env = os.environ | environment
    return subprocess.run(
        command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=env
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for this session's runs and its starter policy."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def places(workspace: Path) -> list[str]:
    """Command-line parameters that keep runs out of the checkout's own outputs/."""
    return ["-p", f"paths.outputs={workspace / 'outputs'}", "-p", f"paths.cache={workspace / 'cache'}"]


@pytest.fixture(scope="session")
def verl_python() -> str:
    """The interpreter of verl's environment; $VERL_PYTHON names another one."""
    made = os.environ.get("VERL_PYTHON") or str(PLACE / "bin" / "python")
    if not Path(made).is_file():
        assert not os.environ.get("CI"), "verl's environment is not made: `make test` makes it, so CI must have it"
        pytest.skip("verl's environment is not made (make verl)")
    return made


WITNESS = """
import ipaddress, os, sys

def witness(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    try:
        if host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    with open(os.environ["WITNESS_FILE"], "a") as file:
        file.write(f"{event} {host} by {sys.argv}\\n")

sys.addaudithook(witness)
"""


@pytest.fixture(scope="session")
def chain(workspace: Path, places: list[str]) -> tuple[Path, str]:
    """The whole chain on the smoke config, run once from the command line: (run folder, what the terminal showed).

    A witness in every Python process of it notes each host beyond loopback that is looked up or connected to.
    """
    (workspace / "sitecustomize.py").write_text(WITNESS)
    witness = {"PYTHONPATH": str(workspace), "WITNESS_FILE": str(workspace / "hosts.txt")}
    done = run_cli("all", SMOKE, "-p", "run_name=chain", *places, **witness)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "outputs" / "chain", done.stdout


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """bubblewrap makes mount trees here."""
    works = ["bwrap", "--ro-bind", "/", "/", "--unshare-pid", "true"]
    if not shutil.which("bwrap") or subprocess.run(works, capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "bubblewrap does not work: `make test` installs it, so CI must have it"
        pytest.skip("bubblewrap is missing or may not make namespaces: apt-get install bubblewrap")


@pytest.fixture(scope="session")
def cloud(shared: Path, bubblewrap: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Modal on loopback: the real client against a server that runs function bodies in mount trees of their own."""
    with cloud_of(shared, tmp_path_factory.mktemp("cloud")) as running:
        yield running


@pytest.fixture(scope="module")
def shared_server() -> Iterator[JudgeServer]:
    """A judge of its own for every test file that asks one."""
    with running_judge() as server:
        yield server


@pytest.fixture
def server(shared_server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> JudgeServer:
    """The judge, well-behaved and with nothing counted; no run."""
    shared_server.control(reset=True)
    monkeypatch.delenv("WORKBENCH_RUN", raising=False)
    return shared_server


@pytest.fixture
def wandb_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """wandb, offline, writing here. It reads its settings once in a process: both ends of the test forget them."""
    import wandb

    wandb.teardown()
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("PROJECT", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what the test leaves there is taken back
        monkeypatch.delenv(f"WANDB_{name}")
    yield tmp_path
    wandb.teardown()
