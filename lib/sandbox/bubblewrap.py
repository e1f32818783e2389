"""bubblewrap: the command that starts a side inside its own namespaces, and what to do where it cannot.

Owns what a sandbox can see of this machine. Must not know programs, tests or verdicts.

    python -c "from lib.sandbox.bubblewrap import explain; print(explain('bwrap: loopback: Failed RTM_NEWADDR'))"
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import os
import platform
import shutil
import stat
import sys
import zipfile
from functools import cache
from pathlib import Path

from lib.sandbox.settings import SandboxError

CODE = "/workbench.zip"
"""Where the sandboxes find their own code."""

USER = 61_001
"""An id that is nobody's: the sandboxes of a workbench that runs as root run as this user where that can be."""

_TMP_BYTES = 64 << 20
_NOBODY = "65534"

_OR_MODAL = "Or run programs on Modal: sandbox.backend: modal."


def command(code: int, *, solution: bool, warm: bool) -> list[str]:
    """bwrap and its arguments, up to the Python that runs inside; `code` is a descriptor that the archive is read from.

    bwrap's own environment must be empty: its first process keeps it, whatever --clearenv says.

    No /proc (as root it would show, and let write, the kernel's settings), no /etc, no home, no network; the root and
    /dev are read-only; only the solution side has a /tmp that can be written, with a limit.
    """
    arguments = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--uid",
        _NOBODY,
        "--gid",
        _NOBODY,
        "--die-with-parent",
    ]
    arguments += ["--new-session", "--clearenv"]
    for name, value in environment(CODE).items():
        arguments += ["--setenv", name, value]
    arguments += ["--ro-bind", "/usr", "/usr"]
    for name in ("lib", "lib32", "lib64", "bin"):
        if os.path.islink(f"/{name}"):
            arguments += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]  # Pythons in /usr/local are found by it
    if not sys.base_prefix.startswith("/usr"):
        arguments += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    arguments += ["--ro-bind-data", str(code), CODE]
    arguments += ["--size", str(_TMP_BYTES), "--tmpfs", "/tmp"] if solution else ["--dir", "/tmp"]
    arguments += ["--dev", "/dev", "--remount-ro", "/dev"]  # a tmpfs without a limit otherwise
    if solution and warm:
        arguments += [
            "--cap-add",
            "CAP_SYS_ADMIN",
        ]  # in its own user namespace: what its clones' namespaces are made with
    else:
        arguments += ["--disable-userns"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp"]


def python(script: str) -> list[str]:
    """The interpreter that this one was made from, and the main function of a module in lib/sandbox/inside."""
    base: str = sys._base_executable  # type: ignore[attr-defined]
    code = f"import sys; from lib.sandbox.inside.{script} import main; main(*sys.argv[1:])"
    return [os.path.realpath(base), "-s", "-S", "-B", "-P", "-c", code]


@cache
def archive(compiled: bool = True) -> bytes:
    """lib/sandbox/inside as a zip file that Python imports from; compiling it anew would cost 30 ms a start."""
    inside = Path(__file__).parent / "inside"
    modules = {f"lib/sandbox/inside/{path.stem}": path.read_text() for path in sorted(inside.glob("*.py"))}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, source in {"lib/__init__": "", "lib/sandbox/__init__": "", **modules}.items():
            if not compiled:
                file.writestr(f"{name}.py", source)
                continue
            code = compile(source, f"{name}.py", "exec", dont_inherit=True)
            file.writestr(f"{name}.pyc", importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    return data.getvalue()


def code_file() -> int:
    """The archive as a file in memory: a descriptor to be closed."""
    fd = os.memfd_create("code")
    os.write(fd, archive())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def environment(code: str) -> dict[str, str]:
    """All of it. The hash seed is fixed: the same program gives the same answer twice."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONPATH": code,
        "PYTHONHASHSEED": "0",
    }


def user() -> int | None:
    """The user to run the sandboxes as, where this process is root and that user can read what they need."""
    if os.geteuid() != 0:
        return None
    needed = [Path(python("solution")[0]), Path(sys.base_prefix) / "lib"]
    return USER if all(_readable_by_all(path) for path in needed) else None


def _readable_by_all(path: Path) -> bool:
    through = all(stat.S_IMODE(parent.stat().st_mode) & 0o001 for parent in path.resolve().parents)
    return through and bool(stat.S_IMODE(path.stat().st_mode) & 0o004)


def require() -> None:
    """Raise SandboxError where bubblewrap cannot even be started."""
    if sys.platform != "linux":
        name = "macOS" if sys.platform == "darwin" else platform.system()
        raise SandboxError(f"{name} has none of the namespaces that isolate programs here. Use sandbox.backend: modal.")
    if not shutil.which("bwrap"):
        raise SandboxError(
            "bubblewrap (bwrap) is not installed: nothing isolates untrusted programs. Install it: apt-get install -y "
            f"bubblewrap   (Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap). {_OR_MODAL}"
        )


def explain(error: str) -> str:
    """bwrap's own line, and what to do about it."""
    lines = [line for line in error.strip().splitlines() if line.startswith("bwrap:")] or error.strip().splitlines()[
        -1:
    ]
    line = lines[0] if lines else "it ended without a word"
    return f"no isolation here: {line}. {_remedy(line)}"


def _remedy(line: str) -> str:
    if "uid map: Permission denied" in line or "RTM_NEWADDR" in line:
        return (
            "AppArmor keeps programs from using user namespaces (Ubuntu 24.04, GitHub's runners): sudo sysctl -w "
            "kernel.apparmor_restrict_unprivileged_userns=0, or load Ubuntu's profile bwrap-userns-restrict. "
            + _OR_MODAL
        )
    if "namespace" in line or "No permissions" in line or "clone" in line:
        return (
            "User namespaces are off. In a container: docker run --security-opt seccomp=unconfined --security-opt "
            "systempaths=unconfined; on a host: sudo sysctl -w kernel.unprivileged_userns_clone=1 "
            "user.max_user_namespaces=10000. " + _OR_MODAL
        )
    if "execvp" in line:
        return f"The sandbox does not find the interpreter {python('solution')[0]}: use one in /usr. {_OR_MODAL}"
    if "Unknown option" in line:
        return f"bubblewrap is older than 0.8, which is needed: install a newer one. {_OR_MODAL}"
    return f"Run it in a terminal to see more: bwrap --unshare-all --ro-bind / / true. {_OR_MODAL}"
