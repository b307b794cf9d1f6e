#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_instances
author: llmfleet developers
version_added: 1.0.0
short_description: Run exactly the declared vLLM instances, each from the newest state of its files
description:
  - Starts, restarts and enables the units C(vllm@<name>.service) that are declared, and takes away those that are not.
  - An instance is restarted when a file that it runs from has changed since its process began. This is read from the
    host, not from the run's handlers, so a run that was cut short is mended by the next one.
  - Does not wait until a model is loaded; M(llmfleet.serving.vllm_ready) does.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.state
options:
  instances:
    description: The instances that this host runs.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the model, and of the systemd instance.
        type: str
        required: true
      paths:
        description: Files and folders that the instance runs from. A change of any of them restarts it.
        type: list
        elements: path
        required: true
  changed:
    description:
      - Instances whose files this run has not written because it is in check mode, but would have.
      - Without it check mode could not foresee their restart.
    type: list
    elements: str
    default: []
  config_dir:
    description: Where C(<name>.yaml), C(<name>.env) and C(<name>.plan.json) of the instances lie.
    type: path
    default: /etc/vllm
  started_dir:
    description: Where M(llmfleet.serving.vllm_started) writes C(<name>.json).
    type: path
    default: /var/lib/vllm/started
"""

EXAMPLES = r"""
- name: Run one model
  llmfleet.serving.vllm_instances:
    instances:
      - name: qwen
        paths: [/etc/vllm/qwen.yaml, /etc/vllm/qwen.env, /etc/systemd/system/vllm@.service]
"""

RETURN = r"""
steps:
  description: What was done, or in check mode would be done, in this order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: The instance.
      type: str
      sample: qwen
    action:
      description: One of V(start), V(restart), V(enable), V(remove).
      type: str
      sample: restart
    why:
      description: The reason, for the operator.
      type: str
      sample: its files are newer than its process
unmeasured:
  description:
    - Instances whose process has begun since M(llmfleet.serving.vllm_started) last read of them, whoever started it.
    - It should read of them once they have answered.
    - None in check mode.
  returned: always
  type: list
  elements: str
"""

from dataclasses import asdict
from math import inf
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._instances import (
    UNIT,
    Step,
    Unit,
    steps,
    unit_name,
    unmeasured,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._systemd import failure, show

WANTS = Path("/etc/systemd/system/multi-user.target.wants")


def newest_change(paths: list[str]) -> float:
    """When the newest of these came to be as it is; a ctime cannot be set back as an mtime can, by rsync for one."""
    there = [Path(path) for path in paths if Path(path).exists()]
    return max((time for path in there for time in (path.lstat().st_ctime, path.stat().st_ctime)), default=0.0)


def present(config_dir: Path) -> set[str]:
    enabled = {match["name"] for path in WANTS.glob("vllm@*.service") if (match := UNIT.fullmatch(path.name))}
    return enabled | {path.stem for path in config_dir.glob("*.yaml")}


def measured(started_dir: Path) -> dict[str, float]:
    """When it was written down, of each instance, what its start has measured."""
    return {path.stem: path.stat().st_mtime for path in started_dir.glob("*.json")}


def files(name: str, config_dir: Path, started_dir: Path) -> list[Path]:
    """What there is of an instance."""
    own = [config_dir / f"{name}.{kind}" for kind in ("yaml", "env", "plan.json")]
    return [*own, started_dir / f"{name}.json", WANTS / unit_name(name)]


def carry_out(
    module: AnsibleModule, plan: list[Step], units: dict[str, Unit], config_dir: Path, started_dir: Path
) -> None:
    def names(action: str) -> list[str]:
        return [step.name for step in plan if step.action == action]

    def systemctl(verb: str, names: list[str], *options: str) -> None:
        if not names:
            return
        command = ["systemctl", verb, *options, *map(unit_name, names)]
        code, _, error = module.run_command(command)
        if code:
            module.fail_json(**failure(module.run_command, names[0], f"did not {verb} ({error.strip()})"))

    # After a run that was cut short there can be files of an instance that systemd knows nothing of.
    systemctl("disable", [name for name in names("remove") if name in units and units[name].loaded], "--now")
    for name in names("remove"):
        for path in files(name, config_dir, started_dir):
            path.unlink(missing_ok=True)
    module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    systemctl("reset-failed", [name for name in names("start") if name in units and units[name].failed])
    # All stop before the first one starts: with a model less the others may have changed places, and so ports.
    systemctl("stop", names("restart"))
    systemctl("start", names("restart") + names("start"))
    systemctl("enable", names("enable"))


def main() -> None:
    instance = {
        "name": {"type": "str", "required": True},
        "paths": {"type": "list", "elements": "path", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "required": True, "options": instance},
            "changed": {"type": "list", "elements": "str", "default": []},
            "config_dir": {"type": "path", "default": "/etc/vllm"},
            "started_dir": {"type": "path", "default": "/var/lib/vllm/started"},
        },
        supports_check_mode=True,
    )
    config_dir, started_dir = Path(module.params["config_dir"]), Path(module.params["started_dir"])
    changed = set(module.params["changed"])
    wanted = {
        item["name"]: inf if item["name"] in changed else newest_change(item["paths"])
        for item in module.params["instances"]
    }
    there = present(config_dir)
    units = show(module.run_command, sorted(there | set(wanted)))
    plan = steps(wanted, units, there)
    if plan and not module.check_mode:
        carry_out(module, plan, units, config_dir, started_dir)
    lines = [f"{step.action} {unit_name(step.name)}: {step.why}\n" for step in plan]
    module.exit_json(
        changed=bool(plan),
        steps=[asdict(step) for step in plan],
        unmeasured=[] if module.check_mode else unmeasured(wanted, units, plan, measured(started_dir)),
        diff={"before": "", "after": "".join(lines)},
    )


if __name__ == "__main__":
    main()
