"""MXFP4 in numbers: transformers' values, exact round trips, the bound of the error, and exports that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_merge import assert_same_bits, merged
from tiny_models import load, tiny_adapter, tiny_gpt_oss, tiny_llama

from lib.config import ModelSection
from lib.export import ExportError
from lib.export.base import open_adapter, open_checkpoint
from lib.export.merge import Merge
from lib.export.mxfp4 import VALUES, Packed, dequantize, deviation, packed_shapes, quantize
from lib.export.weights import Expected


def random_packed(seed: int = 0, low: int = 0, high: int = 252) -> Packed:
    """Random blocks of (2, 6, 96), with scales that keep all values finite in bfloat16."""
    import torch

    random = torch.Generator().manual_seed(seed)
    blocks, scales = packed_shapes((2, 96, 6))
    return Packed(
        torch.randint(0, 256, blocks, dtype=torch.uint8, generator=random),
        torch.randint(low, high, scales, dtype=torch.uint8, generator=random),
    )


def bits(tensor: Any) -> Any:
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def packed(base: Path, adapter: Path | None, folder: Path) -> Merge:
    opened = open_adapter(adapter) if adapter else None
    merge = Merge(open_checkpoint(str(base), ModelSection()), opened, "mxfp4")
    folder.mkdir()
    merge.write(folder, 100_000)
    return merge


def test_packed_weights_have_the_values_that_transformers_gives_them() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for seed in range(20):
        some = random_packed(seed, high=256)
        ours, theirs = dequantize(some), convert_moe_packed_tensors(*some)
        assert ours.shape == theirs.shape == (2, 96, 6)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(bits(ours)[~ours.isnan()], bits(theirs)[~theirs.isnan()])


@pytest.mark.parametrize("codes", range(0, 255, 17))
def test_what_was_mxfp4_comes_back_bit_for_bit_whatever_values_a_block_has(codes: int) -> None:
    import torch

    some = random_packed(codes)
    # Blocks of the smaller values only, too: their scale is not the one that would be chosen now.
    for mask in (0xFF, 0xBB, 0x99, 0xAA, 0x88, 0x00):
        before = dequantize(Packed(some.blocks & mask, some.scales))
        assert torch.equal(bits(dequantize(quantize(before))), bits(before))


def test_a_weight_goes_to_the_nearest_value_and_ties_to_the_even_one() -> None:
    import torch

    expected = {
        0.25: 0.0,
        0.75: 1.0,
        1.25: 1.0,
        1.75: 2.0,
        2.5: 2.0,
        3.5: 4.0,
        5.0: 4.0,
        5.01: 6.0,
        0.2499: 0.0,
        0.26: 0.5,
    }
    for weight, value in expected.items():
        for sign in (1.0, -1.0):
            block = torch.full((1, 32, 1), sign * weight)
            block[0, 0, 0] = 6.0  # the scale is 1
            found = dequantize(quantize(block), torch.float32)[0, 1, 0]
            assert found == sign * value
            assert torch.signbit(found) == (sign < 0)
    grid = torch.linspace(-6, 6, 1 + 32 * 40)[:-1].reshape(40, 32, 1)
    grid[:, 0, 0] = 6.0
    nearest = min
    for block, made in zip(grid, dequantize(quantize(grid), torch.float32), strict=True):
        for weight, value in zip(block.flatten().tolist(), made.flatten().tolist(), strict=True):
            assert abs(weight - value) == pytest.approx(nearest(abs(weight - one) for one in VALUES), abs=1e-6)


def test_the_scale_is_the_smallest_that_holds_the_largest_weight_and_bounds_the_error() -> None:
    import torch

    weights = torch.randn(3, 320, 50, generator=torch.Generator().manual_seed(0)) * 0.02
    some = quantize(weights)
    largest = weights.transpose(1, 2).reshape(3, 50, 10, 32).abs().amax(-1)
    scale = torch.exp2(some.scales.float() - 127)
    assert (largest <= 6 * scale).all()
    assert (largest > 3 * scale).all()
    error = (dequantize(some, torch.float32) - weights).transpose(1, 2).reshape(3, 50, 10, 32).abs().amax(-1)
    assert (error <= scale).all()
    found = deviation(weights, some)
    assert found.worst == pytest.approx(float((error / scale).max()), rel=1e-6)
    assert 0.5 < found.worst <= 1
    assert 0.05 < found.relative < 0.2
    assert deviation(dequantize(some, torch.float32), some).worst == 0


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-38, 6.0, 6.0001, 1e30])
def test_tiny_large_and_empty_blocks_are_packed(largest: float) -> None:
    import torch

    block = torch.zeros(1, 32, 1)
    block[0, 5, 0] = largest
    some = quantize(block)
    assert dequantize(some, torch.float32).isfinite().all()
    assert deviation(block, some).worst <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_packed_is_refused(bad: float) -> None:
    import torch

    block = torch.zeros(1, 32, 1)
    block[0, 5, 0] = bad
    with pytest.raises(ExportError, match="infinite or not numbers"):
        quantize(block)
    with pytest.raises(ExportError, match="48 inputs are no multiple of 32"):
        quantize(torch.zeros(1, 48, 2))


# -- files ------------------------------------------------------------------------------------------------------------


def test_an_mxfp4_base_is_packed_to_the_values_it_had(tmp_path: Path) -> None:
    import torch

    base = tiny_gpt_oss(tmp_path / "base", mxfp4=True, shard="60KB")
    assert packed(base, None, tmp_path / "same").measured.facts() == {"adapted": 0, "changed": 0}
    assert_same_bits(load(tmp_path / "same"), load(base))
    # Attention alone was trained: the experts are the base's own bytes.
    packed(base, tiny_adapter(base, tmp_path / "adapter"), tmp_path / "attention")
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (base, tmp_path / "attention")
    )
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 8
    assert all("self_attn" in name for name in changed)
    # And a dense copy of it comes back to the same values.
    merged(base, None, tmp_path / "dense", "bfloat16")
    facts = packed(tmp_path / "dense", None, tmp_path / "again").measured.facts()
    assert facts["packed"] == 4
    assert facts["packing_error_worst"] == 0
    assert_same_bits(load(tmp_path / "again"), load(base))


@pytest.mark.parametrize("before", [True, False])
def test_a_merged_model_is_packed_within_the_formats_bound_and_loads(before: bool, tmp_path: Path) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    base = tiny_gpt_oss(tmp_path / "base", mxfp4=before)
    adapter = tiny_adapter(base, tmp_path / "adapter", experts=True)
    facts = packed(base, adapter, tmp_path / "mxfp4").measured.facts()
    merged(base, adapter, tmp_path / "merged", "bfloat16")
    model, dense = load(tmp_path / "mxfp4"), load(tmp_path / "merged").state_dict()
    config = json.loads((tmp_path / "mxfp4" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "model.layers.*.mlp.router" in config["modules_to_not_convert"]
    files = {name: one for path in (tmp_path / "mxfp4").glob("*.safetensors") for name, one in load_file(path).items()}
    worst = 0.0
    for name, loaded in model.state_dict().items():
        if f"{name}_blocks" not in files:
            assert torch.equal(loaded, dense[name])  # router, attention, embeddings and biases as merged
            continue
        some = Packed(files[f"{name}_blocks"], files[f"{name}_scales"])
        assert torch.equal(loaded, convert_moe_packed_tensors(*some))
        step = torch.exp2(some.scales.float() - 127).repeat_interleave(32, -1).transpose(1, 2)
        worst = max(worst, float(((loaded.float() - dense[name].float()).abs() / step).max()))
    assert worst == pytest.approx(facts["packing_error_worst"])
    assert 0.5 < worst <= facts["packing_error_bound"] == 1
    assert 0.01 < facts["packing_error_relative"] < 0.2
    assert facts["packed"] == 4


def test_only_gpt_oss_is_packed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="llama model: only gpt-oss"):
        packed(tiny_llama(tmp_path / "base"), None, tmp_path / "mxfp4")


def test_blocks_of_another_layout_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tiny_gpt_oss(tmp_path / "base", mxfp4=True)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name][:, :, :1].contiguous()}, base / "model.safetensors")
    with pytest.raises(ExportError, match="are not MXFP4 as gpt-oss has it"):
        merged(base, None, tmp_path / "merged")
    tensors.pop(name.replace("scales", "blocks"))
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ExportError, match="down_proj_scales has no blocks beside it"):
        merged(base, None, tmp_path / "merged")


def test_one_expert_of_many_without_its_change_is_found(tmp_path: Path) -> None:
    """Packed, the change of a small adapter is within a step, and one expert of 128 is less than 1 % of its stack."""
    base = open_checkpoint(str(tiny_gpt_oss(tmp_path / "base", mxfp4=True, num_local_experts=128)), ModelSection())
    adapter = open_adapter(tiny_adapter(base.folder, tmp_path / "adapter", experts=True, size=0.03))
    folder = tmp_path / "mxfp4"
    folder.mkdir()
    Merge(base, adapter, "mxfp4").write(folder, 10**9)
    assert not Expected(base, adapter).compare(open_checkpoint(str(folder), ModelSection())).wrong
    own, kept = load_file(base.folder / "model.safetensors"), load_file(folder / "model.safetensors")
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    for end in ("_blocks", "_scales"):
        kept[f"{stem}{end}"][7] = own[f"{stem}{end}"][7]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (wrong,) = Expected(base, adapter).compare(open_checkpoint(str(folder), ModelSection())).wrong
    assert stem in wrong
