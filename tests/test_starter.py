"""The starter policy: what is built, what is cached, and that its tokenizer is the same wherever it is loaded."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.starter import CHAT_TEMPLATE, StarterError, build_starter, build_tokenizer, starter_path
from lib.task import Row

COLOURS = ("red", "green", "blue")
MENU = "choose [0] red [1] green [2] blue"
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": f"hour 07 level 3 values 7 5 12 {MENU}"},
    {"role": "assistant", "content": "the level is 3 so [1]"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"hour": 7}}}]},
    {"role": "tool", "content": "cloudy\n"},
    {"role": "assistant", "content": "then [2]"},
]


def colour_rows(count: int = 240, demonstrated: bool = True) -> list[Row]:
    draw = random.Random(7)
    rows: list[Row] = []
    for number in range(count):
        level, values = draw.randrange(6), " ".join(str(draw.randrange(1, 13)) for _ in range(6))
        best, shown = draw.randrange(3), draw.randrange(3)
        row: Row = {
            "id": f"row-{number}",
            "prompt": [
                {"role": "user", "content": f"hour {draw.randrange(24):02d} level {level} values {values} {MENU}"}
            ],
            "gold": [{"role": "assistant", "content": f"the level is {level} so [{best}]"}],
        }
        if demonstrated:
            row["demonstration"] = [{"role": "assistant", "content": f"the level is {level} so [{shown}]"}]
        rows.append(row)
    return rows


def sample_texts() -> list[str]:
    prompts = [row["prompt"][0]["content"] for row in colour_rows(60)]
    odd = [
        "",
        " ",
        "\n\n",
        "a  b\t c \n",
        "höher als 12,5 °C – ok? 日本語 🙂",
        "e\u0301 \u00e9",
        "<|im_end|>x<|im_start|>",
    ]
    glued = ["hours 071 co2 levels33", "[0][1] [2]]", "HOUR 07", "so [3]so", "I'm we'll don't", "1234567890 3.14 -7"]
    return [*prompts, *odd, *glued, *(f"{prompt}\n{text}" for prompt, text in zip(prompts, odd + glued, strict=False))]


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_starter(colour_rows(), tmp_path_factory.mktemp("starter") / "qwen2", steps=60, batch_size=16)


@pytest.fixture(scope="module")
def in_memory() -> Any:
    from lib.starter import StarterSettings, _conversations, _texts

    return build_tokenizer(_texts(_conversations(colour_rows(), StarterSettings())))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_same_tokenizer(loaded: Any, expected: Any) -> None:
    for text in sample_texts():
        assert loaded(text)["input_ids"] == expected(text)["input_ids"], text
    facts = ("eos_token_id", "pad_token_id", "bos_token_id", "all_special_tokens", "padding_side", "chat_template")
    assert {name: getattr(loaded, name) for name in facts} == {name: getattr(expected, name) for name in facts}
    assert len(loaded) == len(expected)


# The tokenizer


def test_auto_tokenizer_reads_the_very_tokenizer_that_was_built(starter: Path, in_memory: Any) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(starter)
    assert type(loaded).__name__ == "Qwen2Tokenizer"
    assert_same_tokenizer(loaded, in_memory)


def test_the_generic_class_reads_the_same_ids(starter: Path, in_memory: Any) -> None:
    """Tools that trust the file instead of the model type see the same ids: the class no longer matters."""
    from transformers import PreTrainedTokenizerFast

    assert_same_tokenizer(PreTrainedTokenizerFast.from_pretrained(starter), in_memory)


def test_auto_tokenizer_still_swaps_the_class_of_a_home_made_tokenizer(
    starter: Path, in_memory: Any, tmp_path: Path
) -> None:
    """The trap itself, so that the two tests above are known to be able to fail."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer.from_str(in_memory.backend_tokenizer.to_str())
    backend.pre_tokenizer = None  # any other way to cut than Qwen2's
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path)
    AutoConfig.from_pretrained(starter).save_pretrained(tmp_path)
    swapped, as_saved = AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert type(swapped).__name__ == "Qwen2Tokenizer"
    differing = [text for text in sample_texts() if swapped(text)["input_ids"] != as_saved(text)["input_ids"]]
    assert differing, "AutoTokenizer keeps a foreign pre-tokenizer now: the starter's tokenizer could be simpler"
    with pytest.raises(AssertionError):
        assert_same_tokenizer(swapped, as_saved)


