"""What a GGUF file says of itself, and where its tensors lie: keys, names, shapes, types, values.

Owns the format (github.com/ggml-org/ggml, docs/gguf.md, version 3) as far as what is exported here needs it. Must not
know what the keys mean.

    python -c "from lib.export.gguf_header import read_keys; help(read_keys)"
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from lib.export.errors import ExportError

if TYPE_CHECKING:
    import torch

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17)}
"""Number of a type -> its name, the values of a block, and the bytes of one: those that `export.gguf_type` can give."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that are numbers as they are -> torch's name."""


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    """As torch has it: the file's own order is the other way round."""
    type: str
    begin: int
    """Bytes from the beginning of the file."""
    end: int


class Gguf(NamedTuple):
    keys: dict[str, Any]
    tensors: dict[str, Stored]


def read_keys(path: Path) -> dict[str, Any]:
    """Every key with its value: numbers, texts, lists. Raises ExportError where the file is none, or cut off."""
    return _read(path, tensors=False).keys


def read_gguf(path: Path) -> Gguf:
    """Keys and tensors. Raises ExportError where the file is none, is cut off, or has tensors of other types."""
    return _read(path, tensors=True)


def read_values(path: Path, stored: Stored, part: slice) -> torch.Tensor:
    """A part of a tensor's first dimension: as it is stored where it is numbers, Q8_0 as float32 (see `q8_0`)."""
    import torch

    data, rows = _bytes(path, stored, part)
    shape = (rows, *stored.shape[1:])
    if stored.type in FLOATS:
        return data.view(getattr(torch, FLOATS[stored.type])).reshape(shape)
    scales, whole = _blocks(data)
    return (scales * whole).reshape(shape)


def q8_0(path: Path, stored: Stored, part: slice) -> torch.Tensor:
    """The scale of every value of a tensor in Q8_0, float32, in the values' shape: what one step of it is worth."""
    data, rows = _bytes(path, stored, part)
    scales, whole = _blocks(data)
    return scales.expand_as(whole).reshape(rows, *stored.shape[1:])


def _bytes(path: Path, stored: Stored, part: slice) -> tuple[torch.Tensor, int]:
    """The bytes of a part of a tensor, and its rows."""
    import torch

    begin, end, _ = part.indices(stored.shape[0])
    row = (stored.end - stored.begin) // stored.shape[0]
    with path.open("rb") as file:
        file.seek(stored.begin + begin * row)
        return torch.frombuffer(bytearray(file.read((end - begin) * row)), dtype=torch.uint8), end - begin


def _blocks(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q8_0: scales (blocks, 1) and whole numbers (blocks, 32), both float32."""
    import torch

    blocks = data.reshape(-1, TYPES[8][2])
    return blocks[:, :2].contiguous().view(torch.float16).float(), blocks[:, 2:].contiguous().view(torch.int8).float()


def _read(path: Path, tensors: bool) -> Gguf:
    try:
        with path.open("rb") as file:
            magic, version, count, keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ExportError(f"{path.name} is no GGUF file of version 2 or 3")
            found = {_text(file): _value(file, _number(file, "I")) for _ in range(keys)}
            return Gguf(found, _tensors(path, file, count, int(found.get("general.alignment", 32))) if tensors else {})
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError):
        raise ExportError(f"{path.name} is a damaged GGUF file: make it anew") from None


def _tensors(path: Path, file: BinaryIO, count: int, alignment: int) -> dict[str, Stored]:
    entries = []
    for _ in range(count):
        name, dimensions = _text(file), _number(file, "I")
        shape = tuple(reversed([_number(file, "Q") for _ in range(dimensions)]))
        entries.append((name, shape, _number(file, "I"), _number(file, "Q")))
    data, size = -(-file.tell() // alignment) * alignment, path.stat().st_size
    found: dict[str, Stored] = {}
    for name, shape, kind, offset in entries:
        if kind not in TYPES:
            known = ", ".join(known for known, _, _ in TYPES.values())
            raise ExportError(f"{path.name}: {name} has the type number {kind}, which is not made here ({known})")
        label, values, width = TYPES[kind]
        begin = data + offset
        end = begin + math.prod(shape) // values * width
        if end > size or name in found:
            raise ExportError(f"{path.name} is a damaged GGUF file ({name}): make it anew")
        found[name] = Stored(shape, label, begin, end)
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        if inner in _NUMBERS:
            form = f"<{count}{_NUMBERS[inner]}"
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _NUMBERS[kind])


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    return str(struct.unpack(f"{length}s", file.read(length))[0], "utf-8")  # whole, or an error
