"""Java literals as BFCL grades them, read by the type of their parameter.

Owns which texts are literals of a Java type and what they are worth. Must not know rows, nor how values are compared.

    python -c "from lib.tasks._functions_java import read; print(read('new int[]{1, 2}', 'Array', 'integer'))"

The behaviour is that of bfcl-eval 2026.3.23; tests/tasks/test_functions_source.py has it as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lib.tasks._functions_scan import (
    WHOLE,
    Next,
    behind,
    boolean,
    elements,
    enclosed,
    is_scientific,
    is_whole,
    number,
    over,
    over_blank,
    past,
    past_new,
    untyped,
)

_LONG = number(is_whole, int, ("l", "L"))
_FLOAT = number(is_scientific, float, ("f", "F"))
_DOUBLE = number(is_scientific, float)
_AS_LIST = "(Arrays.asList("


def read(text: str, kind: str, nested: str | None) -> Any:
    """A literal's value; the text itself where it is no literal of its type.

    `nested` = the type of the elements; None = each says by its form what it is. Raises ValueError for numbers of more
    digits than Python converts.
    """
    collection = _LISTS.get(kind)
    return _PLAIN[kind](text) if collection is None else collection(text, nested)


def _untyped(text: str) -> Any:
    """A literal whose type is not known."""
    for read_number in (_LONG, _FLOAT):
        value = read_number(text)
        if value is not text:
            return value
    return untyped(text, '"')


def _element(text: str, nested: str | None) -> Any:
    return _untyped(text) if nested is None else read(text, nested, None)


def _created(text: str, name: str) -> Iterator[int]:
    """The place behind every `new`, white space and this name; "" = the place before any name."""
    return (start for at in behind(text, "new") if (start := past_new(text, at, name)) >= 0)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# -- lists ------------------------------------------------------------------------------------------------------------


def _array(text: str, nested: str | None) -> Any:
    """`new Name[] {…}`, up to the first closing brace."""
    inside = next(enclosed(text, _array_starts(text), "}"), None)
    return text if inside is None else [_element(one, nested) for one in elements(inside) if one]


def _array_starts(text: str) -> Iterator[int]:
    for at in _created(text, ""):
        name = over(text, at, _is_word)
        start = past(text, name + 2, "{") if name > at and text.startswith("[]", name) else -1
        if start >= 0:
            yield start


def _array_list(text: str, nested: str | None) -> Any:
    """`new ArrayList<Name>(Arrays.asList(…))`, else `new ArrayList<Name>() {{ add(…); }}`, else an empty one."""
    lists = list(_list_starts(text))
    given = [at + len(_AS_LIST) for at in lists if text.startswith(_AS_LIST, at)]
    inside = next(enclosed(text, given, "))", least=1), None)
    if inside is not None:
        return [_list_element(one, nested) for one in elements(inside)]
    bare = [at + 2 for at in lists if text.startswith("()", at)]
    start = next((found for at in bare if (found := past(text, at, "{{")) >= 0), None)
    if start is None:
        return [] if bare else text
    start = over_blank(text, start)
    body = text[start : max(text.find("}}", start + 1), start)]
    return [_list_element(one.strip(), nested) for one in enclosed(body, behind(body, "add("), ")", least=1)]


def _list_starts(text: str) -> Iterator[int]:
    """The place behind every `new ArrayList<Name>`."""
    for at in _created(text, "ArrayList<"):
        name = over(text, at, _is_word)
        if text.startswith(">", name):
            yield name + 1


def _list_element(text: str, nested: str | None) -> Any:
    """Texts and characters lose their first and last character, whatever these are; those of an array keep them."""
    return text[1:-1] if nested in ("char", "String") else _element(text, nested)


# -- maps -------------------------------------------------------------------------------------------------------------


def _hash_map(text: str) -> Any:
    """`new HashMap<…>() {{ put("key", value); }}`, up to the first closing brace; else an empty one."""
    maps = list(_created(text, "HashMap<"))
    opened = (_opened(text, at) for at in behind(text, ">", maps[0])) if maps else ()
    start = next((place for place in opened if place >= 0), None)
    end = -1 if start is None else text.find("}", start)
    if end >= 0:
        return {key: _untyped(value.strip()) for key, value in _puts(text[start:end])}
    return {} if _is_empty_map(text, maps) else text


def _opened(text: str, at: int) -> int:
    """The place behind `() {`, with or without a second brace; -1 = something else stands there."""
    called = past(text, at, "()")
    brace = past(text, called, "{") if called >= 0 else -1
    return max(brace, past(text, brace, "{")) if brace >= 0 else -1


def _is_empty_map(text: str, maps: Iterable[int]) -> bool:
    """Whether the line of a `HashMap<` has a `>` with `()` behind it."""
    free = 0
    for start in maps:
        if start >= free:
            line = text.find("\n", start)
            free = len(text) if line < 0 else line
            if any(past(text, at, "()") >= 0 for at in behind(text, ">", start, free)):
                return True
    return False


def _puts(body: str) -> Iterator[tuple[str, str]]:
    """(key, value) of every `put("key", value)`. A key ends at the first `",` behind which a value ends on its line.

    That is the first `",` at all, or the last of the line where the value stands on the next.
    """
    lines, keys, closing, free = Next(body, "\n"), Next(body, '",'), Next(body, ")"), 0
    for start in behind(body, 'put("'):
        if start < free:
            continue
        free = line = lines(start)
        for key in (keys(start), body.rfind('",', start, line)):
            if not 0 <= key < line:
                break
            value = over_blank(body, key + 2)
            end = closing(value)
            if end < len(body) and body.find("\n", value, end) < 0:
                yield body[start:key], body[value:end]
                free = end + 1
                break


_LISTS: Mapping[str, Callable[[str, str | None], Any]] = {"Array": _array, "ArrayList": _array_list}
_PLAIN: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("byte", "short", "integer"), WHOLE),
    **dict.fromkeys(("char", "String", "any"), str),
    "long": _LONG,
    "float": _FLOAT,
    "double": _DOUBLE,
    "boolean": boolean,
    "HashMap": _hash_map,
}
