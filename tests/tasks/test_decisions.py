"""The task `decisions`: its table, its reward, its answers, its converted tables."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.data import CsvTable, write_csv
from lib.task import Rollout, Row, TaskError, Turn, load_task
from lib.tasks.decisions import Decisions, chosen_action, softmax

ROW: Row = {"id": "r", "prompt": [{"role": "user", "content": "?"}], "q": [1.0, 3.0, 3.0, 0.0]}
ROW["rewards"] = softmax(ROW["q"], 1.0)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(path: Path, text: str, **params: Any) -> Decisions:
    write(path, text)
    return Decisions(path=str(path), split_ratio=1, **params)


# -- the reward -------------------------------------------------------------------------------------------------------


def exact_softmax(q: list[float], tau: float) -> list[float]:
    context = Context(prec=60, Emax=10**18 - 1, Emin=-(10**18) + 1)
    gaps = [context.divide(Decimal(value) - Decimal(max(q)), Decimal(tau)) for value in q]
    weights = [context.exp(gap) if gap > -(10**6) else Decimal(0) for gap in gaps]
    return [float(context.divide(weight, sum(weights, Decimal(0)))) for weight in weights]


@pytest.mark.parametrize("tau", [1e-300, 5e-324, 1e-9, 0.05, 1.0, 1e9, 1e308])
def test_the_reward_is_a_distribution_for_any_finite_q_and_any_tau(tau: float) -> None:
    rng = random.Random(0)
    scales = [0.0, 5e-324, 1e-300, 1e-5, 1.0, 1e5, 1e300, 1.7e308]
    for _ in range(300):
        q = [rng.uniform(-1, 1) * rng.choice(scales) for _ in range(rng.randint(2, 6))]
        rewards = softmax(q, tau)
        assert all(0 <= reward <= 1 for reward in rewards)
        assert math.isclose(math.fsum(rewards), 1.0, rel_tol=1e-12)
        assert rewards[q.index(max(q))] == max(rewards)
        assert sorted(range(len(q)), key=lambda action: q[action]) == sorted(
            range(len(q)), key=lambda action: (rewards[action], q[action])
        )


def test_the_reward_agrees_with_arithmetic_of_sixty_digits() -> None:
    rng = random.Random(1)
    cases = [([1e308, -1e308], 1e308), ([-1e308, 1e308, 0.0], 5e307), ([1e-300, 3e-300], 1e-300), ([5.0, 5.0], 1e-300)]
    cases += [([rng.gauss(0, 5) for _ in range(4)], 10 ** rng.uniform(-3, 3)) for _ in range(200)]
    for q, tau in cases:
        assert softmax(q, tau) == pytest.approx(exact_softmax(q, tau), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("tau", [0, -1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(tau: float) -> None:
    with pytest.raises(TaskError, match=r"task\.tau"):
        load_task("decisions", tau=tau)


# -- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[2]", 2),
        ("now high then down so [3]", 3),
        ("[1] because … so [1]", 1),
        ("first\n\n[0]\n", 0),
        ("a list [x] and [1]", 1),
        ("", "no action"),
        ("2", "no action"),
        ("(2)", "no action"),
        ("[ 2 ]", "no action"),
        ("[-1]", "no action"),
        ("[1.0]", "no action"),
        ("[²]", "no action"),
        ("[٣]", "no action"),
        ("[２]", "no action"),
        ("[[]]", "no action"),
        ("[4]", "unknown action"),
        ("[07]", "unknown action"),
        ("[01]", "unknown action"),
        ("[" + "9" * 10_000 + "]", "unknown action"),
        ("[1] or [2]", "several actions"),
        ("[1] [9]", "several actions"),
        ("choose [0] idle [1] charge [2] charge hard [3] discharge", "several actions"),
        (
            "<|channel|>analysis<|message|>[1] or [2]<|end|><|start|>assistant<|channel|>final<|message|>[2]<|return|>",
            2,
        ),
        ("<|channel|>analysis<|message|>[1]<|end|><|start|>assistant<|channel|>final<|message|>[2]", 2),
        ("<|channel|>final <|constrain|>json<|message|>[3]<|return|>", 3),
        ("<|channel|>analysis<|message|>so [1]<|end|>", "no final channel"),
        ("so [1]<|end|>", "no final channel"),
        ("<|channel|>final<|message|>well<|return|>", "no action"),
        ("<|channel|>final<|message|>[1]<|end|><|start|>assistant<|channel|>final<|message|>[2]", "several actions"),
        ("<|channel|>finality<|message|>[1]", "no final channel"),
        ("<|channel|>final<|message|>[1]<|end|><|start|>assistant<|channel|>analysis<|message|>[3]<|end|>", 1),
    ],
)
def test_the_answer_is_the_one_action_in_brackets(text: str, expected: int | str) -> None:
    action, problem = chosen_action(text, 4)
    assert (action if isinstance(expected, int) else problem) == expected
    assert (action is None) == bool(problem)


async def test_a_valid_answer_earns_its_probability_and_tells_regret() -> None:
    task = Decisions(tau=1.0)
    score = await task.score(Rollout.of(ROW, "so [0]"))
    assert score.reward == ROW["rewards"][0] and not score.masked
    assert score.parts == {"valid": 1.0, "chosen": 0.0, "regret": 2.0, "p_best": ROW["rewards"][1], "best": 0.0}
    for tied in ("[1]", "[2]"):
        score = await task.score(Rollout.of(ROW, tied))
        assert score.parts["best"] == 1.0 and score.parts["regret"] == 0.0


async def test_an_invalid_answer_is_masked_or_zero_as_asked() -> None:
    masked = await Decisions().score(Rollout.of(ROW, "[0] [1]"))
    assert masked.reward is None and masked.masked and masked.parts["valid"] == 0.0
    assert masked.notes == {"invalid": "several actions"}
    zero = await Decisions(on_invalid="zero").score(Rollout.of(ROW, "[0] [1]"))
    assert zero.reward == 0.0 and not zero.masked and zero.parts["best"] == 0.0


async def test_a_truncated_answer_is_invalid_even_when_it_names_an_action() -> None:
    whole = Rollout.of(ROW, "[1]")
    turn = Turn(message=whole.turns[0].message, stop="length")
    for cut in (whole.model_copy(update={"stop": "length"}), whole.model_copy(update={"turns": (turn,)})):
        assert (await Decisions().score(cut)).notes == {"invalid": "truncated"}


async def test_regret_stays_a_json_number_for_any_finite_q() -> None:
    row = {**ROW, "q": [-1.7e308, 1.7e308], "rewards": [0.0, 1.0]}
    score = await Decisions().score(Rollout.of(row, "[0]"))
    assert json.loads(json.dumps(score.model_dump(), allow_nan=False))["parts"]["regret"] == 1.7e308


# -- rows -------------------------------------------------------------------------------------------------------------


async def test_promises_hold_for_the_generated_rows() -> None:
    task = Decisions(tau=1.0, generate_rows=400)
    for row in [*task.rows("train"), *task.rows("eval")]:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        gold = Rollout.of(row, *row["gold"])
        rewards = [(await task.score(Rollout.of(row, f"[{action}]"))).reward or 0.0 for action in range(4)]
        assert (await task.score(gold)).reward == max(rewards)
        assert await task.score(gold) == await task.score(gold)
        assert (await task.score(Rollout.of(row, ""))).reward is None
        assert (await task.score(Rollout.of(row, *row["demonstration"]))).parts["valid"] == 1.0


def test_the_default_rows_are_plenty_and_share_no_prompt() -> None:
    task = load_task("decisions", tau=1.0)
    train, held_out = list(task.rows("train")), list(task.rows("eval"))
    assert (len(train), len(held_out)) == (6144, 2048)
    prompts = [{row["prompt"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert len(prompts[0]) == 6144 and not prompts[0] & prompts[1]


def test_another_process_rebuilds_the_same_rows() -> None:
    program = (
        "from lib.task import load_task; import json, hashlib;"
        "rows = list(load_task('decisions', tau=0.5, generate_rows=64, generate_seed=3).rows('eval'));"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=PROJECT_ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout
        for env in (environment, {**environment, "PYTHONHASHSEED": "8"})
    }
    assert len(outputs) == 1


def test_importing_the_task_imports_nothing_heavy() -> None:
    program = (
        "import sys, lib.tasks.decisions;"
        "heavy = {'numpy', 'pandas', 'pyarrow', 'datasets', 'torch', 'transformers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_table_becomes_rows(tmp_path: Path) -> None:
    head = "id,prompt,phase,q_action_0,q_action_1,reason,logged_action\n"
    text = head + 'a,"Which?\nNow",p1,1,2,cold so,0\n,Where?,p2,2,1,,\n'
    first, second = table(tmp_path / "t.csv", text, tau=1.0).rows("train")
    assert first == {
        "id": "a",
        "prompt": [{"role": "user", "content": "Which?\nNow"}],
        "gold": [{"role": "assistant", "content": "cold so [1]"}],
        "category": "p1",
        "q": [1.0, 2.0],
        "rewards": softmax([1.0, 2.0], 1.0),
        "demonstration": [{"role": "assistant", "content": "cold so [0]"}],
    }
    assert second["id"] == "t:4" and second["gold"][0]["content"] == "[0]" and "demonstration" not in second


def test_a_prompt_cell_may_hold_messages_as_json(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    write_csv(tmp_path / "t.csv", ["prompt", "q_action_0", "q_action_1"], [[json.dumps(talk), 1, 2], ["[{]", 1, 2]])
    first, second = Decisions(path=str(tmp_path / "t.csv"), split_ratio=1).rows("train")
    assert first["prompt"] == talk and second["prompt"][0]["content"] == "[{]"


def test_reward_columns_are_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    text = "prompt,q_action_0,q_action_1,reward_action_0,reward_action_1\nx,1,2,0.25,0.75\n"
    assert table(tmp_path / "t.csv", text).rows("train")[0]["rewards"] == [0.25, 0.75]
    rewards = table(tmp_path / "t.csv", text, overwrite_rewards=True, tau=1.0).rows("train")[0]["rewards"]
    assert rewards == softmax([1.0, 2.0], 1.0)
    broken = text.replace("reward_action_1", "reward_action_7").replace("0.75", "?")
    assert table(tmp_path / "t.csv", broken, overwrite_rewards=True).rows("train")


def test_rows_whose_q_values_are_all_equal_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rows = table(tmp_path / "t.csv", "prompt,q_action_0,q_action_1\nx,1,1\ny,1,2\nz,-0.0,0\n").rows("train")
    assert [row["id"] for row in rows] == ["t:3"]
    assert "2 of 3 rows left out: all Q-values of the row are equal" in caplog.text


def test_the_number_of_actions_may_differ_between_phases(tmp_path: Path) -> None:
    text = "prompt,phase,q_action_0,q_action_1,q_action_2\na,small,1,2,\nb,big,1,2,3\n"
    first, second = table(tmp_path / "t.csv", text).rows("train")
    assert (len(first["q"]), len(first["rewards"]), len(second["q"])) == (2, 2, 3)
    write(tmp_path / "u.csv", "prompt,phase,q_action_0,q_action_1\nc,small,1,2\n")
    assert len(Decisions(path=str(tmp_path), split_ratio=1).rows("train")) == 3


def test_a_real_series_is_used_by_path_and_named_as_input(shared: Path) -> None:
    path = shared / "data" / "carbon" / "CISO_2022_hourly.csv"
    task = Decisions(series="../shared/data/carbon/CISO_2022_hourly.csv", generate_rows=100, tau=1.0)
    assert len(task.rows("train")) == 75 and task.rows("train")[0]["id"].startswith("CISO_2022_hourly-2022-")
    assert [file.resolve() for file in task.input_files()] == [path.resolve()]


def test_the_example_table_is_one() -> None:
    task = load_task("decisions", path="configs/examples/decisions.csv", tau=1.0)
    assert len(task.rows("train")) + len(task.rows("eval")) == 12


# -- bad input --------------------------------------------------------------------------------------------------------

HEAD = "id,prompt,q_action_0,q_action_1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"an empty file"),
        (HEAD, r"an empty file: no records"),
        ("id,q_action_0,q_action_1\na,1,2\n", r"t\.csv, prompt: no such column. The table has: id, q_action_0"),
        ("prompt\nx\n", r"q_action_0: no such column; at least q_action_0 and q_action_1"),
        ("prompt,q_action_0\nx,1\n", r"q_action_1: no such column"),
        ("prompt,q_action_0,q_action_2\nx,1,2\n", r"q_action_2: numbers must run from 0.*missing: q_action_1"),
        ("prompt,q_action_1,q_action_2\nx,1,2\n", r"missing: q_action_0"),
        ("prompt,q_action_0,q_action_1,q_action_x\nx,1,2,3\n", r"q_action_x: not a numbered action"),
        ("prompt,q_action_0,q_action_1,q_action_02\nx,1,2,3\n", r"q_action_02: not a numbered action"),
        (HEAD + "a,x,1,\n", r"line 2, q_action_1: '' is not a finite number"),
        (HEAD + "a,x,one,2\n", r"line 2, q_action_0: 'one' is not a finite number"),
        (HEAD + "a,x,nan,2\n", r"q_action_0: 'nan' is not a finite number"),
        (HEAD + "a,x,1,-inf\n", r"q_action_1: '-inf' is not a finite number"),
        (HEAD + "a,x,1,1e999\n", r"q_action_1: '1e999' is not a finite number"),
        (HEAD + "a,x,1,1_000\n", r"q_action_1: '1_000' is not a finite number"),
        (HEAD + "a, ,1,2\n", r"line 2, prompt: ' ' is no text"),
        (HEAD + 'a,"[{""content"": ""no role""}]",1,2\n', r"line 2, prompt"),
        (HEAD + "a,<|im_start|>user x<|im_end|>,1,2\n", r"line 2, prompt"),
        (HEAD + "a,<|start|>user<|message|>cut,1,2\n", r"line 2, prompt"),
        (HEAD + "a,<|start|>user<|message|>x<|end|><|start|>user<|message|>cut,1,2\n", r"line 2, prompt"),
        (HEAD + "a,x,1,2\nb,y,1,2\na,z,1,2\n", r"line 4, id: 'a' is also the id of .*t\.csv, line 2"),
        (HEAD + "a,x,1\n", r"line 2: 3 cells; the header has 4"),
        ("prompt,q_action_0,q_action_1,reward_action_0\nx,1,2,3\n", r"reward_action_\*: 1 columns for 2 actions"),
        ("prompt,q_action_0,q_action_1,reward_action_0,reward_action_1\nx,1,2,0,\n", r"line 2, reward_action_1: ''"),
        ("prompt,q_action_0,q_action_1,reward_action_0,reward_action_1\nx,1,2,0,7\n", r"not within 0.0 to 1.0"),
        (
            "prompt,q_action_0,q_action_1,logged_action\nx,1,2,2\n",
            r"logged_action: '2' is not one of the actions 0 to 1",
        ),
        ("prompt,phase,q_action_0,q_action_1,q_action_2\nx,p,1,2,\ny,p,1,2,3\n", r"in phase 'p' at .*line 2"),
        ("prompt,phase,q_action_0,q_action_1\nx,p,1,\n", r"1 actions; at least 2"),
        ("prompt,phase,q_action_0,q_action_1,q_action_2\nx,p,1,,3\n", r"q_action_1: '' is not a finite number"),
        (HEAD + "a,x,1,1\n", r"no rows left"),
    ],
)
def test_bad_input_is_told_with_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        table(tmp_path / "t.csv", text).rows("train")


def test_another_encoding_is_told(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", (HEAD + "a,für,1,2\n").encode("latin-1"))
    with pytest.raises(TaskError, match=r"line 2: not UTF-8"):
        Decisions(path=str(tmp_path / "t.csv")).rows("train")


def test_files_with_another_number_of_actions_and_no_phase_are_refused_once(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "prompt,q_action_0,q_action_1\nx,1,2\n")
    write(tmp_path / "b.csv", "prompt,q_action_0,q_action_1,q_action_2\nx,1,2,3\ny,1,2,3\n")
    with pytest.raises(
        TaskError, match=r"1 problem in the data:\n.*b\.csv, line 2.*3 actions.*a\.csv, line 2.*`phase`"
    ):
        Decisions(path=str(tmp_path)).rows("train")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = HEAD + "a,x,1,?\na,,nan,2\nb,x,1\nc,x,1,2\nc,y,1,2\n"
    with pytest.raises(TaskError) as caught:
        table(tmp_path / "t.csv", text).rows("train")
    message = str(caught.value)
    assert message.startswith("5 problems")
    for line in (2, 3, 4, 6):
        assert f"line {line}" in message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"series": "a.csv", "path": "b.csv"}, r"series \(a\.csv\) is used only without path"),
        ({"on_invalid": "zero", "reward_range": (-1, 1)}, r"set on_invalid: mask"),
        ({"on_invalid": "drop"}, r"task\.on_invalid"),
        ({"taus": 1}, r"task\.taus: unknown key.*'tau'"),
        ({"generate_rows": 1}, r"task\.generate_rows"),
    ],
)
def test_impossible_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task("decisions", **params)


# -- converted tables -------------------------------------------------------------------------------------------------


def harmony(messages: Sequence[dict[str, Any]]) -> str:
    """The shape of gpt-oss's template: its own system message, instructions as developer, an open assistant turn."""
    text = "<|start|>system<|message|>You are ChatGPT.<|end|>"
    for message in messages:
        role, content = message["role"], message["content"]
        role, content = ("developer", f"# Instructions\n\n{content}\n\n") if role == "system" else (role, content)
        text += f"<|start|>{role}<|message|>{content}<|end|>"
    return text + "<|start|>assistant"


