"""What verl is told by every shipped config, what verl itself makes of that, and what is refused before a launch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import CONFIGS
from transformers import GptOssConfig

from lib import PROJECT_ROOT, WorkbenchError, models
from lib.backends import verl as backend
from lib.config import Config, ConfigError, check_key, load_config, parse_config
from lib.run import parse_parameters
from lib.runfolder import open_run
from lib.starter import CONTEXT
from lib.task import load_task
from lib.verl import check, cluster
from lib.verl.batches import batches, check_fit, describe_epoch, steps
from lib.verl.check import Answer, ask
from lib.verl.cluster import TRACKER, Cluster, check_checkpoints, cluster_of, of_the_container, probe
from lib.verl.errors import VerlError
from lib.verl.overrides import hydra, notes, overrides

TWO = Cluster(2)
ACE = PROJECT_ROOT / "configs" / "ace_verl.yaml"


class Never:
    """Nobody asks for the end."""

    def requested(self, step_seconds: float) -> bool:
        return False


def config(**sections: Any) -> Config:
    values = {"training": {"batch": 8, "group_size": 4}} | sections
    return parse_config({"task": "decisions", "backend": "verl", **values} | {"task": {"name": "decisions"}})


def refused(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    return str(caught.value)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that says of itself what the starter policy's does."""
    folder = tmp_path_factory.mktemp("starter")
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": CONTEXT, "num_attention_heads": 4, "model_type": "qwen2"})
    )
    return str(folder)


def told(path: Path, starter: str, *more: str, machines: Cluster = TWO) -> list[str]:
    read = load_config(path, {"backend": "verl", "verl.overrides": more})
    model = starter if read.model.name == "starter" else read.model.name
    return overrides(read, Path("/runs/my run"), Path("/runs/my run/verl"), model, machines)


# every shipped config, and everything that verl must not be told, in one process --------------------------------------
NOT_FOR_VERL = {
    "configs/gsm8k.yaml": "sampling.vllm.max_length",  # up to 32 turns, and a Hub model whose length nobody knows yet
}

EAGER = "actor_rollout_ref.model.override_config.attn_implementation=eager"  # a key that we add

WRONG = {
    "unknown": ["trainer.total_training_step=1", "sandbox_fusion.url=http://127.0.0.1:1"],
    "elsewhere": ["total_training_steps=1"],
    "ignored": [
        "custom_reward_function.path=my.py",
        "reward_model.enable=true",
        "actor_rollout_ref.actor.grad_clip=1.0",
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.model.lora.rank=8",
        "actor_rollout_ref.rollout.do_sample=false",
        "actor_rollout_ref.nccl_timeout=60",
        "critic.optim.lr=1e-5",
        "trainer.balance_batch=false",
        "+trainer.patience=3",
    ],
    "fields": ["+actor_rollout_ref.rollout.temprature=0.5"],
    "values": [
        "algorithm.adv_estimator=grop",
        "actor_rollout_ref.rollout.name=vlm",
        "trainer.logger=[console,wandbb]",
        "data.train_batch_size=-32",
        "trainer.nnodes=two",
        "actor_rollout_ref.rollout.gpu_memory_utilization=40",
        "trainer.resume_mode=always",
    ],
    "sizes": [
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
    ],
    "micro": ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=7"],
    "old": ["trainer.use_v1=false"],
    "verl": ["actor_rollout_ref.actor.loss_agg_mode=mean"],
    "grammar": ["trainer.logger=[console"],
    "fine": ["trainer.total_training_steps=1", "trainer.logger=[console]", "~trainer.project_name", EAGER],
}


@pytest.fixture(scope="module")
def answers(verl_python: str, starter: str) -> dict[str, Answer]:
    """By the name of a config, or the kind of mistake: what verl made of it."""
    runs = {}
    for path in CONFIGS:
        name = path.relative_to(PROJECT_ROOT).as_posix()
        if name in NOT_FOR_VERL:
            with pytest.raises(WorkbenchError, match=NOT_FOR_VERL[name]):
                told(path, starter)
        else:
            runs[name] = told(path, starter)
    runs |= {name: told(ACE, starter, *wrong) for name, wrong in WRONG.items()}
    runs["processor"] = told(PROJECT_ROOT / "configs/smoke/verl.yaml", starter, machines=Cluster(1, cpu=True))
    return dict(zip(runs, ask(list(runs.values()), verl_python), strict=True))


