"""hothouse_credentials: what is generated, what is kept, and that no value gets anywhere else."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret
from conftest import Play, load_plugin
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from test_hothouse_files import killed

plugin = load_plugin("action/hothouse_credentials")
VAULT = VaultLib([("default", VaultSecret(b"orchid"))])
HOST = {"name": "host_worker-1.example.com", "common_name": "worker-1.example.com", "client_auth": True}
HOST["alt_names"] = ["worker-1.example.com", "192.0.2.7"]
NGINX = {"name": "nginx", "common_name": "localhost", "alt_names": ["localhost", "127.0.0.1"]}
EVERYTHING = {
    "passwords": ["redis_admin", "flower_password"],
    "users": ["flower_user"],
    "certificates": [NGINX],
}
Runner = Callable[..., Play]


def task(path: Path, **options: Any) -> dict[str, Any]:
    """A task that keeps the credentials file `path`."""
    return {"hothouse_credentials": {"path": str(path), **options}, "register": "credentials_result"}


def read(path: Path, vault: VaultLib | None = None) -> dict[str, str]:
    """The credentials of a file."""
    content = path.read_bytes()
    return yaml.safe_load(vault.decrypt(content) if vault else content)["credentials"]


def complete(text: str, options: dict[str, Any] | None = None) -> tuple[str, list[str]]:
    """What becomes of a file's text when everything in `options` is wanted, and the names generated."""
    defaults: dict[str, Any] = {"passwords": [], "users": [], "certificates": [], "ca_file": None}
    document = plugin.Document(text, Path("credentials.yml"), VAULT)
    generated = plugin.generate(document, defaults | (options or {}))
    return document.text, generated


