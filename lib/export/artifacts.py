"""The artifacts of a run: what each is made from, in which order, and by whom.

Owns the order, the origin of each artifact, and the checks before any is begun. Must not know tasks or trainers.

    python -c "from lib.export.artifacts import export_run; help(export_run)"
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import models
from lib.config import ArtifactKind, Config
from lib.export import gguf, hub, ollama
from lib.export.adapter import adapter_bytes, write_adapter
from lib.export.base import Adapter, Checkpoint, check_same_base, open_adapter, open_checkpoint, read_json
from lib.export.card import base_licence, model_card
from lib.export.errors import ExportError
from lib.export.folder import (
    PROOF,
    Artifact,
    Origin,
    artifact_folder,
    check_disk,
    check_memory,
    content_hash,
    finished,
    manifest_hash,
    publish,
    writing,
)
from lib.export.merge import Form, Merge
from lib.export.tokenizers import CONFIG, check_same_tokenizer, copy_beside, copy_tokenizer
from lib.generate import unloaded_chat
from lib.runfolder import Run, base_hash, exclusive

logger = logging.getLogger(__name__)

ORDER: tuple[ArtifactKind, ...] = ("adapter", "merged", "mxfp4", "gguf-adapter", "gguf", "ollama")
"""Some are made from others."""

Made = tuple[Mapping[str, str], Mapping[str, Any]]
"""Hashes of tensors, and facts."""


class Trained(NamedTuple):
    """What a run's training made, opened."""

    weights: Checkpoint
    """The base that an adapter goes into, or the whole trained model."""
    adapter: Adapter | None
    base: str
    """The base's Hub id, or its folder's own name."""
    revision: str | None
    tokenizer: Path
    """The folder whose tokenizer files leave with an artifact."""
    step: int | None


def export_run(run: Run, config: Config | None = None) -> list[Artifact]:
    """Make the artifacts that `config.export` names (None = the run's own config).

    Whether one of them may be pushed, if it is to be, is asked first: `push_exported` does it, once they are proven.
    An artifact that is there with the same origin is not made again. One process at a time. Raises ExportError;
    RunError and ModelError where folder or model cannot be used.
    """
    config = config or run.config
    wanted = [kind for kind in ORDER if kind in config.export.artifacts]
    if config.export.hub.push:
        hub.check_push(config.export.hub)
    if any("gguf" in kind for kind in wanted):
        gguf.converters(config.export.llama_cpp)
    with exclusive(run.path("stages", "export.lock"), wait=2.0, doing="is exporting this run"):
        trained = open_trained(run, config)
        found = [_export(run, config, trained, kind) for kind in wanted]
    return found


def push_exported(run: Run, artifacts: Sequence[Artifact], config: Config | None = None) -> hub.Pushed | None:
    """Push the artifact that `config.export.hub` names; None where nothing is to be pushed. Raises ExportError."""
    config = config or run.config
    if not config.export.hub.push:
        return None
    return push_run(run, next(one for one in artifacts if one.kind == config.export.hub.artifact), config)


def push_run(run: Run, artifact: Artifact, config: Config | None = None) -> hub.Pushed:
    """Push a finished artifact with a card about the run. Raises ExportError; also where a proof of it has failed."""
    config = config or run.config
    _check_no_proof_failed(artifact)
    source = Path(_base_source(run, config))
    folder = source if source.is_dir() else open_checkpoint(str(source), config.model).folder
    return hub.push(artifact, model_card(artifact, run, base_licence(folder)), config.export.hub)


def _check_no_proof_failed(artifact: Artifact) -> None:
    path = artifact.folder / PROOF
    if not path.is_file():
        raise ExportError(
            f"{artifact.kind} is not proven yet, so it is not pushed: notebook 5_export_and_serve does both"
        )
    proof = read_json(path)
    failed = [name for name, check in proof["checks"].items() if check["passed"] is False]
    if failed:
        raise ExportError(f"{artifact.kind} is NOT the policy that was trained, so it is not pushed: {proof['why']}")


def open_trained(run: Run, config: Config) -> Trained:
    """What the run's training made, with the base that it belongs to. Raises ExportError, ModelError."""
    outputs = run.outputs("training") or {}
    made, step = outputs.get("path"), outputs.get("steps")
    if made is None or not (run.folder / made).is_dir():
        raise ExportError(
            f"run {run.name!r} has no result yet: run notebook 3_grpo_training with run_name={run.name} first"
        )
    folder, source = run.folder / made, _base_source(run, config)
    if made != "adapter":
        name, revision = (Path(source).name, None) if Path(source).is_dir() else (source, config.model.revision)
        return Trained(open_checkpoint(str(folder), config.model), None, name, revision, folder, step)
    adapter = open_adapter(folder)
    check_same_base(adapter, source)
    _check_base_unchanged(run, config)
    tokenizer = models.load_tokenizer(source, config.model)
    if (folder / CONFIG).is_file():
        check_same_tokenizer(tokenizer, models.load_tokenizer(str(folder), config.model))
    base = open_checkpoint(source, config.model)
    return Trained(base, adapter, base.name, base.revision, base.folder, step)


