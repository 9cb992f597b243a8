"""Checks of the whole inventory on the controller, before anything on a host is touched."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from ansible._internal._datatag._tags import Origin  # there is no other way to ask where a value was written
from ansible.errors import AnsibleActionFail, AnsibleError, AnsibleUndefinedVariable
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader
from ansible.utils.vars import load_extra_vars
from cryptography import x509
from cryptography.hazmat.primitives import serialization

sys.path.append(str(Path(__file__).parents[1] / "plugin_utils"))
import hothouse_variable_types as types  # found by the line above
from hothouse_addresses import Address, NoAddressError, address_of, network_of, unreachable

# Names that the deployment gives itself: as a regular expression, and why no other value has a place there.
OWN_ENVIRONMENT = {
    "PATH|PYTHONPATH|PYTHONHOME|PYTHONUNBUFFERED|REMAP_SIGTERM|WORKER_OPTIONS|HOTHOUSE_.*": "is set by the deployment",
    "CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|WATCHDOG_(USEC|PID)|LISTEN_.*|MAINPID|INVOCATION_ID|JOURNAL_STREAM": (
        "is set by systemd"
    ),
    "(CELERY_)?(BROKER_URL|RESULT_BACKEND)|CELERY_BROKER_(READ|WRITE)_URL": (
        "would be read by Celery, which would leave the deployment's Redis for what it names"
    ),
}
ENVIRONMENT_BYTES = 131072  # of NAME=VALUE, with the zero behind it

# Packages that the deployment itself needs in the application's lock file, and what for.
NEEDED_PACKAGES = {
    "celery": "the application is a Celery application",
    "redis": "Redis is the broker (install `celery[redis]`)",
    "celery-redbeat": "beat keeps its schedule and its lock in Redis",
}


# What several nouns have to agree on. Set for one group alone, it would hold on half of the way.
COMMON_VARIABLES = (
    "app_queues",
    "app_visibility_timeout_seconds",
    "credentials_ca_file",
    "credentials_file",
    "credentials_require_vault",
    "flower_readers",
    "monitor_app_gauges",
    "nginx_server_name",
    "redis_port",
    "redis_sentinel_port",
)

# The same for the hosts of the group `app`: one application, whose tasks any of them may get.
COMMON_APP_VARIABLES = (
    "app_celery",
    "app_confirm_replicas",
    "app_max_deliveries",
    "app_source",
    "app_task_routes",
    "app_transport",
)

# The rule of the transport, which is no package of the controller.
_spec = importlib.util.spec_from_file_location(
    "hothouse_transport_names", Path(__file__).parents[2] / "transport/src/hothouse_transport/names.py"
)
assert _spec and _spec.loader
queue_names = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(queue_names)


class Problems(list[str]):
    """What is wrong, each with where it is set and how to mend it."""

    def add(self, what: str, where: str, mend: str) -> None:
        text = f"{what}\n    where: {where}\n    mend:  {mend}"
        if text not in self:
            self.append(text)


def check_groups(
    problems: Problems, groups: dict[str, list[str]], nouns: set[str], needed: list[str]
) -> None:
    """Every needed group has hosts, every host has a group that means something, Redis has a majority."""
    for group in needed:
        if not groups.get(group):
            problems.add(
                f"the group `{group}` has no host, and the stack does not work without one",
                "hosts.yml of the inventory",
                f"name at least one host under `{group}:`",
            )
    for host in groups.get("all", []):
        if not any(host in groups.get(noun, []) for noun in nouns):
            problems.add(
                f"the host `{host}` is in no group of the stack, so nothing would be installed on it",
                "hosts.yml of the inventory",
                f"put it into one of {', '.join(sorted(nouns))}, or remove it",
            )
    count = len(groups.get("redis", []))
    if count > 1 and count % 2 == 0:
        problems.add(
            f"the group `redis` has {count} hosts: a majority of them has to agree on who is the primary, so "
            + (
                "none may fail, which is worse than one host"
                if count == 2
                else f"no more may fail than of {count - 1}"
            ),
            "hosts.yml of the inventory",
            f"name {' or '.join(str(number) for number in (count - 1, count + 1))} hosts under `redis:`",
        )
    for host in sorted({*groups.get("worker", []), *groups.get("beat", [])} - {*groups.get("app", [])}):
        problems.add(
            f"the host `{host}` is to run a worker or beat, but is not in the group `app`, so it has no application",
            "hosts.yml of the inventory",
            "make `worker` and `beat` children of `app`",
        )
    for group in ("flower", "monitor"):
        if len(groups.get(group, [])) > 1:
            problems.add(
                f"the group `{group}` has {len(groups[group])} hosts; it runs on one",
                "hosts.yml of the inventory",
                f"leave one host under `{group}:`",
            )


def check_names(
    problems: Problems,
    host: str,
    names: Iterable[str],
    specs: dict[str, dict[str, Any]],
    where: dict[str, str],
) -> None:
    """No variable that begins like a role's is unknown to that role: a misspelled one would pass in silence."""
    for name in names:
        role = name.partition("_")[0]
        place = where.get(name, f"variables of the host `{host}`")
        if role in ("credentials", "private") and "_" in name and name not in types.ENVIRONMENT:
            near = difflib.get_close_matches(name, types.ENVIRONMENT, n=1)
            if role == "private" and not near:  # inventory plugins know more of it, such as private_dns_name
                continue
            near = near or [known for known in types.ENVIRONMENT if known.startswith(role)]
            problems.add(
                f"`{name}` is no variable of an environment",
                place,
                f"did you mean {' or '.join(f'`{known}`' for known in near)}?",
            )
        elif role in specs and "_" in name and name not in specs[role]:
            near = difflib.get_close_matches(name, specs[role], n=1)
            problems.add(
                f"`{name}` is no variable of the role `{role}`",
                place,
                (f"did you mean `{near[0]}`? " if near else "")
                + f"All of them are in roles/{role}/README.md",
            )
        elif (
            not name.startswith(("_", "ansible_"))
            and name not in types.options()
            and (near := difflib.get_close_matches(name, types.options(), n=1, cutoff=0.9))
            and near[0] not in name  # our_app_source may be what app_source is made of
        ):
            problems.add(
                f"`{name}` is no variable of any role",
                place,
                f"did you mean `{near[0]}`? If it is one of your own, give it a name that is less like that",
            )


