"""How verl divides what is sampled: into steps, optimizer steps and passes of one GPU; what an epoch leaves unused.

Owns that arithmetic, and the numbers that would work where it does not come out. Must not know verl's keys.

    python -c "from lib.verl.batches import describe_epoch; help(describe_epoch)"
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lib.config import Config
from lib.verl.errors import VerlError


class Batches(NamedTuple):
    """How verl divides what one sampling brings."""

    prompts: int
    """Of one sampling: verl's training step, data.train_batch_size."""
    mini: int
    """Prompts of one optimizer step."""
    micro: int
    """Completions in one forward and backward pass on one GPU."""


def batches(config: Config, size: int) -> Batches:
    """The batches of this config on `size` GPUs in all. Raises VerlError with what would work."""
    training = config.training
    group = training.group_size
    completions = training.batch * training.accumulation
    if completions % size:
        step = math.lcm(group, size) // math.gcd(training.batch, math.lcm(group, size))
        fitting = [number for number in range(1, completions + 1) if completions % number == 0][:12]
        nearest = sorted({max(step, training.accumulation // step * step), (training.accumulation // step + 1) * step})
        raise VerlError(
            f"an optimizer step trains batch x accumulation = {training.batch} x {training.accumulation} = "
            f"{completions} completions, and {size} GPUs cannot share them evenly: set training.accumulation to "
            f"{' or '.join(map(str, nearest))} (groups of {group} on {size} GPUs), or train on "
            f"{', '.join(map(str, fitting))} GPUs"
        )
    share = completions // size
    micro = max(number for number in range(1, min(training.batch, share) + 1) if share % number == 0)
    return Batches(prompts_of(config), completions // group, micro)


def check_fit(config: Config, size: int) -> None:
    """Raises VerlError where `size` GPUs in all cannot share an optimizer step, or vLLM's engines, evenly."""
    batches(config, size)
    parallel = config.verl.tensor_parallel
    if size % parallel:
        fitting = [str(number) for number in range(1, size + 1) if size % number == 0]
        raise VerlError(
            f"verl.tensor_parallel {parallel} does not divide {size} GPUs: set it to {' or '.join(fitting)}"
        )


def steps(config: Config, rows: int) -> int:
    """verl's training steps (samplings) of a run over so many rows. Raises VerlError where a step needs more."""
    training = config.training
    prompts = prompts_of(config)
    if prompts > rows:
        raise VerlError(
            f"one step takes batch x steps_per_generation / group_size = {prompts} prompts, and there are {rows} rows: "
            f"verl would not train at all. Set training.batch or training.accumulation down"
        )
    if training.steps != -1:
        return training.steps // config.steps_per_batch
    return rows // prompts * int(training.epochs)


def describe_epoch(config: Config, rows: int) -> str:
    """What an epoch of verl takes of the rows, and what it leaves unused: to be said before launch."""
    prompts = prompts_of(config)
    whole, rest = divmod(rows, prompts)
    several = "s" if whole > 1 else ""
    text = f"verl takes {prompts} prompts a step: an epoch of {rows} rows is {whole} step{several}"
    if not rest:
        return f"{text}, and uses all of them"
    return f"{text} and leaves {rest} rows unused (others in every epoch: they are shuffled)"


def prompts_of(config: Config) -> int:
    """Prompts of one sampling: verl's training step."""
    return config.training.batch * config.training.passes_per_generation // config.training.group_size
