"""What a worker process gives up before it opens what strangers uploaded.

Map: what is refused - the filter as a BPF program - drop_rights - take_stdin
Rule: refuse only what decoding, computing and drivers surely never need. Files, ioctl,
memory, threads, child processes and local sockets stay; whoever breaks a decoder keeps those.
Runs in: a worker process, once, after its imports; an archive's reader (unpack.py). Standard library
only. What is given up can't be taken back, and holds for every thread and child of the process.

Linux on x86-64 and ARM64; on other systems nothing happens. Numbers of calls: the kernel's
asm/unistd_64.h and asm-generic/unistd.h; the filter: its Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import struct
import sys

log = logging.getLogger("sandbox")

# machine: (AUDIT_ARCH_*, number of seccomp(), number of socket())
MACHINES = {"x86_64": (0xC000003E, 317, 41), "aarch64": (0xC00000B7, 277, 198)}
# Call: (number on x86-64, on ARM64; None where it doesn't exist)
REFUSED: dict[str, tuple[int, int | None]] = {
    # other processes' memory and files
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    # io_uring opens sockets past a filter; userfaultfd and keys are known for holes
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    # the machine itself
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "iopl": (172, None),
    "ioperm": (173, None),
}
# AF_UNIX: drivers' daemons. AF_NETLINK: news of devices. Neither leaves the machine.
LOCAL_FAMILIES = (1, 16)
X32_BIT = 0x4000_0000  # x86-64's second table of the same calls
PR_SET_NO_NEW_PRIVS = 38
SET_MODE_FILTER, FLAG_TSYNC = 1, 1
ALLOW, REFUSE = 0x7FFF_0000, 0x0005_0000 | errno.EPERM
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: ld abs word, jeq, jge, ret
# Offsets in struct seccomp_data; the low half of the first argument, both machines being little-endian.
NUMBER_AT, ARCH_AT, ARGUMENT_AT = 0, 4, 16


# ---------------------------------------------------------------- the filter
def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps count steps to leave out."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def filter_program(machine: str) -> bytes:
    """The BPF program for a machine: calls not refused pass, refused ones fail with EPERM. Raises
    KeyError for an unknown machine."""
    arch, _, socket_number = MACHINES[machine]
    refuse, allow = _step(RETURN, REFUSE), _step(RETURN, ALLOW)
    # Another table of calls (32 bit) would pass under other numbers.
    steps = [_step(LOAD, ARCH_AT), _step(EQUAL, arch, 1), refuse, _step(LOAD, NUMBER_AT)]
    if machine == "x86_64":
        steps += [_step(AT_LEAST, X32_BIT, 0, 1), refuse]
    for numbers in REFUSED.values():
        number = numbers[machine == "aarch64"]
        if number is not None:
            steps += [_step(EQUAL, number, 0, 1), refuse]
    steps += [_step(EQUAL, socket_number, 1), allow, _step(LOAD, ARGUMENT_AT)]
    for family in LOCAL_FAMILIES:
        steps += [_step(EQUAL, family, 0, 1), allow]
    return b"".join([*steps, refuse, allow])


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def _install(machine: str) -> None:
    """Take away new rights, then install the filter for all threads. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Without it only root may install a filter; with it no setuid program gives rights back.
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    steps = filter_program(machine)
    program = _Program(len(steps) // 8, steps)
    numbers = (MACHINES[machine][1], SET_MODE_FILTER, FLAG_TSYNC)
    # Positive: the id of a thread that already has a filter of its own.
    if libc.syscall(*map(ctypes.c_long, numbers), ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "the filter was refused")


# ---------------------------------------------------------------- for workers
def drop_rights() -> bool:
    """Give up what this process doesn't need; whether that worked, which is logged if not.

    Look for devices before: a driver's first use may start a setuid program, which then has no rights.
    """
    if not sys.platform.startswith("linux"):
        return False
    import resource

    # A core dump would hold other people's pages, and fill the disk.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _install(platform.machine())
    except KeyError:
        log.warning("no system call filter for %s: the worker keeps its rights", platform.machine())
        return False
    except OSError as error:
        log.warning(
            "the worker keeps its rights: %s (%s)", error.strerror, os.strerror(error.errno or errno.EINVAL)
        )
        return False
    return True


def take_stdin() -> int:
    """Another descriptor of stdin; under its own number there is nothing to be read any more.

    On Windows whoever looks at a pipe that another thread reads hangs: children at their start, and
    OpenBLAS (numpy issue 24290). Raises OSError where there is no stdin.
    """
    stdin = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return stdin
