#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_started
author: llmfleet developers
version_added: 1.0.0
short_description: Compare what vLLM instances have logged at their start with their plans, and write it down
description:
  - Reads, of the journal since each instance's process began, what vLLM says of its memory. Writes that into a file of
    its own for each instance, with what was planned beside it.
  - Warns where the two differ by more than 3 % of the GPU's memory or of the planned tokens. That is never an error.
  - An instance without a plan, as on a CPU, is written down without a comparison.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.state
options:
  names:
    description: The instances to read of. They have answered before, so that their logs are whole.
    type: list
    elements: str
    required: true
  config_dir:
    description: Where C(<name>.plan.json) of the instances lie.
    type: path
    default: /etc/vllm
  started_dir:
    description: Where C(<name>.json) with what was measured is written. Made where it is not there.
    type: path
    default: /var/lib/vllm/started
"""

EXAMPLES = r"""
- name: Compare what vLLM has logged at its start with the plan
  llmfleet.serving.vllm_started:
    names: [qwen]
"""

RETURN = r"""
started:
  description: What has been written for each instance.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: The instance.
      type: str
      sample: qwen
    started:
      description: When its process began, in seconds since the epoch.
      type: float
    measured:
      description:
        - What its log says. What it does not say is not there.
        - That is all of it where C(VLLM_LOGGING_LEVEL) is above C(INFO).
      type: dict
      sample: {kv_cache_tokens: 262144, max_concurrency: 16.0, max_model_len: 16384}
    compared:
      description: Figures that were planned and measured.
      type: list
      elements: dict
      contains:
        what:
          description: The figure, as the plan calls it.
          type: str
          sample: kv_cache_bytes
        planned:
          description: The figure of the plan.
          type: float
        measured:
          description: The figure of the log.
          type: float
        percent:
          description: By how much more was measured, in percent of the GPU's memory, or of the planned tokens.
          type: float
"""

import json
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.started import compare, figures, warnings
from ansible_collections.llmfleet.serving.plugins.module_utils._systemd import journal_since_start, show


def stored(path: Path) -> dict[str, Any]:
    """The plan; empty where there is none."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "config_dir": {"type": "path", "default": "/etc/vllm"},
            "started_dir": {"type": "path", "default": "/var/lib/vllm/started"},
        },
        supports_check_mode=True,
    )
    folder = Path(module.params["started_dir"])
    found = []
    for name, unit in show(module.run_command, module.params["names"]).items():
        log = journal_since_start(module.run_command, unit)
        compared = compare(stored(Path(module.params["config_dir"]) / f"{name}.plan.json"), log)
        found.append({"name": name, "started": unit.started, "measured": figures(log), "compared": compared})
        for warning in warnings(name, compared):
            module.warn(warning)
    if found and not module.check_mode:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        for each in found:
            path = folder / f"{each['name']}.json"
            path.write_text(json.dumps(each, indent=2) + "\n", encoding="utf-8")
            path.chmod(0o644)
    module.exit_json(changed=bool(found), started=found)


if __name__ == "__main__":
    main()
