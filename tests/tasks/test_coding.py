"""The task `coding`: rows from tables, the check of every row, prompts, the reward, cheats, template problems."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lib.data import write_csv
from lib.extract import fenced
from lib.rollout import submit
from lib.sandbox import SandboxError, SandboxSettings, self_test
from lib.task import Rollout, Row, Score, TaskError, Turn, load_task
from lib.tasks import _coding_templates as templates
from lib.tasks._coding_cheats import stub_for
from lib.tasks._coding_rows import Unusable, problem_of, same_output
from lib.tasks.coding import Coding

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double(-3) == -6", "assert double('a') == 'aa'"]
RECORD: dict[str, Any] = {"id": "d", "instruction": "Write double(x).", "entry_point": "double", "tests": TESTS}
ROW: Row = {"id": "d", "prompt": [{"role": "user", "content": "?"}], "tests": TESTS, "entry_points": ["double"]}
IO_ROW: Row = {"id": "s", "prompt": ROW["prompt"], "io": [["2 3\n", "5\n"], ["1 1\n", "2\n"], ["-4 4\n", "0\n"]]}
HUMAN_EVAL = "def check(candidate):\n    assert candidate(1) == 2"
BOX = "import dataclasses\n\n\n@dataclasses.dataclass\nclass Box:\n    x: int\n"
ADDS = "a, b = map(int, input().split())\nprint(a + b)\n"


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Programs run in the real sandbox; where there is none, tests skip with the reason, but not in CI."""
    try:
        self_test(SandboxSettings())
    except SandboxError as error:
        assert not os.environ.get("CI"), f"CI must have a sandbox: {error}"
        pytest.skip(f"no sandbox on this machine: {error!s:.200}")


needs_sandbox = pytest.mark.usefixtures("sandbox")


def table(path: Path, *records: dict[str, Any], **params: Any) -> Coding:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Coding(path=str(path), split_ratio=1, **params)


def with_id(number: int, **changes: Any) -> dict[str, Any]:
    return {**RECORD, "id": str(number), **changes}


def earned(row: Row, source: str, **params: Any) -> Score:
    return submit(Coding(**params).score(Rollout.of(row, fenced(source)))).result(timeout=120)


def told(score: Score) -> list[str]:
    """What each test said, in order."""
    return [one["reasons"] for one in score.notes["verdicts"].values()]


def reward(row: Row, source: str, **params: Any) -> float | None:
    return earned(row, source, **params).reward


