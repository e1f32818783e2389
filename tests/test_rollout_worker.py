"""The rollout worker on the real vLLM: what it samples, how it takes weights, and that a wrong sync cannot hide."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from tiny_models import tiny_qwen3_moe
from tiny_policy import tiny, train, with_adapter

from lib.config import load_config
from lib.engine import ADVICE
from lib.program import ProgramError
from lib.roles import Method, Proof, RefusedError, Release, Sampled, Sampling, WorkerError
from lib.rollout_worker import EngineSettings, RemoteWorker, RolloutWorker, command, environment
from lib.rollout_worker import engine as engine_module
from lib.rollout_worker.engine import Engine, EngineError
from lib.rpc import Child, RpcError, start
from lib.runfolder import hash_file
from lib.sync import BLOCK, canary_of, compare, make_canaries, publish

REAL = [[(7 * number + 3 * place) % 300 + 10 for place in range(50)] for number in range(1, 7)]
"""Prompts of tokens; longer than a block of the cache."""

CANARIES = make_canaries(REAL, BLOCK, 512)
END = 5


class Plant:
    """An actor's model, the worker that follows it, and the folder between them."""

    def __init__(self, folder: Path, tied: bool, lora: bool) -> None:
        import torch

        torch.manual_seed(0)
        self.base, self.weights = folder / "base", folder / "weights"
        self.plain = tiny(tied)
        self.plain.save_pretrained(self.base)
        self.model = with_adapter(self.plain) if lora else self.plain
        if lora:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    if "lora_B" in name:
                        weight.zero_()  # it starts as the base policy, as training does
        self.settings = EngineSettings(
            run="a-run",
            model=str(self.base),
            max_length=512,
            max_sequences=16,
            cpu_cache_gib=1 / 16,
            lora_rank=4 if lora else None,
        )
        self.worker = RolloutWorker(self.settings)
        self.version = 0
        self.now = canary_of(self.model, 0, CANARIES)

    def publish(self, method: Method = "reload", model: Any = None) -> Release:
        self.version += 1
        model = self.model if model is None else model
        return publish(model, self.weights, version=self.version, step=self.version, method=method, run="a-run")

    async def sync(self, method: Method = "reload", step: float = 1e-3, model: Any = None) -> Proof:
        """A step of training, then the weights' whole way. `model`: what is published instead of the actor's."""
        train(self.model, step)
        return await self.take(self.publish(method, model))

    async def take(self, release: Release) -> Proof:
        before, self.now = self.now, canary_of(self.model, release.version, CANARIES)
        await self.worker.canary(CANARIES[:1])
        await self.worker.update_weights(release._asdict())
        return compare(self.now, await self.worker.canary(CANARIES), before=before)

    async def ask(self, prompts: list[list[int]], sampling: Sampling) -> list[Sampled]:
        return [Sampled(*fields) for fields in await self.worker.generate(prompts, sampling._asdict())]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """With an adapter, and an engine that serves adapters."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() and not torch.cuda.is_available():
        pytest.skip("the CUDA build of vLLM is installed and there is no GPU: it cannot run here")
    plant = Plant(tmp_path_factory.mktemp("tied"), tied=True, lora=True)
    yield plant
    plant.worker.close()


@pytest.fixture(scope="module")
def untied(tied: Plant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """All weights trained, and a head of its own. (After `tied`, which skips where vLLM cannot run.)"""
    plant = Plant(tmp_path_factory.mktemp("untied"), tied=False, lora=False)
    yield plant
    plant.worker.close()


def logits_of(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


# sampling -------------------------------------------------------------------------------------------------------------
async def test_before_any_sync_the_worker_proves_the_base_policy(tied: Plant, untied: Plant) -> None:
    for plant in (tied, untied):
        proof = compare(plant.now, await plant.worker.canary(CANARIES))
        assert proof.holds and proof.worst < 1e-4
        assert plant.worker.facts() == {
            "version": 0, "block_size": BLOCK, "max_length": 512, "dtype": "float32", "gpu": False,
        }  # fmt: skip


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12),
        Sampling(12, temperature=0.6),
        Sampling(12, temperature=1.5, top_k=7),
        Sampling(12, temperature=0.9, top_p=0.8),
    ],
)
async def test_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(
    untied: Plant, sampling: Sampling
) -> None:
    import torch

    turns = await untied.ask(REAL, sampling)
    for prompt, turn in zip(REAL, turns, strict=True):
        logits = logits_of(untied.model, [*prompt, *turn.output_ids])[len(prompt) - 1 : -1] / sampling.temperature
        if sampling.top_k:
            lowest = logits.topk(sampling.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        if sampling.top_p < 1:
            values, order = logits.sort(descending=True)
            dropped = values.softmax(-1).cumsum(-1) - values.softmax(-1) >= sampling.top_p
            logits = torch.empty_like(logits).scatter(1, order, values.masked_fill(dropped, -torch.inf))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(turn.output_ids)[:, None])[:, 0]
        assert turn.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


async def test_a_turn_ends_with_its_end_token_or_at_its_length(untied: Plant) -> None:
    ends = tuple(range(10, 90))
    turns = await untied.ask(REAL * 4, Sampling(6, end_ids=ends))
    assert {turn.stop for turn in turns} == {"stop", "length"}
    for turn in turns:
        assert not set(turn.output_ids[:-1]) & set(ends)
        assert (turn.output_ids[-1] in ends) == (turn.stop == "stop")
        assert turn.stop == "stop" or len(turn.output_ids) == 6


async def test_more_prompts_than_the_engine_computes_at_once_are_answered_as_they_are_alone(untied: Plant) -> None:
    """Cut into pieces, the last one that fits would break the engine: on a CPU no piece's random number comes back."""
    prompts = [[(7 * number + 3 * place) % 300 + 10 for place in range(480)] for number in range(1, 17)]
    settings = untied.worker._working()._engine.vllm_config.scheduler_config
    assert sum(map(len, prompts)) > settings.max_num_batched_tokens
    together = await untied.ask(prompts, Sampling(3, seed=1))
    assert [one.output_ids for one in together] == [
        (await untied.ask([prompt], Sampling(3, seed=1 + number)))[0].output_ids
        for number, prompt in enumerate(prompts)
    ]


