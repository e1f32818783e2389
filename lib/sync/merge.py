"""A model's weights as a checkpoint holds them: adapters added in, without touching the model.

Owns the names and values of what is published for `reload`, `volume` and `checkpoint`, and what a LoRA adapter adds to
a weight, part by part (an export merges a part at a time). Must not know files or workers.

    python -c "from lib.sync.merge import merged_pieces; help(merged_pieces)"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lib.sync.errors import SyncError
from lib.sync.tensors import Piece

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Make = Callable[[], "torch.Tensor"]

_ROWS, _ELEMENTS = 256, 2**21
"""A block of rows is a multiple of the one and has about the other, so that its temporaries stay near 16 MB."""


def merged_pieces(model: PreTrainedModel, dtype: torch.dtype | None = None) -> list[Piece]:
    """Every weight under its name in a checkpoint, adapters merged; each is computed when its turn comes.

    A head that is tied to the embeddings is there under its own name too: vLLM's CPU backend would keep the old one
    (0.31: it packs the head once, and a reload that does not name it leaves the packed copy as it was).
    `dtype`: of floating-point weights; None = as they are. Raises SyncError where an adapter cannot be merged.
    """
    base = base_model(model)
    check_head(base)
    values = _merged(base)
    if _is_renamed(base):
        values = _as_checkpoint(base, values)
    return [_piece(name, shape, kind, make, dtype) for name, (shape, kind, make) in values.items()]


def base_model(model: PreTrainedModel) -> Any:
    """The transformers model inside a PEFT model; the model itself where there is no adapter."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The merged weights all at once, under the model's own names and as it ties them: for `save_pretrained`."""
    import torch

    base = base_model(model)
    check_head(base)
    with torch.no_grad():
        # Cloned: a merged weight is valid until the next one is made, and what is tied must not look shared.
        return {name: make().clone() for name, (_, _, make) in _merged(base).items()}


Value = tuple[tuple[int, ...], Any, Make]
"""Shape, type, and how to make it."""


def _merged(base: Any) -> dict[str, Value]:
    from peft.tuners.lora import LoraLayer

    merged: dict[str, Value] = {}
    own: set[str] = set()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            weight = getattr(module.get_base_layer(), parameter)
            check_adapter(name, module, weight)
            merged[_plain(f"{name}.{parameter}")] = (tuple(weight.shape), weight.dtype, _merge(module, weight))
            own |= {f"{name}.{part}." for part in (*module.adapter_layer_names, *module.other_param_names)}
    values: dict[str, Value] = {}
    for name, tensor in base.state_dict().items():
        if not any(name.startswith(part) for part in _prefixes(name) & own):
            plain = _plain(name)
            values[plain] = merged.get(plain) or (tuple(tensor.shape), tensor.dtype, partial(_same, tensor))
    return values


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)}


def _plain(name: str) -> str:
    while ".base_layer." in name:
        name = name.replace(".base_layer.", ".")
    return name


def _merge(module: Any, weight: torch.Tensor) -> Make:
    """How to add a layer's active adapters to its weight."""
    import torch

    adapters = [name for name in module.active_adapters if name in module.scaling]
    plain = isinstance(module.get_base_layer(), torch.nn.Linear) and weight.dtype == torch.float32
    if len(adapters) != 1 or not plain or module.fan_in_fan_out:
        return partial(_add, module, weight, adapters)
    a, b = module.lora_A[adapters[0]].weight, module.lora_B[adapters[0]].weight
    if (a.dtype, b.dtype) != (weight.dtype, weight.dtype):
        return partial(_add, module, weight, adapters)
    # In one pass over the weight, where the general way takes three.
    return partial(torch.addmm, weight, b, a, alpha=module.scaling[adapters[0]])


def _add(module: Any, weight: torch.Tensor, adapters: list[str]) -> torch.Tensor:
    total = weight.detach().clone()
    for adapter in adapters:
        for part in parts_of(tuple(weight.shape)):
            total[part] += delta_of(module, adapter, part, weight.dtype).to(weight.device)
    return total


