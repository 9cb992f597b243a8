"""What runs as whom, with which rights: the tables of docs/security.md are what living hosts do, in both directions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
from conftest import REPOSITORY, Stack

TEXT = (REPOSITORY / "docs/security.md").read_text()

# Where everyone may write.
COMMON = {"/dev/mqueue", "/dev/shm", "/tmp", "/var/tmp"}
COMMON_OF_ROOT = {"/dev/hugepages", "/dev/pts"}

# Run on a host as root. Prints of each kind of process that is part of a service: its unit, its account, its effective and
# its bounding set of capabilities, whether it can gain rights, and what it can write to. It asks the kernel as that account, with those
# capabilities, in that process' view of the file system, which it has as its working directory.
PROBE = r"""
import json, os, pwd, re, subprocess, sys
from fnmatch import fnmatchcase
from pathlib import Path

found = {}
for status in Path("/proc").glob("[0-9]*/status"):
    folder = status.parent
    try:
        os.readlink(folder / "exe")
        fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status.read_text(), re.M))
        unit = re.search(r"^0::.*/([^/\n]+\.service)$", (folder / "cgroup").read_text(), re.M)
    except OSError:  # it has ended
        continue
    if unit and not any(fnmatchcase(unit[1], glob) for glob in sys.argv[1:]):
        name = re.sub(r"@.*(?=\.service)", "@*", re.sub(r"^(hothouse-run-).*(?=\.service)", r"\1*", unit[1]))
        key = (name, fields["Uid"], fields["CapEff"], fields["CapBnd"], fields["NoNewPrivs"])
        found.setdefault(key, (folder, fields))
answer = []
for (name, *_), (folder, fields) in found.items():
    uid, gid = (fields[key].split()[1] for key in ("Uid", "Gid"))
    groups = ",".join(fields["Groups"].split())
    kept = [f"+cap_{bit}" for bit in range(64) if int(fields["CapEff"], 16) >> bit & 1]
    words = ["setpriv", "--reuid", uid, "--regid", gid, *(["--groups", groups] if groups else ["--clear-groups"])]
    words += ["--inh-caps=-all", "--bounding-set=" + ",".join(["-all", *kept]), "find", "."]
    # A release of Debian's own files is too long to look at.
    words += ["(", "-path", "./proc", "-o", "-path", "./sys", "-o", "-path", "./usr", ")", "-prune", "-o"]
    words += ["(", "-type", "d", "-o", "-type", "f", ")", "-writable", "-prune", "-print"]
    done = subprocess.run(words, cwd=folder / "root", capture_output=True, text=True)
    if not folder.exists():
        continue
    answer.append({
        "unit": name, "account": pwd.getpwuid(int(uid)).pw_name, "effective": fields["CapEff"],
        "bounding": fields["CapBnd"], "sealed": fields["NoNewPrivs"] == "1",
        "writes": [line[1:] or "/" for line in done.stdout.splitlines()],
    })
print(json.dumps(answer))
"""

# linux/capability.h, those that the stack uses: number → name.
CAPABILITIES = {
    0: "CHOWN",
    5: "KILL",
    6: "SETGID",
    7: "SETUID",
    10: "NET_BIND_SERVICE",
    12: "NET_ADMIN",
    25: "SYS_TIME",
}


class Row(NamedTuple):
    """A line of one of the tables of processes."""

    unit: str
    where: str
    account: str
    capabilities: str
    writes: frozenset[str]
    exposure: float

    def on(self, nouns: list[str]) -> bool:
        """Whether a host with these nouns has it."""
        return self.where == "every host" or self.where in nouns


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def table(heading: str, first: str) -> Iterator[list[str]]:
    """The cells of each line of the table below `heading` whose first column is called `first`."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = section.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    assert lines, (heading, first)
    for line in lines:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def rows(heading: str, first: str) -> list[Row]:
    return [
        Row(
            quoted(unit)[0], where.strip("`"), account.strip("`"), capabilities, frozenset(quoted(writes)),
            float(exposure),
        )
        for unit, where, account, capabilities, writes, exposure in table(heading, first)
    ]  # fmt: skip


