"""LoRA on vLLM's CPU backend, quick: one product where the reference copies the adapter once for every token.

Owns this one replacement (vLLM 0.31, PunicaWrapperCPU.add_lora_linear). Must not know engines or requests.

    python -c "from lib.rollout_worker.adapters import use_one_adapter; help(use_one_adapter)"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def use_one_adapter() -> None:
    """Have engines of this process that hold a single adapter apply it by matrix products.

    vLLM's CPU reference looks up the matrices of every token's own adapter, which copies them token by token: answers
    take five times as long as without. With one place for adapters they are all the same.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    PunicaWrapperCPU.add_lora_linear = _instead_of(PunicaWrapperCPU.add_lora_linear)


def _instead_of(reference: Callable[..., None]) -> Callable[..., None]:
    def add_lora_linear(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **more: Any,
    ) -> None:
        """y (tokens, out) += scale * x (tokens, in) @ A.T @ B.T by slices; A (1, 1, rank, in), B (1, 1, out, rank)."""
        if any(a.shape[0] > 1 for a in lora_a_stacked):
            reference(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)
            return
        if wrapper.is_prefill and wrapper.no_lora:
            return
        outputs, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]).float()
        begin = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            low = (inputs @ a[0, 0].float().T) * scale
            outputs[:, begin : begin + size] += (low @ b[0, 0].float().T).to(outputs.dtype)
            begin += size

    return add_lora_linear
