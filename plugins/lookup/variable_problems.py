# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: variable_problems
author: llmfleet developers
version_added: 1.0.0
short_description: Find variables of this collection that are set to a value of another type
description:
  - Compares each variable of this collection's roles that is set for a host with what their argument specs say of it.
  - Of lists such as C(vllm_models) each entry's fields as well, and which of them are misspelled or missing.
  - A value that hangs on a role's own variables, or cannot be decrypted, is left to the role.
  - The value of a secret is never told.
options:
  _terms:
    description: None are needed.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show what is wrong
  ansible.builtin.debug:
    msg: "{{ query('llmfleet.serving.variable_problems') }}"
"""

RETURN = r"""
_raw:
  description: One line for each problem, with the variable, its value unless it is secret, and the remedy.
  type: list
  elements: str
  sample: ["litellm_workers is 'many': write a whole number."]
"""

import contextlib

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.llmfleet.serving.plugins.module_utils._inventory import declared_options
from ansible_collections.llmfleet.serving.plugins.module_utils._variables import problems


class LookupModule(LookupBase):
    def run(self, terms, variables=None, **kwargs):
        options = declared_options()
        values = {}
        # Of what is raw anything goes: no need to decrypt it.
        for name in (name for name in options.keys() & (variables or {}).keys() if options[name]["type"] != "raw"):
            with contextlib.suppress(AnsibleError):
                values[name] = self._templar.template(variables[name])
        return problems(values, options)
