"""Word lists for Wordle: the one that ships with the workbench, and a user's own files.

Owns the files' format and what counts as a word. Must not know games, rows or rewards.

    python -c "from lib.tasks._wordle_words import shipped; print(len(shipped(5, 20)), len(shipped(5, 50)))"

The shipped list is a selection of SCOWL 2020.12.07 (http://wordlist.aspell.net): words of 3 to 6 letters of the sizes
up to 50, each under the smallest size that has it (10 = the most common); its notices lie beside it. Words of all sizes
up to one:

    size         10     20     35     40     50
    3 letters    158    276    479    501    585
    4 letters    457    926  1,878  1,992  2,302
    5 letters    600  1,365  3,461  3,685  4,442
    6 letters    639  1,651  5,292  5,637  7,030
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import lru_cache
from pathlib import Path

from lib.task import TaskError

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "data" / "scowl.txt"
LENGTHS = (3, 4, 5, 6)
SIZES = (10, 20, 35, 40, 50)


def is_word(text: str) -> bool:
    """Whether a text can be a word of the game: lower-case letters of any alphabet, each one code point either way."""
    return text.isalpha() and text == text.lower() and all(len(letter.upper()) == 1 for letter in text)


@lru_cache(maxsize=16)
def shipped(length: int, size: int) -> tuple[str, ...]:
    """The shipped words of a length, of all SCOWL sizes up to `size`, in alphabetical order. Raises TaskError."""
    if length not in LENGTHS:
        raise TaskError(
            f"task.length: the shipped list has words of {LENGTHS[0]} to {LENGTHS[-1]} letters (given: {length}). Set "
            "task.path to a list of your own, one word a line."
        )
    words, current = [], 0
    for line in SHIPPED.read_text(encoding="ascii").splitlines():
        if line.startswith("# size "):
            current = int(line.split()[-1])
        elif len(line) == length and current <= size and not line.startswith("#"):
            words.append(line)
    return tuple(sorted(words))


def there(path: Path, name: str) -> Path:
    """The path itself. Raises TaskError, naming the field, where no file is there."""
    if not path.is_file():
        remedy = "Give a UTF-8 text, one word a line, relative to the project root."
        raise TaskError(f"task.{name}: {path} {'is no file' if path.exists() else 'does not exist'}. {remedy}")
    return path


def read_words(path: Path, length: int) -> tuple[str, ...]:
    """The words of a length in a text file, one a line, in the file's order; `#` begins a comment.

    Capitals become small letters. What is no word and what has another length is left out and counted in a warning:
    general lists hold both. Raises TaskError where the file cannot be read or nothing is left.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read ({error}). Give a UTF-8 text, one word a line.") from None
    texts = [text.lower() for line in lines if (text := line.split("#")[0].strip())]
    words = [text for text in texts if is_word(text)]
    lengths = Counter(map(len, words))
    found = tuple(dict.fromkeys(word for word in words if len(word) == length))
    if not found:
        have = ", ".join(f"{count} of {size}" for size, count in sorted(lengths.items())) or "none"
        raise TaskError(f"{path}: no word of {length} letters (task.length). Words by their letters: {have}.")
    if len(words) < len(texts):
        log.warning("%s: %d lines left out that are no words of letters only", path.name, len(texts) - len(words))
    if len(words) > lengths[length]:
        log.warning("%s: %d words left out that have not %d letters", path.name, len(words) - lengths[length], length)
    return found
