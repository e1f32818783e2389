"""vLLM on a processor, with weights that verl can write again and again: a general plug-in of vLLM.

Owns which kernels the linear layers use there: vLLM's own pack the weights once and forget them, and verl's next sync
finds nothing to write to. vLLM knows it by the environment's entry points (lib/verl/environment.py). Must not know
verl.

    VERL_PLATFORM=cpu build/verl/bin/python -c "from vllm.plugins import load_general_plugins; load_general_plugins()"
"""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    if os.environ.get("VERL_PLATFORM") != "cpu":
        return
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _keep_weights


def _keep_weights(layer: Any, remove_weight: bool) -> None:
    import torch

    layer.cpu_linear = torch.nn.functional.linear
