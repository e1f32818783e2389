"""Loading: quantized checkpoints, what the machine lacks, adapters on experts, and what is refused with what advice."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from model_hub import running_models

from lib import PROJECT_ROOT, models
from lib.config import ConfigError, LoraSection, ModelSection, parse_config
from lib.models import quantized
from lib.models.errors import advice

CPU = ModelSection(name="m")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss of random MXFP4 bytes."""
    return tiny_models.tiny_gpt_oss(tmp_path_factory.mktemp("models") / "gpt-oss", mxfp4=True)


def held(packed: Path, quantization: str, purpose: models.Purpose = "answer") -> str:
    shape = models.load_shape(str(packed), CPU)
    return quantized.kept_as(str(packed), shape, CPU.model_copy(update={"quantization": quantization}), purpose)


# -- MXFP4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_an_mxfp4_checkpoint_is_unpacked_exactly_to_the_type_that_is_asked_for(
    packed: Path, dtype: Any, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    with caplog.at_level(logging.INFO):
        model = models.load_model(str(packed), ModelSection(name="m", dtype=dtype), purpose="train")
    reference = tiny_models.load(packed)  # transformers' own unpacking, to bfloat16
    experts: Any = model.model.layers[0].mlp.experts.gate_up_proj
    assert str(experts.dtype) == f"torch.{wanted}"
    assert torch.equal(experts.float(), reference.model.layers[0].mlp.experts.gate_up_proj.float())
    assert experts.abs().max() > 0 and not models.quant_method(model.config)
    assert "stored in MXFP4 (" in caplog.text and f"unpacked to {wanted} (" in caplog.text


