"""What the Modal entry points do once the app runs: start jobs, wait, report; sweeps, uploads, quotes.

Owns jobs in the plural (sweep, probe) and what the caller reads. Must not know how functions are defined.

    modal run -m lib.modal_app::sweep --config configs/decisions.yaml --grid training.learning_rate=1e-3,2e-3
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.config import Config
from lib.container import Job
from lib.cost import load_prices
from lib.experiment import Experiment
from lib.places import locate
from lib.quote import Quote, make_quote, read_trace
from lib.remote import (
    TRAINS,
    Plan,
    RemoteError,
    container_resources,
    entries,
    gone,
    make_plan,
    named,
    read,
    refuse_foreign,
    role_resources,
    runs,
    say,
    uploads,
)
from lib.remote import fetch as fetch_run
from lib.remote import upload as upload_files
from lib.run import UsageError, check
from lib.runfolder import check_name, default_name
from lib.task import nearest

COMPARE = "4_adapter_evaluation"
INTERRUPTIONS_PER_DAY = 1.0
"""Assumed for a quote: Modal says that every GPU container may be preempted, and gives no rate."""

MOST_RUNS = 64


@contextmanager
def deployed(app: Any, detached: bool) -> Iterator[None]:
    """The roles' classes are there meanwhile: containers find each other only in deployed apps.

    A detached run may outlive this process, and then keeps them: without containers they cost nothing.
    """
    if app is None:
        yield
        return
    app.deploy(strategy="recreate")  # what an earlier attempt left running writes the same run
    try:
        yield
    except BaseException:
        if not detached:
            app.stop()
        raise
    app.stop()


# one job --------------------------------------------------------------------------------------------------------------
def run(function: Any, job: Job) -> int:
    """Start a job, wait for it, report; returns its status. The call goes on without this process where detached."""
    call = function.spawn(job.model_dump(mode="json"))
    say(f"run {job.run}: call {call.object_id}")
    return report(call.get())


def report(result: Mapping[str, Any]) -> int:
    """Say how a job ended; returns its status."""
    state = {0: "done", 75: "stopped; the same command goes on from the last checkpoint"}
    say(f"run {result['run']}: {state.get(result['status'], 'failed')}. Bill so far: ${result['usd']:.4f}")
    if result["status"] not in (0, 75):
        say(result["message"] or f"it ended with status {result['status']}")
    else:
        say(f"bring it here: modal run -m lib.modal_app::fetch --run {result['run']}")
    return int(result["status"])


# sweeps ---------------------------------------------------------------------------------------------------------------
def make_sweep(
    experiment: Experiment, notebook: str, config: str, texts: Sequence[str], grid: Sequence[str]
) -> tuple[Plan, list[Job]]:
    """A plan that serves all, and its jobs: one for each combination of values, and last the comparison."""
    base = make_plan(experiment, notebook, config, texts)
    if base.config.model.name == "starter" and base.config.starter.seed is None:
        # Otherwise every training seed would bring its own toy policy, and there were nothing to compare.
        texts = [*texts, f"starter.seed={base.config.training.seed}"]
    jobs, shipped, secrets = [], base.shipped, base.secrets
    for values in combinations(grid):
        name = f"{base.job.run}.{'.'.join(_short(text) for text in values)}"
        plan = make_plan(experiment, notebook, config, [*texts, *values, f"run_name={name}"])
        jobs.append(plan.job)
        shipped, secrets = shipped | plan.shipped, secrets | plan.secrets
    if any(job.nodes != base.job.nodes for job in jobs):
        raise UsageError("--grid: a sweep has one kind of container: give verl.nodes and backend for all, after -p")
    members = [job.run for job in jobs]
    if len(set(members)) < len(members):
        raise UsageError("--grid: two combinations are the same run; name every value once")
    others = [text for text in texts if not text.startswith("run_name=")]
    runs_text = f"evaluation.runs={json.dumps(members)}"
    together = hashlib.sha256("\n".join(members).encode()).hexdigest()[:6]  # another grid is another comparison
    name = f"run_name={base.job.run}.sweep-{together}"
    compare = make_plan(experiment, COMPARE, config, [*others, runs_text, name])
    return base._replace(shipped=shipped | compare.shipped, secrets=secrets), [*jobs, compare.job]


def combinations(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """KEY=A,B texts as every combination of KEY=value texts; values are YAML, so a list or a text may hold commas."""
    axes: dict[str, list[str]] = {}
    for text in grid:
        key, equals, written = text.partition("=")
        if not equals or not key or not written:
            raise UsageError(f"--grid {text}: write KEY=VALUE,VALUE")
        if key in ("run_name", "config", "overrides", "where") or key.startswith(("modal.", "paths.")):
            raise UsageError(f"--grid {text}: {key} is one for the whole sweep")
        if key in axes:
            raise UsageError(f"--grid: {key} is given twice; write all its values after one {key}=")
        axes[key] = [f"{key}={value}" for value in _values(text, written)]
    found = list(itertools.product(*axes.values()))
    if len(found) > MOST_RUNS:
        raise UsageError(f"--grid: {len(found)} runs; at most {MOST_RUNS} at once")
    return found


def _values(text: str, written: str) -> list[str]:
    """The values of one axis as they are written, split at the commas that stand between them."""
    import yaml

    whole = f"[{written}]"
    try:
        node = yaml.compose(whole, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"--grid {text}: write KEY=VALUE,VALUE ({error})") from None
    assert node is not None
    values = [whole[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
    if not all(values) or written.rstrip().endswith(","):
        raise UsageError(f"--grid {text}: a value is empty; write KEY=VALUE,VALUE")
    return values


def sweep(function: Any, jobs: Sequence[Job], comparing: Any) -> int:
    """Run the members side by side, then compare those that finished (`comparing`: the function that does);
    the worst status."""
    *members, compare = jobs
    calls = [function.spawn(job.model_dump(mode="json")) for job in members]
    for job, call in zip(members, calls, strict=True):
        say(f"run {job.run}: call {call.object_id}")
    status = max(report(call.get()) for call in calls)
    if status:
        say("not compared: some runs did not finish. The same command goes on where they are")
        return status
    return run(comparing, compare)


def leave_sweep(function: Any, jobs: Sequence[Job], app: str) -> int:
    """Start the members in the deployed app and leave: they need nobody to wait for them."""
    *members, compare = jobs
    for job in members:
        call = function.spawn(job.model_dump(mode="json"))
        say(f"run {job.run}: call {call.object_id}")
    texts = " ".join(f"-p '{text}'" for text in compare.parameters)
    say(f"they run in the deployed app {app} (`modal app stop {app}` ends them). When they are done, compare them:")
    say(f"  modal run -m lib.modal_app::run --notebook {COMPARE} --config {compare.config} {texts}")
    return 0


def _short(text: str) -> str:
    key, _, value = text.partition("=")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", f"{key.rsplit('.', 1)[-1]}-{value}").strip("_")


# data and runs --------------------------------------------------------------------------------------------------------
def upload(experiment: Experiment, function: Any, config: str, texts: Sequence[str]) -> int:
    """Upload what a config names and verify it on the volume; 1 where something stays damaged."""
    order = check("1_data_prep", config, texts)
    named_files = uploads(order.config, order.task, order.run)
    files = {name: path for some in named_files.values() for name, path in some.items()}
    if not files:
        say("nothing to upload: this config names no data of its own, and the run has no prepared rows")
        return 0
    old = gone(experiment, named_files)
    problems: list[str] = []
    for _ in range(2):  # what was lost or damaged on the volume is known only once it was looked at there
        again = [problem.partition(": ")[0] for problem in problems]
        facts = upload_files(experiment, files, again)
        problems = function.remote({name: fact.model_dump() for name, fact in facts.items()}, old)
        if not problems:
            break
    bad = {problem.partition(": ")[0] for problem in problems}
    for line in [*problems, *(f"{name}: verified" for name in files if name not in bad)]:
        say(f"  {line}")
    for name in old:
        say(f"  {name}: no longer here, removed there")
    return 1 if problems else 0


def fetch(experiment: Experiment, name: str, to: str) -> int:
    """Bring a run's folder to outputs/."""
    check_name(name)
    folder = locate("outputs") / check_name(to)
    refuse_foreign(experiment, name, folder)
    brought = fetch_run(experiment, name, folder)
    say(f"{len(brought)} files of {name} brought to {Path('outputs') / to}")
    return 0


