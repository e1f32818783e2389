"""The numbers of a distributed training: what a batch is, how far sampling may run ahead, how old weights may be.

Owns what follows from the config in these terms. Must not know files, roles or clocks.

    python -c "from lib.config import load_config; from lib.orchestrator.plan import Plan; \
               print(Plan.of(load_config('configs/decisions.yaml')))"
"""

from __future__ import annotations

from typing import NamedTuple

from lib.config import Config


class Plan(NamedTuple):
    group: int
    """Completions per prompt."""
    prompts: int
    """Of one generation batch."""
    steps: int
    """Optimizer steps that one batch feeds."""
    passes: int
    """Forward and backward passes that one batch feeds."""
    overlap: int
    """Batches that may be sampled ahead of the one that is trained on."""
    sync_every: int
    """Optimizer steps."""
    save_every: int
    """Optimizer steps."""
    staleness: int
    """Optimizer steps that a turn's weights may be behind when it is trained on, and no more."""

    @classmethod
    def of(cls, config: Config) -> Plan:
        training, ours = config.training, config.distributed
        implied = ours.overlap * config.steps_per_batch + config.sync_lag
        return cls(
            group=training.group_size,
            prompts=training.batch * training.passes_per_generation // training.group_size,
            steps=config.steps_per_batch,
            passes=training.passes_per_generation * training.iterations,
            overlap=ours.overlap,
            sync_every=ours.sync_weights_every,
            save_every=training.save_steps,
            staleness=implied if ours.max_staleness is None else ours.max_staleness,
        )

    @property
    def completions(self) -> int:
        """Of one generation batch."""
        return self.group * self.prompts

    def batches_left(self, steps_left: int) -> int:
        """Generation batches that so many optimizer steps still need."""
        return -(-steps_left // self.steps)
