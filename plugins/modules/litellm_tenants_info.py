#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_tenants_info
author: llmfleet developers
version_added: 1.0.0
short_description: All teams and keys that LiteLLM has, with what they have spent
description:
  - Returns what P(llmfleet.serving.tenants_table#filter) shows. LiteLLM knows no key's value, and none is returned.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
  - llmfleet.serving.litellm
options:
  names:
    description: Teams and keys (as V(research/ci)) that are declared, so that others are marked. Without it none are.
    type: list
    elements: str
  absent:
    description: Of O(names) those that are declared to be gone, and so are never missing.
    type: list
    elements: str
    default: []
  usage_days:
    description: Of how many days, this one included, to count tokens. V(0) counts none.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: See who has spent what
  llmfleet.serving.litellm_tenants_info:
    master_key: "{{ litellm_master_key }}"
  register: tenants
"""

RETURN = r"""
teams:
  description: All teams.
  returned: always
  type: list
  elements: dict
keys:
  description: All keys, without their values.
  returned: always
  type: list
  elements: dict
accepted:
  description: C(name) and C(sha256) of all keys that LiteLLM lets in, not those blocked or expired.
  returned: always
  type: list
  elements: dict
undeclared:
  description: Names of teams and keys that are not in O(names).
  returned: always
  type: list
  elements: str
missing:
  description: Of O(names) those that LiteLLM has not, but for those in O(absent).
  returned: always
  type: list
  elements: str
  sample: [apps, research/ci]
now:
  description: The host's time.
  returned: always
  type: str
usage_days:
  description: The value of O(usage_days).
  returned: always
  type: int
"""

from datetime import datetime, timezone

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm, _tenants


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:4000"},
            "master_key": {"type": "str", "required": True, "no_log": True},
            "timeout": {"type": "int", "default": 30},
            "names": {"type": "list", "elements": "str"},
            "absent": {"type": "list", "elements": "str", "default": []},
            "usage_days": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    asked, now, usage = module.params, datetime.now(timezone.utc), None
    if problems := list(_tenants.usage_days_problems(asked["usage_days"])):
        module.fail_json(msg=" ".join(problems))
    try:
        client = _litellm.Client(asked["url"], asked["master_key"], asked["timeout"])
        found = _litellm.read(client)
        if asked["usage_days"]:
            usage = _litellm.read_usage(client, asked["usage_days"], now)
    except _litellm.LiteLLMError as error:
        module.fail_json(msg=str(error))
    teams = None if asked["names"] is None else _litellm.named(asked["names"], asked["absent"])
    module.exit_json(changed=False, **_litellm.report(found, teams, usage, now, asked["usage_days"]))


if __name__ == "__main__":
    main()
