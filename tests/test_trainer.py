"""The TRL subclass: what is pinned, and that a rollout left out counts as if it had never been there."""

from __future__ import annotations

import ast
import gc
import inspect
import json
import logging
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lib.config import parse_config
from lib.runfolder import Run
from lib.starter import build_tokenizer
from lib.task import Row
from lib.trainer import Batch, finished_reward, make_trainer_class
from lib.training import trl_arguments

LIMIT = 8
"""Tokens that an answer may have."""

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo")


class Answer(NamedTuple):
    """One finished rollout: `mask` as the world left it, `reward` None where it is not to count."""

    ids: list[int]
    mask: list[int]
    reward: float | None


Groups = list[list[Answer]]


def group(seed: int, *rewards: float | None, worlds: bool = False) -> list[Answer]:
    """Answers of different lengths to one prompt; with `worlds`, some tokens in the middle are not the policy's."""
    random = torch.Generator().manual_seed(seed)
    answers = []
    for reward in rewards:
        length = int(torch.randint(3, LIMIT + 1, (1,), generator=random))
        mask = [0 if worlds and i == 1 else 1 for i in range(length)]
        answers.append(Answer(torch.randint(5, 200, (length,), generator=random).tolist(), mask, reward))
    return answers


def prompt_ids(index: int) -> list[int]:
    return [7 + index, *range(20, 24 + 3 * index)]


class Fixed:
    """A Source that always answers the same; `mask_out`: leave rows without a reward out by their mask, as we do."""

    def __init__(self, groups: Groups, mask_out: bool = True, logprobs: bool = False) -> None:
        self.groups, self.mask_out, self.logprobs = groups, mask_out, logprobs

    def __call__(self, trainer: Any, rows: list[Row]) -> Batch:
        size = trainer.num_generations
        indices = [row["index"] for row in rows]
        answers = [self.groups[index][i % size] for i, index in enumerate(indices)]
        left_out = [self.mask_out and answer.reward is None for answer in answers]
        return Batch(
            prompt_ids=[prompt_ids(index) for index in indices],
            output_ids=[answer.ids for answer in answers],
            mask=[[0] * len(a.mask) if out else a.mask for a, out in zip(answers, left_out, strict=True)],
            logprobs=[[-1.5] * len(answer.ids) for answer in answers] if self.logprobs else None,
            rewards=[answer.reward for answer in answers],
            metrics={"groups/useful": 0.5, "parts/valid": 0.25},
        )


