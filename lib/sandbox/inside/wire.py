"""Frames and values on the socket between solution and judge: only plain builtin data crosses.

Owns the framing and the value format: JSON with one-letter tags; what is not plain crosses as an opaque handle.
Decoding is total: any bytes give a value or a ProtocolError, nothing is executed. Must not know tests,
processes or sandboxes.

    python -c "from lib.sandbox.inside.wire import encode; print(encode([1, (2, 3)]))"
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

MOST = 8 << 20
"""Bytes in one frame."""
_DEEPEST = 60
"""Levels that a value may be nested."""
_HEADER = struct.Struct("<I")
_EXACT = 2**53
"""Integers beyond are sent in hexadecimal: JSON's are read in decimal, which Python limits to 4,300 digits."""

CONTAINERS = "ldsyq"
"""Tags of the types that a call can change in place."""

Encoded = Any
"""None, bool, str, float, a small int, or {tag: content}."""


class ProtocolError(BaseException):
    """The other side broke the rules, or is gone. A BaseException: a test's `except Exception` must not catch it."""


class UnsupportedError(TypeError):
    """A value that cannot cross: too large or nested too deep."""


# frames ---------------------------------------------------------------------------------------------------------------


def write_frame(sock: socket.socket, message: object, fds: Iterable[int] = ()) -> None:
    """Send one message, with file descriptors where the socket is a local one. Raises UnsupportedError above MOST."""
    data = frame(message)
    if fds:
        socket.send_fds(sock, [data[: _HEADER.size]], list(fds))
        data = data[_HEADER.size :]
    sock.sendall(data)


def frame(message: object) -> bytes:
    """One message as bytes: its length, and JSON."""
    data = json.dumps(message).encode()
    if len(data) > MOST:
        raise UnsupportedError(f"a value of {len(data)} bytes; at most {MOST} can cross")
    return _HEADER.pack(len(data)) + data


def read_frame(sock: socket.socket) -> Any:
    """The next message. Raises ProtocolError where it is none, or at the end."""
    return _message(sock, _exactly(sock, _HEADER.size))


def read_frame_with_fds(sock: socket.socket, most: int = 3) -> tuple[Any, list[int]]:
    """The next message and the file descriptors that came with it."""
    header, fds, _, _ = socket.recv_fds(sock, _HEADER.size, most)
    header += _exactly(sock, _HEADER.size - len(header)) if header else b""
    if not header:
        raise ProtocolError("the other side is gone")
    return _message(sock, header), fds


def _message(sock: socket.socket, header: bytes | bytearray) -> Any:
    (size,) = _HEADER.unpack(header)
    if size > MOST:
        raise ProtocolError("a frame that is too large")
    try:
        return json.loads(_exactly(sock, size))
    except (ValueError, RecursionError):
        raise ProtocolError("a frame that is not JSON") from None


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ProtocolError("the other side is gone")
        data += part
    return data


# values ---------------------------------------------------------------------------------------------------------------

_TYPES: dict[str, type] = {
    "bool": bool, "int": int, "float": float, "complex": complex, "str": str, "bytes": bytes, "bytearray": bytearray,
    "list": list, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset, "range": range,
    "NoneType": type(None),
}  # fmt: skip
_TYPE_NAMES = {kind: name for name, kind in _TYPES.items()}
"""Types that may cross as themselves, in both directions: calling them does nothing but make plain values."""


