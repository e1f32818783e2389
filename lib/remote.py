"""The caller's side of Modal: what is checked, shipped, uploaded and brought back.

Owns plans (a checked job with its files and secrets), volumes seen from outside, and the reports of the entry points.
Must not know how functions are defined (lib/modal_app.py) or what runs in them (lib/container.py).

    modal run -m lib.modal_app::checkpoints
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from lib import PROJECT_ROOT, WorkbenchError, provenance
from lib.config import Config
from lib.container import CLAIMS, MANIFEST, FileFact, Job, busy, live_writer, parse_manifest
from lib.cost import Prices, Resources, load_prices, on_machines, rates
from lib.experiment import Experiment, ExperimentError, find_secrets, refuse_secrets
from lib.gpu import NONE
from lib.ledger import NAME as LEDGER
from lib.ledger import Ledger
from lib.places import locate, travel_name
from lib.runfolder import lock_hash
from lib.task import Task, nearest
from lib.verl.batches import check_fit
from lib.verl.cluster import of_the_container

if TYPE_CHECKING:
    import modal

logger = logging.getLogger(__name__)

SHIPPED = ("lib", "notebooks", "configs")
"""Folders of the project that every container gets."""

CODE_SUFFIXES = (".py", ".ipynb", ".yaml", ".yml")
LARGEST_SHIPPED = 256 * 1024
"""Bytes: a larger file that a config names travels by the data volume, once, and not with the code every time."""

LARGEST_IN_ALL = 3_000_000
"""Bytes of code and small files that may travel with a start; Modal keeps them, and is sent those that changed."""


class RemoteError(WorkbenchError, RuntimeError):
    """It cannot be done on Modal as asked; the message says what to do."""


class Plan(NamedTuple):
    """A checked job, and what has to come with it."""

    job: Job
    config: Config
    shipped: dict[str, Path]
    """Travel name -> file or folder here, to be mounted with the code."""
    secrets: dict[str, modal.Secret]


@contextmanager
def clear_modal_errors() -> Iterator[None]:
    """Say in our words what Modal's client refuses."""
    import modal

    try:
        yield
    except modal.exception.AuthError as error:
        raise ExperimentError(
            f"not logged in to Modal: run `.venv/bin/modal setup` (or `modal token set ...`), then again. ({error})"
        ) from None
    except modal.exception.ConnectionError as error:
        raise ExperimentError(f"Modal cannot be reached: {error}") from None


# plans ----------------------------------------------------------------------------------------------------------------
def make_plan(experiment: Experiment, notebook: str, config_path: str, texts: Sequence[str]) -> Plan:
    """Check everything that can be checked before a container starts. Raises WorkbenchError."""
    from lib.run import check

    order = check(notebook, config_path, texts)
    own = [path for path in order.parameters if not _is_shipped(path)]
    shipped, large, absent = _named_files(order.config, order.task, [config_path, *map(str, own)])
    _refuse_secrets(order.config, texts, shipped)
    _check_prices(order.config)
    if order.config.backend == "verl" and PurePosixPath(notebook).stem not in (*WITHOUT_ROLES, EXPORTS):
        _refuse_idle_machines(order.config, notebook)
        check_fit(order.config, of_the_container(order.config).size)
    with clear_modal_errors():
        secrets = find_secrets(order.config)
        files = _uploaded(experiment, large, absent)
        _refuse_busy(experiment, order.run)
    resources = order.config.modal
    nodes = machines(order.config) if PurePosixPath(notebook).stem == TRAINS else 1
    job = Job(
        notebook=notebook if notebook == "all" else travel_name(next(iter(order.parameters))),
        config=travel_name(config_path),
        parameters=tuple(texts),
        run=order.run,
        gpus=resources.gpus,
        cpu=resources.cpu,
        memory=resources.memory,
        seconds=round(resources.timeout * 3600),
        prices=travel_name(order.config.cost.prices),
        lock=lock_hash(),
        code=provenance.code(),
        files=files,
        nodes=nodes,
        token=token_hex(32) if nodes > 1 else "",
    )
    if "wandb-secret" not in secrets and order.config.tracker.name == "wandb":
        logger.warning("there is no wandb-secret: the run goes on without W&B")
        job = job.model_copy(update={"parameters": (*job.parameters, "tracker.name=none")})
    return Plan(named(job, order.run), order.config, shipped, secrets)


