"""Task `functions`: call the right functions with the right arguments, graded as BFCL v4 grades them.

Owns rows, prompts and reward. The verdict itself is in _functions_check.py, reading an answer in _functions_parse.py,
the benchmark's files in _functions_rows.py. Must not know models or trainers. No call is ever carried out.

    python -c "from lib.task import load_task; \
               print(load_task('functions', path='configs/examples/functions.jsonl').rows('eval')[0])"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lib.data import ListTable, Record, RowsTask, Table, Where, is_json, messages_of
from lib.places import locate
from lib.task import Message, Rollout, Row, Score
from lib.tasks._functions_check import Call, Grade, Problem, check, grade, language_of
from lib.tasks._functions_parse import parse
from lib.tasks._functions_rows import (
    BfclTable,
    answer_problem,
    bfcl_files,
    calls_json,
    description_problem,
    hub_folder,
    needs_answers,
    right_calls,
    tool,
    with_required,
)

INSTRUCTIONS = """\
You can call these functions:
{functions}

Reply with the calls that the request needs and nothing else, as a JSON list: \
[{"name": "<function>", "arguments": {"<parameter>": <value>}}]. Reply [] when no function fits, or when a \
required argument is not given."""

_SHOWN = 500
"""Characters of a call that notes keep: an answer may be a megabyte."""


class Functions(RowsTask, frozen=True):
    """Rows {id, question, function, ground_truth, category}; the reward is the official verdict, or partial credit.

    `path` is a folder with the benchmark's files (BFCL_v4_<category>.json), or one table of such rows; `dataset` is a
    Hub dataset with these files (gorilla-llm/Berkeley-Function-Calling-Leaderboard). Without both, the rows are short
    requests made here, for the starter policy. Columns of a table: `question` (a text, messages, or BFCL's list of
    turns), `function`, `ground_truth` ([{function: {parameter: [accepted values]}}], none for (ir)relevance), and
    optionally `category` (simple where there is none) and `demonstration` (an answer's text).
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

            return [
                ListTable(f"made-{self.generate_seed}", _functions_toy.made(self.generate_rows, self.generate_seed))
            ]
        files = bfcl_files(hub_folder(self.dataset) if self.dataset else locate(self.path), self.categories)
        if files:
            return [BfclTable(questions, category, answers) for category, questions, answers in files]
        return super().tables()

    def input_files(self) -> list[Path]:
        """The tables; of the benchmark's folder its questions and their answers."""
        if self.dataset or not self.path:
            return []
        files = bfcl_files(locate(self.path), self.categories)
        return [file for _, *pair in files for file in pair if file is not None] or super().input_files()

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        for name in ("question", "function"):
            if name not in columns:
                have = ", ".join(columns)
                where.report(name, f"no such column. The table has: {have}. Map it: columns: {{{name}: …}}")

    def row(self, record: Record, where: Where) -> Row | None:
        category = str(record.get("category") or "simple")
        if self.categories and category not in self.categories:
            where.drop(f"category {category} is not among task.categories")
            return None
        turns = _decoded(record.get("question"))
        if isinstance(turns, list) and len(turns) > 1 and isinstance(turns[0], list):
            where.drop("a question of several turns")
            return None
        functions, answers = _decoded(record.get("function")), _decoded(record.get("ground_truth"))
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
            problems["ground_truth"] = answer_problem(answers, functions)
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
                row["gold"] = [self._answer(right)]
        elif "irrelevance" in category:
            row["gold"] = [{"role": "assistant", "content": ""}]
        if record.get("demonstration") is not None:
            row["demonstration"] = [_demonstrated(record["demonstration"], self)]
        return row if is_json(row, where) else None

    @property
    def _underscores(self) -> bool:
        return self.prompting == "tools"

    def _answer(self, calls: Sequence[Call]) -> Message:
        return {"role": "assistant", "content": self.written(calls)}

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
        notes: dict[str, Any] = {"verdicts": _verdicts(row["ground_truth"], grades, found), "calls": _shown(calls)}
        if found is not None:
            notes["problem"] = f"{found.kind}: {found.text}".encode(errors="replace").decode()
        return Score(reward=parts["solved"] if self.reward == "exact" else credit, parts=parts, notes=notes)

    # -- cheats -------------------------------------------------------------------------------------------------------

    def cheats(self, row: Row) -> dict[str, str]:
        """Calls that look right: too many, twice, by name only, with two values, thought or told but not made."""
        names = [tool(one, "python", self._underscores)["function"]["name"] for one in row["function"]]
        if not needs_answers(row["category"]):
            return {} if "irrelevance" not in row["category"] else self._calls_for_nothing(names)
        right = right_calls(row["function"], row["ground_truth"], row["category"], self._underscores)
        others = [Call(name, right[0].arguments) for name in names if name != right[0].name]
        hedged = [Call(one.name, {name: [value, ""] for name, value in one.arguments.items()}) for one in right]
        found = {
            "the right calls twice": self.written([*right, *right]),
            "the right calls and an unknown one": self.written([*right, Call("done", {})]),
            "the right calls with a parameter more": self.written(
                [Call(one.name, {**one.arguments, "correct": True}) for one in right]
            ),
            "the right calls thought, not made": f"<think>{self.written(right)}</think>",
            "the right calls told, not made": f"I would call {calls_json(right)} for you.",
        }
        if others:
            found["every function called"] = self.written([*right, *others])
            found["another function, the same arguments"] = self.written([others[0], *right[1:]])
        if any(one.arguments for one in right):
            found["values and nothing at once"] = self.written(hedged)
        if any(function["parameters"]["required"] for function in row["function"][:1]) or len(names) > 1:
            found["names without arguments"] = self.written([Call(name, {}) for name in names])
        return found

    def _calls_for_nothing(self, names: Sequence[str]) -> dict[str, str]:
        found = {"an unknown function called": self.written([Call("no_function", {})])}
        if names:
            found["a call all the same"] = self.written([Call(names[0], {})])
        return found


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
    notes = {"verdicts": {name: {**verdict, "text": f"{name} is expected"}}, "calls": _shown(calls)}
    return Score(reward=solved, parts={"solved": solved, "well_formed": float(calls is not None)}, notes=notes)


def _verdicts(answers: Sequence[Mapping[str, Any]], grades: Sequence[Grade], found: Problem | None) -> dict[str, Any]:
    """One verdict for each expected call, by its name; a name's second call is `name 2`."""
    verdicts: dict[str, Any] = {}
    for number, (answer, one) in enumerate(zip(answers, grades, strict=True), start=1):
        name, accepted = next(iter(answer.items()))
        verdicts[name if name not in verdicts else f"{name} {number}"] = {
            "verdict": "pass" if one.mean == 1 else "fail",
            "score": one.mean,
            "reasons": ""
            if found is None
            else f"{found.kind}: {found.text}"[:_SHOWN].encode(errors="replace").decode(),
            "text": f"{name}({json.dumps(accepted)[:_SHOWN]})",
        }
    return verdicts


def _shown(calls: Sequence[Call] | None) -> list[str]:
    """Calls as texts, for people: cut short, and plain ASCII whatever the answer held."""
    return [f"{call.name[:80]}({json.dumps(call.arguments)[:_SHOWN]})" for call in list(calls or [])[:16]]


def _decoded(cell: Any) -> Any:
    """A cell as a value: tables of plain texts hold JSON."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return None if cell == "" else cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


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
