"""The official BFCL verdict on calls, re-stated: counts, names, required parameters, types, values.

The verdicts are those of bfcl-eval 2026.3.23, quirks included: both judge 20,000 mutations in tests/bfcl_parity.py.
Where the official checker raises, the verdict here is a fail.
Must not know rows, prompts, or how calls are written in an answer.

    python -c "from lib.tasks._functions_check import standard; print(standard('April 1, 2024'))"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lib.tasks._functions_source import TYPES, SourceError, from_source

Language = Literal["python", "java", "javascript"]
Function = Mapping[str, Any]
"""A function's description as BFCL writes it: name, description, parameters {properties, required}."""
Answer = Mapping[str, Mapping[str, Sequence[Any]]]
"""{function name: {parameter: [accepted values]}}; "" among the accepted values = may be left out."""

PYTHON: dict[str, type] = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "float": float,
    "any": str,
    "dict": dict,
    **dict.fromkeys(("array", "tuple"), list),
}
_SPELLING = str.maketrans("'", '"', " ,./-_*^")
"""What does not count in a text: the kind of quotation mark, and these characters at all."""


class Call(NamedTuple):
    """One call as the policy made it."""

    name: str
    arguments: dict[str, Any]


class Problem(NamedTuple):
    """Why a call fails: the official error type, and a sentence."""

    kind: str
    text: str


def language_of(category: str) -> Language:
    """The language in whose syntax a category's arguments are written."""
    if "javascript" in category:
        return "javascript"
    return "java" if "java" in category else "python"


def shown_name(name: str, underscores: bool) -> str:
    """A function's name as the policy sees it: OpenAI-style tool names have no dots."""
    return name.replace(".", "_") if underscores else name


def known_types(language: Language) -> Mapping[str, type]:
    """The parameter types that the checker knows, and the Python type of their values."""
    return PYTHON if language == "python" else TYPES[language]


def check(
    functions: Sequence[Function], calls: Sequence[Call], answers: Sequence[Answer], category: str, underscores: bool
) -> Problem | None:
    """The verdict on all calls of an answer: None = right.

    `underscores`: the policy was shown names with their dots replaced (`shown_name`). Categories named "parallel…" take
    the calls in any order, "…multiple" choose among several functions, all others expect one call of the first.
    """
    language = language_of(category)
    if "parallel" in category:
        return _in_any_order(functions, calls, answers, language, underscores)
    several = "multiple" in category
    if len(calls) != (len(answers) if several else 1):
        kind = "multiple_function_checker" if several else "simple_function_checker"
        return Problem(f"{kind}:wrong_count", f"{len(calls)} calls, {len(answers)} expected")
    function = described(functions, answers[0]) if several else functions[0]
    return check_call(function, calls[0], accepted_of(answers[0]), language, underscores)


def described(functions: Sequence[Function], answer: Answer) -> Function:
    """The description of the function that an answer names; the rows are checked to have one."""
    name = next(iter(answer))
    return next(function for function in functions if function["name"] == name)


def accepted_of(answer: Answer) -> Mapping[str, Sequence[Any]]:
    """The accepted values of every parameter."""
    return next(iter(answer.values()))


def _in_any_order(
    functions: Sequence[Function], calls: Sequence[Call], answers: Sequence[Answer], language: Language, dots: bool
) -> Problem | None:
    """Each expected call takes the first call left that fits it: greedy, as the official checker does."""
    kind = "parallel_function_checker_no_order"
    if len(calls) != len(answers):
        return Problem(f"{kind}:wrong_count", f"{len(calls)} calls, {len(answers)} expected")
    left = list(calls)
    for answer in answers:
        function, accepted = described(functions, answer), accepted_of(answer)
        fitting = (i for i, call in enumerate(left) if not check_call(function, call, accepted, language, dots))
        found = next(fitting, None)
        if found is None:
            return Problem(f"{kind}:cannot_find_match", f"no call fits {function['name']}")
        del left[found]
    return None


def check_call(
    function: Function, call: Call, accepted: Mapping[str, Sequence[Any]], language: Language, underscores: bool
) -> Problem | None:
    """The first thing that is wrong with one call; None = right."""
    return next(_call_problems(function, call, accepted, language, underscores), None)


def _call_problems(
    function: Function, call: Call, accepted: Mapping[str, Sequence[Any]], language: Language, underscores: bool
) -> Iterator[Problem]:
    """In the official order: the name, what is missing, what is given, what may not be left out."""
    kind = "simple_function_checker"
    name, given = shown_name(function["name"], underscores), call.arguments
    if call.name != name:
        yield Problem(f"{kind}:wrong_func_name", f"{call.name!r:.80} called, {name!r} expected")
    for missing in (one for one in function["parameters"]["required"] if one not in given):
        yield Problem(f"{kind}:missing_required", f"required parameter {missing!r} is missing")
    checks = (check_argument(function, one, value, accepted, language) for one, value in given.items())
    yield from (found for found in checks if found)
    for left_out in (one for one, values in accepted.items() if one not in given and "" not in values):
        yield Problem(f"{kind}:missing_optional", f"parameter {left_out!r} may not be left out")


