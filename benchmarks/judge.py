"""How much of the judge's speed is left after the workbench: a real server with a set latency, the real client.

The judge takes one second for a call. Throughput: grading calls with 64 in flight; ideal is concurrency / latency. One
ACE step: 60 prompts with 5 answers each, all criteria of an answer in one call; as plain calls, and through
lib/grading into an empty ledger. A rerun of that step must ask nothing. The server is a process on the same machine.
The import of the client and the first call of each part are not measured.

Exit status 0 = every figure is within its bar, else 1. On a machine that others use, read `others`.

    python benchmarks/judge.py            # about half a minute
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from machine import Others, shown

from lib import PROJECT_ROOT
from lib.grading import Criterion, grade, grading_messages, grading_schema
from lib.judge import Judge, JudgeSettings, open_judge
from lib.task import Message

sys.path.insert(0, str(PROJECT_ROOT / "tests"))
from judge_server import JudgeServer, running_judge  # stands beside the tests

IN_FLIGHT, LATENCY, ROUNDS = 64, 1.0, 6
"""LATENCY in seconds."""
THROUGHPUT_BAR = 0.9
"""Of the ideal."""
STEP, STEP_BAR = 300, 6.5
"""Calls of one ACE step, and seconds for them against a judge of one second."""

QUESTION: list[Message] = [{"role": "user", "content": "How do I fix the wobbling leg of a wooden table? " * 15}]
CRITERIA = [Criterion(id=str(n), text=f"Names tool number {n}, and says what it is for.") for n in range(7)]
"""As in ACE: 700 characters of question and 7 criteria."""


def answer(number: int) -> str:
    """About 300 words, no two alike."""
    return f"Answer {number}. " + "Clamp the joint, name the tool, and say what each number of screw is for. " * 22


async def plain(judge: Judge, number: int) -> None:
    """One grading call, past the ledger."""
    messages = grading_messages(QUESTION, answer(number), CRITERIA)
    await judge.ask(messages, grading_schema(CRITERIA), "verdicts")


async def graded(settings: JudgeSettings, ledger: Path, number: int) -> None:
    """The same through the ledger."""
    row = str(number // 5)
    verdicts = await grade(
        QUESTION, answer(number), CRITERIA, judge=settings, ledger=str(ledger), task="benchmark-1", row=row
    )
    if any(verdict.verdict == "unknown" for verdict in verdicts.values()):
        raise SystemExit(f"a sound judge gave no verdict: {verdicts}")


async def seconds_of(call: Callable[[int], Awaitable[None]], count: int) -> float:
    """Wall seconds of `count` calls at once."""
    started = time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(count)))
    return time.perf_counter() - started


def settings_for(server: JudgeServer) -> JudgeSettings:
    return JudgeSettings(
        provider="compatible", model="benchmark", base_url=server.base_url, concurrency=IN_FLIGHT, temperature="none"
    )


def verdict(what: str, value: str, good: bool) -> bool:
    print(f"{what:<58} {value:<34} {'ok' if good else 'MISSED'}", flush=True)
    return good


async def throughput(server: JudgeServer, repeats: int) -> bool:
    """Full rounds, so that the ideal is a whole number of latencies."""
    server.control(reset=True, latency=LATENCY)
    judge = open_judge(settings_for(server))
    await plain(judge, -1)
    ideal = ROUNDS * LATENCY
    shares = [ideal / await seconds_of(lambda n: plain(judge, n), IN_FLIGHT * ROUNDS) for _ in range(repeats)]
    share = statistics.median(shares)
    text = f"{share:.3f} of {IN_FLIGHT / LATENCY:.0f} calls/s (bar {THROUGHPUT_BAR})"
    return verdict(f"throughput, {IN_FLIGHT} in flight, {LATENCY:g} s", text, share >= THROUGHPUT_BAR)


async def step(server: JudgeServer, folder: Path, repeats: int) -> list[bool]:
    """One ACE step: plain, through grading, and again."""
    server.control(reset=True, latency=LATENCY)
    settings = settings_for(server)
    judge = open_judge(settings)
    spent = statistics.median([await seconds_of(lambda n: plain(judge, n), STEP) for _ in range(repeats)])
    text = f"{spent:.2f} s (bar {STEP_BAR}, ideal {-(-STEP // IN_FLIGHT)})"
    verdicts = [verdict(f"{STEP} calls of {LATENCY:g} s", text, spent < STEP_BAR)]

    times = []
    for repeat in range(repeats):
        ledger = folder / f"{repeat}.sqlite"
        times.append(await seconds_of(lambda n, file=ledger: graded(settings, file, n), STEP))
    spent, before = statistics.median(times), server.stats()["requests"]
    text = f"{spent:.2f} s (bar {STEP_BAR})"
    verdicts.append(verdict("the same through the ledger", text, spent < STEP_BAR))

    spent = await seconds_of(lambda n: graded(settings, ledger, n), STEP)
    asked = server.stats()["requests"] - before
    verdicts.append(verdict("the same again", f"{asked} calls, {spent:.3f} s (bar 0 calls)", asked == 0))
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description="The judge against a server with a set latency.")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    others = Others()
    with running_judge() as server, tempfile.TemporaryDirectory() as folder:

        async def everything() -> bool:
            return all([await throughput(server, repeats), *await step(server, Path(folder), repeats)])

        good = asyncio.run(everything())
    print(f"others: {shown(others.cores())} cores")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
