"""The wire between solution and judge: plain values survive it, anything else is a handle or a ProtocolError."""

from __future__ import annotations

import datetime
import decimal
import fractions
import json
import random
import socket
import struct
from collections import OrderedDict, deque
from typing import Any

import pytest

from lib.sandbox import make_filters
from lib.sandbox.inside import filters, wire


def refuse(tag: str, encoded: Any) -> Any:
    raise wire.ProtocolError("a handle")


PLAIN = [
    None, True, 0, -(2**53), 2**53, -(10**40), 1.5, float("inf"), "ü\ud800", b"\x00", bytearray(b"x"), [1, [2]],
    (1, (2,)),
    {1: {"a": (1,)}}, {(1, 2): 3}, {1, 2}, frozenset({1}), 3 + 4j, range(9, 1, -2), deque([1]), decimal.Decimal("1.10"),
    fractions.Fraction(1, 3), datetime.datetime(2020, 1, 2, 3, 4, 5, 6), datetime.date(2020, 1, 2), datetime.time(1, 2),
    datetime.timedelta(1, 2, 3), int, list, type(None),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    sent = json.loads(json.dumps(wire.encode(value)))
    found = wire.decode(sent, refuse)
    assert found == value
    assert type(found) is type(value)


def test_subclasses_cross_as_the_plain_type_without_their_lies() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __int__(self) -> int:
            return 4

        __index__ = __int__
        __hash__ = int.__hash__

    assert wire.encode(Liar(7)) == 7
    assert wire.decode(wire.encode(OrderedDict(a=1)), refuse) == {"a": 1}


def test_what_is_not_plain_is_kept_or_refused() -> None:
    assert wire.encode([object()], lambda value: {"h": 1}) == {"l": [{"h": 1}]}
    with pytest.raises(wire.UnsupportedError, match="a value of type object"):
        wire.encode(object())
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(wire.UnsupportedError, match="nested deeper"):
        wire.encode(nested)


def test_any_json_is_a_value_or_a_protocol_error() -> None:
    rng = random.Random(0)
    tags = [*wire._DECODERS, "h", "r", "?", ""]

    def anything(depth: int) -> Any:
        kind = rng.randrange(9 if depth < 5 else 5)
        scalars = [
            None,
            True,
            rng.randrange(-9, 9),
            rng.choice([0.5, 1e308]),
            rng.choice(["", "0x1f", "1e9", "int", "zz"]),
        ]
        if kind < 5:
            return scalars[kind]
        items = [anything(depth + 1) for _ in range(rng.randrange(4))]
        return items if kind < 7 else {rng.choice(tags): rng.choice([items, anything(depth + 1)])}

    outcomes = {True: 0, False: 0}
    for _ in range(20_000):
        try:
            wire.decode(anything(0), refuse)
            outcomes[True] += 1
        except wire.ProtocolError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 1000


@pytest.mark.parametrize(
    "data",
    [b"", b"\x05", struct.pack("<I", wire.MOST + 1), struct.pack("<I", 3) + b"{", struct.pack("<I", 2) + b"\xff{",
     struct.pack("<I", 60_000) + b"[" * 60_000],
)  # fmt: skip
def test_bytes_that_are_no_frame_are_a_protocol_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(wire.ProtocolError):
            wire.read_frame(ours)


def test_exceptions_cross_by_name_but_none_that_ends_a_loop() -> None:
    class Own(KeyError):
        pass

    assert repr(wire.decode_error(wire.encode_error(Own("k", object())))) == "KeyError('k')"
    for error in (StopIteration(), StopAsyncIteration(), SystemExit(0), KeyboardInterrupt()):
        assert type(wire.decode_error(wire.encode_error(error))) is not type(error)
        assert isinstance(wire.decode_error([type(error).__name__, {"l": []}]), wire.RemoteError)


def test_a_long_message_is_cut() -> None:
    found = wire.decode_error(wire.encode_error(ValueError("x" * 10**7)))
    assert len(str(found)) == 10_000


def test_the_shipped_filters_are_what_the_script_makes() -> None:
    try:
        made = {name: make_filters.build(number) for name, number in make_filters.ARCHITECTURES.items()}
    except OSError as error:
        pytest.skip(f"libseccomp2 is not installed here ({error}): the filters cannot be made again")
    import base64

    assert {name: base64.b64decode(text) for name, text in filters.FILTERS.items()} == made
