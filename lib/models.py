"""Loading policies: which folder or id, device, dtype, attention, LoRA, and what to turn when memory runs out.

Owns everything between a config and a loaded model. Must not know tasks.

    python -c "from lib.models import describe_device; print(describe_device())"
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import WorkbenchError
from lib.config import Config, LoraSection, ModelSection
from lib.places import locate
from lib.task import Row

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STARTER = "starter"
_TINY = 20_000_000
"""Parameters below which gradient checkpointing costs time and saves nothing worth having."""

OUT_OF_MEMORY_KNOBS = (
    ("loss", "training.batch down, with training.accumulation up by the same factor"),
    ("sampling", "training.batch down (completions at once: batch x steps_per_generation)"),
    ("both", "sampling.completion_limit down"),
    ("loss", "model.gradient_checkpointing: true"),
    ("loss", "model.liger: true (GPU)"),
    ("both", "lora.enabled: true (no optimizer state for the whole model)"),
    ("both", "a smaller model.name"),
)
"""(where it helps, what to turn), in order of effect."""


class ModelError(WorkbenchError, RuntimeError):
    """The model cannot be loaded or used as asked; the message says what to change."""


def resolve_model(config: Config, rows: Sequence[Row]) -> str:
    """The Hugging Face id or folder of the base policy; makes (or finds) the starter policy where that is asked for."""
    if config.model.name != STARTER:
        local = locate(config.model.name)
        return str(local) if local.is_dir() else config.model.name
    from lib.starter import starter_path

    seed = config.training.seed if config.starter.seed is None else config.starter.seed
    cache = locate(config.paths.cache) / "starter"
    return str(starter_path(rows, cache, kind=config.starter.kind, steps=config.starter.steps, seed=seed))


def load_tokenizer(source: str, settings: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, padded on the left; refuses one without a chat template."""
    from transformers import AutoTokenizer

    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=_revision(source, settings),
            trust_remote_code=settings.trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{source} has no chat template: use the instruct version of this model, or add a template to it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, settings: ModelSection, train_all: bool = False) -> PreTrainedModel:
    """The causal language model of a folder or Hub id, on this machine's device, in evaluation mode.

    `train_all`: all weights are to be trained, so `dtype: auto` keeps them in float32: the small updates of a usual
    learning rate vanish in bfloat16 weights (an adapter's weights are float32 in any case).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # headless logs are plain lines
    dtype, attention = torch_dtype(settings, train_all), attention_of(settings)
    logger.info(
        "model: loading %s (%s, %s attention) on %s",
        _short(source),
        str(dtype).removeprefix("torch."),
        attention,
        describe_device(),
    )
    with _explained(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=_revision(source, settings),
            trust_remote_code=settings.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
        )
    logger.info("model: %.2f million parameters", parameter_count(model) / 1e6)
    return model.to(device()).eval()  # type: ignore[arg-type, no-any-return]


def load_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with a LoRA adapter on top; refuses one that was made for another base."""
    from peft import PeftConfig, PeftModel

    with _explained(adapter):
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    name = str(model.name_or_path)
    same_starter = bool(base) and Path(str(base)).name == Path(name).name and Path(name).name.startswith("starter-")
    if base and base != name and not same_starter:
        raise ModelError(f"adapter {adapter} was trained on {base}, not on {name}: set model.name to its base")
    with _explained(adapter):
        return PeftModel.from_pretrained(model, adapter).eval()  # type: ignore[return-value]


def lora_config(settings: LoraSection, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's config: all linear layers by default, plus the experts' bare tensors, which `all-linear` leaves out."""
    if not settings.enabled:
        return None
    from peft import LoraConfig

    experts = expert_parameters(model) if settings.expert_parameters == "auto" else list(settings.expert_parameters)
    if experts and settings.dropout:
        raise ModelError(
            f"lora.dropout must be 0 with expert parameters ({', '.join(experts)}): PEFT cannot drop out of them"
        )
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        target_parameters=experts or None,
        task_type="CAUSAL_LM",
    )


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names (from the layer on) of 3-D expert weights (experts, in, out) of mixture-of-experts models."""
    found = {
        name.split(".", 3)[-1] if name.startswith("model.layers.") else name
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    }
    return sorted(found)


def parameter_count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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


def attention_of(settings: ModelSection) -> str:
    """The attention implementation; FlashAttention only where it is installed and a GPU is there."""
    if settings.attention != "flash_attention_2":
        return "sdpa" if settings.attention == "auto" else settings.attention
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


def peak_memory() -> str:
    """The most memory that this process held: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory"


def out_of_memory_advice(phase: str, config: Config) -> str:
    """What happened and which knobs to turn, in order of effect in this phase ("sampling", "loss" or any other)."""
    import torch

    turned = {
        "model.gradient_checkpointing": config.model.gradient_checkpointing is True,
        "model.liger": config.model.liger or not torch.cuda.is_available(),
        "lora.enabled": config.lora.enabled,
    }
    knobs = [
        knob
        for where, knob in OUT_OF_MEMORY_KNOBS
        if (where in (phase, "both") or phase not in ("sampling", "loss")) and not turned.get(knob.split(":")[0])
    ]
    return f"out of memory while {phase}: peak {peak_memory()}. Turn, in this order: " + "; ".join(knobs) + "."


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


class _explained:
    """Hub and file errors as one sentence with a remedy."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, (OSError, ValueError)) or isinstance(error, ModelError):
            return
        text = str(error)
        if "gated" in text.lower() or "401" in text or "403" in text:
            advice = f"it is gated: accept its terms on https://huggingface.co/{self.source} and set HF_TOKEN"
        elif "offline" in text.lower() or "connect" in text.lower() or "couldn't" in text.lower():
            advice = (
                "it is neither a folder here nor reachable on the Hub: check spelling and network, or give a folder"
            )
        else:
            advice = text.splitlines()[0] if text else type(error).__name__
        raise ModelError(f"cannot load {self.source}: {advice}") from error


def _revision(source: str, settings: ModelSection) -> str | None:
    return settings.revision if source == settings.name else None


def _short(source: str) -> str:
    return Path(source).name if Path(source).is_dir() else source
