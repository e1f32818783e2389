"""sync_manifest.json: what a version of the weights holds, written last, and checked before any of it is taken.

Owns its fields, the hashes, and what a folder must be for a worker to load it. Must not know models or engines.

    python -c "from lib.sync.manifest import Manifest; print(list(Manifest.model_fields))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.roles import Method, Release
from lib.runfolder import write_json
from lib.sync.errors import SyncError
from lib.sync.tensors import hash_bytes, hash_file, hash_tensors, read_header

NAME = "sync_manifest.json"
SCHEMA = 1

LOADS: Mapping[Method, tuple[Method, ...]] = {
    "lora": ("lora",),
    "reload": ("reload", "volume"),
    "volume": ("volume", "reload"),
    "checkpoint": ("checkpoint", "volume", "reload"),
}
"""How a version may be loaded -> how it may have been published: `reload` writes what `volume` loads."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(_Frozen):
    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of it."""
    hash: str
    """XXH3, 128 bits, of the bytes."""


class Manifest(_Frozen):
    schema_version: int = Field(SCHEMA, alias="schema")
    run: str
    version: int
    step: int
    method: Method
    """How it was published."""
    tensors: dict[str, TensorRecord]
    files: dict[str, str]
    """Every other file of the folder and its hash."""
    hash: str
    """Of all the above."""
    bytes: int
    seconds: float
    """From the asking to the manifest."""

    def total(self) -> str:
        """The hash over everything that decides what a worker serves."""
        facts = self.model_dump(mode="json", exclude={"hash", "seconds"}, by_alias=True)
        return hash_bytes(json.dumps(facts, sort_keys=True).encode())


def describe(folder: Path, known: Mapping[str, Mapping[str, str]] | None = None) -> dict[str, Any]:
    """The fields `tensors`, `files` and `bytes` of a folder. `known`: file -> hashes that its writer took."""
    tensors: dict[str, Any] = {}
    files: dict[str, str] = {}
    size = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME):
        name = path.relative_to(folder).as_posix()
        if path.suffix != ".safetensors":
            files[name] = hash_file(path)
            continue
        size += path.stat().st_size
        stored = read_header(path)
        hashes = (known or {}).get(name) or hash_tensors(path, stored)
        for tensor, one in stored.items():
            tensors[tensor] = TensorRecord(file=name, shape=one.shape, dtype=one.dtype, hash=hashes[tensor])
    return {"tensors": tensors, "files": files, "bytes": size}


def write_manifest(folder: Path, **fields: Any) -> Manifest:
    """Write a folder's manifest; from then on it is whole."""
    unsealed = Manifest(hash="", **fields)
    manifest = unsealed.model_copy(update={"hash": unsealed.total()})
    write_json(folder / NAME, manifest.model_dump(mode="json", by_alias=True))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest, not yet compared with its files. Raises SyncError."""
    path = folder / NAME
    if not path.is_file():
        raise SyncError(f"{folder} has no {NAME}: it is not there, or was not finished")
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise SyncError(f"{path} is damaged, or of another workbench: {error.errors()[0]['msg']}") from None
    if manifest.schema_version != SCHEMA or manifest.hash != manifest.total():
        raise SyncError(f"{path} was changed, or has another schema than {SCHEMA}: its hash does not fit")
    return manifest


def check(release: Release, run: str) -> Manifest:
    """The manifest of a version whose every byte is what was published for this run. Raises SyncError."""
    folder = Path(release.folder)
    manifest = read_manifest(folder)
    if manifest.run != run:
        raise SyncError(f"{folder} holds weights of the run {manifest.run!r}, and this worker serves {run!r}")
    if (manifest.version, manifest.step) != (release.version, release.step):
        raise SyncError(
            f"{folder} holds version {manifest.version} of step {manifest.step}, and version {release.version} of step "
            f"{release.step} was asked for"
        )
    if manifest.method not in LOADS[release.method]:
        allowed = " or ".join(LOADS[release.method])
        raise SyncError(f"{folder} was published for {manifest.method}; {release.method} loads {allowed}")
    if manifest.hash != release.hash:
        raise SyncError(
            f"{folder} holds other weights than version {release.version} was published with: another process wrote it"
        )
    _check_files(folder, manifest)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, known in manifest.files.items():
        if name not in found:
            raise SyncError(f"{folder / name} is missing")
        if hash_file(found[name]) != known:
            raise SyncError(f"{folder / name} is not what was published: its hash differs")
    for file in sorted({record.file for record in manifest.tensors.values()}):
        if file not in found:
            raise SyncError(f"{folder / file} is missing")
        _check_tensors(found[file], {n: record for n, record in manifest.tensors.items() if record.file == file})
    # What nobody vouches for could still be loaded: an index, another shard.
    strangers = found.keys() - manifest.files.keys() - {record.file for record in manifest.tensors.values()} - {NAME}
    if strangers:
        raise SyncError(f"{folder} holds files that were not published: {', '.join(sorted(strangers))}")


def _check_tensors(path: Path, records: Mapping[str, TensorRecord]) -> None:
    stored = read_header(path)
    if stored.keys() != records.keys():
        missing, more = sorted(records.keys() - stored.keys()), sorted(stored.keys() - records.keys())
        raise SyncError(f"{path}: tensors missing: {missing[:3] or 'none'}; not published: {more[:3] or 'none'}")
    for name, record in records.items():
        if (stored[name].shape, stored[name].dtype) != (record.shape, record.dtype):
            raise SyncError(
                f"{path}: {name} is {stored[name].dtype} {stored[name].shape}, and {record.dtype} {record.shape} was "
                f"published"
            )
    hashes = hash_tensors(path, stored)
    wrong = [name for name, record in records.items() if hashes[name] != record.hash]
    if wrong:
        raise SyncError(f"{path}: not what was published, the hash differs: {', '.join(sorted(wrong)[:3])}")
