"""The controller's half of hothouse_release: names, builds and sends a release. Documented in the module."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

BUNDLE = Path(__file__).resolve().parents[2]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "source": {"type": "str", "required": True},
    "path": {"type": "path", "required": True},
    "check": {"type": "list", "elements": "str", "default": []},
    "check_timeout": {"type": "int", "default": 120},
    "activate": {"type": "str", "choices": ["checked", "later", "now"], "default": "checked"},
    "metrics": {"type": "path"},
    "keep": {"type": "int", "default": 5},
    "cache": {"type": "str"},
    "python": {"type": "path", "default": "/usr/bin/python3"},
    "archive": {"type": "path"},
    "target": {
        "type": "dict",
        "options": {"python": {"type": "str", "required": True}, "glibc": {"type": "str", "required": True}},
    },
}
# Part of every ID: raise it when the same project would be built into something else.
BUILDER = "1"
NOT_BUILT_AT_TOP = {"build", "dist", "docs", "node_modules", "test", "tests", "venv"}
NOT_BUILT = {
    "__pycache__",
    ".git",
    ".hg",
    ".svn",
    ".venv",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".DS_Store",
}
NOT_BUILT_SUFFIXES = (".pyc", ".pyo", ".egg-info")
PYPI = "https://pypi.org/simple"


@dataclass(frozen=True)
class Project:
    """A locked project on the controller, reduced to what a build may see."""

    source: Path
    name: str
    requires_python: str
    built: bool  # it becomes a wheel itself, not only its dependencies
    files: dict[str, Path]  # path within the project → the file, symbolic links followed

    @classmethod
    def read(cls, source: Path) -> Project:
        """Reads a project folder. Raises AnsibleActionFail for anything but a locked project."""
        where = "It is set by the option `source` (for the application: the variable `app_source`)."
        if not source.is_dir():
            raise AnsibleActionFail(f"The project folder {source} does not exist. {where}")
        try:
            settings = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
            name = settings["project"]["name"]
        except FileNotFoundError:
            message = f"{source} is not a Python project: it has no pyproject.toml. {where}"
            raise AnsibleActionFail(message) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise AnsibleActionFail(f"{source}/pyproject.toml cannot be read: {error}.") from None
        except KeyError:
            raise AnsibleActionFail(
                f"{source}/pyproject.toml has no `name` in its section [project]."
            ) from None
        if not (source / "uv.lock").is_file():
            raise AnsibleActionFail(
                f"{source} has no uv.lock, so what would be installed is not settled. {where} "
                f"To create the lock file, run `uv lock` in that folder and commit it."
            )
        package = settings.get("tool", {}).get("uv", {}).get("package", "build-system" in settings)
        requires_python = settings["project"].get("requires-python", "")
        return cls(source, canonicalize_name(name), requires_python, package, dict(project_files(source)))

    def release_id(self) -> str:
        """16 hexadecimal digits over the builder's version and all that makes up the files, dates apart."""
        digest = hashlib.sha256(f"hothouse {BUILDER}\n".encode())
        for name, file in sorted(self.files.items()):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            executable = bool(file.stat().st_mode & 0o100)  # the other bits depend on the umask of a checkout
            digest.update(f"{content} {executable:d} {name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def copy_to(self, target: Path) -> None:
        """Copies what the ID covers: a build can see nothing else and leaves nothing in the source."""
        for name, file in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)