def pruned(text: str, certificates: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """What becomes of a file's text when these are the only certificates of hosts, and the names removed."""
    document = plugin.Document(text, Path("credentials.yml"), VAULT)
    names = plugin.superfluous(document, {"exclusive": "host_", "certificates": certificates})
    for name in names:
        document.remove(name)
    return document.text, names


def certificate(values: dict[str, str], name: str) -> x509.Certificate:
    """One of the certificates among credentials."""
    return x509.load_pem_x509_certificate(values[f"{name}_certificate"].encode())


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    """A vault password file."""
    file = tmp_path / "vault-password"
    file.write_text("orchid\n")
    return str(file)


def test_everything_is_generated_once_and_kept(play: Runner, tmp_path: Path) -> None:
    path, ca_file = tmp_path / "env/group_vars/all/credentials.yml", tmp_path / "env/ca.crt"
    tasks = [task(path, **EVERYTHING, ca_file=str(ca_file))]
    old_umask = os.umask(0)
    try:
        first = play(tasks)
    finally:
        os.umask(old_umask)
    assert first.results[0]["changed"]
    assert first.results[0]["file"] == str(path)
    assert sorted(first.results[0]["generated"]) == sorted(values := read(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ca_file.stat().st_mode) == 0o644
    assert re.fullmatch(r"ops-[a-z0-9]{6}", values["flower_user"])
    for name in EVERYTHING["passwords"]:
        assert re.fullmatch(r"[A-Za-z0-9]{40}", values[name])
    assert len(set(values.values())) == len(values)
    assert ca_file.read_text() == values["ca_certificate"]
    content = path.read_bytes()
    second = play(tasks)
    assert not second.results[0]["changed"]
    assert second.results[0]["generated"] == []
    assert path.read_bytes() == content
    assert sorted(file.name for file in path.parent.iterdir()) == ["credentials.yml"]


def test_the_server_certificate_is_one_that_browsers_accept() -> None:
    values = yaml.safe_load(complete("", {"certificates": [NGINX]})[0])["credentials"]
    authority, server = certificate(values, "ca"), certificate(values, "nginx")
    server.verify_directly_issued_by(authority)
    assert server.not_valid_after_utc - server.not_valid_before_utc <= timedelta(days=397)
    assert authority.not_valid_after_utc - authority.not_valid_before_utc == timedelta(days=3650)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_certificate_of_a_host_is_one_for_servers_and_clients() -> None:
    text, generated = complete("", {"certificates": [NGINX, HOST]})
    values = yaml.safe_load(text)["credentials"]
    host = certificate(values, "host_worker-1.example.com")
    host.verify_directly_issued_by(certificate(values, "ca"))
    assert generated[-2:] == ["host_worker-1.example.com_key", "host_worker-1.example.com_certificate"]
    assert host.subject == plugin.common_name("worker-1.example.com")
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["worker-1.example.com"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    usage = host.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    assert complete(text, {"certificates": [HOST, NGINX]}) == (text, [])


def test_no_value_is_shown_at_any_verbosity(play: Runner, tmp_path: Path) -> None:
    path = tmp_path / "credentials.yml"
    path.write_text('credentials:\n  smtp_password: "chosen-by-hand"\n')
    run = play([task(path, **EVERYTHING)], "-vvv", "--diff", text=True)
    assert run.code == 0
    assert "generated: redis_admin" in run.output
    values = read(path)
    assert len(values) == 8
    for value in values.values():
        for line in value.splitlines():
            assert line.startswith("-----") or line not in run.output


def test_existing_values_comments_and_unknown_keys_survive() -> None:
    vaulted = VAULT.encrypt("from-the-vault").decode().replace("\n", "\n      ").rstrip()
    before = (
        "---\n# ours\ncredentials:  # keep\n    redis_admin: mine  # by hand\n"
        f"    smtp_password: !vault |\n      {vaulted}\n"
        "    flower_user: \"{{ lookup('env', 'FLOWER_USER') }}\"\n"
        "    empty: ''\n    none:\n    number: 0123\n    other: {a: [1, 2]}\n    # the end\n"
        "\nanother_variable: 1\n"
    )
    wanted = ["redis_admin", "smtp_password", "empty", "none", "number", "other", "new"]
    after, generated = complete(before, {"passwords": wanted, "users": ["flower_user"]})
    assert generated == ["empty", "none", "new"]
    old, new = before.splitlines(), after.splitlines()
    changed = [line for line in new if line not in old]
    assert [line.split(":")[0].strip() for line in changed] == ["empty", "none", "new"]
    assert [line for line in old if line not in new] == ["    empty: ''", "    none:"]
    assert plugin.Document(after, Path("x"), VAULT).get("smtp_password") == "from-the-vault"


@pytest.mark.parametrize(
    "text",
    [
        "credentials:\n",
        "credentials: {}\n",
        "credentials: {a: 'b, c', d: [1]}  # note\n",
        "credentials: {a: x,\n  d: y}",
        "credentials:\n  a: b",
        "credentials: ~\nmore: 1\n",
        "credentials:\n  a: |\n    1\n    2\n\n\n",
        "---\n# nothing yet\n",
        "\n",
        "",
    ],
)
def test_every_way_to_write_the_variable_is_completed(text: str) -> None:
    before = (yaml.safe_load(text) or {}).get("credentials") or {}
    after, _ = complete(text, {"passwords": ["p1", "p2"], "certificates": [NGINX]})
    values = yaml.safe_load(after)["credentials"]
    assert {name: values[name] for name in before} == before
    assert set(values) - set(before) == {
        *("p1", "p2", "ca_key", "ca_certificate", "nginx_key", "nginx_certificate"),
    }
    assert (yaml.safe_load(after).get("more") is None) == ("more" not in text)
    assert complete(after, {"passwords": ["p1", "p2"], "certificates": [NGINX]}) == (after, [])


def test_a_vault_password_encrypts_new_and_existing_files(
    play: Runner, tmp_path: Path, password_file: str
) -> None:
    new, plain = tmp_path / "new.yml", tmp_path / "plain.yml"
    plain.write_text("credentials:\n  redis_admin: mine\n")
    tasks = [
        task(new, **EVERYTHING, require_vault=True),
        {"ansible.builtin.include_vars": "{{ credentials_result.file }}", "no_log": True},
        {"ansible.builtin.assert": {"that": "credentials.redis_admin | length == 40"}},
        task(plain, passwords=["redis_admin"], require_vault=True),
    ]
    run = play(tasks, ANSIBLE_VAULT_PASSWORD_FILE=password_file)
    assert run.code == 0
    for file in (new, plain):
        assert file.read_bytes().startswith(b"$ANSIBLE_VAULT;1.1;AES256\n")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [result.get("encrypted") for result in run.results] == [True, None, None, True]
    assert len(read(new, VAULT)) == 7
    assert read(plain, VAULT) == {"redis_admin": "mine"}
    contents = new.read_bytes(), plain.read_bytes()
    again = play(tasks, "--vault-password-file", password_file)
    assert [result["changed"] for result in again.results] == [False] * 4
    assert (new.read_bytes(), plain.read_bytes()) == contents
    added = play([task(new, passwords=["added"])], "--vault-id", f"prod@{password_file}")
    assert added.results[0]["generated"] == ["added"]
    assert set(read(new, VAULT)) == {*read(new, VAULT), "added", "redis_admin"}


def test_without_the_vault_password_nothing_is_touched(
    play: Runner, tmp_path: Path, password_file: str
) -> None:
    encrypted, missing = tmp_path / "encrypted.yml", tmp_path / "deep/missing.yml"
    encrypted.write_bytes(content := VAULT.encrypt("credentials: {a: b}"))
    tasks = [
        task(missing, **EVERYTHING, require_vault=True) | {"ignore_errors": True},
        task(encrypted, passwords=["redis_admin"]) | {"ignore_errors": True},
    ]
    demanded, locked = (result["msg"] for result in play(tasks).results)
    assert "demands encrypted credentials" in demanded
    assert "credentials_require_vault" in demanded and "ANSIBLE_VAULT_PASSWORD_FILE" in demanded
    assert "is encrypted and no vault password" in locked
    assert not missing.parent.exists()
    wrong = tmp_path / "wrong"
    wrong.write_text("tulip\n")
    run = play([task(encrypted, passwords=["redis_admin"])], ANSIBLE_VAULT_PASSWORD_FILE=str(wrong))
    assert run.code != 0 and "cannot be decrypted" in run.results[0]["msg"]
    assert encrypted.read_bytes() == content


def test_check_mode_makes_values_available_and_writes_nothing(
    play: Runner, tmp_path: Path, password_file: str
) -> None:
    path, ca_file = tmp_path / "env/credentials.yml", tmp_path / "env/ca.crt"
    tasks = [
        task(path, **EVERYTHING, ca_file=str(ca_file)),
        {"ansible.builtin.include_vars": "{{ credentials_result.file }}", "no_log": True},
        {"ansible.builtin.assert": {"that": "credentials.nginx_key is search('PRIVATE KEY')"}},
    ]
    for environment in ({}, {"ANSIBLE_VAULT_PASSWORD_FILE": password_file}):
        run = play(tasks, "--check", "--diff", **environment)
        assert run.code == 0
        assert run.results[0]["changed"]
        assert run.results[0]["encrypted"] == bool(environment)
        assert not path.parent.exists()
        throwaway = Path(run.results[0]["file"])
        assert throwaway.is_relative_to(tmp_path / "ansible/home/tmp") and not throwaway.exists()
    assert play(tasks).code == 0
    converged = play(tasks, "--check")
    assert not converged.results[0]["changed"]
    assert converged.results[0]["file"] == str(path)


@pytest.mark.parametrize("change", ["alt_names", "common_name", "uses", "authority", "expiry", "foreign key"])
def test_a_certificate_that_no_longer_fits_is_issued_anew(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, _ = complete("", {"certificates": [NGINX]})
    wanted = dict(NGINX)
    expected = {"nginx_key", "nginx_certificate"}
    if change == "alt_names":
        wanted["alt_names"] = ["localhost", "127.0.0.1", "::1"]
    elif change == "common_name":
        wanted["common_name"] = "tasks.example.com"
    elif change == "uses":
        wanted["client_auth"] = True
    elif change == "authority":
        other = yaml.safe_load(complete("", {"certificates": [NGINX]})[0])["credentials"]
        document = plugin.Document(text, Path("x"), VAULT)
        document.set("ca_key", other["ca_key"])
        document.set("ca_certificate", other["ca_certificate"])
        text = document.text
    elif change == "expiry":
        later = plugin.datetime.now(plugin.UTC) + timedelta(days=397 - 29)
        monkeypatch.setattr(plugin, "days_left", lambda cert: (cert.not_valid_after_utc - later).days)
    else:
        document = plugin.Document(text, Path("x"), VAULT)
        document.set("nginx_key", document.get("ca_key"))
        text = document.text
    before = yaml.safe_load(text)["credentials"]
    after, generated = complete(text, {"certificates": [wanted]})
    assert set(generated) == expected
    values = yaml.safe_load(after)["credentials"]
    assert {name for name in values if values[name] != before[name]} == expected
    certificate(values, "nginx").verify_directly_issued_by(certificate(values, "ca"))
    monkeypatch.undo()
    assert complete(after, {"certificates": [wanted]}) == (after, [])


def test_a_reordered_list_of_names_issues_nothing() -> None:
    text, _ = complete("", {"certificates": [NGINX]})
    assert complete(text, {"certificates": [NGINX | {"alt_names": ["127.0.0.1", "localhost"]}]}) == (text, [])


def test_the_authority_is_renewed_with_its_key_before_it_limits_a_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "CA_DAYS", 420)
    text, _ = complete("", {"certificates": [NGINX]})
    monkeypatch.undo()
    before = yaml.safe_load(text)["credentials"]
    after, generated = complete(text, {"certificates": [NGINX]})
    values = yaml.safe_load(after)["credentials"]
    assert generated == ["ca_certificate"]
    assert certificate(values, "ca").subject == certificate(before, "ca").subject
    certificate(values, "nginx").verify_directly_issued_by(certificate(values, "ca"))
    assert complete(after, {"certificates": [NGINX]}) == (after, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("credentials:\n  a: 'sesame\n  b: c\n", "not valid YAML at line"),
        ("credentials:\n\ta: sesame\n", "not valid YAML at line 2, column 1"),
        ("a: *sesame\n", "not valid YAML at line 1, column 4"),
        ("- sesame\n", "must hold a dictionary named `credentials`"),
        ("passwords: {a: sesame}\n", "must hold a dictionary named `credentials`"),
        ("credentials: sesame\n", "must hold a dictionary named `credentials`"),
        (
            "credentials: {ca_certificate: sesame}\n",
            "`ca_certificate` in credentials.yml is not a certificate",
        ),
        ("credentials: {ca_key: sesame}\n", "`ca_key` in credentials.yml is not a private key"),
        ("credentials:\n  ca_key: !vault sesame\n", "`ca_key` in credentials.yml cannot be decrypted"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_not_quoted(text: str, message: str) -> None:
    with pytest.raises(AnsibleActionFail) as failure:
        complete(text, {"passwords": ["p"], "certificates": [NGINX]})
    assert message in str(failure.value)
    assert "sesame" not in str(failure.value)


def test_a_broken_file_stays_as_it_is(play: Runner, tmp_path: Path) -> None:
    broken, binary, folder = tmp_path / "broken.yml", tmp_path / "binary.yml", tmp_path / "folder.yml"
    broken.write_text("credentials:\n  smtp: 'sesame-open\n")
    binary.write_bytes(b"\xff\xfe")
    folder.mkdir()
    tasks = [task(file, **EVERYTHING) | {"ignore_errors": True} for file in (broken, binary, folder)]
    run = play(tasks, "-vvv", text=True)
    assert "not valid YAML at line" in run.output
    assert "is not a text file in UTF-8" in run.output
    assert "folder.yml: Is a directory." in run.output
    assert "sesame-open" not in run.output
    assert broken.read_text() == "credentials:\n  smtp: 'sesame-open\n"


def test_a_file_that_others_can_read_is_closed(play: Runner, tmp_path: Path) -> None:
    path = tmp_path / "credentials.yml"
    path.write_text("credentials: {redis_admin: mine}\n")
    path.chmod(0o644)
    tasks = [task(path, passwords=["redis_admin"])]
    assert play(tasks, "--check").results[0]["changed"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert play(tasks).results[0]["changed"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not play(tasks).results[0]["changed"]
    assert path.read_text() == "credentials: {redis_admin: mine}\n"


def test_two_runs_at_once_generate_one_set(play: Runner, tmp_path: Path) -> None:
    path = tmp_path / "credentials.yml"
    names = [f"password{number}" for number in range(40)]
    tasks = [task(path, passwords=names, certificates=[NGINX])]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: play(tasks, "--forks", "2", hosts=3), range(2)))
    assert sorted(run.results[0]["changed"] for run in runs) == [False, True]
    assert len(read(path)) == 44


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passwords": ["a", "a"]}, "`a` is asked for more than once"),
        ({"passwords": ["nginx_key"], "certificates": [NGINX]}, "`nginx_key` is asked for more than once"),
        ({"passwords": ["Not-A-Name"]}, "`Not-A-Name` cannot name a credential"),
        ({"certificates": [{"name": "ca", "alt_names": ["a"]}]}, "`ca_key` is asked for more than once"),
        (
            {"certificates": [{"name": "host_a b", "alt_names": ["a"]}]},
            "`host_a b` cannot name a certificate",
        ),
        ({"certificates": [{"name": "x", "alt_names": []}]}, "`x` has no alt_names"),
        ({"certificates": [{"name": "x", "alt_names": ["a b"]}]}, "`a b` in alt_names"),
        ({"certificates": [{"name": "x", "alt_names": [".".join(["a" * 16] * 4)]}]}, "longer than 64"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    for wanted in options.get("certificates", []):
        wanted.setdefault("common_name", None)
    with pytest.raises(AnsibleActionFail, match=re.escape(message)):
        plugin.assert_names({"passwords": [], "users": [], "certificates": []} | options)


def test_an_authority_without_its_key_is_good_until_something_has_to_be_issued() -> None:
    text, _ = complete("", {"passwords": ["p"], "certificates": [NGINX, HOST]})
    values = yaml.safe_load(text)["credentials"]
    del values["ca_key"]
    kept = yaml.safe_dump({"credentials": values})
    assert complete(kept, {"passwords": ["p"], "certificates": [NGINX, HOST]}) == (kept, [])
    more = {"name": "host_new", "common_name": "new", "alt_names": ["new"]}
    with pytest.raises(
        AnsibleActionFail, match=r"certificate of `new` has to be issued.*rename `ca_certificate`"
    ):
        complete(kept, {"certificates": [NGINX, HOST, more]})
    # What the message says.
    values["ca_certificate_old"] = values.pop("ca_certificate")
    after, generated = complete(
        yaml.safe_dump({"credentials": values}), {"certificates": [NGINX, HOST, more]}
    )
    assert {"ca_key", "ca_certificate", "nginx_certificate", "host_new_certificate"} <= set(generated)
    assert yaml.safe_load(after)["credentials"]["ca_certificate_old"] == values["ca_certificate_old"]


def test_the_certificate_of_a_host_that_left_goes_and_nothing_else() -> None:
    gone = {"name": "host_gone", "common_name": "gone", "alt_names": ["gone", "192.0.2.8"]}
    text, _ = complete("", {"passwords": ["redis_admin"], "certificates": [NGINX, gone, HOST]})
    other = json.dumps(yaml.safe_load(text)["credentials"]["nginx_certificate"])
    text += (
        '  # ours\n  host_api_key: "mine"\n  host_api_certificate: "mine too"\n  host_of_mail: "x"\n'
        f"  host_other_key: |\n    k\n  host_other_certificate: {other}\n"
    )
    before = yaml.safe_load(text)["credentials"]
    assert pruned(text, [NGINX, gone, HOST]) == (text, [])
    after, names = pruned(text, [NGINX, HOST])
    assert names == ["host_gone_key", "host_gone_certificate"]
    assert "# ours" in after
    assert yaml.safe_load(after)["credentials"] == {
        name: value for name, value in before.items() if name not in names
    }
    # Back to one host.
    assert set(pruned(text, [NGINX])[1]) == {*names, f"{HOST['name']}_key", f"{HOST['name']}_certificate"}


def test_a_run_removes_the_certificate_of_a_host_that_left_and_says_so(play: Runner, tmp_path: Path) -> None:
    path = tmp_path / "credentials.yml"
    both = play([task(path, certificates=[NGINX, HOST], exclusive="host_")], text=True)
    assert both.code == 0 and f"{HOST['name']}_key" in read(path)
    one = play([task(path, certificates=[NGINX], exclusive="host_")], "--diff", text=True)
    assert f"removed: {HOST['name']}_key" in one.output
    assert not [name for name in read(path) if name.startswith("host_")]
    assert not play([task(path, certificates=[NGINX], exclusive="host_")]).results[0]["changed"]


# Whose credentials these are


class Loader:
    """The part of Ansible's loader that is asked where a file is."""

    @staticmethod
    def path_dwim(path: str) -> str:
        return path


def action() -> Any:
    """The action, without a task that runs it."""
    module = object.__new__(plugin.ActionModule)
    module._loader = Loader()
    return module


WANTED = {
    "passwords": ["redis_admin", "redis_worker", "flower_password"], "users": ["flower_user"], "certificates": [NGINX,
    HOST], "exclusive": "host_", "authorities": {}, "replace": False,
}  # fmt: skip


def run(text: str, folder: Path, **options: Any) -> tuple[dict[str, str], str]:
    """The credentials and the text that a run makes of a file's text, with ca.crt in the folder; as `_apply` does."""
    path = folder / "credentials.yml"
    path.write_text(text)
    wanted = {**WANTED, "ca_file": str(folder / "ca.crt"), **options}
    document = plugin.Document(text, path, VAULT)
    seen, _ = action()._completed(document, wanted)
    action()._remember(document, seen)
    (folder / "ca.crt").write_text(document.get("ca_certificate"))
    return yaml.safe_load(document.text)["credentials"], document.text


@pytest.fixture
def deployed(tmp_path: Path) -> tuple[dict[str, str], str]:
    """The credentials of an environment that was deployed, whose ca.crt is beside."""
    return run("", tmp_path)


def test_a_new_environment_needs_nothing(deployed: tuple[dict[str, str], str]) -> None:
    assert "ca_replaced" not in deployed[0]


def test_a_run_that_changes_nothing_is_let_through(
    deployed: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    host = {"redis1": deployed[0]["ca_certificate"]}
    assert run(deployed[1], tmp_path, authorities=host)[1] == deployed[1]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\ncredentials: {}\n", "credentials:\n", "credentials:\n  own: x\n"]
)
def test_without_credentials_the_certificate_of_the_authority_refuses_a_run(
    deployed: tuple[dict[str, str], str], tmp_path: Path, text: str
) -> None:
    before = (tmp_path / "ca.crt").read_text()
    with pytest.raises(AnsibleActionFail) as error:
        run(text, tmp_path)
    for words in (
        "colleague",
        "playbooks/recover.yml",
        "credentials_replace=true",
        "Nothing was generated or changed",
    ):
        assert words in str(error.value)
    assert (tmp_path / "ca.crt").read_text() == before
    new, _ = run(text, tmp_path, replace=True)
    assert new["ca_certificate"] != deployed[0]["ca_certificate"]


def test_a_file_that_is_cut_off_anywhere_makes_no_new_authority(
    deployed: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    """Half a file is refused. Only certificates of hosts, which stand behind the authority, are issued anew."""
    text = deployed[1]
    outcomes = set()
    for end in itertools.chain(range(0, len(text), 61), (match.end() for match in re.finditer("\n", text))):
        folder = tmp_path / str(end)
        folder.mkdir(exist_ok=True)
        (folder / "ca.crt").write_text(deployed[0]["ca_certificate"])
        try:
            values, _ = run(text[:end], folder)
        except AnsibleActionFail as error:
            outcomes.add("refused")
            assert deployed[0]["redis_admin"] not in str(error)
            continue
        outcomes.add("completed")
        assert values["ca_certificate"] == deployed[0]["ca_certificate"], end
        assert values["redis_admin"] == deployed[0]["redis_admin"], end
    assert outcomes == {"refused", "completed"}


@pytest.mark.parametrize("where", ["ca.crt", "host"])
def test_an_authority_of_another_environment_is_refused(
    deployed: tuple[dict[str, str], str], tmp_path: Path, where: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = run("", other)[0]["ca_certificate"]
    options: dict[str, Any] = {}
    if where == "host":
        options["authorities"] = {"redis1": deployed[0]["ca_certificate"], "redis2": stranger}
    else:
        (tmp_path / "ca.crt").write_text(stranger)
    with pytest.raises(AnsibleActionFail, match="redis2" if where == "host" else "ca.crt"):
        run(deployed[1], tmp_path, **options)
    run(deployed[1], tmp_path, replace=True, **options)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"nothing", b"\xff\0", b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"],
)
def test_a_certificate_that_cannot_be_read_is_written_anew_or_refuses_a_run_without_credentials(
    deployed: tuple[dict[str, str], str], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(AnsibleActionFail, match="can no longer be read"):
        run("", tmp_path)
    assert run(deployed[1], tmp_path)[1] == deployed[1]
    assert (tmp_path / "ca.crt").read_text() == deployed[0]["ca_certificate"]


def without(text: str, *names: str) -> str:
    for name in names:
        text, found = re.subn(rf"(?m)^  {name}:.*\n(?:    .*\n)*", "", text)
        assert found == 1, name
    return text


def test_what_the_guides_remove_is_generated_anew_without_a_word(
    deployed: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    """docs/credentials.md and docs/encryption.md, also with hosts that no run has come to yet."""
    old = deployed[0]["ca_certificate"]
    hosts = {"redis1": old}
    # One password, all of them, a certificate.
    for names in (
        ["redis_admin"],
        ["redis_admin", "redis_worker", "flower_password", "flower_user"],
        ["nginx_key"],
    ):
        assert run(without(deployed[1], *names), tmp_path, authorities=hosts)[0]["ca_certificate"] == old
    # The authority in two steps.
    step = without(deployed[1].replace("  ca_certificate:", "  ca_certificate_old:"), "ca_key")
    values, text = run(step, tmp_path, authorities=hosts)
    assert values["ca_certificate"] != old
    run(text, tmp_path, authorities={**hosts, "redis2": values["ca_certificate"] + old})
    text = without(text, "ca_certificate_old")
    run(text, tmp_path, authorities={**hosts, "redis2": values["ca_certificate"] + old})
    # At once; then again after an interruption, when some hosts have the new one.
    folder = tmp_path / "at once"
    folder.mkdir()
    (folder / "ca.crt").write_text(old)
    values, text = run(without(deployed[1], "ca_key", "ca_certificate"), folder, authorities=hosts)
    assert values["ca_certificate"] != old
    assert run(text, folder, authorities={**hosts, "redis2": values["ca_certificate"]})[1] == text


def test_a_replacement_that_was_interrupted_goes_on_without_the_variable(
    deployed: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    hosts = {"redis1": deployed[0]["ca_certificate"]}
    (tmp_path / "ca.crt").unlink()
    values, text = run("", tmp_path, authorities=hosts, replace=True)
    again = run(text, tmp_path, authorities={**hosts, "redis2": values["ca_certificate"]})
    assert again[1] == text
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with pytest.raises(AnsibleActionFail):
        run(text, tmp_path, authorities={"redis1": run("", stranger)[0]["ca_certificate"]})


def test_an_old_copy_of_the_credentials_is_refused_when_the_authority_has_changed_since(
    deployed: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    step = without(deployed[1].replace("  ca_certificate:", "  ca_certificate_old:"), "ca_key")
    run(step, tmp_path)
    with pytest.raises(AnsibleActionFail, match="is old, or of another environment"):
        run(deployed[1], tmp_path)


def test_a_link_that_leads_nowhere_is_no_new_environment(tmp_path: Path) -> None:
    (tmp_path / "credentials.yml").symlink_to(tmp_path / "vault/credentials.yml")
    with pytest.raises(
        AnsibleActionFail, match=r"is a link to .*vault/credentials\.yml, where there is no file"
    ):
        action()._place(str(tmp_path / "credentials.yml"))
    loop = tmp_path / "loop.yml"
    loop.symlink_to(loop)
    with pytest.raises(AnsibleActionFail, match="is a link"):
        action()._place(str(loop))


def test_a_run_without_credentials_is_refused_in_check_mode_too(play: Runner, tmp_path: Path) -> None:
    path, ca_file = tmp_path / "credentials.yml", tmp_path / "ca.crt"
    ca_file.write_text(run("", tmp_path)[0]["ca_certificate"])
    path.unlink()
    for arguments in ([], ["--check"]):
        done = play([task(path, ca_file=str(ca_file), **EVERYTHING)], *arguments)
        assert done.code != 0 and "playbooks/recover.yml" in done.output
        assert not path.exists()
    assert play([task(path, ca_file=str(ca_file), replace=True, **EVERYTHING)]).code == 0
    assert read(path)["ca_replaced"]


# What a run leaves that is killed


def test_what_a_killed_run_left_of_the_credentials_is_removed_by_the_next(
    play: Runner, tmp_path: Path
) -> None:
    """Also if that one has nothing to write, and what a run in check mode wrote for itself."""
    path = tmp_path / "credentials.yml"
    assert play([task(path, **EVERYTHING)]).code == 0
    staged = tmp_path / ".credentials.yml.new"
    staged.write_text("secret")
    temporary = tmp_path / "ansible/home/tmp"
    ended = plugin.processes.process(os.getpid()).rpartition("/")[0] + "/1"
    dead = temporary / f"ansible-local-1abcdefgh/{plugin.THROWAWAY}{ended.replace('/', '=')}=x"
    own = plugin.processes.process(os.getpid()).replace("/", "=")
    alive = temporary / f"ansible-local-2abcdefgh/{plugin.THROWAWAY}{own}=x"
    elsewhere = temporary / f"ansible-local-3abcdefgh/{plugin.THROWAWAY}boot=ns=1=1=x"
    long_ago = temporary / f"ansible-local-4abcdefgh/{plugin.THROWAWAY}boot=ns=1=1=x"
    for folder in (dead, alive, elsewhere, long_ago):
        folder.mkdir(parents=True)
        (folder / "credentials.yml").write_text("secret")
    os.utime(long_ago, (1, 1))
    assert play([task(path, **EVERYTHING)]).code == 0
    assert not staged.exists()
    assert [folder for folder in (dead, alive, elsewhere, long_ago) if folder.exists()] == [alive, elsewhere]


def test_a_run_in_check_mode_names_its_folder_after_its_process(play: Runner, tmp_path: Path) -> None:
    done = play([task(tmp_path / "credentials.yml", **EVERYTHING)], "--check")
    name = Path(done.results[0]["file"]).parent.name
    assert plugin.processes.has_ended(
        name.removeprefix(plugin.THROWAWAY).rpartition("=")[0].replace("=", "/")
    )


def test_a_run_removes_the_password_of_a_login_that_is_wanted_no_more(play: Runner, tmp_path: Path) -> None:
    path = tmp_path / "credentials.yml"
    readers = ["flower_reader_viewer", "flower_reader_Anna.Berg_2@example.com"]
    both = play(
        [task(path, passwords=["monitor", *readers], exclusive_passwords="flower_reader_")], text=True
    )
    assert both.code == 0 and set(readers) < set(read(path))
    before = read(path)
    one = play(
        [task(path, passwords=["monitor", readers[1]], exclusive_passwords="flower_reader_")],
        "--diff",
        text=True,
    )
    assert f"removed: {readers[0]}" in one.output and before[readers[0]] not in one.output
    assert read(path) == {name: value for name, value in before.items() if name != readers[0]}
    again = play([task(path, passwords=["monitor", readers[1]], exclusive_passwords="flower_reader_")])
    assert not again.results[0]["changed"]


def test_the_file_is_whole_wherever_a_run_is_killed(tmp_path: Path) -> None:
    """And what the run left is where the next one removes it."""
    path = tmp_path / "credentials.yml"
    seen = set()
    for moment in itertools.count(1):
        path.write_text("old")
        died = killed(lambda: plugin.write(path, b"new" * 5000, 0o600), moment)
        seen.add(path.read_text()[:3])
        assert path.read_text() in ("old", "new" * 5000)
        assert {one.name for one in tmp_path.iterdir()} <= {path.name, plugin.staged_name(path).name}
        plugin.staged_name(path).unlink(missing_ok=True)
        if not died:
            break
    assert seen == {"old", "new"} and moment > 5
