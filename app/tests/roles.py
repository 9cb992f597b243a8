"""What roles/redis gives to the parts of a deployment: the rules of their users, as the role renders them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment

ROLE = Path(__file__).parents[2] / "roles/redis"
VARIABLES = (ROLE / "vars/main.yml").read_text()
DEFAULTS = (ROLE / "defaults/main.yml").read_text()


def folded(begin: str, text: str) -> str:
    """The folded text (>-) that begins after a line."""
    found = re.search(rf"^{begin} >-\n((?: +\S.*\n)+?)(?=^\S| *- |\Z)", text, re.M)
    assert found, begin
    return " ".join(textwrap.dedent(found[1]).split("\n"))


def rules(user: str, **values: Any) -> str:
    """The rules of a user of Redis 7.0 in its ACL, without its password."""
    jinja = Environment()
    jinja.filters["regex_replace"] = lambda text, pattern, new: re.sub(pattern, new, text)
    jinja.filters["bool"] = bool

    def render(text: str) -> str:
        return jinja.from_string(text).render(known)

    [commands] = re.findall(r'^redis_app_commands: "(.*)"$', DEFAULTS, re.M)
    known = {
        "redis_app_commands": commands,
        "redis_app_keys": ["app:*"],
        "redis_app_may_control": False,
        "__redis_setinfo": "",
        **values,
    }
    known["__redis_common"] = render(folded("__redis_common:", VARIABLES))
    known["__redis_app_control"] = render(folded("__redis_app_control:", VARIABLES))
    [block] = re.findall(rf"^  - name: {user}\n(?:    .*\n)+", VARIABLES, re.M)
    return render(folded("    rules:", block))
