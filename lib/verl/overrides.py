"""From a config to what verl is told: one Hydra override for each thing that a run decides.

Owns what every field of ours is called in verl, and what verl does otherwise. Must not know whether verl takes it
(lib/verl/check.py). Keys and their meaning: verl 0.9.1, verl/trainer/config and the sources that read them.

    python -m lib.verl.check configs/ace_verl.yaml
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.task import load_task
from lib.verl.batches import batches, check_fit, prompts_of
from lib.verl.cluster import Cluster, cluster_of
from lib.verl.errors import VerlError

ESTIMATOR = "grpo_scored"
"""The advantage estimator that leaves unscored rollouts out (lib/verl/advantage.py)."""

REWARD = "pkg://lib.verl.reward"

_SHARE_OF_WEIGHTS = 3.0
"""How much likelier a sampled token may be to the trainer than to the engine: the cap of the local backend (TRL's)."""

LOOP = "workbench"
"""Our agent loop (lib/verl/agent_loop.py)."""

LOOP_FILE = "agent_loop.yaml"
"""In the folder of the parquet files: what verl makes it of."""

_BUCKET_MB = 256
"""Shared memory in which weights go to the engine; it has to hold the largest tensor."""

_LOSSES = {
    "dapo": ("vanilla", "token-mean"),
    "grpo": ("vanilla", "seq-mean-token-mean"),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm"),
    "cispo": ("cispo", "token-mean"),
}
"""Ours -> verl's loss, and how it is summed up. The others are refused by the config (lib/config/verl.py)."""


def notes(config: Config) -> list[str]:
    """What verl does otherwise than this config says, to be told beside the run."""
    training, said = config.training, []
    if training.schedule == "linear":
        said.append("training.schedule linear: verl keeps the learning rate constant after warm-up (or cosine)")
    if config.steps_per_batch > 1 and training.loss_type != "cispo":
        said.append("where advantages are negative, verl also clips ratios above 3 (actor.clip_ratio_c)")
    if training.loss_type in ("grpo", "dr_grpo"):
        said.append(
            f"training.loss_type {training.loss_type}: verl divides by all answers of a step, those left out as well"
        )
    if config.sampling.engine != "vllm":
        said.append("sampling.engine hf: verl samples with vLLM")
    if config.model.attention == "auto":
        said.append("model.attention auto: sdpa, unpacked; flash_attention_2 packs, where flash-attn is installed")
    if config.lora.enabled and config.lora.expert_parameters == "auto":
        said.append("lora.expert_parameters auto: verl adapts linear layers only; name experts one by one")
    return said


def overrides(
    config: Config,
    run_folder: Path,
    parquet_folder: Path,
    model_path: str,
    cluster: Cluster | None = None,
    tokenizer: Path | None = None,
) -> list[str]:
    """What verl is told, as Hydra takes it; `verl.overrides` of the config come last, and win.

    `parquet_folder` has train.parquet, test.parquet, reward.json and LOOP_FILE. `model_path`: a folder, or a Hub id
    where the config names no revision. `cluster`: None = as lib.verl.cluster sees it. `tokenizer`: the folder of
    another one than the model's. Raises VerlError for what verl could not do with these machines or this model.
    """
    cluster = cluster or cluster_of(config)
    check_fit(config, cluster.size)
    _check_model(config, model_path)
    told = {
        **_algorithm(config),
        **_data(config, parquet_folder, model_path),
        **_model(config, model_path, tokenizer, cluster),
        **_actor(config, cluster),
        **_rollout(config, parquet_folder, cluster),
        **_trainer(config, run_folder, cluster),
        **_ray(config, cluster),
        **(_on_the_processor() if cluster.cpu else {}),
    }
    return [f"{key}={hydra(value)}" for key, value in told.items()] + list(config.verl.overrides)


def _algorithm(config: Config) -> dict[str, Any]:
    return {
        "algorithm.adv_estimator": ESTIMATOR,
        "algorithm.norm_adv_by_std_in_grpo": config.training.reward_scaling == "group",
        "algorithm.use_kl_in_reward": False,
        # vLLM and the trainer disagree a little about every token: weighed as the local backend does.
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": _SHARE_OF_WEIGHTS,
    }


def _data(config: Config, folder: Path, model_path: str) -> dict[str, Any]:
    order = "+reward.custom_reward_function.reward_kwargs.order"
    told: dict[str, Any] = {
        "data.train_files": str(folder / "train.parquet"),
        "data.val_files": str(folder / "test.parquet"),
        "data.train_batch_size": prompts_of(config),
        "data.max_prompt_length": config.sampling.prompt_limit,
        "data.max_response_length": _response_limit(config, model_path),
        "data.filter_overlong_prompts": False,  # they are left out before: verl would count without tools and date
        "data.truncation": "error",
        "data.seed": config.training.seed,
        "data.dataloader_num_workers": 0,  # a row is a few lines of text
        "data.trust_remote_code": config.model.trust_remote_code,
        "reward.custom_reward_function.path": REWARD,
        "reward.custom_reward_function.name": "compute_score",
        order: str(folder / "reward.json"),
        "+algorithm.order": str(folder / "reward.json"),  # the estimator's: verl hands it this section alone
        "reward.num_workers": 1,  # a judge's limits and a sandbox's pool belong to one process
    }
    if config.model.reasoning_effort:
        told["+data.apply_chat_template_kwargs.reasoning_effort"] = config.model.reasoning_effort
    return told


def _model(config: Config, path: str, tokenizer: Path | None, cluster: Cluster) -> dict[str, Any]:
    model, lora = config.model, config.lora
    checkpointing = not cluster.cpu if model.gradient_checkpointing is None else model.gradient_checkpointing
    prefix = "actor_rollout_ref.model"
    packed = model.attention == "flash_attention_2"
    told: dict[str, Any] = {
        f"{prefix}.path": path,
        f"{prefix}.trust_remote_code": model.trust_remote_code,
        f"{prefix}.enable_gradient_checkpointing": checkpointing,
        f"{prefix}.use_liger": model.liger,
        f"{prefix}.use_remove_padding": packed,
        f"+{prefix}.override_config.attn_implementation": "sdpa" if model.attention == "auto" else model.attention,
        f"{prefix}.lora_rank": lora.r if lora.enabled else 0,
    }
    if tokenizer:
        told[f"{prefix}.tokenizer_path"] = str(tokenizer)
    if lora.enabled:
        told[f"{prefix}.lora_alpha"] = lora.alpha
        told[f"{prefix}.target_modules"] = lora.targets
        if lora.expert_parameters not in ("auto", ()):
            told[f"+{prefix}.target_parameters"] = lora.expert_parameters
    return told


def _actor(config: Config, cluster: Cluster) -> dict[str, Any]:
    training = config.training
    sizes = batches(config, cluster.size)
    loss, summed = _LOSSES[training.loss_type]
    high = training.clip_high if training.clip_high is not None else training.clip_low
    clip = (1.0, high - 1.0) if loss == "cispo" else (training.clip_low, high)  # ours caps the ratio itself
    prefix = "actor_rollout_ref.actor"
    told: dict[str, Any] = {
        f"{prefix}.ppo_mini_batch_size": sizes.mini,
        f"{prefix}.ppo_micro_batch_size_per_gpu": sizes.micro,
        f"{prefix}.ppo_epochs": training.iterations,
        f"{prefix}.data_loader_seed": training.seed,
        f"{prefix}.policy_loss.loss_mode": loss,
        f"{prefix}.loss_agg_mode": summed,
        f"{prefix}.clip_ratio_low": clip[0],
        f"{prefix}.clip_ratio_high": clip[1],
        f"{prefix}.entropy_coeff": 0,
        f"{prefix}.use_kl_loss": training.beta > 0,
        **_optimizer(config, f"{prefix}.optim"),
        **_weights(config, cluster, f"{prefix}.fsdp_config"),
    }
    if summed == "seq-mean-token-sum-norm":
        told[f"{prefix}.loss_scale_factor"] = config.sampling.completion_limit
    if training.beta > 0:
        told |= {
            f"{prefix}.kl_loss_coef": training.beta,
            f"{prefix}.kl_loss_type": "low_var_kl",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": sizes.micro,
        }
        if not config.lora.enabled:  # with an adapter, the actor without it is the reference
            told |= _weights(config, cluster, "actor_rollout_ref.ref.fsdp_config")
    return told


def _optimizer(config: Config, prefix: str) -> dict[str, Any]:
    training = config.training
    told: dict[str, Any] = {
        f"{prefix}.lr": training.learning_rate,
        f"{prefix}.weight_decay": training.weight_decay,
        f"{prefix}.clip_grad": training.max_grad_norm,
        f"{prefix}.lr_scheduler_type": "cosine" if training.schedule == "cosine" else "constant",
    }
    if training.schedule == "constant" or not training.warmup:
        return told
    if training.warmup < 1:
        return told | {f"{prefix}.lr_warmup_steps_ratio": training.warmup}
    return told | {f"{prefix}.lr_warmup_steps": max(1, round(training.warmup / config.steps_per_batch))}


def _weights(config: Config, cluster: Cluster, prefix: str) -> dict[str, Any]:
    """How FSDP holds weights (verl's default: float32) and what it computes in (bfloat16)."""
    dtype = _dtype(config, cluster)
    told: dict[str, Any] = {f"{prefix}.model_dtype": "bf16" if config.model.dtype == "bfloat16" else "fp32"}
    if dtype != "bfloat16":
        short = {"float32": "fp32", "float16": "fp16"}[dtype]
        told[f"+{prefix}.mixed_precision.param_dtype"] = short  # sums and buffers are float32 in any case
    if cluster.cpu:
        told[f"{prefix}.use_torch_compile"] = False
    return told


def _dtype(config: Config, cluster: Cluster) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if cluster.cpu else "bfloat16"


def _rollout(config: Config, folder: Path, cluster: Cluster) -> dict[str, Any]:
    sampling, engine, ours = config.sampling, config.sampling.vllm, config.verl
    prefix = "actor_rollout_ref.rollout"
    told: dict[str, Any] = {
        f"{prefix}.name": "vllm",
        f"{prefix}.n": config.training.group_size,
        f"{prefix}.temperature": sampling.temperature,
        f"{prefix}.top_p": sampling.top_p,
        f"{prefix}.top_k": sampling.top_k or -1,
        f"{prefix}.seed": config.training.seed,
        f"{prefix}.dtype": _dtype(config, cluster),
        f"{prefix}.tensor_model_parallel_size": ours.tensor_parallel,
        f"{prefix}.gpu_memory_utilization": engine.memory_share,
        f"{prefix}.enforce_eager": engine.enforce_eager,
        f"{prefix}.log_prob_micro_batch_size_per_gpu": batches(config, cluster.size).micro,
        f"{prefix}.agent.default_agent_loop": LOOP,
        f"{prefix}.agent.agent_loop_config_path": str(folder / LOOP_FILE),
        f"{prefix}.agent.num_workers": 1,  # scores as well: a judge's limits and a sandbox's pool belong to one process
    }
    if engine.max_length:
        told[f"{prefix}.max_model_len"] = engine.max_length
    if engine.block_size:
        told[f"+{prefix}.engine_kwargs.vllm.block_size"] = engine.block_size
    if config.lora.enabled:
        told |= {f"{prefix}.load_format": "safetensors", f"{prefix}.layered_summon": True}
    return told


def _trainer(config: Config, run_folder: Path, cluster: Cluster) -> dict[str, Any]:
    training, tracker, folder = config.training, config.tracker, run_folder / "verl"
    told: dict[str, Any] = {
        "trainer.use_v1": True,
        "trainer.n_gpus_per_node": cluster.gpus,
        "trainer.nnodes": cluster.nodes,
        "trainer.save_freq": max(1, training.save_steps // config.steps_per_batch),
        "trainer.test_freq": -1,  # notebook 4 evaluates
        "trainer.val_before_train": False,
        "trainer.logger": ["console", "file", *([] if tracker.name == "none" else [tracker.name])],
        "trainer.project_name": tracker.project,
        "trainer.experiment_name": tracker.run or run_folder.name,
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.resume_mode": "auto",
        "trainer.total_epochs": int(training.epochs),
    }
    if training.steps != -1:
        count = training.steps // config.steps_per_batch
        told |= {"trainer.total_training_steps": count, "trainer.total_epochs": count}  # it stops at the first of them
    return told


def _ray(config: Config, cluster: Cluster) -> dict[str, Any]:
    told: dict[str, Any] = {"trainer.device": "cpu"} if cluster.cpu else {}
    if config.verl.ray_address:
        return told | {"+ray_kwargs.ray_init.address": config.verl.ray_address}
    told["+ray_kwargs.ray_init.include_dashboard"] = False
    if cluster.cpu:  # places for processes, nothing else
        told["+ray_kwargs.ray_init.num_gpus"] = cluster.gpus
        told["ray_kwargs.ray_init.num_cpus"] = 8 * cluster.gpus  # what verl's processes ask for, not what there is
    return told


def _on_the_processor() -> dict[str, Any]:
    """What verl cannot do without a GPU, and what a small machine has no room for (lib/verl/platform.py)."""
    rollout = "actor_rollout_ref.rollout"
    actor = "actor_rollout_ref.actor"
    return {
        f"{actor}.strategy": "fsdp2",  # the first FSDP wants an accelerator
        f"{actor}.fsdp_config.strategy": "fsdp2",
        # vLLM gets whole weights: verl's way to put adapters on needs an older vLLM than the workbench's.
        "actor_rollout_ref.model.lora.merge": True,
        f"{rollout}.free_cache_engine": False,
        f"+{rollout}.enable_sleep_mode": False,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": _BUCKET_MB,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }


# what the model and the task decide -----------------------------------------------------------------------------------
def _response_limit(config: Config, model_path: str) -> int:
    """Tokens of all that follows the prompt: one answer, or every turn and what the world says in between."""
    sampling = config.sampling
    turns = load_task(config.task.name, **config.task.params).max_turns
    if turns == 1:
        return sampling.completion_limit
    longest = sampling.vllm.max_length or _model_config(model_path).get("max_position_embeddings")
    if not longest:
        raise VerlError(
            f"a task of {turns} turns: set sampling.vllm.max_length to the tokens of prompt, answers and replies "
            f"together; verl has to know it before the model is loaded"
        )
    if longest <= sampling.prompt_limit:
        raise VerlError(
            f"sampling.prompt_limit {sampling.prompt_limit} leaves nothing of {longest} tokens for {turns} turns: set "
            f"it down, or sampling.vllm.max_length up"
        )
    return int(longest) - sampling.prompt_limit


def _check_model(config: Config, path: str) -> None:
    folder = Path(path).is_dir()
    if config.model.revision and not folder:
        raise VerlError(f"verl takes no revision ({config.model.revision}): download {path} and give the folder")
    check_shape(config, path, _model_config(path))


def check_shape(config: Config, model: str, shape: Mapping[str, Any]) -> None:
    """Refuse a model that verl cannot hold, by what its config.json says. Raises VerlError."""
    packed = shape.get("quantization_config", {}).get("quant_method")
    if packed:
        raise VerlError(
            f"{model} is stored in {packed}, and verl trains unpacked weights: unpack it once, or use the local backend"
        )
    heads = shape.get("num_attention_heads")
    parallel = config.verl.tensor_parallel
    if heads and heads % parallel:
        raise VerlError(f"verl.tensor_parallel {parallel} does not divide the model's {heads} attention heads")


def _model_config(path: str) -> Mapping[str, Any]:
    file = Path(path) / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


# Hydra ----------------------------------------------------------------------------------------------------------------
def hydra(value: Any) -> str:
    """A value in Hydra's grammar (hydra.cc, override grammar): words as they are, other text in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return value if _is_word(value) else _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Iterable):
        return "[" + ",".join(map(hydra, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no place in an override")


def _is_word(text: str) -> bool:
    plain = re.fullmatch(r"[A-Za-z_/][\w./:@-]*", text)
    return bool(plain) and text.lower() not in ("true", "false", "null", "nan", "inf")


def _quoted(text: str) -> str:
    r"""In quotes; a backslash counts only before a quote, and `${` would be looked up."""
    escaped = re.sub(r"(\\*)(\"|$)", lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), text)
    return '"' + escaped.replace("${", "\\${") + '"'
