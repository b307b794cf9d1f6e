#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_tenants
author: llmfleet developers
version_added: 1.0.0
short_description: All teams and keys of LiteLLM, as they are declared
description:
  - Reads once what LiteLLM has, writes what differs, several things at a time, and reads again whether it is so now.
  - What a team or a key does not say is LiteLLM's default, which is no limit.
  - Teams and keys that are not declared are reported, and touched only with O(prune).
  - Where something cannot be done, the rest is done all the same, and the message says what is missing. Then nothing is
    deleted.
  - With another value than LiteLLM has, a key is rotated, as M(llmfleet.serving.litellm_key) says.
  - A key whose value LiteLLM knows by another name is renamed, or taken over.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.state
  - llmfleet.serving.litellm
options:
  tenants:
    description: The teams.
    type: list
    elements: dict
    required: true
    suboptions:
      team:
        description: The team's name, which is its id in LiteLLM as well. Of A-Z a-z 0-9 . _ -, at most 64.
        type: str
        required: true
      state:
        description: With V(absent) its keys are deleted as well, whoever made them.
        type: str
        choices: [present, blocked, absent]
        default: present
      models:
        description: The models that may be used. By default all.
        type: list
        elements: str
      max_budget:
        description: The most that may be spent, in the unit of the models' prices.
        type: float
      budget_duration:
        description: After what time spending begins anew, as V(30d), of V(s), V(m), V(h), V(d) and V(mo).
        type: str
      rpm_limit:
        description: Requests a minute, of all keys together.
        type: int
      tpm_limit:
        description: Tokens a minute, of all keys together.
        type: int
      max_parallel_requests:
        description: Requests at the same time, of each key that does not say itself; LiteLLM counts them by key alone.
        type: int
      metadata:
        description: Whatever else is to be kept with it.
        type: dict
      keys:
        description: The team's keys.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: The key's name in its team. In LiteLLM its alias is the team's name, a slash and this.
            type: str
            required: true
          key:
            description: The key's value, which begins with C(sk-). Needed where there is no such key yet.
            type: str
          state:
            description: Whether there is such a key, and whether it is let in.
            type: str
            choices: [present, blocked, absent]
            default: present
          models:
            description: The models that may be used. By default all of the team.
            type: list
            elements: str
          max_budget:
            description: The most that may be spent, in the unit of the models' prices.
            type: float
          budget_duration:
            description: After what time spending begins anew.
            type: str
          rpm_limit:
            description: Requests a minute.
            type: int
          tpm_limit:
            description: Tokens a minute.
            type: int
          max_parallel_requests:
            description: Requests at the same time.
            type: int
          metadata:
            description: Whatever else is to be kept with it.
            type: dict
  overlap:
    description:
      - Seconds for which a key that has been rotated is still accepted. V(0) is not at all.
      - No key that was rotated before is accepted for longer, either.
    type: int
    default: 86400
  prune:
    description: Whether to delete teams and keys that are not declared. Refused where O(tenants) is empty.
    type: bool
    default: false
  usage_days:
    description: Of how many days, this one included, to count tokens. V(0) counts none.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Apply the tenants
  llmfleet.serving.litellm_tenants:
    master_key: "{{ litellm_master_key }}"
    tenants:
      - team: research
        max_budget: 50
        budget_duration: 30d
        keys:
          - name: ci
            key: "{{ vault_research_ci }}"
"""

RETURN = r"""
changes:
  description: What was changed, or would be, a line each.
  returned: always
  type: list
  elements: str
teams:
  description:
    - All teams as LiteLLM has them in the end, or in check mode would have them.
    - With C(declared), whether they are in O(tenants).
  returned: when LiteLLM has answered
  type: list
  elements: dict
keys:
  description: All keys, as RV(teams), without their values.
  returned: when LiteLLM has answered
  type: list
  elements: dict
accepted:
  description:
    - C(name) and C(sha256) of all keys that LiteLLM lets in, whoever made them, not those blocked or expired.
    - Where something has failed, those that it lets in now; in check mode, those that it would let in.
  returned: when LiteLLM has answered
  type: list
  elements: dict
undeclared:
  description: Names of teams and keys that are not declared and still there.
  returned: when LiteLLM has answered
  type: list
  elements: str
missing:
  description: Teams, and keys as V(research/ci), that are declared and not there, for something has failed.
  returned: when LiteLLM has answered
  type: list
  elements: str
now:
  description: The host's time.
  returned: when LiteLLM has answered
  type: str
usage_days:
  description: The value of O(usage_days).
  returned: when LiteLLM has answered
  type: int
"""

from datetime import datetime, timezone
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm, _tenants

KEY = {"name": {"type": "str", "required": True}, "key": {"type": "str", "no_log": True}, **_litellm.KEY_SPEC}
TEAM = {
    "team": {"type": "str", "required": True},
    **_litellm.KEY_SPEC,
    "keys": {"type": "list", "elements": "dict", "default": [], "options": KEY, "no_log": False},
}


def problems_of(asked: dict[str, Any]) -> list[str]:
    problems = _tenants.tenant_problems(asked["tenants"], variable="tenants", master_key=asked["master_key"])
    problems += _tenants.overlap_problems("overlap", asked["overlap"])
    if asked["prune"] and not asked["tenants"]:
        problems.append("prune is true and tenants is empty, which would delete every team: declare one at least.")
    problems += _tenants.usage_days_problems(asked["usage_days"])
    return problems


def valueless(teams: list[_litellm.Team], found: _litellm.Found) -> list[str]:
    there = {row.alias for row in found.keys.values()}
    return [
        f"The key {key.alias} is not there yet and has no value: set its key."
        for team in teams
        for key in team.keys
        if not key.key and "absent" not in (team.state, key.state) and key.alias not in there
    ]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "default": "http://127.0.0.1:4000"},
            "master_key": {"type": "str", "required": True, "no_log": True},
            "timeout": {"type": "int", "default": 30},
            "tenants": {"type": "list", "elements": "dict", "required": True, "options": TEAM},
            "overlap": {"type": "int", "default": 86400},
            "prune": {"type": "bool", "default": False},
            "usage_days": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    asked, now = module.params, datetime.now(timezone.utc)
    if problems := problems_of(asked):
        module.fail_json(msg=" ".join(problems))
    teams, usage = _litellm.declared(asked["tenants"]), None
    try:
        client = _litellm.Client(asked["url"], asked["master_key"], asked["timeout"])
        try:
            found = _litellm.read(client)
        except _litellm.LiteLLMError as error:
            if not (module.check_mode and error.refused):
                raise
            module.warn(f"{error} This is what would be made on one that has no teams yet.")
            found, asked["usage_days"] = _litellm.Found(), 0
        if problems := valueless(teams, found):
            module.fail_json(msg=" ".join(problems))
        result = _litellm.converge(
            client,
            teams,
            found=found,
            look=lambda: _litellm.read(client),
            now=now,
            overlap=asked["overlap"],
            prune=asked["prune"],
            check=module.check_mode,
        )
        if asked["usage_days"] and not result.error:
            usage = _litellm.read_usage(client, asked["usage_days"], now)
    except _litellm.LiteLLMError as error:
        module.fail_json(msg=str(error))
    found = _litellm.foreseen(result.found, result.changes, now) if module.check_mode else result.found
    answer = {
        **result.told(),
        **_litellm.report(found, teams, usage, now, asked["usage_days"]),
    }
    if result.error:
        module.fail_json(msg=result.error, **answer)
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
