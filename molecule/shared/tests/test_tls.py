"""nginx offers nothing that testssl.sh rates MEDIUM or worse."""

from __future__ import annotations

import pytest
from conftest import Stack
from testssl import findings

pytestmark = pytest.mark.scenarios("staging")


def test_nginx_offers_no_weak_tls(stack: Stack) -> None:
    nginx = stack.group("nginx")[0]
    name = stack.variables[nginx]["nginx_server_name"]
    found = findings(stack.host(nginx), f"{name}:443", "/etc/nginx/hothouse-ca.crt", stack.address(nginx))
    assert not found
