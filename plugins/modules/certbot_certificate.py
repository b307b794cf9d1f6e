#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: certbot_certificate
author: llmfleet developers
version_added: 1.0.0
short_description: Have certbot ask for a certificate
description:
  - Runs C(certbot certonly) with a configuration file, which holds all that certbot is told.
  - It asks each time. Whether it has to, M(llmfleet.serving.certbot_host_info) tells.
  - Where the ACME server does not know the account any more, that account is put aside and another one made.
  - What is left of a certificate that is not whole is put aside as well; certbot would give the new one another name.
    It is put back where no new one comes, for nginx may be using it.
  - Where no certificate comes, what was there before stays, and the message names the variable to change.
extends_documentation_fragment:
  - llmfleet.serving.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: none
options:
  config:
    description: certbot's configuration file.
    type: path
    required: true
  lineage:
    description: certbot's name of the certificate, as it stands in O(config).
    type: str
    required: true
  server:
    description: The URL of the ACME server's directory, as it stands in O(config).
    type: str
    required: true
  challenge:
    description: The kind of challenge that O(config) has.
    type: str
    choices: [http-01, dns-01]
    required: true
  environment:
    description: Variables that certbot gets.
    type: dict
    default: {}
  pending:
    description: A file that the deploy hook leaves where it failed.
    type: path
    required: true
  folder:
    description: certbot's folder.
    type: path
    default: /etc/letsencrypt
"""

EXAMPLES = r"""
- name: Ask for the certificate
  llmfleet.serving.certbot_certificate:
    config: /etc/letsencrypt/llmfleet.ini
    lineage: llmfleet
    server: https://acme-v02.api.letsencrypt.org/directory
    challenge: http-01
    pending: /var/lib/llmfleet/deploy-pending
  when: host.certificate_to_do | length > 0
"""

RETURN = r"""
output:
  description: What certbot printed.
  returned: always, but in check mode
  type: str
put_aside:
  description: Folders with what was put aside.
  returned: always, but in check mode
  type: list
  elements: str
"""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._certbot import (
    BUSY,
    LOST_ACCOUNT,
    PARTS,
    account_folder,
    explain,
    parse_renewal,
    read_certificate,
)

LOG = Path("/var/log/letsencrypt/letsencrypt.log")
# A renewal by the timer may be under way.
PATIENCE = 60
PAUSE = 3


def log_size() -> int:
    with contextlib.suppress(OSError):
        return LOG.stat().st_size
    return 0


def logged(since: int) -> str:
    """What certbot has written into its log. Only there it names the kind of an error."""
    with contextlib.suppress(OSError), LOG.open("rb") as log:
        log.seek(since if log_size() >= since else 0)
        return log.read().decode(errors="replace")
    return ""


def ask(module: AnsibleModule, account: Path | None) -> tuple[int, str, bool]:
    """certbot's exit status, its words, and whether the server does not know the account."""
    command = [
        "certbot",
        "certonly",
        "--config",
        module.params["config"],
        "--force-renewal",
        "--renew-with-new-domains",
        *(["--account", account.name] if account else []),
    ]
    deadline = time.monotonic() + PATIENCE
    while True:
        before = log_size()
        code, out, err = module.run_command(command, environ_update=module.params["environment"])
        text = f"{err}\n{out}"
        if code == 0 or BUSY not in text or time.monotonic() > deadline:
            return code, text, code != 0 and LOST_ACCOUNT in logged(before)
        time.sleep(PAUSE)


def put_aside(folder: Path, what: list[Path]) -> dict[Path, Path]:
    """Where each has gone that was there."""
    there = [path for path in what if path.exists()]
    if not there:
        return {}
    aside = Path(tempfile.mkdtemp(prefix=time.strftime("put-aside-%Y%m%dT%H%M%S-"), dir=folder))
    moved = {path: aside / "-".join(path.relative_to(folder).parts) for path in there}
    for path, place in moved.items():
        shutil.move(path, place)
    return moved


def put_back(moved: dict[Path, Path]) -> None:
    for path, place in moved.items():
        if not path.exists():
            shutil.move(place, path)
    for aside in {place.parent for place in moved.values()}:
        with contextlib.suppress(OSError):
            aside.rmdir()


def account(folder: Path, lineage: str, server: str) -> Path | None:
    """The account that the certificate is from, or without one the only account there, which certbot takes then."""
    with contextlib.suppress(OSError):
        name = parse_renewal((folder / f"renewal/{lineage}.conf").read_text()).get("account", "")
        path = folder / account_folder(server, name)
        if name and (path / "regr.json").exists():
            return path
    with contextlib.suppress(OSError, ValueError):
        (registration,) = (folder / account_folder(server, "")).glob("*/regr.json")
        return registration.parent
    return None


def remains(folder: Path, lineage: str) -> list[Path]:
    """What there is of a certificate, unless it is whole."""
    live, renewal = folder / "live" / lineage, folder / f"renewal/{lineage}.conf"
    with contextlib.suppress(OSError, ValueError):
        pems = {part: (live / f"{part}.pem").read_bytes() for part in PARTS}
        read_certificate(pems["fullchain"])
        if renewal.exists():
            return []
    return [renewal, live, folder / "archive" / lineage]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "config": {"type": "path", "required": True},
            "lineage": {"type": "str", "required": True},
            "server": {"type": "str", "required": True},
            "challenge": {"type": "str", "choices": ["http-01", "dns-01"], "required": True},
            "environment": {"type": "dict", "default": {}},
            "pending": {"type": "path", "required": True},
            "folder": {"type": "path", "default": "/etc/letsencrypt"},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True)
    asked, folder = module.params, Path(module.params["folder"])
    known = account(folder, asked["lineage"], asked["server"])
    moved = put_aside(folder, remains(folder, asked["lineage"]))
    code, text, account_lost = ask(module, known)
    accounts = put_aside(folder, [known]) if account_lost and known else {}
    if accounts:
        code, text, _ = ask(module, None)
    if code:
        put_back(moved)
    aside = {str(place.parent) for place in (*moved.values(), *accounts.values()) if place.exists()}
    result = {"output": text, "put_aside": sorted(aside)}
    if code:
        module.fail_json(msg=explain(text, asked["server"], asked["challenge"]), **result)
    if Path(asked["pending"]).exists():
        module.fail_json(
            msg=f"The certificate has come, but certbot_deploy_hook_command has failed: {text}", changed=True, **result
        )
    module.exit_json(changed=True, **result)


if __name__ == "__main__":
    main()
