"""Held-out evaluation: every policy of a run answers the same rows.

Owns which policies are evaluated, sampling, and the records in `evaluation/`. Must not know training.

    python -m lib.run notebooks/4_adapter_evaluation.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import WorkbenchError, models
from lib.answering import answer_rows, answer_there, keep_records
from lib.config import Config, ModelSection
from lib.endpoint import check_key, sampling_sent, service_of
from lib.generate import Chat, batched, chat_of, local_sample, unloaded_chat, within_limit
from lib.paired import Gain, PassAt, Summary, compare, pass_at_k, summarize
from lib.patience import Patience
from lib.places import locate
from lib.runfolder import (
    Run,
    RunError,
    base_hash,
    exclusive,
    plain,
    read_lines,
    read_run,
    task_file_hash,
    to_line,
    weights_hash,
    write_json,
)
from lib.tables import JsonlTable, TableErrors, Where
from lib.task import Row, Task, nearest
from lib.tools import check_tools

logger = logging.getLogger(__name__)

STAGE = "evaluation"
SECTIONS = ("task", "model", "starter", "sampling", "rewards", "evaluation")
BASE = "base"
_LONGEST_NAME = 100
"""Characters of a policy's name, of which its files' names are made: file systems take 255 bytes."""


class Policy(NamedTuple):
    """What is evaluated: the base model, an adapter or whole model on disk, or a model behind a URL."""

    name: str
    path: str | None
    is_adapter: bool
    is_endpoint: bool = False
    """Asked over HTTP (evaluation.endpoint): no weights of it are here."""
    quantized: str = ""
    """The model.quantization that its base's weights are held in, instead of the config's; "" = the config's."""


class Comparison(NamedTuple):
    """All policies on the same held-out rows. Keys of `records` and `gains`: "<policy> <sampled|greedy>"."""

    records: dict[str, list[dict[str, Any]]]
    summaries: list[Summary]
    gains: dict[str, Gain]
    """Gain of each policy over the base with the same decoding."""
    over_greedy_base: Gain | None
    """The final policy's sampled answers against the base's greedy ones: what is more than sharpening."""
    final: str
    """The policy that the result is about: the run's own, or the best of several runs."""
    settings: dict[str, dict[str, Any]]
    """Where evaluation.runs names runs: the config keys in which they differ, by run, the best sampled reward first."""
    over_runner_up: Gain | None
    """The best run's sampled answers against the second best's; chosen on these very rows, so it flatters the best."""
    pass_at: dict[str, dict[int, PassAt]]
    """Of sampled answers, by label and k; empty where the task has no part `solved`."""


def evaluate_run(config: Config, task: Task, run: Run) -> Comparison:
    """Evaluate base, checkpoints and result of a run (or what the config names instead) on its held-out rows.

    Resumable: a policy whose answers are on disk is not asked again. One process at a time. Raises UnscoredLimitError.
    """
    with exclusive(run.path("stages", f"{STAGE}.lock"), wait=2.0, doing="is evaluating this run"):
        return _evaluate(config, task, run)


def _evaluate(config: Config, task: Task, run: Run) -> Comparison:
    rows = held_out_rows(config, run)
    if not rows:
        raise RunError("there is no held-out row to evaluate: give evaluation.prompts, or task.split_ratio below 1")
    policies = policies_of(config, run)
    inputs = _inputs(policies, rows) | task_file_hash(config) | base_hash(config)
    finished = run.begin(STAGE, SECTIONS, inputs, ("evaluation",), ("evaluation/*.jsonl",)) is not None
    wanted = [(policy, greedy) for policy in policies for greedy in _decodings(config, policy, policies[-1])]
    missing = [(p, g) for p, g in wanted if not _file(run, p.name, g).is_file()]
    if missing:
        _answer_missing(config, task, run, rows, missing)
    records = {_label(p.name, g): list(read_lines(_file(run, p.name, g))) for p, g in wanted}
    lowest = task.reward_range[0]
    if config.evaluation.runs:
        comparison = compare_runs(records, where_runs_differ(config), lowest)
    else:
        comparison = compare_policies(records, policies[-1].name, lowest)
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
    """Summaries, and paired gains over the base with the same decoding (none where the base is not among them)."""
    gains = {}
    for label in records:
        name, decoding = label.rsplit(" ", 1)
        if name != BASE and _label(BASE, False) in records:
            gains[label] = compare(records[_label(BASE, decoding == "greedy")], records[label])
    greedy_base, sampled = records.get(_label(BASE, True)), records[_label(final, False)]
    return Comparison(
        records=records,
        summaries=[summarize(label, some, lowest) for label, some in records.items()],
        gains=gains,
        over_greedy_base=compare(greedy_base, sampled) if greedy_base and final != BASE else None,
        final=final,
        settings={},
        over_runner_up=None,
        pass_at={label: pass_at_k(some) for label, some in records.items() if label.endswith(" sampled")},
    )


