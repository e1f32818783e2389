"""The Modal app: image, volumes, secrets, functions, schedule, entry points.

Owns the definitions. They follow from the command line, which is read as this module is imported: a GPU list, an
image's packages and its files cannot be set later. Nothing of this module runs in a container (see lib/container.py).

    modal run -m lib.modal_app::run --notebook 3_grpo_training --config configs/decisions.yaml --gpu H100
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import modal

from lib import PROJECT_ROOT, WorkbenchError, container, launch, remote
from lib.command import Command, read_command, settings
from lib.experiment import PROJECT, Experiment, read_experiment
from lib.gpu import NONE, RDMA, parse_gpu
from lib.modal_serve import define_deployment
from lib.run import check as check_order

ROOT = "/root"
"""The project's place in a container; Modal puts it on Python's path."""

CUDA = "nvidia/cuda:13.0.3-devel-ubuntu22.04"
"""vLLM's own base: torch brings the CUDA libraries, but kernels that are compiled at run time need nvcc."""

PYTHON = "3.12"

_LONGEST_CALL = 24 * 3600
"""Seconds: Modal's limit of one call."""

_BESIDE = 8
"""Calls to a role's container beside its work: to watch it, to sync, to end it."""

CACHES = {
    "HF_HOME": "/cache/huggingface",
    "VLLM_CACHE_ROOT": "/cache/vllm",
    "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor",
    "TRITON_CACHE_DIR": "/cache/triton",
    "FLASHINFER_WORKSPACE_BASE": "/cache/flashinfer",
}
"""Models and compiled kernels are kept on the cache volume, for the next container."""


# definitions ----------------------------------------------------------------------------------------------------------
def gpu_image(
    experiment: Experiment, packages: Sequence[str], shipped: Mapping[str, Path], verl: bool = False, rdma: bool = False
) -> modal.Image:
    """The project's CUDA lock, the config's own packages, and the code; `verl`: also verl's environment beside them;
    `rdma`: what NCCL needs for it (libibverbs.so.1 and libmlx5.so.1)."""
    image = modal.Image.from_registry(CUDA, add_python=PYTHON).entrypoint([])
    if rdma:
        image = image.apt_install("libibverbs1", "ibverbs-providers")
    image = image.uv_pip_install(
        requirements=[str(PROJECT_ROOT / "requirements" / "cuda.lock")],
        extra_options="--no-deps",
        uv_version=_locked("uv"),
    )
    if packages:
        image = image.uv_pip_install(*packages, uv_version=_locked("uv"))
    if verl:
        image = _with_verl(image, packages)
    return _with_code(image.env(CACHES | _volume_names(experiment)), shipped)


def _with_verl(image: modal.Image, packages: Sequence[str]) -> modal.Image:
    """An environment of verl's own, where lib/verl/environment.py looks for it. The lock holds uv."""
    lock, place = "/tmp/verl.lock", f"{ROOT}/build/verl"
    install = f"uv pip install --no-cache --python {place}/bin/python"
    more = [f"{install} {' '.join(shlex.quote(package) for package in packages)}"] if packages else []
    image = image.add_local_file(PROJECT_ROOT / "requirements" / "verl.lock", lock, copy=True)
    make = f'uv venv --python "$(command -v python)" {place}'
    return image.run_commands(make, f"{install} --no-deps -r {lock}", *more)


def small_image(experiment: Experiment) -> modal.Image:
    """What it takes to look at a volume."""
    needed = [f"{name}=={_locked(name)}" for name in ("pydantic", "pyyaml")]
    image = modal.Image.debian_slim(python_version=PYTHON).uv_pip_install(*needed, uv_version=_locked("uv"))
    return _with_code(image.env(_volume_names(experiment)), {})


def define(app: modal.App, experiment: Experiment, body: Callable[..., Any], plan: remote.Plan, **more: Any) -> Any:
    """A function of the app that runs a plan's jobs, with what its config asks for."""
    wanted, nodes = plan.config.modal, plan.job.nodes
    gpus = list(plan.job.gpus)
    # Without RDMA the machines wait for their network; for a GPU that has none Modal would find no place.
    rdma = nodes > 1 and all(gpu.name in RDMA for text in gpus if (gpu := parse_gpu(text)))
    run: Any = modal.clustered(size=nodes, rdma=rdma)(body) if nodes > 1 else body
    return app.function(
        image=gpu_image(experiment, wanted.packages, plan.shipped, plan.config.backend == "verl", rdma),
        gpu=gpus if len(gpus) > 1 else gpus[0] if gpus else None,
        cpu=wanted.cpu,
        memory=round(wanted.memory * 1024),
        timeout=round(wanted.timeout * 3600),
        retries=modal.Retries(max_retries=wanted.retries, initial_delay=1.0, backoff_coefficient=1.0),
        volumes={mount: remote.volume(experiment, mount) for mount in experiment.volumes},
        secrets=list(plan.secrets.values()),
        single_use_containers=True,  # a container mounts the newest commit, and never has files open from before
        include_source=False,
        **more,
    )(run)


