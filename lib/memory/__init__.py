"""How much memory training will take, before anything is loaded: from config.json and the run's config alone.

Owns the estimate, what the machine has, and which knob to turn by how much. Must not know tasks or trainers.

    python -m lib.memory configs/decisions_gpt_oss.yaml
"""

from lib.memory.estimate import Estimate, estimate
from lib.memory.limits import Machine, MemoryLimitError, check, machine, told
from lib.memory.measured import dry_step

__all__ = ["Estimate", "Machine", "MemoryLimitError", "check", "dry_step", "estimate", "machine", "told"]