def compare_runs(
    records: dict[str, list[dict[str, Any]]], settings: Mapping[str, dict[str, Any]], lowest: float = 0.0
) -> Comparison:
    """`compare_policies` for the runs that `settings` names: the best is final, and is paired with the runner-up.

    Best = by sampled reward, a masked answer counted as the lowest: a policy that is right only where it is valid
    would win otherwise.
    """
    best, *others = sorted(settings, key=lambda name: -_rank(summarize(name, records[_label(name, False)], lowest)))
    over = compare(records[_label(others[0], False)], records[_label(best, False)]) if others else None
    ranked = {name: settings[name] for name in (best, *others)}
    return compare_policies(records, best, lowest)._replace(settings=ranked, over_runner_up=over)


def _rank(summary: Summary) -> float:
    """What runs are ordered by; nothing scored comes last."""
    value = summary.reward_with_invalid
    return -math.inf if math.isnan(value) else value


def where_runs_differ(config: Config) -> dict[str, dict[str, Any]]:
    """By run that evaluation.runs names: the dotted config keys of its training in which they do not all agree."""
    known = {name: _trained_with(_read_named(config, name)) for name in config.evaluation.runs}
    first = next(iter(known.values()))
    keys = dict.fromkeys(key for values in known.values() for key in values)
    differing = [key for key in keys if any(values.get(key) != first.get(key) for values in known.values())]
    return {name: {key: values.get(key) for key in differing} for name, values in known.items()}


def held_out_rows(config: Config, run: Run) -> Sequence[Row]:
    """The rows to evaluate on: evaluation.prompts, or the run's held-out rows; the first evaluation.rows of them."""
    if config.evaluation.prompts:
        path = locate(config.evaluation.prompts)
        if not path.is_file():
            raise RunError(f"evaluation.prompts: {path} is not a file; give a JSONL file of rows {{id, prompt, ...}}")
        return _given_rows(JsonlTable(path), config.evaluation.rows)
    rows = run.read_rows("eval")
    return rows[: config.evaluation.rows] if config.evaluation.rows else rows


def _given_rows(table: JsonlTable, count: int) -> Sequence[Row]:
    """The first rows of a user's own file, 0 = all. Raises TaskError with every problem among them."""
    rows = table[:count] if count else table
    errors, seen = TableErrors(), dict[str, str]()
    for number, row in enumerate(rows):
        where = errors.at(table.name, table.place(number))
        _check_row(row, where)
        if "id" in row and (first := seen.setdefault(str(row["id"]), where.row)) != where.row:
            where.report("id", f"{row['id']!r} stands in {first} too: two rows would count as one with two answers")
    errors.raise_if_any()
    return rows


def _check_row(row: Row, where: Where) -> None:
    """What every row needs, before anything is asked."""
    identity, prompt = row.get("id"), row.get("prompt")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        where.report("id", "missing, or neither a text nor a whole number")
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        where.report("prompt", 'not a list of chat messages: [{"role": "user", "content": "..."}]')
    if not isinstance(row.get("tools", []), list):
        where.report("tools", "not a list of functions")


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), (str, list)) or bool(value.get("tool_calls"))


def policies_of(config: Config, run: Run) -> list[Policy]:
    """The base first, then the run's checkpoints in order, then its result; or what the config names.

    Base and result stand there twice where evaluation.quantized asks for them.
    """
    found, wanted = _policies_of(config, run), config.evaluation.quantized
    if not wanted:
        return found
    twice = [p._replace(name=f"{p.name}-{wanted}", quantized=wanted) for p in (found[0], found[-1])]
    return [*found[:-1], *twice, found[-1]]


def _policies_of(config: Config, run: Run) -> list[Policy]:
    base = Policy(BASE, None, False)
    if config.evaluation.runs:
        return [base, *_named_policies(config, run)]
    endpoint = config.evaluation.endpoint
    if endpoint.base_url:
        behind_url = Policy(_file_name(endpoint.model), None, False, is_endpoint=True)
        return [base, behind_url] if endpoint.beside_base else [behind_url]
    named = config.evaluation.adapter or config.evaluation.model
    if named:
        path = str(locate(named)) if locate(named).is_dir() else named
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


