"""hothouse_files: what gets onto the host, what is refused, who is notified, and what is never shown."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.vault import VaultLib, VaultSecret
from conftest import BUNDLE, Play, load_plugin

files = load_plugin("modules/hothouse_files")
ME = {"owner": str(os.geteuid()), "group": str(os.getegid())}
Runner = Callable[..., Play]
Entry = dict[str, Any]


def entry(path: Path | str, content: str | None = None, **options: Any) -> Entry:
    """An entry as a task states it, with an owner that the tests' user may set."""
    given = {} if content is None else {"content": content}
    return {"path": str(path), **ME, **given, **options}


def filled(path: Path | str, content: str | None = None, **options: Any) -> Entry:
    """An entry with Ansible's defaults for what is not given."""
    return {
        key: entry(path, content, **options).get(key, option.get("default"))
        for key, option in files.ENTRY_OPTIONS.items()
    }


def put(*entries: Entry, check: bool = False, diff: bool = True) -> dict[str, Any]:
    """Run the host's half on this machine."""
    files.check_entries(entries)
    contents = [None if one["content"] is None else one["content"].encode() for one in entries]
    return files.run({"files": entries, "contents": files.pack(contents)}, check, diff)


def mode(path: Path) -> int:
    """Permissions of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


def text(result: dict[str, Any]) -> str:
    """All that a result shows."""
    return json.dumps(result)


def by_task(play: Play) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Name and results by host of each task and handler of a run."""
    document = json.loads(play.output)
    return [(task["task"]["name"], task["hosts"]) for one in document["plays"] for task in one["tasks"]]


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """An empty role beside the playbook that `play` runs."""
    folder = tmp_path / "ansible" / "roles" / "thing"
    for name in ("tasks", "templates", "files", "handlers"):
        (folder / name).mkdir(parents=True)
    return folder


def write_role(role: Path, tasks: list[dict[str, Any]], handlers: list[dict[str, Any]] | None = None) -> None:
    """Give the role its tasks and handlers (YAML is a superset of JSON)."""
    (role / "tasks" / "main.yml").write_text(json.dumps(tasks))
    (role / "handlers" / "main.yml").write_text(json.dumps(handlers or []))


USE_ROLE = {"ansible.builtin.import_role": {"name": "thing"}}


# What the host's half does


def test_files_directories_and_links_get_content_owner_and_mode(tmp_path: Path) -> None:
    top = tmp_path / "etc"
    wanted = [
        filled(top, state="directory", mode="0750"),
        filled(top / "a.conf", "a\n"),
        filled(top / "key", "k", mode="0600", secret=True),
        filled(top / "current", state="link", target="a.conf"),
    ]
    result = put(*wanted)
    assert result["changed"]
    assert result["files"] == [str(top), *(str(top / name) for name in ("a.conf", "key", "current"))]
    assert [mode(path) for path in (top, top / "a.conf", top / "key")] == [0o750, 0o644, 0o600]
    assert (top / "current").read_text() == "a\n"
    assert (top / "current").readlink() == Path("a.conf")

    assert put(*wanted) == {"changed": False, "files": [], "diff": []}


def test_a_directory_is_made_before_the_files_in_it_wherever_it_is_listed(tmp_path: Path) -> None:
    put(
        filled(tmp_path / "a" / "b" / "file", "x"),
        filled(tmp_path / "a", state="directory"),
        filled(tmp_path / "a" / "b", state="directory"),
    )
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_absent_removes_files_links_and_whole_directories(tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").touch()
    (tmp_path / "kept").touch()
    (tmp_path / "link").symlink_to("kept")
    gone = [
        filled(tmp_path / name, state="absent", content="not looked at") for name in ("tree", "link", "no")
    ]
    result = put(*gone)
    assert result["files"] == [str(tmp_path / "tree"), str(tmp_path / "link")]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not put(*gone)["changed"]


def test_a_new_file_replaces_the_old_one_and_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "a"
    put(filled(path, "old"))
    with path.open() as reader:
        put(filled(path, "new"))
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert [left.name for left in tmp_path.iterdir()] == ["a"]


def test_a_new_mode_alone_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    put(filled(path, "x"))
    before = path.stat().st_ino
    result = put(filled(path, "x", mode="0600"))
    assert result["files"] == [str(path)]
    assert (path.stat().st_ino, mode(path)) == (before, 0o600)
    (part,) = result["diff"]
    assert (part["before"]["mode"], part["after"]["mode"]) == ("0644", "0600")


def test_a_file_replaces_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "a").symlink_to("target")
    put(filled(tmp_path / "a", "ours"))
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "target").read_text() == "theirs"


