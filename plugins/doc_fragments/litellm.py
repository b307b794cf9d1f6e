# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations


class ModuleDocFragment:
    """How to reach LiteLLM, and what a team and a key have in common."""

    DOCUMENTATION = r"""
options:
  url:
    description: Where LiteLLM answers, from the host on which the module runs.
    type: str
    default: http://127.0.0.1:4000
  master_key:
    description: LiteLLM's master key.
    type: str
    required: true
  timeout:
    description: Seconds within which LiteLLM has to answer each request.
    type: int
    default: 30
"""

    LIMITS = r"""
options:
  state:
    description:
      - V(present) makes it, and lets it work.
      - V(blocked) makes it as well, and refuses all its requests.
      - V(absent) deletes it. What it has spent stays in LiteLLM's records.
    type: str
    choices: [present, blocked, absent]
    default: present
  models:
    description: The models that may be used. An empty list is all.
    type: list
    elements: str
  max_budget:
    description: The most that may be spent, in the unit of the models' prices. V(-1) takes the limit away.
    type: float
  budget_duration:
    description:
      - After what time spending begins anew, as V(30d), of V(s), V(m), V(h), V(d) and V(mo). Empty for never.
      - LiteLLM begins at midnight, or with the month, not from the day on which this was set.
    type: str
  rpm_limit:
    description: Requests a minute. V(-1) takes the limit away.
    type: int
  tpm_limit:
    description: Tokens a minute. V(-1) takes the limit away.
    type: int
  metadata:
    description: Whatever else is to be kept with it. It replaces what was there.
    type: dict
"""
