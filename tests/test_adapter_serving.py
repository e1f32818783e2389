"""Adapters that vLLM would apply otherwise than PEFT does, and those it cannot take, are refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_adapter, tiny_gpt_oss, tiny_qwen2, tiny_qwen3_moe

from lib import models
from lib.config import Config, parse_config
from lib.engine import UNREAD, EngineError, Served, check_adapter, vllm_arguments

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}


def config_of(base: Path) -> Config:
    return parse_config({"task": {"name": "decisions"}, "model": {"name": str(base)}})


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(EngineError) as caught:
        check_adapter(config_of(base), str(base), adapter)
    assert "--artifact merged), or take --engine transformers" in str(caught.value)
    return str(caught.value)


def test_an_adapter_with_ranks_or_alphas_of_its_own_is_not_served_by_vllm(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    for key, value in PATTERNS.items():
        adapter = tiny_adapter(base, tmp_path / key, **{key: value})
        assert f"the adapter sets {key}, which vLLM does not read" in refusal(base, adapter)
        with pytest.raises(EngineError, match=key):
            vllm_arguments(config_of(base), Served(str(base), "base", adapter, "run"))
    plain = tiny_adapter(base, tmp_path / "plain")
    words = vllm_arguments(config_of(base), Served(str(base), "base", plain, "run"))
    assert words[words.index("--max-lora-rank") + 1] == "8" and f"run={plain}" in words


def test_the_installed_vllm_still_reads_none_of_these_settings() -> None:
    """Where this fails, a newer vLLM may serve such adapters, and the refusal can go."""
    from dataclasses import fields

    from vllm.lora.peft_helper import PEFTHelper

    assert not set(UNREAD) & {field.name for field in fields(PEFTHelper)}


def test_an_adapter_on_a_mixture_of_experts_needs_a_gpu(tmp_path: Path) -> None:
    base = tiny_gpt_oss(tmp_path / "base")
    assert "is a mixture of experts, and vLLM serves an adapter on one with a GPU only" in refusal(
        base, tiny_adapter(base, tmp_path / "attention")
    )


def test_with_a_gpu_stacked_experts_are_taken_of_gpt_oss_and_both_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    base = tiny_gpt_oss(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "experts", experts=True)
    assert check_adapter(config_of(base), str(base), adapter) == 4
    settings = json.loads((adapter / "adapter_config.json").read_text())
    half = settings | {"target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(half))
    assert "(down_proj of gpt_oss), which vLLM takes of gpt_oss alone, gate_up_proj and down_proj together" in refusal(
        base, adapter
    )
    other = tiny_qwen3_moe(tmp_path / "qwen")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "(down_proj, gate_up_proj of qwen3_moe)" in refusal(other, adapter)
