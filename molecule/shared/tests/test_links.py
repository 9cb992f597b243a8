"""Between hosts: encrypted, both sides verified, and only for who has business there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from shlex import quote
from typing import Any

import pytest
from conftest import Stack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from testssl import findings

pytestmark = pytest.mark.scenarios("prod")

CA, CERTIFICATE, KEY = (
    "/etc/hothouse/tls/ca.crt",
    "/etc/hothouse/tls/host.crt",
    "/etc/hothouse/credentials/host_key",
)
# Connects by TLS, says something, and tells whether the service behind answered. Only that is a proof: a client of TLS
# 1.3 holds the connection for made before the server looks at its certificate.
# Arguments: address, port, certificate, key, CA.
ASK = """
import socket, ssl, sys
address, port, certificate, key, ca = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
if certificate:
    context.load_cert_chain(certificate, key)
try:
    with socket.create_connection((address, int(port)), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname=address) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
            print("answered" if connection.recv(100) else "closed")
            print(connection.getpeercert()["serialNumber"])
except (ssl.SSLError, ConnectionError) as error:
    print("refused", error)
"""
OUTDATED = """
context.minimum_version = ssl.TLSVersion.TLSv1
context.maximum_version = ssl.TLSVersion.TLSv1_1
context.set_ciphers("DEFAULT:@SECLEVEL=0")
try:
"""
# Whether Redis is behind the loopback address: it wants a login of who says nothing else.
REDIS = """
import socket, sys
with socket.create_connection(("127.0.0.1", 6379), timeout=10) as connection:
    connection.sendall(b"PING\\r\\n")
    print(connection.recv(100).decode() or "closed")
"""


def python(stack: Stack, host: str, program: str, *arguments: str) -> str:
    """The output of a program on a host."""
    words = " ".join(quote(word) for word in arguments)
    encoded = base64.b64encode(program.encode()).decode()
    done = stack.host(host).run(f"python3 -c \"import base64; exec(base64.b64decode('{encoded}'))\" {words}")
    assert done.rc == 0, done.stderr
    return done.stdout


def offered(stack: Stack) -> list[tuple[str, dict[str, Any]]]:
    """Every host and what HAProxy offers on it."""
    return [
        (host, service) for host in stack.variables for service in stack.variables[host]["haproxy_services"]
    ]


def authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate that signed itself, of a name that would be let in."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    return builder.sign(key, hashes.SHA256()), key


@pytest.fixture(scope="module")
def stranger(stack: Stack) -> Iterator[Callable[[str], str]]:
    """Puts a certificate of another authority, made out to a name, on every host; returns its path without suffix."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            certificate, key = authority(name)
            pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
            form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            key_pem = key.private_bytes(serialization.Encoding.PEM, *form).decode()
            made[name] = f"/run/hothouse-test-{name}"
            for host in stack.variables:
                for suffix, text in (("crt", pem), ("key", key_pem)):
                    stack.host(host).check_output(f"printf %s {quote(text)} > {made[name]}.{suffix}")
        return made[name]

    yield make
    for host in stack.variables:
        stack.host(host).run("rm -f /run/hothouse-test-*")


def test_what_is_for_other_hosts_is_behind_haproxy(stack: Stack) -> None:
    names = {service["name"] for _, service in offered(stack)}
    assert {
        "flower",
        "prometheus",
        "alertmanager",
        "node_exporter",
        "redis_exporter",
        "nginx_exporter",
    } <= names


def test_every_client_gets_an_answer_with_its_hosts_certificate(stack: Stack) -> None:
    for host, service in offered(stack):
        for client in service["clients"]:
            said = python(stack, client, ASK, stack.address(host), str(service["port"]), CERTIFICATE, KEY, CA)
            assert said.startswith("answered"), (host, service["name"], client, said)


