"""Whether a GGUF file holds the weights that it was converted from: names, shapes, every value, sizes of the model.

Owns llama.cpp's names and its order of rows for the architectures whose conversion is a renaming (Qwen 2, Qwen 3, Llama
3), read in ggml-org/llama.cpp: gguf-py/gguf/tensor_mapping.py, conversion/llama.py. Of others nothing is compared, and
that is said. Must not know prompts or runs.

    python -c "from lib.export.gguf_weights import ARCHITECTURES; print(ARCHITECTURES)"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.export.base import Adapter, Checkpoint
from lib.export.gguf_header import FLOATS, Gguf, Stored, q8_0, read_gguf, read_values
from lib.sync.merge import parts_of
from lib.sync.tensors import read_tensor

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
"""Of config.json -> of the file."""

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")

_SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}  # fmt: skip
"""Keys of the file, behind the architecture's name -> of config.json."""

ROPE = "rope_freqs.weight"
"""Llama 3's factors of the rotary frequencies, which are a tensor there."""

STEP = 0.6
"""How far a value may be from what Q8_0 makes of it, in steps: half of one, and the rounding of the step itself."""

SMALLEST = 2.0**-126
"""Below it a number has fewer digits, and converters may make it 0."""


@dataclass
class Found:
    """What a comparison found."""

    tensors: int = 0
    types: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be, in words."""
    unread: str = ""
    """Why nothing could be compared; "" = it was."""

    @property
    def exact(self) -> bool:
        """Whether every value is the source's, rounded to a type of numbers at most."""
        return not self.unread and self.types <= FLOATS.keys()


class _Expected(NamedTuple):
    """A tensor that has to be there."""

    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]
    apart: float = 0.0
    """How far values may be apart, as a share of them: where they are computed, and not copied."""


def compare_model(path: Path, source: Checkpoint) -> Found:
    """A file beside the model's folder that it was converted from. Raises ExportError where it cannot be read."""
    there = read_gguf(path)
    kind = _architecture(source)
    if kind not in ARCHITECTURES:
        return _not_compared(there, kind)
    found = Found()
    found.wrong += _key_differences(there.keys, ARCHITECTURES[kind], _plain_config(source.config))
    expected = {}
    for name, place in source.tensors.items():
        mapped = gguf_name(name)
        if mapped is None:
            return Found(unread=f"it is not known here how llama.cpp names {name}")
        heads = _heads(kind, name, source.config)
        expected[mapped] = _Expected(place.stored.shape, _reader(place.path, place.stored, heads))
    factors = _rope_factors(source) if kind == "LlamaForCausalLM" else None
    if factors is not None:
        expected[ROPE] = _Expected((len(factors),), lambda part: factors[part], apart=1e-4)
    return _compare(path, there, expected, found)


