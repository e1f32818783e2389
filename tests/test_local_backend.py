"""The local backend in this process: what the knobs do, and how it ends when it cannot go on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE, run_cli
from safetensors.numpy import load_file

from lib import PROJECT_ROOT
from lib.backends import local
from lib.config import Config, load_config, parse_config
from lib.evaluate import evaluate_run
from lib.generate import Chat
from lib.prepare import prepare
from lib.rollout import UnscoredLimitError
from lib.runfolder import Run, open_run, read_run
from lib.task import Task, load_task
from lib.tools import ToolsError
from lib.training import RowsError, StopSignal


class NeverStop:
    def requested(self, step_seconds: float) -> bool:
        return False


class StopAfter:
    """Asks to stop when it has been looked at so many times: once a step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def requested(self, step_seconds: float) -> bool:
        self.steps -= 1
        return self.steps <= 0


def train(name: str, workspace: Path, stop: StopSignal | None = None, **overrides: Any) -> tuple[Run, Path | None]:
    """Two steps on the smoke config, with the session's starter policy."""
    paths = {"paths.outputs": str(workspace / "outputs"), "paths.cache": str(workspace / "cache")}
    config = load_config(SMOKE, {**paths, "training.steps": 2, **overrides})
    task = load_task(config.task.name, **config.task.params)
    run = open_run(name, config)
    prepare(task, run)
    return run, local.train(config, task, run.read_rows("train"), run, stop or NeverStop())


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


ENGINE = """
import sys
import vllm
from lib.backends import local, train_child

started = vllm.LLM.__init__

def told(self, *arguments, **named):
    print("eager", named["enforce_eager"], "share", named["gpu_memory_utilization"], flush=True)
    started(self, *arguments, **named)

vllm.LLM.__init__ = told
local._check_machine = lambda config: None
sys.exit(train_child(sys.argv[1]))
"""
"""Training as it is on a GPU, as far as an engine that does not start lets it come on a CPU as well."""


def test_an_engine_in_this_process_that_does_not_start_is_told_with_what_to_change(chain: Any, workspace: Path) -> None:
    policy = next((workspace / "cache" / "starter").glob("starter-*"))
    most = json.loads((policy / "config.json").read_text())["max_position_embeddings"]
    config = load_config(
        SMOKE,
        {"paths.outputs": str(workspace / "outputs"), "model.name": str(policy), "sampling.engine": "vllm",
         "sampling.vllm.max_length": most + 1, "model.dtype": "float32"},
    )  # fmt: skip
    run = open_run("engine", config)
    prepare(load_task(config.task.name, **config.task.params), run)
    command = [sys.executable, "-c", ENGINE, str(run.folder)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "eager True share 0.5" in done.stdout
    first, change = (run.folder / "stages" / "training.error.txt").read_text().split("\n")
    assert first.startswith("vLLM did not start in this process. It said: ") and str(most + 1) in first
    assert change.startswith(f"What to change: sampling.vllm.max_length: at most {most}, ")


EPOCHS = {"training.steps": -1, "training.epochs": 2, "training.batch": 64, "training.save_steps": 1000}


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_a_run_stopped_in_any_epoch_resumes_bit_identical(chain: Any, workspace: Path, stop_after: int) -> None:
    policy = str(next((workspace / "cache" / "starter").glob("starter-*")))
    settings = EPOCHS | {"task.generate_rows": 64, "model.name": policy}  # 48 rows, 16 a step: 3 steps an epoch
    whole, adapter = train("epochs", workspace, **settings)
    broken, nothing = train(f"epochs-{stop_after}", workspace, StopAfter(stop_after), **settings)
    assert adapter is not None and nothing is None and len(broken.metrics()) == stop_after
    _, resumed = train(f"epochs-{stop_after}", workspace, **settings)
    assert resumed is not None and same(adapter, resumed)
    assert [r["row"] for r in broken.rollouts()] == [r["row"] for r in whole.rollouts()]


def test_a_run_killed_after_its_last_checkpoint_only_saves(chain: Any, workspace: Path) -> None:
    _, adapter = train("last", workspace)
    assert adapter is not None
    kept = adapter.with_name("kept")
    shutil.move(adapter, kept)
    again, adapter = train("last", workspace)
    assert adapter is not None and same(adapter, kept)
    assert [record["step"] for record in again.metrics()] == [1, 2]


def test_steps_that_go_on_with_earlier_samples_are_logged_too(chain: Any, workspace: Path) -> None:
    run, _ = train("iterations", workspace, **{"training.iterations": 2, "training.steps": 4})
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]
    assert {record["step"] for record in run.rollouts()} == {1, 3}


