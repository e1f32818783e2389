"""vLLM in this process: made, stepped, given weights. Used by one thread, the one that made it.

Owns everything that is said to vLLM (0.31), and its traps. Must not know calls, queues or the wire.

    python -c "from lib.rollout_worker.engine import Engine; help(Engine)"
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import WorkbenchError
from lib.config import ModelSection
from lib.models import counts_of, load_shape
from lib.roles import Sampling
from lib.rollout_worker.adapters import use_one_adapter
from lib.rollout_worker.settings import EngineSettings, set_environment
from lib.sync import read_tensors
from lib.sync.proof import TAIL

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class EngineError(WorkbenchError, RuntimeError):
    """The engine did not do what it was asked; the message says why."""


class Engine:
    """One vLLM engine, and the weights that it serves."""

    def __init__(self, settings: EngineSettings, folder: str | None = None) -> None:
        """`folder`: of weights to start from instead of the base policy's."""
        set_environment()
        import torch
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.settings, self.on_gpu = settings, torch.cuda.is_available()
        self.is_base = folder is None
        """Whether the weights under an adapter are the base policy's."""
        self._adapter: Any = None
        self._adapters = self._number = 0
        if settings.lora_rank and not self.on_gpu:
            _refuse_experts(settings)
            use_one_adapter()
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**self._arguments(folder)))

    def _arguments(self, folder: str | None) -> dict[str, Any]:
        ours = self.settings
        where: dict[str, Any] = {"gpu_memory_utilization": ours.memory_share, "enable_sleep_mode": True}
        if not self.on_gpu:
            asked = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
            # A prompt that is computed in pieces breaks vLLM's engine where its turn has a seed (0.31: it takes back
            # what a piece has drawn, which generators of random numbers can only do on a GPU).
            where = {"kv_cache_memory_bytes": int(float(asked or ours.cpu_cache_gib) * 2**30),
                     "enable_chunked_prefill": False}  # fmt: skip
        adapter = {"enable_lora": True, "max_lora_rank": _rank(ours.lora_rank), "max_loras": 1, "max_cpu_loras": 2}
        return {
            "model": folder or ours.model,
            "revision": None if folder else ours.revision,
            "trust_remote_code": ours.trust_remote_code,
            "dtype": ours.dtype,
            "max_model_len": ours.max_length,
            "max_num_seqs": ours.max_sequences,
            "block_size": ours.block_size,
            "enforce_eager": ours.enforce_eager,
            "seed": ours.seed,
            "skip_tokenizer_init": True,  # token ids in and out: no second tokenizer that could cut differently
            "generation_config": "vllm",  # not what the model ships: sampling is said with every request
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **(adapter if ours.lora_rank else {}),
            **where,
        }

    @property
    def block_size(self) -> int:
        return int(self._engine.vllm_config.cache_config.block_size)

    @property
    def max_length(self) -> int:
        return int(self._engine.vllm_config.model_config.max_model_len)

    @property
    def cached_blocks(self) -> int:
        """Blocks of keys and values that a new prompt could be answered from."""
        pool = self._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        return len(pool.cached_block_hash_to_block)

    @property
    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    # requests ---------------------------------------------------------------------------------------------------------
    def submit(self, prompt: Sequence[int], **parameters: Any) -> str:
        """Begin a request; its key. Raises EngineError where vLLM does not take it (a prompt that is too long)."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        key = str(self._number)
        wanted = SamplingParams(
            detokenize=False, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **parameters
        )
        if not 0 < len(prompt) < self.max_length:
            raise EngineError(
                f"a prompt of {len(prompt)} tokens: the engine takes 1 to {self.max_length - 1} "
                f"(sampling.vllm.max_length {self.max_length})"
            )
        try:
            self._engine.add_request(
                key, TokensPrompt(prompt_token_ids=list(prompt)), wanted, lora_request=self._adapter
            )
        except ValueError as error:
            raise EngineError(f"vLLM does not take the request: {error}") from error
        return key

    def step(self) -> list[Any]:
        """One step of all running requests; vLLM's outputs of those that ended."""
        return [output for output in self._engine.step() if output.finished]

    def abort(self, keys: Sequence[str]) -> None:
        self._engine.abort_request(list(keys))

    def warm_up(self) -> None:
        """Answer once in both ways: what is compiled at the first answer takes a minute on a machine that is busy."""
        self.submit([0] * 8, max_tokens=1, prompt_logprobs=0)
        self.submit([0] * 8, max_tokens=2, temperature=1.0, logprobs=0, seed=0)
        while self.busy:
            self.step()

    # weights ----------------------------------------------------------------------------------------------------------
    def reload(self, folder: Path) -> None:
        """Load all weights from a folder that was checked, in place. The engine must not be busy."""
        if self.on_gpu:
            # vLLM's recipe for new weights: frees the old ones first. Written after its documentation, tried on no GPU.
            self._engine.sleep(level=2)
            self._engine.wake_up(tags=["weights"])
        # The very bytes that were checked, and no path: vLLM would read that path again at its next reload without one.
        weights = _weights(folder)
        if self.on_gpu and self._engine.vllm_config.model_config.hf_config.tie_word_embeddings:
            # Named for the CPU, whose packed copy of it would stay behind; elsewhere head and embeddings are one.
            weights = ((name, tensor) for name, tensor in weights if name != "lm_head.weight")
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_gpu:
            self._engine.wake_up(tags=["kv_cache"])
        self._adapter, self.is_base = None, False
        self.forget()

    def serve_adapter(self, folder: Path) -> None:
        """Answer with this adapter on the base policy from now on. The engine must not be busy."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1  # vLLM would take an adapter of a known number for the one that it has
        old, new = self._adapter, LoRARequest(f"adapter-{self._adapters}", self._adapters, str(folder))
        if not self._engine.add_lora(new):
            raise EngineError(f"vLLM did not load the adapter in {folder}")
        if old is not None:
            self._engine.remove_lora(old.lora_int_id)
        self._adapter = new
        self.forget()

    def forget(self) -> None:
        """Drop the keys and values of earlier prompts: they are of the old weights."""
        if not self._engine.reset_prefix_cache():
            raise EngineError("the cache of keys and values could not be emptied: a request is still running")

    def shutdown(self) -> None:
        """Free its memory; what is asked afterwards fails."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            gc.collect()


