"""Documentation of hothouse_recover; the work is done on the controller by the action of that name."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: hothouse_recover
short_description: Put what the hosts know of the credentials into the file on the controller
description:
  - Completes the file that M(hothouse_credentials) keeps with the values in the hosts' own files.
  - Refuses hosts that contradict each other, and values in the file that are not those of the hosts. Nothing is
    written then.
  - As soon as a vault password is configured the file is encrypted with it.
  - No value is ever part of the result, of the diff or of any output.
  - It runs once per play, without a connection to any host.
options:
  path:
    description: The credentials file. A relative path is looked up from the folder of the playbook.
    type: str
    required: true
  require_vault:
    description: Fail, before anything is written, when no vault password is configured.
    type: bool
    default: false
  ca_file:
    description: Where to write the authority's public certificate for clients, mode 0644.
    type: str
  answers:
    description:
      - For each host the lines that it answered. One like C(recovered PATH BASE64) is a file and its content, others
        are passed over.
    type: dict
    required: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: partial
    details: Names of what changed, never values.
  bypass_host_loop:
    support: full
author:
  - Hothouse contributors
"""

EXAMPLES = r"""
- name: Read a host's credentials
  ansible.builtin.raw: file=/etc/hothouse/credentials/redis_admin; echo "recovered $file $(base64 --wrap=0 $file)"
  register: answer
  changed_when: false
  no_log: true

- name: Put them into the file
  hothouse_recover:
    path: "{{ credentials_file }}"
    answers: "{{ {inventory_hostname: answer.stdout_lines} }}"
"""

RETURN = r"""
file:
  description: O(path), or in check mode possibly a throwaway file.
  returned: success
  type: str
recovered:
  description: Names that were added.
  returned: success
  type: list
  elements: str
known:
  description: Whether the file held any credential of these names before.
  returned: success
  type: bool
encrypted:
  description: Whether the file is encrypted with ansible-vault.
  returned: success
  type: bool
"""
