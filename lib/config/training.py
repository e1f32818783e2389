"""What is trained and how: model, starter, LoRA, sampling, training. Owns these keys and their defaults."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lib.config.section import Count, Positive, Section
from lib.task import nearest


class ModelSection(Section):
    name: str = "starter"
    """`starter` (a toy made on this machine), a Hugging Face id, or a folder."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = float32 on a CPU, bfloat16 on a GPU."""
    quantization: Literal["auto", "none", "mxfp4", "4bit"] = "auto"
    """How quantized weights are held. auto: a checkpoint in MXFP4 (gpt-oss) is unpacked to `dtype` to be trained or to
    carry an adapter, and kept in MXFP4 to answer by itself, or unpacked with a warning where the machine cannot.
    none: always unpacked. mxfp4: kept for all but training, or refused. 4bit: others, by bitsandbytes (QLoRA)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool | None = None
    """None = on where there is a GPU; it costs time and saves nothing on tiny models."""
    liger: bool = False
    trust_remote_code: bool = False
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    """How long to think, where the chat template knows it (gpt-oss); None = the template's own default."""
    date: datetime.date = datetime.date(2025, 6, 30)
    """What a chat template shows as today's date (gpt-oss, Llama 3): one that moved would change every prompt."""
    overrides: Mapping[str, str | Mapping[str, Any]] = {}
    """By task: another model for it, as a name or as keys of this section. Applied, and gone, once the config is read;
    an explicit override (`-p model.name=...`) is stronger."""

    @field_validator("overrides")
    @classmethod
    def _overrides_name_keys(cls, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        known = [name for name in cls.model_fields if name != "overrides"]
        for task, keys in overrides.items():
            wrong = [key for key in keys if key not in known] if not isinstance(keys, str) else []
            if wrong:
                raise ValueError(f"{task}.{wrong[0]}: unknown key.{nearest(str(wrong[0]), known)}")
        return overrides


class StarterSection(Section):
    """The embedded toy policy: a small chat model built from the task's own rows (lib/starter.py)."""

    kind: Literal["qwen2", "qwen3"] = "qwen2"
    steps: Count = 300
    seed: int | None = None
    """None = the training seed."""


class LoraSection(Section):
    enabled: bool = True
    """False = full fine-tuning."""
    r: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    expert_parameters: Literal["auto"] | tuple[str, ...] = "auto"
    """auto = the experts and routers of mixture-of-experts models, which all-linear does not reach; [] = none."""


class VllmSection(Section):
    """The vLLM engine: as `sampling.engine: vllm`, rollout workers and `python -m lib.run serve` start it."""

    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the GPU's memory; what trains needs the rest."""
    server: str = ""
    """The URL of a vLLM server on another GPU, which TRL syncs the weights to (`trl vllm-serve`); "" = vLLM shares the
    GPU with what trains. Several workers: backend distributed."""
    max_length: Count | None = None
    """Tokens of prompt and answers together; None = as long as the model allows."""
    enforce_eager: bool = True
    """Without CUDA graphs: a quicker start, slower answers."""
    block_size: Count | None = None
    """Tokens of a block of the KV cache; None = vLLM's choice."""
    tool_calls: bool = True
    """Answers with tool calls are parsed where a parser is known for the model. Served models only."""
    tool_parser: str | None = None
    """vLLM's name of it (hermes, llama3_json, xlam, ...); None = by the chat template. Served models only."""


class SamplingSection(Section):
    """How the policy answers while it is trained."""

    engine: Literal["hf", "vllm"] = "hf"
    prompt_limit: Count = 512
    """Longer prompts (tokens) are dropped and counted."""
    completion_limit: Count = 512
    """Tokens an answer may have; a longer one counts as cut off."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    vllm: VllmSection = VllmSection()


class TrainingSection(Section):
    steps: int = -1
    """Optimizer steps; -1 = as many as `epochs` needs."""
    epochs: Positive = 1.0
    learning_rate: Positive = 1e-6
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Steps, or below 1 a share of all steps."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    batch: Count = 8
    """Completions in one forward and backward pass on one device."""
    accumulation: Count = 1
    group_size: int = 8
    """Completions per prompt."""
    steps_per_generation: Count | None = None
    """Passes that one sampling feeds; None = `accumulation`."""
    iterations: Count = 1
    """Optimisation passes over the same samples."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term."""
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo"] = "dapo"
    clip_low: Positive = 0.2
    clip_high: Positive | None = None
    """None = the same as clip_low."""
    reward_scaling: Literal["group", "batch", "none"] = "group"
    save_steps: Count = 100
    seed: int = 0
    completions_csv: str | None = None
    """Also write every completion to this CSV (relative to the run folder)."""

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: int) -> int:
        if steps != -1 and steps < 1:
            raise ValueError("give a number of steps, or -1 for as many as `epochs` needs")
        return steps

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, size: int) -> int:
        if size < 2:
            raise ValueError("a group needs at least 2 completions: with one there is nothing to compare it with")
        return size

    @property
    def passes_per_generation(self) -> int:
        return self.steps_per_generation or self.accumulation

    @model_validator(mode="after")
    def _loss_fits(self) -> TrainingSection:
        if self.loss_type == "cispo" and (self.clip_high is None or self.clip_high < 1):
            raise ValueError(
                "loss_type cispo takes clip_high as an absolute cap of the ratio: set clip_high to about 5"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> TrainingSection:
        completions = self.batch * self.passes_per_generation
        if completions % self.group_size:
            raise ValueError(
                f"batch x steps_per_generation = {self.batch} x {self.passes_per_generation} = {completions} is not "
                f"divisible by group_size {self.group_size}: set training.batch to a multiple of {self.group_size}, or "
                f"group_size to a divisor of {completions}"
            )
        window = self.passes_per_generation * self.iterations
        if (self.save_steps * self.accumulation) % window:
            raise ValueError(
                f"save_steps {self.save_steps} falls inside a generation (one sampling feeds {window} passes, one step "
                f"takes {self.accumulation}): a resumed run would differ. Set save_steps to a multiple of "
                f"{window // math.gcd(window, self.accumulation)}"
            )
        return self
