"""Harmony: what gpt-oss models read and answer, through the template that ships with them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.generate import Chat, harmony_message
from lib.preflight import score_one
from lib.task import Rollout, load_task

SPECIAL = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]


@pytest.fixture(scope="module")
def chat() -> Chat:
    """A small tokenizer with gpt-oss's own chat template and special tokens."""
    from trl.chat_template_utils import gptoss_chat_template

    from lib.starter import build_tokenizer

    tokenizer: Any = build_tokenizer(["choose [0] idle or [1] charge", "analysis final user assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": "<|return|>"})
    tokenizer.chat_template = gptoss_chat_template
    return Chat(tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>")])


def test_a_legacy_prompt_becomes_a_harmony_conversation(chat: Chat) -> None:
    rendered = chat.text([{"role": "user", "content": "choose [0] idle or [1] charge"}])
    assert rendered.startswith("<|start|>system<|message|>") and "Reasoning: medium" in rendered
    assert rendered.endswith("<|start|>user<|message|>choose [0] idle or [1] charge<|end|><|start|>assistant")


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        (
            "<|channel|>analysis<|message|>[1] or [2]<|end|><|start|>assistant<|channel|>final<|message|>[0]<|return|>",
            0.0,
        ),
        ("<|channel|>final<|message|>[3]<|return|>", 3.0),
        ("<|channel|>analysis<|message|>it must be [1]<|end|>", None),
        ("<|channel|>analysis<|message|>it must be [1]", None),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>[1]", None),
        ("<|channel|>final<|message|>[1] [2]<|return|>", None),
    ],
)
def test_only_a_finished_final_channel_answers(chat: Chat, answer: str, chosen: float | None) -> None:
    output = chat.tokenizer.encode(answer, add_special_tokens=False)
    task = load_task("decisions", tau=1.0, generate_rows=40)
    row = task.rows("train")[0]
    turn = chat.turn([1], output, None)
    rollout = Rollout(
        row=row,
        messages=(*row["prompt"], turn.message),
        turns=(turn,),
        stop="length" if turn.stop == "length" else "done",
    )
    score = score_one(task, rollout)
    assert score.parts.get("chosen") == chosen and score.masked == (chosen is None)


def test_thinking_is_kept_apart_from_the_answer() -> None:
    text = "<|channel|>analysis<|message|>let me see<|end|><|start|>assistant<|channel|>final<|message|>[2]<|return|>"
    assert harmony_message(text) == {"role": "assistant", "content": "[2]", "thinking": "let me see"}


def test_the_converted_table_holds_rendered_prompts_and_rewards_and_reads_back(chat: Chat, tmp_path: Path) -> None:
    task = load_task("decisions", tau=1.0, path="configs/examples/decisions.csv")
    (written,) = task.write_tables(tmp_path, chat.text)
    assert written.name == "decisions_harmony.csv"
    records = list(csv.DictReader(written.open(encoding="utf-8")))
    assert len(records) == 12 and all("<|start|>user<|message|>" in record["prompt"] for record in records)
    for record in records:
        assert sum(float(record[f"reward_action_{a}"]) for a in range(4)) == pytest.approx(1.0)
    again = load_task("decisions", tau=1.0, path=str(written))
    assert [row["prompt"] for row in again.rows("train")] == [row["prompt"] for row in task.rows("train")]


def test_the_shipped_harmony_example_is_the_plain_one_rendered() -> None:
    plain = load_task("decisions", tau=1.0, path="configs/examples/decisions.csv")
    harmony = load_task("decisions", tau=1.0, path=str(PROJECT_ROOT / "configs/examples/harmony/decisions_harmony.csv"))
    assert [row["q"] for row in plain.rows("train")] == [row["q"] for row in harmony.rows("train")]
    assert [row["prompt"] for row in plain.rows("eval")] == [row["prompt"] for row in harmony.rows("eval")]