def compare_adapter(path: Path, adapter: Adapter, base: Checkpoint) -> Found:
    """A file beside the adapter that it was converted from. Raises ExportError where it cannot be read."""
    there = read_gguf(path)
    kind = _architecture(base)
    if kind not in ARCHITECTURES:
        return _not_compared(there, kind)
    found = Found()
    told = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.config["lora_alpha"]),
    }
    found.wrong += [f"{key} is {there.keys.get(key)!r} in place of {value!r}" for key, value in told.items()
                    if there.keys.get(key) != value]  # fmt: skip
    expected = {}
    for name, place in adapter.tensors.items():
        module = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        mapped = gguf_name(f"{module[1]}.weight") if module else None
        if module is None or mapped is None:
            return Found(unread=f"it is not known here how llama.cpp names {name}")
        heads = _heads(kind, f"{module[1]}.weight", base.config) if module[2] == "B" else 0
        reader = _reader(place.path, place.stored, heads)
        expected[f"{mapped}.lora_{module[2].lower()}"] = _Expected(place.stored.shape, reader)
    return _compare(path, there, expected, found)


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a tensor; None where it is not known here."""
    match = _NAME.fullmatch(name)
    mapped = (_LAYER if match[1] else _TOP).get(match[2]) if match else None
    if match is None or mapped is None:
        return None
    return f"blk.{match[1]}.{mapped}.{match[3]}" if match[1] else f"{mapped}.{match[3]}"


def _compare(path: Path, there: Gguf, expected: Mapping[str, _Expected], found: Found) -> Found:
    found.tensors, found.types = len(there.tensors), {one.type for one in there.tensors.values()}
    for name in sorted(there.tensors.keys() ^ expected.keys()):
        found.wrong.append(f"{name} is {'missing' if name in expected else 'not of what it was made from'}")
    for name, one in expected.items():
        stored = there.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != one.shape:
            found.wrong.append(f"{name} has the shape {stored.shape} in place of {one.shape}")
        elif not all(_same(path, stored, part, one.read(part), one.apart) for part in _parts(stored.shape)):
            found.wrong.append(f"{name} has other values than what it was made from")
    return found


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    yield from parts_of(shape) if len(shape) > 1 else [slice(0, shape[0])]


def _same(path: Path, stored: Stored, part: slice, expected: torch.Tensor, apart: float) -> bool:
    import torch

    values = read_values(path, stored, part)
    if stored.type == "Q8_0":
        return bool(((expected.float() - values).abs() <= STEP * q8_0(path, stored, part) + SMALLEST).all())
    rounded = expected.float().to(values.dtype)
    differing = ((rounded.float() - values.float()).abs() > apart * rounded.float().abs()) & (rounded != values)
    differing &= ~((rounded.float().abs() < SMALLEST) & (values.float().abs() < SMALLEST))
    return not bool(differing.any()) and bool(torch.isfinite(values.float()).all())


def _reader(path: Path, stored: Any, heads: int) -> Callable[[slice], torch.Tensor]:
    """Reads parts of a tensor in the order of rows that llama.cpp has; `heads` > 0: pairs of rows of each head."""

    def read(part: slice) -> torch.Tensor:
        if not heads:
            return read_tensor(path, stored, part)
        whole = read_tensor(path, stored)
        rows, *rest = whole.shape  # halves of each head, one after the other -> row by row
        return whole.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(whole.shape)[part]

    return read


def _heads(kind: str, name: str, config: Mapping[str, Any]) -> int:
    """Heads of a tensor whose rows llama.cpp has in another order; 0 = in the same."""
    if kind != "LlamaForCausalLM" or not re.search(r"\.[qk]_proj\.", name):
        return 0
    key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
    return int(config.get(key) or config["num_attention_heads"])


def _key_differences(keys: Mapping[str, Any], architecture: str, config: Mapping[str, Any]) -> list[str]:
    """Sizes and settings by which llama.cpp computes."""
    told = keys.get("general.architecture")
    if told != architecture:
        return [f"general.architecture is {told!r} in place of {architecture!r}"]
    found = []
    for key, ours in _SIZES.items():
        known, value = config.get(ours), keys.get(f"{architecture}.{key}")
        if known is None or (value is None and ours == "head_dim"):  # where it follows from the others
            continue
        if value is None or abs(float(value) - float(known)) > 1e-6 * abs(float(known)):
            found.append(f"{architecture}.{key} is {value} in place of {known}")
    scaling = config.get("rope_type", "default")
    named = keys.get(f"{architecture}.rope.scaling.type", "none")
    if scaling in ("linear", "yarn") and named != scaling:
        found.append(f"{architecture}.rope.scaling.type is {named!r} in place of {scaling!r}")
    return found


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the rotary settings beside the others, as they were before transformers 5."""
    return {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}


def _rope_factors(source: Checkpoint) -> torch.Tensor | None:
    """By how much Llama 3 divides each rotary frequency, as transformers does; None where it does not."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**source.config)
    rope: Mapping[str, Any] = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled)))
    return plain / scaled


def _architecture(source: Checkpoint) -> str:
    return str((source.config.get("architectures") or ["an unnamed architecture"])[0])


def _not_compared(there: Gguf, kind: str) -> Found:
    types = {one.type for one in there.tensors.values()}
    counted = f"{len(there.tensors)} tensors ({', '.join(sorted(types))}) stand in its header, whole"
    why = f"{counted}; names and values are not compared: how llama.cpp converts {kind} is not known here"
    return Found(len(there.tensors), types, unread=why)
