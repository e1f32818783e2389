"""The command lines of the Modal entry points: `modal run -m lib.modal_app::NAME ARGUMENTS`.

Owns their options. Read when lib/modal_app.py is imported, because the app's functions are defined from them. Must not
know Modal.

    python -c "from lib.command import read_command as r; print(r('modal run -m lib.modal_app::checkpoints'.split()))"
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_APP = re.compile(r"(?:lib\.modal_app|(?:.*[/\\])?modal_app\.py)(?:::(?:app\.)?(\w+))?")


class Command(NamedTuple):
    """What Modal's command line was asked for."""

    verb: str
    """run or deploy."""
    entry: str
    """The entry point; "" for deploy."""
    options: argparse.Namespace
    detach: bool


def read_command(argv: Sequence[str]) -> Command | None:
    """The command that this process runs; None where it is none of ours (a plain import, a container)."""
    for position, text in enumerate(argv):
        match = _APP.fullmatch(text)
        verb = next((word for word in argv[:position] if word in ("run", "deploy")), None)
        if match and verb:
            flags = argv[:position]
            detach = any(flag == "--detach" or re.fullmatch("-[dqim]*d[dqim]*", flag) for flag in flags)
            entry = match[1] or ""
            if verb == "deploy":
                return Command(verb, "", argparse.Namespace(), detach)
            parser = PARSERS.get(entry)
            rest = list(argv[position + 1 :])
            return Command(verb, entry, parser().parse_args(rest), detach) if parser else None
    return None


def settings(options: argparse.Namespace) -> list[str]:
    """The -p texts of a command, its flags for the container among them."""
    gpus = options.gpu.split(",") if options.gpu else []
    texts = {
        "modal.gpu": f"[{', '.join(gpus)}]" if len(gpus) > 1 else options.gpu,
        "modal.cpu": options.cpu,
        "modal.memory": options.memory,
        "modal.timeout": options.timeout,
        "modal.retries": options.retries,
    }
    return [*options.parameters, *(f"{key}={value}" for key, value in texts.items() if value is not None)]


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"modal run -m lib.modal_app::{name}", description=text, allow_abbrev=False)


def _with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/decisions.yaml")
    anything = "a notebook parameter or any config key, dotted; repeatable"
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)


def _with_container(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", help="H100, A100-80GB:2, none; or several to try in order: H100,A100-80GB")
    parser.add_argument("--cpu", help="physical cores")
    parser.add_argument("--memory", help="GiB")
    parser.add_argument("--timeout", help="hours that one attempt may take, at most 24")
    parser.add_argument("--retries", help="attempts after the first that ran out of time or crashed")


def _run() -> argparse.ArgumentParser:
    parser = _parser("run", "Run a notebook, or `all`, in a container; its files appear on the outputs volume.")
    parser.add_argument("--notebook", required=True, help="a name in notebooks/, a path of your own, or `all`")
    _with_config(parser)
    _with_container(parser)
    return parser


def _sweep() -> argparse.ArgumentParser:
    text = "Train once for each combination of values, side by side, then compare the results in notebook 4."
    parser = _parser("sweep", text)
    parser.add_argument("--notebook", default="3_grpo_training", help="what each of them runs (default: %(default)s)")
    grid = "KEY=VALUE,VALUE ... of config keys; every combination becomes a run"
    parser.add_argument("--grid", nargs="+", action="extend", required=True, metavar="KEY=VALUES", help=grid)
    _with_config(parser)
    _with_container(parser)
    return parser


def _upload() -> argparse.ArgumentParser:
    text = "Bring the data that a config names, and a run's prepared rows, to the data volume; verify it there."
    parser = _parser("upload", text)
    _with_config(parser)
    return parser


def _fetch() -> argparse.ArgumentParser:
    parser = _parser("fetch", "Bring a run's folder from the outputs volume to outputs/ here.")
    parser.add_argument("--run", required=True, help="the run's name")
    parser.add_argument("--to", help="its name here, where another run has it already")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of steps, at least 1")
    return int(text)


def _quote() -> argparse.ArgumentParser:
    parser = _parser("quote", "Say dollars and hours with an interval, from a probe or an earlier run.")
    _with_config(parser)
    _with_container(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="the earlier run to measure by (default: the one of the config's name)")
    source.add_argument("--probe", type=_count, metavar="STEPS", help="first train so many steps in a run of its own")
    return parser


def _check() -> argparse.ArgumentParser:
    from lib.check import PARTS

    text = "Try one part of a distributed training there: a worker's answers, the reward, a weight sync with its proof."
    parser = _parser("check", text)
    parser.add_argument("part", choices=PARTS)
    _with_config(parser)
    _with_container(parser)
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "run": _run,
    "sweep": _sweep,
    "check": _check,
    "upload": _upload,
    "fetch": _fetch,
    "quote": _quote,
    "checkpoints": lambda: _parser("checkpoints", "List the runs and checkpoints on the outputs volume."),
}
