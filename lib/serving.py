"""A config's model, or a run's result, behind an OpenAI-compatible URL of this machine.

Owns what is served under which id, by which engine, who may ask, and how. Bound to loopback unless told otherwise. Must
not know training or evaluation.

    python -m lib.run serve configs/decisions.yaml
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import json
import logging
import os
import secrets
import shlex
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from lib import WorkbenchError, engine, models, transformers_server
from lib.config import ArtifactKind, Config, load_config
from lib.config.tree import PathsSection
from lib.engine import ANYWHERE, Address, Served
from lib.export.folder import MANIFEST, artifact_folder, open_artifact
from lib.export.usage import SERVED
from lib.front import TOKEN, check_token, front_environment
from lib.hosts import Host, Server, start
from lib.log import start_logging
from lib.places import locate
from lib.runfolder import Run, RunError, default_name, read_run
from lib.task import load_task, nearest

logger = logging.getLogger(__name__)

HERE = Address()
ENGINES = ("auto", "vllm", "transformers")


class ServingError(WorkbenchError, ValueError):
    """This cannot be served; the message says what to change."""


def parser() -> argparse.ArgumentParser:
    """The options of `python -m lib.run serve`."""
    made = argparse.ArgumentParser(
        prog="python -m lib.run serve",
        description="Serve a config's model, or a run's result, behind an OpenAI-compatible URL, until Ctrl+C. "
        f"Who asks needs a token: the one in {TOKEN}, or one that is made and kept in a file.",
        allow_abbrev=False,
    )
    made.add_argument("config", nargs="?", default="", help="a YAML file, e.g. configs/decisions.yaml: its base model")
    made.add_argument("--run", default="", help="instead of a config: the name of a run, to serve its base and result")
    which = "of the run's exports instead of what training left: " + ", ".join(SERVED)
    made.add_argument("--artifact", default="", metavar="KIND", help=which)
    made.add_argument("--engine", choices=ENGINES, default="auto", help="auto (default): vLLM, where it is installed")
    made.add_argument("--host", default=HERE.host, help="an IPv4 address to listen at; default: %(default)s")
    made.add_argument("--port", type=int, default=0, help="default: a free one")
    made.add_argument("--public", action="store_true", help="without a token: whoever reaches the address may ask")
    made.add_argument("--wait", type=float, default=900.0, help="seconds that it may take to start; default: 900")
    anything = "any config key, dotted (sampling.vllm.max_length=2048); repeatable"
    made.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)
    return made


def serve(options: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Start the server, say how to ask it, and stay until it is interrupted: 0. Raises ProgramError where it ends."""
    if bool(options.config) == bool(options.run):
        raise ServingError("give either a config, whose model is served, or --run with the name of a run")
    if options.artifact and not options.run:
        raise ServingError("--artifact names an export of a run: give --run with it")
    at = Address(_own_address(options.host), options.port, options.wait)
    run = _run_named(options.run, str(overrides.get("paths.outputs", PathsSection().outputs))) if options.run else None
    path = run.folder / "config.json" if run else options.config
    config = load_config(path, overrides)
    start_logging(log_folder(config) / "log.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        served = result_of(Run(run.folder, config), options.artifact) if run else base_of(config)
        with open_server(config, served, options.engine, at, options.public) as host:
            name = options.run or default_name(path, config.task.name)
            name = "-".join([name, options.artifact, "served"] if options.artifact else [name, "served"])
            sys.stdout.write(_told(config, served, host, at, [str(path), f"run_name={name}", *options.parameters]))
            sys.stdout.flush()
            while True:
                host.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped\n")
    return 0


def open_server(
    config: Config, served: Served, engine_name: str = "auto", at: Address = HERE, public: bool = False
) -> Host:
    """A server that is ready; `with` ends it. The token is then in this process's environment, and its children's.

    Raises WorkbenchError where it cannot be served as asked, ProgramError where it does not start.
    """
    token = None if public else own_token(config)
    if token:
        os.environ[TOKEN] = token  # lib/log.py scrubs what stands there; a client in this process finds it
    defaults = {"model": served.asked}
    if config.model.reasoning_effort:  # vLLM renders gpt-oss without the template that holds it
        defaults["reasoning_effort"] = config.model.reasoning_effort
    host = start(server_of(config, served, engine_name, front_environment(token, defaults), at))
    if at.host != HERE.host:
        reached = "every interface" if at.host == ANYWHERE else at.host
        who = (
            "without a token: whoever reaches it may ask"
            if public
            else "and what is sent, the token too, is not encrypted"
        )
        logger.warning("serving on %s by plain HTTP, %s", reached, who)
    return host


def server_of(config: Config, served: Served, engine_name: str, front: Mapping[str, str], at: Address) -> Server:
    """The program of the engine that is asked for, or that is there."""
    if engine_name == "auto":
        engine_name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        if engine_name == "transformers":
            logger.info("vLLM is not installed here: Transformers serves, one request after the other")
    made = engine.program if engine_name == "vllm" else transformers_server.program
    return made(config, served, log_folder(config), front, at)


def log_folder(config: Config) -> Path:
    """Where servers' logs are, and the token that was made."""
    folder = locate(config.paths.cache) / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# who may ask ----------------------------------------------------------------------------------------------------------
def own_token(config: Config) -> str:
    """The token in the environment, else the one that is kept in the cache, made where there is none."""
    given = os.environ.get(TOKEN, "")
    return check_token(given) if given else _kept_token(log_folder(config) / "token")


def _kept_token(file: Path) -> str:
    """The token in a file that only its owner can read; the same one at every start, so that who asks can go on."""
    descriptor, unfinished = tempfile.mkstemp(prefix=".token-", dir=file.parent)  # its owner's alone from the beginning
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):
            os.link(unfinished, file)  # whole, and never over one that is there
    finally:
        os.unlink(unfinished)
    facts = file.lstat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077 or facts.st_uid != os.getuid():
        raise ServingError(f"others can read or replace the token in {file}: delete it, and a new one is made")
    return check_token(file.read_text().strip(), str(file))


