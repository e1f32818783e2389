"""The task `functions`: its rows, the verdict, the ways in which models write calls, and what must never crash it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, running_hub

from lib import PROJECT_ROOT
from lib.config import load_config
from lib.data import Where
from lib.generate import Chat, batched, local_sample, scripted
from lib.rollout import attempt, collect
from lib.task import Message, Rollout, Row, Score, TaskError, Turn, load_task
from lib.tasks._functions_check import Call, check, standard
from lib.tasks._functions_files import bfcl_files
from lib.tasks._functions_grade import Grade, grade
from lib.tasks._functions_parse import Parsed, parse
from lib.tasks._functions_rows import right_calls, tool
from lib.tasks._functions_source import SourceError, from_source, to_source
from lib.tasks.functions import Functions

OWN = "configs/examples/functions.jsonl"


def function(name: str = "f", required: tuple[str, ...] = ("x",), **kinds: Any) -> dict[str, Any]:
    """A description; a kind is a type's name, or (type, type of the elements)."""
    properties = {
        key: {"type": kind} if isinstance(kind, str) else {"type": kind[0], "items": {"type": kind[1]}}
        for key, kind in kinds.items()
    }
    return {"name": name, "description": "", "parameters": {"properties": properties, "required": list(required)}}


def verdict(kind: Any, accepted: list[Any], value: Any, category: str = "simple") -> str:
    """ "" or the error type of f(x=value)."""
    found = check([function(x=kind)], [Call("f", {"x": value})], [{"f": {"x": accepted}}], category, underscores=False)
    return "" if found is None else found.kind


def row_of(category: str = "simple", **changes: Any) -> Row:
    """A row about math.f(x) with the right value 1, and a second function g."""
    record = {
        "id": "r",
        "question": "f of 1?",
        "function": [function("math.f", x="integer"), function("g", (), y="string")],
        "ground_truth": [{"math.f": {"x": [1]}}],
        "category": category,
    }
    row = Functions().row({**record, **changes}, Where("test", "1"))
    assert row is not None
    return row


async def scored(row: Row, answer: str | Message, **params: Any) -> Score:
    return await Functions(**params).score(Rollout.of(row, answer))


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


# -- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "accepted", "value", "expected"),
    [
        ("integer", [1], 1, ""),
        ("integer", [1], 1.0, "type_error:simple"),
        ("integer", [1], True, "type_error:simple"),
        ("integer", [1], "1", "type_error:simple"),
        ("integer", [1], 2, "value_error:others"),
        ("float", [1.0], 1, ""),  # an int passes as a float, at the top only
        ("float", [2.5], 10**400, "type_error:simple"),
        ("boolean", [True], 1, "type_error:simple"),
        ("string", ["April 1, 2024"], "april 1,2024", ""),
        ("string", ["it's"], 'IT"S', ""),
        ("string", ["a b", "c"], "b a", "value_error:string"),
        ("string", ["x"], None, "type_error:simple"),
        ("any", ["x"], "X", ""),
        ("any", [5], 5, ""),  # another type than described, but that of the accepted value: compared as it is
        ("integer", ["n"], "n", ""),
        ("integer", ["n"], "N", "value_error:others"),
        (("array", "integer"), [[1, 2]], [1, 2], ""),
        (("array", "integer"), [[1, 2]], [2, 1], "value_error:list/tuple"),
        (("array", "float"), [[1.5, 2.0]], [1.5, 2], "type_error:nested"),
        (("array", "float"), [[1, 2]], [1, 2], ""),
        (("array", "string"), [["New York"]], ["new-york"], ""),
        (("array", "integer"), [[1, 2]], (1, 2), "type_error:simple"),
        (("tuple", "integer"), [[1, 2]], (1, 2), ""),
        (("tuple", "integer"), [[1, 2]], [1, 2], ""),
        ("dict", [{"a": [1], "b": ["x", ""]}], {"a": 1}, ""),
        ("dict", [{"a": [1]}], {"a": 1, "c": 2}, "value_error:dict_key"),
        ("dict", [{"a": [1], "b": ["x"]}], {"a": 1}, "value_error:dict_key"),
        ("dict", [{"a": ["Big Ben"]}], {"a": "bigben"}, ""),
        ("dict", [{"a": [1]}], {"a": 2}, "value_error:dict_value"),
        ("dict", [{"a": [{"b": 1}]}], {"a": {"b": 1}}, ""),
        (("array", "dict"), [[{"a": [1]}, {"a": [2]}]], [{"a": 1}, {"a": 2}], ""),
        (("array", "dict"), [[{"a": [1]}, {"a": [2]}]], [{"a": 2}, {"a": 1}], "value_error:dict_value"),
        (("array", "dict"), [[{"a": [1]}]], [{"a": 1}, {"a": 1}], "value_error:list_dict_count"),
        (("array", "dict"), ["", [{"a": [1]}]], ["no dict"], "list_dict_checker:unclear"),  # officially raises
    ],
)
def test_a_value_has_the_official_verdict(kind: Any, accepted: list[Any], value: Any, expected: str) -> None:
    assert verdict(kind, accepted, value) == expected


