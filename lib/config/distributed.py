"""One actor and many rollout workers: keys and defaults of `distributed`, and of their containers (`modal.roles`).

Owns these keys and their defaults. Used where `backend: distributed`. The workers' engines take memory and length from
`sampling.vllm`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lib.config.section import Count, Positive, Section
from lib.gpu import parse_gpu


class DistributedSection(Section):
    hosts: Literal["auto", "local", "modal"] = "auto"
    """Where actor and workers run: processes of the machine that the training runs on, or a Modal container each
    (`modal.roles`). auto = containers where the training itself was sent to Modal, else processes."""
    workers: Annotated[int, Field(ge=1, le=1000)] = 2
    """Rollout workers; each is a vLLM engine in a process, or a container, of its own."""
    sync_weights_every: Count = 1
    """Optimizer steps between two syncs; a sync falls on the first end of a generation batch at or after them."""
    sync_method: Literal["lora", "reload", "volume", "checkpoint"] = "reload"
    """How weights reach a worker; one that cannot prove them gets them by the next of reload, volume, checkpoint."""
    overlap: Annotated[int, Field(ge=0, le=100)] = 1
    """Generation batches that may be sampled ahead of the one trained on; 0 = sampling and training alternate."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps that the oldest weights of a batch may be behind when it is trained on; older turns are generated
    anew. None = what overlap and sync_weights_every imply."""
    tolerance: Positive | None = None
    """Largest |difference of log-probabilities| with which a worker proves its weights; None = by the weights' type."""
    in_flight: Count = 32
    """Rollouts that one worker generates at a time; idle workers take the next group."""
    attempts: Count = 3
    """Workers that a rollout is tried on before it counts as unscored."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times that a worker is started again without having served from one sync to the next in between."""
    start_deadline: Positive = 900.0
    """Seconds until a worker or the actor is ready."""
    turn_deadline: Positive = 600.0
    """Seconds for one turn; a worker that takes longer counts as hung."""
    sync_deadline: Positive = 600.0
    """Seconds until a worker has loaded new weights, and until the actor has written them."""
    canary_deadline: Positive = 60.0
    """Seconds for a worker's proof."""
    step_deadline: Positive = 7200.0
    """Seconds for one generation batch's optimizer steps; an actor that takes longer counts as hung."""


class RolesSection(Section):
    """The containers of actor and workers on Modal. They decide nothing about the result, so a run may change them."""

    actor_gpu: str = "A100-40GB"
    worker_gpu: str = "A10"
    """One GPU for each worker; `none` = a CPU."""
    cpu: Annotated[float, Field(ge=0.125, le=64)] = 4.0
    """Physical cores of each."""
    memory: Annotated[float, Field(ge=0.125, le=336)] = 32.0
    """GiB of each."""
    idle_seconds: Annotated[int, Field(ge=2, le=3600)] = 300
    """How long a container waits that nobody asks or watches any more, before Modal ends it."""

    @field_validator("actor_gpu", "worker_gpu")
    @classmethod
    def _one_gpu(cls, text: str) -> str:
        gpu = parse_gpu(text)
        if gpu and gpu.number > 1:
            raise ValueError(f"{text}: a role uses one GPU: write {gpu.name}; distributed.workers makes more of them")
        return str(gpu) if gpu else text
