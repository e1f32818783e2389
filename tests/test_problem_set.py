"""The project's own coding problems: enough of them, graded, and each with a reference that its tests accept."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from lib import PROJECT_ROOT
from lib.extract import extract_program, fenced
from lib.rollout import submit
from lib.sandbox import SandboxError, SandboxSettings, self_test
from lib.task import Rollout, Row
from lib.tasks.coding import PROBLEMS, Coding

RECORDS = [json.loads(line) for line in (PROJECT_ROOT / PROBLEMS).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """All rows that pass the check of data preparation."""
    try:
        self_test(SandboxSettings())
    except SandboxError as error:
        assert not os.environ.get("CI"), f"CI must have a sandbox: {error}"
        pytest.skip(f"no sandbox on this machine: {error!s:.200}")
    task = Coding(split_ratio=1)
    return list(task.rows("train"))


def test_there_are_at_least_sixty_problems_of_three_grades() -> None:
    assert len(RECORDS) >= 60
    grades = Counter(record["category"] for record in RECORDS)
    assert set(grades) == {"easy", "medium", "hard"} and min(grades.values()) >= 15


def test_every_problem_has_a_name_a_text_a_reference_and_four_checks_of_its_own() -> None:
    assert (
        len({record["id"] for record in RECORDS}) == len({record["instruction"] for record in RECORDS}) == len(RECORDS)
    )
    for record in RECORDS:
        assert len(record["instruction"]) > 40 and record["reference"].strip(), record["id"]
        if "io" in record:
            assert len({pair["input"] for pair in record["io"]}) >= 4, record["id"]
        else:
            assert len({test for test in record["tests"] if "assert" in test}) >= 4, record["id"]
            assert record["entry_point"] in record["instruction"], record["id"]


def test_every_reference_earns_the_reward_and_every_stub_nothing(rows: list[Row]) -> None:
    assert {row["id"] for row in rows} == {record["id"] for record in RECORDS}


def test_references_are_found_in_a_chatty_answer() -> None:
    for record in RECORDS:
        names = [record["entry_point"]] if "entry_point" in record else []
        answer = f"Let me think.\n\n{fenced(record['reference'])}\n\nThis takes `O(n)`."
        assert extract_program(answer, names).source == record["reference"].rstrip("\n"), record["id"]


def test_no_problem_is_solved_by_the_answer_to_another(rows: list[Row]) -> None:
    """The sources are renamed, so that only what they compute counts."""
    functions = [row for row in rows if "tests" in row and len(row["entry_points"]) == 1]
    task = Coding()
    for row, other in zip(functions, functions[1:] + functions[:1], strict=True):
        name, theirs = row["entry_points"][0], other["entry_points"][0]
        source = extract_program(other["gold"][0]["content"], [theirs]).source
        score = submit(task.score(Rollout.of(row, fenced(f"{source}\n\n{name} = {theirs}\n")))).result(timeout=60)
        assert score.reward == 0.0, (row["id"], other["id"])
