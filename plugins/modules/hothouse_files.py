#!/usr/bin/python
"""All files of a role in one module execution: the half that runs on the host."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import grp
import json
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: hothouse_files
short_description: Puts a list of files, directories and links in place in one execution
version_added: "0.1.0"
description:
  - Does for a whole list what M(ansible.builtin.template), M(ansible.builtin.copy) and
    M(ansible.builtin.file) do for one file each, in one module execution per host instead of one or two
    per file.
  - Templates are rendered on the controller, by the rules of M(ansible.builtin.template).
    What C(ansible_managed) and C(template_*) would hold is not defined, so that output never depends on
    the controller or the date.
  - Everything is checked before anything is changed. The validators of all changed files run on staged
    copies first; then the new files are written beside the old ones, and only when all of them are complete,
    renamed over them.
  - What a run that was killed left half-written beside the files of the list, or in its directories, is removed.
  - Each entry has its own O(files[].notify), and its handlers are notified only when that entry changed.
options:
  files:
    description:
      - The entries. Directories are made first, in list order, then files and links in list order,
        then O(files[].state=absent).
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Absolute path on the host, in its plain form. A path may be in the list only once.
        type: str
        required: true
      state:
        description:
          - V(file) is a regular file with the content of O(files[].template), O(files[].source) or
            O(files[].content). It replaces a symbolic link at that path, and never a directory.
          - V(directory) is a directory. Its parent must exist or be in the list too.
          - V(link) is a symbolic link to O(files[].target).
          - V(absent) removes a file or a link, and a directory with all that is in it.
            The other options of the entry may stay, and are not looked at.
        type: str
        choices: [file, directory, link, absent]
        default: file
      template:
        description:
          - Jinja2 template, looked up in the C(templates) folder of the role, then beside the playbook.
        type: str
      source:
        description:
          - File to copy as it is, looked up in the C(files) folder of the role, then beside the playbook.
          - A file or template encrypted with Ansible Vault is decrypted, and its entry is secret.
        type: str
      content:
        description: The content itself. A number is written as text; a list or a dictionary is refused.
        type: raw
      target:
        description:
          - What a O(files[].state=link) points at, absolute or relative to the link. It needn't exist.
        type: str
      owner:
        description: Name or number of the owning user. Not for links.
        type: str
        default: root
      group:
        description: Name or number of the owning group. Not for links.
        type: str
        default: root
      mode:
        description:
          - Permissions in octal digits, as a quoted string. V(0644) by default, V(0755) for a directory.
            Not for links.
        type: str
      secret:
        description:
          - Keeps the content out of diffs, results, logs and messages. Also hides what the validator says.
        type: bool
        default: false
      validate:
        description:
          - Command to run on the staged new file before anything is replaced.
            C(%s) is the path of the staged copy.
          - The copy has the final owner, mode and file name, and lies under a temporary directory at the same
            path as on the host, beside the other staged files.
          - Not run by a shell, in check mode, or for a file whose content has not changed.
          - A command that has not ended after 60 seconds has failed.
        type: str
      notify:
        description: Handlers to notify when this entry changed, by name or by what they listen to.
        type: list
        elements: str
  root:
    description:
      - Puts everything below this folder, as on a host whose C(/) it is, and makes the folders in between.
        The folder that holds it must exist.
      - All of it belongs to O(root_owner), and what is secret only its owner may read.
        What only means something on the host itself is left out, the validators and the notifications. Folders that
        are not in the list stay as they are.
      - Meant for C(module_defaults), so that a role's own tasks write the files of a container.
    type: path
  root_owner:
    description: Number of the owning user and group below O(root), as C(UID:GID). Needed with O(root).
    type: str
attributes:
  check_mode:
    support: full
    description:
      - Nothing is changed or validated. Users, groups and parent directories may be missing,
        as before a package is installed.
  diff_mode:
    support: full
    description:
      - Content, and owner, group and mode, of each changed entry. Secret content is shown as C([hidden]).
notes:
  - Needs pipelining (C(pipelining = true)) to keep file contents off the host's disk until they are in place.
  - A registered result holds no file content, except in its C(diff).
  - A change of owner, group or mode alone is made in place, without a new file.
author: Hothouse
"""

