"""verl's checkpoints as Hugging Face folders: what notebooks 4 and 5 take.

Owns the way from FSDP shards to an adapter or a model, by verl's own merger, and which checkpoints have gone it. Must
not know how they came to be.

    python -c "from lib.runfolder import read_run; from lib.verl.checkpoints import steps; \
print(steps(read_run('outputs/my-run')))"
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

from lib.runfolder import Run, write_json
from lib.verl.cluster import TRACKER
from lib.verl.environment import call
from lib.verl.errors import VerlError

logger = logging.getLogger(__name__)

FOLDER = "verl/checkpoints"
_SECONDS = 3600.0
"""What the merger may take for one checkpoint."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def steps(run: Run) -> list[int]:
    """The steps (verl's) of the whole checkpoints, in order: verl notes a step once everything of it is written."""
    tracker = run.folder / FOLDER / TRACKER
    if not tracker.is_file():
        return []
    newest = int(tracker.read_text(encoding="utf-8").strip() or 0)
    found = (re.fullmatch(r"global_step_(\d+)", path.name) for path in tracker.parent.glob("global_step_*"))
    return sorted(step for match in found if match and (step := int(match[1])) <= newest)


def convert_all(run: Run, python: str, base: str) -> list[Path]:
    """Every whole checkpoint as checkpoints/step-N, where it is not there yet; all of them, in order.

    N counts optimizer steps. `base`: the folder or Hub id that was trained from. Raises VerlError.
    """
    converted = []
    for step in steps(run):
        target = run.folder / "checkpoints" / f"step-{step * run.config.steps_per_batch}"
        if not target.is_dir():
            convert(run, step, target, python, base)
        converted.append(target)
    return converted


def convert(run: Run, step: int, target: Path, python: str, base: str) -> None:
    """One checkpoint: whole, or not there at all. Raises VerlError."""
    shards = run.folder / FOLDER / f"global_step_{step}" / "actor"
    partial = run.path("checkpoints", f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _merge(shards, partial, python)
    folder = partial
    if run.config.lora.enabled:
        folder = partial / "lora_adapter"
        if not (folder / "adapter_config.json").is_file():
            raise VerlError(f"verl's merger wrote no adapter of {shards}, although lora.enabled is true")
        _name_base(folder / "adapter_config.json", base)
        _copy_tokenizer(shards / "huggingface", folder)
    write_json(folder / "verl.json", {"step": step, "shards": str(shards.relative_to(run.folder))})
    os.replace(folder, target)
    shutil.rmtree(partial, ignore_errors=True)
    logger.info("checkpoint converted: %s", target.name)


def _merge(shards: Path, target: Path, python: str) -> None:
    arguments = ["merge", "--backend", "fsdp", "--local_dir", str(shards), "--target_dir", str(target)]
    arguments.append("--use_cpu_initialization")
    try:
        done = call(python, "verl.model_merger", *arguments, seconds=_SECONDS, CUDA_VISIBLE_DEVICES="")
    except subprocess.TimeoutExpired:
        raise VerlError(f"verl's merger did not end within {_SECONDS:g} s on {shards}") from None
    if done.returncode:
        raise VerlError(f"verl's merger failed on {shards}: {done.stderr.strip()[-1500:]}")


def _name_base(file: Path, base: str) -> None:
    """verl leaves open what an adapter was trained on."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, settings | {"base_model_name_or_path": base})


def _copy_tokenizer(source: Path, target: Path) -> None:
    weights = {path for pattern in _WEIGHTS for path in source.glob(pattern)}
    skipped = {"config.json", "generation_config.json"}
    for path in source.iterdir():
        if path.is_file() and path not in weights and path.name not in skipped:
            shutil.copy2(path, target / path.name)
