"""Documentation of hothouse_credentials; the work is done on the controller by the action of that name."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: hothouse_credentials
short_description: Generate an environment's missing credentials into one file on the controller
description:
  - Keeps one variable, the dictionary C(credentials), in one YAML file on the controller, readable by its
    owner alone. What is missing is generated and added. What exists is never overwritten, keys that this task
    does not know and comments included.
  - As soon as a vault password is configured the file is encrypted with it, an existing plain file too.
  - A value that is empty or null counts as missing.
  - No value is ever part of the result, of the diff or of any output.
  - It runs once per play, without a connection to any host. Two runs at once wait for each other.
options:
  path:
    description:
      - The credentials file. A relative path is looked up from the folder of the playbook.
      - Missing folders are created. A file that others can read is set to mode 0600.
    type: str
    required: true
  require_vault:
    description: Fail, before anything is generated, when no vault password is configured.
    type: bool
    default: false
  passwords:
    description: Names of the passwords, 40 letters and digits each, so safe in URLs, environment files, Redis
      ACLs and Flower's comma-separated lists.
    type: list
    elements: str
    default: []
  users:
    description: Names of the user names, C(ops-) and six letters or digits each.
    type: list
    elements: str
    default: []
  certificates:
    description:
      - Certificates to be signed by an own certificate authority, all with EC P-256 keys.
      - The authority is kept as C(ca_key) and C(ca_certificate), valid for ten years. A self-signed one is
        renewed with the same key before it can limit a certificate; its clients then need the new O(ca_file).
      - C(ca_certificate) without C(ca_key), as after a lost controller, is good as long as nothing has to be issued.
      - A certificate is issued anew, with a new key, when its names or uses changed, when it was not signed by
        this authority, or when less than 30 days of its 397 remain.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The certificate is kept as C(NAME_key) and C(NAME_certificate), in PEM.
        type: str
        required: true
      common_name:
        description: Common name; the first of the alternative names by default.
        type: str
      alt_names:
        description: DNS names and IP addresses that the certificate is valid for.
        type: list
        elements: str
        required: true
      client_auth:
        description: Whether it is shown by a client too, not by a server alone.
        type: bool
        default: false
  exclusive:
    description:
      - How the names of some certificates begin, such as C(host_). Those that begin so, were issued for the name
        that follows and are not in O(certificates) are removed with their keys.
    type: str
  exclusive_passwords:
    description: How the names of some passwords begin. Those that begin so and are not in O(passwords) are removed.
    type: str
  ca_file:
    description:
      - Where to write the authority's public certificate for clients, mode 0644.
      - If a certificate is there that has nothing to do with what is in the file of the credentials, because that file
        was lost or is one of another environment, the task fails before anything is generated. What has to do with it
        is the authority itself, C(ca_certificate_old), one whose place it took, and one that issued a certificate in
        it.
    type: str
  authorities:
    description:
      - For each host that has one, the certificates in PEM of the authorities that it trusts. One of them has to do
        with what is in the file in the same way, or the task fails before anything is generated.
    type: dict
    default: {}
  replace:
    description: Generate what is missing whatever authority there was. It is remembered, as C(ca_replaced).
    type: bool
    default: false
attributes:
  check_mode:
    support: full
    details:
      - Neither O(path) nor O(ca_file) is written. What would be generated is written to a throwaway file that
        RV(file) names, in Ansible's temporary folder of the controller, which Ansible deletes when it ends.
  diff_mode:
    support: partial
    details: Names of what changed, never values.
  bypass_host_loop:
    support: full
requirements:
  - On the controller, the Python package C(cryptography), for O(certificates).
author:
  - Hothouse contributors
"""

EXAMPLES = r"""
- name: Generate what is missing
  hothouse_credentials:
    path: "{{ environment_folder }}/group_vars/all/credentials.yml"
    require_vault: true
    passwords: [redis_admin, redis_worker, flower_password]
    users: [flower_user]
    certificates:
      - name: nginx
        common_name: tasks.example.com
        alt_names: [tasks.example.com, 192.0.2.10]
    ca_file: "{{ environment_folder }}/ca.crt"
  register: credentials_result

- name: Use them in this run too
  ansible.builtin.include_vars: "{{ credentials_result.file }}"
  no_log: true
"""

RETURN = r"""
file:
  description: The file to read the credentials from, O(path) or in check mode possibly a throwaway file.
  returned: success
  type: str
  sample: /srv/hothouse/inventories/prod/group_vars/all/credentials.yml
generated:
  description: Names that were added or, in case of certificates, issued anew.
  returned: success
  type: list
  elements: str
  sample: [redis_admin, nginx_key, nginx_certificate]
known:
  description: Whether the file held any of the passwords, users or the authority before.
  returned: success
  type: bool
encrypted:
  description: Whether the file is encrypted with ansible-vault.
  returned: success
  type: bool
"""