# -- what a record holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "tests"),
    [
        (["assert f(1) == 2", "assert f(2) == 3"], ["assert f(1) == 2", "assert f(2) == 3"]),
        ('["assert f(1) == 2"]', ["assert f(1) == 2"]),
        ("assert f(1) == 2\nassert f(2) == 3\n", ["assert f(1) == 2", "assert f(2) == 3"]),
        (["x = f(1)", "assert x == 2", "print(x)"], ["x = f(1)\nassert x == 2"]),
        (["import math\nassert math.isclose(f(1), 2)"], ["import math\nassert math.isclose(f(1), 2)"]),
        (["", "assert f(1) == 2  # one", "# nothing"], ["assert f(1) == 2  # one"]),
        (["for x in range(3):\n    assert f(x) == x + 1"], ["for x in range(3):\n    assert f(x) == x + 1"]),
        (
            ["def same(a, b):\n    assert a == b", "same(f(1), 2)", "same(f(2), 3)"],
            ["def same(a, b):\n    assert a == b\nsame(f(1), 2)", "same(f(2), 3)"],
        ),
        (HUMAN_EVAL, [HUMAN_EVAL + "\ncheck(f)"]),
    ],
)  # fmt: skip
def test_tests_are_one_text_for_each_check_with_what_it_needs_before_it(cell: Any, tests: list[str]) -> None:
    assert problem_of({"tests": cell, "entry_point": "f"}).tests == tests


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no tests"),
        ({"tests": []}, "no tests"),
        ({"tests": ["", " "]}, "no tests"),
        ({"tests": ["f(1)", "print(f(2))"]}, "no test asserts anything"),
        ({"tests": ["assert f(1) =="]}, "tests that are not Python"),
        ({"tests": ["assert f('\0')"]}, "tests that are not Python"),
        ({"tests": ["assert " + "-" * 200_000 + "f(1)"]}, "tests that are not Python"),
        ({"tests": ["import math\nassert " + "1 + " * 900 + "f(1)"]}, "tests that are nested too deeply"),
        ({"tests": "[assert f(1)]"}, "tests that begin with [ but are no JSON list"),
        ({"tests": {"a": 1}}, "tests are neither a text nor a list of texts"),
        ({"tests": TESTS, "setup": "import"}, "setup is not Python"),
        ({"tests": TESTS, "setup": 3}, "setup is not a text"),
        ({"tests": TESTS, "reference": "def double(x)"}, "the reference solution is not Python"),
        ({"tests": TESTS, "reference": "a = 1"}, "the tests use nothing that the reference solution defines"),
        ({"tests": TESTS, "entry_point": "two words!"}, "an entry point that is no name of Python"),
        ({"tests": ["assert len('a') == 1"]}, "no entry point is given, and the tests call nothing of the solution's"),
        ({"tests": ["assert f(1) == g(1)"]}, "no entry point is given, and the tests call several unknown names"),
        ({"io": "no"}, "io is not JSON"),
        ({"io": [["1"]]}, "io holds something else than pairs of input and output"),
        ({"io": {"inputs": ["1"], "outputs": []}}, "io holds another number of inputs than of outputs"),
        ({"io": [[1, 2]]}, "io holds an input or output that is neither a text nor a list of lines"),
        ({"io": 7}, "io is neither a list of pairs nor {inputs, outputs}"),
    ],
)  # fmt: skip
def test_a_record_that_no_reward_can_be_made_of_says_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        problem_of(record)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("record", "names", "source"),
    [
        ({"tests": TESTS, "entry_point": "double"}, ["double"], "record"),
        ({"tests": TESTS, "entry_point": ["double", "half"]}, ["double", "half"], "record"),
        ({"tests": TESTS, "entry_point": "double, half"}, ["double", "half"], "record"),
        # What the reference defines and the tests use belongs to it: a completion cannot guess the class Box.
        (
            {"tests": ["assert f(Box(1)) == 1"], "entry_point": "f", "reference": "class Box: ...\ndef f(b): ..."},
            ["f", "Box"],
            "record",
        ),
        ({"tests": TESTS, "reference": f"LIMIT = 3\n\ndef helper(): ...\n\n{DOUBLE}"}, ["double"], "reference"),
        ({"tests": ["assert f(2) == 3"], "reference": "f = lambda x: x + 1"}, ["f"], "reference"),
        ({"tests": ["import math\nassert math.isclose(sorted(f([1]))[0], 1.0)"]}, ["f"], "tests"),
        ({"tests": ["from math import isclose\nx = f(1)\nassert isclose(x, 1)"]}, ["f"], "tests"),
        ({"tests": ["assert near(f(1), 1)"], "setup": "def near(a, b): return abs(a - b) < 1"}, ["f"], "tests"),
        ({"tests": ["assert all(f(x) == x for x in range(3))"]}, ["f"], "tests"),
        ({"tests": ["try:\n    f(1)\nexcept ValueError as e:\n    assert str(e)"]}, ["f"], "tests"),
        ({"tests": ["assert Stack().pop() is None"]}, ["Stack"], "tests"),
        # A name of the standard library that nobody imported is the solution's: there are problems called gcd.
        ({"tests": ["assert gcd(4, 6) == 2"]}, ["gcd"], "tests"),
    ],
)  # fmt: skip
def test_entry_points_are_the_records_else_the_references_else_what_the_tests_call(
    record: dict[str, Any], names: list[str], source: str
) -> None:
    problem = problem_of(record)
    assert (problem.entry_points, problem.entry_points_from) == (names, source)


