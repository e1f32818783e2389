"""The contract: loading tasks, the words of a rollout, and the promises that every shipped task keeps."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lib import PROJECT_ROOT
from lib.config import load_config, own_task
from lib.rollout import submit
from lib.task import Message, Rollout, Row, Score, Task, TaskError, Turn, load_task, task_names

ROW: Row = {"id": "r", "prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}

CLASS_FILE = """
from __future__ import annotations
from collections.abc import Sequence
from lib.task import Rollout, Row, Score, Split, Task

class Sums(Task, frozen=True):
    bonus: float = 0.0
    def rows(self, split: Split) -> Sequence[Row]:
        prompts = [[{"role": "user", "content": f"{i} + {i}?"}] for i in range(3)]
        return [{"id": f"{split}-{i}", "prompt": prompt, "sum": 2 * i} for i, prompt in enumerate(prompts)]
    async def score(self, rollout: Rollout) -> Score:
        return Score(reward=float(rollout.text == str(rollout.row["sum"])))
"""


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def score_of(task: Task, rollout: Rollout) -> Score:
    return submit(task.score(rollout)).result(timeout=60)


def with_score(folder: Path, definition: str, rows: list[dict[str, Any]] | None = None) -> Task:
    """A task from a file that holds only `score`, beside a small table."""
    data = folder / "data.jsonl"
    rows = rows or [{"prompt": f"{i} + {i}?", "gold": str(2 * i)} for i in range(10)]
    write(data, "".join(json.dumps(row) + "\n" for row in rows))
    return load_task(write(folder / "mine.py", definition), path=str(data))


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_shipped_task_is_loaded_by_its_file_name() -> None:
    task = load_task("decisions", tau=0.5)
    assert type(task).__module__ == "lib.tasks.decisions"
    assert task.model_dump()["tau"] == 0.5


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(
        TaskError, match=r"unknown task 'decision'\. Did you mean 'decisions'\? Known: .*\.py file of your own"
    ):
        load_task("decision")


@pytest.mark.parametrize("name", ["", "_thermal_store", "../config", "lib.config", "os"])
def test_only_task_modules_can_be_named(name: str) -> None:
    with pytest.raises(TaskError, match="unknown task"):
        load_task(name)


def test_a_missing_file_is_named_with_the_place_it_was_looked_for() -> None:
    with pytest.raises(
        TaskError, match=rf"task file not found: {PROJECT_ROOT}/nowhere/mine\.py\. Give a path relative to the project"
    ):
        load_task("nowhere/mine.py")


def test_a_class_in_a_users_file_is_a_task(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "sums.py", CLASS_FILE), bonus=0.25)
    assert task.model_dump() == {"max_turns": 1, "reward_range": (0.0, 1.0), "bonus": 0.25}
    row = task.rows("train")[2]
    assert score_of(task, Rollout.of(row, "4")).reward == 1.0
    assert score_of(task, Rollout.of(row, "5")).reward == 0.0


def test_of_a_class_and_its_base_in_one_file_the_derived_one_counts(tmp_path: Path) -> None:
    derived = "\nclass Harder(Sums, frozen=True):\n    level: int = 2\n"
    assert type(load_task(write(tmp_path / "sums.py", CLASS_FILE + derived))).__name__ == "Harder"


def test_an_imported_task_class_is_not_the_files_own(tmp_path: Path) -> None:
    text = "from lib.tasks.decisions import Decisions\nclass Mine(Decisions, frozen=True):\n    extra: int = 1\n"
    assert type(load_task(write(tmp_path / "mine.py", text))).__name__ == "Mine"
    with pytest.raises(TaskError, match="holds neither a Task subclass nor a function score"):
        load_task(write(tmp_path / "other.py", "from lib.tasks.decisions import Decisions\n"))


def test_two_tasks_in_one_file_are_refused_by_name(tmp_path: Path) -> None:
    second = CLASS_FILE.replace("class Sums", "class Products").replace("from __future__ import annotations", "")
    with pytest.raises(TaskError, match=r"several tasks \(Sums, Products\): keep one per file"):
        load_task(write(tmp_path / "both.py", CLASS_FILE + second))


def test_a_file_without_task_and_without_score_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"neither a Task subclass nor a function score\(text, row\): add one of them"):
        load_task(write(tmp_path / "empty.py", "x = 1\n"))


def test_two_files_of_the_same_name_stay_two_tasks(tmp_path: Path) -> None:
    first = load_task(write(tmp_path / "a" / "mine.py", CLASS_FILE))
    second = load_task(write(tmp_path / "b" / "mine.py", CLASS_FILE.replace("2 * i", "3 * i")))
    assert [task.rows("train")[1]["sum"] for task in (first, second)] == [2, 3]


def test_an_unknown_field_gets_the_nearest_one() -> None:
    with pytest.raises(TaskError, match=r"task\.split_ration: unknown key\. Did you mean 'split_ratio'\?"):
        load_task("decisions", split_ration=0.5)


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(write(tmp_path / "sums.py", CLASS_FILE), bonus="much", bonsu=1)
    assert "task.bonus: " in str(caught.value) and "(given: 'much')" in str(caught.value)
    assert "task.bonsu: unknown key. Did you mean 'bonus'?" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_field_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(TaskError, match=r"task\.tau: "):
        load_task("decisions", tau=value)


@pytest.mark.parametrize("field", [{"reward_range": (1.0, 0.0)}, {"reward_range": (0.5, 0.5)}, {"max_turns": 0}])
def test_an_impossible_range_or_number_of_turns_is_refused_at_load(tmp_path: Path, field: dict[str, Any]) -> None:
    with pytest.raises(TaskError):  # now: every single reward of the run is "outside the task's reward_range 1 to 0"
        load_task(write(tmp_path / "sums.py", CLASS_FILE), **field)


# -- a user's score(text, row) ----------------------------------------------------------------------------------------


def test_a_plain_score_function_and_a_table_are_a_task(tmp_path: Path) -> None:
    task = with_score(tmp_path, "def score(text, row):\n    return float(text == row['gold'][-1]['content'])\n")
    row = task.rows("train")[0]
    assert score_of(task, Rollout.of(row, *row["gold"])).reward == 1.0
    assert score_of(task, Rollout.of(row, "nonsense")).reward == 0.0


def test_an_async_score_function_is_awaited(tmp_path: Path) -> None:
    task = with_score(
        tmp_path, "import asyncio\nasync def score(text, row):\n    await asyncio.sleep(0)\n    return 0.25\n"
    )
    assert score_of(task, Rollout.of(task.rows("train")[0], "x")).reward == 0.25


def test_none_means_could_not_be_judged(tmp_path: Path) -> None:
    task = with_score(tmp_path, "def score(text, row):\n    return None\n")
    score = score_of(task, Rollout.of(task.rows("train")[0], "x"))
    assert score.reward is None and not score.masked


def test_a_whole_score_passes_through(tmp_path: Path) -> None:
    text = "from lib.task import Score\ndef score(text, row):\n    return Score(reward=0.5, parts={'style': 1.0})\n"
    task = with_score(tmp_path, text)
    assert score_of(task, Rollout.of(task.rows("train")[0], "x")) == Score(reward=0.5, parts={"style": 1.0})


@pytest.mark.parametrize("returned", ["'good'", "[0.5]", "2.0", "float('nan')", "-0.1"])
def test_what_is_no_reward_raises_and_never_becomes_zero(tmp_path: Path, returned: str) -> None:
    task = with_score(tmp_path, f"def score(text, row):\n    return {returned}\n")
    with pytest.raises(TaskError, match="row 'data:"):
        score_of(task, Rollout.of(task.rows("train")[0], "x"))


def test_a_score_function_cannot_change_the_row_for_the_next_answer(tmp_path: Path) -> None:
    task = with_score(tmp_path, "def score(text, row):\n    row.clear()\n    return 1.0\n")
    row = task.rows("train")[0]
    before = json.dumps(row)
    score_of(task, Rollout.of(row, "x"))
    assert json.dumps(row) == before


# -- the words --------------------------------------------------------------------------------------------------------


def test_rollout_of_texts_has_one_turn_for_each() -> None:
    rollout = Rollout.of(ROW, "3", "4")
    assert [turn.message["content"] for turn in rollout.turns] == ["3", "4"]
    assert rollout.messages == (*ROW["prompt"], *(turn.message for turn in rollout.turns))
    assert rollout.text == "4" and rollout.stop == "done"


def test_rollout_of_messages_keeps_the_worlds_apart_from_the_policys() -> None:
    call: Message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
    }
    result: Message = {"role": "tool", "content": "4"}
    rollout = Rollout.of(ROW, call, result, "It is 4.")
    assert [turn.message for turn in rollout.turns] == [call, {"role": "assistant", "content": "It is 4."}]
    assert rollout.messages[-2] == result


def test_the_text_of_no_answer_is_empty() -> None:
    assert Rollout.of(ROW).text == ""
    assert Rollout.of(ROW, {"role": "assistant", "content": None}).text == ""
    assert Rollout.of(ROW, {"role": "assistant"}).text == ""


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Turn(message={"role": "assistant", "content": "x"}), "stop"),
        (Rollout.of(ROW, "x"), "turns"),
        (Score(reward=1.0), "reward"),
        (load_task("decisions"), "tau"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_turns_rollouts_scores_and_tasks_are_frozen_and_closed(value: Any, field: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, getattr(value, field))
    with pytest.raises(ValidationError, match="extra"):
        type(value)(**dict(value), surprise=1)


def test_notes_of_one_score_are_not_the_next_ones() -> None:
    Score(reward=1.0).notes["seen"] = True
    assert Score(reward=1.0).notes == {}


def test_a_rollout_survives_the_way_to_another_process() -> None:
    turn = Turn(
        message={"role": "assistant", "content": "é"}, prompt_ids=(1, 2), output_ids=(3,), logprobs=(-0.1,), policy=7
    )
    rollout = Rollout(row=ROW, messages=(*ROW["prompt"], turn.message), turns=(turn,), stop="max_turns")
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout


# -- promises of every shipped task -----------------------------------------------------------------------------------


def config_of(name: str) -> Path:
    """The smallest config of a task: what a user would start from."""
    paths = sorted((PROJECT_ROOT / "configs").rglob("*.yaml"), key=lambda path: ("smoke" not in path.parts, path))
    for path in paths:
        if own_task(path) == name:
            return path
    raise AssertionError(f"configs/ has no config of the task {name!r}: a task is its file, its test and a config")


def shipped(name: str) -> Task:
    config = load_config(config_of(name))
    return load_task(name, **config.task.params)


def some_rows(task: Task, count: int = 6) -> list[Row]:
    return [row for split in ("train", "eval") for row in islice(task.rows(split), count)]  # type: ignore[arg-type]


def judged(task: Task, row: Row, *replies: str | Message) -> Score:
    """What a replayed answer earns; a judge or sandbox that is not there is an unscored answer, not an error."""
    try:
        return score_of(task, Rollout.of(row, *replies))
    except Exception as error:
        return Score(reward=None, notes={"error": str(error)})


@pytest.mark.parametrize("name", task_names())
def test_rows_of_a_shipped_task_have_unique_ids_prompts_and_survive_json(name: str) -> None:
    task = shipped(name)
    rows = some_rows(task, count=200)
    assert rows
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert isinstance(row["id"], str) and row["id"]
        assert row["prompt"] and all(message["role"] for message in row["prompt"])
        assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("name", task_names())
def test_rows_of_a_shipped_task_come_in_the_same_order_every_time(name: str) -> None:
    first, second = shipped(name), shipped(name)
    assert some_rows(first, 50) == some_rows(first, 50) == some_rows(second, 50)


@pytest.mark.parametrize("name", task_names())
def test_the_gold_answer_of_a_shipped_task_earns_the_highest_reward(name: str) -> None:
    task = shipped(name)
    rows = some_rows(task)
    for row in (row for row in rows if row.get("gold")):
        best = judged(task, row, *row["gold"])
        assert best.reward is not None and not best.masked, best.notes
        assert task.reward_range[0] <= best.reward <= task.reward_range[1]
        others = [judged(task, row, *other["gold"]) for other in rows if other.get("gold")]
        others += [judged(task, row, text) for text in ("", "no", str(row["prompt"][-1].get("content")))]
        assert all(other.masked or other.reward is None or other.reward <= best.reward for other in others)


@pytest.mark.parametrize("name", task_names())
def test_an_empty_answer_to_a_shipped_task_scores_below_gold_or_not_at_all(name: str) -> None:
    task = shipped(name)
    for row in some_rows(task):
        empty = judged(task, row, "")
        gold = row.get("gold")
        nothing_is_gold = bool(gold) and not any(
            message.get("content") or message.get("tool_calls") for message in gold
        )
        if gold and not nothing_is_gold and empty.reward is not None and not empty.masked:
            best = judged(task, row, *gold)
            assert best.reward is not None and empty.reward < best.reward


@pytest.mark.parametrize("name", task_names())
def test_scoring_a_rollout_of_a_shipped_task_twice_agrees(name: str) -> None:
    task, again = shipped(name), shipped(name)
    for row in some_rows(task, 3):
        for replies in (row.get("gold") or ["yes"], [""], ["something else"]):
            first = judged(task, row, *replies)
            assert first.reward == judged(task, row, *replies).reward == judged(again, row, *replies).reward
            assert first.parts == judged(task, row, *replies).parts


ROWS_HASH = """
import hashlib, json, sys
from itertools import islice
from lib.task import load_task
task = load_task(sys.argv[1], **json.loads(sys.argv[2]))
rows = [row for split in ("train", "eval") for row in islice(task.rows(split), 50)]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


@pytest.mark.parametrize("name", task_names())
def test_a_shipped_task_is_the_same_in_another_process(name: str) -> None:
    params = load_config(config_of(name)).task.params
    command = [sys.executable, "-c", ROWS_HASH, name, json.dumps(params)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    here = json.dumps(some_rows(load_task(name, **params), 50))
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_a_users_file_is_the_same_task_in_another_process(tmp_path: Path) -> None:
    name = write(tmp_path / "sums.py", CLASS_FILE)
    command = [sys.executable, "-c", ROWS_HASH, name, "{}"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    here = json.dumps(some_rows(load_task(name), 50))
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()
