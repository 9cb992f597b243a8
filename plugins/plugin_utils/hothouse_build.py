"""How wheels are built on the controller: by backends that are pinned and hashed, and that see what they need only.

What builds is fetched first, with the user's settings for indexes. Then it builds, without a network, in an environment
of its own, and confined to the folder of the build: hothouse_confine.py. See docs/decisions/0022.
"""

from __future__ import annotations

import contextlib
import hashlib
import netrc
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ansible.errors import AnsibleActionFail
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

BUNDLE = Path(__file__).resolve().parents[2]
CONFINE = Path(__file__).with_name("hothouse_confine.py")
# What uv and pip get of the user's environment when they fetch: nothing that they fetch runs then.
FETCHING = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TMPDIR|NETRC|XDG_(?:CACHE|CONFIG|DATA)_HOME|XDG_CONFIG_DIRS|XDG_RUNTIME_DIR"
    r"|DBUS_SESSION_BUS_ADDRESS|(?:HTTPS?|ALL|NO|FTP)_PROXY|(?:https?|all|no|ftp)_proxy|SSL_CERT_(?:FILE|DIR)"
    r"|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|UV_\w+|PIP_\w+"
)
OLDEST = "315532800"  # 1980, the oldest date that a wheel can hold
# Dependency group of build requirements, both in the bundle's pyproject.toml and in a project's own.
GROUP = "build"
KEPT_SECONDS = 30 * 24 * 3600
Pins = dict[str, tuple[Requirement, list[str]]]


def run(
    command: list[str], failure: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Runs a command of the controller with the user's settings for indexes, or with `environment` alone.

    Returns its standard output. Raises AnsibleActionFail: `failure`, then the end of what the command said.
    """
    if environment is None:
        environment = {name: value for name, value in os.environ.items() if FETCHING.fullmatch(name)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise AnsibleActionFail(f"{failure}\n{said}")
    return done.stdout


def run_confined(
    command: list[str], failure: str, folder: Path, readable: Iterable[Path], cwd: Path | None = None
) -> None:
    """Runs what may execute code that was fetched. It can write to `folder` alone, and knows no more than it needs.

    Raises AnsibleActionFail as run() does.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "SOURCE_DATE_EPOCH": OLDEST,
        "TMPDIR": str(home),
        "UV_NO_CACHE": "1",
        "UV_NO_PROGRESS": "1",
        "UV_OFFLINE": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "XDG_CONFIG_DIRS": str(home),
    }
    python = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, Path(sys.executable).parent)}
    reading = [word for path in {*python, Path(uv()).resolve(), *readable} for word in ("--read", str(path))]
    confine = [sys.executable, "-I", str(CONFINE), *reading, "--write", str(folder), "--"]
    run([*confine, *command], failure, cwd or folder, environment)


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


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lock(folder: Path) -> list[dict[str, Any]]:
    """The packages of a uv.lock."""
    return tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]


def export(folder: Path, *options: str) -> Pins:
    """What a uv.lock pins, by name: each requirement and its hashes. It is taken as it is; nothing is built.

    Raises AnsibleActionFail for what comes from no package index.
    """
    command = [uv(), "export", "--frozen", "--no-emit-project", "--no-annotate", "--no-header", *options]
    text = run(command, f"The requirements of {folder} cannot be read. uv said:", folder)
    found: Pins = {}
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
                f"{folder}/uv.lock holds `{specifier}`, which comes from no package index. A release "
                f"carries only what an index offers with a hash: publish it to your index, or move it into "
                f"the project."
            )
        # A package may be there once per version of Python.
        found[specifier] = requirement, [value.strip() for value in hashes]
    return found


def pinned_lines(pins: Pins, environment: Mapping[str, str] | None = None) -> list[str]:
    """Requirements of pip, one a line, of the pins whose markers hold in an environment; by default in this one."""
    given = {**environment, "extra": ""} if environment else None
    return [
        " ".join([f"{requirement.name}{requirement.specifier}", *(f"--hash={value}" for value in hashes)])
        for requirement, hashes in pins.values()
        if requirement.marker is None or requirement.marker.evaluate(given)
    ]


