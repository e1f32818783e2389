"""The program that has verl compose and check its own config: runs in verl's environment, and launches nothing.

Owns what verl would take, ignore or trip over. Reads {"runs": [[override, ...], ...]} from standard input and writes a
JSON list of {ok, config, problems, notes} to standard output. Must not know our config.

    echo '{"runs": [["trainer.no_such_key=1"]]}' | PYTHONPATH=. build/verl/bin/python -m lib.verl.compose
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from lib.verl import ignored
from lib.verl.ignored import select

BASE = ("actor_rollout_ref.rollout.name=vllm",)
"""What verl's config cannot be composed without."""

OURS = {"algorithm.order"}
"""Added keys that our own estimator reads."""

SIZES = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.data_parallel_size",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.agent.num_workers",
    "reward.num_workers",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.total_epochs",
)
"""Whole numbers of at least 1."""

MAY_BE_NULL = (
    "trainer.total_training_steps",
    "actor_rollout_ref.rollout.max_model_len",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    "trainer.max_actor_ckpt_to_keep",
)
"""The same, or null."""

FREQUENCIES = ("trainer.save_freq", "trainer.test_freq")
"""Whole numbers of at least 1, or -1 for never."""

_SHARE, _ABOVE, _NOT_BELOW = (0.0, 1.0), "more than 0", "0 or more"
NUMBERS = {
    "actor_rollout_ref.actor.optim.lr": _ABOVE,
    "actor_rollout_ref.actor.optim.clip_grad": _ABOVE,
    "actor_rollout_ref.actor.optim.weight_decay": _NOT_BELOW,
    "actor_rollout_ref.actor.kl_loss_coef": _NOT_BELOW,
    "actor_rollout_ref.rollout.temperature": _ABOVE,
    "actor_rollout_ref.rollout.top_p": _SHARE,
    "actor_rollout_ref.rollout.gpu_memory_utilization": _SHARE,
}

LORA_RANKS = 512
"""The largest rank of an adapter that vLLM serves."""


@cache
def known() -> dict[str, Any]:
    """verl's own config, as it is without overrides."""
    from hydra import compose
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(compose("ppo_trainer", list(BASE)), resolve=False)
    assert isinstance(plain, dict)
    return plain


@cache
def choices() -> dict[str, list[str]]:
    """Keys with a few values -> what verl knows, from its own registries where it has them."""
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.utils.tracking import Tracking
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    from lib.verl import advantage

    advantage.register()
    return {
        "algorithm.adv_estimator": sorted(map(_text, ADV_ESTIMATOR_REGISTRY)),
        "actor_rollout_ref.rollout.name": sorted({name for name, mode in _ROLLOUT_REGISTRY if mode == "async"}),
        "actor_rollout_ref.actor.policy_loss.loss_mode": sorted(POLICY_LOSS_REGISTRY),
        "actor_rollout_ref.actor.kl_loss_type": ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"],
        "trainer.logger": list(Tracking.supported_backend),
        "trainer.v1.trainer_mode": ["sync"],  # ours is (lib/verl/trainer.py)
        "trainer.resume_mode": ["auto", "disable", "resume_path"],
        "data.truncation": ["error", "left", "right", "middle"],
        "reward.reward_manager.name": sorted(REWARD_MANAGER),
    }


def examine(overrides: Sequence[str]) -> dict[str, Any]:
    """What verl makes of these overrides."""
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        return _refused([f"Hydra cannot read it: {error}"])
    added = {one.key_or_group for one in parsed if one.is_add() or one.is_force_add()}
    unknown = {key: text for key in _keys(parsed) if key not in added and (text := _unknown(key, known()))}
    try:
        config = compose("ppo_trainer", [one.input_line for one in parsed if one.key_or_group not in unknown])
        plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        return _refused([*unknown.values(), " ".join(str(error).split())])
    assert isinstance(plain, dict)
    nowhere = {key: text for key in sorted(added) if (text := _nowhere(key, config))}
    silent = {
        key: f"{key}: verl ignores it; {text}"
        for key in _keys(parsed)
        if key not in {*OURS, *unknown, *nowhere} and (text := ignored.why(key, plain))
    }
    problems = [*unknown.values(), *nowhere.values(), *silent.values()]
    problems += [*_bad_values(plain), *_bad_choices(plain), *_unfit(plain)]
    if not problems:
        problems += _what_verl_says(config)
    return {"ok": not problems, "config": plain, "problems": problems, "notes": _notes(plain, _keys(parsed))}


def _keys(parsed: Sequence[Any]) -> list[str]:
    """The keys of overrides, in their order; one that is given twice stands there twice."""
    return [one.key_or_group for one in parsed]


def _refused(problems: list[str]) -> dict[str, Any]:
    return {"ok": False, "config": None, "problems": problems, "notes": []}


