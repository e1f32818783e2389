"""Servers that misbehave: each is a small real process, started, watched and ended as the engine is."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lib.program
from lib import PROJECT_ROOT, hosts
from lib.hosts import Server, free_port, listeners, start
from lib.keeper import family
from lib.program import ProgramError, explain

SERVE = """
import http.server, os, socketserver, subprocess, sys, time

class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True

def serve(port=None):
    Server(("127.0.0.1", port or int(sys.argv[1])), Ready).serve_forever()
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="process trees are seen through /proc")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.program, "FIRST_WAIT", 0.05)


def program(folder: Path, body: str, **values: Any) -> Server:
    """A server whose program is SERVE and then `body`; its port is sys.argv[1]."""
    code = SERVE + textwrap.dedent(body)
    settings = {"name": "engine", "log": folder / "engine.log", "deadline": 15.0, "grace": 1.0, **values}
    return Server(command=lambda port: [sys.executable, "-c", code, str(port)], **settings)


def running(pids: set[int]) -> set[int]:
    """Those of the processes that live."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found |= {pid} if state not in "ZX" else set()
    return found


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


@contextmanager
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


# -- a start ----------------------------------------------------------------------------------------------------------


def test_a_server_is_started_on_a_free_port_waited_for_and_ended(tmp_path: Path) -> None:
    with start(program(tmp_path, "time.sleep(0.5); print('up'); serve()")) as host:
        assert host.process.is_alive() and host.is_ready() and host.address == f"http://127.0.0.1:{host.port}"
        assert host.process.tail() == ["up"]
        host.check()
        pids = host.process.pids()
    assert not host.process.is_alive() and not host.is_ready()
    assert not running(pids)
    host.close()


def test_what_is_ready_may_be_any_question(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = f"time.sleep(0.3); open({str(mark)!r}, 'w').close(); time.sleep(99)"
    with start(program(tmp_path, body, ready=mark.exists)) as host:
        assert host.is_ready()


def test_the_environment_is_this_processs_and_what_the_program_adds(tmp_path: Path) -> None:
    body = "print(os.environ['MINE'], 'PATH' in os.environ, os.getcwd()); serve()"
    with start(program(tmp_path, body, environment={"MINE": "7"})) as host:
        assert host.process.tail() == [f"7 True {PROJECT_ROOT}"]


def test_while_it_waits_it_says_for_what_and_what_was_said_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lib.program, "PROGRESS_SECONDS", 0.5)
    with caplog.at_level(logging.INFO, "lib"):
        start(program(tmp_path, "print('loading weights'); time.sleep(1.8); serve()")).close()
    lines = [line for line in caplog.messages if "waiting" in line]
    assert len(lines) in (2, 3, 4)
    assert lines[-1].startswith("engine: waiting for http://127.0.0.1:") and "of 15 s" in lines[-1]
    assert lines[-1].endswith("/health, " + lines[-1].split("/health, ")[1]) and "last: loading weights" in lines[-1]
    assert any("ready at http://127.0.0.1:" in line for line in caplog.messages)


def test_one_that_is_never_ready_is_ended_at_the_deadline_and_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = "print('connection reset, but I hang'); time.sleep(99)"
    with pytest.raises(ProgramError, match=r"is not ready after 5 s: still waiting for http.* raise --wait") as caught:
        start(program(tmp_path, body, deadline=5.0, deadline_setting="--wait"))  # a busy machine starts it late
    assert "connection reset, but I hang" in str(caught.value) and not caplog.messages


def test_one_that_takes_connections_and_never_answers_is_not_ready(tmp_path: Path) -> None:
    body = """
    import socket
    held = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    time.sleep(99)
    """
    began = time.monotonic()
    with pytest.raises(ProgramError, match="is not ready"):
        start(program(tmp_path, body, deadline=1.0))
    assert time.monotonic() - began < 8


def test_an_interrupt_while_it_waits_ends_the_server(tmp_path: Path) -> None:
    pids: set[int] = set()

    def ready() -> bool:
        (log,) = lib.program.last_lines(tmp_path / "engine.log", 1) or ["0"]
        if log == "0":
            return False
        pids.add(int(log))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(program(tmp_path, "print(os.getpid()); time.sleep(99)", ready=ready))
    assert pids and not running(pids)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_one_that_dies_at_once_is_an_error_with_its_status_cause_and_last_50_lines(tmp_path: Path) -> None:
    body = """
    print("ValueError: the cause")
    for number in range(80): print("line", number)
    sys.exit(3)
    """
    with pytest.raises(ProgramError) as caught:
        start(program(tmp_path, body))
    head, *shown = str(caught.value).split("\n")
    assert head.startswith("engine did not start: it exited with status 3 after ")
    assert head.endswith("It said: ValueError: the cause")
    assert str(tmp_path / "engine.log") in shown[0] and shown[1:] == [f"  line {number}" for number in range(30, 80)]


def test_a_known_cause_comes_with_what_to_change(tmp_path: Path) -> None:
    advice = [("never said", "x"), (r"unknown parser \((.*)\)", r"set parser to one of \1")]
    body = "print('KeyError: unknown parser (a, b)'); raise RuntimeError('it failed. See root cause above')"
    with pytest.raises(ProgramError, match=r"What to change: set parser to one of a, b\n"):
        start(program(tmp_path, body, advice=advice))


def test_the_cause_is_not_the_line_that_refers_to_it_nor_one_that_quotes_an_error() -> None:
    lines = ["limits can cause `OSError: [Errno 24]`", "(core) ERROR 12:00 ValueError: no memory",
             "RuntimeError: start failed. See root cause above."]  # fmt: skip
    assert explain(lines, []) == " It said: ValueError: no memory"
    assert explain(["all is well"], []) == ""
    told = explain(lines, [("SIGKILL", "take less")], "did not start: it was ended by SIGKILL")
    assert told == "\nWhat to change: take less"


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"it was ended by SIGKILL \(by hand, or by the kernel because memory"):
        start(program(tmp_path, "os.kill(os.getpid(), 9)"))


def test_a_command_that_does_not_exist_is_said(tmp_path: Path) -> None:
    nothing = Server(name="engine", command=lambda port: ["/nowhere/engine"], log=tmp_path / "engine.log")
    with pytest.raises(ProgramError, match=r"cannot start /nowhere/engine: .*No such file"):
        start(nothing)


def test_a_transient_failure_is_tried_again_and_another_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = tmp_path / "count"
    body = f"""
    with open({str(count)!r}, "a") as file: file.write("x")
    if len(open({str(count)!r}).read()) < 3: sys.exit("OSError: Connection reset by peer")
    serve()
    """
    start(program(tmp_path, body)).close()
    assert count.read_text() == "xxx"
    assert [line.partition("s (")[2] for line in caplog.messages if "follows" in line] == [
        "Connection reset): attempt 2 of 3 follows", "Connection reset): attempt 3 of 3 follows",
    ]  # fmt: skip
    count.write_text("")
    with pytest.raises(ProgramError, match="Connection reset"):
        start(program(tmp_path, body, attempts=2))
    assert count.read_text() == "xx"
    count.write_text("")
    with pytest.raises(ProgramError):
        start(program(tmp_path, body.replace("Connection reset", "Something else")))
    assert count.read_text() == "x"


def test_one_that_dies_after_it_was_ready_is_found_by_check(tmp_path: Path) -> None:
    with start(program(tmp_path, "import threading; threading.Timer(1, os._exit, [5]).start(); serve()")) as host:
        assert until(lambda: not host.process.is_alive())
        with pytest.raises(ProgramError, match="engine has ended: it exited with status 5"):
            host.check()


# -- ports ------------------------------------------------------------------------------------------------------------


@linux
def test_a_taken_port_is_refused_with_the_holders_pid_and_command(tmp_path: Path) -> None:
    with taken() as port, pytest.raises(ProgramError) as caught:
        start(program(tmp_path, "serve()", port=port, port_setting="--port"))
    assert str(caught.value).startswith(f"port {port} (--port) is in use by process {os.getpid()} (")
    assert "pytest" in str(caught.value) and "choose another port, or 0 for a free one" in str(caught.value)


def test_a_holder_that_cannot_be_seen_is_said_with_how_to_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "listeners", lambda port: [])
    with taken() as port, pytest.raises(ProgramError, match=r"cannot be seen from here \(as root `ss -ltnp` or `lsof"):
        start(program(tmp_path, "serve()", port=port))


def test_a_port_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="choose one from 1024 to 65535"):
        start(program(tmp_path, "serve()", port=70_000))


def test_a_configured_port_is_used_even_just_after_a_server_on_it_ended(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(2):
        with start(program(tmp_path, "serve()", port=port)) as host:
            assert host.port == port


def test_a_port_lost_before_the_server_took_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken() as lost:
        ports = [lost, free_port()]
        monkeypatch.setattr(hosts, "free_port", lambda: ports.pop(0))
        with start(program(tmp_path, "serve()")) as host:
            assert host.port != lost and not ports


@linux
def test_another_server_that_answers_on_the_port_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = program(tmp_path / "other", "serve()")
    with start(other) as stranger:
        ports = [stranger.port, free_port()]
        monkeypatch.setattr(hosts, "free_port", lambda: ports.pop(0))
        with start(program(tmp_path, "time.sleep(1); serve()")) as host:
            assert host.port != stranger.port
        (pid,) = stranger.process.pids()
        assert f"did not get port {stranger.port}: address already in use by process {pid}" in caplog.text
        assert stranger.is_ready()


@linux
def test_listeners_are_those_that_listen_not_those_that_are_connected() -> None:
    with taken() as port, socket.create_connection(("127.0.0.1", port)) as client:
        assert [one.pid for one in listeners(port)] == [os.getpid()]
        assert listeners(client.getsockname()[1]) == []


# -- the log ----------------------------------------------------------------------------------------------------------


def test_a_flood_does_not_stop_the_server_and_the_log_stays_small(tmp_path: Path) -> None:
    body = """
    import threading
    def flood():
        for number in range(300_000): print("x" * 100, number)
        sys.stdout.write("y" * 3_000_000); sys.stdout.flush()
        print("\\nflooded")
    threading.Thread(target=flood).start()
    serve()
    """
    with start(program(tmp_path, body, log_bytes=400_000, deadline=60.0)) as host:
        assert until(lambda: host.process.tail(1) == ["flooded"], 60)
        assert host.is_ready()
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert 100_000 < size < 400_000 + 2 * 65_536
        assert len(host.process.tail(1_000)) == 1_000 and max(map(len, host.process.tail(1_000))) <= 4_000


def test_secrets_are_neither_in_the_log_nor_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_API_KEY", "sk-very-secret-value")
    with pytest.raises(ProgramError) as caught:
        start(program(tmp_path, "print('key', os.environ['ENGINE_API_KEY']); sys.exit(1)"))
    assert "key <ENGINE_API_KEY>" in str(caught.value) and "sk-very" not in str(caught.value)
    assert "sk-very" not in (tmp_path / "engine.log").read_text()


def test_a_restart_begins_a_new_log_and_the_one_before_stays_beside_it(tmp_path: Path) -> None:
    for word in ("first", "second"):
        start(program(tmp_path, f"print({word!r}); serve()")).close()
    assert (tmp_path / "engine.log").read_text() == "second\n"
    assert (tmp_path / "engine.log.before").read_text() == "first\n"


def test_progress_bars_are_lines_and_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ProgramError):
        start(program(tmp_path, r"sys.stdout.write('10%\r20%\r\nno end'); sys.exit(1)"))
    assert (tmp_path / "engine.log").read_text() == "10%\n20%\nno end"


# -- the end ----------------------------------------------------------------------------------------------------------

DEAF = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SLEEPER = DEAF + "time.sleep(600)"
AWAY = f"subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], start_new_session=True)"
STUBBORN = f"""
{DEAF}
subprocess.Popen([sys.executable, "-c", {DEAF + AWAY + "; time.sleep(600)"!r}])
subprocess.run([sys.executable, "-c", {DEAF + AWAY!r}])
time.sleep(0.5)
serve()
"""
"""A child that has one in a session of its own, and an orphan in a session of its own: all of them ignore SIGTERM."""


def stubborn(folder: Path) -> Server:
    return program(folder, STUBBORN, grace=0.5)


@linux
def test_a_tree_that_ignores_sigterm_is_gone_after_the_grace_time(tmp_path: Path) -> None:
    host = start(stubborn(tmp_path))
    pids = host.process.pids()
    assert len(pids) == 4
    began = time.monotonic()
    host.close()
    assert not running(pids)
    assert 0.4 < time.monotonic() - began < 8


def test_one_that_heeds_sigterm_is_ended_by_it_and_may_tidy_up(tmp_path: Path) -> None:
    mark = tmp_path / "tidied"
    body = f"""
    import signal
    def leave(*_):
        open({str(mark)!r}, "w").close()
        os._exit(0)
    signal.signal(signal.SIGTERM, leave)
    serve()
    """
    began = time.monotonic()
    start(program(tmp_path, body, grace=30.0)).close()
    assert mark.exists() and time.monotonic() - began < 10


@linux
def test_what_a_dead_server_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    host = start(stubborn(tmp_path))
    pids = host.process.pids()
    (root,) = [one.pid for one in listeners(host.port)]
    os.kill(root, signal.SIGKILL)
    assert until(lambda: not host.process.is_alive() and not running(pids))
    with pytest.raises(ProgramError, match="ended by SIGKILL"):
        host.check()


OWNER = """
import os, sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from test_hosts import start, stubborn
host = start(stubborn(Path(sys.argv[1])))
print(host.process._keeper.pid, *host.process.pids(), flush=True)
"""


@linux
def test_nothing_outlives_its_owner_whatever_ends_it(tmp_path: Path) -> None:
    """All at once, for each takes seconds: killed, interrupted, ended by an error, without a word, and as usual."""
    ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "raise RuntimeError('x')", "os._exit(0)", "pass"]
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER + (end if isinstance(end, str) else "time.sleep(600)"), str(tmp_path / name)],
            cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name, end in zip("abcdef", ends, strict=True)
    ]  # fmt: skip
    for owner, end in zip(owners, ends, strict=True):
        assert owner.stdout is not None
        pids = {int(pid) for pid in owner.stdout.readline().split()}
        assert len(pids) == 5, end
        if not isinstance(end, str):
            assert running(pids) == pids
            os.kill(owner.pid, end)
        owner.communicate()
        assert until(lambda pids=pids: not running(pids)), end  # type: ignore[misc]


@linux
def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    started: list[hosts.Host] = []
    thread = threading.Thread(target=lambda: started.append(start(program(tmp_path, "serve()"))))
    thread.start()
    thread.join()
    time.sleep(0.5)
    with started[0] as host:
        assert host.is_ready()


@linux
def test_a_killed_keeper_takes_the_server_with_it_and_the_rest_goes_at_close(tmp_path: Path) -> None:
    host = start(stubborn(tmp_path))
    pids, (root,) = host.process.pids(), [one.pid for one in listeners(host.port)]
    os.kill(host.process._keeper.pid, signal.SIGKILL)
    assert until(lambda: not running({root}))
    host.close()
    left = running(pids)
    assert len(left) <= 2, "only what was in a session of its own may be left: nobody knows whose it was"
    for pid in left:
        os.kill(pid, signal.SIGKILL)


@linux
def test_a_familys_members_are_descendants_and_the_session() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert child.pid in family(os.getpid()) and family(child.pid) == {child.pid}
    finally:
        child.kill()
        child.wait()
    assert child.pid not in family(os.getpid())
