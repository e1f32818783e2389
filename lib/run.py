"""The command line: check parameters, run notebooks through papermill, resume, exit codes.

Owns `python -m lib.run`. Must not know what the notebooks or the other subcommands do.

    python -m lib.run all configs/decisions.yaml
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib import PROJECT_ROOT, WorkbenchError, without

if TYPE_CHECKING:
    from lib.config import Config
    from lib.task import Task

CHAIN = ("1_data_prep", "2_reward_inspection", "3_grpo_training", "4_adapter_evaluation", "5_export_and_serve")

SCORELESS = frozenset({"1_data_prep"})
"""Notebooks that score nothing: they run without a judge's key."""

EPILOG = """\
examples:
  python -m lib.run all configs/decisions.yaml                       the whole chain; finished stages are skipped
  python -m lib.run all configs/decisions.yaml -p run_name=long -p training.steps=200
  python -m lib.run notebooks/3_grpo_training.ipynb configs/decisions.yaml
  python -m lib.run check sync --config configs/mrl.yaml             one part of a distributed training: rollout,
                                                                     reward, sync, checkpoints
  python -m lib.run serve --run decisions --artifact merged           an export behind an OpenAI-compatible URL
  python -m lib.run export-verl configs/ace.yaml                     its rows as parquet files for verl
  python -m lib.run doctor                                           what this machine has, and what is missing
"""


class Given(NamedTuple):
    """A -p value: as it was typed, and as YAML reads it."""

    text: str
    value: Any


class UsageError(WorkbenchError, ValueError):
    """The command line cannot be carried out; the message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done; 1 = failed; 2 = wrong usage, nothing was started; 75 = stopped, run again to go on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:
        from lib.doctor import main as doctor

        return doctor(arguments[1:])
    if arguments[:1] == ["train-child"]:
        from lib.backends import train_child

        return train_child(arguments[1])
    if arguments[:1] == ["check"]:
        return _check_part(arguments[1:])
    if arguments[:1] == ["serve"]:
        return _serve(arguments[1:])
    if arguments[:1] == ["export-verl"]:
        return _export_verl(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.run",
        description="Run one notebook, or the whole chain, headless on a config.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("notebook", help="a notebook, `all` for the chain 1-5, `serve`, or `doctor`")
    parser.add_argument("config", help="a YAML file, e.g. configs/decisions.yaml")
    anything = "a notebook parameter or any config key, dotted (training.steps=20); repeatable"
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)
    return parser


def _check_part(arguments: Sequence[str]) -> int:
    from lib.check import CheckError, check, parser

    options = parser().parse_args(arguments)
    try:
        given = _split(parse_parameters(options.parameters), {"run_name": ""}, options.config)
        return check(options.part, options.config, given["overrides"], str(given.get("run_name", "")))
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, CheckError) else 2


def _serve(arguments: Sequence[str]) -> int:
    from lib.program import ProgramError
    from lib.serving import parser, serve

    options = parser().parse_args(arguments)
    try:
        return serve(options, _split(parse_parameters(options.parameters), {}, options.config)["overrides"])
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, ProgramError) else 2


def _export_verl(arguments: Sequence[str]) -> int:
    from lib.verl.exporting import export_verl, parser

    options = parser().parse_args(arguments)
    try:
        given = _split(parse_parameters(options.parameters), {"run_name": ""}, options.config)
        return export_verl(options, given["overrides"], str(given.get("run_name", "")))
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _run(options: argparse.Namespace) -> int:
    from lib.runfolder import open_run

    try:
        order = check(options.notebook, options.config, options.parameters)
        if order.config.where == "here" and not SCORELESS.issuperset(path.stem for path in order.parameters):
            for warning in order.task.check():
                sys.stderr.write(f"warning: {warning}\n")
        open_run(order.run, order.config)
    except WorkbenchError as error:
        raise UsageError(str(error)) from None
    return _execute_all(order)


class Order(NamedTuple):
    """A checked command: which notebooks to run, with which parameters, on which config, in which run."""

    parameters: dict[Path, dict[str, Any]]
    """By notebook, in order."""
    config: Config
    task: Task
    run: str


def check(notebook: str, config_path: str, texts: Sequence[str]) -> Order:
    """A notebook (or `all`), a config and NAME=VALUE texts as an order; or what is wrong with them."""
    from lib.config import load_config
    from lib.runfolder import check_name, default_name
    from lib.task import load_task

    notebooks = [notebook_path(name) for name in (CHAIN if notebook == "all" else (notebook,))]
    given = parse_parameters(texts)
    parameters = {path: _split(given, notebook_parameters(path), config_path) for path in notebooks}
    first = parameters[notebooks[0]]
    config = load_config(config_path, first["overrides"])
    task = load_task(config.task.name, **config.task.params)
    run = check_name(first.get("run_name") or default_name(config_path, config.task.name))
    return Order(parameters, config, task, run)


def _execute_all(order: Order) -> int:
    spent: list[tuple[str, float]] = []
    for path, parameters in order.parameters.items():
        started = time.monotonic()
        status = execute(path, parameters | {"run_name": order.run}, order.config, order.run)
        spent.append((path.stem, time.monotonic() - started))
        if status:
            return status
    for stem, seconds in [*spent, ("total", sum(seconds for _, seconds in spent))]:
        sys.stdout.write(f"time  {stem:<24} {seconds:7.1f} s\n")
    return 0


def execute(notebook: Path, parameters: dict[str, Any], config: Config, run_name: str) -> int:
    """Run one notebook through papermill into the run folder, its plain lines streaming to this terminal."""
    from lib.executed import keep_attempt, target
    from lib.log import ScrubbedStream, scrub
    from lib.runfolder import RunError, clear_errors, open_run

    run = open_run(run_name, config)
    output = run.path("notebooks", notebook.name)
    kept = keep_attempt(output)
    sys.stdout.write(f"==> {notebook.name} -> {_shown(output)}\n")
    if kept:
        sys.stdout.write(f"    the last attempt did not reach its end; it is kept as {_shown(kept)}\n")
    sys.stdout.flush()
    _quiet_papermill()
    with without("rfc3987_syntax"):  # jsonschema builds a whole grammar of web addresses from it, for a second
        import papermill
        from nbclient.exceptions import DeadKernelError

    stdout, stderr = ScrubbedStream(sys.stdout), ScrubbedStream(sys.stderr)
    try:
        with clear_errors(output):
            papermill.execute_notebook(
                str(notebook),
                target(output),
                parameters=parameters,
                cwd=str(PROJECT_ROOT),
                kernel_name="python3",
                progress_bar=False,
                log_output=False,
                stdout_file=stdout,
                stderr_file=stderr,
                shutdown_kernel="immediate",  # a second sooner; training has a process of its own, nothing is lost
                extra_arguments=["--log-level=40"],  # the kernel's own warnings are about itself, not about the run
            )
    except papermill.PapermillExecutionError as error:
        sys.stderr.write(f"error: {notebook.name}, cell {error.exec_count}: {error.ename}: {scrub(error.evalue)}\n")
        sys.stderr.write(f"the executed notebook, up to the failing cell: {_shown(output)}\n")
        return 75 if error.ename == "TrainingStopped" else 1
    except DeadKernelError:
        sys.stderr.write(
            f"error: {notebook.name}: its kernel died (out of memory? see `dmesg`). Run the same command again\n"
        )
        return 1
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again, it goes on from here\n")
        return 75
    finally:
        stdout.close()
        stderr.close()
    return 0


def notebook_path(name: str) -> Path:
    """The notebook of this path or name; names the known ones where there is none."""
    from lib.task import nearest

    folder = PROJECT_ROOT / "notebooks"
    for candidate in (Path(name), PROJECT_ROOT / name, folder / name, folder / f"{name}.ipynb"):
        if candidate.is_file() and candidate.suffix == ".ipynb":
            return candidate.resolve()
    raise UsageError(
        f"notebook not found: {name}.{nearest(Path(name).stem, [path.stem for path in folder.glob('*.ipynb')])}"
    )


def notebook_parameters(path: Path) -> dict[str, Any]:
    """The literals in a notebook's cell tagged `parameters`, by name."""
    import ast
    import json

    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            values: dict[str, Any] = {}
            for node in ast.parse("".join(cell["source"])).body:
                target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
                if isinstance(target, ast.Name) and isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
                    try:
                        values[target.id] = ast.literal_eval(node.value)
                    except ValueError:
                        raise UsageError(
                            f"{path.name}: the parameter {target.id} is computed; papermill would keep its old value. "
                            f"Write a literal there, and compute in a later cell"
                        ) from None
            return values
    raise UsageError(f"{path.name} has no cell tagged `parameters`: tag its second cell so")


