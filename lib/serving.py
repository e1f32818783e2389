"""A config's model, or a run's result, behind an OpenAI-compatible URL of this machine.

Owns what is served under which id, and how to ask it. Bound to loopback. Must not know training or evaluation.

    python -m lib.run serve configs/decisions.yaml
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import WorkbenchError, models
from lib.config import Config, load_config
from lib.config.tree import PathsSection
from lib.engine import Served, program
from lib.hosts import Host, start
from lib.log import start_logging
from lib.places import locate
from lib.runfolder import Run, RunError, default_name, read_run
from lib.task import load_task, nearest


class ServingError(WorkbenchError, ValueError):
    """This cannot be served; the message says what to change."""


def parser() -> argparse.ArgumentParser:
    """The options of `python -m lib.run serve`."""
    made = argparse.ArgumentParser(
        prog="python -m lib.run serve",
        description="Serve a config's model, or a run's result, behind an OpenAI-compatible URL, until Ctrl+C.",
        allow_abbrev=False,
    )
    made.add_argument("config", nargs="?", default="", help="a YAML file, e.g. configs/decisions.yaml: its base model")
    made.add_argument("--run", default="", help="instead of a config: the name of a run, to serve its base and result")
    made.add_argument("--port", type=int, default=0, help="of the loopback interface; default: a free one")
    made.add_argument("--wait", type=float, default=900.0, help="seconds that it may take to start; default: 900")
    anything = "any config key, dotted (sampling.vllm.max_length=2048); repeatable"
    made.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)
    return made


def serve(options: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Start the server, say how to ask it, and stay until it is interrupted: 0. Raises ProgramError where it ends."""
    if bool(options.config) == bool(options.run):
        raise ServingError("give either a config, whose model is served, or --run with the name of a run")
    run = _run_named(options.run, str(overrides.get("paths.outputs", PathsSection().outputs))) if options.run else None
    path = run.folder / "config.json" if run else options.config
    config = load_config(path, overrides)
    logs = locate(config.paths.cache) / "serve"
    logs.mkdir(parents=True, exist_ok=True)
    start_logging(logs / "log.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        served = result_of(Run(run.folder, config)) if run else base_of(config)
        with start(program(config, served, logs, port=options.port, deadline=options.wait)) as host:
            name = options.run or default_name(path, config.task.name)
            sys.stdout.write(_told(served, host, [str(path), f"run_name={name}-served", *options.parameters]))
            sys.stdout.flush()
            while True:
                host.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped\n")
    return 0


def base_of(config: Config) -> Served:
    """The base model of a config; the starter is made where it is not in the cache."""
    rows = load_task(config.task.name, **config.task.params).rows("train") if _is_starter(config) else []
    source = models.resolve_model(config, rows)
    return Served(source, _name_of(config, source))


def result_of(run: Run) -> Served:
    """What a run's training made: its adapter beside the base that it was made for, or its whole model."""
    made = (run.outputs("training") or {}).get("path")
    if made is None or not (run.folder / made).is_dir():
        raise ServingError(
            f"run {run.name!r} has no result yet: run notebook 3_grpo_training with run_name={run.name} first, or give "
            f"its config instead of --run to serve its base"
        )
    if made != "adapter":
        return Served(str(run.folder / made), run.name)
    adapter = run.folder / made
    base = str(json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
    if not Path(base).is_dir():  # a Hub id; or a folder that was elsewhere
        base = models.resolve_model(run.config, run.read_rows("train"))
    name = _name_of(run.config, base)
    return Served(base, name, adapter, run.name if run.name != name else f"{run.name}-adapter")


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


def _told(served: Served, host: Host, parameters: Sequence[str]) -> str:
    path, *given = parameters
    url = f"{host.address}/v1"
    where = [f"evaluation.endpoint.base_url={url}", f"evaluation.endpoint.model={served.asked}"]
    where += ["evaluation.endpoint.beside_base=true"] if served.adapter else []
    evaluate = ["python", "-m", "lib.run", "4_adapter_evaluation", path]
    evaluate += [word for text in (*given, *where) for word in ("-p", text)]
    ids = f"{served.adapter_name} (the run's adapter), {served.name} (its base)" if served.adapter else served.name
    return (
        f"base_url  {url}\n"
        f"model     {ids}\n"
        f"serves    {served.source}\n"
        f"log       {host.server.log}\n"
        f"evaluate  {shlex.join(evaluate)}\n"
        f"again     --port {host.port} (an evaluation that was begun asks at this address)\n"
        f"stop      Ctrl+C\n"
    )