def check_reachable(problems: Problems, host: str, raw: Mapping[str, Any], where: dict[str, str]) -> None:
    """A host has an address or a name, as SSH takes it."""
    private = raw.get(types.given_name("private_address", raw))
    if "ansible_host" not in raw and str(private) == "{{ ansible_host }}":
        problems.add(
            f"the host `{host}` has no address",
            "hosts.yml of the inventory",
            f"correct the name, or set ansible_host of `{host}`",
        )
    text = str(raw.get("ansible_host", ""))
    if isinstance(raw.get("ansible_host"), int):
        problems.add(
            f"the ansible_host of `{host}` is the number {text}, which YAML makes of digits and colons",
            where.get("ansible_host", "hosts.yml of the inventory"),
            "put the address in quotes",
        )
    if types.is_template(text) or not (set("[]:") & set(text)):
        return
    try:  # a zone is good for SSH
        address_of(text.partition("%")[0])
    except NoAddressError as error:
        problems.add(
            f"the ansible_host of `{host}` is {text}, which SSH cannot reach: it {error}",
            where.get("ansible_host", "hosts.yml of the inventory"),
            "write an address like 2001:db8::10 or 192.0.2.10, or a name; the port goes into ansible_port",
        )


def check_pools(problems: Problems, host: str, pools: list[dict[str, Any]], where: str) -> None:
    """Pools have names of their own that fit a unit's name."""
    names = [str(pool.get("name")) for pool in pools]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            problems.add(
                f"the worker pool name `{name}` is no name for a unit",
                where,
                "use lower-case letters, digits and _, beginning with a letter",
            )
        if names.count(name) > 1:
            problems.add(f"two worker pools of `{host}` are called `{name}`", where, "rename one of them")


# MiB that were measured (docs/security.md): a worker's main process, each child, and a worker without children.
WORKER_MB, CHILD_MB, THREADS_MB = 48, 24, 64
LEAST_MB = {"beat_memory_max_mb": 96, "monitor_prometheus_memory_max_mb": 128}
# Variables of a role that `check_memory` looks at.
MEMORY_LIMITS = {
    "beat": ["beat_memory_max_mb"],
    "flower": ["flower_max_tasks", "flower_memory_max_mb"],
    "monitor": ["monitor_prometheus_memory_max_mb"],
}