def _refuse_experts(settings: EngineSettings) -> None:
    """vLLM has no LoRA of a mixture of experts without a GPU (0.31, lora/model_manager.py). Raises EngineError."""
    named = ModelSection(name=settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if counts_of(load_shape(settings.model, named)).experts:
        raise EngineError(
            f"{Path(settings.model).name} is a mixture of experts, and vLLM serves an adapter on one with a GPU only: "
            f"set distributed.sync_method to reload"
        )


def sampling_parameters(sampling: Sampling, index: int) -> dict[str, Any]:
    """vLLM's parameters of one turn. Prompts of one call that are equal must not get equal answers: each has a seed."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(sampling.end_ids),
        "logprobs": 0,
        "seed": None if sampling.seed is None else (sampling.seed + index) % 2**31,
    }


# canaries -------------------------------------------------------------------------------------------------------------
def begin_canary(engine: Engine, prompt: Sequence[int]) -> list[str]:
    """Ask for the log-probabilities of a prompt's tokens: of all, and of a long one's last tokens through the cache.

    vLLM computes a prompt whose log-probabilities are asked for without its cache, which would hide old keys and
    values. So where a prompt fills a block, its last TAIL tokens are asked for as answers to what comes before them, by
    requests that do read the cache. They come last: what is in the cache from before is found first (0.31 keeps equal
    blocks in the order of their coming), and where nothing is, what the whole prompt has just put there.
    """
    if len(prompt) < 2:
        return []
    first = len(prompt) - (TAIL if len(prompt) > engine.block_size else 0)
    tails = range(first, len(prompt))
    return [
        engine.submit(prompt, max_tokens=1, prompt_logprobs=0),
        *(
            engine.submit(prompt[:place], max_tokens=1, temperature=1.0, logprob_token_ids=[prompt[place]])
            for place in tails
        ),
    ]


def read_canary(outputs: Sequence[Any], prompt: Sequence[int]) -> list[float]:
    """The log-probabilities of each of the prompt's tokens after the first."""
    if not outputs:
        return []
    whole, *tails = outputs
    rows: Sequence[Mapping[int, Any]] = whole.prompt_logprobs[1:]
    values = [float(row[token].logprob) for row, token in zip(rows, prompt[1:], strict=True)]
    for place, tail in zip(range(len(prompt) - len(tails), len(prompt)), tails, strict=True):
        values[place - 1] = float(tail.outputs[0].logprobs[0][prompt[place]].logprob)
    return values


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from read_tensors(path)


def _rank(rank: int | None) -> int:
    """The next rank that vLLM knows."""
    known = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    return next((one for one in known if rank and one >= rank), known[-1])
