"""What a training run takes against what the machine has: said, warned about or refused before anything is loaded.

Owns the rule and its words. Must not know how the estimate is made.

    python -c "from lib.memory.limits import machine; print(machine())"
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import WorkbenchError, models
from lib.config import Config
from lib.memory.estimate import GIB, Estimate, estimate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class MemoryLimitError(WorkbenchError, RuntimeError):
    """What cannot be made smaller by a smaller batch is larger than the machine's memory; the message says what can."""


class Machine(NamedTuple):
    """Memory that a model can have here, in bytes."""

    free: int
    kind: str
    """cuda or cpu."""

    @property
    def name(self) -> str:
        return "GPU memory" if self.kind == "cuda" else "memory"


def machine() -> Machine:
    """What is free here now: on the GPU where there is one, else in main memory, within the container's limit."""
    import torch

    if torch.cuda.is_available():
        return Machine(torch.cuda.mem_get_info()[0], "cuda")
    return Machine(main_memory(), "cpu")


def main_memory() -> int:
    """Bytes of main memory that are free, within the container's limit; very many where nothing says so."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    free = int(found[1]) * 1024 if found else sys.maxsize
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if not (limit.isdigit() and used.isdigit()):
        return free
    # A container's count has the pages of files in it, which go when they are needed.
    cached = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
    return min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def check(config: Config, shape: PreTrainedConfig, here: Machine | None = None, samples_here: bool = True) -> Estimate:
    """Say what training will take here, before anything is loaded.

    A warning with the knobs where that is more than there is. Raises MemoryLimitError only where weights, gradients and
    optimizer state alone are: those are counted, and no batch size helps; the rest is estimated, and may be too high.
    """
    here = here or machine()
    if not samples_here:  # the engines have machines, or shares of one, of their own
        config = config.as_served
    elif config.sampling.engine == "vllm" and here.kind == "cuda" and not config.sampling.vllm.server:
        here = here._replace(free=int(here.free * (1 - config.sampling.vllm.memory_share)))
    found = estimate(config, shape, here.kind)
    if found.fixed > here.free:
        knobs = [
            knob for knob in models.knobs_left("loading", config) if knob.startswith(("lora", "model.q", "a smal"))
        ]
        raise MemoryLimitError(
            f"training needs {gib(found.fixed)} for {told(found, fixed=True)}, and {gib(here.free)} of {here.name} "
            f"are free: no smaller batch mends that. {'; or '.join([*knobs, 'a machine with more memory (modal.gpu)'])}"
        )
    logger.info("memory: about %s of %s: %s", gib(found.peak), gib(here.free), told(found))
    if found.peak > here.free:
        phase = "loss" if found.loss >= found.sampling else "sampling"
        knobs = models.knobs_left(phase, config)
        fits = _fitting(config, found, here)
        logger.warning(
            "memory: training needs about %s while %s, and %s of %s are free. Turn, in this order: %s",
            gib(found.peak),
            "training on a batch" if phase == "loss" else "sampling",
            gib(here.free),
            here.name,
            "; ".join([*([fits] if fits else []), *knobs]),
        )
    return found


def told(found: Estimate, fixed: bool = False) -> str:
    """The parts in words, largest first."""
    parts = found._asdict()
    names = ("weights", "gradients", "optimizer", "framework") if fixed else tuple(parts)
    ordered = sorted(names, key=lambda name: -parts[name])
    return ", ".join(f"{name} {gib(parts[name])}" for name in ordered if parts[name] >= GIB / 200)


def _fitting(config: Config, found: Estimate, here: Machine) -> str:
    """The largest halved batch whose pass fits, in words; "" where none does, or where it is sampling that does not."""
    batch, factor, needed = config.training.batch, 1, found.loss
    while needed > here.free and batch % 2 == 0:
        batch, factor = batch // 2, factor * 2
        needed = found.fixed + (found.activations + max(found.working, found.logits)) // factor
    if factor == 1 or needed > here.free:
        return ""
    more = config.training.accumulation * factor
    return f"training.batch: {batch} with training.accumulation: {more} (about {gib(needed)})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"