def check_memory(problems: Problems, values: Mapping[str, Any], where: dict[str, str]) -> None:
    """Each limit of memory, in MiB, leaves what the service needs before it has done anything."""
    for pool in values.get("worker_pools", []):
        if pool.get("memory_max_mb") is None:
            continue
        limit, prefork = pool["memory_max_mb"], pool.get("pool", "prefork") == "prefork"
        children = pool.get("concurrency", 2)
        most = pool.get("max_memory_per_child_mb") or 0
        need = WORKER_MB + CHILD_MB * (children - 1) + max(CHILD_MB, most) if prefork else THREADS_MB
        if limit < need:
            problems.add(
                f"memory_max_mb of the worker pool `{pool['name']}` is {limit}, but a worker of it needs {need}: "
                + (
                    f"{WORKER_MB} and {CHILD_MB} for each of {children} processes"
                    + (
                        f", of which one may grow to {most} (max_memory_per_child_mb)"
                        if most > CHILD_MB
                        else ""
                    )
                    if prefork
                    else "it would be ended before its first task"
                ),
                where.get("worker_pools", "worker_pools"),
                f"set it to at least {need}, better to twice that"
                + (", or lower concurrency" if prefork and children > 1 else "")
                + ", or leave it out",
            )
    tasks = values.get("flower_max_tasks", 0)
    needs = LEAST_MB | {"flower_memory_max_mb": 128 + tasks * 16 // 1000}
    for name, need in needs.items():
        if name in values and values[name] < need:
            flower = name.startswith("flower_")
            problems.add(
                f"{name} is {values[name]}, but it needs {need}"
                + (f": 128, and 16 for each 1,000 of flower_max_tasks ({tasks})" if flower else ""),
                where.get(
                    name, where.get("flower_max_tasks", "the default of the role") if flower else "group_vars"
                ),
                f"set it to at least {need}" + (", or lower flower_max_tasks" if flower else ""),
            )


def check_queue_names(problems: Problems, queues: Mapping[str, list[Any]], where: dict[str, str]) -> bool:
    """Whether each name can be that of a queue. queues: variable → the names in it."""
    before = len(problems)
    for variable, names in queues.items():
        for name in names:
            if reason := queue_names.unusable(name):
                problems.add(
                    f"no queue can be called {name!r}: {reason}",
                    f"{variable} ({where.get(variable, 'group_vars')})",
                    "put it in quotes" if isinstance(name, int | float) else "give the queue another name",
                )
    return len(problems) == before


def check_queues(
    problems: Problems, published: list[str], consumed: dict[str, list[str]], where: dict[str, str]
) -> None:
    """Every queue that is published to is consumed by a pool, and the other way round.

    consumed: queue → pools that name it.
    """
    for queue in published:
        if queue not in consumed:
            problems.add(
                f"tasks are routed to the queue `{queue}`, but no worker pool consumes it: they would wait for ever",
                where.get("app_task_routes", "app_task_routes, app_default_queue or app_extra_queues"),
                f"add `{queue}` to the queues of a pool in worker_pools ({where.get('worker_pools', 'group_vars')})",
            )
    for queue, pools in consumed.items():
        if queue not in published:
            problems.add(
                f"the worker pool `{pools[0]}` consumes the queue `{queue}`, to which nobody publishes",
                where.get("worker_pools", "worker_pools"),
                "correct its name, route a task to it in app_task_routes, or, where the application's code names it, "
                "list it in app_extra_queues",
            )


def check_times(problems: Problems, values: dict[str, Any], where: dict[str, str]) -> None:
    """The limits, in seconds, leave each other the room that losing no task needs."""
    limits = [values["app_time_limit_seconds"]]
    limits += [pool["time_limit"] for pool in values["worker_pools"] if pool.get("time_limit")]
    longest = max(limits)
    if values["app_visibility_timeout_seconds"] <= longest:
        problems.add(
            f"app_visibility_timeout_seconds ({values['app_visibility_timeout_seconds']}) is not above the longest "
            f"time limit of a task ({longest}): a task that still runs would be given to a second worker",
            where.get("app_visibility_timeout_seconds", "the default of the role app"),
            f"set it to at least {longest + 60}, or lower the time limit",
        )
    least = values["app_soft_shutdown_seconds"] + 15
    if values["worker_stop_timeout_seconds"] < least:
        problems.add(
            f"worker_stop_timeout_seconds ({values['worker_stop_timeout_seconds']}) is below {least}: systemd would "
            "kill a worker that is still handing its tasks back",
            where.get("worker_stop_timeout_seconds", "the default of the role worker"),
            f"set it to at least {least} (app_soft_shutdown_seconds + 15)",
        )


def check_addresses(problems: Problems, addresses: dict[str, str], where: dict[str, str]) -> None:
    """Services bind their host's address, and firewalls let in others'. addresses: host → its private_address."""
    place = where.get(
        "private_address", "private_address is ansible_host unless set; hosts.yml of the inventory"
    )
    first: dict[Address, str] = {}
    for host, text in addresses.items():
        try:
            address = address_of(text)
        except NoAddressError as error:
            fault = f"which {error}"
        else:
            fault = unreachable(address) or (f"which `{first[address]}` has too" if address in first else "")
            if not fault:
                first[address] = host
                continue
        problems.add(
            f"the private_address of `{host}` is {text}, {fault}",
            place,
            f"set private_address of `{host}` to the address, IPv4 or IPv6, under which the other hosts reach it"
            + ("; put it in quotes, or YAML takes digits and colons for a number" if text.isdigit() else ""),
        )
    families = {
        version: [host for address, host in first.items() if address.version == version] for version in (4, 6)
    }
    if all(families.values()):
        fewer, other = sorted(families, key=lambda version: len(families[version]))
        names = ", ".join(f"`{host}`" for host in families[fewer])
        problems.add(
            f"the private_address of {names} is IPv{fewer}, that of the other hosts IPv{other}: what connects to an "
            f"address of one family comes from an address of that family, which the firewalls would not know",
            place,
            "give all hosts a private_address of one family; ansible_host can be of either",
        )


def check_common(problems: Problems, name: str, values: dict[str, Any], where: dict[str, str]) -> None:
    """All hosts have the same value of a variable. values: host → its value."""
    said = {host: "not set" if value is None else repr(value) for host, value in values.items()}
    host = next(iter(said))
    other = next((other for other in said if said[other] != said[host]), None)
    if other:
        problems.add(
            f"{name} is {said[host]} for `{host}`, but {said[other]} for `{other}`; all hosts have to agree on it",
            where.get(name, "group_vars"),
            "set it once, in group_vars/all"
            + (
                "; begin a path with {{ environment_folder }}, for inventory_dir is not the same for all hosts"
                if name.endswith(("_file", "_source"))
                else ""
            ),
        )


def network_fault(text: Any) -> str:
    """Why a value is no address and no network, to go on from "it"; nothing if it is one."""
    try:
        network_of(str(text))
    except NoAddressError as error:
        return str(error)
    return ""


def is_port(text: Any) -> bool:
    """Whether a value is a port, or a range of them with the lower one first."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(text))
    return bool(match) and 1 <= int(match[1]) <= int(match[2] or match[1]) <= 65535


def check_firewall(problems: Problems, values: Mapping[str, Any], where: dict[str, str]) -> None:
    """What the firewall lets in are ports, and addresses; the time servers are names; the limits leave time."""
    rules = values["prepare_firewall_rules"]
    networks = [("prepare_ssh_addresses", text) for text in values["prepare_ssh_addresses"]]
    networks += [("prepare_firewall_rules", text) for rule in rules for text in rule.get("from") or []]
    for rule in rules:
        if "from" in rule and not rule["from"]:
            problems.add(
                f"prepare_firewall_rules: the rule for port {rule['port']} is from nobody, and would let in everybody",
                where.get("prepare_firewall_rules", "group_vars"),
                "name addresses, drop the rule, or leave `from` out if anybody may come",
            )
    for name, text in networks:
        if fault := network_fault(text):
            problems.add(
                f"{name}: {text} {fault}",
                where.get(name, "group_vars"),
                "write it like 192.0.2.10, 192.0.2.0/24 or 2001:db8::/32; the firewall does not know names",
            )
    for rule in rules:
        if not is_port(rule["port"]):
            problems.add(
                f"prepare_firewall_rules: {rule['port']} is no port",
                where.get("prepare_firewall_rules", "group_vars"),
                "give a number from 1 to 65535, or a range such as 60000-61000",
            )
    for server in values["prepare_ntp_servers"]:
        if not re.fullmatch(r"[A-Za-z0-9.:-]+", str(server)):
            problems.add(
                f"prepare_ntp_servers: {server!r} is no name or address of a time server",
                where.get("prepare_ntp_servers", "group_vars"),
                "give names and addresses only, such as ntp1.example.com",
            )
    for name, least in (("prepare_firewall_rollback_seconds", 10), ("prepare_clock_skew_seconds", 0.5)):
        if float(values[name]) < least:
            problems.add(
                f"{name} is {values[name]}, which leaves no time for a connection to be opened",
                where.get(name, "group_vars"),
                f"give at least {least}",
            )


def check_certificate(problems: Problems, variables: Mapping[str, Any], where: dict[str, str]) -> None:
    """The user's own certificate is there and its key is the one that belongs to it."""
    names = ("nginx_certificate_file", "nginx_certificate_key_file")
    missing = [name for name in names if not Path(str(variables.get(name, ""))).is_file()]
    for name in missing:
        problems.add(
            f"nginx_tls is `provided`, but {name} ({variables.get(name, 'not set')}) is no file on the controller",
            where.get(name, where.get("nginx_tls", "group_vars")),
            "point it at a PEM file, or set nginx_tls to own_ca",
        )
    if missing:
        return
    certificate, key = (Path(str(variables[name])).read_bytes() for name in names)
    if key.startswith(b"$ANSIBLE_VAULT"):
        return
    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
        fits = public == serialization.load_pem_private_key(key, None).public_key()
    except (TypeError, ValueError):
        fits = False
    if not fits:
        problems.add(
            f"{variables[names[1]]} is not the key of the certificate {variables[names[0]]}, or one of them is not "
            "plain PEM: nginx would not start with them",
            where.get(names[1], "group_vars"),
            "give the certificate, its chain behind it, and its key without a passphrase",
        )


def check_server_names(
    problems: Problems, host: str, variables: Mapping[str, Any], where: dict[str, str]
) -> None:
    """Addresses under which nginx answers are written as in its certificate."""
    for key, name in [("nginx_server_name", variables["nginx_server_name"])] + [
        ("nginx_alternative_names", name) for name in variables.get("nginx_alternative_names") or []
    ]:
        if not set("[]:%") & set(str(name)):
            continue
        try:
            address_of(str(name))
        except NoAddressError as error:
            problems.add(
                f"{key} of `{host}`: {name} {error}",
                where.get(key, "group_vars"),
                "write names, and addresses like 192.0.2.10 or 2001:db8::10, without a port",
            )


def check_acme(
    problems: Problems, host: str, variables: Mapping[str, Any], where: dict[str, str], taken: dict[str, str]
) -> None:
    """Each name is one that an ACME server can ask for over HTTP, and leads to this host alone.

    taken: name → host of those before this one.
    """
    directory = str(variables.get("nginx_acme_directory", "https://acme-v02.api.letsencrypt.org/directory"))
    if not re.fullmatch(r"https://[^\s'\"]+", directory):
        problems.add(
            f"nginx_acme_directory ({directory}) is no https:// address",
            where.get("nginx_acme_directory", "group_vars"),
            "give the directory of an ACME server, or leave it out for Let's Encrypt",
        )
    file = str(variables.get("nginx_acme_ca_file") or "")
    if file and not Path(file).is_file():
        problems.add(
            f"nginx_acme_ca_file ({file}) is no file on the controller",
            where.get("nginx_acme_ca_file", "group_vars"),
            "point it at the PEM file of the CA that the ACME server's own certificate is from",
        )
    for key, name in [("nginx_server_name", variables["nginx_server_name"])] + [
        ("nginx_alternative_names", name) for name in variables.get("nginx_alternative_names") or []
    ]:
        name = str(name).lower().rstrip(".")
        fault = (
            "is an address"
            if not network_fault(name)
            else "has a wildcard, which needs a proof in DNS"
            if "*" in name
            else "means every machine to itself"
            if name == "localhost" or name.endswith(".localhost")
            else "is no name of DNS with a dot in it"
            if not re.fullmatch(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z0-9-]+", name)
            else f"is also one of `{taken[name]}`, and the CA may ask that host"
            if name in taken
            else None
        )
        if fault:
            problems.add(
                f"nginx_tls of `{host}` is `acme`, but no certificate can be had for {name}: it {fault}",
                where.get(key, "nginx_server_name in group_vars"),
                "give names that lead to this host alone in DNS, or set nginx_tls to own_ca or provided",
            )
        taken.setdefault(name, host)


def check_readers(problems: Problems, names: list[str], where: dict[str, str]) -> None:
    """Logins that may only look: each can be one, and is another than the others."""
    seen: dict[str, str] = {}
    for name in names:
        fault = (
            "a login has 1 to 64 ASCII letters, digits and . _ @ -, a letter or digit first"
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name)
            else f"{seen[name.lower()]!r} is one already, and people do not tell them apart"
            if name.lower() in seen
            else None
        )
        if fault:
            problems.add(
                f"flower_readers: {name!r} cannot be a login; {fault}",
                where.get("flower_readers", "group_vars"),
                "give each reader a name of its own, or remove it",
            )
        seen.setdefault(name.lower(), name)