# quotes ---------------------------------------------------------------------------------------------------------------
def make_check(experiment: Experiment, part: str, config: str, texts: Sequence[str]) -> Plan:
    """One part of a distributed training, tried in a run of its own (`NAME.check`)."""
    plan = make_plan(experiment, TRAINS, config, texts)
    return plan._replace(job=plan.job.model_copy(update={"part": part, "run": f"{plan.job.run}.check", "nodes": 1}))


def make_probe(experiment: Experiment, config: str, texts: Sequence[str], steps: int) -> Plan:
    """A short training in a run of its own, to measure by."""
    order = check("3_grpo_training", config, texts)
    others = [text for text in texts if not text.startswith(("run_name=", "training.steps="))]
    name = f"{order.run}.probe"
    plan = make_plan(experiment, "3_grpo_training", config, [*others, f"training.steps={steps}", f"run_name={name}"])
    return plan._replace(job=named(plan.job, name))


def quote(experiment: Experiment, config_path: str, texts: Sequence[str], run_name: str | None) -> int:
    """Print what the training of a config will cost, measured by a probe or an earlier run."""
    config = check("3_grpo_training", config_path, texts).config
    name = run_name or default_name(config_path, config.task.name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _measured(experiment, name, Path(temporary) / name)
        trace = read_trace(folder)
        steps = _steps(config, folder)
        resources = container_resources(config)
        if config.backend == "distributed" and config.distributed.hosts != "local":
            resources = [resources[0].model_copy(update={"gpu": None, "beside": tuple(role_resources(config))})]
        prices = load_prices(locate(config.cost.prices))
        result = make_quote(trace, steps, resources, prices, interruptions_per_day=INTERRUPTIONS_PER_DAY)
        notes = [*result.notes, *_other_settings(config, folder)]
    for line in as_table(result, config.cost.budget_usd, notes):
        say(line)
    return 0


def as_table(quote: Quote, budget: float | None, notes: Sequence[str]) -> list[str]:
    """A quote as lines of text."""
    lines = [f"{'role':<12} {'hours':>8} {'USD':>10}   90 % interval"]
    for role, line in quote.lines.items():
        if line.usd or line.hours:
            lines.append(f"{role:<12} {line.hours:8.3f} {line.usd:10.4f}   [{line.low:.4f}, {line.high:.4f}]")
    lines.append(f"{'total':<12} {quote.hours:8.3f} {quote.usd:10.4f}   [{quote.usd_low:.4f}, {quote.usd_high:.4f}]")
    lines.append(f"{quote.steps} steps in {quote.hours:.3f} h [{quote.hours_low:.3f}, {quote.hours_high:.3f}]")
    if budget is not None:
        fits = "is enough" if quote.usd_high <= budget else "may not be enough: training would stop at it"
        lines.append(f"cost.budget_usd {budget:g} {fits}")
    return [*lines, *(f"note: {note}" for note in notes)]


def _measured(experiment: Experiment, name: str, temporary: Path) -> Path:
    """The folder of a run that measured: brought from the volume, or the one here."""
    for part in ("metrics.jsonl", "config.json", *(e.path.removeprefix(f"{name}/") for e in _cost(experiment, name))):
        content = read(experiment, "/outputs", f"{name}/{part}")
        if content is not None:
            (temporary / part).parent.mkdir(parents=True, exist_ok=True)
            (temporary / part).write_bytes(content)
    if (temporary / "metrics.jsonl").is_file():
        return temporary
    here = locate("outputs") / name
    if (here / "metrics.jsonl").is_file():
        return here
    raise RemoteError(
        f"nothing was measured yet: there is no trained run {name!r} on the volume or here."
        f"{nearest(name, runs(experiment))} Give --run NAME, or --probe 5 to train five steps first"
    )


def _cost(experiment: Experiment, name: str) -> list[Any]:
    return [entry for entry in entries(experiment, "/outputs", f"{name}/cost") if entry.type.name == "FILE"]


def _steps(config: Config, folder: Path) -> int:
    """The steps that a config asks for; where it counts epochs, by how far a step went in the measured run."""
    if config.training.steps != -1:
        return config.training.steps
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    steps_an_epoch = float(records[-1]["step"]) / float(records[-1]["epoch"])
    return max(1, round(config.training.epochs * steps_an_epoch))


def _other_settings(config: Config, folder: Path) -> list[str]:
    """What the measured run did in another way that changes a step's time."""
    path = folder / "config.json"
    there = json.loads(path.read_text()) if path.is_file() else {}
    here = config.as_json()
    keys = {"model": ("name",), "sampling": ("engine", "completion_limit"), "lora": ("enabled", "r")}
    keys["verl"] = ("nodes",)
    keys["training"] = ("batch", "accumulation", "group_size", "iterations", "steps_per_generation", "beta")
    return [
        f"the measured run had {section}.{key} {there[section].get(key)!r}, this one {here[section][key]!r}"
        for section, names in keys.items()
        for key in names
        if section in there and there[section].get(key) != here[section][key]
    ]