def test_a_link_replaces_a_file_and_another_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    put(filled(tmp_path / "a", state="link", target="nowhere"))
    put(filled(tmp_path / "a", state="link", target="elsewhere"))
    assert (tmp_path / "a").readlink() == Path("elsewhere")


def test_a_directory_may_be_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    put(filled(tmp_path / "data", state="directory", mode="0700"))
    assert (tmp_path / "data").is_symlink()
    assert mode(tmp_path / "disk") == 0o700


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (Path.mkdir, {"content": "x"}),
        (Path.mkdir, {"state": "link", "target": "x"}),
        (Path.touch, {"state": "directory"}),
    ],
)
def test_what_is_of_another_kind_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], None], wanted: Entry
) -> None:
    make(tmp_path / "a")
    with pytest.raises(files.FilesError, match=rf"{tmp_path}/a: is a (file|directory) on the host"):
        put(filled(tmp_path / "first", "x"), filled(tmp_path / "a", **wanted))
    assert not (tmp_path / "first").exists()


def test_check_mode_changes_nothing_validates_nothing_and_needs_neither_users_nor_directories(
    tmp_path: Path,
) -> None:
    (tmp_path / "old").write_text("old")
    result = put(
        filled(
            tmp_path / "package" / "a", "x", owner="no-such-user", group="no-such-group", validate="false %s"
        ),
        filled(tmp_path / "old", "old", owner="no-such-user", mode="0600"),
        filled(tmp_path / "new", "x"),
        filled(tmp_path / "dir", state="directory", group="no-such-group"),
        check=True,
    )
    assert result["files"] == [str(tmp_path / name) for name in ("package/a", "old", "new", "dir")]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert mode(tmp_path / "old") == 0o644


@pytest.mark.parametrize("kind", ["user", "group"])
def test_an_unknown_user_or_group_is_named_before_anything_changes(tmp_path: Path, kind: str) -> None:
    wrong = {"owner" if kind == "user" else "group": "no-such-name"}
    with pytest.raises(files.FilesError, match=rf"{tmp_path}/b: there is no {kind} 'no-such-name'"):
        put(filled(tmp_path / "a", "x"), filled(tmp_path / "b", "x", **wrong))
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_named_before_anything_changes(tmp_path: Path) -> None:
    with pytest.raises(
        files.FilesError, match=rf"{tmp_path}/no/b: its directory {tmp_path}/no does not exist"
    ):
        put(filled(tmp_path / "a", "x"), filled(tmp_path / "no" / "b", "x"))
    assert not list(tmp_path.iterdir())


def test_when_one_file_cannot_be_written_none_is_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError):
        put(filled(tmp_path / "a", "new"), filled("/proc/hothouse", "x"))
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_refused_owner_is_named_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(files.FilesError, match=f"{tmp_path}/a: not allowed to set 12345:.* 0644; .* become"):
        put(filled(tmp_path / "a", "x", owner="12345"))
    assert not list(tmp_path.iterdir())


# Validators


