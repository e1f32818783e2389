"""Held-out evaluation: every policy of a run answers the same rows.

Owns which policies are evaluated, sampling, and the records in `evaluation/`. Must not know training.

    python -m lib.run notebooks/4_adapter_evaluation.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import models
from lib.config import Config, resolve_path
from lib.generate import Chat, batched, end_ids, local_sample, within_limit
from lib.paired import Gain, Summary, compare, summarize
from lib.rollout import BatchGenerate, check_unscored, collect
from lib.runfolder import (
    Run,
    RunError,
    atomic_file,
    base_hash,
    plain,
    read_lines,
    task_file_hash,
    to_line,
    weights_hash,
    write_json,
)
from lib.tables import JsonlTable
from lib.task import Row, Task

logger = logging.getLogger(__name__)

STAGE = "evaluation"
SECTIONS = ("task", "model", "starter", "sampling", "rewards", "evaluation")
BASE = "base"


class Policy(NamedTuple):
    """What is evaluated: the base model, or an adapter or whole model on disk."""

    name: str
    path: str | None
    is_adapter: bool


class Comparison(NamedTuple):
    """All policies on the same held-out rows. Keys of `records` and `gains`: "<policy> <sampled|greedy>"."""

    records: dict[str, list[dict[str, Any]]]
    summaries: list[Summary]
    gains: dict[str, Gain]
    """Gain of each policy over the base with the same decoding."""
    over_greedy_base: Gain | None
    """The last policy's sampled answers against the base's greedy ones: what is more than sharpening."""
    final: str


def answer_rows(
    task: Task, rows: Sequence[Row], generate: BatchGenerate, samples: int, max_unscored: float, where: str
) -> list[dict[str, Any]]:
    """Answer every row `samples` times and score the answers: one plain record each, in row order.

    Raises UnscoredLimitError where more than a share `max_unscored` could not be judged.
    """
    repeated = [row for row in rows for _ in range(samples)]
    scored = collect(task, repeated, generate)
    check_unscored((s.score for s in scored), max_unscored, where)
    return [
        {
            "row": rollout.row["id"],
            "category": rollout.row.get("category"),
            "prompt": rollout.row["prompt"][-1].get("content"),
            "answer": rollout.text,
            "reward": score.reward,
            "masked": score.masked,
            "parts": score.parts,
            "notes": score.notes,
            "stop": rollout.stop,
        }
        for rollout, score in scored
    ]


def evaluate_run(config: Config, task: Task, run: Run) -> Comparison:
    """Evaluate base, checkpoints and result of a run (or what evaluation.adapter / .model name) on held-out rows.

    Resumable: a policy whose answers are on disk is not asked again. Raises UnscoredLimitError.
    """
    rows = held_out_rows(config, run)
    policies = policies_of(config, run)
    inputs = _inputs(policies, rows) | task_file_hash(config) | base_hash(config)
    finished = run.begin(STAGE, SECTIONS, inputs, ("evaluation",), ("evaluation/*.jsonl",)) is not None
    wanted = [(policy, greedy) for policy in policies for greedy in _decodings(config, policy, policies[-1])]
    missing = [(p, g) for p, g in wanted if not _file(run, p.name, g).is_file()]
    if missing:
        _answer_missing(config, task, run, rows, missing)
    records = {_label(p.name, g): list(read_lines(_file(run, p.name, g))) for p, g in wanted}
    comparison = compare_policies(records, policies[-1].name, lowest=task.reward_range[0])
    for label, gain in comparison.gains.items():
        logger.info(
            "evaluation: gain of %s %+.4f [%+.4f, %+.4f] on %d rows", label, gain.mean, gain.low, gain.high, gain.n
        )
    if not finished:
        result = _as_json(comparison)
        write_json(run.path("evaluation", "summary.json"), result)
        run.end(STAGE, {"path": "evaluation"})
        run.finish({"evaluation": result})
    return comparison


def compare_policies(records: dict[str, list[dict[str, Any]]], final: str, lowest: float = 0.0) -> Comparison:
    """Summaries, and paired gains over the base with the same decoding."""
    gains = {}
    for label in records:
        name, decoding = label.rsplit(" ", 1)
        if name != BASE:
            gains[label] = compare(records[_label(BASE, decoding == "greedy")], records[label])
    greedy_base, sampled = records.get(_label(BASE, True)), records[_label(final, False)]
    return Comparison(
        records=records,
        summaries=[summarize(label, some, lowest) for label, some in records.items()],
        gains=gains,
        over_greedy_base=compare(greedy_base, sampled) if greedy_base and final != BASE else None,
        final=final,
    )


def held_out_rows(config: Config, run: Run) -> Sequence[Row]:
    """The rows to evaluate on: evaluation.prompts, or the run's held-out rows; the first evaluation.rows of them."""
    if config.evaluation.prompts:
        path = resolve_path(config.evaluation.prompts)
        if not path.is_file():
            raise RunError(f"evaluation.prompts: {path} is not a file; give a JSONL file of rows {{id, prompt, ...}}")
        rows: Sequence[Row] = JsonlTable(path)
    else:
        rows = run.read_rows("eval")
    return rows[: config.evaluation.rows] if config.evaluation.rows else rows


