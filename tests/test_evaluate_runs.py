"""Several runs on the same held-out rows: which is best, by how much, and where their settings differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, run_cli

from lib.backends import train
from lib.config import Config, ConfigError, load_config
from lib.evaluate import compare_runs, evaluate_run, policies_of
from lib.prepare import prepare
from lib.runfolder import Run, RunError, open_run, write_json
from lib.task import load_task

NAMES = ("chain", "fast", "whole")
SETTINGS = {"evaluation.runs": list(NAMES), "evaluation.rows": 16}


def config_of(workspace: Path, **overrides: Any) -> Config:
    paths = {"paths.outputs": str(workspace / "outputs"), "paths.cache": str(workspace / "cache")}
    return load_config(SMOKE, paths | overrides)


def prepared(name: str, config: Config) -> Run:
    run = open_run(name, config)
    prepare(load_task(config.task.name, **config.task.params), run)
    return run


@pytest.fixture(scope="module")
def members(chain: tuple[Path, str], workspace: Path) -> Path:
    """Beside the chain's run: one with another learning rate, and one that trained the whole model."""
    for name, knobs in {"fast": {"training.learning_rate": 3e-3}, "whole": {"lora.enabled": False}}.items():
        config = config_of(workspace, **{"training.steps": 2, **knobs})
        run = prepared(name, config)
        train(config, load_task(config.task.name, **config.task.params), run.read_rows("train"), run)
    return workspace / "outputs"


