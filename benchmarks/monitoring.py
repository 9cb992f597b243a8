#!/usr/bin/env python3
"""What monitoring costs on one host that has everything, and how Flower's memory grows with the tasks it keeps.

    .venv/bin/python benchmarks/monitoring.py [--ssh .hothouse/ssh/hothouse-local.config] [--host local1]
        [--seconds 120] [--rate 100] [--queue default] [--kept 5000 10000 100000]

1. For `seconds` it publishes `rate` tasks per second that do nothing (hothouse.ping), and reads from /proc what each
   service of the monitoring uses meanwhile: processor time, and memory as PSS, every five seconds. The sum is held
   against the budget. Flower, and those whom the node exporter asks (systemd, D-Bus), stand beside it.
2. It takes down the events of some of these tasks and sends them again and again, with new ids, to a second Flower: the
   same release and configuration but for max_tasks, with a Redis of its own. It measures when all is full that has a
   bound, and the state was saved once more.

Both on the host, over SSH, as root. At the end the second Flower and its Redis are gone, and the first has the tasks
again that it had saved before; for that it is restarted. Exits with 1 when the budget is exceeded.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

MONITORING = [
    "prometheus.service",
    "prometheus-alertmanager.service",
    "prometheus-blackbox-exporter.service",
    "prometheus-nginx-exporter.service",
    "prometheus-node-exporter.service",
    "prometheus-redis-exporter.service",
]
BESIDE = ["celery-flower.service", "init.scope", "dbus.service"]
BUDGET_PERCENT, BUDGET_MB = 5.0, 150.0
WARM_UP_SECONDS, SAMPLE_SECONDS, RECORD_SECONDS = 20, 5, 8
# Flower keeps up to four references to events for each task, and three events make a task.
FULL = 1.5
WORK = Path("/var/tmp/hothouse-benchmark")
FLOWER_STATE = Path("/var/lib/hothouse/flower/flower.db")
FLOWER_URL = Path("/etc/hothouse/credentials/flower_broker_url")
SECOND_FLOWER, SECOND_REDIS = "hothouse-benchmark-flower.service", "hothouse-benchmark-redis.service"
FLOWER_METRICS = "http://127.0.0.1:5555/flower/metrics"

# Run as the application. Arguments: rate, seconds, queue. Prints how many tasks it published.
PUBLISH = """
import sys, time
from hothouse_celery import PING_TASK, app
rate, seconds, queue = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
begin, sent = time.monotonic(), 0
with app.producer_pool.acquire(block=True) as producer:
    while (passed := time.monotonic() - begin) < seconds:
        while sent < rate * passed:
            app.tasks[PING_TASK].apply_async(queue=queue, ignore_result=True, producer=producer)
            sent += 1
        time.sleep(0.01)
print(sent)
"""
# Run as Flower. Argument: seconds. Prints the events of that time.
RECORD = """
import json, sys, time
from hothouse_celery import app
events, end = [], time.monotonic() + float(sys.argv[1])
with app.connection_for_read() as connection:
    receiver = app.events.Receiver(connection, handlers={"*": events.append})
    with receiver.consumer_context() as (connection, _, _):
        while time.monotonic() < end:
            connection.drain_events(timeout=5)
print(json.dumps(events))
"""
# Run as Flower, for the second one. Arguments: a file with the events of some tasks, how many tasks to make of them,
# the address of Flower's metrics, for it must not queue what it has yet to look at.
REPLAY = """
import json, re, sys, time, urllib.request
from celery import uuid
from celery.events.event import get_exchange
from hothouse_celery import app

def seen():
    page = urllib.request.urlopen(sys.argv[3]).read().decode()
    return sum(map(float, re.findall(r'^flower_events_total{.*"task-succeeded".*} (.+)', page, re.M)))

tasks, count, clock = json.load(open(sys.argv[1])), int(sys.argv[2]), 0
with app.connection_for_write() as connection:
    producer = connection.Producer(exchange=get_exchange(connection, app.conf.event_exchange), serializer="json")
    for first in range(0, count, 100):
        events = []
        for number in range(first, first + 100):
            name = uuid()
            for event in tasks[number % len(tasks)]:
                clock += 1
                events.append(event | {"uuid": name, "clock": clock, "timestamp": time.time()})
                if "root_id" in event:
                    events[-1]["root_id"] = name
        producer.publish(events, routing_key="task.multi")
        while first + 100 - seen() > 200:
            time.sleep(0.01)
    while seen() < count:
        time.sleep(0.1)
"""
FLOWER_CONF = """
exec(open("/etc/hothouse/flowerconfig.py").read())
address, port, max_tasks, db = "127.0.0.1", {port}, {kept}, "{work}/flower"
"""


def processes(unit: str) -> dict[int, float]:
    """Process id → seconds of processor time it has used, of each process of a unit."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(line.endswith(f"/{unit}") for line in (folder / "cgroup").read_text().splitlines()):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except FileNotFoundError:  # it has ended
            continue
    if not found:
        sys.exit(f"{unit} does not run on this host")
    return found