def parts_of(shape: tuple[int, ...]) -> list[slice]:
    """Slices of a weight's first dimension, to be merged one by one: each expert, or blocks of rows.

    Blocks of many rows give the same bits as the whole; products of a few rows may be summed in another order.
    """
    if len(shape) == 3:
        return [slice(expert, expert + 1) for expert in range(shape[0])]
    rows = max(_ROWS, _ELEMENTS // max(1, shape[-1]) // _ROWS * _ROWS)
    return [slice(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]


def delta_of(module: Any, adapter: str, part: slice, dtype: torch.dtype) -> torch.Tensor:
    """What a LoRA layer's adapter adds to this part of its weight, which is of type `dtype`: as PEFT 0.21 does.

    Needs the adapter's tensors only: the weight may be on the meta device. Added in place (`weight[part] += ...`) it
    gives the bits of `merge_and_unload`, which has the whole at once: 4 times the memory of a bfloat16 weight and more.
    """
    import torch
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    scaling = module.scaling[adapter]
    if isinstance(module, Embedding):
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    elif isinstance(module, (Linear, ParamWrapper)):
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        whole: torch.Tensor = module.get_delta_weight(adapter)
        return whole[part]
    kind = a.dtype  # 16-bit adapters are multiplied in float32 on a CPU, and brought back
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
    if isinstance(module, ParamWrapper) and module.num_experts > 1:
        a, b = a.reshape(module.num_experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, module.num_experts)
        rule = "o r e, e r i -> e o i" if module._did_swap_in_out_features else "o r e, e r i -> e i o"
        delta = torch.einsum(rule, b[:, :, part], a[part])
    elif isinstance(module, Embedding) or module.fan_in_fan_out:
        delta = (b @ a[:, part]).T
    else:
        delta = b[part] @ a
    added: torch.Tensor = delta.mul_(scaling).to(kind)
    return added.to(dtype) if isinstance(module, (Embedding, ParamWrapper)) else added  # rounded first, as PEFT does


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def check_adapter(name: str, module: Any, weight: torch.Tensor) -> None:
    """Raises SyncError where a LoRA layer's adapter cannot be merged into its weight."""
    if not weight.is_floating_point():
        raise SyncError(
            f"{name} has quantised weights ({weight.dtype}), into which no adapter can be merged exactly: set "
            f"distributed.sync_method to lora"
        )
    if module.lora_variant:
        kinds = sorted({type(variant).__name__ for variant in module.lora_variant.values()})
        raise SyncError(f"{name} has an adapter of another kind than plain LoRA ({', '.join(kinds)}): it is not merged")
    if module.merged:
        raise SyncError(f"the adapter of {name} is merged into the live model: unmerge it before publishing")


def check_head(base: Any) -> None:
    """Raises SyncError where a tied head has an adapter of its own: two matrices in training, one in the engine."""
    from peft.tuners.lora import LoraLayer

    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = [module for module in (head, embedding) if isinstance(module, LoraLayer)]
    if head is None or embedding is None or not adapted:
        return
    one, other = (getattr(module, "base_layer", module).weight for module in (head, embedding))
    if one is other or (not one.is_meta and one.data_ptr() == other.data_ptr()):
        raise SyncError(
            "the model ties its head to its embeddings, and LoRA is on one of them: merged, they would differ. Leave "
            "lm_head and the embeddings out of lora.targets"
        )


def _is_renamed(base: Any) -> bool:
    """Whether transformers keeps this model's weights under other names, or in other pieces, than checkpoints do."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(base, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(base, add_legacy=False) if known is None else known)


def _as_checkpoint(base: Any, values: Mapping[str, Value]) -> dict[str, Value]:
    """The same under a checkpoint's names: experts taken apart, say. All weights are there at once meanwhile."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        state = revert_weight_conversion(base, {name: make().clone() for name, (_, _, make) in values.items()})
    return {name: (tuple(tensor.shape), tensor.dtype, partial(_same, tensor)) for name, tensor in state.items()}


def _piece(name: str, shape: tuple[int, ...], kind: Any, make: Make, dtype: torch.dtype | None) -> Piece:
    if dtype is None or not kind.is_floating_point or kind == dtype:
        return Piece(name, shape, str(kind).removeprefix("torch."), make)
    return Piece(name, shape, str(dtype).removeprefix("torch."), lambda: make().to(dtype))
