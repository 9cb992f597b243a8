"""Runs a command that may read and write what it is told to, and nothing else of this machine.

    hothouse_confine.py [--read PATH]… [--write PATH]… -- COMMAND [ARGUMENT…]

The kernel does it (Landlock, Linux 5.13 and later, no privileges needed): the command and whatever it starts open no
other file, trace no process outside, reach no abstract socket outside (6.12), and make no TCP connection (6.7). They
can still send UDP packets and connect to a socket file whose path they know. Where the kernel has no Landlock, the
command runs unconfined, and a line on standard error says so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

# linux/landlock.h; the numbers of the system calls are the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
GET_VERSION = 1
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# How many kinds of access to files each version of the interface knows.
KINDS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
TCP_BIND_AND_CONNECT = 3
ABSTRACT_SOCKETS_AND_SIGNALS = 3

# What programs need of a system, and where no one keeps secrets. Not /proc, which shows the environment of others.
SYSTEM = (
    "/bin", "/lib", "/lib32", "/lib64", "/sbin", "/usr", "/proc/cpuinfo", "/proc/meminfo", "/dev/random",
    "/dev/urandom", "/dev/zero", "/etc/alternatives", "/etc/group", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/localtime", "/etc/mime.types", "/etc/nsswitch.conf", "/etc/os-release", "/etc/passwd",
)  # fmt: skip


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr"""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr"""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    """A system call. Raises OSError."""
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def version() -> int:
    """Which version of Landlock the kernel has, 0 if none."""
    if platform.system() != "Linux":
        return 0
    try:
        return call(CREATE_RULESET, None, ctypes.c_size_t(0), GET_VERSION)
    except OSError:
        return 0


def confine(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Confines this process and all that it starts, for ever. Raises OSError."""
    known = version()
    everything = (1 << KINDS[min(known, max(KINDS))]) - 1
    ruleset = Ruleset(everything, TCP_BIND_AND_CONNECT, ABSTRACT_SOCKETS_AND_SIGNALS)
    size = 8 if known < 4 else 16 if known < 6 else 24
    descriptor = call(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0)
    reading = EXECUTE | READ_FILE | READ_DIR
    allowed = [*((path, reading) for path in readable), *((path, everything) for path in writable)]
    allowed += [("/dev/null", reading | WRITE_FILE | TRUNCATE)]
    for path, access in allowed:
        try:
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = PathBeneath(access & everything & (-1 if Path(path).is_dir() else OF_FILES), at)
        call(ADD_RULE, descriptor, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        os.close(at)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    call(RESTRICT_SELF, descriptor, 0)


def main(words: list[str]) -> None:
    """Entry point: becomes the command."""
    options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    paths: dict[str, list[str]] = {"--read": [], "--write": []}
    for option, path in zip(options[::2], options[1::2], strict=True):
        paths[option].append(path)
    if version():
        confine([*SYSTEM, *paths["--read"]], paths["--write"])
    else:
        print(
            "This kernel has no Landlock: what follows is not kept from files and the network.",
            file=sys.stderr,
        )
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
