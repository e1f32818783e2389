"""Modal on loopback for the tests: the real client, a project of its own, and a server that really runs the bodies.

The server stands beside the checkout in ../shared/tools/modal_loopback (read its README): "containers" are bubblewrap
mount trees that hold only what the client uploaded.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine_stand_in import write as write_machine

from lib import PROJECT_ROOT

MODAL = [sys.executable, "-m", "modal"]
APP = "grpo-workbench-ada-default"


class Cloud:
    """A copy of the project whose experimenter is `ada`, and the server that her Modal client talks to."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.folder, self.server, self.core = folder, server, server.core

    def environment(self, **more: str) -> dict[str, str]:
        names = ("EXPERIMENTER", "EXPERIMENT_NAME", "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "GEMINI_API_KEY")
        mine = {name: value for name, value in os.environ.items() if name not in names}
        return {**mine, **self.server.env(), "PYTHONPATH": str(self.folder), **more}

    def modal(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`modal ...` in the project's folder, as a user types it."""
        return self._run([*MODAL, *arguments], environment)

    def call(self, entry: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`modal run -m lib.modal_app::ENTRY ...`"""
        return self.modal("run", "-m", f"lib.modal_app::{entry}", *arguments, **environment)

    def local(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python -m lib.run ...` of the copy, on this machine."""
        return self._run([sys.executable, "-m", "lib.run", *arguments], environment)

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A command that goes on by itself, in a session of its own."""
        file = log.open("wb")
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdout=file, stderr=file, start_new_session=True
        )

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def volume(self, kind: str, experimenter: str = "ada-default") -> Path:
        """The committed state of a volume: cache, data or outputs."""
        name = f"grpo-workbench-{kind}-{experimenter}"
        number = next(key for key, volume in self.core.volumes.items() if volume["name"] == name)
        return Path(self.core.state) / "volumes" / str(number)

    def run_folder(self, run: str) -> Path:
        return self.volume("outputs") / run

    def definition(self, name: str) -> dict[str, Any]:
        """The newest definition of a function of that name, as the server recorded it."""
        return next(found for found in reversed(self.core.describe()) if found["name"] == name)

    def logs(self) -> str:
        """What all containers have printed so far."""
        found = sorted((Path(self.core.state) / "tasks").glob("*/log"), key=lambda path: path.stat().st_mtime)
        return "".join(path.read_text(errors="replace") for path in found)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.core.events if event["event"] == kind]

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def wait_until(condition: Any, seconds: float = 120, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this never came: {what}"
        time.sleep(0.1)


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@contextmanager
def cloud_of(shared: Path, folder: Path) -> Iterator[Cloud]:
    """The server's life, with the project's copy beside it."""
    module = _load(shared / "tools" / "modal_loopback" / "modal_loopback.py")
    project = folder / "project"
    for name in ("lib", "notebooks", "configs", "requirements"):
        shutil.copytree(PROJECT_ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".env").write_text("EXPERIMENTER=ada\n")
    with module.Loopback(folder / "modal", python=sys.executable) as server:
        _mend_commit(server.core, module)
        _mend_waiting(server.core)
        _show_cores(server.core)
        _run_clusters(server.core, module, folder / "hosts")
        yield Cloud(project, server)


def _mend_commit(core: Any, module: Any) -> None:
    """The stand-in notes what it published only after copying: what came in between would never be published."""

    def commit(task: str, volume: str) -> None:
        work, store = core.work(task, volume), core.state / "volumes" / volume
        if not work.exists():
            return
        noted = core.state / "tasks" / task / f"{volume}.base"
        before, now = module._snap(None, noted), module._snap(work)
        for name, signature in list(now.items()):
            if before.get(name) == signature:
                continue
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(work / name, store / name)
            except FileNotFoundError:  # renamed or removed meanwhile: the next commit sees it
                now.pop(name)
        for name in before.keys() - now.keys():
            (store / name).unlink(missing_ok=True)
        core.volumes[volume]["commits"] += 1
        noted.write_text(json.dumps(now))

    core.commit = commit


def _mend_waiting(core: Any) -> None:
    """The stand-in waits on one condition with a timeout, and with many calls at once loses its lock for good."""

    async def wait_for(met: Any, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not met() and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def notify() -> None:
        """Whoever waits looks by itself."""

    core.wait_for, core.notify = wait_for, notify


def _show_cores(core: Any) -> None:
    """vLLM on a CPU asks lscpu, which reads /sys: the stand-in's containers have none."""
    command = core.command

    def with_sys(*arguments: Any, **named: Any) -> Any:
        words, cwd = command(*arguments, **named)
        if words[0] == "bwrap":
            words[words.index("--proc") : words.index("--proc")] = ["--ro-bind", "/sys", "/sys"]
        return words, cwd

    core.command = with_sys


def _run_clusters(core: Any, module: Any, hosts: Path) -> None:
    """The stand-in notes clusters, and runs one container for a call of theirs: here one for each machine.

    Each has an address of loopback of its own, and instead of verl's interpreter the program of machine_stand_in.py, in
    the manner of `core.manner`. As with Modal all get the call's input, and the first one's result is the call's.
    """
    hosts.write_text("127.0.0.1 localhost\n::1 i6pn.modal.local\n")
    core.manner = ""
    add, get_inputs, command, proto = core._add, core.FunctionGetInputs, core.command, module.P
    clusters: dict[str, list[list[str]]] = {}
    copies: dict[str, int] = {}

    def size(function: str) -> int:
        return int(core.fdef(function)._experimental_group_size)

    async def for_each(call: str, item: Any) -> Any:
        added = await add(call, item)
        for rank in range(1, size(core.calls[call]["fid"])):
            dropped = core.new("calls", "fc")
            core.calls[dropped] = core.calls[call] | {"outputs": [], "inputs": [], "n": 0}
            copy = (await add(dropped, item)).input_id
            copies[copy], core.inputs[copy]["retry"] = rank, 10**6  # not again by itself, when its app is stopped
        return added

    async def hello(request: Any) -> Any:
        function = core.tasks[request.task_id].fid
        count, known = size(function), clusters.setdefault(function, [[]])
        if len(known[-1]) == count:
            known.append([])
        mine = known[-1]
        mine.append(request.task_id)
        await core.wait_for(lambda: len(mine) == count, 60)
        core.tasks[request.task_id].rank = rank = mine.index(request.task_id)
        addresses = [f"127.0.0.{31 + number}" for number in range(count)]
        return proto.TaskClusterHelloResponse(
            cluster_id="cu-1", cluster_rank=rank, container_ips=["::1"] * count, container_ipv4_ips=addresses
        )

    async def its_own(request: Any) -> Any:
        task = core.tasks[module.TASK.get()]
        waiting = core.pending[task.fid]
        if size(task.fid):
            rank = task.rank
            await core.wait_for(lambda: any(copies.get(one, 0) == rank for one in waiting), 5)
            waiting.sort(key=lambda one: copies.get(one, 0) != rank)
        return await get_inputs(request)

    def with_hosts(task: str, root: Path, *others: Any, **named: Any) -> Any:
        words, cwd = command(task, root, *others, **named)
        function = core.tasks[task].fid
        if function and size(function):
            words[words.index("--proc") : words.index("--proc")] = ["--ro-bind", str(hosts), "/etc/hosts"]
            write_machine(root / "root" / "build" / "verl" / "bin" / "python", core.manner)
        return words, cwd

    core._add, core.TaskClusterHello, core.FunctionGetInputs, core.command = for_each, hello, its_own, with_hosts


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("modal_loopback", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["modal_loopback"] = module
    spec.loader.exec_module(module)
    return module
