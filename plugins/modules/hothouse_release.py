#!/usr/bin/python
"""The host's half of hothouse_release: installs an archive, checks it, puts it into service, tidies up."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: hothouse_release
short_description: Build a locked Python project once and put it into service as a release
description:
  - Builds the project on the controller into one archive (its own wheel and every locked dependency as a
    wheel, with hashes) and installs it on the host, offline, into C(PATH/releases/ID).
  - The ID is a hash of the project's files, so the same content is never built or installed twice.
  - C(PATH/current) is a symbolic link to the release in service and C(PATH/previous) to the one before it.
    The link moves, atomically, only after the new release is installed completely and has passed O(check).
  - When the release is in service already, this costs one module execution and no build.
  - The archive brings the C(uv) that installs it, so hosts need neither PyPI nor C(pip) nor C(python3-venv).
  - Nothing of a release runs as root. O(account) installs and checks it, without a network and in O(sandbox); then
    root takes the folder over. It follows no link in it, and refuses what no wheel can hold, such as links that lead
    out.
  - What builds wheels is pinned and hashed, and confined to the folder of the build.
  - An installation that fails leaves nothing, and the next run removes what a killed one left. Old releases are removed
    before the new one comes, and the space that it needs is looked at before anything is sent.
options:
  source:
    description:
      - Folder of the project on the controller, with C(pyproject.toml) and C(uv.lock).
      - A relative path is looked up from the folder of the playbook.
      - These do not belong to a release and do not change its ID, at the top of the folder everything that
        begins with a dot and C(build), C(dist), C(docs), C(node_modules), C(test), C(tests), C(venv), and at
        every level C(__pycache__), C(*.pyc), C(*.egg-info) and the folders of version control and of linters.
        The build sees a copy without them, so nothing outside the ID can get into a release.
      - Of a file's mode only the executable bit counts, so another umask makes no other release.
      - The dependency group C(dev) is left out. Dependencies must come from a package index, as wheels or as
        sources that become pure Python; the project itself must be pure Python. What builds these is pinned in the
        group C(build) of the bundle's C(uv.lock), or of the project's own. A project with
        C(tool.uv.package = false), or without a build system, is not built, only its dependencies are installed.
      - The indexes are those that pip and uv are configured for (environment and configuration files), and
        those that C(uv.lock) names.
    type: str
    required: true
  path:
    description: Folder on the host that holds C(releases/), C(current) and C(previous).
    type: path
    required: true
  account:
    description:
      - Account of the host, without rights, that installs and checks a release. Nothing on the host may be its own.
    type: str
    required: true
  sandbox:
    description:
      - Folder of the host with drop-ins of systemd's, whose lines in the section C([Service]) are the sandbox for what
        O(account) runs. Without it O(account) must be the one that runs the module.
    type: path
  check:
    description:
      - Command, as a list, that must succeed on the host before the release is put into service.
      - C({release}) in it is replaced by the folder of the new release.
      - It runs once per release, and again for the release in service when the command itself has changed.
      - When it fails the task fails with its output, and the release in service stays untouched. A release that never
        passed one is removed again.
    type: list
    elements: str
    default: []
  check_as:
    description:
      - Who runs O(check). V(root) is for a program of the host that itself runs the release as another account.
    type: str
    choices: [account, root]
    default: account
  check_timeout:
    description: Seconds after which O(check) is killed and counts as failed.
    type: int
    default: 120
  activate:
    description:
      - When C(current) moves to the release, as soon as the release has passed O(check) unless said otherwise.
      - V(later) installs and checks it only, and says RV(pending). V(now) moves C(current) to a release that V(later)
        has prepared, without another check. A play with C(any_errors_fatal) that does one after the other moves all
        of its hosts, or none.
    type: str
    choices: [checked, later, now]
    default: checked
  metrics:
    description:
      - File for the node exporter's textfile collector, which says which release is in service and since when.
        It is written where its folder exists.
    type: path
  keep:
    description:
      - How many releases stay on the host, the most recently used ones; also of how many releases the
        archives stay in O(cache). The release in service and the previous one always stay, and so does one
        that a process still runs.
    type: int
    default: 5
  cache:
    description:
      - Folder on the controller for built archives.
      - The default is C(.hothouse/releases) in the folder that holds C(plugins/).
    type: str
  python:
    description: The host's Python interpreter that the release is made for.
    type: path
    default: /usr/bin/python3
  archive:
    description:
      - Builds only, for O(target), and puts the archive at this path on the controller; no host is asked.
        What installs it finds in it C(requirements.txt), C(wheels/) and the wheel of C(uv).
      - Meant for C(module_defaults), so that a role's own task provides what an image is built from.
    type: path
  target:
    description: What O(archive) is built for, a machine like the controller with another Debian.
    type: dict
    suboptions:
      python:
        description: Full version of its Python.
        type: str
        required: true
      glibc:
        description: Version of its C library.
        type: str
        required: true
attributes:
  check_mode:
    support: full
    details: Builds and installs nothing; says C(changed) when another release would be put into service.
  diff_mode:
    support: full
requirements:
  - On the controller, the Python packages C(uv), C(pip) and C(packaging) beside Ansible.
  - On the host, Debian 12 or later (glibc), x86_64 or aarch64, and Python 3.11 or later.
author:
  - Hothouse contributors
"""