LASTING = rows("Every process", "process")
BRIEF = rows("What runs for a moment", "unit")
DEBIANS = quoted(TEXT.partition("Debian's own processes")[2].partition("\n## ")[0])


def on_every_host(stack: Stack, script: str) -> dict[str, str]:
    """What a shell's command prints on each host."""
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda name: stack.host(name).check_output(script), stack.variables)
        return dict(zip(stack.variables, answers, strict=True))


def exposure(units: str) -> str:
    """A shell's command that prints a line of `systemd-analyze security` for each of the units."""
    return f"for unit in {units}; do systemd-analyze security --no-pager $unit | tail -n 1; done"


def exposed(line: str) -> float:
    """The figure in such a line."""
    return float(line.split(":")[1].split()[0])


@pytest.fixture(scope="module")
def processes(stack: Stack) -> dict[str, list[dict[str, Any]]]:
    """What runs on each host, a command of the application included where there is one."""
    command = shlex.join(["python3", "-c", PROBE, *DEBIANS])
    # systemd-run waits until the command has begun.
    begin = "command -v hothouse-run >/dev/null && (hothouse-run sleep 300 >/dev/null 2>&1 </dev/null &) && " \
        "until systemctl --quiet is-active 'hothouse-run-*'; do sleep 0.2; done"  # fmt: skip
    units = "$(systemctl list-units --plain --no-legend 'hothouse-run-*' | cut -d ' ' -f 1)"
    end = f"if systemctl is-active --quiet 'hothouse-run-*'; then {exposure(units)}; systemctl stop 'hothouse-run-*'; fi"
    found = {}
    for name, text in on_every_host(stack, f"{begin}; {command}; {end}").items():
        first, *rest = text.splitlines()
        found[name] = json.loads(first)
        assert len(rest) == ("app" in stack.variables[name]["group_names"]), (name, rest)
        for line in rest:
            assert exposed(line) <= next(row.exposure for row in LASTING if "hothouse-run" in row.unit), (
                name,
                line,
            )
    return found


def fits(row: Row, process: dict[str, Any]) -> bool:
    """Whether a process is what a line says."""
    bits = int(process["effective"], 16)
    effective = {CAPABILITIES.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1}
    stated = set(quoted(row.capabilities))
    rights = effective <= stated if "at most" in row.capabilities else effective == stated
    if row.capabilities == "none":
        rights = rights and (process["sealed"] or int(process["bounding"], 16) == 0)
    return (
        fnmatchcase(process["unit"], row.unit)
        and process["account"] == row.account
        and rights
        and set(process["writes"]) - COMMON - (COMMON_OF_ROOT if row.account == "root" else set())
        == row.writes
    )


def test_every_process_is_in_the_list_and_every_line_of_it_is_a_process(
    stack: Stack, processes: dict[str, list[dict[str, Any]]]
) -> None:
    for name, found in processes.items():
        lines = [row for row in LASTING if row.on(stack.variables[name]["prepare_nouns"])]
        for process in found:
            assert any(fits(row, process) for row in lines), f"{name}: no line for {process}"
        for row in lines:
            alike = [process for process in found if fnmatchcase(process["unit"], row.unit)]
            assert any(fits(row, process) for process in alike), f"{name}: nothing is {row}, but {alike}"


