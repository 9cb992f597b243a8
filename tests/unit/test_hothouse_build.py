"""Wheels are built by pinned backends, and what builds them knows nothing of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from conftest import BUNDLE, load_plugin

sys.path.append(str(BUNDLE / "plugins/plugin_utils"))
import hothouse_build as build  # what the action plugin imports
import hothouse_confine as confine

release = load_plugin("action/hothouse_release")
GREETER = Path(__file__).parent / "data/greeter"
needs_landlock = pytest.mark.skipif(not confine.version(), reason="this kernel has no Landlock")
BACKENDS = [
    ('["flit_core>=3"]', "flit_core.buildapi"),
    ('["hatchling"]', "hatchling.build"),
    ('["pdm-backend"]', "pdm.backend"),
    ('["poetry-core>=2"]', "poetry.core.masonry.api"),
    ('["setuptools>=61", "wheel"]', "setuptools.build_meta"),
    ('["uv_build>=0.9"]', "uv_build"),
]
# A backend of the project's own: what it can see and do becomes the reason why it fails.
SPY = """
import json, os, socket

def tried(action):
    try:
        action()
        return "allowed"
    except OSError as error:
        return error.strerror

def build_wheel(*_, **__):
    given = json.loads(open("tried.json").read())
    found = {"environment": dict(os.environ)}
    found["read"] = {path: tried(lambda: open(path).read()) for path in given["read"]}
    found["write"] = {path: tried(lambda: open(path, "a")) for path in given["write"]}
    found["list"] = tried(lambda: os.listdir(given["list"]))
    found["connect"] = tried(lambda: socket.create_connection(("127.0.0.1", given["port"]), 5))
    raise SystemExit("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of the backends, shared by the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example project."""
    return shutil.copytree(GREETER, tmp_path / "greeter")


def edit(project: Path, *changes: tuple[str, str], lock: bool = False) -> None:
    """Changes pyproject.toml, and makes the lock file anew if asked to."""
    file = project / "pyproject.toml"
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    if lock:
        subprocess.run([build.uv(), "lock", "--quiet", "--python", sys.executable], cwd=project, check=True)


def use(project: Path, requires: str, backend: str) -> None:
    """Gives the project another build system."""
    edit(project, ('requires = ["uv_build>=0.9"]\nbuild-backend = "uv_build"',
                   f'requires = {requires}\nbuild-backend = "{backend}"'))  # fmt: skip


def wheel_of(project: Path, cache: Path, folder: Path) -> Path:
    """Builds the project's own wheel."""
    folder.mkdir()
    (wheel,) = release.build_wheels(release.Project.read(project), {}, folder, cache)
    return wheel


@pytest.mark.parametrize(("requires", "backend"), BACKENDS)
def test_the_usual_backends_are_pinned(
    project: Path, cache: Path, tmp_path: Path, requires: str, backend: str
) -> None:
    use(project, requires, backend)
    edit(project, ('version = "1.0.0"', 'version = "1.0.0"\ndescription = "Greets."'))
    assert wheel_of(project, cache, tmp_path / "build").name.startswith("greeter-1.0.0-")


def test_every_pin_has_a_hash(project: Path, cache: Path) -> None:
    backends = build.Backends(project, cache)
    assert len(backends.lines) >= 7
    for line in backends.lines:
        assert "==" in line.split()[0] and "--hash=sha256:" in line, line


@pytest.mark.parametrize("requires", ['["hatchling", "no-such-plugin"]', '["hatchling<1.20"]'])
def test_a_backend_that_is_not_pinned_is_refused_with_a_way_to_pin_it(
    project: Path, cache: Path, tmp_path: Path, requires: str
) -> None:
    use(project, requires, "hatchling.build")
    with pytest.raises(AnsibleActionFail) as failure:
        wheel_of(project, cache, tmp_path / "build")
    message = str(failure.value)
    assert "cannot be built" in message and "build-system.requires" in message
    assert f"`uv add --group build NAME` in {project}" in message and "hatchling==" in message


def test_a_project_pins_what_builds_it_in_its_own_lock_file(
    project: Path, cache: Path, tmp_path: Path
) -> None:
    use(project, '["hatchling<1.28", "hatch-fancy-pypi-readme"]', "hatchling.build")
    text = '\n[dependency-groups]\nbuild = ["hatchling<1.28", "hatch-fancy-pypi-readme"]\n\n[build-system]'
    edit(project, ("\n[build-system]", text), lock=True)
    backends = build.Backends(project, cache)
    names = [line.split("==")[0] for line in backends.lines]
    assert names.count("hatchling") == 1 and {"hatch-fancy-pypi-readme", "setuptools"} <= set(names)
    assert wheel_of(project, cache, tmp_path / "build").name.startswith("greeter-1.0.0-")


def test_a_backend_with_another_content_is_refused(project: Path, cache: Path, tmp_path: Path) -> None:
    use(project, '["hatchling"]', "hatchling.build")
    backends = build.Backends(project, cache)
    own = tmp_path / "cache"
    shutil.copytree(backends.folder, own / backends.folder.name)
    constraints = own / backends.folder.name / backends.constraints.name
    constraints.write_text(re.sub("sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, constraints.read_text()))
    with pytest.raises(AnsibleActionFail, match="Hash mismatch"):
        wheel_of(project, own, tmp_path / "build")


def spied(project: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a build backend finds, in a process with secrets around it."""
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", str(tmp_path / "vault-password"))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    monkeypatch.setenv("FLOWER_PASSWORD", "a-secret")
    monkeypatch.setenv("UV_INDEX_OURS_PASSWORD", "a-secret")
    (tmp_path / "vault-password").write_text("a-secret")
    use(project, '[]\nbackend-path = ["."]', "spy")
    (project / "spy.py").write_text(SPY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = {
            "read": [str(tmp_path / "vault-password"), f"/proc/{os.getpid()}/environ", "/etc/shadow", "/etc/passwd"],
            "write": [str(tmp_path / "new"), str(cache / "new"), str(Path(sys.prefix) / "new"), "written"],
            "list": str(Path.home()),
            "port": server.getsockname()[1],
        }  # fmt: skip
        (project / "tried.json").write_text(json.dumps(asked))
        with pytest.raises(AnsibleActionFail) as failure:
            wheel_of(project, cache, tmp_path / "build")
    line = next(line for line in str(failure.value).splitlines() if "FOUND" in line)
    found: dict[str, Any] = json.loads(line.partition("FOUND ")[2])
    return found


def test_a_build_gets_none_of_the_environment(
    project: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = spied(project, cache, tmp_path, monkeypatch)["environment"]
    assert not [
        name for name in environment if name.startswith(("ANSIBLE", "SSH", "FLOWER", "PIP", "UV_INDEX"))
    ]
    assert "a-secret" not in json.dumps(environment)
    assert environment["HOME"].startswith(str(tmp_path / "build"))


@needs_landlock
def test_a_build_reaches_nothing_but_its_own_folder(
    project: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = spied(project, cache, tmp_path, monkeypatch)
    denied, (written, allowed) = "Permission denied", ("written", "/etc/passwd")
    assert found["read"].pop(allowed) == "allowed" and set(found["read"].values()) == {denied}, found
    assert found["write"].pop(written) == "allowed" and set(found["write"].values()) == {denied}, found
    assert found["list"] == denied
    assert found["connect"] == (denied if confine.version() >= 4 else "allowed")


DYNAMIC = [
    ('dependencies = ["markupsafe>=3"]', 'dynamic = ["dependencies"]'),
    ('requires = ["uv_build>=0.9"]\nbuild-backend = "uv_build"',
     'requires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
     '[tool.setuptools.dynamic]\ndependencies = {file = "requirements.txt"}'),
]  # fmt: skip


def test_a_lock_file_is_compared_with_what_a_pinned_backend_says(project: Path, cache: Path) -> None:
    """The requirements stand in a file that the backend alone knows of."""
    (project / "requirements.txt").write_text("markupsafe>=3\n")
    edit(project, *DYNAMIC, lock=True)
    for left in project.rglob("*.egg-info"):  # by `uv lock` itself
        shutil.rmtree(left)
    release.assert_lock_is_current(release.Project.read(project), cache)
    assert not list(project.rglob("*.egg-info")), "nothing is left in the project"
    (project / "requirements.txt").write_text("markupsafe<3\n")
    with pytest.raises(AnsibleActionFail, match="does not match"):
        release.assert_lock_is_current(release.Project.read(project), cache)


def test_a_dependency_that_an_index_has_as_source_only_is_built(
    project: Path, cache: Path, tmp_path: Path
) -> None:
    edit(project, ('["markupsafe>=3"]', '["markupsafe>=3", "docopt==0.6.2"]'), lock=True)
    host = release.describe({"python": ".".join(map(str, sys.version_info[:3])), "glibc": "2.36"})
    read = release.Project.read(project)
    sources = build.source_only(project, release.locked_requirements(read, host))
    assert [line.split()[0] for line in sources] == ["docopt==0.6.2"]
    names = [wheel.name for wheel in release.build_wheels(read, sources, tmp_path, cache)]
    assert [name.split("-")[:2] for name in names] == [["greeter", "1.0.0"], ["docopt", "0.6.2"]]
    (sdist,) = sources.values()
    with pytest.raises(AnsibleActionFail, match="its hash differs"):
        build.fetch_source(project, sdist | {"hash": "sha256:" + "0" * 64}, tmp_path)


def test_without_landlock_a_command_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    """As on a controller that is no Linux."""
    if (child := os.fork()) == 0:
        monkeypatch.setattr(confine, "version", lambda: 0)
        confine.main(["--write", str(tmp_path), "--", "/bin/echo", "ran"])
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    said = capfd.readouterr()
    assert said.out == "ran\n" and "has no Landlock" in said.err
