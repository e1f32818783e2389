"""Code from chatty answers: which block counts, fences of every kind, thinking parts, and hostile text."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from lib import PROJECT_ROOT, extract
from lib.extract import LONGEST, Extracted, extract_program
from lib.extract import fenced as fenced_answer

F = "def f(x):\n    return x + 3\n"
G = "def g(x):\n    return x\n"
DOCSTRING = 'def f(x):\n    """Adds three.\n\n```\nf(1)\n```\n    """\n    return x + 3\n'


def found(answer: str, *names: str) -> Extracted:
    return extract_program(answer, names or ("f",))


def fenced(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}{fence}\n"


# -- one block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["```", "````", "``````", "~~~", "~~~~"])
@pytest.mark.parametrize("info", ["python", "py", "Python", "PYTHON3", "", " python", "python title=a.py", "{.python}"])
def test_fences_of_any_length_and_kind_and_any_way_to_say_python(fence: str, info: str) -> None:
    answer = f"Sure, here it is:\n\n{fenced(F, info, fence)}\nIt adds `3`."
    assert found(answer).source == F.rstrip("\n")
    assert found(answer).found == "fenced"


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_other_line_ends_are_line_ends(ending: str) -> None:
    assert found(fenced(F).replace("\n", ending)).source == F.rstrip("\n")


def test_a_block_in_a_list_loses_the_indentation_of_its_fence() -> None:
    answer = "1. Write it:\n\n   ```python\n   def f(x):\n       return x + 3\n   ```\n2. Done."
    assert found(answer).source == F.rstrip("\n")
    deep = "        ```python\n        def f(x):\n            return x + 3\n\n        ```"
    assert found(deep).source == F


def test_a_shorter_fence_does_not_close_a_longer_one() -> None:
    code = "def f(x):\n```\n    return x + 3\n"
    assert found(fenced(code, fence="````")).source == code.rstrip("\n")


@pytest.mark.parametrize("info", ["javascript", "bash", "c", "json", "text", "pycon", "diff", "rust"])
def test_a_block_in_another_language_is_no_program(info: str) -> None:
    got = found(fenced(F, info))
    assert got.source is None and got.problem == "no Python that defines `f`"


def test_an_inline_span_is_no_fence() -> None:
    assert found("Use ```def f(x): return x``` as you like.").source is None


# -- which block ------------------------------------------------------------------------------------------------------


def test_of_several_blocks_the_last_that_defines_an_entry_point_counts() -> None:
    first, second = F, F.replace("3", "4")
    usage = "print(f(2))\n"
    answer = fenced(first) + "Better:\n" + fenced(second) + "Use it:\n" + fenced(usage)
    assert found(answer).source == second.rstrip("\n")


def test_a_block_that_defines_more_of_the_names_goes_before_a_later_one() -> None:
    assert found(fenced(F + G) + fenced(F), "f", "g").source == (F + G).rstrip("\n")


def test_a_complete_block_goes_before_an_unclosed_one() -> None:
    answer = fenced(F) + "or\n```python\n" + F.replace("3", "9")
    assert found(answer).source == F.rstrip("\n")
    assert found(answer).found == "fenced"


def test_an_unclosed_block_counts_where_there_is_no_other() -> None:
    got = found("Here:\n```python\n" + F)
    assert got.source == F and got.found == "unclosed" and not got.tidy


def test_a_block_that_another_block_follows_without_a_closing_fence_is_unclosed() -> None:
    answer = "```python\n" + F + "```python\n" + F.replace("3", "4") + "```\n"
    got = found(answer)
    assert got.source == F.replace("3", "4").rstrip("\n") and got.found == "fenced"
    assert found("```python\n" + F + "```python\n" + G + "```\n").found == "unclosed"


@pytest.mark.parametrize(
    "code",
    [
        "async def f(x):\n    return x",
        "class f:\n    pass",
        "f = lambda x: x + 3",
        "f: Callable[[int], int] = lambda x: x + 3",
        "import math\n\nf = math.floor",
        "def  f (x):\n    return x",
        "@cache\ndef f(x):\n    return x",
    ],
)
def test_functions_classes_and_assignments_define_a_name(code: str) -> None:
    assert found(fenced(code + "\n")).source == code


@pytest.mark.parametrize(
    "code",
    [
        "def ff(x):\n    return x",
        "class A:\n    def f(self): ...",
        "f == 3",
        "f(3)",
        "import f",
        "# def f(x):",
        "fx = 1",
    ],
)
def test_other_names_methods_calls_and_comparisons_do_not(code: str) -> None:
    assert found(fenced(code + "\n")).source is None


def test_a_name_is_taken_literally() -> None:
    assert found(fenced("def aXb(): pass\n"), "a.b").source is None


# -- fences in strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quote", ['"""', "'''"])
def test_a_fence_in_a_docstring_does_not_close_the_block(quote: str) -> None:
    code = DOCSTRING.replace('"""', quote)
    assert found(f"Here:\n{fenced(code)}Done.").source == code.rstrip("\n")


@pytest.mark.parametrize(
    "line",
    [
        '    a = \'"""\'  # three quotes in a short string',
        '    # don\'t: """ in a comment',
        "    a = 'it\\'s \"\"\"'",
        '    a = """one line"""',
        "    a = ''",
        '    a = """a \\""" b"""',
        '    a = "it\'s"',
    ],
)
def test_quotes_that_open_no_long_string_leave_the_fence_in_force(line: str) -> None:
    code = f"def f(x):\n{line}\n    return x + 3\n"
    assert found(fenced(code) + "\n'''\n```\n").source == code.rstrip("\n")


