"""The bytes of a training run by what they are for, counted and estimated on the meta device.

Weights, gradients and optimizer state are counted on the model's own modules, built on the meta device with its
adapter. Activations are what one and two layers' forward passes really keep for backward there
(torch.autograd.graph.saved_tensors_hooks), continued to all layers. Figures are of the longest batch that the config
allows: prompts and answers at their limits. Must not know what the machine has.

    python -c "from lib.memory.estimate import estimate; help(estimate)"
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lib import models
from lib.config import Config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantization: blocks of 64, their scales in 8 bits and blocks of 256 (QLoRA,
Dettmers et al. 2023)."""
FRAMEWORK = {"cuda": int(0.8 * GIB), "cpu": int(0.6 * GIB)}
"""Bytes of a process that has loaded no model: CUDA's context and libraries, or Python's and torch's."""
_TILE = 4096
"""Tokens of which TRL 1.16 computes log-probabilities at once, with as many logits as _TILE_VOCABULARY, in float32."""
_TILE_VOCABULARY = 32768


class Estimate(NamedTuple):
    """Bytes by what they are for."""

    weights: int
    """Of the base, the adapter, and a reference model where there is one."""
    gradients: int
    optimizer: int
    activations: int
    """What a pass of training.batch sequences keeps for backward."""
    working: int
    """Beside that, while backward goes through one layer."""
    logits: int
    """Beside that, while the loss is computed."""
    cache: int
    """Keys and values of what is sampled at once."""
    sampled: int
    """Logits of what is sampled at once."""
    framework: int

    @property
    def fixed(self) -> int:
        """What no smaller batch or shorter answer changes."""
        return self.weights + self.gradients + self.optimizer + self.framework

    @property
    def loss(self) -> int:
        return self.fixed + self.activations + max(self.working, self.logits)

    @property
    def sampling(self) -> int:
        return self.fixed - self.gradients + self.cache + self.sampled

    @property
    def peak(self) -> int:
        return max(self.loss, self.sampling)


def estimate(config: Config, shape: PreTrainedConfig, kind: str) -> Estimate:
    """What training by `config` takes on a GPU (kind cuda) or without one (cpu). `shape`: the model's config.

    Nothing is loaded; a second for a model of 20 billion weights.
    """
    import torch

    full = not config.lora.enabled
    dtype = _dtype(config, kind, full)
    model = models.unloaded(shape, dtype, _attention(config, shape))
    base = models.parameter_count(model)
    trained = base if full else _adapter_count(config, model)
    held = _weight_bytes(config, shape, dtype)
    size = 2 if config.model.quantization == "4bit" else 4  # TRL trains a QLoRA's adapter in bfloat16
    compute = torch.bfloat16 if kind == "cuda" and dtype != torch.float16 else dtype
    casts = trained * compute.itemsize if compute.itemsize < size else 0  # autocast keeps what it has cast
    length = config.sampling.prompt_limit + config.sampling.completion_limit
    kept, working = _activations(config, shape, compute, length, kind == "cuda")
    vocabulary = shape.get_text_config().vocab_size
    at_once = config.training.batch * config.training.passes_per_generation
    samples_here = config.sampling.engine != "vllm"  # what vLLM takes beside is off what there is
    return Estimate(
        weights=held + (0 if full else trained * size) + (held if full and config.training.beta else 0),
        gradients=trained * size,
        optimizer=2 * trained * size,  # AdamW: mean and variance
        activations=kept + casts,
        working=working,
        logits=_tiles(config, vocabulary, length, kind),
        cache=at_once * _cache(shape, compute.itemsize, length) * samples_here,
        sampled=3 * at_once * vocabulary * 4 * samples_here,  # raw, filtered, and as probabilities, in float32
        framework=FRAMEWORK[kind],
    )


def _dtype(config: Config, kind: str, full: bool) -> torch.dtype:
    import torch

    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    return torch.bfloat16 if kind == "cuda" and not full else torch.float32


def _attention(config: Config, shape: PreTrainedConfig) -> str:
    """FlashAttention keeps what sdpa keeps, and has no meta implementation."""
    wanted = config.model.attention
    return models.attention_of(
        config.model.model_copy(update={"attention": "auto" if "flash" in wanted else wanted}), shape
    )


def _adapter_count(config: Config, model: PreTrainedModel) -> int:
    """Weights of the LoRA: those of linear layers as PEFT makes them, those of bare tensors by their shapes."""
    settings = models.lora_config(config.lora, model)
    assert settings is not None
    rank, bare = config.lora.r, settings.target_parameters or []
    linear = _with_linear_adapter(config, model)
    return sum(p.numel() for p in linear.parameters() if p.requires_grad) + sum(
        rank * (p.shape[-1] + p.shape[-2]) * (p.shape[0] if p.dim() == 3 else 1) for p in _bare(model, bare)
    )


