"""ACE: everyday consumer tasks with a rubric of pass-or-fail criteria, some of them hurdles (Mercor, arXiv 2512.04921).

Owns the reading of ACE's tables (one line a criterion), the rules that turn verdicts into rewards, and what the judge
is told about ACE. Must not know how a judge is asked.

    python -c "from lib.task import load_task; print(load_task('ace', path='configs/examples/ace').rows('eval')[0])"
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from lib.data import Record, Table, Where, hub_table
from lib.grading import Criterion, JudgedTask
from lib.ledger import Verdict
from lib.tables import RecordError
from lib.task import ROW_PART, Row, Score, TaskError, nearest

logger = logging.getLogger(__name__)

HUB_CONFIGS = {"DIY": "diy", "Food": "food", "Gaming": "gaming", "Shopping": "shopping"}
"""Domain -> the config of `mercor/ACE` on the Hub that holds it."""

TASK, CRITERION, TEXT = "Task ID", "Criterion ID", "Description"
PROMPT, SPECIFIED = "Prompt", "Specified Prompt"
HURDLE, KIND, GROUNDING = "Hurdle Tag", "Criteria type", "Criterion Grounding Check"
WORKFLOW = "Workflow"
NEEDED = (TASK, CRITERION, PROMPT, HURDLE, KIND, TEXT)

FLAGS = {HURDLE: {"Hurdle": True, "Not": False}, GROUNDING: {"Grounded": True, "Not Grounded": False, "": False}}
LINKS = "Provides link(s)"
"""The kind of criterion that the benchmark checks by opening the links."""

# The rules of the benchmark's own text grader (its harness/autograder.py, see FACTS A), in our words.
INSTRUCTIONS = """\
Rules for these criteria:
- Use no knowledge of your own: only what the answer states outright or makes obvious counts.
- A criterion about recommendations fails where nothing is recommended: nothing passes for want of a counterexample.
- "all", "each", "only", or no quantifier at all: every recommendation must meet it. "at least N": N of them must.
- A criterion that begins with "If" passes where its condition does not hold.
- A remark that a price or the availability may change does not make a criterion fail."""


class Ace(JudgedTask, frozen=True):
    """ACE from a folder or file of its CSVs, or from the Hub (`dataset: mercor/ACE`); one row a task.

    `rule: workbench` is the share of criteria passed, and 0 once a hurdle has failed. `rule: official` is the
    benchmark's total_hurdle_score of text verdicts: the *number* of criteria passed, 0 once a hurdle has failed. The
    benchmark also opens the sources of grounded criteria and links, and gives -1 where they do not bear the answer out:
    that is not checked here, so that on grounded tasks the figures are too high. Part `unchecked` counts what it is
    about.
    """

    stratified: ClassVar[bool] = True
    read_columns: ClassVar[tuple[str, ...]] = (*NEEDED, SPECIFIED, GROUNDING, WORKFLOW)
    instructions: ClassVar[str] = INSTRUCTIONS

    split_ratio: float = Field(default=0.75, ge=0, le=1)
    domains: tuple[str, ...] = ()
    """Domains to use: DIY, Food, Gaming, Shopping, or the names of your own files; () = all that are there."""
    rule: Literal["workbench", "official"] = "workbench"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dataset_config:
            raise ValueError(f"dataset_config ({self.dataset_config}): name the configs in task.domains instead.")
        if self.judge.provider == "reward_model":
            raise ValueError(
                "judge.provider reward_model gives one number for a whole answer, but ACE needs a verdict on every "
                "criterion: use openai, gemini or compatible."
            )
        low, high = self.reward_range
        if self.rule == "official" and (low > 0 or high <= 1):
            raise ValueError(
                "rule: official counts criteria: set reward_range to [0, the most criteria of a task]; in ACE: [0, 15]."
            )
        if self.rule == "workbench" and not (low <= 0 and high >= 1):
            raise ValueError(f"reward_range {list(self.reward_range)}: rule: workbench gives shares from 0 to 1.")
        return self

    # -- rows ---------------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        if not self.dataset:
            return [_Tasks(_domain(table.path), table, self) for table in super().tables()]
        _log_licence(self.dataset)
        chosen = self._chosen(list(HUB_CONFIGS))
        return [
            _Tasks(name, hub_table(self.dataset, HUB_CONFIGS[name], self.dataset_split, self.dataset_revision), self)
            for name in chosen
        ]

    def input_files(self) -> list[Path]:
        """The files of the domains asked for."""
        files = {_domain(file): file for file in super().input_files()}
        return [files[name] for name in self._chosen(list(files))]

    def _chosen(self, known: Sequence[str]) -> list[str]:
        """The known domains that are wanted, in their own order and spelling."""
        wanted = {name.lower(): name for name in self.domains}
        unknown = [name for low, name in wanted.items() if low not in {one.lower() for one in known}]
        if unknown:
            where = self.path or self.dataset
            raise TaskError(f"task.domains: {where} has no domain {unknown[0]!r}.{nearest(unknown[0], known)}")
        return [name for name in known if not wanted or name.lower() in wanted]

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        have = ", ".join(columns)
        for name in NEEDED:
            if name not in columns:
                where.report(name, f"no such column. The table has: {have}. Map it: columns: {{{name}: …}}")

    def row(self, record: Record, where: Where) -> Row | None:
        lines = [
            _Line(self.renamed(cells), Where(where.file, place, where.errors))
            for place, cells in zip(record["places"], record["lines"], strict=True)
        ]
        found = [_criterion(line) for line in lines]
        criteria = [criterion for criterion in found if criterion is not None]
        if len(criteria) < len(found) or not (_is_one_task(lines) & _told_apart(lines) & self._graded(criteria, where)):
            return None
        prompt = lines[0].cell(SPECIFIED) or lines[0].cell(PROMPT)
        twin = where.agree((PROMPT, prompt), record["id"])
        if twin is not None:  # a copy of a file, say: one of the two would be trained on, the other evaluated
            where.report(PROMPT, f"the same as at {twin}")
            return None
        row: Row = {"id": record["id"], "prompt": [{"role": "user", "content": prompt}], "category": record["domain"]}
        return {**row, "workflow": lines[0].cell(WORKFLOW), "criteria": criteria}

    def _graded(self, criteria: Sequence[dict[str, Any]], where: Where) -> bool:
        """Whether the rule can be applied to a task; reports why not."""
        if not any(criterion["hurdle"] for criterion in criteria):
            where.report(
                HURDLE, "no criterion of this task is a 'Hurdle': mark the one without which the answer is worthless"
            )
            return False
        if self.rule == "official" and len(criteria) > self.reward_range[1]:
            where.report("", f"{len(criteria)} criteria, but task.reward_range ends at {self.reward_range[1]:g}")
            return False
        return True

    # -- rewards ------------------------------------------------------------------------------------------------------

    def criteria(self, row: Row) -> list[Criterion]:
        """The row's criteria, all of them checks."""
        return [Criterion(id=criterion["id"], text=criterion["text"]) for criterion in row["criteria"]]

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        """The reward by the task's rule; unscored where an unknown verdict could change it.

        parts: passed, hurdles, kind/<kind> (shares; None where a verdict of them is unknown), criterion/<id> (1, 0 or
        None), and with rule: official total_score (criteria passed, hurdles or not) and unchecked (of these, how many
        the benchmark would hold against their sources).
        """
        told = {"pass": 1.0, "fail": 0.0, "unknown": None}
        criteria = row["criteria"]
        values = {criterion["id"]: told[verdicts[criterion["id"]].verdict] for criterion in criteria}
        worst, best = self._points(criteria, values, unknown=0.0), self._points(criteria, values, unknown=1.0)
        reward = worst if worst == best else None
        parts = {"passed": _share(values.values())}
        parts["hurdles"] = _share(values[criterion["id"]] for criterion in criteria if criterion["hurdle"])
        for kind in dict.fromkeys(criterion["kind"] for criterion in criteria):
            parts[f"kind/{kind}"] = _share(values[one["id"]] for one in criteria if one["kind"] == kind)
        if self.rule == "official":
            sourced = {one["id"]: one["grounded"] or one["kind"] == LINKS for one in criteria}
            parts["total_score"] = _total(values.values())
            parts["unchecked"] = _total(value for name, value in values.items() if sourced[name])
        parts |= {ROW_PART + name: value for name, value in values.items()}
        return Score(reward=reward, parts=parts, notes=self.notes(row, verdicts, scored=reward is not None))

    def _points(self, criteria: Sequence[dict[str, Any]], values: Mapping[str, float | None], unknown: float) -> float:
        """What the rule gives with every unknown verdict taken as `unknown`."""
        settled = {name: unknown if value is None else value for name, value in values.items()}
        if not all(settled[criterion["id"]] for criterion in criteria if criterion["hurdle"]):
            return 0.0
        total = sum(settled.values())
        return total if self.rule == "official" else total / len(settled)


