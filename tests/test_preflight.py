"""The gate: the arithmetic of useful groups, checks at their thresholds, broken runs caught, good ones let through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, running_judge

from lib import WorkbenchError, models
from lib.attacks import UNSEEN
from lib.config import Config, load_config
from lib.data import ScoreFunctionTask
from lib.generate import Chat
from lib.grading import Criterion, JudgedTask
from lib.judge import JudgeSettings
from lib.ledger import Verdict
from lib.preflight import (
    Attacked,
    AttackTable,
    Check,
    attack_table,
    gate,
    grouped_rewards,
    judge_bill,
    keeps_prefix,
    sample_base,
    score_one,
    useful_groups,
    verdict,
)
from lib.preflight.judging import completions_of
from lib.prepare import open_chat, prepare
from lib.runfolder import Run, open_run
from lib.task import Rollout, Row, Score, Task, load_task
from lib.tools import ToolsError

SMOKE = "configs/smoke/decisions.yaml"

# -- useful groups ----------------------------------------------------------------------------------------------------

GROUPS: list[list[float | None]] = [
    [0.0, 0.0, 0.0, 1.0, 0.5, 0.0],
    [None, 0.0, 0.0, None, 1.0, None],
    [None, None, None, None, None, None],
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    [None, 0.5, 0.5, 0.5, None, 0.5],
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
]


def differ(drawn: tuple[float | None, ...]) -> bool:
    return len({reward for reward in drawn if reward is not None}) > 1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("group", GROUPS)
def test_the_share_of_useful_groups_is_that_of_all_draws(group: list[float | None], size: int) -> None:
    draws = list(itertools.combinations(group, size))
    expected = sum(map(differ, draws)) / len(draws)
    found = useful_groups([group], 24, (size,))[0]
    assert (found.share, found.exact) == (pytest.approx(expected), True)
    assert found.per_step == pytest.approx(expected * (24 // size))


def test_beyond_the_answers_there_are_the_share_is_that_of_the_largest_group_and_said_to_be_a_bound() -> None:
    found = useful_groups(GROUPS, 48)
    assert [one.size for one in found] == [4, 6, 8, 12, 16]
    assert [one.exact for one in found] == [True, True, False, False, False]
    assert found[1].share == found[2].share == found[4].share == 3 / 6 >= found[0].share
    assert [one.per_step for one in found[1:]] == [4.0, 3.0, 2.0, 1.5]


def test_a_step_holds_one_group_at_least() -> None:
    assert useful_groups([[0.0, 1.0]], 2, (2, 4))[1].per_step == 1.0
    assert useful_groups([], 8, (4,))[0].share == 0.0


# -- the checks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


def configured(folder: Path, **changes: Any) -> Config:
    places = {"paths.outputs": str(folder / "outputs"), "paths.cache": str(folder / "cache"), "starter.steps": 1}
    return load_config(SMOKE, {**places, "task.generate_rows": 80, **changes})


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    config = configured(folder)
    made = open_run("gate", config)
    prepare(load_task(config.task.name, **config.task.params), made)
    return made


@pytest.fixture(scope="module")
def chat(folder: Path, run: Run) -> Chat:
    config = configured(folder)
    return Chat(models.load_tokenizer(models.resolve_model(config, run.read_rows("train")), config.model))


def record(row: int, reward: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """An answer of the base policy, as `sample_base` records it."""
    usual = {"answer": f"{reward}", "prompt": "?", "masked": False, "parts": {}, "notes": {}, "stop": "done"}
    return {"row": f"row-{row}", "reward": reward, **usual, **more}


def sound(group: int = 4, groups: int = 16) -> list[dict[str, Any]]:
    return [record(row, (row + i) % group / group) for row in range(groups) for i in range(group)]


def some(share: float, **more: Any) -> list[dict[str, Any]]:
    """Sound answers, a share of which is like this."""
    answers = sound()
    return [{**answer, **more} if i < round(share * len(answers)) else answer for i, answer in enumerate(answers)]


def checked(
    folder: Path,
    run: Run,
    answers: list[dict[str, Any]],
    table: AttackTable | None = None,
    max_turns: int = 1,
    **changes: Any,
) -> dict[str, Check]:
    config = configured(folder, **changes)
    task = load_task(config.task.name, **config.task.params, max_turns=max_turns)
    return {check.check: check for check in gate(config, task, run, answers, table)}


def levels(checks: Mapping[str, Check]) -> dict[str, str]:
    return {name: check.level for name, check in checks.items() if check.level != "go"}


MASKED = {"reward": None, "masked": True}
UNSCORED = {"reward": None, "notes": {"error": "judge: HTTP 503 after 5 attempts"}}


@pytest.mark.parametrize(
    ("answers", "changes", "expected"),
    [
        (some(0.25, stop="length"), {}, {"answers cut off": "caution"}),
        (some(0.95, stop="length"), {}, {"answers cut off": "no-go"}),
        (some(0.5, **MASKED), {}, {"answers that cannot be read": "caution"}),
        (some(0.4, parts={"valid": 0.0}), {}, {"answers that cannot be read": "caution"}),
        (some(0.95, parts={"valid": 0.0}), {}, {"answers that cannot be read": "no-go"}),
        (some(0.02, **UNSCORED), {}, {"answers unscored": "caution"}),
        (some(0.1, **UNSCORED), {}, {"answers unscored": "no-go"}),
        (some(0.1, **UNSCORED), {"rewards.max_unscored": 0.2}, {"answers unscored": "caution"}),
        (some(0.75, reward=0.0), {}, {"groups without a signal": "caution", "useful groups in a step": "caution"}),
        (some(1.0, reward=0.5), {}, {"groups without a signal": "no-go", "useful groups in a step": "no-go"}),
        (sound(), {"training.batch": 4}, {"useful groups in a step": "caution"}),
        (sound(), {"sampling.prompt_limit": 8}, {"prompts over the limit": "no-go"}),
        (sound(), {"training.batch": 400}, {"prompts left for one sampling": "no-go"}),
    ],
)
def test_what_is_wrong_with_the_answers_or_the_prompts_is_said(
    answers: list[dict[str, Any]], changes: dict[str, Any], expected: dict[str, str], folder: Path, run: Run
) -> None:
    checks = checked(folder, run, answers, **changes)
    found = levels(checks)
    if "prompts over the limit" in expected:  # then none is left
        expected = {**expected, "prompts left for one sampling": "no-go"}
    assert found == expected
    assert all(checks[name].knob for name in found)


def test_the_causes_of_unscored_answers_are_named_and_counted(folder: Path, run: Run) -> None:
    check = checked(folder, run, some(0.125, **UNSCORED))["answers unscored"]
    assert check.meaning == "8 x judge: HTTP 503 after 5 attempts" and check.shown == "12.5% of 64 answers"


@pytest.mark.parametrize(
    ("answers", "changes"),
    [
        (sound(), {}),
        (sound(), {"training.group_size": 2}),
        (sound(8), {"training.group_size": 8}),
        (sound(16, 8), {"training.group_size": 16, "training.batch": 32}),
        (some(0.1, **MASKED), {}),
        (some(0.05, stop="length"), {}),
        (some(0.3, reward=0.0), {"training.batch": 32}),
        (some(0.2, parts={"valid": 0.0}), {"task.on_invalid": "zero"}),
        (sound(), {"training.accumulation": 2, "training.batch": 8}),
        (sound(), {"starter.kind": "qwen3"}),
    ],
)
def test_good_runs_pass_without_a_word(
    answers: list[dict[str, Any]], changes: dict[str, Any], folder: Path, run: Run
) -> None:
    checks = checked(folder, run, answers, **changes)
    assert levels(checks) == {}
    assert verdict(list(checks.values())) == f"GO: {len(checks)} checks passed"


@pytest.mark.parametrize(
    "changes",
    [
        {"training.group_size": 1},
        {"training.batch": 6},
        {"training.learning_rat": 1e-3},
        {"training.learning_rate": 0},
        {"training.save_steps": 3, "training.accumulation": 1, "training.steps_per_generation": 2},
        {"task.path": "nowhere/at/all.csv"},
        {"task.series": "nowhere.csv", "task.path": "also.csv"},
        {"task.name": "decision"},
        {"task.tua": 1.0},
        {"task.columns": {"prompt": "question"}},
        {"task.name": "judged", "task.path": "configs/examples/judged.jsonl", "task.judge": {"provider": "openai"}},
    ],
)
def test_configs_that_can_never_work_are_refused_before_anything_is_sampled(
    changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if changes.get("task.name") == "judged":  # the smoke config's own task fields are the decisions task's
        with pytest.raises(WorkbenchError, match="OPENAI_API_KEY"):
            load_task("judged", path=changes["task.path"], judge=changes["task.judge"]).check()
        return
    with pytest.raises(WorkbenchError):
        config = configured(folder, **changes)
        load_task(config.task.name, **config.task.params).rows("train")


# -- the verdict ------------------------------------------------------------------------------------------------------


def cheat(works: str = "", family: str = "echo", left_out: str = "") -> Attacked:
    return Attacked("the prompt back", family, "?", {"row-0": None if left_out else 1.0}, left_out, works)


def table(*attacked: Attacked, gold: int = 1, misjudged: int = 0) -> AttackTable:
    names = [f"row-{i}" for i in range(gold)]
    return AttackTable(list(attacked), 0.2, 0.0, dict.fromkeys(names, 1.0), names[:misjudged], 0.2, names)


@pytest.mark.parametrize(
    ("attacked", "expected"),
    [
        (table(cheat()), {}),
        (table(cheat(), gold=0), {}),
        (table(cheat("earns 1, more than 0.2")), {"cheats that work": "no-go"}),
        (table(cheat("earns 1, more than 0.2", UNSEEN)), {"cheats that work": "caution"}),
        (table(cheat(left_out="unscored: judge: HTTP 503 after 5 attempts")), {"cheats that work": "caution"}),
        (table(cheat(left_out="masked")), {}),
        (table(cheat(), gold=2, misjudged=1), {"gold answers that do not come first": "no-go"}),
    ],
)
def test_cheats_that_work_and_gold_that_does_not_come_first_are_no_go(
    attacked: AttackTable, expected: dict[str, str], folder: Path, run: Run
) -> None:
    assert levels(checked(folder, run, sound(), attacked)) == expected


def test_the_verdict_names_the_worst() -> None:
    def check(name: str, level: Any) -> Check:
        return Check(name, 0.0, "", level, "", "")

    fine, doubtful, bad = check("a", "go"), check("b", "caution"), check("c", "no-go")
    assert verdict([fine]) == "GO: 1 checks passed"
    assert verdict([fine, doubtful]) == "GO WITH CAUTION: b"
    assert verdict([fine, doubtful, bad]) == "NO-GO: c"


# -- the chat template ------------------------------------------------------------------------------------------------

REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else '(left out)' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_keeps_what_was_said_is_told_from_one_that_does_not(
    chat: Chat, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = run.read_rows("train")[0]
    assert keeps_prefix(chat, row)
    assert levels(checked(folder, run, sound(), max_turns=3)) == {}
    load = models.load_tokenizer

    def rewriting(*given: Any) -> Any:
        tokenizer = load(*given)
        tokenizer.chat_template = REWRITING
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", rewriting)
    found = checked(folder, run, sound(), max_turns=3)
    assert levels(found) == {"chat template": "no-go"} and found["chat template"].shown == "rewrites"
    single = checked(folder, run, sound())["chat template"]
    assert single.level == "go" and "one turn" in single.meaning


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool_run(folder: Path) -> Run:
    """A run whose rows have a function to call."""
    made = open_run("tools", configured(folder))
    tools = [{"type": "function", "function": {"name": "store", "parameters": {"type": "object"}}}]
    prompts = [{"role": "user", "content": f"hour {i:02d}"} for i in range(32)]
    gold = [{"role": "assistant", "content": "store [1]"}]
    made.write_rows(
        "train", [{"id": f"row-{i}", "prompt": [one], "gold": gold, "tools": tools} for i, one in enumerate(prompts)]
    )
    made.write_rows("eval", [])
    return made


def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every tokenizer's template leaves the tools out."""
    load = models.load_tokenizer

    def blind(*given: Any) -> Any:
        tokenizer = load(*given)
        tokenizer.chat_template = tokenizer.chat_template.replace("if tools", "if false")
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", blind)