def _bare(model: PreTrainedModel, names: Sequence[str]) -> list[torch.Tensor]:
    """Tensors of all layers that an adapter changes by name. PEFT may have put a wrapper around their modules."""
    return [p for name, p in model.named_parameters() if any(name.endswith(one) for one in names)]


def _with_linear_adapter(config: Config, model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter, but for bare tensors: what PEFT does with those, the meta device cannot."""
    from peft import get_peft_model

    settings = models.lora_config(config.lora, model)
    assert settings is not None
    settings.target_parameters = None
    return get_peft_model(model, settings)  # type: ignore[return-value]


def _weight_bytes(config: Config, shape: PreTrainedConfig, dtype: torch.dtype) -> int:
    counts = models.counts_of(shape)
    if config.model.quantization == "4bit":  # experts stay as they are; norms, embeddings and head become float32
        rest = counts.total - counts.linear - counts.experts
        return round(counts.linear * NF4 + counts.experts * dtype.itemsize + rest * 4)
    return counts.total * dtype.itemsize


def _activations(
    config: Config, shape: PreTrainedConfig, dtype: torch.dtype, length: int, on_gpu: bool
) -> tuple[int, int]:
    """Bytes that a pass of the longest batch keeps for backward, and what backward through one layer needs beside.

    A layer's bare tensors with an adapter (experts) are kept as sums of both, and their gradients are whole ones.
    """
    text, batch = shape.get_text_config(), int(config.training.batch)
    layers = int(text.num_hidden_layers)
    one, two = (_kept(config, shape, count, dtype, length) for count in (1, 2))
    of_layer, of_rest = batch * (two - one), batch * max(0, 2 * one - two)
    summed = _summed(config, shape) * dtype.itemsize // layers
    asked = config.model.gradient_checkpointing
    if asked if asked is not None else on_gpu:
        inputs = batch * length * int(text.hidden_size) * dtype.itemsize
        return of_rest + layers * inputs, 2 * of_layer + 3 * summed
    return of_rest + layers * (of_layer + summed), of_layer + 2 * summed


def _summed(config: Config, shape: PreTrainedConfig) -> int:
    """Weights of all bare tensors that the adapter changes."""
    model = models.unloaded(shape)
    settings = models.lora_config(config.lora, model)
    return sum(p.numel() for p in _bare(model, settings.target_parameters or [])) if settings else 0


def _kept(config: Config, shape: PreTrainedConfig, layers: int, dtype: torch.dtype, length: int) -> int:
    """Bytes that a forward pass of one sequence through so many layers keeps for backward, without the head."""
    import torch

    small = copy.deepcopy(shape)
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:layers])
    attention = _attention(config, shape)
    # The meta device multiplies grouped matrices (experts) in bfloat16 only.
    runs_in = torch.bfloat16 if models.counts_of(small).experts else dtype
    model = models.unloaded(small, runs_in, attention)
    if config.lora.enabled:
        model = _with_linear_adapter(config, model).to(runs_in).get_base_model()  # type: ignore[arg-type]
    model.train()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    scores = text.num_attention_heads * length * length

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Of sdpa the meta device knows the plain way alone, which keeps the scores; the usual ones do not.
        if storage._cdata not in weights and not (attention == "sdpa" and tensor.numel() == scores):
            kept[storage._cdata] = storage
        return tensor

    # A ready mask: nothing looks into it.
    mask = torch.ones((1, 1, length, length), dtype=torch.bool if attention == "sdpa" else runs_in, device="meta")
    embedded = torch.zeros((1, length, text.hidden_size), dtype=runs_in, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()) * dtype.itemsize // runs_in.itemsize


def _tiles(config: Config, vocabulary: int, length: int, kind: str) -> int:
    """TRL's logits of the loss: a tile of them at a time, in float32; without Triton in nine copies, for all tokens."""
    tokens = config.training.batch * (config.sampling.completion_limit if kind == "cuda" else length)
    tile = min(_TILE, tokens) * min(vocabulary, _TILE_VOCABULARY) * 4
    return tile * (2 if kind == "cuda" else 9)


def _cache(shape: PreTrainedConfig, size: int, length: int) -> int:
    """Bytes of the keys and values of one sequence in Transformers' generation."""
    text = shape.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or length
    tokens = sum(min(length, window) if kind == "sliding_attention" else length for kind in kinds)
    return int(2 * tokens * heads * width * size)