@pytest.mark.parametrize(
    "cell",
    [
        [["1\n2", "3"]],
        [{"input": "1\n2", "output": "3"}],
        {"inputs": ["1\n2"], "outputs": ["3"]},
        {"inputs": [["1", "2"]], "outputs": [["3"]]},
        '{"inputs": ["1\\n2"], "outputs": ["3"]}',
    ],
)
def test_pairs_of_input_and_output_come_in_the_forms_that_datasets_use(cell: Any) -> None:
    assert problem_of({"io": cell}).io == [["1\n2", "3"]]


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("5\n", "5", True),
        ("5 \n6\n\n", "5\n6", True),
        ("5\r\n6\r\n", "5\n6\n", True),
        ("", "\n", True),
        ("5\n6", "6\n5", False),
        (" 5", "5", False),
        ("5\n\n6", "5\n6", False),
        ("5.0", "5", False),
        ("", "0", False),
    ],
)
def test_blanks_at_line_ends_and_blank_last_lines_do_not_count(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


# -- rows -------------------------------------------------------------------------------------------------------------


@needs_sandbox
def test_a_record_becomes_a_row_with_prompt_tests_gold_and_demonstration(tmp_path: Path) -> None:
    more = {"reference": DOUBLE, "category": 3, "setup": "import math", "demonstration": "def double(x): ..."}
    row = table(tmp_path / "t.jsonl", {**RECORD, **more}).rows("train")[0]
    assert row == {
        "id": "d",
        "prompt": [{"role": "user", "content": "Write double(x)."}],
        "tests": TESTS,
        "entry_points": ["double"],
        "setup": "import math",
        "category": "3",
        "gold": [{"role": "assistant", "content": f"```python\n{DOUBLE}```"}],
        "demonstration": [{"role": "assistant", "content": "```python\ndef double(x): ...\n```"}],
    }


@needs_sandbox
def test_the_columns_of_the_open_coder_dataset_are_mapped(tmp_path: Path) -> None:
    record = {"seq_id": 7, "instruction": "Double it.", "output": "…", "code": DOUBLE, "entry_point": "double"}
    columns = {"id": "seq_id", "tests": "testcase", "reference": "code"}
    row = table(tmp_path / "t.jsonl", {**record, "testcase": TESTS}, columns=columns).rows("train")[0]
    assert row["id"] == "7" and row["tests"] == TESTS and DOUBLE in row["gold"][0]["content"]


@needs_sandbox
def test_parquet_and_csv_tables_give_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    from datasets import Dataset

    record = {**RECORD, "reference": DOUBLE}
    Dataset.from_list([record]).to_parquet(str(tmp_path / "t.parquet"))
    write_csv(tmp_path / "t.csv", list(record), [[*list(record.values())[:3], json.dumps(TESTS), DOUBLE]])
    expected = list(table(tmp_path / "t.jsonl", record).rows("train"))
    for name in ("t.parquet", "t.csv"):
        assert list(Coding(path=str(tmp_path / name), split_ratio=1).rows("train")) == expected


@needs_sandbox
@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("Double a number.", "Double a number.\n\nDefine `double` in Python."),
        ("Write double(x).", "Write double(x)."),
        ("Write the function double.", "Write the function double."),
        ("Call it `double`.", "Call it `double`."),
        ("Return the double of x.", "Return the double of x.\n\nDefine `double` in Python."),
        ("Write doubles.", "Write doubles.\n\nDefine `double` in Python."),
        ([{"role": "system", "content": "Be"}, {"role": "user", "content": "2x"}], "2x\n\nDefine `double` in Python."),
    ],
)  # fmt: skip
def test_the_prompt_names_the_entry_point(tmp_path: Path, instruction: Any, told: str) -> None:
    row = table(tmp_path / "t.jsonl", {**RECORD, "instruction": instruction}).rows("train")[0]
    assert row["prompt"][-1]["content"] == told


@needs_sandbox
def test_the_prompt_of_an_io_problem_says_where_input_comes_from(tmp_path: Path) -> None:
    record = {"id": "s", "instruction": "Add two numbers.", "io": IO_ROW["io"], "reference": ADDS}
    row = table(tmp_path / "t.jsonl", record).rows("train")[0]
    assert row["prompt"][-1]["content"].endswith("reads standard input and prints the answer.")
    assert row["io"] == IO_ROW["io"] and "tests" not in row


