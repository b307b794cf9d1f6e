#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_team
author: llmfleet developers
version_added: 1.0.0
short_description: A team of LiteLLM, with its budget and limits
description:
  - Makes, changes, blocks or deletes one team. M(llmfleet.serving.litellm_tenants) does so for all at once.
  - What is not given stays as it is.
  - There is no C(max_parallel_requests), for LiteLLM counts them by key alone.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.state
  - llmfleet.serving.litellm
  - llmfleet.serving.litellm.limits
options:
  name:
    description: The team's name, which is its id in LiteLLM as well. Of A-Z a-z 0-9 . _ -, at most 64.
    type: str
    required: true
  state:
    description: With V(absent) its keys are deleted as well, whoever made them.
"""

EXAMPLES = r"""
- name: Give research a budget
  llmfleet.serving.litellm_team:
    master_key: "{{ litellm_master_key }}"
    name: research
    models: [qwen]
    max_budget: 50
    budget_duration: 30d
"""

RETURN = r"""
changes:
  description: What was changed, or would be, a line each.
  returned: always
  type: list
  elements: str
team:
  description: The team as LiteLLM has it in the end.
  returned: when there is one
  type: dict
"""

from datetime import datetime, timezone

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm, _tenants

FIELDS = tuple(_litellm.TEAM_DEFAULTS)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:4000"},
            "master_key": {"type": "str", "required": True, "no_log": True},
            "timeout": {"type": "int", "default": 30},
            "name": {"type": "str", "required": True},
            **_litellm.TEAM_SPEC,
        },
        supports_check_mode=True,
    )
    asked = module.params
    limits, given = _tenants.partial(asked, FIELDS)
    if problems := [*_tenants.name_problems("name", asked["name"]), *given]:
        module.fail_json(msg=" ".join(problems))
    team = _litellm.Team(asked["name"], asked["state"], limits)
    try:
        client = _litellm.Client(asked["url"], asked["master_key"], asked["timeout"])
        result = _litellm.converge(
            client,
            [team],
            look=lambda: _litellm.read(client, team=team.name),
            now=datetime.now(timezone.utc),
            check=module.check_mode,
        )
    except _litellm.LiteLLMError as error:
        module.fail_json(msg=str(error))
    rows = _litellm.rows(result.found)["teams"]
    answer = {
        **result.told(),
        **({"team": rows[0]} if rows else {}),
    }
    if result.error:
        module.fail_json(msg=result.error, **answer)
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