def test_verl_composes_and_accepts_every_shipped_config_that_is_not_refused(answers: dict[str, Answer]) -> None:
    shipped = {path.relative_to(PROJECT_ROOT).as_posix() for path in CONFIGS} - set(NOT_FOR_VERL)
    assert len(shipped) > 15
    assert {name: answers[name].problems for name in shipped if answers[name].problems} == {}
    assert answers["processor"].problems == () and answers["processor"].config["trainer"]["device"] == "cpu"


def test_the_original_is_told_as_it_was(answers: dict[str, Answer]) -> None:
    found = answers["configs/ace_verl.yaml"].config
    model, actor, rollout = (found["actor_rollout_ref"][name] for name in ("model", "actor", "rollout"))
    assert model["path"] == "Qwen/Qwen2-0.5B"
    assert (found["data"]["train_batch_size"], rollout["n"], rollout["tensor_model_parallel_size"]) == (32, 5, 2)
    assert found["trainer"]["n_gpus_per_node"] == 2 and load_config(ACE).modal.gpu == "H100:2"
    assert actor["ppo_mini_batch_size"] == 32 and actor["use_kl_loss"] and actor["kl_loss_coef"] == 0.001
    assert found["reward"]["custom_reward_function"]["reward_kwargs"] == {"order": "/runs/my run/verl/reward.json"}
    assert found["trainer"]["default_local_dir"] == "/runs/my run/verl/checkpoints"


def problem(answer: Answer, key: str) -> str:
    found = [text for text in answer.problems if text.startswith(key)]
    assert found, (key, answer.problems)
    return found[0]


def test_a_key_that_verl_lacks_is_refused_with_the_nearest_ones(answers: dict[str, Answer]) -> None:
    wrong = problem(answers["unknown"], "trainer.total_training_step: verl has no such key.")
    assert "Did you mean trainer.total_training_steps" in wrong
    assert problem(answers["unknown"], "sandbox_fusion.url: verl ignores it")  # all are told at once
    assert "Did you mean trainer.total_training_steps?" in problem(answers["elsewhere"], "total_training_steps")
    assert "Did you mean temperature?" in problem(answers["fields"], "actor_rollout_ref.rollout.temprature: actor")


def test_a_key_that_verl_would_silently_ignore_is_refused_with_what_to_write(answers: dict[str, Answer]) -> None:
    found = answers["ignored"]
    for given in WRONG["ignored"]:
        assert "verl ignores it" in problem(found, given.lstrip("+").partition("=")[0])
    assert problem(found, "custom_reward_function.path").endswith("write reward.custom_reward_function")
    assert "actor_rollout_ref.actor.optim.clip_grad" in problem(found, "actor_rollout_ref.actor.grad_clip")
    assert "no module of verl reads" in problem(found, "trainer.patience")


def test_a_value_that_composes_and_cannot_work_is_refused_with_what_can(answers: dict[str, Answer]) -> None:
    found = answers["values"]
    assert "grpo_scored" in problem(found, "algorithm.adv_estimator=grop: verl knows")
    assert "Did you mean vllm?" in problem(found, "actor_rollout_ref.rollout.name=vlm")
    assert "Did you mean wandb?" in problem(found, "trainer.logger=wandbb")
    assert "whole number of at least 1" in problem(found, "data.train_batch_size=-32")
    assert "whole number of at least 1" in problem(found, "trainer.nnodes=two")
    assert "a share above 0, at most 1" in problem(found, "actor_rollout_ref.rollout.gpu_memory_utilization=40")
    assert "auto, disable, resume_path" in problem(found, "trainer.resume_mode=always")
    assert "cannot share evenly" in problem(answers["sizes"], "actor_rollout_ref.actor.ppo_mini_batch_size=3")
    assert "does not divide 2 GPUs" in problem(answers["sizes"], "actor_rollout_ref.rollout.tensor_model_parallel")
    assert "80 completions" in problem(answers["micro"], "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=7")
    assert "unscored" in problem(answers["old"], "trainer.use_v1")
    assert "Invalid loss_agg_mode: mean" in problem(answers["verl"], "verl refuses it")
    assert problem(answers["grammar"], "Hydra cannot read it")


