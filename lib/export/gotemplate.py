"""The part of Go's text/template that our Modelfiles use, executed as Ollama executes it.

Owns the syntax (actions, trim markers, if, range, variables, strings), and what Ollama hands to a template. Must not
know chat templates or files. Anything else than what is written here is refused, never guessed.

    python -c "from lib.export.gotemplate import render; \
               print(render('{{ range .Messages }}<{{ .Content }}>{{ end }}', [dict(role='user', content='hi')]))"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lib import WorkbenchError
from lib.task import Message

SPACE = " \t\r\n"
"""What a trim marker takes away."""

_TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|`[^`]*`|:=|=|\$?\.?[A-Za-z_][A-Za-z0-9_]*|\$|\d+)', re.DOTALL)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[abfnrtv\\"])')
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


class GoTemplateError(WorkbenchError, ValueError):
    """A template that is wrong, or uses what is not known here, or that stops by itself on these messages."""


class _Scope(NamedTuple):
    dot: Any
    variables: list[dict[str, Any]]
    """Innermost last."""


Node = Callable[[_Scope], str]
Value = Callable[[_Scope], Any]


def render(template: str, messages: Sequence[Message]) -> str:
    """The prompt that Ollama makes of a chat, messages {role, content}, with this template.

    As in ollama/ollama 0.33, template/template.go: neighbours of one role become one message, all system messages are
    .System too. Raises GoTemplateError.
    """
    collated = collate(messages)
    data = {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [{"Role": m["role"], "Content": m["content"], "Thinking": ""} for m in collated],
        "Response": "",
    }
    nodes, rest = _parse(list(_pieces(template)), 0)
    if rest is not None:
        raise GoTemplateError(f"{{{{ {rest} }}}} without a beginning")
    scope = _Scope(data, [{"$": data}])
    return "".join(node(scope) for node in nodes)


def collate(messages: Sequence[Message]) -> list[Message]:
    """The messages as a template sees them: a role's neighbours are one message, put together by an empty line."""
    collated: list[Message] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"] != "tool":
            collated[-1] = collated[-1] | {"content": collated[-1]["content"] + "\n\n" + message["content"]}
        else:
            collated.append(dict(message))
    return collated


def quoted(text: str) -> str:
    """A Go string that says this text, of printable ASCII only."""
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# parsing --------------------------------------------------------------------------------------------------------------
def _pieces(template: str) -> Iterator[tuple[bool, str]]:
    """(is an action, text) in order, after the trim markers have taken what they take."""
    at, trim = 0, False
    while True:
        begin = template.find("{{", at)
        text = template[at:] if begin < 0 else template[at:begin]
        if trim:
            text = text.lstrip(SPACE)
        if begin < 0:
            yield False, text
            return
        end = _end_of_action(template, begin + 2)
        inside = template[begin + 2 : end]
        if inside[:1] == "-" and inside[1:2] in tuple(SPACE):
            text, inside = text.rstrip(SPACE), inside[1:]
        trim = inside[-1:] == "-" and inside[-2:-1] in tuple(SPACE)
        yield False, text
        yield True, inside.removesuffix("-").strip(SPACE) if trim else inside.strip(SPACE)
        at = end + 2


def _end_of_action(template: str, at: int) -> int:
    while at < len(template):
        if template.startswith("}}", at):
            return at
        if template[at] in '"`':
            match = _TOKEN.match(template, at)
            if match is None:
                break
            at = match.end()
        else:
            at += 1
    raise GoTemplateError("an action that does not end")


def _parse(pieces: list[tuple[bool, str]], depth: int) -> tuple[list[Node], str | None]:
    """Nodes up to the `end` or `else` that belongs to this block; `pieces` is used up so far."""
    nodes: list[Node] = []
    while pieces:
        is_action, text = pieces.pop(0)
        word = text.split(None, 1)[0] if is_action and text else ""
        if not is_action:
            nodes.append(lambda scope, text=text: text)  # type: ignore[misc]
        elif word in ("end", "else"):
            return nodes, text
        elif word == "if":
            nodes.append(_if(text.removeprefix("if"), pieces, depth))
        elif word == "range":
            nodes.append(_range(text.removeprefix("range"), pieces, depth))
        else:
            nodes.append(_action(text))
    if depth:
        raise GoTemplateError("a block without an end")
    return nodes, None