def test_the_converted_table_holds_rendered_prompts_and_rewards_and_reads_back_as_the_same_rows(tmp_path: Path) -> None:
    talk = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "x",\ny'}])
    source = tmp_path / "source"
    source.mkdir()
    write_csv(source / "a.csv", ["prompt", "q_action_0", "q_action_1", "note"], [[talk, 1, 2, "n"], ["w", 3, 3, "n"]])
    write(source / "b.csv", "key,ask,phase,q_action_0,q_action_1,q_action_2\nk1,x,p,1,2,0.1\n")
    with pytest.raises(TaskError):
        Decisions(path=str(source)).rows("train")
    task = Decisions(path=str(source / "a.csv"), split_ratio=1, tau=1.0)
    (path,) = task.write_tables(tmp_path / "run", harmony)
    assert path == tmp_path / "run" / "a_harmony.csv"
    (record,) = CsvTable(path)
    assert list(record) == ["id", "prompt", "q_action_0", "q_action_1", "note", "reward_action_0", "reward_action_1"]
    assert record["prompt"].endswith('<|start|>user<|message|>Say "x",\ny<|end|><|start|>assistant')
    assert list(Decisions(path=str(path), split_ratio=1).rows("train")) == list(task.rows("train"))
    renamed = Decisions(path=str(source / "b.csv"), split_ratio=1, columns={"prompt": "ask", "id": "key"})
    (path,) = renamed.write_tables(tmp_path / "run", harmony)
    assert list(Decisions(path=str(path), split_ratio=1).rows("train")) == list(renamed.rows("train"))