class _Line(NamedTuple):
    """One line of a table: a criterion, and where it stands."""

    cells: Record
    where: Where

    def cell(self, name: str) -> str:
        """A cell's text; "" for an empty one, which some readers give as None."""
        value = self.cells.get(name)
        return "" if value is None else str(value).strip()


class _Tasks(Table):
    """A table of criteria, one record for each task: {id, domain, places, lines}. A broken line is a record itself."""

    def __init__(self, domain: str, table: Table, task: Ace) -> None:
        self.name, self.path, self.columns = table.name, table.path, table.columns
        self._domain, self._table, self._task = domain, table, task

    @cached_property
    def _groups(self) -> list[tuple[str, list[int]]]:
        groups: dict[str, tuple[str, list[int]]] = {}
        for number in range(len(self._table)):
            try:
                name = _Line(self._task.renamed(self._table.read(number)), Where("", "")).cell(TASK)
            except RecordError:
                name = f"broken {number}"
            groups.setdefault(name, (name, []))[1].append(number)
        return list(groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def place(self, number: int) -> str:
        return self._table.place(self._groups[number][1][0])

    def read(self, number: int) -> Record:
        name, numbers = self._groups[number]
        lines = [self._table.read(one) for one in numbers]
        places = [self._table.place(one) for one in numbers]
        return {"id": f"{self._domain}-{name}", "domain": self._domain, "places": places, "lines": lines}


def _domain(path: Path | None) -> str:
    """A file's domain: its name without ending and without ACE's prefix."""
    return path.stem.removeprefix("ACE-") if path else ""


def _criterion(line: _Line) -> dict[str, Any] | None:
    """A line as a criterion; None after reporting what is wrong with it."""
    problems = [(name, "empty") for name in (TASK, CRITERION, KIND, TEXT) if not line.cell(name)]
    if not (line.cell(SPECIFIED) or line.cell(PROMPT)):
        problems.append((PROMPT, f"empty, and so is {SPECIFIED}"))
    for name, known in FLAGS.items():
        if line.cell(name) not in known:
            allowed = ", ".join(repr(value) for value in known if value)
            problems.append((name, f"{line.cell(name)!r} is none of {allowed}"))
    for column, message in problems:
        line.where.report(column, message)
    if problems:
        return None
    flags = {name: known[line.cell(name)] for name, known in FLAGS.items()}
    criterion = {"id": line.cell(CRITERION), "text": line.cell(TEXT), "hurdle": flags[HURDLE]}
    return {**criterion, "kind": line.cell(KIND), "grounded": flags[GROUNDING]}


def _is_one_task(lines: Sequence[_Line]) -> bool:
    """Whether all lines ask the same; reports the first that does not."""
    for name in (SPECIFIED, PROMPT):
        other = next((line for line in lines if line.cell(name) != lines[0].cell(name)), None)
        if other is not None:
            other.where.report(name, f"another text than at {lines[0].where}, which has the same {TASK}")
            return False
    return True


def _told_apart(lines: Sequence[_Line]) -> bool:
    """Whether no criterion is there twice: its id in the table, its text in the task. Reports those that are."""
    good = True
    first: dict[str, _Line] = {}
    for line in lines:
        other = line.where.agree((CRITERION, line.where.file, line.cell(CRITERION)), line.where)
        if other is not None:
            line.where.report(CRITERION, f"{line.cell(CRITERION)!r} is also the id of {other}")
        twin = first.setdefault(line.cell(TEXT), line)
        if twin is not line:
            line.where.report(TEXT, f"the same criterion as at {twin.where}")
        good &= other is None and twin is line
    return good


def _share(values: Any) -> float | None:
    known = list(values)
    total = _total(known)
    return None if total is None else total / len(known)


def _total(values: Any) -> float | None:
    """The sum; None where one of them is unknown."""
    known = list(values)
    return None if None in known else float(sum(known))


def _log_licence(dataset: str) -> None:
    """Say what the live card allows: the copy that this was written with is cc-by-4.0, and cards change."""
    import httpx
    from huggingface_hub import DatasetCard

    try:
        licence = DatasetCard.load(dataset).data.get("license")
    except (OSError, ValueError, httpx.HTTPError) as error:
        logger.warning(
            "ace: the card of %s could not be read (%s): look at its licence before you train", dataset, error
        )
        return
    logger.info("ace: %s, licence on its card: %s. Read the card: some sets of tasks forbid training", dataset, licence)
