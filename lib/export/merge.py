"""Merging: an adapter added into its base on the way from one set of files to another, a tensor at a time.

Owns which tensors are written, in which type and file, and that what was written is what the architecture has. Must not
know runs or manifests.

    python -c "from lib.export.merge import write_merged; help(write_merged)"

Nothing is loaded as a model: a tensor is read in parts (blocks of rows, or one expert), the adapter's part is added in
place, in the base's own type and in PEFT's order (so a float32 or bfloat16 base has the bits of `merge_and_unload`),
and only then the type is changed. What is there at once is the adapter, one written tensor, and temporaries of one
part.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lib.export import mxfp4
from lib.export.base import INDEX, WEIGHTS, Adapter, Checkpoint, Place, without_paths
from lib.export.errors import ExportError
from lib.export.skeleton import Skeleton, size_of
from lib.runfolder import write_json
from lib.sync.errors import SyncError
from lib.sync.merge import parts_of
from lib.sync.tensors import CODES, Piece, read_header, read_tensor, write_tensors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Form = Literal["dense", "mxfp4"]

NOT_PACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""`modules_to_not_convert` of openai/gpt-oss: all but the experts."""

PACKED_FAMILY = "gpt_oss"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass
class Measured:
    """What merging saw on the way."""

    changed: dict[str, bool] = field(default_factory=dict)
    """Tensors on which an adapter acts -> whether any of their bits is another one now."""
    packing: dict[str, mxfp4.Deviation] = field(default_factory=dict)
    """Tensors that were packed anew -> how far they are from what was packed."""

    def facts(self) -> dict[str, Any]:
        """As the manifest has it."""
        found: dict[str, Any] = {"adapted": len(self.changed), "changed": sum(self.changed.values())}
        if self.packing:
            total = mxfp4.Deviation(0.0, 0.0, 0.0)
            for one in self.packing.values():
                total = total + one
            found |= {"packed": len(self.packing), "packing_error_worst": total.worst}
            found |= {"packing_error_bound": 1.0, "packing_error_relative": total.relative}
        return found


