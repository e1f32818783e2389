"""verl on Ray: keys and defaults of `verl`, and what of the other sections verl cannot do.

Owns these keys and their defaults. Used where `backend: verl`; all else that verl is told comes from the sections that
the other backends read (lib/verl/overrides.py). The Ray that it runs on is this machine's own, or a cluster.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from pydantic import field_validator

from lib.config.section import Count, Section
from lib.config.training import LoraSection, ModelSection, SamplingSection, TrainingSection

_OVERRIDE = re.compile(r"(\+{0,2}[\w./@:-]+=.*|~[\w./@:-]+(=.*)?)", re.DOTALL)
_ADDRESS = re.compile(r"auto|(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")


class VerlSection(Section):
    gpus: Count | None = None
    """GPUs of one node; None = those that are here, or those that `modal.gpu` asks for where training is sent there.
    Where there are none, so many processes on the processor: slow, for tests."""
    nodes: Count = 1
    """Machines with so many GPUs each: of the cluster at `ray_address`, or containers of Modal, where training is sent
    there: they make a cluster of their own."""
    tensor_parallel: Count = 1
    """GPUs that one vLLM engine spreads a model over."""
    ray_address: str = ""
    """HOST:PORT of a running Ray cluster's head, or `auto` for the one of this machine; "" = a Ray of the run's own."""
    python: str = ""
    """The interpreter that has verl; "" = this one, or the one of `make verl`."""
    overrides: tuple[str, ...] = ()
    """Keys of verl itself, as Hydra takes them: key=value, +key=value, ~key. They are stronger than all else."""

    @field_validator("overrides")
    @classmethod
    def _as_hydra_takes_them(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [text for text in overrides if not _OVERRIDE.fullmatch(text)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r}: write key=value for a key that verl has, +key=value to add one, ~key to remove one: "
                f"trainer.total_training_steps=1, for example"
            )
        return overrides

    @field_validator("ray_address")
    @classmethod
    def _an_address(cls, address: str) -> str:
        if address.startswith("ray://"):
            raise ValueError(
                f"{address}: verl joins a cluster itself and is no Ray client: run on one of the cluster's machines, "
                f"and give HOST:PORT of its head (6379 is Ray's usual port) or auto"
            )
        if address and not _ADDRESS.fullmatch(address):
            raise ValueError(f'{address!r}: give HOST:PORT of a Ray cluster\'s head, auto, or "" for one of your own')
        return address


def not_for_verl(
    training: TrainingSection, lora: LoraSection, model: ModelSection, sampling: SamplingSection
) -> Iterator[str]:
    """What verl cannot do of these sections, each with what to do instead."""
    yield from _of_the_step(training)
    yield from _of_the_loss(training)
    if lora.enabled and lora.dropout:
        yield "verl's adapters have no dropout: set lora.dropout to 0"
    if model.quantization in ("mxfp4", "4bit"):
        yield f"verl trains unpacked weights: set model.quantization to auto, not {model.quantization}"
    if sampling.vllm.server:
        yield "verl starts its own vLLM engines: leave sampling.vllm.server out"


def _of_the_step(training: TrainingSection) -> Iterator[str]:
    passes, accumulation = training.passes_per_generation, training.accumulation
    if passes % accumulation:
        yield (
            f"one sampling of verl feeds whole optimizer steps, and steps_per_generation {passes} is no multiple of "
            f"accumulation {accumulation}: set training.steps_per_generation to {accumulation}, or leave it out"
        )
        return
    completions, size = training.batch * accumulation, training.group_size
    if completions % size:
        step = size // math.gcd(training.batch, size)
        yield (
            f"an optimizer step of verl trains whole groups, and batch x accumulation = {training.batch} x "
            f"{accumulation} = {completions} is not divisible by group_size {size}: set training.accumulation to a "
            f"multiple of {step}"
        )
    per_generation = passes * training.iterations // accumulation
    if training.steps != -1 and training.steps % per_generation:
        yield (
            f"one sampling feeds {per_generation} optimizer steps, and verl counts samplings: set training.steps to a "
            f"multiple of {per_generation}, not {training.steps}"
        )
    if training.steps == -1 and training.epochs != int(training.epochs):
        yield f"verl counts whole epochs, not {training.epochs:g}: set training.steps instead"


def _of_the_loss(training: TrainingSection) -> Iterator[str]:
    if training.loss_type == "bnpo":
        yield (
            "verl weighs tokens over the whole optimizer step, never over one pass: set training.loss_type to dapo "
            "(the same where accumulation is 1)"
        )
    if training.loss_type == "luspo":
        yield "verl 0.9.1 has no loss_type luspo: set training.loss_type to dapo, grpo, dr_grpo or cispo"
    if training.reward_scaling == "batch":
        yield "verl scales rewards by their group or not at all: set training.reward_scaling to group or none"
