"""The memory estimate: counted parameters, held against real passes, and what it says where it does not fit."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT, memory, models
from lib.config import Config, load_config, parse_config
from lib.memory.__main__ import main
from lib.models.quantized import stored_bytes

GPT_OSS_20B = {
    "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880,
    "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 201088, "sliding_window": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
"""As openai/gpt-oss-20b publishes them."""


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(**GPT_OSS_20B)


def settings(**sections: Any) -> Config:
    return parse_config({"task": {"name": "decisions"}, **sections})


def test_gpt_oss_20b_has_the_parameters_and_sizes_that_its_card_says() -> None:
    counts = models.counts_of(gpt_oss())
    assert counts.total == pytest.approx(20.9e9, rel=0.01)
    # By hand: 24 layers of 32 experts, of three matrices of 2880 x 2880.
    assert counts.experts == 24 * 32 * 3 * 2880 * 2880
    assert stored_bytes(counts) == pytest.approx(13.8e9, rel=0.02)  # its safetensors: 13.76 GB


def test_the_estimate_of_gpt_oss_is_within_a_tenth_of_the_arithmetic() -> None:
    config = load_config("configs/decisions_gpt_oss.yaml")
    found = memory.estimate(config, gpt_oss(), "cuda")
    attention = 2880 * 64 * (64 + 8 + 8 + 64)  # inputs x outputs of q, k, v, o
    assert 24 * attention > 0
    per_layer = 16 * (2880 + 4096) + 2 * 16 * (2880 + 512) + 16 * (4096 + 2880)
    experts = 32 * 16 * ((2880 + 5760) + (2880 + 2880)) + 16 * (32 + 2880)
    trained = 24 * (per_layer + experts)
    assert found.weights == pytest.approx(2 * 20.9e9 + 4 * trained, rel=0.1)
    assert found.optimizer == pytest.approx(8 * trained, rel=0.1)
    # Keys and values: 12 layers see it all, 12 the last 128 tokens; 8 heads of 64, in bfloat16, 32 answers at once.
    assert found.cache == pytest.approx(2 * 2 * 8 * 64 * 12 * (768 + 128) * 32, rel=0.1)
    assert found.peak < 75 * 2**30  # an H100 has 79 GiB


@pytest.mark.parametrize(
    ("family", "shape", "billions"),
    [
        ("Qwen2", {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}, 1.54),
        ("Qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}, 8.19),
        ("Llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256}, 8.03),
        ("Gemma2", {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}, 2.61),
    ],
)  # fmt: skip
def test_published_models_are_counted_as_their_cards_say(family: str, shape: dict[str, Any], billions: float) -> None:
    import transformers

    counts = models.counts_of(getattr(transformers, f"{family}Config")(**shape))
    assert counts.total / 1e9 == pytest.approx(billions, rel=0.01)


def test_adapters_and_4_bits_make_it_small_and_full_training_large() -> None:
    from transformers import Qwen2Config

    shape = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)  # fmt: skip
    lora = memory.estimate(settings(), shape, "cuda")
    qlora = memory.estimate(settings(model={"quantization": "4bit"}), shape, "cuda")
    full = memory.estimate(settings(lora={"enabled": False}), shape, "cuda")
    count = models.counts_of(shape).total
    assert full.optimizer == 8 * count and full.gradients == full.weights == 4 * count
    assert lora.optimizer < 0.02 * full.optimizer and qlora.optimizer == lora.optimizer // 2
    # 1.31 of the 1.54 billion weights are in linear layers; the embedding is held in float32 then.
    assert qlora.weights < 0.55 * lora.weights
    checkpointed = memory.estimate(settings(model={"gradient_checkpointing": True}), shape, "cpu")
    assert checkpointed.activations < 0.1 * memory.estimate(settings(), shape, "cpu").activations


DRY = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, Qwen2Config, Gemma3TextConfig
from lib import memory, models
from lib.config import parse_config
small = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "bos_token_id": None,
         "eos_token_id": 1}
experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
cases = [(Qwen2Config(**small), True, True), (Qwen2Config(**small), False, False),
         (Gemma3TextConfig(**small), True, False), (GptOssConfig(**small | experts), True, False)]
found = []
for shape, adapter, checkpointing in cases:
    config = parse_config({"task": {"name": "decisions"}, "lora": {"enabled": adapter}, "training": {"batch": 8},
                           "model": {"gradient_checkpointing": checkpointing},
                           "sampling": {"prompt_limit": 128, "completion_limit": 128}})
    estimate = memory.estimate(config, shape, "cpu")
    attention = models.attention_of(config.model, shape)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if adapter:
        from peft import get_peft_model
        model = get_peft_model(model, models.lora_config(config.lora, model))
        if checkpointing:
            model.enable_input_require_grads()
    was = model.training
    once = config.model_copy(update={"training": config.training.model_copy(update={"batch": 1})})
    memory.dry_step(model, once)  # what is loaded on the way
    predicted = estimate.loss - estimate.weights - estimate.optimizer - estimate.framework
    found.append([shape.model_type, predicted, memory.dry_step(model, config)])
    assert all(p.grad is None for p in model.parameters()) and model.training == was
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory with Linux's /proc")
def test_the_estimate_is_near_what_a_real_pass_takes() -> None:
    # Without this, glibc keeps freed memory and a second pass seems to need less.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRY],
        cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, predicted, real in json.loads(done.stdout.splitlines()[-1]):
        assert 0.8 < predicted / real < 1.4, f"{name}: predicted {predicted}, took {real}"


def test_what_cannot_fit_is_refused_before_loading_and_what_may_not_is_told_the_knobs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config("configs/decisions_gpt_oss.yaml")
    found = memory.estimate(config, gpt_oss(), "cpu")
    with pytest.raises(memory.MemoryLimitError, match=r"training needs \S+ GiB for weights .* no smaller batch mends"):
        memory.check(config, gpt_oss(), memory.Machine(found.fixed - 1, "cpu"))
    with caplog.at_level(logging.INFO):
        memory.check(config, gpt_oss(), memory.Machine(found.peak + 1, "cpu"))
    assert "Turn" not in caplog.text and "memory: about" in caplog.text
    with caplog.at_level(logging.WARNING):
        memory.check(config, gpt_oss(), memory.Machine(found.peak - 2**30, "cpu"))
    assert "Turn, in this order: training.batch: 4 with training.accumulation: 8" in caplog.text
    assert "sampling.completion_limit down; model.gradient_checkpointing: true; a smaller model.name" in caplog.text


def test_what_vllm_takes_of_the_gpu_is_not_there_for_training(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("configs/decisions_gpt_oss.yaml", {"sampling.engine": "vllm"})
    with pytest.raises(memory.MemoryLimitError, match=r"39\.5 GiB of GPU memory are free"):
        memory.check(config, gpt_oss(), memory.Machine(79 * 2**30, "cuda"))
    server = load_config(
        "configs/decisions_gpt_oss.yaml",
        {"sampling.engine": "vllm", "sampling.vllm.server": "http://127.0.0.1:8000"},
    )
    memory.check(server, gpt_oss(), memory.Machine(79 * 2**30, "cuda"))


def test_the_command_line_tells_what_a_config_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt_oss().save_pretrained(tmp_path / "m")
    (tmp_path / "c.yaml").write_text(f"task: decisions\nmodel: {{name: {tmp_path / 'm'}}}\n")
    assert main([str(tmp_path / "c.yaml")]) == 0
    assert re.match(r"peak \d+\.\d GiB: weights \d+\.\d GiB, ", capsys.readouterr().out)
    (tmp_path / "m" / "config.json").unlink()
    assert main([str(tmp_path / "c.yaml")]) == 1 and "cannot load" in capsys.readouterr().err


def test_the_machines_memory_is_what_is_free_here() -> None:
    here = memory.machine()
    assert here.kind == "cpu" and 2**28 < here.free < 2**50
