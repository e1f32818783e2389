"""Quantized weights: MXFP4 checkpoints kept or dequantized, and 4-bit loading by bitsandbytes.

Owns how `model.quantization` and a checkpoint's own quantization go together, and what the machine lacks for it. Must
not know tasks.

    python -c "from lib.models.quantized import mxfp4_lacks; print(mxfp4_lacks())"
"""

from __future__ import annotations

import importlib.util
import logging
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from lib.config import ModelSection
from lib.models.errors import ModelError
from lib.models.machine import device
from lib.models.shape import STORED_MXFP4, Counts, counts_of, is_expert

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

Purpose = Literal["train", "adapter", "answer"]
"""What a model is loaded for: to be trained, to carry a trained adapter, or only to answer."""

Kept = Literal["none", "mxfp4", "dequantized", "4bit"]
"""How weights are held: as they are stored, in MXFP4, unpacked from MXFP4, or in 4 bits by bitsandbytes."""


def quant_method(shape: PreTrainedConfig) -> str:
    """The quantization that a checkpoint's config.json names; "" for none."""
    given: Any = getattr(shape, "quantization_config", None) or {}
    method = given.get("quant_method", "") if isinstance(given, dict) else given.quant_method
    return str(getattr(method, "value", method) or "")


def kept_as(source: str, shape: PreTrainedConfig, settings: ModelSection, purpose: Purpose) -> Kept:
    """How the weights will be held. Raises ModelError where what the config wants cannot be had here."""
    wanted, stored = settings.quantization, quant_method(shape)
    if wanted == "4bit":
        _check_4bit(source, stored, purpose)
        return "4bit"
    if stored != "mxfp4":
        if wanted == "mxfp4":
            raise ModelError(
                f"model.quantization mxfp4: {source} is stored in {stored or 'full precision'}, not in MXFP4: set it "
                f"to auto (notebook 5 exports a trained gpt-oss in MXFP4)"
            )
        return "none"
    if wanted == "none" or purpose == "train" or (purpose == "adapter" and wanted == "auto"):
        return "dequantized"
    lacks = mxfp4_lacks()
    if lacks and wanted == "mxfp4":
        raise ModelError(
            f"model.quantization mxfp4: {source} cannot be kept in MXFP4 here: {'; '.join(lacks)}. Set it to auto to "
            f"unpack its weights instead"
        )
    if lacks:
        logger.warning("model: %s cannot be kept in MXFP4 here (%s): unpacking its weights", source, "; ".join(lacks))
    return "dequantized" if lacks else "mxfp4"


def say_size(source: str, shape: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Dequantizing is never silent: what the weights take now, and what they took."""
    counts = counts_of(shape)
    logger.info(
        "model: %s is stored in MXFP4 (%.1f GB) and unpacked to %s (%.1f GB)",
        source,
        stored_bytes(counts) / 1e9,
        str(dtype).removeprefix("torch."),
        counts.total * dtype.itemsize / 1e9,
    )


def stored_bytes(counts: Counts) -> int:
    """Of an MXFP4 checkpoint: experts in 4 bits and their scales, all else in 16 bits."""
    return round(counts.experts * STORED_MXFP4 + (counts.total - counts.experts) * 2)


def loading_arguments(kept: Kept, dtype: torch.dtype) -> dict[str, Any]:
    """from_pretrained's arguments for weights that are held like this."""
    import torch

    if kept == "none":
        return {}
    # Straight to the device: a machine with a GPU need not have twice the room in its main memory.
    where = {"device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}}
    if kept == "4bit":
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if dtype == torch.float32 and torch.cuda.is_available() else dtype
        return where | {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        }
    from transformers.utils.quantization_config import Mxfp4Config

    return where | {"quantization_config": Mxfp4Config(dequantize=kept == "dequantized")}


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Unpacked experts in the type of all else: transformers 5.17 leaves them in bfloat16."""
    for name, parameter in model.named_parameters():
        if is_expert(name, parameter):
            parameter.data = parameter.data.to(dtype)


def mxfp4_lacks() -> list[str]:
    """What is missing here to compute with weights kept in MXFP4; [] = nothing (transformers 5.17's own conditions)."""
    import torch

    if device().type != "cuda":
        return ["it needs a GPU"]
    lacks = []
    if torch.cuda.get_device_capability() < (7, 5):
        lacks.append(
            f"{torch.cuda.get_device_name()} has a compute capability below 7.5: use a T4, A100, L4, H100, ..."
        )
    lacks += _lacks_package("triton", (3, 4), None)
    lacks += _lacks_package("kernels", (0, 16), (0, 17))
    return lacks


def _lacks_package(name: str, least: tuple[int, int], below: tuple[int, int] | None) -> list[str]:
    wanted = f"{name}>={least[0]}.{least[1]}" + (f",<{below[0]}.{below[1]}" if below else "")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return [f"{wanted} is not installed (ACCELERATOR=cuda make setup)"]
    version = tuple(int(part) for part in found.split(".")[:2])
    if version < least or (below and version >= below):
        return [f"{name} {found} is installed and {wanted} is needed (ACCELERATOR=cuda make setup)"]
    return []


def _check_4bit(source: str, stored: str, purpose: Purpose) -> None:
    if stored == "mxfp4":
        raise ModelError(
            f"model.quantization 4bit: {source} is stored in MXFP4, which has 4 bits already, and bitsandbytes does "
            f"not reach experts: set it to auto"
        )
    if stored and stored != "bitsandbytes":
        raise ModelError(f"model.quantization 4bit: {source} is quantized already ({stored}): set it to auto")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization 4bit: bitsandbytes is not installed; the CUDA lock has it: ACCELERATOR=cuda make setup "
            "on a machine with a GPU, or set it to auto"
        )
    if purpose == "train" and device().type != "cuda":
        raise ModelError(
            "model.quantization 4bit: bitsandbytes trains on a GPU only (without one it can answer): use a machine "
            "with a GPU (modal.gpu), or set it to auto"
        )
