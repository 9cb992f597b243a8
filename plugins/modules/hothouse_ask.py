#!/usr/bin/python
"""Asks a host something and how late it has it. All of it happens in the action of this name."""

DOCUMENTATION = r"""
module: hothouse_ask
short_description: Asks a host with one plain command, and how far its clock is off
version_added: "0.2.0"
description:
  - Runs a command as M(ansible.builtin.raw) does, so that no module is executed, and reads the host's clock right
    before and right after it.
  - What the controller's clock says before and after bounds the difference of the two clocks. While these bounds are
    further apart than a quarter of a second, as they are when the connection had to be opened first, the clock is read
    again.
options:
  command:
    description: What to run in the host's shell. It is run in check mode too, so it should only read.
    type: str
    required: true
attributes:
  check_mode:
    support: full
author: Hothouse
"""

EXAMPLES = r"""
- name: Ask the host for its distribution
  hothouse_ask:
    command: . /etc/os-release; echo "$ID $VERSION_ID"
  register: host
"""

RETURN = r"""
stdout_lines:
  description: What the command printed.
  returned: success
  type: list
  elements: str
clock:
  description:
    - How many seconds the host's clock is at least and at most ahead of the controller's; negative if it is behind.
  returned: success
  type: list
  elements: float
  sample: [-0.012, 0.031]
"""