def test_a_models_own_generation_defaults_do_not_change_the_evaluation(chain: Any, workspace: Path) -> None:
    from lib import models
    from lib.generate import Chat, end_ids, local_sample

    config = load_config(SMOKE)
    policy = str(next((workspace / "cache" / "starter").glob("starter-*")))
    chat = Chat(models.load_tokenizer(policy, config.model))
    prompts = [
        chat.prompt_ids([{"role": "user", "content": f"hour {hour:02d} storage 3 demand 2"}]) for hour in range(8)
    ]
    answers = []
    for penalty in (1.0, 1.8):
        model = models.load_model(policy, config.model)
        model.generation_config.repetition_penalty = penalty
        chat.end_ids = frozenset(end_ids(model, chat.tokenizer))
        answers.append(local_sample(model, chat, config.evaluation, 12, greedy=True)(prompts)[0])
    assert answers[0] == answers[1]


def test_full_fine_tuning_writes_a_whole_model_that_loads_by_itself(chain: Any, workspace: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, output = train("full", workspace, **{"lora.enabled": False})
    assert output == run.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.vocab_size >= len(tokenizer)
    assert (run.folder / "checkpoints" / "step-2" / "optimizer.pt").is_file()


def test_lora_settings_reach_the_adapter(chain: Any, workspace: Path) -> None:
    _, output = train("lora", workspace, **{"lora.r": 4, "lora.alpha": 8, "lora.targets": ["q_proj", "v_proj"]})
    assert output is not None
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    assert {
        tensor.shape[0] for name, tensor in load_file(output / "adapter_model.safetensors").items() if "lora_A" in name
    } == {4}


def test_completions_also_go_to_a_csv_when_asked(chain: Any, workspace: Path) -> None:
    run, _ = train("csv", workspace, **{"training.completions_csv": "completions.csv"})
    with (run.folder / "completions.csv").open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 2 * 16
    assert {"step", "micro_step", "prompt", "completion", "reward", "chosen", "regret"} <= records[0].keys()
    assert [r["completion"] for r in records] == [r["completion"] for r in run.rollouts()]


def test_prompts_over_the_limit_are_dropped_and_counted(
    chain: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RowsError, match=r"all 600 prompts are longer than sampling.prompt_limit 5: raise it"):
        train("short", workspace, **{"sampling.prompt_limit": 5})
    assert "training: 0 rows, 600 dropped over sampling.prompt_limit 5 tokens" in capsys.readouterr().out


FLAKY = """
def score(text, row):
    if int(row["id"]) % 2:
        raise ConnectionError("judge.example refused the connection")
    return min(1.0, len(text) / 40)
"""


def test_a_scorer_that_breaks_stops_the_run_with_the_reasons_counted(
    chain: Any, workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"id": "{i}", "prompt": "hour {i}", "gold": "so [1]"}}\n' for i in range(40))
    )
    task = {"name": str(tmp_path / "flaky.py"), "path": str(tmp_path / "rows.jsonl")}
    values: dict[str, Any] = {
        "task": task,
        "model": {"name": str(next((workspace / "cache" / "starter").glob("starter-*")))},
    }
    values["training"] = {"steps": 2, "batch": 16, "group_size": 4, "save_steps": 1}
    values |= {"sampling": {"completion_limit": 8}, "paths": {"outputs": str(workspace / "outputs")}}
    config = parse_config(values)
    run = open_run("flaky", config)
    loaded = load_task(config.task.name, **config.task.params)
    prepare(loaded, run)
    with pytest.raises(
        UnscoredLimitError, match=r"step 1: \d+ of 16 rollouts could not be judged.*x ConnectionError: judge.example"
    ):
        local.train(config, loaded, run.read_rows("train"), run, NeverStop())
    tolerant = config.model_copy(update={"rewards": config.rewards.model_copy(update={"max_unscored": 1.0})})
    assert local.train(tolerant, loaded, run.read_rows("train"), run, NeverStop()) is not None
    assert all(r["reward"] is None for r in run.rollouts() if int(r["row"]) % 2)
    assert 0 < run.metrics()[0]["rollouts/unscored"] <= 1