def _unknown(key: str, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a key that verl's config does not have. Config groups (model_engine) are Hydra's matter."""
    if "@" in key or "/" in key or key in ("model_engine", "hydra") or key.startswith("hydra."):
        return None
    parts = key.split(".")
    section: Any = known
    for depth, part in enumerate(parts):
        if not isinstance(section, Mapping) or part not in section:
            names = list(section) if isinstance(section, Mapping) else []
            before = "".join(f"{name}." for name in parts[:depth])
            near = [before + name for name in difflib.get_close_matches(part, names, 2)]
            near = near or _elsewhere(parts[-1], known)[:2]
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            return f"{key}: verl has no such key.{hint}"
        section = section[part]
    return None


def _elsewhere(name: str, known: Mapping[str, Any], before: str = "") -> list[str]:
    """Where else there is a key of that name."""
    found = []
    for key, value in known.items():
        if key == name and not ignored.why(before + key, known):
            found.append(before + key)
        if isinstance(value, Mapping):
            found += _elsewhere(name, value, f"{before}{key}.")
    return found


def _nowhere(key: str, config: Any) -> str | None:
    """What is wrong with an added key of a section that verl reads into a class without such a field."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, section) if section else None
    target = parent.get("_target_") if parent is not None and hasattr(parent, "get") else None
    if not target or not key.startswith("actor_rollout_ref."):
        return None  # verl reads the other sections as they are
    names = [field.name for field in fields(get_class(target))]
    if name in names:
        return None
    near = difflib.get_close_matches(name, names, 1)
    return f"{key}: {section} has no field {name}.{f' Did you mean {near[0]}?' if near else ''}"


def _bad_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key in (*SIZES, *MAY_BE_NULL, *FREQUENCIES):
        value = select(config, key)
        if (value is None and key in MAY_BE_NULL) or (value == -1 and key in FREQUENCIES):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            beside = ", or -1 for never" if key in FREQUENCIES else ", or null" if key in MAY_BE_NULL else ""
            yield f"{key}={_shown(value)}: write a whole number of at least 1{beside}"
    for key, allowed in NUMBERS.items():
        value = select(config, key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if allowed == _SHARE and not (number and 0 < value <= 1):
            yield f"{key}={_shown(value)}: write a share above 0, at most 1"
        elif allowed != _SHARE and not (number and (value > 0 or (allowed == _NOT_BELOW and value == 0))):
            yield f"{key}={_shown(value)}: write a number, {allowed}"


def _bad_choices(config: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in choices().items():
        value = select(config, key)
        for one in value if isinstance(value, list) else [value]:
            if one not in allowed:
                near = difflib.get_close_matches(str(one), allowed, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                yield f"{key}={_shown(one)}: verl knows {', '.join(allowed)}.{hint}"


def _unfit(config: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that verl would find not to fit once its processes run."""
    prompts, n = select(config, "data.train_batch_size"), select(config, "actor_rollout_ref.rollout.n")
    mini = select(config, "actor_rollout_ref.actor.ppo_mini_batch_size")
    micro = select(config, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu")
    nodes, per_node = select(config, "trainer.nnodes"), select(config, "trainer.n_gpus_per_node")
    parallel = select(config, "actor_rollout_ref.rollout.tensor_model_parallel_size")
    numbers = (prompts, n, mini, nodes, per_node, parallel)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return
    gpus = nodes * per_node
    if gpus % parallel:
        yield f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} does not divide {gpus} GPUs"
    if not _is_fsdp(config) or select(config, "actor_rollout_ref.actor.use_dynamic_bsz"):
        return  # verl's own check knows more
    if mini * n % gpus:
        yield (
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} prompts x rollout.n={n} = {mini * n} completions, "
            f"which {gpus} GPUs cannot share evenly"
        )
    elif isinstance(micro, int) and micro > 0 and mini * n // gpus % micro:
        yield (
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {mini * n // gpus} "
            f"completions that a GPU has of an optimizer step"
        )
    if prompts % mini:
        yield f"data.train_batch_size={prompts} is no multiple of actor.ppo_mini_batch_size={mini}: verl would pad it"


def _is_fsdp(config: Mapping[str, Any]) -> bool:
    return str(select(config, "actor_rollout_ref.actor.strategy")).startswith("fsdp")


def _what_verl_says(config: Any) -> Iterator[str]:
    """verl's own validation, as main_ppo calls it, and the classes that its workers make of their sections.

    The rank of an adapter is checked by itself: verl imports vLLM to do it, for seconds.
    """
    from omegaconf import open_dict
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = copy.deepcopy(config)
    rank = config.actor_rollout_ref.model.lora_rank
    if not isinstance(rank, int) or rank < 0 or rank > LORA_RANKS:
        yield f"actor_rollout_ref.model.lora_rank={rank}: write 0 for none, or a number up to {LORA_RANKS}"
        return
    if not config.trainer.use_v1:
        yield "trainer.use_v1=false: verl's old trainer knows nothing of unscored rollouts: leave it out"
        return
    with open_dict(config):
        config.actor_rollout_ref.model.lora_rank = 0
    try:
        validate_config(config, need_reference_policy(config), need_critic(config))
        omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    except Exception as error:  # assertions and whatever Hydra and the classes raise: verl's own words are handed on
        yield f"verl refuses it: {' '.join(str(error).split()) or type(error).__name__}"


def _notes(config: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What is allowed, and costs something that the workbench relies on."""
    notes = []
    if select(config, "algorithm.adv_estimator") != "grpo_scored":
        notes.append("algorithm.adv_estimator is not grpo_scored: answers that could not be judged count as reward 0")
    logger = select(config, "trainer.logger")
    if "file" not in (logger if isinstance(logger, list) else [logger]):
        notes.append("trainer.logger has no `file`: no metrics come back into the run folder")
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return notes + [f"{key}: verl.overrides changes what the config says" for key in twice]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _text(name: Any) -> str:
    return str(getattr(name, "value", name))


def main() -> int:
    """All runs, in one process: importing verl takes ten seconds, composing one config a second or two."""
    runs = json.load(sys.stdin)["runs"]
    with redirect_stdout(sys.stderr):  # verl prints
        import verl
        from hydra import initialize_config_dir

        with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
            answers = [examine(overrides) for overrides in runs]
    sys.stdout.write(json.dumps(answers, default=str))
    sys.stdout.flush()
    os._exit(0)  # Ray's and torch's threads have nothing left to do


if __name__ == "__main__":
    sys.exit(main())