@pytest.fixture(scope="module")
def compared(members: Path, places: list[str]) -> Path:
    """Notebook 4 on all three, as a user's shell runs it."""
    named = ["-p", f"evaluation.runs=[{', '.join(NAMES)}]", "-p", "evaluation.rows=16"]
    done = run_cli("4_adapter_evaluation", SMOKE, "-p", "run_name=sweep", *named, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    return members / "sweep"


def shown(folder: Path) -> list[str]:
    """What the cells of an executed notebook 4 show, and where there are figures."""
    cells = json.loads((folder / "notebooks" / "4_adapter_evaluation.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    return [*texts, *("a figure" for output in outputs if "image/png" in output.get("data", {}))]


def test_base_and_every_named_run_answer_the_same_rows_sampled_and_greedily(compared: Path) -> None:
    files = {path.name for path in (compared / "evaluation").glob("*.jsonl")}
    assert files == {f"{name}-{how}.jsonl" for name in ("base", *NAMES) for how in ("sampled", "greedy")}
    rows = {
        tuple(json.loads(line)["row"] for line in path.read_text().splitlines())
        for path in (compared / "evaluation").glob("*.jsonl")
    }
    assert len(rows) == 1 and len(rows.pop()) == 16


def test_the_result_names_the_best_run_and_where_the_settings_differ(compared: Path) -> None:
    result = json.loads((compared / "result.json").read_text())["evaluation"]
    rewards = {policy["policy"]: policy["reward"] for policy in result["policies"]}
    ranked = sorted(NAMES, key=lambda name: -rewards[f"{name} sampled"])
    assert list(result["settings"]) == ranked and result["final"] == ranked[0]
    assert result["over_runner_up"]["mean"] >= 0 and result["over_runner_up"]["n"] > 0
    assert result["settings"]["fast"] == {
        "lora.enabled": True, "training.learning_rate": 3e-3, "training.steps": 2,
    }  # fmt: skip
    assert result["settings"]["chain"]["training.learning_rate"] == 1e-3


def test_the_notebook_shows_the_ranking_and_warns_that_the_best_is_flattered(compared: Path) -> None:
    outputs = shown(compared)
    table = next(text for text in outputs if "training.learning_rate</th>" in text)
    assert all(name in table for name in NAMES) and "gain over base" in table
    assert sum("chosen on these same rows, which flatters it" in text for text in outputs) == 2
    assert outputs.count("a figure") >= 4


def test_one_run_alone_is_not_ranked_and_that_is_said(chain: tuple[Path, str]) -> None:
    assert any("One run: nothing to rank" in text for text in shown(chain[0]))


def test_only_the_run_whose_answers_are_missing_is_asked_again(
    compared: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, lost = compared / "stages" / "evaluation.json", compared / "evaluation" / "fast-sampled.jsonl"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (compared / "evaluation").glob("*.jsonl")}
    write_json(stage, json.loads(stage.read_text()) | {"finished": False})  # as a kill leaves it
    lost.unlink()
    config = config_of(workspace, **SETTINGS)
    evaluate_run(config, load_task(config.task.name, **config.task.params), prepared("sweep", config))
    assert "evaluation: fast sampled on 16 rows" in capsys.readouterr().out
    assert lost.read_bytes() == before.pop(lost)[0]
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == was for path, was in before.items())


def test_a_named_run_that_was_trained_anew_is_noticed(compared: Path, workspace: Path) -> None:
    weights = workspace / "outputs" / "fast" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    config = config_of(workspace, **SETTINGS)
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\0")
        with pytest.raises(RunError, match=r"inputs\.weights of fast was"):
            evaluate_run(config, load_task(config.task.name, **config.task.params), prepared("sweep", config))
    finally:
        weights.write_bytes(kept)


def test_runs_that_cannot_be_compared_are_all_named_at_once_with_what_to_do(members: Path, workspace: Path) -> None:
    open_run("unfinished", config_of(workspace))
    shutil.copytree(members / "chain", members / "foreign")
    adapter = members / "foreign" / "adapter" / "adapter_config.json"
    write_json(adapter, json.loads(adapter.read_text()) | {"base_model_name_or_path": "someone/else"})
    config = config_of(workspace, **{"evaluation.runs": ["chain", "fats", "../chain", "unfinished", "foreign"]})
    with pytest.raises(RunError) as caught:
        policies_of(config, prepared("mistaken", config))
    listed = str(caught.value).splitlines()[1:-1]
    assert [line.split(":")[0] for line in listed] == ["- fats", "- ../chain", "- unfinished", "- foreign"]
    assert "Did you mean 'fast'?" in listed[0] and "there is no such run" in listed[1]
    assert "run notebook 3_grpo_training with run_name='unfinished' first" in listed[2]
    assert "was trained on someone/else" in listed[3] and "give them one base" in listed[3]


def test_a_run_on_a_starter_of_another_seed_has_another_base(members: Path, workspace: Path) -> None:
    settings = {"evaluation.runs": ["chain", "whole"], "starter.seed": 1, "starter.steps": 1}
    config = config_of(workspace, **settings)
    with pytest.raises(RunError, match=r"- chain: it was trained on \S+, and this run's base .*\n- whole: it was"):
        policies_of(config, prepared("reseeded", config))


def test_a_run_with_other_task_settings_is_compared_with_a_warning(
    members: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, **{"evaluation.runs": ["chain"], "task.tau": 2.0})
    assert [policy.name for policy in policies_of(config, prepared("warmer", config))] == ["base", "chain"]
    said = capsys.readouterr().out
    assert "run chain had other task settings (task.tau 1.0, here 2.0): it may have been trained on some of" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": ["base"]}, "a run named 'base' cannot be told from the base policy"),
        ({"runs": ["slow", "fast", "slow"]}, "named twice: slow. Name every run once"),
        ({"runs": "slow"}, r"give a list of run names: \[slow\]"),
        ({"runs": ["slow"], "adapter": "x"}, "evaluation.runs and evaluation.adapter exclude each other"),
        ({"runs": ["slow"], "model": "x"}, "evaluation.runs and evaluation.model exclude each other"),
    ],
)
def test_names_that_cannot_be_told_apart_and_two_sources_are_refused_at_load(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SMOKE, {"evaluation": settings})


def answers(*rewards: float | None) -> list[dict[str, Any]]:
    return [
        {"row": str(i), "category": None, "reward": reward, "masked": False, "parts": {}}
        for i, reward in enumerate(rewards)
    ]


def test_the_best_run_is_paired_with_the_runner_up_on_the_rows_that_both_scored() -> None:
    records = {
        "base sampled": answers(0.1, 0.1, 0.1, 0.1),
        "unscored sampled": answers(None, None, None, None),
        "good sampled": answers(0.5, 0.5, 0.5, 0.5),
        "best sampled": answers(0.9, 0.7, None, 0.8),
    }
    comparison = compare_runs(records, {"unscored": {"seed": 1}, "good": {"seed": 2}, "best": {"seed": 3}})
    assert list(comparison.settings) == ["best", "good", "unscored"] and comparison.final == "best"
    over = comparison.over_runner_up
    assert over is not None and over.mean == pytest.approx(0.3) and (over.n, over.left_out) == (3, 1)
    assert comparison.gains["good sampled"].mean == pytest.approx(0.4)


def test_a_single_named_run_has_no_runner_up() -> None:
    comparison = compare_runs({"base sampled": answers(0.1), "only sampled": answers(0.2)}, {"only": {}})
    assert comparison.final == "only" and comparison.over_runner_up is None