class Watch(TrainerCallback):
    """Keeps the gradients of every step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = sorted((n, p) for n, p in kwargs["model"].named_parameters() if p.requires_grad)
        self.gradients.append(torch.cat([p.grad.flatten().clone() for _, p in named]))


class Trained(NamedTuple):
    gradients: list[torch.Tensor]
    weights: torch.Tensor
    moved: float
    logs: list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Each training collects garbage once, which takes most of a second with all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)  # it warns of every None
    return build_tokenizer(["user\n", "assistant\n", "yes no"] * 5)


def policy(tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), initializer_range=0.3, **shape)).double()  # type: ignore[no-any-return]


def trainer_on(
    folder: Path, tokenizer: Any, groups: Groups, source: Any = None, steps: int = 3, **arguments: Any
) -> Any:
    size = len(groups[0])
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": 1e-2, "num_generations": size,
        "max_completion_length": LIMIT, "per_device_train_batch_size": size * len(groups), "beta": 0.3,
        "max_grad_norm": 1e9, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    trainer: Any = make_trainer_class()(
        model=policy(tokenizer),
        reward_funcs=finished_reward,
        args=GRPOConfig(**settings | arguments),
        train_dataset=Dataset.from_dict({"prompt": [json.dumps({"index": i}) for i in range(len(groups))]}),
        processing_class=tokenizer,
        # Not zero at the start: the KL to the base then has a gradient from the first step on.
        peft_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.source = source or Fixed(groups)
    return trainer


def trained(folder: Path, tokenizer: Any, groups: Groups, source: Any = None, **arguments: Any) -> Trained:
    trainer = trainer_on(folder, tokenizer, groups, source, **arguments)
    watch = Watch()
    trainer.add_callback(watch)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    return Trained(watch.gradients, after, float((after - before).abs().max()), trainer.state.log_history)


def weights(trainer: Any) -> torch.Tensor:
    named = sorted((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    return torch.cat([p.detach().flatten().clone() for _, p in named])


def only_scored(groups: Groups) -> Groups:
    return [[answer for answer in some if answer.reward is not None] for some in groups]


def assert_same(one: Trained, other: Trained, tolerance: float = 1e-6) -> None:
    assert len(one.gradients) == len(other.gradients) > 0 and one.moved > 1e-3
    for first, second in zip(one.gradients, other.gradients, strict=True):
        assert torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(second.abs().max()))
    assert torch.allclose(one.weights, other.weights, rtol=0, atol=tolerance)


def difference(one: Trained, other: Trained) -> float:
    """How far the first gradients lie apart, relative to their size."""
    return float((one.gradients[0] - other.gradients[0]).norm() / other.gradients[0].norm())


HALF = [group(1, 1.0, None, 0.25, None), group(2, None, 0.0, None, 0.75)]


# -- what is pinned ---------------------------------------------------------------------------------------------------


def test_trl_is_the_version_that_the_subclass_was_written_for() -> None:
    assert trl.__version__ == "1.16.0"


def test_the_overridden_method_takes_prompts_and_nothing_else() -> None:
    assert list(inspect.signature(GRPOTrainer._generate).parameters) == ["self", "prompts"]
    assert list(inspect.signature(make_trainer_class()._generate).parameters) == ["self", "prompts"]


def test_the_overridden_method_returns_eight_items_that_its_caller_unpacks_in_our_order() -> None:
    source = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate)))
    (returned,) = [node.value for node in ast.walk(source) if isinstance(node, ast.Return)]
    assert isinstance(returned, ast.Tuple) and len(returned.elts) == 8
    caller = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    (unpacked,) = [
        [ast.unparse(name) for name in node.targets[0].elts]
        for node in ast.walk(caller)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value) == "self._generate(prompts)"
        and isinstance(node.targets[0], ast.Tuple)
    ]
    assert unpacked == [
        "prompt_ids_list", "completion_ids_list", "tool_mask_list", "completions", "sampling_per_token_logps_list",
        "extra_fields", "images", "tool_images",
    ]  # fmt: skip


def test_the_subclass_is_made_once_and_overrides_four_methods_only() -> None:
    subclass = make_trainer_class()
    assert make_trainer_class() is subclass and subclass.__bases__ == (GRPOTrainer,)
    overridden = {name for name in vars(subclass) if callable(vars(subclass)[name])}
    assert overridden == {
        "_generate",
        "_generate_and_score_completions",
        "_compute_loss",
        "_get_train_sampler",
    }


def test_finished_rewards_are_handed_on_as_they_came() -> None:
    rewards = [0.5, None, 1.0]
    assert finished_reward(completions=["", "", ""], reward_value=rewards, prompts=[]) == rewards


# -- left out is as if it had never been there ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_half_a_group_unscored_trains_like_a_batch_without_it(tmp_path: Path, tokenizer: Any, loss: str) -> None:
    ours = trained(tmp_path, tokenizer, HALF, loss_type=loss)
    absent = trained(tmp_path, tokenizer, only_scored(HALF), loss_type=loss)
    assert_same(ours, absent)


@pytest.mark.parametrize(("loss", "beta"), [(loss, 0.3) for loss in LOSSES] + [("dapo", 0.0), ("grpo", 0.0)])
def test_trls_none_alone_does_not(tmp_path: Path, tokenizer: Any, loss: str, beta: float) -> None:
    stock = trained(tmp_path, tokenizer, HALF, Fixed(HALF, mask_out=False), loss_type=loss, beta=beta, steps=1)
    absent = trained(tmp_path, tokenizer, only_scored(HALF), loss_type=loss, beta=beta, steps=1)
    assert difference(stock, absent) > 0.2


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_every_reward_scaling_leaves_unscored_rollouts_out(tmp_path: Path, tokenizer: Any, scaling: str) -> None:
    ours = trained(tmp_path, tokenizer, HALF, scale_rewards=scaling, steps=1)
    assert_same(ours, trained(tmp_path, tokenizer, only_scored(HALF), scale_rewards=scaling, steps=1))


def test_the_entropy_bonus_leaves_unscored_rollouts_out(tmp_path: Path, tokenizer: Any) -> None:
    ours = trained(tmp_path, tokenizer, HALF, entropy_coef=0.1, steps=1)
    assert_same(ours, trained(tmp_path, tokenizer, only_scored(HALF), entropy_coef=0.1, steps=1))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_without_a_single_score_is_as_if_it_had_not_been_asked(
    tmp_path: Path, tokenizer: Any, loss: str
) -> None:
    groups = [group(1, 1.0, 0.5, 0.0), group(2, None, None, None)]
    ours = trained(tmp_path, tokenizer, groups, loss_type=loss, steps=2)
    assert_same(ours, trained(tmp_path, tokenizer, groups[:1], loss_type=loss, steps=2))


def test_several_passes_over_the_same_samples_leave_them_out_too(tmp_path: Path, tokenizer: Any) -> None:
    arguments = {"num_iterations": 2, "steps": 4, "beta": 0.3}
    assert_same(
        trained(tmp_path, tokenizer, HALF, **arguments), trained(tmp_path, tokenizer, only_scored(HALF), **arguments)
    )


UNEVEN = [group(5, 1.0, 0.5, 0.0, None)]
"""Over two passes of two rows, one pass keeps two rows and the other one, whatever the shuffle."""


def test_over_several_passes_dapo_weighs_every_token_the_same(tmp_path: Path, tokenizer: Any) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = trained(tmp_path, tokenizer, UNEVEN, **split, loss_type="dapo", steps=2)
    assert_same(ours, trained(tmp_path, tokenizer, only_scored(UNEVEN), loss_type="dapo", steps=2))


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "luspo"])
def test_over_several_passes_every_row_weighs_the_same(tmp_path: Path, tokenizer: Any, loss: str) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = trained(tmp_path, tokenizer, UNEVEN, **split, loss_type=loss, steps=1)
    assert_same(ours, trained(tmp_path, tokenizer, only_scored(UNEVEN), loss_type=loss, steps=1))


def test_where_nothing_is_left_out_the_subclass_is_stock_trl(tmp_path: Path, tokenizer: Any) -> None:
    groups = only_scored(HALF)
    ours = trained(tmp_path, tokenizer, groups, loss_type="grpo")
    assert_same(
        ours, trained(tmp_path, tokenizer, groups, Fixed(groups, mask_out=False), loss_type="grpo"), tolerance=0
    )


# -- nothing to learn from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_every_rollout_masked_moves_nothing_and_is_finite(
    tmp_path: Path, tokenizer: Any, loss: str
) -> None:
    nothing = [group(1, None, None, None), group(2, None, None, None)]
    found = trained(tmp_path, tokenizer, nothing, loss_type=loss, entropy_coef=0.1)
    assert len(found.gradients) == 3 and all(float(gradient.abs().max()) == 0 for gradient in found.gradients)
    assert found.moved == 0 and bool(torch.isfinite(found.weights).all())
    steps = [log for log in found.logs if "reward" in log]
    assert [log["loss"] for log in steps] == [0.0] * 3 and [log["grad_norm"] for log in steps] == [0.0] * 3
    assert [log["reward"] for log in steps] == [None] * 3  # there is none, and nothing else is missing
    assert all(math.isfinite(log[name]) for log in steps for name in ("kl", "entropy", "learning_rate"))


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_one_scored_rollout_of_a_group_has_nothing_to_be_compared_with(
    tmp_path: Path, tokenizer: Any, scaling: str
) -> None:
    groups = [group(1, 1.0, None, None)]
    found = trained(tmp_path, tokenizer, groups, scale_rewards=scaling, beta=0.0, steps=1)
    assert float(found.gradients[0].abs().max()) == 0 and bool(torch.isfinite(found.weights).all())


def test_training_goes_on_after_a_step_with_nothing_in_it(tmp_path: Path, tokenizer: Any) -> None:
    class Sometimes(Fixed):
        calls = 0

        def __call__(self, trainer: Any, rows: list[Row]) -> Batch:
            self.calls += 1
            batch = super().__call__(trainer, rows)
            if self.calls != 2:
                return batch
            return batch._replace(mask=[[0] * len(mask) for mask in batch.mask], rewards=[None] * len(batch.rewards))

    groups = only_scored(HALF)
    found = trained(tmp_path, tokenizer, groups, Sometimes(groups))
    assert [float(gradient.abs().max()) > 0 for gradient in found.gradients] == [True, False, True]
    assert bool(torch.isfinite(found.weights).all())


# -- tokens -----------------------------------------------------------------------------------------------------------


def by_hand(tokenizer: Any, folder: Path, groups: Groups) -> torch.Tensor:
    """The gradient of DAPO's loss at the sampling policy: mean over trained tokens of -advantage * log-probability."""
    trainer = trainer_on(folder, tokenizer, groups)
    model = trainer.model
    model.train()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for index, some in enumerate(groups):
        rewards = torch.tensor([answer.reward for answer in some if answer.reward is not None], dtype=torch.float64)
        for answer in some:
            if answer.reward is None:
                continue
            advantage = (answer.reward - rewards.mean()) / (rewards.std() + 1e-4)
            prompt = prompt_ids(index)
            logits = model(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            total = total - advantage * (logprobs * torch.tensor(answer.mask)).sum()
            tokens += sum(answer.mask)
    (total / tokens).backward()
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten() for _, p in named])


