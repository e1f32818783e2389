"""The score ledger: every verdict once, whoever writes it, and nothing lost."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib import PROJECT_ROOT
from lib.ledger import APPLICATION_ID, Ledger, LedgerError, content_key


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_verdict_comes_back_with_its_record(ledger: Ledger) -> None:
    assert ledger.get("k") is None and len(ledger) == 0
    ledger.put("k", "pass", {"reason": "é \u2028 'quoted'", "tokens": 12, "nested": {"a": [1, None]}})
    assert ledger.get("k") == {
        "verdict": "pass",
        "reason": "é \u2028 'quoted'",
        "tokens": 12,
        "nested": {"a": [1, None]},
    }
    assert len(ledger) == 1


def test_a_ledger_is_still_there_when_it_is_opened_again(ledger: Ledger) -> None:
    ledger.put("k", "fail", {})
    again = Ledger(str(ledger.path))
    assert again.get("k") == {"verdict": "fail"}


@pytest.mark.parametrize("first", ["pass", "fail"])
@pytest.mark.parametrize("second", ["pass", "fail", "unknown"])
def test_the_first_known_verdict_stays(ledger: Ledger, first: str, second: str) -> None:
    ledger.put("k", first, {"n": 1})
    ledger.put("k", second, {"n": 2})
    assert ledger.get("k") == {"verdict": first, "n": 1} and len(ledger) == 1


@pytest.mark.parametrize("second", ["pass", "fail", "unknown"])
def test_an_unknown_verdict_is_replaced(ledger: Ledger, second: str) -> None:
    ledger.put("k", "unknown", {"error": "timeout"})
    ledger.put("k", second, {"n": 2})
    assert ledger.get("k") == {"verdict": second, "n": 2}


def test_what_is_not_json_is_refused_and_leaves_no_trace(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="JSON"):
        ledger.put("k", "pass", {"x": math.nan})
    with pytest.raises(TypeError):
        ledger.put("k", "pass", {"x": {1, 2}})
    assert ledger.get("k") is None


def test_a_verdict_is_one_of_three(ledger: Ledger) -> None:
    with pytest.raises((ValueError, LedgerError)):
        ledger.put("k", "Unknown", {})


def test_the_key_counts_parts_their_order_and_their_borders() -> None:
    keys = {
        content_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("", "ab"), ('a", "b',), ())
    }
    assert len(keys) == 7
    assert content_key("a", "b") == content_key("a", "b")


# -- many writers -----------------------------------------------------------------------------------------------------


def test_threads_writing_at_once_lose_nothing(ledger: Ledger) -> None:
    def write(thread: int) -> None:
        for i in range(40):
            ledger.put(f"{thread}-{i}", "pass", {"thread": thread})
            ledger.put("shared", "unknown" if i < 39 else "pass", {"thread": thread})
            assert ledger.get(f"{thread}-{i}") == {"verdict": "pass", "thread": thread}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(ledger) == 8 * 40 + 1
    shared = ledger.get("shared")
    assert shared is not None and shared["verdict"] == "pass"


WRITE = """
    import sys
    from lib.ledger import Ledger
    ledger = Ledger(sys.argv[1])
    for i in range(150):
        ledger.put(f"{sys.argv[2]}-{i}", "pass", {"writer": sys.argv[2]})
        ledger.put(f"shared-{i}", ("unknown", "fail", "pass")[i % 3], {"writer": sys.argv[2]})
"""


def test_processes_writing_at_once_lose_nothing(ledger: Ledger) -> None:
    writers = [start(WRITE, ledger.path, n) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert len(ledger) == 4 * 150 + 150
    for i in range(150):
        shared = ledger.get(f"shared-{i}")
        assert shared is not None and shared["verdict"] == ("unknown", "fail", "pass")[i % 3]
        assert all(ledger.get(f"{n}-{i}") == {"verdict": "pass", "writer": str(n)} for n in range(4))


def test_a_new_ledger_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for i in range(40):
        barrier = threading.Barrier(6)

        def open_it(_: int, path: Path = tmp_path / f"{i}.sqlite", barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            return len(Ledger(path))

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(open_it, range(6))) == [0] * 6


def test_opening_waits_for_a_process_that_is_making_the_ledger(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    threading.Timer(0.3, other.execute, ["COMMIT"]).start()
    try:
        assert len(Ledger(tmp_path / "l.sqlite")) == 0
    finally:
        time.sleep(0.4)
        other.close()


def test_a_reader_does_not_wait_for_a_writer(ledger: Ledger) -> None:
    ledger.put("k", "pass", {})
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert ledger.get("k") == {"verdict": "pass"}
    assert time.monotonic() - started < 10  # it would wait half a minute
    other.execute("ROLLBACK")
    other.close()


# -- accidents --------------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_every_verdict_it_finished(ledger: Ledger) -> None:
    code = """
        import itertools, sys
        from lib.ledger import Ledger
        ledger = Ledger(sys.argv[1])
        for i in itertools.count():
            ledger.put(str(i), "pass", {"text": "x" * 500})
            print(i, flush=True)
    """
    writer = start(code, ledger.path)
    assert writer.stdout is not None
    for line in itertools.islice(writer.stdout, 200):
        done = int(line)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    again = Ledger(ledger.path)
    assert all(again.get(str(i)) == {"verdict": "pass", "text": "x" * 500} for i in range(done + 1))
    again.put("after", "fail", {})
    assert sqlite3.connect(ledger.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def foreign(path: Path, application_id: int = 0) -> None:
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA application_id = {application_id}")
        other.execute("CREATE TABLE theirs (x)")
    other.close()


@pytest.mark.parametrize("application_id", [0, 252006673])
def test_another_programs_file_is_refused_and_not_touched(tmp_path: Path, application_id: int) -> None:
    path = tmp_path / "theirs.sqlite"
    foreign(path, application_id)
    before = path.read_bytes()
    with pytest.raises(
        LedgerError, match=r"theirs\.sqlite is an SQLite file of another program: give the ledger a path of its own"
    ):
        Ledger(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["theirs.sqlite"]


@pytest.mark.parametrize("content", [b"not a database " * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    with pytest.raises(
        LedgerError, match=r"ledger\.sqlite cannot be read as a ledger \(.*\): move it away, or restore a copy"
    ):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_path_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"nowhere/ledger\.sqlite cannot be read as a ledger"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


def test_damage_in_the_middle_is_told_as_damage(ledger: Ledger) -> None:
    for i in range(300):
        ledger.put(str(i), "pass", {"text": "x" * 500})
    code = "import sys, sqlite3; sqlite3.connect(sys.argv[1]).execute('PRAGMA wal_checkpoint(TRUNCATE)')"
    assert start(code, ledger.path).wait(30) == 0
    data = ledger.path.read_bytes()
    broken = ledger.path.with_name("broken.sqlite")
    broken.write_bytes(data[:8192] + b"\xff" * (len(data) - 12288) + data[-4096:])
    damaged = Ledger(broken)
    with pytest.raises(LedgerError, match=r"broken\.sqlite"):
        for i in range(300):
            damaged.get(str(i))
