"""Entering labels by hand: buttons for a person in the lab, the file to fill in for everybody else.

Owns the form. Must not know how the sheet is stored (lib.meter.labels) or what labels are compared with.

    python -c "from lib.show.labels import label_sheet; label_sheet(None)"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lib.meter.labels import Label, read_sheet, set_labels
from lib.show.page import is_interactive, table, text

Given = Literal["pass", "fail", ""]


def label_sheet(path: Path | None) -> None:
    """A form for the sheet of lib.meter.label_sheet; headless, where the file is and how to fill it in."""
    if path is None:
        text("This task has no judge: there is nothing to label.")
        return
    if is_interactive():
        from IPython.display import display

        display(LabelForm(path).box)
        return
    lines = read_sheet(path)
    table({"row": one.row, "criterion": one.text, "answer": one.answer, "label": one.label} for one in lines[:3])
    text(
        f"{sum(bool(one.label) for one in lines)} of {len(lines)} lines are labelled. Write pass, fail, or nothing for "
        f"not sure, into the column `label` of\n{path}\nand run this notebook again. Of a scored criterion, pass means "
        f"at least half."
    )


class LabelForm:
    """One line of the sheet at a time; every click is written down at once. `box` is the widget."""

    def __init__(self, path: Path) -> None:
        import ipywidgets

        self.path = path
        self.place = next((i for i, line in enumerate(read_sheet(path)) if not line.label), 0)
        self.shown = ipywidgets.HTML()
        self.buttons: dict[str, Any] = {
            name: ipywidgets.Button(description=name, button_style=style)
            for name, style in {"pass": "success", "fail": "danger", "not sure": "", "back": "", "next": ""}.items()
        }
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self.press(name))
        self.box = ipywidgets.VBox([ipywidgets.HBox(list(self.buttons.values())), self.shown])
        self._draw()

    def press(self, name: str) -> None:
        """What a click on a button does."""
        lines = read_sheet(self.path)
        given: dict[str, Given] = {"pass": "pass", "fail": "fail", "not sure": ""}
        if name in given and self.place < len(lines):
            set_labels(self.path, {lines[self.place].key: given[name]})
        step = -1 if name == "back" else 1
        self.place = min(max(self.place + step, 0), max(0, len(lines) - 1))
        self._draw()

    def _draw(self) -> None:
        lines = read_sheet(self.path)
        done = sum(bool(line.label) for line in lines)
        self.shown.value = _page(lines[self.place], self.place, len(lines), done) if lines else "<p>No answers.</p>"


def _page(line: Label, place: int, total: int, done: int) -> str:
    """The criterion first, then what it is about; everything escaped: answers are not to be trusted."""
    import html

    block = '<pre style="white-space:pre-wrap;background:#f5f6f8;padding:6px;max-height:30em;overflow:auto">{}</pre>'
    return (
        f"<p>{place + 1} of {total}, {done} labelled. Label: <b>{line.label or 'none yet'}</b></p>"
        f"<p><b>Does the answer meet this?</b></p>{block.format(html.escape(line.text))}"
        f"<p><b>Answer</b></p>{block.format(html.escape(line.answer))}"
        f"<details><summary>Prompt</summary>{block.format(html.escape(line.prompt))}</details>"
    )