def check_argument(
    function: Function, parameter: str, value: Any, accepted: Mapping[str, Sequence[Any]], language: Language
) -> Problem | None:
    """What is wrong with the value of one parameter; None = accepted."""
    spec = function["parameters"]["properties"].get(parameter)
    if spec is None or parameter not in accepted:
        return Problem("simple_function_checker:unexpected_param", f"unexpected parameter {parameter!r:.80}")
    kind = spec["type"]
    expected = known_types(language)[kind]
    nested = spec["items"]["type"] if expected is list else None
    inner = None if nested is None else known_types(language)[nested]
    try:
        value = _converted(value, kind, nested, language)
    except SourceError:
        return Problem("type_error:" + ("js" if language == "javascript" else "java"), f"{parameter}: not {kind}")
    except OverflowError:
        return Problem("type_error:simple", f"{parameter}: no float is that big")
    values = accepted[parameter]
    type_problem, variable = _type_problem(value, values, expected, inner)
    if type_problem:
        return Problem(type_problem, f"{parameter} is a {type(value).__name__}, {kind} expected")
    value_problem = _value_problem(value, values, expected, inner, variable)
    return Problem(value_problem, f"{parameter}: {value!r:.80} is not accepted") if value_problem else None


def _converted(value: Any, kind: str, nested: str | None, language: Language) -> Any:
    if language != "python":
        return from_source(value, kind, nested, language)
    if kind == "tuple" and type(value) is tuple:
        return list(value)
    return float(value) if kind == "float" and type(value) is int else value


def _type_problem(value: Any, values: Sequence[Any], expected: type, inner: type | None) -> tuple[str, bool]:
    """("" or the error type, whether the value counts as a variable and is compared as it is).

    A value of another type than described is accepted as a variable where the first accepted value has that type.
    """
    first = _first_type(values)
    if type(value) is expected:
        if inner is None or any(_elements_fit(value, accepted, inner) for accepted in values):
            return "", first is not None and first is not expected
        return ("type_error:nested" if type(value) is first else "type_error:simple"), False
    return ("", True) if first is not None and type(value) is first else ("type_error:simple", False)


def _first_type(values: Sequence[Any]) -> type | None:
    return next((type(accepted) for accepted in values if accepted != ""), None)


def _elements_fit(value: Any, accepted: Any, inner: type) -> bool:
    """One level deep; what is accepted and no list ("" for one) lets every element pass, as in the official checker."""
    if type(accepted) is not list:
        return True
    first = _first_type(accepted)
    return all(type(element) is inner or (first is not None and type(element) is first) for element in value)


def _value_problem(value: Any, values: Sequence[Any], expected: type, inner: type | None, variable: bool) -> str:
    """ "" or the error type."""
    if variable or expected not in (dict, list, str):
        return "" if value in values else "value_error:others"
    if expected is dict:
        return _dict_problem(value, values)
    if inner is dict:
        return _dicts_problem(value, values)
    if expected is str:
        known = [standard(accepted) for accepted in values if type(accepted) is str]
        return "" if standard(value) in known else "value_error:string"
    lists = [_standard_elements(accepted) for accepted in values]
    return "" if None not in lists and _standard_elements(value) in lists else "value_error:list/tuple"


def standard(text: str) -> str:
    """A text as it is compared: without space and , . / - _ * ^, in lower case, ' as "."""
    return text.lower().translate(_SPELLING)


def _standard_elements(values: Any) -> list[Any] | None:
    """A list (or, as officially, the characters of a text) with its texts standardised; None = it is neither."""
    if not isinstance(values, (list, str)):
        return None
    return [standard(value) if type(value) is str else value for value in values]


def _dict_problem(value: Mapping[str, Any], values: Sequence[Any]) -> str:
    problem = "dict_checker:unclear"
    for accepted in values:
        if accepted == "":
            continue
        if not isinstance(accepted, dict):
            return "dict_checker:unclear"  # the official checker raises
        problem = _one_dict_problem(value, accepted)
        if not problem:
            return ""
    return problem


def _one_dict_problem(value: Mapping[str, Any], accepted: Mapping[str, Any]) -> str:
    """One level deep: {key: [accepted values]}; what lies below is compared as it is."""
    absent = (known for key, known in accepted.items() if key not in value)
    if not all(isinstance(known, (list, str)) and "" in known for known in absent):
        return "value_error:dict_key"
    problems = (_member_problem(given, accepted, key) for key, given in value.items())
    return next(filter(None, problems), "")


def _member_problem(given: Any, accepted: Mapping[str, Any], key: str) -> str:
    if key not in accepted:
        return "value_error:dict_key"
    known = _standard_elements(accepted[key])
    plain = standard(given) if type(given) is str else given
    return "value_error:dict_value" if known is None or plain not in known else ""


def _dicts_problem(value: Sequence[Any], values: Sequence[Any]) -> str:
    """Lists of dicts: the same length and order. An empty list equals "", as in the official checker."""
    problem = "list_dict_checker:unclear"
    for accepted in values:
        if isinstance(accepted, (list, str)) and len(value) != len(accepted):
            problem = "value_error:list_dict_count"
            continue
        if not isinstance(accepted, (list, str)) or not all(isinstance(one, dict) for one in value):
            return "list_dict_checker:unclear"  # the official checker raises
        pairs = zip(value, accepted, strict=True)
        problem = next((found for one, expected in pairs if (found := _dict_problem(one, [expected]))), "")
        if not problem:
            return ""
    return problem
