#!/usr/bin/env python3
"""What one execution for all files saves: hothouse_files against a loop of ansible.builtin.template, on a real host.

    .venv/bin/python benchmarks/files.py [--inventory inventories/local] [--host local1] [--files 20] [--runs 3]

Both write the same files below /var/tmp/hothouse-benchmark of the host, over SSH and in turn, first where nothing is,
then where nothing is to be done; the folder is removed at the end. Prints the medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "/var/tmp/hothouse-benchmark"


def play(tasks: list[dict[str, Any]], folder: Path, inventory: str, host: str) -> float:
    """Run the tasks; seconds from start to end. Raises CalledProcessError with Ansible's output."""
    book = folder / "book.yml"
    book.write_text(json.dumps([{"hosts": host, "gather_facts": False, "tasks": tasks}]))
    begin = time.monotonic()
    subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", ROOT / inventory, book],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        check=True,
        stdout=subprocess.PIPE,
    )
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inventory", default="inventories/local")
    parser.add_argument("--host", default="local1")
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.j2").write_text("number {{ number | default(item) }} of {{ inventory_hostname }}\n")
        numbers = list(range(options.files))
        make = {"ansible.builtin.file": {"path": FOLDER, "state": "directory", "mode": "0755"}}
        remove = {"ansible.builtin.file": {"path": FOLDER, "state": "absent"}}
        template = {"src": str(folder / "page.j2"), "dest": FOLDER + "/{{ item }}", "mode": "0644"}
        loop = [{"ansible.builtin.template": template, "loop": numbers}]
        content = [f"number {number} of {{{{ inventory_hostname }}}}\n" for number in numbers]
        files = [{"path": f"{FOLDER}/{number}", "content": content[number]} for number in numbers]
        ways = {"loop of template": loop, "hothouse_files": [{"hothouse_files": {"files": files}}]}
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.runs):
            for way, tasks in ways.items():
                play([remove, make], folder, options.inventory, options.host)
                for state in ("fresh", "unchanged"):
                    seconds = play(tasks, folder, options.inventory, options.host)
                    times.setdefault((way, state), []).append(seconds)
        play([remove], folder, options.inventory, options.host)
    for state in ("fresh", "unchanged"):
        slow, fast = (statistics.median(times[way, state]) for way in ways)
        print(
            f"{options.files} files, {state}: loop {slow:.1f} s, hothouse_files {fast:.1f} s, ratio {slow / fast:.1f}"
        )


if __name__ == "__main__":
    main()
