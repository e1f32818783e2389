"""Tiny random models of the real architectures as folders: weights, config, tokenizer, chat template.

`tiny_gpt_oss(folder, mxfp4=True)` has experts as openai/gpt-oss ships them, of random bytes: nothing of ours packed
them. `tiny_adapter(base, folder)` is a LoRA adapter on one of them that changes what it says, as a training saves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXTS = [
    "You control a storage plant. Decide what to do in the next hour.",
    "Prices are 10, 20 and 40. The tank is half full. Answer with an action in brackets.",
    "What is 2 + 2? It is 4. The quick brown fox jumps over the lazy dog, and nobody knows why.",
    "user assistant system developer analysis final commentary Reasoning: low medium high",
]
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]

SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<bos>", "<end_of_turn>", "<start_of_turn>"],
    "gptoss": ["<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>",
               "<|call|>"],
}  # fmt: skip
"""Begin of text, end of turn, and the others that the family's chat template writes."""

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""As in openai/gpt-oss-20b's quantization_config."""


def tiny_qwen2(folder: Path, **settings: Any) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _save(
        folder, Qwen2Config, Qwen2ForCausalLM, _qwen_tokenizer(None), **{"tie_word_embeddings": True} | settings
    )


def tiny_qwen3(folder: Path, **settings: Any) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer("qwen3")
    settings = {"tie_word_embeddings": True, "head_dim": 16} | settings
    return _save(folder, Qwen3Config, Qwen3ForCausalLM, tokenizer, **settings)


def tiny_llama(folder: Path, **settings: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer("llama", "llama3")
    return _save(folder, LlamaConfig, LlamaForCausalLM, tokenizer, **{"tie_word_embeddings": False} | settings)


def tiny_gemma(folder: Path, **settings: Any) -> Path:
    from transformers import GemmaConfig, GemmaForCausalLM

    settings = {"tie_word_embeddings": True, "head_dim": 16} | settings
    return _save(folder, GemmaConfig, GemmaForCausalLM, _tokenizer("gemma", "gemma"), **settings)


def tiny_qwen3_moe(folder: Path, **settings: Any) -> Path:
    """Experts that lie apart in the checkpoint and are one tensor in the model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    settings = shape | {"tie_word_embeddings": False} | settings
    return _save(folder, Qwen3MoeConfig, Qwen3MoeForCausalLM, _qwen_tokenizer("qwen3"), **settings)


def tiny_gpt_oss(folder: Path, mxfp4: bool = False, **settings: Any) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    shape: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64}
    shape |= {"tie_word_embeddings": False, "sliding_window": 32, "max_position_embeddings": 131072}
    # 200002 and 200012 in the real one: an answer ends with either.
    tokenizer = _tokenizer("gptoss", "gptoss")
    ends = tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    _save(folder, GptOssConfig, GptOssForCausalLM, tokenizer, ends=ends, **shape | settings)
    if mxfp4:
        _pack_randomly(folder, settings.get("seed", 0))
    return folder


MAKERS: dict[str, Callable[..., Path]] = {
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "llama": tiny_llama,
    "gemma": tiny_gemma,
    "gpt_oss": tiny_gpt_oss,
    "gpt_oss_mxfp4": lambda folder, **settings: tiny_gpt_oss(folder, mxfp4=True, **settings),
}


def tiny_adapter(base: Path, folder: Path, experts: bool = False, size: float = 0.05, **settings: Any) -> Path:
    """A random LoRA adapter on a tiny model, with the tokenizer beside it; `settings` are LoraConfig's.

    `experts`: on the experts and the router of a mixture of experts too.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if experts:
        chosen["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"]
    torch.manual_seed(1)
    adapted = get_peft_model(load(base), LoraConfig(**chosen | settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, size)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """A model as its weights are stored; MXFP4 experts dequantized, which transformers does on a CPU in any case."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        settings = {"quantization_config": Mxfp4Config(dequantize=True)} | settings
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | settings).eval()


def logits(model: Any, ids: Sequence[int] = tuple(range(20, 44))) -> Any:
    """The model's logits after each of these tokens, float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


def _save(
    folder: Path,
    config_class: Any,
    model_class: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard: str = "5GB",
    ends: Sequence[int] | None = None,
    **settings: Any,
) -> Path:
    import torch

    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    # A real vocabulary is padded, too.
    shape |= {"vocab_size": -(-len(tokenizer) // 64) * 64, "initializer_range": 0.12}
    shape |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape |= {"eos_token_id": list(ends) if ends else tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**shape | settings))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("bias", "sinks")):  # zeros in a fresh model: to lose them must show
                    weight.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def _pack_randomly(folder: Path, seed: int) -> None:
    """Put random MXFP4 blocks in the place of the experts' weights."""
    import torch
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(seed)
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, wide, out = tensors.pop(name).shape
            blocks = (experts, out, wide // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=random)
            # 2^-6 to 2^-4: weights of the size of the others.
            tensors[f"{name}_scales"] = torch.randint(121, 124, blocks[:-1], dtype=torch.uint8, generator=random)
        save_file(tensors, path, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _qwen_tokenizer(template: str | None) -> Any:
    """AutoTokenizer builds a Qwen2Tokenizer for these, whatever the folder says: so it is one."""
    from lib.starter import build_tokenizer

    tokenizer = build_tokenizer(TEXTS)
    if template:
        tokenizer.chat_template = _template(template)
    return tokenizer


def _tokenizer(family: str, template: str) -> Any:
    """Byte-level BPE with the family's special tokens and its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, *others = SPECIAL[family]
    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fitted.decoder = decoders.ByteLevel()
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=every_byte, show_progress=False)
    fitted.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fitted,
        bos_token=begin,
        eos_token=end,
        pad_token="<|pad|>",
        extra_special_tokens=others,
        padding_side="left",
        model_max_length=1024,
    )
    tokenizer.chat_template = _template(template)
    return tokenizer


def _template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
