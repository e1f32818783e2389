"""Seconds a training step takes in the local backend, against a plain TRL script that does the same work.

A = lib.backends.local.train, as notebook 3's child process calls it: real config, real run folder, rollouts.jsonl and
metrics.jsonl written, the task's scorer behind the rollout loop. B = what a person would write with TRL alone: a stock
GRPOTrainer, prompts as messages, a reward function that calls the same scorer. Both start from the same starter
policy with the same LoRA, batch, group, seed, threads, and without gradient checkpointing.

A pair is two fresh processes that take turns, step by step, in the order A B B A: only one of them computes at any
time, so that a slow moment of the machine meets both. Step i is the same work on both sides, which is checked: all
rewards, all answers and the final adapter must be equal bit for bit. (`on_invalid: zero`, because masked answers are
something that plain TRL cannot do.) The first steps are left out.

Exit status 0 = bit-identical and the median over pairs of A's median step / B's median step is within the bar, else 1.
On a machine that others use, read `others`: above 0.3 cores a ratio says little.

    python benchmarks/step_time.py                      # 5 pairs of 10 steps, about 4 minutes on 2 quiet cores
    python benchmarks/step_time.py --steps 30 --pairs 7
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from machine import NOISY, Others, shown

from lib.config import Config, load_config
from lib.prepare import prepare
from lib.runfolder import Run, open_run, read_lines, read_run
from lib.task import Rollout, Row, Task, Turn, load_task

BAR = 1.03
WARM = 2
"""First steps of each process that are not counted."""


class Result(NamedTuple):
    """What one process hands back: its answers and rewards, step after step, and its adapter."""

    rollouts: list[tuple[int, str, float]]
    adapter: Path


class Never:
    """The backend's stop signal, never given."""

    def requested(self) -> bool:
        return False


def train_ours(run: Run, folder: Path) -> Result:
    """Side A: the backend's own training, in this process."""
    from lib.backends import local

    output = local.train(run.config, _task(run.config), run.read_rows("train"), run, Never())
    assert output is not None
    records = read_lines(run.folder / "rollouts.jsonl")
    return Result([(r["step"], r["completion"], r["reward"]) for r in records], output)


def train_plain(run: Run, folder: Path) -> Result:
    """Side B: the script that one would write with TRL alone. From `run` it takes numbers and rows only."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    training, sampling, lora = run.config.training, run.config.sampling, run.config.lora
    task = _task(run.config)
    seen: list[tuple[int, str, float]] = []

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **columns: Any
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for i, (prompt, completion, ids) in enumerate(zip(prompts, completions, completion_ids, strict=True)):
            row = {"prompt": prompt, "q": columns["q"][i], "rewards": columns["rewards"][i]}
            ended = ids[-1] == tokenizer.eos_token_id
            earned = _score(task, row, completion[0], ended)
            rewards.append(earned)
            seen.append((trainer_state.global_step + 1, completion[0]["content"], earned))
        return rewards

    source = _starter(run.config)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", truncation_side="left")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="sdpa").eval()
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    columns = ("prompt", "q", "rewards")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "checkpoints"),
            max_steps=training.steps,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup,
            lr_scheduler_type=training.schedule,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            per_device_train_batch_size=training.batch,
            gradient_accumulation_steps=training.accumulation,
            steps_per_generation=training.steps_per_generation,
            num_generations=training.group_size,
            num_iterations=training.iterations,
            beta=training.beta,
            loss_type=training.loss_type,
            epsilon=training.clip_low,
            epsilon_high=training.clip_high,
            scale_rewards=training.reward_scaling,
            max_completion_length=sampling.completion_limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=training.seed,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="steps",
            save_steps=training.save_steps,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in run.read_rows("train")]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return Result(seen, folder / "adapter")


SIDES: dict[str, Callable[[Run, Path], Result]] = {"A": train_ours, "B": train_plain}


def _score(task: Task, row: Row, message: dict[str, str], ended: bool) -> float:
    """The task's scorer, called synchronously: this task's awaits nothing."""
    turn = Turn(message=message, stop="stop" if ended else "length")
    rollout = Rollout(row=row, messages=(*row["prompt"], message), turns=(turn,), stop="done" if ended else "length")
    try:
        task.score(rollout).send(None)
    except StopIteration as done:
        assert done.value.reward is not None
        return float(done.value.reward)
    raise RuntimeError("the scorer awaits something: this benchmark takes a task that does not")


def _task(config: Config) -> Task:
    return load_task(config.task.name, **config.task.params)


def _starter(config: Config) -> str:
    """The starter policy in the benchmark's cache (made before the sides start)."""
    (found,) = [path.parent for path in Path(config.paths.cache).glob("starter/*/config.json")]
    return str(found)


