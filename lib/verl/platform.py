r"""verl without an accelerator: a platform for its plug-in registry, and its FSDP engine for the device `cpu`.

Owns what verl asks of a device. For a real step where there is no GPU (tests, a laptop): slow, and never chosen where
there is one. Ray has to be told of as many GPUs as verl shall count (`ray_kwargs.ray_init.num_gpus`): they are places
for processes, nothing else. Must not know configs, tasks or notebooks.

    VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda VERL_USE_EXTERNAL_MODULES=lib.verl.plugin \
        build/verl/bin/python -m verl.trainer.main_ppo ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

NAME = "cpu"


@PlatformRegistry.register(platform=NAME)
class PlatformCPU(PlatformBase):  # type: ignore[misc]
    """The processor as verl's device."""

    @property
    def device_name(self) -> str:
        return NAME

    @property
    def vendor_name(self) -> str:
        return NAME

    @property
    def device_module(self) -> ModuleType:
        return _device()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device(NAME)  # a number would be an accelerator's to `tensor.to` and FSDP

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # weights go through shared memory

    def cudart(self) -> Any:
        return None


@cache
def _device() -> ModuleType:
    """`torch.cpu`, and what verl asks of a device's memory beside it: nothing of it is used here."""
    device = ModuleType("device")
    device.__dict__.update(vars(torch.cpu))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(device, name, lambda *_: 0)
    for name in ("reset_peak_memory_stats", "empty_cache", "ipc_collect", "set_device", "manual_seed"):
        setattr(device, name, lambda *_: None)
    device.get_device_name = lambda *_: "CPU"  # type: ignore[attr-defined]
    device.mem_get_info = lambda *_: (_free(), _free())  # type: ignore[attr-defined]
    device.get_rng_state = torch.get_rng_state  # type: ignore[attr-defined]
    device.set_rng_state = torch.set_rng_state  # type: ignore[attr-defined]
    return device


def _free() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _name_each_backend_once() -> None:
    """verl asks torch for `cpu:gloo,<device>:<backend>`, which names the CPU twice here, and torch refuses that."""
    start = torch.distributed.init_process_group

    def once(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if backend:
            backend = ",".join(dict.fromkeys(backend.split(",")))
        start(backend, *args, **kwargs)

    torch.distributed.init_process_group = once


_name_each_backend_once()
