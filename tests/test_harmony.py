"""Harmony: what gpt-oss models read and answer, through the template that ships with them."""

from __future__ import annotations

import csv
import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from transformers import AutoTokenizer

from lib import PROJECT_ROOT, models
from lib.config import EndpointSection, EvaluationSection, ModelSection, parse_config
from lib.endpoint import EndpointPolicy
from lib.generate import Chat, chat_of, unloaded_chat
from lib.harmony import EffortError, frozen, message_of
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
    assert message_of(text) == {"role": "assistant", "content": "[2]", "thinking": "let me see"}


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


# -- the same prompt everywhere ----------------------------------------------------------------------------------------

DAY = datetime.date(2025, 6, 30)
QUESTION = [{"role": "user", "content": "choose [0] idle or [1] charge"}]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_gpt_oss(tmp_path_factory.mktemp("harmony") / "gpt-oss", mxfp4=True)


def test_date_and_effort_of_the_config_are_in_every_prompt_and_in_every_saved_copy(
    gpt_oss: Path, tmp_path: Path
) -> None:
    settings = ModelSection(name="m", reasoning_effort="low", date=datetime.date(2024, 2, 29))
    tokenizer = models.load_tokenizer(str(gpt_oss), settings)
    rendered = Chat(tokenizer).text(QUESTION)
    assert "Current date: 2024-02-29\n\nReasoning: low\n\n" in rendered
    assert str(datetime.date.today().year) not in rendered.split("<|end|>")[0]
    tokenizer.save_pretrained(tmp_path)  # as an adapter and an export hold it
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == rendered
    assert Chat(models.load_tokenizer(str(tmp_path), settings)).text(QUESTION) == rendered
    asked = plain.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, reasoning_effort="high")
    assert asked == rendered.replace("Reasoning: low", "Reasoning: high")


def test_without_an_effort_the_template_keeps_its_own_and_only_the_date_is_frozen(gpt_oss: Path) -> None:
    rendered = Chat(models.load_tokenizer(str(gpt_oss), ModelSection(name="m"))).text(QUESTION)
    assert "Current date: 2025-06-30" in rendered and "Reasoning: medium" in rendered
    assert rendered == transformed_today(AutoTokenizer.from_pretrained(gpt_oss))


def transformed_today(tokenizer: Any) -> str:
    """What the template renders today, with its date put back."""
    text = str(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
    return re.sub(r"Current date: \d{4}-\d\d-\d\d", "Current date: 2025-06-30", text)


def test_freezing_twice_is_freezing_once_with_the_last_effort() -> None:
    from trl.chat_template_utils import gptoss_chat_template

    once = frozen(gptoss_chat_template, DAY, "high")
    assert frozen(frozen(gptoss_chat_template, DAY, "low"), DAY, "high") == once
    assert frozen(once, datetime.date(2030, 1, 1), "high") == once
    assert frozen({"default": gptoss_chat_template}, DAY, "high") == {"default": once}


def test_a_date_is_shown_in_the_templates_own_form_and_a_template_without_effort_refuses_one() -> None:
    assert frozen("Today: {{ strftime_now('%d %b %Y') }}", DAY, None) == 'Today: {{ "30 Jun 2025" }}'
    assert frozen("{{ messages }}", DAY, None) == "{{ messages }}"
    with pytest.raises(EffortError, match=r"model\.reasoning_effort low: its chat template knows no reasoning effort"):
        frozen("{{ messages }}", DAY, "low")


def test_the_policy_is_asked_and_ended_alike_with_and_without_its_weights(gpt_oss: Path) -> None:
    config = parse_config({"task": {"name": "decisions"}, "model": {"name": str(gpt_oss), "reasoning_effort": "low"}})
    chat = unloaded_chat(config, str(gpt_oss))
    loaded = chat_of(
        config,
        models.load_model(str(gpt_oss), config.model),
        models.load_tokenizer(str(gpt_oss), config.model),
    )
    assert chat.prompt_ids(QUESTION) == loaded.prompt_ids(QUESTION) and chat.end_ids == loaded.end_ids
    assert chat.end_ids >= set(chat.tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))
    assert chat.tokenizer.convert_tokens_to_ids("<|end|>") not in chat.end_ids


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("<|channel|>final <|constrain|>json<|message|>[2]<|return|>", {"content": "[2]"}),
        (
            "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
            "[1]<|return|>",
            {"content": "[1]", "thinking": "one\n\ntwo"},
        ),
        (call := "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", {"content": call}),
        (said := "<|channel|>final to=functions.f<|message|>[3]<|call|>", {"content": said}),
    ],
)
def test_channels_are_taken_apart(answer: str, message: dict[str, str]) -> None:
    assert message_of(answer) == {"role": "assistant", **message}


def test_the_effort_travels_to_whoever_is_asked() -> None:
    section = EvaluationSection(endpoint=EndpointSection(base_url="http://127.0.0.1:9/v1", model="m"))
    assert "reasoning_effort" not in EndpointPolicy(section, 8, True)._sampling
    assert EndpointPolicy(section, 8, True, effort="low")._sampling["reasoning_effort"] == "low"
