"""One distributed training to look at: every sync method, a worker killed in the middle, notebook 3 with its chart.

`decisions` on two vLLM workers of this machine. It begins with `lora`; three times a worker only says that it has
loaded (benchmarks/faults), cannot prove it, is fenced and gets its weights by the next method: reload, volume,
checkpoint. The other worker is killed in the middle and comes back. Leaves the executed notebook and its page.

Exit status 0 = trained to the end, every method proven, nothing trained on that was not.

    PYTHONPATH=. .venv/bin/python benchmarks/show_distributed.py          # about 4 minutes on 2 quiet cores
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib import PROJECT_ROOT
from lib.roles import FALLBACK
from lib.runfolder import Run, read_run

NOTEBOOK = "3_grpo_training"
FAULTS = ("lora-3", "reload-6", "volume-9")
"""Method and the optimizer step from which on it fails once."""
KILL_AT = 7
SECONDS = 1800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/decisions.yaml")
    parser.add_argument("--name", default="show-distributed")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    folder = Path(PROJECT_ROOT, options.outputs, options.name)
    if folder.exists():
        sys.exit(f"{folder} is there already: give another --name, or remove it")
    with tempfile.TemporaryDirectory(prefix="faults-") as faults:
        for name in FAULTS:
            Path(faults, name).touch()
        status = watch(start(options, faults), folder, Path(faults))
    if status:
        return status
    run = read_run(folder)
    print(f"notebook: {folder / 'notebooks' / NOTEBOOK}.ipynb\npage:     {page_of(run)}")
    return verdict(run)


def start(options: argparse.Namespace, faults: str) -> subprocess.Popen[bytes]:
    """Notebook 3 as a user starts it, with faults under way."""
    settings = {
        "backend": "distributed", "run_name": options.name, "paths.outputs": options.outputs,
        "training.steps": options.steps, "training.save_steps": options.steps, "training.batch": options.batch,
        "sampling.vllm.max_length": 128, "distributed.workers": 2, "distributed.sync_method": "lora",
    }  # fmt: skip
    command = [sys.executable, "-m", "lib.run", NOTEBOOK, options.config]
    command += [word for name, value in settings.items() for word in ("-p", f"{name}={value}")]
    places = os.pathsep.join([str(Path(__file__).with_name("faults")), str(PROJECT_ROOT)])
    return subprocess.Popen(command, cwd=PROJECT_ROOT, env=os.environ | {"FAULTS": faults, "PYTHONPATH": places})


def watch(process: subprocess.Popen[bytes], folder: Path, faults: Path) -> int:
    """Kill a worker that has no fault when the time has come; the exit status at the end."""
    killed, end = 0, time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        if not killed and steps_done(folder) >= KILL_AT:
            faulty = {int(path.name.split("-")[2]) for path in faults.glob("taken-by-*")}
            killed = next(pid for pid in worker_pids(folder.name) if pid not in faulty)
            os.kill(killed, signal.SIGKILL)
            print(f"killed the worker of process {killed}", flush=True)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        sys.exit(f"not done after {SECONDS} s")
    left = [path.name for path in faults.iterdir() if path.name in FAULTS]
    if left or not killed:
        sys.exit(f"faults that did not happen: {left}; killed: {killed or 'nobody'}")
    return process.returncode


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def worker_pids(run: str) -> list[int]:
    """The rollout workers of a run, which their command lines name (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "lib.rollout_worker" in words and f'"run":"{run}"' in words:
            found.append(int(entry.parent.name))
    return sorted(found)


def page_of(run: Run) -> Path:
    """The executed notebook as HTML."""
    folder = run.folder / "notebooks"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", str(folder / NOTEBOOK)]
    subprocess.run([*command[:-1], f"{command[-1]}.ipynb"], check=True)
    return folder / f"{NOTEBOOK}.html"


def verdict(run: Run) -> int:
    """Print what was seen of what should be, and return the exit status."""
    events = run.events()
    proofs = [event for event in events if event["kind"] == "proof"]
    proven = {(event["role"], event["version"]) for event in proofs if event["holds"]}
    fenced = {event["method"] for event in events if event["kind"] == "fenced"}
    checks = {
        f"every method proven: {', '.join(FALLBACK)}": {e["method"] for e in proofs if e["holds"]} == set(FALLBACK),
        f"fenced: {', '.join(sorted(fenced))}": fenced == {fault.split("-")[0] for fault in FAULTS},
        "one worker died and came back": [e["kind"] for e in events].count("died") == 1,
        "all turns trained on are of proven weights": all(
            (one["worker"], one["version"]) in proven for one in run.rollouts()
        ),
        f"{run.config.training.steps} steps": len(run.metrics()) == run.config.training.steps,
    }
    for name, passed in checks.items():
        print(f"{'ok ' if passed else 'NOT'} {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
