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
COMMON = {"/dev/mqueue", "/dev/shm", "/run/lock", "/tmp", "/var/tmp"}
COMMON_OF_ROOT = {"/dev/hugepages", "/dev/pts"}

# Run on a host as root. Of each kind of process that is part of a service it prints the unit, the account, the
# effective and the bounding set of capabilities, whether the process can never gain rights, and what it can write to.
# That it asks the kernel as the same account, with the same capabilities, in the same view of the file system.
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
        name = re.sub(r"^(.*@|hothouse-run-).*(?=\.service)", r"\1*", unit[1])
        found.setdefault((name, *(fields[key] for key in ("Uid", "CapEff", "CapBnd", "NoNewPrivs"))), (folder, fields))
answer = []
for (name, *_), (folder, fields) in found.items():
    uid, gid = (fields[key].split()[1] for key in ("Uid", "Gid"))
    groups = ",".join(fields["Groups"].split())
    kept = [f"+cap_{bit}" for bit in range(64) if int(fields["CapEff"], 16) >> bit & 1]
    words = ["setpriv", "--reuid", uid, "--regid", gid, *(["--groups", groups] if groups else ["--clear-groups"])]
    words += ["--inh-caps=-all", "--bounding-set=" + ",".join(["-all", *kept]), "find", "."]
    # /usr has too many files, and is of Debian's packages.
    words += ["(", "-path", "./proc", "-o", "-path", "./sys", "-o", "-path", "./usr", ")", "-prune", "-o"]
    words += ["(", "-type", "d", "-o", "-type", "f", ")", "-writable", "-prune", "-print"]
    try:
        done = subprocess.run(words, cwd=folder / "root", capture_output=True, text=True)
    except OSError:
        continue
    answer.append({
        "unit": name, "account": pwd.getpwuid(int(uid)).pw_name, "effective": fields["CapEff"],
        "bounding": fields["CapBnd"], "sealed": fields["NoNewPrivs"] == "1",
        "writes": [line[1:] or "/" for line in done.stdout.splitlines()],
    })
print(json.dumps(answer))
"""

# linux/capability.h, those that the stack uses: number → name.
CAPABILITIES = {0: "CHOWN", 5: "KILL", 6: "SETGID", 7: "SETUID", 10: "NET_BIND_SERVICE", 25: "SYS_TIME"}

# Where systemd keeps a unit's commands, each with its flags.
COMMANDS = ",".join(
    f"Exec{kind}Ex" for kind in ("StartPre", "Start", "StartPost", "Reload", "Stop", "StopPost")
)
COMMAND_OF_THE_APPLICATION = "hothouse-run-*.service"


class Row(NamedTuple):
    """A line of one of the tables of processes."""

    unit: str
    where: str
    account: str
    capabilities: str
    writes: frozenset[str]
    exposure: float


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
            quoted(unit)[0],
            where.strip("`"),
            account.strip("`"),
            rights,
            frozenset(quoted(writes)),
            float(figure),
        )
        for unit, where, account, rights, writes, figure in table(heading, first)
    ]


LASTING = rows("Every process", "process")
BRIEF = rows("What runs for a moment", "unit")
DEBIANS = quoted(TEXT.partition("Debian's own processes")[2].partition("\n## ")[0])


def here(stack: Stack, host: str, listed: list[Row]) -> list[Row]:
    """The lines that are about this host."""
    return [row for row in listed if row.where in ("every host", *stack.variables[host]["prepare_nouns"])]


def units_here(stack: Stack, host: str) -> list[str]:
    """The units of these lines, but for the one that only a command has."""
    units = dict.fromkeys(row.unit for row in here(stack, host, LASTING + BRIEF))
    return [unit for unit in units if unit != COMMAND_OF_THE_APPLICATION]


def instances(stack: Stack, host: str, unit: str) -> list[str]:
    """The units of this name, several if it is that of a template."""
    return [name for name in stack.units(host) if fnmatchcase(name, unit)] if "@" in unit else [unit]


def show_all(stack: Stack, host: str, units: list[str], properties: str) -> dict[str, str]:
    """What systemctl prints of these properties, by unit."""
    shown = stack.host(host).check_output(f"systemctl show -p {properties} {' '.join(units)}")
    return dict(zip(units, shown.split("\n\n"), strict=True))


def show(stack: Stack, host: str, unit: str, properties: str) -> dict[str, str]:
    """The same of one unit, by property."""
    return dict(line.split("=", 1) for line in show_all(stack, host, [unit], properties)[unit].splitlines())


def exposure(units: str) -> str:
    """A shell's command that prints a line of `systemd-analyze security` for each of the units."""
    return f"for unit in {units}; do systemd-analyze security --no-pager $unit | tail -n 1; done"


def exposed(line: str) -> float:
    """The figure in such a line."""
    return float(line.split(":")[1].split()[0])


def on_every_host(stack: Stack, script: str) -> dict[str, str]:
    """What a shell's command prints on each host."""
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda name: stack.host(name).check_output(script), stack.variables)
        return dict(zip(stack.variables, answers, strict=True))


