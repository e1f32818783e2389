"""Tensors in a file: written as they are made, hashed on the way, read without a copy.

Owns the safetensors format (8 bytes of length, a JSON header, raw data; github.com/huggingface/safetensors) as far as a
sync needs it. Its own writer, because tensors that are merged one by one then never exist all at once, and because a
file that is there is written over: fresh pages cost several times what the copying does. Must not know models.

    python -c "from pathlib import Path; from lib.sync.tensors import read_header; help(read_header)"
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.sync.errors import SyncError

if TYPE_CHECKING:
    import torch

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's name of a type -> the format's."""

HASHERS = 2
"""Threads that hash a file."""


class Piece(NamedTuple):
    """A tensor to write, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name of it."""
    make: Callable[[], torch.Tensor]


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    """The format's name of it."""
    begin: int
    """Bytes from the beginning of the file."""
    end: int


def hash_bytes(data: Any) -> str:
    """XXH3, 128 bits: tells damage and mix-ups, at the speed of memory. It is no defence against an enemy."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    return hash_bytes(path.read_bytes())


def write_tensors(path: Path, pieces: Sequence[Piece]) -> dict[str, str]:
    """Write the file, over what is there; the hash of every tensor. A piece is done with when the next is made."""
    import torch

    header, total = _header(pieces)
    hashes: dict[str, str] = {}
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), os.fdopen(handle, "wb", buffering=0) as file:
        _write_all(file, header)
        for piece in pieces:
            data = raw(piece.make())
            future = pool.submit(hash_bytes, data)
            _write_all(file, data)
            hashes[piece.name] = future.result()
            del data, future  # before the next one is made
        file.truncate(total)
    return hashes


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in memory."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_header(path: Path) -> dict[str, Stored]:
    """What is in a file; SyncError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise SyncError(f"{path} is cut off: {size} bytes")
        try:
            entries = json.loads(file.read(length))
            found = {name: _stored(entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SyncError(f"{path} is no safetensors file: {error}") from None
    last = max((one.end for one in found.values()), default=8 + length)
    if last > size:
        raise SyncError(f"{path} is cut off: {size} bytes of {last}")
    return found


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes where the kernel has them: no copy where it was written a moment ago."""
    with path.open("rb") as file:
        return mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0), prot=mmap.PROT_READ
        )


def hash_tensors(path: Path, stored: Mapping[str, Stored]) -> dict[str, str]:
    """The hash of every tensor in a file."""
    with map_file(path) as data, memoryview(data) as view, ThreadPoolExecutor(HASHERS) as pool:
        futures = {name: pool.submit(_hash_slice, view, one.begin, one.end) for name, one in stored.items()}
        return {name: future.result() for name, future in futures.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the order of the file, as views of it: they must not be written to."""
    import torch

    types = {code: getattr(torch, name) for name, code in CODES.items()}
    data = map_file(path)
    for name, one in sorted(read_header(path).items(), key=lambda item: item[1].begin):
        if one.dtype not in types:
            raise SyncError(f"{path}: {name} has the type {one.dtype}, which is not read here: {', '.join(types)}")
        if one.begin == one.end:
            yield name, torch.empty(one.shape, dtype=types[one.dtype])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the buffer may not be written: it is not
            flat = torch.frombuffer(data, dtype=torch.uint8, count=one.end - one.begin, offset=one.begin)
        # The format begins its data at a multiple of 8; an odd file is copied, as torch would refuse the view.
        width = torch.empty(0, dtype=types[one.dtype]).element_size()
        yield name, (flat if one.begin % width == 0 else flat.clone()).view(types[one.dtype]).view(one.shape)


def read_tensor(path: Path, one: Stored, part: slice = slice(None)) -> torch.Tensor:
    """A tensor of a file, or a part of its first dimension, in memory of its own: no page of the file stays mapped."""
    import torch

    types = {code: getattr(torch, name) for name, code in CODES.items()}
    if one.dtype not in types:
        raise SyncError(f"{path} holds the type {one.dtype}, which is not read here: {', '.join(types)}")
    first, last, _ = part.indices(one.shape[0]) if one.shape else (0, 1, 1)
    row = (one.end - one.begin) // max(1, one.shape[0] if one.shape else 1)
    tensor = torch.empty((last - first, *one.shape[1:]) if one.shape else (), dtype=types[one.dtype])
    with path.open("rb") as file:
        file.seek(one.begin + first * row)
        if tensor.numel() and file.readinto(raw(tensor)) != (last - first) * row:
            raise SyncError(f"{path} was cut off while it was read")
    return tensor


def _hash_slice(view: memoryview, begin: int, end: int) -> str:
    with view[begin:end] as part:
        return hash_bytes(part)


def _header(pieces: Sequence[Piece]) -> tuple[bytes, int]:
    """The file's beginning, and its whole size."""
    import torch

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in pieces:
        if piece.dtype not in CODES:
            raise SyncError(f"{piece.name} has the type {piece.dtype}, which cannot be published: {', '.join(CODES)}")
        size = getattr(torch, piece.dtype).itemsize
        for length in piece.shape:
            size *= length
        entries[piece.name] = {"dtype": CODES[piece.dtype], "shape": piece.shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + place


def _stored(entry: Mapping[str, Any], data: int) -> Stored:
    begin, end = entry["data_offsets"]
    return Stored(tuple(entry["shape"]), str(entry["dtype"]), data + begin, data + end)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
