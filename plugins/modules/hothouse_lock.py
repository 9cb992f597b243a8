#!/usr/bin/python
"""Lets one run at a time at an environment. All of it happens in the action of this name."""

DOCUMENTATION = r"""
module: hothouse_lock
short_description: Lets one run at a time at an environment
version_added: "0.3.0"
description:
  - Takes a lock on a host for the whole run of C(ansible-playbook), with one plain command, so that no module is
    executed. Fails if another run has it, and says whose run that is, what it runs and since when.
  - The run gives the lock back when it ends, also when it fails, is interrupted or killed. A process on the controller
    does so, which renews the lock until then. If the controller itself is lost, the lock ends with its lease.
  - The same run may take it again. A host that does not answer is passed over with a warning.
  - Takes nothing in check mode.
options:
  path:
    description: The lock, a file on the host. It should be gone after a reboot.
    type: path
    default: /run/hothouse-run
  lease_seconds:
    description: How long after its last renewal the lock of a run counts as left behind.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
notes:
  - Taken on several hosts it keeps two runs apart as long as one of these hosts answers both.
author: Hothouse
"""

EXAMPLES = r"""
- name: Let no other run begin
  hothouse_lock:
  delegate_to: redis1
  run_once: true
"""

RETURN = r""" # """
