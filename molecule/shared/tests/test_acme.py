"""nginx obtains and renews its certificate by itself, from Debian's ACME server for tests, pebble, on the same host.

The tests are one story, in this order.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("staging")

FOLDER = "/root/pebble"
DIRECTORY = "https://localhost:14000/dir"
# Of a day: every run of the client renews it, as it does with one that has less than 30 days left.
VALIDITY_SECONDS = 86400
PREPARE = f"""
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get -qq install --no-install-recommends pebble >/dev/null
mkdir -p {FOLDER} && cd {FOLDER}
exec 2>/dev/null
new='openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
$new -x509 -days 2 -subj /CN=pebble -keyout ca.key -out ca.crt
$new -subj /CN=localhost -keyout server.key -out server.csr
echo subjectAltName=DNS:localhost >names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt
"""
CONFIG = {
    "pebble": {
        "listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
        "certificate": f"{FOLDER}/server.crt", "privateKey": f"{FOLDER}/server.key",
        "httpPort": 80, "tlsPort": 443, "certificateValidityPeriod": VALIDITY_SECONDS,
    }
}  # fmt: skip
# Every name leads to the host itself, whatever the resolver of the machine thinks of it.
RESOLVER = (
    "pebble-challtestsrv -dns01 127.0.0.1:8053 -http01 '' -https01 '' -tlsalpn01 ''"
    " -management 127.0.0.1:8055"
)


class Acme:
    """The host with its ACME server, and nginx as a user sees it."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.node = stack.group("nginx")[0]
        self.host = stack.host(self.node)
        self.name: str = stack.variables[self.node]["nginx_server_name"]
        self.settings = {
            "nginx_tls": "acme",
            "nginx_acme_directory": DIRECTORY,
            "nginx_acme_ca_file": str(folder / "pebble-ca.crt"),
            "nginx_acme_email": "ops@example.com",
        }
        self.host.check_output(PREPARE)
        self.host.check_output(f"echo '{json.dumps(CONFIG)}' >{FOLDER}/config.json")
        Path(self.settings["nginx_acme_ca_file"]).write_text(self.host.check_output(f"cat {FOLDER}/ca.crt"))

    def start(self) -> None:
        run = "systemd-run --quiet --collect --setenv=PEBBLE_VA_NOSLEEP=1 --setenv=PEBBLE_WFE_NONCEREJECT=0"
        address = self.stack.address(self.node)
        four, six = ("''", address) if ":" in address else (address, "''")
        self.host.check_output(f"{run} --unit=pebble-dns {RESOLVER} -defaultIPv4 {four} -defaultIPv6 {six}")
        self.host.check_output(
            f"{run} --unit=pebble pebble -config {FOLDER}/config.json -dnsserver 127.0.0.1:8053"
        )

    def stop(self) -> None:
        self.host.run("systemctl stop pebble.service pebble-dns.service")

    def answers(self) -> bool:
        return self.host.run(f"curl -sf --cacert {FOLDER}/ca.crt {DIRECTORY}").rc == 0

    def root(self) -> str:
        """The CA certificate of pebble, a new one with each of its starts."""
        return self.host.check_output(f"curl -sf --cacert {FOLDER}/ca.crt https://localhost:15000/roots/0")

    def playbook(self, **settings: Any) -> subprocess.CompletedProcess[str]:
        return self.stack.playbook("playbooks/nginx.yml", "-e", json.dumps(self.settings | settings))

    def certificate(self, trusted: str, name: str | None = None) -> dict[str, Any]:
        """What nginx shows under the name; nothing if the trusted CA, in PEM, did not sign it for that name."""
        context = ssl.create_default_context(cadata=trusted)
        with (
            contextlib.suppress(ssl.SSLCertVerificationError),
            socket.create_connection((self.stack.address(self.node), 443), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=name or self.name) as connection,
        ):
            return connection.getpeercert() or {}
        return {}

    def own_ca(self) -> str:
        return self.stack.ca_file.read_text()

    def metric(self, name: str) -> float | None:
        """A figure of the file that the node exporter reads; none if there is no such figure."""
        said = self.host.run("cat /var/lib/prometheus/node-exporter/acme.prom").stdout
        found = dict(line.split() for line in said.splitlines() if not line.startswith("#"))
        return float(found[name]) if name in found else None

    def nginx(self) -> str:
        """The main process of nginx, which a reload leaves and a restart does not."""
        return self.host.check_output("systemctl show --property=MainPID --value nginx.service")


