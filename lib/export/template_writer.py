"""What stands around the messages of a chat, written in Go's text/template for a Modelfile.

Owns how it is written. Must not know tokenizers, or how it was found out (lib/export/template.py).

    python -c "from lib.export.template_writer import Shape, write_template; \
               print(write_template(Shape({'user': '<u>'}, {('user', ''): '</u><a>'}, '')))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from lib.export.gotemplate import quoted

ROLES = ("system", "user", "assistant")


class Shape(NamedTuple):
    """A chat template as far as it is a matter of neighbouring roles."""

    starts: Mapping[str, str]
    """What stands before the first message, by its role; a chat cannot begin with another."""
    gaps: Mapping[tuple[str, str], str]
    """(role, role of the next message; "" = the answer) -> what stands between their contents; no others follow."""
    opener: str
    """What turns begin with; "" where they have nothing in common."""


def write_template(shape: Shape) -> str:
    """A template that renders chats of this shape, and stops where a chat is of another one."""
    after = {role: _ending(shape, role) for role in ROLES}
    blocks = ""
    for role in ROLES:
        before = {one: gap.removeprefix(after[one]) for (one, other), gap in shape.gaps.items() if other == role}
        if role in shape.starts:
            before[""] = shape.starts[role]
        if before:
            block = f"{_before(role, before)}{{{{ .Content }}}}{_literal(after[role])}"
            blocks += f'{{{{ {"else " * bool(blocks)}if eq .Role "{role}" }}}}{block}'
    refused = _stop(f"this chat template knows only these roles: {', '.join(ROLES)}")
    body = f"{blocks}{{{{ else }}}}{refused}{{{{ end }}}}"
    if "$last" in body:
        body = f"{body}{{{{ $last = .Role }}}}"
    answer = _literal(shape.gaps["user", ""].removeprefix(after["user"]))
    declared = '{{ $last := "" }}' if "$last" in body else ""
    return f"{declared}{{{{ range .Messages }}}}{body}{{{{ end }}}}{answer}"


def _ending(shape: Shape, role: str) -> str:
    """What follows a role's content whatever comes next, up to where the next turn opens; "" where that differs."""
    gaps = [gap for (one, _), gap in shape.gaps.items() if one == role]
    cut = {gap[: gap.rfind(shape.opener)] if shape.opener and shape.opener in gap else "" for gap in gaps}
    return cut.pop() if len(cut) == 1 else ""


def _before(role: str, known: Mapping[str, str]) -> str:
    """What stands before a role's content, by the role of the message before ("" = none)."""
    by_text: dict[str, list[str]] = {}
    for one, text in known.items():
        by_text.setdefault(text, []).append(one)
    refused = sorted({"", *ROLES} - {role} - known.keys())
    if len(by_text) == 1 and not refused:
        return _literal(next(iter(by_text)))
    branches = [
        (f"if eq $last {' '.join(map(json.dumps, sorted(ones)))}", _literal(text)) for text, ones in by_text.items()
    ]
    if refused:
        shown = " or ".join(one or "the beginning" for one in refused)
        branches.append(("", _stop(f"this chat template takes no {role} message after {shown}")))
    else:
        branches[-1] = ("", branches[-1][1])
    written = [
        f"{{{{ {' '.join(filter(None, ('else' * bool(number), condition)))} }}}}{text}"
        for number, (condition, text) in enumerate(branches)
    ]
    return "".join(written) + "{{ end }}"


def _stop(why: str) -> str:
    """An action that fails when it is reached: Ollama's answer is then an error that quotes the text."""
    return f"{{{{ index {quoted(why)} 9999 }}}}"


def _literal(text: str) -> str:
    """A text in a template inside of a Modelfile: what either would take for syntax, or lose, is an action."""
    written, at = "", 0
    while at < len(text):
        odd = next((mark for mark in ("{{", '"""') if text.startswith(mark, at)), "")
        at_end = text[at:] == "{"  # an action may follow
        plain = not (odd or at_end) and (text[at].isprintable() or text[at] in "\n\t")
        written += text[at] if plain else f"{{{{ {quoted(odd or text[at])} }}}}"
        at += len(odd) or 1
    return written
