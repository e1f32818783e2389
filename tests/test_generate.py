"""What turns a model into something that answers: prompts as ids, later turns, sampling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from lib.config import EvaluationSection, SamplingSection, parse_config
from lib.generate import (
    Chat,
    TemplateError,
    batched,
    chat_of,
    check_turns,
    end_ids,
    local_sample,
    scripted,
    unloaded_chat,
    within_limit,
)
from lib.rollout import Request, collect, to_tokens
from lib.room import token_limit, within_room
from lib.starter import build_tokenizer
from lib.task import Message, Rollout, Row, Score, Task, Turn
from lib.tools import ToolsError, check_tools

TEXTS = ["system\n", "user\n", "assistant\n", "what is two plus three?", "it is five", "yes", "no, try again", "tool\n"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]

NO_NEWLINE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""

DROPS_THINKING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

OTHER_END = NO_NEWLINE.replace("<|im_end|>' }}{% endfor", "</s>' }}{% endfor")

OTHER_END_LATER = NO_NEWLINE.replace(
    "m.content + '<|im_end|>'", "m.content + ('<|im_end|>' if loop.last or m.role != 'assistant' else '</s>')"
)

END_ONLY_AT_THE_END = NO_NEWLINE + "{% if not add_generation_prompt %}{{ '\\n' + eos_token }}{% endif %}"
"""Phi-3's way: its end-of-text token follows the end of the last turn, and nothing else."""

COUNTS_MESSAGES = "{{ '<' + (messages | length | string) + '>' }}" + NO_NEWLINE


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(TEXTS * 5)


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


def with_template(tokenizer: Any, template: str) -> Chat:
    other = build_tokenizer(TEXTS * 5)
    other.chat_template = template
    return Chat(other)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer_ids(chat: Chat, text: str) -> list[int]:
    return [*chat.tokenizer.encode(text, add_special_tokens=False), chat.tokenizer.eos_token_id]