def test_writing_back_puts_the_table_beside_its_source_and_the_folder_still_reads_the_source_only(
    tmp_path: Path,
) -> None:
    write(tmp_path / "t.csv", "prompt,q_action_0,q_action_1\nx,1,2\ny,2,1\n")
    task = Decisions(path=str(tmp_path), split_ratio=1)
    assert task.write_tables(tmp_path / "run", harmony, write_back=True) == [tmp_path / "t_harmony.csv"]
    again = Decisions(path=str(tmp_path), split_ratio=1)
    assert list(again.rows("train")) == list(task.rows("train")) and again.input_files() == [tmp_path / "t.csv"]
    assert len(Decisions(path=str(tmp_path / "t_harmony.csv"), split_ratio=1).rows("train")) == 2


def test_a_generated_table_is_written_into_the_run_folder_only(tmp_path: Path) -> None:
    task = Decisions(generate_rows=20, tau=1.0, split_ratio=1)
    (path,) = task.write_tables(tmp_path, harmony)
    assert path.name == "synthetic-0_harmony.csv"
    assert list(Decisions(path=str(path), split_ratio=1).rows("train")) == list(task.rows("train"))
    with pytest.raises(TaskError, match="Leave write_back false"):
        task.write_tables(tmp_path, harmony, write_back=True)


def test_a_big_table_is_checked_split_and_written_with_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("prompt,q_action_0,q_action_1\n")
        file.writelines(
            f"{'a long question ' * 20}{number},{number % 7},{number % 5 + 0.5}\n" for number in range(8_000)
        )
    tracemalloc.start()
    task = Decisions(path=str(path))
    assert len(task.rows("train")) == 6_000
    task.write_tables(tmp_path / "run", lambda messages: str(messages[0]["content"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < path.stat().st_size / 2