class Merge:
    """A checkpoint with an adapter added in (or without one), about to be written in one form.

    Raises ExportError where base, adapter and architecture do not fit together, before anything is written.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter | None,
        form: Form = "dense",
        dtype: str | None = "bfloat16",
        trust_remote_code: bool = False,
    ) -> None:
        """`dtype`: torch's name of what floating-point tensors are written as; None = as each is stored."""
        self.base, self.adapter, self.form, self.dtype = base, adapter, form, dtype
        self.trust_remote_code = trust_remote_code
        self.skeleton = Skeleton(base, trust_remote_code)
        self.measured = Measured()
        shapes = dense_shapes(base)
        strange = self.skeleton.check(shapes, base.name)
        if strange:
            logger.warning(
                "export: tensors that the model does not use are kept as they are: %s", ", ".join(strange[:3])
            )
        if adapter:
            self.skeleton.add(adapter)
        lost = sorted(self.skeleton.changes.keys() - shapes.keys())
        if lost:
            raise ExportError(f"the adapter changes {lost[0]}, which {base.name} has no tensor of its own for")
        if form == "mxfp4" and base.config.get("model_type") != PACKED_FAMILY:
            raise ExportError(
                f"{base.name} is a {base.config.get('model_type')} model: only gpt-oss has experts that are served in "
                f"MXFP4. Leave mxfp4 out of export.artifacts"
            )
        self.pieces = [piece for name in shapes for piece in self._pieces(name, shapes[name])]

    @property
    def bytes(self) -> int:
        """Of all that will be written, but for small files."""
        return sum(_bytes(piece) for piece in self.pieces)

    @property
    def memory(self) -> int:
        """Bytes that writing takes at once, about: the adapter, the largest tensor, and one part of it in float32."""
        adapter = self.adapter.bytes if self.adapter else 0
        part = max(
            size_of((1, *shape[1:]), 24) if len(shape) == 3 else 2**27 for shape in self.skeleton.shapes.values()
        )
        return adapter + max(_bytes(piece) for piece in self.pieces) + part + 2**28

    def write(self, folder: Path, shard_bytes: int) -> dict[str, str]:
        """Write weights, index and config.json, and check them; the hash of every tensor."""
        shards = _shards(self.pieces, shard_bytes)
        hashes: dict[str, str] = {}
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            try:
                hashes |= write_tensors(folder / file, shard)
            except SyncError as error:
                raise ExportError(str(error)) from None
            places |= {piece.name: file for piece in shard}
            logger.info("export: weights file %d of %d written", number, len(shards))
        if len(shards) > 1:
            write_json(folder / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": places})
        write_json(folder / "config.json", self.config())
        self._check_written(folder, places)
        self._warn_of_nothing()
        return hashes

    def config(self) -> dict[str, Any]:
        """The base's config.json, without what the weights no longer are and where they lay."""
        config = without_paths(self.base.config)
        config.pop("quantization_config", None)
        if self.form == "mxfp4":
            known = self.base.config.get("quantization_config") or {}
            kept = known.get("modules_to_not_convert") or list(NOT_PACKED)
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
        if self.dtype:
            config["dtype" if "torch_dtype" not in config else "torch_dtype"] = self.dtype
        return config

    # what is written --------------------------------------------------------------------------------------------------
    def _pieces(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        packed_before = f"{name}{BLOCKS}" in self.base.tensors and name not in self.base.tensors
        if self.form == "mxfp4" and name.endswith(EXPERTS):
            return self._packed(name, shape, packed_before)
        stored = "BF16" if packed_before else self.base.tensors[name].stored.dtype
        kind = _torch_name(stored)
        floating = kind.startswith(("float", "bfloat")) and not kind.startswith("float8")
        written = self.dtype if self.dtype and floating else kind
        return [Piece(name, shape, written, lambda: self._dense(name, shape, written))]

    def _packed(self, name: str, shape: tuple[int, ...], packed_before: bool) -> list[Piece]:
        """Blocks and scales of a stack of experts: the base's own where no adapter acts."""
        if packed_before and name not in self.skeleton.changes:
            places = {end: self.base.tensors[f"{name}{end}"] for end in (BLOCKS, SCALES)}
            return [
                Piece(f"{name}{end}", place.stored.shape, "uint8", partial(read_tensor, *place))
                for end, place in places.items()
            ]
        blocks, scales = mxfp4.packed_shapes(shape)
        kept: list[torch.Tensor] = []

        def pack() -> torch.Tensor:
            packed = self._pack(name, shape)
            kept.append(packed.scales)
            return packed.blocks

        # In this order: llama.cpp's converter takes scales for those of the blocks before them.
        return [Piece(f"{name}{BLOCKS}", blocks, "uint8", pack), Piece(f"{name}{SCALES}", scales, "uint8", kept.pop)]

    # making a tensor --------------------------------------------------------------------------------------------------
    def _dense(self, name: str, shape: tuple[int, ...], written: str) -> torch.Tensor:
        import torch

        if not shape:
            return read_tensor(*self.base.tensors[name])
        whole = torch.empty(shape, dtype=getattr(torch, written))
        for part in parts_of(shape):
            whole[part] = self._part(name, part)
        self.skeleton.done(name)
        return whole

    def _pack(self, name: str, shape: tuple[int, ...]) -> mxfp4.Packed:
        import torch

        blocks, scales = (torch.empty(one, dtype=torch.uint8) for one in mxfp4.packed_shapes(shape))
        total = mxfp4.Deviation(0.0, 0.0, 0.0)
        for part in parts_of(shape):
            # In the type that it would be served in without packing: its error is then the packing's alone.
            weights = self._part(name, part).to(torch.bfloat16)
            packed = mxfp4.quantize(weights)
            total = total + mxfp4.deviation(weights, packed)
            blocks[part], scales[part] = packed
        self.measured.packing[name] = total
        self.skeleton.done(name)
        return mxfp4.Packed(blocks, scales)

    def _part(self, name: str, part: slice) -> torch.Tensor:
        """A part of a tensor in the base's type, merged."""
        import torch

        weights = self._read(name, part)
        if name in self.skeleton.changes:
            before = weights.clone()
            weights += self.skeleton.delta(name, part, weights.dtype)
            self.measured.changed[name] = self.measured.changed.get(name, False) or not torch.equal(before, weights)
        return weights

    def _read(self, name: str, part: slice) -> torch.Tensor:
        if name in self.base.tensors:
            return read_tensor(*self.base.tensors[name], part)
        blocks, scales = (read_tensor(*self.base.tensors[f"{name}{end}"], part) for end in (BLOCKS, SCALES))
        return mxfp4.dequantize(mxfp4.Packed(blocks, scales))

    # after writing ----------------------------------------------------------------------------------------------------
    def _check_written(self, folder: Path, places: Mapping[str, str]) -> None:
        """The headers of what was written against an architecture built from the config.json that was written."""
        found = {
            name: Place(folder / file, one)
            for file in dict.fromkeys(places.values())
            for name, one in read_header(folder / file).items()
        }
        written = Checkpoint(folder, "the export", None, self.config(), found)
        Skeleton(written, self.trust_remote_code).check(dense_shapes(written), written.name)

    def _warn_of_nothing(self) -> None:
        if self.measured.changed and not any(self.measured.changed.values()):
            logger.warning(
                "export: the adapter changes no weight: it was not trained, or its changes are lost in the base's type"
            )


def dense_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """A checkpoint's tensors as the architecture has them: packed experts as the matrices (E, in, out) that they are.

    Raises ExportError where blocks and scales are not MXFP4 as gpt-oss has it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in checkpoint.tensors.items():
        if not checkpoint.is_packed or not name.endswith((BLOCKS, SCALES)):
            shapes[name] = place.stored.shape
        elif name.endswith(BLOCKS):
            stem = name.removesuffix(BLOCKS)
            shapes[stem] = _unpacked_shape(checkpoint, stem)
        elif f"{name.removesuffix(SCALES)}{BLOCKS}" not in checkpoint.tensors:
            raise ExportError(f"{checkpoint.name}: {name} has no blocks beside it: fetch the model again")
    return shapes


def _unpacked_shape(checkpoint: Checkpoint, stem: str) -> tuple[int, ...]:
    blocks = checkpoint.tensors[f"{stem}{BLOCKS}"].stored
    scales = checkpoint.tensors.get(f"{stem}{SCALES}")
    shape = blocks.shape
    fits = len(shape) == 4 and shape[3] == mxfp4.BLOCK // 2 and blocks.dtype == "U8"
    if not fits or scales is None or (scales.stored.shape, scales.stored.dtype) != (shape[:3], "U8"):
        raise ExportError(
            f"{checkpoint.name}: {stem}{BLOCKS} ({blocks.dtype} {shape}) and its scales are not MXFP4 as gpt-oss has "
            f"it: fetch the model again"
        )
    return (shape[0], shape[2] * mxfp4.BLOCK, shape[1])


def _shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Pieces in order, `limit` bytes at most together; scales stay with their blocks."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        more = _bytes(piece)
        if shards[-1] and size + more > limit and not piece.name.endswith(SCALES):
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += more
    return shards


def _bytes(piece: Piece) -> int:
    import torch

    return size_of(piece.shape, getattr(torch, piece.dtype).itemsize)


def _torch_name(code: str) -> str:
    known = {written: name for name, written in CODES.items()}
    if code not in known:
        raise ExportError(f"the base has tensors of the type {code}, which is not read here: {', '.join(known)}")
    return known[code]