EXAMPLES = r"""
- name: Install the application
  hothouse_release:
    source: "{{ app_source }}"
    path: /opt/hothouse/app
    account: hothouse-release
    sandbox: /etc/systemd/system/celery-.service.d
    check: ["{release}/bin/celery", -A, "{{ app_celery }}", report]
    keep: 5
  notify: Release changed
"""

RETURN = r"""
release:
  description: ID of the release, 16 hexadecimal digits.
  returned: always
  type: str
  sample: 0f43c1b6d3a8e2aa
previous:
  description: ID of the release that was in service before, empty if there was none.
  returned: success
  type: str
  sample: 9d2a1b47c0e5f613
installed:
  description: Whether the release was installed by this run (in check mode, whether it would be).
  returned: success
  type: bool
pending:
  description: Whether C(current) is still to be moved to the release; with O(activate=later) only.
  returned: success
  type: bool
activated:
  description: Whether C(current) was moved to the release by this run.
  returned: success
  type: bool
removed:
  description: IDs of the old releases that were removed.
  returned: success
  type: list
  elements: str
"""

# What PEP 508 markers and platform tags depend on, asked of the interpreter that the release is made for.
DESCRIBE_PYTHON = """
import json, os, platform, sys
print(json.dumps({
    "glibc": os.confstr("CS_GNU_LIBC_VERSION").split()[1],
    "implementation_name": sys.implementation.name,
    "implementation_version": platform.python_version(),
    "os_name": os.name,
    "platform_machine": platform.machine(),
    "platform_python_implementation": platform.python_implementation(),
    "platform_release": platform.release(),
    "platform_system": platform.system(),
    "platform_version": platform.version(),
    "python_full_version": platform.python_version(),
    "python_version": ".".join(platform.python_version_tuple()[:2]),
    "sys_platform": sys.platform,
}))
"""


INSTALL_SECONDS = 600

# What a failure on one host means for the others, by `activate`.
OTHER_HOSTS = {
    "checked": "",
    "later": (
        "\nNo host of this run was moved to the new release: they move together, once it has passed on all of them. "
        "Each has and runs what it had. Mend the cause and run the same again."
    ),
    "now": (
        "\nOther hosts of this run may have moved to the new release already; no service was restarted. Mend the cause "
        "and run the same again. Until then playbooks/verify.yml says which host has and runs what."
    ),
}


class ReleaseError(Exception):
    """Something that ends the module; the text says what is wrong and what was left as it was."""


