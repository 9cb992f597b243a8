"""Filters that turn the inventory's data into what templates print and tasks apply."""

from __future__ import annotations

import base64
import hashlib
from pathlib import PurePath
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import bcrypt

# bcrypt writes base64 in an order of its own.
BCRYPT_ALPHABET = str.maketrans(
    f"{ascii_uppercase}{ascii_lowercase}{digits}+/", f"./{ascii_uppercase}{ascii_lowercase}{digits}"
)


def worker_instances(pools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per pool and replica: the `name` of the unit's instance, the worker's `options` and its `queues`.

    Sizes in `max_memory_per_child_mb` are MiB, limits are seconds; keys as in roles/worker/meta/argument_specs.yml.
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
                "options": " ".join(options),
                "queues": list(pool["queues"]),
            }
            for replica in range(1, int(pool.get("replicas", 1)) + 1)
        ]
    return instances


def worker_files(instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries for hothouse_files: the options of each instance, read by the unit celery-worker@.service."""
    return [
        {
            "path": f"/etc/hothouse/worker-{instance['name']}.env",
            "content": "# roles/worker: a pool of worker_pools in the inventory\n"
            f"WORKER_OPTIONS={instance['options']}\n",
        }
        for instance in instances
    ]


def worker_units(instances: list[dict[str, Any]], restart_after: list[str]) -> list[dict[str, Any]]:
    """Entries for hothouse_units: each instance enabled, started, and restarted after its files changed."""
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


def worker_queues(hosts: list[Any]) -> dict[str, list[str]]:
    """The queues that each worker of these hosts (their variables) consumes, by its name in Celery and Flower."""
    return {
        f"{instance['name']}@{host['inventory_hostname']}": instance["queues"]
        for host in hosts
        for instance in worker_instances(host["worker_pools"])
    }


def worker_names(hosts: list[Any]) -> list[str]:
    """The names under which the workers of these hosts (their variables) appear in Celery and Flower."""
    return list(worker_queues(hosts))


def scrape_targets(hosts: list[Any], port: int) -> list[dict[str, str]]:
    """Where Prometheus finds an exporter of these hosts (their variables): `instance` and `address`."""
    return [
        {"instance": host["inventory_hostname"], "address": f"{host['monitor_exporter_address']}:{port}"}
        for host in hosts
    ]


def bcrypt_hash(password: str, user: str, rounds: int = 10) -> str:
    """The hash of a login that nginx, Prometheus and Alertmanager read; 2 ** rounds iterations.

    The salt follows from the user's name, so that a rerun writes the same hash, and never from the password, which it
    would give away.
    """
    digest = hashlib.sha256(f"hothouse:{user}".encode()).digest()[:16]
    letters = base64.b64encode(digest).decode()[:22].translate(BCRYPT_ALPHABET)
    return bcrypt.hashpw(password.encode(), f"$2b${rounds:02d}${letters}".encode()).decode()


def copies(names: list[str], source: str, folder: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: files of the controller in `source` as they are, in a folder of the host."""
    folders = sorted({str(parent) for name in names for parent in PurePath(name).parents} - {"."})
    return [
        {"path": folder, "state": "directory"},
        *({"path": f"{folder}/{name}", "state": "directory"} for name in folders),
        *({"path": f"{folder}/{name}", "source": f"{source}/{name}"} for name in names),
    ]


def rule_files(files: list[str], folder: str) -> list[dict[str, Any]]:
    """Entries for hothouse_files: rule files of the controller, each checked, in a folder of the host."""
    return [
        {"path": folder, "state": "directory"},
        *(
            {"path": f"{folder}/{PurePath(file).name}", "source": file, "validate": "promtool check rules %s"}
            for file in files
        ),
    ]


class FilterModule:
    """Registers the filters with Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "bcrypt_hash": bcrypt_hash,
            "copies": copies,
            "credential_files": credential_files,
            "rule_files": rule_files,
            "scrape_targets": scrape_targets,
            "worker_files": worker_files,
            "worker_names": worker_names,
            "worker_instances": worker_instances,
            "worker_queues": worker_queues,
            "worker_units": worker_units,
        }