@pytest.fixture(scope="module")
def probed(stack: Stack) -> dict[str, list[str]]:
    """What PROBE prints on each host; where there is the application, while a command of it runs, and its exposure."""
    command = f"hothouse-run sleep 300 >/dev/null 2>&1 </dev/null & until {active()}; do sleep 0.2; done"
    script = f"""
        if command -v hothouse-run >/dev/null; then {command}; fi
        {shlex.join(["python3", "-c", PROBE, *DEBIANS])}
        if {active()}; then
            {exposure(f"$(systemctl list-units --plain --no-legend '{COMMAND_OF_THE_APPLICATION}' | cut -d ' ' -f 1)")}
            systemctl stop '{COMMAND_OF_THE_APPLICATION}'
        fi"""
    return {name: text.splitlines() for name, text in on_every_host(stack, script).items()}


def active() -> str:
    return f"systemctl --quiet is-active '{COMMAND_OF_THE_APPLICATION}'"


def matched(paths: set[str], globs: frozenset[str]) -> bool:
    """Whether each path is one that is stated, and each that is stated is there."""
    return all(any(fnmatchcase(path, glob) for glob in globs) for path in paths) and all(
        any(fnmatchcase(path, glob) for path in paths) for glob in globs
    )


def fits(row: Row, process: dict[str, Any]) -> bool:
    """Whether a process is what a line says."""
    bits = int(process["effective"], 16)
    effective = {CAPABILITIES.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1}
    stated = set(quoted(row.capabilities))
    common = COMMON | (COMMON_OF_ROOT if row.account == "root" else set())
    return (
        fnmatchcase(process["unit"], row.unit)
        and process["account"] == row.account
        and (effective <= stated if "at most" in row.capabilities else effective == stated)
        and (row.capabilities != "none" or process["sealed"] or int(process["bounding"], 16) == 0)
        and matched(set(process["writes"]) - common, row.writes)
    )


def test_every_process_is_in_the_list_and_every_line_of_it_is_a_process(
    stack: Stack, probed: dict[str, list[str]]
) -> None:
    for name, (text, *_) in probed.items():
        processes, listed = json.loads(text), here(stack, name, LASTING)
        for process in processes:
            assert any(fits(row, process) for row in listed), f"{name}: no line is {process}"
        for row in listed:
            alike = [process for process in processes if fnmatchcase(process["unit"], row.unit)]
            assert any(fits(row, process) for process in alike), f"{name}: nothing is {row}, but {alike}"


def test_what_runs_for_a_moment_has_the_rights_that_the_list_says(stack: Stack) -> None:
    names = (
        "User,DynamicUser,CapabilityBoundingSet,ProtectSystem,NoNewPrivileges,"
        "ReadWritePaths,RuntimeDirectory,StateDirectory"
    )
    for name in stack.variables:
        for row in here(stack, name, BRIEF):
            found = show(stack, name, row.unit, names)
            account = "one of its own" if found["DynamicUser"] == "yes" else found["User"] or "root"
            assert account == row.account, (name, row)
            rights = {word.removeprefix("cap_").upper() for word in found["CapabilityBoundingSet"].split()}
            assert rights == set(quoted(row.capabilities)), (name, row)
            assert (found["ProtectSystem"], found["NoNewPrivileges"]) == ("strict", "yes"), (name, row)
            writes = {path.removeprefix("-") for path in found["ReadWritePaths"].split()}
            writes |= {f"/run/{folder}" for folder in found["RuntimeDirectory"].split()}
            writes |= {f"/var/lib/{folder}" for folder in found["StateDirectory"].split()}
            assert writes == row.writes, (name, row)


def test_every_unit_file_of_ours_is_in_a_list(stack: Stack) -> None:
    """Also one that does not run now."""
    script = "grep --files-with-matches --no-messages roles/ /etc/systemd/system/*.service || true"
    listed = {row.unit for row in LASTING + BRIEF}
    for name, text in on_every_host(stack, script).items():
        files = {path.rpartition("/")[2].replace("@.", "@*.") for path in text.split()}
        assert files <= listed, (name, files - listed)


def test_no_unit_is_more_exposed_than_its_line_says(stack: Stack, probed: dict[str, list[str]]) -> None:
    """`systemd-analyze security`. What is above 2.5 has its reason under the list."""
    most = {row.unit: row.exposure for row in LASTING + BRIEF}
    reasons = quoted(TEXT.partition("Above 2.5 ")[2].partition("\n\n")[0])
    assert {unit for unit in most if most[unit] > 2.5} == set(reasons)
    for name in stack.variables:
        for line in probed[name][1:]:
            assert exposed(line) <= most[COMMAND_OF_THE_APPLICATION], (name, line)
        assert len(probed[name]) == 1 + (name in stack.group("app")), name
        units = units_here(stack, name)
        named = " ".join(instances(stack, name, unit)[0] for unit in units)
        lines = stack.host(name).check_output(exposure(named)).splitlines()
        for unit, line in zip(units, lines, strict=True):
            assert exposed(line) <= most[unit], (name, unit, line)