TALKS = """
import asyncio
from lib.task import Score, Task

class Talks(Task, frozen=True):
    max_turns: int = 6
    stuck: str = ""
    calls: bool = False

    def rows(self, split):
        tools = [{"type": "function", "function": {"name": "store", "parameters": {"type": "object"}}}] * self.calls
        return [{"id": f"{split}-{i}", "prompt": [{"role": "user", "content": f"hour {i:02d}"}],
                 "gold": [{"role": "assistant", "content": "[1]"}], "tools": tools} for i in range(16)]

    async def reply(self, rollout):
        await self.wait("reply", rollout)
        return [{"role": "user", "content": f"storage {len(rollout.turns)} demand 2"}]

    async def score(self, rollout):
        await self.wait("score", rollout)
        return Score(reward=len(rollout.text) % 7 / 7, parts={"cut": float(rollout.stop == "length")})

    async def wait(self, method, rollout):
        if self.stuck == method and int(rollout.row["id"].split("-")[1]) % 2:
            await asyncio.Event().wait()
"""


def talking(
    name: str, workspace: Path, folder: Path, positions: int = 64, **sections: dict[str, Any]
) -> tuple[Config, Task, Run]:
    """A run of a task with tools and several turns, on the starter policy with room for so many tokens."""
    (folder / "talks.py").write_text(TALKS)
    starter = next((workspace / "cache" / "starter").glob("starter-*"))
    policy = shutil.copytree(starter, folder / "policy", dirs_exist_ok=True)
    shape = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": positions}))
    values: dict[str, Any] = {"task": {"name": str(folder / "talks.py")} | sections.pop("task", {})}
    values |= {"model": {"name": str(policy)}, "paths": {"outputs": str(workspace / "outputs")}}
    values |= {"training": {"steps": 2, "batch": 16, "group_size": 4, "save_steps": 1}}
    config = parse_config(values | {"sampling": {"completion_limit": 40, "prompt_limit": 48}} | sections)
    task, run = load_task(config.task.name, **config.task.params), open_run(name, config)
    prepare(task, run)
    return config, task, run


def test_no_rollout_outgrows_the_models_room_in_training_and_those_that_would_end_as_cut_off(
    chain: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    batches, asked = [], []
    make, sample = local.to_batch, GRPOTrainer._generate_single_turn

    def watched(trainer: Any, prompts: Any, *rest: Any) -> Any:
        told = sample(trainer, prompts, *rest)
        asked.extend(len(prompt) + len(output) for prompt, output in zip(prompts, told[0], strict=True))
        return told

    monkeypatch.setattr(local, "to_batch", lambda *given: batches.append(make(*given)) or batches[-1])
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watched)
    config, task, run = talking("room", workspace, tmp_path)
    assert local.train(config, task, run.read_rows("train"), run, NeverStop()) is not None
    kept = [len(p) + len(o) for batch in batches for p, o in zip(batch.prompt_ids, batch.output_ids, strict=True)]
    assert len(kept) == 32 and max(kept) <= 64 and max(asked) <= 64
    assert all(mask[-1] == 1 for batch in batches for mask in batch.mask)
    ends = {record["stop"] for record in run.rollouts()}
    assert "length" in ends and all(record["reward"] is not None for record in run.rollouts())
    assert all(record["parts"]["cut"] == (record["stop"] == "length") for record in run.rollouts())
    said: list[int] = []
    take = Chat.turn
    monkeypatch.setattr(
        Chat, "turn", lambda self, p, o, logprobs: said.append(len(p + o)) or take(self, p, o, logprobs)
    )
    comparison = evaluate_run(config, task, run)
    assert max(said) <= 64 and {"length"} <= {r["stop"] for some in comparison.records.values() for r in some}


@pytest.mark.parametrize("method", ["score", "reply"])
def test_what_is_stuck_is_given_up_after_the_seconds_of_the_config(
    chain: Any, workspace: Path, tmp_path: Path, method: str
) -> None:
    seconds = {"score_seconds": 0.5, "world_seconds": 0.5, "max_unscored": 0.0}
    config, task, run = talking(f"stuck-{method}", workspace, tmp_path, task={"stuck": method}, rewards=seconds)
    setting = "score_seconds" if method == "score" else "world_seconds"
    told = f"x TimeoutError: the task's {method} took longer than rewards.{setting} = 0.5 s"
    with pytest.raises(UnscoredLimitError, match=told):
        local.train(config, task, run.read_rows("train"), run, NeverStop())


