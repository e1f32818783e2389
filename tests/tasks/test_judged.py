"""The task `judged`: its rows and rubrics, weighted means over three-valued verdicts, and the judges that score it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_server import FAULTS, JudgeServer, share_of

from lib import PROJECT_ROOT
from lib.config import load_config
from lib.ledger import LedgerError, Verdict
from lib.task import Rollout, Row, Score, TaskError, load_task
from lib.tasks.judged import OVERALL, Judged

LOCAL = {"provider": "compatible", "model": "loopback", "base_url": "http://127.0.0.1:9/v1"}
TWO = {"correct": {"text": "Names flour and water", "weight": 3.0}, "clear": {"text": "Short words", "weight": 1.0}}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judged(path: Path | str, **params: Any) -> Judged:
    return Judged(**{"path": str(path), "judge": LOCAL, "split_ratio": 1, **params})


def rows_of(folder: Path, *rows: dict[str, Any], **params: Any) -> list[Row]:
    return list(judged(write(folder / "d.jsonl", rows), **params).rows("train"))


def refused(folder: Path, *rows: dict[str, Any], **params: Any) -> str:
    with pytest.raises(TaskError) as caught:
        rows_of(folder, *rows, **params)
    return str(caught.value)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_keeps_prompt_reference_rubric_metadata_and_category(tmp_path: Path) -> None:
    given = {"id": "r", "prompt": "What is bread?", "reference": " Flour. ", "rubric": "Correct.", "noise": 1}
    (row,) = rows_of(tmp_path, {**given, "metadata": {"from": [1, None]}, "category": "food"})
    assert row == {
        "id": "r", "prompt": [{"role": "user", "content": "What is bread?"}], "reference": "Flour.",
        "rubric": {OVERALL: {"text": "Correct.", "weight": 1.0}}, "metadata": {"from": [1, None]}, "category": "food",
    }  # fmt: skip
    (row,) = rows_of(tmp_path, {"prompt": "Hi"}, rubric="Kind.")
    assert row["id"] == "d:1" and row["rubric"] == {OVERALL: {"text": "Kind.", "weight": 1.0}}
    assert row.keys() == {"id", "prompt", "rubric"}


def test_messages_are_a_prompt_and_a_last_answer_is_the_reference(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    answer = {"role": "assistant", "content": "Hello!"}
    given = [{"messages": talk}, {"messages": [*talk, answer]}, {"messages": [*talk, answer], "reference": "Hey"}]
    rows = rows_of(tmp_path, *given, rubric="Kind.")
    assert [row["prompt"] for row in rows] == [talk] * 3
    assert [row.get("reference") for row in rows] == [None, "Hello!", "Hey"]


def test_a_rows_own_rubric_goes_before_the_tasks(tmp_path: Path) -> None:
    own = {"tone": "Friendly.", "facts": {"text": "Right.", "weight": 2}}
    given = [{"prompt": "a"}, {"prompt": "b", "rubric": own}, {"prompt": "c", "rubric": json.dumps(own)}]
    first, second, third = rows_of(tmp_path, *given, {"prompt": "d", "rubric": ""}, rubric=TWO)[:3]
    assert first["rubric"] == TWO
    assert second["rubric"] == {
        "tone": {"text": "Friendly.", "weight": 1.0},
        "facts": {"text": "Right.", "weight": 2.0},
    }
    assert third["rubric"] == second["rubric"]


def test_a_parquet_of_structs_does_not_lend_one_rows_sub_scores_to_another(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [
        {"prompt": "a", "rubric": {"tone": {"text": "Friendly.", "weight": 2.0}}},
        {"prompt": "b", "rubric": {"facts": {"text": "Right.", "weight": None}}},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    rows = judged(tmp_path / "d.parquet").rows("train")
    assert [list(row["rubric"]) for row in rows] == [["tone"], ["facts"]]
    assert rows[1]["rubric"]["facts"]["weight"] == 1.0


def test_columns_with_other_names_are_mapped(tmp_path: Path) -> None:
    given = {"question": "a", "best": "b", "prompt": "not this one"}
    (row,) = rows_of(tmp_path, given, rubric="Kind.", columns={"prompt": "question", "reference": "best"})
    assert row["prompt"][0]["content"] == "a" and row["reference"] == "b"
    text = refused(tmp_path, given, rubric="Kind.", columns={"prompt": "qestion"})
    assert "no such column, but task.columns names it for 'prompt'. The table has: question, best, prompt" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, r"line 2, prompt: empty"),
        ({"prompt": 7}, r"line 2, prompt: empty, or neither a text nor a list"),
        ({"prompt": [{"content": "x"}]}, r"line 2, prompt: .*chat messages with roles"),
        ({"prompt": "x", "reference": 7}, r"line 2, reference: a int, not a text"),
        ({"prompt": "x", "rubric": [1]}, r"line 2, rubric: .*valid dictionary.* A text, or"),
        ({"prompt": "x", "rubric": {"a": {"text": "A", "weight": -1}}}, r"line 2, rubric: a\.weight: .*greater"),
        ({"prompt": "x", "rubric": {"a": {"text": "A", "wieght": 1}}}, r"line 2, rubric: a\.wieght"),
        ({"prompt": "x", "rubric": {"a": {"weight": 1}}}, r"line 2, rubric: a\.text: Field required"),
        ({"prompt": "x", "rubric": {"a": "A", "b": " A "}}, r"line 2, rubric: the same text under two names"),
        ({"prompt": "x", "rubric": {"a": {"text": "A", "weight": 0}}}, r"line 2, rubric: every weight is 0"),
        ({"id": "1", "prompt": "x"}, r"line 2, id: '1' is also the id of .*line 1"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    text = refused(tmp_path, {"id": "1", "prompt": "fine"}, row, rubric="Kind.")
    assert re.search(message, text), text


def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "a"}])
    path.write_text(path.read_text() + '{"prompt": "b"\n{"prompt": NaN}\n')
    with pytest.raises(TaskError) as caught:
        judged(path, rubric="Kind.").rows("train")
    assert "2 problems" in str(caught.value) and "line 2: not JSON" in str(caught.value)


def test_a_table_without_prompt_or_rubric_is_refused_at_once(tmp_path: Path) -> None:
    text = refused(tmp_path, {"q": "a"})
    assert "prompt: no such column, nor 'messages'. The table has: q." in text
    assert "rubric: no such column, and task.rubric is not set" in text
    assert "line 2, rubric: empty, and task.rubric is not set" in refused(
        tmp_path, {"prompt": "a", "rubric": "A"}, {"prompt": "b"}
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rubric": {"a": {"text": "A", "weight": 0}}}, "every weight is 0"),
        ({"rubric": {"a": "A", "b": "A"}}, "the same text under two names"),
        ({"rubric": {"a": {"text": "A", "weight": float("nan")}}}, r"task\.rubric\.a\.weight"),
        ({"rubric": {"a": {"text": ""}}}, r"task\.rubric\.a\.text"),
        ({"rubric": 5}, r"task\.rubric"),
        ({"rubric": TWO, "judge": {"provider": "reward_model", "model": "m"}}, "2 sub-scores, but a reward model"),
        ({"judge": {"provider": "compatible", "base_url": "http://127.0.0.1:1/v1"}}, r"judge\.model is needed"),
        ({"judge": {"provider": "openia"}}, r"task\.judge\.provider"),
        ({"reward_range": (0, 0.5)}, "lies from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused_at_load(params: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task("judged", **params)


def test_the_key_that_is_missing_is_named_with_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider, key in (("gemini", "GEMINI_API_KEY"), ("openai", "OPENAI_API_KEY")):
        monkeypatch.delenv(key, raising=False)
        name = "configs/judged.yaml" if provider == "gemini" else "configs/judged_openai.yaml"
        task = load_task("judged", **load_config(name).task.params)
        assert task.env_keys() == [key]
        with pytest.raises(Exception, match=rf"(?i)no key for {provider}: the environment variable {key} is not set"):
            task.check()
    assert load_task("judged", rubric="x", judge=LOCAL).env_keys() == []


def test_the_task_is_rebuilt_from_its_own_parameters(tmp_path: Path) -> None:
    task = judged("configs/examples/judged.jsonl", rubric="Kind.")
    again = load_task("judged", **json.loads(task.model_dump_json()))
    assert again == task and list(again.rows("train")) == list(task.rows("train"))


# -- rewards ----------------------------------------------------------------------------------------------------------


def reward_of(scores: dict[str, float | None], rubric: dict[str, Any] | None = None) -> Score:
    row: Row = {"id": "r", "prompt": [], "rubric": rubric or TWO}
    unknown = Verdict("unknown", None, "judge: an empty reply")
    verdicts = {
        name: unknown if score is None else Verdict("pass" if score >= 0.5 else "fail", score, "why")
        for name, score in scores.items()
    }
    return Judged(rubric="x", judge=LOCAL).reward_of(row, verdicts)  # type: ignore[arg-type]


def test_the_reward_is_the_weighted_mean_of_the_sub_scores() -> None:
    score = reward_of({"correct": 0.5, "clear": 1.0})
    assert score.reward == pytest.approx(0.625)
    assert score.parts == {"rubric/correct": 0.5, "rubric/clear": 1.0}
    assert score.notes["verdicts"]["clear"] == {
        "verdict": "pass",
        "reasons": "why",
        "score": 1.0,
        "text": "Short words",
    }
    assert reward_of({"correct": 1.0, "clear": 1.0}).reward == 1.0 and reward_of({"correct": 0, "clear": 0}).reward == 0


def test_a_needed_score_that_is_unknown_leaves_the_answer_unscored() -> None:
    for scores in ({"correct": None, "clear": 1.0}, {"correct": 0.0, "clear": None}, {"correct": None, "clear": None}):
        score = reward_of(scores)
        assert score.reward is None and score.notes["error"] == "judge: an empty reply"
    assert reward_of({"correct": 0.2, "clear": None}).parts == {"rubric/correct": 0.2, "rubric/clear": None}


def test_a_score_of_no_weight_is_shown_but_not_needed() -> None:
    rubric = {**TWO, "style": {"text": "Style", "weight": 0.0}}
    assert reward_of({"correct": 1.0, "clear": 0.0, "style": None}, rubric).reward == 0.75
    assert "error" not in reward_of({"correct": 1.0, "clear": 0.0, "style": None}, rubric).notes


def test_the_mean_of_perfect_scores_does_not_leave_the_range() -> None:
    rubric = {str(n): {"text": str(n), "weight": 0.1 * (n + 1)} for n in range(40)}
    assert reward_of(dict.fromkeys(rubric, 1.0), rubric).reward == pytest.approx(1.0)
    assert 0 <= reward_of(dict.fromkeys(rubric, 1.0), rubric).reward <= 1  # type: ignore[operator]


# -- with a judge -----------------------------------------------------------------------------------------------------


def example(server: JudgeServer, ledger: Path, **params: Any) -> Judged:
    judge = {**LOCAL, "base_url": server.base_url, "timeout": 1.0}
    given = {"judge": judge, "ledger": str(ledger), "rubric": TWO, **params}
    return judged("configs/examples/judged.jsonl", **given)


def answers(task: Judged) -> list[tuple[Row, str]]:
    """Answers of all qualities to every row: nothing, a word, and beginnings of the references."""
    rows = list(task.rows("train"))
    texts = ["", "no", *(row["reference"][:size] for row in rows[:5] for size in (30, 1000))]
    return [(row, text) for row in rows for text in texts]


async def scores(task: Judged, asked: Sequence[tuple[Row, str]]) -> list[Score]:
    return list(await asyncio.gather(*(task.score(Rollout.of(row, text)) for row, text in asked)))


async def test_a_judge_scores_every_rubric_of_an_answer_in_one_call(server: JudgeServer, tmp_path: Path) -> None:
    task = example(server, tmp_path / "ledger.sqlite")
    asked = answers(task)
    found = await scores(task, asked)
    for (row, text), score in zip(asked, found, strict=True):
        shares = {name: round(share_of(sub["text"], text), 4) if text else 0.0 for name, sub in row["rubric"].items()}
        total = sum(sub["weight"] for sub in row["rubric"].values())
        assert score.parts == {f"rubric/{name}": share for name, share in shares.items()}
        assert score.reward == pytest.approx(sum(row["rubric"][n]["weight"] * s for n, s in shares.items()) / total)
    distinct = {(row["id"], text) for row, text in asked if text}
    assert server.stats()["requests"] == len(distinct)
    assert await scores(example(server, tmp_path / "ledger.sqlite"), asked) == found
    assert server.stats()["requests"] == len(distinct)
    body = server.stats()["bodies"][0]
    assert "use the whole range" in body["messages"][0]["content"] and "<reference-" in body["messages"][1]["content"]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.30])
async def test_a_failing_judge_changes_which_answers_are_scored_and_nothing_else(
    server: JudgeServer, tmp_path: Path, share: float
) -> None:
    clean_task = example(server, tmp_path / "clean.sqlite")
    asked = answers(clean_task)
    clean = await scores(clean_task, asked)
    server.control(faults=dict.fromkeys(FAULTS, share / len(FAULTS)), retry_after=0.02, seed=3)
    found = await scores(example(server, tmp_path / "faulty.sqlite"), asked)
    assert sum(server.stats()["faults"].values()) > 0.25 * share * len(asked) > 1
    for right, score in zip(clean, found, strict=True):
        assert score.reward is None or score.reward == right.reward
        assert (score.reward is None) == ("error" in score.notes)
    assert sum(score.reward is None for score in found) <= 0.05 * len(found)


# -- with a reward model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with random weights, and a tokenizer with a chat template."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from lib.starter import build_tokenizer

    folder = tmp_path_factory.mktemp("reward-model")
    tokenizer = build_tokenizer(
        ["user\nWhat is bread made of? Flour and water.", "assistant\nOf flour, water and salt."]
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**shape, num_key_value_heads=1, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def test_a_reward_model_is_a_judge_of_one_rubric(reward_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"id": "a", "prompt": "What is bread?", "reference": "Flour and water."},
                                        {"id": "b", "prompt": "What is bread?"}])  # fmt: skip
    judge = {"provider": "reward_model", "model": str(reward_model)}
    task = judged(path, judge=judge, rubric="Preferred by the reward model", ledger=str(tmp_path / "ledger.sqlite"))
    with_reference, without = task.rows("train")
    same = await task.score(Rollout.of(with_reference, "Flour and water."))
    assert same.reward == pytest.approx(0.5, abs=1e-5)  # as good as the reference: it is the reference
    found = [await task.score(Rollout.of(without, text)) for text in ("Flour.", "half \ud83d\0", "Water and salt.")]
    rewards = [score.reward for score in found]
    assert len(set(rewards)) == 3 and all(reward is not None and 0 < reward < 1 for reward in rewards)
    assert (await task.score(Rollout.of(without, "Flour."))).reward == rewards[0]
    assert (await task.score(Rollout.of(without, ""))).reward == 0.0


def test_a_reward_model_and_a_row_with_two_rubrics_do_not_go_together(tmp_path: Path) -> None:
    judge = {"provider": "reward_model", "model": "m"}
    text = refused(tmp_path, {"prompt": "a", "rubric": {"a": "A", "b": "B"}}, judge=judge)
    assert "line 1, rubric: 2 sub-scores, but a reward model" in text


@pytest.mark.parametrize("name", ["judged.yaml", "judged_openai.yaml", "smoke/judged.yaml"])
def test_the_shipped_configs_find_their_rows(name: str) -> None:
    config = load_config(PROJECT_ROOT / "configs" / name)
    task = load_task(config.task.name, **config.task.params)
    assert len(task.rows("train")) == 10 and len(task.rows("eval")) == 2


def test_a_column_that_is_not_read_cannot_be_mapped(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text('{"question": "a", "prompt": "not meant"}\n{"question": "b", "prompt": "nor this"}\n')
    with pytest.raises(TaskError, match=r"columns.promt: .* Did you mean 'prompt'"):
        load_task("judged", path=str(table), rubric="Good.", columns={"promt": "question"})


@pytest.mark.parametrize(
    "row, problem",
    [
        ('{"messages": [{"role": "user"}]}', "messages: a message without text"),
        ('{"messages": [{"role": "user", "content": " "}]}', "messages: a message without text"),
        ('{"messages": [{"role": "user", "content": {"text": "a"}}]}', "messages: a message without text"),
        ('{"prompt": "a", "rubric": {"x": "one", "x": "two"}}', "'x' is there twice in one object"),
        ('{"prompt": "a", "rubric": "{\\"x\\": one"}', "rubric: it begins with { and is no JSON"),
        ('{"prompt": "a", "rubric": {"x": {"text": "  "}}}', "rubric: x.text: String should have at least 1"),
        ('{"prompt": "a", "metadata": ' + "[" * 100_000 + "]" * 100_000 + "}", "brackets within brackets"),
    ],
)
def test_what_would_be_judged_as_something_else_is_refused(tmp_path: Path, row: str, problem: str) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(TaskError, match="line 2") as refused:
        load_task("judged", path=str(table), rubric="Good.").rows("train")
    assert problem in str(refused.value)


def test_a_ledger_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no ledger at all\n" * 100)
    given = {"path": "configs/examples/judged.jsonl", "rubric": "Good.", "judge": LOCAL}
    with pytest.raises(LedgerError, match="cannot be read as a ledger"):
        load_task("judged", **given, ledger=str(tmp_path / "notes.txt")).check()
    assert load_task("judged", **given, ledger=str(tmp_path / "new.sqlite")).check() == []
