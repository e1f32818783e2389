"""A run folder as a training leaves it, around a given base and a random adapter: what exports begin with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tiny_models import tiny_adapter

from lib.config import parse_config
from lib.runfolder import Run, base_hash, open_run


def finished_run(folder: Path, base: Path, name: str = "trained", export: Any = None, **adapter: Any) -> Run:
    """A finished run on `base`; `adapter` are settings of `tiny_adapter`, `export` is the config's section."""
    run = _begun(folder, base, name, export, lora=True)
    tiny_adapter(base, run.folder / "adapter", **adapter)
    (run.folder / "adapter" / "training_args.bin").write_bytes(b"a pickle")
    run.end("training", {"path": "adapter", "steps": 3})
    return run


def finished_whole(folder: Path, base: Path, export: Any = None) -> Run:
    """The same where all weights were trained."""
    run = _begun(folder, base, "whole", export, lora=False)
    shutil.copytree(base, run.folder / "model")
    run.end("training", {"path": "model", "steps": 3})
    return run


def _begun(folder: Path, base: Path, name: str, export: Any, lora: bool) -> Run:
    paths = {"outputs": str(folder / "outputs"), "cache": str(folder / "cache")}
    settings = {"model": {"name": str(base)}, "lora": {"enabled": lora}, "paths": paths, "export": export or {}}
    config = parse_config({"task": {"name": "decisions"}, **settings})
    run = open_run(name, config)
    run.begin("training", ("task", "model", "lora", "training"), base_hash(config))
    return run