def named(job: Job, run: str) -> Job:
    """The job, in the run of this name."""
    others = [text for text in job.parameters if not text.startswith("run_name=")]
    return job.model_copy(update={"run": run, "parameters": (*others, f"run_name={run}")})


TRAINS = "3_grpo_training"
"""The notebook that trains, and does nothing else that takes a GPU."""

WITHOUT_ROLES = ("1_data_prep", "2_reward_inspection", "4_adapter_evaluation")

EXPORTS = "5_export_and_serve"


def machines(config: Config) -> int:
    """How many containers a training takes that are started together and make one cluster."""
    return config.verl.nodes if config.backend == "verl" else 1


def _refuse_idle_machines(config: Config, notebook: str) -> None:
    if machines(config) > 1 and PurePosixPath(notebook).stem != TRAINS:
        raise RemoteError(
            f"notebook {notebook} with verl.nodes {config.verl.nodes}: only {TRAINS} runs on several machines, and "
            f"all of them would be paid for while the others run. Run that one by itself, and the others before and "
            f"after it: each takes one container"
        )


def with_roles(plan: Plan, app: str) -> Plan:
    """A plan whose training asks the classes of this app; its own container has no GPU where it only asks them."""
    job = plan.job.model_copy(update={"roles": app})
    if job.part or PurePosixPath(job.notebook).stem == TRAINS:
        job = job.model_copy(update={"gpus": ()})
    return plan._replace(job=job)


def needs_roles(plan: Plan) -> bool:
    """Whether a plan's training has its roles in containers of their own."""
    if plan.config.backend != "distributed" or plan.config.distributed.hosts == "local":
        return False
    return plan.job.part in ("rollout", "sync") or (
        not plan.job.part and PurePosixPath(plan.job.notebook).stem not in WITHOUT_ROLES
    )


def role_secrets(plan: Plan, *names: str) -> list[modal.Secret]:
    """Of a plan's secrets, those of these names: the roles see no judge's key."""
    return [secret for name, secret in plan.secrets.items() if name in names]


def _named_files(
    config: Config, task: Task, more: Sequence[str]
) -> tuple[dict[str, Path], dict[str, dict[str, Path]], list[str]]:
    """The user's own files that a run needs, by travel name: those that travel with the code; those that are too large,
    by what the config names; and the names of what is not on this machine."""
    shipped: dict[str, Path] = {}
    large: dict[str, dict[str, Path]] = {}
    absent: list[str] = []
    for text in dict.fromkeys([*more, *_texts(config, task)]):
        path, name = locate(text), travel_name(text)
        if not path.exists():
            absent.append(name)
            continue
        if _is_shipped(path) or (_is_run(path) and text not in more):
            continue
        _refuse_private(text, path)
        files = _files_of(name, path)
        if path.suffix in CODE_SUFFIXES or sum(file.stat().st_size for file in files.values()) <= LARGEST_SHIPPED:
            shipped |= files
        else:
            large[name] = files
    _refuse_too_much(shipped)
    return shipped, large, absent


def _texts(config: Config, task: Task) -> list[str]:
    """The texts of the config that name files: what is there, and what can only be meant as a file."""
    evaluation = config.evaluation
    may = [config.model.name, evaluation.adapter, evaluation.model, config.cost.prices]
    must = [evaluation.prompts, config.task.name if config.task.name.endswith(".py") else ""]
    for name in type(task).model_fields:
        value = getattr(task, name)
        if isinstance(value, str) and name != "ledger":  # a container has the run's own, and no use for another
            (must if name in ("path", "series") else may).append(value)
        elif isinstance(value, BaseModel):  # a judge's settings: its model may be a folder
            may += [inner for inner in dict(value).values() if isinstance(inner, str)]
    return [text for text in may if text and _may_be_path(text)] + [text for text in must if text]


def _may_be_path(text: str) -> bool:
    if len(text) > 500 or "\n" in text:
        return False
    return locate(text).exists() or PurePosixPath(text).suffix in (".csv", ".jsonl", ".json", ".parquet", ".txt")


def _uploaded(
    experiment: Experiment, large: Mapping[str, Mapping[str, Path]], absent: Sequence[str]
) -> dict[str, FileFact]:
    """What the data volume must hold for a run. Raises RemoteError for what it does not."""
    if not large and not absent:
        return {}
    elsewhere = [name for name in absent if _is_on_outputs(experiment, name)]
    return _check_uploaded(_manifest(experiment), large, [name for name in absent if name not in elsewhere])


