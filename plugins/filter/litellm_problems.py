# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: litellm_problems
author: llmfleet developers
version_added: 1.0.0
short_description: What is wrong with the variables of the role litellm
description: Checks what an argument spec cannot say. Never returns a part of a secret.
options:
  _input:
    description:
      - The role's variables by name.
      - As C(gateways), how many there are.
      - As C(requirements), the text of the file of the version's packages, empty where the controller has none.
      - As C(workers), how many an instance has.
      - As C(postgresql_max_connections), that of the role postgresql, 0 where the database is another.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Refuse wrong variables
  ansible.builtin.assert:
    that: problems | length == 0
    fail_msg: "{{ problems }}"
  vars:
    problems: "{{ settings | llmfleet.serving.litellm_problems }}"
"""

RETURN = r"""
_value:
  description: One sentence for each problem, with the variable, the value unless it is secret, and the remedy.
  type: list
  elements: str
"""

from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm_config


class FilterModule:
    def filters(self):
        return {"litellm_problems": _litellm_config.problems}
