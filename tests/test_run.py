"""The command line: parameters checked before a kernel starts, names that are not known, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.config import load_config
from lib.run import CHAIN, Given, UsageError, _split, main, notebook_parameters, notebook_path, parse_parameters
from lib.runfolder import open_run

SMOKE = "configs/smoke/decisions.yaml"
NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))

PARAMETERS = """\
# what to run
import math
config: str = "configs/smoke/decisions.yaml"  # a comment
run_name: str = ""
overrides: dict = {}
prompts = 32
share: float = 0.5
loud = False
limits = [1, 2]
offset = -1
label: str | None = None
"""


def notebook(folder: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell and these code cells."""
    kept: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": ["# A title\n"]}]
    kept += [
        {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "outputs": [], "execution_count": None}
        for source, tags in [(parameters, ["parameters"]), *((cell, []) for cell in cells)]
    ]  # fmt: skip
    path = folder / "mine.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": kernel, "cells": kept}))
    return path


def run(folder: Path, *parameters: str, path: Path | None = None, config: str = SMOKE) -> int:
    """`main` on a notebook, with every run under folder/outputs."""
    given = [f"paths.outputs={folder / 'outputs'}", *parameters]
    return main([str(path or notebook(folder)), config, *(word for text in given for word in ("-p", text))])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *parameters: str, **where: Any) -> str:
    """The message of a command line that must not start anything."""
    assert run(folder, *parameters, **where) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and "==>" not in shown.out
    assert not (folder / "outputs").exists()
    return shown.err


# -- parameters -------------------------------------------------------------------------------------------------------


def test_values_are_what_yaml_makes_of_them() -> None:
    texts = [
        "a=7",
        "b=0.5",
        "c=true",
        "d=text",
        "e=null",
        "f=[1, 2]",
        "g={x: 1}",
        "h=",
        "i='7'",
        "j=a=b",
        "k= 7 ",
        "l=1e-6",
    ]
    assert {name: given.value for name, given in parse_parameters(texts).items()} == {
        "a": 7, "b": 0.5, "c": True, "d": "text", "e": None, "f": [1, 2], "g": {"x": 1}, "h": None, "i": "7",
        "j": "a=b", "k": 7, "l": "1e-6",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a=[1", "a={x", "a=b: c: d", "a=%x", "a=@home", "a='open"])
def test_what_is_no_yaml_is_text(text: str) -> None:
    assert parse_parameters([text]) == {"a": Given(text[2:], text[2:])}


def test_the_last_of_two_equal_names_counts() -> None:
    assert parse_parameters(["a=1", "a=2"]) == {"a": Given("2", 2)} and parse_parameters([]) == {}


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_a_parameter_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"-p {text}: write NAME=VALUE"):
        parse_parameters([text])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompts=many", r"-p prompts='many': this notebook parameter is a int \(default 32\)"),
        ("prompts=1.5", r"-p prompts=1\.5: this notebook parameter is a int"),
        ("loud=1", r"-p loud=1: this notebook parameter is a bool \(default False\)"),
        ("limits=3", r"-p limits=3: this notebook parameter is a list"),
        ("run_name=[a]", r"-p run_name=\['a'\]: this notebook parameter is a str"),
        ("share=half", r"-p share='half': this notebook parameter is a float"),
    ],
)
def test_a_value_of_another_type_is_refused_before_a_kernel_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    assert re.search(told, refused(tmp_path, capsys, text))


def test_a_truth_value_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        split(tmp_path, "prompts=true")


@pytest.mark.parametrize("text", ["1", "1e-3"])
def test_any_number_does_for_a_float(tmp_path: Path, text: str) -> None:
    assert split(tmp_path, f"share={text}")["share"] == float(text)


def split(folder: Path, *parameters: str, config: str = SMOKE) -> dict[str, Any]:
    known = notebook_parameters(notebook(folder))
    return _split(parse_parameters(parameters), known, config)