def define_roles(experiment: Experiment, plan: remote.Plan) -> modal.App:
    """The app of a plan's actor and rollout workers: classes whose parameters address one container each.

    It is deployed: what asks them runs in another container, or outlives this process.
    """
    from lib import modal_roles

    settings, wanted = plan.config.distributed, plan.config.modal.roles
    app = modal.App(experiment.roles_app(plan.job.run), include_source=False)
    image = gpu_image(experiment, plan.config.modal.packages, plan.shipped)
    longest = max(settings.start_deadline, settings.sync_deadline, settings.turn_deadline)
    turns = max(settings.in_flight, plan.config.training.group_size)
    for role, gpu, seconds, inputs, secrets in (
        (
            modal_roles.Actor,
            wanted.actor_gpu,
            max(longest, settings.step_deadline),
            1,
            ("huggingface-secret", "wandb-secret"),
        ),
        (modal_roles.RolloutWorker, wanted.worker_gpu, longest, turns, ("huggingface-secret",)),
    ):
        app.cls(
            image=image,
            gpu=None if gpu == NONE else gpu,
            cpu=wanted.cpu,
            memory=round(wanted.memory * 1024),
            timeout=min(_LONGEST_CALL, round(seconds) + 60),
            max_containers=1,
            scaledown_window=wanted.idle_seconds,
            volumes={mount: remote.volume(experiment, mount) for mount in experiment.volumes},
            secrets=remote.role_secrets(plan, *secrets),
            include_source=False,
        )(modal.concurrent(max_inputs=inputs + _BESIDE)(role))
    return app


def _with_code(image: modal.Image, shipped: Mapping[str, Path]) -> modal.Image:
    """The project's code and the user's own files, mounted when a container starts: no new image for an edit."""
    for folder in remote.SHIPPED:
        image = image.add_local_dir(PROJECT_ROOT / folder, f"{ROOT}/{folder}", ignore=_ignored)
    for name, path in shipped.items():
        image = image.add_local_file(path, f"{ROOT}/{name}")
    return image


def _ignored(path: Path) -> bool:
    return remote.is_private(path.as_posix())


def _volume_names(experiment: Experiment) -> dict[str, str]:
    whose = {"EXPERIMENTER": experiment.experimenter, "EXPERIMENT_NAME": experiment.name}
    return whose | {f"WORKBENCH_VOLUME_{mount[1:].upper()}": name for mount, name in experiment.volumes.items()}


def _locked(package: str) -> str:
    lock = (PROJECT_ROOT / "requirements" / "cuda.lock").read_text(encoding="utf-8")
    return next(line for line in lock.splitlines() if line.startswith(f"{package}==")).split("==")[1].split(" ")[0]


class Defined(NamedTuple):
    """What a command line led to."""

    app: modal.App
    """What `modal run` starts, or `modal deploy` deploys."""
    experiment: Experiment | None = None
    home: modal.App | None = None
    """The app that holds the function: the same one, but for a detached sweep, which is deployed."""
    function: Any = None
    comparing: Any = None
    """The function of a sweep's last job: another one where its members take several containers each."""
    jobs: tuple[container.Job, ...] = ()
    roles: modal.App | None = None
    """The app of a distributed training's roles."""


def define_for(command: Command | None) -> Defined:
    """The app of a command: only the functions that it needs, so that looking at a volume builds no image."""
    if command is None:
        return Defined(modal.App(PROJECT, include_source=False))
    experiment = read_experiment()
    app = modal.App(experiment.app, include_source=False)
    options = command.options
    with remote.clear_modal_errors():
        if command.verb == "deploy":
            define_deployment(app, experiment, define, gpu_image)
        elif command.entry == "run":
            plan = remote.make_plan(experiment, options.notebook, options.config, settings(options))
            return _with_jobs(app, app, experiment, plan, [plan.job])
        elif command.entry == "sweep":
            plan, jobs = launch.make_sweep(
                experiment, options.notebook, options.config, settings(options), options.grid
            )
            mark = jobs[-1].run.rpartition("-")[2]
            home = modal.App(experiment.sweep_app(mark), include_source=False) if command.detach else app
            return _with_jobs(app, home, experiment, plan, jobs)
        elif command.entry == "quote" and options.probe:
            plan = launch.make_probe(experiment, options.config, settings(options), options.probe)
            return _with_jobs(app, app, experiment, plan, [plan.job])
        elif command.entry == "check":
            plan = launch.make_check(experiment, options.part, options.config, settings(options))
            return _with_jobs(app, app, experiment, plan, [plan.job])
        else:
            remote.volume(experiment, "/outputs").hydrate()  # is Modal there, and does it know us?
        if command.entry == "upload":
            check_order("1_data_prep", options.config, options.parameters)
            return Defined(app, experiment, app, _verifier(app, experiment))
    return Defined(app, experiment)


