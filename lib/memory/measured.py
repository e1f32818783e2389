"""The memory of one real pass, which an estimate is held against.

Owns how it is measured. Must not know configs beyond lengths and batch, or what the machine has.

    python -c "from lib.memory.measured import dry_step; help(dry_step)"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dry_step(model: PreTrainedModel, config: Config) -> int:
    """Bytes that one real pass of the longest batch adds at its peak, forward and backward; gradients are then dropped.

    The model is left as it was. On a CPU it needs Linux (/proc). Raises what running out of memory raises.
    """
    import torch
    from peft import PeftModel
    from trl.trainer.utils import add_fused_lm_head

    length = config.sampling.prompt_limit + config.sampling.completion_limit
    ids = torch.ones((config.training.batch, length), dtype=torch.long, device=model.device)
    labels = ids.clone()
    labels[:, : config.sampling.prompt_limit] = -100
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    training, forward = model.training, whole.forward
    model.train()
    add_fused_lm_head(whole, outputs=("log_probs", "entropy"))
    try:
        with _Peak() as peak:
            with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
                said: Any = model(input_ids=ids, attention_mask=ids, labels=labels, fused_lm_head=True)
            said.log_probs.sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
        whole.forward = forward
        model.train(training)
    return peak.bytes


class _Peak:
    """The most memory held inside, above what was held before."""

    bytes = 0

    def __enter__(self) -> _Peak:
        import torch

        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # begins the high-water mark anew
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None  # Linux writes it for every process
    return int(found[1]) * 1024