def test_names_of_the_notebook_go_to_it_and_all_others_into_overrides(tmp_path: Path) -> None:
    chosen = split(
        tmp_path,
        "prompts=8",
        "training.steps=2",
        "task.tau=0.5",
        "overrides={training: {seed: 1}}",
        "backend=local",
        "label=x",
    )
    assert chosen == {
        "config": SMOKE, "prompts": 8, "label": "x",
        "overrides": {"training": {"seed": 1}, "training.steps": 2, "task.tau": 0.5, "backend": "local"},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["overrides=training.steps", "overrides=[1, 2]", "overrides=7"])
def test_overrides_that_are_no_mapping_are_refused_in_words(tmp_path: Path, text: str) -> None:
    try:
        split(tmp_path, text)
    except UsageError as error:
        assert "overrides" in str(error)


def test_the_config_cannot_be_given_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        split(tmp_path, "config=configs/decisions.yaml")


# -- unknown names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trainig.steps=2", "unknown parameter 'trainig.steps'. Did you mean 'training'?"),
        ("training.stps=2", "unknown parameter 'training.stps'. Did you mean 'steps'?"),
        ("training.learning_rate=fast", "training.learning_rate: Input should be a valid number"),
        ("training.batch=7", "is not divisible by group_size 4"),
        ("task.taau=1", "task.taau: unknown key. Did you mean 'tau'?"),
        ("task.name=decision", "unknown task 'decision'. Did you mean 'decisions'?"),
        ("run_name=a/b", "run_name 'a/b' is not usable"),
    ],
)
def test_what_cannot_work_is_told_before_a_kernel_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    assert told in refused(tmp_path, capsys, text)


def test_a_misspelt_notebook_parameter_gets_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'run_name'" in refused(tmp_path, capsys, "run_nme=x")


def test_a_run_of_other_settings_is_refused_before_a_kernel_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(SMOKE, {"paths.outputs": str(tmp_path / "outputs")})
    old = open_run("old", config)
    old.begin("training", ["training"], {})
    old.end("training", {})
    assert run(tmp_path, "run_name=old", "training.steps=9") == 2
    shown = capsys.readouterr()
    assert "run 'old' has finished its stage 'training' with other settings: training.steps was 4, now 9" in shown.err
    assert "==>" not in shown.out


def test_a_missing_config_names_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'configs/decisions.yaml'?" in refused(tmp_path, capsys, config="configs/decision.yaml")


def test_an_unknown_notebook_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["notebooks/3_grpo_trainig.ipynb", SMOKE]) == 2
    told = capsys.readouterr().err
    assert "notebook not found: notebooks/3_grpo_trainig.ipynb. Did you mean '3_grpo_training'?" in told
    assert all(name in told for name in CHAIN)


@pytest.mark.parametrize(
    "arguments", [[], ["all"], ["all", SMOKE, "-p"], ["all", SMOKE, "--steps", "3"], ["all", SMOKE, "extra"]]
)
def test_wrong_usage_has_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m lib.run" in capsys.readouterr().err


# -- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "1_data_prep",
        "1_data_prep.ipynb",
        "notebooks/1_data_prep.ipynb",
        str(PROJECT_ROOT / "notebooks" / "1_data_prep.ipynb"),
    ],
)
def test_a_notebook_is_found_by_name_or_path_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert notebook_path(name) == PROJECT_ROOT / "notebooks" / "1_data_prep.ipynb"


def test_a_folder_or_another_file_is_no_notebook(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(PROJECT_ROOT / "pyproject.toml"), "notebooks"):
        with pytest.raises(UsageError, match="notebook not found"):
            notebook_path(name)


def test_parameters_are_read_as_literals_without_running_the_cell(tmp_path: Path) -> None:
    assert notebook_parameters(notebook(tmp_path)) == {
        "config": "configs/smoke/decisions.yaml", "run_name": "", "overrides": {}, "prompts": 32, "share": 0.5,
        "loud": False, "limits": [1, 2], "offset": -1, "label": None,
    }  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_three_parameters_and_few_knobs(path: Path) -> None:
    values = notebook_parameters(path)
    assert list(values)[:3] == ["config", "run_name", "overrides"] and len(values) <= 3 + 5
    assert (values["run_name"], values["overrides"]) == ("", {}) and (PROJECT_ROOT / values["config"]).is_file()


