"""The guides as the person on call types them: every command runs as it is written, or a table says why it is not run.

A command that is new in a guide is run without being entered anywhere.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from conftest import REPOSITORY, SCENARIO, Stack
from test_campaign import create, fresh_domain, show
from testinfra.host import Host

pytestmark = pytest.mark.scenarios("local", "prod")

# Lines that are not run, by how they begin, and why. What tests it instead is named.
NOT_RUN = {
    # Elsewhere, with their effect.
    "bin/up": "makes the hosts, as Molecule does here",
    ". .venv/bin/activate": "these tests run in it",
    "bin/test": "is what runs this",
    "KEEP=1 bin/test": "is what runs this",
    ".venv/bin/python benchmarks/": "takes hours; the scenario faults is the same in short",
    "ansible-playbook site.yml": "the scenario's own converge and idempotence",
    "ansible-playbook -i inventories/ENV site.yml": "the scenario's own converge and idempotence",
    "ansible-playbook -i inventories/prod site.yml": "the scenario's own converge, with a vault password",
    "ansible-playbook -i inventories/ENV playbooks/flower.yml playbooks/nginx.yml": "part of site.yml; test_flower.py",
    "ansible-playbook -i inventories/ENV playbooks/app.yml playbooks/worker.yml": "part of site.yml; test_deploy.py",
    "ansible-playbook -i inventories/ENV playbooks/recover.yml": "test_recover.py",
    "ansible-playbook -i inventories/ENV playbooks/remove.yml -e remove=HOST": "test_remove.py",
    "ansible-playbook playbooks/compose.yml": "the scenario compose",
    "docker-compose up": "the scenario compose",
    "rm inventories/ENV/group_vars/all/example.yml": "changes the checkout; the scenario own-app has none",
    "hothouse-run celery -A shop": "an application of the reader's own",
    'hothouse-run python -c "from shop': "a module of the reader's own application",
    "hothouse-run celery --app hothouse_celery control": "app_may_control is off, as shipped",
    "hothouse-run COMMAND": "names no command",
    "hothouse-run gunicorn shop": "an application of the reader's own",
    "ansible-playbook -i inventories/ENV playbooks/worker.yml playbooks/beat.yml": "part of site.yml; test_deploy.py",
    "hothouse-run python -m shop.report": "a module of the reader's own application",
    # Interactive, or without an end.
    "(umask 077; openssl rand": "writes into the home folder",
    "export ANSIBLE_VAULT_PASSWORD_FILE": "belongs to the line before",
    "ansible-vault edit": "opens an editor",
    "cat >~/.flower-login": "reads from the keyboard",
    "umask 077": "belongs to the line before",
    "flower() {": "asks port 8443 of bin/up; test_flower.py asks the same interface",
    "flower ": "asks port 8443 of bin/up; test_flower.py asks the same interface",
    "curl --verbose --cacert /etc/prometheus/hothouse/ca.crt --user USER": "asks for a password; test_overview.py",
    "journalctl -u 'celery-worker@*' -f": "follows the journal until it is ended",
    # What local hosts have not got.
    "curl --head http://NAME/.well-known/acme-challenge/": "nginx_tls is not acme; test_acme.py",
    "ssh HOST": "the controller reaches local hosts by their SSH configuration only",
    "ping ": "the controller reaches local hosts by their SSH configuration only",
    "ssh USER@ADDRESS": "the controller reaches local hosts by their SSH configuration only",
    "ssh-keygen -R ADDRESS": "would change the known hosts of whoever runs this",
    "date; ssh OTHER": "hosts do not log in to each other here",
    "systemctl status nginx-acme": "nginx_tls is not acme; test_acme.py",
    "systemctl start nginx-acme": "nginx_tls is not acme; test_acme.py",
    "openssl x509 -in /etc/nginx/acme/": "nginx_tls is not acme; test_acme.py",
    "cat /run/reboot-required.pkgs": "no package asked for a reboot; test_updates.py",
    "cat /var/log/unattended-upgrades/": "local hosts install no updates by themselves; test_updates.py",
    "needrestart ": "local hosts install no updates by themselves; test_updates.py",
    "systemctl start hothouse-upkeep": "local hosts install no updates by themselves; test_updates.py",
    "tail -30 /var/log/unattended-upgrades/": "local hosts install no updates by themselves; test_updates.py",
    "unattended-upgrade ": "local hosts install no updates by themselves; test_updates.py",
    "uv add --group build": "would change the project of whoever runs this; tests/unit/test_hothouse_build.py",
    # In the text.
    "apt-get purge": "the packages are not named there",
    "chronyc makestep": "sets the clock, which a local host has not got",
    "hothouse-redis-cli --sentinel sentinel failover": "test_failover.py",
    "nft --check": "what a run does by itself",
    "nft flush ruleset": "what a guide warns of; test_firewall.py",
    "r rename KEY": "there is no key of a wrong type; the transport's tests",
    "systemctl daemon-reexec": "the first process of a container is podman's matter",
    "systemctl reboot": "every scenario reboots its hosts, as podman does it: molecule/shared/reboot.yml",
    "systemctl disable --now celery-": "the inventory wants them; test_remove.py",
    "systemctl disable --now redis-server": "test_remove.py, test_failover.py",
    "systemctl restart redis-server": "test_failover.py",
    "systemctl stop hothouse-firewall": "opens the host; test_firewall.py",
    "systemctl stop redis-server": "test_failover.py",
    "hothouse-run campaigns resolve": "no mail server broke off here; app/tests and the scenario faults",
    "hothouse-run python -m hothouse_celery dead-letters --requeue": "test_overview.py, app/tests, the scenario faults",
}
# Lines that need several hosts: how they begin, and the group on whose first host they are run, in the scenario prod.
SEVERAL_HOSTS = {
    "hothouse-redis-cli --sentinel": "redis",
    "hothouse-redis-cli pubsub numsub __sentinel__": "redis",
    "systemctl status redis-sentinel": "redis",
    "systemctl restart redis-sentinel": "redis",
    "systemctl start redis-server redis-sentinel": "redis",
    "systemctl status haproxy": "worker",
    "curl -s 127.0.0.1:8405": "worker",
    "openssl s_client": "worker",
}
# A command that is a question may find nothing.
NOTHING_FOUND = {
    r"journalctl .*(-g|--grep)": {1},
    r"\| *grep ": {1},
    r"systemctl status ": {3},
}
WRONG = re.compile(
    r"^(\(error\)|[A-Z]+ERR |ERR |NOPERM|NOAUTH|WRONGTYPE|-bash:|bash:)|command not found|[Uu]nknown (command|option|"
    r"operation)|unrecognized|could not be found|No such file|^usage: ",
    re.MULTILINE,
)
# What is a command, and not a mere name, where it stands in the text.
INLINE = re.compile(r"(systemctl|journalctl|hothouse-[a-z-]+|nft|chronyc|sysctl|ss|apt-get|chown|r|nginx)\s")
PRELUDE = "alias r='hothouse-redis-cli --primary'\n"


class Line(NamedTuple):
    """A command of a guide, with its continuation lines."""

    where: str
    text: str


def commands() -> Iterator[Line]:
    """Every command of the guides, in a block ```sh or in the text."""
    for path in sorted(
        [*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md", REPOSITORY / "app/README.md"]
    ):
        block, text = False, ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip().startswith("```"):
                block = line.strip() == "```sh"
            elif block and line.strip() and not (line.lstrip().startswith("#") and not text):
                text += f"{line}\n"
                if not line.endswith("\\") and complete(text):
                    yield Line(f"{path.relative_to(REPOSITORY)}:{number}", text.strip())
                    text = ""
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            if INLINE.match(code):
                yield Line(str(path.relative_to(REPOSITORY)), " ".join(code.split()))


