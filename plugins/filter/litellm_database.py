# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: litellm_database
author: llmfleet developers
version_added: 1.0.0
short_description: The URL of LiteLLM's database as LiteLLM is given it
description: Adds the size of each worker's pool of connections, and tells which database it is.
positional: _input, connections
options:
  _input:
    description: The value of C(litellm_database_url).
    type: str
    required: true
  connections:
    description: Connections of each worker.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Tell which database it is
  ansible.builtin.debug:
    msg: "{{ (litellm_database_url | llmfleet.serving.litellm_database(10)).place }}"
"""

RETURN = r"""
_value:
  description: The URL, and where it leads.
  type: dict
  contains:
    url:
      description: The URL with C(connection_limit).
      type: str
    place:
      description: Which database that is, without its password.
      type: str
"""

from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm_config


def litellm_database(url: str, connections: int) -> dict[str, str]:
    return {
        "url": _litellm_config.database_url(url, connections),
        "place": _litellm_config.database_place(url),
    }


class FilterModule:
    def filters(self):
        return {"litellm_database": litellm_database}
