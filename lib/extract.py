"""The program in a chatty answer: the last complete block of Python that defines what the problem asks for.

Owns thinking parts, Markdown fences, unclosed blocks and answers without a fence. Must not know tasks, and never parses
or runs what it finds: model-written text is met by regular expressions and loops that are linear in its length.

    python -c "from lib.extract import extract_program, fenced; print(extract_program(fenced('f = abs'), ['f']).source)"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

LONGEST = 1_000_000  # characters of an answer; no policy is asked for so many, and a flood is not worth reading

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^\n]*)")
_INFO = re.compile(r"[ \t{.]*([\w+#-]*)")
_PYTHON = {"", "python", "py", "python3", "py3", "python2", "sage"}
_QUOTES = re.compile(r"""\\.|\"{3}|'{3}|["'#]""", re.DOTALL)
_SPEAKS = re.compile(r"\bprint\s*\(|\bsys\s*\.\s*stdout\b|\bos\s*\.\s*write\b")
_CODE_LINE = re.compile(
    r"""(?:\s | \#[ !] | \#$ | @\w | [)\]}'"] | $                                  # goes on, comment, decorator
        | (?:async\s+def|def|class)\s+\w+\s*[(:\[]                                # definition
        | import\s+[\w.]+(?:\s*,|\s+as\b|\s*$|\s*\#|\s*;) | from\s+[\w.]+\s+import\b
        | (?:if|elif|else|for|while|try|except|finally|with|match|case)\b[^\n]*:\s*(?:\#.*)?$
        | (?:return|raise|assert|global|del|pass)\b(?!\s+\w+\s+\w+\s+\w+)         # a statement, not a sentence
        | [A-Za-z_][\w.]*(?:\[[^\]\n]*\])*\s*(?:[-+*/%&|^@]|//|\*\*|>>|<<)?=(?!=)  # assignment
        | [A-Za-z_]\w*\s*:\s*[\w\[\], .|]+= | [A-Za-z_][\w.]*\( )""",
    re.VERBOSE,
)


class Extracted(NamedTuple):
    """What was found. `source` is None where there is no program; `problem` then says why."""

    source: str | None
    found: Literal["fenced", "unclosed", "bare", "none"]
    problem: str = ""
    tidy: bool = False
    """Exactly one fenced block, closed, marked as Python, and it is the program."""


class _Block(NamedTuple):
    language: str
    text: str
    closed: bool


def extract_program(answer: str, entry_points: Sequence[str] = ()) -> Extracted:
    """The program of an answer that should define `entry_points`; without any, one that prints.

    Complete blocks go before an unclosed one, those that define more of the names before others, later before earlier.
    """
    if len(answer) > LONGEST:
        return Extracted(None, "none", f"the answer is longer than {LONGEST} characters")
    answer = _without_thinking(answer.replace("\r\n", "\n").replace("\r", "\n"))
    if not answer.strip():
        return Extracted(None, "none", "no answer")
    blocks = _fenced_blocks(answer)
    wanted = _wanted(tuple(entry_points))
    for closed in (True, False):
        ranked = [
            (count, number)
            for number, block in enumerate(blocks)
            if block.closed == closed and block.language in _PYTHON and (count := _count(wanted, block.text))
        ]
        if ranked:
            block = blocks[max(ranked)[1]]
            tidy = closed and len(blocks) == 1 and block.language != ""
            return _checked(Extracted(block.text, "fenced" if closed else "unclosed", tidy=tidy))
    if not blocks and (bare := _bare_program(answer)) and _count(wanted, bare):
        return _checked(Extracted(bare, "bare"))
    names = " or ".join(f"`{name}`" for name in entry_points)
    return Extracted(None, "none", f"no Python that defines {names}" if names else "no Python that prints anything")


