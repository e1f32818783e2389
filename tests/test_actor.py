"""The actor: the same steps as the local backend, the same bits after a kill, and how it ends when it cannot go on."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer
from trl import GRPOTrainer

from lib.actor import Actor, RemoteActor, command
from lib.backends import local
from lib.config import Config, parse_config
from lib.log import start_logging
from lib.roles import ActorError, ActorState, Canary, Release
from lib.rollout import Scored
from lib.rpc import Child, Client, start
from lib.runfolder import Run, open_run
from lib.starter import build_tokenizer
from lib.sync import canary_of, check, compare
from lib.task import Message, Rollout, Row, Score, Task, Turn
from lib.trainer import Batch, BatchError, OffPolicyError, check_batch, make_trainer_class, to_batch

ROWS: list[Row] = [{"id": str(i), "prompt": [{"role": "user", "content": f"yes no {i}"}]} for i in range(24)]


END = 272
"""The policy's end token."""


class World(Task, frozen=True):
    """Odd rows are played over two turns; what an answer earns is a hash of it, and some are unscored or masked."""

    max_turns: int = 2

    async def reply(self, rollout: Rollout) -> list[Message]:
        again = len(rollout.turns) < 2 and int(rollout.row["id"]) % 2
        return [{"role": "user", "content": "and?"}] if again else []

    async def score(self, rollout: Rollout) -> Score:
        number = zlib.crc32(rollout.text.encode()) + len(rollout.text)
        if number % 7 < 2:
            return Score(reward=None if number % 7 else 0.5, masked=number % 7 == 0)
        return Score(reward=number % 100 / 100)


class NeverStop:
    def requested(self, step_seconds: float) -> bool:
        return False


class Fed(NamedTuple):
    """A batch that the local backend trained on, with what a sampler would have said of it, and the random numbers
    that were next."""

    batch: Batch
    random: torch.Tensor