@pytest.fixture(scope="module")
def acme(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    found = Acme(stack, tmp_path_factory.mktemp("acme"))
    yield found
    found.stop()
    stack.playbook("playbooks/nginx.yml")
    found.host.run(f"rm -rf {FOLDER} /var/lib/private/nginx-acme; apt-get -qq purge pebble dehydrated")


def test_without_an_answer_of_the_server_the_own_ca_serves_and_the_run_warns(acme: Acme) -> None:
    done = acme.playbook()
    message = " ".join(done.stdout.split())
    assert f"WARNING: {DIRECTORY} gave no certificate for {acme.name}" in message
    assert "curl returned with 7" in message, "what the client said is missing"
    assert "failed=0" in message
    assert acme.certificate(acme.own_ca())
    assert acme.metric("hothouse_acme_renewal_failed") == 1
    assert acme.metric("hothouse_acme_expiry_timestamp_seconds") is None


def test_a_certificate_is_obtained_and_served_without_a_restart(acme: Acme, wait: Callable[..., Any]) -> None:
    acme.start()
    wait(acme.answers, "pebble", 20)
    before = acme.nginx()
    done = acme.playbook()
    assert "WARNING" not in done.stdout
    shown = wait(lambda: acme.certificate(acme.root()), "the certificate", 20)
    assert shown["subjectAltName"] == (("DNS", acme.name),)
    assert acme.nginx() == before
    assert acme.metric("hothouse_acme_renewal_failed") == 0
    assert acme.metric("hothouse_acme_expiry_timestamp_seconds") == ssl.cert_time_to_seconds(
        shown["notAfter"]
    )


def test_nobody_but_root_reads_the_keys(acme: Acme) -> None:
    keys = acme.host.check_output(
        "find /var/lib/private/nginx-acme /etc/nginx/acme -name '*key*.pem' -o -name certificate.pem"
    ).split()
    assert {Path(key).name.partition("-")[0].partition(".")[0] for key in keys} == {
        "account_key", "privkey", "certificate",
    }  # fmt: skip
    for user in ("www-data", "nobody"):
        for key in keys:
            assert acme.host.run(f"setpriv --reuid={user} --regid={user} --clear-groups cat {key}").rc != 0, (
                key
            )


def test_a_rerun_changes_nothing_and_asks_nobody(acme: Acme) -> None:
    asked = "journalctl --unit=pebble --output=cat | wc --lines"
    before = acme.host.check_output(asked)
    done = acme.playbook()
    assert "changed=0" in done.stdout
    assert acme.host.check_output(asked) == before


def test_the_timer_renews_by_a_service_and_nginx_goes_on(acme: Acme, wait: Callable[..., Any]) -> None:
    timer = acme.host.service("nginx-acme.timer")
    assert timer.is_enabled and timer.is_running
    shown = acme.host.check_output(
        "systemctl show --property=Unit,RandomizedDelayUSec,Persistent nginx-acme.timer"
    )
    assert set(shown.split("\n")) == {"Unit=nginx-acme.service", "RandomizedDelayUSec=11h", "Persistent=yes"}
    before, process = acme.certificate(acme.root()), acme.nginx()
    acme.host.check_output("systemctl start nginx-acme.service")
    # nginx answers a reload before its old processes have left the port.
    number = before["serialNumber"]
    wait(lambda: acme.certificate(acme.root())["serialNumber"] != number, "the new certificate", 20)
    assert acme.nginx() == process


def test_the_client_is_fenced_in(acme: Acme) -> None:
    said = acme.host.check_output("systemd-analyze security --no-pager nginx-acme.service").splitlines()[-1]
    assert float(said.split(": ")[1].split()[0]) <= 1.5, said
    assert acme.host.check_output("systemctl show --property=DynamicUser --value nginx-acme.service") == "yes"


def test_another_name_is_another_certificate(acme: Acme, wait: Callable[..., Any]) -> None:
    other = f"www.{acme.name}"
    acme.playbook(nginx_alternative_names=[other])
    names = (("DNS", acme.name), ("DNS", other))
    wait(lambda: acme.certificate(acme.root())["subjectAltName"] == names, "the new certificate", 20)
    assert acme.certificate(acme.root(), other)


def test_a_server_that_is_gone_is_seen_and_the_old_certificate_goes_on(acme: Acme) -> None:
    root = acme.root()
    before = acme.certificate(root)
    acme.stop()
    assert acme.host.run("systemctl start nginx-acme.service").rc != 0
    acme.host.check_output("journalctl --sync")
    assert "curl returned with 7" in acme.host.check_output(
        "journalctl --unit=nginx-acme --lines=20 --output=cat"
    )
    assert acme.metric("hothouse_acme_renewal_failed") == 1
    assert acme.metric("hothouse_acme_expiry_timestamp_seconds") == ssl.cert_time_to_seconds(
        before["notAfter"]
    )
    done = acme.playbook(nginx_alternative_names=[f"www.{acme.name}"])
    assert "gave no certificate" in " ".join(done.stdout.split())
    assert acme.certificate(root)["serialNumber"] == before["serialNumber"]


def test_the_way_back_to_the_own_ca_leaves_nothing_running(acme: Acme, wait: Callable[..., Any]) -> None:
    acme.stack.playbook("playbooks/nginx.yml")
    wait(lambda: acme.certificate(acme.own_ca()), "the certificate of the own CA", 20)
    assert acme.stack.request("/").status == 401
    units = acme.host.check_output("systemctl list-units --all --plain --no-legend 'nginx-acme*'")
    links = acme.host.run("ls /etc/systemd/system/timers.target.wants").stdout
    assert "nginx-acme" not in units + links
    for path in ("/etc/hothouse/acme", "/etc/nginx/acme", "/var/lib/prometheus/node-exporter/acme.prom"):
        assert not acme.host.file(path).exists, path
    assert "changed=0" in acme.stack.playbook("playbooks/nginx.yml").stdout