def test_where_a_string_never_ends_the_first_fence_closes() -> None:
    code = 'def f(x):\n    """Adds three.\n    return x + 3\n'
    assert found(fenced(code) + "Explanation.").source == code.rstrip("\n")
    assert found(fenced(code) + fenced(F)).source == F.rstrip("\n")


# -- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", ["<think>", ""])
def test_what_was_thought_is_not_the_answer(opening: str) -> None:
    thought = f"{opening}Maybe\n{fenced(F.replace('3', '9'))}no, and an open ```python\n</think>"
    assert found(thought + fenced(F)).source == F.rstrip("\n")
    assert found(thought).source is None


def test_an_unfinished_thought_hides_what_it_holds() -> None:
    assert found("<think>\n" + fenced(F)).source is None
    assert found(fenced(F) + "<think>again:\n" + fenced(G)).source == F.rstrip("\n")


def test_a_second_thought_is_left_out_too() -> None:
    answer = "<think>a</think>" + fenced(F) + "<think>" + fenced(F.replace("3", "4")) + "</think>done"
    assert found(answer).source == F.rstrip("\n")


# -- no fence ---------------------------------------------------------------------------------------------------------


def test_a_bare_program_is_a_program() -> None:
    got = found(F)
    assert got.source == F and got.found == "bare" and not got.tidy


def test_prose_before_and_after_bare_code_is_left_out() -> None:
    code = (
        "import math\nfrom typing import Any\n\nLIMIT = 3\n\n\n@cache\ndef f(x):\n    # adds\n\n    return x + LIMIT\n"
    )
    answer = f"Here is the function:\n\n{code}\nThis function adds three. If you want, call it.\n"
    assert found(answer).source == code
    assert found(f"Note: I think that this works.\nFor example, take 3.\n{F}Hope it helps!").source == F


def test_a_long_string_in_bare_code_may_hold_prose() -> None:
    code = 'def f(x):\n    """\nAdds three to a number.\n    """\n    return x + 3\n'
    assert found(f"Well, {'x'}:\n{code}\nThat is all.").source == code


@pytest.mark.parametrize("answer", ["", "   \n", "I cannot.", "No: it is impossible.", "Return x plus three from f."])
def test_an_answer_without_code_has_no_program(answer: str) -> None:
    assert found(answer).source is None
    assert found(answer).problem


# -- programs that print ----------------------------------------------------------------------------------------------


def test_without_entry_points_the_last_block_that_prints_counts() -> None:
    program = "n = int(input())\nprint(n + 3)\n"
    answer = fenced(program) + "Output:\n" + fenced("8\n", info="") + "Run it: \n" + fenced("python a.py\n", "bash")
    assert extract_program(answer).source == program.rstrip("\n")
    assert extract_program(fenced("import sys\nsys.stdout.write('3')\n")).source is not None
    assert extract_program("It is 8.").problem == "no Python that prints anything"


# -- tidy answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "tidy"),
    [
        (fenced(F), True),
        ("Sure:\n" + fenced(F) + "Done.", True),
        ("<think>" + fenced(G) + "</think>" + fenced(F), True),
        (fenced(F, info=""), False),
        (fenced(F) + fenced("f(2)\n"), False),
        ("```python\n" + F, False),
        (F, False),
    ],
)
def test_one_closed_block_marked_as_python_is_tidy(answer: str, tidy: bool) -> None:
    got = found(answer)
    assert got.source is not None and got.tidy is tidy


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (fenced("def f(x):\n    return '\0'\n"), "the program holds a null byte"),
        (fenced("def f(x):\n    return '\ud800'\n"), "the program holds half of a surrogate pair"),
        ("x" * (LONGEST + 1), f"the answer is longer than {LONGEST} characters"),
        ("x" * 10_000_000, f"the answer is longer than {LONGEST} characters"),
    ],
)
def test_what_no_file_could_hold_is_no_program(answer: str, problem: str) -> None:
    assert found(answer) == Extracted(None, "none", problem)


@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "<think>a</think>",
        "```python\n",
        "```\n'''\n",
        "```python\n'''\n```\n",
        "~~~\n```\n",
        "`" * 3,
        "`",
        "'''\n",
        "\\'",
        "f[a]",
        "f[a][b]=",
        "a.",
        "(" * 100,
        "f: ",
        "f:a",
        " ",
        "\n",
        "@",
        "def f",
        "return ",
        "if a",
        "from a.b ",
        "import a.",
        "x: int, ",
    ],
    ids=repr,
)
@pytest.mark.parametrize("head", ["def f(x):\n", "```python\n"])
def test_no_text_takes_long(head: str, unit: str) -> None:
    started = time.process_time()
    extract_program(head + unit * ((LONGEST - len(head)) // len(unit)), ("f",))
    assert time.process_time() - started < 5


def test_the_example_in_the_module_runs() -> None:
    line = re.search(r"^    (python -c .*)$", extract.__doc__ or "", re.MULTILINE)
    assert line
    command = line[1].replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", command], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "f = abs", done.stderr


@pytest.mark.parametrize("source", [F, DOCSTRING, "def f(x):\n    return '````'", "f = abs"])
def test_a_fenced_program_is_found_again(source: str) -> None:
    got = found("Well:\n" + fenced_answer(source) + "\nDone.")
    assert got.source == source.rstrip("\n") and got.tidy
