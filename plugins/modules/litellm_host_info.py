#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before LiteLLM is configured on it
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  ports:
    description: The ports of the two instances C(litellm@<port>.service). Others that have a folder are looked at too.
    type: list
    elements: int
    required: true
  config_dir:
    description: The folder that has one folder for each instance.
    type: path
    default: /etc/litellm
  root:
    description: The folder that has one folder for each environment.
    type: path
    default: /opt/litellm
  unit:
    description: The template unit.
    type: path
    default: /etc/systemd/system/litellm@.service
  packages:
    description: Debian packages of which to tell which are not installed.
    type: list
    elements: str
    default: []
  programs:
    description: Paths of programs that LiteLLM runs and the role does not install, of which to tell which are missing.
    type: list
    elements: path
    default: []
  salt_key:
    description: The key that seals what lies in the database, of which to tell whether an instance has another one.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.litellm_host_info:
    ports: [4000, 4001]
    salt_key: "{{ lookup('llmfleet.serving.secret', 'litellm_salt_key') }}"
  register: host
"""

RETURN = r"""
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
cpus:
  description: How many CPUs there are.
  returned: always
  type: int
memory_bytes:
  description: The host's memory, used or not.
  returned: always
  type: int
free_bytes:
  description: What is free where O(root) lies or would lie.
  returned: always
  type: int
missing_packages:
  description: The asked packages that are not installed.
  returned: always
  type: list
  elements: str
missing_programs:
  description: The asked programs that are not there, are no file, or that not everybody may run.
  returned: always
  type: list
  elements: str
package_lists:
  description: Whether apt has package lists.
  returned: always
  type: bool
taken_ports:
  description: The asked ports, as strings, that another program listens on, with that program's name and process id.
  returned: always
  type: dict
  sample: {"4000": python3 (pid 812)}
environments:
  description: The role's environments below O(root), each with whether it is whole, which its C(recipe.txt) says.
  returned: always
  type: dict
  sample: {1.106.2-5f0c3a91: true}
foreign:
  description: Of O(root) and O(config_dir) those that hold what the role has not put there.
  returned: always
  type: list
  elements: str
migrated:
  description: What the database has been migrated to, as the role has written it down. Empty where it has not.
  returned: always
  type: str
instances:
  description: What there is of each instance, in the order of O(ports), and of those that had other ports.
  returned: always
  type: list
  elements: dict
  contains:
    port:
      description: Its port.
      type: int
    running:
      description: Whether its processes are there, though perhaps only to end what they have.
      type: bool
    stopping:
      description: Whether it only ends what it has.
      type: bool
    enabled:
      description: Whether it is started with the host.
      type: bool
    config:
      description: SHA-256 of its C(config.yaml), empty where there is none.
      type: str
    environment:
      description: SHA-256 of its C(env), empty where there is none.
      type: str
    venv:
      description: Where its link C(venv) leads, empty where there is none.
      type: str
serving:
  description: The port of the instance that serves, V(0) where none does.
  returned: always
  type: int
drained:
  description: The servers that the instance that serves is to leave alone, as C(playbooks/drain.yml) has told it.
  returned: always
  type: list
  elements: str
unfinished:
  description: Whether a switch to the instance that serves has been cut short, or it does not run.
  returned: always
  type: bool
unit:
  description: SHA-256 of O(unit), empty where there is none.
  returned: always
  type: str
salt_key_differs:
  description: Whether an instance has another salt key than O(salt_key).
  returned: always
  type: bool
redis:
  description: Whether the role's own Redis is there, in whatever state.
  returned: always
  type: bool
"""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    APT_LISTS,
    PROC,
    Program,
    content,
    free_bytes,
    has_package_lists,
    memory_bytes,
    missing_packages,
    output,
    system,
    taken_ports,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._litellm_host import (
    Unit,
    drained,
    parse_show,
    serving,
    show,
    values,
)

ENVIRONMENT = re.compile(r"\d[^/]*-[0-9a-f]{8}")  # a version, and what it was made by
REDIS_UNIT = Path("/etc/systemd/system/litellm-redis.service")


def is_litellm(program: Program) -> bool:
    return "litellm@" in program.groups


def digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def is_program(path: Path) -> bool:
    """Whether everybody may run it. LiteLLM's user has to, and may not look into each folder as root does."""
    try:
        return path.is_file() and all(place.stat().st_mode & stat.S_IXOTH for place in (path, path.parent))
    except OSError:
        return False


def instance(unit: Unit, folder: Path) -> dict[str, Any]:
    return {
        "port": unit.port,
        "running": unit.running,
        "stopping": unit.stopping,
        "enabled": unit.enabled,
        "config": digest(folder / "config.yaml"),
        "environment": digest(folder / "env"),
        "venv": link(folder / "venv"),
    }


def environments(root: Path) -> list[Path]:
    found = (path for path in root.glob("*-*") if ENVIRONMENT.fullmatch(path.name))
    return sorted(path for path in found if (path / "pyvenv.cfg").exists())


def is_foreign(folder: Path, root: Path) -> bool:
    """Whether somebody else has put something there: the role's first step is its C(.lock) in O(root)."""
    return folder.is_dir() and any(folder.iterdir()) and not (root / ".lock").exists()


def has_other_salt(folder: Path, salt_key: str) -> bool:
    there = values(content(folder / "env") or "").get("LITELLM_SALT_KEY")
    return there is not None and there != salt_key


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "ports": {"type": "list", "elements": "int", "required": True},
            "config_dir": {"type": "path", "default": "/etc/litellm"},
            "root": {"type": "path", "default": "/opt/litellm"},
            "unit": {"type": "path", "default": "/etc/systemd/system/litellm@.service"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "programs": {"type": "list", "elements": "path", "default": []},
            "salt_key": {"type": "str", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    asked = module.params
    config_dir, root = Path(asked["config_dir"]), Path(asked["root"])
    former = sorted(int(path.name) for path in config_dir.glob("*") if path.name.isdigit())
    ports = list(dict.fromkeys([*asked["ports"], *former]))
    units = parse_show(output(module, *show(ports)))
    ours = serving(units.values())
    module.exit_json(
        changed=False,
        system=system(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory_bytes(PROC),
        free_bytes=free_bytes(root),
        missing_packages=missing_packages(module, asked["packages"]) if asked["packages"] else [],
        missing_programs=[path for path in asked["programs"] if not is_program(Path(path))],
        package_lists=has_package_lists(APT_LISTS),
        taken_ports=taken_ports(asked["ports"], is_litellm, PROC),
        environments={path.name: (path / "recipe.txt").exists() for path in environments(root)},
        foreign=[str(folder) for folder in (root, config_dir) if is_foreign(folder, root)],
        migrated=(content(config_dir / "migrated") or "").strip(),
        instances=[instance(unit, config_dir / str(port)) for port, unit in units.items()],
        serving=ours.port if ours else 0,
        drained=drained(content(config_dir / str(ours.port) / "config.yaml") or "") if ours else [],
        unfinished=ours is not None and (not ours.running or sum(unit.enabled for unit in units.values()) > 1),
        unit=digest(Path(asked["unit"])),
        salt_key_differs=any(has_other_salt(config_dir / str(port), asked["salt_key"]) for port in ports),
        redis=REDIS_UNIT.exists(),
    )


if __name__ == "__main__":
    main()