def fenced(source: str) -> str:
    """A program as an answer holds it: one block, marked as Python, with a fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`{3,}", source)), default=2)
    fence = "`" * (longest + 1)
    end = "" if source.endswith("\n") else "\n"
    return f"{fence}python\n{source}{end}{fence}"


def _checked(found: Extracted) -> Extracted:
    """A text that no file could hold is no program."""
    source = found.source or ""
    if "\0" in source:
        return Extracted(None, "none", "the program holds a null byte")
    try:
        source.encode()
    except UnicodeEncodeError:
        return Extracted(None, "none", "the program holds half of a surrogate pair")
    return found


@lru_cache(maxsize=1024)
def _wanted(entry_points: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """A pattern for each name, matching its definition at the left margin."""
    if not entry_points:
        return (_SPEAKS,)
    names = map(re.escape, entry_points)
    defined = r"^(?:(?:async[ \t]+def|def|class)[ \t]+{0}\b|{0}[ \t]*(?::[^=\n]*)?=(?!=))"
    return tuple(re.compile(defined.format(name), re.MULTILINE) for name in names)


def _count(wanted: Sequence[re.Pattern[str]], source: str) -> int:
    return sum(bool(pattern.search(source)) for pattern in wanted)


def _without_thinking(answer: str) -> str:
    """The answer without `<think>…</think>`. A template may have opened the first one; an unclosed one hides the rest.

    A program that holds `</think>` in a string loses what stands before it.
    """
    kept = []
    first = answer.find("</think>")
    position = first + len("</think>") if first >= 0 else 0
    while (start := answer.find("<think>", position)) >= 0:
        kept.append(answer[position:start])
        end = answer.find("</think>", start)
        if end < 0:
            return "".join(kept)
        position = end + len("</think>")
    return "".join([*kept, answer[position:]])


def _fenced_blocks(answer: str) -> list[_Block]:
    """The fenced blocks in order, as CommonMark has them, with two liberties: any indentation, and fences in strings.

    A fence in a triple-quoted string does not close a block of Python, unless the string itself never ends.
    """
    lines = answer.split("\n")
    blocks: list[_Block] = []
    look_into_strings = True
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None or (opened[2][0] == "`" and "`" in opened[3]):
            number += 1
            continue
        language = _language(opened[3])
        end = _end(lines, number + 1, opened[2], look_into_strings and language in _PYTHON)
        if end is None:  # an endless string: this once, so that the search stays linear
            look_into_strings = False
            end = _end(lines, number + 1, opened[2], False)
        assert end is not None
        indent = len(opened[1])
        text = "\n".join(line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in lines[number + 1 : end])
        closed = end < len(lines) and not _opens_python(lines[end], opened[2])
        blocks.append(_Block(language, text, closed))
        number = end + closed
    return blocks


def _end(lines: Sequence[str], first: int, fence: str, look_into_strings: bool) -> int | None:
    """The line that ends a block: its closing fence, the opening of another block of Python, or the end of the text.

    None where the text ends within a string.
    """
    quote = ""
    for number in range(first, len(lines)):
        line = lines[number]
        if not quote and (_closes(line, fence) or _opens_python(line, fence)):
            return number
        if look_into_strings:
            quote = _open_quote(line, quote)
    return None if quote else len(lines)


def _closes(line: str, fence: str) -> bool:
    rest = line.strip()
    return len(rest) >= len(fence) and rest == fence[0] * len(rest)


def _opens_python(line: str, fence: str) -> bool:
    """Whether a line inside a block opens another one: the answer forgot to close the first."""
    opened = _FENCE.match(line)
    return bool(
        opened
        and opened[2][0] == fence[0]
        and len(opened[2]) >= len(fence)
        and "`" not in opened[3]
        and _language(opened[3]) in _PYTHON - {""}
    )


def _language(info: str) -> str:
    found = _INFO.match(info)
    return found[1].lower() if found else ""


def _open_quote(line: str, quote: str) -> str:
    """The triple quote that is open after a line of Python, given the one that was open before it ("" = none)."""
    for token in _QUOTES.findall(line):
        if not quote and token == "#":
            break
        if not quote and token[0] in "\"'":
            quote = token
        elif token == quote or (len(quote) == 1 and token == 3 * quote):
            quote = ""
    return quote if len(quote) == 3 else ""


def _bare_program(answer: str) -> str:
    """The first run of lines that look like Python, where an answer has no fence; "" for none."""
    lines = answer.split("\n")
    start = next((number for number, line in enumerate(lines) if line.strip() and _starts_code(line)), None)
    if start is None:
        return ""
    quote, end = "", start
    for number in range(start, len(lines)):
        if not quote and not _CODE_LINE.match(lines[number]):
            break
        quote = _open_quote(lines[number], quote)
        end = number + 1
    return "\n".join(lines[start:end]).rstrip() + "\n"


def _starts_code(line: str) -> bool:
    return not line[0].isspace() and line[0] not in "#)]}'\"" and bool(_CODE_LINE.match(line))
