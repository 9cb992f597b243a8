"""The controller's half of hothouse_release: names, builds and sends a release. Documented in the module."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
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
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
from hothouse_build import (  # found by the line above
    BUNDLE,
    Backends,
    export,
    fetch_source,
    pinned_lines,
    read_lock,
    registry_options,
    run,
    run_confined,
    sha256,
    source_only,
    uv,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "source": {"type": "str", "required": True},
    "path": {"type": "path", "required": True},
    "account": {"type": "str", "required": True},
    "sandbox": {"type": "path"},
    "check": {"type": "list", "elements": "str", "default": []},
    "check_as": {"type": "str", "choices": ["account", "root"], "default": "account"},
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
BUILDER = "2"
# What the program uv takes on a host while it installs.
UV_BYTES = 64 << 20
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


@dataclass(frozen=True)
class Project:
    """A locked project on the controller, reduced to what a build may see."""

    source: Path
    name: str
    requires_python: str
    built: bool  # it becomes a wheel itself, not only its dependencies
    dynamic: bool  # its build backend has to be asked for some of its metadata
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
        dynamic = bool(settings["project"].get("dynamic"))
        package = settings.get("tool", {}).get("uv", {}).get("package", "build-system" in settings)
        requires_python = settings["project"].get("requires-python", "")
        files = dict(project_files(source))
        return cls(source, canonicalize_name(name), requires_python, package, dynamic, files)

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


def interpreter(project: Project) -> list[str]:
    """Has uv read a project with this very Python if the project allows it, else with one that uv finds."""
    version = ".".join(map(str, sys.version_info[:3]))
    return ["--python", sys.executable] if version in SpecifierSet(project.requires_python) else []


def local_sources(project: Project) -> list[Path]:
    """Folders and files beside the project that its lock file names, such as a path dependency of the group dev."""
    kinds = ("path", "directory", "editable", "virtual")
    named = [package["source"].get(kind) for package in read_lock(project.source) for kind in kinds]
    return [project.source / path for path in named if path and path != "."]


def assert_lock_is_current(project: Project, cache: Path) -> None:
    """Raises AnsibleActionFail when uv.lock no longer matches pyproject.toml."""
    outdated = (
        f"{project.source}/uv.lock does not match pyproject.toml (or could not be checked). "
        f"To renew it, run `uv lock` in that folder and commit it. uv said:"
    )
    check = [uv(), "lock", "--check", *interpreter(project)]
    beside = local_sources(project)
    with tempfile.TemporaryDirectory(prefix=building_prefix(cache)) as name:
        # A project whose build backend has to be asked for its dependencies is built for that.
        folder = Path(name)
        backends = Backends(project.source, cache) if project.dynamic else None
        if beside:
            where, readable = project.source, [project.source, *beside]
        else:
            where, readable = folder / "source", []
            project.copy_to(where)
        options = [*backends.options] if backends else ["--offline"]
        try:
            run_confined(
                [*check, *options],
                outdated,
                folder,
                [*readable, *([backends.folder] if backends else [])],
                where,
            )
            return
        except AnsibleActionFail:
            if backends or beside:
                raise
    # Offline, uv cannot always tell an old lock file from metadata that it has not seen yet. Nothing is built.
    run([*check, "--no-build"], outdated, project.source)


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
    return pinned_lines(export(project.source, "--no-dev", *interpreter(project)), host)


def platforms(host: dict[str, str]) -> list[str]:
    """The wheel platforms that a host can use: PEP 600 down from its own glibc, then the older names."""
    machine, minor = host["platform_machine"], int(host["glibc"].split(".")[1])
    names = [f"manylinux_2_{number}" for number in range(minor, 4, -1)]
    return [f"{name}_{machine}" for name in [*names, "manylinux2014", "manylinux2010", "manylinux1", "linux"]]


def download(project: Project, requirements: list[str], host: dict[str, str], target: Path) -> None:
    """Fetches the wheels for a host with pip, which checks hashes and honours the user's pip settings."""
    if not requirements:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
    version = re.match(r"[0-9.]+", host["python_full_version"])  # pip takes no suffix such as rc1
    command += ["--implementation=cp", "--python-version", version[0] if version else ""]
    command += ["--dest", str(target)]
    command += [word for name in platforms(host) for word in ("--platform", name)]
    command += registry_options(project.source)
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


def building_prefix(cache: Path) -> str:
    """How the folders begin in which uv builds. They lie outside of the bundle, which uv would take for a workspace."""
    return f"hothouse-build-{hashlib.sha256(bytes(cache.resolve())).hexdigest()[:16]}-"


def build_wheels(
    project: Project, sources: dict[str, dict[str, str]], folder: Path, cache: Path
) -> Iterator[Path]:
    """Builds the project's own wheel, from a copy of the files that its ID covers, and those of `sources`."""
    if not project.built and not sources:
        return
    backends = Backends(project.source, cache)
    if project.built:
        source = folder / "build" / "source"
        project.copy_to(source)
        yield backends.build(source, source.parent, f"The project {project.source}")
    for number, (requirement, sdist) in enumerate(sources.items()):
        place = folder / f"build-{number}"
        place.mkdir()
        name = f"{requirement.split()[0]}, of which an index has the source alone,"
        yield backends.build(fetch_source(project.source, sdist, place), place, name)


