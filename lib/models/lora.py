"""Adapters: which weights a LoRA changes, experts and routers included.

Owns PEFT's config. Must not know how a model is loaded or trained.

    python -c "from lib.models.lora import lora_config; help(lora_config)"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.config import LoraSection
from lib.models.errors import ModelError
from lib.models.shape import is_expert

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(settings: LoraSection, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's config: all linear layers by default, plus the experts' and routers' bare tensors that it leaves out."""
    if not settings.enabled:
        return None
    from peft import LoraConfig

    if settings.expert_parameters == "auto":
        bare = [*expert_parameters(model), *router_parameters(model)]
    else:
        bare = list(settings.expert_parameters)
    if bare and settings.dropout:
        raise ModelError(
            f"lora.dropout must be 0 with expert parameters ({', '.join(bare)}): PEFT cannot drop out of them"
        )
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        target_parameters=bare or None,
        task_type="CAUSAL_LM",
    )


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names (from the layer on) of 3-D expert weights (experts, in, out) of mixture-of-experts models."""
    return sorted({_in_layer(name) for name, parameter in model.named_parameters() if is_expert(name, parameter)})


def router_parameters(model: PreTrainedModel) -> list[str]:
    """Names (from the layer on) of router weights (experts, in) that are no linear layer, as `all-linear` means it."""
    import torch

    found = set()
    for name, block in model.named_modules():
        if not hasattr(block, "experts"):
            continue
        for child, module in block.named_children():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Linear):
                found.add(_in_layer(f"{name}.{child}.weight"))
    return sorted(found)


def _in_layer(name: str) -> str:
    """model.layers.3.mlp.router.weight -> mlp.router.weight"""
    return name.split(".", 3)[-1] if name.startswith("model.layers.") else name
