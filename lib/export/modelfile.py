"""Modelfiles: written so that Ollama reads what was meant, and read as Ollama reads them.

Owns their syntax (ollama/ollama 0.33, parser/parser.go). Must not know models or templates.

    python -c "from lib.export.modelfile import Modelfile; print(Modelfile('./model', stops=('<|im_end|>',)).text())"
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lib.export.errors import ExportError

_COMMAND = re.compile(r"\s*(?:#[^\r\n]*(?:[\r\n]|$)\s*)*([A-Za-z]+)[ \t](?:([A-Za-z0-9_]+)[ \t])?", re.DOTALL)


class Modelfile(NamedTuple):
    """What a Modelfile says."""

    source: str
    """FROM: a folder or GGUF file, relative to the Modelfile."""
    adapter: str = ""
    template: str = ""
    stops: tuple[str, ...] = ()
    comments: tuple[str, ...] = ()

    def text(self) -> str:
        """The file. Raises ExportError for a text that Ollama would read as another."""
        lines = [f"# {comment}" for comment in self.comments]
        lines.append(f"FROM {self.source}")
        lines += [f"ADAPTER {self.adapter}"] if self.adapter else []
        lines += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        lines += [f'TEMPLATE """{self.template}"""'] if self.template else []
        text = "\n".join(lines) + "\n"
        if read_modelfile(text) != self._replace(comments=()):
            raise ExportError(f"no Modelfile says this as Ollama reads it: {self!r:.300}")
        return text


def read_modelfile(text: str) -> Modelfile:
    """What Ollama reads in a Modelfile; only the instructions that are written here are known. Raises ExportError."""
    found: dict[str, list[str]] = {}
    at = 0
    while text[at:].strip() and (match := _COMMAND.match(text, at)):
        name = match[1].lower()
        is_parameter = name == "parameter" and match[2] is not None
        value, at = _value(text, match.end() if is_parameter else match.end(1) + 1)
        found.setdefault(f"parameter {match[2]}" if is_parameter else name, []).append(value)
    unknown = sorted(found.keys() - {"from", "adapter", "template", "parameter stop"})
    rest = re.sub(r"#[^\r\n]*", "", text[at:]).strip()
    if unknown or rest or len(found.get("from", [])) != 1:
        raise ExportError(
            f"this Modelfile was not written here ({', '.join(unknown) or rest[:40] or 'not one FROM'}): make it anew"
        )
    last = {name: values[-1] for name, values in found.items()}
    return Modelfile(
        found["from"][0], last.get("adapter", ""), last.get("template", ""), tuple(found.get("parameter stop", ()))
    )


def _value(text: str, at: int) -> tuple[str, int]:
    """An instruction's value, and where it ends: at the end of the line on which its quotes are closed."""
    kept = ""
    while at < len(text):
        char = text[at]
        at += 1
        if char in "\r\n":
            closed = _unquoted(kept.strip())
            if closed is not None:
                return closed, at
        if char.isprintable() or char in "\r\n\t":  # all others are lost
            kept += char
    closed = _unquoted(kept.strip())
    if closed is None:
        raise ExportError("a text in this Modelfile has no closing quotes")
    return closed, at


def _unquoted(text: str) -> str | None:
    """Without its quotes; None where they are not closed yet."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            is_closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if is_closed else None
    return text