def test_names_and_parameters_are_those_of_the_description_and_of_the_answer() -> None:
    about, answers = [function(x="integer", y="string", z="string")], [{"f": {"x": [1], "y": ["", "a"]}}]

    def kind(name: str, **arguments: Any) -> str:
        found = check(about, [Call(name, arguments)], answers, "simple", underscores=False)
        return found.kind.partition(":")[2] if found else ""

    assert kind("f", x=1) == kind("f", x=1, y="a") == ""
    assert kind("F", x=1) == "wrong_func_name"
    assert kind("f", y="a") == "missing_required"
    assert kind("f", x=1, w=1) == "unexpected_param"
    assert kind("f", x=1, z="described, but not in the answer") == "unexpected_param"
    optional = check(about, [Call("f", {"x": 1})], [{"f": {"x": [1], "y": ["a"]}}], "simple", underscores=False)
    assert optional is not None and optional.kind == "simple_function_checker:missing_optional"


def test_dots_in_names_are_underscores_where_the_policy_saw_them_so() -> None:
    about, answers = [function("a.b", x="integer")], [{"a.b": {"x": [1]}}]
    for shown, other, underscores in (("a_b", "a.b", True), ("a.b", "a_b", False)):
        assert check(about, [Call(shown, {"x": 1})], answers, "simple", underscores) is None
        assert check(about, [Call(other, {"x": 1})], answers, "simple", underscores) is not None


def test_parallel_calls_come_in_any_order_and_each_counts_once() -> None:
    about = [function("f", x="integer"), function("g", x="integer")]
    answers = [{"f": {"x": [1]}}, {"f": {"x": [1, 2]}}, {"g": {"x": [3]}}]
    right = [Call("g", {"x": 3}), Call("f", {"x": 1}), Call("f", {"x": 2})]
    assert check(about, right, answers, "parallel_multiple", underscores=False) is None
    twice = [right[0], right[0], right[1]]
    assert "cannot_find_match" in str(check(about, twice, answers, "parallel_multiple", underscores=False))
    assert "wrong_count" in str(check(about, right[:2], answers, "parallel_multiple", underscores=False))


def test_matching_is_greedy_as_in_the_official_checker() -> None:
    answers = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]  # the first takes f(1), and nothing is left for the second
    calls = [Call("f", {"x": 1}), Call("f", {"x": 2})]
    assert check([function(x="integer")], calls, answers, "parallel", underscores=False) is not None
    assert check([function(x="integer")], calls[::-1], answers, "parallel", underscores=False) is None


def test_a_text_is_compared_without_its_spelling() -> None:
    assert standard(" A,b./-_*^'C ") == 'ab"c'
    assert standard("a\nb!") == "a\nb!"  # other white space and punctuation count


@pytest.mark.parametrize(
    ("text", "kind", "nested", "language", "value"),
    [
        ("5L", "long", None, "java", 5),
        ("5", "long", None, "java", "5"),
        ("1.5f", "float", None, "java", 1.5),
        ("true", "boolean", None, "java", True),
        ("new int[]{1, 2}", "Array", "integer", "java", [1, 2]),
        ('new ArrayList<>(Arrays.asList("a", "b"))', "ArrayList", "String", "java", ["a", "b"]),
        ("new ArrayList<Long>() {{ add(1L); add(2L); }}", "ArrayList", "long", "java", [1, 2]),
        (
            'new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); }}',
            "HashMap",
            None,
            "java",
            {"a": 1, "b": "x"},
        ),
        ("new HashMap<>()", "HashMap", None, "java", {}),
        ("userMap", "HashMap", None, "java", "userMap"),
        ("12n", "Bigint", None, "javascript", 12),
        ("'a'", "String", None, "javascript", "a"),
        ("[1, 2.5]", "array", "float", "javascript", [1.0, 2.5]),
        ("new Array('a', 'b')", "array", "String", "javascript", ["a", "b"]),
        ("[[1, 2], [3]]", "array", "any", "javascript", [[1, 2], [3]]),
        ("{a: 1, 'b': [true, 'x']}", "dict", None, "javascript", {"a": 1, "b": [True, "x"]}),
    ],
)
def test_java_and_javascript_literals_are_read_by_their_type(
    text: str, kind: str, nested: str | None, language: str, value: Any
) -> None:
    assert from_source(text, kind, nested, language) == value
    assert from_source(to_source(value, kind, nested, language), kind, nested, language) == value


def test_java_arguments_that_are_no_text_fail() -> None:
    assert verdict("integer", [5], 5, "simple_java") == "type_error:java"
    assert verdict("integer", [5], "5", "simple_java") == ""
    assert verdict("integer", [5], "5", "simple_javascript") == ""


@pytest.mark.parametrize(
    ("text", "kind", "language"),
    [
        (
            ("new HashMap<>() {" + " " * 60) * 50,
            "HashMap",
            "java",
        ),  # minutes with the patterns as they stand officially
        ("new HashMap<" + ">() {" * 700, "HashMap", "java"),
        ("new ArrayList<>() {{ " * 190, "ArrayList", "java"),
        ("[[a" + "],[a" * 11, "array", "javascript"),
        ("{a:" + (", " + " " * 60) * 60 + "}", "dict", "javascript"),
    ],
)
def test_no_literal_takes_long_to_read(text: str, kind: str, language: str) -> None:
    started = time.process_time()
    from_source(text, kind, "String", language)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", [5, None])
