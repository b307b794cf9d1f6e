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
  description: The asked ports that another program listens on, with that program's name, as strings.
  returned: always
  type: dict
  sample: {"8000": prometheus}
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

LISTEN = "0A"  # TCP_LISTEN in the kernel's include/net/tcp_states.h
NVIDIA = Path("/proc/driver/nvidia/version")


def disk(path: Path) -> dict[str, int]:
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return {"free_bytes": stat.f_bavail * stat.f_frsize, "device": path.stat().st_dev}


def content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def listening(table: str) -> dict[int, str]:
    """Socket inode by local port of the listening rows of /proc/net/tcp or tcp6."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16): row[9] for row in rows if row[3] == LISTEN}


def owner(inode: str, proc: Path = Path("/proc")) -> tuple[str, str]:
    """Name and control groups of the process that holds the socket; empty where there is none to be seen."""
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == f"socket:[{inode}]":
                process = link.parent.parent
                return (process / "comm").read_text().strip(), (process / "cgroup").read_text()
        except OSError:
            continue
    return "", ""


def taken_ports(ports: list[int]) -> dict[str, str]:
    taken = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for port, inode in listening(content(Path(table)) or "").items():
            if port in ports:
                name, groups = owner(inode)
                if not re.search(r"vllm@.+\.service", groups):
                    taken[str(port)] = name or "a program that is not to be seen"
    return taken


def nvidia_driver_version() -> str | None:
    match = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", content(NVIDIA) or "", re.MULTILINE)
    return match[1] if match else None


def system() -> str:
    values = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)', content(Path("/etc/os-release")) or "", re.MULTILINE))
    return f"{values.get('ID', 'unknown')} {values.get('VERSION_ID', '')}".strip()


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
        taken_ports=taken_ports(module.params["ports"]),
        system=system(),
        nvidia_driver_version=nvidia_driver_version(),
    )


if __name__ == "__main__":
    main()