def whole(chat: Chat, messages: Sequence[Message]) -> list[int]:
    return list(chat.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def later(messages: Sequence[Message], turn: Turn | None) -> Request:
    """The request after this turn, whose message stands in `messages`."""
    said_at = next((i for i, message in enumerate(messages) if turn and message is turn.message), 0)
    return Request(messages, None, turn, said_at)


def played(chat: Chat, *texts: str) -> tuple[list[Message], Turn]:
    """Alternate user and assistant texts, the last one sampled token by token as the tokenizer would write it."""
    messages: list[Message] = [user(texts[0])]
    turn: Turn | None = None
    for i, text in enumerate(texts[1:]):
        if i % 2 == 0:
            turn = chat.turn(chat.continued_ids(later(messages, turn)), answer_ids(chat, text), None)
            messages = [*messages, turn.message]
        else:
            messages = [*messages, user(text)]
    assert turn is not None
    return messages, turn


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_prompt_ids_are_those_of_the_chat_template(chat: Chat, tools: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, user("what is two plus three?"), user("\n  é ☃ ")]
    expected = chat.tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert chat.prompt_ids(messages, tools) == list(expected)
    assert chat.prompt_ids(messages, tools) == chat.tokenizer(chat.text(messages, tools))["input_ids"]


def test_a_remembered_prompt_is_not_changed_by_its_users(chat: Chat) -> None:
    messages = [user("yes")]
    first = chat.prompt_ids(messages)
    expected = list(first)
    first.clear()
    assert chat.prompt_ids(messages) == expected
    messages[0]["content"] = "no, try again"
    assert chat.prompt_ids(messages) != expected


def test_a_first_turn_has_the_whole_prompt(chat: Chat) -> None:
    messages = [user("yes")]
    assert chat.continued_ids(Request(messages, None, None, 0)) == chat.prompt_ids(messages)
    text_only = Turn(message={"role": "assistant", "content": "it is five"})
    longer = [*messages, text_only.message, user("no, try again")]
    assert chat.continued_ids(later(longer, text_only)) == whole(chat, longer)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_decoded_without_its_end_token(chat: Chat) -> None:
    turn = chat.turn([1], answer_ids(chat, "it is five"), [-0.5] * len(answer_ids(chat, "it is five")))
    assert turn.message == {"role": "assistant", "content": "it is five"} and turn.stop == "stop"
    assert turn.prompt_ids == (1,) and turn.output_ids == tuple(answer_ids(chat, "it is five"))
    assert turn.logprobs is not None and len(turn.logprobs) == len(turn.output_ids)


@pytest.mark.parametrize("output", [[], [5], [5, 6]])
def test_an_answer_without_an_end_token_was_cut_off(chat: Chat, output: list[int]) -> None:
    assert chat.turn([1], output, None).stop == "length"


def test_any_of_several_end_tokens_ends_an_answer(tokenizer: Any) -> None:
    chat = Chat(tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert chat.turn([1], [5, tokenizer.pad_token_id], None).stop == "stop"
    assert Chat(tokenizer).turn([1], [5, tokenizer.pad_token_id], None).stop == "length"


@pytest.mark.parametrize(
    ("known", "expected"), [(None, {"eos"}), (7, {7, "eos"}), ([7, 8], {7, 8, "eos"}), ("eos", {"eos"})]
)
def test_the_models_and_the_tokenizers_end_tokens_count(tokenizer: Any, known: Any, expected: set[Any]) -> None:
    model = tiny_model(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id if known == "eos" else known)
    assert end_ids(model, tokenizer) == sorted(tokenizer.eos_token_id if end == "eos" else end for end in expected)


def test_a_tool_call_that_spells_out_half_a_character_can_be_written_down() -> None:
    from trl.chat_template_utils import add_response_schema, qwen3_chat_template

    other = build_tokenizer(TEXTS * 5)
    other.chat_template = qwen3_chat_template
    chat = Chat(add_response_schema(other))
    arguments = '{"x": "\\ud800", "\\udc00": [{"deep": "\\ud83d\\ude00 \\udfff"}], "n": NaN}'
    said = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    message = chat.turn(chat.prompt_ids([user("yes")], TOOLS), answer_ids(chat, said), None).message
    (call,) = message["tool_calls"]
    expected = {"x": "\ufffd", "\ufffd": [{"deep": "\U0001f600 \ufffd"}], "n": "nan"}
    assert call["function"] == {"name": "add", "arguments": expected}
    json.dumps(message, ensure_ascii=False, allow_nan=False).encode()


# -- later turns ------------------------------------------------------------------------------------------------------

CONVERSATIONS = [
    ("yes", "no", "yes"),
    ("what is two plus three?", "it is five", "no, try again", "yes\n\n", "\n leading", "", "after an empty answer"),
    ("<b>&amp; é ☃</b>", "  spaces  ", "user\nassistant\n", "{'a': 1}", "yes"),
]


@pytest.mark.parametrize("texts", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("template", ["starter", "no newline"])
def test_a_continued_conversation_is_the_whole_conversation_rendered(
    tokenizer: Any, texts: tuple[str, ...], template: str
) -> None:
    chat = Chat(tokenizer) if template == "starter" else with_template(tokenizer, NO_NEWLINE)
    messages, turn = played(chat, *texts)
    messages = messages if messages[-1]["role"] == "user" else [*messages, user("yes")]
    assert chat.continued_ids(later(messages, turn)) == whole(chat, messages)


def test_sampled_ids_are_kept_even_where_the_tokenizer_would_write_them_otherwise(chat: Chat) -> None:
    letters = [chat.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "yes"]
    sampled = [*letters, chat.tokenizer.eos_token_id]
    assert sampled != answer_ids(chat, "yes")  # "yes" is one token of its own
    prompt = chat.prompt_ids([user("yes")])
    turn = chat.turn(prompt, sampled, None)
    messages = [user("yes"), turn.message, user("no, try again")]
    ids = chat.continued_ids(later(messages, turn))
    assert turn.message["content"] == "yes"
    assert ids[: len(prompt) + len(sampled)] == prompt + sampled
    assert chat.tokenizer.decode(ids) == chat.text(messages)
    assert ids != whole(chat, messages)


def test_only_the_suffix_is_rendered_and_it_starts_after_the_end_token(chat: Chat) -> None:
    messages, turn = played(chat, "yes", "no")
    suffix = chat.continued_ids(later([*messages, user("yes")], turn))[
        len(turn.prompt_ids or ()) + len(turn.output_ids or ()) :
    ]
    assert chat.tokenizer.decode(suffix) == "\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"


def test_several_messages_of_the_world_are_appended_in_order(chat: Chat) -> None:
    messages, turn = played(chat, "yes", "no")
    longer = [*messages, {"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}, user("yes")]
    assert chat.continued_ids(later(longer, turn)) == whole(chat, longer)


REWRITING = {
    "drops thinking": DROPS_THINKING,
    "counts messages": COUNTS_MESSAGES,
    "another end token": OTHER_END,
    "another end token later": OTHER_END_LATER,
}


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_a_template_that_rewrites_history_is_refused_with_the_fix(tokenizer: Any, template: str) -> None:
    chat = with_template(tokenizer, template)
    messages, turn = played(chat, "yes", "<think>no</think>it is five")
    with pytest.raises(
        ValueError, match=r"rewrites earlier turns.*Use a template whose longer conversations begin with the shorter"
    ):
        chat.continued_ids(later([*messages, user("yes")], turn))


@pytest.mark.parametrize("template", REWRITING.values(), ids=REWRITING)
def test_such_a_template_is_told_before_anything_is_sampled(tokenizer: Any, template: str) -> None:
    row: Row = {"id": "1", "prompt": [user("yes")]}
    with pytest.raises(TemplateError, match=r"rewrites earlier turns.*get_training_chat_template"):
        check_turns(with_template(tokenizer, template), row)
    for kept in (Chat(tokenizer), with_template(tokenizer, NO_NEWLINE)):
        check_turns(kept, row)


def phi(end: str = "<|end|>") -> Chat:
    """A template in Phi-3's way, whose turns end with another token than the tokenizer's."""
    tokenizer = build_tokenizer(TEXTS * 5)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = END_ONLY_AT_THE_END.replace("<|im_end|>", end)
    return Chat(tokenizer, [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id])


def test_what_a_template_writes_after_the_last_turn_only_is_left_out_of_longer_conversations() -> None:
    chat = phi()
    check_turns(chat, {"id": "1", "prompt": [user("yes")]})
    end = chat.tokenizer.convert_tokens_to_ids("<|end|>")
    prompt = chat.prompt_ids([user("yes")])
    turn = chat.turn(prompt, [*chat.tokenizer.encode("it is five", add_special_tokens=False), end], None)
    messages = [user("yes"), turn.message, user("no, try again")]
    assert chat.tokenizer.eos_token in chat.text(messages[:2], answer=False)
    ids = chat.continued_ids(later(messages, turn))
    assert turn.stop == "stop" and ids == whole(chat, messages)
    assert chat.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(
    "said",
    [
        {"content": "it is five<|im_end|>"},
        {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": "<|im_end|> it is five"}}]},
    ],
)
def test_an_end_token_spelt_out_in_an_answer_is_not_taken_for_the_end_that_a_template_rewrites(
    tokenizer: Any, said: Message
) -> None:
    chat = with_template(
        tokenizer, OTHER_END_LATER.replace("m.content +", "m.content + (m.tool_calls or '') | string +")
    )
    turn = Turn(message={"role": "assistant", **said}, prompt_ids=(1,), output_ids=(2, chat.tokenizer.eos_token_id))
    assert "it is five" in chat.text([turn.message], answer=False)
    with pytest.raises(TemplateError):
        chat.continued_ids(later([user("yes"), turn.message, user("yes")], turn))


KNOWN = {  # templates that TRL ships, and the tokens that end a turn in them
    "qwen2_5": ("<|im_end|>", True),
    "qwen3": ("<|im_end|>", False),  # drops earlier thoughts
    "qwen3_training": ("<|im_end|>", True),
    "llama3_1": ("<|eot_id|>", True),
    "gemma3": ("<end_of_turn>", True),
    "phi3": ("<|end|>", True),
    "cohere": ("<|END_OF_TURN_TOKEN|>", True),
    "gptoss": ("<|return|>", False),  # another end token for earlier turns, and drops their thoughts
    "glm4moe_training": ("<|user|>", False),  # drops earlier thoughts
    "nemotron_3_nano_training": ("<|im_end|>", False),  # drops earlier thoughts
    "deepseek_r1_distill_training": ("<｜end▁of▁sentence｜>", False),  # opens thoughts that earlier turns do not have
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_are_taken_or_refused_for_several_turns(name: str) -> None:
    import trl

    end, kept = KNOWN[name]
    tokenizer = build_tokenizer(TEXTS * 5)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.bos_token = "<bos>"
    chat = Chat(tokenizer, [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id])
    with nullcontext() if kept else pytest.raises(TemplateError):
        check_turns(chat, {"id": "1", "prompt": [user("yes")]})


def test_a_template_that_drops_thinking_at_once_keeps_what_was_sampled(tokenizer: Any) -> None:
    chat = with_template(tokenizer, DROPS_THINKING.replace(" and not loop.last", ""))
    check_turns(chat, {"id": "1", "prompt": [user("yes")]})
    messages, turn = played(chat, "yes", "<think>no</think>it is five")
    ids = chat.continued_ids(later([*messages, user("yes")], turn))
    known = [*(turn.prompt_ids or ()), *(turn.output_ids or ())]
    assert ids[: len(known)] == known and "<think>no</think>" in chat.tokenizer.decode(ids)


def test_a_world_that_repeats_the_policys_words_is_not_taken_for_it(chat: Chat) -> None:
    def sample(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
        return [answer_ids(chat, "yes") for _ in prompts], None

    class Echo(Game, frozen=True):
        async def reply(self, rollout: Rollout) -> list[Message]:
            echo = [user("no, try again"), {"role": "assistant", "content": "yes"}, user("it is five")]
            return echo if len(rollout.turns) < 2 else []

    (scored,) = collect(Echo(), [{"id": "1", "prompt": [user("no")]}], batched(chat, sample))
    tokens = to_tokens(scored.rollout)
    rendered = chat.text(scored.rollout.messages, answer=False).removesuffix("\n")
    assert chat.tokenizer.decode(tokens.prompt_ids + tokens.output_ids) == rendered


def test_an_answer_that_ended_with_the_other_end_token_can_be_continued(tokenizer: Any) -> None:
    chat = Chat(tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    prompt = chat.prompt_ids([user("yes")])
    sampled = [*answer_ids(chat, "no")[:-1], tokenizer.pad_token_id]
    turn = chat.turn(prompt, sampled, None)
    assert turn.stop == "stop"
    ids = chat.continued_ids(later([user("yes"), turn.message, user("yes")], turn))
    assert ids[: len(prompt) + len(sampled)] == prompt + sampled
    assert (
        tokenizer.decode(ids[len(prompt) + len(sampled) :])
        == "\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_world_that_speaks_as_assistant_is_heard(chat: Chat) -> None:
    messages, turn = played(chat, "yes", "no")
    longer = [*messages, user("no, try again"), {"role": "assistant", "content": "it is five"}, user("yes")]
    assert chat.continued_ids(later(longer, turn)) == whole(chat, longer)


class Game(Task, frozen=True):
    max_turns: int = 4

    async def reply(self, rollout: Rollout) -> list[Message]:
        return [user("no, try again")] if len(rollout.turns) < rollout.row["turns"] else []

    async def score(self, rollout: Rollout) -> Score:
        return Score(reward=1.0)


def test_lockstep_rollouts_of_several_turns_are_one_token_sequence_each(chat: Chat) -> None:
    def sample(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        outputs = [answer_ids(chat, "it is five" if len(prompt) % 2 else "yes") for prompt in prompts]
        return outputs, [[-0.1] * len(output) for output in outputs]

    rows: list[Row] = [{"id": str(i), "prompt": [user("yes " * i)], "turns": 1 + i % 3} for i in range(6)]
    for scored in collect(Game(), rows, batched(chat, sample)):
        tokens = to_tokens(scored.rollout)
        assert tokens.logprobs is not None and len(tokens.logprobs) == len(tokens.mask)
        rendered = chat.text(scored.rollout.messages, answer=False).removesuffix("\n")  # the newline is not sampled
        assert chat.tokenizer.decode(tokens.prompt_ids + tokens.output_ids) == rendered
        trained = [token for token, mask in zip(tokens.output_ids, tokens.mask, strict=True) if mask]
        assert trained == [token for turn in scored.rollout.turns for token in turn.output_ids or ()]


def test_a_sampler_that_loses_an_answer_is_an_error(chat: Chat) -> None:
    with pytest.raises(ValueError, match="shorter"):
        batched(chat, lambda prompts: ([[5]], None))([Request([user("yes")], None, None, 0)] * 2)


# -- tools ------------------------------------------------------------------------------------------------------------

SHOWS_TOOLS = "{% for tool in tools or [] %}{{ tool.function | tojson }}\n{% endfor %}" + NO_NEWLINE
SHOWS_ONE = SHOWS_TOOLS.replace("in tools or []", "in (tools or [])[:1]")
SHOWS_BESIDE_A_SYSTEM_MESSAGE = "{% if messages[0].role == 'system' %}" + SHOWS_TOOLS.replace(
    NO_NEWLINE, "{% endif %}" + NO_NEWLINE
)
REFUSES = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + NO_NEWLINE
MORE_TOOLS = [*TOOLS, {"type": "function", "function": {"name": "subtract", "parameters": {"type": "object"}}}]


def tool_row(tools: Any, *system: Message, asks: str = "please add") -> Row:
    return {"id": "r7", "prompt": [*system, user(asks)], "tools": tools}


@pytest.mark.parametrize(
    ("template", "rows", "told"),
    [
        (NO_NEWLINE, [tool_row(TOOLS)], r"row r7: the chat template leaves out the row's tools \(add\)"),
        (SHOWS_ONE, [tool_row(TOOLS), tool_row(MORE_TOOLS)], r"does not name all of the row's tools \(subtract\)"),
        (SHOWS_ONE, [tool_row(MORE_TOOLS, asks="please subtract")], r"does not name all .* \(subtract\)"),
        (
            SHOWS_BESIDE_A_SYSTEM_MESSAGE,
            [tool_row(TOOLS, {"role": "system", "content": "be brief"}), tool_row(TOOLS)],
            "leaves out the row's tools",
        ),
        (REFUSES, [tool_row(TOOLS)], r"refuses the row's tools \(no tools here\)"),
    ],
)
def test_a_template_that_does_not_show_the_tools_is_refused_with_the_fix(
    tokenizer: Any, template: str, rows: list[Row], told: str
) -> None:
    chat = with_template(tokenizer, template)
    with pytest.raises(ToolsError, match=f"{told}.* asked blind. Set task.prompting: text.* or model.name"):
        check_tools(chat, rows)


@pytest.mark.parametrize("template", [NO_NEWLINE, REFUSES, SHOWS_TOOLS, None])
def test_rows_without_tools_and_templates_that_show_them_pass(tokenizer: Any, template: str | None) -> None:
    chat = with_template(tokenizer, template) if template else Chat(tokenizer)
    without = [{"id": "1", "prompt": [user("yes")]}, tool_row([]), tool_row(None)]
    assert check_tools(chat, without) is False
    if template in (SHOWS_TOOLS, None):
        assert check_tools(chat, [*without, tool_row(TOOLS), tool_row(MORE_TOOLS)]) is True


# -- room for tokens --------------------------------------------------------------------------------------------------


def test_the_room_is_vllms_own_length_where_it_samples_and_else_the_models() -> None:
    shape = Qwen2Config(max_position_embeddings=256)
    vllm = {"engine": "vllm", "vllm": {"max_length": 4096}}
    assert token_limit(SamplingSection(), shape) == 256
    assert token_limit(SamplingSection.model_validate(vllm), shape) == 4096
    assert token_limit(SamplingSection.model_validate({"engine": "vllm"}), shape) == 256
    assert token_limit(SamplingSection.model_validate({**vllm, "engine": "hf"}), shape) == 256
    assert token_limit(SamplingSection(), PreTrainedConfig()) is None


def told_answers(chat: Chat, seen: list[list[int]]) -> Any:
    """A sampler that always says the same, with log-probabilities, and notes what it was asked."""

    def sample(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        seen.extend(prompts)
        output = answer_ids(chat, "it is five")
        return [output for _ in prompts], [[-float(i) for i in range(len(output))] for _ in prompts]

    return sample


def test_no_conversation_gets_longer_than_it_may_be(tokenizer: Any) -> None:
    """Whatever the limit, all rollouts are beginnings of the one without it, tokens, masks and log-probabilities."""
    rows: list[Row] = [{"id": str(i), "prompt": [user("yes " * i)], "turns": 3} for i in range(3)]
    free = [
        to_tokens(s.rollout) for s in collect(Game(), rows, batched(Chat(tokenizer), told_answers(Chat(tokenizer), [])))
    ]
    first, longest = len(free[2].prompt_ids) + 1, max(len(t.prompt_ids) + len(t.output_ids) for t in free)
    stops = set()
    for limit in range(first, longest + 2):
        chat, seen = Chat(tokenizer, token_limit=limit), []
        for whole_one, scored in zip(free, collect(Game(), rows, batched(chat, told_answers(chat, seen))), strict=True):
            rollout, tokens = scored.rollout, to_tokens(scored.rollout)
            kept = len(tokens.output_ids)
            assert len(tokens.prompt_ids) + kept <= limit and scored.score.reward == 1.0
            assert tokens == (whole_one.prompt_ids, *(part[:kept] for part in whole_one[1:]))
            assert tokens.mask[-1] == 1 and rollout.messages[-1] == rollout.turns[-1].message
            is_whole = kept == len(whole_one.output_ids)
            assert rollout.stop == ("done" if is_whole else "length")
            stops.add((rollout.stop, rollout.turns[-1].stop))
        assert max(map(len, seen)) < limit
    assert stops == {("done", "stop"), ("length", "stop"), ("length", "length")}


def test_prompts_without_room_for_an_answer_are_left_out_with_a_warning(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Row] = [{"id": str(i), "prompt": [user("yes " * i)]} for i in range(12)]
    lengths = [len(Chat(tokenizer).prompt_ids(row["prompt"])) for row in rows]
    with caplog.at_level("WARNING"):
        kept = within_limit(rows, Chat(tokenizer, token_limit=lengths[8]), lengths[10])
        assert kept == [i for i, length in enumerate(lengths) if length < lengths[8]]
        assert "3 prompts are within sampling.prompt_limit" in caplog.text and str(lengths[8]) in caplog.text
        caplog.clear()
        assert within_limit(rows, Chat(tokenizer, token_limit=lengths[8]), lengths[3]) == [0, 1, 2, 3]
    assert caplog.text == ""


def test_the_chat_of_a_policy_is_the_same_with_and_without_its_weights(
    model: Any, tokenizer: Any, tmp_path: Any
) -> None:
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.pad_token_id])
    for saved in ("with its generation config", "without"):
        model.save_pretrained(tmp_path / saved)
        tokenizer.save_pretrained(tmp_path / saved)
    (tmp_path / "without" / "generation_config.json").unlink()
    config = parse_config({"task": {"name": "decisions"}})
    loaded, unloaded = (
        chat_of(config, model, tokenizer),
        unloaded_chat(config, str(tmp_path / "with its generation config")),
    )
    assert loaded.end_ids == unloaded.end_ids == {tokenizer.pad_token_id, tokenizer.eos_token_id}
    assert loaded.token_limit == unloaded.token_limit == 256
    assert unloaded_chat(config, str(tmp_path / "without")).end_ids == {tokenizer.eos_token_id}
    assert loaded.text([user("yes")]) == unloaded.text([user("yes")])


# -- sampling from a local model --------------------------------------------------------------------------------------


def tiny_model(tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **shape)
    )
    model.generation_config = GenerationConfig()
    return model.double().eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Qwen2ForCausalLM:
    return tiny_model(tokenizer)


PROMPTS = ["yes", "what is two plus three?", "no, try again", "it is five yes no " * 4, "é"]


def sampled(
    model: Any, chat: Chat, batch: int, limit: int = 12, greedy: bool = True, temperature: float = 1.0
) -> list[list[int]]:
    settings = EvaluationSection(batch=batch, temperature=temperature)
    outputs, logprobs = local_sample(model, chat, settings, limit, greedy)(
        [chat.prompt_ids([user(text)]) for text in PROMPTS]
    )
    assert logprobs is None
    return outputs


def test_batches_answer_like_one_by_one(model: Any, chat: Chat) -> None:
    alone = sampled(model, chat, batch=1)
    assert len(alone) == len(PROMPTS) and len({tuple(output) for output in alone}) > 1
    for batch in (2, 3, 5, 64):
        assert sampled(model, chat, batch) == alone


def test_answers_stop_at_the_first_of_the_end_tokens_and_keep_it(model: Any, tokenizer: Any) -> None:
    unending = sampled(model, Chat(tokenizer), batch=1)
    ends = {unending[0][3], unending[1][5]}
    chat = Chat(tokenizer, sorted(ends))
    for free, output in zip(unending, sampled(model, chat, batch=3), strict=True):
        stop = next((i for i, token in enumerate(free) if token in ends), len(free) - 1)
        assert output == free[: stop + 1]
        assert chat.turn([1], output, None).stop == ("stop" if output[-1] in ends else "length")


def test_an_answer_is_never_longer_than_the_limit(model: Any, chat: Chat) -> None:
    assert {len(output) for output in sampled(model, chat, batch=2, limit=4)} == {4}


def test_padding_with_the_end_token_does_not_end_answers_early(model: Any, tokenizer: Any) -> None:
    other = build_tokenizer(TEXTS * 5)
    other.pad_token = other.eos_token
    assert sampled(model, Chat(other), batch=5) == sampled(model, Chat(tokenizer), batch=1)


def test_sampling_follows_torchs_seed_and_its_temperature(model: Any, chat: Chat) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampled(model, chat, batch=5, greedy=False, temperature=2.0))
    assert drawn[0] == drawn[1] != drawn[2]
    assert sampled(model, chat, batch=5, greedy=False, temperature=1e-4) == sampled(model, chat, batch=5)


def test_no_prompts_are_no_answers(model: Any, chat: Chat) -> None:
    assert local_sample(model, chat, EvaluationSection(), 4, True)([]) == ([], None)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_no_position_beyond_the_room_is_computed_and_each_answer_has_all_of_its_own(
    model: Any, tokenizer: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Chat(tokenizer).prompt_ids([user(text)]) for text in PROMPTS]
    free = sampled(model, Chat(tokenizer), batch=1, limit=40)
    seen: list[int] = []
    forward = type(model.model.rotary_emb).forward

    def watched(self: Any, x: Any, position_ids: Any) -> Any:
        seen.append(int(position_ids.max()))
        return forward(self, x, position_ids)

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", watched)
    limit = max(map(len, prompts)) + 3
    chat = Chat(tokenizer, token_limit=limit)
    outputs = sampled(model, chat, batch, limit=40)
    assert outputs == [output[: limit - len(prompt)] for prompt, output in zip(prompts, free, strict=True)]
    assert {len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True)} == {limit}
    assert max(seen) <= limit - 1


def test_an_engine_is_asked_once_where_there_is_room_for_whole_answers() -> None:
    asked: list[tuple[int, int]] = []

    def ask(prompts: list[list[int]], most: int) -> list[list[int]]:
        asked.append((len(prompts), most))
        return [[7] * (most - 1) + [9] if prompt[0] else [7] * most for prompt in prompts]

    def room(ids: Sequence[int]) -> int:
        return 10 - len(ids)

    sample = within_room(ask, 4, room, {9})
    assert sample([[1] * 6, [0] * 3]) == ([[7, 7, 7, 9], [7] * 4], None) and asked == [(2, 4)]
    asked.clear()
    assert sample([[0] * 8, [0] * 7, [1] * 3])[0] == [[7, 7], [7, 7, 7], [7, 9]] and asked == [(3, 2), (1, 1)]
    assert sample([]) == ([], None)


# -- scripted ---------------------------------------------------------------------------------------------------------


def test_scripted_replies_come_in_turn_and_start_over() -> None:
    generate = scripted("one", {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]})
    turns = [asyncio.run(generate([user("?")], None)) for _ in range(3)]
    assert [turn.message.get("content") for turn in turns] == ["one", None, "one"]
    assert turns[1].message["tool_calls"] == [{"id": "1"}] and turns[0].prompt_ids is None