def test_what_is_no_text_is_no_literal(text: Any) -> None:
    with pytest.raises(SourceError):
        from_source(text, "array", "String", "javascript")


# -- partial credit ---------------------------------------------------------------------------------------------------


def test_partial_credit_is_ordered_and_below_an_exact_answer() -> None:
    about, answers = [function("f", ("x", "y"), x="integer", y="string")], [{"f": {"x": [1], "y": ["a"]}}]

    def credit(*calls: Call) -> float:
        return grade(about, calls, answers, "simple", underscores=False)[1]

    nothing, wrong_name = credit(), credit(Call("g", {"x": 1, "y": "a"}))
    name_only, half = credit(Call("f", {})), credit(Call("f", {"x": 1}))
    wrong_type, wrong_value = credit(Call("f", {"x": 1, "y": 2})), credit(Call("f", {"x": 1, "y": "b"}))
    twice = credit(*[Call("f", {"x": 1, "y": "a"})] * 2)
    assert nothing == wrong_name == 0 < name_only < half < wrong_value < 1
    assert wrong_type < wrong_value and twice < wrong_value + 0.1
    assert all(value <= 0.9 for value in (name_only, half, wrong_type, wrong_value, twice))


async def test_a_graded_reward_is_one_only_for_an_exact_answer() -> None:
    row = row_of("multiple")
    right = await scored(row, hermes(("math_f", {"x": 1})), reward="graded")
    near = await scored(row, hermes(("math_f", {"x": 2})), reward="graded")
    assert right.reward == 1.0 and right.parts["solved"] == 1.0
    assert near.reward is not None and 0.5 < near.reward < 1 and near.parts["solved"] == 0.0
    assert near.parts == {"solved": 0.0, "well_formed": 1.0, **Grade(1.0, 1.0, 1.0, 0.0)._asdict()}
    assert (await scored(row, hermes(("math_f", {"x": 2})))).reward == 0.0


async def test_calls_beyond_four_times_the_expected_ones_count_only_as_too_many() -> None:
    row = row_of("parallel", ground_truth=[{"math.f": {"x": [number]}} for number in range(8)])
    many = json.dumps([{"name": "math_f", "arguments": {"x": 99}}] * 22_000)
    started = time.process_time()
    score = await scored(row, many, reward="graded")
    assert time.process_time() - started < 0.8
    assert score.parts["name"] == 1.0 and score.reward is not None and 0 < score.reward < 0.001
    right = [Call("math_f", {"x": number}) for number in range(8)]
    wrong = [Call("math_f", {"x": 99})] * 32
    first, last = (
        grade(row["function"], calls, row["ground_truth"], "parallel", underscores=True)
        for calls in ([*right, *wrong], [*wrong, *right])
    )
    assert first[1] == pytest.approx(8 / 40) and last[1] == pytest.approx(0.75 * 8 / 40)


# -- reading answers --------------------------------------------------------------------------------------------------

ONE = [Call("f", {"x": 1})]
TWO = [*ONE, Call("g", {"y": ["a", {"b": None}]})]
TWO_JSON = '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": ["a", {"b": null}]}}]'


@pytest.mark.parametrize(
    ("content", "calls"),
    [
        (hermes(("f", {"x": 1})), ONE),
        (f"Let me look.\n{hermes(*TWO)}\nDone.", TWO),
        (f"<think>f(x=2)? No.</think>\n\n{hermes(*TWO)}", TWO),
        (TWO_JSON, TWO),
        (f"```json\n{TWO_JSON}\n```", TWO),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', ONE),
        ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}<|eom_id|>', ONE),
        ('{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"y": ["a", {"b": null}]}}', TWO),
        ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>', ONE),
        (
            "<|channel|>analysis<|message|>to=functions.g?<|end|><|start|>assistant to=functions.f<|channel|>"
            'commentary json<|message|>{"x": 1}<|call|>',
            ONE,
        ),
        ("[f(x=1), g(y=['a', {'b': None}])]", TWO),
        ("f(x=1)", ONE),
        ("a.b.f(x=-1.5, y=(1, 2), z=True)", [Call("a.b.f", {"x": -1.5, "y": (1, 2), "z": True})]),
        ("f(x=2*3+1, y=name)", [Call("f", {"x": 7, "y": "name"})]),
        ("f(x=exit(1), y=g(z=1))", [Call("f", {"x": "exit(1)", "y": {"g": {"z": 1}}})]),  # nothing is run
        ("[]", []),
        ("[{}]", []),
    ],
)
def test_calls_are_read_in_every_way_that_models_write_them(content: str, calls: list[Call]) -> None:
    assert parse({"role": "assistant", "content": content}) == Parsed(calls)


CODER = """<tool_call>
<function=f>
<parameter=x>
1
</parameter>
<parameter=y>
two
lines
</parameter>
</function>
</tool_call>"""