def test_what_root_does_for_a_service_is_in_the_list(stack: Stack) -> None:
    stated = {
        (quoted(command)[0], unit)
        for command, units in table("What runs for a moment", "command")
        for unit in quoted(units)
    }
    for name in stack.variables:
        units, found = units_here(stack, name), set()
        named = {instances(stack, name, unit)[0]: unit for unit in units}
        for instance, shown in show_all(stack, name, list(named), COMMANDS).items():
            commands = re.findall(r"\{ path=(\S+) ;.*?flags=([^;]*);", shown)
            found |= {(path, named[instance]) for path, flags in commands if "privileged" in flags}
        assert found == {(path, unit) for path, unit in stated if unit in units}, name


def test_memory_is_bounded_and_redis_is_the_last_to_go(stack: Stack) -> None:
    lines = [
        (quoted(unit)[0], score.partition(",")[0], *rest) for unit, score, *rest in table("Memory", "service")
    ]
    assert {unit for unit, *_ in lines} == {row.unit for row in LASTING}
    assert min(lines, key=lambda line: int(line[1]))[0] == "redis-server.service"
    values = stack.values(
        sorted({word for _, _, most, _ in lines for word in quoted(most) if word.endswith("_max_mb")})
    )
    properties = "OOMScoreAdjust,MemoryMax,TasksMax,MainPID"
    for host in stack.variables:
        listed = units_here(stack, host)
        wanted = {
            name: line for line in lines if line[0] in listed for name in instances(stack, host, line[0])
        }
        for name, shown in show_all(stack, host, list(wanted), properties).items():
            _, score, most, tasks = wanted[name]
            found = dict(line.split("=", 1) for line in shown.splitlines())
            limit = memory_max(stack, host, name, most, values[host])
            assert (found["OOMScoreAdjust"], found["MemoryMax"]) == (score, limit), (host, name)
            assert found["TasksMax"] == (tasks or found["TasksMax"]), (host, name)
            # In a container nobody may lower it.
            own = f"cat /proc/{found['MainPID']}/oom_score_adj"
            assert int(score) <= 0 or stack.host(host).check_output(own) == score, (host, name)


def memory_max(stack: Stack, host: str, unit: str, cell: str, values: dict[str, Any]) -> str:
    """The MemoryMax= that a cell of the table stands for, as systemctl prints it."""
    if unit.startswith("celery-worker@"):
        most = next(
            pool.get("memory_max_mb")
            for pool in stack.variables[host]["worker_pools"]
            if re.fullmatch(rf"celery-worker@{pool['name']}-\d+\.service", unit)
        )
    elif cell.startswith("none"):
        most = None
    else:
        known = [values[name] for name in quoted(cell) if values.get(name) is not None]
        most = known[0] if known else re.findall(r"\d+", cell)[-1]
    return "infinity" if most is None else str(int(most) * 1024**2)


def test_children_of_a_worker_go_before_it(stack: Stack) -> None:
    """The kernel's own figures, of pools with processes."""
    for host in stack.group("worker"):
        for pool in stack.variables[host]["worker_pools"]:
            if pool.get("pool", "prefork") == "prefork":
                main = show(stack, host, f"celery-worker@{pool['name']}-1.service", "MainPID")["MainPID"]
                scores = stack.host(host).check_output(
                    f"for child in $(cat /proc/{main}/task/*/children); do cat /proc/$child/oom_score_adj; done"
                )
                assert set(scores.split()) == {"700"}, (host, pool["name"], scores)


@pytest.mark.scenarios("own-app")
def test_a_task_reaches_neither_the_secrets_nor_the_processes_of_other_services(stack: Stack) -> None:
    """A real task, in the sandbox of its worker, beside beat, Flower, Redis and nginx."""
    host, name = stack.first("worker"), stack.group("worker")[0]
    units = ("celery-beat.service", "celery-flower.service", "redis-server.service", "nginx.service")
    pids = {unit: int(show(stack, name, unit, "MainPID")["MainPID"]) for unit in units}
    files = host.check_output("find /etc/hothouse/credentials /var/lib/hothouse/flower -type f").split()
    files += [f"/run/credentials/{unit}/broker_url" for unit in units[:2]]
    files += ["/etc/redis/users.acl", "/etc/nginx/hothouse.key"]
    files += [f"/proc/{pid}/environ" for pid in pids.values()]
    host.check_output(f"head --bytes 1 {' '.join(files)} >/dev/null")  # they are there
    send = f"h.app.send_task('tally.reach', {[files, list(pids.values())]!r}).get(timeout=30)"
    code = f"import hothouse_celery as h, json; print(json.dumps({send}))"
    read, refused = json.loads(host.check_output(f"hothouse-run python -c {shlex.quote(code)}"))
    assert (read, refused) == ([], ["PermissionError"] * len(units))
