"""Filters that turn the inventory's data into what templates print and tasks apply."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import sys
from pathlib import Path, PurePath
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any
from urllib.parse import urlsplit

import bcrypt
from ansible.errors import AnsibleFilterError
from cryptography import x509

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_addresses as addresses  # found by the line above
import hothouse_authorities as authorities  # found by the line above
import hothouse_variable_types as types

# What a Sentinel remembers of the primary, as it writes it down.
EPOCH = re.compile(r"sentinel config-epoch hothouse ([0-9]{1,18})")
MONITOR = re.compile(r"sentinel monitor hothouse ([!-~]+) [0-9]{1,5} [0-9]+")

# bcrypt writes base64 in an order of its own.
BCRYPT_ALPHABET = str.maketrans(
    f"{ascii_uppercase}{ascii_lowercase}{digits}+/", f"./{ascii_uppercase}{ascii_lowercase}{digits}"
)


def worker_instances(pools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per pool and replica: the `name` of the unit's instance, the worker's `options`, and its `queues`.

    Sizes in `…_mb` are MiB, limits are seconds; keys as in roles/worker/meta/argument_specs.yml. `memory_max` of an
    entry is for systemd's MemoryMax=.
    """
    instances = []
    for pool in pools:
        options = [
            f"--queues={','.join(pool['queues'])}",
            f"--concurrency={pool.get('concurrency', 2)}",
            f"--pool={pool.get('pool', 'prefork')}",
        ]
        for key, option, factor in (
            ("prefetch_multiplier", "--prefetch-multiplier", 1),
            ("time_limit", "--time-limit", 1),
            ("soft_time_limit", "--soft-time-limit", 1),
            ("max_tasks_per_child", "--max-tasks-per-child", 1),
            ("max_memory_per_child_mb", "--max-memory-per-child", 1024),
        ):
            if pool.get(key) is not None:
                options.append(f"{option}={int(pool[key]) * factor}")
        instances += [
            {
                "name": f"{pool['name']}-{replica}",
                "options": options,
                "queues": list(pool["queues"]),
                "memory_max": f"{int(pool['memory_max_mb'])}M" if pool.get("memory_max_mb") else "infinity",
            }
            for replica in range(1, int(pool.get("replicas", 1)) + 1)
        ]
    return instances


def transport_obstacle(settings: dict[str, Any]) -> str:
    """Why the package hothouse_transport cannot be used with these Celery settings; nothing if it can."""
    options = settings.get("broker_transport_options") or {}
    if list(options.get("priority_steps", [0])) != [0]:
        return "broker_transport_options.priority_steps asks for priorities"
    if not options.get("ack_emulation", True):
        return "broker_transport_options.ack_emulation is off"
    for name in ("task_queue_max_priority", "task_default_priority"):
        if settings.get(name) is not None:
            return f"{name} asks for priorities"
    return ""


def environment_words(words: list[str]) -> str:
    """Words for a variable of an environment file. systemd unquotes twice: in the file, and as a unit splits it."""

    def escape(text: str) -> str:
        return re.sub(r"""([\\"'])""", r"\\\1", text)

    return escape(escape(" ".join(words)))


def systemd_quoted(text: str) -> str:
    """A value for a line of an environment file, as systemd reads it: everything stands for itself but these two."""
    return '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'


def yaml_quoted(text: str) -> str:
    """A text as a YAML scalar. JSON does not escape all that YAML takes for the end of a line, or does not take."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda match: f"\\u{ord(match[0]):04x}", quoted
    )


def worker_files(instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries for hothouse_files: the options of each instance of celery-worker@.service, and its limit of memory."""
    return [
        entry
        for instance in instances
        for folder in [f"/etc/systemd/system/celery-worker@{instance['name']}.service.d"]
        for entry in (
            {
                "path": f"/etc/hothouse/worker-{instance['name']}.env",
                "content": "# roles/worker: a pool of worker_pools in the inventory\n"
                f"WORKER_OPTIONS={environment_words(instance['options'])}\n",
            },
            {"path": folder, "state": "directory"},
            {
                "path": f"{folder}/memory.conf",
                "content": "# roles/worker: memory_max_mb of a pool of worker_pools in the inventory\n"
                f"[Service]\nMemoryMax={instance['memory_max']}\n",
            },
        )
    ]


