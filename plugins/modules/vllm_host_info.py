#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before vLLM is installed on it
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  paths:
    description: Folders whose free space is told. A folder that does not exist yet counts for its nearest parent.
    type: list
    elements: path
    default: []
  files:
    description: Text files whose content is told.
    type: list
    elements: path
    default: []
  ports:
    description: TCP ports of which to tell whether another program than a vLLM instance listens there.
    type: list
    elements: int
    default: []
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.vllm_host_info:
    paths: [/opt/vllm, /var/lib/vllm]
    files: [/srv/models/qwen/config.json]
    ports: [8000]
  register: host
"""

RETURN = r"""
disks:
  description: For each path, the bytes that may still be written there, and a number of its file system.
  returned: always
  type: dict
  sample: {/opt/vllm: {free_bytes: 107374182400, device: 2049}}
files:
  description: For each file its content, or null where it cannot be read.
  returned: always
  type: dict
taken_ports:
  description: The asked ports, as strings, that another program listens on, with that program's name and process id.
  returned: always
  type: dict
  sample: {"8000": prometheus (pid 812)}
memory_bytes:
  description: The host's memory, used or not (C(MemTotal)).
  returned: always
  type: int
  sample: 135043276800
shm_bytes:
  description:
    - The size of C(/dev/shm), used or not, through which the processes of an engine on several GPUs speak.
    - 0 where there is none.
  returned: always
  type: int
  sample: 67521638400
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
nvidia_driver_version:
  description: Version of the loaded NVIDIA kernel module, or null.
  returned: always
  type: str
  sample: 580.159.04
"""

import os
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    Program,
    content,
    memory_bytes,
    system,
    taken_ports,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._instances import UNIT

NVIDIA = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - measured, not written to


def disk(path: Path) -> dict[str, int]:
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return {"free_bytes": stat.f_bavail * stat.f_frsize, "device": path.stat().st_dev}


def size(path: Path) -> int:
    """Bytes of a file system of its own; 0 where the folder is not there."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    return stat.f_blocks * stat.f_frsize


def is_instance(program: Program) -> bool:
    return bool(UNIT.search(program.groups))


def nvidia_driver_version() -> str | None:
    match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", content(NVIDIA) or "", re.MULTILINE)
    return match[1] if match else None


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
        },
        supports_check_mode=True,
    )
    module.exit_json(
        changed=False,
        disks={path: disk(Path(path)) for path in module.params["paths"]},
        files={path: content(Path(path)) for path in module.params["files"]},
        taken_ports=taken_ports(module.params["ports"], is_instance),
        memory_bytes=memory_bytes(),
        shm_bytes=size(SHARED_MEMORY),
        system=system(),
        nvidia_driver_version=nvidia_driver_version(),
    )


if __name__ == "__main__":
    main()
