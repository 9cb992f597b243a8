"""hothouse_recover: what hosts know finds its way back into a credentials file, and nothing is guessed or shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret
from conftest import Play, load_plugin

plugin = load_plugin("action/hothouse_recover")
NGINX = {"name": "nginx", "common_name": "localhost", "alt_names": ["localhost"], "client_auth": False}
NAMES = ["flower_password", "monitor", *(f"redis_{part}" for part in ("admin", "app", "beat", "worker"))]
NAMES += [f"redis_{part}" for part in ("exporter", "flower", "haproxy", "replica", "sentinel")]
Runner = Callable[..., Play]
Files = dict[str, str]


class LastMonth(datetime):
    """A clock that is behind."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) - timedelta(days=30)


def environment(certificates: list[dict[str, Any]] | None = None) -> dict[str, str]:
    """All credentials of an environment with one host h1, as a first run generates them."""
    document = plugin.credentials.Document("", Path("credentials.yml"), VaultLib([]))
    host = {"name": "host_h1", "common_name": "h1", "alt_names": ["h1"], "client_auth": True}
    wanted = {"passwords": NAMES, "users": ["flower_user"], "ca_file": None}
    plugin.credentials.generate(document, wanted | {"certificates": certificates or [NGINX, host]})
    return dict(yaml.safe_load(document.text)["credentials"])


def files(values: dict[str, str], **more: str) -> Files:
    """What a host that carries every noun holds of them."""
    texts = {
        **{
            name: values[name] for name in ("flower_user", "flower_password", "redis_admin", "redis_sentinel")
        },
        "monitor_password": values["monitor"],
        "monitor_flower_password": values["flower_password"],
        "monitor_redis_passwords": json.dumps({"rediss://h1:6379": values["redis_exporter"]}),
        "app_redis_url": f"redis://app:{values['redis_app']}@127.0.0.1:6379/0",
        **{
            f"{noun}_broker_url": f"redis://{noun}:{values[f'redis_{noun}']}@127.0.0.1:6379/0"
            for noun in ("beat", "flower", "worker")
        },
    }
    return {
        **{f"/etc/hothouse/credentials/{name}": f"{text}\n" for name, text in (texts | more).items()},
        "/etc/hothouse/credentials/host_key": values["host_h1_key"],
        "/etc/hothouse/tls/host.crt": values["host_h1_certificate"],
        "/etc/hothouse/tls/ca.crt": values["ca_certificate"],
        "/etc/nginx/hothouse.crt": values["nginx_certificate"],
        "/etc/nginx/hothouse.key": values["nginx_key"],
        "/etc/nginx/hothouse-ca.crt": values["ca_certificate"],
        "/etc/redis/replication.conf": f"# roles/redis\nmasterauth {values['redis_replica']}\n",
        "/etc/haproxy/haproxy.cfg": f'    tcp-check send "AUTH haproxy {values["redis_haproxy"]}\\r\\n"\n',
    }


def lines(answer: Files) -> list[str]:
    """The same as the host says it, after a greeting."""
    said = [
        f"recovered {path} {base64.b64encode(content.encode()).decode()}" for path, content in answer.items()
    ]
    return ["Welcome to h1", *said]


def known(values: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if name != "ca_key"}


def test_everything_but_the_key_of_the_authority_comes_back() -> None:
    values = environment()
    assert plugin.recover({"h1": plugin.read(lines(files(values)))}, {}) == known(values)


def test_a_host_that_lacks_a_noun_lacks_its_credentials_and_no_other() -> None:
    values = environment()
    for path in files(values):
        rest = {name: content for name, content in files(values).items() if name != path}
        found = plugin.recover({"h1": rest}, {})
        assert set(known(values)) - set(found) <= {
            "flower_user", "redis_admin", "redis_sentinel", "monitor", "redis_exporter", "redis_app", "redis_beat",
            "redis_flower", "redis_worker", "redis_replica", "redis_haproxy",
            "host_h1_key", "host_h1_certificate", "nginx_key", "nginx_certificate",
        }  # fmt: skip
        assert found.items() <= values.items()