def test_qwen_coders_calls_are_read_with_the_types_of_the_tools() -> None:
    tools = [tool(function(x="integer", y="string"), "python", True)]
    assert parse({"content": CODER}, tools) == Parsed([Call("f", {"x": 1, "y": "two\nlines"})])
    assert parse({"content": CODER}) == Parsed([Call("f", {"x": "1", "y": "two\nlines"})])
    assert parse({"content": CODER.replace("</function>", "")}, tools).calls is None
    assert parse({"content": CODER.replace("</parameter>\n</f", "</f")}, tools).calls is None


def test_the_messages_own_tool_calls_go_before_its_text() -> None:
    function_call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert parse({"content": hermes(("g", {})), "tool_calls": [function_call]}).calls == ONE
    assert parse({"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}).calls == ONE


@pytest.mark.parametrize(
    "content",
    [
        "",
        "It is sunny.",
        'I would call [{"name": "f", "arguments": {}}].',
        "<think>f(x=1)",
        '<tool_call>{"name": "f", "arguments": {"x": 1}}',
        '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>',
        f'{hermes(("f", {"x": 1}))}<tool_call>{{"name": "f"}}</tool_call>',
        '{"name": "f", "arguments": [1]}',
        '{"name": 5, "arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": ' + "9" * 10_000 + "}}",
        '{"name": "f", "arguments": {"x": [' + "9" * 2_000 + "]}}",
        "[f(x=0x" + "f" * 5_000 + ")]",
        "[f(x={'a': [-0x" + "f" * 5_000 + "]})]",
        "[f(x={0x" + "f" * 5_000 + ": 1})]",
        "[f(x=g(0x" + "f" * 5_000 + "))]",
        "[1, 2]",
        "f(x=9**9**9)",
        "f(x='a'*10**9)",
        "f(x=1/0)",
        "f(x=[i for i in y])",
        "f(x=lambda: 0)",
        "f(x=b'1')",
        "f(**{'x': 1})",
        "f(x=1",
    ],
)
def test_what_is_no_call_or_a_broken_one_is_not_decoded(content: str) -> None:
    found = parse({"role": "assistant", "content": content})
    assert found.calls is None and found.problem


async def test_a_number_too_long_to_be_written_down_earns_nothing_and_is_scored() -> None:
    for argument in ("0x" + "f" * 5_000, "[0x" + "f" * 5_000 + "]", "9" * 1_300):
        done = await attempt(Functions(), row_of("multiple"), scripted(f"[math_f(x={argument})]"))
        assert done.score.reward == 0.0 and "whole number" in done.score.notes["problem"]
    digits = {"role": "assistant", "tool_calls": [{"function": {"name": "math_f", "arguments": {"x": 1 << 4_000}}}]}
    assert "whole number" in (await scored(row_of("multiple"), digits)).notes["problem"]
    assert parse({"content": f"f(x={2**3_999})"}).calls == [Call("f", {"x": 2**3_999})]


NESTED = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "f", "arguments": {"x": ' + NESTED + "}}",
        "[" * 1_000_000,
        '{"name": "f", "arguments": {"x": ' + "[" * 500 + "]" * 500 + "}}",
        f"f(x={NESTED})",
        "f(x=" + "-" * 40_000 + "1)",
        "f(x=" + "1+" * 20_000 + "1)",
        "f" + ".f" * 20_000 + "(x=1)",
        'f(x="a\\' * 9_000,
        "<tool_call>" * 100_000,
        "<tool_call><function=f>" + "<parameter=x>" * 50_000 + "</function></tool_call>",
        "<think>" * 100_000,
        "<|channel|>" * 50_000 + "<|message|>" * 50_000,
        '{"name": "f", "arguments": {"x": ' + "1" * 1_000_000,
    ],
    ids=lambda content: content[:12],
)
async def test_deep_and_long_rubbish_earns_nothing_and_takes_no_time(content: str) -> None:
    started = time.process_time()
    score = await scored(row_of(), content)
    assert score.reward == 0.0 and score.parts["well_formed"] == 0.0
    assert time.process_time() - started < 2


@pytest.mark.parametrize("value", ["a" * 1_000_000, [1] * 300_000, {str(i): i for i in range(50_000)}, "\ud800", "\0"])
async def test_a_megabyte_of_arguments_is_graded_and_not_kept(value: Any) -> None:
    score = await scored(row_of(), hermes(("math_f", {"x": value})))
    assert score.reward == 0.0 and score.parts["well_formed"] == 1.0
    kept = json.dumps([score.notes, score.parts], allow_nan=False)
    assert len(kept) < 5_000 and kept.encode()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": [{"type": "text", "text": "f(x=1)"}]},
        {"role": "assistant", "tool_calls": [3]},
        {"role": "assistant", "tool_calls": [{"function": None}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": NESTED}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
    ],
)
async def test_a_message_of_another_form_is_a_wrong_answer_not_an_error(message: Message) -> None:
    assert (await scored(row_of(), message)).reward == 0.0


# -- scores -----------------------------------------------------------------------------------------------------------


async def test_the_verdict_of_each_expected_call_stands_in_the_notes() -> None:
    row = row_of("parallel", ground_truth=[{"math.f": {"x": [1]}}, {"math.f": {"x": [2]}}])
    score = await scored(row, hermes(("math_f", {"x": 1}), ("math_f", {"x": 3})))
    verdicts = score.notes["verdicts"]
    assert [verdicts[name]["verdict"] for name in ("math.f", "math.f 2")] == ["pass", "fail"]
    assert (
        "cannot_find_match" in verdicts["math.f 2"]["reasons"] and verdicts["math.f 2"]["text"] == 'math.f({"x": [2]})'
    )
    assert score.notes["calls"] == ['math_f({"x": 1})', 'math_f({"x": 3})']


async def test_irrelevance_wants_no_call_and_relevance_wants_one() -> None:
    nothing = row_of("irrelevance", ground_truth=None)
    for answer in ("", "I cannot do that.", "[]", "<tool_call>{</tool_call>"):
        assert (await scored(nothing, answer)).reward == 1.0
    for answer in (hermes(("math_f", {})), hermes(("unknown", {}))):
        assert (await scored(nothing, answer)).reward == 0.0
    some = row_of("live_relevance", ground_truth=None)
    assert (await scored(some, hermes(("unknown", {})))).reward == 1.0
    assert (await scored(some, "I cannot do that.")).reward == 0.0


@pytest.mark.parametrize("category", ["simple", "irrelevance", "live_relevance"])
async def test_an_answer_that_was_cut_off_fails_whatever_it_was_to_be(category: str) -> None:
    row = row_of(category)
    turn = Turn(message={"role": "assistant", "content": hermes(("math_f", {"x": 1}))}, stop="length")
    cut = Rollout(row=row, messages=(*row["prompt"], turn.message), turns=(turn,), stop="length")
    assert (await Functions().score(cut)).reward == 0.0


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_own_set_is_graded_from_easy_to_hard_and_its_gold_answers_are_exact() -> None:
    rows = [row for split in ("train", "eval") for row in Functions(path=OWN).rows(split)]  # type: ignore[arg-type]
    counts = Counter(row["category"] for row in rows)
    assert len(rows) >= 60 and set(counts) == {"simple", "multiple", "parallel", "parallel_multiple", "irrelevance"}
    assert all(row["gold"] for row in rows)


async def check_all(task: Functions) -> Counter[str]:
    """Every gold answer earns 1, every own cheat 0; the rows by category."""
    counts: Counter[str] = Counter()
    for row in task.rows("train"):
        counts[row["category"]] += 1
        best = await task.score(Rollout.of(row, *row["gold"]))
        assert best.reward == 1.0, (row["id"], best.notes)
        for name, cheat in task.cheats(row).items():
            assert (await task.score(Rollout.of(row, cheat))).reward == 0.0, (row["id"], name, cheat)
    return counts


@pytest.mark.parametrize("prompting", ["tools", "text"])
@pytest.mark.parametrize("path", [OWN, ""])
async def test_right_answers_of_the_shipped_rows_earn_one_and_cheats_nothing(path: str, prompting: Any) -> None:
    assert await check_all(Functions(path=path, prompting=prompting, split_ratio=1.0, generate_rows=300))


@pytest.mark.parametrize("prompting", ["tools", "text"])
async def test_right_answers_of_all_rows_of_the_benchmark_earn_one_and_cheats_nothing(
    shared: Path, prompting: Any
) -> None:
    task = Functions(path=str(shared / "data" / "bfcl"), prompting=prompting, split_ratio=1.0)
    counts = await check_all(task)
    four = {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200}
    assert counts == {**four, "irrelevance": 240}
    assert len(task.input_files()) == 9


def bfcl(folder: Path, category: str, rows: list[dict[str, Any]], answers: list[dict[str, Any]] | None) -> Path:
    def lines(some: list[dict[str, Any]]) -> str:
        return "\n".join(json.dumps(one) for one in some)

    folder.mkdir(exist_ok=True)
    (folder / f"BFCL_v4_{category}.json").write_text(lines(rows))
    if answers is not None:
        (folder / "possible_answer").mkdir(exist_ok=True)
        (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text(lines(answers))
    return folder


def question(number: int, category: str = "simple_python") -> dict[str, Any]:
    turn = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"f of {number}?"}]
    return {"id": f"{category}_{number}", "question": [turn], "function": [function("m.f", x="integer")]}


