r"""Java and JavaScript literals as BFCL grades them: arguments come as source text and are read by their type.

Source: bfcl-eval 2026.3.23, eval_checker/ast_eval/type_convertor (Apache-2.0): its patterns, so that verdicts agree.
What matches no pattern stays a text. Also writes values as such literals, for gold answers. Must not know rows.

    python -c "from lib.tasks._functions_source import from_source; print(from_source('5L', 'long', None, 'java'))"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

TYPES: dict[str, dict[str, type]] = {
    "java": {
        "byte": int,
        "short": int,
        "integer": int,
        "float": float,
        "double": float,
        "long": int,
        "boolean": bool,
        "char": str,
        "Array": list,
        "ArrayList": list,
        "HashMap": dict,
        "String": str,
        "any": str,
    },
    "javascript": {
        "String": str,
        "integer": int,
        "float": float,
        "Bigint": int,
        "Boolean": bool,
        "dict": dict,
        "array": list,
        "any": str,
    },
}
"""Set, Hashtable, Queue and Stack are left out: the official converter raises on them, and no row has them."""
INNER = ("Array", "ArrayList", "array")
"""The types whose elements have a type of their own."""
LONGEST, BLANKS, BRACKETS = 4_000, 64, 12
"""Most characters, white space in a row, and closing brackets of a literal that is read. The official patterns try many
ways to divide a text, in time that grows with a power of these: beyond them an argument is no literal."""

_TOO_BLANK = re.compile(rf"\s{{{BLANKS + 1}}}")
_INTEGER = re.compile(r"^-?\d+$")
_LONG = re.compile(r"^-?\d+[lL]$")
_FLOAT = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$")
_DOUBLE = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?$")
_JS_FLOAT = re.compile(r"^-?\d+(\.\d+)?$")
_BIGINT = re.compile(r"^-?\d+n$")
_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_ADDED_HEAD = re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*")
_EMPTY_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_PUTS_HEAD = re.compile(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?\s*", re.DOTALL)
_EMPTY_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)")
_JS_TABLE = re.compile(
    r"\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]|\bnew\s+Array\(\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\)",
)
_JS_ARRAY = re.compile(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)")
_JS_DICT = re.compile(r"\{(.*?)\}")
_JS_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")


class SourceError(ValueError):
    """The value is no source text that can be read."""


def from_source(value: Any, kind: str, nested: str | None, language: str) -> Any:
    """A literal's value; the text itself where it is no literal of its type. Raises SourceError for what is no text."""
    if type(value) is not str or len(value) > LONGEST or value.count("]") > BRACKETS or _TOO_BLANK.search(value):
        raise SourceError
    read = _java if language == "java" else _javascript
    try:
        return read(value, kind, nested)
    except ValueError:  # a number of more digits than Python converts: the official converter raises
        raise SourceError from None


# -- Java -------------------------------------------------------------------------------------------------------------


def _java(text: str, kind: str, nested: str | None) -> Any:
    if kind in ("byte", "short", "integer"):
        return int(text) if _INTEGER.match(text) else text
    if kind == "long":
        return int(re.sub(r"[lL]$", "", text)) if _LONG.match(text) else text
    if kind == "float":
        return float(re.sub(r"[fF]$", "", text)) if _FLOAT.match(text) else text
    if kind == "double":
        return float(text) if _DOUBLE.match(text) else text
    if kind == "boolean":
        return text == "true" if text in ("true", "false") else text
    if kind == "ArrayList":
        return _array_list(text, nested)
    if kind == "Array":
        found = _ARRAY.search(text)
        return (
            [_java(one.strip(), nested or "any", None) for one in found[1].split(",") if one.strip()] if found else text
        )
    return _hash_map(text) if kind == "HashMap" else text


def _array_list(text: str, nested: str | None) -> Any:
    found = _AS_LIST.search(text)
    if found:
        return [_java_element(one.strip(), nested) for one in found[1].split(",")]
    found = _ADDED_HEAD.search(text)
    end = text.find("}}", found.end() + 1) if found else -1  # the first two braces after at least one character
    if found and end >= 0:
        return [_java_element(one.strip(), nested) for one in re.findall(r"add\((.+?)\)", text[found.end() : end])]
    return [] if _EMPTY_LIST.search(text) else text


def _java_element(text: str, nested: str | None) -> Any:
    return text[1:-1] if nested in ("char", "String") else _java(text, nested or "any", None)


def _hash_map(text: str) -> Any:
    found = _PUTS_HEAD.search(text)
    end = text.find("}", found.end()) if found else -1
    if found and end >= 0:
        puts = re.findall(r"put\(\"(.*?)\",\s*(.*?)\)", text[found.end() : end])
        return {key: _java_value(one.strip()) for key, one in puts}
    return {} if _EMPTY_MAP.search(text) else text


def _java_value(text: str) -> Any:
    """A literal whose type is not known."""
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    if _LONG.match(text):
        return int(text[:-1])
    return float(re.sub(r"[fF]$", "", text)) if _FLOAT.match(text) else _number(text)


def _number(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


# -- JavaScript -------------------------------------------------------------------------------------------------------


def _javascript(text: str, kind: str, nested: str | None) -> Any:
    if kind == "String":
        return text[1:-1] if _quoted(text) else text
    if kind == "integer":
        return int(text) if _INTEGER.match(text) else text
    if kind == "float":
        return float(text) if _JS_FLOAT.match(text) else text
    if kind == "Bigint":
        return int(text[:-1]) if _BIGINT.match(text) else text
    if kind == "Boolean":
        return text == "true" if text in ("true", "false") else text
    if kind == "dict":
        return _js_dict(text.strip())
    return _js_array(text.strip(), nested) if kind == "array" else text


def _quoted(text: str) -> bool:
    return any(text.startswith(mark) and text.endswith(mark) for mark in ('"', "'"))


def _js_array(text: str, nested: str | None) -> Any:
    found = _JS_TABLE.match(text)
    if found:
        return [_js_inner(one, first=number == 0) for number, one in enumerate(re.findall(r"\[(.*?)\]", found[0]))]
    found = _JS_ARRAY.match(text)
    if not found:
        return text
    inside = (found[1] if found[1] is not None else found[2] or "").strip()
    elements = [one.strip() for one in inside.split(",")] if inside else []
    if not nested:
        return [_js_value(one) for one in elements]
    try:
        return [_javascript(one, nested, "String" if one.startswith(("'", '"')) else None) for one in elements]
    except ValueError:
        return text


def _js_inner(text: str, first: bool) -> list[Any]:
    inside = text.strip()
    inside = inside[1:] if first and inside.startswith("[") else inside
    return [_js_value(one.strip()) for one in inside.split(",")]


def _js_dict(text: str) -> Any:
    if text == "{}":
        return {}
    found = _JS_DICT.match(text)
    if not found:
        return text
    return {key.strip().strip("'\""): _js_member(value.strip()) for key, value in _JS_PAIR.findall(found[1])}


def _js_member(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return _js_array(text, None)
    if text.startswith("{") and text.endswith("}"):
        return _js_dict(text)
    return _js_value(text.strip("'\""))


def _js_value(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    return text[1:-1] if _quoted(text) else _number(text)


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
