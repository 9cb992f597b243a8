#!/usr/bin/python3 -I
"""roles/prepare: gives figures to the node exporter. As a command: hothouse_textfile.py NAME, with their text as input.

The folder lies in one of the account prometheus, which may put anything in its place: a link, a pipe, a file that never
ends. So no link is followed, nothing is waited for, and it is done with the rights of the folder's owner.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator

PARENT = "/var/lib/prometheus"
FOLDER = "node-exporter"
MOST_BYTES = 65536  # of a file
PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def folder(parent: str | None = None) -> Iterator[int | None]:
    """A descriptor of the exporter's folder, with the rights of its owner; None if there is no such folder."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    opened = []
    try:
        try:
            opened.append(os.open(PARENT if parent is None else parent, flags))
            opened.append(os.open(FOLDER, flags | os.O_NOFOLLOW, dir_fd=opened[0]))
        except FileNotFoundError:
            yield None
            return
        found = os.fstat(opened[1])
        before = os.geteuid(), os.getegid(), os.getgroups()
        if before[0] == 0 and found.st_uid != 0:
            os.setgroups([found.st_gid])
            os.setegid(found.st_gid)
            os.seteuid(found.st_uid)
        try:
            yield opened[1]
        finally:
            if os.geteuid() != before[0]:
                os.seteuid(before[0])
                os.setegid(before[1])
                os.setgroups(before[2])
    finally:
        for descriptor in opened:
            os.close(descriptor)


def read(at: int, name: str) -> str:
    """What is in a plain file of the folder, or an empty string. Raises nothing, whatever is there."""
    try:
        descriptor = os.open(name, os.O_RDONLY | PLAIN, dir_fd=at)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        return file.read(MOST_BYTES).decode("utf-8", "replace")


def write(at: int, name: str, text: str) -> None:
    """Replaces a file of the folder, whole or not at all. Raises OSError."""
    staged = f".{name}.new"  # the exporter reads *.prom
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged, dir_fd=at)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o644, dir_fd=at)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o644)
        file.write(text)
    os.rename(staged, name, src_dir_fd=at, dst_dir_fd=at)


def label(value: str) -> str:
    """The value of a label, in quotes."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


def main() -> None:
    if len(sys.argv) != 2 or not re.fullmatch(r"[a-z_]+", sys.argv[1]):
        sys.exit("usage: hothouse_textfile.py NAME <FIGURES")
    text = sys.stdin.read(MOST_BYTES)
    try:
        with folder() as at:
            if at is not None:
                write(at, f"{sys.argv[1]}.prom", text)
    except OSError as error:
        sys.exit(f"{PARENT}/{FOLDER}: {error.strerror}")


if __name__ == "__main__":
    main()