@needs_sandbox
def test_rows_are_dropped_with_the_reason_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    task = table(
        tmp_path / "t.jsonl",
        with_id(1, reference=DOUBLE),
        with_id(2, reference="def double(x):\n    return x"),
        with_id(3, reference="def double(x):\n    while True: pass"),
        with_id(4, tests=["assert double(1) is None"]),
        with_id(5, tests=[]),
        with_id(6, instruction=" "),
        with_id(7),
        with_id(8, entry_point=None),
        with_id(9, reference="if True:\n    def double(x):\n        return 2 * x"),
        with_id(10, tests=["assert Box(1) == Box(1)"], entry_point="Box", reference=BOX),
        with_id(11, tests=["import os\nassert os.environ.get('no') == double(1)"]),
    )  # fmt: skip
    assert [row["id"] for row in task.rows("train")] == ["1", "7", "8"]
    for line in (
        "1 of 9 rows left out: a reference solution that fails its own tests (2)",
        "1 of 9 rows left out: a reference solution that takes too long (3)",
        "2 of 9 rows left out: tests that a stub passes (4, 11)",
        "1 of 11 rows left out: no tests",
        "1 of 11 rows left out: no instruction",
        "1 of 9 rows left out: a reference solution that does not define the entry point at its top level (9)",
        "1 of 9 rows left out: tests that compare objects which the solution makes (10)",
        "2 of them have no reference solution: only that a stub fails is known",
        "1 entry points taken from what the tests call: 8 → double …",
        "line 5 (5): left out: no tests",
    ):
        assert line in caplog.text


@needs_sandbox
def test_where_no_row_is_left_the_message_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no rows left: all 1 were left out.*reference must earn 1 and a stub 0"):
        table(tmp_path / "t.jsonl", with_id(1, tests=["assert double(1) is None"])).rows("train")


@needs_sandbox
def test_a_stub_that_passes_a_part_of_the_tests_matters_for_partial_credit_only(tmp_path: Path) -> None:
    record = with_id(1, tests=["assert double(None) is None", "assert double(2) == 4"])
    assert len(table(tmp_path / "t.jsonl", record).rows("train")) == 1
    with pytest.raises(TaskError, match="no rows left"):
        table(tmp_path / "t.jsonl", record, partial=True).rows("train")


def test_missing_columns_are_told_with_the_mapping_to_write(tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        table(tmp_path / "t.jsonl", {"question": "?", "cases": []}).rows("train")
    assert "columns: {instruction: …}" in str(caught.value) and "columns: {tests: …}" in str(caught.value)


@needs_sandbox
async def test_rows_can_be_read_where_a_loop_runs_already(tmp_path: Path) -> None:
    assert len(table(tmp_path / "t.jsonl", RECORD).rows("train")) == 1


@needs_sandbox
def test_a_split_of_checked_rows_is_a_sequence_that_reads_lazily(tmp_path: Path) -> None:
    records = [with_id(number, tests=TESTS if number % 3 else []) for number in range(12)]
    rows = table(tmp_path / "t.jsonl", *records).rows("train")
    assert len(rows) == 8 and rows[0]["id"] == "1" and rows[-1]["id"] == "11"
    assert [row["id"] for row in rows[2:4]] == [row["id"] for row in list(rows)[2:4]] == ["4", "5"]
    with pytest.raises(IndexError):
        rows[8]


# -- the reward -------------------------------------------------------------------------------------------------------


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "all_or_nothing", "share", "verdict"),
    [
        (DOUBLE, 1.0, 1.0, "pass"),
        ("double = lambda x: x + x\n", 1.0, 1.0, "pass"),
        ("def double(x):\n    return 2 * x if x != -3 else 0\n", 0.0, 0.75, "pass"),
        ("def double(x):\n    return abs(2 * x)\n", 0.0, 0.5, "pass"),
        (stub_for(["double"]), 0.0, 0.0, "fail"),
        ("def double(x):\n    return 2 * y\n", 0.0, 0.0, "error:NameError"),
        ("def double(x)\n    return 2 * x\n", 0.0, 0.0, "error:SyntaxError"),
        ("import nothing_of_this_name\n" + DOUBLE, 0.0, 0.0, "error:ModuleNotFoundError"),
        ("def double(x):\n    print(2 * x)\n", 0.0, 0.0, "fail"),
    ],
)
def test_the_reward_is_all_or_nothing_or_the_share_of_tests_passed(
    source: str, all_or_nothing: float, share: float, verdict: str
) -> None:
    score = earned(ROW, source)
    assert score.reward == all_or_nothing and not score.masked
    assert told(score)[0] == verdict
    assert reward(ROW, source, partial=True) == share


