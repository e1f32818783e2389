"""Task `functions`: call the right functions with the right arguments, graded as BFCL v4 grades them.

Owns rows, prompts and reward. The verdict itself is in _functions_check.py, reading an answer in _functions_parse.py,
the benchmark's files in _functions_files.py. Must not know models or trainers. No call is ever carried out.

    python -c "from lib.task import load_task; \
               print(load_task('functions', path='configs/examples/functions.jsonl').rows('eval')[0])"
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from lib.data import ListTable, Record, RowsTask, Table, Where, is_json, messages_of
from lib.places import locate
from lib.task import Message, Rollout, Row, Score, Split, TaskError
from lib.tasks._functions_cheats import calls_for_nothing, cheats_for
from lib.tasks._functions_check import Call, Problem, check, language_of
from lib.tasks._functions_files import BfclTable, bfcl_files, hub_folder
from lib.tasks._functions_grade import Grade, grade
from lib.tasks._functions_notes import shown, verdicts
from lib.tasks._functions_parse import parse
from lib.tasks._functions_rows import (
    answer_problem,
    calls_json,
    counted_category,
    decoded,
    description_problem,
    needs_answers,
    right_calls,
    tool,
    with_required,
)

log = logging.getLogger(__name__)

INSTRUCTIONS = """\
You can call these functions:
{functions}

