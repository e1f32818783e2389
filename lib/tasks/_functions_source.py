"""Java and JavaScript literals as BFCL grades them: arguments come as source text and are read by their type.

Owns the types, and writing values as literals, for gold answers; the readers are in _functions_java.py and
_functions_javascript.py. Must not know rows. A text that is no literal of its type stays a text.

    python -c "from lib.tasks._functions_source import from_source; print(from_source('5L', 'long', None, 'java'))"

The behaviour is that of bfcl-eval 2026.3.23, for which a comma or a bracket inside quotes is like any other. Time grows
with the length of a text; where the official reader needs minutes or hours, the value is the one it would come to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lib.tasks import _functions_java, _functions_javascript

TYPES: dict[str, dict[str, type]] = {
    "java": {
        **dict.fromkeys(("byte", "short", "integer", "long"), int),
        **dict.fromkeys(("float", "double"), float),
        **dict.fromkeys(("char", "String", "any"), str),
        **dict.fromkeys(("Array", "ArrayList"), list),
        "boolean": bool,
        "HashMap": dict,
    },
    "javascript": {
        **dict.fromkeys(("integer", "Bigint"), int),
        **dict.fromkeys(("String", "any"), str),
        "float": float,
        "Boolean": bool,
        "array": list,
        "dict": dict,
    },
}
"""Set, Hashtable, Queue and Stack are left out: the official converter raises on them, and no row has them."""
INNER = tuple(name for types in TYPES.values() for name, kind in types.items() if kind is list)
"""The types whose elements have a type of their own."""


class SourceError(ValueError):
    """The value is no source text that can be read."""


def from_source(value: Any, kind: str, nested: str | None, language: str) -> Any:
    """A literal's value; the text itself where it is no literal of its type. `nested` = the type of its elements.

    Raises SourceError for what is no text, and where the official reader raises: at more digits than Python converts,
    and at a Bigint that a line break follows.
    """
    if type(value) is not str:
        raise SourceError
    read = _functions_java.read if language == "java" else _functions_javascript.read
    try:
        return read(value, kind, nested)
    except ValueError:
        raise SourceError from None


# -- writing ----------------------------------------------------------------------------------------------------------


def to_source(value: Any, kind: str, nested: str | None, language: str) -> str:
    """A value of a ground truth as the literal that is read back as this value; texts are taken as they are."""
    if isinstance(value, str) and kind != "String":
        return value
    return _WRITERS[language](value, kind, nested)


def _to_java(value: Any, kind: str, nested: str | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if kind in ("long", "float"):
        return f"{value}{kind[0].upper()}"
    if isinstance(value, list):
        quote = '"{}"' if kind == "ArrayList" and nested in ("String", "char") else "{}"
        inside = ", ".join(quote.format(_to_java(one, nested or "any", None)) for one in value)
        if kind == "Array":
            return f"new Object[]{{{inside}}}"
        return f"new ArrayList<>(Arrays.asList({inside}))" if value else "new ArrayList<>()"
    if isinstance(value, dict):
        puts = " ".join(f'put("{key}", {_java_literal(one)});' for key, one in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}" if value else "new HashMap<>()"
    return str(value)


def _java_literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _to_java(value, "any", None)


def _to_javascript(value: Any, kind: str, nested: str | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if kind == "Bigint":
        return f"{value}n"
    if isinstance(value, list):
        return "[" + ", ".join(_js_literal(one, nested) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_js_literal(one, None)}" for key, one in value.items()) + "}"
    return str(value)


def _js_literal(value: Any, nested: str | None) -> str:
    return f"'{value}'" if isinstance(value, str) else _to_javascript(value, nested or "any", None)


_WRITERS: Mapping[str, Callable[[Any, str, str | None], str]] = {"java": _to_java, "javascript": _to_javascript}