@needs_sandbox
def test_all_or_nothing_stops_at_the_first_failure() -> None:
    stub = stub_for(["double"])
    assert told(earned(ROW, stub)) == ["fail", "not run", "not run", "not run"]
    assert told(earned(ROW, stub, partial=True)) == ["fail"] * 4


@needs_sandbox
def test_a_score_tells_the_program_its_verdicts_time_and_memory() -> None:
    score = earned(ROW, "print('made\\x1b[31m')\n" + DOUBLE)
    assert score.parts == {"solved": 1.0, "passed": 1.0, "valid": 1.0, "format": 1.0, "timeout": 0.0}
    assert score.notes["program"].endswith("return 2 * x") and score.notes["found"] == "fenced"
    assert told(score) == ["pass"] * 4 and score.notes["sandbox"] in ("warm", "cold")
    assert "made" in score.notes["log"] and "\x1b" not in score.notes["log"]
    assert set(score.notes["measured"]) >= {"cpu_seconds", "wall_seconds"}
    json.dumps(score.notes, allow_nan=False)


@needs_sandbox
def test_an_endless_program_is_a_timeout_and_earns_nothing() -> None:
    settings = SandboxSettings.model_validate({"limits": {"test_cpu": 0.3, "cpu": 1.0, "wall": 10.0}})
    score = earned(ROW, "def double(x):\n    while True: pass\n", sandbox=settings)
    assert score.reward == 0.0 and score.parts["timeout"] == 1.0 and told(score)[0] == "timeout"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no answer"),
        ("I would double it.", "no Python that defines `double`"),
        ("```javascript\nfunction double(x) { return 2 * x }\n```", "no Python that defines `double`"),
        ("```python\ndef double(x):\n    return '\0'\n```", "the program holds a null byte"),
        ("```python\ndef double(x):\n    return '\ud800'\n```", "the program holds half of a surrogate pair"),
        ("x" * 10_000_000, "the answer is longer than 1000000 characters"),
    ],
)
async def test_an_answer_without_a_program_earns_nothing_and_says_why(text: str, problem: str) -> None:
    score = await Coding().score(Rollout.of(ROW, text))
    assert score.reward == 0.0 and score.parts["valid"] == 0.0 and score.notes == {"invalid": problem}


@needs_sandbox
async def test_an_answer_cut_off_in_its_block_is_run_as_far_as_it_came() -> None:
    turn = Turn(message={"role": "assistant", "content": "```python\ndef double(x):\n    return 2 * (x"}, stop="length")
    cut = Rollout(row=ROW, messages=(*ROW["prompt"], turn.message), turns=(turn,), stop="length")
    score = await Coding().score(cut)
    assert score.reward == 0.0 and score.notes["found"] == "unclosed"


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fenced(DOUBLE), 1.0),
        (DOUBLE, 0.75),
        (fenced(DOUBLE) + "\n" + fenced("double(3)"), 0.75),
        (fenced(stub_for(["double"])), 0.25),
        ("nothing", 0.0),
    ],
)
async def test_the_format_part_is_paid_for_one_closed_block_right_or_wrong(text: str, expected: float) -> None:
    assert (await Coding(format_share=0.25).score(Rollout.of(ROW, text))).reward == expected