def test_overrides_of_the_config_win_and_what_they_cost_is_said(answers: dict[str, Answer]) -> None:
    found = answers["fine"]
    assert found.problems == () and found.config["trainer"]["total_training_steps"] == 1
    assert "project_name" not in found.config["trainer"]
    assert found.config["actor_rollout_ref"]["model"]["override_config"] == {"attn_implementation": "eager"}
    assert any("no metrics come back" in text for text in found.notes)
    assert any(text.startswith("trainer.logger: verl.overrides changes") for text in found.notes)


# the program that asks verl -------------------------------------------------------------------------------------------
def interpreter(folder: Path, body: str) -> str:
    """Something that is called like verl's Python."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_an_answer_is_kept_and_a_refusal_lists_everything(tmp_path: Path) -> None:
    count, problems = tmp_path / "count", ["a=1: no", "b=2: no"]
    body = f"open({str(count)!r}, 'a').write('x')\nruns = json.load(sys.stdin)['runs']\n"
    body += f"print(json.dumps([{{'problems': {problems!r}, 'notes': [], 'config': None}} for _ in runs]))"
    python = interpreter(tmp_path, body)
    for _ in range(2):
        with pytest.raises(VerlError, match=r"(?s)cannot be launched.*a=1: no.*b=2: no"):
            check.check(["a=1", "b=2"], python, tmp_path / "cache")
    assert count.read_text() == "x"
    assert len(ask([["a=1", "b=2"], ["c=3"]], python, tmp_path / "cache")) == 2 and count.read_text() == "xx"


def test_an_interpreter_that_fails_hangs_or_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VerlError, match="No module named verl"):
        ask([["a=1"]], interpreter(tmp_path, "sys.exit('No module named verl')"))
    monkeypatch.setattr(check, "DEADLINE", 1.0)
    with pytest.raises(VerlError, match="did not check its config within 1 s"):
        ask([["a=1"]], interpreter(tmp_path, "time.sleep(60)"))
    with pytest.raises(VerlError, match="cannot be run: No such file"):
        ask([["a=1"]], str(tmp_path / "nowhere"))


def test_the_command_shows_what_verl_would_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "runs = json.load(sys.stdin)['runs']\n"
    body += "print(json.dumps([{'problems': [], 'notes': ['so it is'], 'config': {}} for _ in runs]))"
    python = interpreter(tmp_path, body)
    values = yaml.safe_load(ACE.read_text()) | {"paths": {"cache": str(tmp_path), "outputs": str(tmp_path)}}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values | {"verl": {"python": python, "tensor_parallel": 2}}))
    assert check.main([str(file), "--gpus", "2", "trainer.total_training_steps=1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "data.train_batch_size=32" in shown and "note: so it is" in shown
    assert shown.index("trainer.total_training_steps=1") > shown.index("trainer.total_epochs=15")
    assert check.main([str(file), "--gpus", "3"]) == 1
    assert "3 GPUs cannot share them evenly" in capsys.readouterr().err


# our fields -----------------------------------------------------------------------------------------------------------
def as_keys(given: Config, machines: Cluster = TWO) -> dict[str, str]:
    found = overrides(given, Path("/r"), Path("/r/verl"), "model", machines)
    return dict(one.split("=", 1) for one in found)


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("training", {"loss_type": "bnpo"}, "set training.loss_type to dapo"),
        ("training", {"loss_type": "luspo"}, "no loss_type luspo"),
        ("training", {"reward_scaling": "batch"}, "set training.reward_scaling to group or none"),
        ("training", {"epochs": 1.5}, "set training.steps instead"),
        ("training", {"steps_per_generation": 2, "steps": 3, "save_steps": 2}, "set training.steps to a multiple of 2"),
        ("training", {"batch": 2, "accumulation": 3, "group_size": 4, "steps_per_generation": 6}, "a multiple of 2"),
        ("training", {"accumulation": 2, "steps_per_generation": 1}, "training.steps_per_generation to 2"),
        ("lora", {"dropout": 0.1, "expert_parameters": []}, "set lora.dropout to 0"),
        ("model", {"quantization": "mxfp4"}, "set model.quantization to auto"),
        ("sampling", {"vllm": {"server": "http://a:1"}}, "leave sampling.vllm.server out"),
        ("verl", {"overrides": ["trainer total=1"]}, "write key=value"),
        ("verl", {"ray_address": "ray://head:10001"}, "is no Ray client"),
        ("verl", {"ray_address": "head"}, "give HOST:PORT"),
    ],
)
def test_what_verl_cannot_do_is_refused_at_load_with_the_remedy(
    section: str, values: dict[str, Any], told: str
) -> None:
    base = {"batch": 8, "group_size": 4} if section == "training" else {}
    assert told in refused(**{section: base | values})


def test_the_same_fields_are_fine_for_the_other_backends() -> None:
    training = {"batch": 8, "group_size": 4, "loss_type": "bnpo", "epochs": 1.5}
    assert parse_config({"task": {"name": "decisions"}, "training": training}).training.loss_type == "bnpo"


@pytest.mark.parametrize(
    ("loss", "keys"),
    [
        ({"loss_type": "dapo", "clip_high": 0.28}, ["vanilla", "token-mean", "0.2", "0.28"]),
        ({"loss_type": "grpo"}, ["vanilla", "seq-mean-token-mean", "0.2", "0.2"]),
        ({"loss_type": "dr_grpo"}, ["vanilla", "seq-mean-token-sum-norm", "0.2", "0.2"]),
        ({"loss_type": "cispo", "clip_high": 5.0}, ["cispo", "token-mean", "1.0", "4.0"]),
    ],
)
def test_a_loss_is_told_by_its_parts(loss: dict[str, Any], keys: list[str]) -> None:
    found = as_keys(config(training={"batch": 8, "group_size": 4} | loss))
    names = ("policy_loss.loss_mode", "loss_agg_mode", "clip_ratio_low", "clip_ratio_high")
    assert [found[f"actor_rollout_ref.actor.{name}"] for name in names] == keys
    scaled = "actor_rollout_ref.actor.loss_scale_factor" in found
    assert scaled == (loss["loss_type"] == "dr_grpo")


def test_several_optimizer_steps_of_one_sampling_are_verls_mini_batches() -> None:
    training = {"batch": 8, "group_size": 4, "steps_per_generation": 4, "accumulation": 2, "iterations": 3}
    given = config(training=training | {"steps": 12, "save_steps": 6, "warmup": 6, "schedule": "cosine"})
    found = as_keys(given)
    actor = "actor_rollout_ref.actor"
    assert found["data.train_batch_size"] == "8" and found[f"{actor}.ppo_mini_batch_size"] == "4"
    assert found[f"{actor}.ppo_epochs"] == "3"
    assert found["trainer.total_training_steps"] == "2" and found["trainer.save_freq"] == "1"
    assert found[f"{actor}.optim.lr_warmup_steps"] == "1" and found[f"{actor}.optim.lr_scheduler_type"] == "cosine"
    assert steps(given, rows=100) == 2


def test_what_verl_does_otherwise_is_said() -> None:
    said = "\n".join(notes(config()))
    assert "training.schedule linear" in said and "samples with vLLM" in said
    assert not [text for text in notes(load_config(ACE)) if "schedule" in text or "engine" in text]


def test_a_value_survives_hydras_grammar(verl_python: str) -> None:
    values = ["a b", 'say "no"', "back\\", 'b\\"q', "${x}", "true", "1e-5", "", "ä,[x]", "a=b", "/plain/path-1.2"]
    code = "import json, sys\nfrom hydra.core.override_parser.overrides_parser import OverridesParser\n"
    code += "from omegaconf import OmegaConf\n"
    code += "for one in OverridesParser.create().parse_overrides(json.load(sys.stdin)):\n"
    code += "    print(json.dumps(OmegaConf.to_container(OmegaConf.create({'k': one.value()}), resolve=True)['k']))"
    texts = [f"k={hydra(value)}" for value in [*values, [1, "x y"], 1e-6, None, True]]
    done = subprocess.run(
        [verl_python, "-c", code], input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [*values, [1, "x y"], 1e-6, None, True]


def test_an_override_is_given_on_the_command_line_as_it_is_written_in_a_file() -> None:
    given = parse_parameters(["verl.overrides=[trainer.total_training_steps=1, +data.x={a: 1}]"])[
        "verl.overrides"
    ].value
    check_key("verl.overrides")
    with pytest.raises(ConfigError, match=r"verl\.overrides"):
        load_config(ACE, {"verl.overrides": given})  # YAML reads the braces: quotes keep them for Hydra
    given = yaml.safe_load("[trainer.total_training_steps=1, '+data.x={a: 1}', ~data.seed]")
    assert load_config(ACE, {"verl.overrides": given}).verl.overrides == tuple(given)


# machines, rows, models -----------------------------------------------------------------------------------------------
def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_work() -> None:
    given = load_config(ACE)
    with pytest.raises(VerlError, match=r"160 completions, and 3 GPUs cannot .* training\.accumulation to 15 or 30 "):
        batches(given, 3)
    for accumulation in (15, 30):
        assert batches(load_config(ACE, {"training.accumulation": accumulation}), 3).mini
    assert batches(given, 2) == (32, 32, 8)
    assert batches(load_config(ACE, {"training.batch": 32, "training.accumulation": 5}), 8) == (32, 32, 20)
    with pytest.raises(VerlError, match=r"tensor_parallel 2 does not divide 1 GPUs: set it to 1"):
        check_fit(given, 1)


def test_what_an_epoch_leaves_unused_is_said_and_too_few_rows_are_refused() -> None:
    given = load_config(ACE)
    said = describe_epoch(given, 60)
    assert "an epoch of 60 rows is 1 step and leaves 28 rows unused" in said
    assert steps(given, 60) == 15
    assert "uses all of them" in describe_epoch(given, 64)
    with pytest.raises(VerlError, match="32 prompts, and there are 31 rows"):
        steps(given, 31)


def test_gpus_are_counted_or_asked_for() -> None:
    ace = load_config(ACE)
    with pytest.raises(VerlError, match=r"how many GPUs\? None is here, and verl\.gpus is not set"):
        cluster_of(ace, seen=0)
    assert cluster_of(ace, seen=2) == Cluster(2)
    assert cluster_of(load_config(ACE, {"where": "modal"}), seen=0) == Cluster(2)
    assert cluster_of(load_config(ACE, {"verl.gpus": 1}), seen=0) == Cluster(1, cpu=True)
    with pytest.raises(VerlError, match=r"verl\.gpus 4: 2 are here"):
        cluster_of(load_config(ACE, {"verl.gpus": 4}), seen=2)
    away = {"verl.ray_address": "head:6379"}
    with pytest.raises(VerlError, match=r"how many GPUs has one machine of the Ray cluster at head:6379\?"):
        cluster_of(load_config(ACE, away), seen=0)
    assert cluster_of(load_config(ACE, away | {"verl.gpus": 8, "verl.nodes": 2}), seen=0).size == 16
    with pytest.raises(VerlError, match=r"verl\.nodes 2: .*ray start --head"):
        cluster_of(load_config(ACE, {"verl.nodes": 2}), seen=8)


def test_a_container_has_the_gpus_that_it_asks_for() -> None:
    for gpu, more, reason in (
        ("none", {}, "verl needs GPUs"),
        (["H100:2", "A100-80GB:4"], {}, "one number of GPUs"),
        ("H100:2", {"verl.gpus": 4}, "leave verl.gpus out"),
        ("none", {"verl.nodes": 2}, r"verl\.nodes 2 on Modal, and modal\.gpu is none: .* H100:8, or verl\.nodes to 1"),
        ("none", {"verl.nodes": 2, "verl.gpus": 2}, r"and modal\.gpu is none"),
        ("H100:2", {"verl.nodes": 2}, r"modal\.gpu H100:2: .* all GPUs of their hosts\. Set modal\.gpu to H100:8,"),
        (["H200:8", "A10"], {"verl.nodes": 2}, r"modal\.gpu A10: .*Set modal\.gpu to A10:4, .*up to 4 of them"),
        (["H200:8", "A10:4"], {"verl.nodes": 2}, "one number of GPUs"),
        ("H100:8", {"verl.nodes": 33}, "at most 32 machines"),
        ("H100:8", {"verl.nodes": 2, "verl.ray_address": "a:6379"}, r"Leave verl\.ray_address out, or .* where: here"),
    ):
        with pytest.raises(VerlError, match=reason):
            of_the_container(load_config(ACE, {"modal.gpu": gpu, **more}))
    assert of_the_container(load_config(ACE, {"modal.gpu": "none", "verl.gpus": 1})) == Cluster(1, cpu=True)
    several = load_config(ACE, {"modal.gpu": ["H100:8", "A100-80GB:8"], "verl.nodes": 2, "where": "modal"})
    assert of_the_container(several) == cluster_of(several, seen=0) == Cluster(8, nodes=2)


def test_a_model_that_verl_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_attention_heads": 14, "quantization_config": {"quant_method": "mxfp4"}})
    )
    given = load_config(ACE)
    with pytest.raises(VerlError, match="stored in mxfp4"):
        overrides(given, tmp_path, tmp_path, str(tmp_path), TWO)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 15}))
    with pytest.raises(VerlError, match="15 attention heads"):
        overrides(given, tmp_path, tmp_path, str(tmp_path), TWO)
    with pytest.raises(VerlError, match="takes no revision"):
        overrides(load_config(ACE, {"model.revision": "main"}), tmp_path, tmp_path, "Qwen/Qwen2-0.5B", TWO)


def test_a_hub_model_that_verl_cannot_hold_is_refused_before_it_is_fetched(
    tmp_path: Path, verl_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = GptOssConfig(num_hidden_layers=1, quantization_config={"quant_method": "mxfp4"})
    monkeypatch.setattr(models, "load_shape", lambda source, settings: packed)
    monkeypatch.setattr(models, "download", lambda source, settings: pytest.fail("it was fetched"))
    away = {"model.name": "openai/gpt-oss-20b", "paths.outputs": str(tmp_path), "verl.python": verl_python}
    config = load_config(PROJECT_ROOT / "configs" / "smoke" / "verl.yaml", away)
    task = load_task(config.task.name, **config.task.params)
    with pytest.raises(VerlError, match=r"openai/gpt-oss-20b is stored in mxfp4"):
        backend.train(config, task, task.rows("train"), open_run("packed", config), Never())


def test_an_answer_of_several_turns_has_all_the_room_that_the_prompt_leaves(tmp_path: Path, starter: str) -> None:
    wordle = PROJECT_ROOT / "configs" / "wordle.yaml"  # max_length 8192, prompts of 512
    assert "data.max_response_length=7680" in told(wordle, starter)
    toy = PROJECT_ROOT / "configs" / "smoke" / "wordle.yaml"
    assert f"data.max_response_length={CONTEXT - 64}" in told(toy, starter)
    with pytest.raises(VerlError, match=r"a task of \d turns: set sampling\.vllm\.max_length"):
        overrides(load_config(toy, {"backend": "verl"}), tmp_path, tmp_path, "a/model-on-the-hub", TWO)
    with pytest.raises(VerlError, match="leaves nothing"):
        read = load_config(toy, {"backend": "verl", "sampling.vllm.max_length": 64})
        overrides(read, tmp_path, tmp_path, starter, TWO)


# Ray ------------------------------------------------------------------------------------------------------------------
@contextmanager
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_ray_address_is_tried_before_anything_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PAUSE", 0.0)
    with listening() as address:
        assert probe(address) == address
    with pytest.raises(
        VerlError, match=rf"no Ray cluster answers at {address} .*3 times.*ray start --head --port=6379"
    ):
        probe(address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(VerlError, match=r"auto: no Ray cluster runs on this machine .*ray_current_cluster"):
        probe("auto")
    with listening() as address:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert probe("auto") == address


# resume ---------------------------------------------------------------------------------------------------------------
def test_a_checkpoint_folder_that_verl_would_pass_over_is_refused(tmp_path: Path) -> None:
    assert check_checkpoints(tmp_path / "none") == 0
    for step in (5, 10):
        (tmp_path / f"global_step_{step}").mkdir()
    with pytest.raises(VerlError, match=rf"global_step_5, global_step_10\) and no {TRACKER}.*echo -n 10"):
        check_checkpoints(tmp_path)
    for text in ("7", "x"):
        (tmp_path / TRACKER).write_text(text)
        with pytest.raises(
            VerlError, match=rf"says '{text}', and the checkpoints there are: global_step_5, global_step_10"
        ):
            check_checkpoints(tmp_path)
    (tmp_path / TRACKER).write_text("10")
    assert check_checkpoints(tmp_path) == 10
