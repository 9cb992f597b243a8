"""hothouse_release: a real project is built, installed offline, checked, put into service and tidied up."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from conftest import BUNDLE, Play, load_plugin

plugin = load_plugin("action/hothouse_release")
module = load_plugin("modules/hothouse_release")
PYTHON = "/usr/bin/python3"
# Releases are installed by whoever runs the tests; as an account of its own, in a sandbox, in molecule/own-app.
ACCOUNT = {"account": getpass.getuser(), "sandbox": None}
GREETER = Path(__file__).parent / "data/greeter"
FLOWER = BUNDLE / "roles/flower/files/flower"
CHECK = ["{release}/bin/greeter"]
BOOKWORM = {
    "glibc": "2.36",
    "implementation_name": "cpython",
    "implementation_version": "3.11.2",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_release": "6.1.0",
    "platform_system": "Linux",
    "platform_version": "#1 SMP",
    "python_full_version": "3.11.2",
    "python_version": "3.11",
    "sys_platform": "linux",
}
TRIXIE_ON_ARM = BOOKWORM | {
    "glibc": "2.41",
    "implementation_version": "3.13.5",
    "platform_machine": "aarch64",
    "python_full_version": "3.13.5",
    "python_version": "3.13",
}
Runner = Callable[..., Play]


class Host:
    """A folder that releases are installed into, the project they are made of, and the task that does it."""

    def __init__(self, play: Runner, folder: Path, cache: Path) -> None:
        self.play = play
        self.path = folder / "opt"
        self.cache = cache
        self.source = folder / "greeter"
        shutil.copytree(GREETER, self.source)

    def task(self, **options: Any) -> dict[str, Any]:
        """The task that installs the project."""
        places = {"source": str(self.source), "path": str(self.path), "cache": str(self.cache)}
        return {"hothouse_release": places | {"check": CHECK, "account": ACCOUNT["account"]} | options}

    def deploy(self, *arguments: str, **options: Any) -> dict[str, Any]:
        """Runs the task and returns its result."""
        return self.play([self.task(**options)], *arguments).results[0]

    def edit(self, code: str) -> None:
        """Appends code to the project."""
        with (self.source / "src/greeter/__init__.py").open("a") as file:
            file.write(code)

    @property
    def current(self) -> str:
        """The release in service."""
        return (self.path / "current").readlink().name

    def greeting(self) -> str:
        """What the release in service prints."""
        return subprocess.run([self.path / "current/bin/greeter"], capture_output=True, text=True).stdout


@dataclass
class Built:
    """A release's archive."""

    release: str
    archive: Path
    sha256: str


class Machine:
    """The host's half of the plugin at work on a folder."""

    def __init__(self, folder: Path, built: Built) -> None:
        folder.mkdir()
        account = module.Account.read({**ACCOUNT, "path": str(folder)})
        self.releases = module.Releases(str(folder), PYTHON, account)
        self.built = built

    def installed(self) -> set[str]:
        """The releases on the machine."""
        return {folder.name for folder in self.releases.folder.iterdir()}

    def apply(self, archive: bool = True, check_mode: bool = False, **options: Any) -> dict[str, Any]:
        """Runs the module's work with an archive at hand, or without."""
        wanted = {"id": self.built.release}
        if archive:
            wanted |= {"archive": str(self.built.archive), "sha256": self.built.sha256}
        params = {"check": CHECK, "check_timeout": 60, "keep": 5, "release": wanted}
        params |= {"activate": "checked", "metrics": None, "check_as": "account"} | options
        return module.apply(SimpleNamespace(params=params, check_mode=check_mode), self.releases)


def describe_python() -> dict[str, str]:
    """What a host says of its Python, here this machine."""
    return module.Releases("/", PYTHON, module.Account.read({**ACCOUNT, "path": "/"})).describe_python()


