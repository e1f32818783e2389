"""Task `coding`: write a program; it is rewarded by tests that run in a sandbox where it cannot reach them.

Owns rows, prompts, the reward, and the check of every row before it is used. Must not know models or trainers.

    python -c "from lib.task import load_task; print(load_task('coding', family='templates').rows('train')[0])"
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, PrivateAttr, model_validator

from lib.data import ListTable, Record, RowsTask, Table, Where, messages_of
from lib.extract import Extracted, extract_program, fenced
from lib.places import locate
from lib.sandbox import Execution, ProgramRun, SandboxSettings, run_program, run_tests, self_test
from lib.tables import open_tables
from lib.task import Message, Rollout, Row, Score, Split
from lib.tasks import _coding_templates
from lib.tasks._coding_cheats import cheats_for, stub_for
from lib.tasks._coding_check import NAMED, RowCheck
from lib.tasks._coding_rows import Problem, Unusable, problem_of, same_output

log = logging.getLogger(__name__)

PROBLEMS = "configs/examples/coding.jsonl"
"""The project's own problems."""

LOG = 2000  # characters of a program's output that are kept
_SCORES = {"pass": 1.0, "fail": 0.0, "unknown": None}


_NAMED = r"\b{0}\(|[`'\"]{0}[`'\"(]|\b(?:[Cc]lass|[Ff]unction|[Nn]amed|[Cc]alled|[Dd]ef)\s+{0}\b"
"""How an instruction names what to define; as a word of English, "add" or "double" does not."""


class Outcome(NamedTuple):
    """What the sandbox said about one program."""

    verdicts: tuple[str, ...]
    """By test: pass, fail, error:<Type>, timeout, died, not run."""
    measured: dict[str, float]
    """Seconds and MiB: what differs from time to time."""
    log: str
    """The beginning of what the program printed, in printable characters."""
    sandbox: str
    opaque: bool = False
    """A test compared two objects that the solution made: they could say what they like."""

    @property
    def passed(self) -> float:
        """The share of tests that passed."""
        return self.verdicts.count("pass") / len(self.verdicts) if self.verdicts and not self.opaque else 0.0


