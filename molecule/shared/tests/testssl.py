"""What testssl.sh holds against a TLS server, asked from a host of the scenario."""

from __future__ import annotations

import json
from dataclasses import dataclass

from testinfra.host import Host

# A CA of one's own publishes no list of what it revoked: its certificates are replaced and end after 397 days. And what
# is there without an engine for GOST, nobody misses. Where no session tickets are given, testssl.sh fails to try one.
# A server of TLS 1.3 alone cannot be asked for NPN, which came before it.
ACCEPTED = ("cert_revocation", "engine_problem", "sessionresumption_ticket", "NPN")
# What it asks HTTP for, and says if there is none.
OF_HTTP = ("service", "BREACH")
CHECKS = (
    "--protocols --server-defaults --server-preference --std --fs --headers --vulnerable --severity MEDIUM"
    " --quiet --color 0 --warnings off --nodns min"
)


@dataclass
class Finding:
    """One thing at or above MEDIUM, or one that testssl.sh could not find out (WARN)."""

    name: str
    severity: str
    text: str


def findings(
    host: Host, target: str, ca_file: str, address: str = "", client: str = "", plain: bool = False
) -> list[Finding]:
    """Run testssl.sh on `host` against `target` (NAME:PORT) and list what it finds, without ACCEPTED.

    address: where the name leads to, if DNS does not say. ca_file: its CA, a path on the host. client: path on the host
    of a PEM file with a client's certificate and key (needs the testssl.sh of Debian 13). plain: the server speaks no
    HTTP.
    """
    if not host.exists("testssl"):
        host.check_output(
            "export DEBIAN_FRONTEND=noninteractive;"
            " apt-get -qq update && apt-get -qq install --no-install-recommends testssl.sh"
        )
    checks = CHECKS.replace("--headers ", "") if plain else CHECKS
    options = [f"--add-ca {ca_file}"]
    options += [f"--ip {address}"] if address else []
    options += ["-6"] if ":" in address or target.startswith("[") else []
    options += [f"--mtls {client}"] if client else []
    folder = host.check_output("mktemp --directory")
    try:
        done = host.run(
            f"cd {folder} && timeout 240 testssl {checks} {' '.join(options)} --jsonfile found.json {target} </dev/null"
        )
        # It ends with the number of what it disliked; without a result at all it never got to the server.
        assert host.file(f"{folder}/found.json").exists, done.stdout[-2000:] + done.stderr
        assert "Done 20" in done.stdout, done.stdout[-2000:]
        found = json.loads(host.check_output(f"cat {folder}/found.json"))
    finally:
        host.run(f"rm -rf {folder}")
    return [
        Finding(entry["id"], entry["severity"], entry["finding"])
        for entry in found
        if entry["id"] not in ACCEPTED + (OF_HTTP if plain else ())
    ]
