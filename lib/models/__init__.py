"""Loading policies: which folder or id, device, dtype, attention, LoRA, and what to turn when memory runs out.

Owns everything between a config and a loaded model. Must not know tasks.

    python -c "from lib.models import describe_device; print(describe_device())"
"""

from lib.models.errors import ModelError
from lib.models.loading import (
    STARTER,
    check_held,
    download,
    load_adapter,
    load_model,
    load_tokenizer,
    resolve_model,
    same_base,
)
from lib.models.lora import expert_parameters, lora_config, router_parameters
from lib.models.machine import (
    OUT_OF_MEMORY_KNOBS,
    attention_of,
    check_liger,
    describe_device,
    device,
    gradient_checkpointing,
    is_out_of_memory,
    knobs_left,
    out_of_memory_advice,
    peak_memory,
    torch_dtype,
)
from lib.models.quantized import Purpose, mxfp4_lacks, quant_method
from lib.models.shape import STORED_MXFP4, Counts, counts_of, load_shape, parameter_count, unloaded

__all__ = [
    "OUT_OF_MEMORY_KNOBS",
    "STARTER",
    "STORED_MXFP4",
    "Counts",
    "ModelError",
    "Purpose",
    "attention_of",
    "check_held",
    "check_liger",
    "counts_of",
    "describe_device",
    "device",
    "download",
    "expert_parameters",
    "gradient_checkpointing",
    "is_out_of_memory",
    "knobs_left",
    "load_adapter",
    "load_model",
    "load_shape",
    "load_tokenizer",
    "lora_config",
    "mxfp4_lacks",
    "out_of_memory_advice",
    "parameter_count",
    "peak_memory",
    "quant_method",
    "resolve_model",
    "router_parameters",
    "same_base",
    "torch_dtype",
    "unloaded",
]
