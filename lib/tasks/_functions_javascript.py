"""JavaScript literals as BFCL grades them, read by the type of their parameter.

Owns which texts are literals of a JavaScript type and what they are worth. Must not know rows, nor how values are
compared.

    python -c "from lib.tasks._functions_javascript import read; print(read('[1, 2]', 'array', 'integer'))"

The behaviour is that of bfcl-eval 2026.3.23; tests/tasks/test_functions_source.py has it as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lib.tasks._functions_scan import (
    WHOLE,
    behind,
    boolean,
    elements,
    enclosed,
    is_decimal,
    is_whole,
    number,
    over,
    over_blank,
    past,
    past_new,
    unquoted,
    untyped,
)

_DECIMAL = number(is_decimal, float)
_BIGINT = number(is_whole, int, ("n",))
_MARKS = "\"'"


def read(text: str, kind: str, nested: str | None) -> Any:
    """A literal's value; the text itself where it is no literal of its type.

    `nested` = the type of an array's elements; None = each says by its form what it is. Raises ValueError for numbers
    of more digits than Python converts.
    """
    return _array(text, nested) if kind == "array" else _PLAIN[kind](text)


def _untyped(text: str) -> Any:
    """A literal whose type is not known."""
    return untyped(text.strip(), _MARKS)


def _string(text: str) -> str:
    inside = unquoted(text, _MARKS)
    return text if inside is None else inside


def _bigint(text: str) -> Any:
    value = _BIGINT(text)
    if value is not text and text.endswith("\n"):
        raise ValueError  # officially the line break is cut off in place of the n
    return value


# -- arrays -----------------------------------------------------------------------------------------------------------


def _array(text: str, nested: str | None) -> Any:
    """`[…]` or `new Array(…)`, whatever follows. An element that cannot be converted makes the whole a text."""
    text = text.strip()
    start, close = _head(text)
    if start < 0:
        return text
    end = _table_end(text, start, close)
    if end >= 0:
        return [[_untyped(one) for one in row.split(",")] for row in _rows(text[:end])]
    inside = next(enclosed(text, [start], close), None)
    if inside is None:
        return text
    ones = elements(inside) if inside.strip() else []
    try:
        return [_untyped(one) if nested is None else read(one, nested, None) for one in ones]
    except ValueError:
        return text


def _head(text: str) -> tuple[int, str]:
    """(the place where the elements begin, the mark that ends them); the place -1 = it is no array."""
    if text.startswith("["):
        return 1, "]"
    return past_new(text, 3, "Array(") if text.startswith("new") else -1, ")"


def _table_end(text: str, start: int, close: str) -> int:
    """The end of an array of arrays whose first one begins at `start`; -1 = it is none.

    A row ends at the first bracket behind which the next row, or the end of all, follows; and on its own line.
    """
    seen = past(text, start, "[")
    while seen >= 0:
        end = text.find("]", seen)
        if end < 0 or text.find("\n", seen, end) >= 0:
            return -1
        at = over_blank(text, end + 1)
        if text.startswith(close, at):
            return at + 1
        row = past(text, at + 1, "[") if text.startswith(",", at) else -1
        seen = end + 1 if row < 0 else row
    return -1


def _rows(table: str) -> list[str]:
    """What stands in the brackets of an array of arrays; the outer one is not told from the first row's."""
    first, *others = enclosed(table, behind(table, "["), "]")
    return [first.lstrip().removeprefix("["), *others]


# -- objects ----------------------------------------------------------------------------------------------------------


def _dict(text: str) -> Any:
    """`{key: value, …}` up to the first closing brace, on one line: no object lies in another."""
    text = text.strip()
    inside = next(enclosed(text, [1], "}"), None) if text.startswith("{") else None
    if inside is None:
        return text
    return {key.strip().strip(_MARKS): _member(value.strip()) for key, value in _pairs(inside)}


def _member(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return _array(text, None)
    return _untyped(text.strip(_MARKS))


def _pairs(inside: str) -> Iterator[tuple[str, str]]:
    """(key, value): a key goes to the next colon, a value to the first comma that another key follows."""
    at = over(inside, 0, _is_colon)
    while (colon := inside.find(":", at)) >= 0:
        start = over_blank(inside, colon + 1)
        end, following = _value_end(inside, start)
        yield inside[at:colon], inside[start:end]
        at = over(inside, following, _is_colon)


def _is_colon(character: str) -> bool:
    return character == ":"


def _value_end(inside: str, start: int) -> tuple[int, int]:
    """(the end of a value, the place where the next key begins): a key has one character at least, and no comma."""
    comma = inside.find(",", start)
    while comma >= 0:
        following = inside.find(",", comma + 1)
        key = over_blank(inside, comma + 1)
        if inside.find(":", key + 1, len(inside) if following < 0 else following) >= 0:
            return comma, key
        if key > comma + 1 and inside.startswith(":", key):
            return comma, key - 1  # a blank is a key, too
        comma = following
    return len(inside), len(inside)


_PLAIN: Mapping[str, Callable[[str], Any]] = {
    "String": _string,
    "any": str,
    "integer": WHOLE,
    "float": _DECIMAL,
    "Bigint": _bigint,
    "Boolean": boolean,
    "dict": _dict,
}