def truth(number: int, category: str = "simple_python") -> dict[str, Any]:
    return {"id": f"{category}_{number}", "ground_truth": [{"m.f": {"x": [number]}}]}


def test_answers_are_found_by_id_in_either_place(tmp_path: Path) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [truth(2), truth(1)])
    rows = Functions(path=str(folder), split_ratio=1.0).rows("train")
    assert [row["ground_truth"][0]["m.f"]["x"] for row in rows] == [[1], [2]]
    (folder / "possible_answer" / "BFCL_v4_simple_python.json").rename(folder / "answer_simple_python.json")
    assert list(Functions(path=str(folder), split_ratio=1.0).rows("train")) == list(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "simple_python_1"}, "line 1, ground_truth: no list of expected calls"),
        ({"id": "simple_python_1", "ground_truth": None}, "line 1, ground_truth: no list of expected calls"),
        ({"ground_truth": []}, "line 1, id: an answer needs the id of its question"),
        ({**truth(1), "id": ["x"]}, "line 1, id: an answer needs the id of its question"),
        ({**truth(1), "id": " "}, "line 1, id: an answer needs the id of its question"),
        ([1], "line 1: a list, not a JSON object"),
        (truth(2), r"line 2, id: 'simple_python_2' is also the id of line 1"),
    ],
)
def test_a_broken_line_of_answers_is_named_by_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [line, truth(2)])
    with pytest.raises(TaskError, match=rf"possible_answer/BFCL_v4_simple_python\.json, {message}"):
        Functions(path=str(folder), split_ratio=1.0).rows("train")