def side_main(name: str, run_folder: str, folder: str, turn: Connection) -> None:
    """A side's process: train, pausing at the end of every step until it is this side's turn; sends (kind, value)."""
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    from transformers import TrainerCallback, trainer

    class TakeTurns(TrainerCallback):
        """Ends a timed step, waits for the next turn, and starts the next one."""

        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.send(("ready", torch.get_num_threads()))
            turn.recv()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.send(("step", time.perf_counter() - self.started))
            turn.recv()
            self.started = time.perf_counter()

    # Comes before all other callbacks: what our own does at a step's end falls into the next step, on both sides.
    trainer.DEFAULT_CALLBACKS.append(TakeTurns)  # type: ignore[arg-type]
    result = SIDES[name](read_run(run_folder), Path(folder))
    turn.send(("done", result))


class Pair(NamedTuple):
    seconds: dict[str, list[float]]
    """Per side the times of all steps but the first ones."""
    results: dict[str, Result]
    threads: dict[str, int]
    others: float


def run_pair(run: Run, folder: Path, number: int) -> Pair:
    """Two fresh processes, step by step in turns: A B, B A, A B ... (the next pair the other way round)."""
    context = multiprocessing.get_context("spawn")
    load = Others()
    turns: dict[str, Connection] = {}
    processes = {}
    for name in SIDES:
        place = folder / f"{number}{name}"
        place.mkdir()
        config = run.config.model_copy(update={"paths": run.config.paths.model_copy(update={"outputs": str(place)})})
        own = open_run("run", config)
        (own.path("rows", "train.jsonl")).symlink_to(run.path("rows", "train.jsonl"))
        turns[name], theirs = context.Pipe()
        processes[name] = context.Process(
            target=side_main, args=(name, str(own.folder), str(place), theirs), daemon=True
        )
        processes[name].start()
        theirs.close()

    def receive(name: str, kind: str) -> Any:
        try:
            got, value = turns[name].recv()
        except EOFError:
            tail = (folder / f"{number}{name}" / "log.txt").read_text()[-3000:]
            raise SystemExit(f"side {name} of pair {number} failed:\n{tail}") from None
        assert got == kind, (got, kind)
        return value

    threads = {name: receive(name, "ready") for name in SIDES}  # both import at once: nothing is timed yet
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for step in range(run.config.training.steps):
        for name in sorted(SIDES, reverse=(step + number) % 2 == 1):
            turns[name].send("go")
            seconds[name].append(receive(name, "step"))
    results = {}
    for name in SIDES:
        turns[name].send("go")
        results[name] = receive(name, "done")
        processes[name].join()
    return Pair({name: values[WARM:] for name, values in seconds.items()}, results, threads, load.cores())


def differences(one: Result, other: Result) -> list[str]:
    """What is not the same bit for bit."""
    from safetensors.numpy import load_file

    found = []
    if [r[2] for r in one.rollouts] != [r[2] for r in other.rollouts]:
        steps = [a[0] for a, b in zip(one.rollouts, other.rollouts, strict=False) if a[2] != b[2]]
        found.append(f"rewards, first in step {min(steps, default=0)}")
    if [r[:2] for r in one.rollouts] != [r[:2] for r in other.rollouts]:
        found.append("answers")
    a, b = (load_file(result.adapter / "adapter_model.safetensors") for result in (one, other))
    changed = [key for key in a if key not in b or a[key].tobytes() != b[key].tobytes()]
    if changed or a.keys() != b.keys():
        found.append(f"{len(changed)} of {len(a)} adapter tensors")
    return found


