"""The adapter alone: its tensors, its config without this machine's paths, and the tokenizer.

Owns what of a training's adapter folder leaves: no pickle, and no README that names a folder. Must not know runs.

    python -c "from lib.export.adapter import write_adapter; help(write_adapter)"
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lib.export.base import ADAPTER, ADAPTER_CONFIG, Adapter, Checkpoint
from lib.export.skeleton import Skeleton, beyond_lora
from lib.export.tokenizers import copy_tokenizer
from lib.runfolder import write_json
from lib.sync.tensors import hash_tensors, read_header


def write_adapter(adapter: Adapter, base: Checkpoint, folder: Path, trust_remote_code: bool = False) -> dict[str, str]:
    """Write an adapter for this base; the hash of every tensor. Raises ExportError where they do not fit together."""
    if adapter.config.get("peft_type") == "LORA" and not beyond_lora(adapter):
        Skeleton(base, trust_remote_code).add(adapter)
    write_clean_adapter(adapter, base, folder)
    copy_tokenizer(base.folder, folder)
    return hash_tensors(folder / ADAPTER, read_header(folder / ADAPTER))


def write_clean_adapter(adapter: Adapter, base: Checkpoint, folder: Path) -> None:
    """Its tensors, and its config with the base's own name in the place of a path."""
    shutil.copyfile(adapter.folder / ADAPTER, folder / ADAPTER)
    config = {**adapter.config, "base_model_name_or_path": base.name, "revision": base.revision}
    write_json(folder / ADAPTER_CONFIG, config)


def adapter_bytes(adapter: Adapter) -> int:
    """What the folder will take, but for small files."""
    return (adapter.folder / ADAPTER).stat().st_size
