"""The notebooks: how they are written, and that every one of them runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try, ast.With)


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_notebooks() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_goes_in_and_out_and_the_headless_command(path: Path) -> None:
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    for needed in ("**In:**", "**Out:**", "**Cost:**", f"python -m lib.run notebooks/{path.name}"):
        assert needed in source(first), needed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_second_cell_holds_literal_parameters_only(path: Path) -> None:
    second = json.loads(path.read_text())["cells"][1]
    assert second["metadata"]["tags"] == ["parameters"]
    names = []
    for node in ast.parse(source(second)).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        ast.literal_eval(node.value)
        names.append(node.target.id)
    assert names[:3] == ["config", "run_name", "overrides"] and len(names) <= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_hold_no_logic_magics_or_secrets(path: Path) -> None:
    code = cells(path)
    assert len(code) <= 20
    for cell in code:
        text = source(cell)
        assert not re.search(r"^\s*[%!]", text, re.M), "magic or shell"
        assert not re.search(r"\binput\(|notebook_login|getpass|pip install|(KEY|TOKEN|SECRET)\s*=", text)
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, FORBIDDEN)], text
        assert "backend ==" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_chain_executes_every_notebook_without_errors(path: Path, chain: tuple[Path, str]) -> None:
    executed = chain[0] / "notebooks" / path.name
    outputs = [output for cell in cells(executed) for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert all(cell["execution_count"] for cell in cells(executed))


def figures(executed: Path) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells(executed) for output in cell["outputs"])


@pytest.mark.parametrize(
    ("stem", "least"),
    [("1_data_prep", 2), ("2_reward_inspection", 1), ("3_grpo_training", 2), ("4_adapter_evaluation", 3)],
)
def test_executed_notebooks_hold_their_figures(stem: str, least: int, chain: tuple[Path, str]) -> None:
    assert figures(chain[0] / "notebooks" / f"{stem}.ipynb") >= least
