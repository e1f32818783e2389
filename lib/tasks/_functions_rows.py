"""What a usable row is, descriptions as tools, and the right calls of a row.

Owns JSON schemas, and what is wrong with descriptions and ground truths. Must not know files, prompts, rewards, or how
calls are written in an answer.

    python -c "from lib.tasks._functions_rows import counted_category; print(counted_category(['f', 'g'], [{}]))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lib.tasks._functions_check import (
    Answer,
    Call,
    Function,
    Language,
    accepted_of,
    check_argument,
    described,
    known_types,
    language_of,
    shown_name,
)
from lib.tasks._functions_source import INNER, to_source

_OPENAPI = {
    **dict.fromkeys(("float", "double", "number"), "number"),
    **dict.fromkeys(("integer", "long", "short", "byte", "Bigint"), "integer"),
    **dict.fromkeys(("boolean", "Boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "tuple", "list", "Array", "ArrayList"), "array"),
    **dict.fromkeys(("dict", "object", "HashMap"), "object"),
}
"""BFCL's type names -> JSON schema's; all others (string, any, char) are texts."""


def needs_answers(category: str) -> bool:
    """Whether a category's rows name the expected calls: (ir)relevance only asks whether to call at all."""
    return "relevance" not in category


def decoded(cell: Any) -> Any:
    """A cell as a value: tables of plain texts hold JSON."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return None if cell == "" else cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def counted_category(functions: Any, answers: Any) -> str:
    """The category that the numbers of functions and of expected calls make, for rows that name none."""
    several = isinstance(functions, list) and len(functions) > 1
    if isinstance(answers, list) and len(answers) > 1:
        return "parallel_multiple" if several else "parallel"
    return "multiple" if several else "simple"


# -- what a usable row is ---------------------------------------------------------------------------------------------


def description_problem(functions: Any, language: Language) -> str:
    """What is wrong with a row's function descriptions; "" = nothing."""
    if not isinstance(functions, list) or not all(isinstance(one, dict) for one in functions):
        return "no list of function descriptions {name, description, parameters}"
    for one in functions:
        parameters = one.get("parameters")
        if not isinstance(one.get("name"), str) or not isinstance(parameters, dict):
            return f"a function without a name, or without parameters: {one!r:.80}"
        properties, required = parameters.get("properties"), parameters.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            return f"{one['name']}: parameters must hold `properties` (an object) and `required` (a list)"
        for name in required:
            if not isinstance(name, str) or name not in properties:
                return f"{one['name']}: `required` names {name!r:.80}, which is not among the properties"
        for name, spec in properties.items():
            problem = _spec_problem(spec, language)
            if problem:
                return f"{one['name']}, {name}: {problem}"
    names = [one["name"] for one in functions]
    return "" if len(set(names)) == len(names) else f"a function is described twice: {sorted(names)}"


def _spec_problem(spec: Any, language: Language) -> str:
    known = known_types(language)
    kind = spec.get("type") if isinstance(spec, dict) else None
    if not isinstance(kind, str) or kind not in known:
        return f"type {kind!r} is not known. Known: {', '.join(known)}"
    if kind in (*INNER, "tuple"):
        inner = spec["items"].get("type") if isinstance(spec.get("items"), dict) else None
        return (
            "" if isinstance(inner, str) and inner in known else f"items of type {inner!r}. Known: {', '.join(known)}"
        )
    return ""


def answer_problem(answers: Any, functions: Sequence[Function], category: str) -> str:
    """What is wrong with a row's ground truth; "" = nothing."""
    if not isinstance(answers, list) or not answers:
        return "no list of expected calls [{function: {parameter: [accepted values]}}]"
    names = [function["name"] for function in functions]
    for answer in answers:
        if not isinstance(answer, dict) or len(answer) != 1:
            return f"{answer!r:.80} is no object with one function name"
        name, parameters = next(iter(answer.items()))
        if name not in names:
            return f"{name!r} is not among the functions ({', '.join(names)})"
        if not isinstance(parameters, dict) or not all(isinstance(one, list) for one in parameters.values()):
            return f"{name}: every parameter needs a list of accepted values"
    return _category_problem(answers, functions[0]["name"], category)


