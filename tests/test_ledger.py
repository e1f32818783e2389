"""The score ledger: every verdict once, whoever writes it, and nothing lost."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT, places
from lib.ledger import APPLICATION_ID, SCHEMA, Entry, Ledger, LedgerError, Verdict, hash_text, open_ledger, verdict_key

PASS = Verdict("pass", 1.0, "because", 0.0125, 1.5, 2)
FAIL = Verdict("fail", 0.25, "not quite", None, 0.5, 1)
UNKNOWN = Verdict("unknown", None, "judge: HTTP 503 after 5 attempts", None, 9.0, 5)
VERDICTS = {verdict.verdict: verdict for verdict in (PASS, FAIL, UNKNOWN)}


def entry(key: str, verdict: Verdict = PASS, **changes: str) -> Entry:
    made = Entry(key, verdict, "ace-1", "row-7", "Names the law", "gpt-4o-mini", "1", hash_text("an answer"))
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run and no container around the tests."""
    for name in (places.LEDGER, places.RUN, places.DATA):
        monkeypatch.delenv(name, raising=False)


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def ask(path: Path, question: str) -> list[Any]:
    """What SQLite itself says about a file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(question).fetchall()
    finally:
        connection.close()


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [PASS, FAIL, UNKNOWN, Verdict("fail", 0.0), Verdict("pass", 0.5)])
def test_a_verdict_comes_back_as_it_was(ledger: Ledger, verdict: Verdict) -> None:
    assert ledger.get("k") is None and len(ledger) == 0
    ledger.put([entry("k", verdict)])
    assert ledger.get("k") == verdict and len(ledger) == 1
    assert Ledger(str(ledger.path)).get("k") == verdict


def test_many_come_back_by_key_and_what_is_not_there_does_not(ledger: Ledger) -> None:
    ledger.put(entry(str(i), PASS._replace(attempts=i)) for i in range(1200))
    found = ledger.get_many(str(i) for i in range(0, 2400, 2))
    assert found == {str(i): PASS._replace(attempts=i) for i in range(0, 1200, 2)}
    assert ledger.get_many([]) == {} and ledger.get_many(["5", "5"]).keys() == {"5"}


@pytest.mark.parametrize("first", ["pass", "fail"])
@pytest.mark.parametrize("second", ["pass", "fail", "unknown"])
def test_the_first_known_verdict_stays(ledger: Ledger, first: str, second: str) -> None:
    ledger.put([entry("k", VERDICTS[first]._replace(reasons="first"))])
    ledger.put([entry("k", VERDICTS[second]._replace(reasons="second"))])
    assert ledger.get("k") == VERDICTS[first]._replace(reasons="first") and len(ledger) == 1


@pytest.mark.parametrize("second", ["pass", "fail", "unknown"])
def test_an_unknown_verdict_is_replaced_with_all_that_belongs_to_it(ledger: Ledger, second: str) -> None:
    ledger.put([entry("k", UNKNOWN, row="old")])
    ledger.put([entry("k", VERDICTS[second]._replace(reasons="second"), row="new")])
    assert ledger.get("k") == VERDICTS[second]._replace(reasons="second")
    assert [row["row"] for row in ledger.rows()] == ["new"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Verdict("pass", None), "verdict 'pass' with score None: this score means 'unknown'"),
        (Verdict("unknown", 0.0), "this score means 'fail'"),
        (Verdict("pass", 0.4), "this score means 'fail'"),
        (Verdict("fail", 0.5), "this score means 'pass'"),
        (Verdict("Pass", 1.0), "verdict 'Pass'"),  # type: ignore[arg-type]
        (Verdict("pass", 1.1), "score 1.1: a number from 0 to 1, or None when unknown"),
        (Verdict("fail", -0.1), "score -0.1"),
        (Verdict("fail", math.nan), "score nan"),
        (PASS._replace(usd=math.inf), "usd, seconds, attempts"),
        (PASS._replace(seconds=-1.0), "usd, seconds, attempts"),
    ],
)
def test_a_verdict_that_cannot_be_is_refused_and_nothing_of_its_lot_is_kept(
    ledger: Ledger, wrong: Verdict, message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ledger.put([entry("good"), entry("bad", wrong)])
    assert len(ledger) == 0


def test_a_lot_that_breaks_off_in_the_database_is_not_kept_in_part(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.ProgrammingError):
        ledger.put([entry("good"), entry("bad", row={"a": 1})])  # type: ignore[arg-type]
    assert len(ledger) == 0
    ledger.put([entry("good")])
    assert ledger.get("good") == PASS


@pytest.mark.parametrize("text", ["é \u2028 'quoted' \"double\"", "NUL \0 in it", "x" * 100_000, "\N{PILE OF POO}", ""])
def test_any_text_is_kept_to_the_letter(ledger: Ledger, text: str) -> None:
    ledger.put([entry("k", PASS._replace(reasons=text), row=text)])
    found = ledger.get("k")
    assert found is not None and found.reasons == text and next(ledger.rows())["row"] == text


def test_a_lone_surrogate_is_spelled_out(ledger: Ledger) -> None:
    ledger.put([entry("k", PASS._replace(reasons="half \ud83d here"))])
    found = ledger.get("k")
    assert found is not None and found.reasons == "half \\ud83d here"


def test_what_others_write_is_seen_though_known_verdicts_are_kept_at_hand(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.ledger._MOST_REMEMBERED", 10)
    other = Ledger(ledger.path)
    keys = [str(i) for i in range(30)]
    for verdict in (UNKNOWN, PASS):
        for key in keys:
            other.put([entry(key, verdict)])
            assert ledger.get(key) == verdict and ledger.get_many([key]) == {key: verdict}
        assert ledger.get_many(keys) == dict.fromkeys(keys, verdict)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_counts_every_part_their_order_and_their_borders() -> None:
    parts = ["ace-1", "criterion", "judge", "1", hash_text("answer"), "question"]
    others = [[*parts[:i], parts[i] + "x", *parts[i + 1 :]] for i in range(6)]
    others += [parts[:5], [*parts, ""], [*parts, "1"], ["ace-", "1criterion", *parts[2:]], ["ace-11", *parts[1:]]]
    others += [["1:a", "b", "", "", ""], ["1", ":a", "b", "", ""], ["a\0b", "", "", "", ""], ["a", "b", "", "", ""]]
    keys = [verdict_key(*other) for other in [parts, *others]]
    assert len(set(keys)) == len(keys)
    assert verdict_key(*parts) == keys[0]


def test_the_key_is_the_same_in_every_process_and_version() -> None:
    assert verdict_key("ace-1", "Ä", "gpt-4o-mini", "1", "0" * 64) == "03ec32d8a0ed0ff8120294d8f9f4bbc2"


def test_any_text_has_a_hash_and_a_key() -> None:
    texts = ["", "\0", "\ud83d", "\ud83d\ude00", "😀", "x" * 100_000]
    assert len({hash_text(text) for text in texts}) == len({verdict_key("", text, "", "", "") for text in texts}) == 6


# -- which file -------------------------------------------------------------------------------------------------------


def test_a_process_has_one_ledger_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = open_ledger(str(tmp_path / "a.sqlite"))
    assert open_ledger(str(tmp_path / "." / "a.sqlite")) is one is not open_ledger(str(tmp_path / "b.sqlite"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert open_ledger(str(tmp_path / "link" / "a.sqlite")) is one
    monkeypatch.setenv(places.RUN, str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    assert open_ledger().path == tmp_path / "run" / "ledger.sqlite"
    assert open_ledger(str(tmp_path / "a.sqlite")) is one


def test_a_relative_path_counts_from_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = os.path.relpath(tmp_path / "a.sqlite", PROJECT_ROOT)
    assert open_ledger(there).path == tmp_path / "a.sqlite"


def test_in_a_container_the_ledger_on_its_own_disk_wins_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(places.LEDGER, str(tmp_path / "own.sqlite"))
    monkeypatch.setenv(places.RUN, str(tmp_path))
    shared = str(tmp_path / "shared.sqlite")
    with caplog.at_level(logging.INFO, "lib.ledger"):
        assert open_ledger().path == tmp_path / "own.sqlite" and caplog.messages == []
        assert open_ledger(shared) is open_ledger(shared) is open_ledger()
    assert len(caplog.messages) == 1 and f"{shared} is not used" in caplog.messages[0]


def test_without_run_and_path_the_ledger_is_temporary() -> None:
    code = """
        from lib.ledger import open_ledger
        assert open_ledger() is open_ledger()
        print(open_ledger().path)
    """
    with start(code) as process:
        assert process.stdout is not None
        path = Path(process.stdout.read().strip())
    assert process.returncode == 0 and path.name == "ledger.sqlite" and not path.parent.exists()


def test_a_ledger_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"there is no folder .*nowhere: make it, or correct the path"):
        open_ledger(str(tmp_path / "nowhere" / "ledger.sqlite"))


# -- many writers -----------------------------------------------------------------------------------------------------


def test_threads_writing_at_once_lose_nothing(ledger: Ledger) -> None:
    def write(thread: int) -> None:
        for i in range(40):
            verdict = PASS._replace(attempts=thread)
            ledger.put([entry(f"{thread}-{i}", verdict), entry("shared", UNKNOWN if i < 39 else PASS)])
            assert ledger.get(f"{thread}-{i}") == verdict

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(ledger) == 8 * 40 + 1 and ledger.get("shared") == PASS


WRITE = """
    import sys
    from lib.ledger import Entry, Ledger, Verdict
    ledger = Ledger(sys.argv[1])
    verdicts = [Verdict("unknown", None), Verdict("fail", 0.0), Verdict("pass", 1.0)]
    for i in range(150):
        keys = {f"{sys.argv[2]}-{i}": verdicts[2], f"shared-{i}": verdicts[i % 3]}
        ledger.put(Entry(key, verdict, "t", sys.argv[2], "c", "j", "1", "") for key, verdict in keys.items())
