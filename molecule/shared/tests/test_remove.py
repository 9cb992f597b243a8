"""A host that leaves keeps no service, key or password of ours; its data stay, and it can come back."""

from __future__ import annotations

import pytest
from conftest import Stack

pytestmark = pytest.mark.scenarios("staging")

# Everything but what Debian's packages brought, the account, and the data.
OURS = """
find /etc /opt /usr/local /run/systemd/system -iname '*hothouse*' -o -name 'celery*' -o -name users.acl
grep -rlis hothouse /etc /usr/local --exclude=passwd --exclude=group --exclude='*shadow*' --exclude=hosts \
  --exclude='chrony*'
units="celery* prometheus* nginx.service redis-server.service hothouse*"
systemctl list-units --all --plain --no-legend $units | grep -v inactive
systemctl list-unit-files --state=enabled --no-legend $units
nft list tables
"""


def test_a_host_that_leaves_keeps_nothing_of_ours_but_the_data(stack: Stack) -> None:
    (name,) = stack.variables
    host = stack.host(name)
    before = stack.redis("DBSIZE")
    refused = stack.playbook("playbooks/remove.yml", "-e", f"remove={name}", check=False)
    assert refused.returncode != 0 and "Redis still runs" in refused.stdout + refused.stderr
    assert host.run("systemctl is-active celery-beat").stdout.strip() == "active"
    try:
        host.check_output("systemctl disable --now redis-server")
        stack.playbook("playbooks/remove.yml", "-e", f"remove={name}")
        assert [
            line for line in host.check_output(OURS).splitlines() if not line.startswith("/var/lib/")
        ] == []
        secrets = [
            line for value in stack.secrets.values() for line in value.splitlines() if "-----" not in line
        ]
        options = " ".join(f"-e '{secret}'" for secret in secrets)
        left = host.run(f"grep -rlF {options} /etc /opt /usr/local /root /var/lib /run/systemd/system")
        assert secrets and (left.rc, left.stdout) == (1, "")
        again = stack.playbook("playbooks/remove.yml", "-e", f"remove={name}")
        assert "changed=0" in again.stdout
    finally:
        stack.playbook("site.yml")
    assert int(stack.redis("DBSIZE")) >= int(before) > 0
