"""What comes back from verl: rollouts as records, metrics under our names, checkpoints that count."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.config import load_config
from lib.runfolder import Run, open_run
from lib.task import Rollout, Score, Turn
from lib.training import say_step
from lib.verl import checkpoints
from lib.verl.errors import VerlError
from lib.verl.record import (
    Answer,
    cut_after,
    in_groups,
    metrics_of,
    records_of,
    scored_as_json,
    scored_from_json,
    scored_of,
)

ROW = {"id": "r1", "prompt": [{"role": "user", "content": "2 + 2?"}]}
TOLD = {"score": 0.5, "scored": 1.0, "masked": 0.0, "reason": "", "parts": '{"valid": 1.0}'}


def answer(uid: str = "a", session: int = 0, told: dict[str, Any] | None = None, **values: Any) -> Answer:
    known = {"row": ROW, "text": "4", "tokens": 3, "complete": True}
    return Answer(uid=uid, session=session, told=TOLD | (told or {}), **{**known, **values})


def run_of(tmp_path: Path, **values: Any) -> Run:
    more = {"paths.outputs": str(tmp_path), "paths.cache": str(tmp_path / "cache")}
    return open_run("back", load_config("configs/smoke/decisions.yaml", more | values))


def test_a_judged_answer_keeps_its_reward_and_parts_and_a_cut_one_says_so() -> None:
    scored = scored_of(answer(complete=False))
    assert scored.score.reward == 0.5 and scored.score.parts == {"valid": 1.0}
    record = records_of([scored], 1, step=4, micro_step=6)[0]
    assert record["completion"] == "4" and record["tokens"] == 3 and record["stop"] == "length"
    assert (record["step"], record["micro_step"], record["row"], record["prompt"]) == (4, 6, "r1", "2 + 2?")


def test_what_could_not_be_judged_has_no_reward_although_verl_holds_a_zero() -> None:
    lost = scored_of(answer(told={"score": -0.0, "scored": 0.0, "reason": "the judge is down"}))
    assert lost.score.reward is None and lost.score.notes == {"error": "the judge is down"} and not lost.score.masked
    left_out = scored_of(answer(told={"score": -0.0, "scored": 0.0, "masked": 1.0, "reason": "its own rule"}))
    assert left_out.score.reward is None and left_out.score.masked and not left_out.score.notes


def test_groups_stay_together_whatever_order_answers_come_in() -> None:
    came = [answer("b", 1), answer("a", 0), answer("b", 0), answer("a", 1)]
    assert [(one.uid, one.session) for one in in_groups(came, 2)] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]


def test_an_answer_that_verl_lost_leaves_the_other_groups_as_they_are() -> None:
    whole = in_groups([answer("a", 1, row=ROW | {"id": "r0"}), answer("b", 0), answer("b", 1)], 2)
    records = records_of([scored_of(one) for one in whole], 2, step=1, micro_step=0)
    assert [(one["group"], one["row"], one["reward"]) for one in records] == [
        (0, "r0", None),
        (0, "r0", 0.5),
        (1, "r1", 0.5),
        (1, "r1", 0.5),
    ]
    assert "verl/log.txt" in records[0]["notes"]["error"] and records[0]["tokens"] == 0


def test_metrics_have_our_names_and_leave_out_what_was_not_judged() -> None:
    scored = [scored_of(answer(told={"score": reward})) for reward in (0.0, 1.0)]
    scored += [scored_of(answer(told={"scored": 0.0, "score": -0.0})), scored_of(answer(told={"score": 1.0}))]
    told = metrics_of({"actor/grad_norm": 2.0, "actor/pg_loss": 0.1, "perf/x": 3, "name": "text"}, scored, 2)
    assert told["grad_norm"] == 2.0 and told["loss"] == 0.1 and told["verl/perf/x"] == 3 and "name" not in told
    assert told["reward"] == pytest.approx(2 / 3) and told["rollouts/unscored"] == 0.25
    assert told["groups/useful"] == 0.5 and told["reward_std"] == pytest.approx(0.5**0.5)
    assert metrics_of({}, [scored[2]], 1)["reward"] is None


def test_a_step_whose_loss_is_no_number_is_said_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    told = metrics_of({"actor/pg_loss": float("nan")}, [scored_of(answer())], 1)
    with caplog.at_level("INFO", "lib.training"):
        say_step(told, 3, 4)
    assert "step 3/4 loss none reward 0.5000" in caplog.text


def test_a_whole_rollout_travels_through_the_queue_without_its_token_ids() -> None:
    turn = Turn(
        message={"role": "assistant", "content": "4"}, prompt_ids=(1, 2), output_ids=(3, 4), logprobs=(0.0, -1.0)
    )
    rollout = Rollout(row=ROW, messages=(*ROW["prompt"], turn.message), turns=(turn,), stop="max_turns")
    back = scored_from_json(scored_as_json((rollout, Score(reward=0.25, parts={"a": None}, notes={"n": [1]}))))  # type: ignore[arg-type]
    assert back.score == Score(reward=0.25, parts={"a": None}, notes={"n": [1]})
    assert back.rollout.stop == "max_turns" and back.rollout.turns[0].output_ids == (0, 0)


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.append("metrics.jsonl", [{"step": step, "loss": 0.0} for step in (1, 2, 3)])
    run.append("rollouts.jsonl", [{"step": step, "row": "r"} for step in (1, 1, 2, 3)])
    cut_after(run, 2)
    assert [record["step"] for record in run.metrics()] == [1, 2]
    assert [record["step"] for record in run.rollouts()] == [1, 1, 2]


def test_only_checkpoints_that_verl_says_are_whole_count(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert checkpoints.steps(run) == []
    folder = run.folder / checkpoints.FOLDER
    for step in (1, 2, 10):
        (folder / f"global_step_{step}").mkdir(parents=True)
    assert checkpoints.steps(run) == []
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    assert checkpoints.steps(run) == [1, 2]


def merger(tmp_path: Path, code: str) -> str:
    """An interpreter whose `-m verl.model_merger` does this, with `target` the folder to write to."""
    script = tmp_path / "python"
    body = f"import sys, json, pathlib\ntarget = pathlib.Path(sys.argv[sys.argv.index('--target_dir') + 1])\n{code}\n"
    (tmp_path / "merger.py").write_text(body)
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "merger.py"} "$@"\n')
    os.chmod(script, 0o755)
    return str(script)


ADAPTER = """
folder = target / "lora_adapter"
folder.mkdir(parents=True)
(folder / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": None}))
(folder / "adapter_model.safetensors").write_bytes(b"weights")
(target / "model.safetensors").write_bytes(b"the base, which nobody needs twice")
"""


def written(run: Run, step: int) -> None:
    shards = run.folder / checkpoints.FOLDER / f"global_step_{step}" / "actor" / "huggingface"
    shards.mkdir(parents=True)
    (shards / "tokenizer.json").write_text("{}")
    (shards / "config.json").write_text("{}")
    (run.folder / checkpoints.FOLDER / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_checkpoint_becomes_an_adapter_that_names_its_base(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    written(run, 3)
    (converted,) = checkpoints.convert_all(run, merger(tmp_path, ADAPTER), "some/base")
    assert converted == run.folder / "checkpoints" / "step-3" and run.checkpoints() == [converted]
    assert json.loads((converted / "adapter_config.json").read_text()) == {
        "r": 4,
        "base_model_name_or_path": "some/base",
    }
    names = {path.name for path in converted.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "verl.json"}
    nothing = merger(tmp_path, "sys.exit('called twice')")
    assert checkpoints.convert_all(run, nothing, "some/base") == [converted]


@pytest.mark.parametrize(
    ("code", "told"),
    [("sys.exit('shard 1 is missing')", "shard 1 is missing"), ("target.mkdir()", "wrote no adapter")],
)
def test_a_merger_that_fails_leaves_no_checkpoint(tmp_path: Path, code: str, told: str) -> None:
    run = run_of(tmp_path)
    written(run, 3)
    with pytest.raises(VerlError, match=told):
        checkpoints.convert_all(run, merger(tmp_path, code), "some/base")
    assert run.checkpoints() == []