def test_a_validator_sees_the_staged_file_with_its_name_and_mode_and_its_siblings(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    look = f"sh -c 'cd \"$(dirname %s)\" && ls -l > {seen} && cat a.conf b.conf >> {seen}'"
    put(
        filled(tmp_path / "a.conf", "one\n", mode="0640", validate=look), filled(tmp_path / "b.conf", "two\n")
    )
    listing = seen.read_text()
    assert "-rw-r----- " in listing
    assert listing.endswith("one\ntwo\n")


def test_secret_files_are_not_staged_for_the_validators_of_others(tmp_path: Path) -> None:
    find = f"sh -c 'find \"$(dirname %s)\" -type f > {tmp_path}/seen'"
    put(filled(tmp_path / "a", "x", validate=find), filled(tmp_path / "key", "k", secret=True))
    assert [Path(line).name for line in (tmp_path / "seen").read_text().splitlines()] == ["a"]


def test_files_of_the_same_name_are_staged_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    put(
        *(
            filled(tmp_path / name / "unit.conf", name, validate=f"grep -qx {name} %s")
            for name in ("one", "two")
        )
    )
    assert (tmp_path / "two" / "unit.conf").read_text() == "two"


def test_one_failed_validation_leaves_every_file_as_it_was(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    with pytest.raises(files.FilesError) as caught:
        put(
            filled(tmp_path / "new", state="directory"),
            filled(tmp_path / "a", "new", validate="grep -q new %s"),
            filled(tmp_path / "b", "new", validate="sh -c 'echo bad line in %s >&2; exit 3'"),
        )
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/b: the new content is not valid, nothing was changed.")
    assert "exit 3'\" exited with 3" in message
    assert message.endswith(f"bad line in {tmp_path}/b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_what_a_validator_says_about_a_secret_file_is_hidden(tmp_path: Path) -> None:
    with pytest.raises(files.FilesError) as caught:
        put(filled(tmp_path / "key", "hunter2", secret=True, validate="sh -c 'cat %s; exit 1'"))
    assert "hunter2" not in str(caught.value)
    assert "[hidden]" in str(caught.value)


def test_unchanged_files_are_not_validated(tmp_path: Path) -> None:
    put(filled(tmp_path / "a", "x"))
    assert put(filled(tmp_path / "a", "x", mode="0600", validate="false %s"))["changed"]


def test_a_validator_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(files.FilesError, match=r"cannot run the validator: No such file.*no-such-command %s"):
        put(filled(tmp_path / "a", "x", validate="no-such-command %s"))


def test_a_validator_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "VALIDATE_SECONDS", 0.1)
    with pytest.raises(files.FilesError, match=r"did not end within 0\.1 seconds"):
        put(filled(tmp_path / "a", "x", validate="sh -c 'sleep 60; : %s'"))


# Diffs


def test_the_diff_shows_text_and_attributes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    text_part, attributes = put(filled(path, "one\n"))["diff"]
    assert text_part == {
        "before": "",
        "after": "one\n",
        "before_header": str(path),
        "after_header": str(path),
    }
    assert attributes["before"] == {"state": "absent"}
    assert attributes["after"] == {"state": "file", "mode": "0644", **ME}
    (text_part,) = put(filled(path, "two\n"))["diff"]
    assert (text_part["before"], text_part["after"]) == ("one\n", "two\n")
    assert "diff" not in put(filled(path, "three\n"), diff=False)


def test_the_diff_of_a_secret_file_holds_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    put(filled(path, "old-secret"))
    result = put(filled(path, "new-secret", secret=True, mode="0600"))
    assert "-secret" not in text(result)
    assert "[hidden]" in result["diff"][0]["before"]
    assert "[hidden]" in result["diff"][0]["after"]
    assert result["diff"][1]["after"]["mode"] == "0600"


def test_the_diff_leaves_out_binary_and_large_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\0binary")
    (part,) = put(filled(path, "x" * (files.DIFF_LIMIT + 1)))["diff"]
    assert part["dst_binary"]
    assert part["src_larger"] == files.DIFF_LIMIT


def test_the_diff_names_the_owner_that_a_file_has_and_gets(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    (part,) = put(filled(path, "x", owner="no-such-user"), check=True)["diff"]
    assert part["before"]["owner"] == path.owner()
    assert part["after"]["owner"] == "no-such-user"


# What is refused


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"path": "etc/a", "content": "x"}], "'etc/a': path must be absolute"),
        ([{"path": "/etc/../a", "content": "x"}], "'/etc/../a': path must be absolute, without '..'"),
        ([{"path": "/etc/a/", "content": "x"}], "'/etc/a/': path must be absolute"),
        ([{"path": "/", "state": "absent"}], "'/': path must be absolute"),
        ([{"path": "/a", "content": "x"}, {"path": "/a", "state": "absent"}], "/a: is in the list twice"),
        ([{"path": "/a"}], "/a: needs one of template, source, content; has none"),
        ([{"path": "/a", "content": "x", "source": "x"}], "/a: needs one of .* has source and content"),
        ([{"path": "/a", "state": "directory", "content": "x"}], "/a: a directory takes no content"),
        ([{"path": "/a", "state": "directory", "validate": "x"}], "/a: a directory takes no validate"),
        ([{"path": "/a", "state": "link"}], "/a: state 'link' and target belong together"),
        ([{"path": "/a", "content": "x", "target": "b"}], "/a: state 'link' and target belong together"),
        ([{"path": "/a", "state": "present"}], "/a: state must be one of file, .* not 'present'"),
        ([{"path": "/a", "content": "x", "mode": 0o640}], '/a: mode must be octal digits in quotes.*"0640"'),
        ([{"path": "/a", "content": "x", "mode": "u=rw"}], "/a: mode must be octal digits"),
        ([{"path": "/a", "content": "x", "secret": "maybe"}], "/a: secret must be true or false"),
        ([{"path": "/a", "content": {"b": 1}}], "/a: content must be text, not a dict"),
        ([{"path": "/a", "content": True}], "/a: content must be text, not a bool"),
        (
            [{"path": "/a", "content": "x", "validate": "nginx -t"}],
            "/a: validate must name the staged file as %s",
        ),
        ([{"path": "/a", "content": "x", "validate": "echo '%s"}], "/a: validate: No closing quotation"),
        ([{"path": "/a", "content": "x"}, {"path": "/a/b", "content": "x"}], "/a/b: lies under /a, .* file"),
        (
            [{"path": "/a", "state": "absent"}, {"path": "/a/b/c", "content": ""}],
            "/a/b/c: lies under /a, .* absent",
        ),
    ],
)
def test_nonsense_is_refused_with_the_path_in_the_message(entries: list[Entry], message: str) -> None:
    with pytest.raises(files.FilesError, match=message):
        files.check_entries([filled(**one) for one in entries])


