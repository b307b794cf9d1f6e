#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: firewall_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before its firewall is configured
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  rules_file:
    description: The file of nftables rules of which to tell whether it is in force.
    type: path
    required: true
  table:
    description: Family and name of the table that O(rules_file) makes.
    type: str
    required: true
  unit:
    description: The unit that loads O(rules_file) at boot.
    type: str
    required: true
  rollback:
    description: Name, without its suffix, of the timer and the service that bring back the previous rules.
    type: str
    required: true
  policy_file:
    description: The file of our firewalld policy.
    type: path
    required: true
  files:
    description: Text files whose content is told.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.firewall_host_info:
    rules_file: /etc/nftables.d/llmfleet.nft
    table: inet llmfleet
    unit: llmfleet-firewall.service
    rollback: llmfleet-firewall-rollback
    policy_file: /etc/firewalld/policies/llmfleet.xml
  register: host
"""

RETURN = r"""
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
nftables:
  description:
    - Whether nft is C(installed), the table C(loaded), and C(in_force), as the file says and loaded at each boot.
    - C(unit) tells whether O(unit) is there, C(present) whether there is anything of ours.
  returned: always
  type: dict
  sample: {installed: true, loaded: true, in_force: true, unit: true, present: true}
ufw:
  description:
    - Whether ufw is C(installed) and C(active), and filters C(ipv6); its C(default_incoming) and its plain C(rules).
    - C(present) tells whether one of the rules is ours.
  returned: always
  type: dict
firewalld:
  description:
    - Whether firewalld is C(installed) and C(active), and C(in_force) our policy.
    - C(present) tells whether its file is there. C(open_zones) are zones in use that let everything in.
  returned: always
  type: dict
ssh_ports:
  description: Ports that an SSH server listens on, or will after its next start.
  returned: always
  type: list
  elements: int
  sample: [22]
ssh_client:
  description: The address that this run reaches the host from, or nothing where it is not by SSH.
  returned: always
  type: str
  sample: 192.0.2.7
ssh_interface:
  description:
    - The C(name) of the interface that this run reaches the host at, and its C(kind) as C(ip -details) has it.
    - C(kind) is empty for a network card, and all of it where it is not known.
  returned: always
  type: dict
  sample: {name: wg0, kind: wireguard}
ssh_port:
  description: The port that this run reaches the host at, or 0.
  returned: always
  type: int
  sample: 22
files:
  description: For each of O(files) its content, or null where it cannot be read.
  returned: always
  type: dict
rollback_pending:
  description: Whether a run that was cut short has left rules that are going to be taken back.
  returned: always
  type: bool
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils import _firewall
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    PROC,
    content,
    holders,
    listening,
    run,
    stat,
    system,
    units,
)

UFW_DEFAULTS = Path("/etc/default/ufw")
UFW_CONF = Path("/etc/ufw/ufw.conf")
UFW_RULES = (Path("/etc/ufw/user.rules"), Path("/etc/ufw/user6.rules"))
SSH_SERVERS = {"sshd", "dropbear"}


def output(module: AnsibleModule, *command: str) -> str | None:
    """What the command prints, or None where it fails or is not there."""
    code, printed = run(module, *command)
    return None if code else printed


def nftables(module: AnsibleModule, unit: dict[str, str]) -> dict[str, bool]:
    nft, file = module.get_bin_path("nft", opt_dirs=["/usr/sbin"]), Path(module.params["rules_file"])
    listing = [str(nft), "--stateless", "--terse", "list", "table", *module.params["table"].split()]
    loaded = output(module, *listing) if nft else None
    in_force = loaded is not None and file.is_file() and unit["ActiveState"] == "active"
    if in_force and unit["UnitFileState"] == "enabled":
        # As the kernel says what the file says: read in a network of its own that ends with the command.
        program = f'"$0" -f "$1" && {" ".join(listing)}'
        as_file = output(module, "unshare", "--net", "/bin/sh", "-c", program, str(nft), str(file))
        in_force = as_file in (None, loaded)
    else:
        in_force = False
    return {
        "installed": bool(nft),
        "loaded": loaded is not None,
        "in_force": in_force,
        "unit": unit["LoadState"] == "loaded",
        "present": loaded is not None or file.exists() or unit["LoadState"] == "loaded",
    }


