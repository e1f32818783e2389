"""Keys that verl 0.9.1 takes without a word and then does nothing with, each with what to write instead.

Owns that list: made by reading what `verl.trainer.main_ppo` and its trainer (trainer/ppo/v1) read of their config; a
name that no module of verl mentions is found by looking (`mentioned`). Must not know our config, or Hydra.

    python -c "from lib.verl.ignored import why; print(why('custom_reward_function.path', {}))"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"

ALWAYS = {
    "custom_reward_function": "it is the old place: write reward.custom_reward_function",
    "reward_model": "it is the old place: write reward.reward_model, reward.reward_manager or reward.num_workers",
    "sandbox_fusion": "it is the old place: write reward.sandbox_fusion",
    f"{_ACTOR}.grad_clip": f"write {_ACTOR}.optim.clip_grad (training.max_grad_norm)",
    f"{_ACTOR}.optim.grad_clip": f"write {_ACTOR}.optim.clip_grad (training.max_grad_norm)",
    f"{_ACTOR}.optim.total_training_steps": "write trainer.total_training_steps (training.steps)",
    f"{_ACTOR}.use_torch_compile": f"write {_ACTOR}.fsdp_config.use_torch_compile",
    "actor_rollout_ref.ref.use_torch_compile": "write actor_rollout_ref.ref.fsdp_config.use_torch_compile",
    f"{_ACTOR}.use_remove_padding": f"write {_MODEL}.use_remove_padding (model.attention: flash_attention_2)",
    f"{_ACTOR}.use_fused_kernels": f"write {_MODEL}.use_fused_kernels",
    f"{_ACTOR}.use_prefix_grouper": "only verl's experimental trainers read it: leave it out",
    f"{_ACTOR}.freeze_vision_tower": "leave it out",
    f"{_ACTOR}.ppo_micro_batch_size": f"write {_ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{_ROLLOUT}.log_prob_micro_batch_size": f"write {_ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "write actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    f"{_ROLLOUT}.do_sample": f"write {_ROLLOUT}.temperature (sampling.temperature)",
    f"{_ROLLOUT}.repetition_penalty": "verl samples with 1.0: leave it out",
    f"{_ROLLOUT}.mode": "engines are always asynchronous servers: leave it out",
    f"{_ROLLOUT}.limit_images": "leave it out",
    "algorithm.use_pf_ppo": "leave it out",
    "algorithm.pf_ppo": "leave it out",
    "algorithm.filter_groups.max_num_gen_batches": "write algorithm.filter_groups.max_inflight_gen_batches",
    "data.reward_fn_key": "rewards are told data_source: leave it out",
    "trainer.balance_batch": "batches are always balanced: leave it out",
    "trainer.esi_redundant_time": "leave it out",
    "trainer.ray_wait_register_center_timeout": "leave it out",
    "trainer.remove_previous_ckpt_in_save": "write trainer.max_actor_ckpt_to_keep=1",
}
"""Key, or the section that it stands in -> what to do instead."""

_CRITIC = {"critic.enable": True, "algorithm.adv_estimator": "gae"}
_KL_LOSS = {f"{_ACTOR}.use_kl_loss": True}
_KL_REWARD = {"algorithm.use_kl_in_reward": True}
_ADAPTER = {f"{_MODEL}.lora_rank": ">0"}
_VALIDATES = {"trainer.test_freq": ">0", "trainer.val_before_train": True, "trainer.val_only": True}

UNLESS: dict[str, tuple[dict[str, Any], str]] = {
    "critic": (_CRITIC, "GRPO trains no critic: leave it out"),
    "trainer.critic_warmup": (_CRITIC, "GRPO trains no critic: leave it out"),
    "algorithm.lam": (_CRITIC, "only GAE has it: leave it out"),
    "distillation": ({"distillation.enabled": True}, "set distillation.enabled=true, or leave it out"),
    "reward.reward_model": ({"reward.reward_model.enable": True}, "the task scores: leave it out"),
    "reward.sandbox_fusion": ({"reward.custom_reward_function.path": None}, "the task's sandbox runs: leave it out"),
    f"{_ACTOR}.kl_loss_coef": (_KL_LOSS, "set training.beta above 0"),
    f"{_ACTOR}.kl_loss_type": (_KL_LOSS, "set training.beta above 0"),
    "algorithm.kl_penalty": (_KL_REWARD, "set training.beta, or algorithm.use_kl_in_reward"),
    "algorithm.kl_ctrl": (_KL_REWARD, "set training.beta, or algorithm.use_kl_in_reward"),
    "actor_rollout_ref.ref": (_KL_LOSS | _KL_REWARD, "no reference is asked: set training.beta above 0"),
    f"{_MODEL}.lora": ({f"{_ACTOR}.strategy": "megatron"}, "it is Megatron's: write lora.r and the other keys of lora"),
    f"{_MODEL}.lora_alpha": (_ADAPTER, "set lora.enabled"),
    f"{_MODEL}.target_modules": (_ADAPTER, "set lora.enabled"),
    "trainer.resume_from_path": ({"trainer.resume_mode": "resume_path"}, "set trainer.resume_mode=resume_path"),
    "trainer.v1.colocate_async": ({"trainer.v1.trainer_mode": "colocate_async"}, "set trainer.v1.trainer_mode to it"),
    "trainer.v1.separate_async": ({"trainer.v1.trainer_mode": "separate_async"}, "set trainer.v1.trainer_mode to it"),
    f"{_ROLLOUT}.val_kwargs": (_VALIDATES, "notebook 4 evaluates: set trainer.test_freq"),
    "trainer.validation_data_dir": (_VALIDATES, "set trainer.test_freq"),
    "trainer.log_val_generations": (_VALIDATES, "set trainer.test_freq"),
}
"""Key or section -> (other keys, with any of whose values verl reads it, and what to do instead). Those other keys
themselves are always read; `>0` = a positive number, None = no value."""

PASSED_ON = re.compile(
    r"transfer_queue\.|ray_kwargs\.ray_init\.|.*(engine_kwargs|override_config|override_optimizer_config|reward_kwargs|"
    r"sampler_kwargs|apply_chat_template_kwargs|mm_processor_kwargs|kw_args|nsight_options|hf_overrides)\."
)
"""Keys that verl hands on as they are: whoever gets them reads them."""


READ_BY_FSDP = {f"{_MODEL}.lora.merge"}
"""Of Megatron's section, and read by the FSDP engine and by the vLLM server as well."""