EXAMPLES = r"""
- name: Configure Redis
  hothouse_files:
    files:
      - path: /etc/redis/redis.conf
        template: redis.conf.j2
        group: redis
        mode: "0640"
        notify: Redis configuration changed
      - path: /etc/redis/users.acl
        template: users.acl.j2
        group: redis
        mode: "0640"
        secret: true
        notify: Redis users changed

- name: Configure the workers
  hothouse_files:
    files:
      - path: /etc/systemd/system/celery-.service.d
        state: directory
      - path: /etc/systemd/system/celery-.service.d/10-hardening.conf
        source: 10-hardening.conf
      - path: /etc/systemd/system/celery-worker@.service
        template: celery-worker@.service.j2
        validate: systemd-analyze verify %s
        notify: Worker unit changed
      - path: /etc/default/celeryd
        state: absent
"""

RETURN = r"""
files:
  description: Paths that changed, or would change in check mode, in list order.
  returned: success
  type: list
  elements: str
  sample: [/etc/redis/redis.conf]
"""

Entry = dict[str, Any]

# The keys of an entry. Values are checked by check_entries(), not by choices and types here, because
# ansible-lint validates tasks against this before their templates are rendered.
ENTRY_OPTIONS: dict[str, dict[str, Any]] = {
    "path": {"type": "str", "required": True},
    "state": {"type": "raw", "default": "file"},
    "template": {"type": "str"},
    "source": {"type": "str"},
    "content": {"type": "raw"},
    "target": {"type": "str"},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "mode": {"type": "raw"},
    "secret": {"type": "raw", "default": False},
    "validate": {"type": "str"},
    "notify": {"type": "list", "elements": "str"},
}
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "files": {"type": "list", "elements": "dict", "required": True, "options": ENTRY_OPTIONS},
    "root": {"type": "path"},
    "root_owner": {"type": "str"},
}
STATES = ("file", "directory", "link", "absent")
ORIGINS = ("template", "source", "content")
DIFF_LIMIT = 100_000  # bytes of a file that a diff still shows
VALIDATE_SECONDS = 60
HIDDEN = "[hidden]"
# What is not finished yet: a file beside the one that it becomes, and the folder of the validators.
TEMPORARY = re.compile(r"\.hothouse-[0-9a-f]{16}")
STAGE = ".hothouse-stage-"


class FilesError(Exception):
    """What is wrong with an entry, with its path, for the user to read."""


def check_entries(entries: Iterable[Entry]) -> None:
    """Refuse entries that make no sense, whatever is on the host; make `mode` text and `secret` bool.

    Raises FilesError. No content is part of its message.
    """
    by_path: dict[str, Entry] = {}
    for entry in entries:
        path = entry["path"]
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
            raise FilesError(f"{path!r}: path must be absolute, without '..', '//' or a '/' at its end")
        if path in by_path:
            raise FilesError(f"{path}: is in the list twice")
        by_path[path] = entry
        _check_entry(path, entry)
    for path, entry in by_path.items():
        for parent in map(str, PurePosixPath(path).parents):
            above = by_path.get(parent)
            if above and above["state"] != "directory" and entry["state"] != "absent":
                raise FilesError(f"{path}: lies under {parent}, which is to be {above['state']}")