def smtp_fault(address: str) -> str | None:
    """What keeps Alertmanager from sending mail to this address, if anything does."""
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        return "is no address of a mail server"
    if url.scheme not in ("smtp", "smtps", "smtp+starttls") or not url.hostname:
        return "is no address of a mail server"
    if url.password is not None:
        return "holds a password, which belongs into monitor_smtp_password"
    if (port or 465) != 465 if url.scheme == "smtps" else port == 465:
        return "does not fit: Alertmanager speaks TLS from the start on port 465, and there only"
    if ":" in url.hostname:
        return "has an IPv6 address, to which Alertmanager does not connect; it needs a name that leads there"
    if url.username and url.scheme == "smtp" and url.hostname not in ("localhost", "127.0.0.1"):
        return "names a user without TLS, which would send the password in the clear"
    return None


def check_monitor(problems: Problems, variables: Mapping[str, Any], where: dict[str, str]) -> None:
    """Alerts can be mailed, the user's own rules are there, and limits can be kept."""
    url = str(variables["monitor_smtp_url"])
    fault = smtp_fault(url) if variables.get("monitor_mail_to") else None
    if fault:
        problems.add(
            f"monitor_smtp_url ({url}) {fault}, so no alert could be mailed",
            where.get("monitor_smtp_url", where.get("app_smtp_url", "group_vars")),
            "write smtp://HOST:PORT, smtps://[USER@]HOST or smtp+starttls://[USER@]HOST:PORT, "
            "or leave monitor_mail_to empty",
        )
    for name in ("monitor_public_url", "monitor_probe_url"):
        if not re.fullmatch(r"https://\S+/", str(variables[name])):
            problems.add(
                f"{name} ({variables[name]}) is no https:// address with a / at its end",
                where.get(name, "group_vars"),
                "write it as https://NAME/",
            )
    own = [Path(str(file)).name for file in variables.get("monitor_rule_files", [])]
    for name in sorted({name for name in own if own.count(name) > 1}):
        problems.add(
            f"two of monitor_rule_files are called {name}; on the host one would replace the other",
            where.get("monitor_rule_files", "monitor_rule_files"),
            "rename one of them",
        )
    for file in variables.get("monitor_rule_files", []):
        if not Path(str(file)).is_file():
            problems.add(
                f"the rule file {file} is no file on the controller",
                where.get("monitor_rule_files", "monitor_rule_files"),
                'correct the path; begin it with where it starts, such as "{{ environment_folder }}/rules.yml"',
            )
    for name in variables:
        if re.fullmatch(r"monitor_\w+_percent", name) and not 0 <= float(variables[name]) <= 100:
            problems.add(
                f"{name} is {variables[name]}, which is no share of a hundred",
                where.get(name, "group_vars"),
                "give a number from 0 to 100",
            )
    for task, seconds in variables["monitor_runtime_seconds"].items():
        if not isinstance(seconds, int | float):
            problems.add(
                f"monitor_runtime_seconds: the limit of {task} is {seconds!r}, which is no number of seconds",
                where.get("monitor_runtime_seconds", "group_vars"),
                "give a number",
            )
    patience, scrape = (int(variables[f"monitor_{name}_seconds"]) for name in ("patience", "scrape"))
    if patience < 2 * scrape:
        problems.add(
            f"monitor_patience_seconds ({patience}) is below twice monitor_scrape_seconds ({scrape}): alerts that "
            "compare two readings would never come",
            where.get("monitor_patience_seconds", where.get("monitor_scrape_seconds", "group_vars")),
            f"set it to at least {2 * scrape}",
        )
    known = float(variables.get("app_visibility_timeout_seconds", variables["monitor_unacked_seconds"]))
    if float(variables["monitor_unacked_seconds"]) < known:
        problems.add(
            f"monitor_unacked_seconds ({variables['monitor_unacked_seconds']}) is below app_visibility_timeout_seconds "
            f"({known:g}): there would be an alert for every task that a lost worker held",
            where.get("monitor_unacked_seconds", "group_vars"),
            "raise it, or leave it out",
        )


