# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: litellm_config
author: llmfleet developers
version_added: 1.0.0
short_description: LiteLLM's configuration
description:
  - Has one deployment for each replica of each model, with its price per token.
  - Names secrets by their environment variables alone.
options:
  _input:
    description:
      - Variables of the role litellm by name.
      - As C(redis), whether there is one; as C(alerting), who is told of budgets.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show LiteLLM's configuration
  ansible.builtin.debug:
    msg: "{{ settings | llmfleet.serving.litellm_config }}"
"""

RETURN = r"""
_value:
  description: What C(config.yaml) is to hold.
  type: dict
"""

from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm_config


class FilterModule:
    def filters(self):
        return {"litellm_config": _litellm_config.config}
