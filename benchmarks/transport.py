#!/usr/bin/env python3
"""What the transport without a fetch gap costs: it beside kombu's own, with a real Redis and real workers.

    uv run --directory transport --locked python ../benchmarks/transport.py [--tasks 3000] [--runs 3] [--pings 200]

For each pool (prefork with 2 children, 8 threads) and 1 and 3 queues, both transports in turn: tasks that do nothing, a
second from the first tenth to the last; and, with an idle worker, the time from publishing a task to its start. Prints
medians and ratios. It needs redis-server; nothing else of the machine is touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hothouse_transport
import redis
from celery import Celery

SCHEMES = {"kombu": "redis", "hothouse": "hothouse"}
POOLS = {"prefork": 2, "threads": 8}
QUEUES = {1: ["one"], 3: ["one", "two", "three"]}

hothouse_transport.install()
app = Celery("benchmark", broker=os.environ.get("BENCHMARK_BROKER"))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    broker_transport_options={"global_keyprefix": "q:"},
)


# Named, because the worker imports this file under another name.
@app.task(name="benchmark.nothing")
def nothing() -> None:
    pass


@app.task(name="benchmark.ping")
def ping(sent: float) -> None:
    with redis.Redis.from_url(os.environ["BENCHMARK_NOTES"]) as client:
        client.rpush("seconds", time.time() - sent)


def wait(condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the worker does not get on")
        time.sleep(seconds)


@contextmanager
def server() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    program = shutil.which("redis-server") or "redis-server"
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while socket.socket().connect_ex(("127.0.0.1", port)):
                    time.sleep(0.05)
                yield port
            finally:
                process.terminate()


@contextmanager
def worker(port: int, scheme: str, pool: str, queues: list[str]) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "transport",
        "worker",
        "-P",
        pool,
        "-c",
        str(POOLS[pool]),
    ]
    command += ["-Q", ",".join(queues), "--without-gossip", "--without-mingle", "--without-heartbeat"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "BENCHMARK_BROKER": f"{scheme}://127.0.0.1:{port}/0",
        "BENCHMARK_NOTES": f"redis://127.0.0.1:{port}/1",
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def publish(port: int, scheme: str, queues: list[str], task: Any, count: int, *arguments: Any) -> None:
    with app.connection_for_write(url=f"{scheme}://127.0.0.1:{port}/0") as connection:
        for number in range(count):
            task.apply_async(arguments, queue=queues[number % len(queues)], connection=connection)


def throughput(port: int, scheme: str, pool: str, queues: list[str], count: int) -> float:
    """Tasks per second."""
    client = redis.Redis(port=port)
    client.flushall()
    publish(port, scheme, queues, nothing, count)

    def left() -> int:
        pipe = client.pipeline(transaction=False)
        for queue in queues:
            pipe.llen(f"q:{queue}")
        pipe.zcard("q:unacked_index")
        return sum(pipe.execute())

    with worker(port, scheme, pool, queues):
        wait(lambda: left() < count * 0.9, 0.01)
        rest, begin = left(), time.monotonic()
        wait(lambda: not left(), 0.01)
        return rest / (time.monotonic() - begin)


def latency(port: int, scheme: str, pool: str, queues: list[str], count: int) -> list[float]:
    """Milliseconds from publishing a task to its start, when nothing else is to do."""
    client = redis.Redis(port=port, db=1)
    client.flushall()
    with (
        worker(port, scheme, pool, queues),
        app.connection_for_write(url=f"{scheme}://127.0.0.1:{port}/0") as link,
    ):
        for number in range(count + 10):
            ping.apply_async((time.time(),), queue=queues[number % len(queues)], connection=link)
            wait(lambda: client.llen("seconds") > number, 0.002)  # noqa: B023
            time.sleep(0.01)
        return sorted(float(seconds) * 1000 for seconds in client.lrange("seconds", 10, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pings", type=int, default=200)
    options = parser.parse_args()
    with server() as port:
        for pool in POOLS:
            for number, queues in QUEUES.items():
                rates: dict[str, list[float]] = {name: [] for name in SCHEMES}
                times: dict[str, list[float]] = {name: [] for name in SCHEMES}
                for _ in range(options.runs):
                    for name, scheme in SCHEMES.items():
                        rates[name].append(throughput(port, scheme, pool, queues, options.tasks))
                        times[name] += latency(port, scheme, pool, queues, options.pings)
                rate = {name: statistics.median(values) for name, values in rates.items()}
                middle = {name: statistics.median(values) for name, values in times.items()}
                late = {name: statistics.quantiles(values, n=100)[98] for name, values in times.items()}
                print(
                    f"{pool} {POOLS[pool]}, {number} queue{'s' * (number > 1)}: "
                    f"tasks/s {rate['kombu']:.0f} -> {rate['hothouse']:.0f}, x{rate['hothouse'] / rate['kombu']:.2f}; "
                    f"idle p50 {middle['kombu']:.1f} -> {middle['hothouse']:.1f} ms, "
                    f"x{middle['hothouse'] / middle['kombu']:.2f}; "
                    f"p99 {late['kombu']:.1f} -> {late['hothouse']:.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
