"""Publishing: a version of the weights as a folder that is whole or not there.

Owns `<run>/weights/v-N/`: what is in it by method, in which order it appears, and which versions stay. Must not know
workers or the trainer.

    python -c "from lib.sync.folders import publish; help(publish)"
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.roles import Method, Release
from lib.runfolder import clear_errors
from lib.sync.errors import SyncError
from lib.sync.manifest import NAME, describe, write_manifest
from lib.sync.merge import base_model, merged_pieces, merged_state
from lib.sync.tensors import write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEPT = 2
"""Steps whose versions stay, one for every method that was asked for: the newest, and the one that workers serve until
they have it."""

WEIGHTS = "model.safetensors"

Hashes = dict[str, dict[str, str]]
"""File -> tensor -> hash, where the writer took it."""


def publish(
    model: PreTrainedModel,
    weights: Path,
    *,
    version: int,
    step: int,
    method: Method,
    run: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> Release:
    """Write the model's weights as `weights`/v-`version`; the live model is not touched.

    lora: the adapter. reload and volume: all weights, adapters merged (`dtype`: of these; None = as they are), and the
    model's config. checkpoint: a whole model as `save_pretrained` writes it, with the tokenizer. Raises SyncError where
    the model does not allow the method, RunError where the disk does not.

    The folder gets its name when all of it is written, manifest last. It is on the disk by then, but for `reload`,
    where that goes on in the background: workers of this machine read it from the kernel's memory, and a folder that a
    crash left half-written does not pass `check`.
    """
    began = time.perf_counter()
    folder = weights / f"v-{version}"
    with clear_errors(folder):
        weights.mkdir(parents=True, exist_ok=True)
        partial = weights / f".v-{version}.partial"
        _clear(weights, version, step, method, reuse=partial if method in ("reload", "volume") else None)
        known = _WRITERS[method](model, partial, tokenizer, dtype)
        manifest = write_manifest(
            partial,
            run=run,
            version=version,
            step=step,
            method=method,
            seconds=round(time.perf_counter() - began, 4),
            **describe(partial, known),
        )
        if method != "reload":
            flush(partial)
        os.replace(partial, folder)
    if method == "reload":
        threading.Thread(target=flush, args=(folder,), name=f"flush v-{version}", daemon=True).start()
    logger.info("weights: version %d published for %s in %.2f s", version, method, time.perf_counter() - began)
    return Release(version, step, method, str(folder), manifest.hash)


def flush(folder: Path) -> None:
    """Bring a folder to the disk; one that is pruned meanwhile needs it no more."""
    try:
        for path in [*folder.rglob("*"), folder, folder.parent]:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except FileNotFoundError:
        logger.info("weights: %s was pruned before it was on the disk", folder.name)


def versions(weights: Path) -> list[Path]:
    """The published versions, oldest first."""
    return sorted(weights.glob("v-*"), key=lambda path: int(path.name.removeprefix("v-")))


def _clear(weights: Path, version: int, step: int, method: Method, reuse: Path | None) -> None:
    """Remove what an ended publication left, what a run left that went on from an earlier step, and what is old.

    `reuse`: where the weights file of one of them goes to be written over. Pages that are there cost a fraction.
    """
    for left in weights.glob(".v-*.partial"):
        shutil.rmtree(left)
    known = versions(weights)
    older = [path for path in known if int(path.name.removeprefix("v-")) < version]
    kept = _in_use(older, step, method)
    for old in known:
        if old in kept:
            continue
        (old / NAME).unlink(missing_ok=True)  # from here on it is no version
        if reuse and not reuse.exists() and (old / WEIGHTS).is_file():
            reuse.mkdir()
            os.replace(old / WEIGHTS, reuse / WEIGHTS)
        shutil.rmtree(old)


def _in_use(older: Sequence[Path], step: int, method: Method) -> list[Path]:
    """Of the last KEPT steps, the one that is about to be written counted: the newest version by every method."""
    steps, ways, kept = {step}, {(step, method)}, []
    for folder in reversed(older):
        try:
            manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
            way = manifest["step"], manifest["method"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # whatever it is, nobody can load it
        if way[0] not in steps and len(steps) == KEPT:
            break
        if way not in ways:
            kept.append(folder)
        steps.add(way[0])
        ways.add(way)
    return kept


# what a folder holds, by method ---------------------------------------------------------------------------------------
def _write_adapter(model: PreTrainedModel, folder: Path, _: object, __: object) -> Hashes:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise SyncError("sync_method lora needs a model with an adapter: set lora.enabled, or sync_method to reload")
    # Embeddings are looked for on the Hub otherwise.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return {}


def _write_weights(model: PreTrainedModel, folder: Path, _: object, dtype: torch.dtype | None) -> Hashes:
    folder.mkdir(exist_ok=True)
    hashes = write_tensors(folder / WEIGHTS, merged_pieces(model, dtype))
    base_model(model).config.save_pretrained(folder)
    return {WEIGHTS: hashes}


def _write_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, _: object) -> Hashes:
    base_model(model).save_pretrained(folder, state_dict=merged_state(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return {}


_Writer = Callable[["PreTrainedModel", Path, "PreTrainedTokenizerBase | None", "torch.dtype | None"], Hashes]
_WRITERS: Mapping[Method, _Writer] = {
    "lora": _write_adapter,
    "reload": _write_weights,
    "volume": _write_weights,
    "checkpoint": _write_model,
}