def _with_jobs(
    app: modal.App, home: modal.App, experiment: Experiment, plan: remote.Plan, jobs: Sequence[container.Job]
) -> Defined:
    roles = define_roles(experiment, plan) if remote.needs_roles(plan) else None
    if roles:
        plan = remote.with_roles(plan, str(roles.name))
        jobs = [remote.with_roles(plan._replace(job=job), str(roles.name)).job for job in jobs]
    function = comparing = define(home, experiment, container.run_notebook, plan, name="notebook")
    if jobs[-1].nodes != plan.job.nodes and home is app:
        comparing = define(home, experiment, container.run_notebook, plan._replace(job=jobs[-1]), name="compare")
    return Defined(app, experiment, home, function, comparing, tuple(jobs), roles)


def _verifier(app: modal.App, experiment: Experiment) -> Any:
    return app.function(
        image=small_image(experiment),
        volumes={"/data": remote.volume(experiment, "/data")},
        timeout=3600,
        single_use_containers=True,
        include_source=False,
    )(container.verify_upload)


def _define_or_exit() -> Defined:
    try:
        return define_for(COMMAND)
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


COMMAND = read_command(sys.argv)
DEFINED = _define_or_exit()
app = DEFINED.app


# entry points ---------------------------------------------------------------------------------------------------------
# Each takes any arguments: Modal hands them over as they are, and lib/command.py has read them already.
def _entry(body: Callable[[Experiment, argparse.Namespace], int]) -> Callable[..., None]:
    def call(*arguments: str) -> None:
        assert COMMAND and DEFINED.experiment, "called through `modal run`"
        try:
            with remote.clear_modal_errors():
                status = body(DEFINED.experiment, COMMAND.options)
        except WorkbenchError as error:
            sys.stderr.write(f"error: {error}\n")
            status = 2
        if status:
            sys.exit(status)

    call.__name__ = call.__qualname__ = body.__name__
    call.__doc__ = body.__doc__
    return app.local_entrypoint(name=body.__name__)(call)


@_entry
def run(experiment: Experiment, options: argparse.Namespace) -> int:
    """Run a notebook in a container: --notebook, --config, --gpu, -p ...; --help lists all."""
    return _run_first()


def _run_first() -> int:
    assert COMMAND
    with launch.deployed(DEFINED.roles, COMMAND.detach):
        return launch.run(DEFINED.function, DEFINED.jobs[0])


@_entry
def check(experiment: Experiment, options: argparse.Namespace) -> int:
    """Try one part of a distributed training there: rollout, reward, sync or checkpoints, --config, -p ..."""
    return _run_first()


@_entry
def sweep(experiment: Experiment, options: argparse.Namespace) -> int:
    """Run a notebook for every combination of --grid KEY=VALUE,VALUE ... side by side."""
    assert DEFINED.home and COMMAND
    if COMMAND.detach:
        DEFINED.home.deploy()
        if DEFINED.roles:
            DEFINED.roles.deploy()
        return launch.leave_sweep(DEFINED.function, DEFINED.jobs, DEFINED.home.name or "")
    with launch.deployed(DEFINED.roles, COMMAND.detach):
        return launch.sweep(DEFINED.function, DEFINED.jobs, DEFINED.comparing)


@_entry
def upload(experiment: Experiment, options: argparse.Namespace) -> int:
    """Bring a config's data to the data volume and verify it there: --config, -p ..."""
    return launch.upload(experiment, DEFINED.function, options.config, options.parameters)


@_entry
def fetch(experiment: Experiment, options: argparse.Namespace) -> int:
    """Bring a run's folder here: --run, --to."""
    return launch.fetch(experiment, options.run, options.to or options.run)


@_entry
def checkpoints(experiment: Experiment, options: argparse.Namespace) -> int:
    """List the runs and checkpoints on the outputs volume."""
    remote.say("\n".join(remote.list_checkpoints(experiment)))
    return 0


@_entry
def quote(experiment: Experiment, options: argparse.Namespace) -> int:
    """Dollars and hours before launch: --config, --gpu, -p ..., --run or --probe."""
    if DEFINED.jobs:
        status = _run_first()
        if status:
            return status
        options.run = DEFINED.jobs[0].run
    return launch.quote(experiment, options.config, settings(options), options.run)
