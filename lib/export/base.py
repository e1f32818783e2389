"""What an export is made from: a checkpoint's files, and the adapter that was trained on it.

Owns which files count, what is refused (pickles, other quantizations, another base), names without this machine's
paths, and hashes. Reads headers only. Must not know architectures or what is written.

    python -c "from pathlib import Path; from lib.export.base import open_checkpoint; help(open_checkpoint)"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import ModelSection
from lib.export.errors import ExportError
from lib.models.loading import download, same_base
from lib.runfolder import hash_file
from lib.sync.errors import SyncError
from lib.sync.tensors import Stored, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MACHINE_KEYS = ("_name_or_path", "name_or_path", "local_files_only", "is_local")
"""Keys of config.json and tokenizer_config.json that say where a file lay on the machine that wrote it."""


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    stored: Stored


@dataclass(frozen=True)
class Checkpoint:
    """A whole model on disk."""

    folder: Path
    name: str
    """A Hub id, or a folder's own name: never a path."""
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, Place]
    """In the order of the files and of the tensors in them."""

    @property
    def is_packed(self) -> bool:
        """Whether its experts are in MXFP4."""
        return "quantization_config" in self.config

    @cached_property
    def hash(self) -> str:
        """Of its weights and config, read in full once."""
        files = sorted({place.path for place in self.tensors.values()})
        return hash_files([self.folder / "config.json", *files])


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Place]

    @cached_property
    def hash(self) -> str:
        return hash_files([self.folder / ADAPTER, self.folder / ADAPTER_CONFIG])

    @property
    def bytes(self) -> int:
        """In memory, where it is float32."""
        return 4 * sum(_elements(place.stored.shape) for place in self.tensors.values())


def open_checkpoint(source: str, settings: ModelSection) -> Checkpoint:
    """The model of a folder, or of a Hub id, whose files are brought here. Raises ExportError, ModelError."""
    local = Path(source)
    folder = local if local.is_dir() else download(source, settings)
    path = folder / "config.json"
    if not path.is_file():
        raise ExportError(f"{_shown(source)} has no config.json: it is not a model that transformers wrote")
    config = read_json(path)
    quantization = config.get("quantization_config") or {}
    if quantization and quantization.get("quant_method") != "mxfp4":
        raise ExportError(
            f"{_shown(source)} is quantized with {quantization.get('quant_method')}: adapters are merged into "
            f"unquantized weights or MXFP4. Set model.name to the model that it was quantized from, and export again"
        )
    name = local.name if local.is_dir() else source
    revision = None if local.is_dir() else (settings.revision or folder.name)
    return Checkpoint(folder, name, revision, config, _tensors(folder, _shown(source)))


def open_adapter(folder: Path, file: str = ADAPTER) -> Adapter:
    """A LoRA adapter whose tensors are safetensors. Raises ExportError."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ExportError(f"{folder.name}/ has no {ADAPTER_CONFIG}: it is not an adapter that PEFT wrote")
    if not (folder / file).is_file():
        raise _pickled(folder, folder.name, file)
    return Adapter(folder, read_json(path), {name: Place(folder / file, one) for name, one in _header(folder / file)})


def check_same_base(adapter: Adapter, source: str) -> None:
    """Refuse an adapter that was trained on another base, by the rule of whoever loads it."""
    recorded = str(adapter.config.get("base_model_name_or_path") or "")
    if not same_base(recorded, source, adapter.folder):
        raise ExportError(
            f"the adapter was trained on {_shown(recorded)}, and this run's base is {_shown(source)}: set model.name "
            f"to the base that it was trained on"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ExportError(f"{path.name} in {path.parent.name}/ is damaged ({error}): fetch the model again") from None


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that name places on this machine, wherever they stand: parts have configs of their own
    (`text_config`)."""
    return {key: _without_paths(value) for key, value in config.items() if key not in MACHINE_KEYS}


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_paths(value)
    return [_without_paths(one) for one in value] if isinstance(value, list) else value


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def _tensors(folder: Path, shown: str) -> dict[str, Place]:
    """By the index where there is one: a stray file is none of the model's. Every file named must hold what it says."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise _pickled(folder, shown, WEIGHTS)
        return {name: Place(folder / WEIGHTS, one) for name, one in _header(folder / WEIGHTS)}
    places: dict[str, Place] = {}
    named = read_json(index).get("weight_map", {})
    for file in sorted(set(named.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ExportError(f"{shown}: {file}, which its index names, is missing: fetch the model again")
        places |= {name: Place(folder / file, one) for name, one in _header(folder / file) if named.get(name) == file}
    lost = sorted(named.keys() - places.keys())
    if lost:
        raise ExportError(f"{shown}: tensors that its index names are in no file: {', '.join(lost[:3])}")
    return places


def _header(path: Path) -> list[tuple[str, Stored]]:
    try:
        return sorted(read_header(path).items(), key=lambda item: item[1].begin)
    except SyncError as error:
        raise ExportError(f"{error}: fetch or train it again") from None


def _pickled(folder: Path, shown: str, wanted: str) -> ExportError:
    """The refusal of a folder without safetensors."""
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin"
    )
    if pickles:
        return ExportError(
            f"{shown} holds its weights as {pickles[0]}, a pickle, which can run code when it is read: only "
            f"safetensors are. Convert it where you trust it (load it and save_pretrained), and name that folder"
        )
    return ExportError(f"{shown} has no {wanted}: its weights are not there, or were not written to the end")


def _shown(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
