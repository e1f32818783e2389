"""Java and JavaScript literals: which texts are literals of a type, and what they are worth.

The tables are the behaviour of bfcl-eval 2026.3.23. Where a line looks odd, so is the verdict of the benchmark.
tests/bfcl_parity.py compares whole verdicts with those of the benchmark.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from lib.tasks._functions_check import Call
from lib.tasks._functions_java import read as read_java
from lib.tasks._functions_javascript import read as read_javascript
from lib.tasks._functions_parse import parse
from lib.tasks._functions_source import INNER, TYPES, SourceError, from_source, to_source

TOO_LONG = "1" * 4_301
"""More digits than Python converts to a whole number; as a float it is infinite."""


def same(found: Any, expected: Any) -> bool:
    """Equal in value and in the types of all parts: 1, 1.0 and True differ."""
    return repr(found) == repr(expected)


NUMBERS = [
    # (language, types, text, value): a text that is no number of its type stays as it is
    ("java", "byte short integer", "12", 12),
    ("java", "byte short integer", "-12", -12),
    ("java", "byte short integer", "007", 7),
    ("java", "byte short integer", "300000", 300000),  # no type has bounds
    ("java", "byte short integer", "٣", 3),  # digits of any script
    ("java", "byte short integer", "12\n", 12),  # one line break may follow
    ("java", "byte short integer", "12\n\n", "12\n\n"),
    ("java", "byte short integer", " 12", " 12"),
    ("java", "byte short integer", "+12", "+12"),
    ("java", "byte short integer", "--12", "--12"),
    ("java", "byte short integer", "12.0", "12.0"),
    ("java", "byte short integer", "1_000", "1_000"),
    ("java", "byte short integer", "²", "²"),
    ("java", "byte short integer", "", ""),
    ("java", "byte short integer", "-", "-"),
    ("java", "long", "5L", 5),
    ("java", "long", "-5l", -5),
    ("java", "long", "5L\n", 5),
    ("java", "long", "5", "5"),
    ("java", "long", "L", "L"),
    ("java", "long", "5LL", "5LL"),
    ("java", "long", "5.0L", "5.0L"),
    ("java", "float", "1.5f", 1.5),
    ("java", "float", "-2F", -2.0),
    ("java", "float", "2e3f", 2000.0),
    ("java", "float", "1.5E-1F\n", 0.15),
    ("java", "float", "1.5", "1.5"),
    ("java", "float", "f", "f"),
    ("java", "double", "1.5", 1.5),
    ("java", "double", "3", 3.0),
    ("java", "double", "1e+2", 100.0),
    ("java", "double", "-1.5E2\n", -150.0),
    ("java", "double", "1e999", math.inf),
    ("java", "double", TOO_LONG, math.inf),
    ("java", "double", "1.5f", "1.5f"),
    ("java", "double", ".5", ".5"),
    ("java", "double", "5.", "5."),
    ("java", "double", "1.2.3", "1.2.3"),
    ("java", "double", "1e", "1e"),
    ("java", "double", "1e+", "1e+"),
    ("java", "double", "1e+-2", "1e+-2"),
    ("java", "double", "1e2e3", "1e2e3"),
    ("java", "double", "1e2.5", "1e2.5"),
    ("java", "double", "inf", "inf"),
    ("java", "double", "NaN", "NaN"),
    ("javascript", "integer", "-12\n", -12),
    ("javascript", "integer", "12.0", "12.0"),
    ("javascript", "integer", "12n", "12n"),
    ("javascript", "float", "1.5", 1.5),
    ("javascript", "float", "3\n", 3.0),
    ("javascript", "float", "1e5", "1e5"),  # without exponents
    ("javascript", "float", ".5", ".5"),
    ("javascript", "Bigint", "-12n", -12),
    ("javascript", "Bigint", "12", "12"),
    ("javascript", "Bigint", "12nn", "12nn"),
    ("javascript", "Bigint", "n", "n"),
]

WORDS = [
    ("java", "boolean", "true", True),
    ("java", "boolean", "false", False),
    ("java", "boolean", "True", "True"),
    ("java", "boolean", "true\n", "true\n"),
    ("javascript", "Boolean", "false", False),
    ("javascript", "Boolean", " true", " true"),
    ("java", "char String any", '"a"', '"a"'),  # quotes stay
    ("java", "char String any", "'a'", "'a'"),
    ("java", "char String any", "5L", "5L"),
    ("javascript", "any", "'a'", "'a'"),
    ("javascript", "String", "'a'", "a"),
    ("javascript", "String", '"a\'b"', "a'b"),
    ("javascript", "String", "'a\"", "'a\""),
    ("javascript", "String", "'", ""),  # one mark is the first and the last
    ("javascript", "String", "a", "a"),
    ("javascript", "String", " 'a'", " 'a'"),
    ("javascript", "String", "`a`", "`a`"),
]

JAVA_LISTS = [
    # (type, type of the elements, text, value)
    ("Array", "integer", "new int[]{1, 2}", [1, 2]),
    ("Array", "integer", "x = new  int[] { 1,2 };", [1, 2]),  # found anywhere
    ("Array", "integer", "new int[]{1,,  ,2,}", [1, 2]),  # what is blank is left out
    ("Array", "integer", "new int[]{}", []),
    ("Array", "integer", "new int[]{1, x, 2.5}", [1, "x", "2.5"]),
    ("Array", "integer", "new é_1[]{1}", [1]),
    ("Array", "integer", "newint[]{1}", "newint[]{1}"),
    ("Array", "integer", "new []{1}", "new []{1}"),
    ("Array", "integer", "new int []{1}", "new int []{1}"),
    ("Array", "integer", "new int[2]{1}", "new int[2]{1}"),
    ("Array", "integer", "new int[]{1", "new int[]{1"),
    ("Array", "integer", "new int[]{1,\n2}", "new int[]{1,\n2}"),  # no line break inside
    ("Array", "integer", "new int[]{\n new int[]\n{1}", [1]),  # then the next one is tried
    ("Array", "integer", "{1, 2}", "{1, 2}"),
    ("Array", "String", 'new String[]{"a", "b"}', ['"a"', '"b"']),  # quotes stay, in contrast to ArrayList
    ("Array", "String", 'new String[]{"a,b"}', ['"a', 'b"']),  # a comma counts in quotes, too
    ("Array", "String", 'new String[]{"a}b"}', ['"a']),
    ("Array", "Array", "new int[]{new int[]{1}}", ["new int[]{1"]),
    ("Array", "ArrayList", "new X[]{new ArrayList<>(Arrays.asList(5L))}", [[5]]),  # elements of no type: by their form
    ("Array", "HashMap", "new X[]{new HashMap<>()}", [{}]),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList(1, 2))", [1, 2]),
    ("ArrayList", "integer", "new ArrayList<Integer>(Arrays.asList(1,,2))", [1, "", 2]),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList(1, 2)", "new ArrayList<>(Arrays.asList(1, 2)"),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList())", "new ArrayList<>(Arrays.asList())"),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList())))", [")"]),  # one character at least
    ("ArrayList", "integer", "new ArrayList<>( Arrays.asList(1))", "new ArrayList<>( Arrays.asList(1))"),
    ("ArrayList", "integer", "new ArrayList<int[]>(Arrays.asList(1))", "new ArrayList<int[]>(Arrays.asList(1))"),
    ("ArrayList", "integer", "new ArrayList<A<B>>()", "new ArrayList<A<B>>()"),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList(1,\n2))", "new ArrayList<>(Arrays.asList(1,\n2))"),
    ("ArrayList", "integer", "new ArrayList<>(Arrays.asList(\nnew ArrayList<>(Arrays.asList(3))", [3]),
    ("ArrayList", "integer", "Arrays.asList(1, 2)", "Arrays.asList(1, 2)"),
    ("ArrayList", "String", "new ArrayList<>(Arrays.asList(\"a\", 'b'))", ["a", "b"]),
    ("ArrayList", "String", "new ArrayList<>(Arrays.asList(name, 1, x))", ["am", "", ""]),  # whatever the ends are
    ("ArrayList", "char", "new ArrayList<>(Arrays.asList('a', 'b'))", ["a", "b"]),
    ("ArrayList", "any", 'new ArrayList<>(Arrays.asList("a", 1))', ['"a"', "1"]),
    ("ArrayList", "long", "new ArrayList<Long>() {{ add(1L); add(2L); }}", [1, 2]),
    ("ArrayList", "long", "new ArrayList<Long>()\n{{\nadd(1L);\n\nadd(\n2L);\n}}", [1]),
    ("ArrayList", "long", "new ArrayList<>(){{add(1L)}}", [1]),
    ("ArrayList", "long", "new ArrayList<>() {{ }}", []),
    ("ArrayList", "long", "new ArrayList<>() {{ }} add(1L) }}", [1]),  # one character at least, that is no blank
    ("ArrayList", "long", "new ArrayList<>() {{ add(1L);", []),
    ("ArrayList", "long", "new ArrayList<>() {{ add(); add(2L); }}", ["); add(2L"]),
    ("ArrayList", "long", "new ArrayList<>() {{ add(add(1L)); }}", ["add(1L"]),
    ("ArrayList", "long", "new ArrayList<>()", []),
    ("ArrayList", "long", "new ArrayList<>() { add(1L); }", []),
    ("ArrayList", "long", "new ArrayList<>().add(new ArrayList<>(Arrays.asList(1L)))", [1]),  # asList goes before all
    ("ArrayList", "long", "new ArrayList<>", "new ArrayList<>"),
    ("ArrayList", "String", 'new ArrayList<>() {{ add("a, b"); add(c); }}', ["a, b", ""]),
    ("ArrayList", "Array", "new ArrayList<>() {{ add(new int[]{1, 2}); }}", [[1, 2]]),
]

JAVA_MAPS = [
    ('new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); }}', {"a": 1, "b": "x"}),
    ('new HashMap<>(){{put("a",true);put("b",5L);put("c",1.5f);}}', {"a": True, "b": 5, "c": 1.5}),
    ('new HashMap<>() { put("a", 1); }', {"a": 1}),  # one brace is enough
    ('new HashMap <>() { put("a", 1); }', 'new HashMap <>() { put("a", 1); }'),
    ('new HashMap<Map<A, List<B>>> ( ) { put("a", 1); }', 'new HashMap<Map<A, List<B>>> ( ) { put("a", 1); }'),
    ('new HashMap<A, List<B>> () { put("a", 1); }', {"a": 1}),
    ('new HashMap<\nA>()\n{\n{\nput("a",\n1);\n}\n}', {"a": 1}),
    ('new HashMap<>() {{ put("a", 1); put("a", 2); }}', {"a": 2}),
    ('new HashMap<>() {{ put("a", name); put("b", 1e3); put("c", 1_0); }}', {"a": "name", "b": 1000.0, "c": 10}),
    ('new HashMap<>() {{ put("a", "x)"); }}', {"a": '"x'}),  # a bracket counts in quotes, too
    ('new HashMap<>() {{ put("a", "x}"); put("b", 1); }}', {}),
    ('new HashMap<>() {{ put("a", new HashMap<>() {{ put("b", 1); }}); }}', {"a": "new HashMap<>(", "b": 1}),
    ('new HashMap<>() {{ put("a", put("b", 1)); }}', {"a": 'put("b", 1'}),
    ('new HashMap<>() {{ put( "a", 1); put("b" , 2); put("c", 3); }}', {'b" , 2); put("c': 3}),
    ('new HashMap<>() {{ put("a", 1\n); put("b", 2); }}', {"b": 2}),
    ('new HashMap<>() {{ put("a\n", 1); put("b", 2); }}', {"b": 2}),
    ('new HashMap<>() {{ put("a", "b",\n 1); }}', {'a", "b': 1}),
    ('new HashMap<>() {{ put("a", ); }}', {"a": ""}),
    ("new HashMap<>() {{ put('a', 1); }}", {}),
    ('new HashMap<>() {{ put("a", 1); ', {}),
    ("new HashMap<String, Object>()", {}),
    ("x = new\tHashMap<A<B>> ();", {}),
    ("new HashMap<\n>()", "new HashMap<\n>()"),
    ("new HashMap<\n new HashMap<>()", {}),
    ("new HashMap<>", "new HashMap<>"),
    ("Map.of()", "Map.of()"),
    ("userMap", "userMap"),
]

JS_ARRAYS = [
    ("integer", "[1, 2]", [1, 2]),
    ("integer", "[1, 2.5, x]", [1, "2.5", "x"]),
    ("integer", " [1]; ", [1]),  # whatever follows
    ("integer", "x = [1]", "x = [1]"),
    ("integer", "[]", []),
    ("integer", "[ ]", []),
    ("integer", "[1,,2,]", [1, "", 2, ""]),
    ("integer", "[1", "[1"),
    ("integer", "[1,\n2]", "[1,\n2]"),
    ("integer", " [1,\n2] ", "[1,\n2]"),  # a text loses the white space around it
    ("integer", "new Array(1, 2)", [1, 2]),
    ("integer", "new\nArray()", []),
    ("integer", "new Array (1)", "new Array (1)"),
    ("integer", "newArray(1)", "newArray(1)"),
    ("integer", "new Array(f(1), 2)", ["f(1"]),
    ("String", "['a', \"b\", c]", ["a", "b", "c"]),
    ("String", "['a,b', 'c]d']", ["'a", "b'", "'c"]),
    ("any", "['a']", ["'a'"]),
    ("Boolean", "[true, 1]", [True, "1"]),
    ("float", "[1, 1.5]", [1.0, 1.5]),
    ("Bigint", "[1n, 2]", [1, "2"]),
    ("integer", f"[1, {TOO_LONG}]", f"[1, {TOO_LONG}]"),
    ("dict", "[{a: 1}, {}]", [{"a": 1}, {}]),
    ("dict", "[{a: 1, b: 2}]", ["{a: 1", "b: 2}"]),
    ("array", "[[1], ['a']]", [[1], ["a"]]),
    # arrays in an array: elements say by their form what they are, whatever their type
    ("String", "[[1, 2.5, '3', x, true], [ ]]", [[1, 2.5, "3", "x", True], [""]]),
    ("String", "[ [1]\n,\n[2] ] and more", [[1], [2]]),
    ("String", "new Array([1], [2])", [[1], [2]]),
    ("String", "new Array( [1]", "new Array( [1]"),
    ("integer", "[[1], 2]", ["[1"]),
    ("integer", "[[1], 2, [3]]", [[1], [3]]),
    ("integer", "[[1]", ["[1"]),
    ("integer", "[[1], [2]", ["[1"]),
    ("integer", "[[1\n], [2]]", "[[1\n], [2]]"),
    ("integer", "[\n[1], [2]]", [[1], [2]]),
    ("integer", "[[[1]]]", [["[1"]]),
    ("integer", "[[1]] ]", [[1]]),
    ("integer", "[[1]x], [2]]", [[1], [2]]),
    ("integer", "1", "1"),
]

JS_DICTS = [
    ("{a: 1, 'b': [true, 'x'], \"c\": null}", {"a": 1, "b": [True, "x"], "c": "null"}),
    ("{}", {}),
    ("{ }", {}),
    ("  {a: 'x'}; ", {"a": "x"}),
    ("{a: 1.5, b: \"'2'\"}", {"a": 1.5, "b": 2}),  # quotes go before a number is looked for
    ("{a: '', b: }", {"a": "", "b": ""}),
    ("{a: 1, a: 2}", {"a": 2}),
    ("{a: x, y, b: 1}", {"a": "x, y", "b": 1}),  # a comma that no key follows belongs to the value
    ("{a: 'x, y: z'}", {"a": "x", "y": "z"}),
    ("{a: [1, 2], b: [[1], [2]]}", {"a": [1, 2], "b": [[1], [2]]}),
    ("{a: [1, 2}", {"a": "[1, 2"}),
    ("{a: {b: 1}, c: 2}", {"a": "{b: 1"}),  # up to the first closing brace
    ("{a: http://x}", {"a": "http://x"}),
    ("{a: 1, b::2}", {"a": 1, "b": ":2"}),
    ("{:a: 1}", {"a": 1}),
    ("{a: 1,:b}", {"a": "1,:b"}),
    ("{a: 1, :b}", {"a": 1, "": "b"}),
    ("{a}", {}),
    ("{a, b: 1}", {"a, b": 1}),
    ("{a: 1", "{a: 1"),
    ("{a: 1,\nb: 2}", "{a: 1,\nb: 2}"),
    (" {a: 1,\nb: 2} ", "{a: 1,\nb: 2}"),
    ("x", "x"),
]

BY_FORM = [
    # (language, text, value) of an element whose type is not known
    ("java", "true", True),
    ("java", '"5"', "5"),
    ("java", "'5'", "'5'"),
    ("java", '"', ""),
    ("java", "5L", 5),
    ("java", "5f", 5.0),
    ("java", "5", 5),
    ("java", "+5", 5),  # what Python converts
    ("java", "1_000", 1000),
    ("java", ".5", 0.5),
    ("java", "-inf", -math.inf),
    ("java", TOO_LONG, math.inf),
    ("java", "null", "null"),
    ("javascript", "false", False),
    ("javascript", "'5'", "5"),
    ("javascript", '"5"', "5"),
    ("javascript", "5n", "5n"),
    ("javascript", "5L", "5L"),
    ("javascript", "1e3", 1000.0),
    ("javascript", "undefined", "undefined"),
]


@pytest.mark.parametrize(("language", "kinds", "text", "value"), NUMBERS + WORDS)
def test_a_plain_literal_is_read_by_its_type(language: str, kinds: str, text: str, value: Any) -> None:
    for kind in kinds.split():
        assert same(from_source(text, kind, None, language), value), kind


@pytest.mark.parametrize(("kind", "nested", "text", "value"), JAVA_LISTS)
def test_a_java_list_is_read_by_the_type_of_its_elements(kind: str, nested: str, text: str, value: Any) -> None:
    assert same(from_source(text, kind, nested, "java"), value)


@pytest.mark.parametrize(("text", "value"), JAVA_MAPS)
def test_a_java_map_is_read_by_the_form_of_its_values(text: str, value: Any) -> None:
    assert same(from_source(text, "HashMap", None, "java"), value)


@pytest.mark.parametrize(("nested", "text", "value"), JS_ARRAYS)
def test_a_javascript_array_is_read_by_the_type_of_its_elements(nested: str, text: str, value: Any) -> None:
    assert same(from_source(text, "array", nested, "javascript"), value)


@pytest.mark.parametrize(("text", "value"), JS_DICTS)
def test_a_javascript_object_is_read_by_the_form_of_its_values(text: str, value: Any) -> None:
    assert same(from_source(text, "dict", None, "javascript"), value)


@pytest.mark.parametrize(("language", "text", "value"), BY_FORM)
def test_an_element_without_a_type_says_by_its_form_what_it_is(language: str, text: str, value: Any) -> None:
    whole, kind = (f"new X[]{{{text}}}", "Array") if language == "java" else (f"[{text}]", "array")
    assert same(from_source(whole, kind, None, language), [value])


@pytest.mark.parametrize(
    ("value", "kind", "nested", "language"),
    [
        (5, "integer", None, "java"),
        (None, "any", None, "javascript"),
        ([1], "array", "integer", "javascript"),
        (TOO_LONG, "integer", None, "java"),
        (TOO_LONG, "integer", None, "javascript"),
        (f"{TOO_LONG}L", "long", None, "java"),
        (f"new int[]{{{TOO_LONG}}}", "Array", "integer", "java"),
        (f'new HashMap<>() {{{{ put("a", {TOO_LONG}L); }}}}', "HashMap", None, "java"),
        ("5n\n", "Bigint", None, "javascript"),
    ],
)
def test_what_makes_the_official_reader_raise_is_no_source(value: Any, kind: str, nested: Any, language: str) -> None:
    with pytest.raises(SourceError):
        from_source(value, kind, nested, language)


def test_every_type_has_a_reader() -> None:
    for language, read in (("java", read_java), ("javascript", read_javascript)):
        for kind in TYPES[language]:
            for nested in (None, *TYPES[language]) if kind in INNER else (None,):
                assert read("", kind, nested) == ""


@pytest.mark.parametrize(
    ("language", "kind", "nested", "value"),
    [
        ("java", "boolean", None, True),
        ("java", "long", None, -7),
        ("java", "float", None, 1.5),
        ("java", "double", None, 1e30),
        ("java", "Array", "integer", [1, 2]),
        ("java", "ArrayList", "String", ["a b", "c"]),
        ("java", "ArrayList", "boolean", []),
        ("java", "HashMap", None, {"a": 1, "b": "x", "c": True}),
        ("java", "HashMap", None, {}),
        ("javascript", "Bigint", None, 12),
        ("javascript", "String", None, "a b"),
        ("javascript", "array", "float", [1.5, 2.0]),
        ("javascript", "array", "String", ["a", "b"]),
        ("javascript", "array", "any", [[1, 2], [3]]),
        ("javascript", "dict", None, {"a": 1, "b": ["x", True], "c": "y"}),
    ],
)
def test_a_value_is_written_as_a_literal_that_is_read_back(language: str, kind: str, nested: Any, value: Any) -> None:
    assert same(from_source(to_source(value, kind, nested, language), kind, nested, language), value)


LONG = 50_000


def long_of(unit: str, before: str = "", after: str = "") -> str:
    return before + unit * (LONG // len(unit)) + after


HARD: list[tuple[str, str, str]] = [
    (language, kind, text)
    for language, kinds in TYPES.items()
    for kind in kinds
    for text in (long_of("1"), long_of(" "), long_of("new "), long_of('"'))
]
"""(language, type, a text that patterns divide in many ways); the official reader takes from seconds to years."""
HARD += [
    ("java", "Array", long_of(unit, "", after))
    for unit in ("new a[]{", "new a[]{\n", "new a[]", "new a[]   {", "new a[]{1,")
    for after in ("", "}")
]
HARD += [
    ("java", "ArrayList", long_of(unit, "", after))
    for unit in ("new ArrayList<", "new ArrayList<>(Arrays.asList(", "new ArrayList<>(Arrays.asList(\n")
    for after in ("", "))")
]
HARD += [
    ("java", "ArrayList", long_of(unit, "new ArrayList<>() {{", ")}}"))
    for unit in ("add(", "add(\n", "add(1)", "\n", "new ArrayList<>() {{ ")
]
HARD += [
    ("java", "HashMap", long_of(unit, "new HashMap<", after))
    for unit in (">", "> ", ">() ", "\n", "> ()\n", "new HashMap<", "new HashMap<\n", ">() {", ">() {     ")
    for after in ("", ">()")
]
HARD += [
    ("java", "HashMap", long_of(unit, "new HashMap<>() {", after))
    for unit in ('put("', 'put("a', 'put("a",', 'put("a",\n', 'put("a", 1\n', 'put("a", 1);', '",')
    for after in ("}", "\n)}")
]
HARD += [
    ("javascript", "array", long_of(unit, before, after))
    for unit in ("[", "]", "[]", "],[", "], ", "]\n,", "],\n[", "[1],", "1,", "] ,   [")
    for before in ("[[", "new Array([")
    for after in ("", "]]", "])", "\n]]")
]
HARD += [
    ("javascript", "dict", long_of(unit, "{", "}"))
    for unit in (":", ",", "a:", "a:1,", "a,", ", ", ": ", "a:,:", "{", "[1],", ",  :")
]


@pytest.mark.parametrize(("language", "kind"), [(language, kind) for language in TYPES for kind in TYPES[language]])
def test_no_text_of_its_length_takes_long_to_read(language: str, kind: str) -> None:
    for text in (text for *type_, text in HARD if type_ == [language, kind]):
        started = time.process_time()
        try:
            from_source(text, kind, "String" if kind in INNER else None, language)
        except SourceError:
            assert text.startswith("1"), "no number with too many digits"
        assert time.process_time() - started < 1.5, f"{text[:40]!r}…{text[-10:]!r}"


def test_calls_inside_each_other_are_read_once_each() -> None:
    inner: Any = 1
    for _ in range(25):
        inner = {"f": {"a": inner}}
    started = time.process_time()
    parsed = parse({"role": "assistant", "content": "f(a=" * 26 + "1" + ")" * 26})
    assert parsed.calls == [Call("f", {"a": inner})]
    assert time.process_time() - started < 1