def memory(unit: str) -> float:
    """The memory of a unit in MB: private, and its share of what is shared (PSS)."""
    pages = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes(unit)]
    return sum(int(match[1]) for page in pages if (match := re.search(r"^Pss: +(\d+) kB", page, re.M))) / 1000


def read(url: str, login: str = "") -> str:
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
    return text


def completed() -> float:
    """How many pings Flower has seen succeed."""
    pattern = r'^flower_events_total{task="hothouse\.ping",type="task-succeeded",.*} (.+)'
    return sum(map(float, re.findall(pattern, read(FLOWER_METRICS), re.M)))


def wait(condition: Callable[[], Any], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not come true in {seconds:g} s")
        time.sleep(0.2)


def load_average() -> str:
    return Path("/proc/loadavg").read_text().split()[0]


def as_flower(broker_url: Path, *words: str) -> list[str]:
    """A command under systemd, as the account and with the settings of Flower."""
    return [
        "systemd-run", "--quiet", "--collect", "--property=User=hothouse-flower",
        f"--property=LoadCredential=broker_url:{broker_url}", "--setenv=PYTHONPATH=/opt/hothouse/lib",
        "--setenv=HOTHOUSE_SETTINGS=/etc/hothouse/flower.json", *words,
    ]  # fmt: skip


def python(*words: str) -> list[str]:
    """What `as_flower` takes to run Python and wait for it."""
    return ["--pipe", "--wait", "/opt/hothouse/flower/current/bin/python", "-c", *words]


def watch(seconds: int) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """Percent of a processor, samples of memory in MB, both by unit, and the seconds that really passed."""
    units = MONITORING + BESIDE
    begin, before = time.monotonic(), {unit: processes(unit) for unit in units}
    sizes: dict[str, list[float]] = {unit: [] for unit in units}
    while (passed := time.monotonic() - begin) < seconds:
        for unit in units:
            sizes[unit].append(memory(unit))
        time.sleep(min(SAMPLE_SECONDS, seconds - passed))
    passed = time.monotonic() - begin
    percent = {}
    for unit in units:
        after = processes(unit)
        if after.keys() != before[unit].keys():
            sys.exit(f"{unit} was restarted meanwhile: run this again")
        percent[unit] = 100 * sum(after[process] - before[unit][process] for process in after) / passed
    return percent, sizes, passed


def under_load(seconds: int, rate: float, queue: str) -> bool:
    """Print the first table and write down the events of some tasks; whether the budget is kept."""
    whole = WARM_UP_SECONDS + seconds + RECORD_SECONDS + 5
    loads, before = [load_average()], completed()
    publish = ["hothouse-run", "python", "-c", PUBLISH, str(rate), str(whole), queue]
    with subprocess.Popen(publish, stdout=subprocess.PIPE, text=True) as publisher:
        time.sleep(WARM_UP_SECONDS)
        done = completed()
        percent, sizes, passed = watch(seconds)
        reached = (completed() - done) / passed
        loads.append(load_average())
        record = as_flower(FLOWER_URL, *python(RECORD, str(RECORD_SECONDS)))
        events = json.loads(subprocess.run(record, stdout=subprocess.PIPE, check=True).stdout)
        sent = int(publisher.communicate()[0])
    wait(lambda: completed() - before >= sent, f"the end of {sent} tasks", 120)
    (WORK / "events.json").write_text(json.dumps(whole_tasks(events)))

    print(
        f"{rate:g} tasks/s for {passed:.0f} s: {sent / whole:.1f}/s published, {reached:.1f}/s completed; "
        f"{os.cpu_count()} processors, load average {' → '.join(loads)}\n"
    )
    row("", "% of one core", "MB, median", "MB, most")
    for unit in MONITORING:
        row(unit.removesuffix(".service"), percent[unit], statistics.median(sizes[unit]), max(sizes[unit]))
    total = [sum(sample) for sample in zip(*(sizes[unit] for unit in MONITORING), strict=True)]
    cost = (sum(percent[unit] for unit in MONITORING), statistics.median(total), max(total))
    row("sum", *cost)
    row("budget", BUDGET_PERCENT, BUDGET_MB, BUDGET_MB)
    row("sum ÷ budget", cost[0] / BUDGET_PERCENT, cost[1] / BUDGET_MB, cost[2] / BUDGET_MB)
    print("\nbeside it")
    for unit in BESIDE:
        name = "systemd" if unit == "init.scope" else unit.removesuffix(".service")
        row(name, percent[unit], statistics.median(sizes[unit]), max(sizes[unit]))
    return cost[0] <= BUDGET_PERCENT and cost[2] <= BUDGET_MB


def row(name: str, *cells: float | str) -> None:
    words = [cell if isinstance(cell, str) else f"{cell:,.2f}" for cell in cells]
    print(f"{name:30}" + "".join(f"{word:>16}" for word in words), flush=True)


def whole_tasks(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each ping that was received, started and succeeded, in this order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        event.pop("local_received")
        if event["type"].startswith("task-"):
            found.setdefault(event["uuid"], []).append(event)
    types = ["task-received", "task-started", "task-succeeded"]
    tasks = [
        task
        for task in found.values()
        if [event["type"] for event in task] == types and task[0]["name"] == "hothouse.ping"
    ]
    if len(tasks) < 50:
        sys.exit(f"only {len(tasks)} whole tasks were among {len(events)} events")
    return tasks


def start_redis() -> None:
    """One of our own, without the network, that drops no client that is slow to listen."""
    socket_file = WORK / "redis.sock"
    words = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(socket_file),
        "--save",
        "",
        "--dir",
        str(WORK),
    ]
    words += ["--client-output-buffer-limit", "pubsub 0 0 0"]
    run = ["systemd-run", "--quiet", "--collect", f"--unit={SECOND_REDIS}", "--property=User=hothouse-flower"]
    subprocess.run(run + words, check=True)
    wait(socket_file.exists, "Redis", 10)


def keeping(count: int) -> None:
    """Print what a Flower needs that keeps so many tasks, a row of the second table."""
    url, login, conf, saved = (WORK / name for name in ("broker_url", "login", "conf.py", "flower.db"))
    url.write_text(f"redis+socket://{WORK}/redis.sock")
    login.write_text("benchmark")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    conf.write_text(FLOWER_CONF.format(port=port, kept=count, work=WORK))
    words = [f"--property=LoadCredential={name}:{login}" for name in ("user", "password")]
    words += [f"--unit={SECOND_FLOWER}", "--service-type=notify", "/opt/hothouse/flower/current/bin/celery"]
    words += ["--quiet", "--app", "hothouse_celery", "flower", f"--conf={conf}"]
    subprocess.run(as_flower(url, *words), check=True)
    site = f"http://127.0.0.1:{port}/flower"
    idle, begin = memory(SECOND_FLOWER), time.time()
    replay = python(REPLAY, str(WORK / "events.json"), str(int(FULL * count)), f"{site}/metrics")
    subprocess.run(as_flower(url, *replay), check=True)
    end = time.time()
    wait(lambda: saved.exists() and saved.stat().st_mtime > end, "the saved state", 200)
    size = memory(SECOND_FLOWER)
    status = Path(f"/proc/{next(iter(processes(SECOND_FLOWER)))}/status").read_text()
    most = int(status.partition("VmHWM:")[2].split()[0]) / 1000
    query = {"draw": 1, "start": 0, "length": 1, "search[value]": "", "columns[0][data]": "name"}
    query |= {"order[0][column]": 0, "order[0][dir]": "asc"}
    table = json.loads(read(f"{site}/tasks/datatable?{urllib.parse.urlencode(query)}", "benchmark:benchmark"))
    if table["recordsTotal"] != count:
        sys.exit(f"Flower keeps {table['recordsTotal']} tasks instead of {count}")
    row(f"{count:,} tasks", idle, size, most, 1000 * (size - idle) / count, end - begin)
    subprocess.run(["systemctl", "stop", SECOND_FLOWER], check=True)
    saved.unlink()


def on_the_host(options: argparse.Namespace) -> bool:
    """Measure both here, and put everything back."""
    if WORK.exists():
        sys.exit(f"{WORK} exists: another run is under way, or was killed; then remove it")
    WORK.mkdir()
    shutil.chown(WORK, "hothouse-flower", "hothouse-flower")
    try:
        shutil.copyfile(FLOWER_STATE, WORK / "before.db")
        kept_budget = under_load(options.seconds, options.rate, options.queue)
        start_redis()
        row("\nFlower keeps", "MB at first", "MB", "MB, most", "MB per 1,000", "s to fill it")
        for count in options.kept:
            keeping(count)
    finally:
        for unit in (SECOND_FLOWER, SECOND_REDIS):
            subprocess.run(["systemctl", "stop", unit], check=False, stderr=subprocess.DEVNULL)
        if (WORK / "before.db").exists():
            subprocess.run(["systemctl", "stop", "celery-flower"], check=True)
            shutil.copyfile(WORK / "before.db", FLOWER_STATE)
            subprocess.run(["systemctl", "start", "celery-flower"], check=True)
        shutil.rmtree(WORK)
    return kept_budget


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ssh", default=".hothouse/ssh/hothouse-local.config", help="configuration of SSH")
    parser.add_argument("--host", default="local1")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--queue", default="default")
    parser.add_argument("--kept", type=int, nargs="+", default=[5000, 10_000, 100_000])
    parser.add_argument("--here", action="store_true", help="measure this machine, as root")
    options = parser.parse_args()
    if options.here:
        return 0 if on_the_host(options) else 1
    words = ["ssh", "-F", options.ssh, options.host, "python3", "-", *sys.argv[1:], "--here"]
    return subprocess.run(words, input=Path(__file__).read_text(), text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