def test_all_broken_lines_of_answers_are_told_at_once(tmp_path: Path) -> None:
    lines = [{"id": "a"}, [1], truth(2), truth(2)]
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], lines)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="3 problems in the data"):
        Functions(path=str(folder)).rows("train")


def test_ids_that_are_numbers_find_their_answers_and_other_ones_are_reported(tmp_path: Path) -> None:
    questions = [{**question(1), "id": 1}, {**question(2), "id": "2 "}]
    folder = bfcl(tmp_path / "a", "simple_python", questions, [{**truth(1), "id": "1"}, {**truth(2), "id": 2}])
    assert [row["id"] for row in Functions(path=str(folder), split_ratio=1.0).rows("train")] == ["1", "2"]
    bfcl(folder, "simple_python", [{**question(1), "id": ["x"]}, question(2)], [truth(1), truth(2)])
    with pytest.raises(TaskError, match=r"line 1, id: \['x'\] is neither a text nor a whole number"):
        Functions(path=str(folder), split_ratio=1.0).rows("train")


def test_rows_that_accept_no_call_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = {"id": "simple_python_1", "ground_truth": [{"m.f": {"x": []}}]}
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [nothing, truth(2)])
    task = Functions(path=str(folder), split_ratio=1.0)
    with caplog.at_level(logging.WARNING):
        assert len(task.rows("train")) == 2 and len(task.rows("eval")) == 0
    told = [record.message for record in caplog.records]
    assert told == ["functions: rows that accept no call, so that no answer earns their reward: 1 (simple_python_1)"]


def test_a_missing_file_of_the_benchmark_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"BFCL_v4_simple_python\.json does not exist"):
        Functions(path=str(tmp_path / "BFCL_v4_simple_python.json")).input_files()


@pytest.mark.parametrize(
    ("functions", "answers", "category"),
    [(1, 1, "simple"), (2, 1, "multiple"), (1, 2, "parallel"), (2, 2, "parallel_multiple")],
)
async def test_the_category_of_a_row_without_one_follows_from_its_counts(
    functions: int, answers: int, category: str
) -> None:
    about = [function("g", (), y="string"), function("math.f", x="integer")][-functions:]
    truths = [{"math.f": {"x": [number]}} for number in range(answers)]
    for none in (None, ""):
        row = row_of(none, function=about, ground_truth=truths)  # type: ignore[arg-type]
        assert row["category"] == category
        assert (await scored(row, row["gold"][0])).reward == 1.0
        assert (await scored(row, hermes(("math_f", {"x": 0})))).reward == float(answers == 1)


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [truth(2)])
    bfcl(folder, "multiple", [question(1, "multiple")], None)
    with caplog.at_level(logging.WARNING):
        rows = Functions(path=str(folder), split_ratio=1.0).rows("train")
    assert [row["id"] for row in rows] == ["simple_python_2"]
    assert "no answers to BFCL_v4_multiple.json" in caplog.text and "2 of 3 rows left out" in caplog.text


def test_categories_choose_files_and_an_unknown_one_gets_the_nearest(tmp_path: Path) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [truth(1), truth(2)])
    bfcl(folder, "irrelevance", [question(1, "irrelevance")], None)
    bfcl(folder, "multi_turn_base", [question(1)], None)
    assert [category for category, *_ in bfcl_files(folder, ())] == ["irrelevance", "simple_python"]
    rows = Functions(path=str(folder), categories=("irrelevance",), split_ratio=1.0).rows("train")
    assert [row["category"] for row in rows] == ["irrelevance"]
    with pytest.raises(TaskError, match=r"no BFCL_v…_simple\.json in .* Did you mean 'simple_python'\?"):
        Functions(path=str(folder), categories=("simple",)).rows("train")


def test_one_file_of_the_benchmark_or_some_categories_of_a_table_can_be_named(tmp_path: Path) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [truth(1), truth(2)])
    bfcl(folder, "irrelevance", [question(1, "irrelevance")], None)
    rows = Functions(path=str(folder / "BFCL_v4_simple_python.json"), split_ratio=1.0).rows("train")
    assert [row["id"] for row in rows] == ["simple_python_1", "simple_python_2"]
    own = Functions(path=OWN, categories=("parallel",), split_ratio=1.0).rows("train")
    assert len(own) == 8 and {row["category"] for row in own} == {"parallel"}


