"""Filters that turn the inventory's data into what templates print and tasks apply."""

from __future__ import annotations

from typing import Any


def worker_instances(pools: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One entry per pool and replica: the `name` of the unit's instance and the worker's `options`.

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
            {"name": f"{pool['name']}-{replica}", "options": " ".join(options)}
            for replica in range(1, int(pool.get("replicas", 1)) + 1)
        ]
    return instances


def worker_files(instances: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Entries for hothouse_files: the options of each instance, read by the unit celery-worker@.service."""
    return [
        {
            "path": f"/etc/hothouse/worker-{instance['name']}.env",
            "content": "# roles/worker: a pool of worker_pools in the inventory\n"
            f"WORKER_OPTIONS={instance['options']}\n",
        }
        for instance in instances
    ]


def worker_units(instances: list[dict[str, str]], restart_after: list[str]) -> list[dict[str, Any]]:
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


def worker_names(hosts: list[Any]) -> list[str]:
    """The names under which the workers of these hosts (their variables) appear in Celery and Flower."""
    return [
        f"{instance['name']}@{host['inventory_hostname']}"
        for host in hosts
        for instance in worker_instances(host["worker_pools"])
    ]


class FilterModule:
    """Registers the filters with Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "credential_files": credential_files,
            "worker_files": worker_files,
            "worker_names": worker_names,
            "worker_instances": worker_instances,
            "worker_units": worker_units,
        }