class Recorded(NamedTuple):
    run: Run
    fed: list[Fed]


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Each training collects garbage once, which takes most of a second with all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for runs, with a policy of a few thousand weights in it."""
    folder = tmp_path_factory.mktemp("actor")
    tokenizer = build_tokenizer(["user\n", "assistant\n", "yes no", "and?"] * 5)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, **shape, **ends)
    )
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    return folder


def run_of(folder: Path, name: str, **overrides: Any) -> Run:
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "policy")},
        "sampling": {"completion_limit": 8},
        "training": {"steps": 3, "batch": 16, "group_size": 4, "learning_rate": 1e-3, "save_steps": 1000},
        "rewards": {"max_unscored": 1.0},
        "paths": {"outputs": str(folder / "outputs")},
    }
    for key, value in overrides.items():
        section, _, name_of_key = key.partition(".")
        sections.setdefault(section, {})[name_of_key] = value
    return run_with(folder, name, parse_config({"task": {"name": "decisions"}, **sections}))


def record(folder: Path, name: str, **overrides: Any) -> Recorded:
    """A run of the local backend, and every batch that it trained on."""
    run = run_of(folder, name, **overrides)
    fed: list[Fed] = []
    source = local.RolloutSource.__call__

    def watched(self: Any, trainer: Any, indices: list[Any]) -> Batch:
        batch = source(self, trainer, indices)
        fed.append(Fed(batch._replace(logprobs=sampler_logprobs(trainer.model, batch)), torch.get_rng_state()))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.RolloutSource, "__call__", watched)
        local.train(run.config, World(), run.read_rows("train"), run, NeverStop())
    return Recorded(run, fed)


@torch.no_grad()
def sampler_logprobs(model: Any, batch: Batch) -> list[list[float]]:
    found = []
    for prompt, output, mask in zip(batch.prompt_ids, batch.output_ids, batch.mask, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
        values = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None])[:, 0] * torch.tensor(mask)
        found.append(values.tolist())
    return found


def run_with(folder: Path, name: str, config: Config) -> Run:
    """A fresh run of this config."""
    shutil.rmtree(folder / "outputs" / name, ignore_errors=True)
    run = open_run(name, config)
    run.write_rows("train", ROWS)
    return run


def actor_on(folder: Path, name: str, config: Config) -> Actor:
    """The actor of a fresh run of this config."""
    actor = Actor(str(run_with(folder, name, config).folder))
    actor.initialize()
    return actor


def as_sent(batch: Batch, **changes: Any) -> dict[str, Any]:
    """A batch as it comes over the wire."""
    return dict(json.loads(json.dumps(batch._replace(**changes)._asdict())))


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def difference(one: Path, other: Path) -> float:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def moved(output: Path) -> float:
    return max(float(value.abs().max()) for name, value in tensors(output).items() if "lora_B" in name)


# -- the same step ----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    **{loss: {"training.loss_type": loss} for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")},
    "cispo": {"training.loss_type": "cispo", "training.clip_high": 5.0},
    "KL": {"training.beta": 0.1},
    "two passes a step": {"training.batch": 8, "training.accumulation": 2},
}

SEVERAL_STEPS = {
    "training.batch": 8, "training.steps_per_generation": 2, "training.iterations": 2, "training.steps": 8,
    "training.loss_type": "grpo",
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_train_step_is_the_local_backends(folder: Path, setting: str) -> None:
    recorded = record(folder, "local", **{"training.save_steps": 1} | SETTINGS[setting])
    masks = [mask for fed in recorded.fed for mask in fed.batch.mask]
    assert any(0 in mask and 1 in mask for mask in masks) and any(not any(mask) for mask in masks)
    actor = actor_on(folder, "corrected", recorded.run.config)
    after = []
    for step, fed in enumerate(recorded.fed, start=1):
        metrics = actor.train_step(as_sent(fed.batch))["metrics"]
        output = Path(actor.save_trained())
        after.append(difference(recorded.run.folder / "checkpoints" / f"step-{step}", output))
        # The policy that sampled is the one that trains: the correction corrects nothing.
        assert [metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")] == [
            pytest.approx(1, abs=1e-5)
        ] * 3
        assert metrics["sampling/truncated_share"] == 0
    actor.close()
    assert moved(output) > 1e-3 and after[0] < 1e-6
    assert max(after) < 1e-5  # the second step starts from weights that are not quite the same


@pytest.mark.parametrize("setting", [*SETTINGS, "four steps a batch"])
def test_with_the_same_random_numbers_and_no_correction_it_is_the_same_to_the_bit(folder: Path, setting: str) -> None:
    recorded = record(folder, "local", **SETTINGS.get(setting, SEVERAL_STEPS))
    actor = actor_on(folder, "bits", recorded.run.config)
    reports = []
    for fed in recorded.fed:
        actor._ask(lambda state=fed.random: torch.set_rng_state(state), "preparing")
        reports.append(actor.train_step(as_sent(fed.batch, logprobs=None)))
    output = Path(actor.save_trained())
    actor.close()
    assert moved(output) > 1e-3 and difference(recorded.run.folder / "adapter", output) == 0
    assert [untimed(step) for r in reports for step in r["records"]] == [untimed(r) for r in recorded.run.metrics()]
    assert [report["step"] for report in reports] == [report["records"][-1]["step"] for report in reports]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("time", "step_time")}


# -- what is not in a batch -------------------------------------------------------------------------------------------


def played(reward: float | None, *turns: Turn, masked: bool = False) -> Scored:
    rollout = Rollout(row=ROWS[0], messages=tuple(ROWS[0]["prompt"]), turns=turns)
    return Scored(rollout, Score(reward=reward, masked=masked))


def turn(*output: int, logprobs: Sequence[float] | None = None) -> Turn:
    values = None if logprobs is None else tuple(logprobs)
    return Turn(message={"role": "assistant", "content": "x"}, prompt_ids=(7, 8), output_ids=output, logprobs=values)


def test_a_rollout_that_failed_is_one_end_token_left_out_of_training() -> None:
    whole = played(0.5, turn(9, 3, logprobs=[-1.0, -2.0]))
    unanswered, aborted = played(None), played(0.7, turn(logprobs=[]))
    batch = to_batch([whole, unanswered, aborted, whole], group=4, end_id=3)
    assert batch.prompt_ids == [[7, 8], [3], [3], [7, 8]]
    assert batch.output_ids == [[9, 3], [3], [3], [9, 3]]
    assert batch.mask == [[1, 1], [0], [0], [1, 1]]
    assert batch.rewards == [0.5, None, None, 0.5]
    assert batch.logprobs == [[-1.0, -2.0], [0.0], [0.0], [-1.0, -2.0]]
    assert batch.metrics["rollouts/unscored"] == 0.25
    check_batch(batch, 4)


def test_failed_rollouts_train_as_if_they_had_never_been_asked(folder: Path) -> None:
    recorded = record(folder, "local", **{"training.steps": 1})
    batch = recorded.fed[0].batch
    end = [index for index, reward in enumerate(batch.rewards) if reward is None]
    failed = batch._replace(
        prompt_ids=[[END] if i in end else ids for i, ids in enumerate(batch.prompt_ids)],
        output_ids=[[END] if i in end else ids for i, ids in enumerate(batch.output_ids)],
        mask=[[0] if i in end else mask for i, mask in enumerate(batch.mask)],
        logprobs=[[0.0] if i in end else values for i, values in enumerate(batch.logprobs or [])],
    )
    actor = actor_on(folder, "failed", recorded.run.config)
    actor.train_step(as_sent(failed))
    assert len(end) > 1 and difference(recorded.run.folder / "adapter", Path(actor.save_trained())) < 1e-6
    actor.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [0.5]}, "rewards has 1 rows: one generation batch is 2 completions"),
        (
            {"output_ids": [[9, 3], []]},
            "row 1 is empty: a rollout that failed is one end token, mask 0 and reward None",
        ),
        ({"prompt_ids": [[], [7]]}, "row 0 is empty"),
        ({"mask": [[1, 1], [1]]}, "row 1: 1 of mask for 2 tokens"),
        ({"logprobs": [[-1.0], [-1.0, -1.0]]}, "row 0: 1 of logprobs for 2 tokens"),
        ({"rewards": [0.5, None]}, "row 1 has no reward, so its mask must be all zero"),
    ],
)
def test_what_is_no_generation_batch_is_refused(change: dict[str, Any], message: str) -> None:
    two = [[1, 1], [1, 1]]
    batch = Batch([[7], [7]], [[9, 3], [9, 3]], two, [[-1.0, -1.0]] * 2, [0.5, 1.0], {})
    check_batch(batch, 2)
    with pytest.raises(BatchError, match=message):
        check_batch(batch._replace(**change), 2)


def test_a_refused_batch_harms_nothing(folder: Path) -> None:
    recorded = record(folder, "local", **{"training.steps": 1})
    actor = actor_on(folder, "refusing", recorded.run.config)
    batch = recorded.fed[0].batch
    with pytest.raises(BatchError, match="rewards has 1 rows: one generation batch is 16 completions"):
        actor.train_step(as_sent(batch, rewards=[None]))
    assert actor.state()["consumed"] == 0
    assert actor.train_step(as_sent(batch))["step"] == 1
    with pytest.raises(ActorError, match="training is over: all 1 steps are done"):
        actor.train_step(as_sent(batch))
    assert actor.state()["consumed"] == 1
    actor.close()


# -- off-policy -------------------------------------------------------------------------------------------------------


def older(batch: Batch, share: float, by: float) -> Batch:
    """The batch as if a share of its tokens had been this much less likely (log) when they were sampled."""
    assert batch.logprobs is not None
    values = [
        [value - by * (number % 100 < 100 * share) for number, value in enumerate(row, start=37 * i)]
        for i, row in enumerate(batch.logprobs)
    ]
    return batch._replace(logprobs=values)


def test_the_truncated_share_is_logged_and_the_correction_is_a_weight(folder: Path) -> None:
    recorded = record(folder, "local", **{"training.steps": 1})
    actor = actor_on(folder, "drifted", recorded.run.config)
    metrics = actor.train_step(as_sent(older(recorded.fed[0].batch, share=0.1, by=2.0)))["metrics"]
    assert 0 < metrics["sampling/truncated_share"] < 0.2
    assert metrics["sampling/importance_sampling_ratio/max"] == 3.0  # and not e^2
    assert difference(recorded.run.folder / "adapter", Path(actor.save_trained())) > 1e-5
    actor.close()


def test_too_many_truncated_tokens_end_training_before_a_step_is_made_of_them(folder: Path) -> None:
    recorded = record(folder, "local", **{"training.steps": 1})
    actor = actor_on(folder, "far", recorded.run.config)
    batch = as_sent(older(recorded.fed[0].batch, share=0.5, by=2.0))
    with pytest.raises(
        ActorError, match=r"\d+% of the tokens are more than 3 times as likely .* 20% are allowed"
    ) as far:
        actor.train_step(batch)
    assert isinstance(far.value.__cause__, OffPolicyError) and actor.state()["step"] == 0
    with pytest.raises(ActorError, match="20% are allowed"):
        actor.save_checkpoint()


# -- what is relied on ------------------------------------------------------------------------------------------------


def test_trl_reads_use_vllm_where_samples_are_made_and_corrected_and_nowhere_else() -> None:
    readers = {
        name
        for name, method in vars(GRPOTrainer).items()
        if inspect.isfunction(method) and "self.use_vllm" in inspect.getsource(method)
    }
    ours_or_never_called = {"_generate", "_generate_single_turn", "_tool_call_loop"}
    assert readers - ours_or_never_called == {"__init__", "_generate_and_score_completions", "_compute_loss"}


def test_the_private_names_of_the_trainer_that_the_actor_uses_are_as_they_were() -> None:
    parameters = {
        name: list(inspect.signature(getattr(make_trainer_class(), name)).parameters)
        for name in ("_save_checkpoint", "_load_rng_state", "_load_from_checkpoint", "_generate_and_score_completions")
    }
    assert parameters == {
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_rng_state": ["self", "checkpoint"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "_generate_and_score_completions": ["self", "inputs"],
    }
    scored = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("importance_sampling_ratio", "completion_mask", "tool_mask"):
        assert f'"{name}"' in scored
    made = inspect.getsource(GRPOTrainer.__init__)
    assert "self.eos_token_ids =" in made and "self.vllm_importance_sampling_clip_max =" in made
    saved = inspect.getsource(Trainer._save_checkpoint)
    assert "self._save_rng_state(output_dir)" in saved and "PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" in saved


# -- resume -----------------------------------------------------------------------------------------------------------

DROPPED = {"lora.dropout": 0.2, "training.steps": -1, "training.epochs": 2.0, "training.batch": 32}
"""Every forward pass draws random numbers; 24 rows, 8 a batch: three steps an epoch."""


class Whole(NamedTuple):
    """A training without a break."""

    config: Config
    batches: list[dict[str, Any]]
    adapter: dict[str, torch.Tensor]
    records: list[dict[str, Any]]


def unbroken(folder: Path, **overrides: Any) -> Whole:
    recorded = record(folder, "local", **overrides)
    batches = [as_sent(fed.batch) for fed in recorded.fed]
    actor = actor_on(folder, "whole", recorded.run.config)
    records = [untimed(step) for batch in batches for step in actor.train_step(batch)["records"]]
    adapter = tensors(Path(actor.save_trained()))
    actor.close()
    return Whole(recorded.run.config, batches, adapter, records)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Whole:
    """Six steps, one a batch."""
    return unbroken(folder, **DROPPED)


def same(output: Path, adapter: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, adapter[name]) for name, value in tensors(output).items())


@pytest.mark.parametrize("saved", [1, 3, 4])
def test_a_resumed_actor_goes_on_to_the_same_bits(folder: Path, whole: Whole, saved: int) -> None:
    config, batches, adapter, records = whole
    first = actor_on(folder, "broken", config)
    for batch in batches[:saved]:
        first.train_step(batch)
    checkpoint = Path(first.save_checkpoint({"metrics.jsonl": 5}))
    assert first.save_checkpoint() == str(checkpoint)  # nothing was done since: it is that one
    assert checkpoint.name == f"step-{saved}" and json.loads((checkpoint / "logs.json").read_text()) == {
        "metrics.jsonl": 5
    }
    first.train_step(batches[saved])  # lost with the process
    first.close()
    second = Actor(str(folder / "outputs" / "broken"))
    state = second.initialize()
    assert (state["step"], state["consumed"], state["max_steps"]) == (saved, saved, 6)
    found = [untimed(step) for batch in batches[saved:] for step in second.train_step(batch)["records"]]
    output = Path(second.save_trained())
    second.close()
    assert found == records[saved:]
    assert same(output, adapter)


def test_between_batches_of_several_steps_each_it_resumes_as_well(folder: Path) -> None:
    config, batches, adapter, records = unbroken(
        folder, **SEVERAL_STEPS, **{"lora.dropout": 0.2, "training.save_steps": 4}
    )
    assert len(batches) == 2 and len(records) == 8
    first = actor_on(folder, "broken", config)
    report = first.train_step(batches[0])
    assert (report["step"], [step["step"] for step in report["records"]]) == (4, [1, 2, 3, 4])
    assert first.save_checkpoint().endswith("step-4")
    first.close()
    second = Actor(str(folder / "outputs" / "broken"))
    assert second.initialize()["consumed"] == 1
    assert [untimed(step) for step in second.train_step(batches[1])["records"]] == records[4:]
    assert same(Path(second.save_trained()), adapter)
    second.close()


def test_an_actor_of_a_finished_run_has_its_weights_and_trains_no_more(folder: Path, whole: Whole) -> None:
    config, batches, adapter, _ = whole
    first = actor_on(folder, "finished", config)
    for batch in batches:
        first.train_step(batch)
    first.save_checkpoint()
    first.close()
    second = Actor(str(folder / "outputs" / "finished"))
    state = second.initialize()
    assert (state["step"], state["consumed"]) == (6, 6)
    with pytest.raises(ActorError, match="training is over"):
        second.train_step(batches[0])
    assert same(Path(second.save_trained()), adapter)
    assert second.save_checkpoint().endswith("step-6")
    second.close()


# -- weights for the workers ------------------------------------------------------------------------------------------


def test_a_published_version_says_what_its_canaries_say(folder: Path, whole: Whole) -> None:
    config, batches, _, _ = whole
    actor = actor_on(folder, "published", config)
    canaries = []
    for version, batch in enumerate(batches[:2], start=1):
        actor.train_step(batch)
        release, canary = Release(**actor.publish(version, "reload")), Canary(**actor.canary(version))
        assert release[:4] == (
            version,
            version,
            "reload",
            str(folder / "outputs" / "published" / "weights" / f"v-{version}"),
        )
        check(release, run="published")
        served = Qwen2ForCausalLM.from_pretrained(release.folder)
        proof = compare(canary_of(served, version, canary.prompts), canary.logprobs, tolerance=1e-4)
        assert canary.version == version and proof.holds, proof.why
        canaries.append(canary)
    actor.close()
    assert canaries[0].prompts == canaries[1].prompts  # fixed: a worker is asked the same before and after
    assert max(map(len, canaries[0].prompts)) > 32  # a block of a worker's cache, and more
    moved = compare(canaries[1], canaries[0].logprobs, tolerance=1e-3)
    assert not moved.holds


def test_publishing_draws_no_random_numbers_and_changes_no_weight(folder: Path, whole: Whole) -> None:
    config, batches, adapter, records = whole
    actor = actor_on(folder, "publishing", config)
    found = []
    for number, batch in enumerate(batches):
        method: Any = ("lora", "reload", "volume", "checkpoint")[number % 4]
        before = actor._ask(torch.get_rng_state, "looking")
        release = Release(**actor.publish(number, method))
        actor.canary(number)
        assert torch.equal(before, actor._ask(torch.get_rng_state, "looking"))
        check(release, run="publishing")
        found += [untimed(step) for step in actor.train_step(batch)["records"]]
    output = Path(actor.save_trained())
    actor.close()
    assert found == records
    assert same(output, adapter)


def test_what_cannot_be_published_is_told_and_training_goes_on(folder: Path) -> None:
    whole = run_of(folder, "no-adapter", **{"lora.enabled": False, "training.steps": 1})
    recorded = record(folder, "local", **{"lora.enabled": False, "training.steps": 1})
    actor = Actor(str(whole.folder))
    actor.initialize()
    with pytest.raises(ActorError, match="sync_method lora needs a model with an adapter"):
        actor.publish(1, "lora")
    assert not (whole.folder / "weights" / "v-1").exists()
    assert actor.publish(2, "reload")["version"] == 2
    with pytest.raises(ActorError, match="version 1 is asked for at step 0; published last: version 2 of step 0"):
        actor.canary(1)
    assert actor.train_step(as_sent(recorded.fed[0].batch))["step"] == 1
    with pytest.raises(ActorError, match="version 2 is asked for at step 1"):
        actor.canary(2)  # nobody has these weights any more
    assert actor.publish(3, "reload")["step"] == 1  # also when training is over
    assert actor.canary(3)["version"] == 3
    actor.close()


# -- a process of its own ---------------------------------------------------------------------------------------------

MISHAPS = """
import functools, os, signal, sys, time
import lib.actor.service, lib.training
from lib.actor.__main__ import main

