"""A real JupyterLab server for tests: a notebook's cells run in the kernel that the lab starts for it.

with lab(tmp_path) as server:
    outputs = server.run_notebook(Path("notebooks/3_grpo_training.ipynb"), {"run_name": "tried"})
"""

from __future__ import annotations

import ast
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT

OUTPUTS = ("stream", "display_data", "execute_result")
START, CELL, END = 60.0, 300.0, 20.0
"""Seconds that the server, one cell and the shutdown may take."""


class CellError(AssertionError):
    """A cell raised."""


class Lab:
    """A running server: its address, its token and where its kernels leave their connection files."""

    def __init__(self, url: str, token: str, runtime: Path) -> None:
        self.url, self.token, self.runtime = url, token, runtime

    def run_notebook(self, path: Path, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run every code cell of a notebook of the project, with these values in its parameters cell.

        Returns the outputs (nbformat) in order, without later updates of a display. Raises CellError. The kernel is the
        one that the lab itself would start on opening the notebook: it knows its name (JPY_SESSION_NAME) and stands in
        the notebook's folder.
        """
        path = PROJECT_ROOT / path
        name = path.relative_to(PROJECT_ROOT).as_posix()
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        wanted = {"path": name, "name": path.name, "type": "notebook", "kernel": {"name": "python3"}}
        session = self.ask("POST", "api/sessions", wanted)
        try:
            with self._client(session["kernel"]["id"]) as client:
                sources = [edited(cell, values) for cell in cells]
                return [output for source in sources for output in _execute(client, source)]
        finally:
            self.ask("DELETE", f"api/sessions/{session['id']}")

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request to the server; its JSON answer, or its text."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            text = answer.read().decode()
            return json.loads(text) if text and "json" in answer.headers.get("Content-Type", "") else text

    @contextmanager
    def _client(self, kernel: str) -> Iterator[Any]:
        from jupyter_client.blocking import BlockingKernelClient

        client = BlockingKernelClient(connection_file=str(self.runtime / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        client.hb_channel.time_to_dead = START  # its own second is too short for a kernel on a busy machine
        try:
            client.wait_for_ready(timeout=START)
            yield client
        finally:
            client.stop_channels()


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab on the project, on loopback, with all that it writes under `folder`; ended whatever happens."""
    token = secrets.token_hex(16)
    places = {
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "IPYTHONDIR": folder / "ipython",
    }
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
        f"--ServerApp.root_dir={PROJECT_ROOT}", "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
        *(["--allow-root"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    environment = os.environ | {name: str(place) for name, place in places.items()} | {"JUPYTER_TOKEN": token}
    log = folder / "lab.txt"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield _ready(server, token, places["JUPYTER_RUNTIME_DIR"], log)
    finally:
        _end(server)


def edited(cell: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """A cell's source; the parameters cell with these values, as a person would type them into it."""
    source = "".join(cell["source"])
    if "parameters" not in cell["metadata"].get("tags", []):
        return source
    tree = ast.parse(source)
    known = {ast.unparse(node.target): node for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert values.keys() <= known.keys(), f"no such parameters: {sorted(values.keys() - known.keys())}"
    for name, value in values.items():
        known[name].value = ast.parse(repr(value), mode="eval").body
    return ast.unparse(tree)


def _execute(client: Any, source: str) -> list[dict[str, Any]]:
    from nbformat.v4 import output_from_msg

    seen: list[dict[str, Any]] = []

    def keep(message: Mapping[str, Any]) -> None:
        if message["msg_type"] in OUTPUTS:
            seen.append(output_from_msg(message))

    reply = client.execute_interactive(source, allow_stdin=False, timeout=CELL, output_hook=keep)["content"]
    if reply["status"] != "ok":
        trace = "\n".join(reply.get("traceback", []))
        raise CellError(f"{reply.get('ename')}: {reply.get('evalue')}\nin the cell\n{source}\n{trace}")
    return seen


def _ready(server: subprocess.Popen[bytes], token: str, runtime: Path, log: Path) -> Lab:
    """The server once it serves the lab's page; its file in the runtime folder tells the port that it was given."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.poll() is None:
        for facts in runtime.glob("jpserver-*.json"):
            with suppress(ValueError, OSError, urllib.error.URLError):
                found = Lab(json.loads(facts.read_text())["url"], token, runtime)
                assert "<title>JupyterLab</title>" in found.ask("GET", "lab")
                return found
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start (exit status {server.poll()}):\n{log.read_text()[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask it to end, with its kernels; then end it and what is left of its group."""
    server.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(END)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
