"""Containers that are started together: who leads, who joins, and that no failure of theirs is waited for in vain.

A small process stands in for verl's interpreter (tests/machine_stand_in.py); Modal's context of a container is set by
hand, as its entry point sets it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import modal
import pytest
from machine_stand_in import write
from modal import _cluster

from lib import PROJECT_ROOT, gang
from lib.gang import Gang, GangError, find_gang, join, lead
from lib.keeper import family
from lib.log import SECRETS

HOSTS = ("127.0.0.21", "127.0.0.22")
TOKEN = "8f2a6c" * 10
OF_TWO = Gang(HOSTS, 0, TOKEN)

# A container's whole work, as far as it concerns the gang.
PROGRAM = """
import sys, time
from modal import _cluster
rank, port, python = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
_cluster.current_cluster_context = _cluster.ClusterContext(rank, "cu-1", ["::1"] * 2, {hosts!r}, [])
from lib import gang
gang.PORT, gang.interpreter = port, lambda: python
found = gang.find_gang(2, "a token")
if found.rank:
    gang.join(found)
else:
    with gang.lead(found) as head:
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Of the cluster's head."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv(SECRETS, os.environ.get(SECRETS, ""))  # what is added is taken back
    with socket.create_server((HOSTS[0], 0)) as server:
        monkeypatch.setattr(gang, "PORT", server.getsockname()[1])
    return gang.PORT


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The stand-in, in the manner that the test is parametrised with."""
    path = write(tmp_path / "python", getattr(request, "param", ""))
    monkeypatch.setattr(gang, "interpreter", lambda: str(path))
    return path


def in_manner(manner: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("python", [manner], indirect=True)


def start(rank: int, port: int, python: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.format(hosts=list(HOSTS)), str(rank), str(port), str(python)]
    return subprocess.Popen(
        command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def answers(port: int) -> bool:
    try:
        socket.create_connection((HOSTS[0], port), timeout=1).close()
    except OSError:
        return False
    return True


def is_gone(pids: set[int]) -> bool:
    return not [pid for pid in pids if pid in family(pid)]


# who is who -----------------------------------------------------------------------------------------------------------
def test_one_machine_is_no_gang_and_asks_nobody() -> None:
    assert find_gang(1, "") is None
    with lead(None) as head:
        assert head is None


def test_a_container_knows_its_rank_and_the_heads_ipv4_address(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    context = _cluster.ClusterContext(1, "cu-1", ["fd00::1", "fd00::2"], list(HOSTS), [])
    monkeypatch.setattr(_cluster, "current_cluster_context", context)
    found = find_gang(2, TOKEN)
    assert found == Gang(HOSTS, 1, TOKEN) and found.head == f"{HOSTS[0]}:{port}"
    with pytest.raises(GangError, match=r"3 machines were asked for, and Modal gave 2 addresses: 127\.0\.0\.21"):
        find_gang(3, TOKEN)


def test_a_container_that_is_none_of_a_cluster_says_so() -> None:
    with pytest.raises(modal.exception.InvalidError, match="clustered"):
        find_gang(2, TOKEN)


# the head -------------------------------------------------------------------------------------------------------------
def test_the_head_answers_while_the_block_runs_and_is_gone_after_it(python: Path, port: int) -> None:
    with lead(OF_TWO) as head:
        assert head and head.address == f"{HOSTS[0]}:{port}" and answers(port)
        head.check()
    assert not answers(port)
    with pytest.raises(RuntimeError, match="the notebook broke"), lead(OF_TWO):
        raise RuntimeError("the notebook broke")
    assert not answers(port)


@in_manner("stays")
def test_a_head_that_does_not_end_by_itself_is_killed_before_modal_would_kill_all(python: Path, port: int) -> None:
    with lead(OF_TWO):
        began = time.monotonic()
    assert not answers(port) and time.monotonic() - began < 8


@in_manner("exits")
def test_a_head_that_does_not_start_says_why(python: Path) -> None:
    why = r"Ray's head did not start: it exited with status 1 .*found no address of this machine"
    with pytest.raises(GangError, match=why), lead(OF_TWO):
        pass


@in_manner("deaf")
def test_a_head_that_does_not_answer_is_not_waited_for_for_ever(
    python: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang, "_DEADLINE", 1.5)
    began = time.monotonic()
    why = rf"Ray's head is not ready after \d s: still waiting for an answer at {HOSTS[0]}:{port}"
    with pytest.raises(GangError, match=why), lead(OF_TWO):
        pass
    assert time.monotonic() - began < 10


@in_manner("dies")
def test_a_head_that_dies_while_it_is_needed_is_noticed(python: Path) -> None:
    with lead(OF_TWO) as head:
        assert head
        until = time.monotonic() + 10
        with pytest.raises(GangError, match=r"Ray's head exited with status 1 while it was needed.*lost its disk"):
            while time.monotonic() < until:
                head.check()
                time.sleep(0.1)


# the others -----------------------------------------------------------------------------------------------------------
def test_a_machine_that_joins_first_waits_and_leaves_with_the_head(python: Path, port: int) -> None:
    ended = threading.Event()

    def other() -> None:
        join(Gang(HOSTS, 1, TOKEN))
        ended.set()

    threading.Thread(target=other, daemon=True).start()
    with lead(OF_TWO):
        assert not ended.wait(1.0)
    assert ended.wait(10)


@in_manner("exits")
def test_a_machine_that_cannot_join_says_so_and_leaves_the_word_to_the_leader(
    python: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        join(Gang(HOSTS, 1, TOKEN))
    assert "machine 2: Ray exited with status 1. It said: ValueError: Ray found no address" in caplog.text


# the end of a container -----------------------------------------------------------------------------------------------
def test_an_interrupt_ends_the_head_and_with_it_the_machine_that_joined(python: Path, port: int) -> None:
    other, leader = start(1, port, python), start(0, port, python)
    assert leader.stdout and leader.stdout.readline() == "ready\n"
    below = family(leader.pid)
    assert len(below) >= 3 and other.poll() is None  # the container's program, its keeper, the head
    os.kill(leader.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in leader.communicate(timeout=15)[0] and not answers(port) and is_gone(below)
    said = other.communicate(timeout=15)[0]
    assert other.returncode == 0 and f"machine 2 of 2: lent to the Ray cluster at {HOSTS[0]}:{port}" in said


def test_an_interrupted_machine_takes_what_it_started_with_it(python: Path, port: int) -> None:
    other = start(1, port, python)
    until = time.monotonic() + 15
    while len(below := family(other.pid)) < 3:
        assert time.monotonic() < until, other.communicate(timeout=5)
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in other.communicate(timeout=15)[0] and is_gone(below)


def test_a_leader_that_is_killed_leaves_no_head_behind(python: Path, port: int) -> None:
    leader = start(0, port, python)
    assert leader.stdout and leader.stdout.readline() == "ready\n"
    leader.kill()
    leader.wait()
    until = time.monotonic() + 10
    while answers(port):
        assert time.monotonic() < until, "the head listens still"
        time.sleep(0.1)