def check_environment(problems: Problems, environment: Mapping[Any, Any], where: dict[str, str]) -> None:
    """Names and values reach the application's processes as they stand there."""
    for name, value in environment.items():
        place = where.get(str(name), where.get("app_environment", "group_vars"))
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.add(
                f"app_environment: {name!r} cannot name an environment variable",
                place,
                "use letters of ASCII, digits and _, with no digit at the beginning",
            )
        elif reason := next(
            (text for names, text in OWN_ENVIRONMENT.items() if re.fullmatch(names, name)), None
        ):
            problems.add(f"app_environment: {name} {reason}", place, "give it another name, or leave it out")
        elif isinstance(value, bool) or not isinstance(value, str | int):
            kind = "nothing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]}"
            problems.add(
                f"app_environment: the value of {name} is no text but {kind}, which has no one form as a text",
                place,
                "write the text in quotes that the application is to read; a template can end in `| string`",
            )
        else:
            check_environment_value(problems, name, str(value), place)


def check_environment_value(problems: Problems, name: str, value: str, place: str) -> None:
    """A text fits a line of an environment file, as systemd reads it, and an argument of a process."""
    files = "put it into app_credentials, whose values are files"
    if "\n" in value:
        fault = "has several lines, which an environment file cannot hold"
    # systemd leaves out a variable with a control character, and all of a file with what is no character of Unicode.
    elif found := re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufdd0-\ufdef]", value) or re.search(
        "[" + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17)) + "]",
        value,
    ):
        fault = f"has the character U+{ord(found[0]):04X}, which no environment can hold"
    elif len(f"{name}={value}".encode()) >= ENVIRONMENT_BYTES:
        fault = f"has more than the {ENVIRONMENT_BYTES} bytes that Linux takes"
    else:
        return
    problems.add(f"app_environment: the value of {name} {fault}", place, files)