def _check_uploaded(
    known: Mapping[str, FileFact], large: Mapping[str, Mapping[str, Path]], absent: Sequence[str]
) -> dict[str, FileFact]:
    """The facts of the files that a config means, of the volume's manifest; those here are compared with it."""
    facts: dict[str, FileFact] = {}
    problems: list[str] = []
    for whole, files in large.items():
        there = _under(known, whole)
        problems += [f"{name}: is on the data volume, but no longer here" for name in there if name not in files]
        for name, path in files.items():
            if name not in there:
                problems.append(f"{name}: not on the data volume")
            elif there[name].bytes != path.stat().st_size or there[name] != FileFact.of(path):
                problems.append(f"{name}: another version of it is on the data volume")
            else:
                facts[name] = there[name]
    for whole in absent:
        facts |= _under(known, whole)
        if not _under(known, whole):
            problems.append(f"{whole}: neither here nor on the data volume")
    if problems:
        raise RemoteError(
            "data is missing on the volume; nothing was started:\n  "
            + "\n  ".join(problems)
            + "\nBring it there: modal run -m lib.modal_app::upload --config CONFIG"
        )
    return facts


def _under(known: Mapping[str, FileFact], whole: str) -> dict[str, FileFact]:
    return {name: fact for name, fact in known.items() if _is_part(name, whole)}


def _refuse_secrets(config: Config, texts: Sequence[str], shipped: Mapping[str, Path]) -> None:
    """Nothing that travels may hold a secret: not the parameters, not the config, not a file."""
    travelling = {f"the parameter {text.partition('=')[0]}": text for text in texts}
    travelling["the config"] = json.dumps(config.as_json(), ensure_ascii=False)
    code = [file for folder in SHIPPED for file in _files_of("", PROJECT_ROOT / folder).values()]
    for file in [*code, *shipped.values()]:
        travelling[f"the file {file.name}"] = file.read_text(encoding="utf-8", errors="replace")
    refuse_secrets(travelling)


def _refuse_private(text: str, path: Path) -> None:
    if PROJECT_ROOT.is_relative_to(path.resolve()):
        raise RemoteError(f"the config names {text!r}: that is the whole project, or more; name the file or folder")
    if is_private(path.name) or is_private(path.resolve().name) or is_private(travel_name(text)):
        raise RemoteError(f"the config names {text!r}: hidden files do not travel, they are where secrets are kept")


