"""Machines with disks of their own in a Ray cluster: how they come together, what travels, how they end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from through_verl import is_there
from two_machines import Pair, two_machines

from lib import PROJECT_ROOT
from lib.hosts import free_port
from lib.keeper import family


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, verl_python: str, bubblewrap: None) -> Iterator[Pair]:
    with two_machines(verl_python, tmp_path_factory.mktemp("pair")) as made:
        yield made


@pytest.fixture(scope="module")
def found(pair: Pair, verl_python: str) -> dict[str, Any]:
    """What a driver on the first machine makes of them."""
    run = pair.folder / "run"
    run.mkdir()
    command = [verl_python, str(PROJECT_ROOT / "tests" / "verl_machines_program.py"), pair.address, str(run)]
    environment = os.environ | pair.environment
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *said, last = done.stdout.splitlines()
    answer: dict[str, Any] = json.loads(last)
    return answer | {"said": said}


def test_a_machine_that_does_not_see_the_run_folder_is_known(found: dict[str, Any]) -> None:
    assert found["staged"] and found["apart"] == 1
    assert "1 of 1 other machines have disks of their own: files go through Ray" in found["said"]


def test_folders_go_to_it_and_come_back_whole_with_its_own_part(found: dict[str, Any]) -> None:
    assert found["there"] == ["deep/rank_0.pt", "deep/rank_1.pt", "empty"]
    assert found["brought"] == {"deep/rank_0.pt": bytes(range(50)).hex(), "deep/rank_1.pt": "31" * 11, "empty": ""}
    assert found["source"] == ["deep/rank_0.pt", "empty"], "what was sent is untouched"


def test_nothing_of_it_stays_there(found: dict[str, Any], pair: Pair) -> None:
    assert found["left"] == []
    assert not (pair.disk / "run").exists(), "the other machine wrote where the run folder is here"


def test_machines_that_do_not_come_are_waited_for_and_counted(found: dict[str, Any]) -> None:
    assert "verl.nodes is 3, and 2 machines with 1 GPUs were in the Ray cluster" in found["refused"]


def test_a_machine_leaves_once_the_head_is_gone(found: dict[str, Any], pair: Pair) -> None:
    assert pair.member.poll() is None, "it left before its time"
    below = family(pair.head.pid) | family(pair.member.pid)
    pair.head.terminate()
    assert pair.head.wait(60) == 0
    assert pair.member.wait(60) == 0
    assert len(below) > 4
    until = time.monotonic() + 20
    while any(map(is_there, below)):
        assert time.monotonic() < until, "Ray's processes are still there"
        time.sleep(0.2)


def test_a_machine_whose_head_never_comes_says_so(verl_python: str) -> None:
    where = f"127.0.0.1:{free_port()}"
    command = [verl_python, "-m", "lib.verl.machine", "join", where, "--address", "127.0.0.1", "--patience", "1"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and f"no Ray head answered at {where} within 1 s" in done.stderr
