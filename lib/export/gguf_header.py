"""What a GGUF file says of itself: keys and values, not its tensors.

Owns the format's header (github.com/ggml-org/ggml, docs/gguf.md, version 3). Must not know what the keys mean.

    python -c "from lib.export.gguf_header import read_keys; help(read_keys)"
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from lib.export.errors import ExportError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_keys(path: Path) -> dict[str, Any]:
    """Every key with its value: numbers, texts, lists. Raises ExportError where the file is none, or cut off."""
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ExportError(f"{path.name} is no GGUF file of version 2 or 3")
            return {_text(file): _value(file, _number(file, "I")) for _ in range(count)}
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError):
        raise ExportError(f"{path.name} is a damaged GGUF file: make it anew") from None


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