def test_secrets_of_the_users_own_are_found_where_the_inventory_only_hands_them_on() -> None:
    values = environment()
    variables = {
        "app_credentials": {
            "smtp": "{{ credentials.mail_password }}",
            "key": "{{ credentials['shop_key'] }}",
            "loop": "{{ app_smtp_password }}",
            "composed": "{{ credentials.a }}:{{ credentials.b }}",
            "plain": "written into the inventory",
        },
        "app_smtp_password": "{{ credentials.relay }}",
        "monitor_smtp_password": "{{ app_smtp_password }}",
    }
    mine = {"app_smtp": "one", "app_key": "two\nlines", "app_loop": "three", "app_composed": "x:y"}
    found = plugin.recover(
        {"h1": files(values, **mine, app_plain="p", monitor_smtp_password="three")}, variables
    )
    assert found == known(values) | {"mail_password": "one", "shop_key": "two\nlines", "relay": "three"}


def test_a_variable_that_refers_to_itself_ends() -> None:
    values = environment()
    variables = {"app_credentials": {"a": "{{ x }}"}, "x": "{{ y }}", "y": "{{ x }}"}
    assert plugin.recover({"h1": files(values, app_a="1")}, variables) == known(values)


def test_hosts_that_contradict_each_other_are_named_and_no_value_is() -> None:
    values = environment()
    changed = values | {"redis_worker": "another"}
    answers = {"h1": files(values), "h2": files(changed)}
    for host in ("host_key", "host.crt"):
        answers["h2"] = {path: text for path, text in answers["h2"].items() if not path.endswith(host)}
    with pytest.raises(AnsibleActionFail, match=r"`redis_worker` \(h1 / h2\).*--limit '!HOST'") as failure:
        plugin.recover(answers, {})
    assert not [value for value in (*values.values(), "another") if value in str(failure.value)]
    assert plugin.recover({"h1": answers["h1"]}, {})["redis_worker"] == values["redis_worker"]


def test_in_the_middle_of_a_change_of_the_authority_the_newer_one_counts_and_both_are_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin.credentials, "datetime", LastMonth)
    old = environment()
    monkeypatch.undo()
    new = environment()
    for order in ((new, old), (old, new)):
        answer = files(new)
        answer["/etc/hothouse/tls/ca.crt"] = "".join(one["ca_certificate"] for one in order)
        found = plugin.recover({"h1": answer}, {})
        assert found == known(new) | {"ca_certificate_old": old["ca_certificate"]}


def test_a_certificate_that_the_user_provided_is_no_credential() -> None:
    values, foreign = environment(), environment()
    answer = files(values)
    answer["/etc/nginx/hothouse.crt"] = foreign["nginx_certificate"]
    answer["/etc/nginx/hothouse.key"] = foreign["nginx_key"]
    assert not {"nginx_key", "nginx_certificate"} & set(plugin.recover({"h1": answer}, {}))


def test_hosts_without_credentials_are_said_to_have_none() -> None:
    with pytest.raises(AnsibleActionFail, match="None of these hosts has credentials of an environment: h1"):
        plugin.recover({"h1": plugin.read(["Welcome", "recovered /etc/hothouse/credentials/x !"])}, {})


def task(path: Path, values: dict[str, str]) -> dict[str, Any]:
    return {"hothouse_recover": {"path": str(path), "answers": {"h1": lines(files(values))}}}


def test_the_file_is_completed_encrypted_and_no_value_is_shown(play: Runner, tmp_path: Path) -> None:
    path, secret = tmp_path / "credentials.yml", tmp_path / "vault-password"
    secret.write_text("orchid\n")
    values = environment()
    run = play([task(path, values)], "-vvv", "--diff", f"--vault-password-file={secret}", text=True)
    assert run.code == 0 and "recovered: redis_admin" in run.output
    text = VaultLib([("default", VaultSecret(b"orchid"))]).decrypt(path.read_bytes())
    assert yaml.safe_load(text)["credentials"] == known(values)
    shown = [line for value in values.values() for line in value.splitlines() if not line.startswith("-----")]
    assert not [line for line in shown if line in run.output]
    again = play([task(path, values)], f"--vault-password-file={secret}")
    assert not again.results[0]["changed"]


def test_what_the_file_holds_already_is_never_overwritten(play: Runner, tmp_path: Path) -> None:
    path, values = tmp_path / "credentials.yml", environment()
    text = 'credentials:\n  redis_admin: "mine"\n  own: "kept"\n'
    path.write_text(text)
    run = play([task(path, values)], text=True)
    assert run.code != 0 and "has other values than the hosts for redis_admin." in run.output
    assert path.read_text() == text
    path.write_text('credentials:\n  own: "kept"\n')
    assert play([task(path, values)]).code == 0
    assert yaml.safe_load(path.read_text())["credentials"] == known(values) | {"own": "kept"}
