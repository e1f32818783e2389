"""What a rollout worker's engine is started with.

Owns these fields, and where a config says them. Must not know vLLM.

    python -c "from lib.rollout_worker.settings import EngineSettings; print(EngineSettings(run='x', model='y'))"
"""

from __future__ import annotations

import os
import sys
from typing import Literal

from pydantic import BaseModel

from lib.config import Config
from lib.engine import vllm_environment
from lib.sync import BLOCK

DType = Literal["float32", "bfloat16", "float16"]


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """Plain values: they travel to the worker's process or container as JSON."""

    run: str
    """Whose weights it serves; a manifest of another run is refused."""
    model: str
    """Folder or Hugging Face id of the base policy. It is only read."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DType = "float32"
    max_length: int | None = None
    """Tokens of prompt and answers together; None = as long as the model allows."""
    max_sequences: int = 64
    """Answers that are sampled at once; more wait."""
    block_size: int = BLOCK
    """Tokens of a block of the cache of keys and values."""
    memory_share: float = 0.5
    """Of a GPU's memory."""
    cpu_cache_gib: float = 1.0
    """Memory of the cache of keys and values where there is no GPU."""
    enforce_eager: bool = True
    lora_rank: int | None = None
    """Largest rank of an adapter to be served (`lora`); None = none: generation is quicker without."""
    seed: int = 0

    @classmethod
    def of(cls, config: Config, run: str, model: str, dtype: DType) -> EngineSettings:
        """As a config says. `run`: the run's name, as it is published under; `model`: ActorState.model; `dtype`: the
        type that `model.dtype` comes to where the worker runs."""
        engine = config.sampling.vllm
        is_base = model == config.model.name
        return cls(
            run=run,
            model=model,
            revision=config.model.revision if is_base else None,
            trust_remote_code=config.model.trust_remote_code,
            dtype=dtype,
            max_length=engine.max_length,
            max_sequences=max(config.distributed.in_flight, 1),
            block_size=engine.block_size or BLOCK,
            memory_share=engine.memory_share,
            enforce_eager=engine.enforce_eager,
            lora_rank=config.lora.r if config.distributed.sync_method == "lora" else None,
            seed=config.training.seed,
        )


def command(settings: EngineSettings) -> list[str]:
    """Starts a worker of these settings, as a child of `lib.rpc.start`."""
    return [sys.executable, "-m", "lib.rollout_worker", settings.model_dump_json()]


def environment() -> dict[str, str]:
    """What a worker's process is started with beside this one's own."""
    return {**vllm_environment(), **_IN_PROCESS, **_MEMORY}


_IN_PROCESS = {
    # The engine in this process, stepped by one thread: calls reach it without a socket in between.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_MEMORY = {
    # A reload on a CPU makes every layer anew. Memory that a layer gave back serves the next one (up to 4 GiB of it),
    # and fresh memory comes in large pages: measured, it takes half the time and varies less.
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}"
        for name in ("hugetlb=1", "arena_max=1", f"mmap_threshold={2**25}", f"trim_threshold={2**32}")
    ),
}


def set_environment() -> None:
    """The same in this process, as far as it is not too late."""
    os.environ.update({**vllm_environment(), **_IN_PROCESS})