@pytest.mark.parametrize("worlds", [False, True], ids=["one turn", "with the world's tokens"])
def test_the_gradient_is_the_one_of_the_formula(tmp_path: Path, tokenizer: Any, worlds: bool) -> None:
    groups = [group(1, 1.0, None, 0.25, 0.5, worlds=worlds), group(2, 0.0, 0.0, None, 0.75, worlds=worlds)]
    found = trained(tmp_path, tokenizer, groups, beta=0.0, steps=1)
    expected = by_hand(tokenizer, tmp_path, groups)
    # TRL keeps advantages in float32.
    assert torch.allclose(found.gradients[0], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_log_probabilities_may_come_along_or_not(tmp_path: Path, tokenizer: Any) -> None:
    with_them = trained(tmp_path, tokenizer, HALF, Fixed(HALF, logprobs=True))
    assert_same(with_them, trained(tmp_path, tokenizer, HALF, Fixed(HALF, logprobs=False)), tolerance=0)


# -- what is logged ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One run in which the second group's third answer has no reward, and one answer ends with its end token."""
    groups = [group(1, 1.0, 0.5, 0.25), group(2, 0.0, 0.5, None)]
    groups[0][0] = groups[0][0]._replace(ids=[9, 9, tokenizer.eos_token_id], mask=[1, 0, 1])
    found = trained(tmp_path_factory.mktemp("logs"), tokenizer, groups, loss_type="grpo")
    return [log for log in found.logs if "reward" in log]


def test_the_batchs_own_metrics_are_logged_every_step(logs: list[dict[str, Any]]) -> None:
    assert [log["groups/useful"] for log in logs] == [0.5] * 3 and [log["parts/valid"] for log in logs] == [0.25] * 3


def test_the_logged_reward_is_the_mean_of_the_scored_rollouts(logs: list[dict[str, Any]]) -> None:
    assert all(log["reward"] == pytest.approx((1.0 + 0.5 + 0.25 + 0.0 + 0.5) / 5) for log in logs)


def test_loss_kl_entropy_and_gradient_are_logged_and_finite(logs: list[dict[str, Any]]) -> None:
    for log in logs:
        assert all(
            math.isfinite(log[name]) for name in ("loss", "kl", "entropy", "grad_norm", "reward_std", "learning_rate")
        )
        assert log["kl"] > 0 and log["entropy"] > 0 and log["grad_norm"] > 0


def test_the_share_cut_off_is_that_without_an_end_token(logs: list[dict[str, Any]]) -> None:
    assert [log["completions/clipped_ratio"] for log in logs] == [pytest.approx(5 / 6)] * 3


def test_tokens_are_counted_up(logs: list[dict[str, Any]]) -> None:
    counts = [log["num_tokens"] for log in logs]
    assert counts[0] > 0 and counts == [counts[0] * i for i in (1, 2, 3)]


def test_the_logged_length_is_that_of_answers_and_not_of_what_is_left_of_them(tmp_path: Path, tokenizer: Any) -> None:
    found = trained(tmp_path, tokenizer, HALF, steps=1)
    mean_of_all, mean_of_scored = (
        sum(lengths) / len(lengths)
        for lengths in ([len(answer.ids) for some in groups for answer in some] for groups in (HALF, only_scored(HALF)))
    )
    assert mean_of_all != mean_of_scored
    logged = found.logs[0]["completions/mean_length"]
    assert logged in (pytest.approx(mean_of_all), pytest.approx(mean_of_scored))  # either is a length of answers


def test_the_phase_tells_sampling_from_loss(tmp_path: Path, tokenizer: Any) -> None:
    seen: list[str] = []

    class Watching(Fixed):
        def __call__(self, trainer: Any, rows: list[Row]) -> Batch:
            seen.append(trainer.phase)
            return super().__call__(trainer, rows)

    trainer = trainer_on(tmp_path, tokenizer, HALF, Watching(HALF), steps=1)
    assert trainer.phase == "starting"
    trainer.train()
    assert seen == ["sampling"] and trainer.phase == "loss"


# -- from our config to TRL's -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield Run(tmp_path, parse_config({"task": {"name": "decisions"}}))


@pytest.mark.parametrize(
    "training",
    [
        {"batch": 8, "group_size": 8},
        {"batch": 2, "accumulation": 4, "group_size": 8},
        {"batch": 2, "steps_per_generation": 6, "accumulation": 2, "group_size": 4, "iterations": 2, "save_steps": 6},
        {"batch": 3, "steps_per_generation": 4, "accumulation": 6, "group_size": 6, "save_steps": 2},
    ],
)
def test_an_accepted_config_is_one_that_trl_takes(run: Run, training: dict[str, Any]) -> None:
    config = parse_config({"task": {"name": "decisions"}, "training": training})
    arguments = GRPOConfig(**trl_arguments(config, run, checkpointing=False))
    t = config.training
    assert arguments.generation_batch_size == t.batch * t.passes_per_generation
    assert arguments.steps_per_generation == t.passes_per_generation
    assert (arguments.num_generations, arguments.num_iterations) == (t.group_size, t.iterations)


def test_the_engine_gets_its_share_of_memory_and_its_longest_context(run: Run) -> None:
    vllm = {"memory_share": 0.3, "max_length": 4096}
    config = parse_config({"task": {"name": "decisions"}, "sampling": {"vllm": vllm}})
    arguments = GRPOConfig(**trl_arguments(config, run, checkpointing=False))
    assert (arguments.vllm_gpu_memory_utilization, arguments.vllm_max_model_length) == (0.3, 4096)
