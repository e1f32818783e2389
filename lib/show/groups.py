"""The browser of groups: the answers to one prompt side by side, with what each criterion or part says of them.

Owns how a group looks. Must not know where verdicts come from: they are in a record's notes.

    python -c "from lib.show import browser; browser([], 4)"
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lib.show.figure import BLUE, GREEN, GREY, RED
from lib.show.page import details, is_interactive, put

Record = Mapping[str, Any]

_MARKS = {"pass": (GREEN, "✓"), "fail": (RED, "✗"), "unknown": (GREY, "?")}
_PLAIN = 3
"""Groups in an executed notebook; a person can choose any of them."""
_CELL = "text-align:left;vertical-align:top;min-width:14em;border-left:1px solid #e6e8eb"


def browser(records: Sequence[Record], group_size: int) -> None:
    """Groups of answers with their verdicts and reasons: any of them for a person, else those that differ most."""
    groups = [records[i : i + group_size] for i in range(0, len(records), group_size)]
    ordered = sorted(groups, key=lambda group: -_spread(group))
    if is_interactive() and ordered:
        _chooser(ordered)
        return
    shown = [details(_title(group), _group(group), is_open=group is ordered[0]) for group in ordered[:_PLAIN]]
    rest = len(ordered) - len(shown)
    more = (
        f"<p>{rest} more groups: open this notebook in JupyterLab and run this cell to browse all.</p>" if rest else ""
    )
    put("".join(shown) + more or "<p>(nothing)</p>")


def _chooser(ordered: Sequence[Sequence[Record]]) -> None:
    import ipywidgets
    from IPython.display import display

    def show(group: int) -> None:
        put(_group(ordered[group]))

    options = [(_title(group), number) for number, group in enumerate(ordered)]
    wide = ipywidgets.Layout(width="60em")
    display(ipywidgets.interactive(show, group=ipywidgets.Dropdown(options=options, description="group", layout=wide)))


def _spread(group: Sequence[Record]) -> float:
    """How far the rewards of a group are apart; groups without two rewards come last."""
    rewards = [record["reward"] for record in group if record["reward"] is not None]
    return max(rewards) - min(rewards) if len(rewards) > 1 else -1.0


def _title(group: Sequence[Record]) -> str:
    return f"{group[0]['row']}: {', '.join(_reward(record) for record in group)}"


def _reward(record: Record) -> str:
    return "masked" if record["masked"] else "unscored" if record["reward"] is None else f"{record['reward']:.3g}"


def _group(group: Sequence[Record]) -> str:
    """A prompt, then one column an answer and one line a criterion (or a part, where nothing was judged)."""
    prompt = details("prompt", f'<div style="white-space:pre-wrap">{html.escape(str(group[0]["prompt"]))}</div>')
    head = "".join(f'<th style="text-align:left">{html.escape(_reward(record))}</th>' for record in group)
    answers = "".join(
        f'<td style="{_CELL}"><div style="max-height:16em;overflow:auto;white-space:pre-wrap">'
        f"{html.escape(record['answer'])}</div></td>"
        for record in group
    )
    judged = [record["notes"].get("verdicts") or {} for record in group]
    programs = [str(record["notes"].get("program") or "") for record in group]
    lines = _criterion_lines(judged) if any(judged) else _part_lines(group)
    if any(programs):
        lines = _line("program", [f"<pre>{html.escape(program)}</pre>" for program in programs]) + lines
        lines += _measured_lines([record["notes"].get("measured") or {} for record in group])
    style = f'style="color:{BLUE};text-align:left"'
    return (
        f'{prompt}<div style="overflow-x:auto"><table><thead><tr><th {style}>reward</th>{head}</tr></thead>'
        f"<tbody><tr><th {style}>answer</th>{answers}</tr>{lines}</tbody></table></div>"
    )


def _criterion_lines(judged: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    texts = {name: one.get("text", name) for verdicts in judged for name, one in verdicts.items()}
    return "".join(
        _line(str(text), [_verdict(verdicts[name]) if name in verdicts else "" for verdicts in judged])
        for name, text in texts.items()
    )


def _verdict(one: Mapping[str, Any]) -> str:
    color, mark = _MARKS[one["verdict"]]
    score = one["score"]
    shown = f" {score:.2g}" if score not in (None, 0.0, 1.0) else ""
    return f'<b style="color:{color}">{mark}{shown}</b> <small>{html.escape(one["reasons"])}</small>'


def _part_lines(group: Sequence[Record]) -> str:
    names = dict.fromkeys(name for record in group for name in record["parts"])
    values = {name: [record["parts"].get(name) for record in group] for name in names}
    return "".join(_line(name, ["" if v is None else f"{v:.3g}" for v in some]) for name, some in values.items())


def _measured_lines(measured: Sequence[Mapping[str, float]]) -> str:
    """What running an answer took."""
    names = dict.fromkeys(name for one in measured for name in one)
    return "".join(_line(name, [f"{one[name]:.3g}" if name in one else "" for one in measured]) for name in names)


def _line(title: str, cells: Sequence[str]) -> str:
    inside = "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells)
    head = (
        f'<th style="text-align:left;vertical-align:top;max-width:22em;white-space:pre-wrap">{html.escape(title)}</th>'
    )
    return f"<tr>{head}{inside}</tr>"