def _check_entry(path: str, entry: Entry) -> None:
    state = entry["state"]
    if state not in STATES:
        raise FilesError(f"{path}: state must be one of {', '.join(STATES)}, not {state!r}")
    entry["secret"] = _to_bool(path, entry["secret"])
    mode = entry["mode"]
    if mode is None:
        entry["mode"] = "0755" if state == "directory" else "0644"
    elif not isinstance(mode, str) or not re.fullmatch(r"0?[0-7]{3}|[0-7]{4}", mode):
        raise FilesError(f'{path}: mode must be octal digits in quotes, such as "0640", not {mode!r}')
    if state == "absent":
        return
    given = [origin for origin in ORIGINS if entry[origin] is not None]
    if state == "file" and len(given) != 1:
        raise FilesError(f"{path}: needs one of {', '.join(ORIGINS)}; has {' and '.join(given) or 'none'}")
    if state != "file" and (wrong := given + [key for key in ("validate",) if entry[key] is not None]):
        raise FilesError(f"{path}: a {state} takes no {', '.join(wrong)}")
    if (state == "link") != bool(entry["target"]):
        raise FilesError(f"{path}: state 'link' and target belong together")
    content = entry["content"]
    if content is not None and (isinstance(content, bool) or not isinstance(content, (str, int, float))):
        raise FilesError(f"{path}: content must be text, not a {_kind(content)}; try to_nice_json")
    if entry["validate"] is not None and not any("%s" in word for word in _split(path, entry["validate"])):
        raise FilesError(f"{path}: validate must name the staged file as %s")


