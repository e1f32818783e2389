"""Notebook 5 as a user runs it, on a tiny gpt-oss whose experts lie in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli
from trained_run import trained_run

KINDS = ["adapter", "merged", "mxfp4", "ollama"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that notebook 5 went through."""
    run = trained_run(tmp_path_factory.mktemp("oss"), "gpt_oss_mxfp4", export={"artifacts": KINDS})
    done = run_cli("5_export_and_serve", str(run.folder / "config.json"), "-p", f"run_name={run.name}")
    assert done.returncode == 0, done.stdout + done.stderr
    return run.folder


def test_every_artifact_of_a_packed_mixture_of_experts_is_made_and_proven(exported: Path) -> None:
    told = json.loads((exported / "result.json").read_text())["export"]
    assert {kind: one["why"] for kind, one in told.items() if not one["proven"]} == {} and sorted(told) == sorted(KINDS)


def test_the_executed_notebook_shows_the_proofs_the_answers_and_the_commands(exported: Path) -> None:
    cells = json.loads((exported / "notebooks" / "5_export_and_serve.ipynb").read_text())["cells"]
    shown = json.dumps([cell.get("outputs") for cell in cells])
    for expected in (
        "Every artifact is the policy that was trained",
        "Answers of ",
        "ollama create",
        "--artifact mxfp4",
    ):
        assert expected in shown