def setting(text: str, name: str) -> str:
    match = re.search(rf'^{name}="?([^"\n]*)', text, re.MULTILINE)
    return match[1] if match else ""


def ufw(module: AnsibleModule) -> dict[str, Any]:
    defaults, conf = content(UFW_DEFAULTS) or "", content(UFW_CONF) or ""
    installed = bool(module.get_bin_path("ufw", opt_dirs=["/usr/sbin"]))
    rules = [rule for file in UFW_RULES for rule in _firewall.parse_ufw(content(file) or "")] if installed else []
    return {
        "installed": installed,
        "active": installed and setting(conf, "ENABLED").lower() == "yes",
        "ipv6": setting(defaults, "IPV6").lower() == "yes",
        "default_incoming": setting(defaults, "DEFAULT_INPUT_POLICY"),
        "rules": rules,
        "present": any(rule["ours"] for rule in rules),
    }


def firewalld(module: AnsibleModule, unit: dict[str, str], links: list[dict[str, Any]]) -> dict[str, Any]:
    file, active = Path(module.params["policy_file"]), unit["ActiveState"] == "active"
    there = file.is_file()
    known = output(module, "firewall-cmd", f"--info-policy={file.stem}") if active and there else None
    zones = output(module, "firewall-cmd", "--list-all-zones") if active else None
    default = output(module, "firewall-cmd", "--get-default-zone") if active else None
    return {
        "installed": unit["LoadState"] == "loaded",
        "active": active,
        "in_force": known is not None,
        "present": there,
        "open_zones": _firewall.open_zones(zones or "", (default or "").strip(), links),
    }


def ssh_ports(module: AnsibleModule, socket: dict[str, str]) -> list[int]:
    sshd = module.get_bin_path("sshd", opt_dirs=["/usr/sbin"])
    found = _firewall.sshd_ports((output(module, sshd, "-T") if sshd else None) or "")
    if socket["ActiveState"] == "active" or socket["UnitFileState"] == "enabled":
        found |= _firewall.socket_ports(socket["Listen"])
    tables = [content(PROC / "net" / name) or "" for name in ("tcp", "tcp6")]
    sockets = {inode: port for table in tables for inode, port in listening(table).items()}
    for inode, programs in holders(sockets, PROC).items():
        if any(program.name in SSH_SERVERS for program in programs):
            found.add(sockets[inode])
    return sorted(found)


def ssh_connection() -> tuple[str, str, int]:
    """Of the nearest ancestor that knows: sudo passes SSH_CONNECTION on to nobody."""
    pid = os.getpid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1:
            found = _firewall.ssh_connection((PROC / str(pid) / "environ").read_text(errors="replace"))
            if found:
                return found
            pid = stat(PROC / str(pid)).parent
    return "", "", 0


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "rules_file": {"type": "path", "required": True},
            "table": {"type": "str", "required": True},
            "unit": {"type": "str", "required": True},
            "rollback": {"type": "str", "required": True},
            "policy_file": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    unit, timer = module.params["unit"], f"{module.params['rollback']}.timer"
    shown = units(module, unit, timer, "ssh.socket", "firewalld.service")
    client, address, port = ssh_connection()
    links = json.loads(output(module, "ip", "-json", "-details", "address") or "[]")
    module.exit_json(
        changed=False,
        system=system(),
        nftables=nftables(module, shown[unit]),
        ufw=ufw(module),
        firewalld=firewalld(module, shown["firewalld.service"], links),
        ssh_ports=ssh_ports(module, shown["ssh.socket"]),
        ssh_client=client,
        ssh_interface=_firewall.interface(links, address),
        ssh_port=port,
        files={path: content(Path(path)) for path in module.params["files"]},
        rollback_pending=shown[timer]["ActiveState"] == "active",
    )


if __name__ == "__main__":
    main()
