"""Whoever runs a notebook, JupyterLab's kernel or papermill, one config gives one result."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from jupyter_lab import CellError, Lab, edited, lab
from runners import LEDGER, NOTEBOOK, records, same_results, verdicts, write_inputs

from lib import PROJECT_ROOT
from lib.ledger import hash_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config that both runners get."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def places_of(folder: Path, name: str) -> dict[str, str]:
    """Overrides that keep a runner's runs, starter and ledger in a folder of its own: nothing is handed over."""
    outputs = folder / "outputs"
    return {
        "paths.outputs": str(outputs),
        "paths.cache": str(folder / "cache"),
        "task.ledger": str(outputs / name / LEDGER),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def in_lab(server: Lab, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("in_lab")
    values = {"config": str(inputs), "run_name": "lab", "overrides": places_of(folder, "lab")}
    return folder / "outputs" / "lab", server.run_notebook(Path(NOTEBOOK), values)


def test_a_lab_kernel_and_papermill_give_the_same_weights_logs_and_verdicts(
    in_lab: tuple[Path, list[dict[str, Any]]], inputs: Path, tmp_path: Path
) -> None:
    places = [part for key, value in places_of(tmp_path, "run").items() for part in ("-p", f"{key}={value}")]
    done = run_cli(NOTEBOOK, str(inputs), "-p", "run_name=run", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    same_results(in_lab[0], tmp_path / "outputs" / "run")


def test_the_ledger_holds_every_answer_that_was_sampled_once(in_lab: tuple[Path, list[dict[str, Any]]]) -> None:
    rollouts = records(in_lab[0] / "rollouts.jsonl")
    kept = [(row, answer) for *_, row, answer in verdicts(in_lab[0] / LEDGER)]
    assert {(str(r["row"]), hash_text(r["completion"])) for r in rollouts} == set(kept) and len(set(kept)) == len(kept)
    assert len(rollouts) == 4 * 16


def test_the_lab_shows_figures_and_progress_as_it_goes(in_lab: tuple[Path, list[dict[str, Any]]]) -> None:
    outputs = in_lab[1]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "step 4/4" in "".join(output["text"] for output in outputs if output["output_type"] == "stream")


LOOK = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {},
    "cells": [
        {"cell_type": "code", "source": "broken: bool = False", "metadata": {"tags": ["parameters"]}},
        {
            "cell_type": "code",
            "source": "import os, sys\nos.environ['JPY_SESSION_NAME'], os.getcwd(), sys.prefix",
            "metadata": {},
        },
        {"cell_type": "code", "source": "1 / (not broken)", "metadata": {}},
    ],
}


def test_the_kernel_of_a_notebook_is_the_one_that_the_lab_would_start(server: Lab) -> None:
    path = PROJECT_ROOT / "outputs" / f".look-{os.getpid()}.ipynb"
    path.write_text(json.dumps(LOOK))
    try:
        name, folder, prefix = ast.literal_eval(server.run_notebook(path, {})[0]["data"]["text/plain"])
        assert (name, folder, prefix) == (str(path), str(path.parent), sys.prefix)
        with pytest.raises(CellError, match="ZeroDivisionError: division by zero"):
            server.run_notebook(path, {"broken": True})
        assert server.ask("GET", "api/sessions") == [] and server.ask("GET", "api/kernels") == []
    finally:
        path.unlink()


def test_values_take_the_place_of_the_parameters_cell_s_only() -> None:
    cell = {"metadata": {"tags": ["parameters"]}, "source": ['name: str = "x"  # what\n', "knobs: dict = {}\n"]}
    assert edited(cell, {"knobs": {"a.b": 2}}) == "name: str = 'x'\nknobs: dict = {'a.b': 2}"
    assert edited({"metadata": {}, "source": ["name = 1"]}, {"name": 2}) == "name = 1"
    with pytest.raises(AssertionError, match="no such parameters: \\['other'\\]"):
        edited(cell, {"other": 1})


def test_a_server_is_gone_when_its_block_ends_whatever_happened(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), lab(tmp_path) as running:
        assert running.ask("GET", "api/status")["kernels"] == 0
        raise RuntimeError("in the middle")
    with pytest.raises(OSError):
        running.ask("GET", "api/status")
