"""Executed notebooks: written whole and scrubbed, through papermill's own interface; every attempt kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lib.executed import SCHEME, keep_attempt, target

VALUE = "canary-0123456789"


def notebook(path: Path, **papermill: Any) -> Path:
    metadata = {"papermill": papermill} if papermill else {}
    path.write_text(json.dumps({"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def written(path: Path, text: str) -> str:
    from papermill.iorw import papermill_io

    papermill_io.write(text, target(path))
    return path.read_text(encoding="utf-8")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_target_names_its_file(tmp_path: Path) -> None:
    assert target(tmp_path / "a b.ipynb") == f"{SCHEME}{tmp_path}/a b.ipynb"


def test_papermill_writes_there_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", VALUE)
    text = json.dumps({"text": [f"it is {VALUE}"]})
    assert written(tmp_path / "räksmörgås.ipynb", text) == json.dumps({"text": ["it is <A_KEY>"]})


def test_a_secret_of_several_lines_is_scrubbed_from_a_notebooks_list_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "-----BEGIN-----\nabcdefghijkl\nmnopqrstuvwx\n-----END-----"
    monkeypatch.setenv("PRIVATE_KEY", secret)
    text = written(tmp_path / "a.ipynb", json.dumps({"text": (secret + "\n").splitlines(keepends=True)}, indent=1))
    assert "abcdefghijkl" not in text and "mnopqrstuvwx" not in text
    json.loads(text)


def test_a_scrubbed_notebook_is_still_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    for name, value in (("A_KEY", 'quo"te\\and more'), ("B_TOKEN", "line\nand line")):
        monkeypatch.setenv(name, value)
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text='quo"te\\and more')])
    text = written(tmp_path / "a.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
    assert nbformat.reads(text, as_version=4).cells[0].outputs[0].text == "<A_KEY>"


def test_nothing_is_left_beside_a_written_notebook(tmp_path: Path) -> None:
    written(tmp_path / "a.ipynb", "{}")
    written(tmp_path / "a.ipynb", "{ }")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


def test_papermill_reads_and_lists_there(tmp_path: Path) -> None:
    from papermill.iorw import papermill_io

    notebook(tmp_path / "a.ipynb")
    assert json.loads(papermill_io.read(target(tmp_path / "a.ipynb")))["nbformat"] == 4
    assert papermill_io.listdir(target(tmp_path)) == [str(tmp_path / "a.ipynb")]
    assert papermill_io.pretty_path(target("a.ipynb")) == "a.ipynb"


def test_an_executed_notebook_hides_what_a_cell_prints_returns_and_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    import papermill

    monkeypatch.setenv("A_KEY", VALUE)
    sources = ["import os; key = os.environ['A_KEY']; print(key)", "key", "{'in': [key]}", "raise ValueError(key)"]
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in sources])
    nbformat.write(source, tmp_path / "in.ipynb")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(
            str(tmp_path / "in.ipynb"), target(tmp_path / "out.ipynb"), progress_bar=False, kernel_name="python3"
        )
    text = (tmp_path / "out.ipynb").read_text()
    assert VALUE not in text and text.count("<A_KEY>") >= 4


# -- attempts ---------------------------------------------------------------------------------------------------------


def test_there_is_nothing_to_keep_before_the_first_attempt(tmp_path: Path) -> None:
    assert keep_attempt(tmp_path / "a.ipynb") is None


def test_a_notebook_that_reached_its_end_is_not_an_attempt(tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", end_time="2026-01-01T00:00:00", exception=None)
    assert keep_attempt(path) is None and path.is_file()


@pytest.mark.parametrize(
    "record", [{"end_time": None}, {"end_time": "2026-01-01T00:00:00", "exception": True}, {"start_time": "x"}, {}]
)
def test_a_notebook_that_did_not_reach_its_end_is_moved_aside(tmp_path: Path, record: dict[str, Any]) -> None:
    path = notebook(tmp_path / "a.ipynb", **record)
    assert keep_attempt(path) == tmp_path / "a.attempt-1.ipynb"
    assert not path.exists() and (tmp_path / "a.attempt-1.ipynb").is_file()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'"text"', b'{"metadata": null}'])
def test_a_damaged_notebook_is_an_attempt_as_well(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ipynb"
    path.write_bytes(content)
    kept = keep_attempt(path)
    assert kept and kept.read_bytes() == content


def test_attempts_are_numbered_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "3.x y.ipynb"
    for number in range(1, 13):
        path.write_text(f"cut off {number}")
        kept = keep_attempt(path)
        assert kept and kept.name == f"3.x y.attempt-{number}.ipynb"
    assert [(tmp_path / f"3.x y.attempt-{n}.ipynb").read_text() for n in range(1, 13)] == [
        f"cut off {n}" for n in range(1, 13)
    ]