def _if(condition: str, pieces: list[tuple[bool, str]], depth: int) -> Node:
    test = _value(condition)
    nodes, rest = _parse(pieces, depth + 1)
    other: list[Node] = []
    if rest is not None and rest.startswith("else"):
        following = rest.removeprefix("else").strip()
        if following:
            other = [_if(following.removeprefix("if"), pieces, depth)]
        else:
            other, _ = _parse(pieces, depth + 1)
    return lambda scope: _block(nodes if test(scope) else other, scope)


def _range(over: str, pieces: list[tuple[bool, str]], depth: int) -> Node:
    values = _value(over)
    nodes, rest = _parse(pieces, depth + 1)
    if rest != "end":
        raise GoTemplateError("range with else is not used here")
    return lambda scope: "".join(_block(nodes, scope._replace(dot=dot)) for dot in values(scope))


def _block(nodes: Sequence[Node], scope: _Scope) -> str:
    inner = scope._replace(variables=[*scope.variables, {}])
    return "".join(node(inner) for node in nodes)


def _action(text: str) -> Node:
    match = re.match(r"(\$[A-Za-z_]\w*)\s*(:?=)\s*(.*)", text, re.DOTALL)
    if match is None:
        value = _value(text)
        return lambda scope: str(value(scope))
    name, how, rest = match[1], match[2], _value(match[3])

    def assign(scope: _Scope) -> str:
        place = scope.variables[-1] if how == ":=" else _holder(scope, name)
        place[name] = rest(scope)
        return ""

    return assign


def _value(text: str) -> Value:
    """An operand, or one of the functions that are known here with its operands."""
    words, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise GoTemplateError(f"{{{{ {text.strip()} }}}} is not understood here")
        words.append(match[1])
        at = match.end()
    if not words:
        raise GoTemplateError("an empty action")
    if words[0] in _FUNCTIONS:
        function, operands = _FUNCTIONS[words[0]], [_operand(word) for word in words[1:]]
        return lambda scope: function(scope, [operand(scope) for operand in operands])
    if len(words) > 1:
        raise GoTemplateError(f"{{{{ {text.strip()} }}}} is not understood here")
    return _operand(words[0])


def _operand(word: str) -> Value:
    if word[0] == "`":
        return lambda scope: word[1:-1]
    if word[0] == '"':
        said = _ESCAPE.sub(_unescaped, word[1:-1])
        return lambda scope: said
    if word.isdigit():
        return lambda scope: int(word)
    if word[0] == ".":
        return lambda scope: _field(scope.dot, word[1:])
    if word.startswith("$."):
        return lambda scope: _field(scope.variables[0]["$"], word[2:])
    if word[0] == "$":
        return lambda scope: _holder(scope, word)[word]
    raise GoTemplateError(f"{word} is not understood here")


def _unescaped(match: re.Match[str]) -> str:
    return _LETTERS.get(match[1]) or chr(int(match[1][1:], 16))


def _field(dot: Any, name: str) -> Any:
    if not isinstance(dot, Mapping) or name not in dot:
        raise GoTemplateError(f".{name} is not known here")
    return dot[name]


def _holder(scope: _Scope, name: str) -> dict[str, Any]:
    for variables in scope.variables[::-1]:
        if name in variables:
            return variables
    raise GoTemplateError(f"undefined variable {name}")


def _eq(scope: _Scope, values: list[Any]) -> bool:
    """eq a b c: a is b or c."""
    return any(values[0] == other for other in values[1:])


def _index(scope: _Scope, values: list[Any]) -> Any:
    """Our templates use it to stop: the text says why, and no text is that long."""
    text, place = values
    if place >= len(text):
        raise GoTemplateError(f"the template stops: {text}")
    return text.encode()[place]


_FUNCTIONS: dict[str, Callable[[_Scope, list[Any]], Any]] = {"eq": _eq, "index": _index}
