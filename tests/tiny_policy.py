"""A policy of 70,000 weights that says something else after every step, for tests of weights on their way."""

from __future__ import annotations

from typing import Any


def tiny(tied: bool = True, seed: int = 0, **shape: Any) -> Any:
    """A random Qwen2 of 70,000 weights, with log-probabilities that differ from token to token."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 1024}
    settings |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": tied}
    model = Qwen2ForCausalLM(Qwen2Config(**(settings | shape))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)
    return model


def with_adapter(model: Any, **settings: Any) -> Any:
    """The model with a random LoRA adapter that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**chosen)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.05)
    return adapted


def train(model: Any, size: float = 1e-3) -> None:
    """Move whatever is trained, as an optimizer step would."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * size)