def build(source: Path, cache: Path) -> Built:
    """Builds a project for this machine."""
    project = plugin.Project.read(source)
    release = project.release_id()
    archive = cache / f"{release}.zip"
    plugin.build(project, release, describe_python(), archive)
    return Built(release, archive, plugin.sha256(archive))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives and the wheel of uv, shared by the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def built(cache: Path) -> Built:
    """The example project, built once."""
    return build(GREETER, cache)


@pytest.fixture(scope="session")
def other(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Another version of the example project, built once."""
    source = shutil.copytree(GREETER, tmp_path_factory.mktemp("other") / "greeter")
    (source / "src/greeter/other.py").touch()
    return build(source, cache)


@pytest.fixture
def machine(tmp_path: Path, built: Built) -> Machine:
    """A machine without any release."""
    return Machine(tmp_path / "opt", built)


@pytest.fixture
def host(play: Runner, tmp_path: Path, cache: Path) -> Host:
    """A host without any release."""
    return Host(play, tmp_path, cache)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example project."""
    return shutil.copytree(GREETER, tmp_path / "project")


def release_id(source: Path) -> str:
    """The ID that a project has now."""
    return plugin.Project.read(source).release_id()


def test_a_release_is_built_installed_offline_and_put_into_service(
    play: Runner, tmp_path: Path, host: Host
) -> None:
    host.cache = tmp_path / "cache"
    dry = host.deploy("--check")
    assert dry["changed"] and dry["installed"] and dry["activated"]
    assert not host.path.exists() and not host.cache.exists()

    building = Path(tempfile.gettempdir(), f"{plugin.building_prefix(host.cache)}killed")
    for killed in (host.path / ".install-killed", host.cache / ".build-killed", building):
        killed.mkdir(parents=True)
    first = host.deploy("--diff")
    assert first["changed"] and first["release"] == host.current == dry["release"] == release_id(GREETER)
    assert first["previous"] == "" and first["removed"] == []
    assert first["diff"]["after"] == f"releases/{host.current}\n"
    assert host.greeting() == "&lt;hello&gt;\n"
    release = host.path / "current"
    record = json.loads((release / "release.json").read_text())
    assert (record["id"], record["name"], record["checked"]) == (host.current, "greeter", CHECK)
    assert [wheel.split("-")[0] for wheel in record["wheels"]] == ["greeter", "markupsafe"]
    modules = list(release.glob("lib/python3*/site-packages/greeter/*"))
    assert any(path.suffix == ".py" for path in modules)
    assert list(release.glob("lib/python3*/site-packages/greeter/__pycache__/*.pyc"))
    for path in [host.path / "releases", *(host.path / "releases").rglob("*")]:
        assert path.is_symlink() or not path.stat().st_mode & 0o022, path
    assert sorted(file.name for file in host.path.iterdir()) == [".lock", "current", "releases"]
    assert not (release / "bin/uv").exists() and not building.exists()
    assert [file.name.split("-")[0] for file in sorted(host.cache.iterdir())] == [
        ".lock",
        "backends",
        "greeter",
        "uv",
    ]

    assert not host.deploy("--check")["changed"]
    again = play([host.task()], "-vvv", text=True)
    assert "changed=0" in again.output
    assert again.output.count("EXEC /bin/sh") == 1 and "building" not in again.output


def test_a_changed_project_becomes_a_new_release_and_an_old_one_can_come_back(host: Host) -> None:
    first = host.deploy()["release"]
    host.edit("\n\ndef extra() -> None: ...\n")
    second = host.deploy()
    assert second["release"] == host.current != first
    assert second["previous"] == (host.path / "previous").readlink().name == first
    shutil.rmtree(host.source)
    shutil.copytree(GREETER, host.source)
    back = host.deploy(cache="/nonexistent/never/needed")
    assert back["activated"] and not back["installed"]
    assert (back["release"], back["previous"]) == (host.current, second["release"])


def test_a_release_that_fails_its_check_is_not_put_into_service(
    machine: Machine, project: Path, cache: Path
) -> None:
    running = machine.built.release
    machine.apply()
    with (project / "src/greeter/__init__.py").open("a") as file:
        file.write("\nraise RuntimeError('no such broker setting')\n")
    machine.built = build(project, cache)
    assert machine.built.release != running
    for attempt in ("first", "second"):
        with pytest.raises(module.ReleaseError) as failure:
            machine.apply()
        message = str(failure.value)
        assert f"The check of release {machine.built.release} failed with exit code 1" in message, attempt
        assert f"the running release {running} was not touched" in message
        assert f"{machine.releases.folder / machine.built.release}/bin/greeter" in message
        assert "no such broker setting" in message
        assert machine.releases.linked("current") == running
        assert machine.installed() == {running}, "a release that never passed a check does not stay"
    greeting = subprocess.run([machine.releases.path / "current/bin/greeter"], capture_output=True, text=True)
    assert greeting.stdout == "&lt;hello&gt;\n"


def test_a_check_that_hangs_or_does_not_exist_fails(machine: Machine) -> None:
    with pytest.raises(
        module.ReleaseError, match=r"took longer than 1 seconds.*no other release yet(?s:.*)waiting"
    ):
        machine.apply(check=["sh", "-c", "echo waiting; sleep 60"], check_timeout=1)
    with pytest.raises(module.ReleaseError, match=r"could not be run \(No such file or directory\)"):
        machine.apply(check=["{release}/bin/none"])
    assert not machine.releases.linked("current")


def test_another_check_is_made_of_the_release_in_service_too(machine: Machine) -> None:
    machine.apply()
    with pytest.raises(
        module.ReleaseError, match=r"in service and stays so(?s:.*)No module named 'no_such_module'"
    ):
        machine.apply(check=["{release}/bin/python", "-c", "import no_such_module"])
    passed = machine.apply(check=["{release}/bin/python", "-c", "import greeter"])
    assert not passed["changed"] and machine.releases.linked("current") == machine.built.release


def test_an_interrupted_installation_is_not_used(machine: Machine) -> None:
    machine.apply()
    release = machine.releases.folder / machine.built.release
    (release / "release.json").unlink()
    (machine.releases.folder / "0123456789abcdef/bin").mkdir(parents=True)
    shutil.rmtree(next(release.glob("lib/python3*/site-packages/greeter")))
    asked = machine.apply(archive=False)
    assert asked["needed"] and asked["removed"] == ["0123456789abcdef"]
    assert machine.installed() == set(), "room is made before anything is sent"
    assert machine.apply()["installed"]
    assert machine.installed() == {machine.built.release}
    assert not machine.apply(archive=False)["changed"]


def test_a_release_of_another_python_is_installed_again(machine: Machine) -> None:
    machine.apply()
    record = machine.releases.record(machine.built.release)
    machine.releases.write_record(record | {"interpreter": "/usr/bin/python3.9"})
    again = machine.apply()
    assert again["installed"] and not again["activated"] and again["changed"]
    assert not machine.apply()["changed"]


def hostile(kind: str, folder: Path) -> None:
    """Puts into a release what only code that ran during its installation can make."""
    deep = folder / "lib/python3"
    if kind == "a link to a file outside":
        (deep / "link").symlink_to("/etc/passwd")
    elif kind == "a link that goes up too far":
        (deep / "link").symlink_to("../../../other")
    elif kind == "a link through another link":
        (deep / "up").symlink_to("../..")
        (deep / "link").symlink_to("up/../other")
    elif kind == "a link in the place of the record":
        (folder / "release.json").symlink_to("/etc/passwd")
    elif kind == "a second name":
        (deep / "link").hardlink_to(folder / "bin/tool")
    elif kind == "a pipe":
        os.mkfifo(deep / "pipe")
    elif kind == "a socket":
        # The path of a socket must be short.
        subprocess.run(
            [PYTHON, "-c", "import socket; socket.socket(socket.AF_UNIX).bind('socket')"],
            cwd=deep,
            check=True,
        )
    else:
        for _ in range(100):
            deep /= "deep"
        deep.mkdir(parents=True)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A release as an account of its own leaves it: with open modes, and links that stay inside."""
    folder = tmp_path / "release"
    for path in ("bin/tool", "lib/python3/module.py", "pyvenv.cfg"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("#!/bin/sh\n")
    (folder / "bin/tool").chmod(0o6777)
    (folder / "lib/python3").chmod(0o2777)
    (folder / "pyvenv.cfg").chmod(0)
    (folder / "bin/python").symlink_to(PYTHON)
    (folder / "bin/python3").symlink_to("python")
    (folder / "lib64").symlink_to("lib")
    (folder / "lib/back").symlink_to("../bin/tool")
    return folder


def test_a_release_is_taken_over_with_plain_modes(foreign: Path) -> None:
    os.setxattr(foreign / "bin/tool", "user.kept", b"no")
    module.Seal(foreign, Path(PYTHON)).apply()
    modes = {
        str(path.relative_to(foreign)): path.stat().st_mode & 0o7777
        for path in foreign.rglob("*")
        if not path.is_symlink()
    }
    assert modes == {
        "bin": 0o755, "bin/tool": 0o755, "lib": 0o755, "lib/python3": 0o755, "lib/python3/module.py": 0o644,
        "pyvenv.cfg": 0o644,
    }  # fmt: skip
    assert os.listxattr(foreign / "bin/tool") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another account")
def test_a_release_that_another_account_made_becomes_roots(foreign: Path) -> None:
    paths = [foreign, *foreign.rglob("*")]
    for path in paths:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    module.Seal(foreign, Path(PYTHON)).apply()
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in paths} == {(0, 0)}
    (foreign / "release.json").write_text("{}")
    assert module.Releases.complete(foreign)
    os.chown(foreign / "release.json", 65534, 65534)
    assert not module.Releases.complete(foreign), "a record that a wheel brought vouches for nothing"


@pytest.mark.parametrize(
    "kind",
    ["a link to a file outside", "a link that goes up too far", "a link through another link", "a second name",
     "a link in the place of the record", "a pipe", "a socket", "folders without end"],
)  # fmt: skip
def test_what_no_wheel_can_hold_is_refused(foreign: Path, kind: str) -> None:
    before = Path("/etc/passwd").stat()
    hostile(kind, foreign)
    with pytest.raises(module.ReleaseError, match="The release is refused"):
        module.Seal(foreign, Path(PYTHON)).apply()
    after = Path("/etc/passwd").stat()
    assert (before.st_uid, before.st_mode, before.st_ctime) == (after.st_uid, after.st_mode, after.st_ctime)
    module.remove(foreign)
    assert not foreign.exists()


def test_the_record_is_never_written_through_a_link(machine: Machine, tmp_path: Path) -> None:
    machine.apply()
    (tmp_path / "outside").write_text("as it was")
    staged = machine.releases.folder / machine.built.release / ".release.json.new"
    staged.symlink_to(tmp_path / "outside")
    machine.releases.write_record(machine.releases.record(machine.built.release))
    assert (tmp_path / "outside").read_text() == "as it was"


def test_the_lines_of_the_drop_ins_are_the_sandbox(tmp_path: Path) -> None:
    file = shutil.copy(BUNDLE / "roles/prepare/files/10-hardening.conf", tmp_path)
    (tmp_path / "20-own.conf").write_text(
        "[Unit]\nAfter=other.service\n[Service]\n# more\nPrivateDevices=no\n"
    )
    account = module.Account("nobody", tmp_path, "test.service")
    lines = [line for line in Path(file).read_text().splitlines() if "=" in line and not line.startswith("#")]
    assert account.properties() == [f"--property={line}" for line in [*lines, "PrivateDevices=no"]]
    assert "--property=SystemCallErrorNumber=EPERM" in account.properties()
    with pytest.raises(module.ReleaseError, match="has no sandbox"):
        module.Account("nobody", tmp_path / "none", "test.service").properties()


def test_another_account_than_ones_own_needs_a_sandbox() -> None:
    other = "daemon" if getpass.getuser() != "daemon" else "root"
    with pytest.raises(module.ReleaseError, match="`sandbox` is needed"):
        module.Account.read({"account": other, "sandbox": None, "path": "/opt"})
    with pytest.raises(module.ReleaseError, match="has no account no-such-account"):
        module.Account.read({"account": "no-such-account", "sandbox": None, "path": "/opt"})


def test_a_release_that_a_process_runs_is_not_removed(machine: Machine) -> None:
    machine.apply()
    script, compiled, plain = ("a" * 16, "b" * 16, "c" * 16)
    for number, name in enumerate((script, compiled, plain)):
        record = machine.releases.folder / name / "release.json"
        (record.parent / "bin").mkdir(parents=True)
        record.write_text("{}")
        os.utime(record, (10**9 - number, 10**9 - number))
        (record.parent / "bin/python").symlink_to(PYTHON)
    wait = "import sys; print(flush=True); sys.stdin.read()"
    found = machine.releases.folder
    commands = [
        ([found / script / "bin/python", "-c", wait], {}),
        (["python3", "-c", wait], {"PATH": f"{found / compiled}/bin:/usr/bin"}),
    ]
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for command, environment in commands
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == b"\n"
    try:
        assert machine.apply(keep=1)["removed"] == [plain]
    finally:
        for process in processes:
            process.communicate()
    assert machine.apply(keep=1)["removed"] == [script, compiled]


def test_room_is_made_before_a_release_is_sent(machine: Machine, other: Built) -> None:
    """Neither the release in service goes then, nor the one that leads back from it."""
    machine.apply()
    back = machine.built.release
    names = ["a" * 16, "b" * 16]
    for age, name in enumerate(names):
        record = machine.releases.folder / name / "release.json"
        record.parent.mkdir()
        record.write_text("{}")
        os.utime(record, (10**9 - age, 10**9 - age))
    machine.releases.link("previous", names[1])
    machine.built = other
    asked = machine.apply(archive=False, keep=1)
    assert asked["removed"] == [names[0]] and asked["changed"]
    assert asked["space"]["bytes"] > 0 and asked["space"]["inodes"] > 0
    assert machine.installed() == {back, names[1]}
    assert machine.apply(keep=1)["removed"] == [names[1]]
    assert machine.installed() == {back, other.release}


def test_what_was_sent_is_removed_with_the_remains_of_a_killed_run(machine: Machine, tmp_path: Path) -> None:
    path = machine.releases.path
    name = plugin.upload_name(str(path))
    sent, left, others = (
        tmp_path / f"tmp/ansible-tmp-{number}/{file}"
        for number, file in ((1, name), (2, name), (3, plugin.upload_name("/opt/other")))
    )
    for file in (sent, left, others):
        file.parent.mkdir(parents=True)
        file.touch()
    (path / ".install-killed/scratch").mkdir(parents=True)
    task = SimpleNamespace(params={"release": {"archive": str(sent)}}, _remote_tmp=str(tmp_path / "tmp"))
    assert module.remove_remains(task, machine.releases)
    assert (sent.exists(), left.exists(), others.exists()) == (True, False, True)
    assert not (path / ".install-killed").exists()
    assert not module.remove_remains(task, machine.releases)


def test_old_releases_are_removed_but_never_the_current_or_the_previous(
    machine: Machine, other: Built
) -> None:
    machine.apply()
    names = ["a" * 16, "b" * 16, "c" * 16]
    for age, name in enumerate(names):
        record = machine.releases.folder / name / "release.json"
        record.parent.mkdir()
        record.write_text("{}")
        os.utime(record, (10**9 - age, 10**9 - age))
    previous, machine.built = machine.built.release, other
    os.utime(machine.releases.folder / previous / "release.json", (1, 1))
    assert machine.apply(check_mode=True, keep=3)["removed"] == names[1:]
    assert machine.apply(keep=3)["removed"] == names[1:]
    assert machine.installed() == {other.release, previous, names[0]}
    assert machine.apply(keep=0)["removed"] == names[:1]
    assert machine.installed() == {other.release, previous}
    assert not machine.apply(keep=1)["changed"]


def test_an_archive_that_was_damaged_or_exchanged_is_refused(machine: Machine, tmp_path: Path) -> None:
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(machine.built.archive) as good, zipfile.ZipFile(changed, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(
                name, content.replace(b"1.0.0", b"1.0.1") if name.startswith("wheels/greeter") else content
            )
    machine.built = Built(machine.built.release, changed, machine.built.sha256)
    with pytest.raises(module.ReleaseError, match="arrived damaged"):
        machine.apply()
    machine.built = Built(machine.built.release, changed, plugin.sha256(changed))
    with pytest.raises(module.ReleaseError, match="Hash mismatch"):
        machine.apply()
    assert machine.installed() == set() and not list(machine.releases.path.glob(".install-*"))
    assert machine.apply(archive=False)["needed"] and not machine.releases.linked("current")


def test_archives_of_old_releases_leave_the_cache(project: Path, tmp_path: Path) -> None:
    names = [f"greeter-{number:016x}-{kind}.zip" for number in range(4) for kind in ("py3.11", "py3.13")]
    for age, name in enumerate([*names, f"greeter-more-{'0' * 16}-py3.11.zip"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    plugin.prune(plugin.Project.read(project), tmp_path, keep=2)
    left = sorted(file.name for file in tmp_path.glob("*.zip"))
    assert left == sorted([*names[:4], f"greeter-more-{'0' * 16}-py3.11.zip"])


def test_hosts_that_need_the_same_archive_build_it_once(play: Runner, tmp_path: Path, host: Host) -> None:
    host.edit("\n# for two hosts\n")
    tasks = [host.task(path=str(tmp_path / "host{{ number }}"))]
    run = play(tasks, "--forks", "2", hosts=2, text=True)
    assert run.code == 0
    assert run.output.count("building greeter") == 1
    for number in range(2):
        assert (tmp_path / f"host{number}/current/bin/greeter").exists()


def test_projects_that_are_not_settled_are_refused_with_a_way_out(play: Runner, tmp_path: Path) -> None:
    def variant(name: str) -> Path:
        return shutil.copytree(GREETER, tmp_path / name)

    (variant("unlocked") / "uv.lock").unlink()
    for name, old, new in [
        ("outdated", "markupsafe>=3", "markupsafe>=3,!=3.0.1"),
        ("broken", "[project]", "[project"),
        ("nameless", 'name = "greeter"', ""),
    ]:
        settings = variant(name) / "pyproject.toml"
        settings.write_text(settings.read_text().replace(old, new, 1))
    (tmp_path / "empty").mkdir()
    expected = {
        "absent": ["does not exist", "`app_source`"],
        "empty": ["has no pyproject.toml", "`app_source`"],
        "unlocked": ["has no uv.lock", "`app_source`", "run `uv lock`"],
        "outdated": ["does not match pyproject.toml", "run `uv lock`"],
        "broken": ["pyproject.toml cannot be read"],
        "nameless": ["has no `name`"],
    }
    options = {"path": str(tmp_path / "opt"), "cache": str(tmp_path / "cache"), "account": ACCOUNT["account"]}
    tasks = [
        {"hothouse_release": options | {"source": str(tmp_path / name)}, "ignore_errors": True}
        for name in expected
    ]
    for arguments in ([], ["--check"]):
        results = play(tasks, *arguments).results
        for (name, texts), result in zip(expected.items(), results, strict=True):
            assert result["failed"], name
            assert all(text in result["msg"] for text in [*texts, str(tmp_path / name)]), result["msg"]
    assert not (tmp_path / "opt/releases").exists()


@pytest.mark.parametrize(
    ("dependency", "source", "message"),
    [
        ("library", '[tool.uv.sources]\nlibrary = {path = "../library"}', "comes from no package index"),
        ("markupsafe>=3", "", "needs Python >=3.13, the host has 3.11.2"),
    ],
)
def test_what_no_wheelhouse_can_carry_is_refused(
    project: Path, dependency: str, source: str, message: str
) -> None:
    if source:
        library = project.parent / "library"
        library.mkdir()
        (library / "pyproject.toml").write_text('[project]\nname = "library"\nversion = "1"\n')
    settings = (project / "pyproject.toml").read_text().replace("markupsafe>=3", dependency)
    (project / "pyproject.toml").write_text(f"{settings}\n{source}\n")
    plugin.run([plugin.uv(), "lock", *plugin.interpreter(plugin.Project.read(project))], "", project)
    if not source:
        text = (project / "pyproject.toml").read_text().replace(">=3.11", ">=3.13")
        (project / "pyproject.toml").write_text(text)
    with pytest.raises(AnsibleActionFail) as failure:
        plugin.locked_requirements(plugin.Project.read(project), BOOKWORM)
    assert message in str(failure.value)


def test_markers_are_evaluated_for_the_host_and_not_for_the_controller() -> None:
    flower = plugin.Project.read(FLOWER)
    names = [
        {line.split("==")[0] for line in plugin.locked_requirements(flower, target)}
        for target in (BOOKWORM, TRIXIE_ON_ARM)
    ]
    assert names[0] - names[1] == {"async-timeout"}, "redis needs it before Python 3.11.3"
    assert {"flower", "celery", "redis", "hiredis"} <= names[1]


def test_wheels_are_chosen_for_the_host(project: Path, tmp_path: Path) -> None:
    greeter = plugin.Project.read(project)
    chosen = []
    for number, target in enumerate((BOOKWORM, TRIXIE_ON_ARM)):
        wheels = tmp_path / str(number)
        plugin.download(greeter, plugin.locked_requirements(greeter, target), target, wheels)
        chosen += [wheel.name for wheel in wheels.iterdir()]
    assert "-cp311-cp311-manylinux" in chosen[0] and chosen[0].endswith("x86_64.whl")
    assert "-cp313-cp313-manylinux" in chosen[1] and chosen[1].endswith("aarch64.whl")


def test_the_id_changes_with_what_is_built_and_with_nothing_else(project: Path) -> None:
    before = release_id(project)
    module = project / "src/greeter/__init__.py"
    (project / "tests").mkdir()
    (project / "tests/test_greeter.py").touch()
    (project / ".env").touch()
    (project / "src/greeter/__pycache__").mkdir()
    (project / "src/greeter/__pycache__/x.pyc").touch()
    (project / "src/greeter/loop").symlink_to(project / "src")
    os.mkfifo(project / "src/greeter/fifo")
    module.chmod(0o600)
    os.utime(module, (1, 1))
    assert release_id(project) == before
    ids = {before}
    module.chmod(0o755)
    ids.add(release_id(project))
    module.write_text(module.read_text() + "\n")
    ids.add(release_id(project))
    module.rename(module.with_name("other.py"))
    ids.add(release_id(project))
    (project / "src/greeter/.hidden").touch()
    ids.add(release_id(project))
    (project / "uv.lock").write_text((project / "uv.lock").read_text() + "\n")
    ids.add(release_id(project))
    assert len(ids) == 6


def test_a_build_leaves_nothing_in_the_project(project: Path, cache: Path) -> None:
    (project / "src/greeter/own.py").touch()  # an archive of its own
    before = sorted(project.rglob("*"))
    build(project, cache)
    assert sorted(project.rglob("*")) == before


def test_a_folder_in_the_place_of_the_link_is_named(machine: Machine) -> None:
    (machine.releases.path / "current").mkdir()
    with pytest.raises(module.ReleaseError, match="/current is not a symbolic link"):
        machine.apply()


def test_a_release_is_prepared_first_and_moved_to_later(machine: Machine, other: Built) -> None:
    first = machine.apply(activate="later")
    assert first["installed"] and first["pending"] and not first["activated"]
    assert machine.releases.linked("current") == ""
    moved = machine.apply(archive=False, activate="now")
    assert moved["activated"] and moved["changed"] and "pending" not in moved
    again = machine.apply(archive=False, activate="later")
    assert not again["changed"] and not again["pending"]

    running, machine.built = machine.built.release, other
    assert machine.apply(check_mode=True, archive=False, activate="later")["pending"]
    with pytest.raises(module.ReleaseError, match="not prepared any more"):
        machine.apply(activate="now")
    machine.apply(activate="later", keep=1)
    assert machine.installed() == {running, other.release}, (
        "nothing is tidied up while it may still be needed"
    )
    assert machine.apply(archive=False, activate="now", check=CHECK)["previous"] == running


def test_the_check_is_not_made_twice_between_preparing_and_moving(machine: Machine, tmp_path: Path) -> None:
    check = ["sh", "-c", f"echo ran >>{tmp_path}/ran"]
    machine.apply(activate="later", check=check)
    machine.apply(archive=False, activate="now", check=check)
    machine.apply(archive=False, activate="later", check=check)
    assert (tmp_path / "ran").read_text() == "ran\n"


def test_no_host_moves_to_a_release_that_one_of_them_refuses(
    play: Runner, tmp_path: Path, host: Host
) -> None:
    def deploy() -> str:
        # What roles/app and its playbook do.
        task = host.task(
            path=str(tmp_path / "opt{{ number }}"), activate="later", check=["test", "!", "-e", refused]
        )
        moving = {**task["hothouse_release"], "activate": "now"}
        tasks = [
            {**task, "register": "prepared", "any_errors_fatal": True},
            {"hothouse_release": moving, "when": "prepared.pending"},
        ]
        run = play(tasks, hosts=2, text=True)
        return f"{run.code} " + " ".join(run.output.split())

    refused = str(tmp_path / "refuse{{ number }}")
    assert deploy().startswith("0 ")
    running = (tmp_path / "opt0/current").readlink()
    host.edit("\n# the next one\n")
    (tmp_path / "refuse1").touch()
    said = deploy()
    assert said.startswith("2 ") and "No host of this run was moved to the new release" in said
    assert all((tmp_path / f"opt{number}/current").readlink() == running for number in range(2))
    (tmp_path / "refuse1").unlink()
    assert deploy().startswith("0 ")
    moved = {(tmp_path / f"opt{number}/current").readlink() for number in range(2)}
    assert len(moved) == 1 and running not in moved


def test_the_node_exporter_is_told_which_release_is_in_service(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "node-exporter/release.prom"
    assert machine.apply(metrics=str(file))["activated"] and not file.parent.exists()
    file.parent.mkdir()
    assert machine.apply(metrics=str(file), check_mode=True)["changed"] and not file.exists()
    assert machine.apply(metrics=str(file))["changed"]
    moved = (machine.releases.path / "current").lstat().st_ctime
    assert f'hothouse_release_info{{release="{machine.built.release}"}} 1\n' in file.read_text()
    assert f"hothouse_release_moved_seconds {moved:.6f}\n" in file.read_text()
    assert not machine.apply(metrics=str(file))["changed"]
