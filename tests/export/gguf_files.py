"""GGUF files as llama.cpp's converters write them, of tiny models: a writer of the format, and stand-ins for scripts.

Compared once with the real converters (llama-cpp-python 0.3.36's copy): the same tensors, values, tokens and keys.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "gpt_oss": "gpt-oss",
}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
TYPES = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}
OUT = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "auto": "BF16"}


def write_gguf(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[str, Any]]) -> Path:
    """A file of version 3: keys, and tensors as (type, values)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(_text(name) + _value(value) for name, value in keys.items())
    data = b""
    for name, (kind, values) in tensors.items():
        dimensions = list(reversed(values.shape))
        data += b"\0" * (-len(data) % 32)
        head += _text(name) + struct.pack(
            f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, TYPES[kind], len(data)
        )
        data += _packed(kind, values)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def model_file(folder: Path, outtype: str = "auto") -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Keys and tensors of a model's folder."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, values in load_file(file).items():
            tensors[_name(name)] = ("F32" if values.dim() < 2 else OUT[outtype], _ordered(config, name, values))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = {number: token for token, number in tokenizer.get_vocab().items()}
    kind = NAMES[config["model_type"]]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    keys = {
        "general.architecture": kind,
        "general.type": "model",
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{kind}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [words.get(at, f"[PAD{at}]") for at in range(config["vocab_size"])],
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    if config["model_type"] == "gpt_oss":  # its experts have names and an order of their own
        tensors = {"token_embd.weight": tensors["token_embd.weight"]}
    return keys, tensors


def adapter_file(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Keys and tensors of an adapter's folder."""
    from safetensors.torch import load_file

    config = json.loads((base / "config.json").read_text())
    tensors = {}
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        stem, which = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        ordered = _ordered(config, f"{stem}.weight", values) if which == "B" else values
        tensors[f"{_name(f'{stem}.weight')}.lora_{which.lower()}"] = ("F32", ordered)
    settings = json.loads((folder / "adapter_config.json").read_text())
    keys = {"general.architecture": NAMES[config["model_type"]], "general.type": "adapter", "adapter.type": "lora"}
    keys |= {"general.base_model.0.name": str(settings["base_model_name_or_path"])}
    return keys | {"adapter.lora.alpha": float(settings["lora_alpha"])}, tensors


def converters(folder: Path) -> Path:
    """A folder with stand-ins for llama.cpp's scripts."""
    folder.mkdir(parents=True)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import gguf_files\ngguf_files.convert(sys.argv[1:])\n"
        )
    return folder


def convert(arguments: list[str]) -> None:
    options = dict(zip(arguments[:-1:2], arguments[1::2], strict=True))
    source = Path(arguments[-1])
    if "--base" in options:
        keys, tensors = adapter_file(source, Path(options["--base"]))
    else:
        keys, tensors = model_file(source, options["--outtype"])
    write_gguf(Path(options["--outfile"]), keys, tensors)


def _name(name: str) -> str:
    *_, module, ending = name.split(".")
    layer = name.split(".")[2] if ".layers." in name else ""
    return f"blk.{layer}.{LAYER.get(module, module)}.{ending}" if layer else f"{TOP[module]}.{ending}"


def _ordered(config: dict[str, Any], name: str, values: Any) -> Any:
    """Llama's queries and keys lie in halves of each head; llama.cpp has their rows in turns."""
    if config["model_type"] != "llama" or ("q_proj" not in name and "k_proj" not in name):
        return values
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    size = values.shape[0] // heads
    order = [head * size + half * size // 2 + at for head in range(heads) for at in range(size // 2) for half in (0, 1)]
    return values[order]


def _packed(kind: str, values: Any) -> bytes:
    import torch

    flat = values.float().reshape(-1)
    if kind != "Q8_0":
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return bytes(flat.to(types[kind]).contiguous().view(torch.uint8).numpy().tobytes())
    blocks = flat.reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    whole = (blocks / torch.where(scales > 0, scales, 1.0)).round().to(torch.int8)
    return bytes(torch.cat([scales.half().view(torch.int8), whole], 1).numpy().tobytes())


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        assert math.isfinite(value)
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    return struct.pack("<I", 8) + _text(value)


if __name__ == "__main__":
    convert(sys.argv[1:])
