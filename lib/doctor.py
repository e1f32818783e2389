"""What this machine and this Python have, what is missing, and the command that brings it.

Owns: `python -m lib.run doctor`. Must not know: what the workbench does with any of it. It needs the standard library
alone, so it also works before anything is installed.

    python -m lib.doctor
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lib import PROJECT_ROOT

REQUIREMENTS = PROJECT_ROOT / "requirements"
FREE_DISK_GB = {"cpu": 5, "cuda": 20}
"""What a set-up and a first run want free, in GB."""

Accelerator = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy`: what to do, as a command where there is one. `missing`: required and not there."""

    part: str
    found: str
    remedy: str = ""
    missing: bool = False


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; `memory` and `capability` as it prints them ("143771 MiB", "9.0")."""

    index: str
    name: str
    driver: str
    memory: str
    capability: str


def report(lock: Path | None = None, full: bool = False) -> list[Finding]:
    """All findings, in the order they are shown.

    lock: what the packages are held against; default: the installed torch's lock, else the one nvidia-smi asks for.
    full: also imports torch, in a process of its own (seconds).
    """
    gpus = _gpus()
    accelerator: Accelerator = _accelerator(gpus)
    lock = lock or REQUIREMENTS / f"{accelerator}.lock"
    findings = [*_system(accelerator), *_nvidia(gpus, accelerator), *_packages(lock), _attention(gpus, accelerator)]
    findings.append(_sandbox())
    return [*findings, *_torch(gpus)] if full else findings


def render(findings: Sequence[Finding]) -> str:
    """A plain table: one line a finding, its remedy below it, and a closing line that counts what is missing."""
    width = max(len(finding.part) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'MISSING' if finding.missing else '':8}{finding.part:{width}}  {finding.found}".rstrip())
        if finding.remedy:
            lines.append(f"{'':8}{'':{width}}  -> {finding.remedy}")
    missing = sum(finding.missing for finding in findings)
    lines.append(f"Required and missing: {missing}." if missing else "Nothing required is missing.")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """`python -m lib.run doctor [--full]`: 0 when nothing required is missing, else 1."""
    parser = argparse.ArgumentParser(prog="python -m lib.run doctor", description="What is here, and what is missing.")
    parser.add_argument("--full", action="store_true", help="also import torch and ask it for its devices (seconds)")
    findings = report(full=parser.parse_args(argv).full)
    sys.stdout.write(render(findings))
    return int(any(finding.missing for finding in findings))


def _system(accelerator: Accelerator) -> list[Finding]:
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    free = shutil.disk_usage(PROJECT_ROOT).free / 1e9
    wanted = FREE_DISK_GB[accelerator]
    return [
        Finding("system", _os_name(), "use WSL2 (Ubuntu) on Windows" if os.name == "nt" else "", os.name == "nt"),
        Finding(
            "python",
            f"{version}, {sys.executable}",
            "" if supported else "PYTHON=python3.11 make setup   (3.11 and 3.12 are supported)",
            not supported,
        ),
        Finding("cpu", f"{platform.machine()}, {_threads()} of {os.cpu_count()} threads usable"),
        Finding("memory", _memory()),
        Finding(
            "disk",
            f"{free:.0f} GB free where the project is",
            "" if free >= wanted else f"free some: a set-up and a first run want {wanted} GB (old runs: outputs/)",
        ),
        Finding(
            "git",
            shutil.which("git") or "not found",
            "" if shutil.which("git") else "apt-get install -y git   (a run's provenance names the commit)",
        ),
    ]


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        available = None
    return f"{total:.0f} GB" + (f", {int(available[1]) / 1e6:.0f} GB available" if available else "")


def _smi(*arguments: str) -> str:
    """nvidia-smi's output; empty where it is missing, finds no GPU or does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _gpus() -> list[Gpu]:
    table = _smi("--query-gpu=index,name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
    cells = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return [Gpu(*row) for row in cells if len(row) == 5]


def _accelerator(gpus: Sequence[Gpu]) -> Accelerator:
    """Which lock this Python was installed from: PyTorch's CPU build names itself in its version."""
    torch = _version("torch")
    if torch is None:
        return "cuda" if gpus else "cpu"
    return "cpu" if torch.endswith("+cpu") or sys.platform != "linux" else "cuda"


def _nvidia(gpus: Sequence[Gpu], accelerator: Accelerator) -> list[Finding]:
    if not gpus:
        if accelerator == "cuda":
            remedy = "ACCELERATOR=cpu make setup   (or bring the driver: the CUDA lock is installed)"
            return [Finding("gpu", "nvidia-smi lists none", remedy)]
        found = "nvidia-smi lists none" if shutil.which("nvidia-smi") else "none (no nvidia-smi)"
        return [Finding("gpu", found, "nothing to do: the CPU lock is right here")]
    header = re.search(r"CUDA (?:\w+ )?Version\s*:\s*([\d.]+)", _smi())
    cuda = header[1] if header else "unknown"
    findings = [Finding("driver", gpus[0].driver), Finding("cuda", cuda, *_cuda_too_old(cuda, accelerator))]
    for gpu in gpus:
        findings.append(Finding(f"gpu {gpu.index}", f"{gpu.name}, {gpu.memory}, compute capability {gpu.capability}"))
    if accelerator == "cpu":
        findings.append(Finding("lock", "the CPU lock is installed: the GPU stays idle", "ACCELERATOR=cuda make setup"))
    return findings


def _cuda_too_old(cuda: str, accelerator: Accelerator) -> tuple[str, bool]:
    """The driver must know the major CUDA version that the lock's torch was built with."""
    built = re.search(r"^nvidia-cuda-runtime==(\d+)", (REQUIREMENTS / "cuda.lock").read_text(), re.MULTILINE)
    if accelerator == "cpu" or built is None or not cuda[0].isdigit() or int(cuda.split(".")[0]) >= int(built[1]):
        return "", False
    return f"install an NVIDIA driver for CUDA {built[1]} or newer, or: ACCELERATOR=cpu make setup", True


def _packages(lock: Path) -> list[Finding]:
    """The packages of the version table one by one, the rest of the lock in one line."""
    pins = _pins(lock)
    if pins is None:
        return [
            Finding("packages", f"not installed for {sys.executable}", "make setup   (then .venv/bin/python)", True)
        ]
    shown = [name for name in _table(lock) if name in pins]
    findings = [_package(name, pins[name], lock) for name in shown]
    rest = [name for name in pins if name not in shown]
    off = [name for name in rest if _version(name) != pins[name]]
    findings.append(
        Finding("the rest", f"{len(rest) - len(off)} of {len(rest)} other packages are as {lock.name} says")
    )
    return [*findings, *(_package(name, pins[name], lock) for name in off)]


def _package(name: str, pin: str, lock: Path) -> Finding:
    found = _version(name)
    if found == pin:
        return Finding(name, found)
    return Finding(name, f"{found or 'not installed'}, {lock.name} says {pin}", "make setup", True)


def _pins(lock: Path) -> Mapping[str, str] | None:
    """Name -> version of every line of the lock that holds here; None where nothing is installed to read it with."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return None
    lines = [Requirement(line) for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    here = [line for line in lines if line.marker is None or line.marker.evaluate()]
    return {canonicalize_name(line.name): next(iter(line.specifier)).version for line in here}


def _table(lock: Path) -> list[str]:
    """The names asked for by the lock's .in file and the version table, in that order."""
    files = [REQUIREMENTS / f"{lock.stem}.in", REQUIREMENTS / "versions.in"]
    text = "\n".join(file.read_text() for file in files if file.exists())
    return [name.lower().replace("_", "-") for name in re.findall(r"^[A-Za-z][\w.-]*", text, re.MULTILINE)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _attention(gpus: Sequence[Gpu], accelerator: Accelerator) -> Finding:
    version = _version("flash-attn")
    if version is not None:
        return Finding("attention", f"flash-attn {version}")
    if accelerator == "cpu" or not gpus:
        return Finding("attention", "sdpa (FlashAttention is not used on a CPU)")
    return Finding(
        "attention", "sdpa (flash-attn is not installed; it is optional)", "FLASH_ATTENTION=1 make setup   (needs nvcc)"
    )


_ASK_SANDBOX = """
import json, sys
from lib.sandbox import SandboxError, self_test
try: found = self_test()
except SandboxError as error: sys.exit(f"refused: {error}")
print(json.dumps([found.backend, len(found.checks), found.seconds, found.reason]))
"""


def _sandbox() -> Finding:
    """What isolates untrusted programs, asked in a process of its own; only the task `coding` needs it."""
    command = [sys.executable, "-c", _ASK_SANDBOX]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding("sandbox", "its self-test did not end within 120 s", "only the task coding needs it")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        if not reason.startswith("refused: "):
            return Finding("sandbox", "not asked: the packages are not installed", "make setup")
        found, _, remedy = reason.removeprefix("refused: ").partition(". ")
        return Finding("sandbox", found, f"{remedy} (only the task coding needs it)")
    backend, checks, seconds, why = json.loads(done.stdout.splitlines()[-1])
    note = "" if why == "the first choice" else f"; {why}"
    return Finding("sandbox", f"{backend}, {checks} checks passed in {seconds:.1f} s{note}")


_ASK_TORCH = """
import json, torch
cuda = torch.cuda
devices = [f"{cuda.get_device_name(i)} {cuda.get_device_capability(i)}" for i in range(cuda.device_count())]
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
print(json.dumps(facts | {"devices": devices}))
"""


def _torch(gpus: Sequence[Gpu]) -> list[Finding]:
    """What torch itself says, asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [Finding("import torch", (done.stderr.strip().splitlines() or ["failed"])[-1], "make setup", True)]
    facts = json.loads(done.stdout.splitlines()[-1])
    devices = facts["devices"]
    found = (
        f"{facts['version']}, CUDA {facts['cuda']}, {facts['threads']} threads, GPUs: {', '.join(devices) or 'none'}"
    )
    blind = facts["cuda"] is not None and len(devices) < len(gpus)
    remedy = "torch sees fewer GPUs than nvidia-smi: check CUDA_VISIBLE_DEVICES and the driver" if blind else ""
    return [Finding("import torch", found, remedy, blind)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
