"""An architecture without its weights, and an adapter's layers on it with theirs.

Owns which tensors a checkpoint of this architecture has, and which of them an adapter changes and by how much. The
model is built on the meta device: it takes no memory, and all that transformers and PEFT know about names, ranks,
scalings and nested experts is theirs. Must not know files that are written.

    python -c "from lib.export.skeleton import Skeleton; help(Skeleton)"
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.export.base import ADAPTER, Adapter, Checkpoint
from lib.export.errors import ExportError
from lib.models.errors import explained
from lib.sync.errors import SyncError
from lib.sync.merge import check_adapter, check_head, delta_of, parts_of
from lib.sync.tensors import read_tensor

if TYPE_CHECKING:
    import torch

NAME = "default"

REFUSED = {
    "use_dora": "DoRA scales whole columns of the merged weight",
    "bias": "the biases of the base were trained too",
    "lora_bias": "its layers have biases of their own",
    "modules_to_save": "whole modules were trained beside it",
    "trainable_token_indices": "rows of the embeddings were trained beside it",
    "layer_replication": "layers of the base are used more than once",
}
"""Keys of adapter_config.json that make more of it than plain LoRA, and what is then not low-rank."""


class Change(NamedTuple):
    """What changes a tensor of the checkpoint."""

    module: Any
    """The LoRA layer."""
    parameter: str
    """The model's name of what it changes: the tensor itself, or what the tensor is a piece of."""
    direct: bool
    """False = a piece: the experts of some models lie apart in their checkpoints."""