class Coding(RowsTask, frozen=True):
    """Programming problems: `instruction`, `tests` (asserts) or `io` (pairs of input and output), `entry_point`.

    More columns, all optional: `reference` (a solution: it becomes the gold answer), `setup` (code that the tests
    need; it runs beside them, never beside the solution), `category`, `demonstration` (a program to imitate).
    Without `path` and `dataset`, the rows are those of `family`.
    """

    family: Literal["problems", "templates"] = "problems"
    """The project's own problems, or one-line problems made from templates."""
    generate_rows: int = Field(default=2400, ge=2)
    """Template problems to make, training and evaluation together."""
    generate_seed: int = 0
    partial: bool = False
    """Reward the share of tests passed, in place of all or nothing."""
    format_share: float = Field(default=0.0, ge=0, lt=1)
    """The part of the reward for an answer with exactly one block, closed and marked as Python: right or wrong."""
    sandbox: SandboxSettings = SandboxSettings()

    _inferred: list[tuple[str, str]] = PrivateAttr(default_factory=list)
    """Rows whose entry point is a guess, and the guess."""

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.family == "templates" and (self.path or self.dataset):
            raise ValueError(f"family templates is used only without path and dataset ({self.path or self.dataset})")
        if self.reward_range[0] > 0 or self.reward_range[1] < 1:
            raise ValueError(f"reward_range {self.reward_range} must hold 0 to 1: leave it out")
        return self

    # -- rows ---------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        if self.path or self.dataset:
            return super().tables()
        if self.family == "problems":
            return open_tables(self.input_files())
        records = _coding_templates.generate(self.generate_rows, self.generate_seed)
        return [ListTable(f"templates-{self.generate_seed}", records)]

    def input_files(self) -> list[Path]:
        """The tables that the fields name, or the project's own."""
        own = not self.path and not self.dataset and self.family == "problems"
        return [locate(PROBLEMS)] if own else super().input_files()

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        have = ", ".join(columns)
        if "instruction" not in columns:
            where.report("instruction", f"no such column. The table has: {have}. Map it: columns: {{instruction: …}}")
        if "tests" not in columns and "io" not in columns:
            where.report("tests", f"no such column, nor 'io'. The table has: {have}. Map it: columns: {{tests: …}}")

    def row(self, record: Record, where: Where) -> Row | None:
        try:
            problem = problem_of(record)
            row = self._row(record, problem)
        except Unusable as reason:
            if where.errors is not None and where.errors.dropped[str(reason)] < NAMED:
                log.info("%s (%s): left out: %s", where, record["id"], reason)
            where.drop(str(reason))
            return None
        if problem.entry_points_from == "tests" and where.errors is not None:
            self._inferred.append((str(record["id"]), problem.entry_points[0]))
        return row

    def _row(self, record: Record, problem: Problem) -> Row:
        row: Row = {"id": record["id"], "prompt": _prompt(record.get("instruction"), problem)}
        if problem.io:
            row["io"] = problem.io
        else:
            row |= {"tests": problem.tests, "entry_points": problem.entry_points}
        if problem.setup:
            row["setup"] = problem.setup
        if record.get("category") not in (None, ""):
            row["category"] = str(record["category"])
        if problem.reference:
            row["gold"] = _answer(problem.reference)
        if record.get("demonstration"):
            row["demonstration"] = _answer(str(record["demonstration"]))
        return row

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split that passed the check: the reference earns 1, a stub earns 0, in the sandbox itself.

        Checks both splits on first use. Raises SandboxError where there is no sandbox, TaskError where no row is left.
        """
        return self._usable[split]

    @cached_property
    def _usable(self) -> dict[Split, Sequence[Row]]:
        every: dict[Split, Sequence[Row]] = {"train": super().rows("train"), "eval": super().rows("eval")}
        self_test(self.sandbox)
        check = RowCheck(self.unusable, sum(map(len, every.values())))
        usable: dict[Split, Sequence[Row]] = {split: check.usable(rows) for split, rows in every.items()}
        check.tell()
        if self._inferred:
            shown = ", ".join(f"{row} → {name}" for row, name in self._inferred[:NAMED])
            log.info("%d entry points taken from what the tests call: %s …", len(self._inferred), shown)
        return usable

    async def unusable(self, row: Row) -> str:
        """Why a row is no use for training; "" where its reference earns 1 and a stub 0."""
        names = row.get("entry_points", ())
        sources = [stub_for(names)]
        if row.get("gold"):
            reference = extract_program(str(row["gold"][-1]["content"]), names).source
            if reference is None:
                return "a reference solution that does not define the entry point at its top level"
            sources.append(reference)
        # At once: the sandbox then prepares the tests of a row once.
        stub, *references = await asyncio.gather(*(self._run(row, source) for source in sources))
        for outcome in references:
            if outcome.opaque:
                return "tests that compare objects which the solution makes"
            if "timeout" in outcome.verdicts:
                return "a reference solution that takes too long"
            if outcome.passed < 1:
                return "a reference solution that fails its own tests"
        return "tests that a stub passes" if self._correct(stub) > 0 else ""

    # -- the reward ---------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Tries the sandbox, Modal's only when it starts. Raises SandboxError, with what to do, where there is none."""
        if self.sandbox.backend != "modal":
            self_test(self.sandbox)
        if self.sandbox.backend != "none":
            return []
        return ["task.sandbox.backend is none: programs that a model wrote run on this machine without any isolation"]

    def cheats(self, row: Row) -> dict[str, str]:
        """Exits, lying objects, patched builtins, forged verdicts, searches for the tests."""
        return cheats_for(row.get("entry_points", ()))

    async def score(self, rollout: Rollout) -> Score:
        """Tests passed: all or nothing, or their share. parts: solved, passed, valid, format, timeout (each 0 to 1).

        All-or-nothing stops at the first failure, so `passed` is then the share known to pass. Raises SandboxError.
        """
        found = extract_program(rollout.text, rollout.row.get("entry_points", ()))
        tidy = float(found.tidy)
        if found.source is None:
            parts: dict[str, float | None] = {"solved": 0.0, "passed": 0.0, "valid": 0.0, "format": tidy}
            parts["timeout"] = 0.0
            return Score(reward=self.format_share * tidy, parts=parts, notes={"invalid": found.problem})
        outcome = await self._run(rollout.row, found.source)
        parts = {"solved": float(outcome.passed == 1), "passed": outcome.passed, "valid": 1.0, "format": tidy}
        parts["timeout"] = float("timeout" in outcome.verdicts)
        reward = (1 - self.format_share) * self._correct(outcome) + self.format_share * tidy
        return Score(reward=reward, parts=parts, notes=_notes(rollout.row, found, outcome))

    def _correct(self, outcome: Outcome) -> float:
        return outcome.passed if self.partial else float(outcome.passed == 1)

    async def _run(self, row: Row, source: str) -> Outcome:
        if row.get("io"):
            return await self._run_program(row["io"], source)
        done = await run_tests(
            source,
            row["tests"],
            row["entry_points"],
            setup=row.get("setup", ""),
            settings=self.sandbox,
            stop_at_first_failure=not self.partial,
        )
        return Outcome(done.verdicts, _measured([done]), done.log, done.backend, opaque=done.opaque_eq > 0)

    async def _run_program(self, pairs: Sequence[Sequence[str]], source: str) -> Outcome:
        """The program on each input. What it should print stays out here."""
        verdicts: list[str] = []
        runs: list[ProgramRun] = []
        for given, expected in pairs:
            done = await run_program(source, given, settings=self.sandbox)
            right = done.stop == "done" and same_output(done.stdout, expected)
            runs.append(done)
            verdicts.append("pass" if right else "fail" if done.stop == "done" else done.stop)
            if not right and not self.partial:
                break
        verdicts += ["not run"] * (len(pairs) - len(verdicts))
        log = _printable(runs[-1].stdout[:LOG]) + runs[-1].log
        return Outcome(tuple(verdicts), _measured(runs), log, runs[-1].backend)