def project_files(
    folder: Path, below: str = "", parents: tuple[Path, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """The files that belong to a release; symbolic links are followed, loops and sockets left out."""
    parents = (*parents, folder.resolve())
    for entry in folder.iterdir():
        name = entry.name
        if not below and (name.startswith(".") or name in NOT_BUILT_AT_TOP):
            continue
        if name in NOT_BUILT or name.endswith(NOT_BUILT_SUFFIXES):
            continue
        if entry.is_dir():
            if entry.resolve() not in parents:
                yield from project_files(entry, f"{below}{name}/", parents)
        elif entry.is_file():
            yield f"{below}{name}", entry


def run(command: list[str], failure: str, cwd: Path | None = None) -> str:
    """Runs a command of the controller with the user's own environment (proxies, CA, indexes).

    Returns its standard output. Raises AnsibleActionFail: `failure`, then the end of what the command said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, the oldest date that a wheel can hold
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise AnsibleActionFail(f"{failure}\n{said}")
    return done.stdout


def uv() -> str:
    """The uv beside this Ansible, which need not be on PATH; else the one on PATH."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        from uv import find_uv_bin

        return find_uv_bin()
    if found := shutil.which("uv"):
        return found
    raise AnsibleActionFail(
        f"uv is missing on the controller. Install it with `uv sync` or `pip install uv` in {BUNDLE}."
    )


def interpreter(project: Project) -> list[str]:
    """Has uv read a project with this very Python if the project allows it, else with one that uv finds."""
    version = ".".join(map(str, sys.version_info[:3]))
    return ["--python", sys.executable] if version in SpecifierSet(project.requires_python) else []


def assert_lock_is_current(project: Project) -> None:
    """Raises AnsibleActionFail when uv.lock no longer matches pyproject.toml."""
    with contextlib.suppress(AnsibleActionFail):
        run([uv(), "lock", "--check", "--offline", *interpreter(project)], "", project.source)
        return
    # Offline, uv cannot always tell an old lock file from metadata that it has not seen yet.
    run(
        [uv(), "lock", "--check", *interpreter(project)],
        f"{project.source}/uv.lock does not match pyproject.toml (or could not be checked). "
        f"To renew it, run `uv lock` in that folder and commit it. uv said:",
        project.source,
    )


def locked_requirements(project: Project, host: dict[str, str]) -> list[str]:
    """The requirements, pinned and hashed, whose markers hold on a host.

    The markers are evaluated here because pip evaluates them for the Python that it runs in, not for
    `--python-version`. Raises AnsibleActionFail for what no wheelhouse can carry.
    """
    if host["python_full_version"] not in SpecifierSet(project.requires_python, prereleases=True):
        raise AnsibleActionFail(
            f"{project.name} needs Python {project.requires_python}, the host has "
            f"{host['python_full_version']}. Change requires-python in {project.source}/pyproject.toml, "
            f"or choose a host with another Debian."
        )
    export = [uv(), "export", "--locked", "--no-dev", "--no-emit-project", "--no-annotate", "--no-header"]
    export += interpreter(project)
    text = run(export, f"The requirements of {project.source} cannot be read. uv said:", project.source)
    requirements = []
    for line in text.replace("\\\n", " ").splitlines():
        specifier, *hashes = re.split(r"\s+--hash=", line.strip())
        if not specifier:
            continue
        try:
            requirement = Requirement(specifier)
        except InvalidRequirement:
            requirement = None
        if requirement is None or requirement.url or not hashes:
            raise AnsibleActionFail(
                f"{project.source}/uv.lock holds `{specifier}`, which comes from no package index. A release "
                f"carries only what an index offers with a hash: publish it to your index, or move it into "
                f"the project."
            )
        if requirement.marker is None or requirement.marker.evaluate(dict(host, extra="")):
            pinned = f"{requirement.name}{requirement.specifier}"
            requirements.append(" ".join([pinned, *(f"--hash={value.strip()}" for value in hashes)]))
    return requirements


def read_lock(folder: Path) -> list[dict[str, Any]]:
    """The packages of a uv.lock."""
    return tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]


def platforms(host: dict[str, str]) -> list[str]:
    """The wheel platforms that a host can use: PEP 600 down from its own glibc, then the older names."""
    machine, minor = host["platform_machine"], int(host["glibc"].split(".")[1])
    names = [f"manylinux_2_{number}" for number in range(minor, 4, -1)]
    return [f"{name}_{machine}" for name in [*names, "manylinux2014", "manylinux2010", "manylinux1", "linux"]]


def download(project: Project, requirements: list[str], host: dict[str, str], target: Path) -> None:
    """Fetches the wheels for a host with pip, which checks hashes and honours the user's pip settings."""
    if not requirements:
        return
    registries = {
        package["source"]["registry"]: None
        for package in read_lock(project.source)
        if "://" in package["source"].get("registry", "")
        and package["source"]["registry"].rstrip("/") != PYPI
    }
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
    version = re.match(r"[0-9.]+", host["python_full_version"])  # pip takes no suffix such as rc1
    command += ["--implementation=cp", "--python-version", version[0] if version else ""]
    command += ["--dest", str(target)]
    command += [word for name in platforms(host) for word in ("--platform", name)]
    command += [word for url in registries for word in ("--extra-index-url", url)]
    python = f"Python {host['python_full_version']} on {host['platform_machine']}, glibc {host['glibc']}"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requested:
        requested.write("".join(f"{line}\n" for line in requirements))
        requested.flush()
        command += ["-r", requested.name]
        run(command, f"The wheels that {project.name} locks cannot be had for {python}. pip said:")


def installer(project: Project, host: dict[str, str], cache: Path) -> Path:
    """The wheel of the uv that travels in the archive, as the bundle's own uv.lock pins it.

    It is by far the largest part of an archive, so it stays in the cache from build to build.
    """
    package = next((package for package in read_lock(BUNDLE) if package["name"] == "uv"), None)
    if package is None:
        raise AnsibleActionFail(f"{BUNDLE}/uv.lock does not hold uv. Run `uv add uv` in that folder.")
    hashes = [wheel["hash"] for wheel in package["wheels"]]
    folder = cache / f"uv-{host['platform_machine']}"
    for wheel in folder.glob("*.whl"):
        if f"sha256:{sha256(wheel)}" in hashes:
            return wheel
        wheel.unlink()
    requirement = " ".join([f"uv=={package['version']}", *(f"--hash={value}" for value in hashes)])
    download(project, [requirement], host, folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_wheel(project: Project, folder: Path) -> Path:
    """Builds the project's own wheel from a copy of the files that its ID covers."""
    project.copy_to(folder / "source")
    output = folder / "own"
    command = [uv(), "build", "--wheel", "--quiet", "--python", sys.executable, "--out-dir", str(output)]
    run(command, f"The project {project.source} cannot be built. uv said:", folder / "source")
    (wheel,) = output.glob("*.whl")
    if not wheel.name.endswith("-none-any.whl"):
        raise AnsibleActionFail(
            f"{project.source} builds {wheel.name}, which holds compiled code for this controller. Only pure "
            f"Python projects can be built here: publish the compiled part to your index and depend on it."
        )
    return wheel


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pinned(wheel: Path) -> str:
    """The requirement that only this very file can meet."""
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{sha256(wheel)}"


def build(project: Project, release_id: str, host: dict[str, str], archive: Path) -> None:
    """Builds the archive: manifest.json, requirements.txt, wheels/ and the wheel of uv.

    Everything happens in a folder beside the archive, which appears in one step when it is complete.
    """
    with tempfile.TemporaryDirectory(prefix=".build-", dir=archive.parent) as name:
        folder = Path(name)
        wheels = folder / "wheels"
        wheels.mkdir()
        assert_lock_is_current(project)
        requirements = locked_requirements(project, host)
        if project.built:
            shutil.move(build_wheel(project, folder), wheels)
        download(project, requirements, host, wheels)
        uv_wheel = installer(project, host, archive.parent)
        carried = sorted(wheels.iterdir())
        manifest = {
            "id": release_id,
            "name": project.name,
            "python": host["python_full_version"],
            "uv": uv_wheel.name,
            "wheels": [wheel.name for wheel in carried],
        }
        staged = folder / "archive.zip"
        with zipfile.ZipFile(staged, "w") as file:
            file.writestr("manifest.json", json.dumps(manifest, indent=2))
            file.writestr("requirements.txt", "".join(f"{pinned(wheel)}\n" for wheel in carried))
            file.write(uv_wheel, uv_wheel.name)
            for wheel in carried:
                file.write(wheel, f"wheels/{wheel.name}")
        if Project.read(project.source).release_id() != release_id:
            raise AnsibleActionFail(f"{project.source} changed while it was built. Run this again.")
        with staged.open("rb") as written:
            os.fsync(written.fileno())
        staged.replace(archive)


def prune(project: Project, cache: Path, keep: int) -> None:
    """Removes this project's archives from the cache but those of the `keep` most recently used releases."""
    archives = list(cache.glob(f"{project.name}-*.zip"))
    kept: set[str] = set()
    for archive in sorted(archives, key=lambda file: file.stat().st_mtime, reverse=True):
        match = re.fullmatch(rf"{re.escape(project.name)}-([0-9a-f]{{16}})-.*", archive.name)
        if match and len(kept | {match[1]}) > max(keep, 1):
            archive.unlink()
        elif match:
            kept.add(match[1])


def describe(target: dict[str, str]) -> dict[str, str]:
    """What the host's half would say of a Debian that is not there: CPython on Linux, on a machine like this."""
    return {
        "glibc": target["glibc"],
        "implementation_name": "cpython",
        "implementation_version": target["python"],
        "os_name": "posix",
        "platform_machine": platform.machine(),
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": target["python"],
        "python_version": ".".join(target["python"].split(".")[:2]),
        "sys_platform": "linux",
    }


def read_manifest(archive: Path) -> dict[str, Any]:
    """The manifest of an archive, or {} for one that is missing or damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            return json.loads(file.read("manifest.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}


def cache_folder(loader: Any, options: dict[str, Any]) -> Path:
    """Where built archives are kept."""
    return Path(loader.path_dwim(options["cache"] or str(BUNDLE / ".hothouse/releases")))


class ActionModule(ActionBase):
    """Asks the host whether it needs the release, and only then builds and sends it."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, options = self.validate_argument_spec(ARGUMENTS)
        project = Project.read(Path(self._loader.path_dwim(options["source"])))
        release: dict[str, str] = {"id": project.release_id()}
        if options["archive"]:
            return self._export(project, release["id"], options)
        asked = {name: value for name, value in options.items() if name not in ("archive", "target")}
        arguments = {**asked, "release": release}
        result = self._execute_module("hothouse_release", arguments, task_vars=task_vars)
        host = result.pop("host", {})
        if result.get("failed") or not result.pop("needed", False):
            return result
        if self._task.check_mode:
            assert_lock_is_current(project)
            locked_requirements(project, host)
            return result
        cache = cache_folder(self._loader, options)
        archive = self._archive(project, release["id"], host, cache, options["keep"])
        release["sha256"] = sha256(archive)
        try:
            folder = self._connection._shell.tmpdir or self._make_tmp_path()
            release["archive"] = self._connection._shell.join_path(folder, "release.zip")
            self._transfer_file(str(archive), release["archive"])
            self._fixup_perms2((folder, release["archive"]))
            return self._execute_module("hothouse_release", arguments, task_vars=task_vars)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _export(self, project: Project, release_id: str, options: dict[str, Any]) -> dict[str, Any]:
        """Puts the archive for a target that cannot be asked, such as an image, at a path of the controller."""
        if not options["target"]:
            raise AnsibleActionFail("The option `archive` needs `target`: what the archive is built for.")
        host, path = describe(options["target"]), Path(options["archive"])
        wanted = {"id": release_id, "python": host["python_full_version"]}
        changed = not wanted.items() <= read_manifest(path).items()
        if changed and not self._task.check_mode:
            archive = self._archive(
                project, release_id, host, cache_folder(self._loader, options), options["keep"]
            )
            staged = path.with_name(f".{path.name}.new")
            shutil.copyfile(archive, staged)
            staged.replace(path)
        return {"changed": changed, "release": release_id}

    def _archive(
        self, project: Project, release_id: str, host: dict[str, str], cache: Path, keep: int
    ) -> Path:
        """The archive for a host, built if it is not there yet; of several hosts that need it, one builds."""
        kind = f"py{host['python_full_version']}-glibc{host['glibc']}-{host['platform_machine']}"
        archive = cache / f"{project.name}-{release_id}-{kind}.zip"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if archive.exists():
                archive.touch()
            else:
                self._display.display(f"building {project.name} {release_id} for {kind}")
                for remains in cache.glob(".build-*"):  # of a killed run, as the lock is ours now
                    shutil.rmtree(remains)
                build(project, release_id, host, archive)
                prune(project, cache, keep)
        return archive