class Skeleton:
    """The model of a checkpoint's config, and what an adapter on it changes."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
        self.checkpoint = checkpoint
        self.model = _empty_model(checkpoint, trust_remote_code)
        self._own = dict(self.model.state_dict())
        self.shapes = self._names(self._own)
        self.tied = frozenset(self._names({name: self._own[name] for name in self._tied() if name in self._own}))
        self._pieces: dict[str, dict[str, torch.Tensor]] = {}
        self.changes: dict[str, Change] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> list[str]:
        """Compare a checkpoint's tensors with the architecture's; returns the names that it does not know.

        Raises ExportError for tensors that are missing or have another shape. A tied head may be left out.
        """
        missing = sorted(self.shapes.keys() - shapes.keys() - self.tied)
        strange = sorted(shapes.keys() - self.shapes.keys())
        if missing:
            raise ExportError(
                f"{what} lacks {len(missing)} tensors of {type(self.model).__name__} ({', '.join(missing[:3])}) and "
                f"has {len(strange)} that are none of its ({', '.join(strange[:3]) or 'none'}): they are lost or "
                f"renamed, and would be replaced by random numbers. Fetch it again, or save it anew with transformers"
            )
        wrong = [name for name, shape in shapes.items() if name in self.shapes and self.shapes[name] != shape]
        if wrong:
            raise ExportError(
                f"{what}: {wrong[0]} is {shapes[wrong[0]]}, and its config.json makes it {self.shapes[wrong[0]]}: the "
                f"weights and the config are not of one model"
            )
        return strange

    def add(self, adapter: Adapter) -> None:
        """Put an adapter on the model. Raises ExportError where it is for another one, or cannot be merged."""
        from peft.tuners.lora import LoraLayer

        base = _with_adapter(self.model, adapter, self.checkpoint)
        try:
            check_head(base)
            for path, module in base.named_modules():
                if isinstance(module, LoraLayer):
                    kind = getattr(module, "parameter_name", "weight")
                    check_adapter(path, module, getattr(module.get_base_layer(), kind))
                    parameter = f"{path}.{kind}".replace(".base_layer", "")
                    names = self._names({parameter: self._own[parameter]})
                    self.changes |= {name: Change(module, parameter, list(names) == [parameter]) for name in names}
        except SyncError as error:
            raise ExportError(f"the adapter cannot be merged: {error}") from None

    def delta(self, name: str, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """What the adapter adds to a part (of the first dimension) of a checkpoint's tensor of this type."""
        change = self.changes[name]
        assert not any(weight.is_meta for name, weight in change.module.named_parameters() if f".{NAME}" in name)
        if change.direct:
            return delta_of(change.module, NAME, part, dtype)
        if name not in self._pieces.get(change.parameter, {}):
            self._pieces[change.parameter] = self._apart(change, dtype)
        return self._pieces[change.parameter][name][part]

    def done(self, name: str) -> None:
        """Forget what is needed for this tensor only."""
        change = self.changes.get(name)
        if change and not change.direct:
            pieces = self._pieces[change.parameter]
            pieces.pop(name)
            if not pieces:
                del self._pieces[change.parameter]

    def _apart(self, change: Change, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All pieces of what is added to a tensor that the checkpoint has in pieces."""
        import torch

        whole = torch.empty(self._own[change.parameter].shape, dtype=dtype)
        for part in parts_of(tuple(whole.shape)):
            whole[part] = delta_of(change.module, NAME, part, dtype)
        return _checkpoint_names(self.model, {change.parameter: whole})

    def _names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        found = _checkpoint_names(self.model, tensors)
        return {name: tuple(tensor.shape) for name, tensor in found.items()}

    def _tied(self) -> list[str]:
        """Parameters that are others under a second name."""
        first: dict[int, str] = {}
        return [name for name, tensor in self._parameters if first.setdefault(id(tensor), name) != name]

    @cached_property
    def _parameters(self) -> list[tuple[str, Any]]:
        return list(self.model.named_parameters(remove_duplicate=False))


def _empty_model(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained(checkpoint.name):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        if checkpoint.is_packed:
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)


def _checkpoint_names(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under the names, and in the pieces, that checkpoints have them."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        return dict(revert_weight_conversion(model, dict(tensors)))


def _with_adapter(model: Any, adapter: Adapter, base: Checkpoint) -> Any:
    """The model with the adapter's LoRA layers; their tensors are float32 in memory, all others stay empty."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    _check_kind(adapter)
    config = PeftConfig.from_pretrained(str(adapter.folder))
    assert isinstance(config, LoraConfig)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied heads (checked by check_head) and unused options
            adapted = PeftModel(model, config, adapter_name=NAME)
    except ValueError as error:  # no module is named as its targets are
        raise ExportError(f"the adapter is for another base than {type(model).__name__}: {error}") from None
    own = adapted.state_dict(keep_vars=True)
    expected = get_peft_model_state_dict(adapted, own, adapter_name=NAME, save_embedding_layers=False)
    copies = _copies(adapter, expected.keys(), base)
    _check_tensors(adapter, {name: tuple(tensor.shape) for name, tensor in expected.items()}, copies)
    tensors = {name: one for name, one in load_file(adapter.folder / ADAPTER).items() if name not in copies}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ExportError(f"the adapter holds numbers that are none, or infinite ones ({broken[0]}): training broke it")
    # PEFT's own loading would bring them to where the base is: nowhere.
    names = {id(parameter): name for name, parameter in own.items()}
    filled = {names[id(expected[name])]: tensor.float() for name, tensor in tensors.items()}
    adapted.load_state_dict(filled, strict=False, assign=True)
    return adapted.get_base_model()


def beyond_lora(adapter: Adapter) -> str | None:
    """The first key that makes an adapter more than plain LoRA."""
    return next((key for key in REFUSED if adapter.config.get(key) not in (None, False, "none", [], {})), None)


def _check_kind(adapter: Adapter) -> None:
    kind = adapter.config.get("peft_type")
    if kind != "LORA":
        raise ExportError(f"the adapter is of the kind {kind}: only LoRA is merged. Export the artifact `adapter`")
    key = beyond_lora(adapter)
    if key:
        raise ExportError(
            f"the adapter has {key} = {adapter.config[key]!r}: {REFUSED[key]}, and only plain LoRA is merged. Export "
            f"the artifact `adapter`, or train without it"
        )


def _copies(adapter: Adapter, expected: Iterable[str], base: Checkpoint) -> set[str]:
    """Embeddings and heads of the base that PEFT put beside an adapter on them: the same bits, so nothing to merge."""
    import torch

    found = set()
    for name in adapter.tensors.keys() - set(expected):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name.endswith(".weight") and plain in base.tensors:
            if not torch.equal(read_tensor(*adapter.tensors[name]), read_tensor(*base.tensors[plain])):
                raise ExportError(
                    f"the adapter holds {plain} whole, and it is not the base's: it was trained or resized beside the "
                    f"adapter, and only plain LoRA is merged. Export the artifact `adapter`, or train without it"
                )
            found.add(name)
    return found


def _check_tensors(adapter: Adapter, expected: Mapping[str, tuple[int, ...]], copies: set[str]) -> None:
    have = {name: place.stored.shape for name, place in adapter.tensors.items() if name not in copies}
    missing, strange = sorted(expected.keys() - have.keys()), sorted(have.keys() - expected.keys())
    if missing or strange:
        raise ExportError(
            f"the adapter's tensors are not those of its config on this base: {len(missing)} missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(strange)} unknown ({', '.join(strange[:2]) or 'none'}). It is "
            f"for another base, or was renamed"
        )
    wrong = [name for name in expected if expected[name] != have[name]]
    if wrong:
        raise ExportError(
            f"the adapter is for a base of another size: {wrong[0]} is {have[wrong[0]]}, and this base makes it "
            f"{expected[wrong[0]]}"
        )


def size_of(shape: tuple[int, ...], width: int) -> int:
    """Bytes of a tensor whose values have `width` bytes."""
    return math.prod(shape) * width