def test_misspelled_and_missing_keys_and_files_end_in_one_clear_message(play: Runner, tmp_path: Path) -> None:
    cases = [
        ([entry(tmp_path / "a", temlate="x")], "files.temlate. Supported parameters include: content, group"),
        ([{"content": "x"}], "missing required arguments: path found in files"),
        ([entry(tmp_path / "a", template="no.j2")], f"{tmp_path}/a: Could not find or access 'no.j2'"),
        ([entry(tmp_path / "a", source="no")], f"{tmp_path}/a: Could not find or access 'no'"),
        ([entry(tmp_path / "a", "x", mode=640)], "mode must be octal digits in quotes"),
        ([entry(tmp_path / "a", "x", owner="no-such-user")], "there is no user 'no-such-user' on the host"),
        ([entry("/proc/hothouse", "x")], "No such file or directory"),
    ]
    run = play([{"hothouse_files": {"files": wanted}, "ignore_errors": True} for wanted, _ in cases])
    assert run.code == 0
    for result, (_, message) in zip(run.results, cases, strict=True):
        assert result["failed"]
        assert message in result["msg"]
        assert not result["changed"]


# Through ansible-playbook


def test_templates_are_rendered_as_ansibles_own_template_module_does(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    (role / "templates" / "part.j2").write_text("part {{ name }}\n")
    (role / "templates" / "a.j2").write_text(
        "# thing: a.j2 {{ undefined_thing | default('none') }}\n"
        "{% for number in numbers %}\n"
        "  {{ number }}\\n\n"
        "{% endfor %}\n"
        "{% include 'part.j2' %}\n"
        "{{ lookup('ansible.builtin.pipe', 'echo looked up') }} ä {{ hostvars['host0'].number }}\n"
        "{{ {'b': [1, 2]} | to_nice_yaml }}\n\n"
    )
    (role / "templates" / "native.j2").write_text("{{ numbers }}")
    (tmp_path / "ansible" / "templates").mkdir()
    (tmp_path / "ansible" / "templates" / "beside.j2").write_text("beside the playbook")
    (role / "files" / "blob").write_bytes(bytes(range(256)))
    names = ["a.j2", "native.j2", "beside.j2"]
    write_role(
        role,
        [
            {
                "hothouse_files": {
                    "files": [
                        *(entry(tmp_path / f"ours-{name}", template=name) for name in names),
                        entry(tmp_path / "blob", source="blob"),
                        entry(tmp_path / "number", content="{{ 6379 }}"),
                        entry(tmp_path / "off", template="a.j2", state="{{ 'absent' }}"),
                    ]
                },
                "vars": {"name": "of the task", "numbers": [1, 2]},
            },
            {
                "ansible.builtin.template": {
                    "src": "{{ item }}",
                    "dest": f"{tmp_path}/theirs-{{{{ item }}}}",
                },
                "loop": names,
                "vars": {"name": "of the task", "numbers": [1, 2]},
            },
        ],
    )
    assert play([USE_ROLE]).code == 0
    for name in names:
        assert (tmp_path / f"ours-{name}").read_bytes() == (tmp_path / f"theirs-{name}").read_bytes()
    assert "part of the task" in (tmp_path / "ours-a.j2").read_text()
    assert (tmp_path / "blob").read_bytes() == bytes(range(256))
    assert (tmp_path / "number").read_text() == "6379"


def test_only_the_handlers_of_changed_files_run_and_only_on_the_hosts_where_they_changed(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    top = tmp_path / "{{ inventory_hostname }}"
    wanted = [
        entry(top, state="directory"),
        entry(top / "a", "a", notify="A changed"),
        entry(top / "b", "b {{ b[number] if b is defined else '' }}", notify=["B changed", "Reload by name"]),
        entry(top / "quiet", "quiet"),
    ]
    handlers = [
        {"name": "Restart after A", "listen": "A changed", "ansible.builtin.debug": {}},
        {"name": "Restart after B", "listen": ["B changed", "Something else"], "ansible.builtin.debug": {}},
        {"name": "Reload by name", "ansible.builtin.debug": {}},
        {"name": "Of the task", "ansible.builtin.debug": {}},
    ]
    write_role(role, [{"hothouse_files": {"files": wanted}, "notify": "Of the task"}], handlers)

    def ran(*arguments: str) -> dict[str, set[str]]:
        run = play([USE_ROLE], *arguments, hosts=2)
        assert run.code == 0
        (_, results), *handled = by_task(run)
        assert {host: result["changed"] for host, result in results.items()} == {
            host: any(host in hosts for _, hosts in handled) for host in ("host0", "host1")
        }
        return {name.removeprefix("thing : "): set(hosts) for name, hosts in handled}

    both = {"host0", "host1"}
    everything = dict.fromkeys(["Restart after A", "Restart after B", "Reload by name", "Of the task"], both)
    assert ran("--check") == everything
    assert not (tmp_path / "host0").exists()
    assert ran() == everything
    assert ran() == {}
    assert ran("-e", '{"b": ["", "new"]}') == {
        "Restart after B": {"host1"},
        "Reload by name": {"host1"},
        "Of the task": {"host1"},
    }


def test_notifications_of_one_iteration_do_not_reach_the_next(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    (tmp_path / "same").write_text("same")
    wanted = [entry(f"{tmp_path}/{{{{ item }}}}", "same", notify="{{ item }} changed")]
    task = {"hothouse_files": {"files": wanted}, "loop": ["new", "same"]}
    handlers = [{"name": f"{name} changed", "ansible.builtin.debug": {}} for name in ("new", "same")]
    write_role(role, [task], handlers)
    run = play([USE_ROLE])
    assert [name for name, _ in by_task(run)[1:]] == ["thing : new changed"]


def test_secrets_are_nowhere_in_the_output_or_left_on_the_host(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    (role / "templates" / "users.j2").write_text("user {{ password }}\n")
    (role / "templates" / "broken.j2").write_text("{{ password | from_json }} {{ password | int('') + 1 }}\n")
    (role / "templates" / "undefined.j2").write_text("{{ password }} {{ missing_thing }}\n")
    hidden = {"secret": True, "mode": "0600"}
    secret_tasks = [
        [entry(tmp_path / "users", template="users.j2", validate="grep -q user %s", **hidden)],
        [entry(tmp_path / "key", "{{ password }}2", **hidden)],
        [entry(tmp_path / "never", "{{ password }}", validate="sh -c 'cat %s; exit 1'", **hidden)],
        [entry(tmp_path / "never", template="broken.j2", **hidden)],
        [entry(tmp_path / "never", template="undefined.j2", **hidden)],
        [entry(tmp_path / "key", "{{ password }}", owner="no-such-user", **hidden)],
    ]
    tasks = [{"hothouse_files": {"files": wanted}, "ignore_errors": True} for wanted in secret_tasks]
    write_role(role, [*tasks, {"hothouse_files": {"files": [entry(tmp_path / "open", "seen text")]}}])
    (tmp_path / "vars.json").write_text(json.dumps({"password": "correct-horse-battery"}))
    (tmp_path / "key").write_text("old-horse-battery")
    remote = tmp_path / "remote"
    run = play(
        [USE_ROLE],
        "-vvv",
        "--diff",
        "-e",
        f"@{tmp_path}/vars.json",
        text=True,
        ANSIBLE_REMOTE_TMP=str(remote),
    )
    assert run.code == 0
    assert (tmp_path / "users").read_text() == "user correct-horse-battery\n"
    assert (tmp_path / "key").read_text() == "correct-horse-battery2"
    assert "horse" not in run.output
    assert "+[hidden] new content" in run.output
    assert "+seen text" in run.output
    assert f"{tmp_path}/never: template 'undefined.j2': 'missing_thing' is undefined" in run.output
    assert f"{tmp_path}/never: template 'broken.j2': JSONDecodeError, of which no more is shown" in run.output
    assert not list(tmp_path.rglob("*horse*"))
    assert not remote.exists() or not list(remote.rglob("*"))


def test_an_error_in_a_template_names_file_template_and_what_is_wrong(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    (role / "templates" / "undefined.j2").write_text("x\n{{ redis.port }}\n")
    (role / "templates" / "syntax.j2").write_text("x\n{% if %}\n")
    names = ("undefined.j2", "syntax.j2")
    write_role(
        role,
        [
            {"hothouse_files": {"files": [entry(tmp_path / "a", template=name)]}, "ignore_errors": True}
            for name in names
        ],
    )
    undefined, syntax = play([USE_ROLE]).results
    assert undefined["msg"] == f"{tmp_path}/a: template 'undefined.j2': 'redis' is undefined"
    assert syntax["msg"].startswith(f"{tmp_path}/a: template 'syntax.j2', line 2: Syntax error in template")


def test_what_is_encrypted_with_vault_is_decrypted_and_secret(
    play: Runner, role: Path, tmp_path: Path
) -> None:
    vault = VaultLib([("default", VaultSecret(b"orchid"))])
    (role / "files" / "key").write_bytes(vault.encrypt("correct-horse"))
    (role / "templates" / "key.j2").write_bytes(vault.encrypt("correct-horse {{ 1 + 1 }}"))
    (tmp_path / "password").write_text("orchid")
    wanted = [entry(tmp_path / "key", source="key"), entry(tmp_path / "rendered", template="key.j2")]
    write_role(role, [{"hothouse_files": {"files": wanted}}])
    run = play([USE_ROLE], "--diff", "-vvv", "--vault-password-file", str(tmp_path / "password"), text=True)
    assert (tmp_path / "key").read_text() == "correct-horse"
    assert (tmp_path / "rendered").read_text() == "correct-horse 2"
    assert run.output.count("+[hidden] new content") == 2
    assert "horse" not in run.output


def test_both_modules_are_documented_as_they_are_specified(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("ansible-doc"), "--json", "-t", "module"]
    documented = subprocess.run(
        [*command, "-M", BUNDLE / "plugins" / "modules", "hothouse_files", "hothouse_units"],
        stdout=subprocess.PIPE,
        check=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
    )
    units = load_plugin("modules/hothouse_units")
    for name, specified in (("files", files.ENTRY_OPTIONS), ("units", units.UNIT_OPTIONS)):
        module = json.loads(documented.stdout)[f"hothouse_{name}"]
        assert module["examples"] and module["return"]
        options = module["doc"]["options"][name]["suboptions"]
        assert set(options) == set(specified)
        for key, option in specified.items():
            assert options[key].get("default") == option.get("default"), key
            assert options[key].get("required", False) == option.get("required", False), key


# What a run leaves that is killed


def killed(work: Callable[[], None], moment: int) -> bool:
    """Do something in a process of its own that is killed at its n-th step into the operating system.

    Returns whether it came so far. Python announces each step before it takes it.
    """
    child = os.fork()
    if not child:
        count = itertools.count(1)

        def announce(event: str, _: object) -> None:
            if (
                event.startswith(("open", "os.", "shutil.", "tempfile.", "subprocess."))
                and next(count) == moment
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(announce)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


SECRET = "orchid-9361"


def holding(folder: Path) -> list[str]:
    """The names of the files below a folder that hold the secret."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and SECRET in path.read_text(errors="replace")
    )


def test_what_a_killed_run_left_of_a_secret_is_removed_by_the_next_wherever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next run has nothing to change."""
    stages, folder = tmp_path / "run", tmp_path / "etc"
    monkeypatch.setattr(files, "_stages", lambda: str(stages))
    stages.mkdir()
    left = set()
    for moment in itertools.count(1):
        folder.mkdir()
        old = [filled(folder / name, "old", secret=True, mode="0600") for name in ("a", "b")]
        put(*old)
        new = [
            filled(folder / name, SECRET, secret=True, mode="0600", validate="test -s %s")
            for name in ("a", "b")
        ]
        died = killed(lambda new=new: put(*new), moment)  # type: ignore[misc]
        found = holding(tmp_path)
        left |= {name.partition("hothouse-")[0] for name in found if "hothouse-" in name}
        again = put(filled(folder, state="directory"), *old)
        assert holding(tmp_path) == [], (moment, found)
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
        assert list(stages.iterdir()) == []
        assert again["changed"] or not any(name.startswith("etc/") for name in found)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        if not died:
            break
    assert left == {"etc/.", "run/."}
    assert moment > 20


def test_what_a_killed_run_left_is_named_and_stays_in_check_mode(tmp_path: Path) -> None:
    remains = tmp_path / ".hothouse-0123456789abcdef"
    remains.write_text(SECRET)
    wanted = filled(tmp_path / "a", "old")
    put_first = put(wanted, check=True)
    assert put_first["changed"] and remains.exists() and SECRET not in text(put_first)
    assert str(remains) in put(wanted)["files"]
    assert not remains.exists()
    assert not put(wanted)["changed"]


def test_what_only_looks_like_it_stays(tmp_path: Path) -> None:
    names = [".hothouse-notes", ".hothouse-0123456789abcdef.txt", "x.hothouse-0123456789abcdef"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / ".hothouse-fedcba9876543210").mkdir()
    assert not put(filled(tmp_path, state="directory", mode=f"{mode(tmp_path):04o}"))["changed"]
    assert len(list(tmp_path.iterdir())) == 4


def test_the_folder_of_a_validator_at_work_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_stages", lambda: str(tmp_path))
    with files._stage() as stage:
        files.forget_stages()
        assert Path(stage).is_dir()