async def test_a_seed_gives_the_same_answers_in_any_company_and_equal_prompts_get_different_ones(untied: Plant) -> None:
    sampling = Sampling(10, seed=2**31 - 1)
    alone = await untied.ask(REAL[:1], sampling)
    together, _ = await asyncio.gather(untied.ask([REAL[0]] * 4, sampling), untied.ask(REAL, Sampling(30)))
    assert together[0].output_ids == alone[0].output_ids
    assert len({tuple(turn.output_ids) for turn in together}) == 4
    assert len({tuple(turn.output_ids) for turn in await untied.ask([REAL[0]] * 4, Sampling(10))}) == 4


async def test_calls_share_the_engines_steps_so_a_short_one_does_not_wait_for_a_long_one(untied: Plant) -> None:
    long = asyncio.ensure_future(untied.ask(REAL[:2], Sampling(400)))
    await asyncio.sleep(0.05)
    await untied.ask(REAL[2:3], Sampling(3))
    assert not long.done()
    assert [len(turn.output_ids) for turn in await long] == [400, 400]


async def test_a_prompt_that_is_too_long_fails_its_own_call_only(untied: Plant) -> None:
    other = asyncio.ensure_future(untied.ask(REAL[:1], Sampling(100)))
    with pytest.raises(RuntimeError, match=r"a prompt of 512 tokens: the engine takes 1 to 511 .*max_length"):
        await untied.ask([REAL[0], [9] * 512], Sampling(5))
    with pytest.raises(RuntimeError, match="a prompt of 0 tokens"):
        await untied.ask([[]], Sampling(5))
    assert await untied.ask([], Sampling(5)) == [] and await untied.worker.canary([[7]]) == [[]]
    assert len((await other)[0].output_ids) == 100


async def test_a_caller_that_gives_up_frees_the_engine(untied: Plant) -> None:
    call = asyncio.ensure_future(untied.ask(REAL, Sampling(400)))
    await asyncio.sleep(0.1)
    call.cancel()
    await untied.ask(REAL[:1], Sampling(2))
    assert untied.worker._running == []


# weights --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "lora", "reload", "lora", "volume", "reload", "checkpoint"])
async def test_every_method_brings_the_new_weights_with_a_tied_head(tied: Plant, method: Method) -> None:
    await check_sync(tied, method)