def _file_name(model: str) -> str:
    """A model's id as a file can be named; a long one is cut and told apart by its hash."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return "endpoint" if name in ("", BASE) else name


def _named_policies(config: Config, run: Run) -> list[Policy]:
    """The results of the runs that evaluation.runs names; every one that cannot be compared here is said at once."""
    source = _source(config, run)
    found: list[Policy] = []
    problems: list[str] = []
    for name in config.evaluation.runs:
        try:
            found.append(_result_of(_read_named(config, name), source))
        except WorkbenchError as error:
            problems.append(f"- {name}: {error}")
    if problems:
        listed = "\n".join(problems)
        raise RunError(f"evaluation.runs names runs that cannot be compared here:\n{listed}\nMend or leave them out.")
    _warn_of_other_tasks(config)
    return found


def _read_named(config: Config, name: str) -> Run:
    outputs = locate(config.paths.outputs)
    known = [path.parent.name for path in outputs.glob("*/config.json")]
    if name not in known:
        raise RunError(f"there is no such run in {outputs}.{nearest(name, known)}")
    return read_run(outputs / name)


def _result_of(named: Run, source: str) -> Policy:
    """What a run's training made, where it was made on the base policy `source`."""
    path = (named.outputs("training") or {}).get("path")
    if path is None or not (named.folder / path).is_dir():
        raise RunError(f"it has no result yet: run notebook 3_grpo_training with run_name={named.name!r} first")
    policy = Policy(named.name, str(named.folder / path), path == "adapter")
    base = _base_of(named, policy)
    if not models.same_base(base, source, str(policy.path)):
        raise RunError(
            f"it was trained on {base}, and this run's base is {source}: give them one base (the same model.name; with "
            f"the starter the same train rows and starter.seed)"
        )
    return policy


def _base_of(named: Run, policy: Policy) -> str:
    """The folder or Hub id that a result was trained from: as its adapter says, or a whole model's config."""
    recorded = json.loads((Path(str(policy.path)) / "adapter_config.json").read_text()) if policy.is_adapter else {}
    return str(recorded.get("base_model_name_or_path") or _source(named.config, named))


def _trained_with(named: Run) -> dict[str, Any]:
    """The config that a run's training was begun with, by dotted keys: all that decided its result."""
    return flat(named.stages()["training"]["key"]["config"])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _warn_of_other_tasks(config: Config) -> None:
    """Another task's rewards mean something else, and its training rows may be among these held-out ones."""
    here = flat({"task": config.as_json()["task"]})
    for name in config.evaluation.runs:
        there = flat({"task": _read_named(config, name).config.as_json()["task"]})
        keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if keys:
            logger.warning(
                "evaluation: run %s had other task settings (%s): it may have been trained on some of these rows",
                name,
                ", ".join(f"{key} {there.get(key)!r}, here {here.get(key)!r}" for key in keys),
            )


def _source(config: Config, run: Run) -> str:
    """The folder or Hub id of a run's base policy."""
    return models.resolve_model(config, run.read_rows("train") if config.model.name == models.STARTER else [])


def _decodings(config: Config, policy: Policy, final: Policy) -> list[bool]:
    """Sampled for every policy; greedy (True) also for base, result and named runs, where asked for."""
    if policy.is_endpoint and "temperature" not in sampling_sent(config.evaluation, 1, True):
        return [False]  # OpenAI's thinking models have one way to answer
    both = config.evaluation.greedy and (
        policy.name in (BASE, final.name) or bool(policy.quantized or config.evaluation.runs)
    )
    return [False, True] if both else [False]


def _answer_missing(
    config: Config, task: Task, run: Run, rows: Sequence[Row], missing: list[tuple[Policy, bool]]
) -> None:
    here = [(policy, greedy) for policy, greedy in missing if not policy.is_endpoint]
    if len(here) < len(missing):
        check_key(service_of(config.evaluation.endpoint))  # before others have answered for hours
    if here:
        _answer_here(config, task, run, rows, here)
    for policy, greedy in missing:
        if policy.is_endpoint:
            path, label = _file(run, policy.name, greedy), _label(policy.name, greedy)
            answer_there(config, task, _rows_for_endpoint(config, run, rows), greedy, path, label)