def encode(value: Any, keep: Callable[[Any], Encoded] | None = None, depth: int = 0) -> Encoded:
    """A value for the wire. `keep` says what an object that is not plain becomes; without it that is an error.

    A subclass of a plain type crosses as that type, read with the type's own methods: a lying `__eq__`, `__iter__` or
    `__int__` is left behind.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_EXACT < value < _EXACT else {"i": hex(value)}
    if depth > _DEEPEST:
        raise UnsupportedError(f"a value nested deeper than {_DEEPEST} levels")
    for base, tag, content in _ENCODERS:
        if issubclass(kind, base):
            return content(value, keep, depth + 1) if tag is None else {tag: content(value, keep, depth + 1)}
    if kind is type and value in _TYPE_NAMES:
        return {"B": _TYPE_NAMES[value]}
    if keep is None:
        raise UnsupportedError(f"a value of type {kind.__name__}")
    encoded: Encoded = keep(value)
    return encoded


def _items(each: Callable[[Any], Iterable[Any]]) -> Callable[[Any, Any, int], Encoded]:
    return lambda value, keep, depth: [encode(item, keep, depth) for item in each(value)]


def _pairs(value: Any, keep: Any, depth: int) -> Encoded:
    return [[encode(key, keep, depth), encode(item, keep, depth)] for key, item in dict.items(value)]


def _plain(content: Callable[[Any], Any]) -> Callable[[Any, Any, int], Encoded]:
    return lambda value, keep, depth: content(value)


_ENCODERS: list[tuple[type, str | None, Callable[[Any, Any, int], Encoded]]] = [
    (list, "l", _items(list.__iter__)),
    (tuple, "t", _items(tuple.__iter__)),
    (dict, "d", _pairs),
    (int, None, lambda value, keep, depth: encode(int.__add__(value, 0))),
    (float, None, _plain(lambda value: float.__add__(value, 0.0))),
    (str, None, _plain(str.__str__)),
    (set, "s", _items(set.__iter__)),
    (frozenset, "z", _items(frozenset.__iter__)),
    (bytes, "b", _plain(bytes.hex)),
    (bytearray, "y", _plain(bytearray.hex)),
    (collections.deque, "q", _items(collections.deque.__iter__)),
    (complex, "c", _plain(lambda value: [value.real, value.imag])),
    (range, "g", _plain(lambda value: [hex(part) for part in (value.start, value.stop, value.step)])),
    (decimal.Decimal, "D", _plain(decimal.Decimal.__str__)),
    (fractions.Fraction, "F", _plain(lambda value: [hex(value.numerator), hex(value.denominator)])),
    (datetime.datetime, "T", _plain(datetime.datetime.isoformat)),
    (datetime.date, "A", _plain(datetime.date.isoformat)),
    (datetime.time, "C", _plain(datetime.time.isoformat)),
    (datetime.timedelta, "E", _plain(lambda value: [value.days, value.seconds, value.microseconds])),
]


def decode(encoded: Encoded, resolve: Callable[[str, Any], Any], depth: int = 0) -> Any:
    """The value that came over the wire. `resolve(tag, content)` answers for handles: h = theirs, r = ours.

    Raises ProtocolError where it is none.
    """
    if encoded is None or type(encoded) in (bool, str, int, float):
        return encoded
    if type(encoded) is not dict or not 1 <= len(encoded) <= 2 or depth > _DEEPEST + 2:
        raise ProtocolError("a value that is none")
    tag, content = next(iter(encoded.items()))
    if tag in ("h", "r"):
        return resolve(tag, encoded)
    try:
        return _DECODERS[tag](content, lambda item: decode(item, resolve, depth + 1))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError):
        raise ProtocolError("a value that is none") from None


def _sequence(kind: Callable[[list[Any]], Any]) -> Callable[[Any, Callable[[Any], Any]], Any]:
    def read(content: Any, item: Callable[[Any], Any]) -> Any:
        if type(content) is not list:
            raise TypeError
        return kind([item(each) for each in content])

    return read


def _hexadecimal(text: Any) -> int:
    if type(text) is not str:
        raise TypeError
    return int(text, 16)


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "i": lambda content, item: _hexadecimal(content),
    "l": _sequence(list),
    "t": _sequence(tuple),
    "d": lambda content, item: {item(key): item(value) for key, value in content},
    "s": _sequence(set),
    "z": _sequence(frozenset),
    "q": _sequence(collections.deque),
    "b": lambda content, item: bytes.fromhex(content),
    "y": lambda content, item: bytearray.fromhex(content),
    "c": lambda content, item: complex(float(content[0]), float(content[1])),
    "g": lambda content, item: range(*(_hexadecimal(part) for part in content)),
    "D": lambda content, item: decimal.Decimal(str(content)),
    "F": lambda content, item: fractions.Fraction(*(_hexadecimal(part) for part in content)),
    "T": lambda content, item: datetime.datetime.fromisoformat(content),
    "A": lambda content, item: datetime.date.fromisoformat(content),
    "C": lambda content, item: datetime.time.fromisoformat(content),
    "E": lambda content, item: datetime.timedelta(*(int(part) for part in content)),
    "B": lambda content, item: _TYPES[content],
}

# errors ---------------------------------------------------------------------------------------------------------------

_ENDS_A_LOOP = ("StopIteration", "StopAsyncIteration")
"""Never handed on: a forged one would end a test's map() or all() early, and so pass it."""

EXCEPTIONS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and name not in _ENDS_A_LOOP
}
"""The exceptions that cross by name."""


_LONGEST_MESSAGE = 10_000
"""Characters of a text that crosses as an exception's argument."""


class RemoteError(Exception):
    """An exception of the other side that has no builtin counterpart."""


def encode_error(error: BaseException) -> list[Encoded]:
    """The nearest builtin exception's name, and those arguments that are plain."""
    known = (kind.__name__ for kind in type(error).__mro__ if EXCEPTIONS.get(kind.__name__) is kind)
    plain = [given for given in error.args[:3] if given is None or type(given) in (str, int, float)]
    short = [given[:_LONGEST_MESSAGE] if type(given) is str else given for given in plain]
    return [next(known, "RemoteError"), encode(short)]


def decode_error(encoded: Any) -> Exception:
    """The exception to raise on this side."""
    if type(encoded) is not list or len(encoded) != 2 or type(encoded[0]) is not str:
        raise ProtocolError("an error that is none")
    arguments = decode(encoded[1], _no_handle)
    arguments = arguments if type(arguments) is list else []
    try:
        return EXCEPTIONS.get(encoded[0], RemoteError)(*arguments)
    except (TypeError, ValueError):  # some want arguments of their own kind
        return RemoteError(encoded[0])


def _no_handle(tag: str, content: Any) -> Any:
    raise ProtocolError("a handle where none can be")