def why(key: str, config: Mapping[str, Any]) -> str | None:
    """What to do instead of setting a key that nothing reads; None where something does. `config`: verl's, composed."""
    if key in READ_BY_FSDP:
        return None
    for place in _places(key):
        if place in ALWAYS:
            return ALWAYS[place]
        if place in UNLESS:
            switches, instead = UNLESS[place]
            if key not in switches and not any(_is(select(config, one), value) for one, value in switches.items()):
                return instead
    if PASSED_ON.match(key) or mentioned(key.rsplit(".", 1)[-1]):
        return None
    return "no module of verl reads a key of that name: leave it out"


def select(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _places(key: str) -> list[str]:
    """a.b.c -> a.b.c, a.b, a: the key, and the sections that it stands in."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _is(found: Any, value: Any) -> bool:
    if value == ">0":
        return isinstance(found, (int, float)) and found > 0
    return bool(found == value)


@cache
def _mentioned() -> frozenset[str]:
    """Every name that verl's Python reads as an attribute, or writes in quotes; a definition alone does not count."""
    import verl

    folder = Path(verl.__file__).parent
    read = re.compile(r"\.(\w+)\b(?!\s*=[^=])|[\"'](\w+)[\"']")
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    return frozenset(name for text in texts for pair in read.findall(text) for name in pair if name)


def mentioned(name: str) -> bool:
    """Whether some module of verl reads an attribute or an item of that name."""
    return name in _mentioned()