"""


def test_processes_writing_at_once_lose_nothing(ledger: Ledger) -> None:
    writers = [start(WRITE, ledger.path, n) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    rows = {row["key"]: row for row in ledger.rows()}
    assert len(rows) == len(ledger) == 4 * 150 + 150
    assert all(rows[f"{n}-{i}"]["row"] == str(n) for n in range(4) for i in range(150))
    assert all(rows[f"shared-{i}"]["verdict"] == ("unknown", "fail", "pass")[i % 3] for i in range(150))


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
    timer = threading.Timer(0.3, other.execute, ["COMMIT"])
    timer.start()
    try:
        assert len(Ledger(tmp_path / "l.sqlite")) == 0
    finally:
        timer.join()
        other.close()


def test_a_reader_does_not_wait_for_a_writer(ledger: Ledger) -> None:
    ledger.put([entry("k")])
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert ledger.get("k") == PASS
    assert time.monotonic() - started < 10  # it would wait half a minute
    other.execute("ROLLBACK")
    other.close()


def test_rows_may_be_written_while_rows_are_read(ledger: Ledger) -> None:
    ledger.put(entry(str(i)) for i in range(1500))
    ledger.put([entry("early", UNKNOWN)])
    seen = []
    for row in ledger.rows():
        if not seen:
            ledger.put([entry("early", FAIL), entry("late")])
        seen.append((row["key"], row["verdict"]))
    assert seen == [*((str(i), "pass") for i in range(1500)), ("early", "fail"), ("late", "pass")]


def write_some(ledger: Ledger, name: str) -> None:
    for i in range(50):
        ledger.put([entry(f"{name}-{i}")])
        assert ledger.get(f"{name}-{i}") == PASS and ledger.get("before") == PASS


def test_a_ledger_may_be_used_on_both_sides_of_a_fork(ledger: Ledger) -> None:
    ledger.put([entry("before")])
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=write_some, args=(ledger, f"child {n}")) for n in range(3)]
    stop = threading.Event()

    def keep_busy() -> None:  # forks come while another thread is inside
        while not stop.is_set():
            ledger.get_many(["before"])

    busy = threading.Thread(target=keep_busy)
    busy.start()
    for child in children:
        child.start()
    write_some(ledger, "parent")
    for child in children:
        child.join(60)
    stop.set()
    busy.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(ledger) == 1 + 4 * 50


def test_a_child_of_a_fork_holds_locks_of_its_own(ledger: Ledger) -> None:
    # SQLite notes a process's locks in its memory, which a fork copies without the locks: with a connection open across
    # it, the last other process to close the file would take the log away from under the child.
    code = """
        import os, sys
        from lib.ledger import Entry, Ledger, Verdict
        ledger = Ledger(sys.argv[1])
        put = lambda key: ledger.put([Entry(key, Verdict("pass", 1.0), "t", "r", "c", "j", "1", "")])
        put("parent")
        ready, go = os.pipe(), os.pipe()
        if os.fork() == 0:
            put("child 1")
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            put("child 2")
            os._exit(0)
        os.read(ready[0], 1)
        ledger.close()  # the parent is done: not the last one
        ledger = Ledger(sys.argv[1])
        ledger.close()
        print(os.path.exists(sys.argv[1] + "-wal"), flush=True)
        os.write(go[1], b"x")
        os.wait()
    """
    ledger.close()
    with start(code, ledger.path) as process:
        assert process.stdout is not None and process.stdout.read() == "True\n"
    assert {row["key"] for row in ledger.rows()} == {"parent", "child 1", "child 2"}


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_backup_is_whole_without_the_log_beside_it(ledger: Ledger, tmp_path: Path) -> None:
    ledger.put(entry(str(i)) for i in range(300))
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "ledger.sqlite"
    target.write_text("what was there before")
    ledger.backup(target)
    ledger.put([entry("later")])
    assert os.listdir(target.parent) == ["ledger.sqlite"]  # and nothing half-written
    assert ask(target, "PRAGMA integrity_check") == [("ok",)] and ask(target, "PRAGMA journal_mode") == [("delete",)]
    alone = tmp_path / "alone.sqlite"
    shutil.copyfile(target, alone)
    assert len(Ledger(alone)) == 300 and Ledger(alone).get("7") == PASS
    ledger.backup(target)
    assert len(Ledger(target)) == 301


def test_a_backup_while_others_write_holds_every_lot_whole(ledger: Ledger, tmp_path: Path) -> None:
    writers = [start(WRITE, ledger.path, n) for n in range(2)]
    copies = 0
    while any(writer.poll() is None for writer in writers):
        ledger.backup(tmp_path / "copy.sqlite")
        copies += 1
        rows = ask(tmp_path / "copy.sqlite", "SELECT key FROM verdicts")
        keys = {key for (key,) in rows}
        assert all(f"shared-{key.split('-')[1]}" in keys for key in keys)
    assert copies and [writer.wait(60) for writer in writers] == [0, 0]


def test_a_backup_that_fails_leaves_the_last_one(ledger: Ledger, tmp_path: Path) -> None:
    ledger.put([entry("k")])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "copy.sqlite").mkdir()  # a file cannot take its place
    with pytest.raises(OSError, match=r"copy\.sqlite"):
        ledger.backup(tmp_path / "there" / "copy.sqlite")
    assert os.listdir(tmp_path / "there") == ["copy.sqlite"] and ledger.get("k") == PASS


def test_merging_brings_what_is_not_known_and_keeps_what_is(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.sqlite")
    ledger.put([entry("both", PASS), entry("solved there", UNKNOWN), entry("solved here", PASS), entry("mine", FAIL)])
    other.put([entry("both", FAIL), entry("solved there", FAIL), entry("solved here", UNKNOWN), entry("theirs", PASS)])
    written = {row["key"]: row["written"] for row in other.rows()}
    assert ledger.merge(other.path) == 2
    keys = ("both", "solved there", "solved here", "mine", "theirs")
    assert ledger.get_many(keys) == dict(zip(keys, (PASS, FAIL, PASS, FAIL, PASS), strict=True))
    assert {row["key"]: row["written"] for row in ledger.rows()}["theirs"] == written["theirs"]
    assert ledger.merge(other.path) == 0 and ledger.merge(ledger.path) == 0 and len(other) == 4


def test_of_two_unknown_verdicts_merging_keeps_the_later(ledger: Ledger, tmp_path: Path) -> None:
    early, late = Ledger(tmp_path / "early.sqlite"), Ledger(tmp_path / "late.sqlite")
    for other, cause in ((early, "early"), (ledger, "mine"), (late, "late")):
        other.put([entry("k", UNKNOWN._replace(reasons=cause))])
    assert [ledger.merge(early.path), ledger.merge(late.path), ledger.merge(late.path)] == [0, 1, 0]
    assert ledger.get("k") == UNKNOWN._replace(reasons="late")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "no such ledger"), ("foreign", "file of another program"), ("damaged", "cannot be read as a ledger")],
)
def test_only_a_ledger_is_merged(ledger: Ledger, tmp_path: Path, kind: str, message: str) -> None:
    other = tmp_path / "other.sqlite"
    if kind == "foreign":
        foreign(other)
    elif kind == "damaged":
        other.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    ledger.put([entry("k")])
    with pytest.raises(LedgerError, match=rf"other\.sqlite.* {message}"):
        ledger.merge(other)
    assert len(ledger) == 1 and other.exists() == (kind != "missing")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_exported_table_reads_back(ledger: Ledger, tmp_path: Path, ending: str) -> None:
    import pandas

    ledger.put([entry("a", UNKNOWN), entry("b", FAIL._replace(reasons='two\nlines, "quoted"; é')), entry("c")])
    path = ledger.export(tmp_path / f"verdicts.{ending}")
    table = pandas.read_parquet(path) if ending == "parquet" else pandas.read_csv(path)
    want = pandas.DataFrame(ledger.rows())
    assert list(table.columns) == list(want.columns) and table["written"].between(1.7e9, 4e9).all()
    pandas.testing.assert_frame_equal(
        table.astype(object), want.astype({"prompt": table["prompt"].dtype}).astype(object), check_dtype=False
    )
    assert sorted(os.listdir(tmp_path)) == ["ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal", path.name]


def test_an_export_without_a_known_price_has_a_column_of_numbers_still(ledger: Ledger, tmp_path: Path) -> None:
    import pyarrow.parquet

    for lot, path in ((FAIL, "one.parquet"), (UNKNOWN, "two.parquet")):
        ledger.put([entry(path, lot)])
        kinds = {field.name: str(field.type) for field in pyarrow.parquet.read_schema(ledger.export(tmp_path / path))}
        assert kinds["usd"] == kinds["score"] == "double" and kinds["attempts"] == "int64"


def test_an_export_names_its_kind_by_its_ending(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"verdicts\.xlsx: the name must end in \.parquet or \.csv"):
        ledger.export(tmp_path / "verdicts.xlsx")


# -- accidents --------------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_every_verdict_it_finished(ledger: Ledger) -> None:
    code = """
        import itertools, sys
        from lib.ledger import Entry, Ledger, Verdict
        ledger = Ledger(sys.argv[1])
        for i in itertools.count():
            keys = [f"{i}-{n}" for n in range(3)]
            ledger.put(Entry(key, Verdict("pass", 1.0, "x" * 500), "t", "r", "c", "j", "1", "") for key in keys)
            print(i, flush=True)
    """
    writer = start(code, ledger.path)
    assert writer.stdout is not None
    for line in itertools.islice(writer.stdout, 200):
        done = int(line)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    kept = {row["key"] for row in Ledger(ledger.path).rows()}
    assert kept >= {f"{i}-{n}" for i in range(done + 1) for n in range(3)}
    assert len(kept) % 3 == 0  # and no lot in part
    ledger.put([entry("after", FAIL)])
    assert ask(ledger.path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("new", [False, True])
def test_verdicts_go_on_into_the_path_when_the_file_was_removed(ledger: Ledger, new: bool) -> None:
    ledger.put([entry("old")])
    for path in list(ledger.path.parent.iterdir()):
        path.unlink()
    if new:
        Ledger(ledger.path).put([entry("by another")])
    ledger.put([entry("k")])
    assert {row["key"] for row in Ledger(ledger.path).rows()} == {"k", *(["by another"] if new else [])}
    assert ledger.get("k") == PASS and ledger.get("old") is None


def test_who_removes_the_file_has_everything_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    open_ledger(str(path)).put([entry("k")])
    assert open_ledger(str(path)).get("k") == PASS
    for file in list(tmp_path.iterdir()):
        file.unlink()
    assert open_ledger(str(path)).get("k") is None


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


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (SCHEMA + 1, f"was written by a newer workbench (format {SCHEMA + 1}, this one knows {SCHEMA}): update this"),
        (0, "is a ledger of an older workbench (format 0): move it away"),
    ],
)
def test_a_ledger_of_another_format_is_refused_and_not_touched(ledger: Ledger, version: int, message: str) -> None:
    ledger.put([entry("k")])
    ledger.close()
    ask(ledger.path, f"PRAGMA user_version = {version}")
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError) as told:
        Ledger(ledger.path)
    assert message in str(told.value) and ledger.path.read_bytes() == before


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
    with pytest.raises(LedgerError, match=r"nowhere/ledger\.sqlite cannot be used as a ledger \(.*\): name a file in"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


def test_a_full_disk_is_told_as_such(ledger: Ledger) -> None:
    assert ledger._connection is not None
    ledger._connection.execute("PRAGMA max_page_count = 20")  # SQLite says the same as of a disk without space
    with pytest.raises(LedgerError, match=r"cannot be used as a ledger \(.*full\): the disk is full: free some space"):
        ledger.put(entry(str(i), PASS._replace(reasons="x" * 500)) for i in range(300))
    assert len(ledger) == 0


def test_a_limit_of_the_system_is_a_sentence_and_loses_nothing_that_was_kept(ledger: Ledger) -> None:
    code = """
        import resource, signal, sys
        from lib.ledger import Entry, Ledger, LedgerError, Verdict
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        ledger = Ledger(sys.argv[1])
        try:
            for i in range(1000):
                ledger.put([Entry(str(i), Verdict("pass", 1.0, "x" * 500), "t", "r", "c", "j", "1", "")])
        except LedgerError as error:
            print(error)
            print(i, len(ledger))
    """
    with start(code, ledger.path) as process:
        assert process.stdout is not None
        message, counts = process.stdout.read().splitlines()
    done, kept = map(int, counts.split())
    assert "cannot be used as a ledger" in message and "space" in message
    assert 0 < done == kept == len(ledger)


def test_damage_in_the_middle_is_told_as_damage(ledger: Ledger) -> None:
    ledger.put(entry(str(i), PASS._replace(reasons="x" * 500)) for i in range(300))
    ledger.close()
    data = ledger.path.read_bytes()
    broken = ledger.path.with_name("broken.sqlite")
    broken.write_bytes(data[:8192] + b"\xff" * (len(data) - 12288) + data[-4096:])
    with pytest.raises(LedgerError, match=r"broken\.sqlite.*move it away, or restore a copy"):
        list(Ledger(broken).rows())