def policies_of(config: Config, run: Run) -> list[Policy]:
    """The base first, then the run's checkpoints in order, then its result; or the one that the config names."""
    base = Policy(BASE, None, False)
    named = config.evaluation.adapter or config.evaluation.model
    if named:
        path = str(resolve_path(named)) if resolve_path(named).is_dir() else named
        name = Path(named).name
        return [base, Policy("given" if name == BASE else name, path, bool(config.evaluation.adapter))]
    is_adapter = config.lora.enabled
    final = run.folder / ("adapter" if is_adapter else "model")
    if not final.is_dir():
        raise RunError(
            f"run {run.name!r} has no {final.name}/ yet: run notebook 3_grpo_training first, or set evaluation.adapter "
            f"(or evaluation.model) to a folder or Hub id"
        )
    last = (run.outputs("training") or {}).get("steps")
    checkpoints = [
        Policy(folder.name, str(folder), is_adapter)
        for folder in run.checkpoints()
        if config.evaluation.checkpoints and folder.name != f"step-{last}"
    ]
    return [base, *checkpoints, Policy(final.name, str(final), is_adapter)]


def _decodings(config: Config, policy: Policy, final: Policy) -> list[bool]:
    """Sampled for every policy; greedy (True) also for the first and the last, where asked for."""
    both = config.evaluation.greedy and policy.name in (BASE, final.name)
    return [False, True] if both else [False]


def _answer_missing(
    config: Config, task: Task, run: Run, rows: Sequence[Row], missing: list[tuple[Policy, bool]]
) -> None:
    import torch

    source = models.resolve_model(config, run.read_rows("train") if config.model.name == models.STARTER else [])
    for policy, model in _loaded(config, source, [policy for policy, _ in missing]):
        whole = policy.path if policy.path and not policy.is_adapter else source
        tokenizer = models.load_tokenizer(whole, config.model)
        chat = Chat(tokenizer, end_ids(model, tokenizer))
        asked = _asked_rows(config, rows, chat)
        for greedy in [g for p, g in missing if p.name == policy.name]:
            torch.manual_seed(config.evaluation.seed)
            sample = local_sample(model, chat, config.evaluation, config.sampling.completion_limit, greedy)
            samples = 1 if greedy else config.evaluation.samples
            label = _label(policy.name, greedy)
            limit = config.rewards.max_unscored
            records = answer_rows(task, asked, batched(chat, sample), samples, limit, where=label)
            _keep(_file(run, policy.name, greedy), records)
            logger.info("evaluation: %s on %d rows: reward %.4f", label, len(asked), summarize(label, records).reward)


def _loaded(config: Config, source: str, policies: Iterable[Policy]) -> Iterator[tuple[Policy, Any]]:
    """Each policy with its model, loading the base only once where all others are adapters on it."""
    base: Any = None
    for policy in dict.fromkeys(policies):
        if policy.path and not policy.is_adapter:
            yield policy, models.load_model(policy.path, config.model)
            continue
        base = base if base is not None else models.load_model(source, config.model)
        if policy.path is None:
            yield policy, base
            continue
        adapted = models.load_adapter(base, policy.path)
        yield policy, adapted
        base = adapted.unload()  # type: ignore[operator]


def _asked_rows(config: Config, rows: Sequence[Row], chat: Chat) -> list[Row]:
    limit = config.sampling.prompt_limit
    kept = [rows[index] for index in within_limit(rows, chat, limit)]
    if len(kept) < len(rows):
        logger.info(
            "evaluation: %d of %d rows left out, over sampling.prompt_limit %d", len(rows) - len(kept), len(rows), limit
        )
    if not kept:
        raise RunError(f"no held-out row is left to evaluate ({len(rows)} before sampling.prompt_limit {limit})")
    return kept


def _inputs(policies: Iterable[Policy], rows: Sequence[Row]) -> dict[str, str]:
    import hashlib

    digest = hashlib.sha256()
    for row in rows:
        digest.update(to_line(row).encode())
    weights = {p.name: weights_hash(p.path) for p in policies if p.path}
    return {"rows": digest.hexdigest(), **weights}


def _keep(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        for record in records:
            file.write(to_line(record))


def _file(run: Run, policy: str, greedy: bool) -> Path:
    return run.path("evaluation", f"{policy}-{'greedy' if greedy else 'sampled'}.jsonl")


def _label(policy: str, greedy: bool) -> str:
    return f"{policy} {'greedy' if greedy else 'sampled'}"


def _as_json(comparison: Comparison) -> dict[str, Any]:
    over = comparison.over_greedy_base
    values: dict[str, Any] = plain(
        {
            "policies": [summary._asdict() for summary in comparison.summaries],
            "gains": {label: gain._asdict() for label, gain in comparison.gains.items()},
            "over_greedy_base": over._asdict() if over else None,
        }
    )
    return values