def test_without_a_gpu_mxfp4_is_refused_where_it_was_asked_for_and_told_of_where_not(
    packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(models.ModelError, match=r"cannot be kept in MXFP4 here: it needs a GPU\. Set it to auto"):
        held(packed, "mxfp4")
    assert held(packed, "auto") == "dequantized"
    assert "cannot be kept in MXFP4 here (it needs a GPU): unpacking its weights" in caplog.text


def test_where_the_machine_can_weights_stay_in_mxfp4_unless_something_is_trained_on_them(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "mxfp4_lacks", list)
    kept = {
        (wanted, purpose): held(packed, wanted, purpose)  # type: ignore[arg-type]
        for wanted in ("auto", "none", "mxfp4")
        for purpose in ("train", "adapter", "answer")
    }
    assert {key for key, how in kept.items() if how == "mxfp4"} == {
        ("auto", "answer"), ("mxfp4", "adapter"), ("mxfp4", "answer"),
    }  # fmt: skip


def test_a_package_of_the_wrong_version_is_named_with_the_one_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton": "3.3.1", "kernels": "0.17.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    assert quantized._lacks_package("triton", (3, 4), None) == [
        "triton 3.3.1 is installed and triton>=3.4 is needed (ACCELERATOR=cuda make setup)"
    ]
    assert "kernels>=0.16,<0.17 is needed" in quantized._lacks_package("kernels", (0, 16), (0, 17))[0]
    versions.update(triton="3.7.1", kernels="0.16.2")
    assert not quantized._lacks_package("triton", (3, 4), None)
    assert not quantized._lacks_package("kernels", (0, 16), (0, 17))


def test_an_adapter_on_experts_is_not_put_on_weights_that_stay_in_mxfp4(packed: Path, tmp_path: Path) -> None:
    adapter = tiny_models.tiny_adapter(packed, tmp_path / "adapter", experts=True)
    model = models.load_model(str(packed), CPU, purpose="adapter")
    model.config.quantization_config = {"quant_method": "mxfp4"}  # as where a GPU keeps them
    with pytest.raises(models.ModelError, match=r"changes experts or routers \(mlp\.experts.*set model\.quantization"):
        models.load_adapter(model, str(adapter))


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def test_4bit_says_what_is_missing_and_what_it_cannot_do(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_models.tiny_qwen2(tmp_path / "qwen")
    four = CPU.model_copy(update={"quantization": "4bit"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(models.ModelError, match=r"not installed; the CUDA lock has it"):
        models.load_model(str(plain), four)
    with pytest.raises(models.ModelError, match=r"stored in MXFP4, which has 4 bits already"):
        models.load_model(str(packed), four)
    with pytest.raises(models.ModelError, match=r"stored in full precision, not in MXFP4: set it to auto"):
        models.load_model(str(plain), CPU.model_copy(update={"quantization": "mxfp4"}))
    with pytest.raises(ConfigError, match=r"4bit can only be trained under an adapter: set lora\.enabled"):
        parse_config({"task": {"name": "ace"}, "model": {"quantization": "4bit"}, "lora": {"enabled": False}})


def test_4bit_weights_answer_as_the_model_does_to_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the CUDA lock only")
    plain = tiny_models.tiny_qwen2(tmp_path / "qwen")
    model = models.load_model(str(plain), CPU.model_copy(update={"quantization": "4bit"}))
    full = tiny_models.logits(tiny_models.load(plain))
    assert 0 < (tiny_models.logits(model) - full).norm() / full.norm() < 0.5
    with pytest.raises(models.ModelError, match="trains on a GPU only"):
        models.load_model(str(plain), CPU.model_copy(update={"quantization": "4bit"}), purpose="train")


# -- adapters and attention --------------------------------------------------------------------------------------------


def test_an_adapter_reaches_attention_experts_and_router_of_gpt_oss(packed: Path) -> None:
    from peft import get_peft_model

    model = models.load_model(str(packed), CPU, purpose="train")
    settings = models.lora_config(LoraSection(r=4), model)
    assert settings is not None
    assert settings.target_parameters == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight"]
    adapted = get_peft_model(model, settings)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.experts.lora", "mlp.experts.base_layer", "mlp.router"):
        assert any(part in name for name in trained), part
    with pytest.raises(models.ModelError, match=r"lora\.dropout must be 0 .* PEFT cannot drop out of them"):
        models.lora_config(LoraSection(dropout=0.1), models.load_model(str(packed), CPU, purpose="train"))


def test_routers_that_are_linear_layers_are_left_to_all_linear() -> None:
    from transformers import MixtralConfig, Qwen2Config, Qwen3MoeConfig

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    assert models.router_parameters(models.unloaded(Qwen2Config(**small, **heads))) == []
    for shape in (Qwen3MoeConfig(**small, **heads, num_experts=4), MixtralConfig(**small, **heads)):
        found = models.router_parameters(models.unloaded(shape))
        assert all(name.endswith("gate.weight") for name in found) and len(found) <= 1


def test_attention_is_what_the_architecture_has(packed: Path) -> None:
    shape = models.load_shape(str(packed), CPU)
    assert models.attention_of(CPU, shape) == "eager" and models.attention_of(CPU) == "sdpa"
    with pytest.raises(models.ModelError, match=r"gpt_oss has no such attention: set it to auto"):
        models.attention_of(ModelSection(attention="sdpa"), shape)


def test_liger_without_a_gpu_is_refused() -> None:
    with pytest.raises(models.ModelError, match=r"model\.liger needs a GPU .* set it to false"):
        models.check_liger(ModelSection(liger=True))


# -- the Hub -----------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
from lib import models
from lib.config import ModelSection
told = {}
for name in sys.argv[1:]:
    settings = ModelSection(name=name)
    try:
        tokenizer = models.load_tokenizer(name, settings) if name.endswith("whole") else None
        told[name] = str(models.parameter_count(models.load_model(name, settings)))
    except models.ModelError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def test_a_model_that_the_hub_or_we_refuse_is_told_with_what_to_do(tmp_path: Path) -> None:
    import torch

    whole = tiny_models.tiny_qwen2(tmp_path / "whole")
    pickled, code = tmp_path / "pickled", tmp_path / "code"
    shutil.copytree(whole, pickled)
    (pickled / "model.safetensors").unlink()
    marker = tmp_path / "was unpickled"
    torch.save({}, pickled / "pytorch_model.bin")
    shutil.copytree(whole, code)
    own = {"model_type": "acme", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (code / "config.json").write_text(json.dumps(own))
    (code / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    held = {"acme/whole": whole, "acme/pickled": pickled, "acme/code": code}
    refused = {"acme/gated": (401, "GatedRepo"), "acme/denied": (403, "GatedRepo")}
    names = [*held, *refused, "acme/unknown"]
    with running_models(held, refused) as url:
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        environment = kept | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *names],
            cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=240, check=False, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert int(told["acme/whole"]) > 0
    assert "no .safetensors weights, and pickled ones (.bin, .pt) are refused" in told["acme/pickled"]
    assert "model.trust_remote_code: true and pin model.revision" in told["acme/code"] and not marker.exists()
    for name, status in (("acme/gated", "(401)"), ("acme/denied", "(403)")):
        for part in (
            status,
            f"https://huggingface.co/{name}",
            "HF_TOKEN",
            "modal secret create",
            "HF_TOKEN is not set",
        ):
            assert part in told[name], (name, told[name])
    assert "the Hub knows no such model" in told["acme/unknown"]


def test_a_pickled_folder_and_a_pickled_adapter_are_refused_before_they_are_read(tmp_path: Path) -> None:
    base = tiny_models.tiny_qwen2(tmp_path / "base")
    adapter = tiny_models.tiny_adapter(base, tmp_path / "adapter")
    model = models.load_model(str(base), CPU)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(models.ModelError, match=r"adapter.*pickled ones"):
        models.load_adapter(model, str(adapter))
    with pytest.raises(models.ModelError, match=r"base: it has no \.safetensors weights"):
        models.load_model(str(base), CPU)


def test_an_error_that_nobody_knows_is_told_by_its_first_line() -> None:
    assert advice("a/b", "strange\nand long") == "strange"