class Backends:
    """The wheels of what may build a project: what the bundle pins, and what the project's group `build` does."""

    def __init__(self, project: Path, cache: Path) -> None:
        settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
        self.project = project
        pins = export(BUNDLE, "--only-group", GROUP)
        if GROUP in settings.get("dependency-groups", {}):
            own = export(project, "--only-group", GROUP)
            names = {canonicalize_name(requirement.name) for requirement, _ in own.values()}
            pins = own | {
                line: pin for line, pin in pins.items() if canonicalize_name(pin[0].name) not in names
            }
        self.lines = sorted(pinned_lines(pins))
        name = hashlib.sha256("\n".join([*self.lines, sys.version]).encode()).hexdigest()[:16]
        self.folder = cache / f"backends-{name}"
        self.constraints = self.folder / "constraints.txt"
        self._fetch(cache)

    def _fetch(self, cache: Path) -> None:
        """Brings the wheels into the cache, and forgets those that nothing was built with for a month."""
        if self.constraints.exists():
            os.utime(self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            constraints = self.folder / ".constraints.txt"
            constraints.write_text("".join(f"{line}\n" for line in self.lines))
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
            command += ["--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
            command += ["--dest", str(self.folder), *registry_options(self.project), "-r", str(constraints)]
            run(command, f"What builds {self.project} cannot be fetched. pip said:")
            constraints.rename(self.constraints)
        for folder in cache.glob("backends-*"):
            if folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(folder)

    @property
    def options(self) -> list[str]:
        """Options of uv, for whatever makes it build. It has no cache, so these wheels are all that it finds."""
        return ["--find-links", str(self.folder), "--offline"]

    def build(self, source: Path, folder: Path, name: str) -> Path:
        """Builds the wheel of a project, a folder or an archive, and returns its path. Raises AnsibleActionFail.

        All happens in `folder`, which `source` lies in.
        """
        output = folder / "built"
        shutil.rmtree(output, ignore_errors=True)
        command = [uv(), "build", "--wheel", "--python", sys.executable, "--out-dir", str(output)]
        command += [
            *self.options,
            "--no-index",
            "--build-constraints",
            str(self.constraints),
            "--require-hashes",
        ]
        command += ["--no-create-gitignore", str(source)]
        try:
            run_confined(command, f"{name} cannot be built. uv said:", folder, [self.folder])
        except AnsibleActionFail as error:
            if not re.search(r"Failed to resolve requirements|No solution found|[Hh]ash", str(error)):
                raise
            raise AnsibleActionFail(
                f"{error}\nWhat builds a wheel is pinned and hashed, in the dependency group `{GROUP}` of "
                f"{BUNDLE}/pyproject.toml: {', '.join(line.split()[0] for line in self.lines)}. To build with "
                f"something else, or another version, pin it in the project's own lock file: run `uv add --group "
                f"{GROUP} NAME` in {self.project} for what its build-system.requires names, and commit uv.lock."
            ) from None
        (wheel,) = output.glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            raise AnsibleActionFail(
                f"{name} builds {wheel.name}, which holds compiled code for this controller. Only pure "
                f"Python projects can be built here: publish the compiled part to your index and depend on it."
            )
        return wheel


def registry_options(project: Path) -> list[str]:
    """Options of pip for the indexes that a uv.lock names, PyPI apart."""
    registries = {
        package["source"]["registry"]: None
        for package in read_lock(project)
        if "://" in package["source"].get("registry", "")
        and package["source"]["registry"].rstrip("/") != "https://pypi.org/simple"
    }
    return [word for url in registries for word in ("--extra-index-url", url)]


def source_only(project: Path, requirements: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of requirements, those for which a uv.lock knows no wheel: requirement → its `url` and `hash`."""
    packages = {
        f"{package['name']}=={package.get('version')}": package["sdist"]
        for package in read_lock(project)
        if not package.get("wheels") and "sdist" in package
    }
    return {line: packages[line.split()[0]] for line in requirements if line.split()[0] in packages}


def fetch_source(project: Path, sdist: Mapping[str, str], folder: Path) -> Path:
    """Downloads the source archive that a lock file names, checks its hash, and returns its path.

    pip and uv could only fetch it together with running its build backend. A login comes from the URL or ~/.netrc.
    """
    if "url" not in sdist:
        raise AnsibleActionFail(
            f"{project}/uv.lock names {sdist.get('path', 'a source archive')}, which has no URL. Publish it to your "
            f"index."
        )
    archive = folder / Path(sdist["url"].partition("#")[0]).name
    try:
        with open_url(sdist["url"]) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except OSError as error:
        raise AnsibleActionFail(f"{sdist['url']} cannot be fetched: {error}.") from None
    if f"sha256:{sha256(archive)}" != sdist["hash"]:
        raise AnsibleActionFail(f"{sdist['url']} is not what {project}/uv.lock expects: its hash differs.")
    return archive


def open_url(url: str) -> Any:
    """An answer to a request, through the user's proxies, with the login in the URL or in ~/.netrc if there is one."""
    parts = urlsplit(url)
    login = (unquote(parts.username or ""), unquote(parts.password or ""))
    if not parts.username:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
            login = (found[0], found[2]) if found else login
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    if login[0]:
        # Not for a host that the answer leads to.
        request.add_unredirected_header(
            "Authorization", "Basic " + b64encode(":".join(login).encode()).decode()
        )
    return urllib.request.urlopen(request, timeout=60)
