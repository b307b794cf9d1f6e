#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: nginx_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before nginx is configured on it
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  packages:
    description: Debian packages of which to tell which are not installed.
    type: list
    elements: str
    default: []
  directories:
    description: Folders of which to tell which are not there.
    type: list
    elements: path
    default: []
  files:
    description: Files of which to tell which are there.
    type: list
    elements: path
    default: []
  ports:
    description: TCP ports of which to tell whether another program than nginx listens there.
    type: list
    elements: int
    default: []
  default_site:
    description: The link of which to tell whether it is there.
    type: path
    default: /etc/nginx/sites-enabled/default
  site:
    description: The site's configuration, of which to tell whether it is there and which servers it has marked C(down).
    type: path
  loaded_files:
    description: Files and links that nginx has read, of which to tell whether one has changed since.
    type: list
    elements: path
    default: []
  dropin:
    description: The drop-in of C(nginx.service) of which to tell whether nginx runs without it.
    type: path
  own_ca:
    description: A certificate that a CA of yours signs. Without it RV(certificate_to_do) is empty.
    type: dict
    suboptions:
      ca_content:
        description: The CA's certificate (PEM). Empty where there is none yet.
        type: str
        required: true
      certificate_path:
        description: The host's certificate.
        type: path
        required: true
      privatekey_path:
        description: The host's private key.
        type: path
        required: true
      subject_alt_names:
        description: The names that the certificate is for, each as V(DNS:llm.example.org) or V(IP:192.0.2.10).
        type: list
        elements: str
        required: true
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.nginx_host_info:
    packages: [nginx]
    directories: [/etc/nginx]
    ports: [80, 443]
    loaded_files: [/etc/nginx/sites-enabled/llmfleet.conf]
  register: host
"""

RETURN = r"""
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
ipv6:
  description: Whether the kernel has IPv6.
  returned: always
  type: bool
missing_packages:
  description: The asked packages that are not installed.
  returned: always
  type: list
  elements: str
package_lists:
  description: Whether apt has package lists.
  returned: always
  type: bool
missing_directories:
  description: The asked folders that are not there.
  returned: always
  type: list
  elements: str
files_there:
  description: The asked files that are there.
  returned: always
  type: list
  elements: str
taken_ports:
  description: The asked ports, as strings, that another program listens on, with that program's name and process id.
  returned: always
  type: dict
  sample: {"80": apache2 (pid 812)}
default_site:
  description: Whether the link O(default_site) is there.
  returned: always
  type: bool
site:
  description: Whether the file O(site) is there.
  returned: always
  type: bool
drained:
  description: The servers that O(site) has marked C(down).
  returned: always
  type: list
  elements: str
  sample: ["10.77.1.12:8000"]
certificate_to_do:
  description: Why the CA has to sign a certificate, as the end of a sentence. Empty where the present one will do.
  returned: always
  type: str
  sample: it expires on 2027-01-31
running:
  description: Whether nginx runs.
  returned: always
  type: bool
reload_pending:
  description: Whether one of O(loaded_files) is newer than a worker of nginx, all of which a reload replaces.
  returned: always
  type: bool
daemon_reload_needed:
  description: Whether systemd has yet to read what has changed of C(nginx.service).
  returned: always
  type: bool
unconfined:
  description: Whether nginx was started before O(dropin) was as it is.
  returned: always
  type: bool
"""

import contextlib
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    APT_LISTS,
    PROC,
    Program,
    changed,
    content,
    has_package_lists,
    missing_packages,
    output,
    processes,
    stat,
    system,
    taken_ports,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._nginx import (
    certificate_problem,
    drained,
    takes_requests,
)

PID_FILE = Path("/run/nginx.pid")
SYSTEMCTL = ("systemctl", "show", "nginx.service", "--property", "NeedDaemonReload")


def is_nginx(program: Program) -> bool:
    return program.name == "nginx"


def started(process: Path) -> float:
    """Seconds since the epoch."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + stat(process).start / os.sysconf("SC_CLK_TCK")


def master() -> Path | None:
    with contextlib.suppress(OSError, ValueError):
        process = PROC / str(int(PID_FILE.read_text()))
        if (process / "comm").read_text().strip() == "nginx":
            return process
    return None


def workers(of: Path) -> list[Path]:
    found = []
    for process in processes(PROC):
        with contextlib.suppress(OSError):
            child = stat(process).parent == int(of.name)
            if child and takes_requests((process / "cmdline").read_text(errors="replace")):
                found.append(process)
    return found


def reload_pending(files: list[str], nginx: Path | None) -> bool:
    newest = max(map(changed, files), default=0.0)
    with contextlib.suppress(OSError):
        return nginx is not None and any(started(worker) < newest for worker in workers(nginx))
    return False


def unconfined(dropin: str | None, nginx: Path | None) -> bool:
    with contextlib.suppress(OSError):
        return bool(dropin and nginx) and started(nginx) < (changed(dropin) or time.time())
    return False


def certificate_to_do(own_ca: dict[str, Any] | None) -> str:
    if own_ca is None:
        return ""
    if not own_ca["ca_content"]:
        return "there is no CA yet"
    try:
        key, certificate = (Path(own_ca[name]).read_bytes() for name in ("privatekey_path", "certificate_path"))
    except OSError:
        return "it is missing"
    now = datetime.now(timezone.utc)
    return certificate_problem(own_ca["ca_content"].encode(), key, certificate, own_ca["subject_alt_names"], now)


def main() -> None:
    own_ca = {
        "ca_content": {"type": "str", "required": True},
        "certificate_path": {"type": "path", "required": True},
        "privatekey_path": {"type": "path", "required": True},
        "subject_alt_names": {"type": "list", "elements": "str", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "default": []},
            "directories": {"type": "list", "elements": "path", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "default_site": {"type": "path", "default": "/etc/nginx/sites-enabled/default"},
            "site": {"type": "path"},
            "loaded_files": {"type": "list", "elements": "path", "default": []},
            "dropin": {"type": "path"},
            "own_ca": {"type": "dict", "options": own_ca},
        },
        supports_check_mode=True,
    )
    asked, nginx = module.params, master()
    site = (content(Path(asked["site"])) if asked["site"] else None) or ""
    module.exit_json(
        changed=False,
        system=system(),
        ipv6=(PROC / "net/if_inet6").exists(),
        missing_packages=missing_packages(module, asked["packages"]),
        package_lists=has_package_lists(APT_LISTS),
        missing_directories=[path for path in asked["directories"] if not Path(path).is_dir()],
        files_there=[path for path in asked["files"] if Path(path).exists()],
        taken_ports=taken_ports(asked["ports"], is_nginx, PROC),
        default_site=os.path.lexists(asked["default_site"]),
        site=bool(site),
        drained=drained(site),
        certificate_to_do=certificate_to_do(asked["own_ca"]),
        running=nginx is not None,
        reload_pending=reload_pending(asked["loaded_files"], nginx),
        daemon_reload_needed="=yes" in output(module, *SYSTEMCTL),
        unconfined=unconfined(asked["dropin"], nginx),
    )


if __name__ == "__main__":
    main()