@dataclass
class Account:
    """Who installs and checks a release: an account without rights, in the sandbox of the services."""

    name: str
    # The folder of the services' drop-ins. Without it, the account is the module's own.
    sandbox: Path | None
    unit: str

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Account:
        """From the module's options. Raises ReleaseError."""
        name, sandbox = options["account"], options["sandbox"]
        try:
            uid = pwd.getpwnam(name).pw_uid
        except KeyError:
            raise ReleaseError(
                f"This host has no account {name}, which installs releases. Run site.yml."
            ) from None
        if not sandbox and uid != os.geteuid():
            raise ReleaseError(f"To install as {name}, the option `sandbox` is needed.")
        unit = "hothouse-release" + re.sub(r"[^A-Za-z0-9]", "-", options["path"])
        return cls(name, Path(sandbox) if sandbox else None, f"{unit}.service")

    def properties(self) -> list[str]:
        """Options of systemd-run that make the sandbox: what the drop-ins say, line by line."""
        assert self.sandbox
        found, section = [], ""
        for file in sorted(self.sandbox.glob("*.conf")):
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.startswith("["):
                    section = line.strip()
                elif section == "[Service]" and re.match(r"[A-Za-z]+=", line):
                    found.append(f"--property={line}")
        if not found:
            raise ReleaseError(f"{self.sandbox} on this host has no sandbox in it. Run site.yml.")
        return found

    def run(
        self, command: list[str], environment: Mapping[str, str], writable: list[Path], timeout: int
    ) -> tuple[int | None, str]:
        """Runs a command. Returns its exit code, None if it took longer than `timeout` seconds, and what it said."""
        if not self.sandbox:
            return run_here(command, dict(environment), timeout)
        self.stop()
        transient = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={self.unit}"]
        transient += ["--service-type=exec", "--working-directory=/", f"--property=User={self.name}"]
        transient += [*self.properties(), "--property=PrivateNetwork=yes", "--property=TimeoutStopSec=5"]
        transient += ["--property=InaccessiblePaths=-/etc/hothouse"]
        transient += [f"--property=ReadWritePaths={path}" for path in writable]
        transient += [f"--setenv={name}={value}" for name, value in environment.items()]
        # systemd would put variables in place of $NAME.
        transient += ["--", *(word.replace("$", "$$") for word in command)]
        try:
            return run_here(transient, None, timeout)
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends what is left of a command, such as that of a killed run: then nothing of this account is at work."""
        if self.sandbox:
            subprocess.run(["systemctl", "stop", self.unit], stderr=subprocess.DEVNULL, check=False)


def run_here(command: list[str], environment: dict[str, str] | None, timeout: int) -> tuple[int | None, str]:
    """Runs a command as this account; see Account.run. Raises OSError if it cannot be started."""
    process = subprocess.Popen(
        command,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
        output, _ = process.communicate()
        code = None
    return code, output.decode(errors="replace").strip()


def remove(path: Path) -> None:
    """Removes a file or a folder, whatever is in it; no link is followed, and no depth is too great."""
    done = subprocess.run(["rm", "-rf", "--one-file-system", "--", path], capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"{path} cannot be removed: {done.stderr.strip()}")


class Seal:
    """Gives a folder that another account has written to this one, so that nothing in it leads this one astray.

    No link is followed. What only code that ran during the installation can have made is refused: links that lead out,
    second names of files, devices, pipes, sockets. Modes become 0755 and 0644; set-id bits and access lists go.
    """

    DEEPEST = 60

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.interpreters = {str(python), str(python.resolve())}

    def apply(self) -> None:
        """Raises ReleaseError with the path of what is refused."""
        self._folder(os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), "", 0)

    def _folder(self, descriptor: int, below: str, depth: int) -> None:
        """Takes over an open folder, first itself, so that no one else gets into it any more."""
        try:
            self._own(descriptor, 0o755)
            if depth > self.DEEPEST:
                raise self._refusal(below, "folders that deep")
            for name in os.listdir(descriptor):
                self._entry(descriptor, name, f"{below}{name}", depth)
        finally:
            os.close(descriptor)

    def _entry(self, parent: int, name: str, path: str, depth: int) -> None:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        if stat.S_ISDIR(found.st_mode):
            self._folder(os.open(name, flags | os.O_DIRECTORY, dir_fd=parent), f"{path}/", depth + 1)
        elif stat.S_ISLNK(found.st_mode):
            if not self._stays_inside(os.readlink(name, dir_fd=parent), depth):
                raise self._refusal(path, "a link that leads out of the release")
            os.chown(name, os.geteuid(), os.getegid(), dir_fd=parent, follow_symlinks=False)
        elif not stat.S_ISREG(found.st_mode):
            raise self._refusal(path, "a device, a pipe or a socket")
        elif found.st_nlink != 1:
            raise self._refusal(path, "a file with a second name")
        else:
            descriptor = os.open(name, flags, dir_fd=parent)
            try:
                self._own(descriptor, 0o755 if found.st_mode & 0o111 else 0o644)
            finally:
                os.close(descriptor)

    @staticmethod
    def _own(descriptor: int, mode: int) -> None:
        """Takes over what is open: owner first, for only the owner can change the rest."""
        os.fchown(descriptor, os.geteuid(), os.getegid())
        for name in os.listxattr(descriptor):
            if name != "security.selinux":
                os.removexattr(descriptor, name)
        os.fchmod(descriptor, mode)

    def _stays_inside(self, target: str, depth: int) -> bool:
        """Whether a link in a folder of this depth stays in the release, or is that to the interpreter."""
        parts = target.split("/")
        up = sum(1 for _ in itertools.takewhile(lambda part: part == "..", parts))
        return target in self.interpreters or (
            not target.startswith("/") and up <= depth and ".." not in parts[up:]
        )

    def _refusal(self, path: str, what: str) -> ReleaseError:
        return ReleaseError(
            f"The release is refused, for its installation made {what}: {path!r}. Wheels hold no such thing; code in "
            f"one of them has run and made it. It was removed again."
        )


class Releases:
    """The releases below one folder of the host, and the links that say which one is in service."""

    def __init__(self, path: str, python: str, account: Account) -> None:
        self.path = Path(path)
        self.python = Path(python)
        self.account = account
        self.folder = self.path / "releases"

    def linked(self, name: str) -> str:
        """The ID that the link `name` (current or previous) points to, or an empty string."""
        link = self.path / name
        if link.is_symlink():
            return link.readlink().name
        if link.exists():
            raise ReleaseError(
                f"{link} is not a symbolic link, so no release can be put into service. Remove it."
            )
        return ""

    def link(self, name: str, release_id: str) -> None:
        """Points `name` to a release in one atomic step; whoever follows it sees the old or the new one."""
        staged = self.path / f".{name}.new"
        staged.unlink(missing_ok=True)
        staged.symlink_to(Path("releases", release_id))
        staged.replace(self.path / name)

    def metrics(self) -> str:
        """What the node exporter shows: the release in service, and since when, as hothouse_units takes it."""
        moved = (self.path / "current").lstat().st_ctime
        return (
            "# HELP hothouse_release_info The release that is in service, in a label.\n"
            "# TYPE hothouse_release_info gauge\n"
            f'hothouse_release_info{{release="{self.linked("current")}"}} 1\n'
            "# HELP hothouse_release_moved_seconds When the release was put into service, in Unix time.\n"
            "# TYPE hothouse_release_moved_seconds gauge\n"
            f"hothouse_release_moved_seconds {moved:.6f}\n"
        )

    def record(self, release_id: str) -> dict[str, Any]:
        """What release.json says, or {} for a release that is not complete or was made for another Python.

        release.json is written last, so a folder without it is the remains of an interrupted installation.
        """
        release = self.folder / release_id
        if not self.complete(release):
            return {}
        try:
            record = json.loads((release / "release.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        usable = record["id"] == release_id and record["interpreter"] == str(self.python.resolve())
        return record if usable and (release / "bin/python").exists() else {}

    @staticmethod
    def complete(release: Path) -> bool:
        """Whether there is a release.json that this module wrote, and not a wheel."""
        try:
            found = (release / "release.json").lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()

    def write_record(self, record: dict[str, Any]) -> None:
        """Writes release.json atomically; its time says when the release was last put into service."""
        target = self.folder / record["id"] / "release.json"
        staged = target.with_name(".release.json.new")
        remove(staged)
        with staged.open("x", encoding="utf-8") as file:  # never through a link
            file.write(json.dumps(record, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)

    def surplus(self, keep: int, in_use: set[str]) -> list[str]:
        """What to remove: the half installed, and all but the `keep` most recently used; none of `in_use`."""
        complete, remains = {}, []
        for release in self.folder.iterdir() if self.folder.is_dir() else ():
            record = release / "release.json"
            if release.name in in_use:
                continue
            if self.complete(release):
                complete[release.name] = record.lstat().st_mtime
            else:
                remains.append(release.name)
        others = sorted(complete, key=lambda release_id: complete[release_id], reverse=True)
        surplus = others[max(0, keep - len(in_use)) :]
        return sorted({*surplus, *remains} - self.running()) if surplus or remains else []

    def running(self) -> set[str]:
        """The releases that a process of this host still runs, an old worker or a long hothouse-run."""
        pattern = re.compile(re.escape(os.fsencode(self.folder)) + rb"/([^/\0\s:]+)")
        found: set[bytes] = set()
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            # A script's interpreter stands in its arguments, `python` in PATH, and compiled modules are mapped.
            for name in ("cmdline", "environ", "maps"):
                with contextlib.suppress(OSError):
                    found.update(pattern.findall((process / name).read_bytes()))
            for name in ("cwd", "exe"):
                with contextlib.suppress(OSError):
                    found.update(pattern.findall(os.fsencode((process / name).readlink()) + b"/"))
        return {os.fsdecode(name) for name in found}

    def space(self) -> dict[str, int]:
        """Bytes and inodes that are free for an account without rights, and the device that they are on."""
        folder = next(folder for folder in (self.path, *self.path.parents) if folder.is_dir())
        found = os.statvfs(folder)
        inodes = found.f_favail if found.f_files else 1 << 40  # btrfs has no number of them
        return {"bytes": found.f_bavail * found.f_frsize, "inodes": inodes, "device": folder.stat().st_dev}

    def describe_python(self) -> dict[str, str]:
        """What wheels are chosen for. Raises ReleaseError if there is no working interpreter."""
        command = [str(self.python), "-I", "-c", DESCRIBE_PYTHON]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            raise ReleaseError(f"{self.python} cannot be run on this host: {error.strerror}.") from None
        except subprocess.CalledProcessError as error:
            raise ReleaseError(f"{self.python} does not work on this host:\n{error.stderr.strip()}") from None
        return json.loads(answer.stdout)

    def install(self, release_id: str, archive: Path, sha256: str) -> None:
        """Installs an archive with the uv that it brings, taking nothing from elsewhere."""
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ReleaseError(
                    "The release's archive arrived damaged; nothing was installed. Run it again."
                )
        target = self.folder / release_id
        self.folder.mkdir(exist_ok=True)
        remove(target)
        # Below `path` and not in /tmp, which may be mounted noexec.
        staging = Path(tempfile.mkdtemp(prefix=".install-", dir=self.path))
        try:
            staging.chmod(0o755)
            shutil.unpack_archive(archive, staging, "zip")
            manifest = json.loads((staging / "manifest.json").read_text(encoding="utf-8"))
            uv = str(unpack_uv(staging / manifest["uv"], staging / "uv"))
            scratch = staging / "scratch"
            for folder in (scratch, target):
                folder.mkdir(0o700)
                shutil.chown(folder, self.account.name)
            venv = [
                uv,
                "venv",
                "--allow-existing",
                "--python",
                str(self.python),
                "--prompt",
                manifest["name"],
            ]
            self._uv([*venv, str(target)], scratch, target)
            install = [
                uv,
                "pip",
                "install",
                "--python",
                str(target / "bin/python"),
                "--no-index",
                "--no-deps",
            ]
            install += ["--find-links", str(staging / "wheels"), "--require-hashes", "--compile-bytecode"]
            install += ["--link-mode=copy", "-r", str(staging / "requirements.txt")]
            self._uv(install, scratch, target)
            Seal(target, self.python).apply()
        except BaseException:
            remove(target)
            raise
        finally:
            remove(staging)
        for name in (
            ".lock",
            "release.json",
        ):  # uv's own, writable for everyone; and what a wheel might bring
            remove(target / name)
        os.sync()  # the files before the record that vouches for them
        record = {"id": release_id, "interpreter": str(self.python.resolve()), "checked": None}
        self.write_record(record | {key: manifest[key] for key in ("name", "python", "wheels")})

    def _uv(self, command: list[str], scratch: Path, target: Path) -> None:
        """Runs uv blind to the host's settings, caches and indexes. Raises ReleaseError with what it said."""
        environment = {
            "HOME": str(scratch),
            "LANG": "C.UTF-8",
            "PATH": "/usr/bin:/bin",
            "TMPDIR": str(scratch),
            "UV_NO_CACHE": "1",
            "UV_NO_CONFIG": "1",
            "UV_NO_PROGRESS": "1",
            "UV_OFFLINE": "1",
            "UV_PYTHON_DOWNLOADS": "never",
        }
        code, said = self.account.run(command, environment, [scratch, target], INSTALL_SECONDS)
        if code is None:
            raise ReleaseError(
                f"The release was not installed in {INSTALL_SECONDS} seconds. uv said:\n{said}"
            )
        if code:
            raise ReleaseError(f"The release cannot be installed. uv said:\n{said}")


