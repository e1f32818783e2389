"""`check`: one part of a distributed training at a time. Engines are real in one test; failures are simulated ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from simulated_roles import USUAL, Draw, SimulatedHosts, Witness, make_config, run_virtually, scripted_faults

from lib import check as checks
from lib.check import CheckError, check
from lib.config import Config, ConfigError
from lib.roles import WorkerError
from lib.runfolder import Run, open_run

SMOKE = "configs/smoke/decisions.yaml"

AWAY = """
def score(text, row):
    return None
"""


def places(folder: Path) -> dict[str, Any]:
    return {"paths.outputs": str(folder / "outputs"), "paths.cache": str(folder / "cache")}


# a weight sync --------------------------------------------------------------------------------------------------------
def synced(folder: Path, draw: Draw, **overrides: Any) -> int:
    """`check sync` on simulated roles."""
    config = make_config(**overrides)
    run = Run(folder, config)
    witness = Witness(bound=0)
    witness.canary = lambda weights: steady(weights)
    return int(run_virtually(checks._sync(config, run, SimulatedHosts(run, witness, 6, USUAL, draw))))


def steady(weights: str) -> list[list[float]]:
    """No step was done: every version is the same policy, but for weights of another run."""
    from simulated_roles import canary_values

    return canary_values("other" if "another run" in weights else "same")


def test_a_sync_is_tried_by_every_method_and_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synced(tmp_path, scripted_faults()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reload", "volume", "checkpoint"]
    assert all("proven" in line and "NOT" not in line for line in lines)


def test_the_adapter_swap_is_tried_where_it_is_configured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synced(tmp_path, scripted_faults(), distributed__sync_method="lora")
    assert capsys.readouterr().out.splitlines()[0].startswith("lora")


def test_a_method_that_does_not_lead_to_a_proof_is_named_and_the_others_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = scripted_faults(("worker-0", "reload", 1, "refused"), ("worker-0", "volume", 1, "wrong weights"))
    with pytest.raises(CheckError, match="could not prove its weights by reload, volume"):
        synced(tmp_path, faults)
    reload, volume, checkpoint = capsys.readouterr().out.splitlines()
    assert "REFUSED: the manifest is of another run" in reload
    assert "NOT PROVEN" in volume and "proven" in checkpoint


def test_a_worker_that_hangs_or_dies_ends_the_check(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"a sync by volume longer than distributed\.sync_deadline 30 s"):
        synced(tmp_path, scripted_faults(("worker-0", "volume", 1, "hangs")))
    with pytest.raises(CheckError, match=r"a worker longer than distributed\.start_deadline"):
        synced(tmp_path, scripted_faults(("worker-0", "start", 1, "hangs")))
    with pytest.raises(WorkerError, match="SIGKILL"):  # `check` turns it into a CheckError, once the hosts are closed
        synced(tmp_path, scripted_faults(("worker-0", "reload", 1, "dies")))


# a worker's answers ---------------------------------------------------------------------------------------------------
def test_a_real_worker_answers_a_few_rows_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    given = {**places(tmp_path), "backend": "distributed", "starter.steps": 5, "task.generate_rows": 40}
    given["sampling.vllm.max_length"] = 128
    done = run_cli(
        *["check", "rollout", "--config", SMOKE, "-p", "run_name=tried"],
        *[word for name, value in given.items() for word in ("-p", f"{name}={value}")],
        OMP_NUM_THREADS="1",
        GOMP_SPINCOUNT="3000",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if "mean log-probability -" in line]
    assert len(answers) == 3 and all(" tokens, " in line for line in answers)
    assert (tmp_path / "outputs" / "tried.check" / "roles").is_dir() and not (tmp_path / "outputs" / "tried").exists()


# rewards --------------------------------------------------------------------------------------------------------------
def test_gold_wrong_and_empty_answers_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("reward", SMOKE, places(tmp_path)) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    by_kind: dict[str, list[Any]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record["reward"])
    assert {"gold", "empty"} <= by_kind.keys() and all(len(rewards) == 3 for rewards in by_kind.values())
    assert all(isinstance(reward, float) for reward in by_kind["gold"])


def test_answers_that_cannot_be_judged_are_an_error_and_no_zero(tmp_path: Path) -> None:
    (tmp_path / "away.py").write_text(AWAY)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    config = tmp_path / "mine.yaml"
    config.write_text(f"task: {{name: {tmp_path / 'away.py'}, path: {tmp_path / 'rows.jsonl'}}}\n")
    with pytest.raises(CheckError, match="answers could not be scored"):
        check("reward", str(config), places(tmp_path))


# checkpoints ----------------------------------------------------------------------------------------------------------
def made_run(folder: Path) -> Config:
    from lib.config import load_config

    config = load_config(SMOKE, places(folder))
    run = open_run("mine", config)
    for step, consumed in ((2, 2), (10, 5)):
        path = run.path("checkpoints", f"step-{step}", "weights.bin")
        path.write_bytes(b"x" * 3_000_000)
        (path.parent / "actor.json").write_text(json.dumps({"consumed": consumed}))
    run.path("checkpoints", "checkpoint-12", "weights.bin").write_bytes(b"x")
    return config


def test_the_complete_checkpoints_are_listed_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path)
    assert check("checkpoints", SMOKE, places(tmp_path), "mine") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["step-2: 2 batches, 3.0 MB", "step-10: 5 batches, 3.0 MB"]
    assert shown[2].startswith("2 complete checkpoints in ") and len(shown) == 3


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"there is no run 'other'.*give -p run_name=NAME"):
        check("checkpoints", SMOKE, places(tmp_path), "other")


def test_wrong_words_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        check("sync", SMOKE, {**places(tmp_path), "distributed.worker": 3})
    done = run_cli("check", "weights", "--config", SMOKE)
    assert done.returncode == 2 and "invalid choice: 'weights'" in done.stderr
