"""The two ends of a conversation: the judge asks the solution for attributes and calls; the solution may call back.

Owns handles (numbers that stand for objects which stay on their side) and what each side may ask of the other. Must not
know tests, processes or sandboxes.

    python -c "from lib.sandbox.inside.peer import Judge; help(Judge)"
"""

from __future__ import annotations

import operator
import socket
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

from lib.sandbox.inside.wire import (
    CONTAINERS,
    Encoded,
    ProtocolError,
    UnsupportedError,
    decode,
    decode_error,
    encode,
    encode_error,
    read_frame,
    write_frame,
)

_T = TypeVar("_T")

_BATCH = 64
"""Items of one of the solution's iterators that are asked for at once, at most; at first it is one."""


class Peer:
    """One end: requests out, requests in, and the objects that the other end holds numbers of."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._kept: dict[int, Any] = {}
        self._turn = threading.RLock()  # the solution's threads may call back one after the other

    def request(self, operation: str, *arguments: Encoded) -> dict[str, Any]:
        """Ask the other side, serving what it asks meanwhile; raises what was raised there."""
        with self._turn:
            write_frame(self._sock, {"q": [operation, *arguments]})
            while True:
                message = read_frame(self._sock)
                if type(message) is not dict:
                    raise ProtocolError("a message that is none")
                if "q" in message:
                    self.serve(message["q"])
                elif "x" in message:
                    raise decode_error(message["x"])
                elif "v" in message:
                    return message
                else:
                    raise ProtocolError("a message that is none")

    def serve(self, query: Any) -> None:
        """Answer one request; whatever goes wrong in the answer is told to the other side."""
        try:
            write_frame(self._sock, self.answer(query))
        except ProtocolError:
            raise
        except BaseException as error:  # (model code may raise anything, also SystemExit: it is an answer)
            write_frame(self._sock, {"x": encode_error(error)})

    def answer(self, query: Any) -> dict[str, Encoded]:
        """The reply to one request."""
        raise NotImplementedError

    def encode(self, value: Any) -> Encoded:
        return encode(value, self.keep)

    def decode(self, encoded: Encoded) -> Any:
        return decode(encoded, self._resolve)

    def keep(self, value: Any) -> Encoded:
        """An object that is not plain stays here; the other side gets its number."""
        number = len(self._kept) + 1
        self._kept[number] = value
        return {"h": number, "n": type(value).__name__[:80]}

    def _resolve(self, tag: str, encoded: dict[str, Any]) -> Any:
        number = encoded[tag]
        if type(number) is not int:
            raise ProtocolError("a handle that is none")
        if tag == "h":
            return self.foreign(number, str(encoded.get("n", "object"))[:80])
        if number not in self._kept:
            raise ProtocolError("a handle of nothing")
        return self._kept[number]

    def foreign(self, number: int, name: str) -> Any:
        """What stands here for an object of the other side."""
        raise NotImplementedError


# the solution's end ---------------------------------------------------------------------------------------------------


class Borrowed:
    """One of the judge's objects, on the solution's side: it can be called, and no more."""

    def __init__(self, peer: Solution, number: int) -> None:
        self._peer, self._number = peer, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        peer = self._peer
        sent = [peer.encode(each) for each in arguments]
        return peer.decode(
            peer.request("call", self._number, sent, {key: peer.encode(each) for key, each in named.items()})["v"]
        )


class Solution(Peer):
    """The end that holds model code: it answers everything, because nothing it says is believed."""

    def __init__(self, sock: socket.socket, names: dict[str, Any]) -> None:
        super().__init__(sock)
        self._names = names

    def keep(self, value: Any) -> Encoded:
        return {"r": value._number} if type(value) is Borrowed else super().keep(value)

    def foreign(self, number: int, name: str) -> Any:
        return Borrowed(self, number)

    def serve_forever(self) -> None:
        """Until the judge is gone (ProtocolError)."""
        while True:
            self.serve(read_frame(self._sock)["q"])

    def answer(self, query: Any) -> dict[str, Encoded]:
        operation, target, *arguments = query
        if operation == "get":
            return {"v": self.encode(self._names[target])}
        if operation == "call":
            return self._call(self._kept[target], *arguments)
        value = _OPERATIONS[operation](self._kept[target], *(self.decode(each) for each in arguments))
        return {"v": self.encode(value)}

    def _call(self, function: Any, sent: list[Encoded], named: dict[str, Encoded]) -> dict[str, Encoded]:
        """The result, and what the call made of those arguments that it can change in place."""
        places = dict(enumerate(sent)) | named
        given = {place: self.decode(each) for place, each in places.items()}
        result = function(*(given[place] for place in range(len(sent))), **{key: given[key] for key in named})
        changed = []
        for place, before in places.items():
            if type(before) is dict and next(iter(before)) in CONTAINERS:
                after = self.encode(given[place])
                if after != before:
                    changed.append([place, after])
        return {"v": self.encode(result), "m": changed}


def _next(iterator: Any, most: int) -> tuple[list[Any], bool]:
    items = list(islice(iterator, most))
    return items, len(items) < most


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "attr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": _next,
    "enter": lambda value: value.__enter__(),
    "exit": lambda value: value.__exit__(None, None, None),
    "isinstance": lambda value, other: isinstance(other, value),
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv")},
    **{name: getattr(operator, name) for name in ("mod", "and_", "or_", "xor", "pow", "floordiv", "matmul")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "abs", "neg", "index")},
    **{kind.__name__: kind for kind in (bool, str, int, float)},
    "repr": repr,
    "len": len,
}


# the judge's end ------------------------------------------------------------------------------------------------------


class Judge(Peer):
    """The end that runs the tests: of its own objects it lends only callables, and believes only plain values."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.opaque_eq = 0
        """How often a test compared two of the model's own objects: the model's class decided those."""
        self.clean = True
        """False once anything but plain values crossed: state could then be carried along."""
        self.broken = False
        """True once the other side broke the rules or was gone; a test may have swallowed the exception."""

    def request(self, operation: str, *arguments: Encoded) -> dict[str, Any]:
        if self.broken:
            raise ProtocolError("the other side is gone")
        try:
            return super().request(operation, *arguments)
        except (ProtocolError, OSError) as error:
            self.broken = True
            raise ProtocolError(str(error)) from None

    def get(self, name: str) -> Any:
        """A name that the solution defines; a function of it does not make the exchange unclean."""
        clean = self.clean
        value = self.decode(self.request("get", name)["v"])
        self.clean = clean
        return value

    def keep(self, value: Any) -> Encoded:
        if type(value) is Opaque:
            return {"r": value._number}
        self.clean = False
        return super().keep(value)

    def foreign(self, number: int, name: str) -> Any:
        self.clean = False
        return Opaque(self, number, name)

    def answer(self, query: Any) -> dict[str, Encoded]:
        """The solution calls a function that a test handed to it; anything else is refused."""
        self.clean = False
        operation, number, sent, named = query
        if operation != "call" or not callable(self._kept.get(number)):
            raise UnsupportedError("only functions of the tests can be called")
        arguments = [self.decode(each) for each in sent]
        return {"v": self.encode(self._kept[number](*arguments, **{key: self.decode(named[key]) for key in named}))}

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call one of the solution's functions; containers that it changed in place are changed here as well."""
        given = dict(enumerate(arguments)) | named
        sent = [self.encode(each) for each in arguments]
        reply = self.request("call", number, sent, {key: self.encode(each) for key, each in named.items()})
        changed = reply.get("m")
        for place, after in changed if type(changed) is list else []:
            self.clean = False
            _overwrite(given.get(place), self.decode(after))
        return self.decode(reply["v"])


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, (list, bytearray)) and isinstance(new, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)) and type(new) is (dict if isinstance(old, dict) else set):
        old.clear()
        old.update(new)
    elif isinstance(old, deque) and type(new) is deque:
        old.clear()
        old.extend(new)