def _answer_here(config: Config, task: Task, run: Run, rows: Sequence[Row], missing: list[tuple[Policy, bool]]) -> None:
    """Answers of models on this machine."""
    import torch

    source = _source(config, run)
    for policy, model in _loaded(config, source, [policy for policy, _ in missing]):
        tokenizer = models.load_tokenizer(_weights_of(policy, source), config.model)
        chat = chat_of(config, model, tokenizer)
        asked = _asked_rows(config, rows, chat)
        for greedy in [g for p, g in missing if p.name == policy.name]:
            torch.manual_seed(config.evaluation.seed)
            sample = local_sample(model, chat, config.evaluation, config.sampling.completion_limit, greedy)
            samples = 1 if greedy else config.evaluation.samples
            label = _label(policy.name, greedy)
            limit = config.rewards.max_unscored
            patience = Patience(config.rewards.world_seconds, config.rewards.score_seconds)
            records = answer_rows(task, asked, batched(chat, sample), samples, limit, label, patience)
            keep_records(_file(run, policy.name, greedy), records)
            logger.info("evaluation: %s on %d rows: reward %.4f", label, len(asked), summarize(label, records).reward)


def _rows_for_endpoint(config: Config, run: Run, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that the base answers too, by its tokenizer's count of a prompt; all rows where it is not asked."""
    if not config.evaluation.endpoint.beside_base:
        return rows
    return _asked_rows(config, rows, unloaded_chat(config, _source(config, run)))


def _loaded(config: Config, source: str, policies: Iterable[Policy]) -> Iterator[tuple[Policy, Any]]:
    """Each policy with its model, loading a base only once where all others are adapters on it.

    What the machine cannot hold as asked (evaluation.quantized) is said before any of them answers.
    """
    several = sorted(dict.fromkeys(policies), key=lambda policy: bool(policy.quantized))
    purpose: models.Purpose = "adapter" if any(policy.is_adapter for policy in several) else "answer"
    for policy in (policy for policy in several if policy.quantized):
        models.check_held(_weights_of(policy, source), _held(config, policy), purpose)
    base, held_in = None, ""
    for policy in several:
        if policy.path and not policy.is_adapter:
            yield policy, models.load_model(policy.path, _held(config, policy))
            continue
        if base is None or held_in != policy.quantized:
            base, held_in = models.load_model(source, _held(config, policy), purpose=purpose), policy.quantized
        if policy.path is None:
            yield policy, base
            continue
        adapted = models.load_adapter(base, policy.path)
        yield policy, adapted
        base = adapted.unload()  # type: ignore[operator]


def _weights_of(policy: Policy, source: str) -> str:
    """Whose weights are loaded: the policy's own, or the base's."""
    return policy.path if policy.path and not policy.is_adapter else source


def _held(config: Config, policy: Policy) -> ModelSection:
    """How to load a policy's weights."""
    return config.model.model_copy(update={"quantization": policy.quantized}) if policy.quantized else config.model


def _asked_rows(config: Config, rows: Sequence[Row], chat: Chat) -> list[Row]:
    """The rows that fit. Raises ToolsError where the template does not show a row's tools."""
    check_tools(chat, rows)
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
    digest = hashlib.sha256()
    for row in rows:
        digest.update(to_line(row).encode())
    weights = {f"weights of {p.name}": weights_hash(p.path) for p in policies if p.path}  # a run may be called "rows"
    return {"rows": digest.hexdigest(), **weights}


def _file(run: Run, policy: str, greedy: bool) -> Path:
    return run.path("evaluation", f"{policy}-{'greedy' if greedy else 'sampled'}.jsonl")


def _label(policy: str, greedy: bool) -> str:
    return f"{policy} {'greedy' if greedy else 'sampled'}"


def _as_json(comparison: Comparison) -> dict[str, Any]:
    over, best = comparison.over_greedy_base, comparison.over_runner_up
    values: dict[str, Any] = plain(
        {
            "policies": [summary._asdict() for summary in comparison.summaries],
            "gains": {label: gain._asdict() for label, gain in comparison.gains.items()},
            "over_greedy_base": over._asdict() if over else None,
            "final": comparison.final,
            "settings": comparison.settings,
            "over_runner_up": best._asdict() if best else None,
            "pass_at": {
                label: {str(k): one._asdict() for k, one in some.items()} for label, some in comparison.pass_at.items()
            },
        }
    )
    return values
