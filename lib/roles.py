"""What the distributed roles say to each other: plain values, and what each role can be asked.

Owns the contract between orchestrator, actor and rollout workers; all of it is JSON on the wire. Must not know torch,
vLLM, tasks, or where a role runs.

    python -c "from lib.roles import Sampling; print(Sampling(max_tokens=8))"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from lib import WorkbenchError

Method = Literal["lora", "reload", "volume", "checkpoint"]
"""How weights reach a worker: an adapter swapped; weights loaded in place; the engine made anew from a folder of
weights; the same from a whole saved model."""

FALLBACK: dict[Method, Method | None] = {
    "lora": "reload",
    "reload": "volume",
    "volume": "checkpoint",
    "checkpoint": None,
}
"""What is tried next where a worker cannot prove that it holds the weights."""


class Sampling(NamedTuple):
    """How a turn is sampled; log-probabilities that come back are of this distribution."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    end_ids: tuple[int, ...] = ()
    """Tokens that end a turn; the sampled end token is part of the output."""
    seed: int | None = None


class Sampled(NamedTuple):
    """One turn's tokens."""

    output_ids: list[int]
    logprobs: list[float]
    """Of the tokens sampled, natural logarithm, one each."""
    stop: Literal["stop", "length"]
    version: int
    """Of the weights that sampled all of it: a sync waits for turns that have begun."""


class Release(NamedTuple):
    """One version of the weights, published whole: `folder` holds sync_manifest.json, written last."""

    version: int
    step: int
    """Optimizer steps that these weights have seen."""
    method: Method
    folder: str
    hash: str
    """Of its manifest, over every tensor: what lies in the folder now may have been written by another process."""


class Canary(NamedTuple):
    """Fixed prompts, and what the actor's weights of one version say about them."""

    version: int
    prompts: list[list[int]]
    logprobs: list[list[float]]
    """Of each prompt's tokens after the first, at temperature 1."""


class Proof(NamedTuple):
    """Whether a worker serves the weights that it should."""

    version: int
    holds: bool
    worst: float
    """Largest |difference of log-probabilities| over all canary tokens; inf where something is missing."""
    why: str = ""
    followed: bool = False
    """Whether it was seen to move: the change since the weights before stood out from noise, and it shows that."""


class Facts(NamedTuple):
    """What a worker's engine came to be, whatever was asked for."""

    version: int
    """Of the weights that it serves; 0 = the base policy."""
    max_length: int
    """Tokens of a prompt and its answer together."""
    block_size: int
    """Tokens of a block of its cache of keys and values."""
    dtype: str
    """Of the weights as it serves them: float32, bfloat16 or float16."""
    gpu: bool


class Worker(Protocol):
    """A rollout worker, addressed by itself. Every call raises WorkerError where the worker cannot answer it."""

    name: str

    async def facts(self) -> Facts:
        """What its engine came to be."""

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Sampled]:
        """One turn for every prompt (token ids); calls run side by side in one engine."""

    async def update_weights(self, release: Release) -> float:
        """Serve this version from now on; seconds that it took. Turns that have begun end on the old weights.

        Raises RefusedError where it does not take them.
        """

    async def canary(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of each prompt's tokens after the first, as the engine serves them now."""

    async def close(self) -> None: ...


class StepReport(NamedTuple):
    step: int
    """Optimizer steps done."""
    metrics: dict[str, float]
    """Of the last optimizer step of the batch."""
    seconds: float
    records: Sequence[dict[str, Any]] = ()
    """One of every optimizer step of the batch: `step`, and what TRL logged."""


class ActorState(NamedTuple):
    step: int
    max_steps: int
    consumed: int
    """Generation batches trained on since the beginning: where the data order goes on."""
    model: str = ""
    """Folder or Hugging Face id of the base policy: a starter is made by the actor."""
    end_ids: Sequence[int] = ()
    """Tokens that end a turn."""


class ActorRole(Protocol):
    """The one that trains. Raises ActorError."""

    async def initialize(self) -> ActorState:
        """Load the model, go on from the newest complete checkpoint."""

    async def train_step(self, batch: dict[str, Any]) -> StepReport:
        """One generation batch (lib.trainer.Batch as a dict) through all of its optimizer steps."""

    async def publish(self, version: int, method: Method) -> Release:
        """Write the current weights as a version."""

    async def canary(self, version: int) -> Canary:
        """What the current weights, which were published as this version, say about the canaries.

        Apart from `publish`, so that workers load meanwhile. Raises ActorError where it has trained since.
        """

    async def save_checkpoint(self, logs: dict[str, int] | None = None) -> str:
        """A complete checkpoint of the current step, consumed batches included; its folder.

        `logs`: the run's log sizes as of this step, which a resume cuts back to; None = as they are on the disk now.
        """

    async def save_trained(self) -> str:
        """The adapter, or the whole model, as the run's product; its folder."""

    async def close(self) -> None: ...


class WorkerError(WorkbenchError, RuntimeError):
    """This worker did not answer; another one may."""


class RefusedError(WorkerError):
    """This worker did not take new weights, and can still be asked: it may take them by another method."""


class ActorError(WorkbenchError, RuntimeError):
    """Training cannot go on in this process; the message says why."""
