"""Does the ledger keep up, and does it lose anything?

Hits: verdicts of ACE's size (10 criteria an answer), looked up by their texts in an order of their own, key hashing
included: an answer's criteria together (`get_many`, which is how tasks ask) for the first time in this process and
again, and one by one (`get`); beside it what SQLite does by itself with keys made beforehand. The ways take turns, each
round with answers of its own; the best round counts, the median is printed beside it. Bar: 100,000 hits/s together,
the first time.

Writers: 8 processes put the verdicts of one answer at a time, half of the keys their own and half the same in all.
Bar: every verdict of every writer is there, and a shared key has the first known one.

Kill: a writer that says which call has returned is killed with SIGKILL at a random moment, 20 times, on one file. Bar:
everything that it said is there, the call in flight is there whole or not at all, and the file is sound.

Exit status 0 = every bar is met, else 1. On a machine that others use, read `others`: above 0.3 cores even the best
round says little about a quiet one.

    python benchmarks/ledger.py
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from machine import Others, shown

from lib.ledger import Entry, Ledger, Verdict, hash_text, verdict_key

FIRST = "together, first"
BAR = 100_000
"""Hits per second."""
CRITERIA = 10
"""Of one answer: what ACE's tasks have on average."""
TEXTS = [
    f"States that item {n} of the contract follows from the rule, names it and gives the reason." for n in range(10)
]
REASONS = "The response names the rule in its second paragraph, but gives no reason for it there or anywhere else. " * 2
WAYS = ("SQLite alone", FIRST, "one by one, first", "together, again", "one by one, again")


class Answer(NamedTuple):
    row: str
    hash: str

    def keys(self) -> list[str]:
        return [verdict_key("ace-1", text, "gpt-4o-mini", "1", self.hash, self.row) for text in TEXTS]

    def entries(self) -> list[Entry]:
        verdict = Verdict("pass", 1.0, REASONS, 1.3e-4, 1.2, 1)
        about = zip(self.keys(), TEXTS, strict=True)
        return [Entry(key, verdict, "ace-1", self.row, text, "gpt-4o-mini", "1", self.hash) for key, text in about]