@needs_sandbox
def test_setup_runs_beside_the_tests_and_not_in_the_solution() -> None:
    row = {**ROW, "setup": "SECRET = 4", "tests": ["assert double(2) == SECRET"]}
    assert reward(row, DOUBLE) == 1.0
    assert reward(row, "def double(x):\n    return SECRET\n") == 0.0


@needs_sandbox
def test_objects_of_the_solutions_own_are_compared_by_nobody() -> None:
    row = {**ROW, "tests": ["assert double(1) == double(1)"]}
    yes = "class Yes:\n    def __eq__(self, other): return True\n\ndef double(x):\n    return Yes()\n"
    score = earned(row, yes)
    assert score.reward == 0.0 and score.notes["opaque"]


@pytest.mark.parametrize(
    "field",
    [
        {"family": "templates", "path": "a.jsonl"},
        {"reward_range": (0.5, 1.0)},
        {"format_share": 1.0},
        {"sandbox": {"backend": "docker"}},
    ],
)
def test_impossible_fields_are_refused_at_load(field: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=rf"{next(iter(field))}"):
        load_task("coding", **field)


# -- input and output -------------------------------------------------------------------------------------------------


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "all_or_nothing", "share"),
    [
        (ADDS, 1.0, 1.0),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\n", 1.0, 1.0),
        ("if __name__ == '__main__':\n    " + ADDS.replace("\n", "\n    ").rstrip() + "\n", 1.0, 1.0),
        ("a, b = map(int, input().split())\nprint(abs(a + b) or 1)\n", 0.0, 2 / 3),
        ("print(5)\n", 0.0, 1 / 3),
        ("import sys\nprint(5)\nsys.exit(1)\n", 0.0, 0.0),
        ("print(1 / 0)\n", 0.0, 0.0),
    ],
)
def test_a_program_is_paid_for_what_it_prints(source: str, all_or_nothing: float, share: float) -> None:
    assert reward(IO_ROW, source) == all_or_nothing
    assert reward(IO_ROW, source, partial=True) == pytest.approx(share)


@needs_sandbox
def test_a_failed_input_ends_an_all_or_nothing_run_and_the_output_is_kept() -> None:
    notes = earned(IO_ROW, "print('no\\x07')\n").notes
    assert [one["reasons"] for one in notes["verdicts"].values()] == ["fail", "not run", "not run"]
    assert [one["verdict"] for one in notes["verdicts"].values()] == ["fail", "unknown", "unknown"]
    assert notes["verdicts"]["1"]["text"].startswith("'") and notes["log"].startswith("no\\x07\n")


# -- cheats -----------------------------------------------------------------------------------------------------------


@needs_sandbox
@pytest.mark.parametrize("row", [ROW, IO_ROW], ids=["tests", "io"])
@pytest.mark.parametrize("partial", [False, True])
async def test_no_cheat_of_the_tasks_own_earns_anything(row: Row, partial: bool) -> None:
    task = Coding(partial=partial)
    cheats = task.cheats(row)
    scores = {name: await task.score(Rollout.of(row, text)) for name, text in cheats.items()}
    assert len(cheats) >= 5
    assert {name: score.reward for name, score in scores.items()} == dict.fromkeys(cheats, 0.0)
    assert all(score.parts["valid"] == 1.0 for score in scores.values())  # each of them was run


async def test_some_of_the_cheats_fool_a_grader_that_shares_a_process_with_them() -> None:
    """Or they would show nothing."""
    fooled = set()
    for name in ("always equal", "a list that lies", "a search for the tests"):
        source = Coding().cheats(ROW)[name].split("\n", 1)[1].rsplit("```", 1)[0]
        names: dict[str, Any] = {"kept": list(TESTS)}
        exec(compile(source, name, "exec"), names)
        try:
            exec(TESTS[0], names)
        except AssertionError:
            continue
        fooled.add(name)
    assert fooled == {"always equal", "a list that lies", "a search for the tests"}


# -- check ------------------------------------------------------------------------------------------------------------