Reply with the calls that the request needs and nothing else, as a JSON list: \
[{"name": "<function>", "arguments": {"<parameter>": <value>}}]. Reply [] when no function fits, or when a \
required argument is not given."""

_NAMED = 8
"""Rows that a warning names."""


class Functions(RowsTask, frozen=True):
    """Rows {id, question, function, ground_truth, category}; the reward is the official verdict, or partial credit.

    `path` is a folder with the benchmark's files (BFCL_v4_<category>.json), or one table of such rows; `dataset` is a
    Hub dataset with these files (gorilla-llm/Berkeley-Function-Calling-Leaderboard), or one that is such a table.
    Without both, the rows are short requests made here, for the starter policy. Columns of a table: `question` (a text,
    messages, or BFCL's list of turns), `function`, `ground_truth` ([{function: {parameter: [accepted values]}}], none
    for (ir)relevance), and optionally `demonstration` (an answer's text) and `category`, which is a rule: without one
    it is simple, multiple, parallel or parallel_multiple, by the numbers of functions and of expected calls.
    """

    stratified: ClassVar[bool] = True

    prompting: Literal["tools", "text"] = "tools"
    """tools = the chat template shows the functions (names without dots); text = a system message lists them."""
    instructions: str = INSTRUCTIONS
    """The system message of `prompting: text`: {functions} = their descriptions, {signatures} = name(parameter, …)."""
    reward: Literal["exact", "graded"] = "exact"
    """exact = 1 or 0; graded = a quarter each for name, required parameters, types and values, and 1 only if exact."""
    categories: tuple[str, ...] = ()
    """Of the benchmark's single-turn categories; () = all that are there."""
    generate_rows: int = Field(default=2048, ge=8)
    """Requests to make, training and evaluation together, where no data is named."""
    generate_seed: int = 0

    _unwinnable: list[str] = PrivateAttr(default_factory=list)
    """Rows that accept no call."""

    @model_validator(mode="after")
    def _dataset_fields_are_read(self) -> Self:
        for name, value in {} if self.dataset else self._of_the_hub():
            raise ValueError(f"{name} ({value}) is read only with a dataset: leave it out.")
        return self

    @model_validator(mode="after")
    def _range_holds(self) -> Self:
        if not (self.reward_range[0] <= 0 and self.reward_range[1] >= 1):
            raise ValueError(f"reward_range {list(self.reward_range)}: rewards lie from 0 to 1.")
        if not any(place in self.instructions for place in ("{functions}", "{signatures}")):
            raise ValueError("instructions must say where the functions go: write {functions} or {signatures} into it.")
        return self

    # -- rows ---------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        if not (self.path or self.dataset):
            from lib.tasks import _functions_toy

            made = _functions_toy.made(self.generate_rows, self.generate_seed)
            return [ListTable(f"made-{self.generate_seed}", made)]
        if self._bfcl:
            return [BfclTable(questions, category, answers) for category, questions, answers in self._bfcl]
        return super().tables()

    def input_files(self) -> list[Path]:
        """The tables; of the benchmark its questions and their answers, downloaded where they are on the Hub."""
        return [file for _, *pair in self._bfcl for file in pair if file is not None] or super().input_files()

    @cached_property
    def _bfcl(self) -> list[tuple[str, Path, Path | None]]:
        """The benchmark's files (category, questions, answers); [] where the data are something else."""
        if not self.dataset:
            return bfcl_files(locate(self.path), self.categories) if self.path else []
        files = bfcl_files(hub_folder(self.dataset, self.dataset_revision), self.categories)
        for name, value in self._of_the_hub() if files else ():
            if name != "dataset_revision":
                raise TaskError(f"task.{name} ({value}): {self.dataset} holds the benchmark's files: name categories.")
        return files

    def _of_the_hub(self) -> list[tuple[str, str]]:
        """The fields that say more of a dataset and are set."""
        default = type(self).model_fields["dataset_split"].default
        given = {"dataset_config": self.dataset_config, "dataset_revision": self.dataset_revision}
        given |= {"dataset_split": "" if self.dataset_split == default else self.dataset_split}
        return [(name, value) for name, value in given.items() if value]

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split; on first use those are told that no answer can win."""
        found = super().rows(split)
        if self._unwinnable:
            count, some = len(self._unwinnable), ", ".join(self._unwinnable[:_NAMED])
            log.warning(
                "functions: rows that accept no call, so that no answer earns their reward: %d (%s)", count, some
            )
            self._unwinnable.clear()
        return found

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        for name in ("question", "function"):
            if name not in columns:
                have = ", ".join(columns)
                where.report(name, f"no such column. The table has: {have}. Map it: columns: {{{name}: …}}")

    def row(self, record: Record, where: Where) -> Row | None:
        functions, answers = decoded(record.get("function")), decoded(record.get("ground_truth"))
        category = str(record.get("category") or counted_category(functions, answers))
        if self.categories and category not in self.categories:
            where.drop(f"category {category} is not among task.categories")
            return None
        turns = decoded(record.get("question"))
        if isinstance(turns, list) and len(turns) > 1 and isinstance(turns[0], list):
            where.drop("a question of several turns")
            return None
        if answers is None and needs_answers(category):
            where.drop("no ground truth: the answer cannot be graded")
            return None
        prompt = messages_of(
            turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], list) else turns, "user"
        )
        if not self._usable(prompt, functions, answers, category, where):
            return None
        assert prompt is not None
        return self._made(record, prompt, [with_required(one) for one in functions], answers or [], category, where)

    def _usable(self, prompt: list[Message] | None, functions: Any, answers: Any, category: str, where: Where) -> bool:
        problems = {
            "question": "" if prompt else "empty, or neither a text nor a list of chat messages with roles",
            "function": description_problem(functions, language_of(category)),
        }
        if needs_answers(category) and not problems["function"]:
            problems["ground_truth"] = answer_problem(answers, functions, category)
        for column, problem in problems.items():
            if problem:
                where.report(column, problem)
        return not any(problems.values())

    def _made(
        self,
        record: Record,
        prompt: list[Message],
        functions: list[Any],
        answers: list[Any],
        category: str,
        where: Where,
    ) -> Row | None:
        tools = [tool(function, language_of(category), self._underscores) for function in functions]
        row: Row = {"id": record["id"], "prompt": prompt, "category": category, "function": functions}
        if self.prompting == "text":
            row["prompt"] = _with_instructions(prompt, self.instructions, [one["function"] for one in tools])
        elif tools:
            row["tools"] = tools
        if needs_answers(category):
            row["ground_truth"] = answers
            right = right_calls(functions, answers, category, self._underscores)
            if check(functions, right, answers, category, self._underscores) is None:
                row["gold"] = [{"role": "assistant", "content": self.written(right)}]
            elif where.errors is not None:
                self._unwinnable.append(str(record["id"]))
        elif "irrelevance" in category:
            row["gold"] = [{"role": "assistant", "content": ""}]
        if record.get("demonstration") is not None:
            row["demonstration"] = [_demonstrated(record["demonstration"], self)]
        return row if is_json(row, where) else None

    @property
    def _underscores(self) -> bool:
        return self.prompting == "tools"

    def written(self, calls: Sequence[Call]) -> str:
        """Calls as the prompt asks for them: Hermes' <tool_call> for tools, a JSON list for text."""
        if self.prompting == "text":
            return calls_json(calls)
        bodies = (json.dumps({"name": call.name, "arguments": call.arguments}) for call in calls)
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)

    # -- the reward ---------------------------------------------------------------------------------------------------

    async def score(self, rollout: Rollout) -> Score:
        """The verdict on the last answer. parts: solved, well_formed; of wanted calls name, required, types, values.

        An answer that was cut off fails, whatever it was to be: the official checker knows none.
        """
        row = rollout.row
        parsed = parse(rollout.turns[-1].message if rollout.turns else {}, row.get("tools", ()))
        calls, problem = parsed.calls, parsed.problem
        if rollout.stop == "length" or (rollout.turns and rollout.turns[-1].stop == "length"):
            calls, problem = None, "cut off"
        if not needs_answers(row["category"]):
            return _called_at_all(row["category"], calls, problem)
        return self._graded(row, calls, problem)

    def _graded(self, row: Row, calls: list[Call] | None, problem: str) -> Score:
        what = (row["function"], calls or [], row["ground_truth"], row["category"], self._underscores)
        found = Problem("ast_decoder:decoder_failed", problem) if calls is None else check(*what)
        grades, credit = grade(*what)
        if found is None:
            grades, credit = [Grade(1.0, 1.0, 1.0, 1.0)] * len(row["ground_truth"]), 1.0
        parts: dict[str, float | None] = {"solved": float(found is None), "well_formed": float(calls is not None)}
        for name in Grade._fields:
            parts[name] = sum(getattr(one, name) for one in grades) / len(grades)
        notes: dict[str, Any] = {"verdicts": verdicts(row["ground_truth"], grades, found), "calls": shown(calls)}
        if found is not None:
            notes["problem"] = f"{found.kind}: {found.text}".encode(errors="replace").decode()
        return Score(reward=parts["solved"] if self.reward == "exact" else credit, parts=parts, notes=notes)

    # -- cheats -------------------------------------------------------------------------------------------------------

    def cheats(self, row: Row) -> dict[str, str]:
        """Calls that look right: too many, twice, by name only, with two values, thought or told but not made."""
        if "irrelevance" in row["category"]:
            return calls_for_nothing(row["function"], self.written, self._underscores)
        if not needs_answers(row["category"]):
            return {}
        right = right_calls(row["function"], row["ground_truth"], row["category"], self._underscores)
        return cheats_for(row["function"], right, self.written, self._underscores)