make = lib.training.make_trainer_class
kind, count = os.environ["MISHAP"].split()
passes = 0

@functools.cache
def patched():
    trainer = make()
    loss = trainer._compute_loss

    def broken(self, model, inputs):
        global passes
        passes += 1
        if passes == int(count):
            os.kill(os.getpid(), signal.SIGKILL) if kind == "killed" else time.sleep(600)
        return loss(self, model, inputs)

    trainer._compute_loss = broken
    return trainer

lib.training.make_trainer_class = lib.actor.service.make_trainer_class = patched
main(sys.argv[1])
"""


async def process_of(run: Run, mishap: str = "") -> tuple[RemoteActor, Client]:
    """The actor as a child; `mishap`: what befalls it in which forward pass of training (`killed 2`)."""
    how = [sys.executable, "-c", MISHAPS, str(run.folder)] if mishap else command(run.folder)
    client = await start(Child(name="actor", command=how, log=run.path("actor.log"), environment={"MISHAP": mishap}))
    return RemoteActor(client, run.config), client


async def test_killed_between_steps_and_in_a_step_it_resumes_to_the_same_bits(folder: Path, whole: Whole) -> None:
    config, batches, adapter, records = whole
    run = run_with(folder, "killed", config)
    first, client = await process_of(run)
    await first.initialize()
    reports = [await first.train_step(batch) for batch in batches[:2]]
    release, canary = await first.publish(1, "reload"), await first.canary(1)
    assert (release.version, release.step, canary.version) == (1, 2, 1)
    assert await first.save_checkpoint() == str(run.folder / "checkpoints" / "step-2")
    await first.train_step(batches[2])
    client.kill()
    with pytest.raises(ActorError, match="was ended by SIGKILL"):
        await first.train_step(batches[3])

    second, _ = await process_of(run, "killed 3")
    state = await second.initialize()
    assert (state.step, state.consumed) == (2, 2)
    reports += [await second.train_step(batch) for batch in batches[2:4]]
    await second.save_checkpoint()
    with pytest.raises(
        ActorError, match=r"was ended by SIGKILL .*\n(.*\n)*If it was memory, turn in this order: training.batch"
    ):
        await second.train_step(batches[4])
    with pytest.raises(ActorError, match="was ended by SIGKILL"):
        await second.save_checkpoint()

    third, _ = await process_of(run)
    state = await third.initialize()
    assert (state.step, state.consumed) == (4, 4)
    reports += [await third.train_step(batch) for batch in batches[4:]]
    output = Path(await third.save_trained())
    await third.close()
    assert [untimed(step) for report in reports for step in report.records] == records
    assert same(output, adapter)
    assert [path.name for path in run.checkpoints()] == ["step-2", "step-4"]
    assert not list((run.folder / "checkpoints").glob("checkpoint-*"))


async def test_a_step_that_never_ends_is_given_up_and_the_actor_ended(folder: Path, whole: Whole) -> None:
    config, batches, _, _ = whole
    run = run_with(folder, "asleep", config)
    actor, client = await process_of(run, "asleep 2")
    assert await actor.initialize() == ActorState(0, 6, 0, str(folder / "policy"), [END])
    await actor.train_step(batches[0])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await actor.train_step(batches[1])
    await actor.close()
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)
    with pytest.raises(ActorError, match="actor is closed"):
        await actor.train_step(batches[1])


def test_running_out_of_memory_names_the_phase_the_peak_and_the_knobs(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, batches, _, _ = whole
    actor = actor_on(folder, "memory", config)

    def too_much(*_: Any) -> None:
        [0] * (1 << 50)

    monkeypatch.setattr(make_trainer_class(), "_compute_loss", too_much)
    with pytest.raises(ActorError, match=r"out of memory while loss: peak .* of memory. Turn, in this order: tra"):
        actor.train_step(batches[0])
    with pytest.raises(ActorError, match="out of memory while loss"):
        actor.publish(1, "reload")


def test_a_step_that_breaks_is_told_with_its_error_and_ends_the_actor(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, batches, _, _ = whole
    actor = actor_on(folder, "broken", config)
    actor.train_step(batches[0])
    with monkeypatch.context() as patch:
        patch.setattr(make_trainer_class(), "_compute_loss", lambda *_: 1 / 0)
        with pytest.raises(ActorError, match="ZeroDivisionError: division by zero"):
            actor.train_step(batches[1])
    with pytest.raises(ActorError, match="ZeroDivisionError"):
        actor.train_step(batches[1])


def test_whoever_waits_is_told_when_a_step_breaks_and_the_state_is_answered_meanwhile(
    folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, batches, _, _ = whole
    actor = actor_on(folder, "waiting", config)
    begun, breaks = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        breaks.wait(60)
        raise ConnectionError("gone")

    monkeypatch.setattr(make_trainer_class(), "_compute_loss", slow)
    with ThreadPoolExecutor() as pool:
        step = pool.submit(actor.train_step, batches[0])
        assert begun.wait(60)
        saving = pool.submit(actor.save_checkpoint)
        assert actor.state()["consumed"] == 1 and not step.done()
        breaks.set()
        for call in (step, saving):
            with pytest.raises(ActorError, match="ConnectionError: gone"):
                call.result(timeout=60)


def test_wandb_gets_the_metrics_and_is_finished_with_the_actor(folder: Path, whole: Whole, wandb_folder: Path) -> None:
    import wandb

    run = run_of(folder, "tracked", **{"tracker.name": "wandb", "tracker.project": "here"} | DROPPED)
    actor = Actor(str(run.folder))
    actor.initialize()
    actor.train_step(whole[1][0])
    assert wandb.run is not None and wandb.run.id.startswith("tracked-") and wandb.run.summary["train/global_step"] == 1
    actor.close()
    assert wandb.run is None and list(wandb_folder.rglob("*.wandb"))


def test_a_model_that_cannot_be_loaded_is_told_with_the_remedy(folder: Path) -> None:
    run = run_of(folder, "nowhere", **{"model.name": str(folder / "nothing")})
    with pytest.raises(ActorError, match=r"cannot load .*nothing: "):
        Actor(str(run.folder)).initialize()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_fails_the_checkpoint_and_not_the_actor(folder: Path, tmp_path: Path) -> None:
    recorded = record(folder, "local", **{"training.steps": 2})
    batches = [as_sent(fed.batch) for fed in recorded.fed]
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(outputs)], check=True)
    try:
        run = run_of(folder, "full", **{"training.steps": 2, "paths.outputs": str(outputs)})
        actor = Actor(str(run.folder))
        actor.initialize()
        actor.train_step(batches[0])
        with suppress(OSError), (outputs / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(
            ActorError, match=r"the disk is full: 0 MiB are free where the run is. Free some space there"
        ):
            actor.save_checkpoint()
        assert not run.checkpoints()
        (outputs / "filler").unlink()
        assert actor.save_checkpoint().endswith("step-1")
        actor.train_step(batches[1])
        assert difference(recorded.run.folder / "adapter", Path(actor.save_trained())) < 1e-5
        actor.close()
    finally:
        start_logging(folder / "log.txt")  # the run's log is on that disk
        subprocess.run(["umount", str(outputs)], check=True)
