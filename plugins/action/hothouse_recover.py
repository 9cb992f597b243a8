"""Puts what the hosts know of the credentials into the controller's file. Documented in the module of this name."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ansible.errors import AnsibleActionFail
from cryptography import x509
from cryptography.exceptions import InvalidSignature

# Plugins are no package that could be imported by name.
_spec = importlib.util.spec_from_file_location(
    "hothouse_credentials_action", Path(__file__).with_name("hothouse_credentials.py")
)
assert _spec and _spec.loader
credentials = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = credentials
_spec.loader.exec_module(credentials)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "path": {"type": "str", "required": True},
    "require_vault": {"type": "bool", "default": False},
    "ca_file": {"type": "str"},
    "answers": {"type": "dict", "required": True, "no_log": True},
}
FOLDER = "/etc/hothouse/credentials/"
# Which credential a file holds as its whole text, which as the password of a URL, and which after a word.
TEXTS = {
    "flower_password": "flower_password",
    "flower_user": "flower_user",
    "monitor_flower_password": "flower_password",
    "monitor_password": "monitor",
    "redis_admin": "redis_admin",
    "redis_sentinel": "redis_sentinel",
}
URLS = {
    "app_redis_url": "redis_app",
    "beat_broker_url": "redis_beat",
    "flower_broker_url": "redis_flower",
    "worker_broker_url": "redis_worker",
}
WORDS = {
    "/etc/redis/replication.conf": ("redis_replica", r"^masterauth (\S+)$"),
    "/etc/haproxy/haproxy.cfg": ("redis_haproxy", r'send "AUTH haproxy ([^\\" ]+)\\r\\n"'),
}
AUTHORITIES = ("/etc/hothouse/ca.crt", "/etc/hothouse/tls/ca.crt", "/etc/nginx/hothouse-ca.crt")
REFERENCE = re.compile(r"\{\{\s*(?:credentials(?:\.(\w+)|\[['\"](\w+)['\"]\])|(\w+))\s*\}\}")


def read(lines: list[str]) -> dict[str, str]:
    """The files in a host's answer: path → content. Other lines, such as a greeting, are passed over."""
    files = {}
    for line in lines:
        if match := re.fullmatch(r"recovered (/\S+) (\S*)", line.strip()):
            try:
                files[match[1]] = base64.b64decode(match[2], validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                continue
    return files


def passwords(files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Name and value of each password of ours in a host's files."""
    for file, name in TEXTS.items():
        yield name, files.get(FOLDER + file, "").removesuffix("\n")
    for file, name in URLS.items():
        yield name, unquote(urlsplit(files.get(FOLDER + file, "").strip()).password or "")
    for path, (name, pattern) in WORDS.items():
        match = re.search(pattern, files.get(path, ""), re.MULTILINE)
        yield name, match[1] if match else ""
    for value in json.loads(files.get(f"{FOLDER}monitor_redis_passwords", "{}")).values():
        yield "redis_exporter", value


def own(variables: dict[str, Any]) -> dict[str, str]:
    """Which file holds which credential of the user's own, as far as the inventory only hands it on."""
    wanted = {f"app_{name}": text for name, text in dict(variables.get("app_credentials") or {}).items()}
    wanted["monitor_smtp_password"] = variables.get("monitor_smtp_password", "")
    found = {}
    for file, text in wanted.items():
        seen: set[str] = set()
        while match := REFERENCE.fullmatch(str(text).strip()):
            if name := match[1] or match[2]:
                found[file] = name
                break
            if match[3] in seen:
                break
            seen.add(match[3])
            text = variables.get(match[3], "")
    return found


def authorities(answers: dict[str, dict[str, str]]) -> list[x509.Certificate]:
    """Certificates of the environment's CA and of earlier ones that hosts still trust, the newest first."""
    found: dict[bytes, x509.Certificate] = {}
    for files in answers.values():
        for path in AUTHORITIES:
            text = files.get(path, "").encode()
            for certificate in x509.load_pem_x509_certificates(text) if text.strip() else []:
                found[certificate.signature] = certificate
    return sorted(found.values(), key=lambda one: one.not_valid_before_utc, reverse=True)


def pairs(host: str, files: dict[str, str], issuers: list[x509.Certificate]) -> Iterator[tuple[str, str]]:
    """Name and value of the certificates and keys of a host that one of the CAs issued."""
    for name, certificate_file, key_file in (
        (f"host_{host}", "/etc/hothouse/tls/host.crt", f"{FOLDER}host_key"),
        ("nginx", "/etc/nginx/hothouse.crt", "/etc/nginx/hothouse.key"),
    ):
        certificate, key = files.get(certificate_file, ""), files.get(key_file, "")
        if certificate and key and any(issued(certificate, issuer) for issuer in issuers):
            yield f"{name}_certificate", certificate
            yield f"{name}_key", key


def issued(text: str, issuer: x509.Certificate) -> bool:
    """Whether a certificate, in PEM, was issued by this authority."""
    try:
        x509.load_pem_x509_certificate(text.encode()).verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def recover(answers: dict[str, dict[str, str]], variables: dict[str, Any]) -> dict[str, str]:
    """All credentials that the hosts know: name → value. Raises AnsibleActionFail if they contradict each other."""
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    issuers = authorities(answers)
    for host, files in answers.items():
        mine = (
            (name, files.get(FOLDER + file, "").removesuffix("\n")) for file, name in own(variables).items()
        )
        for name, value in (*passwords(files), *mine, *pairs(host, files, issuers)):
            if value and host not in values[name][value]:
                values[name][value].append(host)
    contradictions = [
        f"`{name}` ({' / '.join(', '.join(hosts) for hosts in held.values())})"
        for name, held in sorted(values.items())
        if len(held) > 1
    ]
    if contradictions:
        raise AnsibleActionFail(
            f"Hosts hold different values of {', '.join(contradictions)}: a change of credentials was not finished. "
            f"Nothing was written. Leave out the hosts with the old value: --limit '!HOST'."
        )
    found = {name: next(iter(held)) for name, held in values.items() if held}
    if issuers:
        found["ca_certificate"] = credentials.public_pem(issuers[0])
    if issuers[1:]:
        found["ca_certificate_old"] = "".join(credentials.public_pem(one) for one in issuers[1:])
    if not found:
        raise AnsibleActionFail(
            f"None of these hosts has credentials of an environment: {', '.join(answers) or 'no host answered'}. "
            f"Nothing was written."
        )
    return found


class ActionModule(credentials.ActionModule):  # type: ignore[name-defined, misc]  # loaded by its path
    """Completes the credentials file with what hosts answered."""

    done = "recovered"

    def options(self) -> dict[str, Any]:
        _, options = self.validate_argument_spec(ARGUMENTS)
        return dict(options) | {"exclusive": None, "authorities": {}, "replace": False}

    def _completed(self, document: Any, options: dict[str, Any]) -> tuple[list[str], list[str]]:
        recovered = self.complete(document, options)
        return self._compare(document, options), recovered

    def _refusal(self, document: Any, ca_file: Path, readable: bool) -> str:
        return (
            f"{ca_file} is the certificate of another authority than the hosts have: these may be hosts of another "
            f"environment. Nothing was written. Look at their addresses in hosts.yml; if they are right, remove "
            f"{ca_file.name}."
        )

    def complete(self, document: Any, options: dict[str, Any]) -> list[str]:
        answers = {host: read(lines) for host, lines in options["answers"].items()}
        found = recover(answers, self._templar.available_variables)
        differing = [
            name for name, value in found.items() if document.has(name) and document.get(name) != value
        ]
        if differing:
            raise AnsibleActionFail(
                f"{document.path} has other values than the hosts for {', '.join(sorted(differing))}. Nothing was "
                f"written. Remove these lines to have the values of the hosts, or run site.yml to give the hosts those "
                f"of the file."
            )
        missing = sorted(name for name in found if not document.has(name))
        for name in missing:
            document.set(name, found[name])
        return missing