@pytest.mark.parametrize("method", ["reload", "reload", "volume", "reload", "checkpoint"])
async def test_every_method_brings_the_new_weights_with_a_head_of_its_own(untied: Plant, method: Method) -> None:
    await check_sync(untied, method)


async def check_sync(plant: Plant, method: Method) -> None:
    base = hash_file(plant.base)
    proof = await plant.sync(method, step=1e-2)
    assert proof.holds and proof.worst < 1e-4
    await check_turns(plant)
    assert hash_file(plant.base) == base


async def check_turns(plant: Plant) -> None:
    """Prompts longer than a block, asked before as well, are answered by the new weights."""
    turns = await plant.ask(REAL, Sampling(8))
    assert {turn.version for turn in turns} == {plant.version}
    for prompt, turn in zip(REAL, turns, strict=True):
        values = logits_of(plant.model, [*prompt, *turn.output_ids])[len(prompt) - 1 : -1].log_softmax(-1)
        expected = [values[place, token].item() for place, token in enumerate(turn.output_ids)]
        assert turn.logprobs == pytest.approx(expected, abs=1e-3)


async def test_turns_that_have_begun_end_on_the_old_weights_and_later_ones_wait_for_the_new(untied: Plant) -> None:
    old = untied.version
    before = asyncio.ensure_future(untied.ask(REAL[:2], Sampling(150)))
    await asyncio.sleep(0.05)
    train(untied.model)
    release = untied.publish()
    swap = asyncio.ensure_future(untied.worker.update_weights(release._asdict()))
    await asyncio.sleep(0)
    after = asyncio.ensure_future(untied.ask(REAL[:1], Sampling(3)))
    order = []
    for name, task in {"before": before, "swap": swap, "after": after}.items():
        task.add_done_callback(lambda _, name=name: order.append(name))
    assert {turn.version for turn in await before} == {old}
    assert {turn.version for turn in await after} == {release.version}
    assert order == ["before", "swap", "after"]


async def test_weights_that_are_refused_leave_the_old_ones_in_service(untied: Plant) -> None:
    assert (await untied.sync()).holds
    served = untied.now
    train(untied.model)
    release = untied.publish()
    config = Path(release.folder) / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(RuntimeError, match="not what was published"):
        await untied.worker.update_weights(release._asdict())
    assert compare(served, await untied.worker.canary(CANARIES)).holds
    assert {turn.version for turn in await untied.ask(REAL[:1], Sampling(2))} == {release.version - 1}
    assert (await untied.sync()).holds


# faults ---------------------------------------------------------------------------------------------------------------
Weights = Iterator[tuple[str, Any]]