@needs_sandbox
def test_the_check_is_silent_where_programs_are_isolated() -> None:
    assert Coding().check() == []


def test_a_machine_without_bubblewrap_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    settings = SandboxSettings(workers=201)  # tried by nobody yet
    with pytest.raises(SandboxError, match="bubblewrap"):
        Coding(sandbox=settings).check()


# -- templates --------------------------------------------------------------------------------------------------------


def test_template_problems_have_prompts_of_their_own_and_the_same_ones_every_time() -> None:
    records = templates.generate(5000, seed=0)
    assert len({record["instruction"] for record in records}) == len({record["id"] for record in records}) == 5000
    assert records == templates.generate(5000, seed=0) != templates.generate(5000, seed=1)
    assert min(Counter(record["category"] for record in records).values()) > 200
    with pytest.raises(TaskError, match=r"generate_rows 100000: the templates give \d+ different problems"):
        templates.generate(100_000, seed=0)


@needs_sandbox
def test_the_sides_of_the_split_share_no_prompt() -> None:
    task = Coding(family="templates", generate_rows=200)
    sides = [{row["prompt"][0]["content"] for row in task.rows(split)} for split in ("train", "eval")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200


@pytest.mark.parametrize("kind", templates.KINDS)
def test_the_tests_of_a_template_pass_its_solution_and_no_other_kinds_or_constants(kind: str) -> None:
    for k in (2, 7, 20):
        right = templates.program("f", "x", templates.KINDS[kind].right, k)
        tests = [compile(test, "test", "exec") for test in templates.tests(kind, k, "f")]
        assert passes(right, tests)
        others = [
            templates.program("f", "x", expression, constant)
            for name, other in templates.KINDS.items()
            for expression in (other.right, other.slip)
            for constant in (templates.CONSTANTS if name == kind else [k])
        ]
        fooled = [other for other in others if other != right and passes(other, tests)]
        assert all(same_function(right, other) for other in fooled), fooled


def passes(source: str, tests: list[Any]) -> bool:
    names: dict[str, Any] = {}
    exec(source, names)
    try:
        for test in tests:
            exec(test, names)
    except (AssertionError, TypeError, IndexError):
        return False
    return True


def same_function(first: str, second: str) -> bool:
    """`x > 3` and `x >= 4` are the same for whole numbers, `x[3]` and `x[4 - 1]` always."""
    names: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    exec(first, names[0])
    exec(second, names[1])
    arguments: list[Any] = [list(range(length)) for length in (25, 40)] if "[" in first else list(range(-60, 130))
    return all(names[0]["f"](argument) == names[1]["f"](argument) for argument in arguments)


def test_demonstrations_of_templates_are_well_formed_and_right_in_about_three_cases_of_ten() -> None:
    records = templates.generate(2000, seed=0)
    right = sum(record["demonstration"] == record["reference"] for record in records) / len(records)
    assert 0.27 < right < 0.36
    for record in records:
        compile(record["demonstration"], record["id"], "exec")
        assert record["demonstration"].startswith(f"def {record['entry_point']}(")


def test_the_argument_and_the_constant_are_put_in_as_words() -> None:
    kind = templates.KINDS["larger"]
    assert templates.program("g", "n", kind.right, 12) == "def g(n):\n    return max(n, 12)\n"
    record = next(record for record in templates.generate(3000, 0) if record["category"] == "larger")
    assert "the larger of " in record["instruction"] and "{" not in record["instruction"]


@needs_sandbox
@pytest.mark.parametrize("params", [{"family": "templates", "generate_rows": 60}, {"family": "problems"}])
def test_no_cheat_of_the_gate_works(params: dict[str, Any]) -> None:
    from lib.preflight import attack_table

    task = load_task("coding", **params)
    rows = task.rows("train")
    answers = [{"row": row["id"], "reward": 0.0} for row in rows[:6]]
    table = attack_table(task, rows, answers, 64, count=6)
    assert [(one.name, one.works) for one in table.working] == [] and table.misjudged == []
    assert len(table.attacked) > 40 and table.unscored == 0