def complete(text: str) -> bool:
    """Whether a shell would run this instead of waiting for more."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return "unexpected end of file" not in done.stderr


LINES = list(commands())


def found_in(table: dict[str, str], line: Line) -> str | None:
    """The entry of a table that a line begins with; the longest, if several fit."""
    return max((start for start in table if line.text.startswith(start)), key=len, default=None)


def runnable() -> list[Line]:
    """What this scenario runs."""
    lines = [line for line in LINES if not found_in(NOT_RUN, line)]
    here = SCENARIO == "prod"
    return [line for line in lines if bool(found_in(SEVERAL_HOSTS, line)) == here]


def on_controller(line: Line) -> bool:
    """Whether a line is for the controller."""
    words = (line.text.split()[0], line.text)
    return words[0].startswith("ansible") or "inventories/" in words[1]


@pytest.fixture(scope="module")
def filled(stack: Stack) -> Callable[[Line], str]:
    """A command with its placeholders filled in, as the reader does."""
    host = stack.first("app")
    domain = fresh_domain("guides")
    over, old = (create(host, name, [f"reader@{domain}"]) for name in ("over", "old"))
    # One that is not over yet when it is cancelled.
    going = (
        f"$( (echo email,name; seq --format=r%g@{domain},Reader 2000) | hothouse-run campaigns create --name going "
        "--template welcome --sender 'News <news@example.com>' --recipients - | awk '{print $NF}')"
    )
    stack.redis("LPUSH", "q:default", "no message")

    def letters() -> list[Any]:
        said = host.check_output("hothouse-run python -m hothouse_celery dead-letters --json")
        return [json.loads(text) for text in said.splitlines()]

    deadline = time.monotonic() + 60
    while not letters() or {show(host, name)["state"] for name in (over, old)} != {"finished"}:
        assert time.monotonic() < deadline, "no dead letter, or no campaign that is over"
    letter = str(letters()[0]["id"])
    units = {"systemctl": "celery-beat", "journalctl": "celery-beat"}

    def fill(line: Line) -> str:
        text = re.sub(r"\s+# .*$", "", line.text)
        named = {"dead-letters": letter, "campaigns cancel": going, "campaigns delete": old}
        identity = next((named[words] for words in named if words in text), over)
        address = stack.address(stack.group("redis")[0])
        values = {
            "ADDRESS:": f"[{address}]:" if ":" in address else f"{address}:",
            "ID…": identity,
            "ID": identity,
            "TASK_ID": identity,
            "ADDRESS": address,
            "POOL": "default",
            "UNIT": "celery-beat",
            "KEY": "app:campaigns:ambiguous",
            "TAG": "none",
            "NAME": units.get(text.split()[0], "QueueOld"),
        }
        for name, value in values.items():
            text = re.sub(rf"(?<![A-Za-z_-]){name}(?![A-Za-z_])", value, text)
        text = text.replace("<recipients.csv", f"<<<$'email,name\\nguide@{domain},Reader'")
        if "silence expire" in text:
            text = text.replace(identity, '"$(hothouse-amtool silence query -q | head -n 1)"')
        return text

    return fill


def wrong(line: Line, text: str, code: int, output: str) -> str:
    """What a reader would complain about; nothing if the command did what it is for."""
    allowed = {0}.union(*(codes for pattern, codes in NOTHING_FOUND.items() if re.search(pattern, text)))
    # What a journal holds is not the command's own complaint.
    if code in allowed and (
        text.startswith(("journalctl ", "systemctl status ")) or not WRONG.search(output)
    ):
        return ""
    return f"{line.where}: {text}\n  exit code {code}: {output[-600:]}"


def run(host: Host, texts: list[str]) -> list[tuple[int, str]]:
    """The exit code and the end of the output of each command, all in one session."""
    script = ""
    for text in texts:
        code = base64.b64encode((PRELUDE + text).encode()).decode()
        script += (
            f'out=$(timeout 60 bash -O expand_aliases -c "$(echo {code} | base64 --decode)" </dev/null 2>&1); code=$?\n'
            'echo "@@ $code $(printf %s "$out" | tail -c 3000 | base64 --wrap=0)"\n'
        )
        if text.startswith("systemctl stop"):  # the next command expects it to run
            script += "systemctl start nginx celery.target\n"
    # Alerts are heard again, and the copy of Redis is not needed.
    script += "rm -rf /root/redis-2*\n"
    script += '! ids=$(hothouse-amtool silence query -q 2>&1) || [ -z "$ids" ] || hothouse-amtool silence expire $ids\n'
    done = host.run("echo %s | base64 --decode | bash", base64.b64encode(script.encode()).decode())
    answers = re.findall(r"^@@ (\d+) (\S*)$", done.stdout, re.MULTILINE)
    assert len(answers) == len(texts), done.stdout[-2000:] + done.stderr
    return [(int(code), base64.b64decode(output).decode(errors="replace")) for code, output in answers]


def test_every_entry_of_the_tables_is_a_command_of_a_guide() -> None:
    for table in (NOT_RUN, SEVERAL_HOSTS):
        assert set(table) == {start for line in LINES if (start := found_in(table, line))}


def test_every_command_of_the_guides_runs_as_it_is_written(
    stack: Stack, filled: Callable[[Line], str]
) -> None:
    places: dict[str, list[Line]] = {}
    for line in runnable():
        if not on_controller(line):
            noun = SEVERAL_HOSTS.get(found_in(SEVERAL_HOSTS, line) or "", "app")
            place = places.setdefault(stack.group(noun)[0], [])
            if filled(line) not in map(filled, place):
                place.append(line)
    assert places
    complaints = []
    for name, lines in places.items():
        texts = [filled(line) for line in lines]
        for line, text, (code, output) in zip(lines, texts, run(stack.host(name), texts), strict=True):
            complaints.append(wrong(line, text, code, output))
    if any(complaints):
        pytest.fail("\n".join(filter(None, complaints)), pytrace=False)


def test_every_command_for_the_controller_runs_as_it_is_written(stack: Stack) -> None:
    complaints = []
    for line in runnable():
        if on_controller(line):
            options = shlex.join(stack.inventory_options)
            text = re.sub(r"-i inventories/\w+", options, line.text)
            text = re.sub(
                r"inventories/\w+/group_vars/all/credentials.yml", str(stack.credentials_file), text
            )
            # The file of the local environment is plain; that of a scenario is encrypted.
            text = re.sub(r"^grep (\S+) (\S+)$", r"ansible-vault view \2 | grep \1", text)
            done = subprocess.run(
                ["bash", "-c", text],
                cwd=REPOSITORY,
                env=stack.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            complaints.append(wrong(line, text, done.returncode, done.stdout + done.stderr))
    if any(complaints):
        pytest.fail("\n".join(filter(None, complaints)), pytrace=False)


def test_every_playbook_that_a_guide_names_is_there() -> None:
    for path in sorted([*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md"]):
        for name in re.findall(r"\bplaybooks/([a-z]+\.yml)", path.read_text()):
            assert (REPOSITORY / "playbooks" / name).is_file(), (path.name, name)
