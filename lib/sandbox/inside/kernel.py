"""The kernel's own means against a process: limits, namespaces, capabilities, seccomp. Linux, x86-64 and aarch64.

Owns the raw calls, through ctypes. Must not know who is confined, or why.

    python -c "from lib.sandbox.inside.kernel import Machine; print(Machine())"
"""

from __future__ import annotations

import base64
import ctypes
import os
import resource
import signal
import struct
import time

from lib.sandbox.inside.filters import FILTERS

NEW_MOUNTS, NEW_IPC, NEW_PIDS = 0x00020000, 0x08000000, 0x20000000
_NOSUID, _NODEV = 2, 4
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_CLONE = {"x86_64": 56, "aarch64": 220}
_CAPABILITY_VERSION = 0x20080522

MB = 1 << 20
FILES = 64
"""Open files of one execution, at most."""
THREADS = 64
"""Threads of one execution, at most: RLIMIT_NPROC, which the kernel does not apply to root."""


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class Machine:
    """The calls, looked up once: a clone of this process finds everything ready."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._after_fork = ctypes.pythonapi.PyOS_AfterFork_Child
        architecture = os.uname().machine
        if architecture not in FILTERS:
            raise OSError(f"no seccomp filter for {architecture}; known: {', '.join(FILTERS)}")
        program = base64.b64decode(FILTERS[architecture])
        self._instructions = ctypes.create_string_buffer(program, len(program))
        self._program = _Program(len(program) // 8, ctypes.addressof(self._instructions))
        self._clone = _CLONE[architecture]

    def fork(self, namespaces: int) -> int:
        """os.fork() into new namespaces: 0 in the child, its process id here."""
        if not namespaces:
            return os.fork()
        pid: int = self._libc.syscall(
            self._clone, ctypes.c_ulong(namespaces | signal.SIGCHLD), *(ctypes.c_ulong(0) for _ in range(4))
        )
        if pid == 0:
            self._after_fork()
        self._check(pid, "clone into new namespaces")
        return pid

    def mount_tmpfs(self, path: str, size: int, files: int) -> None:
        """An empty file system in memory at `path`: at most `size` bytes in `files` files."""
        options = f"size={size},nr_inodes={files},mode=1777".encode()
        self._check(
            self._libc.mount(b"tmpfs", path.encode(), b"tmpfs", ctypes.c_ulong(_NOSUID | _NODEV), options),
            f"mount of {path}",
        )

    def drop_capabilities(self) -> None:
        header, none = struct.pack("<Ii", _CAPABILITY_VERSION, 0), struct.pack("<6I", *[0] * 6)
        self._check(self._libc.capset(header, none), "capset")

    def filter_calls(self) -> None:
        """Refuse the system calls of make_filters.py from now on, in this process and whatever comes from it."""
        self._check(self._libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        self._check(self._libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(self._program), 0, 0), "seccomp")

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: {os.strerror(code)}")


def set_limits(memory_mb: int, file_mb: int) -> None:
    """Hard limits of this process, but that on CPU time."""
    limits = {
        resource.RLIMIT_AS: memory_mb * MB,
        resource.RLIMIT_FSIZE: file_mb * MB,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: THREADS,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def set_cpu_limit(cpu: float) -> None:
    """SIGXCPU after `cpu` seconds of CPU time (the kernel counts whole ones), SIGKILL one later."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))


def cpu_seconds(pid: int) -> float:
    """CPU time that a process of ours has used, in all its threads: clock_gettime on its own clock."""
    return time.clock_gettime(~pid << 3 | 2)