# hits -----------------------------------------------------------------------------------------------------------------
def hits(path: Path, verdicts: int, rounds: int) -> dict[str, list[float]]:
    """Hits per second of every round, by how they are asked for."""
    ledger = Ledger(path)
    answers = [Answer(f"row-{n}", hash_text(f"answer {n}")) for n in range(verdicts // CRITERIA)]
    ledger.put(entry for answer in answers for entry in answer.entries())
    random.Random(0).shuffle(answers)

    def together(some: Sequence[Answer]) -> int:
        return sum(len(ledger.get_many(answer.keys())) for answer in some)

    def one_by_one(some: Sequence[Answer]) -> int:
        return sum(ledger.get(key) is not None for answer in some for key in answer.keys())  # noqa: SIM118

    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    size = len(answers) // (2 * rounds)
    for n in range(rounds):
        first, second = (answers[start : start + size] for start in (2 * n * size, (2 * n + 1) * size))
        prepared = [key for answer in first for key in answer.keys()]  # noqa: SIM118
        ways = (lambda: _alone(path, prepared), lambda: together(first), lambda: one_by_one(second))  # noqa: B023
        for name, way in zip(WAYS, (*ways, *ways[1:]), strict=True):
            rates[name].append(_rate(way, len(prepared)))
    return rates


def _alone(path: Path, keys: Sequence[str]) -> int:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        question = "SELECT verdict FROM verdicts WHERE key = ?"
        return sum(connection.execute(question, (key,)).fetchone() is not None for key in keys)


def _rate(way: Callable[[], int], expected: int) -> float:
    started = time.perf_counter()
    found = way()
    spent = time.perf_counter() - started
    assert found == expected, f"{found} of {expected} found"
    return expected / spent


# writers --------------------------------------------------------------------------------------------------------------
WRITE = """
import sys
sys.path[:0] = sys.argv[4:]
from ledger import Answer
from lib.ledger import Ledger, Verdict
path, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
ledger = Ledger(path)
sys.stdin.readline()
for i in range(calls):
    own = Answer(name, f"{name} {i}").entries()[:5]
    # Writer 0 does not know; the others do: what stays is never "unknown".
    shared = [entry._replace(row=name) for entry in Answer("shared", f"shared {i}").entries()[5:]]
    if name == "0":
        shared = [entry._replace(verdict=Verdict("unknown", None)) for entry in shared]
    ledger.put([*own, *shared])
    print(i, flush=True)
"""


def start(path: Path, name: str, calls: int) -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", WRITE, str(path), name, str(calls), str(here), str(here.parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def writers(path: Path, processes: int, calls: int) -> tuple[float, list[str]]:
    """Calls per second of all together, and what was lost."""
    running = [start(path, str(n), calls) for n in range(processes)]
    started = time.perf_counter()
    for process in running:
        go(process)
    for process in running:
        process.communicate()
    spent = time.perf_counter() - started
    problems = [f"writer {n} ended with {p.returncode}" for n, p in enumerate(running) if p.returncode]
    rows = {row["key"]: row for row in Ledger(path).rows()}
    expected = {key for n in range(processes) for i in range(calls) for key in Answer(str(n), f"{n} {i}").keys()[:5]}
    shared = {key for i in range(calls) for key in Answer("shared", f"shared {i}").keys()[5:]}
    missing = len((expected | shared) - rows.keys())
    unknown = sum(rows[key]["verdict"] == "unknown" for key in shared & rows.keys())
    problems += [f"{missing} verdicts are lost"] * bool(missing)
    problems += [f"{unknown} known verdicts gave way to an unknown one"] * bool(unknown)
    return processes * calls / spent, problems


# kills ----------------------------------------------------------------------------------------------------------------
def kills(path: Path, times: int, seed: int) -> tuple[int, list[str]]:
    """Calls that had returned when their writer was killed, and what went wrong."""
    moments, problems, returned = random.Random(seed), [], 0
    for n in range(times):
        name = f"killed {n}"
        process = start(path, name, 1_000_000)
        go(process)
        assert process.stdout
        process.stdout.readline()  # it is under way
        time.sleep(moments.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        done = max([0, *(int(line) for line in process.communicate()[0].splitlines() if line.isdigit())])
        returned += done + 1
        problems += _after_kill(path, name, done)
    with closing(sqlite3.connect(path)) as connection:
        state = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return returned, problems + [f"integrity check: {state}"] * (state != "ok")


def _after_kill(path: Path, name: str, done: int) -> list[str]:
    ledger = Ledger(path)
    counts = []
    for i in itertools.count():
        counts.append(len(ledger.get_many(Answer(name, f"{name} {i}").keys()[:5])))
        if counts[-1] == 0 and i > done:
            break
    ledger.close()
    lost = sum(count < 5 for count in counts[: done + 1])
    torn = sum(0 < count < 5 for count in counts[done + 1 :])
    return [f"{name}: {lost} returned calls lost"] * bool(lost) + [f"{name}: {torn} calls in part"] * bool(torn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--calls", type=int, default=250, help="of each writer")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder:
        load = Others()
        rates = hits(Path(folder) / "hits.sqlite", options.verdicts, options.rounds)
        for name, found in rates.items():
            best, median = max(found), statistics.median(found)
            print(f"hits, {name:<18} {best:9,.0f} /s  {1e6 / best:5.1f} us each  (median {median:,.0f} /s)")
        print(f"{'':<6}bar {BAR:,} /s for {FIRST!r}; others {shown(load.cores())}")
        best = max(rates[FIRST])
        missed += [f"{best:,.0f} hits/s {FIRST}"] * (best < BAR)
        speed, problems = writers(Path(folder) / "writers.sqlite", options.processes, options.calls)
        calls = options.processes * options.calls
        print(f"{options.processes} writers: {calls} calls, {speed:,.0f} /s, problems: {len(problems)}")
        missed += problems
        returned, problems = kills(Path(folder) / "kills.sqlite", options.kills, seed=0)
        print(f"{options.kills} kills: {returned} calls had returned, problems: {len(problems)}")
        missed += problems
    print(f"verdict: {'FAIL: ' + '; '.join(missed) if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
