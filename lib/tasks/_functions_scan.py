"""What readers of source text share: places in a text, numbers, and values whose type is not known.

Owns finding and converting, each in time that grows with the text's length. Must not know any language, nor rows.

    python -c "from lib.tasks._functions_scan import enclosed; print(*enclosed('f(a) f(b)', [2, 7], ')'))"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

# -- places in a text -------------------------------------------------------------------------------------------------


def over(text: str, at: int, belongs: Callable[[str], bool]) -> int:
    """The first place from `at` on whose character does not belong."""
    while at < len(text) and belongs(text[at]):
        at += 1
    return at


def over_blank(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    return over(text, at, str.isspace)


def past(text: str, at: int, mark: str) -> int:
    """The place behind a mark that nothing but white space precedes; -1 = something else stands there."""
    at = over_blank(text, at)
    return at + len(mark) if text.startswith(mark, at) else -1


def behind(text: str, mark: str, start: int = 0, end: int | None = None) -> Iterator[int]:
    """The place behind every occurrence of a mark."""
    found = text.find(mark, start, end)
    while found >= 0:
        yield found + len(mark)
        found = text.find(mark, found + len(mark), end)


def past_new(text: str, at: int, name: str) -> int:
    """The place behind white space and a name, where `at` is the place behind `new`; -1 = something else."""
    return past(text, at, name) if text[at : at + 1].isspace() else -1


class Next:
    """Where a mark comes next, asked for places that never shrink: no stretch of the text is searched twice."""

    def __init__(self, text: str, mark: str) -> None:
        self._text, self._mark, self._found = text, mark, -1

    def __call__(self, place: int) -> int:
        """The mark's first place from `place` on; the text's length where there is none."""
        if self._found < place:
            found = self._text.find(self._mark, place)
            self._found = len(self._text) if found < 0 else found
        return self._found


def enclosed(text: str, starts: Iterable[int], close: str, least: int = 0) -> Iterator[str]:
    """What stands between each start and the first closing mark after at least `least` characters, on one line.

    `starts` are places in ascending order. One inside of what came before is passed over, like one whose line ends
    before the mark.
    """
    closing, free = Next(text, close), 0
    for start in starts:
        if start < free:
            continue
        end = closing(start + least)
        if end == len(text):
            return
        line = text.find("\n", start, end)
        if line < 0:
            yield text[start:end]
        free = end + len(close) if line < 0 else line


def elements(inside: str) -> list[str]:
    """What stands between commas, without the white space around it."""
    return [one.strip() for one in inside.split(",")]


# -- values -----------------------------------------------------------------------------------------------------------


def is_whole(text: str) -> bool:
    """Whether a text is a whole number, of digits of any script: Python converts them all."""
    return text.removeprefix("-").isdecimal()


def is_decimal(text: str) -> bool:
    """Whether a text is a number like -1 or -1.5; neither .5 nor 5. is one."""
    whole, point, fraction = text.partition(".")
    return is_whole(whole) and (not point or fraction.isdecimal())


def is_scientific(text: str) -> bool:
    """Whether a text is a decimal that may have an exponent."""
    number, mark, power = text.replace("E", "e").partition("e")
    unsigned = power[1:] if power[:1] in ("+", "-") else power
    return is_decimal(number) and (not mark or unsigned.isdecimal())


def number(is_one: Callable[[str], bool], convert: type, suffixes: tuple[str, ...] = ("",)) -> Callable[[str], Any]:
    """The reader of one kind of number, one of whose suffixes (a letter) it must have; a line break may follow.

    It gives the number, or back the very text that is none. Raises ValueError for more digits than Python converts.
    """

    def read(text: str) -> Any:
        line = text.removesuffix("\n")
        digits = line if suffixes == ("",) else line[:-1]
        return convert(digits) if line.endswith(suffixes) and is_one(digits) else text

    return read


WHOLE = number(is_whole, int)


def boolean(text: str) -> Any:
    """true or false; the text where it is neither."""
    return text == "true" if text in ("true", "false") else text


def unquoted(text: str, marks: str) -> str | None:
    """The text between two of the same quotation marks; None = it has none. One mark alone is taken for both."""
    return text[1:-1] if any(text.startswith(mark) and text.endswith(mark) for mark in marks) else None


def untyped(text: str, marks: str) -> Any:
    """A literal whose type is not known: a truth value, a quoted text, whatever Python converts to a number, a name."""
    if text in ("true", "false"):
        return text == "true"
    inside = unquoted(text, marks)
    if inside is not None:
        return inside
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
