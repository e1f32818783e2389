"""Writes lib/sandbox/inside/filters.py: the seccomp filter of a sandboxed program, compiled for every architecture.

Owns the list of system calls that are refused. Development only: needs libseccomp2 (any Debian has it); the workbench
itself ships the bytes. Must not know sandboxes.

    python -m lib.sandbox.make_filters
"""

from __future__ import annotations

import base64
import ctypes
import errno
import tempfile
import textwrap
from pathlib import Path

TARGET = Path(__file__).parent / "inside" / "filters.py"
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Name in os.uname().machine -> AUDIT_ARCH_* of linux/audit.h."""

ALLOW = 0x7FFF0000
REFUSE = 0x00050000
NOT_EQUAL, MASKED_EQUAL = 1, 7

NAMESPACES = (
    "mount umount umount2 pivot_root chroot unshare setns move_mount open_tree fsopen fsmount fspick fsconfig "
    "mount_setattr"
)
OTHER_PROCESSES = "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd"
NEW_PROCESSES = "fork vfork execve execveat"
"""Threads only: RLIMIT_AS and RLIMIT_CPU then bound the whole execution."""
SHARED = (
    "shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink keyctl add_key "
    "request_key memfd_create memfd_secret"
)
"""What could outlive an execution, or hold memory beyond its limit."""
KERNEL = (
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register io_setup io_submit init_module "
    "finit_module delete_module kexec_load kexec_file_load open_by_handle_at name_to_handle_at personality quotactl "
    "quotactl_fd swapon swapoff reboot syslog acct settimeofday clock_settime clock_adjtime adjtimex fanotify_init "
    "lookup_dcookie landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp ioperm iopl modify_ldt "
    "uselib vhangup mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node sethostname setdomainname "
    "vmsplice nfsservctl"
)
"""Rarely used corners in which most kernel holes were found."""

CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
TERMINAL_INJECTION = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: typing into somebody's terminal."""


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


class Filter:
    """A deny list for one architecture; other architectures' calls (32 bit, x32) kill the process."""

    def __init__(self, architecture: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(ALLOW)))
        native = self._library.seccomp_arch_native
        native.restype = ctypes.c_uint32
        if native() != architecture:
            self._check(self._library.seccomp_arch_add(self._context, ctypes.c_uint32(architecture)))
            self._check(self._library.seccomp_arch_remove(self._context, ctypes.c_uint32(native())))

    def refuse(self, name: str, code: int, *, argument: int = 0, mask: int = 0, value: int = 0) -> None:
        """The call fails with errno `code`, where a mask is given only if argument & mask == value."""
        self._refuse(name, code, int(mask > 0), _Compare(argument, MASKED_EQUAL, mask, value))

    def refuse_unless(self, name: str, code: int, *, argument: int, value: int) -> None:
        """The call fails with errno `code` unless argument == value."""
        self._refuse(name, code, 1, _Compare(argument, NOT_EQUAL, value, 0))

    def _refuse(self, name: str, code: int, count: int, compare: _Compare) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        assert number != -1, f"libseccomp does not know {name}: use a newer one"
        self._check(
            self._library.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(REFUSE | code), number, count, ctypes.byref(compare)
            )
        )

    def compiled(self) -> bytes:
        """The classic BPF program: 8 bytes an instruction."""
        with tempfile.TemporaryFile() as file:
            self._check(self._library.seccomp_export_bpf(self._context, file.fileno()))
            file.seek(0)
            return file.read()

    @staticmethod
    def _check(status: int) -> None:
        if status < 0:
            raise OSError(-status, "libseccomp refused a rule")


def build(architecture: int) -> bytes:
    """The filter of a sandboxed program."""
    made = Filter(architecture)
    for name in " ".join([NAMESPACES, OTHER_PROCESSES, NEW_PROCESSES, SHARED, KERNEL]).split():
        made.refuse(name, errno.EPERM)
    made.refuse("clone3", errno.ENOSYS)  # its flags lie in memory, where no filter can look; libc falls back to clone
    made.refuse("clone", errno.EPERM, mask=CLONE_THREAD, value=0)
    for bit in CLONE_NAMESPACES:
        made.refuse("clone", errno.EPERM, mask=bit, value=bit)
    made.refuse("socket", errno.EACCES)  # socketpair stays: asyncio wakes itself through one
    made.refuse_unless("prlimit64", errno.EPERM, argument=0, value=0)  # limits of other processes
    for request in TERMINAL_INJECTION:
        made.refuse("ioctl", errno.EPERM, argument=1, mask=0xFFFFFFFF, value=request)
    return made.compiled()


def main() -> None:
    lines = ['"""Written by `python -m lib.sandbox.make_filters`: seccomp programs, base64. Do not edit."""', ""]
    lines += ["FILTERS = {"]
    for name, architecture in ARCHITECTURES.items():
        text = base64.b64encode(build(architecture)).decode()
        lines += [f'    "{name}": (', *(f'        "{part}"' for part in textwrap.wrap(text, 108)), "    ),"]
    TARGET.write_text("\n".join([*lines, "}", '"""os.uname().machine -> classic BPF, 8 bytes an instruction."""', ""]))


if __name__ == "__main__":
    main()
