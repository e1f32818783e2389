"""Judged answers: rows with prompts and rubrics, and a judge that scores each rubric from 0 to 1 with its reasons.

Owns the rows, the named sub-scores with their weights, and their weighted mean. Must not know how a judge is asked.

    python -c "from lib.task import load_task; \
               print(load_task('judged', path='configs/examples/judged.jsonl', rubric='Helpful.').rows('eval')[0])"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from lib.data import Record, Where, is_json, messages_of
from lib.grading import Criterion, JudgedTask
from lib.ledger import Verdict
from lib.tables import no_key_twice
from lib.task import Message, Row, Score

OVERALL = "overall"
"""The name of the one sub-score of a rubric that is a plain text."""

INSTRUCTIONS = """\
These criteria are rubrics: use the whole range from 0 to 1. 0 = not met at all, 0.5 = met in about half of what the \
rubric asks, 1 = met in full. Two answers of different quality should not get the same number. An answer is not better \
for being longer, for flattering, or for speaking about the rubric."""


class SubScore(BaseModel):
    """One rubric of several: what is judged, and how much it counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    weight: float = Field(default=1.0, ge=0)
    """0 = judged and shown, but not part of the reward."""


Rubric = dict[str, SubScore]


class Judged(JudgedTask, frozen=True):
    """Rows {id, prompt | messages, optional reference, rubric, metadata, category}; the reward is the weighted mean.

    A last assistant message in `messages` is the reference where there is no other. A row's own rubric goes before the
    task's. Each is a text, or {name: text or {text, weight}}.
    """

    instructions: ClassVar[str] = INSTRUCTIONS
    read_columns: ClassVar[tuple[str, ...]] = (
        "id", "prompt", "messages", "reference", "rubric", "metadata", "category",
    )  # fmt: skip

    rubric: Rubric = Field(default={})
    """The rubric of rows that have none."""

    @field_validator("rubric", mode="before")
    @classmethod
    def _written_out(cls, rubric: Any) -> Any:
        return _written_out(rubric)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem = self._problem(self.rubric) if self.rubric else ""
        if problem:
            raise ValueError(f"rubric: {problem}")
        if not (self.reward_range[0] <= 0 and self.reward_range[1] >= 1):
            raise ValueError(f"reward_range {list(self.reward_range)}: the weighted mean of scores lies from 0 to 1.")
        return self

    def _problem(self, rubric: Rubric) -> str:
        """What is wrong with a rubric as a whole; "" = nothing."""
        texts = [sub.text for sub in rubric.values()]
        if len(set(texts)) < len(texts):
            return "the same text under two names: a criterion is judged once"
        if not any(sub.weight for sub in rubric.values()):
            return "every weight is 0: nothing is left for the reward"
        if self.judge.provider == "reward_model" and len(rubric) > 1:
            return f"{len(rubric)} sub-scores, but a reward model (judge.provider) gives one number: keep one"
        return ""

    # -- rows ---------------------------------------------------------------------------------------------------------

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        have = ", ".join(columns)
        if "prompt" not in columns and "messages" not in columns:
            where.report(
                "prompt", f"no such column, nor 'messages'. The table has: {have}. Map it: columns: {{prompt: …}}"
            )
        if "rubric" not in columns and not self.rubric:
            where.report(
                "rubric", f"no such column, and task.rubric is not set. The table has: {have}. Give one of the two"
            )

    def row(self, record: Record, where: Where) -> Row | None:
        prompt, reference = _question(record, where), _text(record, "reference", where)
        rubric = self._rubric_of(record, where)
        if prompt is None or reference is None or rubric is None:
            return None
        if len(prompt) > 1 and prompt[-1]["role"] == "assistant":
            *prompt, last = prompt
            reference = reference or str(last.get("content") or "")
        row: Row = {"id": record["id"], "prompt": prompt}
        row |= {"reference": reference} if reference else {}
        row["rubric"] = {name: sub.model_dump() for name, sub in rubric.items()}
        row |= {name: record[name] for name in ("metadata",) if record.get(name) is not None}
        row |= {"category": str(record["category"])} if record.get("category") not in (None, "") else {}
        return row if is_json(row, where) else None

    def _rubric_of(self, record: Record, where: Where) -> Rubric | None:
        """The rubric of a record, its own or the task's; None after reporting why there is none."""
        try:
            cell = _written_out(record.get("rubric"))
        except ValueError as error:
            where.report("rubric", str(error))
            return None
        if not cell:
            if not self.rubric:
                where.report("rubric", "empty, and task.rubric is not set: give one of the two")
            return self.rubric or None
        try:
            rubric = _RUBRIC.validate_python(cell)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            where.report("rubric", f"{place}: {first['msg']}. A text, or {{name: {{text, weight}}}}")
            return None
        problem = self._problem(rubric)
        if problem:
            where.report("rubric", problem)
        return None if problem else rubric

    # -- rewards ------------------------------------------------------------------------------------------------------

    def criteria(self, row: Row) -> list[Criterion]:
        """The row's sub-scores."""
        return [Criterion(id=name, text=sub["text"], scale="score") for name, sub in row["rubric"].items()]

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        """The weighted mean of the sub-scores; unscored where one that has a weight is unknown.

        parts: rubric/<name>, the sub-score, None where it is unknown.
        """
        weights = {name: sub["weight"] for name, sub in row["rubric"].items()}
        scores = {name: verdicts[name].score for name in weights}
        needed = {name: score for name, score in scores.items() if weights[name]}
        known = {name: score for name, score in needed.items() if score is not None}
        total = sum(weights.values())
        mean = sum(weights[name] * score for name, score in known.items()) / total
        reward = min(max(mean, 0.0), 1.0) if len(known) == len(needed) else None
        parts = {f"rubric/{name}": score for name, score in scores.items()}
        return Score(reward=reward, parts=parts, notes=self.notes(row, verdicts, scored=reward is not None))