def _base_source(run: Run, config: Config) -> str:
    return models.resolve_model(config, run.read_rows("train") if config.model.name == models.STARTER else [])


def _check_base_unchanged(run: Run, config: Config) -> None:
    """A folder's weights may have been replaced since the adapter was trained on them."""
    known = run.stages()["training"]["key"]["inputs"]
    changed = [name for name, value in base_hash(config).items() if known.get(name, value) != value]
    if changed:
        raise ExportError(
            f"{changed[0]} is not what the adapter was trained on: its files changed since. Put the old ones back, or "
            f"train again"
        )


def _export(run: Run, config: Config, trained: Trained, kind: ArtifactKind) -> Artifact:
    origin = _origin(run, config, trained, kind)
    there = finished(run, origin)
    if there:
        return there
    logger.info("export: making %s", kind)
    with writing(run, kind) as partial:
        hashes, facts = _make(run, config, trained, kind, partial)
        return publish(partial, artifact_folder(run, kind), origin, hashes, facts)


def _origin(run: Run, config: Config, trained: Trained, kind: ArtifactKind) -> Origin:
    settings: dict[str, Any] = {}
    if kind in ("merged", "mxfp4"):
        settings = {"dtype": config.export.dtype, "shard_gb": config.export.shard_gb}
    if "gguf" in kind:
        settings = {"gguf_type": config.export.gguf_type}
    if kind == "ollama":
        settings = {"date": str(config.model.date), "effort": config.model.reasoning_effort or ""}
    made_of = _gguf_source(config) if kind == "gguf" else _ollama_source(config) if kind == "ollama" else None
    settings |= {"from": made_of} if made_of else {}
    adapter = trained.adapter
    return Origin(
        kind=kind,
        run=run.name,
        trained="adapter" if adapter else "model",
        trained_hash=adapter.hash if adapter else trained.weights.hash,
        step=trained.step,
        base=trained.base,
        revision=trained.revision,
        base_hash=trained.weights.hash if adapter else "",
        config_hash=content_hash(run.stages()["training"]["key"]["config"]),
        settings=settings,
        source=manifest_hash(artifact_folder(run, made_of)) if made_of else "",
    )


def _make(run: Run, config: Config, trained: Trained, kind: ArtifactKind, partial: Path) -> Made:
    """Write an artifact's files into a folder."""
    if kind in ("merged", "mxfp4"):
        return _make_whole(config, trained, kind, partial)
    if kind == "gguf":
        model = artifact_folder(run, _gguf_source(config))
        check_disk(partial, _size(model) * (2 if config.export.gguf_type == "f32" else 1), kind)
        return {}, gguf.write_model(model, partial, config.export.llama_cpp, config.export.gguf_type)
    if kind == "ollama":
        return {}, _make_ollama(run, config, trained, partial)
    if trained.adapter is None:
        raise ExportError(
            f"run {run.name!r} trained all weights (lora.enabled: false), so there is no adapter: take {kind} out of "
            f"export.artifacts"
        )
    check_disk(partial, adapter_bytes(trained.adapter), kind)
    if kind == "adapter":
        return write_adapter(trained.adapter, trained.weights, partial, config.model.trust_remote_code), {}
    settings = config.export
    return {}, gguf.write_adapter(trained.adapter, trained.weights, partial, settings.llama_cpp, settings.gguf_type)


def _make_whole(config: Config, trained: Trained, kind: ArtifactKind, partial: Path) -> Made:
    dtype = None if config.export.dtype == "base" else config.export.dtype
    form: Form = "mxfp4" if kind == "mxfp4" else "dense"
    merge = Merge(trained.weights, trained.adapter, form, dtype, config.model.trust_remote_code)
    check_disk(partial, merge.bytes + 2**26, kind)
    check_memory(merge.memory, kind)
    copy_tokenizer(trained.tokenizer, partial)
    copy_beside(trained.weights.folder, partial, config.model.trust_remote_code)
    hashes = merge.write(partial, int(config.export.shard_gb * 1e9))
    return hashes, merge.measured.facts()


def _make_ollama(run: Run, config: Config, trained: Trained, partial: Path) -> dict[str, Any]:
    chat = unloaded_chat(config, str(trained.tokenizer))
    source = _ollama_source(config)
    folder = artifact_folder(run, source)
    return ollama.write_ollama(
        partial, source, folder, trained.weights.folder, chat.tokenizer, sorted(chat.end_ids), run.name
    )


def _ollama_source(config: Config) -> ArtifactKind:
    """What a Modelfile is made of: what Ollama takes of most models first."""
    order: tuple[ArtifactKind, ...] = ("gguf", "mxfp4", "merged", "gguf-adapter", "adapter")
    return next(kind for kind in order if kind in config.export.artifacts)


def _gguf_source(config: Config) -> ArtifactKind:
    """What a GGUF file is converted from: packed experts where they are made, as llama.cpp takes them as they are."""
    return "mxfp4" if "mxfp4" in config.export.artifacts else "merged"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