def check_source(problems: Problems, source: str, where: str) -> None:
    """The application's folder can be built into a release."""
    folder = Path(source)
    if not folder.is_absolute():
        problems.add(
            f"app_source ({source}) is a relative path",
            where,
            'begin it with where it starts, such as "{{ environment_folder }}/../../app"',
        )
        return
    for name in ("pyproject.toml", "uv.lock"):
        if not (folder / name).is_file():
            problems.add(
                f"the application's folder {source} has no {name}",
                where,
                "run `uv lock` in it and commit the file"
                if name == "uv.lock"
                else "point app_source at a Python project",
            )
    if problems:
        return
    locked = {package["name"] for package in tomllib.loads((folder / "uv.lock").read_text())["package"]}
    for package, reason in NEEDED_PACKAGES.items():
        if package not in locked:
            problems.add(
                f"the application does not depend on `{package}`: {reason}",
                f"pyproject.toml and uv.lock in {source}",
                f"run `uv add {'celery[redis]' if package == 'redis' else package}` there",
            )


def find_definitions(sources: list[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Where each variable stands: name → `file:line`, the last one found. extra: names of variables given with -e."""
    where: dict[str, str] = {}
    for source in sources:
        if "," in source:
            continue
        root = Path(source)
        folder = root if root.is_dir() else root.parent
        own = [path for path in folder.iterdir() if path.is_file()] if root.is_dir() else [root]
        variables = [path for path in folder.glob("*_vars/**/*") if path.is_file()]
        for path in [*sorted(own), *sorted(variables)]:
            if path.name == "credentials.yml":
                continue
            # A name before a colon, of hosts.yml only further in; in an INI file any before an equals sign.
            pattern = (
                r"\s*\"?([a-z][a-z0-9_]+)\"?\s*:" if path in variables else r"\s+\"?([a-z][a-z0-9_]+)\"?\s*:"
            )
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                names = [match[1]] if (match := re.match(pattern, line)) else []
                if path in own and path.suffix not in (".yml", ".yaml", ".json"):
                    names = re.findall(r"\b([a-z][a-z0-9_]+)\s*=", line)
                where.update(dict.fromkeys(names, f"{path}:{number}"))
    return where | dict.fromkeys(extra, "-e or --extra-vars of this run")


def strays(sources: Iterable[str], groups: Mapping[str, list[str]], nouns: Iterable[str]) -> list[str]:
    """Files of variables that are read for no host: their name is misspelled, or their host has left."""
    known = {"group": {*groups, *nouns}, "host": set(groups["all"])}
    found = []
    for folder in types.source_folders(sources):
        for kind, names in known.items():
            for path in sorted(folder.glob(f"{kind}_vars/[!.]*")):
                name = path.stem if path.suffix in (".yml", ".yaml", ".json") else path.name
                if name in names or not (path.is_dir() or name != path.name or not path.suffix):
                    continue
                near = difflib.get_close_matches(name, names, n=1)
                found.append(
                    f"The variables in {path} are for no one, because there is no {kind} `{name}`."
                    + (f" Did you mean `{near[0]}`?" if near else "")
                )
    return found


def plain(value: Any) -> Any:
    """The value with everything inside it templated now; Ansible templates containers when they are read."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


class Variables(Mapping[str, Any]):
    """The variables of one host, each templated when it is read, as a task on that host would see it.

    `hostvars[host]` alone does not do: what it returns knows no `hostvars` itself.
    """

    def __init__(self, raw: dict[str, Any], templar: Any) -> None:
        self.raw, self._templar = raw, templar

    def __getitem__(self, name: str) -> Any:
        return plain(self._templar.template(self.raw[name]))

    def __contains__(self, name: object) -> bool:
        return name in self.raw

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


def specified(roles: Iterable[str], specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of a host: name → that of the role that it is named after, required if one of the roles needs it."""
    found: dict[str, dict[str, Any]] = {
        name: option for name, option in types.ENVIRONMENT.items() if option["type"] != "str"
    }
    for role in sorted(roles):
        for name, option in specs[role].items():
            known = option if name.startswith(f"{role}_") else found.get(name, option)
            required = option.get("required") or found.get(name, {}).get("required", False)
            found[name] = {**known, "required": required}
    return found


def is_negative(value: Any) -> bool:
    """Whether a number in the value is below 0."""
    if isinstance(value, list | dict):
        return any(is_negative(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and value < 0


def unfit(name: str, value: Any, option: dict[str, Any]) -> list[str]:
    """What is wrong with a value that has its type."""
    if found := ArgumentSpecValidator({name: option}).validate({name: value}).error_messages:
        return found
    if option.get("type") == "int" and name.endswith("_port") and not is_port(value):
        return [f"{name}: {value} is no port; it has to be from 1 to 65535"]
    if option.get("type") == "int" or name == "worker_pools":
        return [f"{name}: a number is below 0"] if is_negative(value) else []
    return []


def references(name: str, raw: Mapping[str, Any]) -> set[str]:
    """The variables that a variable is made of, and those that these are made of."""
    found: set[str] = set()
    left = [name]
    while left:
        try:
            text = str(raw.get(left.pop(), ""))
        except AnsibleError:  # encrypted, and no password is known
            continue
        words = set(re.findall(r"\w+", text)) & {*raw, "credentials"} - found
        found |= words
        left += [word for word in words - {"credentials", "hostvars"} if types.is_template(raw[word])]
    return found


class Faults:
    """What is wrong with the values of variables, each once: not for every host, nor for what follows from it."""

    def __init__(self, where: dict[str, str], extra: Iterable[str]) -> None:
        self._where, self._extra = where, extra
        self._hosts: dict[tuple[str, str, str, str], list[str]] = {}
        self._made_of: dict[str, set[str]] = {}

    def add(self, name: str, what: str, mend: str, host: str, raw: Mapping[str, Any]) -> None:
        given = types.given_name(name, raw)
        self._made_of.setdefault(name, set()).update(references(given, raw))
        place = self._where.get(name, "group_vars")
        value = raw.get(given)
        origin = None if name in self._extra else Origin.get_tag(value)
        if origin and origin.path and origin.line_num:  # a host can have another value than its group
            inside = isinstance(value, list | dict) and place.startswith(f"{origin.path}:")
            place = place if inside else f"{origin.path}:{origin.line_num}"
        self._hosts.setdefault((name, what, place, mend), []).append(host)

    def tell(self, problems: Problems, hosts: int) -> None:
        wrong = {name for name, *_ in self._hosts}
        made_of = {  # a filter that is given `hostvars` may read anything
            name: wrong if "hostvars" in made_of else made_of & wrong
            for name, made_of in self._made_of.items()
        }
        told = False
        for name, what, place, mend in self._hosts:
            if any(name not in made_of.get(cause, ()) for cause in made_of.get(name, set()) - {name}):
                continue
            self._tell(problems, hosts, (name, what, place, mend))
            told = True
        for fault in [] if told else self._hosts:  # on different hosts they may follow from each other
            self._tell(problems, hosts, fault)

    def _tell(self, problems: Problems, hosts: int, fault: tuple[str, str, str, str]) -> None:
        _, what, place, mend = fault
        of = self._hosts[fault]
        names = ", ".join(f"`{host}`" for host in of)
        said = "every host" if len(of) == hosts > 1 else f"host{'s' if len(of) > 1 else ''} {names}"
        problems.add(f"{what} ({said})", place, mend)


def check_options(faults: Faults, host: str, variables: Variables, specs: dict[str, dict[str, Any]]) -> None:
    """The host's variables fit the specs of its roles; secrets may not be known yet."""
    raw = variables.raw
    roles = {"prepare", "haproxy", "verify", *variables["group_names"]} & set(specs)
    for name, option in specified(roles, specs).items():
        owner = name.partition("_")[0]
        page = f"see roles/{owner}/README.md" if owner in specs else "see inventories/shared/common.yml"
        secret = option.get("no_log")
        if name not in variables:
            if option.get("required") and not secret:
                faults.add(name, f"`{name}` is not set", page, host, raw)
            continue
        given = types.given_name(name, raw)
        try:
            value = types.convert(variables[given], option)
        except types.WrongType as error:
            faults.add(name, types.complaint(name, error), page, host, raw)
        except AnsibleError as error:
            if not secret or "credentials" not in references(given, raw):  # what it lacks is generated
                locked = types.is_locked(error)
                mend = types.UNLOCK if locked else "define what it refers to, or correct its template"
                said: Any = error
                if secret and not locked and not isinstance(error, AnsibleUndefinedVariable):
                    said = f"{type(error.__cause__ or error).__name__}; it is a secret, so no more is shown"
                faults.add(name, f"`{name}` cannot be worked out: {said}", mend, host, raw)
        else:
            for fault in [] if secret else unfit(name, value, option):
                faults.add(name, fault, page, host, raw)


class ActionModule(ActionBase):
    """Fails with every problem it found at once; returns nothing else."""

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _, arguments = self.validate_argument_spec(
            {"needed_groups": {"type": "list", "elements": "str", "required": True}}
        )
        groups, hostvars = task_vars["groups"], task_vars["hostvars"]
        specs = types.specifications()
        extra = load_extra_vars(self._loader)
        sources = task_vars.get("ansible_inventory_sources") or []
        where = find_definitions(sources, extra)
        problems = Problems()

        check_groups(
            problems,
            groups,
            set(specs) - {"prepare", "haproxy", "verify", "compose"},
            arguments["needed_groups"],
        )
        if rest := extra.get("_raw_params"):
            problems.add(
                f"`{rest}` is no NAME=VALUE, so it would be passed over",
                "-e or --extra-vars of this run",
                "put quotes round a value with spaces, within those of the shell, or give JSON: -e '{\"NAME\": …}'",
            )
        for host in groups["all"]:
            check_names(problems, host, hostvars.raw_get(host), specs, where)
            check_reachable(problems, host, hostvars.raw_get(host), where)
        if not problems:
            faults = Faults(where, extra)
            for host in groups["all"]:
                check_options(faults, host, self._variables(hostvars, host), specs)
            faults.tell(problems, len(groups["all"]))
        if not problems:
            self._check_together(problems, groups, hostvars, where)
        if problems:
            raise AnsibleActionFail(
                "The inventory is not ready; nothing was touched.\n\n"
                + "\n\n".join(f"{number}. {text}" for number, text in enumerate(problems, 1))
            )
        warnings = self._warnings(groups, hostvars) + strays(sources, groups, specs)
        return {"changed": False, "warnings": warnings}

    def _warnings(self, groups: dict[str, list[str]], hostvars: Any) -> list[str]:
        """What may be meant."""
        application = self._variables(hostvars, groups["app"][0])
        obstacle = filter_loader.get("transport_obstacle")
        reason = obstacle.j2_function(application.get("app_celery_settings") or {})
        transport = [
            f"Tasks are taken from Redis by kombu's own transport, because app_celery_settings: {reason}. A worker "
            "that is killed can lose the task that it is just taking."
        ]
        near = difflib.get_close_matches("monitor", set(groups) - {"monitor"}, n=1, cutoff=0.75)
        misspelled = [
            f"The group `{group}` means nothing here, and `monitor` has no host, so nothing is monitored."
            for group in near
        ]
        return (
            ([] if groups.get("monitor") else misspelled)
            + (transport if reason and application["app_transport"] == "hothouse" else [])
            + [
                f"Alerts of the host {host} reach nobody: set monitor_mail_to or monitor_webhook_urls."
                for host in groups.get("monitor", [])
                if not self._variables(hostvars, host).get("monitor_mail_to")
                and "monitor_webhook_urls" not in hostvars.raw_get(host)
            ]
        )

    def _check_together(
        self, problems: Problems, groups: dict[str, list[str]], hostvars: Any, where: dict[str, str]
    ) -> None:
        """What only shows when variables are held against each other."""
        everywhere = {host: self._variables(hostvars, host) for host in groups["all"]}
        if len(everywhere) > 1:
            addresses = {host: str(values["private_address"]) for host, values in everywhere.items()}
            check_addresses(problems, addresses, where)
        # Of several nginx hosts with certificates from elsewhere each may have a name of its own.
        own_names = [
            host for host in groups["nginx"][1:] if everywhere[host].get("nginx_tls", "own_ca") != "own_ca"
        ]
        for name in COMMON_VARIABLES:
            hosts = [host for host in everywhere if name != "nginx_server_name" or host not in own_names]
            check_common(problems, name, {host: everywhere[host].get(name) for host in hosts}, where)
        for name in COMMON_APP_VARIABLES:
            check_common(problems, name, {host: everywhere[host].get(name) for host in groups["app"]}, where)
        prepare = self._defaults("prepare")
        for variables in everywhere.values():
            check_firewall(problems, {name: variables.get(name, prepare[name]) for name in prepare}, where)
        names: dict[str, str] = {}
        for host in groups["nginx"]:
            variables = everywhere[host]
            check_server_names(problems, host, variables, where)
            if variables.get("nginx_tls") == "provided":
                check_certificate(problems, variables, where)
            if variables.get("nginx_tls") == "acme":
                check_acme(problems, host, variables, where, names)
            if groups.get("monitor") and not variables.get("nginx_overview", True):
                problems.add(
                    f"nginx_overview is off for `{host}`, but there is a host in the group `monitor`, whose "
                    "alerts lead to the page and whose probe asks for it",
                    where.get("nginx_overview", "group_vars"),
                    "leave the page on, or the group `monitor` empty",
                )
        # The same everywhere, as was checked above.
        check_readers(problems, everywhere[groups["flower"][0]]["flower_readers"], where)
        for host in groups.get("monitor", []):
            check_monitor(problems, everywhere[host], where)
        for host in groups["app"]:
            check_environment(problems, everywhere[host]["app_environment"], where)
        for host, variables in everywhere.items():
            check_memory(problems, self._limits(groups, host, variables), where)
        consumed: dict[str, list[str]] = {}
        published: list[str] = []
        usable = True
        for host in groups["worker"]:
            variables = everywhere[host]
            pools = variables["worker_pools"]
            queues = {
                "worker_pools": [queue for pool in pools for queue in pool["queues"]],
                "app_default_queue": [variables["app_default_queue"]],
                "app_task_routes": [route["queue"] for route in variables["app_task_routes"].values()],
                "app_extra_queues": variables["app_extra_queues"],
            }
            usable = check_queue_names(problems, queues, where) and usable
            check_pools(problems, host, pools, where.get("worker_pools", "worker_pools"))
            for pool in pools if usable else []:
                for queue in pool["queues"]:
                    consumed.setdefault(queue, []).append(pool["name"])
            published += [queue for queue in variables["app_queues"] if queue not in published]
            names = ("app_time_limit_seconds", "app_visibility_timeout_seconds", "app_soft_shutdown_seconds")
            defaults = self._defaults("app") | self._defaults("worker")
            values = {name: int(variables.get(name, defaults[name])) for name in names}
            values["worker_stop_timeout_seconds"] = int(
                variables.get("worker_stop_timeout_seconds", defaults["worker_stop_timeout_seconds"])
            )
            check_times(problems, values | {"worker_pools": pools}, where)
        if usable:
            check_queues(problems, published, consumed, where)
        for source in dict.fromkeys(str(everywhere[host]["app_source"]) for host in groups["app"]):
            check_source(problems, source, where.get("app_source", "app_source"))

    def _variables(self, hostvars: Any, host: str) -> Variables:
        raw = {**hostvars.raw_get(host), "hostvars": hostvars}
        return Variables(raw, self._templar.copy_with_new_env(available_variables=raw))

    def _limits(self, groups: dict[str, list[str]], host: str, variables: Variables) -> dict[str, Any]:
        """What `check_memory` takes: the limits of what the host runs."""
        limits: dict[str, Any] = {}
        for role, names in MEMORY_LIMITS.items():
            if host in groups.get(role, []):
                defaults = self._defaults(role)
                limits |= {name: int(variables.get(name, defaults[name])) for name in names}
        if host in groups["worker"]:
            limits["worker_pools"] = variables["worker_pools"]
        return limits

    def _defaults(self, role: str) -> dict[str, Any]:
        path = Path(self._task._role._role_path).parent / role / "defaults/main.yml"
        return yaml.safe_load(path.read_text())