def test_a_template_that_does_not_show_the_tools_is_refused_before_anything_is_sampled_or_evaluated(
    chain: Any, workspace: Path, tmp_path: Path
) -> None:
    config, task, run = talking("blind", workspace, tmp_path, task={"calls": True})
    template = tmp_path / "policy" / "chat_template.jinja"
    shown = template.read_text()
    template.write_text(shown.replace("if tools", "if false"))
    assert template.read_text() != shown
    with pytest.raises(ToolsError, match=r"row train-0: .* leaves out the row's tools \(store\).*task.prompting: text"):
        local.train(config, task, run.read_rows("train"), run, NeverStop())
    assert run.rollouts() == []
    shutil.copytree(chain[0] / "adapter", run.folder / "adapter")
    with pytest.raises(ToolsError, match="row eval-0"):
        evaluate_run(config, task, run)
    assert not list((run.folder / "evaluation").glob("*"))


def test_wandb_gets_the_metrics_offline(chain: Any, workspace: Path, wandb_folder: Path) -> None:
    run, _ = train("tracked", workspace, **{"tracker.name": "wandb", "tracker.project": "here", "tracker.run": "mine"})
    import wandb

    assert wandb.run is not None and (wandb.run.project, wandb.run.name) == ("here", "mine")
    assert wandb.run.id.startswith("tracked-") and len(run.metrics()) == 2
    wandb.finish()
    assert list(wandb_folder.rglob("*.wandb"))


def test_running_out_of_memory_names_the_phase_the_peak_and_the_knobs(
    chain: Any, workspace: Path, places: list[str]
) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (9 * 2**30, 9 * 2**30)); "
        "from lib.run import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["3_grpo_training", SMOKE, "-p", "run_name=memory", "-p", "training.batch=60000",
                 "-p", "training.group_size=3000", *places]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert (
        "out of memory while" in done.stderr
        and "training.batch down" in done.stderr
        and "goes on from step 0" in done.stderr
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_fills_ends_training_resumable_and_says_so(
    chain: Any, workspace: Path, places: list[str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        arguments = ["3_grpo_training", SMOKE, "-p", "run_name=small", *places, "-p", f"paths.outputs={disk}"]
        arguments += ["-p", "training.steps=20", "-p", "training.save_steps=1"]
        done = run_cli(*arguments)
        assert done.returncode == 1
        assert "the disk is full" in done.stderr and "goes on from" in done.stderr
        assert "Traceback" not in done.stderr
        complete = sorted(disk.glob("small/checkpoints/step-*"))
        assert complete and all((path / "logs.json").is_file() for path in complete)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        again = run_cli(*arguments)
        assert again.returncode == 0, again.stderr
        assert f"resuming from {complete[-1].name}" in again.stdout or "resuming from step-" in again.stdout
        assert [record["step"] for record in read_run(disk / "small").metrics()] == list(range(1, 21))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_batch_of_more_prompts_than_rows_is_refused(chain: Any, workspace: Path) -> None:
    with pytest.raises(
        RowsError, match=r"one sampling takes 1000 prompts .* only 600 rows: set training.batch to at most 2400"
    ):
        train("few", workspace, **{"training.batch": 4000})


def test_an_adapter_is_evaluated_without_an_earlier_run(
    chain: tuple[Path, str], workspace: Path, places: list[str], tmp_path: Path
) -> None:
    rows = (chain[0] / "rows" / "eval.jsonl").read_text().splitlines()[:12]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    base = next((workspace / "cache" / "starter").glob("starter-*"))
    done = run_cli(
        "4_adapter_evaluation", SMOKE, "-p", "run_name=alone", "-p", f"model.name={base}", *places,
        "-p", f"evaluation.adapter={chain[0] / 'adapter'}", "-p", f"evaluation.prompts={tmp_path / 'prompts.jsonl'}",
        "-p", "evaluation.samples=2", "-p", "evaluation.temperature=0.7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [
        json.loads(line)
        for line in (workspace / "outputs/alone/evaluation/adapter-sampled.jsonl").read_text().splitlines()
    ]
    assert len(records) == 24 and {r["row"] for r in records} == {json.loads(row)["id"] for row in rows}


def test_an_adapter_of_another_base_is_refused(chain: tuple[Path, str], workspace: Path) -> None:
    from lib import models

    config = load_config(SMOKE)
    other = workspace / "outputs" / "full" / "model"
    if not other.is_dir():
        train("full", workspace, **{"lora.enabled": False})
    model = models.load_model(str(other), config.model)
    with pytest.raises(models.ModelError, match=r"was trained on .*: set model.name to its base"):
        models.load_adapter(model, str(chain[0] / "adapter"))
