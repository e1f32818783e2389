"""The training program in verl's environment: what `python -m verl.trainer.main_ppo` does, with our trainer in it.

Owns the way from overrides to verl's entry, and how it says why it ended. Must not know where the overrides come from.

    build/verl/bin/python -m lib.verl.program outputs/my-run/verl/overrides.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT, WorkbenchError
from lib.log import scrub
from lib.verl import local_ray

ERROR = "error.txt"
"""In the folder of the overrides: why it ended, where that is ours to say."""

ENVIRONMENT = (
    "VERL_USE_EXTERNAL_MODULES",
    "VERL_PLATFORM",
    "VERL_ENGINE_DEVICE",
    "VLLM_CPU_KVCACHE_SPACE",
    "VERL_FILE_LOGGER_PATH",
    "WORKBENCH_RUN",
    "PYTHONPATH",
)
"""Variables that processes on other machines of a cluster get as well. Keys of judges are no part of it: Ray shows
them to everybody who may look at the cluster; set them on its machines."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", type=Path, help="a JSON list of Hydra overrides")
    file = parser.parse_args().overrides
    try:
        train(json.loads(file.read_text(encoding="utf-8")))
    except Exception as error:
        ours = next((one for one in _causes(error) if isinstance(one, WorkbenchError)), None)
        if ours is None:
            raise
        file.with_name(ERROR).write_text(scrub(str(ours)), encoding="utf-8")
        print(f"{type(ours).__name__}: {ours}", file=sys.stderr)
        return 1
    return 0


def train(overrides: list[str]) -> None:
    """Compose verl's config and train to its end."""
    if any("ray_kwargs.ray_init.address=" in text for text in overrides):
        _show_token()  # before Ray is imported
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.trainer import main_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from lib.verl.machines import Here

    folder = Path(main_ppo.__file__).parent / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    auto_set_device(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for name in ENVIRONMENT:
        if name in os.environ:
            key = f"ray_kwargs.ray_init.runtime_env.env_vars.{name}"
            OmegaConf.update(config, key, os.environ[name], force_add=True)
    address = config.ray_kwargs.ray_init.get("address")
    if not address:
        # Without a word Ray takes a cluster that it finds on this machine, even one that is long gone.
        OmegaConf.update(config, "ray_kwargs.ray_init.address", "local", force_add=True)
        local_ray.fix_ports()
    if not address or address.startswith(f"{local_ray.LOOPBACK}:"):
        local_ray.stay_here()
        OmegaConf.update(config, "ray_kwargs.ray_init._node_ip_address", local_ray.LOOPBACK, force_add=True)
    main_ppo.run_ppo(config, task_runner_class=Here(_runner()))


def _show_token() -> None:
    """A head that finds a token on its machine asks for it (Ray 2.60); who joins has to be told to show it."""
    default = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or default.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _runner() -> type:
    """verl's task runner, which makes our trainer and knows our estimator."""
    from verl.trainer.main_ppo import TaskRunnerV1

    plain: type = TaskRunnerV1.__ray_metadata__.modified_class

    class Runner(plain):  # type: ignore[misc]
        def run(self, config: Any) -> None:
            from verl.plugin.platform import get_platform
            from verl.trainer.ppo.v1 import trainer_base

            from lib.verl import advantage, machines
            from lib.verl.trainer import RunTrainer

            machines.wait_for(config.trainer.nnodes, get_platform().ray_resource_name(), config.trainer.n_gpus_per_node)
            machines.this_one_first()
            advantage.register()
            trainer_base.TRAINER_REGISTRY[config.trainer.v1.trainer_mode] = RunTrainer
            super().run(config)

    return Runner


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came of; Ray hands on what a process raised as `cause`."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found


if __name__ == "__main__":
    if str(PROJECT_ROOT) not in sys.path:
        sys.path.insert(0, str(PROJECT_ROOT))
    sys.exit(main())
