"""Tells the journal as whom, where and with which rights it runs, once for each way in which a release gets to run."""

import ctypes
import json
import os
import sys
import syslog
from pathlib import Path

CLONE_NEWUSER = 0x10000000


def record(way: str) -> None:
    """Writes one line of JSON. The journal adds the account by itself (`_UID`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    found = {
        "way": way,
        "unit": next((line.rpartition("/")[2] for line in groups if line.endswith(".service")), ""),
        "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16),
        "no_new_privileges": status["NoNewPrivs"],
        "seccomp": status["Seccomp"],
        "homes": os.access("/root", os.R_OK) or os.access("/home", os.R_OK),
        "writable": [
            path for path in ("/etc/hothouse", "/opt/hothouse", sys.prefix) if os.access(path, os.W_OK)
        ],
        "namespaces": ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0,
    }
    syslog.openlog("tally-recorder")
    syslog.syslog(json.dumps(found))


def main() -> None:
    """The console script."""
    record("script")
