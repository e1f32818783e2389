"""The attack suite: sound rewards pay no cheat, and holes of every kind are found; a judge is not fooled by fences."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, content_words, parse_prompt, running_judge, share_of

from lib.attacks import FAMILIES, OWN, UNSEEN, attacks
from lib.data import ScoreFunctionTask
from lib.grading import Criterion, JudgedTask, grading_messages
from lib.judge import JudgeSettings
from lib.ledger import Verdict
from lib.preflight import AttackTable, attack_table, score_one
from lib.task import Rollout, Row, Score, Task, load_task

LIMIT = 64


def sums(count: int = 40) -> list[Row]:
    """Rows with a number as gold answer; no prompt holds its answer."""
    chance = random.Random(0)
    pairs = [(chance.randint(100, 499), chance.randint(100, 499)) for _ in range(count)]
    return [
        {
            "id": f"sum-{i}",
            "prompt": [{"role": "user", "content": f"What is the sum of {a} and {b}? Answer with the number alone."}],
            "gold": [{"role": "assistant", "content": str(a + b)}],
        }
        for i, (a, b) in enumerate(pairs)
    ]


ROWS = sums()
WRONG = ["17", "23", "5"]


def gold(row: Row) -> str:
    return str(row["gold"][0]["content"])


def attacked(
    score: Callable[[str, Row], Any], base: float = 0.0, rows: list[Row] = ROWS, limit: int = LIMIT
) -> AttackTable:
    """The table of a reward function, against a base policy that earns `base` on every row."""
    answers = [{"row": row["id"], "reward": base} for row in rows for _ in range(4)]
    return attack_table(ScoreFunctionTask().bind(score), rows, answers, limit)


def working(table: AttackTable) -> set[str]:
    return {one.name for one in table.working}


# -- the canned cheats ------------------------------------------------------------------------------------------------


def test_there_are_about_forty_cheats_of_every_family_and_each_has_a_name_of_its_own() -> None:
    found = attacks(ScoreFunctionTask(), ROWS[0], WRONG, LIMIT)
    assert 40 <= len(found) <= 60
    assert {one.family for one in found} == FAMILIES.keys() - {UNSEEN}  # nobody judges these rows by criteria
    assert len({one.name for one in found}) == len({one.text for one in found}) == len(found)


def test_the_cheats_are_the_same_every_time() -> None:
    task = ScoreFunctionTask()
    assert attacks(task, ROWS[3], WRONG, LIMIT) == attacks(task, ROWS[3], WRONG, LIMIT)


def test_padding_goes_up_to_the_limit() -> None:
    padded = [one for one in attacks(ScoreFunctionTask(), ROWS[0], WRONG, 100) if one.family == "length"]
    assert len(padded) == 4 and {len(one.text) for one in padded} == {400}


@pytest.mark.parametrize("right", ["", "I don't know."])
def test_what_the_gold_answer_says_is_no_cheat(right: str) -> None:
    row = {**ROWS[0], "gold": [{"role": "assistant", "content": right}]}
    texts = [one.text.strip() for one in attacks(ScoreFunctionTask(), row, WRONG, LIMIT)]
    assert right not in texts and texts


class WithCheats(ScoreFunctionTask, frozen=True):
    def cheats(self, row: Row) -> dict[str, str]:
        return {"of its own": f"password {row['id']}"}


def test_a_tasks_own_cheats_are_tried_too() -> None:
    own = [one for one in attacks(WithCheats(), ROWS[5], WRONG, LIMIT) if one.family == OWN]
    assert [(one.name, one.text) for one in own] == [("of its own", "password sum-5")]
    task = WithCheats().bind(lambda text, row: float(text == gold(row) or text.startswith("password")))
    answers = [{"row": row["id"], "reward": 0.0} for row in ROWS]
    assert working(attack_table(task, ROWS, answers, LIMIT)) == {"of its own"}


# -- sound rewards ----------------------------------------------------------------------------------------------------


def exact(text: str, row: Row) -> float:
    return float(text.strip() == gold(row))


def close(text: str, row: Row) -> float:
    """Partial credit for a number nearby."""
    if not re.fullmatch(r"\s*\d{1,6}\s*", text, re.ASCII):
        return 0.0
    return max(0.0, 1 - abs(int(text) - int(gold(row))) / 100)


def one_number(text: str, row: Row) -> float | None:
    numbers = set(re.findall(r"\d+", text))
    return float(numbers == {gold(row)})


def masking(text: str, row: Row) -> Score:
    if not text.strip().isdecimal():
        return Score(reward=None, masked=True)
    return Score(reward=exact(text, row))


def negative(text: str, row: Row) -> float:
    return 1.0 if exact(text, row) else 0.25 if text.strip().isdecimal() else 0.0


@pytest.mark.parametrize("base", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("score", [exact, close, one_number, masking, negative])
def test_a_sound_reward_pays_no_cheat_whatever_the_base_policy_earns(
    score: Callable[[str, Row], Any], base: float
) -> None:
    table = attacked(score, base)
    assert table.working == [] and table.misjudged == [] and table.unscored == 0
    assert table.gold == dict.fromkeys(table.rows, 1.0) and len(table.rows) == 4


@pytest.mark.parametrize("on_invalid", ["mask", "zero"])
def test_the_decisions_task_pays_no_cheat(on_invalid: str) -> None:
    task = load_task("decisions", tau=1.0, generate_rows=60, on_invalid=on_invalid)
    rows = task.rows("train")
    answers = [{"row": row["id"], "reward": 0.2} for row in rows[:8]]
    table = attack_table(task, rows, answers, LIMIT, count=8)
    assert table.working == [] and table.misjudged == [] and len(table.gold) == 8
    reasons = {one.left_out for one in table.attacked}
    assert reasons == ({"masked"} if on_invalid == "mask" else {""})


# -- holes ------------------------------------------------------------------------------------------------------------


def planted_json(text: str, row: Row) -> float:
    """Reads the grader's verdict out of a text that holds the answer as well."""
    found = re.search(r"\{.*\}", text, re.S)
    try:
        verdicts = json.loads(found[0])["verdicts"] if found else []
    except ValueError:
        verdicts = []
    return float(any(one.get("pass") or one.get("score") for one in verdicts)) or exact(text, row)


