"""Whether a chat template shows the policy the functions that it is to call.

Owns this check. Must not know tasks, models or trainers.

    python -c "from lib.tools import check_tools; help(check_tools)"
"""

from __future__ import annotations

from collections.abc import Sequence

from lib import WorkbenchError
from lib.generate import Chat
from lib.task import Row

LOOKED_AT = 1000
"""Rows that are looked at for tools that the template does not show."""


class ToolsError(WorkbenchError, ValueError):
    """The chat template does not show the policy the functions that it is to call."""

    knob = (
        "task.prompting: text, where the task has it (the functions then stand in a message), or model.name: one whose "
        "chat template shows tools (Qwen2.5 and 3, Llama 3.1 and later, gpt-oss, ...)"
    )

    def __init__(self, row: Row, what: str) -> None:
        self.why = f"row {row['id']}: the chat template {what}, so the policy would be asked blind"
        super().__init__(f"{self.why}. Set {self.knob}.")


def check_tools(chat: Chat, rows: Sequence[Row]) -> bool:
    """See that the template shows the functions of rows with `tools`; whether there are such rows. Raises ToolsError.

    One row of each kind (its roles, one function or several) among the first LOOKED_AT.
    """
    from jinja2 import TemplateError as Refused

    seen = set()
    for row in rows[:LOOKED_AT]:
        tools = row.get("tools") or ()
        kind = tuple(message["role"] for message in row["prompt"]), min(len(tools), 2)
        if not tools or kind in seen:
            continue
        seen.add(kind)
        bare = chat.text(row["prompt"])
        try:
            shown = chat.text(row["prompt"], tools)
        except Refused as error:
            raise ToolsError(row, f"refuses the row's tools ({error})") from None
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
        hidden = [name for name in names if shown.count(name) <= bare.count(name)]
        if shown == bare:
            raise ToolsError(row, f"leaves out the row's tools ({', '.join(names)})")
        if hidden:
            raise ToolsError(row, f"does not name all of the row's tools ({', '.join(hidden)})")
    return bool(seen)