def test_both_splits_hold_the_same_mixture_of_categories(shared: Path) -> None:
    rows = Functions(path=str(shared / "data" / "bfcl"), split_ratio=0.5).rows("eval")
    assert Counter(row["category"] for row in rows)["irrelevance"] == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "question: empty"),
        ({"question": 5}, "question: empty"),
        ({"function": "f"}, "function: no list of function descriptions"),
        ({"function": [{"name": "f"}]}, "function: a function without a name, or without parameters"),
        ({"function": [function(x="int")]}, "function: f, x: type 'int' is not known. Known: string, integer"),
        ({"function": [function(x="array")]}, "function: f, x: items of type None"),
        ({"function": [function(x="integer")] * 2}, "function: a function is described twice"),
        ({"ground_truth": []}, "ground_truth: no list of expected calls"),
        ({"ground_truth": [{"h": {}}]}, r"ground_truth: 'h' is not among the functions \(math\.f, g\)"),
        (
            {"function": [{"name": "f", "parameters": {"properties": {"x": {"type": ["string"]}}}}]},
            r"function: f, x: type \['string'\] is not known",
        ),
        ({"function": [function("f", (["x"],), x="integer")]}, r"function: f: `required` names \['x'\], which is not"),
        ({"function": [function("f", ("y",), x="integer")]}, "function: f: `required` names 'y', which is not"),
        ({"ground_truth": [{"g": {"y": ["a"]}}]}, r"ground_truth: 'g' is expected, but category 'simple' .* 'math\.f'"),
        ({"ground_truth": [{"math.f": {"x": [1]}}] * 2}, "ground_truth: 2 expected calls, but category 'simple' "),
        (
            {"category": "multiple", "ground_truth": [{"g": {}}] * 2},
            "ground_truth: 2 expected calls, but category 'mul",
        ),
        ({"ground_truth": [{"g": {"y": "a"}}]}, "ground_truth: g: every parameter needs a list of accepted values"),
    ],
)
def test_a_row_that_cannot_be_graded_is_reported_by_its_column(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        row_of(**change)


def test_tools_are_json_schemas_with_names_that_every_server_takes() -> None:
    row = row_of(
        function=[function("a.b", x="float", y=("tuple", "integer"), z="dict", w="any")], ground_truth=[{"a.b": {}}]
    )
    about = row["tools"][0]["function"]
    assert row["tools"][0]["type"] == "function" and about["name"] == "a_b"
    assert about["parameters"]["type"] == "object" and about["parameters"]["required"] == ["x"]
    types = {name: spec["type"] for name, spec in about["parameters"]["properties"].items()}
    assert types == {"x": "number", "y": "array", "z": "object", "w": "string"}
    assert about["parameters"]["properties"]["y"]["items"] == {"type": "integer"}


def test_java_tools_take_every_argument_as_text() -> None:
    schema = tool(function("f", x=("ArrayList", "String")), "java", True)["function"]["parameters"]["properties"]["x"]
    assert schema == {"type": "string", "description": "A literal of type ArrayList of String."}


def test_text_prompting_lists_the_functions_in_the_system_message_and_keeps_its_own(tmp_path: Path) -> None:
    folder = bfcl(tmp_path / "a", "simple_python", [question(1), question(2)], [truth(1), truth(2)])
    row = Functions(path=str(folder), prompting="text", split_ratio=1.0).rows("train")[0]
    system, user = row["prompt"]
    assert "tools" not in row and user["content"] == "f of 1?"
    assert '"name": "m.f"' in system["content"] and system["content"].endswith("Be brief.")
    assert row["gold"][0]["content"] == '[{"name": "m.f", "arguments": {"x": 1}}]'


def test_the_instructions_of_text_prompting_can_be_replaced_but_must_show_the_functions() -> None:
    task = Functions(prompting="text", instructions="{signatures}! As {json}.", generate_rows=300, split_ratio=1.0)
    row = next(
        row for row in task.rows("train") if row["function"][0]["name"] == "weather" and len(row["function"]) == 1
    )
    assert row["prompt"][0] == {"role": "system", "content": "weather(city, day)! As {json}."}
    with pytest.raises(TaskError, match=r"instructions must say where the functions go: write \{functions\}"):
        load_task("functions", instructions="Call something.")


def test_right_calls_take_the_first_value_that_passes() -> None:
    about = [function("f", ("x",), x="string", y="integer", z="dict", w=("array", "dict"))]
    answers = [{"f": {"x": ["", "a"], "y": ["", 1], "z": [{"k": ["", "v"], "l": [""]}], "w": [[{"a": [1, 2]}]]}}]
    (call,) = right_calls(about, answers, "simple", underscores=False)
    assert call.arguments["x"] == "a" and call.arguments["z"]["k"] == "v" and call.arguments["w"] == [{"a": 1}]
    assert check(about, [call], answers, "simple", underscores=False) is None


def test_a_row_that_accepts_no_call_has_no_gold_answer() -> None:
    assert "gold" not in row_of(ground_truth=[{"math.f": {"x": []}}])


def test_made_requests_are_all_different_and_demonstrations_are_mediocre() -> None:
    task = load_task("functions", generate_rows=1000)
    rows = [row for split in ("train", "eval") for row in task.rows(split)]  # type: ignore[arg-type]
    assert len({row["prompt"][-1]["content"] for row in rows}) == 1000
    right = sum(row["demonstration"] == row["gold"] for row in rows) / 1000
    assert 0.35 < right < 0.6
    with pytest.raises(TaskError, match=r"generate_rows 9999: there are \d+ different requests\. Give fewer"):
        load_task("functions", generate_rows=9999).rows("train")


HUB = """
import json, sys
from lib.task import load_task
task = load_task("functions", dataset="gorilla/bfcl", split_ratio=1.0, **json.loads(sys.argv[1]))
rows = [(row["id"], row["ground_truth"]) for row in task.rows("train")]
print(json.dumps({"rows": rows, "files": [[path.name, path.is_file()] for path in task.input_files()]}))
"""
HUB_FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "BFCL_v4_simple_python.json": "\n".join(json.dumps(question(n)) for n in (1, 2)).encode(),
    "answer_simple_python.json": "\n".join(json.dumps(truth(n)) for n in (1, 2)).encode(),
}


