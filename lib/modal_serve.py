"""The endpoint on Modal: what configs/serve.yaml names, behind an OpenAI-compatible URL, with no container while idle.

Owns the file and its checks, the endpoint's definition, and what its container does. A container imports this file: it
must not know lib/modal_app.py.

    modal deploy -m lib.modal_app
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lib import PROJECT_ROOT, WorkbenchError, container, remote
from lib.config import Config, ConfigError, Section, UniqueKeys, load_config, parse_config
from lib.config.serve import ServeSection
from lib.cost import Resources, load_prices, rates
from lib.engine import Address
from lib.experiment import KEYS, Experiment
from lib.export.folder import MANIFEST
from lib.export.usage import SERVED
from lib.front import PUBLIC, TOKEN
from lib.gpu import NONE
from lib.log import name_secrets, start_logging
from lib.places import locate
from lib.relay import Relay
from lib.runfolder import Run
from lib.schedule import NothingScheduled, define_schedule
from lib.serving import open_server, result_of
from lib.task import describe_invalid, nearest

if TYPE_CHECKING:
    import modal

    from lib.hosts import Host

logger = logging.getLogger(__name__)

FILE = PROJECT_ROOT / "configs" / "serve.yaml"
NAME = "serve"
"""Of the function."""
ORDER = "WORKBENCH_SERVED"
"""Environment variable of the container: run, artifact, engine and how long to wait, as JSON."""
_HUB = "huggingface-secret"
_NO_TOKEN = "name another one (serve.secret), or write `public: true` into configs/serve.yaml: anybody may then ask"
_hosts: list[Host] = []
"""What was started lives as long as its container."""


class ServeError(WorkbenchError, ValueError):
    """The endpoint cannot be deployed, or does not start; the message says what to change."""


class ServeFile(Section):
    serve: ServeSection = ServeSection()


def read_serving(file: Path | None = None) -> ServeSection:
    """What configs/serve.yaml says. Raises ServeError."""
    import yaml

    file = file or FILE
    shown = file.relative_to(PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else file
    if not file.is_file():
        raise ServeError(f"{shown} is missing: restore it with `git checkout {shown}`")
    try:
        return ServeFile.model_validate(yaml.load(file.read_text(encoding="utf-8"), Loader=UniqueKeys)).serve
    except ValidationError as error:
        raise ServeError(f"{shown} cannot be used:\n{describe_invalid(error, ServeFile)}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ServeError(f"{shown} cannot be read: {error}") from None


# the caller's side ----------------------------------------------------------------------------------------------------
def define_deployment(
    app: modal.App, experiment: Experiment, define: Callable[..., Any], image: Callable[..., modal.Image]
) -> None:
    """What `modal deploy` registers: the schedule's entries, and the endpoint where the file names run and artifact."""
    wanted = read_serving()
    try:
        define_schedule(app, experiment, define)
    except NothingScheduled:
        if not wanted.run:
            raise
    if wanted.run:
        define_endpoint(app, experiment, wanted, image)


def define_endpoint(
    app: modal.App, experiment: Experiment, wanted: ServeSection, image: Callable[..., modal.Image]
) -> Any:
    """The endpoint's function. Raises ServeError where it could not answer, or would answer anybody unasked."""
    import modal

    config = _check_run(experiment, wanted)
    secrets = _secrets(wanted, config)
    order: dict[str, Any] = {"run": wanted.run, "artifact": wanted.artifact, "seconds": wanted.start_minutes * 60}
    order["engine"] = "transformers" if wanted.gpu == NONE else "vllm"  # the image's vLLM is built for GPUs
    gpu = None if wanted.gpu == NONE else wanted.gpu
    cost = Resources(gpu=gpu, cpu=config.modal.cpu, memory_gb=config.modal.memory, where="modal")
    usd = sum(rates(cost, load_prices(locate(config.cost.prices))).values())
    asks = "PUBLIC: anybody may ask" if wanted.public else "with a token"
    remote.say(
        f"endpoint: {wanted.artifact} of {wanted.run}, {asks}; a container costs about ${usd:.2f} an hour, and ends "
        f"{wanted.idle_seconds} s after the last answer"
    )
    decorate = app.function(
        name=NAME,
        image=image(experiment, config.modal.packages, {}),
        gpu=gpu,
        cpu=config.modal.cpu,
        memory=round(config.modal.memory * 1024),
        min_containers=0,
        max_containers=wanted.containers,
        scaledown_window=wanted.idle_seconds,
        startup_timeout=wanted.start_minutes * 60 + 60,
        timeout=3600,  # of one request
        volumes={mount: remote.volume(experiment, mount) for mount in experiment.volumes},
        secrets=secrets,
        env={ORDER: json.dumps(order), PUBLIC: "1" if wanted.public else "0"},
        include_source=False,
    )
    return decorate(modal.concurrent(max_inputs=wanted.concurrency)(modal.asgi_app()(endpoint)))


