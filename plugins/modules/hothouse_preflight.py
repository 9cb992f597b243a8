"""Documentation of the action of the same name, which does the work."""

DOCUMENTATION = r"""
module: hothouse_preflight
short_description: Check the whole inventory before anything is touched
description:
  - Runs on the controller and reads every host's variables.
  - Refuses empty groups, hosts in no group, variables that no role knows, values that do not fit the roles' argument
    specs, worker pools and queues that do not match, time limits that would lose or double tasks, and an application
    that cannot be built.
  - Lists everything that is wrong in one message, each with where it is set and how to mend it.
options:
  needed_groups:
    description: Groups that must have at least one host.
    type: list
    elements: str
    required: true
author: Hothouse
"""

EXAMPLES = r"""
- name: Check the inventory
  hothouse_preflight:
    needed_groups: [redis, worker]
  run_once: true
"""

RETURN = r""" # """