def test_a_template_that_does_not_show_the_tools_is_no_go_with_the_fix(
    folder: Path, run: Run, tool_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = checked(folder, tool_run, sound())["tools in the prompt"]
    assert (shown.level, shown.shown) == ("go", "shown")
    assert "tools in the prompt" not in checked(folder, run, sound())
    without_tools(monkeypatch)
    found = checked(folder, tool_run, sound())
    assert levels(found) == {"tools in the prompt": "no-go"}
    check = found["tools in the prompt"]
    assert "leaves out the row's tools (store)" in check.meaning and "task.prompting: text" in check.knob


def test_such_a_template_is_not_even_sampled_from(folder: Path, tool_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(folder)
    without_tools(monkeypatch)
    monkeypatch.setattr("lib.preflight.answers.answer_rows", lambda *_: pytest.fail("the policy was asked"))
    with pytest.raises(ToolsError, match=r"row row-0: .* leaves out the row's tools \(store\)"):
        sample_base(config, load_task(config.task.name, **config.task.params), tool_run, prompts=2)


def test_preparing_such_rows_tells_it_and_goes_on(
    folder: Path, tool_run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy that is asked may be another, behind a URL."""
    with caplog.at_level("WARNING"):
        open_chat(configured(folder), tool_run)
        assert caplog.text == ""
        without_tools(monkeypatch)
        assert open_chat(configured(folder), tool_run).text([{"role": "user", "content": "?"}])
    assert "leaves out the row's tools (store)" in caplog.text


# -- room for tokens --------------------------------------------------------------------------------------------------


def test_prompts_without_room_for_an_answer_count_as_over_the_limit(folder: Path, run: Run, chat: Chat) -> None:
    lengths = sorted(len(chat.prompt_ids(row["prompt"])) for row in run.read_rows("train"))
    room = {"sampling.engine": "vllm", "sampling.vllm.max_length": lengths[0]}
    assert levels(checked(folder, run, sound(), **room))["prompts over the limit"] == "no-go"
    room["sampling.vllm.max_length"] = lengths[-1] + 1
    assert levels(checked(folder, run, sound(), **room)) == {}


def test_what_to_turn_where_whole_conversations_are_cut_off_is_said_for_tasks_of_several_turns(
    folder: Path, run: Run
) -> None:
    cut = some(0.9, stop="length")
    single, several = (checked(folder, run, cut, max_turns=turns)["answers cut off"] for turns in (1, 3))
    assert "sampling.completion_limit" in single.knob and "max_length" not in single.knob
    assert "sampling.completion_limit" in several.knob and "sampling.vllm.max_length up" in several.knob


# -- what the judge will cost -----------------------------------------------------------------------------------------


class Judged(JudgedTask, frozen=True):
    def criteria(self, row: Row) -> list[Criterion]:
        return [Criterion(id="1", text="Names colours"), Criterion(id="2", text="Counts to seven")]

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        scores = [verdict.score for verdict in verdicts.values()]
        known = [score for score in scores if score is not None]
        return Score(reward=sum(known) / 2 if len(known) == 2 else None)


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with running_judge() as running:
        yield running


ROWS: list[Row] = [{"id": f"row-{i}", "prompt": [{"role": "user", "content": f"Rainbow {i}?"}]} for i in range(4)]


def judged_answers(task: Task) -> list[dict[str, Any]]:
    """Four answers to every row; two of them are the same, one is empty."""
    answers = [
        record(i, score_one(task, Rollout.of(row, text)).reward, answer=text)
        for i, row in enumerate(ROWS)
        for text in ("It names colours.", "It counts to seven.", "It names colours.", "")
    ]
    assert {answer["reward"] for answer in answers} == {0.0, 0.5}
    return answers


def judge_task(server: JudgeServer, folder: Path, **more: Any) -> Judged:
    settings = {"provider": "compatible", "model": "gpt-4o-mini", "base_url": server.base_url}
    return Judged(judge=JudgeSettings(**settings, **more), ledger=str(folder / "ledger.sqlite"))


def test_judging_is_priced_by_what_the_base_policys_answers_took_and_asks_nothing_again(
    server: JudgeServer, tmp_path: Path, folder: Path
) -> None:
    task, config = judge_task(server, tmp_path), configured(folder)  # 4 steps of 16 answers
    server.control(reset=True)
    answers = judged_answers(task)
    assert server.stats()["requests"] == 8  # two of four answers are asked about: one repeats, one is empty
    bill = judge_bill(config, task, ROWS, answers)
    assert bill is not None and (bill.calls, bill.completions) == (pytest.approx(64 * 8 / 16), 64)
    tokens = [sum(len(str(m["content"])) for m in body["messages"]) // 4 for body in server.stats()["bodies"]]
    assert bill.usd is not None and bill.usd > 64 / 16 * sum(tokens) * 0.15e-6  # input alone, USD per token
    assert server.stats()["requests"] == 8


def test_without_a_judge_there_is_no_bill_and_without_a_price_no_dollars(
    server: JudgeServer, tmp_path: Path, folder: Path
) -> None:
    config = configured(folder)
    assert judge_bill(config, ScoreFunctionTask(), ROWS, sound()) is None
    task = judge_task(server, tmp_path).model_copy(
        update={"judge": JudgeSettings(provider="compatible", model="home-made", base_url=server.base_url)}
    )
    bill = judge_bill(config, task, ROWS, judged_answers(task))
    assert bill is not None and bill.usd is None and bill.calls == pytest.approx(32)
    assert judge_bill(config, task, ROWS, [record(0, **MASKED)]) is None


@pytest.mark.parametrize(("budget", "level"), [(None, "go"), (100.0, "go"), (1e-6, "no-go")])
def test_a_bill_over_the_judges_budget_is_no_go(
    budget: float | None, level: str, server: JudgeServer, tmp_path: Path, folder: Path, run: Run
) -> None:
    judged = judged_answers(judge_task(server, tmp_path))
    config, rows = configured(folder), run.read_rows("train")
    ids = {row["id"]: rows[i]["id"] for i, row in enumerate(ROWS)}
    task = judge_task(server, tmp_path, budget_usd=budget)
    asked = [record(0, score_one(judge_task(server, tmp_path), Rollout.of(rows[int(a["row"][-1])], a["answer"])).reward,
                    answer=a["answer"]) | {"row": ids[a["row"]]} for a in judged]  # fmt: skip
    checks = {check.check: check for check in gate(config, task, run, asked)}
    assert checks["judging"].level == level and checks["judging"].shown.startswith("32 calls, $")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4 * 16),
        ({"training.accumulation": 2}, 4 * 2 * 16),
        ({"training.accumulation": 2, "training.iterations": 2}, 4 * 16),
        ({"training.steps": -1, "training.epochs": 2}, 60 * 4 * 2 + 0),
        ({"training.steps": -1, "training.epochs": 1, "training.iterations": 2}, 60 * 4),
    ],
)
def test_the_answers_of_a_training_are_counted(changes: dict[str, Any], expected: int, folder: Path) -> None:
    assert completions_of(configured(folder, **changes), 60) == expected


# -- with the real scorer ---------------------------------------------------------------------------------------------


def test_the_gate_and_the_attacks_of_a_run_agree_with_each_other(folder: Path, run: Run) -> None:
    config = configured(folder)
    task = load_task(config.task.name, **config.task.params)
    rows = run.read_rows("train")
    answers = []
    for i, text in itertools.product(range(8), ("[0]", "[1]", "[2]", "no action")):
        score = score_one(task, Rollout.of(rows[i], text))
        answers.append(record(0, score.reward, masked=score.masked, parts=score.parts) | {"row": rows[i]["id"]})
    attacked = attack_table(task, rows, answers, config.sampling.completion_limit)
    assert attacked.rows == [rows[i]["id"] for i in range(4)] and attacked.working == []
    checks = gate(config, task, run, answers, attacked)
    assert verdict(checks).startswith("GO")
    useful = next(check for check in checks if check.check == "useful groups in a step")
    assert useful.value == useful_groups(grouped_rewards(answers, 4), 16, (4,))[0].per_step
