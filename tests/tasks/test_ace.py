"""The task `ace`: its tables, its split, its two rules over three-valued verdicts, and runs with a failing judge."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_server import running_hub
from judge_server import FAULTS, JudgeServer, content_words, running_judge

from lib import PROJECT_ROOT
from lib.grading import Criterion
from lib.ledger import Verdict
from lib.rollout import Request, UnscoredLimitError, attempt, check_unscored, collect
from lib.task import Rollout, Row, Score, TaskError, Turn, load_task
from lib.tasks.ace import HUB_CONFIGS, Ace

HEADER = [
    "Criterion ID", "Task ID", "Prompt", "Specified Prompt", "Workflow", "Hurdle Tag", "Criteria type",
    "Criterion Grounding Check", "Description",
]  # fmt: skip
LOCAL = {"provider": "compatible", "model": "loopback", "base_url": "http://127.0.0.1:9/v1"}


def line(criterion: int, task: int, **cells: str) -> dict[str, str]:
    """A line of a table; the first criterion of a task is its hurdle."""
    return {
        "Criterion ID": str(criterion),
        "Task ID": str(task),
        "Prompt": f"Task {task}?",
        "Specified Prompt": f"Task {task}, please?",
        "Workflow": "Repairs",
        "Hurdle Tag": "Hurdle" if criterion % 10 == 1 else "Not",
        "Criteria type": "Provides steps" if criterion % 2 else "Names tools",
        "Criterion Grounding Check": "Not Grounded",
        "Description": f"Criterion {criterion}",
        **cells,
    }


def lines(tasks: int = 4, each: int = 3) -> list[dict[str, str]]:
    return [line(10 * task + number, task) for task in range(1, tasks + 1) for number in range(1, each + 1)]


def write(path: Path, records: Sequence[dict[str, str]], header: Sequence[str] = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(records)
    return path


def ace(path: Path, **params: Any) -> Ace:
    return Ace(**{"path": str(path), "judge": LOCAL, **params})


def refused(path: Path, **params: Any) -> str:
    with pytest.raises(TaskError) as caught:
        ace(path, **params).rows("train")
    return str(caught.value)


# -- the real tables --------------------------------------------------------------------------------------------------


def test_the_four_domains_split_into_fifteen_and_five_tasks_each(shared: Path) -> None:
    task = ace(shared / "data" / "ace")
    train, held_out = task.rows("train"), task.rows("eval")
    domains = ("DIY", "Food", "Gaming", "Shopping")
    assert Counter(row["category"] for row in train) == dict.fromkeys(domains, 15)
    assert Counter(row["category"] for row in held_out) == dict.fromkeys(domains, 5)
    assert not {row["id"] for row in train} & {row["id"] for row in held_out}
    rows = [*train, *held_out]
    criteria = [criterion for row in rows for criterion in row["criteria"]]
    assert len(criteria) == 592 and sum(one["hurdle"] for one in criteria) == 105
    assert sum(one["grounded"] for one in criteria) == 126 and len({one["kind"] for one in criteria}) > 15
    assert [row["id"] for row in ace(shared / "data" / "ace").rows("eval")] == [row["id"] for row in held_out]


def test_other_ratios_and_seeds_stay_balanced_and_a_single_domain_can_be_had(shared: Path) -> None:
    folder = shared / "data" / "ace"
    assert Counter(row["category"] for row in ace(folder, split_ratio=0.8).rows("train")).most_common(1)[0][1] == 16
    another = ace(folder, split_seed=7).rows("eval")
    assert set(Counter(row["category"] for row in another).values()) == {5}
    assert {row["id"] for row in another} != {row["id"] for row in ace(folder).rows("eval")}
    few = ace(folder, max_samples=8)
    assert sorted(Counter(row["category"] for row in few.rows("train")).values()) == [1, 1, 2, 2]
    assert sorted(Counter(row["category"] for row in few.rows("eval")).values()) == [1, 1]
    for name in ("food", "Food", "FOOD"):
        assert {row["category"] for row in ace(folder, domains=(name,)).rows("train")} == {"Food"}
    assert {row["category"] for row in ace(folder / "ACE-DIY.csv").rows("train")} == {"DIY"}


def test_the_prompt_is_the_specified_one_and_else_the_plain_one(tmp_path: Path) -> None:
    records = [*lines(1), *(line(10 + n + 10, 2, **{"Specified Prompt": ""}) for n in (1, 2))]
    rows = ace(write(tmp_path / "ACE-DIY.csv", records), split_ratio=1).rows("train")
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": "Task 1, please?"}],
        [{"role": "user", "content": "Task 2?"}],
    ]
    assert rows[0]["id"] == "DIY-1" and rows[0]["workflow"] == "Repairs"
    assert rows[0]["criteria"][0] == {
        "id": "11", "text": "Criterion 11", "hurdle": True, "kind": "Provides steps", "grounded": False,
    }  # fmt: skip


# -- bad tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Hurdle Tag": "Not"}, r"line 2, Hurdle Tag: no criterion of this task is a 'Hurdle'"),
        ({"Hurdle Tag": "yes"}, r"line 2, Hurdle Tag: 'yes' is none of 'Hurdle', 'Not'"),
        ({"Criterion Grounding Check": "?"}, r"line 2, Criterion Grounding Check: '\?' is none of 'Grounded'"),
        ({"Criterion ID": "12"}, r"line 3, Criterion ID: '12' is also the id of .*line 2"),
        ({"Criterion ID": "23"}, r"line 7, Criterion ID: '23' is also the id of .*line 2"),
        ({"Criterion ID": " "}, r"line 2, Criterion ID: empty"),
        ({"Description": "Criterion 13"}, r"line 4, Description: the same criterion as at .*line 2"),
        ({"Description": ""}, r"line 2, Description: empty"),
        ({"Specified Prompt": "Another"}, r"line 3, Specified Prompt: another text than at .*line 2, .*same Task ID"),
        ({"Task ID": ""}, r"line 2, Task ID: empty"),
        ({"Prompt": "", "Specified Prompt": ""}, r"line 2, Prompt: empty, and so is Specified Prompt"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, change: dict[str, str], message: str) -> None:
    records = lines()
    records[0] |= change
    text = refused(write(tmp_path / "ACE-DIY.csv", records))
    assert re.search(message, text), text


def test_all_mistakes_of_all_tables_are_told_at_once(tmp_path: Path) -> None:
    diy, food = lines(), [record | {"Prompt": "x", "Specified Prompt": f"F{record['Task ID']}"} for record in lines()]
    diy[4]["Description"] = food[0]["Hurdle Tag"] = ""
    write(tmp_path / "ACE-DIY.csv", diy)
    write(tmp_path / "ACE-Food.csv", food)
    text = refused(tmp_path)
    assert "2 problems" in text and "ACE-DIY.csv, line 6, Description" in text and "ACE-Food.csv, line 2" in text


def test_a_copy_of_a_table_is_refused_because_it_would_be_on_both_sides(tmp_path: Path) -> None:
    for name in ("ACE-DIY.csv", "ACE-DIY (1).csv"):
        write(tmp_path / name, lines())
    assert re.search(r"ACE-DIY\.csv, line 2, Prompt: the same as at .*ACE-DIY \(1\)\.csv, line 2", refused(tmp_path))


def test_other_columns_are_refused_with_what_is_there_and_can_be_mapped(tmp_path: Path) -> None:
    header = ["Criterion Type" if name == "Criteria type" else name for name in HEADER]
    records = [{("Criterion Type" if k == "Criteria type" else k): v for k, v in one.items()} for one in lines()]
    path = write(tmp_path / "ACE-DIY.csv", records, header)
    assert "Criteria type: no such column. The table has: Criterion ID, " in refused(path)
    assert "no such column, but task.columns names it" in refused(path, columns={"Criteria type": "Kind"})
    rows = ace(path, columns={"Criteria type": "Criterion Type"}).rows("train")
    assert rows[0]["criteria"][0]["kind"] == "Provides steps"
    assert "Task ID: no such column" in refused(write(tmp_path / "x.csv", [{"a": "1"}], ["a"]))


def test_a_broken_quote_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "ACE-DIY.csv", lines())
    text = path.read_text(encoding="utf-8-sig")
    path.write_text(text.replace("Criterion 12\n", '"Criterion 12\n').replace("Criterion 12\r\n", '"Criterion 12\r\n'))
    assert "line 3: not CSV" in refused(path)
    path.write_text(text.replace("Criterion 12", "Criterion, 12"))
    assert "line 3: 10 cells; the header has 9. Put cells that hold commas in quotes." in refused(path)


def test_an_unknown_domain_gets_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "ACE-DIY.csv", lines())
    assert "has no domain 'DYI'. Did you mean 'DIY'? Known: DIY" in refused(tmp_path, domains=["DIY", "DYI"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"judge": {"provider": "reward_model", "model": "m"}}, "ACE needs a verdict on every criterion"),
        ({"judge": {"provider": "openai", "modle": "x"}}, r"task\.judge\.modle: unknown key\. Did you mean 'model'"),
        ({"rule": "official"}, r"set reward_range to \[0, the most criteria"),
        ({"reward_range": (0.5, 1)}, "shares from 0 to 1"),
        ({"dataset": "mercor/ACE", "dataset_config": "diy"}, r"name the configs in task\.domains"),
        ({"dataset": "mercor/ACE", "path": "x"}, "both set"),
        ({"rule": "offical"}, r"task\.rule"),
    ],
)
def test_impossible_settings_are_refused_at_load(params: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task("ace", **params)


def test_a_task_with_more_criteria_than_the_official_range_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ACE-DIY.csv", lines())
    assert "3 criteria, but task.reward_range ends at 2" in refused(path, rule="official", reward_range=(0, 2))
    assert len(ace(path, rule="official", reward_range=(0, 3)).rows("train")) == 3


# -- the Hub ----------------------------------------------------------------------------------------------------------

FROM_HUB = """
import json, logging, sys
from lib.task import load_task
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
given = json.loads(sys.argv[1])
task = load_task("ace", **given)
print(json.dumps([list(task.rows("train")), list(task.rows("eval"))]))
"""
CONFIGS = "".join(f"- config_name: {name.lower()}\n  data_files: ACE-{name}.csv\n" for name in HUB_CONFIGS)


def from_hub(endpoint: str, home: Path, **params: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FROM_HUB, json.dumps({"dataset": "mercor/ACE", "judge": LOCAL, **params})]
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    return subprocess.run(command, cwd=PROJECT_ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_hub_gives_the_same_rows_as_the_files_and_shows_the_cards_licence(tmp_path: Path) -> None:
    for domain in HUB_CONFIGS:
        prompts = [record | {"Specified Prompt": f"{domain} {record['Task ID']}"} for record in lines(8)]
        write(tmp_path / "files" / f"ACE-{domain}.csv", prompts)
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    files["README.md"] = f"---\nlicense: cc-by-4.0\nconfigs:\n{CONFIGS}---\n# ACE\n".encode()
    with running_hub("mercor/ACE", files) as endpoint:
        everything = from_hub(endpoint, tmp_path / "home")
        food = from_hub(endpoint, tmp_path / "home", domains=["food"])
    assert everything.returncode == food.returncode == 0, everything.stderr + food.stderr
    local = ace(tmp_path / "files")
    assert json.loads(everything.stdout) == [list(local.rows("train")), list(local.rows("eval"))]
    assert {row["category"] for row in json.loads(food.stdout)[0]} == {"Food"}
    assert "mercor/ACE, licence on its card: cc-by-4.0" in everything.stderr


def test_a_hub_that_cannot_be_reached_is_an_error_with_what_to_check(tmp_path: Path) -> None:
    with running_hub("another/set", {}) as endpoint:
        done = from_hub(endpoint, tmp_path)
    assert done.returncode == 1 and "Check dataset, dataset_config, dataset_split and the connection." in done.stderr
    assert "the card of mercor/ACE could not be read" in done.stderr


# -- rewards ----------------------------------------------------------------------------------------------------------

ROW: Row = {
    "id": "DIY-1",
    "prompt": [{"role": "user", "content": "?"}],
    "category": "DIY",
    "criteria": [
        {"id": "h1", "text": "H1", "hurdle": True, "kind": "Steps", "grounded": False},
        {"id": "h2", "text": "H2", "hurdle": True, "kind": "Tools", "grounded": True},
        {"id": "a", "text": "A", "hurdle": False, "kind": "Steps", "grounded": False},
        {"id": "b", "text": "B", "hurdle": False, "kind": "Provides link(s)", "grounded": False},
    ],
}
NAMES = [criterion["id"] for criterion in ROW["criteria"]]
TOLD = {
    "p": Verdict("pass", 1.0, "met"),
    "f": Verdict("fail", 0.0, "not met"),
    "u": Verdict("unknown", None, "judge: HTTP 503 after 5 attempts"),
}
WORKBENCH, OFFICIAL = Ace(judge=LOCAL), Ace(judge=LOCAL, rule="official", reward_range=(0, 15))  # type: ignore[arg-type]


def reward_of(task: Ace, letters: str) -> Score:
    return task.reward_of(ROW, {name: TOLD[letter] for name, letter in zip(NAMES, letters, strict=True)})


@pytest.mark.parametrize(
    ("letters", "share"),
    [("pppp", 1.0), ("ppfp", 0.75), ("ppff", 0.5), ("fppp", 0.0), ("pfpp", 0.0), ("ffff", 0.0), ("fuuu", 0.0),
     ("ufpp", 0.0), ("uppp", None), ("ppup", None), ("uuff", None)],
)  # fmt: skip
def test_a_failed_hurdle_is_zero_and_an_unknown_that_matters_is_unscored(letters: str, share: float | None) -> None:
    assert reward_of(WORKBENCH, letters).reward == share
    assert reward_of(OFFICIAL, letters).reward == (None if share is None else 4 * share)


@pytest.mark.parametrize("task", [WORKBENCH, OFFICIAL], ids=["workbench", "official"])
def test_an_answer_is_scored_exactly_where_every_outcome_of_the_unknown_ones_agrees(task: Ace) -> None:
    for letters in map("".join, itertools.product("pfu", repeat=4)):
        outcomes = itertools.product(*("pf" if letter == "u" else letter for letter in letters))
        rewards = {reward_of(task, "".join(outcome)).reward for outcome in outcomes}
        assert reward_of(task, letters).reward == (rewards.pop() if len(rewards) == 1 else None)


def test_parts_are_shares_and_unknown_where_a_verdict_is() -> None:
    assert reward_of(WORKBENCH, "ppfu").parts == {
        "passed": None, "hurdles": 1.0, "kind/Steps": 0.5, "kind/Tools": 1.0, "kind/Provides link(s)": None,
        "criterion/h1": 1.0, "criterion/h2": 1.0, "criterion/a": 0.0, "criterion/b": None,
    }  # fmt: skip
    assert reward_of(WORKBENCH, "pfpp").parts["hurdles"] == 0.5 and reward_of(WORKBENCH, "pfpp").parts["passed"] == 0.75


def test_the_official_rule_says_how_many_passes_it_cannot_check() -> None:
    parts = reward_of(OFFICIAL, "pppp").parts  # one is grounded, one is a link
    assert parts["total_score"] == 4.0 and parts["unchecked"] == 2.0
    parts = reward_of(OFFICIAL, "pfpf").parts
    assert parts["total_score"] == 2.0 and parts["unchecked"] == 0.0
    assert reward_of(OFFICIAL, "pfpu").parts["unchecked"] is None


def test_notes_hold_every_verdict_and_the_causes_of_what_is_unscored() -> None:
    scored, unscored = reward_of(WORKBENCH, "ppfp"), reward_of(WORKBENCH, "puup")
    assert scored.notes["verdicts"]["a"] == {"verdict": "fail", "reasons": "not met", "score": 0.0, "text": "A"}
    assert "error" not in scored.notes
    assert unscored.notes["error"] == "judge: HTTP 503 after 5 attempts"
    assert unscored.notes["verdicts"]["h2"]["verdict"] == "unknown"


# -- with a judge -----------------------------------------------------------------------------------------------------


def judged(server: JudgeServer, ledger: Path, **params: Any) -> Ace:
    judge = {**LOCAL, "base_url": server.base_url, "timeout": 1.0, **params.pop("judge", {})}
    return Ace(path="configs/examples/ace", judge=judge, ledger=str(ledger), split_ratio=1, **params)


def answers(task: Ace, each: int = 4) -> list[tuple[Row, str]]:
    """Answers of all qualities to every row: some of the words that its criteria ask for."""
    rng = random.Random(0)
    found = []
    for row in task.rows("train"):
        words = sorted(content_words(" ".join(criterion["text"] for criterion in row["criteria"])))
        found += [(row, " ".join(rng.sample(words, len(words) * n // each))) for n in range(each + 1)]
    return found


async def scores(task: Ace, asked: Sequence[tuple[Row, str]]) -> list[Score]:
    return list(await asyncio.gather(*(task.score(Rollout.of(row, text)) for row, text in asked)))


async def test_answers_of_all_qualities_earn_rewards_of_all_sizes_in_one_call_each(
    server: JudgeServer, tmp_path: Path
) -> None:
    task = judged(server, tmp_path / "ledger.sqlite")
    asked = answers(task)
    found = await scores(task, asked)
    rewards = [score.reward for score in found]
    assert None not in rewards and {0.0, 1.0} < set(rewards)
    assert server.stats()["requests"] == sum(1 for _, text in asked if text)
    by_hand = [task.reward_of(row, await task.verdicts(Rollout.of(row, text))) for row, text in asked]
    assert by_hand == found and server.stats()["requests"] == sum(1 for _, text in asked if text)


async def test_a_rerun_asks_nothing_and_earns_the_same(server: JudgeServer, tmp_path: Path) -> None:
    first = judged(server, tmp_path / "ledger.sqlite")
    found = await scores(first, answers(first))
    before = server.stats()["requests"]
    again = judged(server, tmp_path / "ledger.sqlite", split_seed=3, rule="official", reward_range=(0, 15))
    official = await scores(again, answers(first))
    assert [score.reward for score in await scores(first, answers(first))] == [score.reward for score in found]
    assert server.stats()["requests"] == before > 0
    whole = [score for score in official if score.parts["passed"] == 1.0]
    assert whole and all(score.reward == score.parts["total_score"] for score in whole)


async def test_the_judge_is_asked_again_when_the_meter_wants_it(server: JudgeServer, tmp_path: Path) -> None:
    task = judged(server, tmp_path / "ledger.sqlite")
    row, text = answers(task)[3]
    rollout = Rollout.of(row, text)
    plain = await task.verdicts(rollout)
    for more in ({"ask": 1}, {"ask": 2}, {"reverse": True}, {"ask": 1, "reverse": True}, {"ask": 1}):
        assert {n: v.verdict for n, v in (await task.verdicts(rollout, **more)).items()} == {
            n: v.verdict for n, v in plain.items()
        }
    assert server.stats()["requests"] == 5
    assert task.criteria(row) == [Criterion(id=one["id"], text=one["text"]) for one in row["criteria"]]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.30])
async def test_a_failing_judge_changes_which_answers_are_scored_and_nothing_else(
    server: JudgeServer, tmp_path: Path, share: float
) -> None:
    clean_task = judged(server, tmp_path / "clean.sqlite")
    asked = answers(clean_task, each=12)
    clean = await scores(clean_task, asked)
    server.control(faults=dict.fromkeys(FAULTS, share / len(FAULTS)), retry_after=0.02, seed=1)
    found = await scores(judged(server, tmp_path / "faulty.sqlite"), asked)
    assert sum(server.stats()["faults"].values()) > 0.25 * share * len(asked) > 1
    for right, score in zip(clean, found, strict=True):
        assert score.reward is None or score.reward == right.reward
        assert all(value is None or value == right.parts[name] for name, value in score.parts.items())
        assert (score.reward is None) == ("error" in score.notes)
    assert sum(score.reward is None for score in found) <= 0.05 * len(found)


async def test_what_a_failing_judge_left_unknown_is_mended_by_the_next_run(server: JudgeServer, tmp_path: Path) -> None:
    task = judged(server, tmp_path / "ledger.sqlite", judge={"attempts": 1})
    asked = answers(task)
    server.control(faults={"server_error": 0.3, "reset": 0.2}, seed=2)
    first = await scores(task, asked)
    lost = sum(score.reward is None for score in first)
    assert 0.2 * len(asked) < lost < 0.7 * len(asked)
    server.control(faults={})
    before = server.stats()["requests"]
    second = await scores(task, asked)
    assert all(score.reward is not None for score in second)
    assert all(one.reward in (None, two.reward) for one, two in zip(first, second, strict=True))
    assert lost <= server.stats()["requests"] - before < len(asked)  # what was known was not asked for again


def test_a_run_stops_beyond_the_limit_and_names_the_causes(server: JudgeServer, tmp_path: Path) -> None:
    task = judged(server, tmp_path / "ledger.sqlite", judge={"attempts": 1})
    server.control(faults={"server_error": 0.4, "malformed": 0.3, "refusal": 0.3})
    asked = [pair for pair in answers(task) if pair[1]]

    def generate(requests: list[Request]) -> list[Turn]:
        return [Turn(message={"role": "assistant", "content": text}) for _, text in asked[: len(requests)]]

    scored = collect(task, [row for row, _ in asked], generate)
    with pytest.raises(UnscoredLimitError) as caught:
        check_unscored((one.score for one in scored), 0.05, "step 1")
    text = str(caught.value)
    assert "rollouts could not be judged" in text and "x judge: HTTP 503 after 1 attempts" in text
    assert "judge: the reply is not JSON" in text or "judge: it refused to answer" in text
    assert not any(one.score.reward == 0.0 and "unknown" in str(one.score.notes) and not _failed_hurdle(one.score)
                   for one in scored)  # fmt: skip


def _failed_hurdle(score: Score) -> bool:
    return score.parts["hurdles"] is not None and score.parts["hurdles"] < 1.0


async def test_a_judge_that_is_not_there_leaves_answers_unscored(tmp_path: Path) -> None:
    with running_judge() as gone:
        task = judged(gone, tmp_path / "ledger.sqlite", judge={"attempts": 1})
    row, text = answers(task)[1]

    async def generate(messages: Any, tools: Any) -> Turn:
        return Turn(message={"role": "assistant", "content": text})

    scored = await attempt(task, row, generate)
    assert scored.score.reward is None and "judge: no connection" in scored.score.notes["error"]
