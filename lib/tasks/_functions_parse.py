"""Function calls out of an answer, whichever way a model writes them: without eval, in linear time.

Owns the formats: `tool_calls` of a message; in text <tool_call> with JSON (Hermes, Qwen 2.5 and 3) or <function=…>
(Qwen Coder), gpt-oss channels, Llama's <|python_tag|>, a JSON list (xLAM) or objects, and BFCL's [f(x=1)]. Must not
know what is right.

    python -c "from lib.tasks._functions_parse import parse; print(parse({'content': '[f(x=1)]'}))"
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lib.tasks._functions_check import Call

DEPTH = 64
"""Lists and objects inside each other that arguments may have; the benchmark's have less than ten."""
BITS = 4_000
"""Of a whole number among the arguments. Python refuses to write one of 4,300 digits: its call could not be graded."""
PYTHON_LENGTH = 50_000
"""Characters of an answer in Python syntax that are read; JSON has no such limit."""

_MARK = re.compile(r"<\|(start|channel|message|constrain|end|return|call)\|>")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_BETWEEN = re.compile(r"[\s;]*")
_PYTHON = re.compile(r"\A\[?\s*[A-Za-z_][\w.]*\s*\(")
_STRINGS = re.compile(r"'(?:[^'\\\n]|\\.)*'?|\"(?:[^\"\\\n]|\\.)*\"?", re.DOTALL)  # unfinished ones: no second look
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LARGE = 1e15
"""Numbers beyond this are not calculated with."""


class Parsed(NamedTuple):
    """What an answer calls. `calls` None = nothing that can be decoded as calls, and `problem` says why."""

    calls: list[Call] | None
    problem: str = ""


class _Malformed(Exception):
    """Something that looks like a call and cannot be decoded."""