def from_hub(home: Path, files: dict[str, bytes], code: str = HUB, **params: Any) -> subprocess.CompletedProcess[str]:
    """What a process prints that reads the rows of a dataset on a Hub with these files."""
    with running_hub("gorilla/bfcl", files) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", HUB, json.dumps(params)]
        return subprocess.run(
            command, cwd=PROJECT_ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )


def test_the_benchmark_is_read_from_the_hub_and_its_files_are_inputs(tmp_path: Path) -> None:
    done = from_hub(tmp_path, HUB_FILES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"][1] == ["simple_python_2", [{"m.f": {"x": [2]}}]]
    assert found["files"] == [["BFCL_v4_simple_python.json", True], ["answer_simple_python.json", True]]


def test_a_revision_of_the_hubs_dataset_is_asked_for(tmp_path: Path) -> None:
    pinned = from_hub(tmp_path / "a", HUB_FILES, dataset_revision=COMMIT)
    assert pinned.returncode == 0 and len(json.loads(pinned.stdout)["rows"]) == 2, pinned.stderr
    other = from_hub(tmp_path / "b", HUB_FILES, dataset_revision="d" * 40)
    assert other.returncode == 1 and f"task.dataset gorilla/bfcl@{'d' * 40} cannot be loaded" in other.stderr


def test_a_dataset_without_the_benchmarks_files_is_one_table(tmp_path: Path) -> None:
    card = b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    table = "\n".join(json.dumps({**question(n), **truth(n)}) for n in (1, 2)).encode()
    params = {"dataset_config": "default", "dataset_revision": COMMIT}
    done = from_hub(tmp_path, {"README.md": card, "train.jsonl": table}, **params)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 2 and json.loads(done.stdout)["files"] == []


@pytest.mark.parametrize("params", [{"dataset_config": "simple"}, {"dataset_split": "test"}])
def test_what_names_no_part_of_the_benchmarks_files_is_refused(tmp_path: Path, params: dict[str, Any]) -> None:
    (name,) = params
    done = from_hub(tmp_path, HUB_FILES, **params)
    assert done.returncode == 1 and f"task.{name} ({params[name]}): " in done.stderr
    for source in ({"path": OWN}, {}):
        with pytest.raises(TaskError, match=rf"{name} \({params[name]}\) is read only with a dataset"):
            load_task("functions", **source, **params)
    with pytest.raises(TaskError, match=r"dataset_revision \(abc\) is read only with a dataset"):
        load_task("functions", dataset_revision="abc")


@pytest.mark.parametrize("name", ["functions", "functions_toy", "smoke/functions"])
def test_the_configs_of_the_task_load_and_have_rows_for_a_step(name: str) -> None:
    config = load_config(f"configs/{name}.yaml")
    task = load_task(config.task.name, **config.task.params)
    training = config.training
    assert len(task.rows("train")) >= training.batch * training.passes_per_generation // training.group_size
    assert len(task.rows("eval")) > 0


@pytest.mark.slow
def test_the_smoke_config_has_groups_to_learn_from(tmp_path: Path) -> None:
    """Of 40 steps on 400 rows the starter learned no right call: every reward was 0, and training changed nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.starter import build_starter

    torch.manual_seed(0)
    config = load_config("configs/smoke/functions.yaml")
    task = load_task(config.task.name, **config.task.params)
    rows = list(task.rows("train"))
    folder = build_starter(rows, tmp_path / "starter", steps=config.starter.steps)
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sample = local_sample(model, chat, config.evaluation, config.sampling.completion_limit, greedy=False)
    size = config.training.group_size
    asked = [row for row in rows[: 2 * config.training.batch // size] for _ in range(size)]
    rewards = [one.score.reward for one in collect(task, asked, batched(chat, sample))]
    groups = [set(rewards[start : start + size]) for start in range(0, len(rewards), size)]
    assert groups.count({0.0, 1.0}) >= 2, groups