def _to_bool(path: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
        return value.lower() in ("true", "yes")
    if not isinstance(value, bool):
        raise FilesError(f"{path}: secret must be true or false")
    return value


def _kind(value: object) -> str:
    for kind in (bool, dict, list):
        if isinstance(value, kind):
            return kind.__name__
    return type(value).__name__


def _split(path: str, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise FilesError(f"{path}: validate: {error}: {command}") from None


def relocate(
    pairs: list[tuple[Entry, bytes | None]], root: str, owner: str
) -> list[tuple[Entry, bytes | None]]:
    """Entries and contents below the folder `root`, owned by `owner` (UID:GID), behind the folders they lack there."""
    if not re.fullmatch(r"\d+:\d+", owner):
        raise FilesError(f"root_owner must be two numbers, such as 1000:1000, not {owner!r}")
    user, _, group = owner.partition(":")
    moved = []
    for entry, content in pairs:
        mode = f"{int(entry['mode'], 8) & 0o700:04o}" if entry["secret"] else entry["mode"]
        here = {"path": root + entry["path"], "owner": user, "group": group, "mode": mode, "validate": None}
        moved.append(({**entry, **here}, content))
    listed = {entry["path"] for entry, _ in moved}
    made = [PurePosixPath(entry["path"]) for entry, _ in pairs if entry["state"] != "absent"]
    needed = {str(parent) for path in made for parent in path.parents}
    for path in {(root + parent).rstrip("/") for parent in needed} - listed:
        if not Path(path).is_dir():
            folder = {"path": path, "state": "directory", "owner": user, "group": group, "mode": "0755"}
            moved.append((dict.fromkeys(ENTRY_OPTIONS) | {"secret": False} | folder, None))
    # Directories are made in list order; sorted, each comes after its parent.
    return sorted(moved, key=lambda pair: (pair[0]["state"] != "directory", pair[0]["path"]))


def pack(contents: list[bytes | None]) -> str:
    """Make one opaque text of the contents: a single value to keep out of logs, found in no other text."""
    texts = [None if content is None else content.decode("latin-1") for content in contents]
    return base64.b64encode(zlib.compress(json.dumps(texts).encode())).decode()


def unpack(packed: str) -> list[bytes | None]:
    """Undo pack()."""
    texts = json.loads(zlib.decompress(base64.b64decode(packed)))
    return [None if text is None else text.encode("latin-1") for text in texts]


class Item:
    """One entry: what is wanted, what is there, and what differs."""

    def __init__(self, entry: Entry, content: bytes | None) -> None:
        self.path: str = entry["path"]
        self.at = Path(self.path)
        self.state: str = entry["state"]
        self.owner: str = entry["owner"]
        self.group: str = entry["group"]
        self.mode = int(entry["mode"], 8)
        self.secret: bool = entry["secret"]
        self.target: str | None = entry["target"]
        self.validate: str | None = entry["validate"]
        self.content = content
        self.uid = _find_id(self.owner, pwd.getpwnam)
        self.gid = _find_id(self.group, grp.getgrnam)
        self.old: os.stat_result | None = None
        self.old_state = "absent"
        self.old_content: bytes | None = None
        self.temp: Path | None = None  # the complete new file, waiting to be renamed
        self.look()

    def look(self) -> None:
        """Read what is at the path now."""
        try:
            self.old = self.at.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        mode = self.old.st_mode
        if stat.S_ISLNK(mode):
            self.old_state = "link"
            # /var/lib/redis may be a link to another disk: trusted if root made it, not the service's user.
            if self.state == "directory" and self.at.is_dir() and self.old.st_uid in (0, os.geteuid()):
                self.old = self.at.stat()
                self.old_state = "directory"
        elif stat.S_ISDIR(mode):
            self.old_state = "directory"
        else:
            self.old_state = "file" if stat.S_ISREG(mode) else "special file"
        if self.state == "file" and self.old_state == "file":
            self.old_content = self.at.read_bytes()

    @property
    def new_file(self) -> bool:
        """Whether the path gets a new file."""
        return self.state == "file" and (self.old_state != "file" or self.old_content != self.content)

    @property
    def new_attributes(self) -> bool:
        """Whether owner, group or mode of what is there differ. An unknown owner or group always does."""
        if self.state not in ("file", "directory") or self.old is None or self.old_state != self.state:
            return False
        old = (self.old.st_uid, self.old.st_gid, stat.S_IMODE(self.old.st_mode))
        return old != (self.uid, self.gid, self.mode)

    @property
    def changed(self) -> bool:
        """Whether there is anything to do."""
        if self.state != self.old_state:
            return True
        if self.state == "link":
            return str(self.at.readlink()) != self.target
        return self.new_file or self.new_attributes

    def conflict(self) -> str | None:
        """Say why what is there cannot become what is wanted."""
        allowed = {
            "file": ("absent", "file", "link"),
            "directory": ("absent", "directory"),
            "link": ("absent", "file", "link"),
            "absent": ("absent", "file", "link", "directory", "special file"),
        }
        if self.old_state in allowed[self.state]:
            return None
        return f"{self.path}: is a {self.old_state} on the host, not a {self.state}; move it away first"

    def diff(self) -> list[dict[str, Any]]:
        """Describe the change as Ansible's own file modules do: content, then attributes."""
        parts: list[dict[str, Any]] = []
        if self.new_file:
            part: dict[str, Any] = {"before_header": self.path, "after_header": self.path}
            for side, content in (("before", self.old_content), ("after", self.content)):
                part.update(self._diff_side(side, content))
            parts.append(part)
        before, after = self._attributes_before(), self._attributes_after()
        if before != after:
            headers = {f"{side}_header": f"{self.path} (attributes)" for side in ("before", "after")}
            parts.append({"before": before, "after": after, **headers})
        return parts

    def _diff_side(self, side: str, content: bytes | None) -> dict[str, Any]:
        if content is None:
            return {side: ""}
        if self.secret:
            return {side: f"{HIDDEN} {'old' if side == 'before' else 'new'} content\n"}
        end = "dst" if side == "before" else "src"
        if len(content) > DIFF_LIMIT:
            return {f"{end}_larger": DIFF_LIMIT}
        if b"\0" in content:
            return {f"{end}_binary": 1}
        return {side: content.decode("utf-8", "replace")}

    def _attributes_before(self) -> dict[str, str]:
        if self.old is None:
            return {"state": "absent"}
        if self.old_state == "link":
            return {"state": "link", "target": str(self.at.readlink())}
        if self.state == "absent":
            return {"state": self.old_state}
        return {
            "state": self.old_state,
            "owner": self.owner if self.old.st_uid == self.uid else _find_name(self.old.st_uid, pwd.getpwuid),
            "group": self.group if self.old.st_gid == self.gid else _find_name(self.old.st_gid, grp.getgrgid),
            "mode": f"{stat.S_IMODE(self.old.st_mode):04o}",
        }

    def _attributes_after(self) -> dict[str, str]:
        if self.state == "absent":
            return {"state": "absent"}
        if self.state == "link":
            return {"state": "link", "target": self.target or ""}
        return {"state": self.state, "owner": self.owner, "group": self.group, "mode": f"{self.mode:04o}"}

    def own(self, descriptor: int) -> None:
        """Set owner, group and mode, the mode last, because a change of owner clears bits of it."""
        assert self.uid is not None and self.gid is not None
        old = os.fstat(descriptor)
        try:
            if (old.st_uid, old.st_gid) != (self.uid, self.gid):
                os.fchown(descriptor, self.uid, self.gid)
            os.fchmod(descriptor, self.mode)
        except PermissionError:
            wanted = f"{self.owner}:{self.group} {self.mode:04o}"
            raise FilesError(
                f"{self.path}: not allowed to set {wanted}; does the task lack become?"
            ) from None

    def write(self, path: Path) -> None:
        """Make a new file of its final content, owner and mode, which nobody else can read until then."""
        assert self.content is not None
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(self.content)
            file.flush()
            self.own(file.fileno())
            os.fsync(file.fileno())


def _find_id(name: str, lookup: Any) -> int | None:
    if name.isdecimal():
        return int(name)
    try:
        return lookup(name)[2]
    except KeyError:
        return None


def _find_name(number: int, lookup: Any) -> str:
    try:
        return lookup(number)[0]
    except KeyError:
        return str(number)


def check_host(items: list[Item]) -> None:
    """Refuse what cannot be done on this host, before anything is done. Raises FilesError."""
    directories = {item.path for item in items if item.state == "directory"}
    for item in items:
        if item.state == "absent" or not item.changed:
            continue
        if item.state != "link":
            for kind, name, number in (("user", item.owner, item.uid), ("group", item.group, item.gid)):
                if number is None:
                    raise FilesError(f"{item.path}: there is no {kind} {name!r} on the host")
        parent = str(item.at.parent)
        if parent not in directories and not Path(parent).is_dir():
            raise FilesError(
                f"{item.path}: its directory {parent} does not exist; install the package that brings it, "
                f"or add {{path: {parent}, state: directory}} to the list"
            )


def validate(items: list[Item]) -> None:
    """Run the validators on staged copies. Raises FilesError with path, command and what it said."""
    validated = [item for item in items if item.new_file and item.validate]
    if not validated:
        return
    with _stage() as stage:
        for item in items:
            if item.new_file and (item.validate or not item.secret):
                staged = Path(stage + item.path)
                staged.parent.mkdir(parents=True, exist_ok=True)
                item.write(staged)
        for item in validated:
            _run_validator(item, stage)


def _stages() -> str:
    """Where the folder of the validators is made. /run is memory: what is staged there never gets to a disk."""
    return "/run" if os.access("/run", os.W_OK) else tempfile.gettempdir()


@contextlib.contextmanager
def _stage() -> Iterator[str]:
    """A folder for the validators. Its lock ends with this process, however that ends."""
    with tempfile.TemporaryDirectory(prefix=STAGE, dir=_stages()) as stage:
        descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield stage
        finally:
            os.close(descriptor)


def forget_stages() -> None:
    """Remove the folders of the validators of runs that were killed. There may be secrets in them."""
    for path in Path(_stages()).glob(f"{STAGE}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # of somebody else, or gone
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # a run is at work
        finally:
            os.close(descriptor)


def left_behind(items: Iterable[Item]) -> list[Path]:
    """Files that a killed run left beside those of the list, or in its directories. There may be secrets in them."""
    folders = {item.at.parent for item in items} | {item.at for item in items if item.state == "directory"}
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if TEMPORARY.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                    found.append(folder / entry.name)
    return found


def _run_validator(item: Item, stage: str) -> None:
    assert item.validate is not None
    argv = [word.replace("%s", stage + item.path) for word in shlex.split(item.validate)]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VALIDATE_SECONDS,
            check=False,
        )
    except OSError as error:
        raise FilesError(
            f"{item.path}: cannot run the validator: {error.strerror}: {item.validate}"
        ) from None
    except subprocess.TimeoutExpired:
        raise FilesError(
            f"{item.path}: the validator did not end within {VALIDATE_SECONDS} seconds: {item.validate}"
        ) from None
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").replace(stage, "").strip() or "(it said nothing)"
        if item.secret:
            said = f"{HIDDEN} what it said, because the file is secret"
        raise FilesError(
            f"{item.path}: the new content is not valid, nothing was changed. "
            f"{item.validate!r} exited with {done.returncode}:\n{said}"
        )


def apply(items: list[Item]) -> None:
    """Make the changes: directories, complete new files beside the old ones, then renames and removals."""
    items = [item for item in items if item.changed]
    for item in items:
        if item.state == "directory":
            if item.old_state == "absent":
                item.at.mkdir(0o700)
            _own_in_place(item, os.O_DIRECTORY)
    try:
        for item in items:
            if item.new_file or item.state == "link":
                # A dot in front and no suffix, so that no glob such as conf.d/*.conf picks it up.
                item.temp = item.at.with_name(f".hothouse-{os.urandom(8).hex()}")
                _make(item, item.temp)
        for item in items:
            if item.temp:
                item.temp.rename(item.at)
                item.temp = None
            elif item.state == "file":
                _own_in_place(item, os.O_NOFOLLOW)
    finally:
        for item in items:
            if item.temp:
                item.temp.unlink(missing_ok=True)
    for item in items:
        if item.state == "absent":
            _remove(item)
    for directory in {item.at.parent for item in items}:
        _sync(directory)


def _own_in_place(item: Item, flags: int) -> None:
    descriptor = os.open(item.at, os.O_RDONLY | os.O_NONBLOCK | flags)
    try:
        item.own(descriptor)
    finally:
        os.close(descriptor)


def _make(item: Item, path: Path) -> None:
    if item.state == "link":
        assert item.target is not None
        path.symlink_to(item.target)
    else:
        item.write(path)


def _remove(item: Item) -> None:
    if item.old_state == "directory":
        shutil.rmtree(item.at)
    else:
        item.at.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Make renames and removals outlast a power failure."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def run(params: Mapping[str, Any], check: bool, diff: bool) -> dict[str, Any]:
    """Bring the host to what `params` say and return the result. Raises FilesError, OSError."""
    pairs = list(zip(params["files"], unpack(params["contents"]), strict=True))
    if params.get("root"):
        pairs = relocate(pairs, params["root"].rstrip("/"), params["root_owner"] or "")
    items = [Item(entry, content) for entry, content in pairs]
    for item in items:
        if problem := item.conflict():
            raise FilesError(problem)
    changed = [item for item in items if item.changed]
    left = left_behind(items)
    paths = [item.path for item in changed] + [str(path) for path in left]
    result: dict[str, Any] = {"changed": bool(paths), "files": paths}
    if diff:
        result["diff"] = [part for item in changed for part in item.diff()]
        for path in left:
            header = f"{path} (left by a run that was killed)"
            states = {"before": {"state": "file"}, "after": {"state": "absent"}}
            result["diff"].append({"before_header": header, "after_header": header, **states})
    if not check:
        forget_stages()
        for path in left:
            path.unlink(missing_ok=True)
        check_host(items)
        validate(items)
        apply(items)
    return result


def main() -> None:
    """Run as an Ansible module. The action plugin has checked the arguments and adds `contents`."""
    spec = {**ARGUMENT_SPEC, "contents": {"type": "str", "no_log": True}}
    module = AnsibleModule(spec, supports_check_mode=True)
    # At -vvv Ansible shows the invocation: which paths, and nothing of what is in them.
    shown = {"module_args": {"files": [entry["path"] for entry in module.params["files"]]}}
    if module.params["contents"] is None:
        message = "hothouse_files needs its action plugin; set action_plugins in ansible.cfg"
        module.fail_json(msg=message, invocation=shown)
    try:
        result = run(module.params, module.check_mode, module._diff)
    except FilesError as error:
        module.fail_json(msg=str(error), invocation=shown)
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}", invocation=shown)
    module.exit_json(**result, invocation=shown)


if __name__ == "__main__":
    main()
