"""Merging on the way from files to files: the bits of PEFT's merge, the architecture's names, and little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import MAKERS, load, logits, tiny_adapter, tiny_gemma, tiny_gpt_oss, tiny_llama, tiny_qwen3_moe

from lib import PROJECT_ROOT
from lib.config import ModelSection
from lib.export import ExportError
from lib.export.base import open_adapter, open_checkpoint
from lib.export.merge import Merge
from lib.models import ModelError

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARD = 100_000


def merged(base: Path, adapter: Path | None, folder: Path, dtype: str | None = None) -> Merge:
    """Merge into `folder`; None = the base's own types."""
    opened = open_adapter(adapter) if adapter else None
    merge = Merge(open_checkpoint(str(base), ModelSection()), opened, "dense", dtype)
    folder.mkdir()
    merge.write(folder, SHARD)
    return merge


def by_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload()  # type: ignore[operator]


def assert_same_bits(model: Any, other: Any) -> None:
    import torch

    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert {name: one.dtype for name, one in ours.items()} == {name: one.dtype for name, one in theirs.items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_merged_folder_reloads_with_the_bits_of_pefts_own_merge(kind: str, tmp_path: Path) -> None:
    base = MAKERS[kind](tmp_path / "base", shard="200KB")
    adapter = tiny_adapter(base, tmp_path / "adapter", experts="gpt_oss" in kind)
    merge = merged(base, adapter, tmp_path / "merged")
    model = load(tmp_path / "merged")
    assert_same_bits(model, by_peft(base, adapter))
    assert (logits(model) - logits(load(base))).abs().max() > 0.1
    assert merge.measured.facts() == {"adapted": 14, "changed": 14}
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "down_proj": 32}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": ["k_proj"]},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_scalings_ranks_embeddings_and_heads_are_merged_as_peft_does(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", **settings)
    merged(base, adapter, tmp_path / "merged")
    assert_same_bits(load(tmp_path / "merged"), by_peft(base, adapter))


def test_a_float32_base_and_a_16_bit_adapter_are_merged_as_peft_does(tmp_path: Path) -> None:
    import torch

    base = tiny_llama(tmp_path / "base", dtype="float32")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    merged(base, adapter, tmp_path / "merged")
    reference = by_peft(base, adapter)
    assert_same_bits(load(tmp_path / "merged"), reference)
    # Another type is made of the merged weights, in one rounding.
    merged(base, adapter, tmp_path / "bfloat16", "bfloat16")
    assert_same_bits(load(tmp_path / "bfloat16"), reference.to(torch.bfloat16))


def test_many_rows_are_merged_block_by_block_with_the_same_bits(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", hidden_size=1024, intermediate_size=4200, num_hidden_layers=1)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["down_proj", "up_proj", "embed_tokens"], r=7)
    merged(base, adapter, tmp_path / "merged")
    assert_same_bits(load(tmp_path / "merged"), by_peft(base, adapter))


def test_experts_that_lie_apart_in_the_checkpoint_stay_so(tmp_path: Path) -> None:
    base = tiny_qwen3_moe(tmp_path / "base", shard="200KB")
    adapter = tiny_adapter(base, tmp_path / "adapter", target_parameters=EXPERTS)
    merged(base, adapter, tmp_path / "merged")
    names = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert_same_bits(load(tmp_path / "merged"), by_peft(base, adapter))


def test_a_whole_trained_model_is_written_without_an_adapter(tmp_path: Path) -> None:
    base = tiny_gemma(tmp_path / "base")
    assert merged(base, None, tmp_path / "merged").measured.facts() == {"adapted": 0, "changed": 0}
    assert_same_bits(load(tmp_path / "merged"), load(base))


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", size=0.0)
    assert merged(base, adapter, tmp_path / "merged").measured.facts()["changed"] == 0
    assert "changes no weight" in caplog.text


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import gc, re, sys
from pathlib import Path
from lib.config import ModelSection
from lib.export.base import open_adapter, open_checkpoint
from lib.export.merge import Merge

def merge(base, adapter, folder, form, limit):
    made = Merge(open_checkpoint(base, ModelSection()), open_adapter(Path(adapter)), form)
    Path(folder).mkdir()
    made.write(Path(folder), limit)

def memory(name):
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024

small, base, adapter, folder, limits = sys.argv[1:]
for form in ("dense", "mxfp4"):
    merge(f"{small}/base", f"{small}/adapter", f"{small}/{form}", form, 10**9)  # imports, threads, caches
for form, limit in zip(("dense", "mxfp4"), limits.split(",")):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux, proc(5))
    before = memory("VmRSS")
    merge(base, adapter, f"{folder}/{form}", form, int(limit))
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
def test_merging_takes_little_more_memory_than_the_largest_file_it_writes(tmp_path: Path) -> None:
    # Resident memory of a process of its own: what torch allocates and what the kernel maps for it both count. malloc
    # keeps some 20 MB of what was freed, which is nothing beside 5 GB and more than these files: it is told not to.
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 16, "num_hidden_layers": 6}
    small = tiny_gpt_oss(tmp_path / "small" / "base", mxfp4=True)
    base = tiny_gpt_oss(tmp_path / "base", mxfp4=True, shard="6MB", **shape)
    tiny_adapter(small, tmp_path / "small" / "adapter", experts=True)
    adapter = tiny_adapter(base, tmp_path / "adapter", experts=True)
    arguments = [tmp_path / "small", base, adapter, tmp_path, "12000000,6000000"]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=PROJECT_ROOT, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    held = open_adapter(adapter).bytes
    for form, taken in zip(("dense", "mxfp4"), map(int, done.stdout.split()), strict=True):
        files = [path.stat().st_size for path in (tmp_path / form).glob("*.safetensors")]
        assert len(files) > 1
        assert taken <= 1.3 * max(files) + held, f"{form}: {taken}, largest file {max(files)}, adapter {held}"