def unpack_uv(wheel: Path, target: Path) -> Path:
    """Takes the program uv out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    target.chmod(0o755)
    return target


def check_release(releases: Releases, options: Mapping[str, Any], release_id: str, unproven: bool) -> None:
    """Runs the check of a release. Raises ReleaseError, with the end of its output, unless it succeeds.

    A release that is `unproven`, never passed a check and is not in service, does not stay.
    """
    release, timeout = releases.folder / release_id, options["check_timeout"]
    argv = [word.replace("{release}", str(release)) for word in options["check"]]
    output = ""
    try:
        if options["check_as"] == "root":
            code, output = run_here(argv, None, timeout)
        else:
            environment = {"PATH": f"{release}/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
            code, output = releases.account.run(argv, environment, [], timeout)
        if code == 0:
            return
        outcome = f"took longer than {timeout} seconds" if code is None else f"failed with exit code {code}"
    except OSError as error:
        outcome = f"could not be run ({error.strerror})"
    current = releases.linked("current")
    if current == release_id:
        rest = "It is the release in service and stays so."
    elif current:
        rest = f"It was not put into service; the running release {current} was not touched."
    else:
        rest = "It was not put into service; there is no other release yet."
    if unproven:
        remove(release)
        rest += " It was removed from the host again."
    tail = "\n".join(output.splitlines()[-40:])
    raise ReleaseError(
        f"The check of release {release_id} {outcome}. {rest}\n"
        f"The check was: {shlex.join(argv)}\nIt said:\n{tail}"
    )


def write_metrics(path: str | None, text: str, dry: bool) -> bool:
    """Writes the file for the node exporter, if there is one, and says whether it had to."""
    if not path or not Path(path).parent.is_dir():
        return False
    file = Path(path)
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return False
    if not dry:
        staged = file.with_name(f"{file.name}.new")
        staged.write_text(text, encoding="utf-8")
        staged.replace(file)
    return True


def apply(module: AnsibleModule, releases: Releases) -> dict[str, Any]:
    """Brings the host to the wanted release; see RETURN. `needed` asks the action for the archive."""
    options, wanted = module.params, module.params["release"]
    release_id, archive, check = wanted["id"], wanted.get("archive"), options["check"]
    activate = options["activate"]
    current, before = releases.linked("current"), releases.linked("previous")
    previous = before if current == release_id else current
    record = releases.record(release_id)
    installed, activated = not record, current != release_id
    pending = activated and activate == "later"
    activated = activated and not pending
    result: dict[str, Any] = {"release": release_id, "previous": previous}
    if activate == "now" and not module.check_mode and record.get("checked") != check:
        raise ReleaseError(f"The release {release_id} is not prepared any more. Run the same again.")
    removed: list[str] = []
    if installed and not archive:
        # First room is made. As long as the new release is not in service, the way back leads to `before`.
        result |= {"needed": True, "host": releases.describe_python()}
        removed = releases.surplus(options["keep"], {release_id, current, before} - {""})
        if not module.check_mode:
            for old in [*removed, *([release_id] if (releases.folder / release_id).exists() else [])]:
                remove(releases.folder / old)
            return result | {"changed": bool(removed), "removed": removed, "space": releases.space()}
    if not module.check_mode:
        if installed:
            releases.install(release_id, Path(archive), wanted["sha256"])
            record = releases.record(release_id)
        if activate != "now" and (activated or pending or record["checked"] != check):
            if check:
                unproven = record["checked"] is None and release_id not in (current, before)
                check_release(releases, options, release_id, unproven)
            releases.write_record(record | {"checked": check})
        if activated:
            if current:
                releases.link("previous", current)
            releases.link("current", release_id)
    # What is pending is tidied up after when it is in service.
    if not pending:
        removed = sorted({*removed, *releases.surplus(options["keep"], {release_id, previous} - {""})})
    if not module.check_mode:
        for old in removed:
            remove(releases.folder / old)
    if activated:
        name = str(releases.path / "current")
        texts = (f"releases/{target}\n" if target else "" for target in (current, release_id))
        result["diff"] = {"before_header": name, "after_header": name} | dict(
            zip(("before", "after"), texts, strict=True)
        )
    told = releases.linked("current") != "" and write_metrics(
        options["metrics"], releases.metrics(), module.check_mode
    )
    changed = bool(installed or activated or removed or told)
    result |= {"changed": changed, "installed": installed, "activated": activated, "removed": removed}
    return result | ({"pending": pending} if activate == "later" else {})


def remove_remains(module: AnsibleModule, releases: Releases) -> bool:
    """Removes what a killed run left here, as the lock is ours now, and in the folder that archives are sent to."""
    remains = list(releases.path.glob(".install-*"))
    name = f"hothouse-release-{hashlib.sha256(os.fsencode(releases.path)).hexdigest()[:16]}.zip"
    sent = module.params["release"].get("archive")
    for account in {"root", os.environ.get("SUDO_USER", "root")}:
        with contextlib.suppress(KeyError):
            folder = re.sub("^~", pwd.getpwnam(account).pw_dir, module._remote_tmp)
            remains += [path for path in Path(folder).glob(f"ansible-tmp-*/{name}") if str(path) != sent]
    if remains:
        releases.account.stop()
    for path in remains:
        remove(path)
    return bool(remains)


def main() -> None:
    """Entry point; the action plugin adds `release`: id, and path and sha256 of the archive once sent."""
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "account": {"type": "str", "required": True},
            "sandbox": {"type": "path"},
            "check": {"type": "list", "elements": "str", "default": []},
            "check_as": {"type": "str", "choices": ["account", "root"], "default": "account"},
            "check_timeout": {"type": "int", "default": 120},
            "activate": {"type": "str", "choices": list(OTHER_HOSTS), "default": "checked"},
            "metrics": {"type": "path"},
            "keep": {"type": "int", "default": 5},
            "cache": {"type": "str"},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "archive": {"type": "path"},
            "target": {
                "type": "dict",
                "options": {
                    "python": {"type": "str", "required": True},
                    "glibc": {"type": "str", "required": True},
                },
            },
            "release": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    if not module.params["release"]:
        module.fail_json(msg="hothouse_release needs its action plugin: set action_plugins in ansible.cfg.")
    os.umask(0o022)  # a release is readable for the accounts that run it and writable for root alone
    try:
        with contextlib.ExitStack() as stack:
            options = module.params
            # In check mode prepare may be about to create the account.
            account = (
                Account.read(options) if not module.check_mode else Account(options["account"], None, "")
            )
            releases = Releases(options["path"], options["python"], account)
            tidied = False
            if not module.check_mode:
                releases.path.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((releases.path / ".lock").open("w")), fcntl.LOCK_EX)
                tidied = remove_remains(module, releases)
            result = apply(module, releases)
            result["changed"] = result.get("changed", False) or tidied
    except (ReleaseError, OSError) as error:
        rest = OTHER_HOSTS[module.params["activate"]]
        module.fail_json(msg=f"{error}{rest}", release=module.params["release"]["id"])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
