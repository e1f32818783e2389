"""A model without its weights: its config, its modules on the meta device, and how many parameters they have.

Owns what can be known of a checkpoint from config.json alone. Must not know what is done with it.

    python -c "from transformers import Qwen2Config; from lib.models.shape import *; print(counts_of(Qwen2Config()))"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.config import ModelSection
from lib.models.errors import explained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

STORED_MXFP4 = 17 / 32
"""Bytes of a weight in MXFP4: half a byte, and a scale of one byte for 32 of them (OCP Microscaling, v1.0)."""


class Counts(NamedTuple):
    """Parameters of a model: of all, of the experts' matrices, and of the linear layers but the head."""

    total: int
    experts: int
    linear: int


def load_shape(source: str, settings: ModelSection) -> PreTrainedConfig:
    """The config.json of a folder or Hub id. Raises ModelError."""
    from transformers import AutoConfig

    with explained(source):
        shape: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision_of(source, settings), trust_remote_code=settings.trust_remote_code
        )
    return shape


def revision_of(source: str, settings: ModelSection) -> str | None:
    """The configured revision, where `source` is the configured model."""
    return settings.revision if source == settings.name and not Path(source).is_dir() else None


def class_of(shape: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model that a config is of; None where Transformers has none of its own."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM._model_mapping.get(type(shape), None)
    first: type[PreTrainedModel] | None = found[0] if isinstance(found, (list, tuple)) else found
    return first


def unloaded(
    shape: PreTrainedConfig, dtype: torch.dtype | None = None, attention: str | None = None
) -> PreTrainedModel:
    """The model's modules on the meta device: shapes and types, no memory (below a second for 20 billion weights)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape, dtype=dtype or torch.float32, attn_implementation=attention or attention_known(shape)
        )
    model.tie_weights()
    return model


def attention_known(shape: PreTrainedConfig) -> str:
    return "sdpa" if getattr(class_of(shape), "_supports_sdpa", True) else "eager"


def counts_of(shape: PreTrainedConfig) -> Counts:
    """The parameters of a config's model; tied ones count once."""
    import torch

    model = unloaded(shape)
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    experts = sum(p.numel() for name, p in model.named_parameters() if is_expert(name, p))
    return Counts(parameter_count(model), experts, linear)


def is_expert(name: str, parameter: torch.Tensor) -> bool:
    """A matrix of all experts of a layer in one tensor: (experts, in, out)."""
    return ".experts." in name and parameter.dim() == 3


def parameter_count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