def _refuse_too_much(shipped: Mapping[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in shipped.items()}
    for folder in SHIPPED:
        sizes |= {name: path.stat().st_size for name, path in _files_of(folder, PROJECT_ROOT / folder).items()}
    if sum(sizes.values()) > LARGEST_IN_ALL:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise RemoteError(
            f"{sum(sizes.values()):,} bytes would travel with every start, of at most {LARGEST_IN_ALL:,}; the largest: "
            + ", ".join(f"{name} ({sizes[name]:,})" for name in largest)
            + ". Clear the outputs of notebooks; keep data outside configs/, it travels by ::upload"
        )


def _check_prices(config: Config) -> None:
    """A price for every GPU that the run may get: the meter in the container needs it."""
    prices = load_prices(locate(config.cost.prices))
    if config.backend == "distributed":
        role_resources(config, prices)
    for each in container_resources(config):
        rates(each, prices)


def container_resources(config: Config) -> list[Resources]:
    """What a training takes on Modal, its roles apart: one choice for every GPU that it may get."""
    wanted = config.modal
    return [
        on_machines(Resources(gpu=gpu, cpu=wanted.cpu, memory_gb=wanted.memory, where="modal"), machines(config))
        for gpu in wanted.gpus or (None,)
    ]


def role_resources(config: Config, prices: Prices | None = None) -> list[Resources]:
    """What the actor and every worker take on Modal. Raises CostError where `prices` lack one of their GPUs."""
    roles = config.modal.roles
    gpus = [roles.actor_gpu, *[roles.worker_gpu] * config.distributed.workers]
    found = [
        Resources(gpu=None if gpu == NONE else gpu, cpu=roles.cpu, memory_gb=roles.memory, where="modal")
        for gpu in gpus
    ]
    if prices:
        for one in found[:2]:
            rates(one, prices)
    return found


def _refuse_busy(experiment: Experiment, run: str) -> None:
    call = writer(experiment, run)
    if call:
        raise RemoteError(busy(run, call))


def _is_shipped(path: Path) -> bool:
    return any(path.resolve().is_relative_to(PROJECT_ROOT / folder) for folder in SHIPPED)


def _is_run(path: Path) -> bool:
    """Inside outputs/: in a container that is the volume of runs."""
    return path.resolve().is_relative_to(PROJECT_ROOT / "outputs")


def is_private(name: str) -> bool:
    """Hidden files (.env, .git) and what Python leaves behind never travel."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def _is_on_outputs(experiment: Experiment, name: str) -> bool:
    """Whether a name like outputs/RUN/adapter is on the volume of runs."""
    inner = name.removeprefix("outputs/")
    return inner != name and bool(entries(experiment, "/outputs", inner, recursive=False))


def _is_part(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}/")


def _files_of(name: str, path: Path) -> dict[str, Path]:
    """A file, or every file of a folder, by travel name; hidden files, and links that lead out of it, stay here."""
    if path.is_file():
        return {name: path}
    root = path.resolve()
    return {
        f"{name}/{file.relative_to(path).as_posix()}": file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not is_private(file.relative_to(path).as_posix()) and _stays_inside(file, root)
    }


def _stays_inside(file: Path, root: Path) -> bool:
    target = file.resolve()
    return target.is_relative_to(root) and not is_private(target.relative_to(root).as_posix())


# volumes --------------------------------------------------------------------------------------------------------------
def volume(experiment: Experiment, mount: str) -> modal.Volume:
    """One of the experiment's volumes, made where it is missing."""
    import modal

    return modal.Volume.from_name(experiment.volumes[mount], create_if_missing=True)


def read(experiment: Experiment, mount: str, path: str) -> bytes | None:
    """A file on a volume; None where there is none."""
    import modal

    try:
        return b"".join(volume(experiment, mount).read_file(path))
    except (FileNotFoundError, modal.exception.NotFoundError):
        return None


def entries(experiment: Experiment, mount: str, path: str, recursive: bool = True) -> list[Any]:
    """What is in a folder on a volume; [] where there is none."""
    import modal

    try:
        return list(volume(experiment, mount).iterdir(path, recursive=recursive))
    except (FileNotFoundError, modal.exception.NotFoundError):
        return []


def _manifest(experiment: Experiment) -> dict[str, FileFact]:
    content = read(experiment, "/data", MANIFEST)
    return parse_manifest(content) if content else {}


def writer(experiment: Experiment, run: str) -> str | None:
    """The call that writes a run now; None where nobody does."""
    found = [entry.path for entry in entries(experiment, "/outputs", f"{run}/{CLAIMS}") if entry.path.endswith(".json")]
    contents = {PurePosixPath(path).stem: read(experiment, "/outputs", path) for path in found}
    return live_writer({call: json.loads(content) for call, content in contents.items() if content})


def uploads(config: Config, task: Task, run: str) -> dict[str, dict[str, Path]]:
    """What `::upload` brings to the data volume, by what names it: data, models, and the run's prepared rows."""
    files: dict[str, dict[str, Path]] = {}
    for text in _texts(config, task):
        path = locate(text)
        if path.exists() and not _is_shipped(path) and not _is_run(path) and path.suffix not in CODE_SUFFIXES:
            _refuse_private(text, path)
            files[travel_name(text)] = _files_of(travel_name(text), path)
    rows = locate(config.paths.outputs) / run / "rows"
    return files | ({f"rows/{run}": _files_of(f"rows/{run}", rows)} if rows.is_dir() else {})


def upload(experiment: Experiment, files: Mapping[str, Path], again: Sequence[str] = ()) -> dict[str, FileFact]:
    """Put files on the data volume; those that its manifest has already are left, but for those to put there `again`.

    Returns what all of them must be there.
    """
    facts = {name: FileFact.of(path) for name, path in files.items()}
    known = _manifest(experiment)
    new = [name for name in files if known.get(name) != facts[name] or name in again]
    with volume(experiment, "/data").batch_upload(force=True) as batch:
        for name in new:
            batch.put_file(files[name], f"/{name}")
    say(f"{len(new)} of {len(files)} files uploaded, {sum(facts[name].bytes for name in new):,} bytes")
    return facts


def gone(experiment: Experiment, named: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """What the data volume holds of these files and folders that is no longer here."""
    known = _manifest(experiment)
    return [name for name in known for whole, files in named.items() if _is_part(name, whole) and name not in files]


def runs(experiment: Experiment) -> list[str]:
    """The names of the runs on the outputs volume."""
    return sorted(
        entry.path for entry in entries(experiment, "/outputs", "/", recursive=False) if not entry.path.startswith(".")
    )


def fetch(experiment: Experiment, run: str, folder: Path, skip: Sequence[str] = ()) -> list[Path]:
    """Bring the files of a run (or of a folder in it) here; checkpoints that are here already are left.

    The ledger is merged into the one here, which may hold verdicts that the container never saw.
    """
    found = [entry for entry in entries(experiment, "/outputs", run) if entry.type.name == "FILE"]
    if not found:
        where = experiment.volumes["/outputs"]
        known = runs(experiment)
        hint = nearest(run, known) if known else " It holds no runs yet."
        raise RemoteError(f"there is no run {run!r} on {where}.{hint}")
    fetched = []
    for entry in sorted(found, key=_is_ledger):  # last: a damaged one must not keep the others from coming
        name = PurePosixPath(entry.path).relative_to(run)
        target = folder / name
        if name.parts[0] in (CLAIMS, *skip) or _is_same(target, entry):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as file:
            for block in volume(experiment, "/outputs").read_file(entry.path):
                file.write(block)
        if _is_ledger(entry):
            _merge_ledger(target, partial)
        else:
            os.utime(partial, (entry.mtime, entry.mtime))
            os.replace(partial, target)
        fetched.append(target)
    return fetched


def _is_ledger(entry: Any) -> bool:
    return PurePosixPath(entry.path).parts[1:] == (LEDGER,)


def _merge_ledger(target: Path, partial: Path) -> None:
    ledger = Ledger(target)
    try:
        new = ledger.merge(partial)
    finally:
        partial.unlink()
        ledger.close()
    logger.info("ledger: %d verdicts are new here", new)


def _is_same(target: Path, entry: Any) -> bool:
    """Checkpoints and adapters never change under their name; logs and records grow or are written anew."""
    if not target.is_file():
        return False
    stat = target.stat()
    return bool(stat.st_size == entry.size and int(stat.st_mtime) >= entry.mtime and _never_changes(target))


def _never_changes(target: Path) -> bool:
    return target.suffix in (".safetensors", ".bin", ".pt", ".pth") or "checkpoints" in target.parts


def refuse_foreign(experiment: Experiment, run: str, folder: Path) -> None:
    """Refuse to fetch over a run of the same name that was made somewhere else."""
    ours = folder / "provenance.json"
    if ours.is_file() and ours.read_bytes() != read(experiment, "/outputs", f"{run}/provenance.json"):
        raise RemoteError(f"{folder} holds another run of that name: move it away, or fetch with --to NAME")


def list_checkpoints(experiment: Experiment) -> list[str]:
    """One line for each run on the outputs volume and each of its checkpoints."""
    lines = []
    for run in runs(experiment):
        sizes: dict[str, int] = {}
        for entry in entries(experiment, "/outputs", f"{run}/checkpoints"):
            step = PurePosixPath(entry.path).relative_to(run).parts[1]
            if entry.type.name == "FILE" and step.startswith("step-"):
                sizes[step] = sizes.get(step, 0) + entry.size
        steps = sorted(sizes, key=lambda step: int(step.removeprefix("step-")))
        lines.append(f"{run}: {_state(experiment, run)}")
        lines += [f"  {step:<12} {sizes[step] / 2**20:9.1f} MiB" for step in steps]
    return lines or [f"no runs on {experiment.volumes['/outputs']}"]


def _state(experiment: Experiment, run: str) -> str:
    call = writer(experiment, run)
    if call:
        return f"running, {call}"
    stages = [
        read(experiment, "/outputs", entry.path)
        for entry in entries(experiment, "/outputs", f"{run}/stages")
        if entry.path.endswith(".json")
    ]
    finished = [bool(json.loads(content)["finished"]) for content in stages if content]
    return "finished" if finished and all(finished) else "not finished"


def say(text: str) -> None:
    """A line for the person who called."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