def pinned(wheel: Path) -> str:
    """The requirement that only this very file can meet."""
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{sha256(wheel)}"


def installed_space(wheels: list[Path]) -> dict[str, int]:
    """Bytes and inodes of what wheels become, compiled modules included, in blocks of 4 KiB."""
    size = count = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            for entry in packed.infolist():
                copies = 2 if entry.filename.endswith(".py") else 1
                size += copies * ((entry.file_size + 4095) // 4096 * 4096)
                count += copies
            folders = {str(Path(name).parent) for name in packed.namelist()}
            count += 2 * len(folders)
            size += 2 * 4096 * len(folders)
    return {"bytes": size, "inodes": count}


def build(project: Project, release_id: str, host: dict[str, str], archive: Path) -> None:
    """Builds the archive: manifest.json, requirements.txt, wheels/ and the wheel of uv.

    Everything happens in a folder beside the archive, which appears in one step when it is complete.
    """
    with tempfile.TemporaryDirectory(prefix=".build-", dir=archive.parent) as name:
        folder = Path(name)
        wheels = folder / "wheels"
        wheels.mkdir()
        assert_lock_is_current(project, archive.parent)
        requirements = locked_requirements(project, host)
        sources = source_only(project.source, requirements)
        with tempfile.TemporaryDirectory(prefix=building_prefix(archive.parent)) as building:
            for wheel in build_wheels(project, sources, Path(building), archive.parent):
                shutil.move(wheel, wheels)
        download(project, [line for line in requirements if line not in sources], host, wheels)
        uv_wheel = installer(project, host, archive.parent)
        carried = sorted(wheels.iterdir())
        manifest = {
            "id": release_id,
            "name": project.name,
            "python": host["python_full_version"],
            "uv": uv_wheel.name,
            "wheels": [wheel.name for wheel in carried],
            "space": installed_space(carried),
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


def upload_name(path: str) -> str:
    """Name of a sent archive: the host's half knows by it what a killed run left for the same path."""
    return f"hothouse-release-{hashlib.sha256(path.encode()).hexdigest()[:16]}.zip"


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
        cache = cache_folder(self._loader, options)
        if self._task.check_mode:
            with tempfile.TemporaryDirectory() as nothing_stays:
                assert_lock_is_current(project, Path(nothing_stays))
            locked_requirements(project, host)
            return result
        archive = self._archive(project, release["id"], host, cache, options["keep"])
        release["sha256"] = sha256(archive)
        try:
            folder = self._connection._shell.tmpdir or self._make_tmp_path()
            self._assert_space(archive, options["path"], result.pop("space"), folder)
            release["archive"] = self._connection._shell.join_path(folder, upload_name(options["path"]))
            self._transfer_file(str(archive), release["archive"])
            self._fixup_perms2((folder, release["archive"]))
            done = self._execute_module("hothouse_release", arguments, task_vars=task_vars)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        if "removed" in done:
            done["removed"] = sorted({*result["removed"], *done["removed"]})
        return done

    def _assert_space(self, archive: Path, path: str, space: dict[str, int], upload: str) -> None:
        """Raises AnsibleActionFail when a host has no room for a release, before anything is sent.

        `space` is what the host's half found below `path`; what is free at `upload` is asked here.
        """
        at = shlex.quote(upload)
        told = self._low_level_execute_command(
            f"echo space: $(stat --format %d {at}) $(stat --file-system --format '%a %S %c %d' {at})"
        )
        # A greeting may stand around it.
        said = re.search(r"space:((?: \d+){5})", told["stdout"])
        if not said:
            raise AnsibleActionFail(
                f"The host does not say what is free at {upload}: {told['stdout']}{told['stderr']}"
            )
        device, blocks, block, inodes, free_inodes = map(int, said[1].split())
        sent = archive.stat().st_size
        needed = read_manifest(archive)["space"]
        # What is unpacked, uv's copy of the wheels while it installs, and what stays.
        wanted = {"bytes": sent + UV_BYTES + 2 * needed["bytes"], "inodes": 2 * needed["inodes"] + 100}
        if device == space["device"]:
            wanted["bytes"] += sent
        elif blocks * block < sent:
            raise AnsibleActionFail(
                f"{upload} on this host has {blocks * block >> 20} MB free, the archive of the release has "
                f"{sent >> 20} MB. Nothing was sent. Free space there, or set ansible_remote_tmp to a folder with more."
            )
        elif inodes and free_inodes < 10:
            raise AnsibleActionFail(f"{upload} on this host has no free inodes. Nothing was sent.")
        for kind, unit, amount in (("bytes", "MB", 1 << 20), ("inodes", "inodes", 1)):
            if space[kind] < wanted[kind]:
                raise AnsibleActionFail(
                    f"{path} on this host has {space[kind] // amount} {unit} free, the release needs "
                    f"{-(-wanted[kind] // amount)} {unit} while it is installed. Nothing was sent or installed, and "
                    f"the release in service stays. Free space on that file system, or keep fewer releases (for the "
                    f"application: the variable `app_releases_kept`)."
                )

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
                elsewhere = Path(tempfile.gettempdir()).glob(f"{building_prefix(cache)}*")
                for remains in (
                    *cache.glob(".build-*"),
                    *elsewhere,
                ):  # of a killed run, as the lock is ours now
                    shutil.rmtree(remains)
                build(project, release_id, host, archive)
                prune(project, cache, keep)
        return archive