def _own_address(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise ServingError(
            f"--host {host}: give an IPv4 address of this machine; {HERE.host} is this machine only, {ANYWHERE} "
            f"every interface"
        ) from None


# what is served -------------------------------------------------------------------------------------------------------
def base_of(config: Config) -> Served:
    """The base model of a config; the starter is made where it is not in the cache."""
    rows = load_task(config.task.name, **config.task.params).rows("train") if _is_starter(config) else []
    source = models.resolve_model(config, rows)
    return Served(source, _name_of(config, source), is_base=True)


def result_of(run: Run, artifact: str = "") -> Served:
    """What a run's training made, or one of its exports: an adapter beside the base that it was made for, or a model.

    `artifact` "" = what training left. Raises ServingError.
    """
    if artifact:
        folder = export_folder(run, artifact)
    else:
        made = (run.outputs("training") or {}).get("path")
        if made is None or not (run.folder / made).is_dir():
            raise ServingError(
                f"run {run.name!r} has no result yet: run notebook 3_grpo_training with run_name={run.name} first, or "
                f"give its config instead of --run to serve its base"
            )
        folder = run.folder / made
    if not (folder / "adapter_config.json").is_file():
        return Served(str(folder), f"{run.name}-{artifact}" if artifact else run.name)
    base = str(json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
    if not Path(base).is_dir():  # a Hub id; or a folder that was elsewhere
        base = models.resolve_model(run.config, run.read_rows("train") if _is_starter(run.config) else [])
    name = _name_of(run.config, base)
    return Served(base, name, folder, run.name if run.name != name else f"{run.name}-adapter")


def export_folder(run: Run, artifact: str) -> Path:
    """The folder of a whole export of a run. Raises ServingError, ExportError."""
    if artifact not in SERVED:
        other = " Ollama and llama.cpp serve GGUF: notebook 5 tells how." if artifact in get_args(ArtifactKind) else ""
        told = f"artifact {artifact!r} cannot be served by vLLM or Transformers."
        raise ServingError(told + (other or nearest(artifact, SERVED)))
    folder = artifact_folder(run, artifact)
    if folder.is_dir():
        return open_artifact(folder).folder
    if artifact == "adapter" and (run.folder / "adapter").is_dir():
        return run.folder / "adapter"
    there = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}"))
    raise ServingError(
        f"run {run.name!r} has no export {artifact!r} (it has {', '.join(there) or 'none'}). Notebook "
        f"5_export_and_serve makes it: -p run_name={run.name} -p 'export.artifacts=[{artifact}]'"
    )


def _is_starter(config: Config) -> bool:
    return config.model.name == models.STARTER


def _name_of(config: Config, source: str) -> str:
    """The id of a base model: a Hub id as it is, a folder's name, `starter`."""
    if _is_starter(config):
        return models.STARTER
    return Path(source).name if Path(source).is_dir() else source


def _run_named(name: str, outputs: str) -> Run:
    folder = locate(outputs)
    known = [path.parent.name for path in folder.glob("*/config.json")]
    if name not in known:
        raise RunError(f"there is no run {name!r} in {folder}.{nearest(name, known)}")
    return read_run(folder / name)


def _told(config: Config, served: Served, host: Host, at: Address, parameters: Sequence[str]) -> str:
    path, *given = parameters
    url = f"{host.address if at.host == ANYWHERE else f'http://{at.host}:{host.port}'}/v1"
    public = not host.server.environment[TOKEN]
    where = [f"evaluation.endpoint.base_url={url}", f"evaluation.endpoint.model={served.asked}"]
    where += [] if public else [f"evaluation.endpoint.key={TOKEN}"]
    where += (
        ["evaluation.endpoint.beside_base=true"] if served.asked != served.name or "/export/" in served.source else []
    )
    evaluate = ["python", "-m", "lib.run", "4_adapter_evaluation", path]
    evaluate += [word for text in (*given, *where) for word in ("-p", text)]
    ids = f"{served.adapter_name} (the run's adapter), {served.name} (its base)" if served.adapter else served.name
    kept = log_folder(config) / "token"
    return (
        f"base_url  {url}\n"
        f"model     {ids}\n"
        f"serves    {served.source}\n"
        f"token     {'none: public' if public else _how_to_have(kept)}\n"
        f"log       {host.server.log}\n"
        f"evaluate  {shlex.join(evaluate)}\n"
        f"again     --port {host.port} (an evaluation that was begun asks at this address)\n"
        f"stop      Ctrl+C\n"
    )


def _how_to_have(kept: Path) -> str:
    token = os.environ[TOKEN]
    if kept.is_file() and kept.read_text().strip() == token:
        return f"export {TOKEN}=$(cat {shlex.quote(str(kept))})"
    return f"the one in {TOKEN}"