def memory_wanted(pools: list[dict[str, Any]], redis: str = "0") -> int:
    """MiB that the workers of a host, those with a limit, and Redis may take together.

    `redis` as in its configuration: a number of bytes, or one with k, kb, m, mb, g or gb.
    """
    workers = sum(int(pool.get("memory_max_mb") or 0) * int(pool.get("replicas", 1)) for pool in pools)
    match = re.fullmatch(r"(\d+)([kmg]?)(b?)", str(redis).strip().lower())
    if not match:
        raise AnsibleFilterError(f"redis_maxmemory: {redis!r} is no size such as 256mb")
    unit = (1024 if match[3] else 1000) ** ("", "k", "m", "g").index(match[2])
    return workers + int(match[1]) * unit // 1024**2


def worker_units(instances: list[dict[str, Any]], restart_after: list[str]) -> list[dict[str, Any]]:
    """Entries for hothouse_units: each instance enabled, started, and restarted after its files changed.

    Not after its limit of memory did: systemd puts that in force for a worker that runs.
    """
    return [
        {
            "name": f"celery-worker@{instance['name']}.service",
            "enabled": True,
            "state": "started",
            "restart_after": [*restart_after, f"/etc/hothouse/worker-{instance['name']}.env"],
        }
        for instance in instances
    ]


