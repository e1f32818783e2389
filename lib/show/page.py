"""Tables and texts of a cell as HTML, and whether a person looks at it.

Owns how text looks. Must not know what is shown, files or the network.

    python -c "from lib.show.page import is_interactive; print(is_interactive())"
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.config import Config
from lib.evaluate import flat
from lib.show.figure import BLUE
from lib.task import Message, Row


def is_interactive() -> bool:
    """Whether a person sits before this kernel: Jupyter's server names the notebook it serves, papermill does not."""
    return "JPY_SESSION_NAME" in os.environ


def config(values: Config) -> None:
    """The resolved config: what differs from the defaults as a table, everything else folded away."""
    resolved = flat(values.as_json())
    defaults = flat(Config.model_validate({"task": {"name": values.task.name}}).as_json())
    changed = {key: value for key, value in resolved.items() if defaults.get(key, ...) != value}
    rest = {key: value for key, value in resolved.items() if key not in changed}
    put(
        html_table(
            [{"key": key, "value": short(value)} for key, value in {"task.name": values.task.name, **changed}.items()]
        )
        + details(
            f"{len(rest)} more at their defaults",
            html_table([{"key": k, "value": short(v)} for k, v in rest.items()]),
        )
    )


def table(records: Iterable[Mapping[str, Any]], caption: str = "") -> None:
    """Records as a table; long texts are cut, floats have three decimals."""
    put((f"<p><b>{html.escape(caption)}</b></p>" if caption else "") + html_table(list(records)))


def messages(conversation: Sequence[Message], title: str = "") -> None:
    """A conversation, one block a message."""
    blocks = "".join(
        f'<div style="margin:2px 0"><span style="color:{BLUE};font-weight:600">{html.escape(str(m["role"]))}</span> '
        f'<span style="white-space:pre-wrap;font-family:monospace">{html.escape(content(m))}</span></div>'
        for m in conversation
    )
    put(f"<p><b>{html.escape(title)}</b></p>{blocks}" if title else blocks)


def text(value: str, title: str = "") -> None:
    """A text exactly as it is, line breaks and all."""
    heading = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    put(f'{heading}<pre style="background:#f5f6f8;padding:6px;white-space:pre-wrap">{html.escape(value)}</pre>')


def rows(some: Iterable[Row], caption: str = "") -> None:
    """Rows by their id, category, prompt and gold answer."""
    table(
        (
            {
                "id": row["id"],
                "category": row.get("category", ""),
                "prompt": content(row["prompt"][-1]),
                "gold": content(row["gold"][-1]) if row.get("gold") else "",
            }
            for row in some
        ),
        caption,
    )


def content(message: Message) -> str:
    content = message.get("content")
    return (
        content
        if isinstance(content, str)
        else json.dumps(content if content is not None else message, ensure_ascii=False)
    )


def short(value: Any, limit: int = 220) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= limit else shown[:limit] + " …"


def html_table(records: list[Mapping[str, Any]]) -> str:
    if not records:
        return "<p>(nothing)</p>"
    columns = list(dict.fromkeys(column for record in records for column in record))
    head = "".join(f'<th style="text-align:left">{html.escape(column)}</th>' for column in columns)
    cell = '<td style="text-align:left;white-space:pre-wrap;vertical-align:top">'
    body = "".join(
        "<tr>" + "".join(f"{cell}{html.escape(short(record.get(column, '')))}</td>" for column in columns) + "</tr>"
        for record in records
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def details(summary: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{html.escape(summary)}</summary>{inside}</details>"


def put(markup: str) -> None:
    from IPython.display import HTML, display

    # Jupyter and nbconvert would set what stands between two dollar signs as a formula: prices, in answers and prompts.
    display(HTML(f'<div class="tex2jax_ignore mathjax_ignore">{markup}</div>'))
