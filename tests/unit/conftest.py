"""What the unit tests share: our own plugins, run by a real ansible-playbook on this machine."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

BUNDLE = Path(__file__).resolve().parents[2]
SECRET = re.compile(r"\w+-secret")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
    "ANSIBLE_CONFIG": str(BUNDLE / "ansible.cfg"),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def load_plugin(path: str) -> ModuleType:
    """Imports a plugin of the bundle by its path below plugins/."""
    spec = importlib.util.spec_from_file_location(
        f"hothouse_{path.replace('/', '_')}", BUNDLE / "plugins" / f"{path}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ansible(*command: str | Path, **environment: str) -> dict[str, list[dict[str, Any]]]:
    """Runs Ansible as a user does, in the bundle's folder. Returns for each host the results of its tasks."""
    done = subprocess.run(
        command, cwd=BUNDLE, env=ENVIRONMENT | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results: dict[str, list[dict[str, Any]]] = {}
    for task in json.loads(done.stdout)["plays"][0]["tasks"]:
        for host, result in task["hosts"].items():
            results.setdefault(host, []).append(result)
    return results


def render(*arguments: str | Path) -> dict[str, dict[str, dict[str, str]]]:
    """What the roles would write: host → `rendered` (path → text), `sums` of secret ones, `states` → path → value."""
    playbook = BUNDLE / "tests/unit/data/render.yml"
    results = ansible("ansible-playbook", playbook, *arguments, ANSIBLE_ROLES_PATH=str(BUNDLE / "roles"))
    files: dict[str, dict[str, dict[str, str]]] = {}
    for host, tasks in results.items():
        for kind in ("rendered", "sums", "states"):
            found = files.setdefault(host, {}).setdefault(kind, {})
            for result in tasks:
                found.update(result.get(kind, {}))
        assert not SECRET.search(json.dumps(files[host])), "a secret is in a file that is not marked as one"
    return files


_shared: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets the processes of a test run share what costs seconds."""
    own = tmp_path_factory.getbasetemp()
    _shared[:] = [own.parent if own.name.startswith("popen-") else own]


@functools.cache
def shipped(inventory: str) -> dict[str, dict[str, dict[str, str]]]:
    """What the roles would write with one of inventories/, or a path; rendered once for all tests of a run."""
    with (_shared[0] / f"{inventory.replace('/', '_')}.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            text = json.dumps(render("-i", BUNDLE / "inventories" / inventory))
            file.write(text)
            file.flush()
    found: dict[str, dict[str, dict[str, str]]] = json.loads(text)
    return found


@dataclass
class Play:
    """What a run of ansible-playbook said."""

    code: int
    output: str

    @property
    def results(self) -> list[dict[str, Any]]:
        """The result of each task that was run, on the first host of each."""
        document = json.loads(self.output[self.output.index("{\n") : self.output.rindex("}") + 1])
        tasks = [task for play in document["plays"] for task in play["tasks"]]
        return [next(iter(task["hosts"].values())) for task in tasks if task["hosts"]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Play]:
    """Runs tasks on this machine, with nothing but the bundle's plugins configured."""
    folder = tmp_path / "ansible"
    folder.mkdir()
    plugins = BUNDLE / "plugins"
    (folder / "ansible.cfg").write_text(
        f"[defaults]\nlibrary={plugins}/modules\naction_plugins={plugins}/action\n"
        f"module_utils={plugins}/module_utils\nfilter_plugins={plugins}/filter\n"
        "interpreter_python=/usr/bin/python3\n[connection]\npipelining=True\n"
    )

    def run(
        tasks: list[dict[str, Any]], *arguments: str, hosts: int = 1, text: bool = False, **environment: str
    ) -> Play:
        """Runs the tasks; `text` asks for what a user sees instead of JSON."""
        names = {
            f"host{number}": {"ansible_connection": "local", "number": number} for number in range(hosts)
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": names}}))
        (folder / "play.yml").write_text(
            yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}])
        )
        settings = {
            "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
            "ANSIBLE_HOME": str(folder / "home"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default" if text else "ansible.posix.json",
        }
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", "hosts.yml", "play.yml", *arguments],
            cwd=folder,
            env=clean | settings | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if text else None,
            text=True,
        )
        return Play(done.returncode, done.stdout)

    return run