def _category_problem(answers: Sequence[Answer], first: str, category: str) -> str:
    """What in a ground truth the category's rule would not look at; "" = nothing."""
    remedy = "Name another category, or leave the column out: it then follows from the numbers of functions and calls"
    if "parallel" not in category and len(answers) > 1:
        return f"{len(answers)} expected calls, but category {category!r} expects one (parallel… several). {remedy}"
    named = next(iter(answers[0]))
    if "parallel" not in category and "multiple" not in category and named != first:
        rule = f"expects the first function, {first!r} (…multiple any of them)"
        return f"{named!r} is expected, but category {category!r} {rule}. {remedy}"
    return ""


def with_required(function: Mapping[str, Any]) -> Function:
    """A description that names its required parameters, if only as none."""
    parameters = function["parameters"]
    return function if "required" in parameters else {**function, "parameters": {**parameters, "required": []}}


# -- tools and right calls --------------------------------------------------------------------------------------------


def tool(function: Function, language: Language, underscores: bool) -> dict[str, Any]:
    """A description as an OpenAI-style tool with a JSON schema; Java's and JavaScript's arguments are texts.

    Source: bfcl-eval 2026.3.23, model_handler/utils.py, convert_to_tool, and utils.py for the other languages.
    """
    parameters, about = function["parameters"], str(function.get("description", ""))
    if language != "python":
        about += f" Arguments are {'Java' if language == 'java' else 'JavaScript'} source text."
    convert = _schema if language == "python" else _source_schema
    properties = {name: convert(spec) for name, spec in parameters["properties"].items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters["required"])}
    name = shown_name(function["name"], underscores)
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


def _schema(spec: Mapping[str, Any]) -> dict[str, Any]:
    schema = {**spec, "type": _OPENAPI.get(str(spec.get("type")), "string")}
    if isinstance(spec.get("properties"), dict):
        schema["properties"] = {
            name: _schema(inner) for name, inner in spec["properties"].items() if isinstance(inner, dict)
        }
    if isinstance(spec.get("items"), dict):
        schema["items"] = _schema(spec["items"])
    return schema


def _source_schema(spec: Mapping[str, Any]) -> dict[str, Any]:
    inner = f" of {spec['items']['type']}" if spec["type"] in INNER else ""
    about = f"{spec.get('description', '')} A literal of type {spec['type']}{inner}.".strip()
    return {"type": "string", "description": about}


def right_calls(
    functions: Sequence[Function], answers: Sequence[Answer], category: str, underscores: bool
) -> list[Call]:
    """Calls that the ground truth accepts: of every parameter the first value that passes, or none where it may lack.

    A few rows of the benchmark accept no call at all (an empty list of values, a parameter that is not described).
    """
    calls = []
    for answer in answers:
        function, accepted = described(functions, answer), accepted_of(answer)
        values = {name: _right_value(function, name, accepted, language_of(category)) for name in accepted}
        given = {name: value for name, (value, given) in values.items() if given}
        calls.append(Call(shown_name(function["name"], underscores), given))
    return calls


def _right_value(
    function: Function, name: str, accepted: Mapping[str, Sequence[Any]], language: Language
) -> tuple[Any, bool]:
    """(value, whether to give it)."""
    spec = function["parameters"]["properties"].get(name)
    for value in () if spec is None else sorted(accepted[name], key=lambda one: one == ""):
        if value == "" and name not in function["parameters"]["required"]:
            break
        plain = _plain(value, spec["type"])
        if language != "python":
            inner = spec["items"]["type"] if spec["type"] in INNER else None
            plain = to_source(plain, spec["type"], inner, language)
        if check_argument(function, name, plain, accepted, language) is None:
            return plain, True
    return None, False


def _plain(value: Any, kind: str) -> Any:
    """One accepted value as it would be given: dicts hold accepted values of their own, one level deep."""
    if isinstance(value, dict) and kind in ("dict", "HashMap"):
        return _plain_dict(value)
    if isinstance(value, list):
        return [_plain_dict(one) if isinstance(one, dict) else one for one in value]
    return value


def _plain_dict(value: Mapping[str, Any]) -> dict[str, Any]:
    first = {
        key: next((one for one in known if one != ""), "") for key, known in value.items() if isinstance(known, list)
    }
    left = {key: one for key, one in value.items() if key not in first}  # not as the benchmark writes it: as it is
    return {key: one for key, one in first.items() if one != "" or "" not in value[key] or value[key] == [""]} | left


def calls_json(calls: Sequence[Call]) -> str:
    """Calls as a JSON list of {name, arguments}: xLAM's form, and that of `prompting: text`."""
    return json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls])
