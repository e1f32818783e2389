"""One rollout turn by turn: who said what, tool calls and results, and letters marked G, Y or X in their colours.

Owns how a conversation looks. Must not know tasks: marks are read off the text, a line of single G, Y and X
below a line of as many single letters. Notes are free: what does not look like verdicts is shown as JSON.

    python -c "from lib.show import transcript; transcript([])"
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.show.figure import BLUE, GREEN, GREY, ORANGE, RED
from lib.show.page import details, is_interactive, put

Record = Mapping[str, Any]

_COLORS = {"user": BLUE, "assistant": GREEN, "tool": ORANGE}
_TILES = {"G": "#3a9a6b", "Y": "#c9a227", "X": "#787c7e"}
_MARKED = re.compile(r"^ ?(\w(?: \w)+)\n ?([GYX](?: [GYX])+)$", re.MULTILINE)
_MARKED_WORD = re.compile(r"^(\w+) ([GYX]+)$")
_VERDICTS = {"pass": (GREEN, "✓"), "fail": (RED, "✗"), "unknown": (GREY, "?")}
_PLAIN = 3
"""Rollouts in an executed notebook; a person can choose any of them."""
_LONGEST = 20_000
"""Characters of one text that are shown: an argument may be a megabyte."""


def transcript(records: Sequence[Record], caption: str = "") -> None:
    """Rollouts that have more to show than one text: any of them for a person, else the best, a middling and the worst.

    A record is one of lib.evaluate's: {row, reward, masked, parts, notes, stop, messages, ...}.
    """
    heading = f"<p><b>{html.escape(caption)}</b></p>" if caption else ""
    long = sorted((record for record in records if record.get("messages")), key=_order)
    if not long:
        put(f"{heading}<p>Every answer is one text: there are no turns or tool calls to look at.</p>")
        return
    if is_interactive():
        put(heading)
        _chooser(long)
        return
    places = dict.fromkeys([0, len(long) // 2, len(long) - 1])
    shown = [details(_title(long[place]), conversation(long[place]), is_open=place == 0) for place in places]
    rest = len(long) - len(shown)
    more = f"<p>{rest} more: open this notebook in JupyterLab and run this cell to browse all.</p>" if rest else ""
    put(heading + "".join(shown) + more)


def conversation(record: Record) -> str:
    """A record's messages as HTML, turns numbered, and what the score says of them."""
    blocks, turn = [], 0
    for message in record["messages"]:
        turn += message.get("role") == "assistant"
        blocks.append(_block(message, turn))
    return "".join(blocks) + _score(record)


def _chooser(long: Sequence[Record]) -> None:
    import ipywidgets
    from IPython.display import display

    def show(rollout: int) -> None:
        put(conversation(long[rollout]))

    options = [(f"{number + 1}. {_title(record)}", number) for number, record in enumerate(long)]
    wide = ipywidgets.Layout(width="60em")
    chosen = ipywidgets.Dropdown(options=options, description="rollout", layout=wide)
    display(ipywidgets.interactive(show, rollout=chosen))


def _order(record: Record) -> tuple[bool, float]:
    """The best first; what has no reward last."""
    return record["reward"] is None, -(record["reward"] or 0.0)


def _title(record: Record) -> str:
    reward = "masked" if record["masked"] else "unscored" if record["reward"] is None else f"{record['reward']:.3g}"
    turns = sum(message.get("role") == "assistant" for message in record["messages"])
    return f"{record['row']}: {reward}, {turns} turn{'s' * (turns != 1)}"


def _block(message: Mapping[str, Any], turn: int) -> str:
    role = str(message.get("role"))
    color = _COLORS.get(role, GREY)
    name = f"{role}, turn {turn}" if role == "assistant" else f"{role} {message.get('name') or ''}".strip()
    inside = "".join(_inside(message))
    return (
        f'<div style="border-left:3px solid {color};margin:4px 0;padding:2px 8px">'
        f'<div style="color:{color};font-weight:600">{html.escape(name)}</div>{inside}</div>'
    )


def _inside(message: Mapping[str, Any]) -> Iterator[str]:
    if message.get("thinking"):
        yield details("thinking", _pre(html.escape(_text(message["thinking"]))))
    if message.get("content"):
        yield _pre(_tiles(_text(message["content"])))
    calls = message.get("tool_calls") or ()
    for call in calls if isinstance(calls, list) else [calls]:
        yield _pre(_call(call))


def _call(call: Any) -> str:
    """add({"a": 1}); what has no function and name as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        return f"→ {html.escape(_text(call))}"
    name, arguments = html.escape(_text(function["name"])), html.escape(_text(function.get("arguments")))
    return f'→ <b style="color:{ORANGE}">{name}</b>({arguments})'


def _tiles(text: str) -> str:
    """The text as HTML; letters above their marks become tiles in the marks' colours."""
    parts, end = [], 0
    for found in _MARKED.finditer(text):
        letters, marks = found[1].split(" "), found[2].split(" ")
        if len(letters) == len(marks):
            parts += [html.escape(text[end : found.start()]), "".join(map(_tile, letters, marks))]
            end = found.end()
    return "".join([*parts, html.escape(text[end:])])


def _word_tiles(reasons: str) -> str:
    """CRANE XXYGX as tiles; any other text as it is."""
    found = _MARKED_WORD.match(reasons)
    if found is None or len(found[1]) != len(found[2]):
        return html.escape(_text(reasons))
    return "".join(map(_tile, found[1], found[2]))


def _tile(letter: str, mark: str) -> str:
    """The mark stays readable for those who do not see the colour."""
    style = f"background:{_TILES[mark]};color:white;font-weight:700;padding:1px 6px;margin-right:2px;border-radius:3px"
    return f'<span style="{style}">{html.escape(letter)}<sub>{mark}</sub></span>'


def _score(record: Record) -> str:
    parts = ", ".join(f"{name} {value:.3g}" for name, value in record["parts"].items() if value is not None)
    lines = [html.escape(f"stopped: {record['stop']}" + f"; {parts}" * bool(parts))]
    if record["notes"].get("error"):
        lines.append(html.escape(f"error: {_text(record['notes']['error'])}"))
    verdicts = record["notes"].get("verdicts") or {}
    each = verdicts.items() if isinstance(verdicts, dict) else [("verdicts", verdicts)]
    lines += [_verdict(name, one) for name, one in each]
    shown = "".join(f"<div>{line}</div>" for line in lines)
    return f'<div style="border-left:3px solid {GREY};margin:4px 0;padding:2px 8px"><small>{shown}</small></div>'


def _verdict(name: str, one: Any) -> str:
    """✓ text reasons; what has no such verdict as JSON."""
    known = one.get("verdict") if isinstance(one, dict) else None
    if not isinstance(known, str) or known not in _VERDICTS:
        return html.escape(f"{name}: {_text(one)}")
    color, mark = _VERDICTS[known]
    said = f"{html.escape(_text(one.get('text', name)))} {_word_tiles(_text(one.get('reasons', '')))}"
    return f'<b style="color:{color}">{mark}</b> {said}'


def _text(value: Any) -> str:
    """A text as it is, anything else as JSON; cut where it is too long to show."""
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _pre(markup: str) -> str:
    return f'<div style="white-space:pre-wrap;font-family:monospace;max-height:24em;overflow:auto">{markup}</div>'


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