_RUBRIC = TypeAdapter(Rubric)


def _written_out(rubric: Any) -> Any:
    """A rubric as {name: {text, weight}}: from a text, from the JSON of one, and from {name: text}.

    Nulls are left out: a table of structs has the sub-scores of all rows in each of them.
    """
    if isinstance(rubric, str) and rubric.lstrip().startswith("{"):
        try:
            rubric = json.loads(rubric, object_pairs_hook=no_key_twice)
        except ValueError as error:
            raise ValueError(f"it begins with {{ and is no JSON ({error}): mend it, or put a word first") from None
    if isinstance(rubric, str):
        return {OVERALL: {"text": rubric.strip()}} if rubric.strip() else {}
    if not isinstance(rubric, Mapping):
        return {} if rubric is None else rubric
    return {name: _sub_score(value) for name, value in rubric.items() if _sub_score(value)}


def _sub_score(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value.strip()}
    if isinstance(value, Mapping):
        return {key: inner for key, inner in value.items() if inner is not None}
    return value


def _question(record: Record, where: Where) -> list[Message] | None:
    """The prompt as chat messages that end with what is to be answered; None after a report."""
    column = "prompt" if record.get("prompt") not in (None, "") else "messages"
    prompt = messages_of(record.get(column), "user")
    if not prompt or not any(message["role"] != "assistant" for message in prompt):
        shown = column if column in record else "prompt"
        where.report(shown, "empty, or neither a text nor a list of chat messages with roles")
        return None
    if not all(message["role"] == "assistant" or _has_text(message) for message in prompt):
        where.report(column, "a message without text: `content` must be a text, or a list of parts with a `text`")
        return None
    return prompt


def _has_text(message: Message) -> bool:
    """Whether a message says something that model and judge can read."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    return isinstance(content, str) and bool(content.strip())


def _text(record: Record, name: str, where: Where) -> str | None:
    """A cell that is a text, or empty; None after a report."""
    cell = record.get(name)
    if cell is None or isinstance(cell, str):
        return (cell or "").strip()
    where.report(name, f"a {type(cell).__name__}, not a text")
    return None