def test_the_chain_names_notebooks_that_exist() -> None:
    assert [notebook_path(name).stem for name in CHAIN] == list(CHAIN)


def test_a_notebook_without_tagged_parameters_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = notebook(tmp_path)
    path.write_text(path.read_text().replace('["parameters"]', "[]"))
    assert "mine.ipynb has no cell tagged `parameters`: tag its second cell so" in refused(tmp_path, capsys, path=path)


def test_a_computed_parameter_is_refused_in_words(tmp_path: Path) -> None:
    path = notebook(tmp_path, parameters="config: str = ''\nsteps = 2 * 3\n")
    try:
        notebook_parameters(path)
    except UsageError as error:
        assert "steps" in str(error)


# -- execution and exit codes -----------------------------------------------------------------------------------------

STOPPED = (
    "class TrainingStopped(RuntimeError): pass\nraise TrainingStopped('stopped as asked. Run the same cell again')"
)


@pytest.mark.parametrize(
    ("cell", "status", "told"),
    [
        ("print('seen', prompts, overrides)", 0, ""),
        ("raise ValueError('broken on purpose')", 1, "error: mine.ipynb, cell 3: ValueError: broken on purpose"),
        (STOPPED, 75, "cell 3: TrainingStopped: stopped as asked. Run the same cell again"),
    ],
    ids=["done", "failed", "stopped"],
)
def test_the_exit_status_tells_done_failed_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str, status: int, told: str
) -> None:
    assert run(tmp_path, "prompts=5", "training.steps=2", "run_name=mine", path=notebook(tmp_path, cell)) == status
    shown = capsys.readouterr()
    executed = tmp_path / "outputs" / "mine" / "notebooks" / "mine.ipynb"
    assert executed.is_file() and told in shown.err
    assert f"==> mine.ipynb -> {executed}" in shown.out
    if status == 0:
        assert f"seen 5 {{'paths.outputs': '{tmp_path / 'outputs'}', 'training.steps': 2}}" in shown.out
        assert re.search(r"time  mine +\d+\.\d s\ntime  total +\d+\.\d s", shown.out)


def test_a_kernel_that_dies_is_a_failure_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "run_name=mine", path=notebook(tmp_path, "import os; os._exit(9)")) in (1, 75)
    assert "error: mine.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["2026-01-31", "7"])
def test_a_run_may_have_any_usable_name(tmp_path: Path, name: str) -> None:
    assert run(tmp_path, f"run_name={name}") == 0
    assert (tmp_path / "outputs" / name / "config.json").is_file()


def test_help_and_wrong_usage_are_quick() -> None:
    code = """
import sys
from lib.run import main
for arguments in (["--help"], ["all"]):
    try:
        main(arguments)
    except SystemExit:
        pass
heavy = {"torch", "pydantic", "transformers", "numpy", "yaml", "papermill"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "python -m lib.run all configs/decisions.yaml" in done.stdout


# -- another task on the command line ---------------------------------------------------------------------------------


def test_a_swapped_task_runs_in_a_run_of_its_own_and_its_notes_are_in_the_log(tmp_path: Path) -> None:
    """As a user does it, notebook and all: wordle in the decisions task's config."""
    small = [
        "task.length=3",
        "task.path=configs/examples/wordle/three.txt",
        "task.openings=1",
        "model.overrides.wordle=w",
    ]
    command = [sys.executable, "-m", "lib.run", "1_data_prep", SMOKE, "-p", "task=wordle"]
    for text in [
        *small,
        "model.name=starter",
        "starter.steps=2",
        f"paths.outputs={tmp_path}",
        f"paths.cache={tmp_path / 'cache'}",
    ]:
        command += ["-p", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "smoke-decisions-wordle"
    config = json.loads((folder / "config.json").read_text())
    assert config["task"]["name"] == "wordle" and "tau" not in config["task"] and config["model"]["name"] == "starter"
    log = (folder / "log.txt").read_text()
    assert "task wordle instead of decisions: dropped its fields generate_rows, tau" in log
    assert "model.overrides: {'name': 'w'} for the task wordle" in log
    executed = (folder / "notebooks" / "1_data_prep.ipynb").read_text()
    assert "task wordle instead of decisions" in executed