def test_nobody_else_gets_one(stack: Stack, stranger: Callable[[str], str]) -> None:
    """Asked on the host itself, which the firewall lets through: without a certificate, with one of another authority
    that has a client's name, and with one that is right but of a host that is no client."""
    for host, service in offered(stack):
        foreign = stranger(service["clients"][0])
        assert host not in service["clients"]
        for certificate, key in (("", ""), (f"{foreign}.crt", f"{foreign}.key"), (CERTIFICATE, KEY)):
            said = python(stack, host, ASK, stack.address(host), str(service["port"]), certificate, key, CA)
            assert said.startswith(("refused", "closed")), (host, service["name"], certificate, said)


def test_plain_text_gets_no_answer(stack: Stack) -> None:
    for host, service in offered(stack):
        ask = f"import urllib.request as r; r.urlopen('http://{stack.place(host, service['port'])}/', timeout=5)"
        said = stack.host(service["clients"][0]).run(f'python3 -c "{ask}"').stderr
        assert "HTTP Error" not in said and ("closed" in said or "reset" in said), (
            host,
            service["name"],
            said,
        )


def test_redis_is_reached_on_the_loopback_of_every_host_with_clients(stack: Stack) -> None:
    clients = [host for host in stack.variables if stack.variables[host]["haproxy_redis_nodes"]]
    assert set(stack.group("app") + stack.group("flower")) == set(clients)
    for host in clients:
        assert python(stack, host, REDIS).startswith("-NOAUTH"), host


def test_a_server_that_the_authority_did_not_certify_is_refused(
    stack: Stack, stranger: Callable[[str], str], wait: Callable[..., Any]
) -> None:
    """The clients are made to trust another authority; what was right before is then wrong."""
    worker, nginx = stack.group("worker")[0], stack.group("nginx")[0]
    foreign = stranger("nobody")

    def redis() -> str:
        return python(stack, worker, REDIS)

    def flower() -> int:
        return stack.request("/flower/", stack.login).status

    def trust(host: str, unit: str, source: str) -> None:
        stack.host(host).check_output(f"cat {source} > {CA} && systemctl reload {unit}")

    for host in (worker, nginx):
        stack.host(host).check_output(f"cp {CA} /run/hothouse-test-ca")
    try:
        trust(worker, "haproxy", f"{foreign}.crt")
        trust(nginx, "nginx", f"{foreign}.crt")
        wait(lambda: redis().startswith("closed"), "HAProxy without a way to Redis", 20)
        wait(lambda: flower() == 502, "nginx without a way to Flower", 20)
    finally:
        trust(worker, "haproxy", "/run/hothouse-test-ca")
        trust(nginx, "nginx", "/run/hothouse-test-ca")
    wait(lambda: redis().startswith("-NOAUTH"), "the way to Redis", 20)
    wait(lambda: flower() == 200, "the way to Flower", 20)


def test_certificates_are_for_the_name_and_the_address_of_their_host(stack: Stack) -> None:
    for host in stack.variables:
        certificate = x509.load_pem_x509_certificate(stack.host(host).file(CERTIFICATE).content)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [host]
        assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
            stack.address(host)
        ]
        assert certificate.not_valid_after_utc - datetime.now(UTC) > timedelta(days=29)
        key = stack.host(host).file(KEY)
        assert (key.user, key.mode) == ("root", 0o600), host


def test_nobody_answers_an_outdated_protocol(stack: Stack) -> None:
    """TLS 1.2 and 1.3 are spoken; a client that knows no better than 1.1 is refused."""
    old = ASK.replace("try:\n", OUTDATED, 1)
    for host, service in offered(stack):
        said = python(
            stack, service["clients"][0], old, stack.address(host), str(service["port"]), CERTIFICATE, KEY, CA
        )
        assert said.startswith("refused"), (host, service["name"], said)


@pytest.mark.parametrize("port", [6379, 26379])
def test_redis_and_sentinel_offer_no_weak_tls(stack: Stack, port: int) -> None:
    """With the host's certificate, without which they would not go on."""
    name = stack.group("redis")[0]
    host, client = stack.host(name), f"/run/hothouse-test-client-{port}.pem"
    host.check_output(f"umask 077 && cat {CERTIFICATE} {KEY} >{client}")
    try:
        assert findings(host, f"{name}:{port}", CA, stack.address(name), client, plain=True) == []
    finally:
        host.run(f"rm {client}")
