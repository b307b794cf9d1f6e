#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_key
author: llmfleet developers
version_added: 1.0.0
short_description: A key of a LiteLLM team, with its budget and limits, and its rotation
description:
  - Makes, changes, blocks, rotates or deletes one key. M(llmfleet.serving.litellm_tenants) does so for all at once.
  - What is not given stays as it is, but for an expiry, which a key has none of.
  - With another O(key) than LiteLLM has, the key is rotated. The new one takes over its name and what it has spent;
    the old one is accepted for O(overlap) seconds more, obeys the same limits, and counts what it spends for itself.
  - LiteLLM does not know a key's value, only its SHA-256. A value that is lost is lost.
  - Each of LiteLLM's workers keeps what it has read of a key for a minute, so a key that is blocked or deleted may be
    accepted for so long by another one. C(playbooks/tenants.yml) takes it out of nginx as well, and that at once.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.state
  - llmfleet.serving.litellm
  - llmfleet.serving.litellm.limits
options:
  team:
    description: The team, which has to be there.
    type: str
    required: true
  name:
    description: The key's name in its team. In LiteLLM its alias is the team's name, a slash and this.
    type: str
    required: true
  key:
    description:
      - The key's value. It begins with C(sk-), for LiteLLM takes no others.
      - Without it a new key is made where there is none, and RV(key) returned this once.
    type: str
  overlap:
    description: Seconds for which a key that has been rotated is still accepted. V(0) is not at all.
    type: int
    default: 86400
  max_parallel_requests:
    description: Requests at the same time. V(-1) takes the limit away.
    type: int
"""

EXAMPLES = r"""
- name: Give research's pipeline a key
  llmfleet.serving.litellm_key:
    master_key: "{{ litellm_master_key }}"
    team: research
    name: ci
    key: "{{ vault_research_ci }}"
    rpm_limit: 60
"""

RETURN = r"""
changes:
  description: What was changed, or would be, a line each.
  returned: always
  type: list
  elements: str
key:
  description: The value of a key that was made. Register it with C(no_log), for it is shown nowhere else.
  returned: when O(key) is not given and a key was made
  type: str
sha256:
  description: What LiteLLM, and nginx, know the key by.
  returned: when there is one
  type: str
"""

from dataclasses import replace
from datetime import datetime, timezone

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm, _tenants

FIELDS = tuple(_litellm.KEY_DEFAULTS)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:4000"},
            "master_key": {"type": "str", "required": True, "no_log": True},
            "timeout": {"type": "int", "default": 30},
            "team": {"type": "str", "required": True},
            "name": {"type": "str", "required": True},
            "key": {"type": "str", "no_log": True},
            "overlap": {"type": "int", "default": 86400},
            **_litellm.KEY_SPEC,
        },
        supports_check_mode=True,
    )
    asked = module.params
    limits, given = _tenants.partial(asked, FIELDS)
    problems = [
        *_tenants.name_problems("team", asked["team"]),
        *_tenants.name_problems("name", asked["name"]),
        *_tenants.value_problems("this key", asked["key"], asked["master_key"]),
        *_tenants.overlap_problems("overlap", asked["overlap"]),
        *given,
    ]
    if problems:
        module.fail_json(msg=" ".join(problems))
    key = _litellm.Key(asked["team"], asked["name"], asked["state"], asked["key"] or None, limits)
    made = ""
    try:
        client = _litellm.Client(asked["url"], asked["master_key"], asked["timeout"])
        found = _litellm.read(client, team=key.team, token=key.token)
        if not key.key and not any(row.alias == key.alias for row in found.keys.values()):
            made = _litellm.new_key()
            key = replace(key, key=made)
        result = _litellm.converge(
            client,
            [_litellm.Team(key.team, "any", keys=(key,))],
            found=found,
            look=lambda: _litellm.read(client, team=key.team, token=key.token),
            now=datetime.now(timezone.utc),
            overlap=asked["overlap"],
            check=module.check_mode,
        )
    except _litellm.LiteLLMError as error:
        module.fail_json(msg=str(error))
    tokens = [row.token for row in result.found.keys.values() if row.alias == key.alias]
    created = any(not outcome.error and outcome.change.path == "/key/generate" for outcome in result.outcomes)
    answer = {
        **result.told(),
        **({"sha256": tokens[0]} if tokens else {}),
        **({"key": made} if made and created else {}),
    }
    if result.error:
        module.fail_json(msg=result.error, **answer)
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
