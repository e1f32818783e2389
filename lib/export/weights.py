"""Whether an artifact's weights are the base's with the adapter added, and nothing else: read in parts, never loaded.

Owns the comparison of tensors. Must not know prompts, answers or runs.

    python -c "from lib.export.weights import Expected; help(Expected)"

Where LoRA acts a tensor has to be base plus adapter in the artifact's type: within the last digit (another machine sums
in another order), and that in few places. Everywhere else it has to be the base's to the last bit. So no threshold
depends on how large the adapter is, and a fault is a fault however small. How much of the adapter's change the type can
hold is another matter: that share is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.export import mxfp4
from lib.export.base import Adapter, Checkpoint, without_paths
from lib.export.errors import ExportError
from lib.export.merge import BLOCKS, EXPERTS, SCALES, dense_shapes
from lib.export.skeleton import Skeleton
from lib.sync.errors import SyncError
from lib.sync.merge import parts_of
from lib.sync.tensors import CODES, read_tensor

if TYPE_CHECKING:
    import torch

FEW = 0.01
"""Of a tensor's values may differ in their last digit."""

LAST_DIGIT = {"float32": 2.0**-20, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""How far apart two roundings of one number are at most, as a share of it (float32: sums of many products)."""

STEP = 2.0
"""The widest step of MXFP4, in scales."""

TINY = 1e-7

KEPT = 0.5
"""Share of the adapter's change that unpacked weights have to hold: below that, rounding has undone the training."""

FREE = ("dtype", "torch_dtype", "quantization_config", "transformers_version")
"""Keys of config.json that say how weights are stored."""

IGNORED = ("base_model_name_or_path", "revision", "inference_mode")
"""Keys of adapter_config.json that an export may write anew."""


class Pair(NamedTuple):
    """How an artifact's change of a tensor goes with the adapter's."""

    along: float = 0.0
    """Their product."""
    squared: float = 0.0
    """Of the adapter's change with itself."""

    def plus(self, other: Pair) -> Pair:
        return Pair(self.along + other.along, self.squared + other.squared)

    @property
    def share(self) -> float:
        """Of the adapter's change that is there: 0 = none, 1 = all, 2 = twice; nan where it changes nothing."""
        return self.along / self.squared if self.squared else math.nan


@dataclass
class Weights:
    """What was found."""

    tensors: int = 0
    adapted: int = 0
    """Tensors on which the adapter acts."""
    changed: int = 0
    """Of these, how many are not the base's."""
    plain: Pair = field(default_factory=Pair)
    """Of tensors that are stored as numbers."""
    packed: Pair = field(default_factory=Pair)
    """Of tensors in MXFP4."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be, in words."""

    @property
    def share(self) -> float:
        return self.plain.plus(self.packed).share

    @property
    def unchanged(self) -> bool:
        """Whether nothing is wrong, and the adapter changes nothing: no artifact could be told from the base then."""
        return bool(self.adapted) and not (self.wrong or self.changed or self.plain.squared or self.packed.squared)

    def reasons(self) -> list[str]:
        """Why these are not the weights that were trained; [] where they are."""
        if self.wrong:
            return self.wrong
        if self.unchanged:
            return ["no tensor differs from the base's, and none should: the adapter changes nothing"]
        if self.adapted and not self.changed:
            return ["no tensor differs from the base's: what training changed is not in it"]
        if self.plain.squared and self.plain.share < KEPT:
            return [
                f"only {self.plain.share:.0%} of the adapter's change is there, the rest is lost in rounding: set "
                f"export.dtype to base with a float32 base, or serve the adapter beside the base"
            ]
        return []


class Expected:
    """What a whole model made of this base and adapter has to be; with no adapter, the base as it is."""

    def __init__(self, base: Checkpoint, adapter: Adapter | None, trust_remote_code: bool = False) -> None:
        """Raises ExportError where base and adapter do not fit."""
        self.base = base
        self._shapes = dense_shapes(base)
        self._skeleton = Skeleton(base, trust_remote_code)
        if adapter:
            self._skeleton.add(adapter)

    def compare(self, artifact: Checkpoint, config: Mapping[str, Any] | None = None) -> Weights:
        """Hold a model against it. `config`: what its config.json has to say; None = what the base's does."""
        found = Weights()
        skeleton = self._skeleton
        try:
            have = dense_shapes(artifact)
            skeleton.check(have, "it")
        except (ExportError, SyncError) as error:
            found.wrong.append(str(error))
            return found
        found.wrong += _config_differences(self.base.config if config is None else config, artifact.config)
        found.wrong += _dtype_difference(self.base.config, artifact)
        loose = [name for name in artifact.tensors if artifact.is_packed and name.endswith(EXPERTS)]
        if loose:
            found.wrong.append(f"config.json says MXFP4, and {loose[0]} is not packed: a server would make it anew")
        for name in self._shapes:
            if name in skeleton.shapes and not (name in skeleton.tied and name not in have):
                found.tensors += 1
                _compare(found, name, self.base, artifact, skeleton)
                if name in skeleton.changes:
                    skeleton.done(name)
        return found


def _config_differences(own: Mapping[str, Any], its: Mapping[str, Any]) -> list[str]:
    own, its = without_paths(own), without_paths(its)
    keys = sorted((own.keys() | its.keys()) - set(FREE))
    return [f"config.json: {key} is {its.get(key)!r:.80} in place of {own.get(key)!r:.80}" for key in keys
            if own.get(key) != its.get(key)]  # fmt: skip


def _dtype_difference(own: Mapping[str, Any], artifact: Checkpoint) -> list[str]:
    """A server computes in the type that config.json names: the base's, or that of the weights."""
    before, now = (one.get("dtype") or one.get("torch_dtype") for one in (own, artifact.config))
    stored = {name for name, code in CODES.items() if code in {one.stored.dtype for one in artifact.tensors.values()}}
    known = now == before or now in stored
    return [] if known else [f"config.json: dtype is {now!r}, which neither the base nor its weights have"]


def compare_adapters(trained: Adapter, artifact: Adapter) -> Weights:
    """An exported adapter has to be the trained one, tensors and settings."""
    import torch

    found = Weights(tensors=len(trained.tensors), adapted=len(trained.tensors), changed=len(trained.tensors))
    settings = {**trained.config, **artifact.config}
    for key in sorted(settings.keys() - set(IGNORED)):
        if json.dumps(trained.config.get(key), sort_keys=True) != json.dumps(artifact.config.get(key), sort_keys=True):
            found.wrong.append(f"{key} is {artifact.config.get(key)!r} in place of {trained.config.get(key)!r}")
    if trained.tensors.keys() != artifact.tensors.keys():
        found.wrong.append(f"other tensors: {', '.join(sorted(trained.tensors.keys() ^ artifact.tensors.keys())[:3])}")
    else:
        for name, place in trained.tensors.items():
            if not torch.equal(read_tensor(*place), read_tensor(*artifact.tensors[name])):
                found.wrong.append(f"{name} is another one")
    return found


def _compare(found: Weights, name: str, base: Checkpoint, artifact: Checkpoint, skeleton: Skeleton) -> None:
    """Compare one tensor, part by part."""
    is_packed, acts = _is_packed(artifact, name), name in skeleton.changes
    pair, few, count, is_wrong, is_changed = Pair(), 0, 0, False, False
    for part, before in _parts(base, name):
        after, scales = _read(artifact, name, part)
        delta = skeleton.delta(name, part, before.dtype) if acts else None
        expected, steps = _stored(before if delta is None else before + delta, after, is_packed)
        differing = expected != after
        is_wrong |= bool((differing & _beyond(expected, after, scales, steps) if acts else differing).any())
        # One expert of 128 is fewer than FEW of its stack: each has to hold by itself.
        is_wrong |= after.dim() == 3 and int(differing.sum()) > FEW * after.numel()
        few, count = few + int(differing.sum()), count + after.numel()
        if delta is not None:
            change = after.double() - before.double()
            is_changed |= bool(change.any())
            pair = pair.plus(Pair(float((change * delta.double()).sum()), float(delta.double().square().sum())))
    found.adapted, found.changed = found.adapted + acts, found.changed + is_changed
    if is_packed:
        found.packed = found.packed.plus(pair)
    else:
        found.plain = found.plain.plus(pair)
    if is_wrong or few > FEW * count:
        found.wrong.append(_told(name, acts, pair))


def _told(name: str, acts: bool, pair: Pair) -> str:
    if not acts:
        return f"{name} is not the original, and no adapter changes it"
    if not pair.squared or abs(pair.share) < 0.05:
        return f"{name} has none of the adapter's change"
    return f"{name} has {pair.share:.2f} times the adapter's change, or another one"


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
    for part in parts_of(dense_shapes(checkpoint)[name]):
        yield part, _read(checkpoint, name, part)[0]


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.is_packed and name not in checkpoint.tensors and name.endswith(EXPERTS)


def _read(checkpoint: Checkpoint, name: str, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A part of a tensor, and the scales of its blocks where it is packed: (E, in / 32, out) as powers of two."""
    import torch

    if not _is_packed(checkpoint, name):
        return read_tensor(*checkpoint.tensors[name], part), None
    blocks, scales = (read_tensor(*checkpoint.tensors[f"{name}{end}"], part) for end in (BLOCKS, SCALES))
    return mxfp4.dequantize(mxfp4.Packed(blocks, scales)), torch.exp2(scales.float() - 127).transpose(1, 2)


def _stored(expected: torch.Tensor, after: torch.Tensor, is_packed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What should be there, in the way that the artifact stores it; and the scales of its blocks."""
    import torch

    if not is_packed:
        return expected.to(after.dtype), None
    packed = mxfp4.quantize(expected.to(torch.bfloat16))
    return mxfp4.dequantize(packed), torch.exp2(packed.scales.float() - 127).transpose(1, 2)


def _beyond(
    expected: torch.Tensor, after: torch.Tensor, scales: torch.Tensor | None, steps: torch.Tensor | None
) -> torch.Tensor:
    """Where two values are further apart than their last digit."""
    import torch

    apart = (expected.float() - after.float()).abs()
    if scales is not None and steps is not None:
        limit = STEP * torch.maximum(scales, steps).repeat_interleave(mxfp4.BLOCK, 1)
    else:
        digit = LAST_DIGIT.get(str(after.dtype).removeprefix("torch."), 0.0)
        limit = digit * torch.maximum(expected.float().abs(), after.float().abs()) + TINY
    return apart > limit