def parse(message: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> Parsed:
    """The calls of an assistant message: its `tool_calls` where the tokenizer's parser made them, else those in text.

    A text that is no call (prose, nothing) has none; one broken call makes the whole answer undecodable. `tools`
    (OpenAI's form) say which values of <function=…> are no texts.
    """
    try:
        if message.get("tool_calls"):
            return Parsed([_tool_call(call) for call in message["tool_calls"]])
        content = message.get("content")
        return _parse_text(content if isinstance(content, str) else "", tools)
    except _Malformed as error:
        return Parsed(None, str(error))


def _parse_text(text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    text = without_thinking(text).strip()
    if "<|channel|>" in text or "<|message|>" in text:
        return _found(list(_harmony_calls(text)))
    if _OPEN in text:
        return _found([call for body in _tagged(text) for call in _tagged_calls(body, tools)])
    before, tag, after = text.partition("<|python_tag|>")
    text = (after if tag else before).removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").strip()
    fenced = _FENCE.match(text) if text.startswith("```") else None
    text = fenced[1].strip() if fenced else text
    if _PYTHON.match(text):
        return Parsed(_python_calls(text))
    if text.startswith(("[", "{")):
        return Parsed(list(_json_calls(text)))
    return Parsed(None, "no call")


def without_thinking(text: str) -> str:
    """What follows the thoughts; "" where they were never finished."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if text.lstrip().startswith("<think>") else text


def _found(calls: list[Call]) -> Parsed:
    return Parsed(calls) if calls else Parsed(None, "no call")


def _tagged(text: str) -> Iterator[str]:
    """The bodies between <tool_call> and </tool_call>."""
    place = text.find(_OPEN)
    while place >= 0:
        end = text.find(_CLOSE, place)
        if end < 0:
            raise _Malformed("a <tool_call> without its end")
        yield text[place + len(_OPEN) : end]
        place = text.find(_OPEN, end)


def _tagged_calls(body: str, tools: Sequence[Mapping[str, Any]]) -> Iterator[Call]:
    """JSON, or <function=f><parameter=x>value</parameter>…</function>."""
    head, mark, rest = body.strip().partition(">")
    if not head.startswith("<function="):
        yield from _json_calls(body)
        return
    name = head.removeprefix("<function=")
    if not mark or not rest.endswith("</function>"):
        raise _Malformed("a <function=…> without its end")
    known = [tool["function"] for tool in tools if tool["function"]["name"] == name]
    properties = known[0]["parameters"]["properties"] if known else {}
    parts = rest.removesuffix("</function>").strip().split("<parameter=")
    arguments: dict[str, Any] = {}
    for part in parts[1:]:
        parameter, _, text = part.strip().partition(">")
        if parts[0] or not text.endswith("</parameter>"):
            raise _Malformed("a <parameter=…> without its end")
        kind = properties.get(parameter, {}).get("type", "string")
        arguments[parameter] = _typed(text.removesuffix("</parameter>").strip("\n"), kind)
    yield Call(name, _arguments(arguments))


def _typed(text: str, kind: str) -> Any:
    """A value written without quotes: JSON where its parameter is no text, and the text where it is no JSON either."""
    if kind == "string":
        return text
    try:
        return _json(text.strip().lower() if kind == "boolean" else text)
    except _Malformed:
        return text


def _harmony_calls(text: str) -> Iterator[Call]:
    """gpt-oss: a message to functions.<name>, whichever channel its header names."""
    header, state, pieces = "", "", _MARK.split(text)
    for mark, piece in zip(["start", *pieces[1::2]], pieces[::2], strict=True):
        if mark == "message":
            recipient = _RECIPIENT.search(header)
            if recipient:
                yield Call(recipient[1], _arguments(_json(piece.strip())))
        header = f"{header} {piece}" if mark in ("channel", "constrain") and state != "message" else piece
        state = mark


# -- JSON -------------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise _Malformed(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _json_calls(text: str) -> Iterator[Call]:
    """The calls in a JSON list, or in objects one after the other with line breaks or ; between them."""
    for value in _json_values(text):
        for one in value if isinstance(value, list) else [value]:
            if one != {}:  # [{}] says as much as []
                yield _call(one)


def _json_values(text: str) -> Iterator[Any]:
    place = len(text) - len(text.lstrip())
    while place < len(text):
        try:
            value, place = _DECODER.raw_decode(text, place)
        except RecursionError:
            raise _Malformed("nested too deep") from None
        except ValueError as error:
            raise _Malformed(f"no JSON: {getattr(error, 'msg', 'a number too long')}") from None
        yield value
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches the empty text


def _json(text: str) -> Any:
    values = list(_json_values(text))
    if len(values) != 1:
        raise _Malformed(f"{len(values)} JSON values where one is expected")
    return values[0]


def _tool_call(call: Any) -> Call:
    """One of a message's tool_calls: OpenAI's form, or the bare function."""
    return _call(call["function"] if isinstance(call, dict) and "function" in call else call)


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _Malformed("no object with a name and arguments")
    arguments = value.get("arguments", value.get("parameters"))
    return Call(value["name"], _arguments(_json(arguments) if isinstance(arguments, str) else arguments))


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(f"the arguments are {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        if any(isinstance(one, int) and one.bit_length() > BITS for one in level):
            raise _Malformed(f"a whole number of more than {BITS} bits")
        inner = [one for one in level if isinstance(one, (dict, list, tuple))]
        if not inner:
            return value
        level = [child for one in inner for child in (one.values() if isinstance(one, dict) else one)]
    raise _Malformed("nested too deep")


# -- Python -----------------------------------------------------------------------------------------------------------


def _python_calls(text: str) -> list[Call]:
    """[f(x=1), g.h(y="a")] or one call: keyword arguments only, positional ones are dropped (as officially)."""
    if len(text) > PYTHON_LENGTH or _depth(text) > DEPTH:
        raise _Malformed("too long or nested too deep for Python syntax")
    try:
        body = ast.parse(text, mode="eval").body
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:  # the last: its stack
        raise _Malformed(f"no Python call: {type(error).__name__}") from None


def _depth(text: str) -> int:
    """Brackets open at once outside of strings: deep ones would exhaust the parser's stack."""
    depth = deepest = 0
    for character in re.findall(r"[(\[{)\]}]", _STRINGS.sub("", text)):
        depth += 1 if character in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        raise _Malformed("no call with keyword arguments")
    return Call(_dotted(node.func), _arguments({str(one.arg): _value(one.value) for one in node.keywords}))


def _dotted(node: ast.expr) -> str:
    """A called name with its dots; of what is no name before a dot, nothing (as officially)."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}".removeprefix(".")
    return node.id if isinstance(node, ast.Name) else ""


def _value(node: ast.expr) -> Any:
    """A literal's value. A bare name is a text, as officially; arithmetic with plain numbers is calculated."""
    return _READERS.get(type(node), _refuse)(node)


def _constant(node: ast.Constant) -> Any:
    if node.value is Ellipsis:
        return "..."
    return node.value if isinstance(node.value, (str, int, float, type(None))) else _refuse(node)


def _mapping(node: ast.Dict) -> dict[str, Any]:
    if None in node.keys:  # {**other}
        _refuse(node)
    return {str(_value(key)): _value(one) for key, one in zip(node.keys, node.values, strict=True) if key}


def _called(node: ast.Call) -> Any:
    """A call among the arguments: its text, or {name: arguments} where it has named ones (as officially)."""
    if not node.keywords:
        return ast.unparse(node)
    call = _python_call(node)
    return {call.name: call.arguments}


def _signed(node: ast.UnaryOp) -> int | float:
    if not isinstance(node.op, (ast.USub, ast.UAdd)):
        _refuse(node)
    number = _number(node.operand)
    return number if isinstance(node.op, ast.UAdd) else -number


def _calculated(node: ast.BinOp) -> Any:
    operation = _OPERATIONS.get(type(node.op))
    return _refuse(node) if operation is None else operation(_number(node.left), _number(node.right))


def _number(node: ast.expr) -> int | float:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _LARGE:
        raise _Malformed("arithmetic with something that is no plain number")
    return value


_OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_READERS: Mapping[type[ast.expr], Callable[[Any], Any]] = {
    ast.Constant: _constant,
    ast.Name: lambda node: node.id,
    ast.List: lambda node: [_value(one) for one in node.elts],
    ast.Tuple: lambda node: tuple(_value(one) for one in node.elts),
    ast.Dict: _mapping,
    ast.Call: _called,
    ast.UnaryOp: _signed,
    ast.BinOp: _calculated,
}


def _refuse(node: ast.AST) -> NoReturn:
    raise _Malformed(f"{type(node).__name__} is no literal")