def _called_at_all(category: str, calls: list[Call] | None, problem: str) -> Score:
    """Irrelevance wants no call (what cannot be decoded is none), relevance wants any."""
    wanted = "irrelevance" not in category
    solved = float(bool(calls) == wanted and problem != "cut off")
    verdict = {
        "verdict": "pass" if solved else "fail",
        "score": solved,
        "reasons": problem or f"{len(calls or [])} calls",
    }
    name = "some call" if wanted else "no call"
    notes = {"verdicts": {name: {**verdict, "text": f"{name} is expected"}}, "calls": shown(calls)}
    return Score(reward=solved, parts={"solved": solved, "well_formed": float(calls is not None)}, notes=notes)


def _with_instructions(prompt: Sequence[Message], instructions: str, functions: Sequence[Any]) -> list[Message]:
    """The prompt after a system message that lists the functions; a system message of its own is kept behind them."""
    signatures = [f"{one['name']}({', '.join(one['parameters']['properties'])})" for one in functions]
    text = instructions.replace("{signatures}", ", ".join(signatures))
    text = text.replace("{functions}", "\n".join(json.dumps(function) for function in functions))
    own = [str(message.get("content") or "") for message in prompt[:1] if message["role"] == "system"]
    return [{"role": "system", "content": "\n\n".join([text, *own])}, *prompt[len(own) :]]


def _demonstrated(cell: Any, task: Functions) -> Message:
    """What the policy is to imitate: calls ([{name, arguments}]) in the task's own form, or a text as it is."""
    if isinstance(cell, list):
        return {"role": "assistant", "content": task.written([Call(one["name"], one["arguments"]) for one in cell])}
    return {"role": "assistant", "content": str(cell)}
