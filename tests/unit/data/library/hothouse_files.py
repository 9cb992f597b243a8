#!/usr/bin/python
"""Returns what the action hothouse_files rendered instead of writing it: this machine's files play no part."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: hothouse_files
short_description: Return what hothouse_files would write
description: Found before the real module by playbooks in this folder.
options:
  files:
    description: As in the real module.
    type: list
    elements: dict
  contents:
    description: As in the real module.
    type: str
author: Hothouse
"""


def main() -> None:
    """Run as an Ansible module."""
    options = {"files": {"type": "list", "elements": "dict"}, "contents": {"type": "str", "no_log": True}}
    module = AnsibleModule(options, supports_check_mode=True)
    contents = json.loads(zlib.decompress(base64.b64decode(module.params["contents"])))
    texts = {
        entry["path"]: content.encode("latin-1").decode()
        for entry, content in zip(module.params["files"], contents, strict=True)
        if content is not None and not entry["secret"]
    }
    sums = {
        entry["path"]: hashlib.sha256(content.encode("latin-1")).hexdigest()
        for entry, content in zip(module.params["files"], contents, strict=True)
        if content is not None and entry["secret"]
    }
    states = {entry["path"]: entry["state"] for entry in module.params["files"]}
    module.exit_json(changed=False, rendered=texts, sums=sums, states=states)


if __name__ == "__main__":
    main()