def set_up(folder: Path, config_path: str, steps: int) -> Run:
    """The rows and the starter policy that all processes share."""
    overrides = {
        "training.steps": steps,
        "training.save_steps": steps,  # a checkpoint at the end only: it falls into no timed step
        "model.gradient_checkpointing": False,
        "task.on_invalid": "zero",
        "paths.outputs": str(folder),
        "paths.cache": str(folder / "cache"),
    }
    config = load_config(config_path, overrides)
    run = open_run("shared", config)
    prepare(_task(config), run)
    process = multiprocessing.get_context("spawn").Process(target=make_starter, args=(str(run.folder),))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the starter policy could not be made")
    return run


def make_starter(run_folder: str) -> None:
    """In a process of its own, so that this one never imports torch."""
    from lib.models import resolve_model

    run = read_run(run_folder)
    resolve_model(run.config, run.read_rows("train"))


def report(pairs: Sequence[Pair]) -> int:
    """The verdict; 0 = within the bar and bit-identical."""
    ratios = [statistics.median(p.seconds["A"]) / statistics.median(p.seconds["B"]) for p in pairs]
    steps = [a / b for p in pairs for a, b in zip(p.seconds["A"], p.seconds["B"], strict=True)]
    middle, others = statistics.median(ratios), statistics.median(p.others for p in pairs)
    problems = [f"pair {i}: {text}" for i, p in enumerate(pairs, 1) for text in differences(*p.results.values())]
    problems += [f"pair {i}: threads {p.threads}" for i, p in enumerate(pairs, 1) if len(set(p.threads.values())) > 1]
    first = pairs[0].results["A"]
    problems += [
        f"pair {i} and 1: {text}" for i, p in enumerate(pairs, 1) for text in differences(first, p.results["A"])
    ]
    count = len(first.rollouts)
    print(f"\nrewards ({count} a process), answers, final adapter: {'bit-identical' if not problems else 'DIFFERENT'}")
    for problem in problems:
        print(f"  {problem}")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"step time ours / plain TRL: median of {len(ratios)} pairs {middle:.3f}, spread {spread}")
    print(f"  all {len(steps)} steps one by one: median {statistics.median(steps):.3f}, middle half "
          f"{_quantile(steps, 1):.3f} to {_quantile(steps, 3):.3f}")  # fmt: skip
    print(f"  others: median {shown(others)} cores; {sum(p.others > NOISY for p in pairs)} of {len(pairs)} pairs noisy")
    passed = middle <= BAR and not problems
    print(f"verdict: {'PASS' if passed else 'FAIL'} (bar {BAR})")
    return 0 if passed else 1


def _quantile(values: Sequence[float], quarter: int) -> float:
    return statistics.quantiles(values, n=4)[quarter - 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", default="configs/decisions.yaml")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help=f"steps of each process; the first {WARM} are left out")
    parser.add_argument("--json", type=Path, help="also write all step times to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-time-") as name:
        run = set_up(Path(name), options.config, options.steps)
        training = run.config.training
        print(f"{options.config}: {training.batch} completions a step in groups of {training.group_size}, "
              f"{options.steps} steps, seed {training.seed}, {options.pairs} pairs")  # fmt: skip
        pairs = []
        for number in range(1, options.pairs + 1):
            pair = run_pair(run, Path(name), number)
            pairs.append(pair)
            ours, plain = (1000 * statistics.median(pair.seconds[side]) for side in SIDES)
            print(f"pair {number}: ours {ours:6.0f} ms  plain {plain:6.0f} ms  ratio {ours / plain:.3f}  "
                  f"others {shown(pair.others)}", flush=True)  # fmt: skip
        if options.json:
            record = [{"seconds": pair.seconds, "others": pair.others} for pair in pairs]
            options.json.write_text(json.dumps(record), encoding="utf-8")
        return report(pairs)


if __name__ == "__main__":
    sys.exit(main())
