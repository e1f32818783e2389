"""The reward that verl calls, through verl's own managers, and the estimator in verl's own code, in its environment."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from judge_server import JudgeServer, running_judge
from test_config import CONFIGS
from tiny_models import tiny_qwen2

from lib import PROJECT_ROOT
from lib.config import Config, load_config, parse_config
from lib.generate import scripted
from lib.rollout import attempt, submit
from lib.runfolder import Run, open_run, read_lines
from lib.task import Message, Row, Score, Task, load_task, task_names
from lib.tasks._verifiers_make import make
from lib.verl.parquet import write_order
from lib.verl.reward import OrderError, Unscored, compute_score, open_desk, read_order

SYNC = """
import asyncio
from lib.verl import reward

def compute_score(**given):
    return asyncio.run(reward.compute_score(**given))
"""

BROKEN = """
import time

def score(text, row):
    if text == "raise":
        raise RuntimeError("the sandbox is gone")
    if text == "exit":
        raise SystemExit(3)
    if text == "nan":
        return float("nan")
    if text == "none":
        return None
    return -0.0 if text == "minus zero" else 0.5
"""

FAULTS = {"server_error": "HTTP 503", "timeout": "", "malformed": ""}

Replies = Sequence[str | Message]


class Ask(NamedTuple):
    """Answers that were scored both by verl's manager and here."""

    found: list[dict[str, Any]]
    here: list[Score]


def scored(task: Task, row: Row, replies: Replies) -> Score:
    return submit(attempt(task, row, scripted(*replies))).result(timeout=120).score


