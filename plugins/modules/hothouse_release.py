#!/usr/bin/python
"""The host's half of hothouse_release: installs an archive, checks it, puts it into service, tidies up."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import zipfile
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
      - The dependency group C(dev) is left out. Dependencies must be wheels of a package index; the project
        itself must be pure Python. A project with C(tool.uv.package = false), or without a build system, is
        not built, only its dependencies are installed.
      - The indexes are those that pip and uv are configured for (environment and configuration files), and
        those that C(uv.lock) names.
    type: str
    required: true
  path:
    description: Folder on the host that holds C(releases/), C(current) and C(previous).
    type: path
    required: true
  check:
    description:
      - Command, as a list, that must succeed on the host before the release is put into service.
      - C({release}) in it is replaced by the folder of the new release.
      - It runs once per release, and again for the release in service when the command itself has changed.
      - When it fails the task fails with its output, and the release in service stays untouched.
    type: list
    elements: str
    default: []
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
        archives stay in O(cache). The release in service and the previous one always stay.
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


class Releases:
    """The releases below one folder of the host, and the links that say which one is in service."""

    def __init__(self, path: str, python: str) -> None:
        self.path = Path(path)
        self.python = Path(python)
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
        try:
            record = json.loads((release / "release.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        usable = record["id"] == release_id and record["interpreter"] == str(self.python.resolve())
        return record if usable and (release / "bin/python").exists() else {}

    def write_record(self, record: dict[str, Any]) -> None:
        """Writes release.json atomically; its time says when the release was last put into service."""
        target = self.folder / record["id"] / "release.json"
        staged = target.with_name(".release.json.new")
        with staged.open("w", encoding="utf-8") as file:
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
            if record.exists():
                complete[release.name] = record.stat().st_mtime
            else:
                remains.append(release.name)
        others = sorted(complete, key=lambda release_id: complete[release_id], reverse=True)
        return sorted(others[max(0, keep - len(in_use)) :] + remains)

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
        if target.exists():
            shutil.rmtree(target)
        # Below `path` and not in /tmp, which may be mounted noexec.
        staging = Path(tempfile.mkdtemp(prefix=".install-", dir=self.path))
        try:
            shutil.unpack_archive(archive, staging, "zip")
            manifest = json.loads((staging / "manifest.json").read_text(encoding="utf-8"))
            uv = unpack_uv(staging / manifest["uv"], staging / "uv")
            run_uv(staging, [uv, "venv", "--python", self.python, "--prompt", manifest["name"], target])
            install: list[Path | str] = [
                uv,
                "pip",
                "install",
                "--python",
                target / "bin/python",
                "--no-index",
                "--no-deps",
            ]
            install += ["--find-links", staging / "wheels", "--require-hashes", "--compile-bytecode"]
            run_uv(staging, [*install, "--link-mode=copy", "-r", staging / "requirements.txt"])
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        (target / ".lock").unlink(missing_ok=True)  # uv's own, writable for everyone
        os.sync()  # the files before the record that vouches for them
        record = {"id": release_id, "interpreter": str(self.python.resolve()), "checked": None}
        self.write_record(record | {key: manifest[key] for key in ("name", "python", "wheels")})


def unpack_uv(wheel: Path, target: Path) -> Path:
    """Takes the program uv out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    target.chmod(0o755)
    return target


def run_uv(staging: Path, command: list[Path | str]) -> None:
    """Runs uv blind to the host's own settings, caches and indexes. Raises ReleaseError with what it said."""
    environment = {
        "HOME": str(staging),
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(staging),
        "UV_NO_CACHE": "1",
        "UV_NO_CONFIG": "1",
        "UV_NO_PROGRESS": "1",
        "UV_OFFLINE": "1",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise ReleaseError(f"The release cannot be installed. uv said:\n{done.stderr.strip()}")


def check_release(releases: Releases, command: list[str], release_id: str, timeout: int) -> None:
    """Runs the check of a release. Raises ReleaseError, with the end of its output, unless it succeeds."""
    argv = [word.replace("{release}", str(releases.folder / release_id)) for word in command]
    output = b""
    try:
        process = subprocess.Popen(
            argv,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        output, _ = process.communicate(timeout=timeout)
        if process.returncode == 0:
            return
        outcome = f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
        output, _ = process.communicate()
        outcome = f"took longer than {timeout} seconds"
    except OSError as error:
        outcome = f"could not be run ({error.strerror})"
    current = releases.linked("current")
    if current == release_id:
        rest = "It is the release in service and stays so."
    elif current:
        rest = f"It was not put into service; the running release {current} was not touched."
    else:
        rest = "It was not put into service; there is no other release yet."
    tail = "\n".join(output.decode(errors="replace").strip().splitlines()[-40:])
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
    current = releases.linked("current")
    previous = releases.linked("previous") if current == release_id else current
    record = releases.record(release_id)
    installed, activated = not record, current != release_id
    pending = activated and activate == "later"
    activated = activated and not pending
    result: dict[str, Any] = {"release": release_id, "previous": previous}
    if activate == "now" and not module.check_mode and record.get("checked") != check:
        raise ReleaseError(f"The release {release_id} is not prepared any more. Run the same again.")
    if installed and not archive:
        result |= {"needed": True, "host": releases.describe_python()}
        if not module.check_mode:
            return result
    if not module.check_mode:
        if installed:
            releases.install(release_id, Path(archive), wanted["sha256"])
            record = releases.record(release_id)
        if activate != "now" and (activated or pending or record["checked"] != check):
            if check:
                check_release(releases, check, release_id, options["check_timeout"])
            releases.write_record(record | {"checked": check})
        if activated:
            if current:
                releases.link("previous", current)
            releases.link("current", release_id)
    # What is pending is tidied up after when it is in service.
    removed = [] if pending else releases.surplus(options["keep"], {release_id, previous} - {""})
    if not module.check_mode:
        for old in removed:
            shutil.rmtree(releases.folder / old)
    if activated:
        name = str(releases.path / "current")
        before, after = (f"releases/{target}\n" if target else "" for target in (current, release_id))
        result["diff"] = {"before_header": name, "after_header": name, "before": before, "after": after}
    told = releases.linked("current") != "" and write_metrics(
        options["metrics"], releases.metrics(), module.check_mode
    )
    changed = bool(installed or activated or removed or told)
    result |= {"changed": changed, "installed": installed, "activated": activated, "removed": removed}
    return result | ({"pending": pending} if activate == "later" else {})


def main() -> None:
    """Entry point; the action plugin adds `release`: id, and path and sha256 of the archive once sent."""
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "check": {"type": "list", "elements": "str", "default": []},
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
    releases = Releases(module.params["path"], module.params["python"])
    try:
        with contextlib.ExitStack() as stack:
            if not module.check_mode:
                releases.path.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context((releases.path / ".lock").open("w")), fcntl.LOCK_EX)
                for remains in releases.path.glob(".install-*"):  # of a killed run, as the lock is ours now
                    shutil.rmtree(remains)
            result = apply(module, releases)
    except (ReleaseError, OSError) as error:
        rest = OTHER_HOSTS[module.params["activate"]]
        module.fail_json(msg=f"{error}{rest}", release=module.params["release"]["id"])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