# -- bad input --------------------------------------------------------------------------------------------------------


def tamper(folder: Path, change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> None:
    """Change the tensors of a folder's file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def settle(folder: Path, **values: Any) -> None:
    """Change a folder's config."""
    path = next(path for name in ("adapter_config.json", "config.json") if (path := folder / name).is_file())
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


DOWN = "model.layers.0.mlp.down_proj.weight"
LORA_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda base, _: tamper(base, lambda t: t.pop(DOWN)), rf"base lacks 1 tensors of LlamaForCausalLM \({DOWN}\)"),
        (lambda base, _: tamper(base, rename(DOWN, "wrong")), r"lacks 1 .* has 1 that are none of its \(wrong\)"),
        (lambda base, _: settle(base, intermediate_size=64), r"is \(.*\), and its config.json makes it"),
        (lambda base, _: settle(base, quantization_config={"quant_method": "awq"}), r"quantized with awq.*model\.name"),
        (
            lambda _, adapter: tamper(adapter, lambda t: t.pop(LORA_A), ADAPTER),
            r"1 missing \(base_model.*lora_A.*unknown",
        ),
        (lambda _, adapter: tamper(adapter, rename(LORA_A, "other"), ADAPTER), r"1 missing .* 1 unknown \(other\)"),
        (lambda _, adapter: settle(adapter, r=8), r"adapter is for a base of another size"),
        (lambda _, adapter: settle(adapter, target_modules=["wqkv"]), r"for another base than LlamaForCausalLM"),
        (lambda _, adapter: settle(adapter, use_dora=True), r"use_dora = True: .*Export the artifact `adapter`"),
        (lambda _, adapter: settle(adapter, modules_to_save=["lm_head"]), r"modules_to_save = .*only plain LoRA"),
        (lambda _, adapter: settle(adapter, trainable_token_indices=[3]), r"trainable_token_indices"),
        (lambda _, adapter: settle(adapter, bias="all"), r"bias = 'all'"),
        (lambda _, adapter: settle(adapter, peft_type="IA3"), r"of the kind IA3: only LoRA is merged"),
        (lambda _, adapter: tamper(adapter, lambda t: t[LORA_A].fill_(float("nan")), ADAPTER), r"training broke it"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(damage: Any, told: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    damage(base, adapter)
    with pytest.raises(ExportError, match=told):
        merged(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_a_larger_base_is_refused(tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_llama(tmp_path / "large", hidden_size=128), tmp_path / "adapter")
    with pytest.raises(ExportError, match="base of another size"):
        merged(tiny_llama(tmp_path / "base"), adapter, tmp_path / "merged")


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = tiny_gemma(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ExportError, match="ties its head to its embeddings"):
        merged(base, adapter, tmp_path / "merged")


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    (adapter / ADAPTER).rename(adapter / "adapter_model.bin")
    (adapter / "training_args.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ExportError, match=r"adapter_model\.bin, a pickle.*only safetensors"):
        open_adapter(adapter)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises((ExportError, ModelError), match="pickle"):
        open_checkpoint(str(base), ModelSection())


def test_a_file_that_was_cut_off_or_is_missing_is_told(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", shard="100KB")
    files = sorted(base.glob("*.safetensors"))
    whole = shutil.copytree(base, tmp_path / "copy")
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(ExportError, match="is cut off"):
        open_checkpoint(str(base), ModelSection())
    (whole / files[1].name).unlink()
    with pytest.raises(ExportError, match=f"{files[1].name}, which its index names, is missing"):
        open_checkpoint(str(whole), ModelSection())