def run_program(python: str, kind: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [python, str(PROJECT_ROOT / "tests" / "verl_reward_program.py"), kind, str(path)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"RAY_raylet_start_wait_time_s": "200", "RAY_enable_worker_prestart": "0"}  # a busy machine
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def replies_to(row: Row, others: Sequence[Row]) -> list[list[Any]]:
    """The gold answer where there is one, another row's, one that no task takes for right, an empty one."""
    golds = [one["gold"] for one in (row, *others) if one.get("gold")][:2]
    if row.get("criteria"):  # ACE: some of the words that the criteria ask for
        texts = [criterion["text"] for criterion in row["criteria"]]
        golds += [[" ".join(texts)], [" ".join(texts[: len(texts) // 2])]]
    found = [[_plain(message) for message in gold] for gold in golds]
    return [*found, ["None of these [nonsense]."], [""]]


def _plain(message: Any) -> Any:
    is_text = isinstance(message, dict) and set(message) <= {"role", "content"} and isinstance(message["content"], str)
    return message["content"] if is_text else message


def reachable(path: Path, judge: str, folder: Path, verifiers: str) -> Config:
    """A shipped config with what it has on the Hub or behind a key replaced by what is here."""
    values = load_config(path).as_json()
    task = values["task"]
    if "judge" in task:
        task["judge"] = {"provider": "compatible", "model": "loopback", "base_url": judge}
        task["ledger"] = str(folder / "verl.sqlite")
    if "dataset" in task:
        for name in ("dataset", "dataset_config", "columns"):
            task.pop(name, None)
        task |= {"family": "problems"} if task["name"] == "coding" else {"path": "configs/examples/ace"}
    if task.get("family") == "templates":
        task["generate_rows"] = 160  # each is tried in the sandbox
    if task["name"] == "verifiers":
        task["python"] = verifiers
    return parse_config(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verl-reward")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> str:
    return str(tiny_qwen2(folder / "tokenizer"))


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    with running_judge() as server:
        yield server


@pytest.fixture(scope="module")
def broken(folder: Path) -> tuple[str, Row]:
    """The order of a user's task whose scorer breaks on command, and a row of it."""
    (folder / "broken.py").write_text(BROKEN, encoding="utf-8")
    (folder / "broken.jsonl").write_text('{"id": "r", "prompt": "Say something."}\n' * 1, encoding="utf-8")
    config = load_config(
        "configs/smoke/decisions.yaml",
        {"task": {"name": str(folder / "broken.py"), "path": str(folder / "broken.jsonl"), "split_ratio": 1}},
    )
    order = order_of(config, folder / "broken")
    return order, load_task(config.task.name, **config.task.params).rows("train")[0]


def order_of(config: Config, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_order(Run(folder, config), folder))


@pytest.fixture(scope="module")
def asked(
    verl_python: str, folder: Path, tokenizer: str, judge: JudgeServer, broken: tuple[str, Row]
) -> dict[str, Any]:
    """One process of verl's environment for all: answers to the tasks of all shipped configs, faults, the estimator."""
    asks: dict[str, dict[str, Any]] = {}
    here: dict[str, list[Score]] = {}
    seen: set[str] = set()
    verifiers = os.environ.get("VERIFIERS_CLASSIC") or str(make("classic"))
    for path in CONFIGS:
        name = path.relative_to(PROJECT_ROOT / "configs").as_posix()
        config = reachable(path, judge.base_url, folder, verifiers)
        key = json.dumps([config.task.name, config.task.params], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        task = load_task(config.task.name, **config.task.params | _own_ledger(config, folder))
        rows = list(task.rows("eval")[:3])
        plays = task.max_turns > 1 and config.task.name != "verifiers"  # gsm8k's world never answers
        items = [{"row": row, "replies": one, "plays": plays} for row in rows[:2] for one in replies_to(row, rows[1:])]
        asks[name] = {
            "order": order_of(config, folder / f"run-{len(asks)}"),
            "items": items,
            "control": {"reset": True},
        }
        here[name] = [scored(task, item["row"], item["replies"]) for item in items]
    for fault in FAULTS:
        settings = {"provider": "compatible", "model": "loopback", "base_url": judge.base_url}
        limits = {"timeout": 0.3, "attempts": 2}
        config = load_config(
            "configs/smoke/ace.yaml",
            {"task.judge": settings | limits, "task.ledger": str(folder / f"{fault}.sqlite")},
        )
        rows = load_task(config.task.name, **config.task.params).rows("train")
        items = [{"row": rows[0], "replies": [f"Answer {number}, and the tools."]} for number in range(3)]
        order = order_of(config, folder / fault)
        asks[fault] = {"order": order, "items": items, "control": {"reset": True, "faults": {fault: 1.0}}}
        asks[f"{fault} is over"] = {"order": order, "items": items, "control": {"reset": True}}
    slow = load_config(
        "configs/smoke/ace.yaml",
        {"task.judge": settings, "task.ledger": str(folder / "slow.sqlite"), "rewards.score_seconds": 0.5},
    )
    asks["slow"] = {
        "order": order_of(slow, folder / "slow"),
        "items": items[:1],
        "control": {"reset": True, "latency": 5.0},
    }
    order, row = broken
    texts = ("raise", "exit", "nan", "none", "minus zero", "fine")
    asks["broken"] = {"order": order, "items": [{"row": row, "replies": [text]} for text in texts]}
    (folder / "sync.py").write_text(SYNC, encoding="utf-8")
    asks["sync"] = asks["broken"] | {"path": str(folder / "sync.py")}
    asks["no row"] = {"order": order, "items": [{"row": {"id": "r"}, "replies": ["fine"]}]}
    (folder / "advantages").mkdir()
    job = {"tokenizer": tokenizer, "judge": judge.url, "asks": list(asks.values())}
    found = run_program(verl_python, "naive", job | {"advantages": str(folder / "advantages")}, folder)
    by_name = dict(zip(asks, found["asks"], strict=True))
    shipped = {name: Ask(by_name[name], scores) for name, scores in here.items()}
    return {"shipped": shipped, "advantages": found["advantages"], **by_name}


def _own_ledger(config: Config, folder: Path) -> dict[str, str]:
    """So that nothing that verl's processes judged is known here."""
    return {"ledger": str(folder / "here.sqlite")} if "judge" in config.task.params else {}


# -- the same reward ---------------------------------------------------------------------------------------------------


def test_verl_sees_the_reward_of_the_workbench_for_the_task_of_every_shipped_config(asked: dict[str, Any]) -> None:
    shipped = asked["shipped"]
    assert {load_config(PROJECT_ROOT / "configs" / name).task.name for name in shipped} == set(task_names())
    rewards = set()
    for name, (found, here) in shipped.items():
        assert len(found) == len(here) >= 4, name
        for one, score in zip(found, here, strict=True):
            told = one["reward_extra_info"]
            judged = score.reward is not None and not score.masked
            assert told["scored"] == float(judged) and told["masked"] == float(score.masked), (name, told, score)
            assert one["reward_score"] == told["score"] == (score.reward if judged else 0), (name, told, score)
            assert one["left_out"] == (not judged), name
            assert judged or score.masked, (name, score.notes)
            assert json.loads(told["parts"]) == score.parts, name
            rewards.add(told["score"])
    assert len(rewards) > 5
    assert any(score.masked for ask in shipped.values() for score in ask.here)


def test_every_answer_of_every_task_comes_with_the_same_keys(asked: dict[str, Any]) -> None:
    answers = [one for name, ask in asked["shipped"].items() for one in ask.found]
    answers += [one for name in ("broken", "sync", "no row", *FAULTS) for one in asked[name]]
    assert {tuple(one["reward_extra_info"]) for one in answers} == {("score", "scored", "masked", "reason", "parts")}
    assert {type(value) for one in answers for value in one["reward_extra_info"].values()} == {float, str}


# -- what could not be judged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_leaves_answers_unscored_and_counted(
    asked: dict[str, Any], folder: Path, fault: str
) -> None:
    for one in asked[fault]:
        told = one["reward_extra_info"]
        assert told["scored"] == 0 and told["score"] == 0 and one["left_out"]
        assert told["reason"].startswith("judge: ") and FAULTS[fault] in told["reason"]
    lines = [Unscored.model_validate_json(line) for line in (folder / fault / "unscored.jsonl").open()]
    assert [line.reason for line in lines] == [one["reward_extra_info"]["reason"] for one in asked[fault]]
    assert {line.split for line in lines} == {"train"}


@pytest.mark.parametrize("fault", FAULTS)
def test_once_the_judge_answers_again_the_same_answers_are_scored(asked: dict[str, Any], fault: str) -> None:
    assert [one["reward_extra_info"]["scored"] for one in asked[f"{fault} is over"]] == [1.0] * 3


def test_a_score_that_takes_too_long_is_unscored_and_names_the_limit(asked: dict[str, Any]) -> None:
    (one,) = asked["slow"]
    assert "the task's score took longer than rewards.score_seconds = 0.5 s" in one["reward_extra_info"]["reason"]
    assert one["left_out"]


@pytest.mark.parametrize("how", ["broken", "sync"])
def test_a_scorer_that_breaks_never_scores_zero_whether_verl_awaits_the_reward_or_runs_it_in_threads(
    asked: dict[str, Any], how: str
) -> None:
    raised, left, nan, none, zero, fine = (one["reward_extra_info"] for one in asked[how])
    assert [one["scored"] for one in (raised, left, nan, none, zero, fine)] == [0, 0, 0, 0, 1, 1]
    assert raised["reason"] == "RuntimeError: the sandbox is gone" and left["reason"].startswith("SystemExit")
    assert "nan" in nan["reason"] and none["reason"]
    assert fine["score"] == 0.5
    assert [one["left_out"] for one in asked[how]] == [True] * 4 + [False] * 2, "a reward of -0.0 is a reward of 0"


def test_a_row_that_is_none_is_unscored_and_says_where_rows_come_from(asked: dict[str, Any]) -> None:
    (one,) = asked["no row"]
    assert one["left_out"]
    assert "ground_truth is no row as JSON" in one["reward_extra_info"]["reason"]
    assert "export-verl CONFIG" in one["reward_extra_info"]["reason"]


async def test_a_task_that_cannot_be_loaded_in_verls_process_is_the_reason_of_every_answer(
    tmp_path: Path, broken: tuple[str, Row]
) -> None:
    order = read_order(broken[0])
    lost = order.model_copy(update={"task": str(tmp_path / "gone.py"), "counts": str(tmp_path / "unscored.jsonl")})
    (tmp_path / "reward.json").write_text(lost.model_dump_json())
    told = await compute_score("s", "x", json.dumps(broken[1]), {"split": "train"}, order=str(tmp_path / "reward.json"))
    assert told["scored"] == 0 and math.copysign(1, told["score"]) == -1
    assert told["reason"].startswith("task file not found: ")


async def test_an_order_that_is_missing_or_none_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match=r"reward\.json cannot be read .* Export again: python -m lib\.run"):
        await compute_score("s", "x", "{}", {}, order=str(tmp_path / "reward.json"))
    (tmp_path / "reward.json").write_text('{"task": "ace"}')
    with pytest.raises(OrderError, match="is no order for the reward"):
        open_desk(str(tmp_path / "reward.json"))


async def test_a_world_that_answers_needs_the_agent_loop_and_says_so(folder: Path) -> None:
    config = load_config("configs/smoke/wordle.yaml")
    order = order_of(config, folder / "wordle")
    row = load_task(config.task.name, **config.task.params).rows("eval")[0]
    told = await compute_score("s", row["gold"][0]["content"], json.dumps(row), {}, order=order)
    assert told["scored"] == 1 or "lib.verl.agent_loop" in told["reason"]
    wrong = await compute_score("s", "no word at all", json.dumps(row), {}, order=order)
    assert wrong["scored"] == 1 or "lib.verl.agent_loop" in wrong["reason"]
    assert "lib.verl.agent_loop" in told["reason"] + wrong["reason"]


# -- the estimator -----------------------------------------------------------------------------------------------------


def test_where_every_answer_has_a_reward_the_estimator_is_verls_own_grpo_to_the_bit(asked: dict[str, Any]) -> None:
    same = asked["advantages"]["same"]
    assert len(same) == 400 and all(same)


def test_what_is_left_out_enters_no_groups_mean_and_gets_no_advantage_and_no_mask(asked: dict[str, Any]) -> None:
    subset = asked["advantages"]["subset"]
    assert len(subset) == 400 and all(subset)


def test_a_step_with_too_few_rewards_stops_verl_with_the_reasons_counted(asked: dict[str, Any]) -> None:
    found = asked["advantages"]
    assert found["at the limit"] == "", "one of four is the limit; older lines and those of the evaluation do not count"
    assert found["over the limit"].startswith(
        "UnscoredLimitError: verl: 2 of 4 rollouts could not be judged, more than rewards.max_unscored = 0.25 allows. "
        "Reasons: 1 x judge: HTTP 503; 1 x the sandbox is gone."
    )
    assert found["once more"] == "", "a step counts its own"
    assert found["with padding"].startswith("UnscoredLimitError: verl: 1 of 3 rollouts"), "verl's padding is no rollout"


def test_settings_that_would_hide_what_was_not_judged_are_refused(asked: dict[str, Any]) -> None:
    found = asked["advantages"]
    assert found["kl"].startswith("EstimatorError: algorithm.use_kl_in_reward=True") and "use_kl_loss" in found["kl"]
    assert found["no order"].startswith("EstimatorError: algorithm.order is not set")


# -- on Ray ------------------------------------------------------------------------------------------------------------


def test_through_verls_reward_loop_on_ray_and_its_queue_what_is_left_out_stays_so(
    verl_python: str, folder: Path, tokenizer: str, broken: tuple[str, Row]
) -> None:
    order, row = broken
    texts = ("fine", "minus zero", "raise", "fine", "fine", "none", "minus zero", "minus zero")
    limit = read_order(order).model_copy(update={"unscored_limit": 0.9, "counts": str(folder / "ray.jsonl")})
    (folder / "ray-reward.json").write_text(limit.model_dump_json())
    ask = {"order": str(folder / "ray-reward.json"), "items": [{"row": row, "replies": [text]} for text in texts]}
    found = run_program(verl_python, "ray", {"tokenizer": tokenizer, "judge": None, "asks": [ask]}, folder)
    out = [text in ("raise", "none") for text in texts]
    assert found["left_out"] == [one["reward_extra_info"]["scored"] == 0 for one in found["single"]] == out
    assert found["rm_scores"] == [0.5 if text == "fine" else 0 for text in texts]
    assert found["extra"]["scored"] == [float(not one) for one in out]
    assert len((folder / "ray.jsonl").read_text().splitlines()) == 2 * sum(out), "asked twice: together, one by one"
    firsts = [advantages[0] for advantages in found["advantages"]]
    assert [not any(advantages) for advantages in found["advantages"]] == out
    assert [not any(mask) for mask in found["mask"]] == out
    nothing = found["nothing"]
    assert nothing["response_mask"] == nothing["loss_mask"] == [[0, 0, 0], [1, 1, 0], *[[0, 0, 0]] * 3]
    assert not any(map(any, nothing["advantages"])), "verl refuses a step without a token: one is in it, for nothing"
    group = [firsts[at] for at in (0, 1, 3)]
    assert group[0] == group[2] > 0 > group[1] and sum(group) == pytest.approx(0, abs=1e-5)


def test_an_engine_that_does_not_answer_leaves_one_rollout_unscored_and_not_its_group(
    verl_python: str, tmp_path: Path, tokenizer: str
) -> None:
    config = load_config("configs/smoke/decisions.yaml", {"paths.outputs": str(tmp_path), "task.on_invalid": "zero"})
    run = open_run("engine", config)
    order = write_order(run, tmp_path)
    row = tmp_path / "row.json"
    row.write_text(json.dumps(load_task(config.task.name, **config.task.params).rows("train")[0]), encoding="utf-8")
    command = [verl_python, str(PROJECT_ROOT / "tests" / "verl_loop_program.py"), str(order), str(row), tokenizer]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answered, lost = json.loads(done.stdout.splitlines()[-1])
    assert answered["scored"] == 1.0 and answered["mask"] == [1, 1, 1]
    assert lost["scored"] == 0.0 and "the engine is gone" in lost["reason"]
    assert math.copysign(1.0, lost["score"]) == -1.0 and lost["score"] == 0.0
    assert len(lost["ids"]) == 1 and lost["mask"] == [0]
    assert [line["reason"] for line in read_lines(tmp_path / "unscored.jsonl")] == [lost["reason"]]