def _check_run(experiment: Experiment, wanted: ServeSection) -> Config:
    """The config of the run, where its artifact is on the volume as well."""
    if wanted.artifact not in SERVED:
        raise ServeError(
            f"configs/serve.yaml: artifact {wanted.artifact!r} cannot be served by vLLM or Transformers."
            f"{nearest(wanted.artifact, SERVED)}"
        )
    content = remote.read(experiment, "/outputs", f"{wanted.run}/config.json")
    if content is None:
        where, known = experiment.volumes["/outputs"], remote.runs(experiment)
        hint = nearest(wanted.run, known) if known else " It holds no runs yet."
        raise ServeError(f"configs/serve.yaml: there is no run {wanted.run!r} on {where}.{hint}")
    try:
        config = parse_config(json.loads(content), f"the config of {wanted.run}")
    except ConfigError as error:
        raise ServeError(str(error)) from None
    whole = f"{wanted.run}/export/{wanted.artifact}/{MANIFEST}"
    own = f"{wanted.run}/adapter/adapter_config.json"
    if remote.read(experiment, "/outputs", whole) is None and not (
        wanted.artifact == "adapter" and remote.read(experiment, "/outputs", own)
    ):
        raise ServeError(
            f"configs/serve.yaml: the run {wanted.run} on {experiment.volumes['/outputs']} has no whole export "
            f"{wanted.artifact!r}. Notebook 5 makes it: modal run -m lib.modal_app::run --notebook 5_export_and_serve "
            f"--config CONFIG -p run_name={wanted.run} -p 'export.artifacts=[{wanted.artifact}]'"
        )
    return config


def _secrets(wanted: ServeSection, config: Config) -> list[modal.Secret]:
    found: list[modal.Secret] = []
    if not wanted.public:
        if own := _hydrated(wanted.secret, TOKEN, _NO_TOKEN):
            found.append(own)
        else:
            raise ServeError(_lacking(wanted.secret, TOKEN, "does not exist", _NO_TOKEN))
    if config.model.name != "starter":
        hub = _hydrated(_HUB, KEYS[_HUB], f"or take it away where {config.model.name} needs no token")
        found += [hub] if hub else []
    return found


def _hydrated(name: str, key: str, otherwise: str) -> modal.Secret | None:
    """The secret of that name, None where there is none. Raises ServeError where it does not set the key."""
    import modal

    secret = modal.Secret.from_name(name, required_keys=[key])
    try:
        secret.hydrate()
    except modal.exception.NotFoundError:
        return None
    except modal.exception.Error as error:
        if "missing key" not in str(error):
            raise
        raise ServeError(_lacking(name, key, f"does not set {key}", otherwise, "--force ")) from None
    return secret


def _lacking(name: str, key: str, what: str, otherwise: str, force: str = "") -> str:
    return (
        f"the Modal secret {name!r} {what}; nothing was deployed. Make it (modal secret create {force}{name} "
        f"{key}=...), {otherwise}"
    )


# the container --------------------------------------------------------------------------------------------------------
def endpoint() -> Relay:
    """Load the model and answer: what a container of the endpoint does. Raises WorkbenchError where it cannot."""
    from modal.experimental import stop_fetching_inputs

    name_secrets(container.foreign_variables())
    start_logging(Path(tempfile.mkdtemp(prefix="workbench-serve-")) / "log.txt")
    host = _start(json.loads(os.environ[ORDER]))
    _hosts.append(host)
    container.commit("/cache")  # what was downloaded and compiled, for the next container

    async def lost() -> None:
        logger.error("%s", "\n".join(host.process.tail()))
        await stop_fetching_inputs.aio()  # Modal starts another container for the next request

    return Relay(host.port, lost)


def _start(order: Mapping[str, Any]) -> Host:
    folder = container.OUTPUTS / order["run"]
    places = {"paths.outputs": str(container.OUTPUTS), "paths.cache": str(container.CACHE)}
    config = load_config(folder / "config.json", places)
    public = os.environ.get(PUBLIC) == "1"
    if not public and not os.environ.get(TOKEN):  # the secret is there, and says nothing
        raise ServeError(f"{TOKEN} is empty: the container does not start without a token")
    served = result_of(Run(folder, config), order["artifact"])
    return open_server(config, served, order["engine"], Address(deadline=order["seconds"]), public)