def parse_parameters(texts: Sequence[str]) -> dict[str, Given]:
    """NAME=VALUE pairs; values are YAML (7 is a number, true a boolean), or text where they are not."""
    import yaml

    values: dict[str, Given] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"-p {text}: write NAME=VALUE")
        try:
            values[name] = Given(value, yaml.safe_load(value))
        except yaml.YAMLError:
            values[name] = Given(value, value)
    return values


def _split(given: dict[str, Given], known: dict[str, Any], config_path: str) -> dict[str, Any]:
    """A notebook's own parameters, checked by type; every other name is a config key and goes into `overrides`."""
    from lib.config import ConfigError, check_key

    nested = given["overrides"].value if "overrides" in given else {}
    if not isinstance(nested, dict):
        raise UsageError(f"-p overrides={nested!r}: write overrides={{key: value}}, or each key by its own -p")
    if "config" in given:
        raise UsageError("-p config=...: the config is the second argument already")
    chosen: dict[str, Any] = {"config": config_path, "overrides": dict(nested)}
    for name, value in given.items():
        if name == "overrides":
            continue
        if name in known:
            chosen[name] = _as_kind(name, value, known[name])
            continue
        try:
            check_key(name)
        except ConfigError as error:
            own = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"unknown parameter {name!r}. Did you mean {own[0]!r}?" if own else str(error)) from None
        chosen["overrides"][name] = value.value
    return chosen


def _as_kind(name: str, given: Given, default: Any) -> Any:
    """A notebook parameter's value as the type of its default (text as it was typed); refused where it is another."""
    value, kind = given.value, type(default)
    if isinstance(default, str) and not isinstance(value, (list, dict)):
        return value if isinstance(value, str) else given.text
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if default is None or type(value) is kind:
        return value
    raise UsageError(f"-p {name}={value!r}: this notebook parameter is a {kind.__name__} (default {default!r})")


def _quiet_papermill() -> None:
    import logging

    # Its own lines name cells and timings; ours are streamed from the notebook itself.
    logging.getLogger("papermill").setLevel(logging.ERROR)


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