def test_decoding_gives_the_text_back(in_memory: Any) -> None:
    import unicodedata

    for text in sample_texts():
        assert in_memory.decode(in_memory(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_prompts_and_answers_are_short(in_memory: Any) -> None:
    row = colour_rows()[0]
    prompt = in_memory.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert len(in_memory(prompt)["input_ids"]) <= 22
    assert len(in_memory(row["gold"][0]["content"])["input_ids"]) <= 4


def test_special_tokens_are_chatml(in_memory: Any) -> None:
    assert (in_memory.eos_token, in_memory.pad_token, in_memory.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert len({in_memory.eos_token_id, in_memory.pad_token_id, in_memory.convert_tokens_to_ids("<|im_start|>")}) == 3


# The chat template


def test_a_longer_conversation_starts_with_the_shorter_one(in_memory: Any) -> None:
    for tools in (None, [{"type": "function", "function": {"name": "look"}}]):
        for end in range(1, len(CONVERSATION) + 1):
            shorter = in_memory.apply_chat_template(CONVERSATION[:end], tools=tools, tokenize=False)
            assert in_memory.apply_chat_template(CONVERSATION, tools=tools, tokenize=False).startswith(shorter)
            open_ended = in_memory.apply_chat_template(
                CONVERSATION[:end], tools=tools, tokenize=False, add_generation_prompt=True
            )
            assert open_ended == shorter + "<|im_start|>assistant\n"


def test_the_template_renders_chatml(in_memory: Any) -> None:
    rendered = in_memory.apply_chat_template(CONVERSATION, tokenize=False)
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhour 07 ")
    assert '<tool_call>\n{"name": "look", "arguments": {"hour": 7}}\n</tool_call><|im_end|>\n' in rendered
    assert "<|im_start|>tool\ncloudy\n<|im_end|>\n<|im_start|>assistant\nthen [2]<|im_end|>\n" in rendered


def test_the_template_marks_what_the_assistant_wrote(in_memory: Any) -> None:
    encoded = in_memory.apply_chat_template(
        CONVERSATION[:3], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine]
    assert in_memory.decode(kept) == "the level is 3 so [1]<|im_end|>"


# The warm start


def test_the_warm_start_teaches_the_format(starter: Path) -> None:
    assert all("the level is" in text and "so [" in text for _, text in greedy_answers(starter))


def greedy_answers(folder: Path, count: int = 6) -> list[tuple[list[int], str]]:
    """(new token ids, text) of the greedy answers of Hugging Face's generate, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for row in colour_rows()[:count]:
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(text, return_tensors="pt")
        output = model.generate(**encoded, max_new_tokens=12, do_sample=False)
        new = output[0, encoded["input_ids"].shape[1] :].tolist()
        answers.append((new, tokenizer.decode(new, skip_special_tokens=True)))
    return answers


def test_the_same_seed_gives_identical_weights_and_another_seed_others(tmp_path: Path) -> None:
    import torch

    settings = {"steps": 4, "batch_size": 8, "max_rows": 64}
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = build_starter(colour_rows(), tmp_path / "first", **settings)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state was moved"
    torch.rand(5)
    again = build_starter(colour_rows(), tmp_path / "again", **settings)
    other = build_starter(colour_rows(), tmp_path / "other", **settings, seed=1)
    assert weights(first) == weights(again) != weights(other)


def test_rows_without_a_demonstration_show_their_gold_or_another_rows() -> None:
    from lib.starter import StarterSettings, _conversations

    rows = colour_rows(400, demonstrated=False)
    answers = [conversation["answer"] for conversation in _conversations(rows, StarterSettings())]
    golds = [row["gold"][0] for row in rows]
    own = sum(answer == gold for answer, gold in zip(answers, golds, strict=True)) / len(rows)
    # 30 % their own, and of the others one in 18 equals it by chance: there are 18 different answers.
    assert 0.25 < own < 0.45
    assert all(answer in golds for answer in answers)
    only_own = _conversations(rows, StarterSettings(gold_share=1.0))
    assert [conversation["answer"] for conversation in only_own] == golds


def test_demonstrations_are_imitated_where_there_are_any() -> None:
    from lib.starter import StarterSettings, _conversations

    rows = colour_rows(50)
    answers = [conversation["answer"] for conversation in _conversations(rows, StarterSettings())]
    assert answers == [row["demonstration"][0] for row in rows]


def test_where_no_row_has_an_answer_passages_of_the_prompts_are_imitated() -> None:
    from lib.starter import StarterSettings, _conversations

    texts = [f"Buy {n} apples. Say which. Why? Name the shop." for n in range(20)]
    rows = [{"id": str(n), "prompt": [{"role": "user", "content": text}]} for n, text in enumerate(texts)]
    answers = [str(one["answer"]["content"]) for one in _conversations(rows, StarterSettings())]
    assert all(any(answer and answer in text for text in texts) for answer in answers)
    assert len(set(answers)) > 5


def test_rows_with_no_answer_are_refused_by_name(tmp_path: Path) -> None:
    bare = {"id": "r1", "prompt": [{"role": "user", "content": "x"}]}
    with pytest.raises(StarterError, match=r"row 'r1' has no assistant message"):
        build_starter([*colour_rows(40), bare], tmp_path / "starter", gold_share=1.0)
    with pytest.raises(StarterError, match="no rows"):
        starter_path([], tmp_path)
    assert list(tmp_path.iterdir()) == []


# The cache


def test_a_second_call_does_not_build_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 1, "batch_size": 4, "max_rows": 32}
    first = starter_path(colour_rows(), tmp_path, **settings)
    monkeypatch.setattr("lib.starter._build_into", lambda *_: pytest.fail("built again"))
    assert starter_path(colour_rows(), tmp_path, **settings) == first
    # Rows beyond max_rows are not used, so they do not count.
    assert starter_path(colour_rows()[:32], tmp_path, **settings) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_other_settings_or_rows_make_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.starter._build_into", lambda folder, *_: (folder / "starter.json").write_text("{}"))
    variants: list[dict[str, Any]] = [{}, {"seed": 1}, {"steps": 7}, {"kind": "qwen3"}, {"max_rows": 100}]
    folders = {starter_path(colour_rows(), tmp_path, **variant) for variant in variants}
    folders.add(starter_path(colour_rows(demonstrated=False), tmp_path))
    monkeypatch.setattr("lib.starter.RECIPE", 10_000)
    folders.add(starter_path(colour_rows(), tmp_path))
    assert len(folders) == len(variants) + 2


def test_a_killed_build_leaves_nothing_that_counts_as_built(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, 'tests'); import lib.starter as starter\n"
        "from test_starter import colour_rows\n"
        "def die(folder, *_): (folder / 'starter.json').write_text('{}'); os.kill(os.getpid(), 9)\n"
        "starter._build_into = die\n"
        f"starter.starter_path(colour_rows(), Path({str(tmp_path)!r}), steps=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, env=environment).returncode == -9
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".unfinished-")] == []
    folder = starter_path(colour_rows(), tmp_path, steps=1, batch_size=4, max_rows=32)
    assert (folder / "model.safetensors").is_file()


def test_a_failed_build_leaves_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lib.starter._build_into", fail)
    with pytest.raises(OSError, match="No space left"):
        starter_path(colour_rows(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_building_prints_nothing_and_logs_plain_lines(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("lib"), "handlers", [])  # a test before this one may have opened a run
    monkeypatch.setattr(logging.getLogger("lib"), "propagate", True)
    with caplog.at_level("INFO", logger="lib.starter"):
        build_starter(colour_rows(), tmp_path / "starter", steps=2, batch_size=4, max_rows=32)
    assert capfd.readouterr() == ("", "")
    assert "starter: warm start step 2/2 loss" in caplog.text


def test_importing_the_module_loads_no_framework() -> None:
    check = "import sys, lib.starter; assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=PROJECT_ROOT, check=True)


# Through the tools that load it


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_trl_trains_it_from_the_folder_and_peft_loads_the_adapter(
    kind: str, starter: Path, in_memory: Any, tmp_path: Path
) -> None:
    from datasets import Dataset
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    folder = starter if kind == "qwen2" else build_starter(colour_rows(), tmp_path / kind, kind=kind, steps=1)
    seen: list[str] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(len(completion[0]["content"]) % 5) for completion in completions]

    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=12,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in colour_rows()[:16]]),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert_same_tokenizer(trainer.processing_class, in_memory)
    trainer.train()
    assert len(seen) == 8
    adapter = tmp_path / "adapter"
    trainer.save_model(str(adapter))
    assert_same_tokenizer(AutoTokenizer.from_pretrained(adapter), in_memory)
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert loaded.get_input_embeddings().num_embeddings == len(in_memory)


@pytest.fixture(scope="module")
def engine(starter: Path) -> Iterator[Any]:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        os.environ.setdefault(name, value)
    import torch
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and not torch.cuda.is_available():
        pytest.skip("the CUDA build of vLLM is installed and there is no GPU: it cannot run here")
    yield vllm.LLM(str(starter), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)


def test_vllm_reads_the_same_ids_and_template(engine: Any, starter: Path, in_memory: Any) -> None:
    assert_same_tokenizer(engine.get_tokenizer(), in_memory)


def test_vllm_answers_token_for_token_as_hugging_face_does(engine: Any, starter: Path, in_memory: Any) -> None:
    from vllm import SamplingParams

    chats = [row["prompt"] for row in colour_rows()[:6]]
    outputs = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    for chat, output, (ids, text) in zip(chats, outputs, greedy_answers(starter), strict=True):
        prompt = in_memory.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert output.prompt_token_ids == in_memory(prompt)["input_ids"]
        assert list(output.outputs[0].token_ids) == ids
        assert output.outputs[0].text == text


def test_the_template_in_the_folder_is_the_modules(starter: Path) -> None:
    assert (starter / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
