#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: certbot_host_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a host has that matters before certbot is configured on it
description:
  - One look at everything that the role's preflight and its steps decide by. Reads, and changes nothing.
  - Only where a certificate has to be asked for, it looks whether the ACME server answers.
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
  units:
    description: Units of which to tell whether systemd has yet to read them.
    type: list
    elements: str
    default: []
  timers:
    description: Timers of which to tell which do not run, or will not after a boot.
    type: list
    elements: str
    default: []
  lineage:
    description: certbot's name of the certificate.
    type: str
    required: true
  names:
    description: What the certificate has to be for.
    type: list
    elements: str
    required: true
  parameters:
    description:
      - What it has to be asked for with, as certbot's renewal configuration names it.
      - C(server), the URL of the ACME server's directory, is one of them.
    type: dict
    required: true
  expiry_days:
    description: Days left from which on a certificate counts as not renewed.
    type: int
    required: true
  ca_content:
    description:
      - The authorities (PEM) that the ACME server's certificate may be from, besides those that the host trusts.
    type: str
    default: ""
  external_account:
    description: Whether there is an external account to be bound.
    type: bool
    default: false
  folder:
    description: certbot's folder.
    type: path
    default: /etc/letsencrypt
"""

EXAMPLES = r"""
- name: Look at the host
  llmfleet.serving.certbot_host_info:
    packages: [certbot]
    lineage: llmfleet
    names: [llm.example.org]
    parameters: {server: "https://acme-v02.api.letsencrypt.org/directory", authenticator: webroot}
    expiry_days: 14
  register: host
"""

RETURN = r"""
system:
  description: Name and version of the distribution, as C(ID) and C(VERSION_ID) of os-release have them.
  returned: always
  type: str
  sample: debian 12
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
daemon_reload_needed:
  description: Whether systemd has yet to read what has changed of O(units).
  returned: always
  type: bool
timers_off:
  description: The asked timers that do not run, or will not after a boot.
  returned: always
  type: list
  elements: str
certificate_to_do:
  description: Why a certificate has to be asked for, as the end of a sentence. Empty where the present one will do.
  returned: always
  type: str
  sample: it is missing
confinement_breaks:
  description: Other certificates that certbot renews in ways which the confinement of its service may forbid.
  returned: always
  type: list
  elements: str
server_problem:
  description: Why the ACME server will give none. Empty where it answers, and where it was not asked.
  returned: always
  type: str
"""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._certbot import (
    PARTS,
    account_folder,
    directory_problem,
    may_need_more,
    parse_renewal,
    read_certificate,
    unreachable,
    untrusted,
    why_to_ask,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._host import (
    content,
    has_package_lists,
    missing_packages,
    output,
    system,
    units,
)

TRUSTED = Path("/etc/ssl/certs/ca-certificates.crt")
SECONDS = 20


def certificate_to_do(asked: dict[str, Any]) -> str:
    folder, lineage = Path(asked["folder"]), asked["lineage"]
    try:
        renewal = parse_renewal((folder / f"renewal/{lineage}.conf").read_text())
        pems = {part: (folder / f"live/{lineage}/{part}.pem").read_bytes() for part in PARTS}
    except OSError:
        return "it is missing"
    try:
        certificate = read_certificate(pems["fullchain"])
    except ValueError as error:
        return f"it cannot be read ({error})"
    wanted = {key: str(value) for key, value in asked["parameters"].items()}
    now = datetime.now(timezone.utc)
    why = why_to_ask(renewal, wanted, certificate=certificate, names=asked["names"], days=asked["expiry_days"], now=now)
    account = folder / account_folder(wanted["server"], renewal.get("account", "none")) / "regr.json"
    if not why and not account.exists():
        why = f"the account at {wanted['server']} is lost"
    return why


def confinement_breaks(folder: Path, lineage: str) -> list[str]:
    others = {path.stem: content(path) or "" for path in folder.glob("renewal/*.conf") if path.stem != lineage}
    return sorted(name for name, text in others.items() if may_need_more(text))


def server_problem(asked: dict[str, Any]) -> str:
    server, ca_content = asked["parameters"]["server"], asked["ca_content"]
    if not ca_content and not TRUSTED.exists():
        return ""  # a bare host trusts nobody yet
    context = ssl.create_default_context()
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # an authority of one's own may be older than that
    try:
        if ca_content:
            context.load_verify_locations(cadata=ca_content)
        with urllib.request.urlopen(server, timeout=SECONDS, context=context) as reply:
            answer = json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return unreachable(server, f"HTTP status {error.code}")
    except ValueError:
        answer = None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return (untrusted if isinstance(reason, ssl.SSLCertVerificationError) else unreachable)(server, reason)
    return directory_problem(answer, server, asked["external_account"])


def timers_off(module: AnsibleModule, timers: list[str]) -> list[str]:
    return [
        name
        for name, timer in units(module, *timers).items()
        if (timer["ActiveState"], timer["UnitFileState"]) != ("active", "enabled")
    ]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "default": []},
            "directories": {"type": "list", "elements": "path", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
            "timers": {"type": "list", "elements": "str", "default": []},
            "lineage": {"type": "str", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "parameters": {"type": "dict", "required": True},
            "expiry_days": {"type": "int", "required": True},
            "ca_content": {"type": "str", "default": ""},
            "external_account": {"type": "bool", "default": False},
            "folder": {"type": "path", "default": "/etc/letsencrypt"},
        },
        supports_check_mode=True,
    )
    asked = module.params
    why = certificate_to_do(asked)
    needed = output(module, "systemctl", "show", "--property", "NeedDaemonReload", *asked["units"])
    module.exit_json(
        changed=False,
        system=system(),
        missing_packages=missing_packages(module, asked["packages"]),
        package_lists=has_package_lists(),
        missing_directories=[path for path in asked["directories"] if not Path(path).is_dir()],
        daemon_reload_needed="=yes" in needed,
        timers_off=timers_off(module, asked["timers"]),
        certificate_to_do=why,
        confinement_breaks=confinement_breaks(Path(asked["folder"]), asked["lineage"]),
        server_problem=server_problem(asked) if why else "",
    )


if __name__ == "__main__":
    main()