def show(stack: Stack, host: str, unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit, of any instance."""
    if "@" in unit:
        unit = next(found for found in stack.units(host) if fnmatchcase(found, unit))
    shown = stack.host(host).check_output(f"systemctl show -p {','.join(names)} {unit}")
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_what_runs_for_a_moment_has_the_rights_that_the_list_says(stack: Stack) -> None:
    for name, variables in stack.variables.items():
        for row in BRIEF:
            if not row.on(variables["prepare_nouns"]):
                continue
            properties = show(
                stack, name, row.unit, "User", "DynamicUser", "CapabilityBoundingSet", "ProtectSystem",
                "ReadWritePaths", "StateDirectory", "NoNewPrivileges",
            )  # fmt: skip
            own = "one of its own" if properties["DynamicUser"] == "yes" else properties["User"] or "root"
            assert own == row.account, (name, row)
            capabilities = {
                word.removeprefix("cap_").upper() for word in properties["CapabilityBoundingSet"].split()
            }
            assert capabilities == set(quoted(row.capabilities)), (name, row)
            assert (properties["ProtectSystem"], properties["NoNewPrivileges"]) == ("strict", "yes"), (
                name,
                row,
            )
            writes = {f"/var/lib/{folder}" for folder in properties["StateDirectory"].split()}
            assert writes | set(properties["ReadWritePaths"].split()) == row.writes, (name, row)


def test_every_unit_file_of_ours_is_in_a_list(stack: Stack) -> None:
    """Also one that does not run now."""
    found = on_every_host(
        stack, "grep --files-with-matches --no-messages roles/ /etc/systemd/system/*.service || true"
    )
    for name, text in found.items():
        for path in text.split():
            unit = path.rpartition("/")[2].replace("@.", "@*.")
            assert any(row.unit == unit for row in LASTING + BRIEF), (name, path)


def test_no_unit_is_more_exposed_than_its_line_says(
    stack: Stack, processes: dict[str, list[dict[str, Any]]]
) -> None:
    """`systemd-analyze security`. What is above 2.5 has its reason under the list."""
    reasons = TEXT.partition("Above 2.5 ")[2].partition("\n\n")[0]
    for row in LASTING + BRIEF:
        assert row.exposure <= 2.5 or row.unit in quoted(reasons), row
    for name, variables in stack.variables.items():
        here = [
            row
            for row in LASTING + BRIEF
            if row.on(variables["prepare_nouns"]) and "hothouse-run" not in row.unit
        ]
        units = list(dict.fromkeys(row.unit for row in here))
        names = [show_name(stack, name, unit) for unit in units]
        lines = stack.host(name).check_output(exposure(" ".join(names))).splitlines()
        for unit, line in zip(units, lines, strict=True):
            assert exposed(line) <= min(row.exposure for row in here if row.unit == unit), (name, unit, line)


def show_name(stack: Stack, host: str, unit: str) -> str:
    """A unit that systemd knows: any instance for a template."""
    return next(found for found in stack.units(host) if fnmatchcase(found, unit)) if "@" in unit else unit


def test_what_root_does_for_a_service_is_in_the_list(stack: Stack) -> None:
    stated = {
        (quoted(command)[0], unit)
        for command, units in table("What runs for a moment", "command")
        for unit in quoted(units)
    }
    kinds = (
        "ExecStartPreEx",
        "ExecStartEx",
        "ExecStartPostEx",
        "ExecReloadEx",
        "ExecStopEx",
        "ExecStopPostEx",
    )
    for name, variables in stack.variables.items():
        here = {row.unit for row in LASTING + BRIEF if row.on(variables["prepare_nouns"])}
        here = {unit for unit in here if "hothouse-run" not in unit}
        found = set()
        for unit in here:
            shown = show_lines(stack, name, unit, kinds)
            found |= {
                (path, unit)
                for path, flags in re.findall(r"\{ path=(\S+) ;.*?flags=([^;]*);", shown)
                if "privileged" in flags
            }
        assert found == {(path, unit) for path, unit in stated if unit in here}, name


def show_lines(stack: Stack, host: str, unit: str, names: tuple[str, ...]) -> str:
    """Properties that can occur several times, as systemctl prints them."""
    return stack.host(host).check_output(
        f"systemctl show -p {','.join(names)} {show_name(stack, host, unit)}"
    )


def test_memory_is_bounded_and_redis_is_the_last_to_go(stack: Stack) -> None:
    lines = list(table("Memory", "service"))
    units = {row.unit: row for row in LASTING}
    assert {quoted(unit)[0] for unit, *_ in lines} == set(units)
    variables = sorted({word for _, _, most, _ in lines for word in quoted(most) if word.endswith("_max_mb")})
    values = stack.values(variables)
    for unit, score, most, tasks in [[quoted(unit)[0], *rest] for unit, *rest in lines]:
        for host in stack.variables:
            if not units[unit].on(stack.variables[host]["prepare_nouns"]) or unit.startswith("hothouse-run"):
                continue
            names = [found for found in stack.units(host) if fnmatchcase(found, unit)] or [unit]
            for name in names:
                found = show(stack, host, name, "OOMScoreAdjust", "MemoryMax", "TasksMax", "MainPID")
                assert found["OOMScoreAdjust"] == score.partition(",")[0], (host, name)
                assert found["MemoryMax"] == memory(stack, host, name, most, values[host]), (host, name)
                assert not tasks or found["TasksMax"] == tasks, (host, name)
                if (
                    int(score.partition(",")[0]) > 0
                ):  # what the kernel has; a container may not ask for less than it has
                    actual = stack.host(host).check_output(f"cat /proc/{found['MainPID']}/oom_score_adj")
                    assert actual == score.partition(",")[0], (host, name)


def memory(stack: Stack, host: str, unit: str, cell: str, values: dict[str, Any]) -> str:
    """The MemoryMax= that a cell of the table stands for, as systemctl prints it."""
    if unit.startswith("celery-worker@"):
        pool = next(
            pool
            for pool in stack.variables[host]["worker_pools"]
            if re.fullmatch(rf"celery-worker@{pool['name']}-\d+\.service", unit)
        )
        most = pool.get("memory_max_mb")
    elif cell.startswith("none"):
        most = None
    else:
        known = [values[name] for name in quoted(cell) if values.get(name) is not None]
        most = known[0] if known else re.findall(r"\d+", cell)[-1]
    return "infinity" if most is None else str(int(most) * 1024**2)


def test_children_of_a_worker_go_before_it(stack: Stack) -> None:
    """The kernel's own figures, of a pool with processes."""
    for host in stack.group("worker"):
        for pool in stack.variables[host]["worker_pools"]:
            if pool.get("pool", "prefork") != "prefork":
                continue
            main = show(stack, host, f"celery-worker@{pool['name']}-1.service", "MainPID")["MainPID"]
            command = f"cat /proc/{main}/task/*/children | tr ' ' '\\n' | sed 's,.*,/proc/&/oom_score_adj,' | xargs cat"
            scores = stack.host(host).check_output(command).split()
            assert scores and set(scores) == {"700"}, (host, pool["name"], scores)


@pytest.mark.scenarios("own-app")
def test_a_task_reaches_neither_the_secrets_nor_the_processes_of_other_services(stack: Stack) -> None:
    """A real task, in the sandbox of its worker, beside beat, Flower and Redis."""
    host = stack.first("worker")
    own = host.check_output("ls -d /run/credentials/celery-worker@*").splitlines()
    others = host.check_output(
        "ls -d /run/credentials/celery-beat.service /run/credentials/celery-flower.service"
    ).split()
    files = [
        *host.check_output("find /etc/hothouse/credentials -type f").split(),
        "/var/lib/hothouse/flower/flower.db",
    ]
    files += [
        "/etc/redis/users.acl",
        "/var/lib/redis/redis.conf",
        *(f"{folder}/broker_url" for folder in others),
    ]
    units = ("celery-beat.service", "celery-flower.service", "redis-server.service", "nginx.service")
    pids = {unit: show(stack, stack.group("worker")[0], unit, "MainPID")["MainPID"] for unit in units}
    files += [f"/proc/{pid}/environ" for pid in pids.values()]
    assert own and len(files) > 10
    for path in files:  # what root reads is there
        host.check_output(f"head --bytes 1 {path} >/dev/null")
    code = (
        "import hothouse_celery as h, json, sys;"
        f"print(json.dumps(h.app.send_task('tally.reach', {[files, [int(pid) for pid in pids.values()]]!r}).get(timeout=30)))"
    )
    read, signalled = json.loads(host.check_output(f"hothouse-run python -c {shlex.quote(code)}"))
    assert read == []
    assert signalled == dict.fromkeys(pids.values(), "PermissionError")