def patch_weights(patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what is loaded, after it was checked."""
    real = engine_module._weights

    def changed(folder: Path) -> Weights:
        tensors = {name: tensor.clone() for name, tensor in real(folder)}
        change(tensors)
        return iter(tensors.items())

    patch.setattr(engine_module, "_weights", changed)


def skip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "reload", lambda engine, folder: engine.forget())


def keep_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "forget", lambda engine: None)
    patch.setattr(Engine, "cached_blocks", 0)


def stale_head(patch: pytest.MonkeyPatch) -> None:
    patch_weights(patch, lambda tensors: tensors.pop("lm_head.weight"))


def swap_tensors(patch: pytest.MonkeyPatch) -> None:
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    patch_weights(patch, lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))


def disturb_a_layer(patch: pytest.MonkeyPatch) -> None:
    patch_weights(patch, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1.003))


def miss_a_layer(patch: pytest.MonkeyPatch) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            del tensors[name]

    patch_weights(patch, drop)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        *((skip, step) for step in (1e-2, 1e-3, 1e-4)),
        *((keep_cache, step) for step in (1e-2, 1e-3)),
        *((swap_tensors, step) for step in (1e-2, 1e-4)),
        *((disturb_a_layer, step) for step in (1e-2, 1e-4)),
        *((miss_a_layer, step) for step in (1e-2, 1e-3)),
    ],
)
async def test_a_wrong_sync_cannot_prove_itself_and_a_right_one_mends_it(
    tied: Plant, fault: Callable[[pytest.MonkeyPatch], None], step: float
) -> None:
    assert (await tied.sync()).holds
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        proof = await tied.sync(step=step)
    assert not proof.holds and proof.why
    assert (await tied.sync()).holds


async def test_a_cache_that_is_kept_is_refused_however_small_the_step(untied: Plant) -> None:
    assert (await untied.sync()).holds
    release = untied.publish()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forget", lambda engine: None)
        with pytest.raises(RuntimeError, match="old weights are still in the cache"):
            await untied.worker.update_weights(release._asdict())
    with pytest.raises(RuntimeError, match="old weights are still in the cache"):
        await untied.ask(REAL[:1], Sampling(2))
    await untied.worker.update_weights(release._replace(method="volume")._asdict())
    assert compare(untied.now, await untied.worker.canary(CANARIES)).holds


async def test_a_head_that_stays_behind_its_embeddings_is_not_proven(tied: Plant) -> None:
    import torch

    embeddings = tied.plain.get_input_embeddings().weight
    was = embeddings.detach().clone()
    with torch.no_grad():
        embeddings.add_(torch.randn_like(embeddings) * 1e-4)
    with pytest.MonkeyPatch.context() as patch:
        stale_head(patch)
        assert not (await tied.sync(step=0)).holds
    assert (await tied.take(tied.publish())).holds
    with torch.no_grad():
        embeddings.copy_(was)


async def test_weights_of_another_run_are_refused_and_would_not_be_proven(tied: Plant) -> None:
    other = with_adapter(tiny(seed=9))
    assert not (await tied.sync(model=other)).holds
    foreign = publish(other, tied.weights / "other", version=5, step=5, method="reload", run="another")
    with pytest.raises(RuntimeError, match="of the run 'another'"):
        await tied.worker.update_weights(foreign._asdict())
    assert (await tied.sync()).holds


async def test_an_adapter_of_another_scale_is_not_proven(tied: Plant) -> None:
    assert (await tied.sync("lora", step=1e-2)).holds
    config = tied.model.peft_config["default"]
    config.lora_alpha *= 2  # what is written, not what the model does
    try:
        assert not (await tied.sync("lora")).holds
    finally:
        config.lora_alpha //= 2
    assert (await tied.sync("lora")).holds


async def test_an_adapter_is_never_put_on_merged_weights(tied: Plant) -> None:
    assert (await tied.sync("reload", step=1e-2)).holds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutWorker, "_renew", lambda *_: None)
        assert not (await tied.sync("lora")).holds
    tied.worker._engine.is_base = False  # type: ignore[union-attr]
    assert (await tied.sync("lora")).holds


async def test_an_engine_that_breaks_fails_its_calls_and_only_a_new_one_serves_again(untied: Plant) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of cheese")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", broken)
        calls = [asyncio.ensure_future(untied.ask(REAL[:1], Sampling(5))) for _ in range(2)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all("the engine broke: RuntimeError: out of cheese" in str(error) for error in errors)
    for asked in (untied.ask(REAL[:1], Sampling(5)), untied.worker.canary(CANARIES), untied.take(untied.publish())):
        with pytest.raises(RuntimeError, match="broke"):
            await asked
    # The folder that could not be loaded in place serves for a new engine.
    release = untied.publish("reload")._replace(method="volume")
    await untied.worker.update_weights(release._asdict())
    assert compare(canary_of(untied.model, 0, CANARIES), await untied.worker.canary(CANARIES)).holds


# the process ----------------------------------------------------------------------------------------------------------
def child_of(settings: EngineSettings, folder: Path) -> Child:
    values = environment() | {"OMP_NUM_THREADS": "1"}
    return Child(
        name="worker-0",
        command=command(settings),
        log=folder / "worker-0.log",
        environment=values,
        deadline=120,
        advice=ADVICE,
    )


@pytest_asyncio.fixture
async def remote(untied: Plant, tmp_path: Path) -> AsyncIterator[RemoteWorker]:
    worker = RemoteWorker(await start(child_of(untied.settings, tmp_path)))
    yield worker
    await worker.close()


async def test_a_worker_in_a_process_of_its_own_is_asked_synced_proven_and_killed(
    untied: Plant, remote: RemoteWorker
) -> None:
    facts = await remote.facts()
    assert (facts.version, facts.block_size, facts.max_length) == (0, BLOCK, 512)
    release = untied.publish("volume")._replace(method="reload")
    long = asyncio.ensure_future(remote.generate(REAL, Sampling(40, end_ids=(END,))))
    await asyncio.sleep(0.05)
    assert await remote.update_weights(release) > 0
    assert {turn.version for turn in await long} == {0}
    expected = canary_of(untied.model, release.version, CANARIES)
    assert compare(expected, await remote.canary(CANARIES)).holds
    [turn] = await remote.generate(REAL[:1], Sampling(4))
    assert isinstance(turn, Sampled) and turn.version == release.version
    with pytest.raises(RefusedError, match=r"worker-0: .*has no sync_manifest"):
        await remote.update_weights(release._replace(folder="/nowhere"))
    with pytest.raises(WorkerError, match="worker-0: a prompt of 600 tokens"):
        await remote.generate([[9] * 600], Sampling(5))
    call = asyncio.ensure_future(remote.generate(REAL, Sampling(400)))
    await asyncio.sleep(0.1)
    os.kill(remote._asked.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match="ended by SIGKILL"):
        await call


async def test_a_worker_that_cannot_start_says_why_and_what_to_change(untied: Plant, tmp_path: Path) -> None:
    most = untied.plain.config.max_position_embeddings
    with pytest.raises(ProgramError) as caught:
        await start(child_of(untied.settings.model_copy(update={"max_length": most + 1}), tmp_path))
    first, change, head, *shown = str(caught.value).split("\n")
    assert first.startswith("worker-0 did not start. It said: ") and f"max_model_len ({most + 1})" in first
    assert change.startswith(f"What to change: sampling.vllm.max_length: at most {most}, which is as long")
    assert str(tmp_path / "worker-0.log") in head and 20 < len(shown) <= 50


class Canned:
    """Answers what it was told to."""

    name = "worker-7"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def call(self, method: str, *arguments: Any, deadline: float | None = None) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def close(self) -> None: ...


GOOD = [[7, END], [-0.5, -1.0], "stop", 3]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([GOOD], "returned 1 turns to 2 prompts"),
        ([GOOD, [[], [], "stop", 3]], "returned 0 tokens"),
        ([GOOD, [[7, END], [-0.5], "stop", 3]], "returned 2 tokens with 1 log-prob"),
        ([GOOD, [[7] * 9, [-0.5] * 9, "length", 3]], "returned 9 tokens .* 1 to 8 were asked"),
        ([GOOD, [[7, 8], [-0.5, -1.0], "stop", 3]], "ended a turn with token 8"),
        ([GOOD, [[7, END], [-0.5, float("nan")], "stop", 3]], "a log-probability that is none"),
        ([GOOD, [[7, END], [-0.5, 0.3], "stop", 3]], "a log-probability that is none"),
        (RpcError("died", "worker-7 (process 12) ended with status 1"), r"^worker-7 \(process 12\) ended"),
        (RpcError("EngineError", "the engine broke"), "^worker-7: the engine broke"),
    ],
)
async def test_an_answer_that_is_short_or_wrong_is_an_error_of_the_worker(answer: Any, message: str) -> None:
    good = RemoteWorker(Canned([GOOD, GOOD]))
    assert await good.generate([[1], [2]], Sampling(8, end_ids=(END,))) == [Sampled(*GOOD)] * 2
    with pytest.raises(WorkerError, match=message):
        await RemoteWorker(Canned(answer)).generate([[1], [2]], Sampling(8, end_ids=(END,)))


def test_settings_come_from_the_config_and_travel_as_json() -> None:
    config = load_config(
        "configs/smoke/decisions.yaml",
        {"sampling.vllm.max_length": 300, "sampling.vllm.block_size": 64, "model.name": "some/model",
         "model.revision": "abc", "lora.r": 12, "training.seed": 4},
    )  # fmt: skip
    settings = EngineSettings.of(config, "a-run", "some/model", "bfloat16")
    assert (settings.max_length, settings.block_size, settings.revision) == (300, 64, "abc")
    assert (settings.lora_rank, settings.seed, settings.dtype, settings.run) == (None, 4, "bfloat16", "a-run")
    assert EngineSettings.of(config, "a-run", "/a/starter", "float32").revision is None
    assert EngineSettings.model_validate_json(command(settings)[-1]) == settings


def test_an_adapter_on_a_mixture_of_experts_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and vLLM takes it then")
    mixture = str(tiny_qwen3_moe(tmp_path / "mixture"))
    with pytest.raises(EngineError, match=r"mixture is a mixture of experts.*distributed\.sync_method to reload"):
        Engine(EngineSettings(run="a-run", model=mixture, lora_rank=4))