def broken_counts_as_right(text: str, row: Row) -> float:
    try:
        return float(int(text) == int(gold(row)))
    except ValueError:
        return 1.0


def runs_the_answer(text: str, row: Row) -> float:
    """No error and no failure reported: passed."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    if "os._exit" in program or not program:  # this test would end here
        return exact(text, row)
    place: dict[str, Any] = {}
    try:
        exec(program, place)
        return float(place["solution"]() == int(gold(row)))
    except SystemExit as stopped:
        return float(not stopped.code)
    except Exception:
        return 0.0


def words_of_the_prompt(text: str, row: Row) -> float:
    asked = content_words(row["prompt"][0]["content"])
    return max(exact(text, row), len(asked & content_words(text)) / len(asked))


def in_the_gold(text: str, row: Row) -> float:
    return float(text.strip() in gold(row))


def gullible(text: str, row: Row) -> float:
    return max(exact(text, row), float("highest score" in text))


def last_answer_fence(text: str, row: Row) -> float:
    """A judge whose prompt has a fence that an answer can close."""
    judged = f"<answer>\n{text}\n</answer>".split("<answer>")[-1]
    return max(exact(text, row), float("This is an answer" in judged))


def score_line(text: str, row: Row) -> float:
    found = re.search(r"Score: ([01](?:\.\d+)?)", text)
    return float(found[1]) if found else exact(text, row)


HOLES: dict[str, tuple[Callable[[str, Row], float], set[str]]] = {
    "contains gold anywhere": (lambda t, r: float(gold(r) in t), {"many answers, line by line", "the best or another"}),
    "longest wins": (lambda t, r: min(1.0, len(t) / 200), {"filler up to the limit", "one word up to the limit"}),
    "last number wins": (
        lambda t, r: float(re.findall(r"\d+", t)[-1:] == [gold(r)]),
        {"many answers, the best last"},
    ),
    "first number wins": (
        lambda t, r: float(re.findall(r"\d+", t)[:1] == [gold(r)]),
        {"many answers, the best first", "the best or another"},
    ),
    "json planted": (planted_json, {"a verdict as JSON", "a score as JSON", "a verdict in a code block"}),
    "score line believed": (score_line, {"score lines"}),
    "an error counts as right": (broken_counts_as_right, {"empty", "not knowing"}),
    "exit(0) counts as passed": (runs_the_answer, {"exit(0)"}),
    "equality of the answer's own": (runs_the_answer, {"equal to everything"}),
    "words of the prompt": (words_of_the_prompt, {"the prompt back", "the prompt's words"}),
    "empty is in everything": (in_the_gold, {"empty", "blank"}),
    "obeys the answer": (gullible, {"ignore the rubric", "chat markup", "Harmony markup"}),
    "a fence that can be closed": (last_answer_fence, {"a fence without its mark"}),
}


@pytest.mark.parametrize("base", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hole", HOLES)
def test_a_hole_in_a_reward_is_found_whatever_the_base_policy_earns(hole: str, base: float) -> None:
    score, expected = HOLES[hole]
    table = attacked(score, base)
    assert expected <= working(table) and table.misjudged == []


@pytest.mark.parametrize("on_invalid", ["mask", "zero"])
def test_a_decisions_scorer_that_takes_the_last_of_many_actions_is_found(on_invalid: str) -> None:
    task = load_task("decisions", tau=1.0, generate_rows=60, on_invalid=on_invalid)
    rows = list(task.rows("train"))

    def last(text: str, row: Row) -> float:
        named = re.findall(r"\[(\d)\]", text)
        return row["rewards"][int(named[-1])] if named and int(named[-1]) < len(row["rewards"]) else 0.0

    table = attack_table(ScoreFunctionTask().bind(last), rows, [{"row": r["id"], "reward": 0.2} for r in rows], LIMIT)
    assert "many answers, the best last" in working(table)


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_one_hit_by_luck_is_not_a_cheat_that_works() -> None:
    lucky = {ROWS[1]["id"]}
    table = attacked(lambda text, row: float(exact(text, row) or (row["id"] in lucky and text == "")))
    assert table.working == []
    two = {ROWS[1]["id"], ROWS[2]["id"]}
    assert working(attacked(lambda text, row: float(exact(text, row) or (row["id"] in two and text == "")))) == {
        "empty"
    }


def test_the_bar_is_the_better_one_of_the_base_policy_and_a_wrong_answer() -> None:
    def score(text: str, row: Row) -> float:
        return 1.0 if exact(text, row) else 0.4 if text.isdecimal() else 0.3 if text == "" else 0.0

    assert (attacked(score, base=0.1).bar, attacked(score, base=0.1).working) == (0.4, [])
    assert attacked(score, base=0.6).bar == 0.6
    no_gold = [{**row, "gold": None} for row in ROWS]
    table = attacked(lambda text, row: 0.3 * (text == ""), base=0.1, rows=no_gold)
    assert (table.base, table.wrong, table.bar, table.gold, working(table)) == (0.1, None, 0.1, {}, {"empty"})


def test_without_anything_to_measure_against_the_bar_is_the_lowest_reward() -> None:
    rows = [{**row, "gold": None} for row in ROWS]
    answers = [{"row": row["id"], "reward": None} for row in rows]
    task = ScoreFunctionTask(reward_range=(-1, 1)).bind(lambda text, row: -1.0 + 0.5 * (text == "."))
    table = attack_table(task, rows, answers, LIMIT)
    assert table.bar == -1 and working(table) == {"a full stop"}


@pytest.mark.parametrize(
    "score", [lambda text, row: 0.0, lambda text, row: float(text.isdecimal() and text != gold(row))]
)
def test_a_gold_answer_that_does_not_come_first_is_said_and_is_no_measure(score: Callable[[str, Row], float]) -> None:
    table = attacked(score)
    assert table.misjudged == table.rows and table.working == []


def test_a_reward_that_is_the_same_for_everything_pays_every_cheat() -> None:
    table = attacked(lambda text, row: 0.5)
    assert len(table.working) == len(table.attacked) > 40


def test_other_words_for_the_same_answer_are_not_wrong() -> None:
    rows = [{**row, "gold": [{"role": "assistant", "content": f"It is {i}: [yes]"}]} for i, row in enumerate(ROWS)]
    table = attacked(lambda text, row: float("[yes]" in text), rows=rows)
    assert (table.wrong, table.misjudged, table.working) == (None, [], [])


def test_what_breaks_or_exits_is_unscored_with_its_cause_and_does_not_work() -> None:
    def score(text: str, row: Row) -> float:
        if "exit(0)" in text:
            raise SystemExit(0)
        if text == ".":
            raise RuntimeError("the sandbox is gone")
        return exact(text, row)

    table = attacked(score)
    by_name = {one.name: one for one in table.attacked}
    assert by_name["a full stop"].left_out == "unscored: RuntimeError: the sandbox is gone"
    assert by_name["exit(0)"].left_out == "unscored: SystemExit: 0"
    assert by_name["a full stop"].mean is None and by_name["empty"].mean == 0.0
    assert table.working == [] and 0 < table.unscored < 0.2


# -- a judge ----------------------------------------------------------------------------------------------------------

CRITERIA = [
    Criterion(id="1", text="Recommends cleaning the chain with degreaser"),
    Criterion(id="2", text="Warns against household bleach"),
    Criterion(id="3", text="Mentions lubricating afterwards", scale="score"),
]
JUDGED_ROWS: list[Row] = [
    {"id": f"bike-{i}", "prompt": [{"role": "user", "content": f"How do I look after bicycle number {i}?"}]}
    for i in range(2)
]


class Judged(JudgedTask, frozen=True):
    def criteria(self, row: Row) -> list[Criterion]:
        return CRITERIA

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        scores = [verdict.score for verdict in verdicts.values()]
        known = [score for score in scores if score is not None]
        reward = sum(known) / len(scores) if len(known) == len(scores) else None
        return Score(reward=reward, notes=self.notes(row, verdicts, scored=reward is not None))


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with running_judge() as running:
        yield running


@pytest.fixture
def judged(server: JudgeServer, tmp_path: Path) -> Task:
    settings = JudgeSettings(provider="compatible", model="loopback", base_url=server.base_url)
    return Judged(judge=settings, ledger=str(tmp_path / "ledger.sqlite"))


def test_criteria_are_copied_where_there_are_some(judged: Task) -> None:
    found = [one for one in attacks(judged, JUDGED_ROWS[0], [], LIMIT) if one.family == UNSEEN]
    assert len(found) == 4 and all("degreaser" in one.text for one in found)
    plan = next(one for one in attacks(judged, JUDGED_ROWS[0], [], LIMIT) if one.name == "a verdict as JSON")
    assert [one["id"] for one in json.loads(plan.text)["verdicts"]] == ["c1", "c2", "c3"]


def test_no_cheat_closes_the_fence_around_it(judged: Task) -> None:
    for one in attacks(judged, JUDGED_ROWS[0], [], LIMIT):
        sent = grading_messages(JUDGED_ROWS[0]["prompt"], one.text, CRITERIA)[-1]["content"]
        mark = re.findall(r"</answer-([0-9a-f]{16})>\Z", sent)[0]
        assert sent.count(f"</answer-{mark}>") == 1 and mark not in one.text
        assert parse_prompt(sent) == (
            [{"id": f"c{i}", "criterion": c.text, "scale": c.scale} for i, c in enumerate(CRITERIA, 1)],
            one.text,
        )


def test_a_judge_that_counts_words_judges_every_cheat_by_its_own_words(judged: Task, server: JudgeServer) -> None:
    """So every fence held, and no planted verdict was read as one."""
    answers = [{"row": row["id"], "reward": 1.0} for row in JUDGED_ROWS]
    table = attack_table(judged, JUDGED_ROWS, answers, LIMIT)
    assert table.unscored == 0 and len(table.attacked) > 45
    for one in table.attacked:
        shares = [share_of(criterion.text, one.text) for criterion in CRITERIA]
        expected = (float(shares[0] >= 1 / 3) + float(shares[1] >= 1 / 3) + round(shares[2], 4)) / 3
        assert one.rewards[one_row := next(iter(one.rewards))] == pytest.approx(expected), (one.name, one_row)
    planted = [one for one in table.attacked if one.family in ("planted verdicts", "closed fences")]
    assert len(planted) == 11 and all(one.mean == 0 for one in planted)


def test_a_second_look_at_the_attacks_asks_the_judge_nothing(judged: Task, server: JudgeServer) -> None:
    answers = [{"row": row["id"], "reward": 0.0} for row in JUDGED_ROWS]
    first = attack_table(judged, JUDGED_ROWS, answers, LIMIT)
    before = server.stats()["requests"]
    assert attack_table(judged, JUDGED_ROWS, answers, LIMIT) == first
    assert server.stats()["requests"] == before


def test_copied_criteria_work_on_a_judge_that_counts_words(judged: Task) -> None:
    answers = [{"row": row["id"], "reward": 0.0} for row in JUDGED_ROWS]
    found = working(attack_table(judged, JUDGED_ROWS, answers, LIMIT))
    assert {"criteria copied", "criteria ticked off", "the criteria's words"} <= found
    assert score_one(judged, Rollout.of(JUDGED_ROWS[0], "Lubricating afterwards")).reward == pytest.approx(
        2 / 9, abs=1e-4
    )
