"""What this machine offers a model: device, dtype, attention, and what to turn when its memory runs out.

Owns the choices that depend on hardware. Must not know tasks, or what a model is asked.

    python -c "from lib.models.machine import describe_device; print(describe_device())"
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from typing import TYPE_CHECKING

from lib.config import Config, ModelSection
from lib.models.errors import ModelError
from lib.models.shape import class_of, parameter_count

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_TINY = 20_000_000
"""Parameters below which gradient checkpointing costs time and saves nothing worth having."""

OUT_OF_MEMORY_KNOBS = (
    ("loss", "training.batch down, with training.accumulation up by the same factor"),
    ("sampling", "training.batch down (completions at once: batch x steps_per_generation)"),
    ("both", "sampling.completion_limit down"),
    ("loss", "model.gradient_checkpointing: true"),
    ("loss", "model.liger: true (GPU)"),
    ("both", "lora.enabled: true (no optimizer state for the whole model)"),
    ("both", "model.quantization: 4bit (GPU; a quarter of the base's weights)"),
    ("both", "a smaller model.name"),
)
"""(where it helps, what to turn), in order of effect."""


def device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU ({torch.get_num_threads()} threads)"
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"


def torch_dtype(settings: ModelSection, train_all: bool = False) -> torch.dtype:
    import torch

    if settings.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and not train_all else torch.float32
    if settings.dtype == "float16" and not torch.cuda.is_available():
        raise ModelError("model.dtype float16 needs a GPU: use float32 or bfloat16 on a CPU")
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def attention_of(settings: ModelSection, shape: PreTrainedConfig | None = None) -> str:
    """The attention implementation: FlashAttention only where it is installed and a GPU is there.

    `shape`: the model's config; auto is eager for an architecture without sdpa (gpt-oss, for its attention sinks).
    """
    if settings.attention == "auto":
        return "sdpa" if shape is None or getattr(class_of(shape), "_supports_sdpa", True) else "eager"
    if settings.attention == "sdpa" and shape is not None and not getattr(class_of(shape), "_supports_sdpa", True):
        raise ModelError(f"model.attention sdpa: {shape.model_type} has no such attention: set it to auto")
    if settings.attention != "flash_attention_2":
        return settings.attention
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise ModelError(
            "model.attention flash_attention_2 is not installed here: set it to sdpa (as quick on short prompts), or "
            "build it on a GPU machine with FLASH_ATTENTION=1 make setup"
        )
    return settings.attention


def gradient_checkpointing(settings: ModelSection, model: PreTrainedModel) -> bool:
    """What the config says; by default on for models whose activations are worth saving, on a GPU."""
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    return device().type == "cuda" and parameter_count(model) > _TINY


def check_liger(settings: ModelSection) -> None:
    """Raises ModelError where model.liger is set and cannot be had here."""
    if settings.liger and device().type != "cuda":
        raise ModelError("model.liger needs a GPU (its kernels are Triton): set it to false")
    if settings.liger and importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("model.liger: liger-kernel is not installed: ACCELERATOR=cuda make setup, or set it to false")


def peak_memory() -> str:
    """The most memory that this process held: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory"


def knobs_left(phase: str, config: Config) -> list[str]:
    """What can still be turned to save memory in a phase ("sampling", "loss" or any other), in order of effect."""
    on_cpu = device().type != "cuda"
    turned = {
        "model.gradient_checkpointing": config.model.gradient_checkpointing is True,
        "model.liger": config.model.liger or on_cpu,
        "lora.enabled": config.lora.enabled,
        "model.quantization": config.model.quantization == "4bit" or not config.lora.enabled or on_cpu,
    }
    return [
        knob
        for where, knob in OUT_OF_MEMORY_KNOBS
        if (where in (phase, "both") or phase not in ("sampling", "loss")) and not turned.get(knob.split(":")[0])
    ]


def out_of_memory_advice(phase: str, config: Config) -> str:
    """What happened and which knobs to turn, in order of effect in this phase ("sampling", "loss" or any other)."""
    knobs = "; ".join(knobs_left(phase, config))
    return f"out of memory while {phase}: peak {peak_memory()}. Turn, in this order: {knobs}."


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