def credential_files(credentials: dict[str, str], owner: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: each credential of the noun `owner` in a file that only root reads."""
    return [
        {
            "path": f"/etc/hothouse/credentials/{owner}_{name}",
            "content": f"{value}\n",
            "mode": "0600",
            "secret": True,
        }
        for name, value in sorted(credentials.items())
    ]


def environment_folder(sources: list[str]) -> str:
    """The folder of the environment among the sources of an inventory (paths, as they were given).

    It is the first one with common.yml in its group_vars: an overlay may stand before or behind it. Raises
    AnsibleFilterError if there is no folder at all, only names of hosts.
    """
    folders = types.source_folders(sources)
    if not folders:
        raise AnsibleFilterError("the inventory is no file and no folder; give -i inventories/ENV")
    own = (folder for folder in folders if (folder / "group_vars/all/common.yml").exists())
    return str(next(own, folders[0]))


def worker_queues(hosts: list[Any]) -> dict[str, list[str]]:
    """The queues that each worker of these hosts (their variables) consumes, by its name in Celery and Flower."""
    return {
        f"{instance['name']}@{host['inventory_hostname']}": instance["queues"]
        for host in hosts
        for instance in worker_instances(host["worker_pools"])
    }


def scrape_targets(hosts: list[Any], port: int, prometheus: str) -> list[dict[str, str]]:
    """Where the host `prometheus` finds a service of these hosts (their variables): `instance`, `address`, `scheme`."""
    return [
        {
            "instance": host["inventory_hostname"],
            "address": f"{'127.0.0.1' if local else addresses.bracketed(host['private_address'])}:{port}",
            "scheme": "http" if local else "https",
        }
        for host in hosts
        for local in [host["inventory_hostname"] == prometheus]
    ]


def host_certificates(hosts: list[Any]) -> list[dict[str, Any]]:
    """Entries for hothouse_credentials: what each of these hosts (their variables) shows to the others."""
    return [
        {
            "name": f"host_{host['inventory_hostname']}",
            "common_name": host["inventory_hostname"],
            "alt_names": list(dict.fromkeys([host["inventory_hostname"], host["private_address"]])),
            "client_auth": True,
        }
        for host in hosts
    ]


def services_of(services: list[dict[str, Any]], name: str, hostvars: Any) -> list[dict[str, Any]]:
    """Those of `private_services` that the host `name` offers to other hosts.

    Each with `name`, `port`, `proxied`, and of the other hosts that may connect `clients` (their names) and
    `client_addresses`.
    """
    offered = []
    for service in services:
        if name not in service["hosts"]:  # before its clients, which Ansible works out when they are read
            continue
        if clients := [client for client in service["clients"] if client != name]:
            offered.append(
                {
                    "name": service["name"],
                    "port": int(service["port"]),
                    "proxied": bool(service.get("proxied", False)),
                    "clients": clients,
                    "client_addresses": [hostvars[client]["private_address"] for client in clients],
                }
            )
    return offered


def servers_of(services: list[dict[str, Any]], name: str, hostvars: Any) -> dict[str, str]:
    """The other hosts to which the host `name` connects for `private_services`, and their addresses."""
    hosts = {
        host
        for service in services
        if name in service["clients"]
        for host in service["hosts"]
        if host != name
    }
    return {host: hostvars[host]["private_address"] for host in sorted(hosts)}


def route_faults(lines: list[str], own: str, servers: dict[str, str], hostvars: Any) -> list[str]:
    """Which of its `servers` (as `servers_of` returns them) a host would not reach from its private_address `own`.

    lines: what the host said, `route ADDRESS` and the answer of `ip route get` for each. A firewall lets in the
    private_address alone, unless rules of its host's own let in more.
    """
    faults = []
    for server, address in servers.items():
        said = next((line for line in lines if line.startswith(f"route {address} ")), "")
        source = re.search(r" src (\S+)", said)
        if not source:
            if "unreachable" in said or "No route" in said:
                faults.append(f"has no way to {server} ({address})")
            continue
        found = addresses.address_of(source[1])
        values = hostvars[server]
        own_rules = values.get("prepare_firewall_rules") or []
        if (
            str(found) != own
            and values.get("prepare_firewall", True)
            and not any(
                found in addresses.network_of(text)
                for rule in own_rules
                for text in rule.get("from") or ["0.0.0.0/0", "::/0"]
            )
        ):
            faults.append(f"would connect to {server} ({address}) from {found}")
    return faults


def firewall_rules(
    services: list[dict[str, Any]],
    ssh_port: int,
    ssh_addresses: list[str],
    public_ports: list[int],
    own: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What a host lets in: `name`, `protocol`, `port` (or a range of them) and, unless it is for anybody, `from`.

    `services` as `services_of` returns them, `own` as prepare_firewall_rules.
    """
    return [
        {"name": "ssh", "protocol": "tcp", "port": ssh_port, "from": ssh_addresses},
        *({"name": "public", "protocol": "tcp", "port": port, "from": []} for port in public_ports),
        *(
            {
                "name": service["name"],
                "protocol": "tcp",
                "port": service["port"],
                "from": service["client_addresses"],
            }
            for service in services
        ),
        *({"name": "own", "protocol": "tcp", "from": [], **rule} for rule in own),
    ]


def nft_rules(rules: list[dict[str, Any]]) -> list[str]:
    """The lines of nftables for what `firewall_rules` returns."""
    lines = []
    for rule in rules:
        end = f'{rule["protocol"]} dport {rule["port"]} accept comment "{rule["name"]}"'
        networks: list[Any] = sorted({addresses.network_of(text) for text in rule["from"]}, key=str)
        if not networks:
            lines.append(end)
        for family, version in (("ip", 4), ("ip6", 6)):
            same = [network for network in networks if network.version == version]
            # nft refuses networks that overlap.
            widest = [
                item for item in same if not any(item != other and item.subnet_of(other) for other in same)
            ]
            names = [str(item.network_address if item.num_addresses == 1 else item) for item in widest]
            if names:
                lines.append(f"{family} saddr {{ {', '.join(names)} }} {end}")
    return lines


def clock_skew(asked: dict[str, dict[str, Any]], limit: float) -> list[str]:
    """How far each host's clock is ahead of the controller's, if two of these clocks are over `limit` seconds apart.

    `asked` are results of hothouse_ask by host. Only what is certain counts: between the bounds of a `clock` it may be
    anything.
    """
    bounds = {"the controller": [0.0, 0.0], **{name: result["clock"] for name, result in asked.items()}}
    if max(least for least, _ in bounds.values()) - min(most for _, most in bounds.values()) <= limit:
        return []
    middles = {name: sum(clock) / 2 for name, clock in bounds.items() if name in asked}
    return [f"{name} {middle:+.1f} s" for name, middle in sorted(middles.items(), key=lambda item: item[1])]


def release_faults(asked: dict[str, dict[str, Any]]) -> list[str]:
    """How hosts differ from what a finished deployment leaves: one release on all, and no service older than it.

    asked: host → what hothouse_ask returned of roles/prepare/vars/main.yml, __prepare_ask_release.
    """
    releases: dict[str, list[str]] = {}
    faults: list[str] = []
    for host, result in asked.items():
        said = {
            word: rest
            for line in result["stdout_lines"]
            for word, _, rest in [line.partition(" ")]
            if word in ("release", "services")
        }
        if "release" not in said:
            continue
        release, moved = said["release"].split()
        releases.setdefault(release, []).append(host)
        # systemctl puts an empty line between two units, here two spaces.
        units = [
            dict(pair.split("=", 1) for pair in block.split())
            for block in said["services"].split("  ")
            if block
        ]
        older = [
            unit["Id"]
            for unit in units
            if unit["ActiveState"] not in ("inactive", "failed")
            and unit["ExecMainStartTimestamp"].startswith("@")
            and int(unit["ExecMainStartTimestamp"][1:]) < int(moved)
        ]
        if older:
            faults.append(
                f"{', '.join(older)} of {host} started before the release {release} was put into service, and may run "
                "an older one. playbooks/worker.yml and playbooks/beat.yml restart them."
            )
    if len(releases) > 1:
        named = "; ".join(f"{', '.join(hosts)}: {release}" for release, hosts in releases.items())
        faults.insert(
            0,
            f"The hosts have different releases of the application in service ({named}): a deployment did not reach "
            "all of them. Run playbooks/app.yml playbooks/worker.yml playbooks/beat.yml, or site.yml, for all hosts.",
        )
    return faults


def authority_of(lines: list[str]) -> str:
    """The certificates, in PEM, that a host said it trusts as its environment's; an empty string if it has none.

    Lines as roles/prepare/vars/main.yml, __prepare_ask_authority, has them printed, others in between.
    """
    for line in lines:
        if match := re.fullmatch(r"authority ([A-Za-z0-9+/=]+)", line.strip()):
            try:
                return base64.b64decode(match[1], validate=True).decode()
            except ValueError:
                return ""
    return ""


def authority_fault(lines: list[str], credentials: dict[str, str], host: str, file: str) -> str:
    """Why a host that said these lines is not one of the credentials' environment; empty if it is, or is new."""
    return authorities.refusal(host, file) if authorities.foreign(authority_of(lines), credentials) else ""


def lost_credentials(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What hosts said of an earlier run, from the results of roles/prepare/tasks/lost.yml.

    The `hosts` that have credentials, the `authorities` that hosts trust (host → PEM), and who is `silent`.
    """
    asked = {result["item"]: result for result in results if not result.get("skipped")}
    said = {host: [line.strip() for line in result.get("stdout_lines", [])] for host, result in asked.items()}
    return {
        "hosts": [
            host for host, lines in said.items() if any(line.startswith("credential ") for line in lines)
        ],
        "authorities": {host: text for host, lines in said.items() if (text := authority_of(lines))},
        "silent": [host for host, lines in said.items() if "asked" not in lines],
    }


def upgrade_time(slot: int) -> str:
    """The time of day, HH:MM, at which the host with this number upgrades: from 2 o'clock on, 20 minutes each."""
    minutes = (2 * 60 + int(slot) * 20) % (24 * 60)
    return f"{minutes // 60:02}:{minutes % 60:02}"


def redis_roles(nodes: dict[str, str], said: dict[str, Any]) -> dict[str, Any]:
    """Who is the primary of these nodes (name → address), from what they said themselves.

    `said` are results of roles/redis/tasks/primary.yml by host, of the hosts that are in the run. Returns the
    `primary`, whether it is `deployed` (a Sentinel knows it, and it has data), and which nodes are `known` to have a
    role. Never guesses: raises AnsibleFilterError where a wrong primary would cost data.
    """
    lines = {name: [line.strip() for line in result["stdout_lines"]] for name, result in said.items()}
    data = [name for name in nodes if "data" in lines.get(name, [])]
    known = [name for name in nodes if "known" in lines.get(name, [])]
    missing = [name for name in nodes if name not in lines]
    untouched = "nothing was changed on the redis hosts"

    views = []
    for found in lines.values():
        # Sentinel wrote them, and a broken disk may have had a part in it.
        epochs = [int(match[1]) for match in map(EPOCH.fullmatch, found) if match]
        views += [(max(epochs, default=0), match[1]) for match in map(MONITOR.fullmatch, found) if match]
    if views:
        # Of two failovers the later one counts.
        address = max(views)[1]
        primary = {address: name for name, address in nodes.items()}.get(address)
        if primary is None:
            raise AnsibleFilterError(
                f"The primary of Redis is {address}, which is no host of the group `redis` any more; {untouched}. Put "
                "it back into hosts.yml, make another the primary (`systemctl stop redis-server` on it hands over), "
                "then take it out."
            )
        if primary in lines and primary not in data and (data or missing):
            whose = f"{', '.join(data)} has" if data else f"{', '.join(missing)} may have"
            raise AnsibleFilterError(
                f"The Sentinels take {primary} for the primary of Redis, but it has no data (a lost disk?), and "
                f"{whose}; {untouched}. See that Redis and Sentinel run on the others, wait until "
                "`hothouse-redis-cli --primary ROLE` on one of them answers, and run this again."
            )
        own = [
            name
            for name in data
            if name != primary
            and not any(line.startswith(("replicaof ", "sentinel ")) for line in lines[name])
        ]
        if own:
            others = ", ".join(name for name in lines if name not in own)
            raise AnsibleFilterError(
                f"{own[0]} has data of its own, but the Sentinels of {others} remember {primary} as the primary of "
                f"Redis, from an earlier time; {untouched}. Decide whose data stay. On each host whose data may go: "
                "systemctl stop redis-server redis-sentinel, and move what is in /var/lib/redis away. Then run this "
                "again."
            )
        return {"primary": primary, "deployed": primary not in lines or primary in data, "known": known}

    if missing:
        raise AnsibleFilterError(
            f"No Sentinel on {', '.join(lines)} knows a primary of Redis, and {', '.join(missing)} is not part of this "
            f"run (--limit?); {untouched}. Run it with all of them."
        )
    own = [name for name in nodes if not any(line.startswith("replicaof ") for line in lines[name])]
    alone = [name for name in own if name in data]
    if len(alone) > 1:
        raise AnsibleFilterError(
            f"{' and '.join(alone)} have data of their own, and all but one would lose them; {untouched}. Decide whose "
            "data stay. On each other host: systemctl stop redis-server, and move what is in /var/lib/redis away. Then "
            "run this again."
        )
    seeded = [name for name in own if name in known]
    return {"primary": (alone or seeded or list(nodes))[0], "deployed": False, "known": known}


def bcrypt_hash(password: str, user: str, rounds: int = 10) -> str:
    """The hash of a login that nginx, Prometheus and Alertmanager read; 2 ** rounds iterations.

    The salt follows from the user's name, so that a rerun writes the same hash, and never from the password, which it
    would give away.
    """
    digest = hashlib.sha256(f"hothouse:{user}".encode()).digest()[:16]
    letters = base64.b64encode(digest).decode()[:22].translate(BCRYPT_ALPHABET)
    return bcrypt.hashpw(password.encode(), f"$2b${rounds:02d}${letters}".encode()).decode()


def host_names(names: list[str]) -> list[str]:
    """Names and addresses as clients write them into Host and SNI: lower case, IDNA, an IPv6 address in brackets."""
    found = []
    for name in names:
        try:
            addresses.address_of(name)
            found.append(addresses.bracketed(name))
        except addresses.NoAddressError:
            text = name.rstrip(".").lower()
            found.append(text if text.isascii() else text.encode("idna").decode())
    return list(dict.fromkeys(found))


def leads_home(name: str) -> bool:
    """Whether a name or address means every machine to itself, so that no other host can be asked under it."""
    try:
        return addresses.address_of(name).is_loopback
    except addresses.NoAddressError:
        return name.rstrip(".").lower().rpartition(".")[2] == "localhost"


def asked_name(url: str, names: list[str]) -> str:
    """Under which name or address to ask at `url` for what has these names, the first of which is its own.

    That of the URL itself; but where it has an address which is not among the names, the first of them.
    """
    host = urlsplit(url).hostname or ""
    try:
        addresses.address_of(host)
    except addresses.NoAddressError:
        return host
    return host if addresses.bracketed(host) in host_names(names) else names[0]


def nginx_exactly(text: str) -> str:
    """A key of a `map` of nginx that matches this text alone; a plain key would match in any case of letters."""
    pattern = rf"~^{re.escape(text)}\z"
    escaped = pattern.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def certificate_expiry(pem: str) -> int:
    """When the first certificate of a chain expires, in Unix time."""
    return int(x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.timestamp())


def copies(names: list[str], source: str, folder: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: files of the controller in `source` as they are, in a folder of the host."""
    folders = sorted({str(parent) for name in names for parent in PurePath(name).parents} - {"."})
    return [
        {"path": folder, "state": "directory"},
        *({"path": f"{folder}/{name}", "state": "directory"} for name in folders),
        *({"path": f"{folder}/{name}", "source": f"{source}/{name}"} for name in names),
    ]


def python_package(source: str, folder: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: a package of Python on the controller, in a folder of the host."""
    path = Path(source)
    return copies(sorted(module.name for module in path.glob("*.py")), source, f"{folder}/{path.name}")


def rule_files(files: list[str], folder: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: rule files of the controller, each checked, in a folder of the host."""
    return [
        {"path": folder, "state": "directory"},
        *(
            {"path": f"{folder}/{PurePath(file).name}", "source": file, "validate": "promtool check rules %s"}
            for file in files
        ),
    ]


def absent(paths: list[str]) -> list[dict[str, str]]:
    """Entries for hothouse_files that remove these paths."""
    return [{"path": path, "state": "absent"} for path in dict.fromkeys(paths)]


def remains_command(nouns: dict[str, dict[str, Any]]) -> str:
    """What asks a host's shell which of these nouns are on it, and which of their files; read by `remains`."""
    tests = []
    for name, noun in nouns.items():
        paths = " ".join([*noun.get("files", []), *noun.get("data", []), noun["marker"]])
        say = f'if [ -e "$path" ] || [ -L "$path" ]; then echo "remains {name} $path"; fi'
        tests.append(f"[ ! -e {noun['marker']} ] || for path in {paths}; do {say}; done")
    return "; ".join(tests)


def remains(lines: list[str], nouns: dict[str, dict[str, Any]], wanted: list[str]) -> dict[str, list[Any]]:
    """What a host said that it has of nouns other than the `wanted`: their names, units and packages, and `files`
    and `data` as entries for hothouse_files.

    The marker of a noun is the last of its files, so that what was interrupted is found again.
    """
    found: dict[str, dict[str, Any]] = {}
    data, files = [], []
    for line in lines:
        match = re.fullmatch(r"remains (\w+) (/\S+)", line.strip())
        if not match or match[1] in wanted:
            continue
        noun, path = nouns.get(match[1], {}), match[2]
        for paths, globs in (
            (data, noun.get("data", [])),
            (files, [*noun.get("files", []), noun.get("marker", "")]),
        ):
            if any(fnmatch.fnmatchcase(path, glob) for glob in globs):
                paths.append(path)
                found[match[1]] = noun
    markers = [noun["marker"] for noun in found.values()]
    return {
        "nouns": list(found),
        "units": [unit for noun in found.values() for unit in noun.get("units", [])],
        "files": absent([*(path for path in files if path not in markers), *markers]),
        "data": absent(data),
        "packages": sorted({package for noun in found.values() for package in noun.get("packages", [])}),
    }


def as_specified(value: Any, name: str) -> Any:
    """What a variable's template gave, in the type of the variable's specification."""
    try:
        return types.convert(value, types.options()[name])
    except types.WrongType as error:
        raise AnsibleFilterError(types.complaint(name, error)) from None


class FilterModule:
    """Registers the filters with Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "as_specified": as_specified,
            "asked_name": asked_name,
            "authority_fault": authority_fault,
            "bcrypt_hash": bcrypt_hash,
            "bracketed": addresses.bracketed,
            "certificate_expiry": certificate_expiry,
            "clock_skew": clock_skew,
            "copies": copies,
            "credential_files": credential_files,
            "environment_folder": environment_folder,
            "firewall_rules": firewall_rules,
            "host_certificates": host_certificates,
            "host_names": host_names,
            "leads_home": leads_home,
            "mail_domain": addresses.mail_domain,
            "memory_wanted": memory_wanted,
            "lost_credentials": lost_credentials,
            "nft_rules": nft_rules,
            "nginx_exactly": nginx_exactly,
            "release_faults": release_faults,
            "redis_roles": redis_roles,
            "remains": remains,
            "remains_command": remains_command,
            "python_package": python_package,
            "route_faults": route_faults,
            "rule_files": rule_files,
            "systemd_quoted": systemd_quoted,
            "scrape_targets": scrape_targets,
            "servers_of": servers_of,
            "services_of": services_of,
            "transport_obstacle": transport_obstacle,
            "upgrade_time": upgrade_time,
            "yaml_quoted": yaml_quoted,
            "worker_files": worker_files,
            "worker_instances": worker_instances,
            "worker_queues": worker_queues,
            "worker_units": worker_units,
        }