class Opaque:
    """One of the solution's objects, on the judge's side.

    It never equals a plain value, and no plain operand travels to it where the solution could answer with what it was
    handed: an expected value must not reach model code.
    """

    __slots__ = ("_name", "_number", "_peer")
    _peer: Judge
    _number: int
    _name: str

    def __init__(self, peer: Judge, number: int, name: str) -> None:
        for slot, value in (("_peer", peer), ("_number", number), ("_name", name)):
            object.__setattr__(self, slot, value)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        peer = self._peer
        return peer.decode(peer.request(operation, self._number, *(peer.encode(each) for each in arguments))["v"])

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__annotations__"):
            raise AttributeError(name)
        return self._ask("attr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __iter__(self) -> Any:
        iterator = self._ask("iter")
        done = not isinstance(iterator, Opaque)
        if done:
            yield from iterator
        most = 1
        while not done:
            items, done = _batch(iterator, most)
            yield from items
            most = min(2 * most, _BATCH)

    def __next__(self) -> Any:
        items, _ = _batch(self, 1)
        if not items:
            raise StopIteration
        return items[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque):
            return False
        self._peer.opaque_eq += 1
        return self._ask("eq", other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Opaque) and self._ask("isinstance", instance) is True

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __len__(self) -> int:
        return _of(int, self._ask("len"))

    def __str__(self) -> str:
        return _of(str, self._ask("str"))

    def __repr__(self) -> str:
        return _of(str, self._ask("repr"))

    def __int__(self) -> int:
        return _of(int, self._ask("int"))

    def __index__(self) -> int:
        return _of(int, self._ask("index"))

    def __float__(self) -> float:
        return _of(float, self._ask("float"))

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, *error: object) -> None:
        self._ask("exit")

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", key)

    def __contains__(self, item: Any) -> bool:
        return any(item is each or item == each for each in self)  # compared here: `in` would hand the item over


def _batch(iterator: Opaque, most: int) -> tuple[list[Any], bool]:
    answer = iterator._ask("next", most)
    if type(answer) is not tuple or len(answer) != 2 or type(answer[0]) is not list:
        raise ProtocolError("items that are none")
    return answer[0], answer[1] is not False


def _of(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _between_opaques(name: str, asks: bool) -> Callable[[Opaque, Any], Any]:
    def operate(self: Opaque, other: Any) -> Any:
        if not isinstance(other, Opaque):
            return NotImplemented
        self._peer.opaque_eq += asks
        return self._ask(name, other)

    return operate


for _name in ("lt", "le", "gt", "ge"):
    setattr(Opaque, f"__{_name}__", _between_opaques(_name, asks=True))
for _name in ("add", "sub", "mul", "truediv", "mod", "and_", "or_", "xor", "pow", "floordiv", "matmul"):
    setattr(Opaque, f"__{_name.strip('_')}__", _between_opaques(_name, asks=False))
for _name in ("abs", "neg"):
    setattr(Opaque, f"__{_name}__", lambda self, _operation=_name: self._ask(_operation))