def _prompt(instruction: object, problem: Problem) -> list[Message]:
    """The instruction, and what to define where it does not say so. Raises Unusable."""
    messages = messages_of(instruction, "user")
    if not messages:
        raise Unusable("no instruction")
    text = str(messages[-1].get("content") or "")
    if problem.io:
        ask = "Write a Python program that reads standard input and prints the answer."
        missing = not re.search(r"\b(stdin|standard input|input\(\))", text)
    else:
        ask = f"Define {' and '.join(f'`{name}`' for name in problem.entry_points)} in Python."
        missing = not all(re.search(_NAMED.format(re.escape(name)), text) for name in problem.entry_points)
    last = {**messages[-1], "content": f"{text.rstrip()}\n\n{ask}" if missing else text}
    return [*messages[:-1], last]


def _answer(source: str) -> list[Message]:
    return [{"role": "assistant", "content": fenced(source)}]


def _notes(row: Row, found: Extracted, outcome: Outcome) -> dict[str, Any]:
    """What a person looks at: the program, the verdict of each test by its number, time and memory."""
    texts = row.get("tests") or [f"{given!r} → {expected!r}" for given, expected in row["io"]]
    told = {
        str(number): {"verdict": _word(verdict), "score": _SCORES[_word(verdict)], "reasons": verdict, "text": text}
        for number, (verdict, text) in enumerate(zip(outcome.verdicts, texts, strict=True), 1)
    }
    notes: dict[str, Any] = {"program": found.source, "found": found.found, "verdicts": told}
    if outcome.opaque:
        notes["opaque"] = "a test compared two objects that the solution made"
    if outcome.log:
        notes["log"] = outcome.log
    return notes | {"sandbox": outcome.sandbox, "measured": outcome.measured}


def _word(verdict: str) -> str:
    """A test's verdict in the words that every scorer's notes use."""
    return {"pass": "pass", "not run": "unknown"}.get(verdict, "fail")


def _measured(runs: Sequence[Execution | ProgramRun]) -> dict[str, float]:
    """Seconds of one or more executions together, and the largest memory of them."""
    measured = {
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs), 4),
        "wall_seconds": round(sum(run.wall_seconds for run in runs), 4),
    }
    memory = [run.memory_mb for run in runs if run.memory_mb is not None]
    return measured | ({"memory_mb": round(max(memory), 1)} if memory else {})


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text)
