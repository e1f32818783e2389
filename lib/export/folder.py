"""An artifact's folder `<run>/export/<kind>/`: whole or not there, and known by its manifest.

Owns `export.json` (written last, before the folder gets its name), what makes an export another one, and whether disk
and memory suffice. Must not know what is in the files.

    python -c "from lib.export.folder import Manifest; print(list(Manifest.model_fields))"

An export that is there with the same origin is taken as it is; one of another run, adapter, base or setting is refused:
nothing finished is overwritten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.config import ArtifactKind
from lib.export.errors import ExportError
from lib.memory.limits import main_memory
from lib.provenance import package_version
from lib.runfolder import Run, clear_errors, write_json
from lib.sync.folders import flush

logger = logging.getLogger(__name__)

MANIFEST = "export.json"
PROOF = "proof.json"
"""Written beside what was exported, by lib/export/proof.py."""
SCHEMA = 1
PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf")

_SPARE = 256 * 2**20
"""Bytes that stay free: a disk that is full to the last page stops everything else too."""


class Artifact(NamedTuple):
    """A finished export."""

    kind: ArtifactKind
    folder: Path
    facts: Mapping[str, Any]
    """Its manifest's fields."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Frozen):
    """What an artifact was made from: the same origin, the same bytes."""

    kind: ArtifactKind
    run: str
    trained: str
    """`adapter`, or `model` where all weights were trained."""
    trained_hash: str
    step: int | None
    """Optimizer steps of training."""
    base: str
    """The Hub id, or a folder's own name."""
    revision: str | None
    base_hash: str
    config_hash: str
    """Of the run's config."""
    settings: dict[str, Any]
    """Keys of `export` that decide this artifact."""
    source: str = ""
    """SHA-256 of the manifest of the artifact that it was made of; "" where it was made of none."""


class FileRecord(_Frozen):
    bytes: int
    sha256: str


class Manifest(_Frozen):
    schema_version: int = Field(SCHEMA, alias="schema")
    origin: Origin
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    bytes: int
    tensors: dict[str, str]
    """Tensor -> XXH3 of its bytes, of weights that were written here."""
    tensors_hash: str
    """Of the above; "" where there are none."""
    facts: dict[str, Any]
    """What making it measured: tensors merged, error of packing."""
    versions: dict[str, str]


def artifact_folder(run: Run, kind: ArtifactKind) -> Path:
    return run.folder / "export" / kind


def finished(run: Run, origin: Origin) -> Artifact | None:
    """The artifact of this origin where it is there, with every file of the right size; None where nothing is.

    Raises ExportError where another export, or something else, stands in its place.
    """
    folder = artifact_folder(run, origin.kind)
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    if manifest.origin != origin:
        known, now = manifest.origin.model_dump(), origin.model_dump()
        differences = "; ".join(f"{key} was {known[key]!r}, now {now[key]!r}" for key in now if known[key] != now[key])
        raise ExportError(
            f"{_shown(folder)} is an export of something else ({differences}): move or delete that folder, and export "
            f"again"
        )
    _check_sizes(folder, manifest)
    logger.info("export: %s is there already, skipped", _shown(folder))
    return artifact(folder, manifest)


def check_artifact(folder: Path) -> Artifact:
    """An artifact of which every byte is what was written. Raises ExportError."""
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    for name, record in manifest.files.items():
        if _sha256(folder / name) != record.sha256:
            raise ExportError(f"{_shown(folder / name)} is not what was exported, its hash differs: {_AGAIN}")
    return artifact(folder, manifest)


def open_artifact(folder: Path) -> Artifact:
    """An artifact of which every file is there, by name and size: quick, where `check_artifact` reads them all.

    Raises ExportError.
    """
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    return artifact(folder, manifest)


def artifact(folder: Path, manifest: Manifest) -> Artifact:
    return Artifact(manifest.origin.kind, folder, manifest.model_dump(mode="json", by_alias=True))


def manifest_hash(folder: Path) -> str:
    """What tells an artifact from what it was before it was made anew. Raises ExportError where it is not whole."""
    read_manifest(folder)
    return _sha256(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises ExportError where the folder is not a whole export."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ExportError(f"{_shown(folder)} has no {MANIFEST}: it is no finished export of this workbench. {_MOVE}")
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ExportError(f"{_shown(path)} is damaged ({error.errors()[0]['msg']}). {_MOVE}") from None
    if manifest.schema_version != SCHEMA:
        raise ExportError(
            f"{_shown(path)} has schema {manifest.schema_version}, this workbench reads {SCHEMA}. {_MOVE}"
        )
    return manifest


@contextmanager
def writing(run: Run, kind: ArtifactKind) -> Iterator[Path]:
    """A folder beside the artifact's to write into; it is removed again where writing fails.

    What an export that was killed left there goes first.
    """
    partial = artifact_folder(run, kind).with_name(f".{kind}.partial")
    with clear_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with clear_errors(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(
    partial: Path, folder: Path, origin: Origin, tensors: Mapping[str, str], facts: Mapping[str, Any]
) -> Artifact:
    """Write the manifest, bring all of it to the disk, and give the folder its name."""
    files = {
        path.relative_to(partial).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        schema=SCHEMA,
        origin=origin,
        files=files,
        bytes=sum(record.bytes for record in files.values()),
        tensors=dict(tensors),
        tensors_hash=content_hash(tensors) if tensors else "",
        facts=dict(facts),
        versions={name: version for name in PACKAGES if (version := package_version(name))},
    )
    with clear_errors(partial):
        write_json(partial / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
        flush(partial)
        try:
            os.replace(partial, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ExportError(f"{_shown(folder)} appeared while this export was made: two at once. {_MOVE}") from None
    logger.info("export: %s, %.3f GB", _shown(folder), manifest.bytes / 1e9)
    return artifact(folder, manifest)


def content_hash(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# disk and memory ------------------------------------------------------------------------------------------------------
def check_disk(folder: Path, needed: int, kind: ArtifactKind) -> None:
    """Refuse to begin what the disk cannot hold. `needed`: bytes."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed + _SPARE > free:
        raise ExportError(
            f"the artifact {kind} needs {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free where paths.outputs "
            f"lies (0.27 of them are left alone): free some space, set paths.outputs to another disk, or leave {kind} "
            f"out of export.artifacts"
        )


def check_memory(needed: int, kind: ArtifactKind) -> None:
    """Refuse to begin what memory cannot hold. `needed`: bytes."""
    free = main_memory()
    if needed > free:
        raise ExportError(
            f"the artifact {kind} needs {needed / 1e9:.2f} GB of memory (the adapter, the largest tensor and some "
            f"room), and {free / 1e9:.2f} GB are free: close what else runs (a kernel with a model, say), or export on "
            f"a larger machine"
        )


_AGAIN = "delete the folder, and export again"
_MOVE = "Move or delete it, and export again"


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    """A copy that was cut off has its manifest and not its files."""
    for name, record in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise ExportError(f"{_shown(path)} is {found}, and {record.bytes} bytes were exported: {_AGAIN}")
    strange = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        *manifest.files,
        MANIFEST,
        PROOF,
    }
    if strange:
        raise ExportError(
            f"{_shown(folder)} holds files that were not exported and could be loaded "
            f"({', '.join(sorted(strange)[:3])}): move them away"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(path: Path) -> str:
    """A path from the run's folder on."""
    parts = path.parts
    return "/".join(parts[max(0, parts.index("export") - 1) :]) if "export" in parts else path.name
